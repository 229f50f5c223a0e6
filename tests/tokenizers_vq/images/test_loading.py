import io
import os
import pickle
import struct
import threading
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizers_vq.images.loading import MAX_PIXELS, MAX_PNG_TEXTS, ImageError, load_image
from tokenizers_vq.images.processing import images_from_pixels, pixels_from_images

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
# The transpositions that store an upright image as a camera with orientation 2, 3, ... 8 would.
STORED_AS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]


def quadrants(width: int = 64, height: int = 48) -> Image.Image:
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def noise(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2, interlaced: int = 0, extra: bytes = b""
) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def code_of(source: object) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source)  # type: ignore[arg-type]
    return caught.value.code


def assert_quadrants(image: Image.Image, tolerance: int = 0) -> None:
    assert (image.mode, image.size) == ("RGB", (64, 48))
    for place, colour in {(8, 8): RED, (56, 8): GREEN, (8, 40): BLUE, (56, 40): WHITE}.items():
        seen = np.array(image.getpixel(place))
        assert np.abs(seen - colour).max() <= tolerance, (place, seen, colour)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_load_image_of_lossless_formats_is_exact(tmp_path: Path, image_format: str) -> None:
    path = tmp_path / "named.jpg"
    options = {"lossless": True} if image_format == "WEBP" else {}
    path.write_bytes(encoded(quadrants(), image_format, **options))
    assert_quadrants(load_image(path))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "JPEG"])
def test_load_image_applies_exif_orientation(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = quadrants()
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose[STORED_AS[orientation - 2]])
    upright = load_image(encoded(stored, image_format, exif=exif))
    assert_quadrants(upright, tolerance=40 if image_format == "JPEG" else 0)
    assert load_image(upright).tobytes() == upright.tobytes()


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 30, b"Exif\0\0nonsense"])
def test_load_image_with_unreadable_exif_keeps_the_orientation(exif: bytes) -> None:
    assert_quadrants(load_image(encoded(quadrants(), "PNG", exif=exif)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_load_image_shows_white_behind_transparency(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert("LA" if mode == "La" else "RGBA").convert(mode)
    assert load_image(image).getpixel((1, 1)) == WHITE
    assert load_image(Image.new("RGBA", (4, 4), (255, 0, 0, 128))).getpixel((1, 1)) == (255, 127, 127)


@pytest.mark.parametrize("transparency", [1, b"\xff\0"])
def test_load_image_shows_white_for_transparent_palette_entries(transparency: int | bytes) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0] + [0] * 762)
    assert load_image(encoded(image, "PNG", transparency=transparency)).getpixel((1, 1)) == WHITE


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_load_image_scales_16_bit_gray(image_format: str) -> None:
    levels = np.array([[0, 128, 129, 0x4C00, 65535]], dtype=np.uint16)
    loaded = load_image(encoded(Image.fromarray(levels), image_format))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 0, 1, 76, 255]


def test_load_image_shows_white_for_transparent_16_bit_gray() -> None:
    rows = b"\0" + struct.pack(">2H", 0x4C00, 0x9600)
    data = png(2, 1, rows, depth=16, colour=0, extra=chunk(b"tRNS", struct.pack(">H", 0x4C00)))
    assert np.asarray(load_image(data))[0, :, 0].tolist() == [255, 149]


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP"])
def test_load_image_of_an_animation_returns_the_first_frame(image_format: str) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    frames = [Image.new("RGB", (64, 48), colour) for colour in (GREEN, RED)]
    assert_quadrants(load_image(encoded(quadrants(), image_format, save_all=True, append_images=frames, **options)))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_load_image_of_modes_without_a_known_range_raises(mode: str) -> None:
    assert code_of(encoded(quadrants().convert("L").convert(mode), "TIFF")) == "unsupported_mode"
    assert code_of(Image.new(mode, (4, 4))) == "unsupported_mode"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_load_image_of_half_a_file_reports_truncated(image_format: str) -> None:
    data = encoded(noise().quantize(64) if image_format == "GIF" else noise(), image_format)
    assert code_of(data[: len(data) // 2]) == "truncated"


def test_load_image_of_a_png_distinguishes_missing_rows_from_black_ones() -> None:
    assert code_of(png(8, 8, (b"\0" + b"\x80" * 24) * 5)) == "truncated"
    assert load_image(png(8, 8, (b"\0" + b"\0" * 24) * 8)).getpixel((0, 7)) == (0, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 9), (8, 8)])
