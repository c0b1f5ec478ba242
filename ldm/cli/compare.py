"""`ldm compare`: two models, or two settings of one, on the same captions and noise."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ldm.cli.evaluate import interval, read_data
from ldm.cli.parser import Command, feature_extractor, path, place
from ldm.pipelines import import_networks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("a", type=place, metavar="A", help="a run, a pipeline folder or a Hub id")
    add("b", type=place, metavar="B", help="another one, or the same with other settings")
    add("--data", type=place, metavar="SOURCE", help="captioned pictures (default: what A's run was trained on)")
    add("--image-column", help="where a Hub data set has its pictures (default: the run's, or image)")
    add("--caption-columns", nargs="+", metavar="COLUMN", help="the captions (default: the run's, or text)")
    add("--holdout", type=float, help="share of the captions that was held out (default: the run's, or 0.05)")
    add("--out", type=path, metavar="FOLDER", help="where to write (default: runs/A-B-comparison)")
    add("--pictures", type=int, metavar="N", help="held-out captions to generate, spread evenly (default: all)")
    add("--train-pictures", type=int, default=200, metavar="N", help="training captions (default: 200; 0: none)")
    add("--seed", type=int, default=0, help="of the first picture of each set; picture i has seed + i (default: 0)")
    add("--batch-size", type=int, default=16, help="pictures generated at once (default: 16)")
    add = parser.add_argument_group(
        "settings, one value for both or one each (default: each pipeline's own)"
    ).add_argument
    add("--steps", type=int, nargs="+", metavar="N", help="sampling steps")
    add("--guidance-scale", type=float, nargs="+", metavar="W", help="classifier-free guidance; 1 is off")
    add("--guidance-interval", type=interval, nargs="+", metavar="LOW:HIGH", help="guide only where LOW <= t/T < HIGH")
    add = parser.add_argument_group("feature extractors").add_argument
    add("--features", nargs="+", default=[], type=feature_extractor, metavar="NET", help="as in `ldm evaluate`")
    add("--net", type=path, metavar="FOLDER", help="the data set's own CLIP (default: nets/<name of the data>)")


def run(arguments: argparse.Namespace) -> None:
    import_networks()
    from ldm.cli.find import find_model
    from ldm.evaluation.compare import compare
    from ldm.evaluation.evaluated_model import EvaluatedModel, SamplingSettings
    from ldm.evaluation.features import load_extractor, pixel_extractor
    from ldm.evaluation.in_domain_clip import load_clip, read_card
    from ldm.evaluation.report.comparison import FILE, PAGE, comparison_table
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
    size, device = models[0].size, models[0].device
    extractors = [pixel_extractor(size), *(load_extractor(spec, size, device) for spec in arguments.features)]
    net = arguments.net or Path("nets") / re.sub(r"[^\w.-]+", "-", Path(pictures.source).name)
    if read_card(net) is not None:
        extractors.append(load_clip(net, pictures, size, device))
    elif len(extractors) == 1:
        print(
            f"no in-domain CLIP in {net} (train it with `ldm evaluate --data {pictures.source} --fit-net`) and no "
            "--features: everything is measured in pixels"
        )
    names = [folder.parent.name if folder.name == "pipeline" else folder.name for folder in folders]
    out = arguments.out or Path("runs") / f"{names[0]}-{names[1]}-comparison"
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
ldm compare models/openmoji64 models/openmoji64 --data data/openmoji --steps 8 4 --guidance-scale 3 1.5""",
    add_arguments,
    run,
)
