import pytest
import torch

from tokenizers_vq.validation import check_range, checked_before, worth_checking


def test_what_was_checked_is_not_checked_again():
    codes = torch.tensor([9])
    with checked_before():
        assert not worth_checking(codes)
        check_range(codes, 4)
    assert worth_checking(codes) and not worth_checking(codes[:0])
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\.3, got 9\.\.9"):
        check_range(codes, 4)


def test_types_are_checked_nonetheless():
    with checked_before(), pytest.raises(ValueError, match="codes must be integers, got torch.float32"):
        check_range(torch.ones(1), 4)


def test_an_error_ends_it():
    with pytest.raises(RuntimeError), checked_before():
        raise RuntimeError
    assert worth_checking(torch.ones(1))
