"""What `--dry-run` tells: pictures, hours and detectable differences, from nothing and from what a run has stored."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blocktune.evaluators import Prompt, minimum_detectable_difference
from blocktune.search.config import Config, ConfigError, load_config
from blocktune.search.estimate import check_model, detectable, estimate, read_cost_table
from blocktune.search.prompts import read_prompts
from blocktune.search.run_directory import RunDirectory
from hypothesis import given
from hypothesis import strategies as st

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "reference" / "cost_table.json"
BATCH = read_cost_table(TABLE).batch  # as last measured
OF_TABLE = [f"generation.batch={BATCH}", f"prompts.search_images={BATCH}"]
EXAMPLES = TABLE.parents[3] / "examples"


def test_a_dry_run_starts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocktune: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, told, _ = blocktune("search", "--dry-run", "--set", "search.trials=10")
    assert code == 0
    assert "search 960" in told
    assert "not known without a cost table" in told
    assert not list(tmp_path.iterdir())


def test_hours_are_those_of_the_cost_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocktune: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    same = [part for override in OF_TABLE for part in ("--set", override)]
    code, out, _ = blocktune("search", "--dry-run", "--cost-table", str(TABLE), *same)
    assert code == 0
    table, config = read_cost_table(TABLE), load_config(None, OF_TABLE)
    told = estimate(config, RunDirectory(tmp_path), table)
    assert told.seconds == pytest.approx(sum(told.pictures.values()) * table.run_seconds / BATCH)
    assert f"at most {told.seconds / 3600:.2f} hours of one {table.device}" in out


def test_more_steps_take_longer(tmp_path: Path) -> None:
    table, run = read_cost_table(TABLE), RunDirectory(tmp_path)
    few, many = (
        estimate(load_config(None, [*OF_TABLE, f"generation.num_inference_steps={steps}"]), run, table)
        for steps in (20, 40)
    )
    assert few.seconds is not None
    assert many.seconds is not None
    assert 1.8 * few.seconds < many.seconds < 2 * few.seconds


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cost-table", str(TABLE)], f"the cost table has batch {BATCH}; accepted: 24"),
        (["--cost-table", str(TABLE), "--set", "generation.height=64"], "the cost table has height 48; accepted: 64"),
        (
            ["--cost-table", str(TABLE.parents[1] / "full_size" / "sd3.5-large.cost_table.json")],
            "the cost table is of 38 blocks; accepted: 12, as reference has.",
        ),
        (["--cost-table", "none.json"], "--cost-table is 'none.json', which cannot be read: No such file"),
        (["--cost-table", "words.json"], "--cost-table is 'words.json', which cannot be read: Expecting value"),
        (["--cost-table", "empty.json"], "empty.json.block_compute is"),
        (["--set", "objectives.quality=beauty"], "evaluator is 'beauty'"),
        (["--set", "prompts.confirm=none.jsonl"], "prompts.confirm is 'none.jsonl'"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.json").write_text("just words")
    Path("empty.json").write_text("{}")
    assert told in mistake("search", "--dry-run", *arguments)


FULL_SIZE = TABLE.parents[1] / "full_size"
MODELS = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("example", MODELS)
def test_a_cost_table_is_of_the_model(example: str) -> None:
    """By the number of blocks, of which the bundled model has 12."""
    config, tables = (
        load_config(EXAMPLES / f"{example}.yaml", []),
        {m: FULL_SIZE / f"{m}.cost_table.json" for m in MODELS},
    )
    known = {"reference": read_cost_table(TABLE)} | {model: read_cost_table(path) for model, path in tables.items()}
    for model, table in known.items():
        if model == example:
            check_model(table, config)
        else:
            blocks = len(table.block_compute), len(known[example].block_compute)
            told = rf"the cost table is of {blocks[0]} blocks; accepted: {blocks[1]}, as {config.model.path} has\."
            with pytest.raises(ConfigError, match=told):
                check_model(table, config)


def test_a_model_is_known_by_its_config_on_this_machine(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder, and in the cache of the Hub; of another nothing is known, and the table is taken."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "models--some--body" / "snapshots" / "1f" / "transformer"
    stored.mkdir(parents=True)
    (stored.parents[2] / "refs").mkdir()
    (stored.parents[2] / "refs" / "main").write_text("1f")
    shutil.copy(tiny_model / "transformer" / "config.json", stored)
    shutil.copy(tiny_model / "model_index.json", stored.parent)
    twelve, other = read_cost_table(TABLE), read_cost_table(FULL_SIZE / f"{MODELS[0]}.cost_table.json")
    for path in ("reference", str(tiny_model), "some/body"):
        config = load_config(None, [f"model.path={path}"])
        check_model(twelve, config)
        with pytest.raises(ConfigError, match=f"blocks; accepted: 12, as {path} has"):
            check_model(other, config)
    (tmp_path / "own" / "transformer").mkdir(parents=True)
    (tmp_path / "own" / "transformer" / "config.json").write_text('{"_class_name": "OwnTransformer"}')
    (tmp_path / "own" / "model_index.json").write_text('{"transformer": ["own", "OwnTransformer"]}')
    for path in (str(tmp_path / "none"), str(tmp_path / "own"), "some/other"):
        check_model(other, load_config(None, [f"model.path={path}"]))


def test_fewer_prompts_than_asked_for_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocktune: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--set", "prompts.search_images=100000"]
    _, told, _ = blocktune("search", "--dry-run", *few)
    assert "prompts      prompts.search has 384 pictures, fewer than the 100000 of prompts.search_images\n" in told
    assert "prompts.confirm" not in told
    assert "prompts.search " not in blocktune("search", "--dry-run")[1]
    unknown = ["--set", "objectives.quality=beauty"]  # ends it before a worker starts
    code, _, errors = blocktune("probe", *few, "--set", "probe.images=500", *unknown)
    assert code == 2
    assert errors.splitlines()[0] == (
        "probe.images is 500, but 384 are probed: prompts.search gives no more, as prompts.search_images is 100000"
    )


def test_a_cost_table_is_for_a_dry_run(mistake: Callable[..., str]) -> None:
    assert "without --dry-run" in mistake("search", "--cost-table", str(TABLE))


def _stored(run: RunDirectory, config: Config, **scores: np.ndarray) -> None:
    run.scores.mkdir(exist_ok=True)
    prompts: tuple[Prompt, ...] = read_prompts(config, "search")
    for name, values in scores.items():
        run.write_scores(name, prompts, {"shapes": values, "crispness": values})


def test_the_spread_is_measured_as_soon_as_it_can_be(tmp_path: Path) -> None:
    """Assumed, then at worst by the unmodified model's scores, then by the differences of trials that changed some."""
    config, run, rng = Config(), RunDirectory(tmp_path), np.random.default_rng(0)
    assert "if differences spread by 15 points" in str(detectable(config, run, 12)[0])
    before = rng.uniform(size=config.prompts.search_images)
    _stored(run, config, unmodified=before)
    worst, _ = detectable(config, run, 12)
    assert worst.basis.startswith("at worst")
    # two of fewer steps, a shorter guidance, two of late reuse, all text up
    level = 1 - 0.05 / (6 + config.confirm.candidates)
    expected = minimum_detectable_difference(worst.pictures, before.std(ddof=1) * 2**0.5, level)
    assert worst.points == pytest.approx(100 * expected)
    noise = 0.1 * rng.standard_normal(len(before))
    _stored(run, config, **{"trial-0000": before, "trial-0001": before + noise})
    measured, _ = detectable(config, run, 12)
    assert measured.basis == "as differences spread in the median of 1 trials"
    assert measured.points == pytest.approx(worst.points * noise.std(ddof=1) / (before.std(ddof=1) * 2**0.5))


@given(st.integers(2, 576), st.floats(0.001, 0.2))
def test_as_many_pictures_as_told_suffice(pictures: int, margin: float) -> None:
    """Where it is said that the margin takes so many pictures, these tell a difference of the margin."""
    config = load_config(None, [f"prompts.confirm_images={pictures}", f"confirm.margin={margin}"])
    told, _ = detectable(config, RunDirectory(Path("nowhere")), 12)
    words = str(told).split("with about ")
    if len(words) == 1:
        assert told.points <= told.margin
    else:
        level = 1 - 0.05 / (5 + config.confirm.candidates)
        assert 100 * minimum_detectable_difference(int(words[1]), 0.15, level) <= told.margin * 1.001
