"""Pixels against truths worked out by hand or with numpy: every color mode, orientation, crop and range."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from bad_data import bad_pictures, chunk, png
from PIL import Image, ImageCms

from ldm.data.images import BadPictureError, decode, to_pixels, to_rgb, to_square

RNG = np.random.default_rng(0)


def test_detail_takes_pixels_as_they_are_at_a_place() -> None:
    """Every pixel of this picture has a color of its own, so its place can be read off it."""
    picture = np.zeros((12, 20, 3), np.uint8)
    picture[..., 0], picture[..., 1] = np.arange(20), np.arange(12)[:, None]
    piece = to_square(Image.fromarray(picture), 5, "detail", (0.5, 0.99))
    assert (piece == picture[7:12, 8:13]).all()  # of 16 and 8 places the ninth and the last
    small = to_square(Image.fromarray(picture), 12, "detail", (0.0, 0.0))
    assert (small == picture[:12, :12]).all()
    assert to_square(Image.fromarray(picture), 24, "detail").shape == (24, 24, 3)  # enlarged: it has no 24 pixels


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoded(data: bytes, background: str = "white") -> np.ndarray:
    image = decode(data, background)
    assert image.mode == "RGB"
    return np.asarray(image)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_rgb_is_kept_exactly(format: str) -> None:
    pixels = noise(6, 9, 3)
    options = {"lossless": True} if format == "WEBP" else {}
    assert (decoded(saved(Image.fromarray(pixels), format, **options)) == pixels).all()


def test_jpeg_is_kept_nearly() -> None:
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[:, None, None], (64, 64, 3))
    assert (
        abs(decoded(saved(Image.fromarray(np.ascontiguousarray(ramp)), "JPEG", quality=95)).astype(int) - ramp).max()
        <= 3
    )


def test_gray_and_black_and_white_become_three_equal_channels() -> None:
    gray = noise(5, 7)
    assert (decoded(saved(Image.fromarray(gray))) == gray[..., None]).all()
    bits = Image.fromarray(gray > 127)
    assert bits.mode == "1"
    assert (decoded(saved(bits)) == np.where(gray > 127, 255, 0)[..., None]).all()


def over(color: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    a = alpha[..., None] / 255
    return color * a + np.array(background) * (1 - a)


@pytest.mark.parametrize(("name", "background"), [("white", (255, 255, 255)), ("#204060", (32, 64, 96))])
def test_transparency_is_composited(name: str, background: tuple[int, int, int]) -> None:
    color, alpha = noise(16, 16, 3), noise(16, 16)
    rgba = Image.fromarray(np.dstack([color, alpha]))
    assert abs(decoded(saved(rgba), name) - over(color, alpha, background)).max() <= 1
    la = Image.merge("LA", (Image.fromarray(color[..., 0]), Image.fromarray(alpha)))
    assert abs(decoded(saved(la), name) - over(color[..., :1].repeat(3, -1), alpha, background)).max() <= 1


def test_palette_with_and_without_transparency() -> None:
    index = noise(8, 8) % 4
    palette = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], np.uint8)
    image = Image.fromarray(index)
    image.putpalette(palette.tobytes())
    assert image.mode == "P"
    assert (decoded(saved(image)) == palette[index]).all()
    alpha = np.array([0, 255, 128, 255])
    data = saved(image, transparency=bytes(alpha.tolist()))
    assert abs(decoded(data, "black") - over(palette[index], alpha[index], (0, 0, 0))).max() <= 1
    data = saved(image, "GIF", transparency=2)
    assert (decoded(data, "yellow") == np.where((index == 2)[..., None], (255, 255, 0), palette[index])).all()


def test_transparent_color_of_rgb_and_16_bit_gray() -> None:
    pixels = zlib.compress(b"\0" + bytes([1, 2, 3, 4, 5, 6]))
    data = png(2, 1, pixels=pixels, extra=chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert decoded(data, "white").tolist() == [[[255, 255, 255], [4, 5, 6]]]
    pixels = zlib.compress(b"\0" + struct.pack(">HH", 40000, 65535))
    data = png(2, 1, depth=16, color=0, pixels=pixels, extra=chunk(b"tRNS", struct.pack(">H", 40000)))
    assert decoded(data, "black").tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_cmyk_follows_the_formula() -> None:
    ink = noise(8, 8, 4)
    image = Image.frombytes("CMYK", (8, 8), ink.tobytes())
    truth = 255 * (1 - ink[..., :3] / 255) * (1 - ink[..., 3:] / 255)
    assert abs(decoded(saved(image, "TIFF")) - truth).max() <= 1
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 51))  # through JPEG, where Adobe stores ink inverted
    assert abs(decoded(saved(flat, "JPEG")).astype(int) - (204, 0, 0)).max() <= 2


def test_16_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    truth = np.rint(ramp / 257)[..., None]
    for format in ("PNG", "TIFF"):
        assert (decoded(saved(Image.fromarray(ramp), format)) == truth).all()
    assert (decoded(saved(Image.fromarray(ramp.astype(np.int32)), "TIFF")) == truth).all()
    big_endian = Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes())
    assert (decoded(saved(big_endian, "TIFF")) == truth).all()
    color = np.stack([ramp, ramp[::-1], ramp.T], -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in color)
    assert abs(decoded(png(16, 16, depth=16, pixels=zlib.compress(rows))) - color / 257).max() <= 1


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_floats_are_scaled_by_their_range(white: float) -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    truth = np.rint(ramp * 255)[..., None]
    assert abs(decoded(saved(Image.fromarray(ramp * np.float32(white)), "TIFF")) - truth).max() <= 1


# What a viewer shows for each EXIF orientation, in numpy. A picture is stored such that showing it gives `upright`.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),  # the 0th row is the visual right side: stored turned left, shown turned right
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16], upright[:16, 32:], upright[16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    best: dict[str, dict[str, object]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    options = best.get(format, {})
    shown = decoded(saved(stored, format, exif=exif, **options))
    assert shown.shape == upright.shape
    assert abs(shown.astype(int) - upright).max() <= (8 if format == "JPEG" else 0)


def test_orientation_is_applied_to_16_bits_too_and_broken_exif_is_ignored() -> None:
    values = RNG.integers(0, 65536, (4, 6), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 3
    assert (decoded(saved(Image.fromarray(values), exif=exif))[..., 0] == np.rint(values / 257)[::-1, ::-1]).all()
    pixels = noise(4, 4, 3)
    assert (decoded(saved(Image.fromarray(pixels), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")) == pixels).all()


def test_first_frame_of_animations() -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        data = saved(first, format, save_all=True, append_images=[second], lossless=True)
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
        assert (decoded(data) == (255, 0, 0)).all(), format


def swapped_profile() -> bytes:
    """A profile whose red and blue primaries are those of sRGB in exchange: following it exchanges the channels."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = profile.replace("sRGB built-in".encode("utf-16-be"), "swapped gamut".encode("utf-16-be"))
    tags = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * profile[131], 12)}
    red, blue = tags[b"rXYZ"] + 4, tags[b"bXYZ"] + 4
    profile[red : red + 8], profile[blue : blue + 8] = profile[blue : blue + 8], profile[red : red + 8]
    return bytes(profile)


