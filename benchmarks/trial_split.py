"""Where the time of a search's trials went: python benchmarks/trial_split.py [RUN_DIR]

Reads a finished run. Generation and scoring are what the worker reported; the rest of the wall time between the first
trial's start and the last one's end is everything else: asking, telling, writing, MLflow, moving pictures.
"""

import json
import sys
from pathlib import Path

import optuna
from optuna.trial import TrialState


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/reference")
    study = optuna.load_study(study_name="blocktune", storage=f"sqlite:///{run / 'study.db'}")
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trials = [t for t in complete if "same_as" not in t.user_attrs]
    begun = [t.datetime_start for t in complete if t.datetime_start]
    ended = [t.datetime_complete for t in complete if t.datetime_complete]
    wall = (max(ended) - min(begun)).total_seconds()
    working = sum(t.user_attrs["metrics"]["seconds"] for t in trials)
    result = {
        "trials": len(trials),
        "wall_s": round(wall, 2),
        "generating_and_scoring_s": round(working, 2),
        "everything_else_per_trial_s": round((wall - working) / len(trials), 3),
        "share_of_everything_else": round(1 - working / wall, 4),
    }
    for key, value in result.items():
        print(f"{key:<30} {value}")
    results = Path(__file__).parent / "results" / "trial_split.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
