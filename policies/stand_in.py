"""What is called in place of a module while a forward runs, and looks like it to whoever walks the model meanwhile."""

from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Called in place of `original`, whose attributes, state and names it shows."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def __getattr__(self, name: str) -> Any:
        """A forward reads attributes of its blocks (SD3: `context_pre_only`), and blocks those of their attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The original's: a checkpoint that is saved from inside a forward has the keys of the model."""
        return self.original.state_dict(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """The original's, and so named parameters and buffers."""
        return self.original.named_modules(*args, **kwargs)
