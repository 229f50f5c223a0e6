"""Output of the commands."""

import os


def print_on_rank0(text: str) -> None:
    """Print once, on rank 0, when torchrun starts several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def silence_transformers() -> None:
    """Turn off the progress bars and warnings of transformers, next to which our own would be lost."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
