"""Intruder dimensions by small algebra, against the SVD of W0 + delta W formed in full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lolgen import io
from lolgen.errors import FormatError, LolgenError
from lolgen.io import safetensors_file as stf
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec
from lolgen.paths import checkpoints_dir
from lolgen.tools.inspect import intruder
from lolgen.tools.inspect.basefolder import BaseFolder
from lolgen.tools.inspect.source import open_source

from .files import off_group, regauged


def pair(out: int, in_: int, rank: int, size: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    W0 = torch.randn(out, in_, generator=g, dtype=torch.float64)
    U = torch.randn(out, rank, generator=g, dtype=torch.float64) * size
    return W0, U, torch.randn(in_, rank, generator=g, dtype=torch.float64)


def dense(W0: Tensor, U: Tensor, V: Tensor, k: int) -> Tensor:
    P = torch.linalg.svd(W0, full_matrices=False).U
    top = torch.linalg.svd(W0 + U @ V.mT, full_matrices=False).U[:, :k]
    return (P.mT @ top).abs().amax(0)


@pytest.mark.parametrize("shape", [(24, 24), (20, 33), (33, 20), (40, 6), (1, 9), (9, 1)])
@pytest.mark.parametrize("size", [1e-3, 0.3, 3.0])
def test_the_cosines_are_those_of_the_dense_svd(shape: tuple[int, int], size: float) -> None:
    W0, U, V = pair(*shape, rank=3, size=size, seed=int(size * 10))
    k = min(4, *shape)
    found = intruder.largest_cosines(intruder.spectrum(W0), U, V, k)
    assert torch.allclose(found, dense(W0, U, V, k), atol=1e-6)


def test_float32_weights_and_a_rank_deficient_base() -> None:
    W0, U, V = pair(30, 18, rank=2, size=1.0, seed=4)
    W0 = W0 * torch.linspace(1, 1e-3, 18, dtype=torch.float64)
    found = intruder.largest_cosines(intruder.spectrum(W0.float()), U, V, 5)
    assert torch.allclose(found, dense(W0.float().double(), U, V, 5), atol=1e-4)
    W0[:, 9:] = 0
    found = intruder.largest_cosines(intruder.spectrum(W0), U, V, 5)
    P = torch.linalg.svd(W0, full_matrices=False).U[:, :9]
    top = torch.linalg.svd(W0 + U @ V.mT, full_matrices=False).U[:, :5]
    assert torch.allclose(found, (P.mT @ top).abs().amax(0), atol=1e-6)


def test_a_strong_new_direction_is_an_intruder_and_an_old_one_is_not() -> None:
    W0, _, _ = pair(40, 40, rank=1, size=1, seed=1)
    P, S, Qh = torch.linalg.svd(W0)
    base = intruder.spectrum(W0)
    along = intruder.largest_cosines(base, P[:, :1] * S[0], Qh[:1].mT, 3)
    assert along.min() > 0.999
    new = P.sum(-1, keepdim=True) / 40**0.5  # the same small angle with every direction of the base
    across = intruder.largest_cosines(base, new * 50 * S[0], Qh[:1].mT, 3)
    assert across[0] < 0.3


def test_no_gauge_changes_the_count() -> None:
    spec = Spec((ModuleSpec("m", 30, 20),))
    W0, U, V = pair(30, 20, rank=4, size=2.0, seed=3)
    x = LoRA(spec, {"m": Factors(U, V.mT.contiguous())})
    base = intruder.spectrum(W0)

    def cosines(y: LoRA) -> Tensor:
        return intruder.largest_cosines(base, y["m"].U, y["m"].V, 8)

    y = regauged(x, 1e4)
    assert torch.allclose(cosines(y), cosines(x), atol=1e-6)
    assert not torch.allclose(cosines(off_group(x)), cosines(x), atol=1e-3)


def adapter(folder: Path, size: float) -> Path:
    spec = Spec(tuple(m for m in _tiny_sd_spec() if m.name.endswith(("attn2.to_v", "attn1.to_q"))))
    g = torch.Generator().manual_seed(0)
    factors = {
        m.name: Factors(torch.randn(m.out, 4, generator=g) * size, torch.randn(4, m.in_, generator=g))
        for m in spec
    }
    return io.save(LoRA(spec, factors), folder / f"x{size}.safetensors", "kohya")


def _tiny_sd_spec() -> Spec:
    rows, _ = stf.read_header(checkpoints_dir() / "tiny-sd" / "unet" / "diffusion_pytorch_model.safetensors")
    found = [
        (f"unet.{k.removesuffix('.weight')}", r["shape"]) for k, r in rows.items() if k.endswith(".weight")
    ]
    return Spec(tuple(ModuleSpec(n, *s) for n, s in found if len(s) == 2))


def test_counts_against_the_embedded_base(tmp_path: Path) -> None:
    """Small changes leave the base's directions alone; large ones do not, whatever the threshold."""
    small, large = (open_source(adapter(tmp_path, size)) for size in (1e-4, 10.0))
    counts = intruder.count([small, large], checkpoints_dir() / "tiny-sd", threshold=0.6, k=4)
    a, b = counts.of(str(small.path)), counts.of(str(large.path))
    assert a is not None and b is not None
    assert a["count"] == 0 and a["not_compared"]["count"] == 0 and a["modules"] == len(small.lora or ())
    assert b["count"] > a["modules"] and b["worst"][0]["count"] == 4
    # One module by hand, from the base's own file.
    assert large.lora is not None
    module = large.lora.spec[0]
    W0 = BaseFolder(checkpoints_dir() / "tiny-sd").weight(module)
    assert W0 is not None
    f = large.lora[module.name].to(torch.float64)
    wanted = int((dense(W0.double(), f.U, f.V, 4) < 0.6).sum())
    assert next(w["count"] for w in b["worst"] if w["name"] == module.name) == wanted