def test_icc_profile_is_followed() -> None:
    profile = swapped_profile()
    pixels, alpha = noise(8, 8, 3), np.full((8, 8, 1), 255, np.uint8)
    for image in (Image.fromarray(pixels), Image.fromarray(np.concatenate([pixels, alpha], -1))):
        shown = decoded(saved(image, icc_profile=profile))
        assert abs(shown.astype(int) - pixels[..., ::-1]).max() <= 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for harmless in (srgb, b"no profile", profile[:200]):
        assert (decoded(saved(Image.fromarray(pixels), icc_profile=harmless)) == pixels).all()


def zipped(keyword: bytes, size: int) -> bytes:
    return keyword + b"\0\0" + zlib.compress(b"a" * size)


LARGE = 1 << 20  # bytes that Pillow unpacks of one chunk, and no more
LARGE_CHUNKS = {
    "compressed text": chunk(b"zTXt", zipped(b"parameters", LARGE + 1)),
    "compressed text of the limit": chunk(b"zTXt", zipped(b"parameters", LARGE)),
    "compressed UTF-8": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0\0" + zlib.compress(b"a" * 2 * LARGE)),
    "many texts": chunk(b"zTXt", zipped(b"a", LARGE - 1)) * 70,
    "plain texts": chunk(b"tEXt", b"a\0" + b"b" * 70 * LARGE),
    "color profile": chunk(b"iCCP", zipped(b"large", 3 * LARGE)),
    "bomb": chunk(b"zTXt", zipped(b"bomb", 500 * LARGE)),
    "profile bomb": chunk(b"iCCP", zipped(b"bomb", 500 * LARGE)),
}


