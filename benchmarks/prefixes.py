"""What sharing the beginnings of candidates saves: python -m benchmarks.prefixes [--pictures 24]

Counted, without pictures: the share of denoising steps that random proposals of the default space share with the
unmodified model or with each other. Measured on the bundled model: random proposals with and without sharing; pixels
and latents have to be equal to the last bit.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import optuna
import torch
import typer
from blocktune.policies import ModelIdentity
from blocktune.search.candidate import Candidate
from blocktune.search.config import Config
from blocktune.search.generation import device_name, embed, generate, load
from blocktune.search.outputs import Outputs, reached
from blocktune.search.prefixes import Prefixes, course
from blocktune.search.prompts import read_prompts
from blocktune.search.space import candidate, distributions, suggest


def proposals(config: Config, model: ModelIdentity, count: int, seed: int) -> list[Candidate]:
    """Random candidates of the config's space."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    space = distributions(config, model.num_blocks)
    return [candidate(suggest(study.ask(), space), config, model, f"proposal {i}") for i in range(count)]


def counted(candidates: list[Candidate], steps: int) -> float:
    """The share of steps that are known when `candidates` follow on the unmodified model, with memory for all."""
    known = set(course(None, steps, 0, ("both",)).digests)
    given = 0
    for one in candidates:
        told = course(one.policy, one.steps, 0, ("both",))
        given += one.steps - len(reached((i for i, d in enumerate(told.digests) if d not in known), told.needs))
        known.update(told.digests)
    return given / sum(one.steps for one in candidates)


def main(
    pictures: Annotated[int, typer.Option(help="pictures of each proposal that is measured")] = 24,
    measured: Annotated[int, typer.Option(help="proposals that are measured")] = 20,
) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config = Config()
    steps = config.generation.num_inference_steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load("reference", device, torch.bfloat16 if device == "cuda" else torch.float32)
    model = ModelIdentity.of(pipe)
    shares = [counted(proposals(config, model, 200, seed), steps) for seed in range(10)]
    print(f"counted over 10 x 200 proposals: {100 * statistics.mean(shares):.1f} % of steps saved", flush=True)

    prompts = read_prompts(config, "search")[:pictures]
    rows = embed(pipe, [p.text for p in prompts], config.generation)
    latents: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: (latents.append(z.clone()), decode(z, *args, **kwargs))[1]
    outputs, seconds, equal = Outputs(config.ray.prefix_gib), {"alone": 0.0, "shared": 0.0}, 0
    prefixes = Prefixes(outputs)
    chosen = proposals(config, model, measured, 0)
    generate(pipe, prompts, rows, config.generation, None, prefixes)
    prefixes.steps = prefixes.given = 0
    for i, one in enumerate(chosen):
        made = {}
        for way, memory in {"alone": None, "shared": prefixes}.items():
            latents.clear()
            begin = time.perf_counter()
            told = config.generation.model_copy(update=one.sampling)
            images = generate(pipe, prompts, rows, told, one.policy, memory)
            seconds[way] += time.perf_counter() - begin
            made[way] = images, torch.cat(latents)
        (images, last), (images_shared, last_shared) = made.values()
        equal += np.array_equal(images, images_shared) and torch.equal(last, last_shared)
        print(f"{i + 1}/{measured}: {equal} equal, {100 * prefixes.given / prefixes.steps:.1f} % saved", flush=True)
    result = {
        "device": f"{device_name(device)}, {pipe.dtype}",
        "counted_share_of_steps_saved": round(statistics.mean(shares), 4),
        "counted_by_seed": [round(share, 4) for share in shares],
        "measured_proposals": measured,
        "equal_to_the_last_bit": equal,
        "measured_share_of_steps_saved": round(prefixes.given / prefixes.steps, 4),
        "images_per_second_alone": round(measured * len(prompts) / seconds["alone"], 3),
        "images_per_second_shared": round(measured * len(prompts) / seconds["shared"], 3),
        "mib_held": round((outputs.size - outputs.room) / 2**20, 1),
    }
    for key, value in result.items():
        print(f"{key:<32} {value}")
    (Path(__file__).parent / "results" / "prefixes.json").write_text(json.dumps(result, indent=2) + "\n")
    if equal != measured:
        raise SystemExit("pictures differ")


if __name__ == "__main__":
    typer.run(main)
