"""What is said of a candidate that has some of its pictures."""

from typing import Any

import numpy as np
import pytest
from blocktune.search.config import Config, Constraints
from blocktune.search.entry import Entry
from blocktune.search.study import check_objectives
from blocktune.search.worker import Measurement
from pydantic import ValidationError

BEFORE = {"score": np.array([0.5, 0.7, 0.1, 0.3]), "psnr": np.full(4, 100.0), "sane": np.array([1.0, 0.0, 1.0, 1.0])}


def entry(*parts: dict[str, list[float]]) -> Entry:
    made: Any = Entry(None, None, 1.0, iter(()), True)  # pyright: ignore[reportArgumentType]
    for scores in parts:
        arrays = {name: np.array(values) for name, values in scores.items()}
        images = np.zeros((len(arrays["sane"]), 1, 1, 3), np.uint8)
        made.add(Measurement(arrays, images, 2.0, 1.0, steps_saved=0.5 * made.images))
    return made


def test_rounds_add_up_and_means_are_the_differences_seen() -> None:
    made = entry(
        {"score": [0.4], "psnr": [20.0], "sane": [1.0]}, {"score": [0.5], "psnr": [30.0], "sane": [1.0]}
    )  # fmt: skip
    assert (made.images, made.generate_seconds, made.score_seconds) == (2, 4.0, 2.0)
    assert made.steps_saved == 0.25  # nothing of the first picture's, half of the second's
    assert made.means(BEFORE) == pytest.approx({"score": 0.4 - 0.15, "psnr": 25.0, "sane": 0.75 + 0.5})


def test_constraints_are_broken_by_what_is_above_zero() -> None:
    made = entry({"psnr": [20.0, 30.0], "sane": [0.0, 0.0], "score": [0.5, 0.5]})
    wanted = Constraints(max_latency=0.7, min_fidelity={"psnr": 26.0})
    assert made.excesses(wanted, BEFORE, 0.75) == pytest.approx(
        {"insane_pictures": 1.0, "max_latency": 0.05, "min_fidelity psnr": 1.0}
    )
    assert made.certain(wanted, BEFORE, 0.6) == pytest.approx({"insane_pictures": 1.0, "max_latency": -0.1})
    assert made.excesses(Constraints(), BEFORE, 9.0) == {"insane_pictures": 1.0}
    made.cache_bytes = 3 * 2**29
    assert made.certain(Constraints(max_cache_gib=1.0), BEFORE, 0.6) == {"insane_pictures": 1.0, "max_cache_gib": 0.5}


def test_scores_that_are_not_finite_are_named() -> None:
    assert entry({"score": [np.nan], "psnr": [1.0], "sane": [1.0]}).not_finite() == (
        "score gave scores that are not finite"
    )
    assert entry({"score": [0.1], "psnr": [1.0], "sane": [1.0]}).not_finite() is None


def test_a_fidelity_that_is_not_reported_is_refused() -> None:
    with pytest.raises(ValueError, match="min_fidelity names 'ssim'; accepted: what is reported, shapes_binary, psnr"):
        check_objectives(Config(constraints=Constraints(min_fidelity={"ssim": 0.9})))
    with pytest.raises(ValidationError):
        Constraints(max_latency=0)
