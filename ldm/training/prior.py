"""Prior preservation: the samples of a LoRA's training that hold prompts without its words to what the model does.

A share of the samples, `lora.keep`, loses the words that all captions have in common: "pizza, ink style" becomes
"pizza". What the model itself predicts of such a sample's x_t with that caption is then the target, as it is where the
caption was dropped for guidance. DreamBooth (Ruiz et al. 2023, section 3.3) trains on pictures that the model generated
instead; its prediction says the same of any x_t, and nothing has to be generated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.data.batches import choose_caption
from ldm.data.dataset import CaptionedPictures
from ldm.models.lora import trigger_words
from ldm.training.randomness import Draw


@dataclass(frozen=True)
class Prior:
    """Which samples keep what the model does, and their captions.

    Attributes:
        share: of the samples, in (0, 1), besides those whose caption is dropped.
        trigger: the words that all captions have in common.
        contexts: caption => [L,D], of all captions without these words; None to encode captions at each step.
    """

    share: float
    trigger: str
    contexts: Mapping[str, Tensor] | None = None

    @classmethod
    def of(cls, share: float, pictures: CaptionedPictures) -> Prior:
        """Raises a ValueError if the captions have no words in common."""
        trigger = trigger_words([caption for row in pictures for caption in row.captions])
        if not trigger:
            raise ValueError(
                f"lora.keep: the captions of {pictures.source} have no words in common that a prompt could leave out; "
                'write some into each ("…, ink style"), or set lora.keep=0'
            )
        return cls(share, trigger)

    def keeps(self, n: int) -> bool:
        """Whether sample n loses the words: one of every 1 / share."""
        return math.floor((n + 1) * self.share) > math.floor(n * self.share)

    def plain(self, caption: str) -> str:
        """A caption without the words: "pizza, ink style" => "pizza"."""
        words = self.trigger.split()
        return " ".join(word for word in caption.split() if word not in words).strip(" ,;:-")

    def __call__(self, n: int, drawn: Draw, captions: tuple[str, ...], sample: dict[str, Any]) -> dict[str, Any]:
        """Sample n, its caption without the words if it keeps what the model does; `kept` says whether it does."""
        if drawn.caption is None or not self.keeps(n):
            return sample | {"kept": drawn.caption is None}
        caption = self.plain(choose_caption(captions, drawn.caption))
        changed = {"caption": caption} if self.contexts is None else {"context": self.contexts[caption]}
        return sample | changed | {"kept": True}
