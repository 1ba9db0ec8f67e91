"""What a person looks at after a search: the front as a picture, the picks beside the unmodified model, and a page."""

from pathlib import Path
from textwrap import wrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image, ImageDraw, ImageFont

from .config import Config
from .confirm import load_confirmed
from .front import Baseline, Confirmed, Point, beside_steps, held_out_name, is_fidelity
from .prompts import read_prompts
from .run_directory import RunDirectory

_DRAWN = (
    "A pick draws several pictures of a prompt, each from a seed of its own, and the best by an evaluator is kept: "
    "against one picture of the unmodified model, in points, with 95 % intervals for each alone; speed with the "
    "drawing of all and their scoring."
)
_INK, _GREY, _BLUE, _ORANGE = "#1f2430", "#a9b0bd", "#2563c9", "#d9621c"


def draw_front(
    points: list[Point], front: list[Point], baseline: Baseline, confirmed: list[Confirmed], margin: float, path: Path
) -> None:
    """Alignment against speed: what the search saw on the left, what held on new prompts on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.9), layout="constrained")
    members = {p.key for p in front}

    def place(p: Point) -> tuple[float, float]:
        return baseline.latency / p.latency, baseline.points(p)[0]

    others = [place(p) for p in points if p.key not in members]
    if others:
        left.scatter(*zip(*others, strict=True), s=22, color=_GREY, label="trials", linewidths=0)
    on_front = sorted(place(p) for p in front)
    left.plot(*zip(*on_front, strict=True), "o", ms=6, color=_BLUE, label="front (with quality as third objective)")
    for p in points:
        if p.anchor:
            left.plot(*place(p), "D", ms=7, mfc="none", mec=_INK, label="anchors" if p.name == "unmodified" else None)
    left.margins(x=0.12, y=0.12)
    left.set_title("Search prompts: what the search saw", loc="left", fontsize=11, color=_INK)
    left.set_xlabel("predicted speed-up")
    left.set_ylabel("alignment against the unmodified model, points")
    right.set_title("Held-out prompts, new seeds: what held", loc="left", fontsize=11, color=_INK)
    right.set_xlabel("measured speed-up")
    _draw_confirmed(right, confirmed, margin)
    for axis in (left, right):
        axis.axhline(0, color=_INK, lw=0.8, zorder=0)
        axis.axvline(1, color=_INK, lw=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, -1.0), max(high, 1.0))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_confirmed(axis: Axes, confirmed: list[Confirmed], margin: float) -> None:
    """Points with their intervals, numbered by speed, and the names beside the plot: points that meet stay legible."""
    (star,) = axis.plot(1, 0, "*", ms=13, color=_INK, ls="none")
    lost = axis.axhspan(-100 * margin, 0, color=_GREY, alpha=0.25, lw=0)
    handles, names = [star, lost], ["unmodified", f"margin, {100 * margin:.1f} points"]
    ordered = sorted(confirmed, key=lambda c: c.speedup)
    for number, c in enumerate(ordered, 1):
        delta, low, high = c.alignment.in_points
        color = _ORANGE if c.picks else _INK if c.anchor else _BLUE
        handles.append(
            axis.errorbar(
                c.speedup,
                delta,
                [[delta - low], [high - delta]],
                fmt="D" if c.anchor else "o",
                ms=7 if c.picks or c.anchor else 5,
                color=color,
                mfc="none" if c.anchor else color,
                capsize=3,
                lw=1.2,
            )
        )
        names.append(f"{number}  " + (f"{' / '.join(c.picks)}  ({c.name})" if c.picks else c.name))
    axis.margins(x=0.12, y=0.12)
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top + 0.1 * (top - bottom))  # the margin above all intervals is where lines may slant
    start, end = axis.get_xlim()
    gap = min(0.035, 1 / max(1, len(ordered)))
    places = apart(np.array([(c.speedup - start) / (end - start) for c in ordered]), gap)
    for number, (c, place) in enumerate(zip(ordered, places, strict=True), 1):
        above = start + place * (end - start)
        line = [(above, top + 0.05 * (top - bottom)), (c.speedup, top), (c.speedup, c.alignment.in_points[2])]
        axis.plot(*zip(*line, strict=True), color=_GREY, lw=0.8, zorder=1)
        axis.text(
            above,
            top + 0.055 * (top - bottom),
            str(number),
            ha="center",
            va="bottom",
            fontsize=9,
            color=_ORANGE if c.picks else _INK,
            fontweight="bold" if c.picks else "normal",
        )
    axis.set_xlim(start, end)
    key = axis.legend(
        handles, names, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, labelcolor=_INK
    )
    for text, c in zip(key.get_texts()[2:], ordered, strict=True):
        if c.picks:
            text.set(color=_ORANGE, fontweight="bold")


def apart(places: np.ndarray, gap: float) -> np.ndarray:
    """Sorted `places` `(n,)` in [0, 1], moved where they crowd: at least `gap` between any two, in the same order.

    As many must have room: `gap` is at most 1 / n.
    """
    steps = gap * np.arange(len(places))
    right = np.maximum.accumulate(places - steps)  # when each makes room for those before it
    left = np.minimum.accumulate((places - steps)[::-1])[::-1]  # and for those behind it
    return steps + ((left + right) / 2).clip(0, 1 - gap * (len(places) - 1))


def side_by_side(columns: dict[str, np.ndarray], captions: list[str], path: Path, tile: int = 144) -> None:
    """A picture with one row per prompt and one column per name, pictures uint8 `(n, h, w, 3)`; small ones enlarged."""
    font = ImageFont.load_default(15)
    gutter, head, side = 8, 34, 260
    height, width = next(iter(columns.values())).shape[1:3]
    scale = max(1, round(tile / max(height, width)))
    tall, wide = height * scale, width * scale
    sheet = Image.new("RGB", (side + len(columns) * (wide + gutter), head + len(captions) * (tall + gutter)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, images) in enumerate(columns.items()):
        x = side + column * (wide + gutter)
        draw.text((x, 8), name, fill=_INK, font=font)
        for row in range(len(captions)):
            picture = Image.fromarray(images[row]).resize((wide, tall), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, head + row * (tall + gutter)))
    for row, caption in enumerate(captions):
        words, lines = caption.split(), [""]
        for word in words:
            if draw.textlength(f"{lines[-1]} {word}", font=font) > side - 16:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        y = head + row * (tall + gutter) + (tall - 19 * len(lines)) / 2
        draw.multiline_text((8, y), "\n".join(lines), fill=_INK, font=font, spacing=4)
    sheet.save(path)


def draw_comparison(run: RunDirectory, confirmed: list[Confirmed]) -> None:
    """The picks, without any all policies, beside the unmodified model: held-out prompts, a row per kind."""
    prompts = read_prompts(run.load_config(), "confirm")
    rows = list({p.kind: i for i, p in reversed(list(enumerate(prompts[:48])))}.values())[::-1]
    columns = {"unmodified": run.read_images("confirm-unmodified")[rows]}
    shown = [c for c in confirmed if c.picks] or [c for c in confirmed if c.rules]
    for c in sorted(shown, key=lambda c: c.speedup):
        columns[f"{'/'.join(c.picks) or c.name}  {c.speedup:.2f}x"] = run.read_images(held_out_name(c))[rows]
    side_by_side(columns, [prompts[i].text for i in rows], run.compare)


def summary(run: RunDirectory) -> str:
    """The confirmed candidates as lines of text, slowest first, and what is picked."""
    record, confirmed = load_confirmed(run)
    config = run.load_config()
    objectives = config.objectives
    rows = [("candidate", "steps", "speed-up", f"{objectives.alignment}", f"{objectives.quality}", "pick")]
    for c in sorted(confirmed, key=lambda c: c.speedup):
        told = ", ".join(c.picks) or ("held" if c.holds(record["margin"], record["quality_margin"]) else "")
        steps = f"{c.steps}{beside_steps(c.guidance_scale)}"
        rows.append((c.name, steps, f"{c.speedup:.2f}x", c.alignment.points, c.quality.points, told))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if confirmed:
        count, lost, blurred = confirmed[0].alignment.n, 100 * record["margin"], 100 * record["quality_margin"]
        lines += [
            "",
            f"Points against the unmodified model on {count} held-out pictures, intervals 95 % for all together;",
            f"speed as timed. Held: by their intervals, {objectives.alignment} can have lost at most {lost:.1f} points",
            f"and {objectives.quality} {blurred:.1f}.",
        ]
    drawn = [f"{', '.join(c.picks)}, {line}" for c in confirmed for line in _best_of(c, config)]
    lines += [part for line in drawn for part in ("", *wrap(line, 100, subsequent_indent="  "))]
    if not any(c.picks for c in confirmed):
        lines.append("Nothing that held was better or faster than the unmodified model: nothing is picked.")
    return "\n".join(lines)


def write_report(run: RunDirectory, facts: dict[str, str]) -> None:
    """`report.md`: what was confirmed, the picks, and what it was measured on."""
    record, confirmed = load_confirmed(run)
    config = run.load_config()
    lines = [f"# {config.name}", ""]
    picks = [c for c in confirmed if c.picks]
    if picks:
        lines.append("Picks, chosen from what held on prompts and seeds that the search never saw:")
        lines += [""] + [
            f"* **{' / '.join(c.picks)}** ({c.name}): {c.speedup:.2f}x, alignment {c.alignment.points} points"
            for c in picks
        ]
    else:
        lines.append(
            "**Nothing beat the unmodified model** on held-out prompts within the margins, so nothing is picked."
        )
    lines += [
        "",
        "![front](front.png)",
        "",
        "![policies beside the unmodified model](compare.png)",
        "",
        "## Held-out prompts, new seeds",
        "",
    ]
    names = [config.objectives.alignment, config.objectives.quality, *config.objectives.reported]
    apart = all(c.transformer_speedup for c in confirmed)  # not so in runs of before
    speeds = ["speed-up, measured (predicted)", *(["transformer alone"] if apart else [])]
    lines.append("| " + " | ".join(["candidate", "steps", *speeds, *names, "held", "pick"]) + " |")
    lines.append("|" + "---|" * (len(speeds) + len(names) + 4))
    for c in confirmed:
        cells = [c.alignment.points, c.quality.points, *(_interval_of(n, c) for n in config.objectives.reported)]
        held = "yes" if c.holds(record["margin"], record["quality_margin"]) else "no"
        alone = f"{c.transformer_speedup:.2f}x | " if apart else ""
        lines.append(
            f"| {c.name} | {c.steps}{beside_steps(c.guidance_scale)} | {c.speedup:.2f}x ({c.predicted_speedup:.2f}x) | "
            + alone
            + " | ".join(cells)
            + f" | {held} | {', '.join(c.picks)} |"
        )
    count = confirmed[0].alignment.n if confirmed else 0
    robustness = [line for c in picks for line in _robustness(c)]
    drawn = [f"* **{' / '.join(c.picks)}**, {line}" for c in picks for line in _best_of(c, config)]
    lines += [
        "",
        f"Differences to the unmodified model in points{_scales(confirmed, config)}, paired by prompt and seed "
        f"over {count} pictures, with {100 * record['level']:.1f} % intervals: 95 % for all {len(confirmed)} together. "
        f"A candidate held when alignment can have lost at most {100 * record['margin']:.1f} points and quality "
        f"{100 * record['quality_margin']:.1f}. "
        "A number alone is the likeness to the unmodified picture, psnr in dB.",
        "",
        *_tests(confirmed, config),
        *(["## Beyond the picks themselves", "", *robustness, ""] if robustness else []),
        *(["## What the time saved buys", "", _DRAWN, "", *drawn, ""] if drawn else []),
        "## Measured on",
        "",
        *(f"* {key}: {value}" for key, value in facts.items()),
    ]
    run.write_text(run.report, "\n".join(lines) + "\n")


def _tests(confirmed: list[Confirmed], config: Config) -> list[str]:
    """A table of p-values, of the bootstrap beside the t interval, of CMMD and FID; nothing for runs of before."""
    if not any(c.p_values for c in confirmed):
        return []
    alignment, names = config.objectives.alignment, list(confirmed[0].p_values)
    told = [name for name in ("CMMD", "FID") if any(getattr(c, name.lower()) is not None for c in confirmed)]
    rows = [["candidate", f"{alignment}, by bootstrap", *(f"p of {name}" for name in names), *told]]
    for c in confirmed:
        cells = [c.bootstrap.points if c.bootstrap else "", *(f"{c.p_values[name]:.2g}" for name in names)]
        values = (getattr(c, distance.lower()) for distance in told)
        rows.append([c.name, *cells, *("" if value is None else f"{value:.3g}" for value in values)])
    rows.insert(1, ["---"] * len(rows[0]))
    exact = "; of scores of 0 and 1 by McNemar's exact test, where pictures of a prompt change sides together"
    return [
        "## Tests of these differences",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"p-values, two-sided, are Holm-corrected over all {len(confirmed)} candidates: of {alignment} by a paired "
        f"t test over prompts{exact if len(names) > 1 else ''}. The bootstrap draws whole prompts, at the level above."
        + (
            f" {' and '.join(told)}: a candidate's held-out pictures against the unmodified model's, as sets: 0 for "
            "equal ones."
            if told
            else ""
        ),
        "",
    ]


def _scales(confirmed: list[Confirmed], config: Config) -> str:
    """What a point is, of scores that do not fill [0, 1] one by one."""
    widths = {name: interval.scale for c in confirmed[:1] for name, interval in c.intervals(config.objectives).items()}
    others = [f"; 100 points of {n} are {w:g}" for n, w in widths.items() if w != 1 and not is_fidelity(n)]
    return f" (hundredths of the score{''.join(others)})"


def _robustness(c: Confirmed) -> list[str]:
    """What the neighbours of a pick lost, and what it does at other settings."""
    name, lines = " / ".join(c.picks), []
    if c.neighbours:
        worst = f"alignment {100 * c.neighbours['alignment']:+.1f}, quality {100 * c.neighbours['quality']:+.1f} points"
        lines.append(f"* **{name}**, the worst of {c.neighbours['count']} neighbours on the search prompts: {worst}")
    for told in c.transfer:
        setting = ", ".join(f"{key} {value}" for key, value in told["setting"].items())
        lines.append(f"* **{name}** at {setting}: alignment {told['alignment']}, quality {told['quality']} points")
    return lines


def _best_of(c: Confirmed, config: Config) -> list[str]:
    """What a pick gains by several pictures in the time of one."""
    names = dict.fromkeys((config.objectives.alignment, config.objectives.quality, *config.objectives.reported))
    return [
        f"the best of {told['count']} by {told['by']}, {told['speedup']:.2f}x: "
        + ", ".join(f"{name} {told[name]}" for name in names if name in told)
        for told in c.best_of
    ]


def _interval_of(name: str, confirmed: Confirmed) -> str:
    interval = confirmed.reported[name]
    if not is_fidelity(name):
        return interval.points
    return f"{interval.value:.1f} dB" if name == "psnr" else f"{interval.value:.3f}"
