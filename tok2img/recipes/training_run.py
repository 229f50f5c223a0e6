"""What all training runs share: data, training arguments, saving."""

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

HELD_OUT_SHARE = 0.05


def open_data(recipe: RunSettings, *, with_captions: bool = True, with_images: bool = True) -> Dataset:
    """The training rows that a recipe names."""
    return load_captioned_images(
        recipe.data,
        image_column=recipe.image_column or None,
        caption_column=recipe.caption_column or None,
        with_captions=with_captions,
        with_images=with_images,
        max_samples=recipe.max_train_samples or None,
    )


def split(rows: Dataset, recipe: RunSettings) -> tuple[Dataset, Dataset]:
    """Rows to train on, and rows for the held-out loss."""
    return held_out_split(rows, share=HELD_OUT_SHARE, max_samples=recipe.max_eval_samples, seed=recipe.seed)


def arguments(recipe: RunSettings, *, best_by: str = "loss", fsdp: bool = False) -> TrainingArguments:
    """The recipe's keys as arguments of transformers.

    With `eval_steps`, `out/checkpoints` holds the best and the last weights while training goes on, and at the end the weights are those
    of the best held-out `best_by`, if that is named; else they are the last. All devices share a batch, so that a run means the
    same on any number of them; `docs/scale.md` names what differs: above all a ranker compares the rows of each device by themselves.

    Args:
        fsdp: processes share the weights too, each holding a part (FSDP2).

    Raises:
        ValueError: for a batch that cannot be shared evenly.
    """
    every, save_steps = recipe.eval_steps, recipe.save_steps or recipe.eval_steps
    shared: Any = True if fsdp and int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    settings = TrainingArguments(
        output_dir=str(checkpoints_of(recipe)),
        max_steps=recipe.max_steps,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type=recipe.lr_scheduler_type,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        adam_beta2=0.99,
        eval_strategy="steps" if every else "no",
        eval_steps=every or None,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_total_limit=2,
        load_best_model_at_end=bool(every and best_by),
        metric_for_best_model=best_by or None,
        greater_is_better=False,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        disable_tqdm=False,
        use_cpu=not torch.accelerator.is_available(),
        bf16=recipe.bf16,
        torch_compile=recipe.torch_compile,
        dataloader_num_workers=recipe.dataloader_num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # processes agree on theirs by themselves, and what each counts alone it keeps
        remove_unused_columns=False,
        report_to=recipe.report_to,
        seed=recipe.seed,
        fsdp=shared,
        fsdp_config={"version": 2, "reshard_after_forward": True},
    )
    share = share_of_batch(recipe.batch_size, num_devices=settings.world_size * max(1, settings.n_gpu))
    settings.per_device_train_batch_size = settings.per_device_eval_batch_size = share
    return settings


def share_of_batch(batch_size: int, *, num_devices: int) -> int:
    """How many rows of a batch each device takes; ValueError where it cannot be shared evenly."""
    if batch_size % num_devices:
        raise ValueError(
            f"key 'batch_size' is shared by {num_devices} devices and must be a multiple of that, got {batch_size}"
        )
    return batch_size // num_devices


def finish(trainer: Trainer, recipe: RunSettings, save: Callable[[Path, Any], None]) -> None:
    """Train to the end, put the result and the log into `recipe.out`, and clear the checkpoints, which nobody needs then.

    Args:
        save: writes the trained model into a folder.
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
