"""Scores of pictures by name, the statistics to compare them, and latency.

`get("shapes").score(images, prompts)` is a float64 array `(n,)`, one score per image.
"""

from .evaluator import Evaluator, as_array
from .latency import CostTable, measure_cost_table, time_runs
from .prompt_sets import read_prompt_set
from .prompts import Prompt, load_prompts, prompts_digest
from .registry import UnknownEvaluator, get, names, register
from .statistics import Interval, holm, mcnemar, minimum_detectable_difference, paired_interval

__all__ = [
    "CostTable",
    "Evaluator",
    "Interval",
    "Prompt",
    "UnknownEvaluator",
    "as_array",
    "get",
    "holm",
    "load_prompts",
    "mcnemar",
    "measure_cost_table",
    "minimum_detectable_difference",
    "names",
    "paired_interval",
    "prompts_digest",
    "read_prompt_set",
    "register",
    "time_runs",
]
