"""What a model folder holds, looked at before anything is built or allocated from it.

Settings are JSON and weights are safetensors, whose header tells names and shapes; a pickle is never opened, and nothing that settings can
ask of transformers makes it fetch or run code. What does not fit is a ValueError in one line that names the file.
"""

import json
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .validation import all_finite

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
TEXT_FILES = ("*.json", "*.txt", "*.model")
MODEL_FILES = (*TEXT_FILES, "*.safetensors")
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
MAX_JSON_BYTES = 2**28  # the tokenizer.json of a large vocabulary has some 20 MB
# With these keys transformers opens other files than ours, or fetches kernels of the hub and runs them.
UNSAFE_KEYS = ("attn_implementation", "experts_implementation", "quantization_config", "transformers_weights")
# What is built one by one, whatever weights there are: `num_hidden_layers`, `n_layer`, `num_labels` and their like.
COUNTED_PARTS = ("layers", "n_layer", "labels", "_heads", "n_head", "experts")
MOST_PARTS = 1024
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def resolve_model_folder(name: str | Path, *, subfolder: str = "", **options: Any) -> Path:
    """The model folder of that name, or where a download of the hub's repository of that name lies.

    Raises:
        ValueError: for what is no model folder. OSError: for what the hub does not give.
    """
    if not Path(name).is_dir():
        check_model_folder(name)
    folder = resolve_folder(name, **options) / subfolder
    check_model_folder(folder)
    return folder


def resolve_folder(name: str | Path, *, kinds: Sequence[str] = MODEL_FILES, **options: Any) -> Path:
    """The folder of that name, or where what a repository of the hub has of some kinds of files lies; OSError where it has none."""
    if Path(name).is_dir():
        return Path(name)
    options = {key: value for key, value in options.items() if key in DOWNLOAD_OPTIONS}
    return Path(snapshot_download(str(name), allow_patterns=list(kinds), **options))


