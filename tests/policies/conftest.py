"""What the tests of policies share."""

import pytest
from torch import nn

from .families import Family


@pytest.fixture(scope="module")
def model(family: Family) -> nn.Module:
    """The transformer of a family, one for all tests of a module: they leave it as they found it."""
    return family.build()
