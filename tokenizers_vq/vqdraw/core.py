"""VQ-DRAW: a sequential discrete autoencoder without a codebook (Nichol 2020).

A state starts at zero. At each stage a refiner looks at it and proposes K steps; the step that brings it nearest to the target is
taken, and its index is the stage's code. Codes go from coarse to fine, so any prefix of them decodes.

This module knows no modality: what the steps are is the refiner's business, how near they come is the error's.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..distributed import all_reduce_sum, broadcast_from_rank0
from ..quantization.kmeans import kmeans, sample_proportional_to_error
from ..quantization.nearest_neighbors import nearest_codes
from .options import BiasedOptions, DenseOptions, Options, SharedOptions

REVIVE_EVERY = 100  # training batches; the only ones at which the CPU waits for a GPU
# How far from the best step there is towards its target a revived option goes: an option that makes one image whole makes no other.
# MNIST, the published refiner, squared error after 200 steps: 0.421 all the way, 0.381 half, 0.366 a quarter, 0.405 without revival.
REVIVED_SHARE = 0.25
DEAD_SHARE = 0.03  # an option with less than 3 % of an even share of its stage is out of use


class Error(Protocol):
    """How far proposals are from a target: what a stage minimises."""

    def __call__(self, options: Options, state: Tensor, target: Tensor) -> Tensor:
        """Error of every proposal `state + step`, `b k`."""
        ...

    def wanted(self, target: Tensor) -> Tensor:
        """The state that says the target itself, or nearly: `b ...` -> `b ...`."""
        ...


class StageOutput(NamedTuple):
    """What one stage did.

    Attributes:
        state: the next one, `b ...`. codes: of the step taken, `b`.
        errors: of every option, `b k`; without gradient where `chosen` and `aux` come from a few of them.
        chosen: error of the best option, `b`. aux: mean error over options, or an unbiased estimate of it, a scalar.
    """

    state: Tensor
    codes: Tensor
    errors: Tensor
    chosen: Tensor
    aux: Tensor


@dataclass
class VQDrawOutput:
    """What all stages did: the last `state`, `codes` and `chosen` `b n`, `errors` `b n k`, `aux` `n`; see `StageOutput`."""

    state: Tensor
    codes: Tensor
    errors: Tensor
    chosen: Tensor
    aux: Tensor


class VQDraw(nn.Module):
    """The stage loop.

    Args:
        refiner: `(state, stage) -> Options`.
        error: `(options, state, target) -> b k`.
        state_shape: shape of one state.
        num_stages: stages to go through, of those that the refiner knows.
        aux_coeff: weight of the mean error over all options, which keeps unchosen ones near the data.
        num_aux_options: estimate that mean from so many options drawn at random for each example, without bias, and search without
            gradient; 0: all options. A third to a half of a training step with a dense head.
        final_coeff: weight of the last stage's error on top of the mean over stages.
        grad_decay: how much of the gradient from later stages into the state is cut, 0 to 1.
        epsilon: how often training takes a step at random instead of the best one, 0 to 1.
        checkpoint_stages: compute each stage again on the way back, so that memory holds one stage.
        num_biased_stages: the first so many stages add a learned bias to each option; the original has 1. With a bias at every stage the
            model can start as a residual quantizer (`init_from_data`) and learn to do better.
        num_joint: examples that lie side by side in the batch and that the refiner looks at together, as the spans of one text.
        revive: put biased options that fall out of use back to work, every `REVIVE_EVERY` training batches.
    """

    counts: Tensor
    num_batches: Tensor

    def __init__(
        self,
        refiner: nn.Module,
        error: Error,
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
        num_joint: int = 1,
        replace_dead_options: bool = True,
    ):
        super().__init__()
        self.refiner, self.error = refiner, error
        self.num_stages, self.codebook_size = num_stages, codebook_size
        self.aux_coeff, self.num_aux_options, self.final_coeff = aux_coeff, num_aux_options, final_coeff
        self.grad_decay, self.epsilon = grad_decay, epsilon
        self.checkpoint_stages, self.num_joint, self.revive_options = checkpoint_stages, num_joint, replace_dead_options
        self.biases = nn.Parameter(torch.zeros(num_biased_stages, codebook_size, *state_shape))
        self.register_buffer("counts", torch.zeros(num_stages, codebook_size), persistent=False)
        self.register_buffer("num_batches", torch.tensor(0), persistent=False)
        self.batches_counted: int | None = None  # `num_batches` without a look at the device

    def reset_usage(self) -> None:
        """No option was chosen yet, in no batch."""
        self.counts.zero_()
        self.num_batches.zero_()
        self.batches_counted = None

    @property
    def learning(self) -> bool:
        """Whether this is a training step; to encode changes nothing, whatever the mode."""
        return self.training and torch.is_grad_enabled()

    def forward(self, target: Tensor) -> VQDrawOutput:
        """Draw `b ...`, each stage taking the best step."""
        if self.learning and self.revive_options:
            self._maybe_replace_dead_options(target)
        state, outputs = self.first_state(len(target)), []
        for stage in range(self.num_stages):
            arguments = self.stage, state, target, stage
            remember = self.checkpoint_stages and torch.is_grad_enabled()
            output = checkpoint(*arguments, use_reentrant=False) if remember else self.stage(*arguments[1:])
            outputs.append(output)
            state = output.state
        codes, errors, chosen = (torch.stack(each, dim=1) for each in list(zip(*outputs, strict=True))[1:4])
        if self.learning:
            best = errors.argmin(dim=2).T  # not those taken at random
            ones = torch.ones_like(best, dtype=self.counts.dtype)
            self.counts += all_reduce_sum(torch.zeros_like(self.counts).scatter_add_(1, best, ones))
        return VQDrawOutput(state, codes, errors, chosen, torch.stack([output.aux for output in outputs]))

    def stage(self, state: Tensor, target: Tensor, stage: int) -> StageOutput:
        """One stage from the state `b ...`."""
        if self.grad_decay:
            # Plus exactly zero: `decode` must find the same state, to the last bit.
            state = state.detach() + (1 - self.grad_decay) * (state - state.detach())
        options = self.options(state, stage)
        sparse = self.num_aux_options > 0 and self.learning
        # Errors are small differences of large sums; in bfloat16 nothing is left of them (0.0025 came out as -0.0002).
        with torch.autocast(target.device.type, enabled=False):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not sparse):
                errors = self.error(options, state, target)
            best = errors.argmin(dim=1)
            codes = self._epsilon_greedy(best)
            if sparse:
                after, chosen, aux = self._sparse(options, codes, best, state, target)
            else:
                after = state + options.chosen(codes[:, None]).squeeze(1)
                chosen, aux = errors.gather(1, best[:, None]).squeeze(1), errors.mean()
            return StageOutput(after, codes, errors, chosen, aux)

    def _sparse(
        self, options: Options, codes: Tensor, best: Tensor, state: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next state by the `codes`, the error of the `best` option, `b`, and the mean of a few others, drawn anew for each example."""
        drawn = torch.randint(self.codebook_size, (len(best), self.num_aux_options), device=best.device)
        taken = [] if codes is best else [codes[:, None]]
        steps = options.chosen(torch.cat([*taken, best[:, None], drawn], dim=1))
        errors = self.error(DenseOptions(steps[:, len(taken) :]), state, target)
        return state + steps[:, 0], errors[:, 0], errors[:, 1:].mean()

    def _epsilon_greedy(self, codes: Tensor) -> Tensor:
        """Codes `b`, in training each another with probability `epsilon`."""
        if not (self.learning and self.epsilon):
            return codes
        others = torch.randint_like(codes, self.codebook_size)
        return torch.where(torch.rand(len(codes), device=codes.device) < self.epsilon, others, codes)

    def first_state(self, batch_size: int) -> Tensor:
        """Zeros `b ...`."""
        return self.biases.new_zeros(batch_size, *self.biases.shape[2:])

    def options(self, state: Tensor, stage: int) -> Options:
        """What is open at a stage. At stage 0 all states are zero: one look of the refiner serves all."""
        if stage:
            options = self.refiner(state, stage)
            return BiasedOptions(options, self.biases[stage]) if stage < len(self.biases) else options
        first = self.refiner(self.first_state(self.num_joint), 0)
        if self.num_joint == 1:
            return SharedOptions(BiasedOptions(first, self.biases[0]), len(state))
        examples = torch.arange(len(state), device=state.device) % self.num_joint
        return BiasedOptions(first.select(examples), self.biases[0])

    def states(self, codes: Tensor) -> Iterator[Tensor]:
        """The state `b ...` after each of the codes `b n` (or their first few); only the steps that the codes name are made."""
        state = self.first_state(len(codes))
        for stage in range(codes.shape[1]):
            state = state + self.options(state, stage).chosen(codes[:, stage, None]).squeeze(1)
            yield state

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b n` (or their first few) -> the last state `b ...`."""
        return deque(self.states(codes), maxlen=1).pop()

    def loss(self, drawing: VQDrawOutput) -> Tensor:
        """Mean over stages of the chosen error + `aux_coeff` x the mean of all + `final_coeff` x the last chosen."""
        chosen = drawing.chosen
        return chosen.mean() + self.aux_coeff * drawing.aux.mean() + self.final_coeff * chosen[:, -1].mean()

    @torch.no_grad()
    def init_from_data(self, targets: Tensor) -> None:
        """Make the biases, stage by stage, the k-means centres of what is still missing of the targets `b ...`.

        Where refiners start with steps of zero, each option is in use from the first step, and the whole is a residual quantizer.
        """
        residual = self.error.wanted(targets)
        for bias in self.biases:
            centres = kmeans(residual.flatten(1), len(bias))
            bias.copy_(centres.view_as(bias))
            residual = residual - bias[nearest_codes(residual.flatten(1), centres)]

    @torch.compiler.disable()  # a number that grows would be compiled anew each time
    def _maybe_replace_dead_options(self, target: Tensor) -> None:
        """Every `REVIVE_EVERY` batches, `replace_dead_options` what those batches did not use."""
        if self.batches_counted is None:
            self.batches_counted = int(self.num_batches)
        self.batches_counted += 1
        self.num_batches += 1
        if self.batches_counted % REVIVE_EVERY:
            return
        dead = self.counts < DEAD_SHARE * self.counts.mean(dim=1, keepdim=True)
        self.counts.zero_()
        if dead[: len(self.biases)].any():
            self.replace_dead_options(target, dead)

    @torch.no_grad()
    def replace_dead_options(self, target: Tensor, dead: Tensor) -> None:
        """Move the bias of each dead option, `n k` booleans, so that its step brings one of the worst served targets `b ...` nearer."""
        state, wanted = self.first_state(len(target)), self.error.wanted(target)
        for stage, bias in enumerate(self.biases[: self.num_stages]):
            output = self.stage(state, target, stage)
            lost = dead[stage].nonzero().squeeze(1)
            examples = sample_proportional_to_error(output.errors.amin(dim=1), len(lost))
            if len(lost):
                step = self.options(state, stage).select(examples).chosen(lost[:, None]).squeeze(1)
                goal = output.state[examples].lerp(wanted[examples], REVIVED_SHARE)
                bias[lost] += goal - state[examples] - step
            state = output.state
        broadcast_from_rank0(self.biases.data)


def build_draw(
    config: Any, refiner: nn.Module, error: Error, *, state_shape: tuple[int, ...], num_joint: int = 1
) -> VQDraw:
    """The stage loop of a config that has its settings, under `VQDraw`'s names: that of images, or of text."""
    return VQDraw(
        refiner,
        error,
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
        num_joint=num_joint,
    )
