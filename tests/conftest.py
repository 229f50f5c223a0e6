"""Quiet, offline, one thread, one seed; and the tiny models that the tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"

from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor

from tokenizers_vq import VQVAE, VQDrawForImages, VQDrawImageConfig, VQVAEConfig

torch.set_num_threads(1)
datasets.disable_progress_bars()
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def images() -> Tensor:
    """Six smooth coloured pictures, `6 3 8 8` in [0, 1], all different."""
    corners = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(corners, size=8, mode="bilinear", align_corners=True)


def small_vqvae(images: Tensor, **settings: Any) -> VQVAE:
    """2x2 cells, 16 entries a codebook, in eval mode, its codebooks placed on data."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "hidden_channels": 16, "num_decoder_blocks": 1, "codebook_size": 16, "code_dim": 4}
    model = VQVAE(VQVAEConfig(**sizes, **settings)).train()
    with torch.no_grad():
        model(images)
    return model.eval()


@pytest.fixture
def tiny_vqvae(images) -> VQVAE:
    """2x2 codes of 16 entries."""
    return small_vqvae(images)


@pytest.fixture
def tiny_residual(images) -> VQVAE:
    """Two levels of 2x2 codes that add up."""
    return small_vqvae(images, quantizer="residual", num_levels=2)


@pytest.fixture
def tiny_fsq(images) -> VQVAE:
    """2x2 codes without a codebook, of numbers spread over its levels."""
    model = small_vqvae(images, quantizer="fsq", fsq_levels=[4, 3, 2])
    with torch.no_grad():
        model.quantizer.view.project_in.weight.mul_(50)
    return model


@pytest.fixture
def tiny_vqvae2(images) -> VQVAE:
    """One code for the whole picture, then 2x2."""
    return small_vqvae(images, num_grids=2)


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
