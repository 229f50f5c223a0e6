"""What other samplers of images get wrong: guidance lost after the first code, batches that change images, texts that are not seen."""

import warnings
from pathlib import Path

import pytest
import torch

from tok2img.generation.generate import generate, max_batch_size
from tok2img.generation.sampling import Sampling
from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.prior.model import build_prior, last_hidden_state
from tok2img.recipes import train_prior as prior_runs
from tok2img.recipes.config import PriorRecipe
from tok2img.recipes.parsing import parse_arguments, read_recipe
from tok2img.tokenization.layout import SequenceLayout

GUIDED = Sampling(guidance_scale=3.0)
NUM = 32
only_qwen = pytest.mark.parametrize("architecture", ["qwen3"], indirect=True)


@pytest.fixture
def texts(layout) -> torch.Tensor:
    """Captions of all lengths and none."""
    texts = torch.randint(layout.text_vocab_size, (NUM, layout.text_length))
    lengths = torch.arange(NUM) % (layout.text_length + 1)
    return texts.masked_fill(torch.arange(layout.text_length) >= lengths[:, None], layout.pad_id)


@pytest.fixture
def pipeline(processor) -> TextToImagePipeline:
    prior = build_prior(processor.layout, depth=1)
    prior.get_output_embeddings().weight.data.mul_(20)
    return TextToImagePipeline(prior, processor)


@pytest.mark.parametrize("layout", [(4,), (1, 1, 1, 1)], indirect=True)
@pytest.mark.parametrize("size", [1, 3, 8, 32])
@pytest.mark.parametrize("sampling", [Sampling(), GUIDED], ids=["plain", "guided"])
def test_images_of_mixed_captions_depend_neither_on_batch_nor_order(prior, layout, texts, sampling, size):
    whole = generate(prior, layout, texts, sampling=sampling, seed=3)
    order = torch.randperm(NUM)
    for rows in order.split(size):
        some = generate(prior, layout, texts[rows], sampling=sampling, seed=3, indices=rows.tolist())
        assert some.equal(whole[rows])


@only_qwen
def test_the_guidance_scale_reaches_the_codes(prior, layout, texts):
    drawn = [
        generate(prior, layout, texts, sampling=Sampling(guidance_scale=scale)) for scale in (1, 3, 6, (1, 6), (6, 1))
    ]
    assert all(not one.equal(other) for number, one in enumerate(drawn) for other in drawn[:number])


def test_a_schedule_of_one_scale_is_that_scale(prior, layout, texts):
    plain = generate(prior, layout, texts, sampling=GUIDED)
    for scale in ((3.0, 3.0), lambda share: 3.0):
        assert generate(prior, layout, texts, sampling=Sampling(guidance_scale=scale)).equal(plain)


def test_a_schedule_guides_each_code_by_its_own_scale(prior, layout, texts):
    ends_plain = generate(prior, layout, texts, sampling=Sampling(guidance_scale=(3, 3, 1, 1)), seed=1)
    apply_guidance, plain = (generate(prior, layout, texts, sampling=each, seed=1) for each in (GUIDED, Sampling()))
    assert ends_plain[:, :2].equal(apply_guidance[:, :2]) and not ends_plain[:, :2].equal(plain[:, :2])
    first = torch.tensor([True, True, False, False])
    assert ends_plain.equal(generate(prior, layout, texts, seed=1, init_codes=apply_guidance, keep_mask=first))


def test_every_text_position_attends_and_is_attended_to(prior, layout, texts):
    captioned = texts[(texts != layout.pad_id).all(dim=1)]
    hidden = last_hidden_state(prior, layout.prompt(captioned))
    assert (hidden.norm(dim=-1) > 0.1).all()
    for position in range(layout.text_length):
        other = captioned.clone()
        other[:, position] = (other[:, position] + 1) % layout.text_vocab_size
        moved = (last_hidden_state(prior, layout.prompt(other)) - hidden).norm(dim=-1)
        assert (moved[:, position + 1 :] > 1e-3).all() and (moved[:, : position + 1] < 1e-4).all()


def test_given_noise_replaces_that_of_the_seed(prior, layout, texts):
    streams = torch.rand(NUM, layout.num_codes, dtype=torch.float64)
    codes = generate(prior, layout, texts, uniforms=streams)
    assert codes.equal(generate(prior, layout, texts, uniforms=streams, seed=9))
    assert not codes.equal(generate(prior, layout, texts))


