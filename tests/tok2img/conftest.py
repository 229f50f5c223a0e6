"""Captions, processors and layouts that the tests of tok2img share."""

import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch import Tensor

from tok2img.layout import SequenceLayout
from tok2img.prior import build_prior
from tok2img.processing import Tok2ImgProcessor
from tok2img.text import SubwordTokenizer, TextTokenizer
from tokenizers_vq.images import images_from_pixels

CAPTIONS = ["a red square", "a blue disc", "two green cats", "a red disc", "", "a dog"]


@pytest.fixture
def captions() -> list[str]:
    return list(CAPTIONS)


@pytest.fixture(scope="session")
def text_tokenizer() -> TextTokenizer:
    return SubwordTokenizer.train_bpe(CAPTIONS, vocab_size=270)


@pytest.fixture
def pictures(images: Tensor) -> list[PILImage.Image]:
    return images_from_pixels(images)


@pytest.fixture
def processor(tiny_vqvae, text_tokenizer) -> Tok2ImgProcessor:
    return Tok2ImgProcessor.build(tiny_vqvae, text_tokenizer, text_length=6)


@pytest.fixture
def stage_processor(tiny_vqdraw, text_tokenizer) -> Tok2ImgProcessor:
    return Tok2ImgProcessor.build(tiny_vqdraw, text_tokenizer, text_length=6)


@pytest.fixture
def rows(pictures, captions, tmp_path) -> Dataset:
    """Six captioned pictures in a Parquet file, so that `map` has a cache."""
    data = Dataset.from_dict({"image": pictures, "caption": captions}).cast_column("image", Image())
    data.to_parquet(str(tmp_path / "rows.parquet"))
    return Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))


@pytest.fixture(params=[(4,), (1, 1, 1, 1), (2, 2), (1, 3)], ids=["shared", "staged", "levels", "grids"])
def layout(request) -> SequenceLayout:
    return SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6, code_groups=request.param)


@pytest.fixture(params=["qwen3", "llama", "gpt2"])
def architecture(request) -> str:
    return request.param


@pytest.fixture
def prior(architecture, layout):
    """One layer, in eval mode, its head enlarged so that its codes are far from equally likely."""
    model = build_prior(layout, architecture=architecture, depth=1)
    model.get_output_embeddings().weight.data.mul_(20)
    return model.eval()
