"""Random checkpoints of every kind that the scores load, written in the formats of the published ones.

`tiny` ones answer in milliseconds on a CPU, and where a CLIP is asked for it is the reference world's, trained; `full`
ones have the sizes of the published models, whose speed does not depend on the values of their weights. They are in
half precision, and made on a GPU under `with torch.device("cuda")`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Literal

import torch
from blocktune.evaluators.compositional import prompts
from blocktune.reference.scorers import CLIP
from torch import nn

Size = Literal["tiny", "full"]
DTYPES: dict[Size, torch.dtype] = {"tiny": torch.float32, "full": torch.bfloat16}  # as written; loading casts them
WORDS = ["yes", "no", "Yes", "No", "red", "blue", "circle", "square", "figure", "show", "answer"]
CHAT = (
    "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def every(folder: Path, size: Size = "tiny") -> dict[str, Callable[[], str]]:
    """For every family, what writes a checkpoint and gives the score's name, the smallest models first.

    `vqa_score` stands there twice, by kind of model.
    """
    dim = 768 if size == "full" else 96

    def backbone() -> str:
        return clip(folder / "clip", size) if size == "full" else CLIP

    return {
        "lpips": lambda: f"lpips:{lpips(folder / 'lpips')}",
        "dinov2": lambda: f"dinov2:{dinov2(folder / 'dinov2', size)}",
        "clip_iqa": lambda: f"clip_iqa:{resnet_clip(folder / 'resnet', size)}",
        "vqa_score blip": lambda: f"vqa_score:{blip(folder / 'blip', size)}",
        "clip_score": lambda: f"clip_score:{backbone()}",
        "siglip_score": lambda: f"siglip_score:{clip(folder / 'siglip', size, init_logit_bias=-4.0)}",
        "aesthetic_v1": lambda: f"aesthetic_v1:{aesthetic_v1(folder / 'v1.pth', dim)} with {backbone()}",
        "aesthetic_v2": lambda: f"aesthetic_v2:{aesthetic_v2(folder / 'v2.pth', dim)} with {backbone()}",
        "image_reward": lambda: f"image_reward:{image_reward(folder / 'image_reward', size)}",
        "pick_score": lambda: f"pick_score:{pick_score(folder / 'pick_score', size)}",
        "hps_v2.1": lambda: f"hps_v2.1:{hps(folder / 'hps') if size == 'full' else CLIP}",
        "vqa_score": lambda: f"vqa_score:{qwen(folder / 'qwen', size)}",
        "vqa_attributes": lambda: (
            f"vqa_attributes:{qwen(folder / 'qwen', size)} with {questions(folder / 'questions.jsonl')}"
        ),
    }


def write_clip(folder: Path, size: Size, vision: dict[str, Any], text: dict[str, Any], dim: int, **model: Any) -> str:
    """A folder as open_clip's hub repositories have it: `local-dir:FOLDER`; one that is there is taken as it is."""
    from open_clip import CLIP

    if folder.exists():
        return f"local-dir:{folder}"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text, **model}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(CLIP(**config).to(DTYPES[size]).state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def clip(folder: Path, size: Size = "tiny", **model: Any) -> str:
    """A vision transformer; `quick_gelu` and `init_logit_bias` are the model's."""
    if size == "full":  # ViT-L-14
        vision, text = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}, {"width": 768, "heads": 12}
        text |= {"layers": 12, "vocab_size": 49408, "context_length": 77}
        return write_clip(folder, size, vision, text, 768, **model)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    return write_clip(folder, size, vision, text, 16, **model)


def hps(folder: Path) -> str:
    """ViT-H-14."""
    vision = {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14}
    text = {"width": 1024, "heads": 16, "layers": 24, "vocab_size": 49408, "context_length": 77}
    return write_clip(folder, "full", vision, text, 1024)


def resnet_clip(folder: Path, size: Size = "tiny") -> str:
    text = {"context_length": 77, "vocab_size": 49408, "layers": 2 if size == "tiny" else 12}
    if size == "full":  # RN50
        vision = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64}
        return write_clip(folder, size, vision, {**text, "width": 512, "heads": 8}, 1024, quick_gelu=True)
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    return write_clip(folder, size, vision, {**text, "width": 16, "heads": 2}, 16, quick_gelu=True)


