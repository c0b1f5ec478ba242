"""`ldm evaluate`: from what people type to the parts that ldm.evaluation examines."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.lora import add_lora_option, load_loras
from ldm.cli.parser import Command, feature_extractor, path, place
from ldm.pipelines import import_networks

if TYPE_CHECKING:
    from ldm.data.dataset import CaptionedPictures
    from ldm.evaluation.evaluated_model import EvaluatedModel, SamplingSettings
    from ldm.evaluation.features import FeatureExtractor


SETTINGS = ("steps", "guidance_scale", "guidance_interval")  # of pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        type=place,
        metavar="RUN_OR_MODEL",
        help="a run, a pipeline folder or a Hub id; none with --fit-net alone",
    )
    add_lora_option(add)
    add_data_options(add)
    add("--out", type=path, metavar="FOLDER", help="where to write (default: RUN/evaluation)")
    add("--report", type=path, metavar="FILE", help="copy the report here, besides FOLDER/report.html")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="sampling steps; without this and the next two the pipeline's "
        "defaults apply, with one of them the others are those of stock diffusers, as in `ldm sample`",
    )
    add("--guidance-scale", type=float, metavar="W", help="classifier-free guidance; 1 is off")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide only where LOW <= t/T < HIGH")
    add("--seed", type=int, default=0, help="of the first picture of each set; picture i has seed + i (default: 0)")
    add("--pictures", type=int, metavar="N", help="held-out captions to generate, spread evenly (default: all)")
    add("--train-pictures", type=int, metavar="N", help="training captions to generate, spread evenly (default: 200)")
    add("--batch-size", type=int, default=16, help="pictures generated at once (default: 16)")
    add("--seeds", type=int, metavar="N", help="also generate N pictures of each training caption: do they differ?")
    add("--base", type=place, metavar="MODEL", help="for an upscaler: whether this model's pictures keep their prompt")
    add("--quick", action="store_true", help="16 captions of each set, few resamples, no timing")
    add = parser.add_argument_group("likelihood").add_argument
    add("--nll", action="store_true", help="only bound the negative log-likelihood of held-out latents, by timestep")
    add("--strata", type=int, default=50, help="timesteps per picture; more of them vary less (default: 50)")
    add = parser.add_argument_group("feature extractors").add_argument
    add_extractor_options(add)
    add("--fit-net", action="store_true", help="first train the data set's own CLIP on its training pictures")
    add("--net-epochs", type=int, metavar="N", help="epochs of its training (default: 20)")
    add("--net-text", default="minilm", type=place, metavar="ENCODER", help="its text encoder (default: minilm)")
    add = parser.add_argument_group("width of the average").add_argument
    add(
        "--ema",
        type=width_range,
        metavar="LOW:HIGH",
        help="only try averages of these widths, rebuilt from the run's snapshots (optim.ema_widths); pick the best",
    )
    add("--ema-count", type=int, default=7, metavar="N", help="widths to try (default: 7)")
    add = parser.add_argument_group("guidance and steps").add_argument
    add("--sweep", action="store_true", help="try a grid of guidance scales, steps and intervals")
    add("--sweep-guidance", nargs="+", type=float, metavar="SCALE", help="(default: 1 2 3 4 6)")
    add("--sweep-steps", nargs="+", type=int, metavar="N", help="(default: 8 12 20)")
    add(
        "--sweep-intervals",
        nargs="+",
        type=interval,
        metavar="LOW:HIGH",
        help="where in t/T to guide (default: 0:1 0.2:1 0.2:0.8)",
    )
    add("--sweep-pictures", type=int, metavar="N", help="captions of each set (default: 64)")
    add("--write-defaults", action="store_true", help="save the best setting as the pipeline's defaults")


def add_data_options(add: Callable[..., Any]) -> None:
    """Which captioned pictures a model is measured on."""
    add("--data", type=place, metavar="SOURCE", help="captioned pictures (default: what the run was trained on)")
    add("--image-column", help="where a Hub data set has its pictures (default: the run's, or image)")
    add("--caption-columns", nargs="+", metavar="COLUMN", help="the captions (default: the run's, or text)")
    add("--holdout", type=float, help="share of the captions that was held out (default: the run's, or 0.05)")


def add_extractor_options(add: Callable[..., Any]) -> None:
    """Which feature extractors measure it."""
    add(
        "--features",
        nargs="+",
        default=[],
        type=feature_extractor,
        metavar="NET",
        help="vision models of transformers, as folders or Hub ids (DINOv2, CLIP, …), or inception=FILE.safetensors",
    )
    add(
        "--net",
        type=path,
        metavar="FOLDER",
        help="the data set's own CLIP, which --fit-net of `ldm evaluate` trains (default: nets/<name of the data>)",
    )


def interval(text: str) -> tuple[float, float]:
    """LOW:HIGH => both."""
    from ldm.inference.defaults import check_interval

    try:
        return check_interval("interval", [float(part) for part in text.split(":")])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; for example 0.2:0.8") from None


def width_range(text: str) -> tuple[float, float]:
    """LOW:HIGH => both; one width is a range of itself."""
    low, _, high = text.partition(":")
    try:
        values = float(low), float(high or low)
    except ValueError:
        values = (0.0, 0.0)
    if not 0 < values[0] <= values[1] <= 0.288:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 < LOW <= HIGH <= 0.288, for example 0.02:0.2")
    return values


def run(arguments: argparse.Namespace) -> None:
    import_networks()
    import torch

    from ldm.cli.find import find_model, run_of
    from ldm.evaluation.provenance import RUN_FILE, copy_run_record, record_run

    if arguments.model is None and not arguments.fit_net:
        raise ValueError(
            "model: name a run or a pipeline folder to evaluate, or train the in-domain CLIP with --fit-net"
        )
    if arguments.write_defaults and not (arguments.sweep and arguments.model):
        raise ValueError("--write-defaults: it writes what --sweep finds for a model; give both")
    folder, home, config = find_model(arguments.model) if arguments.model else (None, None, None)
    upscaler = folder is not None and is_upscaler(folder)
    if upscaler:
        check_options_of_upscaler(arguments)
    elif arguments.base is not None:
        raise ValueError("--base: only an upscaler has one; leave it out")
    pictures = read_data(arguments, config)
    net = net_folder(arguments, pictures)
    if arguments.fit_net:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fit(pictures, net, arguments, device)
    if folder is not None and home is not None and upscaler:
        examine_upscaler(folder, arguments.out or home, pictures, arguments)
    elif folder is not None and home is not None and arguments.nll:
        bound_likelihood(folder, arguments.out or home, pictures, arguments)
    elif folder is not None and home is not None and arguments.ema:
        try_ema_widths(folder, arguments.out or home, pictures, arguments)
    elif folder is not None and home is not None:
        out = arguments.out or home
        if (folder / RUN_FILE).exists():  # written by `ldm export`
            copy_run_record(folder, out)
        else:
            record_run(out, *run_of(folder), config)
        examine(folder, out, pictures, arguments)


def is_upscaler(folder: Path) -> bool:
    """Whether a pipeline's folder is an upscaler's."""
    from ldm.models.safety import read_json
    from ldm.pipelines.loading import UPSCALER

    index = folder / "model_index.json"  # a student has none: MODEL/few_steps is opened by way of its model
    return index.exists() and read_json(index).get("_class_name") == UPSCALER


def check_options_of_upscaler(arguments: argparse.Namespace) -> None:
    """Raise a ValueError for an option that only models of prompts are evaluated with."""
    for option in ("nll", "ema", "sweep", "write_defaults", "lora", *SETTINGS, "train_pictures", "seeds", "report"):
        if getattr(arguments, option):
            named = "--" + option.replace("_", "-")
            raise ValueError(f"{named}: {arguments.model} is an upscaler, which is not evaluated with it; leave it out")


def examine_upscaler(folder: Path, out: Path, pictures: CaptionedPictures, arguments: argparse.Namespace) -> None:
    """Measure an upscaler against resampling, and print a table."""
    from ldm.evaluation.upscaling import FILE, SHEET, evaluate_upscaler, table
    from ldm.pipelines.text_to_image import LDMPipeline
    from ldm.pipelines.upscale import LDMUpscalePipeline
    from ldm.system.devices import best_device

    pipeline = LDMUpscalePipeline.from_pretrained(folder).to(best_device())
    base = None if arguments.base is None else LDMPipeline.from_pretrained(arguments.base).to_best_device()
    if base is not None and base.edge("height") != pipeline.tile:
        raise ValueError(f"--base: {arguments.base} makes {base.edge('height')} px, {folder} upscales {pipeline.tile}")
    extractors = extractors_of(arguments, pictures, pipeline.tile * pipeline.factor, pipeline.device)
    most = min(arguments.pictures or 16, 16) if arguments.quick else arguments.pictures
    report = evaluate_upscaler(
        pipeline, pictures, extractors, out, most=most, base=base, batch_size=arguments.batch_size, seed=arguments.seed
    )
    print(f"\n{table(report)}\nall metrics: {out / FILE}\npictures: {out / SHEET}")


def read_data(arguments: argparse.Namespace, config: dict[str, Any] | None) -> CaptionedPictures:
    """The captioned pictures, with the run's settings except for those on the command line."""
    from ldm.data.dataset import read_captioned
    from ldm.training.config import DataConfig

    known = config["data"] if config else {}
    source = arguments.data or known.get("source")
    if source is None:
        raise ValueError("data: no run defines the data set; name the pictures with --data")
    reading = DataConfig(**known).reading() if known else {}
    typed = {name: getattr(arguments, name) for name in ("image_column", "caption_columns", "holdout")}
    return read_captioned(source, **{**reading, **{key: value for key, value in typed.items() if value is not None}})


