"""Guidance inside the denoising loop, against closed forms and against the sampler written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from oracles import PREDICTIONS, Mixture, double, generator
from test_mutations import Fault, plant
from torch import Tensor, nn

from ldm.diffusion.guidance import ClassifierGuidance, class_log_prob
from ldm.diffusion.parameterization import DIFFUSERS_NAMES, Prediction
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.classifier import ClassifierConfig, NoisyClassifier, build_classifier
from ldm.pipelines.text_to_image import LDMPipeline

SCHEDULE = NoiseSchedule.scaled_linear()
DETERMINISTIC = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)


@pytest.fixture(scope="module")
def loaded(tiny_pipeline_folder: Path) -> LDMPipeline:
    return LDMPipeline.from_pretrained(tiny_pipeline_folder)


@pytest.fixture
def pipe(loaded: LDMPipeline) -> LDMPipeline:
    """The same networks in a pipeline of the test's own."""
    pipe = LDMPipeline(**loaded.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def classifier(loaded: LDMPipeline) -> NoisyClassifier:
    """Of random weights, but loud: its gradient must not drown in rounding."""
    shape = (loaded.unet.config.in_channels, 8, 8)
    torch.manual_seed(0)
    built = build_classifier(
        ClassifierConfig(channels=(16, 32), layers=1),
        latent_shape=shape,
        names=["cat", "dog", "fig"],
        schedule=SCHEDULE,
    )
    with torch.no_grad():
        for weight in built.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    return built.eval().requires_grad_(False)


def sample(pipe: LDMPipeline, prompt: Any = "red heart", **words: Any) -> Tensor:
    """Latents [N,C,h,w], in three steps."""
    words = {"num_inference_steps": 3, "seed": 5, "output_type": "latent", **words}
    return pipe(prompt, **words).images  # type: ignore[return-value]


# --- the loop ------------------------------------------------------------------------------------


def computed_by(monkeypatch: pytest.MonkeyPatch, pipe: LDMPipeline, network: Any) -> None:
    """Let a function of (x_t [B,C,h,w], t [B]) stand for the pipeline's U-Net."""

    def forward(sample: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        return (network(sample, torch.as_tensor(timestep).expand(len(sample))),)

    monkeypatch.setattr(pipe.unet, "forward", forward)


def test_scale_zero_is_off_to_the_last_bit(pipe: LDMPipeline, classifier: NoisyClassifier) -> None:
    plain = sample(pipe, ["red heart", "cat"])
    for words in ({"classifier_scale": 0}, {"classifier_scale": 0.0}):
        off = sample(pipe, ["red heart", "cat"], classifier=classifier, class_label="dog", **words)
        assert torch.equal(off, plain)
    guided = sample(pipe, ["red heart", "cat"], classifier=classifier, class_label="dog")
    assert (guided - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_unet_sees_x_t_with_every_such_scheduler(
    name: str, pipe: LDMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all data are one point m, the exact noise is (x_t - alpha m) / sigma, and no deterministic step changes it."""
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    bar = (1 - SCHEDULE.betas).cumprod(0)
    point, noises = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), []

    def exact(sample: Tensor, timestep: Tensor) -> Tensor:
        place = np.interp(timestep.numpy().astype(float), np.arange(1000), bar.numpy())
        alpha, sigma = (torch.tensor(value**0.5).float().reshape(-1, 1, 1, 1) for value in (place, 1 - place))
        noises.append((sample - alpha * point) / sigma)
        return noises[-1]

    computed_by(monkeypatch, pipe, exact)
    sample(pipe, guidance_scale=1.0, num_inference_steps=8)
    assert len(noises) >= 8
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0], rtol=0, atol=0.02)


# --- the classifier ----------------------------------------------------------------------------


class Exact(nn.Module):
    """p(component | x_t) of a Gaussian mixture, as a classifier."""

    check_process = NoisyClassifier.check_process

    def __init__(self, data: Mixture) -> None:
        super().__init__()
        self.data, self.schedule = data, SCHEDULE

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
        return self.data.components(x_t.double().flatten(1), alpha, sigma)[0].to(x_t)  # log w_k p_k + const

    def class_id(self, name: str) -> int:
        return int(name)


def two_clouds() -> Mixture:
    """Around two points of the latents of the tiny pipeline, [4,8,8]; weights 0.9 and 0.1."""
    rng = generator(1)
    means = torch.randn(2, 256, generator=rng, dtype=torch.float64) * 0.4
    return Mixture(double([0.9, 0.1]), means, 0.3 * torch.eye(256, dtype=torch.float64).expand(2, 256, 256))


def component(data: Mixture, k: int) -> Mixture:
    return Mixture(double([1.0]), data.means[k : k + 1], data.covs[k : k + 1])


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_bayes_makes_the_conditional_network_of_the_unconditional_one(kind: Prediction) -> None:
    """For every prediction, at every noise level, each picture with its own class."""
    data, ids = two_clouds(), torch.tensor([0, 1, 1, 0])
    x = torch.randn(4, 4, 8, 8, generator=generator(3))
    guidance = ClassifierGuidance(kind, SCHEDULE, class_log_prob(Exact(data), ids), 1.0)
    for t in (1, 300, 700, 990):
        each = torch.full((4,), t)
        output = data.network(SCHEDULE, kind)(x, each)
        found = guidance(output, x, torch.tensor(t + 0.3))  # some samplers have t between timesteps
        rows = [component(data, int(k)).network(SCHEDULE, kind)(x[i : i + 1], each[:1]) for i, k in enumerate(ids)]
        torch.testing.assert_close(found, torch.cat(rows), rtol=1e-3, atol=1e-3)
        assert (output - found).abs().max() > (0.1 if t > 1 else 1e-3)


def test_a_classifier_guides_to_its_class(pipe: LDMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """With exact networks: unguided pictures are of the frequent class, guided ones of the class that was asked for."""
    data = two_clouds()
    network = data.network(SCHEDULE, "eps")
    computed_by(monkeypatch, pipe, lambda x_t, t: network(x_t, t.long()))

    def classes(**words: Any) -> Tensor:
        latents = sample(pipe, ["red"] * 12, guidance_scale=1.0, num_inference_steps=20, **words)
        return data.responsibilities(latents.double().flatten(1))[:, 1]

    assert classes().mean() < 0.5
    wanted = classes(classifier=Exact(data), class_label=["0", "1"] * 6)
    torch.testing.assert_close(wanted, double([0, 1] * 6), rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_step_is_the_papers(
    kind: Prediction, guidance_scale: float, pipe: LDMPipeline, classifier: NoisyClassifier
) -> None:
    """Algorithm 2 of Dhariwal & Nichol on eps, after classifier-free guidance, by the scheduler's own alphas."""
    config = {**pipe.scheduler.config, "prediction_type": DIFFUSERS_NAMES[kind]}
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
    scale, start = 2.5, torch.randn(2, 4, 8, 8, generator=generator(0))
    found = sample(
        pipe, ["cat", "dog"], guidance_scale=guidance_scale, latents=start, classifier=classifier,
        class_label=["fig", "cat"], classifier_scale=scale, num_inference_steps=4,
    )  # fmt: skip
    context = tiny_context(pipe, ["cat", "dog"])
    null, x = tiny_context(pipe, ["", ""]), start
    bars = pipe.scheduler.alphas_cumprod.double()
    steps = pipe.scheduler.timesteps.tolist()
    for t, s in zip(steps, [*steps[1:], -1], strict=True):
        with torch.no_grad():
            one, other = (pipe.unet(x, t, encoder_hidden_states=c).sample for c in (context, null))
        output = other + guidance_scale * (one - other)
        a, b = float(bars[t].sqrt()), float((1 - bars[t]).sqrt())
        eps = {"eps": output, "x0": (x - a * output) / b, "v": b * x + a * output}[kind]
        leaf = x.clone().requires_grad_()
        log_p = classifier(leaf, torch.tensor([t, t])).log_softmax(1)[[0, 1], [2, 0]]
        (gradient,) = torch.autograd.grad(log_p.sum(), leaf)
        eps = eps - b * scale * gradient
        x0 = (x - b * eps) / a
        bar = bars[s] if s >= 0 else pipe.scheduler.final_alpha_cumprod.double()
        x = (bar.sqrt() * x0 + (1 - bar).sqrt() * eps).float()
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)
    plain = sample(pipe, ["cat", "dog"], guidance_scale=guidance_scale, latents=start, num_inference_steps=4)
    assert (found - plain).abs().max() > 0.05


def tiny_context(pipe: LDMPipeline, captions: list[str]) -> Tensor:
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=tiny.MAX_LENGTH, return_tensors="pt")
    with torch.no_grad():
        return pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]


def test_labels_go_to_the_pictures_of_their_prompt(tiny_pipeline_folder: Path, classifier: NoisyClassifier) -> None:
    """The pipeline in float64: in float32 a batch of four rounds otherwise than one of two."""
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folder).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    words: dict[str, Any] = {"classifier": classifier, "classifier_scale": 3.0}
    both = sample(pipe, ["red", "cat"], class_label=["fig", "cat"], num_images_per_prompt=2, **words)
    alone = sample(pipe, "cat", class_label="cat", num_images_per_prompt=2, **{**words, "seed": 7})
    torch.testing.assert_close(both[2:], alone, rtol=0, atol=1e-5)
    other = sample(pipe, "cat", class_label="fig", num_images_per_prompt=2, **{**words, "seed": 7})
    assert (other - alone).abs().max() > 0.01


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"class_label": None}, "class_label: the classifier needs one of cat, dog, fig"),
        ({"class_label": "dog", "classifier": None}, "this model knows no classes"),
        ({"class_label": "dag"}, "knows no 'dag'; did you mean 'dog'"),
        ({"class_label": ["dog"] * 3}, "expected 1 or 3, one for each picture asked for, got 2"),
        ({"class_label": "dog", "classifier_scale": float("nan")}, "classifier_scale: expected a number from 0"),
    ],
)
def test_bad_words_are_refused(
    words: dict[str, Any], told: str, pipe: LDMPipeline, classifier: NoisyClassifier
) -> None:
    with pytest.raises(ValueError, match=told):
        sample(pipe, ["red", "cat"], **{"classifier": classifier, **words})


