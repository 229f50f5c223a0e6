import runpy
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tok2img.tokenization.layout import SequenceLayout
from tok2img.tokenization.text_tokenizer import MAX_CHARACTERS_PER_TOKEN, SubwordTokenizer, TextTokenizer

HOSTILE = Path(__file__).parents[4] / "shared" / "hostile" / "make_bad_captions.py"
HOSTILE_ROWS = list(runpy.run_path(str(HOSTILE))["rows"]()) if HOSTILE.is_file() else []
needs_hostile = pytest.mark.skipif(not HOSTILE_ROWS, reason=f"{HOSTILE} is not here")
FORGED = ["[SEP]", "[BOS]", "[PAD]", "</s>", "<s>", "<|image|>", "<|endoftext|>", "<img_0>"]
TEXT_LENGTH = 16


@pytest.fixture(scope="session")
def with_special_tokens(text_tokenizer, tmp_path_factory) -> TextTokenizer:
    """The same BPE, saved by Hugging Face with special tokens of its own."""
    folder = tmp_path_factory.mktemp("special")
    special = PreTrainedTokenizerFast(
        tokenizer_object=text_tokenizer.tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="[PAD]",
        additional_special_tokens=["[SEP]", "<|image|>"],
    )
    special.save_pretrained(str(folder))
    return SubwordTokenizer.from_pretrained(folder)


@pytest.fixture(params=["trained", "special"])
def any_tokenizer(request, text_tokenizer, with_special_tokens) -> TextTokenizer:
    return text_tokenizer if request.param == "trained" else with_special_tokens


def outcome(name: str) -> list:
    return [pytest.param(text, id=label) for label, text, result in HOSTILE_ROWS if result == name]


@given(st.text())
def test_every_text_comes_back_from_its_ids(text_tokenizer, text):
    assert text_tokenizer.decode(text_tokenizer.encode([text])[0]) == text


@given(st.text(st.characters(exclude_categories=[])))
def test_any_string_has_ids_or_is_refused_as_no_unicode(text_tokenizer, text):
    try:
        (ids,) = text_tokenizer.encode([text])
    except ValueError as error:
        assert str(error).startswith("row 0: the caption contains an unpaired surrogate")  # noqa: PT017
    else:
        assert text_tokenizer.decode(ids) == text


@pytest.mark.parametrize("mark", FORGED)
def test_a_mark_in_a_caption_is_only_text(any_tokenizer, mark):
    captions = [mark, f"a {mark} b", f"a{mark}b", mark * 3]
    for caption, ids in zip(captions, any_tokenizer.encode(captions), strict=True):
        assert not set(ids) & set(any_tokenizer.tokenizer.all_special_ids)
        assert max(ids) < any_tokenizer.vocab_size
        assert any_tokenizer.decode(ids) == caption


def test_the_saved_tokenizer_would_have_taken_a_mark_for_a_special_token(with_special_tokens, tmp_path):
    with_special_tokens.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(str(tmp_path), split_special_tokens=False)
    assert set(stock("[SEP]", add_special_tokens=False)["input_ids"]) & set(stock.all_special_ids)


def test_a_first_word_has_the_id_it_has_elsewhere(text_tokenizer):
    first, later = text_tokenizer.encode(["red", "a red"])
    assert later[-len(first) :] == first


def test_a_caption_of_a_megabyte_takes_no_time(text_tokenizer):
    captions = ["a" * 1_000_000, "cat dog " * 125_000, "\U0001f600" * 250_000]
    start = time.process_time()
    ids = text_tokenizer.encode(captions, max_length=64)
    assert time.process_time() - start < 0.2
    assert all(len(row) > 64 for row in ids)


def test_ids_up_to_the_limit_are_those_without_a_limit(text_tokenizer):
    caption = ["two green cats and a red square, " * 200]
    assert text_tokenizer.encode(caption, max_length=32)[0][:32] == text_tokenizer.encode(caption)[0][:32]


def test_no_token_is_longer_than_the_characters_kept_for_it():
    tokenizer = SubwordTokenizer.train_bpe(["x" * 200] * 4, vocab_size=600)
    assert max(map(len, tokenizer.tokenizer.get_vocab())) <= MAX_CHARACTERS_PER_TOKEN
    assert len(tokenizer.encode(["x" * 2000], max_length=4)[0]) > 4


def test_fewer_ids_than_bytes_are_refused():
    assert SubwordTokenizer.train_bpe(["a red dog"], vocab_size=256).vocab_size == 256
    with pytest.raises(ValueError, match="vocab_size must be at least 256, an id for each byte, got 255"):
        SubwordTokenizer.train_bpe(["a red dog"], vocab_size=255)


@pytest.mark.parametrize("wrong", [None, 5, float("nan"), b"a", ["a"], {"bytes": "00"}])
def test_what_is_not_text_is_refused_with_its_row(text_tokenizer, wrong):
    with pytest.raises(ValueError, match="row 1: the caption is not text"):
        text_tokenizer.encode(["a", wrong])


def test_given_row_numbers_are_named(text_tokenizer):
    with pytest.raises(ValueError, match="row 71: the caption is not text but NoneType"):
        text_tokenizer.encode(["a", None], rows=[70, 71])


def test_half_a_character_is_refused_with_its_row(text_tokenizer):
    with pytest.raises(ValueError, match="row 1: the caption contains an unpaired surrogate at character 1"):
        text_tokenizer.encode(["a", "a\ud800b"])


def test_no_captions_have_no_ids(text_tokenizer):
    assert text_tokenizer.encode([]) == []


def test_a_tokenizer_survives_saving_and_loading(any_tokenizer, captions, tmp_path):
    any_tokenizer.save_pretrained(tmp_path)
    again = SubwordTokenizer.from_pretrained(tmp_path)
    assert again.state() == any_tokenizer.state() and again.vocab_size == any_tokenizer.vocab_size
    assert again.encode(captions) == any_tokenizer.encode(captions)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_that_holds_no_tokenizer_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"cannot load a text tokenizer from {tmp_path}"):
        SubwordTokenizer.from_pretrained(tmp_path)


@needs_hostile
@pytest.mark.parametrize("text", outcome("ok"))
def test_awkward_captions_come_back_and_hold_nothing_reserved(any_tokenizer, text):
    (ids,) = any_tokenizer.encode([text])
    assert any_tokenizer.decode(ids) == text
    assert not set(ids) & {*any_tokenizer.tokenizer.all_special_ids, *range(any_tokenizer.vocab_size, 10**6)}


@needs_hostile
@pytest.mark.parametrize("text", outcome("trim"))
def test_endless_captions_are_cut_to_the_layout(text_tokenizer, text):
    layout = SequenceLayout(text_tokenizer.vocab_size, TEXT_LENGTH, num_codes=1, codebook_size=1)
    ids = text_tokenizer.encode([text], max_length=TEXT_LENGTH)
    assert len(ids[0]) > TEXT_LENGTH
    assert layout.pad_text(ids).max() < text_tokenizer.vocab_size


@needs_hostile
@pytest.mark.parametrize("text", outcome("error"))
def test_captions_that_are_none_are_refused_with_their_row(text_tokenizer, text):
    with pytest.raises(ValueError, match="row 3: the caption"):
        text_tokenizer.encode([text], rows=[3])
