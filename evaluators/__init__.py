"""Scores of pictures by name, the statistics to compare them, and latency.

`get("shapes").score(images, prompts)` is a float64 array `(n,)`, one score per image.
"""

from typing import TYPE_CHECKING, Any

from .evaluator import Evaluator, as_array
from .prompts import Prompt, load_prompts, prompts_digest
from .registry import UnknownEvaluator, get, names, register
from .statistics import Interval, paired_interval

if TYPE_CHECKING:
    from .latency import CostTable, measure_cost_table, time_runs

__all__ = [
    "CostTable",
    "Evaluator",
    "Interval",
    "Prompt",
    "UnknownEvaluator",
    "as_array",
    "get",
    "load_prompts",
    "measure_cost_table",
    "names",
    "paired_interval",
    "prompts_digest",
    "register",
    "time_runs",
]


def __getattr__(name: str) -> Any:
    """Latency on demand: it alone needs torch, which takes seconds to import."""
    if name in ("CostTable", "measure_cost_table", "time_runs"):
        from . import latency

        return getattr(latency, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
