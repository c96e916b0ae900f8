"""The module behind a loader: what the loader leaves out is noticed, and there is a way back."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

import checkpoint_engine.adapters.module
from checkpoint_engine.adapters.module import Snapshot, Watch
from checkpoint_engine.errors import AdapterError

Named = list[tuple[str, torch.Tensor]]


class Fused(torch.nn.Module):
    """Two names of the checkpoint lie in one parameter, and two of the model are one."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = torch.nn.Parameter(torch.zeros(8, 4))
        self.norm = torch.nn.Parameter(torch.ones(4))
        self.head = torch.nn.Linear(4, 16, bias=False)
        self.embed = torch.nn.Embedding(16, 4)
        self.embed.weight = self.head.weight
        self.scale = torch.nn.Parameter(torch.tensor(1.0))  # in no checkpoint
        self.register_buffer("cache", torch.arange(4.0), persistent=False)

    def load_weights(self, named: Named) -> None:
        places = {"q": self.qk[:4], "k": self.qk[4:], "norm": self.norm, "head": self.head.weight}
        for name, tensor in named:
            if name in places:  # and nothing is said of others, as engines do
                places[name].data.copy_(tensor.to(torch.float32))


def checkpoint() -> dict[str, torch.Tensor]:
    shapes = {"q": (4, 4), "k": (4, 4), "norm": (4,), "head": (16, 4)}
    return {name: torch.full(shape, 2.0, dtype=torch.bfloat16) for name, shape in shapes.items()}


def load(
    model: Fused | Layers, tensors: dict[str, torch.Tensor], padded: frozenset[str] | None = None
) -> None:
    watch = Watch(model)
    with watch:
        watch.give(list(tensors.items()))
        model.load_weights(list(tensors.items()))
    watch.check(padded)


def test_a_whole_checkpoint_is_well_whatever_else_is_in_it() -> None:
    model = Fused()
    load(model, {**checkpoint(), "rotary.inv_freq": torch.ones(2)})
    assert model.qk.eq(2).all()


def test_it_may_come_in_several_groups() -> None:
    model = Fused()
    watch = Watch(model)
    for named in checkpoint().items():
        with watch:
            watch.give([named])
            model.load_weights([named])
    watch.check()


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def rename(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(f"{name}x", tensors.pop(name))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("norm"), "wrote nothing of the model's 'norm': "),
        (rename("head"), "wrote nothing of the model's 'head.weight'; it made no use of 'headx': "),
        (rename("k"), "wrote 16 of 32 elements of the model's 'qk'; it made no use of 'kx': "),
        (dict.clear, r"wrote nothing of the model's 'qk'"),
    ],
)
def test_what_was_left_unwritten_is_named(
    spoil: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    tensors = checkpoint()
    spoil(tensors)
    with pytest.raises(AdapterError, match=message):
        load(Fused(), tensors)


def test_what_is_padded_may_be_written_in_part_and_nothing_else() -> None:
    tensors = checkpoint()
    del tensors["k"]
    load(Fused(), tensors)  # where it is not known what is padded, this may be
    load(Fused(), {**tensors, "more": torch.ones(2)}, padded=frozenset(["qk"]))
    with pytest.raises(AdapterError, match="wrote 16 of 32 elements of the model's 'qk': "):
        load(Fused(), tensors, padded=frozenset(["head.weight"]))


class Layers(torch.nn.ModuleList):
    """Two of them, whose parameters are padded: half of each is in the checkpoint."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(4, 8, bias=False) for _ in range(2))

    def load_weights(self, named: Named) -> None:
        for name, tensor in named:
            layer, start = map(int, name.split("."))
            self[layer].weight.data[start : start + 2] = tensor


def test_what_is_padded_is_padded_in_every_layer() -> None:
    names = [f"{layer}.{start}" for layer in range(2) for start in (0, 2)]
    tensors = {name: torch.ones(2, 4) for name in names}
    load(Layers(), tensors)
    del tensors["1.2"]
    with pytest.raises(AdapterError, match=r"wrote 8 of 32 elements of the model's '1\.weight'"):
        load(Layers(), tensors)


def test_a_user_may_load_a_part_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_ENGINE_PARTIAL_LOADS", "allow")
    load(Fused(), {})


def test_of_a_loader_with_threads_nothing_is_concluded() -> None:
    model, tensors = Fused(), checkpoint()
    watch = Watch(model)
    with watch:
        watch.give(list(tensors.items()))
        thread = threading.Thread(target=model.load_weights, args=(list(tensors.items()),))
        thread.start()
        thread.join()
    watch.check()
    assert threading.getprofile() is None


def replace(model: Fused) -> None:
    """As post-processing does: another object, another storage, another content."""
    model.norm = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    model.qk.data = torch.zeros(1)
    model.head.weight.data.zero_()
    model.cache = torch.zeros(1)


def test_a_snapshot_restores_content_objects_and_storage() -> None:
    model = Fused()
    objects = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    contents = {name: p.detach().clone() for name, p in model.named_parameters()}
    snapshot = Snapshot.take(model)
    assert snapshot is not None
    replace(model)
    snapshot.restore()
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == objects
    assert all(torch.equal(p, contents[name]) for name, p in model.named_parameters())
    assert model.embed.weight is model.head.weight
    assert torch.equal(model.cache, torch.arange(4.0))


def test_there_is_none_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_engine.adapters.module, "available_bytes", lambda: 400)
    assert Snapshot.take(Fused()) is None
