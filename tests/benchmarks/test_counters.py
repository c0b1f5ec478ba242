"""Costs of training, caching and sampling, counted: a change of a cost must be stated here."""

from __future__ import annotations

from pathlib import Path

import pytest
import road
import torch
from torch import nn

from benchmarks.counters import META, cached_bytes, counters, evaluations, flops, latent_shape, unet_flops
from benchmarks.settings import SETTINGS, SIZE
from ldm.data.buckets import Buckets
from ldm.data.cache.latents import Builder, context_kind, posterior_kind
from ldm.data.cache.store import page_size
from ldm.data.dataset import read_captioned
from ldm.models.unet import choose_attention
from ldm.pipelines.text_to_image import LDMPipeline

# FLOPs of one training sample's U-Net step, of encoding a picture and a caption; bytes of both in the cache
EXPECTED = {
    "A": (2_267_361_280, 16_919_306_240, 13_298_503_680, 2_162, 237_616),
    "B": (6_796_066_816, 804_552_704, 13_298_503_680, 8_752, 237_616),
    "C": (6_123_225_088, 804_552_704, 514_916_352, 8_752, 37_497),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_costs_of_a_sample_are_unchanged(name: str) -> None:
    assert tuple(counters(SETTINGS[name]).values()) == EXPECTED[name]


def test_flops_of_the_unet_are_the_sum_over_its_layers() -> None:
    """Counted independently: every layer's formula, three times (forward, gradients of input and weight)."""
    setting = SETTINGS["C"]
    shape = latent_shape(setting)
    with META:
        unet = setting.unet(shape)
        choose_attention(unet, torch.device("cpu"))
        x_t, t, context = torch.empty(1, *shape), torch.zeros(1), torch.empty(1, setting.tokens, setting.width)
    total = 0

    def layer(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        once = 2 * output.numel() * module.weight[0].numel()
        total += 3 * once if inputs[0].requires_grad else 2 * once  # no gradient of the network's input

    def attention(
        module: nn.Module, inputs: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor | None]
    ) -> None:
        nonlocal total
        queries, context = inputs[0], keywords.get("encoder_hidden_states")
        keys = queries if context is None else context
        once = 2 * 2 * queries.shape[1] * keys.shape[1] * module.to_q.out_features  # q k^T, and its product with v
        total += 3 * once

    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(layer)
        elif type(module).__name__ == "Attention":
            module.register_forward_pre_hook(attention, with_kwargs=True)
    unet(x_t, t, encoder_hidden_states=context).sample.sum().backward()
    assert total == unet_flops(setting)


def test_flops_of_a_product_are_two_for_each_multiplication() -> None:
    with META:
        a, b = torch.empty(3, 5), torch.empty(5, 7)
    assert flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_bytes_of_a_cached_row_are_those_on_disk(tmp_path: Path) -> None:
    setting = SETTINGS["C"]
    shape = latent_shape(setting)
    pictures = read_captioned(str(road.draw_folder(tmp_path / "data")), progress=False).train
    posteriors, contexts = posterior_kind("", shape, SIZE, "white"), context_kind("", (setting.tokens, setting.width))
    Builder(tmp_path / "cache", progress=False, log=lambda _: None).build(
        pictures,
        tmp_path / "rows.npy",
        ([posteriors], lambda pixels: (torch.zeros(len(pixels), *shape), torch.ones(len(pixels), *shape))),
        (contexts, lambda captions: torch.zeros(len(captions), setting.tokens, setting.width)),
        buckets=Buckets.square(SIZE, len(pictures)),
        flip=False,
    )

    expected = cached_bytes(setting)
    captions = {caption for row in pictures for caption in row.captions} | {""}
    for kind, name, number in ((posteriors, "picture", len(pictures)), (contexts, "caption", len(captions))):
        stored = (tmp_path / "cache" / kind.file).stat().st_size
        page = page_size(kind.size)
        assert abs(stored - expected[name] * number) <= 6 * page  # roots of trees, and a page begun


@pytest.mark.parametrize(("guidance_scale", "expected"), [(1.0, 5), (3.0, 10)])
def test_a_picture_takes_one_evaluation_a_step_and_two_with_guidance(
    tiny_pipeline_folder: Path, guidance_scale: float, expected: int
) -> None:
    pipeline = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    assert evaluations(pipeline, steps=5, guidance_scale=guidance_scale) == expected
