"""The K steps that are open to each example at one stage of VQ-DRAW, in forms that need not hold every step in memory.

All forms answer the same questions; `DenseOptions` is the plain one that every other must equal.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor

from ..modules.fft_conv import fft_conv2d, use_fft


class Options(Protocol):
    """The K steps that are open to each example at one stage."""

    def all(self) -> Tensor:
        """Every step, `b k ...`."""
        ...

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b m` name, `b m ...`."""
        ...

    def select(self, examples: Tensor) -> "Options":
        """The options of some of the examples, named by their numbers `n`, once or more often."""
        ...

    def squared_errors(self, residual: Tensor) -> Tensor:
        """Mean squared distance of every step to what is missing, `b ...` -> `b k`."""
        ...

    def products(self, biases: Tensor) -> Tensor:
        """Mean over elements of each step times the bias of its index, `k ...` -> `b k`."""
        ...


@dataclass
class DenseOptions:
    """Steps that stand in memory, `b k ...`: the plain form that every other must equal."""

    steps: Tensor

    def all(self) -> Tensor:
        """Every step, `b k ...`."""
        return self.steps

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b m` name, `b m ...`."""
        return self.steps[torch.arange(len(codes), device=codes.device)[:, None], codes]

    def select(self, examples: Tensor) -> "DenseOptions":
        """The options of the examples `n`."""
        return DenseOptions(self.steps[examples])

    def squared_errors(self, residual: Tensor) -> Tensor:
        """`b ...` -> `b k`."""
        return reduce((self.steps - residual[:, None]).square(), "b k ... -> b k", "mean")

    def products(self, biases: Tensor) -> Tensor:
        """`k ...` -> `b k`."""
        return reduce(self.steps * biases, "b k ... -> b k", "mean")


@dataclass
class SharedOptions:
    """The steps of one example, open to all: stage 0, where every state is zero.

    Those chosen are made for each example, as at any stage: a code has the same step, to the last bit, in a batch of every size.

    Attributes:
        options: of one example.
        batch_size: how many share them.
    """

    options: Options
    batch_size: int

    def steps(self) -> Tensor:
        """Every step, once: `k ...`."""
        return self.options.all()[0]

    def all(self) -> Tensor:
        """Every step, `b k ...`."""
        steps = self.steps()
        return steps.expand(self.batch_size, *steps.shape)

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b m` name, `b m ...`."""
        return self.options.select(codes.new_zeros(len(codes))).chosen(codes)

    def select(self, examples: Tensor) -> "SharedOptions":
        """The options of the examples `n`."""
        return SharedOptions(self.options, len(examples))

    def squared_errors(self, residual: Tensor) -> Tensor:
        """`b ...` -> `b k`, as |r|^2 - 2 r.d + |d|^2."""
        r, d = residual.flatten(1), self.steps().flatten(1)
        return (r.square().sum(1, keepdim=True) - 2 * r @ d.T + d.square().sum(1)) / r.shape[1]

    def products(self, biases: Tensor) -> Tensor:
        """`k ...` -> `b k`."""
        return self.options.products(biases).expand(self.batch_size, -1)


@dataclass
class BiasedOptions:
    """The steps of `options`, each plus a bias of its own, `k ...`, that is the same for all examples."""

    options: Options
    biases: Tensor

    def all(self) -> Tensor:
        """Every step, `b k ...`."""
        return self.options.all() + self.biases

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b m` name, `b m ...`."""
        return self.options.chosen(codes) + rows_of(self.biases, codes)

    def select(self, examples: Tensor) -> "BiasedOptions":
        """The options of the examples `n`."""
        return BiasedOptions(self.options.select(examples), self.biases)

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
        features: `b h w f`, the last of them constant one.
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
        steps = einsum(self.weight, self.features, "k o f, b h w f -> b k h w o")
        return rearrange(steps, "b k h w (c p q) -> b k c (h p) (w q)", p=self.patch, q=self.patch)

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b m` name, `b m c h w`: one matrix product an example."""
        height = self.features.shape[1]
        steps = self.features.flatten(1, 2) @ rearrange(rows_of(self.weight, codes), "b m o f -> b f (m o)")
        sizes = {"m": codes.shape[1], "h": height, "p": self.patch, "q": self.patch}
        return rearrange(steps, "b (h w) (m c p q) -> b m c (h p) (w q)", **sizes)

    def select(self, examples: Tensor) -> "LinearOptions":
        """The options of the examples `n`."""
        return LinearOptions(self.features[examples], self.weight, self.patch)

    def squared_errors(self, residual: Tensor) -> Tensor:
        """`b c h w` -> `b k`."""
        r = rearrange(residual, "b c (h p) (w q) -> b (c p q) (h w)", p=self.patch, q=self.patch)
        f = self.features.flatten(1, 2)
        products = (r @ f).flatten(1) @ self.weight.flatten(1).T
        norms = (f.mT @ f).flatten(1) @ (self.weight.mT @ self.weight).flatten(1).T
        return (r.square().sum((1, 2))[:, None] - 2 * products + norms) / residual.shape[1:].numel()

    def products(self, biases: Tensor) -> Tensor:
        """`k c h w` -> `b k`, as <W_k' e_k, f>: one matrix product for the batch."""
        e = rearrange(biases, "k c (h p) (w q) -> k (h w) (c p q)", p=self.patch, q=self.patch)
        return self.features.flatten(1) @ (e @ self.weight).flatten(1).T / biases[0].numel()


@dataclass
class ConvOptions:
    """Steps made by one convolution of the features, as the heads of the published models are.

    Attributes:
        features: `b f h w`; where autocast made them bfloat16, all steps are made in it, and those chosen are not.
        weight: `k c f p p`, p odd. bias: `k c`.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor

    def all(self) -> Tensor:
        """Every step, `b k c h w`."""
        dtype, padding = self.features.dtype, self.weight.shape[-1] // 2
        weight, bias = self.weight.flatten(0, 1).to(dtype), self.bias.flatten().to(dtype)
        if use_fft(self.features, weight):
            steps = fft_conv2d(self.features, weight).add_(bias[:, None, None])
        else:
            steps = F.conv2d(self.features, weight, bias, padding=padding)
        return steps.unflatten(1, self.bias.shape).to(self.weight.dtype)

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b m` name, `b m c h w`.

        A convolution is a matrix product for each of its taps, and the sum of these images shifted. The product is over one example's
        own rows of the weight, so that steps nobody asked for are never made.
        """
        weight = rearrange(rows_of(self.weight.flip(-1, -2), codes), "b m c f p q -> b (m c p q) f")
        width = self.weight.shape[-1]
        taps = weight @ self.features.to(weight.dtype).flatten(2)
        steps = F.fold(taps, self.features.shape[2:], kernel_size=width, padding=width // 2)
        return steps.unflatten(1, (codes.shape[1], -1)) + self.bias[codes][..., None, None]

    def select(self, examples: Tensor) -> "ConvOptions":
        """The options of the examples `n`."""
        return ConvOptions(self.features[examples], self.weight, self.bias)

    def squared_errors(self, residual: Tensor) -> Tensor:
        """`b c h w` -> `b k`, as |r|^2 - 2 r.d + |d|^2: no proposal is ever made."""
        r, steps = residual.flatten(1), self.all().flatten(2)
        if use_fft(self.features, self.weight):
            # Keeps the bits of a batch of one equal to those of a larger batch, as the convolution does.
            products = torch.bmm(r[:, None], steps.mT).squeeze(1)
        else:
            products = torch.bmm(steps, r[..., None]).squeeze(2)  # 2 to 3 times faster backward
        norms = torch.linalg.vector_norm(steps, dim=2).square()
        return (r.square().sum(1, keepdim=True) - 2 * products + norms) / r.shape[1]

    def products(self, biases: Tensor) -> Tensor:
        """`k c h w` -> `b k`."""
        return reduce(self.all() * biases, "b k ... -> b k", "mean")


@dataclass
class EmbeddedOptions:
    """Steps in the logits of symbols, made in a space of a few dimensions that all steps share: d_k = E W_k f at every position.

    Attributes:
        features: `b t f`.
        weight: `k e f`.
        embedding: E, `v e`; without it, W_k makes logits itself.
    """

    features: Tensor
    weight: Tensor
    embedding: Tensor | None

    def __post_init__(self) -> None:
        self.features = self.features.to(self.weight.dtype)  # where autocast made them bfloat16

    def all(self) -> Tensor:
        """Every step, `b k t v`."""
        return self._logits(einsum(self.features, self.weight, "b t f, k e f -> b k t e"))

    def chosen(self, codes: Tensor) -> Tensor:
        """The steps that the codes `b m` name, `b m t v`: a matrix product each."""
        return self._logits(self.features[:, None] @ rows_of(self.weight, codes).mT)

    def _logits(self, steps: Tensor) -> Tensor:
        return steps if self.embedding is None else steps @ self.embedding.T

    def select(self, examples: Tensor) -> "EmbeddedOptions":
        """The options of the examples `n`."""
        return EmbeddedOptions(self.features[examples], self.weight, self.embedding)

    def squared_errors(self, residual: Tensor) -> Tensor:
        """`b t v` -> `b k`."""
        return DenseOptions(self.all()).squared_errors(residual)

    def products(self, biases: Tensor) -> Tensor:
        """`k t v` -> `b k`."""
        return DenseOptions(self.all()).products(biases)


def rows_of(table: Tensor, codes: Tensor) -> Tensor:
    """Rows of `k ...` that the codes `b m` name, `b m ...`; the way back adds up whole rows, which indexing does number by number."""
    return F.embedding(codes, table.flatten(1)).unflatten(2, table.shape[1:])
