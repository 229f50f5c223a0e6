"""Vector quantizer: output, gradients, codebook updates, dead codes and initialization."""

import copy

import pytest
import torch
from torch import Tensor

from tokenizers_vq import VectorQuantizer
from tokenizers_vq.quantization.code_usage import perplexity
from tokenizers_vq.quantization.nearest_neighbors import (
    nearest_codes,
)
from tokenizers_vq.quantization.vector_quantizer import DEAD_CODE_THRESHOLD

NAN, INF = float("nan"), float("inf")


def trained_from(codebook: Tensor, **settings) -> VectorQuantizer:
    """Return a quantizer in training mode with this codebook, as if each code had just got one vector."""
    module = VectorQuantizer(*codebook.shape, **settings).train()
    module.codebook.data.copy_(codebook)
    module.embed_avg.copy_(codebook)
    module.cluster_size.fill_(1)
    module.num_batches.fill_(1e6)
    module.initialized.fill_(True)
    return module


def clusters(num: int, *, per_cluster: int = 32, spread: float = 0.01) -> tuple[Tensor, Tensor]:
    """Return well separated centers `k d` on a ring and noisy vectors `n d` around them."""
    angles = torch.arange(num) * (2 * torch.pi / num)
    centers = 10 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return centers, (centers.repeat(per_cluster, 1) + spread * torch.randn(num * per_cluster, 2))


def state_of(module: VectorQuantizer) -> dict[str, Tensor]:
    return copy.deepcopy(dict(module.named_buffers()) | {"codebook": module.codebook.detach()})


def test_vector_quantizer_under_bfloat16_autocast_gives_the_same_output():
    module = trained_from(torch.randn(64, 8)).eval()
    x = torch.randn(200, 8)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert torch.equal(output.codes, expected.codes) and torch.equal(output.quantized, expected.quantized)


def test_bfloat16_input_is_searched_in_float32():
    module = trained_from(torch.randn(64, 8)).eval()
    x = torch.randn(50, 8).bfloat16()
    output = module(x)
    assert output.quantized.dtype == torch.bfloat16
    assert torch.equal(output.codes, module(x.float()).codes)


def test_channel_axis_1_equals_the_last_axis_form():
    codebook, x = torch.randn(16, 4), torch.randn(2, 4, 3, 5)
    last = trained_from(codebook).eval()(x.movedim(1, -1))
    first = trained_from(codebook, channel_axis=1).eval()(x)
    assert torch.equal(first.quantized, last.quantized.movedim(-1, 1)) and torch.equal(first.codes, last.codes)
    assert first.codes.shape == (2, 3, 5)
    torch.testing.assert_close(first.loss, last.loss)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_lookup_of_the_codes_is_the_quantized_input(channel_axis):
    module = trained_from(torch.randn(16, 4), channel_axis=channel_axis).eval()
    output = module(torch.randn(2, 4, 3, 4))
    assert torch.equal(module.lookup(output.codes), output.quantized)


# Gradients


def test_vector_quantizer_passes_later_gradients_straight_through():
    module, x = trained_from(torch.randn(16, 4), commitment_weight=0.0), torch.randn(10, 4, requires_grad=True)
    output = module(x)
    weight = torch.randn(10, 4)
    ((output.quantized * weight).sum() + output.loss).backward()
    assert torch.equal(x.grad, weight)


def test_commitment_loss_pulls_the_input_to_its_entry_by_beta():
    module, x = trained_from(torch.randn(16, 4), commitment_weight=0.7), torch.randn(10, 4, requires_grad=True)
    output = module(x)
    output.loss.backward()
    torch.testing.assert_close(x.grad, 0.7 * 2 * (x - output.quantized).detach() / x.numel())
    torch.testing.assert_close(output.loss, 0.7 * (x - output.quantized).square().mean())


def test_vector_quantizer_without_ema_codebook_gets_the_gradient_of_its_own_term():
    module = trained_from(torch.randn(16, 4), ema_update=False, commitment_weight=0.7)
    x = torch.randn(10, 4, requires_grad=True)
    output = module(x)
    output.loss.backward()
    difference = 2 * (output.quantized - x).detach() / x.numel()
    torch.testing.assert_close(module.codebook.grad, torch.zeros(16, 4).index_add_(0, output.codes, difference))
    torch.testing.assert_close(x.grad, -0.7 * difference)


# The codebook


