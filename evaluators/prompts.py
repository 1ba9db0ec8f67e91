"""Prompts with their kind and seed, read from JSON lines."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """A sentence, the kind of task it is (`colors`, `counting` …), and the seed its picture is drawn with."""

    text: str
    kind: str
    seed: int


def load_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a file with one `{"text": …, "kind": …, "seed": …}` per line; blank lines are passed over.

    Raises ValueError, naming file, line and field, for anything else, and for a file without prompts.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    prompts = tuple(_read(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    if not prompts:
        raise ValueError(f"{path} holds no prompts; accepted: one JSON object per line")
    return prompts


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """sha256, as hex, of texts, kinds and seeds in their order, however the file spells its JSON."""
    lines = (json.dumps(asdict(prompt), sort_keys=True) for prompt in prompts)
    return sha256("\n".join(lines).encode()).hexdigest()


def write_splits(folder: Path, splits: Mapping[str, tuple[Prompt, ...]]) -> None:
    """Write `<split>.jsonl` for every split, and `sha256.json` with their digests, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, made in splits.items():
        lines = "".join(json.dumps(asdict(prompt)) + "\n" for prompt in made)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    digests = {split: prompts_digest(made) for split, made in splits.items()}
    (folder / "sha256.json").write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8", newline="\n")


def _read(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); accepted: an object with text, kind and seed") from None
    wanted = {field.name: field.type for field in fields(Prompt)}
    if not isinstance(record, dict) or record.keys() != wanted.keys():
        raise ValueError(f"{where} is {line.strip()[:80]!r}; accepted: an object with exactly {', '.join(wanted)}")
    for field, kind in wanted.items():
        if type(record[field]) is not kind:  # not isinstance: JSON's true is no seed
            raise ValueError(f"{where}: {field} is {record[field]!r}; accepted: {getattr(kind, '__name__', kind)}")
    if not record["text"].strip():
        raise ValueError(f"{where}: text is {record['text']!r}; accepted: a sentence")
    if not 0 <= record["seed"] < 2**63:
        raise ValueError(f"{where}: seed is {record['seed']}; accepted: 0 to 2**63 - 1")
    return Prompt(**record)
