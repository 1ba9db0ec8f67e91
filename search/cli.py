"""The command line. Heavy imports live inside the commands, so that --help answers at once."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .policy_commands import evaluate, fail, generate, verify

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip
RunArgument = Annotated[Path, typer.Argument(help="a run directory")]
SearchArgument = Annotated[Path, typer.Argument(help="the run directory of a search, which a probe's is not")]
OutOption = Annotated[Path | None, typer.Option(help="run directory; runs/<name> when not given")]
CostTableOption = Annotated[
    Path | None, typer.Option(help="for --dry-run: cost_table.json of another run, measured where this is to run")
]
DEFAULT_RUN = Path("runs/reference")


def _version(asked: bool) -> None:
    from importlib.metadata import version

    if asked:
        typer.echo(f"blocktune {version('blocktune')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and exit")
    ] = False,
) -> None:
    """Finds what each block of a diffusion transformer should do at each step of a run."""


@app.command()
def search(
    config: Annotated[Path | None, typer.Argument(help="YAML file; without it the reference model is searched")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, e.g. search.trials=100; may be repeated")
    ] = None,
    out: OutOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the directory")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="start nothing; tell what the search would take and could tell")
    ] = False,
    cost_table: CostTableOption = None,
) -> None:
    """Search policies, confirm the front on held-out prompts, export the picks."""
    from .config import ConfigError, load_config
    from .run_directory import RunDirectory
    from .tracking import send_left

    settings = load_config(config, set_ or [])
    run = RunDirectory(out or Path("runs") / settings.name)
    if resume and config is None and run.config.exists():
        settings = load_config(run.config, set_ or [])
    if cost_table and not dry_run:
        raise ConfigError("--cost-table is given without --dry-run; a search measures its own.")
    if dry_run:
        _estimate(settings, run, cost_table)
    elif run.finished(settings):
        send_left(settings, run)
        typer.echo(f"{run.path} holds this search, finished; nothing was left to do.\n")
        _tell(run)
        more = 2 * settings.search.trials
        typer.echo(f"\nit ended at {run.read_state()['ended']}; go on by raising that limit,")
        typer.echo(f"as with --resume --set search.trials={more}, or start anew with --out another/place")
    else:
        _search(settings, run.path, resume, confirm_only=False)


def _estimate(config, run, cost_table: Path | None) -> None:
    from .estimate import check_model, estimate, read_cost_table
    from .launch import check

    check(config)
    table = read_cost_table(cost_table) if cost_table else None
    if table:
        check_model(table, config)
    _tell_estimate(config, estimate(config, run, table))


def _tell_estimate(config, told) -> None:
    size = f"{config.generation.num_inference_steps} steps, batches of {config.generation.batch}"
    typer.echo(f"{config.name:<12} {config.model.path}, {size}; nothing is started")
    for line in told.lines:
        typer.echo(line)


@app.command()
def confirm(run: SearchArgument = DEFAULT_RUN) -> None:
    """Measure the front of a finished or stopped search on held-out prompts again."""
    from .config import ConfigError

    trials, config, _ = _trials(run)
    if not any(trial.state.name == "COMPLETE" for trial in trials):
        raise ConfigError(f"{run} has no complete trial yet; go on with blocktune search --resume --out {run}.")
    _search(config, run, resume=True, confirm_only=True)


def _search(config, path: Path, resume: bool, confirm_only: bool) -> None:
    from ..dashboards.report import write_report
    from .launch import launch

    again = f"blocktune search --resume --out {path}"
    run = _guarded(path, again, lambda: launch(config, path, resume, confirm_only, write_report))
    _tell(run)


@app.command()
def probe(
    config: Annotated[Path | None, typer.Argument(help="YAML file; without it the reference model is probed")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. probe.images=48")] = None,
    out: OutOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="start nothing; tell what the probe would still draw")
    ] = False,
    cost_table: CostTableOption = None,
) -> None:
    """Measure what each block does: removed, reused, deaf to the text, or hearing it louder."""
    from .config import ConfigError, load_config
    from .estimate import read_cost_table
    from .probe import estimate_probe, launch_probe
    from .probe_report import draw, summary
    from .prompts import read_prompts
    from .run_directory import RunDirectory

    settings = load_config(config, set_ or [])
    there, split = min((len(read_prompts(settings, split)), split) for split in ("search", "confirm"))
    if there < settings.probe.images:
        told = f"probe.images is {settings.probe.images}, but {there} are probed: prompts.{split} gives no more"
        typer.echo(f"{told}, as prompts.{split}_images is {getattr(settings.prompts, f'{split}_images')}", err=True)
    path = out or Path("runs") / settings.name
    if cost_table and not dry_run:
        raise ConfigError("--cost-table is given without --dry-run; a probe tells by its own first pictures.")
    if dry_run:
        table = read_cost_table(cost_table) if cost_table else None
        _tell_estimate(settings, estimate_probe(settings, RunDirectory(path), table))
        return
    run = _guarded(path, f"blocktune probe --out {path}", lambda: launch_probe(settings, path))
    typer.echo(summary(run))
    typer.echo(f"\ntable {path / 'probe.parquet'}\npicture {draw(run)}")


def _guarded(path: Path, again: str, action: Callable[[], Any]) -> Any:
    """Run what measures into `path`; its faults become a sentence each, and `again` is how to go on."""
    from optuna.exceptions import StorageInternalError

    from .pool import JobFailed

    go_on = f"go on with: {again}"
    try:
        return action()
    except KeyboardInterrupt:
        typer.echo(f"stopped; everything finished is saved, {go_on}", err=True)
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno is None:
            raise
        fail(f"{path} cannot be written: {error.strerror}; what finished is saved, {go_on}")
    except StorageInternalError as error:
        cause = str(getattr(error.__cause__, "orig", None) or error)
        fail(f"the study cannot be stored: {cause}; what finished is saved, {go_on}")
    except JobFailed as error:
        fail(f"{error}; what finished is saved, {go_on}")


def _tell(run) -> None:
    from .report import summary

    typer.echo(summary(run))
    typer.echo(f"\nreport {run.report}\npage {run.page}\nfront {run.front}")
    typer.echo(f"pictures {run.compare}\npolicies {run.policies}")


@app.command()
def status(run: SearchArgument = DEFAULT_RUN) -> None:
    """How far a search is."""
    from optuna.trial import TrialState

    from .tally import drawn

    trials, config, _ = _trials(run)
    counts = {state.name.lower(): sum(t.state == state for t in trials) for state in TrialState}
    told = ", ".join(
        f"{counts[key]} {name}" for key, name in (("complete", "complete"), ("fail", "failed"), ("running", "running"))
    )
    typer.echo(f"{config.name}: {told}, {config.search.trials} wanted")
    measured = [t for t in trials if "metrics" in t.user_attrs and "same_as" not in t.user_attrs]
    if measured:
        columns = zip(*(drawn(t, config.prompts.search_images) for t in measured), strict=True)
        pictures, steps, saved = map(sum, columns)
        seconds = sum(t.user_attrs["metrics"]["generate_seconds"] for t in measured)
        typer.echo(
            f"{pictures / seconds:.1f} pictures per second and worker; "
            f"{100 * saved / steps:.0f} % of the denoising steps were those of earlier candidates"
        )
    for trial in trials:
        if "reason" in trial.user_attrs:
            typer.echo(f"trial {trial.number} failed: {trial.user_attrs['reason']}")


def _trials(path: Path):
    import optuna

    from .config import ConfigError
    from .run_directory import RunDirectory
    from .storage import STUDY, open_storage, study_url

    run = RunDirectory.of_search(path)
    config = run.load_config()
    nothing = ConfigError(f"{path} has no study yet; its search stopped before the first trial.")
    if config.search.storage is None and not (path / "study.db").exists():
        raise nothing
    try:
        study = optuna.load_study(study_name=STUDY, storage=open_storage(study_url(run, config)))
    except KeyError:
        raise nothing from None
    return study.get_trials(deepcopy=False), config, run


@app.command()
def front(
    run: SearchArgument = DEFAULT_RUN,
    format_: Annotated[str, typer.Option("--format", help="table, json or csv")] = "table",
) -> None:
    """The non-dominated trials of a search, fastest first, as seen on the search prompts."""
    import csv

    from .config import ConfigError
    from .front import beside_steps, guidance_column, non_dominated
    from .storage import point_of, stands

    if format_ not in ("table", "json", "csv"):
        raise ConfigError(f"--format is {format_!r}; accepted: table, json, csv.")
    trials, config, _ = _trials(run)
    points = non_dominated([point_of(t) for t in trials if t.values is not None and stands(t)])
    rows = [
        {"name": p.name, "alignment": p.alignment, "quality": p.quality, "latency": p.latency, "steps": p.steps}
        | guidance_column(p, config)
        for p in points
    ]
    if format_ == "json":
        typer.echo(json.dumps(rows, indent=2))
    elif format_ == "csv":
        also = ["guidance_scale"] if config.space.guidance_scale else []
        writer = csv.DictWriter(sys.stdout, ["name", "alignment", "quality", "latency", "steps", *also])
        writer.writeheader()
        writer.writerows(rows)
    else:
        for row, point in zip(rows, points, strict=True):
            scores = f"alignment {row['alignment']:.4f}  quality {row['quality']:.4f}"
            told = f"{row['steps']} steps{beside_steps(point.guidance_scale)}"
            typer.echo(f"{row['name']:<16} {scores}  {row['latency']:.3f} s  {told}")


@app.command()
def export(
    run: SearchArgument = DEFAULT_RUN,
    pick: Annotated[
        str, typer.Option(help="quality, balanced, fast, or a confirmed candidate as trial-7 or late-reuse-4")
    ] = "balanced",
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("policy.json"),
) -> None:
    """Write a confirmed policy, with its evidence, as a file that any pipeline obeys."""
    from ..policies import BlockPolicy
    from .config import ConfigError
    from .run_directory import RunDirectory

    policies = RunDirectory.of_search(run).policies
    there = sorted(path.stem for path in policies.glob("*.json"))
    if pick not in there:
        raise ConfigError(f"--pick is {pick!r}; accepted: {', '.join(there) or 'none: nothing held'}.")
    policy = BlockPolicy.load(policies / f"{pick}.json")
    try:
        policy.save(output)
    except OSError as error:
        raise ConfigError(f"--output is {output}, which cannot be written: {error.strerror}.") from None
    typer.echo(output)


for command in (generate, evaluate, verify):
    app.command()(command)


@app.command()
def dashboard(
    run: RunArgument = DEFAULT_RUN,
    host: Annotated[str, typer.Option(help="who may look: this machine alone by default")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one")] = 8431,
) -> None:
    """Show a run in the browser: the front, its pictures, what each policy does; live while it searches."""
    from ..dashboards.server import serve

    serve(run, host, port)


@app.command()
def report(
    run: RunArgument = DEFAULT_RUN,
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("report.html"),
) -> None:
    """Write the same page as one file to mail or attach."""
    from ..dashboards.report import write_report

    write_report(run, output)
    typer.echo(output)


@app.command()
def schema(
    config: Annotated[bool, typer.Option("--config", help="of the config instead of the policy file")] = False,
) -> None:
    """Print the JSON Schema of the policy file."""
    from ..policies import BlockPolicy
    from .config import Config

    typer.echo(json.dumps((Config if config else BlockPolicy).model_json_schema(), indent=2))


@app.command()
def env() -> None:
    """Print versions and devices, for bug reports."""
    import platform
    from importlib.metadata import version

    import torch

    for name in ("blocktune", "torch", "diffusers", "transformers", "optuna", "ray", "mlflow", "open_clip_torch"):
        typer.echo(f"{name} {version(name)}")
    typer.echo(f"python {platform.python_version()} on {platform.platform()}")
    typer.echo(f"GPU {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")


def main() -> None:
    """Exit 0 on success, 2 on a user's mistake with one sentence, 1 on a fault."""
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    import optuna.logging  # 0.3 s; its chatter would break the progress view

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        app(standalone_mode=True)
    except ValueError as error:
        # ConfigError, PolicyError and UnknownEvaluator are a user's mistakes; any other ValueError is a fault
        if type(error).__module__.startswith("blocktune."):
            typer.echo(f"blocktune: {error}", err=True)
            raise SystemExit(2) from None
        raise
