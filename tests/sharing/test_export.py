"""A model in half the bytes: what stock diffusers opens, computes in float32, and draws."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from ldm import LDMPipeline
from ldm.cli.main import main
from ldm.models.lora import LoRAConfig
from ldm.sharing.export import export


@pytest.fixture(scope="module")
def exported(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = shutil.copytree(tiny_pipeline_folder, tmp_path_factory.mktemp("export") / "pipeline")
    (source / "prompts.txt").write_text("red heart\n", "utf-8")
    main(["export", str(source), str(source.parent / "small")])
    return source.parent / "small"


def test_every_weight_is_rounded_and_none_is_lost(exported: Path) -> None:
    files = sorted(exported.rglob("*.safetensors"))
    assert [path.parent.name for path in files] == ["text_encoder", "unet", "vae"]
    for path in files:
        whole = exported.parent / "pipeline" / path.relative_to(exported)
        with safe_open(path, "pt") as halves, safe_open(whole, "pt") as floats:
            assert set(halves.keys()) == set(floats.keys())
            for name in floats.keys():  # noqa: SIM118  not a dict
                expected = floats.get_tensor(name)
                if expected.is_floating_point():
                    expected = expected.half()
                assert torch.equal(halves.get_tensor(name), expected)
        assert path.stat().st_size < 0.65 * whole.stat().st_size  # tiny networks are mostly names


@pytest.mark.parametrize("kind", [LDMPipeline, StableDiffusionPipeline])
def test_it_computes_in_float32_wherever_it_is_opened(exported: Path, kind: type) -> None:
    pipe = kind.from_pretrained(str(exported))
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    drawn, before = (
        np.asarray(
            p(
                prompt="red heart",
                num_inference_steps=4,
                guidance_scale=3.0,
                generator=torch.Generator().manual_seed(3),
            ).images[0],
            dtype=int,
        )
        for p in (pipe, LDMPipeline.from_pretrained(exported.parent / "pipeline"))
    )
    assert drawn.std() > 5
    assert np.abs(drawn - before).max() <= 3


def test_the_prompts_come_along(exported: Path) -> None:
    assert LDMPipeline.from_pretrained(exported).example_prompts == ("red heart",)


def test_the_card_comes_along_and_says_what_was_changed(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """A shared copy keeps license and authors."""
    card = "---\nlicense: cc-by-sa-4.0\n---\n\n# hearts\n"
    shutil.copytree(tiny_pipeline_folder, tmp_path / "hearts")
    (tmp_path / "hearts/README.md").write_text(card)
    main(["export", str(tmp_path / "hearts"), str(tmp_path / "copy")])
    assert (tmp_path / "copy/README.md").read_text() == card
    tiny.lora(tmp_path / "hearts", tmp_path / "ink", LoRAConfig(rank=2))
    main(["export", str(tmp_path / "hearts"), str(tmp_path / "ink-hearts"), "--lora", str(tmp_path / "ink")])
    changed = (tmp_path / "ink-hearts/README.md").read_text()
    assert changed.startswith("---\nlicense: cc-by-sa-4.0\n---\n\n> Made of ") and changed.endswith("\n\n# hearts\n")
    assert "with --lora. What follows is its card." in changed


def test_nothing_is_mixed_with_what_is_there(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="expected an empty folder"):
        main(["export", str(exported.parent / "pipeline"), str(exported)])


def test_a_weight_that_fp16_cannot_hold_is_named(exported: Path, tmp_path: Path) -> None:
    pipe = LDMPipeline.from_pretrained(exported.parent / "pipeline")
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"unet/.*conv_out\.bias"):
        export(pipe, tmp_path / "out")