def test_modules_that_the_base_lacks_are_counted_and_a_strange_base_is_refused(tmp_path: Path) -> None:
    spec = Spec((_tiny_sd_spec()[0], ModuleSpec("unet.down_blocks.7.attentions.0.proj_in", 4, 4)))
    x = LoRA(spec, {m.name: Factors(torch.ones(m.out, 1), torch.ones(1, m.in_)) for m in spec})
    source = open_source(io.save(x, tmp_path / "x.safetensors", "kohya"))
    found = intruder.count([source], checkpoints_dir() / "tiny-sd").of(str(source.path))
    assert found is not None and found["modules"] == 1
    assert found["not_compared"]["first"] == ["unet.down_blocks.7.attentions.0.proj_in"]
    with pytest.raises(FormatError, match="no safetensors file of a model"):
        intruder.count([source], tmp_path / "nothing")
    stf.write(tmp_path / "base" / "model.safetensors", {"a.weight": torch.ones(2, 2)}, {})
    with pytest.raises(LolgenError, match="none of the adapter's modules"):
        intruder.count([source], tmp_path / "base")
    for wrong in ({"threshold": 0.0}, {"threshold": 1.5}, {"k": 0}):
        with pytest.raises(LolgenError, match="wanted"):
            intruder.count([source], tmp_path / "base", **wrong)  # type: ignore[arg-type]


def test_a_language_model_in_shards_with_weights_the_other_way_round(tmp_path: Path) -> None:
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    stf.write(tmp_path / "model-00001-of-00002.safetensors", {"model.layers.0.q_proj.weight": W}, {})
    stf.write(tmp_path / "model-00002-of-00002.safetensors", {"h.0.attn.c_attn.weight": W.T.contiguous()}, {})
    stf.write(tmp_path / "model.fp16.safetensors", {"model.layers.0.q_proj.weight": W.half() * 0}, {})
    base = BaseFolder(tmp_path)
    for name in ("model.layers.0.q_proj", "h.0.attn.c_attn"):
        found = base.weight(ModuleSpec(name, 6, 4))
        assert found is not None and torch.equal(found, W), name
    assert base.weight(ModuleSpec("h.0.attn.c_attn", 6, 5)) is None
    embedding = base.weight(ModuleSpec("model.layers.0.q_proj", 4, 6, (), "embedding"))
    assert embedding is not None and embedding.shape == (4, 6)
