"""What a stock pipeline's U-Net is given and answers, changed from outside while pictures are drawn.

    with steered(pipeline.unet, after=[ClassifierSteering(classifier, ids, 2.0, "v")]):
        pipeline(...)

Stock pipelines have no place for classes, for a second picture's latents or for a classifier's gradient, and this is
it: hooks on the U-Net, which see every call and are gone afterwards, whatever happened. The U-Net sees the
x_t = alpha_t x0 + sigma_t eps of training with every scheduler that has `alphas_cumprod`; those that keep x_t in other
units (Euler, Heun, LMS) convert it before the call. Schedulers without it (flow matching, EDM) walk another process,
which neither U-Net nor classifier was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.guidance import class_log_prob, log_prob_gradient
from ldm.diffusion.parameterization import Prediction, add_to_score
from ldm.diffusion.schedule import NoiseSchedule, prediction_from_config
from ldm.models.classifier import NoisyClassifier

#: (sample [B,C,h,w], timestep [B], the call's keywords, to be changed in place) => the sample that the U-Net is given.
Before = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
#: (sample as the pipeline gave it, timestep [B], the U-Net's output) => the output that the pipeline gets.
After = Callable[[Tensor, Tensor, Tensor], Tensor]


@contextmanager
def steered(unet: nn.Module, before: Sequence[Before] = (), after: Sequence[After] = ()) -> Iterator[None]:
    """Inside, every call of the U-Net passes through these functions, in their order.

    The U-Net must be called as stock pipelines do: unet(sample, timestep, **keywords). The hooks sit on the network
    itself, so two drawings on one network must not overlap.
    """
    if not before and not after:
        yield
        return
    given: list[tuple[Tensor, Tensor]] = []

    def on_call(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        sample, timestep, *others = arguments
        each = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        given[:] = [(sample, each)]
        keywords = dict(keywords)
        for change in before:
            sample = change(sample, each, keywords)
        return (sample, timestep, *others), keywords

    def on_answer(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        answer = output[0]
        for change in after:
            answer = change(*given[0], answer)
        return (answer, *output[1:]) if isinstance(output, tuple) else type(output)(sample=answer)

    hooks = [unet.register_forward_pre_hook(on_call, with_kwargs=True), unet.register_forward_hook(on_answer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class ClassifierSteering:
    """Adds scale * grad log p(class | x_t) to the score, whatever the U-Net predicts (Dhariwal & Nichol 2021, alg. 2).

    With classifier-free guidance the U-Net is called with every x_t twice, for the negative prompts and the positive
    ones. Both answers move by the same, and so does every combination a + w (b - a) of them.

    Attributes:
        ids: the class of each picture, int64 [N].
        scale: 0 is off, 1 is Bayes' rule, above 1 exaggerates.
        prediction: what the U-Net predicts.
    """

    classifier: NoisyClassifier
    ids: Tensor
    scale: float
    prediction: Prediction

    @classmethod
    def of(cls, classifier: NoisyClassifier, ids: Tensor, scale: float, scheduler: Any) -> ClassifierSteering:
        """Steering for a pipeline with this scheduler; raises as `check_same_process`."""
        check_same_process(scheduler, classifier.schedule)
        return cls(classifier, ids, scale, prediction_from_config(scheduler.config))

    def __call__(self, sample: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        pictures = len(self.ids)
        x_t, t = sample[:pictures].float(), timestep[:pictures].round().long()  # Euler and others have t between steps
        log_prob = class_log_prob(self.classifier, self.ids.to(sample.device))
        change = self.scale * log_prob_gradient(log_prob, x_t, t)  # (N, C, h, w)
        alpha, sigma = self.classifier.schedule.at(t, x_t)
        copies = len(sample) // pictures
        change, alpha, sigma = (part.repeat(copies, 1, 1, 1) for part in (change, alpha, sigma))
        return add_to_score(self.prediction, output.float(), change, alpha, sigma).to(output.dtype)


def check_same_process(scheduler: Any, schedule: NoiseSchedule) -> None:
    """Refuse a classifier that was trained on another noise than a stock scheduler adds.

    Raises:
        ValueError: if the scheduler has no x_t = alpha x0 + sigma eps, or has it with other alphas.
    """
    name, theirs = type(scheduler).__name__, getattr(scheduler, "alphas_cumprod", None)
    if theirs is None:
        raise ValueError(
            f"classifier: {name} walks another process than x_t = alpha x0 + sigma eps, which it was trained on; "
            "take DDIMScheduler, DPMSolverMultistepScheduler or EulerDiscreteScheduler"
        )
    ours = schedule.alpha_bar.to(theirs)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-4):
        raise ValueError(
            f"classifier: it was trained on another noise schedule (T = {schedule.T}, the last alpha_bar "
            f"{float(schedule.alpha_bar[-1]):.2g}) than the pipeline's (T = {len(theirs)}, {float(theirs[-1]):.2g}); "
            "train it with the config of the model"
        )
