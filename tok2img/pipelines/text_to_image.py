"""Generate images from captions with a trained model."""

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
from ..visualization.image_sheets import make_captioned_sheet, save_image
from .batching import batches, expand_prompts
from .clip_ranker import Ranker
from .image_conditioning import Keep, encode_init_images, keep_mask
from .loading import load_components, move_to
from .model_card import SAMPLES_FILE, model_card

# Key of ours in generation_config.json.
DROPOUT_KEY = "image_caption_dropout"
# Pixels decoded in one batch, so that large images fit in memory too.
DECODED_PIXELS = 2**20
# Called with the images so far, the number of codes they are decoded from, and their rows among all images.
Preview = Callable[[list[Image.Image], int, range], None]


@dataclass
class TextToImageOutput:
    """Output of `TextToImagePipeline`.

    Attributes:
        images: PIL images, or floats in [0, 1], `b h w c`. The images of a prompt are adjacent.
        codes: The image codes, `b n`.
        scores: The ranker's scores of the images, `b`; None unless `best_of` is above 1.
    """

    images: list[Image.Image] | np.ndarray
    codes: Tensor
    scores: Tensor | None = None


class TextToImagePipeline:
    """A prior and its tokenizers, which together generate images from captions.

    Args:
        prior: A causal language model that fits the processor's layout.
        processor: The processor with text and image tokenizer.

    Example:
        >>> from tok2img import SubwordTokenizer, TextToImagePipeline, Tok2ImgProcessor, build_prior
        >>> from tokenizers_vq import VQVAE, VQVAEConfig
        >>> image_tokenizer = VQVAE(VQVAEConfig(image_size=8, hidden_channels=16, codebook_size=16)).eval()
        >>> text_tokenizer = SubwordTokenizer.train_bpe(["a red square"], vocab_size=300)
        >>> processor = Tok2ImgProcessor.build(image_tokenizer, text_tokenizer, text_length=6)
        >>> pipe = TextToImagePipeline(build_prior(processor.layout, depth=1), processor)
        >>> output = pipe("a red square", num_images_per_prompt=2, seed=0)
        >>> output.images[0].size, output.codes.shape
        ((8, 8), torch.Size([2, 4]))
    """

    def __init__(self, prior: PreTrainedModel, processor: Tok2ImgProcessor):
        self.prior, self.processor = prior.eval(), processor
        self._warned = False

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Load a trained model.

        Args:
            name: A local folder, or the name of a repository on the hub.

        Raises:
            ValueError: If `name` is neither, or the model in it is incomplete.
        """
        return cls(*load_components(name))

    def save_pretrained(
        self, folder: str | Path, *, sample_prompts: list[str] | None = None, name: str | None = None
    ) -> None:
        """Write prior, both tokenizers, layout and a model card: all that `from_pretrained` reads.

        Args:
            folder: Where to write; created if missing.
            sample_prompts: Captions to generate an image for, shown on the card.
            name: The name that the card's code loads; the folder by default.
        """
        self.prior.save_pretrained(str(folder))
        self.processor.save_pretrained(folder)
        if sample_prompts:
            images: Any = self(sample_prompts, seed=0).images
            save_image(make_captioned_sheet(images, sample_prompts), Path(folder, SAMPLES_FILE))
        card = model_card(
            self.processor.layout,
            self.default_sampling,
            model_type=self.prior.config.model_type,
            image_tokenizer=type(self.processor.image_tokenizer).__name__,
            name=name or str(folder),
            prompts=sample_prompts,
        )
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
        """Upload the model to the hub; the repository is created if it does not exist.

        Args:
            repo_id: Name of the repository, `user/name`.
            private: Visibility of a new repository; None means the account's default.
            token: Access token; the saved one by default.
            commit_message: Message of the commit.
            sample_prompts: Captions to generate an image for, shown on the card.

        Returns:
            The address of the repository.
        """
        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, sample_prompts=sample_prompts, name=repo_id)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        return str(address)

    def to(self, *device_or_dtype: str | torch.device | torch.dtype) -> Self:
        """Move both models to a device, and the prior to a dtype: `to("cuda", torch.bfloat16)`."""
        move_to(self.prior, self.processor, *device_or_dtype)
        return self

    @property
    def default_sampling(self) -> Sampling:
        """The model's sampling settings, saved in generation_config.json.

        Raises:
            ValueError: When set to a guidance scale that is a function, which cannot be saved.
        """
        return Sampling.from_generation_config(self.prior.generation_config)

    @default_sampling.setter
    def default_sampling(self, sampling: Sampling) -> None:
        sampling.write_to(self.prior.generation_config)

    @property
    def caption_dropout(self) -> float | None:
        """Fraction of captions dropped in training, saved in generation_config.json; None if unknown."""
        return getattr(self.prior.generation_config, DROPOUT_KEY, None)

    @caption_dropout.setter
    def caption_dropout(self, fraction: float) -> None:
        setattr(self.prior.generation_config, DROPOUT_KEY, fraction)

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
        """Generate images for captions.

        Args:
            prompt: One caption or a list of captions.
            num_images_per_prompt: Number of images for each caption.
            guidance_scale: Scale of classifier-free guidance, or a schedule, as in `Sampling`. None: the
                model's default.
            negative_prompt: Caption that guidance leads away from. None: the empty caption.
            temperature: Softmax temperature; 0 is greedy. None: the model's default.
            top_k: Sample from the k most likely codes (0 = all). None: the model's default.
            top_p: Sample from the smallest set of codes whose total probability is at least p. None: the
                model's default.
            seed: Image i of a seed is the same in any batch. None: a new random seed. Two seeds: the images
                of each prompt interpolate between the images of the two seeds.
            output_type: "pil" for PIL images, or "np" for floats in [0, 1], `b h w c`.
            batch_size: Number of images generated together. None: as many as `max_batch_size` says.
            progress: Show a progress bar.
            preview_after: Numbers of codes after which to call `on_preview`; coarse-to-fine tokenizers only.
            on_preview: Called with the images so far, their number of codes and their rows among all images.
            image: Image to complete or to vary, of the model's own size; or a list with one per prompt; or
                codes, `n` or `b n`.
            keep: The codes of `image` to keep: a number (the first codes), "top" (the upper half of a grid), or
                a mask with one boolean per code. A sampled code depends on the codes before it alone.
            best_of: Number of candidates for each image, of which the one with the highest score is kept.
            ranker: Scores captions and candidates, such as a `ClipRanker`. None: the prior's own
                `pointwise_mutual_information`.
            compile: Run the prior through `torch.compile`, as in `generate`.

        Returns:
            Images and codes, and the scores if `best_of` is above 1.

        Raises:
            ValueError: If an argument has the wrong type or is out of range, or `image` has another size.
        """
        sampling = self._resolve_sampling(
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        captions = expand_prompts(prompt, num_images_per_prompt)
        if output_type not in ("pil", "np"):
            raise ValueError(f'Expected output_type to be "pil" or "np", got {output_type!r}.')
        self._check_previews(preview_after, on_preview)
        self._warn_of_guidance(sampling, negative_prompt)
        mask = None if keep is None else keep_mask(keep, self.processor.image_tokenizer)
        check_best_of(best_of, ranker, seed=seed, has_previews=bool(preview_after))
        captions = [caption for caption in captions for _ in range(best_of)]
        per_prompt = num_images_per_prompt * best_of
        inputs = self._prepare_inputs(captions, per_prompt, seed, negative_prompt, image, has_mask=mask is not None)
        if batch_size is None:
            batch_size = max_batch_size(self.prior, self.processor.layout, guidance=sampling.guidance_scale != 1)
        images, codes, scores = [], [], []
        with tqdm(total=len(captions) // best_of, desc="generate", unit=" images", disable=not progress) as bar:
            for rows in batches(len(captions), batch_size, multiple=best_of):
                batch: dict[str, Any] = {name: value[rows.start : rows.stop] for name, value in inputs.items()}
                batch |= {"sampling": sampling, "keep_mask": mask, "compile": compile}
                if on_preview is not None:
                    batch["callback"] = partial(self._preview, rows, preview_after, on_preview)
                sampled = generate(self.prior, self.processor.layout, **batch).cpu()
                if best_of > 1:
                    some = captions[rows.start : rows.stop]
                    sampled, best_scores = self._select_best(some, batch["text_ids"], sampled, best_of, ranker)
                    scores.append(best_scores)
                codes.append(sampled)
                images.extend(self._decode(sampled))
                bar.update(len(sampled))
        return collect_output(images, codes, scores, output_type)

    def _resolve_sampling(self, **settings: Any) -> Sampling:
        """Replace settings that are None by the model's own."""
        default = self.default_sampling
        return Sampling(
            **{name: getattr(default, name) if value is None else value for name, value in settings.items()}
        )

    def _prepare_inputs(
        self,
        captions: list[str],
        per_prompt: int,
        seed: int | tuple[int, int] | None,
        negative_prompt: str | None,
        image: Any,
        *,
        has_mask: bool,
    ) -> dict[str, Tensor]:
        """Prepare the inputs of `generate` that have one row per candidate.

        Args:
            captions: The caption of each candidate; those of a prompt are adjacent.
            per_prompt: Number of candidates per prompt.
            seed: As in `__call__`.
            negative_prompt: As in `__call__`.
            image: As in `__call__`.
            has_mask: Whether the caller said which codes of `image` to keep.

        Raises:
            ValueError: If there is an image without a mask or a mask without an image.
        """
        if (image is not None) != has_mask:
            raise ValueError("image and keep go together: keep says which codes of the image stay")
        num = len(captions)
        inputs: dict[str, Tensor] = {}
        # The image first: a wrong size must not cost the time of encoding the captions.
        if image is not None:
            init_codes = encode_init_images(image, self.processor, num // per_prompt)
            inputs["init_codes"] = init_codes.repeat_interleave(per_prompt, dim=0)
        inputs["text_ids"] = self.processor.encode_text(captions)
        inputs["uniforms"] = self._noise(seed, num, per_prompt)
        if negative_prompt is not None:
            inputs["negative_text_ids"] = self.processor.encode_text([negative_prompt]).expand(num, -1)
        return inputs

    def _noise(self, seed: int | tuple[int, int] | None, num: int, per_prompt: int) -> Tensor:
        """Draw the uniform noise of `num` candidates, `b n`, from one seed or along the path between two."""
        num_codes = self.processor.layout.num_codes
        if seed is None:
            seed = random_seed()
        if isinstance(seed, int | Integral):
            return uniform_noise(int(seed), range(num), num_codes)
        if len(seed) != 2:
            raise ValueError(f"Expected seed to be an integer or two to interpolate between, got {seed!r}.")
        ends = [uniform_noise(int(each), range(num // per_prompt), num_codes) for each in seed]
        return torch.cat([slerp_noise(first, last, per_prompt) for first, last in zip(*ends, strict=True)])

    def _select_best(
        self, captions: list[str], text_ids: Tensor, codes: Tensor, best_of: int, ranker: Ranker | None
    ) -> tuple[Tensor, Tensor]:
        """Keep the best of each `best_of` adjacent candidates.

        Args:
            captions: Caption of each candidate.
            text_ids: The captions' text ids, `(b g) t`.
            codes: Codes of the candidates, `(b g) n`.
            best_of: Candidates per image, `g`.
            ranker: As in `__call__`.

        Returns:
            Codes `b n` and scores `b` of the best candidates.
        """
        if ranker is None:
            scores = pointwise_mutual_information(self.prior, self.processor.layout, text_ids, codes)
        else:
            scores = torch.as_tensor(ranker(captions, self._decode(codes)))
        best = argmax_per_group(scores, best_of)
        return codes[best], scores[best]

    def _decode(self, codes: Tensor) -> list[Image.Image]:
        """Decode codes `b n` to images, in batches that fit in memory."""
        config: Any = self.processor.image_tokenizer.config
        chunks = codes.split(max(1, DECODED_PIXELS // config.image_size**2))
        return [image for chunk in chunks for image in self.processor.decode_images(chunk)]

    def _preview(
        self, rows: range, preview_after: Collection[int], on_preview: Preview, position: int, codes: Tensor
    ) -> None:
        """Call `on_preview` with the decoded prefix, if `position` is one of those requested."""
        if position + 1 in preview_after:
            on_preview(self._decode(codes[:, : position + 1]), position + 1, rows)

    def _check_previews(self, preview_after: Collection[int], on_preview: Preview | None) -> None:
        tokenizer = self.processor.image_tokenizer
        if bool(preview_after) != (on_preview is not None):
            raise ValueError("Expected preview_after and on_preview together, got one of them.")
        if preview_after and not tokenizer.supports_prefix_decoding:
            raise ValueError(
                f"Expected a coarse-to-fine image tokenizer for previews, got a {type(tokenizer).__name__}, "
                "which cannot decode a prefix of its codes."
            )
        if preview_after and not set(preview_after) <= set(range(1, tokenizer.num_codes + 1)):
            raise ValueError(f"preview_after must lie in 1..{tokenizer.num_codes}, got {sorted(preview_after)}")

    def _warn_of_guidance(self, sampling: Sampling, negative_prompt: str | None) -> None:
        """Warn if guidance, or the negative prompt that needs it, has no effect."""
        if sampling.guidance_scale == 1:
            if negative_prompt is not None:
                warnings.warn("negative_prompt has no effect at guidance_scale 1", stacklevel=3)
        elif self.caption_dropout == 0 and not self._warned:
            self._warned = True
            warnings.warn(
                "guidance has nothing to compare with: the prior was trained with caption_dropout 0 and never saw "
                "the empty caption; use guidance_scale 1",
                stacklevel=3,
            )


def check_best_of(best_of: int, ranker: Ranker | None, *, seed: Any, has_previews: bool) -> None:
    """Check that `best_of` is valid and goes with the other arguments.

    Raises:
        ValueError: If it does not.
    """
    if best_of < 1:
        raise ValueError(f"Expected best_of to be at least 1, got {best_of}.")
    if best_of == 1 and ranker is not None:
        raise ValueError("Expected best_of above 1 with a ranker, got 1, which leaves nothing to choose from.")
    if best_of > 1 and (has_previews or isinstance(seed, tuple)):
        raise ValueError("best_of cannot be combined with previews or with two seeds.")


def collect_output(
    images: list[Image.Image], codes: list[Tensor], scores: list[Tensor], output_type: str
) -> TextToImageOutput:
    """Join the results of all batches; convert images to floats, `b h w c`, if `output_type` is "np"."""
    results: list[Image.Image] | np.ndarray = images
    if output_type == "np":
        arrays = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
        results = arrays[..., None] if arrays.ndim == 3 else arrays  # grayscale images have no channel axis
    return TextToImageOutput(results, torch.cat(codes), torch.cat(scores) if scores else None)
