"""Load any file, bytes or PIL image as upright RGB, with one policy for all of the project.

- EXIF orientation is applied, transparent areas become white, 16-bit gray is scaled rather than
  clipped.
- An animation gives its first frame.
- The format is one of six, recognized by content alone; only regular files are opened, of at most
  64 megapixels.

Whatever cannot be shown faithfully raises an `ImageError` and is never repaired. Pillow's global
settings are not changed, so other users of Pillow in the same process see no difference.
"""

import io
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

ImageErrorCode = (
    Literal["missing", "not_regular_file", "permission", "empty", "not_image"]
    | Literal["unsupported_format", "unsupported_mode", "truncated", "corrupt", "too_large"]
)
ImageSource = str | os.PathLike[str] | bytes | Image.Image | Mapping[str, Any]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
# Uncompressed 16-bit RGBA is the largest file that this many pixels need. Pillow reads whole chunks
# into memory.
MAX_FILE_BYTES = 8 * MAX_PIXELS
# Pillow inflates up to 1 MB from each text chunk of a PNG, 64 MB in total, four times that as
# Python strings.
MAX_PNG_TEXTS = 12
# Signatures: of the supported formats, and of others so that a message can name them.
_SUPPORTED_START = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|BM|II\*\0|MM\0\*", re.DOTALL)
_OTHER_START = re.compile(
    rb"(?P<PDF>%PDF)|(?P<EPS>%!PS|\xc5\xd0\xd3\xc6)|(?P<PSD>8BPS)|(?P<ICO>\0\0\x01\0[^\0]\0)|(?P<ICNS>icns)"
    rb"|(?P<AVIF_or_HEIC>....ftyp)|(?P<JPEG_2000>\xff\x4f\xff\x51|\0\0\0\x0cjP  )|(?P<JPEG_XL>\xff\x0a|\0\0\0\x0cJXL )"
    rb"|(?P<PPM>P[1-7fF]\s)|(?P<DDS>DDS )|(?P<QOI>qoif)|(?P<SVG>(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<svg)",
    re.DOTALL,
)
_EXIF_ORIENTATION = 0x0112
# EXIF orientation: the transposition that makes the image upright.
_UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# First column, first row, column step, row step of the seven passes of an interlaced PNG.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
# Color type of a PNG: its number of channels.
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# `warnings.catch_warnings` swaps a global list: two threads inside it at the same time could leave
# it muted for good.
_warnings_lock = threading.Lock()


class ImageError(ValueError):
    """An image that cannot be loaded faithfully.

    Args:
        message: Names the file and the reason.
        code: The reason as a constant, one of `ImageErrorCode`, for counting and testing.

    Example:
        >>> from tokenizers_vq import ImageError, load_image
        >>> try:
        ...     load_image(b"no image")
        ... except ImageError as error:
        ...     print(error.code, "-", error)
        not_image - image bytes: not an image
    """

    def __init__(self, message: str, code: ImageErrorCode) -> None:
        super().__init__(message)
        self.code: ImageErrorCode = code

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, ImageErrorCode]]:
        """Pickle both arguments; the default would lose `code` between processes."""
        return ImageError, (str(self), self.code)


def load_image(source: ImageSource, *, min_side: int | None = None) -> Image.Image:
    """Load an image as upright RGB.

    Args:
        source: A path, the bytes of a file, a PIL image (not modified), or an undecoded cell of a
            `datasets` image column: a mapping with "bytes" and "path", of which "bytes" is used if
            both are given.
        min_side: Allow a JPEG to be decoded at a half, quarter or eighth of its size, as long as no
            side gets smaller than this, in pixels. For images that are resized afterwards. None
            decodes at full size. Measured: half of the decoding time or less, and resized pixels
            differ by a few of 255 steps.

    Returns:
        A PIL image of mode RGB without metadata.

    Raises:
        ImageError: If the image cannot be loaded. `code` tells why, the message names the file.

    Example:
        >>> from PIL import Image
        >>> from tokenizers_vq import load_image
        >>> transparent = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
        >>> image = load_image(transparent)
        >>> image.mode, image.size, image.getpixel((0, 0))
        ('RGB', (4, 2), (255, 255, 255))
    """
    if isinstance(source, Mapping):
        return _load_cell(source, min_side)
    if isinstance(source, Image.Image):
        return _upright_rgb(source, getattr(source, "filename", "") or "PIL image")
    if isinstance(source, bytes):
        return _load_bytes(source, "image bytes", min_side)
    if isinstance(source, str | os.PathLike):
        return _load_file(source, min_side)
    expected = "a path, bytes, a PIL image, or a mapping with 'bytes' or 'path'"
    raise ImageError(f"an image must be {expected}, not {type(source).__name__}", "not_image")


