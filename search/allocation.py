"""Which blocks a probe draws more pictures of: those of which is least settled whether they are among the best.

By gaps and variances, as in multi-bandit best arm identification (Gabillon et al., NeurIPS 2011), for several best ones
(Bubeck et al., ICML 2013): each effect in a window is a bandit, whose arms are the blocks, and all share one budget.
What is sought is a block's mean over all pictures, of which nothing is unknown when all of them are drawn.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np

C = TypeVar("C", bound=Hashable)
# Pictures for which the variance of all blocks counts beside a block's own: a few that happen to be alike prove little.
PRIOR = 12


def least_settled(gains: Mapping[C, Sequence[np.ndarray]], best: int, images: int, count: int) -> list[tuple[C, int]]:
    """At most `count` cases with a block, the least settled first, of those that have fewer than `images` pictures.

    `gains` are by case and block how much each picture so far gained, of shape (n,), n at least 1; the `best` with the
    highest means over all `images` are sought. A block is as settled as its mean is far from that of the nearest block
    on the other side of the border, in standard errors of its own.
    """
    certainty: dict[tuple[C, int], float] = {}
    for case, blocks in gains.items():
        drawn = np.array([len(block) for block in blocks])
        means = np.array([block.mean() for block in blocks])
        spread = np.array([block.var() for block in blocks])
        variance = (drawn * spread + PRIOR * spread.mean()) / (drawn + PRIOR)
        errors = np.sqrt(variance / drawn * (1 - drawn / images))
        order = np.argsort(-means, kind="stable")
        gaps = np.full(len(blocks), np.inf)
        if len(blocks) > best:
            gaps[order[:best]] = means[order[:best]] - means[order[best]]
            gaps[order[best:]] = means[order[best - 1]] - means[order[best:]]
        for block in np.flatnonzero(drawn < images):
            certain = gaps[block] / errors[block] if errors[block] else np.inf
            certainty[case, int(block)] = certain if gaps[block] else 0.0
    return sorted(certainty, key=certainty.__getitem__)[:count]


def coarse_to_fine(
    draw: Callable[[Mapping[tuple[C, int], int]], Mapping[tuple[C, int], np.ndarray]],
    cases: Sequence[C],
    blocks: int,
    images: int,
    first: int,
    share: float,
    best: int,
) -> dict[C, list[np.ndarray]]:
    """Of every case and block what its pictures so far gained, `(n,)`: `first` of each, then more of the least settled.

    In all at most `share` of `images` of every block are drawn. `draw` is told how many pictures some blocks shall have
    by now, and gives what each of these gained. A case of which it leaves out a block is refused: it is not answered.
    """
    gains: dict[C, list[np.ndarray]] = {}
    wanted = {(case, block): min(first, images) for case in cases for block in range(blocks)}
    while wanted:
        drawn = draw(wanted)
        for (case, block), values in drawn.items():
            gains.setdefault(case, [np.empty(0)] * blocks)[block] = values
        for case in {case for case, _ in wanted.keys() - drawn.keys()}:
            gains.pop(case, None)
        room = share * len(gains) * blocks * images - sum(len(block) for known in gains.values() for block in known)
        # few, for each picture drawn may change which they are; many, for every worker to have one
        picked = least_settled(gains, best, images, math.ceil(len(gains) * blocks / 8))
        sizes = [min(first, images - len(gains[case][block])) for case, block in picked]
        wanted = {
            (case, block): len(gains[case][block]) + size
            for (case, block), size, drawn_by_then in zip(picked, sizes, accumulate(sizes), strict=True)
            if drawn_by_then <= room
        }
    return gains
