"""What a drawing needn't compute twice, or at all.

A guided picture of 20 steps asks a stock U-Net 40 times: at every step with the condition and without it. Of that,

- keys and values of the text are the same at every step: `text_kept` computes them once (the answer is the same to
  the last bit);
- outside an interval of noise levels guidance does nothing or harm (Kynkäänniemi et al. 2024): `GuidanceInterval`
  doesn't ask without the condition there;
- the null context is the same in every call: `NullContext` keeps it;
- the VAE decodes all pictures at once, unless they don't fit: `decoded_in_slices`.

Everything here acts on stock networks from outside, while a picture is drawn, and leaves them as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from diffusers.models.attention_processor import Attention
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

#: Tensors as large as a picture at the VAE's widest full-resolution layer that are alive at once while it decodes.
DECODING_TENSORS = 5
#: Share of the free memory that decoding may take.
MEMORY_SHARE = 0.5


class Kept(nn.Module):
    """A layer that is asked the same tensor again and again, and computes the answer once."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.asked: tuple[Tensor, int] | None = None
        self.answer: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """layer(x); a tensor is the same if it is the same object, unchanged."""
        if self.answer is None or self.asked is None or self.asked[0] is not x or self.asked[1] != version(x):
            self.answer, self.asked = self.layer(x), (x, version(x))
        return self.answer


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; tensors of inference mode don't count, and can hardly be changed."""
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def text_kept(unet: nn.Module) -> Iterator[None]:
    """Inside, keys and values of a context are computed at its first use; another context takes its place.

    For inference. A compiled network is left alone: it would be compiled anew.
    """
    cross = [] if is_compiled_module(unet) else [part for part in unet.modules() if is_cross_attention(part)]
    layers = [(part, name, getattr(part, name)) for part in cross for name in ("to_k", "to_v")]
    try:
        for part, name, layer in layers:
            setattr(part, name, Kept(layer))
        yield
    finally:
        for part, name, layer in layers:
            setattr(part, name, layer)


def is_cross_attention(part: nn.Module) -> bool:
    """Whether a layer attends to the context."""
    return isinstance(part, Attention) and bool(part.is_cross_attention) and part.to_k is not None


class GuidanceInterval:
    """Guides inside an interval of t/T, and draws with the conditional model outside of it, for one call of a pipeline.

    A stock pipeline hands the U-Net every x_t twice, first with the negative prompt, then with the prompt, and
    takes a + scale (b - a) of its answers. Outside the interval `before` hands on the second half alone and `after`
    gives the answer for both, so the pipeline gets a = b, for which its formula says b: what
    `ldm.diffusion.guidance.interval_scale` means by scale 1. Of the hooks of `steering.steered` it must be the
    last before the call and the first after it.

    Args:
        pictures: N; a batch of 2N is a guided one.
        T: timesteps that the model was trained on.
        interval: fractions of T, low <= t / T < high.
    """

    def __init__(self, pictures: int, T: int, interval: tuple[float, float]) -> None:
        self.pictures = pictures
        self.T = T
        self.low, self.high = interval
        self.context: tuple[Tensor, Tensor] | None = None  # of both halves, and of the second

    def before(self, sample: Tensor, timestep: Tensor, keywords: dict[str, Any]) -> Tensor:
        """x_t [2N,C,h,w] and what it is drawn with => the second half of all that, outside the interval."""
        if len(sample) != 2 * self.pictures or self.low <= float(timestep[0]) / self.T < self.high:
            return sample
        context = keywords.pop("encoder_hidden_states")
        if self.context is None or self.context[0] is not context:  # one half, so that keys and values are kept
            self.context = context, context[self.pictures :]
        keywords |= {name: self.second_half(value) for name, value in keywords.items()}
        keywords["encoder_hidden_states"] = self.context[1]
        return sample[self.pictures :]

    def after(self, sample: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """The U-Net's answer, for both halves."""
        return torch.cat([output, output]) if len(output) < len(sample) else output

    def second_half(self, value: Any) -> Any:
        """Of a tensor of the guided batch, or of those in a list or dict; anything else as it is."""
        if isinstance(value, Tensor) and value.ndim and len(value) == 2 * self.pictures:
            return value[self.pictures :]
        if isinstance(value, list | tuple):
            return type(value)(self.second_half(each) for each in value)
        if isinstance(value, dict):
            return {name: self.second_half(each) for name, each in value.items()}
        return value


class NullContext:
    """The context of the empty caption, encoded when it is first needed, and anew when the encoder has changed."""

    def __init__(self) -> None:
        self.key: Any = None
        self.context: Tensor | None = None

    def of(self, encoder: nn.Module, tokenizer: Any, captions: int, encode: Callable[[], Tensor]) -> Tensor:
        """The null context [captions,L,D].

        Args:
            encoder, tokenizer: which ones, with what weights, tells whether what is kept is still right.
            captions: it is kept for the last number of them only, since kernels round differently for another one.
            encode: computes it.
        """
        weights = tuple((id(p), p.data_ptr(), version(p), p.dtype) for p in encoder.parameters())
        key = (weights, encoder.training, id(tokenizer), tokenizer.model_max_length, captions)
        if self.context is None or key != self.key:
            self.key, self.context = key, encode()
        return self.context


@contextmanager
def decoded_in_slices(vae: Any, pictures: int, height: int, width: int) -> Iterator[None]:
    """Inside, the VAE decodes one picture after the other if the memory that is free might not do for all at once."""
    slicing = getattr(vae, "use_slicing", None)  # None for a VAE that can't
    short = decoding_bytes(vae, pictures, height, width) > MEMORY_SHARE * free_bytes(vae.device)
    if slicing is not False or not short:
        yield
        return
    vae.use_slicing = True
    try:
        yield
    finally:
        vae.use_slicing = False


def decoding_bytes(vae: Any, pictures: int, height: int, width: int) -> int:
    """What decoding so many pictures at once takes, roughly: a few tensors of the widest full-resolution layer."""
    widths = vae.config.block_out_channels
    widest = widths[min(1, len(widths) - 1)]  # the last upsampling leaves the channels of the level below
    element = torch.finfo(vae.dtype).bits // 8
    return int(pictures * height * width * widest * element * DECODING_TENSORS)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; Apple's GPU shares the CPU's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
