"""T2I-CompBench's evaluators: models of transformers and open_clip see, the rules of `t2i_compbench` score.

`t2i_attribute` (colour, shape, texture), `t2i_spatial`, `t2i_3d_spatial`, `t2i_numeracy`, `t2i_non_spatial` and
`t2i_complex` score any prompt by the rule of one category. A picture that is not `sane` scores 0. The original detects
with UniDet, which no library carries on: here it is OWLv2, told which words to look for, so that numbers of the three
detected categories are of the benchmark's style and not its own. BLIP, DPT and CLIP are the original's.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from . import t2i_compbench as rules
from .clip_model import ClipModel
from .detection import Detection, OpenDetector
from .evaluator import Images, check_lengths
from .phrases import phrases_of
from .pictures import batches, sane_pictures
from .pretrained import load_pretrained

OWL = "google/owlv2-base-patch16-ensemble"
BLIP = "Salesforce/blip-vqa-base"
DPT = "Intel/dpt-hybrid-midas"
CLIP = "ViT-B-32-quickgelu/openai"


class BlipVqa:
    """P(yes) of a yes-or-no question by a BLIP VQA checkpoint, hub id or path, at 480 x 480 pixels.

    Of the first word of the answer alone: p(yes) / (p(yes) + p(no)). A question begins with BLIP's own token for
    encoding, not with BERT's, and is cut at 35 tokens.
    """

    def __init__(self, checkpoint: str | Path = BLIP, size: int = 480, batch: int = 8):
        self.checkpoint = str(checkpoint)
        self.size = size
        self.batch = batch

    @cached_property
    def _loaded(self) -> tuple[Any, Any, torch.device]:
        return load_pretrained("BlipForQuestionAnswering", "BlipProcessor", self.checkpoint)

    @torch.inference_mode()
    def yes(self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[float]]:
        """Per picture, one probability per question."""
        model, processor, device = self._loaded
        words = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
        answers = [[0.0] * len(asked) for asked in questions]
        size = {"height": self.size, "width": self.size}
        for start in range(0, len(pictures), self.batch):
            pixels = processor.image_processor(pictures[start : start + self.batch], size=size, return_tensors="pt")
            seen = model.vision_model(pixels.pixel_values.to(device), interpolate_pos_encoding=True).last_hidden_state
            for rows in self._of_one_length(questions[start : start + self.batch]):
                states = seen[[picture for picture, _, _ in rows]]  # (rows, patches, dim)
                logits = self._answer(states, torch.tensor([ids for _, _, ids in rows], device=device))
                likely = logits[:, words].softmax(-1)[:, 0].tolist()
                for (picture, question, _), p in zip(rows, likely, strict=True):
                    answers[start + picture][question] = p
        return answers

    def _of_one_length(self, questions: Sequence[Sequence[str]]) -> list[list[tuple[int, int, list[int]]]]:
        """(picture, question, tokens) in groups of as many tokens each.

        None is padded: the answer would hear the padding, which transformers 5.23 does not mask from it.
        """
        model, processor, _ = self._loaded
        groups: dict[int, list[tuple[int, int, list[int]]]] = {}
        for picture, asked in enumerate(questions):
            for number, question in enumerate(asked):
                ids = processor.tokenizer(question, truncation=True, max_length=35).input_ids
                ids[0] = model.config.text_config.vocab_size - 1  # [ENC], the last that BLIP adds to BERT's vocabulary
                groups.setdefault(len(ids), []).append((picture, number, ids))
        return list(groups.values())

    def _answer(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the first word `(rows, vocabulary)`; pictures are `(rows, patches, dim)`, ids `(rows, tokens)`."""
        model = self._loaded[0]
        encoded = model.text_encoder(input_ids=ids, encoder_hidden_states=states).last_hidden_state
        begin = torch.full((len(ids), 1), model.config.text_config.bos_token_id, device=ids.device)
        return model.text_decoder(input_ids=begin, encoder_hidden_states=encoded).logits[:, 0]


class DepthEstimator:
    """Depth by a DPT checkpoint, hub id or path, at 480 x 480 pixels: larger where nearer, as MiDaS says it."""

    def __init__(self, checkpoint: str | Path = DPT, size: int = 480, batch: int = 8):
        self.checkpoint = str(checkpoint)
        self.size = size
        self.batch = batch

    @cached_property
    def _loaded(self) -> tuple[Any, Any, torch.device]:
        return load_pretrained("DPTForDepthEstimation", "AutoImageProcessor", self.checkpoint)

    @torch.inference_mode()
    def depths(self, pictures: Sequence[Image.Image]) -> list[np.ndarray]:
        """Per picture `(h, w)` of the rules' frame, in [0, 1] over the picture, in steps of 1 / 255 as there."""
        model, processor, device = self._loaded
        # the hybrid stretches its positions to any size, but refuses all that are not said here
        model.dpt.embeddings.image_size = (self.size, self.size)
        found: list[np.ndarray] = [np.empty((0, 0))] * len(pictures)
        size = {"height": self.size, "width": self.size}
        for indices in batches(pictures, self.batch):
            images = [pictures[i] for i in indices]
            pixels = processor(images, size=size, keep_aspect_ratio=False, return_tensors="pt").pixel_values
            for i, depth in zip(indices, model(pixels.to(device)).predicted_depth, strict=True):
                span = depth.max() - depth.min()
                depth = (depth - depth.min()) / span if span > 0 else torch.zeros_like(depth)
                width, height = pictures[i].size
                full = torch.nn.functional.interpolate(
                    depth[None, None], (height, width), mode="bilinear", align_corners=True
                )[0, 0]
                grey = Image.fromarray((255 * full.cpu().numpy()).astype(np.uint8))
                scale = rules.frame_scale(width, height)
                found[i] = np.asarray(grey.resize((round(width * scale), round(height * scale)), 2), np.float64) / 255
        return found


