"""LDMPipeline: what stock diffusers draws, from the seed alone, and no bad value gets through."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch

from ldm.diffusion.parameterization import DIFFUSERS_NAMES, Prediction
from ldm.diffusion.schedule import NoiseSchedule
from ldm.pipelines.text_to_image import LDMPipeline

SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "guided": {"prompt": "red heart", "guidance_scale": 4.0, "num_inference_steps": 4},
    "unguided": {"prompt": "red heart", "guidance_scale": 1.0, "num_inference_steps": 4},
    "negative": {"prompt": "cat face", "negative_prompt": "blue", "guidance_scale": 3.0, "num_inference_steps": 3},
    "size": {"prompt": "rocket", "height": 24, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0},
}


@pytest.fixture(scope="module")
def loaded(tiny_pipeline_folder: Path) -> LDMPipeline:
    """For tests that change nothing in it."""
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded: LDMPipeline) -> LDMPipeline:
    """The same networks in a pipeline of the test's own."""
    pipe = LDMPipeline(**loaded.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: Any = "red heart", **arguments: Any) -> np.ndarray:
    """Pictures [N,H,W,3] in [0,1], in few steps."""
    arguments = {"num_inference_steps": 3, "output_type": "np", **arguments}
    return np.asarray(pipe(prompt, **arguments).images)


# --- the contract on disk ------------------------------------------------------------------------------


def test_stock_diffusers_draws_the_identical_array_in_a_process_without_ldm(
    tiny_pipeline_folders: dict[tiny.Kind, Path], tmp_path: Path
) -> None:
    cases: list[dict[str, Any]] = []
    for kind, folder in tiny_pipeline_folders.items():
        for name in ARGUMENTS:
            swapped = SCHEDULERS if name in ("guided", "unguided") and kind != "t5" else ()
            for scheduler in (None, *swapped):
                cases.append(
                    {"class": "DiffusionPipeline", "folder": str(folder), "name": name, "scheduler": scheduler}
                )
    for opener in ("StableDiffusionPipeline", "AutoPipelineForText2Image"):
        folder = tiny_pipeline_folders["bert"]
        cases.append({"class": opener, "folder": str(folder), "name": "guided", "scheduler": None})
    for number, case in enumerate(cases):
        case |= {"out": str(tmp_path / f"{number}.npy"), "seed": number, "arguments": ARGUMENTS[case["name"]]}
    (tmp_path / "cases.json").write_text(json.dumps(cases), "utf-8")

    command = [sys.executable, str(Path(__file__).parents[1] / "stock_draws.py"), str(tmp_path / "cases.json")]
    # how sums are rounded depends on it, and tests before this one may have set it
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **threads}
    )
    assert done.returncode == 0, done.stderr
    assert "drawn without ldm" in done.stdout

    loaded = {str(folder): LDMPipeline.from_pretrained(folder) for folder in tiny_pipeline_folders.values()}
    saved = {folder: pipe.scheduler for folder, pipe in loaded.items()}
    for case in cases:
        pipe, scheduler = loaded[case["folder"]], saved[case["folder"]]
        pipe.set_progress_bar_config(disable=True)
        swapped = case["scheduler"] or type(scheduler).__name__
        pipe.scheduler = getattr(diffusers, swapped).from_config(scheduler.config)
        ours = draw(pipe, generator=torch.Generator().manual_seed(case["seed"]), **case["arguments"])
        stock = np.load(case["out"])
        assert ours.shape == stock.shape
        assert ours.std() > 0.01, "a flat picture proves nothing"
        assert np.abs(ours - stock).max() == 0, case


