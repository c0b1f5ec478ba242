"""The frozen networks on both ends of a run, each in memory only while something is encoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import nn

from ldm.models.fingerprint import fingerprint, tokenizer_facts
from ldm.models.text import TextEncoder
from ldm.training.heap import give_back

Network = TypeVar("Network", bound=nn.Module)


class Encoders:
    """A VAE and a text encoder that are loaded when they are used and can be let go in between.

    A U-Net's steps need neither, and a text encoder can be larger than the U-Net. Hold no reference of your own to
    `vae` or `text` across a call that lets them go.

    Attributes:
        load_vae, load_text: load them in float32, as pipelines have them.
        dtype: that they encode in (`ldm.training.device.encoding_dtype`).
    """

    def __init__(
        self,
        load_vae: Callable[[], Any],
        load_text: Callable[[], TextEncoder | None],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.load_vae, self.load_text, self.dtype = load_vae, load_text, dtype

    @cached_property
    def vae(self) -> Any:
        """The VAE, on the run's device; the text encoder is loaded before it.

        That is often the larger one, and takes the most memory while it is loaded: a file's pages stay until all of it
        is in the dtype that is wanted.
        """
        _ = self.text
        return for_encoding(self.load_vae(), self.dtype)

    @cached_property
    def text(self) -> TextEncoder | None:
        """The text encoder; None if the model knows no text."""
        text = self.load_text()
        if text is not None:
            for_encoding(text.model, self.dtype)
        return text

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of "vae" and, if there is one, "text.encoder", its tokenizer included; kept when both are let go."""
        found = {"vae": fingerprint(self.vae)}
        if self.text is not None:
            found["text.encoder"] = fingerprint(self.text.model, tokenizer_facts(self.text.tokenizer))
        return found

    def free(self) -> None:
        """Let both go, and give their memory back; who asks for one again has it loaded again."""
        self.__dict__.pop("vae", None)
        self.__dict__.pop("text", None)
        give_back()


def for_encoding(network: Network, dtype: torch.dtype) -> Network:
    """The network itself, in this dtype and with its convolutions' channels last: both are faster, by 2.4 times
    together on a CPU that multiplies bf16 (docs/experiments.md, 22)."""
    nn.Module.to(network, dtype)  # diffusers' own `to` warns of layers to keep in float32, even where there are none
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
