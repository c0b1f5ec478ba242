"""The sections of an evaluation: each measures one property of a model and returns its part of evaluation.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.evaluation.evaluated_model import EvaluatedModel, SamplingSettings
from ldm.evaluation.evaluation_set import EvaluationSet, PromptSet
from ldm.evaluation.features import BATCH, FeatureExtractor, extract_features, in_batches, read_pixels
from ldm.evaluation.metrics.distribution import with_baseline
from ldm.evaluation.metrics.intervals import mean_estimate
from ldm.evaluation.metrics.memorization import memorization, nearest
from ldm.evaluation.metrics.retrieval import (
    caption_matches,
    distances,
    ranks,
    recall_among,
    recall_at_k,
    relatives_estimate,
)
from ldm.evaluation.metrics.seeds import seed_metrics
from ldm.evaluation.validation import CaptionedValidationSet, ValidationSet, caption_losses, derangement, squared_errors
from ldm.models.conditioning import Conditioning
from ldm.models.vae import decode, psnr, to_pictures

Vectors = dict[str, Tensor]  # by feature extractor


def validation(
    model: EvaluatedModel, data: EvaluationSet, prompts: PromptSet, seed: int, resamples: int
) -> dict[str, Any]:
    """The validation loss at fixed (picture, t, eps), and its gaps to shuffled and null captions."""
    rng = torch.Generator().manual_seed(seed)
    true = validation_set(model, data, prompts, rng)
    captions = [data.captions[number] for number in prompts.numbers]
    captioned = CaptionedValidationSet.of(true, captions, model.null_context, rng)
    with torch.no_grad():
        losses = caption_losses(model.network, model.schedule, model.prediction, captioned)
    return {
        "on": prompts.name,
        "n": len(prompts),
        "seed": seed,
        "losses": losses.losses(),
        "gaps": losses.gap_estimates(resamples),
    }


def validation_set(
    model: EvaluatedModel, data: EvaluationSet, prompts: PromptSet, rng: torch.Generator
) -> ValidationSet:
    """The prompts' real pictures at fixed (t, eps), each with its caption."""
    x0 = torch.cat([model.latents(data.pixels(part)) for part in in_batches(prompts.numbers)])
    context = torch.cat([model.text.encode(part) for part in in_batches(prompts.captions)])
    return ValidationSet.fixed(x0, Conditioning(context), model.schedule.T, rng)


@torch.no_grad()
def prompt_losses(model: EvaluatedModel, data: EvaluationSet, prompts: PromptSet, seed: int) -> Tensor:
    """The validation loss of each prompt's real picture with its caption, the mean over t, [N]."""
    fixed = validation_set(model, data, prompts, torch.Generator().manual_seed(seed))
    return squared_errors(model.network, model.schedule, model.prediction, fixed).mean(0).cpu()


