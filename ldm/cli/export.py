"""`ldm export`: a model into a folder of half the size, to keep or to give away."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli.lora import add_lora_option, load_loras
from ldm.cli.parser import Command, path, place, positive
from ldm.pipelines import import_networks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=place, metavar="RUN_OR_MODEL", help="a run or a pipeline folder")
    add("out", type=path, metavar="FOLDER", help="the folder to make")
    add_lora_option(add)
    add(
        "--ema", type=float, metavar="WIDTH", help="of the average, rebuilt from the run's snapshots (optim.ema_widths)"
    )
    add(
        "--upscaler",
        type=place,
        metavar="FOLDER",
        help="an upscaler to put behind it, into FOLDER/upscaler (default: the model's own, if it has one)",
    )
    add(
        "--few-steps",
        type=few_steps,
        metavar="LORA[:STEPS]",
        help="a LoRA of few steps (RUN/lora) to put behind it, into FOLDER/few_steps: the student, which answers calls "
        "without settings (default: the model's own, if it has one and its weights stay)",
    )


def few_steps(text: str) -> tuple[Path, int | None]:
    """FOLDER[:STEPS] => both."""
    source, colon, steps = text.rpartition(":")
    if not colon or not steps.isdecimal():
        return path(text), None
    return path(source), positive(steps)


def run(arguments: argparse.Namespace) -> None:
    import_networks()
    from ldm.cli.find import find_model, run_of
    from ldm.evaluation.provenance import record_run
    from ldm.models.lora_files import find_lora
    from ldm.pipelines.text_to_image import LDMPipeline
    from ldm.pipelines.upscale import LDMUpscalePipeline
    from ldm.sharing.export import export
    from ldm.sharing.redaction import redact_paths

    folder, _, config = find_model(arguments.model)
    pipeline = LDMPipeline.from_pretrained(folder)
    if arguments.ema is not None:
        from ldm.models.ema_snapshots import put_into, rebuild

        rebuilt = rebuild(run_of(folder)[0] or folder, arguments.ema)
        put_into(pipeline.unet, rebuilt)
        print(
            f"the average of width {arguments.ema:g} at step {rebuilt.step}; {rebuilt.left:.2%} of its profile missed"
        )
    load_loras(pipeline, arguments.lora)
    if arguments.lora:
        pipeline.merge_adapters()
    if arguments.upscaler is not None:
        pipeline.upscaler = LDMUpscalePipeline.from_pretrained(arguments.upscaler)
        check_behind(pipeline, arguments.upscaler)
    if arguments.few_steps is not None:
        lora, steps = arguments.few_steps
        pipeline.teach(find_lora(lora).parent, steps)
    elif pipeline.has_student and (arguments.lora or arguments.ema is not None):
        pipeline.dismiss_student()
        print(
            "the model's student is left out, since it was trained beside other weights; to put it behind this model "
            f"as well, add --few-steps {folder / 'few_steps'}"
        )
    size = export(pipeline, arguments.out)
    if config:
        config = redact_paths(config, [config.get("run"), config.get("data", {}).get("source")])
    record_run(arguments.out, *run_of(folder), config)  # `ldm evaluate` reports it
    copy_card(arguments, folder)
    print(f"{arguments.out} holds {size / 1e6:.1f} MB; generate with: ldm sample {arguments.out} PROMPT")


def copy_card(arguments: argparse.Namespace, folder: Path) -> None:
    """README.md of the model, which holds its license and authors; it says if something else was made of the model."""
    card = folder / "README.md"
    if not card.exists():
        return
    text = card.read_text("utf-8")
    changed = [
        f"--{name.replace('_', '-')}"
        for name in ("lora", "ema", "upscaler", "few_steps")
        if getattr(arguments, name) is not None
    ]
    if changed:
        head, front, body = text.partition("\n---\n") if text.startswith("---\n") else ("", "", text)
        note = (
            f"\n> Made of {arguments.model} by `ldm export` with {' and '.join(changed)}. What follows is its card.\n"
        )
        text = head + front + note + body
    (arguments.out / "README.md").write_text(text, "utf-8")


def check_behind(pipeline: Any, name: str) -> None:
    """Raise a ValueError if an upscaler was trained for pictures of another size than the pipeline makes."""
    size, tile = pipeline.edge("height"), pipeline.upscaler.tile
    if size != tile:
        raise ValueError(f"--upscaler: {name} upscales pictures of {tile} pixels, and the model makes {size}")


COMMAND = Command(
    "save a model in half the size: fp16 weights, computed in float32",
    """
ldm export runs/demo models/demo
ldm export runs/demo models/demo --ema 0.08     (an average of another width, chosen by ldm evaluate --ema)
ldm export models/emoji models/ink --lora runs/ink/lora   (a LoRA merged into the model)
ldm export models/demo models/demo256 --upscaler runs/upscale/pipeline   (an upscaler behind the model)
ldm export models/demo models/fast --few-steps runs/few_steps/lora:2     (a student behind it, of 2 steps)""",
    add_arguments,
    run,
)