def net_folder(arguments: argparse.Namespace, pictures: CaptionedPictures) -> Path:
    """Where the in-domain CLIP of these pictures is, or is to be."""
    return arguments.net or Path("nets") / re.sub(r"[^\w.-]+", "-", Path(pictures.source).name)


def load_extractors(
    arguments: argparse.Namespace, pictures: CaptionedPictures, model: EvaluatedModel
) -> list[FeatureExtractor]:
    """Those of a model's pictures, on its device."""
    return extractors_of(arguments, pictures, model.size, model.device)


def extractors_of(
    arguments: argparse.Namespace, pictures: CaptionedPictures, size: int, device: Any
) -> list[FeatureExtractor]:
    """Pixels, the networks that were named, and the in-domain CLIP if there is one; a missing one is reported."""
    from ldm.evaluation.features import load_extractor, pixel_extractor
    from ldm.evaluation.in_domain_clip import load_clip, read_card

    net = net_folder(arguments, pictures)
    extractors = [pixel_extractor(size)]
    extractors += [load_extractor(spec, size, device) for spec in arguments.features]
    if read_card(net) is not None:
        extractors.append(load_clip(net, pictures, size, device))
    if len(extractors) == 1:
        print(
            f"no in-domain CLIP in {net} (train it with `ldm evaluate --data {pictures.source} --fit-net`) and no "
            "--features: FID and the other distribution metrics are left out, the rest is measured in pixels"
        )
    return extractors


