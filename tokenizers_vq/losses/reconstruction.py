"""How far a reconstruction is from its image: pixel by pixel, and as a network sees the two.

A reconstruction loss is any callable from normalised images `b c h w`, the reconstruction and its target, to a scalar.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ReconstructionLoss = Callable[[Tensor, Tensor], Tensor]
Features = Callable[[Tensor], Tensor | Sequence[Tensor]]


def squared_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of two batches `b c h w`, a scalar: the likeliest image under Gaussian noise is their mean."""
    return (reconstruction - target).square().mean()


def absolute_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of two batches `b c h w`, a scalar: its optimum is a median, which keeps edges that a mean blurs."""
    return (reconstruction - target).abs().mean()


PIXEL_LOSSES: dict[str, ReconstructionLoss] = {"mse": squared_error, "l1": absolute_error}


class PerceptualLoss(nn.Module):
    """A pixel loss plus `weight` times the distance of the features that a network finds (Zhang et al. 2018, equation 1, all w = 1).

    Args:
        features: from images `b c h w` to one tensor or several, channels on axis 1. A module is frozen here and stays in eval mode;
            any other callable must keep gradients from its weights itself.
        weight: of the distance of features.
        pixel_loss: without it, images that the network cannot tell apart would be equally good.
        pixel_std, pixel_mean: features see `normalised * pixel_std + pixel_mean`. Those of the tokenizer's config give pixels in [0, 1];
            if left out, features see normalised pixels.
    """

    def __init__(
        self,
        features: Features,
        weight: float = 1.0,
        pixel_loss: ReconstructionLoss = squared_error,
        *,
        pixel_mean: float = 0.0,
        pixel_std: float = 1.0,
    ):
        super().__init__()
        self.features, self.weight, self.pixel_loss = features, weight, pixel_loss
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.terms: dict[str, Tensor] = {}
        if isinstance(features, nn.Module):
            features.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As for any module, but features have learned enough."""
        super().train(mode)
        if isinstance(self.features, nn.Module):
            self.features.eval()
        return self

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Normalised `b c h w`, twice -> the loss, a scalar; what it consists of is left in `parts`."""
        with torch.no_grad():
            wanted = self._look(target)
        distances = [feature_distance(*pair) for pair in zip(self._look(reconstruction), wanted, strict=True)]
        perceptual, pixel = torch.stack(distances).sum(), self.pixel_loss(reconstruction, target)
        self.terms = {"pixel_loss": pixel.detach(), "perceptual_loss": perceptual.detach()}
        return pixel + self.weight * perceptual

    def _look(self, normalized: Tensor) -> list[Tensor]:
        found = self.features(normalized * self.pixel_std + self.pixel_mean)
        return [found] if isinstance(found, Tensor) else list(found)


def feature_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Features `b c ...`, scaled to length 1 at every place -> their squared distance, a mean over places and examples, a scalar."""
    difference = F.normalize(found.float(), dim=1) - F.normalize(wanted.float(), dim=1)
    return difference.square().sum(dim=1).mean()


def loss_terms(loss: Any) -> dict[str, Tensor]:
    """What the last value of a loss consisted of, detached; nothing for a loss that does not tell."""
    return getattr(loss, "terms", {})
