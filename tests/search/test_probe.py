"""A real probe of a tiny model by the command line, and what its table says."""

import hashlib
import json
import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from blocktune.evaluators import load_prompts
from blocktune.policies import BlockPolicy, Rule, Skip
from blocktune.policies.policy import ModelIdentity
from blocktune.search.config import ConfigError, load_config
from blocktune.search.config import Probe as ProbeConfig
from blocktune.search.generation import embed, generate, load
from blocktune.search.probe import EFFECTS, Part, Probe, best_blocks, pictures, rounds
from blocktune.search.progress import Display
from blocktune.search.run_directory import RunDirectory
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

BLOCKS = 12
SHOWN = ("remove", "disable", "enhance value", "enhance input")
PROBE = [
    "--set", "probe.images=3", "--set", "probe.first_images=1", "--set", "probe.random_sets=2",
    "--set", "probe.chosen=2", "--set", f"probe.effects={json.dumps(SHOWN)}",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(new_world):
    world = new_world()
    world.pause = 0
    return world


@pytest.fixture(scope="module")
def probed(world):
    """Coarse to fine, and what it printed."""
    done = world.run("probe", world.config, *PROBE)
    return world.cwd / "runs" / "tiny", done.stderr + done.stdout


def _means_of_first(run, effect: str, count: int) -> dict[int, float]:
    """By block the mean difference of alignment on the first pictures, from the stored scores."""
    config = RunDirectory.existing(run).load_config()
    model = ModelIdentity.of(load(config.model.path, "cpu", torch.float32))
    means = {}
    for block in range(BLOCKS):
        policy = Part(effect, (block,), (0.0, 1.0), count).policy(model, config.probe.scale)
        name = f"probe-{hashlib.sha256(f'{policy.digest}-search'.encode()).hexdigest()[:16]}"
        tables = (pd.read_parquet(run / "scores" / f"{n}.parquet") for n in (name, "unmodified"))
        after, before = (table[config.objectives.alignment] for table in tables)
        if len(after) >= count:
            means[block] = float((after - before)[:count].mean())
    return means


def test_the_better_half_of_the_blocks_has_twice_as_many_pictures(probed):
    run, _ = probed
    table = pd.read_parquet(run / "probe.parquet")
    everything = table[table["kind"] == "all"]
    for effect in SHOWN:
        rows = everything[everything["effect"] == effect].set_index("block")
        assert sorted(rows.index) == list(range(BLOCKS))
        assert (rows["whole"] == (rows["n"] == 3)).all()
        for drawn, blocks in ((1, BLOCKS), (2, 6)):
            means = _means_of_first(run, effect, drawn)
            went_on = set(rows.index[rows["n"] > drawn])
            assert (len(means), len(went_on)) == (blocks, 6 if drawn == 1 else 2)
            gains = {block: EFFECTS[effect][1] * mean for block, mean in means.items()}
            assert min(gains[b] for b in went_on) >= max(gains[b] for b in gains if b not in went_on)
        assert set(best_blocks(table, effect, 2)) == set(rows.index[rows["whole"]])
    assert set(table["kind"]) == {"all", "single", "colors", "counting"}
    assert (table["n"] > 0).all()
    several = everything[everything["n"] > 1]
    assert (several["low"] <= several["delta"]).all()
    assert (several["delta"] <= several["high"]).all()
    assert table[table["n"] == 1]["low"].isna().all()  # one prompt has no interval


@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 100), st.integers(1, 100))
def test_rounds_double_the_pictures_and_halve_the_blocks(num_blocks, chosen, first, images):
    told = list(rounds(ProbeConfig(chosen=chosen, first_images=first), num_blocks, images))
    assert told[-1][0] == images
    assert told[0][1] == num_blocks
    assert all(after[0] <= 2 * before[0] and after[0] > before[0] for before, after in pairwise(told))
    assert all(after[1] <= before[1] for before, after in pairwise(told))
    assert len(told) == 1 or told[-1][1] == min(chosen, num_blocks)
    assert len(told) == 1 or told[0][0] == first


@pytest.mark.parametrize("num_blocks", [12, 24, 38, 57, 60])
def test_the_default_draws_less_than_two_fifths(num_blocks):
    probe = ProbeConfig()
    full = probe.model_copy(update={"first_images": probe.images})
    assert pictures(full, num_blocks, probe.images) == len(probe.effects) * num_blocks * probe.images
    assert pictures(probe, num_blocks, probe.images) <= 0.4 * pictures(full, num_blocks, probe.images)


