"""Random Mask2Former checkpoints, in the format of the published ones."""

from collections.abc import Sequence
from pathlib import Path

import torch
from blocktune.evaluators.template import CLASSES
from torch import nn

from .checkpoints import DTYPES, Size


def mask2former(folder: Path, size: Size = "tiny", labels: Sequence[str] = CLASSES) -> str:
    """Instances of `labels`, COCO's when not given; `full` is the Swin-S for COCO.

    Each query is sure of a class of its own, in turn, on about half of any picture. With the 100 queries of `full`
    every class is found once or twice wherever it is looked for, so that whatever follows on detections has its work.
    """
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    sizes = {}  # the defaults are those of Swin-S and of the authors' COCO configuration
    if size == "tiny":
        backbone = SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        sizes = {
            "backbone_config": backbone,
            "num_queries": 12,
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 16,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "dim_feedforward": 16,
            "num_attention_heads": 2,
        }
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**names, **sizes)).eval()
    model.to(model.class_predictor.weight.device)  # some are made by torch.Tensor(…), on the CPU whatever the context
    with torch.no_grad():
        for weight in model.model.transformer_module.decoder.layers.parameters():
            if weight.ndim > 1:  # so that a query is itself, whatever the picture
                weight.mul_(0.1)
        _fit_classes(model, len(labels))
    model.to(DTYPES[size]).save_pretrained(folder)
    Mask2FormerImageProcessor().save_pretrained(folder)
    return str(folder)


def _fit_classes(model: nn.Module, labels: int) -> None:
    """Give the query `i` the class `i % labels`, by least squares of what the queries are on one picture."""
    head, states = model.class_predictor, []
    listening = head.register_forward_pre_hook(lambda _, given: states.append(given[0][0]))  # (queries, dim)
    model(torch.randn(1, 3, 64, 64))
    listening.remove()
    wanted = torch.eye(labels, labels + 1).repeat(len(states[-1]) // labels + 1, 1)[: len(states[-1])]
    head.weight.copy_(20 * (torch.linalg.pinv(states[-1]) @ wanted).T)  # (labels + 1, dim)
    head.bias.zero_()
