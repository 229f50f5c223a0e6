import pytest
import torch
from datasets import concatenate_datasets

from tok2img.data.augmentation import Augmentation
from tok2img.recipes.config import TokenizerRecipe
from tok2img.recipes.train_tokenizer import train_tokenizer
from tok2img.trainer.training_log import load_log

WHOLE = torch.tensor([[0.9, 1.0, 0.5, 0.5]])


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def draws(num: int, **fixed: float) -> torch.Tensor:
    made = torch.rand(num, 4, generator=torch.Generator().manual_seed(1))
    for name, value in fixed.items():
        made[:, ("flip", "side", "column", "row").index(name)] = value
    return made


def test_half_of_the_images_are_mirrored_and_none_changed_otherwise(pixels):
    made = Augmentation(flip=True)(pixels, torch.tensor([[0.1], [0.6], [0.49], [0.5]]).expand(4, 4))
    assert made.equal(torch.stack([pixels[0].flip(-1), pixels[1], pixels[2].flip(-1), pixels[3]]))


def test_the_whole_of_an_image_is_the_image(pixels):
    made = Augmentation(crop=0.3)(pixels, draws(4, side=1))
    torch.testing.assert_close(made, pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("column", "row", "corner"), [(0, 0, (0, 0)), (1, 0, (0, 4)), (0, 1, (4, 0)), (1, 1, (4, 4))])
def test_half_of_the_sides_is_a_quarter_of_the_image_enlarged(column, row, corner):
    pixels = torch.zeros(1, 1, 8, 8)
    top, left = corner
    pixels[..., top : top + 4, left : left + 4] = 1
    made = Augmentation(crop=0.5)(pixels, draws(1, side=0, column=column, row=row))
    assert made.shape == pixels.shape and made[..., 1:7, 1:7].eq(1).all()


def test_crops_keep_at_least_their_share_of_the_sides():
    ramp = torch.linspace(0, 1, 64).expand(500, 1, 64, 64)
    made = Augmentation(crop=0.6)(ramp, draws(500))
    spans = made.amax(dim=(1, 2, 3)) - made.amin(dim=(1, 2, 3))
    assert 0.58 < spans.min() < 0.63 and 0.97 < spans.max() <= 1 and made.isfinite().all()


@pytest.mark.parametrize(
    ("column", "row", "moved"), [(0, 0, (2, 2)), (1, 0.5, (0, -2)), (0.5, 1, (-2, 0)), (0.74, 0.51, (0, -1))]
)
def test_a_shift_moves_by_whole_pixels_and_mirrors_the_edges(column, row, moved):
    image = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([image.flip(-1), image, image.flip(-1)], dim=-1)
    wide = torch.cat([wide.flip(-2), wide, wide.flip(-2)], dim=-2)
    made = Augmentation(shift=2)(image, draws(1, column=column, row=row))
    torch.testing.assert_close(made, wide.roll(moved, dims=(-2, -1))[..., 6:12, 8:16], atol=1e-5, rtol=0)


def test_shifts_reach_every_place_within_them():
    pixels = torch.zeros(300, 1, 9, 9)
    pixels[..., 4, 4] = 1
    made = Augmentation(shift=2)(pixels, draws(300)).sum(dim=0)[0]
    assert (made[2:7, 2:7] > 0.5).all()
    assert made.sum() == pytest.approx(300, abs=0.1) == made[2:7, 2:7].sum().item()


def warped(pixels: torch.Tensor, matrix: list[float], *, warp: float = 0.2) -> torch.Tensor:
    """Images by a matrix of which so much, times `warp`, is more than the identity, unbent."""
    chosen = torch.tensor([0.9, 1, 0.5, 0.5, 0.1, *((1 + value) / 2 for value in matrix), *[0.5] * 32])
    return Augmentation(warp=warp)(pixels, chosen.expand(len(pixels), -1))


def test_a_warp_by_the_identity_is_the_image(pixels):
    torch.testing.assert_close(warped(pixels, [0, 0, 0, 0]), pixels, atol=1e-5, rtol=0)


def test_a_warp_slants_stretches_and_turns():
    line = torch.zeros(1, 1, 32, 32)
    line[..., 15:17] = 1  # upright, in the middle
    slanted, wide, turned = (warped(line, matrix) for matrix in ([0, 1, 0, 0], [-1, 0, 0, 0], [0, 1, -1, 0]))
    for row, column in {4: 18, 27: 13}.items():  # by a fifth of the way to the middle
        assert slanted[0, 0, row].argmax() in (column, column - 1, column + 1)
        assert turned[0, 0, row].argmax() in (column, column - 1, column + 1)
    assert wide.sum().item() == pytest.approx(line.sum().item() / 0.8, rel=0.05)


