"""A model that is conditioned on numbers: what stock's U-Net gets, saved and opened again, in the command line."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from ldm.cli.main import main
from ldm.data.numbers import Numbers
from ldm.pipelines.text_to_image import LDMPipeline

NUMBERS = Numbers(("size", "angle"), (0.5, 90.0), (0.25, 30.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("numbers")
    tiny.numbers_pipeline(root / "text", NUMBERS).save_pretrained(root / "pipeline")
    return root / "pipeline"


def test_every_picture_is_that_of_a_loop_over_stocks_own_unet(folder: Path) -> None:
    """The folder opens in stock diffusers; its U-Net takes the standardized numbers, zeros where guidance has none."""
    pipe = LDMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    given = [{"size": 0.75, "angle": 90}, {"size": 0.25, "angle": 60}]
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    found = pipe(["red heart", "blue cat"], numbers=given, seed=3, **settings).images

    stock = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert stock.unet.config.class_embed_type == "simple_projection"
    numbers = torch.tensor([[0, 0, 0], [0, 0, 0], [1.0, 0, 1], [-1, -1, 1]])
    positive, negative = stock.encode_prompt(["red heart", "blue cat"], "cpu", 1, True)
    stock.scheduler.set_timesteps(3)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    x = torch.cat([torch.randn(1, *found.shape[1:], generator=one) for one in generators])
    with torch.no_grad():
        for t in stock.scheduler.timesteps:
            context = torch.cat([negative, positive])
            output = stock.unet(torch.cat([x, x]), t, encoder_hidden_states=context, class_labels=numbers).sample
            without, with_it = output.chunk(2)
            x = stock.scheduler.step(without + 2.0 * (with_it - without), t, x).prev_sample
    assert (found - x).abs().max() == 0


def test_the_numbers_count_and_none_is_the_null_condition(folder: Path) -> None:
    pipe = LDMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "seed": 0, "output_type": "np"}

    def picture(numbers: object) -> np.ndarray:  # type: ignore[type-arg]
        return pipe("cat", numbers=numbers, **settings).images  # type: ignore[arg-type]

    one, other, none = picture({"size": 0.1, "angle": 0}), picture({"size": 0.9, "angle": 0}), picture(None)
    assert (one != other).any() and (one != none).any()
    both = pipe("cat", numbers=[None, {"size": 0.9, "angle": 0}], **{**settings, "seed": [0, 0]}).images
    assert np.abs(both[0] - none[0]).max() < 1e-5 and np.abs(both[1] - other[0]).max() < 1e-5


@pytest.mark.parametrize(
    ("numbers", "error"),
    [
        ({"sise": 1, "angle": 2}, "numbers: there is no 'sise'; did you mean 'size'"),
        (3, "numbers: expected such as {'size': 0.5}"),
        ([{"size": 1, "angle": 2}] * 3, "prompt: expected 1 or 3"),
    ],
)
def test_wrong_numbers_are_refused(folder: Path, numbers: object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        LDMPipeline.from_pretrained(folder)(["cat", "cat"] if isinstance(numbers, list) else "cat", numbers=numbers)  # type: ignore[arg-type]


def test_a_model_without_numbers_refuses_them(tiny_pipeline_folder: Path) -> None:
    with pytest.raises(ValueError, match="numbers: this model is conditioned on none"):
        LDMPipeline.from_pretrained(tiny_pipeline_folder)("cat", numbers={"size": 1})


def test_the_command_takes_numbers_and_the_picture_remembers_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again, other = (str(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    words = ["sample", str(folder), "--steps", "2", "--guidance-scale", "2", "--dtype", "float32"]
    main([*words, "red heart", "--number", "size=0.3", "--number", "angle=45", "--out", out])
    main(["sample", str(folder), "--like", out, "--out", again])
    assert "the same picture, byte for byte" in capsys.readouterr().out
    main(["sample", str(folder), "--like", out, "--number", "size=0.9", "--out", other])
    said = capsys.readouterr().out
    assert "numbers: {'size': 0.3, 'angle': 45.0} then, {'size': 0.9, 'angle': 45.0} now" in said or (
        "numbers: {'angle': 45.0, 'size': 0.3} then" in said
    )
    assert Image.open(out).tobytes() == Image.open(again).tobytes() != Image.open(other).tobytes()
    with pytest.raises(SystemExit):
        main([*words, "cat", "--number", "size"])
    assert "expected COLUMN=NUMBER, such as size=0.3, got 'size'" in capsys.readouterr().err


def test_edits_and_walks_take_numbers(folder: Path, tmp_path: Path) -> None:
    main(["sample", str(folder), "cat", "--out", str(tmp_path / "cat.png")])
    words = ["--steps", "2", "--guidance-scale", "2", "--dtype", "float32", "--seed"]
    made = []
    for size in ("0.1", "0.9"):
        numbers, out = ["--number", f"size={size}", "--number", "angle=45"], str(tmp_path / f"{size}.png")
        main(["edit", str(folder), str(tmp_path / "cat.png"), "cat", "--out", out, *words, "0", *numbers])
        made.append(Image.open(out).tobytes())
        main(["walk", str(folder), "cat", "red heart", "--frames", "2", "--out", out, *words[:-1], *numbers])
        made.append(Image.open(out).tobytes())
    assert len(set(made)) == 4
