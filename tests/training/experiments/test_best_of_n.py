"""The comparison of best of n draws, chooses by one model and judges by another."""

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


def test_captions_are_judged_once_and_in_order(script, rows):
    captions, images = script("experiments/best_of_n").distinct(rows.select([0, 0, 1, 0, 2, 3]), 3)
    assert captions == [rows[row]["caption"] for row in (0, 1, 2)]
    assert [image.tobytes() for image in images] == [rows[row]["image"].tobytes() for row in (0, 1, 2)]


def test_an_image_is_found_where_its_caption_is_nearest(script):
    class Judge:
        """Sees in a number what it is."""

        def encode_text(self, captions):
            return {"input_ids": torch.tensor([float(caption) for caption in captions])}

        def pixel_values(self, images):
            return torch.tensor(images)

        def model(self, input_ids, pixel_values):
            one_hot = [torch.nn.functional.one_hot(each.long(), 5).float() for each in (pixel_values, input_ids)]
            return type("Output", (), {"image_embeds": one_hot[0], "text_embeds": one_hot[1]})

    assert script("experiments/best_of_n").share_found(Judge(), ["0", "1", "2", "3"], [0.0, 1.0, 4.0, 3.0]) == 0.75


def test_it_says_shares_for_each_way_to_choose(script, rows, tiny_vqvae, tmp_path):
    text = SubwordTokenizer.train_bpe(rows["caption"][:], vocab_size=270)
    processor = Tok2ImgProcessor.build(tiny_vqvae, text, text_length=6)
    TextToImagePipeline(build_prior(processor.layout, depth=1), processor).save_pretrained(tmp_path / "model")
    rows.to_parquet(tmp_path / "shapes.parquet")
    for seed, name in enumerate(("ranker", "judge")):
        build_ranker(rows, vocab_size=300, depth=1, seed=seed).save_pretrained(tmp_path / name)
    folders = (str(tmp_path / name) for name in ("model", "ranker", "judge", "shapes.parquet"))
    shares = script("experiments/best_of_n").main(*folders, num=6)
    assert [len(each) for each in shares.values()] == [1, 3, 3]
    assert all(0 <= share <= 1 for each in shares.values() for share in each)
    assert shares["CLIP"][0] == shares["likelihood"][0]
