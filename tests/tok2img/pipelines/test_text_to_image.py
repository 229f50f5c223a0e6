import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tok2img.generation.generate import generate
from tok2img.generation.sampling import Sampling
from tok2img.pipelines.batching import batches
from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.prior.model import build_prior

REPOSITORY = Path(__file__).parents[3]
DRAW_AGAIN = """
import sys
import torch
from tok2img import TextToImagePipeline

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    output = TextToImagePipeline.from_pretrained(folder)(["a red square", "a dog", "", "two green cats"], 2, seed=5, batch_size=3)
    print(output.codes.tolist())
"""


@pytest.fixture(params=["processor", "stage_processor"])
def pipeline(request) -> TextToImagePipeline:
    processor = request.getfixturevalue(request.param)
    prior = build_prior(processor.layout, depth=1)
    prior.get_output_embeddings().weight.data.mul_(20)
    return TextToImagePipeline(prior, processor)


def test_pipeline_returns_a_pil_image(pipeline):
    (image,) = pipeline("a red square", seed=0).images
    assert isinstance(image, Image.Image) and image.size == (8, 8)


def test_images_are_the_decoded_codes(pipeline):
    output = pipeline(["a dog", "a red disc"], seed=0)
    expected = pipeline.processor.decode_images(output.codes)
    assert [each.tobytes() for each in output.images] == [each.tobytes() for each in expected]


def test_codes_are_those_of_generate(pipeline):
    text_ids = pipeline.processor.encode_text(["a dog", "a red disc"])
    codes = generate(pipeline.prior, pipeline.processor.layout, text_ids, sampling=pipeline.default_sampling, seed=9)
    assert pipeline(["a dog", "a red disc"], seed=9).codes.equal(codes)


def test_the_same_folder_gives_the_same_codes_in_another_process_and_batch(processor, stage_processor, tmp_path):
    folders, expected = [tmp_path / "grid", tmp_path / "stages"], []
    for folder, parts in zip(folders, (processor, stage_processor), strict=True):
        pipeline = TextToImagePipeline(build_prior(parts.layout, depth=1), parts)
        pipeline.default_sampling = Sampling(guidance_scale=2.0, temperature=0.7, top_k=5, top_p=0.9)
        pipeline.save_pretrained(folder)
        expected.append(str(pipeline(["a red square", "a dog", "", "two green cats"], 2, seed=5).codes.tolist()))
    done = subprocess.run(
        [sys.executable, "-c", DRAW_AGAIN, *map(str, folders)],
        cwd=REPOSITORY,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == expected, done.stderr


def test_default_sampling_survives_saving_and_loading(pipeline, tmp_path):
    pipeline.default_sampling = Sampling(guidance_scale=2.5, temperature=0.7, top_k=5, top_p=0.9)
    pipeline.save_pretrained(tmp_path)
    assert TextToImagePipeline.from_pretrained(tmp_path).default_sampling == pipeline.default_sampling


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.0), Sampling(top_k=0, top_p=1.0)])
def test_extreme_defaults_survive_saving_and_loading(pipeline, tmp_path, sampling):
    pipeline.default_sampling = sampling
    pipeline.save_pretrained(tmp_path)
    assert TextToImagePipeline.from_pretrained(tmp_path).default_sampling == sampling


def test_default_sampling_of_a_new_prior_is_plain(pipeline):
    assert pipeline.default_sampling == Sampling()


def test_none_means_the_models_own_default_and_a_value_overrides_it(pipeline):
    pipeline.default_sampling = Sampling(temperature=0.0)
    greedy = pipeline("a dog", 6, seed=0).codes
    assert len(greedy.unique(dim=0)) == 1
    assert len(pipeline("a dog", 6, seed=0, temperature=1.0).codes.unique(dim=0)) > 1


def test_images_of_a_prompt_are_adjacent(pipeline):
    prompts = ["a dog", "a red disc"]
    output = pipeline(prompts, num_images_per_prompt=3, seed=1)
    assert output.codes.equal(pipeline([prompts[0]] * 3 + [prompts[1]] * 3, seed=1).codes) and len(output.images) == 6


def test_the_batch_size_changes_no_image(pipeline):
    codes = [pipeline("a dog", 7, seed=2, guidance_scale=2.0, batch_size=size).codes for size in (64, 3, 1)]
    assert codes[0].equal(codes[1]) and codes[0].equal(codes[2])


def test_a_prior_may_be_bfloat16_while_the_tokenizer_stays_float32(pipeline):
    assert pipeline.to("cpu", torch.bfloat16) is pipeline
    assert pipeline.prior.dtype == torch.bfloat16 and pipeline.processor.image_tokenizer.dtype == torch.float32
    assert pipeline("a red square", seed=0).codes.shape == (1, pipeline.processor.layout.num_codes)


