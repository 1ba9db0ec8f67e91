"""Pictures per second and memory of every score: python -m benchmarks.evaluators [--size full|tiny] [NAME …]

What stands in the folder's `evaluators.json`, of the same device, torch and size, is kept: without NAME the scores that
are missing are measured, with NAME those, which replace their rows. `vqa_score` alone is the one that takes longest:
its checkpoint of 7 GiB is made, written and read. A score is timed on as many pictures, 4 at least, as `--seconds`
allow by the time that the first 4 took.

And its share of the time that a picture takes to be made: 28 steps of SD3.5-Large at 1024x1024 with guidance, timed on
the same device by a few forwards of the transformer. The decoder and text encoders are left out of that, so a share is
told too large rather than too small. The last line holds the scores of examples/sd3.5-large.yaml together against 10 %.

Random checkpoints of the published sizes, written to a temporary folder and loaded as any other: speed and memory do
not depend on the values of weights. Each score runs in a process of its own, the example's first, then the smallest
first; what is known is written after each. Memory is the peak of torch's tensors on a GPU, and of the whole process on
a CPU, the interpreter and its libraries (about half a GiB) included. Preparing the pictures is part of the time. The
prompts are the shipped ones, all six kinds in turn. The detector of `compositional` is random too, but sure of every
class somewhere, so that as many colours are named as are asked for; each of its objects covers about half the picture.

The text encoders of `full` are those of the published models but for their vocabularies, which are small or cut; the
language model of `vqa_score` is that of Qwen2.5-VL-3B, of `vqa_score blip` BLIP-VQA base. Not covered: `geneval` and
`t2i_attribute`, which are the two parts of `compositional`, the other `t2i_` scores, and `vqa_attributes`, some
questions to each picture of `vqa_score`. `--size tiny` runs the same road on models of a few thousand weights, to try
it where no GPU is; its numbers say nothing.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import resource
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from blocktune.evaluators import Evaluator, get, peak_memory, time_runs
from blocktune.evaluators.checkpoints import device
from blocktune.evaluators.compositional import prompts
from blocktune.evaluators.compositional_judge import Compositional
from blocktune.search.config import load_config

from tests.evaluators.checkpoints import blip, clip, every
from tests.evaluators.detectors import mask2former

T = TypeVar("T")
FEW, REPEATS = 4, 2
RESULTS = Path(__file__).parent / "results" / "evaluators"
EXAMPLE = "sd3.5-large"
BAR = 0.10  # of generation, for all scores of the example
SIZES: dict[str, tuple[int, int]] = {"full": (48, 1024), "tiny": (6, 64)}  # pictures, and pixels of a side


def evaluator_of(key: str, folder: Path, size: Any) -> Evaluator:
    """A key of `every`, `compositional`, or the name of a score without a model."""
    if key == "compositional":
        seeing = clip(folder / "clip", size, quick_gelu=True)
        return Compositional(mask2former(folder / "mask2former", size), seeing, blip(folder / "blip", size))
    families = every(folder, size)
    return get(families[key]() if key in families else key)


def measure(key: str, size: Any, count: int, side: int, seconds: float) -> dict[str, Any]:
    """One score, on pictures of smooth noise: `count` of them or as many as `seconds` allow, twice."""
    with tempfile.TemporaryDirectory() as folder:
        with device():  # of weights made by chance
            evaluator = evaluator_of(key, Path(folder), size)
        rng = np.random.default_rng(0)
        pictures = np.kron(
            rng.integers(0, 256, (count, 8, 8, 3), np.uint8), np.ones((1, side // 8, side // 8, 1), np.uint8)
        )
        texts = [prompt.text for prompt in islice(cycle(prompts("search")), count)]
        reference = pictures[::-1] if evaluator.needs_reference else None
        each: list[float] = []

        def score(first: int) -> None:
            evaluator.score(pictures[:first], texts[:first], None if reference is None else reference[:first])

        few = min(FEW, count)
        taken = time_runs(lambda: score(few), repeats=1, warmup=1) / few  # the first loads
        count = max(few, min(count, int(seconds / REPEATS / taken)))

        def timed() -> None:
            each.append(time_runs(lambda: score(count), REPEATS, warmup=0) / count)

        gc.collect()
        if torch.cuda.is_available():
            memory = peak_memory(timed)
        else:
            timed()
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "score": key, "seconds": each[0], "images_per_s": 1 / each[0], "memory_gib": memory / 2**30, "pictures": count,
    }  # fmt: skip


def known(file: Path, setup: dict[str, Any]) -> dict[str, Any]:
    """What `file` holds, or nothing yet. Raises ValueError where it is of another device, torch or size."""
    if not file.exists():
        return setup | {"results": []}
    told = json.loads(file.read_text())
    for field, value in setup.items():
        if told.get(field) != value:
            raise ValueError(
                f"{file} has {field} {told.get(field)!r}, here {value!r}; accepted: another --out, or --anew"
            )
    return told


def generation(size: str, steps: int) -> float:
    """Seconds that the example's transformer takes for a picture with guidance."""
    from benchmarks.overhead import Bench

    with torch.inference_mode():
        return Bench(EXAMPLE, size == "tiny", device().type).timed(4) * steps


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """What the function returns, from a process of its own, whose memory is free afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    config = load_config(Path(__file__).parents[1] / "examples" / f"{EXAMPLE}.yaml", [])
    objectives = config.objectives
    wanted = [objectives.alignment, objectives.quality, *objectives.reported, "sane"]  # every search holds sane
    names = list(dict.fromkeys([*wanted, "ssim", *every(Path())]))
    names.remove("vqa_attributes")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all when not given: {', '.join(names)}")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--pictures", type=int, help="other than 48 of full, 6 of tiny")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing each score, loading not counted")
    parser.add_argument("--anew", action="store_true", help="keep nothing of what was measured before")
    parser.add_argument("--out", type=Path, help=f"folder of the tables, {RESULTS} for full, none for tiny")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"NAME is {', '.join(sorted(unknown))}; accepted: {', '.join(names)}")
    count, side = SIZES[args.size]
    count = args.pictures or count
    out = args.out or (RESULTS if args.size == "full" else None)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    setup = {"device": gpu, "torch": torch.__version__, "size": args.size, "pixels": side}
    file = out / "evaluators.json" if out else None
    try:
        measured = known(file, setup) if file and not args.anew else setup | {"results": []}
    except ValueError as error:
        parser.error(str(error))
    rows = {row["score"]: row for row in measured.pop("results")}
    if "generation_s" not in measured:
        measured["generation_s"] = alone(generation, args.size, config.generation.num_inference_steps)
    print(", ".join(f"{key} {value}" for key, value in measured.items()), flush=True)
    failed = []
    for key in args.names or [name for name in names if name not in rows]:
        try:
            row = alone(measure, key, args.size, count, side, args.seconds)
        except Exception as error:  # the others are still to be told
            failed.append(f"{key}: {error!r}")
            print(failed[-1], flush=True)
            continue
        rows[key] = row | {"share": row["seconds"] / measured["generation_s"]}
        print(line(rows[key]), flush=True)
        if out and file:
            ordered = [rows[name] for name in names if name in rows]
            out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(measured | {"results": ordered}, indent=2) + "\n")
            (out / "evaluators.md").write_text(table(measured, ordered, wanted))
    print(verdict(list(rows.values()), wanted))
    if failed:
        sys.exit("\n".join(failed))


def line(row: dict[str, Any]) -> str:
    return f"| {row['score']:<16} | {row['images_per_s']:>10.1f} | {row['memory_gib']:>10.2f} | {row['share']:>19.2%} |"


def table(measured: dict[str, Any], rows: list[dict[str, Any]], wanted: list[str]) -> str:
    """The results as Markdown: a row per score, and what those of the example take together."""
    told = ", ".join(f"{key} {value}" for key, value in measured.items())
    head = [f"| {'score':<16} | images / s | memory GiB | share of generation |", "|---|---|---|---|"]
    return "\n".join([told, "", *head, *(line(row) for row in rows), "", verdict(rows, wanted)]) + "\n"


def verdict(rows: list[dict[str, Any]], wanted: list[str]) -> str:
    """The example's scores together against the bar, which fewer than all can miss and not hold."""
    shares = [row["share"] for row in rows if row["score"] in wanted]
    total = sum(shares)
    end = "MISSED" if total > BAR else "held" if len(shares) == len(wanted) else "open"
    return (
        f"{len(shares)} of the {len(wanted)} scores of {EXAMPLE}: {total:.2%} of generation, at most {BAR:.0%}: {end}"
    )


if __name__ == "__main__":
    main()
