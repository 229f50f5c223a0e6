import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value

from tok2img.tokenization.map_function import TokenizeBatch, tokenize_dataset
from tok2img.tokenization.processor import Tok2ImgProcessor

REPOSITORY = Path(__file__).parents[3]
MAP_IN_PROCESSES = """
import sys
import torch
from datasets import Dataset
from tok2img.tokenization.map_function import tokenize_dataset
from tok2img.tokenization.processor import Tok2ImgProcessor

torch.set_num_threads(2)
torch.nn.functional.conv2d(torch.rand(8, 16, 64, 64), torch.rand(16, 16, 3, 3))
processor = Tok2ImgProcessor.from_pretrained(sys.argv[1])
rows = Dataset.from_parquet(sys.argv[2], cache_dir=sys.argv[3])
tokens = [tokenize_dataset(rows, processor, num_proc=num_proc, batch_size=2)[:] for num_proc in (None, 2)]
assert tokens[0] == tokens[1]
print("equal")
"""


@pytest.fixture(params=["processor", "stage_processor"])
def any_processor(request) -> Tok2ImgProcessor:
    return request.getfixturevalue(request.param)


def by_hand(processor: Tok2ImgProcessor, captions, pil_images) -> dict[str, list]:
    codes, text_ids = processor.encode_images(pil_images), processor.encode_text(captions)
    return {"text_ids": text_ids.tolist(), "image_codes": codes.tolist()}


def test_the_tokens_are_those_of_encoding_by_hand(any_processor, rows, captions, pil_images):
    assert tokenize_dataset(rows, any_processor, batch_size=4)[:] == by_hand(any_processor, captions, pil_images)


def test_map_with_the_callable_gives_the_same_tokens(any_processor, rows, captions, pil_images):
    tokens = rows.map(TokenizeBatch(any_processor), batched=True, remove_columns=rows.column_names)
    assert tokens[:] == by_hand(any_processor, captions, pil_images)


def test_a_stream_gives_the_same_tokens(any_processor, rows, captions, pil_images):
    stream = tokenize_dataset(rows.to_iterable_dataset(), any_processor, batch_size=4)
    tokens = list(stream)
    expected = by_hand(any_processor, captions, pil_images)
    assert {name: [row[name].tolist() for row in tokens] for name in expected} == expected


def test_columns_have_fixed_lengths_and_the_smallest_types(processor, rows):
    features = tokenize_dataset(rows, processor).features
    assert features == {"text_ids": List(Value("uint16"), length=6), "image_codes": List(Value("uint8"), length=4)}


def test_no_other_column_is_kept(processor, rows):
    rows = rows.add_column("label", list(range(len(rows))))
    assert tokenize_dataset(rows, processor).column_names == ["text_ids", "image_codes"]


def test_columns_of_other_names_can_be_chosen(processor, rows):
    renamed = rows.rename_columns({"image": "photo", "caption": "title"})
    tokens = tokenize_dataset(renamed, processor, image_column="photo", caption_column="title")
    assert tokens[:] == tokenize_dataset(rows, processor)[:]


def test_the_cache_is_found_again_from_another_folder_and_mode(any_processor, rows, tmp_path, monkeypatch):
    first = tokenize_dataset(rows, any_processor)
    any_processor.save_pretrained(tmp_path / "elsewhere" / "model")
    again = Tok2ImgProcessor.from_pretrained(tmp_path / "elsewhere" / "model")
    again.image_tokenizer.train()
    monkeypatch.setattr(TokenizeBatch, "__call__", lambda *_: pytest.fail("computed again"))
    second = tokenize_dataset(rows, again)
    assert second._fingerprint == first._fingerprint and second.cache_files == first.cache_files


def test_one_changed_weight_is_not_in_the_cache(any_processor, rows):
    first = tokenize_dataset(rows, any_processor)
    with torch.no_grad():
        next(iter(any_processor.image_tokenizer.parameters())).view(-1)[0] += 1e-3
    second = tokenize_dataset(rows, any_processor)
    assert second._fingerprint != first._fingerprint and second.cache_files != first.cache_files


def test_another_column_is_not_in_the_cache(processor, rows):
    rows = rows.add_column("title", [caption.upper() for caption in rows["caption"]])
    first = tokenize_dataset(rows, processor)
    second = tokenize_dataset(rows, processor, caption_column="title")
    assert second._fingerprint != first._fingerprint and second["text_ids"][:] != first["text_ids"][:]


def test_another_text_length_is_not_in_the_cache(processor, rows):
    longer = Tok2ImgProcessor.build(processor.image_tokenizer, processor.text_tokenizer, text_length=7)
    assert tokenize_dataset(rows, processor)._fingerprint != tokenize_dataset(rows, longer)._fingerprint


def test_ids_kept_for_text_beyond_those_of_the_tokenizer_survive_the_pickle(processor, captions, pil_images):
    text = processor.text_tokenizer
    wider = Tok2ImgProcessor.build(processor.image_tokenizer, text, text_length=6, text_vocab_size=5000)
    again = pickle.loads(pickle.dumps(TokenizeBatch(wider))).processor
    assert again.layout == wider.layout and again.layout.pad_id == 5002
    assert again(captions, pil_images)["input_ids"].equal(wider(captions, pil_images)["input_ids"])


def test_a_pickled_callable_gives_the_same_tokens(any_processor, captions, pil_images):
    work, batch = TokenizeBatch(any_processor), {"image": pil_images, "caption": captions}
    again = pickle.loads(pickle.dumps(work))
    for name, column in work(batch).items():
        np.testing.assert_array_equal(again(batch)[name], column)


def test_a_rebuilt_text_tokenizer_still_takes_marks_for_text(processor, pil_images):
    batch = {"image": pil_images[:1], "caption": ["</s>[SEP]"]}
    work = TokenizeBatch(processor)
    assert (pickle.loads(pickle.dumps(work))(batch)["text_ids"] == work(batch)["text_ids"]).all()


def test_processes_started_after_torch_ran_threads_end_with_the_same_tokens(processor, rows, tmp_path):
    processor.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / name) for name in ("model", "rows.parquet", "cache")]
    done = subprocess.run(
        [sys.executable, "-c", MAP_IN_PROCESSES, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("equal\n"), done.stderr


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_image_is_named_by_its_row(processor, rows, streaming):
    images = [
        row["bytes"] for row in rows.cast_column("image", rows.features["image"].__class__(decode=False))["image"]
    ]
    images[4] = images[4][:30]
    broken = Dataset.from_dict({"image": images, "caption": rows["caption"][:]})
    with pytest.raises(ValueError, match="row 4: .*(truncated|corrupt|damaged)"):
        list(tokenize_dataset(broken.to_iterable_dataset() if streaming else broken, processor, batch_size=2))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_caption_that_is_null_is_named_by_its_row(processor, pil_images, captions, streaming):
    broken = Dataset.from_dict({"image": pil_images, "caption": [*captions[:3], None, *captions[4:]]})
    with pytest.raises(ValueError, match="row 3: the caption is not text but NoneType"):
        list(tokenize_dataset(broken.to_iterable_dataset() if streaming else broken, processor, batch_size=2))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(processor, rows, streaming):
    data = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(ValueError, match="no column 'title'; it has image, caption"):
        tokenize_dataset(data, processor, caption_column="title")


def test_an_empty_data_set_is_refused(processor, rows):
    with pytest.raises(ValueError, match="the data set is empty"):
        tokenize_dataset(rows.select([]), processor)
