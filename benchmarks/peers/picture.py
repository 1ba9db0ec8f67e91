"""Alignment against measured speed: of each method the settings that none of its own beats."""

from pathlib import Path

import matplotlib.pyplot as plt

LOWEST = -12.0  # points; what loses more is told by an arrow at the rim, and would press all else into one line


def unbeaten(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (speed-up, points) those that no other matches on both, slowest first."""
    best: list[tuple[float, float]] = []
    for speed, gain in sorted(points, reverse=True):
        if not best or gain > best[-1][1]:
            best.append((speed, gain))
    return best[::-1]


def draw(settings: list[tuple[str, float, float]], path: Path) -> None:
    """`settings` are method, speed-up and points of alignment against the unmodified model; random sets are dots."""
    figure, axis = plt.subplots(figsize=(10, 5.6), layout="constrained")
    axis.axhline(0, color="#c8ccd4", lw=1)
    axis.plot(1, 0, "*", ms=14, color="#d9621c", zorder=4)
    methods = [m for m in dict.fromkeys(method for method, _, _ in settings) if m != "random sets"]
    for number, method in enumerate(methods):
        points = [(speed, gain) for name, speed, gain in settings if name == method]
        ours = method == "blocktune"
        color = "#1f2430" if ours else plt.get_cmap("tab20")(2 * number % 20 + number // 10)
        inside = [p for p in points if p[1] >= LOWEST]
        axis.plot(*zip(*inside, strict=True), "o", ms=3.5, alpha=0.35, color=color, mew=0)
        for speed, gain in points:
            if gain < LOWEST:
                axis.plot(speed, LOWEST, "v", ms=6, color=color, clip_on=False)
                axis.annotate(
                    f"{gain:.0f}", (speed, LOWEST), (6, 3), textcoords="offset points", fontsize=8, color=color
                )
        best = [p for p in unbeaten(points) if p[1] >= LOWEST]
        axis.plot(
            *zip(*best, strict=True), "o-", ms=7 if ours else 4.5, lw=2.6 if ours else 1.2, label=method, color=color,
            zorder=3 if ours else 2,
        )  # fmt: skip
    random = [(speed, gain) for name, speed, gain in settings if name == "random sets" and gain >= LOWEST]
    if random:
        axis.plot(*zip(*random, strict=True), "x", color="#a9b0bd", ms=4, label="random sets, louder", zorder=0)
    axis.set_ylim(bottom=LOWEST)
    axis.set_xlabel("speed-up, measured")
    axis.set_ylabel("alignment on held-out prompts, points")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(1.0, 0.0))
    figure.savefig(path, dpi=130)
    plt.close(figure)
