"""Whether a file's claims hold: what was measured, filed as evidence, does; better claims and other models do not."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from blocktune.policies import BlockPolicy, ModelIdentity, Reuse, Rule, ScaleText
from blocktune.reference.pipeline import new_transformer
from blocktune.search import verify as verification

STEPS = 4
TUNED = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "max_sequence_length": 12, "dtype": "float32"}
VAGUE = {"delta": 0.0, "ci95": [-1000.0, 1000.0]}  # a claim that nothing contradicts
Verify = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["a photo of a circle", "a photo of a red ring", "a photo of two crosses"]
    records = [{"text": text, "kind": "any", "seed": seed} for seed, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def verify(
    tiny_model: Path,
    prompts: Path,
    tmp_path: Path,
    blocktune: Callable[..., tuple[int, str, str]],
) -> Verify:
    """Runs `blocktune verify` on a policy with this evidence: exit code, stdout, stderr."""

    def run(evidence: Any, *more: str, policy: BlockPolicy | None = None) -> tuple[int, str, str]:
        late = Rule(blocks=tuple(range(12)), window=(0.5, 1.0), action=Reuse())
        policy = policy or BlockPolicy.for_model(new_transformer(), "late", [late])
        policy.model_copy(update={"tuned_for": TUNED, "evidence": evidence}).save(tmp_path / "policy.json")
        arguments = ["verify", str(tmp_path / "policy.json"), "--model", str(tiny_model), "--prompts", str(prompts)]
        return blocktune(*arguments, "--tolerance", "0.99", *more)

    return run


def test_what_was_measured_here_holds_here_and_more_than_that_does_not(
    verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []
    timed = verification.time_runs
    monkeypatch.setattr(verification, "time_runs", lambda *a, **k: seconds.append(timed(*a, **k)) or seconds[-1])
    code, out, _ = verify({"confirmed": {"crispness": VAGUE, "psnr": VAGUE, "speedup": 1.0}}, "--json")
    first = json.loads(out)
    assert (code, first["holds"]) == (0, True)
    assert [figure["name"] for figure in first["figures"]] == ["speed-up", "crispness", "psnr"]
    before, after = seconds[::2], seconds[1::2]
    assert (first["unmodified_seconds"], first["seconds"]) == pytest.approx((median(before), median(after)))
    ratios = [b / a for b, a in zip(before, after, strict=True)]
    assert first["figures"][0]["measured"] == pytest.approx(median(ratios))
    assert first["block_calls"] == {"computed": 24, "skipped": 0, "reused": 24, "scaled": 0}
    assert (first["images"], first["batch"], first["steps"], first["unmodified_steps"]) == (3, 3, STEPS, STEPS)

    measured = {figure["name"]: figure["measured"] for figure in first["figures"][1:]}
    filed = {n: {"delta": m["delta"], "ci95": [m["low"], m["high"]]} for n, m in measured.items()}
    code, out, _ = verify({"confirmed": filed | {"speedup": first["figures"][0]["measured"]}})
    assert code == 0
    assert out.splitlines()[-1].startswith("late holds on ")
    assert out.splitlines()[-1].endswith(", 3 pictures: speed-up, crispness, psnr")

    more = filed["psnr"]["ci95"][1] + 0.1
    code, out, _ = verify({"confirmed": filed | {"psnr": {"delta": more + 0.1, "ci95": [more, more + 0.2]}}})
    assert code == 1
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "crispness        holds: " in lines["crispness"]
    assert "psnr             DOES NOT HOLD: " in lines["psnr"]
    assert out.splitlines()[-1].startswith("late does not hold on ")
    assert out.splitlines()[-1].endswith(": psnr")


def test_a_speed_up_below_the_tolerance_does_not_hold(verify: Verify) -> None:
    code, out, _ = verify({"confirmed": {"speedup": 1e6}, "device": "a faster one"})
    assert code == 1
    assert "1000000.00x in the file, tolerance 99 %" in out
    assert " here, a faster one in the file" in out


def test_a_better_score_than_claimed_holds(verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dull.py").write_text(
        "from blocktune.reference.crispness import Crispness\n\n"
        "class Dull(Crispness):\n    direction = 'minimize'  # less is better\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    above, below = ({"delta": d, "ci95": [d - 1, d + 1]} for d in (1000.0, -1000.0))
    ends = {
        (name, claim["delta"]): verify({"confirmed": {name: claim}}, "--evaluators", name)[0]
        for name in ("crispness", "dull:Dull")
        for claim in (above, below)
    }
    assert ends == {
        ("crispness", 1000.0): 1, ("crispness", -1000.0): 0, ("dull:Dull", 1000.0): 0, ("dull:Dull", -1000.0): 1
    }  # fmt: skip


def test_the_unmodified_model_runs_as_the_file_says(verify: Verify) -> None:
    told = json.loads(verify({"unmodified": {"num_inference_steps": 3, "batch": 2}}, "--json")[1])
    assert (told["steps"], told["unmodified_steps"], told["batch"], told["images"]) == (STEPS, 3, 2, 3)
    assert told["holds"] is None


def test_each_is_drawn_with_the_guidance_that_the_file_gives_it(verify: Verify) -> None:
    """A policy without effect, at TUNED's guidance, beside the model at its own: alike where both are one scale."""
    nothing = BlockPolicy.for_model(new_transformer(), "nothing", [])

    def psnr(own: float) -> tuple[float, float | None]:
        evidence = {"confirmed": {"psnr": VAGUE}, "unmodified": {"guidance_scale": own}}
        told = json.loads(verify(evidence, "--evaluators", "psnr", "--json", policy=nothing)[1])
        return told["figures"][0]["measured"]["value"], told["guidance_scale"]

    (alike, same), (unlike, other) = psnr(4.0), psnr(9.0)
    assert (same, other) == (None, 4.0)
    assert unlike < alike == 100
    told = verify({"unmodified": {"guidance_scale": 9.0}}, policy=nothing)[1]
    assert f"in a batch of {STEPS} steps, guidance 4\n" in told


