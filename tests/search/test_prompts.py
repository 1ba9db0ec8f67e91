"""Prompt files of every format, from a config and from the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from blocktune.policies import BlockPolicy, Reuse, Rule
from blocktune.reference.pipeline import new_transformer
from blocktune.search.config import ConfigError, load_config
from blocktune.search.prompts import read_prompts

OURS = {"text": "a red ring", "kind": "colors", "seed": 7}
GENEVAL = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}
FILES = {
    "ours.jsonl": (json.dumps(OURS), "a red ring", "colors"),
    "evaluation_metadata.jsonl": (json.dumps(GENEVAL), "a photo of a cat", "single_object"),
    "color_val.txt": ("a green bench\n", "a green bench", "color"),
    "PartiPrompts.tsv": ("Prompt\tCategory\tChallenge\nan owl\tAnimals\tBasic\n", "an owl", "Animals"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_config_names_a_file_of_any_format(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    text, prompt, kind = FILES[name]
    file.write_text(text)
    config = load_config(None, [f"prompts.search={file}", "prompts.search_images=1", f"prompts.confirm={file}"])
    (searched,) = read_prompts(config, "search")
    confirmed = read_prompts(config, "confirm")
    assert (searched.text, searched.kind) == (prompt, kind)
    if name == "ours.jsonl":
        assert (searched.seed, len(confirmed)) == (7, 1)
    else:  # without seeds of its own, drawn again with new ones until there are as many as asked for
        assert len(confirmed) == config.prompts.confirm_images
        assert searched.seed not in {other.seed for other in confirmed}


def test_the_set_that_ships_is_known_by_its_name() -> None:
    config = load_config(None, ["prompts.search=compositional", "prompts.search_images=6"])
    prompts = read_prompts(config, "search")
    assert len({prompt.kind for prompt in prompts}) == 6
    assert prompts[0].text.startswith("a picture of")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("none.tsv", None, "prompts.search is 'none.tsv', which cannot be read"),
        ("set.csv", "a,b", "prompts.search: prompts are 'set.csv'; accepted: compositional, or a file in .txt, .tsv"),
        ("parti.tsv", "Prompt\nan owl\n", "prompts.search: parti.tsv has the columns ['Prompt']; accepted: Prompt and"),
        ("empty.txt", "\n", "prompts.search: empty.txt holds no prompts"),
        ("val.txt", b"\xff\xfe\x00", "prompts.search: "),
        ("geneval.jsonl", json.dumps(GENEVAL | {"include": [{"class": "cat"}]}), "include[0].count is None"),
    ],
)
def test_a_mistake_names_the_field(
    name: str, text: str | bytes | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        read_prompts(load_config(None, [f"prompts.search={name}"]), "search")
    assert told in str(error.value)


ONE = [json.dumps(OURS | {"seed": seed}) + "\n" for seed in range(2)]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["evaluate", "policy.json", "--prompts", "one.jsonl"], "--prompts gives 2 pictures of one prompt"),
        (["verify", "policy.json", "--prompts", "one.jsonl", "--images", "2"], "--images 2 gives 2 pictures of one"),
        (["search", "--set", "prompts.confirm=one.jsonl"], "prompts.confirm gives 2 pictures of one prompt"),
        (["search", "--dry-run", "--set", "prompts.confirm_images=1"], "prompts.confirm gives 1 picture of one prompt"),
    ],
)
def test_two_pictures_of_one_prompt_have_no_interval(
    command: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.jsonl").write_text("".join(ONE))
    BlockPolicy.for_model(new_transformer(), "late", [Rule(blocks=[1], action=Reuse())]).save("policy.json")
    assert told in mistake(*command)
    assert not Path("runs").exists()


@pytest.mark.parametrize("source", ["PartiPrompts.tsv", "compositional", "none.tsv"])
def test_evaluate_draws_them(
    source: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    blocktune: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("PartiPrompts.tsv").write_text(FILES["PartiPrompts.tsv"][0] + "a fox\tAnimals\tBasic\n")
    tuned = {"num_inference_steps": 2, "guidance_scale": 4.0, "max_sequence_length": 12, "dtype": "float32"}
    policy = BlockPolicy.for_model(new_transformer(), "late", [Rule(blocks=[1], action=Reuse())])
    policy.model_copy(update={"tuned_for": tuned}).save("policy.json")
    more = ["--model", str(tiny_model), "--prompts", source, "--images", "2", "--evaluators", "sane,psnr"]
    code, out, err = blocktune("evaluate", "policy.json", *more)
    if source == "none.tsv":
        assert code == 2
        assert err.startswith("blocktune: --prompts is 'none.tsv', which cannot be read")
    else:
        assert not code
        sane, psnr = out.splitlines()
        assert sane.startswith("sane ")
        assert sane.endswith("n = 2")
        value, unmodified = psnr.split()[1], psnr.split()[3]
        points = float(psnr.split()[4])
        assert unmodified == "100.0000"
        assert points == pytest.approx(float(value) - 100, abs=0.06)  # in dB
