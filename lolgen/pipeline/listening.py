"""What an adapter does to the language model: how likely each token of a passage is, and how a text goes on.

Every call is for the base alone or with one adapter; who wants to compare calls twice.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lolgen import io
from lolgen.errors import LolgenError
from lolgen.language.model import LanguageBase
from lolgen.language.windows import LENGTH
from lolgen.lora import Batch, LoRA
from lolgen.paths import checkpoints_dir
from lolgen.zoo.bank import Bank

WORD = 20
"""More characters than a token has: a text longer than this times the context is refused before it is cut up."""

# Adapters are hooks on the one model that all threads share: one thread uses it at a time.
_LOCK = threading.Lock()


def listen(adapter: str | Path | None, passage: str, *, stretch: int | None = LENGTH) -> dict[str, Any]:
    """How likely tiny-lm finds a passage, alone (None) or with an adapter that `lolgen.io.load` reads.

    The passage, without the space around it, is read in stretches of `stretch` tokens, the start token among them,
    each with nothing before it: so the shipped adapters were trained and judged. None reads it as one. The last
    stretch may be shorter; every token counts.

    `pieces`: the passage cut where its tokens end (a letter of several tokens is one piece); `nats`: surprisal,
    -log p, of each piece; `perplexity`: exp of the mean surprisal of a token; `tokens`: how many there are.
    LolgenError: nothing to read, more than the model's context holds, an adapter for another base."""
    with _with(adapter) as base:
        most = base.model.config.max_position_embeddings
        length = most if stretch is None else stretch
        if not 2 <= length <= most:
            raise LolgenError(f"stretch: found {stretch}, wanted 2 to {most} tokens")
        text = _clean(passage, "passage")
        ids, ends = _cut(base, text, "passage", most - 1)
        nats = _surprisal(base, ids, length)
    pieces: list[str] = []
    sums: list[float] = []
    start = 0
    for end, x in zip(ends, nats.tolist(), strict=True):
        if pieces and end == start:
            sums[-1] += x
        else:
            pieces.append(text[start:end])
            sums.append(x)
            start = end
    perplexity = math.exp(float(nats.double().mean()))
    return {"tokens": len(ids), "perplexity": perplexity, "pieces": pieces, "nats": sums}


def continue_text(
    adapter: str | Path | None, opening: str, *, tokens: int = 40, temperature: float = 0.8, seed: int = 0
) -> str:
    """What tiny-lm, alone (None) or with an adapter, writes after `opening`: that many sampled tokens as text.

    The noise depends on the seed alone, so that two continuations part only where an adapter tips a choice.
    LolgenError: nothing to go on from, more than the model's context holds, a temperature that is not positive."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise LolgenError(f"temperature: found {temperature}, wanted a number above 0")
    with _with(adapter) as base:
        room = base.model.config.max_position_embeddings - 1
        if not 1 <= tokens < room:
            raise LolgenError(f"tokens: found {tokens}, wanted 1 to {room - 1}")
        given, _ = _cut(base, _clean(opening, "opening words"), "opening words", room - tokens)
        ids = [base.start, *given]
        noise = torch.empty(tokens, base.model.config.vocab_size)
        # Adding Gumbel noise and taking the largest is a draw from the softmax.
        noise = -noise.exponential_(generator=torch.Generator().manual_seed(seed)).log()
        noise[:, base.tokenizer.all_special_ids] = -torch.inf
        with torch.inference_mode():
            for row in noise:
                logits = base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
                ids.append(int((logits / temperature + row).argmax()))
    # The last token may be a part of a letter.
    return str(base.tokenizer.decode(ids[1 + len(given) :])).rstrip("\ufffd")


def warm_listener() -> None:
    """Load the language model now rather than at the first call."""
    with _LOCK:
        _load()


@cache
def _load() -> LanguageBase:
    return LanguageBase.load(checkpoints_dir() / "tiny-lm")


@contextmanager
def _with(adapter: str | Path | None) -> Iterator[LanguageBase]:
    """The base, this thread's alone for a while, with the adapter at work in it."""
    lora = None if adapter is None else io.load(adapter)
    with _LOCK:
        base = _load()
        if lora is not None:
            _check(lora, base.model, str(adapter))
        with nullcontext() if lora is None else Bank.attached(base.model, Batch.stack([lora])):
            yield base


def _check(lora: LoRA, model: nn.Module, name: str) -> None:
    for m in lora.spec:
        try:
            layer: Any = model.get_submodule(m.name)
            fits = (layer.out_features, layer.in_features) == (m.out, m.in_)
        except AttributeError:
            fits = False
        if not fits:
            raise LolgenError(
                f"{name}: tiny-lm has no module {m.name!r} of {m.out} x {m.in_}; wanted an adapter for tiny-lm"
            )


def _clean(text: str, what: str) -> str:
    """Without the space around it; half of a surrogate pair, which is no text, becomes a question mark."""
    text = text.encode("utf-8", "replace").decode("utf-8").strip()
    if not text:
        raise LolgenError(f"{what}: found none, wanted some text")
    return text


def _cut(base: LanguageBase, text: str, what: str, most: int) -> tuple[list[int], list[int]]:
    """Token ids of a text and where each ends in it; LolgenError beyond `most` tokens."""
    if len(text) > WORD * most:
        raise LolgenError(
            f"{what}: found {len(text)} characters, wanted at most {most} tokens: make it shorter"
        )
    # What looks like a special token ("<s>") is text here.
    found = base.tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    if len(found.input_ids) > most:
        raise LolgenError(
            f"{what}: found {len(found.input_ids)} tokens, wanted at most {most} tokens (some {most * 3 // 5} words): "
            "make it shorter"
        )
    return list(found.input_ids), [end for _, end in found.offset_mapping]


@torch.inference_mode()
def _surprisal(base: LanguageBase, ids: list[int], length: int) -> Tensor:
    """-log p of every token in nats, (len(ids),), read in rows of `length` tokens that begin with the start token."""
    step = min(length - 1, len(ids))
    rows = -(-len(ids) // step)
    targets = torch.full((rows * step,), -100)
    targets[: len(ids)] = torch.tensor(ids)
    targets = targets.view(rows, step)
    # What fills the last row stands behind its tokens, which do not see it.
    inputs = torch.cat([torch.full((rows, 1), base.start), targets[:, :-1].clamp(min=0)], 1)
    logits = base.model(input_ids=inputs, use_cache=False).logits.float().flatten(0, 1)
    losses = nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses[: len(ids)]
