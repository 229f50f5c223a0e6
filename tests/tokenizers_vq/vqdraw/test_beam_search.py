"""Beam search, compared with exhaustive search."""

from itertools import product

import pytest
import torch

from tokenizers_vq.vqdraw.beam_search import select_beams


def errors_of(model, codes, images) -> torch.Tensor:
    return (model.decode(codes) - images).square().flatten(1).mean(dim=1)


def test_beam_of_one_equals_greedy_encoding(tiny_vqdraw, images):
    assert torch.equal(tiny_vqdraw.encode(images, beam_size=1), tiny_vqdraw(images).codes)


def test_exhaustive_beam_finds_the_best_sequence(tiny_vqdraw, images):
    codes = tiny_vqdraw.encode(images, beam_size=8**3)
    every = torch.tensor(list(product(range(8), repeat=4)))
    for example, found in zip(images, codes, strict=True):
        target = tiny_vqdraw.normalize(example[None])
        states = torch.cat([tiny_vqdraw.vqdraw.decode(some) for some in every.split(512)])
        best = every[(states - target).square().flatten(1).mean(dim=1).argmin()]
        assert torch.equal(found, best)


@pytest.mark.parametrize("beam_size", [2, 4, 8])
def test_beam_search_lowers_the_error(tiny_vqdraw, images, beam_size):
    greedy, better = tiny_vqdraw.encode(images), tiny_vqdraw.encode(images, beam_size=beam_size)
    assert better.shape == greedy.shape
    assert errors_of(tiny_vqdraw, better, images).mean() < errors_of(tiny_vqdraw, greedy, images).mean()


@pytest.mark.parametrize("beam_size", [2, 3, 8])
def test_beam_search_gives_the_same_codes_alone_and_in_a_batch(tiny_vqdraw, images, beam_size):
    together = tiny_vqdraw.encode(images, beam_size=beam_size)
    alone = [tiny_vqdraw.encode(image[None], beam_size=beam_size) for image in images]
    assert torch.equal(torch.cat(alone), together)


def test_groups_hold_at_most_the_states_of_greedy_encoding(tiny_vqdraw, images, monkeypatch):
    sizes = []
    propose = tiny_vqdraw.vqdraw.propose
    monkeypatch.setattr(
        tiny_vqdraw.vqdraw, "propose", lambda state, stage: (sizes.append(len(state)), propose(state, stage))[1]
    )
    many = images.repeat(4, 1, 1, 1)
    tiny_vqdraw.encode(many, beam_size=3)
    assert 3 < max(sizes) <= len(many)


ERRORS = torch.tensor([[5.0, 1.0, 9.0], [2.0, 7.0, 3.0], [8.0, 6.0, 7.0]])


@pytest.mark.parametrize(
    ("num", "margin", "expected"),
    [
        ([3, 3], 9.0, [(0, 0, 1), (0, 1, 0), (0, 1, 2), (1, 2, 1), (1, 2, 2), (1, 2, 0)]),
        ([2, 2], 9.0, [(0, 0, 1), (0, 1, 0), (1, 2, 1), (1, 2, 2)]),
        ([3, 3], 1.0, [(0, 0, 1), (0, 1, 0), (1, 2, 1), (1, 2, 2), (1, 2, 0)]),
        ([1, 2], 9.0, [(0, 0, 1), (1, 2, 1), (1, 2, 2)]),
        ([9, 9], 0.0, [(0, 0, 1), (1, 2, 1)]),
    ],
)
def test_select_beams_returns_the_best_continuations_first(num, margin, expected):
    kept = select_beams(ERRORS, torch.tensor([0, 0, 1]), torch.tensor(num), margin)
    assert [tuple(each) for each in torch.stack(kept, dim=1).tolist()] == expected


def test_select_beams_adds_the_margin_to_negative_errors():
    kept = select_beams(-ERRORS, torch.tensor([0, 0, 1]), torch.tensor([2, 2]), 0.2)
    assert torch.stack(kept, dim=1).tolist() == [[0, 0, 2], [1, 2, 0], [1, 2, 2]]


@pytest.mark.parametrize("beam_size", [2, 4, 8])
def test_beam_search_evaluates_a_bounded_number_of_states(tiny_vqdraw, images, monkeypatch, beam_size):
    sizes, propose = [], tiny_vqdraw.vqdraw.propose
    monkeypatch.setattr("tokenizers_vq.vqdraw.beam_search.PRUNING_MARGIN", 100.0)
    monkeypatch.setattr(
        tiny_vqdraw.vqdraw,
        "propose",
        lambda state, stage: (sizes.append((stage, len(state))), propose(state, stage))[1],
    )
    tiny_vqdraw.encode(images, beam_size=beam_size)
    looked_at = sum(size for stage, size in sizes if stage)  # at stage 0 one look serves all
    assert looked_at <= 1.4 * beam_size * tiny_vqdraw.config.num_stages * len(images)


@pytest.mark.parametrize("beam_size", [0, -2])
def test_beam_size_below_one_raises(tiny_vqdraw, images, beam_size):
    with pytest.raises(ValueError, match=f"Expected beam_size of at least 1, got {beam_size}"):
        tiny_vqdraw.encode(images, beam_size=beam_size)


def test_encode_with_search_uses_the_beam_size_of_the_config(tiny_vqdraw, images):
    tiny_vqdraw.config.beam_size = 3
    assert torch.equal(tiny_vqdraw.encode_with_search(images), tiny_vqdraw.encode(images, beam_size=3))
