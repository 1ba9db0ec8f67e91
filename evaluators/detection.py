"""Objects found in pictures: what a detection is, and the two detectors that benchmarks' rules are fed by.

`InstanceDetector`: fixed classes, a mask each (Mask2Former). `OpenDetector`: boxes of whatever words ask for (OWLv2).
Both load when first used, compute in float32 also on a GPU, and never pad a picture to another's size.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .batches import each_in_batches, of_equal_size
from .checkpoints import device, load_pretrained, load_processor
from .template import CLASSES

# spellings of COCO's classes in checkpoints, by GenEval's names
_ALIASES = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
}


@dataclass(frozen=True)
class Detection:
    """`box` is (x0, y0, x1, y1) in pixels, `score` in [0, 1]; the mask, where there is one, is bool `(h, w)`."""

    label: str
    box: tuple[float, float, float, float]
    score: float
    color: str | None = None
    mask: np.ndarray | None = field(default=None, repr=False, compare=False)

    def scaled(self, scale: float) -> "Detection":
        """The same in a picture `scale` times as large, without its mask."""
        x0, y0, x1, y1 = self.box
        return Detection(self.label, (x0 * scale, y0 * scale, x1 * scale, y1 * scale), self.score, self.color)


class InstanceDetector:
    """A Mask2Former checkpoint, hub id or path, with the test-time settings of its authors' COCO configuration.

    Shortest edge 800, longest 1333; the 100 best pairs of query and class; a score is class probability times the mean
    probability inside of the mask; a box is the mask's. No suppression of overlaps. The original pads sides to a
    multiple of 32, transformers stretches them: 800 x 800 needs neither.
    """

    def __init__(self, checkpoint: str | Path, shortest: int = 800, longest: int = 1333, batch: int = 4):
        self.checkpoint = str(checkpoint)
        self.size = {"shortest_edge": shortest, "longest_edge": longest}
        self.batch = batch

    @cached_property
    def model(self) -> Any:
        from transformers import Mask2FormerForUniversalSegmentation

        # the loss's weights, of training alone
        return load_pretrained(
            Mask2FormerForUniversalSegmentation, self.checkpoint, torch.float32, unused=("criterion.",)
        )

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes in the checkpoint's order, COCO's by GenEval's spelling."""
        names: dict[int, str] = self.model.config.id2label
        return tuple(_ALIASES.get(names[i], names[i]) for i in range(len(names)))

    def is_swin_s_of_coco(self) -> bool:
        """Whether the checkpoint has the architecture and as many classes as GenEval's detector."""
        backbone = self.model.config.backbone_config
        shape = getattr(backbone, "embed_dim", None), list(getattr(backbone, "depths", ()))
        return shape == (96, [2, 2, 18, 2]) and len(self.labels) == len(CLASSES)

    def detect(self, pictures: Sequence[Image.Image], wanted: Sequence[AbstractSet[str]]) -> list[list[Detection]]:
        """Per picture, all detections of the classes `wanted` there, whatever their score."""
        from transformers import AutoImageProcessor

        model, processor = self.model, load_processor(AutoImageProcessor, self.checkpoint)

        def found_in(indices: Sequence[int]) -> list[list[Detection]]:
            images = [pictures[i] for i in indices]
            pixels = processor(
                images, size=self.size, size_divisor=32, do_resize=True, return_tensors="pt"
            ).pixel_values
            output = model(pixels.to(device()))
            queries = zip(indices, output.class_queries_logits, output.masks_queries_logits, strict=True)
            return [self._read(classes, masks, pictures[i].size, wanted[i]) for i, classes, masks in queries]

        found: list[list[Detection]] = [[] for _ in pictures]
        for group in of_equal_size(pictures):
            for i, detections in zip(group, each_in_batches(found_in, group, self.batch), strict=True):
                found[i] = detections
        return found

    def _read(
        self, classes: torch.Tensor, masks: torch.Tensor, size: tuple[int, int], wanted: AbstractSet[str]
    ) -> list[Detection]:
        """Logits `(queries, classes + 1)` and `(queries, h / 4, w / 4)` of one picture of `size` (width, height)."""
        probabilities = classes.softmax(-1)[:, :-1]
        best, pairs = probabilities.flatten().topk(min(100, probabilities.numel()))
        detections = []
        for probability, pair in zip(best.tolist(), pairs.tolist(), strict=True):
            query, label = divmod(pair, probabilities.shape[1])
            if self.labels[label] not in wanted:
                continue
            logits = torch.nn.functional.interpolate(masks[query, None, None], size[::-1], mode="bilinear")[0, 0]
            mask = logits > 0
            if mask.any():
                ys, xs = mask.any(1).nonzero(), mask.any(0).nonzero()
                box = (xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1)
                score = probability * logits.sigmoid()[mask].mean().item()
                detections.append(Detection(self.labels[label], box, score, mask=mask.cpu().numpy()))
        return detections


class OpenDetector:
    """An OWLv2 checkpoint, hub id or path: boxes for words, `a photo of a <word>` each, scored above `threshold`.

    A box belongs to the likeliest of a picture's words. Overlaps are not suppressed.
    """

    def __init__(self, checkpoint: str | Path, threshold: float = 0.2, batch: int = 4):
        self.checkpoint = str(checkpoint)
        self.threshold = threshold
        self.batch = batch

    def detect(self, pictures: Sequence[Image.Image], wanted: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Per picture, detections of the words `wanted` there, best first."""
        from transformers import Owlv2ForObjectDetection, Owlv2Processor

        model = load_pretrained(Owlv2ForObjectDetection, self.checkpoint, torch.float32)
        processor = load_processor(Owlv2Processor, self.checkpoint)
        length = model.config.text_config.max_position_embeddings

        def found_in(indices: Sequence[int]) -> list[list[Detection]]:
            words = max(len(wanted[i]) for i in indices)
            texts = [f"a photo of a {word}" for i in indices for word in [*wanted[i], *[""] * (words - len(wanted[i]))]]
            tokens = processor.tokenizer(
                texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            )
            # a square each, so that pictures of any size stand in one batch
            pixels = processor.image_processor([pictures[i] for i in indices], return_tensors="pt").pixel_values
            output = model(
                input_ids=tokens.input_ids.to(device()),
                attention_mask=tokens.attention_mask.to(device()),
                pixel_values=pixels.to(device()),
            )
            boxes = zip(indices, output.logits, output.pred_boxes, strict=True)
            return [self._read(logits[:, : len(wanted[i])], b, pictures[i].size, wanted[i]) for i, logits, b in boxes]

        asked = [i for i in range(len(pictures)) if wanted[i]]
        found: list[list[Detection]] = [[] for _ in pictures]
        for i, detections in zip(asked, each_in_batches(found_in, asked, self.batch), strict=True):
            found[i] = detections
        return found

    def _read(
        self, logits: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], wanted: Sequence[str]
    ) -> list[Detection]:
        """`(boxes, words)` and `(boxes, 4)`: centre, width, height in parts of the longer side of `size`."""
        best, words = logits.max(-1)
        scores = best.sigmoid()
        centers, sides = boxes.split(2, dim=-1)
        corners = torch.cat([centers - sides / 2, centers + sides / 2], dim=-1) * max(size)
        corners = corners.clamp(min=0).minimum(corners.new_tensor([*size, *size]))  # the square has a margin
        order = [i for i in scores.argsort(descending=True, stable=True).tolist() if scores[i] > self.threshold]
        return [
            Detection(wanted[int(words[i])], tuple(corners[i].tolist()), scores[i].item())  # pyright: ignore[reportArgumentType]
            for i in order
        ]
