"""Find the class of a saved tokenizer by its folder."""

from pathlib import Path

from .base import DiscreteTokenizer
from .loading import first_line, read_config, resolve_model_folder


def find_tokenizer_class(model_type: object) -> type[DiscreteTokenizer] | None:
    """The class whose configs are of this type; None where there is none."""
    waiting: list[type[DiscreteTokenizer]] = [DiscreteTokenizer]
    while waiting:
        some = waiting.pop()
        if some is not DiscreteTokenizer and getattr(some.config_class, "model_type", None) == model_type:
            return some
        waiting += some.__subclasses__()
    return None


def load_image_tokenizer(folder: str | Path) -> DiscreteTokenizer:
    """Load any saved image tokenizer; ValueError for a folder or hub name that holds none."""
    try:
        place = resolve_model_folder(folder)
        model_type = read_config(place).get("model_type")
    except OSError as error:
        raise ValueError(f"cannot load an image tokenizer from {folder}: {first_line(error)}") from error
    model_class = find_tokenizer_class(model_type)
    if model_class is None or model_class.main_input_name != "pixel_values":
        kind = model_type if model_class is None else model_class.__name__
        raise ValueError(f"{folder} holds a {kind}, not an image tokenizer")
    return model_class.from_pretrained(place).eval()
