"""What a policy is and how a pipeline obeys it."""

from .applied import Applied
from .apply import apply_policy
from .error import PolicyError
from .memory import predict_cache_bytes
from .plan import BlockStep, Counts, Plan
from .policy import BlockPolicy, ModelIdentity, Reuse, Rule, ScaleText, Skip
from .report import Call, Report

__all__ = [
    "Applied",
    "BlockPolicy",
    "BlockStep",
    "Call",
    "Counts",
    "ModelIdentity",
    "Plan",
    "PolicyError",
    "Report",
    "Reuse",
    "Rule",
    "ScaleText",
    "Skip",
    "apply_policy",
    "predict_cache_bytes",
]
