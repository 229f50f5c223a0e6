"""The whole way from captioned images to images of captions, with a tokenizer of another library."""

import pytest
import torch

from tok2img.recipes.config import PriorRecipe
from tok2img.recipes.train_prior import train_prior
from tok2img.tokenization.processor import Tok2ImgProcessor
from tokenizers_vq import PretrainedImageTokenizer
from tokenizers_vq.auto import load_image_tokenizer


@pytest.fixture
def saved(tiny_janus, tmp_path):
    tiny_janus.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_wrapped_tokenizer_is_an_image_tokenizer_like_any_other(tiny_janus, saved, images):
    loaded = load_image_tokenizer(saved)
    assert isinstance(loaded, PretrainedImageTokenizer)
    assert torch.equal(loaded.encode(images), tiny_janus.encode(images))


def test_a_saved_processor_keeps_its_fingerprint(tiny_janus, text_tokenizer, tmp_path):
    processor = Tok2ImgProcessor.build(tiny_janus, text_tokenizer, text_length=6)
    processor.save_pretrained(tmp_path)
    assert Tok2ImgProcessor.from_pretrained(tmp_path).fingerprint() == processor.fingerprint()


def test_a_prior_trains_on_its_codes_and_draws_with_it(saved, rows, tmp_path):
    rows.to_parquet(str(tmp_path / "data.parquet"))
    recipe = PriorRecipe(
        out=str(tmp_path / "model"),
        data=str(tmp_path / "data.parquet"),
        image_tokenizer=str(saved),
        vocab_size=270,
        depth=1,
        max_steps=2,
        batch_size=2,
        eval_steps=0,
        sample_steps=2,
    )
    pipeline = train_prior(recipe)
    assert not pipeline.prior.training
    output = pipeline("a red square", num_images_per_prompt=2, seed=0)
    assert [image.size for image in output.images] == [(8, 8)] * 2
    again = type(pipeline).from_pretrained(recipe.out)("a red square", num_images_per_prompt=2, seed=0)
    assert torch.equal(again.codes, output.codes)
