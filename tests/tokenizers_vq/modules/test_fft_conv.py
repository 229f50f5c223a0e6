"""Convolutions in tiles, against those that torch makes."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizers_vq import VQDrawForImages, VQDrawImageConfig
from tokenizers_vq.modules import fft_conv as frequencies
from tokenizers_vq.modules.fft_conv import KernelTransformCache, convolve_in_tiles, in_tiles, split_for_tiles, use_fft
from tokenizers_vq.vqdraw import options
from tokenizers_vq.vqdraw.options import ConvolvedOptions


def convolved_options(*, num_examples: int = 5) -> ConvolvedOptions:
    """Sixteen steps of three channels for images of 32 pixels."""
    return ConvolvedOptions(torch.randn(num_examples, 32, 32, 32), torch.randn(16, 3, 32, 5, 5), torch.randn(16, 3))


@pytest.fixture
def directly(monkeypatch):
    """Runs something as if tiles were never worth it."""

    def run(work):
        with monkeypatch.context() as patch:
            patch.setattr(options, "use_fft", lambda *_: False)
            return work()

    return run


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 48)])
def test_tiles_are_those_of_the_convolution(kernel, height, width):
    x, weight = torch.randn(3, 5, height, width), torch.randn(7, 5, kernel, kernel)
    expected = F.conv2d(x.double(), weight.double(), padding=kernel // 2)
    for given in (x, x.to(memory_format=torch.channels_last)):
        made = convolve_in_tiles(given, weight)
        torch.testing.assert_close(made.double(), in_tiles(expected), rtol=0, atol=3e-5)


def test_tiles_are_squares_of_the_image():
    x = torch.randn(2, 3, 32, 48)
    assert torch.equal(in_tiles(x)[:, 1, 4], rearrange(x[1, :, 16:, 16:32], "c p q -> (p q) c"))


def test_examples_go_together_as_long_as_their_tiles_fit(monkeypatch):
    monkeypatch.setattr(frequencies, "TILES_AT_ONCE", 12)
    assert [len(part) for part in split_for_tiles(torch.zeros(8, 1, 32, 32))] == [3, 3, 2]
    assert [len(part) for part in split_for_tiles(torch.zeros(2, 1, 64, 64))] == [1, 1]


def test_errors_of_steps_are_those_of_steps_in_memory(directly, monkeypatch):
    monkeypatch.setattr(frequencies, "TILES_AT_ONCE", 8)
    steps, residual = convolved_options(), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert use_fft(steps.features, steps.weight)
        expected = directly(lambda: steps.squared_errors(residual))
        torch.testing.assert_close(steps.squared_errors(residual), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_errors_have_the_same_bits_in_every_batch(batch_size):
    steps, residual = convolved_options(num_examples=28), torch.randn(28, 3, 32, 32)
    with torch.no_grad():
        parts = [steps.select(some).squared_errors(residual[some]) for some in torch.arange(28).split(batch_size)]
        assert torch.equal(torch.cat(parts), steps.squared_errors(residual))


@pytest.mark.parametrize("name", ["cifar10", "celeba"])
def test_published_models_code_as_without_tiles(name, directly):
    config = VQDrawImageConfig.preset(name, num_stages=3, segment_length=0, codebook_size=8, image_size=32)
    model, pixel_values = VQDrawForImages(config).eval(), torch.rand(3, 3, 32, 32)
    codes = model.encode(pixel_values)
    assert torch.equal(codes, directly(lambda: model.encode(pixel_values))) and codes.unique().numel() > 1


def test_a_kernel_is_transformed_once_as_long_as_it_stays_what_it_is():
    kernels, weight = KernelTransformCache(), torch.randn(4, 3, 5, 5)
    made = kernels.factors(weight)
    assert kernels.factors(weight.clone()) is made
    weight.data[0, 0, 0, 0] += 1
    assert not torch.equal(kernels.factors(weight), made)
    assert kernels.factors(weight[:2]).shape == (*made.shape[:2], 2)


def test_transforms_made_while_another_device_is_the_default_serve_a_cpu():
    frequencies.transforms.cache_clear()
    with torch.device("meta"):
        frequencies.transforms(5)
    assert convolve_in_tiles(torch.randn(1, 2, 16, 16), torch.randn(3, 2, 5, 5)).isfinite().all()


@pytest.mark.parametrize(
    ("x", "kernel"),
    [
        (torch.zeros(2, 3, 28, 28), 5),
        (torch.zeros(2, 3, 32, 32), 3),
        (torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16), 5),
        (torch.zeros(0, 3, 32, 32), 5),
        (torch.zeros(2, 3, 32, 32, device="meta"), 5),
    ],
)
@torch.no_grad()
def test_other_convolutions_stay_as_they_are(x: Tensor, kernel):
    assert not use_fft(x, torch.zeros(4, 3, kernel, kernel))


def test_with_a_gradient_convolutions_stay_as_they_are():
    assert not use_fft(torch.zeros(2, 3, 32, 32), torch.zeros(4, 3, 5, 5))
