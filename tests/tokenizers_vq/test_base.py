"""What all image tokenizers promise, in terms of `DiscreteTokenizer`."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tokenizers_vq import VQVAE, VQDrawForImages, VQDrawImageConfig, VQVAEConfig

ROOT = Path(__file__).parents[2]
CONFIGS = [VQVAEConfig, VQDrawImageConfig]


TOKENIZERS = [
    "tiny_vqvae",
    "tiny_residual",
    "tiny_fsq",
    "tiny_vqvae2",
    "tiny_vqdraw",
    "tiny_emu3",
    "tiny_janus",
    "tiny_vqmodel",
]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def rewrite_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_decode_of_encoded_images_equals_the_reconstruction_bit_for_bit(tokenizer, images):
    with torch.no_grad():
        output = tokenizer(images)
    codes = tokenizer.encode(images)
    assert torch.equal(codes, output.codes)
    assert torch.equal(tokenizer.decode(codes), output.reconstruction)


def test_encode_returns_int64_codes_of_the_promised_length_and_range(tokenizer, images):
    codes = tokenizer.encode(images)
    assert codes.dtype == torch.int64 and codes.shape == (len(images), tokenizer.num_codes)
    assert codes.min() >= 0 and codes.max() < tokenizer.codebook_size
    assert len(codes.unique(dim=0)) > 1, "the fixture's images should code differently"


def test_decode_returns_pixels_between_0_and_1(tokenizer, images):
    decoded = tokenizer.decode(tokenizer.encode(images))
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1


def test_encode_of_one_example_equals_its_codes_in_a_batch(tokenizer, images):
    alone = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert torch.equal(alone, tokenizer.encode(images))


def test_encode_and_decode_of_an_empty_batch_are_empty(tokenizer, images):
    codes = tokenizer.encode(images[:0])
    assert codes.shape == (0, tokenizer.num_codes)
    assert tokenizer.decode(codes).shape == images[:0].shape


def test_encode_and_decode_under_bfloat16_autocast_are_unchanged(tokenizer, images):
    codes = tokenizer.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), codes)
        decoded = tokenizer.decode(codes)
    assert torch.equal(decoded, tokenizer.decode(codes))


def test_backward_gives_every_parameter_a_gradient(tokenizer, images):
    tokenizer.train()(images).loss.backward()
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_training_for_a_few_steps_lowers_the_loss(tokenizer, images):
    tokenizer.train()
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = tokenizer(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("training", [True, False])
def test_encode_and_decode_leave_the_model_unchanged(tokenizer, images, training):
    tokenizer.train(training)
    before = copy.deepcopy(dict(tokenizer.named_buffers()) | dict(tokenizer.named_parameters()))
    tokenizer.decode(tokenizer.encode(images))
    after = dict(tokenizer.named_buffers()) | dict(tokenizer.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(module.training == training for module in tokenizer.modules())


def test_encode_and_decode_return_tensors_without_gradient(tokenizer, images):
    assert not tokenizer.decode(tokenizer.encode(images)).requires_grad


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_decode_accepts_every_stored_integer_type(tokenizer, images, dtype):
    codes = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(codes.to(dtype)), tokenizer.decode(codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_decode_of_non_integer_codes_raises(tokenizer, dtype):
    with pytest.raises(ValueError, match=f"codes must be integers, got {dtype}"):
        tokenizer.decode(torch.zeros(1, tokenizer.num_codes, dtype=dtype))


@pytest.mark.parametrize("shape", [(4,), (2, 9), (2, 2, 2), (2, 0)])
def test_decode_of_codes_of_another_shape_raises(tokenizer, shape):
    with pytest.raises(
        ValueError, match=f"codes must be `b {tokenizer.num_codes}`.*got shape `{' '.join(map(str, shape))}`"
    ):
        tokenizer.decode(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("wrong", [-1, "codebook_size"])
def test_decode_of_codes_out_of_range_raises(tokenizer, wrong):
    codes = torch.zeros(2, tokenizer.num_codes, dtype=torch.long)
    codes[1, 2] = tokenizer.codebook_size if wrong == "codebook_size" else wrong
    with pytest.raises(ValueError, match=rf"codes must lie in 0\.\.{tokenizer.codebook_size - 1}"):
        tokenizer.decode(codes)


@pytest.mark.parametrize("method", ["encode", "forward"])
@pytest.mark.parametrize("shape", [(2, 3, 10, 10), (2, 1, 8, 8), (3, 8, 8)])
def test_encode_of_another_image_shape_raises_and_names_both_shapes(tokenizer, method, shape):
    got = " x ".join(map(str, shape[2:])) if shape[1] == 3 else ", ".join(map(str, shape))
    fits = "multiples of [48], got" if shape[1] == 3 else r"`b 3 .*`, got \("
    if not isinstance(tokenizer, VQVAE):
        fits, got = r"`b 3 8 8`, got \(", ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=fits + " ?" + got):
        getattr(tokenizer, method)(torch.zeros(shape))


def test_encode_of_pixels_that_are_not_floats_raises(tokenizer):
    with pytest.raises(ValueError, match="floats in .0, 1., got torch.uint8"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a tensor of floats in .0, 1., got a ndarray"):
        tokenizer.encode(torch.zeros(1, 3, 8, 8).numpy())


def test_encode_of_nan_raises(tokenizer, images):
    images[2, 0, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="got NaN or infinity"):
        tokenizer.encode(images)


@pytest.mark.parametrize("stray", [lambda pixels: 255 * pixels, lambda pixels: 2 * pixels - 1], ids=["255", "-1"])
def test_encode_of_pixels_of_another_scale_raises(tokenizer, images, stray):
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got -?\d"):
        tokenizer.encode(stray(images.round()))


@pytest.mark.parametrize("config_class", CONFIGS)
def test_config_with_an_unknown_setting_raises_and_names_the_nearest(config_class):
    with pytest.raises(ValueError, match="no setting 'codebook_siz'; did you mean 'codebook_size'"):
        config_class(codebook_siz=16)


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(
    ("name", "value"),
    [("codebook_size", "16"), ("codebook_size", 2.5), ("codebook_size", 0), ("codebook_size", True)]
    + [("num_channels", None), ("pixel_std", "x"), ("pixel_std", 0.0), ("pixel_mean", -1.0)],
)
def test_config_with_a_value_of_the_wrong_type_raises(config_class, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a .*number"):
        config_class(**{name: value})


@pytest.mark.parametrize("config_class", CONFIGS)
def test_config_with_an_indivisible_image_size_names_the_nearest(config_class):
    with pytest.raises(ValueError, match="image_size 30 is not a multiple of 4; the nearest are 28 and 32"):
        config_class(image_size=30)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_config_with_an_image_size_below_the_stride_names_the_smallest(config_class):
    with pytest.raises(ValueError, match="the smallest is 4"):
        config_class(image_size=2)


def test_config_survives_saving(tokenizer, saved):
    loaded = type(tokenizer.config).from_pretrained(saved)
    assert loaded.to_diff_dict() == tokenizer.config.to_diff_dict()


def test_from_pretrained_restores_codes_and_weights(tokenizer, saved, images):
    loaded = type(tokenizer).from_pretrained(saved)
    assert not loaded.training and torch.equal(loaded.encode(images), tokenizer.encode(images))
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_auto_model_finds_the_class(tokenizer, saved):
    assert type(AutoModel.from_pretrained(saved)) is type(tokenizer)


def test_auto_model_in_a_new_process_gives_the_same_codes(tiny_vqvae, tiny_vqdraw, images, tmp_path):
    for name, model in {"a": tiny_vqvae, "b": tiny_vqdraw}.items():
        model.save_pretrained(tmp_path / name)
    save_file({"images": images}, tmp_path / "images")
    script = (
        "import json, sys, torch; torch.set_num_threads(1); import tokenizers_vq\n"
        "from safetensors.torch import load_file; from transformers import AutoModel\n"
        "images = load_file('images')['images']\n"
        "print(json.dumps([AutoModel.from_pretrained(name).encode(images).tolist() for name in 'ab']))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    codes = json.loads(answer.stdout.splitlines()[-1])
    assert codes == [tiny_vqvae.encode(images).tolist(), tiny_vqdraw.encode(images).tolist()]


def test_from_pretrained_without_config_raises(tokenizer, saved):
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match="not a model folder: it has no config.json"):
        type(tokenizer).from_pretrained(saved)
    (saved / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no config\.json; it holds a subword tokenizer, which has no model"):
        type(tokenizer).from_pretrained(saved)


@pytest.mark.parametrize("path", ["{tmp}/absent", "./absent", "absent", "absent/model/folder"])
def test_from_pretrained_of_a_missing_folder_raises(tmp_path, path):
    with pytest.raises(ValueError, match="not a model folder: no such folder"):
        VQVAE.from_pretrained(path.format(tmp=tmp_path))


def test_from_pretrained_of_an_unavailable_hub_name_raises():
    with pytest.raises(ValueError, match="cannot load a tokenizer from nobody/nothing"):
        VQDrawForImages.from_pretrained("nobody/nothing")


def test_from_pretrained_with_a_missing_tensor_raises(tokenizer, saved):
    name = next(iter(tokenizer.state_dict()))
    rewrite_weights(saved, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"missing or misshapen tensors .*{name}"):
        type(tokenizer).from_pretrained(saved)


def test_from_pretrained_with_a_misshapen_tensor_raises(tokenizer, saved):
    name = next(iter(tokenizer.state_dict()))
    rewrite_weights(saved, lambda weights: weights.update({name: torch.zeros(3, 1)}))
    with pytest.raises(ValueError, match=f"missing or misshapen tensors .*{name}"):
        type(tokenizer).from_pretrained(saved)


def test_from_pretrained_with_an_unknown_tensor_raises(tokenizer, saved):
    rewrite_weights(saved, lambda weights: weights.update(stranger=torch.zeros(1)))
    with pytest.raises(ValueError, match="unknown tensors .*stranger"):
        type(tokenizer).from_pretrained(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_from_pretrained_with_a_non_finite_tensor_raises(tokenizer, saved, value):
    name = next(iter(dict(tokenizer.named_parameters())))
    rewrite_weights(saved, lambda weights: weights[name].view(-1)[:1].fill_(value))
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        type(tokenizer).from_pretrained(saved)


def test_from_pretrained_of_truncated_weights_raises(tokenizer, saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: Error while deserializing"):
        type(tokenizer).from_pretrained(saved)


def test_from_pretrained_with_invalid_json_raises(tokenizer, saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        type(tokenizer).from_pretrained(saved)


def test_from_pretrained_returns_the_loading_report_on_request(tokenizer, saved):
    _, info = type(tokenizer).from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]


def test_from_pretrained_converts_weights_to_float32(tokenizer, images, saved):
    weights = load_file(saved / "model.safetensors")
    halves = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(halves, saved / "model.safetensors")
    loaded = type(tokenizer).from_pretrained(saved)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert loaded.encode(images).shape == tokenizer.encode(images).shape


def test_from_pretrained_with_another_dtype_raises(tokenizer, saved):
    with pytest.raises(ValueError, match=r"weights in float32, got dtype torch.bfloat16"):
        type(tokenizer).from_pretrained(saved, dtype=torch.bfloat16)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casting_weights_to_another_dtype_raises(tokenizer, images, cast):
    codes = tokenizer.encode(images)
    for module in (tokenizer, torch.nn.ModuleList([tokenizer])):
        with pytest.raises(ValueError, match=r"weights in float32, got dtype torch.(bfloat16|float16|float64)"):
            cast(module)
    assert torch.equal(tokenizer.to("cpu", torch.float32).float().encode(images), codes)
