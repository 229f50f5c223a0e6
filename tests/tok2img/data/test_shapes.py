import io
import re
from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tok2img.data.shapes import (
    COLOURS,
    IMAGE_SIZE,
    INVERSES,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    UNSEEN_PAIRS,
    Scene,
    ShapeObject,
    Split,
    draw,
    parse_caption,
    random_scene,
    scene_caption,
    shapes_dataset,
)
from tok2img.evaluation.shapes_verifier import read_scene, verify_scene

OBJECTS = [ShapeObject(*parts) for parts in product(SIZES, COLOURS, SHAPES)]
KINDS = ("colour", "shape", "size", "place", "order", "count")
RED = ShapeObject("large", "red", "square")
BLUE = ShapeObject("small", "blue", "ring")

Reading = tuple[Scene, Scene | None]  # what was drawn, what the verifier saw


def wrong_scene(scene: Scene, kind: str, rng: Random) -> Scene | None:
    """The scene with one thing wrong, or None where the kind does not apply."""
    if kind in ("colour", "shape", "size"):
        values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[kind]
        which = rng.randrange(len(scene.objects))
        other = rng.choice([value for value in values if value != getattr(scene.objects[which], kind)])
        objects = list(scene.objects)
        objects[which] = replace(objects[which], **{kind: other})
        return Scene(tuple(objects), scene.place)
    if kind == "count":
        if len(scene.objects) == 2:
            return Scene(scene.objects[:1], rng.choice(list(POSITIONS)))
        return Scene((scene.objects[0], rng.choice(OBJECTS)), rng.choice(list(RELATIONS)))
    if kind == "order":
        return Scene(scene.objects[::-1], scene.place) if len(set(scene.objects)) == 2 else None
    places = POSITIONS if len(scene.objects) == 1 else RELATIONS
    wrong = [Scene(scene.objects, place) for place in places]
    return rng.choice([other for other in wrong if other.canonical() != scene.canonical()])


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"))


def spoil(image: Image.Image, *, radius: float, sigma: float, rng: np.random.Generator) -> Image.Image:
    """Blur and noise, as an autoencoder leaves them."""
    pixels = pixels_of(image.filter(ImageFilter.GaussianBlur(radius))) + rng.normal(
        0, sigma, (IMAGE_SIZE, IMAGE_SIZE, 3)
    )
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def scenes_of(split: Split, num_rows: int) -> list[Scene]:
    """The scenes of the first rows of a split, without drawing them."""
    return [random_scene(split, Random(f"{split}/0/{row}")) for row in range(num_rows)]


@pytest.fixture(scope="module")
def train_scenes() -> list[Scene]:
    return scenes_of("train", 20_000)


@pytest.fixture(scope="module")
def held_out_scenes() -> list[Scene]:
    return scenes_of("held_out", 2000)


@pytest.fixture(scope="module")
def readings() -> list[Reading]:
    """Scenes of every kind, each with what the verifier reads from its image."""
    rng = Random(0)
    scenes = [random_scene(split, rng) for split in ("train", "unseen_pairs") for _ in range(550)]
    return [(scene, read_scene(draw(scene, rng))) for scene in scenes]


def test_captions_read_back_as_the_scenes_they_came_from() -> None:
    single = [Scene((item,), place) for item in OBJECTS for place in POSITIONS]
    double = [Scene(pair, place) for pair in product(OBJECTS, OBJECTS) for place in RELATIONS]
    assert all(parse_caption(scene_caption(scene)) == scene for scene in single + double)


def test_captions_are_the_documented_english() -> None:
    assert scene_caption(Scene((RED,), "in the centre")) == "a large red square in the centre"
    assert scene_caption(Scene((BLUE, RED), "above")) == "a small blue ring above a large red square"


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle at the top left",
        "a small red circle",
        "a small red circle above",
        "a small pink circle in the centre",
        "a small red circle in the centre above a small red circle",
        "a small red circle in the centre\n",
    ],
)
def test_a_caption_outside_the_grammar_is_refused(caption: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(caption))):
        parse_caption(caption)


def test_an_unknown_attribute_or_place_is_refused() -> None:
    with pytest.raises(ValueError, match="'pink'"):
        ShapeObject("small", "pink", "circle")
    with pytest.raises(ValueError, match="'above'"):
        Scene((RED,), "above")
    with pytest.raises(ValueError, match="3 objects"):
        Scene((RED, RED, RED), "above")


