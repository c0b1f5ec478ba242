"""Models of few steps, by real pictures alone and by distillation: what they learn from, and that stock opens them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import road
import tiny
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from ldm import LDMPipeline
from ldm.cli.find import find_model, run_of
from ldm.data.dataset import read_captioned
from ldm.data.numbers import Numbers
from ldm.evaluation.evaluated_model import EvaluatedModel, SamplingSettings
from ldm.inference.defaults import Defaults
from ldm.models.conditioning import scale_embedding
from ldm.models.unet import choose_attention, student_of
from ldm.training.config import Config
from ldm.training.distributed import build_accelerator
from ldm.training.initial_model import resolved
from ldm.training.run import train
from ldm.training.tasks import task_of_unet
from ldm.training.tasks.diffusion import Diffusion

QUIET = {"loop__evaluate_every": 0, "loop__sample_every": 0}
ONE_SCALE = {"distill__embedding": 0, "distill__guidance_scale": [3, 3]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and models to start from: with text, and with classes."""
    folder = tmp_path_factory.mktemp("few-steps")
    road.draw_folder(folder / "data")
    tiny.pipeline(folder / "encoder", prediction="v").save_pretrained(folder / "model")
    tiny.class_pipeline(folder / "encoder", tuple(sorted(road.COLORS))).save_pretrained(folder / "classes")
    rows = [json.loads(line) for line in (folder / "data/metadata.jsonl").read_text("utf-8").splitlines()]
    lines = [json.dumps({**row, "length": len(row["text"])}) + "\n" for row in rows]
    (folder / "data/metadata.jsonl").write_text("".join(lines), "utf-8")
    tiny.numbers_pipeline(folder / "encoder", Numbers(("length",), (9.0,), (2.0,))).save_pretrained(folder / "numbers")
    return folder


def config_of(home: Path, run: Path, **words: Any) -> Config:
    given = {"run": str(run), "init": str(home / "model"), "loop__num_inference_steps": "null", **road.OF_INIT, **words}
    return road.recipe(home, **given)


def built(config: Config) -> Any:
    """The distillation task of a config, with its networks."""
    config = resolved(config, "distill")
    pictures = read_captioned(config.data.source, **config.data.reading(), progress=False)
    task = task_of_unet(config).create(config, build_accelerator(config.loop), pictures)
    task.build()
    return task


def same_in_stock(folder: Path, kind: Any = StableDiffusionPipeline, **words: Any) -> np.ndarray:
    """A picture of a folder by its documented call, which stock makes to the last bit."""
    ours, stock = LDMPipeline.from_pretrained(folder), kind.from_pretrained(folder)
    made = [
        pipe("red heart", generator=torch.Generator().manual_seed(7), output_type="np", height=16, width=16,
             **words).images
        for pipe in (ours, stock)
    ]  # fmt: skip
    assert np.array_equal(*made)
    unnamed = ours("red heart", generator=torch.Generator().manual_seed(7), output_type="np").images
    assert np.array_equal(made[0], unnamed)  # the documented call is the default
    return made[0]  # type: ignore[no-any-return]


# --- by real pictures alone ----------------------------------------------------------------------------------


