"""The options that the models of this family had, each by config alone, trained for a few steps and drawn from."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from oracles import randn
from PIL import Image
from safetensors.torch import load_file

from ldm import LDMPipeline
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import BadDataError, read_captioned
from ldm.diffusion import losses as objective
from ldm.diffusion import timesteps
from ldm.diffusion.reverse import Denoiser
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.text_encoder import TextEncoder
from ldm.models.vae import load_vae
from ldm.system.errors import RunError
from ldm.training.config import Config
from ldm.training.encoders import Encoders
from ldm.training.latent_cache import build_cache
from ldm.training.objective import DiffusionConfig, build_objective, build_schedule, build_timesteps
from ldm.training.samples import LatentSamples
from train.train_ldm import main as train_ldm


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, a text encoder, and a VAE of random weights (normalized as soon as it is used)."""
    folder = tmp_path_factory.mktemp("lineage")
    road.draw_folder(folder / "data")
    tiny.save_text_encoder(folder / "text", "bert")
    tiny.pipeline(folder / "pipeline").vae.save_pretrained(folder / "vae")
    return folder


def config_of(home: Path, run: Path, **words: Any) -> Config:
    return road.recipe(home, **{"run": str(run), "vae": str(home / "vae"), "loop__steps": 4, **words})


def unet_of(run: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(run / "pipeline" / "unet")


def moved(run: Path) -> dict[str, bool]:
    """Which weights differ between the first checkpoint and the last."""
    first, last = (load_file(path / "unet.safetensors") for path in sorted((run / "checkpoints/ldm").glob("step_*")))
    return {name: not torch.equal(first[name], last[name]) for name in first}


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- the U-Net's options ---------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "attention everywhere": {"unet__attention": [True, True]},
    "attention nowhere but in the middle": {"unet__attention": [False, False]},
    "scale-shift": {"unet__scale_shift": "true"},
    "residual resampling": {"unet__residual_resampling": "true"},
    "pooled text": {"unet__pooled_text": "true"},
    "both, as in ADM": {"unet__scale_shift": "true", "unet__residual_resampling": "true"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_all_of_its_weights_and_generates(home: Path, tmp_path: Path, name: str) -> None:
    losses = train_ldm(config_of(home, tmp_path, loop__steps=6, **OPTIONS[name]))
    assert np.isfinite(losses).all()
    assert all(moved(tmp_path).values())
    config = unet_of(tmp_path).config
    assert config.resnet_time_scale_shift == ("scale_shift" if "scale" in name or "both" in name else "default")
    residual = "residual" in name or "both" in name
    assert ("ResnetDownsampleBlock2D" in config.down_block_types) == residual
    stock = quiet(StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None))
    ours = quiet(LDMPipeline.from_pretrained(tmp_path / "pipeline"))
    drawn = [
        pipe("red heart", num_inference_steps=2, height=tiny.SIZE, width=tiny.SIZE, guidance_scale=2.0,
             generator=torch.Generator().manual_seed(3), output_type="np").images
        for pipe in (stock, ours)
    ]  # fmt: skip
    assert np.array_equal(*drawn)


def test_options_that_stock_blocks_lack_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unet\.residual_resampling: .* without text"):
        train_ldm(config_of(home, tmp_path, text__encoder="null", unet__residual_resampling="true"))
    with pytest.raises(ValueError, match=r"unet\.pooled_text: a model without text"):
        train_ldm(config_of(home, tmp_path, text__encoder="null", unet__pooled_text="true"))


# --- no text at all --------------------------------------------------------------------------------


def test_an_unconditional_model_by_config_alone(home: Path, tmp_path: Path) -> None:
    """Pictures without a single caption; the pipeline draws what its own U-Net and scheduler give, step by step."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for file in (home / "data/images").iterdir():
        (pictures / file.name).write_bytes(file.read_bytes())
    run = tmp_path / "run"
    words = {"data__source": str(pictures), "data__caption_columns": [], "text__encoder": "null"}
    train_ldm(config_of(home, run, **words))
    assert all(moved(run).values())
    assert not [name for name, _ in unet_of(run).named_modules() if "attn2" in name]  # it can't attend to a context
    assert (run / "samples/step_0000004.png").exists()

    ours = quiet(LDMPipeline.from_pretrained(run / "pipeline"))
    drawn = ours(num_images_per_prompt=2, num_inference_steps=3, seed=5, output_type="np").images
    stock = quiet(DiffusionPipeline.from_pretrained(run / "pipeline", text_encoder=None, tokenizer=None))
    assert type(stock) is StableDiffusionPipeline
    again = stock(
        prompt_embeds=torch.zeros(2, 1, 1), guidance_scale=1, num_inference_steps=3, height=tiny.SIZE, width=tiny.SIZE,
        generator=[torch.Generator().manual_seed(5 + i) for i in range(2)], output_type="np",
    ).images  # fmt: skip
    assert np.array_equal(drawn, again)
    assert not np.array_equal(drawn[0], drawn[1])
    with pytest.raises(ValueError, match="prompt: this model knows no text"):
        ours("red heart")


def test_pictures_without_captions_are_held_out_by_their_place(home: Path) -> None:
    read = read_captioned(home / "data/images", caption_columns=(), holdout=0.3, progress=False)
    assert len(read) == 24 and 0 < len(read.heldout) < 15
    assert all(row.captions == () for row in read)
    some = read_captioned(home / "data/images", caption_columns=(), holdout=0.1, progress=False)
    assert {row.where for row in some.heldout} <= {row.where for row in read.heldout}


# --- classes -----------------------------------------------------------------------------------------


def test_a_class_conditional_model_by_config_alone(home: Path, tmp_path: Path) -> None:
    words = {"text__encoder": "null", "data__label_column": "color", "diffusion__caption_dropout": 0.5}
    train_ldm(config_of(home, tmp_path, loop__steps=8, **words))
    unet = unet_of(tmp_path)
    assert unet.config.num_class_embeds == 5  # four colors and the null class
    assert moved(tmp_path)["class_embedding.weight"]
    assert (tmp_path / "samples/step_0000008.png").exists()
    labels = json.loads((tmp_path / "pipeline/labels.json").read_text("utf-8"))
    assert labels == {"column": "color", "names": sorted(road.COLORS)}

    ours = quiet(LDMPipeline.from_pretrained(tmp_path / "pipeline"))
    drawn = ours(
        class_label=["red", "blue"], num_inference_steps=3, guidance_scale=2.5, seed=0, output_type="np"
    ).images
    torch.testing.assert_close(torch.tensor(drawn), guided_by_hand(tmp_path, [2, 0], 2.5), rtol=0, atol=2e-5)
    other = ours(
        class_label=["green", "blue"], num_inference_steps=3, guidance_scale=2.5, seed=0, output_type="np"
    ).images
    assert np.array_equal(drawn[1], other[1]) and not np.array_equal(drawn[0], other[0])
    nobody = ours(num_inference_steps=3, seed=0, output_type="np").images
    assert np.array_equal(nobody, ours(class_label=[None], num_inference_steps=3, seed=0, output_type="np").images)
    with pytest.raises(ValueError, match="there is no 'rde'; did you mean 'red'"):
        ours(class_label="rde")
    with pytest.raises(ValueError, match="class_label: this model knows no classes"):
        tiny.pipeline(tmp_path / "plain")("red heart", class_label="red")


def test_a_model_of_numbers_resumes_exactly_and_can_be_started_from(home: Path, tmp_path: Path) -> None:
    """Its folder has the scale of the numbers, the weights its input; a run from it keeps both."""
    data = shutil.copytree(home / "data", tmp_path / "data")
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text("utf-8").splitlines()]
    lines = (json.dumps({**row, "size": i / 8, "angle": str(i % 5)}) + "\n" for i, row in enumerate(rows))
    (data / "metadata.jsonl").write_text("".join(lines), "utf-8")
    words = {"data__source": str(data), "data__number_columns": ["size", "angle"], "diffusion__caption_dropout": 0.5}
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    whole = train_ldm(config_of(home, run, loop__steps=2, loop__checkpoint_every=1, **words))
    plain = {**words, "loop__sample_every": 0, "loop__evaluate_every": 0}
    first = train_ldm(config_of(home, stopped, loop__steps=1, **plain))
    assert first + train_ldm(config_of(home, stopped, loop__steps=2, **plain)) == whole
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (run / "pipeline" / weights).read_bytes() == (stopped / "pipeline" / weights).read_bytes()
    assert (run / "samples/step_0000002.png").exists()
    pipeline = quiet(LDMPipeline.from_pretrained(run / "pipeline"))
    assert pipeline.unet.config.class_embed_type == "simple_projection" and moved(run)["class_embedding.weight"]
    train = read_captioned(data, holdout=0.2, progress=False).train
    raw = np.array([[row.extra["size"], float(row.extra["angle"])] for row in train])
    assert np.allclose(pipeline.numbers.mean, raw.mean(0)) and np.allclose(pipeline.numbers.std, raw.std(0))
    one, other = (pipeline("red heart", numbers={"size": size, "angle": 1}, num_inference_steps=2, seed=0,
                           output_type="np").images for size in (0.1, 2.9))  # fmt: skip
    assert not np.array_equal(one, other)
    with pytest.raises(RunError, match="data.number_columns"):
        train_ldm(config_of(home, run, loop__steps=8, **{**words, "data__number_columns": ["size"]}))

    own = {"unet__attention": [False, True], "unet__head_channels": 32}  # the road's
    fine = {"init": str(run / "pipeline"), "data__source": str(data), **road.OF_INIT, **own}
    with pytest.raises(ValueError, match=r"data.number_columns: init=.* is conditioned on size, angle; set it to"):
        train_ldm(road.recipe(home, run=str(tmp_path / "fine"), **fine))


def test_repeats_are_the_order_of_a_run_which_resumes_with_no_others(home: Path, tmp_path: Path) -> None:
    data = shutil.copytree(home / "data", tmp_path / "data")
    table = data / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text("utf-8").splitlines()]

    def write(cell: object) -> None:
        table.write_text("".join(json.dumps({**row, "times": "" if i else cell}) + "\n" for i, row in enumerate(rows)))

    write(3)
    source = ConditionedPictures.read(read_captioned(data, holdout=0, progress=False), repeats_column="times")
    assert source.repeats is not None and source.repeats.tolist() == [3] + [1] * (len(rows) - 1)
    words = {"data__source": str(data), "data__repeats_column": "times", "data__holdout": 0.0}
    config = config_of(home, tmp_path / "run", loop__steps=2, **words)
    train_ldm(config)
    samples = LatentSamples.of(config, source, (4, 8, 8))
    epoch = Counter(samples.row_of(n) for n in range(len(rows) + 2))
    assert epoch == {0: 3, **dict.fromkeys(range(1, len(rows)), 1)}
    write(2)
    with pytest.raises(RunError, match=r"data: .* \(pictures, captions"):
        train_ldm(config_of(home, tmp_path / "run", loop__steps=4, **words))
    for cell in (0, 1.5, "often", -1, 1001):
        write(cell)
        with pytest.raises(BadDataError, match=f"times is '{cell}'; expected a whole number from 1 to 1000"):
            train_ldm(config_of(home, tmp_path / "other", loop__steps=2, **words))


@torch.no_grad()
def guided_by_hand(run: Path, classes: list[int], scale: float) -> torch.Tensor:
    """Guided sampling written out: stock U-Net, the saved scheduler, class 4 for null."""
    stock = DiffusionPipeline.from_pretrained(run / "pipeline", text_encoder=None, tokenizer=None)
    unet, scheduler, vae = stock.unet.eval(), stock.scheduler, stock.vae
    size = unet.config.sample_size
    x = torch.cat([torch.randn(1, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(i))
                   for i in range(len(classes))])  # fmt: skip
    scheduler.set_timesteps(3)
    null = torch.full((len(classes),), 4)
    for t in scheduler.timesteps:
        without, given = (unet(x, t, None, class_labels=labels).sample for labels in (null, torch.tensor(classes)))
        x = scheduler.step(without + scale * (given - without), t, x).prev_sample
    return (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def test_text_and_classes_together(home: Path, tmp_path: Path) -> None:
    train_ldm(config_of(home, tmp_path, data__label_column="color", diffusion__caption_dropout=0.3))
    ours = quiet(LDMPipeline.from_pretrained(tmp_path / "pipeline"))
    red, blue, neither = (
        ours("heart", class_label=label, num_inference_steps=2, seed=1, output_type="np").images
        for label in ("red", "blue", None)
    )
    assert not np.array_equal(red, blue) and not np.array_equal(red, neither)


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_class_and_caption_are_dropped_together(home: Path, tmp_path: Path, cache: str) -> None:
    """Read from the very samples that training sees: the null class stands where the null caption does."""
    config = config_of(
        home, tmp_path, data__label_column="color", data__cache=cache, diffusion__caption_dropout=0.4, data__flip="true"
    )
    source = ConditionedPictures.read(read_captioned(home / "data", holdout=0, progress=False), "color", progress=False)
    encoders = Encoders(lambda: load_vae(home / "vae"), lambda: TextEncoder.load(config.text))
    stored = build_cache(config, source.pictures, encoders, (4, 8, 8)) if config.cache_folder() else None
    samples = LatentSamples.of(config, source, (4, 8, 8), stored)
    null_context = TextEncoder.load(config.text).encode([""])[0]
    dropped = []
    for n in range(60):
        sample = samples[n]
        without_text = (
            sample["caption"] == "" if cache == "off" else torch.allclose(sample["context"], null_context, atol=1e-5)
        )
        assert (sample["class"] == source.null_class) == without_text
        dropped.append(without_text)
        if not without_text:
            row = source.pictures[samples.draw(n).row]
            assert source.labels is not None and source.labels.names[sample["class"]] == row.extra["color"]
    assert 8 < sum(dropped) < 40


# --- a picture made of another -----------------------------------------------------------------------


def test_a_model_that_makes_pictures_of_pictures(home: Path, tmp_path: Path) -> None:
    """Its latents are concatenated to x_t, and stock InstructPix2Pix draws the same from the same folder."""
    train_ldm(config_of(home, tmp_path, data__condition_column="outline", diffusion__caption_dropout=0.2))
    unet = unet_of(tmp_path)
    assert (unet.config.in_channels, unet.config.out_channels) == (8, 4)
    assert moved(tmp_path)["conv_in.weight"]
    with Image.open(tmp_path / "samples/step_0000004.png") as preview:  # outlines above what is made of them
        rows = np.array_split(np.asarray(preview.convert("L")), 2)
        assert preview.width > 2 * preview.height and (rows[0] < 50).mean() > 0.01

    ours = quiet(LDMPipeline.from_pretrained(tmp_path / "pipeline"))
    outline, other = (Image.open(home / f"data/outlines/{name}.png") for name in ("cat", "flag"))
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    drawn = ours("red cat", condition=outline, seed=4, **arguments).images
    assert not np.array_equal(drawn, ours("red cat", condition=other, seed=4, **arguments).images)
    stock = quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None))
    assert type(stock) is StableDiffusionInstructPix2PixPipeline
    again = stock(
        "red cat", image=outline, image_guidance_scale=1.0, generator=torch.Generator().manual_seed(4), **arguments
    ).images
    np.testing.assert_allclose(drawn, again, atol=5e-5)
    with pytest.raises(ValueError, match="condition: this model makes pictures of pictures; expected a PIL picture"):
        ours("red cat")


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_cached_or_not_the_second_picture_is_the_same(home: Path, tmp_path: Path, cache: str) -> None:
    words = {"data__condition_column": "outline", "data__flip": "true", "loop__sample_every": 0, "loop__steps": 3}
    losses = train_ldm(config_of(home, tmp_path / cache, data__cache=cache, **words))
    fresh = train_ldm(config_of(home, tmp_path / "again", data__cache="off", **words))
    assert np.allclose(losses, fresh, rtol=1e-4)


def test_rows_without_their_second_picture_are_listed(home: Path, tmp_path: Path) -> None:
    road.draw_folder(tmp_path / "data")
    file = tmp_path / "data/metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    (tmp_path / "data/outlines/cat.png").write_bytes(b"no picture")
    rows[0]["outline"], rows[1]["outline"] = "outlines/none.png", "../secret.png"
    del rows[2]["outline"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pictures = read_captioned(tmp_path / "data", progress=False)
    with pytest.raises(BadDataError) as raised:
        ConditionedPictures.read(pictures, condition_column="outline", progress=False)
    said = str(raised.value)
    for row, what in [(1, "picture is missing"), (2, "leads out of the data folder"), (3, "is empty")]:
        assert any(f"row {row} " in line and what in line for line in said.splitlines()), said
    assert sum("cat" in line for line in said.splitlines()) >= 1
    with pytest.raises(BadDataError, match="nearest is 'outline'"):
        ConditionedPictures.read(pictures, condition_column="outlines", progress=False)


# --- objectives ----------------------------------------------------------------------------------------


OBJECTIVES: dict[str, dict[str, Any]] = {
    "l1": {"diffusion__loss": "l1"},
    "truncated SNR": {"diffusion__weighting": "truncated_snr", "diffusion__prediction": "v"},
    "P2": {"diffusion__weighting": "p2"},
    "vlb": {"diffusion__loss": "vlb", "diffusion__timestep_sampling": "loss_second_moment", "diffusion__timesteps": 10},
    "logit-normal": {"diffusion__timestep_sampling": "logit_normal"},
    "sigmoid schedule": {"diffusion__schedule": "sigmoid"},
    "hybrid": {"diffusion__variance": "learned"},
    "vlb with learned variance": {"diffusion__loss": "vlb", "diffusion__variance": "learned"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_by_config(home: Path, tmp_path: Path, name: str) -> None:
    words = {"loop__steps": 20, "loop__evaluate_every": 10, "loop__sample_every": 0, "optim__ema_decay": 0.8}
    losses = train_ldm(config_of(home, tmp_path, **words, **OBJECTIVES[name]))
    assert np.isfinite(losses).all() and len(losses) == 20
    heldout = list(road.logged(tmp_path, "ldm/heldout/total").values())
    assert heldout[-1] < heldout[0]


MEANT: dict[str, tuple[dict[str, Any], Callable[..., torch.Tensor]]] = {
    "by default": ({}, objective.diffusion_loss),
    "of v": ({"prediction": "v"}, partial(objective.diffusion_loss, prediction="v")),
    "l1": ({"loss": "l1", "prediction": "x0"}, partial(objective.diffusion_loss, prediction="x0", norm="l1")),
    "min-SNR": (
        {"weighting": "min_snr", "min_snr_gamma": 3.0},
        partial(objective.diffusion_loss, weighting=objective.min_snr(3.0)),
    ),
    "truncated SNR": (
        {"weighting": "truncated_snr"}, partial(objective.diffusion_loss, weighting=objective.truncated_snr()),
    ),
    "P2": (
        {"weighting": "p2", "p2_gamma": 0.7, "p2_k": 2.0},
        partial(objective.diffusion_loss, weighting=objective.p2(0.7, 2.0)),
    ),
}  # fmt: skip
#: The same, of the denoiser's whole answer.
MEANT_OF_STEPS: dict[str, tuple[dict[str, Any], str, Callable[..., torch.Tensor]]] = {
    "the bound": ({"loss": "vlb"}, "beta_tilde", objective.vlb_loss),
    "the bound, learned": ({"loss": "vlb", "variance": "learned"}, "learned", objective.vlb_loss),
    "hybrid": (
        {"variance": "learned", "vlb_weight": 0.3, "weighting": "min_snr"}, "learned",
        partial(objective.hybrid_loss, vlb_weight=0.3, weighting=objective.min_snr()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MEANT, *MEANT_OF_STEPS])
def test_the_config_names_what_is_minimized(name: str) -> None:
    """To the last bit the loss of ldm.diffusion that the words say, and none of the others."""
    words = (MEANT | MEANT_OF_STEPS)[name][0]
    config = DiffusionConfig(**words)
    schedule, x0, eps, t = (
        build_schedule(config),
        randn(4, 2, 3),
        randn(4, 2, 3, seed=1),
        torch.tensor([0, 9, 500, 999]),
    )
    channels = 4 if config.variance == "learned" else 2
    network = lambda x, t: randn(4, channels, 3, seed=2).tanh()  # noqa: E731
    found = build_objective(config, schedule)(network, x0, t, eps)
    if name in MEANT:
        expected = MEANT[name][1](network, NoiseSchedule.scaled_linear(), x0, t, eps)
    else:
        _, variance, loss = MEANT_OF_STEPS[name]
        expected = loss(Denoiser(network, NoiseSchedule.scaled_linear(), "eps", variance), x0, t, eps)
    assert torch.equal(found, expected)


def test_the_config_names_the_process_and_the_sampling_of_t() -> None:
    for name in ("linear", "scaled_linear", "cosine", "sigmoid"):
        for zero in (False, True):
            config = DiffusionConfig(schedule=name, timesteps=77, zero_terminal_snr=zero, prediction="v")  # type: ignore[arg-type]
            expected = NoiseSchedule.from_name(name, 77, zero_terminal_snr=zero)
            assert torch.equal(build_schedule(config).betas, expected.betas)
    u, process = torch.linspace(0, 0.999, 50, dtype=torch.float64), NoiseSchedule.linear(77)
    for name, expected_draw in (("uniform", timesteps.uniform(77)), ("logit_normal", timesteps.logit_normal(77))):
        draw = build_timesteps(DiffusionConfig(timesteps=77, timestep_sampling=name), process)  # type: ignore[arg-type]
        assert torch.equal(draw(u)[0], expected_draw(u)[0])
    draw = build_timesteps(
        DiffusionConfig(timesteps=77, loss="vlb", timestep_sampling="loss_second_moment"), NoiseSchedule.linear(77)
    )
    assert isinstance(draw, timesteps.LossSecondMoment) and len(draw.count) == 77


def test_learned_variance_is_cut_off_for_stock_pipelines(home: Path, tmp_path: Path) -> None:
    """Trained with 2C channels; saved with C, equal to the first C, so that stock draws with the learned mean."""
    train_ldm(config_of(home, tmp_path, diffusion__variance="learned", optim__ema_decay=0.5, diffusion__vlb_weight=1.0))
    assert moved(tmp_path)["conv_out.bias"]
    average = load_file(tmp_path / "checkpoints/ldm/step_0000004/unet.ema.safetensors")
    start = load_file(tmp_path / "checkpoints/ldm/step_0000003/unet.safetensors")
    end = load_file(tmp_path / "checkpoints/ldm/step_0000004/unet.safetensors")
    assert average["conv_out.weight"].shape[0] == 8
    assert not torch.equal(start["conv_out.weight"][4:], end["conv_out.weight"][4:])  # the variance learned, too
    stock = quiet(StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None))
    saved = stock.unet.state_dict()
    assert stock.unet.config.out_channels == 4
    for name, tensor in average.items():
        expected = tensor[:4] if name.startswith("conv_out.") else tensor
        assert torch.equal(saved[name], expected), name
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    drawn = stock("cat", num_inference_steps=2, height=tiny.SIZE, width=tiny.SIZE, output_type="np").images
    assert np.isfinite(drawn).all()


def test_importance_sampling_resumes_with_its_memory(home: Path, tmp_path: Path) -> None:
    words = {"diffusion__loss": "vlb", "diffusion__timestep_sampling": "loss_second_moment", "diffusion__timesteps": 2,
             "loop__sample_every": 0, "loop__checkpoint_every": 10}  # fmt: skip
    straight = train_ldm(config_of(home, tmp_path / "straight", loop__steps=20, **words))
    first = train_ldm(config_of(home, tmp_path / "stopped", loop__steps=10, **words))
    memory = load_file(tmp_path / "stopped/checkpoints/ldm/step_0000010/timesteps.safetensors")
    assert int(memory["count"].sum()) == 80 and float(memory["losses"].abs().min()) > 0
    assert first + train_ldm(config_of(home, tmp_path / "stopped", loop__steps=20, **words)) == straight
