"""Run the original's text model: ours, exact and sparse, and unixpickle/vq-draw with the same weights."""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizers_vq.modules.dilated_conv import concat_neighbors, linear_relu
from tokenizers_vq.vqdraw.core import VQDraw
from tokenizers_vq.vqdraw.losses import CrossEntropyLoss
from tokenizers_vq.vqdraw.options import EmbeddedOptions, Options

from ..harness import Comparison, import_peer
from .vqdraw_original import AUX_COEFF, NUM_AUX_OPTIONS, Work, compare_with_original, without_gradient

WIDTH = 128
DILATIONS = (1, 2, 4, 8, 16, 32) * 2
CODEBOOK_SIZE = 64


def comparisons(*, tiny: bool) -> Iterator[Comparison]:
    """Compare decoding, encoding and a training step; without the peer, our sparse form against our exact one."""
    peer = import_peer("vq_draw")
    num_symbols, length, num_stages, batch_size = (20, 16, 2, 2) if tiny else (283, 128, 3, 16)
    torch.manual_seed(0)
    original = None if peer is None else build_original(peer, num_stages, length, num_symbols)
    ours = build_ours(num_stages, length, num_symbols, None if original is None else original.state_dict())
    target = torch.randint(num_symbols, (batch_size, length))
    title = f"text, batch {batch_size}, {num_stages} stages, K={CODEBOOK_SIZE}, {length} of {num_symbols} symbols"
    yield from compare(title, ours, original, target)


def compare(title: str, ours: VQDraw, original: Any, target: Tensor) -> Iterator[Comparison]:
    """Compare the three kinds of work."""
    exact, sparse = deepcopy(ours).train(), deepcopy(ours).train()
    sparse.num_aux_options = NUM_AUX_OPTIONS
    with torch.no_grad():
        codes = ours(target).codes
    work: Work = {
        "decode": {"ours": partial(without_gradient, ours.decode, codes)},
        "encode": {"ours": partial(without_gradient, ours, target)},
        "training step": {
            "exact": partial(training_step, exact, target),
            f"{NUM_AUX_OPTIONS} options": partial(training_step, sparse, target),
        },
    }
    yield from compare_with_original(title, work, original, target, codes, trained=[exact, sparse])


def training_step(model: VQDraw, target: Tensor) -> Tensor:
    """Compute the loss and the gradients of one batch."""
    loss = model.loss(model(target))
    loss.backward()
    return loss


class OriginalTextRefiner(nn.Module):
    """The original's refiner with channels last; its layer norm covers all channels of all positions."""

    def __init__(self, num_stages: int, length: int, num_symbols: int):
        super().__init__()
        self.read = nn.Linear(num_symbols, WIDTH)
        self.positions = nn.Parameter(torch.randn(length, WIDTH))
        self.blocks = nn.ModuleList(OriginalBlock(num_stages, length, dilation) for dilation in DILATIONS)
        self.norm = nn.LayerNorm([length, WIDTH])
        self.features = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Parameter(torch.randn(CODEBOOK_SIZE, num_symbols, WIDTH + 1) * WIDTH**-0.5)
        self.output_scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, state: Tensor, stage: int) -> Options:
        """Refine the state `b t v`: the options of a stage."""
        hidden = F.relu(self.read(state.softmax(dim=2) * state.shape[2] ** 0.5)) + self.positions
        for block in self.blocks:
            hidden = hidden + block(hidden, stage)
        features = linear_relu(self.norm(F.relu(hidden)), self.features.weight, self.features.bias)
        features = F.pad(features, (0, 1), value=1.0) * self.output_scale
        return EmbeddedOptions(features, self.head, None)


class OriginalBlock(nn.Module):
    """Three convolutions, each normalized before and scaled by the stage after.

    The gains are folded into the weights.
    """

    def __init__(self, num_stages: int, length: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        sizes = ((3 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
        norms = (WIDTH, WIDTH, 4 * WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm([length, channels]) for channels in norms)
        self.layers = nn.ModuleList(nn.Linear(inside, outside) for inside, outside in sizes)
        self.gains = nn.ParameterList(torch.randn(num_stages, outside) for _, outside in sizes)

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """Apply the block to `b t c`."""
        x = F.relu(x)
        for number, (norm, layer, gains) in enumerate(zip(self.norms, self.layers, self.gains, strict=True)):
            x = norm(x)
            if number == 0:
                x = concat_neighbors(x, self.dilation)
            linear = F.linear if number == len(self.layers) - 1 else linear_relu
            x = linear(x, layer.weight * gains[stage][:, None], layer.bias * gains[stage])
        return x


def build_ours(num_stages: int, length: int, num_symbols: int, tensors: dict[str, Tensor] | None) -> VQDraw:
    """Build our model, with the original's weights if they are given."""
    model = VQDraw(
        OriginalTextRefiner(num_stages, length, num_symbols),
        CrossEntropyLoss(num_symbols),
        state_shape=(length, num_symbols),
        num_stages=num_stages,
        codebook_size=CODEBOOK_SIZE,
        aux_coeff=AUX_COEFF,
    )
    if tensors is not None:
        model.load_state_dict(convert_state_dict(tensors))
    return model.eval()


def convert_state_dict(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the original's tensors to our names and our order of channels."""
    found = {name.removeprefix("refiner."): tensor for name, tensor in tensors.items()}
    last = f"layers.{len(DILATIONS) + 4}"
    head = torch.cat([found[f"{last}.weight"], found[f"{last}.bias"][:, None, None]], dim=1).squeeze(2)
    ours = {
        "biases": tensors["bias"][None],
        "refiner.read.weight": found["embed.0.weight"].squeeze(2),
        "refiner.read.bias": found["embed.0.bias"],
        "refiner.positions": found["pos_enc"][0].T,
        "refiner.output_scale": found["output_scale"],
        "refiner.head": rearrange(head, "(k v) f -> k v f", k=CODEBOOK_SIZE),
    }
    after = len(DILATIONS)
    for name, layer in (("norm", after + 1), ("features", after + 2)):
        ours |= renamed(found, f"layers.{layer}", f"refiner.{name}")
    for number in range(len(DILATIONS)):
        inside, outside = f"layers.{number}", f"refiner.blocks.{number}"
        for part in range(3):
            ours |= renamed(found, f"{inside}.{4 * part + 1}", f"{outside}.norms.{part}")
            ours |= renamed(found, f"{inside}.{4 * part + 2}", f"{outside}.layers.{part}")
            ours[f"{outside}.gains.{part}"] = found[f"{inside}.{4 * part + 3}.embeddings"]
    return ours


def renamed(found: dict[str, Tensor], inside: str, outside: str) -> dict[str, Tensor]:
    """Return the weight and bias of a layer with channels last: of a convolution `o i p`, or of a layer norm `c t`."""
    weight, bias = found[f"{inside}.weight"], found[f"{inside}.bias"]
    if weight.ndim == 3:
        return {f"{outside}.weight": rearrange(weight, "o i p -> o (p i)"), f"{outside}.bias": bias}
    return {f"{outside}.weight": weight.T, f"{outside}.bias": bias.T}


def build_original(peer: ModuleType, num_stages: int, length: int, num_symbols: int) -> Any:
    """Build the original's model with its own initialization."""
    refiner = peer.TextRefiner(CODEBOOK_SIZE, num_stages, length, num_symbols)
    model = peer.Encoder((length, num_symbols), CODEBOOK_SIZE, refiner, peer.SoftmaxLoss(), num_stages=num_stages)
    nn.init.normal_(model.bias, std=0.3)
    return model
