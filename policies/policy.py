"""What a policy is: rules bound to one model architecture, and the JSON file they live in (`schema/policy.v1.json`)."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .architectures import block_slots, fingerprint, resolve
from .error import PolicyError, refusal, short
from .hub import Hub
from .json_file import json_of

if TYPE_CHECKING:
    from . import formats

SCHEMA = "urn:blocktune:policy:v1"
SCHEMA_VERSION = 1

Branch: TypeAlias = Literal["both", "cond", "uncond"]
Operand: TypeAlias = Literal["input", "key", "value", "logit"]
Tokens: TypeAlias = Literal["all", "prompt"] | tuple[str, ...]
WHOLE_RUN = (0.0, 1.0)
# At least 0 and finite; `+ 0.0` turns -0.0 into 0.0, so that equal policies have equal digests.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0), AfterValidator(lambda x: x + 0.0)]


def _nonempty(window: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
    if not 0.0 <= window[0] < window[1] <= 1.0:
        raise ValueError(f"{info.field_name} is {list(window)}; it must be [start, end] with 0 <= start < end <= 1.")
    return window


Window = Annotated[tuple[Number, Number], AfterValidator(_nonempty)]  # [start, end) of the run, in fractions


class _Content(BaseModel):
    """Frozen, closed data whose every fault is a PolicyError of one sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise refusal(error, type(self), _PARTS) from None

    # Tells pydantic that nested validation need not call this constructor, so that faults keep their full path.
    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        """As pydantic's, but raises PolicyError."""
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise refusal(error, cls, _PARTS) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **kwargs: Any) -> Self:
        """As pydantic's, but raises PolicyError."""
        try:
            return super().model_validate_json(json_data, **kwargs)
        except ValidationError as error:
            raise refusal(error, cls, _PARTS) from None


def _type_required(schema: dict[str, Any]) -> None:
    schema.setdefault("required", []).insert(0, "type")


class _Action(_Content):
    model_config = ConfigDict(json_schema_extra=_type_required)  # in a file, the type tells actions apart


class Skip(_Action):
    """The block returns its inputs, in its own output order: the *remove* of arXiv 2601.02211."""

    type: Literal["skip"] = "skip"


class Reuse(_Action):
    """The block adds the residual (output minus input, of both streams) that it computed last.

    `every=k` computes again as soon as the residual is k steps old: on each k-th step of the window when the block
    computed just before it, at its steps 0, k, 2k ... when nothing was computed before. Without `every` the residual
    serves the whole window. Where there is none yet, the block computes. (arXiv 2601.02211 skips without
    caching, and leaves that to a cache of whole steps.)

    With `forecast="linear"` it adds what the line through the last two residuals says of this step: the first order of
    TaylorSeer (arXiv 2503.06923), whose residuals are those of attention and feed-forward. It keeps two of them; until
    there are two, the one serves.
    """

    type: Literal["reuse"] = "reuse"
    every: Annotated[StrictInt, Field(ge=2)] | None = None
    forecast: Literal["linear"] | None = None


