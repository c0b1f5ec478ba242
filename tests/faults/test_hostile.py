"""What strangers hand over is refused with words, and never run.

Configs, model folders, prompts, arguments and requests, malformed or made to do harm (data sets: tests/bad_data.py).
Each must end in a ValueError or OSError that names the file, key or argument, or in exit status 1 or 2 and one line;
none may create the canary, which every payload would.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
import tiny
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm import LDMPipeline
from ldm.cli import main as cli
from ldm.cli.config import parse_config
from ldm.diffusion.schedule import NoiseSchedule
from ldm.evaluation.features import load_extractor
from ldm.models.classifier import ClassifierConfig, NoisyClassifier, build_classifier
from ldm.models.safety import COMPONENTS, check_index, check_model_folder
from ldm.models.text_encoder import TextConfig, TextEncoder
from ldm.models.vae import load_vae
from ldm.pipelines.inputs import check_prompts
from ldm.system import plain_yaml
from ldm.training.config import Config

ROOT = Path(__file__).parent.parent.parent
NOWHERE = Path("/tmp/ldm-canary-nowhere")  # for the names of the kinds; the tests use their own
CONFIGS = sorted(hostile.configs(NOWHERE))
PIPELINES = sorted(hostile.pipelines(NOWHERE, NOWHERE))
quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """The file that payloads create; it must not be there when a test ends."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a payload was run"


def test_the_payloads_work(tmp_path: Path) -> None:
    for run in (
        lambda path: pickle.loads(hostile.pickled(path)),
        lambda path: exec(hostile.source(path), {}),
        lambda path: yaml.unsafe_load(hostile.configs(path)["python call"].decode()),
    ):
        assert not (tmp_path / "canary").exists()
        run(tmp_path / "canary")
        (tmp_path / "canary").unlink()


def test_there_are_many_kinds() -> None:
    assert len(CONFIGS) >= 60
    assert len(PIPELINES) >= 60


# --- configs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_hostile_config_is_refused_in_one_line(
    kind: str, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(hostile.configs(canary)[kind])
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--config", str(file)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert len(said.splitlines()) == 1 and "error: " in said and len(said) < 800
    assert said.isprintable() or said.rstrip("\n").isprintable()


def test_the_command_refuses_it_as_well(canary: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(hostile.configs(canary)["python call"])
    command = [sys.executable, "train/train_ldm.py", "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "tags (tag:yaml.org,2002:python" in done.stderr


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = st.sampled_from(["run", "seed", "vae", "data", "optim", "loop", "text", "unet", "diffusion", "evil"])


@quickly
@given(said=st.dictionaries(SECTIONS, VALUES, max_size=3) | VALUES)
def test_any_yaml_is_a_config_or_one_line(said: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(said), "utf-8", errors="surrogatepass")
    try:
        assert isinstance(parse_config(["--config", str(file)]), Config)
    except SystemExit as stopped:
        assert stopped.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@quickly
@given(text=st.text(max_size=200))
def test_any_text_is_plain_yaml_or_an_error_of_yaml(text: str) -> None:
    try:
        plain_yaml.load(text)
    except yaml.YAMLError as error:
        assert len(str(error).splitlines()) == 1


# --- model folders -------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("{}")
    return tmp_path / "outside"


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_hostile_pipeline_is_refused_by_name(
    kind: str, canary: Path, outside: Path, tmp_path: Path, tiny_pipeline_folder: Path
) -> None:
    harm, named = hostile.pipelines(canary, outside)[kind]
    folder = shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline")
    check_model_folder(folder)  # it is good before
    harm(folder)
    before = set(sys.modules)
    with pytest.raises((ValueError, OSError)) as refused:
        LDMPipeline.from_pretrained(folder)
    assert named in str(refused.value)
    assert not [name for name in set(sys.modules) - before if "evil" in name]


@pytest.mark.parametrize("name", ["custom_pipeline", "trust_remote_code", "use_flashpack"])
def test_no_argument_lets_code_in(name: str, tiny_pipeline_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}: "):
        LDMPipeline.from_pretrained(tiny_pipeline_folder, **{name: "evil"})


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
@pytest.mark.parametrize("kind", ["auto_map", "pickle", "link", "attention", "cut", "short"])
def test_other_models_are_checked_by_the_same_hand(
    part: str, kind: str, canary: Path, outside: Path, tmp_path: Path, tiny_pipeline_folder: Path
) -> None:
    folder = shutil.copytree(tiny_pipeline_folder / part, tmp_path / "model")
    if part == "text_encoder":
        shutil.copytree(tiny_pipeline_folder / "tokenizer", folder, dirs_exist_ok=True)
    (file,) = (path.name for path in folder.glob("*.safetensors"))
    (folder / "evil.py").write_text(hostile.source(canary))
    {
        "auto_map": hostile.edit("config.json", auto_map={"AutoModel": "evil.Net", "AutoConfig": "evil.Config"}),
        "pickle": hostile.write(file, hostile.pickled(canary)),
        "link": hostile.link(file, outside / "secret"),
        "attention": hostile.edit("config.json", _attn_implementation="evil/kernel"),
        "cut": hostile.write("config.json", "{"),
        "short": hostile.reweigh(file, hostile.one_less),
    }[kind](folder)
    loads: list[Any] = [lambda: load_vae(folder)]
    if part == "text_encoder":
        loads = [
            lambda: TextEncoder.load(TextConfig(str(folder), tiny.MAX_LENGTH)),
            lambda: load_extractor(str(folder), tiny.SIZE, "cpu"),  # type: ignore[arg-type]
        ]
    for load in loads:
        with pytest.raises((ValueError, OSError)) as refused:
            load()
        assert str(folder) in str(refused.value)


def test_a_hostile_classifier_is_refused(canary: Path, tmp_path: Path) -> None:
    (tmp_path / "scheduler_config.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Net"}}))
    (tmp_path / "evil.py").write_text(hostile.source(canary))
    with pytest.raises(ValueError, match="auto_map"):
        NoisyClassifier.load(tmp_path)


