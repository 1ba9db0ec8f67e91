"""T2I-CompBench's evaluators: models of transformers and open_clip see, the rules of `t2i_compbench` score.

`t2i_attribute` (colour, shape, texture), `t2i_spatial`, `t2i_3d_spatial`, `t2i_numeracy`, `t2i_non_spatial` and
`t2i_complex` score any prompt by the rule of one category. A picture that is not `sane` scores 0. The original detects
with UniDet, which no library carries on: here it is OWLv2, told which words to look for, so that numbers of the three
detected categories are of the benchmark's style and not its own. BLIP, DPT and CLIP are the original's.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import t2i_compbench as rules
from .batches import each_in_batches
from .checkpoints import device, load_pretrained, load_processor
from .clip import check_clip, load_clip
from .detection import Detection, OpenDetector
from .model_score import PictureScore
from .phrases import phrases_of
from .vqa import ask

OWL = "google/owlv2-base-patch16-ensemble"
BLIP = "Salesforce/blip-vqa-base"
DPT = "Intel/dpt-hybrid-midas"
CLIP = "ViT-B-32/openai"
PIXELS = 480  # of a side, as BLIP and DPT see pictures there


class DepthEstimator:
    """Depth by a DPT checkpoint, hub id or path, at 480 x 480 pixels: larger where nearer, as MiDaS says it."""

    def __init__(self, checkpoint: str | Path = DPT, pixels: int = PIXELS, batch: int = 8):
        self.checkpoint = str(checkpoint)
        self.pixels = pixels
        self.batch = batch

    def depths(self, pictures: Sequence[Image.Image]) -> list[np.ndarray]:
        """Per picture `(h, w)` of the rules' frame, in [0, 1] over the picture, in steps of 1 / 255 as there."""
        from transformers import AutoImageProcessor, DPTForDepthEstimation

        # the deepest layer has nothing before it to add, and so no weights for that in any checkpoint
        unused = ("neck.fusion_stage.layers.0.residual_layer1.",)
        model = load_pretrained(DPTForDepthEstimation, self.checkpoint, torch.float32, unused)
        processor = load_processor(AutoImageProcessor, self.checkpoint)
        size = {"height": self.pixels, "width": self.pixels}

        def depths_of(batch: Sequence[Image.Image]) -> list[np.ndarray]:
            # the hybrid stretches its positions to any size, but refuses all that are not said here
            model.dpt.embeddings.image_size = (self.pixels, self.pixels)
            pixels = processor(list(batch), size=size, keep_aspect_ratio=False, return_tensors="pt").pixel_values
            depths = model(pixels.to(device())).predicted_depth  # (batch, pixels, pixels)
            return [_in_frame(depth, picture.size) for depth, picture in zip(depths, batch, strict=True)]

        return each_in_batches(depths_of, pictures, self.batch)


