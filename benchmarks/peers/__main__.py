"""blocktune beside its peers: python -m benchmarks.peers [--size full|small] [--run DIR] [--out DIR] [--processes N]

One model, the same prompts, seeds, dtype and device: fewer steps, guidance in an interval, the two together, FORA,
first-block cache, TaylorSeer, MagCache, DBCache, BudCache's step masks, ECAD's evolution, TexTailor's louder text with
random sets beside it, and blocktune. Methods that search do so on the search prompts, those with a budget on equal
numbers of pictures; every setting is then scored on held-out prompts with other seeds, and all are timed in turn.
Compared is at equal measured seconds. A sweep's best is picked on the held-out prompts themselves, for every method
alike, and so flatters all. What the time that a way saves buys, for every method alike: as many pictures of a prompt as
are drawn in the time of one of the unmodified model, of which a CLIP keeps the best. Told with the seconds of the CLIP
and without: of large models it takes next to none, of this one, which draws thousands of pictures a second on a GPU,
as much as the drawing.

`--run` takes the policies of a finished search in place of a search in this process. What was measured stays in the
folder, so the same command goes on after an interruption, and so several processes can share in drawing, on all GPUs of
the host: a small model leaves most of one idle. Timed is when they have ended, by one process on each GPU.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blocktune.evaluators import Interval, get, paired_interval, scale_of, speedup, time_runs
from blocktune.policies import BlockPolicy, Reuse, Rule
from blocktune.search.best_of import of_the_best
from blocktune.search.config import Search, load_config
from blocktune.search.front import Baseline, Point, hypervolume

from ..searching import searched
from ..workbench import Way, Workbench, take_gpu
from . import caches
from .picture import draw, unbeaten
from .searches import evolved, louder, step_mask

RESULTS = Path(__file__).parents[1] / "results" / "peers"
PLAIN = "unmodified"
STRICT = "shapes_binary"  # right or wrong, as GenEval judges
JUDGE = "clip_score:reference"  # keeps the best of several pictures
SLACK = 0.02  # so much more time counts as equal: timing is no better


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    steps: int | None  # the config's where None
    batch: int
    timed: int  # pictures of a timed batch
    search_pictures: int
    candidates: int  # of each method that searches with a budget
    confirm_pictures: int
    mask_rounds: int
    mask_pictures: int
    random_sets: int
    timed_rounds: int  # of each GPU


SIZES = {
    # the timed batch keeps a GPU busy, and not the CPU that launches this small model's kernels
    "full": Size(None, 384, 3072, 96, 120, 384, 60, 8, 20, 2),
    "small": Size(None, 24, 24, 48, 40, 96, 10, 2, 5, 1),  # half an hour of two CPU cores
    "tiny": Size(6, 4, 6, 4, 8, 8, 4, 2, 3, 1),
}


@dataclass(frozen=True)
class Result:
    """A way on held-out prompts, against the unmodified model picture by picture."""

    way: Way
    point: Point
    alignment: Interval
    quality: Interval
    strict: Interval
    speedup: float


def regular(bench: Workbench) -> list[Way]:
    """The model itself, in fewer steps, and under FORA."""
    steps, blocks = bench.steps, tuple(range(bench.model.num_blocks))
    ways = [Way(PLAIN, PLAIN, steps)]
    fewer = dict.fromkeys(round(steps * share) for share in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    ways += [Way("fewer steps", f"{n} steps", n) for n in fewer]
    for every in (2, 3, 4, 5):
        policy = BlockPolicy(
            name=f"every {every}", model=bench.model, rules=(Rule(blocks=blocks, action=Reuse(every=every)),)
        )
        ways.append(Way("FORA", f"every {every}", steps, policy))
    return ways


def intervals(bench: Workbench) -> list[Way]:
    """Guidance in the first part of the run, and that in fewer steps as well."""
    ways = []
    for until in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8):
        policy = BlockPolicy(name=f"until {until:g}", model=bench.model, rules=(), guidance_window=(0.0, until))
        ways.append(Way("guidance interval", policy.name, bench.steps, policy))
        fewer = (round(bench.steps * share) for share in (0.4, 0.5, 0.6, 0.8) if 0.3 <= until <= 0.5)
        ways += [Way("interval, fewer steps", f"{n} steps, {policy.name}", n, policy) for n in fewer]
    return ways


def of_run(bench: Workbench, size: Size, run: Path) -> list[Way]:
    """The policies that a finished search exported."""
    paths = sorted((run / "policies").glob("*.json"))
    policies = {p.digest: p for p in map(BlockPolicy.load, paths)}.values()
    tuned = [(p.tuned_for or {}).get("num_inference_steps", bench.steps) for p in policies]
    return [Way("blocktune", p.name, size.steps or n, p) for p, n in zip(policies, tuned, strict=True)]


def own(bench: Workbench, size: Size) -> list[Way]:
    """A raced search of this process, on twice the prompts and on as many pictures as others have."""
    most = 2 * size.search_pictures
    settings = 12  # as the largest of the sweeps has
    return searched(bench, Search(), size.candidates * size.search_pictures, most, most // 8, settings)


def stages(bench: Workbench, size: Size, run: Path | None) -> dict[str, Callable[[], list[Way]]]:
    """What makes the settings of each method, independent of each other and the longest first."""
    budgets = sorted({round(bench.steps * share) for share in (0.3, 0.4, 0.5, 0.6, 0.7)})
    pictures = size.search_pictures
    made: dict[str, Callable[[], list[Way]]] = {
        "blocktune": lambda: of_run(bench, size, run) if run else own(bench, size),
        "evolved reuse": lambda: evolved(bench, size.candidates, pictures),
        "caches": lambda: caches.ways(bench),
        "louder input": lambda: louder(bench, "input", pictures, size.random_sets),
        "louder value": lambda: louder(bench, "value", pictures, size.random_sets),
        "guidance intervals": lambda: intervals(bench),
        "regular": lambda: regular(bench),
    }
    for n in budgets:
        made[f"{n} annealed steps"] = lambda n=n: [step_mask(bench, n, size.mask_rounds, size.mask_pictures)]
    return made


def drawn(bench: Workbench, size: Size, run: Path | None, share: int, of: int) -> list[Way]:
    """Every `of`-th stage's settings from `share` on, each setting scored on the held-out prompts."""
    ways: list[Way] = []
    for name, make in list(stages(bench, size, run).items())[share::of]:
        bench.say(name)
        made = make()
        for way in made:
            bench.scores(way, "confirm", size.confirm_pictures)
        bench.say(f"{name}: {len(made)} settings held out")
        ways += made
    ways.sort(key=lambda way: way.method != PLAIN)
    return list({(way.method, way.key): way for way in ways}.values())


