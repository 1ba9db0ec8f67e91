"""The bytes that reuse is predicted to keep are those that it kept."""

import pytest
import torch
from blocktune.policies import BlockPolicy, PolicyError, Reuse, Rule, Skip, apply_policy, predict_cache_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from .families import FAMILIES, STEPS, TEXT_TOKENS, Family
from .guided import Pipeline

SIDE = 4
TOKENS = {  # of image and text, where these are not a square and as many words as everywhere
    "flux-kontext": (2 * SIDE * SIDE, TEXT_TOKENS),  # the reference picture
    "qwen-image-edit": ((SIDE + 2) * SIDE, TEXT_TOKENS),
    "ltx": (2 * SIDE * SIDE, TEXT_TOKENS),  # two frames
    "wan": (2 * SIDE * SIDE, TEXT_TOKENS),
    "wan-i2v": (2 * SIDE * SIDE, 512),
    "hunyuan-video": (2 * SIDE * SIDE, TEXT_TOKENS),
    "hunyuan-video-i2v": (2 * SIDE * SIDE, TEXT_TOKENS),
}
by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name, scope="module")
quarters = st.sampled_from([(a / 4, b / 4) for a in range(4) for b in range(a + 1, 5)])


@st.composite
def policies(draw: st.DrawFn, family: Family, pipe: Pipeline) -> BlockPolicy:
    """Bands of neighbours that reuse, alike or not, with skips between them; windows, branches, guidance in part."""
    rules, first = [], 0
    while first < len(family.slots):
        last = draw(st.integers(first + 1, len(family.slots)))
        line = Reuse(every=2, forecast="linear")
        action = draw(
            st.sampled_from([Reuse(), Reuse(every=2), Reuse(every=3), Reuse(forecast="linear"), line, Skip()])
        )
        branch = draw(st.sampled_from(["both", "cond", "uncond"] if pipe.calls else ["both"]))
        rules.append(Rule(blocks=range(first, last), window=draw(quarters), branch=branch, action=action))
        first = last
    window = draw(quarters) if family.name != "z-image" else (0.0, 1.0)
    return BlockPolicy.for_model(pipe, "test", rules, guidance_window=window)


@by_family
def test_prediction_is_what_the_report_tells(family, model):
    met = set()

    @settings(max_examples=12)
    @given(st.data(), st.booleans(), st.integers(1, 2))
    def check(data: st.DataObject, guided: bool, pictures: int) -> None:
        pipe = Pipeline(model, guided)
        policy = data.draw(policies(family, pipe))
        image, text = TOKENS.get(family.name, (SIDE * SIDE, TEXT_TOKENS))
        predicted = predict_cache_bytes(
            pipe, policy, num_steps=STEPS, image_tokens=image, text_tokens=text, pictures=pictures, guided=guided
        )
        with apply_policy(pipe, policy) as applied:
            pipe(family, pictures)
        assert applied.report.cache_bytes == predicted
        met.add(predicted)

    check()
    assert len(met) > 2  # nothing, one residual, or more


def test_a_model_without_weights_and_another_dtype_and_start():
    """Eight steps from the second on, as an image-to-image run has them: block 0 and a run of two keep one each."""
    family = next(family for family in FAMILIES if family.name == "sd3.5-large")
    with torch.device("meta"):
        model = family.transformer()
    rules = [Rule(blocks=[0], window=(0, 0.5), action=Reuse()), Rule(blocks=[1, 2], action=Reuse(every=3))]
    policy = BlockPolicy.for_model(model, "test", rules)
    asked = {"num_steps": 8, "image_tokens": 64, "text_tokens": 10, "pictures": 3, "guided": True}
    # the last block returns no text
    expected = 6 * 32 * 2 * ((64 + 10) + 64)
    assert predict_cache_bytes(model, policy, **asked, start=2, dtype=torch.bfloat16) == expected
    assert predict_cache_bytes(model, policy, **asked, start=3, dtype=torch.float32) == 6 * 32 * 4 * 64
    halves = [Rule(blocks=[b], window=w, action=Reuse()) for b, w in ((0, (0, 0.5)), (1, (0.6, 1)))]
    one_at_a_time = BlockPolicy.for_model(model, "test", halves)  # of 8 steps, 0 to 3 and 4 to 7
    assert predict_cache_bytes(model, one_at_a_time, **asked, dtype=torch.bfloat16) == 6 * 32 * 2 * (64 + 10)
    other = BlockPolicy.for_model(FAMILIES[0].build(), "test", rules)
    with pytest.raises(PolicyError, match="another architecture"):
        predict_cache_bytes(model, other, **asked)
