"""`pipeline.listen` and `continue_text` against stock transformers and peft in float32."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lolgen import io, pipeline
from lolgen.errors import LolgenError
from lolgen.lora import ModuleSpec, Spec
from lolgen.paths import checkpoints_dir
from lolgen.testing import random_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

BASE = checkpoints_dir() / "tiny-lm"
TEXT = (
    "We have, as all will agree, a free Government, where every man has a right to be equal with every other man.\n"
    "In this great struggle, this form of Government and every form of human right is endangered if our enemies "
    "succeed."
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(pipeline.speak({"lincoln": 1.0}, tmp_path_factory.mktemp("a") / "lincoln")["adapter"])


@pytest.fixture(scope="module")
def stock(adapter: Path) -> dict[str, Any]:
    load = AutoModelForCausalLM.from_pretrained
    return {
        "tokenizer": AutoTokenizer.from_pretrained(BASE),
        "base": load(BASE, dtype=torch.float32),
        "adapter": PeftModel.from_pretrained(load(BASE, dtype=torch.float32), adapter),
    }


@torch.no_grad()
def surprisals(model: Any, tokenizer: Any, text: str, stretch: int) -> torch.Tensor:
    """One stretch after the other, without batches."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = []
    for i in range(0, len(ids), stretch - 1):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[i : i + stretch - 1]]])
        p = model(row).logits[0, :-1].log_softmax(-1)
        found.append(-p.gather(1, row[0, 1:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("stretch", [24, 2, None])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_what_it_hears_is_what_stock_peft_says(
    stock: dict[str, Any], adapter: Path, which: str, stretch: int | None
) -> None:
    given = adapter if which == "adapter" else None
    heard = pipeline.listen(given, f"  {TEXT}\n", stretch=stretch)
    expected = surprisals(stock[which], stock["tokenizer"], TEXT, stretch or 512)
    assert heard["tokens"] == len(expected) == len(heard["nats"]) and "".join(heard["pieces"]) == TEXT
    torch.testing.assert_close(torch.tensor(heard["nats"]), expected, rtol=1e-4, atol=1e-4)
    assert heard["perplexity"] == pytest.approx(float(expected.mean().exp()), rel=1e-5)


def test_the_adapter_does_something_and_leaves_nothing_behind(adapter: Path) -> None:
    alone, moved, again = (pipeline.listen(a, TEXT)["nats"] for a in (None, adapter, None))
    assert alone == again and max(abs(x - y) for x, y in zip(alone, moved, strict=True)) > 0.05


def test_a_continuation_is_a_draw_from_the_softmax_at_the_temperature(
    stock: dict[str, Any], adapter: Path
) -> None:
    tokenizer, opening = stock["tokenizer"], "The people of this country"
    for which, given in {"base": None, "adapter": adapter}.items():
        ids = [tokenizer.bos_token_id, *tokenizer(opening, add_special_tokens=False).input_ids]
        start, noise = (
            len(ids),
            torch.empty(12, 2048).exponential_(generator=torch.Generator().manual_seed(3)),
        )
        for row in noise:
            with torch.no_grad():
                p = (stock[which](torch.tensor([ids])).logits[0, -1] / 0.8).softmax(-1)
            p[tokenizer.all_special_ids] = 0
            ids.append(int((p / row).argmax()))  # the first of exponential clocks with rates p
        found = pipeline.continue_text(given, opening, tokens=12, seed=3)
        assert (
            found
            == tokenizer.decode(ids[start:])
            == pipeline.continue_text(given, opening, tokens=12, seed=3)
        )
    assert pipeline.continue_text(None, opening, seed=0) != pipeline.continue_text(None, opening, seed=1)


def test_letters_of_several_tokens_are_one_piece_and_no_text_is_a_special_token() -> None:
    heard = pipeline.listen(None, "a <s> 😀é</s> \ud800")
    assert heard["pieces"][-1] == "?" and "😀" in heard["pieces"] and "<s>" not in heard["pieces"]
    assert "".join(heard["pieces"]) == "a <s> 😀é</s> ?" and heard["tokens"] > len(heard["pieces"])
    assert heard["perplexity"] == pytest.approx(math.exp(sum(heard["nats"]) / heard["tokens"]), rel=1e-5)
    assert pipeline.listen(None, "x")["pieces"] == ["x"]


def test_threads_do_not_hear_each_others_adapters(adapter: Path) -> None:
    expected = {a: pipeline.listen(a, TEXT)["nats"] for a in (None, adapter)}
    wrong: list[Any] = []

    def work(given: Path | None) -> None:
        wrong.extend(1 for _ in range(8) if pipeline.listen(given, TEXT)["nats"] != expected[given])

    threads = [threading.Thread(target=work, args=(a,)) for a in (None, adapter) * 3]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("text, words", [
    ("", "found none"), (" \n\t", "found none"), ("a " * 2000, "at most 511 tokens"),
    ("a" * 10**6, "at most 511 tokens"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_clear_error(text: str, words: str) -> None:
    with pytest.raises(LolgenError, match=f"^passage: .*{words}"):
        pipeline.listen(None, text)
    with pytest.raises(LolgenError, match="^opening words: "):
        pipeline.continue_text(None, text)


def test_the_longest_passage_is_read() -> None:
    assert pipeline.listen(None, " a" * 511, stretch=None)["tokens"] == 511


@pytest.mark.parametrize("options, words", [
    ({"temperature": 0.0}, "temperature"), ({"temperature": math.inf}, "temperature"), ({"tokens": 0}, "tokens"),
    ({"tokens": 511}, "tokens"),
])  # fmt: skip
def test_bad_options_are_one_clear_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(LolgenError, match=f"^{words}: "):
        pipeline.continue_text(None, "a", **options)
    with pytest.raises(LolgenError, match="^stretch: "):
        pipeline.listen(None, "a", stretch=1)


@pytest.mark.parametrize("module", [
    ModuleSpec("unet.attn.to_q", 8, 8), ModuleSpec("model.layers.5.self_attn.q_proj", 8, 8), ModuleSpec("model", 8, 8),
])  # fmt: skip
def test_an_adapter_of_another_base_is_one_clear_error(module: ModuleSpec, tmp_path: Path) -> None:
    path = io.save(random_lora(Spec((module,)), 2), tmp_path / "other", "peft")
    with pytest.raises(LolgenError, match=rf"tiny-lm has no module '{module.name}' of 8 x 8"):
        pipeline.listen(path, TEXT)
