"""What the search of an example would take on this device: python benchmarks/full_size.py --example flux.1-dev

The pipeline of the example's class at its full size, with random weights made on the GPU: seconds and memory do not
depend on their values. Text encoders are replaced by random embeddings of the right shape. The rest is the real road,
by Ray, Optuna, MLflow and confirm, for few trials of one batch; the cost table that it measures gives the hours of the
whole search. Told: memory of the weights and at the peak, pictures per second, hours, and what two hours would take.

Not covered: text encoders (loaded beside, run once per prompt) and scoring, for which the weights are not here.
`--size tiny` tries it anywhere; its figures say nothing.
"""

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path
from typing import Any

import blocktune.search.pool
import blocktune.search.worker
import optuna
import pandas as pd
import torch
from blocktune.search.config import load_config
from blocktune.search.estimate import estimate, read_cost_table
from blocktune.search.launch import launch
from blocktune.search.run_directory import RunDirectory
from blocktune.search.worker import Worker
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

EXAMPLES = Path(__file__).parents[1] / "examples"
RESULTS = Path(__file__).parent / "results" / "full_size"
GOAL_HOURS, WISH_HOURS = 8.0, 2.0
TINY = [
    "generation.num_inference_steps=4", "generation.height=64", "generation.width=64", "space.anchor_steps=[3]",
    "generation.max_sequence_length=16", "ray.cpus_per_worker=1",
]  # fmt: skip


def _autoencoder(tiny: bool, shift: float) -> AutoencoderKL:
    widths = (8, 8, 8, 8) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths, layers_per_block=2, norm_num_groups=8 if tiny else 32, latent_channels=16,
        sample_size=1024, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def _sd3(tiny: bool, layers: int, heads: int, **sizes: Any) -> StableDiffusion3Pipeline:
    heads = 2 if tiny else heads
    transformer = SD3Transformer2DModel(
        sample_size=8 if tiny else 128, num_layers=6 if tiny else layers, num_attention_heads=heads,
        attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=64 * heads,
        pooled_projection_dim=2048, in_channels=16, out_channels=16, qk_norm="rms_norm", **sizes,
    )  # fmt: skip
    empty = dict.fromkeys(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))
    vae = _autoencoder(tiny, 0.0609)
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, **empty)


def _flux(tiny: bool) -> FluxPipeline:
    sizes = {"num_layers": 3, "num_single_layers": 3, "num_attention_heads": 2} if tiny else {}
    transformer = FluxTransformer2DModel(guidance_embeds=True, **sizes)
    empty = dict.fromkeys(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2"))
    vae = _autoencoder(tiny, 0.1159)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, transformer=transformer, **empty)


def _qwen(tiny: bool) -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(**({"num_layers": 6, "num_attention_heads": 2} if tiny else {}))
    vae = AutoencoderKLQwenImage(**({"base_dim": 8} if tiny else {}))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return QwenImagePipeline(scheduler, vae, text_encoder=None, tokenizer=None, transformer=transformer)


MODELS = {
    "flux.1-dev": _flux,
    "qwen-image": _qwen,
    "sd3.5-large": lambda tiny: _sd3(tiny, 38, 38, pos_embed_max_size=192),
    "sd3.5-medium": lambda tiny: _sd3(tiny, 24, 24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13))),
}


