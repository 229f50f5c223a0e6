"""Options that several commands share."""

from typing import Annotated

import typer

Data = Annotated[
    str,
    typer.Argument(
        help="Parquet file or folder, image folder with captions, webdataset tars, `save_to_disk` folder, hub name, or "
        "`shapes` for the built-in shapes."
    ),
]
Split = Annotated[str, typer.Option(help="Split of the data set.")]
ImageColumn = Annotated[
    str, typer.Option(help="Name of the column of images. Default: `image`, or the only column of images.")
]
CaptionColumn = Annotated[
    str, typer.Option(help="Name of the column of captions. Default: `caption`, `text`, or the only column of text.")
]
MaxSamples = Annotated[int, typer.Option(help="Use at most this many rows (0 = all).")]
OnError = Annotated[
    str,
    typer.Option(
        help="For rows that cannot be read. skip: leave them out and list them in manifest.json; raise: stop with an error."
    ),
]
Shard = Annotated[
    str,
    typer.Option(
        help="i/n: tokenize shard i of n, counted from 0, as one of n jobs with the same --out. "
        "Default: all of the data, or this process's shard under torchrun."
    ),
]
