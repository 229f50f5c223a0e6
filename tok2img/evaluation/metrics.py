"""Metrics of image tokenizers, and of the images and captions that a prior generates.

Sums stay on the device until the last batch, so measuring does not synchronize after every batch.
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
    """Measure the reconstruction error and the code usage of an image tokenizer.

    Args:
        image_tokenizer: Tokenizer in eval mode.
        batches: Pixel values, `b c h w` in [0, 1]. They are moved to the tokenizer's device.

    Returns:
        A dictionary with these entries.

        - `mse`: Mean squared error of a pixel, in units of the full range [0, 1].
        - `psnr`: Peak signal-to-noise ratio in dB, from that mean; infinite if the MSE is 0.
        - `ssim`: Structural similarity (Wang et al. 2004). Only with torchmetrics, of the extra `[eval]`.
        - `bits_per_image`: `num_codes * log2(codebook_size)`.
        - `code_usage`: Fraction of the codes used at least once, averaged over codebooks.
        - `perplexity`: Exponential of the entropy of the codes, averaged over codebooks.
        - `entropy_per_position` (nats), `used_per_position` (codes used at least once): Only if
        each position has its own
          codebook.
        - `entropy_per_group`, `used_per_group`: The same, if groups of several positions share a codebook.
        - `mse_per_stage`, `psnr_per_stage`: After each code. Only if prefixes of the codes decode.

    Raises:
        ValueError: For a tokenizer in training mode, no batch, or pixel values that are not finite.
    """
    return measure_tokenizer(image_tokenizer, batches)[0]


@torch.inference_mode()
def measure_tokenizer(
    image_tokenizer: "DiscreteTokenizer", batches: Iterable[Tensor]
) -> tuple[dict[str, float | list[float]], Tensor]:
    """Return the report of `evaluate_tokenizer`, and the code counts `g k` of `code_histogram`."""
    if image_tokenizer.training:
        raise ValueError("Expected an image tokenizer in eval mode, got one in training mode. Call its .eval() first.")
    groups, device = image_tokenizer.positions_per_codebook, image_tokenizer.device
    histogram = torch.zeros(len(groups), image_tokenizer.codebook_size, dtype=torch.int64, device=device)
    starts = range_starts(groups, image_tokenizer.codebook_size, device)
    fidelities, sizes = [], []
    for pixel_values in batches:
        check_pixel_range(
            pixel_values
        )  # before the move to the device, because on a CPU the check needs no synchronization
        with skip_validation():
            fidelities.append(_fidelity(image_tokenizer, pixel_values.to(device), histogram, starts))
        sizes.append(len(pixel_values))
    if not sizes:
        raise ValueError("Expected at least one batch of images, got no batch.")
    # Each batch counts by its size, so that the batching does not change the result.
    weights = torch.tensor(sizes).double()
    values = {name: torch.stack([each[name] for each in fidelities]).cpu().double() for name in fidelities[0]}
    means = {name: (weights @ value / sum(sizes)).tolist() for name, value in values.items()}
    errors = means.pop("mse_per_stage")
    psnrs = [-10 * math.log10(error) if error > 0 else math.inf for error in errors]
    bits = image_tokenizer.num_codes * math.log2(image_tokenizer.codebook_size)
    report = {"mse": errors[-1], **{name: mean[0] for name, mean in means.items()}, "psnr": psnrs[-1]}
    stages = {"mse_per_stage": errors, "psnr_per_stage": psnrs} if len(errors) > 1 else {}
    return {**report, "bits_per_image": bits, **_usage(histogram, groups), **stages}, histogram


def code_histogram(codes: Tensor, *, codebook_size: int, groups: tuple[int, ...]) -> Tensor:
    """Count how often each code is used, for each group of positions that share a codebook.

    Args:
        codes: Codes, `b n`.
        codebook_size: Number of values that a code can take.
        groups: Number of positions in each group, see `DiscreteTokenizer.positions_per_codebook`.

    Returns:
        Counts, `g k` int64.
    """
    if codes.min() < 0 or codes.max() >= codebook_size:
        raise ValueError(f"Expected codes from 0 to {codebook_size - 1}, got {codes.min()} to {codes.max()}.")
    histogram = torch.zeros(len(groups), codebook_size, dtype=torch.int64, device=codes.device)
    _count(histogram, codes, range_starts(groups, codebook_size, codes.device))
    return histogram


def unigram_entropy(codes: Tensor, *, codebook_size: int, groups: tuple[int, ...]) -> float:
    """Return the mean entropy of a code in nats: the loss of a prior that knows only the position's group.

    Args:
        codes: Codes, `b n`.
        codebook_size: Number of values that a code can take.
        groups: Number of positions in each group that shares a codebook.
    """
    entropies = _entropies(code_histogram(codes, codebook_size=codebook_size, groups=groups))
    lengths = torch.tensor(groups).double()
    return (entropies @ lengths / lengths.sum()).item()


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Compute the Fréchet distance of two sets of features (Dowson & Landau 1982; Heusel et al. 2017, equation 6).

    It is the distance of the Gaussians fitted to them. No matrix root is computed: with covariances R^T R, the
    eigenvalues of their product are the squared singular values of R_a R_b^T. The trace of its square root is the sum
    of these singular values, and equal sets have a distance of 0 up to rounding.

    Args:
        features_a: Features, `n d` with n at least 2, and much larger than d for a meaningful result.
        features_b: Features, `m d`, likewise.
    """
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(
            f"Expected at least 2 rows of features on each side, got {len(features_a)} and {len(features_b)}."
        )
    mean_a, root_a = _gaussian(features_a)
    mean_b, root_b = _gaussian(features_b)
    trace_of_root = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * trace_of_root
    return distance.item()


