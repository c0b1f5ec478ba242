"""A pipeline with an upscaler behind it: the folder `upscaler/` inside its own, which stock diffusers ignores.

    pipe("red heart", upscale=True)     small pictures as ever, then large ones
    pipe.upscale(images)                large pictures of small ones

The upscaler is loaded when it is first used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Self

from ldm.models.loading import HUB_FILES
from ldm.pipelines.conditions import ConditionedPipeline
from ldm.pipelines.upscale import LDMUpscalePipeline

UPSCALER_FOLDER = "upscaler"
HUB_OPTIONS = ("token", "cache_dir", "local_files_only")  # of from_pretrained, for what is downloaded later


@dataclass(frozen=True)
class Origin:
    """Where a pipeline was loaded from. Folders inside it that stock diffusers ignores are found from here.

    Attributes:
        name: a folder or a Hub id.
        folder: where it lies.
        variant: of the weights' files.
        hub: the `HUB_OPTIONS` of its download.
    """

    name: str
    folder: Path
    variant: str | None = None
    hub: dict[str, Any] = field(default_factory=dict)

    def find(self, inside: str, file: str) -> Path | None:
        """The folder `inside` the pipeline's, None without it. From the Hub it is downloaded, of the pipeline's commit.

        Raises:
            FileNotFoundError: if the folder is there without its `file`.
        """
        found = self.folder / inside
        if not found.exists() and not Path(self.name).expanduser().exists():
            from huggingface_hub import snapshot_download

            patterns = [f"{inside}/{pattern}" for pattern in HUB_FILES]
            snapshot_download(self.name, revision=self.folder.name, allow_patterns=patterns, **self.hub)
        if found.exists() and not (found / file).exists():
            raise FileNotFoundError(f"{found}: {file} is missing; copy it there again, or remove the folder")
        return found if found.exists() else None

    def find_upscaler(self) -> Path | None:
        """The upscaler's folder, None without one."""
        return self.find(UPSCALER_FOLDER, "model_index.json")


class CascadedPipeline(ConditionedPipeline):
    """A pipeline that may have an upscaler."""

    upscaler_folder = UPSCALER_FOLDER  # in its own
    _upscaler: LDMUpscalePipeline | None = None
    _origin: Origin | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Self:
        """As `SavedPipeline.from_pretrained`; an upscaler in its folder is found, and loaded when it is used."""
        variant, hub = kwargs.get("variant"), {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        assert pipeline.loaded_from is not None
        pipeline._origin = Origin(str(pretrained_model_name_or_path), pipeline.loaded_from, variant, hub)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """As `SavedPipeline.from_pipe`; the upscaler comes along."""
        made = super().from_pipe(pipeline, **kwargs)
        for name in ("_upscaler", "_origin"):
            setattr(made, name, getattr(pipeline, name, None))
        return made

    @property
    def upscaler(self) -> LDMUpscalePipeline:
        """The upscaler, on the pipeline's device and in its dtype.

        Raises:
            FileNotFoundError: if there is none.
        """
        if self._upscaler is None:
            origin = self._origin
            folder = origin.find_upscaler() if origin else None
            if origin is None or folder is None:
                raise no_upscaler(origin.name if origin else "this pipeline")
            chosen = {} if origin.variant is None else {"variant": origin.variant}
            self._upscaler = LDMUpscalePipeline.from_pretrained(folder, dtype=self.unet.dtype, **chosen)
        self._upscaler.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        return self._upscaler.to(self._execution_device)  # type: ignore[no-any-return]

    @upscaler.setter
    def upscaler(self, upscaler: LDMUpscalePipeline | None) -> None:
        if upscaler is not None and not isinstance(upscaler, LDMUpscalePipeline):
            raise ValueError(f"upscaler: expected an LDMUpscalePipeline, got {type(upscaler).__name__}")
        self._upscaler = upscaler
        if upscaler is None:
            self._origin = None

    @property
    def has_upscaler(self) -> bool:
        """Whether `upscaler` finds one."""
        return self._upscaler is not None or (self._origin is not None and self._origin.find_upscaler() is not None)

    def upscale(self, images: Any, prompt: Any = None, **settings: Any) -> Any:
        """Large pictures of small ones, as `LDMUpscalePipeline.upscale` makes them; `.images`.

        Raises:
            FileNotFoundError: if there is no upscaler.
            ValueError: names the argument and what it allows.
        """
        return self.upscaler.upscale(images, prompt, **settings)

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """As `Saved.save_pretrained`, with the upscaler in its folder."""
        super().save_pretrained(save_directory, **kwargs)
        if self.has_upscaler:
            self.upscaler.save_pretrained(Path(save_directory) / UPSCALER_FOLDER, **kwargs)


def no_upscaler(name: str) -> FileNotFoundError:
    """The error of a pipeline without one."""
    return FileNotFoundError(
        f"upscale: {name} has no folder {UPSCALER_FOLDER}/; train an upscaler with `ldm train ldm --config upscale`, "
        "then put it there with `ldm export MODEL FOLDER --upscaler RUN/pipeline`"
    )