def test_ema_update_equals_the_equations_of_the_paper():
    codebook, decay = torch.randn(4, 3), 0.9
    module = trained_from(codebook, decay=decay)
    x = codebook.repeat(5, 1) + 0.01 * torch.randn(20, 3)
    codes = module(x).codes
    counts = torch.stack([(codes == code).sum() for code in range(4)])
    sums = torch.stack([x[codes == code].sum(dim=0) for code in range(4)])
    new_counts = decay * torch.ones(4) + (1 - decay) * counts  # equation 6
    new_sums = decay * codebook + (1 - decay) * sums  # equation 7
    torch.testing.assert_close(module.cluster_size, new_counts)
    torch.testing.assert_close(module.embed_avg, new_sums)
    torch.testing.assert_close(module.codebook, new_sums / new_counts[:, None])  # equation 8


def test_ema_decay_warms_up_and_never_exceeds_decay():
    module = trained_from(torch.zeros(1, 1), decay=0.9, replace_dead_codes=False)
    module.num_batches.zero_()
    counts = torch.ones(())
    for batch in range(1, 400):
        module(torch.full((8, 1), float(batch)))
        counts = torch.lerp(counts, torch.tensor(8.0), max(1 - (1 + batch) / (30 + batch), 1 - 0.9))
        torch.testing.assert_close(module.cluster_size[0], counts)


def test_ema_update_with_few_vectors_keeps_a_good_codebook():
    codebook = 10 * torch.randn(256, 4)
    module = trained_from(codebook)
    module.num_batches.zero_()
    for _ in range(20):
        module(codebook[torch.randint(256, (16,))] + 0.01 * torch.randn(16, 4))
    assert torch.cdist(codebook, module.codebook).min(dim=1).values.median() < 0.1


def test_vector_quantizer_in_training_returns_the_entries_from_before_the_update():
    codebook = torch.randn(32, 4)
    module = trained_from(codebook)
    module.cluster_size[16:] = 0  # these are replaced in this step
    output = module(torch.randn(100, 4))
    assert (output.codes >= 16).any()
    assert torch.equal(output.quantized.detach(), codebook[output.codes])


def test_first_batch_initializes_the_codebook_on_its_clusters():
    centers, vectors = clusters(4)
    module = VectorQuantizer(16, 2).train()
    output = module(vectors)
    assert module.initialized and (output.quantized - vectors).norm(dim=1).max() < 0.1
    assert torch.cdist(centers, module.codebook).min(dim=1).values.max() < 0.1


@pytest.mark.parametrize("ema_update", [True, False])
def test_dead_codes_recover_from_a_collapsed_codebook(ema_update):
    codebook = torch.full((16, 2), 100.0)
    codebook[0] = 0
    module = trained_from(codebook, decay=0.9, ema_update=ema_update)
    _, vectors = clusters(16)
    for _ in range(100):
        codes = module(vectors).codes
    assert len(codes.unique()) > 12
    assert module.metrics()["code_usage"] > 0.75


def test_dead_code_moves_to_a_vector_of_the_batch():
    codebook = torch.tensor([[0.0, 0.0], [100.0, 100.0]])
    module = trained_from(codebook)
    module.cluster_size[1] = DEAD_CODE_THRESHOLD / 10
    vectors = torch.randn(10, 2)
    module(vectors)
    assert (vectors == module.codebook[1]).all(dim=1).any()


