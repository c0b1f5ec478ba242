"""What a drawing doesn't compute twice, or at all: the picture stays what it is said to be, and the work is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from test_guidance_in_sampling import tiny_context
from torch import Tensor, nn

from ldm.cli.main import main
from ldm.diffusion.guidance import guide, interval_scale
from ldm.inference import decoding
from ldm.inference.defaults import Defaults
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.sharing import png_metadata as recipe
from ldm.system.devices import best_dtype


@pytest.fixture(scope="module")
def loaded(tiny_pipeline_folder: Path) -> LDMPipeline:
    return LDMPipeline.from_pretrained(tiny_pipeline_folder)


@pytest.fixture
def pipe(loaded: LDMPipeline) -> LDMPipeline:
    """The same networks in a pipeline of the test's own."""
    pipe = LDMPipeline(**loaded.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: LDMPipeline, prompt: Any = "red heart", **words: Any) -> Tensor:
    """Latents [N,C,h,w], in five steps."""
    words = {"num_inference_steps": 5, "seed": 5, "output_type": "latent", **words}
    return pipe(prompt, **words).images  # type: ignore[return-value]


@contextmanager
def rows(network: nn.Module) -> Iterator[list[int]]:
    """The batch size of each call of a network."""
    seen: list[int] = []
    hook = network.register_forward_hook(lambda _, arguments, answer: seen.append(len(arguments[0])))
    try:
        yield seen
    finally:
        hook.remove()


# --- guidance in an interval -----------------------------------------------------------------------------

# five steps are at t = 999, 799, 599, 399, 199
INTERVALS = [((0.0, 1.0), "ggggg"), ((0.3, 0.7), "--gg-"), ((0.0, 0.5), "---gg"), ((0.5, 1.0), "ggg--")]


@pytest.mark.parametrize(("interval", "guided"), INTERVALS)
def test_the_interval_is_that_of_the_mathematics_and_halves_the_work_outside(
    interval: tuple[float, float], guided: str, pipe: LDMPipeline
) -> None:
    """Against the sampler written out with `interval_scale`, two prompts."""
    prompts, scale, start = ["cat", "red heart"], 4.0, torch.randn(2, 4, 8, 8)
    with rows(pipe.unet.conv_in) as asked:
        found = draw(pipe, prompts, guidance_scale=scale, guidance_interval=interval, latents=start)
    assert asked == [4 if step == "g" else 2 for step in guided]
    context, null, x = tiny_context(pipe, prompts), tiny_context(pipe, ["", ""]), start
    pipe.scheduler.set_timesteps(5)
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            positive, negative = (pipe.unet(x, t, encoder_hidden_states=c).sample for c in (context, null))
        answer = guide(positive, negative, interval_scale(scale, int(t), 1000, interval))
        x = pipe.scheduler.step(answer, t, x, return_dict=False)[0]
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    everywhere = draw(pipe, prompts, guidance_scale=scale, latents=start)
    assert torch.equal(found, everywhere) == (interval == (0, 1))
    assert interval == (0, 1) or (found - everywhere).abs().max() > 1e-3


def test_an_interval_that_holds_every_step_changes_no_bit(pipe: LDMPipeline) -> None:
    plain = draw(pipe, ["cat", "red heart"])
    assert torch.equal(draw(pipe, ["cat", "red heart"], guidance_interval=(0, 1)), plain)
    assert torch.equal(draw(pipe, ["cat", "red heart"], guidance_interval=[0.1, 1.0]), plain)
    # the last of five steps is at t = 199, and an interval holds its lower end and not its upper one
    assert torch.equal(draw(pipe, ["cat", "red heart"], guidance_interval=[0.199, 1.0]), plain)
    assert not torch.equal(draw(pipe, ["cat", "red heart"], guidance_interval=[0.0, 0.999]), plain)