def test_few_steps_are_learned_where_the_pipeline_takes_them(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timesteps of the steps are those at which stock calls the saved U-Net, once each, and each shows its x0."""
    met: list[int] = []
    learned = Diffusion.output

    def output(self: Diffusion, unet: Any, x_t: Any, t: torch.Tensor, *rest: Any) -> torch.Tensor:
        met.extend(t.tolist() if unet.training else [])
        return learned(self, unet, x_t, t, *rest)

    monkeypatch.setattr(Diffusion, "output", output)
    losses = train("ldm", config_of(home, tmp_path, diffusion__few_steps=4))
    assert np.isfinite(losses).all() and set(met) == {999, 749, 499, 249} and len(met) == 6 * 8

    heldout = [f"ldm/heldout/{name}" for name in ("total", "t999", "t749", "t499", "t249")]
    rows = [list(road.logged(tmp_path, name).values()) for name in heldout]
    assert rows[0] == pytest.approx([float(np.mean(column)) for column in zip(*rows[1:], strict=True)])

    folder = tmp_path / "pipeline"
    assert Defaults.load(folder) == Defaults(4, 1.0)
    same_in_stock(folder, num_inference_steps=4, guidance_scale=1.0)
    pipe, called = LDMPipeline.from_pretrained(folder), []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: called.append((len(inputs[0]), int(inputs[1]))))
    pipe("red heart")
    assert called == [(1, t) for t in (999, 749, 499, 249)]
    x = torch.randn(1, 4, 8, 8)
    pipe.scheduler.set_timesteps(1)
    shown = pipe.scheduler.step(torch.zeros_like(x), 999, x).prev_sample  # of v = 0: x0 = alpha x_t
    torch.testing.assert_close(shown, pipe.scheduler.alphas_cumprod[999].sqrt() * x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 30])
def test_a_step_goes_to_the_next_timestep_that_was_learned(home: Path, n: int) -> None:
    """First order: x_s = alpha_s x0 + sigma_s eps, whatever came before, also where n does not divide T."""
    pipe = LDMPipeline.from_pretrained(home / "model")
    scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, "solver_order": 1})
    scheduler.set_timesteps(n)
    steps = [round(1000 - i * 1000 / n) - 1 for i in range(n)]
    assert scheduler.timesteps.tolist() == steps
    x, alpha = torch.randn(1, 4, 2, 2), scheduler.alphas_cumprod.double().sqrt()
    sigma = (1 - alpha**2).sqrt()
    for t, s in zip(steps, [*steps[1:], None], strict=True):
        v = torch.randn_like(x)
        x0, eps = alpha[t] * x - sigma[t] * v, sigma[t] * x + alpha[t] * v
        x = scheduler.step(v, t, x).prev_sample
        expected = x0 if s is None else alpha[s] * x0 + sigma[s] * eps
        torch.testing.assert_close(x, expected.float(), rtol=1e-3, atol=1e-4)


# --- distillation ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_step_0_is_the_teacher_s_to_the_last_bit_at_every_scale(home: Path, tmp_path: Path) -> None:
    """And the teacher is guided as stock's loop guides it, with the empty caption."""
    task = built(config_of(home, tmp_path, diffusion__caption_dropout=0))
    stock = StableDiffusionPipeline.from_pretrained(home / "model", safety_checker=None)
    choose_attention(stock.unet, torch.device("cpu"))  # as training has it
    (batch,) = task.batches([range(3)])
    x_t, t, scale = batch.x0.contiguous(), torch.tensor([19, 499, 999]), torch.tensor([1.0, 2.5, 5.0])
    positive = stock.unet(x_t, t, batch.conditioning.context).sample
    assert torch.equal(task.output(task.unet.module, x_t, t, batch.conditioning, scale), positive)
    null = stock.encode_prompt("", "cpu", 1, False)[0].expand(3, -1, -1)
    negative = stock.unet(x_t, t, null).sample
    expected = negative + scale[:, None, None, None] * (positive - negative)
    torch.testing.assert_close(task.guided(x_t, t, batch.conditioning, scale), expected, rtol=1e-4, atol=1e-4)
    theirs = stock.get_guidance_scale_embedding(scale - 1, embedding_dim=256)
    torch.testing.assert_close(scale_embedding(scale, 256), theirs, rtol=0, atol=1e-3)


def test_a_student_of_a_config_with_gaps_is_given_the_scale(home: Path) -> None:
    """Older models leave settings out of config.json; diffusers then takes its own defaults again, whatever is set."""
    teacher = LDMPipeline.from_pretrained(home / "model").unet
    teacher.register_to_config(_use_default_values=["time_cond_proj_dim", "dropout"])
    student = student_of(teacher, 16)
    assert student.config.time_cond_proj_dim == 16 and student.time_embedding.cond_proj is not None
    assert not student.time_embedding.cond_proj.weight.any()


@pytest.fixture(scope="module")
def distilled(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that distills, cached."""
    run = tmp_path_factory.mktemp("distilled")
    losses = train("distill", config_of(home, run, loop__log_every=1, optim__ema_decay=0.5))
    assert np.isfinite(losses).all()
    return run


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, LatentConsistencyModelPipeline])
def test_stock_opens_a_student_and_makes_the_same_pictures(distilled: Path, kind: Any) -> None:
    made = same_in_stock(distilled / "pipeline", kind, num_inference_steps=4, guidance_scale=3.0)
    ours = LDMPipeline.from_pretrained(distilled / "pipeline")
    words: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np"}
    other = ours("red heart", generator=torch.Generator().manual_seed(7), guidance_scale=1.0, **words).images
    assert not np.array_equal(made, other)  # the scale is an input
    assert type(ours.scheduler).__name__ == "LCMScheduler" and bool(ours.unet.time_embedding.cond_proj.weight.any())


def test_a_student_s_run(home: Path, tmp_path: Path, distilled: Path) -> None:
    """Without a cache the losses are the same; the average is what is exported; previews take the student's steps."""
    losses = list(road.logged(distilled, "distill/loss").values())
    again = train("distill", config_of(home, tmp_path, data__cache="off", loop__steps=3, loop__log_every=1, **QUIET,
                                       optim__ema_decay=0.5))  # fmt: skip
    assert np.allclose(losses[:3], again, rtol=1e-4)
    average = load_file(distilled / "checkpoints/distill/step_0000006/unet.ema.safetensors")
    exported = load_file(distilled / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(average[name], exported[name]) for name in average)
    assert (distilled / "samples/step_0000006.png").exists()
    names = ("total", "q1", "q4", "text_gap", "null_gap")
    assert all(list(road.logged(distilled, f"distill/heldout/{name}")) == [3, 6] for name in names)
    config = resolved(config_of(home, tmp_path), "distill")
    assert (config.preview_steps, config.preview_scale) == (4, 3.0)


def test_a_student_s_run_is_found_and_no_other_training_s(home: Path, distilled: Path) -> None:
    """Evaluation takes its data from the checkpoints; another training would write the same pipeline."""
    folder, _, config = find_model(str(distilled))
    assert config is not None and config["data"]["source"] == str(home / "data") and run_of(folder) == (distilled, 6)
    with pytest.raises(ValueError, match="run: .* holds the checkpoints of `ldm train distill`, .*; name another run"):
        train("ldm", config_of(home, distilled))


def test_the_null_class_is_what_a_class_model_is_guided_from(home: Path, tmp_path: Path) -> None:
    words = {"init": str(home / "classes"), "text__encoder": "null", "data__caption_columns": [],
             "unet__attention": [False, True], "data__label_column": "color"}  # fmt: skip
    losses = train("distill", config_of(home, tmp_path, loop__prompts=[], **words, **QUIET))
    assert np.isfinite(losses).all()
    pipe = LDMPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe(class_label="red", output_type="np").images.shape == (1, 16, 16, 3)


def test_a_student_of_one_scale_is_an_ordinary_model(home: Path, tmp_path: Path) -> None:
    losses = train("distill", config_of(home, tmp_path, **ONE_SCALE, loop__evaluate_every=3))
    assert np.isfinite(losses).all() and len(list(road.logged(tmp_path, "distill/heldout/total"))) == 2
    folder = tmp_path / "pipeline"
    pipe = LDMPipeline.from_pretrained(folder)
    assert pipe.unet.config.time_cond_proj_dim is None and Defaults.load(folder) == Defaults(4, 1.0)
    same_in_stock(folder, num_inference_steps=4, guidance_scale=1.0)


def test_a_student_that_is_a_lora_resumes_exactly_and_stands_behind_its_teacher(home: Path, tmp_path: Path) -> None:
    """At step 0 it is its teacher, which has no adapters; stock makes the same pictures of the file."""
    pytest.importorskip("peft")
    words: dict[str, Any] = {
        **ONE_SCALE,
        "lora__rank": 2,
        "loop__log_every": 1,
        "optim__lr": 1e-2,
        "optim__ema_decay": 0.5,
    }
    task = built(config_of(home, tmp_path / "none", diffusion__caption_dropout=0, **words))
    (batch,) = task.batches([range(2)])
    x_t, t = batch.x0.contiguous(), torch.tensor([19, 499])
    with torch.no_grad():
        expected = task.teacher(x_t, t, batch.conditioning.context).sample
        assert torch.equal(task.output(task.unet.module, x_t, t, batch.conditioning), expected)
    assert not any(".lora_" in name for name, _ in task.teacher.named_parameters())

    run, stopped = tmp_path / "run", tmp_path / "stopped"
    whole = train("distill", config_of(home, run, loop__steps=4, loop__checkpoint_every=2, **words))
    first = train("distill", config_of(home, stopped, loop__steps=2, **words, **QUIET))
    assert first + train("distill", config_of(home, stopped, loop__steps=4, **words, **QUIET)) == whole
    assert (run / "samples/step_0000004.png").exists() and not (run / "pipeline").exists()

    pipe = LDMPipeline.from_pretrained(home / "model")
    pipe.teach(run / "lora", 2)
    assert type(pipe.student.scheduler) is LCMScheduler
    pipe.save_pretrained(tmp_path / "taught")
    stock: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "taught")
    stock.load_lora_weights(tmp_path / "taught/few_steps")
    stock.fuse_lora()
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16}
    made = [
        each("red heart", generator=torch.Generator().manual_seed(7), output_type="np", **extra).images
        for each, extra in ((pipe, {}), (stock, given))
    ]
    assert np.array_equal(*made)
    named = pipe("red heart", generator=torch.Generator().manual_seed(7), output_type="np", sampler="lcm",
                 num_inference_steps=2, guidance_scale=1.0).images  # fmt: skip
    assert not np.array_equal(named, made[0])  # the model's own weights


