"""What the benchmark of probes tells of made-up gains, whose best blocks are known."""

import numpy as np
import pandas as pd
import pytest
from blocktune.search.config import Probe

from benchmarks.probing import agreement, compare, replayed

PLAIN = Probe(images=64, first_images=8, chosen=2, share=0.4)


def _gains(noise: float) -> np.ndarray:
    """Two effects at six blocks, of which the first two are the best."""
    return np.array([0.3, 0.2, 0.1, 0.0, -0.1, -0.2])[:, None] + np.random.default_rng(0).normal(0, noise, (2, 6, 64))


def _table(of_blocks: np.ndarray) -> pd.DataFrame:
    rows = [{"block": b, "effect": "remove", "kind": "all", "delta": v.mean()} for b, v in enumerate(of_blocks)]
    return pd.DataFrame(rows).assign(low=-0.1, high=0.1)


def test_clear_blocks_are_found_in_every_order() -> None:
    assert all(row == {"same": 4.0, "points_lost": 0.0} for row in replayed(_gains(0.01), PLAIN).values())


def test_of_blurred_blocks_coarse_to_fine_finds_more_and_all_pictures_find_all() -> None:
    gains = _gains(0.4)
    part = replayed(gains, PLAIN)
    assert 2 < part["every block"]["same"] <= part["coarse"]["same"] < 4
    assert part["coarse"]["points_lost"] > 0
    whole = replayed(gains, PLAIN.model_copy(update={"share": 1.0}))
    assert whole["coarse"] == whole["every block"] == {"same": 4.0, "points_lost": 0.0}


def test_only_what_all_pictures_tell_apart_is_proven_worse() -> None:
    texts = np.arange(64).astype(str)
    told = {}
    for noise in (0.01, 2.0):
        (full, _) = _gains(noise)
        coarse = np.empty_like(full)
        coarse[np.argsort(-full.mean(-1))] = np.array([0, 0, 1, 1, 0, 0])[:, None]  # those after the best look best
        told[noise] = compare(_table(full), _table(coarse), "remove", full, texts, count=2)
        assert not {*told[noise]["best"]} & {*told[noise]["found"]}
        assert told[noise]["points_lost"] > 0
    assert told[0.01]["proven_worse"] == 2
    assert told[2.0]["proven_worse"] == 0


@pytest.mark.parametrize(("noise", "same"), [(0.001, 4), (1000.0, 2 * 2**2 / 6)])
def test_halves_of_the_prompts_agree_as_far_as_the_blocks_differ(noise: float, same: float) -> None:
    told = agreement(_gains(noise), np.arange(64).astype(str), count=32, chosen=2)
    assert told["same"] == pytest.approx(same, abs=1.0 if noise > 1 else 0)
    assert (told["of"], told["by_chance"]) == (4, pytest.approx(4 / 3))