@pytest.mark.parametrize("kind", LARGE_CHUNKS)
@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after the pixels"])
def test_large_texts_and_profiles_in_a_png_do_not_matter(kind: str, after: bool) -> None:
    pixels = noise(6, 9, 3)
    whole = saved(Image.fromarray(pixels))
    place = len(whole) - 12 if after else 33  # before IEND, or after IHDR
    assert (decoded(whole[:place] + LARGE_CHUNKS[kind] + whole[place:]) == pixels).all()


def test_a_large_color_profile_is_followed_and_small_texts_beside_large_ones_stay() -> None:
    pixels = noise(6, 9, 3)
    profile = swapped_profile() + bytes(3 * LARGE)
    exif = Image.Exif()
    exif[0x0112] = 3
    whole = saved(Image.fromarray(pixels), exif=exif)
    large = chunk(b"iCCP", b"large\0\0" + zlib.compress(profile)) + LARGE_CHUNKS["compressed text"]
    shown = decoded(whole[:33] + large + whole[33:])
    assert abs(shown.astype(int) - pixels[::-1, ::-1, ::-1]).max() <= 2  # turned around, red and blue exchanged


def test_large_texts_hide_no_damage() -> None:
    whole = saved(Image.fromarray(noise(6, 9, 3)))
    torn = bytearray(whole[:33] + LARGE_CHUNKS["compressed text"] + whole[33:])
    torn[60] ^= 1
    with pytest.raises(BadPictureError, match="picture is broken"):
        decode(bytes(torn))
    with pytest.raises(BadPictureError, match="picture is broken"):
        decode(whole[:33] + LARGE_CHUNKS["compressed text"] + whole[33:-20])


EXIF_ROTATED = Image.Exif()
EXIF_ROTATED[0x0112] = 6


def opened() -> dict[str, bytes]:
    """Files of every kind that conversion has to do something about."""
    color, alpha = noise(8, 12, 3), noise(8, 12)
    rgb, gray = Image.fromarray(color), Image.fromarray(alpha)
    palette = rgb.quantize(16)
    return {
        "RGB": saved(rgb),
        "rotated": saved(rgb, exif=EXIF_ROTATED),
        "rotated JPEG": saved(rgb, "JPEG", exif=EXIF_ROTATED),
        "RGBA": saved(Image.fromarray(np.dstack([color, alpha])), exif=EXIF_ROTATED),
        "LA": saved(Image.merge("LA", (gray, gray))),
        "1": saved(Image.fromarray(alpha > 127)),
        "P": saved(palette),
        "P with transparency": saved(palette, transparency=3),
        "I;16": saved(Image.fromarray(RNG.integers(0, 65536, (8, 12), dtype=np.uint16)), exif=EXIF_ROTATED),
        "CMYK": saved(Image.frombytes("CMYK", (8, 8), noise(8, 8, 4).tobytes()), "TIFF"),
        "F": saved(Image.fromarray(noise(8, 8).astype(np.float32)), "TIFF"),
        "profile": saved(rgb, icc_profile=swapped_profile()),
    }


@pytest.mark.parametrize("kind", opened())
def test_an_opened_picture_and_its_file_give_the_same_pixels(kind: str) -> None:
    data = opened()[kind]
    expected = decoded(data, "#204060")
    lazy = Image.open(io.BytesIO(data))
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    for image in (lazy, loaded, loaded.copy()):
        before = image.mode, image.size
        converted = to_rgb(image, "#204060")
        assert converted.mode == "RGB" and converted is not image and (image.mode, image.size) == before
        assert (np.asarray(converted) == expected).all()
        assert (np.asarray(to_rgb(converted)) == expected).all()  # nothing is turned or converted twice


