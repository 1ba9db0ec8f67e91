"""A worker in this process: a device whose memory is too small for the batch."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from blocktune.policies import BlockPolicy, Reuse, Rule, predict_cache_bytes
from blocktune.policies.policy import ModelIdentity
from blocktune.search.candidate import Candidate
from blocktune.search.config import load_config
from blocktune.search.generation import embed, generate
from blocktune.search.prompts import read_prompts
from blocktune.search.worker import Worker

ROOM = 2  # pictures


@pytest.fixture
def worker(new_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Of a batch of 6, whose pipeline takes ROOM pictures at a time."""
    world = new_world()
    monkeypatch.syspath_prepend(world.folder)
    monkeypatch.setenv("FAULTS", str(world.folder / "faults"))
    threads = torch.get_num_threads()
    made = Worker(load_config(world.config, []))
    torch.set_num_threads(threads)
    return made


def limit(worker: Worker, room: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the pipeline run out of memory above `room` pictures; the sizes that it is asked for."""
    kind, asked = type(worker.pipe), []
    whole = kind.__call__

    @functools.wraps(whole)
    def call(*args: Any, **kwargs: Any) -> Any:
        asked.append(len(kwargs["generator"]))
        if asked[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return whole(*args, **kwargs)

    monkeypatch.setattr(kind, "__call__", call)
    return asked


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Candidate(BlockPolicy(name="unmodified", model=ModelIdentity.of(worker.pipe), rules=()), 2)
    before = worker.measure(plain, "confirm", None)
    asked = limit(worker, ROOM, monkeypatch)
    after = worker.measure(plain, "confirm", None)
    assert asked == [6, 3, 1, 1, 1, 1, 1, 1]
    assert np.abs(after.images.astype(int) - before.images).max() <= 1
    assert worker.measure(plain, "confirm", None, 5, 3).images.shape == after.images[3:5].shape
    assert asked[8:] == [1, 1]
    table = worker.cost_table()
    assert table.predict_policy(plain.policy, 2) > 0
    (timed,) = worker.time([plain])
    assert timed.pipeline > timed.transformer > 0


def test_one_picture_that_does_not_fit_is_an_error(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = limit(worker, 0, monkeypatch)
    plain = Candidate(BlockPolicy(name="unmodified", model=ModelIdentity.of(worker.pipe), rules=()), 2)
    with pytest.raises(torch.OutOfMemoryError):
        worker.measure(plain, "search", None)
    assert asked == [3, 3, 1]


def test_another_guidance_is_drawn_and_shares_no_step_with_the_model_s_own(worker: Worker) -> None:
    """Both candidates by turns in one worker, whose memory of first steps they fill together, and each alone."""
    policy = BlockPolicy(name="unmodified", model=ModelIdentity.of(worker.pipe), rules=())
    one, other = Candidate(policy, 3), Candidate(policy, 3, 2.5)
    first, unlike, again, alike = (worker.measure(c, "search", None) for c in (one, other, one, other))
    assert (first.steps_saved, unlike.steps_saved) == (0, 0)
    assert (again.steps_saved, alike.steps_saved) == (1, 1)
    assert np.array_equal(again.images, first.images)
    assert np.array_equal(alike.images, unlike.images)
    assert not np.array_equal(first.images, unlike.images)
    generation = worker.config.generation.model_copy(update={"guidance_scale": 2.5, "num_inference_steps": 3})
    prompts = read_prompts(worker.config, "search")
    rows = embed(worker.pipe, [p.text for p in prompts], generation)
    assert np.array_equal(generate(worker.pipe, prompts, rows, generation), unlike.images)
    changed = worker.measure(other, "search", None, changed={"guidance_scale": worker.config.generation.guidance_scale})
    assert np.array_equal(changed.images, first.images)  # a setting that is asked for goes before the candidate's


def test_what_residuals_take_is_measured_over_whole_runs_where_it_is_limited(worker: Worker) -> None:
    """Though the beginning is known from another candidate, as it is otherwise."""
    model = ModelIdentity.of(worker.pipe)
    late = Rule(blocks=tuple(range(model.num_blocks)), window=(0.5, 1.0), action=Reuse(every=2))
    plain, reusing = (Candidate(BlockPolicy(name="x", model=model, rules=rules), 4) for rules in ((), (late,)))
    worker.measure(plain, "search", None)
    unlimited = worker.measure(reusing, "search", None)
    assert unlimited.steps_saved > 0
    constraints = worker.config.constraints.model_copy(update={"max_cache_gib": 1.0})
    worker.config = worker.config.model_copy(update={"constraints": constraints})
    limited = [worker.measure(chosen, "search", None) for chosen in (plain, reusing)]
    assert [found.steps_saved for found in limited] == [1, 0]
    assert np.array_equal(limited[1].images, unlimited.images)
    rows = worker._split("search", worker.generation)[1]
    size = worker.pipe.default_sample_size // worker.pipe.transformer.config.patch_size
    predicted = predict_cache_bytes(
        worker.pipe, reusing.policy, num_steps=4, image_tokens=size**2, text_tokens=rows["prompt_embeds"].shape[1],
        pictures=3, guided=worker.generation.guidance_scale > 1,
    )  # fmt: skip
    assert [found.cache_bytes for found in limited] == [0, predicted]
    assert predicted > 0
