"""Which tokens of the text stream a prompt and its phrases are, found with the pipeline's own tokenizers.

While a policy that asks for tokens is applied, the pipeline's `encode_prompt` is watched: the rows of embeddings that
it returns are known by their text, whoever calls it and however the pipeline batches or repeats them later.
"""

import functools
import inspect
from collections import deque
from typing import Any, TypeAlias

import torch

from .architectures import ARCHITECTURES, Architecture, Segment
from .error import PolicyError, short
from .policy import Tokens

# A prompt, and per token of its stretch the characters `(start, end)` that the token stands for; `(0, 0)` where it is
# padding, special, or of a template.
Stretch: TypeAlias = tuple[str, list[tuple[int, int]]]


class Texts:
    """The prompts behind the rows of one `encoder_hidden_states`: for each row its stretches, in order."""

    def __init__(self, rows: list[list[Stretch]]) -> None:
        self.rows = rows

    def mark(self, row: int, tokens: Tokens) -> torch.Tensor:
        """Which tokens of the row `tokens` names: bool `(tokens,)`."""
        parts = []
        for prompt, spans in self.rows[row]:
            start, end = torch.tensor(spans).reshape(-1, 2).unbind(1)
            filled = start < end
            if isinstance(tokens, str):
                parts.append(filled if tokens == "prompt" else torch.ones_like(filled))
                continue
            marked = torch.zeros_like(filled)
            for a, b in (place for phrase in tokens for place in places(phrase, prompt)):
                marked |= filled & (start < b) & (end > a)
            parts.append(marked)
        return torch.cat(parts)

    def missing(self, phrases: tuple[str, ...]) -> str | None:
        """A phrase that stands in none of the prompts."""
        prompts = {prompt for row in self.rows for prompt, _ in row}
        return next((p for p in phrases if not any(places(p, prompt) for prompt in prompts)), None)


def places(phrase: str, prompt: str) -> list[tuple[int, int]]:
    """Where the phrase stands in the prompt as whole words, whatever the case: `(start, end)` in characters."""
    found, low, wanted = [], prompt.lower(), phrase.strip().lower()
    start = low.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        if not low[start - 1 : start].isalnum() and not low[end : end + 1].isalnum():
            found.append((start, end))
        start = low.find(wanted, start + 1)
    return found


