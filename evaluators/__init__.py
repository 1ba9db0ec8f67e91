"""Scores of pictures by name, distances of sets of pictures, the statistics to compare them, and cost.

`get("shapes").score(images, prompts)` is a float64 array `(n,)`, one score per image.
"""

from .checkpoints import CheckpointError
from .distances import cmmd, fid
from .evaluator import Evaluator, as_array, scale_of
from .footprint import count_flops, peak_memory
from .latency import CostTable, measure_cost_table, time_runs
from .prompt_sets import read_prompt_set
from .prompts import Prompt, load_prompts, prompts_digest
from .registry import UnknownEvaluator, families, get, names, register
from .statistics import Interval, holm, mcnemar, minimum_detectable_difference, paired_interval

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
    "holm",
    "load_prompts",
    "mcnemar",
    "measure_cost_table",
    "minimum_detectable_difference",
    "names",
    "paired_interval",
    "peak_memory",
    "prompts_digest",
    "read_prompt_set",
    "register",
    "scale_of",
    "time_runs",
]
