"""What the buttons of the web page do: an image file or a caption in, images or text out. Knows no page."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image

from tokenizers_vq.images.processing import images_from_pixels

from ..data.images import load_pixels
from ..generation.sampling import Guidance, random_seed
from ..pipelines.image_to_text import ImageToTextPipeline
from ..pipelines.text_to_image import TextToImagePipeline
from ..visualization.tokenizer_sheets import images_by_stage

MOST_STAGES = 12
FINISHED = object()
Images = list[Image.Image]


@dataclass
class Handlers:
    """Each answer comes in turns: what is known so far, then more. A ValueError is for whoever asked.

    Settings that are None or "" are as the model has them; guidance and seed come as they are typed.
    """

    pipeline: TextToImagePipeline

    def draw(
        self,
        caption: str,
        num_images: int = 4,
        guidance_scale: str = "",
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: str = "",
        best_of: int = 1,
        image: str | None = None,
        keep: int = 0,
    ) -> Iterator[tuple[Images, str]]:
        """Images of a caption, sharper every time where codes go from coarse to fine, and the seed that draws them again.

        Args:
            image, keep: a file to complete or to vary, and how many of its first codes stay.
        """
        settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "best_of": best_of}
        settings |= {"guidance_scale": guidance_of(guidance_scale), "num_images_per_prompt": num_images}
        if keep or image is not None:
            settings |= {"image": self._fitted(image), "keep": keep}
        elif not caption.strip():
            raise ValueError("the caption is empty: say what the images are to show")
        settings |= {"seed": seed_of(seed), "preview_after": self._previews(keep, best_of)}
        for samples in stream_results(partial(self._draw, caption, settings)):
            yield samples, str(settings["seed"])

    def seen(self, image: str | None) -> Iterator[Image.Image]:
        """An image as the model sees it."""
        yield self._fitted(image)

    def codes(self, image: str | None) -> Iterator[tuple[list[tuple[Image.Image, str]], str]]:
        """What the first of an image's codes show and what more of them do, and the codes."""
        processor = self.pipeline.processor
        codes = processor.encode_images([needed(image)])
        stages = images_by_stage(processor.image_tokenizer, codes)
        shown = torch.linspace(0, len(stages) - 1, min(len(stages), MOST_STAGES)).round().int().tolist()
        labelled = [(stages[each][0], f"stage {each + 1} of {len(stages)}") for each in shown]
        yield labelled, " ".join(map(str, codes[0].tolist()))

    def caption(self, image: str | None) -> Iterator[str]:
        """The likeliest caption of an image."""
        yield ImageToTextPipeline(self.pipeline.prior, self.pipeline.processor)(needed(image))[0]

    def _fitted(self, image: str | None) -> Image.Image:
        """An image file as the tokenizer reads it: upright, cut to a square, of its size."""
        return images_from_pixels(load_pixels([needed(image)], self.pipeline.processor.image_tokenizer))[0]

    def _previews(self, keep: int, best_of: int) -> range:
        """Numbers of codes, more than are kept, after which there is an image to show and the last is still to come."""
        tokenizer = self.pipeline.processor.image_tokenizer
        return range(keep + 1, tokenizer.num_codes) if tokenizer.supports_prefix_decoding and best_of == 1 else range(0)

    def _draw(self, caption: str, settings: dict[str, Any], show: Callable[[Images], None]) -> Images:
        """What the pipeline draws; its previews, where there are any, are shown on the way."""
        on_preview = (lambda samples, *_: show(samples)) if settings["preview_after"] else None
        images: Any = self.pipeline(caption, on_preview=on_preview, **settings).images
        return images


def guidance_of(text: str) -> Guidance | None:
    """A guidance as it is typed, a number or several; None for none."""
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"guidance must be a number, or several with commas between, got {text!r}") from None
    return numbers if len(numbers) > 1 else next(iter(numbers), None)


def as_text(guidance: Guidance) -> str:
    """A guidance as it is typed: a number, or several for a schedule."""
    numbers = guidance if isinstance(guidance, Sequence) else [guidance]
    return ", ".join(f"{number:g}" for number in numbers)


def seed_of(text: str) -> int:
    """A seed as it is typed, or a new one."""
    if not text.strip():
        return random_seed()
    if not text.strip().isdecimal():
        raise ValueError(f"a seed must be a whole number of at least 0, got {text!r}")
    return int(text)


def needed(image: str | None) -> str:
    """The file, if there is one."""
    if image is None:
        raise ValueError("there is no image: choose one, or drop one into the field")
    return image


def stream_results(work: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
    """What `work` hands to its argument, while it is at it, and what it returns in the end."""
    results: SimpleQueue[Any] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work, results.put)
        running.add_done_callback(lambda _: results.put(FINISHED))
        yield from iter(results.get, FINISHED)
        yield running.result()
