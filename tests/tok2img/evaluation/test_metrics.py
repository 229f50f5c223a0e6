import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tok2img.evaluation.metrics import (
    caption_accuracy,
    caption_agreement,
    code_histogram,
    evaluate_tokenizer,
    frechet_distance,
    memorization_rate,
    unigram_entropy,
)


class BrightnessTokenizer(nn.Module):
    """Each quadrant of an image becomes the nearest of `codebook_size` evenly spaced grays."""

    num_codes = 4
    device = torch.device("cpu")

    def __init__(self, codebook_size: int = 5, groups: tuple[int, ...] = (4,), overshoot: float = 0.0) -> None:
        super().__init__()
        self.codebook_size, self.positions_per_codebook, self.overshoot = codebook_size, groups, overshoot
        self.eval()

    def encode(self, pixel_values: Tensor) -> Tensor:
        quadrants = rearrange(pixel_values, "b c (p h) (q w) -> b (p q) (c h w)", p=2, q=2)
        return (quadrants.mean(dim=2) * (self.codebook_size - 1)).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        grays = rearrange(codes / (self.codebook_size - 1) + self.overshoot, "b (p q) -> b 1 p q", p=2)
        return grays.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)

    def decode_progressively(self, codes: Tensor) -> Iterator[Tensor]:
        yield self.decode(codes)


@pytest.fixture
def pil_images() -> Tensor:
    """Images `b c h w` that the tokenizer reproduces exactly: position n of image b shows code (b + n) % 5."""
    return BrightnessTokenizer().decode((torch.arange(10)[:, None] + torch.arange(4)) % 5)


def test_evaluate_tokenizer_with_exact_reconstructions_has_no_error(pil_images: Tensor) -> None:
    metrics = evaluate_tokenizer(BrightnessTokenizer(), [pil_images])
    assert (metrics["mse"], metrics["psnr"]) == (0, math.inf)
    assert metrics["ssim"] == pytest.approx(1)


def test_mse_and_psnr_measure_a_known_offset(pil_images: Tensor) -> None:
    metrics = evaluate_tokenizer(BrightnessTokenizer(), [pil_images.clamp(0.1, 0.9)])
    assert metrics["mse"] == pytest.approx(0.4 * 0.1**2)  # two of the five grays are 0.1 off
    assert metrics["psnr"] == pytest.approx(-10 * math.log10(0.004), rel=1e-5)


def test_reconstructions_are_clamped_before_they_are_measured(pil_images: Tensor) -> None:
    white = torch.ones_like(pil_images)
    assert evaluate_tokenizer(BrightnessTokenizer(overshoot=0.5), [white])["mse"] == 0