def test_load_image_of_an_interlaced_png_detects_a_missing_byte(size: tuple[int, int]) -> None:
    width, height = size
    grid = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = [(len(range(x, width, dx)), len(range(y, height, dy))) for x, y, dx, dy in grid]
    rows = b"".join((b"\0" + b"\x40" * 3 * columns) * lines for columns, lines in passes if columns)
    assert load_image(png(width, height, rows, interlaced=1)).getpixel((0, 0)) == (64, 64, 64)
    assert code_of(png(width, height, rows[:-1], interlaced=1)) == "truncated"


def test_load_image_rejects_too_many_pixels_by_the_header() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    start = time.perf_counter()
    for width, height in ((side, side), (9_000, 9_000), (10_000, 10_000), (2**31 - 1, 2**31 - 1)):
        assert code_of(png(width, height, b"\0" * 1000)) == "too_large"
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("num_chunks", [MAX_PNG_TEXTS, 60])
@pytest.mark.parametrize("num_bytes", [900_000, 2_000_000])
def test_load_image_of_a_png_text_bomb_needs_little_memory(num_chunks: int, num_bytes: int) -> None:
    bomb = zlib.compress(b"A" * num_bytes)
    extra = b"".join(chunk(b"zTXt", b"key%d\0\0" % i + bomb) for i in range(num_chunks))
    data = png(8, 8, (b"\0" + b"\x80" * 24) * 8, extra=extra)
    tracemalloc.start()
    try:
        load_image(data)
    except ImageError as error:
        assert error.code == "too_large"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_load_image_distinguishes_missing_empty_and_irregular_files(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    names = ("absent.png", "empty.png", "text.png", "pipe.png", "zero.png", ".", "text.png/x.png", "n" * 300)
    expected = ["missing", "empty", "not_image", *["not_regular_file"] * 3, "missing", "missing"]
    assert [code_of(tmp_path / name) for name in names] == expected


@pytest.mark.parametrize("image_format", ["PPM", "JPEG2000", "AVIF", "EPS", "PDF", "ICO"])
def test_load_image_of_other_formats_reports_unsupported_format(image_format: str) -> None:
    try:
        data = encoded(quadrants(), image_format)
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow writes no {image_format}: {error}")
    assert code_of(data) == "unsupported_format"


@pytest.mark.parametrize("source", [None, 3, [b""], {"bytes": "text"}, {"path": 3}, b"\0", b"\x89"])
def test_load_image_of_other_values_reports_not_image(source: object) -> None:
    assert code_of(source) == "not_image"
    assert code_of({"bytes": None, "path": None}) == "missing"


def test_image_error_names_the_file_in_one_line(tmp_path: Path) -> None:
    for source in (str(tmp_path / "a.png"), {"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "dir/a.png"}):
        with pytest.raises(ImageError, match=r"a\.png: "):
            load_image(source)
    with pytest.raises(ImageError, match="image bytes: "):
        load_image(b"x")
    with pytest.raises(ImageError) as caught:
        load_image("two\nlines.png")
    assert "\n" not in str(caught.value)


def test_image_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.png: zero bytes", "empty")))
    assert (str(error), error.code) == ("a.png: zero bytes", "empty")


def test_load_image_does_not_modify_a_pil_image() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    load_image(image).putpixel((0, 0), RED)
    assert (image.mode, image.getpixel((0, 0))) == ("RGBA", (0, 0, 0, 0))


def smooth(width: int, height: int) -> Image.Image:
    corners = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    return images_from_pixels(
        torch.nn.functional.interpolate(corners, size=(height, width), mode="bicubic").clamp(0, 1)
    )[0]


@pytest.mark.parametrize(
    ("size", "read"),
    [((256, 256), (64, 64)), ((300, 131), (150, 66)), ((130, 900), (65, 450)), ((127, 500), (127, 500))],
)
def test_load_image_with_min_side_decodes_a_large_jpeg_smaller(size: tuple[int, int], read: tuple[int, int]) -> None:
    data = encoded(smooth(*size), "JPEG", quality=95)
    small, whole = load_image(data, min_side=64), load_image(data)
    assert (small.size, whole.size, small.mode) == (read, size, "RGB")
    ours, plain = (pixels_from_images([each], image_size=32, num_channels=3) for each in (small, whole))
    assert (ours - plain).abs().mean() < 4 / 255 and (ours - plain).abs().max() < 20 / 255


def test_load_image_with_min_side_applies_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = quadrants(256, 192).transpose(Image.Transpose.ROTATE_90)
    turned = load_image(encoded(stored, "JPEG", exif=exif), min_side=48)
    assert turned.size == (64, 48)
    assert np.abs(np.asarray(turned, dtype=int) - np.asarray(quadrants(64, 48), dtype=int)).mean() < 4


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP"])
def test_load_image_with_min_side_decodes_other_formats_in_full(image_format: str) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(noise(256, 128), image_format, **options)
    assert load_image(data, min_side=16).tobytes() == noise(256, 128).tobytes()


def test_load_image_in_threads_restores_the_warning_filters() -> None:
    data, filters = encoded(quadrants(), "PNG"), list(warnings.filters)
    threads = [threading.Thread(target=lambda: [load_image(data) for _ in range(30)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == filters


@pytest.mark.parametrize("num_channels", [1, 3])
def test_images_from_pixels_inverts_pixels_from_images(num_channels: int) -> None:
    images = [noise(32, 32, "L" if num_channels == 1 else "RGB"), quadrants(32, 32).convert("L").convert("RGB")]
    pixels = pixels_from_images(images, image_size=32, num_channels=num_channels)  # type: ignore[arg-type]
    assert (pixels.shape, pixels.dtype, pixels.is_contiguous()) == ((2, num_channels, 32, 32), torch.float32, True)
    mode = "L" if num_channels == 1 else "RGB"
    expected = [image.convert(mode).tobytes() for image in images]
    assert [image.tobytes() for image in images_from_pixels(pixels)] == expected


def test_pixels_from_images_crops_the_center_exactly() -> None:
    image = noise(39, 32)
    pixels = pixels_from_images([image], image_size=32, num_channels=3)
    assert images_from_pixels(pixels)[0].tobytes() == image.crop((3, 0, 35, 32)).tobytes()


def test_pixels_from_images_by_an_integer_factor_averages_boxes() -> None:
    image = noise(64, 64)
    boxes = np.asarray(image, dtype=np.float32).reshape(16, 4, 16, 4, 3).mean((1, 3)).transpose(2, 0, 1) / 255
    pixels = pixels_from_images([image], image_size=16, num_channels=3)
    torch.testing.assert_close(pixels[0], torch.from_numpy(boxes), atol=0.6 / 255, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (300, 20)])
def test_pixels_from_images_of_any_size_returns_the_requested_square(size: tuple[int, int]) -> None:
    pixels = pixels_from_images([Image.new("RGB", size, RED)], image_size=16, num_channels=3)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.mean((0, 2, 3)).tolist() == [1, 0, 0]  # red, green, blue


def test_pixels_from_images_with_invalid_arguments_raises() -> None:
    image = Image.new("RGB", (4, 4))
    for images, image_size, num_channels in (
        ([], 4, 3),
        ([image], 0, 3),
        ([image], 4, 2),
        ([image.convert("P")], 4, 3),
    ):
        with pytest.raises(ValueError, match="expected"):
            pixels_from_images(images, image_size=image_size, num_channels=num_channels)  # type: ignore[arg-type]


def test_images_from_pixels_clamps_and_rounds() -> None:
    pixels = torch.tensor([-3.0, 0.5 / 255 + 1e-4, 1.4 / 255, float("inf")]).reshape(1, 1, 2, 2)
    assert list(images_from_pixels(pixels)[0].tobytes()) == [0, 1, 1, 255]


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 2, 4, 4), (1, 3, 4, 4)])
def test_images_from_pixels_of_another_shape_or_nan_raises(shape: tuple[int, ...]) -> None:
    pixels = torch.full(shape, torch.nan)
    with pytest.raises(ValueError, match="expected floats|NaN"):
        images_from_pixels(pixels)
