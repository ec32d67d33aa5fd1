"""The core types: shapes and errors, the spec's JSON and fingerprint, batches there and back."""

from __future__ import annotations

import pickle

import pytest
import torch

from lolgen.errors import FormatError, LolgenError, ShapeError, SpecError
from lolgen.lora import Batch, Factors, LoRA, ModuleSpec, Spec
from lolgen.testing import random_lora


def test_module_spec_shapes() -> None:
    assert ModuleSpec("a", 12, 10).shape == (12, 10)
    assert ModuleSpec("c", 8, 3, (3, 5), "conv").shape == (8, 45)
    assert ModuleSpec("e", 6, 40, kind="embedding").in_flat == 40


@pytest.mark.parametrize(
    "arguments",
    [
        ("a", 0, 4),
        ("a", 4, 4, (3, 0), "conv"),
        ("a", 4, 4, (), "conv"),
        ("a", 4, 4, (3, 3), "linear"),
        ("a", 4, 4, (), "Linear"),
    ],
)
def test_module_spec_refuses_nonsense(arguments: tuple) -> None:
    with pytest.raises(SpecError, match="'a'"):
        ModuleSpec(*arguments)


def test_spec_lookup_and_groups(spec: Spec) -> None:
    assert spec["embed"] is spec[2] and spec.index("embed") == 2 and "embed" in spec and "nothing" not in spec
    assert [m.name for m in spec] == list(spec.names) and len(spec) == 8
    # conv_in (3 channels, 3x3) and conv_1x1 (27 channels) have one shape; order is of first appearance.
    assert spec.groups[:3] == (((12, 10), (0, 3)), ((8, 27), (1, 4)), ((6, 40), (2,)))
    assert sorted(i for _, index in spec.groups for i in index) == list(range(8))
    with pytest.raises(KeyError):
        spec["nothing"]
    with pytest.raises(SpecError, match="more than once: a"):
        Spec((ModuleSpec("a", 2, 2), ModuleSpec("b", 2, 2), ModuleSpec("a", 3, 2)))


def test_spec_json_and_fingerprint_are_pinned() -> None:
    spec = Spec((ModuleSpec("a.to_q", 4, 3), ModuleSpec("c", 2, 3, (3, 3), "conv")))
    text = (
        '{"modules":[{"name":"a.to_q","out":4,"in":3,"kernel":[],"kind":"linear"},'
        '{"name":"c","out":2,"in":3,"kernel":[3,3],"kind":"conv"}]}'
    )
    assert spec.to_json() == text
    assert Spec.from_json(text) == spec and hash(Spec.from_json(text)) == hash(spec)
    assert spec.fingerprint() == "555123e56ff993d8728681a0c4bee2a0752b740f16ed48720b7d5890a1f3a999"
    assert Spec(spec.modules[::-1]).fingerprint() != spec.fingerprint()
    assert Spec.from_json(Spec(()).to_json()) == Spec(())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"modules":[{"name":"a"}]}', '{"modules":3}', "null"])
def test_spec_from_json_refuses_anything_else(text: str) -> None:
    with pytest.raises(SpecError, match="spec"):
        Spec.from_json(text)


def test_factors_follow_the_definition(dtype: torch.dtype, generator: torch.Generator) -> None:
    B, A = (
        torch.randn(5, 2, generator=generator, dtype=dtype),
        torch.randn(2, 7, generator=generator, dtype=dtype),
    )
    f = Factors(B, A, 0.5)
    assert f.rank == 2 and f.U.shape == (5, 2) and f.V.shape == (7, 2)
    wanted = torch.stack([0.5 * sum(B[i, k] * A[k] for k in range(2)) for i in range(5)])
    torch.testing.assert_close(f.delta(), wanted)
    torch.testing.assert_close(f.U @ f.V.T, wanted)


def test_lora_holds_what_it_is_given(lora: LoRA, spec: Spec, dtype: torch.dtype) -> None:
    assert lora.names == spec.names and len(lora) == len(spec) and lora.dtype == dtype
    assert list(lora.ranks.values()) == [4, 3, 6, 1, 8, 5, 2, 3]
    shuffled = LoRA(spec, dict(reversed(lora.factors.items())), {"note": "x"}, {"m": torch.ones(3)})
    assert tuple(shuffled.factors) == spec.names
    half = shuffled.to(torch.float16)
    assert (
        half.dtype == torch.float16
        and half.metadata == {"note": "x"}
        and half.extras["m"].dtype == torch.float32
    )
    mixed = lora.replace({**lora.factors, "gate": lora["gate"].to(torch.float16)})
    assert mixed.dtype == dtype and mixed.to(torch.float64).dtype == torch.float64
    assert LoRA(Spec(()), {}).dtype == torch.float32