def test_an_opened_picture_that_is_broken_or_empty_is_refused() -> None:
    data = saved(Image.fromarray(noise(64, 64, 3)))
    with pytest.raises(BadPictureError, match="picture is broken"):
        to_rgb(Image.open(io.BytesIO(data[:-200])))
    with pytest.raises(BadPictureError, match=r"no pixels \(0 x 4\)"):
        to_rgb(Image.new("RGB", (0, 4)))
    with pytest.raises(ValueError, match="unknown color"):
        to_rgb(Image.new("RGB", (2, 2)), "whitish")


@pytest.mark.parametrize("kind", bad_pictures())
def test_bad_pictures_are_refused(kind: str) -> None:
    data, what = bad_pictures()[kind]
    with pytest.raises(BadPictureError) as caught:
        decode(data)
    assert str(caught.value).startswith(what)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_damaged_bytes_raise_nothing_else(format: str) -> None:
    whole = np.frombuffer(saved(Image.fromarray(noise(24, 24, 3)), format), np.uint8)
    rng = np.random.default_rng(7)
    for _ in range(60):
        damaged = whole.copy()
        places = rng.integers(0, len(damaged), 4)
        damaged[places] = rng.integers(0, 256, 4)
        with contextlib.suppress(BadPictureError):
            decode(damaged.tobytes())


def test_unknown_background_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown color"):
        decode(saved(Image.new("RGB", (2, 2))), "whitish")


def test_squares_are_cut_where_they_should() -> None:
    x = np.broadcast_to(np.arange(10, dtype=np.uint8)[None, :, None], (4, 10, 3))
    wide, tall = np.ascontiguousarray(x), np.ascontiguousarray(x.transpose(1, 0, 2))
    assert to_square(Image.fromarray(wide), 4)[0, :, 0].tolist() == [3, 4, 5, 6]
    assert to_square(Image.fromarray(tall), 4)[:, 0, 0].tolist() == [3, 4, 5, 6]
    assert to_square(Image.fromarray(wide), 4, flip=True)[0, :, 0].tolist() == [6, 5, 4, 3]
    starts = [int(to_square(Image.fromarray(wide), 4, "random", (p, 0.99))[0, 0, 0]) for p in np.arange(0, 1, 1 / 70)]
    assert np.bincount(starts).tolist() == [10] * 7  # each of the 7 places equally often
    assert to_square(Image.fromarray(tall), 4, "random", (0.99, 0.0))[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_resampling_is_antialiased_and_keeps_the_mean() -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # a frequency that 32 pixels cannot hold: gray, or it is aliasing
    small = to_square(Image.fromarray(stripes), 32)
    assert small.shape == (32, 32, 3)
    assert abs(small.astype(int) - 127.5).max() < 8
    pixels = noise(32, 32, 3)
    assert (to_square(Image.fromarray(pixels), 32) == pixels).all()
    assert to_square(Image.fromarray(pixels[:3, :5]), 64).shape == (64, 64, 3)


def test_square_checks_its_arguments() -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="size is 0"):
        to_square(image, 0)
    with pytest.raises(ValueError, match="position"):
        to_square(image, 4, "random", (0.0, 1.0))
    with pytest.raises(ValueError, match="mode L"):
        to_square(image.convert("L"), 4)


def test_pixels_are_channels_first_in_minus_one_to_one() -> None:
    array = noise(5, 5, 3)
    array[0, 0], array[0, 1] = 0, 255
    pixels = to_pixels(array)
    assert pixels.dtype == np.float32 and pixels.shape == (3, 5, 5) and pixels.flags.c_contiguous
    assert (pixels[:, 0, 0] == -1).all() and (pixels[:, 0, 1] == 1).all()
    assert np.allclose(pixels[2], array[..., 2] / 127.5 - 1)
    assert (np.rint((pixels + 1) * 127.5).astype(np.uint8) == np.moveaxis(array, -1, 0)).all()
    assert to_pixels(np.stack([array, array])).shape == (2, 3, 5, 5)
