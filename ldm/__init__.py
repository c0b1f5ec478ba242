"""ldm: a folder of captioned pictures in, a text-to-image model out.

Importing this costs nothing; `LDMPipeline` and what it needs (torch, diffusers, transformers) load on first use, and
importing.py sees to it that they load quickly.

diffusion/    the mathematics, on plain tensors
data/         pictures and captions in, tensors out
models/       the networks
training/     the loop and what keeps it safe
evaluation/   how good the model is
drawing
  pipeline.py   prompts in, pictures out
  opening.py    a pipeline's name => its folder
  defaults.py   how it is drawn from when nobody says
  devices.py    where, and in which numbers
  arguments.py  what people hand to it; knowledge.py: against what the model knows
  drawing.py    what needn't be computed twice, or at all
  steering.py   what the U-Net is given and answers, changed from outside
  engine.py     OpenVINO instead of torch (converted.py: networks in its format)
  saved.py      a saved pipeline is a function of the model (manifest.py: what a folder must hold)
  recipe.py     how a picture was drawn, inside the picture
  grid.py       pictures side by side
sharing
  hub.py        the folder that goes to the Hub (hub_card.py: its card; hub_figures.py: figures; places.py: no paths)
cli.py        the command line (cli_sample.py, cli_evaluate.py, cli_export.py, cli_push.py); version.py
"""

from typing import TYPE_CHECKING, Any

from ldm.importing import import_networks
from ldm.version import __version__

if TYPE_CHECKING:
    from ldm.pipeline import LDMPipeline

__all__ = ["LDMPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LDMPipeline":
        import_networks()
        from ldm.pipeline import LDMPipeline

        return LDMPipeline
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
