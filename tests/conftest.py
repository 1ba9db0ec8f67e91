"""What tests of several rooms share."""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from blocktune.search.cli import main
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:  # the process that only hands tests out need not wait for it
    from diffusers import StableDiffusion3Pipeline

# A change is judged by what it breaks, not by which examples were drawn for it: the same ones every time.
# How long they take is the machine's: nothing is judged by that.
slow = [HealthCheck.too_slow]
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=slow)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_sd3_pipeline() -> "Callable[..., StableDiffusion3Pipeline]":
    """The builder: `tiny_sd3_pipeline(num_layers=4, qk_norm=None, dual_attention_layers=(), seed=0)`."""
    from .policies.pipelines import sd3_pipeline  # here: it imports all of diffusers' families

    return sd3_pipeline


@pytest.fixture
def blocktune(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command line, in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blocktune", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return code, said.out, said.err

    return run


@pytest.fixture
def mistake(blocktune: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """The one sentence on stderr that a person is told of a mistake at the command line, which exits with 2."""

    def run(*arguments: str) -> str:
        code, _, stderr = blocktune(*arguments)
        assert code == 2
        assert stderr.startswith("blocktune: ")
        assert len(stderr.splitlines()) == 1
        return stderr

    return run


def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: whoever waits for a search, as it for its workers, leaves half a core idle."""
    return min(os.cpu_count() or 1, 3) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole searches first, the longest before: beside the many short tests their waiting costs no time."""
    long = (
        "faults", "real_run", "examples", "road", "scaling", "probe", "guidance", "tracking", "limits", "study",
        "run_directory", "scoring", "pool",
    )  # fmt: skip
    items.sort(key=lambda item: next((i for i, name in enumerate(long) if item.path.stem == f"test_{name}"), len(long)))
