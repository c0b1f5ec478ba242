"""Steering: what the U-Net is given and answers, against closed forms and against the sampler written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from oracles import PREDICTIONS, Mixture, double, generator
from torch import Tensor, nn

from ldm.diffusion.parameterization import DIFFUSERS_NAMES, Prediction
from ldm.diffusion.schedule import NoiseSchedule
from ldm.inference.steering import ClassifierSteering, steered
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


def draw(pipe: LDMPipeline, prompt: Any = "red heart", **words: Any) -> Tensor:
    """Latents [N,C,h,w], in three steps."""
    words = {"num_inference_steps": 3, "seed": 5, "output_type": "latent", **words}
    return pipe(prompt, **words).images  # type: ignore[return-value]


# --- the mechanism -----------------------------------------------------------------------------


def test_hooks_change_what_they_say_and_are_gone_afterwards(pipe: LDMPipeline) -> None:
    plain = draw(pipe)
    seen: list[tuple[Tensor, Tensor]] = []

    def negate(sample: Tensor, timestep: Tensor, keywords: dict[str, Any]) -> Tensor:
        keywords["encoder_hidden_states"] = -keywords["encoder_hidden_states"]
        return -sample

    def double_it(sample: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        seen.append((sample, timestep))
        return 2 * output

    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 12, 32)
    with torch.no_grad():
        expected = 2 * pipe.unet(-x, t, -context).sample
        with steered(pipe.unet, before=[negate], after=[double_it]):
            found = pipe.unet(x, t, encoder_hidden_states=context)
            as_tuple = pipe.unet(x, t, encoder_hidden_states=context, return_dict=False)
    assert torch.equal(found.sample, expected) and torch.equal(as_tuple[0], expected) and len(as_tuple) == 1
    assert torch.equal(seen[0][0], x) and seen[0][1].tolist() == [7, 7]  # as it was before `negate`
    assert torch.equal(draw(pipe), plain)


def test_hooks_are_gone_after_an_error(pipe: LDMPipeline, classifier: NoisyClassifier) -> None:
    plain = draw(pipe)

    def stop(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), steered(pipe.unet, after=[stop]):
        draw(pipe)
    with pytest.raises(RuntimeError):  # a classifier of other latents
        network = build_classifier(
            ClassifierConfig(channels=(16,)), latent_shape=(2, 8, 8), names=["a", "b"], schedule=SCHEDULE
        )
        network.network.convnextv2.embeddings.num_channels = 5
        draw(pipe, classifier=network, class_label="a")
    assert torch.equal(draw(pipe), plain)


def test_scale_zero_is_off_to_the_last_bit(pipe: LDMPipeline, classifier: NoisyClassifier) -> None:
    plain = draw(pipe, ["red heart", "cat"])
    for words in ({"classifier_scale": 0}, {"classifier_scale": 0.0}):
        assert torch.equal(draw(pipe, ["red heart", "cat"], classifier=classifier, class_label="dog", **words), plain)
    steered_away = draw(pipe, ["red heart", "cat"], classifier=classifier, class_label="dog")
    assert (steered_away - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_unet_sees_x_t_with_every_such_scheduler(name: str, pipe: LDMPipeline) -> None:
    """If all data are one point m, the exact noise is (x_t - alpha m) / sigma, and no deterministic step changes it."""
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    bar = (1 - SCHEDULE.betas).cumprod(0)
    point, noises = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), []

    def exact(sample: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        place = np.interp(timestep.numpy().astype(float), np.arange(1000), bar.numpy())
        alpha, sigma = (torch.tensor(value**0.5).float().reshape(-1, 1, 1, 1) for value in (place, 1 - place))
        noises.append((sample - alpha * point) / sigma)
        return noises[-1]

    with steered(pipe.unet, after=[exact]):
        draw(pipe, guidance_scale=1.0, num_inference_steps=8)
    assert len(noises) >= 8
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0], rtol=0, atol=0.02)


# --- the classifier ----------------------------------------------------------------------------


class Exact(nn.Module):
    """p(component | x_t) of a Gaussian mixture, as a classifier."""

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
    """For every prediction, at every noise level, each picture with its own class, and in doubled batches."""
    data, ids = two_clouds(), torch.tensor([0, 1, 1, 0])
    t = torch.tensor([1, 300, 700, 990])
    x = torch.randn(4, 4, 8, 8, generator=generator(3))
    both, t2 = torch.cat([x, x]), torch.cat([t, t])
    output = data.network(SCHEDULE, kind)(both, t2)
    found = ClassifierSteering(Exact(data), ids, 1.0, kind)(both, t2, output)  # type: ignore[arg-type]
    rows = [component(data, int(k)).network(SCHEDULE, kind)(both[i : i + 1], t2[i : i + 1]) for i, k in
            enumerate(torch.cat([ids, ids]))]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-3, atol=1e-3)
    assert (output - found).abs().max() > 0.1


def test_a_steered_pipeline_draws_the_class(pipe: LDMPipeline) -> None:
    """With exact networks: unsteered pictures are of the frequent class, steered ones of the class that was asked."""
    data = two_clouds()
    network = data.network(SCHEDULE, "eps")

    def exact(sample: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        return network(sample, timestep.long())

    def classes(**words: Any) -> Tensor:
        with steered(pipe.unet, after=[exact]):  # the outer hooks answer first
            latents = draw(pipe, ["red"] * 12, guidance_scale=1.0, num_inference_steps=20, **words)
        return data.responsibilities(latents.double().flatten(1))[:, 1]

    assert classes().mean() < 0.5
    asked = classes(classifier=Exact(data), class_label=["0", "1"] * 6)
    torch.testing.assert_close(asked, double([0, 1] * 6), rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_step_is_the_papers(
    kind: Prediction, guidance_scale: float, pipe: LDMPipeline, classifier: NoisyClassifier
) -> None:
    """Algorithm 2 of Dhariwal & Nichol on eps, after classifier-free guidance, by the scheduler's own alphas."""
    config = {**pipe.scheduler.config, "prediction_type": DIFFUSERS_NAMES[kind]}
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
    scale, start = 2.5, torch.randn(2, 4, 8, 8, generator=generator(0))
    found = draw(
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
    plain = draw(pipe, ["cat", "dog"], guidance_scale=guidance_scale, latents=start, num_inference_steps=4)
    assert (found - plain).abs().max() > 0.05


def tiny_context(pipe: LDMPipeline, captions: list[str]) -> Tensor:
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=tiny.MAX_LENGTH, return_tensors="pt")
    with torch.no_grad():
        return pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]


def test_labels_go_to_the_pictures_of_their_prompt(pipe: LDMPipeline, classifier: NoisyClassifier) -> None:
    words: dict[str, Any] = {"classifier": classifier, "classifier_scale": 3.0}
    both = draw(pipe, ["red", "cat"], class_label=["fig", "cat"], num_images_per_prompt=2, **words)
    alone = draw(pipe, "cat", class_label="cat", num_images_per_prompt=2, **{**words, "seed": 7})
    torch.testing.assert_close(both[2:], alone, rtol=0, atol=1e-4)
    other = draw(pipe, "cat", class_label="fig", num_images_per_prompt=2, **{**words, "seed": 7})
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
        draw(pipe, ["red", "cat"], **{"classifier": classifier, **words})


def test_another_process_is_refused(pipe: LDMPipeline, classifier: NoisyClassifier) -> None:
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match="trained on another noise schedule .* than the pipeline's"):
        draw(pipe, classifier=classifier, class_label="dog")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler walks another process"):
        draw(pipe, classifier=classifier, class_label="dog")
