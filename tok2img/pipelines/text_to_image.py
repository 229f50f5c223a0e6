"""From a caption to images, from one folder."""

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..generation.generate import generate, max_batch_size
from ..generation.likelihood import argmax_per_group, pointwise_mutual_information
from ..generation.sampling import Guidance, Sampling, random_seed, slerp_noise, uniform_noise
from ..tokenization.processor import Tok2ImgProcessor
from ..visualization.image_sheets import captioned_sheet, save_image
from .clip_ranker import Ranker
from .image_conditioning import Keep, encode_init_images, keep_mask
from .loading import batches, load_components, move
from .model_card import SAMPLES_FILE, model_card

# The name under which generation_config.json carries our guidance. Its own `guidance_scale` would make stock `generate` add a guidance
# that takes the last token for the prompt.
GUIDANCE_KEY = "image_guidance_scale"
DROPOUT_KEY = "image_caption_dropout"
DECODED_PIXELS = 2**20
# Images as they are after so many codes, and which of all images they are.
Preview = Callable[[list[Image.Image], int, range], None]


@dataclass
class TextToImageOutput:
    """`images`, one after the other for each prompt in turn, as PIL or as `b h w c` floats; their `codes` `b n`; and with `best_of`, the
    `scores` `b` by which they were chosen."""

    images: list[Image.Image] | np.ndarray
    codes: Tensor
    scores: Tensor | None = None


