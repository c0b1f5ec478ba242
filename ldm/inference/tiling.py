"""A denoiser of tiles => a denoiser of whole pictures, for pictures larger than the network is to see at once.

    x_t => overlapping tiles => a prediction for each => their weighted mean, at every step

The tiles are fused in the prediction (MultiDiffusion, Bar-Tal et al. 2023, eq. 5, with weights that fall towards a
tile's edge), so the loop, its scheduler and its guidance see one picture, and no seam has to be hidden afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.conditioning import Conditioning, UNetDenoiser, together

#: Left upper corner of a tile, (top, left).
Corner = tuple[int, int]


def corners(height: int, width: int, tile: int, overlap: int) -> list[Corner]:
    """Where tiles of an edge of `tile` begin, so that they cover a picture and neighbors share `overlap` or more.

    An edge that is no longer than a tile has one. The last tile ends where the picture does.
    """

    def starts(edge: int) -> list[int]:
        last = max(0, edge - tile)
        return [*range(0, last, tile - overlap), last]

    return [(top, left) for top in starts(height) for left in starts(width)]


class TiledDenoiser:
    """What `UNetDenoiser` is, for x_t that is cut into tiles.

    Args:
        unet: the network, or what computes it.
        conditions: of B whole pictures; `channels` are cut as x_t is.
        tiles: where they begin, as `corners` has them.
        tile: edge of a tile.
        overlap: of neighbors; the weights rise over so many values.
        at_once: tiles that the network is given together, of all B pictures.
        stock: other arguments of the stock U-Net, for each call.
    """

    def __init__(
        self,
        unet: Any,
        conditions: Mapping[str, Conditioning],
        tiles: Sequence[Corner],
        tile: int,
        overlap: int,
        at_once: int = 1,
        **stock: Any,
    ) -> None:
        self.tile, self.overlap = tile, overlap
        self.parts = []
        for start in range(0, len(tiles), at_once):
            part = tiles[start : start + at_once]
            cut = {name: together([self._of(one, corner) for corner in part]) for name, one in conditions.items()}
            self.parts.append((part, UNetDenoiser(unet, cut, **stock)))

    def __call__(self, x_t: Tensor, t: Tensor, *names: str) -> tuple[Tensor, ...]:
        """x_t [B,C,H,W] at t, a scalar => a prediction [B,C,H,W] for each name."""
        sums, weights = [torch.zeros_like(x_t) for _ in names], x_t.new_zeros(x_t.shape[-2:])
        for part, denoiser in self.parts:
            tiles = torch.cat([self.cut(x_t, corner) for corner in part])  # (tiles * B, C, tile, tile)
            weight = self.weight(tiles)
            for total, prediction in zip(sums, denoiser(tiles, t, *names), strict=True):
                for corner, one in zip(part, prediction.chunk(len(part)), strict=True):
                    self.cut(total, corner).add_(weight * one)
            for corner in part:
                self.cut(weights, corner).add_(weight)
        return tuple(total / weights for total in sums)

    def cut(self, whole: Tensor, corner: Corner) -> Tensor:
        """A view of [...,H,W]: the tile that begins at this corner."""
        top, left = corner
        return whole[..., top : top + self.tile, left : left + self.tile]

    def weight(self, tiles: Tensor) -> Tensor:
        """How much each value of a tile counts [h,w]: rising from the edges over the overlap, then flat."""
        ramps = [
            torch.minimum(place + 1, edge - place).clamp(max=self.overlap + 1)
            for edge in tiles.shape[-2:]
            for place in [torch.arange(edge, device=tiles.device, dtype=tiles.dtype)]
        ]
        return ramps[0][:, None] * ramps[1]

    def _of(self, conditioning: Conditioning, corner: Corner) -> Conditioning:
        channels = conditioning.channels
        cut = None if channels is None else self.cut(channels, corner)
        return Conditioning(conditioning.context, conditioning.class_labels, cut)
