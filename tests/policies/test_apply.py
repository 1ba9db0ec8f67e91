"""A pipeline under a policy: skip, reuse, windows, report, and that nothing is left behind."""

import copy
import gc
import threading
from contextlib import ExitStack

import pytest
import torch
from blocktune.policies import BlockPolicy, PolicyError, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers import (
    DDIMScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
)

from .by_hand import forward_as

STEPS = 6
RESIDUAL = 2 * (16 + 16) * 32 * 4  # bytes: two rows, 16 image and 12 + 4 text tokens, 32 wide, float32
VARIANTS = [
    pytest.param({}, id="sd3"),
    pytest.param({"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, id="sd3.5-medium"),
]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def pipe(tiny_sd3_pipeline, variant):
    return tiny_sd3_pipeline(**variant)


@pytest.fixture
def medium(tiny_sd3_pipeline):
    return tiny_sd3_pipeline(qk_norm="rms_norm", dual_attention_layers=(0, 1))


def generate(pipe, **kwargs) -> torch.Tensor:
    """Latents (1, 4, 8, 8)."""
    defaults = {
        "prompt": "a red cat",
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "max_sequence_length": 4,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }
    return pipe(**defaults | kwargs).images


def policy_for(pipe, *rules: Rule) -> BlockPolicy:
    return BlockPolicy.for_model(pipe, "test", rules)


def hand_written_loop(pipe, kinds) -> torch.Tensor:
    """The pipeline's denoising loop and the transformer's forward, spelt out; `kinds[step][block]` is obeyed."""
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
        "a red cat", None, None, max_sequence_length=4, device=torch.device("cpu")
    )
    text_in, pooled = torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    model, residuals = pipe.transformer, {}
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            image = model.pos_embed(torch.cat([latents] * 2))
            temb = model.time_text_embed(t.expand(2), pooled)
            text = model.context_embedder(text_in)
            for index, block in enumerate(model.transformer_blocks):
                if kinds[step][index] == "compute":
                    text_out, image_out = block(image, text, temb)
                    residuals[index] = (None if text_out is None else text_out - text, image_out - image)
                    text, image = text_out, image_out
                elif kinds[step][index] == "reuse":
                    text_residual, image_residual = residuals[index]
                    text = None if text_residual is None else text + text_residual
                    image = image + image_residual
            image = model.proj_out(model.norm_out(image, temb))  # (2, 16, 2 * 2 * 4)
            noise = image.reshape(2, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 8, 8)
            unconditional, conditional = noise.chunk(2)
            latents = scheduler.step(unconditional + 4.0 * (conditional - unconditional), t, latents)[0]
    return latents


def snapshot(model: torch.nn.Module) -> dict:
    """Every attribute of every module, hook dicts and child dicts by content."""
    return {
        name: {
            key: {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
            for key, value in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }


# --- nothing to do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules", [[], [Rule(blocks=range(4), action=ScaleText(operand=o, scale=1)) for o in ("key", "value", "logit")]]
)
def test_a_policy_that_changes_nothing_is_bit_identical(pipe, rules):
    plain = generate(pipe)
    with apply_policy(pipe, policy_for(pipe, *rules)) as applied:
        assert torch.equal(generate(pipe), plain)
    assert applied.report.computed == 4 * STEPS
    assert applied.report.skipped == applied.report.reused == applied.report.scaled == 0


# --- skip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(4))
def test_skip_is_removal(pipe, block):
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=[block], action=Skip()))):
        skipped = generate(pipe)
    assert not torch.allclose(skipped, generate(pipe), atol=1e-3)
    del pipe.transformer.transformer_blocks[block]
    assert torch.equal(skipped, generate(pipe))


