"""The unmodified model on the search prompts: what every candidate is compared with, measured once and kept."""

from typing import Any

import numpy as np

from ..evaluators import CostTable, Prompt, get, scale_of
from .candidate import Candidate
from .config import Config, ConfigError
from .front import Baseline
from .pool import Job, Pool
from .progress import Display
from .run_directory import RunDirectory
from .space import guidance_ends_of, steps_of


class Unmodified:
    """Its pictures, their scores, and the cost of its blocks, in the run directory; measured where they are missing."""

    def __init__(
        self, plain: Candidate, prompts: tuple[Prompt, ...], config: Config, run: RunDirectory, pool: Pool,
        display: Display,
    ):  # fmt: skip
        self.candidate = plain
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
            (job,) = pool.run([Job("measure", (plain, "search", None))])
            run.write_images("unmodified", job.result.images)
            run.write_scores("unmodified", prompts, job.result.scores)
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
