"""What a person sees while a search runs: a live view on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """One bar for the trials, one for confirm, and lines for what happens. Writes to stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description:>8}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = None
        self._waiting = None
        self._images, self._seconds, self._started = 0, 0.0, time.monotonic()

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waited()
        self._bar.stop()

    def say(self, line: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self._started:6.0f} s[/dim]  {line}", soft_wrap=True)

    def wait(self, line: str) -> None:
        """`line`, and on a terminal a bar that moves until the next stage: of one job nobody knows how far it is."""
        self._waited()
        self.say(line)
        self._waiting = self._bar.add_task("", total=None, note="")

    def _waited(self) -> None:
        if self._waiting is not None:
            self._bar.update(self._waiting, visible=False)
            self._waiting = None

    def stage(self, name: str, total: int) -> None:
        self._waited()
        self._task = self._bar.add_task(name, total=total, note="")

    def advance(self, note: str) -> None:
        """One more of the stage is done; `note` says which."""
        if self._task is None:
            return
        self._bar.update(self._task, advance=1, note=note)
        if not self.console.is_terminal:
            task = self._bar.tasks[self._task]
            self.say(f"{task.description} {task.completed:.0f}/{task.total:.0f}  {note}")

    def tick(self) -> None:
        self._bar.refresh()

    def trials(self, done: int, total: int, standing: dict[str, float], images: int, seconds: float) -> None:
        """How the search stands; on a terminal after every trial, else after every tenth of them."""
        self._waited()
        self._images, self._seconds = self._images + images, self._seconds + seconds
        if self._task is None:
            self._task = self._bar.add_task("search", total=total, note="")
        note = ""
        if standing:
            note = (
                f"best alignment {standing['best_alignment']:.3f}, quality {standing['best_quality']:.3f}, "
                f"speed-up {standing['best_speedup']:.2f}x  hypervolume {standing['hypervolume']:.2f}"
            )
            if standing["failed"]:
                note += f"  failed {standing['failed']:.0f}"
            if self._seconds:
                note += f"  {self._images / self._seconds:.0f} images/s"
        self._bar.update(self._task, completed=done, note=note)
        if not self.console.is_terminal and standing and (done % max(1, total // 10) == 0 or done == total):
            self.say(f"search {done}/{total}  {note}")
