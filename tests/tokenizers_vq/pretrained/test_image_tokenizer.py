"""What tokenizers of other libraries do inside ours; the promises that all tokenizers share are in test_base.py."""

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
def test_emu3_gives_the_codes_of_a_still_image_and_draws_its_first_frame(tiny_emu3, images):
    sizes = torch.full((len(images), 2), 8)
    codes = torch.stack(tiny_emu3.model.encode(seen(images), sizes).image_tokens)
    assert torch.equal(tiny_emu3.encode(images), codes.flatten(1))
    expected = (tiny_emu3.model.decode(codes) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tiny_emu3.decode(codes.flatten(1)), expected)


@pytest.mark.parametrize("num_frames", [1, 2])
def test_emu3_holds_an_image_for_as_many_frames_as_become_one(tiny_emu3, images, num_frames):
    settings = tiny_emu3.config.model_settings | {"temporal_downsample_factor": num_frames}
    tokenizer = PretrainedImageTokenizer.wrap(build("Emu3VQVAE", settings), image_size=8)
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


@torch.no_grad()
def test_chameleon_gives_its_own_codes(tiny_chameleon, images):
    own = tiny_chameleon.model.encode(seen(images)).image_tokens
    assert torch.equal(tiny_chameleon.encode(images).flatten(), own)
    assert len(own.unique()) > 1


@pytest.mark.parametrize(
    "draw", [lambda model, images: model.decode(model.encode(images)), lambda model, images: model(images)]
)
def test_chameleon_says_that_it_cannot_draw_and_what_can(tiny_chameleon, images, draw):
    with pytest.raises(ValueError, match="has no decoder.*wrap one of Emu3VQVAE, JanusVQVAE, VQModel"):
        draw(tiny_chameleon, images)


@torch.no_grad()
def test_janus_draws_what_its_own_decoder_draws(tiny_janus, images):
    codes = tiny_janus.encode(images)
    expected = (tiny_janus.model.decode(codes) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tiny_janus.decode(codes), expected)


@torch.no_grad()
def test_janus_gives_its_own_codes_where_its_entries_have_length_one(tiny_janus, images):
    entries = tiny_janus.model.quantize.embedding.weight
    entries.copy_(torch.nn.functional.normalize(entries, dim=1))
    own = tiny_janus.model.encode(seen(images)).image_tokens
    assert torch.equal(tiny_janus.encode(images).flatten(), own)


@torch.no_grad()
def test_janus_chooses_entries_as_they_are_drawn_whatever_their_length(tiny_janus, images):
    codes = tiny_janus.encode(images)
    tiny_janus.model.quantize.embedding.weight.mul_(torch.linspace(0.1, 10, 16)[:, None])
    assert torch.equal(tiny_janus.encode(images), codes)
    own = tiny_janus.model.encode(seen(images)).image_tokens
    assert not torch.equal(own, codes.flatten()), "its own search should be led astray"


@pytest.mark.parametrize("image_size", [4, 16])
def test_janus_takes_images_of_another_size_than_its_config_counts_on(tiny_janus, image_size):
    tokenizer = PretrainedImageTokenizer.wrap(tiny_janus.model, image_size=image_size)
    images = torch.rand(2, 3, image_size, image_size)
    assert tokenizer.num_codes == (image_size // 4) ** 2
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"norm_type": "group", "vq_embed_dim": 3}, {"norm_type": "spatial"}])
def test_a_vqmodel_of_diffusers_gives_its_own_codes_and_images(tiny_vqmodel, images, settings):
    model = build("VQModel", tiny_vqmodel.config.model_settings | settings)
    tokenizer = PretrainedImageTokenizer.wrap(model, image_size=8)
    latents = model.encode(seen(images)).latents
    own = model.quantize(latents)[2][2]
    assert torch.equal(tokenizer.encode(images).flatten(), own)
    expected = (model.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tokenizer.decode(own.view(6, 4)), expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_error_in_normalised_pixels_plus_the_distance_to_the_entries(tiny_janus, images):
    vectors = tiny_janus.adapter.encode(tiny_janus.model, seen(images)).movedim(1, -1).flatten(1, 2)
    entries = tiny_janus.codebook_vectors()[0][tiny_janus.encode(images)]
    drawn = tiny_janus.model.decode(tiny_janus.encode(images))
    expected = (drawn - seen(images)).square().mean() + 1.25 * (vectors - entries).square().mean()
    torch.testing.assert_close(tiny_janus(images).loss, expected)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, indirect=True)
def test_the_codebook_has_a_vector_for_each_code(tokenizer):
    (vectors,) = tokenizer.codebook_vectors()
    assert len(vectors) == tokenizer.codebook_size == 16 and not vectors.requires_grad
    assert tokenizer.code_shape == (2, 2) and tokenizer.positions_per_codebook == (4,)


def test_codes_survive_the_way_through_the_library_of_the_original(tokenizer, folder, images):
    loaded = PretrainedImageTokenizer.from_source(folder, image_size=8)
    assert loaded.config.model_settings == tokenizer.config.model_settings and not loaded.training
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))


def test_the_original_may_lie_in_a_subfolder(tiny_janus, images, tmp_path):
    tiny_janus.model.save_pretrained(tmp_path / "vqvae")
    loaded = PretrainedImageTokenizer.from_source(tmp_path, subfolder="vqvae", image_size=8, pixel_mean=0.25)
    assert loaded.config.pixel_mean == 0.25 and loaded.config.pixel_std == 0.5


