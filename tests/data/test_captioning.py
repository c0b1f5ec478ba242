"""New captions land where their folder keeps captions; those that are there stay."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import road
import tiny
import torch
import transformers
from bad_data import picture
from PIL import Image

from ldm.cli.main import main
from ldm.data.captioning import CaptionFolder, words_of
from ldm.data.dataset import read_captioned
from ldm.data.sources.rewriting import rewrite_table
from ldm.evaluation.caption_suggestions import doubts, suggest
from ldm.evaluation.features import FeatureExtractor


def captions(folder: Path) -> dict[str, tuple[str, ...]]:
    return {str(row.locator): row.captions for row in read_captioned(folder, progress=False, holdout=0)}


def draw(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(seed=seed))


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("red_panda-02", "red panda"),
        ("redPanda (3)", "red Panda"),
        ("IMG_1234", ""),
        ("Screenshot 2024-05-01 at 10.22.33", ""),
        ("DSCN0042 copy", ""),
        ("0f3a9c1be77d", ""),
        ("64x64", ""),
        ("a cat, 2 dogs", "a cat dogs"),
        ("猫", "猫"),
        ("decade", "decade"),  # hexadecimal letters alone are a word
        ("img2", "img2"),
    ],
)
def test_what_a_name_says(name: str, words: str) -> None:
    assert words_of(name) == words


def test_files_and_folders_name_their_pictures(tmp_path: Path) -> None:
    draw(tmp_path, "animals/red_panda-02.png", "animals/cats/IMG_1234.png", "black cat.png")
    (tmp_path / "black cat.txt").write_text("a black cat")
    main(["data", "caption", str(tmp_path), "--from", "names"])
    expected = {
        "animals/red_panda-02.png": "red panda",
        "animals/cats/IMG_1234.png": "cats",
        "black cat.png": "a black cat",
    }
    assert captions(tmp_path) == {name: (caption,) for name, caption in expected.items()}
    main(["data", "caption", str(tmp_path), "--from", "names", "--overwrite"])
    assert captions(tmp_path)["black cat.png"] == ("black cat",)


def test_names_that_say_nothing_are_listed_and_the_others_captioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    draw(data, "1.png", "sun.png", "IMG_2.png")
    looks = ["--preview", str(tmp_path / "look.png"), "--table", str(tmp_path / "all.csv")]
    main(["data", "caption", str(data), "--from", "names", *looks])
    assert {file.name: file.read_text() for file in data.glob("*.txt")} == {"sun.txt": "sun\n"}
    assert (tmp_path / "all.csv").read_text().splitlines() == ["file_name,suggestion 1", "sun.png,sun"]
    assert (tmp_path / "look.png").exists()
    said = capsys.readouterr().err
    assert "warning: 2 pictures without words in their names or their folders', skipped" in said
    assert said.index("\n  1.png") < said.index("\n  IMG_2.png") and "sun.png" not in said


def test_names_that_all_say_nothing_are_an_error(tmp_path: Path) -> None:
    draw(tmp_path, "1.png", "IMG_2.png")
    with pytest.raises(SystemExit) as stopped:
        main(["data", "caption", str(tmp_path), "--from", "names"])
    told = f"{tmp_path}: 2 pictures without captions (1.png, IMG_2.png), none with words in its name"
    assert told in str(stopped.value)
    assert not list(tmp_path.glob("*.txt"))


# --- where captions go -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_table_gets_captions_in_cells_and_rows_that_lack_them(kind: str, tmp_path: Path) -> None:
    draw(tmp_path, "a.png", "b.png", "below/c.png")
    rows = [{"file_name": "a.png", "text": "an apple", "n": 1}, {"file_name": "b.png", "text": None, "n": 2}]
    table = tmp_path / f"metadata.{kind}"
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        table.write_text("file_name,text,n\na.png,an apple,1\nb.png,,2\n")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    CaptionFolder.read(tmp_path).write({"b.png": 'a "bee", flying', "below/c.png": "sea"})
    expected = {"a.png": ("an apple",), "b.png": ('a "bee", flying',), "below/c.png": ("sea",)}
    assert captions(tmp_path) == expected
    kept = {str(row.locator): row.extra.get("n") for row in read_captioned(tmp_path, progress=False)}
    assert [int(kept["a.png"]), int(kept["b.png"])] == [1, 2]  # type: ignore[arg-type]
    assert CaptionFolder.read(tmp_path).without() == []


def test_a_column_that_is_missing_is_added(tmp_path: Path) -> None:
    draw(tmp_path, "sun.png")
    (tmp_path / "metadata.csv").write_text("file_name;kind\nsun.png;x\n")
    main(["data", "caption", str(tmp_path), "--from", "names", "--column", "caption"])
    assert (tmp_path / "metadata.csv").read_text() == "file_name;kind;caption\nsun.png;x;sun\n"


def test_a_killed_rewrite_leaves_the_old_table(tmp_path: Path) -> None:
    table = tmp_path / "metadata.jsonl"
    table.write_text('{"file_name": "a.png"}\n{"file_name": "b.png"}\n')

    def killed(row: dict[str, object]) -> dict[str, object]:
        if row["file_name"] == "b.png":
            raise KeyboardInterrupt
        return {**row, "text": "new"}

    with pytest.raises(KeyboardInterrupt):
        rewrite_table(str(table), killed)
    assert table.read_text() == '{"file_name": "a.png"}\n{"file_name": "b.png"}\n'


def test_unreadable_rows_end_it_before_anything_is_written(tmp_path: Path) -> None:
    draw(tmp_path, "sun.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "sun.png"}\n{"file_name": "gone.png"}\n{oops\n')
    with pytest.raises(SystemExit) as stopped:
        main(["data", "caption", str(tmp_path), "--from", "names"])
    said = str(stopped.value)
    assert "picture is missing: " in said and "row 2" in said and "row is not JSON" in said and "row 3" in said


# --- the nearest captions --------------------------------------------------------------------------


def test_suggestions_are_the_captions_of_the_largest_cosines() -> None:
    """A picture's vector is its mean color; each caption names one: the nearest is the color's own."""
    colors = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(pixels.mean((2, 3)) + 1.001, dim=1)

    def embed_captions(names: object) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.tensor([colors[n] for n in names]).float(), dim=1)  # type: ignore[attr-defined]

    extractor = FeatureExtractor("colors", None, "none", "cosine", embed, embed, embed_captions)
    pictures = [Image.new("RGB", (20, 30), color) for color in [*colors.values(), (200, 180, 0)] * 10]
    found = suggest(extractor, pictures, list(colors), most=2)
    assert [nearest[0][0] for nearest in found[:4]] == list(colors) and len(found) == 50
    assert [caption for caption, _ in found[4]] == ["white", "red"]  # cosines 0.82 and 0.74
    assert all(first[1] >= second[1] for first, second in found)


def test_clip_is_trained_on_the_captions_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data, text = road.draw_folder(tmp_path / "data"), tiny.save_text_encoder(tmp_path / "text", "bert")
    table = data / "metadata.jsonl"
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    hidden = {line["file_name"]: line.pop("text") for line in lines[::6]}
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["data", "caption", str(data), "--from", "clip", "--clip-text", str(text), "--epochs", "1"]
    main([*words, "--dry-run", "--table", "all.csv", "--preview", "look.png", "--top", "3"])
    assert len(CaptionFolder.read(data).without()) == len(hidden) == 4  # it was dry
    with open("all.csv", newline="") as file:
        suggested = {row["file_name"]: list(row.values())[1:] for row in csv.DictReader(file)}
    known = {line["text"] for line in lines if "text" in line}
    assert suggested.keys() == hidden.keys()
    assert all(len(set(three)) == 3 and set(three) <= known for three in suggested.values())
    assert Image.open("look.png").size[0] > 0 and Path("nets/data-captions/net.json").exists()
    captured = capsys.readouterr()
    assert "no caption is written (--dry-run); the in-domain CLIP stays in nets/data-captions" in captured.out
    assert "warning: the in-domain CLIP has learned from" in captured.err and "captioned pictures" in captured.err
    Path("names.txt").write_text("\n".join(hidden.values()) + "\n")
    main([*words, "--candidates", "names.txt"])  # with the network of before
    again = capsys.readouterr()
    assert "in-domain CLIP trained" in captured.out and "in-domain CLIP trained" not in again.out
    assert "in-domain CLIP of nets/data-captions" in again.out  # that it is used again is said, and how sure it is
    assert "warning: the in-domain CLIP has learned from" in again.err
    after = captions(data)
    assert all(after[name][0] in hidden.values() for name in hidden)
    assert all(after[line["file_name"]] == (line["text"],) for line in lines if "text" in line)


@pytest.mark.parametrize(
    ("n", "low", "chance", "warned"),
    [
        (100, 0.11, 0.1, []),
        (99, 0.11, 0.1, ["has learned from 99 captioned pictures"]),
        (5000, 0.1, 0.1, ["no better than chance"]),
        (20, 0.0, 1.0, ["has learned from 20 captioned pictures", "no better than chance"]),
    ],
)
def test_an_unsure_clip_is_warned_of(n: int, low: float, chance: float, warned: list[str]) -> None:
    recall = {"top5": {"value": low + 0.1, "low": low, "high": 1.0}, "chance": {"top5": chance}}
    found = doubts({"n": n, "recall_on": "heldout", "recall": {"picture to caption": recall}})
    assert len(found) == len(warned) and all(part in line for part, line in zip(warned, found, strict=True))


# --- captioning models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT and a GPT-2 of random weights, in one folder."""
    folder = tmp_path_factory.mktemp("captioner")
    torch.manual_seed(0)
    tokenizer = tiny.gpt2_tokenizer()
    vit = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                 image_size=16, patch_size=8)  # fmt: skip
    gpt2 = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)
    model = transformers.VisionEncoderDecoderModel(config)
    ends = {"decoder_start_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.eos_token_id}
    for name, value in ends.items():
        setattr(model.generation_config, name, value)
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_a_captioning_model_says_what_transformers_has_it_say(captioner: Path, tmp_path: Path) -> None:
    draw(tmp_path, "1.png", "2.png", "3.png")
    main(["data", "caption", str(tmp_path), "--from", str(captioner), "--max-tokens", "6"])
    model = transformers.VisionEncoderDecoderModel.from_pretrained(captioner)
    tokenizer = transformers.AutoTokenizer.from_pretrained(captioner)
    processor = transformers.AutoImageProcessor.from_pretrained(captioner)
    for name, found in captions(tmp_path).items():
        pixels = processor(Image.open(tmp_path / name).convert("RGB"), return_tensors="pt")
        tokens = model.generate(**pixels, max_new_tokens=6, do_sample=False)
        assert found == (" ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split()),)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--from", "nowhere"], "--from: expected names, clip or a model's folder; there is no folder 'nowhere'"),
        (["--from", "text"], "model_type is 'bert'; expected an image-to-text model of transformers"),
        (["--from", "code"], "auto_map: it has other code loaded than its class's"),
        (["--from", "clip", "--clip", "text"], "--clip: text holds no in-domain CLIP; name a new folder to train one"),
        (["--from", "clip"], "--from clip: no picture of data has a caption"),
        (["--from", "names", "--prompt", "a"], "--prompt: goes with --from MODEL"),
        (["--from", "names", "--epochs", "3"], "--epochs: goes with --from clip"),
    ],
)
def test_what_is_refused(words: list[str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "data", "sun.png")
    if "--clip" in words:
        (tmp_path / "data/sun.txt").write_text("sun")
        draw(tmp_path / "data", "moon.png")
    tiny.save_text_encoder(tmp_path / "text", "bert")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/config.json").write_text('{"model_type": "blip", "auto_map": {"AutoModel": "evil.Model"}}')
    with pytest.raises(SystemExit) as stopped:
        main(["data", "caption", "data", *words])
    assert error in str(stopped.value)
