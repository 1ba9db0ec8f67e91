"""The command line. Heavy imports live inside the commands, so that --help answers at once."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    help="Finds what each block of a diffusion transformer should do at each step of a run.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip
RunArgument = Annotated[Path, typer.Argument(help="a run directory")]
DEFAULT_RUN = Path("runs/reference")
PolicyArgument = Annotated[str, typer.Argument(help="a policy file, or models:/NAME@balanced of the Model Registry")]
MlflowOption = Annotated[
    str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="where the Model Registry of a models:/ policy is")
]
ModelOption = Annotated[str, typer.Option(help="pipeline folder or hub id")]
PromptsOption = Annotated[
    str, typer.Option(help="`test`, `confirm`, `search` of the reference model, or what prompts.search accepts")
]


@app.command()
def search(
    config: Annotated[Path | None, typer.Argument(help="YAML file; without it the reference model is searched")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, e.g. search.trials=100; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="run directory; runs/<name> when not given")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the directory")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="start nothing; tell what the search would take and could tell")
    ] = False,
    cost_table: Annotated[
        Path | None, typer.Option(help="for --dry-run: cost_table.json of another run, measured where this is to run")
    ] = None,
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
    from .estimate import estimate, read_cost_table
    from .launch import check

    check(config)
    size = f"{config.generation.num_inference_steps} steps, batches of {config.generation.batch}"
    typer.echo(f"{config.name:<12} {config.model.path}, {size}; nothing is started")
    for line in estimate(config, run, read_cost_table(cost_table) if cost_table else None).lines:
        typer.echo(line)


@app.command()
def confirm(run: RunArgument = DEFAULT_RUN) -> None:
    """Measure the front of a finished or stopped search on held-out prompts again."""
    from .run_directory import RunDirectory

    _search(RunDirectory.existing(run).load_config(), run, resume=True, confirm_only=True)


def _search(config, path: Path, resume: bool, confirm_only: bool) -> None:
    from ..dashboards.report import write_report
    from .launch import launch

    again = f"blocktune search --resume --out {path}"
    run = _guarded(path, again, lambda: launch(config, path, resume, confirm_only, write_report))
    _tell(run)


@app.command()
def probe(
    config: Annotated[Path | None, typer.Argument(help="YAML file; without it the reference model is probed")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. probe.images=192")] = None,
    out: Annotated[Path | None, typer.Option(help="run directory; runs/<name> when not given")] = None,
) -> None:
    """Measure what each block does: removed, reused, deaf to the text, or hearing it louder."""
    from .config import load_config
    from .probe import launch_probe, summary

    settings = load_config(config, set_ or [])
    path = out or Path("runs") / settings.name
    run = _guarded(path, f"blocktune probe --out {path}", lambda: launch_probe(settings, path))
    typer.echo(summary(run))
    typer.echo(f"\ntable {path / 'probe.parquet'}\npicture {path / 'probe.png'}")


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
        _fail(f"{path} cannot be written: {error.strerror}; what finished is saved, {go_on}", 1)
    except StorageInternalError as error:
        cause = str(getattr(error.__cause__, "orig", None) or error)
        _fail(f"the study cannot be stored: {cause}; what finished is saved, {go_on}", 1)
    except JobFailed as error:
        _fail(f"{error}; what finished is saved, {go_on}", 1)


def _tell(run) -> None:
    from .report import summary

    typer.echo(summary(run))
    typer.echo(f"\nreport {run.report}\npage {run.page}\nfront {run.front}")
    typer.echo(f"pictures {run.compare}\npolicies {run.policies}")


@app.command()
def status(run: RunArgument = DEFAULT_RUN) -> None:
    """How far a search is."""
    from optuna.trial import TrialState

    trials, config, _ = _trials(run)
    counts = {state.name.lower(): sum(t.state == state for t in trials) for state in TrialState}
    told = ", ".join(
        f"{counts[key]} {name}" for key, name in (("complete", "complete"), ("fail", "failed"), ("running", "running"))
    )
    typer.echo(f"{config.name}: {told}, {config.search.trials} wanted")
    measured = [t.user_attrs["metrics"] for t in trials if "metrics" in t.user_attrs and "same_as" not in t.user_attrs]
    if measured:
        pictures = sum(m.get("images", config.prompts.search_images) for m in measured)
        seconds = sum(m["generate_seconds"] for m in measured)
        saved = sum(m.get("steps_saved", 0.0) for m in measured) / len(measured)  # a run of before has none
        typer.echo(
            f"{pictures / seconds:.1f} pictures per second and worker; "
            f"{100 * saved:.0f} % of the denoising steps were those of earlier candidates"
        )
    for trial in trials:
        if "reason" in trial.user_attrs:
            typer.echo(f"trial {trial.number} failed: {trial.user_attrs['reason']}")


def _trials(path: Path):
    import optuna

    from .config import ConfigError
    from .run_directory import RunDirectory
    from .storage import STUDY, open_storage, study_url

    run = RunDirectory.existing(path)
    config = run.load_config()
    if config.search.storage is None and not (path / "study.db").exists():
        raise ConfigError(f"{path} has no study yet; its search stopped before the first trial.")
    study = optuna.load_study(study_name=STUDY, storage=open_storage(study_url(run, config)))
    return study.get_trials(deepcopy=False), config, run


@app.command()
def front(
    run: RunArgument = DEFAULT_RUN,
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
    run: RunArgument = DEFAULT_RUN,
    pick: Annotated[
        str, typer.Option(help="quality, balanced, fast, or a confirmed candidate as trial-7 or late-reuse-4")
    ] = "balanced",
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("policy.json"),
) -> None:
    """Write a confirmed policy, with its evidence, as a file that any pipeline obeys."""
    from ..policies import BlockPolicy
    from .config import ConfigError
    from .run_directory import RunDirectory

    source = RunDirectory.existing(run).policies / f"{pick}.json"
    if not source.exists():
        there = ", ".join(sorted(p.stem for p in source.parent.glob("*.json"))) or "none: nothing held"
        raise ConfigError(f"--pick is {pick!r}; accepted: {there}.")
    BlockPolicy.load(source).save(output)
    typer.echo(output)


def _policy(source: str, mlflow_uri: str | None):
    from ..policies import BlockPolicy
    from .tracking import registered_policy

    return registered_policy(source, mlflow_uri) if source.startswith("models:/") else BlockPolicy.load(source)


def _prepare(policy, model: str, steps: int | None, guidance: float | None):
    """A pipeline, its sampling under `policy`, and that of the unmodified model, which `policy` is compared with."""
    import torch

    from .config import ConfigError, Generation, parsed
    from .generation import load

    tuned = (policy.tuned_for or {}) if policy else {}
    evidence = (policy.evidence or {}) if policy else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = tuned.get("dtype") or ("bfloat16" if device == "cuda" else "float32")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"tuned_for.dtype is {dtype!r}; accepted: float32, bfloat16, float16.")
    names = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length")
    sampling = {name: tuned[name] for name in names if tuned.get(name) is not None}
    asked = {"num_inference_steps": steps, "guidance_scale": guidance}
    asked = {name: value for name, value in asked.items() if value is not None}
    under = parsed(Generation, sampling | asked, "tuned_for")
    unmodified = parsed(Generation, {**sampling, **evidence.get("unmodified", {}), **asked}, "evidence.unmodified")
    under = under.model_copy(update={"batch": unmodified.batch})
    return load(model, device, getattr(torch, dtype)), under, unmodified


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="what to draw")],
    policy: Annotated[
        str | None,
        typer.Option(help="a policy file, or models:/NAME@balanced; without it the unmodified model draws"),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("out.png"),
    model: ModelOption = "reference",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="the policy's own when not given")] = None,
    guidance: Annotated[float | None, typer.Option(help="the policy's own when not given")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="the unmodified model's picture beside it")] = False,
    mlflow_uri: MlflowOption = None,
) -> None:
    """Draw one picture under a policy."""
    from PIL import Image

    from ..evaluators import Prompt
    from .config import ConfigError
    from .generation import embed
    from .generation import generate as pictures
    from .report import side_by_side

    if not prompt.strip():
        raise ConfigError("--prompt is empty; accepted: a sentence.")
    loaded = _policy(policy, mlflow_uri) if policy else None
    pipe, under, unmodified = _prepare(loaded, model, steps, guidance)
    wanted, embeddings = [Prompt(prompt, "", seed)], embed(pipe, [prompt], under)
    image = pictures(pipe, wanted, embeddings, under, loaded)
    if compare and loaded:
        plain = pictures(pipe, wanted, embeddings, unmodified)
        side_by_side({"unmodified": plain, loaded.name: image}, [prompt], output, tile=288)
    else:
        Image.fromarray(image[0]).save(output)
    typer.echo(output)


@app.command()
def evaluate(
    policy: PolicyArgument,
    model: ModelOption = "reference",
    prompts: PromptsOption = "test",
    images: Annotated[int | None, typer.Option(min=2, help="the first so many prompts; all when not given")] = None,
    evaluators: Annotated[str, typer.Option(help="names, separated by commas")] = "shapes,shapes_binary,crispness",
    mlflow_uri: MlflowOption = None,
) -> None:
    """Score a policy against the unmodified model, paired, with 95 % intervals."""
    from ..evaluators import get, paired_interval, scale_of
    from .generation import embed
    from .generation import generate as pictures
    from .progress import Display

    loaded = _policy(policy, mlflow_uri)
    chosen = _prompts(prompts, images)
    scorers = [get(name) for name in evaluators.split(",")]
    pipe, under, unmodified = _prepare(loaded, model, None, None)
    display = Display()
    embeddings = embed(pipe, [p.text for p in chosen], under)
    display.say(f"generating {len(chosen)} pictures with the unmodified model")
    before = pictures(pipe, chosen, embeddings, unmodified)
    display.say(f"generating {len(chosen)} pictures under {loaded.name}")
    after = pictures(pipe, chosen, embeddings, under, loaded)
    texts = [p.text for p in chosen]
    for scorer in scorers:
        scores = [scorer.score(images, texts, before) for images in (after, before)]
        result = paired_interval(*scores, groups=texts, scale=scale_of(scorer))
        typer.echo(
            f"{scorer.name:<16} {result.value:.4f}  unmodified {result.baseline:.4f}  "
            f"{result.points} points, n = {result.n}"
        )


def _prompts(source: str, images: int | None):
    from ..reference import prompts
    from .prompts import check_spread, read_named

    own = source in ("search", "confirm", "test")
    chosen = prompts(source)[:images] if own else read_named("--prompts", source, "test", images)
    check_spread("--prompts" if images is None else f"--images {images}", chosen)
    return chosen


@app.command()
def verify(
    policy: PolicyArgument,
    model: ModelOption = "reference",
    prompts: PromptsOption = "test",
    images: Annotated[int, typer.Option(min=2, help="the first so many prompts")] = 96,
    evaluators: Annotated[
        str | None, typer.Option(help="of those in the file, separated by commas; the built-in ones when not given")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="how much slower than the file says still holds")
    ] = 0.1,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    mlflow_uri: MlflowOption = None,
) -> None:
    """Measure a policy on this device and say whether what its file claims holds: exit 0 if so, 1 if not."""
    from .generation import BrokenPicture
    from .progress import Display
    from .verify import verify as measured

    loaded = _policy(policy, mlflow_uri)
    chosen = _prompts(prompts, images)
    pipe, under, unmodified = _prepare(loaded, model, None, None)
    wanted = evaluators.split(",") if evaluators is not None else None
    try:
        result = measured(loaded, pipe, chosen, under, unmodified, wanted, tolerance, Display().say)
    except BrokenPicture as error:
        _fail(f"{loaded.name} does not hold: {error}", 1)
    typer.echo(json.dumps(result.to_dict(), indent=2) if json_ else "\n".join(result.lines))
    if result.holds is False:
        raise typer.Exit(1)


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


def _fail(sentence: str, code: int) -> NoReturn:
    typer.echo(f"blocktune: {sentence}", err=True)
    raise typer.Exit(code)


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
