"""Bits of latents, which decide codes where two entries are nearly as near."""

import pytest
import torch

from tokenizers_vq.convolution import SteadyProjection


@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_a_projection_has_the_same_bits_in_every_batch(batch_size):
    layer, x = SteadyProjection(128, 64).eval(), torch.randn(64, 128, 8, 8)
    assert torch.cat([layer(some) for some in x.split(batch_size)]).equal(layer(x))


def test_a_projection_is_the_plain_one_to_the_last_bits():
    layer, x = SteadyProjection(32, 16), torch.randn(8, 32, 4, 4)
    torch.testing.assert_close(layer.eval()(x), layer.train()(x))
    assert layer.train()(x).equal(torch.nn.functional.conv2d(x, layer.weight, layer.bias))
