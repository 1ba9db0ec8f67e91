"""The configuration of a search: every field has a default, and without a file it searches the reference model."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

M = TypeVar("M", bound=BaseModel)


class ConfigError(ValueError):
    """A user's mistake in one sentence."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(_Section):
    path: str = Field(
        default="reference", description="a diffusers pipeline folder or hub id; `reference` is the bundled model"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="auto: bfloat16 on a GPU; on a CPU whichever of float32 and bfloat16 is measured faster",
    )


class Generation(_Section):
    num_inference_steps: PositiveInt = Field(default=20, description="steps of the unmodified model")
    guidance_scale: float = 6.0
    height: PositiveInt | None = Field(default=None, description="pixels; the model's own size when not given")
    width: PositiveInt | None = None
    max_sequence_length: PositiveInt = Field(default=12, description="tokens that T5's part of the prompt is padded to")
    batch: PositiveInt = Field(default=24, description="pictures per call of the pipeline")


class Prompts(_Section):
    search: str = Field(
        default="reference",
        description="`reference`, the bundled model's; `compositional`, everyday things; or a file: .jsonl of text, "
        "kind, seed, or of GenEval; .txt of T2I-CompBench; .tsv of PartiPrompts",
    )
    confirm: str = Field(default="reference", description="held-out prompts with other seeds, as above")
    search_images: PositiveInt = Field(default=96, description="the first so many of the search prompts are used")
    confirm_images: PositiveInt = Field(
        default=576, description="so many of the held-out prompts; intervals narrow with the root of their number"
    )


class Objectives(_Section):
    alignment: str = Field(default="shapes", description="evaluator to maximise")
    quality: str = Field(default="crispness", description="evaluator to maximise")
    reported: tuple[str, ...] = Field(
        default=("shapes_binary", "psnr", "clip_score:reference", "hps_v2.1:reference", "aesthetic_v2:reference"),
        description="evaluators recorded beside",
    )


class Constraints(_Section):
    max_latency: PositiveFloat | None = Field(
        default=None, description="predicted latency, a share of the unmodified model's: 0.7 is at least 1.43x as fast"
    )
    max_cache_gib: PositiveFloat | None = Field(
        default=None,
        description="what residuals that are kept for reuse may take on a worker's device, for a batch; candidates "
        "that reuse then share no beginnings, so that it is measured over whole runs",
    )
    min_fidelity: dict[str, float] = Field(
        default={}, description="what means of reported evaluators must reach, as `{psnr: 30}`"
    )


def _nonempty(window: tuple[float, float]) -> tuple[float, float]:
    """As in a policy's file; whatever lies in `policies` takes two seconds of importing torch along."""
    if not 0 <= window[0] < window[1] <= 1:
        raise PydanticCustomError("window", "it must be [start, end] with 0 <= start < end <= 1")
    return window


_End: TypeAlias = Annotated[float, Field(allow_inf_nan=True)]  # NaN is no end either, as `_nonempty` tells
Window: TypeAlias = Annotated[tuple[_End, _End], AfterValidator(_nonempty)]  # [start, end) of the run, in fractions


class Space(_Section):
    bands: PositiveInt = Field(
        default=4,
        le=64,
        description="groups of neighbouring blocks that act alike; the number of blocks for each alone; each adds two "
        "choices, and some hundred trials tell little about more than 64 bands",
    )
    reuse_every: tuple[Annotated[int, Field(gt=1)], ...] = Field(
        default=(2, 3, 4, 6), description="choices of a band's reuse; computing is always one"
    )
    reuse_from: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field(
        default=(0.2, 0.25, 0.3, 0.4, 0.5), min_length=1, description="where reuse may begin, a fraction of the run"
    )
    compute_until: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.45, 0.65, 0.8),
        description="from where on blocks that reuse may compute no more, a fraction of the run; its end is always a "
        "choice",
    )
    forecast: bool = Field(
        default=True,
        description="also try to add what the last two residuals forecast, where a block reuses and guidance has ended",
    )
    operands: tuple[Literal["input", "key", "value", "logit"], ...] = Field(
        default=("key", "value", "logit"),
        min_length=1,
        description="where text may be scaled; not to scale it is always a choice",
    )
    max_scale: float = Field(default=1.8, gt=1, description="text is scaled by 1 to this, on a log axis")
    text_windows: tuple[Window, ...] = Field(
        default=((0.0, 0.3), (0.0, 1.0), (0.3, 1.0), (0.6, 1.0)),
        min_length=1,
        description="where text may be louder, as [start, end] in fractions of the run; candidates that start late "
        "share their beginning",
    )
    skip: bool = Field(default=True, description="also try to skip one block late in the run")
    steps: tuple[PositiveInt, ...] = Field(
        default=(16, 12, 8),
        description="fewer steps than generation.num_inference_steps that a candidate may take as well",
    )
    anchor_steps: tuple[PositiveInt, ...] = Field(
        default=(12, 8), description="the unmodified model at so many steps is an anchor: what a policy has to beat"
    )
    guidance_scale: tuple[PositiveFloat, ...] = Field(
        default=(),
        description="other scales of guidance than generation.guidance_scale that a candidate may take as well; the "
        "unmodified model at each is an anchor",
    )
    guidance_until: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.2, 0.25, 0.3, 0.4, 0.6),
        description="where guidance may end, a fraction of the run: after it the unconditional half is not computed; "
        "the end of the run is always a choice; none for a model without that half, as FLUX.1-dev",
    )


