"""Real searches of a tiny untrained model, by the command line, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml

# Seconds after which something is taken for hung, however slow and busy the machine.
HANG = 900.0

# Counts its calls in a file, so that the faults it is told to commit come in order, whatever process it lives in.
EVALUATOR = """
import os, signal, time
from pathlib import Path
import numpy as np

class Brightness:
    name, direction, needs_reference = "brightness", "maximize", False

    def score(self, images, prompts, reference=None):
        folder = Path(os.environ["FAULTS"])
        with (folder / "calls").open("a") as file:
            file.write("x")
        fault = folder / str((folder / "calls").stat().st_size)
        time.sleep(float(os.environ.get("PAUSE", "0")))
        told = fault.read_text() if fault.exists() else ""
        if told == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if told == "raise":
            raise RuntimeError("the lamp went out")
        values = np.asarray(images).reshape(len(images), -1).mean(1) / 255
        return np.full(len(images), np.nan) if told == "nan" else values

class Darkness(Brightness):
    name, direction = "darkness", "minimize"
"""


@dataclass
class World:
    """A folder with model, prompts, config and evaluator; runs commands there and leaves nothing behind."""

    folder: Path
    cwd: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    pause: float = 0.5  # seconds that a scoring takes, for tests that act in the middle of one

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "FAULTS": str(self.folder / "faults"), "TEST_MARK": self.mark,
            "COLUMNS": "200", "PAUSE": str(self.pause), "OMP_NUM_THREADS": "1", "RAY_DISABLE_IMPORT_WARNING": "1",
        }  # fmt: skip

    def run(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run `blocktune` to its end and expect this exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "blocktune.search", *map(str, arguments)],
            cwd=self.cwd, env=self.environment, capture_output=True, text=True, timeout=HANG,
        )  # fmt: skip
        assert done.returncode == code, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def drive(self, script: str) -> Any:
        """Run a script of Python with the config's path, and give what the last line that it prints is as JSON."""
        done = subprocess.run(
            [sys.executable, "-c", script, str(self.config)],
            cwd=self.cwd, env=self.environment, capture_output=True, text=True, timeout=HANG,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def start(self, *arguments: object) -> subprocess.Popen[bytes]:
        """Start `blocktune` as the leader of a group of its own."""
        with (self.folder / "stderr.txt").open("wb") as stderr:
            return subprocess.Popen(
                [sys.executable, "-m", "blocktune.search", *map(str, arguments)],
                cwd=self.cwd, env=self.environment, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
                # a shell starts what runs in its background deaf to Ctrl-C, and children inherit that
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip

    def processes(self) -> list[int]:
        """Every living process that a command of this world has started."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"TEST_MARK={self.mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


def until(condition: Callable[[], bool], what: str, seconds: float = HANG) -> None:
    """Wait for `condition`; fail with `what` after so many seconds: fewer where it is promised to come soon."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds:.0f} s in vain: {what}")
        time.sleep(0.1)


def trials_of(run: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials of the study in the run directory, as the database has them."""
    return optuna.load_study(study_name="blocktune", storage=f"sqlite:///{run / 'study.db'}").get_trials()


@pytest.fixture
def in_place(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process find what they find in the world's: what starts no worker needs none of its own."""
    monkeypatch.syspath_prepend(world.folder)
    monkeypatch.delitem(sys.modules, "lamp", raising=False)
    monkeypatch.chdir(world.cwd)
    for name in ("FAULTS", "PAUSE"):
        monkeypatch.setenv(name, world.environment[name])


@pytest.fixture
def printed(blocktune: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """What a command prints that ends well."""

    def run(*arguments: object) -> str:
        code, told, errors = blocktune(*map(str, arguments))
        assert code == 0, told + errors
        return told

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference architecture, untrained, on disk."""
    from blocktune.reference.pipeline import new_pipeline

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    new_pipeline().save_pretrained(str(folder))
    return folder


def _prompts(count: int, first_seed: int) -> str:
    texts = [
        ("a photo of a circle", "single"),
        ("a photo of a red ring", "colors"),
        ("a photo of two crosses", "counting"),
    ]
    records = [
        {"text": text, "kind": kind, "seed": first_seed + i} for i in range(count) for text, kind in [texts[i % 3]]
    ]
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="session")
def new_world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Callable[..., World]]:
    """A builder of worlds: `new_world(trials=7, faults={3: "raise"})`; faults are by the number of the scoring."""
    made: list[World] = []

    def build(trials: int = 7, faults: dict[int, str] | None = None) -> World:
        folder = tmp_path_factory.mktemp("world")
        world = World(folder, folder / "cwd")
        world.cwd.mkdir()
        (folder / "faults").mkdir()
        for number, fault in (faults or {}).items():
            (folder / "faults" / str(number)).write_text(fault)
        (folder / "lamp.py").write_text(EVALUATOR)
        (folder / "search.jsonl").write_text(_prompts(3, 0))
        (folder / "confirm.jsonl").write_text(_prompts(6, 100))
        config = {
            "name": "tiny",
            "model": {"path": str(tiny_model), "dtype": "float32"},
            "generation": {"num_inference_steps": 4, "batch": 6},
            "prompts": {
                "search": str(folder / "search.jsonl"), "confirm": str(folder / "confirm.jsonl"),
                "search_images": 3, "confirm_images": 6,
            },
            "objectives": {"alignment": "lamp:Brightness", "quality": "crispness", "reported": ["shapes", "psnr"]},
            "space": {"anchor_steps": [3]},
            "search": {"trials": trials},
            "confirm": {"candidates": 2, "repeats": 1},
            "ray": {"workers": 1, "cpus_per_worker": 1},
        }  # fmt: skip
        world.config.write_text(yaml.safe_dump(config))
        made.append(world)
        return world

    yield build
    for world in made:
        for pid in world.processes():
            os.kill(pid, signal.SIGKILL)
