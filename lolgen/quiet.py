"""Import diffusers and transformers without their chatter: what goes wrong with an adapter, lolgen says itself."""

from __future__ import annotations

import os
from pathlib import Path
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


def load_language_model(folder: Path, gguf: str | None = None) -> tuple[Any, Any]:
    """Causal language model (float32) and tokenizer of a local folder, silent; `gguf` names a file in it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True}
    if gguf is not None:
        options["gguf_file"] = gguf
        from functools import partial

        from tqdm.auto import tqdm
        from transformers import modeling_gguf_pytorch_utils

        # Its bar is tqdm's own, which `disable_progress_bar` does not reach.
        modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options), tokenizer


def load_sentence_encoder(folder: Path) -> tuple[Any, Any]:
    """Encoder (float32, in eval mode) and tokenizer of a local folder, silent."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval(), tokenizer
