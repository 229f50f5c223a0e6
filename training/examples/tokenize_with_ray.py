"""Tokenize captioned images with Ray Data on a cluster: Parquet of images in, Parquet of tokens out.

    pip install "tok2img[ray]"
    python training/examples/tokenize_with_ray.py DATA.parquet MODEL OUT [WORKERS]

MODEL is the folder of a trained model or of tokens, whose tokenizers are used. The codes equal
those of `tok2img tokenize`.
Ray streams the rows, so neither images nor tokens have to fit into memory.
"""

import sys
from typing import Any

import numpy as np
import pyarrow
import ray.data  # pyright: ignore[reportMissingImports] - of the extra `ray`

from tok2img import Tok2ImgProcessor, TokenizeBatch

BATCH_SIZE = 256


class Tokenizing:
    """Stateful Ray worker: loads the tokenizers once, and is called for each batch of rows."""

    def __init__(self, model: str):
        self.tokenize = TokenizeBatch(Tok2ImgProcessor.from_pretrained(model))

    def __call__(self, batch: dict[str, np.ndarray]) -> pyarrow.Table:
        """Tokenize columns `image` and `caption` to `text_ids` `b t` and `image_codes` `b n`, as lists that any Parquet reader knows."""
        tokens = self.tokenize({name: column.tolist() for name, column in batch.items()})
        return pyarrow.table({name: list(column) for name, column in tokens.items()})


def main(data: str, model: str, out: str, num_workers: int) -> None:
    """Tokenize Parquet files.

    Args:
        data: Parquet file or folder.
        model: Folder with the tokenizers.
        out: Folder to write to; Ray chooses the number of files.
        num_workers: Number of workers. Leave Ray one core to read with.
    """
    rows: Any = ray.data.read_parquet(data, columns=["image", "caption"])
    tokens = rows.map_batches(
        Tokenizing,
        fn_constructor_args=(model,),
        batch_size=BATCH_SIZE,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
    )
    tokens.write_parquet(out)


if __name__ == "__main__":
    main(*sys.argv[1:4], num_workers=int(sys.argv[4]) if len(sys.argv) > 4 else 1)
