"""`ldm compare`: two models, or two settings of one, on the same captions and noise."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli.evaluate import add_data_options, add_extractor_options, interval, load_extractors, read_data
from ldm.cli.parser import Command, path, place, positive
from ldm.pipelines import import_networks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("a", type=place, metavar="A", help="a run, a pipeline folder or a Hub id")
    add("b", type=place, metavar="B", help="another one, or the same with other settings")
    add_data_options(add)
    add("--out", type=path, metavar="FOLDER", help="where to write (default: runs/A-B-comparison)")
    add("--pictures", type=positive, metavar="N", help="held-out captions to generate, spread evenly (default: all)")
    add("--train-pictures", type=int, default=200, metavar="N", help="training captions (default: 200; 0: none)")
    add("--seed", type=int, default=0, help="of the first picture of each set; picture i has seed + i (default: 0)")
    add("--batch-size", type=positive, default=16, metavar="N", help="pictures generated at once (default: 16)")
    add = parser.add_argument_group(
        "settings, one value for both or one each (default: each pipeline's own)"
    ).add_argument
    add("--steps", type=positive, nargs="+", metavar="N", help="sampling steps")
    add("--guidance-scale", type=float, nargs="+", metavar="W", help="classifier-free guidance; 1 is off")
    add("--guidance-interval", type=interval, nargs="+", metavar="LOW:HIGH", help="guide only where LOW <= t/T < HIGH")
    add = parser.add_argument_group("feature extractors").add_argument
    add_extractor_options(add)


def run(arguments: argparse.Namespace) -> None:
    import_networks()
    from ldm.cli.find import find_model
    from ldm.evaluation.compare import compare
    from ldm.evaluation.evaluated_model import EvaluatedModel, SamplingSettings
    from ldm.evaluation.report.comparison import FILE, PAGE, comparison_table
    from ldm.evaluation.report.page import model_name
    from ldm.pipelines.text_to_image import LDMPipeline

    steps = one_each("--steps", arguments.steps)
    scales = one_each("--guidance-scale", arguments.guidance_scale)
    intervals = one_each("--guidance-interval", arguments.guidance_interval)
    found = [find_model(name) for name in (arguments.a, arguments.b)]
    folders = [folder for folder, _, _ in found]
    pictures = read_data(arguments, found[0][2])
    pipelines = [LDMPipeline.from_pretrained(folders[0]).to_best_device()]
    pipelines.append(
        pipelines[0] if folders[1] == folders[0] else LDMPipeline.from_pretrained(folders[1]).to_best_device()
    )
    models = [EvaluatedModel(pipeline, folder) for pipeline, folder in zip(pipelines, folders, strict=True)]
    settings = []
    for side, pipeline in enumerate(pipelines):
        used = pipeline.defaults.resolve(steps[side], scales[side], intervals[side])
        settings.append(
            SamplingSettings(used.num_inference_steps, used.guidance_scale, arguments.seed, used.guidance_interval)
        )
    if models[0].sha256 == models[1].sha256 and settings[0] == settings[1]:
        raise ValueError("A and B are the same model with the same settings; give --steps 8 4, for example")
    extractors = load_extractors(arguments, pictures, models[0])
    out = arguments.out or Path("runs") / "{}-{}-comparison".format(*(model_name(str(folder)) for folder in folders))
    report = compare(
        models,
        pictures,
        extractors,
        settings,
        out,
        most={"train": arguments.train_pictures, "heldout": arguments.pictures},
        batch_size=arguments.batch_size,
        command=arguments.command,
    )
    print(f"\n{comparison_table(report)}\nall metrics: {out / FILE}\npage: {out / PAGE}")


def one_each(option: str, values: list[Any] | None) -> list[Any]:
    """No value, one for both, or one each => two."""
    if values is None:
        return [None, None]
    if len(values) > 2:
        raise ValueError(f"{option}: expected one value for both models or one each, got {len(values)}")
    return [values[0], values[-1]]


COMMAND = Command(
    "compare two models, or two settings, on the same captions and noise",
    """
ldm compare runs/a runs/b                            (a page with both beside the truth, largest differences first)
ldm compare models/emoji models/emoji --data data/emoji --steps 8 4 --guidance-scale 3 1.5""",
    add_arguments,
    run,
    "[OPTION ...] A B",
)
