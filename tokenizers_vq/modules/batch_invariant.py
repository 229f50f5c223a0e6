"""Operations whose result for an example does not depend on its batch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def batch_invariant_conv1x1(projection: nn.Conv2d, x: Tensor) -> Tensor:
    """What a 1x1 convolution makes of `b c h w`; on a CPU, but for training, in double precision, so that it is the same in all batches.

    Libraries sum the products of a few places in another order than those of many, and of 100,000 codes the last bit decides one. In
    double precision nothing of that order is left when the sum is rounded: 0 to 4 % more time to encode.
    """
    if projection.training or x.device.type != "cpu":
        return projection(x)
    bias = None if projection.bias is None else projection.bias.double()
    return F.conv2d(x.double(), projection.weight.double(), bias).to(x.dtype)


def batch_invariant_encode(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `encode` makes of examples `b ...`; of one alone, beside a copy of it.

    For the same reason: of larger convolutions libraries take the same sums for two examples as for many, but not for one.
    """
    return encode(x) if len(x) != 1 else encode(torch.cat([x, x]))[:1]
