"""Numbers about image tokenizers, and about the images that a prior draws and the captions that it writes.

Sums stay on the device until the last batch is through, so measuring never waits for a single step.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor

from tokenizers_vq.images.normalization import check_pixel_range
from tokenizers_vq.validation import skip_validation

from ..tokenization.layout import range_starts

if TYPE_CHECKING:
    from tokenizers_vq.base import DiscreteTokenizer


def evaluate_tokenizer(
    image_tokenizer: "DiscreteTokenizer", batches: Iterable[Tensor]
) -> dict[str, float | list[float]]:
    """Measure how well images survive their codes, and how well the codes are used.

    Args:
        image_tokenizer: in eval mode
        batches: pixel values `b c h w` in [0, 1]; moved to the tokenizer's device

    Returns:
        mse: mean squared error of a pixel, in units of the full range [0, 1]
        psnr: dB, from that mean; infinite when the mse is 0
        ssim: structural similarity (Wang et al. 2004); only with torchmetrics, of the extra `[eval]`
        bits_per_image: `num_codes * log2(codebook_size)`
        code_usage: share of the codes used at least once
        perplexity: exp of the entropy of the codes; like the usage a mean over groups of positions with codes of their own
        entropy_per_position: nats; used_per_position: codes used at least once; only when each position has codes of its own
        entropy_per_group, used_per_group: the same where groups of several positions do
        mse_per_stage, psnr_per_stage: after each code; only where an image sharpens code by code
    """
    return measure_tokenizer(image_tokenizer, batches)[0]


@torch.inference_mode()
def measure_tokenizer(
    image_tokenizer: "DiscreteTokenizer", batches: Iterable[Tensor]
) -> tuple[dict[str, float | list[float]], Tensor]:
    """What `evaluate_tokenizer` returns, and the counts behind it: how often each code was used, as `code_histogram` has them."""
    if image_tokenizer.training:
        raise ValueError("got an image tokenizer in training mode; call its .eval() before measuring it")
    groups, device = image_tokenizer.positions_per_codebook, image_tokenizer.device
    histogram = torch.zeros(len(groups), image_tokenizer.codebook_size, dtype=torch.int64, device=device)
    starts = range_starts(groups, image_tokenizer.codebook_size, device)
    fidelities, sizes = [], []
    for pixel_values in batches:
        check_pixel_range(pixel_values)  # here, where those that wait on the CPU can be looked at for nothing
        with skip_validation():
            fidelities.append(_fidelity(image_tokenizer, pixel_values.to(device), histogram, starts))
        sizes.append(len(pixel_values))
    if not sizes:
        raise ValueError("got no batch of images to evaluate")
    means = {name: _weighted_mean([fidelity[name] for fidelity in fidelities], sizes) for name in fidelities[0]}
    errors = means.pop("mse_per_stage")
    psnrs = [-10 * math.log10(error) if error > 0 else math.inf for error in errors]
    bits = image_tokenizer.num_codes * math.log2(image_tokenizer.codebook_size)
    report = {"mse": errors[-1], **{name: mean[0] for name, mean in means.items()}, "psnr": psnrs[-1]}
    stages = {"mse_per_stage": errors, "psnr_per_stage": psnrs} if len(errors) > 1 else {}
    return {**report, "bits_per_image": bits, **_usage(histogram, groups), **stages}, histogram


def code_histogram(codes: Tensor, *, codebook_size: int, groups: tuple[int, ...]) -> Tensor:
    """Count each code of `codes` (`b n`): a row for each group of positions that share codes, `g k`."""
    if codes.min() < 0 or codes.max() >= codebook_size:
        raise ValueError(f"got codes from {codes.min()} to {codes.max()}, expected 0 to {codebook_size - 1}")
    histogram = torch.zeros(len(groups), codebook_size, dtype=torch.int64, device=codes.device)
    _count(histogram, codes, range_starts(groups, codebook_size, codes.device))
    return histogram


def unigram_entropy(codes: Tensor, *, codebook_size: int, groups: tuple[int, ...]) -> float:
    """Mean entropy in nats of a code of `codes` (`b n`): the loss of a prior that sees nothing but the position's group."""
    entropies = _entropies(code_histogram(codes, codebook_size=codebook_size, groups=groups))
    lengths = torch.tensor(groups).double()
    return (entropies @ lengths / lengths.sum()).item()


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Distance of the gaussians fitted to two sets of features (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    With covariances R^T R, the eigenvalues of their product are the squared singular values of R_a R_b^T, so the
    trace of its square root is their sum: no matrix root, and exactly 0 distance survives rounding.

    Args:
        features_a: `n d`
        features_b: `m d`; both need at least two rows, and many more than d to mean anything
    """
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(f"got {len(features_a)} and {len(features_b)} feature rows, each side needs at least 2")
    mean_a, root_a = _gaussian(features_a)
    mean_b, root_b = _gaussian(features_b)
    trace_of_root = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * trace_of_root
    return distance.item()


def memorization_rate(codes: Tensor, training_codes: Tensor) -> float:
    """Share of the rows of `codes` (`b n`) that occur exactly in `training_codes` (`m n`)."""
    if codes.shape[1:] != training_codes.shape[1:] or len(codes) == 0:
        shapes = f"codes {tuple(codes.shape)} and training codes {tuple(training_codes.shape)}"
        raise ValueError(f"got {shapes}, expected rows of one length, and at least one row of codes")
    dtype = torch.promote_types(codes.dtype, training_codes.dtype)
    known = set(_rows_as_bytes(training_codes, dtype))
    return sum(row in known for row in _rows_as_bytes(codes, dtype)) / len(codes)


def caption_accuracy(
    images: Sequence[Image.Image], captions: Sequence[str], verify: Callable[[Image.Image, str], bool]
) -> float:
    """Share of the images that `verify` finds to show what their caption says."""
    if len(images) != len(captions) or not images:
        raise ValueError(f"got {len(images)} images and {len(captions)} captions, expected equally many, at least 1")
    return sum(verify(image, caption) for image, caption in zip(images, captions, strict=True)) / len(images)


def caption_agreement(text_ids: Tensor, written: Tensor, *, pad_id: int) -> dict[str, float]:
    """How far captions that a prior wrote, `b t`, are those of the data, `b t`, both filled with [PAD].

    Returns:
        caption_exact_match: share of the captions that are the same to the last token
        caption_token_accuracy: share of the data's tokens, with the [PAD] that ends a caption, that stand at their place
    """
    if text_ids.shape != written.shape or len(text_ids) == 0:
        raise ValueError(
            f"got captions {tuple(text_ids.shape)} and written ones {tuple(written.shape)}, expected alike"
        )
    right, is_pad = text_ids == written, text_ids == pad_id
    counted = is_pad.cumsum(dim=1) - is_pad.long() == 0
    return {
        "caption_exact_match": right.all(dim=1).double().mean().item(),
        "caption_token_accuracy": right[counted].double().mean().item(),
    }


def _count(histogram: Tensor, codes: Tensor, starts: Tensor) -> None:
    """Add `codes` (`b n`) to `histogram` (`g k`), each in the row that starts at `starts` (`n`); `bincount` would wait for the device."""
    flat = rearrange(codes + starts, "b n -> (b n)")
    histogram.view(-1).scatter_add_(0, flat, torch.ones_like(flat))


def _entropies(histogram: Tensor) -> Tensor:
    """Entropy of each row of counts `p k`, in nats: `p`, float64 on the CPU."""
    counts = histogram.cpu().double()
    return torch.special.entr(counts / reduce(counts, "p k -> p 1", "sum")).sum(dim=1)


def _usage(histogram: Tensor, groups: tuple[int, ...]) -> dict[str, float | list[float]]:
    entropies = _entropies(histogram)
    used = (histogram > 0).double().mean().item()
    usage: dict[str, float | list[float]] = {"code_usage": used, "perplexity": entropies.exp().mean().item()}
    if len(groups) > 1:
        kind = "position" if max(groups) == 1 else "group"
        usage[f"entropy_per_{kind}"] = entropies.tolist()
        usage[f"used_per_{kind}"] = (histogram > 0).sum(dim=1).double().tolist()
    return usage


def _fidelity(
    image_tokenizer: "DiscreteTokenizer", pixel_values: Tensor, histogram: Tensor, starts: Tensor
) -> dict[str, Tensor]:
    """Measure one batch `b c h w` and add its codes to `histogram`, see `_count`."""
    codes = image_tokenizer.encode(pixel_values)
    reconstruction, errors = pixel_values, []
    for stage in image_tokenizer.decode_progressively(codes):
        reconstruction = stage.clamp(0, 1)
        errors.append(F.mse_loss(reconstruction, pixel_values))
    _count(histogram, codes, starts)
    fidelity = {"mse_per_stage": torch.stack(errors)}
    if importlib.util.find_spec("torchmetrics") is not None:
        from torchmetrics.functional.image import structural_similarity_index_measure

        similarity = structural_similarity_index_measure(reconstruction, pixel_values, data_range=1.0)
        assert isinstance(similarity, Tensor)
        fidelity["ssim"] = similarity[None]
    return fidelity


def _weighted_mean(values: list[Tensor], weights: list[int]) -> list[float]:
    """Mean over batches of their values `s`, each by the size of its batch."""
    return (torch.tensor(weights).double() @ torch.stack(values).cpu().double() / sum(weights)).tolist()


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `d` of features `n d`, and an R with R^T R their covariance; float64 on the CPU."""
    features = features.cpu().double()
    mean = reduce(features, "n d -> d", "mean")
    _, root = torch.linalg.qr((features - mean) / math.sqrt(len(features) - 1), mode="r")
    return mean, root


def _rows_as_bytes(codes: Tensor, dtype: torch.dtype) -> list[bytes]:
    content = codes.to(dtype).cpu().numpy().tobytes()
    row_size = codes.shape[1] * dtype.itemsize
    return [content[start : start + row_size] for start in range(0, len(content), row_size)]
