"""A search's storage against the database it writes: whatever is asked and told, who reads that finds the same."""

from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from blocktune.search.config import Config, ConfigError, load_config
from blocktune.search.storage import STUDY, Storage, check_storage, open_storage
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

unit = st.floats(0, 1)
ends = st.sampled_from(["complete", "fail", "leave", "not written"])


def study_of(storage: Storage) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=0)
    directions = [StudyDirection.MAXIMIZE, StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    return optuna.create_study(
        study_name=STUDY, storage=storage, directions=directions, load_if_exists=True, sampler=sampler
    )


def written(url: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name=STUDY, storage=open_storage(url)).get_trials()


def said(trial: FrozenTrial) -> tuple:
    kept = trial.user_attrs, trial.system_attrs, trial.constraints, trial.datetime_start
    return trial.number, trial.state, trial.values, trial.params, trial.distributions, *kept


def ask(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    trial.suggest_float("scale", 1, 2, log=True)
    trial.suggest_categorical("operand", ("none", "value"))
    trial.set_user_attr("key", f"k{trial.number}")
    return trial


@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])
@given(processes=st.lists(st.lists(st.tuples(ends, unit, unit, unit), max_size=5), min_size=1, max_size=3))
def test_the_database_has_what_memory_has(
    processes: list[list[tuple]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each inner list is a process, which begins with an enqueued trial and ends without a word."""
    url = f"sqlite:///{tmp_path_factory.mktemp('storage') / 'study.db'}"
    for trials in processes:
        storage = Storage(url)
        study = study_of(storage)
        known = [said(t) for t in study.get_trials()]
        assert known == [said(t) for t in written(url)]
        study.set_user_attr("budget", {"done": len(known)})
        study.enqueue_trial({"operand": "value"}, user_attrs={"anchor": f"from {len(known)}"})
        for end, *values in [("complete", 0.5, 0.5, 0.5), *trials]:
            trial = ask(study)
            if end == "not written":
                break
            trial.set_constraint("insane", values[0])
            storage.write()
            trial.set_user_attr("metrics", {"shapes": values[1]})
            trial.set_user_attr("key", "another")
            if end == "leave":
                storage.write()
            elif end == "complete":
                study.tell(trial, values)
            elif end == "fail":
                study.tell(trial, state=TrialState.FAIL)
        held = [said(t) for t in study.get_trials() if "metrics" in t.user_attrs or t.number < len(known)]
        assert held == [said(t) for t in written(url)], "and what was not written is not there"
        assert optuna.load_study(study_name=STUDY, storage=open_storage(url)).user_attrs == study.user_attrs


def test_nothing_is_told_before_it_is_written(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = study_of(Storage(url))
    study.tell(ask(study), [0.1, 0.2, 0.3])
    (trial,) = written(url)
    assert (trial.state, trial.values, trial.params.keys()) == (
        TrialState.COMPLETE,
        [0.1, 0.2, 0.3],
        {"scale", "operand"},
    )


def test_another_that_writes_the_study_is_noticed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    first, second = study_of(Storage(url)), study_of(Storage(url))
    second.tell(ask(second), [0.1, 0.2, 0.3])
    with pytest.raises(ConfigError, match="another search writes the study in sqlite:"):
        first.tell(ask(first), [0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("foo://x", "Can't load plugin: sqlalchemy.dialects:foo"),
        ("sqlite+nope:///study.db", "Can't load plugin: sqlalchemy.dialects:sqlite.nope"),
        ("study.db", "Could not parse SQLAlchemy URL from given URL string"),
        ("mssql+pymssql://host/studies", "No module named 'pymssql'"),
    ],
)
def test_a_storage_that_no_driver_opens_is_told_before_anything_starts(
    url: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in (["--dry-run"], []):
        told = mistake("search", *more, "--set", f"search.storage={url}")
        assert told.startswith(f"blocktune: search.storage is {url!r} ({why}); accepted: the URL of a database whose")
    assert not list(tmp_path.iterdir())


def test_a_storage_is_not_opened_to_check_it(tmp_path: Path) -> None:
    check_storage(Config())
    check_storage(load_config(None, [f"search.storage=sqlite:///{tmp_path / 'study.db'}"]))
    assert not list(tmp_path.iterdir())


def test_a_database_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("no database" * 999)
    for place, why in (("nowhere/study.db", "unable to open database file"), ("words", "file is not a database")):
        with pytest.raises(ConfigError, match=rf"^search\.storage: sqlite:///.*{place} cannot be opened: {why}\.$"):
            Storage(f"sqlite:///{tmp_path / place}")
