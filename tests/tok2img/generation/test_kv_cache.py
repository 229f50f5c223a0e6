from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from tok2img.generation.generate import generate, next_hidden_state
from tok2img.generation.kv_cache import PreallocatedLayer, make_cache
from tok2img.generation.sampling import Sampling
from tok2img.prior.model import build_prior


@torch.no_grad()
def states_of(prior, layout, text_ids, codes, cache) -> list[torch.Tensor]:
    """The state after the prompt, after one more code, and after two more at once."""
    prompt = layout.prompt(text_ids)
    ids = layout.image.codes_to_ids(codes)
    return [next_hidden_state(prior, some, cache) for some in (prompt, ids[:, :1], ids[:, 1:3])]


def test_states_equal_those_with_a_growing_cache(prior, layout, text_ids, codes):
    roomy, growing = (
        states_of(prior, layout, text_ids, codes, cache)
        for cache in (make_cache(prior, layout.sequence_length), DynamicCache(config=prior.config))
    )
    for ours, theirs in zip(roomy, growing, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_keys_and_values_stay_at_their_address(prior, layout, text_ids, codes):
    cache = make_cache(prior, layout.sequence_length)
    states_of(prior, layout, text_ids, codes, cache)
    layer: Any = cache.layers[0]
    address = layer.keys.data_ptr(), layer.values.data_ptr()
    next_hidden_state(prior, layout.image.codes_to_ids(codes)[:, 3:], cache)
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == address
    assert cache.get_seq_length() == layer.keys.shape[2] == layout.sequence_length


@pytest.mark.parametrize("architecture", ["qwen3"], indirect=True)
def test_more_positions_than_allocated_raise(prior, layout, text_ids, codes):
    with pytest.raises(RuntimeError):
        states_of(prior, layout, text_ids, codes, make_cache(prior, layout.prompt_length))


def test_make_cache_keeps_sliding_window_layers(layout):
    settings = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
    prior = build_prior(layout, architecture="qwen3", depth=2, use_sliding_window=True, **settings)
    kinds = [type(layer) for layer in make_cache(prior, layout.sequence_length).layers]
    assert kinds == [PreallocatedLayer, DynamicSlidingWindowLayer]


@pytest.fixture
def compilations(monkeypatch) -> list[torch.nn.Module]:
    """What has been compiled; by a backend that runs the graphs as they were traced, for a compiler takes half a minute."""
    compiled = []

    @lru_cache
    def traced(last_hidden_state):
        compiled.append(last_hidden_state)
        return torch.compile(last_hidden_state, backend="eager", fullgraph=True)

    monkeypatch.setattr("tok2img.generation.generate.compile_base_model", traced)
    return compiled


@pytest.mark.parametrize("layout", [(4,)], indirect=True)
@pytest.mark.parametrize("architecture", ["qwen3"], indirect=True)
def test_compiled_generation_gives_the_same_codes(prior, layout, text_ids, compilations):
    for sampling in (Sampling(), Sampling(guidance_scale=3.0)):
        plain = generate(prior, layout, text_ids, sampling=sampling)
        assert generate(prior, layout, text_ids, sampling=sampling, compile=True).equal(plain)
    assert compilations == [prior.base_model]


@pytest.mark.parametrize("architecture", ["qwen3"], indirect=True)
def test_compiled_layers_without_a_cache_are_refused(prior, layout, text_ids):
    with pytest.raises(ValueError, match="compile needs the cache"):
        generate(prior, layout, text_ids, use_cache=False, compile=True)
