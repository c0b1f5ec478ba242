"""Train the in-domain CLIP (in_domain_clip.py) on the training split of a data set, in minutes on a CPU."""

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
from ldm.evaluation.evaluation_set import fingerprint
from ldm.evaluation.in_domain_clip import (
    InDomainClip,
    InDomainClipConfig,
    contrastive_loss,
    load_caption_encoder,
    mean_pooled,
    save_clip,
)
from ldm.evaluation.metrics.retrieval import caption_matches, distances, ranks, recall_at_k

BATCH = 256  # or an eighth of the pictures, so that a small data set has enough steps
MIN_BATCH = 16
EPOCHS = 20
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
MAX_SCALE = 100.0  # CLIP, section 2.5


def train_clip(
    pictures: CaptionedPictures,
    folder: Path,
    device: torch.device,
    *,
    config: InDomainClipConfig | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> dict[str, Any]:
    """Train an in-domain CLIP on the training split of these pictures and save it.

    Args:
        pictures: the whole data set; the held-out pictures are used for the reported recall only.
        folder: where it is written.
        epochs: passes over the training pictures.
    Returns:
        Its card, with the recall on the held-out pictures.
    Raises:
        ValueError: if the training split has fewer than two different captions.
    """
    config = config or InDomainClipConfig()
    started = time.perf_counter()
    train = pictures.train
    if len({row.captions[0] for row in train}) < 2:
        raise ValueError(f"net: the training split of {pictures.source} has fewer than two different captions")
    text = load_caption_encoder(config)
    text.model.to(device)
    names = sorted({caption for row in train for caption in row.captions})
    embeddings = mean_pooled(text, names).to(device)  # (captions, text_dim)
    pixels = torch.cat([eight_bits(part) for part in pixel_batches(train, config.size, "reading pictures")])
    matching = matching_captions(train, pixels, names)

    torch.manual_seed(seed)
    net = InDomainClip(config, text.dim).to(device)
    decayed = [weight for weight in net.parameters() if weight.ndim > 1]
    plain = [weight for weight in net.parameters() if weight.ndim <= 1]  # norms, biases, the scale
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        fused=device.type in ("cpu", "cuda"),
    )
    batches = math.ceil(len(train) / min(BATCH, max(MIN_BATCH, len(train) // 8)))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches, pct_start=0.1)
    rng = torch.Generator().manual_seed(seed)
    bar = tqdm(range(epochs), desc=f"training the in-domain CLIP on {count(len(train), 'picture')}", unit="epoch")
    for _ in bar:
        total = 0.0
        for chosen in torch.randperm(len(train), generator=rng).tensor_split(batches):
            loss = batch_loss(net, pixels[chosen], [matching[i] for i in chosen.tolist()], embeddings, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            net.log_scale.data.clamp_(max=math.log(MAX_SCALE))
            total += float(loss.detach())
        bar.set_postfix_str(f"loss {total / batches:.3f}")

    queries = pictures.heldout if len(pictures.heldout) else train
    card = {
        "source": pictures.source,
        "training_pictures": fingerprint(train),
        "n": len(train),
        "epochs": epochs,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "recall_on": "heldout" if len(pictures.heldout) else "train",
        "recall": text_recall(net, text, queries),
    }
    save_clip(net, folder, card)
    return card


def eight_bits(pixels: Tensor) -> Tensor:
    """Pixels in [-1,1] => uint8, a quarter of the memory."""
    return ((pixels + 1) * 127.5).round().byte()


def matching_captions(train: CaptionedPictures, pixels: Tensor, names: Sequence[str]) -> list[list[int]]:
    """For each picture the indices of its own captions and of those of pictures with the same pixels."""
    numbers = {name: number for number, name in enumerate(names)}
    by_content: dict[bytes, list[int]] = {}
    digests = [hashlib.sha256(picture.numpy().tobytes()).digest() for picture in pixels]
    for digest, row in zip(digests, train, strict=True):
        by_content.setdefault(digest, []).extend(numbers[caption] for caption in row.captions)
    return [sorted(set(by_content[digest])) for digest in digests]


def batch_loss(
    net: InDomainClip, pixels: Tensor, matching: list[list[int]], embeddings: Tensor, rng: torch.Generator
) -> Tensor:
    """The loss of a batch in which each picture has one of its captions, at random."""
    picks = torch.rand(len(matching), generator=rng).tolist()
    chosen = [captions[int(u * len(captions))] for captions, u in zip(matching, picks, strict=True)]
    matches = torch.tensor([[caption in captions for caption in chosen] for captions in map(set, matching)])  # (B, B)
    device = embeddings.device
    picture_vectors = net.embed_pictures(augment(pixels.float() / 127.5 - 1, rng).to(device))
    caption_vectors = net.embed_captions(embeddings[chosen])
    return contrastive_loss(picture_vectors, caption_vectors, net.log_scale.exp(), matches.to(device))


def augment(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Small random rotation, scale, shift, contrast and noise; no mirroring, which would change flags and letters."""
    n = len(pixels)

    def within(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng)

    angle, size, x, y = within(-0.15, 0.15), within(0.85, 1.1), within(-0.12, 0.12), within(-0.12, 0.12)
    affine = torch.stack([angle.cos() * size, -angle.sin() * size, x, angle.sin() * size, angle.cos() * size, y], 1)
    grid = affine_grid(affine.reshape(n, 2, 3), list(pixels.shape), align_corners=False)
    moved = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    noise = 0.03 * torch.randn(moved.shape, generator=rng)
    return (moved * within(0.85, 1.0).reshape(-1, 1, 1, 1) + noise).clamp(-1, 1)


@torch.no_grad()
def text_recall(net: InDomainClip, text: Any, pictures: CaptionedPictures) -> dict[str, Any]:
    """Recall from captions to these pictures and from pictures to captions, by the nearest unit vectors."""
    net.eval()
    device = net.log_scale.device
    batches = pixel_batches(pictures, net.config.size, "embedding pictures")
    picture_vectors = torch.cat([net.embed_pictures(part.to(device)).cpu() for part in batches])
    captions = sorted({caption for row in pictures for caption in row.captions})
    caption_vectors = net.embed_captions(mean_pooled(text, captions).to(device)).cpu()
    matches = caption_matches(captions, [row.captions for row in pictures])  # (captions, pictures)
    distance = distances(caption_vectors, picture_vectors, "cosine")
    return {
        "caption to picture": recall_at_k(ranks(distance, matches), len(pictures)),
        "picture to caption": recall_at_k(ranks(distance.T, matches.T), len(captions)),
    }
