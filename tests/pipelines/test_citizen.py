"""LDMPipeline among stock pipelines: every argument of theirs, and everything they can be turned into."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import road
import tiny
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from ldm.diffusion.schedule import NoiseSchedule
from ldm.inference.defaults import EVERYWHERE, SAMPLERS, Defaults
from ldm.inference.samplers import STOCK
from ldm.pipelines.text_to_image import LDMPipeline


@pytest.fixture(scope="module")
def loaded(tiny_pipeline_folder: Path) -> LDMPipeline:
    return quiet(LDMPipeline.from_pretrained(tiny_pipeline_folder))


@pytest.fixture
def pipe(loaded: LDMPipeline) -> LDMPipeline:
    """The same networks in a pipeline of the test's own."""
    return quiet(LDMPipeline(**loaded.components, requires_safety_checker=False))


@pytest.fixture
def stock(loaded: LDMPipeline) -> Any:
    """The same networks in a stock pipeline."""
    return quiet(diffusers.StableDiffusionPipeline(**loaded.components, requires_safety_checker=False))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate(pipe: Any, prompt: Any = "red heart", **arguments: Any) -> np.ndarray:
    """Pictures [N,H,W,3] in [0,1], or whatever the output type is."""
    if "generator" not in arguments and "seed" not in arguments:
        arguments["generator"] = seeded()
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np", **arguments}
    return np.asarray(pipe(prompt, **arguments).images)


# --- the arguments of the stock call ---------------------------------------------------------------------

