"""`ldm data caption`: captions for pictures that have none, from names, other captions or a captioning model."""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ldm.cli.parser import Command, path, picture_file, positive

if TYPE_CHECKING:
    from ldm.data.captioning import CaptionFolder

#: path of a picture => its suggested captions, the best first
Suggestions: TypeAlias = dict[str, list[str]]
SHOWN = 48  # pictures on a preview
LISTED = 20  # pictures in the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=path, help="a folder of pictures, with metadata or .txt files or without")
    add(
        "--from",
        dest="source",
        required=True,
        metavar="names|clip|MODEL",
        help="names of files and folders; the nearest captions of other pictures, by an in-domain CLIP; or a folder of "
        "an image-to-text model of transformers (safetensors)",
    )
    add("--column", default="text", help="of the captions, in metadata files (default: text)")
    add("--overwrite", action="store_true", help="caption pictures anew that have captions")
    add("--dry-run", action="store_true", help="suggest, and write no caption")
    add("--preview", type=picture_file, metavar="FILE", help="pictures with their captions, side by side")
    add("--table", type=path, metavar="FILE.csv", help="all suggestions, a row for each picture")
    add = parser.add_argument_group("--from clip").add_argument
    add(
        "--clip",
        type=path,
        metavar="FOLDER",
        help="the in-domain CLIP; a new one is trained on the captions there are (default: nets/NAME-captions)",
    )
    add(
        "--candidates",
        type=path,
        metavar="FILE",
        help="captions to choose from, one a line (default: those that are there)",
    )
    add(
        "--top",
        type=positive,
        default=5,
        metavar="N",
        help="suggestions of each picture; the first is written (default: 5)",
    )
    add("--epochs", type=positive, metavar="N", help="of the training of the CLIP (default: 20)")
    add("--clip-text", default="minilm", metavar="ENCODER", help="its text encoder (default: minilm)")
    add = parser.add_argument_group("--from MODEL").add_argument
    add("--prompt", metavar="TEXT", help="what the caption follows, or the question to a model that chats")
    add("--max-tokens", type=positive, default=32, metavar="N", help="of a caption (default: 32)")
    add("--beams", type=positive, default=1, metavar="N", help="of the search (default: 1)")


