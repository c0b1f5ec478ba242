"""How the page looks; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import gradio as gr

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Ubuntu", "sans-serif"]
THEME = gr.themes.Default(
    primary_hue="teal", neutral_hue="stone", radius_size="lg", font=FONTS, font_mono=["ui-monospace", "monospace"]
).set(body_background_fill="*neutral_50", button_secondary_background_fill="*neutral_200")
# the gallery is as high as its pictures; small ones are enlarged without blur
CSS = """
.gradio-container > .main {max-width: 1080px !important; padding-top: 40px !important}
#pictures .grid-wrap {max-height: none !important; height: auto !important; overflow: visible}
#pictures.small img {image-rendering: pixelated}
#status {min-height: 64px}
#status div.bar {height: 6px; margin: 6px 0; border-radius: 3px; background: var(--border-color-primary)}
#status div.bar div {height: 100%; border-radius: 3px; background: var(--primary-500); transition: width .2s}
@media (min-width: 800px) {#pictures {min-height: 512px}}
"""
# for every launch of the page; it serves no folder and accepts no large file
SERVING: dict[str, Any] = {"theme": THEME, "css": CSS, "allowed_paths": [], "max_file_size": "32mb"}