Effect: TypeAlias = Literal[
    "remove", "reuse", "disable", "disable locally", "enhance input", "enhance key", "enhance value", "enhance logit"
]


class Probe(_Section):
    images: PositiveInt = Field(
        default=96,
        description="the first so many of the search prompts, and of the held-out; no more than prompts.search_images "
        "and prompts.confirm_images give",
    )
    effects: tuple[Effect, ...] = Field(
        default=get_args(Effect),
        min_length=1,
        description="what is done to each block; `disable` is the paper's, for later ones too",
    )
    windows: tuple[Window, ...] = Field(
        default=((0.0, 1.0),), min_length=1, description="parts of the run, as [start, end] in fractions"
    )
    scale: float = Field(default=1.5, gt=1, description="how much louder text is under `enhance`")
    first_images: PositiveInt = Field(
        default=12, description="pictures of every block, and how many more one gets at a time while it is unsettled"
    )
    share: float = Field(
        default=0.4, gt=0, le=1, description="of every block on all pictures, to be drawn at most; 1 draws them all"
    )
    chosen: PositiveInt = Field(
        default=3, description="how many of the best blocks of an effect are sought, and taken together by the controls"
    )
    random_sets: NonNegativeInt = Field(default=8, description="random sets of as many blocks to compare with")


class Search(_Section):
    trials: PositiveInt = Field(default=120, description="the search ends with so many, or at the first limit below")
    max_images: PositiveInt | None = Field(
        default=None, description="pictures drawn for candidates; what runs by then is brought to its end"
    )
    max_minutes: PositiveFloat | None = Field(
        default=None, description="of searching, over all resumes, confirm not counted"
    )
    patience: PositiveInt | None = Field(
        default=None, description="trials in a row that may pass without 1 % more hypervolume"
    )
    sampler: Literal["nsgaii", "tpe", "gp", "random"] = Field(
        default="nsgaii",
        description="of Optuna's, which find as much as each other; at 1,000 trials `nsgaii` proposes in a tenth of "
        "the time of `tpe`",
    )
    refine: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="share of the candidates that are a member of the front with one choice changed by one notch; the "
        "sampler proposes the others",
    )
    seed: int = Field(default=0, ge=0, lt=2**31)  # numpy's end at 2**32, and that of a resume is a little larger
    racing: bool = Field(
        default=True,
        description="a candidate starts on few pictures and gets more while it may still add to the front; false: all "
        "pictures for each",
    )
    prior: str | None = Field(
        default=None,
        description="the `probe.parquet` of a probe of this model: what it suggests is tried first, as are "
        "published lists of blocks where the space has them, and anchors taken together",
    )
    first_images: PositiveInt = Field(default=12, description="pictures that a candidate starts on in the race")
    storage: str | None = Field(
        default=None,
        description="the URL of a database that SQLAlchemy knows, as `postgresql://user@host/optuna`; SQLite in the "
        "run directory when not given",
    )


class Transfer(_Section):
    num_inference_steps: PositiveInt | None = None
    guidance_scale: float | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None

    @model_validator(mode="after")
    def _sets_something(self) -> Self:
        if not self.model_dump(exclude_none=True):
            fields = ", ".join(type(self).model_fields)
            raise PydanticCustomError("transfer", "it must set some of {fields}", {"fields": fields})
        return self


class Confirm(_Section):
    candidates: PositiveInt = Field(
        default=5,
        description="measured again on held-out prompts beside the anchors: half are the fastest that are likely to "
        "hold, the others those of the front that command the most hypervolume",
    )
    margin: PositiveFloat = Field(
        default=0.015, description="how much alignment a pick may lose at worst, by its interval"
    )
    quality_margin: PositiveFloat = Field(
        default=0.03, description="and how much quality; noise of one grey level costs 8 points of `crispness`"
    )
    cmmd: str | None = Field(
        default=None,
        description="the CLIP of open_clip, as `ViT-L-14-336/openai`, by which the report tells how far the held-out "
        "pictures of a candidate, as a set, lie from the unmodified model's; when not given, one that ships where the "
        "model is `reference`, else CMMD is not told",
    )
    fid: str | None = Field(
        default=None,
        description="a file or URL of the weights of FID's Inception network, as "
        "`weights-inception-2015-12-05-6726825d.pth`, by which the report tells the FID of these sets as well; needs "
        "`blocktune[fid]`, and some thousand pictures to be compared with published ones",
    )
    best_of: str | None = Field(
        default=None,
        description="a reported evaluator: picks draw as many pictures of a prompt as fit into the time that the "
        "unmodified model takes for one, with their scoring, and the best by it is kept; the report tells what that "
        "gains. When not given, `clip_score:reference` where the model is `reference`, else nothing",
    )
    repeats: PositiveInt = Field(
        default=3,
        description="timed generations per candidate, in turn with the unmodified model; the median of ratios counts",
    )
    neighbours: NonNegativeInt = Field(
        default=0, description="so many neighbours in the space of each pick are measured on the search prompts"
    )
    transfer: tuple[Transfer, ...] = Field(
        default=(),
        description="settings at which picks are compared with the unmodified model as well, as "
        "`[{guidance_scale: 4}]`; each changes some of num_inference_steps, guidance_scale, height, width",
    )


