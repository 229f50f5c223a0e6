"""The FFT convolution against torch's direct one, and the encoding that uses it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vq import VQDrawForImages, VQDrawImageConfig
from tokenizers_vq.modules.fft_conv import dft_matrices, fft_conv2d, use_fft
from tokenizers_vq.vqdraw import options
from tokenizers_vq.vqdraw.options import ConvOptions


def conv_options(*, num_examples: int = 5) -> ConvOptions:
    """Sixteen steps of three channels for images of 32 pixels."""
    return ConvOptions(torch.randn(num_examples, 32, 32, 32), torch.randn(16, 3, 32, 5, 5), torch.randn(16, 3))


@pytest.fixture
def directly(monkeypatch):
    """Run a function with `use_fft` switched off."""

    def run(work):
        with monkeypatch.context() as patch:
            patch.setattr(options, "use_fft", lambda *_: False)
            return work()

    return run


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (32, 48)])
def test_fft_conv_equals_the_direct_convolution(kernel, height, width):
    x, weight = torch.randn(3, 5, height, width), torch.randn(7, 5, kernel, kernel)
    expected = F.conv2d(x.double(), weight.double(), padding=kernel // 2)
    for given in (x, x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(fft_conv2d(given, weight).double(), expected, rtol=0, atol=5e-5)


def test_dft_matrices_equal_the_transform_and_its_inverse():
    forward, inverse = dft_matrices(6)
    squares = torch.randn(4, 6, 6)
    parts = forward @ squares.flatten(1).T
    frequencies = torch.fft.rfft2(squares).flatten(1).T
    torch.testing.assert_close(parts, torch.cat([frequencies.real, frequencies.imag]), rtol=0, atol=1e-5)
    torch.testing.assert_close((inverse @ parts).T, squares.flatten(1), rtol=0, atol=1e-5)


def test_step_errors_equal_those_of_the_direct_convolution(directly):
    steps, residual = conv_options(), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert use_fft(steps.features, steps.weight)
        expected = directly(lambda: steps.squared_errors(residual))
        torch.testing.assert_close(steps.squared_errors(residual), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_step_errors_have_the_same_bits_in_every_batch(batch_size):
    steps, residual = conv_options(num_examples=28), torch.randn(28, 3, 32, 32)
    with torch.no_grad():
        parts = [
            steps.select_examples(some).squared_errors(residual[some]) for some in torch.arange(28).split(batch_size)
        ]
        assert torch.equal(torch.cat(parts), steps.squared_errors(residual))


@pytest.mark.parametrize("name", ["cifar10", "celeba"])
def test_published_models_encode_the_same_codes_with_and_without_fft(name, directly):
    config = VQDrawImageConfig.preset(name, num_stages=3, segment_length=0, codebook_size=8, image_size=32)
    model, pixel_values = VQDrawForImages(config).eval(), torch.rand(3, 3, 32, 32)
    codes = model.encode(pixel_values)
    assert torch.equal(codes, directly(lambda: model.encode(pixel_values))) and codes.unique().numel() > 1


def test_dft_matrices_made_under_another_default_device_work_on_a_cpu():
    dft_matrices.cache_clear()
    with torch.device("meta"):
        dft_matrices(12)
    assert fft_conv2d(torch.randn(1, 2, 16, 16), torch.randn(3, 2, 5, 5)).isfinite().all()


def test_fft_conv_follows_a_kernel_that_changes_in_place():
    x, weight = torch.randn(1, 3, 16, 16), torch.randn(4, 3, 5, 5)
    before = fft_conv2d(x, weight)
    weight[0, 0, 0, 0] += 1
    assert not torch.equal(fft_conv2d(x, weight)[:, 0], before[:, 0])
    assert fft_conv2d(x, weight[:2]).shape == (1, 2, 16, 16)


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
def test_use_fft_is_false_for_inputs_it_does_not_serve(x: Tensor, kernel):
    assert not use_fft(x, torch.zeros(4, 3, kernel, kernel))


def test_use_fft_is_false_where_a_gradient_is_recorded():
    assert not use_fft(torch.zeros(2, 3, 32, 32), torch.zeros(4, 3, 5, 5))
