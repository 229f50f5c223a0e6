"""Damaged and malicious model folders, for every kind of model: no code runs, nothing large is allocated, errors are one line.

The cases are those of `make_bad_checkpoints.py`, on our models and their settings, and some more.
"""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from tok2img import TextToImagePipeline, Tok2ImgProcessor
from tok2img.cli.app import main
from tok2img.evaluation.caption_classifier import CaptionClassifier, CaptionClassifierConfig
from tok2img.pipelines.clip_ranker import ClipRanker, build_image_processor
from tok2img.prior.model import build_prior
from tok2img.tokenization.span_text_tokenizer import load_text_tokenizer
from tok2img.tokenization.text_tokenizer import SubwordTokenizer
from tokenizers_vq import (
    VQDrawForText,
    VQDrawStudent,
    VQDrawStudentConfig,
    VQDrawTextConfig,
    VQVAEForText,
    VQVAETextConfig,
)
from tokenizers_vq.auto import load_image_tokenizer

MARK = "code-ran"
MOST_SECONDS, MOST_BYTES = 5, 200e6
BIG = 10**12
Change = Callable[[Path], object]
LOADERS = {
    "vqvae": load_image_tokenizer,
    "vqvae2": load_image_tokenizer,
    "residual": load_image_tokenizer,
    "fsq": load_image_tokenizer,
    "vqdraw": load_image_tokenizer,
    "student": load_image_tokenizer,
    "janus": load_image_tokenizer,
    "vqdraw_text": load_text_tokenizer,
    "vqvae_text": load_text_tokenizer,
    "qwen3": TextToImagePipeline.from_pretrained,
    "gpt2": TextToImagePipeline.from_pretrained,
    "clip": ClipRanker.from_pretrained,
    "classifier": CaptionClassifier.from_pretrained,
}
# A size whose tensors get another shape, and settings that must not become memory or time.
SIZES: dict[str, tuple[str, ...]] = {
    "vqvae": ("codebook_size", "code_dim", "image_size", "num_downsamples", "num_decoder_blocks", "hidden_channels"),
    "vqvae2": ("codebook_size", "code_dim", "image_size", "num_grids"),
    "residual": ("codebook_size", "code_dim", "image_size", "num_quantizers"),
    "fsq": ("code_dim", "image_size", "hidden_channels"),
    "vqdraw": ("codebook_size", "feature_channels", "image_size", "num_stages", "num_residual_blocks"),
    "student": ("codebook_size", "vector_dim", "image_size", "num_stages", "num_residual_blocks"),
    "janus": ("image_size",),
    "vqdraw_text": ("codebook_size", "hidden_channels", "max_length", "num_stages", "span_length"),
    "vqvae_text": ("codebook_size", "code_dim", "max_length", "num_quantizers"),
    "qwen3": ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "intermediate_size"),
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_positions"),
    "clip": ("projection_dim",),
    "classifier": ("num_channels", "image_size"),
}
OF_OTHERS = ("qwen3", "gpt2", "clip")  # their configs are transformers' own, which keep unknown settings


class Bomb:
    def __reduce__(self):
        return open, (MARK, "w")


PICKLE = pickle.dumps(Bomb(), protocol=4)
EVIL_PY = f"open({MARK!r}, 'w')\nclass Evil: pass\nclass EvilConfig: pass\n".encode()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"data.pkl": PICKLE, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in {"sys_info": PICKLE, "pickle": PICKLE, "tensors": b"", "storages": b""}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write(**files: bytes) -> Change:
    """Put files beside what is there; `__` stands for the dot."""
    return lambda folder: [(folder / name.replace("__", ".")).write_bytes(data) for name, data in files.items()]


def without_weights(change: Change) -> Change:
    return lambda folder: [(folder / "model.safetensors").unlink(), change(folder)]


def config(**values: object) -> Change:
    return edited_config(lambda settings: settings.update(values))


