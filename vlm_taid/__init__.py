"""Distil a large vision-language model, or a language model, into a small one with TAID."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .distillation import distill
    from .evaluation import evaluate
    from .recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "distill", "evaluate"]

_HOMES = {"Recipe": ".recipe", "distill": ".distillation", "evaluate": ".evaluation"}


def __getattr__(name: str) -> Any:  # torch and transformers are imported when they are needed, not by --help
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
