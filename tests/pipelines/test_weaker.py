"""Autoguidance by a model's folder, and dynamic thresholding: the formula, stock's bits, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.cli.main import main
from ldm.data.labels import Labels
from ldm.inference import samplers
from ldm.pipelines.text_to_image import LDMPipeline

FEW: dict[str, Any] = {"num_inference_steps": 3, "seed": 0, "output_type": "latent"}


@pytest.fixture
def pipe(tiny_pipeline_folder: Path) -> LDMPipeline:
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def weaker(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights in its U-Net."""
    folder = tmp_path_factory.mktemp("weaker") / "pipeline"
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.mul_(0.9)
    pipe.save_pretrained(folder)
    return folder


# --- autoguidance ----------------------------------------------------------------------------------


@torch.no_grad()
def written_out(pipe: LDMPipeline, weaker: Path, scale: float) -> Tensor:
    """weak + scale (strong - weak), both with the prompt (Karras et al. 2024), through stock's scheduler."""
    weak = diffusers.UNet2DConditionModel.from_pretrained(weaker / "unet")
    context, _ = pipe.encode_prompt("red heart", torch.device("cpu"), 1, False)
    size = pipe.unet.config.sample_size
    x = torch.randn(1, pipe.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(3)
    for t in pipe.scheduler.timesteps:
        strong, other = (net(x, t, encoder_hidden_states=context).sample for net in (pipe.unet, weak))
        x = pipe.scheduler.step(other + scale * (strong - other), t, x).prev_sample
    return x


@pytest.mark.parametrize(("scale", "named"), [(2.0, None), (1.5, 1.5)])
def test_a_folder_names_the_weaker_model(pipe: LDMPipeline, weaker: Path, scale: float, named: float | None) -> None:
    found = pipe("red heart", weaker=weaker, autoguidance_scale=named, **FEW).images
    assert (found - written_out(pipe, weaker, scale)).abs().max() == 0
    again = pipe("red heart", weak_unet=pipe.weaker_unet(weaker), guidance_scale=scale, **FEW).images
    assert torch.equal(found, again)
    assert torch.equal(pipe("red heart", weaker=weaker, autoguidance_scale=1, **FEW).images,
                       pipe("red heart", guidance_scale=1, **FEW).images)  # fmt: skip


def test_it_is_loaded_once(pipe: LDMPipeline, weaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pipe.weaker_unet(weaker)
    monkeypatch.setattr("ldm.pipelines.text_to_image.load_weaker", None)
    assert pipe.weaker_unet(weaker) is first


def other_vae(pipe: LDMPipeline) -> None:
    with torch.no_grad():
        next(iter(pipe.vae.parameters())).mul_(1.1)


def other_text(pipe: LDMPipeline) -> None:
    with torch.no_grad():
        next(iter(pipe.text_encoder.parameters())).mul_(1.1)


def other_prediction(pipe: LDMPipeline) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")


def other_process(pipe: LDMPipeline) -> None:
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_schedule="squaredcos_cap_v2")


def with_classes(pipe: LDMPipeline) -> None:
    pipe.labels = Labels("kind", ("cat", "dog"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_vae, "VAE"),
        (other_text, "text encoder"),
        (other_prediction, r"kind of prediction \(v, not eps\)"),
        (other_process, "noise schedule"),
        (with_classes, "set of classes"),
    ],
)
def test_a_model_that_speaks_of_something_else_is_refused(
    pipe: LDMPipeline, tiny_pipeline_folder: Path, tmp_path: Path, change: Callable[[LDMPipeline], None], what: str
) -> None:
    other = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    change(other)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"weaker: .*other has another {what} than the model"):
        pipe("cat", weaker=tmp_path / "other", **FEW)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"autoguidance_scale": 2}, "autoguidance_scale: there is no weaker model"),
        ({"weaker": "x", "guidance_scale": 2}, "guidance_scale: with a weaker model it is autoguidance_scale"),
        ({"weaker": "x", "negative_prompt": "dog"}, "negative_prompt: guidance moves away from the weaker model"),
        ({"weaker": "x", "weak_unet": object()}, "weaker: give weaker, a model's folder, or weak_unet"),
        ({"weaker": "x", "autoguidance_scale": -1}, "guidance_scale: expected a number from 0 to 100"),
    ],
)
def test_contradictions_are_refused(pipe: LDMPipeline, given: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        pipe("cat", **given, **FEW)


def test_the_command_line_and_the_picture_know_the_weaker_model(
    tiny_pipeline_folder: Path, weaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, again = str(tiny_pipeline_folder), str(tmp_path / "a.png"), str(tmp_path / "b.png")
    words = ["--steps", "2", "--dtype", "float32", "--out"]
    main(["sample", model, "cat", *words, out, "--weaker", str(weaker), "--autoguidance-scale", "1.5"])
    with pytest.raises(SystemExit) as stopped:
        main(["sample", model, "--like", out, "--out", again])
    assert "it was guided by a weaker model; name it with --weaker" in str(stopped.value)
    main(["sample", model, "--like", out, "--out", again, "--weaker", str(weaker)])
    assert "the same picture, byte for byte" in capsys.readouterr().out
    main(["sample", model, "--like", out, "--out", again, "--weaker", str(weaker), "--autoguidance-scale", "3"])
    assert "guidance_scale: 1.5 then, 3.0 now" in capsys.readouterr().out
    assert Image.open(out).tobytes() != Image.open(again).tobytes()
    with pytest.raises(SystemExit) as stopped:
        main(["sample", model, "cat", *words, out, "--autoguidance-scale", "3"])
    assert "--autoguidance-scale: there is no --weaker model" in str(stopped.value)


# --- dynamic thresholding --------------------------------------------------------------------------


@pytest.mark.parametrize("name", samplers.THRESHOLDING)
def test_dynamic_thresholding_is_stocks(pipe: LDMPipeline, tiny_pipeline_folder: Path, name: str) -> None:
    found = pipe("cat", sampler=name, dynamic_thresholding=0.9, guidance_scale=3.0, **FEW).images
    plain = pipe("cat", sampler=name, guidance_scale=3.0, **FEW).images
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    stock.set_progress_bar_config(disable=True)
    kind, more = samplers.STOCK[name]
    on = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1e9, **more}
    stock.scheduler = getattr(diffusers, kind).from_config(stock.scheduler.config, **on)
    seeded = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3, "output_type": "latent"}
    assert torch.equal(found, stock("cat", guidance_scale=3.0, **seeded).images)
    assert (found - plain).abs().max() > 0.01


