"""Reconstruction losses: pixel by pixel, and in the features of a network.

A reconstruction loss is any callable of normalized images `b c h w`, the reconstruction and its
target, to a scalar. It may leave its detached terms for the log in an attribute `terms`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ReconstructionLoss = Callable[[Tensor, Tensor], Tensor]
Features = Callable[[Tensor], Tensor | Sequence[Tensor]]


def squared_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of images `b c h w`.

    Up to constants it is the negative log-likelihood under Gaussian noise.
    """
    return (reconstruction - target).square().mean()


def absolute_error(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute error of images `b c h w`.

    Its optimum is a median, which keeps edges that the mean, the optimum of the squared error,
    blurs.
    """
    return (reconstruction - target).abs().mean()


PIXEL_LOSSES: dict[str, ReconstructionLoss] = {"mse": squared_error, "l1": absolute_error}


class PerceptualLoss(nn.Module):
    """Pixel loss plus a distance of features (Zhang et al. 2018, equation 1, all w = 1).

    Args:
        features: Maps images `b c h w` to one tensor or several, with channels on axis 1. A module
            is frozen and kept in eval mode. Any other callable must itself keep gradients from its
            weights.
        weight: Weight of the feature distance.
        pixel_loss: Loss to add it to. Without one, images that the network cannot distinguish would
            be equally good.
        pixel_mean: Added to normalized images times `pixel_std` before features see them. With both
            constants of the tokenizer's config they see pixels in [0, 1].
        pixel_std: See `pixel_mean`. With the defaults features see normalized images.

    Attributes:
        terms: Detached terms of the last loss, for the log.

    Example:
        >>> import torch
        >>> from tokenizers_vq import PerceptualLoss
        >>> loss = PerceptualLoss(torch.nn.Conv2d(3, 8, 3), weight=0.5)
        >>> image = torch.rand(2, 3, 8, 8)
        >>> loss(image, image).item()
        0.0
        >>> sorted(loss.terms)
        ['perceptual_loss', 'pixel_loss']
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
        """Set the mode of the module, except for the feature network, which stays in eval mode."""
        super().train(mode)
        if isinstance(self.features, nn.Module):
            self.features.eval()
        return self

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Return the loss of normalized images `b c h w`, a scalar; keep its terms in `terms`."""
        with torch.no_grad():
            target_features = self._extract_features(target)
        layers = zip(self._extract_features(reconstruction), target_features, strict=True)
        perceptual_loss = torch.stack([feature_distance(*layer) for layer in layers]).sum()
        pixel_loss = self.pixel_loss(reconstruction, target)
        self.terms = {"pixel_loss": pixel_loss.detach(), "perceptual_loss": perceptual_loss.detach()}
        return pixel_loss + self.weight * perceptual_loss

    def _extract_features(self, normalized: Tensor) -> list[Tensor]:
        features = self.features(normalized * self.pixel_std + self.pixel_mean)
        return [features] if isinstance(features, Tensor) else list(features)


def feature_distance(features: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared distance of features `b c ...` of length 1 per position."""
    difference = F.normalize(features.float(), dim=1) - F.normalize(target.float(), dim=1)
    return difference.square().sum(dim=1).mean()


def loss_terms(loss: Any) -> dict[str, Tensor]:
    """Return the detached terms of a loss's last value; empty if it does not keep them."""
    return getattr(loss, "terms", {})
