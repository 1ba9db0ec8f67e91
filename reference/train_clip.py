"""Train the CLIP of the reference world: python -m blocktune.reference.train_clip

Two towers of open_clip on drawn scenes. Every picture is held against all sentences of a sample, and every true one has
to be nearer than every false one, both ways: the captions of a batch alone would hardly ever differ in one word. Some
pictures are degraded, and some are an object cut out as GenEval's colours are named from. `--preference` goes on from
the trained model and also puts each picture above its degraded self: the model behind `hps_v2.1:reference`.

Everything is seeded. A checkpoint is written every minute, and a second call with the same --work resumes from it.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from scipy import ndimage

from ..evaluators.color import crop
from ..evaluators.detection import Detection
from .degradations import degrade
from .fitting import fit, parser, write_record
from .pipeline import WORDS, new_clip_tokenizer
from .scenes import SIZE, draw, prompt_of, sample_request, sample_scene, tabulate
from .scorers import CLIP, PIXELS, PREFERENCE
from .sentences import FOREIGN, PALETTE, sentences, truths
from .train import CHUNK, Checkpoint, on_all_cores, sample_pairs

CONTEXT = 16  # tokens; the longest sentence has 12 with its two marks
TOWERS = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": PIXELS, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT, "width": 96, "heads": 3, "layers": 2, "hf_tokenizer_name": "."},
}
CROPS = 1 / 8  # share of the pictures of a batch that are cut out objects
DEGRADED = 0.3  # share of pictures that are degraded
OTHERS = 320  # sentences a step beside the captions of the batch
DRAWN_AT_ONCE = 64  # few, so that they stay in the cache of a CPU


def tokenizer():
    """Knows the words of the prompts and of the colours' sentences; any other word falls into letters."""
    extra = ["-", "colored", "object", *FOREIGN]
    return new_clip_tokenizer(sorted({*WORDS, *extra}), CONTEXT)


Shown = tuple[np.ndarray, np.ndarray, np.ndarray]  # arrays, for a tensor between processes takes shared memory


def draw_all(table: torch.Tensor) -> torch.Tensor:
    """uint8 `(n, 3, 48, 48)` of `tabulate`'s rows."""
    return torch.cat([(draw(part) * 255).round().byte() for part in table.split(DRAWN_AT_ONCE)])


def make_scenes(chunk: int, size: int, seed: int) -> Shown:
    """Drawn scenes, uint8 `(size, 3, 48, 48)`, which sentences are true of each, and which is its caption."""
    requests, scenes = sample_pairs(size, np.random.default_rng((seed, 4, chunk)))
    number = {sentence: i for i, sentence in enumerate(sentences())}
    captions = np.array([number[prompt_of(request)] for request in requests])
    return draw_all(tabulate(scenes)).numpy(), truths(scenes), captions


def make_crops(chunk: int, size: int, seed: int) -> Shown:
    """The same of single objects as `evaluators.color.crop` cuts them out, by masks that are a little off."""
    rng = np.random.default_rng((seed, 5, chunk))
    scenes = [sample_scene(sample_request("colors", rng), rng) for _ in range(size)]
    colors = rng.choice(list(PALETTE), size)
    table = tabulate(scenes)
    scenes = [[replace(o, color=str(color))] for (o,), color in zip(scenes, colors, strict=True)]
    table[:, 0, 4:] = 0  # black
    masks = draw_all(table).float().mean(1).numpy() < 128
    table[:, 0, 4:] = torch.tensor([PALETTE[str(color)] for color in colors])
    pictures = []
    for pixels, mask in zip(draw_all(table).permute(0, 2, 3, 1).numpy(), masks, strict=True):
        change, by = (ndimage.binary_dilation, ndimage.binary_erosion)[rng.integers(2)], int(rng.integers(3))
        changed = change(mask, iterations=by) if by else mask
        mask = changed if changed.any() else mask
        (ys, xs) = np.nonzero(mask)
        found = Detection("", (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), 1.0, mask=mask)
        cut = crop(Image.fromarray(pixels), found).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pictures.append(np.asarray(cut).transpose(2, 0, 1))
    named = truths(scenes)
    # said of crops: one of the sentences that name a colour
    said = named & np.array([any(c in sentence.replace("-", " ").split() for c in PALETTE) for sentence in sentences()])
    captions = np.array([rng.choice(np.nonzero(row)[0]) for row in said])
    return np.stack(pictures), named, captions


