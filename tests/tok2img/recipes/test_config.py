import dataclasses
import re

import pytest

from tok2img.recipes.config import PriorRecipe, TokenizerRecipe, require
from tok2img.recipes.parsing import (
    RENAMED_KEYS,
    RENAMED_MODEL_KEYS,
    as_yaml,
    describe_keys,
    parse_arguments,
    read_recipe,
)


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_file_fills_its_keys_and_defaults_the_rest(write):
    recipe = read_recipe(PriorRecipe, write("depth: 2\nlearning_rate: 3e-4\nbf16: true\ntokens: some/folder\n"))
    assert recipe == PriorRecipe(depth=2, learning_rate=3e-4, bf16=True, tokens="some/folder")


def test_no_file_at_all_is_all_defaults():
    assert read_recipe(TokenizerRecipe) == TokenizerRecipe()


def test_the_command_line_wins_over_the_file(write):
    recipe = read_recipe(PriorRecipe, write("depth: 2\ndropout: 0.3\n"), {"depth": 5})
    assert (recipe.depth, recipe.dropout) == (5, 0.3)


def test_a_setting_of_the_model_joins_those_of_the_file(write):
    path = write("model:\n  codebook_size: 64\n  code_dim: 8\n")
    recipe = read_recipe(TokenizerRecipe, path, {"model.codebook_size": 32, "model.ema_update": False})
    assert recipe.model == {"codebook_size": 32, "code_dim": 8, "ema_update": False}


def test_recipes_do_not_share_their_model_settings():
    read_recipe(TokenizerRecipe, None, {"model.codebook_size": 32})
    assert TokenizerRecipe().model == {}


def test_an_unknown_key_is_refused_with_the_file_and_the_nearest_key(write):
    path = write("learning_rte: 1e-3\n")
    with pytest.raises(ValueError, match=f"{path}: no key 'learning_rte'; did you mean 'learning_rate'?"):
        read_recipe(PriorRecipe, path)


def test_an_unknown_key_of_the_command_line_is_refused_as_such():
    with pytest.raises(ValueError, match="the command line: no key 'dept'; did you mean 'depth'"):
        read_recipe(PriorRecipe, None, {"dept": 2})


def test_a_key_like_no_other_is_refused_with_all_that_there_are():
    with pytest.raises(ValueError, match="no key 'zzzzzz'; the keys are out, data, "):
        read_recipe(PriorRecipe, None, {"zzzzzz": 2})


def test_a_key_of_the_other_kind_of_run_is_refused(write):
    with pytest.raises(ValueError, match="no key 'architecture'"):
        read_recipe(TokenizerRecipe, write("architecture: qwen3\n"))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("depth", "2.5", "a whole number"),
        ("depth", "'2'", "a whole number"),
        ("depth", "true", "a whole number"),
        ("depth", "", "a whole number"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", "true", "a number"),
        ("learning_rate", "[1]", "a number"),
        ("learning_rate", ".nan", "a number"),
        ("bf16", "1", "true or false"),
        ("bf16", "'yes'", "true or false"),
        ("out", "[a]", "text"),
        ("out", "true", "text"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_its_file_and_key(write, key, value, wanted):
    path = write(f"{key}: {value}\n")
    with pytest.raises(ValueError, match=f"{path}: key '{key}' must be {wanted}"):
        read_recipe(PriorRecipe, path)


def test_a_wrong_value_of_the_command_line_is_refused_as_such(write):
    with pytest.raises(ValueError, match="the command line: key 'depth' must be a whole number, got 'two'"):
        read_recipe(PriorRecipe, write("depth: 2\n"), {"depth": "two"})


@pytest.mark.parametrize("value", ["3", "[a]", "text"])
@pytest.mark.parametrize("overrides", [{}, {"model.codebook_size": 3}])
def test_model_settings_that_are_no_mapping_are_refused(write, value, overrides):
    with pytest.raises(ValueError, match="key 'model' must be a mapping"):
        read_recipe(TokenizerRecipe, write(f"model: {value}\n"), overrides)


def test_a_dot_in_a_key_that_is_no_mapping_is_refused():
    with pytest.raises(ValueError, match=r"'depth\.x'"):
        read_recipe(PriorRecipe, None, {"depth.x": 3})


def test_numbers_pass_for_text_and_whole_numbers_for_any(write):
    recipe = read_recipe(PriorRecipe, write("out: 2024\nlearning_rate: 1\n"))
    assert (recipe.out, recipe.learning_rate) == ("2024", 1.0) and isinstance(recipe.learning_rate, float)


@pytest.mark.parametrize("content", ["- a\n- b\n", "text", "", "a: [\n", "a: 1\na: 2: 3\n", "\x00"])
def test_a_file_that_is_no_mapping_is_refused_by_name(write, content):
    path = write(content)
    with pytest.raises(ValueError, match=path):
        read_recipe(PriorRecipe, path)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"cannot read the recipe {tmp_path}/no.yaml: No such file"):
        read_recipe(PriorRecipe, tmp_path / "no.yaml")


def test_a_file_cannot_run_code(write):
    path = write("out: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="is not YAML"):
        read_recipe(PriorRecipe, path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (None, {})),
        (["a.yaml"], ("a.yaml", {})),
        (["--depth", "3"], (None, {"depth": 3})),
        (["a.yaml", "--depth=3", "--out", "b"], ("a.yaml", {"depth": 3, "out": "b"})),
        (["--learning-rate", "1e-3", "--bf16", "true"], (None, {"learning_rate": "1e-3", "bf16": True})),
        (["--model.codebook_size", "32"], (None, {"model.codebook_size": 32})),
        (["--model.code-dim=8"], (None, {"model.code_dim": 8})),
        (["--out=a=b"], (None, {"out": "a=b"})),
        (["--out", ""], (None, {"out": ""})),
        (["--out="], (None, {"out": ""})),
        (["--learning-rate", "-1"], (None, {"learning_rate": -1})),
        (["--model", "{ema_update: false}"], (None, {"model": {"ema_update": False}})),
        (["--out", "a: b: c"], (None, {"out": "a: b: c"})),
        (["--out", "2024-01-01"], (None, {"out": "2024-01-01"})),
    ],
)
def test_arguments_are_a_file_and_keys_with_values(arguments, expected):
    assert parse_arguments(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--depth"], "--depth needs a value"), (["a.yaml", "b.yaml"], "b.yaml"), (["--depth", "3", "a.yaml"], "a.yaml")],
)
def test_arguments_that_are_neither_are_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        parse_arguments(arguments)


