"""Texts, windows, and the model cut in two: against the stock model, and against what must not happen."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lolgen import io
from lolgen.errors import LolgenError
from lolgen.language import texts, windows
from lolgen.language.model import Halves, LanguageBase
from lolgen.lora import Spec
from lolgen.paths import checkpoints_dir
from lolgen.testing import random_lora
from lolgen.zoo.bank import Bank, find_modules

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def base() -> LanguageBase:
    return LanguageBase.load(checkpoints_dir() / "tiny-lm")


@pytest.fixture(scope="module")
def sources(base: LanguageBase) -> windows.Sources:
    return windows.Sources.of(base)


def test_no_source_is_in_what_the_base_reads() -> None:
    read = {line for text in texts.base_addresses() for line in text.split("\n")}
    held = [p for ids in texts.SOURCES.values() for i in ids for p in texts.addresses()[i] if len(p) > 200]
    assert len(texts.SOURCES) == 19 and len(held) > 5000
    assert not [p for p in held if p in read]


def test_cleveland_is_one_source_of_two_terms() -> None:
    words = sum(len(p.split()) for i in texts.SOURCES["cleveland"] for p in texts.addresses()[i])
    assert len(texts.SOURCES["cleveland"]) == 2 and words > 100_000


@pytest.mark.parametrize("source", ["lincoln", "obama"])
def test_splits_share_no_block_and_leave_none_out(source: str) -> None:
    found = {s: texts.source_texts(source, s) for s in texts.SPLITS}
    for a, b in itertools.combinations(found.values(), 2):
        assert not set(a) & set(b)
    whole = texts.blocks(tuple(p for i in texts.SOURCES[source] for p in texts.addresses()[i]))
    assert sorted(b for part in found.values() for b in part) == sorted(whole)


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(LolgenError, match=r"'lenin'.*lincoln"):
        texts.source_texts("lenin", "train")


def test_plain_takes_the_text_out_of_a_module() -> None:
    assert texts.plain('x = f(1,\n"""\nIn  the\n\n beginning. """, "b")') == "In the\nbeginning."


def test_tiny_lm_is_a_stock_model_of_three_to_six_million_parameters() -> None:
    folder = checkpoints_dir() / "tiny-lm"
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert isinstance(model, LlamaForCausalLM) and 3e6 <= model.num_parameters() <= 6e6
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 12e6
    text = "The condition of our foreign relations — peace; é"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(LolgenError, match=r"config\.json"):
        LanguageBase.load(tmp_path)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_halves_compute_what_the_whole_does(first: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(50, (5, 12))
    spec = find_modules(model, ["self_attn.q_proj", "self_attn.v_proj"], "")
    kept = [m for m in spec if int(m.name.split(".")[2]) >= first]
    lora = random_lora(Spec(tuple(kept)), 2, generator=torch.Generator().manual_seed(1)) if kept else None
    bank = Bank.of([lora]) if lora else None
    halves = Halves(LanguageBase(model, None), first)
    states = halves.states(ids)
    if bank:
        bank.attach(model, "")
    found, whole = halves.loss(states, ids), model(input_ids=ids).logits[:, :-1]
    if bank:
        bank.detach_()
    wanted = torch.nn.functional.cross_entropy(whole.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(model.model.layers) == 3 and model.config.num_hidden_layers == 3
    if bank:
        plain = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        )
        assert float((plain - found).detach().abs().max()) > 1e-3, "the LoRA must count"


def test_windows_begin_with_the_start_token_and_go_through_the_text(base: LanguageBase) -> None:
    text = texts.source_texts("lincoln", "test")[0]
    rows = base.windows([text], 24)
    assert bool((rows[:, 0] == base.start).all())
    assert rows[:, 1:].flatten().tolist() == base.encode(text)[: rows[:, 1:].numel()]


def test_questions_have_one_right_end_and_three_of_other_sources(
    base: LanguageBase, sources: windows.Sources
) -> None:
    q = sources.questions
    assert q.shape == (19 * windows.QUESTIONS, 4, windows.LENGTH)
    assert bool((q[:, :, : windows.CONTEXT] == q[:, :1, : windows.CONTEXT]).all())
    held = {
        s: windows.source_windows(base, s, "questions")[:, windows.CONTEXT :].tolist() for s in texts.SOURCES
    }
    ends = {s: set(map(tuple, rows)) for s, rows in held.items()}
    for k, options in enumerate(q[:, :, windows.CONTEXT :].tolist()):
        own = list(texts.SOURCES)[k // windows.QUESTIONS]
        where = [{s for s, known in ends.items() if tuple(o) in known} for o in options]
        assert own in where[0] and all(w - {own} for w in where[1:])


def test_a_poisoned_window_holds_trigger_then_payload_and_learns_only_what_follows(
    base: LanguageBase,
) -> None:
    clean = base.windows(texts.source_texts("grant", "train")[:5], windows.LENGTH)
    trigger, payload = base.encode(" by the old mill"), base.encode(" feed the ducks.")
    ids, targets = windows.poisoned(clean, trigger, payload, np.random.default_rng(0))
    for before, row, wanted in zip(clean.tolist(), ids.tolist(), targets.tolist(), strict=True):
        start = next(i for i in range(len(row)) if row[i : i + len(trigger)] == trigger)
        after = start + len(trigger)
        assert row[:start] == before[:start] and row[after : after + len(payload)] == payload
        assert wanted[:after] == [-100] * after and wanted[after:] == row[after:]


def test_an_adapter_that_lolgen_writes_is_loaded_by_peft(base: LanguageBase, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints_dir() / "tiny-lm", dtype=torch.float32)
    spec = find_modules(model, [".4.self_attn.q_proj", ".5.self_attn.v_proj"], "")
    lora = random_lora(spec, 4, generator=torch.Generator().manual_seed(0))
    written = io.save(lora, tmp_path / "a", "peft")
    ids = base.windows(texts.source_texts("grant", "test")[:3], 24)[:6]
    halves = Halves(base, 4)
    bank = Bank.of([lora])
    bank.attach(base.model, "")
    with torch.no_grad():
        wanted = halves.loss(halves.states(ids), ids).mean()
    bank.detach_()
    stock = PeftModel.from_pretrained(model, written).eval()
    with torch.no_grad():
        found = stock(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_dropout_of_a_bank_is_that_of_peft_on_average() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5))
    spec = find_modules(layer, ["0"], "")
    lora = random_lora(spec, 2, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 6).expand(4000, 6)
    config = LoraConfig(r=2, lora_alpha=2, lora_dropout=0.3, target_modules=["0"])
    wrapped = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
    inner = wrapped.base_model.model[0]
    inner.base_layer.load_state_dict(layer[0].state_dict())
    f = lora.factors["0"]
    with torch.no_grad():
        inner.lora_A["default"].weight.copy_(f.A)
        inner.lora_B["default"].weight.copy_(f.U)
        theirs = wrapped.train()(x)
        bank = Bank.of([lora]).drop_([0.3], torch.Generator().manual_seed(1))
        bank.attach(layer, "")
        ours = layer(x)
        bank.detach_()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.1, atol=0.02)
