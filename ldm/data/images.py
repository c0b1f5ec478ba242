"""The one decoding path: bytes of a picture file, or an opened picture => upright 8-bit RGB.

Folders hold gray, palette, transparent, CMYK, 16-bit and camera-rotated pictures. Training, the pipeline, the page and
the command line convert all of them here:

    bytes => opened and fully decoded                                                                    (decode)
          => upright => 8 bits a channel => sRGB => composited on a background => RGB                    (to_rgb)

A broken picture raises an error: PNG checksums are verified, and truncated files are refused. The format is detected
from the content, not the name, and only the formats of `FORMATS` are tried, so Pillow's other decoders never see
untrusted bytes. Pictures of more than `MAX_PIXELS` are refused by their header, before decoding.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
MAX_PIXELS = 89_478_485  # Pillow's own limit: a 24-bit picture of a quarter of a GiB
Crop: TypeAlias = Literal["center", "random", "detail"]
Size: TypeAlias = tuple[int, int]  # width and height in pixels, as Pillow has them

# PNG chunks that hold text or a color profile. Pillow refuses a whole picture if one of them unpacks to over 1 MiB.
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MAX_TEXT = 1 << 20  # Pillow's limit for one chunk
_MAX_TEXTS = 1 << 25  # for all of them; Pillow's limit is twice that
_MAX_PROFILE = 1 << 25  # the largest printer profiles have about 4 MiB

# The first bytes of a file => its kind, for pictures that do not open.
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
    """A picture that cannot be used; the message gives the reason, not the place."""


def decode(data: bytes, background: str = "white") -> Image.Image:
    """Decode a picture file into an upright 8-bit RGB picture.

    Args:
        data: the whole file. Of an animation the first frame is taken.
        background: color behind transparent pixels, as `PIL.ImageColor` names it: "white", "#808080".
    Returns:
        A picture of mode RGB, as `to_rgb` converts it.
    Raises:
        BadPictureError: if the file is of another format, broken, truncated, too large or has no pixels.
        ValueError: if `background` is no color.
    """
    color = _rgba(background)
    if not data:
        raise BadPictureError("picture is empty (0 bytes)")
    with _reported():
        try:
            image = _open(data)
        except UnidentifiedImageError:
            raise BadPictureError(_unidentified(data)) from None
        return _convert(image, color)


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert an opened picture to upright 8-bit RGB, exactly as `decode` does with its file.

    The picture is turned by its EXIF orientation, converted to sRGB by its ICC profile, and composited on `background`
    where it is transparent. 16-bit samples are scaled, not clipped: 65535 becomes 255. Float samples may be in
    [0, 1], [0, 255] or [0, 65535]; the largest sample decides which.

    Args:
        image: of any mode; one that Pillow has opened but not yet decoded is decoded now.
        background: color behind transparent pixels, as `PIL.ImageColor` names it: "white", "#808080".
    Returns:
        A new picture of mode RGB without metadata, so that converting it again changes nothing.
    Raises:
        BadPictureError: if the picture is broken, truncated, too large or has no pixels.
        ValueError: if `background` is no color.
    """
    color = _rgba(background)
    with _reported():
        return _convert(image, color)


