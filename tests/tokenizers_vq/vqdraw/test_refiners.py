import pytest
import torch
from torch import Tensor, nn

from tokenizers_vq.modules.conv import channels_last, group_norm
from tokenizers_vq.modules.dilated_conv import concat_neighbors
from tokenizers_vq.modules.stage_conditioning import StageGain
from tokenizers_vq.vqdraw.options import DenseOptions, LinearOptions
from tokenizers_vq.vqdraw.refiners import ConvRefiner, SegmentedRefiner


def fresh() -> ConvRefiner:
    torch.manual_seed(0)
    return ConvRefiner(
        num_stages=4, codebook_size=5, num_channels=3, hidden_channels=16, feature_channels=8, num_residual_blocks=1
    )


@pytest.fixture
def refiner() -> ConvRefiner:
    """With every parameter perturbed, as after some training."""
    module = fresh()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


class Named(nn.Module):
    """A refiner whose one step says who was asked, and for which stage."""

    def __init__(self, name: int):
        super().__init__()
        self.name = name

    def forward(self, state: Tensor, stage: int) -> DenseOptions:
        return DenseOptions(torch.full((len(state), 1), 10.0 * self.name + stage))


def test_new_refiner_proposes_zero_steps(images):
    assert not any(fresh()(images, stage).all_steps().any() for stage in range(4))


def test_first_gradient_of_a_new_refiner_reaches_its_head(images):
    module = fresh()
    sum(module(images, stage).squared_errors(images).mean() for stage in range(4)).backward()
    assert module.head.grad.flatten(2).any(dim=2).all()


def test_every_parameter_gets_a_gradient_once_the_head_has_moved(refiner, images):
    sum(refiner(images, stage).squared_errors(images).mean() for stage in range(4)).backward()
    assert not [name for name, p in refiner.named_parameters() if p.grad is None or not p.grad.any()]


def test_options_have_the_shape_of_the_state(refiner, images):
    options = refiner(images, 2)
    assert isinstance(options, LinearOptions) and options.all_steps().shape == (6, 5, *images.shape[1:])


@pytest.mark.parametrize("size", [(4, 4), (12, 8)])
def test_refiner_takes_any_multiple_of_four(refiner, size):
    assert refiner(torch.randn(2, 3, *size), 0).all_steps().shape == (2, 5, 3, *size)


def test_example_gets_the_same_steps_alone_and_in_a_batch(refiner, images):
    torch.testing.assert_close(refiner(images[2:3], 1).all_steps()[0], refiner(images, 1).all_steps()[2])


def test_stages_propose_different_steps_for_the_same_state(refiner, images):
    assert not torch.allclose(refiner(images, 0).all_steps(), refiner(images, 1).all_steps())


def test_gains_of_a_stage_do_not_change_other_stages(refiner, images):
    before = [refiner(images, stage).all_steps() for stage in range(4)]
    with torch.no_grad():
        for module in refiner.modules():
            if isinstance(module, StageGain):
                module.gain[2] *= 1.5
    changed = [not torch.equal(refiner(images, stage).all_steps(), before[stage]) for stage in range(4)]
    assert changed == [False, False, True, False]


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 6, 4, stride=2, padding=1), nn.ConvTranspose2d(3, 6, 4, stride=2)])
def test_scaled_conv_equals_a_scaled_output(images, layer):
    gains = StageGain(4, 6, init=torch.randn)
    expected = layer(images) * gains.gain[1, :, None, None]
    for x in (images, channels_last(images)):
        torch.testing.assert_close(gains.scaled_conv(layer, x, 1), expected)
    few = images[:1, :, :4, :4]
    torch.testing.assert_close(gains.scaled_conv(layer, few, 1), layer(few) * gains.gain[1, :, None, None])


def test_scaled_norm_equals_a_scaled_output(images):
    gains, norm = StageGain(4, 3, init=torch.randn), group_norm(3)
    expected = norm(images) * gains.gain[1, :, None, None]
    torch.testing.assert_close(gains.scaled_norm(norm, images, 1), expected)


def test_new_gains_change_nothing(images):
    assert torch.equal(StageGain(4, 3).scaled_norm(group_norm(3), images, 1), group_norm(3)(images))


def test_each_segment_runs_its_own_refiner_from_stage_zero():
    refiner = SegmentedRefiner([Named(1), Named(2), Named(3)], segment_length=2)
    answers = [refiner(torch.zeros(1), stage).all_steps().item() for stage in range(6)]
    assert answers == [10, 11, 20, 21, 30, 31]


@pytest.mark.parametrize(("length", "dilation"), [(7, 2), (4, 1), (3, 3), (3, 5), (1, 1), (0, 1)])
def test_neighbours_and_their_gradient_are_those_of_the_definition(length, dilation):
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    near = range(-dilation, dilation + 1, dilation)
    shifts = [torch.diag_embed(torch.ones(max(0, length - abs(by)), dtype=x.dtype), by) for by in near]
    shifts = [shift if len(shift) == length else x.new_zeros(length, length) for shift in shifts]
    plain = torch.cat([shift @ x for shift in shifts], dim=2)
    near, weights = concat_neighbors(x, dilation), torch.randn_like(plain)
    assert torch.equal(near, plain)
    torch.testing.assert_close(*(torch.autograd.grad((each * weights).sum(), x)[0] for each in (near, plain)))
    assert not length or torch.autograd.gradgradcheck(concat_neighbors, (x, dilation))
