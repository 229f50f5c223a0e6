import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tok2img.layout import SequenceLayout

layouts = st.builds(
    SequenceLayout,
    text_vocab_size=st.integers(1, 400),
    text_length=st.integers(1, 5),
    num_codes=st.integers(1, 6),
    codebook_size=st.integers(1, 300),
    codes_shared=st.booleans(),
)


def random_codes(layout: SequenceLayout, num: int = 3) -> torch.Tensor:
    return torch.randint(layout.codebook_size, (num, layout.num_codes))


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_ids_give_back_the_codes_they_were_made_of(layout):
    codes = random_codes(layout)
    assert layout.image.ids_to_codes(layout.image.codes_to_ids(codes)).equal(codes)


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_no_two_kinds_of_id_overlap(layout):
    marks = [layout.bos_id, layout.sep_id, layout.pad_id]
    image = range(layout.image.offset, layout.image.offset + layout.image.num_ids)
    ids = [*range(layout.text_vocab_size), *marks, *image]
    assert len(set(ids)) == len(ids) and max(ids) < layout.vocab_size


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_the_vocabulary_is_the_next_multiple_of_64(layout):
    used = layout.image.offset + layout.image.num_ids
    assert layout.vocab_size % 64 == 0 and used <= layout.vocab_size < used + 64


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_types_are_the_smallest_that_hold_every_value(layout):
    for dtype, largest in ((layout.text_dtype, layout.pad_id), (layout.code_dtype, layout.codebook_size - 1)):
        assert np.iinfo(dtype).max >= largest
        assert dtype == np.uint8 or np.iinfo(dtype).max // 257 < largest


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_every_position_of_a_sequence_holds_its_own_kind(layout):
    text_ids, codes = torch.randint(layout.text_vocab_size, (2, layout.text_length)), random_codes(layout, 2)
    sequence = layout.sequence(text_ids, codes)
    assert sequence.shape == (2, layout.sequence_length)
    assert (sequence[:, 0] == layout.bos_id).all() and (sequence[:, layout.prompt_length - 1] == layout.sep_id).all()
    assert (sequence[:, layout.prompt_length :] >= layout.image.offset).all()


def test_text_ids_keep_their_values(layout):
    text_ids = torch.tensor([[0, 5, 10]])
    assert layout.prompt(text_ids)[:, 1:-1].equal(text_ids)


def test_shared_codes_have_one_id_and_others_one_for_each_position(layout):
    ids = layout.image.codes_to_ids(torch.zeros(1, 4, dtype=torch.int64))
    assert len(ids.unique()) == (1 if layout.codes_shared else 4)


def test_an_id_in_the_wrong_position_is_refused():
    layout = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6, codes_shared=False)
    ids = layout.image.codes_to_ids(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="no image ids"):
        layout.image.ids_to_codes(ids.flip(1))


@pytest.mark.parametrize("wrong", [0, 10, 11, 12, 13])
def test_an_id_of_text_or_a_mark_is_no_image_id(layout, wrong):
    ids = layout.image.codes_to_ids(torch.zeros(1, 4, dtype=torch.int64))
    ids[0, 2] = wrong
    with pytest.raises(ValueError, match="no image ids"):
        layout.image.ids_to_codes(ids)


def test_short_texts_are_filled_with_pad_and_long_ones_cut(layout):
    rows = layout.pad_text([[1], [1, 2, 3, 4], []])
    assert rows.tolist() == [[1, layout.pad_id, layout.pad_id], [1, 2, 3], [layout.pad_id] * 3]
    assert rows.dtype == layout.text_dtype


def test_text_of_another_length_is_refused(layout):
    with pytest.raises(ValueError, match="text ids must be `b 3`"):
        layout.prompt(torch.zeros(2, 4, dtype=torch.int64))


def test_the_empty_prompt_is_nothing_but_pads(layout):
    assert (layout.without_caption(2) == layout.pad_id).all()


def test_a_layout_survives_saving_and_loading(layout, tmp_path):
    layout.save_pretrained(tmp_path)
    assert SequenceLayout.from_pretrained(tmp_path) == layout


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
def test_a_size_that_is_no_positive_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="num_codes must be a whole number"):
        SequenceLayout(text_vocab_size=11, text_length=3, num_codes=value, codebook_size=6)


def test_a_folder_without_a_layout_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="not a tok2img model folder"):
        SequenceLayout.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"text_length": 1}', '{"codes_shared": 1}', "\xff"])
def test_a_damaged_layout_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "layout.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"layout\.json does not describe a layout"):
        SequenceLayout.from_pretrained(tmp_path)


def test_codes_shared_must_be_true_or_false(layout, tmp_path):
    layout.save_pretrained(tmp_path)
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"codes_shared": "no"}))
    with pytest.raises(ValueError, match="codes_shared must be true or false"):
        SequenceLayout.from_pretrained(tmp_path)
