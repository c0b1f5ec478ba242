"""The three trainings by name: what `ldm train` and train/*.py run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.training.config import Config

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from ldm.models.text_encoder import TextEncoder
    from ldm.training.doctor.findings import Finding


def train_vae(config: Config) -> list[float]:
    """Train and save the VAE; returns the loss of each step that this call trained."""
    import torch

    from ldm.data.dataset import read_captioned, require_training
    from ldm.data.rows import count
    from ldm.models.vae import build_vae, latent_shape, load_vae
    from ldm.system.files import put_in_place, temporary_beside
    from ldm.training.distributed import build_accelerator
    from ldm.training.doctor.examine import before_first_step, before_vae
    from ldm.training.latents import RECONSTRUCTED, normalize_on, reconstructions, report_reconstruction
    from ldm.training.logging import Tracker
    from ldm.training.plain_loop import fit_plain
    from ldm.training.selfcheck import check_weights
    from ldm.training.tasks.autoencoder import PixelSamples, VAETraining

    accelerator = build_accelerator(config.loop)
    run, data, steps = Path(config.run), config.data, config.vae_training.steps

    # folder => pictures, all of them checked
    pictures = read_captioned(
        data.source, **data.reading(), facts=config.facts_folder(), progress=accelerator.is_main_process
    )
    require_training(pictures)
    accelerator.print(
        f"{data.source}: {count(len(pictures.train), 'picture')} to train on, {len(pictures.heldout)} held out"
    )

    # the autoencoder
    shape = latent_shape(build_vae(config.vae_model), data.size)
    samples = PixelSamples(pictures.train, data, config.seed, shape)
    look = partial(before_vae, config, accelerator, samples)
    before_first_step(config, accelerator, run / "vae_checkpoints", look)
    torch.manual_seed(config.seed)
    vae = build_vae(config.vae_model)
    accelerator.print(
        f"VAE: {sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M parameters, latents {list(shape)}, "
        f"{accelerator.mixed_precision} mixed precision on {accelerator.device.type}"
    )

    tracker = Tracker(run, silent=not accelerator.is_main_process)
    losses = fit_plain(VAETraining.prepare(config, accelerator, vae), samples, tracker, workers=data.workers)

    if accelerator.is_main_process:
        vae.eval().requires_grad_(False)
        normalize_on(vae, pictures.train, data.size)
        temporary = temporary_beside(run / "vae")
        vae.save_pretrained(temporary)
        check_weights("vae", vae.state_dict(), load_vae(temporary).state_dict())
        put_in_place(temporary, run / "vae")
        psnr, sentence = report_reconstruction(vae, pictures, data.size, RECONSTRUCTED)
        tracker.scalars(steps, {"vae/psnr": psnr})
        shown = pictures.heldout if len(pictures.heldout) else pictures.train
        tracker.picture("reconstructions", steps, reconstructions(vae, shown, data.size))
        accelerator.print(f"{sentence}; saved in {run / 'vae'}")
    tracker.close()
    accelerator.end_training()
    return losses


def train_ldm(config: Config) -> list[float]:
    """Train, leaving RUN/pipeline; returns the loss of each step that this call trained."""
    import torch

    from ldm.data.conditioned import ConditionedPictures
    from ldm.data.dataset import read_captioned, require_training
    from ldm.data.rows import count
    from ldm.diffusion.schedule import scheduler_config
    from ldm.models.unet import choose_attention, without_variance
    from ldm.models.vae import latent_shape
    from ldm.pipelines.inputs import check_prompts
    from ldm.pipelines.text_to_image import LDMPipeline
    from ldm.training.caching import build_cache
    from ldm.training.context import load_text, measure_text, report_captions
    from ldm.training.denoiser import denoiser
    from ldm.training.distributed import build_accelerator, encoding_dtype
    from ldm.training.doctor.examine import before_first_step, before_unet, repeated
    from ldm.training.encoders import Encoders
    from ldm.training.export import save_frozen
    from ldm.training.latents import check_scale, load_normalized, measure_pretrained, report_reconstruction
    from ldm.training.logging import Tracker
    from ldm.training.objective import build_schedule
    from ldm.training.previews import build_wishes
    from ldm.training.samples import build_samples, fixed_questions
    from ldm.training.trainer import Training, fit

    accelerator = build_accelerator(config.loop)
    run, data, diffusion = Path(config.run), config.data, config.diffusion
    say, device = accelerator.print, accelerator.device

    # captioned folder => pictures, captions, classes, all of them checked
    pictures = read_captioned(
        data.source, **data.reading(), facts=config.facts_folder(), progress=accelerator.is_main_process
    )
    require_training(pictures)
    say(f"{data.source}: {count(len(pictures.train), 'picture')} to train on, {len(pictures.heldout)} held out")
    source = ConditionedPictures.read(
        pictures,
        data.label_column,
        data.condition_column,
        facts=config.facts_folder(),
        progress=accelerator.is_main_process,
    )

    # the frozen encoders: pixels => latents, caption => context
    dtype = encoding_dtype(accelerator)
    measure_pretrained(config, pictures.train, device, dtype)
    measure_text(config, pictures.train, device, dtype)
    folder = config.cache_folder()
    encoders = Encoders(
        lambda: load_normalized(config, device),
        (lambda: load_text(config, device)) if config.text.encoder else None,
        dtype,
        together=folder is None,
    )
    text = encoders.text_outline  # its tokenizer and its sizes; weights come and go
    if text:
        say(report_captions(text, pictures))
        check_prompts("loop.prompts", config.loop.prompts or ("",), text.tokenizer)  # now, not hours later
    check_scale(encoders.vae, pictures.train, data.size)
    say(report_reconstruction(encoders.vae, pictures, data.size)[1])

    def look() -> Iterator[Finding]:
        if accelerator.is_main_process:
            yield from repeated(pictures)
        yield from before_unet(config, accelerator, source, encoders)

    before_first_step(config, accelerator, run / "checkpoints", look)

    # the process, and what makes the denoiser that reverses it
    schedule = build_schedule(diffusion)
    shape = latent_shape(encoders.vae_outline, data.size)
    new_unet = denoiser(config, source, text, shape)

    # what it learns from, what it is asked on the way, and what it draws
    questions = fixed_questions(config, source.heldout, encoders)
    wishes = build_wishes(config, source, text)
    cache = build_cache(config, folder, source.train.all_pictures, encoders, shape) if folder else None
    samples = build_samples(config, source.train, shape, cache)

    # what pipelines are made of; all but the U-Net is saved now
    def weightless_unet() -> UNet2DConditionModel:
        with torch.device("meta"):
            return new_unet().eval()

    def build_pipeline(vae: Any, text: TextEncoder | None) -> LDMPipeline:
        how_to_draw = scheduler_config(schedule, diffusion.prediction)
        pipeline = LDMPipeline.from_components(vae, text, weightless_unet(), how_to_draw)
        pipeline.example_prompts = tuple(wish.prompt for wish in wishes if wish.prompt)
        pipeline.labels = source.labels
        return pipeline

    def build_unet(weights: dict[str, torch.Tensor]) -> UNet2DConditionModel:
        averaged = weightless_unet()
        averaged.load_state_dict(without_variance(weights, shape[0]), assign=True)
        return averaged

    save_frozen(run, encoders, build_pipeline)

    # the denoiser that learns
    torch.manual_seed(config.seed)
    unet = new_unet(learned_variance=diffusion.variance == "learned")
    say(
        f"U-Net: {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters, latents {list(shape)}, "
        f"attention by {choose_attention(unet, device)}, {accelerator.mixed_precision} mixed precision on {device.type}"
    )

    tracker = Tracker(run, silent=not accelerator.is_main_process)
    training = Training.prepare(config, accelerator, schedule, unet)
    losses = fit(training, samples, questions, wishes, build_unet, tracker, encoders)
    words = (
        ' "a prompt"' if config.text.encoder else f" --class-label {source.labels.names[0]}" if source.labels else ""
    )
    say(f"done: {run / 'pipeline'} can be loaded; draw with: ldm sample {run / 'pipeline'}{words}")
    accelerator.end_training()
    return losses


def train_classifier(config: Config) -> list[float]:
    """Train and save the classifier; returns the loss of each step that this call trained."""
    import numpy as np
    import torch

    from ldm.data.dataset import read_captioned, require_training
    from ldm.data.labels import Labels
    from ldm.data.rows import count
    from ldm.models.classifier import build_classifier
    from ldm.models.vae import latent_shape
    from ldm.training.caching import build_cache
    from ldm.training.distributed import build_accelerator, encoding_dtype
    from ldm.training.doctor.examine import before_classifier, before_first_step
    from ldm.training.encoders import Encoders
    from ldm.training.latents import check_scale, load_normalized, measure_pretrained
    from ldm.training.logging import Tracker
    from ldm.training.objective import build_schedule
    from ldm.training.plain_loop import fit_plain
    from ldm.training.tasks.classifier import ClassifierTraining, LabelledSamples, labelled_questions

    data = config.data
    if data.label_column is None:
        raise ValueError("data.label_column: the classifier needs to know which column holds the classes; set it")
    accelerator = build_accelerator(config.loop)
    say, told = accelerator.print, accelerator.is_main_process

    # folder => pictures and labels, all of them checked
    pictures = read_captioned(data.source, **data.reading(), facts=config.facts_folder(), progress=told)
    require_training(pictures)
    labels = Labels.read(pictures, data.label_column)
    ids = labels.ids(pictures.train)
    say(f"{data.source}: {count(len(ids), 'picture')} to train on, {len(pictures.heldout)} held out")
    per_label = np.bincount(ids, minlength=len(labels.names))
    frequent, share = labels.names[per_label.argmax()], per_label.max() / len(ids)
    say(f"{labels.column}: {len(labels.names)} classes, the most frequent {frequent} with {share:.1%} of the pictures")

    # the frozen VAE, the process, and the classifier
    device, dtype = accelerator.device, encoding_dtype(accelerator)
    measure_pretrained(config, pictures.train, device, dtype)
    encoders = Encoders(lambda: load_normalized(config, device), None, dtype)
    vae = encoders.vae
    check_scale(vae, pictures.train, data.size)
    schedule = build_schedule(config.diffusion)
    shape = latent_shape(vae, data.size)
    build = partial(build_classifier, config.classifier, latent_shape=shape, names=labels.names, schedule=schedule)
    fresh = LabelledSamples(pictures.train, ids, data, config.seed, schedule.T, shape, None)
    look = partial(before_classifier, config, accelerator, fresh, build, vae)
    before_first_step(config, accelerator, Path(config.run) / "classifier_checkpoints", look)
    torch.manual_seed(config.seed)
    classifier = build()
    say(
        f"classifier: {sum(p.numel() for p in classifier.parameters()) / 1e6:.1f} M parameters, latents "
        f"{list(shape)}, {accelerator.mixed_precision} mixed precision on {accelerator.device.type}"
    )

    # what it learns from, and what it is asked on the way
    questions = labelled_questions(config, pictures.heldout, labels, vae)
    folder = config.cache_folder()
    cache = build_cache(config, folder, pictures.train, encoders, shape, "classifier") if folder else None
    samples = replace(fresh, cache=cache)

    tracker = Tracker(Path(config.run), silent=not told)
    training = ClassifierTraining.prepare(config, accelerator, classifier, vae)

    def save_and_ask(done: int) -> None:
        training.export()
        if questions is not None:
            answers = training.accuracy(questions)
            tracker.scalars(done, {f"classifier/heldout/{name}": value for name, value in answers.items()})
            shown = ", ".join(f"{name} {value:.3f}" for name, value in answers.items())
            say(f"step {done}: held-out accuracy {shown}")

    workers = data.workers if cache is None else 0
    losses = fit_plain(training, samples, tracker, workers=workers, at_checkpoint=save_and_ask)
    tracker.close()
    example = f"--classifier {Path(config.run) / 'classifier'} --class-label {labels.names[0]}"
    say(f"done: steer with: ldm sample MODEL PROMPT {example}")
    accelerator.end_training()
    return losses


TASKS: dict[str, Callable[[Config], list[float]]] = {"vae": train_vae, "ldm": train_ldm, "classifier": train_classifier}


def train(task: str, config: Config) -> list[float]:
    """Train "vae", "ldm" or "classifier" from its newest checkpoint, or from the start, to its last step.

    Returns:
        The loss of each step that this call trained.
    Raises:
        ValueError: for another name, or a config that can't be trained.
        Stopped: by a signal, with the step saved.
        RunError: if too many steps in a row were not finite, or what must be saved can't be.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    return TASKS[task](config)
