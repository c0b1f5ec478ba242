"""The in-domain CLIP: a small network trained to match the pictures and captions of one data set.

Networks trained on photographs see little in drawings of 64 pixels, and none can be downloaded on an offline machine.
So a picture tower (a stock ResNet) and a linear map of a frozen text encoder's embeddings are trained on the TRAINING
split of the data set itself, with a contrastive loss (Radford et al. 2021, CLIP). Frozen, its picture features are used
for FID, retrieval and the search for copies, and the cosine of both towers for the CLIP score.

It evaluates models and must never train them: no module of `ldm.training` may import it (`lint-imports`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize
from tqdm import tqdm

from ldm.data.dataset import CaptionedPictures
from ldm.evaluation.evaluation_set import fingerprint
from ldm.evaluation.features import FeatureExtractor, sha256_of
from ldm.models.text_encoder import MINILM, TextConfig, TextEncoder

WEIGHTS, CARD = "net.safetensors", "net.json"
TOKENS = 64
NAME = "in-domain CLIP"  # in reports and evaluation.json


@dataclass(frozen=True)
class InDomainClipConfig:
    """The shape of the network.

    Attributes:
        size: edge of its input pictures; others are resized.
        channels: width of each stage of the ResNet; the first has resolution size / 4, each further one half of it.
        layers: basic blocks per stage.
        dim: of the joint embedding of pictures and captions.
        text_encoder: the frozen encoder of the captions: "minilm", a folder or a Hub id.
    """

    size: int = 64
    channels: tuple[int, ...] = (32, 64, 128, 256)
    layers: int = 2
    dim: int = 128
    text_encoder: str = MINILM


class InDomainClip(nn.Module):
    """Pictures and caption embeddings => unit vectors in one embedding."""

    def __init__(self, config: InDomainClipConfig, text_dim: int) -> None:
        super().__init__()
        import transformers

        shape = transformers.ResNetConfig(
            embedding_size=config.channels[0],
            hidden_sizes=list(config.channels),
            depths=[config.layers] * len(config.channels),
            layer_type="basic",
        )
        self.config = config
        self.pictures = transformers.ResNetModel(shape)
        self.picture_head = nn.Linear(config.channels[-1], config.dim)
        self.caption_head = nn.Linear(text_dim, config.dim)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # CLIP's initial value, section 2.5

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [B,3,H,W] in [-1,1] => pooled features of the picture tower, [B, channels[-1]]."""
        if pixels.shape[-1] != self.config.size:
            pixels = interpolate(pixels, size=(self.config.size,) * 2, mode="bicubic", antialias=True).clamp(-1, 1)
        pooled: Tensor = self.pictures(pixels).pooler_output
        return pooled.flatten(1)

    def embed_pictures(self, pixels: Tensor) -> Tensor:
        """Pixels [B,3,H,W] => unit vectors [B,dim]."""
        return normalize(self.picture_head(self.features(pixels)), dim=1)

    def embed_captions(self, embeddings: Tensor) -> Tensor:
        """Frozen caption embeddings [B,text_dim] => unit vectors [B,dim]."""
        return normalize(self.caption_head(embeddings), dim=1)


def contrastive_loss(pictures: Tensor, captions: Tensor, scale: Tensor, matches: Tensor) -> Tensor:
    """Symmetric InfoNCE where a picture may match several captions of the batch (CLIP, figure 3; Khosla et al. 2020).

    With `matches` the unit matrix it is CLIP's loss. Two pictures of one caption, or one picture with two captions, are
    not each other's negatives: the targets of a row are uniform over its matches.

    Args:
        pictures, captions: unit vectors [B,D].
        scale: of the cosines, 1 / temperature.
        matches: bool [B,B], whether caption j matches picture i; its diagonal is true.
    """
    logits = scale * pictures @ captions.T  # (B, B)
    target = matches.to(logits)
    by_picture = cross_entropy(logits, target / target.sum(1, keepdim=True))
    by_caption = cross_entropy(logits.T, (target / target.sum(0, keepdim=True)).T)
    return (by_picture + by_caption) / 2


