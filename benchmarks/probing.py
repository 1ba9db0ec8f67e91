"""What probing coarse to fine spares and what it misses: python benchmarks/probing.py [--images 96] [--run FOLDER]

The bundled model is probed coarse to fine, by an eighth of the pictures at a time, and then every block on all, with
the same prompts and seeds; in `--run` the probe goes on where it was cut short. Told are the share of the pictures and,
per effect, how many of the blocks found are among the best by all pictures, of which several may be equal. Since blocks
often differ by less than the pictures can tell, also by how many points those found do worse on all pictures than the
best do there, on average, beside half of the 95 % interval of one block's difference.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from blocktune.search.config import Probe, load_config
from blocktune.search.probe import EFFECTS, best_blocks, launch_probe, pictures

RESULTS = Path(__file__).parent / "results"


def compare(full: Any, coarse: Any, effect: str, count: int) -> dict[str, Any]:
    """The best blocks of an effect by both tables, and what the found ones lose, in points by the full one."""
    true, found = (best_blocks(table, effect, count) for table in (full, coarse))
    rows = full[(full["effect"] == effect) & (full["kind"] == "all")].set_index("block")
    gains = 100 * EFFECTS[effect][1] * rows["delta"]
    half = 50 * (rows["high"] - rows["low"]).loc[true].mean()
    return {
        "effect": effect, "best": true, "found": found, "same": int((gains.loc[found] >= gains.loc[true].min()).sum()),
        "points_lost": float(gains.loc[true].mean() - gains.loc[found].mean()), "half_interval": float(half),
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
    counts = [f"probe.images={args.images}", f"prompts.search_images={args.images}", "probe.random_sets=0"]
    counts += [f"probe.first_images={max(1, args.images // 8)}"]
    with tempfile.TemporaryDirectory() as place:
        for name, share in shares.items():
            config = load_config(None, [*args.overrides, *counts, f"probe.share={share}"])
            run = launch_probe(config, args.run or Path(place) / "run")
            tables[name] = pd.read_parquet(run.path / "probe.parquet")
        config, on = run.load_config(), run.read_state()
    rows = [compare(tables["full"], tables["coarse"], e, config.probe.chosen) for e in config.probe.effects]
    blocks = int(tables["full"]["block"].max()) + 1
    drawn = {
        name: pictures(config.probe.model_copy(update={"share": share}), blocks, args.images)
        for name, share in shares.items()
    }
    print(f"{drawn['coarse']} of {drawn['full']} pictures, {100 * drawn['coarse'] / drawn['full']:.1f} %")
    for row in rows:
        print(
            f"{row['effect']:<16} best {row['best']}, found {row['found']}: {row['same']} the same, "
            f"{row['points_lost']:.2f} points lost; one block's interval is +-{row['half_interval']:.2f}"
        )
    told = {"device": f"{on['device']}, {on['dtype']}", "versions": on["versions"], "seed": config.search.seed}
    told |= {"images": args.images, "drawn": drawn["coarse"], "full": drawn["full"], "effects": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "probing.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