def test_the_pipelines_own_scheduler_stays_as_it_is(pipe: LDMPipeline) -> None:
    before = pipe("cat", **FEW).images
    assert not torch.equal(pipe("cat", dynamic_thresholding=0.9, **FEW).images, before)
    assert torch.equal(pipe("cat", **FEW).images, before)


@pytest.mark.parametrize("name", ["euler", "heun", "pndm", "pc", "ode"])
def test_samplers_without_it_are_refused_by_name(pipe: LDMPipeline, name: str) -> None:
    with pytest.raises(ValueError, match=r"dynamic_thresholding: \w+ has none; use one of the samplers ddpm, ddim"):
        pipe("cat", sampler=name, dynamic_thresholding=0.9, **FEW)


@pytest.mark.parametrize("quantile", [0, 1.5, "high", True, float("nan")])
def test_a_quantile_lies_in_its_range(pipe: LDMPipeline, quantile: Any) -> None:
    with pytest.raises(ValueError, match="dynamic_thresholding: expected a quantile above 0, up to 1"):
        pipe("cat", dynamic_thresholding=quantile, **FEW)


def test_the_picture_remembers_its_threshold(
    tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, again = str(tiny_pipeline_folder), str(tmp_path / "a.png"), str(tmp_path / "b.png")
    main(["sample", model, "cat", "--steps", "2", "--dtype", "float32", "--dynamic-thresholding", "0.9", "--out", out])
    main(["sample", model, "--like", out, "--out", again])
    assert "the same picture, byte for byte" in capsys.readouterr().out
