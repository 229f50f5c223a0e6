import json
import math

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from tok2img.generation.generate import generate
from tok2img.generation.likelihood import argmax_per_group, log_likelihood, pointwise_mutual_information
from tok2img.generation.sampling import uniform_noise
from tok2img.pipelines.clip_ranker import ClipRanker, build_image_processor
from tok2img.recipes.config import RankerRecipe
from tok2img.recipes.train_ranker import (
    CaptionedImageDataset,
    RankerWithLoss,
    build_ranker,
    choose_patch_size,
    train_ranker,
)
from tokenizers_vq.images.processing import pixels_from_images

PROMPTS = ["a dog", "a red disc", ""]


@pytest.fixture
def clip(rows) -> ClipRanker:
    return build_ranker(rows, vocab_size=270, depth=1)


def test_log_likelihood_equals_that_of_stock_logits_over_each_positions_codes(prior, layout):
    text_ids, codes = torch.randint(layout.text_vocab_size, (3, 3)), torch.randint(6, (3, 4))
    logits = prior(layout.sequence(text_ids, codes)).logits[:, layout.prompt_length - 1 : -1].detach().double()
    expected = torch.zeros(3, dtype=torch.float64)
    for position, first in enumerate(layout.image.position_offsets().tolist()):
        own = logits[:, position, first : first + 6].log_softmax(dim=-1)
        expected += own[torch.arange(3), codes[:, position]]
    torch.testing.assert_close(log_likelihood(prior, layout, text_ids, codes), expected, atol=1e-4, rtol=1e-4)


def test_pointwise_mutual_information_is_zero_only_for_the_empty_caption(prior, layout):
    text_ids, codes = torch.tensor([[1, 5, 10], [layout.pad_id] * 3]).repeat(40, 1), torch.randint(6, (80, 4))
    gain = pointwise_mutual_information(prior, layout, text_ids, codes)
    assert gain.shape == (80,) and gain[1::2].abs().max() < 1e-4 and gain[::2].abs().min() > 1e-4
    expected = log_likelihood(prior, layout, text_ids, codes) - log_likelihood(
        prior, layout, layout.null_text_ids(80), codes
    )
    torch.testing.assert_close(gain, expected, atol=1e-4, rtol=1e-4)


def test_argmax_per_group_returns_the_first_of_equal_scores():
    assert argmax_per_group(torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 4.0]), 3).tolist() == [1, 3]


def test_argmax_per_group_with_nan_raises():
    with pytest.raises(ValueError, match="not finite"):
        argmax_per_group(torch.tensor([1.0, float("nan")]), 2)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_best_of_keeps_the_candidates_of_highest_mutual_information(pipeline, batch_size):
    output = pipeline(PROMPTS, 2, seed=3, best_of=4, batch_size=batch_size)
    layout = pipeline.processor.layout
    text_ids = pipeline.processor.encode_text([prompt for prompt in PROMPTS for _ in range(8)])
    candidates = generate(pipeline.prior, layout, text_ids, uniforms=uniform_noise(3, range(24), 4))
    scores = pointwise_mutual_information(pipeline.prior, layout, text_ids, candidates)
    best = argmax_per_group(scores, 4)
    assert output.codes.equal(candidates[best]) and len(output.images) == 6
    torch.testing.assert_close(output.scores, scores[best], atol=1e-4, rtol=1e-4)


def test_best_of_takes_any_function_as_ranker(pipeline):
    seen = []

    def brightness(captions, images):
        seen.extend(captions)
        return torch.tensor([float(sum(image.convert("L").tobytes())) for image in images])

    output = pipeline(PROMPTS, seed=0, best_of=5, ranker=brightness)
    candidates = pipeline(PROMPTS, 5, seed=0).images
    light = [sum(image.convert("L").tobytes()) for image in candidates]
    assert output.scores.tolist() == [max(light[first : first + 5]) for first in (0, 5, 10)]
    assert seen == [prompt for prompt in PROMPTS for _ in range(5)]


