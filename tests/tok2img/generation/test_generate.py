import math

import pytest
import torch
from transformers import LogitsProcessorList

from tok2img.generation import generate as generation
from tok2img.generation.generate import LayoutLogitsProcessor, generate
from tok2img.generation.sampling import Sampling, sample_codes, top_k_top_p_filter, uniform_noise

GREEDY = Sampling(temperature=0.0)
only_qwen = pytest.mark.parametrize("architecture", ["qwen3"], indirect=True)


@pytest.fixture
def text_ids(layout) -> torch.Tensor:
    """Texts of every length, so that every padding occurs."""
    pad = layout.pad_id
    return torch.tensor(
        [[1, 5, 10], [3, 3, pad], [7, pad, pad], [pad, pad, pad], [0, 2, 9], [10, 10, 10], [4, pad, pad], [6, 1, pad]]
    )


@pytest.fixture
def logits_drawn_from(monkeypatch) -> list[torch.Tensor]:
    """The logits of every step, after guidance."""
    seen: list[torch.Tensor] = []

    def spy(logits, uniforms, sampling):
        seen.append(logits)
        return sample_codes(logits, uniforms, sampling)

    monkeypatch.setattr(generation, "sample_codes", spy)
    return seen


def teacher_forced(prior, layout, text_ids, codes) -> list[torch.Tensor]:
    """Logits of each position's codes from one forward pass over the whole sequence."""
    logits = prior(layout.sequence(text_ids, codes)).logits[:, layout.prompt_length - 1 :].detach()
    offsets = layout.image.position_offsets().tolist()
    return [logits[:, step, first : first + layout.codebook_size] for step, first in enumerate(offsets)]


def test_logits_during_generation_are_the_teacher_forced_ones(prior, layout, text_ids, logits_drawn_from):
    codes = generate(prior, layout, text_ids)
    for drawn, forced in zip(logits_drawn_from, teacher_forced(prior, layout, text_ids, codes), strict=True):
        torch.testing.assert_close(drawn, forced, atol=1e-4, rtol=1e-4)


def test_guided_logits_extrapolate_the_teacher_forced_ones(prior, layout, text_ids, logits_drawn_from):
    codes = generate(prior, layout, text_ids, sampling=Sampling(guidance_scale=3.0))
    with_caption = teacher_forced(prior, layout, text_ids, codes)
    without = teacher_forced(prior, layout, layout.null_text_ids(len(text_ids)), codes)
    for drawn, one, other in zip(logits_drawn_from, with_caption, without, strict=True):
        torch.testing.assert_close(drawn, other + 3 * (one - other), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_cache_changes_no_code(prior, layout, text_ids, scale):
    sampling = Sampling(guidance_scale=scale)
    cached = generate(prior, layout, text_ids, sampling=sampling, seed=4)
    assert cached.equal(generate(prior, layout, text_ids, sampling=sampling, seed=4, use_cache=False))


def test_greedy_codes_are_those_of_stock_generate(prior, layout, text_ids):
    stock = prior.generate(
        layout.prompt(text_ids),
        attention_mask=torch.ones(len(text_ids), layout.prompt_length, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=layout.num_codes,
        logits_processor=LogitsProcessorList([LayoutLogitsProcessor(layout)]),
    )
    codes = layout.image.ids_to_codes(stock[:, layout.prompt_length :])
    assert generate(prior, layout, text_ids, sampling=GREEDY).equal(codes)


def test_guidance_changes_the_logits_of_every_step(prior, layout, text_ids, logits_drawn_from):
    codes = generate(prior, layout, text_ids, sampling=Sampling(guidance_scale=3.0))
    captioned = (text_ids != layout.pad_id).any(dim=1)
    for drawn, forced in zip(logits_drawn_from, teacher_forced(prior, layout, text_ids, codes), strict=True):
        distance = (drawn - forced).abs().amax(dim=1)
        assert (distance[captioned] > 0.02).all() and (distance[~captioned] < 1e-4).all()


def test_guidance_leads_away_from_the_negative_text(prior, layout, text_ids, logits_drawn_from):
    negative = torch.full_like(text_ids, 8)
    codes = generate(prior, layout, text_ids, sampling=Sampling(guidance_scale=2.0), negative_text_ids=negative)
    with_caption, without = (teacher_forced(prior, layout, text, codes) for text in (text_ids, negative))
    for drawn, one, other in zip(logits_drawn_from, with_caption, without, strict=True):
        torch.testing.assert_close(drawn, 2 * one - other, atol=1e-3, rtol=1e-3)


@only_qwen
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_image_does_not_depend_on_its_batch(prior, layout, text_ids, scale):
    sampling = Sampling(guidance_scale=scale)
    whole = generate(prior, layout, text_ids, sampling=sampling, seed=3)
    for runs in (torch.arange(8).split(1), torch.arange(8).split(3), [torch.tensor([5, 0, 7, 2, 6, 1, 4, 3])]):
        for rows in runs:
            some = generate(prior, layout, text_ids[rows], sampling=sampling, seed=3, indices=rows.tolist())
            assert some.equal(whole[rows])


@only_qwen
def test_another_seed_or_index_gives_another_image(prior, layout):
    text_ids = torch.ones(8, 3, dtype=torch.int64)
    one, other = (generate(prior, layout, text_ids, sampling=Sampling(temperature=9.0), seed=seed) for seed in (0, 1))
    assert not one.equal(other) and len(one.unique(dim=0)) > 4


def test_uniform_noise_differs_between_seeds_and_indices():
    streams = [uniform_noise(seed, range(20), 4) for seed in (0, 1, -1, 2**63)]
    assert len(torch.cat(streams).unique(dim=0)) == 80


@only_qwen
def test_generate_does_not_change_its_text_ids(prior, layout, text_ids):
    before = text_ids.clone()
    generate(prior, layout, text_ids, sampling=Sampling(guidance_scale=3.0), negative_text_ids=text_ids)
    assert text_ids.equal(before)


@only_qwen
def test_generate_keeps_the_global_random_state(prior, layout, text_ids):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    generate(prior, layout, text_ids)
    assert torch.rand(1).equal(expected)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_ids_are_always_those_of_their_position(prior, layout, text_ids, temperature):
    codes = generate(prior, layout, text_ids, sampling=Sampling(temperature=temperature))
    assert codes.shape == (8, 4) and codes.dtype == torch.int64
    assert layout.image.ids_to_codes(layout.image.codes_to_ids(codes)).equal(codes)


@only_qwen
def test_top_k_of_one_is_greedy(prior, layout, text_ids):
    greedy = generate(prior, layout, text_ids, sampling=GREEDY)
    assert generate(prior, layout, text_ids, sampling=Sampling(top_k=1)).equal(greedy)


@only_qwen
def test_callback_gets_every_code_when_it_is_sampled(prior, layout, text_ids):
    seen = []
    codes = generate(
        prior, layout, text_ids, callback=lambda position, so_far: seen.append(so_far[:, position].clone())
    )
    assert torch.stack(seen, dim=1).equal(codes)


def test_top_k_counts_codes():
    probabilities = torch.rand(50, 16, dtype=torch.float64)
    for top_k in (1, 5, 16, 40):
        kept = top_k_top_p_filter(probabilities, Sampling(top_k=top_k))
        assert ((kept > 0).sum(dim=1) == min(top_k, 16)).all()
        assert kept.amax(dim=1).equal(probabilities.amax(dim=1))


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probabilities = torch.rand(200, 12, dtype=torch.float64).softmax(dim=-1)
    for top_p in (0.01, 0.3, 0.9):
        kept = top_k_top_p_filter(probabilities, Sampling(top_p=top_p))
        smallest = torch.where(kept > 0, kept, math.inf).amin(dim=1)
        assert (kept.sum(dim=1) >= top_p).all() and (kept.sum(dim=1) - smallest < top_p).all()
        dropped = torch.where(kept > 0, 0, probabilities).amax(dim=1)
        assert (dropped <= smallest).all()


def test_sample_codes_follows_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, -30.0]])
    uniforms = uniform_noise(7, [0], 20_000)[0]
    counts = sample_codes(logits.expand(20_000, 5), uniforms, Sampling(temperature=1.5)).bincount(minlength=5)
    expected = (logits[0].double() / 1.5).softmax(dim=0) * 20_000
    chi_square = ((counts[:4] - expected[:4]) ** 2 / expected[:4]).sum()
    assert chi_square < 16.3 and counts[4] == 0  # 99.9 % of samples with 3 degrees of freedom lie below


