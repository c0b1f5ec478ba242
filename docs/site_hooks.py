"""What the site needs beyond Markdown (mkdocs.yml): pages from outside docs/, links that also work there, equations.

The repository's Markdown stays readable where it lies: README.md links to docs/data.md, docs/theory.md to ../ldm.
On the site a link to a page or a file of the site is rewritten, and a link to anything else becomes plain text.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
#: Pages and files of the site that lie outside docs/: path on the site => path in the repository.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
    "report.html": "models/emoji/report.html",
}
ON_SITE = {source: uri for uri, source in OUTSIDE.items()}

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    for uri, source in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return rewrite_links(markdown, page.file.src_uri)


def on_page_content(content: str, **_: Any) -> str:
    """Equations as MathML, which browsers typeset without a script."""
    return EQUATION.sub(typeset, content)


def rewrite_links(markdown: str, uri: str) -> str:
    """Markdown of the page `uri` with every link outside code made one of the site."""
    parts = FENCE.split(markdown)  # text, code, text, ...
    return "".join(part if i % 2 else LINK.sub(lambda m: link(m, uri), part) for i, part in enumerate(parts))


def link(match: re.Match[str], uri: str) -> str:
    target, _, anchor = match["target"].partition("#")
    if not target or re.match(r"[a-z]+:", target):
        return match[0]
    source = OUTSIDE.get(uri, f"docs/{uri}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    there = ON_SITE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    if there is None:
        return match["text"]
    new = posixpath.relpath(there, posixpath.dirname(uri) or ".")
    return f"{match['picture']}[{match['text']}]({new}{'#' + anchor if anchor else ''})"


def typeset(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    return f'<span class="equation-{display}">{convert(html.unescape(match[2]), display=display)}</span>'
