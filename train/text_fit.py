"""Fit the map from a line of text to shares of the sources, and judge it on phrasings and paragraphs kept apart.

    python -m train.text_fit            # about a minute on one core; killed, it goes on where it stopped

Learned from: sentences made of plain facts (`lolgen.language.eras`), and paragraphs of the sources' train split.
Regularisation, the weight of paragraphs and the cut of small shares are chosen on validation phrasings and paragraphs;
test phrasings and paragraphs are read once, for the report. Writes checkpoints/speeches/text.safetensors and
reports/text_map.json.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lolgen.io import atomic
from lolgen.language.eras import KINDS, PARTS, Phrase, in_office, phrases
from lolgen.language.sentences import DIM, PACKAGE, Sentences, TextMap
from lolgen.language.texts import SOURCES, source_texts
from train.state import load_tensors, save_tensors

PARAGRAPHS = {"train": 30, "validation": 12, "test": 24}
"""Split -> paragraphs of a source, at most."""
WORDS = (20, 50)
"""A paragraph has at least so many words, and is cut after so many: requests are short, and so is the fit's time."""
GRID: dict[str, tuple[float, ...]] = {
    "decay": (1e-5, 3e-5, 1e-4, 3e-4),
    "paragraphs": (0.3, 1.0),
    "least": (0.01, 0.02, 0.05),
}
"""`decay`: of the squared weights; `paragraphs`: their weight in the loss beside phrases' 1; `least`: the cut."""
STRANGER = 0.5
TITLE = "speak like a nineteenth century president"
CHUNKS = {"phrases": 256, "paragraphs": 48}
"""Texts of a file of the cache; a paragraph takes several times as long as a phrase."""


def paragraphs(split: str, seed: int) -> tuple[list[str], list[int]]:
    """Paragraphs of one split, cut after `WORDS[1]` words, and the number of the source of each."""
    texts: list[str] = []
    labels: list[int] = []
    for k, source in enumerate(SOURCES):
        words = [p.split() for block in source_texts(source, split) for p in block.split("\n")]
        words = [w for w in words if len(w) >= WORDS[0]]
        order = np.random.default_rng([seed, k, PARTS.index(split)]).permutation(len(words))
        for i in sorted(order[: PARAGRAPHS[split]].tolist()):
            texts.append(" ".join(words[i][: WORDS[1]]))
            labels.append(k)
    return texts, labels


def encode(encoder: Sentences, texts: Sequence[str], cache: Path, size: int) -> Tensor:
    """Embeddings (N, D), kept in `cache`, `size` of them a file, so that a killed run goes on."""
    found = [torch.zeros(0, DIM)]
    for start in tqdm(range(0, len(texts), size), desc="texts", mininterval=5):
        chunk = list(texts[start : start + size])
        key = hashlib.sha256(json.dumps([PACKAGE, version(PACKAGE), chunk]).encode()).hexdigest()[:16]
        file = cache / f"{key}.safetensors"
        if not file.is_file():
            save_tensors(file, {"embeddings": encoder.encode(chunk)}, {})
        found.append(load_tensors(file)[0]["embeddings"])
    return torch.cat(found)


def targets(found: Sequence[Phrase]) -> Tensor:
    """(N, sources + 1): equal shares of a phrase's sources, or the last class."""
    y = torch.zeros(len(found), len(SOURCES) + 1)
    names = list(SOURCES)
    for row, phrase in zip(y, found, strict=True):
        row[[names.index(s) for s in phrase.sources] or [-1]] = 1 / max(1, len(phrase.sources))
    return y


