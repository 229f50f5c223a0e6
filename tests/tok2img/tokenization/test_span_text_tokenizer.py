"""Models of text wherever a text tokenizer goes."""

import json
import pickle
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tok2img.cli import app
from tok2img.evaluation.text_metrics import evaluate_text_tokenizer, prefix_mask
from tok2img.recipes.build_processor import fit_text_tokenizer
from tok2img.recipes.config import TokenizerRecipe
from tok2img.recipes.train_tokenizer import train_tokenizer
from tok2img.tokenization.map_function import tokenize_dataset
from tok2img.tokenization.processor import Tok2ImgProcessor
from tok2img.tokenization.span_text_tokenizer import DiscreteTextTokenizer, load_text_model, load_text_tokenizer
from tok2img.tokenization.text_tokenizer import SubwordTokenizer
from tok2img.visualization.text_sheets import save_text_sheet
from tokenizers_vq import TextSpanTokenizer, VQDrawForText, VQDrawTextConfig, VQVAEForText, VQVAETextConfig
from tokenizers_vq.auto import load_image_tokenizer

SPANS = {"span_length": 4, "codebook_size": 8, "hidden_channels": 16, "dilations": [1, 2]}
SETTINGS = {
    "vqdraw_text": SPANS | {"num_stages": 3, "feature_channels": 8, "embedding_dim": 8},
    "vqvae_text": SPANS | {"num_quantizers": 3, "code_dim": 8},
}
CLASSES = {"vqdraw_text": VQDrawForText, "vqvae_text": VQVAEForText}


