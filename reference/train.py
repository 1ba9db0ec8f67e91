"""Train the reference model from nothing: python -m blocktune.reference.train

Two stages: the autoencoder on renderings, then transformer and text encoders together on its latents by rectified flow.
Captions are wrong now and then and blocks are dropped at random, so that the model is as real ones are: it does not
trust its text fully (making text louder can help), and it survives the loss of a block.

Everything is seeded. A checkpoint is written every minute, and a second call with the same --work resumes from it.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .pipeline import CLIP_TOKENS, T5_TOKENS, WEIGHTS, new_pipeline
from .scenes import (
    COLORS,
    GROUND,
    KINDS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Object,
    Request,
    Thing,
    draw,
    prompt_of,
    sample_request,
    sample_scene,
    tabulate,
)

KIND_SHARES = {"single": 0.14, "colors": 0.1, "counting": 0.17, "two": 0.13, "position": 0.26, "attribution": 0.2}
DROP_BLOCK = 0.08  # stochastic depth (Huang et al. 2016), a picture at a time
DROP_CAPTION = 0.1  # empty prompts, for classifier-free guidance
FULL_T5, FULL_T5_TOKENS = 0.04, 256  # share of batches with T5 padded to SD3's default
READINGS = 8  # noisy captions per scene
AVERAGE = 0.999  # of the weights that are saved, a step
T = TypeVar("T")
CHUNK = 5_000  # scenes made by one process at a time


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


def sample_pairs(count: int, rng: np.random.Generator) -> tuple[list[Request], list[list[Object]]]:
    """`count` requests and scenes that fulfil them, in the shares of KIND_SHARES."""
    kinds = rng.choice(KINDS, count, p=[KIND_SHARES[k] for k in KINDS])
    requests = [sample_request(str(kind), rng) for kind in kinds]
    return requests, [sample_scene(request, rng) for request in requests]


def make_chunk(chunk: int, size: int, seed: int, noise: float) -> tuple[np.ndarray, list[list[str]]]:
    """`size` scenes, as `tabulate` has them, and READINGS noisy captions of each."""
    rng = np.random.default_rng((seed, 2, chunk))
    requests, scenes = sample_pairs(size, rng)
    # every scene has as many readings as it may be met with, each wrong in its own way
    return tabulate(scenes).numpy(), [[prompt_of(misread(r, noise, rng)) for _ in range(READINGS)] for r in requests]


def on_all_cores(make: Callable[[int], T], chunks: int) -> Iterator[T]:
    """What `make` gives for each number of a chunk, in their order; one alone is made in this process."""
    if chunks == 1:
        yield make(0)
        return
    # spawned, not forked: the parent may hold a CUDA context
    with multiprocessing.get_context("spawn").Pool(min(chunks, os.cpu_count() or 1)) as pool:
        yield from pool.imap(make, range(chunks))


def make_scenes(args: argparse.Namespace, progress: Progress) -> tuple[torch.Tensor, list[list[str]]]:
    """The training set: scenes `(n, MAX_OBJECTS, 7)` on the device, and their captions."""
    chunks = math.ceil(args.scenes / CHUNK)
    bar = progress.add_task("scenes", total=chunks, note="")
    tables, captions = [], []
    make = partial(make_chunk, size=min(CHUNK, args.scenes), seed=args.seed, noise=args.caption_noise)
    for table, texts in on_all_cores(make, chunks):
        tables.append(torch.from_numpy(table))
        captions += texts
        progress.advance(bar)
    return torch.cat(tables)[: args.scenes].to(args.device), captions[: args.scenes]


class Checkpoint:
    """What a stage has reached: the state of its parts, and how many steps are done. Written whole or not at all."""

    def __init__(self, path: Path, device: str, **parts: Any):
        self.path, self.parts, self.done, self._before = path, parts, 0, 0.0
        self._began = self._saved = time.monotonic()
        if path.exists():
            state = torch.load(path, map_location=device, weights_only=True)
            self.done, self._before = state.pop("done"), state.pop("seconds", 0.0)
            for name, value in state.items():
                parts[name].load_state_dict(value)

    @property
    def seconds(self) -> float:
        """Since it was begun, in this process and those before it."""
        return self._before + time.monotonic() - self._began

    def save(self, every: float = 0.0) -> None:
        """Write it, if the last time is `every` seconds ago."""
        if time.monotonic() - self._saved < every:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(state | {"done": self.done, "seconds": self.seconds}, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)
        self._saved = time.monotonic()


def captured(step: Callable[[], torch.Tensor], device: str) -> Callable[[], torch.Tensor]:
    """`step` as one CUDA graph; on a CPU as it is.

    A step of these small networks is a few thousand kernels of microseconds each, and launching them one by one takes
    many times longer than running them. Warms up with three real calls.
    """
    if not device.startswith("cuda"):
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):  # where gradients were first accumulated
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay


def optimizer_of(module: torch.nn.Module, rate: torch.Tensor, **options: Any) -> torch.optim.AdamW:
    """AdamW whose learning rate is the tensor `rate`, so that a captured step reads what it is at the time."""
    capturable = rate.device.type == "cuda"
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    others = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.01, fused=True, capturable=capturable, **options)


def train(
    name: str,
    steps: dict[str, Callable[[], torch.Tensor]],
    choose: Callable[[np.random.Generator], str],
    schedule: Callable[[int], float],
    total: Callable[[int], int],
    rate: torch.Tensor,
    checkpoint: Checkpoint,
    args: argparse.Namespace,
    progress: Progress,
) -> None:
    """Call one of `steps` until `total(done)` are done.

    Each returns its loss; which one is called, and its random numbers, follow from seed and number of the step alone.
    """
    for group in checkpoint.parts["optimizer"].param_groups:
        group["lr"] = rate  # loading a state has given each group a rate of its own
    bar = progress.add_task(name, total=total(checkpoint.done), completed=checkpoint.done, note="")
    ready: dict[str, Callable[[], torch.Tensor]] = {}
    losses: list[torch.Tensor] = []
    while checkpoint.done < total(checkpoint.done):
        chosen = choose(np.random.default_rng((args.seed, 3, checkpoint.done)))
        if chosen not in ready:
            rate.zero_()
            ready[chosen] = captured(steps[chosen], args.device)
        rate.fill_(schedule(checkpoint.done))
        torch.manual_seed(args.seed * 1_000_003 + checkpoint.done)
        losses.append(ready[chosen]().detach().clone())
        checkpoint.done += 1
        if checkpoint.done % 20 == 0:
            losses = losses[-200:]
            mean = torch.stack(losses).mean().item()
            progress.update(bar, total=total(checkpoint.done), completed=checkpoint.done, note=f"loss {mean:.4f}")
            if checkpoint.done % 500 == 0 and not progress.console.is_terminal:
                seconds = time.monotonic() - args.started
                print(
                    f"{seconds:5.0f} s  {name} {checkpoint.done}/{total(checkpoint.done)}  loss {mean:.4f}", flush=True
                )
            checkpoint.save(every=60)
    checkpoint.save()


def train_autoencoder(
    pipe: StableDiffusion3Pipeline, scenes: torch.Tensor, args: argparse.Namespace, progress: Progress
) -> None:
    """L1 reconstruction, objects weighted up, with a slight pull of the latents to a normal distribution."""
    vae = pipe.vae.to(args.device, memory_format=torch.channels_last).train()
    rate = torch.zeros((), device=args.device)
    optimizer = optimizer_of(vae, rate, betas=(0.9, 0.95))
    checkpoint = Checkpoint(args.work / "autoencoder.pt", args.device, model=vae, optimizer=optimizer)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        rows = torch.randint(len(scenes), (args.vae_batch,), device=args.device)
        pictures = draw(scenes[rows]) * 2 - 1
        posterior = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist
        gap = (vae.decode(posterior.sample()).sample - pictures).abs()
        # objects cover a tenth of a picture: unweighted, their colours are learned last
        ground = torch.stack([torch.full_like(pictures[:, 0], 2 * level - 1) for level in GROUND], dim=1)
        weight = 1 + 9 * ((pictures - ground).abs().amax(1, keepdim=True) > 0.02)
        error = (gap * weight).sum() / weight.expand_as(gap).sum()
        (error + 1e-6 * posterior.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return error

    def schedule(done: int) -> float:
        warm = min(1.0, (done + 1) / max(1, args.vae_steps // 20))
        return 2e-3 * warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, done / args.vae_steps)))

    total = lambda done: args.vae_steps  # noqa: E731
    train("autoencoder", {"": step}, lambda rng: "", schedule, total, rate, checkpoint, args, progress)
    vae.eval()


@torch.no_grad()
def encode_scenes(pipe: StableDiffusion3Pipeline, scenes: torch.Tensor) -> torch.Tensor:
    """Latents `(n, 8, 12, 12)`, normalised by the scale that is written to the VAE's config."""
    pictures = (draw(part) * 2 - 1 for part in scenes.split(1000))
    latents = torch.cat(
        [pipe.vae.encode(p.contiguous(memory_format=torch.channels_last)).latent_dist.mode() for p in pictures]
    )
    shift, scale = latents.mean().item(), 1.0 / latents.std().item()
    pipe.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (latents - shift) * scale


