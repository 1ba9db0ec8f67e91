"""One of two processes that share the tokens of transformers: `python -m tests.policies.compose.two_ranks RANK STORE`.

Prints as JSON, for each family, what each of `RULES` gave: the largest distance to the output of one process and the
largest change that the rule makes there, or the refusal; and how many image tokens a block is given. There is no
accelerator, which diffusers asks for, so the CPU is put in its place; attention is Ulysses' all-to-all over gloo. Ring
attention is not covered.
"""

import json
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from blocktune.policies import PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers import ContextParallelConfig
from torch import nn

from ..families import Family
from .models import FAMILY, new_scheduler, policy_for

NAMES = ["flux-dev", "qwen-image", "wan"]
RULES = {
    "nothing": [],
    "skip middle": [Rule(blocks=[1], action=Skip())],
    "skip last": [Rule(blocks=[2], action=Skip())],
    "skip in a window": [Rule(blocks=[1], window=(0.5, 1), action=Skip())],
    "reuse middle": [Rule(blocks=[1], action=Reuse(every=2))],
    "skip first": [Rule(blocks=[0], action=Skip())],
    "reuse first": [Rule(blocks=[0], action=Reuse(every=2))],
    "value": [Rule(blocks=[1], action=ScaleText(operand="value", scale=1.7))],
    "input": [Rule(blocks=[1], action=ScaleText(operand="input", scale=1.7, scope="local"))],
}


def outcomes(family: Family) -> dict[str, Any]:
    model, alone, scheduler = family.build(), family.build(), new_scheduler()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    tokens: list[int] = []
    for where in (model, alone):
        family.block(where, 1).register_forward_pre_hook(
            lambda _, args, kwargs: tokens.append((*args, kwargs.get("hidden_states"))[0].shape[1]), with_kwargs=True
        )
    _, plain = denoise(family, model, scheduler), denoise(family, alone, scheduler)
    found: dict[str, Any] = {"tokens": (tokens[0], tokens[-1])}
    for name, rules in RULES.items():
        policy = policy_for(alone, *rules)
        with apply_policy(alone, policy, scheduler=scheduler):
            expected = denoise(family, alone, scheduler)
        try:
            with apply_policy(model, policy, scheduler=scheduler):
                got = denoise(family, model, scheduler)
        except PolicyError as error:
            found[name] = str(error)
        else:
            found[name] = (got - expected).abs().max().item(), (expected - plain).abs().max().item()
    return found


def denoise(family: Family, model: nn.Module, scheduler: Any) -> torch.Tensor:
    """(steps, ...). One row of six text tokens, without padding: they can be halved, as those of the image."""
    scheduler.set_timesteps(4)
    outputs = []
    for step, t in enumerate(scheduler.timesteps):
        with torch.no_grad():  # no dict: diffusers' hooks on the root read tuples
            outputs += model(**family.inputs(seed=step, batch=1, text_tokens=6), return_dict=False)
        scheduler.step(torch.zeros(1), t, torch.zeros(1))
    return torch.stack(outputs)


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    torch._C._get_accelerator = lambda *_: torch.device("cpu")
    torch.accelerator = SimpleNamespace(device_count=lambda: 1)
    print(json.dumps({name: outcomes(FAMILY[name]) for name in NAMES}), flush=True)
    dist.barrier()  # neither leaves before the other has read what it was sent
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
