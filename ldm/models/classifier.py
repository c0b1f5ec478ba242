"""p(y | x_t, t): a classifier of noisy latents, whose gradient steers the drawing (Dhariwal & Nichol 2021, section 4).

The network is transformers' ConvNextV2ForImageClassification. It sees x_t and, as one more channel, how noisy that is:
a constant plane that holds the log-SNR. It normalizes each position over its channels, never over the batch, so
that a sample's gradient is its own. What it saves is a stock model's folder, the class names in its config.json, with
the schedule of the noise beside it:

    RUN/classifier/
        config.json  model.safetensors  scheduler_config.json
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.diffusion.schedule import NoiseSchedule, gather, noise_config, schedule_from_config
from ldm.models.loading import load_network, loading
from ldm.models.safety import check_model_folder, read_json

SCHEDULE_FILE = "scheduler_config.json"
MAX_LOG_SNR = 20.0  # where it is cut: infinite at zero terminal SNR
LOG_SNR_UNIT = 4.0  # the plane then has about the size of the latents


@dataclass(frozen=True)
class ClassifierConfig:
    """The shape of the classifier that train_classifier.py trains.

    Attributes:
        channels: width of each level, finest first; each level but the last halves the resolution.
        layers: blocks per level.
        patch_size: latents along an edge that the first layer takes together.
    """

    channels: tuple[int, ...] = (64, 128, 256)
    layers: int = 2
    patch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("layers", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"classifier.{name}: expected at least 1, got {getattr(self, name)}")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"classifier.channels: expected at least one positive width, got {list(self.channels)}")


class NoisyClassifier(nn.Module):
    """A stock image classifier, told the noise level.

    Args:
        network: takes pixel_values [B,C+1,h,w] and answers with `.logits` [B,K]; its config names the classes.
        schedule: of the noise in x_t.
    """

    def __init__(self, network: Any, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t [B,C,h,w] and t int64 [B] => logits [B,K]."""
        log_snr = gather(self.schedule.snr.log().clamp(-MAX_LOG_SNR, MAX_LOG_SNR), t, x_t)  # (B, 1, 1, 1)
        plane = (log_snr / LOG_SNR_UNIT).expand(-1, 1, *x_t.shape[2:])
        logits: Tensor = self.network(torch.cat([x_t, plane], dim=1)).logits
        return logits

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, in the order of the logits."""
        names = self.network.config.id2label
        return tuple(names[i] for i in range(len(names)))

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.network.config.num_channels) - 1

    def class_id(self, name: str | None) -> int:
        """The number of a class. Raises ValueError, naming the nearest, if there is no such class."""
        if name is None:
            raise ValueError(f"class_label: the classifier needs one of {', '.join(self.names)}")
        if name not in self.names:
            nearest = difflib.get_close_matches(name, self.names, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"class_label: the classifier knows no {name!r}; did you mean {nearest!r}? "
                f"It knows {', '.join(self.names)}"
            )
        return self.names.index(name)

    def check_process(self, scheduler: Any) -> None:
        """Refuse a stock scheduler that adds another noise than this classifier was trained on.

        Raises:
            ValueError: if the scheduler has no x_t = alpha x0 + sigma eps, or has it with other alphas.
        """
        name, theirs = type(scheduler).__name__, getattr(scheduler, "alphas_cumprod", None)
        if theirs is None:
            raise ValueError(
                f"classifier: {name} has another process than x_t = alpha x0 + sigma eps, which it was trained on; "
                "use the sampler ddim, dpm++ or euler"
            )
        check_schedule(self.schedule, theirs)

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the folder that `load` reads; stock transformers opens it as well.

        Args:
            weights: this module's `state_dict()`, where a training has them in pieces.
        """
        weights = self.state_dict() if weights is None else weights
        own = {name.removeprefix("network."): tensor for name, tensor in weights.items()}
        self.network.config.architectures = [type(self.network).__name__]
        self.network.config.save_pretrained(folder)
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / SCHEDULE_FILE).write_text(json.dumps(noise_config(self.schedule), indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> NoisyClassifier:
        """A saved classifier, frozen.

        Raises:
            FileNotFoundError: if the folder isn't a classifier's.
            ValueError: if it holds more than data (`ldm.models.safety`).
        """
        from transformers import ConvNextV2ForImageClassification

        folder = Path(folder).expanduser()
        if not (folder / SCHEDULE_FILE).exists() or not (folder / "config.json").exists():
            nested = folder / "classifier"
            hint = f"; did you mean {nested}?" if (nested / SCHEDULE_FILE).exists() else ""
            raise FileNotFoundError(
                f"{folder} is not a classifier's folder: it lacks config.json or {SCHEDULE_FILE}{hint}"
            )
        check_model_folder(folder)
        with loading(folder):
            schedule = schedule_from_config(read_json(folder / SCHEDULE_FILE))
        network = load_network(ConvNextV2ForImageClassification, folder)
        return cls(network, schedule).eval().requires_grad_(False)


def check_schedule(schedule: NoiseSchedule, alphas_cumprod: Tensor) -> None:
    """Raise a ValueError if a classifier's noise schedule isn't that of a scheduler."""
    ours = schedule.alpha_bar.to(alphas_cumprod)
    if ours.shape != alphas_cumprod.shape or not torch.allclose(ours, alphas_cumprod, atol=1e-4):
        raise ValueError(
            f"classifier: it was trained on another noise schedule (T = {schedule.T}, the last alpha_bar "
            f"{float(ours[-1]):.2g}) than the pipeline's (T = {len(alphas_cumprod)}, {float(alphas_cumprod[-1]):.2g}); "
            "train it with the config of the model"
        )


def build_classifier(
    config: ClassifierConfig, *, latent_shape: tuple[int, int, int], names: Sequence[str], schedule: NoiseSchedule
) -> NoisyClassifier:
    """A classifier with random weights.

    Args:
        latent_shape: (C, h, w) with h = w.
        names: of the classes, in the order of their ids.
    Raises:
        ValueError: if the latents are too small for so many levels.
    """
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    latent_channels, latent_size, _ = latent_shape
    least = config.patch_size * 2 ** (len(config.channels) - 1)
    if latent_size < least:
        raise ValueError(
            f"classifier.channels: {len(config.channels)} levels of patches of {config.patch_size} need latents of at "
            f"least {least} x {least}, but they are {latent_size} x {latent_size}; take fewer levels"
        )
    network = ConvNextV2ForImageClassification(
        ConvNextV2Config(
            num_channels=latent_channels + 1,
            patch_size=config.patch_size,
            num_stages=len(config.channels),
            hidden_sizes=list(config.channels),
            depths=[config.layers] * len(config.channels),
            image_size=latent_size,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
    )
    return NoisyClassifier(network, schedule)
