"""What a call asks for, against what the model knows: text, classes, pictures to make pictures of."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.arguments import check_prompts
from ldm.data.labels import Labels
from ldm.data.pictures import to_pixels, to_square


def known_texts(name: str, texts: Any, tokenizer: Any) -> list[str]:
    """The texts, checked; none for a model that knows no text."""
    if tokenizer is not None:
        return check_prompts(name, texts, tokenizer)
    if texts is not None:
        raise ValueError(f"{name}: this model knows no text")
    return []


def known_classes(names: list[Any], labels: Labels | None) -> list[int]:
    """The numbers of these classes, that of the null class for None; none for a model that knows no classes."""
    if labels is None:
        if names != [None]:
            raise ValueError("class_label: this model knows no classes; give it a classifier that does")
        return []
    null_class = len(labels.names)
    return [null_class if name is None else labels.id(name) for name in names]


def known_conditions(pictures: Any, channels: int, height: int, width: int) -> list[Tensor]:
    """The pictures to make pictures of, as pixels [3,height,width]; none for a model that takes no channels of them."""
    if not channels:
        if pictures is not None:
            raise ValueError("condition: this model makes no pictures of pictures")
        return []
    listed = pictures if isinstance(pictures, list | tuple) else [pictures]
    if not listed or not all(isinstance(picture, Image.Image) for picture in listed):
        kind = type(listed[0]).__name__ if listed else "an empty list"
        raise ValueError(f"condition: this model makes pictures of pictures; expected a PIL picture, got {kind}")
    if height != width:
        raise ValueError(f"width: pictures are made of square ones; expected {height}, got {width}")
    return [torch.from_numpy(to_pixels(to_square(picture.convert("RGB"), width))) for picture in listed]