def _in_frame(depth: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    span = depth.max() - depth.min()
    depth = (depth - depth.min()) / span if span > 0 else torch.zeros_like(depth)
    width, height = size
    full = torch.nn.functional.interpolate(depth[None, None], (height, width), mode="bilinear", align_corners=True)
    grey = Image.fromarray((255 * full[0, 0].cpu().numpy()).astype(np.uint8))
    scale = rules.frame_scale(width, height)
    return np.asarray(grey.resize((round(width * scale), round(height * scale)), 2), np.float64) / 255


class _Rule(PictureScore):
    """One category: its rule over sane pictures, in [0, 1]; CLIP's cosines in [-1, 1]."""

    worst = 0.0


class Attribute(_Rule):
    """Evaluator `t2i_attribute`: how surely BLIP-VQA sees every noun phrase. A prompt without scores 1."""

    name = "t2i_attribute"

    def __init__(self, blip: str = BLIP, pixels: int = PIXELS):
        self.blip = blip
        self.pixels = pixels

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        asked = [rules.questions(phrases_of(prompt)) for prompt in prompts]
        answers = ask(self.blip, pictures, asked, self.pixels)
        return [rules.attribute(answer.tolist()) for answer in answers]


class _Detected(_Rule):
    def __init__(self, detector: str | Path = OWL):
        self.detector = OpenDetector(detector)

    def in_frame(self, pictures: Sequence[Image.Image], words: list[list[str]]) -> list[list[Detection]]:
        """What is found of `words`, boxes in the rules' frame."""
        found = self.detector.detect(pictures, words)
        scales = [rules.frame_scale(*picture.size) for picture in pictures]
        return [[detection.scaled(scale) for detection in seen] for seen, scale in zip(found, scales, strict=True)]


class Spatial(_Detected):
    """Evaluator `t2i_spatial`: left, right, top, bottom of, next to."""

    name = "t2i_spatial"

    def __init__(self, detector: str | Path = OWL, complex_prompts: bool = False):
        super().__init__(detector)
        self.ends = rules.ends_around if complex_prompts else rules.ends_of

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        ends = [self.ends(phrases_of(prompt)) for prompt in prompts]
        found = self.in_frame(pictures, [list(dict.fromkeys(pair or ())) for pair in ends])
        asked = zip(prompts, ends, found, strict=True)
        return [rules.spatial(rules.relation_of(prompt), pair, seen) for prompt, pair, seen in asked]


class Spatial3d(_Detected):
    """Evaluator `t2i_3d_spatial`: in front of, behind, hidden by."""

    name = "t2i_3d_spatial"

    def __init__(self, detector: str | Path = OWL, depth: str | Path = DPT):
        super().__init__(detector)
        self.depth = DepthEstimator(depth)

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        ends = [rules.ends_of(phrases_of(prompt)) for prompt in prompts]
        found = self.in_frame(pictures, [list(dict.fromkeys(pair or ())) for pair in ends])
        relations = [rules.relation_of(prompt, rules.RELATIONS_3D) for prompt in prompts]
        asked = zip(relations, ends, found, self.depth.depths(pictures), strict=True)
        return [rules.spatial_3d(relation, pair, seen, depth) for relation, pair, seen, depth in asked]


class Numeracy(_Detected):
    """Evaluator `t2i_numeracy`: every object there, and as many as asked for."""

    name = "t2i_numeracy"

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        asked = [rules.counted(phrases_of(prompt).words) for prompt in prompts]
        found = self.in_frame(pictures, [rules.names_of(counted) for counted in asked])
        return [rules.numeracy(counted, seen) for counted, seen in zip(asked, found, strict=True)]


class NonSpatial(_Rule):
    """Evaluator `t2i_non_spatial`: CLIP's cosine of picture and prompt."""

    name = "t2i_non_spatial"
    scale = 0.4  # as that of clip_score

    def __init__(self, clip: str = CLIP):
        check_clip(clip)
        self.clip = clip

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return load_clip(self.clip).cosines(pictures, prompts).double().numpy()


class Complex(_Rule):
    """Evaluator `t2i_complex`: 3-in-1, of attributes, relation and CLIP without adjectives.

    `spatial_list` and `action_list` are the benchmark's complex_val_spatial.txt and complex_val_action.txt; a prompt of
    neither counts all three.
    """

    name = "t2i_complex"

    def __init__(
        self,
        blip: str = BLIP,
        detector: str | Path = OWL,
        clip: str = CLIP,
        spatial_list: str | Path | None = None,
        action_list: str | Path | None = None,
    ):
        self.attribute = Attribute(blip)
        self.spatial = Spatial(detector, complex_prompts=True)
        self.clip = NonSpatial(clip)
        lists = {"action": action_list, "spatial": spatial_list}  # spatial is asked first, so it is written last
        self.lists = {text: name for name, path in lists.items() if path for text in _sentences(path)}

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        actions = self.clip.judge(pictures, [rules.without_adjectives(phrases_of(prompt)) for prompt in prompts])
        scores = zip(
            self.attribute.judge(pictures, prompts), self.spatial.judge(pictures, prompts), actions, strict=True
        )
        lists = [self.lists.get(_sentence(prompt)) for prompt in prompts]
        return [rules.three_in_one(*three, listed) for three, listed in zip(scores, lists, strict=True)]


def _sentences(path: str | Path) -> list[str]:
    return [_sentence(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _sentence(text: str) -> str:
    """Lower case, up to its first full stop: how the benchmark looks a prompt up."""
    return text.strip().split(".")[0].lower()
