"""Sums of codebook vectors, and the control without a codebook."""

import copy
import itertools

import pytest
import torch

from tokenizers_vq import FSQ, ResidualQuantizer, VectorQuantizer


def trained(num_quantizers: int = 3, **settings) -> tuple[ResidualQuantizer, torch.Tensor]:
    """A residual quantizer placed on vectors `n d`, in eval mode, and those vectors."""
    module, x = ResidualQuantizer(16, 4, num_quantizers, **settings), torch.randn(400, 4)
    module.init_from_data(x)
    return module.eval(), x


def test_each_level_codes_what_those_before_it_leave():
    module, x = trained()
    codes, rest = module(x).codes, x
    for number, level in enumerate(module.levels):
        chosen = level(rest)
        assert torch.equal(codes[:, number], chosen.codes)
        rest = rest - chosen.quantized


def test_every_prefix_decodes_and_each_level_lowers_the_error():
    module, x = trained()
    codes = module(x).codes
    errors = [(module.lookup(codes[:, :last]) - x).square().mean().item() for last in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.25 * errors[0]
    assert torch.equal(module.lookup(codes), module(x).quantized)


@pytest.mark.parametrize("codebook_dim", [0, 2])
def test_entries_that_are_not_shown_are_left_out_of_the_sum_alone(codebook_dim):
    module, x = trained(codebook_dim=codebook_dim)
    known = torch.arange(3) < torch.randint(1, 4, (400, 1))
    whole, some = module(x), module(x.requires_grad_(), known=known)
    assert torch.equal(some.codes, whole.codes) and torch.equal(some.loss, whole.loss)
    assert torch.equal(some.quantized, module.lookup(whole.codes, known))
    some.quantized.sum().backward()
    assert x.grad is not None and x.grad.any(dim=1).all()


@pytest.mark.parametrize("num_codes", [0, 4])
def test_codes_of_no_level_or_too_many_are_refused(num_codes):
    module, _ = trained()
    with pytest.raises(ValueError, match=f"codes of 1 to 3 levels, got {num_codes}"):
        module.lookup(torch.zeros(5, num_codes, dtype=torch.long))


def test_every_levels_commitment_draws_the_encoder():
    module, x = trained(commitment_weight=0.5)
    x = x.requires_grad_()
    module(x).loss.backward()
    expected, rest = torch.zeros_like(x), x.detach()
    for level in module.levels:
        left = rest - level(rest).quantized
        expected += (
            0.5 * 2 * left / x.numel() / 3
        )  # the mean over levels of beta |z - e|^2, each over all that is summed
        rest = left
    torch.testing.assert_close(x.grad, expected)


def test_without_average_every_codebook_gets_its_own_gradient_alone():
    module, x = trained(ema_update=False, commitment_weight=0.0)
    module(x).loss.backward()
    rest = x
    for level in module.levels:
        output = level(rest)
        difference = 2 * (output.quantized - rest).detach() / x.numel() / 3
        expected = torch.zeros(16, 4).index_add_(0, output.codes, difference)
        torch.testing.assert_close(level.codebook.grad, expected)
        rest = (rest - output.quantized).detach()


def test_the_loss_is_the_same_without_gradient():
    for ema_update in (True, False):
        module, x = trained(ema_update=ema_update)
        loss = module(x).loss
        with torch.no_grad():
            assert torch.equal(module(x).loss, loss.detach()) if ema_update else torch.isclose(module(x).loss, loss)


def test_training_moves_all_levels_and_reports_their_mean_usage():
    module, x = ResidualQuantizer(16, 4, 2, codebook_dim=3).train(), torch.randn(400, 4)
    module(x)
    each = [level.metrics()["perplexity"] for level in module.levels]
    torch.testing.assert_close(module.metrics()["perplexity"], torch.stack(each).mean())
    assert all(level.started for level in module.levels)


# FSQ


def test_fsq_gives_as_many_codes_as_the_product_of_its_levels_and_each_is_its_own_vector():
    module = FSQ((4, 3, 5)).eval()
    vectors = module.lookup(torch.arange(60))
    assert module.codebook_size == 60 and len(vectors.unique(dim=0)) == 60
    assert vectors.min() == -1 and vectors.max() == 1
    numbers = torch.tensor(list(itertools.product(torch.linspace(-3, 3, 25).tolist(), repeat=3)))
    assert len(module(numbers).codes.unique()) == 60


def test_fsq_of_odd_levels_rounds_the_bounded_number():
    x = torch.linspace(-4, 4, 101)[:, None]
    rounded = (x.tanh() * 2 * 1.001).round() / 2
    torch.testing.assert_close(FSQ((5,)).eval()(x).quantized, rounded)


def test_fsq_passes_the_gradient_of_the_bound():
    x = torch.randn(20, 2, requires_grad=True)
    module = FSQ((8, 5))
    module(x).quantized.sum().backward()
    (bounded,) = torch.autograd.grad((module.bound(x) / torch.tensor([4, 2])).sum(), x)
    torch.testing.assert_close(x.grad, bounded)


def test_fsq_counts_its_codes_in_training():
    module = FSQ((3, 3)).train()
    module(torch.randn(500, 2) * 3)
    assert module.metrics()["code_usage"] == 1 and module.metrics()["perplexity"] > 5
    module.usage.reset()
    assert module.metrics()["code_usage"] == 0


@pytest.mark.parametrize("module", [VectorQuantizer(16, 4), ResidualQuantizer(16, 4, 2), FSQ((5, 4), 4)])
@pytest.mark.parametrize("training", [True, False])
def test_a_quantizer_that_stands_compiles_into_one_graph(module, training):
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
