"""Train the tokenizer and the small CLIP of tiny-sd on captions of the rendered pictures.

    python -m train.clip_train                      # about 10 min on one core
    python -m train.clip_train --recipe smoke

Four losses: the contrastive one; the attributes that a caption names, read back from its pooled text vector;
which rare word it holds; and that the states behind the words turn by at least 60 degrees when the rare word is
taken out or exchanged (the third alone is content with 8 degrees, on which a LoRA has little to hold). The
last three see text only. They keep a rare word (the trigger of the LoRAs to come) apart from every other word
before the encoder is frozen: trained jointly with the UNet, an encoder learns to drop it, and a LoRA can then
only shift the whole model.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from lolgen import pictures
from lolgen.precision import bf16_matmuls
from train.pictures_render import load_pictures
from train.state import load_state, save_state

RECIPES: dict[str, dict[str, Any]] = {
    "full": {"steps": 2150, "batch": 256, "lr": 1e-3},
    "smoke": {"steps": 2, "batch": 16, "lr": 1e-3},
}
MAX_LENGTH = 20


def build_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE in which every word of the captions is one token and any other text still has tokens."""
    rng = np.random.default_rng(0)
    corpus = [pictures.random_caption(pictures.sample_identity(rng).attributes, rng) for _ in range(3000)] + [
        pictures.style_caption(i, p) for i in range(10) for p in pictures.PREFIXES for _ in range(50)
    ]
    corpus += [pictures.caption({}, s) for s in pictures.SUBJECTS for _ in range(50)]
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    raw.train_from_iterator(corpus, trainer)
    import json

    model = json.loads(raw.to_str())["model"]
    words = list(model["vocab"])
    words += [c + "</w>" for c in alphabet if c + "</w>" not in model["vocab"]]
    vocab = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(m) for m in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=288, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=MAX_LENGTH, projection_dim=64, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, image_size=32,
        patch_size=8, projection_dim=64, hidden_act="gelu",
    )  # fmt: skip
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )


class TextHeads(nn.Module):
    """Reads the named attributes and the rare word back from the projected text vector; dropped after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(width, 1 + len(v)) for v in pictures.ATTRIBUTES.values()])
        self.rare = nn.Linear(width, 1 + len(pictures.RARE_WORDS))

    def loss(self, pooled: Tensor, named: Tensor, rare: Tensor) -> Tensor:
        each = [F.cross_entropy(h(pooled), named[:, k]) for k, h in enumerate(self.heads)]
        return torch.stack(each).mean() + F.cross_entropy(self.rare(pooled), rare)


def separation(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str], others: list[str]) -> Tensor:
    """How far the cosine between the closing states of two captions exceeds 0.5, mean over pairs and positions."""
    ids = tokenizer([*texts, *others], padding="max_length", truncation=True, return_tensors="pt").input_ids
    ids = ids.to(model.device)
    a, b = model.text_model(input_ids=ids).last_hidden_state.chunk(2)
    closing = (ids == tokenizer.eos_token_id).chunk(2)
    both = (closing[0] & closing[1]).float()
    excess = (F.cosine_similarity(a, b, dim=-1) - 0.5).clamp(min=0)
    return (excess * both).sum() / both.sum()


def captions_of(
    labels: Tensor, style: Tensor, rng: np.random.Generator
) -> tuple[list[str], Tensor, Tensor, list[tuple[str, str]]]:
    """Captions, the attributes that they name (0: not named), the rare word (0: none), and pairs of captions that
    differ in the rare word alone."""
    texts, named, rare = [], [], []
    pairs: list[tuple[str, str]] = []
    names = list(pictures.ATTRIBUTES)
    for row, s in zip(labels.tolist(), style.tolist(), strict=True):
        prefix = pictures.PREFIXES[int(rng.integers(len(pictures.PREFIXES)))]
        if s >= 0:
            texts.append(pictures.style_caption(s, prefix))
            named.append([0] * len(names))
            rare.append(0)
            continue
        keep = 1.0 if rng.random() < 0.6 else rng.random()
        kept = {n: v for n, v in zip(names, row, strict=True) if v >= 0 and rng.random() < keep}
        subject = "a person"
        if rng.random() < 0.4:
            subject = str(rng.choice(pictures.SUBJECTS))
        words = {n: pictures.ATTRIBUTES[n][v] for n, v in kept.items()}
        texts.append(pictures.caption(words, subject, prefix))
        if subject != "a person":
            swapped = {"sks": "skd", "skd": "sks"}[subject.split()[0]] + " " + subject.split()[1]
            other = "a person" if rng.random() < 0.6 else swapped
            few = words if rng.random() < 0.3 else {}
            if rng.random() < 0.25:  # the empty prompt guides the sampler: it must stay apart as well
                pairs.append((pictures.caption({}, subject, prefix), ""))
            pairs.append((pictures.caption(few, subject, prefix), pictures.caption(few, other, prefix)))
        named.append([kept.get(n, -1) + 1 for n in names])
        rare.append(next((i + 1 for i, w in enumerate(pictures.RARE_WORDS) if w in subject), 0))
    return texts, torch.tensor(named), torch.tensor(rare), pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--pictures", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-sd"))
    parser.add_argument("--state", type=Path, default=Path("runs/state/clip.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(args.seed)
    faces = load_pictures(args.pictures, "portraits-train-*")
    styles = load_pictures(args.pictures, "styles-*")
    tokenizer = build_tokenizer()
    clip, heads = build_clip(tokenizer), TextHeads(64)
    parameters = [*clip.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe["lr"], weight_decay=1e-2, betas=(0.9, 0.98))
    start = (
        load_state(args.state, {"clip": clip, "heads": heads}, optimizer)["step"]
        if args.state.exists()
        else 0
    )
    if not torch.cuda.is_available():
        bf16_matmuls(clip)
    clip, heads, optimizer = accelerator.prepare(clip, heads, optimizer)
    saved = time.time()
    bar = tqdm(range(start, recipe["steps"]), initial=start, total=recipe["steps"], mininterval=10)
    for step in bar:
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rng = np.random.default_rng([args.seed, step])
        i = torch.randint(len(faces["pixels"]), (recipe["batch"] * 7 // 8,), generator=g)
        j = torch.randint(len(styles["pixels"]), (recipe["batch"] // 8,), generator=g)
        x = torch.cat([faces["pixels"][i], styles["pixels"][j]]).float() / 127.5 - 1
        labels = torch.cat([faces["labels"][i], styles["labels"][j]])
        texts, named, rare, pairs = captions_of(
            labels, torch.cat([faces["style"][i], styles["style"][j]]), rng
        )
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        lr = recipe["lr"] * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / recipe["steps"]))
        for group in optimizer.param_groups:
            group["lr"] = lr
        out = clip(input_ids=ids.to(accelerator.device), pixel_values=x.to(accelerator.device))
        same = torch.tensor([[a == b for b in texts] for a in texts], device=x.device).float()
        soft = same / same.sum(1, keepdim=True)  # captions may coincide: each of them is right
        contrastive = F.cross_entropy(out.logits_per_text, soft) + F.cross_entropy(out.logits_per_image, soft)
        pooled = out.text_model_output.pooler_output
        loss = contrastive / 2 + 0.5 * heads.loss(pooled, named.to(x.device), rare.to(x.device))
        apart = separation(clip, tokenizer, [a for a, _ in pairs], [b for _, b in pairs])
        loss = loss + 3 * apart
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clip.logit_scale.data.clamp_(max=math.log(100))
        if step % 20 == 0:
            bar.set_postfix(
                contrastive=f"{float(contrastive.detach()) / 2:.3f}",
                apart=f"{float(apart.detach()):.3f}",
                loss=f"{float(loss.detach()):.3f}",
            )
        if time.time() - saved > 120 or step + 1 == recipe["steps"]:
            save_state(args.state, {"clip": clip, "heads": heads}, optimizer, {"step": step + 1})
            saved = time.time()
    bf16_matmuls(clip, enable=False)
    clip.save_pretrained(args.out / "clip")
    clip.text_model.save_pretrained(args.out / "text_encoder")
    tokenizer.save_pretrained(args.out / "tokenizer")


if __name__ == "__main__":
    main()
