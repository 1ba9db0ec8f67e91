import pytest

from .checkpoints import every


@pytest.fixture(scope="session")
def model_scores(tmp_path_factory) -> dict[str, str]:
    """A name of every family, with a tiny random checkpoint; `vqa_score` twice, by kind of model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {key: write() for key, write in every(folder).items()}
