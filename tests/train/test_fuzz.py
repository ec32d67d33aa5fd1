"""The fuzzer finds what it looks for, and finds nothing in a few hundred files; ten thousand are a slow test."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lolgen.io import safetensors_file as stf
from train import fuzz, fuzz_files

FAST = 150


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_a_few_hundred_files(tmp_path: Path, traced: None) -> None:
    outcomes = [fuzz.check(n, tmp_path) for n in range(20_000, 20_000 + FAST)]
    wrong = [o for o in outcomes if o.result not in ("read", "refused")]
    assert not wrong
    results = Counter(o.result for o in outcomes)
    assert results["read"] > FAST // 20 and results["refused"] > FAST // 3  # both sides are reached
    assert not list(tmp_path.iterdir())


def test_files_are_the_same_everywhere(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for n in range(40):
        a, b = (fuzz_files.make(n, tmp_path / name) for name in ("a", "b"))
        for x, y in zip(
            [a] if a.is_file() else sorted(a.iterdir()),
            [b] if b.is_file() else sorted(b.iterdir()),
            strict=True,
        ):
            assert x.read_bytes() == y.read_bytes()
            x.unlink(), y.unlink()
        if a.exists():
            a.rmdir(), b.rmdir()


@pytest.mark.parametrize("fault, result", [
    (lambda _: 1 / 0, "error"), (lambda _: sum(range(20_000_000)), "slow"), (lambda _: [0] * (8 << 20), "memory"),
])  # fmt: skip
def test_every_fault_is_seen(
    fault: Any, result: str, tmp_path: Path, traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.1 if result == "slow" else 60)
    monkeypatch.setattr(fuzz, "_report", fault)
    assert fuzz.check(3, tmp_path).result == result


def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    """Inspected and loaded, a file raises the process's peak by less than three times its size, mapped pages too."""
    tensors = {}
    for i in range(16):
        tensors[f"lora_unet_m{i}.lora_down.weight"] = torch.full((64, 8000), 0.5)
        tensors[f"lora_unet_m{i}.lora_up.weight"] = torch.full((200, 64), 0.5)
    file = tmp_path / "x.safetensors"
    stf.write(file, tensors, {})
    code = (
        "import resource, sys, torch; from lolgen import io; from lolgen.tools.inspect.report import inspect\n"
        "torch.linalg.eigvalsh(torch.ones(64, 64, dtype=torch.float64) @ torch.eye(64, dtype=torch.float64))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); inspect(sys.argv[1]); io.load(sys.argv[1]); print((peak() - before) * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3 * file.stat().st_size + (24 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("fault, result", [
    ("while True: pass", "hang"), ("import os; os._exit(3)", "crash"), ("bytearray(6 << 30)", "error"),
])  # fmt: skip
def test_what_ends_the_process_is_blamed_on_its_file(
    fault: str, result: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One file of nine does it; the other eight are read all the same."""
    code = (
        "import sys; from train import fuzz; fuzz.CHUNK_SECONDS = 10; real = fuzz._report\n"
        "def act(place):\n"
        "    if fuzz.number == 4:\n        FAULT\n"
        "    return real(place)\n"
        "def check(n, folder, plain=fuzz.check):\n"
        "    fuzz.number = n; return plain(n, folder)\n"
        "fuzz._report, fuzz.check = act, check; fuzz.child(int(sys.argv[-2]), int(sys.argv[-1]))"
    ).replace("FAULT", fault)
    real = subprocess.run
    monkeypatch.setattr(
        fuzz.subprocess,
        "run",
        lambda command, **rest: real([sys.executable, "-c", code, *command[-2:]], **rest),
    )
    outcomes = fuzz.run(9)
    assert [o.number for o in outcomes] == list(range(9))
    assert outcomes[4].result == result
    assert all(o.result in ("read", "refused") for o in outcomes if o.number != 4)


def test_a_child_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run
    monkeypatch.setattr(
        fuzz.subprocess, "run", lambda command, **rest: real([sys.executable, "-c", "1 +"], **rest)
    )
    with pytest.raises(RuntimeError, match="SyntaxError"):
        fuzz.run(3)


@pytest.mark.slow
def test_ten_thousand_files() -> None:
    """In child processes, as `python -m train.fuzz` does: crashes and endless allocations are seen too."""
    outcomes = fuzz.run(10_000, first=100_000)
    assert len(outcomes) == 10_000
    assert not [o for o in outcomes if o.result not in ("read", "refused")]


@pytest.mark.parametrize("number", [3597, 3894, 4824, 5160, 6010, 6786, 6830, 7961, 100252])
def test_files_that_once_went_wrong(tmp_path, number):
    """Control characters in a quoted key, numbers past float64, magnitudes that do not split, an endless name."""
    assert fuzz.check(number, tmp_path).result in ("read", "refused")