def rounds(bench: Workbench, ways: list[Way], size: Size) -> list[dict[str, float]]:
    """Seconds of every way by its key, round by round; random sets are left out, the unmodified model in time."""
    timed = [way for way in ways if way.method != "random sets"]
    bench.say(f"timing {len(timed)} settings in turn, {size.timed_rounds} times")
    return [dict(zip([way.key for way in timed], one, strict=True)) for one in bench.rounds(timed, size.timed_rounds)]


def measure(bench: Workbench, ways: list[Way], taken: list[dict[str, float]], size: Size) -> list[Result]:
    """All ways on the held-out prompts, with the seconds that they took in the rounds of one GPU or more.

    Those are the unmodified model's over the speed-up in the same rounds: what slows a machine for a while, or one of
    two GPUs, slows both.
    """
    count = size.confirm_pictures
    plain = ways[0]
    assert plain.method == PLAIN
    by_round = {key: [one[key] for one in taken] for key in taken[0]}
    whole = float(np.median(by_round[plain.key]))
    seconds = {key: whole / speedup(by_round[plain.key], own) for key, own in by_round.items()}
    prompts = [p.text for p in bench.prompts["confirm"][:count]]
    before = bench.scores(plain, "confirm", count)

    def interval(way: Way, name: str) -> Interval:
        after = bench.scores(way, "confirm", count)[name]
        return paired_interval(after, before[name], groups=prompts, scale=scale_of(get(name)))

    results = []
    for way in ways:
        taken = seconds.get(way.key, seconds[plain.key])
        point = bench.point(way, taken, "confirm", count)
        alignment, quality, strict = (interval(way, name) for name in (*bench.objectives, STRICT))
        results.append(Result(way, point, alignment, quality, strict, seconds[plain.key] / taken))
    return results


