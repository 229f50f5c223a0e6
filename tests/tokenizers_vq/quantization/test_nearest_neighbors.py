"""Nearest-neighbor search against its plain definition."""

import pytest
import torch
from einops import rearrange

from tokenizers_vq.quantization import nearest_neighbors
from tokenizers_vq.quantization.nearest_neighbors import (
    NUM_IMAGES,
    column_argmax,
    inner_products,
    nearest_codes,
    nearest_entries,
    plain_nearest_codes,
)


@pytest.mark.parametrize("chunk", [(512, 512), (8, 16), (1, 16)])
def test_nearest_codes_equal_the_plain_definition(monkeypatch, chunk):
    monkeypatch.setattr(nearest_neighbors, "CHUNK", chunk)
    vectors, codebook = torch.randn(101, 5), torch.randn(17, 5)
    assert torch.equal(nearest_codes(vectors, codebook), plain_nearest_codes(vectors, codebook))


@pytest.mark.parametrize("chunk", [(512, 512), (4, 16)])
def test_nearest_codes_of_equal_entries_is_the_first(monkeypatch, chunk):
    monkeypatch.setattr(nearest_neighbors, "CHUNK", chunk)
    codebook = torch.randn(3, 5).repeat(12, 1)
    assert torch.equal(nearest_codes(codebook, codebook), torch.arange(3).repeat(12))


def test_nearest_codes_without_onednn_are_the_same(monkeypatch):
    vectors, codebook = torch.randn(101, 5), torch.randn(70, 5)
    expected = nearest_codes(vectors, codebook)
    monkeypatch.setattr(nearest_neighbors, "HAS_ONEDNN", False)
    assert torch.equal(nearest_codes(vectors, codebook), expected)


@pytest.mark.skipif(not nearest_neighbors.HAS_ONEDNN, reason="matrix products depend on how many vectors there are")
@pytest.mark.parametrize("num", [1, 2, 7, 48, 300])
def test_inner_products_have_the_same_bits_for_any_number_of_queries(num):
    entries, queries = torch.randn(512, 65), torch.randn(768, 65)
    images = rearrange(entries, "(p k) d -> p d k 1", p=NUM_IMAGES)
    many = inner_products(images, queries)
    torch.testing.assert_close(many, entries @ queries.T)
    assert torch.equal(inner_products(images, queries[:num]), many[:, :num])


def test_nearest_codes_far_from_zero_are_exact():
    vectors, codebook = torch.randn(200, 8), torch.randn(64, 8)
    vectors, codebook = vectors + 2048, codebook + 2048
    expected = (vectors[:, None] - codebook).square().sum(dim=2).argmin(dim=1)
    assert torch.equal(nearest_codes(vectors, codebook), expected)
    assert torch.equal(plain_nearest_codes(vectors, codebook), expected)


def test_nearest_codes_of_no_vectors_are_empty():
    assert nearest_codes(torch.empty(0, 5), torch.randn(17, 5)).shape == (0,)


@pytest.mark.parametrize("chunk", [(512, 512), (8, 16)])
def test_nearest_entries_equal_the_plain_lookup_and_difference(monkeypatch, chunk):
    monkeypatch.setattr(nearest_neighbors, "CHUNK", chunk)
    vectors, codebook = torch.randn(101, 5), torch.randn(17, 5)
    quantized, residual = torch.empty(101, 5), torch.empty(101, 5)
    codes, errors = nearest_entries(vectors, codebook, quantized, residual)
    assert torch.equal(codes, nearest_codes(vectors, codebook))
    assert torch.equal(quantized, codebook[codes]) and torch.equal(residual, vectors - codebook[codes])
    torch.testing.assert_close(errors, (vectors - codebook[codes]).square().sum(dim=1))
    without_residual = nearest_entries(vectors, codebook, torch.empty(101, 5))
    assert torch.equal(without_residual[0], codes) and torch.equal(without_residual[1], errors)
    in_place = nearest_entries(vectors, codebook, quantized, vectors)
    assert torch.equal(in_place[1], errors) and torch.equal(vectors, residual)


def test_column_argmax_equals_argmax():
    scores = torch.randint(5, (40, 30)).float()
    values, rows = column_argmax(scores)
    assert torch.equal(rows, scores.argmax(dim=0)) and torch.equal(values, scores.amax(dim=0))


@pytest.mark.parametrize("codebook_size", [1, 7, 64, 100, 512, 1000])
def test_nearest_codes_for_any_codebook_size_equal_the_largest_scores(codebook_size):
    vectors, codebook = torch.randn(300, 6), torch.randn(codebook_size, 6)
    expected = (vectors @ codebook.T - codebook.square().sum(dim=1) / 2).argmax(dim=1)
    assert torch.equal(nearest_codes(vectors, codebook), expected)