class _Rule(ABC):
    """One category: its rule over sane pictures."""

    name: str
    direction: Literal["maximize", "minimize"] = "maximize"
    needs_reference = False

    def score(self, images: Images, prompts: Sequence[str], reference: Images | None = None) -> np.ndarray:
        """float64 `(n,)` in [0, 1]; CLIP's cosines in [-1, 1]."""
        check_lengths(images, prompts, reference)
        pictures = {i: picture for i, picture in enumerate(sane_pictures(images)) if picture is not None}
        scores = np.zeros(len(prompts))
        if pictures:
            scores[list(pictures)] = self.of_sane(list(pictures.values()), [prompts[i] for i in pictures])
        return scores

    @abstractmethod
    def of_sane(self, pictures: list[Image.Image], prompts: list[str]) -> Sequence[float] | np.ndarray:
        """One score per picture."""


class Attribute(_Rule):
    """Evaluator `t2i_attribute`: how surely BLIP-VQA sees every noun phrase. A prompt without scores 1."""

    name = "t2i_attribute"

    def __init__(self, blip: str | Path = BLIP):
        self.blip = BlipVqa(blip)

    def of_sane(self, pictures: list[Image.Image], prompts: list[str]) -> list[float]:
        asked = [rules.questions(phrases_of(prompt)) for prompt in prompts]
        return [rules.attribute(probabilities) for probabilities in self.blip.yes(pictures, asked)]


class _Detected(_Rule):
    def __init__(self, detector: str | Path = OWL):
        self.detector = OpenDetector(detector)

    def in_frame(self, pictures: list[Image.Image], words: list[list[str]]) -> list[list[Detection]]:
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

    def of_sane(self, pictures: list[Image.Image], prompts: list[str]) -> list[float]:
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

    def of_sane(self, pictures: list[Image.Image], prompts: list[str]) -> list[float]:
        ends = [rules.ends_of(phrases_of(prompt)) for prompt in prompts]
        found = self.in_frame(pictures, [list(dict.fromkeys(pair or ())) for pair in ends])
        relations = [rules.relation_of(prompt, rules.RELATIONS_3D) for prompt in prompts]
        asked = zip(relations, ends, found, self.depth.depths(pictures), strict=True)
        return [rules.spatial_3d(relation, pair, seen, depth) for relation, pair, seen, depth in asked]


class Numeracy(_Detected):
    """Evaluator `t2i_numeracy`: every object there, and as many as asked for."""

    name = "t2i_numeracy"

    def of_sane(self, pictures: list[Image.Image], prompts: list[str]) -> list[float]:
        asked = [rules.counted(phrases_of(prompt).words) for prompt in prompts]
        found = self.in_frame(pictures, [rules.names_of(counted) for counted in asked])
        return [rules.numeracy(counted, seen) for counted, seen in zip(asked, found, strict=True)]


class NonSpatial(_Rule):
    """Evaluator `t2i_non_spatial`: CLIP's cosine of picture and prompt."""

    name = "t2i_non_spatial"

    def __init__(self, clip: str | Path = CLIP):
        self.clip = ClipModel(clip)

    def of_sane(self, pictures: list[Image.Image], prompts: list[str]) -> np.ndarray:
        return (self.clip.of_pictures(pictures) * self.clip.of_texts(prompts)).sum(axis=1)


class Complex(_Rule):
    """Evaluator `t2i_complex`: 3-in-1, of attributes, relation and CLIP without adjectives.

    `spatial_list` and `action_list` are the benchmark's complex_val_spatial.txt and complex_val_action.txt; a prompt of
    neither counts all three.
    """

    name = "t2i_complex"

    def __init__(
        self,
        blip: str | Path = BLIP,
        detector: str | Path = OWL,
        clip: str | Path = CLIP,
        spatial_list: str | Path | None = None,
        action_list: str | Path | None = None,
    ):
        self.attribute = Attribute(blip)
        self.spatial = Spatial(detector, complex_prompts=True)
        self.clip = NonSpatial(clip)
        lists = {"action": action_list, "spatial": spatial_list}  # spatial is asked first, so it is written last
        self.lists = {text: name for name, path in lists.items() if path for text in _sentences(path)}

    def of_sane(self, pictures: list[Image.Image], prompts: list[str]) -> list[float]:
        actions = self.clip.of_sane(pictures, [rules.without_adjectives(phrases_of(prompt)) for prompt in prompts])
        scores = zip(
            self.attribute.of_sane(pictures, prompts), self.spatial.of_sane(pictures, prompts), actions, strict=True
        )
        lists = [self.lists.get(_sentence(prompt)) for prompt in prompts]
        return [rules.three_in_one(*three, listed) for three, listed in zip(scores, lists, strict=True)]


def _sentences(path: str | Path) -> list[str]:
    return [_sentence(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _sentence(text: str) -> str:
    """Lower case, up to its first full stop: how the benchmark looks a prompt up."""
    return text.strip().split(".")[0].lower()