def test_a_warp_bends_what_is_straight():
    line = torch.zeros(1, 1, 32, 32)
    line[..., 15:17] = 1  # upright, in the middle
    numbers = torch.full((1, 41), 0.5)
    numbers[0, 4] = 0.1
    numbers[0, 9:17], numbers[0, 17:25] = 0.0, 1.0  # to the sides: up there one way, down there another
    made = Augmentation(warp=0.2)(line, numbers)[0, 0]
    assert made[3].argmax() in (16, 17) and made[28].argmax() in (14, 15)
    assert made[:, 0].max() == 0 and made.sum().item() == pytest.approx(line.sum().item(), rel=0.1)


def test_a_warp_leaves_half_of_the_images_as_they_are(pixels):
    many = pixels.repeat(100, 1, 1, 1)
    made = Augmentation(warp=0.2)(many, torch.rand(400, 41, generator=torch.Generator().manual_seed(1)))
    assert 160 < (made == many).flatten(1).all(dim=1).sum() < 240
    assert made.min() >= 0 and made.max() <= 1


def test_a_warp_changes_nothing_of_what_else_is_done(pixels):
    numbers = torch.rand(4, 41, generator=torch.Generator().manual_seed(1))
    numbers[:, 4] = 0.9  # none is warped
    settings = {"flip": True, "crop": 0.7, "shift": 1}
    assert Augmentation(**settings, warp=0.2)(pixels, numbers).equal(Augmentation(**settings)(pixels, numbers[:, :4]))


@pytest.mark.parametrize("warp", [-0.1, 0.25, float("nan")])
def test_a_warp_that_could_fold_an_image_up_is_refused(warp):
    with pytest.raises(ValueError, match="warp must be at least 0 and below 0.25, got"):
        Augmentation(warp=warp)


def test_a_shift_below_zero_is_refused():
    with pytest.raises(ValueError, match="shift must be at least 0 pixels, got -1"):
        Augmentation(shift=-1)


@pytest.mark.parametrize("crop", [0, -0.5, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(crop):
    with pytest.raises(ValueError, match="crop must lie above 0 and not above 1"):
        Augmentation(crop=crop)


@pytest.fixture
def recipe(rows, tmp_path):
    """A run on twelve images, in a folder of its own."""
    concatenate_datasets([rows] * 2).to_parquet(str(tmp_path / "train.parquet"))

    def build(name: str, **settings) -> TokenizerRecipe:
        tiny = {"hidden_channels": 8, "num_decoder_blocks": 1, "codebook_size": 8, "code_dim": 4}
        short = {
            "max_steps": 6,
            "batch_size": 4,
            "eval_steps": 0,
            "sample_steps": 0,
            "logging_steps": 1,
            "warmup_steps": 1,
        }
        data = {"data": str(tmp_path / "train.parquet"), "out": str(tmp_path / name)}
        return TokenizerRecipe(**data | short | {"model": tiny} | settings)

    return build


def losses(recipe: TokenizerRecipe) -> list[float]:
    train_tokenizer(recipe)
    return [line["loss"] for line in load_log(recipe.out) if "loss" in line]


def test_a_recipe_trains_on_changed_images_and_any_workers_see_the_same(recipe):
    plain, changed = losses(recipe("plain")), losses(recipe("changed", flip=True, crop=0.5, shift=3, warp=0.1))
    assert len(plain) == len(changed) == 6 and all(ours != theirs for ours, theirs in zip(plain, changed, strict=True))
    assert losses(recipe("again", flip=True, crop=0.5, shift=3, warp=0.1, dataloader_num_workers=2)) == changed


@pytest.mark.parametrize("settings", [{"flip": True}, {"crop": 0.9}, {"shift": 2}, {"warp": 0.1}], ids=str)
def test_text_is_neither_mirrored_nor_cropped(recipe, settings):
    with pytest.raises(
        ValueError, match="keys 'flip', 'crop', 'shift' and 'warp' are for tokenizers of images, got 'bpe'"
    ):
        train_tokenizer(recipe("text", tokenizer="bpe", model={}, **settings))
