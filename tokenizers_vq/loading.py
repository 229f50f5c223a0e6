"""Safe reading of model folders: config.json and safetensors, checked before allocation.

A downloaded folder is untrusted input. Settings are JSON and weights are safetensors, whose header
holds names, dtypes and shapes. Pickles are never opened, and no setting can make transformers fetch
or run code. Whatever does not fit is a ValueError of one line that names the file.
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

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
TEXT_FILES = ("*.json", "*.txt", "*.model")
MODEL_FILES = (*TEXT_FILES, "*.safetensors")
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
MAX_JSON_BYTES = 2**28  # the tokenizer.json of a large vocabulary has about 20 MB
# With these keys transformers opens other files than ours, or downloads kernels from the hub and
# runs them.
UNSAFE_KEYS = ("attn_implementation", "experts_implementation", "quantization_config", "transformers_weights")
# Keys that count modules contain one of these, e.g. `num_hidden_layers`, `n_layer`, `num_labels`.
# transformers builds modules one by one, so a huge count would hang even without memory for the
# weights.
COUNTED_MODULES = ("layers", "n_layer", "labels", "_heads", "n_head", "experts")
MAX_MODULES = 1024
# Float dtypes by their names in safetensors headers, and in configs.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def resolve_model_folder(name: str | Path, *, subfolder: str = "", **options: Any) -> Path:
    """Return the local path of a model folder, downloaded from the hub if necessary.

    Args:
        name: Folder, or name of a hub repository.
        subfolder: Folder inside it that holds the model.
        options: Those of `DOWNLOAD_OPTIONS` are passed to the download, others are ignored.

    Raises:
        ValueError: If the folder is not a saved model.
        OSError: If the hub does not provide the repository.
    """
    if not Path(name).is_dir():
        check_model_folder(name)
    folder = resolve_folder(name, **options) / subfolder
    check_model_folder(folder)
    return folder


def resolve_folder(name: str | Path, *, kinds: Sequence[str] = MODEL_FILES, **options: Any) -> Path:
    """Return a local folder unchanged, or download a hub repository.

    Args:
        name: Folder, or name of a hub repository.
        kinds: Patterns of the files to download. Others, such as pickles, do not even reach the
            disk.
        options: Those of `DOWNLOAD_OPTIONS` are passed to the download, others are ignored.

    Raises:
        OSError: If the hub does not provide the repository.
    """
    if Path(name).is_dir():
        return Path(name)
    options = {key: value for key, value in options.items() if key in DOWNLOAD_OPTIONS}
    return Path(snapshot_download(str(name), allow_patterns=list(kinds), **options))


def check_model_folder(folder: str | Path) -> None:
    """Raise a ValueError for a local path that is not a saved model.

    Names that may be of a hub repository (`user/name`, with no such local path) pass. Without this
    check transformers would take a misspelled path for a hub name and report a failed download.
    """
    path = Path(folder)
    looks_local = path.is_absolute() or str(folder).startswith(".") or len(path.parts) != 2 or path.exists()
    if looks_local and not path.is_dir():
        raise ValueError(f"{folder} is not a model folder: no such folder")
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        hint = "; it holds a subword tokenizer, which has no model" if (path / TOKENIZER_FILE).is_file() else ""
        raise ValueError(f"{folder} is not a model folder: it has no {CONFIG_FILE}{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ValueError: If the file is too large, not valid JSON, or holds something other than an
            object.
        OSError: If the file cannot be read.
    """
    check_regular_file(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_JSON_BYTES} bytes of settings, got {path.stat().st_size}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the settings of a model folder, without `auto_map`, which names code in the repository.

    Raises:
        ValueError: If the file is not a JSON object, names an unknown dtype or asks for too many
            modules. Also for keys that make transformers open other files or run code.
        OSError: If the file cannot be read.
    """
    path = Path(folder, CONFIG_FILE)
    config = read_json(path)
    config.pop("auto_map", None)
    if not isinstance(config.get("model_type", ""), str):
        raise ValueError(f"{path}: model_type must be a name, got {config['model_type']!r}")
    for key, value in iterate_settings(config):
        # transformers also reads these keys in their private spellings.
        if key.removeprefix("_").removesuffix("_internal") in UNSAFE_KEYS and value is not None:
            raise ValueError(f"{path}: {key} is not taken from a file; remove it, and give it to the call that loads")
        if key in ("dtype", "torch_dtype") and value not in (None, *FLOATS.values()):
            raise ValueError(f"{path}: {key} must be one of {', '.join(FLOATS.values())}, got {value!r}")
        if isinstance(value, int) and value > MAX_MODULES and any(word in key for word in COUNTED_MODULES):
            raise ValueError(f"{path}: {key} is {value}, more than {MAX_MODULES}")
    return config


def iterate_settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of a JSON object, at any depth.

    Nested objects matter because composite configs (a text model in a vision model) pass them on.
    """
    waiting = [config]  # a stack, not recursion, which deep nesting would exhaust
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield from node.items()
        if isinstance(node, dict | list):
            waiting += node.values() if isinstance(node, dict) else node


def build_config(config_class: Any, settings: dict[str, Any], path: str | Path) -> Any:
    """Build a config from the settings of a file.

    Args:
        config_class: A class of transformers' configs.
        settings: Content of its config.json.
        path: The file, for the message.

    Raises:
        ValueError: For settings that the class does not accept.
    """
    try:
        return config_class.from_dict(settings)
    except Exception as error:  # each class of transformers raises its own types for bad settings
        raise ValueError(f"{path}: {first_line(error)}") from error


