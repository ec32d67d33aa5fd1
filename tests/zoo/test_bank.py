"""A bank is K LoRAs in one pass: against peft, one LoRA at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model

from lolgen.testing import random_lora
from lolgen.zoo.bank import Bank, BankAdam, find_modules

TARGETS = ("attn2.to_q", "attn2.to_v")


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8,), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=6, attention_head_dim=2, norm_num_groups=4,
        )
        .eval()
        .requires_grad_(False)
    )  # fmt: skip


def seeded(i: int) -> torch.Generator:
    return torch.Generator().manual_seed(i)


def inputs(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, 2, 4, 4, generator=g).to(dtype),
        torch.randint(0, 1000, (rows,), generator=g),
        torch.randn(rows, 5, 6, generator=g).to(dtype),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("ranks", [(3, 3), (1, 4)])
def test_rows_of_a_lora_are_what_peft_computes(unet, dtype, tolerance, ranks):
    net = copy.deepcopy(unet).to(dtype)
    spec = find_modules(net, TARGETS, "unet.")
    loras = [random_lora(spec, r, generator=seeded(i), dtype=dtype) for i, r in enumerate(ranks)]
    x, t, states = inputs(4, dtype)
    bank = Bank.of(loras).to(dtype)
    with torch.no_grad():  # Bank.of holds float32; give it the exact factors
        for k, lora in enumerate(loras):
            for a, b, m in zip(bank.A, bank.B, spec, strict=True):
                f = lora.factors[m.name]
                a[k, : f.rank], b[k, :, : f.rank] = f.A, f.B * f.scale
    bank.attach(net, "unet.")
    found = net(x, t, states, return_dict=False)[0]
    bank.detach_()
    for k, (lora, rank) in enumerate(zip(loras, ranks, strict=True)):
        wrapped = get_peft_model(
            copy.deepcopy(net), LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS))
        )
        for name, module in wrapped.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                f = lora.factors["unet." + name.removeprefix("base_model.model.")]
                module.lora_A["default"].weight.data = f.A.clone()
                module.lora_B["default"].weight.data = (f.B * f.scale).clone()
        rows = slice(2 * k, 2 * k + 2)
        expected = wrapped(x[rows], t[rows], states[rows], return_dict=False)[0]
        assert (found[rows] - expected).norm() <= tolerance * expected.norm()
        plain = net(x[rows], t[rows], states[rows], return_dict=False)[0]
        assert (plain - expected).norm() > 1e-3 * expected.norm(), (
            "the LoRA must matter for this test to say anything"
        )


def test_rows_in_the_wrong_order_give_something_else(unet):
    spec = find_modules(unet, TARGETS, "unet.")
    bank = Bank.of([random_lora(spec, 2, generator=seeded(i)) for i in range(2)])
    x, t, states = inputs(4, torch.float32)
    swap = torch.tensor([2, 3, 0, 1])
    bank.attach(unet, "unet.")
    straight = unet(x, t, states, return_dict=False)[0]
    crossed = unet(x[swap], t[swap], states[swap], return_dict=False)[0][swap]
    bank.detach_()
    assert (straight - crossed).norm() > 1e-3 * straight.norm()


def test_detached_bank_leaves_the_model_as_it_was(unet):
    spec = find_modules(unet, TARGETS, "unet.")
    x, t, states = inputs(2, torch.float32)
    before = unet(x, t, states, return_dict=False)[0]
    bank = Bank.of([random_lora(spec, 2, generator=seeded(3))]).attach(unet, "unet.")
    assert not torch.equal(before, unet(x, t, states, return_dict=False)[0])
    bank.detach_()
    assert torch.equal(before, unet(x, t, states, return_dict=False)[0])


def test_each_lora_has_its_own_rate_steps_and_rank(unet):
    spec = find_modules(unet, TARGETS, "unet.")
    g = torch.Generator().manual_seed(0)
    bank = Bank(spec, [1, 3], [1.0, 2.0]).init_(g)
    start = [a.detach().clone() for a in bank.A]
    opt = BankAdam(bank, torch.tensor([1e-2, 1e-2]), torch.zeros(2), torch.tensor([1.0, 3.0]))
    x, t, states = inputs(4, torch.float32)
    seen = []
    for _ in range(3):
        bank.attach(unet, "unet.")
        unet(x, t, states, return_dict=False)[0].square().mean().backward()
        bank.detach_()
        opt.step()
        seen.append([b.detach().clone() for b in bank.B])
    for first, last in zip(seen[0], seen[-1], strict=True):
        assert torch.equal(first[0], last[0]), "one step was asked for"
        assert not torch.equal(first[1], last[1])
    for a, b, s in zip(bank.A, bank.B, start, strict=True):
        assert a[0, 1:].abs().max() == 0 and b[0, :, 1:].abs().max() == 0, "padding must stay zero"
        assert not torch.equal(a[1], s[1])
    loras = bank.loras()
    assert [next(iter(x.factors.values())).rank for x in loras] == [1, 3]
