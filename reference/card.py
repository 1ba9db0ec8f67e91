"""Measure the trained reference model and write its card: python -m blocktune.reference.card

Scores come from the confirm split, which training and search never use as such; block removals from its first part.
Guidance is compared on the search split, since it is chosen by it.
"""

import argparse
import json
import platform

import numpy as np
import torch
from rich.progress import track
from scipy.stats import bootstrap

from ..evaluators import get, paired_interval
from ..policies import BlockPolicy, Rule, Skip, apply_policy
from .judge import find_objects, judge
from .pipeline import SAMPLING, WEIGHTS, load_pipeline
from .prompts import prompts
from .scenes import KINDS, render, sample_request, sample_scene

REMOVED_ON = 192  # pictures per removed block
WANTED = {"overall": 0.60, "single": 0.90}  # shares of right pictures that a longer training should reach


def pictures(pipe, chosen, batch: int = 192, **changes) -> np.ndarray:
    """uint8 `(n, h, w, 3)`, default sampling but for `changes`."""
    parts = []
    for start in range(0, len(chosen), batch):
        rows = chosen[start : start + batch]
        seeds = [torch.Generator("cpu").manual_seed(p.seed) for p in rows]
        images = pipe([p.text for p in rows], generator=seeds, output_type="np", **SAMPLING | changes).images
        parts.append((images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def share(scores: np.ndarray) -> str:
    """Percent with a 95 % bootstrap interval."""
    if scores.min() == scores.max():
        return f"{100 * scores.mean():.1f}"
    low, high = bootstrap((scores,), np.mean, n_resamples=2000, rng=0, method="percentile").confidence_interval
    return f"{100 * scores.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m blocktune.reference.card", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pipe = load_pipeline(args.device)
    chosen = prompts("confirm")
    texts, kinds = [p.text for p in chosen], np.array([p.kind for p in chosen])
    binary, graded, crisp = get("shapes_binary"), get("shapes"), get("crispness")
    rows = []
    few = prompts("search")[:192]
    for guidance in track((1.0, 2.0, 4.0, 6.0, 8.0), "guidance"):
        images = pictures(pipe, few, guidance_scale=guidance)
        few_texts = [p.text for p in few]
        rows.append((guidance, binary.score(images, few_texts).mean(), graded.score(images, few_texts).mean()))
    images = pictures(pipe, chosen)
    scores, soft = binary.score(images, texts), graded.score(images, texts)
    long = pictures(pipe, chosen[:REMOVED_ON], max_sequence_length=256)

    rng = np.random.default_rng(7)
    truth = []
    for kind in KINDS:
        requests = [sample_request(kind, rng) for _ in range(200)]
        drawn = render([sample_scene(r, rng) for r in requests]).permute(0, 2, 3, 1).numpy()
        truth.append(np.mean([judge(find_objects(i), r) for i, r in zip(drawn, requests, strict=True)]))

    removed = []
    first, before = chosen[:REMOVED_ON], soft[:REMOVED_ON]
    for block in track(range(len(pipe.transformer.transformer_blocks)), "removing each block"):
        policy = BlockPolicy.for_model(pipe, f"without {block}", [Rule(blocks=(block,), action=Skip())])
        with apply_policy(pipe, policy):
            after = graded.score(pictures(pipe, first), texts[:REMOVED_ON])
        removed.append(paired_interval(after, before, groups=texts[:REMOVED_ON]))

    training = json.loads((WEIGHTS / "training.json").read_text())
    shown = {"overall": scores} | {k: scores[kinds == k] for k in KINDS}
    short = [(k, shown[k].mean(), wanted) for k, wanted in WANTED.items() if shown[k].mean() < wanted]
    different = [len({p.text for p in chosen if k in ("overall", p.kind)}) for k in shown]
    weak = [f"{k} {100 * mean:.1f} % right, wanted {100 * wanted:.0f} %" for k, mean, wanted in short]
    known = f"**Known weaknesses**, after {int(training['seconds']) // 60} minutes of training: {'; '.join(weak)}."
    least = max(range(len(removed)), key=lambda b: removed[b].delta)
    n = int((kinds == KINDS[0]).sum())

    def table(head: tuple, rows) -> list[str]:
        cells = [head, ("---",) * len(head), *rows]
        return ["", *("| " + " | ".join(str(c) for c in row) + " |" for row in cells), ""]

    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    sizes = [(n, type(m := getattr(pipe, n)).__name__, f"{sum(p.numel() for p in m.parameters()):,}") for n in parts]
    steps, guidance = SAMPLING["num_inference_steps"], SAMPLING["guidance_scale"]
    lines = [
        "# The reference model",
        "",
        "A Stable Diffusion 3 pipeline small enough to ship: 48x48 pictures of coloured shapes on grey ground. It",
        "exists so that a search runs anywhere, offline, on a model that was really trained and errs as real ones do.",
        *table(("part", "class", "parameters"), sizes),
        f"**Data and recipe.** {int(training['scenes']):,} drawn scenes in six kinds; every attribute word of a",
        f"caption is wrong with probability {training['caption_noise']}; stochastic depth; rectified flow, AdamW.",
        f"{training['steps']} steps of {training['batch']} pictures, {training['vae_steps']} of the autoencoder,",
        f"seed {training['seed']}, on {training['device']}, torch {training['torch']}. Retrain with",
        "`python -m blocktune.reference.train`; `python -m blocktune.reference.card` writes this page.",
        "",
        f"**Scores**: confirm split, {steps} steps, guidance {guidance}, float32; right pictures in percent, by",
        f"GenEval's rules and the exact judge, 95 % intervals, {n} pictures a kind.",
        *table(
            ("", *shown),
            [("right", *map(share, shown.values())), ("different prompts", *different)],
        ),
        *([known, ""] if weak else []),
        f"Dense score {share(soft)}; crispness {share(crisp.score(images, texts))}.",
        f"With T5 padded to SD3's default of 256 tokens, first {REMOVED_ON} pictures:",
        f"{share(binary.score(long, texts[:REMOVED_ON]))} right, against",
        f"{share(scores[:REMOVED_ON])} at {SAMPLING['max_sequence_length']} tokens. The judge is right on",
        f"{100 * np.mean(truth):.1f} % of true renderings (worst kind {100 * min(truth):.1f} %).",
        "",
        f"Guidance, on {len(few)} pictures of the search split:",
        *table(("guidance", "right", "dense"), [(g, f"{100 * b:.1f}", f"{100 * d:.1f}") for g, b, d in rows]),
        f"**One block removed**, all steps: dense score, points, {REMOVED_ON} pictures. Least: block {least}.",
        *table(
            ("block", "difference"),
            [(b, f"{100 * i.delta:+.1f} [{100 * i.low:+.1f}, {100 * i.high:+.1f}]") for b, i in enumerate(removed)],
        ),
        f"Measured on {platform.machine()} {args.device}, torch {torch.__version__}.",
    ]
    (WEIGHTS / "README.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
