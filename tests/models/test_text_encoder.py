"""The context is what stock pipelines compute, and the embedded encoder is really MiniLM."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import torch
import transformers
from torch import Tensor

from ldm.models.text_encoder import MINILM, TextConfig, TextEncoder, measure_context, minilm_folder

CAPTIONS = ["red heart", "", "house with garden", "flag: japan"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[tiny.Kind, TextEncoder]:
    return {kind: tiny.text_encoder(tmp_path_factory.mktemp(kind), kind) for kind in tiny.KINDS}


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder.load(TextConfig(encoder=MINILM, max_length=32))


# --- the context ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_context_is_what_the_stock_pipeline_computes_from_its_folder(
    tiny_pipeline_folders: dict[tiny.Kind, Path], encoders: dict[tiny.Kind, TextEncoder], kind: tiny.Kind
) -> None:
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline_folders[kind], use_safetensors=True)
    ours = encoders[kind].encode(CAPTIONS)
    with torch.no_grad():  # with gradients, another attention kernel answers
        theirs, null = stock.encode_prompt(CAPTIONS, torch.device("cpu"), 1, True)
    assert ours.shape == (len(CAPTIONS), tiny.MAX_LENGTH, encoders[kind].dim)
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() == 0
    # the null caption of guidance is the empty text
    assert (encoders[kind].encode([""] * len(CAPTIONS)) - null).abs().max() == 0
    differences = torch.cdist(ours.flatten(1), ours.flatten(1)) + 100 * torch.eye(len(CAPTIONS))
    assert differences.min() > 0.1, "captions that all look the same prove nothing"


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_caption_that_is_too_long_is_cut_as_stock_pipelines_cut_it(
    tiny_pipeline_folders: dict[tiny.Kind, Path], encoders: dict[tiny.Kind, TextEncoder], kind: tiny.Kind
) -> None:
    stock = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline_folders[kind], use_safetensors=True)
    with torch.no_grad():
        theirs, _ = stock.encode_prompt("red heart " * 20, torch.device("cpu"), 1, False)
    assert (encoders[kind].encode(["red heart " * 20]) - theirs).abs().max() == 0


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_padding_does_not_change_the_context_of_the_real_tokens(tmp_path: Path, kind: tiny.Kind) -> None:
    short = tiny.text_encoder(tmp_path / "short", kind, max_length=6)
    long = tiny.text_encoder(tmp_path / "long", kind, max_length=30)
    length = short.lengths(["red heart"])[0]
    assert length < 6
    difference = short.encode(["red heart"])[:, :length] - long.encode(["red heart"])[:, :length]
    assert difference.abs().max() < 1e-5


def test_clip_sees_nothing_behind_a_token_and_needs_no_mask(tmp_path: Path) -> None:
    # causal attention: padding stands behind every real token
    short, long = (tiny.text_encoder(tmp_path / str(n), "clip", max_length=n) for n in (6, 30))
    length = short.lengths(["red heart"])[0]
    assert (short.encode(["red heart"])[:, :length] - long.encode(["red heart"])[:, :length]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_caption_s_context_does_not_depend_on_its_batch(
    encoders: dict[tiny.Kind, TextEncoder], kind: tiny.Kind
) -> None:
    together = encoders[kind].encode(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        assert (encoders[kind].encode([caption])[0] - together[i]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_many_captions_go_through_a_few_at_a_time_and_come_out_as_from_all_at_once(
    tmp_path: Path, kind: tiny.Kind
) -> None:
    text, sizes = tiny.text_encoder(tmp_path, kind, max_length=12), []
    captions = [
        f"{color} {thing} {'with garden ' * n}"
        for color in ("red", "blue")
        for thing in ("cat", "heart")
        for n in range(45)
    ]
    tokens = text.tokenizer(captions, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    mask = tokens.attention_mask if text.model.config.use_attention_mask else None
    with torch.no_grad():
        whole = text.model(tokens.input_ids, attention_mask=mask)[0]
    text.model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    assert torch.allclose(text.encode(captions), whole, rtol=1e-4, atol=1e-5)
    assert sizes == [85, 85, 10]  # 85 captions of 12 tokens are 1,020 of 1,024


def test_a_caption_longer_than_what_goes_at_once_goes_alone(tmp_path: Path) -> None:
    text = tiny.text_encoder(tmp_path, "t5", max_length=1500)  # the one of them that takes any number
    assert text.encode(["red heart", "blue cat"]).shape == (2, 1500, text.dim)


# --- standardized --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_standardized_context_is_the_old_one_shifted_and_scaled(tmp_path: Path, kind: tiny.Kind) -> None:
    text = tiny.text_encoder(tmp_path, kind)
    with torch.no_grad():  # an encoder says mostly the same, and its channels differ in spread
        norm = text.model.encoder.layer[-1].output.LayerNorm if kind == "bert" else text.model.get_submodule(
            {"clip": "final_layer_norm", "t5": "encoder.final_layer_norm", "gpt2": "ln_f"}[kind]
        )  # fmt: skip
        norm.weight.mul_(torch.linspace(0.5, 3, text.dim))
        if kind != "t5":
            norm.bias.copy_(torch.linspace(-4, 4, text.dim))
    before = text.encode(CAPTIONS).double().numpy()
    mean, std = measure_context([text.encode(CAPTIONS[:3]), text.encode(CAPTIONS[3:])])
    # numpy, over all captions and places at once, is the second opinion
    assert np.allclose(mean, before.mean((0, 1)), atol=1e-6)
    assert np.allclose(std, before.std((0, 1)), atol=1e-6)
    text.standardize(mean, std)
    after = text.encode(CAPTIONS).double().numpy()
    if kind == "t5":  # its norm can't shift
        assert np.allclose(after, before / np.sqrt((before**2).mean((0, 1))), atol=1e-4)
        assert np.allclose((after**2).mean((0, 1)), 1, atol=1e-4)
    else:
        assert np.allclose(after, (before - before.mean((0, 1))) / before.std((0, 1)), atol=1e-4)
        assert np.allclose(after.mean((0, 1)), 0, atol=1e-4)
        assert np.allclose(after.std((0, 1)), 1, atol=1e-4)
    # what was saved says the same, to a stock class that knows nothing of it
    text.model.save_pretrained(tmp_path / "saved")
    stock = type(text.model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), text.model.parameters(), strict=True))


def test_a_channel_that_never_varies_becomes_zero_and_is_not_blown_up(tmp_path: Path) -> None:
    # all-MiniLM-L6-v2 has one
    text = tiny.text_encoder(tmp_path, "bert")
    with torch.no_grad():
        norm = text.model.encoder.layer[-1].output.LayerNorm
        norm.weight[7], norm.bias[7] = 1e-12, -3
    mean, std = measure_context([text.encode(CAPTIONS)])
    assert std[7] < 1e-6
    text.standardize(mean, std)
    assert text.encode(["an owl"])[..., 7].abs().max() < 1e-5


def test_an_encoder_that_says_the_same_of_every_token_is_refused(tmp_path: Path) -> None:
    text = tiny.text_encoder(tmp_path, "bert")
    with pytest.raises(ValueError, match=r"text.encoder: its output is constant across tokens"):
        text.standardize(torch.zeros(text.dim), torch.zeros(text.dim))


# --- tokens --------------------------------------------------------------------------------------------


def test_lengths_count_the_special_tokens_and_nothing_is_cut(encoders: dict[tiny.Kind, TextEncoder]) -> None:
    # by hand: [CLS] red heart [SEP]; one piece per letter of an unknown word
    assert encoders["bert"].lengths(["red heart", "", "zoo", "cat " * 50]) == [4, 2, 5, 52]
    assert encoders["clip"].lengths(["red heart", "", "zoo", "cat " * 50]) == [4, 2, 5, 52]
    assert encoders["t5"].lengths(["red heart", "", "cat " * 50]) == [3, 1, 51]


def test_the_unknown_rate_counts_what_the_vocabulary_lacks(encoders: dict[tiny.Kind, TextEncoder]) -> None:
    bert = encoders["bert"]
    assert bert.unknown_rate(["red heart"]) == 0
    assert bert.unknown_rate(["red 猫", "heart 1"]) == 0.5
    assert bert.unknown_rate([""]) == 0
    assert encoders["t5"].unknown_rate(["red 猫"]) > 0.3


# --- loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "width", "masked"), [("bert", 32, True), ("clip", 32, False), ("t5", 32, True), ("gpt2", 32, False)]
)
def test_an_encoder_loads_frozen_with_its_limits(
    encoders: dict[tiny.Kind, TextEncoder], kind: tiny.Kind, width: int, masked: bool
) -> None:
    encoder = encoders[kind]
    assert encoder.dim == width
    assert encoder.tokenizer.model_max_length == tiny.MAX_LENGTH
    assert encoder.model.config.use_attention_mask is masked
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_limits_are_saved_with_the_pipeline(tiny_pipeline_folders: dict[tiny.Kind, Path], kind: tiny.Kind) -> None:
    folder = tiny_pipeline_folders[kind]
    assert transformers.AutoTokenizer.from_pretrained(folder / "tokenizer").model_max_length == tiny.MAX_LENGTH
    config = transformers.AutoConfig.from_pretrained(folder / "text_encoder")
    assert config.use_attention_mask is (kind not in ("clip", "gpt2"))


@pytest.mark.parametrize("kind", ["bert", "clip", "gpt2"])
def test_more_tokens_than_the_encoder_takes_is_an_error(tmp_path: Path, kind: tiny.Kind) -> None:
    assert tiny.text_encoder(tmp_path / "fits", kind, max_length=64).encode(["cat"]).shape == (1, 64, 32)
    with pytest.raises(ValueError, match=r"text.max_length: .* takes up to 64 tokens, got 65"):
        tiny.text_encoder(tmp_path / "too-long", kind, max_length=65)


def test_gpt2_comes_without_padding_and_gets_the_end_of_a_text(encoders: dict[tiny.Kind, TextEncoder]) -> None:
    """Causal: what follows a caption changes no token of it, and the padding's own states depend on the caption."""
    assert tiny.gpt2_tokenizer().pad_token is None
    encoder = encoders["gpt2"]
    assert encoder.tokenizer.pad_token == encoder.tokenizer.eos_token == "<|endoftext|>"
    assert encoder.tokenizer.padding_side == "right"
    short = encoder.tokenizer(["red"]).input_ids[0]
    alone = encoder.model(torch.tensor([short]))[0]
    assert torch.allclose(encoder.encode(["red"])[:, : len(short)], alone, atol=1e-6)
    assert encoder.encode([""]).shape == (1, tiny.MAX_LENGTH, 32)


