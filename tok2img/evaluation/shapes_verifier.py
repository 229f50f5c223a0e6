"""An exact verifier for images of shapes: reads the scene from the pixels and compares it with a caption.

Connected regions of ink are matched with the masks that `tok2img/data/shapes.py` draws with. An
image that is not clearly
one scene reads as None: a region that matches no mask or two of them, two colors in a region, or
    ink outside the objects.
The thresholds below tolerate the blur and noise of an autoencoder, and reject everything that is wrong with a scene.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image

from ..data.shapes import COLOURS, IMAGE_SIZE, POSITIONS, SHAPES, SIZES, Scene, ShapeObject, parse_caption, shape_mask

MIN_INK = 0.4  # ink of a pixel that belongs to an object
MIN_REGION_SIZE = 12  # pixels; the smallest shape has 40
STRAY_INK, MAX_STRAY = 0.25, 4  # at most this many pixels outside the objects may be this dark
MIN_OVERLAP = 0.8  # measured: at blur 0.6 and noise 8 / 255 the worst of 700 objects has 0.87
BLUR = 0.2  # weight of each neighbor, along rows and columns, in the blurred masks
MIN_MARGIN = 0.05  # of the overlap, over the second best shape or size
MAX_COLOUR_DISTANCE = 55.0  # half of the distance between the two nearest colors
MIN_COLOUR_SHARE = 0.85
CELL_EDGES = (12.0, 20.0)  # pixels; the centers of drawn objects lie in 4.5-9, 14.5-17 and 22.5-26.5
MIN_ALIGNMENT = 2.0  # ratio of the distances of two centers along and across a relation; at least 5.4 as drawn


@lru_cache
def _masks(size: str) -> np.ndarray:
    """Return the mask of every shape of a size, padded by one pixel: `l k h w`, l sharp and blurred, k as in `SHAPES`."""
    sharp = np.stack([np.pad(shape_mask(shape=shape, size=size), 1) for shape in SHAPES])
    itself, after, before = (np.eye(sharp.shape[1], k=k, dtype=np.float32) for k in (0, 1, -1))
    spread = (1 - 2 * BLUR) * itself + BLUR * (after + before)
    return np.stack([sharp, spread @ sharp @ spread])


def _dilate(mask: np.ndarray) -> np.ndarray:
    """Dilate: replace each value of `h w` by the maximum of itself and its four neighbors."""
    grown = mask.copy()
    for to, source in ((grown, mask), (grown.T, mask.T)):
        np.maximum(to[1:], source[:-1], out=to[1:])
        np.maximum(to[:-1], source[1:], out=to[:-1])
    return grown


def _connected_regions(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the connected regions of a mask `h w` that are large enough for an object, each as a mask `h w`."""
    # Every pixel starts with a label of its own; the largest label spreads through its region until nothing changes.
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        grown = np.where(mask, _dilate(labels), 0)
        if (grown == labels).all():
            break
        labels = grown
    names, counts = np.unique(labels[mask], return_counts=True)
    for name in names[counts >= MIN_REGION_SIZE]:
        yield labels == name


