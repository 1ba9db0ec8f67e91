"""Scores of pictures by name, distances of sets of pictures, the statistics to compare them, and cost.

`get("shapes").score(images, prompts)` is a float64 array `(n,)`, one score per image.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .evaluator import Evaluator, as_array, scale_of
from .prompt_sets import read_prompt_set
from .prompts import Prompt, load_prompts, prompts_digest
from .registry import UnknownEvaluator, families, get, names, register
from .statistics import (
    Interval,
    holm,
    mcnemar,
    minimum_detectable_difference,
    paired_bootstrap,
    paired_interval,
    paired_t_test,
)

if TYPE_CHECKING:
    from .checkpoints import CheckpointError
    from .distances import cmmd, fid
    from .footprint import count_flops, peak_memory
    from .inception import load_inception
    from .latency import CostTable, Latency, measure_cost_table, speedup, time_pipeline, time_runs

__all__ = [
    "CheckpointError",
    "CostTable",
    "Evaluator",
    "Interval",
    "Latency",
    "Prompt",
    "UnknownEvaluator",
    "as_array",
    "cmmd",
    "count_flops",
    "families",
    "fid",
    "get",
    "holm",
    "load_inception",
    "load_prompts",
    "mcnemar",
    "measure_cost_table",
    "minimum_detectable_difference",
    "names",
    "paired_bootstrap",
    "paired_interval",
    "paired_t_test",
    "peak_memory",
    "prompts_digest",
    "read_prompt_set",
    "register",
    "scale_of",
    "speedup",
    "time_pipeline",
    "time_runs",
]


# What needs torch, which takes seconds to import, is looked up when it is asked for.
_LATE = {
    "CheckpointError": "checkpoints",
    "CostTable": "latency",
    "Latency": "latency",
    "cmmd": "distances",
    "count_flops": "footprint",
    "fid": "distances",
    "load_inception": "inception",
    "measure_cost_table": "latency",
    "peak_memory": "footprint",
    "speedup": "latency",
    "time_pipeline": "latency",
    "time_runs": "latency",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(f".{_LATE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