def standings(results: list[Result]) -> list[dict[str, Any]]:
    """Per method: the hypervolume of its own sweep, its largest speed-up at no loss, its best alignment at no loss."""
    plain = results[0]
    baseline = Baseline(**vars(plain.point), scales=(plain.alignment.scale, plain.quality.scale))
    rows = []
    for method in dict.fromkeys(r.way.method for r in results[1:] if r.way.method != "random sets"):
        own = [r for r in results if r.way.method == method]
        kept = [r.speedup for r in own if r.alignment.in_points[0] >= -0.5]
        louder = [r.alignment for r in own if r.speedup >= 1 - SLACK]
        rows.append(
            {
                "method": method,
                "settings": len(own),
                "hypervolume": hypervolume([r.point for r in own], baseline),
                "speedup": max(kept, default=1.0),
                "alignment": max((i.in_points[0] for i in louder), default=0.0),
            }
        )
    return rows


def best_of_several(bench: Workbench, results: list[Result], count: int) -> list[dict[str, Any]]:
    """What no other setting of its method beats, where two pictures or more are drawn in the unmodified model's time.

    Against one picture of the unmodified model; the gain in right pictures, highest first. Speed-ups are of drawing
    alone, and with the scoring of every picture drawn.
    """
    plain, prompts = results[0], [p.text for p in bench.prompts["confirm"][:count]]
    images, before = bench.pictures(plain.way, "confirm", count), bench.scores(plain.way, "confirm", count)
    judging = time_runs(lambda: get(JUDGE).score(images, prompts), repeats=3) / count  # seconds per picture
    share = judging * bench.timed / plain.point.latency  # of the time of one picture
    bench.say(
        f"{JUDGE} takes {1000 * judging:.2f} ms a picture, {100 * share:.0f} % of the time that drawing one takes"
    )
    rows = []
    for method in dict.fromkeys(r.way.method for r in results[1:]):
        own = {(r.speedup, r.alignment.delta): r for r in results[1:] if r.way.method == method}
        for r in map(own.__getitem__, unbeaten(list(own))):
            drawn = [bench.scores(r.way, "confirm", count, draw) for draw in range(int((1 + SLACK) * r.speedup))]
            for draws in range(2, len(drawn) + 1):
                told: dict[str, Any] = {"method": method, "name": r.way.name, "draws": draws}
                told |= {"drawing": r.speedup / draws, "speedup": 1 / (draws * (1 / r.speedup + share))}
                gains = of_the_best(drawn[:draws], before, JUDGE, (*bench.objectives, STRICT), prompts)
                rows.append(told | {name: gain.in_points for name, gain in gains.items()})
    return sorted(rows, key=lambda row: -row[STRICT][0])


