"""Bad files by the thousand: reading one ends in a result or in one `FormatError`, soon and in little memory.

    python -m train.fuzz --files 10000 --out reports        # fuzz.json; about 3 min on one core

File number n is the same on every machine. Each is put through `lolgen.io.detect`, `lolgen.io.load`, the report of
`lolgen inspect`, and `lolgen.io.family.detect`. They run in a child process, a few hundred at a time, so that a
crash, a hang or an endless allocation is found as well and blamed on its file. Python's own allocations are measured
file by file (tracemalloc), those of torch by a limit on the child's address space.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lolgen import io
from lolgen.errors import FormatError
from lolgen.io import family
from lolgen.io import safetensors_file as stf
from lolgen.tools.inspect import text
from lolgen.tools.inspect.report import inspect
from train import fuzz_files

SECONDS = 2.0
"""Longest that one file may take of the processor (a busy machine is no fault of the file); mostly it is 0.01."""
TIMES, ROOM = 3, 24 << 20
"""Most memory that Python may take: so many times the file, and this many bytes."""
CHUNK_SECONDS = 60
"""Processor's time that a child may take besides a tenth of `SECONDS` for each file: one that hangs is ended then."""
ADDRESS_SPACE = 3 << 30
"""What torch and everything else may map in the child beyond what its imports did, in bytes."""


@dataclass
class Outcome:
    """`result`: "read", "refused", or what went wrong: "error", "slow", "memory"."""

    number: int
    result: str
    detail: str = ""
    seconds: float = 0.0
    size: int = 0


def check(number: int, folder: Path) -> Outcome:
    """Make file `number` in `folder`, put it through everything, take it away again."""
    place = fuzz_files.make(number, folder)
    size = sum(f.stat().st_size for f in ([place] if place.is_file() else place.iterdir()))
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.process_time()
    outcome = Outcome(number, "read", size=size)
    try:
        error = _everything(place)
        if error is not None:
            outcome.result = "refused"
            if "\n" in str(error) or len(str(error)) > 2000:
                outcome = Outcome(number, "error", f"a message of {len(str(error))} characters", size=size)
    except BaseException as error:
        outcome = Outcome(number, "error", f"{type(error).__name__}: {error}"[:300], size=size)
        if isinstance(error, KeyboardInterrupt):
            raise
    outcome.seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1] - before
    if outcome.result in ("read", "refused"):
        if outcome.seconds > SECONDS and tracemalloc.is_tracing():
            outcome.seconds = _untraced(place)
        if outcome.seconds > SECONDS:
            outcome.result, outcome.detail = "slow", f"{outcome.seconds:.1f} s"
        elif tracemalloc.is_tracing() and peak > TIMES * size + ROOM:
            outcome.result, outcome.detail = "memory", f"{peak} bytes for a file of {size}"
    for f in [place] if place.is_file() else [*place.iterdir(), place]:
        f.rmdir() if f.is_dir() else f.unlink()
    return outcome


def _untraced(place: Path) -> float:
    """Processor seconds of a file without the tracing of allocations, which can cost ten times the reading."""
    tracemalloc.stop()
    try:
        start = time.process_time()
        _everything(place)
        return time.process_time() - start
    finally:
        tracemalloc.start()


def _everything(place: Path) -> FormatError | None:
    """The error with which `lolgen.io.load` refuses the file; any error but a FormatError is raised."""
    file = place if place.is_file() else place / "adapter_model.safetensors"
    refused = None
    acts: tuple[Callable[[Path], object], ...] = (io.detect, _report, lambda _: _family(file), io.load)
    for act in acts:
        refused = None
        try:
            act(place)
        except FormatError as error:
            refused = error
    return refused


def _report(place: Path) -> None:
    report = inspect(place, modules=True)
    json.dumps(report, allow_nan=False)
    "\n".join(text.page(report)).encode()


def _family(file: Path) -> None:
    rows, metadata = stf.read_header(file)
    found = family.detect({k: tuple(r["shape"]) for k, r in rows.items()}, metadata)
    assert found.label and all("\n" not in s for s in found.evidence[:1])


def child(first: int, last: int) -> None:
    """Check files first to last - 1, a line of JSON each; before each its number, so that a crash has a name."""
    soft = _mapped() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    busy = int(CHUNK_SECONDS + SECONDS * 0.1 * (last - first))
    resource.setrlimit(resource.RLIMIT_CPU, (busy, busy + 5))
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            print(json.dumps({"start": number}), flush=True)
            print(json.dumps(asdict(check(number, Path(folder)))), flush=True)


def _mapped() -> int:
    """Bytes of address space in use (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def run(files: int, chunk: int = 500, first: int = 0) -> list[Outcome]:
    """Outcomes of `files` files; one for a file that killed its process, which goes on behind it."""
    found: list[Outcome] = []
    at, end = first, first + files
    while at < end:
        last = min(at + chunk, end)
        command = [sys.executable, "-m", "train.fuzz", "--child", str(at), str(last)]
        reached = at - 1
        done = subprocess.run(command, capture_output=True, text=True)
        lines, code = done.stdout.splitlines(), done.returncode
        for line in lines:
            row = json.loads(line)
            if "start" in row:
                reached = row["start"]
            else:
                found.append(Outcome(**row))
        if code and reached < at:
            raise RuntimeError(f"the child does not start: {done.stderr[-2000:]}")
        if code:
            result = "hang" if code in (-signal.SIGXCPU, -signal.SIGKILL) else "crash"
            found.append(Outcome(reached, result, f"the process ended with {code}: {done.stderr[-200:]}"))
        at = reached + 1
        for wrong in (o for o in found if o.number >= last - chunk and o.result not in ("read", "refused")):
            print(wrong, file=sys.stderr)
        print(
            f"{at - first} files, {sum(o.result not in ('read', 'refused') for o in found)} wrong",
            file=sys.stderr,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    start = time.perf_counter()
    outcomes = run(args.files, first=args.first)
    wrong = [o for o in outcomes if o.result not in ("read", "refused")]
    report = {
        "command": f"python -m train.fuzz --files {args.files}",
        "files": len(outcomes),
        "results": dict(Counter(o.result for o in outcomes).most_common()),
        "wrong": [asdict(o) for o in wrong[:50]],
        "slowest_seconds": round(max(o.seconds for o in outcomes), 3),
        "limits": {"seconds": SECONDS, "memory": f"{TIMES} x the file + {ROOM >> 20} MiB"},
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(report, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fuzz.json").write_text(json.dumps(report, indent=1) + "\n")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