def test_skip_in_windows(pipe):
    rules = [Rule(blocks=[1, 3], window=(0.5, 1), action=Skip()), Rule(blocks=[1], window=(0, 0.1), action=Skip())]
    kinds = [["compute"] * 4 for _ in range(STEPS)]
    kinds[0][1] = kinds[3][1] = kinds[4][1] = kinds[5][1] = "skip"
    kinds[3][3] = kinds[4][3] = kinds[5][3] = "skip"
    with apply_policy(pipe, policy_for(pipe, *rules)) as applied:
        torch.testing.assert_close(generate(pipe), hand_written_loop(pipe, kinds))
    assert applied.report.table == tuple(map(tuple, kinds))


# --- reuse -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "every", "reused"),
    [
        ((0, 1), 2, [1, 3, 5]),
        ((0, 1), None, [1, 2, 3, 4, 5]),
        ((0.5, 1), None, [3, 4, 5]),
        ((0.5, 1), 3, [3, 4]),
        ((0.3, 0.6), 2, [2]),  # at step 3 the residual of step 1 is two steps old
    ],
)
@pytest.mark.parametrize("blocks", [(0, 1, 2, 3), (1, 3)])
def test_reuse_is_the_hand_written_loop(pipe, window, every, reused, blocks):
    kinds = [["reuse" if s in reused and b in blocks else "compute" for b in range(4)] for s in range(STEPS)]
    with apply_policy(pipe, policy_for(pipe, Rule(blocks=blocks, window=window, action=Reuse(every=every)))) as applied:
        first = generate(pipe)
        assert torch.equal(first, generate(pipe))  # nothing of the first call is left in the second
    torch.testing.assert_close(first, hand_written_loop(pipe, kinds))
    assert applied.report.table == tuple(map(tuple, kinds))
    assert applied.report.reused == len(reused) * len(blocks)
    assert applied.report.computed == 4 * STEPS - len(reused) * len(blocks)


def test_a_residual_survives_a_skip(medium):
    rules = [Rule(blocks=[2], window=(0.3, 0.6), action=Skip()), Rule(blocks=[2], window=(0.6, 1), action=Reuse())]
    kinds = [["compute"] * 4 for _ in range(STEPS)]
    kinds[2][2] = kinds[3][2] = "skip"
    kinds[4][2] = kinds[5][2] = "reuse"
    with apply_policy(medium, policy_for(medium, *rules)):
        torch.testing.assert_close(generate(medium), hand_written_loop(medium, kinds))


def test_cache_does_not_outlive_a_changed_batch_or_an_aborted_call(medium):
    class Stop(Exception):
        pass

    def stop(pipe, step, t, kwargs):
        if step == 2:
            raise Stop
        return kwargs

    policy = policy_for(medium, Rule(blocks=range(4), action=Reuse(every=4)))
    with apply_policy(medium, policy):
        fresh = generate(medium)
    with apply_policy(medium, policy) as applied:
        for other in ({"prompt": ["a", "b"]}, {"height": 8, "width": 8}, {"num_inference_steps": 3}):
            generate(medium, **other)
            assert torch.equal(generate(medium), fresh)
        with pytest.raises(Stop):
            generate(medium, callback_on_step_end=stop)
        assert len(applied.report.calls) == 3
        assert torch.equal(generate(medium), fresh)


def test_cache_is_freed_at_the_end_of_the_call(medium):
    def alive() -> int:
        """Tensors of the shape of an image residual; text has 17 tokens here."""
        return sum(type(o) is torch.Tensor and o.shape == (2, 16, 32) for o in gc.get_objects())

    counts, before = [], alive()

    def count(pipe, step, t, kwargs):
        counts.append(alive() - before)
        return kwargs

    with apply_policy(medium, policy_for(medium, Rule(blocks=[1, 2], window=(0.5, 1), action=Reuse()))):
        generate(medium, callback_on_step_end=count, max_sequence_length=5)
    # kept at step 2, the last before the window, by both blocks together; freed by the last step
    assert counts == [0, 0, 1, 1, 1, 0]


