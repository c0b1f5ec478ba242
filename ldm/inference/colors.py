"""The colors of a small picture for the large one that was made of it.

A network of few training steps hits shapes before hues: red comes out as orange. What the large picture lacks of the
small one's color is known at the small size; it is smoothed, enlarged and added. Its luma stays as it was made, since
there a correction would put soft shadows around sharp lines. (Color correction after upscaling: Wang et al. 2023,
"Exploiting diffusion prior for real-world image super-resolution", section 3.4, there by wavelets and with luma.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, pad

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
SIGMA = 1.0  # of the smoothing, in pixels of the small picture


def with_colors_of(small: Tensor, large: Tensor) -> Tensor:
    """The large pictures with the chroma of the small ones.

    Args:
        small: [B,3,h,w] in [-1,1].
        large: [B,3,k h,k w] in [-1,1].
    """
    height, width = small.shape[-2:]
    lacking = small - adaptive_avg_pool2d(large, (height, width))
    luma = torch.tensor(LUMA).to(lacking)[:, None, None]
    chroma = lacking - (lacking * luma).sum(1, keepdim=True)
    change = interpolate(smoothed(chroma), large.shape[-2:], mode="bicubic", align_corners=False)
    return (large + change).clamp(-1, 1)


def smoothed(pictures: Tensor) -> Tensor:
    """Pictures [B,3,h,w] after a Gaussian of `SIGMA`; edges continue."""
    radius = round(3 * SIGMA)
    places = torch.arange(-radius, radius + 1).to(pictures)
    weights = (-0.5 * (places / SIGMA).square()).exp()
    line = (weights / weights.sum()).expand(3, 1, 1, -1)
    wide = pad(pictures, (radius,) * 4, mode="replicate")
    return conv2d(conv2d(wide, line, groups=3), line.transpose(2, 3), groups=3)
