"""The stage loop, and every fast form against the plain one."""

import pytest
import torch
from torch import Tensor, nn

from tokenizers_vq.vqdraw import (
    BiasedOptions,
    DenseOptions,
    Drawing,
    LinearOptions,
    Options,
    SharedOptions,
    VQDraw,
    squared_error,
)

SHAPE = (3, 8, 8)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def linear_options() -> LinearOptions:
    return LinearOptions(random(5, 7, 4, 4), random(6, 12, 7), patch=2)


OPTIONS = {
    "linear": linear_options,
    "shared": lambda: SharedOptions(random(6, *SHAPE), 5),
    "biased linear": lambda: BiasedOptions(linear_options(), random(6, *SHAPE)),
    "biased shared": lambda: BiasedOptions(SharedOptions(random(6, *SHAPE), 5), random(6, *SHAPE)),
    "biased twice": lambda: BiasedOptions(BiasedOptions(linear_options(), random(6, *SHAPE)), random(6, *SHAPE)),
}


@pytest.fixture(params=OPTIONS)
def options(request) -> Options:
    """Six steps for five examples, in float64."""
    torch.manual_seed(0)
    return OPTIONS[request.param]()


class DenseRefiner(nn.Module):
    """Another refiner's steps, in memory."""

    def __init__(self, refiner: nn.Module):
        super().__init__()
        self.refiner = refiner

    def forward(self, state: Tensor, stage: int) -> DenseOptions:
        return DenseOptions(self.refiner(state, stage).all())


def plain_loop(draw: VQDraw, target: Tensor) -> Drawing:
    """The definition, with every proposal in memory and every example looking for itself."""
    state, codes, errors = torch.zeros_like(target), [], []
    for stage in range(draw.num_stages):
        steps = draw.refiner(state, stage).all()
        proposals = state[:, None] + (steps + draw.biases[stage] if stage < len(draw.biases) else steps)
        error = (proposals - target[:, None]).square().flatten(2).mean(dim=2)
        codes.append(error.argmin(dim=1))
        errors.append(error)
        state = proposals[torch.arange(len(target)), codes[-1]]
    return Drawing(torch.stack(codes, dim=1), state, torch.stack(errors, dim=1))


@pytest.fixture
def refiner(tiny_vqdraw) -> nn.Module:
    return tiny_vqdraw.draw.refiner.double()


@pytest.fixture
def target(images) -> Tensor:
    return (images.double() - 0.5) / 0.25


def build(refiner: nn.Module, *, num_biased_stages: int = 2, **settings) -> VQDraw:
    """Four stages of eight options, the first two biased, in float64."""
    draw = VQDraw(
        refiner,
        squared_error,
        state_shape=SHAPE,
        num_stages=4,
        codebook_size=8,
        num_biased_stages=num_biased_stages,
        **settings,
    )
    torch.manual_seed(3)
    nn.init.normal_(draw.biases, std=0.3)
    return draw.double()


def gradients(draw: VQDraw, loss: Tensor) -> list[Tensor]:
    parameters = list(draw.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [
        torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found, strict=True)
    ]


# Options


def test_options_choose_what_dense_options_choose(options):
    codes = torch.tensor([5, 0, 3, 3, 1])
    torch.testing.assert_close(options.chosen(codes), DenseOptions(options.all()).chosen(codes))


def test_options_have_the_squared_errors_of_dense_options(options):
    residual = random(5, *SHAPE)
    torch.testing.assert_close(options.squared_errors(residual), DenseOptions(options.all()).squared_errors(residual))


def test_options_have_the_products_of_dense_options(options):
    biases = random(6, *SHAPE)
    torch.testing.assert_close(options.products(biases), DenseOptions(options.all()).products(biases))


def test_squared_errors_are_those_of_the_proposals():
    steps, state, target = random(5, 6, *SHAPE), random(5, *SHAPE), random(5, *SHAPE)
    expected = (state[:, None] + steps - target[:, None]).square().flatten(2).mean(dim=2)
    torch.testing.assert_close(squared_error(DenseOptions(steps), state, target), expected)


# The loop


@pytest.mark.parametrize("num_biased_stages", [1, 2, 4])
def test_the_loop_equals_the_plain_one(refiner, target, num_biased_stages):
    draw = build(refiner, num_biased_stages=num_biased_stages, final_coeff=0.5)
    fast, plain = draw(target), plain_loop(draw, target)
    assert torch.equal(fast.codes, plain.codes) and len(fast.codes.unique()) > 2
    torch.testing.assert_close(fast.state, plain.state)
    torch.testing.assert_close(fast.errors, plain.errors)
    torch.testing.assert_close(draw.loss(fast), draw.loss(plain))


def test_the_gradients_of_the_loop_are_those_of_the_plain_one(refiner, target):
    draw = build(refiner, final_coeff=0.5)
    fast = gradients(draw, draw.loss(draw(target)))
    plain = gradients(draw, draw.loss(plain_loop(draw, target)))
    torch.testing.assert_close(fast, plain)
    assert all(gradient.any() for gradient in fast)


def test_options_in_memory_draw_the_same(refiner, target):
    draw, dense = build(refiner), build(DenseRefiner(refiner))
    fast, slow = draw(target), dense(target)
    assert torch.equal(fast.codes, slow.codes)
    torch.testing.assert_close(fast.state, slow.state)
    torch.testing.assert_close(gradients(draw, draw.loss(fast)), gradients(dense, dense.loss(slow)))


