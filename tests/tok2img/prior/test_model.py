import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from tok2img.prior import loss as prior_loss
from tok2img.prior.loss import PriorWithLoss
from tok2img.prior.model import build_prior, check_fits, code_logits, last_hidden_state, load_prior, segment_logits
from tok2img.tokenization.layout import SequenceLayout

LOAD_WITHOUT_US = """
import sys
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    prior = AutoModelForCausalLM.from_pretrained(folder)
    expected = torch.load(folder + "/expected.pt", weights_only=True)
    torch.testing.assert_close(prior(expected["input_ids"]).logits, expected["logits"])
assert not [name for name in sys.modules if name.startswith(("tok2img", "tokenizers_vq"))]
print("equal")
"""


def allowed_ids(layout: SequenceLayout) -> torch.Tensor:
    """Which ids may stand at each position of a sequence, `s v`, said by hand."""
    allowed = torch.zeros(layout.sequence_length, layout.vocab_size, dtype=torch.bool)
    allowed[1 : 1 + layout.text_length, : layout.text_vocab_size] = True
    position, first = layout.text_length + 2, layout.text_vocab_size + 3
    for length in layout.image.groups:
        allowed[position : position + length, first : first + layout.codebook_size] = True
        position, first = position + length, first + layout.codebook_size
    return allowed


def plain_loss(prior, layout, text_ids, codes) -> torch.Tensor:
    """The masked cross entropy as a textbook writes it: all logits, others at minus infinity, -100 where nothing is learned."""
    input_ids = layout.sequence(text_ids, codes)
    logits = prior(input_ids).logits[:, :-1].masked_fill(~allowed_ids(layout)[1:], float("-inf"))
    labels = input_ids[:, 1:].clone()
    labels[(labels == layout.pad_id) | (labels == layout.sep_id)] = -100
    text, image = labels.clone(), labels.clone()
    text[:, layout.text_length :], image[:, : layout.text_length + 1] = -100, -100
    parts = [F.cross_entropy(logits.transpose(1, 2).nan_to_num(neginf=-1e9), each) for each in (text, image)]
    return (parts[0] + 7 * parts[1]) / 8


def test_loss_equals_the_masked_cross_entropy_with_weights_1_and_7(prior, layout, text_ids, codes):
    model = PriorWithLoss(prior, layout).eval()
    torch.testing.assert_close(model(text_ids, codes).loss, plain_loss(prior, layout, text_ids, codes))


def test_the_gradients_are_those_of_the_masked_cross_entropy(prior, layout, text_ids, codes):
    plain = copy.deepcopy(prior)
    PriorWithLoss(prior, layout).eval()(text_ids, codes).loss.backward()
    plain_loss(plain, layout, text_ids, codes).backward()
    for (name, ours), theirs in zip(prior.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name, atol=1e-6, rtol=1e-4)


def test_metrics_are_the_parts_of_the_loss(prior, layout, text_ids, codes):
    output = PriorWithLoss(prior, layout, image_loss_weight=3.0).eval()(text_ids, codes)
    torch.testing.assert_close(output.loss, (output.metrics["text_loss"] + 3 * output.metrics["image_loss"]) / 4)


def test_segment_logits_equal_the_logits_of_forward(prior, layout, text_ids, codes):
    input_ids = layout.sequence(text_ids, codes)
    ours = segment_logits(prior, last_hidden_state(prior, input_ids), 3, layout.vocab_size)
    torch.testing.assert_close(ours, prior(input_ids).logits[..., 3:])


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "phi"], indirect=True)  # the head of phi has biases
def test_each_position_gets_the_logits_of_its_own_codes(prior, architecture, layout, text_ids, codes):
    if architecture == "phi":
        prior.get_output_embeddings().bias.data.normal_()
    input_ids = layout.sequence(text_ids, codes)
    before = slice(layout.prompt_length - 1, -1)
    ours = code_logits(prior, last_hidden_state(prior, input_ids)[:, before], layout.image)
    allowed = allowed_ids(layout)[layout.prompt_length :]
    theirs = [
        logits[:, mask] for logits, mask in zip(prior(input_ids).logits[:, before].unbind(1), allowed, strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack(theirs, dim=1))


def test_loss_of_a_batch_without_text_is_finite(prior, layout, codes):
    output = PriorWithLoss(prior, layout).eval()(layout.null_text_ids(4), codes)
    assert output.metrics["text_loss"] == 0 and output.loss.isfinite()


@pytest.mark.parametrize("architecture", ["qwen3"], indirect=True)
def test_every_parameter_gets_a_gradient(prior, layout, text_ids, codes):
    PriorWithLoss(prior, layout)(text_ids, codes).loss.backward()
    assert not [name for name, parameter in prior.named_parameters() if not parameter.grad.abs().sum() > 0]


@pytest.mark.parametrize("architecture", ["qwen3"], indirect=True)
class TestWhatTrainingHides:
    @pytest.fixture
    def read(self, monkeypatch) -> list[torch.Tensor]:
        """The sequences that a prior gets to see."""
        seen: list[torch.Tensor] = []

        def spy(prior, input_ids, added_embeddings):
            seen.append(input_ids)
            return last_hidden_state(prior, input_ids, added_embeddings)

        monkeypatch.setattr("tok2img.prior.loss.last_hidden_state", spy)
        return seen

    def test_captions_are_dropped_in_training_and_never_in_eval(self, prior, layout, text_ids, codes, read):
        model = PriorWithLoss(prior, layout, caption_dropout=1.0)
        model.train()(text_ids, codes)
        model.eval()(text_ids, codes)
        shown = [input_ids[:, 1 : 1 + layout.text_length] for input_ids in read[-2:]]
        assert shown[0].equal(layout.null_text_ids(4)) and shown[1].equal(text_ids)

    def test_drop_captions_drops_about_the_given_fraction(self, prior, layout):
        model = PriorWithLoss(prior, layout, caption_dropout=0.25).train()
        text_ids = model.drop_captions(torch.ones(4000, 3, dtype=torch.int64), torch.rand(4000))
        dropped = (text_ids == layout.pad_id).all(dim=1)
        assert 0.2 < dropped.float().mean() < 0.3 and (text_ids[~dropped] == 1).all()

    def test_a_dropped_caption_carries_no_loss(self, prior, layout, text_ids, codes):
        model = PriorWithLoss(prior, layout, caption_dropout=1.0).train()
        assert model(text_ids, codes).metrics["text_loss"] == 0


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"], indirect=True)
def test_a_layout_with_too_many_ids_is_refused(prior):
    larger = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=70)
    with pytest.raises(ValueError, match="the layout needs 128 ids, but the model's head has 64 rows"):
        check_fits(prior, larger)


def test_a_layout_that_is_too_long_is_refused(prior):
    longer = SequenceLayout(text_vocab_size=11, text_length=9, num_codes=4, codebook_size=6)
    with pytest.raises(ValueError, match="the layout needs 15 positions, but the model has 9"):
        check_fits(prior, longer)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("granite", {"logits_scaling": 8.0}), ("cohere", {}), ("gemma2", {})],
    ids=["granite", "cohere", "gemma2"],
)
def test_a_model_that_changes_its_logits_after_the_head_is_refused(architecture, settings):
    layout = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6)
    with pytest.raises(ValueError, match="change their logits after the head"):
        build_prior(layout, architecture=architecture, depth=1, **settings)


@pytest.mark.parametrize("wrong", ["gpt5", "", "clip"])
def test_an_architecture_that_is_no_causal_language_model_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"architecture '{wrong}'|{wrong}.*causal"):
        build_prior(SequenceLayout(11, 3, 4, 6), architecture=wrong, depth=1)


def test_a_depth_below_one_is_refused():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        build_prior(SequenceLayout(11, 3, 4, 6), depth=0)