def test_the_folder_names_stock_classes_and_holds_safetensors_alone(
    tiny_pipeline_folders: dict[tiny.Kind, Path],
) -> None:
    for folder in tiny_pipeline_folders.values():
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        assert index["_class_name"] == "StableDiffusionPipeline"
        libraries = {value[0] for value in index.values() if isinstance(value, list)}
        assert libraries == {"diffusers", "transformers", None}
        suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert suffixes == {".json", ".safetensors"}
        assert not any("pytest" in path.read_text("utf-8") for path in folder.rglob("*.json")), "a path of this machine"


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_the_saved_scheduler_walks_the_trained_process(tmp_path: Path, name: str, prediction: Prediction) -> None:
    schedule = NoiseSchedule.from_name(name, 100)
    tiny.pipeline(tmp_path / "encoder", schedule=schedule, prediction=prediction).save_pretrained(tmp_path / "pipeline")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline", use_safetensors=True)
    config = pipe.scheduler.config
    assert config.prediction_type == DIFFUSERS_NAMES[prediction]
    assert config.num_train_timesteps == 100
    assert config.clip_sample is False
    expected = schedule.alpha.numpy() ** 2
    for scheduler in (pipe.scheduler, *(getattr(diffusers, name).from_config(config) for name in SCHEDULERS)):
        assert scheduler.config.prediction_type == DIFFUSERS_NAMES[prediction]
        assert not getattr(scheduler.config, "clip_sample", False)
        np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), expected, atol=1e-6)


def test_a_zero_terminal_snr_process_survives_the_folder_and_draws(tmp_path: Path) -> None:
    schedule = NoiseSchedule.from_name("scaled_linear", zero_terminal_snr=True)
    tiny.pipeline(tmp_path / "encoder", schedule=schedule, prediction="v").save_pretrained(tmp_path / "pipeline")
    pipe = LDMPipeline.from_pretrained(tmp_path / "pipeline")
    found = pipe.scheduler.alphas_cumprod.numpy()
    np.testing.assert_allclose(found[:-1], schedule.alpha_bar.numpy()[:-1], atol=1e-6)
    assert found[-1] < 1e-6  # diffusers' solver keeps a trace of signal to divide by
    assert draw(pipe, seed=1).std() > 0.01


def test_what_training_knows_it_can_draw_comes_back_with_the_model(tmp_path: Path, pipe: LDMPipeline) -> None:
    assert pipe.example_prompts == ()
    pipe.example_prompts = ("red heart", "flag: Japan")
    pipe.save_pretrained(tmp_path / "again")
    assert LDMPipeline.from_pretrained(tmp_path / "again").example_prompts == ("red heart", "flag: Japan")


# --- loading -------------------------------------------------------------------------------------------


def test_a_run_folder_hints_at_its_pipeline_and_a_missing_one_says_so(
    tmp_path: Path, tiny_pipeline_folder: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder; expected a pipeline's, .*$"):
        LDMPipeline.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pipeline").symlink_to(tiny_pipeline_folder)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*run/pipeline\?"):
        LDMPipeline.from_pretrained(tmp_path / "run")
    assert draw(LDMPipeline.from_pretrained(str(tmp_path / "run/pipeline")), seed=1).std() > 0.01


def test_a_relative_path_of_two_parts_is_a_folder_where_its_parent_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"runs/demo: there is no such folder"):
        LDMPipeline.from_pretrained("runs/demo")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_pickled_weights_are_refused(tmp_path: Path, pipe: LDMPipeline, component: str) -> None:
    pipe.save_pretrained(tmp_path)
    (weights,) = (tmp_path / component).glob("*.safetensors")
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(getattr(pipe, component).state_dict(), weights.with_name(name))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        LDMPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors: expected True"):
        LDMPipeline.from_pretrained(tmp_path, use_safetensors=False)


