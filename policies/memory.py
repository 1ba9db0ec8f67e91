"""What reuse keeps: the residuals, and how many bytes they take in a run that has not begun."""

from collections.abc import Sequence
from typing import Any

import torch

from .architectures import Slot, block_slots, resolve
from .layout import Stream
from .plan import Plan
from .policy import BlockPolicy, Branch, ModelIdentity


class Memory:
    """The residual that a block, or a run of neighbours, computed last: (text, image), output minus input.

    For forecasts also the one before, and while a step adds a forecast, that.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        self.on_cpu = on_cpu
        self.residual: tuple[Stream, torch.Tensor] | None = None
        self.older: tuple[Stream, torch.Tensor] | None = None
        self.forecast: tuple[Stream, torch.Tensor] | None = None
        self._steps = (0, 0)  # at which the older one and the last were computed
        self._given: tuple[Stream, torch.Tensor] | None = None  # to the first block, until the last has returned

    def turn(self, step: int, keeps_older: bool) -> None:
        """A step begins that computes the residual anew; the last one becomes the older, or goes."""
        self.older = self.residual if keeps_older else None
        self._steps = self._steps[1], step

    def aim(self, step: int) -> None:
        """A step begins that adds what the line through both residuals says of it; where there is one, that.

        Outside of what may be compiled, which is then the same for every step.
        """
        if self.residual is None or self.older is None:
            return
        (before, last), (text, image), (older_text, older_image) = self._steps, self.residual, self.older
        weight = (step - before) / (last - before)
        line = None if text is None or older_text is None else torch.lerp(older_text[-len(text) :], text, weight)
        self.forecast = line, torch.lerp(older_image[-len(image) :], image, weight)

    def begin(self, text: Stream, image: torch.Tensor) -> None:
        """What the block, or the first of the run, is given."""
        self._given = text, image

    def keep(self, text: Stream, image: torch.Tensor) -> None:
        """What it, or the last of the run, has returned."""
        assert self._given is not None
        (text_before, image_before), self._given = self._given, None
        text, image = None if text is None or text_before is None else text - text_before, image - image_before
        if self.on_cpu:
            text, image = None if text is None else text.cpu(), image.cpu()
        self.residual = text, image

    def recall(self, rows: int, device: torch.device) -> tuple[Stream, torch.Tensor]:
        """The residual or its forecast, on `device`; the plan reuses only what an earlier step kept.

        Of the last `rows`: once guidance has ended these are the conditional half of what was kept under it.
        """
        kept = self.forecast or self.residual
        assert kept is not None
        text, image = kept
        return None if text is None else text[-rows:].to(device), image[-rows:].to(device)

    def forget(self) -> None:
        self.residual = self.older = self.forecast = self._given = None

    @property
    def bytes(self) -> int:
        kept = (*(self.residual or ()), *(self.older or ()), *(self.forecast or ()))
        return sum(part.nbytes for part in kept if part is not None)


def within(slots: Sequence[Slot], index: int, run: tuple[int, int]) -> tuple[int, int]:
    """The part of a run that lies in the block's own list: between two lists streams are joined or split."""
    own = slots[index].children
    inside = [i for i in range(run[0], run[1] + 1) if slots[i].children is own]
    return inside[0], inside[-1]


def predict_cache_bytes(
    pipe_or_transformer: Any,
    policy: BlockPolicy,
    *,
    num_steps: int,
    image_tokens: int,
    text_tokens: int,
    pictures: int = 1,
    guided: bool = False,
    start: int = 0,
    dtype: torch.dtype | None = None,
) -> int:
    """The most bytes that residuals kept for reuse take at once in a run, as `report.cache_bytes` tells it afterwards.

    They lie on the device that makes them, or in main memory under `apply_policy(..., cache_device="cpu")`. The model
    may be on the meta device: only its config and its lists of blocks are read. `num_steps` is the length of the
    scheduler's schedule (of a second-order one, its evaluations), `start` the step at which the run begins.
    `image_tokens` and `text_tokens` are those of one picture as the transformer is given them, padding, reference
    pictures and frames included; `guided` says that classifier-free guidance computes an unconditional half too, whose
    text is taken to be as long. `dtype` is that of the latents, the model's own by default. Not covered: the further
    call of skip-layer guidance, and a ControlNet, under which neighbours keep a residual each. Raises PolicyError when
    the policy is for another model.
    """
    transformer, row = resolve(pipe_or_transformer)
    policy.refuse_other_model(ModelIdentity.of(transformer))
    config: Any = transformer.config
    slots = block_slots(transformer, row)
    width = config[row.width] if row.width else config["num_attention_heads"] * config["attention_head_dim"]
    token = width * (dtype or transformer.dtype).itemsize
    registers = getattr(transformer, row.registers).shape[1] if row.registers else 0
    text_tokens, image_tokens = (-(-n // row.pads_to) * row.pads_to for n in (text_tokens + registers, image_tokens))

    def residual(last: int) -> int:
        """Bytes per row of what a block, or a run that ends with it, keeps."""
        without_text = slots[last].kind.streams == "image" or getattr(slots[last].block, "context_pre_only", False)
        return token * (image_tokens if without_text else text_tokens + image_tokens)

    batched = row.guidance == "batched"
    branches: tuple[Branch, ...] = ("both",) if batched else ("cond", "uncond") if guided else ("cond",)
    # by the block that holds them: bytes of the last residual, of the older one, of a forecast
    lanes = [(Plan.compile(policy, num_steps, start, branch), dict[int, tuple[int, int, int]]()) for branch in branches]
    most = 0
    for step in range(start, num_steps):
        for plan, held in lanes:  # the calls of a step
            rows = pictures * (1 + (batched and guided and plan.guided[step]))
            for index, action in enumerate(plan.steps[step]):
                first, last = within(slots, index, action.run or (index, index))
                if index != first:
                    continue
                if action.keeps:
                    held[first] = rows * residual(last), held[first][0] if action.forecast else 0, 0
                elif action.forecast:
                    held[first] = (*held[first][:2], held[first][0])
            most = max(most, sum(sum(kept) for _, held in lanes for kept in held.values()))
            for index, action in enumerate(plan.steps[step]):
                if action.releases:
                    held.pop(index, None)
                elif action.forecast and index in held:
                    held[index] = (*held[index][:2], 0)
    return most