def test_t5_takes_any_length(tmp_path: Path) -> None:
    assert tiny.text_encoder(tmp_path, "t5", max_length=200).encode(["cat"]).shape == (1, 200, 32)


def test_no_room_for_a_word_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"text.max_length: expected 3 to 4096 tokens, two of them special, got 2"):
        TextConfig(max_length=2)


def test_a_whole_clip_model_gives_its_text_half(tmp_path: Path) -> None:
    # what `openai/clip-vit-large-patch14` is: text and vision in one file
    text = tiny.text_encoder(tmp_path / "text", "clip")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=text.model.config.to_dict(), vision_config=vision | {"image_size": 32})
    whole = transformers.CLIPModel(config)
    whole.text_model.load_state_dict(text.model.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    text.tokenizer.save_pretrained(tmp_path / "whole")
    loaded = TextEncoder.load(TextConfig(encoder=str(tmp_path / "whole"), max_length=tiny.MAX_LENGTH))
    assert type(loaded.model) is transformers.CLIPTextModel
    assert (loaded.encode(CAPTIONS) - text.encode(CAPTIONS)).abs().max() == 0


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a vit; expected CLIP, BERT, T5 or GPT-2"):
        TextEncoder.load(TextConfig(encoder=str(tmp_path)))


def test_a_missing_encoder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        TextEncoder.load(TextConfig(encoder=str(tmp_path / "nowhere")))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    tiny.save_text_encoder(tmp_path, "bert")
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        TextEncoder.load(TextConfig(encoder=str(tmp_path)))


def test_a_tokenizer_without_its_vocabulary_is_an_error(tmp_path: Path) -> None:
    tiny.save_text_encoder(tmp_path, "bert")
    (tmp_path / "tokenizer.json").unlink()
    # transformers 5 makes a vocabulary of five special tokens and says nothing
    with pytest.raises(ValueError, match=r"text.encoder: .* has a tokenizer of \d+ tokens"):
        TextEncoder.load(TextConfig(encoder=str(tmp_path)))


# --- MiniLM --------------------------------------------------------------------------------------------


def test_minilm_knows_english(minilm: TextEncoder) -> None:
    captions = ["red heart", "woman firefighter: dark skin tone", "flag: Japan", "smiling face with sunglasses"]
    assert minilm.dim == 384
    assert minilm.unknown_rate(captions) == 0
    assert minilm.lengths(["red heart"]) == [4]
    assert minilm.encode(captions).shape == (4, 32, 384)


def mean_pooled(encoder: TextEncoder, captions: list[str]) -> Tensor:
    """The sentence embedding from the real tokens of our padded context, as sentence-transformers defines it."""
    context, lengths = encoder.encode(captions), encoder.lengths(captions)
    means = torch.stack([row[:length].mean(0) for row, length in zip(context, lengths, strict=True)])
    return torch.nn.functional.normalize(means, dim=1)


def test_minilm_embeds_as_its_own_model_does_one_caption_at_a_time(minilm: TextEncoder) -> None:
    captions = ["red heart", "a man is eating a piece of bread", "flag: Japan"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    model = transformers.AutoModel.from_pretrained(minilm_folder(), use_safetensors=True).eval()
    ours = mean_pooled(minilm, captions)
    for i, caption in enumerate(captions):
        with torch.no_grad():  # no padding and no mask at all
            states = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state
        assert (torch.nn.functional.normalize(states.mean(1), dim=1)[0] - ours[i]).abs().max() < 1e-5


def test_minilm_puts_alike_things_near_each_other(minilm: TextEncoder) -> None:
    kitten, cat, rocket, spaceship = mean_pooled(minilm, ["kitten", "cat", "rocket", "spaceship"])
    assert kitten @ cat > 0.6
    assert kitten @ cat > kitten @ rocket + 0.3
    assert rocket @ spaceship > rocket @ kitten + 0.2


def test_minilm_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ldm\[demo\]'"):
        minilm_folder()


def test_minilm_needs_neither_sentence_transformers_nor_its_package_s_code(tmp_path: Path) -> None:
    copied = shutil.copytree(minilm_folder(), tmp_path / "minilm")
    assert TextEncoder.load(TextConfig(encoder=str(copied), max_length=16)).dim == 384


def test_word_vectors_are_those_of_minilm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = TextEncoder.load(TextConfig(encoder="minilm-words", max_length=8))
    assert (words.dim, words.model.config.use_attention_mask) == (64, True)
    caption = words.tokenizer("red heart", return_tensors="pt").input_ids[0]
    table = transformers.AutoModel.from_pretrained(minilm_folder(), use_safetensors=True).float().embeddings
    vectors = table.word_embeddings.weight + table.token_type_embeddings.weight[0]
    summed = vectors[caption, :64] + table.position_embeddings.weight[: len(caption), :64]
    gain, shift = table.LayerNorm.weight[:64], table.LayerNorm.bias[:64]
    normed = torch.nn.functional.layer_norm(summed, [64], gain, shift, eps=1e-12)
    expected = torch.nn.functional.layer_norm(normed, [64], eps=1e-12)
    torch.testing.assert_close(words.encode(["red heart"])[0, : len(caption)], expected, atol=1e-5, rtol=0)
    (folder,) = (path for path in (tmp_path / "ldm/minilm-words").iterdir() if path.is_dir())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    (folder / "config.json").write_text("{}")  # damaged: made anew
    assert TextEncoder.load(TextConfig(encoder="minilm-words")).dim == 64


def test_word_vectors_are_read_from_a_cache_that_can_t_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    TextEncoder.load(TextConfig(encoder="minilm-words"))

    def forbidden(entry: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ldm.models.word_vectors.locked", forbidden)
    assert TextEncoder.load(TextConfig(encoder="minilm-words")).dim == 64
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with pytest.raises(
        ValueError, match=r"text.encoder: .*other/ldm/minilm-words.*\(Permission denied\); set XDG_CACHE_HOME"
    ):
        TextEncoder.load(TextConfig(encoder="minilm-words"))
