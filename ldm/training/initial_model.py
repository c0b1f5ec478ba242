"""The model that a run starts from: the config's `init`, a folder of a stock Stable Diffusion pipeline.

U-Net, VAE, text encoder, noise schedule and prediction type are the model's own, as they are: nothing is measured or
rescaled, since its U-Net has learned from these latents and contexts. `resolved` writes what it brings into the config,
and refuses keys that say otherwise. At step 0 the U-Net predicts what the model's does, to the last bit, also with more
input channels: their weights are zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ldm.data.conditioned import ConditionedPictures
from ldm.data.labels import Labels
from ldm.data.numbers import Numbers
from ldm.diffusion.parameterization import Prediction
from ldm.diffusion.schedule import NoiseSchedule, RectifiedFlow, prediction_from_config, schedule_from_config
from ldm.models.fingerprint import fingerprint
from ldm.models.loading import load_network
from ldm.models.safety import check_model_folder, read_json
from ldm.models.text_encoder import TextConfig
from ldm.models.unet import UNetConfig, described
from ldm.pipelines.loading import LABELS_FILE, NUMBERS_FILE, UPSCALER, find_pipeline
from ldm.training.config import Config
from ldm.training.facts import RunFacts, folder_stamp
from ldm.training.objective import build_schedule

#: Settings of a U-Net that this training has nothing to feed with.
UNFED = ("time_cond_proj_dim",)
SOLVER_STEPS = 50  # from which stock LCMScheduler chooses its own
STUDENT_STEPS = 4  # of a distillation whose recipe names none
SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid")  # of betas


@dataclass(frozen=True)
class InitialModel:
    """A pipeline's folder, as far as it is known without reading weights.

    Attributes:
        name: as the config has it, a folder or a Hub id.
        folder: where it lies.
        unet, vae, scheduler: the configs, with the defaults of their classes.
        text: the text encoder's config; None for a model that knows no text.
        labels: the classes that it knows; None if it knows none.
        numbers: the numbers that it is conditioned on; None without any.
    """

    name: str
    folder: Path
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text: Mapping[str, Any] | None
    labels: Labels | None
    numbers: Numbers | None = None

    @classmethod
    def open(cls, name: str) -> InitialModel:
        """Check a pipeline's folder, or a Hub id's, and read what it says.

        Raises:
            ValueError: if it holds more than data (`ldm.models.safety`), or parts that don't fit together or that this
                training can't train; names init.
            OSError: if there is no such folder or id, or it is no pipeline's.
        """
        try:
            folder = find_init(name)
            check_model_folder(folder)
            return cls._read(name, folder)
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"init: {error}") from None

    @classmethod
    def of(cls, config: Config) -> InitialModel | None:
        """The model that a run starts from, None if it starts from nothing."""
        return None if config.init is None else cls.open(config.init)

    @classmethod
    def _read(cls, name: str, folder: Path) -> InitialModel:
        index = read_json(folder / "model_index.json")

        def config(part: str) -> dict[str, Any]:
            kind = inspect.signature(getattr(diffusers, index[part][1]).__init__)
            saved = read_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))
            defaults = {key: one.default for key, one in kind.parameters.items() if one.default is not one.empty}
            return {**defaults, **{key: value for key, value in saved.items() if not key.startswith("_")}}

        if index.get("_class_name") == UPSCALER:
            raise ValueError(f"{folder} is an upscaler, which is trained from random weights alone")
        for part in ("unet", "vae", "scheduler"):
            if index.get(part) in (None, [None, None]):
                raise ValueError(f"{folder}: it has no {part}")
        has_text = index.get("text_encoder") not in (None, [None, None])
        model = cls(
            name, folder, config("unet"), config("vae"), config("scheduler"),
            read_json(folder / "text_encoder/config.json") if has_text else None,
            Labels.load(folder / LABELS_FILE) if (folder / LABELS_FILE).exists() else None,
            Numbers.load(folder / NUMBERS_FILE) if (folder / NUMBERS_FILE).exists() else None,
        )  # fmt: skip
        model._check()
        return model

    def _check(self) -> None:
        """Refuse parts that don't fit together, and what this training can't train."""
        unet, latents = self.unet, self.vae["latent_channels"]
        if unet["out_channels"] != latents:
            raise ValueError(
                f"{self.folder}: its U-Net predicts latents of {unet['out_channels']} channels, its VAE makes {latents}"
            )
        if self.extra_channels not in (0, latents, latents + 1):
            raise ValueError(
                f"{self.folder}: its U-Net takes {unet['in_channels']} channels; expected {latents}, "
                f"{2 * latents} with a second picture's, or {2 * latents + 1} to inpaint"
            )
        for key in UNFED:
            if unet[key] is not None:
                raise ValueError(f"{self.folder}: its U-Net has {key}={unet[key]}, which this training can't train")
        width = self.numbers.width if self.numbers else None
        numbers = ("simple_projection" if self.numbers else None, width)
        if (unet["class_embed_type"], unet["projection_class_embeddings_input_dim"]) != numbers:
            raise ValueError(
                f"{self.folder}: its U-Net has class_embed_type={unet['class_embed_type']}, which is trained "
                f"with the numbers that {NUMBERS_FILE} names alone"
            )
        if unet["addition_embed_type"] not in (None, "text"):
            raise ValueError(f"{self.folder}: its U-Net has addition_embed_type={unet['addition_embed_type']}")
        classes = unet["num_class_embeds"]
        if (classes or 0) != (0 if self.labels is None else len(self.labels.names) + 1):
            named = "no" if self.labels is None else len(self.labels.names)
            raise ValueError(
                f"{self.folder}: its U-Net has {classes or 0} class embeddings, {named} classes and one for none are "
                f"named in {LABELS_FILE}"
            )
        if self.text is not None:
            width = unet["encoder_hid_dim"] or unet["cross_attention_dim"]
            dim = next((self.text[name] for name in ("hidden_size", "d_model", "n_embd") if name in self.text), None)
            if width != dim:
                raise ValueError(f"{self.folder}: its U-Net attends to {width} channels, its text encoder has {dim}")
        _ = self.schedule, self.prediction

    # --- what it brings -----------------------------------------------------------------------------

    @property
    def extra_channels(self) -> int:
        """Input channels of the U-Net that follow those of x_t."""
        return int(self.unet["in_channels"] - self.unet["out_channels"])

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The process."""
        return schedule_from_config(self.scheduler)

    @property
    def prediction(self) -> Prediction:
        """What the U-Net predicts."""
        return prediction_from_config(self.scheduler)

    def brings(self) -> dict[str, Any]:
        """Every key of the config that follows from the model => its value; ... where no value of the key says it."""
        text: dict[str, Any] = {"encoder": None, "max_length": TextConfig().max_length, "standardize": False}
        if self.text is not None:
            length = read_json(self.folder / "tokenizer/tokenizer_config.json").get("model_max_length", 0)
            text |= {"encoder": self.name, "max_length": length}
        unet = dict.fromkeys(vars(UNetConfig()), ...) | described(self.unet)
        diffusion = {"schedule": ..., "zero_terminal_snr": ..., "timesteps": self.schedule.T}
        for name in SCHEDULES:
            for zero in (False, True):
                known = NoiseSchedule.from_name(name, self.schedule.T, zero_terminal_snr=zero)
                if torch.allclose(known.betas, self.schedule.betas, rtol=1e-9):
                    diffusion |= {"schedule": name, "zero_terminal_snr": zero}
        if isinstance(self.schedule, RectifiedFlow):
            diffusion |= {"schedule": "rectified_flow", "zero_terminal_snr": False, "flow_shift": self.schedule.shift}
        diffusion |= {"prediction": self.prediction, "variance": "fixed"}
        return {"vae": self.name, "text": text, "unet": unet, "diffusion": diffusion}

    # --- its U-Net ----------------------------------------------------------------------------------

    def unet_config(self, latent_size: int, extra_channels: int) -> dict[str, Any]:
        """The config of its U-Net for other latents and more input channels."""
        channels = self.unet["out_channels"] + extra_channels
        return {**self.unet, "sample_size": latent_size, "in_channels": channels}

    def weightless_unet(self, latent_size: int, extra_channels: int) -> UNet2DConditionModel:
        """The U-Net that `load_unet` returns, on the meta device."""
        with torch.device("meta"):
            made: UNet2DConditionModel = UNet2DConditionModel.from_config(self.unet_config(latent_size, extra_channels))
        return made

    @torch.no_grad()
    def load_unet(self, latent_size: int, extra_channels: int, facts: RunFacts | None = None) -> UNet2DConditionModel:
        """Its U-Net in float32, with so many input channels behind those of x_t; new ones have weights of zero.

        Args:
            latent_size: edge of the latents, for the config.
            facts: where the hash of its weights is remembered.
        """
        stamp = folder_stamp(self.folder / "unet")  # before its weights are read
        unet = load_network(UNet2DConditionModel, self.folder / "unet", dtype=torch.float32)
        if facts is not None and facts.recall("init", stamp) is None:
            facts.keep("init", stamp, fingerprint(unet))
        for weight in unet.parameters():
            weight.data = weight.data.clone()  # out of the mapped file
        old = unet.conv_in
        new = extra_channels - self.extra_channels
        if new:
            unet.conv_in = nn.Conv2d(old.in_channels + new, old.out_channels, old.kernel_size, padding=old.padding)
            unet.conv_in.weight.zero_()[:, : old.in_channels] = old.weight
            unet.conv_in.bias.copy_(old.bias)
        unet.register_to_config(**self.unet_config(latent_size, extra_channels))
        return unet

    def fingerprint(self, facts: RunFacts) -> str:
        """The hash of its U-Net; it is read only if the hash isn't remembered."""
        stamp = folder_stamp(self.folder / "unet")
        known = facts.recall("init", stamp)
        if known is None:
            known = fingerprint(load_network(UNet2DConditionModel, self.folder / "unet", dtype=torch.float32))
            facts.keep("init", stamp, known)
        return str(known)

    # --- its classes --------------------------------------------------------------------------------

    def with_its_labels(self, source: ConditionedPictures) -> ConditionedPictures:
        """The pictures with the model's numbers of their classes, and its scale of their numbers.

        Raises:
            ValueError: for a class that the model doesn't know.
        """
        if self.numbers is not None:
            return replace(source, numbers=self.numbers)
        if source.labels is None or self.labels is None:
            return source
        unknown = [name for name in source.labels.names if name not in self.labels.names]
        if unknown:
            raise ValueError(
                f"data.label_column: init={self.name} doesn't know the class {unknown[0]!r}; it knows "
                f"{', '.join(self.labels.names)}"
            )
        return replace(source, labels=Labels(source.labels.column, self.labels.names))


