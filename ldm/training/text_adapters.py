"""A text encoder that learns: batches hold the tokens of captions, and each step encodes them.

    caption -> Tokens -> ids, mask -+                    (once, cached)
                                    +-> UNetWithText: text encoder -> context -> U-Net     (at each step)
                     x_t, t --------+

So samples, cache and validation stay what they are: to them tokens are the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.text_encoder import TextEncoder
from ldm.training.encoders import Encoders, EncoderSource


class Tokens(TextEncoder):
    """A text encoder's tokenizer in the place of the encoder: the "context" is what the network takes."""

    @property
    def dim(self) -> int:
        return 2

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions => ids and mask, float32 [B, max_length, 2], as `TextEncoder.encode` makes them."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )  # fmt: skip
        return torch.stack([tokens.input_ids, tokens.attention_mask], dim=-1).float().to(self.model.device)


class TokenSource:
    """Where the tokens come from: the source of the encoder, under another identity."""

    def __init__(self, source: EncoderSource) -> None:
        self.source = source

    def read(self, *, weights: bool = True) -> Tokens:
        text = self.source.read(weights=weights)
        return Tokens(text.tokenizer, text.model)

    def identity(self) -> list[Any]:
        return ["tokens", *self.source.identity()]

    def fingerprint(self, dtype: torch.dtype) -> str | None:
        known = self.source.fingerprint(dtype)
        return known and f"tokens of {known}"

    def remember(self, dtype: torch.dtype, value: str) -> None:
        self.source.remember(dtype, value)


class TokenEncoders(Encoders):
    """The encoders of a run whose text encoder learns: the VAE, and tokens."""

    @classmethod
    def of(cls, encoders: Encoders) -> TokenEncoders:
        load, sources = encoders.load_text, dict(encoders.sources)
        assert load is not None
        if "text" in sources:
            sources["text"] = TokenSource(sources["text"])

        def load_tokens() -> TextEncoder:
            text = load()
            return Tokens(text.tokenizer, text.model)

        return cls(encoders.load_vae, load_tokens, encoders.dtype, together=encoders.together, sources=sources)


class UNetWithText(nn.Module):
    """A stock U-Net behind a text encoder: its context is `Tokens`."""

    def __init__(self, unet: Any, text: Any) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text

    def train(self, mode: bool = True) -> UNetWithText:
        """The text encoder stays as it generates: its dropout would be another at each start."""
        super().train(mode)
        self.text_encoder.eval()
        return self

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor, **stock: Any) -> Any:
        """As the U-Net's, for tokens [B,L,2]."""
        ids, seen = encoder_hidden_states.long().unbind(-1)
        mask = seen if self.text_encoder.config.use_attention_mask else None
        context = self.text_encoder(ids, attention_mask=mask)[0].float()  # (B, L, D)
        return self.unet(x_t, t, encoder_hidden_states=context, **stock)
