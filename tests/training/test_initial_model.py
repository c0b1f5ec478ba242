"""A training that starts from a model: step 0 is the model's to the bit, and nothing contradicts it in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ldm import LDMPipeline
from ldm.data.dataset import read_captioned
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.unet import UNetConfig, build_unet, choose_attention, described
from ldm.models.vae import VAEConfig, encode
from ldm.system.errors import RunError
from ldm.training.config import Config
from ldm.training.distributed import build_accelerator
from ldm.training.initial_model import resolved
from ldm.training.run import train
from ldm.training.sizes import check_sizes
from ldm.training.tasks.diffusion import Diffusion

PLAIN = {"text__encoder": "minilm", "text__max_length": 32, "unet__channels": [128, 192, 256], "unet__layers": 2,
         "unet__attention": [False, True, True], "unet__head_channels": 64}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and models to start from: by kind of text encoder, with classes, with a second picture."""
    folder = tmp_path_factory.mktemp("initial")
    road.draw_folder(folder / "data")
    for kind in ("clip", "bert"):
        model = tiny.pipeline(folder / f"{kind}-encoder", kind, NoiseSchedule.cosine(), "v")
        model.vae.register_to_config(scaling_factor=0.7)
        model.save_pretrained(folder / kind)
    tiny.class_pipeline(folder / "encoder", tuple(sorted(road.COLORS))).save_pretrained(folder / "classes")
    tiny.condition_pipeline(folder / "encoder").save_pretrained(folder / "pictures")
    return folder


def config_of(home: Path, run: Path, init: str = "clip", **words: Any) -> Config:
    return road.recipe(home, **{"run": str(run), "init": str(home / init), "loop__steps": 4, **PLAIN, **words})


def built(config: Config, kind: type[Diffusion] = Diffusion) -> Diffusion:
    """The task of a config, with its networks."""
    config = resolved(config, "ldm")
    check_sizes(config, "ldm")
    pictures = read_captioned(config.data.source, **config.data.reading(), progress=False)
    task = kind.create(config, build_accelerator(config.loop), pictures)
    task.build()
    return task


def stock_of(folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


# --- step 0 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "words"),
    [("clip", {}), ("bert", {"data__size": 32}), ("clip", {"data__condition_column": "outline"})],
    ids=str,
)
@torch.no_grad()
def test_step_0_is_the_models_to_the_last_bit(home: Path, tmp_path: Path, init: str, words: dict[str, Any]) -> None:
    """Latents, contexts and predictions are those of the stock pipeline, whatever the size and the new channels."""
    task, stock = built(config_of(home, tmp_path, init, **words)), stock_of(home / init)
    assert task.encoders is not None and task.encoders.text is not None
    context = stock.encode_prompt("red heart", "cpu", 1, False)[0]
    assert torch.equal(task.encoders.text.encode(["red heart"]), context)
    batch = task.batches([range(2)])[0]
    size = task.config.data.size // 2
    assert batch.x0.shape == (2, 4, size, size)
    pixels = torch.rand(2, 3, 2 * size, 2 * size) * 2 - 1
    latents = encode(task.encoders.vae, pixels).mean  # with channels last, which rounds otherwise
    torch.testing.assert_close(latents, stock.vae.encode(pixels).latent_dist.mean * 0.7, rtol=1e-4, atol=1e-5)

    t = torch.tensor([3, 900])
    expected = stock.unet(batch.x0, t, batch.conditioning.context).sample
    assert torch.equal(task.output(task.initial_unet(), batch.x0, t, batch.conditioning), expected)
    choose_attention(stock.unet, torch.device("cpu"))  # as training has it
    expected = stock.unet(batch.x0, t, batch.conditioning.context).sample
    assert torch.equal(task.output(task.unet.module, batch.x0, t, batch.conditioning), expected)
    module: Any = task.unet.module
    assert module.config.in_channels == 4 * (1 + ("data__condition_column" in words))
    assert module.config.sample_size == size
    torch.testing.assert_close(task.schedule.alpha_bar.float(), stock.scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)
    assert task.config.diffusion.prediction == "v" and stock.scheduler.config.prediction_type == "v_prediction"
    assert task.unet.ema is not None
    for average, weight in zip(task.unet.ema.shadow_params, module.parameters(), strict=True):
        assert torch.equal(average, weight)


