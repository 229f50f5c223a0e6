"""Convolutions with large kernels as products of frequencies, in a tenth of the multiplications of 5 x 5.

An image is cut into tiles that overlap by the kernel's width less one (overlap-save). The Fourier transform of a tile times the conjugate
one of the kernel is that of their correlation, whose first `TILE` rows and columns do not feel that the transform wraps around. All
transforms are real matrices, so that channels stay innermost and nothing but matrix products is left.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

TILE = 16
TILES_AT_ONCE = 64  # 50 MB of frequencies, of 128 channels into 192
SMALLEST_KERNEL = 5  # 3 x 3 is as soon done directly
# Three real products make a complex one: (x + y i)(u + v i) from (x + y) u, x (v - u) and y (u + v).
OF_INPUT = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
OF_WEIGHT = ((1.0, 0.0), (-1.0, 1.0), (1.0, 1.0))
OF_OUTPUT = ((1.0, 0.0, -1.0), (1.0, 1.0, 0.0))


class Transforms(NamedTuple):
    """Matrices that transform columns, then rows.

    There are `n` numbers a side of a tile, `k` of a kernel and `p`, `q` of what comes out; `m`, `f` frequencies, of which `m` is half, for
    the others are conjugates; `r` the real and the imaginary part, and `l` the three factors of a complex product.

    Attributes:
        of_input: `(m r) n`, `(f l) (r n)`. of_weight: `(m r) k`, `(f l) (r k)`. of_output: back, rows first, `(r q) (f l)`, `p (m r)`.
    """

    of_input: tuple[Tensor, Tensor]
    of_weight: tuple[Tensor, Tensor]
    of_output: tuple[Tensor, Tensor]


@cache
def transforms(kernel: int) -> Transforms:
    """Those for a kernel of so many numbers a side, made in float64, in float32; on a CPU, whatever device is the default."""
    with torch.device("cpu"):
        return build_transforms(kernel)


def build_transforms(kernel: int) -> Transforms:
    """The same, made anew on the default device."""
    size = TILE + kernel - 1
    steps = torch.arange(size).double()
    waves = torch.polar(torch.ones(size, size).double(), -2 * math.pi / size * torch.outer(steps, steps))
    half = waves[: size // 2 + 1]
    weights = waves.conj()[:, :kernel]
    back = einsum(
        real_block_matrix(waves.conj()[:TILE] / size), torch.tensor(OF_OUTPUT).double(), "r s q f, s l -> r q f l"
    )
    # A frequency of the half stands for its conjugate too, where that is another.
    doubled = torch.tensor([[1 if 2 * m % size == 0 else 2] for m in range(len(half))]).double()
    last = real_block_matrix(half.conj() * doubled / size)[0][..., :TILE]
    pairs = (
        (rearrange(real_block_matrix(half)[:, 0], "r m n -> (m r) n"), factors(OF_INPUT, waves)),
        (rearrange(real_block_matrix(weights[: len(half)])[:, 0], "r m k -> (m r) k"), factors(OF_WEIGHT, weights)),
        (rearrange(back, "r q f l -> (r q) (f l)"), rearrange(last, "s m p -> p (m s)")),
    )
    return Transforms(*((first.float(), second.float()) for first, second in pairs))


def real_block_matrix(matrix: Tensor) -> Tensor:
    """A complex matrix `f n` as what makes the real and imaginary parts of its results, `r s f n`, of those of its arguments, `s`."""
    real, imaginary = matrix.real, matrix.imag
    return torch.stack([torch.stack([real, -imaginary]), torch.stack([imaginary, real])])


def factors(of_parts: tuple[tuple[float, float], ...], matrix: Tensor) -> Tensor:
    """A complex matrix `f n` that makes the factors of a product, `l r`, of its results: `(f l) (r n)`."""
    made = einsum(torch.tensor(of_parts).double(), real_block_matrix(matrix), "l r, r s f n -> f l s n")
    return rearrange(made, "f l s n -> (f l) (s n)")


def transformed(squares: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """Numbers `n n ...` -> the factors of their frequencies, `(m f l) ...`."""
    of_columns, of_rows = matrices
    size, rest = squares.shape[0], squares.shape[2:]
    half_done = (of_columns @ squares.reshape(size, -1)).view(len(of_columns) // 2, 2 * size, -1)
    return (of_rows @ half_done).view(-1, *rest)


class KernelTransformCache:
    """The factors of a kernel, `(m f l) c o`, which stand as long as the next one asked for is the same.

    The stages of a segment share their kernel, and to see that two are equal takes a fiftieth of the time. Those of a published kernel
    take 65 MB.
    """

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None

    def factors(self, weight: Tensor) -> Tensor:
        """Of a kernel `o c k k`."""
        last = self.last
        if last is None or last[0].shape != weight.shape or not torch.equal(last[0], weight):
            self.last = None  # lets the memory go before as much is asked for
            made = transformed(rearrange(weight, "o c p q -> p q c o"), transforms(weight.shape[-1]).of_weight)
            self.last = last = weight.clone(), made
        return last[1]


KERNEL = KernelTransformCache()


def convolve_in_tiles(x: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d(x, weight, padding=k // 2)` of images `b c h w`, whose sides `TILE` divides, by `o c k k`, in tiles `(p q) b t o`."""
    kernel = weight.shape[-1]
    of_input, _, (of_rows, of_columns) = transforms(kernel)
    padding, size = kernel // 2, TILE + kernel - 1
    padded = F.pad(rearrange(x, "b c h w -> b h w c"), (0, 0, padding, padding, padding, padding))
    tiles = rearrange(padded.unfold(1, size, TILE).unfold(2, size, TILE), "b i j c p q -> p q (b i j) c")
    products = torch.bmm(transformed(tiles, of_input), KERNEL.factors(weight))
    half_done = of_rows @ products.view(-1, of_rows.shape[1], products.shape[1:].numel())
    made = of_columns @ half_done.view(of_columns.shape[1], -1)
    return made.view(TILE * TILE, len(x), -1, len(weight))


def in_tiles(x: Tensor) -> Tensor:
    """Images `b c h w` -> `(p q) b t c`."""
    return rearrange(x, "b c (i p) (j q) -> (p q) b (i j) c", p=TILE, q=TILE)


def split_for_tiles(x: Tensor) -> tuple[Tensor, ...]:
    """Images `b c h w`, so many together as have `TILES_AT_ONCE` tiles."""
    return x.split(max(1, TILES_AT_ONCE * TILE * TILE // x.shape[2:].numel()))


def use_fft(x: Tensor, weight: Tensor) -> bool:
    """Whether tiles are the faster way for `b c h w` and `... k k`: in float32 on a CPU, for a large kernel, where no gradient is asked."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    fits = x.shape[2] % TILE == x.shape[3] % TILE == 0 and weight.shape[-1] >= SMALLEST_KERNEL
    return plain and fits and len(x) > 0 and not torch.compiler.is_compiling()
