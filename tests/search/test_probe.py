"""A real probe of a tiny model by the command line, and what its table says."""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from blocktune.evaluators import CostTable, load_prompts
from blocktune.policies import BlockPolicy, Rule, Skip
from blocktune.policies.policy import ModelIdentity
from blocktune.search.allocation import least_settled
from blocktune.search.config import ConfigError, load_config
from blocktune.search.config import Probe as ProbeConfig
from blocktune.search.generation import embed, generate, load
from blocktune.search.part import EFFECTS, Part, Parts
from blocktune.search.prior import suggested
from blocktune.search.probe import Probe, best_blocks, pictures, to_draw
from blocktune.search.progress import Display
from blocktune.search.run_directory import RunDirectory
from blocktune.search.scoring import Measurement
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
    table = pd.read_parquet(run / "probe_sets.parquet")
    sets = {(row["effect"], row["set"]): row for _, row in table.iterrows()}
    names = "chosen", "random 1", "random 2", "all"
    assert [*sets] == [
        *((effect, name) for effect in ("remove", "enhance value") for name in names),
        ("enhance input", "last block, no-op"),
    ]  # fmt: skip
    assert [len(blocks) for blocks in table["blocks"]] == [2, 2, 2, BLOCKS, 2, 2, 2, BLOCKS, 1]
    assert [*table["steps"]] == [4, 4, 4, 3, 4, 4, 4, 4, 4]  # two blocks removed are nearly a step of all twelve
    assert sets["enhance input", "last block, no-op"]["delta"] == pytest.approx(0, abs=1e-3)
    assert sets["enhance input", "last block, no-op"]["psnr"] > sets["remove", "all"]["psnr"]
    found = pd.read_parquet(run / "probe.parquet")
    for effect in ("remove", "enhance value"):
        assert [*sets[effect, "chosen"]["blocks"]] == sorted(best_blocks(found, effect, 2))
    assert re.search(r"^chosen +enhance", printed, re.MULTILINE)
    assert re.search(r"^all +every block computed, at 3 steps: ", printed, re.MULTILINE)
    assert re.search(r"^not taken together: disable, enhance input \(acts on later blocks too", printed, re.MULTILINE)
    for effect in SHOWN:
        assert effect in printed


def _chosen(run) -> list[int]:
    sets = pd.read_parquet(run / "probe_sets.parquet")
    return [*sets[(sets["effect"] == "remove") & (sets["set"] == "chosen")]["blocks"].iloc[0]]


def _files(folder) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.usefixtures("in_place")
def test_a_dry_run_tells_what_is_left_and_writes_nothing(world, probed, printed):
    run, _ = probed
    before = _files(run)
    assert "pictures     at most 0: baseline 0, blocks 0, controls 0" in printed(
        "probe", "--dry-run", world.config, *PROBE
    )
    lacking = 3 * BLOCKS - int(_shown(run, "remove")["n"].sum())
    more = "--set", "probe.share=1", "--set", 'probe.effects=["remove"]'
    told = printed("probe", "--dry-run", world.config, *PROBE, *more)
    assert f"baseline 0, blocks {lacking}, controls 15" in told  # which blocks are the best is not known before
    assert _files(run) == before


@pytest.mark.usefixtures("in_place")
def test_a_dry_run_does_not_count_on_another_run(world, probed, mistake):
    told = mistake("probe", "--dry-run", str(world.config), *PROBE, "--set", "generation.num_inference_steps=5")
    assert "generation differs from the run in" in told


def test_the_picture_is_there(probed):
    run, _ = probed
    with Image.open(run / "probe.png") as picture:
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 20


def test_the_cost_is_told_first_and_nothing_is_measured_twice(world, probed):
    run, printed = probed
    # 4 effects, each of 12 blocks on three pictures, make 144, of which 60 % are drawn; nine sets are controls
    told = r"pictures +at most 122: baseline 9, blocks 86, controls 27\n.*time +told when the first.*\n"
    measured = r".*time +at most \d\.\d\d hours of one worker, \d+\.\d minutes with all 1: \d+\.\d{3} s per picture.*\n"
    assert re.search(told + measured + r"(.*\n)*.*blocks 1/86", printed)
    calls = (world.folder / "faults" / "calls").stat().st_size
    before = pd.read_parquet(run / "probe.parquet")
    lacking, chosen = (_shown(run, "remove")["n"] < 3).sum(), _chosen(run)
    assert lacking
    # all at a time, so that each block which lacks any is drawn once
    world.run("probe", world.config, *PROBE, "--set", "probe.first_images=3", "--set", 'probe.effects=["remove"]')
    others = _chosen(run) != chosen  # on more pictures, which then are drawn together for the first time
    assert (world.folder / "faults" / "calls").stat().st_size == calls + lacking + others
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
    pool = SimpleNamespace(description=SimpleNamespace(model=model, device="none"), size=1)

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


