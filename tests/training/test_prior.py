"""lora.keep: prompts without the words of a LoRA are held to what its model does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import road
import tiny
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from ldm.data.dataset import read_captioned
from ldm.diffusion.forward import q_sample
from ldm.models.conditioning import denoise
from ldm.system.errors import RunError
from ldm.training.config import Config
from ldm.training.initial_model import resolved
from ldm.training.prior import Prior, prompts_of
from ldm.training.run import train
from ldm.training.tasks.lora import LoRA, networks_of

pytest.importorskip("peft")
WORDS, COUNT = "ink style", 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    road.draw_folder(folder / "data")
    metadata = folder / "data/metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    metadata.write_text("".join(json.dumps(row | {"text": f"{row['text']}, {WORDS}"}) + "\n" for row in rows))
    tiny.pipeline(folder / "encoder", "bert").save_pretrained(folder / "bert")
    return folder


def recipe(home: Path, run: Path, **words: Any) -> Config:
    settings = {"init": str(home / "bert"), "run": str(run), **road.OF_INIT, "lora__rank": 2, "optim__lr": 0.02}
    return road.recipe(home, **settings | {"lora__keep": 0.25, "loop__sample_every": 0} | words)


def task_of(config: Config) -> LoRA:
    config = resolved(config, "ldm")
    task: Any = LoRA.create(config, Accelerator(cpu=True), read_captioned(config.data.source, progress=False))
    task.prepare()
    task.build()
    return task  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.training.prior.PICTURES", COUNT)


def test_a_quarter_of_the_samples_loses_the_words() -> None:
    prior = Prior(0.25, torch.zeros(8, 4, 2, 2), torch.zeros(2, 3, 5))
    assert [n for n in range(16) if prior.keeps(n)] == [3, 7, 11, 15]


def test_the_model_s_examples_come_first_then_captions_of_all_the_list() -> None:
    captions = [f"caption {i:03d}" for i in range(100)]
    assert prompts_of(["b", "a", "b"], captions) == ["b", "a", *(captions[i * 100 // 6] for i in range(6))]
    assert prompts_of([], ["a"]) == ["a"]
    assert len(prompts_of([str(i) for i in range(100)], captions)) == COUNT


def test_they_show_the_model_s_own_pictures_and_all_others_are_as_without(home: Path, tmp_path: Path) -> None:
    words = {"diffusion__caption_dropout": 0.3}
    kept = task_of(recipe(home, tmp_path / "kept", **words))
    without_any = task_of(recipe(home, tmp_path / "without", lora__keep=0.0, **words))
    numbers = list(range(16))
    (batch,), (other,) = kept.batches([numbers]), without_any.batches([numbers])
    assert batch.kept is not None and other.kept is None
    dropped = torch.tensor([kept.samples.draw(n).caption is None for n in numbers])
    quarter = torch.tensor([n % 4 == 3 for n in numbers])
    assert torch.equal(batch.kept, dropped | quarter) and dropped.any() and (quarter & ~dropped).any()
    context, same = batch.conditioning.context, other.conditioning.context
    assert context is not None and same is not None and torch.equal(batch.eps, other.eps)
    model: Any = StableDiffusionPipeline.from_pretrained(home / "bert")
    model.set_progress_bar_config(disable=True)
    prompts = sorted({row.captions[0].removesuffix(f", {WORDS}") for row in kept.samples.pictures})[:COUNT]
    for n in numbers:
        if not quarter[n] or dropped[n]:
            assert torch.equal(context[n], same[n]) and torch.equal(batch.x0[n], other.x0[n])
            continue
        caption = kept.samples.draw(n).caption
        assert caption is not None
        picture = int(caption * COUNT)
        made = model(
            prompts[picture % len(prompts)], generator=torch.Generator().manual_seed(kept.config.seed + picture),
            output_type="latent",
        ).images[0]  # fmt: skip
        assert (batch.x0[n] - made).norm() < 0.1 * made.norm()  # a random network makes much of rounding


def test_a_caption_that_is_too_long_is_cut(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "data", tmp_path / "data")
    metadata = tmp_path / "data/metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"text": "', '"text": "' + 20 * "red "))
    task = task_of(recipe(home, tmp_path / "run", data__source=str(tmp_path / "data")))
    assert task.prior is not None and task.prior.latents.isfinite().all()


def test_the_pictures_are_made_once_and_anew_if_they_would_be_others(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_of(recipe(home, tmp_path / "run"))
    file = tmp_path / "run/prior.safetensors"
    before = file.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("ldm.training.prior.generate", lambda *_: pytest.fail("they were generated again"))
        task_of(recipe(home, tmp_path / "run"))
    file.write_bytes(before[:-100])
    task_of(recipe(home, tmp_path / "run"))
    assert file.read_bytes() == before
    task_of(recipe(home, tmp_path / "run", seed=5))
    assert file.read_bytes() != before


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_their_loss_is_the_distance_from_what_the_model_predicts(home: Path, tmp_path: Path, prediction: str) -> None:
    """Zero at the start; then |U-Net with adapters - U-Net without|**2, that of the others as ever."""
    folder = shutil.copytree(home / "bert", tmp_path / "bert")
    scheduler = folder / "scheduler/scheduler_config.json"
    names = {"eps": "epsilon", "v": "v_prediction"}
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": names[prediction]}))
    words = {"init": str(folder), "diffusion__prediction": prediction, "diffusion__weighting": "none"}
    task = task_of(recipe(home, tmp_path / "run", **words))
    (batch,) = task.batches([range(16)])
    assert batch.kept is not None
    kept = batch.kept
    first = task.loss(0, batch)["unet"]
    assert first[kept].max() < 1e-9 < first[~kept].min()

    unet = networks_of(task.unet.module)["unet"]
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if ".lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    losses = task.loss(0, batch)["unet"].detach()
    t, _ = task.timesteps(batch.u)
    x_t = q_sample(task.schedule, batch.x0, t, batch.eps)
    stock = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    with torch.no_grad():
        mine, base = (denoise(one, x_t, t, batch.conditioning) for one in (unet, stock))
    alpha, sigma = task.schedule.at(t, x_t)
    true = batch.eps if prediction == "eps" else alpha * batch.eps - sigma * batch.x0
    target = torch.where(kept[:, None, None, None], base, true)
    expected = (mine - target).square().flatten(1).mean(1)
    assert torch.allclose(losses, expected, rtol=1e-4, atol=1e-7) and losses[kept].min() > 1e-6
    assert all(weight.requires_grad for name, weight in unet.named_parameters() if ".lora_" in name)


def test_what_is_kept_is_said_and_the_words_are_in_the_file(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("ldm", recipe(home, tmp_path / "run", loop__steps=1, loop__checkpoint_every=1))
    said = capsys.readouterr().out
    assert f'lora.keep: prompts without "{WORDS}" stay what the model makes of them: its example prompts and' in said
    assert f", {WORDS}' --lora " in said or f', {WORDS}" --lora ' in said
    assert json.loads((tmp_path / "run/lora/lora.json").read_text())["trigger"] == WORDS


def test_a_stopped_run_ends_as_one_that_was_not(home: Path, tmp_path: Path) -> None:
    words = {"loop__checkpoint_every": 3, "loop__evaluate_every": 0}
    whole = train("ldm", recipe(home, tmp_path / "whole", **words))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in (tmp_path / "parts/checkpoints/ldm").iterdir():
        if int(step.name.removeprefix("step_")) > 3:
            shutil.rmtree(step)
    parts = train("ldm", recipe(home, tmp_path / "parts", **words))
    assert parts == whole[-len(parts) :] and 0 < len(parts) < len(whole)


def test_what_has_no_words_to_leave_out_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    road.draw_folder(tmp_path / "data")
    with pytest.raises((ValueError, RunError), match=r"lora.trigger: the captions of .*data have no words in common"):
        train("ldm", recipe(home, tmp_path / "run", data__source=str(tmp_path / "data")))
    for words, message in (
        ({"lora__text_encoder": True}, "lora.keep: the model reads captions by its own text encoder"),
        ({"lora__rank": 0}, "lora.keep: it needs adapters"),
        ({"diffusion__few_steps": 4}, "lora.keep: it can't be combined with diffusion.few_steps; set it to 0"),
        ({"data__buckets": True}, "lora.keep: it can't be combined with data.buckets; set it to 0"),
        ({"lora__trigger": " "}, "lora.trigger: expected words that all captions have"),
        ({"data__cache": "off"}, "lora.keep: the model's own pictures are latents"),
    ):
        with pytest.raises(SystemExit):
            recipe(home, tmp_path / "run", **words)
        assert message in capsys.readouterr().err
