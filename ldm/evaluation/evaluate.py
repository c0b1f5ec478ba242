"""All questions at once, and one JSON file with all answers: OUT/evaluation.json.

    OUT/evaluation.json      the answers; paths in it are relative to OUT
    OUT/report.html          the same to look at, in one file
    OUT/pictures/            what was drawn, kept and used again when the same is asked of the same model
    OUT/real/                the real pictures that it is shown beside
    OUT/reconstructed/       what the autoencoder makes of these
    OUT/features/            the vectors of the real pictures, by space
    OUT/sweep.png            retrieval and KID over guidance scale, steps and interval

Every picture is drawn once: for captions that were trained on, and for held-out ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.dataset import CaptionedPictures
from ldm.evaluation import examine
from ldm.evaluation.features import Space, embed_all, pixels_of
from ldm.evaluation.gallery import Asked, Gallery, fingerprint
from ldm.evaluation.machine import machine, timing
from ldm.evaluation.metrics.distribution import kid_figure, require_torchmetrics
from ldm.evaluation.metrics.intervals import RESAMPLES, mean_figure
from ldm.evaluation.report.page import FILE, write_report
from ldm.evaluation.settings import Settings
from ldm.evaluation.subject import Subject
from ldm.evaluation.sweep import GUIDANCE, INTERVALS, STEPS, choose, plot, sweep, table

SCHEMA = 1
SEED = 0  # of t, eps and the shuffled captions


@dataclass(frozen=True)
class Plan:
    """How thoroughly to look.

    Attributes:
        train_pictures: training captions drawn, spread evenly.
        heldout_pictures: held-out captions drawn, spread evenly; None is all.
        batch_size: pictures drawn at once.
        resamples, fid_resamples: of the bootstrap.
        timing: whether to measure how long drawing takes.
        sweep: whether to try the grid of guidance, steps and intervals, on up to `sweep_pictures` captions of each set.
    """

    train_pictures: int = 200
    heldout_pictures: int | None = None
    batch_size: int = 16
    resamples: int = RESAMPLES
    fid_resamples: int = 50
    timing: bool = True
    sweep: bool = False
    sweep_guidance: tuple[float, ...] = GUIDANCE
    sweep_steps: tuple[int, ...] = STEPS
    sweep_intervals: tuple[tuple[float, float], ...] = INTERVALS
    sweep_pictures: int = 64


#: A short look, for tests and for models that are still learning.
QUICK = Plan(train_pictures=16, heldout_pictures=16, resamples=200, fid_resamples=10, timing=False, sweep_pictures=16)


def evaluate(
    subject: Subject,
    pictures: CaptionedPictures,
    spaces: Sequence[Space],
    settings: Settings,
    out: Path,
    plan: Plan | None = None,
    say: Callable[[str], None] = print,
    command: str | None = None,
) -> dict[str, Any]:
    """Examine a model and write OUT/evaluation.json and OUT/report.html.

    Args:
        pictures: the whole data set, training and held-out pictures.
        spaces: the pixel space first, then the feature nets.
        settings: how it shall draw.
        command: what was typed, for whoever wants to do it again.
    Returns:
        What the file holds.
    Raises:
        ModuleNotFoundError: without torchmetrics.
    """
    require_torchmetrics()
    plan = plan or Plan()
    started = time.perf_counter()
    gallery = Gallery(pictures, subject.size)
    sets = [gallery.ask("train", plan.train_pictures), gallery.ask("heldout", plan.heldout_pictures)]
    sets = [asked for asked in sets if len(asked)]
    judged = sets[-1]  # the held-out captions, or the training captions of a data set without them
    nets = [space for space in spaces if space.sha256 is not None]

    say("the loss on fixed questions, with true, shuffled and null captions")
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(subject.device),
        "model": describe_model(subject),
        "data": describe_data(gallery),
        "settings": {**asdict(settings), **asdict(plan)},
        "spaces": [space.describe() for space in spaces],
        "text_use": examine.reading(subject, gallery, judged, SEED, plan.resamples),
    }
    real = gallery.vectors(spaces, out / "features")
    paths = {asked.name: subject.draw_all(asked, settings, out, plan.batch_size) for asked in sets}
    drawn = {name: embed_all(spaces, map(pixels_of, examine.parts(some))) for name, some in paths.items()}

    ranks, psnrs, report["retrieval"], report["reconstruction"] = {}, {}, {}, {}
    for asked in sets:
        say(f"retrieval of {len(asked)} {asked.name} captions among {len(pictures)} real pictures")
        told, ranks[asked.name] = examine.retrieval(spaces, gallery, real, drawn[asked.name], asked)
        values, back = examine.reconstruction(subject, spaces, gallery, asked, out)
        psnrs[asked.name] = values.tolist()
        ceiling, _ = examine.retrieval(spaces, gallery, real, back, asked)
        report["retrieval"][asked.name] = {"drawn": told, "ceiling": ceiling}
        report["reconstruction"][asked.name] = {"psnr_db": mean_figure(values, plan.resamples)}
    report["distribution"] = examine.distribution(
        nets, gallery, real, drawn[judged.name], judged, plan.resamples, plan.fid_resamples, say
    )
    report["text_fit"] = {
        asked.name: examine.text_fit(nets, gallery, paths[asked.name], asked, plan.resamples, SEED) for asked in sets
    }
    report["memorization"], neighbors = examine.copies(spaces, gallery, real, drawn)
    report["pictures"] = {
        asked.name: [
            {
                "number": number,
                "caption": asked.captions[i],
                "where": gallery.where[number],
                "composition": asked.compositions[i],
                "seed": settings.seed + i,
                "drawn": paths[asked.name][i].relative_to(out).as_posix(),
                "real": gallery.save(number, out),
                "reconstructed": examine.reconstructed(number),
                "psnr_db": psnrs[asked.name][i],
                "rank": {space.name: int(ranks[asked.name][space.name][i]) for space in spaces},
                "nearest_training": {
                    space.name: describe_neighbor(gallery, neighbors[space.name][asked.name], i, out)
                    for space in spaces
                },
            }
            for i, number in enumerate(asked.numbers)
        ]
        for asked in sets
    }
    if plan.sweep:
        report["sweep"] = run_sweep(subject, gallery, sets, spaces[-1], real, settings, plan, out, say)
    if plan.timing:
        say("timing: a fresh process, then 16 pictures")
        report["timing"] = timing(subject, judged.captions[0], settings)
    report["seconds"] = round(time.perf_counter() - started, 1)
    write(report, out / FILE)
    write_report(out)
    return report


def run_sweep(
    subject: Subject,
    gallery: Gallery,
    sets: Sequence[Asked],
    space: Space,
    real: dict[str, Tensor],
    settings: Settings,
    plan: Plan,
    out: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The grid, judged in one space: retrieval of each set, KID of all drawn pictures against the others."""
    few = [asked.some(plan.sweep_pictures) for asked in sets]
    reference = real[space.name][gallery.others(few)]
    only = {space.name: real[space.name]}

    def judge(tried: Settings) -> dict[str, Any]:
        recalls, found, drawn = {}, {}, []
        for asked in few:
            paths = subject.draw_all(asked, tried, out, plan.batch_size)
            vectors = embed_all([space], map(pixels_of, examine.parts(paths)))
            recall, rank = examine.retrieval([space], gallery, only, vectors, asked)
            recalls[asked.name], found[asked.name] = recall[space.name], (rank[space.name] <= 5).tolist()
            drawn.append(vectors[space.name])
        kid = kid_figure(torch.cat(drawn), reference, plan.resamples)
        return {"evaluations": subject.evaluations(tried), "retrieval": recalls, "found": found, "kid": kid}

    rows = sweep(judge, plan.sweep_guidance, plan.sweep_steps, plan.sweep_intervals, settings.seed)
    names = [asked.name for asked in few]
    say(table(rows, names))
    plot(rows, names[-1], out / "sweep.png")
    best = choose(rows, names[::-1])
    return {"space": space.name, "n": {asked.name: len(asked) for asked in few}, "rows": rows, "best": best,
            "chosen_on": names[-1], "plot": "sweep.png"}  # fmt: skip


