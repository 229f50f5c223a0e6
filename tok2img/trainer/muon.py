"""Muon (Jordan et al. 2024) for weight matrices, with AdamW for all other parameters.

A gradient matrix is nearly of low rank, so plain steps go far along few directions and nowhere along the
others. Muon keeps the directions of its momentum and gives all of them the same length:

    buffer <- lerp(buffer, gradient, 1 - momentum)
    update <- newton_schulz(lerp(gradient, buffer, momentum))                    Nesterov
    weight <- (1 - lr * weight_decay) * weight - 0.2 * sqrt(max(m, n)) * lr * update

`torch.optim.Muon` (with `adjust_lr_fn="match_rms_adamw"`) computes the same for the weights of linear layers. It
takes neither convolutions nor a second group for AdamW, and steps matrix by matrix; here all matrices of
one shape are orthogonalized together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

MATRIX_LAYERS = (
    nn.Linear,
    Conv1D,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# Layers with fewer input or output channels, e.g. those that read pixels, use AdamW: orthogonal
# directions mean little among three.
MIN_CHANNELS = 16
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic that takes singular values of 0.01 to 1 to about 1 in five steps
NS_STEPS = 5
ADAMW_RMS = 0.2  # RMS of AdamW's steps in learning rates (Liu et al. 2025, section 2.2): one rate then suits both


class Muon(torch.optim.Optimizer):
    """Muon for weight matrices and AdamW for the other parameters, under one learning rate.

    Args:
        params: Parameters or groups, as for any optimizer of torch.
        muon_params: Those of them that Muon trains, see `muon_parameters`.
        lr: Learning rate of both.
        betas: Decay rates of AdamW's moments.
        eps: Term of AdamW's denominator.
        weight_decay: Decoupled weight decay of both.
        momentum: Momentum of Muon, with Nesterov's look-ahead.
        ns_steps: Newton-Schulz iterations.
        adamw_lr_scale: AdamW's learning rate as a fraction of `lr`. Use less than 1 to fine-tune a VQ-DRAW
            model: each option gets its gradient from a few examples of a batch, and there AdamW turns gradient
            noise into full-size steps and destroys what was learned. Leave it at 1 when training from scratch.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        muon_params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        ns_steps: int = NS_STEPS,
        adamw_lr_scale: float = 1.0,
    ):
        chosen = {id(parameter) for parameter in muon_params}
        adamw = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, adamw | {"momentum": momentum, "ns_steps": ns_steps})
        given, self.param_groups = self.param_groups, []
        for group in given:
            for use_muon in (True, False):
                own = [parameter for parameter in group["params"] if (id(parameter) in chosen) is use_muon]
                rate = group["lr"] * (1 if use_muon else adamw_lr_scale)
                self.add_param_group(group | {"params": own, "use_muon": use_muon, "lr": rate})
        # It shares the groups and the state, and adds its own settings to the groups.
        self.adamw = torch.optim.AdamW([group for group in self.param_groups if not group["use_muon"]], **adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step, after `closure` has computed the loss and the gradients if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["use_muon"]:
                self._muon_step(group)
        # Loading a state replaces both containers, so they are handed over at each step.
        self.adamw.state = self.state
        self.adamw.param_groups = [group for group in self.param_groups if not group["use_muon"]]
        self.adamw.step()
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        """Update the matrices of a group; all of one shape together."""
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for parameters in by_shape.values():
            momenta = [self._nesterov_momentum(each, group["momentum"]).flatten(1) for each in parameters]
            updates = newton_schulz(torch.stack(momenta), num_steps=group["ns_steps"])
            step_size = group["lr"] * ADAMW_RMS * max(updates.shape[1:]) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.view_as(parameter), alpha=step_size)

    def _nesterov_momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Update the moving average of the gradients, and return it with a look-ahead."""
        gradient: Any = parameter.grad
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


def newton_schulz(matrices: Tensor, num_steps: int = NS_STEPS) -> Tensor:
    """Orthogonalize matrices: keep their singular vectors, bring all singular values near 1 (0.7 to 1.2).

    Args:
        matrices: Matrices, `b m n`. The iteration runs in bfloat16.
        num_steps: Number of iterations.
    """
    x = matrices.bfloat16()
    x = x.mT if x.shape[1] > x.shape[2] else x  # the Gram matrix of the shorter side is the smaller one
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    a, b, c = NS_COEFFICIENTS
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if matrices.shape[1] > matrices.shape[2] else x).to(matrices.dtype)


def muon_parameters(model: nn.Module) -> list[Tensor]:
    """Return the weights that Muon trains.

    These are the weights of linear layers and convolutions, except for heads over a vocabulary and for
    layers with fewer than `MIN_CHANNELS` channels on either side.
    """
    heads = [each.get_output_embeddings() for each in model.modules() if isinstance(each, PreTrainedModel)]
    weights = [
        layer.weight
        for layer in model.modules()
        if isinstance(layer, MATRIX_LAYERS) and not any(layer is head for head in heads)
    ]
    return [weight for weight in weights if min(weight.shape[:2]) >= MIN_CHANNELS]


def muon_optimizer_kwargs(
    model: nn.Module, args: TrainingArguments, *, adamw_lr_scale: float = 1.0
) -> tuple[type[Muon], dict[str, Any]]:
    """Return Muon and its arguments as `transformers.Trainer(optimizer_cls_and_kwargs=...)` takes them."""
    settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return Muon, settings | {"muon_params": muon_parameters(model), "adamw_lr_scale": adamw_lr_scale}
