"""Train the reference model from nothing: python -m blocktune.reference.train

Two stages: the autoencoder on renderings, then transformer and text encoders together on its latents by rectified flow.
Captions are wrong now and then and blocks are dropped at random, so that the model is as real ones are: it does not
trust its text fully (making text louder can help), and it survives the loss of a block.

Everything is seeded. A checkpoint is written every minute, and a second call with the same --work resumes from it.
"""

import argparse
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .pipeline import CLIP_TOKENS, T5_TOKENS, WEIGHTS, new_pipeline
from .scenes import (
    COLORS,
    GROUND,
    KINDS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Request,
    Thing,
    prompt_of,
    render,
    sample_request,
    sample_scene,
)

KIND_SHARES = {"single": 0.08, "colors": 0.12, "counting": 0.2, "two": 0.15, "position": 0.25, "attribution": 0.2}
DROP_BLOCK = 0.08  # stochastic depth (Huang et al. 2016), a block at a time for the whole batch
DROP_CAPTION = 0.1  # empty prompts, for classifier-free guidance
FULL_T5, FULL_T5_TOKENS = 0.02, 256  # share of batches with T5 padded to SD3's default
READINGS = 8  # noisy captions per scene


def misread(request: Request, chance: float, rng: np.random.Generator) -> Request:
    """`request` with every attribute word replaced by a random one with probability `chance`."""

    def maybe(value, choices):
        return value if value is None or rng.random() >= chance else choices[rng.integers(len(choices))]

    things = tuple(
        Thing(
            maybe(t.shape, SHAPES),
            maybe(t.color, list(COLORS)),
            t.count if t.count == 1 else maybe(t.count, list(NUMBERS.values())),
        )
        for t in request.things
    )
    return Request(things, maybe(request.relation, RELATIONS))


def sample_pairs(count: int, rng: np.random.Generator):
    """`count` (request, scene) pairs in the shares of KIND_SHARES."""
    kinds = rng.choice(KINDS, count, p=[KIND_SHARES[k] for k in KINDS])
    requests = [sample_request(str(kind), rng) for kind in kinds]
    return requests, [sample_scene(request, rng) for request in requests]