def check_model_folder(folder: str | Path) -> None:
    """ValueError for a local path that cannot be a saved model, before transformers takes it for a hub name."""
    path = Path(folder)
    looks_local = path.is_absolute() or str(folder).startswith(".") or len(path.parts) != 2 or path.exists()
    if looks_local and not path.is_dir():
        raise ValueError(f"{folder} is not a model folder: no such folder")
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        hint = "; it holds a tokenizer of subwords, which has no model" if (path / TOKENIZER_FILE).is_file() else ""
        raise ValueError(f"{folder} is not a model folder: it has no {CONFIG_FILE}{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; ValueError for anything else, OSError where it cannot be read."""
    check_regular_file(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: more than {MAX_JSON_BYTES} bytes of settings")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def read_config(folder: str | Path) -> dict[str, Any]:
    """The settings of a model folder; code that it brings along is not for us, and left out.

    Raises:
        ValueError: for no JSON, a type of weights that is none, parts without number, and keys that make transformers open other files or
            run code.
    """
    path = Path(folder, CONFIG_FILE)
    config = read_json(path)
    config.pop("auto_map", None)
    if not isinstance(config.get("model_type", ""), str):
        raise ValueError(f"{path}: model_type must be a name, got {config['model_type']!r}")
    for key, value in iterate_settings(config):
        if key.removeprefix("_").removesuffix("_internal") in UNSAFE_KEYS and value is not None:
            raise ValueError(f"{path}: {key} is not taken from a file; remove it, and give it to the call that loads")
        if key in ("dtype", "torch_dtype") and value not in (None, *FLOATS.values()):
            raise ValueError(f"{path}: {key} must be one of {', '.join(FLOATS.values())}, got {value!r}")
        if isinstance(value, int) and value > MOST_PARTS and any(part in key for part in COUNTED_PARTS):
            raise ValueError(f"{path}: {key} is {value}, more than {MOST_PARTS}")
    return config


def iterate_settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a JSON object, at any depth."""
    waiting = [config]
    while waiting:
        some = waiting.pop()
        if isinstance(some, dict):
            yield from some.items()
        if isinstance(some, dict | list):
            waiting += some.values() if isinstance(some, dict) else some


def build_config(config_class: Any, settings: dict[str, Any], path: str | Path) -> Any:
    """The config of a class from what a file held; ValueError for settings that it does not take."""
    try:
        return config_class.from_dict(settings)
    # Of settings that nobody has thought of, each class of transformers makes something else.
    except Exception as error:
        raise ValueError(f"{path}: {first_line(error)}") from error


def tensor_headers(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor by its name, from the headers alone.

    Raises:
        ValueError: for a folder without safetensors, and files that are damaged or lie elsewhere.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in weight_files(Path(folder)):
        check_regular_file(file)
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it has no other way
                found |= {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}") from error
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder: one file, or those that its index names."""
    names = (WEIGHTS_FILE, f"diffusion_pytorch_{WEIGHTS_FILE}")
    for file in (folder / name for name in names):
        if file.exists():
            return [file]
    index = next((folder / f"{name}.index.json" for name in names if (folder / f"{name}.index.json").exists()), None)
    if index is None:
        raise ValueError(f"{folder} holds no {WEIGHTS_FILE}; weights of other kinds are not opened")
    parts = read_json(index).get("weight_map")
    parts = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else []
    if not parts or any(Path(part).name != part or not part.endswith(".safetensors") for part in parts):
        raise ValueError(f"{index} must name .safetensors files beside it, got {parts[:3]}")
    return [folder / part for part in parts]


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a folder whose headers are checked."""
    return {name: tensor for file in weight_files(Path(folder)) for name, tensor in load_file(file).items()}


def load_from_tensors(
    build: Callable[[Any], nn.Module], folder: Path, config: Any, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """A model of transformers and its report of loading.

    By its tensors, not by its folder: of a folder transformers opens whatever it knows, adapters and pickles too.

    Args:
        build: the model of a config.
        settings: for `from_pretrained`.

    Raises:
        ValueError: for a config that describes no model, or one that is larger than its weights, and tensors that are damaged.
    """
    empty: Any = build_on_meta(lambda: build(config), folder)
    check_size(empty, folder)
    try:
        return type(empty).from_pretrained(
            None,
            config=config,
            state_dict=read_tensors(folder),
            ignore_mismatched_sizes=True,  # they stand in the report then
            output_loading_info=True,
            **settings,
        )
    except Exception as error:  # as above
        raise ValueError(f"{folder}: {first_line(error)}") from error


def check_regular_file(path: Path) -> None:
    """ValueError for what is no file: a device may never end, and to open a pipe hangs."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file")


def build_on_meta(build: Callable[[], nn.Module], folder: str | Path) -> nn.Module:
    """A model without memory; ValueError where its settings describe none."""
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # as above
        raise ValueError(f"{Path(folder, CONFIG_FILE)} describes no model: {first_line(error)}") from error


def check_state_dict_matches(model: nn.Module, folder: str | Path) -> None:
    """ValueError for a folder whose tensors are not those of a model: absent, unknown, of another shape or kind."""
    held, wanted = tensor_headers(folder), model.state_dict()
    unfit = sorted(name for name, tensor in wanted.items() if not holds(held.get(name), tensor))
    unknown = sorted(held.keys() - wanted.keys())
    if unfit or unknown:
        what = f"missing or misshapen tensors {unfit[:3]}" if unfit else f"unknown tensors {unknown[:3]}"
        raise ValueError(f"{folder} does not hold this {type(model).__name__}: {what}")


def holds(header: tuple[str, tuple[int, ...]] | None, tensor: Tensor) -> bool:
    """Whether a tensor of a header may take the place of one in a model."""
    return header is not None and header[1] == tensor.shape and (header[0] in FLOATS) == tensor.is_floating_point()


def check_size(model: nn.Module, folder: str | Path) -> None:
    """ValueError for a folder that says it holds a model of more than twice the numbers that its weights have, or of another kind.

    For models whose tensors may have other names in their files; twice, for a head may be tied to the embeddings.
    """
    held = tensor_headers(folder)
    for name, tensor in model.state_dict().items():
        if name in held and (held[name][0] in FLOATS) != tensor.is_floating_point():
            raise ValueError(f"{folder}: the tensor {name} is of type {held[name][0]}")
    num_held = sum(torch.Size(shape).numel() for _, shape in held.values())
    num_wanted = sum(parameter.numel() for parameter in model.parameters())
    if num_wanted > 2 * num_held:
        raise ValueError(
            f"{Path(folder, CONFIG_FILE)} describes a model of {num_wanted} numbers, but its weights hold {num_held}"
        )


def missing_or_mismatched_keys(info: dict[str, Any]) -> list[str]:
    """Names of the tensors that loading did not fill, by the report of `from_pretrained`: those absent, then those of another shape."""
    return sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"])


def check_finite(model: nn.Module, name: str | Path) -> None:
    """ValueError for a model with a NaN or an infinity in its weights."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"{name}: the tensor {key} holds values that are not finite")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which is what a command line has room for; with those after it, if it announces them."""
    message = (str(error).strip() or type(error).__name__).replace(":\n", ": ")
    return " ".join(message.splitlines()[0].split())
