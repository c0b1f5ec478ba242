"""The frozen networks on both ends of a run, each in memory only while something is encoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from accelerate.utils.memory import clear_device_cache

from ldm.models.fingerprint import fingerprint, tokenizer_facts
from ldm.models.text import TextEncoder


class Encoders:
    """A VAE and a text encoder that are loaded when they are used and can be let go in between.

    A U-Net's steps need neither, and a text encoder can be larger than the U-Net. Hold no reference of your own to
    `vae` or `text` across a call that lets them go.
    """

    def __init__(self, load_vae: Callable[[], Any], load_text: Callable[[], TextEncoder | None]) -> None:
        self.load_vae, self.load_text = load_vae, load_text

    @cached_property
    def vae(self) -> Any:
        """The VAE, on the run's device."""
        return self.load_vae()

    @cached_property
    def text(self) -> TextEncoder | None:
        """The text encoder; None if the model knows no text."""
        return self.load_text()

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
        clear_device_cache(garbage_collection=True)
