"""The road from a captioned folder to a pipeline, through the commands that people type."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import Encoder
from PIL import Image
from safetensors.torch import load_file
from transformers import BertModel

from ldm.data import dataset, facts
from ldm.data.cache.store import DamagedError, Kind, Store
from ldm.data.conditioned import ConditionedPictures
from ldm.data.dataset import read_captioned
from ldm.data.images import decode as decode_picture
from ldm.models.conditioning import Conditioning
from ldm.models.text_encoder import TextConfig, TextEncoder
from ldm.models.vae import build_vae, decode, encode, load_vae
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.system.errors import RunError
from ldm.training.config import Config
from ldm.training.doctor.trial import OVERFIT, TIMED
from ldm.training.encoders import Encoders
from ldm.training.run import train
from ldm.training.samples import Batch, validation_sets
from ldm.training.trainer import Trainer
from train.train_ldm import main as train_ldm
from train.train_vae import main as train_vae

ENCODERS = (AutoencoderKL, BertModel)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, a text encoder, and a VAE trained by the real command."""
    folder = tmp_path_factory.mktemp("road")
    road.draw_folder(folder / "data")
    tiny.save_text_encoder(folder / "text", "bert")
    config = road.save_recipe(road.recipe(folder, loop__log_every=1), folder / "recipe.yaml")
    said = road.launch("train_vae", config)
    assert "dB PSNR on" in said and "held-out pictures" in said
    return folder


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """The recipe's six steps in one go: losses and run, which other runs must equal."""
    run = tmp_path_factory.mktemp("whole")
    return train_ldm(config_of(home, run)), run


def config_of(home: Path, run: Path, **words: object) -> Config:
    return road.recipe(home, run=str(run), vae=str(home / "run" / "vae"), **words)


# --- the commands --------------------------------------------------------------------------------


def test_one_process_and_two_agree_on_the_loss(home: Path, tmp_path: Path) -> None:
    """The same global batch: the same pictures, captions, t and noise, whatever process they fall to."""
    run_of = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, run in run_of.items():
        vae = f"vae={home / 'run' / 'vae'}"
        words = (f"run={run}", vae, "loop.accumulation=2", "loop.steps=4", "loop.sample_every=0")
        road.launch("train_ldm", home / "recipe.yaml", *words, processes=processes)
    one, two = (list(road.logged(run, "ldm/loss").values()) for run in run_of.values())
    assert len(one) == 4
    assert [road.processes_of(run) for run in run_of.values()] == [{1}, {2}]
    assert np.allclose(one, two, rtol=2e-5, atol=0)
    assert max(one) / min(one) > 1.02  # and they are not all the same by triviality
    for cache in (run / "cache" for run in run_of.values()):  # encoded once, not once by each
        (posteriors,) = cache.glob("posteriors-*.sqlite")
        assert len(Store(posteriors, Kind.of(posteriors))) == 24  # the held-out pictures, too
    weights = [load_file(run / "checkpoints/ldm/step_0000004/unet.safetensors") for run in run_of.values()]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=2e-3)  # Adam: one lr step at most


def test_vae_and_discriminator_agree_in_one_process_and_two(home: Path, tmp_path: Path) -> None:
    words = [f"vae_training.{word}" for word in ("steps=5", "log_every=1", "adversarial=0.1", "adversarial_start=2")]
    for processes in (1, 2):
        run = f"run={tmp_path / str(processes)}"
        road.launch("train_vae", home / "recipe.yaml", *words, run, processes=processes)
    one, two = (list(road.logged(tmp_path / run, "vae/loss").values()) for run in "12")
    assert len(one) == 5
    assert [road.processes_of(tmp_path / run) for run in "12"] == [{1}, {2}]
    assert np.allclose(one, two, rtol=1e-5, atol=0)


