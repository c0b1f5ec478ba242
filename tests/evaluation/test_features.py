"""Feature extractors return the vectors that transformers computes, for every kind of model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from PIL import Image
from torch import Tensor

from ldm.evaluation.features import extract_features, load_extractor, pixel_extractor, read_pixels

CPU = torch.device("cpu")
MEAN, STD = [0.48, 0.45, 0.4], [0.27, 0.26, 0.25]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_model(folder: Path, kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    if kind == "clip":
        text = transformers.CLIPTextModel.from_pretrained(tiny.save_text_encoder(folder, "clip")).config
        vision = {**SHAPE, "image_size": 16, "patch_size": 8}
        config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=8)
        model = transformers.CLIPModel(config)
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, image_size=16, patch_size=8))
    else:
        shape = transformers.ConvNextV2Config(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=16)
        model = transformers.ConvNextV2Model(shape)
    model.save_pretrained(folder)
    size = {"height": 16, "width": 16} if kind == "dinov2" else {"shortest_edge": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size, "image_mean": MEAN, "image_std": STD}))
    return model.eval()


def expected(model: transformers.PreTrainedModel, kind: str, pixels: Tensor) -> Tensor:
    """The model's own features of pictures that need no resizing."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    inputs = ((pixels + 1) / 2 - mean) / std
    with torch.no_grad():
        if kind == "clip":
            return model.visual_projection(model.vision_model(inputs).pooler_output)
        last = model(inputs).last_hidden_state
    return last[:, 0] if kind == "dinov2" else last.flatten(2).mean(2)


@pytest.mark.parametrize("kind", ["clip", "dinov2", "convnextv2"])
def test_vectors_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, kind)
    extractor = load_extractor(str(tmp_path), 16, CPU)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(extractor.embed(pixels), expected(model, kind, pixels), rtol=1e-4, atol=1e-5)
    assert extractor.sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert load_extractor(str(tmp_path), 64, CPU).resize == "bicubic, antialiased, 64 => 16"
    assert (extractor.embed_captions is None) == (kind != "clip")


def test_clip_embeds_captions(tmp_path: Path) -> None:
    model = save_model(tmp_path, "clip")
    extractor = load_extractor(str(tmp_path), 16, CPU)
    assert extractor.embed_captions is not None
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        ["red heart", "cat"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = model.text_projection(model.text_model(**tokens).pooler_output)
    torch.testing.assert_close(extractor.embed_captions(["red heart", "cat"]), theirs, rtol=1e-4, atol=1e-5)


def test_an_unusable_network_is_refused_with_a_fix(tmp_path: Path) -> None:
    save_model(tmp_path / "net", "convnextv2")
    (tmp_path / "net" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        load_extractor(str(tmp_path / "net"), 16, CPU)
    pickled = tmp_path / "pickled"
    save_model(pickled, "convnextv2")
    weights = transformers.ConvNextV2Model.from_pretrained(pickled).state_dict()
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_extractor(str(pickled), 16, CPU)
    for spec in ("inception", f"inception={tmp_path / 'missing.safetensors'}", "inception=weights.pth"):
        with pytest.raises(ValueError, match=r"--features inception=FILE\.safetensors"):
            load_extractor(spec, 16, CPU)


def test_picture_files_are_read_exactly_and_batches_do_not_matter(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, array in zip(paths, pixels.numpy(), strict=True):
        Image.fromarray(array).save(path)
    found = read_pixels(paths)
    torch.testing.assert_close(found, pixels.permute(0, 3, 1, 2) / 127.5 - 1)
    extractor = pixel_extractor(16)
    torch.testing.assert_close(extract_features([extractor], [found[:2], found[2:]])["pixels"], extractor.embed(found))
