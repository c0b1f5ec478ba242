"""What a card says in figures: all of an evaluation's for the Hub, the few that matter for people, and the limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ldm.evaluation.report.page import figure, share, signed

CALLED = {"train": "training captions", "heldout": "held-out captions"}
FEW = 100  # pictures, of which figures are rough


def figures(told: dict[str, Any], data: str) -> Iterator[Any]:
    """All figures of an evaluation that have an interval, as the Hub's model-index holds them."""
    from huggingface_hub import EvalResult

    nets = {space["name"]: space["sha256"] for space in told["spaces"]}

    def result(kind: str, name: str, split: str, found: dict[str, Any], **more: Any) -> Any:
        args = {"n": found["n"], "low": found["low"], "high": found["high"], **more}
        return EvalResult(
            task_type="text-to-image", dataset_type="captioned-pictures", dataset_name=data, dataset_split=split,
            metric_type=kind, metric_name=name, metric_value=found["value"], metric_args=args,
        )  # fmt: skip

    for split, retrieved in told["retrieval"].items():
        for who in ("drawn", "ceiling"):
            for space, found in retrieved[who].items():
                for part in ("", "compositions", "others"):
                    some = found.get(part) if part else found
                    for top in ("top1", "top5") if some else ():
                        words = f"Retrieval {top} in {space}, {who}{', ' + part if part else ''}"
                        chance = found["chance"][top]
                        judge = {"space": space, "space_sha256": nets[space]}
                        yield result(f"retrieval_{top}", words, split, some[top], chance=chance, **judge)
    for space, found in told["distribution"].items():
        for who in ("drawn", "floor"):
            for kind, one in found[who].items():
                name = f"{kind.upper() if kind in ('fid', 'kid') else kind.capitalize()} in {space}, {who}"
                reference = {"reference_n": found["reference_n"], "space": space, "space_sha256": nets[space]}
                yield result(kind, name, found["on"], one, **reference)
    for split, spaces in told["text_fit"].items():
        for space, found in spaces.items():
            for who, one in found.items():
                if one:
                    yield result("clip_score", f"CLIP score in {space}, {who}", split, one, space=space)
    for kind, gap in told["text_use"]["gaps"].items():
        for part, one in gap.items():
            yield result("text_gap", f"Loss more with {kind} captions, {part}", told["text_use"]["on"], one)
    for space, sets in told["memorization"].items():
        for split, found in sets.items():
            for who, one in found["near_copies"].items():
                name = f"Near-copies in {space}, {who}"
                yield result("near_copies", name, split, one, verdict=found["verdict"], space=space)
    for split, found in told["reconstruction"].items():
        yield result("psnr", "PSNR of reconstructions, dB", split, found["psnr_db"])


@dataclass(frozen=True)
class Line:
    """A line of the card's table: a question, its answer with interval and n, and what to hold it against."""

    question: str
    value: str
    interval: str
    n: int
    beside: str


def line(question: str, found: dict[str, Any], shown: Any, beside: str = "") -> Line:
    """A line whose figures are written by `shown`."""
    return Line(question, shown(found["value"]), f"{shown(found['low'])} to {shown(found['high'])}", found["n"], beside)


def headline(told: dict[str, Any]) -> Iterator[Line]:
    """The figures that answer a stranger's questions, as the net judges where there is one, else pixels."""
    space = told["spaces"][-1]["name"]
    for split in sorted(told["retrieval"]):
        found, ceiling = (told["retrieval"][split][who][space] for who in ("drawn", "ceiling"))
        question = f"Draws what was asked: top 5 of {found['candidates']:,}, {CALLED[split]}"
        beside = f"{share(ceiling['top5']['value'])} for the autoencoder's rebuilt pictures, "
        yield line(question, found["top5"], share, beside + f"{share(found['chance']['top5'])} by chance")
    if "shuffled" in told["text_use"]["gaps"]:
        use = told["text_use"]
        beside = f"the loss is {figure(use['losses']['true']['total'])}"
        yield line("Reads: what another's caption adds to the loss", use["gaps"]["shuffled"]["total"], signed, beside)
    if found := told["distribution"].get(space):
        of = f"for real {'held-out ' if found['on'] == 'heldout' else ''}pictures"
        for kind in ("fid", "kid"):
            beside = f"{figure(found['floor'][kind]['value'])} {of}"
            yield line(f"Looks like the data: {kind.upper()}, lower is better", found["drawn"][kind], figure, beside)
    for split, copied in sorted(told["memorization"].get(space, {}).items()):
        near = copied["near_copies"]
        beside = f"{share(near['heldout']['value'])} among real held-out pictures"
        yield line(f"Copies: near-copies of training pictures, {CALLED[split]}", near["drawn"], share, beside)
    for split, found in sorted(told["reconstruction"].items()):
        psnr = found["psnr_db"]
        yield line(f"Could reach at most: PSNR of the autoencoder in dB, {CALLED[split]}", psnr, figure)


def limits(told: dict[str, Any] | None, size: int) -> Iterator[str]:
    """What a reader must know before trusting the model, as far as it was measured."""
    yield f"It was trained on the pictures named below and on nothing else, at {size} × {size} pixels."
    yield "It filters neither prompts nor pictures: there is no safety checker."
    if told is None:
        yield "It has not been evaluated: how well it draws, and whether it copies training pictures, is not known."
        return
    gap = told["text_use"]["gaps"].get("shuffled", {}).get("total")
    if gap and gap["low"] <= 0:
        spread = f"{signed(gap['value'])} ({signed(gap['low'])} to {signed(gap['high'])})"
        yield f"That it reads captions is not shown: another's caption adds {spread} to the loss, which may be nothing."
    space = told["spaces"][-1]["name"]
    top5 = {split: found["drawn"][space]["top5"] for split, found in told["retrieval"].items()}
    if len(top5) == 2 and top5["heldout"]["high"] < top5["train"]["low"]:
        shares = f"{share(top5['heldout']['value'])} against {share(top5['train']['value'])}"
        yield f"Captions that it was not trained on come out right less often: {shares}."
    for judge, sets in told["memorization"].items():
        for split, found in sorted(sets.items()):
            if found["verdict"] in ("copies", "some copies"):
                drawn, real = (share(found["near_copies"][who]["value"]) for who in ("drawn", "heldout"))
                yield (
                    f"It copies training pictures ({CALLED[split]}, judged in {judge}: {found['verdict']}): "
                    f"{drawn} are near-copies; among real held-out pictures {real}."
                )
    least = min(found["n"] for found in top5.values())
    if least < FEW:
        yield f"The figures are rough: some come from {least} pictures. Mind the intervals."
    if told["distribution"]:
        yield "FID and KID depend on the judge and on n: compare them with those of real pictures beside them alone."
