"""A slow average of the U-Net's weights, which is what draws.

The average is diffusers' EMAModel; here is only how it is lent to the network and taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def build_ema(unet: nn.Module, decay: float) -> EMAModel:
    """An exponential moving average of the U-Net's weights that starts at its present ones.

    Its decay grows as (1 + step) / (10 + step) up to `decay`, so that a short run is not mostly its own beginning.
    """
    from diffusers.training_utils import EMAModel

    # one call for all weights, which torch has for tensors but not for the sharded ones of FSDP
    foreach = not any(isinstance(weight, DTensor) for weight in unet.parameters())
    return EMAModel(unet.parameters(), decay=decay, foreach=foreach)


@contextmanager
def averaged(unet: nn.Module, ema: EMAModel) -> Iterator[None]:
    """Inside, the U-Net holds the averaged weights; afterwards, its own again."""
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    try:
        yield
    finally:
        ema.restore(unet.parameters())
