"""The chroma of the small picture, the luma of the large one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ldm.inference.colors import LUMA, with_colors_of


def luma(pictures: Tensor) -> Tensor:
    return (pictures * torch.tensor(LUMA)[:, None, None]).sum(1)


def test_a_wrong_hue_is_put_right_and_lines_stay() -> None:
    """An orange square with black lines, of a red small picture."""
    red, orange = (torch.tensor(color).view(1, 3, 1, 1) for color in ([0.6, -0.7, -0.6], [0.5, -0.2, -0.9]))
    small, large = red.expand(1, 3, 8, 8), orange.repeat(1, 1, 32, 32)
    made = with_colors_of(small, large)
    assert torch.allclose(made, red + luma(orange - red)[:, None], atol=1e-5)  # red, as light as the orange was
    large[..., 12:14, :] = -1.0
    lined = with_colors_of(small, large)
    assert torch.allclose(luma(lined)[:, 20:], luma(large)[:, 20:], atol=1e-5)
    assert (luma(lined)[:, 12:14] < -0.5).all() and (luma(lined)[:, 10] - luma(large)[:, 10]).abs().max() < 1e-5


def test_what_has_the_small_picture_s_colors_is_left_alone() -> None:
    torch.manual_seed(0)
    large = (torch.rand(2, 3, 32, 48) * 1.6 - 0.8).float()
    assert torch.allclose(with_colors_of(avg_pool2d(large, 4), large), large, atol=1e-6)
    gray = large.mean(1, keepdim=True).expand(-1, 3, -1, -1)  # another luma alone changes nothing
    assert torch.allclose(with_colors_of(avg_pool2d(gray, 4) + 0.3, gray), gray, atol=1e-5)


def test_the_chroma_at_the_small_size_comes_nearer() -> None:
    torch.manual_seed(1)
    small = torch.rand(1, 3, 16, 16) * torch.tensor([0.5, 0.1, 0.1]).view(1, 3, 1, 1)
    large = torch.rand(1, 3, 64, 64) * 0.5 - 0.2

    def lacking(pictures: Tensor) -> float:
        difference = small - avg_pool2d(pictures, 4)
        return float((difference - luma(difference)[:, None]).mean((2, 3)).abs().max())

    assert lacking(with_colors_of(small, large)) < 0.02 < lacking(large)