def test_best_of_one_equals_the_plain_call(pipeline):
    plain, one = pipeline(PROMPTS, seed=0), pipeline(PROMPTS, seed=0, best_of=1)
    assert plain.codes.equal(one.codes) and plain.scores is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best_of": 0}, "best_of to be at least 1"),
        ({"ranker": lambda captions, images: torch.zeros(1)}, "nothing to choose from"),
        ({"best_of": 2, "seed": (1, 2)}, "two seeds"),
    ],
)
def test_best_of_with_conflicting_arguments_raises(pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        pipeline("a dog", 2, **settings)


def test_a_saved_ranker_is_a_clip_folder_with_the_same_scores(clip, captions, pil_images, tmp_path):
    clip.save_pretrained(tmp_path)
    scores = clip(captions, pil_images)
    assert scores.equal(ClipRanker.from_pretrained(tmp_path)(captions, pil_images))
    assert isinstance(CLIPModel.from_pretrained(tmp_path), CLIPModel)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|endoftext|>"
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_mean"] == [0.5] * 3
    assert scores.shape == (6,) and scores.abs().max() <= 1 and len(scores.unique()) == 6


@pytest.mark.parametrize("settings", [{"image_mean": []}, {"image_std": [0.5, 0, 0.5]}, {"image_std": None}])
def test_from_pretrained_with_an_invalid_mean_or_std_raises(clip, tmp_path, settings):
    clip.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: image_mean and image_std must be numbers"):
        ClipRanker.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_size": 16},
        {"size": 10**9},
        {"do_center_crop": False, "size": 9},
        {"image_mean": [0.5]},
        {"size": {"a": 1}},
    ],
    ids=str,
)
def test_from_pretrained_with_preprocessing_that_does_not_fit_the_model_raises(clip, tmp_path, settings):
    clip.save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: "):
        ClipRanker.from_pretrained(tmp_path)


def test_pixel_values_of_a_pretrained_clip_are_those_of_its_own_image_processor(clip, pil_images, tmp_path):
    clip.save_pretrained(tmp_path)
    settings = {
        "size": 10,
        "crop_size": 8,
        "resample": 3,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    images = [image.convert("RGB").resize((31, 19)) for image in pil_images]
    stock = CLIPImageProcessorPil.from_pretrained(tmp_path)(images, return_tensors="pt")["pixel_values"]
    pixel_values = ClipRanker.from_pretrained(tmp_path).pixel_values(images)
    assert pixel_values.equal(stock) and not pixel_values.equal(clip.pixel_values(images))


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (40, 24), (33, 50)], ids=str)
def test_pixels_in_training_are_resized_as_for_a_tokenizer_and_normalized(clip, num_channels, size):
    config = clip.model.config.vision_config
    config.image_size, config.num_channels = 16, num_channels
    clip.image_processor = build_image_processor(image_size=16, num_channels=num_channels)
    colours = np.random.default_rng(0).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    example = {"caption": "a dog", "image": Image.fromarray(colours)}
    pixels = pixels_from_images([example["image"]], image_size=16, num_channels=num_channels)
    assert CaptionedImageDataset([example], clip)[0]["pixel_values"].equal(((pixels - 0.5) / 0.5)[0])
    if size in [(16, 16), (8, 8)]:  # nothing to resize, or to enlarge
        assert clip.pixel_values([example["image"]]).equal((pixels - 0.5) / 0.5)


def test_pixel_values_keep_every_brightness_exact(clip):
    config = clip.model.config.vision_config
    config.image_size = 16
    clip.image_processor = build_image_processor(image_size=16, num_channels=3)
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = (torch.arange(256).float().div(255) - 0.5) / 0.5
    assert clip.pixel_values([Image.fromarray(levels)])[0, 0].flatten().equal(expected)


def test_a_score_does_not_depend_on_the_batch(clip, captions, pil_images):
    alone = torch.cat([clip([caption], [image]) for caption, image in zip(captions, pil_images, strict=True)])
    torch.testing.assert_close(clip(captions, pil_images), alone)


def test_scores_depend_on_every_word(clip, pil_images):
    scores = clip(["a red square", "a red disc", "a dog"], pil_images[:1] * 3)
    assert len(scores.unique()) == 3


def test_equal_captions_are_positives_of_each_other(clip):
    text = clip.encode_text(["a dog"] * 3)
    output = RankerWithLoss(clip.model)(**text, pixel_values=torch.randn(1, 3, 8, 8).repeat(3, 1, 1, 1))
    assert output.metrics["accuracy"] == 1 and output.loss.item() == pytest.approx(math.log(3), rel=1e-5)


def test_train_ranker_learns_to_match_its_captions(rows, tmp_path):
    many = concatenate_datasets([rows] * 10)
    many.to_parquet(str(tmp_path / "train.parquet"))
    recipe = RankerRecipe(
        data=str(tmp_path / "train.parquet"), out=str(tmp_path / "ranker"), depth=1, max_steps=30, batch_size=16,
        warmup_steps=5, eval_steps=0, learning_rate=3e-3, vocab_size=270,
    )  # fmt: skip
    train_ranker(recipe)
    ranker = ClipRanker.from_pretrained(tmp_path / "ranker")
    images = rows["image"][:]
    scores = torch.stack([ranker([caption] * 6, images) for caption in rows["caption"]])
    assert scores.argmax(dim=1).tolist() == list(range(6))


def test_a_folder_without_a_clip_model_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"cannot load a CLIP model from {tmp_path}"):
        ClipRanker.from_pretrained(tmp_path)


@pytest.mark.parametrize(("side", "size"), [(28, 4), (64, 8), (8, 1), (32, 4), (36, 6)])
def test_patch_size_gives_at_most_eight_columns(side, size):
    assert choose_patch_size(side) == size
