"""The data: what is valid, what is refused and how, the file, equality, digest, schema."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from blocktune.policies import BlockPolicy, PolicyError, Reuse, Rule, ScaleText, Skip
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

MODEL = {"transformer": "SD3Transformer2DModel", "num_blocks": 8, "fingerprint": "0" * 64}
SCHEMA_FILE = Path(__file__).parents[2] / "policies" / "schema" / "policy.v1.json"


def policy(*rules, **fields) -> BlockPolicy:
    return BlockPolicy.model_validate({"name": "p", "model": MODEL, "rules": rules, **fields})


def scale(operand="value", scale=1.5, **more) -> dict:
    return {"type": "scale_text", "operand": operand, "scale": scale, **more}


# --- valid policies, at random -----------------------------------------------------------------------------------

fractions = st.floats(0, 1)
windows = st.tuples(fractions, fractions).filter(lambda w: w[0] < w[1])
tokens = st.sampled_from(["all", "prompt"]) | st.lists(st.text("abc", min_size=1), min_size=1, max_size=3, unique=True)
scales = st.builds(
    lambda operand, scale, tokens, scope: ScaleText(
        operand=operand, scale=scale, tokens=tokens, scope=scope if operand == "input" else None
    ),
    st.sampled_from(["input", "key", "value", "logit"]),
    st.floats(0, 100),
    tokens,
    st.sampled_from([None, "local", "propagate"]),
)
actions = (
    st.just(Skip())
    | st.builds(Reuse, every=st.none() | st.integers(2, 50), forecast=st.sampled_from([None, "linear"]))
    | scales
)
rules = st.builds(
    Rule,
    blocks=st.lists(st.integers(0, 7), min_size=1, unique=True),
    window=windows,
    branch=st.sampled_from(["both", "cond", "uncond"]),
    action=actions,
)
finite_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
extras = st.none() | st.dictionaries(st.text(), finite_json, max_size=3)


@st.composite
def policies(draw) -> BlockPolicy:
    kept: list[Rule] = []
    for rule in draw(st.lists(rules, max_size=6)):
        try:
            policy(*kept, rule)
        except PolicyError:
            continue
        kept.append(rule)
    return BlockPolicy.model_validate(
        {"name": draw(st.text(min_size=1)), "model": MODEL, "rules": kept}
        | {"guidance_window": draw(windows), "tuned_for": draw(extras), "evidence": draw(extras)}
    )


SCHEMA = jsonschema.Draft202012Validator(BlockPolicy.model_json_schema())


@given(original=policies())
def test_load_gives_back_what_was_saved(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "p.json"
    original.save(path)
    loaded = BlockPolicy.load(path)
    assert loaded == original
    assert hash(loaded) == hash(original)
    assert loaded.digest == original.digest
    SCHEMA.validate(json.loads(path.read_text()))


@given(original=policies(), order=st.randoms())
def test_digest_is_of_behaviour(original, order):
    singles = [
        Rule(blocks=[block], window=rule.window, branch=rule.branch, action=rule.action)
        for rule in original.rules
        for block in rule.blocks
    ]
    order.shuffle(singles)
    silent = Rule(blocks=range(8), action=ScaleText(operand="key", scale=1.0))
    regrouped = BlockPolicy(
        name="other", model=original.model, rules=(*singles, silent), guidance_window=original.guidance_window,
        evidence={"a": 1},
    )  # fmt: skip
    assert regrouped.digest == original.digest
    assert regrouped != original


def test_digest_joins_windows_that_follow_on_each_other():
    whole = policy({"blocks": [1], "window": [0.2, 0.8], "action": {"type": "reuse", "every": 3}})
    parts = policy(
        {"blocks": [1], "window": [0.5, 0.8], "action": {"type": "reuse", "every": 3}},
        {"blocks": [1], "window": [0.2, 0.5], "action": {"type": "reuse", "every": 3}},
    )
    assert whole.digest == parts.digest


@pytest.mark.parametrize(
    "other",
    [
        {"blocks": [2], "action": scale()},
        {"blocks": [1], "action": scale(scale=1.6)},
        {"blocks": [1], "action": scale("key")},
        {"blocks": [1], "action": scale(), "window": [0, 0.5]},
        {"blocks": [1], "action": scale(), "branch": "cond"},
        {"blocks": [1], "action": scale(tokens="prompt")},
    ],
)
def test_digest_tells_behaviours_apart(other):
    assert policy(other).digest != policy({"blocks": [1], "action": scale()}).digest


def test_digest_and_file_tell_a_guidance_window_and_only_then(tmp_path):
    plain = policy()
    assert not plain.acts
    assert plain.model_copy(update={"guidance_window": (0.0, 1.0)}).digest == plain.digest
    shorter = BlockPolicy(name="test", model=plain.model, rules=(), guidance_window=(0.0, 0.4))
    assert shorter.acts
    assert shorter.digest != plain.digest
    for one, told in ((plain, None), (shorter, [0.0, 0.4])):
        one.save(tmp_path / "policy.json")
        assert json.loads((tmp_path / "policy.json").read_text()).get("guidance_window") == told


def test_defaults_and_normal_form():
    rule = Rule(blocks=[3, 1], action=ScaleText(operand="input", scale=2))
    assert rule.blocks == (1, 3)
    assert rule.window == (0.0, 1.0)
    assert rule.branch == "both"
    assert rule.action == ScaleText(operand="input", scale=2.0, tokens="all", scope="propagate")
    assert rule == Rule(blocks=(1, 3), window=(-0.0, 1), action=rule.action)


def test_file_is_as_designed(tmp_path):
    policy(
        {"blocks": [2, 7], "window": [0, 0.6], "action": scale(tokens=["red cat"])},
        {"blocks": [1], "action": {"type": "skip"}},
        {"blocks": [3], "action": {"type": "reuse", "every": 3}},
        tuned_for={"num_inference_steps": 28},
        evidence={"confirmed": {"shapes": {"ci95": (0.1, 0.2), "p": None}}},
    ).save(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text()
    assert text.startswith('{\n  "$schema": "urn:blocktune:policy:v1",\n  "_class_name": "BlockPolicy",\n')
    assert text.endswith("}\n")
    data = json.loads(text)
    assert data.pop("_blocktune_version")
    assert data == {
        "$schema": "urn:blocktune:policy:v1",
        "_class_name": "BlockPolicy",
        "schema_version": 1,
        "name": "p",
        "model": MODEL,
        "rules": [
            {
                "blocks": [2, 7],
                "window": [0.0, 0.6],
                "branch": "both",
                "action": {"type": "scale_text", "operand": "value", "scale": 1.5, "tokens": ["red cat"]},
            },
            {"blocks": [1], "window": [0.0, 1.0], "branch": "both", "action": {"type": "skip"}},
            {"blocks": [3], "window": [0.0, 1.0], "branch": "both", "action": {"type": "reuse", "every": 3}},
        ],
        "tuned_for": {"num_inference_steps": 28},
        "evidence": {"confirmed": {"shapes": {"ci95": [0.1, 0.2], "p": None}}},
    }


def test_committed_schema_is_the_models():
    assert json.loads(SCHEMA_FILE.read_text()) == BlockPolicy.model_json_schema()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"type": "reuse", "every": 2}, scale()),
        ({"type": "reuse"}, scale("input")),
        (scale("key"), scale("value")),
        ({"type": "skip"}, scale(scale=1.0)),
    ],
)
def test_actions_that_go_together(a, b):
    assert len(policy({"blocks": [1], "action": a}, {"blocks": [1], "action": b}).rules) == 2


def test_one_action_in_windows_and_branches_apart():
    policy(
        {"blocks": [1], "window": [0, 0.5], "branch": "cond", "action": scale()},
        {"blocks": [1], "window": [0, 0.5], "branch": "uncond", "action": scale(scale=2)},
        {"blocks": [1], "window": [0.5, 1], "action": scale(scale=3)},
    )


def test_content_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Rule(blocks=[1], action=Skip()).window = (0.0, 0.5)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Rule(blocks=[], action=Skip()), r"blocks is \[\]; it should have at least 1 item"),
        (lambda: Rule(blocks=[2, 2], action=Skip()), "blocks is .2, 2.; each block may be named once"),
        (lambda: Rule(blocks=[-1], action=Skip()), r"blocks\[0\] is -1; it should be greater than or equal to 0"),
        (lambda: Rule(blocks=[True], action=Skip()), r"blocks\[0\] is True; it should be a valid integer"),
        (lambda: Rule(blocks=[1], window=(0.5, 0.5), action=Skip()), "window is .0.5, 0.5.; it must be .start, end"),
        (lambda: Rule(blocks=[1], window=(0.7, 0.5), action=Skip()), "window is .0.7, 0.5."),
        (lambda: Rule(blocks=[1], window=(0, 1.5), action=Skip()), "window is .0.0, 1.5."),
        (lambda: Rule(blocks=[1], window=(0, math.nan), action=Skip()), r"window\[1\] is nan; it should be a finite"),
        (lambda: Rule(blocks=[1], branch="left", action=Skip()), "branch is 'left'; it should be 'both', 'cond'"),
        (lambda: Rule(blocks=[1], action={"type": "drop"}), "action is .*; its type must be one of 'skip', 'reuse'"),
        (lambda: Rule(blocks=[1], actoin=Skip()), "action is missing; Rule needs it"),
        (lambda: ScaleText(operand="query", scale=1), "operand is 'query'; it should be 'input', 'key', 'value' or"),
        (lambda: ScaleText(operand="key", scale=-1), "scale is -1; it should be greater than or equal to 0"),
        (lambda: ScaleText(operand="key", scale=math.inf), "scale is inf; it should be a finite number"),
        (lambda: ScaleText(operand="key", scale="2"), "scale is '2'; it should be a valid number"),
        (lambda: ScaleText(operand="key", scale=2, scope="local"), "scope is 'local'; only operand 'input'"),
        (lambda: ScaleText(operand="key", scale=2, tokens=[]), r"tokens is \[\]; it must be 'all', 'prompt' or"),
        (lambda: ScaleText(operand="key", scale=2, tokens="some"), "tokens is 'some'"),
        (lambda: ScaleText(operand="key", scale=2, tokens=["a", "a"]), "different phrases"),
        (lambda: Reuse(every=1), "every is 1; it should be greater than or equal to 2"),
        (lambda: Reuse(every=2.5), "every is 2.5; it should be a valid integer"),
        (lambda: policy({"blocks": [8], "action": {"type": "skip"}}), r"rules\[0\].blocks has 8; .* are 0 to 7"),
        (
            lambda: policy({"blocks": [1], "action": scale(strength=3)}),
            r"rules\[0\].action.strength is not a known field; known are type, operand, scale, tokens, scope",
        ),
        (lambda: policy({"blocks": [1], "action": scale(scale=-2)}), r"rules\[0\].action.scale is -2; it should"),
        (lambda: policy({"blocks": [1], "action": scale(scope="local")}), r"rules\[0\].action.scope is 'local'"),
        (lambda: policy({"block": [1], "action": scale()}), r"rules\[0\].blocks is missing; Rule needs it"),
        (
            lambda: policy(notes="x"),
            "notes is not a known field; known are name, model, rules, guidance_window, tuned_for, evidence",
        ),
        (lambda: policy(evidence={"x": math.nan}), "evidence must be plain JSON with finite numbers only"),
        (lambda: policy(tuned_for={"x": {1}}), "tuned_for must be plain JSON"),
        (lambda: policy(schema_version=2), "schema_version is 2; this blocktune reads up to 1, update it"),
        (lambda: policy(schema_version="1"), "schema_version is '1'; this blocktune reads 1"),
        (lambda: policy(**{"$schema": "urn:other"}), r"\$schema is 'urn:other'; it must be 'urn:blocktune:policy:v1'"),
        (lambda: policy(_class_name="Policy"), "_class_name is 'Policy'; it must be 'BlockPolicy'"),
        (lambda: policy(model=MODEL | {"fingerprint": "abc"}), "model.fingerprint is 'abc'; it should match"),
        (lambda: policy(model=MODEL | {"layers": 3}), "model.layers is not a known field; known are transformer"),
        (lambda: policy(name=""), "name is ''; it should have at least 1 character"),
        (lambda: policy(rules=3), "rules is 3; it should be a valid tuple"),
        (lambda: BlockPolicy.model_validate_json("[]"), r"BlockPolicy is \[\]; it should be an object"),
    ],
)
def test_refused_with_one_sentence(build, sentence):
    with pytest.raises(PolicyError, match=sentence) as refused:
        build()
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"type": "skip"}, {"type": "skip"}),
        ({"type": "skip"}, {"type": "reuse"}),
        ({"type": "skip"}, scale()),
        ({"type": "reuse", "every": 2}, {"type": "reuse", "every": 3}),
        (scale(scale=2), scale(scale=3)),
        (scale("input", scope="local"), scale("input", scope="propagate")),
    ],
)
@pytest.mark.parametrize("branch", ["both", "cond"])
def test_contradictions_are_refused(a, b, branch):
    with pytest.raises(PolicyError, match=r"rules\[0\] .* and rules\[1\] .* on block 3 in window \[0.4, 0.6\)"):
        policy(
            {"blocks": [1, 3], "window": [0, 0.6], "action": a},
            {"blocks": [3, 4], "window": [0.4, 1], "branch": branch, "action": b},
        )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "schema_version is missing"),
        ('{"name": "x"}', "schema_version is missing"),
        ('{"schema_version": 1, "evidence": NaN}', "NaN is not a number that JSON has"),
        ('{"schema_version": 1, "name": "a", "name": "b"}', "name is given twice"),
        ('{"schema_version": 1}', "name is missing; BlockPolicy needs it"),
        (b"\xff\xfe", "is not valid JSON"),
    ],
)
def test_bad_files_are_refused(text, sentence, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PolicyError, match=sentence) as refused:
        BlockPolicy.load(path)
    assert "bad.json" in str(refused.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(PolicyError, match=r"nothing.json cannot be read: No such file or directory\.$"):
        BlockPolicy.load(tmp_path / "nothing.json")
    with pytest.raises(PolicyError, match="cannot be read"):
        BlockPolicy.load(tmp_path)


def test_import_needs_no_search_tools():
    code = "import sys, blocktune.policies; print({'optuna', 'ray', 'mlflow', 'open_clip'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