def test_a_difference_is_that_of_the_block_itself(world, probed, tiny_model):
    """The block is taken out by hand, the prompts drawn and compared with the unmodified model's pictures."""
    run, _ = probed
    table = pd.read_parquet(run / "probe.parquet")
    row = table[(table["effect"] == "remove") & (table["kind"] == "all")].iloc[0]
    config = load_config(world.config, [])
    pipe = load(str(tiny_model), "cpu", torch.float32)
    prompts = load_prompts(world.folder / "search.jsonl")[:3]
    rows = embed(pipe, [p.text for p in prompts], config.generation)
    plain = generate(pipe, prompts, rows, config.generation)
    del pipe.transformer.transformer_blocks[int(row["block"])]
    without = generate(pipe, prompts, rows, config.generation)
    means = [float(np.mean(images.reshape(3, -1).mean(axis=1) / 255)) for images in (plain, without)]
    assert row["delta"] == pytest.approx(means[1] - means[0], abs=2e-3)


def test_controls_are_told(probed):
    run, printed = probed
    sets = pd.read_parquet(run / "probe_sets.parquet").set_index("set")
    assert list(sets.index) == ["chosen", "random 1", "random 2", "all", "last block, no-op"]
    assert [len(blocks) for blocks in sets["blocks"]] == [2, 2, 2, BLOCKS, 1]
    assert sets.loc["last block, no-op", "delta"] == pytest.approx(0, abs=1e-3)
    assert re.search(r"^chosen +enhance", printed, re.MULTILINE)
    for effect in SHOWN:
        assert effect in printed


def test_the_picture_is_there(probed):
    run, _ = probed
    with Image.open(run / "probe.png") as picture:
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 20


def test_the_cost_is_told_first_and_nothing_is_measured_twice(world, probed):
    run, printed = probed
    # 4 effects, each of 12 blocks on one picture, 6 of them on one more, and 2 of these on a third
    assert re.search(r"probing draws 80 pictures, 56 % .*\n(.*\n)*.*blocks on 1 pictures 1/48", printed)
    calls = (world.folder / "faults" / "calls").stat().st_size
    before = pd.read_parquet(run / "probe.parquet")
    world.run("probe", world.config, *PROBE, "--set", "probe.first_images=3", "--set", 'probe.effects=["remove"]')
    assert (world.folder / "faults" / "calls").stat().st_size == calls + BLOCKS - 2
    full = pd.read_parquet(run / "probe.parquet")
    assert len(full[full["kind"] == "all"]) == BLOCKS
    known = before[(before["effect"] == "remove") & before["whole"]].set_index(["block", "kind"])["delta"]
    assert full.set_index(["block", "kind"])["delta"].loc[known.index].tolist() == known.tolist()


def test_a_model_that_refuses_every_effect_is_one_sentence(probed):
    """Jobs fail as those of a model whose text cannot be made louder; nothing else of the probe is replaced."""
    source = RunDirectory.existing(probed[0])
    config = load_config(source.config, ["probe.effects=[enhance key]"])
    model = ModelIdentity.of(load(config.model.path, "cpu", torch.float32))
    pool = SimpleNamespace(description=SimpleNamespace(model=model), size=1)

    def fail(jobs, done):
        for job in jobs:
            job.error = "it has no key"
        return jobs

    pool.put, pool.try_all = (lambda images: images), fail
    with (
        Display() as display,
        pytest.raises(ConfigError, match="nothing that this model does: enhance key: it has no key"),
    ):
        Probe(config, source, pool, display).measure()


def test_best_blocks_are_those_that_help_or_need_the_text():
    rows = [
        {"block": b, "effect": effect, "window": "0-1", "kind": "all", "delta": (b - 3) / 10}
        for effect in ("remove", "disable")
        for b in range(6)
    ]
    fell = {"block": 7, "effect": "remove", "window": "0-1", "kind": "all", "delta": 9.0, "whole": False}
    table = pd.DataFrame([row | {"whole": True} for row in rows] + [fell])
    assert best_blocks(table, "remove", 2) == [5, 4]
    assert best_blocks(table, "disable", 2) == [0, 1]


def test_every_effect_is_a_policy_of_its_own():
    model = {"transformer": "SD3Transformer2DModel", "num_blocks": 3, "fingerprint": "0" * 64}
    digests = set()
    for make, wanted in EFFECTS.values():
        rule = Rule(blocks=[1], action=make(1.5))
        digests.add(BlockPolicy.model_validate({"name": "p", "model": model, "rules": [rule]}).digest)
        assert wanted in (1, -1)
    assert len(digests) == len(EFFECTS)
    assert set(ProbeConfig().effects) == set(EFFECTS)
    assert isinstance(EFFECTS["remove"][0](2.0), Skip)
