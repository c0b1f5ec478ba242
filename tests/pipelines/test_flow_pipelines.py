"""A model of rectified flow is a stock folder: stock pipelines give its pictures to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
from test_editing import half, photo, run, seeded

from ldm.diffusion.schedule import RectifiedFlow
from ldm.inference.samplers import FLOW, OURS, STOCK, build
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.training.initial_model import InitialModel
from ldm.training.objective import DiffusionConfig, build_schedule, build_timesteps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("flow")
    tiny.pipeline(home, schedule=RectifiedFlow.straight(shift=2.0), prediction="flow").save_pretrained(home / "model")
    return home / "model"


@pytest.fixture(scope="module")
def pipe(folder: Path) -> LDMPipeline:
    loaded = LDMPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def stock(name: str, pipe: LDMPipeline) -> Any:
    made = getattr(diffusers, name)(**pipe.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name", FLOW)
def test_stock_gives_the_same_picture(name: str, folder: Path, pipe: LDMPipeline) -> None:
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    assert type(theirs) is diffusers.StableDiffusionPipeline
    assert theirs.scheduler.config.prediction_type == "flow_prediction" and theirs.scheduler.config.flow_shift == 2.0
    kind, more = STOCK[name]
    theirs.scheduler = getattr(diffusers, kind).from_config({**theirs.scheduler.config, **more})
    assert np.array_equal(run(pipe, sampler=name), run(theirs))


def test_pictures_are_changed_with_stock_s_bits(pipe: LDMPipeline) -> None:
    given = {"image": photo(), "strength": 0.7}
    assert np.array_equal(run(pipe, **given), run(stock("StableDiffusionImg2ImgPipeline", pipe), **given))
    masked: dict[str, Any] = {**given, "mask_image": half(), "output_type": "latent"}
    theirs = stock("StableDiffusionInpaintPipeline", pipe)("red heart", **masked, num_inference_steps=5,
                                                           guidance_scale=3.0, generator=seeded()).images  # fmt: skip
    assert np.array_equal(run(pipe, **masked), np.asarray(theirs))


def test_other_samplers_are_refused_by_name(pipe: LDMPipeline) -> None:
    for name in [*STOCK, *OURS]:
        if name in FLOW:
            build(name, pipe.scheduler.config)
            continue
        with pytest.raises(
            ValueError, match=rf"sampler: {name.replace('+', '.')} does not support rectified flow; use dpm"
        ):
            build(name, pipe.scheduler.config)


def test_training_can_start_from_it(folder: Path) -> None:
    brought = InitialModel.open(str(folder)).brings()["diffusion"]
    config = DiffusionConfig(**{name: value for name, value in brought.items() if value is not ...})
    assert (config.schedule, config.prediction, config.flow_shift) == ("rectified_flow", "flow", 2.0)
    schedule = build_schedule(config)
    assert isinstance(schedule, RectifiedFlow) and schedule.shift == 2.0
    assert build_timesteps(config, schedule) is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, r"diffusion\.prediction: rectified_flow needs flow, got eps"),
        (
            {"prediction": "flow", "zero_terminal_snr": True},
            r"diffusion\.zero_terminal_snr: rectified_flow needs false",
        ),
        ({"prediction": "flow", "loss": "vlb"}, r"diffusion\.loss: rectified_flow needs l2 or l1, got vlb"),
        ({"prediction": "flow", "variance": "learned"}, r"diffusion\.variance: rectified_flow needs fixed"),
        ({"prediction": "flow", "timestep_sampling": "loss_second_moment"}, r"needs uniform or logit_normal"),
        ({"schedule": "linear", "prediction": "flow"}, r"diffusion\.prediction: flow is along a straight path"),
        ({"schedule": "linear", "flow_shift": 3.0}, r"diffusion\.flow_shift: it is rectified_flow's"),
        ({"prediction": "flow", "flow_shift": 0.0}, r"diffusion\.flow_shift"),
    ],
)
def test_what_has_no_meaning_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**{"schedule": "rectified_flow", **words})


def test_the_default_is_the_eps_loss() -> None:
    plain = DiffusionConfig()
    assert (plain.prediction, plain.loss, plain.weighting, plain.timestep_sampling) == ("eps", "l2", "none", "uniform")
    assert plain.schedule == "scaled_linear"