def memorization_rate(codes: Tensor, training_codes: Tensor) -> float:
    """Return the fraction of images whose codes repeat those of a training image exactly.

    Args:
        codes: Codes of generated images, `b n`.
        training_codes: Codes of the training images, `m n`.
    """
    if codes.shape[1:] != training_codes.shape[1:] or len(codes) == 0:
        shapes = f"codes {tuple(codes.shape)} and training codes {tuple(training_codes.shape)}"
        raise ValueError(f"Expected rows of one length and at least one row of codes, got {shapes}.")
    dtype = torch.promote_types(codes.dtype, training_codes.dtype)
    training_rows = set(_rows_as_bytes(training_codes, dtype))
    return sum(row in training_rows for row in _rows_as_bytes(codes, dtype)) / len(codes)


def caption_accuracy(
    images: Sequence[Image.Image], captions: Sequence[str], verify: Callable[[Image.Image, str], bool]
) -> float:
    """Return the fraction of images that show their caption.

    Args:
        images: Generated images.
        captions: The caption of each image.
        verify: Function of an image and a caption; returns True if the image shows the caption.
    """
    if len(images) != len(captions) or not images:
        raise ValueError(
            f"Expected as many images as captions, at least 1, got {len(images)} images and {len(captions)} captions."
        )
    return sum(verify(image, caption) for image, caption in zip(images, captions, strict=True)) / len(images)


def caption_agreement(text_ids: Tensor, written: Tensor, *, pad_id: int) -> dict[str, float]:
    """Compare captions that a prior wrote with those of the data.

    Args:
        text_ids: Captions of the data, `b t`, right-padded.
        written: Captions of the prior for the same images, `b t`, right-padded.
        pad_id: Id of [PAD].

    Returns:
        `caption_exact_match`, the fraction of captions with the same tokens, and `caption_token_accuracy`, the fraction
        of the data's tokens that are predicted at their position. The first [PAD] after a caption counts as a token.
    """
    if text_ids.shape != written.shape or len(text_ids) == 0:
        raise ValueError(
            f"Expected captions of one shape, got captions {tuple(text_ids.shape)} and written ones {tuple(written.shape)}."
        )
    is_right, is_pad = text_ids == written, text_ids == pad_id
    # Up to and including the first [PAD], which says where the caption ends.
    counted = is_pad.cumsum(dim=1) - is_pad.long() == 0
    return {
        "caption_exact_match": is_right.all(dim=1).double().mean().item(),
        "caption_token_accuracy": is_right[counted].double().mean().item(),
    }


def _count(histogram: Tensor, codes: Tensor, starts: Tensor) -> None:
    """Add codes to a histogram in place.

    Args:
        histogram: Counts, `g k`.
        codes: Codes, `b n`.
        starts: Index in the flat histogram at which the row of each position starts, `n`.
    """
    # `bincount` would synchronize with the device, to learn the size of its result.
    flat = rearrange(codes + starts, "b n -> (b n)")
    histogram.view(-1).scatter_add_(0, flat, torch.ones_like(flat))


def _entropies(histogram: Tensor) -> Tensor:
    """Return the entropy of each row of counts `g k` in nats, `g` float64 on the CPU."""
    counts = histogram.cpu().double()
    return torch.special.entr(counts / reduce(counts, "g k -> g 1", "sum")).sum(dim=1)


def _usage(histogram: Tensor, groups: tuple[int, ...]) -> dict[str, float | list[float]]:
    """Return the entries of `evaluate_tokenizer` about code usage, from counts `g k`."""
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
    """Measure the error of one batch, and add its codes to `histogram`.

    Args:
        image_tokenizer: The tokenizer.
        pixel_values: Images, `b c h w`.
        histogram: Counts, `g k`.
        starts: As in `_count`, `n`.

    Returns:
        `mse_per_stage`, `s`, and if torchmetrics is installed `ssim`, `1`.
    """
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


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean `d` of features `n d`, and R `d d` with R^T R their covariance, in float64 on the CPU."""
    features = features.cpu().double()
    mean = reduce(features, "n d -> d", "mean")
    _, root = torch.linalg.qr((features - mean) / math.sqrt(len(features) - 1), mode="r")
    return mean, root


def _rows_as_bytes(codes: Tensor, dtype: torch.dtype) -> list[bytes]:
    """Return each row of codes `b n` as bytes, which are hashable."""
    content = codes.to(dtype).cpu().numpy().tobytes()
    row_size = codes.shape[1] * dtype.itemsize
    return [content[start : start + row_size] for start in range(0, len(content), row_size)]
