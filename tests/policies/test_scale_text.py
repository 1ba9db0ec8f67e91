"""Each operand, scope and branch against the block's arithmetic written out by hand, in float64."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocktune.policies import BlockPolicy, Rule, ScaleText, apply_policy
from blocktune.policies.attention import scale_rows

from .pipelines import generate

OPERANDS = [("input", "propagate"), ("input", "local"), ("key", None), ("value", None), ("logit", None)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({}, id="sd3"),
        pytest.param({"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, id="sd3.5-medium"),
    ],
)
def pipe(request, tiny_sd3_pipeline):
    pipe = tiny_sd3_pipeline(**request.param)
    pipe.transformer.double()
    return pipe


@pytest.fixture(scope="module")
def inputs():
    """Rows 0, 1 unconditional and 2, 3 conditional when guidance is on."""
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=generator, dtype=torch.float64),
        "encoder_hidden_states": torch.randn(4, 7, 32, generator=generator, dtype=torch.float64),
        "pooled_projections": torch.randn(4, 32, generator=generator, dtype=torch.float64),
        "timestep": torch.full((4,), 500.0),
    }


def heads_of(attn, x):
    return x.reshape(x.shape[0], x.shape[1], attn.heads, -1).permute(0, 2, 1, 3)


def joint_attention(attn, image, text, key, value, logit):
    """Softmax attention over [image, text], in words of weights; the factors are (rows, 1, 1, 1)."""
    q, k, v = (heads_of(attn, linear(image)) for linear in (attn.to_q, attn.to_k, attn.to_v))
    tq, tk, tv = (heads_of(attn, linear(text)) for linear in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    if attn.norm_q is not None:
        q, k, tq, tk = attn.norm_q(q), attn.norm_k(k), attn.norm_added_q(tq), attn.norm_added_k(tk)
    tk, tv = key * tk, value * tv

    def attend(query, text_weight):
        root = query.shape[-1] ** 0.5
        on_image = torch.exp(query @ k.transpose(-1, -2) / root)
        on_text = torch.exp(query @ tk.transpose(-1, -2) / root) * text_weight
        total = on_image.sum(-1, keepdim=True) + on_text.sum(-1, keepdim=True)
        return ((on_image @ v + on_text @ tv) / total).permute(0, 2, 1, 3).flatten(2)

    image_out = attn.to_out[0](attend(q, logit))
    text_out = attend(tq, torch.ones_like(logit))
    return image_out, None if attn.to_add_out is None else attn.to_add_out(text_out)


def block_by_hand(block, image, text, temb, operand, scope, s):
    """One MMDiT block with the text scaled by `s` (rows,) at `operand`; returns text, image."""
    one, s = torch.ones_like(s)[:, None, None, None], s[:, None, None, None]
    stream = text * s[:, 0] if (operand, scope) == ("input", "propagate") else text
    seen = stream * s[:, 0] if (operand, scope) == ("input", "local") else stream

    def layer_norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    emb = block.norm1.linear(F.silu(temb))[:, None]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = emb.chunk(
        9 if block.use_dual_attention else 6, dim=-1
    )
    emb = block.norm1_context.linear(F.silu(temb))[:, None]
    if block.context_pre_only:
        text_scale, text_shift = emb.chunk(2, dim=-1)
    else:
        text_shift, text_scale, text_gate, text_shift_mlp, text_scale_mlp, text_gate_mlp = emb.chunk(6, dim=-1)

    image_attended, text_attended = joint_attention(
        block.attn,
        layer_norm(image) * (1 + scale) + shift,
        layer_norm(seen) * (1 + text_scale) + text_shift,
        key=s if operand == "key" else one,
        value=s if operand == "value" else one,
        logit=s if operand == "logit" else one,
    )
    image_out = image + gate * image_attended
    if block.use_dual_attention:
        shift2, scale2, gate2 = second
        image_out = image_out + gate2 * block.attn2(layer_norm(image) * (1 + scale2) + shift2)
    image_out = image_out + gate_mlp * block.ff(layer_norm(image_out) * (1 + scale_mlp) + shift_mlp)
    if block.context_pre_only:
        return None, image_out
    middle = seen + text_gate * text_attended
    update = text_gate * text_attended
    update = update + text_gate_mlp * block.ff_context(layer_norm(middle) * (1 + text_scale_mlp) + text_shift_mlp)
    return stream + update, image_out


def forward_by_hand(model, inputs, blocks, operand, scope, s):
    image = model.pos_embed(inputs["hidden_states"])
    temb = model.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
    text = model.context_embedder(inputs["encoder_hidden_states"])
    for index, block in enumerate(model.transformer_blocks):
        factor = s if index in blocks else torch.ones_like(s)
        text, image = block_by_hand(block, image, text, temb, operand, scope, factor)
    image = model.proj_out(model.norm_out(image, temb))
    return image.reshape(4, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(4, 4, 8, 8)


def under(pipe, inputs, *rules, guidance=4.0):
    pipe._guidance_scale = guidance  # as inside a pipeline call
    with torch.no_grad(), apply_policy(pipe, BlockPolicy.for_model(pipe, "test", rules)):
        return pipe.transformer(**inputs).sample


def plain(pipe, inputs):
    with torch.no_grad():
        return pipe.transformer(**inputs).sample


def test_the_reference_is_the_model(pipe, inputs):
    with torch.no_grad():
        by_hand = forward_by_hand(pipe.transformer, inputs, (), "value", None, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(by_hand, plain(pipe, inputs))


@pytest.mark.parametrize(("operand", "scope"), OPERANDS)
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.7])
@pytest.mark.parametrize("blocks", [(0,), (1, 2), (3,)])
def test_operand_is_as_written_out(pipe, inputs, operand, scope, scale, blocks):
    got = under(pipe, inputs, Rule(blocks=blocks, action=ScaleText(operand=operand, scale=scale, scope=scope)))
    with torch.no_grad():
        s = torch.full((4,), scale, dtype=torch.float64)
        by_hand = forward_by_hand(pipe.transformer, inputs, blocks, operand, scope, s)
    torch.testing.assert_close(got, by_hand)
    if operand != "input" or blocks != (3,):
        assert not torch.allclose(got, plain(pipe, inputs), atol=1e-4)


@pytest.mark.parametrize(("operand", "scope"), OPERANDS)
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_branch_is_a_half_of_the_batch(pipe, inputs, operand, scope, branch):
    action = ScaleText(operand=operand, scale=1.7, scope=scope)
    got = under(pipe, inputs, Rule(blocks=[1], branch=branch, action=action))
    rows = [1.0, 1.0, 1.7, 1.7] if branch == "cond" else [1.7, 1.7, 1.0, 1.0]
    with torch.no_grad():
        s = torch.tensor(rows, dtype=torch.float64)
        torch.testing.assert_close(got, forward_by_hand(pipe.transformer, inputs, [1], operand, scope, s))
    if operand != "logit":  # which is attended to in two parts, and so rounded otherwise, in the other half, too
        other = slice(0, 2) if branch == "cond" else slice(2, 4)
        assert torch.equal(got[other], plain(pipe, inputs)[other])


def test_a_scale_for_each_branch(pipe, inputs):
    rules = [
        Rule(blocks=[1], branch="cond", action=ScaleText(operand="logit", scale=2)),
        Rule(blocks=[1], branch="uncond", action=ScaleText(operand="logit", scale=0)),
    ]
    with torch.no_grad():
        s = torch.tensor([0.0, 0.0, 2.0, 2.0], dtype=torch.float64)
        by_hand = forward_by_hand(pipe.transformer, inputs, [1], "logit", None, s)
    torch.testing.assert_close(under(pipe, inputs, *rules), by_hand)


def test_without_guidance_every_row_is_conditional(pipe, inputs):
    action = ScaleText(operand="value", scale=1.7)
    both = under(pipe, inputs, Rule(blocks=[1], action=action))
    conditional = under(pipe, inputs, Rule(blocks=[1], branch="cond", action=action), guidance=1.0)
    unconditional = under(pipe, inputs, Rule(blocks=[1], branch="uncond", action=action), guidance=1.0)
    assert torch.equal(conditional, both)
    assert torch.equal(unconditional, plain(pipe, inputs))


def test_branch_through_the_pipeline_itself(tiny_sd3_pipeline):
    pipe = tiny_sd3_pipeline()

    def generate(guidance):
        generator = torch.Generator().manual_seed(1)
        return pipe(
            "a cat",
            num_inference_steps=3,
            guidance_scale=guidance,
            max_sequence_length=4,
            generator=generator,
            output_type="latent",
        ).images

    policy = BlockPolicy.for_model(
        pipe, "test", [Rule(blocks=[0, 2], branch="uncond", action=ScaleText(operand="logit", scale=0))]
    )
    guided, unguided = generate(4.0), generate(1.0)
    with apply_policy(pipe, policy):
        assert not torch.allclose(generate(4.0), guided, atol=1e-3)
        assert torch.equal(generate(1.0), unguided)


def test_input_of_the_last_block_changes_nothing(pipe, inputs):
    for scope in ("propagate", "local"):
        got = under(pipe, inputs, Rule(blocks=[3], action=ScaleText(operand="input", scale=2.0, scope=scope)))
        torch.testing.assert_close(got, plain(pipe, inputs), rtol=1e-4, atol=1e-4)  # but for the norm's epsilon


def test_silent_logits_are_text_hidden_from_image_tokens_of_this_block_alone(pipe, inputs):
    """Other text then changes nothing of what the last block gives the image."""
    model = pipe.transformer
    with torch.no_grad():
        image = model.pos_embed(inputs["hidden_states"])
        temb = model.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
        text = model.context_embedder(inputs["encoder_hidden_states"])
    policy = BlockPolicy.for_model(model, "test", [Rule(blocks=[3], action=ScaleText(operand="logit", scale=0))])

    def with_text(other):
        """The model's output when the last block is given `other` as its text."""
        given = {"hidden_states": image, "temb": temb, "encoder_hidden_states": other}
        last = model.transformer_blocks[3]
        handle = last.register_forward_pre_hook(lambda module, args, kwargs: (args, given), with_kwargs=True)
        with torch.no_grad():
            output = model(**inputs).sample
        handle.remove()
        return output

    assert not torch.allclose(with_text(text), with_text(text.flip(2)), atol=1e-4)
    with apply_policy(model, policy):
        assert torch.equal(with_text(text), with_text(text.flip(2)))


