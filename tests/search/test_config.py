"""Defaults, then the file, then `--set`; mistakes are one sentence that names field and value."""

from pathlib import Path

import pytest
import yaml
from blocktune.search.config import Config, ConfigError, load_config


def test_every_field_has_a_default() -> None:
    assert load_config(None, []) == Config()
    assert Config().model.path == "reference"


def test_set_beats_the_file_and_the_file_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("search: {trials: 7, seed: 3}\n")
    config = load_config(file, ["search.trials=9", "space.steps=[8, 6]", "mlflow.uri=http://host:5000/a=b"])
    assert (config.search.trials, config.search.seed) == (9, 3)
    assert config.space.steps == (8, 6)
    assert config.mlflow.uri == "http://host:5000/a=b"


def test_a_config_goes_through_yaml_unchanged() -> None:
    config = load_config(None, ["space.bands=6", "ray.address=auto"])
    assert Config.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_budget_and_cluster_do_not_make_another_search() -> None:
    same = load_config(None, ["search.trials=9", "ray.workers=3", "confirm.candidates=2", "name=other"])
    assert same.searched() == Config().searched()
    assert load_config(None, ["space.bands=6"]).searched() != Config().searched()


def test_a_choice_of_guidance_makes_another_search_and_none_is_as_before_there_was_one() -> None:
    assert "guidance_scale" not in Config().searched()["space"]
    assert load_config(None, ["space.guidance_scale=[4]"]).searched()["space"]["guidance_scale"] == [4.0]


def test_a_search_is_guided_or_not() -> None:
    assert load_config(None, ["space.guidance_scale=[2, 9.5]"]).space.guidance_scale == (2.0, 9.5)
    unguided = load_config(None, ["space.guidance_scale=[0.5, 1]", "generation.guidance_scale=0"])
    assert unguided.space.guidance_scale == (0.5, 1.0)
    with pytest.raises(ConfigError, match=r"space.guidance_scale has 2; accepted: at most 1, as .* is 0: a search"):
        load_config(None, ["space.guidance_scale=[0.5, 2]", "generation.guidance_scale=0"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("search.trials", "accepted: key=value"),
        ("search.trials=0", "search.trials is 0"),
        ("search.trials=many", "search.trials is 'many'"),
        ("search.trails=3", "search.trails is not a field"),
        ("name.first=x", "name is a value"),
        ("search.sampler=best", "search.sampler is 'best'"),
        ("space.steps=[", "not a YAML value"),
        ("name=../up", "name is '../up'"),
        ("space.max_scale=1", "space.max_scale is 1"),
        ("space.text_windows=[[0.5, 0.2]]", "space.text_windows.0 is [0.5, 0.2]: it must be [start, end] with 0 <="),
        ("space.text_windows=[]", "space.text_windows is []"),
        ("probe.windows=[[0, 1], [.nan, 1]]", "probe.windows.1 is [nan, 1]: it must be [start, end] with 0 <="),
        ("model.dtype=float8", "model.dtype is 'float8'"),
        ("space.guidance_scale=[3, 0]", "space.guidance_scale.1 is 0: input should be greater than 0"),
        ("space.guidance_scale=[-2]", "space.guidance_scale.0 is -2: input should be greater than 0"),
        (
            "space.guidance_scale=[3, 1]",
            "space.guidance_scale has 1; accepted: above 1, as generation.guidance_scale is 6: a search",
        ),
        ("name=a/B", "name is 'a/B': string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$'."),
        ("space.operands=[]", "space.operands is []: tuple should have at least 1 item"),
        ("space.reuse_from=[]", "space.reuse_from is []: tuple should have at least 1 item"),
        ("space.reuse_from=[0.2, 1.5]", "space.reuse_from.1 is 1.5: input should be less than 1"),
        ("space.reuse_from=[-0.1]", "space.reuse_from.0 is -0.1: input should be greater than or equal to 0"),
        ("space.reuse_every=[2, 1]", "space.reuse_every.1 is 1: input should be greater than 1"),
        ("space.reuse_every=[0, -3]", "space.reuse_every.0 is 0: input should be greater than 1"),
        ("probe.effects=[]", "probe.effects is []: tuple should have at least 1 item"),
        ("confirm.transfer=[{height: 32}, {}]", "confirm.transfer.1 is {}: it must set some of num_inference_steps, "),
        ("ray.gpus_per_worker=-1", "ray.gpus_per_worker is -1: input should be greater than or equal to 0"),
        ("search.seed=-1", "search.seed is -1: input should be greater than or equal to 0"),
    ],
)
def test_a_mistake_names_field_and_value(tmp_path: Path, override: str, told: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: here\n")
    with pytest.raises(ConfigError) as error:
        load_config(file, [override])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


FLOATS = (
    "generation.guidance_scale", "constraints.max_latency", "space.max_scale", "probe.scale", "search.max_minutes",
    "search.refine", "confirm.margin", "ray.gpus_per_worker", "ray.prefix_gib", "ray.timeout_s",
)  # fmt: skip
WITHIN = {
    "constraints.min_fidelity={{psnr: {}}}": "constraints.min_fidelity.psnr", "space.guidance_scale=[7, {}]":
    "space.guidance_scale.1", "confirm.transfer=[{{guidance_scale: {}}}]": "confirm.transfer.0.guidance_scale",
}  # fmt: skip


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize(("override", "field"), [*((f"{name}={{}}", name) for name in FLOATS), *WITHIN.items()])
def test_no_number_is_nan_or_infinite(override: str, field: str, value: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override.format(value)])
    assert str(error.value) == f"{field} is {value.replace('.', '')}: input should be a finite number."


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml (holds|is not valid)"):
        load_config(file, [])