class ScaleText(_Action):
    """The block hears the text `scale` times louder (0 silences it), at one operand of its joint attention.

    * `input`: the text stream in front of the block. `scope="propagate"` (default; *enhance* of arXiv 2601.02211, and
      its *disable* where `scale` is 0) changes the running stream and so all later blocks; with `scope="local"` only
      this block sees it: the running stream gets the update that the block computed, unscaled itself.
    * `key`, `value`: text keys (after their norm), text values.
    * `logit`: `ln(scale)` is added to the logits from image queries to text keys; text queries are left alone.

    `tokens`: `all`, `prompt` (neither padding nor special), or phrases of the prompt.
    """

    type: Literal["scale_text"] = "scale_text"
    operand: Operand
    scale: Number
    tokens: Tokens = "all"
    scope: Literal["local", "propagate"] | None = None

    @field_validator("tokens", mode="before")
    @classmethod
    def _known_tokens(cls, tokens: Any) -> Any:
        phrases = isinstance(tokens, list | tuple) and tokens and all(isinstance(p, str) and p.strip() for p in tokens)
        if phrases and len(set(tokens)) == len(tokens):
            return tuple(sorted(tokens))
        if tokens in ("all", "prompt"):
            return tokens
        raise ValueError(f"tokens is {tokens!r}; it must be 'all', 'prompt' or a list of different phrases.")

    @model_validator(mode="before")
    @classmethod
    def _default_scope(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("operand") == "input" and data.get("scope") is None:
            return {**data, "scope": "propagate"}
        return data

    @model_validator(mode="after")
    def _scope_is_of_input(self) -> Self:
        if self.scope is not None and self.operand != "input":
            raise ValueError(f"scope is {self.scope!r}; only operand 'input' has a scope, not {self.operand!r}.")
        return self


Action = Annotated[Skip | Reuse | ScaleText, Field(discriminator="type")]


class Rule(_Content):
    """One action for some blocks, in the window `[start, end)` of the run (fractions) and one branch of guidance.

    Blocks count from 0 in execution order and are kept sorted. Step i of T lies in the window when start <= i/T < end.
    """

    blocks: tuple[Annotated[StrictInt, Field(ge=0)], ...] = Field(min_length=1)
    window: Window = WHOLE_RUN
    branch: Branch = "both"
    action: Action

    @field_validator("blocks")
    @classmethod
    def _sorted_blocks(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"blocks is {short(list(blocks))}; each block may be named once.")
        return tuple(sorted(blocks))

    @property
    def acts(self) -> bool:
        """False for a rule that changes nothing: a scale of 1."""
        return not (isinstance(self.action, ScaleText) and self.action.scale == 1.0)

    @property
    def needs_step(self) -> bool:
        """Whether obeying the rule takes knowing which step of the run a call is."""
        return self.acts and (self.window != WHOLE_RUN or isinstance(self.action, Reuse))


class ModelIdentity(_Content):
    """Which architecture a policy is for: transformer class, number of blocks, sha256 of the architecture fields."""

    transformer: Annotated[str, Field(min_length=1)]
    num_blocks: Annotated[StrictInt, Field(ge=1)]
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @classmethod
    def of(cls, pipe_or_transformer: Any) -> Self:
        """The identity of a pipeline's transformer, or of a transformer; an identity as it is.

        Raises PolicyError for an unknown class.
        """
        if isinstance(pipe_or_transformer, cls):
            return pipe_or_transformer
        transformer, architecture = resolve(pipe_or_transformer)
        num_blocks = len(block_slots(transformer, architecture))
        return cls(transformer=architecture.transformer, num_blocks=num_blocks, fingerprint=fingerprint(transformer))


def _with_header(schema: dict[str, Any]) -> None:
    header = {
        "$schema": {"const": SCHEMA},
        "_class_name": {"const": "BlockPolicy"},
        "_blocktune_version": {"type": "string"},
        "schema_version": {"const": SCHEMA_VERSION},
    }
    schema["properties"] = header | schema["properties"]
    schema["required"] = ["schema_version", *schema["required"]]
    schema.update({"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA})


class BlockPolicy(_Content, Hub):
    """Rules bound to one model architecture. Compared by content; `digest` leaves out what is not behaviour.

    Two rules contradict each other when some block would get both in overlapping windows and branches, and one of them
    skips, or both reuse, or both scale the same operand. Reuse and scale_text go together: the scale acts when the
    block computes, and a scale of the running stream (`input`, `propagate`) at every step, in front of the block.

    Guidance acts in `guidance_window` (the interval of arXiv 2404.07724). At steps outside of it the unconditional half
    is not computed and the conditional one stands for both. A pipeline that does not guide has nothing to leave out.
    """

    model_config = ConfigDict(json_schema_extra=_with_header)

    name: Annotated[str, Field(min_length=1)]
    model: ModelIdentity
    rules: tuple[Rule, ...]
    guidance_window: Window = WHOLE_RUN
    tuned_for: dict[str, Any] | None = None
    evidence: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_header(cls, data: Any) -> Any:
        """Checks the keys that a policy file has besides the fields, where present, and takes them off."""
        if not isinstance(data, dict):
            return data
        if (found := data.get("schema_version", SCHEMA_VERSION)) != SCHEMA_VERSION or isinstance(found, bool):
            newer = isinstance(found, int) and found > SCHEMA_VERSION
            advice = f"reads up to {SCHEMA_VERSION}, update it" if newer else f"reads {SCHEMA_VERSION}"
            raise ValueError(f"schema_version is {short(found)}; this blocktune {advice}.")
        for key, wanted in (("$schema", SCHEMA), ("_class_name", "BlockPolicy")):
            if data.get(key, wanted) != wanted:
                raise ValueError(f"{key} is {short(data[key])}; it must be {wanted!r}.")
        if not isinstance(data.get("_blocktune_version", ""), str):
            raise ValueError(f"_blocktune_version is {short(data['_blocktune_version'])}; it must be a string.")
        header = ("$schema", "_class_name", "_blocktune_version", "schema_version")
        return {key: value for key, value in data.items() if key not in header}

    @field_validator("tuned_for", "evidence", mode="before")
    @classmethod
    def _json_only(cls, value: Any, info: ValidationInfo) -> Any:
        try:
            return json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{info.field_name} must be plain JSON with finite numbers only ({error}).") from None

    @model_validator(mode="after")
    def _rules_agree(self) -> Self:
        for i, rule in enumerate(self.rules):
            if rule.blocks[-1] >= self.model.num_blocks:
                last = self.model.num_blocks - 1
                raise ValueError(f"rules[{i}].blocks has {rule.blocks[-1]}; the blocks of this model are 0 to {last}.")
        for (i, a), (j, b) in combinations([(i, rule) for i, rule in enumerate(self.rules) if rule.acts], 2):
            if shared := _contradiction(a, b):
                raise ValueError(
                    f"rules[{i}] ({a.action.type}) and rules[{j}] ({b.action.type}) contradict each other on block "
                    f"{shared[0]} in window [{max(a.window[0], b.window[0])}, {min(a.window[1], b.window[1])}); "
                    "keep one, or part their windows or branches."
                )
        return self

    @classmethod
    def for_model(
        cls,
        pipe_or_transformer: Any,
        name: str,
        rules: "list[Rule] | tuple[Rule, ...]",
        guidance_window: tuple[float, float] = WHOLE_RUN,
    ) -> Self:
        """A policy bound to the architecture at hand; PolicyError for an unknown class or rules that do not fit."""
        model = ModelIdentity.of(pipe_or_transformer)
        return cls(name=name, model=model, rules=tuple(rules), guidance_window=guidance_window)

    @classmethod
    def from_ecad(cls, path: str | PathLike[str], model: Any, *, partial: "formats.Partial" = "refuse") -> Self:
        """The policy of an ECAD schedule for `model`, a pipeline, transformer or ModelIdentity; see `formats.ecad`."""
        from . import formats

        identity = ModelIdentity.of(model)
        return cls(model=identity, **formats.ecad(path, identity.num_blocks, partial))

    @classmethod
    def from_textailor(
        cls,
        model: Any,
        layers: Sequence[int],
        scale: float | Sequence[float] | None = None,
        way: "formats.Way" = "strengthen",
    ) -> Self:
        """The policy of a TexTailor controller for `model`; see `formats.textailor`."""
        from . import formats

        identity = ModelIdentity.of(model)
        return cls(model=identity, **formats.textailor(identity.num_blocks, layers, scale, way))

    @classmethod
    def from_step_mask(cls, model: Any, mask: Sequence[bool] | Sequence[int]) -> Self:
        """The policy for `model` that computes the steps where `mask` is 1 and reuses the others."""
        from . import formats

        identity = ModelIdentity.of(model)
        return cls(model=identity, **formats.step_mask(identity.num_blocks, mask))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Reads a policy file. Raises PolicyError when it is missing, unreadable, not JSON, or not a valid policy."""
        with json_of(path) as data:
            if not isinstance(data, dict) or "schema_version" not in data:
                raise PolicyError(
                    f"schema_version is missing; a policy file is a JSON object with it, now {SCHEMA_VERSION}."
                )
            return cls.model_validate(data)

    def to_json_string(self) -> str:
        """The text of the policy file."""
        header = {
            "$schema": SCHEMA,
            "_class_name": "BlockPolicy",
            "_blocktune_version": version("blocktune"),
            "schema_version": SCHEMA_VERSION,
        }
        body = self.model_dump(mode="json", include={"name", "model"})
        body["rules"] = [rule.model_dump(mode="json", exclude_none=True) for rule in self.rules]
        if self.guides_in_part:
            body["guidance_window"] = list(self.guidance_window)
        body |= {key: value for key in ("tuned_for", "evidence") if (value := getattr(self, key)) is not None}
        return json.dumps(header | body, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the policy file; `load` gives an equal policy back. Raises OSError where `open` would."""
        Path(path).write_text(self.to_json_string(), "utf-8")

    def refuse_other_model(self, found: ModelIdentity) -> None:
        """PolicyError where the policy is for another architecture than `found`."""
        wanted = self.model
        if wanted.transformer != found.transformer:
            raise PolicyError(f"model.transformer is {wanted.transformer}; the model here is a {found.transformer}.")
        if wanted.num_blocks != found.num_blocks:
            raise PolicyError(f"model.num_blocks is {wanted.num_blocks}; the model here has {found.num_blocks} blocks.")
        if wanted.fingerprint != found.fingerprint:
            raise PolicyError(
                f"model.fingerprint is {wanted.fingerprint[:12]}...; the config of the model here gives "
                f"{found.fingerprint[:12]}..., so it is another architecture."
            )

    @property
    def acts(self) -> bool:
        """False for a policy that changes nothing."""
        return self.guides_in_part or any(rule.acts for rule in self.rules)

    @property
    def guides_in_part(self) -> bool:
        """Whether there are steps at which guidance does not act."""
        return self.guidance_window != WHOLE_RUN

    @property
    def digest(self) -> str:
        """sha256 of the behaviour: model, rules in any order and grouping, guidance; not name, tuned_for, evidence."""
        windows: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
        for rule in self.rules:
            if rule.acts:
                action = json.dumps(rule.action.model_dump(mode="json", exclude_none=True), sort_keys=True)
                for block in rule.blocks:
                    windows.setdefault((action, rule.branch, block), []).append(rule.window)
        acting = sorted((*key, _joined(w)) for key, w in windows.items())
        content: list[Any] = [self.model.model_dump(mode="json"), acting]
        if self.guides_in_part:
            content.append(list(self.guidance_window))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash((self.name, self.digest))


def _contradiction(a: Rule, b: Rule) -> list[int]:
    """The blocks to which two rules give actions that do not go together at one step and branch."""
    if max(a.window[0], b.window[0]) >= min(a.window[1], b.window[1]):
        return []
    if a.branch != b.branch and "both" not in (a.branch, b.branch):
        return []
    if not isinstance(a.action, Skip) and not isinstance(b.action, Skip):
        kinds = [r.action.operand if isinstance(r.action, ScaleText) else r.action.type for r in (a, b)]
        if kinds[0] != kinds[1]:
            return []
    return sorted(set(a.blocks) & set(b.blocks))


def _joined(windows: list[tuple[float, float]]) -> list[list[float]]:
    """Windows of one rule that follow on each other, as one; they never overlap, or they would contradict."""
    joined: list[list[float]] = []
    for start, end in sorted(windows):
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return joined


_PARTS: dict[str, type[BaseModel]] = {
    "rules": Rule,
    "model": ModelIdentity,
    "skip": Skip,
    "reuse": Reuse,
    "scale_text": ScaleText,
}
