import pytest
import torch

from tokenizers_vq import FSQ, VQVAE, ResidualQuantizer, VectorQuantizer, VQVAEConfig


def quantized_latents(model, images):
    return model.quantizer(model.quant_conv(model.encoder(model.normalize(images))))


def test_encode_flattens_the_latent_grid_row_by_row(tiny_vqvae, images):
    grid = quantized_latents(tiny_vqvae, images).codes
    assert grid.shape == (6, 2, 2)
    assert torch.equal(tiny_vqvae.encode(images), grid.flatten(1))


def test_code_shape_has_a_code_for_each_cell(tiny_vqvae):
    assert tiny_vqvae.code_shape == (2, 2) and tiny_vqvae.num_codes == 4 and tiny_vqvae.positions_per_codebook == (4,)


@pytest.mark.parametrize("num_downsamples", [1, 2, 3])
def test_num_downsamples_halves_the_grid_each_time(num_downsamples, images):
    config = VQVAEConfig(image_size=8, num_downsamples=num_downsamples, hidden_channels=16, num_decoder_blocks=1)
    model = VQVAE(config).eval()
    assert model.code_shape == (8 >> num_downsamples, 8 >> num_downsamples)
    assert model.decode(model.encode(images)).shape == images.shape


@pytest.mark.parametrize("hidden_channels", [1, 2, 8, 24])
def test_vqvae_any_hidden_channels_runs(hidden_channels, images):
    config = VQVAEConfig(image_size=8, hidden_channels=hidden_channels, num_decoder_blocks=1)
    assert VQVAE(config).eval()(images).reconstruction.shape == images.shape


def test_loss_is_the_error_of_normalized_pixels_plus_the_quantizer_loss(tiny_vqvae, images):
    quantized = quantized_latents(tiny_vqvae, images)
    error = (
        (tiny_vqvae.decoder(tiny_vqvae.post_quant_conv(quantized.quantized)) - (images - 0.5) / 0.25).square().mean()
    )
    torch.testing.assert_close(tiny_vqvae(images).loss, error + quantized.loss)


def test_mse_metric_is_in_pixels(tiny_vqvae, images):
    quantized = quantized_latents(tiny_vqvae, images).quantized
    normalized = tiny_vqvae.decoder(tiny_vqvae.post_quant_conv(quantized))
    torch.testing.assert_close(tiny_vqvae(images).metrics["mse"], (normalized * 0.25 + 0.5 - images).square().mean())


def test_encode_in_training_mode_does_not_initialize_the_codebook(images):
    config = VQVAEConfig(image_size=8, hidden_channels=16, num_decoder_blocks=1, codebook_size=16, code_dim=4)
    model = VQVAE(config).train()
    model.encode(images)
    assert not model.quantizer.initialized and model.quantizer.training


def test_codebook_without_ema_is_a_parameter_with_a_gradient(images):
    config = VQVAEConfig(image_size=8, hidden_channels=16, num_decoder_blocks=1, codebook_size=16, ema_update=False)
    model = VQVAE(config).train()
    model(images).loss.backward()
    assert model.quantizer.codebook.grad.any()


def test_loss_under_bfloat16_autocast_is_near_float32(tiny_vqvae, images):
    expected = tiny_vqvae(images).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiny_vqvae(images).loss
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)


# Quantizers


def build(**settings) -> VQVAE:
    """Build a small model for images of 8x8 pixels."""
    sizes = {"image_size": 8, "hidden_channels": 16, "num_decoder_blocks": 1, "codebook_size": 16, "code_dim": 4}
    return VQVAE(VQVAEConfig(**(sizes | settings)))


def test_fsq_codebook_size_is_the_product_of_its_levels():
    model = build(quantizer="fsq", fsq_levels=[4, 3, 2])
    assert isinstance(model.quantizer, FSQ) and model.codebook_size == model.config.codebook_size == 24


def test_residual_codes_are_ordered_by_codebook(images):
    model = build(quantizer="residual", num_quantizers=3).eval()
    assert isinstance(model.quantizer, ResidualQuantizer)
    assert (
        model.code_shape == (3, 2, 2) and model.positions_per_codebook == (4, 4, 4) and model.supports_prefix_decoding
    )
    by_cell = quantized_latents(model, images).codes
    assert torch.equal(model.encode(images), by_cell.movedim(-1, 1).flatten(1))


def test_decode_any_prefix_of_residual_codes_and_whole_codebooks_equal_their_sum(tiny_residual, images):
    codes = tiny_residual.encode(images)
    stages = list(tiny_residual.decode_progressively(codes))
    assert len(stages) == 2 and torch.equal(stages[-1], tiny_residual.decode(codes))
    first = tiny_residual.quantizer.lookup(codes[:, :4].unflatten(1, (2, 2, 1)))
    expected = tiny_residual.normalize.inverse(tiny_residual.decoder(tiny_residual.post_quant_conv(first)))
    assert torch.equal(stages[0], expected)
    for last in range(1, 9):
        assert tiny_residual.decode(codes[:, :last]).shape == images.shape


