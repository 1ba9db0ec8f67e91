"""A real probe of a tiny model by the command line, and what its table says."""

import hashlib
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from blocktune.evaluators import load_prompts
from blocktune.policies import BlockPolicy, Rule, Skip
from blocktune.policies.policy import ModelIdentity
from blocktune.search.config import Probe, load_config
from blocktune.search.generation import embed, generate, load
from blocktune.search.probe import EFFECTS, Part, best_blocks
from blocktune.search.run_directory import RunDirectory
from PIL import Image

BLOCKS = 12
SHOWN = ("remove", "disable", "enhance value", "enhance input")
PROBE = [
    "--set", "probe.images=3", "--set", "probe.random_sets=2", "--set", "probe.chosen=2",
    "--set", f"probe.effects={json.dumps(SHOWN)}",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(new_world):
    world = new_world()
    world.pause = 0
    return world


@pytest.fixture(scope="module")
def probed(world):
    """Coarse to fine, and what it printed."""
    done = world.run("probe", world.config, *PROBE, "--set", "probe.group=3")
    return world.cwd / "runs" / "tiny", done.stdout


def _mean_of_first(run, effect: str, block: int, count: int) -> float:
    """The mean difference of alignment on the first pictures, from the stored scores."""
    config = RunDirectory.existing(run).load_config()
    model = ModelIdentity.of(load(config.model.path, "cpu", torch.float32))
    policy = Part(effect, (block,), (0.0, 1.0), count).policy(model, config.probe.scale)
    digest = hashlib.sha256(f"{policy.digest}-search-{count}".encode()).hexdigest()
    tables = [pd.read_parquet(run / "scores" / f"{name}.parquet") for name in (f"probe-{digest[:16]}", "unmodified")]
    after, before = (table[config.objectives.alignment][:count].mean() for table in tables)
    return float(after - before)


def test_groups_go_first_then_their_blocks_then_the_best_of_these(probed):
    run, _ = probed
    table = pd.read_parquet(run / "probe.parquet")
    for effect in SHOWN:
        rows = table[(table["effect"] == effect) & (table["kind"] == "all")]
        # 4 groups of 3, of which one in 3 goes on: 2 groups
        assert len(rows) == 6
        starts = sorted(rows["block"])[::3]
        assert all(start % 3 == 0 for start in starts)
        assert sorted(rows["block"]) == [b for start in starts for b in range(start, start + 3)]
        wanted = EFFECTS[effect][1]
        whole, part = rows[rows["whole"]], rows[~rows["whole"]]
        assert (set(whole["n"]), set(part["n"])) == ({3}, {2})
        # the two that did best on two pictures, by which they were chosen
        few = {b: wanted * _mean_of_first(run, effect, b, 2) for b in rows["block"]}
        assert min(few[b] for b in whole["block"]) >= max(few[b] for b in part["block"])
        assert set(best_blocks(table, effect, 2)) == set(whole["block"])
    assert set(table["kind"]) == {"all", "single", "colors", "counting"}
    everything = table[table["kind"] == "all"]
    assert (everything["low"] <= everything["delta"]).all()
    assert (everything["delta"] <= everything["high"]).all()
    assert table[table["kind"] != "all"]["low"].isna().all()  # of one prompt each


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
    run, _ = probed
    calls = (world.folder / "faults" / "calls").stat().st_size
    again = world.run("probe", world.config, *PROBE, "--set", "probe.group=3")
    assert (world.folder / "faults" / "calls").stat().st_size == calls
    assert "probing draws" in again.stderr + again.stdout
    before = pd.read_parquet(run / "probe.parquet")
    world.run("probe", world.config, *PROBE, "--set", "probe.group=1", "--set", 'probe.effects=["remove"]')
    full = pd.read_parquet(run / "probe.parquet")
    assert len(full[full["kind"] == "all"]) == BLOCKS
    known = before[(before["effect"] == "remove") & before["whole"]].set_index(["block", "kind"])["delta"]
    assert full.set_index(["block", "kind"])["delta"].loc[known.index].tolist() == known.tolist()


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
    assert set(Probe().effects) == set(EFFECTS)
    assert isinstance(EFFECTS["remove"][0](2.0), Skip)
