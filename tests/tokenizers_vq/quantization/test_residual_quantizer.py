"""Residual quantization, and compilation of every quantizer."""

import copy

import pytest
import torch

from tokenizers_vq import FSQ, ResidualQuantizer, VectorQuantizer


def trained(num_quantizers: int = 3, **settings) -> tuple[ResidualQuantizer, torch.Tensor]:
    """Return a residual quantizer in eval mode and the vectors `n d` that initialized it."""
    module, x = ResidualQuantizer(16, 4, num_quantizers, **settings), torch.randn(400, 4)
    module.init_from_data(x)
    return module.eval(), x


def test_residual_quantizer_each_codebook_quantizes_the_residual_of_those_before():
    module, x = trained()
    codes, residual = module(x).codes, x
    for index, layer in enumerate(module.layers):
        output = layer(residual)
        assert torch.equal(codes[:, index], output.codes)
        residual = residual - output.quantized


def test_residual_quantizer_every_prefix_decodes_with_a_lower_error():
    module, x = trained()
    codes = module(x).codes
    errors = [(module.lookup(codes[:, :last]) - x).square().mean().item() for last in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.25 * errors[0]
    assert torch.equal(module.lookup(codes), module(x).quantized)


@pytest.mark.parametrize("codebook_dim", [0, 2])
def test_residual_quantizer_code_mask_changes_the_sum_but_neither_codes_nor_loss(codebook_dim):
    module, x = trained(codebook_dim=codebook_dim)
    code_mask = torch.arange(3) < torch.randint(1, 4, (400, 1))
    whole, some = module(x), module(x.requires_grad_(), code_mask=code_mask)
    assert torch.equal(some.codes, whole.codes) and torch.equal(some.loss, whole.loss)
    assert torch.equal(some.quantized, module.lookup(whole.codes, code_mask))
    some.quantized.sum().backward()
    assert x.grad is not None and x.grad.any(dim=1).all()


@pytest.mark.parametrize("num_codes", [0, 4])
def test_residual_lookup_rejects_no_codes_and_too_many(num_codes):
    module, _ = trained()
    with pytest.raises(ValueError, match=f"Expected codes of 1 to 3 codebooks, got {num_codes}"):
        module.lookup(torch.zeros(5, num_codes, dtype=torch.long))


def test_residual_quantizer_commitment_gradient_is_the_mean_over_all_codebooks():
    module, x = trained(commitment_weight=0.5)
    x = x.requires_grad_()
    module(x).loss.backward()
    expected, residual = torch.zeros_like(x), x.detach()
    for layer in module.layers:
        residual = residual - layer(residual).quantized
        # The loss is the mean over codebooks of beta |z - e|^2, which is a mean over vectors and channels.
        expected += 0.5 * 2 * residual / x.numel() / 3
    torch.testing.assert_close(x.grad, expected)


def test_residual_quantizer_without_ema_each_codebook_gets_only_its_own_gradient():
    module, x = trained(ema_update=False, commitment_weight=0.0)
    module(x).loss.backward()
    residual = x
    for layer in module.layers:
        output = layer(residual)
        difference = 2 * (output.quantized - residual).detach() / x.numel() / 3
        expected = torch.zeros(16, 4).index_add_(0, output.codes, difference)
        torch.testing.assert_close(layer.codebook.grad, expected)
        residual = (residual - output.quantized).detach()


def test_residual_quantizer_loss_is_the_same_under_no_grad():
    for ema_update in (True, False):
        module, x = trained(ema_update=ema_update)
        loss = module(x).loss
        with torch.no_grad():
            assert torch.equal(module(x).loss, loss.detach()) if ema_update else torch.isclose(module(x).loss, loss)


def test_residual_quantizer_training_initializes_all_codebooks_and_reports_mean_usage():
    module, x = ResidualQuantizer(16, 4, 2, codebook_dim=3).train(), torch.randn(400, 4)
    module(x)
    each = [layer.metrics()["perplexity"] for layer in module.layers]
    torch.testing.assert_close(module.metrics()["perplexity"], torch.stack(each).mean())
    assert all(layer.initialized for layer in module.layers)


@pytest.mark.parametrize("module", [VectorQuantizer(16, 4), ResidualQuantizer(16, 4, 2), FSQ((5, 4), 4)])
@pytest.mark.parametrize("training", [True, False])
def test_initialized_quantizer_compiles_into_one_graph(module, training):
    x = torch.randn(300, 4)
    module.init_from_data(x)
    module.train(training)
    twin = copy.deepcopy(module)
    outputs, gradients = [], []
    for each in (twin, torch.compile(module, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        vectors = x.clone().requires_grad_()
        outputs.append(each(vectors))
        (outputs[-1].loss + outputs[-1].quantized.square().sum()).backward()
        gradients.append(vectors.grad)
    plain, compiled = outputs
    assert torch.equal(compiled.codes, plain.codes) and torch.equal(compiled.quantized, plain.quantized)
    torch.testing.assert_close(compiled.loss, plain.loss)
    torch.testing.assert_close(*gradients)
    for name, state in twin.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), state, msg=name)