def test_calling_twice_at_a_step_is_refused_when_residuals_are_kept(medium):
    scheduler, inputs = medium.scheduler, transformer_inputs(medium)
    with apply_policy(medium.transformer, policy_for(medium, Rule(blocks=[1], action=Reuse())), scheduler=scheduler):
        scheduler.set_timesteps(4)
        medium.transformer(**inputs)
        with pytest.raises(PolicyError, match="called twice at step 0"):
            medium.transformer(**inputs)


@pytest.mark.parametrize("scope", ["propagate", "local"])
def test_reuse_with_scaled_text(medium, scope):
    """The residual is counted from the text the block saw; the running stream is scaled at reusing steps too."""
    transformer, scheduler = medium.transformer, medium.scheduler
    inputs = transformer_inputs(medium)
    rules = [
        Rule(blocks=[1], action=Reuse()),
        Rule(blocks=[1], action=ScaleText(operand="input", scale=1.5, scope=scope)),
    ]
    original, seen = transformer.transformer_blocks[1].forward, []

    def by_hand(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        running = 1.5 * encoder_hidden_states if scope == "propagate" else encoder_hidden_states
        if not seen:
            text_out, image_out = original(hidden_states, 1.5 * encoder_hidden_states, temb)
            seen.append((text_out - 1.5 * encoder_hidden_states, image_out - hidden_states))
        return running + seen[0][0], hidden_states + seen[0][1]

    def two_steps():
        scheduler.set_timesteps(2)
        first = transformer(**inputs).sample
        scheduler.step(first, scheduler.timesteps[0], inputs["hidden_states"])
        changed = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"] + 0.1}
        return first, transformer(**changed).sample

    with torch.no_grad():
        with apply_policy(transformer, policy_for(medium, *rules), scheduler=scheduler) as applied:
            got = two_steps()
        transformer.transformer_blocks[1].forward = by_hand
        torch.testing.assert_close(got, two_steps())
    second = "reuse+scale" if scope == "propagate" else "reuse"
    assert [call.blocks[1] for call in applied.report.calls] == ["compute+scale", second]


# --- steps -------------------------------------------------------------------------------------------------------


def test_image_to_image_starts_inside_the_windows(medium):
    pipe = StableDiffusion3Img2ImgPipeline(**medium.components)
    pipe.set_progress_bar_config(disable=True)
    policy = policy_for(pipe, Rule(blocks=[1], window=(0.5, 1), action=Skip()), Rule(blocks=[2], action=Reuse(every=2)))
    with apply_policy(pipe, policy) as applied:
        pipe(
            "a cat",
            image=torch.zeros(1, 3, 16, 16),
            strength=0.7,
            num_inference_steps=10,
            max_sequence_length=4,
            output_type="latent",
        )
    assert [call.step for call in applied.report.calls] == [3, 4, 5, 6, 7, 8, 9]
    assert [call.blocks[1] for call in applied.report.calls] == ["compute"] * 2 + ["skip"] * 5
    assert [call.blocks[2] for call in applied.report.calls] == ["compute", "reuse"] * 3 + ["compute"]


def test_heun_counts_evaluations(medium):
    medium.scheduler = FlowMatchHeunDiscreteScheduler()
    with apply_policy(medium, policy_for(medium, Rule(blocks=[1], window=(0.5, 1), action=Skip()))) as applied:
        generate(medium, num_inference_steps=3)
    assert len(medium.scheduler.timesteps) == 5
    assert [call.blocks[1] for call in applied.report.calls] == ["compute"] * 3 + ["skip"] * 2


def test_perturbed_calls_have_a_cache_of_their_own(medium):
    """Skip-layer guidance makes a second call per step, of the conditional half alone, at steps 1 to 4 here."""
    guided = {
        "prompt": ["a", "b"],
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": 0.01,
        "skip_layer_guidance_stop": 0.7,
    }
    plain = generate(medium, **guided)
    with apply_policy(medium, policy_for(medium)):
        assert torch.equal(generate(medium, **guided), plain)
    with apply_policy(medium, policy_for(medium, Rule(blocks=[1, 2], window=(0.5, 1), action=Reuse()))) as applied:
        generate(medium, **guided)
    table = {call.blocks for call in applied.report.calls}
    assert [call.step for call in applied.report.calls] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert table == {
        ("compute",) * 4,
        ("compute", "", "compute", "compute"),
        ("compute", "reuse", "reuse", "compute"),
        ("compute", "", "reuse", "compute"),
    }


def test_perturbed_calls_are_conditional_in_every_row(medium):
    inputs = transformer_inputs(medium) | {"skip_layers": [1]}
    medium._guidance_scale = 4.0  # as inside a guided call
    outputs = []
    for branch in ("cond", "both"):
        rule = Rule(blocks=[2], branch=branch, action=ScaleText(operand="value", scale=1.5))
        with torch.no_grad(), apply_policy(medium, policy_for(medium, rule)):
            outputs.append(medium.transformer(**inputs).sample)
    assert torch.equal(*outputs)


def transformer_inputs(pipe, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, 7, 32, generator=generator, dtype=dtype),
        "pooled_projections": torch.randn(batch, 32, generator=generator, dtype=dtype),
        "timestep": torch.full((batch,), 500.0),
    }


