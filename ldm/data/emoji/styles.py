"""Emoji of other designers, from icon packages in Iconify's format (`npm pack @iconify-json/noto`).

    noto/                the unpacked package, or its `package/` folder
      icons.json         {"icons": {"pizza": {"body": "<path …/>"}}, "width": 128, "height": 128, "aliases": {…}}
      chars.json         {"1f355": "pizza"}: code points => icon; where it is missing, names are compared
      info.json          name, author, license

An emoji keeps the caption that OpenMoji's drawing of the same code points has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.emoji.openmoji import Drawing

MARGIN = 0.06  # of the icon's edge, on each side: these icons touch their frame, OpenMoji's don't
NAME = re.compile(r"[a-z][a-z0-9]*")
_MOVED = ("hFlip", "vFlip", "rotate", "left", "top")  # aliases that turn their parent are left out


@dataclass(frozen=True)
class Style:
    """One designer's emoji.

    Attributes:
        name: the word in captions: "pizza, noto style".
        svgs: code points in hexadecimal, without variation selectors => SVG.
        title, author, license, url: for the attribution.
    """

    name: str
    svgs: Mapping[tuple[str, ...], str]
    title: str
    author: str
    license: str
    url: str


def read_style(name: str, folder: str | Path, drawings: list[Drawing]) -> Style:
    """Read an icon package; `drawings` give the names to compare where the package has no code points.

    Raises:
        ValueError: if the folder is no such package, or none of its icons is an emoji of OpenMoji.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"--style {name}={folder}: the name is a word of captions; expected small letters and digits")
    root = Path(folder)
    root = root / "package" if (root / "package" / "icons.json").exists() else root
    if not (root / "icons.json").exists():
        raise ValueError(
            f"--style {name}={folder}: no icons.json there; expected an unpacked package of icons, such as "
            f"`npm pack @iconify-json/{name}` and `tar xzf` give"
        )
    icons, info = _json(root / "icons.json"), _json(root / "info.json")
    chars = _json(root / "chars.json") or {}
    by_codes = {tuple(code.upper() for code in key.split("-") if code != "fe0f"): icon for key, icon in chars.items()}
    svgs = {}
    for drawing in drawings:
        icon = by_codes.get(drawing.codes) if by_codes else slug(drawing.caption)
        body = _body(icons, icon) if icon else None
        if body is not None:
            svgs[drawing.codes] = body
    if not svgs:
        raise ValueError(f"--style {name}={folder}: none of its {len(icons.get('icons', {}))} icons is a known emoji")
    license_ = info.get("license") or {}
    author = info.get("author") or {}
    return Style(
        name,
        svgs,
        info.get("name", name),
        author.get("name", "unknown"),
        license_.get("spdx") or license_.get("title", "unknown"),
        author.get("url", ""),
    )


def slug(caption: str) -> str:
    """A caption as Iconify names icons: "woman firefighter: dark skin tone" => woman-firefighter-dark-skin-tone."""
    return re.sub(r"[^a-z0-9]+", "-", caption.lower().replace("’", "")).strip("-")


def _body(icons: dict[str, Any], name: str) -> str | None:
    """The SVG of an icon or of an unturned alias; None if there is none."""
    for _ in range(5):  # aliases of aliases
        if name in icons["icons"]:
            return _svg(icons["icons"][name], icons)
        alias = icons.get("aliases", {}).get(name)
        if alias is None or any(alias.get(key) for key in _MOVED):
            return None
        name = alias["parent"]
    return None


def _svg(icon: dict[str, Any], icons: dict[str, Any]) -> str:
    """An icon's body in a square frame with a margin."""
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    edge = max(width, height) * (1 + 2 * MARGIN)
    x, y = left - (edge - width) / 2, top - (edge - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{x:g} {y:g} {edge:g} {edge:g}">{icon["body"]}</svg>'
    )


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    return found if isinstance(found, dict) else {}
