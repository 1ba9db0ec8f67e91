"""Candidates that a search tries first: known ways to save time taken together, lists of blocks that were published,
and what a probe of this model suggests.

Each is spelled as choices of the space, and left out where the space does not have them: a probe tells of blocks in
windows, a band does what its blocks suggest, and a window stands for the one of the space that it shares most with.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from ..policies.policy import WHOLE_RUN, ModelIdentity
from .config import Config, ConfigError
from .part import Window, window_of
from .space import (
    NEVER,
    anchors,
    bands,
    distributions,
    guidance_ends_of,
    longest_window,
    steps_of,
    text_windows,
)

C = TypeVar("C")
COLUMNS = ("block", "effect", "window", "kind", "delta")
# Class of the transformer, its blocks, the blocks whose text input is scaled, by how much, and where it is from.
PUBLISHED = (
    ("FluxTransformer2DModel", 57, (2, 7, 12, 17, 22), 1.5, "FLUX [2,7,12,17,22] x1.5"),  # arXiv 2601.02211, README
    # arXiv 2602.13585: 1, 15, 36, 41 and 48 where the first block is 1
    ("FluxTransformer2DModel", 57, (0, 14, 35, 40, 47), 1.5, "Diff-Aid [0,14,35,40,47] x1.5"),
)


def read_probe(config: Config) -> Any:
    """The table that `search.prior` names, None where it names none; ConfigError for what is not a probe's."""
    path = config.search.prior
    if path is None:
        return None
    try:
        table = pd.read_parquet(path)
        known = {*COLUMNS} <= {*table.columns}
        for name in table["window"].unique() if known else ():
            window_of(name)
    except OSError as error:
        told = error.strerror or "no such file"  # pandas leaves it out
        raise ConfigError(f"search.prior is {path!r}, which cannot be read: {told}.") from None
    except ValueError:
        known = False
    if not known:
        raise ConfigError(f"search.prior is {path!r}; accepted: the probe.parquet that blocktune probe writes.")
    return table


def prior(config: Config, model: ModelIdentity) -> dict[str, dict[str, Any]]:
    """Choices of the space by where they are from."""
    probe = read_probe(config)
    told = suggested(probe, config, model.num_blocks) if probe is not None else {}
    return published(config, model) | told | combined(config, model.num_blocks)


