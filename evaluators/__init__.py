"""Scores of pictures by name, distances of sets of pictures, the statistics to compare them, and cost.

`get("shapes").score(images, prompts)` is a float64 array `(n,)`, one score per image.
"""

from .checkpoints import CheckpointError
from .distances import cmmd, fid
from .evaluator import Evaluator, as_array
from .footprint import count_flops, peak_memory
from .latency import CostTable, measure_cost_table, time_runs
from .prompts import Prompt, load_prompts, prompts_digest
from .registry import UnknownEvaluator, families, get, names, register
from .statistics import Interval, paired_interval

__all__ = [
    "CheckpointError",
    "CostTable",
    "Evaluator",
    "Interval",
    "Prompt",
    "UnknownEvaluator",
    "as_array",
    "cmmd",
    "count_flops",
    "families",
    "fid",
    "get",
    "load_prompts",
    "measure_cost_table",
    "names",
    "paired_interval",
    "peak_memory",
    "prompts_digest",
    "register",
    "time_runs",
]