def _load_cell(cell: Mapping[str, Any], min_side: int | None) -> Image.Image:
    data, path = cell.get("bytes"), cell.get("path")
    if data is not None and not isinstance(data, bytes):
        raise ImageError(f"'bytes' of an image must be bytes, not {type(data).__name__}", "not_image")
    if data is not None:
        return _load_bytes(data, str(path or "image bytes"), min_side)
    if path is None:
        raise ImageError(f"an image must have 'bytes' or 'path', got only {sorted(map(str, cell))}", "missing")
    return load_image(path, min_side=min_side)


def _load_bytes(data: bytes, name: str, min_side: int | None) -> Image.Image:
    if not data:
        raise ImageError(f"{_shown(name)}: zero bytes", "empty")
    return _load_stream(io.BytesIO(data), name, min_side)


def _load_file(path: str | os.PathLike[str], min_side: int | None) -> Image.Image:
    name = os.fsdecode(path)
    try:
        _check_regular_file(os.stat(path), name)
        with open(path, "rb") as file:
            return _load_stream(file, name, min_side)
    except ImageError:
        raise
    except PermissionError as error:
        raise ImageError(f"{_shown(name)}: no permission to read it", "permission") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{_shown(name)}: no such file ({reason})", "missing") from error


def _check_regular_file(status: os.stat_result, name: str) -> None:
    """Raise an ImageError for anything but a file of an acceptable size.

    Must come before any `open`: opening a named pipe hangs, and reading a device may never end.
    """
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{_shown(name)}: not a regular file", "not_regular_file")
    if status.st_size == 0:
        raise ImageError(f"{_shown(name)}: zero bytes", "empty")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageError(f"{_shown(name)}: {status.st_size} bytes, more than {MAX_FILE_BYTES}", "too_large")


def _load_stream(file: BinaryIO, name: str, min_side: int | None) -> Image.Image:
    try:
        # Counted before Pillow opens the file, since opening inflates the texts.
        num_texts = sum(kind in (b"zTXt", b"iTXt") for kind, _ in _png_chunks(file))
        if num_texts > MAX_PNG_TEXTS:
            raise ImageError(f"{_shown(name)}: {num_texts} text chunks, more than {MAX_PNG_TEXTS}", "too_large")
        with _mute_pillow_warnings():
            image = Image.open(file, formats=FORMATS)
        with image:
            rgb = _upright_rgb(image, name, min_side)
            if image.format == "PNG" and _png_lacks_rows(image, file):
                raise ImageError(f"{_shown(name)}: truncated, rows are missing", "truncated")
            return rgb
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{_shown(name)}: {error}", "too_large") from error
    except Exception as error:  # Pillow raises many types for damaged input
        raise _diagnose(file, name, error) from error


def _diagnose(file: BinaryIO, name: str, error: Exception) -> ImageError:
    """Return the ImageError for a file that Pillow could not open, by its first bytes."""
    file.seek(0)
    start, size = file.read(1024), file.seek(0, os.SEEK_END)
    if _declared_size(start) > size:
        return ImageError(f"{_shown(name)}: truncated, it has only {size} bytes", "truncated")
    if not isinstance(error, UnidentifiedImageError):
        return _decoding_error(name, error)
    if _SUPPORTED_START.match(start):
        return ImageError(f"{_shown(name)}: its header is damaged", "corrupt")
    if other := _OTHER_START.match(start):
        kind = (other.lastgroup or "").replace("_", " ")
        return ImageError(f"{_shown(name)}: {kind} is not one of {', '.join(FORMATS)}", "unsupported_format")
    return ImageError(f"{_shown(name)}: not an image", "not_image")