def test_a_seed_may_be_of_numpy(pipeline):
    for plain, seed in ((3, np.int64(3)), ((3, 4), tuple(np.arange(3, 5)))):
        assert pipeline("a dog", 2, seed=seed).codes.equal(pipeline("a dog", 2, seed=plain).codes)


def test_calls_without_a_seed_differ(pipeline):
    assert not pipeline("a dog", 8).codes.equal(pipeline("a dog", 8).codes)


def test_numpy_images_are_floats_of_the_same_pixels(pipeline):
    images, arrays = (pipeline("a dog", 2, seed=0, output_type=kind).images for kind in ("pil", "np"))
    assert arrays.shape == (2, 8, 8, 3) and arrays.dtype == np.float32 and 0 <= arrays.min() <= arrays.max() <= 1
    np.testing.assert_array_equal(
        (arrays * 255).round().astype(np.uint8), np.stack([np.asarray(each) for each in images])
    )


def test_a_negative_prompt_changes_the_result(pipeline):
    plain = pipeline("a dog", 16, seed=0, guidance_scale=3.0).codes
    assert not pipeline("a dog", 16, seed=0, guidance_scale=3.0, negative_prompt="two green cats").codes.equal(plain)


def test_the_default_negative_prompt_is_empty(pipeline):
    plain = pipeline("a dog", 8, seed=0, guidance_scale=3.0).codes
    assert pipeline("a dog", 8, seed=0, guidance_scale=3.0, negative_prompt="").codes.equal(plain)


def test_a_negative_prompt_without_guidance_warns_that_it_has_no_effect(pipeline):
    with pytest.warns(UserWarning, match="negative_prompt"):
        pipeline("a dog", seed=0, guidance_scale=1.0, negative_prompt="two green cats")


@pytest.mark.parametrize("prompt", [[], None, 5, ["a", None], [b"a"], {"a": "b"}])
def test_a_prompt_that_is_not_text_raises(pipeline, prompt):
    with pytest.raises(ValueError, match="Expected (each )?prompt to be"):
        pipeline(prompt)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_images_per_prompt": 0},
        {"num_images_per_prompt": -1},
        {"batch_size": 0},
        {"temperature": -1},
        {"guidance_scale": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"output_type": "jpeg"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(pipeline, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        pipeline("a dog", **setting)


def test_a_model_card_says_how_to_use_the_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: tok2img\n") and "TextToImagePipeline.from_pretrained" in card


def test_a_saved_folder_contains_no_pickle(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".md"}


def test_from_pretrained_of_an_empty_folder_raises(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is not a tok2img model folder"):
        TextToImagePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(("num", "size"), [(1, 64), (64, 64), (65, 64), (7, 3), (9, 1)])
def test_batches_cover_every_image_once_and_are_nearly_equal(num, size):
    runs = list(batches(num, size))
    assert [row for rows in runs for row in rows] == list(range(num)) and max(map(len, runs)) <= size
    assert len(runs) == -(-num // size)


def test_a_pipeline_leaves_its_models_in_eval_mode(pipeline):
    assert not pipeline.prior.training and not pipeline.processor.image_tokenizer.training
    assert torch.is_grad_enabled()


def test_previews_are_the_images_of_the_codes_so_far(stage_processor):
    pipeline = TextToImagePipeline(build_prior(stage_processor.layout, depth=1), stage_processor)
    seen = []
    output = pipeline(
        ["a dog", "a cat", "a disc"],
        seed=0,
        batch_size=2,
        preview_after={1, 3},
        on_preview=lambda *what: seen.append(what),
    )
    assert [(count, list(rows)) for _, count, rows in seen] == [(1, [0, 1]), (3, [0, 1]), (1, [2]), (3, [2])]
    for images, count, rows in seen:
        expected = stage_processor.decode_images(output.codes[list(rows), :count])
        assert [each.tobytes() for each in images] == [each.tobytes() for each in expected]
    assert output.codes.equal(pipeline(["a dog", "a cat", "a disc"], seed=0).codes)


@pytest.mark.parametrize(
    ("preview_after", "message"),
    [({0}, r"must lie in 1\.\.4, got \[0\]"), ({2, 5}, r"must lie in 1\.\.4"), ((), "together")],
)
def test_previews_out_of_range_raise(stage_processor, preview_after, message):
    pipeline = TextToImagePipeline(build_prior(stage_processor.layout, depth=1), stage_processor)
    with pytest.raises(ValueError, match=message):
        pipeline("a dog", preview_after=preview_after, on_preview=print)


def test_previews_with_a_grid_of_codes_raise(processor):
    pipeline = TextToImagePipeline(build_prior(processor.layout, depth=1), processor)
    with pytest.raises(ValueError, match="got a VQVAE, which cannot decode a prefix"):
        pipeline("a dog", preview_after={1}, on_preview=print)
