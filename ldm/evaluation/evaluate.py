"""All metrics of a model: `evaluate` writes OUT/evaluation.json and OUT/report.html.

    OUT/evaluation.json      all metrics; paths in it are relative to OUT
    OUT/report.html          the same as one page
    OUT/pictures/            generated pictures, reused by an identical request of the same model
    OUT/real/                real pictures that the report shows
    OUT/reconstructed/       the VAE's reconstructions of the evaluated real pictures
    OUT/features/            feature vectors of the real pictures, by feature extractor

There are two prompt sets, training and held-out captions, and one picture for every prompt.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.dataset import CaptionedPictures
from ldm.evaluation import sections
from ldm.evaluation.evaluated_model import EvaluatedModel, SamplingSettings, time_generation
from ldm.evaluation.evaluation_set import EvaluationSet, PromptSet, fingerprint
from ldm.evaluation.features import FeatureExtractor, extract_features, in_batches, read_pixels
from ldm.evaluation.metrics.distribution import kid_estimate
from ldm.evaluation.metrics.intervals import RESAMPLES, mean_estimate
from ldm.evaluation.provenance import machine
from ldm.evaluation.report.page import FILE, write_report
from ldm.evaluation.report.text import SPLITS, sweep_table
from ldm.evaluation.sweep import GUIDANCE, INTERVALS, STEPS, choose, sweep

SCHEMA = 2
SEED = 0  # of t, eps and the shuffled captions


@dataclass(frozen=True)
class Plan:
    """How thoroughly to evaluate.

    Attributes:
        train_pictures: training captions to generate, spread evenly.
        heldout_pictures: held-out captions to generate, spread evenly; None is all.
        batch_size: pictures generated at once.
        resamples, fid_resamples: of the bootstrap.
        timing: whether to measure the time of generation.
        seeds: pictures of each training prompt, to see whether they differ and whether all of them show it; 1 is off.
        sweep: whether to try the grid of guidance, steps and intervals, on up to `sweep_pictures` captions of each set.
    """

    train_pictures: int = 200
    heldout_pictures: int | None = None
    batch_size: int = 16
    resamples: int = RESAMPLES
    fid_resamples: int = 50
    timing: bool = True
    seeds: int = 1
    sweep: bool = False
    sweep_guidance: tuple[float, ...] = GUIDANCE
    sweep_steps: tuple[int, ...] = STEPS
    sweep_intervals: tuple[tuple[float, float], ...] = INTERVALS
    sweep_pictures: int = 64


#: A quick evaluation, for tests and for models in training.
QUICK = Plan(train_pictures=16, heldout_pictures=16, resamples=200, fid_resamples=10, timing=False, sweep_pictures=16)


def evaluate(
    model: EvaluatedModel,
    pictures: CaptionedPictures,
    extractors: Sequence[FeatureExtractor],
    settings: SamplingSettings,
    out: Path,
    plan: Plan | None = None,
    log: Callable[[str], None] = print,
    command: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model and write OUT/evaluation.json and OUT/report.html.

    Args:
        pictures: the whole data set, training and held-out pictures.
        extractors: pixels first, then networks; the last one is the report's main one.
        settings: of the generated pictures.
        command: the command line, for the report.
    Returns:
        The content of evaluation.json.
    Raises:
        ModuleNotFoundError: without the packages of the extra "metrics".
    """
    require_packages()
    plan = plan or Plan()
    started = time.perf_counter()
    data = EvaluationSet(pictures, model.size)
    sets = [data.prompts("train", plan.train_pictures), data.prompts("heldout", plan.heldout_pictures)]
    sets = [prompts for prompts in sets if len(prompts)]
    for split in {"train", "heldout"} - {prompts.name for prompts in sets}:
        log(f"no {SPLITS[split]}: the evaluation is without them")
    main = sets[-1]  # the held-out captions, or the training captions of a data set without them
    networks = [extractor for extractor in extractors if extractor.sha256 is not None]

    log("validation loss with true, shuffled and null captions")
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(model.device),
        "model": describe_model(model),
        "data": describe_data(data),
        "settings": {**asdict(settings), **asdict(plan)},
        "spaces": [extractor.describe() for extractor in extractors],
        "text_use": sections.validation(model, data, main, SEED, plan.resamples),
    }
    real = data.features(extractors, out / "features")
    paths = {prompts.name: model.generate_all(prompts, settings, out, plan.batch_size) for prompts in sets}
    generated = {name: extract_features(extractors, map(read_pixels, in_batches(some))) for name, some in paths.items()}

    ranks, psnrs, report["retrieval"], report["reconstruction"] = {}, {}, {}, {}
    for prompts in sets:
        log(f"retrieval of {len(prompts)} {prompts.name} prompts among {len(pictures)} real pictures")
        recall, ranks[prompts.name] = sections.retrieval(extractors, data, real, generated[prompts.name], prompts)
        values, reconstructed = sections.reconstruction(model, extractors, data, prompts, out)
        psnrs[prompts.name] = values.tolist()
        upper_bound, _ = sections.retrieval(extractors, data, real, reconstructed, prompts)
        report["retrieval"][prompts.name] = {"drawn": recall, "ceiling": upper_bound}
        report["reconstruction"][prompts.name] = {"psnr_db": mean_estimate(values, plan.resamples)}
    report["distribution"] = sections.distribution(
        networks, data, real, generated[main.name], main, plan.resamples, plan.fid_resamples, log
    )
    report["text_fit"] = {
        prompts.name: sections.clip_score(networks, data, paths[prompts.name], prompts, plan.resamples, SEED)
        for prompts in sets
    }
    report["memorization"], neighbors = sections.copies(extractors, data, real, generated)
    report["pictures"] = {
        prompts.name: [
            {
                "number": number,
                "caption": prompts.captions[i],
                "where": data.where[number],
                "kind": prompts.kinds[i],
                "seed": settings.seed + i,
                "drawn": paths[prompts.name][i].relative_to(out).as_posix(),
                "real": data.save(number, out),
                "reconstructed": sections.reconstruction_path(number),
                "psnr_db": psnrs[prompts.name][i],
                "rank": {name: int(rank[i]) for name, rank in ranks[prompts.name].items()},
                "nearest_training": {
                    name: describe_neighbor(data, found[prompts.name], i, out) for name, found in neighbors.items()
                },
            }
            for i, number in enumerate(prompts.numbers)
        ]
        for prompts in sets
    }
    if plan.seeds > 1:
        log(f"{plan.seeds} seeds of each {sets[0].name} prompt")
        report["seeds"] = sections.several_seeds(
            model, extractors, data, real, sets[0], settings, plan.seeds, out, plan.batch_size, plan.resamples
        )
    if plan.sweep:
        report["sweep"] = run_sweep(model, data, sets, extractors[-1], real, settings, plan, out, log)
    if plan.timing:
        log("timing: a fresh process, then 16 pictures")
        report["timing"] = time_generation(model, main.captions[0], settings)
    report["seconds"] = round(time.perf_counter() - started, 1)
    write(report, out / FILE)
    write_report(out)
    return report