@torch.no_grad()
def test_no_numbers_are_what_a_model_of_numbers_is_guided_from(home: Path, tmp_path: Path) -> None:
    """Zeros, beside the empty caption: what the pipeline guides away from."""
    words = {"init": str(home / "numbers"), "data__number_columns": ["length"], "unet__attention": [False, True]}
    task = built(config_of(home, tmp_path, diffusion__caption_dropout=0, **words))
    (batch,) = task.batches([range(2)])
    x_t, t, scale = batch.x0.contiguous(), torch.tensor([19, 499]), torch.tensor([2.0, 3.0])
    conditioning = batch.conditioning
    null = task.encoders.text.encode(["", ""])
    positive = task.teacher(x_t, t, conditioning.context, class_labels=conditioning.class_labels).sample
    negative = task.teacher(x_t, t, null, class_labels=torch.zeros(2, 2)).sample
    expected = negative + scale[:, None, None, None] * (positive - negative)
    torch.testing.assert_close(task.guided(x_t, t, conditioning, scale), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_student_s_evaluations_are_one_a_step(distilled: Path, scale: float) -> None:
    model = EvaluatedModel(LDMPipeline.from_pretrained(distilled / "pipeline"), distilled / "pipeline")
    settings, rows = SamplingSettings(4, scale), []
    model.pipeline.unet.conv_in.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model.generate(["red heart"] * 3, 0, settings)
    assert rows == [3] * 4 and model.unet_evaluations(settings) == 4


def test_guidance_that_a_student_can_t_have_is_refused_by_name(distilled: Path) -> None:
    pipe = LDMPipeline.from_pretrained(distilled / "pipeline")
    weaker = str(distilled / "pipeline")
    for words in ({"guidance_interval": (0.2, 1.0)}, {"weak_unet": pipe.unet}, {"weaker": weaker}):
        with pytest.raises(ValueError, match=f"^{next(iter(words))}: the model is distilled"):
            pipe("red heart", **words)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        ("distill", {"init": "null"}, r"^init: a student learns from a teacher"),
        ("distill", {"lora__rank": 2}, r"^lora\.rank: adapters can't take a guidance scale; set distill.embedding=0"),
        ("distill", {**ONE_SCALE, "lora__rank": 2, "distill__solver_steps": 25}, r"^distill\.solver_steps: a LoRA is"),
        ("distill", {**ONE_SCALE, "lora__rank": 2, "lora__text_encoder": "true"}, r"^lora\.text_encoder: a student "),
        ("distill", {"diffusion__few_steps": 2}, r"^diffusion\.few_steps: is for `ldm train ldm`"),
        ("distill", {"distill__solver_steps": 30}, r"^distill\.solver_steps: expected a divisor of init's 1000 timest"),
        ("distill", {"data__inpaint": "true"}, r"^data\.inpaint: init=.* takes no second picture, and a stu"),
        ("distill", {"optim__name": "schedule_free"}, r"^optim\.name: a student learns from the average of optim\.ema"),
        ("distill", {"optim__ema_widths": [0.1]}, r"^optim\.ema_widths: a student learns from the average of optim\.e"),
        ("distill", {"data__buckets": "true", "data__bucket_ratio": 1.1}, r"^data\.buckets: .* none but the square"),
        (
            "ldm",
            {"init": "leading", "lora__rank": 2, "diffusion__few_steps": 2},
            r"^diffusion\.few_steps: .* steps through other timesteps \(timestep_spacing=leading\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    home: Path, tmp_path: Path, task: str, words: dict[str, Any], said: str
) -> None:
    if words.get("init") == "leading":
        scheduler = shutil.copytree(home / "model", tmp_path / "leading") / "scheduler/scheduler_config.json"
        scheduler.write_text(scheduler.read_text("utf-8").replace('"trailing"', '"leading"'), "utf-8")
        words = {**words, "init": str(tmp_path / "leading")}
    with pytest.raises(ValueError, match=said):
        train(task, config_of(home, tmp_path / "run", **words))
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    "words",
    [
        {"diffusion__few_steps": 2, "diffusion__loss": "vlb"},
        {"diffusion__few_steps": 2, "diffusion__timestep_sampling": "logit_normal"},
        {"diffusion__few_steps": 1001},
        {"distill__guidance_scale": [5, 2]},
        {"distill__steps": 60},
        {"distill__guidance_scale": [2, 3], "distill__embedding": 0},
        {"distill__embedding": 2},
    ],
    ids=str,
)
def test_contradictions_name_their_key(
    home: Path, tmp_path: Path, words: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        config_of(home, tmp_path, **words)
    assert next(iter(words)).replace("__", ".") in capsys.readouterr().err
