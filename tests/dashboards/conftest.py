"""A finished search of a tiny model, as the page shows it."""

from pathlib import Path

import pytest

from ..search.conftest import new_world, tiny_model  # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def run(new_world) -> Path:  # noqa: F811
    world = new_world(trials=7)
    world.pause = 0
    folder = world.cwd / "runs" / "tiny"
    world.run("search", world.config)
    return folder