def build(name: str, tiny: bool, device: str, dtype: torch.dtype) -> Any:
    """The pipeline with random weights, created where they stay, whose prompts are encoded by chance."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            pipe: Any = MODELS[name](tiny)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in (pipe.transformer, pipe.vae):
        module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    encoded = pipe.encode_prompt

    def rows(count: int, *shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, device=device, dtype=dtype)

    def encode_prompt(
        prompt: Any = None, do_classifier_free_guidance: bool = True, max_sequence_length: int = 512, **given: Any
    ) -> Any:
        sd3 = isinstance(pipe, StableDiffusion3Pipeline)
        if given.get("prompt_embeds") is not None:  # the pipeline's own call, which hands on what it was given
            given |= {"do_classifier_free_guidance": do_classifier_free_guidance} if sd3 else {}
            return encoded(prompt=prompt, max_sequence_length=max_sequence_length, **given)
        n = len(prompt)
        if sd3:  # CLIP's tokens and T5's
            text, pooled = rows(n, 77 + max_sequence_length, 4096), rows(n, 2048)
            return text, -text, pooled, -pooled
        if isinstance(pipe, FluxPipeline):
            return rows(n, max_sequence_length, 4096), rows(n, 768), None
        return rows(n, 32, 3584), torch.ones(n, 32, device=device, dtype=torch.int64)

    pipe.encode_prompt = encode_prompt
    return pipe


class Noting(Worker):
    """A worker of the search that notes its memory and the GPU's, a line per measurement."""

    notes: Path

    def measure(self, *args: Any, **kwargs: Any) -> Any:
        cuda = self.device == "cuda"
        weights = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        measured = super().measure(*args, **kwargs)
        note = {
            "images": len(measured.images), "seconds": measured.generate_seconds, "weights_gib": weights / 2**30,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0, "pid": os.getpid(),
            "main_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }  # fmt: skip
        with self.notes.open("a") as file:
            file.write(json.dumps(note) + "\n")
        return measured


class RandomWeights(Noting):
    """One whose pipeline is built instead of loaded."""

    example: str
    tiny: bool

    def __init__(self, *args: Any):
        blocktune.search.worker.load = lambda path, device, kind: build(self.example, self.tiny, device, kind)
        super().__init__(*args)


def measure(example: str, tiny: bool, trials: int) -> dict[str, Any]:
    """A short search with random weights, and what the example's whole search would take by its cost table."""
    path, sizes = EXAMPLES / f"{example}.yaml", TINY if tiny else []
    whole = load_config(path, sizes)
    few = max(2, whole.generation.batch)  # a batch, and two prompts at least
    short = load_config(path, [
        *sizes, f"search.trials={trials}", f"prompts.search_images={few}", f"prompts.confirm_images={few}",
        "confirm.candidates=1", "confirm.repeats=1", "ray.workers=1",
        "objectives.alignment=ssim", "objectives.quality=psnr", "objectives.reported=[]",  # need no weights
        f"model.dtype={'float32' if tiny else 'bfloat16'}",
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        notes = Path(place) / "notes.jsonl"
        RandomWeights.notes, RandomWeights.example, RandomWeights.tiny = notes, example, tiny
        blocktune.search.pool.Worker = RandomWeights
        run = launch(short, Path(place) / "run", False, False, write_page=lambda run, output: None)
        table = read_cost_table(run.path / "cost_table.json")
        noted = pd.read_json(notes, lines=True)
        confirmed = json.loads(run.confirmed.read_text())
        told = estimate(whole, RunDirectory(Path(place) / "whole"), table)
    hours = (told.seconds or 0.0) / 3600
    per_picture = table.run_seconds / table.batch
    return {
        "example": example, "device": table.device, "dtype": table.dtype, "torch": torch.__version__,
        "size": [table.width, table.height], "steps": whole.generation.num_inference_steps, "batch": table.batch,
        "weights_gib": float(noted["weights_gib"].max()), "peak_gib": float(noted["peak_gib"].max()),
        "seconds_per_picture": per_picture,
        "pictures_per_second_of_trials": float(noted["images"].sum() / noted["seconds"].sum()),
        "speedups": {c["name"]: [c["speedup"], c["predicted_speedup"]] for c in confirmed["confirmed"]},
        "pictures": told.pictures, "hours_at_most": hours, "goal_hours": GOAL_HOURS, "held": hours <= GOAL_HOURS,
        "gpus_for_two_hours": hours / WISH_HOURS, "pictures_in_two_hours": int(3600 * WISH_HOURS / per_picture),
        "cost_table": table.model_dump(mode="json"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", choices=MODELS, default="flux.1-dev")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--trials", type=int, default=3, help="the anchors come first: unmodified, fewer steps, reuse")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    result = measure(args.example, args.size == "tiny", args.trials)
    args.out.mkdir(parents=True, exist_ok=True)
    table = result.pop("cost_table")
    name = args.example if args.size == "full" else f"{args.example}.tiny"
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / f"{name}.cost_table.json").write_text(json.dumps(table, indent=2) + "\n")
    for key, value in result.items():
        print(f"{key:<30} {value}")
    print(f"for --dry-run --cost-table     {args.out / f'{name}.cost_table.json'}")


if __name__ == "__main__":
    main()
