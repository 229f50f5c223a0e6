"""Convolution with a large kernel through the discrete Fourier transform (overlap-save).

A correlation `y = x * w` is a product of transforms: `DFT(y) = DFT(x) conj(DFT(w))`. Images are cut
into squares that overlap by `k - 1` pixels. The transform wraps around at the far edges of a square,
so only the first `TILE` rows and columns of its result are kept.
"""

from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

TILE = 8  # pixels kept per side; with a 5x5 kernel a third of the multiplications (4: half, 16: as many as 8)
SMALLEST_KERNEL = 5  # below it the direct convolution is as fast


def use_fft(x: Tensor, weight: Tensor) -> bool:
    """Return True if `fft_conv2d` applies to `x`, `b c h w`, and is the faster way.

    It serves encoding in float32 on a CPU; it has no fast backward pass.
    """
    is_encoding = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
    fits = x.shape[2] % TILE == x.shape[3] % TILE == 0 and weight.shape[-1] >= SMALLEST_KERNEL
    return is_encoding and fits and len(x) > 0 and not torch.compiler.is_compiling()


def fft_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `F.conv2d(x, weight, padding=k // 2)`, with the same bits for an image in every batch.

    Args:
        x: Images, `b c h w`; `TILE` divides h and w.
        weight: Kernels, `o c k k`, k odd.

    Returns:
        Convolved images, `b o h w`.
    """
    num_outputs, num_inputs, kernel, _ = weight.shape
    size = TILE + kernel - 1
    forward, inverse = dft_matrices(size)
    # A kernel is padded with zeros to a square, so only the columns of its own pixels count.
    kernel_forward = forward.view(-1, size, size)[:, :kernel, :kernel].flatten(1)
    w_real, w_imag = (kernel_forward @ rearrange(weight, "o c p q -> (p q) (c o)")).view(2, -1, num_inputs, num_outputs)
    inverse = inverse.view(size, size, -1)[:TILE, :TILE].flatten(0, 1)
    squares = F.pad(x, [kernel // 2] * 4).unfold(2, size, TILE).unfold(3, size, TILE)
    convolved = []
    # One image at a time: a larger matrix product would sum in another order, and take more memory.
    for image in squares:
        pixels = rearrange(image, "c i j p q -> (p q) (i j c)")
        x_real, x_imag = (forward @ pixels).view(2, len(w_real), -1, num_inputs)
        real = torch.baddbmm(x_real @ w_real, x_imag, w_imag)
        imaginary = torch.baddbmm(x_imag @ w_real, x_real, w_imag, alpha=-1)
        tiles = inverse @ torch.cat([real, imaginary]).flatten(1)
        sizes = {"p": TILE, "i": image.shape[1], "o": num_outputs}
        convolved.append(rearrange(tiles, "(p q) (i j o) -> o (i p) (j q)", **sizes))
    return torch.stack(convolved)


@cache
def dft_matrices(size: int) -> tuple[Tensor, Tensor]:
    """Return the DFT of real squares, and its inverse, as real matrices.

    They are computed in float64 and returned in float32, on the CPU whatever the default device is.

    Args:
        size: Pixels per side of a square.

    Returns:
        The forward matrix `(r f) (p q)`, where r are real and imaginary parts, and the inverse `(p q) (r f)`.
    """
    with torch.device("cpu"):
        basis = torch.eye(size * size, dtype=torch.float64).view(-1, size, size)
        frequencies = torch.fft.rfft2(basis).flatten(1).T
        forward = torch.cat([frequencies.real, frequencies.imag])
        return forward.float(), torch.linalg.pinv(forward).float()
