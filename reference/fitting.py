"""What the trainers of learned scores share: their options, the loop of their steps, and the record beside the weights.

The rate warms up over 100 steps and falls to nothing as a cosine, by steps or by the clock, whichever is further.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .train import Checkpoint, optimizer_of

WARM = 100  # steps


def parser(module: str, description: str | None, *, scenes: int, batch: int, lr: float) -> argparse.ArgumentParser:
    """Options of a trainer and their defaults; `--out` and what is its own it adds itself."""
    name = module.removeprefix("train_")
    parser = argparse.ArgumentParser(prog=f"python -m blocktune.reference.{module}", description=description)
    parser.add_argument("--work", type=Path, default=Path(f"runs/{name}-training"), help="checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=scenes, help="training pictures")
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--minutes", type=float, help="end within so many minutes, with fewer steps if need be")
    return parser


def fit(
    model: Any,
    name: str,
    loss_of_step: Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]],
    args: argparse.Namespace,
) -> Checkpoint:
    """Train `model` in place from where its checkpoint `name` in `args.work` stands, and give that of the end.

    `loss_of_step` draws its batch by the generator it is given, which depends on seed and step alone, and gives the
    loss and what of it is told.
    """
    rate = torch.zeros((), device=args.device)
    optimizer = optimizer_of(model, rate, betas=(0.9, 0.98))
    checkpoint = Checkpoint(args.work / f"{name}.pt", args.device, model=model, optimizer=optimizer)
    for group in optimizer.param_groups:
        group["lr"] = rate  # loading a state has given each group a rate of its own
    started, first = time.monotonic(), checkpoint.done
    losses: list[float] = []
    while True:
        spent = (time.monotonic() - started) / (60 * args.minutes) if args.minutes else 0.0
        done = max(checkpoint.done / args.steps, spent)
        if done >= 1:
            break
        rate.fill_(args.lr * min(1.0, (checkpoint.done + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * done)))
        generator = torch.Generator(args.device).manual_seed(args.seed * 1_000_003 + checkpoint.done)
        loss, told = loss_of_step(generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        checkpoint.done += 1
        losses.append(told.item())
        if checkpoint.done % 50 == 0:
            seconds = time.monotonic() - started
            pace = seconds / (checkpoint.done - first)
            mean_loss = np.mean(losses[-50:])
            print(f"{seconds:5.0f} s  step {checkpoint.done}  loss {mean_loss:.3f}  {pace:.2f} s/step", flush=True)
        checkpoint.save(every=60)
    checkpoint.save()
    return checkpoint


def write_record(args: argparse.Namespace, reached: Checkpoint, **more: Any) -> None:
    """`training.json` beside the weights; `more` is what only one trainer has."""
    record = {"steps": reached.done, "batch": args.batch, "lr": args.lr, "scenes": args.scenes, "seed": args.seed}
    record |= more | {"device": args.device, "seconds": round(reached.seconds), "torch": torch.__version__}
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"saved {args.out}", flush=True)
