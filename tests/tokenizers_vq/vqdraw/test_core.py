"""The stage loop, and every fast form compared with the plain one."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tokenizers_vq.vqdraw.core import REPLACEMENT_INTERVAL, REPLACEMENT_STEP, VQDraw, VQDrawOutput, plain_vqdraw
from tokenizers_vq.vqdraw.losses import MSELoss
from tokenizers_vq.vqdraw.options import (
    BiasedOptions,
    ConvOptions,
    DenseOptions,
    LinearOptions,
    Options,
    SharedOptions,
)
from tokenizers_vq.vqdraw.refiners import build_segments

SHAPE = (3, 8, 8)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def linear_options() -> LinearOptions:
    return LinearOptions(random(5, 4, 4, 7), random(6, 12, 7), patch=2)


def conv_options() -> ConvOptions:
    return ConvOptions(random(5, 7, 8, 8), random(6, 3, 7, 5, 5), random(6, 3))


OPTIONS = {
    "dense": lambda: DenseOptions(random(5, 6, *SHAPE)),
    "linear": linear_options,
    "convolved": conv_options,
    "biased convolved": lambda: BiasedOptions(conv_options(), random(6, *SHAPE)),
    "shared": lambda: SharedOptions(DenseOptions(random(1, 6, *SHAPE)), 5),
    "shared convolved": lambda: SharedOptions(
        BiasedOptions(conv_options().select_examples(torch.tensor([2])), random(6, *SHAPE)), 5
    ),
    "biased linear": lambda: BiasedOptions(linear_options(), random(6, *SHAPE)),
    "biased shared": lambda: BiasedOptions(SharedOptions(DenseOptions(random(1, 6, *SHAPE)), 5), random(6, *SHAPE)),
    "biased twice": lambda: BiasedOptions(BiasedOptions(linear_options(), random(6, *SHAPE)), random(6, *SHAPE)),
}


@pytest.fixture(params=OPTIONS)
def options(request) -> Options:
    """Six steps for five examples, in float64."""
    torch.manual_seed(0)
    return OPTIONS[request.param]()


class DenseRefiner(nn.Module):
    """A refiner whose options are dense."""

    def __init__(self, refiner: nn.Module):
        super().__init__()
        self.refiner = refiner

    def forward(self, state: Tensor, stage: int) -> DenseOptions:
        return DenseOptions(self.refiner(state, stage).all_steps())


def run_plain(vqdraw: VQDraw, target: Tensor) -> VQDrawOutput:
    """The definition, with the parts of a loop."""
    return plain_vqdraw(vqdraw.refiner, vqdraw.biases, target, vqdraw.num_stages)


@pytest.fixture
def refiner(tiny_vqdraw) -> nn.Module:
    return tiny_vqdraw.vqdraw.refiner.double()


@pytest.fixture
def target(images) -> Tensor:
    return (images.double() - 0.5) / 0.25


def build(refiner: nn.Module, *, num_biased_stages: int = 2, **settings) -> VQDraw:
    """Four stages of eight options, the first two biased, in float64."""
    vqdraw = VQDraw(
        refiner,
        MSELoss(),
        state_shape=SHAPE,
        num_stages=4,
        codebook_size=8,
        num_biased_stages=num_biased_stages,
        **settings,
    )
    torch.manual_seed(3)
    nn.init.normal_(vqdraw.biases, std=0.3)
    return vqdraw.double()


def gradients(vqdraw: VQDraw, loss: Tensor) -> list[Tensor]:
    parameters = list(vqdraw.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [
        torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found, strict=True)
    ]


# Options


def test_options_gather_the_steps_of_dense_options(options):
    codes = torch.tensor([[5, 0], [0, 0], [3, 1], [3, 2], [1, 4]])
    expected = torch.stack([steps[chosen] for steps, chosen in zip(options.all_steps(), codes, strict=True)])
    torch.testing.assert_close(options.gather_steps(codes), expected)


def test_selected_options_equal_those_of_the_whole_batch(options):
    examples = torch.tensor([4, 0, 0])
    torch.testing.assert_close(options.select_examples(examples).all_steps(), options.all_steps()[examples])


def test_options_have_the_squared_errors_of_dense_options(options):
    residual = random(5, *SHAPE)
    torch.testing.assert_close(
        options.squared_errors(residual), DenseOptions(options.all_steps()).squared_errors(residual)
    )


def test_options_have_the_bias_products_of_dense_options(options):
    biases = random(6, *SHAPE)
    torch.testing.assert_close(options.bias_products(biases), DenseOptions(options.all_steps()).bias_products(biases))


def test_mse_loss_equals_the_squared_error_of_the_options():
    steps, state, target = random(5, 6, *SHAPE), random(5, *SHAPE), random(5, *SHAPE)
    expected = (state[:, None] + steps - target[:, None]).square().flatten(2).mean(dim=2)
    torch.testing.assert_close(MSELoss()(DenseOptions(steps), state, target), expected)


# The loop


@pytest.mark.parametrize("num_biased_stages", [1, 2, 4])
def test_vqdraw_equals_the_plain_loop(refiner, target, num_biased_stages):
    vqdraw = build(refiner, num_biased_stages=num_biased_stages, final_coeff=0.5)
    fast, plain = vqdraw(target), run_plain(vqdraw, target)
    assert torch.equal(fast.codes, plain.codes) and len(fast.codes.unique()) > 2
    torch.testing.assert_close(fast.state, plain.state)
    torch.testing.assert_close(fast.errors, plain.errors)
    torch.testing.assert_close(vqdraw.loss(fast), vqdraw.loss(plain))


def test_gradients_equal_those_of_the_plain_loop(refiner, target):
    vqdraw = build(refiner, final_coeff=0.5)
    fast = gradients(vqdraw, vqdraw.loss(vqdraw(target)))
    plain = gradients(vqdraw, vqdraw.loss(run_plain(vqdraw, target)))
    torch.testing.assert_close(fast, plain)
    assert all(gradient.any() for gradient in fast)


def test_dense_options_give_the_same_codes_and_gradients(refiner, target):
    vqdraw, dense = build(refiner), build(DenseRefiner(refiner))
    fast, slow = vqdraw(target), dense(target)
    assert torch.equal(fast.codes, slow.codes)
    torch.testing.assert_close(fast.state, slow.state)
    torch.testing.assert_close(gradients(vqdraw, vqdraw.loss(fast)), gradients(dense, dense.loss(slow)))


def test_each_stage_takes_the_best_step(refiner, target):
    output = build(refiner)(target)
    assert torch.equal(output.codes, output.errors.argmin(dim=2))


@pytest.mark.parametrize("grad_decay", [0.0, 0.3, 1.0])
def test_prefix_of_codes_decodes_to_the_state_after_its_stages(refiner, target, grad_decay):
    vqdraw, state = build(refiner, grad_decay=grad_decay).float(), torch.zeros_like(target).float()
    codes = vqdraw(target.float()).codes
    for stage in range(vqdraw.num_stages):
        state = vqdraw.run_stage(state, target.float(), stage).state
        assert torch.equal(vqdraw.decode(codes[:, : stage + 1]), state), "to the last bit"


def test_example_gets_the_same_codes_alone_and_in_a_batch(refiner, target):
    vqdraw = build(refiner)
    together = vqdraw(target)
    for example in range(len(target)):
        alone = vqdraw(target[example : example + 1])
        assert torch.equal(alone.codes[0], together.codes[example])
        torch.testing.assert_close(alone.state[0], together.state[example])


@pytest.mark.parametrize(("aux_coeff", "final_coeff"), [(0.0, 0.0), (0.01, 0.0), (0.3, 0.7)])
def test_loss_equals_its_formula(refiner, target, aux_coeff, final_coeff):
    vqdraw = build(refiner, aux_coeff=aux_coeff, final_coeff=final_coeff)
    output = vqdraw(target)
    chosen = output.errors.gather(2, output.codes[..., None])
    expected = chosen.mean() + aux_coeff * output.errors.mean() + final_coeff * chosen[:, -1].mean()
    torch.testing.assert_close(vqdraw.loss(output), expected)


# Gradients through the chain


def through_one_link(refiner: nn.Module, target: Tensor, grad_decay: float) -> Tensor:
    """Gradient of stage 1's chosen errors in the biases of stage 0."""
    vqdraw = build(refiner, grad_decay=grad_decay)
    (gradient,) = torch.autograd.grad(vqdraw(target).errors[:, 1].amin(dim=1).mean(), vqdraw.biases)
    return gradient[0]


