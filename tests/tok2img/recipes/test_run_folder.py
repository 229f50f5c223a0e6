import json
from dataclasses import replace

import pytest
import torch

from tok2img.recipes import train_tokenizer as runs
from tok2img.recipes import training_run
from tok2img.recipes.config import PriorRecipe, TokenizerRecipe
from tok2img.recipes.run_folder import can_resume, check_same_recipe, checkpoints_of, close_run, open_run
from tok2img.recipes.train_prior import load_training_source
from tok2img.trainer.checkpointing import latest_valid_checkpoint, list_checkpoints
from tok2img.trainer.trainer import Trainer


@pytest.fixture
def recipe(tmp_path):
    recipe = PriorRecipe(out=str(tmp_path / "run"), learning_rate=1e-3, max_steps=10)
    open_run(recipe)
    (checkpoints_of(recipe) / "checkpoint-4").mkdir()
    return recipe


def test_run_resumes_from_checkpoints_of_its_own_recipe_only(tmp_path, recipe):
    check_same_recipe(recipe)
    other = PriorRecipe(out=str(tmp_path / "other"))
    check_same_recipe(other)
    assert can_resume(recipe) and not can_resume(other)


def test_keys_without_effect_on_the_result_may_change(recipe):
    changed = replace(recipe, logging_steps=7, dataloader_num_workers=2, sample_steps=0)
    check_same_recipe(changed)
    assert can_resume(changed)


def test_checkpoints_of_another_recipe_are_an_error_with_key_and_way_out(recipe):
    with pytest.raises(
        ValueError, match=r"learning_rate 0.001, this one has 0.002: give --resume-from-checkpoint false"
    ):
        check_same_recipe(replace(recipe, learning_rate=2e-3))
    assert list(list_checkpoints(checkpoints_of(recipe))) == [4]


@pytest.mark.parametrize("source", [{"tokens": "tokens"}, {"data": "shapes"}], ids=["tokens", "data"])
def test_prior_refuses_checkpoints_of_another_recipe_for_any_source(recipe, source):
    with pytest.raises(ValueError, match="holds a run with caption_dropout"):
        load_training_source(replace(recipe, caption_dropout=0.9, **source))


def test_run_older_than_a_key_resumes_if_the_key_has_its_default(recipe):
    file = checkpoints_of(recipe) / "recipe.json"
    keys = json.loads(file.read_text())
    del keys["search_steps"], keys["lora_rank"]
    file.write_text(json.dumps(keys))
    check_same_recipe(recipe)
    assert can_resume(recipe)
    with pytest.raises(ValueError, match="holds a run with search_steps 0, this one has 3"):
        check_same_recipe(replace(recipe, search_steps=3))


def test_another_number_of_steps_is_a_warning(recipe, caplog):
    changed = replace(recipe, max_steps=20)
    check_same_recipe(changed)
    assert can_resume(changed) and "max_steps changed from 10 to 20" in caplog.text


def test_checkpoints_of_an_unknown_run_are_refused(recipe):
    (checkpoints_of(recipe) / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="unknown run"):
        check_same_recipe(recipe)


def test_run_can_start_from_scratch(recipe):
    fresh = replace(recipe, resume_from_checkpoint=False, learning_rate=5.0)
    check_same_recipe(fresh)
    assert not can_resume(fresh) and list_checkpoints(checkpoints_of(recipe))
    open_run(fresh)
    assert not list_checkpoints(checkpoints_of(recipe))


def test_a_finished_run_leaves_no_checkpoints(recipe):
    close_run(recipe)
    assert not checkpoints_of(recipe).exists()


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_same_recipe_finishes_what_was_killed_while_it_was_saved(tmp_path, rows, monkeypatch):
    rows.to_parquet(tmp_path / "data.parquet")
    settings = {
        "data": str(tmp_path / "data.parquet"),
        "max_steps": 4,
        "eval_steps": 2,
        "batch_size": 2,
        "logging_steps": 1,
    }
    model = {"image_size": 8, "hidden_channels": 8, "code_dim": 4, "codebook_size": 8}
    recipe = TokenizerRecipe(out=str(tmp_path / "out"), model=model, **settings)
    whole = runs.train_tokenizer(replace(recipe, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patched:
        patched.setattr(training_run, "save_log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runs.train_tokenizer(recipe)
    assert latest_valid_checkpoint(checkpoints_of(recipe)) == checkpoints_of(recipe) / "checkpoint-4"
    assert not (tmp_path / "out" / "config.json").exists()
    steps = []
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: steps.append(args))
    resumed = runs.train_tokenizer(recipe)
    assert not steps and (tmp_path / "out" / "config.json").exists() and not checkpoints_of(recipe).exists()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
