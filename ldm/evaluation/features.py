"""Feature extractors: pixels, a frozen network that the user names, or the in-domain CLIP (in_domain_clip.py).

A metric such as FID means nothing without its feature extractor. So an extractor states what determines its vectors:
its name, the SHA-256 of its weights, and how pictures are resized for it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from ldm.data.images import to_pixels, to_square
from ldm.evaluation.metrics.retrieval import Metric
from ldm.models.loading import find_model, load_network, loading
from ldm.models.safety import check_model_folder

BATCH = 32
PIXEL_EDGE = 16  # edge to which the pixel extractor averages pictures
INCEPTION = "inception="
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d"


@dataclass(frozen=True)
class FeatureExtractor:
    """Pictures => feature vectors.

    Attributes:
        name: as the user named it, "pixels" or "in-domain CLIP".
        sha256: of the weights file; None if there are no weights.
        resize: how pictures are resized first, in words.
        metric: the distance of its nearest neighbors.
        embed: pixels [B,3,H,W] in [-1,1] => vectors [B,D].
        embed_pair: pixels => vectors that are comparable to those of `embed_captions`; None without a text tower.
        embed_captions: captions => vectors.
    """

    name: str
    sha256: str | None
    resize: str
    metric: Metric
    embed: Callable[[Tensor], Tensor]
    embed_pair: Callable[[Tensor], Tensor] | None = None
    embed_captions: Callable[[Sequence[str]], Tensor] | None = None

    def describe(self) -> dict[str, Any]:
        """Its identity, for evaluation.json."""
        return {"name": self.name, "sha256": self.sha256, "resize": self.resize, "metric": self.metric}


def pixel_extractor(size: int) -> FeatureExtractor:
    """Colors averaged over squares, 16 x 16 in all: positions and colors of objects without their edges."""
    edge = min(PIXEL_EDGE, size)

    def embed(pixels: Tensor) -> Tensor:
        return adaptive_avg_pool2d(pixels.float(), edge).flatten(1)

    resize = f"average pooling over {size / edge:g} x {size / edge:g} pixels, {size} => {edge}"
    return FeatureExtractor("pixels", None, resize, "euclidean", embed)


def load_extractor(spec: str, size: int, device: torch.device) -> FeatureExtractor:
    """The feature extractor that the user named.

    Args:
        spec: "inception=FILE.safetensors", or the folder or Hub id of a vision model of transformers.
        size: edge of the pictures, in pixels.
    Raises:
        ValueError: if it can't be used, with the reason and a fix.
        ModuleNotFoundError: for Inception without torch-fidelity.
        OSError: if there is no such folder or id.
    """
    if spec == "inception" or spec.startswith(INCEPTION):
        return _inception(spec.removeprefix("inception").removeprefix("="), size, device)
    return _vision_model(spec, size, device)


def _inception(file: str, size: int, device: torch.device) -> FeatureExtractor:
    """torch-fidelity's InceptionV3 of 2015, which published FIDs use, before its last layer, float32 [B,2048]."""
    if not file.endswith(".safetensors") or not Path(file).is_file():
        raise ValueError(
            f"features: inception needs its weights as safetensors: --features {INCEPTION}FILE.safetensors. Download "
            f"{INCEPTION_FILE}.pth from github.com/toshas/torch-fidelity/releases and convert it: python -c "
            f"\"import torch, safetensors.torch as s; s.save_file(torch.load('{INCEPTION_FILE}.pth', "
            "weights_only=True), 'inception.safetensors')\""
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"features: inception needs torch-fidelity and torchvision ({error.name} is missing); "
            "install them with: pip install 'ldm[inception]'"
        ) from error
    with tempfile.TemporaryDirectory() as folder:  # it reads torch's format only: give it one that was written here
        weights = Path(folder) / "weights.pth"
        torch.save(load_file(file), weights)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    net.to(device)

    @torch.no_grad()
    def embed(pixels: Tensor) -> Tensor:
        eight_bits = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
        features: Tensor = net(eight_bits.to(device))[0]
        return features.cpu()

    resize = f"bilinear as in TensorFlow 1, {size} => 299"
    return FeatureExtractor("inception", sha256_of([Path(file)]), resize, "cosine", embed)