def test_gradient_flows_between_stages_by_default(refiner, target):
    assert through_one_link(refiner, target, 0.0).any()


@pytest.mark.parametrize("grad_decay", [0.3, 1.0])
def test_grad_decay_removes_its_fraction_of_the_gradient(refiner, target, grad_decay):
    expected = (1 - grad_decay) * through_one_link(refiner, target, 0.0)
    torch.testing.assert_close(through_one_link(refiner, target, grad_decay), expected)


def test_grad_decay_does_not_change_the_output(refiner, target):
    assert torch.equal(build(refiner, grad_decay=0.3)(target).state, build(refiner)(target).state)


def test_checkpointed_stages_have_the_same_gradients(refiner, target):
    vqdraw, remembering = build(refiner), build(refiner, checkpoint_stages=True)
    torch.testing.assert_close(
        gradients(remembering, remembering.loss(remembering(target))), gradients(vqdraw, vqdraw.loss(vqdraw(target)))
    )


def test_errors_stay_in_float32_under_bfloat16_autocast(refiner):
    vqdraw = build(refiner).float()
    state, codes = torch.randn(6, *SHAPE), torch.tensor([0, 1, 2, 3, 4, 5])
    near = state + vqdraw.propose(state, 1).gather_steps(codes[:, None]).squeeze(1) + 0.02 * torch.randn(6, *SHAPE)
    expected = vqdraw.run_stage(state, near, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = vqdraw.run_stage(state, near, 1)
    assert found.errors.dtype == torch.float32 and torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.best_error, expected.best_error, rtol=0.1, atol=0)


