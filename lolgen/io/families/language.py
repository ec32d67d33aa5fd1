"""Language models, whose modules have one name everywhere: their paths in the model of transformers."""

from __future__ import annotations

import re

_GPT2 = re.compile(r"(?:transformer\.)?h\.\d+\.(?:attn|mlp|crossattention)\.(?:c_attn|c_proj|c_fc|q_attn)")


def is_gpt2(path: str) -> bool:
    """Whether a path is of a GPT-2 layer that stores its weight (in, out), which PEFT calls `fan_in_fan_out`."""
    return _GPT2.fullmatch(path) is not None
