"""What a probe found, to look at and to read: heat maps of its table, and the best blocks in words."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm
from matplotlib.patches import Rectangle

from .probe import Table, best_blocks
from .run_directory import RunDirectory


def draw(run: RunDirectory) -> Path:
    """`probe.png`: a map of block x effect for each kind of prompt; a dot marks an interval that leaves out zero.

    The area of a cell is its share of the pictures: what was soon settled is small, for it is known less well.
    """
    table: Table = pd.read_parquet(run.path / "probe.parquet")
    num_blocks = int(table["block"].max()) + 1
    kinds, effects = list(dict.fromkeys(table["kind"])), list(dict.fromkeys(table["effect"]))
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.4 + columns * (1.2 + 0.28 * num_blocks), 0.6 + rows * (1.0 + 0.3 * len(effects))),
        layout="constrained", squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    share = table["n"] / table.groupby("kind")["n"].transform("max")
    limit = 100 * float(np.nanquantile((table["delta"].abs() * share**0.5), 0.98)) or 1.0
    # by the root: beside a text that is not heard at all, everything else would look alike
    root = FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda y: np.sign(y) * y**2), -limit, limit)
    colors = ScalarMappable(root, "RdBu")
    for axis, kind in zip(axes.flat, kinds, strict=False):
        of_kind = table[table["kind"] == kind].assign(share=share).groupby(["effect", "block"])
        for (effect, block), told in of_kind[["delta", "low", "high", "share"]].mean().iterrows():
            row, side = effects.index(effect), told["share"] ** 0.5
            corner = (block - side / 2, row - side / 2)
            axis.add_patch(Rectangle(corner, side, side, fc=colors.to_rgba(100 * told["delta"]), ec="white", lw=0.6))
            if told["low"] > 0 or told["high"] < 0:
                axis.plot(block, row, ".", ms=4, mfc="white", mec="#1f2430", mew=0.5)
        axis.set(xlim=(-0.5, num_blocks - 0.5), ylim=(len(effects) - 0.5, -0.5))
        axis.set_title(kind, loc="left", fontsize=10)
        axis.set_yticks(range(len(effects)), effects, fontsize=8)
        axis.set_xticks(range(0, num_blocks, max(1, num_blocks // 12)))
        axis.tick_params(length=0, labelsize=8)
        axis.spines[:].set_visible(False)
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("block", fontsize=9)
    bar = figure.colorbar(colors, ax=axes, shrink=0.8)
    bar.set_label("alignment against the unmodified model, points, shaded by the root", fontsize=9)
    bar.outline.set_visible(False)
    path = run.path / "probe.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def summary(run: RunDirectory) -> str:
    """What a probe found, in words: the best blocks of each effect, and what the controls gave."""
    table: Table = pd.read_parquet(run.path / "probe.parquet")
    count = run.load_config().probe.chosen
    lines = ["alignment against the unmodified model, points, with 95 % intervals"]
    for effect in dict.fromkeys(table["effect"]):
        rows = table[(table["effect"] == effect) & (table["kind"] == "all")].set_index("block")
        told = (f"{b} {_points(rows.loc[[b]].iloc[0])}" for b in best_blocks(table, effect, count))
        lines.append(f"{effect:<16} blocks " + ", ".join(told))
    if (run.path / "probe_sets.parquet").exists():
        lines += ["", "together, on held-out prompts"]
        sets: Table = pd.read_parquet(run.path / "probe_sets.parquet")
        for _, row in sets.iterrows():
            lines.append(f"{row['set']:<18} {row['effect']} at {[int(b) for b in row['blocks']]}: {_points(row)}")
    return "\n".join(lines)


def _points(row: Any) -> str:
    return f"{100 * row['delta']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
