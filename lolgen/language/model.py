"""A causal language model in the hand, for work on many LoRAs at once; any Llama-like `transformers` folder serves."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen.errors import LolgenError


@dataclass
class LanguageBase:
    """Model (float32, frozen) and tokenizer."""

    model: Any
    tokenizer: Any

    @staticmethod
    def load(folder: str | Path) -> LanguageBase:
        """A folder as `AutoModelForCausalLM.save_pretrained` writes it, or one with a single `.gguf` file; no network.

        LolgenError if it is neither."""
        folder = Path(folder)
        ggufs = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
        if not (folder / "config.json").is_file() and len(ggufs) != 1:
            raise LolgenError(
                f"{folder}: no config.json and no single .gguf file; expected a causal language model"
            )
        from lolgen.quiet import load_language_model

        model, tokenizer = load_language_model(folder, ggufs[0].name if ggufs else None)
        return LanguageBase(model.eval().requires_grad_(False), tokenizer)

    @property
    def start(self) -> int:
        """The token that every window begins with."""
        t = self.tokenizer
        return int(t.bos_token_id if t.bos_token_id is not None else t.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def windows(self, texts: list[str] | tuple[str, ...], length: int) -> Tensor:
        """(N, length) long: the start token and `length - 1` tokens each, one text after the other; a rest shorter than
        that is left out."""
        rows: list[list[int]] = []
        step = length - 1
        # One call for all: the tokenizer is many times faster so.
        for ids in self.tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []:
            rows += [[self.start, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]
        return torch.tensor(rows, dtype=torch.long).view(-1, length)


class Halves:
    """The model cut below its first adapted layer: what lies below is computed once for a window, whatever LoRAs do.

    `first`: number of the first adapted layer.
    """

    def __init__(self, base: LanguageBase, first: int) -> None:
        inner = base.model.model
        self.lower, self.upper = _with_layers(inner, 0, first), _with_layers(inner, first, None)
        self.lower.norm = torch.nn.Identity()
        self.head = base.model.lm_head

    @torch.no_grad()
    def states(self, windows: Tensor, rows: int = 512) -> Tensor:
        """Hidden states below the cut of windows (N, T), (N, T, hidden)."""
        if not len(self.lower.layers):
            return torch.cat([self.lower.embed_tokens(w) for w in windows.split(rows)])
        return torch.cat(
            [self.lower(input_ids=w, use_cache=False).last_hidden_state for w in windows.split(rows)]
        )

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every next token in nats, (N, T - 1), from states (N, T, hidden) and ids (N, T); -100 in
        `targets` counts 0."""
        hidden = self.upper(inputs_embeds=states, use_cache=False).last_hidden_state[:, :-1]
        logits = self.head(hidden).flatten(0, 1).float()
        losses = torch.nn.functional.cross_entropy(logits, targets[:, 1:].flatten(), reduction="none")
        return losses.view(len(targets), -1)


def _with_layers(inner: Any, start: int, stop: int | None) -> Any:
    """The same decoder with some of its layers; weights and layers are shared, hooks on them serve both."""
    cut = copy.copy(inner)
    cut._modules = dict(inner._modules)
    cut.config = copy.copy(inner.config)
    cut.layers = torch.nn.ModuleList(list(inner.layers)[start:stop])
    cut.config.num_hidden_layers = len(cut.layers)
    return cut