def test_lookup_of_a_prefix_adds_nothing_for_missing_codes(tiny_residual, images):
    codes = tiny_residual.encode(images)
    whole, cut = (tiny_residual._lookup(tiny_residual.quantizer, each, 2, 2) for each in (codes, codes[:, :6]))
    assert torch.equal(cut[:, :, 0], whole[:, :, 0]) and not torch.equal(cut[:, :, 1], whole[:, :, 1])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quantizer": "gumbel"}, "quantizer must be one of vector, residual, fsq, got 'gumbel'"),
        ({"gradient": "none"}, "gradient must be one of straight_through, rotation_trick, got 'none'"),
        ({"quantizer": "residual", "use_cosine_sim": True}, "Expected use_cosine_sim=False for a ResidualQuantizer"),
        ({"quantizer": "fsq", "fsq_levels": [8, 1]}, "(levels|fsq_levels).* whole numbers of at least 2"),
        ({"quantizer": "fsq", "fsq_levels": []}, "(levels|fsq_levels).* whole numbers of at least 2"),
        ({"num_grids": 0}, "num_grids must be a whole number of at least 1"),
        ({"decay": 1.5}, "Expected decay in \\[0, 1\\), got 1.5"),
    ],
)
def test_config_rejects_invalid_quantizer_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        build(**settings)


# Sizes


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (4, 4), (16, 8)])
@pytest.mark.parametrize("settings", [{}, {"quantizer": "residual", "num_quantizers": 2}, {"quantizer": "fsq"}])
def test_encode_and_decode_any_multiple_of_the_stride(size, settings):
    model, images = build(**settings).eval(), torch.rand(2, 3, *size)
    codes = model.encode(images)
    assert codes.shape == (2, model.num_quantizers * size[0] * size[1] // 16)
    assert torch.equal(model.decode(codes, image_size=size), model(images).reconstruction)


@pytest.mark.parametrize(
    ("size", "nearest"), [((30, 33), "28 x 32, 32 x 36"), ((2, 8), "4 x 8"), ((8, 9), "8 x 8, 8 x 12")]
)
def test_encode_rejects_other_sizes_and_names_the_nearest(tiny_vqvae, size, nearest):
    with pytest.raises(ValueError, match=f"multiples of 4, got {size[0]} x {size[1]}; the nearest: {nearest}"):
        tiny_vqvae.encode(torch.rand(1, 3, *size))


def test_decode_rejects_a_wrong_number_of_codes(tiny_vqvae):
    codes = torch.zeros(1, 15, dtype=torch.long)
    with pytest.raises(ValueError, match=r"codes must be `b 15`, got shape `1 4`"):
        tiny_vqvae.decode(codes[:, :4], image_size=(12, 20))
    with pytest.raises(ValueError, match="image_size 10 is not a multiple of 4; the nearest are 8 and 12"):
        tiny_vqvae.decode(codes, image_size=(10, 20))


# Several grids


def test_vqvae2_coarser_grids_come_first(tiny_vqvae2, images):
    assert (
        tiny_vqvae2.positions_per_codebook == (1, 4) and tiny_vqvae2.code_shape == (5,) and tiny_vqvae2.num_codes == 5
    )
    assert tiny_vqvae2.config.stride == 8 and not tiny_vqvae2.supports_prefix_decoding
    assert tiny_vqvae2.encode(images).shape == (6, 5)


def test_vqvae2_coarse_code_conditions_fine_codes_and_the_image(tiny_vqvae2, images):
    codes = tiny_vqvae2.encode(images)
    each = codes[:1].repeat(16, 1)
    each[:, 0] = torch.arange(16)
    assert len(tiny_vqvae2.decode(each).unique(dim=0)) > 1
    with torch.no_grad():
        tiny_vqvae2.top_grids[0].decoder[-1][-1].weight.mul_(30)
    assert not torch.equal(tiny_vqvae2.encode(images)[:, 1:], codes[:, 1:])


def test_vqvae2_three_grids_code_another_size(images):
    model, pixels = build(num_grids=3, image_size=16).eval(), torch.rand(2, 3, 32, 16)
    assert model.positions_per_codebook == (1, 4, 16)
    codes = model.encode(pixels)
    assert codes.shape == (2, 2 + 8 + 32)
    assert torch.equal(model.decode(codes, image_size=(32, 16)), model(pixels).reconstruction)


def test_config_rejects_a_size_that_the_coarsest_grid_does_not_divide():
    with pytest.raises(ValueError, match="image_size 12 is not a multiple of 8; the nearest are 8 and 16"):
        VQVAEConfig(image_size=12, num_grids=2)


# Initialization


@pytest.mark.parametrize(
    "settings", [{}, {"quantizer": "residual", "num_quantizers": 2}, {"num_grids": 2}, {"use_cosine_sim": True}]
)
def test_init_from_data_initializes_every_codebook(settings):
    model = build(**settings).train()
    images = torch.rand(64, 3, 8, 8)
    before = [vectors.clone() for vectors in model.codebook_vectors()]
    model.init_from_data(images)
    assert all(not torch.equal(*pair) for pair in zip(before, model.codebook_vectors(), strict=True))
    quantizers = [module for module in model.modules() if isinstance(module, VectorQuantizer)]
    assert all(quantizer.initialized for quantizer in quantizers) and model.training
    assert not any(quantizer.usage.histogram.any() for quantizer in quantizers), "initialization is not counted"


def test_initialized_vqvae_trains_in_one_compiled_graph(tiny_vqvae, images):
    tiny_vqvae.train()
    tiny_vqvae.init_from_data(images.repeat(4, 1, 1, 1))
    loss = torch.compile(tiny_vqvae, fullgraph=True, backend="aot_eager")(images).loss
    assert loss.isfinite()


def test_code_usage_is_reported_only_in_training(tiny_vqvae, images):
    usage = {"perplexity", "code_usage"}
    assert usage <= tiny_vqvae.train()(images).metrics.keys()
    assert not usage & tiny_vqvae.eval()(images).metrics.keys()
