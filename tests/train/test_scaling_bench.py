"""The scaling benchmark: shapes of the GPT-3 family, honest bytes, and every model end to end at a tiny width."""

from __future__ import annotations

import json

import pytest
import torch

from train import scaling_bench as bench


def test_shapes_are_of_the_size_that_they_are_named_after() -> None:
    for name, (layers, width) in bench.SHAPES.items():
        # A transformer has about 12 width^2 weights a layer; small ones have as much again in embeddings.
        assert 0.5 < 12 * layers * width**2 / bench.parameters(name) < 1.1, name


def test_dense_bytes_are_those_of_delta_w_and_its_first_layer() -> None:
    assert bench.bytes_of("dense_formed", 2, 10, 4) == 4 * 200 * (1 + bench.HIDDEN)
    assert bench.bytes_of("dense_formed", *bench.SHAPES["175B"], 16) > 3e12


def test_every_model_reads_a_tiny_family(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "SHAPES", {"125M": (2, 16), "350M": (3, 20)})
    models = [*(m for m in bench.MODELS if m != "majority"), "dense_formed"]
    limit = 1e9
    found = bench.measure(["125M", "350M"], models, 6, limit, 1)
    assert all(e["seconds"] > 0 for m in models for e in found[m].values())
    short = bench.bytes_of("dense_formed", 3, 20, 6) - 1
    found["dense_formed"] = bench.measure(["125M", "350M"], ["dense_formed"], 6, short, 1)["dense_formed"]
    assert "seconds" in found["dense_formed"]["125M"] and "seconds" not in found["dense_formed"]["350M"]
    report = {
        "command": "c",
        "sizes": ["125M", "350M"],
        "references": 6,
        "limit_bytes": limit,
        "models": found,
    }
    text = bench.markdown(json.loads(json.dumps(report)))
    assert text.count("out of memory") >= 1 and bench.plot(report)[:4] == b"\x89PNG"


def test_ours_is_timed_at_the_size_of_the_table() -> None:
    batch = bench.make(2, 16, 6)
    with bench.untrained():
        reader = bench.MODELS["ours"].fit(
            batch, torch.arange(6)[:, None] % 2, batch, torch.arange(6)[:, None] % 2, {"label": 2}
        )
    bench.full_size(reader.model)
    assert reader.model.traits.into.shape[1] == bench.COMPONENTS
    assert len(reader.model.neighbours[0]) == bench.LORAS
    assert {m.kind for m in reader.model.members} == {"kernel", "net", "glnet"}
    assert reader.scores(batch[:1]).shape == (1, 2)


@pytest.mark.parametrize("model", ["mlp", "o_align", "pca", "ours", "kernel"])
def test_bytes_grow_with_the_lora_and_not_with_delta_w(model: str) -> None:
    small, large = (bench.bytes_of(model, 10, w, 4) for w in (100, 1000))
    assert 9 < large / small < 11