def to_square(
    image: Image.Image,
    size: int,
    crop: Crop = "center",
    position: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> npt.NDArray[np.uint8]:
    """Crop the largest square out of a picture and resample it to `size` x `size`: `to_size`."""
    return to_size(image, (size, size), crop, position, flip)


def to_size(
    image: Image.Image,
    size: Size,
    crop: Crop = "center",
    position: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> npt.NDArray[np.uint8]:
    """Crop the largest window of an aspect ratio out of a picture and resample it to `size`, antialiased.

    The window is cut on whole pixels of the source, so a picture that has the right size is copied exactly.
    Lanczos keeps the outlines of small pictures that a box filter blurs.

    Args:
        image: mode RGB.
        size: width and height of the result in pixels.
        crop: where the window lies; "random" puts it at `position`. "detail" also puts it there, but takes the pixels
            of `size` as they are, where the picture has so many, instead of shrinking all of it.
        position: (x, y), each uniform in [0, 1); chosen by the caller, who owns the randomness.
        flip: mirror left to right.
    Returns:
        uint8 [height, width, 3].
    Raises:
        ValueError: for another mode, a side below 1 or a position outside [0, 1).
    """
    wide, high = size
    if image.mode != "RGB":
        raise ValueError(f"image has mode {image.mode}; expected RGB, as `decode` gives it")
    if min(size) < 1:
        raise ValueError(f"size is {wide} x {high}; expected at least 1 pixel")
    if not all(0 <= p < 1 for p in position):
        raise ValueError(f"position is {position}; expected two numbers in [0, 1)")
    window = (
        min(image.width, max(1, round(image.height * wide / high))),
        min(image.height, max(1, round(image.width * high / wide))),
    )
    if crop == "detail" and window[0] >= wide and window[1] >= high:
        window = size
    spare = [side - kept for side, kept in zip(image.size, window, strict=True)]
    if crop != "center":
        left, top = (int(p * (s + 1)) for p, s in zip(position, spare, strict=True))  # uniform over the s + 1 places
    else:
        left, top = (s // 2 for s in spare)
    box = (left, top, left + window[0], top + window[1])
    resized = image.resize(size, Image.Resampling.LANCZOS, box=box)
    if flip:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(resized)


def to_pixels(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 [..., H, W, 3] => float32 [..., 3, H, W] in [-1, 1]; 0 => -1 and 255 => 1 exactly."""
    pixels = np.moveaxis(array.astype(np.float32) / 127.5 - 1.0, -1, -3)
    return np.ascontiguousarray(pixels)


_TOO_LARGE = f"picture has more than {MAX_PIXELS // 1_000_000} megapixels"


def _rgba(background: str) -> tuple[int, ...]:
    return (*ImageColor.getrgb(background)[:3], 255)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Whatever Pillow raises => BadPictureError."""
    try:
        yield
    except BadPictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadPictureError(_TOO_LARGE) from None
    except Exception as error:
        raise BadPictureError(f"picture is broken ({_first_line(error)})") from None


def _open(data: bytes) -> Image.Image:
    """The first frame, decoded to the last byte."""
    try:
        return _decoded(data)
    except ValueError:
        slim, profile = _without_large_texts(data)
        if len(slim) == len(data):
            raise
    image = _decoded(slim)
    if profile:
        image.info["icc_profile"] = profile
    return image


def _decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image)
    if image.format == "PNG":  # Pillow checks the sums of the pixel chunks only in verify(), which uses the file up
        image.verify()
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.load()
    return image


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadPictureError(_TOO_LARGE)
    if width < 1 or height < 1:
        raise BadPictureError(f"picture has no pixels ({width} x {height})")


def _without_large_texts(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG without the texts and the color profile that Pillow refuses to unpack, and that profile.

    Pillow's limits are settings of its module, shared by the whole process. They stay as they are.
    """
    if not data.startswith(_PNG):
        return data, None
    kept, place, texts, profile = [_PNG], len(_PNG), 0, None
    while place + 12 <= len(data):  # length, name, content, checksum
        length, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        content, chunk = data[place + 8 : place + 8 + length], data[place : place + 12 + length]
        place += 12 + length
        if zlib.crc32(name + content) == int.from_bytes(chunk[-4:], "big"):  # a damaged chunk stays and is refused
            if name in _TEXTS:
                size = len(_unpacked(name, content, _MAX_TEXT))
                texts += size
                if size >= _MAX_TEXT or texts > _MAX_TEXTS:
                    continue
            elif name == b"iCCP" and len(found := _unpacked(name, content, _MAX_PROFILE)) >= _MAX_TEXT:
                profile = found if len(found) <= _MAX_PROFILE else None
                continue
        kept.append(chunk)
    return b"".join([*kept, data[place:]]), profile


def _unpacked(name: bytes, content: bytes, most: int) -> bytes:
    """The text or profile in a PNG chunk, cut off one byte after `most`; PNG specification, 11.3.2 and 11.3.3."""
    _, _, rest = content.partition(b"\0")  # after the keyword
    if name == b"iTXt":
        compressed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]  # after language and translated keyword
    else:
        compressed, rest = name != b"tEXt", rest[1:] if name != b"tEXt" else rest  # after the method of compression
    if not compressed:
        return rest[: most + 1]
    try:
        return zlib.decompressobj().decompress(rest, most + 1)
    except zlib.error:
        return b""


def _convert(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Any opened picture => RGB without metadata."""
    _check_size(image)
    image.load()
    result = _rgb(_upright(image), color)
    result.info = {}  # the orientation and the profile have been applied
    return result


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