@pytest.mark.parametrize("uniform", [0.0, math.nextafter(1, 0)])
def test_sample_codes_never_returns_a_filtered_code(uniform):
    logits = torch.tensor([[-math.inf, 1.0, 0.0, 0.5, -math.inf]])
    for sampling in (Sampling(), Sampling(top_k=2), Sampling(top_p=0.7)):
        allowed = (1, 2, 3) if sampling == Sampling() else (1, 3)
        assert sample_codes(logits, torch.tensor([uniform], dtype=torch.float64), sampling).item() in allowed


def test_temperature_near_zero_is_greedy():
    logits, uniforms = torch.randn(100, 9), uniform_noise(0, [0], 100)[0]
    assert sample_codes(logits, uniforms, GREEDY).equal(logits.argmax(dim=1))
    assert sample_codes(logits, uniforms, Sampling(temperature=1e-4)).equal(logits.argmax(dim=1))


@pytest.mark.parametrize("name", ["guidance_scale", "temperature", "top_k", "top_p"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})


@pytest.mark.parametrize("setting", [{"top_p": 0.0}, {"top_p": 1.01}, {"top_k": 2.5}])
def test_top_p_out_of_range_and_fractional_top_k_raise(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Sampling(**setting)


@only_qwen
def test_text_of_another_length_is_refused(prior, layout):
    with pytest.raises(ValueError, match="text ids must be `b 3`"):
        generate(prior, layout, torch.zeros(2, 5, dtype=torch.int64))


@only_qwen
def test_a_negative_text_for_another_number_of_images_is_refused(prior, layout, text_ids):
    with pytest.raises(ValueError, match="negative"):
        generate(prior, layout, text_ids, sampling=Sampling(guidance_scale=2.0), negative_text_ids=text_ids[:1])


@only_qwen
def test_another_number_of_indices_is_refused(prior, layout, text_ids):
    with pytest.raises(ValueError, match="indices"):
        generate(prior, layout, text_ids, indices=[0])
    with pytest.raises(ValueError, match="got 1 indices for"):  # also where streams take their place
        generate(prior, layout, text_ids, indices=[0], uniforms=torch.rand(len(text_ids), layout.num_codes))


def test_no_prompts_are_refused(prior, layout):
    with pytest.raises(ValueError, match="no prompts"):
        generate(prior, layout, torch.zeros(0, 3, dtype=torch.long))
