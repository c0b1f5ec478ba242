"""The frozen encoders in bf16: near what they say in float32, whatever the batch, and saved as they were."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
import torch
from accelerate import Accelerator

from ldm.diffusion.schedule import NoiseSchedule, scheduler_config
from ldm.models.fingerprint import fingerprint, tokenizer_facts
from ldm.models.text_encoder import TextConfig, TextEncoder
from ldm.models.unet import UNetConfig, build_unet
from ldm.models.vae import VAEConfig, build_vae, encode, latent_shape, load_vae
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.training.distributed import encoding_dtype
from ldm.training.encoders import Encoders
from ldm.training.export import save_frozen

CAPTIONS = ["a red heart", "", "two cats on a roof"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    build_vae(VAEConfig(channels=(32, 64), layers=1, latent_channels=4)).save_pretrained(home / "vae")
    tiny.save_text_encoder(home / "text", "bert")
    return home


def encoders(home: Path, dtype: torch.dtype) -> Encoders:
    config = TextConfig(encoder=str(home / "text"), max_length=tiny.MAX_LENGTH)
    return Encoders(lambda: load_vae(home / "vae"), lambda: TextEncoder.load(config), dtype)


def test_bf16_is_near_float32_and_the_same_in_any_batch(home: Path) -> None:
    pixels = torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rough, exact = encoders(home, torch.bfloat16), encoders(home, torch.float32)
    with torch.no_grad():
        mean, expected = encode(rough.vae, pixels).mean, encode(load_vae(home / "vae"), pixels).mean
        alone = torch.cat([encode(rough.vae, one[None]).mean for one in pixels])
    assert mean.dtype == torch.float32
    assert 0 < (mean - expected).square().mean().sqrt() < 0.02 * expected.std()
    assert (alone - mean).abs().max() < 2**-7 * mean.abs().max()  # here no bit; how products are cut up is the CPU's
    assert rough.text is not None and exact.text is not None
    context = rough.text.encode(CAPTIONS)
    off = (context - exact.text.encode(CAPTIONS)).square().mean().sqrt()
    assert 0 < off < 0.03 * context.square().mean().sqrt()
    alone = torch.cat([rough.text.encode([caption]) for caption in CAPTIONS])
    assert (alone - context).abs().max() < 2**-7 * context.abs().max()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says which files are mapped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vae_s_file_is_let_go_once_its_weights_are_copies(home: Path, dtype: torch.dtype) -> None:
    """A few norms that still lie in the mapped file would keep all of it in memory."""

    def mapped() -> bool:
        return str(home / "vae") in Path("/proc/self/maps").read_text("utf-8")

    both, untouched = encoders(home, dtype), load_vae(home / "vae")
    assert mapped()
    expected = {name: weight.to(dtype, copy=True) for name, weight in untouched.state_dict().items()}
    del untouched
    vae = both.vae
    gc.collect()
    assert not mapped()
    assert all(torch.equal(weight, expected[name]) for name, weight in vae.state_dict().items())


def test_what_is_loaded_for_pipelines_is_float32_to_the_last_bit(home: Path) -> None:
    lowered = encoders(home, torch.bfloat16)
    assert lowered.vae.dtype == torch.bfloat16
    assert lowered.fingerprints["vae"] != encoders(home, torch.float32).fingerprints["vae"]  # so caches differ
    for name, weight in lowered.load_vae().state_dict().items():
        assert torch.equal(weight, load_vae(home / "vae").state_dict()[name]) and weight.dtype == torch.float32
    text = lowered.load_text()
    assert text is not None and text.model.dtype == torch.float32


def logging(home: Path, loaded: list[str], **words: Any) -> Encoders:
    config = TextConfig(encoder=str(home / "text"), max_length=tiny.MAX_LENGTH)

    def load_text() -> TextEncoder:
        loaded.append("text")
        return TextEncoder.load(config)

    def load_a_vae() -> Any:
        loaded.append("vae")
        return load_vae(home / "vae")

    return Encoders(load_a_vae, load_text, torch.bfloat16, **words)


def test_asking_for_one_lets_go_of_the_other(home: Path) -> None:
    loaded: list[str] = []
    both = logging(home, loaded)
    assert both.vae is both.vae
    gone = weakref.ref(both.vae)
    assert both.text is not None and both.text is both.text
    assert gone() is None
    assert loaded == ["vae", "text"]
    assert both.vae is not None
    assert loaded == ["vae", "text", "vae"]


def test_for_steps_that_encode_both_stay_and_the_larger_one_is_loaded_first(home: Path) -> None:
    """While a text encoder's file is mapped and becomes bf16, no VAE lies beside it; whichever is asked for first."""
    loaded: list[str] = []
    both = logging(home, loaded, together=True)
    assert both.vae is both.vae and both.text is both.text
    assert loaded == ["text", "vae"]
    both.free()
    assert both.vae is not None
    assert loaded == ["text", "vae"] * 2


