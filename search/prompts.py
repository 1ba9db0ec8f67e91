"""Which prompts a search or a command draws: the reference model's, or any set that evaluators can read."""

from collections.abc import Sequence
from dataclasses import replace

from ..evaluators import Prompt, read_prompt_set
from .config import Config, ConfigError


def read_prompts(config: Config, split: str) -> tuple[Prompt, ...]:
    """The prompts of `search` or `confirm`, as many as the config asks for."""
    source, count = getattr(config.prompts, split), getattr(config.prompts, f"{split}_images")
    if source == "reference":
        from ..reference import prompts

        return prompts(split)[:count]
    return read_named(f"prompts.{split}", source, split, count)


def fewer_than_asked(config: Config) -> list[str]:
    """A line for each split that has not as many prompts as the config asks for."""
    counts = {s: (len(read_prompts(config, s)), getattr(config.prompts, f"{s}_images")) for s in ("search", "confirm")}
    return [
        f"prompts.{split} has {there} pictures, fewer than the {asked} of prompts.{split}_images"
        for split, (there, asked) in counts.items()
        if there < asked
    ]


def read_named(field: str, source: str, split: str, count: int | None) -> tuple[Prompt, ...]:
    """`read_prompt_set`, whose errors are the user's: a ConfigError that names `field`."""
    try:
        return read_prompt_set(source, split, count)
    except OSError as error:
        raise ConfigError(f"{field} is {source!r}, which cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{field}: {error}.") from None


def reseeded(prompts: Sequence[Prompt], draw: int) -> tuple[Prompt, ...]:
    """The same prompts with the seeds of further pictures of them; those of draw 0 are their own."""
    # far from those of other prompts, and in the 32 bits that torch's generator on the CPU takes of a seed
    return tuple(replace(prompt, seed=(prompt.seed + draw * 0x9E3779B1) % 2**63) for prompt in prompts)


def check_spread(field: str, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts over which no interval can be had: its spread is that between prompts, so there have to be two."""
    if len({prompt.text for prompt in prompts}) < 2:
        told = f"{len(prompts)} picture{'s' * (len(prompts) > 1)} of one prompt"
        raise ConfigError(f"{field} gives {told}; accepted: two prompts or more, for an interval.")