class Captions:
    """Noisy captions as token ids: few different sentences exist, so each is tokenised once."""

    def __init__(self, pipe: StableDiffusion3Pipeline, texts: list[list[str]], device: str):
        known: dict[str, int] = {"": 0}
        # (scenes, readings), into the tables of token ids
        self.rows = torch.tensor([[known.setdefault(t, len(known)) for t in readings] for readings in texts]).to(device)
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        self.clip = pipe.tokenizer(list(known), max_length=CLIP_TOKENS, **padded).input_ids.to(device)
        self.t5 = {
            length: pipe.tokenizer_3(list(known), max_length=length, **padded).input_ids.to(device)
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


def drop_block(block: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward hook of a joint block: for some pictures of the batch, its outputs (text, image) are its inputs."""
    text, image = output
    kept = torch.rand(len(image), 1, 1, device=image.device) >= DROP_BLOCK
    return torch.where(kept, text, kwargs["encoder_hidden_states"]), torch.where(kept, image, kwargs["hidden_states"])


def train_transformer(
    pipe: StableDiffusion3Pipeline,
    scenes: torch.Tensor,
    texts: list[list[str]],
    args: argparse.Namespace,
    progress: Progress,
) -> None:
    """Rectified flow with logit-normal times (Esser et al. 2024, arXiv 2403.03206), AdamW, averaged weights."""
    trained = torch.nn.ModuleDict(
        {n: getattr(pipe, n) for n in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")}
    )
    trained.to(args.device).train()
    average = copy.deepcopy(trained).requires_grad_(False)
    rate = torch.zeros((), device=args.device)
    optimizer = optimizer_of(trained, rate, betas=(0.9, 0.98))
    checkpoint = Checkpoint(
        args.work / "transformer.pt", args.device, model=trained, average=average, optimizer=optimizer
    )
    parameters, averaged = tuple(trained.parameters()), tuple(average.parameters())
    latents = encode_scenes(pipe, scenes)
    captions = Captions(pipe, texts, args.device)
    on_gpu = args.device.startswith("cuda")
    blocks = pipe.transformer.transformer_blocks
    for block in blocks[:-1]:  # the last one returns no text
        block.register_forward_hook(drop_block, with_kwargs=True)
    if on_gpu:
        torch._dynamo.config.recompile_limit = 4 * len(blocks)  # each compiles alone, for either length of text
        for block in blocks:
            block.compile(dynamic=False)

    def step(length: int) -> torch.Tensor:
        optimizer.zero_grad()
        rows = torch.randint(len(latents), (args.batch,), device=args.device)
        readings = captions.rows[rows, torch.randint(READINGS, (args.batch,), device=args.device)]
        readings = readings * (torch.rand(args.batch, device=args.device) >= DROP_CAPTION)  # 0 is the empty prompt
        clean = latents[rows]
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(args.batch, device=args.device))
        mix = sigma.view(-1, 1, 1, 1)
        with torch.autocast("cuda" if on_gpu else "cpu", torch.bfloat16, enabled=on_gpu):
            text, pooled = captions.encode(pipe, readings, length)
            velocity = pipe.transformer((1 - mix) * clean + mix * noise, text, pooled, sigma * 1000).sample
        loss = F.mse_loss(velocity.float(), noise - clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - AVERAGE)
        return loss

    # warm up, stay, and fall over the last fifth; where that begins, the clock may decide
    state = {"total": args.steps}

    def total(done: int) -> int:
        if args.minutes and state["total"] == args.steps and time.monotonic() - args.started > 48 * args.minutes:
            state["total"] = min(args.steps, round(1 + done / 0.8))
        return state["total"]

    def schedule(done: int) -> float:
        return args.lr * min(1.0, (done + 1) / 500, (state["total"] - done) / (0.2 * state["total"]))

    train(
        "transformer",
        {"short": partial(step, T5_TOKENS), "long": partial(step, FULL_T5_TOKENS)},
        lambda rng: "long" if rng.random() < FULL_T5 else "short",
        schedule,
        total,
        rate,
        checkpoint,
        args,
        progress,
    )
    args.steps = checkpoint.done
    trained.load_state_dict(average.state_dict())
    trained.eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m blocktune.reference.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the pipeline is saved")
    parser.add_argument("--work", type=Path, default=Path("runs/reference-training"), help="checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=400_000, help="training pictures")
    parser.add_argument("--vae-steps", type=int, default=5_000)
    parser.add_argument("--vae-batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=26_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--caption-noise", type=float, default=0.1, help="chance that an attribute word is wrong")
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
        scenes, texts = make_scenes(args, progress)
        train_autoencoder(pipe, scenes, args, progress)
        train_transformer(pipe, scenes, texts, args, progress)
    pipe.to("cpu", torch.bfloat16)
    pipe.save_pretrained(str(args.out), safe_serialization=True)
    record = {k: str(v) for k, v in vars(args).items() if k not in ("out", "work", "started")}
    record |= {"seconds": round(time.monotonic() - args.started), "torch": torch.__version__}
    if args.device.startswith("cuda"):
        record["gpu"] = torch.cuda.get_device_name()
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