def test_pictures_that_are_not_finite_do_not_hold(verify: Verify) -> None:
    loud = Rule(blocks=(0,), action=ScaleText(operand="value", scale=1e38))
    code, out, err = verify(None, policy=BlockPolicy.for_model(new_transformer(), "loud", [loud]))
    assert (code, out) == (1, "")
    assert (
        err.splitlines()[-1] == "blocktune: loud does not hold: the pipeline returned pixels that are NaN or infinite"
    )


def test_a_policy_without_evidence_is_timed_and_said_to_be_unconfirmed(verify: Verify) -> None:
    for evidence in (None, {"source": {"format": "step mask", "mask": [1, 0]}}):
        code, out, _ = verify(evidence)
        assert code == 0
        assert "24 computed, 0 skipped, 24 reused, 0 scaled" in out
        assert "seconds" in out
        assert out.splitlines()[-1].endswith("no figure of its file was checked")


def test_a_file_cannot_name_code_to_run(verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lurking.py").write_text(
        "from pathlib import Path\nfrom blocktune.evaluators.sanity import Sane\n"
        "Path(__file__).with_name('ran').touch()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    evidence = {"confirmed": {"lurking:Sane": VAGUE, "crispness": VAGUE}}
    code, out, _ = verify(evidence)
    assert code == 0
    assert "lurking:Sane     not checked: no built-in evaluator" in out
    assert not (tmp_path / "ran").exists()
    code, out, _ = verify(evidence, "--evaluators", "lurking:Sane")
    assert (code, (tmp_path / "ran").exists()) == (0, True)
    assert out.splitlines()[-1].endswith("3 pictures: lurking:Sane")


def test_mistakes_are_one_sentence(verify: Verify) -> None:
    other = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=24, fingerprint="0" * 64)
    mistakes: list[tuple[dict[str, Any], list[str], BlockPolicy | None, str]] = [
        ({}, [], BlockPolicy.from_step_mask(other, [1, 0]), "model.num_blocks is 24; the model here has 12 blocks"),
        ({"confirmed": {"psnr": {"delta": 1.0}}}, [], None, "evidence.confirmed.psnr.ci95 is "),
        ({"confirmed": {"speedup": -1}}, [], None, "evidence.confirmed.speedup is -1"),
        ({"confirmed": []}, [], None, "evidence.confirmed is []"),
        ({"unmodified": {"batch": 0}}, [], None, "evidence.unmodified.batch is 0"),
        ({"confirmed": {"psnr": VAGUE}}, ["--evaluators", "ssim"], None, "--evaluators has 'ssim'; evidence.confirmed"),
        ({"confirmed": {"x:Y": VAGUE}}, ["--evaluators", "x:Y"], None, "evaluator is 'x:Y', which cannot be found"),
        ({}, ["--prompts", "none.jsonl"], None, "--prompts is 'none.jsonl'"),
    ]
    for evidence, more, policy, told in mistakes:
        code, out, err = verify(evidence, *more, policy=policy)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith(f"blocktune: {told}")
        assert "Traceback" not in err
