import math

import pytest
import torch

from tokenizers_vq.validation import all_finite, check_code_range, did_you_mean, should_validate, skip_validation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 5, 11])
def test_all_finite_with_one_non_finite_value_is_false(dtype, value, position):
    values = torch.linspace(-3, 3, 12, dtype=dtype)
    assert all_finite(values.view(3, 4))
    values[position] = value
    assert not all_finite(values.view(3, 4))


def test_all_finite_of_no_values_or_the_largest_numbers_is_true():
    largest = torch.finfo(torch.float32).max
    assert all_finite(torch.empty(0, 3)) and all_finite(torch.tensor([largest, largest, -largest]))


def test_did_you_mean_names_the_nearest_or_nothing():
    assert did_you_mean("codebok_size", ["code_dim", "codebook_size"]) == "did you mean 'codebook_size'?"
    assert did_you_mean("zzz", ["code_dim", "codebook_size"]) == ""


def test_skip_validation_suspends_range_checks():
    codes = torch.tensor([9])
    with skip_validation():
        assert not should_validate(codes)
        check_code_range(codes, 4)
    assert should_validate(codes) and not should_validate(codes[:0])
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\.3, got 9\.\.9"):
        check_code_range(codes, 4)


def test_skip_validation_does_not_suspend_dtype_checks():
    with skip_validation(), pytest.raises(ValueError, match="codes must be integers, got torch.float32"):
        check_code_range(torch.ones(1), 4)


def test_skip_validation_ends_with_an_error():
    with pytest.raises(RuntimeError), skip_validation():
        raise RuntimeError
    assert should_validate(torch.ones(1))