def test_another_process_is_refused(pipe: LDMPipeline, classifier: NoisyClassifier) -> None:
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match="trained on another noise schedule .* than the pipeline's"):
        sample(pipe, classifier=classifier, class_label="dog")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has another process"):
        sample(pipe, classifier=classifier, class_label="dog")


# --- autoguidance ------------------------------------------------------------------------------------------


def test_autoguidance_moves_away_from_the_weaker_network(pipe: LDMPipeline, tmp_path: Path) -> None:
    """Written out with DDIM: weak + scale (strong - weak), both with the prompt."""
    weak = tiny.pipeline(tmp_path).unet
    with torch.no_grad():
        for weight in weak.parameters():
            weight.mul_(0.9)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    start = torch.randn(1, 4, 8, 8, generator=generator(0))
    found = sample(pipe, "cat", weak_unet=weak, guidance_scale=2.0, latents=start)
    context, x = tiny_context(pipe, ["cat"]), start
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            strong, weaker = (net(x, t, encoder_hidden_states=context).sample for net in (pipe.unet, weak))
        x = pipe.scheduler.step(weaker + 2.0 * (strong - weaker), t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    assert (found - sample(pipe, "cat", guidance_scale=2.0, latents=start)).abs().max() > 0.01


# --- faults in the formulas show in pictures -----------------------------------------------------------------

FAULTS = [
    Fault("away from the prompt", "guidance.guide", "negative + scale", "negative - scale", print),
    Fault("interval closed above", "guidance.interval_scale", "t / T < high", "t / T <= high", print),
    Fault("interval open below", "guidance.interval_scale", "low <= t", "low < t", print),
    Fault("deviation of the guided", "guidance.rescale", "positive.std", "guided.std", print),
    Fault("rescaled the other way", "guidance.rescale", "amount * matched", "(1 - amount) * matched", print),
    Fault("away from the class", "guidance.classifier_guidance", "scale * gradient", "-scale * gradient", print),
    Fault("v moved like eps", "parameterization.add_to_score", "sigma * per_alpha * change", "sigma * change", print),
    Fault("conditions exchanged", "guidance.Guidance._pair", "NEGATIVE, POSITIVE)", "POSITIVE, NEGATIVE)", print),
    Fault("no classifier outside the interval", "guidance.Guidance.__call__", "if self.classifier is None else",
          "if self.classifier is None or scale == 1 else", print),
]  # fmt: skip


@pytest.fixture(scope="module")
def everything(loaded: LDMPipeline, classifier: NoisyClassifier) -> tuple[LDMPipeline, dict[str, Any], Tensor]:
    """A pipeline that predicts v, a call with every kind of guidance, and its latents, written out with DDIM.

    Five steps are at t = 999, 799, 599, 399, 199: the interval holds the middle three, and its ends lie on two others.
    """
    config = {**loaded.scheduler.config, "prediction_type": "v_prediction"}
    pipe = LDMPipeline(**{**loaded.components, "scheduler": diffusers.DDIMScheduler.from_config(config)})
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 8, 8, generator=generator(0))
    words: dict[str, Any] = {
        "prompt": "cat", "negative_prompt": "red heart", "num_inference_steps": 5, "guidance_scale": 4.0,
        "guidance_interval": (0.199, 0.799), "guidance_rescale": 0.3, "classifier": classifier, "class_label": "dog",
        "classifier_scale": 2.0, "latents": x,
    }  # fmt: skip
    context, null = tiny_context(pipe, ["cat"]), tiny_context(pipe, ["red heart"])
    pipe.scheduler.set_timesteps(5)
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            with_prompt, without = (pipe.unet(x, t, encoder_hidden_states=c).sample for c in (context, null))
        guided = with_prompt
        if 199 <= int(t) < 799:
            guided = without + 4.0 * (with_prompt - without)
            guided = 0.3 * guided * with_prompt.std() / guided.std() + 0.7 * guided
        bar = pipe.scheduler.alphas_cumprod[int(t)]
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(classifier(leaf, t[None]).log_softmax(1)[0, 1], leaf)
        guided = guided - 2.0 * ((1 - bar) / bar).sqrt() * gradient
        x = pipe.scheduler.step(guided, t, x).prev_sample
    return pipe, words, x


def test_every_kind_of_guidance_at_once(everything: tuple[LDMPipeline, dict[str, Any], Tensor]) -> None:
    pipe, words, expected = everything
    assert (sample(pipe, **words) - expected).abs().max() < 3e-4


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.story)
def test_a_fault_in_a_formula_of_guidance_shows_in_the_picture(
    fault: Fault, everything: tuple[LDMPipeline, dict[str, Any], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, words, expected = everything
    plant(fault, monkeypatch)
    assert (sample(pipe, **words) - expected).abs().max() > 3e-3
