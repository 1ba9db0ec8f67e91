"""Alignment against measured speed, a line per method."""

from pathlib import Path

import matplotlib.pyplot as plt


def draw(settings: list[tuple[str, float, float]], path: Path) -> None:
    """`settings` are method, speed-up and points of alignment against the unmodified model; random sets are dots."""
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axis.axhline(0, color="#c8ccd4", lw=1)
    methods = list(dict.fromkeys(method for method, _, _ in settings))
    for number, method in enumerate(methods):
        points = sorted((speed, gain) for name, speed, gain in settings if name == method)
        speeds, gains = zip(*points, strict=True)
        if method == "random sets":
            axis.plot(speeds, gains, ".", color="#c8ccd4", ms=5, label=method, zorder=0)
            continue
        ours = method == "blocktune"
        axis.plot(
            speeds, gains, "o-", ms=6 if ours else 3.5, lw=2.2 if ours else 1, label=method,
            color="#1f2430" if ours else plt.get_cmap("tab10")(number % 10), zorder=3 if ours else 2,
        )  # fmt: skip
    axis.set_xlabel("speed-up, measured")
    axis.set_ylabel("alignment on held-out prompts, points")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
