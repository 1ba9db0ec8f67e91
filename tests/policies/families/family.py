"""What a family of transformers is, to the tests: how to build a tiny one, how to call it, where its text is.

Everything is float64, so that a reference and the model differ only where the model itself computes in float32 (its
rotary embeddings and some norms). `size` is the side of a picture in tokens; videos have two frames of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

BLOCKS = 3  # in each container: a first, a middle and a last one
DIM = 32  # of every stream
TEXT_DIM = 16  # of the text before the model projects it
TEXT_TOKENS = 5
STEPS = 4

# What a block returns, by the names of the arguments that it continues.
TEXT_IMAGE = ("encoder_hidden_states", "hidden_states")
IMAGE_TEXT = ("hidden_states", "encoder_hidden_states")
IMAGE = ("hidden_states",)


@dataclass(frozen=True)
class Output:
    """Where a block computes the keys or values of its text: an output of one of its modules."""

    module: str
    tokens: int = 1  # the dimension of the tokens
    image_too: bool = False  # the tokens of the image come out with those of the text
    columns: tuple[int, int] | None = None  # of the last dimension, where the module gives more than keys or values


@dataclass(frozen=True)
class Container:
    """A ModuleList of blocks that are called alike."""

    name: str
    returns: tuple[str, ...]  # the arguments that its outputs continue, in the order of the outputs
    # Text is a stream of its own, the first rows of the only stream, a constant that the block attends to, or mixed
    # with the image in a way that differs from row to row.
    text: Literal["apart", "joined", "constant", "mixed"]
    key: Output = Output("attn.norm_added_k")  # normed
    value: Output = Output("attn.add_v_proj")

    @property
    def attention(self) -> str:
        """The module where queries meet the text."""
        return self.value.module.partition(".")[0]


@dataclass(frozen=True)
class Family:
    """A transformer class in one configuration."""

    name: str
    transformer: Callable[[], nn.Module]
    inputs_of: Callable[..., dict[str, Any]]
    containers: tuple[Container, ...]  # in the order of execution
    text_last: bool = False  # in the joint attention the text follows the image; elsewhere it goes first
    registers: int = 0  # learned tokens in front of the text, which the blocks treat as text
    index_matters: bool = False  # the forward gives each block a modulation by its index
    # Inputs that diffusers forgets under gradient checkpointing; None: diffusers' checkpointing of this class fails.
    not_checkpointed: tuple[str, ...] | None = ()

    def build(self, seed: int = 0) -> nn.Module:
        """The transformer, in eval mode and float64."""
        torch.manual_seed(seed)
        transformer = self.transformer().double().eval()
        with torch.no_grad():
            for parameter in transformer.parameters():  # the default is too small for one block to matter
                parameter.mul_(2.0)
        return transformer

    def inputs(self, batch: int = 2, seed: int = 0, text_tokens: int = TEXT_TOKENS, size: int = 4) -> dict[str, Any]:
        """Keyword arguments of one forward."""
        return self.inputs_of(Draw(seed, batch), text_tokens, size)

    def forward(self, model: nn.Module, **inputs: int) -> torch.Tensor:
        """The output for `self.inputs(**inputs)`."""
        with torch.no_grad():
            return stacked(model(**self.inputs(**inputs)))

    def denoise(self, model: nn.Module, scheduler: Any, batch: int = 2, size: int = 4) -> list[torch.Tensor]:
        """The outputs of a run over STEPS steps; each step has latents, text and time of its own."""
        scheduler.set_timesteps(STEPS)
        outputs = []
        for step, t in enumerate(scheduler.timesteps):
            outputs.append(self.forward(model, batch=batch, size=size, seed=step))
            scheduler.step(torch.zeros(1), t, torch.zeros(1))
        return outputs

    @property
    def slots(self) -> list[tuple[Container, int]]:
        """Container and place in it of each block, in the order of execution."""
        return [(container, place) for container in self.containers for place in range(BLOCKS)]

    def block(self, model: nn.Module, index: int) -> nn.Module:
        container, place = self.slots[index]
        return getattr(model, container.name)[place]

    def hears(self, operand: str, scope: str | None = None) -> bool:
        """Whether its text can be scaled there.

        It cannot where nothing tells text from image. Text that no block changes cannot be changed for later blocks;
        and where all keys are text, no weight changes when all of them are louder.
        """
        texts = {container.text for container in self.containers}
        return "mixed" not in texts and ("constant" not in texts or (operand != "logit" and scope != "propagate"))


class Draw:
    """Random inputs of one batch."""

    def __init__(self, seed: int, batch: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.batch = batch

    def __call__(self, *shape: int) -> torch.Tensor:
        """(batch, *shape), normal."""
        return torch.randn(self.batch, *shape, generator=self.generator, dtype=torch.float64)

    def time(self, scale: float = 1.0) -> torch.Tensor:
        """(batch,), one time in (0, scale) for all rows."""
        return torch.rand(1, generator=self.generator, dtype=torch.float64).expand(self.batch) * scale

    def mask(self, tokens: int) -> torch.Tensor:
        """(batch, tokens), 1 for a token and 0 for padding behind them; each row has one token less."""
        lengths = (tokens - torch.arange(self.batch)).clamp(min=1)
        return (torch.arange(tokens) < lengths[:, None]).long()


def stacked(output: Any) -> torch.Tensor:
    """(batch, ...) of a transformer's output, which is a list with Z-Image."""
    return torch.stack(list(output.sample))


DOUBLE = Container("transformer_blocks", TEXT_IMAGE, "apart")
JOINT_KEY, JOINT_VALUE = Output("attn.norm_k", image_too=True), Output("attn.to_v", image_too=True)
JOINED = Container("single_transformer_blocks", IMAGE, "joined", JOINT_KEY, JOINT_VALUE)