def run(arguments: argparse.Namespace) -> None:
    from ldm.data.captioning import CaptionFolder
    from ldm.data.rows import count

    check_options(arguments)
    folder = CaptionFolder.read(arguments.folder, arguments.column)
    names = list(folder.captions) if arguments.overwrite else folder.without()
    if not names:
        print(
            f"{folder.folder}: all {count(len(folder.captions), 'picture')} have captions; --overwrite makes new ones"
        )
        return
    suggestions = METHODS.get(arguments.source, from_model)(folder, names, arguments)
    names = [name for name in names if name in suggestions]
    for name in names[:LISTED]:
        print(f"{name}: {' | '.join(suggestions[name])}")
    if len(names) > LISTED:
        print(f"and {len(names) - LISTED:,} more; --table FILE.csv lists them all")
    if arguments.table:
        save_table(arguments.table, suggestions)
    if arguments.preview:
        from ldm.data.grid import captioned_grid

        shown = names[:: -(-len(names) // SHOWN)]
        arguments.preview.parent.mkdir(parents=True, exist_ok=True)
        captions = [suggestions[name][0] for name in shown]
        captioned_grid([folder.image(name) for name in shown], captions, columns=8).save(arguments.preview)
        print(f"preview: {arguments.preview}")
    if arguments.dry_run:
        stays = f"; the in-domain CLIP stays in {net_of(folder, arguments)}" if arguments.source == "clip" else ""
        print(f"no caption is written (--dry-run){stays}")
        return
    files = folder.write({name: suggestions[name][0] for name in names})
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1:,} more"
    print(f"captioned {count(len(names), 'picture')}: {where}")


def check_options(arguments: argparse.Namespace) -> None:
    """Raise a ValueError for an option of another --from, and for an unknown one."""
    of_clip = {"--clip": arguments.clip, "--candidates": arguments.candidates, "--epochs": arguments.epochs}
    for option, value in of_clip.items() if arguments.source != "clip" else ():
        if value is not None:
            raise ValueError(f"{option}: goes with --from clip")
    if arguments.prompt is not None and arguments.source in METHODS:
        raise ValueError("--prompt: goes with --from MODEL, a folder of an image-to-text model")
    if arguments.source not in METHODS and not Path(arguments.source).expanduser().is_dir():
        raise ValueError(f"--from: expected names, clip or a model's folder; there is no folder {arguments.source!r}")


def from_names(folder: CaptionFolder, names: list[str], arguments: argparse.Namespace) -> Suggestions:
    """What the files or their folders are called."""
    from ldm.data.captioning import captions_from_names

    captions = captions_from_names(folder, names)
    warn_of([name for name in names if name not in captions], "without words in their names or their folders'")
    return {name: [caption] for name, caption in captions.items()}


def from_clip(folder: CaptionFolder, names: list[str], arguments: argparse.Namespace) -> Suggestions:
    """The captions that an in-domain CLIP finds nearest."""
    from ldm.evaluation.caption_suggestions import EDGE, doubts, suggest
    from ldm.evaluation.in_domain_clip import open_clip, read_card
    from ldm.system.devices import best_device

    known = {name: captions for name, captions in folder.captions.items() if captions}
    candidates = list(dict.fromkeys(caption for captions in known.values() for caption in captions))
    if arguments.candidates:
        lines = arguments.candidates.read_text("utf-8").split("\n")
        candidates = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not candidates:
        raise ValueError(
            f"--from clip: no picture of {folder.folder} has a caption to suggest; name some in --candidates"
        )
    net, device = net_of(folder, arguments), best_device()
    card = read_card(net)
    if card is None:
        if net.exists():
            raise ValueError(f"--clip: {net} holds no in-domain CLIP; name a new folder to train one")
        card = fit(folder, list(known), net, arguments, device)
        print(f"in-domain CLIP trained in {card['seconds']} s and saved in {net}: {sureness(card)}")
        extractor = open_clip(net, EDGE, device)
    else:
        extractor = open_clip(net, EDGE, device)
        print(f"in-domain CLIP of {net}: {sureness(card)}; name a new --clip to train another")
    for doubt in doubts(card):
        print(f"warning: {doubt}", file=sys.stderr)
    found = suggest(extractor, images(folder, names, "suggesting captions"), candidates, arguments.top)
    return {name: [caption for caption, _ in nearest] for name, nearest in zip(names, found, strict=True)}


def net_of(folder: CaptionFolder, arguments: argparse.Namespace) -> Path:
    """The folder of the in-domain CLIP: `--clip`, or one that is called as the pictures are."""
    named: Path | None = arguments.clip
    called = re.sub(r"[^\w.-]+", "-", folder.folder.resolve().name)
    return named or Path("nets") / f"{called}-captions"


def sureness(card: dict[str, Any]) -> str:
    """How many pictures an in-domain CLIP has learned from, and how well it finds their captions."""
    from ldm.evaluation.report.text import recall_text

    found = card["recall"]["picture to caption"]
    return (
        f"{card['n']:,} captioned pictures; picture to caption, {card['recall_on']}: {recall_text(found)}; "
        f"chance {found['chance']['top5']:.1%} (top-5)"
    )


def fit(
    folder: CaptionFolder, known: list[str], net: Path, arguments: argparse.Namespace, device: Any
) -> dict[str, Any]:
    """Train an in-domain CLIP on the pictures that have captions; returns its card."""
    from ldm.data.dataset import read_captioned
    from ldm.evaluation.in_domain_clip import InDomainClipConfig
    from ldm.evaluation.in_domain_clip_training import EPOCHS, train_clip

    pictures = read_captioned(folder.folder, caption_columns=(folder.column,), only=set(known))
    config = InDomainClipConfig(text_encoder=arguments.clip_text)
    return train_clip(pictures, net, device, config=config, epochs=arguments.epochs or EPOCHS)


def from_model(folder: CaptionFolder, names: list[str], arguments: argparse.Namespace) -> Suggestions:
    """The captions of a captioning model."""
    from ldm.models.captioner import Captioner
    from ldm.system.devices import best_device

    captioner = Captioner.load(Path(arguments.source).expanduser(), best_device())
    pictures = images(folder, names, "captioning")
    found = captioner.captions(pictures, arguments.prompt, arguments.max_tokens, arguments.beams)
    captions = {name: [caption] for name, caption in zip(names, found, strict=True) if caption}
    if not captions:
        raise ValueError(f"--from: {arguments.source} suggests no caption; set --prompt or --max-tokens")
    warn_of([name for name in names if name not in captions], f"that {arguments.source} has no caption for")
    return captions


def warn_of(skipped: list[str], which: str) -> None:
    """List the pictures that get no caption."""
    from ldm.data.rows import count

    if skipped:
        lines = [f"warning: {count(len(skipped), 'picture')} {which}, skipped:", *skipped[:LISTED]]
        lines += [f"and {len(skipped) - LISTED:,} more"] * (len(skipped) > LISTED)
        print("\n  ".join(lines), file=sys.stderr)


METHODS = {"names": from_names, "clip": from_clip}


def images(folder: CaptionFolder, names: list[str], doing: str) -> Iterator[Any]:
    """Pictures one by one, with a progress bar."""
    from tqdm import tqdm

    return (folder.image(name) for name in tqdm(names, doing, unit="picture", leave=False))


def save_table(file: Path, suggestions: Suggestions) -> None:
    """All suggestions as csv: file_name, suggestion 1, 2, ..."""
    most = max(map(len, suggestions.values()))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["file_name", *(f"suggestion {n}" for n in range(1, most + 1))])
        writer.writerows([name, *captions] for name, captions in suggestions.items())
    print(f"all suggestions: {file}")


COMMAND = Command(
    "caption the pictures that have no caption: from names, from other captions, by a captioning model",
    """
ldm data caption my_pictures --from names                                (red_panda-02.jpg => red panda)
ldm data caption my_pictures --from clip --dry-run --preview look.png    (the nearest captions of the others)
ldm data caption my_pictures --from models/blip --max-tokens 20          (an image-to-text model in a folder)""",
    add_arguments,
    run,
    "FOLDER --from names|clip|MODEL [OPTION ...]",
)
