"""The task "text-to-image" of `transformers.pipeline`, implemented by `TextToImagePipeline`."""

from typing import Any

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.generic import ModelOutput

from ..tokenization.processor import Tok2ImgProcessor
from .loading import resolve_pipeline_folder
from .text_to_image import TextToImagePipeline

TASK = "text-to-image"


class TextToImageTask(Pipeline):
    """Adapter that calls `TextToImagePipeline` with the prior that transformers has loaded.

    Arguments of the call are passed on unchanged. The processor is loaded from the prior's folder, because
    transformers has no auto class that knows it.

    Args:
        model: The prior, as `AutoModelForCausalLM` loads it.
        **settings: Arguments of `transformers.Pipeline`.
    """

    # transformers would look for these next to the prior and fail.
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_processor = False

    def __init__(self, model: Any, **settings: Any):
        super().__init__(model, **settings)
        processor = Tok2ImgProcessor.from_pretrained(resolve_pipeline_folder(model.name_or_path))
        self.text_to_image = TextToImagePipeline(model, processor).to(self.device)

    def __call__(self, prompt: str | list[str], **settings: Any) -> Any:
        """Generate images for one prompt, or for several in one run.

        Args:
            prompt: One caption or a list of captions.
            **settings: Arguments of `TextToImagePipeline.__call__`.

        Returns:
            The images of all prompts as one list.
        """
        # The base class would run a list of prompts one by one.
        _, settings, _ = self._sanitize_parameters(**settings)
        return self.postprocess(self._forward(self.preprocess(prompt), **settings))

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, settings, {}

    def preprocess(self, input_: Any, **settings: Any) -> dict[str, Any]:
        """Return the prompt unchanged, under the name that `_forward` expects."""
        return {"prompt": input_}

    def _forward(self, input_tensors: dict[str, Any], **settings: Any) -> ModelOutput:
        return ModelOutput(images=self.text_to_image(**input_tensors, **settings).images)

    def postprocess(self, model_outputs: ModelOutput, **settings: Any) -> Any:
        """Return the images alone."""
        return model_outputs["images"]


def register_task() -> None:
    """Register "text-to-image" with transformers, so that `transformers.pipeline` finds it."""
    PIPELINE_REGISTRY.register_pipeline(TASK, TextToImageTask, pt_model=AutoModelForCausalLM, type="text")
