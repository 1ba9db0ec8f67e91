"""A real probe of a tiny model by the command line, and what its table says."""

import hashlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from blocktune.evaluators import load_prompts
from blocktune.policies import BlockPolicy, Rule, Skip
from blocktune.policies.policy import ModelIdentity
from blocktune.search.allocation import least_settled
from blocktune.search.config import ConfigError, load_config
from blocktune.search.config import Probe as ProbeConfig
from blocktune.search.generation import embed, generate, load
from blocktune.search.probe import EFFECTS, Part, Probe, best_blocks, pictures
from blocktune.search.progress import Display
from blocktune.search.run_directory import RunDirectory
from PIL import Image

BLOCKS = 12
SHOWN = ("remove", "disable", "enhance value", "enhance input")
PROBE = [
    "--set", "probe.images=3", "--set", "probe.first_images=1", "--set", "probe.share=0.6",
    "--set", "probe.random_sets=2",
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


def _gains(run, effect: str) -> list[np.ndarray]:
    """By block how far each of its pictures was helped, or needs the text, from the stored scores."""
    config = RunDirectory.existing(run).load_config()
    model = ModelIdentity.of(load(config.model.path, "cpu", torch.float32))
    gains = []
    for block in range(BLOCKS):
        policy = Part(effect, (block,), (0.0, 1.0), 3).policy(model, config.probe.scale)
        name = f"probe-{hashlib.sha256(f'{policy.digest}-search'.encode()).hexdigest()[:16]}"
        tables = (pd.read_parquet(run / "scores" / f"{n}.parquet") for n in (name, "unmodified"))
        after, before = (table[config.objectives.alignment].to_numpy() for table in tables)
        gains.append(EFFECTS[effect][1] * (after - before[: len(after)]))
    return gains


def _shown(run, effect: str) -> pd.DataFrame:
    table = pd.read_parquet(run / "probe.parquet")
    return table[(table["effect"] == effect) & (table["kind"] == "all")].set_index("block")


def test_every_block_has_its_first_pictures_and_the_least_settled_more(probed):
    """The draws are made again from the stored scores alone, by the rule that least_settled is tested for."""
    run, _ = probed
    table = pd.read_parquet(run / "probe.parquet")
    drawn = {effect: _shown(run, effect)["n"].to_dict() for effect in SHOWN}
    assert all(sorted(blocks) == list(range(BLOCKS)) for blocks in drawn.values())
    counts = [n for blocks in drawn.values() for n in blocks.values()]
    # 0.6 of three pictures of 48 blocks: one of each, and then by sixes
    assert (min(counts), max(counts), sum(counts)) == (1, 3, 86)
    gains = {effect: _gains(run, effect) for effect in SHOWN}
    shown = {effect: [block[:1] for block in blocks] for effect, blocks in gains.items()}
    while left := 86 - sum(len(block) for blocks in shown.values() for block in blocks):
        for effect, block in least_settled(shown, 2, 3, 6)[:left]:
            shown[effect][block] = gains[effect][block][: len(shown[effect][block]) + 1]
    assert {e: dict(enumerate(map(len, blocks))) for e, blocks in shown.items()} == drawn
    for effect in SHOWN:
        means = {block: values.mean() for block, values in enumerate(shown[effect])}
        assert sorted(best_blocks(table, effect, 2)) == sorted(sorted(means, key=lambda b: -means[b])[:2])
    assert set(table["kind"]) == {"all", "single", "colors", "counting"}
    assert (table["n"] > 0).all()
    several = table[(table["kind"] == "all") & (table["n"] > 1)]
    assert (several["low"] <= several["delta"]).all()
    assert (several["delta"] <= several["high"]).all()
    assert table[table["n"] == 1]["low"].isna().all()  # one prompt has no interval


@pytest.mark.parametrize("num_blocks", [12, 24, 38, 57, 60])
def test_the_default_draws_two_fifths(num_blocks):
    probe = ProbeConfig()
    full = probe.model_copy(update={"share": 1.0})
    assert pictures(full, num_blocks, probe.images) == len(probe.effects) * num_blocks * probe.images
    assert pictures(probe, num_blocks, probe.images) == int(0.4 * pictures(full, num_blocks, probe.images))
    few = probe.model_copy(update={"share": 0.01})
    assert pictures(few, num_blocks, 5) == len(probe.effects) * num_blocks * 5  # the first are drawn at any rate


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
    # 4 effects, each of 12 blocks on three pictures, make 144
    assert re.search(r"probing draws 86 pictures, 60 % .*\n(.*\n)*.*blocks 1/86", printed)
    calls = (world.folder / "faults" / "calls").stat().st_size
    before = pd.read_parquet(run / "probe.parquet")
    lacking = (_shown(run, "remove")["n"] < 3).sum()
    assert lacking
    # all at a time, so that each block which lacks any is drawn once
    world.run("probe", world.config, *PROBE, "--set", "probe.first_images=3", "--set", 'probe.effects=["remove"]')
    assert (world.folder / "faults" / "calls").stat().st_size == calls + lacking
    full = pd.read_parquet(run / "probe.parquet")
    assert full[full["kind"] == "all"]["n"].tolist() == [3] * BLOCKS
    whole = before.groupby(["effect", "block"])["n"].transform("max") == 3
    known = before[(before["effect"] == "remove") & whole].set_index(["block", "kind"])["delta"]
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
    table = pd.DataFrame(rows)
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