def edited_config(change: Callable[[dict], object]) -> Change:
    def edit(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        change(settings)
        (folder / "config.json").write_text(json.dumps(settings))

    return edit


def parts(folder: Path) -> tuple[dict, bytes]:
    """Header and data of the weights."""
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def weights(change: Callable[[dict, bytes], bytes | None]) -> Change:
    """Other weights, made of the header and the data; a header that is changed in place will do."""

    def edit(folder: Path) -> None:
        header, data = parts(folder)
        content = change(header, data)
        (folder / "model.safetensors").write_bytes(safetensors(header, data) if content is None else content)

    return edit


def tensors(header: dict) -> list[dict]:
    """Entries of the float tensors, in the order of their data."""
    entries = [entry for name, entry in header.items() if name != "__metadata__" and entry["dtype"] == "F32"]
    return sorted((entry for entry in entries if entry["shape"]), key=lambda entry: entry["data_offsets"])


def with_value(value: float) -> Change:
    def put(header: dict, data: bytes) -> bytes:
        start = tensors(header)[0]["data_offsets"][0]
        return safetensors(header, data[:start] + struct.pack("<f", value) + data[start + 4 :])

    return weights(put)


def without_last(header: dict, data: bytes) -> bytes:
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    return safetensors(header, data[: header.pop(last)["data_offsets"][0]])


def with_stranger(header: dict, data: bytes) -> bytes:
    header["stranger"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    return safetensors(header, data + b"\0" * 4)


def with_key_twice(header: dict, data: bytes) -> bytes:
    name = next(name for name in header if name != "__metadata__")
    return safetensors(f"{json.dumps(header)[:-1]},{json.dumps(name)}:{json.dumps(header[name])}}}".encode(), data)


def overlapping(header: dict, data: bytes) -> None:
    first, second = tensors(header)[:2]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]


def as_index(target: str, *, then: Change = lambda folder: None) -> Change:
    def edit(folder: Path) -> None:
        names = [name for name in parts(folder)[0] if name != "__metadata__"]
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        without_weights(then)(folder)

    return edit


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
AUTO_MAP = dict.fromkeys(("AutoModel", "AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/nowhere/else"}).encode()
LOADS: dict[str, Change] = {
    "good": lambda folder: None,
    "good_beside_pickle": write(
        pytorch_model__bin=PICKLE, optimizer__pt=PICKLE, training_args__bin=PICKLE, rng_state__pth=PICKLE
    ),
    "custom_code": lambda folder: [config(auto_map=AUTO_MAP)(folder), write(evil__py=EVIL_PY)(folder)],
    "adapter_beside": write(adapter_config__json=ADAPTER, adapter_model__bin=PICKLE),
    "template_injection": write(chat_template__jinja=b"{{ ''.__class__.__mro__[1].__subclasses__() }}"),
}
ERRORS: dict[str, Change] = {
    "pickle_bin": without_weights(write(pytorch_model__bin=PICKLE)),
    "torch_zip_pickle": without_weights(write(pytorch_model__bin=zipped(), model__pt=zipped(), optimizer__pt=zipped())),
    "torch_legacy_tar": without_weights(write(pytorch_model__bin=tarred())),
    "yaml_config": lambda folder: (folder / "config.json").rename(folder / "config.yaml"),
    "st_empty": weights(lambda header, data: b""),
    "st_short": weights(lambda header, data: b"1234567"),
    "st_truncated": weights(lambda header, data: safetensors(header, data[: len(data) // 2])),
    "st_extra_bytes": weights(lambda header, data: safetensors(header, data + b"x" * 64)),
    "st_header_huge": weights(lambda header, data: safetensors(header, data, 1 << 62)),
    "st_header_not_json": weights(lambda header, data: safetensors(b"\xff\xfe{}")),
    "st_overlap": weights(overlapping),
    "st_offset_outside": weights(lambda header, data: tensors(header)[0].update(data_offsets=[0, 1 << 40])),
    "st_shape_overflow": weights(lambda header, data: tensors(header)[0].update(shape=[1 << 40, 1 << 40])),
    "st_dtype_unknown": weights(lambda header, data: tensors(header)[0].update(dtype="F99")),
    "st_dtype_other": weights(lambda header, data: tensors(header)[0].update(dtype="I32")),
    "st_deep_json": weights(lambda header, data: safetensors(b'{"__metadata__":' + DEEP + b"}")),
    "nan_weight": with_value(float("nan")),
    "inf_weight": with_value(float("inf")),
    "missing_tensor": weights(without_last),
    "unexpected_tensor": weights(with_stranger),
    "config_not_json": write(config__json=b"{"),
    "config_no_text": write(config__json=b"\xff\xfe{}"),
    "config_list": write(config__json=b"[]"),
    "config_deep": write(config__json=DEEP),
    "config_missing": lambda folder: (folder / "config.json").unlink(),
    "config_other_model": config(model_type="nobody"),
    "config_model_list": config(model_type=["vq"]),
    "config_type_of_weights": config(dtype="evil"),
    "config_kernels": config(attn_implementation="kernels-community/flash-attn"),
    "config_other_weights": config(transformers_weights="../../elsewhere.safetensors"),
    "config_quantized": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "weights_missing": without_weights(lambda folder: None),
    "weights_symlink": without_weights(lambda folder: os.symlink("/dev/zero", folder / "model.safetensors")),
    "weights_pipe": without_weights(lambda folder: os.mkfifo(folder / "model.safetensors")),
    "index_path_traversal": as_index("../../../../etc/passwd"),
    "index_absolute_path": as_index("/etc/passwd"),
    "index_of_pickles": as_index("model.bin", then=write(model__bin=PICKLE)),
}
EITHER: dict[str, Change] = {"st_duplicate_key": weights(with_key_twice)}
OURS: dict[str, Change] = {
    "config_unknown_field": config(surprise=1),
    "config_newer_version": config(format_version=999),
}
WRONG = (0, -5, "16", 16.5, True, [16], {"a": 1}, float("inf"), float("nan"), 10**400)


def of_sizes(kind: str) -> dict[str, Change]:
    """Sizes of one kind of model that are none, or that no weights have."""
    cases: dict[str, Change] = {}
    for name in SIZES[kind]:
        cases |= {f"bomb_{name}={value}": config(**{name: value}) for value in (BIG, 10**9, 10**7)}
        cases |= {f"bad_{name}={value!r:.20}": config(**{name: value}) for value in WRONG}
    first = SIZES[kind][0]
    if first != "image_size":  # on which no tensor of a VQGAN depends
        cases["config_mismatch"] = edited_config(lambda settings: settings.update({first: 2 * settings[first]}))
    return cases


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A small model of each kind, saved."""
    torch.manual_seed(0)
    return tmp_path_factory.mktemp("good")


@pytest.fixture
def saved(kind, good, request) -> Path:
    """Where a whole model of the kind lies."""
    folder = good / kind
    if not folder.exists():
        build(kind, request, folder)
    return folder


def build(kind: str, request: pytest.FixtureRequest, folder: Path) -> None:
    spans = {"max_length": 12, "span_length": 6, "hidden_channels": 8, "codebook_size": 4}
    if kind == "vqdraw_text":
        VQDrawForText(VQDrawTextConfig(num_stages=2, **spans)).save_pretrained(folder)
    elif kind == "vqvae_text":
        VQVAEForText(VQVAETextConfig(num_quantizers=2, code_dim=4, **spans)).save_pretrained(folder)
    elif kind == "student":
        sizes = {"image_size": 8, "num_stages": 4, "codebook_size": 8, "hidden_channels": 16, "vector_dim": 16}
        VQDrawStudent(VQDrawStudentConfig(**sizes)).save_pretrained(folder)
    elif kind == "classifier":
        config = CaptionClassifierConfig(num_channels=3, image_size=8, captions=["a", "b"])
        CaptionClassifier(config).save_pretrained(folder)
    elif kind == "clip":
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        text, vision = small | {"vocab_size": 300}, small | {"image_size": 8, "patch_size": 4}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
        text_tokenizer = SubwordTokenizer.train_bpe(["a red dog"], vocab_size=300).tokenizer
        ClipRanker(model, text_tokenizer, build_image_processor(image_size=8, num_channels=3)).save_pretrained(folder)
    elif kind in ("qwen3", "gpt2"):
        text_tokenizer = SubwordTokenizer.train_bpe(["a red dog"], vocab_size=300)
        processor = Tok2ImgProcessor.build(request.getfixturevalue("tiny_vqvae"), text_tokenizer, text_length=6)
        prior = build_prior(processor.layout, depth=1, architecture=kind)
        TextToImagePipeline(prior, processor).save_pretrained(folder)
    else:
        request.getfixturevalue(f"tiny_{kind}").save_pretrained(folder)


def high_water_mark() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def outcome(load: Callable[[Path], object], folder: Path) -> str:
    """What came of loading: "loaded", the error, or what is wrong with either."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = high_water_mark(), time.process_time()
    try:
        load(folder)
        result = "loaded"
    except (ValueError, OSError) as error:
        result = f"error: {error}"
        if len(str(error).splitlines()) != 1 or len(str(error)) > 1000:
            result = f"an error of other than one line: {error}"
    except BaseException as error:  # noqa: BLE001 - anything else is wrong
        result = f"{type(error).__name__}: {error}"
    if Path(MARK).exists():
        return f"its code ran; {result}"
    if time.process_time() - start > MOST_SECONDS:
        return f"it took {time.process_time() - start:.1f} s; {result}"
    if high_water_mark() - before > MOST_BYTES:
        return f"it took {high_water_mark() - before} bytes; {result}"
    return result


def complaints(kind: str, cases: dict[str, Change], expected: tuple[str, ...], saved: Path, place: Path) -> list[str]:
    """Cases that came to anything but what is expected."""
    wrong = []
    for name, change in cases.items():
        folder = place / f"{len(wrong)}-case"
        shutil.copytree(saved, folder)
        change(folder)
        result = outcome(LOADERS[kind], folder)
        if not result.startswith(expected):
            wrong.append(f"{name}: {result}")
        shutil.rmtree(folder)
    return wrong


@pytest.mark.parametrize("kind", LOADERS)
def test_hostile_folders_are_refused_and_good_ones_load(kind, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strange = OURS if kind not in OF_OTHERS else {}
    wrong = complaints(kind, LOADS, ("loaded",), saved, tmp_path)
    wrong += complaints(kind, ERRORS | strange | of_sizes(kind), ("error",), saved, tmp_path)
    wrong += complaints(kind, EITHER, ("loaded", "error"), saved, tmp_path)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", ["qwen3"])
def test_what_lies_in_the_folders_within_is_looked_at_alike(kind, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = {name: lambda folder, change=change: change(folder / "image_tokenizer") for name, change in ERRORS.items()}
    assert complaints(kind, image, ("error",), saved, tmp_path) == []
    layout: dict[str, Change] = {
        f"{name}={value!r:.20}": lambda folder, name=name, value=value: rewrite(folder / "layout.json", name, value)
        for name in ("text_vocab_size", "text_length", "num_codes", "codebook_size", "positions_per_codebook")
        for value in (*WRONG, BIG)
    }
    assert complaints(kind, layout, ("error",), saved, tmp_path) == []


def rewrite(path: Path, name: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


@pytest.mark.parametrize("kind", ["qwen3"])
@pytest.mark.parametrize("name", ["pickle_bin", "nan_weight", "config_deep", "st_truncated"])
def test_the_command_line_says_one_line_and_ends_with_2(kind, name, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "model")
    ERRORS[name](tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["tok2img", "generate", "a dog", "--model", "model", "--out", "x.png"])
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("tok2img: ") and "model" in line
    assert not Path(MARK).exists()
