"""Find the class of a saved tokenizer from its folder, as transformers' Auto classes do."""

from pathlib import Path

from .base import DiscreteTokenizer
from .loading import first_line, read_config, resolve_model_folder


def find_tokenizer_class(model_type: object) -> type[DiscreteTokenizer] | None:
    """Return the tokenizer class whose config has a `model_type`, or None.

    Searches all subclasses, so a tokenizer that is defined outside this package is found too.
    """
    waiting: list[type[DiscreteTokenizer]] = [DiscreteTokenizer]
    while waiting:
        candidate = waiting.pop()
        if candidate is not DiscreteTokenizer and getattr(candidate.config_class, "model_type", None) == model_type:
            return candidate
        waiting += candidate.__subclasses__()
    return None


def load_image_tokenizer(name: str | Path) -> DiscreteTokenizer:
    """Load a saved image tokenizer of any class.

    Args:
        name: Folder, or name of a hub repository.

    Returns:
        The tokenizer in eval mode.

    Raises:
        ValueError: If the folder does not hold an image tokenizer that can be loaded, see
            `DiscreteTokenizer.from_pretrained`.
    """
    try:
        folder = resolve_model_folder(name)
        model_type = read_config(folder).get("model_type")
    except OSError as error:
        raise ValueError(f"cannot load an image tokenizer from {name}: {first_line(error)}") from error
    model_class = find_tokenizer_class(model_type)
    if model_class is None or model_class.main_input_name != "pixel_values":
        found = model_type if model_class is None else model_class.__name__
        raise ValueError(f"{name} holds a {found}, not an image tokenizer")
    return model_class.from_pretrained(folder).eval()
