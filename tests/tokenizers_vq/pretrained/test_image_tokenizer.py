"""Wrapped tokenizers of other libraries. The promises of all tokenizers are tested in test_base.py."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from tokenizers_vq import PretrainedImageTokenizer, PretrainedImageTokenizerConfig
from tokenizers_vq.pretrained.adapters import build

TOKENIZERS = ["tiny_chameleon", "tiny_emu3", "tiny_janus", "tiny_vqmodel"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request) -> PretrainedImageTokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture
def folder(tokenizer, tmp_path):
    """The model as its own library saves it."""
    tokenizer.model.save_pretrained(tmp_path)
    return tmp_path


def weights_in(folder):
    return next(folder.glob("*.safetensors"))


def rewrite_weights(folder, change) -> None:
    weights = load_file(weights_in(folder))
    change(weights)
    save_file(weights, weights_in(folder), metadata={"format": "pt"})


def seen(images):
    """Pixels as the models want them."""
    return 2 * images - 1


@torch.no_grad()
def test_emu3_encodes_a_still_image_and_decodes_its_first_frame(tiny_emu3, images):
    sizes = torch.full((len(images), 2), 8)
    codes = torch.stack(tiny_emu3.model.encode(seen(images), sizes).image_tokens)
    assert torch.equal(tiny_emu3.encode(images), codes.flatten(1))
    expected = (tiny_emu3.model.decode(codes) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tiny_emu3.decode(codes.flatten(1)), expected)


@pytest.mark.parametrize("num_frames", [1, 2])
def test_emu3_repeats_an_image_for_the_frames_of_one_grid(tiny_emu3, images, num_frames):
    settings = tiny_emu3.config.model_settings | {"temporal_downsample_factor": num_frames}
    tokenizer = PretrainedImageTokenizer.wrap(build("Emu3VQVAE", settings), image_size=8)
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


@torch.no_grad()
def test_chameleon_codes_equal_those_of_the_original(tiny_chameleon, images):
    own = tiny_chameleon.model.encode(seen(images)).image_tokens
    assert torch.equal(tiny_chameleon.encode(images).flatten(), own)
    assert len(own.unique()) > 1


@pytest.mark.parametrize(
    "draw", [lambda model, images: model.decode(model.encode(images)), lambda model, images: model(images)]
)
def test_chameleon_decode_raises_and_names_models_with_a_decoder(tiny_chameleon, images, draw):
    with pytest.raises(ValueError, match="has no decoder.*wrap one of Emu3VQVAE, JanusVQVAE, VQModel"):
        draw(tiny_chameleon, images)


@torch.no_grad()
def test_janus_decode_equals_the_original(tiny_janus, images):
    codes = tiny_janus.encode(images)
    expected = (tiny_janus.model.decode(codes) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tiny_janus.decode(codes), expected)


@torch.no_grad()
def test_janus_codes_equal_those_of_the_original_for_unit_length_entries(tiny_janus, images):
    entries = tiny_janus.model.quantize.embedding.weight
    entries.copy_(torch.nn.functional.normalize(entries, dim=1))
    own = tiny_janus.model.encode(seen(images)).image_tokens
    assert torch.equal(tiny_janus.encode(images).flatten(), own)


@torch.no_grad()
def test_janus_codes_do_not_depend_on_the_length_of_entries(tiny_janus, images):
    codes = tiny_janus.encode(images)
    tiny_janus.model.quantize.embedding.weight.mul_(torch.linspace(0.1, 10, 16)[:, None])
    assert torch.equal(tiny_janus.encode(images), codes)
    own = tiny_janus.model.encode(seen(images)).image_tokens
    assert not torch.equal(own, codes.flatten()), "its own search should be led astray"


@pytest.mark.parametrize("image_size", [4, 16])
def test_janus_accepts_another_image_size_than_its_config(tiny_janus, image_size):
    tokenizer = PretrainedImageTokenizer.wrap(tiny_janus.model, image_size=image_size)
    images = torch.rand(2, 3, image_size, image_size)
    assert tokenizer.num_codes == (image_size // 4) ** 2
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"norm_type": "group", "vq_embed_dim": 3}, {"norm_type": "spatial"}])
def test_vqmodel_codes_and_images_equal_those_of_the_original(tiny_vqmodel, images, settings):
    model = build("VQModel", tiny_vqmodel.config.model_settings | settings)
    tokenizer = PretrainedImageTokenizer.wrap(model, image_size=8)
    latents = model.encode(seen(images)).latents
    own = model.quantize(latents)[2][2]
    assert torch.equal(tokenizer.encode(images).flatten(), own)
    expected = (model.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(own.view(6, 4)), expected, rtol=1e-4, atol=1e-5)


def test_forward_loss_is_the_pixel_error_plus_the_codebook_distance(tiny_janus, images):
    vectors = tiny_janus.adapter.encode(tiny_janus.model, seen(images)).movedim(1, -1).flatten(1, 2)
    entries = tiny_janus.codebook_vectors()[0][tiny_janus.encode(images)]
    drawn = tiny_janus.model.decode(tiny_janus.encode(images))
    expected = (drawn - seen(images)).square().mean() + 1.25 * (vectors - entries).square().mean()
    torch.testing.assert_close(tiny_janus(images).loss, expected)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, indirect=True)
def test_codebook_vectors_has_a_vector_for_each_code(tokenizer):
    (vectors,) = tokenizer.codebook_vectors()
    assert len(vectors) == tokenizer.codebook_size == 16 and not vectors.requires_grad
    assert tokenizer.code_shape == (2, 2) and tokenizer.positions_per_codebook == (4,)


def test_from_source_of_a_saved_original_gives_the_same_codes(tokenizer, folder, images):
    loaded = PretrainedImageTokenizer.from_source(folder, image_size=8)
    assert loaded.config.model_settings == tokenizer.config.model_settings and not loaded.training
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))


def test_from_source_reads_a_subfolder(tiny_janus, images, tmp_path):
    tiny_janus.model.save_pretrained(tmp_path / "vqvae")
    loaded = PretrainedImageTokenizer.from_source(tmp_path, subfolder="vqvae", image_size=8, pixel_mean=0.25)
    assert loaded.config.pixel_mean == 0.25 and loaded.config.pixel_std == 0.5


@pytest.mark.parametrize("tokenizer", ["tiny_chameleon"], indirect=True)
def test_from_pretrained_of_an_encoder_restores_its_codes(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(PretrainedImageTokenizer.from_pretrained(tmp_path).encode(images), tokenizer.encode(images))


def test_from_source_finds_the_image_tokenizer_of_a_whole_model(tiny_janus, images, tmp_path):
    language = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    image = tiny_janus.config.model_settings | {"projection_dim": 16, "image_token_embed_dim": 16}
    whole = JanusForConditionalGeneration(
        JanusConfig(
            text_config=language | {"model_type": "llama", "num_attention_heads": 2},
            vision_config=vision | {"projection_dim": 16},
            vq_config=image,
        )
    )
    whole.save_pretrained(tmp_path)
    loaded = PretrainedImageTokenizer.from_source(tmp_path, image_size=8)
    live = PretrainedImageTokenizer.wrap(whole.model.vqmodel, image_size=8)
    assert torch.equal(loaded.encode(images), live.encode(images))


def test_wrap_converts_half_precision_to_float32(tiny_janus, images):
    tokenizer = PretrainedImageTokenizer.wrap(tiny_janus.model.half(), image_size=8)
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}
    assert tokenizer.encode(images).shape == (6, 4)


def test_save_pretrained_writes_all_model_settings(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_class"] == type(tokenizer.model).__name__
    assert saved["model_settings"] == tokenizer.config.model_settings
    assert {"in_channels", "latent_channels"} <= saved["model_settings"].keys()


def test_wrap_of_another_class_raises():
    with pytest.raises(ValueError, match="expected an image tokenizer.*Emu3VQVAE.*got a Linear.*model.vqmodel"):
        PretrainedImageTokenizer.wrap(torch.nn.Linear(1, 1), image_size=8)


def test_wrap_of_another_class_with_a_known_name_raises():
    stranger = type("JanusVQVAE", (torch.nn.Linear,), {})
    with pytest.raises(ValueError, match="expected an image tokenizer of one of"):
        PretrainedImageTokenizer.wrap(stranger(1, 1), image_size=8)


def test_wrap_of_non_finite_weights_raises(tiny_janus):
    tiny_janus.model.encoder.conv_in.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="encoder.conv_in.weight holds values that are not finite"):
        PretrainedImageTokenizer.wrap(tiny_janus.model, image_size=8)


def test_wrap_with_an_indivisible_image_size_raises(tiny_janus):
    with pytest.raises(ValueError, match="image_size 10 is not a multiple of 4; the nearest are 8 and 12"):
        PretrainedImageTokenizer.wrap(tiny_janus.model, image_size=10)


@pytest.mark.parametrize("model_class", ["", "Linear", "os.system"])
def test_config_with_an_unknown_model_class_raises(model_class):
    with pytest.raises(ValueError, match=f"model_class must be one of ChameleonVQVAE, .*, got '{model_class}'"):
        PretrainedImageTokenizerConfig(model_class=model_class)


def test_config_with_an_unknown_model_setting_names_the_nearest():
    with pytest.raises(ValueError, match="JanusVQVAE has no setting 'num_embedings'; did you mean 'num_embeddings'"):
        PretrainedImageTokenizerConfig(model_class="JanusVQVAE", model_settings={"num_embedings": 16})


@pytest.mark.parametrize("settings", [{"num_embeddings": "16"}, {"embed_dim": 2.5}, {"channel_multiplier": "12"}])
def test_config_with_a_value_of_the_wrong_type_raises(settings):
    with pytest.raises(ValueError, match=f"JanusVQVAE: .*{next(iter(settings))}"):
        PretrainedImageTokenizerConfig(model_class="JanusVQVAE", model_settings=settings)


def test_config_with_settings_that_are_not_a_mapping_raises():
    with pytest.raises(ValueError, match="model_settings must be a mapping, got 16"):
        PretrainedImageTokenizerConfig(model_class="JanusVQVAE", model_settings=16)


def test_config_without_diffusers_installed_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="VQModel is a class of diffusers, which is not installed: pip install"):
        PretrainedImageTokenizerConfig(model_class="VQModel")


def test_from_source_with_a_missing_tensor_raises(tokenizer, folder):
    rewrite_weights(
        folder,
        lambda weights: weights.pop("quant_conv.bias" if "quant_conv.bias" in weights else "quant_conv.conv.bias"),
    )
    with pytest.raises(ValueError, match="(?s)quant_conv"):
        PretrainedImageTokenizer.from_source(folder, image_size=8)


def test_from_source_with_a_misshapen_tensor_raises(tokenizer, folder):
    rewrite_weights(folder, lambda weights: weights.update({"quantize.embedding.weight": torch.zeros(3, 4)}))
    with pytest.raises(ValueError, match="quantize.embedding.weight"):
        PretrainedImageTokenizer.from_source(folder, image_size=8)


@pytest.mark.parametrize("tokenizer", ["tiny_janus"], indirect=True)
def test_from_source_of_truncated_weights_raises(tokenizer, folder):
    weights_in(folder).write_bytes(weights_in(folder).read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot load an image tokenizer"):
        PretrainedImageTokenizer.from_source(folder, image_size=8)


def test_from_source_of_another_model_raises(tmp_path):
    size = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected one of ChameleonVQVAE.* holds a llama"):
        PretrainedImageTokenizer.from_source(tmp_path, image_size=8)


def test_from_pretrained_of_a_missing_folder_raises(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        PretrainedImageTokenizer.from_source(tmp_path / "absent", image_size=8)


def test_from_pretrained_of_an_unavailable_hub_name_raises():
    with pytest.raises(ValueError, match="cannot load an image tokenizer from nobody/nothing"):
        PretrainedImageTokenizer.from_source("nobody/nothing", image_size=8)
