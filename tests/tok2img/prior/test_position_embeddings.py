import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tok2img.generation.captioning import caption
from tok2img.generation.generate import generate
from tok2img.generation.sampling import Sampling
from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import build_prior
from tok2img.prior.position_embeddings import (
    AxialPositionEmbeddings,
    build_position_embeddings,
    with_position_specific_ids,
)
from tok2img.recipes.config import PriorRecipe
from tok2img.recipes.train_prior import train_prior
from tok2img.tokenization.layout import SequenceLayout
from tok2img.tokenization.processor import Tok2ImgProcessor


@pytest.fixture(params=[(4,), (2, 2), (1, 3)], ids=["shared", "levels", "grids"])
def layout(request) -> SequenceLayout:
    return SequenceLayout(
        text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6, positions_per_codebook=request.param
    )


@pytest.fixture
def position_embeddings(layout) -> AxialPositionEmbeddings:
    """Far from zero, as if learned."""
    learned = AxialPositionEmbeddings(layout, width=64)
    for parameter in learned.parameters():
        parameter.data.normal_()
    return learned


def model_with(prior, layout, position_embeddings, **settings) -> PriorWithLoss:
    return PriorWithLoss(prior, layout, position_embeddings=position_embeddings, **settings).eval()


def test_position_embeddings_are_those_of_the_next_code():
    position_embeddings = AxialPositionEmbeddings(SequenceLayout(11, 3, num_codes=4, codebook_size=6), width=2)
    position_embeddings.rows[0].data, position_embeddings.columns[0].data = (
        torch.tensor([[1.0, 0], [2, 0]]),
        torch.tensor([[0, 10.0], [0, 20]]),
    )
    assert position_embeddings().tolist() == [[1, 20], [2, 10], [2, 20], [0, 0]]


def test_each_group_has_a_grid_of_its_own():
    layout = SequenceLayout(11, 3, num_codes=7, codebook_size=6, positions_per_codebook=(4, 3))
    position_embeddings = AxialPositionEmbeddings(layout, width=2)
    assert [len(rows) for rows in position_embeddings.rows] == [2, 1]
    assert [len(columns) for columns in position_embeddings.columns] == [2, 3]
    assert position_embeddings().shape == (7, 2)


def test_new_position_embeddings_keep_the_loss(prior, layout, text_ids, codes):
    new = AxialPositionEmbeddings(layout, width=64)
    without = model_with(prior, layout, None)(text_ids, codes).loss
    assert model_with(prior, layout, new)(text_ids, codes).loss.equal(without)


@pytest.mark.parametrize("num_captioning", [0, 4], ids=["drawing", "captioning"])
def test_position_embeddings_get_gradients_in_both_directions(
    prior, layout, position_embeddings, text_ids, codes, num_captioning
):
    model = model_with(prior, layout, position_embeddings, image_to_text_fraction=0.5).train()
    (batch,) = model.prepare_step([{"text_ids": text_ids, "image_codes": codes}])
    model(**batch | {"num_captioning": num_captioning}).loss.backward()
    for table in (position_embeddings.rows[-1], position_embeddings.columns[-1]):
        assert table.grad is not None and table.grad[-1].abs().sum() > 0


def test_with_position_specific_ids_keeps_the_loss(prior, layout, position_embeddings, text_ids, codes):
    plain = with_position_specific_ids(prior, layout, position_embeddings)
    expected = model_with(prior, layout, position_embeddings, image_to_text_fraction=0.5)(text_ids, codes)
    found = PriorWithLoss(plain, layout.with_position_specific_ids(), image_to_text_fraction=0.5).eval()(
        text_ids, codes
    )
    for name, value in expected.metrics.items():
        torch.testing.assert_close(found.metrics[name], value)
    torch.testing.assert_close(found.loss, expected.loss)