def test_a_classifier_without_all_of_its_weights_is_refused(tmp_path: Path) -> None:
    whole = build_classifier(ClassifierConfig((8, 16), 1), latent_shape=(4, 8, 8), names=["a", "b"],
                             schedule=NoiseSchedule.linear())  # fmt: skip
    whole.save(tmp_path)
    assert NoisyClassifier.load(tmp_path).names == ("a", "b")
    hostile.reweigh("model.safetensors", hostile.one_less)(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors: its weights are not those .* it lacks classifier.bias"):
        NoisyClassifier.load(tmp_path)


def test_a_snapshot_of_the_hub_is_a_folder_of_links(tmp_path: Path, tiny_pipeline_folder: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/123"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in tiny_pipeline_folder.rglob("*") if path.is_file())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.relative_to(tiny_pipeline_folder)).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path.relative_to(tiny_pipeline_folder)).symlink_to(blobs / str(number))
    check_model_folder(snapshot)
    assert load_vae(snapshot).config.latent_channels == 4  # one of its components alone
    (snapshot / "unet/config.json").unlink()
    (snapshot / "unet/config.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"unet/config.json: leads out"):
        check_model_folder(snapshot)


@quickly
@given(index=st.dictionaries(st.sampled_from([*COMPONENTS, "_class_name", "evil"]), VALUES, max_size=4) | VALUES)
def test_any_index_is_refused_or_names_known_classes(index: Any, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    try:
        check_index(tmp_path / "model_index.json")
    except ValueError as error:
        assert "model_index.json: " in str(error)
    else:
        assert all(index.get(name) in (None, [None, None]) for name in COMPONENTS)


@quickly
@given(data=st.binary(max_size=200))
def test_any_bytes_are_safetensors_or_an_error_that_names_them(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors: expected whole safetensors"):
        check_model_folder(tmp_path)


# --- prompts and arguments -----------------------------------------------------------------------------

ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": 5}),
    ("prompt", {"prompt": b"cat"}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [["cat"]]}),
    ("prompt", {"prompt": ["cat", None]}),
    ("prompt", {"prompt": "c\0t"}),
    ("prompt", {"prompt": "\x1b[2Jcat"}),
    ("prompt", {"prompt": "\ud800"}),
    ("prompt", {"prompt": "cat " * 1000}),
    ("prompt", {"prompt": "x" * 10_000_000}),
    ("prompt", {"prompt": "<script>alert(1)</script>" * 50}),
    ("negative_prompt", {"negative_prompt": "c\0t"}),
    ("negative_prompt", {"negative_prompt": "\udfff"}),
    ("negative_prompt", {"negative_prompt": {"a": 1}}),
    ("num_inference_steps", {"num_inference_steps": 0}),
    ("num_inference_steps", {"num_inference_steps": -1}),
    ("num_inference_steps", {"num_inference_steps": 10**9}),
    ("num_inference_steps", {"num_inference_steps": 1.5}),
    ("num_inference_steps", {"num_inference_steps": "5"}),
    ("num_inference_steps", {"num_inference_steps": True}),
    ("guidance_scale", {"guidance_scale": math.nan}),
    ("guidance_scale", {"guidance_scale": math.inf}),
    ("guidance_scale", {"guidance_scale": -1}),
    ("guidance_scale", {"guidance_scale": 10**400}),
    ("num_images_per_prompt", {"num_images_per_prompt": 0}),
    ("num_images_per_prompt", {"num_images_per_prompt": 10**9}),
    ("height", {"height": 30}),
    ("height", {"height": -16}),
    ("height", {"height": 10**9}),
    ("width", {"width": 1.5}),
    ("width", {"width": "16"}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": 2**64}),
    ("seed", {"seed": 1.5}),
    ("seed", {"seed": "7"}),
    ("seed", {"seed": [1, 2, 3]}),
    ("generator", {"generator": "evil", "seed": None}),
    ("class_label", {"class_label": "food"}),
    ("condition", {"condition": "/etc/passwd"}),
    ("classifier_scale", {"classifier_scale": math.nan}),
    ("eta", {"eta": math.nan}),
    ("evil", {"evil": 1}),
]


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_folder: Path) -> LDMPipeline:
    pipe = LDMPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("named", "arguments"), ARGUMENTS, ids=[f"{n}-{a[0]}" for n, a in enumerate(ARGUMENTS)])
def test_hostile_arguments_are_refused_before_the_network_runs(
    named: str, arguments: dict[str, Any], pipe: LDMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe.unet, "forward", lambda *_, **__: pytest.fail("the network ran"))
    with pytest.raises((ValueError, TypeError), match=f"^{named}: ") as refused:
        pipe(**{"prompt": "cat", "num_inference_steps": 1, "seed": 0, **arguments})
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "prompt", ["\u202ecat", "\u202e" * 1000, "<b>cat</b>", "../../cat", "%s{0}", "", "\U0001f408", "cat\n\tcat"]
)
def test_strange_but_honest_prompts_are_drawn(prompt: str, pipe: LDMPipeline) -> None:
    assert pipe(prompt, num_inference_steps=1, seed=0).images[0].size == (tiny.SIZE, tiny.SIZE)


@quickly
@given(prompt=st.text(st.characters(codec=None), max_size=40) | VALUES)
def test_any_prompt_is_taken_or_refused_by_name(prompt: Any, pipe: LDMPipeline) -> None:
    try:
        texts = check_prompts("prompt", prompt, pipe.tokenizer)
    except ValueError as error:
        assert str(error).startswith("prompt: ")
    else:
        pipe.tokenizer(texts)


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "MODEL", "c\0t"],
        ["sample", "MODEL", "\udcff"],
        ["sample", "MODEL", "cat " * 1000],
        ["sample", "MODEL", "cat", "--steps", "0"],
        ["sample", "MODEL", "cat", "--steps", "1e9"],
        ["sample", "MODEL", "cat", "--guidance-scale", "nan"],
        ["sample", "MODEL", "cat", "--images-per-prompt", "0"],
        ["sample", "MODEL", "cat", "--seed", "-1"],
        ["sample", "MODEL", "cat", "--seed", "9" * 5000],
        ["sample", "MODEL", "cat", "dog", "--steps", "1", "--columns", "0"],
        ["sample", "MODEL", "cat", "--classifier", "/etc"],
        ["sample", "MODEL", "cat", "--steps", "1", "--out", "/dev/null/x.png"],
        ["sample", "/etc", "cat"],
        ["sample", "/etc/passwd", "cat"],
        ["sample", "\0", "cat"],
        ["sample", "../../evil", "cat"],
        ["sample", "evil/evil", "cat"],
        ["sample", "n" * 5000, "cat"],
        ["evaluate", "/etc"],
        ["evaluate", "\0"],
        ["evaluate", "MODEL", "--data", "/dev/null"],
        ["data", "check", "/etc/passwd"],
        ["data", "check", "\0"],
        ["data", "check", "n" * 5000],
        ["data", "cache", "/dev/null"],
        ["data", "cache", "\0"],
        ["data", "openmoji", "/dev/null/out", "--size", "16"],
        ["data", "openmoji", "out", "--size", "-1"],
        ["doctor", "--config", "/etc/passwd"],
        ["doctor", "--config", "\0", "data.source=/dev/null"],
        ["doctor", "--config", "dmo"],
        ["train", "evil"],
        ["train", "ldm", "--config", "/etc/passwd"],
        ["train", "vae", "--config", "\0"],
        ["train", "ldm", "loop.steps=" + "9" * 5000],
        ["sample", "MODEL", "cat", "--sampler", "evil"],
        ["sample", "MODEL", "cat", "--batch-size", "9" * 5000],
        ["sample", "MODEL", "cat", "--out", "x.gif"],
        ["sample", "MODEL", "cat", "--out", "\0.png"],
        ["sample", "MODEL", "cat", "--each", "\0"],
        ["sample", "MODEL", "--like", "/etc/passwd"],
        ["sample", "--like", "\0"],
        ["sample", "MODEL", "cat", "--condition", "/etc/passwd"],
        ["export", "MODEL", "/dev/null/out"],
        ["push", "MODEL", "evil", "--license", "l", "--data", "d", "--data-license", "l", "--dry-run", "/dev/null/x"],
        ["app", "--model", "/etc"],
        ["app", "--model", "MODEL", "--port", "99999"],
        ["app", "--model", "MODEL", "--host", "192.0.2.1"],
        ["app", "--model", "MODEL", "--host", "h" * 5000],
        ["evil"],
        [],
    ],
    ids=lambda words: " ".join(words)[:40].encode("ascii", "replace").decode().replace("\0", "0"),
)
def test_hostile_words_end_in_words(
    words: list[str],
    tiny_pipeline_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(tiny_pipeline_folder) if word == "MODEL" else word for word in words])
    said = str(stopped.value.code) if isinstance(stopped.value.code, str) else capsys.readouterr().err
    assert "error: " in said and "Traceback" not in said
    assert stopped.value.code == 2 or len(said.splitlines()) == 1