@pytest.mark.parametrize(
    ("text", "value"), [("null", "null"), ("~", "~"), ("3", 3), ("[1, 2]", [1, 2]), ("a, b", "a, b")]
)
def test_command_line_values_are_read_as_yaml_and_else_as_text(text, value):
    assert as_yaml(text) == value


def test_a_key_that_a_run_cannot_do_without_is_asked_for():
    with pytest.raises(ValueError, match="the recipe needs 'image_tokenizer': .* --image-tokenizer"):
        require(PriorRecipe(out="a"), "out", "image_tokenizer")


@pytest.mark.parametrize("kind", [TokenizerRecipe, PriorRecipe])
def test_help_names_every_key(kind):
    described = describe_keys(kind)
    assert all(f"--{each.name.replace('_', '-')}" in described for each in dataclasses.fields(kind))


@pytest.mark.parametrize(
    ("key", "least"),
    [("max_steps", 1), ("batch_size", 1), ("logging_steps", 1), ("gradient_accumulation_steps", 1)]
    + [("eval_steps", 0), ("learning_rate", 0), ("max_train_samples", 0), ("seed", 0)],
)
def test_counts_below_their_least_are_refused_by_their_key(key, least):
    assert getattr(read_recipe(PriorRecipe, None, {key: least}), key) == least
    with pytest.raises(ValueError, match=f"key '{key}' must be at least {least}, got"):
        read_recipe(PriorRecipe, None, {key: least - 1})


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_recipe_key_with_an_old_name_is_an_error_that_names_the_new_one(old, new, tmp_path):
    kinds = (PriorRecipe, TokenizerRecipe)
    assert any(new in {each.name for each in dataclasses.fields(kind)} for kind in kinds)
    (tmp_path / "old.yaml").write_text(f"{old}: 3\n")
    for kind in kinds:
        with pytest.raises(ValueError, match=f"old.yaml: key '{old}' is now called '{new}'"):
            read_recipe(kind, tmp_path / "old.yaml")


@pytest.mark.parametrize(("old", "new"), RENAMED_MODEL_KEYS.items())
def test_model_setting_with_an_old_name_is_an_error_that_names_the_new_one(old, new, tmp_path):
    (tmp_path / "old.yaml").write_text(f"model:\n  {old}: 3\n")
    with pytest.raises(ValueError, match=re.escape(f"old.yaml: model.{old} is now called {new}")):
        read_recipe(TokenizerRecipe, tmp_path / "old.yaml")
    with pytest.raises(ValueError, match=re.escape(f"the command line: model.{old} is now called {new}")):
        read_recipe(TokenizerRecipe, None, {f"model.{old}": 3})


def test_a_bpe_has_no_settings_of_a_model():
    with pytest.raises(ValueError, match="key 'model' is not for the tokenizer 'bpe'"):
        TokenizerRecipe(tokenizer="bpe", model={"code_dim": 3})


@pytest.mark.parametrize("key", ["disc_start", "perceptual_model"])
def test_losses_of_a_vqvae_are_refused_for_other_tokenizers(key):
    with pytest.raises(ValueError, match=f"key '{key}' is for the tokenizer 'vqvae', got 'vqdraw'"):
        read_recipe(TokenizerRecipe, None, {"tokenizer": "vqdraw", key: 3})


def test_a_discriminator_that_would_never_start_is_refused():
    with pytest.raises(ValueError, match="key 'disc_start' must be below max_steps 10, got 10"):
        read_recipe(TokenizerRecipe, None, {"disc_start": 10, "max_steps": 10})
