"""Built-in captioned images: one or two coloured shapes on white, 32 by 32 pixels.

A `Scene` is what a caption says. `draw` turns it into one of its images: every object lands in a cell of a
3 x 3 grid, jittered. Scenes, not images, are divided into splits, so that a prior can be asked for compositions
(`held_out`) and for colours of shapes (`unseen_pairs`) that it never saw.
`tok2img/evaluation/shapes_verifier.py` reads a
scene back from its image.
"""

import hashlib
import io
import re
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Literal, get_args

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from .archives import MissingSplitError

IMAGE_SIZE = 32
BACKGROUND = 255
# Every colour has a channel at 0, so that 1 - min(r, g, b) / 255 is how much of a pixel is covered, whatever the
# colour. The two nearest, orange and yellow, are 110 apart.
COLOURS = {
    "red": (220, 0, 20),
    "orange": (255, 125, 0),
    "yellow": (255, 235, 0),
    "green": (0, 150, 40),
    "cyan": (0, 220, 230),
    "blue": (0, 50, 230),
    "purple": (150, 0, 190),
    "black": (0, 0, 0),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 9, "large": 14}  # 14 and not 15: two large ones, 2 pixels apart, must fit on the lattice
# A lattice of 4 pixels makes few distinct patches of 4x4, which a small tokenizer and a small
# prior learn sooner. Two jittered
# objects on it keep their order and their cell: centres of neighbouring cells are at least 6.5 pixels apart.
LATTICE = 4
MIN_GAP = 2
# Where an object of this size may start within the low, middle and high third of an axis.
STARTS = {
    "small": (range(0, 5, LATTICE), range(12, 13, LATTICE), range(20, 21, LATTICE)),
    "large": (range(0, 1, LATTICE), range(8, 9, LATTICE), range(16, 17, LATTICE)),
}
# Phrase -> the cell (row, column) of each object.
POSITIONS = {
    "at the top left": ((0, 0),),
    "at the top right": ((0, 2),),
    "at the bottom left": ((2, 0),),
    "at the bottom right": ((2, 2),),
    "in the centre": ((1, 1),),
}
RELATIONS = {
    "above": ((0, 1), (2, 1)),
    "below": ((2, 1), (0, 1)),
    "to the left of": ((1, 0), (1, 2)),
    "to the right of": ((1, 2), (1, 0)),
}
PLACES = POSITIONS | RELATIONS
INVERSES = {"below": "above", "to the right of": "to the left of"}
Split = Literal["train", "validation", "held_out", "unseen_pairs"]
SPLITS: tuple[Split, ...] = get_args(Split)
UNSEEN_PAIRS = frozenset(zip(("green", "purple", "red", "cyan", "orange", "blue"), SHAPES, strict=True))
HELD_OUT_SHARE = 0.05
_OBJECT = f"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(f"{_OBJECT} (?:({'|'.join(POSITIONS)})|({'|'.join(RELATIONS)}) {_OBJECT})")


@dataclass(frozen=True)
class ShapeObject:
    """One object of a scene, such as a small red circle."""

    size: str
    colour: str
    shape: str

    def __post_init__(self) -> None:
        for value, allowed in ((self.size, SIZES), (self.colour, COLOURS), (self.shape, SHAPES)):
            if value not in allowed:
                raise ValueError(f"got {value!r}, expected one of {', '.join(allowed)}")

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One object with its position, or two with the relation of the first to the second."""

    objects: tuple[ShapeObject, ...]
    place: str

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise ValueError(f"got {len(self.objects)} objects, expected 1 or 2")
        allowed = POSITIONS if len(self.objects) == 1 else RELATIONS
        if self.place not in allowed:
            raise ValueError(f"got place {self.place!r}, expected one of {', '.join(allowed)}")

    def canonical(self) -> "Scene":
        """Return the canonical form of the scene: "A above B" instead of "B below A"."""
        if self.place not in INVERSES:
            return self
        return Scene(objects=self.objects[::-1], place=INVERSES[self.place])


def scene_caption(scene: Scene) -> str:
    """Write the caption of a scene; `parse_caption` is the inverse."""
    return f" {scene.place} ".join(map(str, scene.objects)) + (f" {scene.place}" if len(scene.objects) == 1 else "")


def parse_caption(caption: str) -> Scene:
    """Parse a caption into its scene; ValueError for a caption outside the grammar."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(
            f"cannot read the caption {caption!r}; expected one like 'a small red circle at the top left' or "
            f"'a small red circle above a large blue square' with colours {', '.join(COLOURS)}; shapes "
            f"{', '.join(SHAPES)}; sizes {', '.join(SIZES)}; places {', '.join(PLACES)}"
        )
    size, colour, shape, position, relation, *other = match.groups()
    first = ShapeObject(size, colour, shape)
    if position is not None:
        return Scene((first,), position)
    return Scene((first, ShapeObject(*other)), relation)


