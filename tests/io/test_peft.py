"""PEFT folders, against PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapters import (
    LLM,
    SD,
    UNET,
    Mixed,
    assert_same,
    double,
    linear_spec,
    mixed,
    pipeline,
    random,
    relative,
    text_encoder,
    unet,
)
from torch import Tensor, nn

from lolgen import io
from lolgen.errors import FormatError
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:.*save_embedding_layers.*:UserWarning",
    "ignore:.*Could not find a config file.*:UserWarning",
    "ignore:.*Could not identify embedding layer.*:UserWarning",
    "ignore:.*lora_B.bias.*ZeRO-3.*:UserWarning",  # PEFT takes its own biases of B for shards
)
BASE = "base_model.model."


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A folder as PEFT lays it out."""
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return folder


def literal(r: int = 2, at: str = "model.layers.0.self_attn.q_proj") -> dict[str, Tensor]:
    return {
        f"{BASE}{at}.lora_A.weight": torch.arange(3.0 * r).reshape(r, 3),
        f"{BASE}{at}.lora_B.weight": torch.arange(4.0 * r).reshape(4, r) - 2,
    }


def test_the_files_that_are_written(tmp_path: Path) -> None:
    lora = LoRA(
        Spec((ModuleSpec("model.q", 2, 1), ModuleSpec("model.v", 1, 1))),
        {
            "model.q": Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]]), 0.5),
            "model.v": Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]])),
        },
        {"author": "me"},
    )
    folder = io.save(lora, tmp_path / "out", "peft")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    header = (
        b'{"__metadata__":{"author":"me","format":"pt","lolgen.io.component":""},'
        b'"base_model.model.model.q.lora_A.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
        b'"base_model.model.model.q.lora_B.weight":{"dtype":"F32","shape":[2,1],"data_offsets":[4,12]},'
        b'"base_model.model.model.v.lora_A.weight":{"dtype":"F32","shape":[2,1],"data_offsets":[12,20]},'
        b'"base_model.model.model.v.lora_B.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[20,28]}}'
    )
    data = torch.tensor([3.0, 0.5, 1.0, 0.0, 1.0, 1.0, 0.0]).numpy().tobytes()
    found = (folder / "adapter_model.safetensors").read_bytes()
    assert found[8:].split(b" ")[0] == header
    assert found.endswith(data)
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "alpha_pattern": {"model.v": 2},
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 1,
        "rank_pattern": {"model.v": 2},
        "target_modules": ["model.q", "model.v"],
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 6}, 1.5),
        ({"r": 4}, 2.0),  # PEFT's default alpha is 8
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {"q_proj": 4}}, 1.5),
        (
            {"r": 4, "lora_alpha": 6, "alpha_pattern": {"v_proj": 1, "q_proj": 12, "self_attn.q_proj": 40}},
            3.0,
        ),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"proj": 40, "attn.q_proj": 40}}, 1.5),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {r"layers\.\d+\..*q_proj": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"^layers.0.self_attn.q_proj": 2}}, 1.5),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 1.5}}, 0.375),
    ],
)
def test_scale(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    lora = io.load(write(tmp_path / "x", literal(4), config))
    assert lora["model.layers.0.self_attn.q_proj"].scale == pytest.approx(scale)
    assert torch.equal(lora["model.layers.0.self_attn.q_proj"].A, torch.arange(12.0).reshape(4, 3))


@pytest.mark.parametrize(
    "pattern", ["a.b", "b", "x.b", "^a.b", "^b", "a-b", "a_b", "aXb", "a[.]b", "", "a.b.", ".b"]
)
def test_patterns_match_as_in_peft(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    from lolgen.io.peft_config import hits

    for path in ("a.b", "b", "x.a.b", "x.b", "a_b", "xa.b", "a-b", "ab"):
        # PEFT answers with the path itself when no pattern hits: ask about another name then.
        peft = get_pattern_key([pattern], path) == pattern and (pattern != path or True)
        assert hits("", pattern, path) == peft, (pattern, path)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_real_adapter_has_the_delta_that_peft_computes(rslora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["embed", "conv1d", "conv2d", "conv1x1", "fc"],
        rank_pattern={"inner.fc": 2, "conv2d": 3},
        alpha_pattern={"conv1d": 1, "^fc": 5},
        init_lora_weights=False,
        modules_to_save=["head"],
    )
    model = get_peft_model(Mixed(), config)
    model.save_pretrained(tmp_path / "peft")
    lora = io.load(tmp_path / "peft")
    assert {m.name: (m.kind, m.kernel) for m in lora.spec} == {
        "conv1d": ("conv", (3,)),
        "conv1x1": ("conv", (1, 1)),
        "conv2d": ("conv", (3, 3)),
        "embed": ("embedding", ()),
        "fc": ("linear", ()),
        "inner.fc": ("linear", ()),
    }
    layers = dict(model.base_model.model.named_modules())
    for module in lora.spec:
        wanted = layers[module.name].get_delta_weight("default").detach()
        wanted = wanted.T if module.kind == "embedding" else wanted.reshape(module.shape)
        assert relative(double(lora[module.name]), wanted) <= 1e-6, module.name
    assert {f"{BASE}head.weight", f"{BASE}head.bias"} <= set(lora.extras)

    # And back: what we write does in PEFT what the original did.
    ids = torch.randint(0, 20, (3, 5))
    again = reload(Mixed(), model, io.save(lora, tmp_path / "ours", "peft"))
    assert torch.allclose(again(ids), model.eval()(ids), atol=1e-6)
    assert_same(io.load(tmp_path / "ours"), lora)


def reload(base: nn.Module, trained: nn.Module, folder: Path) -> nn.Module:
    """`PeftModel.from_pretrained` on a model with the base weights of a trained one."""
    from peft import PeftModel

    state = {
        k.removeprefix(BASE).replace(".base_layer", "").replace(".original_module", ""): v
        for k, v in trained.state_dict().items()
        if "lora_" not in k and "modules_to_save" not in k
    }
    base.load_state_dict(state)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def test_dora_and_biases_of_b_do_the_same_after_a_round_trip(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    ids = torch.randint(0, 20, (3, 5))
    for options in ({"use_dora": True}, {"lora_bias": True}):
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=["conv2d", "fc"], rank_pattern={"conv2d": 2}, **options
        )
        model = get_peft_model(Mixed(), config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.add_(0.3 * torch.randn_like(p).abs())
        model.save_pretrained(tmp_path / "peft")
        lora = io.load(tmp_path / "peft")
        word = "lora_magnitude_vector" if "use_dora" in options else "lora_B.bias"
        assert f"conv2d.{word}" in lora.extras
        again = reload(Mixed(), model, io.save(lora, tmp_path / "ours", "peft"))
        assert torch.allclose(again(ids), model(ids), atol=1e-5)
        twice = io.load(tmp_path / "ours")
        assert set(twice.extras) == set(lora.extras)
        for key, tensor in lora.extras.items():
            assert torch.equal(twice.extras[key], tensor)


def test_gpt2_conv1d(tmp_path: Path) -> None:
    """Weights stored (in, out), and paths that start with `transformer.`, which is no component here."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = GPT2Config(
        vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    base = GPT2LMHeadModel(size).eval()
    state = {k: v.clone() for k, v in base.state_dict().items()}
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "peft")
    lora = io.load(tmp_path / "peft")
    assert lora.names == ("transformer.h.0.attn.c_attn",)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert relative(double(lora[lora.names[0]]).T, layer.get_delta_weight("default").detach()) <= 1e-6
    io.save(lora, tmp_path / "ours", "peft")
    assert not (tmp_path / "ours" / "pytorch_lora_weights.safetensors").exists()
    fresh = GPT2LMHeadModel(size)
    fresh.load_state_dict(state)
    ids = torch.tensor([[3, 4, 5]])
    again = PeftModel.from_pretrained(fresh, str(tmp_path / "ours")).eval()
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)


def test_a_folder_of_a_unet_loads_in_peft_and_in_diffusers(tmp_path: Path) -> None:
    from peft import PeftModel

    ends = (
        "to_q",
        "to_v",
        "to_out.0",
        "conv1",
        "proj_in",
        "conv_in",
        "conv_out",
        "ff.net.2",
        "time_emb_proj",
    )
    spec = linear_spec(unet(), "unet.", ends)
    lora = random(spec, mixed(spec))
    folder = io.save(lora, tmp_path / "checkpoint-7", "peft")
    wrapped = PeftModel.from_pretrained(unet(), str(folder)).base_model.model
    by_prefix = unet()
    by_prefix.load_lora_adapter(
        str(folder),
        prefix="base_model.model",
        weight_name="adapter_model.safetensors",
        adapter_name="default",
    )
    pipe = pipeline()
    pipe.load_lora_weights(str(folder), adapter_name="default")
    for model in (wrapped, by_prefix, pipe.unet):
        layers = dict(model.named_modules())
        for module in spec:
            found = layers[module.name.removeprefix("unet.")].get_delta_weight("default").detach()
            assert relative(found.reshape(module.shape), double(lora[module.name])) <= 1e-6
    assert_same(io.load(folder, modules=spec), lora)
    assert {n.partition(".")[0] for n in io.load(folder).names} == {"unet"}
    alone = io.save(lora, tmp_path / "alone", "peft", companion=False)
    assert sorted(p.name for p in alone.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_folder_of_a_text_encoder_loads_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    spec = linear_spec(text_encoder(), "text_encoder.text_model.", ("q_proj", "fc1"))
    lora = random(spec, mixed(spec))
    folder = io.save(lora, tmp_path / "te", "peft")
    layers = dict(PeftModel.from_pretrained(text_encoder(), str(folder)).base_model.model.named_modules())
    for module in spec:
        found = (
            layers[module.name.removeprefix("text_encoder.text_model.")].get_delta_weight("default").detach()
        )
        assert relative(found, double(lora[module.name])) <= 1e-6
    assert_same(io.load(folder, modules=spec), lora)


@pytest.mark.parametrize(
    ("path", "config", "name"),
    [
        ("mid_block.attentions.0.proj_in", {}, "unet.mid_block.attentions.0.proj_in"),
        ("conv_in", {"auto_mapping": {"base_model_class": "UNet2DConditionModel"}}, "unet.conv_in"),
        ("conv_in", {"auto_mapping": {"base_model_class": "ControlNetModel"}}, "conv_in"),
        (
            "encoder.layers.0.mlp.fc1",
            {"auto_mapping": {"base_model_class": "CLIPTextModel"}},
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        ),
        ("encoder.layers.0.mlp.fc1", {}, "encoder.layers.0.mlp.fc1"),
        (
            "blocks.0.to_q",
            {
                "auto_mapping": {
                    "base_model_class": "WanTransformer3DModel",
                    "parent_library": "diffusers.models",
                }
            },
            "transformer.blocks.0.to_q",
        ),
    ],
)
def test_folders_of_components_that_others_wrote(
    path: str, config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    assert io.load(write(tmp_path / "x", literal(2, path), {"r": 2} | config)).names == (name,)


def test_keys_without_prefix_or_with_the_adapters_name(tmp_path: Path) -> None:
    tensors = {
        "model.q.lora_A.default.weight": torch.ones(2, 3),
        "model.q.lora_B.default.weight": torch.ones(4, 2),
        "model.e.lora_embedding_A.default": torch.ones(2, 9),
        "model.e.lora_embedding_B.default": torch.ones(5, 2),
        "model.q.lora_magnitude_vector.default.weight": torch.ones(4),
    }
    folder = write(tmp_path / "x", tensors, {"r": 2})
    lora = io.load(folder)
    assert lora.names == ("model.e", "model.q")
    assert lora.spec["model.e"] == ModuleSpec("model.e", 5, 9, (), "embedding")
    assert set(lora.extras) == {"model.q.lora_magnitude_vector"}
    assert io.detect(folder / "adapter_model.safetensors") == "peft"


def test_unknown_keys_and_metadata_survive(tmp_path: Path) -> None:
    tensors = literal() | {f"{BASE}lm_head.weight": torch.randn(3, 3), "who.knows": torch.arange(3)}
    folder = write(
        tmp_path / "x", tensors, {"r": 2, "modules_to_save": ["lm_head"], "a_new_option": {"k": [1]}}
    )
    lora = io.load(folder)
    lora.metadata["note"] = "ünïcode\nand lines"
    io.save(lora, tmp_path / "y", "peft")
    again = io.load(tmp_path / "y")
    config = json.loads((tmp_path / "y" / "adapter_config.json").read_text())
    assert config["a_new_option"] == {"k": [1]} and config["modules_to_save"] == ["lm_head"]
    assert again.metadata["note"] == "ünïcode\nand lines"
    assert set(again.extras) == {f"{BASE}lm_head.weight", "who.knows"}
    for key, tensor in lora.extras.items():
        assert torch.equal(again.extras[key], tensor) and again.extras[key].dtype == tensor.dtype
    # A third time nothing changes any more.
    io.save(again, tmp_path / "z", "peft")
    assert (tmp_path / "y" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "z" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "also changes the base model's weights"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "also changes"),
        ({"peft_type": "LOKR"}, "found 'LOKR'; wanted LORA"),
        ({"target_parameters": ["experts.gate"]}, "not scale"),
        ({"lora_alpha": "much"}, "found 'much'; wanted a finite number"),
        ({"rank_pattern": [1]}, "wanted an object of numbers"),
        ({"r": 3}, "found rank 2; wanted rank 3"),
        ({"alpha_pattern": {"(((": 1}}, "wanted a regex"),
        ({"alpha_pattern": {"(.*a)*b": 1}}, "wanted a simple pattern"),
    ],
)
def test_configs_that_do_not_give_delta_w(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        io.load(write(tmp_path / "x", literal(), {"r": 2} | config))
    assert words in str(caught.value)
    assert "adapter_config.json" in str(caught.value)


def test_what_a_folder_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="modules of text_encoder, unet"):
        io.save(random(SD), tmp_path / "x", "peft")
    with pytest.raises(FormatError, match="the path of a file"):
        io.save(random(UNET), tmp_path / "x.safetensors", "peft")
    assert list(tmp_path.iterdir()) == []


def test_a_language_model(tmp_path: Path) -> None:
    lora = random(LLM, mixed(LLM))
    assert_same(io.load(io.save(lora, tmp_path / "x", "peft")), lora)
