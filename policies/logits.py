"""Attention in which text keys weigh more or less for image queries, without a mask.

Kernels that take a mask are slower than those that take none, some by half. So image queries attend to text keys and to
image keys apart, by the kernels that torch would pick, which also tell the sum of each query's weights; the two
results are then merged as the softmax over both would have, had the text's sum been multiplied. Without gradients.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend


def weighted_attention(
    query: Tensor, key: Tensor, value: Tensor, text: slice, image: slice, factor: Tensor, scale: float | None
) -> Tensor:
    """Softmax attention in which text keys have `factor` times the weight for image queries, and 1 for text queries.

    All `(batch, heads, tokens, head dim)`; `text` and `image` are the two parts of the tokens, in any order; factor
    `(batch or 1, 1, 1)`, not negative.
    """
    with_sums = _traced if torch.compiler.is_compiling() else _with_sums
    asking = query[:, :, image]
    of_text, text_sums = with_sums(asking, key[:, :, text], value[:, :, text], scale)
    merged, image_sums = with_sums(asking, key[:, :, image], value[:, :, image], scale)
    share = torch.sigmoid(text_sums - image_sums + factor.log())  # of the text, (batch, heads, image tokens)
    merged = merged.addcmul_(of_text - merged, share.unsqueeze(-1))  # in float32, rounded once; a share of 0 adds 0
    parts = [F.scaled_dot_product_attention(query[:, :, text], key, value, scale=scale), merged]
    if image.start < text.start:
        parts.reverse()
    # tokens before heads in memory, as processors want them next
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Any:
    if query.shape[-1] % 8:  # torch itself pads here
        return _by_hand(query, key, value, scale)
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)


def _efficient(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Any:
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Any:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)


def _flash_on_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)


def _by_hand(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    exact = _dtype_of_sums(query)
    rate = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (rate * query.to(exact)) @ key.to(exact).transpose(-1, -2)
    sums = logits.logsumexp(-1)
    return ((logits - sums.unsqueeze(-1)).exp() @ value.to(exact)).to(query.dtype), sums


# By device and by what `_fused_sdp_choice` answers; each gives the attention and the logarithms of the sums first.
_WITH_SUMS: dict[tuple[str, int], Callable[[Tensor, Tensor, Tensor, float | None], Any]] = {
    ("cpu", SDPBackend.FLASH_ATTENTION.value): _flash_on_cpu,
    ("cuda", SDPBackend.FLASH_ATTENTION.value): _flash,
    ("cuda", SDPBackend.EFFICIENT_ATTENTION.value): _efficient,
    ("cuda", SDPBackend.CUDNN_ATTENTION.value): _cudnn,
}


def _with_sums(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention, and the natural logarithm of the sum of each query's weights `(batch, heads, queries)`."""
    picked = torch._fused_sdp_choice(query, key, value, scale=scale)
    kernel = _WITH_SUMS.get((query.device.type, picked), _by_hand)
    output, sums, *_ = kernel(query, key, value, scale)
    # cuDNN has a last dimension of 1 more, and the memory-efficient kernel rounds the number of queries up to 32s
    return output, sums.flatten(2)[..., : query.shape[2]]


def _dtype_of_sums(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


# One node of a compiled graph, in which kernels could not be picked; eager calls go without, for its own cost.
@torch.library.custom_op("blocktune::attention_with_sums", mutates_args=())
def _traced(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    output, sums = _with_sums(query, key, value, scale)
    # kernels differ in their layouts, a graph is made for one
    return output.transpose(1, 2).contiguous().transpose(1, 2), sums.contiguous()


@_traced.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = query.shape
    output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(batch, heads, tokens, dtype=_dtype_of_sums(query))