@pytest.fixture(scope="module", params=SETTINGS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def vqdraw() -> VQDrawForText:
    torch.manual_seed(0)
    model = VQDrawForText(VQDrawTextConfig(**SETTINGS["vqdraw_text"], max_length=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def vqvae() -> VQVAEForText:
    torch.manual_seed(0)
    model = VQVAEForText(VQVAETextConfig(**SETTINGS["vqvae_text"], max_length=16)).eval()
    model.init_from_data(model.texts_to_symbols([f"{number} {number**2}" for number in range(50)]))
    return model


@pytest.fixture(scope="module")
def model(kind, vqdraw, vqvae) -> TextSpanTokenizer:
    return {"vqdraw_text": vqdraw, "vqvae_text": vqvae}[kind]


@pytest.fixture(scope="module")
def text_codes(model) -> DiscreteTextTokenizer:
    return DiscreteTextTokenizer(model)


@pytest.fixture
def recipe(kind, rows, tmp_path) -> TokenizerRecipe:
    return TokenizerRecipe(
        tokenizer=kind,
        data=str(tmp_path / "rows.parquet"),
        out=str(tmp_path / "text"),
        model=SETTINGS[kind],
        max_steps=4,
        batch_size=2,
        sample_steps=2,
        eval_steps=2,
    )


def test_ids_are_stage_by_stage_for_each_span_up_to_the_end(text_codes, model):
    codes = model.encode(["a red", ""]).view(2, 3, 4)
    long, empty = text_codes.encode(["a red", ""])
    assert long == [8 * stage + int(codes[0, stage, span]) for span in (0, 1) for stage in range(3)]
    assert empty == [8 * stage + int(codes[1, stage, 0]) for stage in range(3)]
    assert text_codes.vocab_size == 24


def test_captions_that_come_again_are_encoded_once(text_codes, model, monkeypatch):
    expected = text_codes.encode(["a red", "", "a blue"])
    seen, symbols = [], model.texts_to_symbols
    monkeypatch.setattr(model, "texts_to_symbols", lambda texts: [seen.extend(texts), symbols(texts)][1])
    assert text_codes.encode(["a red", "", "a red", "a blue", ""]) == [expected[index] for index in (0, 1, 0, 2, 1)]
    assert seen == ["a red", "", "a blue"]


@given(st.text(max_size=20))
def test_ids_decode_to_what_the_codes_say(text_codes, model, text):
    ids = text_codes.encode([text])[0]
    assert all(0 <= each < text_codes.vocab_size for each in ids)
    assert text_codes.decode(ids) == model.decode(model.encode([text]))[0]


@pytest.mark.parametrize("text", ["a" * 1_000_000, "cat dog " * 125_000, "ab1!" * 250_000, "e\u0301" * 300_000])
@pytest.mark.parametrize("span_unit", ["bytes", "words", "word"])
def test_a_megabyte_takes_no_longer_than_what_is_kept_of_it(text_codes, text, span_unit, monkeypatch):
    monkeypatch.setattr(text_codes.model.config, "span_unit", span_unit)
    start = time.process_time()
    (ids,) = text_codes.encode([text])
    (length,) = text_codes.lengths([text], max_length=64)
    assert time.process_time() - start < 0.1
    assert len(ids) == text_codes.model.num_codes < length and max(ids) < text_codes.vocab_size


def test_a_limit_cuts_the_ids_and_the_rest_decodes(text_codes):
    ids = text_codes.encode(["a red square"], max_length=4)[0]
    assert len(ids) == 4 and ids == text_codes.encode(["a red square"])[0][:4]
    assert isinstance(text_codes.decode(ids), str)


@given(st.text(max_size=20))
def test_lengths_are_known_without_encoding(text_codes, text):
    (length,) = text_codes.lengths([text], max_length=64)
    assert min(length, text_codes.model.num_codes) == len(text_codes.encode([text])[0])


def test_captions_without_room_are_counted(text_codes, tiny_vqvae):
    processor = Tok2ImgProcessor.build(tiny_vqvae, text_codes, text_length=12)
    assert processor.count_truncated(["a red square", "a" * 16, "a" * 17]) == 1
    shorter = Tok2ImgProcessor.build(tiny_vqvae, text_codes, text_length=9)
    assert shorter.count_truncated(["a red", "a red square"]) == 1


def test_no_room_is_made_for_more_ids_than_there_are(text_codes):
    assert fit_text_tokenizer(["a", "a" * 40], text_tokenizer=text_codes)[1] == text_codes.model.num_codes == 12


def test_captions_that_are_no_text_are_refused_with_their_row(text_codes):
    with pytest.raises(ValueError, match="row 7: the caption is not text"):
        text_codes.encode(["fine", None], rows=[6, 7])


@pytest.mark.parametrize("ids", [[8], [0] * 13, [-1]])
def test_ids_that_do_not_belong_are_refused(text_codes, ids):
    with pytest.raises(ValueError, match=r"codes must lie|got 13 ids, expected 12"):
        text_codes.decode(ids)


def test_saves_loads_and_pickles(text_codes, captions, tmp_path):
    text_codes.save_pretrained(tmp_path)
    for again in (load_text_tokenizer(tmp_path), pickle.loads(pickle.dumps(text_codes))):
        assert isinstance(again, DiscreteTextTokenizer) and again.state() == text_codes.state()
        assert again.encode(captions) == text_codes.encode(captions)


def test_other_folders_hold_subwords(text_tokenizer, tmp_path):
    text_tokenizer.save_pretrained(tmp_path)
    assert isinstance(load_text_tokenizer(tmp_path), SubwordTokenizer)


def test_is_no_image_tokenizer_and_those_are_none_of_text(text_codes, model, tiny_vqvae, tmp_path):
    text_codes.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"holds a {type(model).__name__}, not an image tokenizer"):
        load_image_tokenizer(tmp_path)
    tiny_vqvae.save_pretrained(tmp_path / "image")
    with pytest.raises(ValueError, match="holds no model of text"):
        load_text_model(tmp_path / "image")


@pytest.mark.parametrize("num_proc", [None, 2])
def test_tokenizes_a_data_set_and_comes_back_with_the_processor(tiny_vqvae, text_codes, rows, tmp_path, num_proc):
    processor = Tok2ImgProcessor.build(tiny_vqvae, text_codes, text_length=9)
    tokens = tokenize_dataset(rows, processor, num_proc=num_proc).with_format("torch")
    assert torch.equal(tokens["text_ids"][:], processor.encode_text(rows["caption"][:]))
    processor.save_pretrained(tmp_path / "processor")
    again = Tok2ImgProcessor.from_pretrained(tmp_path / "processor")
    assert again.fingerprint() == processor.fingerprint()


def test_a_recipe_trains_one_on_captions_alone(recipe, tmp_path):
    model = train_tokenizer(recipe)
    assert type(model) is CLASSES[recipe.tokenizer] and model.config.max_length == 16
    assert bytes(model.alphabet) == bytes(sorted({*b"?a red square blue disc two green cats dog"}))
    assert "text  '" in (tmp_path / "text" / "samples" / "step-000002.txt").read_text()


def test_the_command_line_shows_and_measures_texts(model, rows, tmp_path):
    model.save_pretrained(tmp_path / "text")
    folder, data = str(tmp_path / "text"), str(tmp_path / "rows.parquet")
    for sources in ([data, "--num-images", "2"], ["a red square", "a blue disc", "--num-images", "2"]):
        out = tmp_path / "sheet.txt"
        answer = CliRunner().invoke(app, ["reconstruct", *sources, "--tokenizer", folder, "--out", str(out)])
        assert answer.exit_code == 0
        sheet, _, random = out.read_text().partition("random codes\n")
        assert sheet.count("text  '") == 2 and sheet.count("\n   3  '") == 2 and len(random.splitlines()) == 2
    out = tmp_path / "metrics.json"
    arguments = ["--tokenizer", folder, "--data", data, "--split", "train", "--out", str(out)]
    answer = CliRunner().invoke(app, ["evaluate", *arguments])
    assert answer.exit_code == 0 and len(json.loads(out.read_text())["byte_accuracy"]) == 3


def test_one_long_text_is_no_file(model, tmp_path):
    model.save_pretrained(tmp_path / "text")
    save_text_sheet(tmp_path / "text", ["a red square " * 30], tmp_path / "sheet.txt", split="train", num_texts=1)
    assert (tmp_path / "sheet.txt").read_text().count("text  '") == 1
    with pytest.raises(ValueError, match=r"Expected a \.txt file for a sheet of texts, got .*sheet\.png"):
        save_text_sheet(tmp_path / "text", ["a red square"], tmp_path / "sheet.png", split="train", num_texts=1)


def test_one_word_is_a_text_and_a_path_is_a_data_set(model, tmp_path):
    model.save_pretrained(tmp_path / "text")
    save_text_sheet(tmp_path / "text", ["hello"], tmp_path / "sheet.txt", split="train", num_texts=1)
    assert (tmp_path / "sheet.txt").read_text().startswith("text  'hello'\n")
    with pytest.raises(ValueError, match="nowhere/rows.parquet: no such file"):
        save_text_sheet(tmp_path / "text", ["nowhere/rows.parquet"], tmp_path / "sheet.txt", split="train", num_texts=1)


class TestReport:
    def test_counts_what_is_right_and_what_it_costs(self, model):
        texts = ["a red square", "", "x", "twelve bytes and more"]
        report = evaluate_text_tokenizer(model, texts)
        codes, symbols = model.encode(texts), model.texts_to_symbols(texts)
        lengths = [12, 0, 1, 16]
        for stage, seen in enumerate(model.decode_progressively(codes)):
            pairs = zip(seen, [text.encode()[:16] for text in texts], strict=True)
            assert report["exact_match"][stage] == pytest.approx(sum(a.encode() == b for a, b in pairs) / 4)
        right = (model.decode_symbols(codes) == symbols)[symbols != model.pad_symbol].sum().item()
        assert report["byte_accuracy"][-1] == pytest.approx(right / sum(lengths))
        assert report["bits_per_byte"][-1] == pytest.approx(3 * 3 * (4 + 1 + 1 + 4) / sum(lengths))
        assert report["num_truncated_texts"] == 1 and report["bytes_per_text"] == sum(lengths) / 4
        assert all(1 <= used <= 8 for used in report["used_per_stage"])

    def test_rates_spend_what_they_may(self, model):
        texts = ["a red square", "x"]
        symbols = model.texts_to_symbols(texts)
        given = prefix_mask(model, symbols, 2).view(2, 3, 4)
        assert given[0].tolist() == [[True] * 4, [True] * 4, [False] * 4]  # 24 bits at 3 each
        assert not given[1].any()  # 2 bits buy no code
        assert prefix_mask(model, symbols, 100).sum(dim=1).tolist() == [12, 3]

    def test_at_a_rate_no_more_is_read_than_it_pays_for(self, model):
        texts = ["a red square", "x"]
        symbols, codes = model.texts_to_symbols(texts), model.encode(texts)
        paid = prefix_mask(model, symbols, 2)
        seen = model.decode_with_mask(codes, paid)
        assert torch.equal(seen, model.decode_with_mask(codes.where(paid, 5), paid))
        right = (seen == symbols)[symbols != model.pad_symbol].sum().item()
        report = evaluate_text_tokenizer(model, texts)
        assert report["at_bits_per_byte"]["2"]["byte_accuracy"] == pytest.approx(right / 13)

    def test_what_nothing_is_paid_for_is_what_a_vqdraw_state_of_zeros_says(self, vqdraw):
        symbols, codes = vqdraw.texts_to_symbols(["a red square", "x"]), vqdraw.encode(["a red square", "x"])
        *_, second, _ = vqdraw.decode_symbols_progressively(codes[:1])
        seen = vqdraw.decode_with_mask(codes, prefix_mask(vqdraw, symbols, 2))
        assert torch.equal(seen[0, :12], second[0, :12])
        assert torch.equal(seen[1], vqdraw.stage_loss.reconstruct(vqdraw.vqdraw.initial_state(4)).flatten())

    def test_needs_texts(self, model):
        with pytest.raises(ValueError, match="no texts"):
            evaluate_text_tokenizer(model, [])
