"""A LoRA's run: only adapters learn, what it leaves is what was trained, in stock and with a text encoder, too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import road
import tiny
import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file

from ldm.cli.main import main
from ldm.data.dataset import read_captioned
from ldm.models.lora import WEIGHTS, adapter_weights
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.system.errors import RunError
from ldm.training.config import Config
from ldm.training.initial_model import resolved
from ldm.training.run import train
from ldm.training.tasks.lora import LoRA, networks_of
from ldm.training.text_adapters import Tokens, UNetWithText

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    road.draw_folder(folder / "data")
    for kind in ("bert", "clip"):
        tiny.pipeline(folder / f"{kind}-encoder", kind).save_pretrained(folder / kind)  # type: ignore[arg-type]
    return folder


def recipe(home: Path, run: Path, base: str = "bert", **words: Any) -> Config:
    settings = {"init": str(home / base), "run": str(run), **road.OF_INIT, "lora__rank": 2, "lora__alpha": 8}
    return road.recipe(
        home,
        **settings
        | {"loop__sample_every": 0, "loop__checkpoint_every": 6, "loop__evaluate_every": 6, "optim__lr": 0.02}
        | words,
    )


def picture(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    return pipeline("red heart", generator=noise, num_inference_steps=2, guidance_scale=3.0, output_type="np").images


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("bert", {"lora__text_encoder": True, "loop__sample_every": 6, "data__cache": "off"}),
        ("clip", {"lora__text_encoder": True}),
    ],
    ids=["bert", "clip"],
)
def test_a_stopped_run_ends_as_one_that_was_not_and_stock_loads_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, words: dict[str, Any]
) -> None:
    """The picture of the trained network in memory is the picture of the file in stock diffusers, to the bit."""
    kept: dict[str, Any] = {}
    real = LoRA.export

    def export(task: LoRA, step: int) -> Any:
        with task.evaluating() as module:
            networks = networks_of(module)
            kernels = dict(networks["unet"].attn_processors)
            networks["unet"].set_attn_processor(AttnProcessor2_0())  # as stock computes
            kept["picture"] = picture(diffusers.StableDiffusionPipeline.from_pretrained(home / base, **networks))
            networks["unet"].set_attn_processor(kernels)
        return real(task, step)

    monkeypatch.setattr(LoRA, "export", export)
    losses = train("ldm", recipe(home, tmp_path / "whole", base, **words))
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(home / base)
    before = picture(loaded)
    loaded.load_lora_weights(tmp_path / "whole/lora")
    assert np.array_equal(picture(loaded), kept["picture"]) and np.abs(kept["picture"] - before).max() > 1e-3

    changed = {name: words[name] for name in words if name != "loop__sample_every"}
    steps = {"loop__steps": 3, "resume__allow": ["loop.steps"]}
    first = train("ldm", recipe(home, tmp_path / "parts", base, **changed | steps))
    rest = train("ldm", recipe(home, tmp_path / "parts", base, **changed))
    assert first + rest == losses
    for file in (tmp_path / "whole/checkpoints/ldm/step_0000006").glob("*.safetensors"):
        other = tmp_path / "parts/checkpoints/ldm/step_0000006" / file.name
        assert other.read_bytes() == file.read_bytes()
        assert all(".lora_" in name for name in load_file(file)), "a frozen weight was saved"
    both = [load_file(tmp_path / run / "lora" / WEIGHTS) for run in ("parts", "whole")]
    assert both[0].keys() == both[1].keys() and all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    facts = json.loads((tmp_path / "whole/lora/lora.json").read_text("utf-8"))
    assert facts["base"] == base and facts["prompts"] and facts["trigger"] == ""
    assert not (tmp_path / "whole/pipeline").exists() and not (tmp_path / "whole/frozen").exists()
    assert (tmp_path / "whole/samples/step_0000006.png").exists() == ("loop__sample_every" in words)


def test_only_adapters_learn_and_the_base_stays(home: Path, tmp_path: Path) -> None:
    config = resolved(recipe(home, tmp_path), "ldm")
    task = LoRA.create(config, Accelerator(cpu=True), read_captioned(config.data.source, progress=False))
    task.build()
    state, base = task.unet, LDMPipeline.from_pretrained(home / "bert").unet.state_dict()
    learn = {name for name, weight in state.module.named_parameters() if weight.requires_grad}
    assert learn and all(".lora_" in name for name in learn)
    assert state.ema is not None and state.optimizer is not None
    count = len(learn)
    assert count == len(state.ema.shadow_params) == len(state.optimizer.param_groups[0]["params"])
    # fresh adapters change nothing; B is zero
    (batch,) = task.batches([range(4)])
    plain = LDMPipeline.from_pretrained(home / "bert").unet.eval()
    task.stored = batch
    assert task.error(state.module.eval()) == pytest.approx(task.error(plain), rel=1e-5)
    task.train_state.clear()
    for name, weight in state.module.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(weight, base[name.replace(".base_layer", "")])


def test_a_text_encoder_that_learns_encodes_as_the_frozen_one_does(home: Path) -> None:
    pipeline = LDMPipeline.from_pretrained(home / "bert")
    text = tiny.TextEncoder(pipeline.tokenizer, pipeline.text_encoder.eval())
    both = UNetWithText(pipeline.unet, text.model).train()
    captions, x = ["red heart", "", "a cat with a house"], torch.randn(3, 4, 8, 8)
    t = torch.tensor([1, 500, 999])
    tokens = Tokens(text.tokenizer, text.model).encode(captions)
    assert tokens.shape == (3, tiny.MAX_LENGTH, 2)
    expected = pipeline.unet(x, t, encoder_hidden_states=text.encode(captions), return_dict=False)[0]
    assert torch.equal(both(x, t, encoder_hidden_states=tokens, return_dict=False)[0], expected)
    assert pipeline.unet.training and not pipeline.text_encoder.training


def test_a_lora_that_is_not_what_was_trained_does_not_replace_the_last(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ldm.training.tasks.lora as module

    real = module.save_adapters

    def damaging(folder: Path, *rest: Any) -> None:
        real(folder, *rest)
        tensors = load_file(folder / WEIGHTS)
        name = next(name for name in tensors if name.endswith("lora_B.weight"))
        tensors[name][0, 0] += 1e-6
        from safetensors import safe_open

        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
        save_file(tensors, folder / WEIGHTS, metadata=metadata)

    config = recipe(home, tmp_path, loop__steps=3)
    monkeypatch.setattr(module, "save_adapters", damaging)
    with pytest.raises(RunError, match=r"the lora of step 3, left in .*\.lora\.new, is not what was trained: unet: "):
        train("ldm", config)
    monkeypatch.undo()
    train("ldm", config)
    assert (tmp_path / "lora" / WEIGHTS).exists()


def test_what_a_lora_can_not_be_is_said_before_anything_runs(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lora.rank: .*init"):
        train("ldm", dataclasses.replace(recipe(home, tmp_path), init=None))
    for key, value in (("condition_column", "outline"), ("inpaint", True)):
        with pytest.raises(ValueError, match=f"data.{key}: .* adapters can't add one"):
            train("ldm", recipe(home, tmp_path, **{f"data__{key}": value}))


def test_a_run_is_evaluated_with_its_base(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("ldm", recipe(home, tmp_path / "run", loop__steps=2))
    with pytest.raises(SystemExit, match=r"run is not a pipeline folder.*it holds a LoRA.*--lora"):
        main(["sample", str(tmp_path / "run"), "cat"])
    main(["sample", str(home / "bert"), "cat", "--steps", "2", "--lora", str(tmp_path / "run"),
          "--out", str(tmp_path / "a.png")])  # fmt: skip
    assert "warning" not in capsys.readouterr().err
    assert adapter_weights(LDMPipeline.from_pretrained(home / "bert").unet) == {}
