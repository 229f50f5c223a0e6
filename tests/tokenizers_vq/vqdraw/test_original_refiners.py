"""Checkpoints of the original code: loaded, and compared with what that code computed."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizers_vq import VQDrawForImages, VQDrawImageConfig, load_image
from tokenizers_vq.images.processing import pixels_from_images
from tokenizers_vq.modules.stage_conditioning import StageGain
from tokenizers_vq.vqdraw.original_refiners import PRESETS, OriginalRefiner, ResidualSequential

SHARED = Path(__file__).parents[4] / "shared"
REFERENCE = SHARED / "reference" / "vqdraw_mnist_60bit.safetensors"
BITS = {"mnist": 60, "svhn": 120, "cifar10": 600, "celeba": 600}
PARAMETERS = {"mnist": 0.4876e6, "cifar10": 10 * 8.9e6}
SIZES = {"mnist": {"segment_length": 0, "num_stages": 3}}
needs_reference = pytest.mark.skipif(not REFERENCE.is_file(), reason="the published weights are not available")


def plain(stack: nn.ModuleList, x: Tensor, stage: int) -> Tensor:
    """Apply the layers in order, with gains as products: the definition."""
    inside = x
    for layer in stack:
        if isinstance(layer, StageGain):
            x = x * layer.gain[stage][:, None, None]
        else:
            x = plain(layer, x, stage) if isinstance(layer, nn.ModuleList) else layer(x)
    return inside + x if isinstance(stack, ResidualSequential) else x


def original_state_dict(model: VQDrawForImages, *, last_layer: int, several: bool) -> dict[str, Tensor]:
    """Return a state dict with the names of the original code."""
    bias = model.vqdraw.biases.data[0]
    if model.config.stage_loss == "gaussian_nll":
        bias = rearrange(bias, "k (s c) h w -> k c h w s", s=2).contiguous()
    renamed = {"bias": bias, "_grad_decay": torch.tensor(0.25)}
    renamed["_stages"] = torch.tensor(model.num_codes)
    head = f".layers.{last_layer}.module_list." if several else f".layers.{last_layer}."
    for name, tensor in model.vqdraw.refiner.state_dict().items():
        name = f"refiner.{name}".replace(".refiners.", ".segments.").replace(".gain", ".embeddings")
        renamed[name.replace(".heads.", head) if several else name.replace(".heads.0.", head)] = tensor
    return renamed


def small(name: str, **overrides: str) -> VQDrawForImages:
    """A model with few stages and options, its biases moved off zero."""
    settings = {"codebook_size": 3, "num_stages": 4, "segment_length": 2} | SIZES.get(name, {}) | overrides
    model = VQDrawForImages(VQDrawImageConfig.preset(name, **settings)).eval()
    nn.init.normal_(model.vqdraw.biases)
    return model


def last_layer(model: VQDrawForImages) -> int:
    return len(next(each for each in model.modules() if isinstance(each, OriginalRefiner)).layers)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_bits(name):
    config = VQDrawImageConfig.preset(name)
    assert config.num_stages * 6 == BITS[name] and config.codebook_size == 64


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_sizes(name):
    with torch.device("meta"):
        model = VQDrawForImages(VQDrawImageConfig.preset(name))
    assert sum(each.numel() for each in model.vqdraw.refiner.parameters()) == pytest.approx(PARAMETERS[name], rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_folded_gains_equal_multiplied_ones(name):
    refiner = OriginalRefiner(name, num_stages=2, codebook_size=3)
    state = torch.randn(2, PRESETS[name]["num_channels"], PRESETS[name]["image_size"], PRESETS[name]["image_size"])
    torch.testing.assert_close(refiner.layers(state, 1), plain(refiner.layers, state, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "stage_loss"), [*((name, "mse") for name in PRESETS), ("mnist", "gaussian_nll")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_checkpoint_of_every_architecture_loads_with_equal_codes(name, stage_loss, suffix, tmp_path):
    model = small(name, stage_loss=stage_loss)
    tensors = original_state_dict(model, last_layer=last_layer(model), several=name == "svhn")
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    loaded = VQDrawForImages.from_vq_draw_checkpoint(path)
    assert (loaded.config.refiner, loaded.config.stage_loss, loaded.config.grad_decay) == (name, stage_loss, 0.25)
    assert loaded.config.segment_length == model.config.segment_length
    pixels = torch.rand(2, model.config.num_channels, model.config.image_size, model.config.image_size)
    assert torch.equal(loaded.encode(pixels), model.encode(pixels))
    loaded.save_pretrained(tmp_path / "ours")
    assert torch.equal(VQDrawForImages.from_pretrained(tmp_path / "ours").encode(pixels), model.encode(pixels))


def test_overrides_set_what_tensors_do_not_tell(tmp_path):
    model = small("mnist", stage_loss="bce")
    save_file(original_state_dict(model, last_layer=last_layer(model), several=False), tmp_path / "model.safetensors")
    loaded = VQDrawForImages.from_vq_draw_checkpoint(tmp_path / "model.safetensors", stage_loss="bce", beam_size=2)
    pixels = torch.rand(2, 1, 28, 28).round()
    assert loaded.config.beam_size == 2 and torch.equal(loaded.encode(pixels), model.encode(pixels))


def test_gaussian_refiner_gets_standard_deviations():
    refiner = OriginalRefiner("mnist", num_stages=2, codebook_size=3, gaussian=True)
    mean, log_std = torch.randn(2, 2, 1, 28, 28)
    steps = refiner(torch.cat([mean, log_std], dim=1), 1).all_steps()
    seen = plain(refiner.layers, torch.cat([mean, log_std.exp()], dim=1), 1)
    plain_steps = rearrange(refiner.heads[0](seen) * refiner.output_scale, "b (k s) h w -> b k s h w", s=2)
    torch.testing.assert_close(steps, plain_steps, atol=1e-4, rtol=1e-4)


def test_checkpoint_trained_on_fewer_stages_sets_active_stages(tmp_path):
    model = small("mnist")
    tensors = original_state_dict(model, last_layer=last_layer(model), several=False) | {"_stages": torch.tensor(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = VQDrawForImages.from_vq_draw_checkpoint(tmp_path / "model.safetensors")
    assert loaded.num_codes == 2 and loaded.config.num_stages == 3


@pytest.mark.parametrize(
    ("name", "stage_loss"), [*((name, "mse") for name in PRESETS), ("mnist", "gaussian_nll"), ("mnist", "bce")]
)
def test_published_architectures_decode_to_their_reconstruction_and_train_every_parameter(name, stage_loss):
    model = small(name, stage_loss=stage_loss)
    pixels = torch.rand(3, model.config.num_channels, model.config.image_size, model.config.image_size)
    output = model(pixels)
    assert torch.equal(model.decode(output.codes), output.reconstruction.detach())
    model.train()(pixels).loss.backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    unused = {name for name, _ in model.named_parameters()} - used
    assert not {each for each in unused if "heads" not in each}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(3)}, "fit none"),
        ({"bias": torch.zeros(8, 1, 28, 28), "refiner.layers.1.embeddings": torch.zeros(4, 32)}, "4 stages"),
    ],
)
def test_tensors_of_another_architecture_raise(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        VQDrawForImages.from_vq_draw_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("bias", torch.zeros(3, 1, 32, 28), r"bias is \(3, 1, 32, 28\)"),
        ("bias", torch.full((3, 1, 28, 28), torch.nan), "holds values that are not finite"),
        ("_stages", torch.tensor([1, 2]), "fit none"),
    ],
    ids=["oblong", "NaN", "two numbers of stages"],
)
def test_invalid_tensors_raise(name, tensor, message, tmp_path):
    model = small("mnist")
    tensors = original_state_dict(model, last_layer=last_layer(model), several=False)
    save_file(tensors | {name: tensor}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        VQDrawForImages.from_vq_draw_checkpoint(tmp_path / "model.safetensors")


def test_files_without_tensors_raise(tmp_path):
    for name, content in (("a.safetensors", b"{"), ("b.pt", b"not torch"), ("c.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            VQDrawForImages.from_vq_draw_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="nothing"):
        VQDrawForImages.from_vq_draw_checkpoint(tmp_path / "nothing.pt")


class Hostile:
    """Would write a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"bias": Hostile(tmp_path / "harm")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"Expected .*model\.pt to hold tensors only"):
        VQDrawForImages.from_vq_draw_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "harm").exists()