class Ray(_Section):
    address: str | None = Field(
        default=None, description="a running cluster; one is started on this machine when not given"
    )
    workers: PositiveInt | None = Field(
        default=None, description="as many as GPUs, or as CPUs / cpus_per_worker but at most 8, when not given"
    )
    cpus_per_worker: PositiveInt = Field(
        default=1, description="threads that share a picture wait for each other, and on a busy machine for others too"
    )
    gpus_per_worker: NonNegativeFloat | None = Field(
        default=None, description="1 where the cluster has GPUs when not given, less `evaluator_gpus`"
    )
    evaluator_gpus: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="this share of a GPU, 0 for none, is for evaluators in a process of their own beside each worker, "
        "which score pictures while it makes others, of the next candidate too; in the worker itself when not given",
    )
    prefix_gib: NonNegativeFloat = Field(
        default=4.0,
        description="main memory in which what the transformer returned is kept for all workers, so that candidates "
        "which begin alike share their first steps; pictures are the same with 0, which shares nothing",
    )
    timeout_s: PositiveFloat | None = Field(
        default=None,
        description="seconds after which a worker is taken to hang, and replaced; when not given, a minute and 20 "
        "times what the most pictures would have taken, once a picture's cost is measured",
    )


class Mlflow(_Section):
    uri: str | None = Field(default=None, description="any tracking URI; SQLite in the run directory when not given")
    experiment: str = "blocktune"
    registered_model: str | None = Field(
        default=None,
        pattern="^[^/:@]+$",
        description="what the picks are versions of in the Model Registry; `<experiment>-<name>` when not given",
    )


class Config(_Section):
    """A whole search. Precedence: defaults, then the file, then `--set`."""

    name: str = Field(
        default="reference", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run directory runs/<name>"
    )
    model: Model = Model()
    generation: Generation = Generation()
    prompts: Prompts = Prompts()
    objectives: Objectives = Objectives()
    constraints: Constraints = Constraints()
    space: Space = Space()
    probe: Probe = Probe()
    search: Search = Search()
    confirm: Confirm = Confirm()
    ray: Ray = Ray()
    mlflow: Mlflow = Mlflow()

    @model_validator(mode="after")
    def _guided_alike(self) -> Self:
        """Guidance on or off is another number of calls or rows, of which one cost table tells nothing."""
        own = self.generation.guidance_scale
        for scale in self.space.guidance_scale:
            if (scale > 1) != (own > 1):
                raise ConfigError(
                    f"space.guidance_scale has {scale:g}; accepted: {'above' if own > 1 else 'at most'} 1, as "
                    f"generation.guidance_scale is {own:g}: a search does not switch guidance on or off."
                )
        return self

    def searched(self) -> dict[str, Any]:
        """What makes two searches the same study: model, sampling, prompts, what is wanted and space; not budget."""
        wanted = {"model", "generation", "prompts", "objectives", "constraints", "space"}
        told = self.model_dump(mode="json", include=wanted)
        for choice in ("guidance_scale", "guidance_until"):
            if not told["space"][choice]:
                del told["space"][choice]  # studies of before there was the choice are the same
        return told


def load_config(path: Path | None, overrides: list[str]) -> Config:
    """Read a YAML file and `key.sub=value` overrides (values are YAML). ConfigError names the field and the value."""
    data: dict[str, Any] = {}
    if path is not None:
        try:
            read = yaml.safe_load(path.read_text("utf-8"))
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
        if read is not None and not isinstance(read, dict):
            raise ConfigError(f"{path} holds {type(read).__name__}; accepted: a mapping of config fields.")
        data = read or {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set is {item!r}; accepted: key=value, as search.trials=100.")
        *parents, last = key.strip().split(".")
        target = data
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {item!r}: {parent} is a value, not a section.")
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {item!r}: {value!r} is not a YAML value.") from None
    return parsed(Config, data)


def parsed(model: type[M], data: Any, where: str = "") -> M:
    """`data` as a `model`, or a ConfigError on its first fault; `where` stands in front of the field's name."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), ConfigError):
            raise cause from None
        field = ".".join(filter(None, [where, *map(str, first["loc"])]))
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{field} is not a field of the config; see blocktune schema --config.") from None
        told = first["msg"][0].lower() + first["msg"][1:]  # the rest may quote a pattern
        raise ConfigError(f"{field} is {first['input']!r}: {told}.") from None