def test_an_unknown_split_or_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="train, validation, held_out, unseen_pairs"):
        shapes_dataset("test", 3)
    with pytest.raises(ValueError, match="num_rows 0"):
        shapes_dataset("train", 0)


def test_rows_are_png_images_with_captions() -> None:
    rows = shapes_dataset("train", 2)
    assert rows.column_names == ["image", "caption"]
    assert rows[0]["image"].size == (IMAGE_SIZE, IMAGE_SIZE) and rows[0]["image"].mode == "RGB"


@pytest.mark.parametrize("split", SPLITS)
def test_a_row_does_not_depend_on_the_number_of_rows(split: Split) -> None:
    few, many = shapes_dataset(split, 5, seed=3), shapes_dataset(split, 40, seed=3)
    assert few.data.table.slice(0, 5).equals(many.data.table.slice(0, 5))


def test_seeds_and_splits_give_different_rows() -> None:
    rows = [tuple(shapes_dataset(*arguments)["caption"]) for arguments in (("train", 20, 0), ("train", 20, 1))]
    assert len({*rows, tuple(shapes_dataset("validation", 20, 0)["caption"])}) == 3


@pytest.mark.parametrize("split", SPLITS)
def test_the_scenes_above_are_those_of_the_rows(split: Split) -> None:
    assert list(map(scene_caption, scenes_of(split, 20))) == shapes_dataset(split, 20)["caption"][:]


def test_half_of_the_rows_show_one_object(train_scenes: list[Scene]) -> None:
    for scenes in (train_scenes, scenes_of("unseen_pairs", 2000)):
        assert abs(np.mean([len(scene.objects) == 1 for scene in scenes]) - 0.5) < 0.04


def test_held_out_scenes_are_never_in_train_in_either_phrasing(
    train_scenes: list[Scene], held_out_scenes: list[Scene]
) -> None:
    held_out = {scene.canonical() for scene in held_out_scenes}
    assert held_out.isdisjoint(scene.canonical() for scene in [*train_scenes, *scenes_of("validation", 2000)])
    assert all(len(scene.objects) == 2 for scene in held_out)
    assert len(held_out) > 500


def test_every_part_of_held_out_scenes_is_seen_in_train(
    train_scenes: list[Scene], held_out_scenes: list[Scene]
) -> None:
    def parts(scenes: list[Scene]) -> set[str | ShapeObject]:
        return {scene.place for scene in scenes} | {item for scene in scenes for item in scene.objects}

    seen = parts(train_scenes)
    assert parts(held_out_scenes) <= seen
    assert seen == {*POSITIONS, *RELATIONS} - {*INVERSES} | {
        item for item in OBJECTS if (item.colour, item.shape) not in UNSEEN_PAIRS
    }


def test_unseen_pairs_appear_in_their_own_split_only(train_scenes: list[Scene], held_out_scenes: list[Scene]) -> None:
    def shows_unseen(scene: Scene) -> bool:
        return any((item.colour, item.shape) in UNSEEN_PAIRS for item in scene.objects)

    assert not any(map(shows_unseen, [*train_scenes, *held_out_scenes, *scenes_of("validation", 2000)]))
    assert all(map(shows_unseen, scenes_of("unseen_pairs", 1000)))


def test_unseen_pairs_have_every_shape_and_different_colours() -> None:
    colours, shapes = zip(*UNSEEN_PAIRS, strict=True)
    assert set(shapes) == set(SHAPES) and len(set(colours)) == len(SHAPES)


def test_two_objects_keep_two_pixels_apart() -> None:
    rng = Random(0)
    for relation, axis in (("above", 1), ("to the left of", 0)):
        for _ in range(50):
            pixels = pixels_of(draw(Scene((RED, RED), relation), rng))
            filled = (pixels.min(axis=2) < 250).any(axis=axis)
            first, last = np.flatnonzero(filled)[[0, -1]]
            assert (~filled[first:last]).sum() >= 2


def test_the_verifier_reads_every_drawn_scene(readings: list[Reading]) -> None:
    assert all(reading == scene.canonical() for scene, reading in readings)


@pytest.mark.parametrize("kind", KINDS)
def test_the_verifier_refuses_captions_with_one_thing_wrong(readings: list[Reading], kind: str) -> None:
    rng = Random(1)
    wrong = [(wrong_scene(scene, kind, rng), reading) for scene, reading in readings * 2]
    verdicts = [reading == scene.canonical() for scene, reading in wrong if scene is not None]
    assert len(verdicts) >= 1000 and not any(verdicts)


