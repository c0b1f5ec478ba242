"""OpenVINO in torch's place: the same pictures but for rounding, from a cache that is found by content."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import road
import tiny
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("openvino", reason="OpenVINO isn't installed: pip install openvino")

from ldm.cli.main import main
from ldm.diffusion.schedule import NoiseSchedule
from ldm.inference.openvino import MOST_COMPILED, OpenVINO
from ldm.inference.openvino_cache import cache_folder, converted, core, load_openvino
from ldm.models.classifier import ClassifierConfig, NoisyClassifier, build_classifier
from ldm.models.unet import UNetConfig, build_unet
from ldm.models.vae import VAEConfig
from ldm.pipelines.text_to_image import LDMPipeline
from ldm.sharing import png_metadata as recipe

LEVEL = 1 / 255


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for these tests alone; subprocesses inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield cache_folder()


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache that nothing is in yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def pipe(tiny_pipeline_folder: Path) -> LDMPipeline:
    return quiet(LDMPipeline.from_pretrained(tiny_pipeline_folder))


def quiet(pipe: LDMPipeline) -> LDMPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_unet(folder: Path, config: UNetConfig, **words: Any) -> LDMPipeline:
    """A tiny pipeline whose U-Net is another."""
    whole = tiny.pipeline(folder)
    torch.manual_seed(3)
    unet = build_unet(config, latent_shape=(4, 8, 8), context_dim=32, **words).eval()
    return quiet(LDMPipeline(**{**whole.components, "unet": unet}, requires_safety_checker=False))


def draw(pipe: LDMPipeline, prompt: Any = "red heart", **words: Any) -> np.ndarray:
    """Pictures [N,H,W,3] in [0,1], in three steps."""
    words = {"num_inference_steps": 3, "seed": 5, "output_type": "np", **words}
    return pipe(prompt, **words).images  # type: ignore[return-value]


def both(pipe: LDMPipeline, *words: Any, **named: Any) -> tuple[np.ndarray, np.ndarray]:
    """What torch draws, and what OpenVINO does."""
    by_torch = draw(pipe.disable_openvino(), *words, **named)
    assert by_torch.std() > 0.02, "a flat picture proves nothing"
    return by_torch, draw(pipe.enable_openvino(), *words, **named)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else []


# --- the same picture ------------------------------------------------------------------------------------

SHAPE = UNetConfig(channels=(32, 64), attention=(True, True), layers=1, head_channels=16)
KNOWS: dict[str, tuple[Callable[[Path], LDMPipeline], dict[str, Any]]] = {
    "text": (tiny.pipeline, {"prompt": "red heart"}),
    "classes alone": (
        lambda folder: tiny.class_pipeline(folder, ("food", "flags")),
        {"prompt": None, "class_label": ["flags", None]},
    ),
    "text and a picture": (
        lambda folder: with_unet(folder, SHAPE, condition_channels=4),
        {"prompt": "red heart", "condition": Image.effect_noise((16, 16), 80).convert("RGB")},
    ),
    "a distilled one": (tiny.student_pipeline, {"prompt": "red heart", "guidance_interval": None}),
    "pooled text": (
        lambda folder: with_unet(folder, UNetConfig((32, 64), (True, True), 1, 16, pooled_text=True)),
        {"prompt": "red heart"},
    ),
    "adaptive norms and residual resampling": (
        lambda folder: with_unet(
            folder, UNetConfig((32, 64), (True, True), 1, 16, scale_shift=True, residual_resampling=True)
        ),
        {"prompt": "red heart"},
    ),
}


@pytest.mark.parametrize("name", KNOWS)
def test_every_kind_of_model_is_drawn_as_torch_draws_it(name: str, tmp_path: Path) -> None:
    """In float32: within one of 255 levels, with guidance and outside its interval."""
    make, words = KNOWS[name]
    by_torch, by_openvino = both(quiet(make(tmp_path)), **{"guidance_interval": (0.3, 0.8), **words})
    assert np.abs(by_torch - by_openvino).max() < LEVEL


def test_u_net_and_decoder_compute_what_torch_does(pipe: LDMPipeline) -> None:
    """To 1e-5 in float32, at batch sizes that come and go, more of them than are kept."""
    engine, sizes = OpenVINO(), (1, 2, 5, 3, 2)
    assert len(set(sizes)) > MOST_COMPILED
    for rows in sizes:
        x, t, context = torch.randn(rows, 4, 8, 8), torch.tensor(421), torch.randn(rows, tiny.MAX_LENGTH, 32)
        with torch.no_grad():
            expected = pipe.unet(x, t, encoder_hidden_states=context).sample, pipe.vae.decode(x).sample
            found = engine.unet(pipe)(x, t, encoder_hidden_states=context)[0], engine.decoder(pipe)(x)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
            assert not torch.equal(other, one), "torch computed it itself"
    assert len(engine.networks["U-Net"].compiled) == MOST_COMPILED


def test_sizes_other_than_the_usual_and_slices_are_drawn(tmp_path: Path) -> None:
    """Three latents can't be halved: the U-Net then takes another path than at two."""
    pipe = tiny.pipeline(tmp_path, vae_config=VAEConfig(channels=(16, 16, 16, 16), layers=1))
    pipe.vae.enable_slicing()
    by_torch = draw(pipe, ["red heart", "cat"], height=24, width=24)
    pipe.engine = OpenVINO()
    assert np.abs(by_torch - draw(pipe, ["red heart", "cat"], height=24, width=24)).max() < LEVEL


