import math

import pytest
import torch

from tokenizers_vq.validation import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_one_value_that_is_none_is_found_wherever_it_is(dtype, value, place):
    values = torch.linspace(-3, 3, 12, dtype=dtype)
    assert all_finite(values.view(3, 4))
    values[place] = value
    assert not all_finite(values.view(3, 4))


def test_nothing_and_the_largest_numbers_are_finite():
    largest = torch.finfo(torch.float32).max
    assert all_finite(torch.empty(0, 3)) and all_finite(torch.tensor([largest, largest, -largest]))
