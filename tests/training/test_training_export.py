"""A pipeline that is not what was trained never takes the place of one that is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import road
import tiny
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ldm.models.fingerprint import weights_fingerprint
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.system.errors import RunError
from ldm.system.hashing import sha256
from ldm.training.export import ExportMismatch, Frozen, check_frozen, check_unet
from train.train_ldm import main as train_ldm


def one_bit(folder: Path, part: str) -> None:
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    first = tensors[name].view(-1)[:1]
    first.copy_(torch.nextafter(first, first + 1))
    save_file(tensors, file, metadata={"format": "pt"})


def other_setting(folder: Path, part: str, name: str, value: Any) -> None:
    file = next((folder / part).glob("*config.json"))
    content = json.loads(file.read_text())
    assert content.get(name) != value
    file.write_text(json.dumps({**content, name: value}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the U-Net": (lambda folder: one_bit(folder, "unet"), "unet: .* differs"),
    "a bit of the VAE": (lambda folder: one_bit(folder, "vae"), "vae: .* differs"),
    "a bit of the text encoder": (lambda folder: one_bit(folder, "text_encoder"), "text_encoder: .* differs"),
    "what the scheduler thinks was predicted": (
        lambda folder: other_setting(folder, "scheduler", "prediction_type", "v_prediction"), "scheduler: "),
    "heads of attention": (
        lambda folder: other_setting(folder, "unet", "attention_head_dim", 1), "unet: loss .* on the stored batch"),
    "half a file": (
        lambda folder: (file := folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(
            file.read_bytes()[:1000]), "can't be loaded again"),
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "can't be loaded again"),
}  # fmt: skip


def loss_of(unet: Any) -> float:
    """Of a stored batch; large, so that a wrong network can't hide in the tolerance."""
    rng = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, 32, generator=rng)
    with torch.no_grad():
        return float((unet(x, torch.tensor([10, 500]), encoder_hidden_states=8 * context).sample).square().mean())


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> LDMPipeline:
    made = tiny.pipeline(tmp_path_factory.mktemp("encoder"))
    torch.manual_seed(5)
    for weight in made.unet.parameters():  # fresh networks hardly say anything, and the attention's heads not a word
        weight.data += 0.1 * torch.randn_like(weight)
    return made


def check_pipeline(folder: Path, pipeline: LDMPipeline, expected: float) -> None:
    """What a run does at its start, and what it does at every export."""
    networks = {"vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    known = {name: (type(network), weights_fingerprint(network)) for name, network in networks.items()}
    check_frozen(folder, Frozen.of(pipeline, known))
    check_unet(folder, pipeline.unet, expected, loss_of, "no")


def test_a_good_pipeline_passes(pipeline: LDMPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    check_pipeline(tmp_path, pipeline, loss_of(pipeline.unet))


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_found(pipeline: LDMPipeline, tmp_path: Path, name: str) -> None:
    damage, told = DAMAGES[name]
    pipeline.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ExportMismatch, match=told):
        check_pipeline(tmp_path, pipeline, loss_of(pipeline.unet))


def test_an_export_of_other_weights_than_the_average_is_found(pipeline: LDMPipeline, tmp_path: Path) -> None:
    """What is in memory and on the disk agree with each other, but not with what was trained."""
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ExportMismatch, match="unet: loss"):
        check_pipeline(tmp_path, pipeline, 1.01 * loss_of(pipeline.unet))


def test_a_run_keeps_its_old_pipeline_and_its_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    road.draw_folder(tmp_path / "data")
    tiny.save_text_encoder(tmp_path / "text", "bert")
    tiny.build_vae(tiny.VAEConfig(channels=(16, 16))).save_pretrained(tmp_path / "vae")
    words = {"vae": str(tmp_path / "vae"), "loop__sample_every": 0, "loop__evaluate_every": 0}
    train_ldm(road.recipe(tmp_path, loop__steps=3, **words))
    file = tmp_path / "run/pipeline/unet/diffusion_pytorch_model.safetensors"
    before = sha256(file)

    real = UNet2DConditionModel.save_pretrained

    def damaging(self: Any, folder: Any, **how: Any) -> None:
        real(self, folder, **how)
        one_bit(Path(folder).parent, "unet")

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", damaging)
    with pytest.raises(RunError, match=r"the pipeline of step 6, left in .*\.pipeline\.new, is not what was trained"):
        train_ldm(road.recipe(tmp_path, **words))
    assert sha256(file) == before
    monkeypatch.undo()
    train_ldm(road.recipe(tmp_path, **words))
    assert sha256(file) != before
    assert not (tmp_path / "run/.pipeline.new").exists()
