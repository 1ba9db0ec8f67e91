"""Pictures are scored beside the drawing of the next candidate, and a death costs no more than itself.

Actors of Ray that only wait, told to die or hang by files; in a process of their own, for Ray leaves open handles to
its servers behind, which pytest would take for this test's. With a pipeline and evaluators: test_scoring.
"""

from collections.abc import Callable
from typing import Any

import pytest

DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
import numpy as np
import ray
import blocktune.search.pool
from blocktune.search.config import load_config
from blocktune.search.pool import Job, Pool
from blocktune.search.scoring import Pictures

PLACE = Path(sys.argv[1]).parent

def tell(what):
    with (PLACE / "log").open("a") as file:
        file.write(what + "\\n")
    fault = PLACE / what
    if fault.exists():
        told = fault.read_text()
        fault.unlink()
        if told == "die twice":
            fault.write_text("die")
        if told.startswith("die"):
            time.sleep(0.2)  # until the driver knows what was finished before
            os.kill(os.getpid(), signal.SIGKILL)
        if told == "hang":
            time.sleep(600)
        if told == "raise":
            raise RuntimeError("the lamp went out")

class Scorer:
    def __init__(self):
        with (PLACE / "scorers").open("a") as file:
            print(os.getpid(), file=file)

    def score(self, name):
        tell(f"score {name}")
        until = time.monotonic() + (3 if name < "c" else 0.4)
        while time.monotonic() < until and f"draw {chr(ord(name) + 1)}" not in (PLACE / "log").read_text():
            time.sleep(0.05)  # until the next is begun, on however slow a machine
        tell(f"scored {name}")
        return {"pid": np.full(1, float(os.getpid()))}

class Worker:
    def __init__(self, config, dtype=None, outputs=None):
        self.scorer = ray.remote(Scorer).options(num_cpus=0).remote()

    def describe(self):
        from types import SimpleNamespace
        return SimpleNamespace(dtype="float32", node="here")

    def measure(self, name):
        tell(f"draw {name}")
        time.sleep(0.1)
        tell(f"drawn {name}")
        return Pictures(np.zeros((1, 8, 8, 3), np.uint8), 0.1, 0.0, [self.scorer.score.remote(name)])

    def time(self):
        tell("time")

blocktune.search.pool.Worker = Worker
pool = Pool(load_config(Path(sys.argv[1]), []))
pool._starting = 60.0  # whoever comes in the place of one that hung may take long to start, among other tests
told = {}
for faults in (
    {}, {"score b": "raise"}, {"draw b": "die"}, {"draw b": "hang"}, {"draw b": "die twice"}, {"score b": "die"},
    {"score b": "hang"},
):
    (PLACE / "log").write_text("")
    for what, fault in faults.items():
        (PLACE / what).write_text(fault)
    pool.limit = 15.0 if "hang" in faults.values() else None
    done, jobs = [], [Job("measure", (name,), name) for name in "abc"]
    for job in jobs:
        pool.submit(job)
    while pool.busy:
        done += [job for job in pool.wait() if not job.error]
    assert (pool.busy, pool.free, pool.size) == (0, 1, 1)
    pool.limit = None
    pool.run([Job("time", ())])
    told[" ".join([*faults, *faults.values()])] = {
        "order": [job.tag for job in done],
        "attempts": [job.attempts for job in jobs],
        "errors": [job.error for job in jobs],
        "scores": [len(job.result.scores["pid"]) if job.result else 0 for job in jobs],
        "score_seconds": [job.result.score_seconds if job.result else 0 for job in jobs],
        "log": (PLACE / "log").read_text().split("\\n")[:-1],
    }
until = time.monotonic() + 300
while len(alive := [pid for pid in (PLACE / "scorers").read_text().split() if Path("/proc", pid).exists()]) != 1:
    assert time.monotonic() < until, f"one worker's scorers are {alive}"
    time.sleep(0.1)
pool.close()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(new_world: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """What three candidates of one worker come to, by the fault that they met."""
    return new_world().drive(DRIVER)


def test_the_next_is_drawn_while_the_last_is_scored(told: dict[str, dict[str, Any]]) -> None:
    """And no further ahead than that; what is timed begins when all is scored."""
    found = told[""]
    log = found["log"]
    assert log.index("draw b") < log.index("scored a")
    assert log.index("scored a") < log.index("draw c") < log.index("scored b")
    assert log[-2:] == ["scored c", "time"]
    assert found["order"] == ["a", "b", "c"]
    assert found["errors"] == [None] * 3
    assert found["attempts"] == [1] * 3
    first, _, last = found["score_seconds"]
    assert first < 0.3 < last  # nothing was drawn while the last was scored


def test_scores_that_raise_fail_their_candidate_alone(told: dict[str, dict[str, Any]]) -> None:
    found = told["score b raise"]
    assert found["errors"] == [None, "the lamp went out", None]
    assert found["attempts"] == [1] * 3
    assert found["order"] == ["a", "c"]


def test_a_worker_that_dies_costs_the_candidate_before_no_attempt(told: dict[str, dict[str, Any]]) -> None:
    """Its scores may be lost with their owner; it is measured again, and is not to blame."""
    found = told["draw b die"]
    assert found["errors"] == [None] * 3
    assert found["attempts"] == [1, 2, 1]
    assert found["scores"] == [1] * 3
    assert sorted(found["order"]) == ["a", "b", "c"]
    assert found["log"].count("draw b") == 2


def test_a_worker_that_hangs_is_replaced(told: dict[str, dict[str, Any]]) -> None:
    found = told["draw b hang"]
    assert found["errors"] == [None] * 3
    assert found["attempts"][1:] == [2, 1]
    assert found["log"].count("draw b") == 2


def test_a_candidate_that_kills_two_workers_fails(told: dict[str, dict[str, Any]]) -> None:
    found = told["draw b die twice"]
    assert found["errors"] == [None, "its worker died 2 times", None]
    assert found["attempts"] == [1, 2, 1]
    assert sorted(found["order"]) == ["a", "c"]


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_scorer_that_is_lost_costs_the_candidate_that_it_was_at(told: dict[str, dict[str, Any]], fault: str) -> None:
    """The one before has been finished, and the one that is drawn meanwhile is not to blame."""
    found = told[f"score b {fault}"]
    assert found["errors"] == [None] * 3
    assert found["attempts"] == [1, 2, 1]
    assert found["scores"] == [1] * 3
    assert found["order"][0] == "a"
    assert found["log"].count("draw a") == 1
    assert found["log"].count("draw b") == 2
