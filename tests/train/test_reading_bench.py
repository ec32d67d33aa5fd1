"""The reading benchmark: every ratio is of two numbers of the same run, and every reading sees a batch of its own."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from train import reading_bench as bench


def test_ratios_are_of_every_reading_to_every_measuring() -> None:
    found = bench.ratios({"a": 2.0, "b": 8.0}, {"x": 0.5, "y": 0.001})
    assert found == {"x": {"a": 4.0, "b": 16.0}, "y": {"a": 2000.0, "b": 8000.0}}


def test_median_takes_a_new_input_each_time_and_leaves_the_first_out() -> None:
    seen: list[int] = []
    assert bench.median(seen.append, count(), 4) >= 0
    assert seen == [0, 1, 2, 3, 4]


def test_flops_are_those_counted_by_hand() -> None:
    diffusers = pytest.importorskip("diffusers")
    facts = {
        "sample_size": 8, "cross_attention_dim": 16, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    net, tokens, total = diffusers.UNet2DConditionModel(**facts), 5, 0

    def linear(module, args, out) -> None:
        nonlocal total
        total += 2 * out.numel() * module.in_features

    def conv(module, args, out) -> None:
        nonlocal total
        total += 2 * out.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]

    def attention(module, args, kwargs, out) -> None:
        nonlocal total
        states, other = args[0], kwargs.get("encoder_hidden_states")
        keys = (states if other is None else other).shape[1]
        total += 2 * 2 * states.shape[1] * keys * module.inner_dim  # scores, then values

    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(linear)
        elif isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(conv)
        elif type(module).__name__ == "Attention":
            module.register_forward_hook(attention, with_kwargs=True)
    with torch.no_grad():
        net(torch.zeros(1, 4, 8, 8), torch.tensor(1), torch.zeros(1, tokens, 16))
    parameters = sum(p.numel() for p in net.parameters())
    assert bench.unet_flops(net.config, tokens) == (total, parameters)


def test_the_larger_unet_is_stable_diffusion_15() -> None:
    pytest.importorskip("diffusers")
    assert bench.unet_flops(bench.SD15_UNET, 77)[1] == 859_520_964


def test_the_table_names_what_it_divides_by() -> None:
    report = {
        "command": "c", "prompts": 33, "measuring_seconds": {bench.LABELS: 1.0, bench.USERS: 4.0},
        "reading_seconds": {"one LoRA": 0.001}, "unet_flops": {"embedded": 10, "sd15": 70},
    }  # fmt: skip
    text = bench.markdown(report)
    assert "| one LoRA | 0.001 | 1,000 | 4,000 |" in text and "7 times as many" in text
    assert text.index(bench.LABELS) < text.index(bench.USERS)