def test_outlines_and_fingerprints_stay_when_the_encoders_are_freed(home: Path) -> None:
    loaded: list[str] = []
    both = logging(home, loaded)
    vae, text = both.vae_outline, both.text_outline
    assert text is not None and loaded == ["vae", "text"]
    assert {part.device.type for network in (vae, text.model) for part in network.parameters()} == {"meta"}
    whole = load_vae(home / "vae")
    assert {name: part.shape for name, part in vae.state_dict().items()} == {
        name: part.shape for name, part in whole.state_dict().items()
    }
    assert latent_shape(vae, 16) == latent_shape(whole, 16)
    expected = TextEncoder.load(TextConfig(encoder=str(home / "text"), max_length=tiny.MAX_LENGTH))
    assert text.dim == expected.dim and text.lengths(CAPTIONS) == expected.lengths(CAPTIONS)
    assert both.fingerprints == {
        "vae": fingerprint(whole.bfloat16()),
        "text": fingerprint(expected.model.bfloat16(), tokenizer_facts(expected.tokenizer)),
    }
    assert loaded == ["vae", "text"]
    none = Encoders(lambda: load_vae(home / "vae"), None)
    assert none.text is None and none.text_outline is None and list(none.fingerprints) == ["vae"]


@pytest.mark.parametrize(
    ("steps", "expected"), [("bf16", torch.bfloat16), ("no", torch.float32), ("fp16", torch.float32)]
)
def test_encoders_follow_the_steps_but_never_into_fp16(steps: str, expected: torch.dtype) -> None:
    accelerator: Any = SimpleNamespace(mixed_precision=steps)
    assert encoding_dtype(cast(Accelerator, accelerator)) == expected


def test_what_pipelines_share_is_saved_network_by_network_as_a_pipeline_saves_itself(
    home: Path, tmp_path: Path
) -> None:
    both, beside = encoders(home, torch.bfloat16), []
    vae, load_text = both.load_vae(), both.load_text
    both.load_vae = lambda: vae

    def load() -> TextEncoder | None:
        beside.append({weight.device.type for weight in vae.parameters()})
        return load_text()

    both.load_text = load

    def build(vae: Any, text: TextEncoder | None) -> LDMPipeline:
        assert text is not None
        unet = build_unet(UNetConfig((32,), (True,), layers=1), latent_shape=(4, 8, 8), context_dim=text.dim)
        return LDMPipeline.from_components(vae, text, unet, scheduler_config(NoiseSchedule.from_name("linear"), "eps"))

    whole = build(load_vae(home / "vae"), load_text())
    whole.save_pretrained(tmp_path / "whole")
    save_frozen(tmp_path / "run/frozen", both.load_vae, both.load_text, build)
    assert beside == [{"meta"}]  # the VAE had been saved and let go

    def files(folder: Path) -> dict[str, bytes]:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    expected = {name: content for name, content in files(tmp_path / "whole").items() if not name.startswith("unet/")}
    assert files(tmp_path / "run/frozen") == expected


def test_a_missing_encoder_is_not_reported_as_a_full_disk(home: Path, tmp_path: Path) -> None:
    both = encoders(home, torch.float32)

    def gone() -> TextEncoder | None:
        raise FileNotFoundError("there is no folder 'text'")

    both.load_text = gone
    with pytest.raises(FileNotFoundError, match="there is no folder 'text'"):
        save_frozen(tmp_path / "run/frozen", both.load_vae, both.load_text, lambda vae, text: None)
