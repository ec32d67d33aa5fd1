"""Bring the README's tables up to date with reports/*.json.

    python -m train.readme            # rewrites what stands between <!-- begin NAME --> and <!-- end NAME -->

No figure of those tables is typed by hand; a test holds the README to its reports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lolgen.io import atomic
from lolgen.tasks import respeak

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "lolgen": "lolgen", "real": "real LoRAs", "ridge": "ridge map", "w2w": "weights2weights",
    "average": "average of 5 nearest", "noised": "noised nearest", "mlp": "flattened MLP",
    "class_means": "class means", "retrained": "trained anew",
}  # fmt: skip


def report(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "reports" / f"{name}.json").read_text("utf-8"))
    return found


def generate() -> str:
    systems = report("generate")["systems"]
    names = ("lolgen", "real", "ridge", "w2w", "average", "noised", "mlp")
    rows = {
        "attributes right in the pictures": "probe_accuracy", "of these, partial requests": "probe_accuracy_partial",
        "diversity within a request": "diversity", "nearest training LoRA, cosine": "nearest_train_cosine",
    }  # fmt: skip
    cells = [[f"{systems[n][key]:.3f}" for n in names] for key in rows.values()]
    return table(["", *(TITLES[n] for n in names)], [[t, *c] for t, c in zip(rows, cells, strict=True)])


def edit() -> str:
    systems = report("edit")["systems"]
    rows = {"asked attribute changed": "success", "other attributes changed": "collateral",
            "identity (cosine)": "identity", "seconds an edit": "seconds"}  # fmt: skip
    cells = [
        [f"{s[key]:.2g}" if key == "seconds" else f"{s[key]:.3f}" for s in systems.values()]
        for key in rows.values()
    ]
    return table(["", *(TITLES[n] for n in systems)], [[t, *c] for t, c in zip(rows, cells, strict=True)])


def invert() -> str:
    systems = report("invert")["systems"]
    rows = [
        [n, f"{f['attributes']:.3f}", f"{f['identity']:.3f}", f"{f['seconds']:.2g}"]
        for n, f in systems.items()
    ]
    return table(["from a picture", "attributes read back", "identity (cosine)", "seconds"], rows)


def paper() -> str:
    rows = report("paper")["rows"]
    names = {
        "ours": "lolgen", "glnet": "GL-net", "glnet_transformer": "GL-net, transformer", "kernel": "kernel ridge",
        "gp": "Gaussian process", "dense": "dense", "w2t": "W2T", "o_align": "O-Align", "svd": "spectra",
        "mlp": "flattened MLP", "majority": "majority",
    }  # fmt: skip
    titles = {
        "clip_score": "CLIP score (Kendall's tau)", "attributes": "portrait attributes", "styles": "styles (ten bits)",
        "dataset_size": "dataset size", "recipe": "lr, steps, prompt", "recipe_rank": "rank",
        "cross_model_same_base": "attributes, new identities", "cross_model_second_base": "the same on another base",
        "speech_sources": "language: 19 sources", "speech_loss": "validation loss (tau)",
        "speech_accuracy": "question accuracy (tau)", "speech_recipe": "lr, epochs, batch",
        "poisoned_trigger": "poisoned, new trigger (AUROC)", "poisoned_payload": "poisoned, new payload (AUROC)",
        "poisoned_rank": "poisoned, new rank (AUROC)",
    }  # fmt: skip
    cells = [[f"{rows[r]['models'][n]['mean']:.3f}" for n in names] for r in titles if r in rows]
    return table(["", *names.values()], [[t, *c] for t, c in zip(titles.values(), cells, strict=True)])


def speeches() -> str:
    systems = report("speeches")["systems"]
    titles = {**TITLES, "real": "trained on the sources", "average": "average adapter",
              "all_sources": "trained on everything"}  # fmt: skip
    rows = {"one source": "gain_single", "two": "gain_pair", "five to twelve": "gain_subset"}
    cells = [[f"{s[key]:.2f}" for s in systems.values()] for key in rows.values()]
    rows["one, on windows of 128 tokens"] = "drop_long"
    cells.append([f"{s['drop_long'] / systems['real']['drop_long']:.2f}" for s in systems.values()])
    return table(["gain", *(titles[n] for n in systems)], [[t, *c] for t, c in zip(rows, cells, strict=True)])


def speeches_edit() -> str:
    found = report("speeches_edit")
    titles = {
        "before": "no edit", "lolgen": "lolgen", "merge": "merged with lolgen's adapter of the source",
        "ridge": "ridge map's direction", "arithmetic": "merged with an adapter trained on the source",
        "retrained": "trained anew",
    }  # fmt: skip
    added, removed = (respeak.means(found, doing) for doing in ("add", "remove"))
    rows = [[t, *(respeak.figure(v) for v in (*added[n], *removed[n]))] for n, t in titles.items()]
    return table(["", "added source", "the rest", "removed source", "the rest"], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


BLOCKS = {
    "generate": generate, "edit": edit, "invert": invert, "paper": paper, "speeches": speeches,
    "speeches_edit": speeches_edit,
}  # fmt: skip


def refreshed(text: str) -> str:
    """The README with every block made again."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"README.md: no block {name!r} to refresh")
        before, rest = text.split(begin, 1)
        text = before + begin + make() + "\n" + end + rest.split(end, 1)[1]
    return text


def main() -> None:
    readme = ROOT / "README.md"
    atomic.write_file(readme, refreshed(readme.read_text("utf-8")).encode())


if __name__ == "__main__":
    main()
