"""The command line: YAML below, words above, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ldm.cli.config import keys, parse_config
from ldm.training.config import Config, to_dict

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command line says, in one line, as it refuses these words."""
    with pytest.raises(SystemExit) as stopped:
        parse_config(words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_one_word_in_place_of_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["data.caption_columns=title"])
    expected = "error: data.caption_columns: expected a list, as data.caption_columns=[title], got title"
    assert expected in capsys.readouterr().err


def test_words_override_the_file_and_the_last_word_wins(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("optim: {lr: 0.5, warmup: 7}\nunet: {channels: [32, 64], attention: [false, true]}\n")
    config = parse_config(["--config", str(file), "optim.lr=0.25", "--optim.lr", "3e-4", "loop.prompts=[a, 'b c']"])
    assert config.optim.lr == 3e-4
    assert config.optim.warmup == 7
    assert config.unet.channels == (32, 64)
    assert config.loop.prompts == ("a", "b c")
    assert config.diffusion.prediction == "eps"  # the DDPM epsilon-loss is the default


def test_printed_config_is_the_whole_config_and_can_be_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["diffusion.weighting=p2", "vae=some/vae", "data.flip=true"]
    with pytest.raises(SystemExit):
        parse_config([*words, "--print_config"])
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert parse_config(["--config", str(tmp_path / "printed.yaml")]) == parse_config(words)
    assert yaml.safe_load(printed) == to_dict(parse_config(words))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_shipped_configs_are_valid(file: Path) -> None:
    config = parse_config(["--config", str(file)])
    assert config.run != Config().run


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["optim.lrr=3"], "optim.lr"),
        (["--optin.lr=3"], "optim.lr"),
        (["loop.batchsize=3"], "loop.batch_size"),
        (["dat.size=3"], "data.size"),
    ],
)
def test_unknown_words_name_the_nearest_key(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, *words)
    assert f"did you mean {named}?" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "named"), [("optim: {lrr: 1}", "optim.lr"), ("difusion: {prediction: v}", "diffusion.prediction")]
)
def test_unknown_keys_in_a_file_name_the_nearest_key(
    text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert f"did you mean {named}?" in refusal(capsys, "--config", str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("loop.steps=0", "loop.steps"),
        ("loop.steps=ten", "loop.steps"),
        ("optim.lr=-1", "optim.lr"),
        ("optim.lr=nan", "optim.lr"),
        ("optim.ema_decay=1", "optim.ema_decay"),
        ("data.size=12", "data.size"),
        ("data.crop=left", "data.crop"),
        ("data.crop=random", "data.cache=off"),
        ("data.holdout=1", "data.holdout"),
        ("diffusion.caption_dropout=1.5", "diffusion.caption_dropout"),
        ("diffusion.zero_terminal_snr=true", "diffusion.prediction"),
        ("diffusion.schedule=quadratic", "diffusion.schedule"),
        ("data.caption_columns=[]", "text.encoder=null"),
        ("diffusion.loss=l1 diffusion.variance=learned", "diffusion.loss"),
        ("diffusion.loss=vlb diffusion.weighting=p2", "diffusion.weighting"),
        ("unet.residual_resampling=true unet.transformer_layers=2", "unet.transformer_layers"),
        ("diffusion.min_snr_gamma=0", "diffusion.min_snr_gamma"),
        ("unet.channels=[32,64]", "unet.attention"),
        ("unet.channels=[32,64,65]", "unet.channels"),
        ("loop.accumulation=3", "loop.accumulation"),
    ],
)
def test_bad_values_name_their_key(word: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert key in refusal(capsys, *word.split())


@pytest.mark.parametrize(("word", "folder"), [("auto", Path("x/cache")), ("off", None), ("/c", Path("/c"))])
def test_where_the_cache_is(word: str, folder: Path | None, tmp_path: Path) -> None:
    """On the command line and in YAML, where a bare off is no text but false."""
    (tmp_path / "recipe.yaml").write_text(f"run: x\ndata: {{cache: {word}}}\n")
    typed = parse_config(["run=x", f"data.cache={word}"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(to_dict(typed)))
    for file in ("recipe.yaml", "again.yaml"):
        assert parse_config(["--config", str(tmp_path / file)]) == typed
    assert typed.cache_folder() == folder


def test_every_key_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    said = capsys.readouterr().out
    missing = [key for key in keys() if f"--{key}" not in said]
    assert not missing
