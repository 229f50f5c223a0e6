"""Recipes: the keys of a training run and their defaults.

`tok2img train-... --help` and the manual list these keys. Keys that transformers' `TrainingArguments` has
carry its names.
"""

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

Recipe = TypeVar("Recipe", bound="RunSettings")
OPTIMIZERS = "adamw", "muon"
AT_LEAST_ONE = {"max_steps", "batch_size", "gradient_accumulation_steps", "logging_steps"}


@dataclass
class RunSettings:
    """Keys that every training run has.

    Attributes:
        out: Folder for the result.
        data: Parquet file or folder, image folder with captions, webdataset tars, hub name, or "shapes".
        image_column: Column with the images. Empty = found by its name or type.
        caption_column: Column with the captions. Empty = found by its name or type.
        max_train_samples: Number of examples used, from the first on. 0 = all.
        max_steps: Number of optimizer steps.
        batch_size: Examples in a batch, on all devices together.
        gradient_accumulation_steps: Batches in one step.
        optimizer: "adamw", or "muon", with which convolutions learn faster at the same rate, see `Muon`.
        adamw_lr_scale: With Muon, the learning rate of the parameters that AdamW trains, as a
            fraction of `learning_rate`.
        learning_rate: Highest learning rate.
        warmup_steps: Steps over which the learning rate rises from 0.
        lr_scheduler_type: Schedule after that, by transformers' names.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are scaled down to this norm.
        eval_steps: Steps between held-out losses. 0 = none.
        max_eval_samples: Examples held out of training for that loss, at most one in twenty.
        sample_steps: Steps between samples in `out/samples`. 0 = none.
        logging_steps: Steps between lines of the log.
        save_steps: Steps between checkpoints, a multiple of `eval_steps`. 0 = with each held-out loss. A new best
            is saved immediately in any case.
        resume_from_checkpoint: Resume from the checkpoints that an interrupted run of the same recipe left in
            `out`. False = train from scratch.
        bf16: Compute in bfloat16 where it is safe.
        torch_compile: Train through `torch.compile`. It takes about a minute, once.
        dataloader_num_workers: Processes that load data. 0 = the training process itself.
        report_to: Where the log goes too: "tensorboard", "wandb", or anything else that transformers reports to.
        seed: Seed of weights, data order and augmentation.

    Raises:
        ValueError: For values out of range, and keys that do not go together.
    """

    out: str = ""
    data: str = ""
    image_column: str = ""
    caption_column: str = ""
    max_train_samples: int = 0
    max_steps: int = 2000
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    optimizer: str = "adamw"
    adamw_lr_scale: float = 1.0
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_steps: int = 250
    max_eval_samples: int = 1000
    sample_steps: int = 500
    logging_steps: int = 50
    save_steps: int = 0
    resume_from_checkpoint: bool = True
    bf16: bool = False
    torch_compile: bool = False
    dataloader_num_workers: int = 0
    report_to: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            value: Any = getattr(self, each.name)
            least = 1 if each.name in AT_LEAST_ONE else 0
            if isinstance(value, int | float) and value < least:
                raise ValueError(f"key {each.name!r} must be at least {least}, got {value}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"key 'optimizer' must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.adamw_lr_scale != 1 and self.optimizer != "muon":
            raise ValueError(f"key 'adamw_lr_scale' is for the optimizer 'muon', got {self.optimizer!r}")
        if self.eval_steps and self.save_steps % self.eval_steps:
            raise ValueError(
                f"key 'save_steps' must be a multiple of eval_steps {self.eval_steps}, got {self.save_steps}"
            )


@dataclass
class TokenizerRecipe(RunSettings):
    """Keys of `tok2img train-tokenizer`.

    Attributes:
        tokenizer: "vqvae", "vqdraw" or "vqdraw_student" for images; "vqdraw_text", "vqvae_text" or "bpe" for captions.
        init_from: Folder of a trained tokenizer of this kind to fine-tune, or a checkpoint of VQ-DRAW's original
            code. `model` may then change what its weights leave open, such as `num_aux_options`.
        teacher: Folder of the VQ-DRAW model that a student learns from, or a checkpoint of the original code.
        model: Settings of the tokenizer, see `VQVAEConfig`, `VQDrawImageConfig`, `VQDrawStudentConfig`,
            `VQDrawTextConfig` and `VQVAETextConfig`. Left out, `image_size` and `num_channels` are those of the
            first images, `pixel_mean` and `pixel_std` are measured, `max_length` is that of the longest caption
            (at most 96 bytes), and the alphabet is the bytes that the captions use.
        flip: Mirror half of the images, see `Augmentation`.
        crop: Smallest fraction of the sides that a random crop keeps. 1 = no cropping.
        shift: Largest shift in pixels.
        warp: Strength of a random affine and elastic distortion of half of the images, below 0.25. 0 = none.
        perceptual_model: Folder of a saved `CaptionClassifier` for a perceptual loss of a VQ-VAE.
        disc_start: Step from which a patch discriminator joins the training of a VQ-VAE. 0 = no discriminator.
            With a discriminator the last weights are kept, because the lowest held-out error would favor
            weights that it hardly influenced.
        disc_weight: Factor on the adaptive weight by which it pulls as hard as the reconstruction loss.
        vocab_size: Vocabulary size of a BPE.
    """

    tokenizer: str = "vqvae"
    init_from: str = ""
    teacher: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    flip: bool = False
    crop: float = 1.0
    shift: int = 0
    warp: float = 0.0
    perceptual_model: str = ""
    disc_start: int = 0
    disc_weight: float = 0.8
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from and self.tokenizer in ("bpe", "vqdraw_student"):
            raise ValueError(f"key 'init_from' is not for the tokenizer {self.tokenizer!r}, which trains from scratch")
        if self.model and self.tokenizer == "bpe":
            raise ValueError(
                f"key 'model' is not for the tokenizer 'bpe', which has only a vocab_size; got {self.model}"
            )
        for key in ("perceptual_model", "disc_start"):
            if getattr(self, key) and self.tokenizer != "vqvae":
                raise ValueError(f"key {key!r} is for the tokenizer 'vqvae', got {self.tokenizer!r}")
        if self.disc_start >= self.max_steps:
            raise ValueError(f"key 'disc_start' must be below max_steps {self.max_steps}, got {self.disc_start}")


@dataclass
class RankerRecipe(RunSettings):
    """Keys of `tok2img train-ranker`.

    Attributes:
        depth: Layers of each of the CLIP model's two encoders. Their width is 64 times that.
        vocab_size: Vocabulary size of the BPE that is trained on the captions.
    """

    depth: int = 2
    vocab_size: int = 4096
    batch_size: int = 128
    max_steps: int = 1000
    weight_decay: float = 0.1


@dataclass
class PriorRecipe(RunSettings):
    """Keys of `tok2img train-prior`.

    Attributes:
        tokens: Folder that `tok2img tokenize` wrote. Without it the run tokenizes `data` with `image_tokenizer` first.
        image_tokenizer: Folder of the image tokenizer.
        beam_size: Beam size for VQ-DRAW codes. 0 = the tokenizer's default.
        search_steps: Steps of latent optimization for VQ-VAE codes. 0 = the tokenizer's default.
        text_tokenizer: Folder or hub name of a text tokenizer. Empty = that of `base_model`, or
            BPE trained on the captions.
        vocab_size: Vocabulary size of the BPE.
        text_length: Text tokens kept of a caption. 0 = those of the longest caption, at most 64.
        init_from: Folder of a trained model to fine-tune. Tokenizers, layout and sizes are its own.
        base_model: Folder or hub name of a pretrained language model to extend, see `extend_prior`. Its tokenizer
            reads the captions. Use a learning rate near 1e-4.
        lora_rank: Rank of LoRA updates of a base model, see `add_lora`. 0 = train all weights.
        fsdp: Share the weights among the processes of torchrun (FSDP2), for a prior too large for one. No samples
            are rendered while training.
        architecture: Architecture of a prior from scratch, see `build_prior`.
        depth: Its layers, which set its width too.
        dropout: Its dropout rate.
        init_from_codebook: Initialize the embeddings of codes from the image tokenizer's codebook.
        axial_position_embeddings: Learn row and column embeddings of codes, see `AxialPositionEmbeddings`. The saved
            model then has ids of their own for the codes of every position.
        caption_dropout: Fraction of captions replaced by the empty prompt, which guidance needs.
        image_loss_weight: Weight of the loss of image codes against 1 for text.
        image_to_text_fraction: Fraction of the examples that learn to caption. Above 0 the model writes captions too.
        guidance_scale: Default guidance scale that the model carries. 1 = no guidance.
        temperature: Default temperature that the model carries.
        top_k: Default top-k that the model carries. 0 = all codes.
        top_p: Default top-p that the model carries.
    """

    tokens: str = ""
    image_tokenizer: str = ""
    beam_size: int = 0
    search_steps: int = 0
    text_tokenizer: str = ""
    vocab_size: int = 4096
    text_length: int = 0
    init_from: str = ""
    base_model: str = ""
    lora_rank: int = 0
    fsdp: bool = False
    architecture: str = "qwen3"
    depth: int = 4
    dropout: float = 0.1
    init_from_codebook: bool = False
    axial_position_embeddings: bool = False
    caption_dropout: float = 0.1
    image_loss_weight: float = 7.0
    image_to_text_fraction: float = 0.0
    weight_decay: float = 0.1
    guidance_scale: float = 3.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from and (self.base_model or self.init_from_codebook):
            raise ValueError(
                "key 'init_from' goes neither with 'base_model' nor with 'init_from_codebook', which start from scratch"
            )
        if self.lora_rank and not self.base_model:
            raise ValueError(
                f"key 'lora_rank' is for a pretrained 'base_model', which is not given; got {self.lora_rank}"
            )
        if self.fsdp and self.lora_rank:
            raise ValueError("key 'fsdp' does not go with 'lora_rank': LoRA updates fit into every process")
        if self.fsdp and self.optimizer == "muon":
            raise ValueError("key 'optimizer' must be 'adamw' with 'fsdp': Muon needs whole matrices, got 'muon'")
        if self.axial_position_embeddings and (self.lora_rank or self.fsdp):
            raise ValueError("key 'axial_position_embeddings' goes neither with 'lora_rank' nor with 'fsdp'")
        if self.image_to_text_fraction >= 1:
            raise ValueError(
                "key 'image_to_text_fraction' must be below 1, or nothing learns to generate images; "
                f"got {self.image_to_text_fraction}"
            )


def require(recipe: RunSettings, *keys: str) -> None:
    """Check that keys are given that a run cannot do without; a missing one is a ValueError."""
    for key in keys:
        if not getattr(recipe, key):
            raise ValueError(
                f"the recipe needs {key!r}: give it as `{key}: ...` in the file or --{key.replace('_', '-')} ..."
            )
