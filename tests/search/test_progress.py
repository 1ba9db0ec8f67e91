"""What a person sees while nothing can be counted, and what a log keeps of it."""

import io
import time

import pytest
from blocktune.search import progress
from blocktune.search.progress import Display
from rich.console import Console


@pytest.fixture(params=[True, False], ids=["terminal", "log"])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[io.StringIO, bool]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=request.param, width=100)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    return written, request.param


def test_a_job_of_unknown_length_moves_on_a_terminal_until_the_next(shown: tuple[io.StringIO, bool]) -> None:
    written, terminal = shown
    with Display() as display:
        display.wait("measuring the cost of every block")
        late = time.monotonic() + (20 if terminal else 0.3)
        while written.getvalue().count("0/?") < 3 and time.monotonic() < late:
            time.sleep(0.05)
        assert (written.getvalue().count("0/?") >= 3) == terminal
        display.stage("confirm", 2)
        display.advance("one")
        display.advance("the other")
    lines = written.getvalue()
    assert lines.count("measuring the cost of every block") == 1
    assert "0/?" not in lines.rpartition("the other")[2]
    assert "2/2" in lines