def test_error_does_not_advise_unsafe_loading(tmp_path):
    Path(tmp_path, "model.pt").write_text("no weights")
    with pytest.raises(ValueError, match=r"tensors only: torch\.save did not write it") as refusal:
        VQDrawForImages.from_vq_draw_checkpoint(tmp_path / "model.pt")
    assert "weights_only" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refiner": "imagenet"}, "refiner must be one of conv, mnist, svhn, cifar10, celeba, got 'imagenet'"),
        ({"refiner": "mnist"}, "Expected num_channels 1 for refiner 'mnist', got 3"),
        ({"active_stages": 21}, "active_stages 21 is more than num_stages 20"),
        ({"num_biased_stages": 21}, "num_biased_stages 21 is more than num_stages 20"),
    ],
)
def test_inconsistent_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        VQDrawImageConfig(**settings)


def test_unknown_preset_raises():
    with pytest.raises(ValueError, match="preset must be one of mnist, svhn, cifar10, celeba, got 'imagenet'"):
        VQDrawImageConfig.preset("imagenet")


# Against the published weights


@pytest.fixture(scope="module")
def published() -> VQDrawForImages:
    return VQDrawForImages.from_vq_draw_checkpoint(REFERENCE)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """The first 1,000 test digits, `n 1 28 28`."""
    rows = pq.read_table(SHARED / "data" / "mnist" / "test.parquet").slice(0, 1000).column("image").to_pylist()
    return pixels_from_images([load_image(row["bytes"]) for row in rows], image_size=28, num_channels=1)


