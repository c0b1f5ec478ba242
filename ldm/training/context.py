"""From captions to a context that cross-attention can learn from: say what is cut, measure, standardize.

What a text encoder says has a mean that all captions share, in channels of different spread, and the projections of
cross-attention have no bias to take a mean away. Standardized, captions are learned in about half the
pictures (docs/experiments.md, 20).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.data.batches import spread
from ldm.data.dataset import CaptionedPictures
from ldm.data.rows import count
from ldm.models.fingerprint import fingerprint, tokenizer_facts
from ldm.models.text_encoder import TextEncoder, measure_context
from ldm.system.memory import give_back
from ldm.training.config import Config
from ldm.training.distributed import while_others_wait
from ldm.training.encoders import for_encoding
from ldm.training.scales import Scale

MEASURED = 128  # captions: thousands of tokens
BATCH = 32
SCALE_FILE = "text_scale.json"  # in RUN
UNKNOWN_MOST = 0.2  # a share of unknown tokens above this means a broken vocabulary or a foreign language


def load_text(config: Config, device: torch.device) -> TextEncoder:
    """The config's text encoder on a device, standardized as it was measured.

    Raises:
        ValueError: if it should be standardized and was not measured, or there is none.
    """
    text = TextEncoder.load(config.text)
    if config.text.standardize:
        text.standardize(*context_scale(config, text).require(f"text.encoder: {config.text.encoder}"))
    text.model.to(device)
    return text


def measure_text(
    config: Config, pictures: CaptionedPictures, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Measure the context of these pictures' captions, once in a run. Every rank must call it; rank 0 measures.

    Args:
        dtype: that they are encoded in.
    """

    def measured(tick: Callable[[], None]) -> None:
        text = TextEncoder.load(config.text)
        scale = context_scale(config, text)
        for_encoding(text.model.to(device), dtype)
        scale.keep(lambda: measure_captions(text, pictures, tick))

    if config.text.encoder is not None and config.text.standardize:
        while_others_wait(measured)
        give_back()


def context_scale(config: Config, text: TextEncoder) -> Scale:
    """Where the scale of the context is kept, and what it depends on; the text encoder as it was loaded."""
    facts = {
        "text.encoder": fingerprint(text.model, tokenizer_facts(text.tokenizer)),
        "source": config.data.source,
        "caption_columns": list(config.data.caption_columns),
    }
    return Scale(Path(config.run) / SCALE_FILE, facts)


def measure_captions(
    text: TextEncoder, pictures: CaptionedPictures, tick: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel of the context [dim], over some of these pictures' captions."""
    captions = sorted({caption for row in pictures for caption in row.captions})
    chosen = [captions[i] for i in spread(len(captions), MEASURED)]

    def contexts() -> Iterator[Tensor]:
        silent = os.environ.get("RANK", "0") != "0"
        places = range(0, len(chosen), BATCH)
        for start in tqdm(places, desc="measuring context", unit="batch", leave=False, disable=silent):
            yield text.encode(chosen[start : start + BATCH])
            tick()

    return measure_context(contexts())


def report_captions(text: TextEncoder, pictures: CaptionedPictures) -> str:
    """How many captions are longer than the encoder takes, with the longest, and the share of unknown tokens.

    Raises:
        ValueError: if most of what the captions say is unknown to the tokenizer.
    """
    captions = sorted({caption for row in pictures for caption in row.captions})
    most = text.tokenizer.model_max_length
    lengths = text.lengths(captions)
    unknown = text.unknown_rate(captions)
    if unknown > UNKNOWN_MOST:
        raise ValueError(
            f"text.encoder: {unknown:.0%} of the captions' tokens are unknown to its tokenizer; "
            "choose an encoder that was trained on the captions' language"
        )
    told = f"captions: {count(len(captions), 'different one')}, the longest of {max(lengths)} tokens"
    cut = [caption for caption, length in zip(captions, lengths, strict=True) if length > most]
    if cut:
        told += (
            f"; {len(cut)} are longer than text.max_length={most} and are cut, the first: {cut[0]!r} "
            f"(set text.max_length={max(lengths)} if the encoder takes that many)"
        )
    return told
