"""The latent cache: the very tensors the encoders give, each computed once for what it was computed from."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import road
import tiny
import torch
from PIL import Image
from torch import Tensor

from ldm.data.batches import load_pixels
from ldm.data.buckets import Buckets
from ldm.data.cache.latents import Builder, LatentCache, context_kind, posterior_kind
from ldm.data.cache.store import DamagedError, to_keys
from ldm.data.dataset import BadDataError, CaptionedPictures, read_captioned
from ldm.models.fingerprint import fingerprint, tokenizer_facts
from ldm.models.text_encoder import TextConfig, TextEncoder
from ldm.models.vae import VAEConfig, build_vae, encode
from ldm.system import files as space
from ldm.system.errors import NoSpaceError

SHAPE = (4, 8, 8)


@dataclasses.dataclass
class Lab:
    """A folder of pictures, two networks, and how much each has encoded."""

    folder: Path
    vae: Any
    text: TextEncoder
    size: int = tiny.SIZE
    flip: bool = False
    background: str = "white"
    pixels: int = 0
    captions: int = 0
    lines: list[str] = dataclasses.field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def pictures(self, source: str | Path | None = None) -> CaptionedPictures:
        return read_captioned(source or self.data, background=self.background, progress=False)

    def cache(self, pictures: CaptionedPictures | None = None) -> LatentCache:
        pictures = pictures or self.pictures()
        shape = (SHAPE[0], self.size // 2, self.size // 2)
        posteriors = posterior_kind(fingerprint(self.vae), shape, self.size, self.background)
        text = fingerprint(self.text.model, tokenizer_facts(self.text.tokenizer))
        contexts = context_kind(text, (self.text.tokenizer.model_max_length, self.text.dim))

        @torch.no_grad()
        def encode_pixels(pixels: Tensor) -> tuple[Tensor, Tensor]:
            self.pixels += len(pixels)
            posterior = encode(self.vae, pixels)
            return posterior.mean, posterior.std

        def encode_captions(captions: list[str]) -> Tensor:
            self.captions += len(captions)
            return self.text.encode(captions)

        builder = Builder(self.folder / "cache", batch_size=8, progress=False, log=self.lines.append)
        table = self.folder / "rows.npy"
        builder.build(
            pictures,
            table,
            ([posteriors], encode_pixels),
            (contexts, encode_captions),
            buckets=(buckets := Buckets.square(self.size, len(pictures))),
            flip=self.flip,
        )
        return LatentCache.open(self.folder / "cache", table, [posteriors], contexts, buckets)

    def encoded(self) -> tuple[int, int]:
        """Pictures and captions that building the cache now encodes."""
        self.pixels = self.captions = 0
        self.cache()
        return self.pixels, self.captions


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    road.draw_folder(tmp_path / "data")
    torch.manual_seed(3)
    vae = build_vae(VAEConfig(channels=(16, 32), layers=1)).eval()
    return Lab(tmp_path, vae, tiny.text_encoder(tmp_path / "text"))


def rewrite(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    file = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    change(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


# --- what it returns -----------------------------------------------------------------------------------------------


def test_posteriors_are_those_of_the_vae_for_both_flips(lab: Lab) -> None:
    lab.flip = True
    cache, pictures = lab.cache(), lab.pictures()
    for i, row in enumerate(pictures):
        upright = load_pixels(row, tiny.SIZE)[None]
        for flip, pixels in ((False, upright), (True, upright.flip(-1))):
            with torch.no_grad():
                expected = encode(lab.vae, pixels)
            mean, std = cache.posterior(i, flip)
            torch.testing.assert_close(mean, expected.mean[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(std, expected.std[0], rtol=1e-4, atol=1e-7)
            assert mean.dtype == std.dtype == torch.float32
    assert (cache.posterior(0, False)[1] > 0).all()
    assert not torch.equal(cache.posterior(0, False)[0], cache.posterior(0, True)[0])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_contexts_are_those_of_the_text_encoder_padding_included(lab: Lab, tmp_path: Path, kind: tiny.Kind) -> None:
    lab.text = tiny.text_encoder(tmp_path / kind, kind)
    cache = lab.cache()
    captions = list(dict.fromkeys(["", *(caption for row in lab.pictures() for caption in row.captions)]))
    for start in range(0, len(captions), 8):  # in the same batches, equal to the last bit
        batch = captions[start : start + 8]
        for caption, context in zip(batch, lab.text.encode(batch), strict=True):
            assert torch.equal(cache.context(caption), context)
    alone = lab.text.encode([captions[5]])[0]
    torch.testing.assert_close(cache.context(captions[5]), alone, rtol=1e-5, atol=1e-6)
    assert cache.context("").shape == (tiny.MAX_LENGTH, lab.text.dim)
    with pytest.raises(DamagedError, match="a record is missing"):
        cache.context("of no picture")


def test_a_read_tensor_is_a_copy(lab: Lab) -> None:
    cache = lab.cache()
    for read in (lambda: cache.posterior(0, False)[0], lambda: cache.context("")):
        before = read().clone()
        read().add_(1)
        assert torch.equal(read(), before)


# --- what is computed anew -----------------------------------------------------------------------------------------


def test_only_what_changed_is_encoded(lab: Lab) -> None:
    assert lab.encoded() == (24, 25)  # and the null caption
    assert lab.encoded() == (0, 0)

    rewrite(lab.data, lambda rows: rows[3].update(text="a blue rocket"))
    assert lab.encoded() == (0, 1)

    Image.new("RGB", (tiny.SIZE, tiny.SIZE), "purple").save(lab.data / "images/red_heart.png")
    assert lab.encoded() == (1, 0)

    Image.new("RGB", (tiny.SIZE, tiny.SIZE), "brown").save(lab.data / "images/new.png")
    rewrite(lab.data, lambda rows: rows.insert(0, {"file_name": "images/new.png", "text": "brown flag"}))
    assert lab.encoded() == (1, 1)

    rewrite(lab.data, lambda rows: rows.reverse())
    assert lab.encoded() == (0, 0)
    cache, pictures = lab.cache(), lab.pictures()  # in the new order
    for i in (0, 7, 24):
        with torch.no_grad():
            expected = encode(lab.vae, load_pixels(pictures[i], tiny.SIZE)[None]).mean[0]
        torch.testing.assert_close(cache.posterior(i, False)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_same_picture_under_two_names_and_the_same_caption_twice_are_encoded_once(lab: Lab) -> None:
    data = (lab.data / "images/red_heart.png").read_bytes()
    (lab.data / "images/copy.png").write_bytes(data)
    rewrite(lab.data, lambda rows: rows.append({"file_name": "images/copy.png", "text": "blue heart"}))
    assert lab.encoded() == (24, 25)
    cache = lab.cache()
    assert torch.equal(cache.posterior(0, False)[0], cache.posterior(24, False)[0])


def test_mirrored_pictures_are_added_to_the_others(lab: Lab) -> None:
    assert lab.encoded() == (24, 25)
    lab.flip = True
    assert lab.encoded() == (24, 0)
    lab.flip = False
    assert lab.encoded() == (0, 0)


def change_weight(network: Any) -> None:
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-3


def longer(lab: Lab) -> None:
    lab.text.tokenizer.model_max_length += 1


def other_vocabulary(lab: Lab) -> None:
    folder = lab.folder / "other"
    tiny.save_text_encoder(folder, "bert")
    file = folder / "tokenizer.json"
    rules = json.loads(file.read_text("utf-8"))
    vocabulary = rules["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    file.write_text(json.dumps(rules), "utf-8")
    lab.text = TextEncoder.load(TextConfig(encoder=str(folder), max_length=tiny.MAX_LENGTH))


CHANGES: dict[str, tuple[Callable[[Lab], object], tuple[int, int]]] = {
    "a weight of the VAE": (lambda lab: change_weight(lab.vae), (24, 0)),
    "the VAE's config": (lambda lab: lab.vae.register_to_config(scaling_factor=0.5), (24, 0)),
    "size": (lambda lab: setattr(lab, "size", 8), (24, 0)),
    "background": (lambda lab: setattr(lab, "background", "black"), (24, 0)),
    "a weight of the encoder": (lambda lab: change_weight(lab.text.model), (0, 25)),
    "the encoder's config": (lambda lab: setattr(lab.text.model.config, "use_attention_mask", False), (0, 25)),
    "max_length": (longer, (0, 25)),
    "vocabulary": (other_vocabulary, (0, 25)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_networks_and_settings_make_everything_anew(lab: Lab, name: str) -> None:
    change, expected = CHANGES[name]
    assert lab.encoded() == (24, 25)
    change(lab)
    assert lab.encoded() == expected
    assert lab.encoded() == (0, 0)


def test_fingerprints_know_the_same_networks_again_wherever_they_lie(tmp_path: Path) -> None:
    known = []
    for name in ("here", "there"):
        text = tiny.text_encoder(tmp_path / name)
        if name == "there":
            text.encode(["red heart", "a"])  # which leaves its padding in the tokenizer
        known.append(fingerprint(text.model, tokenizer_facts(text.tokenizer)))
    assert known[0] == known[1]


# --- any source, any number of times -------------------------------------------------------------------------------


def as_shards(lab: Lab) -> Path:
    (lab.folder / "shards").mkdir()
    pictures = lab.pictures()
    for number, part in enumerate((pictures[:12], pictures[12:])):
        with tarfile.open(lab.folder / f"shards/{number}.tar", "w") as tar:
            for i, row in enumerate(part):
                for suffix, data in (("png", row.read()), ("txt", row.captions[0].encode())):
                    file = lab.folder / f"{i}.{suffix}"
                    file.write_bytes(data)
                    tar.add(file, f"{i}.{suffix}")
    return lab.folder / "shards"


def as_data_set(lab: Lab) -> Path:
    import datasets

    columns: dict[str, list[Any]] = {"image": [], "text": []}
    for row in lab.pictures():
        columns["image"].append({"bytes": row.read(), "path": None})
        columns["text"].append(row.captions[0])
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(lab.folder / "saved"))
    return lab.folder / "saved"


@pytest.mark.parametrize("make", [as_shards, as_data_set], ids=["shards", "data set"])
def test_pictures_are_the_same_from_any_source(lab: Lab, make: Callable[[Lab], Path]) -> None:
    lab.cache()
    pictures = lab.pictures(make(lab))
    lab.pixels = lab.captions = 0
    lab.cache(pictures)
    assert (lab.pixels, lab.captions) == (0, 0)


def test_a_picture_that_changes_before_it_is_encoded_is_refused(lab: Lab) -> None:
    pictures = lab.pictures()
    Image.new("RGB", (tiny.SIZE, tiny.SIZE), "purple").save(lab.data / "images/red_heart.png")
    with pytest.raises(BadDataError, match=r"changed while it was being encoded.*red_heart\.png"):
        lab.cache(pictures)


def test_pictures_that_were_not_checked_are_hashed(lab: Lab) -> None:
    lab.cache()
    lab.pixels = 0
    lab.cache(read_captioned(lab.data, check=False, progress=False))
    assert lab.pixels == 0


def test_a_cache_of_an_older_version_is_reported_and_not_read(lab: Lab) -> None:
    (lab.folder / "cache/posteriors-0123").mkdir(parents=True)
    (lab.folder / "cache/posteriors-0123/records.raw").write_bytes(b"old")
    assert lab.encoded() == (24, 25)
    assert lab.lines[0].endswith("has records of an older version, which are not read; delete posteriors-0123")


def test_too_small_a_disk_is_refused_before_anything_is_encoded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    total = 24 * (2 * 4 * 8 * 8 * 4) + 25 * (tiny.MAX_LENGTH * lab.text.dim * 4)
    usage = space.shutil.disk_usage(lab.folder)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage._replace(free=total))  # not for the indices
    with pytest.raises(NoSpaceError, match=r"24 pictures.*25 captions.*data\.cache=off"):
        lab.cache()
    assert (lab.pixels, lab.captions) == (0, 0)


# --- other pictures than the rows' own -----------------------------------------------------------------------------


def test_the_posterior_store_takes_any_pictures_by_key(tmp_path: Path) -> None:
    """Pictures of another column, say: keys, and a function from number to pixels."""
    kind = posterior_kind("a VAE", (3, 4, 4), 4, "white")
    builder = Builder(tmp_path, batch_size=2, progress=False)
    keys = b"".join(kind.key(f"{i % 3}".encode()) for i in range(5))
    encoded: list[int] = []

    def pixels(number: int) -> Tensor:
        encoded.append(number)
        return torch.full((3, 4, 4), float(number))

    with builder.writer(kind) as writer:
        builder.posteriors(writer, to_keys(keys), pixels, lambda p: (p, p / 2))
        assert sorted(encoded) == [0, 1, 2]
        for i in range(5):
            mean, std = writer.array(keys[16 * i : 16 * i + 16])
            assert (mean == i % 3).all() and (std == i % 3 / 2).all()
