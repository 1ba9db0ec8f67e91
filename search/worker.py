"""A worker: one resident pipeline that measures candidates. It knows nothing of Optuna, trials or files."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..evaluators import CostTable, Latency, Prompt, measure_cost_table, time_pipeline, time_runs
from ..policies import Reuse
from ..policies.policy import ModelIdentity
from .candidate import Candidate
from .config import Config, Generation
from .generation import Rows, device_name, embed, generate, load, some
from .outputs import Outputs, SharedOutputs
from .prefixes import Prefixes
from .prompts import read_prompts, reseeded
from .scoring import Measurement, Pictures, Scorer, held_out_distances, score, time_scoring
from .space import guidance_ends_of

T = TypeVar("T")


@dataclass(frozen=True)
class Description:
    """What a worker runs on, and the architecture of its model."""

    model: ModelIdentity
    scheduler: str
    height: int
    width: int
    dtype: str
    device: str
    node: str  # Ray's id: nodes of one machine share its name
    versions: dict[str, str]


class Worker:
    """Holds the pipeline, and per split the prompts and their embeddings, made once."""

    def __init__(self, config: Config, dtype: str | None = None, outputs: Any = None):
        """`outputs` is the actor that keeps what runs share, where others share it as well."""
        self.config = config
        self.generation = config.generation  # its batch is halved where memory is short
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(min(config.ray.cpus_per_worker, os.cpu_count() or 1))
        self.dtype = dtype or config.model.dtype
        if self.dtype == "auto":
            self.dtype = "bfloat16" if self.device == "cuda" else self._faster_dtype()
        self.pipe = load(config.model.path, self.device, getattr(torch, self.dtype))
        self._scorer: Any = self._new_scorer() if config.ray.evaluator_gpus is not None else None
        self._splits: dict[str, tuple[tuple[Prompt, ...], Rows]] = {}
        kept = SharedOutputs(outputs) if outputs else Outputs(config.ray.prefix_gib)
        self._prefixes = Prefixes(kept, f"{device_name(self.device)} {self.dtype}")

    def _new_scorer(self) -> Any:
        """An actor on the node of this worker, which Ray ends with it."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "num_gpus": self.config.ray.evaluator_gpus, "max_restarts": 0, "max_task_retries": 0}
        return ray.remote(Scorer).options(scheduling_strategy=here, **options).remote(self.config)

    def _faster_dtype(self) -> str:
        """bfloat16 pays only on CPUs that multiply it natively, so both are timed on two steps of one batch."""
        seconds, two_steps = {}, self.generation.model_copy(update={"num_inference_steps": 2})
        for dtype in ("float32", "bfloat16"):
            self.pipe = load(self.config.model.path, self.device, getattr(torch, dtype))
            self._splits = {}
            prompts, rows = self._batch("search")
            run = lambda p=prompts, r=rows: generate(self.pipe, p, r, two_steps)  # noqa: E731
            seconds[dtype] = time_runs(run, repeats=3)
        return min(seconds, key=seconds.__getitem__)

    def _split(self, name: str, generation: Generation) -> tuple[tuple[Prompt, ...], Rows]:
        key = f"{name} {generation.guidance_scale > 1}"  # embeddings hold the negative prompts' or not
        if key not in self._splits:
            prompts = read_prompts(self.config, name)
            self._splits[key] = (prompts, embed(self.pipe, [p.text for p in prompts], generation))
        return self._splits[key]

    def describe(self) -> Description:
        import diffusers
        import transformers

        size = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return Description(
            model=ModelIdentity.of(self.pipe),
            scheduler=type(self.pipe.scheduler).__name__,
            height=self.config.generation.height or size,
            width=self.config.generation.width or size,
            dtype=self.dtype,
            device=device_name(self.device),
            node=ray.get_runtime_context().get_node_id(),
            versions={m.__name__: m.__version__ for m in (torch, diffusers, transformers)}
            | {"python": platform.python_version()},
        )

    def measure(
        self,
        chosen: Candidate,
        split: str,
        reference: np.ndarray | None,
        count: int | None = None,
        start: int = 0,
        changed: dict[str, Any] | None = None,
        draw: int = 0,
    ) -> Measurement | Pictures:
        """The split's pictures, or those from `start` to `count`, of one candidate: scored, or on their way to it.

        Evaluators in an actor of their own are not waited for. `reference` are the unmodified model's pictures of the
        whole split; `changed` are fields of `generation`, which go before the candidate's own; `draw` counts a prompt's
        pictures, each from a seed of its own.
        """
        sampling = chosen.sampling | (changed or {})
        prompts, rows = self._split(split, self.generation.model_copy(update=sampling))
        part = slice(start, count)
        prompts, rows = reseeded(prompts[part], draw), some(rows, part)
        prefixes = self._prefixes
        prefixes.stage = repr((split, changed))
        taken, given = prefixes.steps, prefixes.given
        texts = [p.text for p in prompts]
        pending: list[Any] = []  # scores of the batches, where others are at them

        def send(first: int, images: np.ndarray) -> None:
            if first == 0:  # anew, where half the batch is tried
                pending.clear()
            batch = slice(first, first + len(images))
            compared = images if reference is None else reference[part][batch]
            pending.append(self._scorer.score.remote(images, texts[batch], compared))

        begin = time.perf_counter()
        each = send if self._scorer else None

        reuses = any(isinstance(rule.action, Reuse) for rule in chosen.policy.rules)
        limited = reuses and self.config.constraints.max_cache_gib is not None
        kept = [0]

        def made() -> np.ndarray:
            generation = self.generation.model_copy(update=sampling)
            sharing = None if limited or not self.config.ray.prefix_gib else prefixes
            del kept[1:]  # anew, where half the batch is tried
            return generate(self.pipe, prompts, rows, generation, chosen.policy, sharing, each, kept.append)

        images = self._fitting(made)
        end = time.perf_counter()
        saved = (prefixes.given - given) / (prefixes.steps - taken) if prefixes.steps > taken else 0.0
        if self._scorer:
            return Pictures(images, end - begin, saved, pending, cache_bytes=max(kept))
        scores = score(self.config.objectives, images, texts, images if reference is None else reference[part])
        return Measurement(scores, images, end - begin, time.perf_counter() - end, saved, cache_bytes=max(kept))

    def confirm(self, chosen: Candidate, reference: np.ndarray) -> Measurement | Pictures:
        """All held-out pictures of a candidate, with their distances to `reference`, as a set."""
        measured = self.measure(chosen, "confirm", reference)
        if isinstance(measured, Pictures):
            return replace(measured, distances=self._scorer.distances.remote(measured.images, reference))
        return replace(measured, distances=held_out_distances(self.config, measured.images, reference))

    def _fitting(self, run: Callable[[], T]) -> T:
        """What `run` returns, tried with half the batch, which then stays, as often as the device's memory is short."""
        while True:
            try:
                return run()
            except torch.OutOfMemoryError:
                if self.generation.batch == 1:
                    raise
            self.generation = self.generation.model_copy(update={"batch": self.generation.batch // 2})
            torch.cuda.empty_cache()

    def _batch(self, split: str) -> tuple[tuple[Prompt, ...], Rows]:
        prompts, rows = self._split(split, self.generation)
        first = slice(self.generation.batch)
        return prompts[first], some(rows, first)

    def cost_table(self) -> CostTable:
        """Seconds of every part of a run of one batch; the device must be quiet."""
        run = lambda: generate(self.pipe, *self._batch("search"), self.generation)  # noqa: E731
        operands, unguided = self.config.space.operands, bool(guidance_ends_of(self.config))
        return self._fitting(
            lambda: measure_cost_table(self.pipe, run, repeats=3, operands=operands, unguided=unguided)
        )

    def time_scoring(self, evaluator: str, images: np.ndarray) -> float:
        """Measured seconds of scoring `images`, of held-out prompts in their order, where pictures are scored."""
        texts = [p.text for p in self._split("confirm", self.generation)[0][: len(images)]]
        if self._scorer:
            return ray.get(self._scorer.time.remote(evaluator, images, texts))
        return time_scoring(evaluator, images, texts)

    def time(self, candidates: list[Candidate]) -> list[Latency]:
        """Measured seconds of one batch of each, one after another, the first once untimed before."""
        return self._fitting(lambda: self._time(candidates))  # all of them at one batch

    def _time(self, candidates: list[Candidate]) -> list[Latency]:
        prompts, rows = self._batch("confirm")
        turn = []
        for one in candidates:
            told = self.generation.model_copy(update=one.sampling)
            run = lambda c=one, g=told: generate(self.pipe, prompts, rows, g, c.policy)  # noqa: E731
            turn.append(time_pipeline(self.pipe, run, repeats=1, warmup=int(not turn)))
        return turn
