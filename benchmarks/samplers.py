"""Which sampler finds most with how many pictures: python -m benchmarks.samplers [--size full|tiny] [--processes N]

TPE, GP, NSGA-II and random proposals alone, and what `blocktune search` does unasked, on the default space of the
bundled model, each from several seeds. Every proposal is really drawn and scored on the search prompts; equal ones are
measured once for all. Curves are the hypervolume of what a search has met against the pictures that it would have had
to draw by itself, with 95 % intervals of the mean over seeds (Student's t). Scores are of the search prompts: the luck
in them helps every sampler alike.

What was measured stays in the folder, so the same command goes on after an interruption, and `--processes` on all GPUs
of the host share it, a search each at a time: a small model leaves most of a GPU idle.
"""

import argparse
from concurrent.futures import as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from blocktune.search.config import Search, load_config
from blocktune.search.front import hypervolume, non_dominated
from scipy.special import stdtrit

from .searching import proposals
from .workbench import Workbench, side_by_side

RESULTS = Path(__file__).parent / "results" / "samplers"
SEARCHES = {name: {"sampler": name, "refine": 0.0} for name in ("tpe", "gp", "nsgaii", "random")}
SEARCHES |= {"default": {}}  # what a config that says nothing of it has


@dataclass(frozen=True)
class Size:
    """How much is measured: a search ends with so many candidates that differ, for equal ones cost nothing."""

    candidates: int
    pictures: int  # of each
    seeds: int
    overrides: tuple[str, ...] = ()


SIZES = {"full": Size(120, 96, 5), "tiny": Size(9, 2, 2, ("generation.num_inference_steps=5",))}


def curve(bench: Workbench, sampler: str, seed: int, size: Size) -> list[tuple[int, float]]:
    """Pictures drawn and hypervolume, after each trial of one search."""
    baseline = bench.baseline(bench.costs().run_seconds, "search", size.pictures)
    drawn, points, told = 0, [], []
    search = Search.model_validate(SEARCHES[sampler] | {"seed": seed})
    # a sampler that has nothing new to propose ends as well
    for proposal in islice(proposals(bench, search, size.pictures), 2 * size.candidates):
        drawn += size.pictures * proposal.new
        points = non_dominated([*points, proposal.point])
        told.append((drawn, hypervolume(points, baseline)))
        if drawn >= size.pictures * size.candidates:
            break
    return told


def workbench(args: argparse.Namespace, size: Size) -> Workbench:
    overrides = [f"generation.batch={size.pictures}", f"prompts.search_images={size.pictures}", *size.overrides]
    return Workbench(load_config(args.config, overrides), args.out, args.device)


def searched(args: argparse.Namespace, seed: int, sampler: str) -> list[tuple[int, float]]:
    """`curve`, in a process of its own."""
    size = SIZES[args.size]
    return curve(workbench(args, size), sampler, seed, size)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean of one value per seed, and half of its 95 % interval."""
    n = len(values)
    return float(values.mean()), float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / n**0.5)


def summary(curves: dict[str, list[list[tuple[int, float]]]], pictures: int, candidates: int) -> dict[str, Any]:
    """Per sampler the curve on a common axis of pictures, and the end of it against random proposals, seed by seed."""
    axis = list(range(pictures, pictures * candidates + 1, pictures))
    told: dict[str, Any] = {"pictures": axis}
    ends = {}
    for sampler, of_seeds in curves.items():
        grid = np.zeros((len(of_seeds), len(axis)))  # what each search held when it had drawn so many
        for row, one in zip(grid, of_seeds, strict=True):
            row[:] = [max((v for drawn, v in one if drawn <= limit), default=0.0) for limit in axis]
        ends[sampler] = grid[:, -1]
        means = [interval(column) for column in grid.T]
        told[sampler] = {"mean": [m for m, _ in means], "half": [h for _, h in means]}
    for sampler, values in ends.items():
        if sampler != "random":
            told[sampler]["gain_over_random"] = interval(values - ends["random"])
    return told


def draw(told: dict[str, Any], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for sampler in SEARCHES:
        mean, half = np.array(told[sampler]["mean"]), np.array(told[sampler]["half"])
        (line,) = axis.plot(told["pictures"], mean, label=sampler, ls="--" if sampler == "random" else "-")
        axis.fill_between(told["pictures"], mean - half, mean + half, alpha=0.12, color=line.get_color(), lw=0)
    axis.set_ylim(bottom=0.85 * told["random"]["mean"][-1])  # what comes first is the same for all
    axis.set_xlabel("pictures drawn")
    axis.set_ylabel("hypervolume on the search prompts")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--config", type=Path, help="of a search: model, sampling, prompts, objectives and space")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=1, help="that search side by side")
    args = parser.parse_args()
    size = SIZES[args.size]
    torch.set_num_threads(1)  # as in each process: threads of several would wait for each other
    bench = workbench(args, size)
    bench.say(", ".join(f"{key} {value}" for key, value in bench.circumstances.items()))
    bench.baseline(bench.costs().run_seconds, "search", size.pictures)  # before anything else runs on the device
    # all samplers of one seed before the next, so that a run cut short compares like with like
    searches = [(seed, sampler) for seed in range(size.seeds) for sampler in SEARCHES]
    found: dict[tuple[int, str], list[tuple[int, float]]] = {}
    with side_by_side(args.processes) as processes:
        running = {processes.submit(searched, args, *search): search for search in searches}
        for done in as_completed(running):
            seed, sampler = running[done]
            found[seed, sampler] = done.result()
            drawn, volume = found[seed, sampler][-1]
            bench.say(f"seed {seed}, {sampler}: {drawn} pictures, hypervolume {volume:.3f}")
    curves = {sampler: [found[seed, sampler] for seed in range(size.seeds)] for sampler in SEARCHES}
    told = summary(curves, size.pictures, size.candidates)
    print()
    for sampler in SEARCHES:
        mean, half = told[sampler]["mean"][-1], told[sampler]["half"][-1]
        line = f"{sampler:<8} {mean:.3f} +- {half:.3f} after {told['pictures'][-1]} pictures"
        if sampler != "random":
            line += ", {:+.3f} +- {:.3f} against random".format(*told[sampler]["gain_over_random"])
        print(line, flush=True)
    bench.write("samplers.json", {**bench.circumstances, "size": args.size, "seeds": size.seeds, **told})
    draw(told, args.out / "samplers.png")


if __name__ == "__main__":
    main()