# Initialization


@pytest.fixture
def many() -> Tensor:
    return random(64, *SHAPE)


@pytest.fixture
def stepless(refiner) -> VQDraw:
    """A new loop whose refiner proposes zero steps."""
    nn.init.zeros_(refiner.head)
    return build(refiner, num_biased_stages=4)


def test_init_from_data_uses_every_option_at_each_stage(stepless, many):
    stepless.init_from_data(many)
    codes = stepless(many).codes
    assert [len(stage.unique()) for stage in codes.T] == [8] * 4


def test_init_from_data_lowers_the_error_at_each_stage(stepless, many):
    stepless.init_from_data(many)
    chosen = stepless(many).errors.amin(dim=2).mean(dim=0)
    assert torch.equal(chosen, chosen.sort(descending=True).values)
    assert chosen[0] < many.square().mean()


def test_init_from_data_sets_the_first_stage_to_the_clusters(stepless):
    centres = random(8, *SHAPE)
    stepless.init_from_data(centres.repeat(8, 1, 1, 1))
    assert stepless(centres).errors.amin(dim=2)[:, -1].max() < 1e-6


def test_init_from_data_records_no_gradient(stepless, many):
    stepless.init_from_data(many.requires_grad_())
    assert stepless.biases.is_leaf and stepless.biases.grad is None


# Estimated mean error


def test_estimated_mean_gives_the_same_codes_and_errors(refiner, target):
    exact, sparse = build(refiner).train()(target), build(refiner, num_aux_options=3).train()(target)
    assert torch.equal(sparse.codes, exact.codes) and not sparse.errors.requires_grad
    torch.testing.assert_close(
        (sparse.state, sparse.errors, sparse.best_error), (exact.state, exact.errors, exact.best_error)
    )


def test_estimated_gradient_is_unbiased(refiner, target):
    settings = {"aux_coeff": 0.5, "final_coeff": 0.5}
    exact_draw, sparse_draw = (
        build(refiner, **settings, replace_dead_options=False, num_aux_options=num) for num in (0, 4)
    )
    exact = gradients(exact_draw, exact_draw.loss(exact_draw(target)))
    draws = [gradients(sparse_draw, sparse_draw.loss(sparse_draw(target))) for _ in range(300)]
    mean = [torch.stack(each).mean(dim=0) for each in zip(*draws, strict=True)]
    found, expected = (torch.cat([each.flatten() for each in every]) for every in (mean, exact))
    one = torch.cat([each.flatten() for each in draws[0]])
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert (one - expected).norm() > 3 * (found - expected).norm(), "each vqdraw is rough, their mean is not"