def save(path: Path, state: dict) -> None:
    """Write a checkpoint whole or not at all."""
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def train_autoencoder(pipe: StableDiffusion3Pipeline, args: argparse.Namespace, progress: Progress) -> None:
    """L1 reconstruction, objects weighted up, with a slight pull of the latents to a normal distribution."""
    path = args.work / "autoencoder.pt"
    vae = pipe.vae.to(args.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95))
    warmup = max(1, args.vae_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1, i / args.vae_steps)))
    )
    done = 0
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done = state["done"]

    def checkpoint() -> None:
        state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        save(path, state | {"done": done})

    bar = progress.add_task("autoencoder", total=args.vae_steps, completed=done, note="")
    saved = time.monotonic()
    while done < args.vae_steps:
        rng = np.random.default_rng((args.seed, 1, done))
        torch.manual_seed(args.seed * 1_000_003 + done)
        pictures = render(sample_pairs(args.vae_batch, rng)[1], device=args.device) * 2 - 1
        posterior = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist
        gap = (vae.decode(posterior.sample()).sample - pictures).abs()
        # objects cover a tenth of a picture: unweighted, their colours are learned last
        ground = pictures.new_tensor(GROUND).view(1, 3, 1, 1) * 2 - 1
        weight = 1 + 9 * ((pictures - ground).abs().amax(1, keepdim=True) > 0.02)
        error = (gap * weight).sum() / weight.expand_as(gap).sum()
        (error + 1e-6 * posterior.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        done += 1
        progress.update(bar, completed=done, note=f"L1 {error.item():.4f}")
        if done % 50 == 0 and not progress.console.is_terminal:
            print(f"autoencoder {done}/{args.vae_steps} L1 {error.item():.4f}", flush=True)
        if time.monotonic() - saved > 60:
            checkpoint()
            saved = time.monotonic()
    checkpoint()
    vae.eval()


@torch.no_grad()
def encode_scenes(pipe: StableDiffusion3Pipeline, args: argparse.Namespace, progress: Progress):
    """The training set: requests and latents `(n, 8, 12, 12)`, normalised by the scale written to the VAE's config."""
    requests, scenes = sample_pairs(args.scenes, np.random.default_rng((args.seed, 2)))
    bar = progress.add_task("latents", total=args.scenes, note="")
    parts = []
    for start in range(0, args.scenes, 500):
        pictures = render(scenes[start : start + 500], device=args.device) * 2 - 1
        parts.append(pipe.vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mode())
        progress.update(bar, completed=start + len(pictures))
    latents = torch.cat(parts)
    shift, scale = latents.mean().item(), 1.0 / latents.std().item()
    pipe.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return requests, (latents - shift) * scale


class Captions:
    """Noisy captions as token ids: few different sentences exist, so each is tokenised once."""

    def __init__(self, pipe: StableDiffusion3Pipeline, requests: list[Request], args: argparse.Namespace):
        rng = np.random.default_rng((args.seed, 4))
        known: dict[str, int] = {"": 0}
        # every scene has as many readings as it may be met with, each wrong in its own way
        self.rows = torch.tensor(
            [
                [known.setdefault(prompt_of(misread(r, args.caption_noise, rng)), len(known)) for _ in range(READINGS)]
                for r in requests
            ],
            device=args.device,
        )  # (scenes, readings), into the tables of token ids
        texts = list(known)
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        self.clip = pipe.tokenizer(texts, max_length=CLIP_TOKENS, **padded).input_ids.to(args.device)
        self.t5 = {
            length: pipe.tokenizer_3(texts, max_length=length, **padded).input_ids.to(args.device)
            for length in (T5_TOKENS, FULL_T5_TOKENS)
        }

    def encode(self, pipe: StableDiffusion3Pipeline, rows: torch.Tensor, length: int):
        """What `pipe.encode_prompt` gives for them: text `(batch, 14 + length, 192)`, pooled `(batch, 192)`."""
        towers = [
            tower(self.clip[rows], output_hidden_states=True) for tower in (pipe.text_encoder, pipe.text_encoder_2)
        ]
        clip = torch.cat([t.hidden_states[-2] for t in towers], dim=-1)
        text = torch.cat([clip, pipe.text_encoder_3(self.t5[length][rows])[0]], dim=1)
        return text, torch.cat([t.text_embeds for t in towers], dim=-1)


def train_transformer(pipe: StableDiffusion3Pipeline, args: argparse.Namespace, progress: Progress) -> None:
    """Rectified flow with logit-normal times (Esser et al. 2024, arXiv 2403.03206), AdamW, averaged weights."""
    path = args.work / "transformer.pt"
    trained = torch.nn.ModuleDict(
        {n: getattr(pipe, n) for n in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")}
    )
    trained.to(args.device).train()
    average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    matrices = [p for p in trained.parameters() if p.ndim >= 2]
    others = [p for p in trained.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    done = 0
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        trained.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    if done < args.steps:
        requests, latents = encode_scenes(pipe, args, progress)
        captions = Captions(pipe, requests, args)
        torch._dynamo.config.recompile_limit = 4 * len(pipe.transformer.transformer_blocks)  # each block compiles alone
        for block in pipe.transformer.transformer_blocks:
            block.compile(dynamic=False)

    def checkpoint() -> None:
        state = {"model": trained.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        save(path, state | {"done": done})

    bar = progress.add_task("transformer", total=args.steps, completed=done, note="")
    saved, losses, falling = time.monotonic(), [], False
    last = len(pipe.transformer.transformer_blocks) - 1
    while done < args.steps:
        rng = np.random.default_rng((args.seed, 3, done))
        torch.manual_seed(args.seed * 1_000_003 + done)
        if args.minutes and not falling and time.monotonic() - args.started > 48 * args.minutes:
            falling = True  # four fifths of the time are gone
            args.steps = min(args.steps, round(1 + done / 0.8))
        # warm up, stay, and fall over the last fifth: a run may be ended early by a smaller --steps
        rate = args.lr * min(1.0, (done + 1) / 200, (args.steps - done) / (0.2 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.from_numpy(rng.integers(len(latents), size=args.batch)).to(args.device)
        chosen = captions.rows[rows, torch.from_numpy(rng.integers(READINGS, size=args.batch)).to(args.device)]
        chosen = torch.where(torch.rand(args.batch, device=chosen.device) < DROP_CAPTION, 0, chosen)
        full = rng.random() < FULL_T5
        # the long form is rare: not worth graphs of its own
        stance = torch.compiler.set_stance("force_eager") if full else nullcontext()
        clean = latents[rows]
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(args.batch, device=clean.device))
        mix = sigma.view(-1, 1, 1, 1)
        with stance, torch.autocast(clean.device.type, torch.bfloat16, enabled=clean.device.type == "cuda"):
            text, pooled = captions.encode(pipe, chosen, FULL_T5_TOKENS if full else T5_TOKENS)
            velocity = pipe.transformer(
                (1 - mix) * clean + mix * noise,
                text,
                pooled,
                sigma * 1000,
                skip_layers=[i for i in range(last) if rng.random() < DROP_BLOCK],
            ).sample
        loss = F.mse_loss(velocity.float(), noise - clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(trained)
        done += 1
        losses.append(loss.detach())
        if done % 20 == 0:
            mean = torch.stack(losses[-200:]).mean().item()
            progress.update(bar, completed=done, note=f"loss {mean:.4f}")
            if done % 100 == 0 and not progress.console.is_terminal:
                print(f"transformer {done}/{args.steps} loss {mean:.4f}", flush=True)
        if time.monotonic() - saved > 60:
            checkpoint()
            saved = time.monotonic()
    checkpoint()
    trained.load_state_dict(average.module.state_dict())
    trained.eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m blocktune.reference.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the pipeline is saved")
    parser.add_argument("--work", type=Path, default=Path("runs/reference-training"), help="checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=100_000, help="training pictures")
    parser.add_argument("--vae-steps", type=int, default=2_000)
    parser.add_argument("--vae-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--caption-noise", type=float, default=0.15, help="chance that an attribute word is wrong")
    parser.add_argument("--minutes", type=float, help="end within so many minutes, with fewer steps if need be")
    args = parser.parse_args()
    args.started = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pipe = new_pipeline()
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, refresh_per_second=0.5) as progress:
        train_autoencoder(pipe, args, progress)
        train_transformer(pipe, args, progress)
    pipe.to("cpu", torch.bfloat16)
    pipe.save_pretrained(str(args.out), safe_serialization=True)
    record = {k: str(v) for k, v in vars(args).items() if k not in ("out", "work", "started")}
    record |= {"seconds": round(time.monotonic() - args.started), "torch": torch.__version__}
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
