"""The command line. Heavy imports live inside the commands, so that --help answers at once."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    help="Finds what each block of a diffusion transformer should do at each step of a run.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip
RunArgument = Annotated[Path, typer.Argument(help="a run directory")]
DEFAULT_RUN = Path("runs/reference")


@app.command()
def search(
    config: Annotated[Path | None, typer.Argument(help="YAML file; without it the reference model is searched")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, e.g. search.trials=100; may be repeated")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="run directory; runs/<name> when not given")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the directory")] = False,
) -> None:
    """Search policies, confirm the front on held-out prompts, export the picks."""
    from .config import load_config

    settings = load_config(config, set_ or [])
    _search(settings, out or Path("runs") / settings.name, resume, confirm_only=False)


@app.command()
def confirm(run: RunArgument = DEFAULT_RUN) -> None:
    """Measure the front of a finished or stopped search on held-out prompts again."""
    from .run_directory import RunDirectory

    _search(RunDirectory.existing(run).load_config(), run, resume=True, confirm_only=True)


def _search(config, path: Path, resume: bool, confirm_only: bool) -> None:
    from optuna.exceptions import StorageInternalError

    from .launch import launch
    from .pool import JobFailed

    go_on = f"go on with: blocktune search --resume --out {path}"
    try:
        run = launch(config, path, resume, confirm_only)
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
    _print_confirmed(run)
    typer.echo(f"\nreport {run.report}\nfront {run.front}\npictures {run.compare}\npolicies {run.policies}")


def _print_confirmed(run) -> None:
    from rich.console import Console
    from rich.table import Table

    from .confirm import load_confirmed
    from .report import _points

    record, confirmed = load_confirmed(run)
    config = run.load_config()
    table = Table(
        title=f"{config.name}: held-out prompts, new seeds, against the unmodified model", title_justify="left"
    )
    for column in (
        "candidate",
        "steps",
        "speed-up",
        f"{config.objectives.alignment} (points)",
        f"{config.objectives.quality} (points)",
        "pick",
    ):
        table.add_column(column)
    for c in sorted(confirmed, key=lambda c: c.speedup):
        table.add_row(
            c.name, str(c.steps), f"{c.speedup:.2f}x", _points(c.alignment), _points(c.quality), ", ".join(c.picks)
        )
    console = Console()
    console.print(table)
    if not any(c.picks for c in confirmed):
        console.print(
            f"Nothing beat the unmodified model within {100 * record['margin']:.1f} points: nothing is picked."
        )


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
    for trial in trials:
        if "reason" in trial.user_attrs:
            typer.echo(f"trial {trial.number} failed: {trial.user_attrs['reason']}")


def _trials(path: Path):
    import optuna

    from .config import ConfigError
    from .run_directory import RunDirectory
    from .study import STUDY, open_storage, study_url

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
    from .front import non_dominated
    from .study import point_of

    if format_ not in ("table", "json", "csv"):
        raise ConfigError(f"--format is {format_!r}; accepted: table, json, csv.")
    trials, _, _ = _trials(run)
    complete = [t for t in trials if t.values is not None and all(v <= 0 for v in t.constraints.values())]
    rows = [
        {"name": p.name, "alignment": p.alignment, "quality": p.quality, "latency": p.latency, "steps": p.steps}
        for p in non_dominated([point_of(t) for t in complete])
    ]
    if format_ == "json":
        typer.echo(json.dumps(rows, indent=2))
    elif format_ == "csv":
        writer = csv.DictWriter(sys.stdout, ["name", "alignment", "quality", "latency", "steps"])
        writer.writeheader()
        writer.writerows(rows)
    else:
        for row in rows:
            scores = f"alignment {row['alignment']:.4f}  quality {row['quality']:.4f}"
            typer.echo(f"{row['name']:<16} {scores}  {row['latency']:.3f} s  {row['steps']} steps")


@app.command()
def export(
    run: RunArgument = DEFAULT_RUN,
    pick: Annotated[
        str, typer.Option(help="quality, balanced, fast, or a confirmed candidate as trial-7")
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


def _prepare(policy, model: str, steps: int | None, guidance: float | None):
    """A pipeline, the sampling that `policy` was tuned for with what the user changed, and the steps."""
    import torch

    from .config import Generation
    from .generation import load

    tuned = (policy.tuned_for or {}) if policy else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = tuned.get("dtype") or ("bfloat16" if device == "cuda" else "float32")
    fields: dict[str, Any] = {
        k: tuned[k] for k in ("guidance_scale", "height", "width", "max_sequence_length") if tuned.get(k) is not None
    }
    if guidance is not None:
        fields["guidance_scale"] = guidance
    generation = Generation(**fields)
    return (
        load(model, device, getattr(torch, dtype)),
        generation,
        steps or tuned.get("num_inference_steps", generation.num_inference_steps),
    )


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="what to draw")],
    policy: Annotated[Path | None, typer.Option(help="a policy file; without it the unmodified model draws")] = None,
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("out.png"),
    model: Annotated[str, typer.Option(help="pipeline folder or hub id")] = "reference",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="the policy's own when not given")] = None,
    guidance: Annotated[float | None, typer.Option(help="the policy's own when not given")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="the unmodified model's picture beside it")] = False,
) -> None:
    """Draw one picture under a policy."""
    from PIL import Image

    from ..evaluators import Prompt
    from ..policies import BlockPolicy
    from .config import ConfigError
    from .generation import embed
    from .generation import generate as pictures
    from .report import side_by_side

    if not prompt.strip():
        raise ConfigError("--prompt is empty; accepted: a sentence.")
    loaded = BlockPolicy.load(policy) if policy else None
    pipe, generation, count = _prepare(loaded, model, steps, guidance)
    wanted, embeddings = [Prompt(prompt, "", seed)], embed(pipe, [prompt], generation)
    image = pictures(pipe, wanted, embeddings, generation, count, loaded)
    if compare and loaded:
        plain = pictures(pipe, wanted, embeddings, generation, steps or generation.num_inference_steps)
        side_by_side({"unmodified": plain, loaded.name: image}, [prompt], output, tile=288)
    else:
        Image.fromarray(image[0]).save(output)
    typer.echo(output)


@app.command()
def evaluate(
    policy: Annotated[Path, typer.Argument(help="a policy file")],
    model: Annotated[str, typer.Option(help="pipeline folder or hub id")] = "reference",
    prompts: Annotated[
        str, typer.Option(help="`test`, `confirm`, `search` of the reference model, or a JSON lines file")
    ] = "test",
    images: Annotated[int | None, typer.Option(min=2, help="the first so many prompts; all when not given")] = None,
    evaluators: Annotated[str, typer.Option(help="names, separated by commas")] = "shapes,shapes_binary,crispness",
) -> None:
    """Score a policy against the unmodified model, paired, with 95 % intervals."""
    from ..evaluators import get, load_prompts, paired_interval
    from ..policies import BlockPolicy
    from ..reference import prompts as reference_prompts
    from .config import ConfigError
    from .generation import embed
    from .generation import generate as pictures
    from .progress import Display
    from .report import _points

    loaded = BlockPolicy.load(policy)
    if prompts in ("search", "confirm", "test"):
        chosen = reference_prompts(prompts)[:images]
    elif Path(prompts).exists():
        chosen = load_prompts(prompts)[:images]
    else:
        raise ConfigError(f"--prompts is {prompts!r}; accepted: search, confirm, test, or a JSON lines file.")
    scorers = [get(name) for name in evaluators.split(",")]
    pipe, generation, count = _prepare(loaded, model, None, None)
    display = Display()
    embeddings = embed(pipe, [p.text for p in chosen], generation)
    display.say(f"generating {len(chosen)} pictures with the unmodified model")
    before = pictures(pipe, chosen, embeddings, generation, generation.num_inference_steps)
    display.say(f"generating {len(chosen)} pictures under {loaded.name}")
    after = pictures(pipe, chosen, embeddings, generation, count, loaded)
    texts = [p.text for p in chosen]
    for scorer in scorers:
        reference = before if scorer.needs_reference else None
        result = paired_interval(
            scorer.score(after, texts, reference), scorer.score(before, texts, reference), groups=texts
        )
        typer.echo(
            f"{scorer.name:<16} {result.value:.4f}  unmodified {result.baseline:.4f}  "
            f"{_points(result)} points, n = {result.n}"
        )


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
