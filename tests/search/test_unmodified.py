"""The unmodified model: what is refused, and how long is waited, when it is measured."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blocktune.evaluators import CostTable
from blocktune.policies import BlockPolicy
from blocktune.search.candidate import Candidate
from blocktune.search.config import Config, ConfigError, load_config
from blocktune.search.pool import Job, Pool
from blocktune.search.prompts import read_prompts
from blocktune.search.run_directory import RunDirectory
from blocktune.search.scoring import Measurement
from blocktune.search.unmodified import Unmodified

TABLE = CostTable(
    block_compute=(1.0,), block_reuse=(0.1,), step_overhead=0.1, run_overhead=0.1, run_seconds=5.0, steps=4, repeats=1,
    batch=2, rows=2, height=16, width=16, device="cpu", dtype="float32", threads=1,
)  # fmt: skip


def test_refused_as_soon_as_the_model_was_run(tmp_path: Path, tiny_sd3_pipeline: Any) -> None:
    run = RunDirectory(tmp_path)
    run.write_text(run.path / "cost_table.json", TABLE.model_dump_json())
    plain = Candidate(BlockPolicy.for_model(tiny_sd3_pipeline(), "unmodified", []), 4)
    nobody: Any = None  # is asked for anything
    with pytest.raises(
        ConfigError, match=r"space.guidance_until is \[0.2, 0.25, 0.3, 0.4, 0.6\]; accepted: \[\], for this model"
    ):
        Unmodified(plain, (), Config(), run, nobody, nobody)


@pytest.mark.parametrize(("racing", "parts"), [(True, [(0, 12), (12, 18), (18, 24)]), (False, [(0, 24)])])
def test_its_pictures_are_drawn_in_the_batches_of_those_that_race(
    racing: bool, parts: list[tuple[int, int]], tmp_path: Path, tiny_sd3_pipeline: Any
) -> None:
    """In others they would be of no use to candidates that begin as it does."""
    settings = [f"search.racing={racing}", "search.first_images=12", "prompts.search_images=24"]
    config = load_config(None, [*settings, "space.guidance_until=[]"])
    run = RunDirectory.open(tmp_path / "run", config, resume=False)
    plain = Candidate(BlockPolicy.for_model(tiny_sd3_pipeline(), "unmodified", []), 4)
    of_all = {"block_compute": (1.0,) * 4, "block_reuse": (0.1,) * 4}
    run.write_text(run.path / "cost_table.json", TABLE.model_copy(update=of_all).model_dump_json())
    rows = np.arange(24.0)
    asked: list[tuple[int, int]] = []

    def run_jobs(jobs: list[Job]) -> list[Job]:
        for job in jobs:
            end, start = job.args[3:]
            asked.append((start, end))
            pictures = np.tile(rows[start:end, None, None, None], (1, 4, 4, 3)).astype(np.uint8)
            scores = {name: rows[start:end] for name in ("shapes", "crispness", "sane")}
            job.result = Measurement(scores, pictures, 0.0, 0.0, 0.0)
        return jobs

    pool: Any = SimpleNamespace(run=run_jobs, expect=lambda *told: None, put=lambda value: value)
    quiet: Any = SimpleNamespace(wait=lambda told: None)
    unmodified = Unmodified(plain, read_prompts(config, "search"), config, run, pool, quiet)
    run.release()
    assert asked == parts
    assert unmodified.rounds == tuple(end for _, end in parts)
    assert unmodified.scores["shapes"].tolist() == unmodified.images[:, 0, 0, 0].tolist() == rows.tolist()


def test_a_worker_that_hangs_with_the_first_pictures_is_known_to(tmp_path: Path, tiny_sd3_pipeline: Any) -> None:
    """As soon as the cost table tells how long a picture takes: here 2.5 s."""
    run = RunDirectory(tmp_path)
    run.write_text(run.path / "cost_table.json", TABLE.model_dump_json())
    plain = Candidate(BlockPolicy.for_model(tiny_sd3_pipeline(), "unmodified", []), 4)
    config = load_config(None, ["space.guidance_until=[]"])
    prompts = read_prompts(config, "search")
    pool: Any = object.__new__(Pool)
    pool.config, pool.limit = config, None

    class Asked(Exception):
        pass

    def run_jobs(jobs: list[Job]) -> None:
        raise Asked(jobs[0].method, pool.limit)

    pool.run = run_jobs
    quiet: Any = SimpleNamespace(wait=lambda told: None)
    with pytest.raises(Asked) as asked:
        Unmodified(plain, prompts, config, run, pool, quiet)
    assert asked.value.args == ("measure", 60 + 20 * len(prompts) * 2.5)
    pool.config, pool.limit = load_config(None, ["ray.timeout_s=7"]), 7
    pool.expect(len(prompts), 2.5)
    assert pool.limit == 7
