"""`~` is the home folder wherever a path is taken: a shell leaves it in `run=~/x`, `--out=~/x` and YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import road

from ldm.cli.config import parse_config
from ldm.cli.main import build_parser, main
from ldm.models.text_encoder import TextConfig
from ldm.training.config import Config, DataConfig

KEYS = {
    "run": "~/runs/mine",
    "vae": "~/vae",
    "data.source": "~/pictures",
    "data.cache": "~/cache",
    "text.encoder": "~/clip",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def values(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in KEYS:
        section, _, name = key.rpartition(".")
        found[key] = getattr(getattr(config, section) if section else config, name)
    return found


def test_keys_of_a_config(home: Path) -> None:
    expected = {key: str(home / value[2:]) for key, value in KEYS.items()}
    lines = ["run: ~/runs/mine", "vae: ~/vae", "data: {source: ~/pictures, cache: ~/cache}", "text: {encoder: ~/clip}"]
    (home / "recipe.yaml").write_text("\n".join(lines))
    assert values(parse_config(["--config", "~/recipe.yaml"])) == expected
    assert values(parse_config(["--config=~/recipe.yaml"])) == expected
    assert values(parse_config([f"{key}={value}" for key, value in KEYS.items()])) == expected
    assert values(Config("~/runs/mine", vae="~/vae", data=DataConfig("~/pictures", cache="~/cache"),
                         text=TextConfig("~/clip"))) == expected  # fmt: skip


def test_what_is_no_path_of_the_home_folder_stays(home: Path) -> None:
    for source in ("owner/name", "shards/{000..007}.tar", "hf://datasets/a/b", "a~b"):
        assert parse_config([f"data.source={source}"]).data.source == source
    assert parse_config(["vae=stabilityai/sd-vae-ft-mse"]).vae == "stabilityai/sd-vae-ft-mse"
    assert [parse_config([f"data.cache={word}"]).data.cache for word in ("auto", "off")] == ["auto", "off"]
    assert parse_config(["text.encoder=null", "data.caption_columns=[]"]).text.encoder is None


@pytest.mark.parametrize(
    "written", ["pictures", "pictures/", "./pictures", "././pictures//", "~/../elsewhere/./pictures"]
)
def test_a_source_has_one_spelling(written: str, home: Path) -> None:
    """Else a run could not be resumed with another one."""
    expected = f"{home}/../elsewhere/pictures" if "~" in written else "pictures"
    assert parse_config([f"data.source={written}"]).data.source == expected


PATHS = {
    "data openmoji ~/x": "out",
    "data emoji ~/x": "out",
    "data scenes ~/x": "out",
    "data caption ~/x --from names": "folder",
    "data dedupe ~/x": "folder",
    "data check ~/x": "source",
    "data cache ~/x": "folder",
    "sample ~/x": "model",
    "sample m --out=~/x.png": "out",
    "sample m --each=~/x": "each",
    "sample m --like=~/x.png": "like",
    "sample m --condition=~/x.png": "condition",
    "sample m --classifier=~/x": "classifier",
    "sample m --weaker=~/x": "weaker",
    "edit ~/x a.png": "model",
    "edit m ~/x.png": "picture",
    "edit m a.png --mask=~/x.png": "mask",
    "edit m a.png --out=~/x.png": "out",
    "edit m a.png --each=~/x": "each",
    "upscale ~/x a.png": "model",
    "upscale m ~/x.png": "pictures",
    "upscale m a.png --out=~/x": "out",
    "walk ~/x": "model",
    "walk m --out=~/x.gif": "out",
    "evaluate ~/x": "model",
    "evaluate m --data=~/x": "data",
    "evaluate m --base=~/x": "base",
    "evaluate m --out=~/x": "out",
    "evaluate m --report=~/x.html": "report",
    "evaluate m --features ~/x": "features",
    "evaluate m --features inception=~/x.safetensors": "features",
    "evaluate m --net=~/x": "net",
    "evaluate m --net-text=~/x": "net_text",
    "compare ~/x b": "a",
    "compare a ~/x": "b",
    "compare a b --data=~/x": "data",
    "compare a b --out=~/x": "out",
    "compare a b --features ~/x": "features",
    "compare a b --net=~/x": "net",
    "export ~/x out": "model",
    "export m ~/x": "out",
    "export m o --upscaler=~/x": "upscaler",
    "push ~/x a/b --license l --data d --data-license l": "model",
    "push m a/b --license l --data d --data-license l --evaluation=~/x": "evaluation",
    "push m a/b --license l --data d --data-license l --dry-run=~/x": "dry_run",
    "app --model=~/x": "model",
}


@pytest.mark.parametrize("words", PATHS)
def test_arguments_of_commands(words: str, home: Path) -> None:
    found = getattr(build_parser().parse_args(words.split()), PATHS[words])
    text = str(found[0] if isinstance(found, list) else found).removeprefix("inception=")
    assert text.startswith(f"{home}/x")


def test_every_path_of_every_command_is_in_the_list() -> None:
    """An argument that mentions a folder, file, model or picture takes ~."""
    listed = {(words.split()[0], name) for words, name in PATHS.items()}
    parser = build_parser()
    for name, command in parser._subparsers._group_actions[0].choices.items():  # type: ignore[union-attr]
        for action in command._actions:
            if action.metavar in ("FOLDER", "FILE", "PICTURE", "RUN_OR_MODEL", "MODEL", "SOURCE", "NET", "ENCODER"):
                assert (name, action.dest) in listed, f"{name}: {action.dest}"


def test_a_run_in_the_home_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    road.draw_folder(home / "pictures")
    main(["data", "check", "~/pictures"])
    assert "is fine: 24 pictures" in capsys.readouterr().out
    with pytest.raises(SystemExit) as printed:
        main(["train", "vae", "run=~/runs/mine", "data.source=~/pictures/", "--print_config"])
    assert printed.value.code == 0
    assert list(Path().iterdir()) == []  # no folder named ~
