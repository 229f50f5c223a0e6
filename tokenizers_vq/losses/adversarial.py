"""A loss that a network learns: a discriminator of real and reconstructed patches, on the schedule of VQGAN (Esser et al. 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..modules.conv import group_norm
from .reconstruction import ReconstructionLoss, loss_terms, squared_error

SMALLEST_IMAGE = 8
MOST_DOWNSAMPLES = 3
SLOPE = 0.2
DELTA = 1e-6  # of equation 7
LARGEST_WEIGHT = 1e4  # as in the published code of VQGAN


class EqualizedConv2d(nn.Module):
    """4x4 weights of variance 1, scaled when they are used, so that a step of Adam changes every layer by the same share (Karras et al.
    2018, section 4.1). That lets a discriminator learn at the tokenizer's rate, which is some ten times what it commonly bears.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 4, 4))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.stride, self.gain = stride, (2 / (16 * in_channels)) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w` -> `b o h' w'`."""
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, padding=1)


class PatchDiscriminator(nn.Module):
    """Says of every patch of an image how real it looks (Isola et al. 2017, section 3.2.2).

    Its halvings leave a small image a grid of 4x4 at least. Three of them make patches of 70x70 pixels, as in the paper. Normalisation
    is over groups of channels, not over the batch: what it says of an image does not depend on the others.

    Args:
        image_size: height and width of the images.
        num_channels: of the images.
        hidden_channels: width after the first halving; it doubles with each layer.

    Raises:
        ValueError: for images of less than 8 pixels.
    """

    def __init__(self, image_size: int, num_channels: int = 3, *, hidden_channels: int = 32):
        super().__init__()
        if image_size < SMALLEST_IMAGE:
            raise ValueError(
                f"a patch discriminator needs an image_size of at least {SMALLEST_IMAGE}, got {image_size}"
            )
        num_downsamples = min(MOST_DOWNSAMPLES, image_size.bit_length() - SMALLEST_IMAGE.bit_length() + 1)
        layers: list[nn.Module] = [EqualizedConv2d(num_channels, hidden_channels, 2), nn.LeakyReLU(SLOPE)]
        width = hidden_channels
        for stride in [2] * (num_downsamples - 1) + [1]:
            layers += [EqualizedConv2d(width, 2 * width, stride), group_norm(2 * width), nn.LeakyReLU(SLOPE)]
            width *= 2
        self.layers = nn.Sequential(*layers, EqualizedConv2d(width, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised `b c h w` -> `b 1 h' w'`, above 0 for what looks real."""
        return self.layers(images)


class AdversarialLoss(nn.Module):
    """A reconstruction loss, and from a step on also what a discriminator says and how wrong it is: equations 6 and 7, hinge losses.

    Generator and discriminator descend one sum, whose gradient is for each exactly that of its own loss: the generator's term holds the
    discriminator's parameters fixed, the discriminator's term the reconstruction. One optimizer and one backward pass are enough.

    Equation 7 weighs by gradients of the last layer's weight. Here they are those of the reconstruction itself, from which the former
    follow by a linear map, the same for both terms; so neither decoder nor its last layer need be known, and a weight that is compiled
    or spread over ranks need not be at hand. Norms are over the batch.

    Args:
        discriminator: from normalised images `b c h w` to scores of any shape; trained with the tokenizer.
        start_step: training batches without the discriminator; it learns nothing until then.
        weight: times the adaptive weight; 0.8 is VQGAN's.
        reconstruction_loss: what to add to, e.g. a `PerceptualLoss`.

    In eval mode it is the reconstruction loss alone, so that held-out losses compare, whatever the discriminator has learned since.
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
        self.register_buffer("steps", torch.tensor(0))
        self.terms: dict[str, Tensor] = {}

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Normalised `b c h w`, twice -> the loss, a scalar; what it consists of is left in `parts`."""
        error = self.reconstruction_loss(reconstruction, target)
        self.terms = {**loss_terms(self.reconstruction_loss), "reconstruction_loss": error.detach()}
        if not self.training:
            return error
        started = self.steps >= self.start_step
        self.steps += 1
        return error + (self._adversarial(error, reconstruction, target) if started else self._zero_loss())

    def _adversarial(self, error: Tensor, reconstruction: Tensor, target: Tensor) -> Tensor:
        """The weighted term of the generator, and the discriminator's own."""
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        generator = -functional_call(self.discriminator, fixed, (reconstruction,)).mean()
        weight = self.weight * adaptive_weight(error, generator, reconstruction)
        discriminator_loss = hinge_loss(self.discriminator(target), self.discriminator(reconstruction.detach()))
        self.terms |= {
            "generator_loss": generator.detach(),
            "discriminator_loss": discriminator_loss.detach(),
            "disc_weight": weight,
        }
        return weight * generator + discriminator_loss

    def _zero_loss(self) -> Tensor:
        """Zero, with a gradient of zero for the discriminator: ranks that add up gradients wait for one from every parameter."""
        return 0 * torch.stack([parameter.sum() for parameter in self.discriminator.parameters()]).sum()


def hinge_loss(real: Tensor, reconstructed: Tensor) -> Tensor:
    """Scores of any shape, which should be above 1 for real patches and below -1 for others -> a scalar (Lim & Ye 2017)."""
    return (F.relu(1 - real).mean() + F.relu(1 + reconstructed).mean()) / 2


def adaptive_weight(error: Tensor, generator: Tensor, reconstruction: Tensor) -> Tensor:
    """What makes the gradients at a reconstruction `b c h w` of two scalar losses equally long, when it multiplies the second; detached."""
    gradients = [torch.autograd.grad(loss, reconstruction, retain_graph=True)[0] for loss in (error, generator)]
    of_error, of_generator = (torch.linalg.vector_norm(gradient.float()) for gradient in gradients)
    return (of_error / (of_generator + DELTA)).clamp(max=LARGEST_WEIGHT)