def test_the_verdict_follows_the_reading_of_stored_images() -> None:
    rng = Random(2)
    for row in shapes_dataset("validation", 40):
        scene = parse_caption(row["caption"])
        wrong = [wrong_scene(scene, kind, rng) for kind in KINDS]
        assert verify_scene(row["image"], row["caption"])
        assert not any(verify_scene(row["image"], scene_caption(other)) for other in wrong if other is not None)


def test_the_verifier_accepts_both_phrasings_of_a_relation() -> None:
    image = draw(Scene((RED, BLUE), "above"), Random(0))
    assert verify_scene(image, "a large red square above a small blue ring")
    assert verify_scene(image, "a small blue ring below a large red square")
    assert not verify_scene(image, "a small blue ring above a large red square")


def test_the_verifier_forgives_slight_blur_and_noise() -> None:
    rng, noise = Random(0), np.random.default_rng(0)
    scenes = [random_scene("train", rng) for _ in range(300)]
    readings = [read_scene(spoil(draw(scene, rng), radius=0.6, sigma=8, rng=noise)) for scene in scenes]
    assert np.mean([reading == scene.canonical() for scene, reading in zip(scenes, readings, strict=True)]) >= 0.98


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_blank_image_shows_nothing(level: int) -> None:
    assert read_scene(Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (level, level, level))) is None


def test_noise_shows_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    assert all(read_scene(Image.fromarray(image)) is None for image in noise)


@pytest.mark.parametrize("item", OBJECTS[:6] + OBJECTS[48:54], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_half_erased_object_is_refused(item: ShapeObject, axis: int) -> None:
    pixels = pixels_of(draw(Scene((item,), "in the centre"), Random(0)))
    filled = np.argwhere(pixels.min(axis=2) < 250)[:, axis]
    middle = (filled.min() + filled.max() + 1) // 2
    for half in (slice(0, middle), slice(middle, None)):
        erased = pixels.copy()
        erased[(slice(None),) * axis + (half,)] = 255
        assert read_scene(Image.fromarray(erased)) is None


def test_an_object_of_two_colours_is_refused() -> None:
    pixels = pixels_of(draw(Scene((RED,), "in the centre"), Random(0)))
    pixels[:15][(pixels[:15] != 255).any(axis=2)] = COLOURS["blue"]
    assert read_scene(Image.fromarray(pixels)) is None


@pytest.mark.parametrize("colour", [(170, 170, 170), (255, 0, 255), (0, 255, 120)])
def test_a_colour_of_no_palette_is_refused(colour: tuple[int, int, int]) -> None:
    pixels = pixels_of(draw(Scene((RED,), "in the centre"), Random(0)))
    pixels[(pixels != 255).any(axis=2)] = colour
    assert read_scene(Image.fromarray(pixels)) is None


@pytest.mark.parametrize("patch_size", [3, 5])
def test_a_third_thing_in_the_image_is_refused(patch_size: int) -> None:
    pixels = pixels_of(draw(Scene((RED, BLUE), "above"), Random(0)))
    pixels[:patch_size, :patch_size] = COLOURS["green"]
    assert read_scene(Image.fromarray(pixels)) is None


def test_objects_on_a_diagonal_have_no_relation() -> None:
    scene = Scene((BLUE,), "at the top left")
    top_left = pixels_of(draw(scene, Random(0)))
    bottom_right = pixels_of(draw(Scene((BLUE,), "at the bottom right"), Random(0)))
    assert read_scene(Image.fromarray(top_left)) == scene
    assert read_scene(Image.fromarray(np.minimum(top_left, bottom_right))) is None


def test_an_object_between_the_places_is_refused() -> None:
    pixels = pixels_of(draw(Scene((BLUE,), "at the top left"), Random(0)))
    assert read_scene(Image.fromarray(np.roll(pixels, 10, axis=1))) is None


def test_an_image_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=re.escape("(64, 64)")):
        verify_scene(Image.new("RGB", (64, 64)), "a small red circle in the centre")


def test_stored_images_are_lossless() -> None:
    rng = Random("train/0/0")
    image = draw(random_scene("train", rng), rng)
    stored = shapes_dataset("train", 1).data.table["image"][0]["bytes"].as_py()
    assert (pixels_of(Image.open(io.BytesIO(stored))) == pixels_of(image)).all()
