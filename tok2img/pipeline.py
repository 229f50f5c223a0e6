"""From a caption to pictures, from one folder."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .generation import Sampling, generate
from .prior import load_prior
from .processing import Tok2ImgProcessor

# The name under which generation_config.json carries our guidance. Its own `guidance_scale` would make stock `generate` add a guidance
# that takes the last token for the prompt.
GUIDANCE_KEY = "image_guidance_scale"

# Pictures as they are after so many codes, and which of all pictures they are.
Preview = Callable[[list[Image.Image], int, range], None]


@dataclass
class TextToImageOutput:
    """`images`, one after the other for each prompt in turn, as PIL or as `b h w c` floats; and their `codes` `b n`."""

    images: list[Image.Image] | np.ndarray
    codes: Tensor


class TextToImagePipeline:
    """A prior with its tokenizers: `TextToImagePipeline.from_pretrained(folder)("a red square").images`."""

    def __init__(self, prior: PreTrainedModel, processor: Tok2ImgProcessor):
        self.prior, self.processor = prior.eval(), processor

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a trained folder; ValueError for one that is not."""
        processor = Tok2ImgProcessor.from_pretrained(folder)
        return cls(load_prior(folder, processor.layout), processor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write prior, both tokenizers, layout and a model card: all that `from_pretrained` reads."""
        self.prior.save_pretrained(str(folder))
        self.processor.save_pretrained(folder)
        Path(folder, "README.md").write_text(model_card(self), encoding="utf-8")

    def to(self, device: str | torch.device) -> Self:
        """Move prior and image tokenizer to a device."""
        self.prior.to(device)  # type: ignore[reportArgumentType]
        self.processor.image_tokenizer.to(device)  # type: ignore[reportArgumentType]
        return self

    @property
    def default_sampling(self) -> Sampling:
        """What generation_config.json says, as measured for this model."""
        config = self.prior.generation_config
        return Sampling(
            guidance_scale=float(getattr(config, GUIDANCE_KEY, 1.0)),
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=config.top_k or 0,
            top_p=1.0 if config.top_p is None else config.top_p,
        )

    @default_sampling.setter
    def default_sampling(self, sampling: Sampling) -> None:
        config = self.prior.generation_config
        config.do_sample, config.temperature = True, sampling.temperature
        config.top_k, config.top_p = sampling.top_k, sampling.top_p
        setattr(config, GUIDANCE_KEY, sampling.guidance_scale)

    def __call__(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        batch_size: int = 64,
        progress: bool = False,
        preview_after: Collection[int] = (),
        on_preview: Preview | None = None,
    ) -> TextToImageOutput:
        """Draw pictures of captions.

        Args:
            guidance_scale, temperature, top_k, top_p: as in `Sampling`; None means the model's own default.
            negative_prompt: what guidance leads away from, instead of the empty caption.
            seed: picture i of a seed is the same in any batch; None draws a new seed.
            output_type: "pil", or "np" for `b h w c` floats in [0, 1].
            batch_size: pictures drawn at once, which bounds memory.
            preview_after: numbers of codes after which `on_preview` gets the pictures so far, and which of all pictures they are; only
                for codes that go from coarse to fine.

        Raises:
            ValueError: for no prompt, one that is not text, a setting out of range, or previews of codes that give none.
        """
        sampling = self._sampling(guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)
        captions = repeated(prompt, num_images_per_prompt)
        if output_type not in ("pil", "np"):
            raise ValueError(f'output_type must be "pil" or "np", got {output_type!r}')
        seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._check_previews(preview_after, on_preview)
        text_ids = self.processor.encode_text(captions)
        negative = self._negative(negative_prompt, sampling)
        images, codes = [], []
        with tqdm(total=len(captions), desc="generate", unit=" pictures", disable=not progress) as bar:
            for rows in batches(len(captions), batch_size):
                on_code = partial(self._preview, rows, preview_after, on_preview) if on_preview else None
                codes.append(self._draw(text_ids[rows.start : rows.stop], sampling, seed, rows, negative, on_code))
                images.extend(self.processor.decode_images(codes[-1]))
                bar.update(len(rows))
        pictures = images if output_type == "pil" else np.stack([as_array(image) for image in images])
        return TextToImageOutput(pictures, torch.cat(codes))

    def _negative(self, negative_prompt: str | None, sampling: Sampling) -> Tensor | None:
        if negative_prompt is None:
            return None
        if sampling.guidance_scale == 1:
            warnings.warn("negative_prompt has no effect at guidance_scale 1", stacklevel=3)
        return self.processor.encode_text([negative_prompt])

    def _check_previews(self, preview_after: Collection[int], on_preview: Preview | None) -> None:
        tokenizer = self.processor.image_tokenizer
        if bool(preview_after) != (on_preview is not None):
            raise ValueError("preview_after and on_preview go together, got one of them")
        if preview_after and not tokenizer.prefixes_decode:
            raise ValueError(f"the first codes of a {type(tokenizer).__name__} give no picture to preview")
        if preview_after and not set(preview_after) <= set(range(1, tokenizer.num_codes + 1)):
            raise ValueError(f"preview_after must lie in 1..{tokenizer.num_codes}, got {sorted(preview_after)}")

    def _preview(
        self, rows: range, preview_after: Collection[int], on_preview: Preview, position: int, codes: Tensor
    ) -> None:
        """Hand out the pictures so far, where they are wanted."""
        if position + 1 in preview_after:
            on_preview(self.processor.decode_images(codes[:, : position + 1]), position + 1, rows)

    def _draw(
        self,
        text_ids: Tensor,
        sampling: Sampling,
        seed: int,
        rows: range,
        negative: Tensor | None,
        on_code: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        return generate(
            self.prior,
            self.processor.layout,
            text_ids,
            sampling=sampling,
            seed=seed,
            indices=rows,
            negative_text_ids=None if negative is None else negative.expand(len(rows), -1),
            on_code=on_code,
        ).cpu()

    def _sampling(self, **chosen: Any) -> Sampling:
        default = self.default_sampling
        return Sampling(**{name: getattr(default, name) if value is None else value for name, value in chosen.items()})


def repeated(prompt: str | list[str], num_images_per_prompt: int) -> list[str]:
    """Each prompt as often as pictures are wanted of it; ValueError for none, or for one that is not text."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(f"prompt must be a caption or a list of captions, got {prompt!r}")
    for caption in prompts:
        if not isinstance(caption, str):
            raise ValueError(f"a prompt must be text, got {type(caption).__name__}: {caption!r}")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
    return [caption for caption in prompts for _ in range(num_images_per_prompt)]


def batches(num: int, size: int) -> Iterator[range]:
    """`0..num-1` in runs of nearly equal length, none longer than `size`."""
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    length = math.ceil(num / math.ceil(num / size))
    return (range(first, min(first + length, num)) for first in range(0, num, length))


def as_array(image: Image.Image) -> np.ndarray:
    """A picture as `h w c` floats in [0, 1]."""
    array = np.asarray(image, dtype=np.float32) / 255
    return array[..., None] if array.ndim == 2 else array


def model_card(pipeline: TextToImagePipeline) -> str:
    """README.md of a trained folder, as the hub reads it."""
    layout, sampling = pipeline.processor.layout, pipeline.default_sampling
    tokenizer = type(pipeline.processor.image_tokenizer).__name__
    return f"""---
library_name: tok2img
pipeline_tag: text-to-image
tags: [tok2img, text-to-image, {pipeline.prior.config.model_type}]
---
Draws pictures from captions: a {pipeline.prior.config.model_type} prior over {layout.num_codes} codes of a {tokenizer} with
{layout.codebook_size} options each.

```python
from tok2img import TextToImagePipeline

pipe = TextToImagePipeline.from_pretrained("path/to/this/folder")
pipe("a caption like those it was trained on", num_images_per_prompt=4, seed=0).images[0].save("picture.png")
```

Defaults: guidance_scale {sampling.guidance_scale:g}, temperature {sampling.temperature:g}, top_k {sampling.top_k}, top_p
{sampling.top_p:g}. The prior alone loads with `AutoModelForCausalLM.from_pretrained`.
"""
