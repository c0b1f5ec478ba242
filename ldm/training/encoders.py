"""The frozen networks on both ends of a run, in memory only until everything is encoded."""

from __future__ import annotations

from typing import Any

from accelerate.utils.memory import clear_device_cache

from ldm.models.fingerprint import fingerprint, tokenizer_facts
from ldm.models.text import TextEncoder


class Encoders:
    """A VAE and a text encoder that can be let go.

    Attributes:
        vae, text: None once they are; a model that knows no text never has a text encoder.
        fingerprints: of "vae" and "text.encoder", its tokenizer included.
    """

    def __init__(self, vae: Any, text: TextEncoder | None) -> None:
        self.vae: Any = vae
        self.text = text
        self.fingerprints = {"vae": fingerprint(vae)}
        if text is not None:
            self.fingerprints["text.encoder"] = fingerprint(text.model, tokenizer_facts(text.tokenizer))

    def free(self) -> None:
        """Let both go. Whoever else holds them must do so first: their memory is given back here."""
        self.vae = self.text = None
        clear_device_cache(garbage_collection=True)
