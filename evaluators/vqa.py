"""Evaluators `vqa_score` and `vqa_attributes`: what a vision-language model answers to yes-or-no questions.

The score of a question is P(yes) / (P(yes) + P(no)) of the first word of the answer, so that what a model would rather
say than either plays no part. The checkpoint is a transformers model that takes a picture and a text: one with a chat
template (Qwen/Qwen2.5-VL-7B-Instruct) or BLIP (Salesforce/blip-vqa-capfilt-large).
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .batches import in_batches
from .blip import Blip
from .checkpoints import CheckpointError, device, load_pretrained, load_processor
from .model_score import ModelScore

_BATCH = 8  # a picture is a thousand tokens and more


class VqaScore(ModelScore):
    """VQAScore of Lin et al. 2024 (arXiv:2404.01291): one question, whether the picture shows the prompt; in [0, 1].

    There the score is P("Yes") over all words; here it is over yes and no.
    """

    family = "vqa_score"
    worst = 0.0

    def __init__(self, checkpoint: str = ""):
        super().__init__(checkpoint)
        if not checkpoint:
            raise CheckpointError(
                "vqa_score lacks a model; accepted: vqa_score:CHECKPOINT, as Qwen/Qwen2.5-VL-7B-Instruct"
            )
        self.checkpoint = checkpoint

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        questions = [[f'Does this figure show "{prompt}"? Please answer yes or no.'] for prompt in prompts]
        return np.concatenate(ask(self.checkpoint, pictures, questions))


class VqaAttributes(ModelScore):
    """The mean over a prompt's questions on its colours and places, as arXiv:2601.02211 asks them; in [0, 1].

    The checkpoint is `MODEL with FILE`. A line of the file has a prompt with the colours of its objects, or with two
    objects and their relation: `{"prompt": …, "colors": {"cat": "red"}}` or `{…, "relation": ["cat", "left", "tree"]}`.
    The paper asks for all colours of a picture at once and counts yes and no; here every object is a question of its
    own, for a probability to be read. Its amounts are counted by CountGD, which is not asked a question.
    """

    family = "vqa_attributes"
    worst = 0.0

    def __init__(self, checkpoint: str = ""):
        super().__init__(checkpoint)
        self.checkpoint, _, file = checkpoint.partition(" with ")
        if not (self.checkpoint and file):
            raise CheckpointError(f"{self.name} lacks a part; accepted: vqa_attributes:MODEL with FILE, of JSON lines")
        self._questions = read_questions(file)

    def judge(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        unknown = [prompt for prompt in prompts if prompt not in self._questions]
        if unknown:
            raise ValueError(
                f"prompts has {unknown[0]!r}, on which {self.name} has no question; accepted: prompts of its file"
            )
        answers = ask(self.checkpoint, pictures, [self._questions[prompt] for prompt in prompts])
        return np.array([answer.mean() for answer in answers])


def read_questions(file: str | Path) -> dict[str, list[str]]:
    """The questions on each prompt of a JSON lines file. Raises CheckpointError that names line and field."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"question file {file} cannot be read: {error.strerror}") from None
    questions: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        match _record(line):
            case {"prompt": str(prompt), "colors": dict(colors), **rest} if colors and not rest:
                asked = [f"Is the {thing} {color}?" for thing, color in colors.items()]
            case {"prompt": str(prompt), "relation": [str(first), str(relation), str(second)], **rest} if not rest:
                asked = [f"Is the {first} on the {relation} of the {second}?"]
            case _:
                raise CheckpointError(f"{file}:{number} is {line[:80]!r}; accepted: prompt, with colors or relation")
        questions.setdefault(prompt, []).extend(
            f'Caption: "{prompt}"\nQuestion: {question} Answer yes only if it can be seen clearly, else no.'
            for question in asked
        )
    return questions


def _record(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def ask(
    checkpoint: str, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]], pixels: int | None = None
) -> list[np.ndarray]:
    """Per picture, P(yes) over yes and no to each of its questions, float64; `pixels` is what `Blip` has."""
    rows = [(picture, question) for picture, asked in zip(pictures, questions, strict=True) for question in asked]
    if not rows:
        return [np.empty(0) for _ in pictures]
    model = Blip(checkpoint, pixels) if _is_blip(checkpoint) else _Chat(checkpoint)
    yes, no = _answers(checkpoint)

    def scores(batch: Sequence[tuple[Image.Image, str]]) -> torch.Tensor:
        words = model.first_word(*zip(*batch, strict=True)).float()  # (batch, vocabulary)
        return torch.sigmoid(words[:, yes].logsumexp(dim=-1) - words[:, no].logsumexp(dim=-1))

    answers = in_batches(scores, rows, size=_BATCH).double().numpy()
    return np.split(answers, np.cumsum([len(asked) for asked in questions])[:-1])


@cache
def _is_blip(checkpoint: str) -> bool:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint).model_type == "blip"
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint is {checkpoint!r}, which cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from None


def _processor(checkpoint: str) -> Any:
    from transformers import AutoProcessor

    return load_processor(AutoProcessor, checkpoint)


def _answers(checkpoint: str) -> tuple[list[int], list[int]]:
    """Token ids of yes and of no in their spellings, where a spelling is one token."""
    tokenizer = _processor(checkpoint).tokenizer
    spellings = [[word, word.capitalize()] for word in ("yes", "no")]
    tokens = [[tokenizer.encode(s, add_special_tokens=False) for s in words] for words in spellings]
    yes, no = ([t[0] for t in words if len(t) == 1 and t[0] != tokenizer.unk_token_id] for words in tokens)
    if not (yes and no):
        raise CheckpointError(f"{checkpoint} has no token for yes or for no; accepted: a model that has both")
    return sorted(set(yes)), sorted(set(no))


class _Chat:
    """A vision-language model with a chat template."""

    def __init__(self, checkpoint: str):
        self.checkpoint = checkpoint

    def first_word(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> torch.Tensor:
        """Logits `(n, vocabulary)` of each answer's first token."""
        from transformers import AutoModelForImageTextToText

        processor = _processor(self.checkpoint)
        # float16 overflows in Qwen
        model = load_pretrained(AutoModelForImageTextToText, self.checkpoint, torch.bfloat16)
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            for question in questions
        ]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        shown = [[picture] for picture in pictures]  # to each text its own
        inputs = processor(images=shown, text=texts, padding=True, padding_side="left", return_tensors="pt")
        return model(**inputs.to(device(), model.dtype), logits_to_keep=1).logits[:, -1]
