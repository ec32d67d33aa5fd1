"""`lolgen eval speeches-edit`: sources added to adapters and removed from them, against training anew.

The adapters are trained ones (`real` of `lolgen.tasks.speak`): of a single source, of a pair, of a subset. From each
one source is removed, or one is added. The judge is the base with the edited adapter on held-out text of the source
edited and of the rest. Who edits:

    lolgen      `lolgen.speech_editor`, as it ships
    merge       kept * adapter + amount * the adapter that lolgen generates for the source
    ridge       kept * adapter + amount * the source's direction in the ridge map of the zoo
    arithmetic  kept * adapter + amount * an adapter trained on the source (arXiv 2212.04089): it needs that training
    retrained   trained anew on what the edit asks for: the reference

`kept` and `amount` are tuned on validation text, on other requests, for every rival as lolgen's amounts are
(`train.speeches_edit_tune`); a removal keeps all of the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lolgen.errors import LolgenError
from lolgen.framing import moved
from lolgen.io.atomic import write_file
from lolgen.language.texts import SOURCES
from lolgen.lora import Batch
from lolgen.paths import checkpoints_dir
from lolgen.speaker import Speaker
from lolgen.speech_editor import NAMES as SOURCE_NAMES
from lolgen.speech_editor import SpeechEditor
from lolgen.tasks import speak
from lolgen.tasks.speak import RANK, Judge, at_work, known, learn, requests, scaled
from lolgen.zoo.speeches import SpeechesPlan
from lolgen.zoo.tuning import Tuner
from lolgen.zoo.zoo import Zoo

RIVALS = ("merge", "ridge", "arithmetic")
NAMES = ("before", "lolgen", *RIVALS, "retrained")
DOINGS = ("add", "remove")
KINDS = ("single", "pair", "subset")
"""Adapters that it is done to: of one source, of two, of five to twelve."""
LR = 5e-3
"""Learning rate of the adapters: the best of `speak.RATES` for single sources."""
FACTORS = "rivals.json"
"""Beside the editor's amounts: rival -> add and remove -> (kept, amount)."""
Edit = Callable[[Batch, Tensor], Batch]
"""(adapters, the source of each (N,)) -> edited adapters."""


@dataclass(frozen=True)
class Cases:
    """N edits of one kind: shares before and after (N, sources), and the source added or removed (N,)."""

    doing: str
    kind: str
    have: Tensor
    wanted: Tensor
    source: Tensor

    @staticmethod
    def of(doing: str, kind: str, have: Tensor, seed: int = 0) -> Cases:
        """The source is drawn: of those there for a removal, of the others for an addition."""
        g = torch.Generator().manual_seed(seed)
        inside = have > 0
        source = torch.multinomial((inside if doing == "remove" else ~inside).float(), 1, generator=g)[:, 0]
        marks = inside.clone()
        marks[torch.arange(len(marks)), source] = doing == "add"
        return Cases(doing, kind, have, marks / marks.sum(1, keepdim=True).clamp(min=1), source)

    @property
    def rest(self) -> Tensor:
        """(N, sources) bool: the sources that are there before and after."""
        return (self.have > 0) & (self.wanted > 0)


def all_cases(seed: int, count: int | None = None) -> list[Cases]:
    """Every doing and kind; `count`: only so many of each."""
    asked = requests(seed)
    return [Cases.of(d, k, asked[k][:count], seed) for d in DOINGS for k in KINDS]


def trained(tuner: Tuner, plan: SpeechesPlan, cases: Cases, seed: int, folder: Path) -> tuple[Batch, Batch]:
    """(adapters before the edit, adapters trained anew on what it asks for)."""
    # Requests of seed 0 are those of `speak`, and so are the names of their adapters and what is kept of them.
    tag = cases.kind if seed == 0 else f"{cases.kind}-{seed}"
    before = learn(tuner, plan, "real", tag, cases.have, LR, folder)
    if not bool(cases.wanted.any()):
        # An adapter of nothing is none.
        return before, before.map(lambda U, V: (0 * U, V))
    return before, learn(tuner, plan, "real", f"{cases.doing}-{cases.kind}-{seed}", cases.wanted, LR, folder)


def along(directions: Batch, kept: float, amount: float) -> Edit:
    """`kept` * adapter + `amount` * the direction of the source, at the adapter's rank."""

    def edit(batch: Batch, source: Tensor) -> Batch:
        step = scaled(directions[source], amount)
        return moved(batch.to(torch.float64), step.to(torch.float64), kept=kept).to(torch.float32)

    return edit


def directions_of(
    tuner: Tuner, plan: SpeechesPlan, speaker: Speaker, zoo: Zoo, folder: Path
) -> dict[str, Batch]:
    """Rival -> a LoRA for every source."""
    single = torch.eye(len(SOURCES))
    ridge = speak.ridge(*known(zoo))
    mean = ridge(single.mean(0, keepdim=True))
    return {
        "merge": speaker.batch(single, RANK),
        "ridge": moved(ridge(single), scaled(mean[[0] * len(single)], -1)),
        "arithmetic": learn(tuner, plan, "real", "single", single, LR, folder),
    }


