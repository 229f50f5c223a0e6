"""VQ-VAE for text: training, masks and quantizer dropout."""

import pytest
import torch

from tokenizers_vq import VQVAEForText, VQVAETextConfig

TEXTS = ["a red square", "a blue disc", "", "x", "two green cats sat"]
TINY = {
    "max_length": 18,
    "span_length": 6,
    "codebook_size": 16,
    "num_quantizers": 3,
    "code_dim": 8,
    "hidden_channels": 16,
    "dilations": [1, 2],
}


def tiny(**settings) -> VQVAEForText:
    torch.manual_seed(0)
    return VQVAEForText(VQVAETextConfig(**TINY | settings))


@pytest.fixture(scope="module")
def trained() -> VQVAEForText:
    letters = sorted({*b"?", *"".join(TEXTS).encode()})
    model = tiny(alphabet=letters).train()
    symbols = model.texts_to_symbols(TEXTS * 2)
    model.init_from_data(symbols)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(symbols).loss.backward()
        optimizer.step()
    return model.eval()


def test_trained_vqvae_reconstructs_its_texts(trained):
    assert trained.decode(trained.encode(TEXTS)) == TEXTS


def test_decoding_more_codebooks_never_lowers_the_accuracy(trained):
    symbols = trained.texts_to_symbols(TEXTS)
    stages = trained.decode_symbols_progressively(trained.encode(TEXTS))
    accuracies = [(decoded == symbols)[trained.valid_mask(symbols)].float().mean().item() for decoded in stages]
    assert 0.2 < accuracies[0] <= accuracies[1] <= accuracies[2] == 1


def test_padding_does_not_change_codes(trained):
    symbols = trained.texts_to_symbols(["x", "a blue disc"])
    other = symbols.where(trained.valid_mask(symbols), 3)
    other[0, 1] = other[1, 11] = trained.pad_symbol
    assert not torch.equal(symbols, other) and torch.equal(trained.valid_mask(symbols), trained.valid_mask(other))
    assert torch.equal(trained.encode(symbols), trained.encode(other))


def test_latents_depend_on_neighboring_spans(trained):
    one, other = trained.texts_to_symbols(["a red square", "a red sqssss"])
    latents = trained._latents(torch.stack([one, other]))
    assert not torch.equal(latents[0, 0], latents[1, 0])


@pytest.mark.parametrize("quantizer", ["residual", "vector", "fsq"])
def test_spans_past_the_end_change_neither_loss_nor_usage(quantizer):
    model = tiny(quantizer=quantizer, fsq_levels=[4, 4]).train()
    symbols = model.texts_to_symbols(TEXTS)
    model(symbols)
    num_valid = int(model.valid_spans(symbols).sum())
    usages = [module for name, module in model.named_modules() if name.endswith("usage")]
    assert num_valid < symbols.shape[0] * model.num_spans
    assert [usage.histogram.sum() for usage in usages] == [num_valid] * model.code_shape[0]
    model.eval()
    output = model(symbols)
    changed = symbols.where(model.valid_mask(symbols), 5)
    assert model(changed).loss == output.loss


def test_init_from_data_ignores_spans_past_the_end():
    model = tiny()
    symbols = model.texts_to_symbols(["x"] * 40 + ["two green cats sat"] * 40)
    model.init_from_data(symbols)
    first = model.quantizer.layers[0].codebook
    latents = model.eval()._latents(symbols)[model.valid_spans(symbols)]
    assert torch.cdist(first, latents).amin(dim=1).max() < 1e-2
    assert (model.encode(symbols)[:, : model.num_spans] == 0).float().mean() < 1


class TestPrefixes:
    def test_code_mask_in_training_keeps_a_random_number_of_codebooks(self):
        code_mask = tiny().train()._sample_code_mask(300)
        assert code_mask.shape == (300, 3, 3) and torch.equal(code_mask, code_mask[:, :1].expand_as(code_mask))
        num_kept = code_mask[:, 0].sum(dim=1).bincount(minlength=4).tolist()
        assert num_kept[0] == 0 and min(num_kept[1:]) > 70
        assert (code_mask.int().diff(dim=2) <= 0).all()

    def test_code_mask_without_gradient_or_in_eval_mode_is_none(self):
        model = tiny().train()
        with torch.no_grad():
            assert model._sample_code_mask(4) is None
        assert model.eval()._sample_code_mask(4) is None

    def test_decode_with_mask_ignores_codes_outside_the_mask(self, trained):
        codes = trained.encode(TEXTS)
        mask = torch.arange(9).expand(5, 9) < 4
        other = torch.where(mask, codes, (codes + 1) % 16)
        assert torch.equal(trained.decode_with_mask(codes, mask), trained.decode_with_mask(other, mask))
        assert torch.equal(trained.decode_with_mask(codes, mask), trained.decode_symbols(codes[:, :4]))


def test_every_parameter_gets_a_gradient_without_ema():
    model = tiny(ema_update=False).train()
    model.init_from_data(model.texts_to_symbols([f"{number} {number**2}" for number in range(100)]))
    model(model.texts_to_symbols(TEXTS)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_residual_quantizer_rejects_cosine_similarity():
    with pytest.raises(ValueError, match="Expected use_cosine_sim=False for a ResidualQuantizer"):
        tiny(use_cosine_sim=True)
