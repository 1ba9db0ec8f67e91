"""What the race spares and what it loses: python benchmarks/racing.py RUN_DIR [--replays 200]

RUN_DIR is a finished search without it (`search.racing=false`), so that every candidate has all its pictures. The race
is replayed on the stored scores: prompts shuffled within their kinds, candidates in another order behind the anchors.
Told are the share of the pictures that it draws, and how much hypervolume those who reach the end command, of that of
all candidates; beside it, what the same pictures give when each candidate gets all of them and the others none. `other
half`: raced on one half of the pictures, the front of it valued on the other half, which neither saw: a front of many
candidates on few pictures is partly luck, and what the race loses of it need not be a loss.

Not covered: that a search proposes other candidates after other values. The order here is the stored one, shuffled.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import optuna
from blocktune.evaluators import get, scale_of
from blocktune.search.front import Baseline, Point, hypervolume, non_dominated
from blocktune.search.racing import REACH, TRIFLE, Race, rounds
from blocktune.search.run_directory import RunDirectory
from blocktune.search.storage import STUDY, open_storage, point_of, study_url
from optuna.trial import TrialState


class Field:
    """All candidates of a run: differences to the unmodified model `(candidates, images, 2)`, latencies, anchors."""

    def __init__(self, folder: Path):
        run = RunDirectory.existing(folder)
        config = run.load_config()
        names = [config.objectives.alignment, config.objectives.quality]
        scales = np.array([scale_of(get(name)) for name in names])
        study = optuna.load_study(study_name=STUDY, storage=open_storage(study_url(run, config)))
        trials = [t for t in study.get_trials(states=(TrialState.COMPLETE,)) if "same_as" not in t.user_attrs]
        if any("dropped" in t.user_attrs for t in trials):
            raise SystemExit(f"{folder} was searched with racing; accepted: a run with search.racing=false.")
        before = run.read_scores("unmodified")
        tables = [run.read_scores(f"trial-{t.number:04d}") for t in trials]
        self.differences = np.stack([(t[names] - before[names]).to_numpy() / scales for t in tables])
        self.latency = np.array([point_of(t).latency for t in trials])
        self.anchor = np.array(["anchor" in t.user_attrs for t in trials])
        self.kinds = before["kind"].to_numpy()
        self.unmodified = Baseline("unmodified", 0.0, 0.0, float(self.latency[0]), scales=(1.0, 1.0))
        self.described = study.user_attrs["description"]

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """The pictures in another order, kinds in turn as before."""
        order = np.arange(len(self.kinds))
        for kind in np.unique(self.kinds):
            places = np.flatnonzero(self.kinds == kind)
            order[places] = rng.permutation(places)
        return order

    def front(self, members: np.ndarray, pictures: np.ndarray) -> np.ndarray:
        means = self.differences[:, pictures].mean(axis=1)
        points = [Point(str(i), *map(float, means[i]), float(self.latency[i])) for i in members]
        return np.array([int(p.name) for p in non_dominated(points)])

    def volume(self, members: np.ndarray, pictures: np.ndarray) -> float:
        means = self.differences[:, pictures].mean(axis=1)
        points = [Point("", *map(float, means[i]), float(self.latency[i])) for i in members]
        return hypervolume(points, self.unmodified)

    def race(self, order: np.ndarray, pictures: np.ndarray, first: int) -> tuple[float, np.ndarray]:
        """The share of all pictures that the race draws, and who has them all in the end."""
        race, drawn, whole = Race(len(pictures), float(self.latency[0])), 0, []
        for i in order:
            scores, seen = self.differences[i, pictures], 0
            for seen in rounds(len(pictures) if self.anchor[i] else first, len(pictures)):
                if seen == len(pictures):
                    race.finish(scores, self.latency[i])
                    whole.append(i)
                elif not race.goes_on(scores[:seen], self.latency[i]):
                    break
            drawn += seen
        return drawn / len(order) / len(pictures), np.array(whole)


def replay(field: Field, first: int, rng: np.random.Generator) -> dict[str, float]:
    """One race on all pictures, and one on a half."""
    anchors, others = np.flatnonzero(field.anchor), rng.permutation(np.flatnonzero(~field.anchor))
    order, pictures = np.concatenate([anchors, others]), field.shuffled(rng)
    share, whole = field.race(order, pictures, first)
    full = field.volume(order, pictures)
    few = order[: max(1, round(share * len(order)))]
    half, other = pictures[: len(pictures) // 2], pictures[len(pictures) // 2 :]
    _, raced = field.race(order, half, first)
    return {
        "pictures": share,
        "hypervolume": field.volume(whole, pictures) / full,
        "fewer_candidates": field.volume(few, pictures) / full,
        "other_half": field.volume(field.front(raced, half), other) / field.volume(field.front(order, half), other),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--replays", type=int, default=200)
    asked = parser.parse_args()
    field = Field(asked.run)
    candidates, images, _ = field.differences.shape
    rows = {}
    print(f"{candidates} candidates, {images} pictures, {asked.replays} replays: mean and worst twentieth")
    print(f"{'first pictures':<16}{'pictures':>14}{'hypervolume':>16}{'fewer candidates':>20}{'other half':>16}")
    for first in (12, 24, 48):
        told = [replay(field, first, np.random.default_rng(i)) for i in range(asked.replays)]
        values = {name: np.array([t[name] for t in told]) for name in told[0]}
        worst = {name: np.quantile(v, 0.95 if name == "pictures" else 0.05) for name, v in values.items()}
        rows[first] = {n: {"mean": round(float(v.mean()), 4), "worst_twentieth": round(float(worst[n]), 4)}
                       for n, v in values.items()}  # fmt: skip
        cells = [f"{values[name].mean():.3f} {worst[name]:.3f}" for name in values]
        print(f"{first:<16}{cells[0]:>14}{cells[1]:>16}{cells[2]:>20}{cells[3]:>16}")
    result = {
        "device": f"{field.described['device']}, {field.described['dtype']}",
        "versions": field.described["versions"] | {"optuna": optuna.__version__},
        "candidates": candidates,
        "images": images,
        "front": len(field.front(np.arange(candidates), np.arange(images))),
        "replays": asked.replays,
        "reach": REACH,
        "trifle": TRIFLE,
        "first_images": rows,
    }
    (Path(__file__).parent / "results" / "racing.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