WAITING = """
import datetime, sys, time
import torch
from accelerate import PartialState
from ldm.training import distributed as ranks

state = PartialState(cpu=True, timeout=datetime.timedelta(seconds=4))
ranks.TICK_SECONDS = 0.5

def work(tick):
    assert state.process_index == 0
    for _ in range(80 if sys.argv[1] == "works" else 5):
        time.sleep(0.1)
        tick()
    if sys.argv[1] == "fails":
        raise ValueError("on purpose")

try:
    ranks.on_rank_0(work)
    print(f"rank {state.process_index} goes on", flush=True)
except Exception as error:
    print(f"rank {state.process_index}: {error}", flush=True)
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["works", "fails"])
def test_ranks_wait_longer_than_a_collective_would(tmp_path: Path, how: str) -> None:
    """Eight seconds of work where gloo gives a silent process up after four; and a failure that the others are told."""
    (tmp_path / "waiting.py").write_text(WAITING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(road.ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(tmp_path / "waiting.py"), how], env=environment, capture_output=True, text=True, timeout=180
    )
    said = done.stdout  # of both, and their lines may run into each other
    if how == "works":
        assert said.count("rank 0 goes on") == said.count("rank 1 goes on") == 1, done.stderr[-2000:]
        assert "failed" not in said
    else:
        assert said.count("rank 0: on purpose") == said.count("rank 1: rank 0 failed") == 1, done.stderr[-2000:]
        assert "goes on" not in said


def test_bad_data_end_the_command_with_a_list_and_no_traceback(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "data", tmp_path / "data")
    with (tmp_path / "data/metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "images/none.png", "text": "nothing"}) + "\n")
        file.write(json.dumps({"file_name": "images/red_heart.png", "text": "  "}) + "\n")
    command = [sys.executable, "train/train_ldm.py", "--config", str(home / "recipe.yaml")]
    done = subprocess.run(
        [*command, f"data.source={tmp_path / 'data'}"], cwd=road.ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "row 25" in done.stderr and "row 26" in done.stderr and "images/none.png" in done.stderr


# --- the VAE --------------------------------------------------------------------------------------


def test_trained_vae_speaks_unit_latents_and_reconstructs(home: Path) -> None:
    vae = load_vae(home / "run" / "vae")
    assert vae.config.scaling_factor == 1.0
    pictures = read_captioned(home / "data", holdout=0.2, progress=False).train
    pixels = torch.stack([torch.from_numpy(np.array(row.image())).permute(2, 0, 1) / 127.5 - 1 for row in pictures])
    posterior = encode(vae, pixels)
    latents = posterior.sample(torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0)))
    spread = 5 / (latents.numel() / latents.shape[1]) ** 0.5  # five standard errors of a mean or std of unit normals
    assert latents.mean((0, 2, 3)).abs().max() < spread
    assert (latents.std((0, 2, 3)) - 1).abs().max() < spread
    error = (decode(vae, posterior.mean) - pixels).square().mean()
    assert error < 0.5 * pixels.var()  # forty steps reach more than the mean picture
    loss = list(road.logged(home / "run", "vae/loss").values())
    assert loss[-1] < 0.7 * loss[0]
    assert (home / "run/reconstructions/step_0000040.png").exists()


def test_adversarial_term_trains_the_discriminator_from_its_step_on(home: Path, tmp_path: Path) -> None:
    words = {"vae_training__steps": 4, "vae_training__adversarial": 0.1, "vae_training__adversarial_start": 2}
    plain = train_vae(road.recipe(home, run=str(tmp_path / "plain"), vae_training__steps=4))
    judged = train_vae(road.recipe(home, run=str(tmp_path / "judged"), **words))
    assert judged[:2] == plain[:2]
    assert judged[2] != plain[2]
    weights = load_file(tmp_path / "judged/checkpoints/vae/step_0000004/discriminator.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_perceptual_loss_names_the_missing_package(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"vae_training\.perceptual: .*lpips"):
        train_vae(road.recipe(home, run=str(tmp_path), vae_training__perceptual=0.5))


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_latents_of_another_scale_are_refused(home: Path, tmp_path: Path, cache: str) -> None:
    """A VAE in RUN/vae that was never normalized on these pictures."""
    torch.manual_seed(0)
    config = road.recipe(home, run=str(tmp_path), data__cache=cache)
    vae = build_vae(config.vae_model)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"vae: its latents have a std of .* expected 1 \+- 0.1"):
        train_ldm(config)
    # named as a pretrained VAE, it is measured and normalized, and the run starts
    losses = train_ldm(road.recipe(home, run=str(tmp_path / "run"), vae=str(tmp_path / "vae"), loop__steps=1))
    assert np.isfinite(losses).all()
    assert load_vae(tmp_path / "run/pipeline/vae").config.scaling_factor == 1.0


def test_without_a_vae_the_error_names_the_command_that_trains_one(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_vae\.py"):
        train_ldm(road.recipe(home, run=str(tmp_path)))


# --- the U-Net ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_every_objective_learns(home: Path, tmp_path: Path, prediction: str) -> None:
    """Sixty steps on two dozen pictures: the held-out-style loss at fixed (t, eps) must fall well below its start."""
    words = {
        "diffusion__prediction": prediction,
        "loop__steps": 60,
        "loop__evaluate_every": 15,
        "loop__checkpoint_every": 60,
        "loop__sample_every": 0,
    }
    train_ldm(config_of(home, tmp_path, diffusion__weighting="min_snr", optim__ema_decay=0.9, **words))
    heldout = list(road.logged(tmp_path, "ldm/heldout/total").values())
    assert heldout[-1] < 0.75 * heldout[0]
    quarters = [road.logged(tmp_path, f"ldm/heldout/q{i}")[60] for i in (1, 2, 3, 4)]
    assert sum(quarters) / 4 == pytest.approx(heldout[-1])
    assert quarters[0] > quarters[-1]  # little noise is hard to tell from the picture, much noise is easy


def test_logged_caption_gaps_are_those_of_the_exported_pipeline(home: Path, tmp_path: Path) -> None:
    """The logged gaps are those of the pipeline that the run leaves, on its own fixed questions."""
    words = {"loop__steps": 4, "loop__evaluate_every": 4, "loop__sample_every": 0, "optim__ema_decay": 0.9}
    config = config_of(home, tmp_path, **words)
    train_ldm(config)
    pipe = LDMPipeline.from_pretrained(tmp_path / "pipeline")
    text = TextEncoder(pipe.tokenizer, pipe.text_encoder)
    heldout = read_captioned(home / "data", holdout=0.2, progress=False).heldout
    encoders = Encoders(lambda: pipe.vae, lambda: text)
    (asked,) = validation_sets(config, ConditionedPictures(heldout), encoders, (4, 8, 8), torch.device("cpu"))
    assert asked.shuffled is not None
    true, schedule = asked.true, pipe.scheduler.alphas_cumprod.double()

    @torch.no_grad()
    def loss(context: torch.Tensor) -> float:
        errors = []
        for t, eps in zip(true.t, true.eps, strict=True):
            alpha_bar = schedule[t].reshape(-1, 1, 1, 1).float()
            x_t = alpha_bar.sqrt() * true.x0 + (1 - alpha_bar).sqrt() * eps
            errors.append((pipe.unet(x_t, t, encoder_hidden_states=context).sample - eps).square().mean())
        return float(torch.stack(errors).mean())

    own = true.conditioning.context
    assert own is not None
    assert not any(bool((mine == other).all()) for mine, other in zip(own, asked.shuffled, strict=True))
    gaps = {"text_gap": asked.shuffled, "null_gap": text.encode([""]).expand_as(own)}
    for name, context in gaps.items():
        (logged,) = road.logged(tmp_path, f"ldm/heldout/{name}").values()
        assert logged == pytest.approx(loss(context) - loss(own), rel=0.05, abs=2e-7)
        assert logged != 0


def test_the_cache_changes_nothing(home: Path, tmp_path: Path) -> None:
    """Encoded once or encoded at every step: the same draws give the same losses."""
    cached, fresh = (
        train_ldm(config_of(home, tmp_path / cache, data__cache=cache, data__flip="true", loop__sample_every=0))
        for cache in ("auto", "off")
    )
    assert np.allclose(cached, fresh, rtol=1e-4)
    assert len(cached) == 6


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_the_encoders_are_in_memory_only_while_they_are_needed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """Counted among all objects of the process: in every step of the trial and the run, and while one encodes.

    Only steps that encode for themselves need both at once.
    """

    def alive() -> set[int]:
        found = [o for o in gc.get_objects() if isinstance(o, ENCODERS)]
        return {id(o) for o in found if any(p.device.type != "meta" for p in o.parameters())}

    before, found, step = alive(), [], Trainer.step

    def looking(trainer: Trainer, *arguments: Any) -> Any:
        found.append(len(alive() - before))
        return step(trainer, *arguments)

    def meeting(kind: Any) -> Callable[..., Any]:
        forward = kind.forward

        def encoding(*arguments: Any, **named: Any) -> Any:
            together.append((len(found), len(alive() - before)))
            return forward(*arguments, **named)

        return encoding

    together: list[tuple[int, int]] = []
    monkeypatch.setattr(Encoder, "forward", meeting(Encoder))
    monkeypatch.setattr(BertModel, "forward", meeting(BertModel))
    monkeypatch.setattr(Trainer, "step", looking)
    drawing = tmp_path / "run/samples/step_0000004.png"
    words = {"doctor": True, "data__cache": cache, "loop__checkpoint_every": 2, "loop__sample_every": 4}
    train_ldm(config_of(home, tmp_path / "run", **words))
    assert drawing.exists()
    tried = len(found) - 6
    assert tried == 1 + TIMED + OVERFIT
    assert found == [0] * tried + [0 if cache == "auto" else 2] * 6
    beside = [count for steps, count in together if steps <= tried]  # pipelines that draw have both, later
    assert len(beside) > 8 and set(beside) == ({1} if cache == "auto" else {1, 2})


def test_the_first_steps_learn_at_half_the_size(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The U-Net sees smaller latents in those steps and in no others: not in the trial, nor when it is asked."""
    seen: list[tuple[bool, tuple[int, ...]]] = []
    forward = UNet2DConditionModel.forward

    def looking(unet: UNet2DConditionModel, x_t: torch.Tensor, *words: Any, **named: Any) -> Any:
        seen.append((torch.is_grad_enabled(), tuple(x_t.shape)))
        return forward(unet, x_t, *words, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", looking)
    words = {"doctor": True, "loop__half_size_steps": 2, "loop__steps": 5, "loop__sample_every": 0}
    train_ldm(config_of(home, tmp_path / "run", **words))
    asked = {shape[1:] for learning, shape in seen if not learning}
    learned = [shape for learning, shape in seen if learning]
    (whole,) = asked
    half = (whole[0], whole[1] // 2, whole[2] // 2)
    assert [shape[1:] for shape in learned] == [whole] * (1 + TIMED + OVERFIT) + [half] * 2 + [whole] * 3


def test_a_halved_batch_is_the_mean_of_fours_and_its_noise_is_noise() -> None:
    torch.manual_seed(0)
    x0, eps, channels = torch.randn(3, 2, 6, 8), torch.randn(3, 2, 6, 8), torch.randn(3, 2, 6, 8)
    batch = Batch(x0, Conditioning(torch.randn(3, 4, 5), None, channels), torch.rand(3), eps)
    halved = batch.halved()
    for whole, half, factor in ((x0, halved.x0, 1), (eps, halved.eps, 2), (channels, halved.conditioning.channels, 1)):
        assert half is not None and half.shape == (3, 2, 3, 4)
        for y in range(3):
            for x in range(4):
                four = whole[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].sum((2, 3)) / 4
                torch.testing.assert_close(half[:, :, y, x], factor * four)
    assert halved.u is batch.u and halved.conditioning.context is batch.conditioning.context
    noise = Batch(x0, Conditioning(), batch.u, torch.randn(64, 4, 64, 64)).halved().eps
    assert abs(noise.std() - 1) < 0.01  # 262,144 values: six standard errors are 0.008
    assert abs((noise[..., 1:] * noise[..., :-1]).mean()) < 0.02  # neighbors know nothing of each other


def test_a_second_start_encodes_nothing_and_new_rows_only_themselves(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pretrained VAE, whose scale is measured, too: once in a run, or every new picture would change all latents.

    Likewise the text encoder: a new caption would change every context.
    """
    shutil.copytree(home / "data", tmp_path / "data")
    config = config_of(home, tmp_path / "run", data__source=str(tmp_path / "data"), data__holdout=0, loop__steps=1)
    for said in ("24 pictures and 25 captions to encode", "all 24 pictures and their captions are in"):
        train_ldm(config)
        assert f"cache: {said}" in capsys.readouterr().out
    # another run may use the same folder
    train_ldm(road.replace(config, run=str(tmp_path / "other"), data={"cache": str(tmp_path / "run/cache")}))
    assert f"are in {tmp_path / 'run/cache'}" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "other/cache").iterdir()] == ["rows.npy"]
    Image.new("RGB", (tiny.SIZE, tiny.SIZE), "brown").save(tmp_path / "data/images/new.png")
    with (tmp_path / "data/metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "images/new.png", "text": "brown cat"}) + "\n")
    train_ldm(road.replace(config, resume={"allow": ("pictures",)}))
    assert "cache: 1 picture and 1 caption to encode" in capsys.readouterr().out


def test_a_resumed_run_decodes_no_picture(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []

    def counted(data: bytes, *arguments: Any) -> Image.Image:
        decoded.append(data)
        return decode_picture(data, *arguments)

    for module in (facts, dataset):
        monkeypatch.setattr(module, "decode", counted)
    monkeypatch.setattr(facts, "SETTLED", -1.0)  # for this test, files are old as soon as they are made
    columns = {"data__label_column": "color", "data__condition_column": "outline"}
    steps = {"loop__steps": 2, "classifier_training__steps": 2, "loop__sample_every": 0}  # previews show pictures
    config = config_of(home, tmp_path / "run", **steps, **columns)
    for task, section in (("ldm", "loop"), ("classifier", "classifier_training")):
        train(task, config)
        assert decoded
        decoded.clear()
        allowed = {"allow": (f"{section}.steps",)}
        assert len(train(task, road.replace(config, resume=allowed, **{section: {"steps": 4}}))) == 2
        assert decoded == [], task


def test_the_context_has_mean_0_and_variance_1(home: Path, tmp_path: Path) -> None:
    """In the pipeline, that is where pictures are drawn; all of its captions were measured, and nothing else was."""
    pictures = read_captioned(str(home / "data"), holdout=0.2)
    captions = sorted({caption for row in pictures.train for caption in row.captions})
    given = TextEncoder.load(TextConfig(str(home / "text"), tiny.MAX_LENGTH))
    for standardize in (True, False):
        run = tmp_path / str(standardize)
        train_ldm(config_of(home, run, loop__steps=1, text__standardize=standardize))
        pipeline = LDMPipeline.from_pretrained(run / "pipeline")
        context = TextEncoder(pipeline.tokenizer, pipeline.text_encoder).encode(captions).double()
        same = torch.equal(context, given.encode(captions).double())
        assert same is not standardize and (run / "text_scale.json").exists() is standardize
        if standardize:
            assert context.mean((0, 1)).abs().max() < 1e-5
            assert torch.allclose(context.std((0, 1), correction=0), torch.ones(context.shape[-1]).double(), atol=1e-4)


def test_a_damaged_latent_stops_the_run_and_the_next_start_mends_it(
    home: Path, whole: tuple[list[float], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, _ = whole
    config = config_of(home, tmp_path / "run", loop__steps=3)
    assert train_ldm(config) == losses[:3]
    (file,) = (tmp_path / "run/cache").glob("posteriors-*.sqlite")
    store = Store(file, Kind.of(file))
    data = bytearray(file.read_bytes())
    for key in store.all_keys():  # one bit in every picture, or the next steps might miss it
        data[data.index(store.read(key)) + 40] ^= 1
    file.write_bytes(data)
    config = road.replace(config, loop={"steps": 6})
    with pytest.raises(DamagedError, match=r"a record is damaged; run the same command again"):
        train_ldm(config)
    assert train_ldm(config) == losses[3:]
    assert "a record is damaged; it is made anew" in capsys.readouterr().out


def test_accumulation_changes_nothing(home: Path, whole: tuple[list[float], Path], tmp_path: Path) -> None:
    parts = train_ldm(config_of(home, tmp_path, loop__accumulation=4, loop__sample_every=0))
    assert np.allclose(whole[0], parts, rtol=1e-4)


def test_a_resumed_run_is_exact(home: Path, whole: tuple[list[float], Path], tmp_path: Path) -> None:
    """Six steps, against three, a stop, and three more: losses equal to the last digit, weights to the last bit."""
    losses, straight = whole
    first = train_ldm(config_of(home, tmp_path, loop__steps=3))
    rest = train_ldm(config_of(home, tmp_path))
    assert first + rest == losses
    for name in ("unet", "unet.ema", "unet.optimizer"):
        files = [run / f"checkpoints/ldm/step_0000006/{name}.safetensors" for run in (straight, tmp_path)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert [path.name for path in sorted((straight / "checkpoints/ldm").iterdir())] == ["step_0000003", "step_0000006"]


def test_a_compiled_network_trains_resumes_and_is_saved_as_a_plain_one(
    home: Path, whole: tuple[list[float], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled by dynamo alone, which changes no number; what a compiler makes of it takes minutes here."""
    losses, plain = whole
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    parts = [config_of(home, tmp_path, loop__compile="true", loop__steps=steps) for steps in (3, 6)]
    assert train_ldm(parts[0]) + train_ldm(parts[1]) == losses
    for name in ("checkpoints/ldm/step_0000006/unet", "pipeline/unet/diffusion_pytorch_model"):
        one, other = (load_file(run / f"{name}.safetensors") for run in (plain, tmp_path))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_exported_pipeline_holds_the_average_and_generates_the_preview(home: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    train_ldm(config_of(home, tmp_path, diffusion__prediction="v", optim__ema_decay=0.5))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    average = load_file(tmp_path / "checkpoints/ldm/step_0000006/unet.ema.safetensors")
    last = load_file(tmp_path / "checkpoints/ldm/step_0000006/unet.safetensors")
    exported = pipeline.unet.state_dict()
    assert all(torch.equal(exported[name], average[name]) for name in average)
    assert any(not torch.equal(last[name], average[name]) for name in average)
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.pkl"))
    assert (tmp_path / "samples/step_0000006.png").exists()


def test_a_preview_has_the_size_that_was_learned(home: Path, tmp_path: Path) -> None:
    """After steps at half size alone its pictures have half the edge: their pixels are twice as large in the grid."""
    train_ldm(config_of(home, tmp_path, loop__half_size_steps=2, loop__steps=4, loop__sample_every=2))
    for step, edge in ((2, 8), (4, 16)):
        with Image.open(tmp_path / f"samples/step_{step:07d}.png") as grid:
            picture = np.asarray(grid.crop((8, 8, 136, 136)), dtype=int)  # the first cell, 128 pixels wide
        pixels = picture.reshape(edge, 128 // edge, edge, 128 // edge, 3).swapaxes(1, 2)
        assert (pixels == pixels[:, :, :1, :1]).all(), f"step {step} has no pictures of {edge} px"
        assert (np.diff(picture, axis=0) != 0).any(axis=(1, 2)).sum() >= edge // 2


def test_long_captions_are_counted_and_reported(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(home, tmp_path, loop__steps=1, loop__sample_every=0, text__max_length=3, loop__prompts=[])
    train_ldm(config)
    said = capsys.readouterr().out
    assert not (tmp_path / "pipeline/prompts.txt").exists()  # no caption is short enough to be drawn
    assert "24 are longer than text.max_length=3 and are cut" in said
    longest = max(TextEncoder.load(config.text).lengths([row.captions[0] for row in read_captioned(home / "data")]))
    assert longest > 3
    assert f"set text.max_length={longest}" in said


def test_without_prompts_previews_show_captions_of_training_pictures(home: Path, tmp_path: Path) -> None:
    train_ldm(config_of(home, tmp_path, loop__steps=1, loop__prompts=[]))
    captions = {row.captions[0] for row in read_captioned(home / "data").train}
    drawn = (tmp_path / "pipeline/prompts.txt").read_text("utf-8").splitlines()
    assert len(drawn) == 8
    assert set(drawn) <= captions
    assert (tmp_path / "samples/step_0000001.png").exists()


def test_prompts_that_are_too_long_are_refused_before_training(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loop\.prompts: expected at most 12 tokens"):
        train_ldm(config_of(home, tmp_path, loop__prompts=["red " * 30]))
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_without_grids_still_leaves_a_pipeline(home: Path, tmp_path: Path) -> None:
    train_ldm(config_of(home, tmp_path, loop__steps=2, loop__sample_every=0, loop__checkpoint_every=0))
    assert (tmp_path / "pipeline/model_index.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "cache",
        "frozen",
        "pipeline",
        "tensorboard",
    ]


def test_without_room_for_what_is_frozen_nothing_is_trained(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ldm.training.export.put_in_place", full)
    with pytest.raises(RunError, match="frozen could not be saved: .*No space left on device; make room"):
        train_ldm(config_of(home, tmp_path, loop__steps=1))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("links", [True, False])
def test_pipelines_share_what_no_step_changes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """The encoders are written once; each export writes a U-Net, on file systems without links copies of the rest."""
    written: list[str] = []
    for network in (AutoencoderKL, BertModel, UNet2DConditionModel):
        real = network.save_pretrained

        def saving(self: Any, folder: Any, *, real: Any = real, **how: Any) -> None:
            written.append(type(self).__name__)
            real(self, folder, **how)

        monkeypatch.setattr(network, "save_pretrained", saving)
    if not links:

        def no_links(*_: Any) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    train_ldm(config_of(home, tmp_path, loop__steps=3, loop__sample_every=0, loop__checkpoint_every=1))
    assert sorted(written) == ["AutoencoderKL", "BertModel", *["UNet2DConditionModel"] * 3]
    files = [path.relative_to(tmp_path / "frozen") for path in (tmp_path / "frozen").rglob("*") if path.is_file()]
    assert {"vae", "text_encoder", "tokenizer", "scheduler"} <= {file.parts[0] for file in files}
    for file in files:
        frozen, shared = tmp_path / "frozen" / file, tmp_path / "pipeline" / file
        assert frozen.read_bytes() == shared.read_bytes()
        assert frozen.samefile(shared) == links
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    average = load_file(next((tmp_path / "checkpoints/ldm").glob("*3/unet.ema.safetensors")))
    assert all(torch.equal(loaded.unet.state_dict()[name], weight) for name, weight in average.items())


def test_a_run_resumed_in_another_precision_reports_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether bf16 is faster is measured at each start, on whatever machine that is."""
    words = {"loop__precision": "auto", "loop__sample_every": 0, "doctor": False}
    for steps, fast, told in ((1, False, False), (2, False, False), (3, True, True)):
        monkeypatch.setattr("ldm.training.distributed.cpu_is_faster_in_bf16", lambda fast=fast: fast)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            train_ldm(config_of(home, tmp_path, loop__steps=steps, **words))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        said = capsys.readouterr().out
        assert ("resuming from" in said) == (steps > 1)
        assert ("not exact to the last bit" in said) == told == ("bit: precision fp32 => bf16" in said)


def test_foreign_captions_are_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "data", tmp_path / "data")
    file = tmp_path / "data/metadata.jsonl"
    rows = [json.loads(line) | {"text": "красное сердце"} for line in file.read_text("utf-8").splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(ValueError, match=r"text\.encoder: 100% of the captions' tokens are unknown"):
        train_ldm(config_of(home, tmp_path / "run", data__source=str(tmp_path / "data")))


def test_gradient_checkpointing_changes_memory_not_losses(
    home: Path, whole: tuple[list[float], Path], tmp_path: Path
) -> None:
    checkpointed = train_ldm(config_of(home, tmp_path, loop__gradient_checkpointing="true", loop__sample_every=0))
    assert np.allclose(whole[0], checkpointed, rtol=1e-5)
