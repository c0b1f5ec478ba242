"""Prompts, classes and second pictures => conditions of the denoiser, for each picture of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.models.conditioning import Conditioning
from ldm.models.fingerprint import weights_state
from ldm.models.vae import encode
from ldm.pipelines.inputs import Inputs
from ldm.pipelines.loading import SavedPipeline


class ConditionedPipeline(SavedPipeline):
    """A stock pipeline that also encodes classes and second pictures."""

    _null: tuple[Any, Tensor] | None = None  # what the null context was encoded with, and the context

    def _conditions(
        self, inputs: Inputs, copies: int, device: torch.device, **embedding: Any
    ) -> tuple[Conditioning, Conditioning]:
        """The positive and the negative condition of each picture."""
        context = null = labels = no_class = channels = None
        if inputs.prompts or embedding["prompt_embeds"] is not None:
            contrast = self.do_classifier_free_guidance
            context, null = self.encode_prompt(
                inputs.prompts or None, device, copies, contrast, inputs.negatives or None, **embedding
            )
        if inputs.class_inputs:
            kind = self.unet.dtype if self.numbers else torch.int64
            labels = torch.tensor(inputs.class_inputs, device=device, dtype=kind).repeat_interleave(copies, 0)
            no_class = torch.full_like(labels, 0 if self.numbers else self.unet.config.num_class_embeds - 1)
        if inputs.conditions:
            pixels = torch.stack(inputs.conditions)  # pixels => scaled latents
            channels = encode(self.vae, pixels, device).mean.repeat_interleave(copies, 0)
        return Conditioning(context, labels, channels), Conditioning(null, no_class, channels)

    def encode_prompt(self, prompt: Any, device: Any, *arguments: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As stock's, bit for bit. The null context is kept between calls, and `clip_skip` works with today's CLIP.

        Encoding the empty prompt anew takes a twentieth of a small picture's time (docs/experiments.md, 35).
        """
        stock = super().encode_prompt
        bound = inspect.signature(stock).bind(prompt, device, *arguments, **kwargs).arguments
        skip = bound.pop("clip_skip", None)
        if skip is not None and bound.get("prompt_embeds") is None:
            texts = [prompt] if isinstance(prompt, str) else list(prompt)
            bound["prompt_embeds"] = self._skipping(self.maybe_convert_prompt(texts, self.tokenizer), device, skip)
        others = ("negative_prompt", "negative_prompt_embeds", "lora_scale")
        if bound["do_classifier_free_guidance"] and all(bound.get(name) is None for name in others):
            count = len(bound["prompt_embeds"]) if prompt is None else 1 if isinstance(prompt, str) else len(prompt)
            bound["negative_prompt_embeds"] = self._null_context(count, device, stock)
        return stock(**bound)

    def _null_context(self, count: int, device: Any, encode: Callable[..., Any]) -> Tensor:
        """The context of the empty prompt [count,L,D], encoded anew when encoder, tokenizer or count have changed.

        Kept for the last count only, since kernels round differently for another one.
        """
        tokenizer, encoder = self.tokenizer, self.text_encoder
        state = (encoder.training, weights_state(encoder), id(tokenizer), len(tokenizer), tokenizer.model_max_length)
        key = (count, device, *state)
        if self._null is None or self._null[0] != key:
            self._null = (key, encode([""] * count, device, 1, False)[0])
        context: Tensor = self._null[1]
        return context

    def _skipping(self, texts: list[str], device: Any, layers: int) -> Tensor:
        """The context [B,L,D] of a CLIP without its last so many layers, through its final norm."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        states = self.text_encoder(tokens.to(device), output_hidden_states=True).hidden_states[-(layers + 1)]
        text_model: Any = getattr(self.text_encoder, "text_model", self.text_encoder)
        context: Tensor = text_model.final_layer_norm(states)
        return context