def test_the_seed_alone_decides_the_weights(architecture, layout):
    torch.manual_seed(1)
    one = build_prior(layout, architecture=architecture, depth=1, seed=5)
    torch.manual_seed(2)
    two, three = (build_prior(layout, architecture=architecture, depth=1, seed=seed) for seed in (5, 6))
    weights = [each.get_input_embeddings().weight for each in (one, two, three)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_build_prior_keeps_the_global_random_state(layout):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_prior(layout, depth=1)
    assert torch.rand(1).equal(expected)


def test_the_width_follows_the_depth(architecture, layout):
    prior = build_prior(layout, architecture=architecture, depth=2)
    assert prior.config.hidden_size == 128 and prior.config.num_hidden_layers == 2
    assert prior.config.num_attention_heads == 2


def test_settings_of_the_models_own_config_can_be_given(layout):
    assert build_prior(
        layout, depth=1, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}
    ).config.rope_parameters["rope_theta"] == pytest.approx(500)


def test_load_prior_restores_a_saved_prior(prior, layout, text_ids, codes, tmp_path):
    PriorWithLoss(prior, layout).save_pretrained(tmp_path)
    again = load_prior(tmp_path, layout)
    input_ids = layout.sequence(text_ids, codes)
    assert again(input_ids).logits.equal(prior(input_ids).logits) and not again.training


def test_a_saved_prior_loads_without_our_code(tmp_path):
    layout = SequenceLayout(text_vocab_size=11, text_length=3, num_codes=4, codebook_size=6, codes_shared=False)
    folders = [tmp_path / architecture for architecture in ("qwen3", "llama", "gpt2")]
    for folder in folders:
        prior = build_prior(layout, architecture=folder.name, depth=1).eval()
        PriorWithLoss(prior, layout).save_pretrained(folder)
        input_ids = layout.sequence(torch.tensor([[1, 2, layout.pad_id]]), torch.tensor([[0, 5, 2, 3]]))
        torch.save({"input_ids": input_ids, "logits": prior(input_ids).logits.detach()}, folder / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_US, *map(str, folders)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.endswith("equal\n"), done.stderr


@pytest.mark.parametrize("architecture", ["qwen3"], indirect=True)
class TestDamagedFolders:
    def test_a_missing_tensor_is_refused_by_name(self, prior, layout, tmp_path):
        state = prior.state_dict()
        state.pop("model.norm.weight")
        prior.save_pretrained(str(tmp_path), state_dict=state)
        with pytest.raises(ValueError, match=r"missing or unknown tensors \['model\.norm\.weight'\]"):
            load_prior(tmp_path, layout)

    def test_weights_that_are_not_finite_are_refused(self, prior, layout, tmp_path):
        prior.model.norm.weight.data[0] = float("nan")
        prior.save_pretrained(str(tmp_path))
        with pytest.raises(ValueError, match=r"model\.norm\.weight holds values that are not finite"):
            load_prior(tmp_path, layout)

    def test_a_truncated_file_of_weights_is_refused_by_the_folder(self, prior, layout, tmp_path):
        prior.save_pretrained(str(tmp_path))
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises((ValueError, OSError), match=str(tmp_path)):
            load_prior(tmp_path, layout)


def test_load_prior_of_an_image_tokenizer_raises(tiny_vqvae, tmp_path):
    tiny_vqvae.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        load_prior(tmp_path, SequenceLayout(11, 3, 4, 6))


def test_stock_loading_gives_the_same_class(prior, architecture, tmp_path):
    prior.save_pretrained(str(tmp_path))
    assert type(AutoModelForCausalLM.from_pretrained(str(tmp_path))) is type(prior)
    assert AutoConfig.from_pretrained(str(tmp_path)).model_type == architecture


def test_padding_is_not_multiplied_with_the_head(monkeypatch):
    layout, rows = SequenceLayout(11, text_length=5, num_codes=2, codebook_size=3), []
    monkeypatch.setattr(
        prior_loss, "segment_logits", lambda *given: rows.append(given[1].shape[:2]) or segment_logits(*given)
    )
    text_ids = torch.tensor([[1, 2, *[layout.pad_id] * 3], [3, *[layout.pad_id] * 4]])
    model = PriorWithLoss(build_prior(layout, depth=1), layout, caption_dropout=0.0)
    model(text_ids, torch.tensor([[0, 1], [2, 2]])).loss.backward()
    assert rows == [(1, 3)]
