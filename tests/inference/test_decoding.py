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
from test_steering import tiny_context
from torch import Tensor, nn

from ldm.cli.main import main
from ldm.diffusion.guidance import guide, interval_scale
from ldm.inference import decoding as drawing
from ldm.inference.decoding import GuidanceInterval, decoded_in_slices, text_kept
from ldm.inference.defaults import Defaults
from ldm.inference.steering import steered
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


def cross_attentions(pipe: LDMPipeline) -> list[Any]:
    return [part for part in pipe.unet.modules() if drawing.is_cross_attention(part)]


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
    assert torch.equal(draw(pipe, ["cat", "red heart"], guidance_interval=[0.1, 1.0]), plain)  # through the hooks


def test_outside_everywhere_is_the_conditional_model(pipe: LDMPipeline) -> None:
    hardly = draw(pipe, guidance_interval=(0.0, 0.001), guidance_rescale=0.5)
    torch.testing.assert_close(hardly, draw(pipe, guidance_scale=1.0), rtol=1e-5, atol=1e-5)


def test_classes_channels_and_a_loud_answer_are_halved_with_the_rest() -> None:
    """Whatever else a call carries for both halves."""
    interval = GuidanceInterval(2, 1000, (0.0, 0.5))
    numbers, x = torch.arange(4), torch.randn(4, 3)
    keywords = {
        "encoder_hidden_states": x,
        "class_labels": numbers,
        "added": {"images": [numbers]},
        "return_dict": False,
    }
    sample = interval.before(x, torch.full((4,), 700), keywords)
    assert torch.equal(sample, x[2:]) and keywords["class_labels"].tolist() == [2, 3]
    assert keywords["added"]["images"][0].tolist() == [2, 3] and keywords["return_dict"] is False
    assert torch.equal(interval.after(x, torch.full((4,), 700), sample), x[[2, 3, 2, 3]])
    for untouched in (torch.full((4,), 300), torch.full((2,), 700)):
        given = x[: len(untouched)]
        assert interval.before(given, untouched, {"encoder_hidden_states": given}) is given
        assert interval.after(given, untouched, given) is given


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
    said = draw(pipe, guidance_scale=4.0, guidance_interval=(0.2, 0.8))
    assert torch.equal(draw(again), said) and not torch.equal(draw(again, guidance_interval=(0, 1)), said)
    for bad in ("0.5", "[0.5]", '["a", 1]', "[0.9, 0.1]"):
        (tmp_path / "model/defaults.json").write_text(f'{{"guidance_interval": {bad}}}')
        with pytest.raises(ValueError, match="defaults.json: guidance_interval: expected"):
            LDMPipeline.from_pretrained(tmp_path / "model")


# --- what is kept ----------------------------------------------------------------------------------------


def test_keys_and_values_are_computed_once_and_change_no_bit(
    pipe: LDMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [attention.to_k for attention in cross_attentions(pipe)]
    assert layers
    with rows(layers[0]) as once:
        kept = draw(pipe, ["cat", "red heart"])
    assert once == [4]
    with rows(layers[0]) as thrice:  # the conditional half, both, and again the half
        draw(pipe, ["cat", "red heart"], guidance_interval=(0.3, 0.7))
    assert thrice == [2, 4, 2]
    assert [attention.to_k for attention in cross_attentions(pipe)] == layers, "the layers are back"
    monkeypatch.setattr(drawing, "is_cross_attention", lambda part: False)
    with rows(layers[0]) as always:
        plain = draw(pipe, ["cat", "red heart"])
    assert always == [4] * 5 and torch.equal(kept, plain)


def test_another_context_or_a_changed_one_is_noticed(pipe: LDMPipeline) -> None:
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 12, 32)
    with torch.no_grad():
        plain = pipe.unet(x, t, context).sample
        doubled = pipe.unet(x, t, 2 * context).sample
        with text_kept(pipe.unet):
            assert torch.equal(pipe.unet(x, t, context).sample, plain)
            assert torch.equal(pipe.unet(x, t, 2 * context).sample, doubled)
            assert torch.equal(pipe.unet(x, t, context).sample, plain)
            context.mul_(2)
            assert torch.equal(pipe.unet(x, t, context).sample, doubled)
    with torch.inference_mode(), text_kept(pipe.unet):
        assert torch.equal(pipe.unet(x, t, context).sample, doubled)


def test_layers_are_back_after_an_error(pipe: LDMPipeline) -> None:
    def stop(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    names = set(pipe.unet.state_dict())
    with pytest.raises(KeyboardInterrupt), steered(pipe.unet, after=[stop]):
        draw(pipe)
    assert set(pipe.unet.state_dict()) == names


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
    monkeypatch.setattr(drawing, "free_bytes", lambda device: free)
    with rows(pipe.vae.decoder) as decoded:
        found = draw(pipe, ["cat", "red heart", "pizza"], output_type="np")
    assert decoded == ([3] if free > 1000 else [1, 1, 1])
    assert np.abs(found - together).max() <= 1e-5  # a batch's rounding
    assert pipe.vae.use_slicing is False


def test_slicing_that_someone_asked_for_stays(pipe: LDMPipeline) -> None:
    pipe.vae.enable_slicing()
    try:
        with decoded_in_slices(pipe.vae, 3, 16, 16):
            assert pipe.vae.use_slicing
        assert pipe.vae.use_slicing
    finally:
        pipe.vae.disable_slicing()


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
    with pytest.raises(SystemExit, match="--dtype: with --like the picture's recipe says it"):
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
