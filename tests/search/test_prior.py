"""What a probe suggests and what was published, as choices of the space."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from blocktune.policies import Reuse, ScaleText, Skip
from blocktune.policies.policy import ModelIdentity
from blocktune.search.config import Config, ConfigError, Search, Space
from blocktune.search.prior import combined, published, read_probe, suggested
from blocktune.search.space import anchors, candidate, distributions
from hypothesis import given
from hypothesis import strategies as st

BLOCKS = 12
ORIGINS = ("probe: louder value", "probe: reuse", "probe: reuse and louder", "probe: skip")


def rows(effect: str, deltas: dict[int, float]) -> list[dict[str, Any]]:
    told = [{"block": b, "effect": effect, "window": "0-1", "kind": "all", "delta": d} for b, d in deltas.items()]
    # what one kind of prompts says is not asked
    return told + [row | {"kind": "single", "delta": -row["delta"]} for row in told]


def table() -> pd.DataFrame:
    """Louder text helps at blocks 4 and 5 and nothing helps by its key; 9 is idle, reuse harms the first blocks."""
    return pd.DataFrame(
        rows("enhance value", {3: -0.01, 4: 0.02, 5: 0.01})
        + rows("enhance key", {0: -0.03, 1: -0.01})
        + rows("reuse", {b: -0.02 for b in range(3)} | {b: -0.001 * (12 - b) for b in range(3, 9)})
        + rows("remove", {9: 0.0, 10: -0.05})
    )


def halves() -> pd.DataFrame:
    """Louder values help at block 4 early and at block 9 late; late the first half of the blocks may be reused."""
    early = rows("enhance value", {4: 0.03, 9: -0.05}) + rows("reuse", dict.fromkeys(range(BLOCKS), -0.3))
    late = rows("enhance value", {4: -0.05, 9: 0.02}) + rows("reuse", {b: -0.01 * b for b in range(BLOCKS)})
    late += rows("remove", {3: -0.02, 8: 0.0})
    return pd.DataFrame([row | {"window": "0-0.5"} for row in early] + [row | {"window": "0.5-1"} for row in late])


def probe_table(path: Path) -> str:
    table().to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def model(tiny_sd3_pipeline: Callable[..., Any]) -> ModelIdentity:
    return ModelIdentity.of(tiny_sd3_pipeline(num_layers=BLOCKS))


def test_bands_do_what_their_blocks_suggest(model: ModelIdentity) -> None:
    config = Config()  # four bands of three blocks
    points = suggested(table(), config, BLOCKS)
    assert tuple(points) == ORIGINS
    rules = {name: candidate(point, config, model, name).policy.rules for name, point in points.items()}
    (louder,) = rules["probe: louder value"]
    assert (louder.blocks, louder.action) == ((3, 4, 5), ScaleText(operand="value", scale=1.5))
    assert louder.window == (0.0, 1.0)
    # no block of the last band was worth the probe's time, so two of the other three reuse
    reusing = {r.blocks: r.action for r in rules["probe: reuse"]}
    assert reusing == {(3, 4, 5, 6, 7, 8): Reuse(every=6)}
    assert {r.blocks: r.action.type for r in rules["probe: reuse and louder"]} == {
        (3, 4, 5): "scale_text",
        (3, 4, 5, 6, 7, 8): "reuse",
    }
    (skip,) = rules["probe: skip"]
    assert (skip.blocks, skip.action) == ((9,), Skip())


def test_each_probed_window_is_proposed_where_the_space_has_one_like_it(model: ModelIdentity) -> None:
    config = Config(space=Space(bands=BLOCKS, text_windows=((0.0, 0.4), (0.0, 1.0), (0.5, 1.0))))
    points = suggested(halves(), config, BLOCKS)
    # reuse and skip last until the end of the run, as the second half does
    assert [*points] == [
        "probe: louder value 0-0.5", "probe: louder value 0.5-1", "probe: reuse 0.5-1", "probe: reuse and louder 0.5-1",
        "probe: skip 0.5-1",
    ]  # fmt: skip
    rules = {name: candidate(point, config, model, name).policy.rules for name, point in points.items()}
    louder = [rules[f"probe: louder value {window}"] for window in ("0-0.5", "0.5-1")]
    assert [(r.blocks, r.window) for (r,) in louder] == [((4,), (0.0, 0.4)), ((9,), (0.5, 1.0))]
    (reusing,) = rules["probe: reuse 0.5-1"]
    assert (reusing.blocks, reusing.window) == (tuple(range(6)), (0.5, 1.0))
    (skip,) = rules["probe: skip 0.5-1"]
    assert (skip.blocks, skip.window) == ((8,), (0.5, 1.0))


def test_a_window_unlike_all_of_the_space_proposes_nothing() -> None:
    tenth = table().assign(window="0.9-1")
    assert suggested(tenth, Config(), BLOCKS) == {}


def test_the_whole_run_has_a_say_in_any_window() -> None:
    config = Config(space=Space(text_windows=((0.0, 0.2), (0.6, 0.9))))
    points = suggested(table(), config, BLOCKS)
    assert points["probe: louder value"]["text_window"] == "0.6-0.9"  # the longest
    plain = anchors(config, BLOCKS)["unmodified"]
    assert points["probe: reuse"]["reuse_from"] == plain["reuse_from"]
    assert points["probe: skip"]["skip_from"] == 0.5


def test_a_band_for_every_block_takes_single_blocks(model: ModelIdentity) -> None:
    config = Config(space=Space(bands=BLOCKS))
    (louder, *_) = suggested(table(), config, BLOCKS).values()
    (rule,) = candidate(louder, config, model, "x").policy.rules
    assert rule.blocks == (4, 5)


@given(
    st.integers(1, 14), st.booleans(), st.sampled_from([(), (3,), (2, 4)]), st.sampled_from(["input", "key", "value"]),
    st.floats(1.1, 3.0),
)  # fmt: skip
def test_every_suggestion_lies_in_the_space(
    count: int, skip: bool, every: tuple[int, ...], operand: Any, scale: float
) -> None:
    config = Config(
        space=Space(bands=count, skip=skip, reuse_every=every, operands=(operand,), max_scale=scale, anchor_steps=())
    )
    choices = distributions(config, BLOCKS)
    probed = pd.concat([table(), halves()])
    for point in (*suggested(probed, config, BLOCKS).values(), *combined(config, BLOCKS).values()):
        for name, choice in choices.items():
            assert choice._contains(choice.to_internal_repr(point[name])), name


def test_known_savings_are_tried_together(model: ModelIdentity) -> None:
    config = Config()
    points = combined(config, BLOCKS)
    both = candidate(points["16 steps, late reuse 6, guidance until 0.3"], config, model, "both")
    assert (both.steps, both.policy.guidance_window) == (16, (0.0, 0.3))
    acts = {block: (rule.window, rule.action) for rule in both.policy.rules for block in rule.blocks}
    assert acts == dict.fromkeys(range(BLOCKS), ((0.3, 1.0), Reuse(every=6)))
    better = candidate(points["late forecast 3 until 0.65, guidance until 0.3"], config, model, "better").policy
    assert {(rule.window, rule.action) for rule in better.rules} == {
        ((0.3, 0.65), Reuse(every=3, forecast="linear")),
        ((0.65, 1.0), Reuse(forecast="linear")),
    }
    known = {candidate(p, config, model, "anchor").key for p in anchors(config, BLOCKS).values()}
    keys = [candidate(p, config, model, "both").key for p in points.values()]
    assert len({*keys, *known}) == len(keys) + len(known) == 14 + 7
    alone = Config(space=Space(steps=(), guidance_until=(), reuse_every=(3,)))
    assert [*combined(alone, BLOCKS)] == ["late forecast 3 until 0.65"]  # late reuse is an anchor
    neither = Space(steps=(), guidance_until=(), compute_until=(), forecast=False)
    assert not combined(Config(space=neither), BLOCKS)


def test_what_is_no_probe_of_this_model_is_one_sentence(tmp_path: Path) -> None:
    def prior(path: Path) -> Config:
        return Config(search=Search(prior=str(path)))

    (tmp_path / "text.parquet").write_text("block,effect")
    pd.DataFrame({"prompt": ["a"]}).to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(ConfigError, match=r"search.prior is .*, which cannot be read: no such file"):
        read_probe(prior(tmp_path / "none.parquet"))
    table().assign(window="all of it").to_parquet(tmp_path / "window.parquet")
    for name in ("text.parquet", "scores.parquet", "window.parquet"):
        with pytest.raises(ConfigError, match=r"accepted: the probe\.parquet that blocktune probe writes"):
            read_probe(prior(tmp_path / name))
    with pytest.raises(ConfigError, match="has a block 10; this model's are 0 to 5"):
        suggested(table(), Config(), 6)


def test_a_published_list_is_tried_where_model_and_space_have_it(model: ModelIdentity) -> None:
    flux = model.model_copy(update={"transformer": "FluxTransformer2DModel", "num_blocks": 57})
    whole = Config(space=Space(bands=57, operands=("input", "value")))
    blocks = []
    for origin, point in published(whole, flux).items():
        (rule,) = candidate(point, whole, flux, origin).policy.rules
        assert rule.action == ScaleText(operand="input", scale=1.5)
        blocks.append(rule.blocks)
    assert blocks == [(2, 7, 12, 17, 22), (0, 14, 35, 40, 47)]  # TexTailor's, and Diff-Aid's 1, 15, 36, 41, 48
    assert published(Config(space=Space(bands=57)), flux) == {}  # no operand `input`
    assert published(Config(space=Space(bands=4, operands=("input",))), flux) == {}
    part = Space(bands=57, operands=("input",), text_windows=((0.0, 0.5), (0.5, 1.0)))
    assert published(Config(space=part), flux) == {}  # none that lasts the whole run
    assert published(whole, model) == {}
