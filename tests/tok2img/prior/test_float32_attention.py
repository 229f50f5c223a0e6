import pytest
import torch

from tok2img.prior.float32_attention import FLOAT32, attend_in_float32
from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import build_prior, load_prior
from tok2img.recipes.build_prior import init_prior
from tok2img.recipes.config import PriorRecipe
from tok2img.tokenization.layout import SequenceLayout

LAYOUT = SequenceLayout(11, text_length=3, num_codes=4, codebook_size=6, codes_shared=True)


def loss_and_gradients(prior, *, bf16: bool = False):
    """Loss of some rows, and the gradient of all parameters in one vector."""
    generator = torch.Generator().manual_seed(0)
    text_ids = torch.randint(11, (5, 3), generator=generator)
    codes = torch.randint(6, (5, 4), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = PriorWithLoss(prior, LAYOUT, caption_dropout=0.0)(text_ids, codes).loss
    loss.backward()
    gradients = torch.cat([each.grad.flatten() for each in prior.parameters() if each.grad is not None])
    prior.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
def test_float32_attention_without_autocast_equals_sdpa(architecture):
    prior = build_prior(LAYOUT, architecture=architecture, depth=1).train()
    before = loss_and_gradients(prior)
    attend_in_float32(prior)
    assert prior.config._attn_implementation == FLOAT32
    for value, expected in zip(loss_and_gradients(prior), before, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_float32_attention_under_autocast_keeps_loss_and_gradients(architecture):
    prior = build_prior(LAYOUT, architecture=architecture, depth=1).train()
    expected, gradients = loss_and_gradients(prior)
    attend_in_float32(prior)
    loss, rounded = loss_and_gradients(prior, bf16=True)
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=0)
    assert torch.cosine_similarity(gradients, rounded, dim=0) > 0.999


def test_attention_is_in_float32_under_autocast(monkeypatch):
    prior, seen = build_prior(LAYOUT, depth=1).train(), []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **settings):
        seen.extend([query.dtype, key.dtype, value.dtype])
        return original(query, key, value, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    attend_in_float32(prior)
    loss_and_gradients(prior, bf16=True)
    assert seen and set(seen) == {torch.float32}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of CPUs alone")
@pytest.mark.parametrize("bf16", [True, False])
def test_init_prior_in_bfloat16_on_a_cpu_uses_float32_attention(processor, bf16):
    prior = init_prior(PriorRecipe(bf16=bf16, depth=1), processor)
    assert (prior.config._attn_implementation == FLOAT32) is bf16


def test_attend_in_float32_keeps_other_attention_implementations():
    prior = build_prior(LAYOUT, depth=1, attn_implementation="eager")
    attend_in_float32(prior)
    assert prior.config._attn_implementation == "eager"


def test_save_pretrained_does_not_save_float32_attention(tmp_path):
    prior = build_prior(LAYOUT, depth=1)
    attend_in_float32(prior)
    prior.save_pretrained(tmp_path)
    assert FLOAT32 not in (tmp_path / "config.json").read_text()
    assert load_prior(tmp_path, LAYOUT).config._attn_implementation == "sdpa"
