"""Layouts, masks and number formats, which all quantizers share."""

import pytest
import torch

from tokenizers_vq import FSQ, ResidualQuantizer, VectorQuantizer

QUANTIZERS = {
    "vector": lambda **settings: VectorQuantizer(16, 4, **settings),
    "residual": lambda **settings: ResidualQuantizer(16, 4, 3, **settings),
    "fsq": lambda **settings: FSQ((5, 4, 3), 4, **settings),
}


@pytest.fixture(params=QUANTIZERS)
def build(request):
    return QUANTIZERS[request.param]


LAYOUTS = [((10, 4), -1), ((2, 4, 7), 1), ((2, 3, 5, 4), -1), ((2, 4, 3, 5), 1), ((2, 4, 2, 3, 5), 1), ((3, 4, 2), -2)]


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_quantizer_any_layout_drops_the_channel_axis_and_lookup_restores_it(build, shape, axis):
    module, x = build(channel_axis=axis).eval(), 3 * torch.randn(shape)
    output = module(x)
    grid = x.movedim(axis, -1).shape[:-1]
    assert output.quantized.shape == x.shape and output.codes.shape[: len(grid)] == grid
    if axis != -2:
        assert torch.equal(module.lookup(output.codes), output.quantized)


@pytest.mark.parametrize(("shape", "axis"), [((10, 5), -1), ((2, 3, 4), 1), ((), -1), ((4,), 1)])
def test_quantizer_rejects_another_number_of_channels(build, shape, axis):
    with pytest.raises(
        ValueError, match=rf"Expected 4 channels on axis {axis}, got shape \({', '.join(map(str, shape))}"
    ):
        build(channel_axis=axis)(torch.zeros(shape))


@pytest.mark.parametrize("wrong", [[60, 0, 0], [0, -1, 0], [0.0, 1.0, 2.0]], ids=str)
def test_lookup_rejects_codes_out_of_range_and_floats(build, wrong):
    with pytest.raises(
        ValueError, match=r"codes must (lie in 0\.\.\d+, got (0\.\.60|-1\.\.0)|be integers, got torch\.float32)"
    ):
        build().lookup(torch.tensor([wrong]))


def test_lookup_accepts_every_integer_dtype(build):
    module, codes = build(), torch.tensor([[0, 3, 7]])
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(module.lookup(codes.to(dtype)), module.lookup(codes))


def test_quantizer_in_bfloat16_searches_in_float32(build):
    module, x = build().eval().to(torch.bfloat16), torch.randn(50, 4).bfloat16()
    output, expected = module(x), module.float()(x.float())
    assert output.quantized.dtype == torch.bfloat16 and torch.equal(output.codes, expected.codes)
    torch.testing.assert_close(output.quantized.float(), expected.quantized, atol=0.02, rtol=0.01)


def test_masked_vectors_change_neither_loss_nor_codebook_nor_usage(build):
    torch.manual_seed(1)
    module, twin = build().train(), build().train()
    twin.load_state_dict(module.state_dict())
    for each in module.modules(), twin.modules():
        for part in each:
            if isinstance(part, VectorQuantizer):
                part.initialized.fill_(True)
                part.replace_dead_codes = False  # the two would sample different candidates
    x, noise = torch.randn(40, 4), 50 * torch.randn(40, 4)
    mask = torch.arange(80) < 40
    torch.manual_seed(2)
    output = module(torch.cat([x, noise]), mask)
    torch.manual_seed(2)
    expected = twin(x)
    torch.testing.assert_close(output.loss, expected.loss)
    assert torch.equal(output.codes[:40], expected.codes)
    assert torch.equal(output.quantized[:40], expected.quantized)
    for name, value in module.metrics().items():
        torch.testing.assert_close(value, twin.metrics()[name])
    for (name, state), (_, other) in zip(module.named_buffers(), twin.named_buffers(), strict=True):
        if name.endswith(("cluster_size", "embed_avg", "codebook")):
            torch.testing.assert_close(state, other, msg=name)


def test_masked_vectors_get_no_gradient_from_the_loss():
    x = torch.randn(6, 4, requires_grad=True)
    VectorQuantizer(16, 4).eval()(x, torch.tensor([True] * 4 + [False] * 2)).loss.backward()
    assert x.grad[:4].any() and not x.grad[4:].any()


@pytest.mark.parametrize("mask", [torch.ones(9, dtype=torch.bool), torch.ones(10, 4, dtype=torch.bool), torch.ones(10)])
def test_quantizer_rejects_a_mask_of_another_shape_or_dtype(build, mask):
    with pytest.raises(ValueError, match=r"Expected a boolean mask of shape \(10,\), got torch\..* of shape \("):
        build()(torch.randn(10, 4), mask)


def test_quantizer_rejects_a_mask_that_keeps_nothing(build):
    with pytest.raises(ValueError, match="keeps at least one vector, got all False"):
        build()(torch.randn(10, 4), torch.zeros(10, dtype=torch.bool))


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_quantizer_rejects_sizes_below_one(size):
    for make in (
        lambda: VectorQuantizer(size, 4),
        lambda: VectorQuantizer(4, size),
        lambda: ResidualQuantizer(4, 4, size),
    ):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            make()


def test_quantizer_half_precision_input_gives_half_precision_output(build):
    x = torch.randn(20, 4).half()
    module = build().eval()
    output = module(x)
    assert output.quantized.dtype == torch.float16 and output.loss.dtype == torch.float32
    assert torch.equal(output.codes, module(x.float()).codes)


def test_quantizer_under_bfloat16_autocast_gives_the_same_codes(build):
    module, x = build().eval(), torch.randn(200, 4)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert torch.equal(output.codes, expected.codes) and torch.equal(output.quantized, expected.quantized)


def test_non_finite_vectors_are_counted_only_in_training(build):
    module, x = build().train(), torch.randn(10, 4)
    x[3, 1] = float("nan")
    module(x)
    module.eval()(x)
    assert module.num_non_finite == 1


def test_quantizer_rejects_integers(build):
    with pytest.raises(ValueError, match="Expected a floating-point tensor, got torch.int64"):
        build()(torch.ones(3, 4, dtype=torch.int64))