def test_a_model_with_a_second_picture_and_one_with_classes_go_on(home: Path, tmp_path: Path) -> None:
    task = built(config_of(home, tmp_path, "pictures", data__condition_column="outline"))
    source = UNet2DConditionModel.from_pretrained(home / "pictures/unet")
    for name, weight in source.state_dict().items():
        assert torch.equal(task.unet.module.state_dict()[name], weight), name
    rows = [json.loads(line) for line in (home / "data/metadata.jsonl").read_text("utf-8").splitlines()]
    few = tmp_path / "few"  # of two colors: their numbers are still those of four
    shutil.copytree(home / "data", few)
    kept = [row for row in rows if row["color"] in ("red", "yellow")]
    for row in rows:
        if row not in kept:
            (few / row["file_name"]).unlink()
    (few / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    words = {"data__label_column": "color", "data__source": str(few)}
    task = built(config_of(home, tmp_path / "run", "classes", **words))
    assert task.source is not None and task.source.labels is not None
    assert task.source.labels.names == tuple(sorted(road.COLORS)) and set(task.source.class_ids) == {2, 3}


def test_a_process_without_a_name_is_the_models_all_the_same(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "bert", tmp_path / "model")
    betas = torch.linspace(0.001, 0.03, 50).tolist()
    DDPMScheduler(50, trained_betas=betas, prediction_type="sample").save_pretrained(folder / "scheduler")
    task = built(config_of(home, tmp_path / "run", str(folder)))
    assert torch.allclose(task.schedule.betas, torch.tensor(betas, dtype=torch.float64), rtol=1e-6)
    assert (task.schedule.T, task.config.diffusion.timesteps, task.config.diffusion.prediction) == (50, 50, "x0")


# --- a run ---------------------------------------------------------------------------------------------


def test_a_run_learns_resumes_exactly_and_refuses_another_source(home: Path, tmp_path: Path) -> None:
    """What the pipeline keeps of the source, what the checkpoint says of it, and that another one is refused."""
    words = {"loop__sample_every": 0, "loop__checkpoint_every": 2, "loop__evaluate_every": 0,
             "data__condition_column": "outline"}  # fmt: skip
    model = shutil.copytree(home / "clip", tmp_path / "model")
    config = config_of(home, tmp_path / "run", str(model), **words)
    straight = train("ldm", config)
    stopped = config_of(home, tmp_path / "stopped", str(model), **words)
    first = train("ldm", road.replace(stopped, loop={"steps": 2}))
    assert first + train("ldm", stopped) == straight and len(first) == 2

    state = json.loads((tmp_path / "run/checkpoints/ldm/step_0000004/state.json").read_text("utf-8"))
    said = state["config"]
    assert (said["init"], said["vae"], said["text"]["encoder"]) == (str(model),) * 3
    assert (said["diffusion"]["schedule"], said["diffusion"]["prediction"]) == ("cosine", "v")
    assert said["unet"]["channels"] == [32, 64] and said["text"]["max_length"] == tiny.MAX_LENGTH
    ours, source = LDMPipeline.from_pretrained(tmp_path / "run/pipeline"), stock_of(model)
    for part in ("vae", "text_encoder"):
        for name, weight in getattr(source, part).state_dict().items():
            assert torch.equal(getattr(ours, part).state_dict()[name], weight), name
    assert ours.vae.config.scaling_factor == 0.7
    assert torch.equal(ours.scheduler.alphas_cumprod, source.scheduler.alphas_cumprod)
    assert ours.scheduler.config.prediction_type == "v_prediction"
    assert (ours.unet.config.in_channels, ours.unet.config.out_channels) == (8, 4)

    with pytest.raises(RunError, match=r"init: .*model' => .*bert"):
        train("ldm", config_of(home, tmp_path / "run", "bert", **words))
    file = model / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"] += 1
    save_file(weights, file)
    with pytest.raises(RunError, match=r"init_weights: .* \(of the U-Net that init names\)"):
        train("ldm", road.replace(config, loop={"steps": 5}))


# --- what contradicts it ---------------------------------------------------------------------------------


CONTRADICTIONS = {
    "vae": ({"vae": "elsewhere"}, "vae: init=.* brings .*, and its U-Net knows no other; got 'elsewhere'"),
    "text.encoder": ({"text__encoder": "null"}, r"text\.encoder: init="),
    "text.max_length": ({"text__max_length": 20}, r"text\.max_length: init=.* brings 12"),
    "unet.channels": ({"unet__channels": [32, 96, 64]}, r"unet\.channels: init=.* brings \(32, 64\)"),
    "unet.scale_shift": ({"unet__scale_shift": "true"}, r"unet\.scale_shift: init=.* brings False"),
    "diffusion.schedule": ({"diffusion__schedule": "linear"}, r"diffusion\.schedule: init=.* brings 'cosine'"),
    "diffusion.prediction": ({"diffusion__prediction": "x0"}, r"diffusion\.prediction: init=.* brings 'v'"),
    "diffusion.timesteps": ({"diffusion__timesteps": 100}, r"diffusion\.timesteps: init=.* brings 1000"),
    "diffusion.variance": ({"diffusion__variance": "learned"}, r"diffusion\.variance: init=.* brings 'fixed'"),
    "no classes": ({"data__label_column": "color"}, r"data\.label_column: init=.* knows no classes"),
    "no numbers": ({"data__number_columns": ["size"]}, r"data\.number_columns: init=.* is conditioned on no numbers"),
    "classes": ({"init": "classes"}, r"data\.label_column: init=.* knows the classes blue, green, red, yellow"),
    "a second picture": ({"init": "pictures"}, r"data\.condition_column: init=.* takes a second picture"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_the_model_is_refused_by_its_key(home: Path, tmp_path: Path, name: str) -> None:
    words, message = CONTRADICTIONS[name]
    with pytest.raises(ValueError, match=message) as raised:
        train("ldm", config_of(home, tmp_path / "run", **words))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_what_says_the_same_as_the_model_is_fine(home: Path, tmp_path: Path) -> None:
    """The model's own recipe, and the config that a checkpoint keeps."""
    words = {"unet__channels": [32, 64], "unet__attention": [True, True], "unet__layers": 1, "unet__head_channels": 16,
             "diffusion__schedule": "cosine", "diffusion__prediction": "v", "text__max_length": 12}  # fmt: skip
    once = resolved(config_of(home, tmp_path, **words), "ldm")
    assert once == resolved(config_of(home, tmp_path), "ldm") == resolved(once, "ldm")


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")


def _other_latents(model: Path) -> None:
    shutil.rmtree(model / "vae")
    tiny.pipeline(model.parent / "e", vae_config=VAEConfig((16, 32), 1, 8)).vae.save_pretrained(model / "vae")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no pipeline": (lambda model: (model / "model_index.json").unlink(), "init: .* is not a pipeline folder"),
    "no folder": (shutil.rmtree, "init: .*: there is no such folder; name the model"),
    "other latents": (_other_latents, "init: .* predicts latents of 4 channels, its VAE makes 8"),
    "other text": (
        lambda model: edit(model / "unet/config.json", cross_attention_dim=48),
        "init: .* attends to 48 channels, its text encoder has 32",
    ),
    "other channels": (
        lambda model: edit(model / "unet/config.json", in_channels=7), "init: .* takes 7 channels; expected 4, 8 with"
    ),
    "distilled": (lambda model: edit(model / "unet/config.json", time_cond_proj_dim=32), "init: .*time_cond_proj"),
    "upscaler": (
        lambda model: edit(model / "model_index.json", _class_name="StableDiffusionUpscalePipeline"),
        "init: .* is an upscaler, which is trained from random weights alone",
    ),
    "unnamed classes": (
        lambda model: edit(model / "unet/config.json", num_class_embeds=5), "init: .* has 5 class embeddings"
    ),
    "flow matching": (
        lambda model: edit(model / "scheduler/scheduler_config.json", prediction_type="flow_prediction"),
        "init: prediction_type: flow_prediction and use_flow_sigmas go together",
    ),
    "foreign class": (
        lambda model: edit(model / "model_index.json", unet=["os", "system"]), "init: .*unet: expected diffusers's"
    ),
    "endless captions": (
        lambda model: edit(model / "tokenizer/tokenizer_config.json", model_max_length=10**30), r"text\.max_length"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_model_to_start_from_is_refused_in_one_line(home: Path, tmp_path: Path, name: str) -> None:
    model = shutil.copytree(home / "clip", tmp_path / "model")
    spoil, message = BROKEN[name]
    spoil(model)
    with pytest.raises((ValueError, OSError), match=message) as raised:
        train("ldm", config_of(home, tmp_path / "run", str(model)))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_vae_is_not_trained_from_a_model(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="init: the model brings its VAE, which is not trained"):
        train("vae", config_of(home, tmp_path))


def test_a_class_that_the_model_does_not_know_is_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.label_column: .* doesn't know the class 'cat'"):
        data = shutil.copytree(home / "data", tmp_path / "data")
        rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text("utf-8").splitlines()]
        lines = (json.dumps(row | {"color": "cat" if i < 12 else "red"}) + "\n" for i, row in enumerate(rows))
        (data / "metadata.jsonl").write_text("".join(lines), "utf-8")
        built(config_of(home, tmp_path / "run", "classes", data__label_column="color", data__source=str(data)))


@pytest.mark.parametrize(
    "config",
    [UNetConfig(), UNetConfig((32, 96), (True, False), 1, 32, 2, True), UNetConfig((64,), (True,), 3, 8, 1),
     UNetConfig((32, 64), (False, True), 1, 16, scale_shift=True, residual_resampling=True)],
)  # fmt: skip
@pytest.mark.parametrize("dim", [16, None])
def test_a_stock_unets_config_says_what_ours_said(config: UNetConfig, dim: int | None) -> None:
    if dim is None and config.residual_resampling:
        return
    with torch.device("meta"):
        stock = build_unet(config, latent_shape=(4, 8, 8), context_dim=dim)
    again = UNetConfig(**described(stock.config))
    with torch.device("meta"):
        assert build_unet(again, latent_shape=(4, 8, 8), context_dim=dim).config == stock.config
    assert np.array_equal(again.channels, config.channels)
