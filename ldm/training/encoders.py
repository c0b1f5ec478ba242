"""The frozen networks of a run, each in memory only while it encodes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ldm.models.fingerprint import fingerprint, tokenizer_facts
from ldm.models.text_encoder import TextEncoder
from ldm.system.memory import give_back
from ldm.training.facts import stamp

Encoder = TypeVar("Encoder")
Network = TypeVar("Network", bound=nn.Module)


class EncoderSource(Protocol):
    """Where an encoder comes from, as far as it is known without loading its weights."""

    def read(self, *, weights: bool = True) -> Any: ...
    def identity(self) -> list[Any]: ...
    def fingerprint(self, dtype: torch.dtype) -> str | None: ...
    def remember(self, dtype: torch.dtype, value: str) -> None: ...


class Encoders:
    """A VAE and a text encoder that are loaded when they are used; loading one frees the other.

    A U-Net's steps need neither, and a text encoder can be larger than the U-Net. So encode all there is to encode with
    one of them, then with the other, and keep no reference of your own to `vae` or `text`. Their outlines and
    fingerprints, for which they need not be loaded, stay.

    Attributes:
        load_vae, load_text: load them in float32, as pipelines have them; None for a model without text.
        dtype: that they encode in (`ldm.training.distributed.encoding_dtype`).
        together: whether both stay, for steps that encode for themselves.
        sources: by name, "vae" and "text", for outlines and fingerprints without loading.
    """

    def __init__(
        self,
        load_vae: Callable[[], Any],
        load_text: Callable[[], TextEncoder] | None,
        dtype: torch.dtype = torch.float32,
        *,
        together: bool = False,
        sources: Mapping[str, EncoderSource] | None = None,
    ) -> None:
        self.load_vae, self.load_text, self.dtype, self.together = load_vae, load_text, dtype, together
        self.sources = sources or {}
        self._loaded: dict[str, Any] = {}
        self._outlines: dict[str, Any] = {}
        self._fingerprints: dict[str, str] = {}

    @property
    def vae(self) -> Any:
        """The VAE, on the run's device.

        Where both stay, the text encoder is loaded before it: that is often the larger one, and takes the most memory
        while it is loaded, since a file's pages stay until all of it is in the dtype that is wanted.
        """
        if self.together:
            _ = self.text
        return self._ready("vae", self.load_vae)

    @property
    def text(self) -> TextEncoder | None:
        """The text encoder, on the run's device; None for a model without text."""
        return self._ready("text", self.load_text) if self.load_text else None

    @property
    def vae_outline(self) -> Any:
        """The VAE without its weights, on the meta device: its config and its sizes."""
        return self._outline("vae")

    @property
    def text_outline(self) -> TextEncoder | None:
        """The text encoder without its weights, on the meta device: its tokenizer and its sizes."""
        return self._outline("text") if self.load_text else None

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the "vae" and, if there is one, of the "text" encoder, its tokenizer included."""
        for name in ("vae", "text") if self.load_text else ("vae",):
            if not self._recalled(name):
                _ = self.vae if name == "vae" else self.text
        return dict(self._fingerprints)

    @property
    def identity(self) -> str | None:
        """A hash of all that decides what `load_vae` and `load_text` return; None without sources."""
        return stamp([source.identity() for source in self.sources.values()]) if self.sources else None

    def free(self) -> None:
        """Free both, and give their memory back; who uses one again has it loaded again."""
        if self._loaded:
            self._loaded.clear()
            give_back()

    def _recalled(self, name: str) -> bool:
        """Whether the fingerprint is known, or remembered."""
        if name not in self._fingerprints and name in self.sources:
            known = self.sources[name].fingerprint(self.dtype)
            self._fingerprints |= {name: known} if known is not None else {}
        return name in self._fingerprints

    def _outline(self, name: str) -> Any:
        if name not in self._outlines:
            if name in self.sources:
                self._outlines[name] = self.sources[name].read(weights=False)
            else:
                _ = self.vae if name == "vae" else self.text
        return self._outlines[name]

    def _ready(self, name: str, load: Callable[[], Encoder]) -> Encoder:
        if name not in self._loaded:
            if not self.together:
                self.free()
            encoder = load()
            network = network_of(encoder)
            for_encoding(network, self.dtype)
            if name not in self._outlines:
                self._outlines[name] = without_weights(encoder, network)
            if not self._recalled(name):
                text = [tokenizer_facts(encoder.tokenizer)] if isinstance(encoder, TextEncoder) else []
                self._fingerprints[name] = fingerprint(network, *text)
                if name in self.sources:
                    self.sources[name].remember(self.dtype, self._fingerprints[name])
            self._loaded[name] = encoder
        loaded: Encoder = self._loaded[name]
        return loaded


def network_of(encoder: Any) -> Any:
    """The network of a VAE or of a text encoder."""
    return encoder.model if isinstance(encoder, TextEncoder) else encoder


def without_weights(encoder: Encoder, network: nn.Module) -> Encoder:
    """A copy of it whose weights have their shapes and dtypes, but no values and no memory."""
    tensors = chain(network.parameters(), network.buffers())
    return copy.deepcopy(encoder, {id(tensor): tensor.to("meta") for tensor in tensors})


def for_encoding(network: Network, dtype: torch.dtype) -> Network:
    """The network itself, in this dtype and with its convolutions' channels last: both are faster, by 2.4 times
    together on a CPU that multiplies bf16 (docs/experiments.md, 22)."""
    nn.Module.to(network, dtype)  # diffusers' own `to` warns of layers to keep in float32, even where there are none
    weights = list(network.parameters())
    places = [weight.data_ptr() for weight in weights]
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # float32 convolutions are copies now, of a mapped file that all stays in memory for the sake of a few norms
    left = [weight for weight, place in zip(weights, places, strict=True) if weight.data_ptr() == place]
    if sum(weight.nbytes for weight in left) < sum(weight.nbytes for weight in weights) / 2:
        for weight in left:
            weight.data = weight.data.clone()
    return network