def describe_model(subject: Subject) -> dict[str, Any]:
    """Which model this is."""
    parts = {"unet": subject.pipeline.unet, "vae": subject.pipeline.vae, "text_encoder": subject.pipeline.text_encoder}
    return {
        "folder": str(subject.folder),
        "sha256": subject.sha256,
        "size": subject.size,
        "prediction": subject.prediction,
        "timesteps": subject.schedule.T,
        "parameters": {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()},
    }


def describe_data(gallery: Gallery) -> dict[str, Any]:
    """Which data these are."""
    heldout = gallery.ask("heldout", None)
    return {
        "source": gallery.pictures.source,
        "sha256": fingerprint(gallery.pictures),
        "pictures": len(gallery.captions),
        "training": len(gallery.training),
        "heldout": len(heldout),
        "compositions": sum(heldout.compositions),
    }


def describe_neighbor(gallery: Gallery, found: tuple[Tensor, Tensor], i: int, out: Path) -> dict[str, Any]:
    """The training picture nearest to the i-th drawn one."""
    number = int(found[1][i])
    caption = gallery.captions[number][0]
    return {"number": number, "caption": caption, "distance": float(found[0][i]), "real": gallery.save(number, out)}


def write(report: dict[str, Any], path: Path) -> None:
    """Write the JSON file whole, or not at all. Raises ValueError for a NaN, which JSON doesn't know."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    unfinished.rename(path)
