"""`lolgen demo`: the app in a browser."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import Any

from lolgen.commands.common import Subparsers
from lolgen.errors import LolgenError

PACKAGE = "lolgen._demos"
"""Where the app lies in the wheel; in a clone the folder `demos` is loaded under this name."""


def add(sub: Subparsers) -> None:
    p = sub.add_parser("demo", help="generate, edit, mix and inspect in a browser")
    p.add_argument("--port", type=int, default=7860)
    p.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 serves the whole network (default: this machine only)"
    )
    p.add_argument(
        "--share", choices=("no", "yes"), default="no", help="yes: a public link through Gradio's servers"
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.port <= 65535:
        raise LolgenError(f"--port: found {args.port}, wanted 1 to 65535")
    # Before the models are loaded: they take some seconds.
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise LolgenError(
                f"port {args.port} on {args.host} cannot be had ({reason}); choose another with --port"
            ) from None
    # No model here comes from the hub, so nothing may wait for it.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    load_app().serve(port=args.port, host=args.host, share=args.share == "yes")
    return 0


def load_app() -> Any:
    """The module `app` of the demos, from the wheel or from the clone; LolgenError when there is neither."""
    if importlib.util.find_spec(PACKAGE) is None:
        # By its place: a folder called `demos` may be anybody's.
        folder = Path(__file__).resolve().parents[2] / "demos"
        if not (folder / "app.py").is_file():
            raise LolgenError(f"no app: tried {PACKAGE} and {folder}; reinstall lolgen")
        where = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert where and where.loader
        package = importlib.util.module_from_spec(where)
        sys.modules[PACKAGE] = package
        where.loader.exec_module(package)
    return importlib.import_module(f"{PACKAGE}.app")
