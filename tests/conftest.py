"""Tests run quietly, offline, single-threaded and seeded. Defines the tiny models and the data that they share."""

import copy
import os
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"

from typing import Any

import datasets
import hypothesis
import pytest
import torch
import transformers
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch import Tensor

from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.prior.model import build_prior
from tok2img.tokenization.layout import SequenceLayout
from tok2img.tokenization.processor import Tok2ImgProcessor
from tok2img.tokenization.text_tokenizer import SubwordTokenizer, TextTokenizer
from tokenizers_vq import VQVAE, PretrainedImageTokenizer, VQDrawForImages, VQDrawImageConfig, VQVAEConfig
from tokenizers_vq.images.processing import images_from_pixels
from tokenizers_vq.pretrained.adapters import build

# Norms of these models want 32 channels at least.
TINY_VQGAN = {
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1],
    "num_res_blocks": 1,
    "embed_dim": 4,
    "latent_channels": 4,
}
TINY_SETTINGS = {
    "ChameleonVQVAE": TINY_VQGAN | {"num_embeddings": 16, "resolution": 8},
    "Emu3VQVAE": TINY_VQGAN | {"codebook_size": 16, "attn_resolutions": [2], "hidden_size": 32},
    "JanusVQVAE": TINY_VQGAN | {"num_embeddings": 16, "num_patches": 2},
    "VQModel": {
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [32] * 3,
        "num_vq_embeddings": 16,
        "latent_channels": 4,
        "norm_type": "spatial",
    },
}

# Cases of every property: few and always the same, or as many new ones as `PROPERTY_CASES` says, which `make torture` sets.
NUM_CASES = int(os.environ.get("PROPERTY_CASES", 0))
hypothesis.settings.register_profile(
    "tok2img",
    max_examples=NUM_CASES or 50,
    derandomize=not NUM_CASES,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("tok2img")

torch.set_num_threads(1)
datasets.disable_progress_bars()
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def smooth_images(num: int = 6) -> Tensor:
    """Smooth coloured images, `num 3 8 8` in [0, 1], all different."""
    corners = torch.rand(num, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(corners, size=8, mode="bilinear", align_corners=True)


@pytest.fixture
def images() -> Tensor:
    """Six smooth coloured images."""
    return smooth_images()


def small_vqvae(**settings: Any) -> VQVAE:
    """2x2 cells, 16 entries a codebook, in eval mode, its codebooks placed on data."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "hidden_channels": 16, "num_decoder_blocks": 1, "codebook_size": 16, "code_dim": 4}
    model = VQVAE(VQVAEConfig(**sizes, **settings)).eval()
    model.init_from_data(smooth_images(100))
    return model


@pytest.fixture
def tiny_vqvae() -> VQVAE:
    """2x2 codes of 16 entries."""
    return small_vqvae()


@pytest.fixture
def tiny_residual() -> VQVAE:
    """Two levels of 2x2 codes that add up."""
    return small_vqvae(quantizer="residual", num_quantizers=2)


@pytest.fixture
def tiny_fsq() -> VQVAE:
    """2x2 codes without a codebook, of numbers spread over its levels."""
    model = small_vqvae(quantizer="fsq", fsq_levels=[4, 3, 2])
    with torch.no_grad():
        model.quantizer.view.project_in.weight.mul_(50)
    return model


@pytest.fixture
def tiny_vqvae2() -> VQVAE:
    """One code for the whole image, then 2x2."""
    return small_vqvae(num_grids=2)


@pytest.fixture
def tiny_vqdraw(images) -> VQDrawForImages:
    """Four codes of 8 options each, in eval mode; its zero-initialised parts perturbed so that every part matters."""
    torch.manual_seed(0)
    config = VQDrawImageConfig(
        image_size=8, num_stages=4, codebook_size=8, hidden_channels=16, feature_channels=8, num_residual_blocks=1
    )
    model = VQDrawForImages(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@cache
def tiny_pretrained(family: str) -> PretrainedImageTokenizer:
    """2x2 codes of 16 entries, which lie near what the images give and differ in length, in eval mode."""
    torch.manual_seed(0)
    tokenizer = PretrainedImageTokenizer.wrap(build(family, TINY_SETTINGS[family]), image_size=8)
    with torch.no_grad():
        vectors = tokenizer.adapter.encode(tokenizer.model, tokenizer.normalize(smooth_images()))
        entries = vectors.movedim(1, -1).flatten(0, 2)[:16] * torch.linspace(0.7, 1.4, 16)[:, None]
        weight: Tensor = tokenizer.get_parameter("model.quantize.embedding.weight")
        weight.copy_(entries)
    return tokenizer


@pytest.fixture
def tiny_emu3() -> PretrainedImageTokenizer:
    return copy.deepcopy(tiny_pretrained("Emu3VQVAE"))


@pytest.fixture
def tiny_chameleon() -> PretrainedImageTokenizer:
    return copy.deepcopy(tiny_pretrained("ChameleonVQVAE"))


@pytest.fixture
def tiny_janus() -> PretrainedImageTokenizer:
    return copy.deepcopy(tiny_pretrained("JanusVQVAE"))


@pytest.fixture
def tiny_vqmodel() -> PretrainedImageTokenizer:
    pytest.importorskip("diffusers", reason="diffusers, an extra, is not installed")
    return copy.deepcopy(tiny_pretrained("VQModel"))


CAPTIONS = ["a red square", "a blue disc", "two green cats", "a red disc", "", "a dog"]


@pytest.fixture
def captions() -> list[str]:
    return list(CAPTIONS)


@pytest.fixture(scope="session")
def text_tokenizer() -> TextTokenizer:
    return SubwordTokenizer.train_bpe(CAPTIONS, vocab_size=270)


@pytest.fixture
def pil_images(images: Tensor) -> list[PILImage.Image]:
    return images_from_pixels(images)


@pytest.fixture
def processor(tiny_vqvae, text_tokenizer) -> Tok2ImgProcessor:
    return Tok2ImgProcessor.build(tiny_vqvae, text_tokenizer, text_length=6)


@pytest.fixture
def stage_processor(tiny_vqdraw, text_tokenizer) -> Tok2ImgProcessor:
    return Tok2ImgProcessor.build(tiny_vqdraw, text_tokenizer, text_length=6)


@pytest.fixture
def rows(pil_images, captions, tmp_path) -> Dataset:
    """Six captioned images in a Parquet file, so that `map` has a cache."""
    data = Dataset.from_dict({"image": pil_images, "caption": captions}).cast_column("image", Image())
    data.to_parquet(str(tmp_path / "rows.parquet"))
    return Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))


@pytest.fixture(params=[(4,), (1, 1, 1, 1), (2, 2), (1, 3)], ids=["shared", "staged", "levels", "grids"])
def layout(request) -> SequenceLayout:
    return SequenceLayout(
        text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6, positions_per_codebook=request.param
    )


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
