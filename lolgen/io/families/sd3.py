"""Stable Diffusion 3 and 3.5: the original `joint_blocks`, as sd-scripts and ComfyUI name them, and diffusers' own."""

from __future__ import annotations

from lolgen.io.families.layout import ADDED_QKV, QKV, Blocks, Layout

_JOINT = (
    ("x_block.attn.qkv", QKV),
    ("x_block.attn.proj", ("attn.to_out.0",)),
    ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    ("x_block.attn2.proj", ("attn2.to_out.0",)),
    ("x_block.mlp.fc1", ("ff.net.0.proj",)),
    ("x_block.mlp.fc2", ("ff.net.2",)),
    ("x_block.adaLN_modulation.1", ("norm1.linear",)),
    ("context_block.attn.qkv", ADDED_QKV),
    ("context_block.attn.proj", ("attn.to_add_out",)),
    ("context_block.mlp.fc1", ("ff_context.net.0.proj",)),
    ("context_block.mlp.fc2", ("ff_context.net.2",)),
    # In the last block, where the text ends, this is a plain scale and shift, and swapped.
    ("context_block.adaLN_modulation.1", ("norm1_context.linear",)),
)
_OUTSIDE = (
    ("x_embedder.proj", ("pos_embed.proj",)),
    ("context_embedder", ("context_embedder",)),
    ("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    ("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    ("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
    ("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear",)),
)

LAYOUT = Layout(
    "sd3",
    (Blocks("joint_blocks", "transformer_blocks", _JOINT),),
    _OUTSIDE,
    swapped=("final_layer.adaLN_modulation.1", "context_block.adaLN_modulation.1"),
)
