"""Variants of OpenMoji's drawings: other colors, other hair, outlines alone, maps of their colors.

OpenMoji fills its drawings with 24 colors, most of them in pairs of a base and a shade. A recolored drawing is the same
SVG with the entries of one family swapped for another's:

    family of a drawing: blue (92d3f5, 61b2e4, 1e50a0)   =>   pink (ffa7c0, e67a94, 781e32)

A drawing is recolored only where one family has most of the colored area, so that the color's name is true of the
result, and where the colors mean nothing else: no flags, symbols, people, and no captions that name a color.
"""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm.data.emoji.openmoji import Drawing, render

#: Family => its base, shade and dark entries in OpenMoji's palette.
FAMILIES = {
    "blue": ("92d3f5", "61b2e4", "1e50a0"),
    "red": ("ea5a47", "d22f27", "781e32"),
    "green": ("b1cc33", "5c9e31", "186648"),
    "yellow": ("fcea2b", "f1b31c", "a57939"),
    "gray": ("d0cfce", "9b9b9a", "3f3f3f"),
    "pink": ("ffa7c0", "e67a94", "781e32"),
    "purple": ("b399c8", "8967aa", "1e50a0"),
    "orange": ("f4aa41", "e27022", "6a462f"),
    "brown": ("a57939", "6a462f", "3f3f3f"),
}
HAIR_COLORS = {
    "black": "000000",
    "brown": "6a462f",
    "blond": "f1b31c",
    "red": "e27022",
    "white": "ffffff",
    "pink": "ffa7c0",
}
#: OpenMoji's 24 palette entries, those of the families, black and white, uint8 [24,3]; white is entry 0.
PALETTE = np.array(
    [
        list(bytes.fromhex(code))
        for code in dict.fromkeys(("ffffff", "000000", *(entry for family in FAMILIES.values() for entry in family)))
    ],
    np.uint8,
)
DOMINANT = 0.7  # share of the colored area that one family needs; below, the wrong part changes color
FIXED_GROUPS = ("flags", "symbols", "people-body", "component", "extras-unicode")  # their colors mean something
MEASURED = 72  # pixels, to measure areas at: OpenMoji's own grid
_NAMES_A_COLOR = re.compile(
    r"\b(red|blue|green|yellow|gr[ae]y|pink|purple|orange|brown|black|white|gold|golden|silver|rainbow|heart)\b", re.I
)
_COLOR = re.compile(r"#([0-9a-fA-F]{6})\b")
_SHORT_COLOR = re.compile(r"#([0-9a-fA-F])([0-9a-fA-F])([0-9a-fA-F])(?![0-9a-fA-F])")
_FILLS = ("color", "hair", "skin")  # names of groups begin so; the others are lines
_SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", _SVG)


def dominant_family(drawing: Drawing) -> str | None:
    """The family with at least `DOMINANT` of the colored area; None if there is none, or colors mean something."""
    if drawing.tones or drawing.group in FIXED_GROUPS or _NAMES_A_COLOR.search(drawing.caption):
        return None
    area = family_areas(drawing.svg.read_text("utf-8"))
    family = max(area, key=lambda name: area[name])
    return family if area[family] >= DOMINANT * sum(area.values()) > 0 else None


def family_areas(svg: str) -> dict[str, int]:
    """Pixels of each family: those whose color is one of its base or shade entries, exactly.

    Dark entries belong to two families and are shadows in both, so they don't count.
    """
    pixels = np.asarray(Image.open(io.BytesIO(render(svg, MEASURED))).convert("RGB")).astype(np.int64)
    codes = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
    return {
        name: int(sum(np.count_nonzero(codes == int(entry, 16)) for entry in entries[:2]))
        for name, entries in FAMILIES.items()
    }


def recolored(svg: str, family: str, color: str) -> str:
    """A drawing whose dominant family is `family`, in another color."""
    swap = dict(zip(FAMILIES[family], FAMILIES[color], strict=True))
    return _COLOR.sub(lambda found: "#" + swap.get(found[1].lower(), found[1]), svg)


def has_hair(svg: str) -> bool:
    """Whether a drawing has hair of its own: a group of that name with something in it."""
    return any(len(group) for group in _groups(ElementTree.fromstring(svg), ("hair",)))


def with_hair(svg: str, color: str) -> str:
    """A drawing whose hair has another color, a key of `HAIR_COLORS`."""
    root = ElementTree.fromstring(svg)
    for group in _groups(root, ("hair",)):
        for shape in group.iter():
            for name, value in shape.attrib.items():
                shape.set(name, _COLOR.sub("#" + HAIR_COLORS[color], _SHORT_COLOR.sub(r"#\1\1\2\2\3\3", value)))
    return ElementTree.tostring(root, encoding="unicode")


def outline(svg: str) -> str:
    """A drawing without its fills: black lines on white."""
    root = ElementTree.fromstring(svg)
    for group in _groups(root, _FILLS):
        group.clear()
    return ElementTree.tostring(root, encoding="unicode")


def color_map(svg: str, size: int) -> bytes:
    """A drawing without its lines as a map of `PALETTE`: PNG bytes of `size` x `size`, each pixel an entry, hard edges.

    What has no fill is white; colors beside the palette, such as skin, become their nearest entry.
    """
    root = ElementTree.fromstring(svg)
    for group in _groups(root, ("line",)):
        group.clear()
    root.set("shape-rendering", "crispEdges")
    rendered = Image.open(io.BytesIO(render(ElementTree.tostring(root, encoding="unicode"), size))).convert("RGB")
    file = io.BytesIO()
    Image.fromarray(PALETTE[nearest_entries(np.asarray(rendered))]).save(file, "PNG")
    return file.getvalue()


def nearest_entries(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """uint8 [...,3] => the number of each pixel's nearest entry of `PALETTE`, by the distance of RGB values."""
    difference = pixels[..., None, :].astype(np.int64) - PALETTE.astype(np.int64)
    entries: npt.NDArray[np.int64] = np.square(difference).sum(-1).argmin(-1)
    return entries


def _groups(root: ElementTree.Element, names: tuple[str, ...]) -> list[ElementTree.Element]:
    return [group for group in root.iter(f"{{{_SVG}}}g") if group.get("id", "").startswith(names)]