def fit(pictures: CaptionedPictures, net: Path, arguments: argparse.Namespace, device: Any) -> None:
    """Train the in-domain CLIP and print its recall on held-out pictures."""
    from ldm.evaluation.in_domain_clip import InDomainClipConfig
    from ldm.evaluation.in_domain_clip_training import EPOCHS, train_clip
    from ldm.evaluation.report.text import recall_text

    config = InDomainClipConfig(text_encoder=arguments.net_text)
    epochs = EPOCHS if arguments.net_epochs is None else arguments.net_epochs
    card = train_clip(pictures, net, device, config=config, epochs=epochs)
    print(
        f"in-domain CLIP trained on {card['n']} pictures in {card['seconds']} s; recall, {card['recall_on']} captions:"
    )
    for direction, found in card["recall"].items():
        chance = found["chance"]
        print(f"  {direction}: {recall_text(found)}; chance {chance['top1']:.1%}, {chance['top5']:.1%}")
    print(f"saved in {net}")


def bound_likelihood(folder: Path, out: Path, pictures: CaptionedPictures, arguments: argparse.Namespace) -> None:
    """Bound the likelihood of the held-out latents, and print the bound by t."""
    from ldm.evaluation.metrics.nll import nll_of_pipeline
    from ldm.evaluation.report.page import FILE, write_report
    from ldm.models.fingerprint import model_sha256
    from ldm.pipelines.text_to_image import LDMPipeline

    if not len(pictures.heldout):
        raise ValueError(f"--data: {pictures.source} has no held-out pictures; set --holdout as it was in training")
    pipeline = LDMPipeline.from_pretrained(folder).to_best_device()
    load_loras(pipeline, arguments.lora)
    found = nll_of_pipeline(pipeline, pictures.heldout, most_strata=arguments.strata, seed=arguments.seed)
    out.mkdir(parents=True, exist_ok=True)
    record = {"model": model_sha256(pipeline), **found.to_dict()}
    (out / "nll.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    print(f"{found.table()}\nsaved in {out / 'nll.json'}")
    if (out / FILE).exists():
        print(f"and in {write_report(out)}")


def try_ema_widths(folder: Path, out: Path, pictures: CaptionedPictures, arguments: argparse.Namespace) -> None:
    """Try averages of several widths, print a table, and how to export the best."""
    from ldm.cli.find import run_of
    from ldm.evaluation.ema_width import CHART, FILE, table, try_widths, widths_between
    from ldm.evaluation.evaluated_model import EvaluatedModel
    from ldm.models.ema_snapshots import put_into, rebuild
    from ldm.pipelines.text_to_image import LDMPipeline

    if arguments.ema_count < 1:
        raise ValueError(f"--ema-count: expected at least 1, got {arguments.ema_count}")
    run = run_of(folder)[0] or folder
    pipeline = LDMPipeline.from_pretrained(folder).to_best_device()

    def load(width: float) -> tuple[EvaluatedModel, float]:
        rebuilt = rebuild(run, width)
        put_into(pipeline.unet, rebuilt)
        return EvaluatedModel(pipeline, folder), rebuilt.left

    report = try_widths(
        load,
        widths_between(arguments.ema[0], arguments.ema[1], arguments.ema_count),
        pictures,
        lambda model: load_extractors(arguments, pictures, model),
        sampling_settings(pipeline, arguments),
        out,
        most=16 if arguments.quick and arguments.pictures is None else arguments.pictures,
        batch_size=arguments.batch_size,
    )
    print(f"\n{table(report)}\nsaved in {out / FILE} and {out / CHART}")
    print(f"export the best with: ldm export {run} FOLDER --ema {report['best']:g}")


def sampling_settings(pipeline: Any, arguments: argparse.Namespace) -> SamplingSettings:
    """Of the pictures: what the command names, the pipeline's defaults where it names nothing."""
    from ldm.evaluation.evaluated_model import SamplingSettings

    used = pipeline.defaults.resolve(arguments.steps, arguments.guidance_scale, arguments.guidance_interval)
    return SamplingSettings(used.num_inference_steps, used.guidance_scale, arguments.seed, used.guidance_interval)


def examine(folder: Path, out: Path, pictures: CaptionedPictures, arguments: argparse.Namespace) -> None:
    """Evaluate the model and print a summary."""
    from ldm.evaluation.evaluate import QUICK, Plan, evaluate
    from ldm.evaluation.evaluated_model import EvaluatedModel
    from ldm.evaluation.report.page import FILE, PAGE
    from ldm.evaluation.report.text import summary
    from ldm.pipelines.text_to_image import LDMPipeline

    pipeline = LDMPipeline.from_pretrained(folder).to_best_device()
    load_loras(pipeline, arguments.lora, arguments.steps)
    model = EvaluatedModel(pipeline, folder)
    extractors = load_extractors(arguments, pictures, model)
    settings = sampling_settings(pipeline, arguments)
    typed: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "heldout_pictures": (arguments.pictures, int),
        "train_pictures": (arguments.train_pictures, int),
        "seeds": (arguments.seeds, int),
        "sweep_pictures": (arguments.sweep_pictures, int),
        "sweep_guidance": (arguments.sweep_guidance, tuple),
        "sweep_steps": (arguments.sweep_steps, tuple),
        "sweep_intervals": (arguments.sweep_intervals, tuple),
    }
    chosen = {name: kind(value) for name, (value, kind) in typed.items() if value is not None}
    plan = dataclasses.replace(
        QUICK if arguments.quick else Plan(), batch_size=arguments.batch_size, sweep=arguments.sweep, **chosen
    )
    report = evaluate(model, pictures, extractors, settings, out, plan, command=arguments.command)
    page = out / PAGE
    if arguments.report:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)
        page = shutil.copyfile(page, arguments.report)
    print(f"\n{summary(report)}\nall metrics: {out / FILE}\nreport: {page}")
    if arguments.write_defaults:
        dataclasses.replace(pipeline.defaults, **report["sweep"]["best"]).save(folder)
        print(f"the best setting is now the default of {folder}")


COMMAND = Command(
    "measure a model: validation loss, metrics, report, best settings",
    """
ldm evaluate --data data/openmoji --fit-net          (train the data set's own feature extractor, once)
ldm evaluate runs/demo                               (all metrics, in runs/demo/evaluation/report.html)
ldm evaluate runs/upscale --base models/emoji        (an upscaler: PSNR and KID against resampling)
ldm evaluate runs/demo --quick                       (a first look)
ldm evaluate runs/demo --nll                         (a bound on the likelihood of held-out latents, by timestep)
ldm evaluate runs/demo --ema 0.02:0.2                (which width of the average? needs optim.ema_widths)
ldm evaluate runs/demo --sweep --write-defaults      (and the guidance scale and steps that suit the model)""",
    add_arguments,
    run,
    "[OPTION ...] RUN_OR_MODEL",
)
