"""What people hand to LDMPipeline, checked before any network runs: errors name the argument and what it allows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.data.images import to_pixels, to_square
from ldm.data.labels import Labels

MAX_CHARACTERS = 20_000  # a limit before the tokenizer's own, which takes time to find out
# what no tokenizer has learned: control characters that are not white space, and surrogates without a partner
_UNREADABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")


def check_known(given: Iterable[str], known: frozenset[str]) -> None:
    """Raise a TypeError that names the first argument that there is not; stock pipelines ignore a misspelled one."""
    if unknown := sorted(set(given) - known):
        raise TypeError(f"{unknown[0]}: there is no such argument; expected some of {', '.join(sorted(known))}")


def one_each(name: str, values: Sequence[Any], asked: int) -> list[Any]:
    """One value for all pictures asked for, or one each => one each."""
    if len(values) not in (1, asked):
        raise ValueError(f"{name}: expected 1 or {asked}, one for each picture asked for, got {len(values)}")
    return list(values) * asked if len(values) == 1 else list(values)


def check_prompts(name: str, prompts: Any, tokenizer: Any) -> list[str]:
    """A text or a list of texts, none of which the tokenizer has to cut => a list of them."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"{name}: expected a text or a list of texts, got {type(prompts).__name__}")
    if not texts:
        raise ValueError(f"{name}: expected at least one text, got an empty list")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected texts, got {type(text).__name__} {text!r}")
        if found := _UNREADABLE.search(text):
            raise ValueError(f"{name}: holds U+{ord(found.group()):04X}, which is no character of a text")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"{name}: expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}; use fewer words"
            )
        length, most = len(tokenizer(text, verbose=False).input_ids), tokenizer.model_max_length
        if length > most:
            shown = text if len(text) <= 40 else text[:40] + "…"
            raise ValueError(f"{name}: expected at most {most} tokens, got {length} in {shown!r}; use fewer words")
    return list(texts)


def check_number(name: str, value: Any, least: float, most: float, kind: Any = Real) -> None:
    """Raise a ValueError unless `value` is a number, or an Integral one, of the range; NaN is of none."""
    if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= most:
        what = "a whole number" if kind is Integral else "a number"
        raise ValueError(f"{name}: expected {what} from {least} to {most}, got {value!r}")


def one_generator_each(generator: Any, seed: Any, pictures: int) -> list[torch.Generator] | None:
    """A generator of its own for each picture, so that none depends on what is drawn beside it; None for no seed."""
    if seed is not None:
        if generator is not None:
            raise ValueError("seed: give a seed or a generator, not both")
        seeds = seed if isinstance(seed, Sequence) else [seed]
        for value in seeds:
            check_number("seed", value, 0, 2**63 - 1, Integral)
        if seeds is not seed:
            seeds = [int(seed) + i for i in range(pictures)]
        if len(seeds) != pictures:
            raise ValueError(f"seed: expected one for all or one per picture ({pictures}), got {len(seeds)}")
        return [torch.Generator().manual_seed(int(value)) for value in seeds]
    if generator is None:
        return None
    if isinstance(generator, torch.Generator):
        return [generator, *followers(generator, pictures - 1)]
    if not isinstance(generator, (list, tuple)) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(f"generator: expected a torch.Generator or a list of them, got {type(generator).__name__}")
    if len(generator) != pictures:
        raise ValueError(f"generator: expected one for all or one per picture ({pictures}), got {len(generator)}")
    return list(generator)


def followers(first: torch.Generator, count: int) -> list[torch.Generator]:
    """Generators for the pictures after the first: its seed + 1, + 2, …

    One that has been drawn from already counts from a number drawn from it: the next batch is another one.
    """
    seed, device, state = first.initial_seed(), first.device, first.get_state()
    if not torch.equal(state, torch.Generator(device).manual_seed(seed).get_state()):
        copy = torch.Generator(device)
        copy.set_state(state)
        seed = int(torch.randint(2**62, (), generator=copy, device=device))
    return [torch.Generator(device).manual_seed((seed + i) % 2**64) for i in range(1, count + 1)]


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
