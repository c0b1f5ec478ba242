"""Two models, or two settings of one, on the same captions and the same noise: `compare` writes OUT/comparison.json and
OUT/comparison.html.

Picture i of both has the same caption and seed, so differences are paired: each metric is a pair of values a prompt.
For each there is the mean difference with a bootstrap interval, and the p-value of a test that flips signs. KID has no
value a prompt; its difference is resampled with the same prompts for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.dataset import CaptionedPictures
from ldm.evaluation import sections
from ldm.evaluation.evaluate import SEED, describe_data, describe_model, require_packages, write
from ldm.evaluation.evaluated_model import EvaluatedModel, SamplingSettings
from ldm.evaluation.evaluation_set import EvaluationSet, PromptSet
from ldm.evaluation.features import BATCH, FeatureExtractor, extract_features, in_batches, read_pixels
from ldm.evaluation.metrics.distribution import kid_difference
from ldm.evaluation.metrics.intervals import RESAMPLES, paired_estimate
from ldm.evaluation.metrics.retrieval import distances
from ldm.evaluation.provenance import machine
from ldm.evaluation.report.comparison import FILE, write_comparison
from ldm.evaluation.report.text import SPLITS


def compare(
    models: Sequence[EvaluatedModel],
    pictures: CaptionedPictures,
    extractors: Sequence[FeatureExtractor],
    settings: Sequence[SamplingSettings],
    out: Path,
    *,
    most: dict[str, int | None],
    batch_size: int = 16,
    resamples: int = RESAMPLES,
    log: Callable[[str], None] = print,
    command: str | None = None,
) -> dict[str, Any]:
    """Compare two models and write OUT/comparison.json and OUT/comparison.html.

    Args:
        models: A and B; the same object twice compares two settings of one model.
        pictures: the whole data set, training and held-out pictures.
        extractors: pixels first, then networks; the last one is the report's main one.
        settings: of each; the seeds must be the same.
        most: prompt set, "train" or "heldout" => captions to generate at most, spread evenly; None is all.
    Returns:
        The content of comparison.json.
    Raises:
        ValueError: if the models make pictures of different sizes, or the seeds differ.
        ModuleNotFoundError: without the packages of the extra "metrics".
    """
    require_packages()
    sizes = [model.size for model in models]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{models[1].folder} generates {sizes[1]} x {sizes[1]} pixels, {models[0].folder} {sizes[0]} x {sizes[0]}; "
            "only models of one size can be compared"
        )
    if settings[0].seed != settings[1].seed:
        raise ValueError(f"seed: expected one for both, got {settings[0].seed} and {settings[1].seed}")
    started = time.perf_counter()
    data = EvaluationSet(pictures, sizes[0])
    sets = [data.prompts(split, count) for split, count in most.items()]
    sets = [prompts for prompts in sets if len(prompts)]
    if not sets:
        raise ValueError(
            f"{pictures.source}: no captions to compare on; --pictures or --train-pictures must be above 0"
        )
    for split in most.keys() - {prompts.name for prompts in sets}:
        log(f"no {SPLITS[split]}: the comparison is without them")
    real = data.features(extractors, out / "features")
    report: dict[str, Any] = {
        "command": command,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(models[0].device),
        "models": [
            {**describe_model(model), "settings": asdict(each), "evaluations": model.unet_evaluations(each)}
            for model, each in zip(models, settings, strict=True)
        ],
        "data": describe_data(data),
        "spaces": [extractor.describe() for extractor in extractors],
        "sets": {},
    }
    for prompts in sets:
        paths = [
            model.generate_all(prompts, each, out, batch_size) for model, each in zip(models, settings, strict=True)
        ]
        log(f"comparing {len(prompts)} {prompts.name} prompts")
        values, ranks, kid = measure(models, data, extractors, real, prompts, paths, resamples)
        tests = {name: paired_estimate(*pair, resamples) for name, pair in values.items()} | kid
        kinds = sorted(set(prompts.kinds))
        report["sets"][prompts.name] = {
            "n": len(prompts),
            "tests": tests,
            "kinds": {kind: tests_of(kind, prompts, values, resamples) for kind in (kinds if len(kinds) > 1 else ())},
            "pictures": [
                {
                    "caption": prompts.captions[i],
                    "kind": prompts.kinds[i],
                    "seed": settings[0].seed + i,
                    "real": data.save(number, out),
                    "generated": [side[i].relative_to(out).as_posix() for side in paths],
                    "rank": [int(side[i]) for side in ranks],
                    "values": {name: [float(side[i]) for side in pair] for name, pair in values.items()},
                }
                for i, number in enumerate(prompts.numbers)
            ],
        }
    report["seconds"] = round(time.perf_counter() - started, 1)
    write(report, out / FILE)
    write_comparison(out)
    return report


def measure(
    models: Sequence[EvaluatedModel],
    data: EvaluationSet,
    extractors: Sequence[FeatureExtractor],
    real: dict[str, Tensor],
    prompts: PromptSet,
    paths: Sequence[Sequence[Path]],
    resamples: int,
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[Tensor, Tensor], dict[str, Any]]:
    """Everything that is measured of one prompt set.

    Returns:
        metric => values [N] of A and of B; the ranks [N] by the main extractor; and the difference in KID by extractor.
    """
    generated = [extract_features(extractors, map(read_pixels, in_batches(some))) for some in paths]
    rank_of = [sections.retrieval(extractors, data, real, vectors, prompts)[1] for vectors in generated]
    values: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, sides: Iterable[Tensor]) -> None:
        a, b = (side.double().cpu() for side in sides)
        values[name] = a, b

    for extractor in extractors:
        name, truth = extractor.name, real[extractor.name][list(prompts.numbers)]
        add(f"top-1 retrieval, {name}", [side[name] <= 1 for side in rank_of])
        add(f"top-5 retrieval, {name}", [side[name] <= 5 for side in rank_of])
        distance = [paired_distances(side[name], truth, extractor) for side in generated]
        add(f"distance to the real picture, {name}", distance)
        if extractor.embed_captions is not None:
            add(f"CLIP score, {name}", [sections.caption_cosines(extractor, some, prompts) for some in paths])
    if same_vae(models):
        add("validation loss", [sections.prompt_losses(model, data, prompts, SEED) for model in models])
    networks = [extractor for extractor in extractors if extractor.sha256 is not None]
    reference = data.reference([prompts])
    kid = {}
    if min(len(reference), len(prompts)) >= 3:
        for extractor in networks:
            a, b = (side[extractor.name] for side in generated)
            kid[f"KID, {extractor.name}"] = kid_difference(a, b, real[extractor.name][reference], resamples)
    main = extractors[-1].name
    return values, (rank_of[0][main], rank_of[1][main]), kid


def paired_distances(generated: Tensor, truth: Tensor, extractor: FeatureExtractor) -> Tensor:
    """The distance of each generated picture [N,D] to its own real one [N,D], as the extractor measures it: [N]."""
    parts = zip(generated.split(BATCH), truth.split(BATCH), strict=True)
    return torch.cat([distances(ours, theirs, extractor.metric).diagonal() for ours, theirs in parts])


def tests_of(kind: str, prompts: PromptSet, values: dict[str, tuple[Tensor, Tensor]], resamples: int) -> dict[str, Any]:
    """The paired tests of the prompts of one kind."""
    chosen = torch.tensor([each == kind for each in prompts.kinds])
    return {name: paired_estimate(a[chosen], b[chosen], resamples) for name, (a, b) in values.items()}


def same_vae(models: Sequence[EvaluatedModel]) -> bool:
    """Whether both denoise the same latents; else their losses can't be compared."""
    a, b = (model.pipeline.vae.state_dict() for model in models)
    scale = {model.pipeline.vae.config.scaling_factor for model in models}
    return len(scale) == 1 and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