@pytest.mark.parametrize(
    "B, A, message",
    [
        (
            torch.ones(4, 2),
            torch.ones(2, 4),
            r"'m': found B \(4, 2\), A \(2, 4\), wanted B \(4, rank\), A \(rank, 3\)",
        ),
        (torch.ones(3, 2), torch.ones(2, 3), "'m'"),
        (torch.ones(4, 2), torch.ones(3, 3), "'m'"),
        (torch.ones(4, 2, 1, 1), torch.ones(2, 3), "flatten a conv"),
        (torch.ones(4, 0), torch.ones(0, 3), "rank of 1 or more"),
        (torch.ones(4, 2, dtype=torch.int8), torch.ones(2, 3), "floating point"),
        (torch.ones(()), torch.ones(2, 3), "'m'"),
    ],
)
def test_lora_refuses_factors_that_do_not_fit(B: torch.Tensor, A: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        LoRA(Spec((ModuleSpec("m", 4, 3),)), {"m": Factors(B, A)})


def test_lora_refuses_other_names_and_scales() -> None:
    spec = Spec((ModuleSpec("m", 4, 3), ModuleSpec("n", 4, 3)))
    good = Factors(torch.ones(4, 1), torch.ones(1, 3))
    with pytest.raises(SpecError, match="missing n; not in the spec o"):
        LoRA(spec, {"m": good, "o": good})
    with pytest.raises(ShapeError, match="'n': found scale nan"):
        LoRA(spec, {"m": good, "n": Factors(good.B, good.A, float("nan"))})


def stacked(spec: Spec, dtype: torch.dtype, generator: torch.Generator) -> tuple[list[LoRA], Batch]:
    ranks = ([4, 3, 6, 1, 8, 5, 2, 3], [1] * 8, [2, 9, 4, 1, 1, 3, 3, 1])
    loras = [
        random_lora(spec, r, scale=0.3 + i, generator=generator, dtype=dtype) for i, r in enumerate(ranks)
    ]
    return loras, Batch.stack(loras, dtype)


def test_batch_there_and_back(spec: Spec, dtype: torch.dtype, generator: torch.Generator) -> None:
    loras, batch = stacked(spec, dtype, generator)
    assert len(batch) == 3 and batch.rank == 9 and batch.dtype == dtype
    assert batch.ranks.tolist() == [list(x.ranks.values()) for x in loras]
    for (shape, index), group in zip(spec.groups, batch.groups, strict=True):
        assert group.U.shape == (3, len(index), shape[0], 9) and group.V.shape == (3, len(index), shape[1], 9)
        outside = ~batch.mask(group)[:, :, None]
        assert not (group.U * outside).any() and not (group.V * outside).any()
    for was, now in zip(loras, batch.unstack(), strict=True):
        assert now.ranks == was.ranks and all(f.scale == 1 for f in now.factors.values())
        for name in spec.names:
            torch.testing.assert_close(now[name].delta(), was[name].delta(), rtol=1e-6, atol=0)
            assert now[name].A.equal(was[name].A) and now[name].A.is_contiguous()


def test_batch_stacks_half_precision_without_loss(spec: Spec, generator: torch.Generator) -> None:
    half = random_lora(spec, 2, scale=1 / 3, generator=generator, dtype=torch.float16)
    U = Batch.stack([half], torch.float64).groups[0].U[0, 0, :, :2]
    assert U.equal(half["attn.to_q"].B.double() * (1 / 3))


def test_batch_selects_and_concatenates(spec: Spec, dtype: torch.dtype, generator: torch.Generator) -> None:
    loras, batch = stacked(spec, dtype, generator)

    def same(x: Batch, rows: list[int]) -> None:
        assert len(x) == len(rows)
        for lora, i in zip(x.unstack(), rows, strict=True):
            assert lora.ranks == loras[i].ranks
            assert lora["embed"].B.equal(loras[i]["embed"].U)

    same(batch[1], [1])
    same(batch[-1], [2])
    same(batch[1:], [1, 2])
    same(batch[:0], [])
    same(batch[[2, 0]], [2, 0])
    same(batch[torch.tensor([2, 2])], [2, 2])
    same(batch[torch.tensor([True, False, True])], [0, 2])
    same(batch[[]], [])
    with pytest.raises(IndexError):
        batch[3]
    narrow = Batch.stack(loras[1:2], dtype)
    assert narrow.rank == 1
    same(Batch.cat([narrow, batch]), [1, 0, 1, 2])
    assert Batch.cat([narrow, batch]).rank == 9
    assert narrow.padded(5).padded(1).groups[0].U.equal(narrow.groups[0].U)
    with pytest.raises(ShapeError, match="rank 9"):
        batch.padded(8)


def test_batch_map_to_and_masked(spec: Spec, generator: torch.Generator) -> None:
    _, batch = stacked(spec, torch.float64, generator)
    dirty = batch.map(lambda U, V: (U + 1, V + 1))
    clean = dirty.masked()
    for group, original in zip(clean.groups, batch.groups, strict=True):
        outside = ~batch.mask(group)[:, :, None]
        assert not (group.U * outside).any() and not (group.V * outside).any()
        assert (group.U * ~outside).equal((original.U + 1) * ~outside)
    single = batch.to(torch.float32)
    assert single.dtype == torch.float32 and single.ranks.dtype == torch.long
    doubled = batch.map(lambda U, V: (torch.cat([U, U], -1), torch.cat([V, V], -1)), ranks=batch.ranks * 2)
    assert doubled.rank == 18


def test_batch_refuses_what_does_not_belong_together(spec: Spec, generator: torch.Generator) -> None:
    _, batch = stacked(spec, torch.float32, generator)
    a = random_lora(spec, 2, generator=generator)
    b = random_lora(Spec(spec.modules[:-1]), 2, generator=generator)
    with pytest.raises(SpecError, match="LoRA 1 .* without gate"):
        Batch.stack([a, b])
    with pytest.raises(SpecError, match="another order"):
        Batch.stack([a, random_lora(Spec(spec.modules[::-1]), 2, generator=generator)])
    with pytest.raises(SpecError, match="empty list"):
        Batch.stack([])
    with pytest.raises(SpecError, match="empty list"):
        Batch.cat([])
    with pytest.raises(SpecError, match="batch 1"):
        Batch.cat([Batch.stack([a]), Batch.stack([b])])
    with pytest.raises(SpecError, match="groups"):
        Batch(spec, batch.groups[::-1], batch.ranks)
    with pytest.raises(ShapeError, match="ranks"):
        Batch(spec, batch.groups, batch.ranks[:, 1:])
    with pytest.raises(ShapeError, match="U of the group of module 'attn.to_q'"):
        batch.map(lambda U, V: (U[..., :-1, :], V))
    with pytest.raises(ShapeError, match="V of the group"):
        batch.map(lambda U, V: (U, V[..., :-1]))


def test_a_batch_without_modules() -> None:
    empty = Batch.stack([LoRA(Spec(()), {})] * 2)
    assert len(empty) == 2 and empty.rank == 0 and len(empty.unstack()) == 2 and len(empty[0]) == 1
    assert len(Batch.cat([empty, empty.to(torch.float64)])) == 4


def test_gradients_pass_through_a_batch(spec: Spec, generator: torch.Generator) -> None:
    _, batch = stacked(spec, torch.float64, generator)
    U = batch.groups[0].U.requires_grad_()
    batch[1:].unstack()[0]["attn.to_v"].delta().sum().backward()
    assert U.grad is not None and U.grad[1, 1].any() and not U.grad[0].any()


def test_format_error_is_one_line_and_pickles() -> None:
    error = FormatError(
        "x.safetensors", key="a.lora_A", found="(2,\n 3)", wanted="(2, 4)", remedy="train it again"
    )
    assert isinstance(error, LolgenError)
    assert str(error) == "x.safetensors, key 'a.lora_A': found (2, 3); wanted (2, 4); train it again"
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.key == "a.lora_A" and again.remedy == "train it again"
    assert str(FormatError("x", found="1", wanted="2", remedy="3")) == "x: found 1; wanted 2; 3"


def test_public_names_are_there_and_load_on_use() -> None:
    import lolgen

    assert lolgen.LoRA is LoRA and lolgen.gl.canonical is not None
    assert all(getattr(lolgen, name) is not None for name in lolgen.__all__)
    assert set(lolgen.__all__) <= set(dir(lolgen))
    with pytest.raises(AttributeError, match="nothing"):
        _ = lolgen.nothing