def test_a_bare_transformer_without_scheduler_obeys_whole_runs(medium):
    policy = policy_for(medium.transformer, Rule(blocks=[2], action=Skip()))
    with torch.no_grad(), apply_policy(medium.transformer, policy) as applied:
        got = medium.transformer(**transformer_inputs(medium)).sample
        native = {"skip_layers": [2]}
    with torch.no_grad():
        assert torch.equal(got, medium.transformer(**transformer_inputs(medium), **native).sample)
    assert applied.report.table == (("compute", "compute", "skip", "compute"),)


def test_controlnet_residuals_reach_skipped_and_scaled_blocks(medium):
    """The transformer's forward reads `context_pre_only` of each block where a ControlNet adds to it."""
    inputs = transformer_inputs(medium) | {"block_controlnet_hidden_states": [torch.ones(2, 16, 32)] * 2}
    rules = [Rule(blocks=[1], action=Skip()), Rule(blocks=[3], action=ScaleText(operand="input", scale=1.5))]
    with torch.no_grad():
        with apply_policy(medium.transformer, policy_for(medium, *rules)):
            got = medium.transformer(**inputs).sample
        native = medium.transformer(**inputs, skip_layers=[1]).sample
    torch.testing.assert_close(got, native)  # text scaled in front of the last block changes nothing


# --- what is left behind -----------------------------------------------------------------------------------------

BUSY = [
    Rule(blocks=[0], action=ScaleText(operand="key", scale=1.5)),
    Rule(blocks=[1], action=Skip()),
    Rule(blocks=[2], action=Reuse(every=2)),
    Rule(blocks=[2], branch="cond", action=ScaleText(operand="input", scale=1.5)),
    Rule(blocks=[3], window=(0.2, 0.9), branch="uncond", action=ScaleText(operand="logit", scale=0)),
]