@pytest.mark.parametrize("known", [True, False])
def test_how_long_a_worker_may_be_silent_is_known_from_before(probed, known):
    """By the seconds of a picture on this device, and not those on another."""
    run = RunDirectory.existing(probed[0])
    ((device, pace),) = run.read_state()["seconds_per_picture"].items()
    assert pace > 0
    config = run.load_config()
    model = ModelIdentity.of(load(config.model.path, "cpu", torch.float32))
    expected = []
    pool = SimpleNamespace(
        description=SimpleNamespace(model=model, device=device if known else "another"),
        size=2, expect=lambda *told: expected.append(told),
    )  # fmt: skip
    with Display() as display:
        cost = Probe(config, run, pool, display).cost()
    assert expected == ([(6, pace)] if known else [])
    assert cost.seconds == (pytest.approx(pace * sum(cost.pictures.values())) if known else None)


def test_the_first_pictures_tell_how_long_a_worker_may_be_silent(tmp_path):
    """Those of the unmodified model, or where they are there those of a block; and what is left is told in time."""
    config = load_config(None, ["probe.effects=[remove]", "probe.images=12", "probe.random_sets=0"])
    run = RunDirectory.open(tmp_path / "run", config, resume=False)
    model = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=2, fingerprint="0" * 64)
    expected = []

    def measured(images):
        scores = {"shapes": np.linspace(0, 1, images), "psnr": np.full(images, 30.0)}
        return Measurement(scores, np.zeros((images, 2, 2, 3), np.uint8), 2.0 * images, 1.0 * images, 0.0)

    def run_jobs(jobs, done=lambda job: None):
        for job in jobs:
            job.result = measured(96 if len(job.args) == 3 else job.args[3] - job.args[4])
            done(job)
        return jobs

    pool = SimpleNamespace(
        description=SimpleNamespace(model=model, device="cpu"), size=1, put=lambda images: images,
        expect=lambda *told: expected.append(told), run=run_jobs, try_all=lambda *asked: run_jobs(*asked)[:0],
    )  # fmt: skip
    for _ in range(2):
        with Display() as display:
            Probe(config, run, pool, display).measure()
    run.state.unlink()  # as a search leaves a run: the unmodified model's pictures, but not how long they took
    for path in run.scores.glob("probe-*"):
        path.unlink()
    with Display() as display:
        Probe(config, run, pool, display).measure()
    assert expected == [(576, 3.0)] * 3
    run.release()


@pytest.fixture(scope="module")
def halves(world):
    """Reuse alone in either half of the run, where pixels are not reported; and what it printed."""
    out = world.folder / "halves"
    done = world.run(
        "probe", world.config, "--out", out, "--set", "objectives.reported=[ssim]", "--set", "probe.effects=[reuse]",
        "--set", "probe.windows=[[0, 0.5], [0.5, 1]]", "--set", "probe.images=2", "--set", "probe.share=1",
        "--set", "probe.chosen=2", "--set", "probe.random_sets=1",
    )  # fmt: skip
    return out, done.stdout


def test_windows_are_kept_apart(halves):
    run, printed = halves
    table = pd.read_parquet(run / "probe.parquet")
    for window in ("0-0.5", "0.5-1"):
        one = table[(table["window"] == window) & (table["kind"] == "all")].set_index("block")
        best, *_ = best_blocks(table[table["window"] == window], "reuse", 2)
        row = one.loc[best]
        told = f"{100 * row['delta']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
        assert re.search(rf"^reuse {window} +blocks {best} {re.escape(told)}, ", printed, re.MULTILINE)
    # the space reuses until the end of the run, so only what was found of its second half is taken up
    points = suggested(table, RunDirectory.existing(run).load_config(), BLOCKS)
    assert {name: point["reuse_from"] for name, point in points.items()} == {"probe: reuse 0.5-1": 0.5}


