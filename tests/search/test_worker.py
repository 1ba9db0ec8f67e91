"""A worker in this process: a device whose memory is too small for the batch."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from blocktune.policies import BlockPolicy
from blocktune.policies.policy import ModelIdentity
from blocktune.search.config import load_config
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
    plain = BlockPolicy(name="unmodified", model=ModelIdentity.of(worker.pipe), rules=())
    before = worker.measure(plain, 2, "confirm", None)
    asked = limit(worker, ROOM, monkeypatch)
    after = worker.measure(plain, 2, "confirm", None)
    assert asked == [6, 3, 1, 1, 1, 1, 1, 1]
    assert np.abs(after.images.astype(int) - before.images).max() <= 1
    assert worker.measure(plain, 2, "confirm", None, 5, 3).images.shape == after.images[3:5].shape
    assert asked[8:] == [1, 1]
    table = worker.cost_table()
    assert table.predict_policy(plain, 2) > 0
    assert worker.time([(plain, 2)], 1)[0] > 0


def test_one_picture_that_does_not_fit_is_an_error(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = limit(worker, 0, monkeypatch)
    plain = BlockPolicy(name="unmodified", model=ModelIdentity.of(worker.pipe), rules=())
    with pytest.raises(torch.OutOfMemoryError):
        worker.measure(plain, 2, "search", None)
    assert asked == [3, 3, 1]