@needs_reference
def test_published_model_encodes_1000_digits_exactly(published, digits):
    expected = load_file(REFERENCE.with_name("vqdraw_mnist_expected.safetensors"))
    with torch.no_grad():
        drawings = [published.vqdraw(published.normalize(some)) for some in digits.split(100)]
    assert torch.equal(torch.cat([each.codes for each in drawings]), expected["codes"].long())
    stage_errors = torch.cat([each.best_error for each in drawings])
    torch.testing.assert_close(stage_errors.mean(dim=0), expected["stage_mse"].mean(dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(stage_errors[:, -1], expected["mse"], atol=2e-6, rtol=0)


@needs_reference
def test_beam_search_lowers_the_error_of_the_published_model(published, digits):
    some = digits[:100]
    target = published.normalize(some)
    errors = {
        beam: (published.vqdraw.decode(published.encode(some, beam_size=beam)) - target).square().mean().item()
        for beam in (1, 2, 4, 8)
    }
    assert errors[2] < 0.905 * errors[1] and errors[4] < 0.835 * errors[1] and errors[8] < 0.81 * errors[1]


@needs_reference
@pytest.mark.parametrize("beam_size", [1, 2])
def test_codes_encoded_in_bfloat16_have_the_same_error(published, digits, beam_size, monkeypatch):
    target = published.normalize(digits[:500])
    errors = {}
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(published.config, "encode_dtype", dtype)
        codes = published.encode(digits[:500], beam_size=beam_size)
        errors[dtype] = (published.vqdraw.decode(codes) - target).square().mean().item()
    assert errors["bfloat16"] != errors["float32"]
    assert errors["bfloat16"] == pytest.approx(errors["float32"], rel=0.003)