def _overlaps(ink: np.ndarray, size: str) -> tuple[np.ndarray, np.ndarray]:
    """Compute the intersection over union of a region with every shape, at its best offset near the region's center.

    Args:
        ink: Ink, `h w`, 0 outside the region.
        size: Size of the shapes.

    Returns:
        The overlaps `k`, sharp or blurred, whichever is larger, and the upper left corners `k 2` (row, column) of the
        shapes.
    """
    masks, side = _masks(size), SIZES[size] + 2
    rows, columns = np.nonzero(ink > MIN_INK)
    middle = [(axis.min() + axis.max() + 1 - side) / 2 for axis in (rows, columns)]
    starts = [np.arange(np.floor(m) - 1, np.ceil(m) + 2, dtype=int) for m in middle]
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(ink, side), (side, side))
    near = windows[np.ix_(starts[0] + side, starts[1] + side)].reshape(-1, 1, 1, side, side)
    shared = np.minimum(near, masks).sum(axis=(3, 4))
    overlaps = (shared / (ink.sum() + masks.sum(axis=(2, 3)) - shared)).max(axis=1)
    best = overlaps.argmax(axis=0)
    corners = np.stack([starts[0][best // len(starts[1])], starts[1][best % len(starts[1])]], axis=1)
    return overlaps.max(axis=0), corners + 1


def _read_colour(pixels: np.ndarray) -> str | None:
    """Return the color of nearly all pixels, or None if there is no such color or their mean is far from it.

    Args:
        pixels: Pixels, `n c` from 0 to 255.
    """
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    mean = pixels.mean(axis=0)
    # A palette color has a channel at 0. The white that blur mixed in shows as the minimum of the mean; it is removed.
    unmixed = 255 - (255 - pixels) * 255 / (255 - mean.min())
    nearest = np.linalg.norm(unmixed[:, None] - palette, axis=2).argmin(axis=1)
    votes = np.bincount(nearest, minlength=len(palette))
    winner = votes.argmax()
    distance = np.linalg.norm(unmixed.mean(axis=0) - palette[winner])
    if votes[winner] < MIN_COLOUR_SHARE * len(pixels) or distance > MAX_COLOUR_DISTANCE:
        return None
    return list(COLOURS)[winner]


def _read_object(*, pixels: np.ndarray, ink: np.ndarray) -> tuple[ShapeObject, np.ndarray] | None:
    """Read one object.

    Args:
        pixels: Pixels, `h w c` from 0 to 255.
        ink: Ink, `h w`, 0 outside the object's region.

    Returns:
        The object and its center `2` (row, column), or None if the region is not clearly one of the shapes.
    """
    overlaps, corners = (np.stack(parts) for parts in zip(*(_overlaps(ink, size) for size in SIZES), strict=True))
    second, first = np.sort(overlaps, axis=None)[-2:]
    if first < MIN_OVERLAP or first - second < MIN_MARGIN:
        return None
    which, shape = np.unravel_index(overlaps.argmax(), overlaps.shape)
    size = list(SIZES)[which]
    top, left = corners[which, shape]
    if min(top, left) < 0 or max(top, left) + SIZES[size] > IMAGE_SIZE:
        return None
    box = pixels[top : top + SIZES[size], left : left + SIZES[size]]
    colour = _read_colour(box[shape_mask(shape=SHAPES[shape], size=size) > 0.99])
    if colour is None:
        return None
    return ShapeObject(size, colour, SHAPES[shape]), corners[which, shape] + SIZES[size] / 2


def _read_position(center: np.ndarray) -> str | None:
    """Return the position phrase for an object with this center `2`, or None between the positions."""
    cell = tuple(np.searchsorted(CELL_EDGES, center).tolist())
    return next((position for position, cells in POSITIONS.items() if cells == (cell,)), None)


def _read_relation(*, first: np.ndarray, second: np.ndarray) -> str | None:
    """Return the relation of the first center `2` to the second, or None if they lie on a diagonal."""
    down, right = second - first
    if abs(down) >= MIN_ALIGNMENT * abs(right):
        return "above" if down > 0 else "below"
    if abs(right) >= MIN_ALIGNMENT * abs(down):
        return "to the left of" if right > 0 else "to the right of"
    return None


def read_scene(image: Image.Image) -> Scene | None:
    """Read the scene that an image shows.

    Args:
        image: An image of 32 x 32 pixels.

    Returns:
        The scene in canonical form, or None if the image is not clearly one scene.
    """
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"Expected an image of size {(IMAGE_SIZE, IMAGE_SIZE)}, got {image.size}.")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    ink = 1 - pixels.min(axis=2) / 255
    regions = list(_connected_regions(ink > MIN_INK))
    stray = np.where(_dilate(_dilate(np.logical_or.reduce(regions))), 0, ink) if regions else ink
    if len(regions) not in (1, 2) or (stray > STRAY_INK).sum() > MAX_STRAY:
        return None
    found = [_read_object(pixels=pixels, ink=np.where(_dilate(region), ink, 0)) for region in regions]
    if None in found:
        return None
    objects, centers = zip(*(pair for pair in found if pair is not None), strict=True)
    position = _read_position(*centers) if len(objects) == 1 else _read_relation(first=centers[0], second=centers[1])
    return None if position is None else Scene(objects, position).canonical()


def verify_scene(image: Image.Image, caption: str) -> bool:
    """Check whether an image shows exactly the scene of a caption.

    Args:
        image: An image of 32 x 32 pixels.
        caption: A caption of the grammar of the built-in shapes.

    Raises:
        ValueError: For an image of another size, or another caption.
    """
    return read_scene(image) == parse_caption(caption).canonical()