@torch.no_grad()
def mean_pooled(text: TextEncoder, captions: Sequence[str], batch_size: int = 64) -> Tensor:
    """Captions => the mean of their tokens' last hidden states without padding, float32 [B,text_dim] on the CPU."""
    parts = []
    starts = range(0, len(captions), batch_size)
    for start in tqdm(starts, "embedding captions", unit="batch", leave=False, disable=len(starts) < 16):
        tokens = text.tokenizer(
            list(captions[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=text.tokenizer.model_max_length,
            return_tensors="pt",
        ).to(text.model.device)
        hidden = text.model(tokens.input_ids, attention_mask=tokens.attention_mask)[0].float()  # (B, L, D)
        mask = tokens.attention_mask[..., None].to(hidden)
        parts.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(parts)


def load_caption_encoder(config: InDomainClipConfig) -> TextEncoder:
    """The frozen encoder of the captions, which are truncated to 64 tokens."""
    return TextEncoder.load(TextConfig(config.text_encoder, TOKENS))


def save_clip(net: InDomainClip, folder: Path, card: dict[str, Any]) -> None:
    """Write the weights, and a card with the configuration, the training data and the held-out recall."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / WEIGHTS)
    whole = {"config": asdict(net.config), "sha256": sha256_of([folder / WEIGHTS]), **card}
    (folder / CARD).write_text(json.dumps(whole, indent=2) + "\n", "utf-8")


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of the in-domain CLIP in a folder; None if there is none."""
    if not (folder / CARD).exists() or not (folder / WEIGHTS).exists():
        return None
    card: dict[str, Any] = json.loads((folder / CARD).read_text("utf-8"))
    return card


def load_clip(folder: Path, pictures: CaptionedPictures, size: int, device: torch.device) -> FeatureExtractor:
    """The frozen in-domain CLIP in a folder, to evaluate models with.

    Args:
        pictures: the data set to evaluate on; its training split must be the one that the network was trained on.
        size: edge of the pictures to embed.
    Raises:
        ValueError: if it was trained on other pictures (then it may have seen held-out ones), or its weights are not
            those of its card.
    """
    card = read_card(folder)
    if card is not None and card["training_pictures"] != fingerprint(pictures.train):
        raise ValueError(
            f"net: the in-domain CLIP in {folder} was trained on other pictures than the training split of "
            f"{pictures.source}; train it again with --fit-net, or name another folder with --net"
        )
    return open_clip(folder, size, device)


def open_clip(folder: Path, size: int, device: torch.device) -> FeatureExtractor:
    """The frozen in-domain CLIP in a folder, whatever it was trained on: to suggest captions with, not to evaluate.

    Args:
        size: edge of the pictures to embed.
    Raises:
        ValueError: if there is none, or its weights are not those of its card.
    """
    card = read_card(folder)
    if card is None:
        raise ValueError(f"net: no in-domain CLIP in {folder}; train one with: ldm evaluate --data DATA --fit-net")
    if (found := sha256_of([folder / WEIGHTS])) != card["sha256"]:
        raise ValueError(
            f"net: {folder / WEIGHTS} has SHA-256 {found}, but {CARD} states {card['sha256']}; "
            "train it again with --fit-net"
        )
    config = InDomainClipConfig(**{**card["config"], "channels": tuple(card["config"]["channels"])})
    text = load_caption_encoder(config)
    text.model.to(device)
    net = InDomainClip(config, text.dim)
    net.load_state_dict(load_file(folder / WEIGHTS))
    return as_extractor(net.to(device), text, found, size)


def as_extractor(net: InDomainClip, text: TextEncoder, sha256: str, size: int) -> FeatureExtractor:
    """The network as a feature extractor of pictures with this edge."""
    net.eval().requires_grad_(False)
    device = net.log_scale.device
    resize = "none" if size == net.config.size else f"bicubic, antialiased, {size} => {net.config.size}"

    @torch.no_grad()
    def embed(pixels: Tensor) -> Tensor:
        return net.features(pixels.to(device)).cpu()

    @torch.no_grad()
    def embed_pair(pixels: Tensor) -> Tensor:
        return net.embed_pictures(pixels.to(device)).cpu()

    @torch.no_grad()
    def embed_captions(captions: Sequence[str]) -> Tensor:
        return net.embed_captions(mean_pooled(text, captions).to(device)).cpu()

    return FeatureExtractor(NAME, sha256, resize, "cosine", embed, embed_pair, embed_captions)
