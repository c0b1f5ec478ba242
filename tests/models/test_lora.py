"""Adapters are stock's: file, pictures, scales; and a stranger's file can only be data of the right shape."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ldm.cli.main import main
from ldm.models.fingerprint import model_sha256
from ldm.models.lora import (
    FACTS,
    WEIGHTS,
    LoRAConfig,
    LoRAFacts,
    active_adapters,
    add_adapters,
)
from ldm.models.lora_files import OtherBaseWarning, find_lora, read_lora
from ldm.models.safety import check_model_folder
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.sharing import png_metadata
from ldm.sharing.export import export

peft = pytest.importorskip("peft")


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, prompt: str = "red heart") -> Any:
    noise = torch.Generator().manual_seed(0)
    return pipeline(prompt, generator=noise, num_inference_steps=2, guidance_scale=3.0, output_type="np").images


@pytest.fixture(scope="module")
def two(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRAs of the same model."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("one", "two")):
        tiny.lora(tiny_pipeline_folder, folder / name / "lora", LoRAConfig(rank=2 + seed, alpha=8), seed)
    return folder / "one" / "lora", folder / "two" / "lora"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bert", LoRAConfig(rank=2)),
        ("bert", LoRAConfig(rank=2, alpha=8, dora=True)),
        ("bert", LoRAConfig(rank=2, alpha=8, text_encoder=True)),
        ("clip", LoRAConfig(rank=3, alpha=8, text_encoder=True, targets=("to_q", "conv1", "proj_in"))),
        ("t5", LoRAConfig(rank=2, alpha=1, text_encoder=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{'dora' if value.dora else 'lora'}{value.alpha}",
)
def test_what_was_trained_loads_in_stock_with_the_same_picture(
    kind: tiny.Kind, config: LoRAConfig, tiny_pipeline_folders: dict[tiny.Kind, Path], tmp_path: Path
) -> None:
    base = tiny_pipeline_folders[kind]
    expected = generate(tiny.lora(base, tmp_path, config))
    for loader in (diffusers.StableDiffusionPipeline, LDMPipeline):
        loaded = quiet(loader.from_pretrained(base))
        plain = generate(loaded)
        loaded.load_lora_weights(tmp_path)
        assert np.array_equal(generate(loaded), expected)
        assert np.abs(expected - plain).max() > 0.01
    # merged into the weights the pictures are the same but for rounding, from a folder as well
    loaded.merge_adapters()
    assert np.abs(generate(loaded) - expected).max() < 1e-4
    loaded.save_pretrained(tmp_path / "merged")
    stock = quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged"))
    assert np.array_equal(generate(stock), generate(loaded))


def test_several_at_once_and_their_scales_are_stocks(tiny_pipeline_folder: Path, two: tuple[Path, Path]) -> None:
    ours, stock = (
        quiet(kind.from_pretrained(tiny_pipeline_folder)) for kind in (LDMPipeline, diffusers.StableDiffusionPipeline)
    )
    bare = model_sha256(ours)
    hashes = [bare]
    for pipeline in (ours, stock):
        for file, name in zip(two, ("one", "two")):
            pipeline.load_lora_weights(file, adapter_name=name)
    for names, scales in ((["one"], [1.0]), (["one"], [0.5]), (["one", "two"], [0.5, 1.0]), (["two"], [1.0])):
        for pipeline in (ours, stock):
            pipeline.set_adapters(names, scales)
        assert np.array_equal(generate(ours), generate(stock))
        assert [(one.name, one.scale) for one in active_adapters(ours)] == list(zip(names, scales))
        assert model_sha256(ours, adapters=False) == bare
        hashes.append(model_sha256(ours))
    assert len(set(hashes)) == len(hashes), "a hash that does not tell adapters and their scales apart"
    with pytest.raises(ValueError, match="save_pretrained: the networks have LoRA adapters"):
        ours.save_pretrained("nowhere")
    ours.unload_lora_weights()
    assert model_sha256(ours) == bare and active_adapters(ours) == []


def test_an_adapters_hash_is_that_of_its_weights_and_alpha(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    for name, alpha, seed in (("a", 8, 0), ("same", 8, 0), ("alpha", 4, 0), ("seed", 8, 1)):
        tiny.lora(tiny_pipeline_folder, tmp_path / name, LoRAConfig(rank=2, alpha=alpha), seed)
    found = {}
    for name in ("a", "same", "alpha", "seed"):
        pipeline = LDMPipeline.from_pretrained(tiny_pipeline_folder)
        pipeline.load_lora_weights(tmp_path / name, adapter_name=f"called-{name}")
        (found[name],) = (one.sha256 for one in active_adapters(pipeline))
    assert found["a"] == found["same"] and len(set(found.values())) == 3


def test_a_lora_of_another_model_is_refused_by_shape_and_warned_of_by_weights(
    tiny_pipeline_folder: Path, two: tuple[Path, Path], tmp_path: Path
) -> None:
    pipeline = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    export(pipeline, tmp_path / "half")
    for folder, dtype in (
        (tiny_pipeline_folder, torch.float32),
        (tmp_path / "half", torch.float32),
        (tmp_path / "half", torch.bfloat16),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error", OtherBaseWarning)
            LDMPipeline.from_pretrained(folder, dtype=dtype).load_lora_weights(two[0])
    pipeline.unet.conv_in.weight.data += 0.01
    with pytest.warns(OtherBaseWarning, match="was trained beside tiny; this model has other weights"):
        pipeline.load_lora_weights(two[0])
    other = tiny.class_pipeline(tmp_path / "text", ("a", "b"))
    with pytest.raises(ValueError, match=f"{WEIGHTS}: is the LoRA of another model, of tiny: "):
        other.load_lora_weights(two[0])
    wide = load_file(two[0] / WEIGHTS)
    name = next(iter(wide))
    save_file({name: wide[name][:, :8].contiguous()}, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"is the LoRA of another model: unet\..* is \[2, 8\], that layer takes"):
        pipeline.load_lora_weights(tmp_path / "wide.safetensors")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"unet.megatron_config": {"a": 1}}, "unet.megatron_config"),
        ({"unet.megatron_core": "evil.module"}, "unet.megatron_core"),
        ({"unet.target_modules": "(a+)+$"}, "unet.target_modules"),
        ({"unet.target_modules": ["(a+)+$"]}, "unet.target_modules"),
        ({"unet.rank_pattern": {"(a+)+$": 3}}, "unet.rank_pattern"),
        ({"unet.auto_mapping": {"parent_library": "evil"}}, "unet.auto_mapping"),
        ({"unet.init_lora_weights": "eva"}, "unet.init_lora_weights"),
        ({"text_encoder.modules_to_save": ["x"]}, "text_encoder.modules_to_save"),
        ([1], "expected a JSON object"),
    ],
)
def test_settings_that_do_more_than_build_adapters_are_refused(
    settings: Any, told: str, two: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    save_file(load_file(two[0] / WEIGHTS), file, metadata={"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(ValueError, match=f"x.safetensors: .*{told}"):
        read_lora(file)


def test_files_that_are_no_lora_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"unet.conv_in.weight": torch.zeros(3)}, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="net.safetensors: is no LoRA"):
        read_lora(tmp_path / "net.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((two[0] / WEIGHTS).read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.safetensors: expected whole safetensors"):
        read_lora(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match=f"expected {WEIGHTS}, found none"):
        find_lora(tmp_path)  # two files, neither of the name
    with pytest.raises(FileNotFoundError, match="there is no such folder or file"):
        find_lora("/nowhere/lora")
    assert find_lora(two[0].parent) == two[0] / WEIGHTS  # a run


def test_pefts_note_of_its_base_is_allowed_where_no_network_is_loaded(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    LDMPipeline.from_pretrained(tiny_pipeline_folder).save_pretrained(tmp_path)
    note = json.dumps({"base_model_name_or_path": "some/model", "r": 4})
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text(note)
    check_model_folder(tmp_path)
    for place in ("", "text_encoder", "unet"):
        (tmp_path / place / "adapter_config.json").write_text(note)
        with pytest.raises(ValueError, match="adapter_config.json: base_model_name_or_path"):
            check_model_folder(tmp_path)
        (tmp_path / place / "adapter_config.json").unlink()


def test_a_target_that_names_no_layer_is_an_error(tiny_pipeline_folder: Path) -> None:
    pipeline = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    with pytest.raises(ValueError, match="lora.targets: no linear or convolutional layer of the U-Net is named to_x"):
        add_adapters(pipeline.unet, None, LoRAConfig(rank=2, targets=("to_q", "to_x")))
    for wrong in ({"text_encoder": True}, {"rank": 2, "dora": True, "text_encoder": True}, {"targets": ()}):
        with pytest.raises(ValueError, match="^lora\\."):
            LoRAConfig(**wrong)


def test_a_file_is_a_function_of_the_adapters(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """Also its header, of three notes, which the library writes in any of six orders."""
    for i in range(6):
        tiny.lora(tiny_pipeline_folder, tmp_path / str(i), LoRAConfig(rank=2))
    assert len({(tmp_path / str(i) / WEIGHTS).read_bytes() for i in range(6)}) == 1
    header = (tmp_path / "0" / WEIGHTS).read_bytes()[8:]
    assert int.from_bytes((tmp_path / "0" / WEIGHTS).read_bytes()[:8], "little") % 8 == 0 and header[:1] == b"{"


def test_facts_are_in_the_file_and_beside_it(two: tuple[Path, Path]) -> None:
    facts = read_lora(two[0] / WEIGHTS).facts
    assert facts == json.loads((two[0] / FACTS).read_text("utf-8"))
    assert "few_steps" not in facts and "sampler" not in facts  # as its base is sampled
    few = LoRAFacts("tiny", [], few_steps=4, sampler="lcm").to_dict()
    assert (few["few_steps"], few["sampler"]) == (4, "lcm")
    assert facts["base"] == "tiny" and facts["trigger"] == "in a style" and len(facts["base_weights"]) == 5


# --- commands -------------------------------------------------------------------------------------------


def test_sample_with_loras_and_the_same_again(
    tiny_pipeline_folder: Path, two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, words = str(tiny_pipeline_folder), ["--dtype", "float32", "--steps", "2"]
    loras = ["--lora", f"{two[0]}:0.5", "--lora", str(two[1].parent)]
    main(["sample", model, "red heart", *words, *loras, "--out", str(tmp_path / "a.png")])
    said = png_metadata.read(tmp_path / "a.png")
    assert said.adapters is not None
    assert [(one["name"], one["scale"]) for one in said.adapters] == [("one", 0.5), ("two", 1.0)]
    assert said.model == model_sha256(LDMPipeline.from_pretrained(model))
    pipeline = quiet(diffusers.StableDiffusionPipeline.from_pretrained(model))
    for file, name in zip(two, ("one", "two")):
        pipeline.load_lora_weights(file, adapter_name=name)
    pipeline.set_adapters(["one", "two"], [0.5, 1.0])
    stock = pipeline("red heart", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(stock))

    again = ["sample", model, "--like", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(again)
    assert "a.png: it was made with the LoRA one (SHA-256" in str(stopped.value) and "--lora" in str(stopped.value)
    main([*again, *loras])
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    (tmp_path / "runs").mkdir()
    for place in two:
        (tmp_path / "runs" / place.parent.name).symlink_to(place.parent)
    (tmp_path / "b.png").unlink()
    main(again)
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    capsys.readouterr()
    main([*again, "--lora", str(two[0])])
    assert "adapters: " in capsys.readouterr().out
    for command in (["sample", model, "cat"], ["app", "--model", model]):
        with pytest.raises(SystemExit, match="--lora: OpenVINO does not support adapters"):
            main([*command, "--engine", "openvino", *loras])
    with pytest.raises(SystemExit, match="is named twice; give it one weight"):
        main(["sample", model, "cat", *loras, "--lora", f"{two[0]}/"])


def test_export_merges(tiny_pipeline_folder: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    main(["export", str(tiny_pipeline_folder), str(tmp_path / "out"), "--lora", str(two[0]), "--lora", f"{two[1]}:0.5"])
    pipeline = quiet(LDMPipeline.from_pretrained(tiny_pipeline_folder))
    plain = generate(pipeline)
    for file, name in zip(two, ("one", "two")):
        pipeline.load_lora_weights(file, adapter_name=name)
    pipeline.set_adapters(["one", "two"], [1.0, 0.5])
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        for weight in network.parameters():
            weight.data = weight.data.half().float()
    merged = generate(quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")))
    assert np.array_equal(merged, generate(pipeline)) and np.abs(merged - plain).max() > 0.01
