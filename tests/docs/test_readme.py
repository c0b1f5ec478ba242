"""What README and docs/ tell people to type works as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import road
from PIL import Image

from ldm import LDMPipeline
from ldm.cli.config import parse_config
from ldm.cli.main import build_parser
from ldm.models.fingerprint import base_fingerprints
from ldm.models.lora import (
    NAME,
    LoRAConfig,
    LoRAFacts,
    adapter_weights,
    add_adapters,
    save_adapters,
)

README = (road.ROOT / "README.md").read_text("utf-8")
TOP = [road.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
PAGES = {str(path.relative_to(road.ROOT)): path.read_text("utf-8") for path in [*TOP, *road.ROOT.glob("docs/*.md")]}
BLOCKS = {name: re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}
SCRIPTS = [block for blocks in BLOCKS.values() for block in blocks if "#SBATCH" in block]
COMMANDS = {  # a command on two pages is one test
    " ".join(words): words
    for blocks in BLOCKS.values()
    for block in blocks
    if block not in SCRIPTS
    for line in block.splitlines()
    if (words := shlex.split(line, comments=True))
}
OVERRIDES = re.findall(r"^\| .*?\| `([a-z_.]+=[^`]+)`", PAGES["docs/training.md"], re.MULTILINE)


def parse_recipe(words: list[str]) -> None:
    """Parse the arguments of a training; recipes of the repository are found from any folder."""
    parse_config([str(road.ROOT / word) if word.startswith("configs/") else word for word in words])


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_command(words: list[str]) -> None:
    """Every command is one that its program understands."""
    match words:
        case ["make", *targets]:
            assert subprocess.run(["make", "--dry-run", *targets], cwd=road.ROOT, capture_output=True).returncode == 0
        case ["ldm", "train", "vae" | "ldm" | "classifier", "--help"]:
            pass  # tests/cli runs it
        case ["ldm", "train", "vae" | "ldm" | "classifier" as task, *rest]:
            build_parser().parse_args(["train", task, *rest])
            parse_recipe([word for word in rest if word != "--print_config"])
        case ["ldm", "doctor", *rest]:
            build_parser().parse_args(["doctor", *rest])
            parse_recipe(rest)
        case ["ldm", *rest]:
            build_parser().parse_args(rest)
        case ["accelerate", "launch", *rest]:
            script = next(i for i, word in enumerate(rest) if word.endswith(".py"))
            assert (road.ROOT / rest[script]).exists()
            parse_recipe(rest[script + 1 :])
        case ["python", "app.py", *rest]:
            helped = subprocess.run([sys.executable, "app.py", "--help"], cwd=road.ROOT, capture_output=True, text=True)
            assert helped.returncode == 0
            assert all(word in helped.stdout for word in rest if word.startswith("--"))
        case ["pytest", *files]:
            assert all((road.ROOT / file).exists() for file in files)
        case [".", ".venv/bin/activate"]:
            pass
        case _:
            assert words[:3] == ["pip", "install", "-e"]
            extras = re.findall(r"\[(.*)\]", words[3])[0].split(",")
            assert all(f"\n{extra} = [" in (road.ROOT / "pyproject.toml").read_text("utf-8") for extra in extras)


def test_every_program_is_shown() -> None:
    assert {words[0] for words in COMMANDS.values()} == {"make", "ldm", "accelerate", "pip", "pytest", "."}


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_script_parses(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


@pytest.mark.parametrize("words", OVERRIDES)
def test_override_in_the_table(words: str) -> None:
    parse_recipe(["--config", "configs/demo.yaml", *words.split()])


def test_there_are_overrides_in_the_table() -> None:
    assert len(OVERRIDES) >= 10


def in_checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in `folder`, from which models/ can be read as in a checkout."""
    monkeypatch.chdir(folder)
    (folder / "models").symlink_to(road.ROOT / "models")


def test_readme_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lines,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    in_checkout(tmp_path, monkeypatch)
    exec(lines, {})
    assert Image.open(tmp_path / "red_heart.png").size == (256, 256)


def test_generation_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page promises that its last lines, stock diffusers, generate what the call above them does."""
    blocks = re.findall(r"```python\n(.*?)```", PAGES["docs/generation.md"], re.DOTALL)
    in_checkout(tmp_path, monkeypatch)
    save_untrained_lora(tmp_path / "runs/ink/lora")
    names: dict[str, list[Image.Image]] = {}
    for block in blocks:
        exec(block, names)
    assert names["ours"] and [p.tobytes() for p in names["ours"]] == [p.tobytes() for p in names["stock"]]


def save_untrained_lora(folder: Path) -> None:
    """Adapters of the shipped model that change nothing, since their second matrices are zero."""
    unet = LDMPipeline.from_pretrained(road.ROOT / "models/emoji").unet
    facts = LoRAFacts("openmoji64", base_fingerprints(unet))
    add_adapters(unet, None, LoRAConfig(rank=1))
    save_adapters(folder, adapter_weights(unet), {}, {"unet": unet.peft_config[NAME]}, facts)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    """A path in the text is one of the repository, or below ldm/ or tests/."""
    folders = "|".join(path.name for top in ("", "ldm", "tests") for path in (road.ROOT / top).glob("[a-z]*/"))
    named = re.findall(rf"(?<![\w/.])((?:{folders})/[\w/.*-]*\.(?:py|yaml|sh|txt))", PAGES[page])
    assert not [
        name for name in set(named) if not any(list((road.ROOT / top).glob(name)) for top in ("", "ldm", "tests"))
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_page_opens_with_its_use(page: str) -> None:
    title, _, rest = PAGES[page].partition("\n\n")
    assert title.startswith("# ") and rest.startswith("After this page you ")


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return {
        re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#]*)#?([^)]*)\)", PAGES[page]):
        file = (road.ROOT / page).parent / target if target else road.ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), f"{page} links to {target}#{anchor}"
