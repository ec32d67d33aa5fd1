"""Train tiny-lm, the base of the language side: tokenizer, then a LlamaForCausalLM, in one resumable run.

    accelerate launch --cpu --num_processes 2 -m train.lm_train       # two cores
    python -m train.lm_train --recipe smoke --out runs/lm-smoke --state runs/state/lm-smoke.safetensors

It reads the presidents that are no source of adapters, and translations of the Bible. Every window begins with `<s>`,
so that a prompt does too. What ships is the exponential moving average of the weights, in bf16.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lolgen.language import texts
from lolgen.precision import bf16_matmuls
from train.state import load_state, load_tensors, save_state, save_tensors

RECIPES: dict[str, dict[str, Any]] = {
    "full": {"vocabulary": 2048, "hidden": 192, "mlp": 512, "layers": 6, "heads": 6, "steps": 2000, "batch": 16,
             "window": 128, "lr": 3e-3, "characters": None},
    "smoke": {"vocabulary": 300, "hidden": 16, "mlp": 32, "layers": 2, "heads": 2, "steps": 3, "batch": 2,
              "window": 16, "lr": 1e-3, "characters": 20_000},
}  # fmt: skip
ADDRESSES = 0.6
"""Share of windows out of addresses; the rest is the Bible."""


def make_tokenizer(corpora: list[list[str]], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `<s>` starts a text, `</s>` ends and pads one."""
    bpe = ByteLevelBPETokenizer()
    lines = [line for corpus in corpora for text in corpus for line in text.split("\n")]
    bpe.train_from_iterator(lines, vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=512,
    )


def make_model(recipe: dict[str, Any]) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe["vocabulary"], hidden_size=recipe["hidden"], intermediate_size=recipe["mlp"],
            num_hidden_layers=recipe["layers"], num_attention_heads=recipe["heads"], num_key_value_heads=2,
            max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )  # fmt: skip


def tokens(path: Path, tokenizer: PreTrainedTokenizerFast, corpora: list[list[str]]) -> list[Tensor]:
    """The ids of both corpora, cached in `path`."""
    if not path.exists():
        rows = {}
        for k, corpus in enumerate(corpora):
            ids = [
                i for text in corpus for line in text.split("\n") for i in tokenizer(line + "\n").input_ids
            ]
            rows[f"{k}"] = torch.tensor(ids, dtype=torch.int32)
        save_tensors(path, rows, {})
    found = load_tensors(path)[0]
    return [found[f"{k}"].long() for k in range(len(corpora))]


def draw(corpora: list[Tensor], count: int, window: int, g: torch.Generator) -> Tensor:
    """(count, window) long: `<s>` and a run of one corpus each."""
    rows = []
    for i in range(count):
        corpus = corpora[0] if i < round(ADDRESSES * count) else corpora[1]
        start = int(torch.randint(len(corpus) - window, (), generator=g))
        rows.append(torch.cat([torch.zeros(1, dtype=torch.long), corpus[start : start + window - 1]]))
    return torch.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/tiny-lm"))
    parser.add_argument("--state", type=Path, default=Path("runs/state/lm.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(args.seed)
    limit = recipe["characters"]
    folder = args.state.parent / f"{args.state.stem}-tokenizer"
    ids = args.state.with_name(f"{args.state.stem}-tokens.safetensors")
    with accelerator.main_process_first():
        if not ids.exists():
            corpora = [[t[:limit] for t in c] for c in (texts.base_addresses(), texts.bibles())]
            make_tokenizer(corpora, recipe["vocabulary"]).save_pretrained(folder)
            tokens(ids, PreTrainedTokenizerFast.from_pretrained(folder), corpora)
        data = tokens(ids, PreTrainedTokenizerFast.from_pretrained(folder), [[], []])
    if accelerator.is_main_process:
        print(f"tokens: {len(data[0]):,} of addresses, {len(data[1]):,} of the Bible", flush=True)

    model, ema = make_model(recipe), make_model(recipe)
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=0.1, betas=(0.9, 0.98))
    start = 0
    if args.state.exists():
        start = load_state(args.state, {"model": model, "ema": ema}, optimizer)["step"]
    if not torch.cuda.is_available():
        bf16_matmuls(model)
    ema.to(accelerator.device)
    net, optimizer = accelerator.prepare(model, optimizer)
    rank, steps = accelerator.process_index, recipe["steps"]
    saved, mean = time.time(), 0.0
    bar = tqdm(range(start, steps), initial=start, total=steps, mininterval=10, disable=rank > 0)
    for step in bar:
        g = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 16 + rank)
        x = draw(data, recipe["batch"], recipe["window"], g).to(accelerator.device)
        warm = min(1, (step + 1) / 100)
        lr = recipe["lr"] * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = net(input_ids=x).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        mean += (float(loss.detach()) - mean) / min(50, step - start + 1)
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if rank == 0 and (time.time() - saved > 120 or step + 1 == steps):
            save_state(args.state, {"model": model, "ema": ema}, optimizer, {"step": step + 1})
            saved = time.time()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ship(ema.cpu(), PreTrainedTokenizerFast.from_pretrained(folder), args.out)


def ship(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A folder for `AutoModelForCausalLM.from_pretrained`, bf16."""
    staged = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    model.bfloat16().save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    shutil.rmtree(out, ignore_errors=True)
    staged.rename(out)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {model.num_parameters():,} parameters, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