def test_zero_silences_even_an_infinite_text(pipe, inputs):
    text = inputs["encoder_hidden_states"].clone()
    text[0, 0, 0] = torch.inf
    rule = Rule(blocks=[0], action=ScaleText(operand="input", scale=0))
    assert under(pipe, inputs | {"encoder_hidden_states": text}, rule).isfinite().all()


def test_operands_combine_on_one_block(pipe, inputs):
    """Key, value and logit at once, each scaled as if alone; order of the rules is irrelevant."""
    rules = [
        Rule(blocks=[1], action=ScaleText(operand=o, scale=s)) for o, s in (("key", 1.3), ("logit", 2), ("value", 0.5))
    ]
    got = under(pipe, inputs, *rules)
    assert torch.equal(got, under(pipe, inputs, *rules[::-1]))

    model, attn = pipe.transformer, pipe.transformer.transformer_blocks[1].attn
    processor = attn.processor

    class ByHand:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            factors = (torch.full((1, 1, 1, 1), s, dtype=torch.float64) for s in (1.3, 0.5, 2.0))
            return joint_attention(attn, hidden_states, encoder_hidden_states, *factors)

    attn.processor = ByHand()
    with torch.no_grad():
        by_hand = model(**inputs).sample
    attn.processor = processor
    torch.testing.assert_close(got, by_hand)


