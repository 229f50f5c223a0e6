import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file

from tok2img.evaluation.caption_classifier import CaptionClassifier, CaptionClassifierConfig, train_classifier


def stripes(direction: str, seed: int, size: int = 16) -> Image.Image:
    rng = np.random.default_rng(seed)
    pattern = np.where((np.arange(size) + seed) % 4 < 2, 200, 30) * np.ones((size, 1)) + rng.integers(
        0, 25, (size, size)
    )
    return Image.fromarray((pattern if direction == "upright" else pattern.T).astype(np.uint8))


def rows(num_rows: int, first_seed: int = 0) -> Dataset:
    pairs = [(name, seed) for seed in range(first_seed, first_seed + num_rows) for name in ("upright", "flat")]
    columns = {
        "image": [stripes(name, seed) for name, seed in pairs],
        "caption": [f"{name} stripes" for name, _ in pairs],
    }
    return Dataset.from_dict(columns)


def build(num_channels: int = 1, image_size: int = 16, captions: tuple[str, ...] = ("a", "b")) -> CaptionClassifier:
    config = CaptionClassifierConfig(num_channels=num_channels, image_size=image_size, captions=list(captions))
    return CaptionClassifier(config)


@pytest.fixture(scope="module")
def classifier() -> CaptionClassifier:
    return train_classifier(rows(64), image_size=16, num_channels=1, epochs=3, batch_size=16)


def test_training_learns_to_tell_captions_apart(classifier: CaptionClassifier) -> None:
    verified = [classifier.verify(row["image"], row["caption"]) for row in rows(16, first_seed=1000)]
    assert np.mean(verified) >= 0.95


def test_a_wrong_caption_is_rejected(classifier: CaptionClassifier) -> None:
    assert not classifier.verify(stripes("flat", seed=5), "upright stripes")


def test_verify_with_unknown_caption_raises(classifier: CaptionClassifier) -> None:
    with pytest.raises(ValueError, match="'a zebra'"):
        classifier.verify(stripes("flat", seed=5), "a zebra")


def test_predictions_are_the_captions_of_the_largest_logits(classifier: CaptionClassifier) -> None:
    pixel_values = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = [classifier.config.captions[index] for index in classifier(pixel_values).logits.argmax(dim=1)]
    assert classifier.predict(pixel_values) == expected


def test_the_head_maps_features_to_logits(classifier: CaptionClassifier) -> None:
    pixel_values = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    features = classifier.features(pixel_values)
    assert features.shape == (5, 128)
    torch.testing.assert_close(classifier.head(features), classifier(pixel_values).logits)


@pytest.mark.parametrize("image_size", [8, 28, 33, 64])
def test_images_of_any_size_give_one_logit_a_caption(image_size: int) -> None:
    classifier = build(num_channels=3, image_size=image_size, captions=("a", "b", "c")).eval()
    assert classifier(torch.rand(2, 3, image_size, image_size)).logits.shape == (2, 3)


def test_every_parameter_gets_a_gradient() -> None:
    classifier = build()
    classifier(torch.rand(4, 1, 16, 16)).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())


def test_a_saved_classifier_verifies_as_before(classifier: CaptionClassifier, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path / "new" / "folder")
    loaded = CaptionClassifier.from_pretrained(tmp_path / "new" / "folder")
    pixel_values = torch.rand(5, 1, 16, 16)
    assert loaded.config.captions == classifier.config.captions and not loaded.training
    torch.testing.assert_close(loaded(pixel_values).logits, classifier(pixel_values).logits)


@pytest.mark.parametrize("name", ["num_channels", "image_size", "captions"])
def test_from_pretrained_with_missing_setting_raises(classifier: CaptionClassifier, tmp_path: Path, name: str) -> None:
    classifier.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"auto_map": {}}
    del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"config\.json: .*'{name}'"):
        CaptionClassifier.from_pretrained(tmp_path)


def test_saving_again_replaces_the_files_and_leaves_no_others(classifier: CaptionClassifier, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path)
    classifier.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["captions"] == ["flat stripes", "upright stripes"]
    assert load_file(tmp_path / "model.safetensors").keys() == classifier.state_dict().keys()


def test_training_is_a_function_of_the_seed_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (train_classifier(rows(8), image_size=16, num_channels=1, epochs=1, batch_size=8) for _ in range(2))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_undecoded_rows_train_like_images() -> None:
    settings = {"image_size": 16, "num_channels": 1, "epochs": 1, "batch_size": 8}
    decoded = train_classifier(rows(8), **settings)
    undecoded = train_classifier(rows(8).cast_column("image", ImageFeature(decode=False)), **settings)
    torch.testing.assert_close(decoded.state_dict(), undecoded.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("num_captions", [1, 1001])
def test_too_few_or_too_many_captions_are_refused(num_captions: int) -> None:
    image = Image.new("L", (4, 4))
    captions = [str(index % num_captions) for index in range(1001)]
    data = Dataset.from_dict({"image": [image] * 1001, "caption": captions})
    with pytest.raises(ValueError, match=f"got {num_captions:,} captions"):
        train_classifier(data, image_size=4, num_channels=1, epochs=1)
