"""Train the detector of the reference world: python -m blocktune.reference.train_detector

A Mask2Former (transformers) small enough to ship, that finds the six shapes and a mask of each. The loss is that of its
authors (class, mask and dice after a matching, at every layer of the decoder), but on every pixel of the picture
instead of a sample of points: there are few. It learns from renderings, and from pictures like those it judges, which
the bundled pipeline makes; what the exact judge finds in either is what it has to find.

`weights/detector/training.json` tells how the one that ships was made: first from renderings alone, then on with
`--start weights/detector --scenes 6000 --generated 4096 --batch 32 --lr 5e-4 --steps 3000`.

Everything is seeded. A checkpoint is written every minute, and a second call with the same --work resumes from it.
"""

import argparse
import json
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from scipy.optimize import linear_sum_assignment

from ..evaluators import Prompt
from ..policies import BlockPolicy, Rule, Skip, apply_policy
from .card import pictures
from .degradations import degrade
from .fitting import fit, parser, write_record
from .judge import find_objects
from .pipeline import SAMPLING, load_pipeline
from .prompts import prompts
from .scenes import GAP, MAX_OBJECTS, SHAPES, Object, Request, Thing, sample_scene, tabulate
from .scorers import DETECTOR, PIXELS
from .train import Checkpoint
from .train_clip import draw_all

DEGRADED = 0.3  # share of pictures that are degraded
CLASS, MASK, DICE = 2.0, 5.0, 5.0  # weights of the loss's parts
NOTHING = 0.2  # weight of a query that has to find nothing
CROWDED, CLOSEST = 0.5, 4.0  # share of scenes whose objects may touch, by up to so many pixels
PLACES = 8  # objects that a picture may hold
TOGETHER = 64  # pictures generated at once
FIRST_SEED = 4_000_000  # of generated pictures; no split of prompts has such
SHARPER, SURER = 8.0, 2.0  # the trained logits of masks, and of classes, are multiplied by that


def new_detector() -> Any:
    """0.9 M parameters: a residual network of four stages, a layer of deformable attention, three of the decoder."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],  # pyright: ignore[reportCallIssue]  (of a mixin)
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_queries=12,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=128,
        encoder_layers=1,
        decoder_layers=4,
        dim_feedforward=128,
        num_attention_heads=4,
        id2label=dict(enumerate(SHAPES)),
        label2id={shape: i for i, shape in enumerate(SHAPES)},
    )
    return Mask2FormerForUniversalSegmentation(config)


def make_scenes(count: int, rng: np.random.Generator) -> list[list[Object]]:
    """Scenes of one to four objects of any shapes and colours; in CROWDED of them objects may touch."""
    numbers = rng.integers(1, MAX_OBJECTS + 1, count)
    wanted = [Request(tuple(Thing(str(s)) for s in rng.choice(SHAPES, n))) for n in numbers]
    gaps = np.where(rng.random(count) < CROWDED, rng.uniform(-CLOSEST, 0, count), GAP)
    return [sample_scene(request, rng, gap) for request, gap in zip(wanted, gaps, strict=True)]


def choose_prompts(count: int, seed: int) -> list[Prompt]:
    """Of the search split, with seeds that no split has; every other one is to count, which goes wrong most."""
    rng, asked = np.random.default_rng((seed, 7)), prompts("search")
    counting = [prompt for prompt in asked if prompt.kind == "counting"]
    drawn = [pool[rng.integers(len(pool))] for _, pool in zip(range(count), cycle((asked, counting)), strict=False)]
    return [replace(prompt, seed=FIRST_SEED + 100_000 * seed + n) for n, prompt in enumerate(drawn)]


def generate(count: int, seed: int, device: str) -> np.ndarray:
    """What the bundled pipeline makes of `choose_prompts`, uint8 `(count, 48, 48, 3)`.

    Every other batch lacks a block and half of the steps, as the pictures do that a search has to judge.
    """
    pipe, chosen = load_pipeline(device, torch.bfloat16), choose_prompts(count, seed)
    few, blocks = SAMPLING["num_inference_steps"] // 2, len(pipe.transformer.transformer_blocks)
    parts = []
    for batch, start in enumerate(track(range(0, count, TOGETHER), "generating")):
        rows = chosen[start : start + TOGETHER]
        if batch % 2:
            rules = [Rule(blocks=(batch // 2 % blocks,), action=Skip())]
            with apply_policy(pipe, BlockPolicy.for_model(pipe, "without one", rules)):
                parts.append(pictures(pipe, rows, num_inference_steps=few))
        else:
            parts.append(pictures(pipe, rows))
    return np.concatenate(parts)


def find_all(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What the exact judge sees in pictures, uint8 `(n, h, w, 3)`: the objects that have a shape, PLACES at most.

    Whose each pixel is, uint8 `(n, h, w)`, 0 where nobody's and 1 where the first object's; and the objects' shapes,
    int64 `(n, PLACES)`, -1 where there is no object.
    """
    owners = np.zeros(images.shape[:3], np.uint8)
    labels = np.full((len(images), PLACES), -1)
    for image, owner, label in zip(images, owners, labels, strict=True):
        shaped = [found for found in find_objects(image / 255) if found.shape]
        for place, found in enumerate(shaped[:PLACES]):
            x0, y0, x1, y1 = found.box
            owner[y0:y1, x0:x1][found.mask] = place + 1
            label[place] = SHAPES.index(found.shape)
    return torch.from_numpy(owners), torch.from_numpy(labels)


