"""VQ-DRAW, a sequential discrete autoencoder without a codebook (Nichol 2020, arXiv:2003.01599).

The state starts at zero. At each stage a refiner proposes K options, `state + step_k`. The option
with the least error becomes the next state, and its index is the stage's code. Codes go from coarse
to fine, so any prefix of them decodes.

`plain_vqdraw` is the definition. `VQDraw` computes the same without all options in memory, and adds
what training needs. This module knows no modality: the refiner makes the steps and a stage loss
compares states with targets.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..distributed import all_reduce_sum, broadcast_from_rank0
from ..quantization.kmeans import kmeans, sample_proportional_to_error
from ..quantization.nearest_neighbors import nearest_codes
from .options import BiasedOptions, DenseOptions, Options, SharedOptions

# In training batches. Only at these the CPU waits for a GPU, to see which options are dead.
REPLACEMENT_INTERVAL = 100
# A replaced option covers this fraction of the way from the best option to its target. All the way
# would make it fit one image alone. Measured on MNIST with the original refiner, squared error after
# 200 steps: 0.421 for 1, 0.381 for 0.5, 0.366 for 0.25, 0.405 without replacement.
REPLACEMENT_STEP = 0.25
DEAD_FRACTION = 0.03  # an option is dead if it is chosen less than 3 % as often as the mean of its stage


class StageLoss(Protocol):
    """Error between states and targets, which every stage minimizes."""

    def __call__(self, options: Options, state: Tensor, target: Tensor) -> Tensor:
        """Return the error of each option `state + step_k`, `b k`."""
        ...

    def target_state(self, target: Tensor) -> Tensor:
        """Return the state `b ...` that reconstructs a target `b ...`, at least nearly."""
        ...


class StageOutput(NamedTuple):
    """Output of one stage.

    Attributes:
        state: Next state, `b ...`.
        codes: Index of the option taken, `b`.
        errors: Error of every option, `b k`. They carry no gradient if the mean is estimated.
        best_error: Error of the best option, `b`.
        mean_error: Mean error over options and batch, or an unbiased estimate of it, a scalar.
    """

    state: Tensor
    codes: Tensor
    errors: Tensor
    best_error: Tensor
    mean_error: Tensor


@dataclass
class VQDrawOutput:
    """Output of all n stages.

    Attributes:
        state: Last state, `b ...`.
        codes: Indices of the options taken, `b n`.
        errors: Error of every option, `b n k`.
        best_error: Error of the best option of each stage, `b n`.
        mean_error: Mean error over options and batch for each stage, `n`.
    """

    state: Tensor
    codes: Tensor
    errors: Tensor
    best_error: Tensor
    mean_error: Tensor


def plain_vqdraw(refiner: nn.Module, biases: Tensor, target: Tensor, num_stages: int) -> VQDrawOutput:
    """Encode targets by the definition of VQ-DRAW, with the squared error.

    It holds every option in memory. `VQDraw` with an `MSELoss` must give the same output and the
    same gradients; the tests compare the two.

    Args:
        refiner: Network `(state, stage) -> Options`.
        biases: Biases of the options of the first m stages, `m k ...`.
        target: Targets, `b ...`.
        num_stages: Number of stages, n.
    """
    state, codes, errors = torch.zeros_like(target), [], []
    for stage in range(num_stages):
        steps = refiner(state, stage).all_steps()
        if stage < len(biases):
            steps = steps + biases[stage]
        options = state[:, None] + steps
        errors.append((options - target[:, None]).square().flatten(2).mean(dim=2))
        codes.append(errors[-1].argmin(dim=1))
        state = options[torch.arange(len(target)), codes[-1]]
    all_errors = torch.stack(errors, dim=1)
    return VQDrawOutput(
        state, torch.stack(codes, dim=1), all_errors, all_errors.amin(dim=2), all_errors.mean(dim=(0, 2))
    )


class VQDraw(nn.Module):
    """The stage loop of VQ-DRAW.

    Args:
        refiner: Network `(state, stage) -> Options`.
        stage_loss: Error of options, `(options, state, target) -> b k`.
        state_shape: Shape of the state of one example.
        num_stages: Number of stages to run; the refiner may know more.
        codebook_size: Number of options at each stage, k.
        aux_coeff: Weight of the mean error over all options. It keeps unchosen options near the data.
        num_aux_options: In training, estimate that mean from this number of random options for each
            example, and search without gradient (0 = use all options). The estimate is unbiased.
            Measured: a training step with a dense head takes a third to a half of the time.
        final_coeff: Weight of the last stage's error, added to the mean over stages.
        grad_decay: Fraction of the gradient from later stages that is removed from the state, 0 to 1.
        epsilon: Probability of taking a random option instead of the best one in training.
        checkpoint_stages: Recompute each stage in the backward pass, so that memory holds one stage.
        num_biased_stages: Number of first stages whose options have learned biases; 1 in the paper.
            With a bias at every stage, `init_from_data` makes the model a residual quantizer.
        group_size: Number of consecutive examples that the refiner sees together, such as the spans
            of one text.
        replace_dead_options: Move the biases of options that are hardly chosen, every
            `REPLACEMENT_INTERVAL` training batches.
    """

    option_counts: Tensor
    num_batches: Tensor

    def __init__(
        self,
        refiner: nn.Module,
        stage_loss: StageLoss,
        *,
        state_shape: tuple[int, ...],
        num_stages: int,
        codebook_size: int,
        aux_coeff: float = 0.01,
        num_aux_options: int = 0,
        final_coeff: float = 0.0,
        grad_decay: float = 0.0,
        epsilon: float = 0.0,
        checkpoint_stages: bool = False,
        num_biased_stages: int = 1,
        group_size: int = 1,
        replace_dead_options: bool = True,
    ):
        super().__init__()
        self.refiner, self.stage_loss = refiner, stage_loss
        self.num_stages, self.codebook_size = num_stages, codebook_size
        self.aux_coeff, self.num_aux_options, self.final_coeff = aux_coeff, num_aux_options, final_coeff
        self.grad_decay, self.epsilon = grad_decay, epsilon
        self.checkpoint_stages, self.group_size = checkpoint_stages, group_size
        self.replaces_dead_options = replace_dead_options
        self.biases = nn.Parameter(torch.zeros(num_biased_stages, codebook_size, *state_shape))
        self.register_buffer("option_counts", torch.zeros(num_stages, codebook_size), persistent=False)
        self.register_buffer("num_batches", torch.tensor(0), persistent=False)
        # A copy of `num_batches` on the CPU. None after loading, when only the buffer is right.
        self._num_batches_cpu: int | None = None

    @classmethod
    def from_config(
        cls,
        config: Any,
        refiner: nn.Module,
        stage_loss: StageLoss,
        *,
        state_shape: tuple[int, ...],
        group_size: int = 1,
    ) -> Self:
        """Build the loop from the config of an image or text tokenizer.

        Args:
            config: Config whose fields have the names of this class's arguments. 0 means all stages
                for `active_stages` and `num_biased_stages`.
            refiner: Network `(state, stage) -> Options`.
            stage_loss: Error of options.
            state_shape: Shape of the state of one example.
            group_size: Number of consecutive examples that the refiner sees together.
        """
        return cls(
            refiner,
            stage_loss,
            state_shape=state_shape,
            num_stages=config.active_stages or config.num_stages,
            codebook_size=config.codebook_size,
            aux_coeff=config.aux_coeff,
            num_aux_options=config.num_aux_options,
            final_coeff=config.final_coeff,
            grad_decay=config.grad_decay,
            epsilon=config.epsilon,
            checkpoint_stages=config.checkpoint_stages,
            num_biased_stages=config.num_biased_stages or config.num_stages,
            replace_dead_options=config.replace_dead_options,
            group_size=group_size,
        )

    def reset_usage(self) -> None:
        """Reset the counts of chosen options and of training batches to zero."""
        self.option_counts.zero_()
        self.num_batches.zero_()
        self._num_batches_cpu = None

    @property
    def is_training_step(self) -> bool:
        """True in training mode with gradients. Encoding changes nothing, whatever the mode."""
        return self.training and torch.is_grad_enabled()

    def forward(self, target: Tensor) -> VQDrawOutput:
        """Encode targets `b ...`, taking the best option at every stage."""
        if self.is_training_step and self.replaces_dead_options:
            self._maybe_replace_dead_options(target)
        state, outputs = self.initial_state(len(target)), []
        for stage in range(self.num_stages):
            if self.checkpoint_stages and torch.is_grad_enabled():
                output = checkpoint(self.run_stage, state, target, stage, use_reentrant=False)
            else:
                output = self.run_stage(state, target, stage)
            outputs.append(output)
            state = output.state
        codes = torch.stack([output.codes for output in outputs], dim=1)
        errors = torch.stack([output.errors for output in outputs], dim=1)
        best_error = torch.stack([output.best_error for output in outputs], dim=1)
        if self.is_training_step:
            # The best options, not those that epsilon chose: a dead option must not look alive.
            best = errors.argmin(dim=2).T
            ones = torch.ones_like(best, dtype=self.option_counts.dtype)
            batch_counts = torch.zeros_like(self.option_counts).scatter_add_(1, best, ones)
            self.option_counts += all_reduce_sum(batch_counts)
        return VQDrawOutput(state, codes, errors, best_error, torch.stack([output.mean_error for output in outputs]))

    def run_stage(self, state: Tensor, target: Tensor, stage: int) -> StageOutput:
        """Run one stage on states `b ...` and targets `b ...`."""
        if self.grad_decay:
            # Adds exactly zero to the value, so that `decode` finds the same state bit for bit.
            state = state.detach() + (1 - self.grad_decay) * (state - state.detach())
        options = self.propose(state, stage)
        estimate_mean = self.num_aux_options > 0 and self.is_training_step
        # Errors are small differences of large sums. bfloat16 loses them: 0.0025 came out as -0.0002.
        with torch.autocast(target.device.type, enabled=False):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not estimate_mean):
                errors = self.stage_loss(options, state, target)
            best = errors.argmin(dim=1)
            codes = self._epsilon_greedy(best)
            if estimate_mean:
                next_state, best_error, mean_error = self._estimate_errors(options, codes, best, state, target)
            else:
                next_state = state + options.gather_steps(codes[:, None]).squeeze(1)
                best_error, mean_error = errors.gather(1, best[:, None]).squeeze(1), errors.mean()
            return StageOutput(next_state, codes, errors, best_error, mean_error)

    def _estimate_errors(
        self, options: Options, codes: Tensor, best: Tensor, state: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute errors with gradient for the best option and a few random ones only.

        Args:
            options: Options of the stage.
            codes: Options to take, `b`.
            best: Options with the least error, `b`; the same tensor as `codes` without epsilon.
            state: States, `b ...`.
            target: Targets, `b ...`.

        Returns:
            The next states `b ...`, the best option's error `b`, and an estimate of the mean error.
        """
        drawn = torch.randint(self.codebook_size, (len(best), self.num_aux_options), device=best.device)
        # One gather makes all steps that are needed, including the one taken.
        taken = [] if codes is best else [codes[:, None]]
        steps = options.gather_steps(torch.cat([*taken, best[:, None], drawn], dim=1))
        errors = self.stage_loss(DenseOptions(steps[:, len(taken) :]), state, target)
        return state + steps[:, 0], errors[:, 0], errors[:, 1:].mean()

    def _epsilon_greedy(self, best: Tensor) -> Tensor:
        """Replace each code of `b` by a random one with probability `epsilon`, in training only."""
        if not (self.is_training_step and self.epsilon):
            return best
        others = torch.randint_like(best, self.codebook_size)
        return torch.where(torch.rand(len(best), device=best.device) < self.epsilon, others, best)

    def initial_state(self, batch_size: int) -> Tensor:
        """Return the state before the first stage: zeros, `b ...`."""
        return self.biases.new_zeros(batch_size, *self.biases.shape[2:])

    def propose(self, state: Tensor, stage: int) -> Options:
        """Return the options of a stage for the states `b ...`, with their biases."""
        if stage:
            options = self.refiner(state, stage)
            return BiasedOptions(options, self.biases[stage]) if stage < len(self.biases) else options
        # At stage 0 all states are zero, so the refiner runs once for the whole batch.
        first = self.refiner(self.initial_state(self.group_size), 0)
        if self.group_size == 1:
            return SharedOptions(BiasedOptions(first, self.biases[0]), len(state))
        examples = torch.arange(len(state), device=state.device) % self.group_size
        return BiasedOptions(first.select_examples(examples), self.biases[0])

    def decode_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        """Yield the state `b ...` after each of the codes `b n`. Only the steps chosen are computed."""
        state = self.initial_state(len(codes))
        for stage in range(codes.shape[1]):
            state = state + self.propose(state, stage).gather_steps(codes[:, stage, None]).squeeze(1)
            yield state

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `b n`, or any prefix of them, to the last state `b ...`."""
        return deque(self.decode_progressively(codes), maxlen=1).pop()

    def loss(self, output: VQDrawOutput) -> Tensor:
        """Return the training loss, a scalar.

        It is the mean over stages of the best error, plus `aux_coeff` times the mean error of all
        options, plus `final_coeff` times the best error of the last stage.
        """
        best_error = output.best_error
        final_error = best_error[:, -1].mean()
        return best_error.mean() + self.aux_coeff * output.mean_error.mean() + self.final_coeff * final_error

    @torch.no_grad()
    def init_from_data(self, targets: Tensor) -> None:
        """Set the biases of each stage to the k-means centers of the residuals of targets `b ...`.

        New refiners propose steps of zero. So the model starts as a residual quantizer, in which
        every option is in use.
        """
        residual = self.stage_loss.target_state(targets)
        for bias in self.biases:
            centers = kmeans(residual.flatten(1), len(bias))
            bias.copy_(centers.view_as(bias))
            residual = residual - bias[nearest_codes(residual.flatten(1), centers)]

    @torch.compiler.disable()  # a counter in Python would recompile the graph at every batch
    def _maybe_replace_dead_options(self, target: Tensor) -> None:
        """Count a training batch; every `REPLACEMENT_INTERVAL` batches, replace dead options."""
        if self._num_batches_cpu is None:
            self._num_batches_cpu = int(self.num_batches)
        self._num_batches_cpu += 1
        self.num_batches += 1
        if self._num_batches_cpu % REPLACEMENT_INTERVAL:
            return
        is_dead = self.option_counts < DEAD_FRACTION * self.option_counts.mean(dim=1, keepdim=True)
        self.option_counts.zero_()
        if is_dead[: len(self.biases)].any():
            self.replace_dead_options(target, is_dead)

    @torch.no_grad()
    def replace_dead_options(self, target: Tensor, is_dead: Tensor) -> None:
        """Move the bias of each dead option towards a target that is poorly reconstructed.

        Targets are sampled in proportion to their error, as in k-means++.

        Args:
            target: Targets, `b ...`.
            is_dead: Dead options of each stage, `n k` booleans.
        """
        state, target_state = self.initial_state(len(target)), self.stage_loss.target_state(target)
        for stage, bias in enumerate(self.biases[: self.num_stages]):
            output = self.run_stage(state, target, stage)
            dead = is_dead[stage].nonzero().squeeze(1)
            examples = sample_proportional_to_error(output.errors.amin(dim=1), len(dead))
            if len(dead):
                step = self.propose(state, stage).select_examples(examples).gather_steps(dead[:, None]).squeeze(1)
                goal = output.state[examples].lerp(target_state[examples], REPLACEMENT_STEP)
                bias[dead] += goal - state[examples] - step
            state = output.state
        broadcast_from_rank0(self.biases.data)