def find_init(name: str) -> Path:
    """The folder of a pipeline; a Hub id's is downloaded once, without pickles and code."""
    place = Path(name).expanduser()
    if place.is_dir():
        return find_pipeline(name)
    if place.exists() or place.is_absolute() or len(place.parts) != 2 or place.parent.exists():
        raise FileNotFoundError(
            f"{name}: there is no such folder; name the model to start from, init=FOLDER or a Hub id"
        )
    return _snapshot(name)


@cache
def _snapshot(name: str) -> Path:
    return find_pipeline(name)


def schedule_of(config: Config) -> NoiseSchedule:
    """The process of a run."""
    model = InitialModel.of(config)
    return build_schedule(config.diffusion) if model is None else model.schedule


def resolved(config: Config, task: str) -> Config:
    """The config with what its `init` brings; a config without `init` as it is.

    Args:
        task: "vae", "ldm", "distill" or "classifier".
    Raises:
        ValueError: names a key that contradicts the model. A key at its default counts as not set.
        OSError: if there is no such model.
    """
    if task == "distill":
        config = _for_student(config)
    if config.init is None:
        return config
    if task == "vae":
        raise ValueError("init: the model brings its VAE, which is not trained; to train one leave init out")
    model, plain = InitialModel.open(config.init), Config()
    brought: dict[str, Any] = {}
    for name, value in model.brings().items():
        if not isinstance(value, dict):
            _agree(model, name, getattr(config, name), getattr(plain, name), value)
            brought[name] = value
            continue
        section, default = getattr(config, name), getattr(plain, name)
        for key, one in value.items():
            _agree(model, f"{name}.{key}", getattr(section, key), getattr(default, key), one)
        try:
            brought[name] = replace(section, **{key: one for key, one in value.items() if one is not ...})
        except ValueError as error:
            if name != "unet":  # whose section can't describe every stock U-Net
                raise ValueError(f"init: {model.folder}: {error}") from None
    if task in ("ldm", "distill"):
        _check_conditions(config, model)
        _check_frozen(config, model, "a student" if task == "distill" else "adapters" if config.lora.rank else None)
    return replace(config, **brought)