class TextToImagePipeline:
    """A prior with its tokenizers: `TextToImagePipeline.from_pretrained(folder)("a red square").images`."""

    def __init__(self, prior: PreTrainedModel, processor: Tok2ImgProcessor):
        self.prior, self.processor = prior.eval(), processor
        self._warned = False

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Load a trained folder, or one of the hub by its name; ValueError for what is neither."""
        return cls(*load_components(name))

    def save_pretrained(
        self, folder: str | Path, *, sample_prompts: list[str] | None = None, name: str | None = None
    ) -> None:
        """Write prior, both tokenizers, layout and a model card: all that `from_pretrained` reads.

        Args:
            sample_prompts: captions to draw for the card, into `samples.png`.
            name: what the card's code loads, the folder when left out.
        """
        self.prior.save_pretrained(str(folder))
        self.processor.save_pretrained(folder)
        if sample_prompts:
            images: Any = self(sample_prompts, seed=0).images
            save_image(captioned_sheet(images, sample_prompts), Path(folder, SAMPLES_FILE))
        card = model_card(self, name=name or str(folder), prompts=sample_prompts)
        Path(folder, "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload of tok2img",
        sample_prompts: list[str] | None = None,
    ) -> str:
        """Upload the whole folder to the hub, in a repository that is made where there is none; returns its address."""
        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, sample_prompts=sample_prompts, name=repo_id)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        return str(address)

    def to(self, *place: str | torch.device | torch.dtype) -> Self:
        """Move prior and image tokenizer to a device, and the prior to a type: `to("cuda", torch.bfloat16)`."""
        move(self.prior, self.processor, *place)
        return self

    @property
    def default_sampling(self) -> Sampling:
        """What generation_config.json says, as measured for this model; ValueError when set to a guidance that is a function."""
        config = self.prior.generation_config
        return Sampling(
            guidance_scale=getattr(config, GUIDANCE_KEY, 1.0),
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=config.top_k or 0,
            top_p=1.0 if config.top_p is None else config.top_p,
        )

    @default_sampling.setter
    def default_sampling(self, sampling: Sampling) -> None:
        if callable(sampling.guidance_scale):
            raise ValueError("a guidance_scale that is a function cannot be saved: give numbers")
        config = self.prior.generation_config
        config.do_sample, config.temperature = True, sampling.temperature
        config.top_k, config.top_p = sampling.top_k, sampling.top_p
        scale = sampling.guidance_scale
        setattr(config, GUIDANCE_KEY, list(scale) if isinstance(scale, tuple) else scale)

    @property
    def caption_dropout(self) -> float | None:
        """Share of captions that were hidden in training, as generation_config.json says; None where it does not."""
        return getattr(self.prior.generation_config, DROPOUT_KEY, None)

    @caption_dropout.setter
    def caption_dropout(self, share: float) -> None:
        setattr(self.prior.generation_config, DROPOUT_KEY, share)

    def __call__(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        guidance_scale: Guidance | None = None,
        negative_prompt: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | tuple[int, int] | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        progress: bool = False,
        preview_after: Collection[int] = (),
        on_preview: Preview | None = None,
        image: Any = None,
        keep: Keep | None = None,
        best_of: int = 1,
        ranker: Ranker | None = None,
        compile: bool = False,
    ) -> TextToImageOutput:
        """Draw images of captions.

        Args:
            guidance_scale, temperature, top_k, top_p: as in `Sampling`; None means the model's own default.
            negative_prompt: what guidance leads away from, instead of the empty caption.
            seed: image i of a seed is the same in any batch; None draws a new seed. Two seeds: the images of each prompt lead from the
                one that the first seed draws to the one of the second.
            output_type: "pil", or "np" for `b h w c` floats in [0, 1].
            batch_size: images drawn at once; None takes as many as fit, see `max_batch_size`.
            preview_after: numbers of codes after which `on_preview` gets the images so far, and which of all images they are; only
                for codes that go from coarse to fine.
            image: an image to complete or to vary, of the model's own size, or one for each prompt, or codes `n` or `b n`.
            keep: what stays of `image`: the first so many codes, "top" for the upper half of a grid, or a truth value for each code. Codes
                that are drawn follow those before them alone.
            best_of: draw so many candidates for each image and keep the one of the highest score.
            ranker: gives captions and candidates their scores, such as a `ClipRanker`; None takes the prior's own `pointwise_mutual_information`.
            compile: as in `generate`.

        Raises:
            ValueError: for no prompt, one that is not text, a setting out of range, previews of codes that give none, or an image of
                another size.
        """
        sampling = self._sampling(guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)
        captions = repeated(prompt, num_images_per_prompt)
        if output_type not in ("pil", "np"):
            raise ValueError(f'output_type must be "pil" or "np", got {output_type!r}')
        self._check_previews(preview_after, on_preview)
        self._warn_of_guidance(sampling, negative_prompt)
        kept = None if keep is None else keep_mask(keep, self.processor.image_tokenizer)
        self._check_ranking(best_of, ranker, seed=seed, previews=bool(preview_after))
        captions = [caption for caption in captions for _ in range(best_of)]
        per_prompt = num_images_per_prompt * best_of
        inputs = {
            "given_codes": self._given(image, keep, len(captions), per_prompt),
            "text_ids": self.processor.encode_text(captions),
            "uniforms": self._streams(seed, len(captions), per_prompt),
            "negative_text_ids": self._negative(negative_prompt, len(captions)),
        }
        images, codes, scores = [], [], []
        with tqdm(total=len(captions) // best_of, desc="generate", unit=" images", disable=not progress) as bar:
            for rows in batches(len(captions), self._batch_size(batch_size, sampling), multiple=best_of):
                on_code = partial(self._preview, rows, preview_after, on_preview) if on_preview else None
                drawn = self._draw(rows, inputs, sampling=sampling, keep=kept, on_code=on_code, compile=compile)
                if best_of > 1:
                    score = self._scores(rows, captions, inputs["text_ids"], drawn, ranker)
                    best = argmax_per_group(score, best_of)
                    drawn, scores = drawn[best], [*scores, score[best]]
                codes.append(drawn)
                images.extend(self._decode(drawn))
                bar.update(len(drawn))
        results = images if output_type == "pil" else np.stack([as_array(each) for each in images])
        return TextToImageOutput(results, torch.cat(codes), torch.cat(scores) if scores else None)

    def _check_ranking(self, best_of: int, ranker: Ranker | None, *, seed: Any, previews: bool) -> None:
        if best_of < 1:
            raise ValueError(f"best_of must be at least 1, got {best_of}")
        if best_of == 1 and ranker is not None:
            raise ValueError("a ranker has nothing to choose from: give best_of too")
        if best_of > 1 and (previews or isinstance(seed, tuple)):
            raise ValueError("best_of goes neither with previews nor with two seeds")

    def _scores(
        self, rows: range, captions: list[str], text_ids: Tensor, codes: Tensor, ranker: Ranker | None
    ) -> Tensor:
        """How well the candidates of some rows show their captions, `b`."""
        some = slice(rows.start, rows.stop)
        if ranker is None:
            return pointwise_mutual_information(self.prior, self.processor.layout, text_ids[some], codes)
        return torch.as_tensor(ranker(captions[some], self._decode(codes)))

    def _draw(self, rows: range, inputs: dict[str, Any], **settings: Any) -> Tensor:
        """Codes `b n` of some rows of the inputs, on the CPU."""
        some = {name: given[rows.start : rows.stop] for name, given in inputs.items() if given is not None}
        return generate(self.prior, self.processor.layout, **some, **settings).cpu()

    def _streams(self, seed: int | tuple[int, int] | None, num: int, per_prompt: int) -> Tensor:
        """Uniform numbers `b n` of a seed, of a new one, or of the way between two."""
        num_codes = self.processor.layout.num_codes
        if seed is None:
            seed = random_seed()
        if isinstance(seed, int | Integral):
            return uniform_noise(int(seed), range(num), num_codes)
        if len(seed) != 2:
            raise ValueError(f"seed must be a whole number, or two to go between, got {seed!r}")
        ends = [uniform_noise(int(each), range(num // per_prompt), num_codes) for each in seed]
        return torch.cat([slerp_noise(first, last, per_prompt) for first, last in zip(*ends, strict=True)])

    def _warn_of_guidance(self, sampling: Sampling, negative_prompt: str | None) -> None:
        if sampling.guidance_scale == 1:
            if negative_prompt is not None:
                warnings.warn("negative_prompt has no effect at guidance_scale 1", stacklevel=3)
        elif self.caption_dropout == 0 and not self._warned:
            self._warned = True
            reason = "no caption was hidden in training (caption_dropout 0)"
            warnings.warn(f"guidance has nothing to compare with: {reason}; use guidance_scale 1", stacklevel=3)

    def _negative(self, negative_prompt: str | None, num: int) -> Tensor | None:
        return None if negative_prompt is None else self.processor.encode_text([negative_prompt]).expand(num, -1)

    def _given(self, image: Any, keep: Keep | None, num: int, per_prompt: int) -> Tensor | None:
        """Codes `b n` of the images to keep codes of, where there are any."""
        if (image is None) != (keep is None):
            raise ValueError("image and keep go together: keep says which codes of the image stay")
        if image is None:
            return None
        return encode_init_images(image, self.processor, num // per_prompt).repeat_interleave(per_prompt, dim=0)

    def _batch_size(self, batch_size: int | None, sampling: Sampling) -> int:
        if batch_size is not None:
            return batch_size
        return max_batch_size(self.prior, self.processor.layout, guidance=sampling.guidance_scale != 1)

    def _decode(self, codes: Tensor) -> list[Image.Image]:
        """Codes `b n` -> images, so many at once that large ones fit in memory too."""
        config: Any = self.processor.image_tokenizer.config
        runs = codes.split(max(1, DECODED_PIXELS // config.image_size**2))
        return [image for run in runs for image in self.processor.decode_images(run)]

    def _check_previews(self, preview_after: Collection[int], on_preview: Preview | None) -> None:
        tokenizer = self.processor.image_tokenizer
        if bool(preview_after) != (on_preview is not None):
            raise ValueError("preview_after and on_preview go together, got one of them")
        if preview_after and not tokenizer.supports_prefix_decoding:
            raise ValueError(f"the first codes of a {type(tokenizer).__name__} give no image to preview")
        if preview_after and not set(preview_after) <= set(range(1, tokenizer.num_codes + 1)):
            raise ValueError(f"preview_after must lie in 1..{tokenizer.num_codes}, got {sorted(preview_after)}")

    def _preview(
        self, rows: range, preview_after: Collection[int], on_preview: Preview, position: int, codes: Tensor
    ) -> None:
        """Hand out the images so far, where they are wanted."""
        if position + 1 in preview_after:
            on_preview(self._decode(codes[:, : position + 1]), position + 1, rows)

    def _sampling(self, **chosen: Any) -> Sampling:
        default = self.default_sampling
        return Sampling(**{name: getattr(default, name) if value is None else value for name, value in chosen.items()})


def repeated(prompt: str | list[str], num_images_per_prompt: int) -> list[str]:
    """Each prompt as often as images are wanted of it; ValueError for none, or for one that is not text."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts:
        raise ValueError(f"prompt must be a caption or a list of captions, got {prompt!r}")
    for caption in prompts:
        if not isinstance(caption, str):
            raise ValueError(f"a prompt must be text, got {type(caption).__name__}: {caption!r}")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
    return [caption for caption in prompts for _ in range(num_images_per_prompt)]


def as_array(image: Image.Image) -> np.ndarray:
    """An image as `h w c` floats in [0, 1]."""
    array = np.asarray(image, dtype=np.float32) / 255
    return array[..., None] if array.ndim == 2 else array
