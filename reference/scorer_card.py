"""Measure the learned scores of the reference world and write their card: python -m blocktune.reference.scorer_card

On scenes that no training has seen, and for GenEval's judgement also on pictures of the reference model. What is true
of a picture is what the exact judge says. The card is `weights/scorers.json`.
"""

import argparse
import json
import platform
from functools import partial
from typing import Any

import numpy as np
import torch

from ..evaluators import cmmd, get
from ..evaluators.checkpoints import device
from ..evaluators.clip import load_clip
from ..evaluators.pictures import as_picture
from ..evaluators.template import COLORS as NAMED
from .card import pictures
from .degradations import degrade
from .judge import find_objects, judge
from .pipeline import load_pipeline
from .prompts import prompts
from .scenes import prompt_of, read_prompt, render, sample_scene
from .scorers import CLIP, PREFERENCE, WEIGHTS
from .sentences import altered, sentences, truths
from .train import sample_pairs

SEED = 999_983  # of scenes that no training draws
CARD = WEIGHTS / "scorers.json"
WEAKEST = 0.25  # degradation that a picture has at least


def held_out(count: int, part: int = 0) -> tuple[list, list]:
    """Requests and scenes; other parts have others."""
    return sample_pairs(count, np.random.default_rng((SEED, part)))


def drawn(scenes: list) -> np.ndarray:
    """float32 `(n, 48, 48, 3)`."""
    return torch.cat([render(scenes[i : i + 64]) for i in range(0, len(scenes), 64)]).permute(0, 2, 3, 1).numpy()


def degraded(images: np.ndarray) -> np.ndarray:
    """The same pictures, each with one fault."""
    generator = torch.Generator().manual_seed(SEED)
    strength = WEAKEST + (1 - WEAKEST) * torch.rand(len(images), generator=generator)
    return degrade(torch.from_numpy(images).permute(0, 3, 1, 2), strength, generator).permute(0, 2, 3, 1).numpy()


def retrieval(groups: int, size: int = 64) -> dict[str, float]:
    """Share of pictures whose own sentence is the nearest of `size` different ones, and the other way round.

    Another sentence that is true of the picture as well is no wrong answer, and left out.
    """
    clip, number = load_clip(CLIP), {sentence: i for i, sentence in enumerate(sentences())}
    right = []
    for part in range(groups):
        requests, scenes = held_out(4 * size, part)
        first = {prompt_of(request): i for i, request in enumerate(requests)}
        texts, rows = list(first)[:size], list(first.values())[:size]
        true = torch.from_numpy(truths([scenes[i] for i in rows])[:, [number[text] for text in texts]])
        images = clip.images([p for p in map(as_picture, drawn([scenes[i] for i in rows])) if p])
        cosines = (images @ clip.texts(texts).T).masked_fill(true & ~torch.eye(size, dtype=torch.bool), -torch.inf)
        right.append([(cosines.argmax(d) == torch.arange(size)).float().mean().item() for d in (1, 0)])
    of_pictures, of_texts = np.mean(right, axis=0).tolist()
    return {"groups": groups, "text of picture": of_pictures, "picture of text": of_texts}


def falls(name: str, count: int) -> dict[str, float]:
    """Share of pictures whose score falls when the sentence is changed to a false one, by what is changed."""
    requests, scenes = held_out(count)
    images, rng = drawn(scenes), np.random.default_rng(SEED + 1)
    score = get(name).score
    own = score(images, [prompt_of(request) for request in requests])
    number, true = {sentence: i for i, sentence in enumerate(sentences())}, truths(scenes)
    rows: dict[str, list[tuple[int, str]]] = {}
    for i, request in enumerate(requests):
        for part, other in altered(request, rng).items():
            if not true[i, number[prompt_of(other)]]:
                rows.setdefault(part, []).append((i, prompt_of(other)))
    found = {}
    for part, changed in rows.items():
        at = [i for i, _ in changed]
        found[part] = float((own[at] > score(images[at], [text for _, text in changed])).mean())
    return found


