"""What only a GPU can show: nothing waits for it, it learns what a CPU learns, and it draws what a CPU draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from accelerate.state import AcceleratorState

from ldm.models.conditioning import Conditioning
from ldm.models.unet import UNetConfig, build_unet, choose_attention
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.training.config import Config, LoopConfig
from ldm.training.distributed import build_accelerator
from ldm.training.objective import DiffusionConfig
from ldm.training.samples import Batch
from ldm.training.tasks.diffusion import Diffusion
from ldm.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, a text encoder, and a VAE."""
    folder = tmp_path_factory.mktemp("road")
    road.draw_folder(folder / "data")
    tiny.save_text_encoder(folder / "text", "bert")
    road.launch("train_vae", road.save_recipe(road.recipe(folder), folder / "recipe.yaml"))
    return folder


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    """Inside, torch raises where the CPU would wait for the GPU."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate remembers device and precision for as long as a process lives."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_of(diffusion: DiffusionConfig) -> tuple[Trainer, Batch]:
    shape, device = (4, 8, 8), torch.device("cuda")
    unet = build_unet(
        UNetConfig(channels=(32, 64), attention=(False, True), layers=1, head_channels=16),
        latent_shape=shape,
        context_dim=32,
    )
    config = Config(diffusion=diffusion, loop=LoopConfig(half_size_steps=1))
    accelerator = build_accelerator(config.loop)
    assert accelerator.device.type == "cuda" and choose_attention(unet, accelerator.device) in ("SDPA", "xformers")
    batch = Batch(
        x0=torch.randn(6, *shape, device=device),
        conditioning=Conditioning(torch.randn(6, 7, 32, device=device)),
        u=torch.rand(6, dtype=torch.float64),
        eps=torch.randn(6, *shape, device=device),
    )
    task = Diffusion(config, accelerator)
    task.train(unet)
    return Trainer(task), batch


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("weighting", ["none", "min_snr"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_no_step_waits_for_the_gpu(prediction: str, weighting: str, request: pytest.FixtureRequest) -> None:
    chosen: dict[str, Any] = {"prediction": prediction, "weighting": weighting}
    diffusion = DiffusionConfig(timestep_sampling="logit_normal", **chosen)
    trainer, batch = trainer_of(diffusion)
    for step in range(2):
        trainer.step(step, [batch, batch])
    request.getfixturevalue("waiting_is_an_error")
    for step in range(2):  # the first at half the size
        trainer.step(step, [batch, batch])


@pytest.mark.usefixtures("waiting_is_an_error")
def test_waiting_would_be_noticed() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


def train(home: Path, run: Path, *words: str, cpu: bool = False) -> list[float]:
    """Train by the command that people type; returns the loss of each step."""
    vae = f"vae={home / 'run' / 'vae'}"
    said = road.launch("train_ldm", home / "recipe.yaml", f"run={run}", vae, "loop.log_every=1", *words, cpu=cpu)
    assert f"on {'cpu' if cpu else 'cuda'}" in said
    return list(road.logged(run, "ldm/loss").values())


def test_a_gpu_learns_in_bf16_and_resumes(home: Path, tmp_path: Path) -> None:
    whole = train(home, tmp_path / "whole", "loop.precision=auto")
    train(home, tmp_path / "parts", "loop.precision=auto", "loop.steps=3")
    parts = train(home, tmp_path / "parts", "loop.precision=auto")
    assert len(whole) == 6
    assert np.allclose(parts, whole, rtol=1e-2, atol=0)  # some of its sums have no fixed order
    assert (tmp_path / "whole/samples/step_0000006.png").exists()


def test_a_gpu_learns_what_a_cpu_learns(home: Path, tmp_path: Path) -> None:
    """From the same samples: chance is decided on the CPU, whatever the device."""
    of_gpu, of_cpu = (train(home, tmp_path / str(cpu), cpu=cpu) for cpu in (False, True))
    assert len(of_gpu) == 6
    assert np.allclose(of_gpu, of_cpu, rtol=1e-2, atol=0)  # its convolutions multiply in TF32
    assert of_gpu != of_cpu


def test_a_gpu_generates_what_a_cpu_generates(tiny_pipeline_folder: Path) -> None:
    pipeline = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for device in ("cpu", "cuda"):
        pipeline.to(device)
        (picture,) = pipeline("red heart", num_inference_steps=5, guidance_scale=3.0, seed=1).images
        drawn.append(np.asarray(picture).astype(float))
    assert abs(drawn[0] - drawn[1]).mean() < 2
    assert drawn[0].std() > 5  # and there is something to compare
