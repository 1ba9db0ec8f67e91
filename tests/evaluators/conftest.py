import pytest

from . import checkpoints


@pytest.fixture(scope="session")
def model_scores(tmp_path_factory) -> dict[str, str]:
    """A name of every family, with a tiny random checkpoint; `vqa_score` once for each kind of model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    clip, dino = checkpoints.clip(folder / "clip"), checkpoints.dinov2(folder / "dinov2")
    qwen = checkpoints.qwen(folder / "qwen")
    return {
        "clip_score": f"clip_score:{clip}",
        "siglip_score": f"siglip_score:{checkpoints.clip(folder / 'siglip', init_logit_bias=-4.0)}",
        "hps_v2.1": f"hps_v2.1:{clip}",
        "image_reward": f"image_reward:{checkpoints.image_reward(folder / 'image_reward')}",
        "pick_score": f"pick_score:{checkpoints.pick_score(folder / 'pick_score')}",
        "aesthetic_v1": f"aesthetic_v1:{checkpoints.aesthetic_v1(folder / 'v1.pth')}@{clip}",
        "aesthetic_v2": f"aesthetic_v2:{checkpoints.aesthetic_v2(folder / 'v2.pth')}@{clip}",
        "clip_iqa": f"clip_iqa:{checkpoints.resnet_clip(folder / 'resnet')}",
        "vqa_score": f"vqa_score:{qwen}",
        "vqa_score blip": f"vqa_score:{checkpoints.blip(folder / 'blip')}",
        "vqa_attributes": f"vqa_attributes:{qwen}@{checkpoints.questions(folder / 'questions.jsonl')}",
        "lpips": f"lpips:{checkpoints.lpips(folder / 'lpips')}",
        "dinov2": f"dinov2:{dino}",
    }
