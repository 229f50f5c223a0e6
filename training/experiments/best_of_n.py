"""Compare ways to choose the best of n images: the prior's own likelihood, and a CLIP ranker.

    python training/experiments/best_of_n.py MODEL RANKER VERIFIER DATA [NUM]

RANKER and VERIFIER are two models of `tok2img train-ranker`, trained with different seeds. The ranker chooses; the
verifier, which takes no part in the choice, retrieves each image's caption among all NUM. DATA is a Parquet file of
captioned images, whose first NUM distinct captions (default 200) are the prompts. Prints the fraction of images whose
own caption is retrieved first: for real images (the upper limit), then at n = 1, 4 and 16.
"""

import sys
from typing import Any

import torch

from tok2img import TextToImagePipeline
from tok2img.data.loading import load_captioned_images
from tok2img.pipelines.clip_ranker import ClipRanker, Ranker

CANDIDATES = (4, 16)  # values of n after 1


@torch.inference_mode()
def retrieval_accuracy(verifier: ClipRanker, captions: list[str], images: list[Any]) -> float:
    """Return the fraction of images whose nearest caption embedding, among all captions, is their own."""
    output = verifier.model(**verifier.encode_text(captions), pixel_values=verifier.pixel_values(images))
    nearest = (output.image_embeds @ output.text_embeds.T).argmax(dim=1)
    return (nearest == torch.arange(len(captions))).float().mean().item()


def first_distinct(rows: Any, num: int) -> tuple[list[str], list[Any]]:
    """Return the first `num` distinct captions and the first image of each."""
    # In reverse, so that of rows with equal captions the first is kept.
    first_row = {caption: row for row, caption in reversed(list(enumerate(rows["caption"][:])))}
    captions = sorted(first_row, key=first_row.__getitem__)[:num]
    return captions, [rows[first_row[caption]]["image"] for caption in captions]


def main(model: str, ranker: str, verifier: str, data: str, *, num: int) -> dict[str, list[float]]:
    """Generate, choose and verify; print a line for each way to choose."""
    pipeline = TextToImagePipeline.from_pretrained(model)
    clip_ranker, clip_verifier = ClipRanker.from_pretrained(ranker), ClipRanker.from_pretrained(verifier)
    captions, images = first_distinct(load_captioned_images(data, split="train"), num)
    accuracies = {"real images": [retrieval_accuracy(clip_verifier, captions, images)]}
    single = retrieval_accuracy(clip_verifier, captions, list(pipeline(captions, seed=0).images))
    rankers: dict[str, Ranker | None] = {"CLIP": clip_ranker, "likelihood": None}
    for name, used in rankers.items():
        outputs = (pipeline(captions, seed=0, best_of=n, ranker=used) for n in CANDIDATES)
        best = [retrieval_accuracy(clip_verifier, captions, list(output.images)) for output in outputs]
        accuracies[name] = [single, *best]
    for name, row in accuracies.items():
        print(f"{name:14}  {'  '.join(f'{accuracy:6.1%}' for accuracy in row)}", flush=True)
    return accuracies


if __name__ == "__main__":
    folders, rest = sys.argv[1:5], sys.argv[5:]
    if len(folders) != 4 or len(rest) > 1:
        sys.exit(__doc__)
    main(*folders, num=int(rest[0]) if rest else 200)
