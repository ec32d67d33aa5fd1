"""Text encoders: CLIP (both of SDXL), and T5 of Flux and SD3."""

from __future__ import annotations

import re

CLIP_SEGMENTS = frozenset(
    {
        "text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2",
        "text_projection", "embeddings", "token_embedding", "position_embedding",
    }
)  # fmt: skip
CLIP_TOPS = frozenset({"text_model", "text_projection"})

_T5 = re.compile(r"(encoder)[._](block)[._](\d+)[._](layer)[._](\d)[._](.+)")
_T5_INNER = {
    name.replace(".", "_"): name
    for name in (
        *(f"SelfAttention.{p}" for p in "qkvo"),
        *(f"DenseReluDense.{p}" for p in ("wi", "wi_0", "wi_1", "wo")),
    )
}


def clip_modules(layers: int = 12, component: str = "text_encoder") -> tuple[str, ...]:
    """Every linear module of a CLIP text encoder's layers; 12 are the CLIP-L of Stable Diffusion 1.x and the first
    of SDXL, 23 that of Stable Diffusion 2, 32 the second of SDXL."""
    parts = (*(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
    at = f"{component}.text_model.encoder.layers"
    return tuple(f"{at}.{i}.{p}" for i in range(layers) for p in parts)


def t5_path(name: str) -> str | None:
    """The path in T5 of a name with dots or underscores, `encoder_block_0_layer_0_SelfAttention_q`, or None."""
    match = _T5.fullmatch(name)
    inner = _T5_INNER.get(match[6].replace(".", "_")) if match else None
    return None if match is None or inner is None else ".".join((*match.groups()[:5], inner))