def test_two_seeds_interpolate_between_their_images(pipeline):
    prompts = ["a dog", "a red disc"]
    path = pipeline(prompts, 5, seed=(3, 8)).codes
    first, last = (pipeline(prompts, seed=seed).codes for seed in (3, 8))
    assert path[[0, 5]].equal(first) and path[[4, 9]].equal(last)


@pytest.mark.parametrize("seed", [(1,), (1, 2, 3)])
def test_one_or_three_seeds_in_a_tuple_raise(pipeline, seed):
    with pytest.raises(ValueError, match="Expected seed to be an integer or two"):
        pipeline("a dog", 4, seed=seed)


@pytest.mark.parametrize("scale", [(1.0, 4.0), 2.5])
def test_a_guidance_schedule_is_saved_as_a_default(pipeline, tmp_path, scale):
    pipeline.default_sampling = Sampling(guidance_scale=scale)
    pipeline.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path)
    assert again.default_sampling.guidance_scale == scale
    assert again("a dog", 8, seed=0).codes.equal(pipeline("a dog", 8, seed=0).codes)


def test_default_sampling_with_a_guidance_function_raises(pipeline):
    with pytest.raises(ValueError, match="cannot be saved"):
        pipeline.default_sampling = Sampling(guidance_scale=lambda share: 1 + share)


def test_max_batch_size_fits_keys_and_values_in_a_gigabyte():
    def fits(num_codes: int, **settings) -> tuple[int, int]:
        layout = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=num_codes, codebook_size=6)
        prior = build_prior(layout, depth=2, **settings)
        return max_batch_size(prior, layout, guidance=False), max_batch_size(prior, layout, guidance=True)

    assert fits(10) == (256, 256)
    bytes_per_image = 2 * 2 * 128 * (8187 + 5) * 4
    assert fits(8187) == (2**30 // bytes_per_image, 2**30 // bytes_per_image // 2)
    assert fits(2**21) == (1, 1)
    assert fits(8187, num_key_value_heads=1)[0] == 2 * fits(8187)[0]
    assert fits(8187, architecture="gpt2") == fits(8187)


def test_many_images_come_in_as_many_batches_as_they_need(pipeline, monkeypatch):
    sizes = []

    def spy(prior, layout, text_ids, **settings):
        sizes.append(len(text_ids))
        return generate(prior, layout, text_ids, **settings)

    monkeypatch.setattr("tok2img.pipelines.text_to_image.generate", spy)
    output = pipeline("a dog", 1000, seed=0)
    assert sizes == [250] * 4 and len(output.images) == len(output.codes) == 1000
    assert output.codes[300:310].equal(pipeline("a dog", 310, seed=0).codes[300:])


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_caption_dropout_of_the_command_line_reaches_training_and_the_folder(
    rows, processor, tmp_path, monkeypatch, share
):
    from tok2img.tokenization.token_dataset import save_tokens

    save_tokens(rows, processor, tmp_path / "tokens")
    words = ["--tokens", str(tmp_path / "tokens"), "--out", str(tmp_path / "model"), "--caption-dropout", str(share)]
    path, overrides = parse_arguments([*words, "--depth", "1", "--guidance-scale", "1"])
    seen = []

    def save_untrained(trainer, recipe, save):
        seen.append(trainer.model.caption_dropout)
        save(Path(recipe.out), trainer.model.prior)

    monkeypatch.setattr(prior_runs, "train_and_save", save_untrained)
    prior_runs.train_prior(read_recipe(PriorRecipe, path, overrides))
    assert seen == [share] and TextToImagePipeline.from_pretrained(tmp_path / "model").caption_dropout == share


def test_guidance_without_caption_dropout_warns_once(pipeline):
    pipeline.caption_dropout = 0.0
    with pytest.warns(UserWarning, match="nothing to compare with"):
        pipeline("a dog", seed=0, guidance_scale=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline("a dog", seed=0, guidance_scale=2.0)


@pytest.mark.parametrize(("share", "scale"), [(0.0, 1.0), (0.1, 3.0), (None, 3.0)])
def test_guidance_with_caption_dropout_does_not_warn(pipeline, share, scale):
    if share is not None:
        pipeline.caption_dropout = share
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline("a dog", seed=0, guidance_scale=scale)
