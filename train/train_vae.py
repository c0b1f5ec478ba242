"""Train an autoencoder on a folder of pictures and leave it, normalized, in RUN/vae.

    accelerate launch train/train_vae.py --config configs/demo.yaml
    accelerate launch train/train_vae.py --config configs/demo.yaml data.source=my_pictures run=runs/mine

train/train_ldm.py takes the same config and trains on this VAE's latents. Stopped, it goes on from its
newest checkpoint when the same command is given again; a finished run trains no further.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ldm.cli.config import start
from ldm.training.config import Config


def main(config: Config) -> list[float]:
    """Train and save the VAE; returns the loss of each step that this call trained."""
    import torch

    from ldm.data.dataset import read_captioned
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
    pictures = read_captioned(data.source, **data.reading(), progress=accelerator.is_main_process)
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


if __name__ == "__main__":
    start(main, __doc__)
