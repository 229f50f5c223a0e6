import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from tok2img.pipelines.text_to_image import TextToImagePipeline
from tok2img.prior.from_language_model import base_vocab_size, extend_prior
from tok2img.prior.lora import add_lora, merge_lora
from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import load_prior
from tok2img.prior.position_embeddings import build_position_embeddings, with_position_specific_ids
from tok2img.recipes.build_processor import build_processor
from tok2img.recipes.config import PriorRecipe
from tok2img.recipes.train_prior import train_prior
from tok2img.tokenization.layout import SequenceLayout
from tok2img.tokenization.text_tokenizer import SubwordTokenizer
from tok2img.tokenization.token_dataset import load_tokens

TEXTS = ["a red square", "a blue disc", "two green cats", "a red disc", "a dog"] * 4
ROWS = 300  # more than the tokenizer has tokens, as published models have
CONTEXT = 24
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"max_position_embeddings": CONTEXT}
KINDS = {
    "qwen3 tied": ("qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "llama untied": ("llama", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0}),
    "gpt2 tied": ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": CONTEXT}),
    "phi with biases": ("phi", SMALL),
}
every_kind = pytest.mark.parametrize("base", list(KINDS), indirect=True)
tied_and_untied = pytest.mark.parametrize("base", list(KINDS)[:3], indirect=True)
one_kind = pytest.mark.parametrize("base", ["llama untied"], indirect=True)


def text_loss(model, input_ids: torch.Tensor) -> torch.Tensor:
    """Of text alone, over the ids that the language model had."""
    logits = model(input_ids).logits[:, :-1, :ROWS]
    return F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


def texts_as_ids(tokenizer: SubwordTokenizer, length: int = 6) -> torch.Tensor:
    return torch.tensor([(ids * length)[:length] for ids in tokenizer.encode(TEXTS)])


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Language models that have learned a few texts, each in a folder with its tokenizer."""
    tokenizer = SubwordTokenizer.train_bpe(TEXTS, vocab_size=270)
    input_ids, folders = texts_as_ids(tokenizer), {}
    marks = {"bos_token_id": 1, "eos_token_id": 1}
    for name, (kind, settings) in KINDS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=ROWS, **marks, **settings))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(8):
            optimizer.zero_grad()
            text_loss(model, input_ids).backward()
            optimizer.step()
        folders[name] = tmp_path_factory.mktemp("base")
        model.save_pretrained(str(folders[name]))
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture
def base(request, bases) -> Path:
    return bases[request.param]


@pytest.fixture
def layout() -> SequenceLayout:
    return SequenceLayout(text_vocab_size=ROWS, text_length=6, num_codes=4, codebook_size=16)


@pytest.fixture
def batch(base) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts and codes that follow from them."""
    text_ids = texts_as_ids(SubwordTokenizer.from_pretrained(base))
    return text_ids, text_ids[:, 2:] % 16


def steps(model: PriorWithLoss, batch: tuple[torch.Tensor, torch.Tensor], num: int = 12) -> list[float]:
    """Train, and give back the image losses."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(num):
        optimizer.zero_grad()
        output = model(*batch)
        output.loss.backward()
        optimizer.step()
        losses.append(output.metrics["image_loss"].item())
    return losses


@every_kind
def test_position_embeddings_of_an_extended_prior_fold_into_a_plain_model(base, layout, batch):
    prior = extend_prior(base, layout)
    model = PriorWithLoss(prior, layout, position_embeddings=build_position_embeddings(prior, layout)).train()
    steps(model, batch)
    expected = model.eval()(*batch).metrics
    plain = with_position_specific_ids(prior, layout, model.position_embeddings)
    found = PriorWithLoss(plain, layout.with_position_specific_ids()).eval()(*batch).metrics
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert plain.get_input_embeddings().weight[:ROWS].equal(prior.get_input_embeddings().weight[:ROWS])


def tables(prior) -> list[torch.Tensor]:
    return [prior.get_input_embeddings().weight, prior.get_output_embeddings().weight]


@every_kind
def test_extend_prior_keeps_the_logits_of_text(base, layout):
    before, after = AutoModelForCausalLM.from_pretrained(str(base)).eval(), extend_prior(base, layout)
    input_ids = texts_as_ids(SubwordTokenizer.from_pretrained(base))
    torch.testing.assert_close(after(input_ids).logits[..., :ROWS], before(input_ids).logits, atol=1e-6, rtol=0)
    assert text_loss(after, input_ids).item() == pytest.approx(text_loss(before, input_ids).item(), abs=1e-6)


@every_kind
def test_extend_prior_keeps_the_rows_of_text(base, layout):
    before, after = AutoModelForCausalLM.from_pretrained(str(base)), extend_prior(base, layout)
    for old, new in zip(tables(before), tables(after), strict=True):
        assert new.shape[0] == layout.vocab_size and new[:ROWS].equal(old)


@every_kind
def test_extend_prior_samples_new_rows_like_those_of_text(base, layout):
    for table in tables(extend_prior(base, layout)):
        new = table[ROWS:].detach()
        assert len(new.unique(dim=0)) == len(new)
        torch.testing.assert_close(new.mean(dim=0), table[:ROWS].mean(dim=0).detach(), atol=0.05, rtol=0.5)
        assert 0.7 < new.std() / table[:ROWS].std() < 1.4


@every_kind
def test_a_tied_head_stays_tied_and_another_stays_its_own(base, layout, tmp_path):
    tied = AutoConfig.from_pretrained(str(base)).tie_word_embeddings
    prior = extend_prior(base, layout)
    prior.save_pretrained(str(tmp_path))
    for each in (prior, load_prior(tmp_path, layout)):
        embeddings, head = tables(each)
        assert (head is embeddings) == tied and each.config.tie_word_embeddings == tied


@one_kind
def test_the_seed_alone_decides_the_new_rows(base, layout):
    torch.manual_seed(1)
    one = extend_prior(base, layout, seed=5)
    state = torch.get_rng_state()
    two, three = extend_prior(base, layout, seed=5), extend_prior(base, layout, seed=6)
    assert torch.get_rng_state().equal(state)
    assert tables(one)[1].equal(tables(two)[1]) and not tables(one)[1].equal(tables(three)[1])


@one_kind
def test_extend_prior_loads_half_precision_as_float32(base, layout, tmp_path):
    AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.bfloat16).save_pretrained(str(tmp_path))
    assert extend_prior(tmp_path, layout).dtype == torch.float32


@tied_and_untied
def test_a_few_steps_lower_the_image_loss(base, layout, batch):
    losses = steps(PriorWithLoss(extend_prior(base, layout), layout), batch)
    assert losses[-1] < losses[0] - 0.5


class TestLora:
    @tied_and_untied
    def test_add_lora_keeps_the_logits(self, base, layout, batch):
        prior = extend_prior(base, layout)
        before = prior(layout.sequence(*batch)).logits
        add_lora(prior, layout, rank=2)
        torch.testing.assert_close(prior(layout.sequence(*batch)).logits, before)

    @tied_and_untied
    def test_training_with_lora_keeps_the_weights_of_the_base(self, base, layout, batch):
        prior = extend_prior(base, layout)
        before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
        add_lora(prior, layout, rank=2)
        losses = steps(PriorWithLoss(prior, layout), batch)
        after = {name.replace(".token_adapter", ""): tensor for name, tensor in prior.state_dict().items()}
        after = {name.replace(".base_layer", ""): tensor for name, tensor in after.items()}
        assert losses[-1] < losses[0] - 0.3
        assert not [name for name, tensor in before.items() if not after[name].equal(tensor)]

    @tied_and_untied
    def test_merge_lora_keeps_the_logits_and_gives_a_plain_model(self, base, layout, batch):
        prior = extend_prior(base, layout)
        kind, names, old = type(prior), list(prior.state_dict()), [table[:ROWS].clone() for table in tables(prior)]
        new = [table[ROWS:].clone() for table in tables(prior)]
        adapted = add_lora(prior, layout, rank=2)
        steps(PriorWithLoss(prior, layout), batch)
        unmerged = prior.eval()(layout.sequence(*batch)).logits
        merge_lora(adapted)
        torch.testing.assert_close(prior(layout.sequence(*batch)).logits, unmerged, atol=1e-5, rtol=1e-4)
        assert type(prior) is kind and list(prior.state_dict()) == names
        for table, before, start in zip(tables(prior), old, new, strict=True):
            assert table[:ROWS].equal(before) and not table[ROWS:].isclose(start).all(dim=1).any()
        assert all(parameter.requires_grad for parameter in prior.parameters())

    @one_kind
    def test_without_peft_the_error_says_what_to_install(self, base, layout, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ValueError, match=r"pip install 'tok2img\[lora\]'"):
            add_lora(extend_prior(base, layout), layout, rank=2)

    def test_lora_without_a_base_model_raises(self):
        with pytest.raises(ValueError, match="'lora_rank' is for a pretrained 'base_model'"):
            PriorRecipe(lora_rank=4)


class TestWhatDoesNotFit:
    @one_kind
    def test_a_sequence_longer_than_the_context_is_refused_before_the_weights_are_read(self, base, layout, tmp_path):
        (tmp_path / "config.json").write_text((base / "config.json").read_text())
        longer = SequenceLayout(text_vocab_size=ROWS, text_length=20, num_codes=4, codebook_size=16)
        with pytest.raises(
            ValueError, match="needs 26 positions, but the model has 24: give a text_length of 18 at most"
        ):
            extend_prior(tmp_path, longer)
        with pytest.raises(ValueError, match="take an image tokenizer of fewer codes"):
            extend_prior(tmp_path, SequenceLayout(ROWS, 1, 64, 16))

    @one_kind
    def test_a_layout_with_other_text_ids_is_refused(self, base):
        with pytest.raises(ValueError, match="has 300 ids, but the layout keeps 270 for text"):
            extend_prior(base, SequenceLayout(270, 6, 4, 16))

    @one_kind
    def test_a_tokenizer_with_more_ids_than_the_base_is_refused(self, base, tiny_vqvae, tmp_path):
        other = SubwordTokenizer.train_bpe([chr(97 + i) * 2 + chr(97 + j) for i in range(26) for j in range(26)])
        other.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"has {other.vocab_size} ids, but the language model in .* has 300"):
            build_processor(TEXTS, tiny_vqvae, base_model=str(base), text_tokenizer=str(tmp_path))

    @one_kind
    def test_a_base_without_its_tokenizer_is_refused(self, bases, base, tiny_vqvae, tmp_path):
        for kind, folder in bases.items():
            (tmp_path / "config.json").write_text((folder / "config.json").read_text())
            with pytest.raises(ValueError, match="text tokenizer"):
                build_processor(TEXTS, tiny_vqvae, base_model=str(tmp_path))
            assert base_vocab_size(tmp_path) == ROWS, kind

    def test_extend_prior_of_an_image_tokenizer_raises(self, layout, tiny_vqvae, tmp_path):
        tiny_vqvae.save_pretrained(str(tmp_path))
        with pytest.raises(ValueError, match="no causal language model"):
            extend_prior(tmp_path, layout)

    def test_extend_prior_of_a_missing_folder_raises(self, layout, tmp_path):
        with pytest.raises(ValueError, match="no such folder"):
            extend_prior(tmp_path / "no", layout)

    @one_kind
    def test_a_base_with_a_missing_tensor_is_refused(self, base, layout, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(str(base))
        state = model.state_dict()
        state.pop("model.norm.weight")
        model.save_pretrained(str(tmp_path), state_dict=state)
        with pytest.raises(ValueError, match="does not hold a whole language model"):
            extend_prior(tmp_path, layout)


SHORT = {"max_steps": 3, "batch_size": 8, "sample_steps": 2, "logging_steps": 1, "eval_steps": 2}


@tied_and_untied
@pytest.mark.parametrize("lora_rank", [0, 2], ids=["all", "lora"])
def test_a_run_leaves_a_plain_folder_whose_text_ids_are_those_of_the_base(
    base, lora_rank, data, image_tokenizer, tmp_path
):
    out = tmp_path / "model"
    recipe = PriorRecipe(
        data=data, image_tokenizer=image_tokenizer, out=str(out), base_model=str(base), lora_rank=lora_rank, **SHORT
    )
    pipeline = train_prior(recipe)
    layout = pipeline.processor.layout
    assert layout.text_vocab_size == ROWS and pipeline.processor.text_tokenizer.vocab_size == 270
    again = TextToImagePipeline.from_pretrained(out)
    assert again("a red disc", seed=0).codes.equal(pipeline("a red disc", seed=0).codes)
    plain = AutoModelForCausalLM.from_pretrained(str(out))
    assert type(plain) is type(AutoModelForCausalLM.from_pretrained(str(base)))
    if lora_rank:
        for old, new in zip(tables(AutoModelForCausalLM.from_pretrained(str(base))), tables(plain), strict=True):
            assert new[:ROWS].equal(old)


@one_kind
def test_a_run_can_start_from_the_codebook(base, data, image_tokenizer, tmp_path):
    keys = {"data": data, "image_tokenizer": image_tokenizer, "base_model": str(base), **SHORT}
    starts = [
        train_prior(PriorRecipe(out=str(tmp_path / name), init_from_codebook=start, learning_rate=0.0, **keys))
        for name, start in (("noise", False), ("codebook", True))
    ]
    image = starts[0].processor.layout.image
    noise, codebook = (each.prior.get_input_embeddings().weight.detach() for each in starts)
    rows = slice(image.offset, image.offset + image.num_ids)
    assert not noise[rows].equal(codebook[rows])
    assert noise[: image.offset].equal(codebook[: image.offset])


@one_kind
def test_what_does_not_fit_is_found_before_any_image_is_tokenized(base, data, image_tokenizer, tmp_path):
    recipe = PriorRecipe(data=data, image_tokenizer=image_tokenizer, base_model=str(base), text_length=30, **SHORT)
    recipe.out = str(tmp_path / "model")
    with pytest.raises(ValueError, match="give a text_length of 18 at most"):
        train_prior(recipe)
    assert not Path(recipe.out).exists()


@one_kind
def test_the_command_line_trains_on_a_base_from_shapes_and_from_tokens(
    base, data, image_tokenizer, tmp_path, monkeypatch, capsys
):
    from tok2img.cli.app import main

    tokens, keys = str(tmp_path / "tokens"), ["--base-model", str(base), "--max-steps", "2", "--batch-size", "8"]
    shapes = [
        "--data",
        "shapes",
        "--max-train-samples",
        "24",
        "--text-length",
        "9",
        "--image-tokenizer",
        image_tokenizer,
    ]
    for words in (
        ["train-prior", *shapes, *keys, "--out", str(tmp_path / "one")],
        ["tokenize", data, "--tokenizer", image_tokenizer, "--base-model", str(base), "--out", tokens],
        ["train-prior", "--tokens", tokens, *keys, "--lora-rank", "2", "--out", str(tmp_path / "two")],
        ["generate", "a dog", "--model", str(tmp_path / "two"), "--out", str(tmp_path / "dog.png")],
    ):
        monkeypatch.setattr(sys, "argv", ["tok2img", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, capsys.readouterr().err
    assert (tmp_path / "dog.png").is_file()
    assert TextToImagePipeline.from_pretrained(tmp_path / "one").processor.layout.text_length == 9
    assert load_tokens(tokens)[1].layout.text_vocab_size == ROWS
    assert json.loads((tmp_path / "two" / "layout.json").read_text())["text_vocab_size"] == ROWS