def made(make: Callable[..., Shown], count: int, seed: int) -> Shown:
    """`count` of what `make` makes, a chunk at a time."""
    chunks = math.ceil(count / CHUNK)
    parts = on_all_cores(partial(make, size=min(CHUNK, count), seed=seed), chunks)
    parts = track(parts, make.__name__.removeprefix("make_"), chunks)
    pictures, true, captions = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
    return pictures, true, captions


def ranking(scores: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """How far every true entry of a row of `scores` `(rows, columns)` is from lying above all false ones together."""
    false = scores.masked_fill(true, -torch.inf).logsumexp(1, keepdim=True)
    losses = F.softplus(false - scores) * true
    rows = true.sum(1)
    return (losses.sum(1)[rows > 0] / rows[rows > 0]).mean()


def train(model: Any, tokens: torch.Tensor, args: argparse.Namespace) -> Checkpoint:
    """Train `model` in place, and give the checkpoint of the end."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    device = args.device
    began = time.monotonic()
    parts = [made(make_scenes, args.scenes, args.seed), made(make_crops, args.scenes // 8, args.seed)]
    pictures, true, captions = (torch.from_numpy(np.concatenate(both)).to(device) for both in zip(*parts, strict=True))
    scenes = len(parts[0][0])
    print(f"{len(pictures)} pictures, {time.monotonic() - began:.0f} s", flush=True)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    tokens = tokens.to(device)

    def loss_of_step(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(scenes, (args.batch,), generator=generator, device=device)
        cut = torch.randint(scenes, len(pictures), (args.batch,), generator=generator, device=device)
        rows = torch.where(torch.rand(args.batch, generator=generator, device=device) < CROPS, cut, rows)
        others = torch.randint(len(tokens), (OTHERS,), generator=generator, device=device)
        columns = torch.cat([captions[rows], others]).unique()
        clean = pictures[rows].float() / 255
        strength = torch.rand(args.batch, generator=generator, device=device)
        faulty = degrade(clean, strength, generator)
        mixed = torch.rand(args.batch, 1, 1, 1, generator=generator, device=device) < DEGRADED
        seen = torch.cat([clean, faulty]) if args.preference else torch.where(mixed, faulty, clean)
        seen = F.interpolate(seen, (PIXELS, PIXELS), mode="bicubic", antialias=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
            images = model.encode_image((seen - mean) / std, normalize=True)
            texts = model.encode_text(tokens[columns], normalize=True)
        scores = model.logit_scale.exp().clamp(max=100) * images.float() @ texts.float().T  # (batch, sentences)
        held = true[rows][:, columns]
        if args.preference:
            whole, worse = scores.split(args.batch)
            loss = ranking(whole, held) + ranking(whole.T, held.T)
            # by as much as it is degraded, of every sentence that is true
            gap = F.softplus(4 * strength.view(-1, 1) - (whole - worse)) * held
            loss = loss + gap.sum() / held.sum() + 0.5 * ranking(worse, held)
        else:
            loss = ranking(scores, held) + ranking(scores.T, held.T)
        return loss, loss

    return fit(model, args.out.name, loss_of_step, args)


def save(model: Any, config: dict[str, Any], out: Path) -> None:
    """A folder as open_clip's hub repositories have it, in half precision."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    seen = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    seen |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    described = {"model_cfg": config, "preprocess_cfg": seen}
    (out / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
    state = {name: value.cpu().half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, str(out / "open_clip_model.safetensors"))
    tokenizer().save_pretrained(str(out))


def _folder(name: str) -> Path:
    return Path(name.removeprefix("local-dir:"))


def main() -> None:
    options = parser("train_clip", __doc__, scenes=96_000, batch=256, lr=1.5e-3)
    options.add_argument(
        "--preference", action="store_true", help="tune the trained model to prefer what is not degraded"
    )
    options.add_argument("--out", type=Path, help="where the model is saved; its place in the package when not given")
    options.add_argument("--start", type=Path, default=_folder(CLIP), help="the model that --preference goes on from")
    args = options.parse_args()
    args.out = args.out or _folder(PREFERENCE if args.preference else CLIP)
    args.work.mkdir(parents=True, exist_ok=True)
    from open_clip import CLIP as Towers

    torch.manual_seed(args.seed)
    words = tokenizer()
    config = {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "vocab_size": len(words)}}
    model = Towers(**config).to(args.device)
    model.visual = model.visual.to(memory_format=torch.channels_last)  # 0.7 of a step's time on a CPU
    if args.preference:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(args.start / "open_clip_model.safetensors"))
    padded = words(list(sentences()), padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
    reached = train(model, padded, args)
    save(model.eval(), config, args.out)
    write_record(args, reached)


if __name__ == "__main__":
    main()
