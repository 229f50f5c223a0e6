import pytest
import torch

from tokenizers_vq import VQVAE, VQVAEConfig


def test_codes_are_the_latent_grid_row_by_row(tiny_vqvae, images):
    grid = tiny_vqvae.quantizer(tiny_vqvae._latents(tiny_vqvae.normalize(images))).codes
    assert grid.shape == (6, 2, 2)
    assert torch.equal(tiny_vqvae.encode(images), grid.flatten(1))


def test_the_picture_has_a_code_for_each_cell(tiny_vqvae):
    assert tiny_vqvae.code_shape == (2, 2) and tiny_vqvae.num_codes == 4 and tiny_vqvae.code_groups == (4,)


@pytest.mark.parametrize("num_downsamples", [1, 2, 3])
def test_each_downsample_halves_the_grid(num_downsamples, images):
    config = VQVAEConfig(image_size=8, num_downsamples=num_downsamples, hidden_channels=16, num_decoder_blocks=1)
    model = VQVAE(config).eval()
    assert model.code_shape == (8 >> num_downsamples, 8 >> num_downsamples)
    assert model.decode(model.encode(images)).shape == images.shape


@pytest.mark.parametrize("hidden_channels", [2, 8, 24])
def test_any_width_runs(hidden_channels, images):
    config = VQVAEConfig(image_size=8, hidden_channels=hidden_channels, num_decoder_blocks=1)
    assert VQVAE(config).eval()(images).reconstruction.shape == images.shape


def test_the_loss_is_the_error_in_normalised_pixels_plus_the_codebooks(tiny_vqvae, images):
    quantized = tiny_vqvae.quantizer(tiny_vqvae._latents(tiny_vqvae.normalize(images)))
    error = (tiny_vqvae._reconstruct(quantized.quantized) - (images - 0.5) / 0.25).square().mean()
    torch.testing.assert_close(tiny_vqvae(images).loss, error + quantized.loss)


def test_the_reported_error_is_in_pixels(tiny_vqvae, images):
    normalized = tiny_vqvae._reconstruct(
        tiny_vqvae.quantizer(tiny_vqvae._latents(tiny_vqvae.normalize(images))).quantized
    )
    torch.testing.assert_close(tiny_vqvae(images).metrics["mse"], (normalized * 0.25 + 0.5 - images).square().mean())


def test_encoding_in_training_leaves_a_codebook_that_has_not_started(images):
    config = VQVAEConfig(image_size=8, hidden_channels=16, num_decoder_blocks=1, codebook_size=16, code_dim=4)
    model = VQVAE(config).train()
    model.encode(images)
    assert not model.quantizer.started and model.quantizer.training


def test_without_average_the_codebook_is_a_parameter_with_a_gradient(images):
    config = VQVAEConfig(image_size=8, hidden_channels=16, num_decoder_blocks=1, codebook_size=16, ema=False)
    model = VQVAE(config).train()
    model(images).loss.backward()
    assert model.quantizer.codebook.grad.any()


def test_bfloat16_training_stays_finite_and_near_float32(tiny_vqvae, images):
    expected = tiny_vqvae(images).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiny_vqvae(images).loss
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)