def tensor_headers(folder: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each tensor by its name, from the safetensors headers alone.

    Raises:
        ValueError: If the folder has no safetensors, or a file is damaged or outside the folder.
    """
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in weight_files(Path(folder)):
        check_regular_file(file)
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
                headers |= {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}") from error
    return headers


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder: a single one, or the shards that its index names.

    Raises:
        ValueError: If there are none, or the index names files of another kind or outside the
            folder.
    """
    names = (WEIGHTS_FILE, f"diffusion_pytorch_{WEIGHTS_FILE}")
    for file in (folder / name for name in names):
        if file.exists():
            return [file]
    index = next((folder / f"{name}.index.json" for name in names if (folder / f"{name}.index.json").exists()), None)
    if index is None:
        raise ValueError(f"{folder} holds no {WEIGHTS_FILE}; weights in other formats are not opened")
    weight_map = read_json(index).get("weight_map")
    shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    # A shard is a bare file name: with a path it could be any file of the machine.
    if not shards or any(Path(shard).name != shard or not shard.endswith(".safetensors") for shard in shards):
        raise ValueError(f"{index} must name .safetensors files in its own folder, got {shards[:3]}")
    return [folder / shard for shard in shards]


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a folder. Check the headers first: this allocates what they ask for."""
    return {name: tensor for file in weight_files(Path(folder)) for name, tensor in load_file(file).items()}


def load_from_tensors(
    build: Callable[[Any], nn.Module], folder: Path, config: Any, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """Load a model of transformers from the tensors of a folder.

    transformers gets the tensors, not the folder: in a folder it would open any file it knows,
    adapters and pickles too.

    Args:
        build: Makes the model from its config.
        folder: A folder that `resolve_model_folder` returned.
        config: The model's config.
        settings: Further arguments of `from_pretrained`.

    Returns:
        The model and transformers' loading report. Missing and misshapen tensors are in the report,
        not an error.

    Raises:
        ValueError: If the config does not describe a model, or one larger than its weights, or a
            tensor is damaged.
    """
    empty: Any = build_on_meta(lambda: build(config), folder)
    check_size(empty, folder)
    try:
        return type(empty).from_pretrained(
            None,
            config=config,
            state_dict=read_tensors(folder),
            ignore_mismatched_sizes=True,  # then they are in the report
            output_loading_info=True,
            **settings,
        )
    except Exception as error:  # as in `build_config`
        raise ValueError(f"{folder}: {first_line(error)}") from error


def check_regular_file(path: Path) -> None:
    """Raise a ValueError for a pipe or a device: opening or reading it may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file")


def build_on_meta(build: Callable[[], nn.Module], folder: str | Path) -> nn.Module:
    """Build a model on the meta device, without memory for its weights.

    Args:
        build: Makes the model.
        folder: Where its settings came from, for the message.

    Raises:
        ValueError: If the settings do not describe a model.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:  # as in `build_config`
        raise ValueError(f"{Path(folder, CONFIG_FILE)} does not describe a model: {first_line(error)}") from error


def check_state_dict_matches(model: nn.Module, folder: str | Path) -> None:
    """Raise a ValueError if a folder's tensors differ from a model's in name, shape or kind.

    The kind is float or integer; another float dtype is converted on loading.
    """
    headers, expected = tensor_headers(folder), model.state_dict()

    def header_matches(name: str, tensor: Tensor) -> bool:
        dtype, shape = headers.get(name, ("", None))
        return shape == tensor.shape and (dtype in FLOATS) == tensor.is_floating_point()

    mismatched = sorted(name for name, tensor in expected.items() if not header_matches(name, tensor))
    unknown = sorted(headers.keys() - expected.keys())
    if mismatched or unknown:
        what = f"missing or misshapen tensors {mismatched[:3]}" if mismatched else f"unknown tensors {unknown[:3]}"
        raise ValueError(f"{folder} does not hold this {type(model).__name__}: {what}")


def check_size(model: nn.Module, folder: str | Path) -> None:
    """Check that a folder's weights are large enough for the model that its config describes.

    For models whose tensors may have other names in their files, where `check_state_dict_matches`
    does not apply.

    Args:
        model: The model on the meta device.
        folder: Folder with its weights.

    Raises:
        ValueError: If the model has more than twice the numbers of its weights (a head may be tied
            to the embeddings, hence twice), or a tensor of the same name holds integers instead of
            floats.
    """
    headers = tensor_headers(folder)
    for name, tensor in model.state_dict().items():
        if name in headers and (headers[name][0] in FLOATS) != tensor.is_floating_point():
            raise ValueError(f"{folder}: the tensor {name} is of type {headers[name][0]}")
    num_stored = sum(torch.Size(shape).numel() for _, shape in headers.values())
    num_expected = sum(parameter.numel() for parameter in model.parameters())
    if num_expected > 2 * num_stored:
        raise ValueError(
            f"{Path(folder, CONFIG_FILE)} describes a model of {num_expected} numbers, "
            f"but its weights hold {num_stored}"
        )


def missing_or_mismatched_keys(info: dict[str, Any]) -> list[str]:
    """Return names of the tensors that loading did not fill: missing, then misshapen ones.

    Args:
        info: The loading report of `from_pretrained`.
    """
    return sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"])


def check_finite(model: nn.Module, name: str | Path) -> None:
    """Raise a ValueError if a weight is NaN or infinite; `name` is where it came from."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"{name}: the tensor {key} holds values that are not finite")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, joined with the next one if it ends in a colon.

    transformers' messages have many lines, and a command line shows one.
    """
    message = (str(error).strip() or type(error).__name__).replace(":\n", ": ")
    return " ".join(message.splitlines()[0].split())
