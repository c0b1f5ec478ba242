"""A pipeline and its folder: a name => a checked folder => networks with every weight; and back.

A saved folder names a stock pipeline in model_index.json and holds stock classes and safetensors alone, so it opens
without this package. Three files beside model_index.json are read here only:

    prompts.txt    example prompts, one a line
    labels.json    the names of the classes
    numbers.json   the numbers that it is conditioned on, with their scale
    defaults.json  sampling settings (ldm.inference.defaults)

and a folder upscaler/, a whole pipeline of its own that stock diffusers doesn't look into (ldm.pipelines.upscale).

A saved folder is a function of the model. diffusers writes the path that a network was loaded from into its config;
transformers writes into tokenizer_config.json whether that was offline, and into tokenizer.json how the last call
padded and cut. All of that is left out: padding and length are arguments of each call.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from transformers import PreTrainedModel

from ldm.data.labels import Labels
from ldm.data.numbers import Numbers
from ldm.inference.defaults import FILE as DEFAULTS_FILE
from ldm.inference.defaults import Defaults
from ldm.models.fingerprint import count_change
from ldm.models.loading import load_networks, loading
from ldm.models.lora import WEIGHTS, require_peft
from ldm.models.lora_files import FINDING, OtherBaseWarning, check_fits, find_lora, read_lora
from ldm.models.safety import check_index, check_model_folder, read_json
from ldm.models.text_encoder import TextEncoder

PROMPTS_FILE, LABELS_FILE, NUMBERS_FILE = "prompts.txt", "labels.json", "numbers.json"
UPSCALER = "StableDiffusionUpscalePipeline"
#: Arguments of diffusers' from_pretrained that run code of a folder's, and those that place networks.
CODE = ("custom_pipeline", "trust_remote_code", "use_flashpack", "use_onnx")
PLACES = ("device_map", "quantization_config")
#: Keys by which configs say how they were loaded.
LOADING = frozenset({"_name_or_path", "name_or_path", "is_local", "local_files_only"})


class Saved(DiffusionPipeline):
    """What a stock pipeline of ours adds to its class: it is loaded from, and saved to, a folder that stock opens.

    Attributes:
        example_prompts: prompts that the model was trained on; may be empty.
        labels: the classes that it knows; None if it knows none.
        numbers: the columns of numbers that it is conditioned on; None without any.
        defaults: the settings of a call that names neither steps nor guidance.
        loaded_from: the folder, if it was loaded from one.
    """

    example_prompts: tuple[str, ...] = ()
    labels: Labels | None = None
    numbers: Numbers | None = None
    defaults: Defaults = Defaults()
    loaded_from: Path | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Self:
        """Load a pipeline folder or a Hub id.

        Raises:
            FileNotFoundError: if a name that looks like a folder isn't a pipeline's.
            ValueError: for use_safetensors=False, since the other format, pickle, can run code; for an argument that
                runs code of the folder's; for a folder that holds more than data (`ldm.models.safety`), or weights of
                other networks than its configs'.
            OSError: if there is no such Hub id, or its weights aren't safetensors.
        """
        check_options(kwargs)
        folder = find_pipeline(pretrained_model_name_or_path, **kwargs)
        check_model_folder(folder)
        index = read_json(folder / "model_index.json")
        cls.check_kind(folder, index)
        for part in ("text_encoder", "tokenizer"):
            if index.get(part) == [None, None]:
                kwargs.setdefault(part, None)  # diffusers requires it as an argument
        wanted = {name: value for name, value in index.items() if name not in kwargs}
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        kwargs |= load_networks(folder, wanted, kwargs.get("variant"), dtype)
        with loading(folder):
            pipeline: Self = super().from_pretrained(str(folder), **{**kwargs, "local_files_only": True})
        pipeline.example_prompts = read_prompts(folder / PROMPTS_FILE)
        if (folder / LABELS_FILE).exists():
            pipeline.labels = Labels.load(folder / LABELS_FILE)
        if (folder / NUMBERS_FILE).exists():
            pipeline.numbers = Numbers.load(folder / NUMBERS_FILE)
        pipeline.defaults = Defaults.load(folder)
        pipeline.loaded_from = folder
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """The same networks in a pipeline of this class, in the dtype that they are in.

        Args:
            pipeline: a stock pipeline, or one of ours, whose prompts, labels and defaults come along.
            kwargs: components in place of the pipeline's; `dtype`, to cast the (shared) networks.
        """
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.unet.dtype)  # stock casts them to float32
        made: Self = super().from_pipe(pipeline, **kwargs)
        for name in ("example_prompts", "labels", "numbers", "defaults"):
            if hasattr(pipeline, name):
                setattr(made, name, getattr(pipeline, name))
        return made

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[type, ...]]:
        """The component types that loading accepts without a warning: diffusers' list has no text encoder but CLIP."""
        ours = {"text_encoder": (PreTrainedModel,), "vae": (AutoencoderKL, AutoencoderTiny)}
        return {**super()._get_signature_types(), **ours}

    @classmethod
    def check_kind(cls, folder: Path, index: Mapping[str, Any]) -> None:
        """Raise a ValueError if a folder's model_index.json names a pipeline that this class can't be."""

    @property
    def stock_class(self) -> str:
        """The stock pipeline that the folder names."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Save a folder that stock diffusers opens, with safetensors weights."""
        if kwargs.pop("push_to_hub", False):
            raise ValueError("push_to_hub: save first, then call pipe.push_to_hub('user/name', license=…)")
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization: expected True; pickles can run any code")
        if any(getattr(network, "peft_config", None) for network in (self.unet, self.text_encoder)):
            raise ValueError(
                "save_pretrained: the networks have LoRA adapters, which no loader of networks knows; call "
                "merge_adapters(), or unload_lora_weights()"
            )
        forget_calls(self.tokenizer)
        super().save_pretrained(save_directory, safe_serialization=True, **kwargs)
        self._make_stock(Path(save_directory))

    def save_without_networks(self, folder: Path) -> None:
        """Save all of a pipeline's folder but the networks' own folders, which are saved before it.

        So networks can be saved one after the other, and large ones needn't be in memory together.
        """
        forget_calls(self.tokenizer)
        for name in ("scheduler", "low_res_scheduler", "tokenizer"):
            part = getattr(self, name, None)
            if part is not None:
                part.save_pretrained(folder / name)
        self.save_config(folder)
        self._make_stock(folder)

    def _make_stock(self, folder: Path) -> None:
        """Name the stock pipeline, leave out how it was loaded, and write our files: what was saved before goes."""
        for path in [folder / "model_index.json", *folder.glob("*/*config.json")]:
            settings = json.loads(path.read_text("utf-8"))
            kept = {key: value for key, value in settings.items() if key not in LOADING}
            if path.name == "model_index.json":
                kept["_class_name"] = self.stock_class
            if kept != settings:
                path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")
        for name in (PROMPTS_FILE, LABELS_FILE, NUMBERS_FILE, DEFAULTS_FILE):
            (folder / name).unlink(missing_ok=True)  # of a pipeline that was saved here before
        if self.example_prompts:
            lines = (" ".join(prompt.split()) for prompt in self.example_prompts)
            (folder / PROMPTS_FILE).write_text("\n".join(lines) + "\n", "utf-8")
        if self.labels:
            self.labels.save(folder / LABELS_FILE)
        if self.numbers:
            self.numbers.save(folder / NUMBERS_FILE)
        if self.defaults != Defaults():
            self.defaults.save(folder)


