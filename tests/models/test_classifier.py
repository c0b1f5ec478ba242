"""The classifier of noisy latents: what it sees, what it keeps, what it learns, and that it can be stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import road
import tiny
import torch
import transformers
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from ldm.cli.main import main as ldm_command
from ldm.data.batches import load_pixels
from ldm.data.dataset import BadDataError, read_captioned
from ldm.data.labels import Labels
from ldm.diffusion.forward import q_sample
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.classifier import ClassifierConfig, NoisyClassifier, build_classifier
from ldm.models.vae import encode, load_vae
from ldm.training.config import Config
from ldm.training.tasks.classifier import Classifier
from train.train_classifier import main as train_classifier
from train.train_vae import main as train_vae

SCHEDULE = NoiseSchedule.scaled_linear()
NAMES = ["cat", "dog", "naïve fig"]


def build(schedule: NoiseSchedule = SCHEDULE) -> NoisyClassifier:
    torch.manual_seed(0)
    config = ClassifierConfig(channels=(16, 32), layers=1)
    return build_classifier(config, latent_shape=(4, 8, 8), names=NAMES, schedule=schedule).eval()


# --- the network -------------------------------------------------------------------------------


def test_it_sees_the_noise_level_as_a_plane_of_log_snr() -> None:
    """The stock network on x_t and log(alpha_bar / (1 - alpha_bar)) / 4, and that at both ends."""
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    bar = (1 - SCHEDULE.betas).cumprod(0)[t]
    plane = ((bar / (1 - bar)).log() / 4).float().reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
    classifier = build()
    with torch.no_grad():
        found = classifier(x, t)
        assert torch.equal(found, classifier.network(torch.cat([x, plane], 1)).logits)
        assert (found - classifier(x, t.flip(0))).abs().max() > 1e-4
        nothing_left = build(SCHEDULE.rescale_zero_terminal_snr())(x, t)  # log-SNR is minus infinity
    assert bool(nothing_left.isfinite().all())


def test_a_samples_gradient_is_its_own() -> None:
    """No layer mixes the batch: guidance takes the gradient of a sum."""
    x, t = torch.randn(4, 4, 8, 8, requires_grad=True), torch.tensor([5, 100, 500, 900])
    (gradient,) = torch.autograd.grad(build()(x, t)[1, 2], x)
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2, 3]].abs().max() == 0


def test_a_saved_classifier_is_the_same_and_stock(tmp_path: Path) -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 800])
    for schedule in (SCHEDULE, NoiseSchedule.sigmoid(60).rescale_zero_terminal_snr()):
        classifier, t = build(schedule), t.clamp(max=schedule.T - 1)
        classifier.save(tmp_path)
        again = NoisyClassifier.load(tmp_path)
        assert torch.equal(again(x, t), classifier(x, t)) and again.names == tuple(NAMES)
        assert not again.training and not any(weight.requires_grad for weight in again.parameters())
        stock = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert stock.config.id2label == dict(enumerate(NAMES))
        inputs = torch.randn(2, 5, 8, 8)
        assert torch.equal(stock(inputs).logits, classifier.network(inputs).logits)
    with pytest.raises(ValueError, match="class_label: the classifier knows no 'naive fig'; did you mean 'naïve fig'"):
        again.class_id("naive fig")


def test_errors_name_the_way_out(tmp_path: Path) -> None:
    build().save(_made(tmp_path / "run" / "classifier"))
    with pytest.raises(FileNotFoundError, match="did you mean .*run/classifier"):
        NoisyClassifier.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"classifier.channels: 3 levels of patches of 4 need latents of at least 16"):
        build_classifier(ClassifierConfig(patch_size=4), latent_shape=(4, 8, 8), names=NAMES, schedule=SCHEDULE)
    with pytest.raises(ValueError, match=r"classifier.layers: expected at least 1, got 0"):
        ClassifierConfig(layers=0)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


# --- training ----------------------------------------------------------------------------------


TONES = {"dark": "#222", "gray": "#999", "pale": "#eee"}


def draw_folder(folder: Path, pictures: int = 96) -> Path:
    """Polygons of three tones, anywhere; a caption each, and the tone as a column."""
    (folder / "images").mkdir(parents=True)
    rng, rows = random.Random(0), []
    for n in range(pictures):
        tone = list(TONES)[n % 3]
        picture = Image.new("RGB", (tiny.SIZE, tiny.SIZE), "white")
        place = (rng.uniform(5, 11), rng.uniform(5, 11), rng.uniform(4, 6))
        ImageDraw.Draw(picture).regular_polygon(place, rng.randint(3, 7), fill=TONES[tone])
        picture.save(folder / f"images/{n}.png")
        rows.append({"file_name": f"images/{n}.png", "text": f"shape {n}", "tone": tone})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and a VAE."""
    folder = tmp_path_factory.mktemp("classifier")
    draw_folder(folder / "data")
    train_vae(road.recipe(folder))
    return folder


