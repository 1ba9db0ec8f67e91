"""What a search may spend, and why it ends: trials, pictures, minutes, or nothing gained for long."""

import time
from dataclasses import asdict, dataclass, field

from .config import Search

GAIN = 0.01  # a larger share of the hypervolume is a gain; every new front member adds a little


@dataclass
class Budget:
    """What was spent so far, over all processes that worked on one search; all but the clock is stored."""

    minutes: float = 0.0  # of searching, until the last trial that ended
    volume: float = 0.0  # hypervolume at the last gain
    gained: int = 0  # trials that were done by then
    clock: float = field(default_factory=time.monotonic)

    def trial(self, done: int, volume: float) -> dict[str, float]:
        """A trial ended, so many are done; what to store."""
        now = time.monotonic()
        self.minutes, self.clock = self.minutes + (now - self.clock) / 60, now
        if volume > (1 + GAIN) * self.volume:
            self.volume, self.gained = volume, done
        return {name: value for name, value in asdict(self).items() if name != "clock"}

    def ended(self, limits: Search, done: int, images: float) -> str | None:
        """The limit that is reached, and how; None where the search may go on."""
        minutes = self.minutes + (time.monotonic() - self.clock) / 60
        if done >= limits.trials:
            return f"search.trials: {done} are done"
        if limits.max_images is not None and images >= limits.max_images:
            return f"search.max_images: {images:.0f} pictures are drawn"
        if limits.max_minutes is not None and minutes >= limits.max_minutes:
            return f"search.max_minutes: {minutes:.1f} minutes are over"
        if limits.patience is not None and done - self.gained >= limits.patience:
            return f"search.patience: the hypervolume has not grown in {done - self.gained} trials"
        return None
