import pytest
import torch

from tokenizers_vq import VQDrawForImages, VQDrawImageConfig
from tokenizers_vq.vqdraw.refiners import ConvRefiner, SegmentedRefiner

TINY = {"image_size": 8, "num_stages": 4, "codebook_size": 8, "hidden_channels": 16, "feature_channels": 8}


def build(**settings) -> VQDrawForImages:
    """A tiny model as training finds it."""
    torch.manual_seed(0)
    return VQDrawForImages(VQDrawImageConfig(**TINY | {"num_residual_blocks": 1} | settings))


def perturb(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def test_an_image_has_a_code_for_each_stage(tiny_vqdraw):
    assert tiny_vqdraw.code_shape == (4,) and tiny_vqdraw.codebook_size == 8
    assert tiny_vqdraw.positions_per_codebook == (1, 1, 1, 1)


def test_any_prefix_of_the_codes_decodes(tiny_vqdraw, images):
    codes = tiny_vqdraw.encode(images)
    prefixes = [tiny_vqdraw.decode(codes[:, :length]) for length in (1, 2, 3, 4)]
    assert all(prefix.shape == images.shape for prefix in prefixes)
    assert not torch.equal(prefixes[0], prefixes[3])


def test_decode_progressively_equals_decoding_every_prefix(tiny_vqdraw, images):
    codes = tiny_vqdraw.encode(images)
    stages = list(tiny_vqdraw.decode_progressively(codes))
    assert len(stages) == 4
    assert all(torch.equal(stage, tiny_vqdraw.decode(codes[:, :length])) for length, stage in enumerate(stages, 1))


def test_only_active_stages_have_codes(images):
    model = build(active_stages=2).eval()
    perturb(model)
    assert model.num_codes == 2 and model.encode(images).shape == (6, 2)


def test_more_codes_than_stages_raise(tiny_vqdraw):
    with pytest.raises(ValueError, match="codes must be `b 4` or a prefix, got shape `1 5`"):
        tiny_vqdraw.decode(torch.zeros(1, 5, dtype=torch.long))


def test_new_model_decodes_to_the_mean_image(images):
    model = build().eval()
    assert torch.equal(model.decode(model.encode(images)), torch.full_like(images, 0.5))


def test_init_from_data_lowers_the_error_code_by_code(images):
    model = build().eval()
    model.init_from_data(images.repeat(2, 1, 1, 1) + 0.1 * torch.rand(12, 3, 8, 8))
    codes = model.encode(images)
    errors = [(model.decode(codes[:, :length]) - images).square().mean() for length in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True) and errors[0] < (images - 0.5).square().mean()


def test_init_from_data_with_another_image_size_raises():
    with pytest.raises(ValueError, match="`b 3 8 8`, got"):
        build().init_from_data(torch.zeros(2, 3, 16, 16))


def test_init_from_data_with_non_finite_pixels_raises(images):
    with pytest.raises(ValueError, match="got NaN or infinity"):
        build().init_from_data(torch.full_like(images, torch.nan))


def test_loss_is_computed_in_normalized_pixels(tiny_vqdraw, images):
    drawing = tiny_vqdraw.vqdraw((images - 0.5) / 0.25)
    torch.testing.assert_close(tiny_vqdraw(images).loss, tiny_vqdraw.vqdraw.loss(drawing))


def test_mse_metric_is_in_pixels(tiny_vqdraw, images):
    state = tiny_vqdraw.vqdraw((images - 0.5) / 0.25).state
    torch.testing.assert_close(tiny_vqdraw(images).metrics["mse"], (state * 0.25 + 0.5 - images).square().mean())


def test_first_stage_usage_is_the_fraction_of_options_chosen(tiny_vqdraw, images):
    output = tiny_vqdraw(images)
    torch.testing.assert_close(output.metrics["first_stage_usage"].item(), len(output.codes[:, 0].unique()) / 6)


@pytest.mark.parametrize("segment_length", [1, 2])
def test_segments_have_refiners_of_their_own(segment_length):
    refiner = build(segment_length=segment_length).vqdraw.refiner
    assert isinstance(refiner, SegmentedRefiner) and len(refiner.refiners) == 4 // segment_length


@pytest.mark.parametrize("segment_length", [0, 4])
def test_one_segment_is_one_refiner(segment_length):
    assert isinstance(build(segment_length=segment_length).vqdraw.refiner, ConvRefiner)


def test_later_segment_does_not_change_earlier_stages(images):
    model = build(segment_length=2).eval()
    perturb(model)
    codes = model.encode(images)
    before = [model.decode(codes[:, :length]) for length in (2, 3)]
    perturb(model.vqdraw.refiner.refiners[1])
    assert torch.equal(model.encode(images)[:, :2], codes[:, :2])
    assert torch.equal(model.decode(codes[:, :2]), before[0])
    assert not torch.equal(model.decode(codes[:, :3]), before[1])


def test_segment_length_that_does_not_divide_num_stages_raises():
    with pytest.raises(ValueError, match="num_stages 4 is not a multiple of segment_length 3"):
        build(segment_length=3)


@pytest.mark.parametrize("settings", [{"segment_length": 2}, {"checkpoint_stages": True}, {"grad_decay": 0.3}])
def test_every_variant_decodes_to_its_reconstruction_and_trains_every_parameter(settings, images):
    model = build(**settings)
    perturb(model)
    output = model(images)
    assert torch.equal(model.decode(output.codes), output.reconstruction.detach())
    output.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("beam_size", [1, 2])
@pytest.mark.parametrize("refiner", ["conv", "mnist"])
def test_encode_in_bfloat16_runs_the_refiner_but_not_the_errors_in_it(refiner, beam_size, monkeypatch):
    sizes = {"image_size": 28 if refiner == "mnist" else 8, "num_stages": 3, "codebook_size": 8}
    model = VQDrawForImages(VQDrawImageConfig(**sizes, refiner=refiner, num_channels=1, encode_dtype="bfloat16")).eval()
    seen, error = [], model.vqdraw.stage_loss

    def watched_error(options, state, target):
        seen.append((torch.is_autocast_enabled("cpu"), state.dtype))
        return error(options, state, target)

    monkeypatch.setattr(model.vqdraw, "stage_loss", watched_error)
    inside = []
    handle = model.vqdraw.refiner.register_forward_hook(
        lambda *_: inside.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
    )
    pixels = torch.rand(2, 1, sizes["image_size"], sizes["image_size"])
    codes = model.encode(pixels, beam_size=beam_size)
    handle.remove()
    assert codes.dtype == torch.int64 and seen and set(seen) == {(False, torch.float32)}
    assert set(inside) == {torch.bfloat16}


def test_unknown_encode_dtype_raises():
    with pytest.raises(ValueError, match="encode_dtype must be one of float32, bfloat16, got 'float16'"):
        VQDrawImageConfig(encode_dtype="float16")
