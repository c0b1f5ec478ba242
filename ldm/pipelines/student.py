"""A pipeline with a student behind it: a LoRA of few steps in the folder `few_steps/`, which stock diffusers ignores.

    pipe("red heart")                                             the student, at the steps of few_steps/defaults.json
    pipe("red heart", num_inference_steps=20, guidance_scale=3)   the model itself, as in stock diffusers
    pipe.student("red heart", num_inference_steps=4)              the student at other steps

The student is a pipeline of its own: the model's networks, but for a U-Net in which the LoRA is merged, and the stock
sampler that it was trained for, DDIM or LCM. It is made when it is first used, without PEFT. Stock diffusers makes the
same U-Net with `load_lora_weights` and `fuse_lora`.
"""

from __future__ import annotations

import copy
import inspect
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

from ldm.inference import samplers
from ldm.inference.defaults import FILE as DEFAULTS_FILE
from ldm.inference.defaults import Defaults, check_sampler
from ldm.inference.openvino import OpenVINO
from ldm.models.fingerprint import weights_state
from ldm.models.lora import FACTS, STUDENT_FOLDER, WEIGHTS, active_adapters
from ldm.models.lora_files import OtherBaseWarning, check_fits, check_shapes, merge_lora, read_lora
from ldm.pipelines.cascade import CascadedPipeline

#: What a call may name that the student answers: what is to be seen, and in which form. All else is the model's.
PLAIN = frozenset(
    ("prompt", "prompt_embeds", "class_label", "numbers", "condition", "height", "width", "num_images_per_prompt",
     "seed", "generator", "latents", "upscale", "output_type", "return_dict", "clip_skip", "callback_on_step_end",
     "callback_on_step_end_tensor_inputs")
)  # fmt: skip


@dataclass(frozen=True)
class StudentDefaults(Defaults):
    """A student's settings. Those that a call leaves out are the student's too: stock's guidance scale, 7.5, is that of
    models that were not distilled.
    """

    def resolve(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: Sequence[float] | None = None,
    ) -> Defaults:
        return super().resolve(
            self.num_inference_steps if num_inference_steps is None else num_inference_steps,
            self.guidance_scale if guidance_scale is None else guidance_scale,
            self.guidance_interval if guidance_interval is None else guidance_interval,
        )


class TaughtPipeline(CascadedPipeline):
    """A pipeline that may have a student.

    Attributes:
        engine: what computes U-Net and VAE decoder; None is torch.
    """

    engine: OpenVINO | None = None
    _student: tuple[Any, Self] | None = None  # the weights that it was made of, and the student
    _student_from: tuple[Path, StudentDefaults] | None = None  # the folder of its LoRA, and its settings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Self:
        """As `CascadedPipeline.from_pretrained`, with the student; MODEL/few_steps is the student itself."""
        given = Path(pretrained_model_name_or_path)
        if given.name == STUDENT_FOLDER and (given.parent / "model_index.json").exists():
            if not (given / WEIGHTS).exists():
                raise FileNotFoundError(
                    f"{given}: the model has no student; put one behind it with `ldm export MODEL FOLDER --few-steps "
                    "RUN/lora`"
                )
            return cls.from_pretrained(given.parent, **kwargs).student
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        assert pipeline._origin is not None
        found = pipeline._origin.find(STUDENT_FOLDER, WEIGHTS)
        if found is not None:
            pipeline.teach(found)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """As `SavedPipeline.from_pipe`; the student comes along."""
        made = super().from_pipe(pipeline, **kwargs)
        made._student_from = getattr(pipeline, "_student_from", None)
        return made

    def teach(self, folder: str | PathLike[str], steps: int | None = None) -> None:
        """Put a student behind the pipeline.

        Args:
            folder: of a LoRA that was trained with `diffusion.few_steps`; a pipeline's own has its defaults.json.
            steps: of a call that names none; by default those in the folder, or that it was trained for.
        Raises:
            ValueError: if it is no LoRA of few steps, or one of another model.
        """
        file = read_lora(Path(folder) / WEIGHTS)
        trained = file.facts.get("few_steps")
        if not isinstance(trained, int) or not trained > 0:
            raise ValueError(
                f"{file.path}: expected a LoRA of few steps, trained with `ldm train ldm --config few_steps "
                "lora.rank=16`"
            )
        check_shapes(file, self)
        known = steps is None and (Path(folder) / DEFAULTS_FILE).exists()
        kept = StudentDefaults.load(Path(folder)) if known else None
        defaults = kept or StudentDefaults(trained if steps is None else steps, 1.0)
        self._student, self._student_from = None, (Path(folder), defaults)

    def dismiss_student(self) -> None:
        """Take the student away."""
        self._student = self._student_from = None

    @property
    def has_student(self) -> bool:
        """Whether there is a student."""
        return self._student_from is not None

    @property
    def student(self) -> Self:
        """The student, on the pipeline's device, with its engine.

        Raises:
            ValueError: if there is none, or adapters stand beside the model's weights.
        """
        if self._student_from is None:
            raise ValueError(f"student: the pipeline has none; expected one in its folder {STUDENT_FOLDER}/")
        if active_adapters(self):
            raise ValueError("student: adapters stand beside the model's weights; merge them, or unload_lora_weights()")
        state = weights_state(self.unet)
        if self._student is None or self._student[0] != state:
            self._student = state, self._make_student(*self._student_from)
        student = self._student[1]
        student.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        if self.engine is None:
            student.engine = None
        elif student.engine is None:
            engine = OpenVINO()
            engine.prepare(student)
            student.engine = engine
        return student.to(self._execution_device)

    def maker_of(self, arguments: Mapping[str, Any]) -> Self:
        """The pipeline that answers a call with these arguments: the student, if they are among `PLAIN`; or this."""
        if not self.has_student or active_adapters(self):
            return self
        usual = {name: one.default for name, one in inspect.signature(type(self).__call__).parameters.items()}
        named = (name for name, value in arguments.items() if not _is(value, usual.get(name)))
        return self.student if PLAIN.issuperset(named) else self

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """As `CascadedPipeline.save_pretrained`, with the student in its folder."""
        super().save_pretrained(save_directory, **kwargs)
        if self._student_from is not None:
            source, defaults = self._student_from
            folder = Path(save_directory) / STUDENT_FOLDER
            folder.mkdir(exist_ok=True)
            for name in (WEIGHTS, FACTS):
                if (source / name).exists() and source.resolve() != folder.resolve():
                    shutil.copyfile(source / name, folder / name)
            defaults.save(folder)

    def _make_student(self, folder: Path, defaults: StudentDefaults) -> Self:
        file = read_lora(folder / WEIGHTS)
        if warning := check_fits(file, self):
            warnings.warn(warning, OtherBaseWarning, stacklevel=3)
        unet = copy.deepcopy(self.unet)
        merge_lora(unet, file)
        sampler = file.facts.get("sampler", "ddim")
        check_sampler(f"{file.path}: sampler", sampler)
        parts = {**self.components, "unet": unet, "scheduler": samplers.build(sampler, self.scheduler.config)}
        student = type(self)(**parts, requires_safety_checker=self.config.requires_safety_checker)
        for name in ("example_prompts", "labels", "numbers", "loaded_from", "_upscaler", "_origin"):
            setattr(student, name, getattr(self, name))
        student.defaults = defaults
        return student


def _is(value: Any, usual: Any) -> bool:
    """Whether an argument is None, or what it is by default."""
    return value is None or value is usual or (isinstance(value, bool | int | float | str) and value == usual)
