"""An exact verifier for images of shapes: reads the scene from the pixels and compares it with a caption.

Blobs of ink are matched with the masks that `tok2img/data/shapes.py` draws with. An image that is not plainly one scene
(a blob like no mask or like two, two colours in a blob, ink that belongs to no object) reads as None. Blur and noise
of an autoencoder are forgiven; the thresholds below stand between those and what must be refused.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image

from ..data.shapes import COLOURS, IMAGE_SIZE, POSITIONS, SHAPES, SIZES, Scene, ShapeObject, parse_caption, shape_mask

MIN_INK = 0.4  # a pixel of an object
MIN_BLOB = 12  # pixels; the smallest shape has 40
STRAY_INK, MAX_STRAY = 0.25, 4  # so many pixels this dark may lie apart from the objects
MIN_OVERLAP = 0.8  # at blur 0.6 and noise 8 / 255 the worst of 700 objects has 0.87
BLUR = 0.2  # weight of each neighbour, along rows and columns, in the blurred masks
MIN_MARGIN = 0.05  # in overlap, over the second best shape or size
MAX_COLOUR_DISTANCE = 55.0  # half of the distance between the two nearest colours
MIN_COLOUR_SHARE = 0.85
CELL_EDGES = (12.0, 20.0)  # centres that `draw` makes lie in 4.5-9, 14.5-17 and 22.5-26.5
MIN_ALIGNMENT = 2.0  # distance of centres along the relation over that across it; at least 5.4 as drawn


@lru_cache
def _masks(size: str) -> np.ndarray:
    """Every shape of a size in a box one pixel wider on each side, sharp, then blurred: `l k h w`, k as in `SHAPES`."""
    sharp = np.stack([np.pad(shape_mask(shape=shape, size=size), 1) for shape in SHAPES])
    itself, after, before = (np.eye(sharp.shape[1], k=k, dtype=np.float32) for k in (0, 1, -1))
    spread = (1 - 2 * BLUR) * itself + BLUR * (after + before)
    return np.stack([sharp, spread @ sharp @ spread])


def _grow(mask: np.ndarray) -> np.ndarray:
    """Each value becomes the largest of itself and its four neighbours: `h w` -> `h w`."""
    grown = mask.copy()
    for to, source in ((grown, mask), (grown.T, mask.T)):
        np.maximum(to[1:], source[:-1], out=to[1:])
        np.maximum(to[:-1], source[1:], out=to[:-1])
    return grown


def _blobs(mask: np.ndarray) -> Iterator[np.ndarray]:
    """The connected parts of a mask that are large enough for an object, each `h w`."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        grown = np.where(mask, _grow(labels), 0)
        if (grown == labels).all():
            break
        labels = grown
    names, counts = np.unique(labels[mask], return_counts=True)
    for name in names[counts >= MIN_BLOB]:
        yield labels == name


def _overlaps(ink: np.ndarray, size: str) -> tuple[np.ndarray, np.ndarray]:
    """Intersection over union of a blob with every shape of a size, at its best place near the blob's centre.

    Args:
        ink: `h w`, 0 outside the blob

    Returns:
        The overlaps `k`, sharp or blurred, whichever fits better, and the upper left corners `k 2` of the boxes.
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
    """The colour that nearly all pixels `n c` share, if their mean is close to it; blurred-in white is taken out."""
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    mean = pixels.mean(axis=0)
    unmixed = 255 - (255 - pixels) * 255 / (255 - mean.min())
    nearest = np.linalg.norm(unmixed[:, None] - palette, axis=2).argmin(axis=1)
    votes = np.bincount(nearest, minlength=len(palette))
    winner = votes.argmax()
    distance = np.linalg.norm(unmixed.mean(axis=0) - palette[winner])
    if votes[winner] < MIN_COLOUR_SHARE * len(pixels) or distance > MAX_COLOUR_DISTANCE:
        return None
    return list(COLOURS)[winner]


def _read_object(*, pixels: np.ndarray, ink: np.ndarray) -> tuple[ShapeObject, np.ndarray] | None:
    """Read one blob.

    Args:
        pixels: `h w c`
        ink: `h w`, 0 outside the blob

    Returns:
        The object and its centre (row, column), or None for a blob that is not plainly one of ours.
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


def _read_position(centre: np.ndarray) -> str | None:
    """Where an object with this centre `2` lies; between the places it lies nowhere."""
    cell = tuple(np.searchsorted(CELL_EDGES, centre).tolist())
    return next((position for position, cells in POSITIONS.items() if cells == (cell,)), None)


def _read_relation(*, first: np.ndarray, second: np.ndarray) -> str | None:
    """How the first centre `2` lies to the second, unless they lie on a diagonal."""
    down, right = second - first
    if abs(down) >= MIN_ALIGNMENT * abs(right):
        return "above" if down > 0 else "below"
    if abs(right) >= MIN_ALIGNMENT * abs(down):
        return "to the left of" if right > 0 else "to the right of"
    return None


def read_scene(image: Image.Image) -> Scene | None:
    """The scene that a 32 x 32 image plainly shows, in canonical form, or None."""
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"got an image of size {image.size}, expected {(IMAGE_SIZE, IMAGE_SIZE)}")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    ink = 1 - pixels.min(axis=2) / 255
    blobs = list(_blobs(ink > MIN_INK))
    stray = np.where(_grow(_grow(np.logical_or.reduce(blobs))), 0, ink) if blobs else ink
    if len(blobs) not in (1, 2) or (stray > STRAY_INK).sum() > MAX_STRAY:
        return None
    found = [_read_object(pixels=pixels, ink=np.where(_grow(blob), ink, 0)) for blob in blobs]
    if None in found:
        return None
    objects, centres = zip(*(pair for pair in found if pair is not None), strict=True)
    place = _read_position(*centres) if len(objects) == 1 else _read_relation(first=centres[0], second=centres[1])
    return None if place is None else Scene(objects, place).canonical()


def verify_scene(image: Image.Image, caption: str) -> bool:
    """Whether an image shows exactly what its caption says; a caption not of the grammar is a ValueError."""
    return read_scene(image) == parse_caption(caption).canonical()