def fit(x: Tensor, y: Tensor, w: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Weight (S + 1, D) and bias (S + 1,) of least cross entropy, targets y (N, S + 1), rows weighted by w (N,)."""
    weight = torch.zeros(y.shape[1], x.shape[1], requires_grad=True)
    bias = torch.zeros(y.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")
    w = w / w.sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            -(w * (y * torch.log_softmax(x @ weight.T + bias, -1)).sum(-1)).sum()
            + decay * weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def right_shares(model: TextMap, x: Tensor, found: Sequence[Phrase]) -> dict[str, float]:
    """Kind -> mean share of weight on right sources; `none`: how often text that fits no source is refused."""
    shares = model.weights(x)
    right = (shares * (targets(found)[:, :-1] > 0)).sum(-1)
    refused = model.probabilities(x)[:, -1] > model.stranger
    scores: dict[str, float] = {}
    for kind in KINDS:
        rows = torch.tensor([p.kind == kind for p in found])
        score = refused.float() if kind == "none" else right * ~refused
        scores[kind] = float(score[rows].mean())
    return scores


def top(model: TextMap, x: Tensor, labels: Tensor) -> dict[str, float]:
    """top_1 and top_3 accuracy over the sources, each source counting alike, and the share of refused texts."""
    p = model.probabilities(x)
    order = p[:, :-1].argsort(-1, descending=True)
    hit = order == labels[:, None]
    mean = [hit[labels == k].float() for k in range(len(SOURCES))]
    return {
        "top_1": float(torch.stack([h[:, :1].sum(-1).mean() for h in mean]).mean()),
        "top_3": float(torch.stack([h[:, :3].sum(-1).mean() for h in mean]).mean()),
        "refused": float((p[:, -1] > model.stranger).float().mean()),
    }


def share_between(shares: dict[str, float], first: int, last: int) -> float:
    """The weight on sources that governed in the years `first` to `last`."""
    return sum(shares.get(s, 0.0) for s in in_office(first, last))


def rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return round(x, 6) if isinstance(x, float) else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/speeches/text.safetensors"))
    parser.add_argument("--report", type=Path, default=Path("reports/text_map.json"))
    parser.add_argument("--cache", type=Path, default=Path("runs/text"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    encoder = Sentences.load()
    said = {part: [p for p in phrases() if p.part == part] for part in PARTS}
    x_said = {
        part: encode(encoder, [p.text for p in found], args.cache, CHUNKS["phrases"])
        for part, found in said.items()
    }
    x_read: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    for part in PARTS:
        texts, labels = paragraphs(part, args.seed)
        x_read[part], read[part] = (
            encode(encoder, texts, args.cache, CHUNKS["paragraphs"]),
            torch.tensor(labels),
        )

    # Kinds of phrase count alike, and so do sources: neither should win by the number of its sentences.
    sizes = {k: sum(p.kind == k for p in said["train"]) for k in KINDS}
    w_said = torch.tensor([1 / (len(KINDS) * sizes[p.kind]) for p in said["train"]])
    w_read = 1 / (len(SOURCES) * torch.bincount(read["train"])[read["train"]].float())
    x = torch.cat([x_said["train"], x_read["train"]])
    y = torch.cat(
        [targets(said["train"]), torch.nn.functional.one_hot(read["train"], len(SOURCES) + 1).float()]
    )

    tried: list[dict[str, Any]] = []
    best: tuple[float, TextMap] | None = None
    for decay, share in tqdm(list(itertools.product(GRID["decay"], GRID["paragraphs"])), mininterval=5):
        weight, bias = fit(x, y, torch.cat([w_said, share * w_read]), decay)
        for least in GRID["least"]:
            model = TextMap(weight, bias, tuple(SOURCES), least, STRANGER, encoder)
            phrase = right_shares(model, x_said["validation"], said["validation"])
            paragraph = top(model, x_read["validation"], read["validation"])
            # Requests are what the map is for: paragraphs count as one more kind of phrase.
            score = (sum(phrase.values()) + paragraph["top_1"]) / (len(phrase) + 1)
            setting = {"decay": decay, "paragraphs": share, "least": least}
            tried.append({**setting, "score": score, "phrases": phrase, "paragraphs_read": paragraph})
            if best is None or score > best[0]:
                best = score, model
                chosen = setting
    assert best is not None
    model = best[1]
    meta = {"sources": list(SOURCES), "least": model.least, "stranger": STRANGER, "encoder": PACKAGE}
    save_tensors(args.out, {"weight": model.weight, "bias": model.bias}, meta)

    title = next(p for p in said["test"] if p.text == TITLE)
    shares = model.shares(title.text)
    old = [i for i, p in enumerate(said["test"]) if p.kind == "century" and p.sources == title.sources]
    governed = torch.tensor([s in title.sources for s in model.sources])
    worst = (model.weights(x_said["test"][old]) * governed).sum(-1).min()
    named = [i for i, p in enumerate(said["test"]) if p.kind == "name"]
    first = model.weights(x_said["test"][named]).argmax(-1).tolist()
    report = {
        "command": "python -m train.text_fit",
        "seed": args.seed,
        "encoder": f"{PACKAGE} {version(PACKAGE)}",
        "phrases": {part: {k: sum(p.kind == k for p in said[part]) for k in KINDS} for part in PARTS},
        "paragraphs": {part: len(read[part]) for part in PARTS},
        "words_of_a_paragraph": list(WORDS),
        "chosen": chosen,
        "validation": max(tried, key=lambda t: t["score"]),
        "test": {
            "paragraphs": {**top(model, x_read["test"], read["test"]), "chance_top_1": 1 / len(SOURCES)},
            "right_share": right_shares(model, x_said["test"], said["test"]),
            "names_first": sum(
                said["test"][i].sources == (model.sources[k],) for i, k in zip(named, first, strict=True)
            )
            / len(named),
            "title": {"text": TITLE, "shares": shares, "share_1801_1900": share_between(shares, 1801, 1900)},
            "share_1801_1900_worst": float(worst),
            "share_of_the_same_sources_at_random": len(title.sources) / len(SOURCES),
        },
        "tried": tried,
    }
    atomic.write_file(args.report, (json.dumps(rounded(report), indent=1) + "\n").encode())
    print(json.dumps(rounded({k: report[k] for k in ("chosen", "phrases", "test")}), indent=1))


if __name__ == "__main__":
    main()
