"""The unmodified model on the search prompts: what every candidate is compared with, measured once and kept."""

from itertools import pairwise
from typing import Any

import numpy as np

from ..evaluators import CostTable, Prompt, get, scale_of
from .candidate import Candidate
from .config import Config, ConfigError
from .front import Baseline
from .pool import Job, Pool
from .progress import Display
from .racing import rounds
from .run_directory import RunDirectory
from .space import guidance_ends_of, steps_of


class Unmodified:
    """Its pictures, their scores, and the cost of its blocks, in the run directory; measured where they are missing."""

    def __init__(
        self, plain: Candidate, prompts: tuple[Prompt, ...], config: Config, run: RunDirectory, pool: Pool,
        display: Display,
    ):  # fmt: skip
        self.candidate = plain
        first = config.search.first_images if config.search.racing else len(prompts)
        # pictures after each round, its own too: only pictures that are drawn in the same batches share a beginning
        self.rounds = tuple(rounds(first, len(prompts)))
        table = run.path / "cost_table.json"
        if not table.exists():
            display.wait("measuring the cost of every block")
            (job,) = pool.run([Job("cost_table", ())])
            run.write_text(table, job.result.model_dump_json(indent=2) + "\n")
        self.costs = CostTable.model_validate_json(table.read_text())
        if guidance_ends_of(config) and not self.costs.guided:
            raise ConfigError(
                f"space.guidance_until is {list(config.space.guidance_until)}; accepted: [], for this model "
                "computes no unconditional half that could be left out."
            )
        pool.expect(len(prompts), self.costs.run_seconds / self.costs.batch)
        if not (run.scores / "unmodified.parquet").exists():
            display.wait("generating with the unmodified model")
            parts = pairwise((0, *self.rounds))
            jobs = pool.run([Job("measure", (plain, "search", None, end, start)) for start, end in parts])
            measured = [job.result for job in jobs]
            scores = {name: np.concatenate([one.scores[name] for one in measured]) for name in measured[0].scores}
            run.write_images("unmodified", np.concatenate([one.images for one in measured]))
            run.write_scores("unmodified", prompts, scores)
        self.images = pool.put(run.read_images("unmodified"))  # shared with all workers
        self.scores = {str(name): column.to_numpy() for name, column in run.read_scores("unmodified").items()}
        self._objectives = config.objectives.alignment, config.objectives.quality
        alignment, quality = (float(self.scores[name].mean()) for name in self._objectives)
        scales = scale_of(get(config.objectives.alignment)), scale_of(get(config.objectives.quality))
        self.point = Baseline("unmodified", alignment, quality, self.latency(plain), plain.key, scales=scales)
        # in seconds, at the most steps that a candidate may take
        self.slowest = max(self.costs.predict_policy(plain.policy, steps) for steps in steps_of(config))

    def latency(self, chosen: Candidate) -> float:
        """Predicted seconds of a batch: noise of timing would mislead the sampler; confirm times for real."""
        return self.costs.predict_policy(chosen.policy, chosen.steps)

    def transformer_latency(self, chosen: Candidate) -> float:
        """Of these, seconds in the forwards of the transformer."""
        return self.costs.predict_transformer(chosen.policy, chosen.steps)

    def differences(self, scores: Any) -> np.ndarray:
        """Alignment and quality of the first pictures less its own, in shares of 100 points: `(n, 2)`."""
        both = [np.asarray(scores[name]) - self.scores[name][: len(scores[name])] for name in self._objectives]
        return np.stack(both, axis=1) / self.point.scales
