"""Pictures side by side, each with its caption beneath: what people look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def captioned_grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 4, edge: int = 128
) -> Image.Image:
    """Lay pictures out in rows of `columns`, each drawn `edge` pixels wide over its caption in two lines."""
    if len(pictures) != len(captions) or not pictures:
        raise ValueError(f"captioned_grid: expected a caption per picture, got {len(captions)} and {len(pictures)}")
    if columns < 1:
        raise ValueError(f"columns: expected at least 1, got {columns}")
    gap, size = edge // 16, max(9, edge // 10)
    font = ImageFont.load_default(size)
    text_height = round(2.6 * size)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    cell_width, cell_height = edge + gap, edge + text_height + gap
    grid = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    pen = ImageDraw.Draw(grid)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = gap + i % columns * cell_width, gap + i // columns * cell_height
        resampling = Image.Resampling.NEAREST if edge % picture.width == 0 else Image.Resampling.LANCZOS
        grid.paste(picture.convert("RGB").resize((edge, edge), resampling), (left, top))
        lines = textwrap.wrap(caption, width=max(8, int(edge / (0.55 * size))), max_lines=2, placeholder="…")
        pen.multiline_text((left, top + edge + size // 4), "\n".join(lines), fill="#333333", font=font, spacing=2)
    return grid
