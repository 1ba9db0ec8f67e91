"""The page's own files: what the server sends and the report carries."""

from importlib.resources import files


def static(name: str) -> bytes:
    """A file of the page itself."""
    return (files("blocktune.dashboards") / "static" / name).read_bytes()
