"""Finite scalar quantization (FSQ)."""

import itertools

import torch

from tokenizers_vq import FSQ


def test_fsq_has_one_distinct_vector_for_each_product_of_levels():
    module = FSQ((4, 3, 5)).eval()
    vectors = module.lookup(torch.arange(60))
    assert module.codebook_size == 60 and len(vectors.unique(dim=0)) == 60
    assert vectors.min() == -1 and vectors.max() == 1
    values = torch.tensor(list(itertools.product(torch.linspace(-3, 3, 25).tolist(), repeat=3)))
    assert len(module(values).codes.unique()) == 60


def test_fsq_odd_levels_round_the_bounded_value():
    x = torch.linspace(-4, 4, 101)[:, None]
    rounded = (x.tanh() * 2 * 1.001).round() / 2
    torch.testing.assert_close(FSQ((5,)).eval()(x).quantized, rounded)


def test_fsq_gradient_is_that_of_the_bound():
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
