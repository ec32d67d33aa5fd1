"""Import diffusers and transformers without their chatter: what goes wrong with an adapter, lolgen says itself."""

from __future__ import annotations

import os
from typing import Any


def load_stock_pipeline(folder: str) -> Any:
    """The `StableDiffusionPipeline` of a folder or hub id, float32, silent; a folder is never looked up on the hub."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers
    import torch

    diffusers.utils.logging.disable_progress_bar()
    from transformers.utils import logging

    logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, local_files_only=os.path.isdir(folder), safety_checker=None, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
