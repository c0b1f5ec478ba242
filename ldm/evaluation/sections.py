"""The sections of an evaluation: each asks one thing of a model and answers with what the JSON says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.evaluation.features import BATCH, Space, pixels_of
from ldm.evaluation.gallery import Asked, Gallery
from ldm.evaluation.heldout import HeldOut
from ldm.evaluation.metrics.distribution import with_floor
from ldm.evaluation.metrics.intervals import mean_figure
from ldm.evaluation.metrics.memorization import memorization, nearest
from ldm.evaluation.metrics.retrieval import distances, ranks, recall, same_caption
from ldm.evaluation.subject import Subject
from ldm.evaluation.text_use import TextQuestions, derangement, measure_text_use
from ldm.models.conditioning import Conditioning
from ldm.models.vae import decode, psnr, to_pictures

Vectors = dict[str, Tensor]  # by space


def reading(subject: Subject, gallery: Gallery, asked: Asked, seed: int, resamples: int) -> dict[str, Any]:
    """The held-out loss and how much of it the caption explains, at fixed (picture, t, eps)."""
    rng = torch.Generator().manual_seed(seed)
    x0 = torch.cat([subject.latents(gallery.pixels(part)) for part in parts(asked.numbers)])
    context = torch.cat([subject.text.encode(part) for part in parts(asked.captions)])
    true = HeldOut.fixed(x0, Conditioning(context), subject.schedule.T, rng)
    captions = [gallery.captions[number] for number in asked.numbers]
    questions = TextQuestions.of(true, captions, subject.null_context, rng)
    with torch.no_grad():
        use = measure_text_use(subject.network, subject.schedule, subject.prediction, questions)
    return {"on": asked.name, "n": len(asked), "seed": seed, "losses": use.losses(), "gaps": use.figures(resamples)}


def retrieval(
    spaces: Sequence[Space], gallery: Gallery, real: Vectors, drawn: Vectors, asked: Asked
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Recall of each space, and the rank of every picture; new compositions also by themselves."""
    answers = same_caption(asked.captions, gallery.captions)
    told, rank_of = {}, {}
    for space in spaces:
        rank = torch.cat([
            ranks(distances(some, real[space.name], space.metric), right)
            for some, right in zip(drawn[space.name].split(BATCH), answers.split(BATCH), strict=True)
        ])  # fmt: skip
        rank_of[space.name] = rank
        told[space.name] = recall(rank, len(gallery.captions))
        composed = torch.tensor(asked.compositions)
        if composed.any():
            told[space.name]["compositions"] = recall(rank[composed], len(gallery.captions))
        if composed.any() and not composed.all():
            told[space.name]["others"] = recall(rank[~composed], len(gallery.captions))
    return told, rank_of


def distribution(
    spaces: Sequence[Space],
    gallery: Gallery,
    real: Vectors,
    drawn: Vectors,
    asked: Asked,
    resamples: int,
    fid_resamples: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Drawn pictures against training pictures that aren't asked for; the floor: the real ones in their place."""
    reference = gallery.others([asked])
    if min(len(reference), len(asked)) < 3:
        return {}
    told = {}
    for space in spaces:
        say(f"drawn and real pictures against {len(reference)} others, in {space.name}")
        vectors = real[space.name]
        same, others = vectors[list(asked.numbers)], vectors[reference]
        figures = with_floor(drawn[space.name], same, others, resamples, fid_resamples)
        told[space.name] = {"on": asked.name, **figures}
    return told


def copies(
    spaces: Sequence[Space], gallery: Gallery, real: Vectors, drawn: dict[str, Vectors]
) -> tuple[dict[str, Any], dict[str, dict[str, tuple[Tensor, Tensor]]]]:
    """Each space's verdict on each set of drawn pictures, and the nearest training picture of each of them.

    Returns:
        space => set => verdict, empty without held-out pictures to compare with; and
        space => set => (distances, places in the data set).
    """
    heldout = list(gallery.ask("heldout", None).numbers)
    told: dict[str, Any] = {}
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for space in spaces:
        training = real[space.name][gallery.training]
        found[space.name] = {}
        for name, vectors in drawn.items():
            distance, number = nearest(vectors[space.name], training, space.metric)
            found[space.name][name] = distance, gallery.training[number]
        if heldout:
            expected, _ = nearest(real[space.name][heldout], training, space.metric)
            told[space.name] = {name: memorization(found[space.name][name][0], expected) for name in drawn}
    return told, found


def reconstruction(
    subject: Subject, spaces: Sequence[Space], gallery: Gallery, asked: Asked, out: Path
) -> tuple[Tensor, Vectors]:
    """PSNR [N] in dB of real pictures through the autoencoder and back, and the vectors of what comes back.

    What comes back is kept, as out/reconstructed/<number>.png.
    """
    values: list[Tensor] = []
    vectors: dict[str, list[Tensor]] = {space.name: [] for space in spaces}
    (out / "reconstructed").mkdir(parents=True, exist_ok=True)
    for part in parts(asked.numbers):
        pixels = gallery.pixels(part)
        with torch.no_grad():
            back = decode(subject.pipeline.vae, subject.latents(pixels)).cpu()
        values.append(psnr(back, pixels))
        for number, picture in zip(part, to_pictures(back), strict=True):
            picture.save(out / reconstructed(number))
        for space in spaces:
            vectors[space.name].append(space.embed(back).float())
    return torch.cat(values), {name: torch.cat(some) for name, some in vectors.items()}


def reconstructed(number: int) -> str:
    """Where the reconstruction of the real picture at this place is kept, relative to out."""
    return f"reconstructed/{number:06d}.png"


def text_fit(
    spaces: Sequence[Space], gallery: Gallery, drawn: Sequence[Path], asked: Asked, resamples: int, seed: int
) -> dict[str, Any]:
    """CLIP score: 100 x the cosine of picture and caption, not below 0 (Hessel et al. 2021, without their factor 2.5).

    Beside it the real pictures of the captions, and the drawn ones with captions of others. Spaces without a text
    tower are left out.

    Args:
        drawn: picture files.
    """
    told = {}
    order = derangement([gallery.captions[i] for i in asked.numbers], torch.Generator().manual_seed(seed))
    for space in spaces:
        if space.embed_pair is None or space.embed_captions is None:
            continue
        captions = torch.cat([space.embed_captions(part) for part in parts(asked.captions)])
        seen = torch.cat([space.embed_pair(pixels_of(part)) for part in parts(drawn)])
        real = torch.cat([space.embed_pair(gallery.pixels(part)) for part in parts(asked.numbers)])

        def score(pictures: Tensor, words: Tensor) -> dict[str, Any]:
            cosines = torch.nn.functional.cosine_similarity(pictures, words, dim=1)
            return mean_figure(100 * cosines.clamp(min=0), resamples)

        told[space.name] = {
            "drawn": score(seen, captions),
            "real": score(real, captions),
            "shuffled": None if order is None else score(seen, captions[order]),
        }
    return told


def parts(items: Sequence[Any]) -> list[Any]:
    """The items in batches."""
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
