"""Captions the text encoder can't take whole are said, not cut in silence."""

from __future__ import annotations

from ldm.data.captioned import CaptionedPictures
from ldm.data.rows import count
from ldm.models.text import TextEncoder

UNKNOWN_MOST = 0.2  # a share of unknown tokens above this means a broken vocabulary or a foreign language


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
