"""Language models: PEFT loads what is written, and the logits are those of weights merged by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import assert_same, double, mixed, random, relative
from torch import Tensor, nn

from lolgen import gl, io
from lolgen.lora import LoRA, ModuleSpec, Spec

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
SIZE = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 16, "tie_word_embeddings": False}  # fmt: skip


def build(family: str) -> Any:
    """A two-layer model of a family, with its own kind of layers."""
    import transformers as t

    torch.manual_seed(0)
    makers: dict[str, Any] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE)),
        "qwen": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZE)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZE)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**SIZE, head_dim=4, pad_token_id=0)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=30, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0
            )
        ),
    }
    return makers[family]().eval()


FAMILIES = ("llama", "qwen", "mistral", "gemma", "gpt2")


def spec_of(model: Any, embedding: bool = False) -> Spec:
    """Every linear layer but the head; GPT-2's are stored (in, out)."""
    found = []
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear) and name != "lm_head":
            found.append(ModuleSpec(name, m.out_features, m.in_features))
        elif type(m).__name__ == "Conv1D":
            found.append(ModuleSpec(name, m.weight.shape[1], m.weight.shape[0]))
        elif isinstance(m, nn.Embedding) and embedding:
            found.append(ModuleSpec(name, m.embedding_dim, m.num_embeddings, (), "embedding"))
    return Spec(tuple(found))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([[3, 7, 1, 9, 20], [4, 4, 8, 2, 11]])).logits
    return found


def merged(model: Any, lora: LoRA) -> Any:
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for m in lora.spec:
        weight = modules[m.name].weight
        stored_out_first = isinstance(modules[m.name], nn.Linear)
        delta = double(lora[m.name])
        weight.data = (weight.data.double() + (delta if stored_out_first else delta.T)).float()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_acts_like_the_merged_weights(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = build(family)
    spec = spec_of(model, embedding=family in ("llama", "mistral"))
    assert any(m.kind == "embedding" for m in spec) == (family in ("llama", "mistral"))
    lora = gl.scale(random(spec, mixed(spec)), 0.2)
    wanted, plain = logits(merged(model, lora)), logits(model)
    folder = io.save(lora, tmp_path / "out", "peft")
    found = logits(PeftModel.from_pretrained(model, folder))
    assert relative(plain, wanted) > 0.05
    assert relative(found, wanted) <= 1e-5
    again = io.load(folder, modules=spec)
    assert_same(again, lora)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_read_and_written_back(family: str, rslora: bool, tmp_path: Path) -> None:
    """A folder of PEFT's own, alpha and rank patterns in it, through ours and back into PEFT: the same logits."""
    from peft import LoraConfig, PeftModel, get_peft_model

    first = "c_attn" if family == "gpt2" else "q_proj"
    second = "c_fc" if family == "gpt2" else "up_proj"
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=[first, second],
        rank_pattern={second: 2},
        alpha_pattern={second: 7},
        init_lora_weights=False,
        use_rslora=rslora,
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    trained = get_peft_model(build(family), config)
    wanted = logits(trained)
    trained.save_pretrained(tmp_path / "theirs")
    lora = io.load(tmp_path / "theirs")
    assert {m.name.rpartition(".")[2] for m in lora.spec} == {first, second}
    folder = io.save(lora, tmp_path / "ours", "peft")
    assert relative(logits(PeftModel.from_pretrained(build(family), folder)), wanted) <= 1e-5
    assert relative(logits(merged(build(family), lora)), wanted) <= 1e-5
    config_ = json.loads((folder / "adapter_config.json").read_text())
    assert config_["task_type"] == "CAUSAL_LM" and config_["fan_in_fan_out"] == (family == "gpt2")
