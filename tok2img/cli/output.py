"""What commands print."""

import os


def say(text: str) -> None:
    """Print, in the first of the processes that torchrun starts."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def silence_transformers() -> None:
    """Our own progress bars say what goes on; those of transformers for loading a small file do not."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
