"""Spaces in which pictures are compared: pixels, a frozen network that the user names, or the data set's own net.

A figure such as FID means nothing without its space, so a space says all that decides it: its name, the SHA-256 of
its weights file, and how pictures were resized for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from ldm.data.images import to_pixels, to_square
from ldm.evaluation.metrics.retrieval import Metric
from ldm.models.loading import find_model, load_network, loading
from ldm.models.safety import check_model_folder

BATCH = 32
BLURRED = 16  # edge to which the pixel space averages pictures
INCEPTION = "inception="
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d"


@dataclass(frozen=True)
class Space:
    """A way to turn pictures into vectors.

    Attributes:
        name: as the user named it, "pixels" or "own".
        sha256: of the weights file; None if there are no weights.
        resize: what happens to the pictures first, in words.
        metric: how nearest neighbors are told.
        embed: pixels [B,3,H,W] in [-1,1] => vectors [B,D].
        embed_pair: pixels => vectors that can be compared with those of `embed_captions`; None without a text tower.
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
        """What the JSON says of it."""
        return {"name": self.name, "sha256": self.sha256, "resize": self.resize, "metric": self.metric}


def pixel_space(size: int) -> Space:
    """Colors averaged over squares down to 16 x 16: where things are and what color they have, not their edges."""
    edge = min(BLURRED, size)

    def embed(pixels: Tensor) -> Tensor:
        return adaptive_avg_pool2d(pixels.float(), edge).flatten(1)

    resize = f"average pooling over {size / edge:g} x {size / edge:g} pixels, {size} => {edge}"
    return Space("pixels", None, resize, "euclidean", embed)


def load_space(spec: str, size: int, device: torch.device) -> Space:
    """The space that the user named.

    Args:
        spec: "inception=FILE.safetensors", or the folder or Hub id of a vision model of transformers.
        size: edge of the pictures, in pixels.
    Raises:
        ValueError: if it can't be used, with the reason.
        ModuleNotFoundError: for Inception without torch-fidelity.
        OSError: if there is no such folder or id.
    """
    if spec == "inception" or spec.startswith(INCEPTION):
        return _inception(spec.removeprefix("inception").removeprefix("="), size, device)
    return _vision_model(spec, size, device)


def _inception(file: str, size: int, device: torch.device) -> Space:
    """torch-fidelity's InceptionV3 of 2015, the network of published FIDs, before its last layer, float32 [B,2048]."""
    if not file.endswith(".safetensors") or not Path(file).is_file():
        raise ValueError(
            f"features: inception needs its weights as safetensors: --features {INCEPTION}FILE.safetensors. Get "
            f"{INCEPTION_FILE}.pth from github.com/toshas/torch-fidelity/releases and convert it: python -c "
            f"\"import torch, safetensors.torch as s; s.save_file(torch.load('{INCEPTION_FILE}.pth', "
            "weights_only=True), 'inception.safetensors')\""
        )
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as theirs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"features: inception needs torch-fidelity and torchvision ({error.name} is missing); "
            "install them with: pip install 'ldm[inception]'"
        ) from error
    from unittest.mock import patch

    from safetensors.torch import load_file

    with patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: load_file(file)):  # theirs unpickles
        net = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    net.to(device)

    @torch.no_grad()
    def embed(pixels: Tensor) -> Tensor:
        eight_bits = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
        features: Tensor = net(eight_bits.to(device))[0]
        return features.cpu()

    resize = f"bilinear as in TensorFlow 1, {size} => 299"
    return Space("inception", sha256_of([Path(file)]), resize, "cosine", embed)


def _vision_model(spec: str, size: int, device: torch.device) -> Space:
    """A model of transformers: its image embedding (CLIP, SigLIP), class token (ViT, DINOv2) or mean (others)."""
    import transformers

    folder = find_model(spec)
    check_model_folder(folder)
    # a pooler's output is not read; classifiers' files have none
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
        return Space(spec, digest, resize, "cosine", embed)
    with loading(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def embed_captions(captions: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").to(device)
        return _pooled(model.get_text_features(**tokens))

    return Space(spec, digest, resize, "cosine", embed, embed, embed_captions)


def _pooled(features: Any) -> Tensor:
    """transformers 5 answers with an output object, earlier versions with the tensor."""
    tensor: Tensor = getattr(features, "pooler_output", features)
    return tensor.float().cpu()


def _preprocessing(folder: Path, spec: str) -> tuple[int, Tensor, Tensor]:
    """Edge, mean and std of a model's pictures, each of the latter [3,1,1]."""
    files = [
        folder / name for name in ("preprocessor_config.json", "processor_config.json") if (folder / name).exists()
    ]
    if not files:
        raise ValueError(f"features: {spec} has no preprocessor_config.json, which says how its pictures are resized")
    said = json.loads(files[0].read_text("utf-8"))
    said = said.get("image_processor", said)
    if missing := [key for key in ("image_mean", "image_std", "size") if key not in said]:
        raise ValueError(f"features: {spec} does not say {missing[0]} in {files[0].name}")
    size = said.get("crop_size") or said["size"]
    edge = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
    mean, std = (torch.tensor(said[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))
    return int(edge), mean, std


def sha256_of(files: Iterable[Path]) -> str:
    """The SHA-256 of these files' contents, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def pixels_of(paths: Sequence[Path]) -> Tensor:
    """Picture files of one size => pixels [N,3,H,W] in [-1,1]."""
    arrays = []
    for path in paths:
        with Image.open(path) as picture:
            arrays.append(torch.from_numpy(to_pixels(to_square(picture.convert("RGB"), picture.height))))
    return torch.stack(arrays)


def embed_all(spaces: Sequence[Space], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Each space's vectors [N,D] of all pictures in the batches, which are read once."""
    vectors: dict[str, list[Tensor]] = {space.name: [] for space in spaces}
    for pixels in batches:
        for space in spaces:
            vectors[space.name].append(space.embed(pixels).float().cpu())
    return {name: torch.cat(parts) for name, parts in vectors.items()}
