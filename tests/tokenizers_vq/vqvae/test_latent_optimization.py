"""Latent optimization: better codes of a VQ-VAE by gradient steps on the latents."""

import pytest
import torch
import torch.nn.functional as F

from tokenizers_vq import VQVAE, VQVAEConfig
from tokenizers_vq.vqvae import image_tokenizer
from tokenizers_vq.vqvae.latent_optimization import BACKTRACK_FACTOR, STEP_SIZE, rms

KINDS = {
    "plain": {},
    "residual": {"quantizer": "residual", "num_quantizers": 2},
    "fsq": {"quantizer": "fsq", "fsq_levels": [4, 3, 2]},
    "grids": {"num_grids": 2},
    "l1": {"reconstruction_loss": "l1"},
    "projected": {"codebook_dim": 3},
    "use_cosine_sim": {"use_cosine_sim": True},
    "rotation": {"gradient": "rotation_trick"},
    "loss": {"ema_update": False},
}


def trained(pil_images, **settings) -> VQVAE:
    """Return a model after a few training steps, so that its decoder depends on the codes."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "hidden_channels": 16, "num_decoder_blocks": 1, "codebook_size": 16, "code_dim": 4}
    model = VQVAE(VQVAEConfig(**sizes, **settings))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(pil_images).loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(True)


@pytest.fixture(scope="module")
def many():
    generator = torch.Generator().manual_seed(1)
    small = torch.rand(80, 3, 3, 3, generator=generator)
    return F.interpolate(small, size=8, mode="bicubic", align_corners=True).clamp(0, 1)


@pytest.fixture(scope="module", params=KINDS)
def model(request, many):
    return trained(many, **KINDS[request.param])


@pytest.fixture(scope="module")
def plain(many):
    return trained(many)


def errors(model, pixel_values, codes):
    """Return the error of each image as training measures it: normalized and not clamped to [0, 1]."""
    inverse = model.normalize.inverse
    model.normalize.inverse = lambda normalized: normalized
    try:
        difference = model.decode(codes) - model.normalize(pixel_values)
    finally:
        model.normalize.inverse = inverse
    deviations = difference.abs() if model.config.reconstruction_loss == "l1" else difference.square()
    return deviations.mean(dim=(1, 2, 3))


def test_more_search_steps_never_raise_an_error_and_lower_many(model, many):
    before = errors(model, many, model.encode(many))
    last = before
    for num_steps in (1, 4, 10):
        after = errors(model, many, model.encode(many, search_steps=num_steps))
        assert (after <= last * (1 + 1e-5)).all()
        last = after
    assert (last < before).float().mean() > 0.25 and last.mean() < 0.99 * before.mean()


def test_encode_without_search_steps_gives_the_codes_of_forward(model, many):
    with torch.no_grad():
        assert model.encode(many, search_steps=0).equal(model(many).codes)


def test_search_of_an_image_does_not_depend_on_its_batch(model, many, monkeypatch):
    monkeypatch.setattr(image_tokenizer, "SEARCH_PIXELS", 32 * 8 * 8)
    together = model.encode(many, search_steps=5)
    alone = [model.encode(each[None], search_steps=5) for each in many]
    assert len(many) > 2 * 32 and torch.cat(alone).equal(together)


def test_first_steps_equal_plain_gradient_descent_with_backtracking(plain, many):
    """The plain form: straight-through estimator, reconstruction error and commitment loss."""
    target = plain.normalize(many[:5])
    with torch.no_grad():
        latents = plain.quant_conv(plain.encoder(target))
        start = plain.quantizer(latents)
    moved = latents.clone().requires_grad_()
    through = moved + (start.quantized - moved).detach()
    error = (plain.decoder(plain.post_quant_conv(through)) - target).square().mean(dim=(1, 2, 3))
    commitment_weight = plain.config.commitment_weight * (moved - start.quantized).square().mean(dim=(1, 2, 3))
    (gradient,) = torch.autograd.grad((error + commitment_weight).sum(), moved)
    residual = latents - start.quantized
    with torch.no_grad():
        further = latents - STEP_SIZE * rms(residual) * gradient / rms(gradient)
        shorter = latents - BACKTRACK_FACTOR * STEP_SIZE * rms(residual) * gradient / rms(gradient)
        candidates = [
            image_tokenizer.flatten_codes([plain.quantizer(each).codes]) for each in (latents, further, shorter)
        ]
        costs = torch.stack([errors(plain, many[:5], codes) for codes in candidates])
    one, two = (plain.encode(many[:5], search_steps=steps) for steps in (1, 2))
    for row in range(5):
        expected = candidates[1] if costs[1, row] < costs[0, row] else candidates[0]
        assert one[row].equal(expected[row])
        if costs[1, row] >= costs[0, row]:  # the second step starts again from the latents, shorter
            assert two[row].equal(candidates[2 if costs[2, row] < costs[0, row] else 0][row])


def test_search_leaves_the_model_unchanged(model, many):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.zero_grad()
    model.train()
    model.encode(many, search_steps=3)
    assert model.training and all(each.training for each in model.modules())
    model.eval()
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_search_keeps_the_codes_of_an_image_without_error(plain):
    codes = plain.encode(torch.rand(20, 3, 8, 8))
    exact = plain.decode(codes)
    fixed = plain.encode(exact)
    kept = (errors(plain, exact, fixed) < 1e-9) & (exact > 0).flatten(1).all(dim=1) & (exact < 1).flatten(1).all(dim=1)
    found = plain.encode(exact, search_steps=4)
    assert kept.any() and found[kept].equal(fixed[kept])


def test_encode_with_search_takes_the_steps_of_the_config(plain, many, tmp_path):
    plain.config.search_steps = 4
    plain.save_pretrained(str(tmp_path))
    loaded = VQVAE.from_pretrained(tmp_path)
    plain.config.search_steps = 0
    assert loaded.encode_with_search(many).equal(plain.encode(many, search_steps=4))
    assert plain.encode_with_search(many).equal(plain.encode(many))


def test_search_works_in_inference_mode_and_under_autocast(plain, many):
    expected = plain.encode(many, search_steps=3)
    with torch.inference_mode():
        assert plain.encode(many, search_steps=3).equal(expected)
    with torch.inference_mode():
        inside = many.clone()
    assert plain.encode(inside, search_steps=3).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain.encode(many, search_steps=3).equal(expected)
    assert not expected.requires_grad


def test_search_lowers_the_error_of_another_image_size(plain):
    wide = torch.rand(3, 3, 8, 24)
    before, after = plain.encode(wide), plain.encode(wide, search_steps=5)
    shown = [plain.decode(codes, image_size=(8, 24)) for codes in (before, after)]
    assert (shown[1] - wide).square().mean() < (shown[0] - wide).square().mean()


def test_search_of_an_empty_batch_returns_no_codes(plain):
    assert plain.encode(torch.rand(0, 3, 8, 8), search_steps=3).shape == (0, plain.num_codes)


def test_search_splits_large_batches(plain, monkeypatch):
    sizes = []
    monkeypatch.setattr(plain.decoder, "forward", lambda x, old=plain.decoder.forward: sizes.append(len(x)) or old(x))
    monkeypatch.setattr(image_tokenizer, "SEARCH_PIXELS", 3 * 8 * 8)
    plain.encode(torch.rand(7, 3, 8, 8), search_steps=1)
    assert sizes == [3, 3, 3, 3, 2, 2]  # two passes for each batch; the single last image is duplicated


def test_negative_search_steps_are_rejected(plain, many):
    with pytest.raises(ValueError, match="Expected search_steps of at least 0, got -1"):
        plain.encode(many, search_steps=-1)
    with pytest.raises(ValueError, match="search_steps must be a whole number of at least 0"):
        VQVAEConfig(search_steps=-1)
