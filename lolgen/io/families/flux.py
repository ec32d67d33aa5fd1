"""Flux: the original `double_blocks` and `single_blocks`, as sd-scripts and ComfyUI name them, and diffusers' own.

Original modules fuse queries, keys and values (9216 x 3072 at full size) and, in single blocks, the MLP's first
half below them (`linear1`, 21504 x 3072).
"""

from __future__ import annotations

from lolgen.io.families.layout import ADDED_QKV, QKV, Blocks, Layout

_DOUBLE = (
    ("img_attn.qkv", QKV),
    ("img_attn.proj", ("attn.to_out.0",)),
    ("img_mlp.0", ("ff.net.0.proj",)),
    ("img_mlp.2", ("ff.net.2",)),
    ("img_mod.lin", ("norm1.linear",)),
    ("txt_attn.qkv", ADDED_QKV),
    ("txt_attn.proj", ("attn.to_add_out",)),
    ("txt_mlp.0", ("ff_context.net.0.proj",)),
    ("txt_mlp.2", ("ff_context.net.2",)),
    ("txt_mod.lin", ("norm1_context.linear",)),
)
_SINGLE = (
    ("linear1", (*QKV, "proj_mlp")),
    ("linear2", ("proj_out",)),
    ("modulation.lin", ("norm.linear",)),
)
_OUTSIDE = (
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("time_in.in_layer", ("time_text_embed.timestep_embedder.linear_1",)),
    ("time_in.out_layer", ("time_text_embed.timestep_embedder.linear_2",)),
    ("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    ("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    ("guidance_in.in_layer", ("time_text_embed.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", ("time_text_embed.guidance_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
)

LAYOUT = Layout(
    "flux",
    (
        Blocks("double_blocks", "transformer_blocks", _DOUBLE),
        Blocks("single_blocks", "single_transformer_blocks", _SINGLE, read_only=(("linear1_qkv", QKV),)),
    ),
    _OUTSIDE,
    swapped=("final_layer.adaLN_modulation.1",),
)
