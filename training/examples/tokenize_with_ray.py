"""Tokens by Ray Data, on whatever machines a Ray cluster has: captioned images in, Parquet of tokens out.

    pip install "tok2img[ray]"
    python training/examples/tokenize_with_ray.py DATA.parquet MODEL OUT [WORKERS]

MODEL is a trained folder, or one of tokens: its tokenizers are taken. Codes are those of `tok2img tokenize`; Ray streams the rows through,
so that neither images nor tokens have to fit into memory.
"""

import sys
from typing import Any

import numpy as np
import pyarrow
import ray.data  # pyright: ignore[reportMissingImports] - of the extra `ray`

from tok2img import Tok2ImgProcessor, TokenizeBatch

BATCH_SIZE = 256


class Tokenizing:
    """What every worker loads once and calls for each batch of rows."""

    def __init__(self, model: str):
        self.tokenize = TokenizeBatch(Tok2ImgProcessor.from_pretrained(model))

    def __call__(self, batch: dict[str, np.ndarray]) -> pyarrow.Table:
        """Columns `image` and `caption` -> plain lists `text_ids` `b t` and `image_codes` `b n`, which every reader of Parquet knows."""
        tokens = self.tokenize({name: column.tolist() for name, column in batch.items()})
        return pyarrow.table({name: list(column) for name, column in tokens.items()})


def main(data: str, model: str, out: str, num_workers: int) -> None:
    """Tokenize Parquet files by so many workers, which leave Ray a core to read with, and write as many files as it finds good."""
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