def test_a_picture_hardly_depends_on_those_beside_it(pipe: LDMPipeline) -> None:
    pipe.enable_openvino()
    together = draw(pipe, ["red heart", "cat", "pizza"])
    for place, prompt in enumerate(["red heart", "cat", "pizza"]):
        assert np.abs(draw(pipe, prompt, seed=5 + place)[0] - together[place]).max() < LEVEL


def test_bfloat16_is_nearly_torchs(tiny_pipeline_folder: Path) -> None:
    """Both round to eight bits at other places."""
    whole, _ = both(quiet(LDMPipeline.from_pretrained(tiny_pipeline_folder)))
    by_torch, by_openvino = both(quiet(LDMPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)))
    assert np.abs(by_torch - by_openvino).mean() < 2 * max(np.abs(by_torch - whole).mean(), LEVEL / 2)


def test_an_interval_asks_for_half_the_rows_outside(pipe: LDMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps are at t = 999, 799, 599, 399, 199."""
    pipe.enable_openvino()
    seen: list[int] = []
    assert pipe.engine is not None
    network = pipe.engine._unet(pipe.unet)
    ask = type(network).__call__

    def counted(self: Any, inputs: Any) -> Tensor:
        seen.extend([len(inputs["sample"])] if self is network else [])
        return ask(self, inputs)

    monkeypatch.setattr(type(network), "__call__", counted)
    draw(pipe, ["cat", "pizza"], num_inference_steps=5, guidance_interval=(0.3, 0.7))
    assert seen == [2, 2, 4, 4, 2]


def test_a_classifier_steers_it_too(pipe: LDMPipeline) -> None:
    torch.manual_seed(0)
    classifier: NoisyClassifier = build_classifier(
        ClassifierConfig(channels=(16, 32), layers=1),
        latent_shape=(4, 8, 8),
        names=["cat", "dog"],
        schedule=NoiseSchedule.scaled_linear(),
    ).eval()
    with torch.no_grad():
        for weight in classifier.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    told = {"classifier": classifier, "class_label": "dog", "classifier_scale": 5.0}
    by_torch, by_openvino = both(pipe, **told)
    assert np.abs(by_torch - by_openvino).max() < LEVEL
    assert np.abs(draw(pipe) - by_openvino).max() > 5 * LEVEL


# --- the networks stay what they were ----------------------------------------------------------------------


def test_what_is_saved_is_saved_as_it_was(pipe: LDMPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "before")
    draw(pipe.enable_openvino())
    assert pipe.unet.forward.__func__ is type(pipe.unet).forward
    pipe.save_pretrained(tmp_path / "after")
    files = [path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert all((tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes() for file in files)
    by_torch = draw(pipe.disable_openvino())
    assert np.array_equal(by_torch, draw(quiet(LDMPipeline.from_pretrained(tmp_path / "after"))))


def test_a_failure_leaves_torch_in_place(pipe: LDMPipeline) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    pipe.enable_openvino()
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=fail)
    assert np.array_equal(draw(pipe.disable_openvino()), draw(LDMPipeline(**pipe.components)))


def test_what_it_cant_compute_is_refused_by_name(pipe: LDMPipeline) -> None:
    pipe.enable_openvino()
    with pytest.raises(ValueError, match="cross_attention_kwargs: the OpenVINO engine doesn't support it"):
        draw(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    with pytest.raises(ValueError, match="openvino: doesn't support FreeU"):
        draw(pipe)
    pipe.disable_freeu()
    pipe.vae.enable_tiling()
    with pytest.raises(ValueError, match="openvino: doesn't support VAE tiling"):
        draw(pipe)
    pipe.vae.disable_tiling()
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="openvino: doesn't support active adapters"):
        draw(pipe)
    pipe.unet.disable_adapters()
    assert draw(pipe).std() > 0.01
    with pytest.raises(ValueError, match="openvino: computes in float32 or bfloat16, not in float16"):
        draw(pipe.to(torch.float16))
    with pytest.raises(ValueError, match="openvino: computes on the CPU, but the pipeline is on meta"):
        pipe.to("meta").enable_openvino()


# --- the cache -------------------------------------------------------------------------------------------


def test_changed_weights_are_another_entry(pipe: LDMPipeline, home: Path) -> None:
    before = draw(pipe.enable_openvino())
    kept = entries(home)
    draw(pipe.enable_openvino())
    assert entries(home) == kept
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight[0, 0] += 0.1
    changed = draw(pipe)  # nobody says that they have changed
    assert len(set(entries(home)) - set(kept)) == 1
    assert np.abs(changed - before).max() > 3 * LEVEL
    assert np.abs(changed - draw(pipe.disable_openvino())).max() < LEVEL


class Doubles(torch.nn.Module):
    """A network whose conversion takes no time: 2 x."""

    config: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1, 4), 2.0))


def doubles(told: list[str], computes: Any = lambda network, x: x * network.weight) -> bool:
    """Whether the converted network doubles; what was said is added to `told`."""
    model = converted(Doubles(), "doubler", computes, {"x": torch.ones(1, 4)}, told.append)
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    return np.array_equal(core().compile_model(model, "CPU")([rows])[0], 2 * rows)


@pytest.mark.parametrize("damage", ["a bit", "the end", "network.bin", "network.xml", "manifest.json"])
def test_a_damaged_entry_is_made_anew(empty: Path, damage: str) -> None:
    told: list[str] = []
    assert doubles(told) and doubles(told)
    assert len(told) == 1 and told[0].startswith("converting the doubler for OpenVINO")
    (entry,) = entries(empty)
    path = entry / ("network.bin" if " " in damage else damage)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if " " in damage:
        path.write_bytes(content if damage == "a bit" else content[:-1])
    assert doubles(told) and doubles(told)
    assert len(told) == 3 and "it is made anew" in told[1]


def test_a_cache_may_be_deleted_while_it_is_used_and_need_not_exist(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    model = converted(Doubles(), "doubler", lambda network, x: x * network.weight, {"x": torch.ones(1, 4)}, told.append)
    shutil.rmtree(empty)
    assert core().compile_model(model, "CPU")([np.ones((1, 4), np.float32)])[0].tolist() == [[2, 2, 2, 2]]
    (empty.parent / "file").parent.mkdir(parents=True, exist_ok=True)
    (empty.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty.parent / "file"))
    assert doubles(told) and "the converted doubler can't be kept" in told[1]


def test_a_full_disk_is_told(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO's own error for one, as a disk of 2 MiB gave it."""
    openvino, told = load_openvino(), []
    save = openvino.save_model

    def full(model: Any, path: Path, **words: Any) -> None:
        if empty in Path(path).parents:
            raise RuntimeError("basic_ios::clear: iostream error")
        save(model, path, **words)

    monkeypatch.setattr(openvino, "save_model", full)
    assert doubles(told)  # type: ignore[arg-type]
    assert "iostream error" in told[1] and not entries(empty)


CONVERT = """
import sys, time
sys.path[:0] = sys.argv[1:4]
from test_openvino import doubles
def slow(network, x):
    print("converting", flush=True)
    time.sleep(float(sys.argv[4]))
    return x * network.weight
told = []
print("ready", flush=True)
sys.stdin.readline()
assert doubles(told, slow)
print(len(told), flush=True)
"""


def process(seconds: float) -> subprocess.Popen[str]:
    """A process that converts when it is told to, and takes its time."""
    places = [road.ROOT, road.ROOT / "tests", Path(__file__).parent]
    words = [sys.executable, "-c", CONVERT, *map(str, places), str(seconds)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, **pipes)


def go(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == "ready\n", child.communicate()
    child.stdin.write("\n")
    child.stdin.flush()


def test_processes_convert_once_and_one_that_is_killed_harms_none(empty: Path) -> None:
    children = [process(60), process(0.3), process(0.3)]
    go(children[0])
    assert children[0].stdout is not None and children[0].stdout.readline() == "converting\n"
    children[0].kill()
    children[0].communicate()
    assert list(empty.glob("*.new")), "it was killed too early or too late"
    for child in children[1:]:
        go(child)
    said = [child.communicate(timeout=120) for child in children[1:]]
    assert [child.returncode for child in children[1:]] == [0, 0], said
    assert sorted(lines.splitlines()[-1] for lines, _ in said) == ["0", "1"], "both converted it"
    assert len(entries(empty)) == 1 and not list(empty.glob("*.new"))


def test_nobody_is_told_that_it_is_used(tmp_path: Path) -> None:
    """`import openvino` alone tells Google Analytics, once a person hasn't said no, and keeps an id in ~/intel."""
    code = (
        "import sys; from ldm.inference.openvino_cache import load_openvino; load_openvino(); "
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])"
    )
    words = {"HOME": str(tmp_path), "PYTHONPATH": str(road.ROOT)}
    kept = {key: value for key, value in os.environ.items() if key not in ("CI", "HOME")}
    done = subprocess.run([sys.executable, "-c", code], env={**kept, **words}, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    assert not (tmp_path / "intel").exists()


# --- the recipe ------------------------------------------------------------------------------------------


def test_a_picture_is_drawn_again_byte_for_byte(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--steps", "3", "--images-per-prompt", "2", "--each", str(tmp_path / "each"), "--engine", "openvino"]
    main(["sample", str(tiny_pipeline_folder), "red heart", *words])
    picture = tmp_path / "each/00001-red-heart.png"
    said = recipe.read(picture)
    assert said.engine == "openvino" and said.drawn_with["openvino"].startswith("20")
    again = ["sample", "--like", str(picture), str(tiny_pipeline_folder), "--out", str(tmp_path / "again.png")]
    code = f"import sys; sys.path.insert(0, {str(road.ROOT)!r}); from ldm.cli.main import main; main({again!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "the same picture, byte for byte" in done.stdout, done.stderr
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="was made with OpenVINO, which is not installed; pip install openvino, or"):
        main(again)
    capsys.readouterr()
    main([*again, "--engine", "torch"])
    assert "not the same file:\n  engine: openvino then, torch now" in capsys.readouterr().out
    drawn = [np.asarray(Image.open(path)).astype(int) for path in (picture, tmp_path / "again.png")]
    assert np.abs(drawn[0] - drawn[1]).mean() < 2


def test_torch_draws_unless_asked_and_unknown_engines_are_refused(
    pipe: LDMPipeline, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    main(["sample", str(tiny_pipeline_folder), "cat", "--steps", "2", "--out", str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as picture:
        said = json.loads(picture.info[recipe.KEY])
        assert "engine" not in said and "openvino" not in said["drawn_with"]
        picture.info[recipe.KEY] = json.dumps({**said, "engine": "os.system"})
        recipe.save(picture, tmp_path / "b.png")
    with pytest.raises(SystemExit, match="its settings: engine: expected torch or openvino, got 'os.system'"):
        main(["sample", "--like", str(tmp_path / "b.png"), str(tiny_pipeline_folder)])


def test_the_page_takes_it_where_it_is_installed(
    tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gradio = pytest.importorskip("gradio")
    assert gradio
    from ldm.app import page as app

    assert app.load(str(tiny_pipeline_folder), "auto").engine is not None
    assert app.load(str(tiny_pipeline_folder), "torch").engine is None

    def refuse(self: Any, pipeline: Any) -> None:
        raise ValueError("openvino: can't convert the U-Net")

    monkeypatch.setattr(OpenVINO, "prepare", refuse)
    assert app.load(str(tiny_pipeline_folder), "auto").engine is None
    assert "openvino: can't convert the U-Net; using torch" in capsys.readouterr().err
    with pytest.raises(ValueError, match="can't convert"):
        app.load(str(tiny_pipeline_folder), "openvino")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert app.load(str(tiny_pipeline_folder), "auto").engine is None
