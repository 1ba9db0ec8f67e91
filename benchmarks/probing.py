"""What probing coarse to fine spares and what it misses: python benchmarks/probing.py [--images 96] [--out FOLDER]

The bundled model is probed twice, every block on all pictures and coarse to fine, with the same prompts and seeds. Told
are the share of the pictures and, per effect, how many of the best blocks are the same. Since blocks often differ by
less than the pictures can tell, also by how many points those found do worse on all pictures than the best do there, on
average, beside half of the 95 % interval of one block's difference.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
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
        "effect": effect, "best": true, "found": found, "same": len(set(true) & set(found)),
        "points_lost": float(gains.loc[true].mean() - gains.loc[found].mean()), "half_interval": float(half),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=Probe().images, help="that count as all pictures of a block")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="KEY=VALUE of the config")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of probing.json")
    args = parser.parse_args()
    tables = {}
    with tempfile.TemporaryDirectory() as place:
        for name, group in (("full", 1), ("coarse", Probe().group)):
            pictures_of = [f"probe.images={args.images}", f"prompts.search_images={args.images}"]
            overrides = [*args.overrides, *pictures_of, f"probe.group={group}", "probe.random_sets=0"]
            run = launch_probe(load_config(None, overrides), Path(place) / name)
            tables[name] = pd.read_parquet(run.path / "probe.parquet")
        config, on = run.load_config(), run.read_state()
    rows = [compare(tables["full"], tables["coarse"], e, config.probe.chosen) for e in config.probe.effects]
    blocks = int(tables["full"]["block"].max()) + 1
    drawn = [pictures(config.probe.model_copy(update={"group": g}), blocks, args.images) for g in (Probe().group, 1)]
    print(f"{drawn[0]} of {drawn[1]} pictures, {100 * drawn[0] / drawn[1]:.1f} %")
    for row in rows:
        print(
            f"{row['effect']:<16} best {row['best']}, found {row['found']}: {row['same']} the same, "
            f"{row['points_lost']:.2f} points lost; one block's interval is +-{row['half_interval']:.2f}"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    told = {"device": f"{device}, {on['dtype']}", "torch": torch.__version__, "seed": config.search.seed}
    told |= {"images": args.images, "drawn": drawn[0], "full": drawn[1], "effects": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "probing.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
