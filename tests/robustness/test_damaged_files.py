"""What must hold for any damage to saved weights and settings, and for any codes: found by trying much of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from tok2img import TextToImagePipeline
from tok2img.tokenization.layout import SequenceLayout
from tok2img.tokenization.text_tokenizer import SubwordTokenizer
from tokenizers_vq.auto import load_image_tokenizer

places = st.floats(0, 1, exclude_max=True)
damage = st.tuples(st.sampled_from(["flip", "end", "remove", "put"]), places, st.binary(min_size=1, max_size=6))
settings_of_any_kind = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(params=["tiny_vqvae", "tiny_vqdraw"])
def folder(request, place) -> Path:
    """A saved image tokenizer."""
    folder = place / request.param
    if not folder.exists():
        request.getfixturevalue(request.param).save_pretrained(folder)
    return folder


def damaged(data: bytes, kind: str, where: float, what: bytes) -> bytes:
    at = int(where * len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (what[0] or 1)]) + data[at + 1 :]
    return {"end": data[:at], "remove": data[:at] + data[at + len(what) :], "put": data[:at] + what + data[at:]}[kind]


def finite_or_refused(folder: Path) -> None:
    """A folder loads, and then codes and draws as it should, or else the error is one line about it."""
    try:
        model = load_image_tokenizer(folder)
    except (ValueError, OSError) as error:
        assert str(error) and len(str(error).splitlines()) == 1  # noqa: PT017
        return
    config: Any = model.config
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    if config.image_size <= 64:
        codes = torch.zeros(1, model.num_codes, dtype=torch.long)
        assert model.decode(codes).shape == (1, config.num_channels, config.image_size, config.image_size)


@given(st.sampled_from(["config.json", "model.safetensors", "header"]), damage)
def test_a_damaged_tokenizer_loads_or_is_refused_in_one_line(folder, part, change):
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    if part == "header":
        data = (folder / "model.safetensors").read_bytes()
        length = 8 + int.from_bytes(data[:8], "little")
        (copy / "model.safetensors").write_bytes(damaged(data[:length], *change) + data[length:])
    else:
        (copy / part).write_bytes(damaged((folder / part).read_bytes(), *change))
    finite_or_refused(copy)


@given(st.data())
def test_a_tokenizer_with_any_setting_loads_or_is_refused_in_one_line(folder, data):
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    name = data.draw(st.sampled_from(sorted(config)) | st.text(max_size=8))
    config[name] = data.draw(settings_of_any_kind)
    (copy / "config.json").write_text(json.dumps(config))
    finite_or_refused(copy)


@given(
    st.sampled_from(["config.json", "generation_config.json", "layout.json", "text_tokenizer/tokenizer.json"]), damage
)
def test_a_damaged_model_draws_or_is_refused_in_one_line(pipeline, place, part, change):
    whole, copy = place / "model", place / "model-copy"
    if not whole.exists():
        pipeline.save_pretrained(whole)
    shutil.copytree(whole, copy, dirs_exist_ok=True)
    (copy / part).write_bytes(damaged((whole / part).read_bytes(), *change))
    try:
        TextToImagePipeline.from_pretrained(copy)("a dog", seed=0)
    except (ValueError, OSError) as error:
        assert str(error) and len(str(error).splitlines()) == 1  # noqa: PT017


@given(damage)
def test_a_damaged_text_tokenizer_encodes_or_is_refused_in_one_line(text_tokenizer, place, change):
    whole, copy = place / "text", place / "text-copy"
    if not whole.exists():
        text_tokenizer.save_pretrained(whole)
    shutil.copytree(whole, copy, dirs_exist_ok=True)
    (copy / "tokenizer.json").write_bytes(damaged((whole / "tokenizer.json").read_bytes(), *change))
    try:
        SubwordTokenizer.from_pretrained(copy).encode(["a red dog"])
    except (ValueError, OSError) as error:
        assert str(error) and len(str(error).splitlines()) == 1  # noqa: PT017


def test_merges_that_the_vocabulary_lacks_are_refused_though_rust_panics(text_tokenizer, tmp_path):
    text_tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["model"]["continuing_subword_prefix"] = "######"
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="cannot load a text tokenizer"):
        SubwordTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", [None, "", "preTrained"])
def test_settings_without_a_model_are_refused(tiny_vqvae, tmp_path, model_type):
    tiny_vqvae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("model_type")
    (tmp_path / "config.json").write_text(
        json.dumps(config | ({} if model_type is None else {"model_type": model_type}))
    )
    with pytest.raises(ValueError, match="not an image tokenizer"):
        load_image_tokenizer(tmp_path)


@given(st.data())
def test_codes_of_any_kind_decode_to_images_or_are_refused(tiny_vqvae, tiny_vqdraw, data):
    model = data.draw(st.sampled_from([tiny_vqvae, tiny_vqdraw]))
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32, torch.bool]))
    num_codes = data.draw(st.sampled_from([model.num_codes] * 3 + [0, 1, model.num_codes + 1]))
    values = data.draw(st.lists(st.integers(-2, model.codebook_size + 1), min_size=num_codes, max_size=num_codes))
    codes = torch.tensor([values], dtype=torch.long).to(dtype).view(1, num_codes)
    integers = dtype not in (torch.float32, torch.bool)
    fit = integers and all(0 <= value < model.codebook_size for value in codes.flatten().tolist())
    if fit and (num_codes == model.num_codes or (model.supports_prefix_decoding and 0 < num_codes < model.num_codes)):
        images = model.decode(codes)
        assert images.shape == (1, 3, 8, 8) and images.min() >= 0 and images.max() <= 1
    else:
        with pytest.raises(ValueError, match="codes must"):
            model.decode(codes)


@given(st.data())
def test_codes_come_back_from_their_smallest_type_and_from_ids(data):
    size = data.draw(st.integers(1, 70_000))
    codes = torch.tensor([data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=12))])
    layout = SequenceLayout(data.draw(st.integers(1, 500)), 3, codes.shape[1], size, data.draw(st.booleans()))
    stored = torch.from_numpy(codes.numpy().astype(layout.code_dtype))
    assert load(save({"codes": stored}))["codes"].long().equal(codes)
    assert layout.image.ids_to_codes(layout.image.codes_to_ids(stored)).equal(codes)