@lru_cache
def shape_mask(*, shape: str, size: str, oversampling: int = 16) -> np.ndarray:
    """Compute the coverage of each pixel of a shape's box, from 0 to 1: `h w`."""
    side = SIZES[size]
    axis = (np.arange(side * oversampling) + 0.5) / (side * oversampling) * 2 - 1
    x, y = axis[None, :], axis[:, None]
    inside = {
        "circle": x**2 + y**2 <= 1,
        "square": np.maximum(abs(x), abs(y)) <= 1,
        "triangle": abs(x) <= (y + 1) / 2,
        "diamond": abs(x) + abs(y) <= 1,
        "cross": np.minimum(abs(x), abs(y)) <= 1 / 3,
        "ring": (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.55**2),
    }[shape]
    mask = inside.reshape(side, oversampling, side, oversampling).mean(axis=(1, 3), dtype=np.float32)
    mask.flags.writeable = False  # the cache hands the same array to everyone
    return mask


@lru_cache
def _stamp(item: ShapeObject) -> np.ndarray:
    """Render the box of an object in its colour on white: `h w c`, uint8."""
    mask = shape_mask(shape=item.shape, size=item.size)[..., None]
    return np.rint(BACKGROUND + mask * (np.array(COLOURS[item.colour]) - BACKGROUND)).astype(np.uint8)


def _jitter(scene: Scene, rng: Random) -> list[tuple[int, int]]:
    """Sample the upper left corner (row, column) of each object's box until boxes lie `MIN_GAP` apart."""
    while True:
        corners = [
            (rng.choice(STARTS[item.size][row]), rng.choice(STARTS[item.size][column]))
            for item, (row, column) in zip(scene.objects, PLACES[scene.place], strict=True)
        ]
        if len(corners) == 1:
            return corners
        (first, second), sides = corners, [SIZES[item.size] for item in scene.objects]
        gaps = [max(b - a - sides[0], a - b - sides[1]) for a, b in zip(first, second, strict=True)]
        if max(gaps) >= MIN_GAP:
            return corners


def draw(scene: Scene, rng: Random) -> Image.Image:
    """Render an image of a scene at positions that `rng` chooses."""
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, dtype=np.uint8)
    for item, (top, left) in zip(scene.objects, _jitter(scene, rng), strict=True):
        side = SIZES[item.size]
        canvas[top : top + side, left : left + side] = _stamp(item)
    return Image.fromarray(canvas)


def in_split(scene: Scene, split: Split) -> bool:
    """Return True if a scene belongs to a split; train and validation share theirs."""
    if any((item.colour, item.shape) in UNSEEN_PAIRS for item in scene.objects):
        return split == "unseen_pairs"
    # A hash of the caption holds out the same scenes for every seed.
    digest = hashlib.sha256(scene_caption(scene.canonical()).encode()).digest()
    if len(scene.objects) == 2 and int.from_bytes(digest[:8]) < HELD_OUT_SHARE * 2**64:
        return split == "held_out"
    return split in ("train", "validation")


def random_scene(split: Split, rng: Random) -> Scene:
    """Sample a scene of a split: one or two objects with equal probability (`held_out` always two), then uniformly.

    Two objects are named in reading order, upper or left one first. A small prior then learns sooner which words belong
    to which position.
    """
    num_objects = 2 if split == "held_out" else rng.choice((1, 2))
    places = tuple(POSITIONS if num_objects == 1 else RELATIONS)
    sizes, colours = tuple(SIZES), tuple(COLOURS)
    while True:
        objects = tuple(
            ShapeObject(rng.choice(sizes), rng.choice(colours), rng.choice(SHAPES)) for _ in range(num_objects)
        )
        scene = Scene(objects, rng.choice(places)).canonical()
        if in_split(scene, split):
            return scene


def shapes_dataset(split: str, num_rows: int, seed: int = 0) -> Dataset:
    """Render a captioned data set of any length.

    Args:
        split: one of `SPLITS`
        num_rows: at least 1; row i is the same whatever it is
        seed: another seed gives other rows of the same distribution

    Returns:
        Rows of `image` (PNG) and `caption`.

    Example:
        >>> from tok2img import shapes_dataset
        >>> rows = shapes_dataset("train", 3)
        >>> rows.column_names, len(rows), rows["image"][0].size
        (['image', 'caption'], 3, (32, 32))
    """
    if split not in SPLITS:
        raise MissingSplitError(f"got split {split!r}, expected one of {', '.join(SPLITS)}")
    if num_rows < 1:
        raise ValueError(f"got num_rows {num_rows}, expected at least 1 for a split of {', '.join(SPLITS)}")
    images, captions = [], []
    for row in range(num_rows):
        rng = Random(f"{split}/{seed}/{row}")
        scene = random_scene(split, rng)
        png = io.BytesIO()
        draw(scene, rng).save(png, format="PNG", compress_level=1)
        images.append({"bytes": png.getvalue(), "path": None})
        captions.append(scene_caption(scene))
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    return Dataset.from_dict({"image": images, "caption": captions}, features=features)
