import signal
import sys

import pytest

from tok2img.prior.model import build_prior
from tok2img.recipes.config import PriorRecipe, TokenizerRecipe
from tok2img.recipes.dry_run import StepClock, estimate_prior, estimate_tokenizer
from tok2img.tokenization.token_dataset import save_tokens


@pytest.fixture
def prior_recipe(data, image_tokenizer, tmp_path) -> PriorRecipe:
    sizes = {"depth": 1, "max_steps": 700, "batch_size": 8, "vocab_size": 270, "text_length": 6}
    return PriorRecipe(data=data, image_tokenizer=image_tokenizer, out=str(tmp_path / "model"), **sizes)


def test_numbers_of_a_prior_are_those_of_the_model_that_would_be_trained(prior_recipe, processor):
    estimate = estimate_prior(prior_recipe)
    size = build_prior(processor.layout, depth=1).num_parameters()
    assert estimate.parameters == estimate.trained_parameters == size
    assert estimate.weight_bytes == 4 * size and estimate.optimizer_bytes == 12 * size
    assert estimate.seconds_per_step > 0 and estimate.num_steps == 700 and estimate.tokenize_seconds > 0
    assert estimate.peak_bytes > estimate.weight_bytes + estimate.optimizer_bytes


def test_a_dry_run_changes_the_recipe_in_nothing_and_reads_tokens_that_are_there(
    prior_recipe, rows, processor, tmp_path
):
    save_tokens(rows, processor, tmp_path / "tokens")
    prior_recipe.tokens, prior_recipe.data = str(tmp_path / "tokens"), ""
    before = vars(prior_recipe).copy()
    estimate = estimate_prior(prior_recipe)
    assert estimate.tokenize_seconds == 0 and "done before" in str(estimate) and vars(prior_recipe) == before


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a terminal: jobs that a shell puts into the background are started deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_dry_run_that_is_interrupted_ends_at_once_and_promises_nothing(prior_recipe, monkeypatch, caplog):
    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StepClock, "on_step_begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        estimate_prior(prior_recipe)
    assert "stopped after" not in caplog.text


def test_a_step_of_several_batches_takes_all_of_them(prior_recipe, monkeypatch):
    rows_of_a_step = []
    original = estimate_prior.__globals__["measure_steps"]
    monkeypatch.setattr(
        "tok2img.recipes.dry_run.measure_steps",
        lambda model, rows, recipe: rows_of_a_step.append(len(rows)) or original(model, rows, recipe),
    )
    prior_recipe.gradient_accumulation_steps = 3
    estimate_prior(prior_recipe)
    assert rows_of_a_step == [24]


def test_a_tokenizer_is_estimated_with_all_that_it_learns_from(data):
    model = {"hidden_channels": 16, "num_decoder_blocks": 1, "codebook_size": 8}
    keys = {"data": data, "batch_size": 8, "max_steps": 100, "model": model}
    plain = estimate_tokenizer(TokenizerRecipe(**keys))
    adversarial = estimate_tokenizer(TokenizerRecipe(disc_start=50, **keys))
    assert adversarial.parameters > plain.parameters > 0 and plain.num_steps == 100


def test_a_bpe_takes_no_steps_to_estimate(data):
    with pytest.raises(ValueError, match="counted in one pass"):
        estimate_tokenizer(TokenizerRecipe(tokenizer="bpe", data=data))


@pytest.mark.parametrize("command", ["train-prior", "train-tokenizer"])
def test_the_command_prints_what_a_run_would_cost_and_writes_nothing(
    command, data, image_tokenizer, tmp_path, monkeypatch, capsys
):
    from tok2img.cli.app import main

    words = ["--image-tokenizer", image_tokenizer, "--depth", "1"] if command == "train-prior" else []
    words = words or ["--model.hidden_channels", "16", "--model.codebook_size", "8"]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    keys = ["--data", data, "--out", "made", "--max-steps", "9", "--batch-size", "8"]
    monkeypatch.setattr(sys, "argv", ["tok2img", command, "--dry-run", *keys, *words])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert not stop.value.code, printed.err
    assert {line.split("  ")[0] for line in printed.out.splitlines()} >= {"parameters", "memory", "a step", "9 steps"}
    assert sorted(tmp_path.rglob("*")) == before
