"""What every training stage needs to be killed and resumed: one safetensors file, no pickles.

A state file holds the model's tensors, the optimizer's tensors and a JSON header with the step and the
recipe; it is written to a temporary file and renamed, so a kill leaves the last whole one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and `meta` (JSON) to `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    save_file(plain, tmp, metadata={"lolgen": json.dumps(meta)})
    os.replace(tmp, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON header of a file written by `save_tensors`."""
    with safe_open(path, framework="pt") as f:
        meta = json.loads((f.metadata() or {}).get("lolgen", "{}"))
        return {k: f.get_tensor(k) for k in f.keys()}, meta  # noqa: SIM118 (safe_open is no mapping)


def save_state(
    path: Path, models: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, meta: dict[str, Any]
) -> None:
    """Save models (by name), optimizer moments and `meta` so that `load_state` goes on where this stood."""
    tensors = {f"model/{n}/{k}": v for n, m in models.items() for k, v in m.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optim/{i}/{k}": torch.as_tensor(v) for k, v in state.items()}
    save_tensors(path, tensors, meta)


def load_state(
    path: Path, models: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """Load what `save_state` wrote into `models` and `optimizer`; returns its `meta`."""
    tensors, meta = load_tensors(path)
    for name, model in models.items():
        prefix = f"model/{name}/"
        model.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    if optimizer is not None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optim/"):
                _, i, name = key.split("/")
                state.setdefault(int(i), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta
