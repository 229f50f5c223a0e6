"""What all text tokenizers promise, in terms of `DiscreteTokenizer`."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tokenizers_vq import TextSpanTokenizer, VQDrawForText, VQDrawTextConfig, VQVAEForText, VQVAETextConfig

TEXTS = ["a red square", "a blue disc", "", "x", "two green cats sat", "a dog, a cat"]
SPANS = {"max_length": 18, "span_length": 6, "codebook_size": 8, "hidden_channels": 16, "dilations": [1, 2]}
CONFIGS = [VQDrawTextConfig, VQVAETextConfig]


def vqdraw(**settings) -> VQDrawForText:
    torch.manual_seed(0)
    model = VQDrawForText(
        VQDrawTextConfig(**SPANS, num_stages=3, feature_channels=8, embedding_dim=8, num_aux_options=0, **settings)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def vqvae(**settings) -> VQVAEForText:
    torch.manual_seed(0)
    model = VQVAEForText(VQVAETextConfig(**SPANS | {"num_quantizers": 3, "code_dim": 8} | settings)).eval()
    if model.config.quantizer == "fsq":
        with torch.no_grad():
            model.quantizer.view.project_in.weight.mul_(50)
    model.init_from_data(model.texts_to_symbols(TEXTS))
    return model


MODELS = {
    "vqdraw": vqdraw,
    "vqdraw of words": lambda: vqdraw(span_unit="words"),
    "residual": vqvae,
    "residual of words": lambda: vqvae(span_unit="words"),
    "vector": lambda: vqvae(quantizer="vector", codebook_dim=4),
    "fsq": lambda: vqvae(quantizer="fsq", fsq_levels=[4, 3, 2]),
}


@pytest.fixture(params=MODELS)
def model(request) -> TextSpanTokenizer:
    return MODELS[request.param]()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def test_decode_of_encoded_texts_equals_the_reconstruction(model):
    symbols = model.texts_to_symbols(TEXTS)
    with torch.no_grad():
        output = model(symbols)
    codes = model.encode(TEXTS)
    assert torch.equal(codes, output.codes) and torch.equal(codes, model.encode(symbols))
    assert torch.equal(model.decode_symbols(codes), output.reconstruction)
    assert model.decode(codes) == model.symbols_to_texts(output.reconstruction)


def test_encode_returns_int64_codes_of_the_promised_length_and_range(model):
    codes = model.encode(TEXTS)
    assert codes.dtype == torch.int64 and codes.shape == (len(TEXTS), model.num_codes)
    assert codes.min() >= 0 and codes.max() < model.codebook_size
    assert len(codes.unique(dim=0)) > 2, "the texts should code differently"
    assert sum(model.positions_per_codebook) == model.num_codes == torch.Size(model.code_shape).numel()


def test_encode_gives_zeros_past_the_end_of_a_text(model):
    live = model.valid_spans(model.texts_to_symbols(TEXTS)).repeat(1, model.code_shape[0])
    codes = model.encode(TEXTS)
    assert not codes[~live].any() and codes[live].any()


def test_encode_of_one_text_equals_its_codes_in_a_batch(model):
    alone = torch.cat([model.encode([text]) for text in TEXTS])
    assert torch.equal(alone, model.encode(TEXTS))


def test_encode_and_decode_of_no_texts_are_empty(model):
    codes = model.encode([])
    assert codes.shape == (0, model.num_codes) and model.decode(codes) == []


def test_encode_and_decode_of_texts_under_bfloat16_autocast_are_unchanged(model):
    codes = model.encode(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(TEXTS), codes)
        symbols = model.decode_symbols(codes)
    assert torch.equal(symbols, model.decode_symbols(codes))


def test_backward_gives_every_parameter_a_gradient(model):
    model.train()(model.texts_to_symbols(TEXTS)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_training_for_a_few_steps_lowers_the_loss(model):
    symbols = model.texts_to_symbols(TEXTS)
    before = model(symbols).loss.item()
    optimizer = torch.optim.Adam(model.train().parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        model(symbols).loss.backward()
        optimizer.step()
    assert model.eval()(symbols).loss.item() < 0.9 * before


@pytest.mark.parametrize("training", [True, False])
def test_encode_and_decode_leave_the_model_unchanged(model, training):
    model.train(training)
    before = copy.deepcopy(dict(model.named_buffers()) | dict(model.named_parameters()))
    model.decode(model.encode(TEXTS))
    after = dict(model.named_buffers()) | dict(model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(module.training == training for module in model.modules())


def test_decode_progressively_equals_decoding_each_prefix(model):
    codes = model.encode(TEXTS)
    stages = list(model.decode_progressively(codes))
    assert len(stages) == model.code_shape[0] and stages[-1] == model.decode(codes)
    if model.supports_prefix_decoding:
        assert [model.decode(codes[:, : 3 * count]) for count in (1, 2, 3)] == stages
        assert all(len(model.decode(codes[:, :count])) == len(TEXTS) for count in range(1, 9))
    else:
        with pytest.raises(ValueError, match=r"codes must be `b 3`, got shape `6 2`"):
            model.decode(codes[:, :2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_decode_accepts_every_stored_integer_type(model, dtype):
    codes = model.encode(TEXTS)
    assert model.decode(codes.to(dtype)) == model.decode(codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes.float(), "codes must be integers, got torch.float32"),
        (lambda codes: codes[0], "codes must be `b"),
        (lambda codes: codes.repeat(1, 2), "codes must be `b"),
        (lambda codes: codes[:, :0], "codes must be `b"),
        (lambda codes: codes - 1, "codes must lie in 0"),
        (lambda codes: codes + 24, "codes must lie in 0"),
    ],
)
def test_decode_of_invalid_codes_raises(model, change, message):
    with pytest.raises(ValueError, match=message):
        model.decode(change(model.encode(TEXTS)))


@pytest.mark.parametrize("method", ["encode", "forward", "init_from_data"])
@pytest.mark.parametrize(
    "symbols", [torch.zeros(2, 17, dtype=torch.long), torch.full((2, 18), 300), torch.zeros(2, 18), torch.zeros(18)]
)
def test_methods_with_invalid_symbols_raise(model, method, symbols):
    with pytest.raises(ValueError, match="symbols must"):
        getattr(model, method)(symbols)


@pytest.mark.parametrize("texts", [[1], [None], ["\ud800"]])
def test_encode_of_values_that_are_not_texts_raises(model, texts):
    with pytest.raises(ValueError, match="text 0"):
        model.encode(texts)


def test_encode_of_a_single_string_raises(model):
    with pytest.raises(ValueError, match="texts must be a list of texts, got one: 'a cat'"):
        model.encode("a cat")


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"span_length": 5}, "max_length 18 is not a multiple of span_length 5"),
        ({"alphabet": [1, 2]}, "alphabet must hold 63"),
        ({"span_unit": "line"}, "span_unit must be one of bytes, words, word, got 'line'"),
        ({"dilations": [0]}, "dilations must be"),
        ({"codebook_siz": 2}, "did you mean 'codebook_size'"),
        ({"codebook_size": 2.5}, "codebook_size must be a whole number"),
    ],
)
def test_config_with_invalid_settings_raises(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        config_class(**{"max_length": 18} | settings)


def test_from_pretrained_restores_codes_settings_and_weights(model, saved):
    loaded = AutoModel.from_pretrained(saved)
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(loaded.encode(TEXTS), model.encode(TEXTS))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_config_with_settings_of_another_model_raises(model, saved):
    settings = json.loads((saved / "config.json").read_text())
    stranger = "fsq_levels" if isinstance(model, VQDrawForText) else "num_biased_stages"
    (saved / "config.json").write_text(json.dumps(settings | {stranger: 2}))
    with pytest.raises(ValueError, match=f"no setting '{stranger}'"):
        type(model).from_pretrained(saved)


def test_from_pretrained_with_a_missing_tensor_raises(model, saved):
    weights = load_file(saved / "model.safetensors")
    name = next(iter(weights))
    del weights[name]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing or misshapen tensors .*{name}"):
        type(model).from_pretrained(saved)