class PromptWatch:
    """Remembers what a pipeline's `encode_prompt` was asked and what it returned, until `remove()`."""

    def __init__(self, pipe: Any, architecture: Architecture) -> None:
        """Raises PolicyError for a pipeline whose tokens cannot be located."""
        if not architecture.text:
            known = ", ".join(name for name, row in ARCHITECTURES.items() if row.text)
            raise PolicyError(
                f"tokens other than 'all' can be located for {known}, not for {architecture.transformer}."
            )
        self._signature = inspect.signature(pipe.encode_prompt)
        if "image" in self._signature.parameters:
            raise PolicyError(
                f"{type(pipe).__name__} encodes pictures along with the prompt, so its tokens cannot be located; "
                "use tokens 'all'."
            )
        self._pipe = pipe
        self._segments = architecture.text
        self._known: deque[tuple[torch.Tensor, list[list[Stretch]]]] = deque(maxlen=8)
        encode = pipe.encode_prompt

        @functools.wraps(encode)
        def watched(*args: Any, **kwargs: Any) -> Any:
            returned = encode(*args, **kwargs)
            self._remember(self._signature.bind(*args, **kwargs), returned)
            return returned

        self._watched = watched
        pipe.encode_prompt = watched

    def remove(self) -> None:
        if self._pipe.__dict__.get("encode_prompt") is self._watched:
            del self._pipe.encode_prompt

    def texts(self, embeddings: torch.Tensor) -> Texts:
        """The prompts behind `embeddings` `(rows, tokens, dim)`; PolicyError where a row is not known."""
        rows = []
        for index, row in enumerate(embeddings):
            for known, stretches in reversed(self._known):
                if known.shape[1:] == row.shape:
                    same = (known.to(row) == row).flatten(1).all(dim=1).nonzero()
                    if len(same):
                        rows.append(stretches[int(same[0])])
                        break
            else:
                raise PolicyError(
                    f"Row {index} of the prompt embeddings did not come from the pipeline's encode_prompt under this "
                    "policy, so its tokens cannot be located; pass prompts, or use tokens 'all'."
                )
        return Texts(rows)

    def _remember(self, call: inspect.BoundArguments, returned: tuple[Any, ...]) -> None:
        call.apply_defaults()
        asked = call.arguments
        if asked.get("prompt_embeds") is None and asked["prompt"] is not None:
            self._note(asked, "", returned[0])
        if asked.get("do_classifier_free_guidance") and asked.get("negative_prompt_embeds") is None:
            self._note(asked, "negative_", returned[1])

    def _note(self, asked: dict[str, Any], side: str, embeddings: torch.Tensor) -> None:
        """Keeps one side's embeddings with the stretches of each of their rows."""
        copies = asked.get("num_images_per_prompt", 1)
        embeddings = embeddings[::copies]
        prompts = _listed(asked[side + "prompt"] or "")
        rows: list[list[Stretch]] = [[] for _ in embeddings]
        for segment in self._segments:
            texts = _listed(asked.get(side + segment.argument) or prompts)
            other = asked.get(side + segment.shared_with) if segment.shared_with else None
            if other and _listed(other) != texts:
                raise PolicyError(
                    f"{segment.shared_with} differs from {segment.argument}, and their tokens share places; "
                    "use tokens 'all', or one prompt."
                )
            texts = texts if len(texts) == len(rows) else texts * len(rows)
            for row, spans, text in zip(rows, self._located(segment, texts, asked), texts, strict=True):
                row.append((text, spans))
        located = sum(len(spans) for _, spans in rows[0])
        if located != embeddings.shape[1]:
            raise PolicyError(
                f"The tokenizers give {located} tokens where the text stream has {embeddings.shape[1]}, so tokens "
                "cannot be located; use tokens 'all'."
            )
        self._known.append((embeddings, rows))

    def _located(self, segment: Segment, texts: list[str], asked: dict[str, Any]) -> list[list[tuple[int, int]]]:
        """Per text and token of the segment, the characters of the text that the token stands for."""
        tokenizer = getattr(self._pipe, segment.tokenizer)
        padded = segment.length != "longest"
        dropped = getattr(self._pipe, segment.dropped) if segment.dropped else 0
        if segment.length == "max_sequence_length":
            length = asked["max_sequence_length"]
        else:
            length = self._pipe.tokenizer_max_length + dropped
        if tokenizer is None:
            return [[(0, 0)] * length for _ in texts]
        if not tokenizer.is_fast:
            raise PolicyError(f"{segment.tokenizer} tells no offsets, so tokens cannot be located; use tokens 'all'.")
        template = getattr(self._pipe, segment.template) if segment.template else "{}"
        front = template.index("{}")
        read = tokenizer(
            [template.format(text) for text in texts],
            padding="max_length" if padded else True,
            max_length=length,
            truncation=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        rows = []
        for i, text in enumerate(texts):
            spans = []
            for (a, b), special, there in zip(
                read.offset_mapping[i], read.special_tokens_mask[i], read.attention_mask[i], strict=True
            ):
                a, b = max(a - front, 0), min(b - front, len(text))
                if there or padded:  # else the pipeline takes the padding off before it drops the front
                    spans.append((a, b) if there and not special and a < b else (0, 0))
            rows.append(spans[dropped:])
        longest = max(map(len, rows))
        return [
            (row + [(0, 0)] * (longest - len(row)))[: asked["max_sequence_length"] if not padded else None]
            for row in rows
        ]


def _listed(prompt: Any) -> list[str]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list | tuple) and all(isinstance(text, str) for text in prompt):
        return list(prompt)
    raise PolicyError(f"prompt is {short(prompt)}; tokens can be located in a text or a list of texts.")
