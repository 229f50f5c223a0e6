"""Captions, processors and layouts that the tests of tok2img share."""

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch import Tensor

from tok2img.layout import SequenceLayout
from tok2img.pipeline import TextToImagePipeline
from tok2img.prior import build_prior
from tok2img.processing import Tok2ImgProcessor
from tok2img.text import SubwordTokenizer, TextTokenizer
from tokenizers_vq.pixels import images_from_pixels

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


@pytest.fixture
def text_ids(layout) -> Tensor:
    """A full text, one that is cut short, none, and another."""
    pad = layout.pad_id
    return torch.tensor([[1, 5, 10], [7, pad, pad], [pad, pad, pad], [2, 2, pad]])


@pytest.fixture
def codes(layout) -> Tensor:
    return torch.randint(layout.codebook_size, (4, layout.num_codes))


def pipeline_of(processor: Tok2ImgProcessor) -> TextToImagePipeline:
    """Of a prior whose codes are far from equally likely."""
    prior = build_prior(processor.layout, depth=1)
    prior.get_output_embeddings().weight.data.mul_(20)
    return TextToImagePipeline(prior, processor)


@pytest.fixture
def pipeline(processor) -> TextToImagePipeline:
    return pipeline_of(processor)


@pytest.fixture
def stage_pipeline(stage_processor) -> TextToImagePipeline:
    return pipeline_of(stage_processor)


@pytest.fixture
def data(rows, tmp_path) -> str:
    """Twenty-four rows, the six over and over, in a Parquet file."""
    path = tmp_path / "train.parquet"
    rows.select([row % 6 for row in range(24)]).to_parquet(str(path))
    return str(path)


@pytest.fixture
def image_tokenizer(tiny_vqvae, tmp_path) -> str:
    """Folder of a saved image tokenizer."""
    tiny_vqvae.save_pretrained(str(tmp_path / "tokenizer"))
    return str(tmp_path / "tokenizer")
