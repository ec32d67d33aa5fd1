"""The scaling benchmark: shapes of the GPT-3 family, honest bytes, and every model end to end at a tiny width."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import nn

from train import scaling_bench as bench
from train.memory import capped, out_of_memory, peak, resident

TINY = {"125M": (2, 16), "350M": (3, 20)}


def test_shapes_are_of_the_size_that_they_are_named_after() -> None:
    for name, (layers, width) in bench.SHAPES.items():
        # A transformer has about 12 width^2 weights a layer; small ones have as much again in embeddings.
        assert 0.5 < 12 * layers * width**2 / bench.parameters(name) < 1.1, name


def test_a_lora_of_175B_is_38_megabytes_in_half_precision() -> None:
    layers, width = bench.SHAPES["175B"]
    assert bench.make(2, 16, 3).groups[0].U.shape == (3, 2, 16, bench.RANK)
    assert 2 * 2 * layers * width * bench.RANK == pytest.approx(19e6, rel=0.01)
    assert 4 * 2 * layers * width * bench.RANK == pytest.approx(38e6, rel=0.01)


def test_dense_bytes_are_those_of_delta_w_and_its_first_layer() -> None:
    assert bench.bytes_of("dense_formed", 2, 10, 4) == 4 * 200 * (1 + bench.HIDDEN)
    assert bench.bytes_of("dense_formed_linear", 2, 10, 4) == 4 * 200 * (1 + 2)
    assert bench.bytes_of("dense_formed", *bench.SHAPES["175B"], 16) > 3e12


@pytest.mark.parametrize("row", list(bench.FORMED))
def test_dense_bytes_agree_with_what_the_net_holds(row: str) -> None:
    batch = bench.make(3, 20, 2)
    net = sum(bench.held(bench.reader_of(row, batch)).values())
    need = bench.bytes_of(row, 3, 20, 2) - 4 * 3 * 20**2  # less delta W itself
    assert need <= net <= need + 4 * (4 * bench.HIDDEN + bench.HIDDEN + 2)


@pytest.mark.parametrize("row", list(bench.FORMED))
def test_delta_w_formed_is_read_as_by_multiplying_out(row: str) -> None:
    batch = bench.make(2, 6, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        read = bench.reader_of(row, batch)
        torch.manual_seed(0)
        net = bench.small_net(2 * 36, bench.FORMED[row], 2).eval()
    (g,) = batch.groups
    delta = torch.einsum("nmor,nmir->nmoi", g.U, g.V).flatten(1)
    torch.testing.assert_close(read(batch), net(delta))


def test_every_model_reads_a_tiny_family(monkeypatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", TINY)
    rows, limit = [*bench.ROWS, *bench.FORMED], 1e9
    found = bench.measure(list(TINY), rows, 6, limit, 1)
    assert all(e["seconds"] > 0 and e["held_bytes"] > 0 for r in rows for e in found[r].values())
    assert set(bench.MODELS) - {"majority"} == {r.model for r in bench.ROWS.values()}
    for r in bench.ROWS:
        for e in found[r].values():
            ratio = (
                found["dense_formed"]["125M" if e is found[r]["125M"] else "350M"]["seconds"] / e["seconds"]
            )
            assert e["times_faster_than_dense_formed"] == pytest.approx(ratio, rel=1e-3)
    short = bench.bytes_of("dense_formed", 3, 20, 6) - 1
    found["dense_formed"] = bench.measure(list(TINY), ["dense_formed"], 6, short, 1)["dense_formed"]
    assert "seconds" in found["dense_formed"]["125M"] and "seconds" not in found["dense_formed"]["350M"]
    report = {"command": "c", "sizes": list(TINY), "stored": 6, "limit_bytes": limit, "models": found}
    text = bench.markdown(json.loads(json.dumps(report)))
    assert text.count("out of memory") == 1 and bench.plot(report)[:4] == b"\x89PNG"


def test_a_row_that_never_fits_is_no_line_of_the_figure() -> None:
    models = {"mlp": {"125M": {"need_bytes": 1}}, "svd": {"125M": {"need_bytes": 1, "seconds": 1.0}}}
    assert bench.plot({"models": models})[:4] == b"\x89PNG"


def test_ours_is_timed_at_the_size_of_the_table() -> None:
    batch = bench.make(2, 16, 6)
    read = bench.reader_of("ours", batch)
    model = read.__self__
    assert model.traits.into.shape[1] == bench.COMPONENTS
    assert model.traits.tier == 0 and len(model.neighbours[0]) == bench.LORAS
    assert {m.kind for m in model.members} == {"kernel", "net", "glnet", "cosine"}
    assert bool((model.shares > 0).all())
    assert read(batch[:1]).shape == (1, 2)
    assert bench.reader_of("ours_all_sizes", batch).__self__.traits.tier == 2


def test_pca_is_timed_with_the_components_of_the_table() -> None:
    batch = bench.make(2, 16, 6)
    numbers = sum(bench.held(bench.reader_of("pca", batch)).values()) / 4
    flat = 2 * 2 * 16 * bench.RANK
    assert numbers >= flat * bench.PCA_COMPONENTS


@pytest.mark.parametrize("row", ["mlp", "o_align", "pca", "ours", "kernel"])
def test_bytes_grow_with_the_lora_and_not_with_delta_w(row: str) -> None:
    small, large = (bench.bytes_of(row, 10, w, 4) for w in (100, 1000))
    assert 9 < large / small < 11


def test_held_finds_what_a_function_closes_over_and_counts_it_once() -> None:
    x, net = torch.zeros(10), nn.Linear(3, 2)
    view = x[:5]

    def read() -> None:
        assert x is not None and view is not None and net is not None

    assert sum(bench.held(read).values()) == 40 + 4 * (6 + 2)
    assert sum(bench.held(functools.partial(max, x, [net])).values()) == 40 + 4 * (6 + 2)
    batch = bench.make(2, 8, 3)
    assert sum(bench.held({"a": batch, "b": (batch,)}).values()) == 4 * 2 * 3 * 2 * 8 * bench.RANK


def test_every_reading_has_a_batch_of_its_own() -> None:
    seen = []
    bench.seconds(lambda b: seen.append(b) or torch.zeros(1), bench.make(1, 4, 8), 3, 4, least=0.0)
    assert len({id(b) for b in seen}) == len(seen) == 5 and all(len(b) == 3 for b in seen)


def test_peak_counts_what_was_freed_and_nothing_before() -> None:
    if resident() is None:
        pytest.skip("no /proc")
    big = torch.ones(20_000_000)
    with peak() as found:
        torch.ones(20_000_000)
    if found.bytes is None:
        pytest.skip("the high-water mark cannot be set back")
    assert 70e6 < found.bytes < 120e6
    del big
    with peak() as none:
        pass
    assert none.bytes is not None and none.bytes < 5e6


def test_a_cap_stops_what_is_above_it_and_is_lifted_after() -> None:
    if resident() is None:
        pytest.skip("no /proc")
    limit = resident("VmData") + 200e6
    with capped(limit):
        torch.zeros(10_000_000)
        with pytest.raises(RuntimeError) as found:
            torch.zeros(100_000_000)
    assert out_of_memory(found.value) and not out_of_memory(RuntimeError("shapes differ"))
    torch.zeros(100_000_000)
