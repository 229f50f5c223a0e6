"""Gradient estimators: straight-through, rotation trick and commitment loss."""

from functools import partial

import pytest
import torch

from tokenizers_vq import ResidualQuantizer, VectorQuantizer
from tokenizers_vq.quantization.gradient_estimators import apply_commitment_loss, rotation_trick, straight_through
from tokenizers_vq.quantization.vector_layout import Vectors


def test_straight_through_returns_the_entry_with_the_gradient_of_the_vector():
    vectors, chosen = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
    weight = torch.randn(8, 4)
    (straight_through(vectors, chosen) * weight).sum().backward()
    assert torch.equal(straight_through(vectors, chosen), chosen) and torch.equal(vectors.grad, weight)


def test_rotation_trick_gradient_is_rotated_like_the_vector():
    vectors, chosen = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
    output = rotation_trick(vectors, chosen)
    assert torch.equal(output, chosen)
    matrices = torch.stack(
        [torch.autograd.grad(output[:, row].sum(), vectors, retain_graph=True)[0] for row in range(4)], dim=1
    )
    # The map is linear: it takes each vector to its code, and is a rotation times the ratio of lengths.
    torch.testing.assert_close((matrices @ vectors.detach()[..., None])[..., 0], chosen)
    ratio = (chosen.norm(dim=1) / vectors.norm(dim=1)).detach()
    scaled = matrices / ratio[:, None, None]
    torch.testing.assert_close(scaled @ scaled.mT, torch.eye(4).expand(8, 4, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("used", [slice(0, 2), slice(0, 1), slice(1, 2)])
def test_commitment_gradient_equals_that_of_the_plain_form_and_adds_to_straight_through(used):
    flat = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    kept, chosen = torch.tensor([True, True, False, True, True, True]), torch.randn(6, 4, dtype=torch.float64)
    vectors = Vectors(flat, kept, torch.Size([6]), flat.dtype)
    value = 0.3 * (flat - chosen)[kept].square().sum(dim=1).mean()
    outputs = apply_commitment_loss(
        "straight_through", vectors, chosen, value.detach(), residual=(flat - chosen).detach(), weight=0.3
    )
    assert torch.equal(outputs[0], chosen) and torch.equal(outputs[1], value)
    plain = (flat + (chosen - flat).detach(), value)
    weights = torch.randn(6, 4, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(sum((o * w).sum() for o, w in list(zip(each, weights, strict=True))[used]), flat)[0]
        for each in (outputs, plain)
    )
    torch.testing.assert_close(found, expected)


def test_rotation_trick_zero_vector_gets_its_gradient_straight_through():
    vectors = torch.zeros(3, 4, requires_grad=True)
    weight = torch.randn(3, 4)
    (rotation_trick(vectors, torch.randn(3, 4)) * weight).sum().backward()
    assert torch.equal(vectors.grad, weight)


@pytest.mark.parametrize(
    "build", [partial(VectorQuantizer, 16, 4), partial(ResidualQuantizer, 16, 4, 3)], ids=["vector", "residual"]
)
def test_gradient_estimator_does_not_change_values(build):
    plain, rotated = (build(gradient=gradient).eval() for gradient in ("straight_through", "rotation_trick"))
    rotated.load_state_dict(plain.state_dict())
    x = torch.randn(20, 4)
    assert torch.equal(plain(x).quantized, rotated(x).quantized)


def test_quantizer_rejects_second_derivatives():
    x = torch.randn(20, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="Expected a first derivative"):
        torch.autograd.grad(VectorQuantizer(16, 4).eval()(x).loss, x, create_graph=True)
