import copy

import pytest
import torch
from safetensors.torch import load_file

from tok2img.evaluation.caption_classifier import CaptionClassifier, CaptionClassifierConfig, FeatureMaps
from tok2img.recipes.build_tokenizer import build_model
from tok2img.recipes.config import RunSettings, TokenizerRecipe
from tok2img.recipes.train_tokenizer import train_tokenizer
from tok2img.recipes.training_run import training_arguments
from tok2img.trainer.datasets import ImageDataset
from tok2img.trainer.trainer import Trainer
from tokenizers_vq import AdversarialLoss, PatchDiscriminator, PerceptualLoss, TokenizerWithLoss
from tokenizers_vq.auto import load_image_tokenizer
from tokenizers_vq.losses.reconstruction import absolute_error

TINY = {"hidden_channels": 16, "num_decoder_blocks": 1, "codebook_size": 16, "code_dim": 4}


@pytest.fixture
def recipe(rows, tmp_path):
    def recipe(model: dict | None = None, **keys) -> TokenizerRecipe:
        settings = {
            "max_steps": 4,
            "batch_size": 2,
            "warmup_steps": 0,
            "eval_steps": 2,
            "sample_steps": 0,
            "logging_steps": 1,
        }
        paths = {"data": str(tmp_path / "rows.parquet"), "out": str(tmp_path / "out")}
        return TokenizerRecipe(**settings | paths | keys, model=TINY | (model or {}))

    return recipe


@pytest.fixture
def classifier_folder(tmp_path) -> str:
    config = CaptionClassifierConfig(num_channels=3, image_size=8, captions=["a", "b"])
    CaptionClassifier(config).save_pretrained(tmp_path / "verifier")
    return str(tmp_path / "verifier")


def adversarial_trainer(tokenizer, rows, out, *, max_steps: int) -> Trainer:
    torch.manual_seed(3)
    model = TokenizerWithLoss(tokenizer, AdversarialLoss(PatchDiscriminator(8, hidden_channels=8), start_step=1))
    settings = RunSettings(
        out=str(out), max_steps=max_steps, batch_size=8, warmup_steps=0, lr_scheduler_type="constant", eval_steps=2
    )
    data = ImageDataset(rows, tokenizer)
    return Trainer(model, training_arguments(settings, best_by=""), train_dataset=data, eval_dataset=data)


def test_a_recipe_without_losses_of_its_own_trains_the_bare_tokenizer(recipe, rows):
    assert not isinstance(build_model(recipe(), rows), TokenizerWithLoss)


def test_a_recipe_trains_with_a_discriminator_and_saves_none(recipe, tmp_path):
    tokenizer = train_tokenizer(recipe({"reconstruction_loss": "l1"}, disc_start=2))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == tokenizer.state_dict().keys()
    assert load_image_tokenizer(tmp_path / "out").config.reconstruction_loss == "l1"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "training_log.json",
    }


def test_keys_of_a_recipe_reach_the_loss(recipe, rows, classifier_folder):
    keys = {"disc_start": 3, "disc_weight": 0.5, "gradient_accumulation_steps": 2}
    model = build_model(recipe({"reconstruction_loss": "l1"}, perceptual_model=classifier_folder, **keys), rows)
    loss = model.reconstruction_loss
    assert (loss.start_step, loss.weight) == (6, 0.5), "it counts batches, two of them a step"
    assert (
        isinstance(loss.reconstruction_loss, PerceptualLoss) and loss.reconstruction_loss.pixel_loss is absolute_error
    )
    assert loss.reconstruction_loss.pixel_mean == model.tokenizer.config.pixel_mean


def test_a_discriminator_leaves_the_weights_of_the_tokenizer_as_they_were_drawn(recipe, rows):
    bare, wrapped = build_model(recipe(), rows), build_model(recipe(disc_start=2), rows)
    assert all(tensor.equal(wrapped.tokenizer.state_dict()[name]) for name, tensor in bare.state_dict().items())


def test_a_recipe_trains_with_the_features_of_a_classifier(recipe, classifier_folder):
    train_tokenizer(recipe(perceptual_model=classifier_folder, max_steps=2))


def test_features_of_a_classifier_are_its_activations_at_each_halving(classifier_folder, images):
    classifier = CaptionClassifier.from_pretrained(classifier_folder)
    maps = FeatureMaps(classifier)(images)
    assert [tuple(each.shape[1:]) for each in maps] == [(32, 4, 4), (64, 2, 2), (128, 1, 1)]
    torch.testing.assert_close(classifier.body[9:](maps[-1]), classifier.features(images))


def test_a_folder_without_a_classifier_is_refused_by_name(recipe, rows, tmp_path):
    with pytest.raises(ValueError, match=f"key 'perceptual_model': {tmp_path}/nothing holds no classifier"):
        build_model(recipe(perceptual_model=str(tmp_path / "nothing")), rows)


def test_a_folder_of_another_model_is_refused_by_name(recipe, rows, tiny_vqvae, tmp_path):
    tiny_vqvae.save_pretrained(tmp_path / "vqvae")
    with pytest.raises(ValueError, match="vqvae does not contain a caption classifier"):
        build_model(recipe(perceptual_model=str(tmp_path / "vqvae")), rows)


def test_a_classifier_of_other_channels_is_refused(recipe, rows, tmp_path):
    config = CaptionClassifierConfig(num_channels=1, image_size=8, captions=["a", "b"])
    CaptionClassifier(config).save_pretrained(tmp_path / "grey")
    with pytest.raises(ValueError, match="sees images of 1 channels, the tokenizer has 3"):
        build_model(recipe(perceptual_model=str(tmp_path / "grey")), rows)


def test_a_run_with_a_discriminator_goes_on_exactly_where_it_stopped(tiny_vqvae, rows, tmp_path):
    through = adversarial_trainer(copy.deepcopy(tiny_vqvae), rows, tmp_path / "a", max_steps=4)
    through.train()
    first = adversarial_trainer(copy.deepcopy(tiny_vqvae), rows, tmp_path / "b", max_steps=2)
    first.train()
    second = adversarial_trainer(copy.deepcopy(tiny_vqvae), rows, tmp_path / "b", max_steps=4)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoints" / "checkpoint-2"))
    expected = through.model.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in second.model.state_dict().items())
