"""Commands that run a recipe: `tok2img train-tokenizer`, `train-prior` and `train-ranker`."""

from typing import Annotated

import typer

from ..recipes.config import PriorRecipe, RankerRecipe, Recipe, TokenizerRecipe
from ..recipes.parsing import describe_keys, parse_arguments, read_recipe
from .output import print_on_rank0, silence_transformers

commands = typer.Typer()
RECIPE = {"allow_extra_args": True, "ignore_unknown_options": True}
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Estimate time and memory from a few steps, and write nothing.")
]


@commands.command(context_settings=RECIPE, epilog="Keys: " + describe_keys(TokenizerRecipe))
def train_tokenizer(context: typer.Context, dry_run: DryRun = False) -> None:
    """Train a tokenizer: [RECIPE.yaml] [--key value ...]. Settings of the model: --model.codebook_size 256."""
    recipe = parse_recipe(context, TokenizerRecipe)
    if dry_run:
        from ..recipes.dry_run import estimate_tokenizer

        print(estimate_tokenizer(recipe))
        return
    from ..recipes.train_tokenizer import train_tokenizer

    train_tokenizer(recipe)
    print_on_rank0(f"tokenizer: {recipe.out}")


@commands.command(context_settings=RECIPE, epilog="Keys: " + describe_keys(PriorRecipe))
def train_prior(context: typer.Context, dry_run: DryRun = False) -> None:
    """Train a prior and save the whole model: [RECIPE.yaml] [--key value ...]."""
    recipe = parse_recipe(context, PriorRecipe)
    if dry_run:
        from ..recipes.dry_run import estimate_prior

        print(estimate_prior(recipe))
        return
    from ..recipes.train_prior import train_prior

    train_prior(recipe)
    print_on_rank0(f"model: {recipe.out}")


@commands.command(context_settings=RECIPE, epilog="Keys: " + describe_keys(RankerRecipe))
def train_ranker(context: typer.Context) -> None:
    """Train a small CLIP model that ranks images for `tok2img generate --ranker`: [RECIPE.yaml] [--key value ...]."""
    recipe = parse_recipe(context, RankerRecipe)
    from ..recipes.train_ranker import train_ranker

    train_ranker(recipe)
    print_on_rank0(f"ranker: {recipe.out}")


def parse_recipe(context: typer.Context, kind: type[Recipe]) -> Recipe:
    """Read the recipe file of a command, with the keys that its other arguments replace."""
    path, overrides = parse_arguments(context.args)
    recipe = read_recipe(kind, path, overrides)
    silence_transformers()
    return recipe
