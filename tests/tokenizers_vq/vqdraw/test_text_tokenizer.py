import logging
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModel

from tokenizers_vq import VQDrawForText, VQDrawTextConfig
from tokenizers_vq.text_base import IGNORE_INDEX
from tokenizers_vq.vqdraw.losses import CrossEntropyLoss
from tokenizers_vq.vqdraw.options import BiasedOptions, DenseOptions, EmbeddedOptions, SharedOptions

TEXTS = ["a red square", "a blue disc", "", "x", "two green cats sat"]
TINY = {
    "max_length": 18,
    "span_length": 6,
    "num_stages": 3,
    "codebook_size": 8,
    "hidden_channels": 16,
    "feature_channels": 8,
    "embedding_dim": 8,
    "dilations": [1, 2],
}


def tiny(**settings) -> VQDrawForText:
    """With every parameter perturbed, as after some training."""
    torch.manual_seed(0)
    model = VQDrawForText(VQDrawTextConfig(**TINY | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> VQDrawForText:
    return tiny()


@pytest.fixture(scope="module")
def trained() -> VQDrawForText:
    torch.manual_seed(0)
    letters = sorted({*b"?", *"".join(TEXTS).encode()})
    model = VQDrawForText(VQDrawTextConfig(**TINY | {"alphabet": letters, "codebook_size": 16}))
    symbols = model.texts_to_symbols(TEXTS * 8)
    model.init_from_data(symbols)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(symbols).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=["words", "word"])
def words(request) -> VQDrawForText:
    return tiny(span_unit=request.param, max_length=36)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class TestOptions:
    @pytest.fixture
    def options(self) -> EmbeddedOptions:
        return EmbeddedOptions(random(5, 6, 4), random(7, 3, 4), random(9, 3))

    def test_every_form_equals_the_dense_one(self, options):
        dense, codes = DenseOptions(options.all_steps()), torch.randint(7, (5, 2))
        assert dense.steps.shape == (5, 7, 6, 9)
        torch.testing.assert_close(options.gather_steps(codes), dense.gather_steps(codes))
        torch.testing.assert_close(
            options.select_examples(codes[:, 0] % 5).all_steps(), dense.select_examples(codes[:, 0] % 5).all_steps()
        )
        residual, biases = random(5, 6, 9), random(7, 6, 9)
        torch.testing.assert_close(options.squared_errors(residual), dense.squared_errors(residual))
        torch.testing.assert_close(options.bias_products(biases), dense.bias_products(biases))

    def test_a_step_is_an_embedding_of_a_linear_map_of_the_features(self, options):
        expected = options.embedding @ options.weight[3] @ options.features[2, 5]
        torch.testing.assert_close(options.all_steps()[2, 3, 5], expected)


class TestError:
    @pytest.mark.parametrize("num_examples", [1, 20])
    def test_equals_torchs_cross_entropy_over_valid_positions(self, num_examples):
        options = BiasedOptions(DenseOptions(random(num_examples, 3, 6, 9)), random(3, 6, 9))
        state, target = random(num_examples, 6, 9), torch.randint(9, (num_examples, 6))
        target[0, 2:] = IGNORE_INDEX
        logits = (state[:, None] + options.all_steps()).movedim(3, 1)
        expected = F.cross_entropy(
            logits, target[:, None].expand(-1, 3, -1), ignore_index=IGNORE_INDEX, reduction="none"
        ).mean(dim=2)
        torch.testing.assert_close(CrossEntropyLoss(9)(options, state, target), expected)
        with torch.no_grad():
            torch.testing.assert_close(CrossEntropyLoss(9)(options, state, target), expected)

    @pytest.mark.parametrize("scale", [1, 30, 1000])
    def test_without_gradient_it_equals_the_plain_form_for_steps_of_any_size(self, scale):
        options, state = DenseOptions(scale * random(4, 3, 6, 9).float()), scale * random(4, 6, 9).float()
        target = torch.randint(9, (4, 6))
        plain = CrossEntropyLoss(9)(options, state, target)
        with torch.no_grad():
            torch.testing.assert_close(CrossEntropyLoss(9)(options, state, target), plain)

    @pytest.mark.parametrize("where", ["steps", "state"])
    @pytest.mark.parametrize("symbols", [slice(1, 5), slice(None)])
    @pytest.mark.parametrize("far", [-200.0, -70.0, 70.0, 200.0])
    def test_without_gradient_it_equals_the_plain_form_at_the_limits_of_float32(self, where, symbols, far):
        steps, state = random(4, 3, 6, 9).float(), random(4, 6, 9).float()
        (steps if where == "steps" else state)[..., symbols] += far
        options, target = DenseOptions(steps), torch.randint(9, (4, 6))
        plain = CrossEntropyLoss(9)(options, state, target)
        with torch.no_grad():
            torch.testing.assert_close(CrossEntropyLoss(9)(options, state, target), plain)

    @pytest.mark.parametrize("first", [0.0, 0.5])
    def test_shared_options_give_the_errors_of_the_plain_form(self, first):
        options = SharedOptions(DenseOptions(random(1, 3, 6, 9)), 5)
        state = torch.full((5, 6, 9), first, dtype=torch.float64)
        state[:, 0, 0] *= 2
        target = torch.randint(9, (5, 6))
        target[2, 3:] = IGNORE_INDEX
        plain = CrossEntropyLoss(9)(options, state, target)
        with torch.no_grad():
            torch.testing.assert_close(CrossEntropyLoss(9)(options, state, target), plain)

    def test_target_state_reconstructs_the_target(self):
        error, target = CrossEntropyLoss(9), torch.randint(9, (4, 6))
        assert torch.equal(error.reconstruct(error.target_state(target)), target)
        assert not error.target_state(torch.full((1, 6), IGNORE_INDEX)).any()


class TestText:
    @given(st.lists(st.text(max_size=30), max_size=3))
    def test_symbols_give_back_what_fits(self, model, texts):
        expected = [text.encode()[:18].decode(errors="ignore") for text in texts]
        assert model.symbols_to_texts(model.texts_to_symbols(texts)) == expected

    @given(st.text(max_size=30))
    def test_every_text_comes_back_as_some_text(self, model, text):
        assert isinstance(model.decode(model.encode([text]))[0], str)

    @given(st.text(max_size=24))
    def test_spans_are_counted_without_encoding(self, model, text):
        live = model.valid_spans(model.texts_to_symbols([text])).sum()
        assert min(model.count_spans(text), model.num_spans) == live
        assert (model.count_spans(text) > model.num_spans) == (len(text.encode()) > 18)

    def test_bytes_outside_the_alphabet_are_question_marks(self, trained):
        assert trained.symbols_to_texts(trained.texts_to_symbols(["a Zebra é"])) == ["a ?ebra ??"]

    def test_truncated_texts_are_reported_and_end_between_characters(self, model, caplog):
        with caplog.at_level(logging.WARNING, logger="tokenizers_vq"):
            assert model.symbols_to_texts(model.texts_to_symbols(["a" * 17 + "é", "short"])) == ["a" * 17, "short"]
        assert "1 of 2 texts are longer than 3 spans and were truncated" in caplog.text

    def test_empty_list_gives_empty_codes(self, model):
        assert model.encode([]).shape == (0, 9)


class TestWordSpans:
    def test_every_span_starts_a_word(self, words):
        expected = {
            "word": [b"a", b" yello", b"w", b" dog", b",", b" 42", b"  ", b"more"],
            "words": [b"a", b" yello", b"w", b" dog,", b" 42  ", b"more"],
        }
        assert list(words.iter_chunks(b"a yellow dog, 42  more")) == expected[words.config.span_unit]

    @given(st.text(max_size=30))
    def test_symbols_give_back_what_fits(self, words, text):
        fitting = b"".join(list(words.iter_chunks(text.encode()))[:6]).decode(errors="ignore")
        assert words.symbols_to_texts(words.texts_to_symbols([text])) == [fitting]

    @given(st.text(max_size=24))
    def test_spans_are_counted_without_encoding(self, words, text):
        live = words.valid_spans(words.texts_to_symbols([text])).sum()
        assert min(words.count_spans(text), words.num_spans) == live

    def test_padding_of_spans_is_ignored(self, words):
        target = words.make_labels(words.texts_to_symbols(["a tiger"])).view(6, 6)
        assert (target != IGNORE_INDEX).sum(dim=1).tolist() == [2, 6, 1, 0, 0, 0]
        assert not words.encode(["a dog"]).view(3, 6)[:, 3:].any()

    def test_codes_decode_to_the_reconstruction(self, words):
        symbols = words.texts_to_symbols(TEXTS)
        assert torch.equal(words.decode_symbols(words.encode(TEXTS)), words(symbols).reconstruction)


class TestCodes:
    def test_decode_to_the_reconstruction(self, model):
        symbols = model.texts_to_symbols(TEXTS)
        output = model(symbols)
        assert torch.equal(model.encode(TEXTS), output.codes) and output.codes.shape == (5, 9)
        assert torch.equal(model.decode_symbols(output.codes), output.reconstruction)

    def test_text_gets_the_same_codes_alone_and_in_a_batch(self, model):
        together = model.encode(TEXTS)
        assert torch.equal(torch.cat([model.encode([text]) for text in TEXTS]), together)

    def test_are_zero_after_the_end_of_a_text(self, model):
        codes = model.encode(TEXTS).view(5, 3, 3)
        assert not codes[2:4, :, 1:].any() and codes[1].any()

    def test_spans_know_their_neighbours(self, model):
        """Else a longer context would change nothing."""
        one, other = model.texts_to_symbols(["aaaaaabbbbbb"]), model.texts_to_symbols(["aaaaaacccccc"])
        states = [model.vqdraw(model.make_labels(each)).errors.view(3, 3, 8)[0] for each in (one, other)]
        assert torch.equal(states[0][0], states[1][0]) and not torch.equal(states[0][1:], states[1][1:])

    def test_prefixes_decode_to_the_stages(self, model):
        codes = model.encode(TEXTS)
        stages = list(model.decode_progressively(codes))
        assert [model.decode(codes[:, : 3 * count]) for count in (1, 2, 3)] == stages

    def test_the_one_pass_through_all_stages_equals_the_plain_form(self, model):
        codes = model.encode(TEXTS)[:, :8]
        plain = super(VQDrawForText, model).decode_symbols_progressively(codes)
        for seen, expected in zip(model.decode_symbols_progressively(codes), plain, strict=True):
            assert torch.equal(seen, expected)

    def test_a_prefix_within_a_stage_changes_the_first_spans_only(self, model):
        codes = model.encode(TEXTS)
        before, part, after = (model.decode_symbols(codes[:, :count]) for count in (3, 4, 6))
        assert torch.equal(part[:, :6], after[:, :6]) and torch.equal(part[:, 6:], before[:, 6:])

    @pytest.mark.parametrize("codes", [torch.zeros(2, 10), torch.full((2, 9), 8), torch.zeros(2, 10, dtype=torch.long)])
    def test_invalid_codes_raise(self, model, codes):
        with pytest.raises(ValueError, match="codes must"):
            model.decode(codes)

    def test_one_span_may_cover_the_whole_text(self):
        model = tiny(span_length=18)
        assert model.code_shape == (3, 1) and model.encode(TEXTS).shape == (5, 3)
        assert torch.equal(
            model.decode_symbols(model.encode(TEXTS)), model(model.texts_to_symbols(TEXTS)).reconstruction
        )


class TestTraining:
    def test_trained_model_reconstructs_texts(self, trained):
        assert trained.decode(trained.encode(TEXTS)) == TEXTS

    def test_init_from_data_uses_every_option(self):
        model = VQDrawForText(VQDrawTextConfig(**TINY))
        symbols = model.texts_to_symbols(
            ["".join(chr(97 + (start + step) % 26) for step in range(18)) for start in range(26)]
        )
        model.init_from_data(symbols)
        first = model.encode(symbols).view(26, 3, 3)[:, 0]
        assert len(first.unique()) == 8

    def test_every_parameter_gets_a_gradient(self):
        model = tiny().train()
        model(model.texts_to_symbols(TEXTS)).loss.backward()
        unread = {"vqdraw.refiner.head", "vqdraw.biases"}  # of options that nothing chose
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not set(idle) - unread

    def test_errors_fall_from_stage_to_stage(self, trained):
        errors = trained.vqdraw(trained.make_labels(trained.texts_to_symbols(TEXTS))).best_error.mean(dim=0)
        assert all(after < before for before, after in pairwise(errors.tolist()))

    def test_stage_checkpointing_changes_no_gradient(self):
        gradients = []
        for checkpoint_stages in (False, True):
            model = tiny(checkpoint_stages=checkpoint_stages, num_aux_options=0).train()
            model(model.texts_to_symbols(TEXTS)).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        torch.testing.assert_close(*gradients)

    def test_replacement_moves_dead_options_only(self):
        model = tiny()
        target = model.make_labels(model.texts_to_symbols(TEXTS))
        dead = torch.zeros(3, 8, dtype=torch.bool)
        dead[0, 5] = True
        before = model.vqdraw.biases.clone()
        model.vqdraw.replace_dead_options(target, dead)
        moved = (model.vqdraw.biases != before).flatten(2).any(dim=2)
        assert torch.equal(moved, dead)


class TestFolder:
    def test_saves_and_loads(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        assert isinstance(again, VQDrawForText) and torch.equal(again.encode(TEXTS), model.encode(TEXTS))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"span_length": 5}, "max_length 18 is not a multiple of span_length 5"),
            ({"alphabet": [1, 63, 2]}, "alphabet must be different byte values in order"),
            ({"alphabet": [1, 2]}, "alphabet must hold 63"),
            ({"alphabet": [63, 256]}, "alphabet must be different byte values"),
            ({"span_unit": "line"}, "span_unit must be one of bytes, words, word, got 'line'"),
            ({"dilations": []}, "dilations must be"),
            ({"active_stages": 4}, "active_stages 4 is more than num_stages 3"),
            ({"segment_length": 2}, "num_stages 3 is not a multiple of segment_length 2"),
            ({"num_stage": 2}, "did you mean 'num_stages'"),
        ],
    )
    def test_invalid_settings_raise(self, settings, message):
        with pytest.raises(ValueError, match=message):
            VQDrawTextConfig(**TINY | settings)

    @pytest.mark.parametrize(
        "symbols", [torch.zeros(2, 17, dtype=torch.long), torch.full((2, 18), 300), torch.zeros(2, 18)]
    )
    def test_invalid_symbols_raise(self, model, symbols):
        with pytest.raises(ValueError, match="symbols must"):
            model(symbols)

    @pytest.mark.parametrize("texts", [[1], [None], ["\ud800"]])
    def test_invalid_texts_raise(self, model, texts):
        with pytest.raises(ValueError, match="text 0"):
            model.encode(texts)

    def test_segments_have_refiners_of_their_own(self):
        model = tiny(num_stages=4, segment_length=2)
        assert len(model.vqdraw.refiner.refiners) == 2 and model.encode(TEXTS).shape == (5, 12)

    def test_fewer_stages_may_be_active(self):
        assert tiny(active_stages=2).encode(TEXTS).shape == (5, 6)
