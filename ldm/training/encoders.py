"""The frozen networks on both ends of a run, in memory only while something needs them.

Once everything is encoded, training needs neither: they are loaded to encode, let go, and loaded again for as long as
a pipeline is saved and draws. Fingerprints see to it that the second time they are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils.memory import clear_device_cache

from ldm.models.fingerprint import fingerprint, tokenizer_facts
from ldm.models.text import TextEncoder


class Encoders:
    """A VAE and a text encoder that can be let go and had again.

    Attributes:
        fingerprints: of "vae" and "text.encoder", its tokenizer included, once they have been loaded.
    """

    def __init__(self, load_vae: Callable[[], Any], load_text: Callable[[], TextEncoder | None]) -> None:
        self._load_vae, self._load_text = load_vae, load_text
        self._loaded: tuple[Any, TextEncoder | None] | None = None
        self.fingerprints: dict[str, str] = {}

    def load(self) -> tuple[Any, TextEncoder | None]:
        """Both, from disk if they were let go; a model that knows no text has no text encoder.

        Raises:
            ValueError: if what is on disk is no longer what it was the first time.
        """
        if self._loaded is None:
            vae, text = self._load_vae(), self._load_text()
            told = {"vae": fingerprint(vae)}
            if text is not None:
                told["text.encoder"] = fingerprint(text.model, tokenizer_facts(text.tokenizer))
            for name, before in self.fingerprints.items():
                if told[name] != before:
                    raise ValueError(f"{name}: its files have changed since this run started; start it again")
            self._loaded, self.fingerprints = (vae, text), told
        return self._loaded

    def free(self) -> None:
        """Let both go. Whoever else holds them must do so first: their memory is given back here."""
        self._loaded = None
        clear_device_cache(garbage_collection=True)
