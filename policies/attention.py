"""Joint attention of text and image with the text made louder inside it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def scale_rows(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`x * factor` in x's dtype, rounded once; where the factor is 0 the result is 0 even for an infinite x.

    x `(batch, ...)`; factor float32 or float64, broadcastable to x.
    """
    factor = factor.to(x.device)
    return torch.where(factor == 0, 0.0, x * factor).to(x.dtype)


class ScaledJointAttention:
    """Does what diffusers' JointAttnProcessor2_0 does (SD3's joint attention, arXiv 2403.03206), with scaled text.

    Each factor is None or `(batch or 1, tokens or 1, 1)`: `key` scales text keys after their norm, `value` text
    values, `logit` the weight of text keys for image queries before the softmax is normalised. Text queries see the
    same keys and values, without the logit factor, as in the softmax they would have had.
    """

    def __init__(self, key: torch.Tensor | None, value: torch.Tensor | None, logit: torch.Tensor | None) -> None:
        self.key = key
        self.value = value
        self.logit = logit

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed image `(batch, image tokens, dim)` and text `(batch, text tokens, dim)` -> their attention outputs."""
        heads: int = attn.heads  # pyright: ignore[reportAssignmentType]

        def project(linear: Any, norm: Any, x: torch.Tensor) -> torch.Tensor:
            """(batch, tokens, dim) -> (batch, heads, tokens, head dim)"""
            x = linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        query = project(attn.to_q, attn.norm_q, hidden_states)
        key = project(attn.to_k, attn.norm_k, hidden_states)
        value = project(attn.to_v, None, hidden_states)
        text_query = project(attn.add_q_proj, attn.norm_added_q, encoder_hidden_states)
        text_key = project(attn.add_k_proj, attn.norm_added_k, encoder_hidden_states)
        text_value = project(attn.add_v_proj, None, encoder_hidden_states)

        if self.key is not None:
            text_key = scale_rows(text_key, self.key.unsqueeze(1))
        if self.value is not None:
            text_value = scale_rows(text_value, self.value.unsqueeze(1))
        key = torch.cat([key, text_key], dim=2)
        value = torch.cat([value, text_value], dim=2)

        image_tokens = query.shape[2]
        if self.logit is None:
            joint = F.scaled_dot_product_attention(torch.cat([query, text_query], dim=2), key, value)
        else:
            # One bias row serves every image query, so no (queries x keys) mask is built, and text queries go unmasked.
            louder = self.logit.to(query.device).log().to(query.dtype).transpose(1, 2).unsqueeze(1)
            louder = louder.expand(query.shape[0], 1, 1, text_key.shape[2])
            quiet = louder.new_zeros(query.shape[0], 1, 1, image_tokens)
            bias = torch.cat([quiet, louder], dim=-1).expand(-1, -1, image_tokens, -1)
            image = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            text = F.scaled_dot_product_attention(text_query, key, value)
            joint = torch.cat([image, text], dim=2)

        joint = joint.transpose(1, 2).flatten(2)  # (batch, tokens, dim)
        image, text = joint[:, :image_tokens], joint[:, image_tokens:]
        image = attn.to_out[1](attn.to_out[0](image))  # pyright: ignore[reportIndexIssue, reportCallIssue]
        return image, text if attn.context_pre_only else attn.to_add_out(text)  # pyright: ignore[reportCallIssue]
