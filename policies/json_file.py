"""Reading a JSON file that a person hands over: what is wrong with it becomes one sentence that names the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from .error import PolicyError


@contextmanager
def json_of(path: str | PathLike[str]) -> Iterator[Any]:
    """The content of a file, for the body of a `with`; what the body refuses is refused in the file's name.

    Raises PolicyError when the file is missing, unreadable, or not JSON with finite numbers and each key once.
    """
    try:
        yield json.loads(Path(path).read_text("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror}.") from None
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path} is not valid JSON: {error}.") from None


def _no_constant(name: str) -> NoReturn:
    raise PolicyError(f"{name} is not a number that JSON has; every number must be finite.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise PolicyError(f"{next(k for k in keys if keys.count(k) > 1)} is given twice in one object; give it once.")
    return data
