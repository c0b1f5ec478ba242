"""ldm: a folder of captioned pictures in, a family of image models out.

Importing this costs nothing: both pipelines and what they need (torch, diffusers, transformers) load on first use.
Imports go down this list only (pyproject.toml has the contract):

cli/         the command line, a file for each command
app/         the page
training/    the training loop, its tasks, and what keeps it safe
pipelines/   LDMPipeline: prompts in, pictures out
sharing/     what leaves this machine: models with cards, pictures with their settings
evaluation/  metrics and the report
inference/   latents in, latents out: the denoising loop
models/      stock diffusers and transformers networks: built, loaded, adapted
data/        pictures and captions in, tensors out
diffusion/   the mathematics, on plain tensors
system/      files, memory, devices
version.py   the version
"""

from typing import TYPE_CHECKING, Any

from ldm.pipelines import import_networks
from ldm.version import __version__

if TYPE_CHECKING:
    from ldm.pipelines.text_to_image import LDMPipeline
    from ldm.pipelines.upscale import LDMUpscalePipeline

__all__ = ["LDMPipeline", "LDMUpscalePipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("LDMPipeline", "LDMUpscalePipeline"):
        import_networks()
        from ldm.pipelines import text_to_image, upscale

        return text_to_image.LDMPipeline if name == "LDMPipeline" else upscale.LDMUpscalePipeline
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
