"""A student of few steps behind a model: stock's bits from the same LoRA, and a model that is otherwise as it was."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import road
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm import LDMPipeline
from ldm.cli.find import find_model
from ldm.cli.main import main
from ldm.models.fingerprint import model_sha256
from ldm.models.lora import WEIGHTS, LoRAConfig
from ldm.models.safety import check_model_folder
from ldm.pipelines.student import StudentDefaults
from ldm.sharing import hub, png_metadata
from ldm.sharing.export import export
from ldm.sharing.model_card import Terms

pytest.importorskip("peft")

TARGETS = ("to_q", "to_out.0", "ff.net.2", "conv1", "conv_shortcut", "proj_in", "time_emb_proj")


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def lora(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's LoRA of four steps."""
    folder = tmp_path_factory.mktemp("student") / "run/lora"
    tiny.lora(tiny_pipeline_folder, folder, LoRAConfig(rank=3, alpha=6, targets=TARGETS), few_steps=4)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_pipeline_folder: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the student behind it, of two steps by default."""
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.teach(lora, 2)
    pipe.save_pretrained(out := tmp_path_factory.mktemp("taught") / "model")
    return out


def draw(pipe: Any, **words: Any) -> np.ndarray:
    noise = torch.Generator().manual_seed(5)
    return np.asarray(pipe("red heart", generator=noise, output_type="np", **words).images)


def test_it_is_what_stock_makes_of_the_lora(folder: Path) -> None:
    check_model_folder(folder)
    pipe = quiet(LDMPipeline.from_pretrained(folder))
    stock: Any = quiet(diffusers.DiffusionPipeline.from_pretrained(folder))
    assert type(stock) is diffusers.StableDiffusionPipeline
    stock.load_lora_weights(folder / "few_steps")
    stock.fuse_lora()
    stock.unload_lora_weights()
    merged, expected = pipe.student.unet.state_dict(), stock.unet.state_dict()
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in merged)
    assert any(not torch.equal(merged[name], weight) for name, weight in pipe.unet.state_dict().items())
    stock.scheduler = diffusers.DDIMScheduler.from_config(stock.scheduler.config)
    words: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16}
    assert np.array_equal(draw(pipe), draw(stock, **words))
    assert np.array_equal(draw(pipe.student, num_inference_steps=3, guidance_scale=1.0), draw(
        stock, **{**words, "num_inference_steps": 3}))  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        {"num_inference_steps": 2}, {"guidance_scale": 2.0}, {"negative_prompt": "cat"}, {"sampler": "ddim"},
        {"image": Image.new("RGB", (16, 16), "red")}, {"guidance_interval": (0, 0.5)}, {"timesteps": [900, 300]},
        {"cross_attention_kwargs": {"scale": 1.0}}, {"eta": 0.5, "sampler": "ddim"}, {"guidance_rescale": 0.5},
        {"dynamic_thresholding": 0.9, "sampler": "ddim"},
    ],
)  # fmt: skip
def test_a_call_with_settings_is_the_model_s(folder: Path, tiny_pipeline_folder: Path, words: dict[str, Any]) -> None:
    taught, plain = (quiet(LDMPipeline.from_pretrained(one)) for one in (folder, tiny_pipeline_folder))
    assert taught.maker_of(words) is taught
    if "timesteps" not in words:  # which the model's own scheduler may not take
        assert np.array_equal(draw(taught, **words), draw(plain, **words))


def test_a_call_of_usual_values_is_the_student_s(folder: Path) -> None:
    pipe = quiet(LDMPipeline.from_pretrained(folder))
    few = draw(pipe)
    assert not np.array_equal(few, draw(pipe, num_inference_steps=2, guidance_scale=1.0, sampler="ddim"))
    usual = {"eta": 0.0, "negative_prompt": None, "guidance_rescale": 0.0, "height": 16, "num_images_per_prompt": 1}
    assert np.array_equal(few, draw(pipe, **usual))
    assert pipe.student.defaults == StudentDefaults(2, 1.0) and not pipe.student.has_student
    assert LDMPipeline.from_pretrained(folder / "few_steps").defaults == StudentDefaults(2, 1.0)


def test_what_a_call_of_the_student_leaves_out_is_its_own(folder: Path) -> None:
    """Stock's guidance scale of 7.5 would burn the pictures of a network that was trained for 1."""
    student = quiet(LDMPipeline.from_pretrained(folder / "few_steps"))
    assert np.array_equal(draw(student, num_inference_steps=3), draw(student, num_inference_steps=3, guidance_scale=1))
    assert np.array_equal(draw(student, guidance_scale=2.0), draw(student, num_inference_steps=2, guidance_scale=2.0))
    assert not np.array_equal(draw(student, guidance_scale=2.0), draw(student))