def _vision_model(spec: str, size: int, device: torch.device) -> FeatureExtractor:
    """A model of transformers: its image embedding (CLIP, SigLIP), class token (ViT, DINOv2) or mean (others)."""
    import transformers

    folder = find_model(spec)
    check_model_folder(folder)
    # the pooler's output is not used, and classifiers' files have none
    model = load_network(transformers.AutoModel, folder, unused=("pooler.",), whole=False)
    model.eval().requires_grad_(False).to(device)
    edge, mean, std = _preprocessing(folder, spec)
    class_token = any(name.endswith(("cls_token", "class_embedding")) for name, _ in model.named_parameters())

    def prepared(pixels: Tensor) -> Tensor:
        # pixels in [-1,1] => in [0,1], at the model's size => normalized
        resized = interpolate((pixels + 1) / 2, size=(edge, edge), mode="bicubic", antialias=True).clamp(0, 1)
        return ((resized - mean) / std).to(device)

    @torch.no_grad()
    def embed(pixels: Tensor) -> Tensor:
        if hasattr(model, "get_image_features"):
            return _pooled(model.get_image_features(pixel_values=prepared(pixels)))
        last = model(pixel_values=prepared(pixels)).last_hidden_state.float().cpu()
        if last.ndim == 4:  # (B, D, h, w)
            return last.mean((2, 3))
        return last[:, 0] if class_token else last.mean(1)  # (B, tokens, D)

    resize = f"bicubic, antialiased, {size} => {edge}"
    digest = sha256_of(sorted(folder.glob("*.safetensors")))
    if not hasattr(model, "get_text_features"):
        return FeatureExtractor(spec, digest, resize, "cosine", embed)
    with loading(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def embed_captions(captions: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").to(device)
        return _pooled(model.get_text_features(**tokens))

    return FeatureExtractor(spec, digest, resize, "cosine", embed, embed, embed_captions)


def _pooled(features: Any) -> Tensor:
    """transformers 5 returns an output object, earlier versions the tensor."""
    tensor: Tensor = getattr(features, "pooler_output", features)
    return tensor.float().cpu()


def _preprocessing(folder: Path, spec: str) -> tuple[int, Tensor, Tensor]:
    """Edge, mean and std of a model's pictures, each of the latter [3,1,1]."""
    files = [
        folder / name for name in ("preprocessor_config.json", "processor_config.json") if (folder / name).exists()
    ]
    if not files:
        raise ValueError(f"features: {spec} has no preprocessor_config.json, which defines how pictures are resized")
    config = json.loads(files[0].read_text("utf-8"))
    config = config.get("image_processor", config)
    if missing := [key for key in ("image_mean", "image_std", "size") if key not in config]:
        raise ValueError(f"features: {files[0].name} of {spec} has no {missing[0]}")
    size = config.get("crop_size") or config["size"]
    edge = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
    mean, std = (torch.tensor(config[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))
    return int(edge), mean, std


def sha256_of(files: Iterable[Path]) -> str:
    """The SHA-256 of the concatenated contents of these files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_pixels(paths: Sequence[Path]) -> Tensor:
    """Picture files of one size => pixels [N,3,H,W] in [-1,1]."""
    arrays = []
    for path in paths:
        with Image.open(path) as picture:
            arrays.append(torch.from_numpy(to_pixels(to_square(picture.convert("RGB"), picture.height))))
    return torch.stack(arrays)


def extract_features(extractors: Sequence[FeatureExtractor], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """The vectors [N,D] of all pictures in the batches, by extractor; the batches are read once."""
    vectors: dict[str, list[Tensor]] = {extractor.name: [] for extractor in extractors}
    for pixels in batches:
        for extractor in extractors:
            vectors[extractor.name].append(extractor.embed(pixels).float().cpu())
    return {name: torch.cat(parts) for name, parts in vectors.items()}


def in_batches(items: Sequence[Any]) -> list[Any]:
    """The items in slices of BATCH."""
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