def bars(results: list[Result], rows: list[dict[str, Any]], several: list[dict[str, Any]]) -> list[str]:
    """What blocktune set out to reach, and by how much it is met or missed."""
    ours = next(row for row in rows if row["method"] == "blocktune")
    peers = [row for row in rows if row is not ours]
    told = []

    def bar(what: str, reached: float, wanted: float) -> None:
        verdict = "met" if reached >= wanted else f"MISSED by {wanted - reached:.3f}"
        told.append(f"{what}: {reached:.3f}, wanted {wanted:.2f}: {verdict}")

    for key, what, wanted in (
        ("hypervolume", "held-out hypervolume over the best peer's", 1.2),
        ("speedup", "speed-up at no more than 0.5 points of alignment lost, over the best peer's", 1.25),
    ):
        best = max(peers, key=lambda row: row[key])
        bar(f"{what} ({best['method']}, {best[key]:.2f})", ours[key] / best[key] if best[key] else np.inf, wanted)
    free = [r for r in results if r.way.method == "blocktune" and r.speedup >= 1 - SLACK]
    if not free:
        return [*told, "alignment at no loss of speed: MISSED, no policy is as fast as the unmodified model"]
    best = max(free, key=lambda r: r.strict.delta)
    gain, low, _ = best.strict.in_points
    bar(f"{STRICT} at no loss of speed, points ({best.way.name})", gain, 4.0)
    bar("  lower end of its interval", low, 0.0)
    random = [r.strict.in_points[0] for r in results if r.way.method == "random sets"]
    highest = float(np.percentile(random, 95))
    bar(f"  against {len(random)} random sets", gain, highest)
    for time, key in (("drawing and scoring", "speedup"), ("drawing alone", "drawing")):
        what = f"{STRICT} of the best of several, {time} as fast as the unmodified model draws one"
        fit = [row for row in several if row[key] >= 1 - SLACK]
        mine, others = ([row for row in fit if (row["method"] == "blocktune") is ours] for ours in (True, False))
        if not mine:
            told.append(f"{what}: MISSED, no policy leaves time for a second")
            continue
        gain, low, _ = mine[0][STRICT]
        bar(f"{what} ({mine[0]['draws']} by {mine[0]['name']})", gain, 4.0)
        bar("  lower end of its interval", low, 0.0)
        bar(f"  against {len(random)} random sets", gain, highest)
        if others:
            beside = f"best of {others[0]['draws']} by {others[0]['method']} {others[0]['name']}"
            bar(f"  against the best peer's ({beside})", gain, others[0][STRICT][0])
    return told