# --- the page ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(pipe: LDMPipeline) -> Iterator[str]:
    gradio = pytest.importorskip("gradio")
    from ldm.app.page import SERVING, build_page

    _, url, _ = build_page(pipe).launch(prevent_thread_lock=True, quiet=True, **SERVING)
    yield url.rstrip("/")
    gradio.close_all(verbose=False)


def status(url: str, data: Any = None) -> tuple[int, str]:
    """The status and the text that the server answers with."""
    body = None if data is None else json.dumps(data).encode("utf-8", "surrogatepass")
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")


def test_the_page_serves_no_file_that_it_did_not_make(address: str, tiny_pipeline_folder: Path) -> None:
    model = str(tiny_pipeline_folder / "model_index.json")
    names = ["/etc/passwd", model, str(ROOT / "app.py"), "app.py", "../../../etc/passwd", "/etc/../etc/passwd",
             "..%2f..%2fetc%2fpasswd", "/proc/self/environ", "file:///etc/passwd", "//etc/passwd", "\\etc\\passwd",
             f"{ROOT}/configs/../app.py", "C:/windows/win.ini", "\0", "/etc/passwd\0.png"]  # fmt: skip
    for name in names:
        for quoted in (urllib.parse.quote(name), urllib.parse.quote(name, safe="")):
            code, text = status(f"{address}/gradio_api/file={quoted}")
            assert code in (400, 403, 404, 422), (name, code)
            assert "root:" not in text and "_class_name" not in text and "import" not in text


@pytest.mark.parametrize(
    "changed",
    [
        {0: "c\0t"},
        {0: "x" * 1_000_000},
        {4: 10**9},
        {4: -5},
        {4: "many"},
        {5: 1e9},
        {6: 1000},
        {6: 0},
        {7: -1},
        {7: 2**70},
        {1: "evil"},
        {2: {"path": "/etc/passwd"}},
        {2: {"url": "http://127.0.0.1:1/evil", "path": "x"}},
    ],
    ids=str,
)
def test_the_server_enforces_its_limits_itself(address: str, changed: dict[int, Any], pipe: LDMPipeline) -> None:
    data: list[Any] = ["cat", None, None, "", 1, 3.0, 1, 1, False]
    for place, value in changed.items():
        data[place] = value
    code, text = status(f"{address}/gradio_api/call/generate", {"data": data})
    if code == 200:
        code, text = status(f"{address}/gradio_api/call/generate/{json.loads(text)['event_id']}")
        assert "event: error" in text, text[:500]
    assert "Traceback" not in text and "root:" not in text
