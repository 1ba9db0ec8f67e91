"""A folder of a run that cannot be written, or no more: one sentence, and what is there stays whole."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from blocktune.policies import BlockPolicy, Reuse, Rule
from blocktune.reference.pipeline import new_transformer
from blocktune.search.config import Config, ConfigError, Search
from blocktune.search.run_directory import RunDirectory
from blocktune.search.storage import STUDY, open_storage

from .conftest import HANG, until


def test_a_place_that_cannot_be_written_is_one_sentence(
    new_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., str]
) -> None:
    world = new_world()
    place = world.folder / "a-file"
    place.write_text("not a folder")
    monkeypatch.syspath_prepend(str(world.folder))
    told = mistake("search", str(world.config), "--out", str(place / "run"))
    assert re.search(r"a-file/run cannot be written: .*\.$", told)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("there is no mount command, so no small disk")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=20)


def test_a_full_disk_is_one_sentence(new_world: Callable[..., Any], small_disk: Path) -> None:
    world = new_world()
    filler = small_disk / "filler"
    driver = world.start("search", world.config, "--out", small_disk / "run")
    until(
        lambda: (small_disk / "run" / "scores" / "trial-0000.parquet").exists() or driver.poll() is not None,
        "a trial",
    )
    with filler.open("wb", buffering=0) as file:
        try:
            for size in (4096, 1):
                while True:
                    file.write(b"x" * size)
        except OSError:
            pass
    code = driver.wait(HANG)
    told = (world.folder / "stderr.txt").read_text()
    assert code == 1, told
    assert "Traceback" not in told
    last = told.splitlines()[-1]  # MLflow may have said before that it stopped recording
    assert last.startswith("blocktune: ")
    assert re.search("disk is full|No space left", last)
    assert "--resume" in last
    filler.unlink()
    assert yaml.safe_load((small_disk / "run" / "config.yaml").read_text())["name"] == "tiny"


@pytest.fixture
def probe_folder(tmp_path: Path) -> Path:
    """What a probe leaves that was stopped at its first picture, or has ended."""
    run = RunDirectory.open(tmp_path / "probe", Config(), resume=False)
    run.write_json(run.state, {"dtype": "float32", "device": "x86_64 CPU, 1 threads", "versions": {}})
    run.release()
    return run.path


@pytest.mark.parametrize("command", ["confirm", "status", "front", "export"])
def test_the_folder_of_a_probe_is_no_searchs(command: str, probe_folder: Path, mistake: Callable[..., str]) -> None:
    before = sorted(probe_folder.rglob("*"))
    told = mistake(command, str(probe_folder))
    assert told == (
        f"blocktune: {probe_folder} holds a probe; accepted: the folder that a search wrote, as runs/reference.\n"
    )
    assert sorted(probe_folder.rglob("*")) == before


@pytest.mark.parametrize("state", [{}, {"search": "1f"}, {"dtype": "float32", "mlflow_run_id": "1f"}])
def test_a_search_is_one_from_its_first_moment_on_whether_probed_before_or_not(
    state: dict[str, Any], probe_folder: Path
) -> None:
    probe = RunDirectory(probe_folder)
    probe.write_json(probe.state, state and probe.read_state() | state)
    assert RunDirectory.of_search(probe_folder).path == probe_folder


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("command", ["confirm", "status", "front"])
def test_a_search_without_a_trial_is_told_at_once(
    stored: bool, command: str, tmp_path: Path, mistake: Callable[..., str]
) -> None:
    storage = {"storage": f"sqlite:///{tmp_path / 'studies.db'}"} if stored else {}
    run = RunDirectory.open(tmp_path / "run", Config(search=Search(**storage)), resume=False)
    run.release()
    assert "run has no study yet; its search stopped before the first trial." in mistake(command, str(run.path))
    if command == "confirm":
        directions = ["maximize", "maximize", "minimize"]
        url = storage.get("storage", f"sqlite:///{run.path / 'study.db'}")
        optuna.create_study(study_name=STUDY, storage=open_storage(url), directions=directions).ask()
        told = mistake("confirm", str(run.path))
        assert told.endswith(f"has no complete trial yet; go on with blocktune search --resume --out {run.path}.\n")


def test_export_names_the_picks_and_the_place(tmp_path: Path, mistake: Callable[..., str]) -> None:
    run = RunDirectory.open(tmp_path / "run", Config(), resume=False)
    run.release()
    for pick in ("balanced", "../run"):
        assert f"--pick is {pick!r}; accepted: none: nothing held." in mistake("export", str(run.path), "--pick", pick)
    policy = BlockPolicy.for_model(new_transformer(), "late", [Rule(blocks=[1], action=Reuse())])
    for name in ("balanced", "late-reuse-4"):
        policy.save(run.policies / f"{name}.json")
    policy.save(tmp_path / "outside.json")
    for pick in ("none", "../../outside", "../policies/balanced", ""):
        told = mistake("export", str(run.path), "--pick", pick)
        assert f"--pick is {pick!r}; accepted: balanced, late-reuse-4." in told
    place = tmp_path / "missing" / "policy.json"
    told = mistake("export", str(run.path), "-o", str(place))
    assert f"--output is {place}, which cannot be written: No such file or directory." in told


def test_a_run_of_another_version_is_one_sentence(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run", Config(), resume=False)
    run.release()
    run.config.write_text(run.config.read_text().replace("text_windows", "text_until"))
    with pytest.raises(ConfigError, match=r"run is of another version of blocktune: space\.text_until is not a field"):
        RunDirectory.open(tmp_path / "run", Config(), resume=True)