def at_equal_seconds(bench: Workbench, results: list[Result], count: int) -> list[dict[str, Any]]:
    """Each policy of blocktune beside the best aligned peer that takes its seconds or fewer."""
    prompts = [p.text for p in bench.prompts["confirm"][:count]]
    rows = []
    for ours in (r for r in results if r.way.method == "blocktune"):
        allowed = [
            r
            for r in results
            if r.way.method not in ("blocktune", "random sets") and r.point.latency <= (1 + SLACK) * ours.point.latency
        ]
        if not allowed:
            continue
        peer = max(allowed, key=lambda r: r.alignment.delta)
        mine, other = (bench.scores(r.way, "confirm", count) for r in (ours, peer))
        alignment, quality = (
            paired_interval(mine[n], other[n], groups=prompts, scale=scale_of(get(n))).points for n in bench.objectives
        )
        beside = f"{peer.way.method} {peer.way.name}".strip()
        rows.append(
            {"policy": ours.way.name, "speedup": ours.speedup, "peer": beside, "peer_speedup": peer.speedup,
             "alignment": alignment, "quality": quality}
        )  # fmt: skip
    return sorted(rows, key=lambda row: -row["speedup"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument(
        "--config", type=Path, help="of a search: model, sampling, prompts, objectives, space; that of --run"
    )
    parser.add_argument("--run", type=Path, help="folder of a finished search whose policies stand for blocktune")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=1, help="that draw side by side on the device")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # of one of the processes that draw
    parser.add_argument("--timer", type=int, help=argparse.SUPPRESS)  # the GPU of one that times
    args = parser.parse_args()
    size = SIZES[args.size]
    overrides = [
        f"generation.batch={size.batch}",
        f"prompts.search_images={2 * size.search_pictures}", f"prompts.confirm_images={size.confirm_pictures}",
        *([f"generation.num_inference_steps={size.steps}"] if size.steps else []),
    ]  # fmt: skip
    if args.processes > 1:
        torch.set_num_threads(1)  # those of several processes would wait for each other
    take_gpu(args.share or args.timer or 0)
    config = args.config or (args.run / "config.yaml" if args.run else None)
    bench = Workbench(load_config(config, overrides), args.out, args.device, [STRICT, JUDGE], size.timed)
    if args.share is not None:
        drawn(bench, size, args.run, args.share, args.processes)
        return
    if args.timer is not None:
        bench.write(f"rounds-{args.timer}.json", rounds(bench, drawn(bench, size, args.run, 0, 1), size))
        return
    bench.say(", ".join(f"{key} {value}" for key, value in bench.circumstances.items()))
    bench.costs()  # before anything else runs on the device
    many = args.processes > 1
    beside(["--share", str(share)] for share in range(args.processes if many else 0))()
    ways = drawn(bench, size, args.run, 0, 1)
    gpus = range(1, torch.cuda.device_count() if many and args.device == "cuda" else 1)
    timed = beside(["--timer", str(gpu)] for gpu in gpus)
    taken = rounds(bench, ways, size)
    timed()
    taken += [one for gpu in gpus for one in json.loads((args.out / f"rounds-{gpu}.json").read_text())]
    results = measure(bench, ways, taken, size)
    rows = standings(results)
    several = best_of_several(bench, results, size.confirm_pictures)
    told = bars(results, rows, several)
    matched = at_equal_seconds(bench, results, size.confirm_pictures)
    show("\n{:<20} {:>8} {:>12} {:>9} {:>10}", ["method", "settings", "hypervolume", "speed-up", "alignment"])
    for row in rows:
        show("{:<20} {:>8} {:>12.3f} {:>8.2f}x {:>+10.1f}", row.values())
    print("speed-up: with at most 0.5 points of alignment lost; alignment: points, at no loss of speed\n")
    for row in matched:
        show("{:<16} {:.2f}x against {} {:.2f}x: alignment {}, quality {}", row.values())
    for row in several:
        gains = ", ".join(f"{name} {row[name][0]:+.1f}" for name in (STRICT, *bench.objectives))
        speed = f"{row['drawing']:.2f}x, with scoring {row['speedup']:.2f}x"
        print(f"the best of {row['draws']} by {row['method']} {row['name']}, {speed}: {gains}")
    print("", *told, sep="\n", flush=True)
    bench.write("peers.json", {
        **bench.circumstances, "size": args.size, "pictures": size.confirm_pictures, "bars": told, "methods": rows,
        "at_equal_seconds": matched, "best_of_several": several, "settings": [
            {"method": r.way.method, "name": r.way.name, "seconds": r.point.latency, "speedup": r.speedup,
             "alignment": r.alignment.points, "quality": r.quality.points, STRICT: r.strict.points}
            for r in results
        ],
    })  # fmt: skip
    draw(
        [(r.way.method, r.speedup, r.alignment.in_points[0]) for r in results[1:]],
        args.out / "peers.png",
    )


def beside(options: Iterable[list[str]]) -> Callable[[], None]:
    """Start this command again, once with each of the options; call what is returned to wait for their ends."""
    command = [sys.executable, "-m", "benchmarks.peers", *sys.argv[1:]]
    others = [subprocess.Popen([*command, *option]) for option in options]

    def wait() -> None:
        if failed := [" ".join(other.args[-2:]) for other in others if other.wait()]:
            raise SystemExit(f"the processes {failed} failed; the same command goes on where they stopped.")

    return wait


def show(form: str, values: Any) -> None:
    tell: Callable[..., str] = form.format
    print(tell(*values), flush=True)


if __name__ == "__main__":
    main()
