"""ldm: a folder of captioned pictures in, a text-to-image model out.

Importing this costs nothing; `LDMPipeline` and what it needs (torch, diffusers, transformers) load on first use.
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
