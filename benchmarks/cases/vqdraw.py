"""Run VQ-DRAW at the size of MNIST: our options, which compute only the steps they need, against all steps in memory."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from tokenizers_vq import VQDrawForImages, VQDrawImageConfig
from tokenizers_vq.vqdraw.options import DenseOptions

from ..harness import Case, Comparison


def comparisons(*, tiny: bool) -> Iterator[Comparison]:
    """Compare decoding, encoding and a training step at the sizes of `training/configs/mnist_vqdraw.yaml`."""
    config = image_config(tiny=tiny)
    pixel_values = torch.rand(2 if tiny else 64, 1, config.image_size, config.image_size)
    model = perturbed(VQDrawForImages(config))
    codes = model.encode(pixel_values)
    models = {"ours": model, "plain": with_dense_options(model)}
    size = f"batch {len(codes)}, {config.num_stages} stages, K={config.codebook_size}"
    work: dict[str, Callable[[VQDrawForImages], Callable[[], object]]] = {
        "decode": lambda model: partial(model.decode, codes),
        "encode": lambda model: partial(model.encode, pixel_values),
        "training step": lambda model: partial(training_step, model, pixel_values),
    }
    for title, of in work.items():
        cases = [Case(name, of(model), model.zero_grad) for name, model in models.items()]
        yield Comparison(f"{title}, {size}", cases, "plain")


def image_config(*, tiny: bool) -> VQDrawImageConfig:
    """Return the config of the recipe for MNIST."""
    return VQDrawImageConfig(
        image_size=8 if tiny else 28,
        num_channels=1,
        num_stages=2 if tiny else 10,
        codebook_size=4 if tiny else 64,
        hidden_channels=32,
        feature_channels=32,
        num_residual_blocks=1,
    )


@torch.no_grad()
def perturbed(model: VQDrawForImages) -> VQDrawForImages:
    """Perturb every parameter, because initially all steps are zero and all options equal."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def with_dense_options(model: VQDrawForImages) -> VQDrawForImages:
    """Return the same model, with all steps of a stage computed in memory before any is compared."""
    plain = deepcopy(model)
    options = plain.vqdraw.propose
    plain.vqdraw.propose = lambda state, stage: DenseOptions(options(state, stage).all_steps())
    return plain


def training_step(model: VQDrawForImages, pixel_values: Tensor, *, bf16: bool = False) -> Tensor:
    """Run forward and backward; the optimizer's step is the same for all."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(pixel_values).loss
    loss.backward()
    return loss
