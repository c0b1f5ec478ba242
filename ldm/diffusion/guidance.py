"""Guidance: several predictions in, one out. This is the code that every generated picture goes through.

By Bayes the score of a condition is a difference of two scores,

    grad log p(c | x_t) = grad log q(x_t | c) - grad log q(x_t)

and guidance adds more of it than there is (Dhariwal & Nichol 2021; Ho & Salimans 2022):

    guided score = grad log q(x_t) + scale * grad log p(c | x_t) = (1 - scale) * unconditional + scale * conditional

`scale` 0 is the unconditional model, 1 the conditional one, above 1 exaggerates. Whether eps, x0, v or score, a
prediction is an affine function of the score with coefficients that depend on x_t and t only, and the two
factors above sum to 1: so `guide` is the same line for all of them.

Guidance does not sample from p(x) p(c | x)**scale. For that, the score at time t would have to be the one of the
tilted density, diffused; the guided score is the one of the diffused densities, tilted. Noising and tilting don't
commute, unless the scale is 0 or 1. `docs/theory.md` has the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ldm.diffusion.forward import q_sample
from ldm.diffusion.parameterization import Prediction, add_to_score
from ldm.diffusion.schedule import NoiseSchedule

#: Names of the two conditions that guidance contrasts; a denoiser knows what they stand for.
POSITIVE, NEGATIVE = "positive", "negative"
#: (x_t [B, ...], t, *names of conditions) => a prediction [B, ...] for each name, from one evaluation of the network.
ConditionalDenoiser = Callable[..., tuple[Tensor, ...]]
#: (x_t [B, ...], t [B]) => logits [B, classes].
Classifier = Callable[[Tensor, Tensor], Tensor]
#: (x_t [B, ...], t [B]) => log p(c | x_t) [B].
LogProb = Callable[[Tensor, Tensor], Tensor]


def guide(positive: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
    """negative + scale * (positive - negative), for predictions of one kind at one x_t.

    - Classifier-free guidance (Ho & Salimans 2022): the prediction with the condition, and with the null condition.
    - Autoguidance (Karras et al. 2024): the prediction of the model, and of a weaker copy, both with the condition.
    """
    return negative + scale * (positive - negative)


def rescale(guided: Tensor, positive: Tensor, amount: float) -> Tensor:
    """Give each sample's guided prediction back the standard deviation it had (Lin et al. 2024, eq. 15-16).

    Args:
        guided, positive: [B, ...] predictions of one kind; the paper recommends v.
        amount: 0 changes nothing, 1 restores the deviation in full; the paper recommends 0.7.
    """
    dims = tuple(range(1, guided.ndim))
    matched = guided * (positive.std(dims, keepdim=True) / guided.std(dims, keepdim=True))  # eq. 15
    return amount * matched + (1 - amount) * guided  # eq. 16


def interval_scale(scale: float, t: float, T: int, interval: tuple[float, float] = (0.0, 1.0)) -> float:
    """The scale to use at t: `scale` inside the interval of t/T, 1 (the conditional model) outside of it.

    Guidance hurts at the noisiest timesteps and does nothing at the cleanest ones (Kynkäänniemi et al. 2024).

    Args:
        interval: fractions of the T timesteps, low <= t / T < high.
    """
    low, high = interval
    return scale if low <= t / T < high else 1.0


def log_prob_gradient(log_prob: LogProb, x_t: Tensor, t: Tensor) -> Tensor:
    """grad log p(c | x_t) by x_t, shaped like x_t, without a graph; also where gradients are off, as in sampling.

    Args:
        log_prob: differentiable; a sample's value depends on that sample only.
        x_t: [B, ...].
        t: int64 [B].
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()  # a clone: what inference mode made can't be differentiated
        (gradient,) = torch.autograd.grad(log_prob(x, t.clone()).sum(), x)
    return gradient


