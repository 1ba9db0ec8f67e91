"""Where the time of a search's trials went: python benchmarks/trial_split.py [RUN_DIR]

Reads a run that was not interrupted. All workers together have the wall time between the first trial's start and the
last one's end, times their number. Generation and scoring are what they reported; the rest is everything else, in
which a worker waits: asking, telling, writing, MLflow, moving pictures, and the end, when no trial is left for it.
"""

import json
import sys
from pathlib import Path

import optuna
from blocktune.search.storage import STUDY
from optuna.trial import TrialState


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/reference")
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{run / 'study.db'}")
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trials = [t for t in complete if "same_as" not in t.user_attrs]
    begun = [t.datetime_start for t in complete if t.datetime_start]
    ended = [t.datetime_complete for t in complete if t.datetime_complete]
    on = study.user_attrs["description"]
    wall = (max(ended) - min(begun)).total_seconds()
    generating, scoring = (sum(t.user_attrs["metrics"][f"{k}_seconds"] for t in trials) for k in ("generate", "score"))
    other = wall * on["workers"] - generating - scoring
    result = {
        "device": f"{on['device']}, {on['dtype']}",
        "versions": on["versions"] | {"optuna": optuna.__version__},
        "workers": on["workers"],
        "trials": len(trials),
        "wall_s": round(wall, 2),
        "generating_s_per_trial": round(generating / len(trials), 3),
        "scoring_s_per_trial": round(scoring / len(trials), 3),
        "everything_else_s_per_trial": round(other / len(trials), 3),
        "share_of_everything_else": round(other / (wall * on["workers"]), 4),
    }
    for key, value in result.items():
        print(f"{key:<30} {value}")
    results = Path(__file__).parent / "results" / "trial_split.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