def aesthetic_v1(file: Path, dim: int = 96) -> str:
    torch.manual_seed(1)
    torch.save(nn.Linear(dim, 1).state_dict(), file)
    return str(file)


def aesthetic_mlp(dim: int) -> nn.Sequential:
    """The published predictor's layers; dropout has no weights, so the linear ones are 0, 2, 4, 6 and 7."""
    torch.manual_seed(2)
    drop = nn.Dropout
    wide, middle = [nn.Linear(dim, 1024), drop(0.2), nn.Linear(1024, 128), drop(0.2)], [nn.Linear(128, 64), drop(0.1)]
    return nn.Sequential(*wide, *middle, nn.Linear(64, 16), nn.Linear(16, 1)).eval()


def aesthetic_v2(file: Path, dim: int = 96) -> str:
    torch.save({f"layers.{key}": value for key, value in aesthetic_mlp(dim).state_dict().items()}, file)
    return str(file)


def lpips(folder: Path) -> str:
    """Heads as the lpips package has them, AlexNet as torchvision has it; there is one size."""
    from torchvision.models import alexnet

    folder.mkdir(parents=True)
    torch.manual_seed(3)
    widths = [64, 192, 384, 256, 256]
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    torch.save(heads, folder / "alex.pth")
    features = alexnet().features.state_dict()
    torch.save({f"features.{key}": value for key, value in features.items()}, folder / "alexnet.pth")
    return f"{folder / 'alex.pth'} with {folder / 'alexnet.pth'}"


def inception(file: Path) -> str:
    """As the weights of FID's Inception are published: torchvision's network of 1008 classes; there is one size."""
    from torchvision.models import inception_v3

    torch.manual_seed(9)
    model = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # pictures are heard to the end
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    torch.save(model.state_dict(), file)
    return str(file)


def _clip_tokenizer():
    from transformers import CLIPTokenizer

    letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], model_max_length=77)


def pick_score(folder: Path, size: Size = "tiny") -> str:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    torch.manual_seed(4)
    if size == "full":  # CLIP ViT-H-14
        vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision, pixels, dim = {**vision, "patch_size": 14, "image_size": 224}, 224, 1024
    else:
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision, pixels, dim = {**vision, "patch_size": 8, "image_size": 32}, 32, 16
    text |= {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)
    CLIPModel(config).to(DTYPES[size]).save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
    )
    CLIPProcessor(image_processor, _clip_tokenizer()).save_pretrained(folder)
    return str(folder)


def dinov2(folder: Path, size: Size = "tiny") -> str:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(5)
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    config = Dinov2Config(**({} if size == "full" else tiny))  # the defaults are those of dinov2-base, but for its grid
    Dinov2Model(config).to(DTYPES[size]).save_pretrained(folder)
    resized, cropped = (256, 224) if size == "full" else (36, 32)
    BitImageProcessorPil(
        size={"shortest_edge": resized}, crop_size={"height": cropped, "width": cropped}
    ).save_pretrained(folder)
    return str(folder)


def image_reward(folder: Path, size: Size = "tiny") -> str:
    """One file in the names of the authors' BLIP, as ImageReward.pt is, and a folder of a tokenizer."""
    from timm.models import VisionTransformer
    from transformers import BlipTextConfig, BlipTextModel

    folder.mkdir(parents=True)
    torch.manual_seed(8)
    pixels, patch, wide, deep, dim, layers = (224, 16, 1024, 24, 768, 12) if size == "full" else (32, 8, 128, 2, 64, 2)
    vision = VisionTransformer(pixels, patch, embed_dim=wide, depth=deep, num_heads=wide // 64, num_classes=0)
    text = BlipTextModel(
        BlipTextConfig(
            hidden_size=dim,
            encoder_hidden_size=wide,
            intermediate_size=4 * dim,
            num_hidden_layers=layers,
            num_attention_heads=dim // 64,
        ),
        add_pooling_layer=False,
    )
    with torch.no_grad():
        for parameter in text.encoder.parameters():  # the default is too small for a picture to be heard
            parameter.mul_(5)
    modules = {"blip.visual_encoder": vision, "blip.text_encoder": text, "mlp.layers": aesthetic_mlp(dim)}
    state = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.to(DTYPES[size]).state_dict().items()
    }
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    state["blip.vision_proj.weight"] = torch.zeros(256, wide)  # not used
    torch.save(state, folder / "ImageReward.pt")
    _bert_tokenizer(size).save_pretrained(folder / "bert")
    return f"{folder / 'ImageReward.pt'} with {folder / 'bert'}"