def test_low_precision_is_scaled_with_one_rounding():
    """1.3 is no bfloat16 number; it is the product that is rounded."""
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    scaled = scale_rows(x, torch.tensor([1.3, 0.0])[:, None, None])
    assert scaled.dtype == torch.bfloat16
    assert torch.equal(scaled[0], (x[0].double() * 1.3).bfloat16())
    assert torch.equal(scaled[1], torch.zeros_like(x[1]))


# --- threads -----------------------------------------------------------------------------------------------------


def test_two_models_in_two_threads_hear_their_own_policies(tiny_sd3_pipeline):
    """Attention is reached by a name that all threads share."""
    attention = F.scaled_dot_product_attention
    pipes = [tiny_sd3_pipeline(seed=seed) for seed in (0, 1)]
    scales = [ScaleText(operand="value", scale=2.0), ScaleText(operand="logit", scale=0.5)]
    policies = [
        BlockPolicy.for_model(pipe, "test", [Rule(blocks=range(3), action=scale)])
        for pipe, scale in zip(pipes, scales, strict=True)
    ]
    expected = []
    for pipe, policy in zip(pipes, policies, strict=True):
        with apply_policy(pipe, policy):
            expected.append(generate(pipe))
    plain = tiny_sd3_pipeline(seed=2)
    unscaled = generate(plain)
    start = threading.Barrier(3)

    def run(pipe: Any, policy: BlockPolicy | None, wanted: torch.Tensor) -> bool:
        start.wait()
        for _ in range(10):
            with apply_policy(pipe, policy) if policy else nullcontext():
                if not torch.equal(generate(pipe), wanted):
                    return False
        return True

    with ThreadPoolExecutor(3) as threads:
        work = [*zip(pipes, policies, expected, strict=True), (plain, None, unscaled)]
        assert all([*threads.map(run, *zip(*work, strict=True))])
    assert F.scaled_dot_product_attention is attention
