"""Forged marks, odd Unicode, megabytes and what is no text, through every door that a caption can come in by."""

import runpy
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from tok2img import Tok2ImgProcessor, tokenize_dataset
from tok2img.cli.app import main
from tok2img.pipelines.clip_ranker import ClipRanker, build_image_processor
from tok2img.tokenization.text_tokenizer import SubwordTokenizer
from tok2img.tokenization.token_dataset import save_tokens

HOSTILE = Path(__file__).parents[3] / "shared" / "hostile" / "make_bad_captions.py"
MARKS = ["[SEP]", "[BOS]", "[PAD]", "</s>", "<s>", "<|image|>", "<|endoftext|>", "<img_0>"]
ROWS = list(runpy.run_path(str(HOSTILE))["rows"]()) if HOSTILE.is_file() else []
TEXTS = [text for _, text, outcome in ROWS if outcome != "error"] + [f"a {mark} b{mark}" for mark in MARKS]
TEXTS += ["[SEP]" * 1000, "ab1!" * 250_000]
NO_TEXTS = [text for _, text, outcome in ROWS if outcome == "error"] + ["a\ud800b", None, 5, ["a"]]


@pytest.fixture
def image() -> Image.Image:
    return Image.new("RGB", (8, 8), "red")


def text_of(ids: torch.Tensor, layout) -> torch.Tensor:
    """The text's part of sequences; what stands there is text or [PAD], and [PAD] only after the text."""
    text = ids[:, 1 : 1 + layout.text_length]
    is_pad = text == layout.pad_id
    assert ((text < layout.text_vocab_size) | is_pad).all()
    assert (is_pad.long().diff(dim=1) >= 0).all()
    return text


def test_a_prompt_holds_its_own_marks_and_no_other(processor):
    start = time.process_time()
    ids, layout = processor(TEXTS)["input_ids"], processor.layout
    assert time.process_time() - start < 0.1 * len(TEXTS)
    text_of(ids, layout)
    assert (ids[:, 0] == layout.bos_id).all() and (ids[:, -1] == layout.sep_id).all()


def test_a_caption_of_nothing_but_a_mark_is_text(processor):
    ids = processor(MARKS)["input_ids"]
    assert (text_of(ids, processor.layout)[:, 0] < processor.layout.text_vocab_size).all()


@pytest.mark.parametrize("text", NO_TEXTS, ids=repr)
def test_what_is_no_text_is_refused_by_the_pipeline(pipeline, text):
    with pytest.raises(ValueError, match="prompt to be a string|text|Unicode|caption"):
        pipeline([text])


def test_captions_come_through_map_and_shards_alike_as_text(processor, image, tmp_path):
    rows = Dataset.from_dict({"caption": TEXTS, "image": [image] * len(TEXTS)})
    mapped = np.array(tokenize_dataset(rows, processor)["text_ids"])
    save_tokens(rows, processor, tmp_path / "tokens")
    saved = Dataset.from_parquet(str(tmp_path / "tokens" / "*.parquet"))["text_ids"][:]
    expected = processor(TEXTS)["input_ids"][:, 1 : 1 + processor.layout.text_length].numpy()
    assert (mapped == expected).all() and (np.array(saved) == expected).all()


def test_rows_that_are_no_text_are_listed_and_the_others_kept(processor, image, tmp_path):
    rows = Dataset.from_dict({"caption": ["a dog", None, "[SEP]"], "image": [image] * 3})
    manifest = save_tokens(rows, processor, tmp_path / "tokens", on_error="skip")
    assert manifest["rows"] == 2 and [each["row"] for each in manifest["skipped"]] == [1]


def test_images_of_hostile_captions_are_drawn(pipeline):
    assert len(pipeline(TEXTS, seed=0).images) == len(TEXTS)


def test_the_command_line_draws_hostile_captions(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path / "model")
    captions = [text for text in TEXTS if "\0" not in text and len(text) < 10_000]  # what a command line can hold
    captions = ["--" if text.startswith("-") else text for text in captions]
    arguments = ["generate", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.png"), "--", *captions]
    monkeypatch.setattr("sys.argv", ["tok2img", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and (tmp_path / "x.png").stat().st_size


@pytest.mark.parametrize("text", ["a\udcffb"])
def test_a_command_line_of_broken_unicode_ends_with_2_and_one_line(pipeline, tmp_path, monkeypatch, capsys, text):
    pipeline.save_pretrained(tmp_path / "model")
    arguments = ["generate", text, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.png")]
    monkeypatch.setattr("sys.argv", ["tok2img", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_ranker_reads_marks_in_captions_as_text(text_tokenizer, tmp_path):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision, text = small | {"image_size": 8, "patch_size": 4}, small | {"vocab_size": 400}
    special = PreTrainedTokenizerFast(
        tokenizer_object=text_tokenizer.tokenizer.backend_tokenizer, eos_token="<|endoftext|>", pad_token="[PAD]"
    )
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
    ClipRanker(model, special, build_image_processor(image_size=8, num_channels=3)).save_pretrained(tmp_path)
    ranker = ClipRanker.from_pretrained(tmp_path)
    encoded = ranker.encode_text(["a <|endoftext|> b [PAD]"])
    kept = encoded["input_ids"][encoded["attention_mask"].bool()].tolist()
    assert not set(kept) & set(special.all_special_ids)
    start = time.process_time()
    ranker.encode_text(["ab1!" * 250_000])
    assert time.process_time() - start < 0.1


@given(st.lists(st.sampled_from(MARKS) | st.text(max_size=8), max_size=6).map("".join))
def test_text_made_of_marks_stays_text(text_tokenizer, tiny_vqvae, text):
    processor = Tok2ImgProcessor.build(tiny_vqvae, text_tokenizer, text_length=12)
    text_of(processor([text])["input_ids"], processor.layout)


@given(st.text(st.characters(exclude_categories=[]), max_size=40), st.integers(1, 8))
def test_any_string_gives_no_more_than_it_may_or_is_refused(text_tokenizer, text, max_length):
    try:
        (ids,) = SubwordTokenizer(text_tokenizer.tokenizer).encode([text], max_length=max_length)
    except ValueError as error:
        assert "Unicode" in str(error)  # noqa: PT017
    else:
        assert all(0 <= each < text_tokenizer.vocab_size for each in ids)