def recipe(home: Path, run: Path, **words: object) -> Config:
    settings = {
        "data__label_column": "tone",
        "diffusion__zero_terminal_snr": True,
        "diffusion__prediction": "v",
        "classifier__channels": [16, 32],
        "classifier__layers": 1,
        "classifier_training__steps": 120,
        "classifier_training__batch_size": 24,
        "classifier_training__warmup": 5,
        "classifier_training__lr": 0.01,
        "classifier_training__checkpoint_every": 60,
        **words,
    }
    return road.recipe(home, run=str(run), vae=str(home / "run" / "vae"), **settings)


@pytest.fixture(scope="module")
def trained(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained")
    train_classifier(recipe(home, run))
    return run


def test_it_learns_what_is_there_and_nothing_where_nothing_is(home: Path, trained: Path) -> None:
    """On held-out pictures: right at little noise; at t = T - 1, where x_t is noise alone, as often as chance."""
    classifier = NoisyClassifier.load(trained / "classifier")
    pictures = read_captioned(home / "data", holdout=0.2, progress=False)
    labels = Labels.read(pictures, "tone")
    assert classifier.names == labels.names == ("dark", "gray", "pale")
    heldout = torch.from_numpy(labels.ids(pictures.heldout)).repeat(20)
    with torch.no_grad():
        pixels = torch.stack([load_pixels(row, tiny.SIZE) for row in pictures.heldout])
        x0 = encode(load_vae(home / "run" / "vae"), pixels).mean.repeat(20, 1, 1, 1)
        right = {}
        for step in (0, 100, 999):
            t = torch.full((len(x0),), step)
            eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(step))
            answers = classifier(q_sample(classifier.schedule, x0, t, eps), t)
            right[step] = float((answers.argmax(1) == heldout).float().mean())
            probability = answers.softmax(1)
    assert right[0] > 0.9 and right[100] > 0.8
    # naming one tone always is right on its share; nothing can be better but by luck
    shares = torch.bincount(heldout, minlength=3) / len(heldout)
    luck = 4 * (0.25 / len(heldout)) ** 0.5
    assert float(shares.min()) - luck < right[999] < float(shares.max()) + luck
    assert float(probability.max()) < 0.6  # and it knows that it doesn't know
    logged = road.logged(trained, "classifier/heldout/q1")
    assert set(logged) == {60, 120} and logged[120] > 0.8
    losses = list(road.logged(trained, "classifier/loss").values())
    assert losses[-1] < 0.8 * losses[0]


def test_a_stopped_training_goes_on_as_if_nothing_had_been(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"classifier_training__steps": 8, "classifier_training__checkpoint_every": 3}
    whole = train_classifier(recipe(home, tmp_path / "whole", **words))
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "validate", _stop)
        with pytest.raises(KeyboardInterrupt):
            train_classifier(recipe(home, tmp_path / "stopped", **words))
    rest = train_classifier(recipe(home, tmp_path / "stopped", **words))
    assert rest == whole[3:]
    one, other = (load_file(tmp_path / run / "classifier/model.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert train_classifier(recipe(home, tmp_path / "stopped", **words)) == []


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_pixels_read_on_the_way_are_the_same_as_latents_read_before(home: Path, tmp_path: Path) -> None:
    words = {"classifier_training__steps": 3, "data__flip": True}
    cached, read = (train_classifier(recipe(home, tmp_path / c, data__cache=c, **words)) for c in ("auto", "off"))
    assert np.allclose(cached, read, rtol=1e-4) and len(set(cached)) == 3


def test_two_processes_agree_with_one(home: Path, tmp_path: Path) -> None:
    words = {"classifier_training__steps": 4, "classifier_training__log_every": 1}
    config = road.save_recipe(recipe(home, tmp_path / "two", **words), tmp_path / "recipe.yaml")
    one = train_classifier(recipe(home, tmp_path / "one", **words))
    road.launch("train_classifier", config, processes=2)
    two = list(road.logged(tmp_path / "two", "classifier/loss").values())
    assert len(two) == 4 and road.processes_of(tmp_path / "two") == {2}
    assert np.allclose(one, two, rtol=1e-4, atol=0)


def test_it_must_know_the_column(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.label_column: the classifier needs to know"):
        train_classifier(road.recipe(home, run=str(tmp_path)))
    with pytest.raises(BadDataError, match="column 'tones' is missing: .*; the nearest is 'tone'"):
        train_classifier(recipe(home, tmp_path, data__label_column="tones"))


def test_the_command_steers(
    home: Path, tmp_path: Path, tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = {"diffusion__zero_terminal_snr": False, "diffusion__prediction": "eps"}  # of the tiny pipeline
    train_classifier(recipe(home, run, classifier_training__steps=2, **words))
    base = ["sample", str(tiny_pipeline_folder), "red heart", "--steps", "2"]
    steer = ["--classifier", str(run / "classifier"), "--class-label", "dark"]
    cases = {"plain": [], "off": [*steer, "--classifier-scale", "0"], "on": [*steer, "--classifier-scale", "90"]}
    for name, more in cases.items():
        ldm_command([*base, *more, "--out", str(tmp_path / f"{name}.png")])
    plain, off, on = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("plain", "off", "on"))
    assert plain == off != on
    with pytest.raises(SystemExit, match="error: class_label: the classifier knows no 'pink'"):
        ldm_command([*base, *steer[:-1], "pink", "--out", str(tmp_path / "x.png")])
