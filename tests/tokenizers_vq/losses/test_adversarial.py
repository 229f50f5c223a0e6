import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tokenizers_vq import VQVAE, AdversarialLoss, PatchDiscriminator, TokenizerWithLoss
from tokenizers_vq.losses.adversarial import MAX_ADAPTIVE_WEIGHT, adaptive_weight, hinge_loss
from tokenizers_vq.losses.reconstruction import absolute_error, squared_error
from tokenizers_vq.model_with_loss import LOSS_FILE


def small_discriminator() -> PatchDiscriminator:
    return PatchDiscriminator(8, hidden_channels=8)


@pytest.fixture
def model(tiny_vqvae) -> TokenizerWithLoss:
    """A tokenizer whose discriminator joins at once."""
    return TokenizerWithLoss(tiny_vqvae, AdversarialLoss(small_discriminator(), start_step=0)).train()


@pytest.fixture
def normalized(images):
    reconstruction = (images - 0.5) / 0.25 + 0.3 * torch.randn_like(images)
    return reconstruction.requires_grad_(), (images - 0.5) / 0.25


def gradients(module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def all_equal(some: dict, others: dict) -> bool:
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


@pytest.mark.parametrize("image_size", [8, 12, 16, 28, 32, 64, 256])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_discriminator_of_any_image_size_scores_each_patch(image_size, num_channels):
    discriminator = PatchDiscriminator(image_size, num_channels, hidden_channels=2)
    scores = discriminator(torch.rand(2, num_channels, image_size, image_size))
    assert scores.shape[:2] == (2, 1) and min(scores.shape[2:]) >= 2


def test_discriminator_of_a_too_small_image_size_raises():
    with pytest.raises(ValueError, match="image_size of at least 8, got 4"):
        PatchDiscriminator(4)


def test_discriminator_has_the_receptive_field_of_the_paper():
    images = torch.zeros(1, 3, 256, 256, requires_grad=True)
    convolutions = PatchDiscriminator(256, hidden_channels=2).double()
    for layer in convolutions.modules():  # what a score depends on is more than a patch with norms of whole images
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x
    convolutions(images.double())[0, 0, 15, 15].backward()
    rows = images.grad[0].abs().sum(dim=(0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_discriminator_score_does_not_depend_on_the_batch(images):
    discriminator = small_discriminator().train()
    torch.testing.assert_close(discriminator(images)[2:3], discriminator(images[2:3]))


def test_hinge_loss_counts_scores_on_the_wrong_side_of_one():
    real, fake = torch.tensor([3.0, 0.5]), torch.tensor([-4.0, 0.0])
    assert hinge_loss(real, fake) == (0.25 + 0.5) / 2


def test_adaptive_weight_makes_both_gradients_equally_long(normalized):
    reconstruction, target = normalized
    error, generator = squared_error(*normalized), -small_discriminator()(reconstruction).mean()
    weight = adaptive_weight(error, generator, reconstruction)
    of_error, of_generator = (torch.autograd.grad(each, reconstruction)[0].norm() for each in (error, generator))
    torch.testing.assert_close(weight * of_generator, of_error, rtol=1e-3, atol=0)
    assert not weight.requires_grad


def test_adaptive_weight_is_clamped(normalized):
    error, generator = squared_error(*normalized), 0 * normalized[0].sum()
    assert adaptive_weight(1e6 * error, generator, normalized[0]) == MAX_ADAPTIVE_WEIGHT


def test_adversarial_loss_weight_multiplies_the_adaptive_weight(normalized):
    discriminator = small_discriminator()
    losses = [AdversarialLoss(discriminator, start_step=0, weight=weight).train() for weight in (1.0, 0.25)]
    for loss in losses:
        loss(*normalized)
    whole, quarter = (loss.terms["disc_weight"] for loss in losses)
    torch.testing.assert_close(quarter, whole / 4)


def test_adversarial_loss_is_the_sum_of_its_terms(normalized):
    loss = AdversarialLoss(small_discriminator(), start_step=0, reconstruction_loss=absolute_error).train()
    value, parts = loss(*normalized), loss.terms
    assert parts["reconstruction_loss"] == absolute_error(*normalized)
    weighted = parts["disc_weight"] * parts["generator_loss"]
    torch.testing.assert_close(value, parts["reconstruction_loss"] + weighted + parts["discriminator_loss"])
    assert not any(part.requires_grad for part in parts.values())


def test_adversarial_loss_backward_gives_both_networks_their_own_gradients(model, images):
    tokenizer, discriminator = copy.deepcopy(model.tokenizer), copy.deepcopy(model.reconstruction_loss.discriminator)
    model(images).loss.backward()
    weight = model.reconstruction_loss.terms["disc_weight"]

    kept = []

    def generators_own(reconstruction, target):
        kept.extend((reconstruction.detach(), target))
        return squared_error(reconstruction, target) - weight * discriminator(reconstruction).mean()

    tokenizer(images, generators_own).loss.backward()
    discriminator.zero_grad()
    hinge_loss(discriminator(kept[1]), discriminator(kept[0])).backward()
    assert all_equal(gradients(model.tokenizer), gradients(tokenizer))
    assert all_equal(gradients(model.reconstruction_loss.discriminator), gradients(discriminator))


def test_adversarial_loss_before_start_step_ignores_the_discriminator(tiny_vqvae, images):
    plain = copy.deepcopy(tiny_vqvae).train()
    loss = AdversarialLoss(small_discriminator(), start_step=2)
    model = TokenizerWithLoss(tiny_vqvae, loss).train()
    for _ in range(2):
        model.zero_grad()
        plain.zero_grad()
        of_model, of_plain = model(images).loss, plain(images).loss
        of_model.backward()
        of_plain.backward()
        assert of_model == of_plain and all_equal(gradients(tiny_vqvae), gradients(plain))
        assert not any(gradient.any() for gradient in gradients(loss.discriminator).values())
    assert "generator_loss" not in loss.terms
    model(images).loss.backward()
    assert "generator_loss" in loss.terms
    assert all(gradient.any() for name, gradient in gradients(loss.discriminator).items() if name.endswith("weight"))


def test_adversarial_loss_counts_steps_only_in_training(model, images):
    model(images)
    model.eval()(images)
    model.train()(images)
    assert model.reconstruction_loss.steps == 2


def test_adversarial_loss_in_eval_mode_is_the_reconstruction_loss(model, images):
    output = model.eval()(images)
    assert output.loss == model.tokenizer(images).loss
    assert output.metrics["reconstruction_loss"] < output.loss and "generator_loss" not in output.metrics


def test_discriminator_learns_to_distinguish_images_from_blurred_ones():
    sharp = torch.rand(64, 3, 8, 8).round()
    real, blurred = sharp, F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    discriminator = small_discriminator()
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        hinge_loss(discriminator(real[:32]), discriminator(blurred[:32])).backward()
        optimizer.step()
    with torch.no_grad():
        unseen = discriminator(real[32:]).mean(dim=(1, 2, 3)), discriminator(blurred[32:]).mean(dim=(1, 2, 3))
    assert (unseen[0] > unseen[1].max()).float().mean() > 0.9


def test_adversarial_loss_with_one_optimizer_trains_both_networks(model, images):
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(images).loss
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert not [name for name in before if name.endswith("weight") and model.state_dict()[name].equal(before[name])]


def test_adversarial_loss_under_bfloat16_is_finite(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).loss
    loss.backward()
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_save_pretrained_leaves_out_the_discriminator(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.tokenizer.state_dict().keys()
    codes = model.eval().tokenizer.encode(images)
    assert torch.equal(VQVAE.from_pretrained(tmp_path).encode(images), codes)


def test_load_loss_restores_the_discriminator_from_its_own_file(model, images, tmp_path):
    model(images)
    model.save_pretrained(tmp_path)
    again = TokenizerWithLoss(model.tokenizer, AdversarialLoss(small_discriminator(), start_step=0))
    again.load_loss(tmp_path)
    assert all_equal(again.state_dict(), model.state_dict()) and again.reconstruction_loss.steps == 1
    assert not any(name.startswith("tokenizer.") for name in load_file(tmp_path / LOSS_FILE))
