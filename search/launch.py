"""A search from its config to its report: workers, study, confirm, pictures, records."""

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from ..evaluators.clip import check_clip
from .config import Config, ConfigError
from .confirm import confirm
from .estimate import detectable
from .front import Confirmed, held_out_name
from .pool import Pool
from .progress import Display
from .prompts import check_spread, fewer_than_asked, read_prompts
from .report import draw_comparison, draw_front, side_by_side, write_report
from .run_directory import RunDirectory
from .storage import check_storage, feasible, point_of
from .study import Study, check_objectives
from .tracking import Tracker


def check(config: Config) -> None:
    """Raise what is wrong with evaluators, prompts and storage before anything is started or written."""
    check_objectives(config)
    check_storage(config)
    if config.confirm.cmmd:
        check_clip(config.confirm.cmmd)
    if config.confirm.fid:
        _check_fid(config.confirm.fid)
    check_spread("prompts.confirm", read_prompts(config, "confirm"))


def _check_fid(weights: str) -> None:
    if find_spec("torch_fidelity") is None:
        raise ConfigError("confirm.fid needs torch-fidelity, which is not installed: pip install 'blocktune[fid]'.")
    if not weights.startswith("https://") and not Path(weights).expanduser().is_file():
        raise ConfigError(f"confirm.fid is {weights!r}; accepted: a file that is there, or an https:// URL of one.")


def launch(
    config: Config, path: Path, resume: bool, confirm_only: bool, write_page: Callable[[Path, Path], None]
) -> RunDirectory:
    """Search (or with `confirm_only` just confirm) into the run directory `path`, and return it.

    `write_page(run, output)` writes the run as one HTML file, which goes to MLflow as well.

    Whatever is raised on the way, what finished is on disk, and a call with `resume` goes on from there. Raises
    ConfigError for a user's mistake, JobFailed where a part that everything rests on cannot be measured, OSError and
    StorageInternalError where nothing can be written.
    """
    check(config)
    run = RunDirectory.open(path, config, resume)
    started = time.monotonic()
    state = run.read_state()
    pool = tracker = None
    with Display() as display:
        try:
            for one in fewer_than_asked(config):
                display.say(one)
            display.wait("starting workers")
            pool = Pool(config, state.get("dtype"))
            described = pool.description
            display.say(f"{pool.size} worker{'s' * (pool.size > 1)} on {described.device}, {described.dtype}")
            state = {"dtype": described.dtype, "search": state.get("search") or uuid4().hex}
            run.write_json(run.state, state)
            tracker = Tracker(config, path, state["search"])
            prompts = {split: read_prompts(config, split) for split in ("search", "confirm")}
            tracker.begin(_flat(config.model_dump(mode="json")), _circumstances(pool), prompts)
            study = Study(config, run, pool, tracker, display)
            for one in detectable(config, run, study.model.num_blocks):
                display.say(f"confirm can tell {one}")
            if not confirm_only:
                study.search()
            confirmed = confirm(study)
            points = [point_of(t) for t in feasible(study.study, anchors=True)]
            draw_front(points, study.tally.front, study.baseline, confirmed, config.confirm.margin, run.front)
            draw_comparison(run, confirmed)
            _grids(run, study, confirmed)
            facts = {
                "device": f"{described.device}, {described.dtype}",
                "workers": f"{pool.size} on {len(set(pool.nodes))} node(s)",
                "versions": ", ".join(f"{k} {v}" for k, v in described.versions.items()),
                "search": _told(study),
                "ended by": study.ended or "not ended",
                "sampler": f"{config.search.sampler}, seed {config.search.seed}",
                "time": f"{time.monotonic() - started:.0f} s in this process",
                "shared": f"{100 * study.tally.spent['steps_saved']:.0f} % of the denoising steps of its candidates",
                "hypervolume": f"{study.tally.standing['hypervolume']:.3f}",
            }
            write_report(run, facts)
            write_page(path, run.page)
            files = [run.front, run.compare, run.report, run.page, run.confirmed, run.config]
            files += run.policies.glob("*.json")
            picks = {name: run.policies / f"{name}.json" for c in confirmed for name in c.picks}
            ended = {"ended": study.ended} if study.ended else {}
            tracker.finish("FINISHED", files, {"front": study.front_table()}, picks, ended)
            state |= {"mlflow_run_id": tracker.run_id}
            run.write_json(run.state, state)
            if ended:
                run.write_json(run.state, state | {"finished": config.model_dump(mode="json")} | ended)
        except BaseException as error:
            if tracker:
                tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        finally:
            if pool:
                pool.close()
            if tracker:
                tracker.close()
            run.release()
    return run


def _told(study: Study) -> str:
    """How much was searched, and how much of it the race spared."""
    trials, images = study.tally.finished, len(study.prompts)
    dropped = sum("dropped" in t.user_attrs for t in study.study.get_trials(deepcopy=False))
    drawn = f"{study.tally.spent['images']:.0f} pictures drawn"
    return f"{trials} trials of {images} pictures, {dropped} dropped on fewer, {drawn}"


def _grids(run: RunDirectory, study: Study, confirmed: list[Confirmed]) -> None:
    """Pictures of the confirmed candidates, attached to their trials in MLflow."""
    captions = [p.text for p in read_prompts(study.config, "confirm")[:6]]
    numbers = {t.user_attrs["key"]: t.number for t in study.study.get_trials(deepcopy=False) if "key" in t.user_attrs}
    for c in confirmed:
        path = run.images / f"trial-{numbers[c.key]:04d}.png"
        columns = {
            "unmodified": run.read_images("confirm-unmodified")[:6],
            c.name: run.read_images(held_out_name(c))[:6],
        }
        side_by_side(columns, captions, path)
        held = {"speedup": c.speedup, "alignment_delta": c.alignment.delta, "quality_delta": c.quality.delta}
        metrics = {f"confirmed_{name}": value for name, value in held.items()}
        study.tracker.confirmed(numbers[c.key], metrics, c.picks, path)


def _circumstances(pool: Pool) -> dict[str, Any]:
    """Model, hardware and versions, of the workers and of this process."""
    described = pool.description
    return {
        "fingerprint": described.model.fingerprint,
        "device": described.device,
        "dtype": described.dtype,
        "workers": pool.size,
        "nodes": len(set(pool.nodes)),
        "driver": f"{platform.platform()}, {os.cpu_count()} CPUs, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        **described.versions,
        **{name: version(name) for name in ("blocktune", "optuna", "ray")},
        "mlflow": version("mlflow-skinny"),  # which mlflow rests on
    }


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
