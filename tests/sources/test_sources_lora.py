"""Models that peft trains: merged, the base alone, the adapters alone; nothing changes in them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from train_models import as_text, experts, llama, make, with_adapters

from checkpoint_engine.errors import SourceError, UsageError
from checkpoint_engine.sources import (
    adapter_config,
    adapter_weights,
    base_weights,
    merged_weights,
)
from children import call_all

Ranks = list[Any]
Publish = Callable[[str], tuple[str, list[dict[str, str]]]]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:UserWarning:peft", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def merged_by_peft(model: PeftModel, adapters: list[str] | None = None) -> dict[str, str]:
    """The same, by peft's own way, on a copy."""
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=adapters)
    state = merged.state_dict()
    if getattr(getattr(merged, "config", None), "tie_word_embeddings", False):
        del state["lm_head.weight"]
    return as_text(state)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(
        input_ids=torch.arange(12).reshape(2, 6), labels=torch.arange(12).reshape(2, 6)
    ).loss.backward()
    optimizer.step()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled by rank": {"use_rslora": True},
    "ranks that differ": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    "dora": {"use_dora": True},
    "a trained head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "dora of embeddings": {"target_modules": ["embed_tokens"], "use_dora": True},
    "with dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merged_is_what_peft_merges_and_nothing_changes(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = with_adapters(llama(tied=False, dtype=dtype), **KINDS[kind])
    before = as_text(model.state_dict())
    assert as_text(dict(merged_weights(model))) == merged_by_peft(model)
    assert as_text(model.state_dict()) == before


def test_training_goes_on_as_if_nothing_had_been_sent() -> None:
    """Bit for bit, gradients and the optimizer's state included."""
    torch.manual_seed(0)
    models = [with_adapters(llama(tied=True))]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(1)
            training_step(model, optimizer)
        sent = dict(merged_weights(models[0]))
        for tensor in sent.values():
            assert not tensor.requires_grad
    trained, alone = (state_of(*both) for both in zip(models, optimizers, strict=True))
    assert trained == alone
    assert as_text(sent) == merged_by_peft(models[1])