@pytest.mark.parametrize("ema_update", [True, False])
def test_vector_quantizer_in_eval_mode_changes_no_state(ema_update):
    module = trained_from(torch.randn(16, 4), ema_update=ema_update).eval()
    before = state_of(module)
    module(torch.randn(50, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(module).items())


def test_vector_quantizer_in_eval_mode_is_not_initialized():
    module = VectorQuantizer(16, 4).eval()
    module(torch.randn(50, 4))
    assert not module.initialized


# Non-finite vectors


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_vectors_are_skipped_and_counted(value):
    codebook = torch.randn(4, 3)
    clean = codebook.repeat(5, 1) + 0.01 * torch.randn(20, 3)
    spoiled = torch.cat([clean, torch.tensor([[0.0, value, 0.0], [value, 1.0, 1.0]])])
    module, twin = trained_from(codebook), trained_from(codebook)
    output, expected = module(spoiled), twin(clean)
    assert module.num_non_finite == 2
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(module.codebook, twin.codebook)


def test_non_finite_vectors_get_no_gradient_and_leave_others_finite():
    x = torch.randn(10, 3)
    x[4, 1] = NAN
    x.requires_grad_()
    output = trained_from(torch.randn(8, 3))(x)
    (output.loss + output.quantized.square().sum()).backward()
    assert x.grad.isfinite().all() and not x.grad[4].any() and x.grad[:4].any()


def test_dead_code_never_moves_to_a_non_finite_vector():
    module = trained_from(torch.full((4, 2), 50.0) + torch.randn(4, 2))
    module.cluster_size[2:] = 0
    x = 50 + torch.randn(8, 2)
    x[::2] = NAN
    module(x)
    assert module.codebook.min() > 40


def test_batch_without_finite_vectors_does_not_initialize_the_codebook():
    module = VectorQuantizer(8, 2).train()
    before = module.codebook.clone()
    assert module(torch.full((5, 2), NAN)).loss == 0
    assert not module.initialized
    torch.testing.assert_close(module.codebook, before)


# Counters


def test_perplexity_is_the_number_of_equally_frequent_codes():
    torch.testing.assert_close(
        perplexity(torch.tensor([[3.0, 3.0, 0.0, 3.0], [9.0, 0.0, 0.0, 0.0]])), torch.tensor([3.0, 1.0])
    )


def test_loaded_quantizer_has_empty_counters(tiny_vqvae, tmp_path):
    tiny_vqvae.quantizer.view.num_non_finite += 7
    tiny_vqvae.quantizer.usage.histogram += 7
    tiny_vqvae.save_pretrained(tmp_path)
    loaded = type(tiny_vqvae).from_pretrained(tmp_path).quantizer
    assert loaded.num_non_finite == 0 and not loaded.usage.histogram.any()


# Initialization and usage


def test_kmeans_init_waits_for_enough_vectors():
    centers, vectors = clusters(16, per_cluster=4)
    module = VectorQuantizer(16, 2).train()
    order = torch.randperm(64)
    for batch in vectors[order].split(16)[:3]:
        module(batch)
        assert not module.initialized
        assert torch.cdist(module.codebook, vectors).min(dim=1).values.max() < 2, (
            "until then codes are vectors seen so far"
        )
    module(vectors[order[48:]])
    assert module.initialized and not len(module.init_vectors)
    assert (torch.cdist(centers, module.codebook).min(dim=1).values < 0.5).float().mean() > 0.7


def test_code_usage_covers_all_batches_since_the_last_reset():
    module = trained_from(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), replace_dead_codes=False)
    for value in (0.0, 1.0, 1.0):
        module(torch.full((5, 1), value))
    torch.testing.assert_close(module.usage.histogram, torch.tensor([5.0, 10.0, 0.0, 0.0]))
    assert module.metrics()["code_usage"] == 0.5
    module.usage.reset()
    module(torch.zeros(5, 1))
    assert module.metrics()["code_usage"] == 0.25 and module.metrics()["perplexity"] == 1


@pytest.mark.parametrize("ema_update", [True, False])
def test_codebook_of_identical_vectors_is_used_after_100_steps(ema_update):
    module = VectorQuantizer(512, 8, ema_update=ema_update).train()
    module.codebook.data.fill_(0.5)
    module.initialized.fill_(True)
    for _ in range(100):
        module(torch.randn(2048, 8))
    module.usage.reset()
    module(torch.randn(8192, 8))
    assert module.metrics()["code_usage"] >= 0.95


def test_collapsed_codebook_without_replacement_stays_collapsed():
    module = trained_from(torch.zeros(64, 8), replace_dead_codes=False)
    for _ in range(20):
        codes = module(torch.randn(256, 8)).codes
    assert len(codes.unique()) < 24


# Cosine similarity and projections


@pytest.mark.parametrize("ema_update", [True, False])
def test_cosine_similarity_entries_have_length_one_and_codes_ignore_the_length_of_vectors(ema_update):
    module, x = VectorQuantizer(16, 4, use_cosine_sim=True, ema_update=ema_update).train(), torch.randn(300, 4)
    for _ in range(3):
        module(x)
    module.eval()
    output = module(x)
    torch.testing.assert_close(output.quantized.norm(dim=1), torch.ones(300))
    assert torch.equal(module(7 * x).codes, output.codes)
    similarity = torch.nn.functional.normalize(x, dim=1) @ module.entries().T
    assert torch.equal(output.codes, similarity.argmax(dim=1))


def test_codebook_dim_projects_to_shorter_vectors_and_back():
    module, x = VectorQuantizer(16, 8, codebook_dim=2).train(), torch.randn(300, 8, requires_grad=True)
    output = module(x)
    assert module.codebook.shape == (16, 2) and output.quantized.shape == (300, 8)
    expected = nearest_codes(module.view.project_in(x).detach(), module.eval().codebook)
    assert torch.equal(module(x).codes, expected)
    assert torch.equal(module.lookup(module(x).codes), module(x).quantized)
    (output.quantized.square().sum() + output.loss).backward()
    assert x.grad.any() and all(p.grad.any() for p in module.parameters())


def test_empty_batch_leaves_the_codebook_unchanged():
    module = trained_from(torch.randn(64, 8))
    module.cluster_size[3] = 0
    codebook = module.codebook.clone()
    module.train()(torch.empty(0, 8))
    torch.testing.assert_close(module.codebook, codebook)
