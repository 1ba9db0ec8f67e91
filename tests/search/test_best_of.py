"""What picks gain by several pictures in the time of one: drawn and scored by a real worker, in this process."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from blocktune.evaluators import Interval, Prompt, get, paired_interval, scale_of
from blocktune.policies import BlockPolicy, Rule, Skip
from blocktune.search.best_of import best_of
from blocktune.search.candidate import Candidate
from blocktune.search.config import Config, ConfigError
from blocktune.search.front import Confirmed
from blocktune.search.pool import Job
from blocktune.search.prompts import read_prompts, reseeded
from blocktune.search.run_directory import RunDirectory
from blocktune.search.scoring import judge_of
from blocktune.search.worker import Worker

PICTURES = 6
JUDGE, OTHER = "aesthetic_v2:reference", "clip_score:reference"


class Here:
    """A pool whose only worker is this process."""

    def __init__(self, worker: Worker):
        self.worker, self.jobs = worker, list[Job]()

    def put(self, value: Any) -> Any:
        return value

    def run(self, jobs: list[Job], keep: Any = None) -> list[Job]:
        for job in jobs:
            job.result = getattr(self.worker, job.method)(*job.args)
            if keep:
                keep(job)
        self.jobs += jobs
        return jobs


def config_of(model: Path, by: str | None = JUDGE) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "generation": {"num_inference_steps": 3, "batch": 4},
            "prompts": {"search_images": 2, "confirm_images": PICTURES},
            "objectives": {"reported": ["shapes_binary", "psnr", OTHER, JUDGE]},
            "confirm": {"best_of": by},
        }
    )


@pytest.fixture(scope="module")
def study(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a study only what this reads: its config, the unmodified model's held-out pictures, and a pool."""
    config = config_of(tiny_model)
    pool = Here(Worker(config))
    run = RunDirectory.open(tmp_path_factory.mktemp("best") / "run", config, resume=False)
    plain = Candidate(BlockPolicy.for_model(pool.worker.pipe, "plain", []), 3)
    measured = pool.worker.measure(plain, "confirm", None)
    run.write_images("confirm-unmodified", measured.images)
    run.write_scores("confirm-unmodified", read_prompts(config, "confirm"), measured.scores)
    yield SimpleNamespace(
        config=config, pool=pool, run=run, said=(said := []), display=SimpleNamespace(say=said.append)
    )
    run.release()


@pytest.fixture
def pick(study: Any) -> tuple[Confirmed, Candidate]:
    """A policy of which a batch takes 10 s where the unmodified model takes 35, confirmed."""
    rule = Rule(blocks=[1], window=(0.4, 1.0), action=Skip())
    chosen = Candidate(BlockPolicy.for_model(study.pool.worker.pipe, "one", [rule]), 3)
    measured = study.pool.worker.measure(chosen, "confirm", study.run.read_images("confirm-unmodified"))
    same = Interval(delta=0.0, low=0.0, high=0.0, value=0.0, baseline=0.0, n=PICTURES, level=0.95)
    pick = Confirmed("one", chosen.key, 3, False, 1, same, same, {}, 10.0, 3.5, 3.5, picks=["fast"])
    study.run.write_scores(f"confirm-{chosen.key[:16]}-3", read_prompts(study.config, "confirm"), measured.scores)
    return pick, chosen


def test_the_best_of_as_many_as_the_time_allows_are_told(study: Any, pick: tuple[Confirmed, Candidate]) -> None:
    confirmed, chosen = pick
    best_of(study, [confirmed], {confirmed.key: chosen}, JUDGE, 35.0)
    (timed,) = [job.result for job in study.pool.jobs if job.method == "time_scoring"]
    assert 0 < timed < 1
    share = 1 / 3.5 + timed / 35
    assert [told["count"] for told in confirmed.best_of] == [2, 3]
    assert [told["speedup"] for told in confirmed.best_of] == pytest.approx([1 / (2 * share), 1 / (3 * share)])
    run = study.run
    drawn = [run.read_scores(f"best-of-{chosen.key[:16]}-3-{draw}") for draw in (1, 2)]
    drawn = [run.read_scores(f"confirm-{chosen.key[:16]}-3"), *drawn]
    assert len({tuple(scores[JUDGE]) for scores in drawn}) == 3  # other noise, other pictures
    before = run.read_scores("confirm-unmodified")
    for told in confirmed.best_of:
        judged = np.array([scores[JUDGE] for scores in drawn[: told["count"]]])
        assert told["by"] == JUDGE
        assert told.keys() == {"by", "count", "speedup", "shapes", "crispness", "shapes_binary", OTHER, JUDGE}
        kept = [drawn[draw][OTHER][i] for i, draw in enumerate(judged.argmax(0))]
        for name, after in ((JUDGE, judged.max(0)), (OTHER, np.array(kept))):
            pair = after, before[name]
            assert told[name] == paired_interval(*pair, groups=list(before["prompt"]), scale=scale_of(get(name))).points


def test_what_is_drawn_stays(study: Any, pick: tuple[Confirmed, Candidate]) -> None:
    confirmed, chosen = pick
    best_of(study, [confirmed], {confirmed.key: chosen}, JUDGE, 35.0)
    measured = sum(job.method == "measure" for job in study.pool.jobs)
    again = replace(confirmed, best_of=[])
    best_of(study, [again], {confirmed.key: chosen}, JUDGE, 35.0)
    assert sum(job.method == "measure" for job in study.pool.jobs) == measured
    assert [told["shapes"] for told in again.best_of] == [told["shapes"] for told in confirmed.best_of]


def test_no_more_than_one_fits_into_the_time_of_a_slow_pick(study: Any, pick: tuple[Confirmed, Candidate]) -> None:
    confirmed, chosen = replace(pick[0], speedup=1.9), pick[1]
    assert study.said == []  # while there was time
    best_of(study, [confirmed], {confirmed.key: chosen}, JUDGE, 35.0)
    assert confirmed.best_of == []
    assert re.fullmatch(rf"no pick leaves time for a second picture: {JUDGE} takes 0\.0\d of .*", study.said.pop())


@pytest.mark.parametrize("by", ["psnr", "shapes", "hps_v2.1:reference"])
def test_a_judge_is_reported_and_not_what_is_judged(tiny_model: Path, by: str) -> None:
    with pytest.raises(
        ConfigError, match=f"confirm.best_of is '{by}'; accepted: .*shapes_binary, clip_score:reference, aesthetic"
    ):
        judge_of(config_of(tiny_model, by))


def test_the_bundled_model_has_a_judge_and_others_have_none(tiny_model: Path) -> None:
    assert judge_of(Config()) == "clip_score:reference"
    assert judge_of(config_of(tiny_model, None)) is None
    assert judge_of(Config.model_validate({"objectives": {"reported": ["psnr"]}})) is None


def test_further_pictures_of_a_prompt_have_seeds_of_their_own() -> None:
    prompts = [Prompt("a", "single", 2**63 - 1), Prompt("b", "single", 1)]
    drawn = [reseeded(prompts, draw) for draw in range(4)]
    assert drawn[0] == tuple(prompts)
    seeds = [prompt.seed for one in drawn for prompt in one]
    assert len({seed % 2**32 for seed in seeds}) == 8  # torch's generator takes no more
    assert 0 <= min(seeds) <= max(seeds) < 2**63