def test_merging_in_place_would_not_give_the_same_bits_back() -> None:
    """Why it is done out of place."""
    torch.manual_seed(0)
    model = with_adapters(llama(tied=True))
    before = as_text(model.state_dict())
    model.merge_adapter()
    with pytest.raises(SourceError, match="call unmerge_adapter"):
        list(merged_weights(model))
    model.unmerge_adapter()
    assert as_text(model.state_dict()) != before


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    gradients = {
        f"gradient of {name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    moments = {
        f"{name} {number}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    return as_text({**model.state_dict(), **gradients, **moments})


class Layers(nn.Module):
    """What language models have little of."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3)
        self.point = nn.Conv1d(channels, channels, 1)
        self.linear = nn.Linear(width, 2 * width + 1)
        self.norm = nn.BatchNorm1d(width)


@settings(deadline=None, max_examples=25)
@given(
    channels=st.integers(1, 4),
    width=st.integers(1, 9),
    rank=st.integers(1, 5),
    alpha=st.integers(1, 9),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    lora_bias=st.booleans(),
    num_adapters=st.integers(1, 3),
)
def test_all_kinds_of_layers(
    channels: int, width: int, rank: int, alpha: int, bias: Any, lora_bias: bool, num_adapters: int
) -> None:
    names = [f"adapter {number}" for number in range(num_adapters)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        bias="none" if lora_bias or num_adapters > 1 else bias,
        lora_bias=lora_bias,
        target_modules=["conv", "point", "linear"],
        init_lora_weights=False,
    )
    model = get_peft_model(Layers(channels, width), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    before = as_text(model.state_dict())
    for chosen in (names[:1], names):
        got = as_text(dict(merged_weights(model, adapters=chosen)))
        assert got == merged_by_peft(model, chosen)
    assert as_text(model.state_dict()) == before


def test_experts_whose_parameters_are_adapted() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 4, 6))
            self.down = nn.Parameter(torch.randn(3, 6, 4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()
            self.gate = nn.Linear(4, 3)

    original = Model()
    expected = as_text(original.state_dict())
    config = LoraConfig(
        r=2,
        target_modules=["gate"],
        target_parameters=["experts.up", "experts.down"],
        init_lora_weights=False,
    )
    model = get_peft_model(original, config)
    assert as_text(dict(merged_weights(model))) == merged_by_peft(model)
    assert as_text(dict(base_weights(model))) == expected


def test_experts_beside_layers_that_are_adapted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_adapters(experts(), target_modules=["q_proj", "v_proj"])
    copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path)
    saved = as_text(load_file(tmp_path / "model.safetensors"))
    assert as_text(dict(merged_weights(model))) == saved
    assert dict(base_weights(model)).keys() == saved.keys()


def test_wrappers_leave_no_trace() -> None:
    torch.manual_seed(0)
    model = with_adapters(llama(tied=True), modules_to_save=["up_proj"])
    expected = [as_text(dict(sent)) for sent in all_weights(model)]
    layers = model.get_base_model().model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    wrapped = torch.compile(model, backend="eager")
    assert [as_text(dict(sent)) for sent in all_weights(wrapped)] == expected


def all_weights(model: Any) -> list[Iterator[tuple[str, torch.Tensor]]]:
    return [merged_weights(model), base_weights(model), adapter_weights(model, "default")]


def test_layers_whose_weights_lie_transposed() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = with_adapters(
        GPT2LMHeadModel(config), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    assert as_text(dict(merged_weights(model))) == merged_by_peft(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_as_it_was_before_it_had_adapters(kind: str) -> None:
    torch.manual_seed(0)
    base = llama(tied=False)
    expected = as_text(base.state_dict())
    model = with_adapters(base, **KINDS[kind])
    assert as_text(dict(base_weights(model))) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_as_peft_saves_it(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_adapters(llama(tied=False), **KINDS[kind])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, selected_adapters=["default"], save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert as_text(dict(adapter_weights(model, "default"))) == as_text(saved)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert_alike(json.loads(json.dumps(adapter_config(model, "default"))), config)
    others = [name for name, _ in adapter_weights(model, "other")]
    assert len(others) == 4
    assert others[0].endswith("lora_A.weight")


def assert_alike(given: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """But for the order of what has none, and the class to load, which no engine asks for."""
    assert given.keys() == saved.keys()
    for key in given.keys() - {"auto_mapping"}:
        ordered = sorted if isinstance(saved[key], list) else lambda value: value
        assert ordered(given[key]) == ordered(saved[key]), key


# Sharded


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("bucket_bytes", [1, 4000, 1 << 20])
def test_a_sharded_model_is_merged_layer_by_layer(two: Ranks, kind: str, bucket_bytes: int) -> None:
    expected = merged_by_peft(make(kind, 3))  # type: ignore[arg-type]
    call_all(two, "build", kind=kind, seed=3, how="fsdp")
    held = call_all(two, "local")
    first, second = call_all(two, "merged", bucket_bytes=bucket_bytes)
    assert dict(first) == expected
    assert second == []
    assert call_all(two, "local") == held
    adapter = as_text(dict(adapter_weights(make(kind, 3), "default")))
    assert call_all(two, "adapter") == [adapter, {}]


def test_engines_end_with_the_merged_model(serving: Ranks, publish: Publish) -> None:
    call_all(serving, "build", kind="dora", seed=5, how="fsdp")
    shares = call_all(serving, "register", name="merged", how="merged")
    assert all(shares)
    _, given = publish("merged")
    assert given == [merged_by_peft(make("dora", 5))] * 4  # type: ignore[arg-type]


def test_layers_that_are_sharded_one_by_one_are_merged(two: Ranks) -> None:
    """As wrappers do that go by the size or the kind of each module."""
    expected = merged_by_peft(make("dora", 4))  # type: ignore[arg-type]
    call_all(two, "build", kind="dora", seed=4, how="fsdp of leaves")
    assert dict(call_all(two, "merged")[0]) == expected


# What cannot be sent


def test_an_adapter_on_one_of_two_tied_weights_is_refused() -> None:
    model = with_adapters(llama(tied=True), target_modules=["lm_head"])
    with pytest.raises(SourceError, match="are tied, and an adapter changes one of them"):
        list(merged_weights(model))


def test_a_head_that_is_trained_apart_from_what_it_is_tied_to_is_refused() -> None:
    model = with_adapters(llama(tied=True), modules_to_save=["lm_head"])
    with pytest.raises(SourceError, match=r"'lm_head.weight' should be tied"):
        list(merged_weights(model))


def test_layers_that_cannot_be_merged_one_by_one_are_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

    model = get_peft_model(Attention(), LoraConfig(target_modules=["attention"]))
    with pytest.raises(SourceError, match="attention: a MultiheadAttention cannot be merged"):
        list(merged_weights(model))
    grouped = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))
    model = get_peft_model(grouped, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(SourceError, match=r"peft cannot merge this layer: .*groups"):
        list(merged_weights(model))


def test_what_is_no_lora_is_refused() -> None:
    with pytest.raises(UsageError, match="no model of peft's"):
        list(merged_weights(llama(tied=True)))
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoHaConfig(target_modules=["0"]))
    with pytest.raises(UsageError, match="only LoRA"):
        list(merged_weights(model))
    with pytest.raises(UsageError, match="no adapter 'unknown'; the model has default"):
        list(adapter_weights(with_adapters(llama(tied=True)), "unknown"))
