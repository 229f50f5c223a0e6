from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tok2img.prior.model import build_prior
from tok2img.recipes import train_tokenizer as runs
from tok2img.recipes.build_tokenizer import build_model
from tok2img.recipes.config import PriorRecipe, TokenizerRecipe
from tok2img.recipes.dry_run import estimate_tokenizer
from tok2img.recipes.run_folder import checkpoints_of
from tok2img.recipes.training_run import load_data
from tok2img.trainer.checkpointing import latest_valid_checkpoint
from tok2img.trainer.muon import Muon, muon_parameters, newton_schulz
from tok2img.trainer.trainer import Trainer
from tokenizers_vq import VQDrawForImages, VQDrawImageConfig


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)], ids=["square", "wide", "tall"])
def test_an_orthogonal_matrix_keeps_the_directions_and_evens_out_their_lengths(shape):
    u, _, v = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    lengths = u.mT @ newton_schulz(u * torch.linspace(1.0, 0.05, u.shape[2]) @ v) @ v.mT
    on_the_diagonal = lengths.diagonal(dim1=1, dim2=2)
    assert on_the_diagonal.min() > 0.5 and on_the_diagonal.max() < 1.3
    assert (lengths - torch.diag_embed(on_the_diagonal)).abs().max() < 0.1


def test_no_gradient_is_no_step():
    assert newton_schulz(torch.zeros(1, 16, 20)).eq(0).all()


def small_model() -> nn.Module:
    """Two matrices of one shape, a bias each, and a convolution of pixels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def after_a_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters after a step on the same data."""
    torch.manual_seed(1)
    model(torch.randn(64, 3, 1, 1)).square().mean().backward()
    optimizer.step()
    return dict(model.named_parameters())


def test_what_is_no_matrix_is_trained_as_by_adamw():
    muons, adams = small_model(), small_model()
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    ours = after_a_step(Muon(muons.parameters(), muon_params=muon_parameters(muons), **settings), muons)
    theirs = after_a_step(torch.optim.AdamW(adams.parameters(), **settings), adams)
    for name in ("0.weight", "0.bias", "2.bias", "4.bias"):
        assert ours[name].equal(theirs[name]), name
    assert not ours["2.weight"].equal(theirs["2.weight"])


def test_adamw_may_have_a_share_of_the_rate():
    muons, adams, wholes = small_model(), small_model(), small_model()
    optimizer = Muon(muons.parameters(), muon_params=muon_parameters(muons), lr=1e-2, adamw_lr_scale=0.1)
    ours = after_a_step(optimizer, muons)
    theirs = after_a_step(torch.optim.AdamW(adams.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0), adams)
    whole = after_a_step(Muon(wholes.parameters(), muon_params=muon_parameters(wholes), lr=1e-2), wholes)
    for name in ours:
        same = whole if name in ("2.weight", "4.weight") else theirs
        torch.testing.assert_close(ours[name], same[name], msg=name)


def test_matrices_are_trained_as_by_the_muon_of_torch_under_the_rate_of_adamw():
    start = torch.randn(3, 20, 30)
    ours, theirs = ([nn.Parameter(each.clone()) for each in start] for _ in range(2))
    optimizers = (
        Muon(ours, muon_params=ours, lr=1e-2, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for gradients in torch.randn(3, *start.shape):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    after, reference = torch.stack(ours), torch.stack(theirs)
    assert (after - reference).norm() < 0.05 * (reference - start).norm()


def test_hidden_layers_are_matrices_and_neither_tables_nor_heads_nor_what_looks_at_pixels_are(layout, architecture):
    prior = build_prior(layout, architecture=architecture, depth=1)
    chosen = {id(matrix) for matrix in muon_parameters(prior)}
    names = {name for name, parameter in prior.named_parameters() if id(parameter) in chosen}
    assert names and not any("emb" in name or "lm_head" in name or "wte" in name for name in names)
    layers = {name for name, parameter in prior.named_parameters() if parameter.ndim == 2 and ".0." in name}
    assert names == layers


def test_of_a_tokenizer_heads_of_stages_are_no_matrices():
    settings = {"image_size": 8, "num_channels": 1, "num_stages": 2, "hidden_channels": 16, "feature_channels": 16}
    refiner = VQDrawForImages(VQDrawImageConfig(**settings, num_residual_blocks=1)).vqdraw.refiner
    chosen = {id(matrix) for matrix in muon_parameters(refiner)}
    names = {name for name, parameter in refiner.named_parameters() if id(parameter) in chosen}
    assert names == {
        *("to_quarter.weight", "back.weight"),
        *("blocks.0.expand.weight", "blocks.0.project.weight", "refine.expand.weight", "refine.project.weight"),
    }


@pytest.fixture
def recipe(rows, tmp_path) -> TokenizerRecipe:
    rows.to_parquet(tmp_path / "data.parquet")
    model = {"image_size": 8, "hidden_channels": 16, "code_dim": 4, "codebook_size": 8}
    settings = {"max_steps": 4, "eval_steps": 2, "batch_size": 2, "logging_steps": 1, "model": model}
    settings |= {"optimizer": "muon", "adamw_lr_scale": 0.5}
    return TokenizerRecipe(data=str(tmp_path / "data.parquet"), out=str(tmp_path / "out"), **settings)


def test_a_recipe_trains_with_muon_and_goes_on_to_the_same_bits_after_a_kill(recipe, tmp_path, monkeypatch):
    whole = runs.train_tokenizer(replace(recipe, out=str(tmp_path / "whole")))
    evaluate = Trainer.evaluate

    def killed_at_the_end(self, *arguments, **settings):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return evaluate(self, *arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "evaluate", killed_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            runs.train_tokenizer(recipe)
    checkpoint = latest_valid_checkpoint(checkpoints_of(recipe))
    assert checkpoint is not None and checkpoint.name == "checkpoint-2"
    kinds = {name.rpartition("/")[2] for name in load_file(checkpoint / "optimizer.safetensors")}
    assert kinds == {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}
    again = runs.train_tokenizer(recipe)
    assert all(
        now.equal(then) for now, then in zip(again.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_a_dry_run_counts_one_moment_of_a_matrix(recipe):
    adamw = estimate_tokenizer(replace(recipe, optimizer="adamw", adamw_lr_scale=1))
    muons = estimate_tokenizer(recipe)
    model = build_model(recipe, load_data(recipe, with_captions=False, with_images=True))
    assert adamw.optimizer_bytes - muons.optimizer_bytes == sum(each.nbytes for each in muon_parameters(model)) > 0


def test_an_unknown_optimizer_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="key 'optimizer' must be one of adamw, muon, got 'sgd'"):
        TokenizerRecipe(optimizer="sgd")


def test_a_share_of_the_rate_is_for_muon():
    with pytest.raises(ValueError, match="key 'adamw_lr_scale' is for the optimizer 'muon', got 'adamw'"):
        TokenizerRecipe(adamw_lr_scale=0.1)


def test_muon_refuses_weights_that_are_shared_out():
    with pytest.raises(ValueError, match="must be 'adamw' with 'fsdp'"):
        PriorRecipe(optimizer="muon", fsdp=True)
