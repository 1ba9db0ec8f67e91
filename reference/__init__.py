"""The reference world: coloured shapes, a small trained SD3 pipeline that draws them, its prompts and judge."""

from typing import TYPE_CHECKING, Any

# not looked up late: the module `prompts`, once imported, would stand where the function should
from .prompts import prompts

if TYPE_CHECKING:
    from .pipeline import load_pipeline

__all__ = ["load_pipeline", "prompts"]


def __getattr__(name: str) -> Any:
    """`load_pipeline` on first use: prompts and judge must not wait for diffusers."""
    if name == "load_pipeline":
        from .pipeline import load_pipeline

        return load_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
