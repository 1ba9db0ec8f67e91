"""One resident pipeline that makes, scores and times pictures, for benchmarks that compare ways of making them.

What was measured lies in a folder under the name of the way, so a benchmark that was cut short goes on there.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocktune.evaluators import CostTable, Prompt, get, measure_cost_table, scale_of
from blocktune.policies import BlockPolicy, ModelIdentity
from blocktune.search.config import Config, Generation
from blocktune.search.front import Baseline, Point
from blocktune.search.generation import Rows, device_name, embed, generate, load, some
from blocktune.search.outputs import Outputs
from blocktune.search.prefixes import Prefixes
from blocktune.search.prompts import read_prompts, reseeded
from blocktune.search.space import guidance_ends_of


def take_gpu(process: int) -> None:
    """Processes side by side have the GPUs of the host in turn."""
    if torch.cuda.is_available():
        torch.cuda.set_device(process % torch.cuda.device_count())


def side_by_side(processes: int) -> ProcessPoolExecutor:
    """Processes of one thread each, which have the GPUs of the host in turn."""
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(processes):
        numbers.put(number)
    return ProcessPoolExecutor(processes, context, _begin, (numbers,))


def _begin(numbers: Any) -> None:
    torch.set_num_threads(1)
    take_gpu(numbers.get())


@dataclass(frozen=True)
class Way:
    """How pictures are made: by the model in so many steps, under a policy, or with a cache of a peer."""

    method: str
    name: str
    steps: int
    policy: BlockPolicy | None = None
    cache: Callable[[Any], AbstractContextManager[Any]] | None = None  # takes the pipeline

    @property
    def key(self) -> str:
        """The same for ways that make the same pictures; a cache is told by its name."""
        told = "plain"
        if self.cache:
            told = f"{self.method} {self.name}"
        elif self.policy and self.policy.acts:
            told = self.policy.digest[:24]
        return f"{told}-{self.steps}".replace(" ", "_").replace("/", "_")


class Workbench:
    """Everything is made on one device in one dtype, from the prompts, seeds and settings of one config."""

    def __init__(self, config: Config, out: Path, device: str, beside: Sequence[str] = (), timed: int = 0) -> None:
        """`beside` names what scores each picture beside the objectives; `timed` are the pictures of a timed batch."""
        self.config, self.out, self.device = config, out, device
        dtype = torch.bfloat16 if device == "cuda" or config.model.dtype == "bfloat16" else torch.float32
        self.pipe = load(config.model.path, device, dtype)
        self.model = ModelIdentity.of(self.pipe)
        self.steps = config.generation.num_inference_steps
        self.prompts = {split: read_prompts(config, split) for split in ("search", "confirm")}
        self.rows = {s: embed(self.pipe, [p.text for p in of], config.generation) for s, of in self.prompts.items()}
        self.objectives = (config.objectives.alignment, config.objectives.quality)
        self.scored = (*self.objectives, *beside)
        self.timed = timed or config.generation.batch
        self._prefixes = {split: Prefixes(Outputs(config.ray.prefix_gib)) for split in self.prompts}
        self._known: dict[str, dict[str, np.ndarray]] = {}
        self._started = time.monotonic()
        (out / "scores").mkdir(parents=True, exist_ok=True)
        self._refuse_others()

    def _refuse_others(self) -> None:
        """What lies in the folder must be of the same device, dtype, prompts and settings."""
        path, here = self.out / "measured_on.json", {**self.circumstances, **self.config.searched()}
        if not path.exists():
            self.write(path.name, here)
        elif json.loads(path.read_text()) != here:
            raise SystemExit(
                f"{path} tells of other circumstances; go on where they are the same, or take another --out."
            )

    @property
    def circumstances(self) -> dict[str, Any]:
        dtype = str(self.pipe.dtype).removeprefix("torch.")
        return {"device": device_name(self.device), "dtype": dtype, "torch": torch.__version__, "steps": self.steps}

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self._started:6.0f} s  {line}", flush=True)

    def scores(self, way: Way, split: str, count: int | None = None, draw: int = 0) -> dict[str, np.ndarray]:
        """Scores `(n,)` by name, per picture of the split or of its first `count`; measured only once.

        `draw` counts a prompt's pictures, each from a seed of its own.
        """
        prompts = self.prompts[split][:count]
        name = f"{split}-{len(prompts)}-{way.key}" + (f"-{draw}" if draw else "")
        path = self.out / "scores" / f"{name}.npz"
        if name not in self._known and path.exists():
            with np.load(path) as stored:
                self._known[name] = dict(stored)
        if name not in self._known:
            shorter = range(1, 0 if draw else len(prompts))
            begun = max((n for n in shorter if f"{split}-{n}-{way.key}" in self._known), default=0)
            images = self.pictures(way, split, len(prompts), begun, draw)
            texts = [p.text for p in prompts[begun:]]
            found = {score: get(score).score(images, texts) for score in self.scored}
            if begun:
                before = self._known[f"{split}-{begun}-{way.key}"]
                found = {score: np.concatenate([before[score], values]) for score, values in found.items()}
            self._known[name] = found
            beside = path.with_suffix(f".{os.getpid()}.npz")  # another process may be at the same
            np.savez(beside, allow_pickle=False, **self._known[name])
            beside.replace(path)
        return self._known[name]

    def matrix(self, way: Way, split: str, count: int) -> np.ndarray:
        """Alignment and quality per picture, `(count, 2)`."""
        scores = self.scores(way, split, count)
        return np.stack([scores[name] for name in self.objectives], axis=1)

    def pictures(self, way: Way, split: str, count: int, start: int = 0, draw: int = 0) -> np.ndarray:
        """uint8 `(count - start, height, width, 3)`."""
        part = slice(start, count)
        with way.cache(self.pipe) if way.cache else nullcontext():
            told = self.config.generation.model_copy(update={"num_inference_steps": way.steps})
            return generate(
                self.pipe, reseeded(self.prompts[split][part], draw), some(self.rows[split], part), told, way.policy,
                None if way.cache else self._prefixes[split],
            )  # fmt: skip

    def rounds(self, ways: Sequence[Way], count: int) -> list[list[float]]:
        """Measured seconds of one batch under each way, in each of so many rounds in which all have their turn.

        One way of each method is made before, and not counted, for what is chosen and allocated at a first time.
        """
        prompts, rows, generation = self._timed_batch("confirm")

        def timed(way: Way) -> float:
            told = generation.model_copy(update={"num_inference_steps": way.steps})
            with way.cache(self.pipe) if way.cache else nullcontext():
                self._synchronize()
                begin = time.perf_counter()
                generate(self.pipe, prompts, rows, told, way.policy)
                self._synchronize()
                return time.perf_counter() - begin

        for way in {way.method: way for way in ways}.values():
            timed(way)
        return [[timed(way) for way in ways] for _ in range(count)]

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _timed_batch(self, split: str) -> tuple[tuple[Prompt, ...], Rows, Generation]:
        """`timed` pictures of one batch, of the split's prompts over and over."""
        prompts, rows = self.prompts[split], self.rows[split]
        copies = -(-self.timed // len(prompts))
        rows = {name: values.repeat(copies, *[1] * (values.ndim - 1)) for name, values in rows.items()}
        generation = self.config.generation.model_copy(update={"batch": self.timed})
        return (prompts * copies)[: self.timed], some(rows, slice(self.timed)), generation

    def costs(self) -> CostTable:
        """The cost table of one batch, by which a search predicts latency."""
        path = self.out / "cost_table.json"
        if not path.exists():
            prompts, rows, generation = self._timed_batch("search")
            table = measure_cost_table(
                self.pipe,
                lambda: generate(self.pipe, prompts, rows, generation),
                repeats=3,
                operands=self.config.space.operands,
                unguided=bool(guidance_ends_of(self.config)),
            )
            path.write_text(table.model_dump_json(indent=2) + "\n")
        return CostTable.model_validate_json(path.read_text())

    def point(self, way: Way, latency: float, split: str, count: int | None = None) -> Point:
        alignment, quality = (float(self.scores(way, split, count)[name].mean()) for name in self.objectives)
        return Point(way.name, alignment, quality, latency, way.key, way.steps)

    def baseline(self, latency: float, split: str, count: int | None = None) -> Baseline:
        """The unmodified model, which others are told against."""
        scales = scale_of(get(self.objectives[0])), scale_of(get(self.objectives[1]))
        plain = self.point(Way("unmodified", "unmodified", self.steps), latency, split, count)
        return Baseline(**vars(plain), scales=scales)

    def write(self, name: str, value: Any) -> None:
        (self.out / name).write_text(json.dumps(value, indent=2) + "\n")
