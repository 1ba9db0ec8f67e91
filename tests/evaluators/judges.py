"""The benchmarks' judges on detectors, CLIP and BLIP of a few thousand random weights, in the formats of the real ones.

Written once per process to a temporary folder. Random detectors see everything everywhere: what the rules do with
detections is tested on detections written by hand.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from string import ascii_lowercase

import torch
from blocktune.evaluators.compositional_judge import Compositional
from blocktune.evaluators.detection import InstanceDetector
from blocktune.evaluators.geneval import GenEval, GenEvalBinary
from blocktune.evaluators.t2i_evaluators import (
    Attribute,
    Complex,
    DepthEstimator,
    NonSpatial,
    Numeracy,
    Spatial,
    Spatial3d,
)

from . import checkpoints, detectors

CLASSES = ("circle", "square", "cross", "ring", "diamond", "triangle", "motorbike", "keyboard")


@cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="tiny-checkpoints-"))
    atexit.register(shutil.rmtree, path)
    return path


@cache
def mask2former() -> Path:
    return Path(detectors.mask2former(folder() / "mask2former", labels=CLASSES))


@cache
def owlv2() -> Path:
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
    tokens = ["!", *letters, "<|startoftext|>", "<|endoftext|>"]  # OWLv2 pads by the first, and reads at the last
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": 0}
    config = Owlv2Config(
        text_config={**sizes, **ids, "vocab_size": len(tokens), "max_position_embeddings": 32},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = Owlv2ForObjectDetection(config)
    with torch.no_grad():
        model.class_head.logit_shift.weight.mul_(40)  # so that some boxes pass a threshold
    model.save_pretrained(folder() / "owlv2")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="!", model_max_length=32)
    images = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    Owlv2Processor(images, tokenizer).save_pretrained(folder() / "owlv2")
    return folder() / "owlv2"


@cache
def blip() -> str:
    return checkpoints.blip(folder() / "blip")


@cache
def dpt() -> Path:
    """Of the hybrid kind, as the benchmark's."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(0)
    backbone = {
        "model_type": "bit",
        "global_padding": "same",
        "layer_type": "bottleneck",
        "depths": [1, 1, 1],
        "hidden_sizes": [8, 16, 32],
        "embedding_size": 32,
        "num_groups": 2,
        "out_features": ["stage1", "stage2", "stage3"],
        "embedding_dynamic_padding": True,
    }
    config = DPTConfig(
        is_hybrid=True,
        backbone_config=backbone,
        backbone_featmap_shape=[1, 32, 2, 2],
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_ignore_stages=[0, 1],
        neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=8,
        readout_type="project",
    )
    DPTForDepthEstimation(config).save_pretrained(folder() / "dpt")
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder() / "dpt")
    return folder() / "dpt"


@cache
def clip() -> str:
    return checkpoints.clip(folder() / "clip")


def _geneval(kind: type[GenEval]) -> GenEval:
    made = kind(detector=mask2former(), clip=clip())
    made.detector = InstanceDetector(mask2former(), shortest=64, longest=96)  # pictures of the tests are small
    return made


def _compositional() -> Compositional:
    made = Compositional(mask2former(), clip(), blip())
    made.geneval, made.attribute = _geneval(GenEval), _attribute()
    return made


def _attribute() -> Attribute:
    return Attribute(blip(), pixels=64)


def _spatial_3d() -> Spatial3d:
    made = Spatial3d(owlv2(), dpt())
    made.depth = DepthEstimator(dpt(), pixels=64)
    return made


def _complex() -> Complex:
    made = Complex(blip(), owlv2(), clip())
    made.attribute = _attribute()
    return made


TINY: dict[str, Callable] = {
    "compositional": cache(_compositional),
    "geneval-style": cache(lambda: _geneval(GenEval)),
    "geneval-style_binary": cache(lambda: _geneval(GenEvalBinary)),
    "t2i_attribute": cache(_attribute),
    "t2i_spatial": cache(lambda: Spatial(owlv2())),
    "t2i_3d_spatial": cache(_spatial_3d),
    "t2i_numeracy": cache(lambda: Numeracy(owlv2())),
    "t2i_non_spatial": cache(lambda: NonSpatial(clip())),
    "t2i_complex": cache(_complex),
}