def test_leaving_restores_to_the_bit_and_leaves_nothing(pipe):
    plain, before, keys = generate(pipe), snapshot(pipe.transformer), list(pipe.transformer.state_dict())
    blocks = list(pipe.transformer.transformer_blocks)

    def between_steps(_, step, t, kwargs):
        assert list(pipe.transformer.transformer_blocks) == blocks
        assert list(pipe.transformer.state_dict()) == keys
        return kwargs

    with apply_policy(pipe, policy_for(pipe, *BUSY)) as applied:
        assert not torch.equal(generate(pipe, callback_on_step_end=between_steps), plain)
    assert snapshot(pipe.transformer) == before
    assert torch.equal(generate(pipe), plain)
    applied.remove()  # again
    assert snapshot(pipe.transformer) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_after_an_exception_inside_a_block(medium, error):
    """torch runs no post-hook after an interrupt, so the next forward, or leaving, has to put things right."""
    policy = policy_for(medium, *BUSY)
    with apply_policy(medium, policy):
        under_policy = generate(medium)
    plain, before = generate(medium), snapshot(medium.transformer)

    def fail(*_):
        raise error("in block 2")

    with apply_policy(medium, policy):
        handle = medium.transformer.transformer_blocks[2].ff.register_forward_hook(fail)
        with pytest.raises(error, match="in block 2"):
            generate(medium)
        handle.remove()
        assert torch.equal(generate(medium), under_policy)
    assert snapshot(medium.transformer) == before

    handle = medium.transformer.transformer_blocks[0].attn.to_out[0].register_forward_hook(fail)
    with pytest.raises(error), apply_policy(medium, policy):
        generate(medium)
    handle.remove()
    assert snapshot(medium.transformer) == before
    assert torch.equal(generate(medium), plain)


def test_a_failed_call_can_be_made_again(medium):
    """It kept residuals of half a forward; the run goes on as one that begins at this step."""
    model, scheduler, inputs = medium.transformer, medium.scheduler, transformer_inputs(medium)

    def fail(*_):
        raise RuntimeError("out of memory")

    with (
        torch.no_grad(),
        apply_policy(model, policy_for(medium, Rule(blocks=[1], action=Reuse())), scheduler=scheduler) as applied,
    ):
        scheduler.set_timesteps(3)
        noise = model(**inputs).sample
        scheduler.step(noise, scheduler.timesteps[0], inputs["hidden_states"])
        handle = model.norm_out.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**inputs)
        handle.remove()
        assert torch.equal(model(**inputs).sample, noise)
    assert [(call.step, call.blocks[1]) for call in applied.report.calls] == [(0, "compute"), (1, "compute")]


def test_gradient_checkpointing_calls_blocks_by_position(medium):
    model = medium.transformer
    inputs = transformer_inputs(medium)
    policy = policy_for(medium, *BUSY[:2], Rule(blocks=[2], action=ScaleText(operand="value", scale=1.5)))
    with apply_policy(model, policy):
        plain = torch.autograd.grad(model(**inputs).sample.sum(), model.proj_out.weight, allow_unused=True)
        plain += torch.autograd.grad(model(**inputs).sample.sum(), model.context_embedder.weight)
        model.enable_gradient_checkpointing()
        saved = torch.autograd.grad(model(**inputs).sample.sum(), model.context_embedder.weight)
    torch.testing.assert_close(saved[0], plain[1])


def test_two_pipelines_keep_their_policies_apart(tiny_sd3_pipeline):
    one, two = tiny_sd3_pipeline(), tiny_sd3_pipeline()
    with apply_policy(one, policy_for(one, Rule(blocks=[1], action=Skip()))):
        alone = generate(one)
        with apply_policy(two, policy_for(two, Rule(blocks=[1], action=Reuse(every=2)))) as applied:
            generate(two)
            assert torch.equal(generate(one), alone)
            assert applied.report.reused == 3


def test_concurrent_forwards_are_refused_not_corrupted(medium):
    policy = policy_for(medium, Rule(blocks=[1], action=Skip()))
    model, inputs = medium.transformer, transformer_inputs(medium)
    inside, go_on, results = threading.Event(), threading.Event(), []

    def hold(*_):
        inside.set()
        assert go_on.wait(10)

    def forward():
        with torch.no_grad():
            results.append(model(**inputs).sample)

    with torch.no_grad(), apply_policy(model, policy) as applied:
        alone = model(**inputs).sample
        handle = model.transformer_blocks[0].register_forward_hook(hold)
        thread = threading.Thread(target=forward)
        thread.start()
        assert inside.wait(10)
        with pytest.raises(PolicyError, match="Another thread is in a forward"):
            model(**inputs)
        go_on.set()
        thread.join()
        handle.remove()
        assert torch.equal(results[0], alone)
        assert torch.equal(model(**inputs).sample, alone)
        assert applied.report.skipped == 1