def test_metrics_do_not_depend_on_how_images_are_batched(pil_images: Tensor) -> None:
    noisy = (pil_images + 0.05 * torch.rand(pil_images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    whole = evaluate_tokenizer(BrightnessTokenizer(), [noisy])
    assert evaluate_tokenizer(BrightnessTokenizer(), noisy.split([3, 6, 1])) == pytest.approx(whole, rel=1e-4)


def test_ssim_is_left_out_without_torchmetrics(pil_images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "ssim" not in evaluate_tokenizer(BrightnessTokenizer(), [pil_images])


def test_shared_codes_are_counted_together(pil_images: Tensor) -> None:
    metrics = evaluate_tokenizer(BrightnessTokenizer(codebook_size=5), [pil_images[:1]])
    assert metrics["code_usage"] == pytest.approx(4 / 5)
    assert metrics["perplexity"] == pytest.approx(4)
    assert not [name for name in metrics if name.endswith(("_per_position", "_per_group"))]


def test_codes_of_their_own_positions_are_counted_apart(pil_images: Tensor) -> None:
    metrics = evaluate_tokenizer(BrightnessTokenizer(groups=(1, 1, 1, 1)), [pil_images[:2], pil_images[2:4]])
    assert metrics["code_usage"] == pytest.approx(4 / 5)
    assert metrics["perplexity"] == pytest.approx(4)
    assert metrics["entropy_per_position"] == pytest.approx([math.log(4)] * 4)


def test_codes_of_groups_are_counted_by_group(pil_images: Tensor) -> None:
    metrics = evaluate_tokenizer(BrightnessTokenizer(groups=(1, 3)), [pil_images[:1], pil_images[5:6]])
    assert metrics["code_usage"] == pytest.approx((1 + 3) / 10)
    assert metrics["perplexity"] == pytest.approx((1 + 3) / 2)
    assert metrics["entropy_per_group"] == pytest.approx([0, math.log(3)])
    assert metrics["used_per_group"] == [1, 3] and "used_per_position" not in metrics


def test_bits_per_image_follow_from_length_and_codebook(pil_images: Tensor) -> None:
    assert evaluate_tokenizer(BrightnessTokenizer(), [pil_images])["bits_per_image"] == pytest.approx(4 * math.log2(5))


def test_a_tokenizer_in_training_mode_is_refused(pil_images: Tensor) -> None:
    with pytest.raises(ValueError, match="eval()"):
        evaluate_tokenizer(BrightnessTokenizer().train(), [pil_images])


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batch"):
        evaluate_tokenizer(BrightnessTokenizer(), [])


def test_frechet_distance_of_equal_sets_is_zero() -> None:
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_equal_sets_is_zero_with_fewer_rows_than_features() -> None:
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_shifted_sets_is_the_squared_shift() -> None:
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features + torch.tensor([1.0, 2.0, 2.0])) == pytest.approx(9, rel=1e-5)


def test_frechet_distance_of_commuting_covariances_is_that_of_their_deviations() -> None:
    # |m|^2 + sum (sigma_a - sigma_b)^2, for scalings along the axes
    basis = torch.linalg.qr(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    white = torch.linalg.qr(basis - basis.mean(dim=0))[0] * math.sqrt(39)
    scale_a, scale_b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5])
    assert frechet_distance(white * scale_a, white * scale_b + 1) == pytest.approx(3 + 1 + 2.5**2)


def test_frechet_distance_equals_the_formula_with_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(60, 4, generator=generator).double() @ torch.randn(4, 4, generator=generator).double() for _ in "ab"
    )
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.sqrt()
    expected = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov()).trace() - 2 * roots.sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item())


def test_frechet_distance_needs_two_rows() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(torch.ones(1, 3), torch.ones(5, 3))


def test_memorization_rate_counts_whole_rows() -> None:
    training = torch.tensor([[1, 2, 3], [4, 5, 6]])
    codes = torch.tensor([[1, 2, 3], [4, 5, 7], [2, 3, 4], [4, 5, 6]])
    assert memorization_rate(codes, training) == 0.5


def test_memorization_rate_ignores_the_integer_type() -> None:
    codes = torch.tensor([[1, 255, 0], [0, 1, 0]])
    assert memorization_rate(codes, codes.to(torch.uint8)) == 1
    assert memorization_rate(codes.to(torch.uint8), codes[:1].to(torch.int16)) == 0.5


def test_memorization_rate_with_rows_of_other_length_raises() -> None:
    with pytest.raises(ValueError, match="one length"):
        memorization_rate(torch.zeros(2, 3), torch.zeros(2, 4))


def test_unigram_entropy_tells_positions_apart_unless_they_share_codes() -> None:
    codes = torch.tensor([[0, 1], [0, 1]])
    assert unigram_entropy(codes, codebook_size=2, groups=(1, 1)) == 0
    assert unigram_entropy(codes, codebook_size=2, groups=(2,)) == pytest.approx(math.log(2))


def test_unigram_entropy_is_a_mean_over_positions() -> None:
    codes = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 1]])
    assert unigram_entropy(codes, codebook_size=2, groups=(1, 3)) == pytest.approx(3 / 4 * math.log(2))


