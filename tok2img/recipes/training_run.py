"""What all training runs share: data, training arguments, and saving the result."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

from ..atomic_io import staged_update
from ..data.loading import held_out_split, load_captioned_images
from ..trainer.trainer import Trainer
from ..trainer.training_log import save_log
from .config import RunSettings
from .run_folder import checkpoints_of, close_run, open_run

MAX_HELD_OUT_FRACTION = 0.05


def load_data(recipe: RunSettings, *, with_captions: bool = True, with_images: bool = True) -> Dataset:
    """Load the training examples that a recipe names."""
    return load_captioned_images(
        recipe.data,
        image_column=recipe.image_column or None,
        caption_column=recipe.caption_column or None,
        with_captions=with_captions,
        with_images=with_images,
        max_samples=recipe.max_train_samples or None,
    )


def train_eval_split(rows: Dataset, recipe: RunSettings) -> tuple[Dataset, Dataset]:
    """Split examples into those to train on and those for the held-out loss."""
    return held_out_split(rows, share=MAX_HELD_OUT_FRACTION, max_samples=recipe.max_eval_samples, seed=recipe.seed)


def training_arguments(recipe: RunSettings, *, best_by: str = "loss", fsdp: bool = False) -> TrainingArguments:
    """Translate a recipe's keys into the arguments of transformers.

    With `eval_steps`, `out/checkpoints` holds the best and the last weights during training, and training ends
    with those of the lowest held-out `best_by`. All devices share one batch, so a run means the same on any
    number of them; `docs/scale.md` lists the exceptions.

    Args:
        recipe: Recipe of the run.
        best_by: Name of the held-out metric that decides which weights are the best. Empty = keep the last ones.
        fsdp: Share the weights among the processes (FSDP2).

    Raises:
        ValueError: If the batch cannot be shared evenly.
    """
    eval_steps, save_steps = recipe.eval_steps, recipe.save_steps or recipe.eval_steps
    use_fsdp: Any = True if fsdp and int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    args = TrainingArguments(
        output_dir=str(checkpoints_of(recipe)),
        max_steps=recipe.max_steps,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type=recipe.lr_scheduler_type,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        adam_beta2=0.99,  # runs are short: the second moment must forget the first steps within a few hundred
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps or None,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_total_limit=2,
        load_best_model_at_end=bool(eval_steps and best_by),
        metric_for_best_model=best_by or None,
        greater_is_better=False,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # the log must not show the last finite loss in place of a NaN
        disable_tqdm=False,
        use_cpu=not torch.accelerator.is_available(),
        bf16=recipe.bf16,
        torch_compile=recipe.torch_compile,
        dataloader_num_workers=recipe.dataloader_num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # codebooks agree by themselves, and each process counts its own code usage
        remove_unused_columns=False,
        report_to=recipe.report_to,
        seed=recipe.seed,
        fsdp=use_fsdp,
        fsdp_config={"version": 2, "reshard_after_forward": True},
    )
    num_devices = args.world_size * max(1, args.n_gpu)
    if recipe.batch_size % num_devices:
        raise ValueError(
            f"key 'batch_size' is shared by {num_devices} devices and must be a multiple of that, "
            f"got {recipe.batch_size}"
        )
    args.per_device_train_batch_size = args.per_device_eval_batch_size = recipe.batch_size // num_devices
    return args


def train_and_save(trainer: Trainer, recipe: RunSettings, save: Callable[[Path, Any], None]) -> None:
    """Train to the end, save the result and the log to `recipe.out`, and remove the checkpoints.

    Args:
        trainer: Trainer of the run. It resumes from the newest valid checkpoint.
        recipe: Recipe of the run.
        save: Writes the trained model into a folder.
    """
    if trainer.is_world_process_zero():
        open_run(recipe)
    trainer.train(resume_from_checkpoint=True)
    model = trainer.full_model()
    if trainer.is_world_process_zero():
        with staged_update(recipe.out) as folder:
            save(folder, model)
            save_log(trainer.state.log_history, folder)
        close_run(recipe)