def test_a_student_without_its_weights_is_an_error(folder: Path, tmp_path: Path) -> None:
    """Not a model that generates by itself, more slowly and otherwise."""
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/few_steps" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"few_steps: {WEIGHTS} is missing; copy it there again, or remove"):
        LDMPipeline.from_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model/few_steps")
    assert not LDMPipeline.from_pretrained(tmp_path / "model").has_student


def test_adapters_and_changed_weights(folder: Path, lora: Path, tmp_path: Path) -> None:
    """A LoRA of one's own is the model's; one that is merged is the student's, too."""
    pipe = quiet(LDMPipeline.from_pretrained(folder))
    before = draw(pipe)
    tiny.lora(folder, tmp_path / "style", LoRAConfig(rank=2), seed=3)
    pipe.load_lora_weights(tmp_path / "style", adapter_name="style")
    assert pipe.maker_of({}) is pipe
    with pytest.raises(ValueError, match="student: adapters stand beside the model's weights"):
        pipe.student  # noqa: B018
    pipe.merge_adapters()
    with pytest.warns(UserWarning, match="was trained beside tiny; this model has other weights"):
        after = draw(pipe)
    assert not np.array_equal(before, after)


def test_the_command_warns_of_another_base_in_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    unet = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    save_file({name: 1.5 * weight for name, weight in load_file(unet).items()}, unet)
    words = [sys.executable, "-m", "ldm.cli.main", "sample", str(tmp_path / "model"), "cat"]
    environment = {**os.environ, "PYTHONPATH": str(road.ROOT)}
    printed = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stderr
    assert re.search(r"^warning: .* was trained beside tiny; this model has other weights", printed, re.MULTILINE)
    assert "student.py" not in printed


def test_the_command_says_how_a_lora_of_few_steps_wants_to_be_sampled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sample", str(folder), "cat", "--lora", str(folder / "few_steps"), "--steps", "1", "--guidance-scale", "1"]
    main(words)
    assert "note:" not in capsys.readouterr().err
    main([*words[:5], "--guidance-scale", "1", "--sampler", "ddim"])
    wanted = (
        f"note: {folder / 'few_steps'} is a LoRA of 4 steps without guidance: --steps 4 --guidance-scale 1 --sampler "
    )
    assert wanted in capsys.readouterr().err


def test_it_stays_with_the_model(folder: Path, tmp_path: Path) -> None:
    pipe = quiet(LDMPipeline.from_pretrained(folder))
    expected = draw(pipe)
    pipe.save_pretrained(folder)  # in place
    assert np.array_equal(draw(quiet(LDMPipeline.from_pipe(pipe))), expected)
    export(pipe, tmp_path / "half")
    half = quiet(LDMPipeline.from_pretrained(tmp_path / "half"))
    assert {one.dtype for one in load_file(tmp_path / "half/few_steps" / WEIGHTS).values()} == {torch.float16}
    assert np.abs(draw(half) - expected).max() < 0.05
    stock: Any = quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "half"))
    stock.load_lora_weights(tmp_path / "half/few_steps")  # its header is as it was
    stock.fuse_lora()
    assert all(
        torch.equal(one, half.student.unet.state_dict()[name.replace(".base_layer", "")])
        for name, one in stock.unet.state_dict().items()
        if ".lora_" not in name
    )


def test_the_card_s_pictures_are_the_model_s_and_it_names_the_student(folder: Path, tmp_path: Path) -> None:
    pipe = quiet(LDMPipeline.from_pretrained(folder))
    pipe.example_prompts = ("red heart",)
    hub.write_model(pipe, tmp_path / "card", "me/model", Terms("mit", "shapes", "mit"))
    with Image.open(tmp_path / "card/pictures/0.png") as made:
        assert np.array_equal(made, pipe("red heart", seed=0, num_inference_steps=20, guidance_scale=3.0).images[0])
        assert png_metadata.of(made, Path("0.png")).model == model_sha256(pipe)
    assert "`few_steps`: 2 steps, without guidance" in (tmp_path / "card/README.md").read_text()
    assert np.array_equal(draw(quiet(LDMPipeline.from_pretrained(tmp_path / "card"))), draw(pipe))


