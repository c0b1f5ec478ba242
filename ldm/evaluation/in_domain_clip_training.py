"""Fit the data set's own judge (contrastive.py) on its training split, in minutes on a CPU."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from tqdm import tqdm

from ldm.data.batches import pixel_batches
from ldm.data.dataset import CaptionedPictures
from ldm.data.rows import count
from ldm.evaluation.contrastive import (
    ContrastiveNet,
    NetConfig,
    contrastive_loss,
    load_text,
    mean_pooled,
    save_net,
)
from ldm.evaluation.gallery import fingerprint
from ldm.evaluation.metrics.retrieval import distances, ranks, recall, same_caption

BATCH = 256  # or an eighth of the pictures, so that a small data set takes enough steps
LEAST_BATCH = 16
EPOCHS = 20
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
MOST_SCALE = 100.0  # CLIP, section 2.5


def fit_net(
    pictures: CaptionedPictures,
    folder: Path,
    device: torch.device,
    *,
    config: NetConfig | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit a judge on the training split of these pictures and save it.

    Args:
        pictures: the whole data set; the held-out pictures are only looked at to report the recall.
        folder: where it is saved.
        epochs: times that each training picture is seen.
    Returns:
        Its card, with the recall on the held-out pictures.
    Raises:
        ValueError: if there are fewer than two different captions to train on.
    """
    config = config or NetConfig()
    started = time.perf_counter()
    train = pictures.train
    if len({row.captions[0] for row in train}) < 2:
        raise ValueError(f"net: {pictures.source} has fewer than two different captions to learn to tell apart")
    text = load_text(config)
    text.model.to(device)
    names = sorted({caption for row in train for caption in row.captions})
    embeddings = mean_pooled(text, names).to(device)  # (captions, text_dim)
    pixels = torch.cat([eight_bits(part) for part in pixel_batches(train, config.size, "reading pictures")])
    known = known_captions(train, pixels, names)

    torch.manual_seed(seed)
    net = ContrastiveNet(config, text.dim).to(device)
    decayed = [weight for weight in net.parameters() if weight.ndim > 1]
    plain = [weight for weight in net.parameters() if weight.ndim <= 1]  # norms, biases, the scale
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        fused=device.type in ("cpu", "cuda"),
    )
    batches = math.ceil(len(train) / min(BATCH, max(LEAST_BATCH, len(train) // 8)))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches, pct_start=0.1)
    rng = torch.Generator().manual_seed(seed)
    bar = tqdm(range(epochs), desc=f"fitting the net on {count(len(train), 'picture')}", unit="epoch")
    for _ in bar:
        total = 0.0
        for chosen in torch.randperm(len(train), generator=rng).tensor_split(batches):
            loss = step(net, pixels[chosen], [known[i] for i in chosen.tolist()], embeddings, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            net.log_scale.data.clamp_(max=math.log(MOST_SCALE))
            total += float(loss.detach())
        bar.set_postfix_str(f"loss {total / batches:.3f}")

    shown = pictures.heldout if len(pictures.heldout) else train
    card = {
        "source": pictures.source,
        "training_pictures": fingerprint(train),
        "n": len(train),
        "epochs": epochs,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "recall_on": "heldout" if len(pictures.heldout) else "train",
        "recall": text_recall(net, text, shown),
    }
    save_net(net, folder, card)
    return card


def eight_bits(pixels: Tensor) -> Tensor:
    """Pixels in [-1,1] => uint8, in which a large data set fits into memory."""
    return ((pixels + 1) * 127.5).round().byte()


def known_captions(train: CaptionedPictures, pixels: Tensor, names: Sequence[str]) -> list[list[int]]:
    """For each picture the numbers of the captions that fit it: its own, and those of pictures with the same pixels."""
    numbers = {name: number for number, name in enumerate(names)}
    by_content: dict[bytes, list[int]] = {}
    digests = [hashlib.sha256(picture.numpy().tobytes()).digest() for picture in pixels]
    for digest, row in zip(digests, train, strict=True):
        by_content.setdefault(digest, []).extend(numbers[caption] for caption in row.captions)
    return [sorted(set(by_content[digest])) for digest in digests]


def step(
    net: ContrastiveNet, pixels: Tensor, known: list[list[int]], embeddings: Tensor, rng: torch.Generator
) -> Tensor:
    """The loss of one batch, each picture with one of its captions."""
    picks = torch.rand(len(known), generator=rng).tolist()
    chosen = [captions[int(u * len(captions))] for captions, u in zip(known, picks, strict=True)]
    fits = torch.tensor([[caption in captions for caption in chosen] for captions in map(set, known)])  # (B, B)
    device = embeddings.device
    drawn = net.embed_pictures(augment(pixels.float() / 127.5 - 1, rng).to(device))
    said = net.embed_captions(embeddings[chosen])
    return contrastive_loss(drawn, said, net.log_scale.exp(), fits.to(device))


def augment(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Small turns, shifts, sizes, contrasts and noise; no mirroring, for flags and letters have a left and a right."""
    n = len(pixels)

    def within(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng)

    angle, size, x, y = within(-0.15, 0.15), within(0.85, 1.1), within(-0.12, 0.12), within(-0.12, 0.12)
    turned = torch.stack([angle.cos() * size, -angle.sin() * size, x, angle.sin() * size, angle.cos() * size, y], 1)
    grid = affine_grid(turned.reshape(n, 2, 3), list(pixels.shape), align_corners=False)
    moved = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    noise = 0.03 * torch.randn(moved.shape, generator=rng)
    return (moved * within(0.85, 1.0).reshape(-1, 1, 1, 1) + noise).clamp(-1, 1)


@torch.no_grad()
def text_recall(net: ContrastiveNet, text: Any, pictures: CaptionedPictures) -> dict[str, Any]:
    """How often a caption finds its picture among these, and a picture its caption, by the nearest unit vectors."""
    net.eval()
    device = net.log_scale.device
    batches = pixel_batches(pictures, net.config.size, "looking at held-out pictures")
    drawn = torch.cat([net.embed_pictures(part.to(device)).cpu() for part in batches])
    captions = sorted({caption for row in pictures for caption in row.captions})
    said = net.embed_captions(mean_pooled(text, captions).to(device)).cpu()
    answers = same_caption(captions, [row.captions for row in pictures])  # (captions, pictures)
    distance = distances(said, drawn, "cosine")
    return {
        "caption to picture": recall(ranks(distance, answers), len(pictures)),
        "picture to caption": recall(ranks(distance.T, answers.T), len(captions)),
    }
