"""Post-processing that fails and says so only in its log, as SGLang's does."""

from __future__ import annotations

import logging

import pytest
import torch

from checkpoint_engine.adapters.hook import run_hook
from checkpoint_engine.errors import AdapterError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class UnquantizedLinearMethod:
    """SGLang's name for it."""


class Fp8LinearMethod:
    """Likewise."""


def model(method: object, *, packed: bool = False) -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    module.quant_method = method  # type: ignore[assignment]
    module.use_intel_amx_backend = packed  # type: ignore[assignment]
    return torch.nn.Sequential(module)


def swallowing() -> None:
    logging.getLogger(__name__).warning("Post-hook processing failed: no kernel")


@pytest.mark.parametrize(
    ("served", "device"),
    [
        (None, CPU),
        (model(UnquantizedLinearMethod()), GPU),
        (model(UnquantizedLinearMethod(), packed=True), CPU),
        (model(Fp8LinearMethod()), CPU),
    ],
)
def test_a_failure_that_was_swallowed_is_a_failure(
    served: torch.nn.Module | None, device: torch.device
) -> None:
    with pytest.raises(AdapterError, match="Post-hook processing failed: no kernel"):
        run_hook(swallowing, served, device)


def test_it_is_seen_whatever_the_server_logs() -> None:
    """As with SGLang's `--log-level error`, which sets the root logger's."""
    logger, root = logging.getLogger(__name__), logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with pytest.raises(AdapterError, match="Post-hook processing failed: no kernel"):
            run_hook(swallowing, None, GPU)
        assert logger.level == logging.NOTSET
        assert not logger.isEnabledFor(logging.WARNING)
    finally:
        root.setLevel(level)


def test_it_is_none_where_there_was_nothing_to_do() -> None:
    run_hook(swallowing, model(UnquantizedLinearMethod()), CPU)


def test_other_warnings_are_let_pass() -> None:
    run_hook(lambda: logging.getLogger(__name__).warning("slow"), None, GPU)


def test_what_a_hook_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        run_hook(lambda: 1 / 0, None, CPU)
    assert logging.getLogger(__name__).handlers == []