def test_loading_warns_of_nothing(
    tiny_pipeline_folders: dict[tiny.Kind, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="diffusers")  # the command line, if a test ran it, has silenced it
    for folder in tiny_pipeline_folders.values():
        LDMPipeline.from_pretrained(folder)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    diffusers.DiffusionPipeline.from_pretrained(tiny_pipeline_folders["bert"], use_safetensors=True)
    assert "Expected types" in caplog.text, "stock diffusers warns, or this test hears nothing"


# --- a picture and its seed ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("how", ["seed", "generator"])
def test_a_picture_depends_on_its_own_seed_and_not_on_its_batch(pipe: LDMPipeline, scheduler: str, how: str) -> None:
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    prompts, seeds = ["red heart", "cat face", "rocket"], [11, 5, 8]

    def by(seeds: list[int]) -> dict[str, Any]:
        return {"seed": seeds} if how == "seed" else {"generator": [torch.Generator().manual_seed(s) for s in seeds]}

    together = draw(pipe, prompts, **by(seeds))
    for i in range(3):
        alone = draw(pipe, prompts[i], **by([seeds[i]]))[0]
        # kernels may round differently for another batch size; another seed is another picture
        assert np.abs(together[i] - alone).max() <= 1 / 255
        assert np.abs(draw(pipe, prompts[i], **by([seeds[i] + 1]))[0] - alone).max() > 0.1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_seed_counts_on_from_picture_to_picture(pipe: LDMPipeline, eta: float) -> None:
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    drawn = draw(pipe, ["red heart", "rocket"], num_images_per_prompt=2, seed=7, eta=eta)
    generated = draw(
        pipe, ["red heart", "rocket"], num_images_per_prompt=2, generator=torch.Generator().manual_seed(7), eta=eta
    )
    assert np.abs(drawn - generated).max() == 0
    for i, prompt in enumerate(["red heart", "red heart", "rocket", "rocket"]):
        assert np.abs(drawn[i] - draw(pipe, prompt, seed=7 + i, eta=eta)[0]).max() <= 1 / 255


def test_a_generator_that_is_used_again_gives_other_pictures(pipe: LDMPipeline) -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = np.concatenate([draw(pipe, ["red heart"] * 3, generator=generator) for _ in range(3)])
    differences = np.abs(drawn[:, None] - drawn[None]).max((2, 3, 4)) + np.eye(9)
    assert differences.min() > 0.1


def test_without_a_seed_every_picture_is_another_one(pipe: LDMPipeline) -> None:
    first, second = draw(pipe, ["red heart"] * 2)
    assert np.abs(first - second).max() > 0.1
    assert np.abs(first - draw(pipe)[0]).max() > 0.1


def test_a_negative_prompt_without_guidance_is_remarked(pipe: LDMPipeline, recwarn: pytest.WarningsRecorder) -> None:
    plain = draw(pipe, "red heart", seed=1, guidance_scale=1.0)
    draw(pipe, "red heart", seed=1, guidance_scale=3.0, negative_prompt="blue")
    assert not [warning for warning in recwarn if "negative_prompt" in str(warning.message)]
    with pytest.warns(UserWarning, match="negative_prompt: it has no effect since there is no guidance at guidance"):
        made = draw(pipe, "red heart", seed=1, guidance_scale=1.0, negative_prompt="blue")
    assert np.abs(made - plain).max() == 0  # as in stock diffusers


def test_the_prompt_the_negative_prompt_and_the_scale_matter(pipe: LDMPipeline) -> None:
    plain = draw(pipe, "red heart", seed=1)
    for arguments in ({"prompt": "rocket"}, {"negative_prompt": "red"}, {"guidance_scale": 6.0}, {"guidance_scale": 1}):
        assert np.abs(draw(pipe, **{"seed": 1, **arguments}) - plain).max() > 1e-3, arguments
    # the null caption is the empty text, and one negative prompt serves all
    assert np.abs(draw(pipe, "red heart", seed=1, negative_prompt="") - plain).max() == 0
    each = draw(pipe, ["red heart", "cat"], seed=1, negative_prompt=["blue", "blue"])
    assert np.abs(draw(pipe, ["red heart", "cat"], seed=1, negative_prompt="blue") - each).max() == 0


def test_one_edge_alone_keeps_the_other_at_its_default(pipe: LDMPipeline) -> None:
    # stock pipelines ignore a height that comes without a width
    assert draw(pipe, height=32, seed=1).shape == (1, 32, tiny.SIZE, 3)
    assert draw(pipe, width=24, seed=1).shape == (1, tiny.SIZE, 24, 3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_step_and_the_most_steps_are_drawn(tmp_path: Path, scheduler: str) -> None:
    pipe = tiny.pipeline(tmp_path, schedule=NoiseSchedule.cosine(20), prediction="v")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    for steps in (1, 20):
        assert np.isfinite(draw(pipe, seed=1, num_inference_steps=steps)).all()


def test_embeddings_take_the_place_of_prompts(pipe: LDMPipeline) -> None:
    positive, negative = pipe.encode_prompt("red heart", pipe.device, 1, True)
    embedded = draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative, seed=1)
    assert np.abs(embedded - draw(pipe, "red heart", seed=1)).max() == 0


def test_numbers_of_numpy_are_numbers(pipe: LDMPipeline) -> None:
    numpy = draw(
        pipe, seed=np.int64(1), num_inference_steps=np.int32(3), guidance_scale=np.float32(3), height=np.int64(16)
    )
    assert np.abs(numpy - draw(pipe, seed=1, guidance_scale=3)).max() == 0


# --- bad values ----------------------------------------------------------------------------------------

ONE = torch.Generator()
BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_inference_steps": 0}, r"num_inference_steps: expected a whole number from 1 to 1000, got 0"),
    ({"num_inference_steps": -1}, r"num_inference_steps: .* from 1 to 1000, got -1"),
    ({"num_inference_steps": 1001}, r"num_inference_steps: .* from 1 to 1000, got 1001"),
    ({"num_inference_steps": True}, r"num_inference_steps: .* got True"),
    ({"num_inference_steps": 4.0}, r"num_inference_steps: .* got 4.0"),
    ({"num_inference_steps": "4"}, r"num_inference_steps: .* got '4'"),
    ({"guidance_scale": float("nan")}, r"guidance_scale: expected a number from 0 to 100, got nan"),
    ({"guidance_scale": float("inf")}, r"guidance_scale: .* from 0 to 100, got inf"),
    ({"guidance_scale": -1}, r"guidance_scale: .* from 0 to 100, got -1"),
    ({"guidance_scale": True}, r"guidance_scale: .* got True"),
    ({"guidance_scale": "3"}, r"guidance_scale: .* got '3'"),
    ({"guidance_rescale": 2}, r"guidance_rescale: expected a number from 0 to 1, got 2"),
    ({"eta": float("nan")}, r"eta: expected a number from 0 to 1, got nan"),
    ({"height": 30}, r"height: expected a multiple of 8 from 8 to 4096, got 30"),
    ({"height": 0}, r"height: .* got 0"),
    ({"height": -16}, r"height: .* got -16"),
    ({"width": 16.0}, r"width: .* got 16.0"),
    ({"width": 4104}, r"width: .* from 8 to 4096, got 4104"),
    ({"width": True}, r"width: .* got True"),
    ({"prompt": None}, r"prompt: expected a text or a list of texts, got NoneType"),
    ({"prompt": 5}, r"prompt: expected a text or a list of texts, got int"),
    ({"prompt": b"cat"}, r"prompt: expected a text or a list of texts, got bytes"),
    ({"prompt": []}, r"prompt: expected at least one text, got an empty list"),
    ({"prompt": ["cat", 5]}, r"prompt: expected texts, got int 5"),
    ({"prompt": ["cat", None]}, r"prompt: expected texts, got NoneType"),
    ({"prompt": ["cat", ["dog"]]}, r"prompt: expected texts, got list"),
    ({"prompt": "cat " * 300}, r"prompt: expected at most 12 tokens, got 302 in 'cat cat .*…'; use fewer words"),
    ({"prompt": ["cat", "cat " * 300]}, r"prompt: expected at most 12 tokens, got 302"),
    ({"prompt": "cat " * 300, "prompt_embeds": None}, r"prompt: expected at most 12 tokens"),
    ({"negative_prompt": "cat " * 300}, r"negative_prompt: expected at most 12 tokens, got 302"),
    ({"negative_prompt": 5}, r"negative_prompt: expected a text or a list of texts, got int"),
    ({"negative_prompt": []}, r"negative_prompt: expected at least one text"),
    ({"negative_prompt": ["red", "blue"]}, r"negative_prompt: expected 1 or 1, one for each picture asked for, got 2"),
    ({"prompt": ["a", "b", "c"], "negative_prompt": ["red", "blue"]}, r"negative_prompt: expected 1 or 3, .* got 2"),
    ({"num_images_per_prompt": 0}, r"num_images_per_prompt: expected a whole number from 1 to 1024, got 0"),
    ({"num_images_per_prompt": None}, r"num_images_per_prompt: .* got None"),
    ({"generator": [ONE, ONE]}, r"generator: expected one for all or one per picture \(1\), got 2"),
    ({"generator": []}, r"generator: expected one for all or one per picture \(1\), got 0"),
    ({"generator": [ONE], "num_images_per_prompt": 2}, r"generator: .* one per picture \(2\), got 1"),
    ({"generator": 5}, r"generator: expected a torch.Generator or a list of them, got int"),
    ({"generator": [5]}, r"generator: expected a torch.Generator or a list of them"),
    ({"seed": [1, 2]}, r"seed: expected one for all or one per picture \(1\), got 2"),
    ({"seed": -1}, r"seed: expected a whole number from 0 to 9223372036854775807, got -1"),
    ({"seed": 2**63}, r"seed: .* got 9223372036854775808"),
    ({"seed": 1.5}, r"seed: .* got 1.5"),
    ({"seed": True}, r"seed: .* got True"),
    ({"seed": "7"}, r"seed: .* got '7'"),
    ({"seed": 1, "generator": ONE}, r"seed: give a seed or a generator, not both"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_value_is_named_before_any_network_runs(
    loaded: LDMPipeline, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    def ran(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a network ran")

    for network in (loaded.text_encoder, loaded.unet, loaded.vae.decoder):
        monkeypatch.setattr(network, "forward", ran)
    with pytest.raises(ValueError, match="^" + message):
        loaded(**{"prompt": "red heart", **arguments})


def test_a_misspelled_argument_is_an_error(pipe: LDMPipeline) -> None:
    with pytest.raises(TypeError, match="guidence_scale: there is no such argument"):
        pipe("red heart", guidence_scale=3)


def test_the_largest_seed_counts_on(pipe: LDMPipeline) -> None:
    first, second = draw(pipe, num_images_per_prompt=2, seed=2**63 - 1)
    assert np.abs(first - second).max() > 0.1


def test_saving_as_pickle_is_refused(pipe: LDMPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safe_serialization: expected True"):
        pipe.save_pretrained(tmp_path / "pickles", safe_serialization=False)
    with pytest.raises(ValueError, match="push_to_hub: save first"):
        pipe.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    assert not list(tmp_path.iterdir()), "nothing is written that was refused"


def test_a_download_is_announced_and_only_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError("offline")

    def printed() -> str:
        with pytest.raises(FileNotFoundError, match="models/mine: there is no such folder, and none of this name"):
            LDMPipeline.from_pretrained("models/mine", cache_dir=tmp_path / "cache")
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    assert "models/mine is no folder here; taking it from the Hub" in printed()
    place = tmp_path / "cache/models--models--mine"
    for file, text in (("snapshots/abc/model_index.json", "{}"), ("refs/main", "abc")):
        (place / file).parent.mkdir(parents=True)
        (place / file).write_text(text)
    assert "Hub" not in printed()
