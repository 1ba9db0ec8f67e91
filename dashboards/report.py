"""The page as one file: the same drawing, with the server's answers carried along."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from ..search.config import ConfigError
from . import pictures
from .answers import answer
from .block_map import policy_file
from .files import Missing, RunFiles, Unreadable
from .page import static

LIMIT = 5 << 20  # bytes: what mail servers let through
_ENDS = (24, 12, 6, 3, 1, 0)  # pictures from each end of the order, the most that fit


def write_report(root: Path, output: Path) -> None:
    """Write the run in `root` as one HTML file of at most 5 MiB. Raises ConfigError where there is no run to report."""
    files = RunFiles(root)
    standing = answer(files, "api/run") if root.is_dir() else {"sentence": f"{root} is no folder."}
    if "trials" not in standing:
        raise ConfigError(f"{root} cannot be reported: {standing['sentence']}")
    carried, galleries = _candidates(files, standing)
    pieces = {kind: static(name).decode() for kind, name in (("style", "style.css"), ("script", "page.js"))}
    for ends in _ENDS:
        page = _page(carried | _pictures(files, galleries, ends), pieces)
        if len(page) <= LIMIT:
            break
    try:
        output.write_bytes(page)
    except OSError as error:
        raise ConfigError(f"--output is {output}, which cannot be written: {error.strerror}.") from None


def _candidates(files: RunFiles, standing: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answers on the run, the confirmed candidates and the front, with their files; and who has pictures."""
    carried: dict[str, Any] = {"api/run": standing}
    if standing["probe"]:
        carried["api/probe"] = answer(files, "api/probe")
    trials, galleries = standing["trials"], []
    on_front = [slug for slug, front in zip(trials["slug"], trials["front"], strict=True) if front]
    for slug in dict.fromkeys([c["slug"] for c in standing["confirmed"]] + on_front[:60]):
        try:
            told = answer(files, f"api/candidates/{slug}")
            carried |= {f"api/candidates/{slug}": told, f"api/plans/{slug}": answer(files, f"api/plans/{slug}")}
            for name in told["files"]:
                text = base64.b64encode(policy_file(files, name)).decode()
                carried[f"policies/{name}.json"] = f"data:application/json;base64,{text}"
        except (Missing, Unreadable):
            continue  # a candidate whose files are gone is left out; the page says so where it is asked for
        if told["pictures"]["count"]:
            galleries.append(told)
    return carried, galleries


def _pictures(files: RunFiles, galleries: list[dict[str, Any]], ends: int) -> dict[str, str]:
    """The pairs of each candidate that lost most and gained most, as WebP."""
    found: dict[str, str] = {}
    for told in galleries:
        before, after, count = told["pictures"].values()
        pairs = told["pairs"]
        gains = [b - a for a, b in zip(pairs["alignment_before"], pairs["alignment_after"], strict=True)][:count]
        order = sorted(range(count), key=lambda i: (gains[i], i))
        for index in {*order[:ends], *order[count - min(ends, count) :]}:
            for name in (before, after):
                if (address := f"pictures/{name}/{index}.png") not in found:
                    image = base64.b64encode(pictures.webp(files, name, index)).decode()
                    found[address] = f"data:image/webp;base64,{image}"
    return found


def _page(carried: dict[str, Any], pieces: dict[str, str]) -> bytes:
    """`index.html` with style, script and answers inside, allowed to run nothing but that script."""
    hashes = {k: base64.b64encode(hashlib.sha256(v.encode()).digest()).decode() for k, v in pieces.items()}
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    # within a script element "<" alone could end it, whatever a prompt says
    data = json.dumps(carried, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    allowed = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    answers = f'<script type="application/json" id="answers">{data}</script>'
    script = f'<script type="module">{pieces["script"]}</script>'
    replaced = {
        '<meta charset="utf-8">': f'<meta charset="utf-8">\n{allowed}',
        '<link rel="stylesheet" href="style.css">': f"<style>{pieces['style']}</style>",
        '<script type="module" src="page.js"></script>': f"{answers}\n{script}",
    }
    page = static("index.html").decode()
    for old, new in replaced.items():
        before, found, after = page.partition(old)
        assert found, old
        page = before + new + after
    return page.encode()
