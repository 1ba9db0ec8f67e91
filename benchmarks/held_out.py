"""What searches are worth on new prompts: python -m benchmarks.held_out [--size full|tiny] [--processes N]

Searches of the default space of the bundled model by several samplers, with and without candidates near the front,
each from several seeds and on as many pictures. What each would confirm is drawn on held-out prompts. Told are, with
95 % intervals of the mean over seeds (Student's t), the hypervolume and the largest speed-up that costs at most half a
point of alignment, by predicted seconds. GP is left out: it takes minutes to propose what others draw in one.

What was measured stays in the folder, so the same command goes on after an interruption, and `--processes` on all GPUs
of the host share it, a search each at a time.
"""

import argparse
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from blocktune.search.config import Search, load_config
from blocktune.search.front import hypervolume, non_dominated

from .samplers import interval
from .searching import searched
from .workbench import Workbench, side_by_side

RESULTS = Path(__file__).parent / "results" / "held_out"
NEAR = {"": 0.0, ", half near the front": 0.5, ", four fifths near the front": 0.8}
WAYS = {
    f"{sampler}{told}": {"sampler": sampler, "refine": share}
    for told, share in NEAR.items()
    for sampler in ("tpe", "nsgaii", "random")
}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    budget: int  # pictures of a search
    pictures: int  # of a candidate that stays in the race
    confirmed: int  # candidates
    held_out: int  # pictures of each
    timed: int  # pictures of the batch that the cost table is of
    seeds: int
    overrides: tuple[str, ...] = ()


SIZES = {
    "full": Size(11520, 192, 10, 576, 3072, 5, ("generation.batch=384",)),
    "tiny": Size(70, 2, 2, 2, 2, 2, ("generation.batch=2", "generation.num_inference_steps=5")),
}


def workbench(args: argparse.Namespace) -> Workbench:
    size = SIZES[args.size]
    counts = [f"prompts.search_images={size.pictures}", f"prompts.confirm_images={size.held_out}"]
    return Workbench(load_config(None, [*size.overrides, *counts]), args.out, args.device, timed=size.timed)


def worth(args: argparse.Namespace, way: str, seed: int) -> tuple[float, float]:
    """Held-out hypervolume of what one search would confirm, and its speed-up at no more than half a point lost."""
    size, bench = SIZES[args.size], workbench(args)
    search = Search.model_validate(WAYS[way] | {"seed": seed})
    chosen = searched(bench, search, size.budget, size.pictures, max(1, size.pictures // 8), size.confirmed)
    costs = bench.costs()
    plain = bench.baseline(costs.run_seconds, "confirm")
    points = [bench.point(w, costs.predict_policy(w.policy, w.steps), "confirm") for w in chosen]
    kept = [plain.latency / p.latency for p in points if plain.points(p)[0] >= -0.5]
    return hypervolume(non_dominated(points), plain), max(kept, default=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=1, help="that search side by side")
    args = parser.parse_args()
    size = SIZES[args.size]
    torch.set_num_threads(1)
    bench = workbench(args)
    bench.say(", ".join(f"{key} {value}" for key, value in bench.circumstances.items()))
    bench.costs()  # before anything else runs on the device
    found: dict[tuple[str, int], tuple[float, float]] = {}
    with side_by_side(args.processes) as processes:
        # all ways of one seed before the next, so that a run cut short compares like with like
        running = {processes.submit(worth, args, w, s): (w, s) for s in range(size.seeds) for w in WAYS}
        for done in as_completed(running):
            way, seed = running[done]
            found[way, seed] = done.result()
            volume, kept = found[way, seed]
            bench.say(f"seed {seed}, {way}: hypervolume {volume:.3f}, {kept:.2f}x at half a point")
    told = {}
    print()
    for way in WAYS:
        volumes, kept = np.array([found[way, seed] for seed in range(size.seeds)]).T
        told[way] = {"hypervolume": volumes.tolist(), "speedup": kept.tolist()}
        (volume, half), (speed, around) = interval(volumes), interval(kept)
        print(f"{way:<36} hypervolume {volume:.3f} +- {half:.3f}, {speed:.2f}x +- {around:.2f} at half a point lost")
    bench.write("held_out.json", {**bench.circumstances, "size": args.size, "pictures": size.budget, "ways": told})


if __name__ == "__main__":
    main()
