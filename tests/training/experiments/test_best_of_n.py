"""Best of n: one model chooses the images, another verifies them."""

import pytest
import torch

from tok2img import TextToImagePipeline, Tok2ImgProcessor
from tok2img.data.shapes import shapes_dataset
from tok2img.prior.model import build_prior
from tok2img.recipes.train_ranker import build_ranker
from tok2img.tokenization.text_tokenizer import SubwordTokenizer


@pytest.fixture
def rows():
    return shapes_dataset("train", 40)


def test_first_distinct_with_repeats_keeps_the_order(script, rows):
    captions, images = script("experiments/best_of_n").first_distinct(rows.select([0, 0, 1, 0, 2, 3]), 3)
    assert captions == [rows[row]["caption"] for row in (0, 1, 2)]
    assert [image.tobytes() for image in images] == [rows[row]["image"].tobytes() for row in (0, 1, 2)]


def test_retrieval_accuracy_counts_images_nearest_to_their_caption(script):
    class NumberVerifier:
        """Embeds an image and a caption by the number that they are."""

        def encode_text(self, captions):
            return {"input_ids": torch.tensor([float(caption) for caption in captions])}

        def pixel_values(self, images):
            return torch.tensor(images)

        def model(self, input_ids, pixel_values):
            one_hot = [torch.nn.functional.one_hot(each.long(), 5).float() for each in (pixel_values, input_ids)]
            return type("Output", (), {"image_embeds": one_hot[0], "text_embeds": one_hot[1]})

    assert (
        script("experiments/best_of_n").retrieval_accuracy(NumberVerifier(), ["0", "1", "2", "3"], [0.0, 1.0, 4.0, 3.0])
        == 0.75
    )


def test_main_returns_accuracies_for_each_way_to_choose(script, rows, tiny_vqvae, tmp_path):
    text = SubwordTokenizer.train_bpe(rows["caption"][:], vocab_size=270)
    processor = Tok2ImgProcessor.build(tiny_vqvae, text, text_length=6)
    TextToImagePipeline(build_prior(processor.layout, depth=1), processor).save_pretrained(tmp_path / "model")
    rows.to_parquet(tmp_path / "shapes.parquet")
    for seed, name in enumerate(("ranker", "verifier")):
        build_ranker(rows, vocab_size=300, depth=1, seed=seed).save_pretrained(tmp_path / name)
    folders = (str(tmp_path / name) for name in ("model", "ranker", "verifier", "shapes.parquet"))
    accuracies = script("experiments/best_of_n").main(*folders, num=6)
    assert [len(each) for each in accuracies.values()] == [1, 3, 3]
    assert all(0 <= accuracy <= 1 for each in accuracies.values() for accuracy in each)
    assert accuracies["CLIP"][0] == accuracies["likelihood"][0]
