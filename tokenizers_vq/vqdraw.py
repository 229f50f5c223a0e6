"""VQ-DRAW: a sequential discrete autoencoder without a codebook (Nichol 2020).

A state starts at zero. At each stage a refiner looks at it and proposes K steps; the step that brings it nearest to the target is
taken, and its index is the stage's code. Codes go from coarse to fine, so any prefix of them decodes.

This module knows no modality: what the steps are is the refiner's business, how near they come is the error's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .quantizer import kmeans, nearest_codes


class Options(Protocol):
    """The K steps that are open to each example at one stage."""

    def all(self) -> Tensor:
        """Every step, `b k ...`."""
        ...

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b` name, `b ...`."""
        ...

    def squared_errors(self, residual: Tensor) -> Tensor:
        """Mean squared distance of every step to what is missing, `b ...` -> `b k`."""
        ...

    def products(self, biases: Tensor) -> Tensor:
        """Mean over elements of each step times the bias of its index, `k ...` -> `b k`."""
        ...


Refiner = Callable[[Tensor, int], Options]
ErrorFunction = Callable[[Options, Tensor, Tensor], Tensor]


@dataclass
class DenseOptions:
    """Steps that stand in memory, `b k ...`: the plain form that every other must equal."""

    steps: Tensor

    def all(self) -> Tensor:
        """Every step, `b k ...`."""
        return self.steps

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b` name, `b ...`."""
        return self.steps[torch.arange(len(codes), device=codes.device), codes]

    def squared_errors(self, residual: Tensor) -> Tensor:
        """`b ...` -> `b k`."""
        return reduce((self.steps - residual[:, None]).square(), "b k ... -> b k", "mean")

    def products(self, biases: Tensor) -> Tensor:
        """`k ...` -> `b k`."""
        return reduce(self.steps * biases, "b k ... -> b k", "mean")


@dataclass
class SharedOptions:
    """Steps `k ...` that are the same for all examples: stage 0, where every state is zero."""

    steps: Tensor
    batch_size: int

    def all(self) -> Tensor:
        """Every step, `b k ...`."""
        return self.steps.expand(self.batch_size, *self.steps.shape)

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b` name, `b ...`."""
        return self.steps[codes]

    def squared_errors(self, residual: Tensor) -> Tensor:
        """`b ...` -> `b k`, as |r|^2 - 2 r.d + |d|^2."""
        r, d = residual.flatten(1), self.steps.flatten(1)
        return (r.square().sum(1, keepdim=True) - 2 * r @ d.T + d.square().sum(1)) / r.shape[1]

    def products(self, biases: Tensor) -> Tensor:
        """`k ...` -> `b k`."""
        return (self.steps * biases).flatten(1).mean(1).expand(self.batch_size, -1)


@dataclass
class BiasedOptions:
    """The steps of `options`, each plus a bias of its own, `k ...`, that is the same for all examples."""

    options: Options
    biases: Tensor

    def all(self) -> Tensor:
        """Every step, `b k ...`."""
        return self.options.all() + self.biases

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b` name, `b ...`."""
        return self.options.chosen(codes) + self.biases[codes]

    def squared_errors(self, residual: Tensor) -> Tensor:
        """`b ...` -> `b k`, as |r - d|^2 + 2 d.e - 2 r.e + |e|^2."""
        r, e = residual.flatten(1), self.biases.flatten(1)
        of_biases = (e.square().sum(1) - 2 * r @ e.T) / r.shape[1]
        return self.options.squared_errors(residual) + 2 * self.options.products(self.biases) + of_biases

    def products(self, biases: Tensor) -> Tensor:
        """`k ...` -> `b k`."""
        return self.options.products(biases) + (self.biases * biases).flatten(1).mean(1)


