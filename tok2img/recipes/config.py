"""What a training run is made of: the keys of a recipe, their defaults, and how a file and the command line fill them."""

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

Recipe = TypeVar("Recipe", bound="RunSettings")
OPTIMIZERS = "adamw", "muon"
AT_LEAST_ONE = {"max_steps", "batch_size", "gradient_accumulation_steps", "logging_steps"}


@dataclass
class RunSettings:
    """Keys that every training run has.

    Attributes:
        out: folder for the result.
        data: Parquet file or folder, image folder with captions, webdataset tars, hub name, or "shapes".
        max_train_samples: train on so many rows at most; 0: all.
        batch_size: rows of a batch, on all devices together. gradient_accumulation_steps: batches of one step.
        eval_steps, sample_steps, logging_steps: steps between held-out losses, sample images and lines of the log.
        max_eval_samples: rows kept out of training for the held-out loss, one in twenty at most.
        optimizer: "adamw", or "muon", with which convolutions learn faster at the same rate, see `Muon`.
        adamw_lr_scale: with Muon, the rate of what is no matrix, as a share of `learning_rate`.
        learning_rate, warmup_steps, lr_scheduler_type, weight_decay, max_grad_norm: of either, as transformers names them.
        bf16: compute in bfloat16 where it is safe. torch_compile: through torch.compile; worth its minute where steps are many.
        save_steps: steps between checkpoints, a multiple of `eval_steps`; 0: with each held-out loss. The best is always kept: a new one
            is saved at once.
        resume_from_checkpoint: go on from the checkpoints that an interrupted run of the same recipe left in `out`; false: start anew.
        report_to: "tensorboard", "wandb", ...: anything that transformers reports to.
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
    """A run of `tok2img train-tokenizer`.

    Attributes:
        tokenizer: "vqvae", "vqdraw" or "vqdraw_student" for images, "vqdraw_text", "vqvae_text" or "bpe" for captions.
        init_from: folder of a trained tokenizer of this kind to go on from, or a checkpoint of VQ-DRAW's own code; `model` then changes
            what its weights leave open, such as `num_aux_options`.
        teacher: folder of the VQ-DRAW model that a student learns from, or a checkpoint of the original's.
        model: settings of the tokenizer, see `VQVAEConfig`, `VQDrawImageConfig`, `VQDrawStudentConfig`, `VQDrawTextConfig` and
            `VQVAETextConfig`. Where they are left out, image_size and num_channels are those of the first images, pixel_mean and
            pixel_std are measured, max_length is that of the longest caption (96 bytes at most), and the alphabet is the bytes that
            captions hold.
        flip, crop, shift, warp: what is done to images in training, see `Augmentation`.
        perceptual: folder of a saved `CaptionClassifier`, whose features a VQ-VAE's reconstructions should have too.
        disc_start: step from which a discriminator of real and reconstructed patches joins a VQ-VAE's training; 0: none. The weights
            at the end are then the last: least error on held-out images would choose those of least influence.
        disc_weight: times the weight by which it pulls as hard as the reconstruction loss.
        vocab_size: of a BPE.
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
            raise ValueError(f"key 'init_from' is not for the tokenizer {self.tokenizer!r}, which begins anew")
        if self.model and self.tokenizer == "bpe":
            raise ValueError(
                f"key 'model' is not for the tokenizer 'bpe', which has a vocab_size alone; got {self.model}"
            )
        for key in ("perceptual_model", "disc_start"):
            if getattr(self, key) and self.tokenizer != "vqvae":
                raise ValueError(f"key {key!r} is for the tokenizer 'vqvae', got {self.tokenizer!r}")
        if self.disc_start >= self.max_steps:
            raise ValueError(f"key 'disc_start' must be below max_steps {self.max_steps}, got {self.disc_start}")


@dataclass
class RankerRecipe(RunSettings):
    """A run of `tok2img train-ranker`.

    Attributes:
        depth: layers of the CLIP model's two halves; their width is 64 times that.
        vocab_size: of the BPE that is learned from the captions.
    """

    depth: int = 2
    vocab_size: int = 4096
    batch_size: int = 128
    max_steps: int = 1000
    weight_decay: float = 0.1


@dataclass
class PriorRecipe(RunSettings):
    """A run of `tok2img train-prior`.

    Attributes:
        tokens: folder that `tok2img tokenize` wrote; or give `data` and `image_tokenizer`, and the run tokenizes first.
        image_tokenizer, text_tokenizer: folders (the latter may be a hub name); without a text tokenizer, BPE is learned from the captions.
        beam_size, search_steps: how far to search for codes of VQ-DRAW, and of a VQ-VAE; 0: as the tokenizer's config says.
        vocab_size: of that BPE. text_length: text tokens of a caption; 0: as many as the longest has, 64 at most.
        init_from: folder of a trained model to go on from, on other data or for longer; tokenizers, layout and sizes are its own.
        base_model: folder or hub name of a pretrained language model to go on from, see `extend_prior`; its tokenizer reads the captions. It
            wants a learning rate of 1e-4 or so.
        fsdp: share the weights among processes that torchrun starts (FSDP2), for a prior too large for one; draws no samples on the way.
        lora_rank: train a base by updates of this rank, see `add_lora`; 0: all of it.
        architecture, depth, dropout: see `build_prior`; a base has its own.
        init_from_codebook: start the embeddings of codes from the image tokenizer's vectors, see `init_from_codebook`.
        axial_position_embeddings: learn vectors of the rows and columns of codes too, see `AxialPositionEmbeddings`; the model then has ids of their own for
            the codes of every position.
        caption_dropout, image_loss_weight, image_to_text_fraction: see `PriorWithLoss`; with a share above 0 the model captions images too.
        guidance_scale, temperature, top_k, top_p: sampling defaults that the model will carry.
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
                "key 'init_from' goes neither with 'base_model' nor with 'init_from_codebook', which begin anew"
            )
        if self.lora_rank and not self.base_model:
            raise ValueError(
                f"key 'lora_rank' is for a pretrained 'base_model', which is not given; got {self.lora_rank}"
            )
        if self.fsdp:
            self._check_shared()
        if self.axial_position_embeddings and (self.lora_rank or self.fsdp):
            raise ValueError("key 'axial_position_embeddings' goes neither with 'lora_rank' nor with 'fsdp'")
        if self.image_to_text_fraction >= 1:
            raise ValueError(
                f"key 'image_to_text_fraction' must be below 1, or nothing learns to draw; got {self.image_to_text_fraction}"
            )

    def _check_shared(self) -> None:
        """ValueError for what does not go with weights that processes share."""
        if self.lora_rank:
            raise ValueError(
                "key 'fsdp' does not go with 'lora_rank': updates are small, every process has room for them"
            )
        if self.optimizer == "muon":
            raise ValueError("key 'optimizer' must be 'adamw' with 'fsdp': Muon wants whole matrices, got 'muon'")


def require(recipe: RunSettings, *keys: str) -> None:
    """ValueError for a key that a run cannot do without and that is not given."""
    for key in keys:
        if not getattr(recipe, key):
            raise ValueError(
                f"the recipe needs {key!r}: give it as `{key}: ...` in the file or --{key.replace('_', '-')} ..."
            )
