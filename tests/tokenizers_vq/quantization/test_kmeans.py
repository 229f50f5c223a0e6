"""K-means and the statistics of its clusters."""

import torch

from tokenizers_vq.quantization.kmeans import cluster_statistics, kmeans


def test_kmeans_finds_the_centers_of_separate_clusters():
    centers = torch.tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, 0.0], [0.0, -10.0]])
    vectors = centers.repeat(32, 1) + 0.01 * torch.randn(128, 2)
    found = kmeans(vectors, 4)
    torch.testing.assert_close(found[torch.cdist(centers, found).argmin(dim=1)], centers, atol=0.05, rtol=0)


def test_kmeans_with_more_clusters_than_vectors_covers_each_vector():
    vectors = torch.randn(3, 2)
    assert torch.cdist(vectors, kmeans(vectors, 8)).min(dim=1).values.max() < 1e-6


def test_cluster_statistics_count_and_add():
    vectors, codes = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([2, 0, 2])
    counts, sums = cluster_statistics(vectors, codes, 3)
    assert counts.tolist() == [1, 0, 2] and sums.tolist() == [[3, 4], [0, 0], [6, 8]]