TIMESTEPS = [900, 600, 300, 100]
SAME: dict[str, dict[str, Any]] = {
    "rescaled": {"guidance_rescale": 0.7},
    "timesteps": {"timesteps": TIMESTEPS, "num_inference_steps": 50},
    "sigmas": {"sigmas": [10.0, 4.0, 1.0, 0.2], "scheduler": "EulerDiscreteScheduler"},
    "eta": {"eta": 1.0, "scheduler": "DDIMScheduler"},
    "list of prompts": {"prompt": ["red heart", "cat"], "generator": lambda: [seeded(1), seeded(2)]},
    "copies": {"num_images_per_prompt": 2, "generator": lambda: [seeded(1), seeded(2)]},
    "negative prompts": {
        "prompt": ["red heart", "cat"], "negative_prompt": ["blue", ""], "generator": lambda: [seeded(1), seeded(2)],
    },
    "latents": {"latents": lambda: torch.randn(1, 4, 8, 8, generator=seeded())},
    "pt": {"output_type": "pt"},
    "latent": {"output_type": "latent"},
    "pil": {"output_type": "pil"},
    "size": {"height": 24, "width": 32},
    "attention arguments": {"cross_attention_kwargs": {}},
    "guidance of 1": {"guidance_scale": 1.0},
    "guidance below 1": {"guidance_scale": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_every_stock_argument_has_stock_s_bits(name: str, pipe: LDMPipeline, stock: Any) -> None:
    arguments = dict(SAME[name])
    scheduler = arguments.pop("scheduler", "DPMSolverMultistepScheduler")
    found = []
    for each in (pipe, stock):
        each.scheduler = getattr(diffusers, scheduler).from_config(each.scheduler.config)
        found.append(generate(each, **{key: v() if callable(v) else v for key, v in arguments.items()}))
    assert found[0].shape == found[1].shape and found[0].std() > 0.01
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", STOCK)
def test_every_stock_sampler_has_stock_s_bits(name: str, scale: float, pipe: LDMPipeline, stock: Any) -> None:
    """By name here, by hand there; from one scheduler's config, which stays as it was."""
    kind, more = STOCK[name]
    before = pipe.scheduler
    ours = generate(pipe, "cat", sampler=name, guidance_scale=scale, negative_prompt="red", generator=[seeded()])
    stock.scheduler = getattr(diffusers, kind).from_config({**stock.scheduler.config, **more})
    assert np.array_equal(ours, generate(stock, "cat", guidance_scale=scale, negative_prompt="red"))
    assert pipe.scheduler is before


def test_positional_arguments_are_stock_s(pipe: LDMPipeline, stock: Any) -> None:
    words = ("red heart", 16, 24, 3, None, None, 4.0, "blue", 1, 0.0)
    found = [each(*words, seeded(), output_type="np").images for each in (pipe, stock)]
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_embeds": torch.zeros(1, 12, 32)}, "prompt: give prompt or prompt_embeds, not both"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 12, 32)}, "negative_prompt: give"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 12, 31)}, r"prompt_embeds: expected a tensor \[B,L,32\]"),
        ({"timesteps": [5, 1], "sigmas": [1.0]}, "timesteps: give timesteps or sigmas, not both"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents: expected \[1,C,h,w\], got \[2, 4, 8, 8\]"),
        ({"output_type": "jpg"}, "output_type: expected one of pil, np, pt, latent, got 'jpg'"),
        ({"clip_skip": 1}, "clip_skip: it skips layers of CLIP, and this model's text encoder is a BertModel"),
        ({"ip_adapter_image": Image.new("RGB", (8, 8))}, "ip_adapter_image: IP-Adapters run in stock pipelines"),
        ({"cross_attention_kwargs": 1}, "cross_attention_kwargs: expected a dict, got int"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "callback_on_step_end_tensor_inputs: expected some of latents"),
        ({"sampler": "ddmp"}, "sampler: expected one of ddpm, .*, got 'ddmp'; did you mean ddpm?"),
    ],
)
def test_what_cannot_work_is_refused_by_name(arguments: dict[str, Any], message: str, pipe: LDMPipeline) -> None:
    with pytest.raises(ValueError, match=message):
        generate(pipe, **arguments)


def test_samplers_that_would_leave_the_process_are_refused(tmp_path: Path) -> None:
    pipe = tiny.pipeline(tmp_path, schedule=NoiseSchedule.from_name("linear", zero_terminal_snr=True), prediction="v")
    with pytest.raises(ValueError, match="sampler: heun knows no zero terminal SNR"):
        generate(pipe, sampler="heun")
    assert np.isfinite(generate(pipe, sampler="ddim")).all()


def test_clip_skip_is_the_hidden_state_before(tiny_pipeline_folders: dict[tiny.Kind, Path]) -> None:
    pipe = quiet(LDMPipeline.from_pretrained(tiny_pipeline_folders["clip"]))
    tokens = pipe.tokenizer(["cat"], padding="max_length", max_length=tiny.MAX_LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states
        expected = pipe.text_encoder.final_layer_norm(states[-2])
        found, _ = pipe.encode_prompt("cat", "cpu", 1, False, clip_skip=1)
    assert torch.equal(found, expected)
    assert not np.array_equal(generate(pipe, clip_skip=1), generate(pipe))


# --- callbacks -------------------------------------------------------------------------------------------


def test_callbacks_see_and_change_what_they_do_in_stock(pipe: LDMPipeline, stock: Any) -> None:
    found = []
    for each in (pipe, stock):
        seen: list[Any] = []

        def change(p: Any, i: int, t: Any, tensors: dict[str, Any], seen: list[Any] = seen) -> dict[str, Any]:
            seen.append((i, int(t), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
            return {"latents": tensors["latents"] * 1.1, "prompt_embeds": tensors["prompt_embeds"] * 0.9}

        names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
        picture = generate(each, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
        found.append((picture, seen, each.num_timesteps))
    assert np.array_equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def test_a_stock_callback_that_turns_guidance_off(pipe: LDMPipeline, stock: Any) -> None:
    cut = [
        generate(each, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1))
        for each in (pipe, stock)
    ]
    assert np.array_equal(*cut) and not np.array_equal(cut[0], generate(pipe))


def test_an_interrupted_call_stops_as_in_stock(pipe: LDMPipeline, stock: Any) -> None:
    def stop(p: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        p._interrupt = i == 1
        return tensors

    assert np.array_equal(*(generate(each, callback_on_step_end=stop) for each in (pipe, stock)))


# --- no hidden defaults ----------------------------------------------------------------------------------


def test_tuned_defaults_apply_as_a_set_or_not_at_all(pipe: LDMPipeline, stock: Any) -> None:
    pipe.defaults = Defaults(3, 2.0, (0.2, 0.8))
    bare: dict[str, Any] = {"num_inference_steps": None, "guidance_scale": None}
    tuned = {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.2, 0.8)}
    assert np.array_equal(generate(pipe, **bare), generate(pipe, **tuned))
    for named in ({"num_inference_steps": 4}, {"guidance_scale": 2.0}, {"num_inference_steps": 4, "guidance_scale": 5}):
        words = {**bare, **named}
        theirs = stock("red heart", generator=seeded(), output_type="np", **named).images
        assert np.array_equal(generate(pipe, **words), theirs)
    assert pipe.defaults.resolve(guidance_scale=2) == Defaults(50, 2, EVERYWHERE)
    assert pipe.defaults.resolve(4) == Defaults(4, 7.5, EVERYWHERE)


def test_readme_s_lines_give_stock_s_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The very code of the README, with stock diffusers' pipeline in the place of ours."""
    (lines,) = re.findall(r"```python\n(.*?)```", (road.ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(road.ROOT / "models")
    ours: dict[str, Any] = {}
    exec(lines, ours)
    pictures = ours["pipe"].__class__ is LDMPipeline and ours["pictures"]
    (prompts,) = re.findall(r"\[[^\]]*\]", lines)[:1]
    stock = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "models/emoji", use_safetensors=True))
    prompts = eval(prompts)
    theirs = stock(
        prompts, num_inference_steps=20, guidance_scale=3.0, generator=[seeded(7 + i) for i in range(len(prompts))]
    ).images
    for one, other in zip(pictures, theirs, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


# --- what it can be turned into --------------------------------------------------------------------------


def test_from_pipe_both_ways(tiny_pipeline_folder: Path) -> None:
    pipe = quiet(LDMPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16))
    pipe.example_prompts = ("red heart",)
    stock = quiet(diffusers.StableDiffusionPipeline.from_pipe(pipe, dtype=torch.bfloat16))
    back = quiet(LDMPipeline.from_pipe(stock))
    again = quiet(LDMPipeline.from_pipe(pipe))
    assert back.unet is pipe.unet and back.vae is pipe.vae and back.unet.dtype == torch.bfloat16
    assert again.example_prompts == ("red heart",)
    assert np.array_equal(generate(pipe), generate(back)) and np.array_equal(generate(pipe), generate(stock))


def test_auto_pipelines_find_its_relatives(pipe: LDMPipeline) -> None:
    picture = Image.fromarray((generate(pipe)[0] * 255).astype(np.uint8))
    text = diffusers.AutoPipelineForText2Image.from_pipe(pipe)
    image = quiet(diffusers.AutoPipelineForImage2Image.from_pipe(pipe))
    inpaint = quiet(diffusers.AutoPipelineForInpainting.from_pipe(pipe))
    assert type(text) is LDMPipeline and text.unet is image.unet is inpaint.unet is pipe.unet
    words: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "generator": seeded()}
    assert image("cat", image=picture, strength=0.5, **words).images.shape == (1, 16, 16, 3)
    mask = Image.new("L", (16, 16), 255)
    filled = inpaint("cat", image=picture, mask_image=mask, height=16, width=16, **words).images
    assert filled.shape == (1, 16, 16, 3)
    assert type(diffusers.AutoPipelineForText2Image.from_pipe(image)) is diffusers.StableDiffusionPipeline


def test_generating_loads_no_pipelines_but_its_own(tiny_pipeline_folder: Path) -> None:
    """Importing all of diffusers' pipelines took a seventh of the time to a first picture."""
    code = (
        "import sys; from ldm import LDMPipeline; "
        f"pipe = LDMPipeline.from_pretrained({str(tiny_pipeline_folder)!r}); "
        "pipe('cat', num_inference_steps=1); "
        "assert 'diffusers.pipelines.auto_pipeline' not in sys.modules; "
        "from diffusers import AutoPipelineForImage2Image as Auto; "
        "print(type(Auto.from_pipe(pipe)).__name__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(road.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "StableDiffusionImg2ImgPipeline\n", done.stderr[-2000:]


def test_stock_components_make_one(stock: Any) -> None:
    assert np.array_equal(generate(quiet(LDMPipeline(**stock.components))), generate(stock))


def test_compiled_networks_give_the_same(pipe: LDMPipeline, tmp_path: Path) -> None:
    """Without a graph break, so that nothing of ours hides in the network."""
    plain = generate(pipe)
    torch.compiler.reset()
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert np.array_equal(generate(pipe), plain)
    other = tiny.pipeline(tmp_path)
    plain = generate(other)
    other.unet.compile(backend="eager")
    assert np.array_equal(generate(other), plain)


def test_two_pipelines_on_one_unet_in_two_threads(loaded: LDMPipeline, tiny_pipeline_folder: Path) -> None:
    """Guided, each with prompts and schedulers of its own; what either makes is what it makes alone."""
    tokenizers = [LDMPipeline.from_pretrained(tiny_pipeline_folder).tokenizer for _ in range(2)]
    parts = [{**loaded.components, "tokenizer": tokenizer} for tokenizer in tokenizers]
    pipes = [quiet(LDMPipeline(**part, requires_safety_checker=False)) for part in parts]
    pipes[1].scheduler = diffusers.DDIMScheduler.from_config(pipes[1].scheduler.config)
    words: list[dict[str, Any]] = [
        {"prompt": ["cat", "rocket"], "guidance_interval": (0.2, 0.7), "num_inference_steps": 20, "seed": 1},
        {"prompt": "pizza", "guidance_scale": 6.0, "num_inference_steps": 30, "seed": 2},
    ]
    alone = [generate(pipe, **given) for pipe, given in zip(pipes, words, strict=True)]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            found = threads.map(lambda i: generate(pipes[i], **words[i]), (0, 1))
            assert all(np.array_equal(*pair) for pair in zip(found, alone, strict=True))


def test_vae_tiling_is_stock_s(pipe: LDMPipeline, stock: Any) -> None:
    whole = generate(pipe, height=64, width=64)
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 16  # its own tiles are larger than this picture
    try:
        tiled = generate(pipe, height=64, width=64)
        assert np.array_equal(tiled, generate(stock, height=64, width=64)) and not np.array_equal(tiled, whole)
    finally:
        pipe.vae.disable_tiling()


def test_what_was_saved_last_is_what_a_folder_holds(tmp_path: Path, tiny_pipeline_folder: Path) -> None:
    first = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    first.example_prompts, first.defaults = ("red heart\nand a cat", "a\u2028b"), Defaults(5, 2.0)
    first.save_pretrained(tmp_path)
    assert LDMPipeline.from_pretrained(tmp_path).example_prompts == ("red heart and a cat", "a b")
    LDMPipeline.from_pretrained(tiny_pipeline_folder).save_pretrained(tmp_path)
    found = LDMPipeline.from_pretrained(tmp_path)
    assert found.example_prompts == () and found.defaults == Defaults() and found.labels is None


# --- adapters --------------------------------------------------------------------------------------------


def test_lora_weights_load_as_in_stock_and_from_safetensors_alone(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trained = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    trained.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    state = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(trained.unet))
    LDMPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    pipe, stock = (
        quiet(kind.from_pretrained(tiny_pipeline_folder)) for kind in (LDMPipeline, diffusers.StableDiffusionPipeline)
    )
    plain = generate(pipe)
    for each in (pipe, stock):
        each.load_lora_weights(tmp_path)
    adapted = generate(pipe)
    assert np.array_equal(adapted, generate(stock)) and not np.array_equal(adapted, plain)
    half = generate(pipe, cross_attention_kwargs={"scale": 0.5})
    assert np.array_equal(half, generate(stock, cross_attention_kwargs={"scale": 0.5}))
    assert not np.array_equal(half, adapted)
    pipe.unload_lora_weights()
    assert np.array_equal(generate(pipe), plain)
    torch.save(state, tmp_path / "pickle.bin")
    for source, words in ((tmp_path / "pickle.bin", {}), (tmp_path, {"weight_name": "pickle.bin"})):
        with pytest.raises(ValueError, match="pickle.bin: expected a .safetensors file"):
            pipe.load_lora_weights(source, **words)
    with pytest.raises(ValueError, match="use_safetensors: expected True"):
        pipe.load_lora_weights(tmp_path, use_safetensors=False)


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_textual_inversions_load_as_in_stock(
    kind: tiny.Kind, tiny_pipeline_folders: dict[tiny.Kind, Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file({"<style>": torch.randn(2, 32, generator=seeded())}, tmp_path / "style.safetensors")
    classes = (LDMPipeline, diffusers.StableDiffusionPipeline)
    pipe, stock = (quiet(each.from_pretrained(tiny_pipeline_folders[kind])) for each in classes)
    plain = generate(pipe, "cat")
    for each in (pipe, stock):
        each.load_textual_inversion(tmp_path / "style.safetensors")
    styled = generate(pipe, "cat <style>")
    assert np.array_equal(styled, generate(stock, "cat <style>")) and not np.array_equal(styled, plain)
    torch.save({"<s>": torch.zeros(32)}, tmp_path / "style.bin")
    with pytest.raises(ValueError, match="style.bin: expected a .safetensors file"):
        pipe.load_textual_inversion(tmp_path / "style.bin")


def test_all_samplers_are_named() -> None:
    assert set(STOCK) | {"pc", "ode"} == set(SAMPLERS)
