from pathlib import Path

import pytest
import torch

from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.recipes.config import PriorRecipe, TokenizerRecipe
from tok2img.recipes.train_prior import train_prior
from tok2img.recipes.train_tokenizer import train_tokenizer
from tokenizers_vq import VQDrawForImages, VQDrawImageConfig

REFERENCE = Path(__file__).parents[4] / "shared" / "reference" / "vqdraw_mnist_60bit.safetensors"


def recipe(data, out, **changed) -> TokenizerRecipe:
    """Steps so small that nothing moves, unless told otherwise."""
    settings = {"max_steps": 2, "batch_size": 8, "eval_steps": 0, "sample_steps": 0, "learning_rate": 0.0}
    return TokenizerRecipe(**settings | {"data": data, "out": str(out)} | changed)


@pytest.fixture
def vqdraw(tiny_vqdraw, tmp_path) -> str:
    tiny_vqdraw.save_pretrained(str(tmp_path / "vqdraw"))
    return str(tmp_path / "vqdraw")


def weights(model) -> dict[str, torch.Tensor]:
    """What is learned by steps; averages of codebooks follow the data at any rate."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_vqvae_goes_on_from_its_weights_and_codebook(data, image_tokenizer, tiny_vqvae, tmp_path):
    model = train_tokenizer(recipe(data, tmp_path / "out", init_from=image_tokenizer))
    for name, tensor in weights(tiny_vqvae).items():
        assert weights(model)[name].equal(tensor), name
    assert model.config.to_dict()["codebook_size"] == tiny_vqvae.config.codebook_size


def test_a_vqdraw_keeps_its_biases_where_a_new_one_takes_them_from_data(data, vqdraw, tiny_vqdraw, tmp_path):
    model = train_tokenizer(recipe(data, tmp_path / "out", tokenizer="vqdraw", init_from=vqdraw))
    for name, tensor in weights(tiny_vqdraw).items():
        assert weights(model)[name].equal(tensor), name


def test_steps_change_the_weights(data, vqdraw, tiny_vqdraw, tmp_path):
    settings = {"tokenizer": "vqdraw", "init_from": vqdraw, "learning_rate": 0.01}
    model = train_tokenizer(recipe(data, tmp_path / "out", **settings))
    assert any(not weights(model)[name].equal(tensor) for name, tensor in weights(tiny_vqdraw).items())


def test_a_text_model_goes_on(rows, data, tmp_path):
    settings = {"tokenizer": "vqdraw_text", "model": {"hidden_channels": 8, "num_stages": 2, "codebook_size": 4}}
    first = train_tokenizer(recipe(data, tmp_path / "first", **settings))
    settings |= {"model": {}, "init_from": str(tmp_path / "first")}
    model = train_tokenizer(recipe(data, tmp_path / "second", **settings))
    for name, tensor in weights(first).items():
        assert weights(model)[name].equal(tensor), name


def test_settings_that_leave_the_weights_alone_may_change(data, vqdraw, tmp_path):
    settings = {"tokenizer": "vqdraw", "init_from": vqdraw, "model": {"num_aux_options": 2, "epsilon": 0.5}}
    model = train_tokenizer(recipe(data, tmp_path / "out", **settings))
    assert model.config.num_aux_options == 2 and model.vqdraw.epsilon == 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer": "vqdraw", "model": {"hidden_channels": 24}}, "does not fit the settings of 'model'"),
        ({"tokenizer": "vqdraw", "model": {"hiden_channels": 24}}, "hidden_channels"),
        ({"tokenizer": "vqvae"}, "holds a VQDrawForImages, not a VQVAE"),
        ({"tokenizer": "vqdraw_text"}, "holds no model of text"),
        ({"tokenizer": "bpe"}, "'init_from' is not for the tokenizer 'bpe'"),
        ({"tokenizer": "vqdraw", "init_from": "nowhere"}, "nowhere"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(data, vqdraw, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(recipe(data, tmp_path / "out", **{"init_from": vqdraw} | changed))
    assert not (tmp_path / "out").exists()


def test_the_published_model_goes_on(data, tmp_path):
    if not REFERENCE.is_file():
        pytest.skip(f"{REFERENCE} is not there")
    settings = {"tokenizer": "vqdraw", "init_from": str(REFERENCE), "model": {"num_aux_options": 4}}
    model = train_tokenizer(recipe(data, tmp_path / "out", **settings, max_steps=1, batch_size=2))
    published = VQDrawForImages.from_vq_draw_checkpoint(REFERENCE)
    assert isinstance(model.config, VQDrawImageConfig) and model.config.refiner == "mnist"
    for name, tensor in weights(published).items():
        assert weights(model)[name].equal(tensor), name


def prior_recipe(out, **changed) -> PriorRecipe:
    """A short run, without dropout, whose steps move nothing unless told otherwise."""
    settings = {"max_steps": 2, "batch_size": 8, "eval_steps": 0, "sample_steps": 0, "depth": 1, "dropout": 0.0}
    return PriorRecipe(**settings | {"learning_rate": 0.0, "out": str(out)} | changed)


@pytest.fixture(params=[False, True], ids=["shared ids", "places"])
def model(data, image_tokenizer, tmp_path, request) -> str:
    """Folder of a trained model."""
    settings = {
        "data": data,
        "image_tokenizer": image_tokenizer,
        "learning_rate": 0.01,
        "axial_position_embeddings": request.param,
    }
    train_prior(prior_recipe(tmp_path / "model", **settings))
    return str(tmp_path / "model")


@pytest.mark.parametrize("source", ["data", "tokens"])
def test_a_prior_goes_on_with_its_weights_and_tokenizers(data, model, tmp_path, source):
    given = {"data": data} if source == "data" else {"tokens": f"{model}/tokens"}
    again = train_prior(prior_recipe(tmp_path / "again", init_from=model, depth=7, **given))
    before = TextToImagePipeline.from_pretrained(model)
    for name, tensor in before.prior.state_dict().items():
        assert again.prior.state_dict()[name].equal(tensor), name
    assert again.processor.fingerprint() == before.processor.fingerprint()


def test_tokens_of_other_tokenizers_are_refused(data, model, tiny_vqdraw, tmp_path):
    tiny_vqdraw.save_pretrained(str(tmp_path / "other"))
    train_prior(prior_recipe(tmp_path / "second", data=data, image_tokenizer=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="made by other tokenizers"):
        train_prior(prior_recipe(tmp_path / "third", init_from=model, tokens=str(tmp_path / "second" / "tokens")))


def test_a_prior_begins_anew_or_goes_on():
    with pytest.raises(ValueError, match="'init_from' goes neither with"):
        PriorRecipe(init_from="model", base_model="language-model")


def test_a_prior_that_goes_on_searches_as_widely_as_it_is_told(data, vqdraw, tmp_path):
    train_prior(prior_recipe(tmp_path / "model", data=data, image_tokenizer=vqdraw))
    settings = {"init_from": str(tmp_path / "model"), "beam_size": 2}
    again = train_prior(prior_recipe(tmp_path / "again", data=data, **settings))
    assert again.processor.image_tokenizer.config.to_dict()["beam_size"] == 2
    tokens = str(tmp_path / "again" / "tokens")
    train_prior(prior_recipe(tmp_path / "third", tokens=tokens, **settings))
    assert (tmp_path / "third" / "layout.json").is_file()