def match(classes: torch.Tensor, masks: torch.Tensor, labels: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Which query finds each object, `(n, PLACES)`, by the least cost; where there is no object, any.

    Logits `(n, queries, shapes + 1)` and `(n, queries, h, w)`, `labels` `(n, PLACES)` with -1 for none, and
    `true` `(n, PLACES, h, w)`.
    """
    with torch.no_grad():
        likely = classes.softmax(-1).gather(2, labels.clamp(min=0)[:, None].expand(-1, classes.shape[1], -1))
        logits, target = masks.flatten(2), true.flatten(2).float()
        cross = (F.softplus(logits).sum(2)[:, :, None] - logits @ target.mT) / logits.shape[2]
        inside = logits.sigmoid()
        dice = 1 - (2 * inside @ target.mT + 1) / (inside.sum(2)[:, :, None] + target.sum(2)[:, None] + 1)
        costs = (MASK * cross + DICE * dice - CLASS * likely).cpu().numpy()  # (n, queries, PLACES)
        counts = (labels >= 0).sum(1).tolist()
    chosen = np.zeros(labels.shape, np.int64)
    for row, cost, count in zip(chosen, costs, counts, strict=True):
        queries, objects = linear_sum_assignment(cost[:, :count])
        row[objects] = queries
    return torch.from_numpy(chosen).to(labels.device)


def loss_of(classes: torch.Tensor, masks: torch.Tensor, labels: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Of one layer's answer; as for `match`, with `true` at the size of the picture."""
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    small = F.adaptive_avg_pool2d(true.float(), (masks.shape[2], masks.shape[3]))
    chosen, there = match(classes, masks, labels, small), labels >= 0
    wanted = torch.full(classes.shape[:2], len(SHAPES), device=labels.device)
    wanted[rows.expand_as(chosen)[there], chosen[there]] = labels[there]
    weight = torch.ones(len(SHAPES) + 1, device=labels.device)
    weight[-1] = NOTHING
    named = F.cross_entropy(classes.flatten(0, 1), wanted.flatten(), weight)
    logits = F.interpolate(masks[rows, chosen], true.shape[-2:], mode="bilinear")[there]  # (objects, h, w)
    target = true[there].float()
    cross = F.binary_cross_entropy_with_logits(logits, target)
    inside = logits.sigmoid()
    dice = 1 - (2 * (inside * target).sum((1, 2)) + 1) / (inside.sum((1, 2)) + target.sum((1, 2)) + 1)
    return CLASS * named + MASK * cross + DICE * dice.mean()


def train(model: Any, args: argparse.Namespace) -> Checkpoint:
    """Train `model` in place, and give the checkpoint of the end."""
    from transformers import Mask2FormerImageProcessor

    device, began = args.device, time.monotonic()
    processor = Mask2FormerImageProcessor()
    scenes = make_scenes(args.scenes, np.random.default_rng((args.seed, 6)))
    images = draw_all(tabulate(scenes)).permute(0, 2, 3, 1).numpy()
    if args.generated:
        kept = args.work / f"generated-{args.generated}-{args.seed}.npy"
        if not kept.exists():
            np.save(kept, generate(args.generated, args.seed, device))
        images = np.concatenate([images, np.load(kept)])
    owners, labels = (found.to(device) for found in find_all(images))
    shown = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
    places = torch.arange(1, PLACES + 1, dtype=torch.uint8, device=device).view(1, -1, 1, 1)
    print(f"{len(shown)} pictures, {time.monotonic() - began:.0f} s", flush=True)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    model.train()

    def loss_of_step(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(shown), (args.batch,), generator=generator, device=device)
        clean, masks = shown[rows].float() / 255, owners[rows, None] == places
        faulty = degrade(clean, torch.rand(args.batch, generator=generator, device=device), generator)
        chosen = torch.rand(args.batch, 1, 1, 1, generator=generator, device=device) < DEGRADED
        seen = torch.where(chosen, faulty, clean)
        mirrored = torch.rand(args.batch, 1, 1, 1, generator=generator, device=device) < 0.5  # as every shape may be
        seen, masks = torch.where(mirrored, seen.flip(3), seen), torch.where(mirrored, masks.flip(3), masks)
        seen = F.interpolate(seen, (PIXELS, PIXELS), mode="bilinear")
        output = model((seen - mean) / std, output_auxiliary_logits=True)
        answers = [(a["class_queries_logits"], a["masks_queries_logits"]) for a in output.auxiliary_logits]
        answers.append((output.class_queries_logits, output.masks_queries_logits))
        layers = [loss_of(named, drawn, labels[rows], masks) for named, drawn in answers]
        return torch.stack(layers).sum(), layers[-1]

    return fit(model, "detector", loss_of_step, args)


def sharpen(model: Any, masks: float, classes: float) -> None:
    """Multiply the logits of masks and of classes, in place; which pixels and which class they hold stays.

    GenEval counts an object above 0.9 of class times mean mask probability. Objects are few pixels here, of which the
    rim is a large share and never sure, and rare shapes are not sure either, so that a right answer would not count.
    """
    embedder = model.model.transformer_module.decoder.mask_predictor.mask_embedder
    last = [layer for layer in embedder.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        for layer, by in ((last, masks), (model.class_predictor, classes)):
            layer.weight.mul_(by)
            layer.bias.mul_(by)


def main() -> None:
    options = parser("train_detector", __doc__, scenes=20_000, batch=64, lr=1e-3)
    options.add_argument("--out", type=Path, default=DETECTOR, help="where the model is saved")
    options.add_argument("--generated", type=int, default=4096, help="training pictures of the bundled pipeline")
    options.add_argument("--start", type=Path, help="a trained detector to go on from")
    args = options.parse_args()
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    more: dict[str, Any] = {"generated": args.generated}
    if args.start:
        more["start"] = json.loads((args.start / "training.json").read_text())
        model = Mask2FormerForUniversalSegmentation.from_pretrained(args.start, dtype=torch.float32)
        sharpen(model, 1 / SHARPER, 1)  # how sure of classes, it soon learns anew
    else:
        model = new_detector()
    reached = train(model.to(args.device), args)
    sharpen(model, SHARPER, SURER)
    model.eval().half().cpu().save_pretrained(args.out)
    edges = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    Mask2FormerImageProcessor(size=edges).save_pretrained(args.out)
    write_record(args, reached, **more)


if __name__ == "__main__":
    main()