# --- report ------------------------------------------------------------------------------------------------------


def test_report_is_what_ran(pipe):
    ran = []
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    with apply_policy(pipe, policy_for(pipe, *BUSY)) as applied:
        assert applied.report.calls == ()
        generate(pipe)
    report = applied.report
    assert report.computed == len(ran)
    for index in range(4):
        column = [row[index] for row in report.table]
        assert sum(entry.startswith("compute") for entry in column) == ran.count(index)
    assert report.skipped == STEPS
    assert report.reused == STEPS // 2
    assert report.scaled == STEPS + STEPS + 4
    assert report.computed + report.skipped + report.reused == 4 * STEPS
    assert str(report).splitlines() == [
        "block calls: computed 15, skipped 6, reused 3, scaled 16",
        "steps 0 to 5: . compute, - skip, = reuse; ^ compute and ~ reuse with scaled text",
        "block   0  ^^^^^^",
        "block   1  ------",
        "block   2  ^~^~^~",
        "block   3  ..^^^^",
    ]


# --- refusals ----------------------------------------------------------------------------------------------------


def test_refuses_another_model(medium, tiny_sd3_pipeline):
    policy = policy_for(medium)
    with pytest.raises(PolicyError, match=r"model.num_blocks is 4; the model here has 5 blocks\.$"):
        apply_policy(tiny_sd3_pipeline(num_layers=5), policy)
    with pytest.raises(PolicyError, match=r"model.fingerprint is .* another architecture\.$"):
        apply_policy(tiny_sd3_pipeline(), policy)
    flux = policy.model_copy(
        update={"model": policy.model.model_copy(update={"transformer": "FluxTransformer2DModel"})}
    )
    with pytest.raises(PolicyError, match=r"model.transformer is FluxTransformer2DModel; the model here is a SD3Tr"):
        apply_policy(medium, flux)
    with pytest.raises(PolicyError, match="Linear is not a known architecture; blocktune knows SD3Transformer2DModel"):
        apply_policy(torch.nn.Linear(1, 1), policy)
    with pytest.raises(PolicyError, match="str has no transformer; give a diffusers pipeline"):
        BlockPolicy.for_model("stabilityai/stable-diffusion-3", "x", [])


