"""One file a command of the CLI: `add` its parser, `run` what was parsed. Nothing heavy is imported before `run`."""

from __future__ import annotations
