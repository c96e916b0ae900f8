"""Running an engine's post-processing, of which SGLang swallows a failure: it logs it, and goes on.

    run_hook(post_hook, model, torch.device("cuda", 0))     # raises what would have gone unnoticed

On a CPU SGLang's hook always fails, before it has done anything, as it takes "cpu" for a number.
Where weights are served as they were loaded nothing was to be done, so that does not count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from checkpoint_engine.errors import AdapterError

__all__ = ["run_hook"]

SWALLOWED = "Post-hook processing failed"


class _Swallowed(logging.Handler):
    """Remembers what the hook's module has logged of its failure."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith(SWALLOWED):
            self.said = self.said or message


def run_hook(
    hook: Callable[[], object], model: torch.nn.Module | None, device: torch.device
) -> None:
    """Call the hook.

    Raises:
        AdapterError: its module logged that it failed, and that matters.
    """
    logger = logging.getLogger(getattr(hook, "__module__", None) or __name__)
    listener, level = _Swallowed(), logger.level
    logger.addHandler(listener)
    logger.setLevel(min(logger.getEffectiveLevel(), logging.WARNING))  # the server's may be higher
    try:
        hook()
    finally:
        logger.setLevel(level)
        logger.removeHandler(listener)
    as_loaded = model is not None and device.type == "cpu" and _serves_as_loaded(model)
    if listener.said and not as_loaded:
        raise AdapterError(f"the engine went on after this: {listener.said}")


def _serves_as_loaded(model: torch.nn.Module) -> bool:
    """Whether no module quantises its weights, or packs them for a CPU's matrix units."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not type(method).__name__.startswith("Unquantized"):
            return False
        if getattr(module, "use_intel_amx_backend", False):
            return False
    return True
