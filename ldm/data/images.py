"""Bytes of a picture file => the RGB pixels its maker meant.

A folder found in the wild holds gray, palette, transparent, CMYK, 16-bit and camera-rotated pictures. Each is
brought to upright 8-bit RGB here and nowhere else:

    bytes => opened and fully decoded => upright => 8 bits a channel => sRGB => composited on a background => RGB

A broken picture is an error, not a half-gray one: PNG checksums are verified, and truncated files refused.
Only the formats of `FORMATS` are tried, told by content and not by name, so that no other decoder of Pillow's
ever sees a stranger's bytes; pictures of more than `MAX_PIXELS` are refused by their header, before decoding.
"""

from __future__ import annotations

import io
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
MAX_PIXELS = 89_478_485  # Pillow's own limit: a 24-bit picture of a quarter of a GiB
Crop: TypeAlias = Literal["center", "random"]

# What the first bytes say, for pictures that do not open.
_KINDS = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"RIFF", "WEBP"),
    (b"%PDF", "a PDF"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip-compressed"),
    (b"8BPS", "a Photoshop file"),
    (b"version https://git-lfs", "a Git LFS pointer (`git lfs pull` fetches the picture)"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG"),
    (b"<?xml", "an XML file or SVG"),
)

# EXIF orientation => what turns the stored picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadPictureError(ValueError):
    """A picture that cannot be used; the message says why, not where."""


def decode(data: bytes, background: str = "white") -> Image.Image:
    """Decode a picture file into an upright 8-bit RGB picture.

    Of an animation the first frame is taken. 16-bit samples are scaled, not clipped: 65535 becomes 255. Float
    samples may be in [0, 1], [0, 255] or [0, 65535]; the largest sample tells which.

    Args:
        data: the whole file.
        background: color behind transparent pixels, as `PIL.ImageColor` names it: "white", "#808080".
    Returns:
        A picture of mode RGB.
    Raises:
        BadPictureError: if the file is of another format, broken, truncated, too large or has no pixels.
        ValueError: if `background` is no color.
    """
    color = (*ImageColor.getrgb(background)[:3], 255)
    if not data:
        raise BadPictureError("picture is empty (0 bytes)")
    try:
        return _rgb(_upright(_open(data)), color)
    except BadPictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPictureError(_TOO_LARGE) from None
    except UnidentifiedImageError:
        raise BadPictureError(_unidentified(data)) from None
    except Exception as error:
        raise BadPictureError(f"picture is broken ({_first_line(error)})") from None


def to_square(
    image: Image.Image,
    size: int,
    crop: Crop = "center",
    position: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> npt.NDArray[np.uint8]:
    """Crop the largest square out of a picture and resample it to `size`, antialiased.

    The square is cut on whole pixels of the source, so a picture that has the right size is copied exactly.
    Lanczos keeps the outlines of small pictures that a box filter blurs.

    Args:
        image: mode RGB.
        size: side of the result in pixels.
        crop: where the square lies along the longer side; "random" puts it at `position`.
        position: (x, y), each uniform in [0, 1); the caller draws them, so that the caller owns the randomness.
        flip: mirror left to right.
    Returns:
        uint8 [size, size, 3].
    Raises:
        ValueError: for another mode, a size below 1 or a position outside [0, 1).
    """
    if image.mode != "RGB":
        raise ValueError(f"image has mode {image.mode}; expected RGB, as `decode` gives it")
    if size < 1:
        raise ValueError(f"size is {size}; expected at least 1 pixel")
    if not all(0 <= p < 1 for p in position):
        raise ValueError(f"position is {position}; expected two numbers in [0, 1)")
    short = min(image.size)
    spare = [side - short for side in image.size]
    if crop == "random":
        left, top = (int(p * (s + 1)) for p, s in zip(position, spare, strict=True))  # uniform over the s + 1 places
    else:
        left, top = (s // 2 for s in spare)
    box = (left, top, left + short, top + short)
    square = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
    if flip:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(square)


def to_pixels(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 [..., H, W, 3] => float32 [..., 3, H, W] in [-1, 1]; 0 => -1 and 255 => 1 exactly."""
    pixels = np.moveaxis(array.astype(np.float32) / 127.5 - 1.0, -1, -3)
    return np.ascontiguousarray(pixels)


_TOO_LARGE = f"picture has more than {MAX_PIXELS // 1_000_000} megapixels"


def _open(data: bytes) -> Image.Image:
    """The first frame, decoded to the last byte."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadPictureError(_TOO_LARGE)
    if width < 1 or height < 1:
        raise BadPictureError(f"picture has no pixels ({width} x {height})")
    if image.format == "PNG":  # Pillow checks the sums of the pixel chunks only in verify(), which uses the file up
        image.verify()
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))  # Pillow has turned TIFFs already, and dropped their tag
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Any mode => RGB, transparent pixels composited on `color` (RGBA)."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")  # palette, gray with a transparent value, premultiplied => RGBA
    elif image.mode in ("P", "YCbCr", "HSV"):
        image = image.convert("RGB")
    image = _srgb(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, color), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray, or gray kept in 32-bit integers or floats => L, or LA where one gray value means transparent."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise BadPictureError("picture has samples that are not finite")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        raise BadPictureError(f"picture has samples in [{low:g}, {high:g}]; expected [0, 65535]")
    white = 65535.0
    if image.mode == "F":
        white = next(top for top in (1.0, 255.0, 65535.0) if high <= top)
    gray = Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _srgb(image: Image.Image) -> Image.Image:
    """Through the picture's own ICC profile to sRGB, where it has one that fits and is not sRGB itself.

    Without it, the naive formula makes neon of a printer's CMYK, and wide-gamut photographs come out pale.
    """
    data = image.info.get("icc_profile")
    if not data or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space.strip()
        if space != image.mode.rstrip("A") or "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        mode = "RGB" if image.mode == "CMYK" else image.mode
        result = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ImportError):  # a broken profile, or a Pillow without LittleCMS
        return image
    return image if result is None else result


def _unidentified(data: bytes) -> str:
    expected = ", ".join(FORMATS)
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis"):
        return f"picture is HEIC or AVIF; expected one of {expected}"
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = next((kind for magic, kind in _KINDS if start.startswith(magic.lower())), None)
    if kind in FORMATS:
        return f"picture is broken ({kind} whose header cannot be read)"
    return f"picture is {kind or 'of an unknown kind'}; expected one of {expected}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__
