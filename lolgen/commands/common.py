"""What the commands share: NAME=VALUE arguments, requests, output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lolgen.errors import LolgenError

Subparsers = Any
"""What `ArgumentParser.add_subparsers` gives."""
FORMATS = ("peft", "diffusers", "kohya")


def pair(text: str) -> tuple[str, str]:
    """NAME=VALUE, for `type=` of an argument."""
    name, sep, value = text.partition("=")
    if not sep or not name or not value:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted NAME=VALUE")
    return name, value


def request_of(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The pairs as a mapping; LolgenError when one name is given two values."""
    request: dict[str, str] = {}
    for name, value in pairs:
        if request.get(name, value) != value:
            raise LolgenError(f"{name} is asked to be both {request[name]!r} and {value!r}; ask for one")
        request[name] = value
    return request


def speeches_model(zoo: str) -> str | Path:
    """`--zoo` as the pipeline takes it: 'speeches', or the folder of a generator of speeches; else LolgenError."""
    if zoo == "speeches":
        return zoo
    if not Path(zoo).is_dir():
        raise LolgenError(
            f"--zoo: found {zoo!r}, wanted faces, speeches or the folder of a generator of speeches"
        )
    return Path(zoo).resolve()


def one_thread() -> None:
    """The models are small: a second thread gains nothing, and beside another busy process it costs seconds."""
    import torch

    torch.set_num_threads(1)


def show(data: Any, lines: list[str], as_json: bool) -> None:
    """The report: for machines, or for people."""
    print(json.dumps(data, indent=1) if as_json else "\n".join(lines))


def read_lines(report: dict[str, Any]) -> list[str]:
    """The lines of a report on an adapter that was read once: attributes, warnings, how to call it."""
    lines = [f"  {n}: {a['value']} ({a['probability']:.2f})" for n, a in report["attributes"].items()]
    return lines + closing_lines(report)


def closing_lines(report: dict[str, Any]) -> list[str]:
    """Warnings, the prompt, the preview if there is one."""
    lines = [f"  warning: {text}" for text in report.get("warnings", [])]
    lines += [f"  use it with the prompt: {report['prompt']}"]
    return lines + ([f"  preview: {report['preview']}"] if "preview" in report else [])
