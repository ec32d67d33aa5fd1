"""The toolbox: what people do with adapter files every day, from the weights alone, no model needed."""

from __future__ import annotations
