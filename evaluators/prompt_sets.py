"""Prompt sets by name or path, in the formats their authors publish them in.

GenEval's `evaluation_metadata.jsonl`, T2I-CompBench++'s text files, PartiPrompts' tsv, and this project's own JSON
lines and shipped set. Nothing is downloaded: the files are the user's copies.
"""

import csv
import json
from itertools import cycle, islice
from pathlib import Path

from .metadata import read_metadata
from .prompts import Prompt, load_prompts

_SPLIT_NAMES = ("_val", "_train")


def read_prompt_set(source: str | Path, split: str, count: int | None = None) -> tuple[Prompt, ...]:
    """The first `count` prompts, all when not given, of `compositional`, or of a file, for `split`.

    A file's format is told by its name, and a `.jsonl` by its first line:

    * `.jsonl` of text, kind and seed: this project's own, seeds included.
    * `.jsonl` of GenEval: the kind is its tag.
    * `.txt` of T2I-CompBench++, a sentence a line: the kind is the file's name without `_val`.
    * `.tsv` of PartiPrompts: the kind is its Category.

    The latter three have no seeds: each prompt gets one of its own, other ones in each of the splits `search`,
    `confirm` and `test`; with a larger `count` than there are prompts, they come again with new seeds. ValueError for
    anything else, OSError for a file that cannot be read.
    """
    from .compositional import FIRST_SEED, prompts  # here, so that the generator can be run as a module

    if split not in FIRST_SEED:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(FIRST_SEED)}")
    if str(source) == "compositional":
        return prompts(split)[:count]
    path = Path(source)
    readers = {".txt": _t2i_compbench, ".tsv": _parti, ".jsonl": _geneval}
    if path.suffix not in readers:
        raise ValueError(f"prompts are {str(source)!r}; accepted: compositional, or a file in {', '.join(readers)}")
    if path.suffix == ".jsonl" and not _is_geneval(path):
        return load_prompts(path)[:count]
    texts = readers[path.suffix](path)
    if not texts:
        raise ValueError(f"{path} holds no prompts; accepted: one per line")
    drawn = islice(cycle(texts), len(texts) if count is None else count)
    return tuple(Prompt(text, kind, FIRST_SEED[split] + i) for i, (text, kind) in enumerate(drawn))


def _is_geneval(path: Path) -> bool:
    first = next((line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()), "")
    try:
        record = json.loads(first)
    except json.JSONDecodeError:
        return False  # the reader of our own format says what is wrong
    return isinstance(record, dict) and "tag" in record


def _geneval(path: Path) -> list[tuple[str, str]]:
    return [(text, metadata["tag"]) for text, metadata in read_metadata(path).items()]


def _t2i_compbench(path: Path) -> list[tuple[str, str]]:
    kind = path.stem
    for ending in _SPLIT_NAMES:
        kind = kind.removesuffix(ending)
    return [(line.strip(), kind) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _parti(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not {"Prompt", "Category"} <= {*(reader.fieldnames or ())}:
            raise ValueError(f"{path} has the columns {reader.fieldnames}; accepted: Prompt and Category among them")
        rows = [(row["Prompt"], row["Category"]) for row in reader]
    for number, (text, kind) in enumerate(rows, 2):
        if not (text and text.strip() and kind):
            raise ValueError(f"{path}:{number} has Prompt {text!r} and Category {kind!r}; accepted: a text in both")
    return rows
