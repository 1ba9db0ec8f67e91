"""What a transformer returned, kept for runs that begin alike; in an actor of its own, for all workers of a search.

Knows only keys and bytes, and imports nothing heavy.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError


def reached(steps: Iterable[int], needs: Sequence[Collection[int]]) -> set[int]:
    """These steps, those whose residuals they reuse, those whose residuals these reuse, and so on.

    `needs` are by step the steps that made what it reuses.
    """
    found = set(steps)
    spread = list(found)
    while spread:
        more = set(needs[spread.pop()]) - found
        found |= more
        spread += more
    return found


class Outputs:
    """At most `gib` of main memory.

    Those of the unmodified model stay once they are in, while the stage of the search lasts: most candidates begin so,
    and of what is met in turn, batch after batch, replacing the oldest would throw out each just before it is wanted.
    All others leave when room is needed, the longest unused first.
    """

    def __init__(self, gib: float) -> None:
        self.size = self.room = int(gib * 2**30)  # bytes, and those left
        self.plain: dict[bytes, bytes] = {}
        self.own: OrderedDict[bytes, bytes] = OrderedDict()
        self.stage = ""

    def recall(self, keys: Sequence[bytes], needs: Sequence[Collection[int]]) -> dict[bytes, bytes]:
        """What is kept under the keys of a run's steps, but of those that have to be computed for others that have to.

        `needs` are by step the steps that made what it reuses.
        """
        missing = (step for step, key in enumerate(keys) if key not in self.plain and key not in self.own)
        computed = reached(missing, needs)
        return {key: self._used(key) for step, key in enumerate(keys) if step not in computed}

    def _used(self, key: bytes) -> bytes:
        if key in self.plain:
            return self.plain[key]
        self.own.move_to_end(key)
        return self.own[key]

    def keep(self, outputs: Mapping[bytes, bytes], plain: Collection[bytes], stage: str) -> None:
        """Takes in what there is room for, or room can be made; `plain` are keys of the unmodified model's."""
        if stage != self.stage:
            self.stage, self.own = stage, OrderedDict(self.plain | self.own)
            self.plain = {}
        for key, value in outputs.items():
            if key in self.plain or key in self.own:
                continue
            while self.room < len(value) <= self.size and self.own:
                self.room += len(self.own.popitem(last=False)[1])
            if self.room >= len(value):
                self.room -= len(value)
                (self.plain if key in plain else self.own)[key] = value


class SharedOutputs:
    """Those of an actor. Where that died nothing is known, and runs are computed as ever."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def recall(self, keys: Sequence[bytes], needs: Sequence[Collection[int]]) -> dict[bytes, bytes]:
        try:
            return ray.get(self._actor.recall.remote(keys, needs))
        except RayError:
            return {}

    def keep(self, outputs: Mapping[bytes, bytes], plain: Collection[bytes], stage: str) -> None:
        self._actor.keep.remote(outputs, plain, stage)
