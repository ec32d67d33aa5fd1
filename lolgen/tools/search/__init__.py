"""A folder of thousands of adapters by what they do: which are like this one, which are the same: `lolgen search`."""

from __future__ import annotations