def _bert_tokenizer(size: Size = "tiny"):
    """Words of `full` are those of the shipped prompts: questions on them are as long as in BERT's own tokens."""
    from transformers import BertTokenizer

    words = {word for prompt in prompts("search") for word in prompt.text.split()} if size == "full" else set()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", '"', ".", ",", *WORDS, *ascii_lowercase]
    vocabulary += [f"##{letter}" for letter in ascii_lowercase]
    vocabulary += sorted(words - {*vocabulary})
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=64)


def blip(folder: Path, size: Size = "tiny") -> str:
    from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessorPil, BlipProcessor

    torch.manual_seed(6)
    tokenizer = _bert_tokenizer(size)
    # BLIP adds [DEC], with which an answer begins, and [ENC], with which a question does
    words = {"vocab_size": len(tokenizer) + 2, "bos_token_id": len(tokenizer)} if size == "tiny" else {}
    text = words | {"sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    pixels, vision = 384, {"image_size": 384}  # the defaults are those of BLIP-VQA base
    if size == "tiny":
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        text |= shape | {"encoder_hidden_size": 32, "max_position_embeddings": 64}
        wide = {"initializer_range": 0.2}  # pictures are heard, which the default of 1e-10 of theirs keeps silent
        text |= wide
        pixels, vision = 32, shape | wide | {"image_size": 32, "patch_size": 8}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)).to(DTYPES[size])
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": pixels, "width": pixels}), tokenizer).save_pretrained(folder)
    return str(folder)


def qwen(folder: Path, size: Size = "tiny") -> str:
    from tokenizers import pre_tokenizers
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2TokenizerFast,
        Qwen2VLImageProcessorPil,
        Qwen2VLVideoProcessor,
    )

    torch.manual_seed(7)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    merges, pieces = [], []
    for word in ("yes", "no", "Yes", "No"):
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
            pieces.append(word[: end + 1])
    vocabulary = [*alphabet, *dict.fromkeys(pieces), *special]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Qwen2TokenizerFast(vocab={t: i for t, i in ids.items() if t not in special}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    text = {"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    text |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    if size == "full":  # Qwen2.5-VL-3B
        text |= {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
        text |= {"num_key_value_heads": 2, "vocab_size": 151936}
        text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048}
        vision |= {"fullatt_block_indexes": [7, 15, 23, 31]}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    Qwen2_5_VLForConditionalGeneration(config).to(DTYPES[size]).save_pretrained(folder)
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT
    ).save_pretrained(folder)
    return str(folder)


def questions(file: Path) -> str:
    """Questions on the prompts of the conformance suite, some with several."""
    records = [
        {"prompt": "a photo of a red circle", "colors": {"circle": "red"}},
        {"prompt": "a photo of two blue squares", "colors": {"square": "blue", "ground": "white"}},
        {"prompt": "a photo of a cross left of a ring", "relation": ["cross", "left", "ring"]},
        {"prompt": "a photo of a yellow diamond and a black triangle", "colors": {"diamond": "yellow"}},
        {"prompt": "a photo of a yellow diamond and a black triangle", "relation": ["diamond", "left", "triangle"]},
        {"prompt": "a photo of a circle", "colors": {"circle": "black", "ground": "white", "frame": "red"}},
    ]
    file.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return str(file)