def test_outside_everywhere_is_the_conditional_model(pipe: LDMPipeline) -> None:
    hardly = draw(pipe, guidance_interval=(0.0, 0.001), guidance_rescale=0.5)
    torch.testing.assert_close(hardly, draw(pipe, guidance_scale=1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bad", [(0.5,), (0.7, 0.3), (-0.1, 1), (0, 1.1), (float("nan"), 1), ("0", "1"), 0.5, (True, 1), (0.5, 0.5)]
)
def test_a_bad_interval_is_refused(bad: Any, pipe: LDMPipeline) -> None:
    with pytest.raises(ValueError, match="guidance_interval: expected"):
        draw(pipe, guidance_interval=bad)


def test_a_pipeline_keeps_its_interval(pipe: LDMPipeline, tmp_path: Path) -> None:
    pipe.defaults = Defaults(5, 4.0, (0.2, 0.8))
    pipe.save_pretrained(tmp_path / "model")
    again = LDMPipeline.from_pretrained(tmp_path / "model")
    assert again.defaults == pipe.defaults
    named = draw(pipe, guidance_scale=4.0, guidance_interval=(0.2, 0.8))
    assert torch.equal(draw(again, num_inference_steps=None), named)
    assert not torch.equal(draw(again, guidance_interval=(0, 1)), named)
    for bad in ("0.5", "[0.5]", '["a", 1]', "[0.9, 0.1]"):
        (tmp_path / "model/defaults.json").write_text(f'{{"guidance_interval": {bad}}}')
        with pytest.raises(ValueError, match="defaults.json: guidance_interval: expected"):
            LDMPipeline.from_pretrained(tmp_path / "model")


# --- what is kept ----------------------------------------------------------------------------------------


def test_the_null_context_is_encoded_once_until_the_encoder_changes(tiny_pipeline_folder: Path) -> None:
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    embedding = pipe.text_encoder.embeddings.word_embeddings
    with rows(embedding) as seen:
        first = draw(pipe, "cat")
        assert len(seen) == 2
        assert torch.equal(draw(pipe, "cat"), first) and len(seen) == 3
        draw(pipe, "cat", negative_prompt="red")
        assert len(seen) == 5
        draw(pipe, ["cat", "pizza"])  # of another size
        assert len(seen) == 7
    with torch.no_grad():
        for weight in pipe.text_encoder.parameters():
            weight.mul_(1.5)
    changed = draw(pipe, ["cat", "pizza"])
    fresh = LDMPipeline(**pipe.components, requires_safety_checker=False)
    assert torch.equal(changed, draw(fresh, ["cat", "pizza"]))
    pipe.to(torch.bfloat16).to(torch.float32)  # rounded, in the same dtype as before
    assert torch.equal(draw(pipe, "cat"), draw(LDMPipeline(**pipe.components, requires_safety_checker=False), "cat"))


# --- decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [10**12, 1000])
def test_pictures_decoded_one_by_one_are_the_same(
    free: int, pipe: LDMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = draw(pipe, ["cat", "red heart", "pizza"], output_type="np")
    monkeypatch.setattr(decoding, "free_bytes", lambda device: free)
    with rows(pipe.vae.decoder) as decoded:
        found = draw(pipe, ["cat", "red heart", "pizza"], output_type="np")
    assert decoded == ([3] if free > 1000 else [1, 1, 1])
    assert np.abs(found - together).max() <= 1e-5  # a batch's rounding
    assert pipe.vae.use_slicing is False


# --- the command, and what a picture says --------------------------------------------------------------


def test_interval_and_dtype_go_through_the_recipe(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    words = ["sample", str(tiny_pipeline_folder), "cat", "--steps", "4", "--seed", "3"]
    drawn = {}
    for name, more in {
        "plain": ["--dtype", "float32"],
        "inside": ["--dtype", "float32", "--guidance-interval", "0.2", "0.7"],
        "coarse": ["--dtype", "bfloat16", "--guidance-interval", "0", "1"],
    }.items():
        main([*words, *more, "--out", str(tmp_path / f"{name}.png")])
        drawn[name] = (tmp_path / f"{name}.png").read_bytes()
        again = tmp_path / "again.png"
        main(["sample", "--like", str(tmp_path / f"{name}.png"), str(tiny_pipeline_folder), "--out", str(again)])
        assert again.read_bytes() == drawn[name]
    assert len(set(drawn.values())) == 3
    said = {name: recipe.read(tmp_path / f"{name}.png") for name in drawn}
    assert [said[name].guidance_interval for name in drawn] == [None, [0.2, 0.7], None]
    assert [said[name].dtype for name in drawn] == [None, None, "bfloat16"]
    with pytest.raises(SystemExit, match="--dtype: with --like it is that of .*; leave it out"):
        main(["sample", "--like", str(tmp_path / "plain.png"), "--dtype", "float32"])


def test_bfloat16_draws_nearly_the_same(tiny_pipeline_folder: Path) -> None:
    exact = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    coarse = LDMPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    words: dict[str, Any] = {"output_type": "np", "guidance_interval": (0.2, 0.8)}
    one, other = draw(exact, **words), draw(coarse, **words)
    assert 0 < np.abs(one - other).max() < 0.1
    assert best_dtype(torch.device("mps")) == torch.float32
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    words = {"num_inference_steps": 5, "guidance_scale": 3.0, "output_type": "np"}
    theirs = stock("cat", generator=torch.Generator().manual_seed(5), **words).images
    assert np.abs(coarse("cat", seed=5, **words).images - theirs).max() == 0


def test_every_kind_of_encoder_keeps_its_null_context(tiny_pipeline_folders: dict[tiny.Kind, Path]) -> None:
    for folder in tiny_pipeline_folders.values():
        pipe = LDMPipeline.from_pretrained(folder)
        stock = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        for prompts in ("cat", ["cat", "red heart", "pizza"]):
            for _ in range(2):  # the second time it is kept
                ours = pipe.encode_prompt(prompts, "cpu", 2, True)
                theirs = stock.encode_prompt(prompts, "cpu", 2, True)
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
