"""The commands that use a policy: draw one picture under it, score it, and say whether its file holds here."""

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer

PolicyArgument = Annotated[str, typer.Argument(help="a policy file, or models:/NAME@balanced of the Model Registry")]
MlflowOption = Annotated[
    str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="where the Model Registry of a models:/ policy is")
]
ModelOption = Annotated[str, typer.Option(help="pipeline folder or hub id")]
PromptsOption = Annotated[
    str, typer.Option(help="`test`, `confirm`, `search` of the reference model, or what prompts.search accepts")
]


def fail(sentence: str) -> NoReturn:
    """End a command that met a fault: one sentence, exit 1."""
    typer.echo(f"blocktune: {sentence}", err=True)
    raise typer.Exit(1)


def _policy(source: str, mlflow_uri: str | None):
    from ..policies import BlockPolicy
    from .registry import registered_policy

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


def _check_picture(output: Path) -> None:
    """ConfigError where no picture can be written to `output`, told before one is drawn."""
    from PIL import Image

    from .config import ConfigError

    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ConfigError(f"--output is {output}; accepted: a file name with the ending of pictures, as .png or .jpg.")
    there = output.exists()
    try:
        output.open("ab").close()
    except OSError as error:
        raise ConfigError(f"--output is {output}, which cannot be written: {error.strerror}.") from None
    if not there:
        output.unlink()


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
    best_of: Annotated[int, typer.Option(min=1, help="pictures to draw, of which the best by --by is kept")] = 1,
    by: Annotated[str | None, typer.Option(help="an evaluator, as clip_score:reference for the bundled model")] = None,
    mlflow_uri: MlflowOption = None,
) -> None:
    """Draw one picture under a policy, or the best of several."""
    from PIL import Image

    from ..evaluators import Prompt, get
    from .config import ConfigError
    from .generation import embed
    from .generation import generate as pictures
    from .prompts import reseeded
    from .report import side_by_side

    if not prompt.strip():
        raise ConfigError("--prompt is empty; accepted: a sentence.")
    _check_picture(output)
    judge = get(by) if by else None
    if (best_of > 1) != (judge is not None) or (judge and judge.needs_reference):
        told = f"--best-of is {best_of} and --by is {by!r}"
        raise ConfigError(f"{told}; accepted: both, the second an evaluator that needs no unmodified picture, or none.")
    loaded = _policy(policy, mlflow_uri) if policy else None
    pipe, under, unmodified = _prepare(loaded, model, steps, guidance)
    wanted = [one for draw in range(best_of) for one in reseeded([Prompt(prompt, "", seed)], draw)]
    image = pictures(pipe, wanted, embed(pipe, [prompt] * best_of, under), under, loaded)
    if judge:
        scores = judge.score(image, [prompt] * best_of)
        image = image[[scores.argmax() if judge.direction == "maximize" else scores.argmin()]]
    if compare and loaded:
        plain = pictures(pipe, wanted[:1], embed(pipe, [prompt], unmodified), unmodified)
        side_by_side({"unmodified": plain, loaded.name: image}, [prompt], output, tile=288)
    else:
        Image.fromarray(image[0]).save(output)
    typer.echo(output)


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
    embeddings = embed(pipe, [p.text for p in chosen], under)
    with Display() as display:
        display.wait(f"generating {len(chosen)} pictures with the unmodified model")
        before = pictures(pipe, chosen, embeddings, unmodified)
        display.wait(f"generating {len(chosen)} pictures under {loaded.name}")
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
        with Display() as display:
            result = measured(loaded, pipe, chosen, under, unmodified, wanted, tolerance, display.wait)
    except BrokenPicture as error:
        fail(f"{loaded.name} does not hold: {error}")
    typer.echo(json.dumps(result.to_dict(), indent=2) if json_ else "\n".join(result.lines))
    if result.holds is False:
        raise typer.Exit(1)