def _declared_size(start: bytes) -> int:
    """Return the least file size that a WebP or TIFF header implies, in bytes; else 0.

    For a TIFF it is the offset of the first directory.
    """
    if len(start) < 12:
        return 0
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return 8 + int.from_bytes(start[4:8], "little")
    if start[:4] in (b"II*\0", b"MM\0*"):
        return int.from_bytes(start[4:8], "little" if start[:1] == b"I" else "big")
    return 0


def _upright_rgb(image: Image.Image, name: str, min_side: int | None = None) -> Image.Image:
    """Convert an opened image to upright RGB. The size is checked before pixels are decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{_shown(name)}: {image.width}x{image.height} exceeds {MAX_PIXELS} pixels", "too_large")
    if min_side is not None:
        image.draft(None, (min_side, min_side))  # affects JPEG only
    if image.mode in ("I", "F"):
        raise ImageError(f"{_shown(name)}: mode {image.mode} has no known range of values", "unsupported_mode")
    try:
        image.load()
    except Exception as error:  # as in _load_stream
        raise _decoding_error(name, error) from error
    try:
        rgb = _composite_on_white(image)
    except ValueError as error:
        raise ImageError(f"{_shown(name)}: mode {image.mode}: {error}", "unsupported_mode") from error
    method = _UPRIGHT_BY.get(_orientation(image))
    upright = rgb if method is None else rgb.transpose(method)
    upright.info.clear()  # otherwise a second load of this image would apply the orientation again
    return upright


def _composite_on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB, with white instead of the hidden color of transparent areas."""
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns almost every 16-bit image white.
        gray = np.array(image).astype(np.uint16)
        if isinstance(transparent := image.info.get("transparency"), int):
            gray[gray == transparent] = 65535
        return Image.fromarray(((gray.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(rgba, mask=rgba)
    return canvas


def _orientation(image: Image.Image) -> int:
    try:
        with _mute_pillow_warnings():
            return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # with unreadable metadata the image is shown as stored
        return 1


@contextmanager
def _mute_pillow_warnings() -> Iterator[None]:
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _png_lacks_rows(image: Image.Image, file: BinaryIO) -> bool:
    """Return True if a PNG lacks pixel rows, which Pillow silently fills with zeros.

    Inflating the data a second time costs time, so it is done only if the last row is all zeros.
    Interlaced files are always inflated, since their last row says nothing about the others.
    """
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    file.seek(16)
    width, height, depth, color, interlaced = struct.unpack(">IIBBxxB", file.read(13))
    if any(last_row.tobytes()) and not interlaced:
        return False
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    bits = depth * _PNG_CHANNELS[color]
    # Each row of each pass starts with a byte that names its filter.
    needed = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)
    return _inflated_pixel_size(file, needed) < needed


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield kind and length of each chunk of a PNG, with the file positioned at its data."""
    file.seek(0)
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        end = file.tell() + length + 4
        yield kind, length
        file.seek(end)


def _inflated_pixel_size(file: BinaryIO, enough: int) -> int:
    """Return the inflated size of a PNG's pixel data, or stop at `enough` bytes; needs 1 MiB."""
    inflater, size = zlib.decompressobj(), 0
    for kind, length in _png_chunks(file):
        if kind != b"IDAT":
            continue
        for start in range(0, length, 1 << 16):
            block = file.read(min(1 << 16, length - start))
            while block and size < enough:
                size += len(inflater.decompress(block, 1 << 20))
                block = inflater.unconsumed_tail
    return size


def _decoding_error(name: str, error: Exception) -> ImageError:
    """Return the ImageError for an error of Pillow's while decoding."""
    reason = str(error) or type(error).__name__
    if "too large" in reason:  # a metadata chunk that inflates beyond Pillow's limit
        return ImageError(f"{_shown(name)}: {reason}", "too_large")
    cut_short = isinstance(error, EOFError) or "truncated" in reason.lower()
    return ImageError(f"{_shown(name)}: {reason}", "truncated" if cut_short else "corrupt")


def _shown(name: str) -> str:
    """Return a file name that is safe in a message of one line."""
    return name if name.isprintable() else repr(name)