def test_similarity_is_told_by_pixels_and_by_what_is_reported(halves):
    run, _ = halves
    for name in ("probe", "probe_sets"):
        table = pd.read_parquet(run / f"{name}.parquet")
        assert table[["psnr", "ssim"]].notna().all(axis=None)
    one = table.set_index("set").loc["last block, no-op"]
    assert (one["psnr"], one["ssim"]) == pytest.approx((100, 1), rel=0.3)
    assert RunDirectory.existing(run).load_config().objectives.reported == ("ssim",)


def test_every_effect_has_controls_of_its_own(halves):
    table = pd.read_parquet(halves[0] / "probe_sets.parquet")
    assert [*table["set"]] == ["chosen", "random 1", "all", "last block, no-op"]
    assert table["window"].nunique() == 2  # the last lasts the whole run


def _drawn(parts: Parts, part: Part, images: int) -> None:
    values = np.linspace(0, 1, images) * (1 + part.blocks[0])
    parts.run.write_scores(parts.name(part), parts.prompts[part.split][:images], {"shapes": values, "psnr": values})


def test_what_is_drawn_is_not_counted_again(tmp_path):
    config = load_config(None, ["probe.effects=[reuse]", "probe.images=24", "probe.share=0.75", "probe.chosen=1"])
    model = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=4, fingerprint="0" * 64)
    run = RunDirectory.open(tmp_path / "run", config, resume=False)
    parts = Parts(config, run, model)
    assert to_draw(parts) == {"baseline": 96 + 576, "blocks": 72, "controls": 11 * 24}
    for split in ("search", "confirm"):
        zeros = np.zeros(len(parts.prompts[split]))
        run.write_scores(parts.unmodified(split), parts.prompts[split], {"shapes": zeros, "psnr": zeros})
    assert to_draw(parts) == {"baseline": 0, "blocks": 72, "controls": 11 * 24}
    for block in range(3):
        _drawn(parts, Part("reuse", (block,), (0.0, 1.0), 12), 12)
    assert to_draw(parts)["blocks"] == 72 - 36
    for block in range(4):
        _drawn(parts, Part("reuse", (block,), (0.0, 1.0), 24), 24)
    # block 3 is the best by far, and random sets of one of four blocks are not all different
    assert to_draw(parts)["blocks"] == 0
    few = to_draw(parts)["controls"]
    assert few in range(3 * 24, 7 * 24, 24)
    _drawn(parts, Part("reuse", (3,), (0.0, 1.0), 24, "confirm"), 20)
    assert to_draw(parts)["controls"] == few - 20
    run.release()


def test_scores_without_a_similarity_are_measured_again(tmp_path):
    config = load_config(None, ["objectives.reported=[ssim]"])
    model = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=4, fingerprint="0" * 64)
    parts, part = Parts(config, RunDirectory(tmp_path), model), Part("remove", (1,), (0.0, 1.0), 2)
    assert parts.similarities == ("psnr", "ssim")
    parts.run.scores.mkdir()
    _drawn(parts, part, 2)
    assert parts.scores(part) is None


TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "reference" / "cost_table.json"


def test_a_dry_run_needs_no_run_and_takes_hours_from_a_cost_table(tmp_path, monkeypatch, blocktune, mistake):
    monkeypatch.chdir(tmp_path)
    table = CostTable.model_validate_json(TABLE.read_text()).model_copy(update={"batch": 24})
    (tmp_path / "cost.json").write_text(table.model_dump_json())
    code, told, _ = blocktune("probe", "--dry-run", "--cost-table", "cost.json")
    assert code == 0
    count = 96 + 576 + int(0.4 * 8 * BLOCKS * 96) + (4 * (2 + 8) + 1) * 96
    assert f"at most {count}: baseline 672, blocks 3686, controls 3936" in told
    assert f"at most {count * table.run_seconds / 24 / 3600:.2f} hours of one {table.device}" in told
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]
    short = table.model_copy(update={"block_compute": (0.1,), "block_reuse": (0.1,), "block_scaled": {}})
    (tmp_path / "cost.json").write_text(short.model_dump_json())
    told = mistake("probe", "--dry-run", "--cost-table", "cost.json")
    assert "the cost table is of 1 blocks; accepted: 12, as reference has" in told
    assert "without --dry-run" in mistake("probe", "--cost-table", "cost.json")
    (tmp_path / "empty").mkdir()
    told = mistake("probe", "--dry-run", "--set", f"model.path={tmp_path / 'empty'}")
    assert "empty', whose transformer cannot be told: " in told


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