@dataclass
class LinearOptions:
    """Steps that are linear in features of the state, d_k = W_k f at every place; their errors need no step in memory.

    With the Gram matrices A = r f' and G = f f' over the places, r.d_k = <W_k, A> and |d_k|^2 = <W_k' W_k, G>.

    Attributes:
        features: `b f h w`, the last of them constant one.
        weight: `k o f`, where a place holds `o = c * patch * patch` pixels of `c` channels.
        patch: side of the square of pixels that a place stands for.
    """

    features: Tensor
    weight: Tensor
    patch: int

    def __post_init__(self) -> None:
        self.features = self.features.to(self.weight.dtype)  # where autocast made them bfloat16

    def all(self) -> Tensor:
        """Every step, `b k c h w`."""
        steps = einsum(self.weight, self.features, "k o f, b f h w -> b k o h w")
        return rearrange(steps, "b k (c p q) h w -> b k c (h p) (w q)", p=self.patch, q=self.patch)

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b` name, `b c h w`: one matrix product an example."""
        height = self.features.shape[2]
        steps = self.weight[codes] @ self.features.flatten(2)
        return rearrange(steps, "b (c p q) (h w) -> b c (h p) (w q)", h=height, p=self.patch, q=self.patch)

    def squared_errors(self, residual: Tensor) -> Tensor:
        """`b c h w` -> `b k`."""
        r = rearrange(residual, "b c (h p) (w q) -> b (c p q) (h w)", p=self.patch, q=self.patch)
        f = self.features.flatten(2)
        products = (r @ f.mT).flatten(1) @ self.weight.flatten(1).T
        norms = (f @ f.mT).flatten(1) @ (self.weight.mT @ self.weight).flatten(1).T
        return (r.square().sum((1, 2))[:, None] - 2 * products + norms) / residual.shape[1:].numel()

    def products(self, biases: Tensor) -> Tensor:
        """`k c h w` -> `b k`, as <W_k' e_k, f>: one matrix product for the batch."""
        e = rearrange(biases, "k c (h p) (w q) -> k (c p q) (h w)", p=self.patch, q=self.patch)
        return self.features.flatten(1) @ (self.weight.mT @ e).flatten(1).T / biases[0].numel()


def squared_error(options: Options, state: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every proposal `state + step` against the target, `b k`."""
    return options.squared_errors(target - state)


@dataclass
class Drawing:
    """What the stages did: `codes` `b n`, the last `state` `b ...`, `errors` of every option at every stage `b n k`."""

    codes: Tensor
    state: Tensor
    errors: Tensor


class VQDraw(nn.Module):
    """The stage loop.

    Args:
        refiner: `(state, stage) -> Options`.
        error: `(options, state, target) -> b k`, what a stage minimises.
        state_shape: shape of one state.
        aux_coeff: weight of the mean error over all options, which keeps unchosen ones near the data.
        final_coeff: weight of the last stage's error on top of the mean over stages.
        grad_decay: how much of the gradient from later stages into the state is cut, 0 to 1.
        checkpoint_stages: compute each stage again on the way back, so that memory holds one stage.
        num_biased_stages: the first so many stages add a learned bias to each option; the original has 1. With a bias at every stage the
            model can start as a residual quantizer (`start_from_data`) and learn to do better.
    """

    def __init__(
        self,
        refiner: nn.Module,
        error: ErrorFunction,
        *,
        state_shape: tuple[int, ...],
        num_stages: int,
        codebook_size: int,
        aux_coeff: float = 0.01,
        final_coeff: float = 0.0,
        grad_decay: float = 0.0,
        checkpoint_stages: bool = False,
        num_biased_stages: int = 1,
    ):
        super().__init__()
        self.refiner, self.error = refiner, error
        self.num_stages = num_stages
        self.aux_coeff, self.final_coeff, self.grad_decay = aux_coeff, final_coeff, grad_decay
        self.checkpoint_stages = checkpoint_stages
        self.biases = nn.Parameter(torch.zeros(num_biased_stages, codebook_size, *state_shape))

    def forward(self, target: Tensor) -> Drawing:
        """Draw `b ...`, each stage taking the best step."""
        state = torch.zeros_like(target)
        codes, errors = [], []
        for stage in range(self.num_stages):
            arguments = self.stage, state, target, stage
            remember = self.checkpoint_stages and torch.is_grad_enabled()
            state, code, error = checkpoint(*arguments, use_reentrant=False) if remember else self.stage(*arguments[1:])
            codes.append(code)
            errors.append(error)
        return Drawing(torch.stack(codes, dim=1), state, torch.stack(errors, dim=1))

    def stage(self, state: Tensor, target: Tensor, stage: int) -> tuple[Tensor, Tensor, Tensor]:
        """One stage: state `b ...` -> the next state, its codes `b`, the errors of all options `b k`."""
        if self.grad_decay:
            # Plus exactly zero: `decode` must find the same state, to the last bit.
            state = state.detach() + (1 - self.grad_decay) * (state - state.detach())
        options = self.options(state, stage)
        # Errors are small differences of large sums; in bfloat16 nothing is left of them (0.0025 came out as -0.0002).
        with torch.autocast(target.device.type, enabled=False):
            errors = self.error(options, state, target)
            codes = errors.argmin(dim=1)
            return state + options.chosen(codes), codes, errors

    def options(self, state: Tensor, stage: int) -> Options:
        """What is open at a stage. At stage 0 all states are zero: one look of the refiner serves all."""
        if stage == 0:
            return SharedOptions(
                self.refiner(torch.zeros_like(self.biases[0, :1]), 0).all()[0] + self.biases[0], len(state)
            )
        options = self.refiner(state, stage)
        return BiasedOptions(options, self.biases[stage]) if stage < len(self.biases) else options

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `b n` (or their first few) -> state `b ...`."""
        state = self.biases.new_zeros(len(codes), *self.biases.shape[2:])
        for stage in range(codes.shape[1]):
            state = state + self.options(state, stage).chosen(codes[:, stage])
        return state

    def loss(self, drawing: Drawing) -> Tensor:
        """Mean over stages of the chosen error + `aux_coeff` x the mean of all + `final_coeff` x the last chosen."""
        chosen = drawing.errors.gather(2, drawing.codes[..., None]).squeeze(2)
        return chosen.mean() + self.aux_coeff * drawing.errors.mean() + self.final_coeff * chosen[:, -1].mean()

    @torch.no_grad()
    def start_from_data(self, targets: Tensor) -> None:
        """Make the biases, stage by stage, the k-means centres of what is still missing of the targets `b ...`.

        Refiners start with steps of zero, so each option is in use from the first step, and the whole is a residual quantizer.
        """
        residual = targets
        for bias in self.biases:
            centres = kmeans(residual.flatten(1), len(bias))
            bias.copy_(centres.view_as(bias))
            residual = residual - bias[nearest_codes(residual.flatten(1), centres)]
