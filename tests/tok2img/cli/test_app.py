import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from datasets import Dataset
from PIL import Image

from tok2img.cli.app import app, main
from tok2img.data.images import load_pixels
from tok2img.data.loading import load_captioned_images
from tok2img.data.shapes import shapes_dataset
from tok2img.evaluation.caption_classifier import CaptionClassifier
from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.prior.model import build_prior
from tok2img.tokenization.layout import SequenceLayout
from tok2img.tokenization.token_dataset import load_tokens, save_tokens
from tok2img.trainer.training_log import load_log
from tokenizers_vq import load_image

REPOSITORY = Path(__file__).parents[3]
TINY_VQVAE = ["--model.hidden_channels", "16", "--model.num_decoder_blocks", "1", "--model.codebook_size", "8"]
SHORT = ["--max-steps", "3", "--batch-size", "8", "--eval-steps", "2", "--sample-steps", "2", "--logging-steps", "1"]
HELP_WITHOUT_TORCH = """
import sys
from tok2img.cli import app
try:
    app(["train-prior", "--help"])
except SystemExit as stop:
    assert stop.code == 0
assert not {"torch", "transformers", "datasets"} & sys.modules.keys()
"""


@pytest.fixture
def tok2img(monkeypatch, capsys):
    """The command line in this process: what it printed, what it complained of, and its exit code."""

    def run(*words: object) -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "argv", ["tok2img", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return printed.out, printed.err, int(stop.value.code or 0)

    return run


@pytest.fixture
def refused(tok2img, tmp_path, monkeypatch):
    """Check that a command ends with exit code 2 and one line that names what is wrong, and leaves no file behind."""
    monkeypatch.chdir(tmp_path)

    def check(*words: object, names: str) -> None:
        before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        _, complaint, code = tok2img(*words)
        lines = [line for line in complaint.splitlines() if not is_progress(line)]
        assert (code, len(lines)) == (2, 1), complaint
        assert lines[0].startswith("tok2img: ") and names in lines[0]
        assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before

    return check


def is_progress(line: str) -> bool:
    return "%|" in line or not line.strip()


@pytest.fixture
def data(tmp_path) -> str:
    """Twenty-four 16x16 images of two kinds in a Parquet file."""
    shapes = shapes_dataset("train", num_rows=24)["image"]
    small = [shapes[row].resize((16, 16)).rotate(180 * (row % 2)) for row in range(24)]
    captions = ["an image upside down", "an image that stands upright"] * 12
    path = tmp_path / "train.parquet"
    Dataset.from_dict({"image": small, "caption": captions}).to_parquet(str(path))
    return str(path)


@pytest.fixture
def tokenizer(tiny_vqvae, tmp_path) -> str:
    tiny_vqvae.save_pretrained(str(tmp_path / "tokenizer"))
    return str(tmp_path / "tokenizer")


@pytest.fixture
def model(processor, tmp_path) -> str:
    TextToImagePipeline(build_prior(processor.layout, depth=1), processor).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_every_command_does_its_part_of_the_whole_job(tok2img, data, tmp_path):
    tokenizer, tokens, model = (tmp_path / name for name in ("tokenizer", "tokens", "model"))
    commands = [
        ["train-tokenizer", "--data", data, "--out", tokenizer, *SHORT, *TINY_VQVAE],
        ["tokenize", data, "--tokenizer", tokenizer, "--out", tokens, "--vocab-size", "270"],
        ["train-prior", "--tokens", tokens, "--out", model, "--depth", "1", *SHORT],
        ["generate", "an image upside down", "--model", model, "--out", tmp_path / "one.png", "--seed", 1],
        ["generate", "a", "b", "--num-images", 3, "--model", model, "--out", tmp_path / "sheet.png", "--top-k", 4],
        ["generate", "a", "b", "--stages", "--model", model, "--out", tmp_path / "stages.png"],
        ["reconstruct", data, "--tokenizer", tokenizer, "--out", tmp_path / "both.png", "--num-images", 4],
        [
            "evaluate",
            "--tokenizer",
            tokenizer,
            "--data",
            data,
            "--split",
            "train",
            "--out",
            tmp_path / "tokenizer.json",
        ],
        ["evaluate", "--model", model, "--tokens", tokens, "--data", data, "--split", "train", "--num-images", 8]
        + ["--out", tmp_path / "model.json"],
    ]
    for command in commands:
        _, complaint, code = tok2img(*command)
        assert code == 0, complaint
    assert len(load_tokens(tokens)[0]) == 24
    assert load_image(tmp_path / "one.png").size == (16, 16) and load_image(tmp_path / "sheet.png").width > 60
    assert {"mse", "psnr", "code_usage"} <= json.loads((tmp_path / "tokenizer.json").read_text()).keys()
    report = json.loads((tmp_path / "model.json").read_text())
    assert {
        "image_loss",
        "uniform_loss",
        "caption_information_nats",
        "caption_accuracy",
        "frechet_distance",
        "memorization_rate",
    } <= report.keys()
    assert not (model / "checkpoints").exists() and list((model / "samples").glob("*.png"))
    assert len(load_log(tokenizer)) > 3 and "eval_image_loss" in str(load_log(model))
    drawn = {path.name for path in (tmp_path / "tokenizer_figures").iterdir()}
    assert drawn == {"reconstructions.png", "code_usage.png", "codebook.png", "curves.png"}
    assert report["figures"] == [str(tmp_path / "model_figures" / name) for name in ("samples.png", "curves.png")]


def test_train_prior_from_images_tokenizes_them_first(tok2img, data, tokenizer, tmp_path):
    keys = ["--data", data, "--image-tokenizer", tokenizer, "--vocab-size", "260", "--depth", "1"]
    _, complaint, code = tok2img("train-prior", *keys, "--out", tmp_path / "model", *SHORT)
    assert code == 0, complaint
    assert len(TextToImagePipeline.from_pretrained(tmp_path / "model")("a", seed=0).images) == 1


def test_a_text_tokenizer_is_trained_and_used(tok2img, data, tokenizer, tmp_path):
    out, text = tmp_path / "tokens", tmp_path / "bpe"
    _, complaint, code = tok2img(
        "train-tokenizer", "--tokenizer", "bpe", "--vocab-size", 300, "--data", data, "--out", text
    )
    assert code == 0, complaint
    _, complaint, code = tok2img("tokenize", data, "--tokenizer", tokenizer, "--text-tokenizer", text, "--out", out)
    assert code == 0, complaint
    assert load_tokens(out)[1].text_tokenizer.vocab_size <= 300


def test_a_recipe_file_and_the_command_line_make_one_run(tok2img, data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {data}\nmax_steps: 500\nbatch_size: 4\nmodel:\n  hidden_channels: 16\n  codebook_size: 8\n"
    )
    settings = ["--out", tmp_path / "tokenizer", "--max-steps", 1, "--model.num_decoder_blocks", 1]
    _, complaint, code = tok2img("train-tokenizer", recipe, *settings)
    assert code == 0, complaint
    config = json.loads((tmp_path / "tokenizer" / "config.json").read_text())
    assert (config["hidden_channels"], config["codebook_size"], config["num_decoder_blocks"]) == (16, 8, 1)


def test_tokenize_with_long_captions_reports_truncation(tok2img, data, tokenizer, tmp_path):
    words = ["--tokenizer", tokenizer, "--out", tmp_path / "tokens", "--text-length", 2, "--vocab-size", 256]
    said, _, code = tok2img("tokenize", data, *words)
    assert code == 0 and "24 captions were longer than 2 text tokens and were truncated" in said


def test_generate_with_the_same_seed_writes_the_same_file(tok2img, model, tmp_path):
    for name in ("one.png", "two.png"):
        tok2img("generate", "a dog", "--model", model, "--seed", 3, "--num-images", 4, "--out", tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_reconstruct_with_image_files_writes_a_sheet(tok2img, tokenizer, pil_images, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for file, image in zip(files, pil_images, strict=False):
        image.save(file)
    _, complaint, code = tok2img("reconstruct", *files, "--tokenizer", tokenizer, "--out", tmp_path / "both.png")
    assert code == 0 and (tmp_path / "both.png").is_file(), complaint


def test_help_needs_no_torch():
    done = subprocess.run([sys.executable, "-c", HELP_WITHOUT_TORCH], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "--caption-dropout" in done.stdout, done.stderr


def test_a_process_ends_with_the_exit_code_of_its_error(tmp_path):
    words = ["train-prior", str(tmp_path / "no.yaml")]
    done = subprocess.run([sys.executable, "-m", "tok2img", *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no.yaml" in done.stderr


class TestBadData:
    @pytest.fixture(params=["tokenize", "train-tokenizer", "evaluate"])
    def command(self, request, tokenizer, tmp_path):
        """A command that reads data, as a function of the data and the caption column."""
        out = str(tmp_path / "out")
        return {
            "tokenize": lambda data: ["tokenize", data, "--tokenizer", tokenizer, "--out", out],
            "train-tokenizer": lambda data: ["train-tokenizer", "--data", data, "--out", out, *SHORT, *TINY_VQVAE],
            "evaluate": lambda data: (
                ["evaluate", "--tokenizer", tokenizer, "--data", data, "--out", out + ".json"] + ["--split", "train"]
            ),
        }[request.param]

    def test_a_path_that_is_not_there(self, refused, command, tmp_path):
        refused(*command(str(tmp_path / "no.parquet")), names="no.parquet")

    def test_a_file_that_is_no_parquet(self, refused, command, tmp_path):
        (tmp_path / "train.parquet").write_bytes(b"PAR1 but not really")
        refused(*command(str(tmp_path / "train.parquet")), names="train.parquet")

    def test_a_parquet_file_with_damaged_pages(self, refused, command, data):
        content = bytearray(Path(data).read_bytes())
        content[100:3000] = bytes(2900)
        Path(data).write_bytes(content)
        refused(*command(data), names="")

    def test_an_empty_data_set(self, refused, command, data, tmp_path):
        Dataset.from_parquet(data, cache_dir=str(tmp_path / "cache")).select([]).to_parquet(data)
        refused(*command(data), names="train.parquet: no rows")

    def test_an_image_column_that_is_not_there(self, refused, command, data):
        refused(*command(data), "--image-column", "photo", names="no column 'photo'")

    def test_an_image_that_does_not_decode(self, refused, command, tmp_path):
        images = [Path(REPOSITORY, "LICENSE").read_bytes()] * 8
        Dataset.from_dict({"image": images, "caption": ["a"] * 8}).to_parquet(str(tmp_path / "train.parquet"))
        refused(*command(str(tmp_path / "train.parquet")), names="row 0")


def parquet(path: Path, captions: list) -> str:
    Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * len(captions), "caption": captions}).to_parquet(str(path))
    return str(path)


def test_a_caption_column_that_is_not_there_is_refused_by_name(refused, data, tokenizer):
    words = ["tokenize", data, "--tokenizer", tokenizer, "--out", "tokens"]
    refused(*words, "--caption-column", "title", names="no column 'title'")


def test_a_caption_that_is_null_is_refused_by_its_row(refused, tokenizer, tmp_path):
    data = parquet(tmp_path / "train.parquet", ["a", "b", None])
    words = ["tokenize", data, "--tokenizer", tokenizer, "--out", "tokens"]
    refused(*words, "--on-error", "raise", names="row 2")


def test_captions_that_are_numbers_are_refused_by_their_column(refused, tokenizer, tmp_path):
    data = parquet(tmp_path / "train.parquet", [1, 2, 3])
    refused("tokenize", data, "--tokenizer", tokenizer, "--out", "tokens", names="caption")


def test_a_split_that_is_not_there_is_refused_by_name(refused, data, tokenizer):
    words = ["tokenize", data, "--tokenizer", tokenizer, "--out", "tokens"]
    refused(*words, "--split", "test", names="no split 'test'")


def test_an_unknown_recipe_key_is_refused_with_its_file(refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text("out: x\nlearning_rte: 1\n")
    refused("train-prior", "recipe.yaml", names="recipe.yaml: no key 'learning_rte'; did you mean 'learning_rate'?")


def test_an_unknown_setting_of_the_model_is_refused_by_name(refused, data):
    words = ["train-tokenizer", "--data", data, "--out", "tokenizer"]
    refused(*words, "--model.codebok_size", 3, names="did you mean 'codebook_size'?")


def test_an_unknown_kind_of_tokenizer_is_refused_by_name(refused, data):
    refused("train-tokenizer", "--data", data, "--out", "x", "--tokenizer", "vqgan", names="'vqgan'")


@pytest.mark.parametrize("command", ["train-tokenizer", "train-prior"])
def test_a_run_without_a_place_for_its_result_is_refused(refused, command):
    refused(command, "--data", "shapes", names="'out'")


def test_a_folder_of_tokens_that_is_none_is_refused_by_name(refused, tmp_path):
    refused("train-prior", "--tokens", tmp_path, "--out", "model", names=f"{tmp_path} holds no tokens")


def test_a_damaged_shard_is_refused_by_name(refused, rows, processor, tmp_path):
    save_tokens(rows, processor, tmp_path / "tokens")
    shard = tmp_path / "tokens" / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused("train-prior", "--tokens", "tokens", "--out", "model", names="train-00000.parquet is missing or damaged")


def test_too_few_rows_to_hold_any_out_are_refused(refused, tmp_path):
    data = parquet(tmp_path / "train.parquet", ["a"])
    refused("train-tokenizer", "--data", data, "--out", "x", *TINY_VQVAE, names="1 rows")


def test_an_unknown_architecture_is_refused_by_name(refused, rows, processor, tmp_path):
    save_tokens(rows, processor, tmp_path / "tokens")
    refused("train-prior", "--tokens", "tokens", "--out", "model", "--architecture", "gpt5", names="'gpt5'")


@pytest.mark.parametrize(
    ("key", "value"),
    [("depth", 0), ("max-steps", 0), ("batch-size", 0), ("temperature", -1), ("top-p", 2), ("eval-every", -1)],
)
def test_a_recipe_value_out_of_range_is_refused_by_its_key(refused, rows, processor, tmp_path, key, value):
    save_tokens(rows, processor, tmp_path / "tokens")
    words = ["train-prior", "--tokens", "tokens", "--out", "model", "--depth", 1]
    refused(*words, f"--{key}", value, names=key.replace("-", "_"))


def test_an_unknown_schedule_is_refused_by_name(refused, rows, processor, tmp_path):
    save_tokens(rows, processor, tmp_path / "tokens")
    refused(
        "train-prior",
        "--tokens",
        "tokens",
        "--out",
        "model",
        "--depth",
        1,
        "--lr-scheduler-type",
        "zigzag",
        names="zigzag",
    )


def test_a_model_smaller_than_the_built_in_shapes_can_be_evaluated_on_them(tok2img, model, tmp_path):
    words = ["--model", model, "--data", "shapes", "--split", "validation", "--max-samples", 8, "--num-images", 4]
    _, complaint, code = tok2img("evaluate", *words, "--out", tmp_path / "report.json")
    assert code == 0, complaint


def test_the_built_in_shapes_are_evaluated_on_a_split_that_they_have(tok2img, tokenizer, tmp_path):
    words = ["--tokenizer", tokenizer, "--data", "shapes", "--max-samples", 8, "--out", tmp_path / "report.json"]
    _, complaint, code = tok2img("evaluate", *words)
    assert code == 0, complaint


class TestBadRequestsForImages:
    def test_a_folder_that_is_no_model(self, refused, tmp_path):
        refused("generate", "a", "--model", tmp_path, "--out", "a.png", names=str(tmp_path))

    def test_a_folder_that_is_not_there(self, refused):
        refused("generate", "a", "--model", "nowhere/at/all", "--out", "a.png", names="nowhere/at/all")

    def test_an_image_tokenizer_in_the_place_of_a_model(self, refused, tokenizer):
        refused("generate", "a", "--model", tokenizer, "--out", "a.png", names=tokenizer)

    def test_a_model_in_the_place_of_an_image_tokenizer(self, refused, model, data):
        refused("reconstruct", data, "--tokenizer", model, "--out", "a.png", names=model)

    @pytest.mark.parametrize("tensors", ["model.safetensors", "image_tokenizer/model.safetensors"])
    def test_a_truncated_file_of_weights(self, refused, model, tensors):
        weights = Path(model, tensors)
        weights.write_bytes(weights.read_bytes()[:500])
        refused("generate", "a", "--model", model, "--out", "a.png", names=model)

    def test_a_damaged_config(self, refused, model):
        Path(model, "config.json").write_text("{")
        refused("generate", "a", "--model", model, "--out", "a.png", names=model)

    def test_a_damaged_layout(self, refused, model):
        Path(model, "layout.json").write_text("{}")
        refused("generate", "a", "--model", model, "--out", "a.png", names="layout.json")

    def test_a_layout_of_another_model(self, refused, model):
        SequenceLayout(11, 3, 4, 6).save_pretrained(model)
        refused("generate", "a", "--model", model, "--out", "a.png", names="these tokenizers need")

    @pytest.mark.parametrize("out", ["a.txt", "a", "a.parquet"])
    def test_a_suffix_that_is_no_image_format(self, refused, model, out):
        refused("generate", "a", "--model", model, "--out", out, names=out)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("num-images", -1),
            ("num-images", 0),
            ("temperature", -1),
            ("top-p", 2),
            ("top-k", -3),
            ("guidance-scale", "nan"),
        ],
    )
    def test_a_setting_out_of_range(self, refused, model, option, value):
        refused(
            "generate", "a", "--model", model, "--out", "a.png", f"--{option}", value, names=option.replace("-", "_")
        )

    def test_a_caption_that_is_half_a_character(self, refused, model):
        refused("generate", "a\udcff", "--model", model, "--out", "a.png", names="row 0")

    def test_an_image_that_does_not_decode(self, refused, tokenizer, tmp_path):
        (tmp_path / "bad.png").write_bytes(b"no image")
        refused("reconstruct", "bad.png", "--tokenizer", tokenizer, "--out", "a.png", names="bad.png")

    def test_a_negative_number_of_images(self, refused, tokenizer, data):
        words = ["reconstruct", data, "--tokenizer", tokenizer, "--out", "a.png"]
        refused(*words, "--num-images", -2, names="num-images")


def test_evaluate_with_figures_folder_saves_figures_there(tok2img, tokenizer, data, tmp_path):
    words = ["--tokenizer", tokenizer, "--data", data, "--split", "train", "--out", tmp_path / "report.json"]
    _, complaint, code = tok2img("evaluate", *words, "--figures", tmp_path / "drawn")
    assert code == 0, complaint
    assert (tmp_path / "drawn" / "codebook.png").is_file() and not (tmp_path / "report_figures").exists()


def test_an_evaluation_without_matplotlib_does_its_work_and_says_what_it_left_out(
    tok2img, tokenizer, data, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["--tokenizer", tokenizer, "--data", data, "--split", "train", "--out", tmp_path / "report.json"]
    _, said, code = tok2img("evaluate", *words)
    assert code == 0 and "left out code_usage.png, codebook.png" in said and "tok2img[eval]" in said
    sheet = str(tmp_path / "report_figures" / "reconstructions.png")
    assert json.loads((tmp_path / "report.json").read_text())["figures"] == [sheet]


def test_evaluate_with_failing_chart_keeps_the_report(tok2img, tokenizer, data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tok2img.visualization.report_figures.plot_code_usage", lambda *_: (_ for _ in ()).throw(ValueError("no chart"))
    )
    words = ["--tokenizer", tokenizer, "--data", data, "--split", "train", "--out", tmp_path / "report.json"]
    _, complaint, code = tok2img("evaluate", *words)
    assert code == 2 and "no chart" in complaint
    assert "psnr" in json.loads((tmp_path / "report.json").read_text())


def test_evaluate_model_verifies_the_captions_of_the_named_column(tok2img, model, pil_images, tmp_path):
    columns = {"image": pil_images[:4], "caption": ["x", "y"] * 2, "title": ["cat", "dog"] * 2}
    for split in ("train", "test"):
        Dataset.from_dict(columns).to_parquet(str(tmp_path / "data" / f"{split}-0.parquet"))
    words = ["--model", model, "--data", tmp_path / "data", "--num-images", 2, "--out", tmp_path / "report.json"]
    _, complaint, code = tok2img("evaluate", *words, "--caption-column", "title", "--verifier", tmp_path / "verifier")
    assert code == 0, complaint
    assert CaptionClassifier.from_pretrained(tmp_path / "verifier").config.captions == ["cat", "dog"]


def test_evaluate_without_model_or_tokenizer_is_refused(refused, data):
    refused("evaluate", "--data", data, "--out", "a.json", names="--model or --tokenizer")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokenize"], "Missing argument 'data'"),
        (["paint"], "No such command 'paint'"),
        (["demo", "--fast"], "No such option: --fast"),
        (["generate", "a", "--model", "m", "--out", "o.png", "--seed", "x"], "Invalid value for '--seed'"),
    ],
)
def test_incomplete_command_is_refused_in_one_line(refused, words, message):
    refused(*words, names=message)


def test_every_option_has_help():
    commands = typer.main.get_command(app).commands
    assert {"demo", "tokenize", "evaluate", "train-prior"} <= commands.keys()
    missing = [
        f"{name} {parameter.name}"
        for name, command in commands.items()
        for parameter in command.params
        if parameter.name not in ("help", "context") and not parameter.help
    ]
    assert not missing


def test_no_command_shows_the_help(tok2img):
    assert "train-prior" in str(tok2img())


@pytest.fixture
def sharpening(tiny_vqdraw, tmp_path) -> str:
    """A saved VQ-DRAW tokenizer."""
    tiny_vqdraw.save_pretrained(tmp_path / "vqdraw")
    return str(tmp_path / "vqdraw")


def test_random_codes_are_drawn_without_a_prior(tok2img, sharpening, model, tmp_path):
    for folder in (sharpening, model):
        for name in ("a.png", "b.png"):
            _, complaint, code = tok2img(
                "generate",
                "--random-codes",
                "--model",
                folder,
                "--out",
                tmp_path / name,
                "--num-images",
                5,
                "--seed",
                3,
            )
            assert code == 0, complaint
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_captions_and_random_codes_exclude_each_other(refused, model):
    refused("generate", "--model", model, "--out", "o.png", names="give either captions or --random-codes")
    refused("generate", "a", "--random-codes", "--model", model, "--out", "o.png", names="either captions")


def test_random_codes_are_shown_stage_by_stage(tok2img, sharpening, tmp_path):
    from PIL import Image

    whole, stages = tmp_path / "whole.png", tmp_path / "stages.png"
    words = ["generate", "--random-codes", "--model", sharpening, "--num-images", 3, "--seed", 3, "--out"]
    assert tok2img(*words, whole)[2] == tok2img(*words, stages, "--stages")[2] == 0
    with Image.open(stages) as rows_of_stages, Image.open(whole) as one_row:
        assert rows_of_stages.height > 2 * one_row.height


@pytest.mark.parametrize("choice", ["--temperature", "--top-k", "--top-p", "--guidance-scale", "--best-of", "--ranker"])
def test_random_codes_refuse_what_only_a_prior_can_do(refused, model, choice):
    refused("generate", "--random-codes", choice, "2", "--model", model, "--out", "o.png", names="there is no prior")


def test_images_are_shown_stage_by_stage(tok2img, sharpening, data, tmp_path):
    from PIL import Image

    _, complaint, code = tok2img(
        "reconstruct", data, "--tokenizer", sharpening, "--out", tmp_path / "s.png", "--stages"
    )
    assert code == 0, complaint
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 4 * 90


def test_a_data_set_is_tokenized_with_the_beam_that_is_asked_for(tok2img, data, sharpening, tmp_path):
    fingerprints = []
    for beam in (1, 2, 2):
        out = tmp_path / f"tokens-{len(fingerprints)}"
        _, complaint, code = tok2img("tokenize", data, "--tokenizer", sharpening, "--out", out, "--beam-size", beam)
        assert code == 0, complaint
        fingerprints.append(json.loads((out / "manifest.json").read_text())["fingerprint"])
    assert fingerprints[0] != fingerprints[1] == fingerprints[2]


def test_a_data_set_is_tokenized_by_the_steps_of_search_that_are_asked_for(tok2img, data, tokenizer, tmp_path):
    for steps in (0, 3):
        out = tmp_path / f"tokens-{steps}"
        _, complaint, code = tok2img("tokenize", data, "--tokenizer", tokenizer, "--out", out, "--search-steps", steps)
        assert code == 0, complaint
        tokens, processor = load_tokens(out)
        assert processor.image_tokenizer.config.to_dict()["search_steps"] == steps
        pixels = load_pixels(load_captioned_images(data)["image"][:], processor.image_tokenizer)
        codes = processor.image_tokenizer.encode(pixels, search_steps=steps)
        assert tokens["image_codes"][:] == codes.tolist()


def test_a_search_that_a_tokenizer_does_not_know_is_refused(refused, data, tokenizer, sharpening):
    for words, named in [
        (["--tokenizer", tokenizer, "--beam-size", 2], "a VQVAE has no beam_size to search with, got 2"),
        (
            ["--tokenizer", tokenizer, "--search-steps", -1],
            "search_steps must be at least 1, or 0 for the tokenizer's own",
        ),
        (
            ["--tokenizer", sharpening, "--search-steps", 2],
            "a VQDrawForImages has no search_steps to search with, got 2",
        ),
    ]:
        refused("tokenize", data, "--out", "t", *words, names=named)


def test_train_ranker_makes_a_ranker_that_generate_uses(tok2img, data, model, tmp_path):
    words = ["--depth", "1", "--vocab-size", "260", "--max-steps", "1", "--batch-size", "4", "--eval-steps", "0"]
    assert tok2img("train-ranker", "--data", data, "--out", tmp_path / "ranker", *words)[2] == 0
    for rank in ([], ["--ranker", tmp_path / "ranker"]):
        image = tmp_path / "image.png"
        printed, complaint, code = tok2img("generate", "a dog", "--best-of", 3, *rank, "--model", model, "--out", image)
        assert code == 0 and load_image(image).size == (8, 8), complaint


def test_generate_with_invalid_best_of_or_ranker_is_refused(refused, model, tmp_path):
    words = ["generate", "a dog", "--model", model, "--out", "image.png"]
    refused(*words, "--best-of", 0, names="Expected best_of to be at least 1")
    refused(*words, "--best-of", 2, "--ranker", tmp_path, names=f"cannot load a CLIP model from {tmp_path}")
