"""Train the detector of the reference world: python -m blocktune.reference.train_detector

A Mask2Former (transformers) small enough to ship, that finds the six shapes and a mask of each. The loss is that of its
authors (class, mask and dice after a matching, at every layer of the decoder), but on every pixel of the picture
instead of a sample of points: there are few.

Everything is seeded. A checkpoint is written every minute, and a second call with the same --work resumes from it.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from .degradations import degrade
from .fitting import fit, parser, write_record
from .scenes import MAX_OBJECTS, SHAPES, Object, Request, Thing, sample_scene, tabulate
from .scorers import DETECTOR, PIXELS
from .train_clip import draw_all

DEGRADED = 0.3  # share of pictures that are degraded
CLASS, MASK, DICE = 2.0, 5.0, 5.0  # weights of the loss's parts
NOTHING = 0.2  # weight of a query that has to find nothing
SHARPER = 8.0  # the trained logits of masks are multiplied by that


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
    """Scenes of one to four objects of any shapes and colours."""
    numbers = rng.integers(1, MAX_OBJECTS + 1, count)
    wanted = [Request(tuple(Thing(str(s)) for s in rng.choice(SHAPES, n))) for n in numbers]
    return [sample_scene(request, rng) for request in wanted]


def masks_of(table: torch.Tensor) -> torch.Tensor:
    """Which pixels each object of `tabulate`'s rows covers, bool `(n, MAX_OBJECTS, 48, 48)`."""
    masks = []
    for place in range(MAX_OBJECTS):
        alone = torch.zeros_like(table)
        alone[:, 0, :4] = table[:, place, :4]  # drawn in black
        masks.append(draw_all(alone).float().mean(1) < 128)
    return torch.stack(masks, dim=1)


def match(classes: torch.Tensor, masks: torch.Tensor, labels: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Which query finds each object, `(n, MAX_OBJECTS)`, by the least cost; where there is no object, any.

    Logits `(n, queries, shapes + 1)` and `(n, queries, h, w)`, `labels` `(n, MAX_OBJECTS)` with -1 for none, and
    `true` `(n, MAX_OBJECTS, h, w)`.
    """
    with torch.no_grad():
        likely = classes.softmax(-1).gather(2, labels.clamp(min=0)[:, None].expand(-1, classes.shape[1], -1))
        logits, target = masks.flatten(2), true.flatten(2).float()
        cross = (F.softplus(logits).sum(2)[:, :, None] - logits @ target.mT) / logits.shape[2]
        inside = logits.sigmoid()
        dice = 1 - (2 * inside @ target.mT + 1) / (inside.sum(2)[:, :, None] + target.sum(2)[:, None] + 1)
        costs = (MASK * cross + DICE * dice - CLASS * likely).cpu().numpy()  # (n, queries, MAX_OBJECTS)
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


def train(model: Any, args: argparse.Namespace) -> int:
    """Train `model` in place; gives the number of steps that were done."""
    from transformers import Mask2FormerImageProcessor

    device, began = args.device, time.monotonic()
    processor = Mask2FormerImageProcessor()
    table = tabulate(make_scenes(args.scenes, np.random.default_rng((args.seed, 6))))
    pictures, masks = draw_all(table).to(device), masks_of(table).to(device)
    labels = torch.where(table[:, :, 2] > 0, table[:, :, 3].long(), -1).to(device)
    print(f"{len(pictures)} pictures, {time.monotonic() - began:.0f} s", flush=True)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    model.train()

    def loss_of_step(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(pictures), (args.batch,), generator=generator, device=device)
        clean = pictures[rows].float() / 255
        faulty = degrade(clean, torch.rand(args.batch, generator=generator, device=device), generator)
        chosen = torch.rand(args.batch, 1, 1, 1, generator=generator, device=device) < DEGRADED
        seen = F.interpolate(torch.where(chosen, faulty, clean), (PIXELS, PIXELS), mode="bilinear")
        output = model((seen - mean) / std, output_auxiliary_logits=True)
        answers = [(a["class_queries_logits"], a["masks_queries_logits"]) for a in output.auxiliary_logits]
        answers.append((output.class_queries_logits, output.masks_queries_logits))
        layers = [loss_of(named, drawn, labels[rows], masks[rows]) for named, drawn in answers]
        return torch.stack(layers).sum(), layers[-1]

    return fit(model, "detector", loss_of_step, args)


def sharpen(model: Any) -> None:
    """Make masks surer by SHARPER, in place; which pixels they hold stays, for that is told by the sign.

    GenEval counts an object above 0.9 of class times mean mask probability. Objects are few pixels here, of which the
    rim is a large share and never sure, so that a right answer would not count.
    """
    embedder = model.model.transformer_module.decoder.mask_predictor.mask_embedder
    last = [layer for layer in embedder.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(SHARPER)
        last.bias.mul_(SHARPER)


def main() -> None:
    options = parser("train_detector", __doc__, scenes=20_000, batch=64, lr=1e-3)
    options.add_argument("--out", type=Path, default=DETECTOR, help="where the model is saved")
    args = options.parse_args()
    from transformers import Mask2FormerImageProcessor

    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = new_detector().to(args.device)
    started = time.monotonic()
    steps = train(model, args)
    sharpen(model)
    model.eval().half().cpu().save_pretrained(args.out)
    edges = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    Mask2FormerImageProcessor(size=edges).save_pretrained(args.out)
    write_record(args, steps, time.monotonic() - started)


if __name__ == "__main__":
    main()