def test_each_stage_takes_the_best_step(refiner, target):
    drawing = build(refiner)(target)
    assert torch.equal(drawing.codes, drawing.errors.argmin(dim=2))


@pytest.mark.parametrize("grad_decay", [0.0, 0.3, 1.0])
def test_any_prefix_of_the_codes_decodes_to_the_state_after_so_many_stages(refiner, target, grad_decay):
    draw, state = build(refiner, grad_decay=grad_decay).float(), torch.zeros_like(target).float()
    codes = draw(target.float()).codes
    for stage in range(draw.num_stages):
        state, _, _ = draw.stage(state, target.float(), stage)
        assert torch.equal(draw.decode(codes[:, : stage + 1]), state), "to the last bit"


def test_an_example_draws_alone_as_it_does_in_a_batch(refiner, target):
    draw = build(refiner)
    together = draw(target)
    for example in range(len(target)):
        alone = draw(target[example : example + 1])
        assert torch.equal(alone.codes[0], together.codes[example])
        torch.testing.assert_close(alone.state[0], together.state[example])


@pytest.mark.parametrize(("aux_coeff", "final_coeff"), [(0.0, 0.0), (0.01, 0.0), (0.3, 0.7)])
def test_the_loss_is_the_formula(refiner, aux_coeff, final_coeff):
    codes, errors = torch.tensor([[1, 0], [0, 2]]), random(2, 2, 3).square()
    chosen = torch.stack([errors[0, 0, 1], errors[0, 1, 0], errors[1, 0, 0], errors[1, 1, 2]])
    expected = chosen.mean() + aux_coeff * errors.mean() + final_coeff * chosen[[1, 3]].mean()
    draw = build(refiner, aux_coeff=aux_coeff, final_coeff=final_coeff)
    torch.testing.assert_close(draw.loss(Drawing(codes, random(2, *SHAPE), errors)), expected)


# Gradients through the chain


def through_one_link(refiner: nn.Module, target: Tensor, grad_decay: float) -> Tensor:
    """Gradient of stage 1's chosen errors in the biases of stage 0."""
    draw = build(refiner, grad_decay=grad_decay)
    (gradient,) = torch.autograd.grad(draw(target).errors[:, 1].amin(dim=1).mean(), draw.biases)
    return gradient[0]


def test_the_whole_gradient_flows_between_stages_by_default(refiner, target):
    assert through_one_link(refiner, target, 0.0).any()


@pytest.mark.parametrize("grad_decay", [0.3, 1.0])
def test_grad_decay_cuts_its_share_of_the_gradient_between_stages(refiner, target, grad_decay):
    expected = (1 - grad_decay) * through_one_link(refiner, target, 0.0)
    torch.testing.assert_close(through_one_link(refiner, target, grad_decay), expected)


def test_grad_decay_changes_no_drawing(refiner, target):
    assert torch.equal(build(refiner, grad_decay=0.3)(target).state, build(refiner)(target).state)


def test_checkpointed_stages_have_the_same_gradients(refiner, target):
    draw, remembering = build(refiner), build(refiner, checkpoint_stages=True)
    torch.testing.assert_close(
        gradients(remembering, remembering.loss(remembering(target))), gradients(draw, draw.loss(draw(target)))
    )


def test_bfloat16_autocast_leaves_the_errors_their_digits(refiner):
    draw = build(refiner).float()
    state, codes = torch.randn(6, *SHAPE), torch.tensor([0, 1, 2, 3, 4, 5])
    near = state + draw.options(state, 1).chosen(codes) + 0.02 * torch.randn(6, *SHAPE)
    _, expected_codes, expected = draw.stage(state, near, 1)
    with torch.autocast("cpu", torch.bfloat16):
        _, found_codes, errors = draw.stage(state, near, 1)
    assert errors.dtype == torch.float32 and torch.equal(found_codes, expected_codes)
    torch.testing.assert_close(errors.amin(dim=1), expected.amin(dim=1), rtol=0.1, atol=0)


# The start


@pytest.fixture
def many() -> Tensor:
    return random(64, *SHAPE)


@pytest.fixture
def stepless(refiner) -> VQDraw:
    """A fresh loop, whose refiner proposes no step of its own."""
    nn.init.zeros_(refiner.head)
    return build(refiner, num_biased_stages=4)


def test_starting_from_data_uses_every_option_at_each_stage(stepless, many):
    stepless.start_from_data(many)
    codes = stepless(many).codes
    assert [len(stage.unique()) for stage in codes.T] == [8] * 4


def test_starting_from_data_lowers_the_error_at_each_stage(stepless, many):
    stepless.start_from_data(many)
    chosen = stepless(many).errors.amin(dim=2).mean(dim=0)
    assert torch.equal(chosen, chosen.sort(descending=True).values)
    assert chosen[0] < many.square().mean()


def test_starting_from_data_puts_the_first_stage_on_its_clusters(stepless):
    centres = random(8, *SHAPE)
    stepless.start_from_data(centres.repeat(8, 1, 1, 1))
    assert stepless(centres).errors.amin(dim=2)[:, -1].max() < 1e-6


def test_starting_from_data_carries_no_gradient(stepless, many):
    stepless.start_from_data(many.requires_grad_())
    assert stepless.biases.is_leaf and stepless.biases.grad is None
