"""The data set's own judge: a small network that has learned which caption goes with which picture.

Networks trained on photographs see little in drawings of 64 pixels, and none comes with a fresh, offline machine. So
a picture tower (a stock ResNet) and a linear map of a frozen text encoder's embeddings learn to agree on the
TRAINING split of the very data set (Radford et al. 2021, CLIP). Frozen, its picture features carry FID, retrieval and
the search for copies, and its two towers say how well a picture fits a caption.

It judges and must never teach: nothing in `ldm.training` may import it, which `lint-imports` holds.
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

from ldm.data.dataset import CaptionedPictures
from ldm.evaluation.features import Space, sha256_of
from ldm.evaluation.gallery import fingerprint
from ldm.models.text_encoder import MINILM, TextConfig, TextEncoder

WEIGHTS, CARD = "net.safetensors", "net.json"
TOKENS = 64


@dataclass(frozen=True)
class NetConfig:
    """The judge's shape.

    Attributes:
        size: edge of the pictures it sees; others are resized.
        channels: width of each stage of the ResNet, each half as fine as the one before; the first is at size / 4.
        layers: basic blocks per stage.
        dim: of the space where pictures and captions meet.
        text_encoder: what embeds the captions, frozen: "minilm", a folder or a Hub id.
    """

    size: int = 64
    channels: tuple[int, ...] = (32, 64, 128, 256)
    layers: int = 2
    dim: int = 128
    text_encoder: str = MINILM


class ContrastiveNet(nn.Module):
    """Pictures and caption embeddings => unit vectors in one space."""

    def __init__(self, config: NetConfig, text_dim: int) -> None:
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
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # CLIP's start, section 2.5

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [B,3,H,W] in [-1,1] => what the picture tower sees, [B, channels[-1]]."""
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


def contrastive_loss(pictures: Tensor, captions: Tensor, scale: Tensor, fits: Tensor) -> Tensor:
    """Symmetric InfoNCE in which a picture may fit several captions of the batch (CLIP, figure 3; Khosla et al. 2020).

    With `fits` the unit matrix it is CLIP's loss. Two pictures of one caption, or one drawing under two names, are
    not each other's negatives: the targets of a row are spread evenly over what fits.

    Args:
        pictures, captions: unit vectors [B,D].
        scale: of the cosines, 1 / temperature.
        fits: bool [B,B], whether caption j fits picture i; its diagonal is true.
    """
    logits = scale * pictures @ captions.T  # (B, B)
    target = fits.to(logits)
    by_picture = cross_entropy(logits, target / target.sum(1, keepdim=True))
    by_caption = cross_entropy(logits.T, (target / target.sum(0, keepdim=True)).T)
    return (by_picture + by_caption) / 2


@torch.no_grad()
def mean_pooled(text: TextEncoder, captions: Sequence[str], batch_size: int = 64) -> Tensor:
    """Captions => the mean of their tokens' last hidden states, padding left out, float32 [B,text_dim] on the CPU."""
    parts = []
    for start in range(0, len(captions), batch_size):
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


def load_text(config: NetConfig) -> TextEncoder:
    """The frozen encoder of the captions; what is longer than 64 tokens is cut."""
    return TextEncoder.load(TextConfig(config.text_encoder, TOKENS))


def save_net(net: ContrastiveNet, folder: Path, card: dict[str, Any]) -> None:
    """Write the weights, and a card with the shape, what it was fit on and how well it knows held-out pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, folder / WEIGHTS)
    whole = {"config": asdict(net.config), "sha256": sha256_of([folder / WEIGHTS]), **card}
    (folder / CARD).write_text(json.dumps(whole, indent=2) + "\n", "utf-8")


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of the net in a folder; None if there is no net."""
    if not (folder / CARD).exists() or not (folder / WEIGHTS).exists():
        return None
    card: dict[str, Any] = json.loads((folder / CARD).read_text("utf-8"))
    return card


def load_net(folder: Path, pictures: CaptionedPictures, size: int, device: torch.device) -> Space:
    """The judge in a folder, frozen.

    Args:
        pictures: the data set that it shall judge; its training pictures must be those that it was fit on.
        size: edge of the pictures that it will see.
    Raises:
        ValueError: if it was fit on others (it may then have seen held-out ones), or its weights are not those of its
            card.
    """
    card = read_card(folder)
    if card is None:
        raise ValueError(f"net: there is none in {folder}; fit it with: ldm evaluate --data DATA --fit-net")
    if card["training_pictures"] != fingerprint(pictures.train):
        raise ValueError(
            f"net: {folder} was fit on other pictures than the training split of {pictures.source}; "
            "fit it again with --fit-net, or name another folder with --net"
        )
    if (found := sha256_of([folder / WEIGHTS])) != card["sha256"]:
        raise ValueError(f"net: {folder / WEIGHTS} has SHA-256 {found}, its card says {card['sha256']}; fit it again")
    config = NetConfig(**{**card["config"], "channels": tuple(card["config"]["channels"])})
    text = load_text(config)
    text.model.to(device)
    net = ContrastiveNet(config, text.dim)
    net.load_state_dict(load_file(folder / WEIGHTS))
    return as_space(net.to(device), text, found, size)


def as_space(net: ContrastiveNet, text: TextEncoder, sha256: str, size: int) -> Space:
    """A net as a space of pictures of this edge."""
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

    return Space("own", sha256, resize, "cosine", embed, embed_pair, embed_captions)
