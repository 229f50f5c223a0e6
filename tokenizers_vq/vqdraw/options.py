"""Options of a VQ-DRAW stage: K steps for each example, in forms that need not hold them in memory.

All forms have the interface of `Options`. `DenseOptions` is the plain form; the tests compare every
other one with it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor

from ..modules.fft_conv import fft_conv2d, use_fft


class Options(Protocol):
    """K steps for each example of a batch; option k leads to `state + step_k`."""

    def all_steps(self) -> Tensor:
        """Return every step, `b k ...`."""
        ...

    def gather_steps(self, codes: Tensor) -> Tensor:
        """Return the steps with the indices `b m`, as `b m ...`."""
        ...

    def select_examples(self, examples: Tensor) -> "Options":
        """Return the options of the examples with the indices `n`, which may repeat."""
        ...

    def squared_errors(self, residual: Tensor) -> Tensor:
        """Return the mean squared distance of every step to the residual `b ...`, as `b k`."""
        ...

    def bias_products(self, biases: Tensor) -> Tensor:
        """Return the mean over elements of each step times its bias in `k ...`, as `b k`."""
        ...


@dataclass
class DenseOptions:
    """Steps in memory, the plain form.

    Attributes:
        steps: Every step, `b k ...`.
    """

    steps: Tensor

    def all_steps(self) -> Tensor:
        """Return every step, `b k ...`."""
        return self.steps

    def gather_steps(self, codes: Tensor) -> Tensor:
        """Return the steps with the indices `b m`, as `b m ...`."""
        return self.steps[torch.arange(len(codes), device=codes.device)[:, None], codes]

    def select_examples(self, examples: Tensor) -> "DenseOptions":
        """Return the options of the examples `n`."""
        return DenseOptions(self.steps[examples])

    def squared_errors(self, residual: Tensor) -> Tensor:
        """Return the mean squared error of every step, `b ...` -> `b k`."""
        return reduce((self.steps - residual[:, None]).square(), "b k ... -> b k", "mean")

    def bias_products(self, biases: Tensor) -> Tensor:
        """Return the mean products with the biases, `k ...` -> `b k`."""
        return reduce(self.steps * biases, "b k ... -> b k", "mean")


@dataclass
class SharedOptions:
    """Steps of one example, shared by a batch. At stage 0 every state is zero, so all steps agree.

    Attributes:
        options: Options of one example.
        batch_size: Number of examples that share them, b.
    """

    options: Options
    batch_size: int

    def shared_steps(self) -> Tensor:
        """Return every step once, `k ...`."""
        return self.options.all_steps()[0]

    def all_steps(self) -> Tensor:
        """Return every step, `b k ...`."""
        steps = self.shared_steps()
        return steps.expand(self.batch_size, *steps.shape)

    def gather_steps(self, codes: Tensor) -> Tensor:
        """Return the steps with the indices `b m`, as `b m ...`.

        They are computed for each example as at any other stage. So a code decodes to the same bits
        in a batch of any size.
        """
        return self.options.select_examples(codes.new_zeros(len(codes))).gather_steps(codes)

    def select_examples(self, examples: Tensor) -> "SharedOptions":
        """Return the options of the examples `n`."""
        return SharedOptions(self.options, len(examples))

    def squared_errors(self, residual: Tensor) -> Tensor:
        """Return the mean squared error of every step, `b ...` -> `b k`, as |r|^2 - 2 r.d + |d|^2."""
        r, d = residual.flatten(1), self.shared_steps().flatten(1)
        return (r.square().sum(1, keepdim=True) - 2 * r @ d.T + d.square().sum(1)) / r.shape[1]

    def bias_products(self, biases: Tensor) -> Tensor:
        """Return the mean products with the biases, `k ...` -> `b k`."""
        return self.options.bias_products(biases).expand(self.batch_size, -1)


@dataclass
class BiasedOptions:
    """Steps of other options, plus a learned bias for each index.

    Attributes:
        options: Options without the biases.
        biases: One bias for each index, the same for all examples, `k ...`.
    """

    options: Options
    biases: Tensor

    def all_steps(self) -> Tensor:
        """Return every step, `b k ...`."""
        return self.options.all_steps() + self.biases

    def gather_steps(self, codes: Tensor) -> Tensor:
        """Return the steps with the indices `b m`, as `b m ...`."""
        return self.options.gather_steps(codes) + gather_rows(self.biases, codes)

    def select_examples(self, examples: Tensor) -> "BiasedOptions":
        """Return the options of the examples `n`."""
        return BiasedOptions(self.options.select_examples(examples), self.biases)

    def squared_errors(self, residual: Tensor) -> Tensor:
        """Return the mean squared error of every step, `b ...` -> `b k`.

        With steps d and biases e it is |r - d|^2 + 2 d.e - 2 r.e + |e|^2. The options without biases
        compute the first two terms.
        """
        r, e = residual.flatten(1), self.biases.flatten(1)
        bias_terms = (e.square().sum(1) - 2 * r @ e.T) / r.shape[1]
        return self.options.squared_errors(residual) + 2 * self.options.bias_products(self.biases) + bias_terms

    def bias_products(self, biases: Tensor) -> Tensor:
        """Return the mean products with other biases, `k ...` -> `b k`."""
        return self.options.bias_products(biases) + (self.biases * biases).flatten(1).mean(1)


@dataclass
class LinearOptions:
    """Steps that are linear in features of the state, d_k = W_k f at every grid cell.

    Their errors need no step in memory. With the Gram matrices A = r f' and G = f f' over the cells,
    r.d_k = <W_k, A> and |d_k|^2 = <W_k' W_k, G>.

    Attributes:
        features: Features of the cells, `b h w f`; the last feature is constant one.
        weight: Matrices `k o f`, with o = channels x patch x patch pixel values of a cell.
        patch: Side of a cell, pixels.
    """

    features: Tensor
    weight: Tensor
    patch: int

    def __post_init__(self) -> None:
        # Autocast may have made the features bfloat16, but errors need float32.
        self.features = self.features.to(self.weight.dtype)

    def all_steps(self) -> Tensor:
        """Return every step, `b k c h w`."""
        steps = einsum(self.weight, self.features, "k o f, b h w f -> b k h w o")
        return rearrange(steps, "b k h w (c p q) -> b k c (h p) (w q)", p=self.patch, q=self.patch)

    def gather_steps(self, codes: Tensor) -> Tensor:
        """Return the steps with the indices `b m`, as `b m c h w`; one matrix product an example."""
        height = self.features.shape[1]
        steps = self.features.flatten(1, 2) @ rearrange(gather_rows(self.weight, codes), "b m o f -> b f (m o)")
        sizes = {"m": codes.shape[1], "h": height, "p": self.patch, "q": self.patch}
        return rearrange(steps, "b (h w) (m c p q) -> b m c (h p) (w q)", **sizes)

    def select_examples(self, examples: Tensor) -> "LinearOptions":
        """Return the options of the examples `n`."""
        return LinearOptions(self.features[examples], self.weight, self.patch)

    def squared_errors(self, residual: Tensor) -> Tensor:
        """Return the mean squared error of every step, `b c h w` -> `b k`."""
        r = rearrange(residual, "b c (h p) (w q) -> b (c p q) (h w)", p=self.patch, q=self.patch)
        f = self.features.flatten(1, 2)
        products = (r @ f).flatten(1) @ self.weight.flatten(1).T
        norms = (f.mT @ f).flatten(1) @ (self.weight.mT @ self.weight).flatten(1).T
        return (r.square().sum((1, 2))[:, None] - 2 * products + norms) / residual.shape[1:].numel()

    def bias_products(self, biases: Tensor) -> Tensor:
        """Return the mean products with the biases, `k c h w` -> `b k`, as <W_k' e_k, f>."""
        e = rearrange(biases, "k c (h p) (w q) -> k (h w) (c p q)", p=self.patch, q=self.patch)
        return self.features.flatten(1) @ (e @ self.weight).flatten(1).T / biases[0].numel()