def test_mean_error_is_exact_without_a_gradient(refiner, target):
    vqdraw = build(refiner, num_aux_options=1).eval()
    output = vqdraw(target)
    torch.testing.assert_close(output.mean_error, output.errors.mean(dim=(0, 2)))


# Epsilon-greedy codes


def test_epsilon_takes_random_options_in_training_only(refiner, target):
    vqdraw = build(refiner, epsilon=0.5)
    many = target.repeat(50, 1, 1, 1)
    output = vqdraw.train()(many)
    other = (output.codes != output.errors.argmin(dim=2)).double().mean()
    assert 0.3 < other < 0.5 * 7 / 8 + 0.1
    torch.testing.assert_close(output.best_error, output.errors.amin(dim=2))
    assert torch.equal(vqdraw.eval()(many).codes, build(refiner).eval()(many).codes)


def test_epsilon_does_not_change_encoding(refiner, target):
    with torch.no_grad():
        assert torch.equal(build(refiner, epsilon=1.0).train()(target).codes, build(refiner)(target).codes)


# Dead options


@pytest.fixture
def dead(stepless, many) -> VQDraw:
    """An initialized loop in training, with two options far from every target."""
    stepless.init_from_data(many)
    with torch.no_grad():
        stepless.biases[0, 3] += 1e3
        stepless.biases[2, 5] += 1e3
    return stepless.train()


def test_dead_options_are_used_again_at_any_stage(dead, many):
    assert 3 not in dead(many).codes[:, 0] and 5 not in dead(many).codes[:, 2]
    for _ in range(REPLACEMENT_INTERVAL):
        dead(many)
    codes = dead.eval()(many).codes
    assert 3 in codes[:, 0] and 5 in codes[:, 2]


def test_options_taken_by_epsilon_only_count_as_dead(dead, many):
    dead.epsilon = 0.3
    for _ in range(REPLACEMENT_INTERVAL + 1):
        dead(many)
    codes = dead.eval()(many).codes
    assert 3 in codes[:, 0] and 5 in codes[:, 2]


def test_replacement_lowers_the_error_and_moves_dead_options_only(dead, many):
    before, biases = dead.eval()(many), dead.biases.detach().clone()
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, 3] = mask[2, 5] = True
    dead.replace_dead_options(many, mask)
    assert dead(many).best_error[:, -1].mean() < before.best_error[:, -1].mean()
    assert torch.equal(dead.biases[~mask], biases[~mask]) and (dead.biases[mask] != biases[mask]).any()


def test_replaced_option_goes_from_the_best_option_towards_a_target(dead, many):
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, 3] = True
    before = dead.eval()(many)
    dead.replace_dead_options(many, mask)
    # The residual of one target shrinks by this factor, so its square by the factor squared.
    ratios = dead(many).errors[:, 0, 3] / before.best_error[:, 0]
    assert (ratios - (1 - REPLACEMENT_STEP) ** 2).abs().min() < 1e-5


def test_replacement_can_be_disabled(dead, many):
    dead.replaces_dead_options = False
    biases = dead.biases.detach().clone()
    for _ in range(2 * REPLACEMENT_INTERVAL):
        dead(many)
    assert torch.equal(dead.biases, biases)


def test_options_in_use_are_not_replaced(stepless, many):
    stepless.init_from_data(many)
    biases = stepless.biases.detach().clone()
    for _ in range(2 * REPLACEMENT_INTERVAL):
        stepless.train()(many)
    assert torch.equal(stepless.biases, biases)


def test_vqdraw_compiles_once_for_all_batches(stepless, many):
    counter = CompileCounter()
    compiled = torch.compile(stepless, backend=counter)
    for _ in range(2):
        compiled(many)
    graphs = counter.frame_count
    for _ in range(REPLACEMENT_INTERVAL):
        compiled(many)
    assert counter.frame_count == graphs and stepless.num_batches == REPLACEMENT_INTERVAL + 2


def test_segments_after_the_active_stages_are_frozen():
    refiner = build_segments(lambda num_stages: nn.Linear(2, num_stages), 6, 2, active_stages=3)
    assert [weight.requires_grad for weight in refiner.parameters()] == [True] * 4 + [False] * 2