def retrieval(
    extractors: Sequence[FeatureExtractor], data: EvaluationSet, real: Vectors, generated: Vectors, prompts: PromptSet
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Recall with each extractor, and the rank of every picture; each kind of prompt also separately."""
    matches = caption_matches(prompts.captions, data.captions)
    concepts = [[concept] if concept else [] for concept in data.concepts]  # a picture without one has no relatives
    related = caption_matches([data.concepts[number] for number in prompts.numbers], concepts)
    recall, rank_of = {}, {}
    for extractor in extractors:
        name = extractor.name
        found: list[tuple[Tensor, ...]] = []
        batches = zip(generated[name].split(BATCH), matches.split(BATCH), related.split(BATCH), strict=True)
        for part, right, relatives in batches:
            distance = distances(part, real[name], extractor.metric)
            found.append((ranks(distance, right), *recall_among(distance, right, relatives)))
        rank, hit, chance = (torch.cat(parts) for parts in zip(*found, strict=True))
        rank_of[name] = rank
        recall[name] = recall_at_k(rank, len(data.captions)) | relatives_estimate(hit, chance)
        kinds = sorted(set(prompts.kinds))
        for kind in kinds if kinds != ["others"] else ():
            some = torch.tensor([each == kind for each in prompts.kinds])
            recall[name][kind] = recall_at_k(rank[some], len(data.captions)) | relatives_estimate(
                hit[some], chance[some]
            )
    return recall, rank_of


def several_seeds(
    model: EvaluatedModel,
    extractors: Sequence[FeatureExtractor],
    data: EvaluationSet,
    real: Vectors,
    prompts: PromptSet,
    settings: SamplingSettings,
    seeds: int,
    out: Path,
    batch_size: int,
    resamples: int,
) -> dict[str, Any]:
    """Recall, reliability and coverage over several seeds of each prompt, by extractor."""
    paths = model.generate_all(prompts.repeated(seeds), settings, out, batch_size)
    vectors = extract_features(extractors, map(read_pixels, in_batches(paths)))
    matches = caption_matches(prompts.captions, data.captions)
    groups = [data.groups[number] for number in prompts.numbers]
    found: dict[str, Any] = {
        "on": prompts.name,
        "captions": list(prompts.captions),
        "pictures": [path.relative_to(out).as_posix() for path in paths],
    }
    for extractor in extractors:
        mine = vectors[extractor.name].unflatten(0, (len(prompts), seeds))
        found[extractor.name] = seed_metrics(mine, real[extractor.name], matches, groups, extractor.metric, resamples)
    return found


def distribution(
    extractors: Sequence[FeatureExtractor],
    data: EvaluationSet,
    real: Vectors,
    generated: Vectors,
    prompts: PromptSet,
    resamples: int,
    fid_resamples: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Generated pictures against training pictures of other captions; the baseline: the real ones in their place."""
    reference = data.reference([prompts])
    if min(len(reference), len(prompts)) < 3:
        return {}
    found = {}
    for extractor in extractors:
        log(f"generated and real pictures against {len(reference)} others, {extractor.name} features")
        vectors = real[extractor.name]
        same, others = vectors[list(prompts.numbers)], vectors[reference]
        metrics = with_baseline(generated[extractor.name], same, others, resamples, fid_resamples)
        found[extractor.name] = {"on": prompts.name, **metrics}
    return found


def copies(
    extractors: Sequence[FeatureExtractor], data: EvaluationSet, real: Vectors, generated: dict[str, Vectors]
) -> tuple[dict[str, Any], dict[str, dict[str, tuple[Tensor, Tensor]]]]:
    """The memorization verdict, and the nearest training picture of each generated one.

    Args:
        generated: by prompt set.
    Returns:
        extractor => prompt set => verdict, empty without held-out pictures to compare with; and
        extractor => prompt set => (distances, indices in the data set).
    """
    heldout = list(data.prompts("heldout", None).numbers)
    verdicts: dict[str, Any] = {}
    neighbors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for extractor in extractors:
        training = real[extractor.name][data.training]
        found = neighbors[extractor.name] = {}
        for name, vectors in generated.items():
            distance, index = nearest(vectors[extractor.name], training, extractor.metric)
            found[name] = distance, data.training[index]
        if heldout:
            expected, _ = nearest(real[extractor.name][heldout], training, extractor.metric)
            verdicts[extractor.name] = {name: memorization(found[name][0], expected) for name in generated}
    return verdicts, neighbors


def reconstruction(
    model: EvaluatedModel,
    extractors: Sequence[FeatureExtractor],
    data: EvaluationSet,
    prompts: PromptSet,
    out: Path,
) -> tuple[Tensor, Vectors]:
    """PSNR [N] in dB of the VAE's reconstructions of real pictures, and the reconstructions' feature vectors.

    The reconstructions are written to out/reconstructed/<number>.png.
    """
    values: list[Tensor] = []
    vectors: dict[str, list[Tensor]] = {extractor.name: [] for extractor in extractors}
    (out / "reconstructed").mkdir(parents=True, exist_ok=True)
    for part in in_batches(prompts.numbers):
        pixels = data.pixels(part)
        with torch.no_grad():
            reconstructed = decode(model.pipeline.vae, model.latents(pixels)).cpu()
        values.append(psnr(reconstructed, pixels))
        for number, picture in zip(part, to_pictures(reconstructed), strict=True):
            picture.save(out / reconstruction_path(number))
        for extractor in extractors:
            vectors[extractor.name].append(extractor.embed(reconstructed).float())
    return torch.cat(values), {name: torch.cat(some) for name, some in vectors.items()}


def reconstruction_path(number: int) -> str:
    """The file of the reconstruction of the real picture at this index, relative to out."""
    return f"reconstructed/{number:06d}.png"


def clip_score(
    extractors: Sequence[FeatureExtractor],
    data: EvaluationSet,
    generated: Sequence[Path],
    prompts: PromptSet,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """CLIP score: 100 x the cosine of picture and caption, at least 0 (Hessel et al. 2021, without their factor 2.5).

    For comparison: the real pictures with the same captions, and the generated ones with shuffled captions. Extractors
    without a text tower are left out.

    Args:
        generated: picture files.
    """
    found = {}
    order = derangement([data.captions[i] for i in prompts.numbers], torch.Generator().manual_seed(seed))
    for extractor in extractors:
        if extractor.embed_pair is None or extractor.embed_captions is None:
            continue
        captions, pictures = caption_vectors(extractor, prompts), pair_vectors(extractor, generated)
        real = torch.cat([extractor.embed_pair(data.pixels(part)) for part in in_batches(prompts.numbers)])

        def score(pictures: Tensor, captions: Tensor) -> dict[str, Any]:
            cosines = torch.nn.functional.cosine_similarity(pictures, captions, dim=1)
            return mean_estimate(100 * cosines.clamp(min=0), resamples)

        found[extractor.name] = {
            "drawn": score(pictures, captions),
            "real": score(real, captions),
            "shuffled": None if order is None else score(pictures, captions[order]),
        }
    return found


def caption_cosines(extractor: FeatureExtractor, generated: Sequence[Path], prompts: PromptSet) -> Tensor:
    """100 x the cosine of each generated picture and its caption, at least 0, [N]; the extractor has a text tower."""
    captions, pictures = caption_vectors(extractor, prompts), pair_vectors(extractor, generated)
    return 100 * torch.nn.functional.cosine_similarity(pictures, captions, dim=1).clamp(min=0).cpu()


def caption_vectors(extractor: FeatureExtractor, prompts: PromptSet) -> Tensor:
    assert extractor.embed_captions is not None
    return torch.cat([extractor.embed_captions(part) for part in in_batches(prompts.captions)])


def pair_vectors(extractor: FeatureExtractor, generated: Sequence[Path]) -> Tensor:
    assert extractor.embed_pair is not None
    return torch.cat([extractor.embed_pair(read_pixels(part)) for part in in_batches(generated)])
