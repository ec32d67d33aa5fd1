"""What an adapter file is, what is in it, and what each program will make of it: `lolgen inspect`."""

from __future__ import annotations