class SavedPipeline(Saved, StableDiffusionPipeline):
    """A stock text-to-image pipeline, and those with further channels beside x_t, in a folder."""

    @classmethod
    def from_components(cls, vae: Any, text: TextEncoder | None, unet: Any, scheduler_config: dict[str, Any]) -> Self:
        """Put trained parts together; `scheduler_config` comes from `ldm.diffusion.schedule.scheduler_config`."""
        return cls(
            vae=vae,
            text_encoder=text.model if text else None,
            tokenizer=text.tokenizer if text else None,
            unet=unet,
            # stock pipelines require an offset of 1, which "trailing" timesteps don't use
            scheduler=DPMSolverMultistepScheduler.from_config({**scheduler_config, "steps_offset": 1}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    @classmethod
    def check_kind(cls, folder: Path, index: Mapping[str, Any]) -> None:
        if index.get("_class_name") == UPSCALER:
            raise ValueError(
                f"{folder}: it is an upscaler, which makes large pictures of small ones; run: ldm upscale {folder} "
                "PICTURE, or load it with LDMUpscalePipeline"
            )

    @property
    def stock_class(self) -> str:
        kind = "Inpaint" if self.inpaints else "InstructPix2Pix" if self.condition_channels else ""
        return f"StableDiffusion{kind}Pipeline"

    @property
    def extra_channels(self) -> int:
        """Input channels of the U-Net that follow those of x_t."""
        return int(self.unet.config.in_channels - self.unet.config.out_channels)

    @property
    def inpaints(self) -> bool:
        """Whether the model was trained to inpaint: a mask and the latents of the masked picture follow x_t."""
        return self.extra_channels == self.unet.config.out_channels + 1

    @property
    def condition_channels(self) -> int:
        """Channels of the latents of a second picture, which follow those of x_t; 0 if the model takes none."""
        return 0 if self.inpaints else self.extra_channels

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """As stock's, from a safetensors file that was checked: a file, a folder, a run, a Hub id or tensors.

        Warns (`OtherBaseWarning`) if the LoRA was trained on other weights than this model's.

        Raises:
            ValueError: if the file is no LoRA, the LoRA of a model of other shapes, or holds more than data.
            FileNotFoundError: if there is none.
            ModuleNotFoundError: if PEFT isn't installed.
        """
        require_peft()
        source = pretrained_model_name_or_path_or_dict
        options = only_safetensors(source, kwargs)
        if isinstance(source, dict):
            return super().load_lora_weights(source, adapter_name, **options)
        finding = {name: options.pop(name) for name in FINDING if name in options}
        file = read_lora(find_lora(source, options.pop("weight_name", None), **finding))
        warning = check_fits(file, self)
        if warning:
            warnings.warn(warning, OtherBaseWarning, stacklevel=2)
        with loading(file.path), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Already found a `peft_config`"
            )  # of a second adapter, which is no mistake
            super().load_lora_weights(str(file.path), adapter_name, **options)

    def fuse_lora(self, *arguments: Any, **kwargs: Any) -> None:
        """As stock's."""
        super().fuse_lora(*arguments, **kwargs)
        self._count_change()

    def unfuse_lora(self, *arguments: Any, **kwargs: Any) -> None:
        """As stock's."""
        super().unfuse_lora(*arguments, **kwargs)
        self._count_change()

    def _count_change(self) -> None:
        for network in (self.unet, self.text_encoder):
            if network is not None:
                count_change(network)

    def merge_adapters(self) -> Self:
        """Add the active LoRA adapters, as they count now, to the weights they stand beside, and remove all adapters.

        The pictures stay the same but for rounding, and the pipeline can be saved.
        """
        self.fuse_lora(adapter_names=self.get_active_adapters())
        self.unload_lora_weights()
        return self

    def load_textual_inversion(self, pretrained_model_name_or_path: Any, *arguments: Any, **kwargs: Any) -> None:
        """As stock's, with safetensors files alone."""
        super().load_textual_inversion(
            pretrained_model_name_or_path, *arguments, **only_safetensors(pretrained_model_name_or_path, kwargs)
        )


def only_safetensors(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a stock loader that reads safetensors alone.

    Args:
        source: folders, files, Hub ids or tensors, one or a list.
    Raises:
        ValueError: for a file of another format.
    """
    if options.setdefault("use_safetensors", True) is not True:
        raise ValueError("use_safetensors: expected True; other weights are pickles, which can run any code")
    named = [options.get("weight_name"), *(source if isinstance(source, list | tuple) else [source])]
    for name in named:
        if isinstance(name, str | PathLike):
            path = Path(name)
            if path.suffix != ".safetensors" and (path.is_file() or name is options.get("weight_name")):
                raise ValueError(f"{name}: expected a .safetensors file; other weights are pickles, which can run code")
    return options


def check_options(options: dict[str, Any]) -> None:
    """Refuse arguments of from_pretrained that run code of a folder's; set `use_safetensors`, in place.

    Raises:
        ValueError: names the argument.
    """
    if options.setdefault("use_safetensors", True) is not True:
        raise ValueError("use_safetensors: expected True; other weights are pickles, which can run any code")
    for name in CODE:
        if options.pop(name, None):
            raise ValueError(f"{name}: a pipeline holds data alone, and no code of its own is run")
    for name in PLACES:
        if options.pop(name, None) is not None:
            raise ValueError(f"{name}: networks are loaded whole, as they are; then move them with pipe.to(device)")


def read_prompts(file: Path) -> tuple[str, ...]:
    """The prompts in a file, one a line; none if there is no such file."""
    try:
        text = file.read_text("utf-8") if file.exists() else ""
    except UnicodeDecodeError:
        raise ValueError(f"{file}: is not UTF-8") from None
    return tuple(line for line in text.split("\n") if line.strip())  # not splitlines: U+2028 is part of a prompt


def find_pipeline(name: str | PathLike[str], **options: Any) -> Path:
    """A pipeline's folder as it is; a Hub id => the folder of its snapshot, with safetensors weights alone.

    Args:
        options: from_pretrained's arguments, of which revision, variant, token, cache_dir, force_download and
            local_files_only choose the snapshot.
    Raises:
        FileNotFoundError: if a name that looks like a folder isn't a pipeline's.
        ValueError: if a downloaded model_index.json names classes that no pipeline here is made of; then nothing else
            is downloaded.
        OSError: if there is no such Hub id.
    """
    folder = Path(name).expanduser()
    if (folder / "model_index.json").exists():
        return folder
    if len(folder.parts) != 2 or folder.is_absolute() or folder.parent.exists():
        hint = f"; did you mean {folder / 'pipeline'}?" if (folder / "pipeline/model_index.json").exists() else ""
        if any((folder / place).exists() for place in (WEIGHTS, f"lora/{WEIGHTS}")):
            hint = "; it holds a LoRA, which goes with its base: ldm sample BASE --lora FOLDER, or load_lora_weights"
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: there is no such folder; expected a pipeline's, such as RUN/pipeline")
        raise FileNotFoundError(f"{folder} is not a pipeline folder: it has no model_index.json{hint}")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    choice = {"revision", "token", "cache_dir", "force_download", "local_files_only"}
    chosen: dict[str, Any] = {key: options[key] for key in choice & options.keys()}
    places = {key: options[key] for key in ("revision", "cache_dir") if options.get(key) is not None}
    known = try_to_load_from_cache(str(name), "model_index.json", **places)
    if not isinstance(known, str) and os.environ.get("RANK", "0") == "0":
        print(f"{name} is no folder here; taking it from the Hub", file=sys.stderr)
    try:
        index = hf_hub_download(str(name), "model_index.json", **chosen)
    except OSError as error:  # its words are of caches and environment variables
        raise FileNotFoundError(
            f"{name}: there is no such folder, and none of this name comes from the Hub ({type(error).__name__})"
        ) from error
    check_index(Path(index))
    if "variant" in options:
        chosen["variant"] = options["variant"]
    return Path(StableDiffusionPipeline.download(str(name), use_safetensors=True, **chosen))


def forget_calls(tokenizer: Any) -> None:
    """Clear how a tokenizer's last call padded and cut, which it would save."""
    if tokenizer is not None and tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
