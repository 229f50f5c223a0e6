import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tok2img.tokenization.layout import SequenceLayout

layouts = st.builds(
    lambda groups, **sizes: SequenceLayout(num_codes=sum(groups), positions_per_codebook=tuple(groups), **sizes),
    text_vocab_size=st.integers(1, 400),
    text_length=st.integers(1, 5),
    groups=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    codebook_size=st.integers(1, 300),
)


def random_codes(layout: SequenceLayout, num: int = 3) -> torch.Tensor:
    return torch.randint(layout.codebook_size, (num, layout.num_codes))


@given(layouts)
def test_ids_give_back_the_codes_they_were_made_of(layout):
    codes = random_codes(layout)
    assert layout.image.ids_to_codes(layout.image.codes_to_ids(codes)).equal(codes)


@given(layouts)
def test_no_two_kinds_of_id_overlap(layout):
    marks = [layout.bos_id, layout.sep_id, layout.pad_id]
    image = range(layout.image.offset, layout.image.offset + layout.image.num_ids)
    ids = [*range(layout.text_vocab_size), *marks, *image]
    assert len(set(ids)) == len(ids) and max(ids) < layout.vocab_size


@given(layouts)
def test_the_vocabulary_is_the_next_multiple_of_64(layout):
    used = layout.image.offset + layout.image.num_ids
    assert layout.vocab_size % 64 == 0 and used <= layout.vocab_size < used + 64


@given(layouts)
def test_types_are_the_smallest_that_hold_every_value(layout):
    for dtype, largest in ((layout.text_dtype, layout.pad_id), (layout.code_dtype, layout.codebook_size - 1)):
        assert np.iinfo(dtype).max >= largest
        assert dtype == np.uint8 or np.iinfo(dtype).max // 257 < largest


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


def test_a_code_has_one_id_in_each_group_and_ranges_follow_one_another(layout):
    ids = layout.image.codes_to_ids(torch.full((1, 4), 5))
    expected = [
        layout.image.offset + 6 * group + 5 for group, length in enumerate(layout.image.groups) for _ in range(length)
    ]
    assert ids.tolist() == [expected] and layout.image.num_ids == 6 * len(layout.image.groups)


@pytest.mark.parametrize(("shared", "groups"), [(True, (4,)), (False, (1, 1, 1, 1))])
def test_one_group_and_groups_of_one_are_two_ways_to_write_codes_shared(shared, groups):
    layout = SequenceLayout(11, 3, num_codes=4, codebook_size=6, codes_shared=shared)
    same = SequenceLayout(11, 3, num_codes=4, codebook_size=6, positions_per_codebook=groups)
    assert layout == same and hash(layout) == hash(same) and repr(layout) == repr(same)
    assert layout.image.groups == groups and same.codes_shared is shared


def test_a_layout_fits_the_groups_of_its_tokenizer(tiny_vqvae, tiny_vqdraw):
    for image_tokenizer in (tiny_vqvae, tiny_vqdraw):
        layout = SequenceLayout.for_tokenizers(image_tokenizer, text_vocab_size=11, text_length=3)
        assert layout.image.groups == image_tokenizer.positions_per_codebook


@pytest.mark.parametrize(
    "groups", [(), (3,), (2, 3), (4, 0), (5, -1), (2.0, 2.0), (True, 3), ("2", "2"), 4, "1111"], ids=repr
)
def test_groups_that_do_not_fill_the_positions_are_refused(groups):
    with pytest.raises(
        ValueError, match="positions_per_codebook must be whole numbers of at least 1 that sum to num_codes 4, got"
    ):
        SequenceLayout(11, 3, num_codes=4, codebook_size=6, positions_per_codebook=groups)


def test_an_id_in_the_wrong_position_is_refused():
    layout = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6, codes_shared=False)
    ids = layout.image.codes_to_ids(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="Expected image ids"):
        layout.image.ids_to_codes(ids.flip(1))


@pytest.mark.parametrize("wrong", [0, 10, 11, 12, 13])
def test_ids_to_codes_refuses_text_ids_and_special_tokens(layout, wrong):
    ids = layout.image.codes_to_ids(torch.zeros(1, 4, dtype=torch.int64))
    ids[0, 2] = wrong
    with pytest.raises(ValueError, match="Expected image ids"):
        layout.image.ids_to_codes(ids)


def test_short_texts_are_filled_with_pad_and_long_ones_cut(layout):
    rows = layout.pad_text([[1], [1, 2, 3, 4], []])
    assert rows.tolist() == [[1, layout.pad_id, layout.pad_id], [1, 2, 3], [layout.pad_id] * 3]
    assert rows.dtype == layout.text_dtype


def test_text_of_another_length_is_refused(layout):
    with pytest.raises(ValueError, match="text ids must be `b 3`"):
        layout.prompt(torch.zeros(2, 4, dtype=torch.int64))


def test_the_empty_prompt_is_nothing_but_pads(layout):
    assert (layout.null_text_ids(2) == layout.pad_id).all()


def test_a_layout_survives_saving_and_loading(layout, tmp_path):
    layout.save_pretrained(tmp_path)
    assert SequenceLayout.from_pretrained(tmp_path) == layout


@pytest.mark.parametrize("shared", [True, False])
def test_a_layout_without_groups_is_written_as_before_there_were_any(tmp_path, shared):
    settings = {"text_vocab_size": 11, "text_length": 3, "num_codes": 4, "codebook_size": 6, "codes_shared": shared}
    (tmp_path / "layout.json").write_text(json.dumps(settings))
    layout = SequenceLayout.from_pretrained(tmp_path)
    layout.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "layout.json").read_text()) == settings
    # The fingerprint of saved tokens reads this text.
    assert repr(layout) == f"SequenceLayout({', '.join(f'{name}={value}' for name, value in settings.items())})"


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
def test_a_size_that_is_no_positive_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="num_codes must be a whole number"):
        SequenceLayout(text_vocab_size=11, text_length=3, num_codes=value, codebook_size=6)


def test_a_folder_without_a_layout_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="not a tok2img model folder"):
        SequenceLayout.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"text_length": 1}', '{"codes_shared": 1}', '{"positions_per_codebook": 4}', "\xff"]
)
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