def _for_student(config: Config) -> Config:
    """The config with previews as its student generates; raises a ValueError for what distillation can't do."""
    if config.init is None:
        raise ValueError("init: a student learns from a teacher; name the model, init=FOLDER or a Hub id")
    if config.diffusion.few_steps:
        raise ValueError("diffusion.few_steps: is for `ldm train ldm`; to distill leave it out")
    if config.lora.rank and config.distill.embedding:
        raise ValueError(
            "lora.rank: adapters can't take a guidance scale; set distill.embedding=0 and one distill.guidance_scale"
        )
    if config.lora.rank and config.distill.solver_steps != SOLVER_STEPS:
        raise ValueError(f"distill.solver_steps: a LoRA is sampled with stock's {SOLVER_STEPS}; leave it out")
    if config.lora.keep:
        raise ValueError("lora.keep: a student is to do something else than its teacher for every prompt; set it to 0")
    if config.lora.text_encoder:
        raise ValueError("lora.text_encoder: a student reads captions as its teacher does; set it to false")
    averages = {"name": (config.optim.name == "schedule_free", "adamw"), "ema_widths": (config.optim.ema_widths, "[]")}
    for key, (wrong, right) in averages.items():
        if wrong:
            why = "a student learns from the average of optim.ema_decay alone"
            raise ValueError(f"optim.{key}: {why}; set it to {right}")
    loop, distill = config.loop, config.distill
    if not distill.steps:
        distill = replace(distill, steps=min(STUDENT_STEPS, distill.solver_steps))
    steps = distill.steps if loop.num_inference_steps is None else loop.num_inference_steps
    usual = distill.usual_scale if distill.embedding else 1.0
    scale = usual if loop.guidance_scale is None else loop.guidance_scale
    return replace(config, distill=distill, loop=replace(loop, num_inference_steps=steps, guidance_scale=scale))


