from functools import partial

import pytest
import torch

from tok2img.prior.compiled_blocks import get_blocks
from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import build_prior
from tok2img.recipes.config import PriorRecipe
from tok2img.recipes.dry_run import estimate_prior
from tok2img.recipes.train_prior import train_prior

# What torch's compiler says of its own doing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]
compiled_anew = torch.compile


@pytest.fixture
def traced(monkeypatch) -> list[str]:
    """Where layers ran through the compiler: one whose backend runs graphs as they were traced, for another takes half a minute."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr("torch.compile", partial(compiled_anew, backend=backend))
    return graphs


def test_blocks_are_compiled_in_training_only(prior, layout, text_ids, codes, traced):
    model = PriorWithLoss(prior, layout, caption_dropout=0.0, compile=True)
    plain = PriorWithLoss(build_like(prior), layout, caption_dropout=0.0)
    assert model.eval()(text_ids, codes).loss.equal(plain.eval()(text_ids, codes).loss)
    assert not traced
    assert model.train()(text_ids, codes).loss.equal(plain.train()(text_ids, codes).loss)
    assert traced
    num = len(traced)
    model.eval()(text_ids[:1], codes[:1])
    assert len(traced) == num


def build_like(prior):
    """A copy."""
    copied = type(prior)(prior.config)
    copied.load_state_dict(prior.state_dict())
    return copied


def test_get_blocks_returns_every_block(architecture, layout):
    assert len(get_blocks(build_prior(layout, architecture=architecture, depth=2))) == 2


def test_the_compiler_itself_gives_the_same_loss_and_gradients(layout, text_ids, codes):
    torch._dynamo.reset()
    losses, gradients = [], []
    for compile in (False, True):
        prior = build_prior(layout, depth=1)
        loss = PriorWithLoss(prior, layout, caption_dropout=0.0, compile=compile).train()(text_ids, codes).loss
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad for parameter in prior.parameters()])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def recipe(data, image_tokenizer, out, **changed) -> PriorRecipe:
    settings = {"max_steps": 4, "batch_size": 8, "eval_steps": 2, "max_eval_samples": 1, "sample_steps": 2, "depth": 1}
    return PriorRecipe(**settings | {"out": str(out), "data": data, "image_tokenizer": image_tokenizer} | changed)


def test_a_compiled_run_ends_as_a_plain_one(data, image_tokenizer, tmp_path, traced):
    plain = train_prior(recipe(data, image_tokenizer, tmp_path / "plain", dropout=0.0))
    assert not traced
    compiled = train_prior(recipe(data, image_tokenizer, tmp_path / "compiled", dropout=0.0, torch_compile=True))
    assert traced
    assert not any("forward" in vars(layer) for layer in get_blocks(compiled.prior))
    for name, tensor in plain.prior.state_dict().items():
        torch.testing.assert_close(compiled.prior.state_dict()[name], tensor, msg=name)


def test_a_dry_run_compiles_too(data, image_tokenizer, tmp_path, traced):
    assert estimate_prior(recipe(data, image_tokenizer, tmp_path / "none", torch_compile=True)).seconds_per_step > 0
    assert traced
