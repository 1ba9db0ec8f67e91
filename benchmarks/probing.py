"""What probing coarse to fine spares and what it misses: python benchmarks/probing.py [--images 96] [--run FOLDER]

The bundled model is probed coarse to fine, by an eighth of the pictures at a time, and then every block on all, with
the same prompts and seeds; in `--run` the probe goes on where it was cut short. Told are the share of the pictures and,
per effect, how many of the blocks found are among the best by all pictures, of which several may be equal. Since blocks
often differ by less than the pictures can tell, also by how many points those found do worse on all pictures than the
best do there, on average, beside half of the 95 % interval of one block's difference; and how many of them all pictures
prove worse than one that was not found (95 % interval of the paired difference above zero). The same over random orders
of the pictures, beside as many of every block.

What the same probe would have found on other prompts: the pictures of the full one are divided at random, and told is
how many of the best blocks by so many pictures are among the best by as many others, beside what chance has. More
pictures than there are search prompts are the same prompts with other seeds; those of a prompt stay together.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from blocktune.evaluators import Prompt, paired_interval
from blocktune.evaluators.prompts import write_splits
from blocktune.policies.policy import ModelIdentity
from blocktune.reference import prompts
from blocktune.search.allocation import coarse_to_fine
from blocktune.search.config import Config, Probe, load_config
from blocktune.search.generation import load
from blocktune.search.part import EFFECTS, Part
from blocktune.search.probe import best_blocks, launch_probe, pictures
from blocktune.search.prompts import reseeded
from blocktune.search.run_directory import RunDirectory

RESULTS = Path(__file__).parent / "results"
DIVISIONS = 400
ORDERS = 60


def compare(
    full: Any, coarse: Any, effect: str, of_blocks: np.ndarray, texts: np.ndarray, count: int
) -> dict[str, Any]:
    """The best blocks of an effect by both tables, and what the found ones lose, in points by the full one.

    `of_blocks` are gains (blocks, pictures), `texts` the prompts of the pictures.
    """
    true, found = (best_blocks(table, effect, count) for table in (full, coarse))
    missed = [block for block in true if block not in found]

    def worse(block: int) -> bool:
        return any(paired_interval(of_blocks[one], of_blocks[block], groups=texts).low > 0 for one in missed)

    rows = full[(full["effect"] == effect) & (full["kind"] == "all")].set_index("block")
    gains = 100 * EFFECTS[effect][1] * rows["delta"]
    half = 50 * (rows["high"] - rows["low"]).loc[true].mean()
    return {
        "effect": effect, "best": true, "found": found, "same": int((gains.loc[found] >= gains.loc[true].min()).sum()),
        "points_lost": float(gains.loc[true].mean() - gains.loc[found].mean()), "half_interval": float(half),
        "proven_worse": sum(worse(block) for block in found if block not in true),
    }  # fmt: skip


def top(means: np.ndarray, count: int) -> np.ndarray:
    """The blocks with the highest of `means` (effects, blocks), best first: (effects, count)."""
    return np.argsort(-means, axis=1)[:, :count]


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many blocks of each effect are in both, summed."""
    return sum(len(np.intersect1d(a, b)) for a, b in zip(one, other, strict=True))


def replayed(gains: np.ndarray, probe: Probe) -> dict[str, dict[str, float]]:
    """Of the best blocks by all pictures, how many the probe's share finds in random orders, and the points lost.

    `gains` are (effects, blocks, pictures). Means per order: coarse to fine, and as many pictures of every block.
    """
    rng = np.random.default_rng(0)
    effects, blocks, images = gains.shape
    all_pictures = gains.mean(-1)
    best = top(all_pictures, probe.chosen)
    told: dict[str, list[tuple[float, float]]] = {"coarse": [], "every block": []}
    for _ in range(ORDERS):
        mixed = gains[..., rng.permutation(images)]

        def draw(wanted: Mapping[tuple[int, int], int], mixed: np.ndarray = mixed) -> dict[tuple[int, int], np.ndarray]:
            return {(case, block): mixed[case, block, :count] for (case, block), count in wanted.items()}

        known = coarse_to_fine(draw, range(effects), blocks, images, probe.first_images, probe.share, probe.chosen)
        means = {
            "coarse": np.array([[block.mean() for block in known[effect]] for effect in range(effects)]),
            "every block": mixed[..., : int(probe.share * images)].mean(-1),
        }
        for name, seen in means.items():
            found = top(seen, probe.chosen)
            lost = np.take_along_axis(all_pictures, best, 1) - np.take_along_axis(all_pictures, found, 1)
            told[name].append((common(best, found), float(lost.mean())))
    means_of = {name: np.mean(rows, axis=0) for name, rows in told.items()}
    return {name: {"same": float(s), "points_lost": 100 * float(lost)} for name, (s, lost) in means_of.items()}


