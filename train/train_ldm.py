"""Train a text-to-image model on a folder of captioned pictures.

    accelerate launch train/train_ldm.py --config configs/demo.yaml
    accelerate launch train/train_ldm.py --config configs/demo.yaml data.source=my_pictures run=runs/mine optim.lr=3e-4

It needs a VAE: train/train_vae.py with the same config makes one, or vae=<folder or Hub id> names one.
Stopped, it goes on from its newest checkpoint when the same command is given again. RUN/pipeline can be
loaded at any time, by LDMPipeline and by stock diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.config import start
from ldm.training.config import Config

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from ldm.models.text_encoder import TextEncoder


def main(config: Config) -> list[float]:
    """Train, leaving RUN/pipeline; returns the loss of each step that this call trained."""
    import torch

    from ldm.data.conditioned import ConditionedPictures
    from ldm.data.dataset import read_captioned
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
    from ldm.training.doctor.findings import Finding
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
    pictures = read_captioned(data.source, **data.reading(), progress=accelerator.is_main_process)
    say(f"{data.source}: {count(len(pictures.train), 'picture')} to train on, {len(pictures.heldout)} held out")
    source = ConditionedPictures.read(
        pictures, data.label_column, data.condition_column, progress=accelerator.is_main_process
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


if __name__ == "__main__":
    start(main, __doc__)
