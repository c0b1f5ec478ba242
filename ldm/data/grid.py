"""Pictures side by side, each with its caption beneath, in any script that a font of this machine has.

Pillow's own font has English letters and little else. A caption that it lacks characters of is set in a font of the
system that has them all. A character that no font has is written as its code point (`U+732B`), and a warning names it,
so that two captions never look the same because both are boxes.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "C:/Windows/Fonts",
)
FANCY = ("bold", "italic", "oblique", "mono", "condensed", "narrow", "light", "thin", "black", "serif", "math")
PLACEHOLDERS = ("lastresort", "adobeblank")  # fonts that have one box for every character
NO_CHARACTER = "\U0010ffff"  # which no font has
LINES = 2  # of a caption
SMALLEST_CELL = 128  # pixels
_warned: set[str] = set()


def captioned_grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 4, edge: int = SMALLEST_CELL
) -> Image.Image:
    """Lay pictures out in rows of `columns`, each `edge` pixels along its longer side, over two lines of caption."""
    if len(pictures) != len(captions) or not pictures:
        raise ValueError(f"captioned_grid: expected a caption per picture, got {len(captions)} and {len(pictures)}")
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    gap, size = edge // 16, max(9, edge // 10)
    text_height = round(1.3 * LINES * size)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell_width, cell_height = edge + gap, edge + text_height + gap
    grid = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    pen = ImageDraw.Draw(grid)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = gap + i % columns * cell_width, gap + i // columns * cell_height
        longer = max(picture.size)
        resampling = Image.Resampling.NEAREST if edge % longer == 0 else Image.Resampling.LANCZOS
        width, height = (max(1, round(side * edge / longer)) for side in picture.size)
        shown = picture.convert("RGB").resize((width, height), resampling)
        grid.paste(shown, (left + (edge - width) // 2, top + (edge - height) // 2))
        text, font = legible(caption, size)
        lines = "\n".join(wrap(text, font, edge))
        pen.multiline_text((left, top + edge + size // 4), lines, fill="#333333", font=font, spacing=2)
    return grid


def full_edge(pictures: Sequence[Image.Image]) -> int:
    """The edge of a grid's cells that shrinks none of these pictures, and enlarges small ones."""
    return max(SMALLEST_CELL, *(side for picture in pictures for side in picture.size))


def legible(caption: str, size: int) -> tuple[str, Font]:
    """A caption and a font that has all its characters; those that no font has are replaced by their code points."""
    text = " ".join(caption.split())
    needed = frozenset(text) - {" "}
    font, lacking = _font(needed, size)
    for character in sorted(lacking):
        _warn(character)
    return " ".join("".join(f" U+{ord(c):04X} " if c in lacking else c for c in text).split()), font


def wrap(text: str, font: Font, width: int) -> list[str]:
    """A text in at most `LINES` lines of at most `width` pixels; what does not fit ends in "…".

    Words that are too long, and scripts without spaces, are broken anywhere.
    """
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[LINES - 1 :] = [last + "…"]
    return lines


@lru_cache(maxsize=256)
def _font(needed: frozenset[str], size: int) -> tuple[Font, frozenset[str]]:
    """The first font that has all characters, else the one that lacks fewest, and those that it lacks."""
    best: tuple[Font, frozenset[str]] | None = None
    for font in _fonts(size):
        lacking = frozenset(c for c in needed if not _has(font, c))
        if best is None or len(lacking) < len(best[1]):
            best = font, lacking
        if not lacking:
            break
    assert best is not None
    return best


def _fonts(size: int) -> Iterator[Font]:
    """Pillow's own font, then those of the system, plain ones first."""
    yield ImageFont.load_default(size)
    for path in font_files():
        try:
            yield ImageFont.truetype(path, size)
        except (OSError, ValueError):  # bitmaps of one size, broken files
            continue


@lru_cache(maxsize=1)
def font_files() -> tuple[str, ...]:
    """The font files of this machine, and those that matplotlib brings."""
    folders = [Path(folder).expanduser() for folder in FONT_FOLDERS]
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin:
        folders.append(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf")
    found = (
        os.path.join(parent, name)
        for folder in folders
        for parent, _, names in os.walk(folder)
        for name in sorted(names)
        if name.lower().endswith((".ttf", ".otf", ".ttc")) and not name.lower().startswith(PLACEHOLDERS)
    )

    def order(path: str) -> tuple[int, bool]:
        name = os.path.basename(path).lower().replace("sansserif", "sans")
        return sum(word in name for word in FANCY), "sans" not in name

    return tuple(sorted(found, key=order))


def _has(font: Font, character: str) -> bool:
    """Whether a font has a glyph of its own for a character, and this Pillow can set it."""
    if unicodedata.bidirectional(character) in ("R", "AL") and not features.check("raqm"):
        return False  # letters would stand unconnected, in the wrong order
    if unicodedata.category(character) in ("Cf", "Mn", "Me"):  # joiners and accents, which have no shape of their own
        return True
    shape = _shape(font, character)
    return any(shape[0]) and shape != _shape(font, NO_CHARACTER)


def _shape(font: Font, character: str) -> tuple[bytes, tuple[int, int]]:
    mask = font.getmask(character)
    return bytes(mask), mask.size


def _warn(character: str) -> None:
    """Name a character that no font has, once for all of its kind."""
    name = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    package = "fonts-noto-cjk" if name in ("CJK", "HIRAGANA", "KATAKANA", "HANGUL") else "fonts-noto-core"
    if package not in _warned:
        _warned.add(package)
        print(
            f"grid: no font on this machine shows {character} (U+{ord(character):04X}); the code points of such "
            f"characters are written instead. Install a font that has them (Debian, Ubuntu: apt install {package})",
            file=sys.stderr,
        )
