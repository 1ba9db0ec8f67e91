"""Evaluators in an actor of their own: the same scores as in the worker, beside the next drawing; it ends with it."""

import os
import time
from pathlib import Path

import numpy as np
from blocktune.policies import BlockPolicy, Rule, Skip
from blocktune.search.candidate import Candidate
from blocktune.search.config import Config, Objectives
from blocktune.search.pool import Job, Pool
from blocktune.search.scoring import held_out_distances, score
from blocktune.search.worker import Worker

from ..evaluators.checkpoints import inception


def config_of(model: Path, **ray) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "generation": {"num_inference_steps": 3, "batch": 2},
            "prompts": {"search_images": 5, "confirm_images": 2},
            "objectives": {"reported": ["lamp:Brightness", *Objectives().reported]},
            "ray": {"workers": 1, "evaluator_gpus": 0} | ray,
        }
    )


def scorers() -> list[int]:
    """Processes of this one's Ray that score."""
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _command(entry).startswith(b"ray::Scorer") and _is_ours(int(entry.name))
    ]


def _command(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def _is_ours(pid: int) -> bool:
    """Whether this process is an ancestor."""
    try:
        while pid > 1:
            if pid == os.getpid():
                return True
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        pass
    return False


def test_scores_are_those_of_the_worker(tiny_model, new_world, monkeypatch):
    world = new_world()
    monkeypatch.syspath_prepend(world.folder)
    for name in ("PYTHONPATH", "FAULTS"):
        monkeypatch.setenv(name, world.environment[name])
    worker = Worker(config_of(tiny_model, evaluator_gpus=None))
    rule = Rule(blocks=[1], window=(0.4, 1.0), action=Skip())
    policy = Candidate(BlockPolicy.for_model(worker.pipe, "one", [rule]), 3)
    plain = Candidate(BlockPolicy.for_model(worker.pipe, "plain", []), 3)
    before = worker.measure(plain, "search", None)
    wanted = worker.measure(policy, "search", before.images, 3)
    monkeypatch.setenv("PAUSE", "0.4")  # that a batch takes to be scored
    pool = Pool(config_of(tiny_model))
    try:
        jobs = pool.run(
            [
                Job("measure", (policy, "search", before.images, 3)),
                Job("measure", (plain, "search", None)),
            ]
        )
        for job, told in zip(jobs, (wanted, before), strict=True):
            assert job.result.scores.keys() == told.scores.keys()
            for name, scores in told.scores.items():  # a model's depend on the batch by rounding
                assert np.allclose(job.result.scores[name], scores, rtol=1e-5, atol=1e-4), name
            assert np.array_equal(job.result.images, told.images)
        assert jobs[0].result.score_seconds < 0.4  # the other was drawn by then
        assert jobs[1].result.score_seconds > 0.4
        assert len(scorers()) == 1
        (timed,) = pool.run([Job("time_scoring", ("crispness", before.images[:2]))])
        assert 0 < timed.result < 1
    finally:
        pool.close()
    until = time.monotonic() + 10
    while scorers() and time.monotonic() < until:
        time.sleep(0.1)
    assert not scorers()


def test_distances_of_sets_by_the_models_that_the_config_names(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    config = Config.model_validate({"confirm": {"fid": inception(tmp_path / "inception.pth")}})
    told = held_out_distances(config, images, images[:, ::-1])
    assert list(told) == ["cmmd", "fid"]
    assert min(told.values()) > 0
    assert held_out_distances(Config.model_validate({"model": {"path": "other"}}), images, images) == {}


def test_a_picture_of_another_size_is_not_in_order():
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    objectives = Objectives(reported=("psnr",))
    texts = ["a photo of a circle"] * 2
    assert score(objectives, images, texts, images)["sane"].tolist() == [1, 1]
    told = score(objectives, images[:, :40], texts, images)
    assert told["sane"].tolist() == [0, 0]
    assert told["psnr"].tolist() == [0, 0]