def test_with_position_specific_ids_keeps_the_prior_and_the_random_state(prior, layout, position_embeddings):
    before = {name: parameter.clone() for name, parameter in prior.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with_position_specific_ids(prior, layout, position_embeddings)
    assert torch.rand(2).equal(expected)
    for name, parameter in prior.named_parameters():
        assert parameter.equal(before[name]), name


def test_with_position_specific_ids_is_deterministic(prior, layout, position_embeddings):
    one, other = (with_position_specific_ids(prior, layout, position_embeddings).state_dict() for _ in range(2))
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_with_position_specific_ids_keeps_the_biases_of_a_head(layout, position_embeddings, text_ids, codes):
    sizes = {"n_positions": 16, "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}
    prior = build_prior(layout, architecture="gptj", depth=1, **sizes).eval()
    prior.get_output_embeddings().bias.data.normal_()
    plain = with_position_specific_ids(prior, layout, position_embeddings)
    expected = model_with(prior, layout, position_embeddings)(text_ids, codes).loss
    torch.testing.assert_close(
        PriorWithLoss(plain, layout.with_position_specific_ids()).eval()(text_ids, codes).loss, expected
    )


def test_position_embeddings_for_position_specific_ids_raise():
    with pytest.raises(ValueError, match="leave axial_position_embeddings false"):
        AxialPositionEmbeddings(SequenceLayout(11, 3, num_codes=4, codebook_size=6, codes_shared=False), width=64)


def test_build_position_embeddings_for_scaled_embeddings_raises(layout):
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    prior = build_prior(layout, architecture="gemma3_text", depth=1, **sizes)
    with pytest.raises(ValueError, match="gemma3_text models change embeddings after their table"):
        build_position_embeddings(prior, layout)


def test_a_processor_takes_the_layout_of_its_tokenizers_or_the_finer_one(processor):
    own = processor.layout.with_position_specific_ids()
    parts = processor.image_tokenizer, processor.text_tokenizer
    assert Tok2ImgProcessor(*parts, own).layout == own
    with pytest.raises(ValueError, match="these tokenizers need"):
        Tok2ImgProcessor(*parts, SequenceLayout(**own.settings() | {"num_codes": own.num_codes + 1}))


def recipe(data, image_tokenizer, out, **changed) -> PriorRecipe:
    settings = {"max_steps": 6, "batch_size": 8, "eval_steps": 3, "max_eval_samples": 1, "sample_steps": 3, "depth": 1}
    settings |= {"out": str(out), "data": data, "image_tokenizer": image_tokenizer, "axial_position_embeddings": True}
    return PriorRecipe(**settings | changed)


def test_train_prior_with_position_embeddings_saves_a_plain_prior(data, image_tokenizer, tmp_path):
    trained = train_prior(recipe(data, image_tokenizer, tmp_path / "model", learning_rate=0.03))
    settings = json.loads((tmp_path / "model" / "layout.json").read_text())
    assert settings["codes_shared"] is False
    prior = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert prior.config.vocab_size == trained.processor.layout.vocab_size
    layout, first = trained.processor.layout, trained.processor.layout.image.offset
    rows = (
        prior.get_input_embeddings().weight[first : first + layout.image.num_ids].unflatten(0, (layout.num_codes, -1))
    )
    assert (rows[0] - rows[1]).abs().max() > 1e-3  # position_embeddings have learned ...
    torch.testing.assert_close(
        rows[0] - rows[1], (rows[0] - rows[1])[:1].expand_as(rows[0])
    )  # ... the same for all codes
    loaded = TextToImagePipeline.from_pretrained(tmp_path / "model")
    text_ids = loaded.processor.encode_text(["a red disc", "a dog"])
    greedy = Sampling(temperature=0)
    expected = generate(trained.prior, layout, text_ids, sampling=greedy)
    assert generate(loaded.prior, loaded.processor.layout, text_ids, sampling=greedy).equal(expected)
    assert (tmp_path / "model" / "samples" / "step-000003.png").is_file()


def test_a_resumed_run_ends_with_the_same_weights(data, image_tokenizer, tmp_path, monkeypatch):
    whole = train_prior(recipe(data, image_tokenizer, tmp_path / "whole"))
    stop_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_prior(recipe(data, image_tokenizer, tmp_path / "stopped"))
    monkeypatch.undo()
    resumed = train_prior(recipe(data, image_tokenizer, tmp_path / "stopped"))
    for name, tensor in whole.prior.state_dict().items():
        assert resumed.prior.state_dict()[name].equal(tensor), name


def stop_after(step: int, monkeypatch) -> None:
    """Have training stop without a word once it has passed a step and its checkpoint."""
    from tok2img.trainer.trainer import Trainer

    original = Trainer.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stopping)


def test_a_prior_with_position_embeddings_captions(data, image_tokenizer, tmp_path):
    trained = train_prior(recipe(data, image_tokenizer, tmp_path / "model", image_to_text_fraction=0.5))
    codes = torch.randint(trained.processor.layout.codebook_size, (2, trained.processor.layout.num_codes))
    assert caption(trained.prior, trained.processor.layout, codes).shape == (2, trained.processor.layout.text_length)


@pytest.mark.parametrize("other", [{"fsdp": True}, {"base_model": "lm", "lora_rank": 4}])
def test_position_embeddings_with_fsdp_or_lora_raise(other):
    with pytest.raises(ValueError, match="axial_position_embeddings"):
        PriorRecipe(axial_position_embeddings=True, **other)