def with_seeds(images: int) -> list[Prompt]:
    """The first so many search prompts, and from there on the same with other seeds."""
    known = prompts("search")
    return [one for draw in range(math.ceil(images / len(known))) for one in reseeded(known, draw)][:images]


def gains_of(run: RunDirectory, config: Config, model: ModelIdentity) -> np.ndarray:
    """What each picture of a full probe gained, or how far it needs the text: (effects, blocks, pictures)."""
    name, before = config.objectives.alignment, run.read_scores("unmodified")

    def gains(effect: str, block: int) -> np.ndarray:
        part = Part(effect, (block,), config.probe.windows[0], len(before))
        return EFFECTS[effect][1] * (run.read_scores(part.file(model, config.probe.scale))[name] - before[name])

    return np.array([[gains(effect, block) for block in range(model.num_blocks)] for effect in config.probe.effects])


def agreement(gains: np.ndarray, texts: np.ndarray, count: int, chosen: int) -> dict[str, Any]:
    """Of the best blocks by about `count` pictures, how many are among the best by as many of other prompts.

    `gains` are (effects, blocks, pictures), `texts` the prompts of the pictures.
    """
    rng, same = np.random.default_rng(0), []
    different, prompt = np.unique(texts, return_inverse=True)
    size = len(different) * count // len(texts)
    for _ in range(DIVISIONS):
        place = rng.permutation(len(different))[prompt]
        halves = [(start <= place) & (place < start + size) for start in (0, size)]
        same.append(common(*(top(gains[..., half].mean(-1), chosen) for half in halves)))
    effects, blocks, _ = gains.shape
    return {
        "pictures": count, "same": float(np.mean(same)), "deviation": float(np.std(same)), "of": effects * chosen,
        "by_chance": effects * chosen**2 / blocks,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=Probe().images, help="that count as all pictures of a block")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="KEY=VALUE of the config")
    parser.add_argument("--run", type=Path, help="folder of the probe; a temporary one when not given")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of probing.json")
    args = parser.parse_args()
    tables = {}
    shares = {"coarse": Probe().share, "full": 1.0}
    counts = [f"probe.images={args.images}", "probe.random_sets=0", f"probe.first_images={max(1, args.images // 8)}"]
    with tempfile.TemporaryDirectory() as place:
        folder = args.run or Path(place) / "run"
        drawn = with_seeds(args.images)
        write_splits(folder.with_name(folder.name + "-prompts"), {"search": tuple(drawn)})
        source = folder.with_name(folder.name + "-prompts") / "search.jsonl"
        for split in ("search", "confirm"):  # nothing is confirmed, but a probe has as many as the fewer of both
            counts += [f"prompts.{split}={source}", f"prompts.{split}_images={args.images}"]
        for name, share in shares.items():
            config = load_config(None, [*args.overrides, *counts, f"probe.share={share}"])
            run = launch_probe(config, folder)
            tables[name] = pd.read_parquet(run.path / "probe.parquet")
        config, on = run.load_config(), run.read_state()
        model = ModelIdentity.of(load(config.model.path, "cpu", torch.float32))
        gains = gains_of(run, config, model)
    texts = np.array([prompt.text for prompt in drawn])
    rows = [
        compare(tables["full"], tables["coarse"], effect, of_blocks, texts, config.probe.chosen)
        for effect, of_blocks in zip(config.probe.effects, gains, strict=True)
    ]
    orders = replayed(gains, config.probe.model_copy(update={"share": shares["coarse"]}))
    counted = {
        name: pictures(config.probe.model_copy(update={"share": share}), model.num_blocks, args.images)
        for name, share in shares.items()
    }
    print(f"{counted['coarse']} of {counted['full']} pictures, {100 * counted['coarse'] / counted['full']:.1f} %")
    for row in rows:
        print(
            f"{row['effect']:<16} best {row['best']}, found {row['found']}: {row['same']} the same, "
            f"{row['points_lost']:.2f} points lost, {row['proven_worse']} proven worse; "
            f"one block's interval is +-{row['half_interval']:.2f}"
        )
    for name, found in orders.items():
        print(f"in {ORDERS} orders, {name}: {found['same']:.1f} the same, {found['points_lost']:.2f} points lost")
    divided = [
        agreement(gains, texts, args.images // 2**k, config.probe.chosen)
        for k in range(1, max(2, round(math.log2(args.images / 24))))
    ]
    for row in divided:
        print(
            f"{row['pictures']:5} pictures of every block and as many of other prompts agree on {row['same']:.1f} of "
            f"{row['of']} (by chance {row['by_chance']:.1f})"
        )
    told = {"device": f"{on['device']}, {on['dtype']}", "versions": on["versions"], "seed": config.search.seed}
    told |= {"images": args.images, "drawn": counted["coarse"], "full": counted["full"], "effects": rows}
    told |= {"orders": orders}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "probing.json").write_text(json.dumps(told | {"divided": divided}, indent=2) + "\n")


if __name__ == "__main__":
    main()
