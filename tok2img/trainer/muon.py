"""Muon (Jordan et al. 2024): steps that go equally far in every direction of a weight matrix, and AdamW for all that is no matrix.

A gradient is nearly of low rank: plain steps go far along few directions and nowhere along the others. Muon keeps the directions
of its momentum and makes all their lengths one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import PreTrainedModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

LAYERS = (
    nn.Linear,
    Conv1D,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
MIN_CHANNELS = 16  # layers from or to fewer, such as those that look at pixels, are no matter of directions
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of a quintic that takes lengths of 0.01 to 1 to about 1 in five turns
NS_STEPS = 5
ADAM_RMS = 0.2  # of AdamW's steps, in learning rates (Liu et al. 2025, section 2.2): both want the same rate then


class Muon(torch.optim.Optimizer):
    """Muon for some parameters, AdamW for the others, under one learning rate.

    Args:
        params: as of any optimizer of torch.
        matrices: those of them that Muon is for, see `muon_parameters`.
        lr, betas, eps, weight_decay: of AdamW; the rate and the decay are Muon's too.
        momentum: of Muon, after Nesterov.
        adamw_lr_scale: AdamW's rate as a share of `lr`. Less than 1 to go on from a trained VQ-DRAW model: each of its options gets a gradient
            from a few examples of a batch, AdamW makes whole steps of that noise, and what was learned is worn away. Not from the start.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        matrices: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        adamw_lr_scale: float = 1.0,
    ):
        chosen = {id(matrix) for matrix in matrices}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults)
        whole, self.param_groups = self.param_groups, []
        for group in whole:
            for use_muon in (True, False):
                own = [parameter for parameter in group["params"] if (id(parameter) in chosen) is use_muon]
                rate = group["lr"] * (1 if use_muon else adamw_lr_scale)
                self.add_param_group(group | {"params": own, "use_muon": use_muon, "lr": rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after `closure` has computed the loss and the gradients, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._step_matrices if group["use_muon"] else self._step_others)(parameters, group)
        return loss

    def _step_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Those of one shape at once."""
        of_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            of_shape[tuple(parameter.shape)].append(parameter)
        for same in of_shape.values():
            directions = newton_schulz(
                torch.stack([self._momentum(each, group["momentum"]).flatten(1) for each in same])
            )
            size = group["lr"] * ADAM_RMS * max(directions.shape[1:]) ** 0.5
            for parameter, direction in zip(same, directions, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(direction.view_as(parameter), alpha=size)

    def _momentum(self, parameter: Tensor, decay: float) -> Tensor:
        """The mean of past gradients, and a look ahead (Nesterov)."""
        gradient: Any = parameter.grad
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        mean = state["momentum"].lerp_(gradient, 1 - decay)
        return gradient.lerp(mean, decay)

    def _step_others(self, parameters: list[Any], group: dict[str, Any]) -> None:
        """As AdamW does."""
        for each in parameters:
            if not self.state[each]:
                self.state[each] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(each),
                    "exp_avg_sq": torch.zeros_like(each),
                }
        states = [self.state[each] for each in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [each.grad for each in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def newton_schulz(matrices: Tensor) -> Tensor:
    """Matrices `b m n` with their singular vectors and nearly equal singular values (0.7 to 1.2), in bfloat16, by Newton-Schulz."""
    x = matrices.bfloat16()
    x = x.mT if x.shape[1] > x.shape[2] else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).to(matrices.dtype)


def muon_parameters(model: nn.Module) -> list[Tensor]:
    """Weights of the linear layers and convolutions that Muon is for: not of heads over a vocabulary, and not from or to few channels."""
    heads = [each.get_output_embeddings() for each in model.modules() if isinstance(each, PreTrainedModel)]
    weights = [
        layer.weight
        for layer in model.modules()
        if isinstance(layer, LAYERS) and not any(layer is head for head in heads)
    ]
    return [weight for weight in weights if min(weight.shape[:2]) >= MIN_CHANNELS]


def muon_optimizer_kwargs(
    model: nn.Module, args: TrainingArguments, *, adamw_lr_scale: float = 1.0
) -> tuple[type[Muon], dict[str, Any]]:
    """Muon for a model, in the form that transformers wants an optimizer in."""
    settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return Muon, settings | {"matrices": muon_parameters(model), "adamw_lr_scale": adamw_lr_scale}