@pytest.mark.parametrize("tokenizer", ["tiny_chameleon"], indirect=True)
def test_codes_survive_save_and_load_where_nothing_can_be_drawn(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(PretrainedImageTokenizer.from_pretrained(tmp_path).encode(images), tokenizer.encode(images))


def test_the_image_tokenizer_of_a_whole_model_is_found_in_it(tiny_janus, images, tmp_path):
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


def test_a_model_in_half_precision_becomes_float32(tiny_janus, images):
    tokenizer = PretrainedImageTokenizer.wrap(tiny_janus.model.half(), image_size=8)
    assert {parameter.dtype for parameter in tokenizer.parameters()} == {torch.float32}
    assert tokenizer.encode(images).shape == (6, 4)


def test_the_saved_folder_says_all_that_the_model_was_built_from(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_class"] == type(tokenizer.model).__name__
    assert saved["model_settings"] == tokenizer.config.model_settings
    assert {"in_channels", "latent_channels"} <= saved["model_settings"].keys()


def test_a_model_of_another_class_is_refused():
    with pytest.raises(ValueError, match="expected an image tokenizer.*Emu3VQVAE.*got a Linear.*model.vqmodel"):
        PretrainedImageTokenizer.wrap(torch.nn.Linear(1, 1), image_size=8)


def test_a_stranger_with_a_known_name_is_refused():
    stranger = type("JanusVQVAE", (torch.nn.Linear,), {})
    with pytest.raises(ValueError, match="expected an image tokenizer of one of"):
        PretrainedImageTokenizer.wrap(stranger(1, 1), image_size=8)


def test_weights_that_are_not_finite_are_refused(tiny_janus):
    tiny_janus.model.encoder.conv_in.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="encoder.conv_in.weight holds values that are not finite"):
        PretrainedImageTokenizer.wrap(tiny_janus.model, image_size=8)


def test_an_image_size_that_the_stride_does_not_divide_is_refused(tiny_janus):
    with pytest.raises(ValueError, match="image_size 10 is not a multiple of 4; the nearest are 8 and 12"):
        PretrainedImageTokenizer.wrap(tiny_janus.model, image_size=10)


@pytest.mark.parametrize("model_class", ["", "Linear", "os.system"])
def test_a_family_that_is_not_known_is_refused(model_class):
    with pytest.raises(ValueError, match=f"model_class must be one of ChameleonVQVAE, .*, got '{model_class}'"):
        PretrainedImageTokenizerConfig(model_class=model_class)


def test_a_setting_that_the_model_does_not_have_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="JanusVQVAE has no setting 'num_embedings'; did you mean 'num_embeddings'"):
        PretrainedImageTokenizerConfig(model_class="JanusVQVAE", model_settings={"num_embedings": 16})


@pytest.mark.parametrize("settings", [{"num_embeddings": "16"}, {"embed_dim": 2.5}, {"channel_multiplier": "12"}])
def test_a_setting_of_the_wrong_kind_is_refused(settings):
    with pytest.raises(ValueError, match=f"JanusVQVAE: .*{next(iter(settings))}"):
        PretrainedImageTokenizerConfig(model_class="JanusVQVAE", model_settings=settings)


def test_settings_that_are_no_mapping_are_refused():
    with pytest.raises(ValueError, match="model_settings must be a mapping, got 16"):
        PretrainedImageTokenizerConfig(model_class="JanusVQVAE", model_settings=16)


def test_without_diffusers_its_model_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="VQModel is a class of diffusers, which is not installed: pip install"):
        PretrainedImageTokenizerConfig(model_class="VQModel")


def test_a_source_with_a_tensor_missing_is_refused(tokenizer, folder):
    rewrite_weights(
        folder,
        lambda weights: weights.pop("quant_conv.bias" if "quant_conv.bias" in weights else "quant_conv.conv.bias"),
    )
    with pytest.raises(ValueError, match="(?s)quant_conv"):
        PretrainedImageTokenizer.from_source(folder, image_size=8)


def test_a_source_with_a_misshapen_tensor_is_refused(tokenizer, folder):
    rewrite_weights(folder, lambda weights: weights.update({"quantize.embedding.weight": torch.zeros(3, 4)}))
    with pytest.raises(ValueError, match="quantize.embedding.weight"):
        PretrainedImageTokenizer.from_source(folder, image_size=8)


@pytest.mark.parametrize("tokenizer", ["tiny_janus"], indirect=True)
def test_a_source_cut_short_is_refused(tokenizer, folder):
    weights_in(folder).write_bytes(weights_in(folder).read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot load an image tokenizer"):
        PretrainedImageTokenizer.from_source(folder, image_size=8)


def test_a_folder_of_another_model_is_refused(tmp_path):
    size = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected one of ChameleonVQVAE.* holds a llama"):
        PretrainedImageTokenizer.from_source(tmp_path, image_size=8)


def test_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        PretrainedImageTokenizer.from_source(tmp_path / "absent", image_size=8)


def test_a_hub_name_that_cannot_be_had_is_refused():
    with pytest.raises(ValueError, match="cannot load an image tokenizer from nobody/nothing"):
        PretrainedImageTokenizer.from_source("nobody/nothing", image_size=8)
