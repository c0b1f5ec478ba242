"""Pictures to change => where the loop starts, and what it leaves as it is.

    image-to-image   x_t = the picture's latents, noised to the t that `strength` names; the loop goes on from there
                     (SDEdit, Meng et al. 2022)
    inpainting       beside that, after each step the part to keep is put back, noised to t - 1 (as in RePaint, Lugmayr
                     et al. 2022, without its resampling); in the result its pixels are the picture's own
    outpainting      inpainting of a larger canvas, whose new part continues the picture's edge pixels

No network is trained for any of this. One that was trained to inpaint sees the mask and the latents of the masked
picture at every step, and nothing is put back (Rombach et al. 2022, section 4.5). Order of operations and of random
numbers are those of stock diffusers' StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline, for latents of
any number of channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ldm.data.images import BadPictureError, to_rgb
from ldm.models.vae import downsampling, has_posterior, sample_posterior
from ldm.pipelines.inputs import check_number

#: Of a call that names none, as in stock: some of the picture is to be seen; all that is masked is to be new.
STRENGTH, MASKED_STRENGTH = 0.8, 1.0
#: (x after step i, i) => the same with the part to keep put back.
PutBack = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Edit:
    """Pictures to change.

    Attributes:
        source: pixels [N,3,H,W] in [-1,1], or latents [N,C,h,w].
        mask: bool [1,1,H,W] or [N,1,H,W], True where pixels are to be new; None is everywhere.
        strength: how much noise is added, from 0 (excluded) to 1.
        height, width: of the result, in pixels.
    """

    source: Tensor
    mask: Tensor | None
    strength: float
    height: int
    width: int

    @property
    def is_latent(self) -> bool:
        """Whether the source is latents already."""
        return self.source.shape[1] != 3

    def latents(self, vae: Any, generators: Sequence[torch.Generator | None], device: torch.device) -> Tensor:
        """The source as scaled latents [B,C,h,w], a sample for each of B generators."""
        if self.is_latent:
            return self.source.to(device).repeat_interleave(len(generators) // len(self.source), 0)
        return sample_posterior(vae, self.source, generators, device)

    def timesteps(self, scheduler: Any, timesteps: Tensor, count: int) -> tuple[Tensor, int]:
        """The last of a scheduler's timesteps, `strength` of them, and the number of sampling steps; as stock's."""
        begin = (count - min(int(count * self.strength), count)) * scheduler.order
        if begin >= len(timesteps):  # stock counts the timesteps that a call names, not the steps they make
            raise ValueError(f"strength: {self.strength} leaves none of the {len(timesteps)} timesteps; raise it")
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        return timesteps[begin:], count - begin // scheduler.order

    def channels(
        self, vae: Any, generators: Sequence[torch.Generator | None], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """What follows x_t of a network that was trained to inpaint: the mask, and the latents of what it leaves.

        Returns:
            [B,1+C,h,w], the latents a sample for each of B generators.
        """
        assert self.mask is not None
        left = self.source * (~self.mask).to(self.source)
        latents = sample_posterior(vae, left, generators, device).to(dtype)
        mask = interpolate(self.mask.float(), size=latents.shape[-2:]).to(latents)  # nearest
        return torch.cat([mask.repeat_interleave(len(latents) // len(mask), 0), latents], dim=1)

    def start(
        self,
        x0: Tensor,
        noise: Tensor,
        scheduler: Any,
        timesteps: Tensor,
        vae: Any,
        generators: Sequence[torch.Generator | None],
        *,
        keep: bool,
    ) -> tuple[Tensor, PutBack | None]:
        """Latents and noise [B,C,h,w] => x_t to start from, and what puts the part to keep back after each step.

        Args:
            keep: whether anything is to be put back.
        """
        if self.mask is not None:
            x0 = x0.contiguous()  # as stock lays them out here: kernels round by layout
        if self.mask is None or not keep:
            return scheduler.add_noise(x0, noise, timesteps[:1].repeat(len(x0))), None
        if has_posterior(vae):  # stock also encodes the picture without its masked part; samplers' noise comes after
            for generator in generators:
                randn_tensor((1, *x0.shape[1:]), generator=generator, device=x0.device, dtype=vae.dtype)
        new = interpolate(self.mask.float(), size=x0.shape[-2:]).to(x0.device) > 0  # [1 or N,1,h,w], nearest
        new = new.repeat_interleave(len(x0) // len(new), 0)

        def put_back(x: Tensor, i: int) -> Tensor:
            last = i == len(timesteps) - 1
            kept = x0 if last else scheduler.add_noise(x0, noise, timesteps[i + 1].reshape(1))  # noised to t-1
            return torch.where(new, x, kept)

        if self.strength == 1:  # nothing of the picture is to be seen there
            return noise * scheduler.init_noise_sigma, put_back
        return scheduler.add_noise(x0, noise, timesteps[:1].repeat(len(x0))), put_back

    def composite(self, pixels: Tensor) -> Tensor:
        """Decoded pixels [B,3,H,W], with the picture's own where nothing was to be new."""
        if self.mask is None:
            return pixels
        copies = len(pixels) // len(self.source)
        source = self.source.to(pixels.device).repeat_interleave(copies, 0)
        mask = self.mask.to(pixels.device).repeat_interleave(len(pixels) // len(self.mask), 0)
        return torch.where(mask, pixels.float(), source)  # in float32, which holds 8-bit values exactly


# --- arguments => Edit -------------------------------------------------------------------------------


def check_edit(
    pipe: Any,
    image: Any,
    mask_image: Any,
    strength: float | None,
    expand: Sequence[int] | None,
    height: int | None,
    width: int | None,
    steps: int,
) -> Edit | None:
    """Check the arguments of a call that changes pictures; None if it generates new ones.

    Args:
        pipe: an LDMPipeline.
        image: a PIL picture, an array [H,W,3] or [B,H,W,3], a tensor [3,H,W] or [B,3,H,W] (uint8, or in [0,1]),
            latents [B,C,h,w], or a list.
        mask_image: a PIL picture, an array or tensor [H,W], or a list; white, 1 and True are new.
        strength, expand, height, width: the call's.
        steps: sampling steps of strength 1.
    Raises:
        ValueError: names the argument and what it allows.
    """
    if image is None and pipe.inpaints and mask_image is None and expand is None and strength is None:
        height, width = pipe.edge("height", height), pipe.edge("width", width)
        gray = torch.zeros(1, 3, height, width).contiguous(memory_format=torch.channels_last)  # as decoded pictures lie
        return Edit(gray, torch.ones(1, 1, height, width, dtype=torch.bool), 1.0, height, width)  # masked everywhere
    if image is None:
        for name, value in (("mask_image", mask_image), ("strength", strength), ("expand", expand)):
            if value is not None:
                raise ValueError(f"{name}: there is no picture to change; give it as image")
        return None
    if pipe.condition_channels not in (0, pipe.vae.config.latent_channels):
        raise ValueError(
            f"image: this model's U-Net takes {pipe.condition_channels} channels beside those of the latents, as those "
            "of upscalers do; use their stock pipelines"
        )
    if pipe.inpaints and mask_image is None and expand is None:
        raise ValueError("mask_image: this model fills in masked parts; give it the part of image that is to be new")
    if strength is None:
        strength = default_strength(mask_image, expand)
    check_number("num_inference_steps", steps, 1, pipe.scheduler.config.num_train_timesteps, Integral)
    check_number("strength", strength, 0, 1)
    if int(steps * strength) < 1:
        raise ValueError(
            f"strength: {strength:g} of {steps} steps is less than one step; expected {1 / steps:.3g} to 1"
        )
    factor = downsampling(pipe.vae)
    keeps = mask_image is not None or expand is not None
    source = _source(pipe, image, height, width, factor, keeps)
    is_latent = source.shape[1] != 3
    if keeps and is_latent:
        raise ValueError("image: expected pixels, not latents, with mask_image or expand")
    mask = None if mask_image is None else _mask(mask_image, image, source, factor)
    if expand is not None:
        source, mask = _expanded(source, mask, expand, factor)
    height, width = (edge * (factor if is_latent else 1) for edge in source.shape[-2:])
    pipe.check_edges("image", height, width)
    return Edit(source, mask, float(strength), height, width)


def default_strength(mask_image: Any, expand: Any) -> float:
    """Of a call that names none: stock's, of image-to-image or of inpainting."""
    return STRENGTH if mask_image is None and expand is None else MASKED_STRENGTH


def _source(pipe: Any, image: Any, height: int | None, width: int | None, factor: int, keeps: bool) -> Tensor:
    """Pictures => pixels [N,3,H,W] in [-1,1] of the size of the result, resized as stock does; latents as they are.

    Where a part is to be kept as it is, a picture is resized only if the call says so.
    """
    listed = list(image) if isinstance(image, list | tuple) else [image]
    if not listed:
        raise ValueError("image: expected at least one picture, got an empty list")
    latent_channels = pipe.vae.config.latent_channels
    if all(isinstance(one, Tensor) and one.ndim == 4 and one.shape[1] == latent_channels != 3 for one in listed):
        return torch.cat(listed).float()
    pictures = [picture for one in listed for picture in pictures_of(one)]
    sizes = {_size(picture) for picture in pictures}
    if len(sizes) > 1 and (height is None or width is None):
        found = " and ".join(f"{w} x {h}" for w, h in sorted(sizes)[:2])
        raise ValueError(f"image: expected pictures of one size, got {found}; give height and width to resize them")
    if min(_size(pictures[0])) < factor:
        raise ValueError("image: expected at least {0} x {0} pixels, got {1} x {2}".format(factor, *_size(pictures[0])))
    if keeps and (height is None or width is None) and any(edge % factor for edge in _size(pictures[0])):
        found = "{} x {}".format(*_size(pictures[0]))
        raise ValueError(
            f"image: to keep a part as it is, its edges must be multiples of {factor}, got {found}; crop it, or give "
            "height and width to resize it"
        )
    if len({isinstance(picture, Image.Image) for picture in pictures}) > 1:
        raise ValueError("image: expected pictures of one kind, got 8-bit ones and floats")
    height = None if height is None else pipe.edge("height", height)
    width = None if width is None else pipe.edge("width", width)
    resized = [pipe.image_processor.preprocess(picture, height, width) for picture in pictures]
    return torch.cat(resized).float()


def pictures_of(image: Any) -> list[Any]:
    """A PIL picture, array or tensor, one or several pictures => RGB ones, or float tensors [1,3,H,W] in [0,1]."""
    if isinstance(image, Image.Image):
        try:
            return [to_rgb(image)]
        except BadPictureError as error:
            raise ValueError(f"image: {error}") from None
    if not isinstance(image, Tensor | np.ndarray):
        raise ValueError(f"image: expected a PIL picture, an array, a tensor or a list, got {type(image).__name__}")
    values = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    batch = values[None] if values.ndim == 3 else values
    if isinstance(image, np.ndarray) and batch.ndim == 4:
        batch = batch.permute(0, 3, 1, 2)  # [B,H,W,3] => [B,3,H,W]
    if batch.ndim != 4 or batch.shape[1] != 3 or not len(batch):
        shape = "[H,W,3] or [B,H,W,3]" if isinstance(image, np.ndarray) else "[3,H,W] or [B,3,H,W]"
        raise ValueError(f"image: expected {shape}, got {list(values.shape)}")
    if batch.dtype == torch.uint8:
        return [Image.fromarray(one.permute(1, 2, 0).cpu().numpy()) for one in batch]
    if not batch.is_floating_point() or not bool(((batch >= 0) & (batch <= 1)).all()):
        raise ValueError("image: expected uint8, or floats in [0, 1]")
    return list(batch.split(1))


def _size(picture: Any) -> tuple[int, int]:
    """Width and height."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[-1], picture.shape[-2])


def _mask(mask_image: Any, image: Any, source: Tensor, factor: int) -> Tensor:
    """Masks of the pictures' size => bool [1 or N,1,H,W] of the result's size, resized as stock does."""
    listed = list(mask_image) if isinstance(mask_image, list | tuple) else [mask_image]
    if len(listed) not in (1, len(source)):
        raise ValueError(f"mask_image: expected one for all or one per picture ({len(source)}), got {len(listed)}")
    first = image[0] if isinstance(image, list | tuple) else image
    size = _size(pictures_of(first)[0])
    masks = []
    for one in listed:
        gray = _gray(one)
        if gray.size != size:
            found = "{} x {}".format(*gray.size)
            raise ValueError("mask_image: expected the size of the picture, {} x {}, got {}".format(*size, found))
        resized = gray.resize((source.shape[-1], source.shape[-2]), Image.Resampling.LANCZOS)
        new = torch.from_numpy(np.asarray(resized) >= 128)
        if not bool(new[::factor, ::factor].any()):
            what = "it is thinner than a latent" if bool(new.any()) else "it is all black"
            raise ValueError(f"mask_image: {what}, so nothing would be new; paint what is to be new white")
        masks.append(new[None, None])
    return torch.cat(masks)


def _gray(mask: Any) -> Image.Image:
    """A mask => mode L; what is transparent is black."""
    if isinstance(mask, Tensor | np.ndarray):
        values = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
        while values.ndim > 2 and values.shape[0] == 1:
            values = values[0]
        if values.ndim != 2 or values.size == 0:
            raise ValueError(f"mask_image: expected [H,W], got {list(mask.shape)}; a list has one for each image")
        if values.dtype != np.uint8:
            values = ((values >= 0.5) * 255).astype(np.uint8)
        return Image.fromarray(values)
    if not isinstance(mask, Image.Image):
        raise ValueError(f"mask_image: expected a PIL picture, an array or a tensor, got {type(mask).__name__}")
    try:
        return to_rgb(mask, background="black").convert("L")
    except BadPictureError as error:
        raise ValueError(f"mask_image: {error}") from None


def _expanded(source: Tensor, mask: Tensor | None, expand: Any, factor: int) -> tuple[Tensor, Tensor]:
    """A larger canvas: pixels that continue those at the edges, and a mask that is new there."""
    sides = list(expand) if isinstance(expand, list | tuple) else []
    if len(sides) != 4 or not all(isinstance(side, int | np.integer) and side >= 0 for side in sides) or not any(sides):
        raise ValueError(f"expand: expected pixels to add (left, top, right, bottom), got {expand!r}")
    for side in sides:
        if side % factor:
            less, more = side // factor * factor, -(-side // factor) * factor
            raise ValueError(f"expand: expected multiples of {factor}, got {side}; {less} or {more} fits")
    left, top, right, bottom = (int(side) for side in sides)
    around = (left, right, top, bottom)
    if mask is None:
        mask = torch.zeros(1, 1, *source.shape[-2:], dtype=torch.bool)
    return pad(source, around, mode="replicate"), pad(mask, around, value=True)
