"""BLIP's answers to questions on pictures (Li et al. 2022, arXiv:2201.12086), the first word of each."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from .checkpoints import device, load_pretrained, load_processor


class Blip:
    """A BLIP for question answering, a hub id or a folder; its words' logits as the authors' code computes them.

    A question begins with BLIP's own token for encoding, where transformers' processor leaves BERT's. Pictures are
    squares of `pixels`, the processor's own size when not given.
    """

    def __init__(self, checkpoint: str, pixels: int | None = None):
        self.checkpoint = checkpoint
        self.pixels = pixels

    def first_word(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> torch.Tensor:
        """Logits `(n, vocabulary)` of each answer's first word. A picture that stands there often is seen once."""
        from transformers import BlipForQuestionAnswering, BlipProcessor

        model = load_pretrained(BlipForQuestionAnswering, self.checkpoint)
        processor = load_processor(BlipProcessor, self.checkpoint, backend="pil")
        shown = {id(picture): picture for picture in pictures}
        size = {"size": {"height": self.pixels, "width": self.pixels}} if self.pixels else {}
        pixels = processor.image_processor(list(shown.values()), return_tensors="pt", **size).pixel_values
        seen = model.vision_model(pixels.to(device(), model.dtype), interpolate_pos_encoding=True).last_hidden_state
        row = {picture: i for i, picture in enumerate(shown)}
        states = seen[[row[id(picture)] for picture in pictures]]  # (n, patches, dim)
        tokens = [self._tokens(model, processor, question) for question in questions]
        logits = states.new_empty(len(questions), model.config.text_config.vocab_size)
        # none is padded: transformers 5.23 drops the mask of the decoder's cross-attention, and an answer would hear
        # the padding
        for length in {len(ids) for ids in tokens}:
            group = [i for i, ids in enumerate(tokens) if len(ids) == length]
            ids = torch.tensor([tokens[i] for i in group], device=device())
            question = model.text_encoder(input_ids=ids, encoder_hidden_states=states[group]).last_hidden_state
            begin = ids.new_full((len(group), 1), model.decoder_start_token_id)
            logits[group] = model.text_decoder(input_ids=begin, encoder_hidden_states=question).logits[:, -1]
        return logits

    def _tokens(self, model: Any, processor: Any, question: str) -> list[int]:
        text = model.config.text_config
        ids = processor.tokenizer(question, truncation=True, max_length=text.max_position_embeddings).input_ids
        return [text.vocab_size - 1, *ids[1:]]  # [ENC], the last that BLIP adds to BERT's vocabulary