def test_a_histogram_has_a_row_for_each_group() -> None:
    histogram = code_histogram(torch.tensor([[0, 2, 2], [1, 2, 0]]), codebook_size=3, groups=(1, 2))
    assert histogram.tolist() == [[1, 1, 0], [1, 0, 3]]


@pytest.mark.parametrize("code", [-1, 3])
def test_codes_out_of_range_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match="Expected codes from 0 to 2"):
        code_histogram(torch.tensor([[0, code]]), codebook_size=3, groups=(1, 1))


def test_caption_accuracy_is_the_share_that_the_verifier_accepts() -> None:
    images, captions = ["red", "blue", "red", "red"], ["red", "red", "red", "blue"]
    assert caption_accuracy(images, captions, lambda image, caption: image == caption) == 0.5


def test_caption_accuracy_refuses_captions_that_do_not_pair_up() -> None:
    with pytest.raises(ValueError, match="1 images and 2 captions"):
        caption_accuracy(["red"], ["red", "blue"], lambda image, caption: True)


def test_evaluate_tokenizer_with_stages_measures_every_stage(tiny_vqdraw, images):
    report = evaluate_tokenizer(tiny_vqdraw, images.split(4))
    codes = tiny_vqdraw.encode(images)
    expected = [(tiny_vqdraw.decode(codes[:, :count]) - images).square().mean().item() for count in (1, 2, 3, 4)]
    assert report["mse_per_stage"] == pytest.approx(expected, rel=1e-4) and report["mse"] == report["mse_per_stage"][-1]
    assert report["psnr_per_stage"] == pytest.approx([-10 * math.log10(error) for error in expected], rel=1e-4)
    assert report["used_per_position"] == [len(stage.unique()) for stage in codes.T]


class Extremes(TorchDispatchMode):
    """Counts how often values are looked at for their range, each of which a GPU would have the CPU wait for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.aminmax.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokenizer", ["tiny_vqdraw", "tiny_vqvae"])
def test_evaluate_tokenizer_validates_each_batch_once_and_codes_never(tokenizer, images, request):
    image_tokenizer = request.getfixturevalue(tokenizer)
    with Extremes() as looks:
        evaluate_tokenizer(image_tokenizer, images.split(4))
    assert looks.count == len(images.split(4)) > 1


def test_evaluate_tokenizer_with_non_finite_images_raises(tiny_vqdraw, images):
    with pytest.raises(ValueError, match="got NaN or infinity"):
        evaluate_tokenizer(tiny_vqdraw, [images, images.clone().fill_(math.nan)])
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\."):  # no check is left out afterwards
        tiny_vqdraw.decode(tiny_vqdraw.encode(images) - 1000)


class TestCaptionAgreement:
    PAD = 9
    CAPTIONS = torch.tensor([[1, 2, 9, 9], [3, 9, 9, 9], [4, 5, 6, 7], [9, 9, 9, 9]])

    def test_the_same_captions_agree_wholly(self):
        agreement = caption_agreement(self.CAPTIONS, self.CAPTIONS, pad_id=self.PAD)
        assert agreement == {"caption_exact_match": 1.0, "caption_token_accuracy": 1.0}

    def test_tokens_count_up_to_the_pad_that_ends_a_caption(self):
        """3 + 2 + 4 + 1 tokens count; wrong are one of the first caption, the end of the second and nothing else."""
        written = torch.tensor([[1, 8, 9, 9], [3, 3, 3, 9], [4, 5, 6, 7], [9, 9, 9, 9]])
        agreement = caption_agreement(self.CAPTIONS, written, pad_id=self.PAD)
        assert agreement == {"caption_exact_match": 0.5, "caption_token_accuracy": 0.8}

    def test_captions_of_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"got captions \(4, 4\) and written ones \(3, 4\)"):
            caption_agreement(self.CAPTIONS, self.CAPTIONS[:3], pad_id=self.PAD)
