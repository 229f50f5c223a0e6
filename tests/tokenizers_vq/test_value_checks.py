import pytest
import torch

from tokenizers_vq.validation import check_code_range, should_validate, skip_validation


def test_what_was_checked_is_not_checked_again():
    codes = torch.tensor([9])
    with skip_validation():
        assert not should_validate(codes)
        check_code_range(codes, 4)
    assert should_validate(codes) and not should_validate(codes[:0])
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\.3, got 9\.\.9"):
        check_code_range(codes, 4)


def test_types_are_checked_nonetheless():
    with skip_validation(), pytest.raises(ValueError, match="codes must be integers, got torch.float32"):
        check_code_range(torch.ones(1), 4)


def test_an_error_ends_it():
    with pytest.raises(RuntimeError), skip_validation():
        raise RuntimeError
    assert should_validate(torch.ones(1))