def test_a_student_on_the_hub_is_downloaded_with_the_options_of_its_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private model needs its token again, another cache its place, and a run without network asks nobody."""
    snapshot = tmp_path / "cache/snapshots/0123"
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("few_steps"))
    options_given: dict[str, Any] = {}

    def download(name: str, **options: Any) -> None:
        options_given.update(options, name=name)
        shutil.copytree(folder / "few_steps", snapshot / "few_steps")

    monkeypatch.setattr("ldm.pipelines.loading.find_pipeline", lambda *_, **__: snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    words: dict[str, Any] = {"token": "secret", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    assert LDMPipeline.from_pretrained("me/model", **words).has_student
    patterns = options_given.pop("allow_patterns")
    assert options_given == {"name": "me/model", "revision": "0123", **words}
    assert all(pattern.startswith("few_steps/") for pattern in patterns)


def test_each_student_has_an_evaluation_of_its_own(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    homes = [find_model(str(one / "few_steps"))[1] for one in (folder, tmp_path / "other")]
    assert homes == [Path("runs/model-few_steps-evaluation"), Path("runs/other-few_steps-evaluation")]


def test_it_has_the_model_s_engine(folder: Path) -> None:
    pytest.importorskip("openvino")
    pipe = quiet(LDMPipeline.from_pretrained(folder))
    by_torch = draw(pipe)
    pipe.enable_openvino()
    assert pipe.student.engine is not None and pipe.student.engine is not pipe.engine
    by_openvino = draw(pipe)
    assert 0 < np.abs(by_openvino - by_torch).max() < 0.05
    pipe.disable_openvino()
    assert np.array_equal(draw(pipe), by_torch)


def test_what_is_no_student_is_refused(tiny_pipeline_folder: Path, lora: Path, tmp_path: Path) -> None:
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    with pytest.raises(ValueError, match=r"student: the pipeline has none; expected one in its folder few_steps/"):
        pipe.student  # noqa: B018
    tiny.lora(tiny_pipeline_folder, tmp_path / "style", LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="expected a LoRA of few steps, trained with"):
        pipe.teach(tmp_path / "style")
    other = LDMPipeline(**{**pipe.components, "unet": pipe.vae}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="is the LoRA of another model"):
        other.teach(lora)
    tiny.lora(tiny_pipeline_folder, tmp_path / "dora", LoRAConfig(rank=2, dora=True), few_steps=2)
    pipe.teach(tmp_path / "dora")
    with pytest.raises(ValueError, match="expected a plain LoRA of the U-Net, got"):
        draw(pipe)


def test_the_commands(folder: Path, tiny_pipeline_folder: Path, lora: Path, tmp_path: Path, capsys: Any,
                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    main(["export", str(tiny_pipeline_folder), "models/fast", "--few-steps", f"{lora.parent}:2"])
    tiny.lora(tiny_pipeline_folder, tmp_path / "style", LoRAConfig(rank=2))
    capsys.readouterr()
    main(["export", "models/fast", "models/style", "--lora", "style"])
    assert "student is left out" in capsys.readouterr().out and not Path("models/style/few_steps").exists()
    main(["export", "models/fast", "models/both", "--lora", "style", "--few-steps", "models/fast/few_steps"])
    assert LDMPipeline.from_pretrained("models/both").has_student
    with pytest.warns(UserWarning, match=r"the student was trained for guidance scale 1; ask the model"):
        LDMPipeline.from_pretrained("models/fast").student("red heart", negative_prompt="red")
    fast = quiet(LDMPipeline.from_pretrained("models/fast"))
    main(["sample", "models/fast", "red heart", "--seed", "5", "--out", "one.png", "--dtype", "float32"])
    one = Image.open("one.png")
    assert np.array_equal(one, fast("red heart", seed=5).images[0])
    settings = png_metadata.read(Path("one.png"))
    assert (settings.steps, settings.guidance_scale, settings.scheduler) == (2, 1.0, "DDIMScheduler")
    assert settings.model == model_sha256(fast.student)
    main(["sample", "--like", "one.png", "--out", "again.png"])
    assert "the same picture, byte for byte" in capsys.readouterr().out
    main(["sample", "models/fast/few_steps", "red heart", "--steps", "3", "--guidance-scale", "1", "--out", "three.png",
          "--seed", "5", "--dtype", "float32"])  # fmt: skip
    three = fast.student("red heart", seed=5, num_inference_steps=3, guidance_scale=1.0).images[0]
    assert np.array_equal(Image.open("three.png"), three)
    main(
        ["sample", "models/fast", "red heart", "--steps", "3", "--out", "own.png", "--seed", "5", "--dtype", "float32"]
    )
    assert np.array_equal(Image.open("own.png"), fast("red heart", seed=5, num_inference_steps=3).images[0])
    shutil.rmtree("models/fast/few_steps")
    with pytest.raises(SystemExit, match="models/fast/few_steps: the model has no student; put one"):
        main(["sample", "models/fast/few_steps", "red heart"])
