"""What a probe found, to look at and to read: heat maps of its table, and the best blocks in words."""

import math
from itertools import product
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

from .controls import uncontrolled
from .part import EFFECTS, Table, at_window
from .probe import best_blocks
from .run_directory import RunDirectory

GAP = 0.35  # between the rows of one effect and those of the next, where there are several windows


def draw(run: RunDirectory) -> Path:
    """`probe.png`: a map of block x effect for each kind of prompt; a dot marks an interval that leaves out zero.

    An effect has a row for each window. The area of a cell is its share of the pictures: what was soon settled is
    small, for it is known less well.
    """
    table: Table = pd.read_parquet(run.path / "probe.parquet")
    num_blocks = int(table["block"].max()) + 1
    kinds, effects, windows = (list(dict.fromkeys(table[name])) for name in ("kind", "effect", "window"))
    # rows of an effect lie together, so that one sees when in the run a block matters
    height = {
        (effect, window): i * (len(windows) + GAP * (len(windows) > 1)) + j
        for i, effect in enumerate(effects)
        for j, window in enumerate(windows)
    }
    first = [at_window(e, w) if len(windows) == 1 else f"{e}  {w}" for e, w in height]
    names = [name if w == windows[0] else w for name, (_, w) in zip(first, height, strict=True)]
    columns, bottom = min(3, len(kinds)), max(height.values())
    rows = math.ceil(len(kinds) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.4 + columns * (1.2 + 0.28 * num_blocks), 0.6 + rows * (1.3 + 0.3 * bottom)),
        layout="constrained", squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    table["share"] = table["n"] / table.groupby("kind")["n"].transform("max")
    limit = 100 * float(np.nanquantile((table["delta"].abs() * table["share"] ** 0.5), 0.98)) or 1.0
    # by the root: beside a text that is not heard at all, everything else would look alike
    root = FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda y: np.sign(y) * y**2), -limit, limit)
    colors = ScalarMappable(root, "RdBu")
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for _, told in table[table["kind"] == kind].iterrows():
            row, side = height[told["effect"], told["window"]], told["share"] ** 0.5
            corner = (told["block"] - side / 2, row - side / 2)
            axis.add_patch(Rectangle(corner, side, side, fc=colors.to_rgba(100 * told["delta"]), ec="white", lw=0.6))
            if told["low"] > 0 or told["high"] < 0:
                axis.plot(told["block"], row, ".", ms=4, mfc="white", mec="#1f2430", mew=0.5)
        axis.set(xlim=(-0.5, num_blocks - 0.5), ylim=(bottom + 0.5, -0.5))
        axis.set_title(kind, loc="left", fontsize=10)
        axis.set_yticks([*height.values()], names, fontsize=8)
        axis.set_xticks(range(0, num_blocks, max(1, num_blocks // 12)))
        axis.tick_params(length=0, labelsize=8)
        axis.spines[:].set_visible(False)
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(kinds) - columns) : len(kinds)]:  # the lowest of each column
        axis.set_xlabel("block", fontsize=9)
        axis.tick_params(labelbottom=True)
    bar = figure.colorbar(colors, ax=axes, shrink=0.8, fraction=0.02, aspect=6 * figure.get_figheight())
    bar.set_label("alignment against the unmodified model, points, shaded by the root", fontsize=9)
    bar.outline.set_visible(False)
    path = run.path / "probe.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def summary(run: RunDirectory) -> str:
    """What a probe found, in words: the best blocks of each effect in each window, and what the controls gave."""
    table: Table = pd.read_parquet(run.path / "probe.parquet")
    count = run.load_config().probe.chosen
    lines = ["alignment against the unmodified model, points, with 95 % intervals"]
    effects, windows = (list(dict.fromkeys(table[name])) for name in ("effect", "window"))
    for effect, window in product(effects, windows):
        rows = table[(table["kind"] == "all") & (table["effect"] == effect) & (table["window"] == window)]
        by_block = rows.set_index("block")
        told = (f"{b} {_points(by_block.loc[b])}" for b in best_blocks(rows, effect, count))
        lines.append(f"{at_window(effect, window):<22} blocks " + ", ".join(told))
    if not (run.path / "probe_sets.parquet").exists():
        return "\n".join(lines)
    sets: Table = pd.read_parquet(run.path / "probe_sets.parquet")
    lines += ["", "together, on held-out prompts"]
    for _, of in sets.groupby("effect", sort=False):
        lines += [f"{row['set']:<18} {_where(row, of)}: {_points(row)}" for _, row in of.iterrows()]
        lines += _beaten(of)
    controlled = list(dict.fromkeys(sets["effect"][sets["set"] == "chosen"]))
    return "\n".join([*lines, uncontrolled(effects, controlled)]).rstrip()


def _where(row: Any, alike: Table) -> str:
    if row["steps"] < alike["steps"].max():
        return f"every block computed, at {row['steps']} steps"
    blocks = "every block, at the same budget" if row["set"] == "all" else [int(b) for b in row["blocks"]]
    return f"{at_window(row['effect'], row['window'])} at {blocks}"


def _beaten(of: Table) -> list[str]:
    """Whether the chosen blocks of an effect are better, or need the text more, than random ones."""
    chosen, random = of[of["set"] == "chosen"], of[of["set"].str.startswith("random")]
    if chosen.empty or random.empty:
        return []
    sign = EFFECTS[of["effect"].iloc[0]][1]
    beaten = int((sign * random["delta"] < sign * chosen["delta"].iloc[0]).sum())
    return [f"{'':<18} the chosen {'gain' if sign > 0 else 'lose'} more than {beaten} of {len(random)} random sets"]


def _points(row: Any) -> str:
    if math.isnan(row["low"]):  # pictures of one prompt
        return f"{100 * row['delta']:+.1f}"
    return f"{100 * row['delta']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
