"""Quiet, offline, one thread, one seed; and the tiny models that the tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"

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


@pytest.fixture
def tiny_vqvae(images) -> VQVAE:
    """2x2 codes of 16 entries, in eval mode, its codebook placed on data."""
    torch.manual_seed(0)
    config = VQVAEConfig(image_size=8, hidden_channels=16, num_decoder_blocks=1, codebook_size=16, code_dim=4)
    model = VQVAE(config).train()
    with torch.no_grad():
        model(images)
    return model.eval()


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
