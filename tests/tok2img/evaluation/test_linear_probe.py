import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn, of the extra `eval`, is not installed")
from tok2img.evaluation.linear_probe import linear_probe


def rows(num: int, *, seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `b 3` whose second position determines the class, unless noise hides it, and classes `b`."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(8, (num, 3), generator=generator)
    labels = codes[:, 1] // 2
    hidden = torch.rand(num, generator=generator) < noise
    codes[:, 1] = codes[:, 1].where(~hidden, torch.randint(8, (num,), generator=generator))
    return codes, labels


def test_linear_probe_finds_the_class_in_a_single_position():
    assert linear_probe(*rows(300, seed=0, noise=0), *rows(200, seed=1, noise=0), codebook_size=8) == 1.0


def test_linear_probe_with_noisy_codes_misses_the_hidden_classes():
    accuracy = linear_probe(*rows(2000, seed=0, noise=0.4), *rows(2000, seed=1, noise=0.4), codebook_size=8)
    assert accuracy == pytest.approx(0.6 + 0.4 / 4, abs=0.03)


def test_linear_probe_without_labels_for_all_codes_raises():
    codes, labels = rows(10, seed=0, noise=0)
    with pytest.raises(ValueError, match="got 10 codes for 9 labels"):
        linear_probe(codes, labels[1:], codes, labels, codebook_size=8)
