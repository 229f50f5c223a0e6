import pytest
import torch

from tok2img.evaluation.linear_probe import linear_probe


def rows(num: int, *, seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes whose second position tells the class, unless noise hides it."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(8, (num, 3), generator=generator)
    labels = codes[:, 1] // 2
    hidden = torch.rand(num, generator=generator) < noise
    codes[:, 1] = codes[:, 1].where(~hidden, torch.randint(8, (num,), generator=generator))
    return codes, labels


def test_what_one_position_says_is_found():
    assert linear_probe(*rows(300, seed=0, noise=0), *rows(200, seed=1, noise=0), codebook_size=8) == 1.0


def test_noise_costs_what_it_hides():
    accuracy = linear_probe(*rows(2000, seed=0, noise=0.4), *rows(2000, seed=1, noise=0.4), codebook_size=8)
    assert accuracy == pytest.approx(0.6 + 0.4 / 4, abs=0.03)


def test_rows_without_labels_are_refused():
    codes, labels = rows(10, seed=0, noise=0)
    with pytest.raises(ValueError, match="got 10 codes for 9 labels"):
        linear_probe(codes, labels[1:], codes, labels, codebook_size=8)