def by_editor(editor: SpeechEditor, doing: str) -> Edit:
    """The shipped edit of one doing."""

    def edit(batch: Batch, source: Tensor) -> Batch:
        named: Sequence[Sequence[str]] = [[SOURCE_NAMES[k]] for k in source.tolist()]
        none: Sequence[Sequence[str]] = [[]] * len(named)
        made = editor.edit(batch, named, none) if doing == "add" else editor.edit(batch, none, named)
        return made.to(torch.float32)

    return edit


def judged(judge: Judge, cases: Cases, batch: Batch) -> tuple[float, float]:
    """(drop in log-perplexity on the edited source, on the rest), means over the edits; 0 where there is no rest."""
    rows = torch.arange(len(batch))
    marks = cases.rest.clone()
    marks[rows, cases.source] = True
    each = judge.each(batch, marks)
    rest = (each * cases.rest).sum(1) / cases.rest.sum(1).clamp(min=1)
    return float(each[rows, cases.source].mean()), float(rest.mean())


def evaluate(
    zoo: str | Path,
    out: str | Path = "reports",
    *,
    quick: bool = False,
    model: str | Path | None = None,
    base: str | Path = "tiny-lm",
) -> str:
    """Train the adapters, edit, judge on test text; write speeches_edit.json and .md, and give the Markdown.

    `model`: folder of the editor, the shipped one by default; `base`: what the zoo's adapters are of.
    `quick`: three edits of each sort and few windows, to see that everything works."""
    found_zoo, out = Zoo.open(zoo), Path(out)
    folder = out / ".cache" / "speeches"
    plan, tuner = at_work(found_zoo, base)
    test = Judge(tuner, "test", 20 if quick else speak.WINDOWS)
    model = Path(model or checkpoints_dir() / "speeches")
    editor = SpeechEditor.from_pretrained(model)
    if not (model / FACTORS).is_file():
        raise LolgenError(f"{model}: found no {FACTORS}, wanted what train.speeches_edit_tune writes")
    directions = directions_of(tuner, plan, editor.speaker, found_zoo, folder)
    factors = json.loads((model / FACTORS).read_text("utf-8"))
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    every = all_cases(0, 3 if quick else None)
    with tqdm(total=len(every) * len(NAMES), desc="eval speeches-edit", unit="system", mininterval=1) as bar:
        for cases in every:
            before, retrained = trained(tuner, plan, cases, 0, folder)
            made = {
                "before": before,
                "lolgen": by_editor(editor, cases.doing)(before, cases.source),
                **{n: along(directions[n], *factors[n][cases.doing])(before, cases.source) for n in RIVALS},
                "retrained": retrained,
            }
            for name in NAMES:
                drops = [round(v, 5) for v in judged(test, cases, made[name])]
                found.setdefault(cases.doing, {}).setdefault(cases.kind, {})[name] = drops
                bar.update()
    report = {
        "command": f"lolgen eval speeches-edit{' --quick' if quick else ''}",
        "base": Path(base).name,
        "edits": len(every[0].source),
        "drops": found,
    }
    write_file(out / "speeches_edit.json", (json.dumps(report, indent=1) + "\n").encode())
    text = markdown(report)
    write_file(out / "speeches_edit.md", text.encode())
    return text


def means(report: dict[str, Any], doing: str) -> dict[str, tuple[float, float]]:
    """System -> (drop on the edited source, on the rest), means over the kinds that leave something over."""
    kinds = [k for name, k in report["drops"][doing].items() if (doing, name) != ("remove", "single")]
    return {
        n: (sum(k[n][0] for k in kinds) / len(kinds), sum(k[n][1] for k in kinds) / len(kinds)) for n in NAMES
    }


def figure(value: float, places: int = 4) -> str:
    """A number in a table; nought has no sign."""
    return f"{round(value, places) + 0:.{places}f}"


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Sources added to adapters, and removed", "",
        f"`{report['command']}`: adapters of rank {RANK} trained on {report['base']}, {report['edits']} edits of every "
        "sort. What the adapter then lowers log-perplexity by (nats) on text that nobody trained on: of the source "
        "edited, and of the sources there before and after. The reference is an adapter trained anew; `way`: how "
        "much of the way from before to it an edit goes on the edited source.",
    ]  # fmt: skip
    for doing, kinds in report["drops"].items():
        lines += [
            "", f"## {'A source added' if doing == 'add' else 'A source removed'}", "",
            "| system | way | edited source | rest | " + " | ".join(f"{k}: edited, rest" for k in kinds) + " |",
            "| --- |" + " --- |" * (3 + len(kinds)),
        ]  # fmt: skip
        mean = means(report, doing)
        for n in NAMES:
            way = (mean[n][0] - mean["before"][0]) / (mean["retrained"][0] - mean["before"][0])
            cells = " | ".join(f"{figure(k[n][0])}, {figure(k[n][1])}" for k in kinds.values())
            row = (n, figure(way, 2), *(figure(v) for v in mean[n]), cells)
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"
