"""What the VQ-VAE of text does in training, and what its quantizer is shown."""

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


def test_training_brings_texts_back(trained):
    assert trained.decode(trained.encode(TEXTS)) == TEXTS


def test_each_level_tells_more_than_those_before_it(trained):
    symbols = trained.texts_to_symbols(TEXTS)
    stages = trained.decode_symbols_progressively(trained.encode(TEXTS))
    right = [(seen == symbols)[trained.valid_mask(symbols)].float().mean().item() for seen in stages]
    assert 0.2 < right[0] <= right[1] <= right[2] == 1


def test_what_fills_up_changes_no_code(trained):
    """Else a text would code otherwise behind another one's remains."""
    symbols = trained.texts_to_symbols(["x", "a blue disc"])
    other = symbols.where(trained.valid_mask(symbols), 3)
    other[0, 1] = other[1, 11] = trained.pad_symbol
    assert not torch.equal(symbols, other) and torch.equal(trained.valid_mask(symbols), trained.valid_mask(other))
    assert torch.equal(trained.encode(symbols), trained.encode(other))


def test_spans_know_their_neighbours(trained):
    one, other = trained.texts_to_symbols(["a red square", "a red sqssss"])
    latents = trained._latents(torch.stack([one, other]))
    assert not torch.equal(latents[0, 0], latents[1, 0])


@pytest.mark.parametrize("quantizer", ["residual", "vector", "fsq"])
def test_spans_past_the_end_count_for_nothing(quantizer):
    model = tiny(quantizer=quantizer, fsq_levels=[4, 4]).train()
    symbols = model.texts_to_symbols(TEXTS)
    model(symbols)
    num_live = int(model.valid_spans(symbols).sum())
    usages = [module for name, module in model.named_modules() if name.endswith("usage")]
    assert num_live < symbols.shape[0] * model.num_spans
    assert [usage.histogram.sum() for usage in usages] == [num_live] * model.code_shape[0]
    model.eval()
    output = model(symbols)
    changed = symbols.where(model.valid_mask(symbols), 5)
    assert model(changed).loss == output.loss


def test_codebooks_start_on_latents_of_texts_alone():
    model = tiny()
    symbols = model.texts_to_symbols(["x"] * 40 + ["two green cats sat"] * 40)
    model.init_from_data(symbols)
    first = model.quantizer.layers[0].codebook
    latents = model.eval()._latents(symbols)[model.valid_spans(symbols)]
    assert torch.cdist(first, latents).amin(dim=1).max() < 1e-2
    assert (model.encode(symbols)[:, : model.num_spans] == 0).float().mean() < 1


class TestPrefixes:
    def test_in_training_texts_stop_after_any_of_the_levels(self):
        known = tiny().train()._known(300)
        assert known.shape == (300, 3, 3) and torch.equal(known, known[:, :1].expand_as(known))
        shown = known[:, 0].sum(dim=1).bincount(minlength=4).tolist()
        assert shown[0] == 0 and min(shown[1:]) > 70
        assert (known.int().diff(dim=2) <= 0).all()

    def test_without_gradient_and_in_eval_mode_none_stops(self):
        model = tiny().train()
        with torch.no_grad():
            assert model._known(4) is None
        assert model.eval()._known(4) is None

    def test_what_is_not_given_of_a_span_changes_nothing(self, trained):
        codes = trained.encode(TEXTS)
        given = torch.arange(9).expand(5, 9) < 4
        other = torch.where(given, codes, (codes + 1) % 16)
        assert torch.equal(trained.decode_with_mask(codes, given), trained.decode_with_mask(other, given))
        assert torch.equal(trained.decode_with_mask(codes, given), trained.decode_symbols(codes[:, :4]))


def test_the_codebook_may_learn_by_its_loss():
    model = tiny(ema_update=False).train()
    model.init_from_data(model.texts_to_symbols([f"{number} {number**2}" for number in range(100)]))
    model(model.texts_to_symbols(TEXTS)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_cosine_of_a_sum_is_refused():
    with pytest.raises(ValueError, match="Expected use_cosine_sim=False for a ResidualQuantizer"):
        tiny(use_cosine_sim=True)
