import math

import pytest
import torch

from tok2img.generation.sampling import Sampling, apply_guidance, slerp_noise, uniform_noise


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (2.5, [2.5] * 5),
        ((1, 3), [1.0, 1.5, 2.0, 2.5, 3.0]),
        ([4, 1, 4], [4.0, 2.5, 1.0, 2.5, 4.0]),
        ((1, 2, 1, 7, 0), [1.0, 2.0, 1.0, 7.0, 0.0]),
        (lambda share: 1 + 4 * share**2, [1.0, 1.25, 2.0, 3.25, 5.0]),
    ],
)
def test_a_guidance_schedule_gives_each_code_its_scale(scale, expected):
    assert Sampling(guidance_scale=scale).guidance_schedule(5) == expected


def test_guidance_schedule_of_one_code_is_its_start():
    assert Sampling(guidance_scale=lambda share: 2 + share).guidance_schedule(1) == [2.0]


@pytest.mark.parametrize("scale", [(), (1, -1), (1, math.nan), "3", ("a", 1), None, {1: 2}])
def test_sampling_with_an_invalid_guidance_scale_raises(scale):
    with pytest.raises(ValueError, match="guidance_scale must be a number"):
        Sampling(guidance_scale=scale)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p"])
@pytest.mark.parametrize("value", ["hot", None, [1]])
def test_sampling_with_settings_that_are_not_numbers_raises(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        Sampling(**{name: value})


def test_more_scales_than_codes_are_refused():
    with pytest.raises(ValueError, match="3 numbers for 2 codes"):
        Sampling(guidance_scale=(1, 2, 3)).guidance_schedule(2)


def test_guidance_function_with_an_invalid_scale_raises():
    with pytest.raises(ValueError, match="guidance_scale must be a number of at least 0, got -1"):
        Sampling(guidance_scale=lambda share: -1).guidance_schedule(2)


def test_guidance_of_one_is_conditional_and_of_zero_unconditional():
    logits = torch.randn(6, 4)
    assert apply_guidance(logits, 1).equal(logits[:3]) and apply_guidance(logits, 0).equal(logits[3:])


def test_slerp_noise_ends_exactly_at_both_streams():
    first, last = uniform_noise(3, [0, 1], 50)
    first[0], last[1] = 0.0, math.nextafter(1, 0)
    path = slerp_noise(first, last, 7)
    assert path[0].equal(first) and path[-1].equal(last) and path.shape == (7, 50)
    assert (path >= 0).all() and (path < 1).all()


def test_every_step_of_slerp_noise_is_uniform():
    first, last = uniform_noise(0, [0, 1], 20_000)
    for step in slerp_noise(first, last, 5):
        counts = torch.histc(step, bins=10, min=0, max=1)
        assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # 99.9 % of samples with 9 degrees of freedom lie below


def test_adjacent_steps_of_slerp_noise_are_nearer_than_its_ends():
    first, last = uniform_noise(0, [0, 1], 500)
    path = slerp_noise(first, last, 11)
    assert (path[1:] - path[:-1]).abs().mean(dim=1).max() < 0.3 * (first - last).abs().mean()


def test_slerp_noise_with_one_step_raises():
    with pytest.raises(ValueError, match="at least 2 steps"):
        slerp_noise(torch.rand(3), torch.rand(3), 1)
