"""Fit the aesthetic head of the reference world: python -m blocktune.reference.train_aesthetic

A linear regression on the unit vectors of the world's tuned CLIP, as the published one is on those of another: from 10
for a picture as it was drawn down to 1 for one that is degraded fully. Solved, not trained: seconds. The published head
has five linear layers in a row; here the first does it all, and the others are the number one.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from ..evaluators.aesthetic import MLP_LAYERS
from ..evaluators.clip import load_clip
from ..evaluators.pictures import as_picture
from .degradations import degrade
from .scenes import draw, tabulate
from .scorers import AESTHETIC, PREFERENCE
from .train import sample_pairs

BEST, WORST = 10.0, 1.0
RIDGE = 1e-4  # of the mean square of a coordinate


def fit(vectors: torch.Tensor, ratings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `(dim,)` and bias `()` of the ridge regression of `ratings` `(n,)` on `vectors` `(n, dim)`."""
    mean, level = vectors.mean(0), ratings.mean()
    x, y = vectors - mean, ratings - level
    square = x.T @ x / len(x)
    weight = torch.linalg.solve(
        square + RIDGE * square.trace() / len(square) * torch.eye(len(square)), x.T @ y / len(x)
    )
    return weight, level - mean @ weight


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m blocktune.reference.train_aesthetic", description=__doc__)
    parser.add_argument("--clip", default=PREFERENCE, help="the model whose vectors are rated, named as clip_score's")
    parser.add_argument("--out", type=Path, default=AESTHETIC, help="where the head is saved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=4_000)
    args = parser.parse_args()
    _, scenes = sample_pairs(args.scenes, np.random.default_rng((args.seed, 7)))
    generator = torch.Generator().manual_seed(args.seed)
    strength = torch.rand(args.scenes, generator=generator)
    strength[::4] = 0  # as they were drawn
    drawn = torch.cat([draw(part) for part in tabulate(scenes).split(64)])
    seen = degrade(drawn, strength, generator).permute(0, 2, 3, 1).numpy()
    vectors = load_clip(args.clip).images([p for p in map(as_picture, seen) if p])
    ratings = BEST - (BEST - WORST) * strength
    weight, bias = fit(vectors.double(), ratings.double())
    error = (vectors.double() @ weight + bias - ratings).square().mean().sqrt().item()
    first, *others = MLP_LAYERS
    state = {first + "weight": weight[None], first + "bias": bias[None]}
    for layer in others:
        state |= {layer + "weight": torch.ones(1, 1), layer + "bias": torch.zeros(1)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.float() for name, value in state.items()}, args.out)
    record = {"scenes": args.scenes, "seed": args.seed, "error": round(error, 3), "torch": torch.__version__}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"saved {args.out}; the ratings are off by {error:.2f}", flush=True)


if __name__ == "__main__":
    main()
