"""Adversarial loss with a patch discriminator, on the schedule of VQGAN (Esser et al. 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..modules.conv import group_norm
from .reconstruction import ReconstructionLoss, loss_terms, squared_error

MIN_IMAGE_SIZE = 8
MAX_DOWNSAMPLES = 3
LEAKY_RELU_SLOPE = 0.2
DELTA = 1e-6  # of equation 7
MAX_ADAPTIVE_WEIGHT = 1e4  # as in VQGAN's published code


class EqualizedConv2d(nn.Module):
    """4x4 convolution with equalized learning rate (Karras et al. 2018, section 4.1).

    Weights have variance 1 and are scaled at runtime, so that a step of Adam changes every layer by
    the same fraction. The discriminator can then share the tokenizer's learning rate, about ten
    times what discriminators usually take.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 4, 4))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        # He's constant; 16 weights per input channel.
        self.stride, self.gain = stride, (2 / (16 * in_channels)) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `b c h w` into `b o h' w'`."""
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, padding=1)


class PatchDiscriminator(nn.Module):
    """Discriminator that scores patches (PatchGAN, Isola et al. 2017, section 3.2.2).

    Up to three downsamplings leave a grid of at least 4x4 cells; three of them give patches of
    70x70 pixels, as in the paper. Group norms replace its batch norms, so that the score of an
    image does not depend on its batch.

    Args:
        image_size: Height and width of the images in pixels.
        num_channels: Channels of the images.
        hidden_channels: Channels after the first downsampling; every further layer has twice as
            many.

    Raises:
        ValueError: For an `image_size` below 8.

    Example:
        >>> import torch
        >>> from tokenizers_vq import PatchDiscriminator
        >>> PatchDiscriminator(16, hidden_channels=8)(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 1, 2, 2])
    """

    def __init__(self, image_size: int, num_channels: int = 3, *, hidden_channels: int = 32):
        super().__init__()
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(
                f"a patch discriminator needs an image_size of at least {MIN_IMAGE_SIZE}, got {image_size}"
            )
        num_downsamples = min(MAX_DOWNSAMPLES, image_size.bit_length() - MIN_IMAGE_SIZE.bit_length() + 1)
        layers: list[nn.Module] = [EqualizedConv2d(num_channels, hidden_channels, 2), nn.LeakyReLU(LEAKY_RELU_SLOPE)]
        width = hidden_channels
        for stride in [2] * (num_downsamples - 1) + [1]:
            layers += [EqualizedConv2d(width, 2 * width, stride), group_norm(2 * width), nn.LeakyReLU(LEAKY_RELU_SLOPE)]
            width *= 2
        self.layers = nn.Sequential(*layers, EqualizedConv2d(width, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Score the patches of normalized images `b c h w`, `b 1 h' w'`; above 0 means real."""
        return self.layers(images)


class AdversarialLoss(nn.Module):
    """Reconstruction loss plus VQGAN's hinge losses (Esser et al. 2021, equations 6 and 7).

    One optimizer and one backward pass train generator and discriminator on a sum of their losses.
    Each gets exactly the gradient of its own loss. The generator's term treats the discriminator's
    parameters as constants, and the discriminator's term treats the reconstruction as a constant.

    Equation 7 compares gradients with respect to the last layer's weight. Here they are taken with
    respect to the reconstruction, from which those follow by a linear map that both terms share. So
    the decoder need not be known, and its weights may be compiled or sharded. Gradient norms are
    over the local batch.

    In eval mode only the reconstruction loss is returned. Held-out losses then stay comparable
    while the discriminator learns.

    Args:
        discriminator: Maps normalized images `b c h w` to scores of any shape. It is trained with
            the tokenizer.
        start_step: Number of training batches without the discriminator. It does not learn before.
        weight: Multiplies the adaptive weight; 0.8 is VQGAN's value.
        reconstruction_loss: Loss to add to, e.g. a `PerceptualLoss`.

    Attributes:
        terms: Detached terms of the last loss, for the log.

    Example:
        >>> import torch
        >>> from tokenizers_vq import AdversarialLoss, PatchDiscriminator
        >>> loss = AdversarialLoss(PatchDiscriminator(8, hidden_channels=8), start_step=0)
        >>> reconstruction = torch.rand(2, 3, 8, 8, requires_grad=True)
        >>> loss(reconstruction, torch.rand(2, 3, 8, 8)).backward()
        >>> sorted(loss.terms)
        ['disc_weight', 'discriminator_loss', 'generator_loss', 'reconstruction_loss']
    """

    steps: Tensor

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        start_step: int,
        weight: float = 0.8,
        reconstruction_loss: ReconstructionLoss = squared_error,
    ):
        super().__init__()
        self.discriminator, self.reconstruction_loss = discriminator, reconstruction_loss
        self.start_step, self.weight = start_step, weight
        # A buffer, so that resuming continues the count.
        self.register_buffer("steps", torch.tensor(0))
        self.terms: dict[str, Tensor] = {}

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Return the loss of normalized images `b c h w`, a scalar; keep its terms in `terms`."""
        error = self.reconstruction_loss(reconstruction, target)
        self.terms = {**loss_terms(self.reconstruction_loss), "reconstruction_loss": error.detach()}
        if not self.training:
            return error
        started = self.steps >= self.start_step
        self.steps += 1
        return error + (self._adversarial_loss(error, reconstruction, target) if started else self._zero_loss())

    def _adversarial_loss(self, error: Tensor, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the generator's weighted loss and the discriminator's loss."""
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        generator_loss = -functional_call(self.discriminator, frozen, (reconstruction,)).mean()
        weight = self.weight * adaptive_weight(error, generator_loss, reconstruction)
        discriminator_loss = hinge_loss(self.discriminator(target), self.discriminator(reconstruction.detach()))
        self.terms |= {
            "generator_loss": generator_loss.detach(),
            "discriminator_loss": discriminator_loss.detach(),
            "disc_weight": weight,
        }
        return weight * generator_loss + discriminator_loss

    def _zero_loss(self) -> Tensor:
        """Return 0 with a zero gradient: DDP waits for a gradient of every parameter."""
        return 0 * torch.stack([parameter.sum() for parameter in self.discriminator.parameters()]).sum()


def hinge_loss(real: Tensor, reconstructed: Tensor) -> Tensor:
    """Return the discriminator's hinge loss, a scalar (Lim & Ye 2017).

    Args:
        real: Scores of real images, any shape; pushed above 1.
        reconstructed: Scores of reconstructions, any shape; pushed below -1.
    """
    return (F.relu(1 - real).mean() + F.relu(1 + reconstructed).mean()) / 2


def adaptive_weight(error: Tensor, generator_loss: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the weight that gives two losses gradients of equal length (equation 7).

    Args:
        error: Reconstruction loss, a scalar.
        generator_loss: Loss of the generator, a scalar.
        reconstruction: Normalized images `b c h w` that both depend on.

    Returns:
        A detached scalar, at most `MAX_ADAPTIVE_WEIGHT`.
    """
    gradients = [torch.autograd.grad(loss, reconstruction, retain_graph=True)[0] for loss in (error, generator_loss)]
    # In float32: under autocast the norm of a whole batch would be rounded to bf16.
    error_norm, generator_norm = (torch.linalg.vector_norm(gradient.float()) for gradient in gradients)
    return (error_norm / (generator_norm + DELTA)).clamp(max=MAX_ADAPTIVE_WEIGHT)
