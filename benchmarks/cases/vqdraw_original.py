"""Run the published VQ-DRAW models: ours, exact and with sparse gradients, and unixpickle/vq-draw with the same weights."""

import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizers_vq import VQDrawForImages, VQDrawImageConfig

from ..harness import Case, Comparison, import_peer
from .vqdraw import training_step

# Stages and batch that a few seconds suffice for; the published ones differ in the number of stages alone.
SIZES = {"mnist": (10, 32), "svhn": (5, 8), "cifar10": (4, 8), "celeba": (6, 2)}
PEER_REFINERS = {"mnist": "MNISTRefiner", "svhn": "SVHNRefiner", "cifar10": "CIFARRefiner", "celeba": "CelebARefiner"}
NUM_AUX_OPTIONS = 4
AUX_COEFF = 0.01

Work = dict[str, dict[str, Callable[[], object]]]  # by kind and by who does it


def comparisons(*, tiny: bool) -> Iterator[Comparison]:
    """Compare decoding, encoding and a training step of each model; without the peer, against our own plain form."""
    peer = import_peer("vq_draw")
    for name, (num_stages, batch_size) in {"mnist": (2, 2)}.items() if tiny else SIZES.items():
        settings = {"num_stages": num_stages, "segment_length": 0, "checkpoint_stages": False}
        config = VQDrawImageConfig.preset(name, **settings)
        original = None if peer is None else build_original(peer, name, config)
        ours = VQDrawForImages(config).eval() if original is None else same_weights(original)
        pixel_values = torch.rand(batch_size, config.num_channels, config.image_size, config.image_size)
        title = f"{name}, batch {batch_size}, {num_stages} stages, K={config.codebook_size}"
        yield from compare(title, ours, original, pixel_values)


def compare(title: str, ours: VQDrawForImages, original: Any, pixel_values: Tensor) -> Iterator[Comparison]:
    """Compare the three kinds of work for one model."""
    target, codes = ours.normalize(pixel_values), ours.encode(pixel_values)
    sparse = deepcopy(ours).train()
    sparse.vqdraw.num_aux_options = NUM_AUX_OPTIONS
    exact = deepcopy(ours).train()
    work: Work = {
        "decode": {"ours": partial(ours.decode, codes)},
        "encode": {
            "ours": partial(ours.encode, pixel_values),
            "bfloat16": partial(in_bfloat16(ours).encode, pixel_values),
            **{f"beam {beam}": partial(ours.encode, pixel_values, beam_size=beam) for beam in (2, 4)},
        },
        "training step": {
            "exact": partial(training_step, exact, pixel_values),
            f"{NUM_AUX_OPTIONS} options": partial(training_step, sparse, pixel_values),
            f"{NUM_AUX_OPTIONS} options, bfloat16": partial(training_step, sparse, pixel_values, bf16=True),
        },
    }
    yield from compare_with_original(title, work, original, target, codes, trained=[exact, sparse])


def compare_with_original(
    title: str, work: Work, original: Any, target: Tensor, codes: Tensor, *, trained: list[nn.Module]
) -> Iterator[Comparison]:
    """Compare each kind of work with the original's, if it is installed.

    Args:
        title: Title of the comparisons.
        work: Kinds of work and their implementations.
        original: The original's model, or None.
        target: Images or texts.
        codes: Our codes of `target`, `b n`.
        trained: Models whose gradients are cleared before every run.

    Raises:
        ValueError: If the original encodes `target` to other codes.
    """
    if original is not None:
        check_equal_codes(codes, without_gradient(original, target)[0])
        work["decode"]["vq-draw"] = partial(without_gradient, original.decode, codes)
        work["encode"]["vq-draw"] = partial(without_gradient, original, target)
        work["training step"]["vq-draw"] = partial(original_step, original, target)
        trained = [*trained, original]
    setup = partial(clear_gradients, trained)
    for kind, cases in work.items():
        baseline = "vq-draw" if original is not None else next(iter(cases))
        yield Comparison(f"{kind}, {title}", [Case(case, run, setup) for case, run in cases.items()], baseline)


def build_original(peer: ModuleType, name: str, config: VQDrawImageConfig) -> Any:
    """Build the original's model with its own initialization."""
    torch.manual_seed(0)
    refiner = getattr(peer, PEER_REFINERS[name])(config.codebook_size, config.num_stages)
    shape = (config.num_channels, config.image_size, config.image_size)
    model = peer.Encoder(shape, config.codebook_size, refiner, peer.MSELoss(), num_stages=config.num_stages)
    nn.init.normal_(model.bias, std=0.3)
    return model


def same_weights(original: Any) -> VQDrawForImages:
    """Load the original's model from its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in original.state_dict().items()}, path)
        return VQDrawForImages.from_vq_draw_checkpoint(path)


def original_step(model: Any, target: Tensor) -> Tensor:
    """Run the original's loss with the weights of its trainer, and backward."""
    losses = model(target)[-1]
    loss = losses.amin(dim=-1).mean() + AUX_COEFF * losses.mean()
    loss.backward()
    return loss


def in_bfloat16(model: VQDrawForImages) -> VQDrawForImages:
    """Encode in bfloat16."""
    copy = deepcopy(model)
    copy.config.encode_dtype = "bfloat16"
    return copy


@torch.no_grad()
def without_gradient(run: Callable[[Tensor], Any], argument: Tensor) -> Any:
    """Call a function without autograd."""
    return run(argument)


def check_equal_codes(ours: Tensor, peers: Tensor) -> None:
    """Check that codes `b n` are equal, because different results must not be compared."""
    differ = (ours != peers).sum().item()
    if differ:
        raise ValueError(f"{differ} of {ours.numel()} codes are not those of the peer")


def clear_gradients(models: list[nn.Module]) -> None:
    """Clear the gradients of every model, so that a run does not add to those of the last one."""
    for model in models:
        model.zero_grad()
