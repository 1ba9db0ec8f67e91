"""A folder of a run that cannot be written, or no more: one sentence, and what is there stays whole."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from blocktune.search.config import Config, ConfigError
from blocktune.search.run_directory import RunDirectory

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


def test_a_run_of_another_version_is_one_sentence(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "run", Config(), resume=False)
    run.release()
    run.config.write_text(run.config.read_text().replace("text_windows", "text_until"))
    with pytest.raises(ConfigError, match=r"run is of another version of blocktune: space\.text_until is not a field"):
        RunDirectory.open(tmp_path / "run", Config(), resume=True)