def _agree(model: InitialModel, key: str, given: Any, default: Any, brought: Any) -> None:
    """Raise a ValueError if a key was set to something else than the model brings."""
    if given not in (default, brought):
        own = "its own" if brought is ... else f"{brought!r}"
        raise ValueError(
            f"{key}: init={model.name} brings {own}, and its U-Net knows no other; got {given!r}, leave it out"
        )


def _check_conditions(config: Config, model: InitialModel) -> None:
    """Raise a ValueError if data and model don't agree on classes and second pictures."""
    data = config.data
    if data.label_column is not None and model.labels is None:
        raise ValueError(f"data.label_column: init={model.name} knows no classes; leave it out")
    if data.label_column is None and model.labels is not None:
        raise ValueError(
            f"data.label_column: init={model.name} knows the classes {', '.join(model.labels.names)}; name the column "
            "that has them"
        )
    known = model.numbers.columns if model.numbers else ()
    if data.number_columns != known:
        raise ValueError(
            f"data.number_columns: init={model.name} is conditioned on {', '.join(known) or 'no numbers'}; "
            f"set it to [{', '.join(known)}]"
        )
    keys = {
        model.vae["latent_channels"]: ("data.condition_column", "takes a second picture; name the column that has it"),
        model.vae["latent_channels"] + 1: ("data.inpaint", "fills in masked parts; set it to true"),
    }
    taken, hint = keys.get(model.extra_channels, (None, ""))
    if taken not in (
        None,
        "data.inpaint" if data.inpaint else "data.condition_column" if data.condition_column else "",
    ):
        raise ValueError(f"{taken}: init={model.name} {hint}")


def _check_frozen(config: Config, model: InitialModel, learner: str | None) -> None:
    """Raise a ValueError for what a model lacks, and what learns beside or after it can't add."""
    key = "inpaint" if config.data.inpaint else "condition_column"
    if learner and getattr(config.data, key) and not model.extra_channels:
        raise ValueError(
            f"data.{key}: init={model.name} takes no second picture, and {learner} can't add one; leave it out"
        )
    spacing = model.scheduler.get("timestep_spacing")
    if config.lora.rank and config.diffusion.few_steps and spacing != "trailing":
        raise ValueError(
            f"diffusion.few_steps: init={model.name} steps through other timesteps (timestep_spacing={spacing}) than "
            "those that are learned, and adapters bring no scheduler; set lora.rank=0"
        )
