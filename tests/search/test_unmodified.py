"""A model without an unconditional half has no guidance that could end earlier."""

from pathlib import Path
from typing import Any

import pytest
from blocktune.evaluators import CostTable
from blocktune.policies import BlockPolicy
from blocktune.search.candidate import Candidate
from blocktune.search.config import Config, ConfigError
from blocktune.search.run_directory import RunDirectory
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