def test_fingerprint_is_of_the_architecture(medium, tiny_sd3_pipeline, tmp_path):
    fingerprint = policy_for(medium).model.fingerprint
    medium.transformer.save_pretrained(tmp_path)
    again = type(medium.transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert policy_for(again).model.fingerprint == fingerprint
    assert policy_for(tiny_sd3_pipeline(qk_norm="rms_norm")).model.fingerprint != fingerprint


@pytest.mark.parametrize("action", [Skip(), Reuse(every=2)])
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_refuses_to_leave_out_a_block_for_one_half(medium, action, branch):
    policy = policy_for(medium, Rule(blocks=[1], branch=branch, action=action))
    with pytest.raises(PolicyError, match=r"rules\[0\].branch is .* both halves of guidance in one call"):
        apply_policy(medium, policy)


def test_refuses_what_needs_more_than_it_was_given(medium):
    half = policy_for(medium, Rule(blocks=[1], branch="cond", action=ScaleText(operand="key", scale=2)))
    with pytest.raises(
        PolicyError, match=r"rules\[0\].branch is 'cond'; a half of guidance can be told only with a pip"
    ):
        apply_policy(medium.transformer, half)
    for rule in (Rule(blocks=[1], window=(0, 0.5), action=Skip()), Rule(blocks=[1], action=Reuse())):
        policy = policy_for(medium, Rule(blocks=[0], action=Skip()), rule)
        with pytest.raises(PolicyError, match=r"rules\[1\] has a window or reuses, .* but no scheduler was given\.$"):
            apply_policy(medium.transformer, policy)
        with pytest.raises(PolicyError, match="DDIMScheduler has no step_index"):
            apply_policy(medium.transformer, policy, scheduler=DDIMScheduler())
    with pytest.raises(PolicyError, match="scheduler is for a bare transformer; a pipeline brings its own"):
        apply_policy(medium, policy_for(medium), scheduler=medium.scheduler)
    phrase = policy_for(medium, Rule(blocks=[1], action=ScaleText(operand="key", scale=2, tokens=["cat"])))
    with pytest.raises(PolicyError, match=r"rules\[0\].action.tokens is \('cat',\); .* with a pipeline's tokenizers"):
        apply_policy(medium.transformer, phrase)
    with pytest.raises(PolicyError, match="cache_device is 'disk'; it must be None or 'cpu'"):
        apply_policy(medium, policy_for(medium), cache_device="disk")


def test_refuses_a_scheduler_that_cannot_tell_the_step(medium):
    policy = policy_for(medium, Rule(blocks=[1], window=(0, 0.5), action=Skip()))
    with apply_policy(medium, policy):  # swapped for one that cannot, under the policy
        medium.scheduler = DDIMScheduler()
        with pytest.raises(PolicyError, match="DDIMScheduler has no step_index"):
            generate(medium)


def test_refuses_a_schedule_that_is_over(medium):
    scheduler, inputs = medium.scheduler, transformer_inputs(medium)
    with (
        torch.no_grad(),
        apply_policy(medium.transformer, policy_for(medium, Rule(blocks=[1], action=Reuse())), scheduler=scheduler),
    ):
        scheduler.set_timesteps(1)
        scheduler.step(medium.transformer(**inputs).sample, scheduler.timesteps[0], inputs["hidden_states"])
        with pytest.raises(PolicyError, match="is at step 1 of a schedule of 1; call its set_timesteps"):
            medium.transformer(**inputs)
        scheduler.set_timesteps(1)
        medium.transformer(**inputs)


def test_refuses_a_second_policy_until_the_first_is_gone(medium):
    policy = policy_for(medium)
    applied = apply_policy(medium, policy)
    with pytest.raises(PolicyError, match="Policy 'test' is already applied to this transformer; remove it first"):
        apply_policy(medium.transformer, policy)
    applied.remove()
    with apply_policy(medium, policy):
        pass
    with apply_policy(medium, policy):
        pass


def test_refuses_a_batch_that_has_no_halves(medium):
    policy = policy_for(medium, Rule(blocks=[1], branch="cond", action=ScaleText(operand="key", scale=2)))
    medium._guidance_scale = 4.0
    with apply_policy(medium, policy), pytest.raises(PolicyError, match="This batch of 3 rows is not an unconditional"):
        medium.transformer(**transformer_inputs(medium, batch=3))


def test_refuses_an_attention_that_it_cannot_reach(medium):
    """A processor with arithmetic of its own would hear nothing of a scale."""

    class Custom:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            return hidden_states, encoder_hidden_states

    before = snapshot(medium.transformer)
    policy = policy_for(
        medium, Rule(blocks=[0], action=Skip()), Rule(blocks=[1], action=ScaleText(operand="key", scale=2))
    )
    original = medium.transformer.transformer_blocks[1].attn.processor
    with apply_policy(medium, policy):
        medium.transformer.transformer_blocks[1].attn.processor = Custom()
        with pytest.raises(PolicyError, match="needs an attention that calls scaled_dot_product_attention once"):
            generate(medium)
        medium.transformer.transformer_blocks[1].attn.processor = original
        generate(medium)
    assert snapshot(medium.transformer) == before


def test_refuses_a_forward_that_passes_its_blocks_by(medium):
    """Another library may call the blocks it took out of the model, and a policy would silently do nothing."""
    model, inputs = medium.transformer, transformer_inputs(medium)
    blocks = list(model.transformer_blocks)
    with torch.no_grad(), apply_policy(medium, policy_for(medium, Rule(blocks=[1], action=Skip()))):
        forward = model.forward

        def elsewhere(**kwargs):
            here, model.transformer_blocks = model.transformer_blocks, torch.nn.ModuleList(blocks)
            try:
                return forward(**kwargs)
            finally:
                model.transformer_blocks = here

        model.forward = elsewhere
        with pytest.raises(PolicyError, match="Block 1 was not called where the policy acts on it"):
            model(**inputs)
        del model.forward
        model(**inputs)


@pytest.mark.parametrize(
    ("action", "held"),
    [
        (Reuse(every=3), 1),  # one for both blocks
        (Reuse(every=2, forecast="linear"), 3),  # the last two and what they forecast
    ],
)
def test_residuals_in_main_memory_are_the_same(medium, action, held):
    policy = policy_for(medium, Rule(blocks=[1, 2], action=action))
    with apply_policy(medium, policy) as applied:
        expected = generate(medium)
    with apply_policy(medium, policy, cache_device="cpu") as on_cpu:
        assert torch.equal(generate(medium), expected)
    assert applied.report.cache_bytes == on_cpu.report.cache_bytes == held * RESIDUAL


def test_only_neighbours_that_reuse_alike_keep_one_residual(medium):
    late, early = Reuse(every=3), Reuse(every=2)
    for rules, held in (
        ([Rule(blocks=[0, 2], action=late)], 2),
        ([Rule(blocks=[0, 1], action=late), Rule(blocks=[2], action=early)], 2),
        ([Rule(blocks=[0, 1, 2], action=late), Rule(blocks=[1], action=ScaleText(operand="value", scale=2))], 1),
        ([Rule(blocks=[0, 1, 2], action=late), Rule(blocks=[1], action=ScaleText(operand="input", scale=2))], 3),
    ):
        with apply_policy(medium, policy_for(medium, *rules)) as applied:
            generate(medium)
        assert applied.report.cache_bytes == held * RESIDUAL, rules


def test_neighbours_keep_a_residual_each_where_a_controlnet_adds_between_them(medium):
    """What it adds comes again at each step, so it must not be part of what is reused."""
    model, scheduler = medium.transformer, medium.scheduler
    calls = [
        transformer_inputs(medium) | {"block_controlnet_hidden_states": [torch.full((2, 16, 32), added)] * 4}
        for added in (1.0, -3.0)
    ]
    calls[1]["hidden_states"] = calls[1]["hidden_states"].flip(0)
    with torch.no_grad(), ExitStack() as stack:
        for block in model.transformer_blocks[1:3]:
            stack.enter_context(forward_as(block, reused_at_the_second_call(block)))
        expected = [model(**inputs).sample for inputs in calls]
    policy = policy_for(medium, Rule(blocks=[1, 2], action=Reuse()))
    scheduler.set_timesteps(2)
    with torch.no_grad(), apply_policy(model, policy, scheduler=scheduler) as applied:
        for inputs, t, wanted in zip(calls, scheduler.timesteps, expected, strict=True):
            seen = model(**inputs).sample
            torch.testing.assert_close(seen, wanted)
            scheduler.step(seen, t, inputs["hidden_states"])
        assert applied.report.table[1] == ("compute", "reuse", "reuse", "compute")
        assert applied.report.cache_bytes == 2 * 2 * (16 + 7) * 32 * 4


def reused_at_the_second_call(block):
    compute, kept = block.forward, []

    def forward(hidden_states, encoder_hidden_states, *args, **kwargs):
        before = encoder_hidden_states, hidden_states
        if not kept:
            after = compute(hidden_states, encoder_hidden_states, *args, **kwargs)
            kept[:] = [a - b for a, b in zip(after, before, strict=True)]
            return after
        return tuple(b + r for b, r in zip(before, kept, strict=True))

    return forward
