"""Latents do not depend on the batch, bit for bit: a bit decides codes between almost equally near entries."""

import pytest
import torch
from torch import nn

from tokenizers_vq import VQVAE, VQVAEConfig
from tokenizers_vq.modules.batch_invariant import batch_invariant_conv1x1, batch_invariant_encode

SIZES = {"image_size": 16, "hidden_channels": 32, "code_dim": 16, "codebook_size": 64}


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_batch_invariant_conv1x1_is_bit_equal_in_every_batch(batch_size):
    layer, x = nn.Conv2d(128, 64, 1).eval(), torch.randn(64, 128, 8, 8)
    assert torch.cat([batch_invariant_conv1x1(layer, some) for some in x.split(batch_size)]).equal(
        batch_invariant_conv1x1(layer, x)
    )


@pytest.mark.parametrize("bias", [True, False])
def test_batch_invariant_conv1x1_equals_the_plain_convolution(bias):
    layer, x = nn.Conv2d(32, 16, 1, bias=bias), torch.randn(8, 32, 4, 4)
    torch.testing.assert_close(batch_invariant_conv1x1(layer.eval(), x), layer(x))
    assert batch_invariant_conv1x1(layer.train(), x).equal(layer(x))


def test_batch_invariant_encode_duplicates_a_single_example():
    seen = []

    def encode(x):
        seen.append(x)
        return x[:, :1] + 1

    x = torch.randn(3, 4)
    assert batch_invariant_encode(encode, x).equal(x[:, :1] + 1) and batch_invariant_encode(encode, x[:1]).equal(
        x[:1, :1] + 1
    )
    assert [len(each) for each in seen] == [3, 2] and len(batch_invariant_encode(encode, x[:0])) == 0


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
@pytest.mark.parametrize(
    "settings", [{"num_grids": 2}, {"num_encoder_blocks": 2}, {"num_grids": 3, "num_encoder_blocks": 1}]
)
def test_latents_of_every_grid_are_bit_equal_in_every_batch(settings, batch_size):
    model, seen = VQVAE(VQVAEConfig(**SIZES, **settings)).eval(), []
    for grid in model.grids():
        grid.quantizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(64, 3, 16, 16)
    model.encode(x)
    whole, parts = list(seen), [[] for _ in seen]
    for some in x.split(batch_size):
        seen.clear()
        model.encode(some)
        for part, latents in zip(parts, seen, strict=True):
            part.append(latents[: len(some)])
    assert len(whole) == settings.get("num_grids", 1)
    assert all(each.equal(torch.cat(part)) for each, part in zip(whole, parts, strict=True))
