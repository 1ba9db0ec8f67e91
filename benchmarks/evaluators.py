"""Images per second and memory of every score: python -m benchmarks.evaluators [--size full|tiny] [NAME …]

Random checkpoints of the published sizes, written to a temporary folder and loaded as any other: speed and memory do
not depend on the values of weights. Each score runs in a process of its own. Memory is the peak of torch's tensors on a
GPU, and of the whole process on a CPU, the interpreter and its libraries (about half a GiB) included. Preparing the
pictures is part of the time.

The text encoders of `full` are those of the published models but for their vocabularies, which are small or cut; the
language model of `vqa_score` is that of Qwen2.5-VL-3B, of `vqa_score blip` BLIP-VQA base. `--size tiny` runs the same
road on models of a few thousand weights, to try it where no GPU is; its numbers say nothing.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocktune.evaluators import get, peak_memory, time_runs

from tests.evaluators.checkpoints import every

RESULTS = Path(__file__).parent / "results" / "evaluators"
PROMPT = "a photo of a red circle to the left of a blue square"
SIZES: dict[str, tuple[int, int]] = {"full": (64, 1024), "tiny": (8, 64)}  # pictures, and pixels of a side


def measure(key: str, size: Any, count: int, side: int, repeats: int) -> dict[str, Any]:
    """One score, on pictures of smooth noise."""
    with tempfile.TemporaryDirectory() as folder:
        evaluator = get(every(Path(folder), size)[key]())
        rng = np.random.default_rng(0)
        pictures = np.kron(
            rng.integers(0, 256, (count, 8, 8, 3), np.uint8), np.ones((1, side // 8, side // 8, 1), np.uint8)
        )
        reference = pictures[::-1] if evaluator.needs_reference else None

        def score() -> None:
            evaluator.score(pictures, [PROMPT] * count, reference)

        seconds = time_runs(score, repeats)
        if torch.cuda.is_available():
            memory = peak_memory(score)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"score": key, "images_per_s": count / seconds, "memory_gib": memory / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in every(Path()) if name != "vqa_attributes"]  # some questions to each picture of vqa_score
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all when not given: {', '.join(names)}")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--pictures", type=int, help="other than 64 of full, 8 of tiny")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables; nothing is written for tiny")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"NAME is {', '.join(sorted(unknown))}; accepted: {', '.join(names)}")
    count, side = SIZES[args.size]
    count = args.pictures or count
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    measured = {"device": device, "torch": torch.__version__, "size": args.size, "pictures": count, "pixels": side}
    print(", ".join(f"{key} {value}" for key, value in measured.items()), flush=True)
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        for key in args.names or names:
            rows.append(processes.apply(measure, (key, args.size, count, side, args.repeats)))
            print(line(rows[-1]), flush=True)
            if args.size == "full":
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / "evaluators.json").write_text(json.dumps(measured | {"results": rows}, indent=2) + "\n")
                (args.out / "evaluators.md").write_text(table(measured, rows))


def line(row: dict[str, Any]) -> str:
    return f"| {row['score']:<16} | {row['images_per_s']:>10.1f} | {row['memory_gib']:>10.2f} |"


def table(measured: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results as Markdown: a row per score."""
    told = ", ".join(f"{key} {value}" for key, value in measured.items())
    lines = [told, "", f"| {'score':<16} | images / s | memory GiB |", "|---|---|---|", *(line(row) for row in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
