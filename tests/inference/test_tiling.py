"""Tiles: they cover the picture, and what they are fused to is what a network that sees little at once says of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.inference.tiling import TiledDenoiser, corners
from ldm.models.conditioning import Conditioning, UNetDenoiser


class Near(nn.Module):
    """A network whose output depends on a neighborhood of 3 x 3 of x_t and of the channels, on class and context."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(7, 4, 3, padding=1)
        self.seen: list[tuple[int, ...]] = []

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, class_labels: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        self.seen.append(tuple(x.shape))
        shift = class_labels[:, None, None, None] + encoder_hidden_states.mean((1, 2))[:, None, None, None] + t
        return (self.layer(x) + shift,)


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"), [(8, 8, 8, 2), (9, 20, 8, 2), (31, 8, 8, 4), (5, 17, 8, 0)]
)
def test_tiles_cover_the_picture_and_overlap(height: int, width: int, tile: int, overlap: int) -> None:
    count = torch.zeros(height, width)
    for top, left in corners(height, width, tile, overlap):
        assert top + tile <= max(height, tile) and left + tile <= max(width, tile)
        count[top : top + tile, left : left + tile] += 1
    assert bool((count > 0).all())
    tops = sorted({top for top, _ in corners(height, width, tile, overlap)})
    assert all(after - before <= tile - overlap for before, after in zip(tops, tops[1:], strict=False))


@torch.no_grad()
def test_fused_predictions_are_the_whole_picture_s_but_near_the_edges_of_tiles() -> None:
    network, rng = Near(), torch.Generator().manual_seed(1)
    x, low = torch.randn(2, 4, 20, 28, generator=rng), torch.randn(2, 3, 20, 28, generator=rng)
    context = torch.randn(2, 5, 6, generator=rng)
    conditions = {
        "positive": Conditioning(context, torch.tensor([3, 5]), low),
        "negative": Conditioning(-context, torch.tensor([3, 5]), low),
    }
    t = torch.tensor(0.5)
    places = corners(20, 28, 12, 6)
    tiled: Any = TiledDenoiser(network, conditions, places, 12, 6, at_once=2)
    found = tiled(x, t, "positive", "negative")
    assert max(shape[0] for shape in network.seen) == 2 * 2 * 2 and {shape[2:] for shape in network.seen} == {(12, 12)}
    expected = UNetDenoiser(network, conditions)(x, t, "positive", "negative")
    spoilt = torch.zeros(20, 28, dtype=torch.bool)  # a tile pads with zeros where the picture goes on
    for top, left in places:
        edge = torch.zeros(20, 28, dtype=torch.bool)
        edge[top : top + 12, left : left + 12] = True
        edge[max(top + 1, 0) : top + 11, left + 1 : left + 11] = False
        spoilt |= edge
    spoilt[:, 0] |= False
    for one, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(one[..., ~spoilt], whole[..., ~spoilt], rtol=1e-5, atol=1e-5)
        assert float((one - whole).abs()[..., spoilt].mean()) < float((whole - whole.mean()).abs().mean())


@torch.no_grad()
def test_weights_rise_over_the_overlap_so_no_seam_stays() -> None:
    """Two tiles that say 0 and 1: across their overlap the mean rises evenly, and nowhere jumps."""

    class Corner:
        def __call__(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
            return (x[:, :1].amax((2, 3), keepdim=True).expand(-1, 1, *x.shape[2:]),)

    x = torch.zeros(1, 1, 8, 12)
    x[..., -1] = 1.0  # seen by the second tile alone
    tiled = TiledDenoiser(Corner(), {"positive": Conditioning()}, corners(8, 12, 8, 4), 8, 4)
    (row,) = tiled(x, torch.tensor(0), "positive")[0][0, 0, :1]
    assert torch.equal(row[:4], torch.zeros(4)) and torch.equal(row[8:], torch.ones(4))
    torch.testing.assert_close(row[4:8], torch.tensor([1, 2, 3, 4]) / 5)