@dataclass
class ConvOptions:
    """Steps made by one convolution of the features, as in the original models.

    Attributes:
        features: Features `b f h w`. If autocast made them bfloat16, `all_steps` computes in bfloat16,
            but `gather_steps` in float32, because decoding must not lose digits.
        weight: Kernels `k c f p p`, p odd.
        bias: Bias of the convolution, `k c`.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor

    def all_steps(self) -> Tensor:
        """Return every step, `b k c h w`."""
        dtype, padding = self.features.dtype, self.weight.shape[-1] // 2
        weight, bias = self.weight.flatten(0, 1).to(dtype), self.bias.flatten().to(dtype)
        if use_fft(self.features, weight):
            steps = fft_conv2d(self.features, weight).add_(bias[:, None, None])
        else:
            steps = F.conv2d(self.features, weight, bias, padding=padding)
        return steps.unflatten(1, self.bias.shape).to(self.weight.dtype)

    def gather_steps(self, codes: Tensor) -> Tensor:
        """Return the steps with the indices `b m`, as `b m c h w`.

        A convolution is a matrix product for each kernel tap, followed by a sum of the shifted results
        (`F.fold`). The product uses only the kernels of each example's own codes.
        """
        weight = rearrange(gather_rows(self.weight.flip(-1, -2), codes), "b m c f p q -> b (m c p q) f")
        width = self.weight.shape[-1]
        taps = weight @ self.features.to(weight.dtype).flatten(2)
        steps = F.fold(taps, self.features.shape[2:], kernel_size=width, padding=width // 2)
        return steps.unflatten(1, (codes.shape[1], -1)) + self.bias[codes][..., None, None]

    def select_examples(self, examples: Tensor) -> "ConvOptions":
        """Return the options of the examples `n`."""
        return ConvOptions(self.features[examples], self.weight, self.bias)

    def squared_errors(self, residual: Tensor) -> Tensor:
        """Return the mean squared error of every step, `b c h w` -> `b k`, as |r|^2 - 2 r.d + |d|^2."""
        r, steps = residual.flatten(1), self.all_steps().flatten(2)
        if use_fft(self.features, self.weight):
            # Like the FFT convolution, it gives the same bits in a batch of one as in a larger batch.
            products = torch.bmm(r[:, None], steps.mT).squeeze(1)
        else:
            products = torch.bmm(steps, r[..., None]).squeeze(2)  # up to 3 times faster backward
        norms = torch.linalg.vector_norm(steps, dim=2).square()
        return (r.square().sum(1, keepdim=True) - 2 * products + norms) / r.shape[1]

    def bias_products(self, biases: Tensor) -> Tensor:
        """Return the mean products with the biases, `k c h w` -> `b k`."""
        return reduce(self.all_steps() * biases, "b k ... -> b k", "mean")


@dataclass
class EmbeddedOptions:
    """Steps in the logits of symbols, d_k = E W_k f at every position.

    All steps share the embedding E, so that W_k has few rows.

    Attributes:
        features: Features of the positions, `b t f`.
        weight: Matrices W_k, `k e f`.
        embedding: E, `v e`; None if W_k makes logits itself.
    """

    features: Tensor
    weight: Tensor
    embedding: Tensor | None

    def __post_init__(self) -> None:
        # Autocast may have made the features bfloat16, but errors need float32.
        self.features = self.features.to(self.weight.dtype)

    def all_steps(self) -> Tensor:
        """Return every step, `b k t v`."""
        return self._to_logits(einsum(self.features, self.weight, "b t f, k e f -> b k t e"))

    def gather_steps(self, codes: Tensor) -> Tensor:
        """Return the steps with the indices `b m`, as `b m t v`; one matrix product each."""
        return self._to_logits(self.features[:, None] @ gather_rows(self.weight, codes).mT)

    def _to_logits(self, steps: Tensor) -> Tensor:
        """Map steps `... e` to logits `... v`."""
        return steps if self.embedding is None else steps @ self.embedding.T

    def select_examples(self, examples: Tensor) -> "EmbeddedOptions":
        """Return the options of the examples `n`."""
        return EmbeddedOptions(self.features[examples], self.weight, self.embedding)

    def squared_errors(self, residual: Tensor) -> Tensor:
        """Return the mean squared error of every step, `b t v` -> `b k`."""
        return DenseOptions(self.all_steps()).squared_errors(residual)

    def bias_products(self, biases: Tensor) -> Tensor:
        """Return the mean products with the biases, `k t v` -> `b k`."""
        return DenseOptions(self.all_steps()).bias_products(biases)


def gather_rows(table: Tensor, codes: Tensor) -> Tensor:
    """Gather the rows `k ...` with the indices `b m`, as `b m ...`.

    It uses `F.embedding`, whose backward pass adds whole rows; that of indexing adds single numbers.
    """
    return F.embedding(codes, table.flatten(1)).unflatten(2, table.shape[1:])