def preferred(name: str, count: int) -> dict[str, float]:
    """Share of true pictures above their degraded self, and above a picture of a changed sentence."""
    requests, scenes = held_out(count)
    images, rng = drawn(scenes), np.random.default_rng(SEED + 2)
    texts, score = [prompt_of(request) for request in requests], get(name).score
    own = score(images, texts)
    others, which = [], []
    for i, request in enumerate(requests):
        changes = list(altered(request, rng).values())
        scene = sample_scene(changes[rng.integers(len(changes))], rng)
        if not judge(find_objects(drawn([scene])[0]), request):
            others.append(scene)
            which.append(i)
    wrong = score(drawn(others), [texts[i] for i in which])
    return {
        "above degraded": float((own > score(degraded(images), texts)).mean()),
        "above wrong": float((own[which] > wrong).mean()),
    }


def agreement(images: np.ndarray, texts: list[str]) -> dict[str, float]:
    """Share of pictures that GenEval's rules on the detector and the exact judge call right or wrong alike.

    Sentences with a colour that GenEval does not name (cyan) are left out.
    """
    kept = [i for i, text in enumerate(texts) if all(t.color in (None, *NAMED) for t in read_prompt(text).things)]
    exact = np.array([judge(find_objects(images[i]), read_prompt(texts[i])) for i in kept])
    judged = get("geneval-style:reference").judge([images[i] for i in kept], [texts[i] for i in kept])  # pyright: ignore[reportAttributeAccessIssue]
    seen = np.array([judgement.correct for judgement in judged])
    return {
        "pictures": len(kept),
        "right by the judge": float(exact.mean()),
        "agree": float((seen == exact).mean()),
        "agree where right": float(seen[exact].mean()),
        "agree where wrong": float(1 - seen[~exact].mean()),
    }


def of_renderings(count: int) -> dict[str, float]:
    """Every other picture is held against a changed sentence."""
    requests, scenes = held_out(count, part=3)
    rng = np.random.default_rng(SEED + 3)
    changed = [list(altered(request, rng).values()) for request in requests]
    asked = [c[rng.integers(len(c))] if i % 2 else r for i, (r, c) in enumerate(zip(requests, changed, strict=True))]
    return agreement(drawn(scenes), [prompt_of(request) for request in asked])


def of_generated(count: int) -> dict[str, float]:
    """Pictures of the reference model for the first prompts of the confirm split."""
    chosen = prompts("confirm")[:count]
    return agreement(pictures(load_pipeline(), chosen) / 255, [p.text for p in chosen])


def sets(count: int) -> dict[str, float]:
    """CMMD to a set of true pictures: of another such set, and of the same when degraded."""
    _, scenes = held_out(2 * count)
    images, embed = drawn(scenes), load_clip(PREFERENCE).images
    one, other = images[:count], images[count:]
    return {"as drawn": cmmd(one, other, embed), "degraded": cmmd(degraded(one), other, embed)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m blocktune.reference.scorer_card", description=__doc__)
    parser.add_argument("scores", nargs="*", help="those to measure anew; all when not given")
    parser.add_argument("--count", type=int, default=1024, help="held-out scenes")
    parser.add_argument("--generated", type=int, default=192, help="pictures of the reference model")
    args = parser.parse_args()
    n = args.count
    parts: dict[str, dict[str, Any]] = {
        "clip_score": {
            "retrieval of 64": partial(retrieval, n // 64),
            "falls": partial(falls, "clip_score:reference", n),
        },
        "hps_v2.1": {"preferred": partial(preferred, "hps_v2.1:reference", n)},
        "aesthetic_v2": {"preferred": partial(preferred, "aesthetic_v2:reference", n)},
        "cmmd": {"to other true pictures": partial(sets, n // 2)},
        "geneval-style": {"renderings": partial(of_renderings, n), "generated": partial(of_generated, args.generated)},
    }
    card: dict[str, Any] = json.loads(CARD.read_text()) if CARD.exists() else {}
    for name in args.scores or parts:
        card[name] = {"held-out scenes": n, "device": f"{platform.machine()} {device()}", "torch": torch.__version__}
        card[name] |= {part: measure() for part, measure in parts[name].items()}
        print(name, json.dumps(card[name]), flush=True)
        CARD.write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
