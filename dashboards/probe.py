"""What the probe found: the effect of each block by itself, per kind of prompt."""

from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from .files import RunFiles, Unreadable

COLUMNS = ("block", "effect", "window", "kind", "delta", "low", "high", "n")


def read_probe(files: RunFiles) -> dict[str, list[Any]]:
    """The columns of `probe.parquet`, differences in points; a window is told as text. Raises Unreadable."""
    try:
        table = parquet.read_table(files.path("probe.parquet"), columns=list(COLUMNS)).to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        raise Unreadable(f"probe.parquet cannot be read: {' '.join(str(error).split())[:200]}.") from None
    table["window"] = [
        w if isinstance(w, str) else "" if w is None else f"{w[0]:g} to {w[1]:g}" for w in table["window"]
    ]
    for name in ("delta", "low", "high"):
        table[name] = [None if x is None or x != x else round(100 * float(x), 4) for x in table[name]]
    return table