def combined(config: Config, num_blocks: int) -> dict[str, dict[str, Any]]:
    """Fewer steps, late reuse of every block and a shorter guidance, as the anchors have them, two or three at once.

    What each spares is known to add up, while a sampler has to find the same choice for every band on its own. Beside
    the rarest late reuse of the anchors stands one of the middle, as the space can better it: with a forecast, and with
    nothing computed near the end.
    """
    known, space = anchors(config, num_blocks), config.space
    plain, ends, lasts = known["unmodified"], guidance_ends_of(config), sorted({*space.compute_until})
    last = lasts[len(lasts) // 2] if lasts else 1.0

    def reuse(every: int) -> dict[str, Any]:
        return {f"reuse_{i}": every for i in range(len(bands(space, num_blocks)))}

    reuses = {"": {}} | {f"late reuse {every}": reuse(every) for every in space.reuse_every[-1:]}
    if space.reuse_every and (space.forecast or last < 1):
        every = space.reuse_every[(len(space.reuse_every) - 1) // 2]
        name = f"late {'forecast' if space.forecast else 'reuse'} {every}" + f" until {last:g}" * (last < 1)
        reuses[name] = reuse(every) | {"forecast": space.forecast, "compute_until": last}
    points = {}
    shorter = ends[len(ends) // 2 :][:1]
    for steps, (name, reusing), end in product(steps_of(config), reuses.items(), (1.0, *shorter)):
        if reusing.get("forecast") and shorter and end == 1:  # followed once guidance has ended
            continue
        told = [f"{steps} steps"] * (steps < plain["steps"]) + [name] * bool(name)
        told += [f"guidance until {end:g}"] * (end < 1)
        if len(told) > 1 or (told == [name] and name not in known):
            points[", ".join(told)] = plain | reusing | {"steps": steps, "guidance_until": end}
    return points


def suggested(table: Any, config: Config, num_blocks: int) -> dict[str, dict[str, Any]]:
    """What a probe's `table` suggests, by origin: louder text for each operand, reuse, both, and a skipped block.

    Of each probed window by itself, which the origin names where there are several.
    """
    if table["block"].max() >= num_blocks:
        told = f"has a block {table['block'].max()}; this model's are 0 to {num_blocks - 1}"
        raise ConfigError(f"search.prior is {config.search.prior!r}, which {told}.")
    told = table[table["kind"] == "all"]
    names = dict.fromkeys(told["window"])
    points: dict[str, dict[str, Any]] = {}
    for name in names:
        of_window = told[told["window"] == name]
        effects = {effect: rows.set_index("block")["delta"] for effect, rows in of_window.groupby("effect")}
        where = f" {name}" if len(names) > 1 else ""
        for origin, point in _suggested(effects, window_of(name), config, num_blocks).items():
            if point not in points.values():
                points[f"probe: {origin}{where}"] = point
    return points


def _suggested(effects: dict[str, Any], window: Window, config: Config, num_blocks: int) -> dict[str, dict[str, Any]]:
    """What the differences of blocks by effect, in one window, suggest for that window."""
    space, plain = config.space, anchors(config, num_blocks)["unmodified"]
    groups = bands(space, num_blocks)
    points: dict[str, dict[str, Any]] = {}
    gains: dict[str, float] = {}
    text_window = nearest(window, text_windows(space))
    for operand in space.operands if text_window else ():
        best = effects.get(f"enhance {operand}", pd.Series(dtype=float)).nlargest(config.probe.chosen)
        best = best[best > 0]
        if len(best):
            scale, name = min(config.probe.scale, space.max_scale), f"louder {operand}"
            louder = {f"scale_{i}": scale for i, blocks in enumerate(groups) if set(blocks) & set(best.index)}
            points[name] = plain | {"operand": operand, "text_window": text_window} | louder
            gains[name] = float(best.sum())
    # what is found of the whole run is no reason to begin early or late
    starts = (plain["reuse_from"],) if window == WHOLE_RUN else space.reuse_from
    start = nearest(window, {start: (start, 1.0) for start in starts})
    if "reuse" in effects and space.reuse_every and start is not None:
        # blocks that the table does not have are taken for those that reuse harms most
        harmless = [effects["reuse"].reindex(blocks).mean() for blocks in groups]
        kept = np.argsort(-np.nan_to_num(harmless, nan=-np.inf), kind="stable")[: (len(groups) + 1) // 2]
        reuse: dict[str, Any] = {f"reuse_{i}": max(space.reuse_every) for i in kept if not np.isnan(harmless[i])}
        reuse |= {"reuse_from": start}
        points["reuse"] = plain | reuse
        if gains:
            points["reuse and louder"] = points[max(gains, key=gains.__getitem__)] | reuse
    if "remove" in effects and space.skip:
        choices = distributions(config, num_blocks)["skip_from"]
        starts = (0.5,) if window == WHOLE_RUN else getattr(choices, "choices", ())
        start = nearest(window, {start: (start, 1.0) for start in starts if start < NEVER})
        if start is not None:
            points["skip"] = plain | {"skip": int(effects["remove"].idxmax()), "skip_from": start}
    return points


def nearest(window: Window, choices: Mapping[C, Window]) -> C | None:
    """The choice whose window shares most with `window`; None where that is less than half of what both span.

    What was found in a part of the run tells little of another part. The whole run has a say in all.
    """

    def shared(name: C) -> float:
        (start, end), (first, last) = window, choices[name]
        return max(0.0, min(end, last) - max(start, first)) / (max(end, last) - min(start, first))

    best = max(choices, key=shared, default=None)
    return best if best is not None and (window == WHOLE_RUN or shared(best) >= 0.5) else None


def published(config: Config, model: ModelIdentity) -> dict[str, dict[str, Any]]:
    """Published lists for this model, where the space has a band for every block and what else they take."""
    space, points = config.space, {}
    for transformer, num_blocks, blocks, scale, origin in PUBLISHED:
        fits = (model.transformer, model.num_blocks) == (transformer, num_blocks) and space.bands >= num_blocks
        longest = longest_window(space)
        whole = text_windows(space)[longest] == WHOLE_RUN
        if fits and "input" in space.operands and whole and scale <= space.max_scale:
            louder = {"operand": "input", "text_window": longest} | {f"scale_{b}": scale for b in blocks}
            points[origin] = anchors(config, num_blocks)["unmodified"] | louder
    return points
