"""The denoiser's shape is what its config says, whatever diffusers calls it."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from ldm.models.unet import UNetConfig, build_unet, choose_attention

SHAPE = (4, 8, 8)
SMALL = UNetConfig(channels=(32, 64, 128), attention=(False, True, True), layers=1, head_channels=32)


def build(config: UNetConfig = SMALL) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_unet(config, latent_shape=SHAPE, context_dim=24).eval()


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(batch, *SHAPE),
        "timestep": torch.arange(batch) * 300,
        "encoder_hidden_states": torch.randn(batch, 5, 24),
    }


def test_every_level_has_heads_of_the_configured_width() -> None:
    unet = build()
    found = {}
    for name, module in unet.named_modules():
        if type(module).__name__ == "Attention":
            found.setdefault(".".join(name.split(".")[:2]), set()).add((module.heads, module.inner_dim // module.heads))
    # levels of 64 and 128 channels in heads of 32; the finest level attends to nothing
    assert found == {
        "down_blocks.1": {(2, 32)},
        "down_blocks.2": {(4, 32)},
        "mid_block.attentions": {(4, 32)},
        "up_blocks.0": {(4, 32)},
        "up_blocks.1": {(2, 32)},
    }


def test_a_level_narrower_than_a_head_has_one() -> None:
    unet = build(UNetConfig(channels=(32,), attention=(True,), layers=1, head_channels=64))
    assert {module.heads for module in unet.modules() if type(module).__name__ == "Attention"} == {1}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("blocks", [1, 2])
def test_layers_and_transformer_layers_count(layers: int, blocks: int) -> None:
    config = UNetConfig(channels=(32, 64), attention=(False, True), layers=layers, transformer_layers=blocks)
    names = [type(module).__name__ for module in build(config).modules()]
    # down: layers per level; up: one more, for the skip of the level's entrance; middle: two and one
    assert names.count("ResnetBlock2D") == 2 * layers + 2 * (layers + 1) + 2
    assert names.count("BasicTransformerBlock") == blocks * (layers + (layers + 1) + 1)


def test_plain_and_sdpa_attention_compute_the_same() -> None:
    unet = build()
    outputs = []
    for processor in (AttnProcessor(), AttnProcessor2_0()):
        unet.set_attn_processor(processor)
        with torch.no_grad():
            outputs.append(unet(**inputs()).sample)
    assert outputs[0].std() > 0.01
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_the_kernel_is_chosen_by_the_device() -> None:
    unet = build()
    assert choose_attention(unet, torch.device("cpu")) == "bmm + softmax"
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor}
    assert choose_attention(unet, torch.device("mps")) == "SDPA"
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize("installed", [True, False])
def test_cuda_gets_xformers_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    unet, asked = build(), []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed and name == "xformers" else None)
    monkeypatch.setattr(unet, "enable_xformers_memory_efficient_attention", lambda: asked.append(True))
    assert choose_attention(unet, torch.device("cuda")) == ("xformers" if installed else "SDPA")
    assert asked == [True] * installed


def test_the_context_and_the_timestep_reach_the_prediction_and_rows_stay_apart() -> None:
    unet, given = build(), inputs()
    with torch.no_grad():
        plain = unet(**given).sample
        for changed in (
            {"encoder_hidden_states": -given["encoder_hidden_states"]},
            {"timestep": given["timestep"] + 200},
        ):
            assert (unet(**{**given, **changed}).sample - plain).abs().amax((1, 2, 3)).min() > 1e-3
        alone = unet(**{name: value[:1] for name, value in given.items()}).sample
    assert (alone - plain[:1]).abs().max() < 1e-5


def test_pipelines_find_the_size_in_the_config() -> None:
    config = build().config
    assert (config.sample_size, config.in_channels, config.out_channels, config.cross_attention_dim) == (8, 4, 4, 24)


# --- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": (True,)}, r"unet.attention: expected one entry per level of unet.channels \(3\), got 1"),
        (
            {"channels": (32, 48), "attention": (True, True)},
            r"unet.channels: .* positive multiple of 32, got \[32, 48\]",
        ),
        ({"channels": (0,), "attention": (True,)}, r"unet.channels: .* positive multiple of 32, got \[0\]"),
        ({"channels": (), "attention": ()}, r"unet.channels: expected at least one level"),
        ({"layers": 0}, r"unet.layers: expected at least 1, got 0"),
        ({"head_channels": 0}, r"unet.head_channels: expected at least 1, got 0"),
        ({"transformer_layers": 0}, r"unet.transformer_layers: expected at least 1, got 0"),
    ],
)
def test_a_bad_shape_names_its_key(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**arguments)


def test_latents_that_can_not_be_halved_name_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"3 levels need latents divisible by 4, but they are 6 x 6; change data.size"):
        build_unet(SMALL, latent_shape=(4, 6, 6), context_dim=24)
