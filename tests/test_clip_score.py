"""The CLIP score: 33 prompts, the same figure as by stock diffusers one LoRA at a time, and the labels that ship."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CLIPModel

from lolgen import clip_score, preview
from lolgen.base import Base
from lolgen.errors import LolgenError
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.zoo.zoo import Zoo

FOLDER = checkpoints_dir() / "tiny-sd"


@pytest.fixture(scope="module")
def scorer() -> clip_score.Scorer:
    return clip_score.Scorer(Base.load(FOLDER), clip_score.load_clip(FOLDER))


def test_prompts_are_33_and_differ() -> None:
    assert len(set(clip_score.PROMPTS)) == len(clip_score.PROMPTS) == 33


def test_of_pictures_is_the_mean_cosine_of_the_stock_model(scorer) -> None:
    images = torch.rand(66, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clip = CLIPModel.from_pretrained(FOLDER / "clip", local_files_only=True).float().eval()
    tokens = scorer.base.tokenizer(
        list(clip_score.PROMPTS), padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        for k in range(2):
            out = clip(input_ids=tokens.input_ids, pixel_values=images[33 * k : 33 * k + 33])
            wanted = (out.text_embeds * out.image_embeds).sum(-1).mean()
            torch.testing.assert_close(scorer.of_pictures(images)[k], wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_many_at_once_are_scored_as_stock_diffusers_scores_one(scorer) -> None:
    zoo = Zoo.open(zoos_dir() / "faces").split("test")
    loras = Zoo(zoo.folder, zoo.info, zoo.rows[::80]).load().unstack()
    found = scorer.score(loras)
    pipe = preview.load_pipeline(FOLDER)
    for lora, score in zip(loras, found, strict=True):
        preview.attach(pipe, lora)
        out = pipe(
            list(clip_score.PROMPTS), latents=scorer.noise, num_inference_steps=clip_score.STEPS,
            guidance_scale=clip_score.GUIDANCE, output_type="pt",
        )  # fmt: skip
        pipe.unload_lora_weights()
        torch.testing.assert_close(scorer.of_pictures(out.images * 2 - 1)[0], score, atol=2e-3, rtol=0)


def test_shipped_labels_are_of_this_score() -> None:
    report = json.loads((zoos_dir() / "faces" / "clip_scores.json").read_text())
    assert report["prompts"] == list(clip_score.PROMPTS)
    assert (report["steps"], report["guidance"], report["seed"]) == (
        clip_score.STEPS, clip_score.GUIDANCE, clip_score.SEED,
    )  # fmt: skip
    keys = {f"{r['id']}@{r['rank']}" for r in Zoo.open(zoos_dir() / "faces")}
    assert set(report["scores"]) <= keys
    values = torch.tensor(list(report["scores"].values()))
    assert len(values) > 1000 and float(values.min()) > 0.1 and float(values.std()) > 0.01


def test_a_base_without_clip_is_one_clear_error(tmp_path) -> None:
    with pytest.raises(LolgenError, match="no folder clip"):
        clip_score.load_clip(tmp_path)
