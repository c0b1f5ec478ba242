"""A slow average of the U-Net's weights, with which pictures are generated.

The average is diffusers' EMAModel, but for its step: that is one pass over the weights here. Beside it, how the average
is lent to the network and taken back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ldm.models.power_ema import decay, exponent, width_name


class Average(EMAModel):
    """An exponential moving average of weights that all learn."""

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """average <- average + (1 - decay) (weights - average), in place.

        EMAModel's own step takes three passes and holds a copy of the weights meanwhile (docs/experiments.md, 16); it
        is left to the sharded weights of FSDP, for which torch has no such call.
        """
        weights = list(parameters)
        if any(isinstance(weight, DTensor) for weight in weights):
            return super().step(weights)
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        get_ema_multi_avg_fn(self.cur_decay_value)(self.shadow_params, weights, None)


def build_ema(unet: nn.Module, decay: float) -> Average:
    """An average of the U-Net's weights that starts at its present ones.

    Its decay grows as (1 + step) / (10 + step) up to `decay`, so that a short run is not mostly its own beginning.
    """
    foreach = not is_sharded(unet)  # one call for all weights where torch has it
    return Average(learning(unet), decay=decay, foreach=foreach)


class PowerAverage(Average):
    """A power-function average: its decay follows from the step (`ldm.models.power_ema`)."""

    def __init__(self, parameters: Iterable[nn.Parameter], width: float, foreach: bool) -> None:
        super().__init__(parameters, foreach=foreach)
        self.gamma = exponent(width)

    def get_decay(self, optimization_step: int) -> float:
        return decay(optimization_step, self.gamma)


def build_power_averages(network: nn.Module, widths: Iterable[float]) -> dict[str, PowerAverage]:
    """An average of what learns of a network for each width, by the width's name."""
    foreach = not is_sharded(network)
    return {width_name(width): PowerAverage(learning(network), width, foreach) for width in widths}


def learning(network: nn.Module) -> list[nn.Parameter]:
    """The weights that learn, in their order: all of a network, or the adapters beside frozen ones."""
    return [weight for weight in network.parameters() if weight.requires_grad]


@contextmanager
def averaged(unet: nn.Module, ema: EMAModel) -> Iterator[None]:
    """Inside, the U-Net holds the averaged weights, and the average the U-Net's; afterwards, each its own again.

    They change places, so this costs no time and no memory. Sharded weights, whose memory is FSDP's, are copied.
    """
    if is_sharded(unet):
        ema.store(learning(unet))
        ema.copy_to(learning(unet))
        try:
            yield
        finally:
            ema.restore(learning(unet))
        return
    swap(unet, ema)
    try:
        yield
    finally:
        swap(unet, ema)


def swap(unet: nn.Module, ema: EMAModel) -> None:
    """Give each the other's weights."""
    for weight, average in zip(learning(unet), ema.shadow_params, strict=True):
        weight.data, average.data = average.data, weight.data


def is_sharded(unet: nn.Module) -> bool:
    """Whether FSDP holds the weights."""
    return any(isinstance(weight, DTensor) for weight in unet.parameters())
