"""Quiet, offline, one thread, one seed; and the tiny models that the tests share."""

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
from torch import Tensor

from tokenizers_vq import VQVAE, PretrainedImageTokenizer, VQDrawForImages, VQDrawImageConfig, VQVAEConfig
from tokenizers_vq.families import build

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


def smooth_pictures(num: int = 6) -> Tensor:
    """Smooth coloured pictures, `num 3 8 8` in [0, 1], all different."""
    corners = torch.rand(num, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(corners, size=8, mode="bilinear", align_corners=True)


@pytest.fixture
def images() -> Tensor:
    """Six smooth coloured pictures."""
    return smooth_pictures()


def small_vqvae(**settings: Any) -> VQVAE:
    """2x2 cells, 16 entries a codebook, in eval mode, its codebooks placed on data."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "hidden_channels": 16, "num_decoder_blocks": 1, "codebook_size": 16, "code_dim": 4}
    model = VQVAE(VQVAEConfig(**sizes, **settings)).eval()
    model.start_from_data(smooth_pictures(100))
    return model


@pytest.fixture
def tiny_vqvae() -> VQVAE:
    """2x2 codes of 16 entries."""
    return small_vqvae()


@pytest.fixture
def tiny_residual() -> VQVAE:
    """Two levels of 2x2 codes that add up."""
    return small_vqvae(quantizer="residual", num_levels=2)


@pytest.fixture
def tiny_fsq() -> VQVAE:
    """2x2 codes without a codebook, of numbers spread over its levels."""
    model = small_vqvae(quantizer="fsq", fsq_levels=[4, 3, 2])
    with torch.no_grad():
        model.quantizer.view.project_in.weight.mul_(50)
    return model


@pytest.fixture
def tiny_vqvae2() -> VQVAE:
    """One code for the whole picture, then 2x2."""
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
    """2x2 codes of 16 entries, which lie near what the pictures give and differ in length, in eval mode."""
    torch.manual_seed(0)
    tokenizer = PretrainedImageTokenizer.wrap(build(family, TINY_SETTINGS[family]), image_size=8)
    with torch.no_grad():
        vectors = tokenizer.family.latents(tokenizer.model, tokenizer.normalize(smooth_pictures()))
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
