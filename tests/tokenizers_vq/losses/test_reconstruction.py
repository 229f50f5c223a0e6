import pytest
import torch
from torch import nn

from tokenizers_vq import VQVAE, PerceptualLoss, TokenizerWithLoss, VQVAEConfig
from tokenizers_vq.losses.reconstruction import absolute_error, feature_distance, squared_error


class Edges(nn.Module):
    """Two layers of features, with a dropout and a batch norm that must stay still."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5), nn.ReLU())
        self.second = nn.Conv2d(5, 4, 3)

    def forward(self, pil_images):
        return self.first(pil_images), self.second(self.first(pil_images))


@pytest.fixture
def pair(images):
    return (images + 0.1 * torch.randn_like(images)).requires_grad_(), images


def test_pixel_losses_equal_the_means_of_their_formulas():
    reconstruction, target = torch.tensor([[[[1.0, 5.0]]]]), torch.tensor([[[[2.0, 2.0]]]])
    assert squared_error(reconstruction, target) == (1 + 9) / 2
    assert absolute_error(reconstruction, target) == (1 + 3) / 2


def test_config_selects_the_reconstruction_loss(tiny_vqvae, images):
    normalized, quantized = reconstruct(tiny_vqvae, images)
    difference = normalized - (images - 0.5) / 0.25
    for name, error in {"mse": difference.square().mean(), "l1": difference.abs().mean()}.items():
        tiny_vqvae.config.reconstruction_loss = name
        torch.testing.assert_close(tiny_vqvae(images).loss, error + quantized.loss)


def test_config_with_an_unknown_reconstruction_loss_raises():
    with pytest.raises(ValueError, match="reconstruction_loss must be one of mse, l1, got 'l2'"):
        VQVAEConfig(reconstruction_loss="l2")


def test_from_pretrained_restores_the_reconstruction_loss(tmp_path):
    config = VQVAEConfig(
        image_size=8, hidden_channels=16, num_decoder_blocks=1, codebook_size=16, reconstruction_loss="l1"
    )
    VQVAE(config).save_pretrained(tmp_path)
    assert VQVAE.from_pretrained(tmp_path).config.reconstruction_loss == "l1"


def test_forward_with_a_loss_overrides_the_config(tiny_vqvae, images):
    normalized, quantized = reconstruct(tiny_vqvae, images)
    loss = tiny_vqvae(images, lambda reconstruction, target: (reconstruction * target).sum()).loss
    torch.testing.assert_close(loss, (normalized * tiny_vqvae.normalize(images)).sum() + quantized.loss)


def test_feature_distance_compares_directions_at_each_position(images):
    found, wanted = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    cosine = torch.cosine_similarity(found, wanted, dim=1)
    torch.testing.assert_close(feature_distance(found, wanted), (2 - 2 * cosine).mean())
    torch.testing.assert_close(feature_distance(7 * found, wanted), feature_distance(found, wanted))


def test_perceptual_loss_is_the_sum_over_layers_plus_the_pixel_loss(pair):
    features = Edges()
    loss = PerceptualLoss(features, 0.5, absolute_error)
    layers = zip(features(pair[0]), features(pair[1]), strict=True)
    expected = absolute_error(*pair) + 0.5 * sum(feature_distance(*layer) for layer in layers)
    torch.testing.assert_close(loss(*pair), expected)
    assert loss(*pair) == loss.terms["pixel_loss"] + 0.5 * loss.terms["perceptual_loss"]


def test_perceptual_loss_accepts_a_single_feature_tensor(pair):
    loss = PerceptualLoss(lambda images: images.flatten(1), pixel_loss=absolute_error)
    flat = pair[0].flatten(1), pair[1].flatten(1)
    torch.testing.assert_close(loss(*pair), absolute_error(*pair) + feature_distance(*flat))


def test_perceptual_loss_of_equal_images_is_zero(images):
    assert PerceptualLoss(Edges())(images, images) == 0


def test_perceptual_loss_with_pixel_constants_shows_pixels_to_features(images):
    seen = []
    loss = PerceptualLoss(lambda pixels: seen.append(pixels) or pixels, pixel_mean=0.5, pixel_std=0.25)
    loss((images - 0.5) / 0.25, (images - 0.5) / 0.25)
    torch.testing.assert_close(seen[0], images)


def test_perceptual_loss_gives_gradients_to_the_reconstruction_only(pair):
    loss = PerceptualLoss(Edges()).train()
    before = {name: tensor.clone() for name, tensor in loss.features.state_dict().items()}
    loss(*pair).backward()
    assert pair[0].grad.any() and all(parameter.grad is None for parameter in loss.features.parameters())
    assert loss.training and not any(part.training for part in loss.features.modules())
    assert all(tensor.equal(before[name]) for name, tensor in loss.features.state_dict().items())


def test_perceptual_loss_of_zero_features_has_a_finite_gradient(pair):
    PerceptualLoss(lambda images: torch.relu(images - 100))(*pair).backward()
    assert pair[0].grad.isfinite().all()


def test_tokenizer_with_loss_adds_the_perceptual_loss(tiny_vqvae, images):
    model = TokenizerWithLoss(tiny_vqvae, PerceptualLoss(Edges())).eval()
    output = model(images)
    torch.testing.assert_close(output.loss, tiny_vqvae(images, model.reconstruction_loss).loss)
    assert {"mse", "pixel_loss", "perceptual_loss"} <= output.metrics.keys()
    assert torch.equal(output.codes, tiny_vqvae.encode(images))


def test_tokenizer_with_loss_accepts_a_function(tiny_vqvae, images):
    tiny_vqvae.config.reconstruction_loss = "l1"
    assert TokenizerWithLoss(tiny_vqvae, absolute_error)(images).loss == tiny_vqvae(images).loss


def reconstruct(model, images):
    quantized = model.quantizer(model.quant_conv(model.encoder(model.normalize(images))))
    return model.decoder(model.post_quant_conv(quantized.quantized)), quantized
