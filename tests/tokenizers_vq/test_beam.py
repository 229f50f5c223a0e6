"""Beam search against trying every sequence."""

from itertools import product

import pytest
import torch

from tokenizers_vq.beam import best_of_all


def errors_of(model, codes, images) -> torch.Tensor:
    return (model.decode(codes) - images).square().flatten(1).mean(dim=1)


def test_a_beam_of_one_is_the_greedy_loop(tiny_vqdraw, images):
    assert torch.equal(tiny_vqdraw.encode(images, beam_size=1), tiny_vqdraw(images).codes)


def test_a_beam_as_wide_as_all_sequences_finds_the_best_one(tiny_vqdraw, images):
    codes = tiny_vqdraw.encode(images, beam_size=8**3)
    every = torch.tensor(list(product(range(8), repeat=4)))
    for example, found in zip(images, codes, strict=True):
        target = tiny_vqdraw.normalize(example[None])
        states = torch.cat([tiny_vqdraw.draw.decode(some) for some in every.split(512)])
        best = every[(states - target).square().flatten(1).mean(dim=1).argmin()]
        assert torch.equal(found, best)


@pytest.mark.parametrize("beam_size", [2, 4, 8])
def test_a_beam_lowers_the_error(tiny_vqdraw, images, beam_size):
    greedy, better = tiny_vqdraw.encode(images), tiny_vqdraw.encode(images, beam_size=beam_size)
    assert better.shape == greedy.shape
    assert errors_of(tiny_vqdraw, better, images).mean() < errors_of(tiny_vqdraw, greedy, images).mean()


@pytest.mark.parametrize("beam_size", [2, 3, 8])
def test_a_picture_is_searched_alone_as_it_is_in_a_batch(tiny_vqdraw, images, beam_size):
    together = tiny_vqdraw.encode(images, beam_size=beam_size)
    alone = [tiny_vqdraw.encode(image[None], beam_size=beam_size) for image in images]
    assert torch.equal(torch.cat(alone), together)


def test_groups_hold_no_more_states_than_the_greedy_loop(tiny_vqdraw, images, monkeypatch):
    sizes = []
    options = tiny_vqdraw.draw.options
    monkeypatch.setattr(
        tiny_vqdraw.draw, "options", lambda state, stage: (sizes.append(len(state)), options(state, stage))[1]
    )
    tiny_vqdraw.encode(images, beam_size=3)
    assert 3 < max(sizes) <= len(images)


def test_the_best_come_first_whatever_beam_they_extend():
    errors = torch.tensor([[[5.0, 1.0, 9.0], [2.0, 7.0, 3.0]], [[8.0, 6.0, 7.0], [5.5, 9.0, 9.0]]])
    parents, chosen = best_of_all(errors, 3)
    assert parents.tolist() == [0, 1, 1, 3, 2, 2] and chosen.tolist() == [1, 0, 2, 0, 1, 2]


@pytest.mark.parametrize("beam_size", [0, -2])
def test_a_beam_below_one_is_refused(tiny_vqdraw, images, beam_size):
    with pytest.raises(ValueError, match=f"beam_size must be at least 1, got {beam_size}"):
        tiny_vqdraw.encode(images, beam_size=beam_size)


def test_data_sets_are_tokenized_with_the_beam_of_the_config(tiny_vqdraw, images):
    tiny_vqdraw.config.beam_size = 3
    assert torch.equal(tiny_vqdraw.encode_for_training(images), tiny_vqdraw.encode(images, beam_size=3))