def classifier_guidance(
    prediction: Prediction,
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    log_prob: LogProb,
    scale: float,
) -> Tensor:
    """A prediction, guided by a classifier of noisy latents (Dhariwal & Nichol 2021, alg. 2, where it is eps).

    The score becomes score + scale * grad log p(c | x_t): an unconditional prediction and scale 1 give the
    conditional one.

    Args:
        prediction: the kind of `output`.
        output, x_t: [B, ...]; x_t = alpha_t x0 + sigma_t eps.
        t: int64 [B].
        log_prob: of a classifier trained with `classifier_loss`.
    Returns:
        The same kind of prediction, without a graph.
    """
    gradient = log_prob_gradient(log_prob, x_t, t)
    return add_to_score(prediction, output, scale * gradient, *schedule.at(t, x_t))


@dataclass(frozen=True)
class ClassifierGuidance:
    """`classifier_guidance` with all but the prediction in place.

    Attributes:
        prediction: what the network predicts.
        schedule: of the classifier's training.
        log_prob: of the wanted classes, one per sample.
        scale: 0 is off, 1 is Bayes' rule, above 1 exaggerates.
    """

    prediction: Prediction
    schedule: NoiseSchedule
    log_prob: LogProb
    scale: float

    def __call__(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """A prediction [B, ...] at x_t and t (a scalar; some samplers have t between timesteps) => the guided one."""
        each = t.round().long().to(x_t.device).expand(len(x_t))
        guided = classifier_guidance(
            self.prediction, output.float(), x_t.float(), each, self.schedule, self.log_prob, self.scale
        )
        return guided.to(output.dtype)


@dataclass
class Guidance:
    """What becomes of a network's predictions at each step of sampling.

    The denoiser is evaluated with the positive and the negative condition at once, or, where guidance is off, with the
    positive one alone, at half the cost.

    Attributes:
        T: number of timesteps of the training.
        scale: of classifier-free guidance or autoguidance; 1 is off.
        interval: fractions of T, low <= t / T < high, where there is guidance.
        rescale: as `rescale`; 0 is off.
        classifier: guidance by a classifier, on top.
        weak: the denoiser of a weaker model: autoguidance takes its positive prediction for the negative one.
    """

    T: int
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    classifier: ClassifierGuidance | None = None
    weak: ConditionalDenoiser | None = None

    def __call__(self, denoiser: ConditionalDenoiser, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction [B, ...] to step with, from x_t [B, ...] as the network takes it, at t, a scalar."""
        scale = interval_scale(self.scale, float(t), self.T, self.interval)
        if scale == 1:
            (guided,) = denoiser(x_t, t, POSITIVE)
        else:
            negative, positive = self._pair(denoiser, x_t, t)
            guided = guide(positive, negative, scale)
            if self.rescale > 0:
                guided = rescale(guided, positive, self.rescale)
        return guided if self.classifier is None else self.classifier(guided, x_t, t)

    def _pair(self, denoiser: ConditionalDenoiser, x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """The prediction to move away from, and the one to move towards."""
        if self.weak is None:
            return denoiser(x_t, t, NEGATIVE, POSITIVE)  # stock's order in the batch, for stock's bits
        return (*self.weak(x_t, t, POSITIVE), *denoiser(x_t, t, POSITIVE))


def class_log_prob(classifier: Classifier, labels: Tensor) -> LogProb:
    """The `log_prob` of `classifier_guidance`, for class labels int64 [B]."""
    return lambda x_t, t: -cross_entropy(classifier(x_t, t), labels, reduction="none")


def classifier_loss(
    classifier: Classifier, schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor, labels: Tensor
) -> Tensor:
    """-log p(c | x_t), what the noisy-latent classifier is trained with; its minimizer is the true p(c | x_t).

    Args:
        x0, t, eps: as in `q_sample`.
        labels: int64 [B].
    Returns:
        nats [B].
    """
    return -class_log_prob(classifier, labels)(q_sample(schedule, x0, t, eps), t)
