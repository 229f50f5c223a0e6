"""How often an image shows its caption when it is the best of n, by the prior's own likelihood and by a CLIP ranker.

    python training/experiments/best_of_n.py MODEL RANKER JUDGE DATA [NUM]

RANKER and JUDGE are two models of `tok2img train-ranker`, of different seeds: one chooses, and the other, which took no part in the
choice, says whether of all NUM captions it finds an image's own first. DATA is a Parquet file of captioned images, whose first NUM
distinct captions are drawn; the real images come first, as what can be reached. Prints shares of images found, at n = 1, 4 and 16.
"""

import sys
from typing import Any

import torch

from tok2img import TextToImagePipeline
from tok2img.data.loading import load_captioned_images
from tok2img.pipelines.clip_ranker import ClipRanker, Ranker

CANDIDATES = (4, 16)  # beside one alone


@torch.inference_mode()
def share_found(judge: ClipRanker, captions: list[str], images: list[Any]) -> float:
    """Share of the images to whose view the view of their own caption is nearest, of those of all captions."""
    output = judge.model(**judge.encode_text(captions), pixel_values=judge.pixel_values(images))
    found = (output.image_embeds @ output.text_embeds.T).argmax(dim=1)
    return (found == torch.arange(len(captions))).float().mean().item()


def distinct(rows: Any, num: int) -> tuple[list[str], list[Any]]:
    """The first `num` captions that are no repeats, and their images."""
    first_row = {caption: row for row, caption in reversed(list(enumerate(rows["caption"][:])))}
    captions = sorted(first_row, key=first_row.__getitem__)[:num]
    return captions, [rows[first_row[caption]]["image"] for caption in captions]


def main(model: str, ranker: str, judge: str, data: str, *, num: int) -> dict[str, list[float]]:
    """Draw, choose, judge; print a line for each way to choose."""
    pipeline = TextToImagePipeline.from_pretrained(model)
    chooser, discriminator_loss = ClipRanker.from_pretrained(ranker), ClipRanker.from_pretrained(judge)
    captions, images = distinct(load_captioned_images(data, split="train"), num)
    shares = {"real images": [share_found(discriminator_loss, captions, images)]}
    rankers: dict[str, Ranker | None] = {"CLIP": chooser, "likelihood": None}
    alone = share_found(discriminator_loss, captions, list(pipeline(captions, seed=0).images))
    for name, used in rankers.items():
        drawn = (pipeline(captions, seed=0, best_of=n, ranker=used) for n in CANDIDATES)
        shares[name] = [alone, *(share_found(discriminator_loss, captions, list(each.images)) for each in drawn)]
    for name, each in shares.items():
        print(f"{name:14}  {'  '.join(f'{share:6.1%}' for share in each)}", flush=True)
    return shares


if __name__ == "__main__":
    folders, rest = sys.argv[1:5], sys.argv[5:]
    if len(folders) != 4 or len(rest) > 1:
        sys.exit(__doc__)
    main(*folders, num=int(rest[0]) if rest else 200)