def require_packages() -> None:
    """Raise a ModuleNotFoundError with the command that installs what is missing, before anything is computed."""
    for package in ("torchmetrics", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is missing; install it with: pip install 'ldm[metrics]'")


def run_sweep(
    model: EvaluatedModel,
    data: EvaluationSet,
    sets: Sequence[PromptSet],
    extractor: FeatureExtractor,
    real: dict[str, Tensor],
    settings: SamplingSettings,
    plan: Plan,
    out: Path,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """The grid with one extractor: retrieval of each prompt set, KID of all generated pictures."""
    subsets = [prompts.subset(plan.sweep_pictures) for prompts in sets]
    reference = real[extractor.name][data.reference(subsets)]
    only = {extractor.name: real[extractor.name]}

    def measure(tried: SamplingSettings) -> dict[str, Any]:
        recalls, found, generated = {}, {}, []
        for prompts in subsets:
            paths = model.generate_all(prompts, tried, out, plan.batch_size)
            vectors = extract_features([extractor], map(read_pixels, in_batches(paths)))
            recall, rank = sections.retrieval([extractor], data, only, vectors, prompts)
            recalls[prompts.name], found[prompts.name] = recall[extractor.name], (rank[extractor.name] <= 5).tolist()
            generated.append(vectors[extractor.name])
        kid = kid_estimate(torch.cat(generated), reference, plan.resamples)
        return {"evaluations": model.unet_evaluations(tried), "retrieval": recalls, "found": found, "kid": kid}

    rows = sweep(measure, plan.sweep_guidance, plan.sweep_steps, plan.sweep_intervals, settings.seed)
    names = [prompts.name for prompts in subsets]
    log(sweep_table(rows, names))
    return {
        "space": extractor.name,
        "n": {prompts.name: len(prompts) for prompts in subsets},
        "rows": rows,
        "best": choose(rows, names[::-1]),
        "chosen_on": names[-1],
    }


def describe_model(model: EvaluatedModel) -> dict[str, Any]:
    """The model's identity."""
    parts = {"unet": model.pipeline.unet, "vae": model.pipeline.vae, "text_encoder": model.pipeline.text_encoder}
    return {
        "folder": str(model.folder),
        "sha256": model.sha256,
        "size": model.size,
        "prediction": model.prediction,
        "timesteps": model.schedule.T,
        "parameters": {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()},
    }


def describe_data(data: EvaluationSet) -> dict[str, Any]:
    """The data set's identity and numbers of pictures."""
    heldout = data.prompts("heldout", None)
    return {
        "source": data.pictures.source,
        "sha256": fingerprint(data.pictures),
        "pictures": len(data.captions),
        "training": len(data.training),
        "heldout": len(heldout),
        "kinds": dict(Counter(heldout.kinds)),
    }


def describe_neighbor(data: EvaluationSet, found: tuple[Tensor, Tensor], i: int, out: Path) -> dict[str, Any]:
    """The training picture nearest to the i-th generated one, of (distances, indices)."""
    number = int(found[1][i])
    caption = data.captions[number][0]
    return {"number": number, "caption": caption, "distance": float(found[0][i]), "real": data.save(number, out)}


def write(report: dict[str, Any], path: Path) -> None:
    """Write the JSON file completely or not at all. Raises ValueError for a NaN, which JSON doesn't have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    unfinished.rename(path)
