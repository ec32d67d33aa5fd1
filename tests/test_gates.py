"""The gates on shipped artefacts, on a small sample each: a broken base, zoo, generator or predictor fails here.

The full figures are in reports/, by the commands that the README names.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lolgen import pictures, pipeline, preview
from lolgen.base import Base
from lolgen.errors import LolgenError
from lolgen.lora import ModuleSpec, Spec
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.probe import Probe, mean_accuracy
from lolgen.tasks.generate import draw
from lolgen.tasks.paper.shipped import score
from lolgen.tasks.paper.strangers import flagged
from lolgen.testing import random_lora
from lolgen.zoo.zoo import Zoo

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe.load(checkpoints_dir() / "probe.safetensors")


@pytest.fixture(scope="module")
def base() -> Base:
    return Base.load(checkpoints_dir() / "tiny-sd")


@pytest.fixture(scope="module")
def people() -> list[pictures.Identity]:
    rng = np.random.default_rng(99)
    return [pictures.sample_identity(rng, "test") for _ in range(24)]


def labels_of(people: list[pictures.Identity]) -> torch.Tensor:
    return torch.tensor([pictures.labels(p.attributes) for p in people])


def test_base_draws_full_captions_it_never_saw(base, probe, people):
    prompts = [
        pictures.caption({n: v for n, v in p.attributes.items() if pictures.visible(p.attributes, n)})
        for p in people
    ]
    z = base.sample(base.text(prompts), torch.Generator().manual_seed(0), preview.STEPS, preview.GUIDANCE)
    assert mean_accuracy(probe.read(base.decode(z)), labels_of(people)) >= 0.93


def test_autoencoder_keeps_the_attributes(base, probe, people):
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(np.stack([pictures.draw_portrait(p, rng) for p in people]))
    assert mean_accuracy(probe.read(base.decode(base.encode(pixels))), labels_of(people)) >= 0.98
    noise = torch.rand(len(people), 3, 32, 32) * 2 - 1
    assert mean_accuracy(probe.read(noise), labels_of(people)) < 0.6, (
        "the probe must not be content with noise"
    )


def test_the_rare_word_is_no_word_like_another(base):
    states = base.text([pictures.caption({}, s) for s in ("a person", "sks person", "skd person")])
    closing = torch.nn.functional.normalize(states[:, 9:].mean(1), dim=-1)
    cosines = closing @ closing.T
    assert cosines[0, 1] < 0.6 and cosines[0, 2] < 0.6 and cosines[1, 2] < 0.6


def test_zoo_gate_through_stock_diffusers(probe):
    """High on the trigger, near the base on plain words."""
    zoo = Zoo.open(zoos_dir() / "faces").split("test")
    zoo = Zoo(zoo.folder, zoo.info, zoo.rows[::40])
    pipe = preview.load_pipeline(checkpoints_dir() / "tiny-sd")
    plain = pictures.caption({}, "a person")
    of_base = preview.draw(pipe, [plain], [0, 1]) * 2 - 1
    on, off = [], []
    for row, lora in zip(zoo, zoo.load().unstack(), strict=True):
        assert preview.attach(pipe, lora) == len(zoo.spec)
        images = preview.draw(pipe, [pictures.caption({}, row["recipe"]["subject"]), plain], [0, 1]) * 2 - 1
        pipe.unload_lora_weights()
        on.append(images[:2])
        off.append(images[2:])
    target = zoo.labels().repeat_interleave(2, 0)
    called = mean_accuracy(probe.read(torch.cat(on)), target)
    quiet = mean_accuracy(probe.read(torch.cat(off)), target)
    ground = mean_accuracy(probe.read(of_base).repeat(len(zoo), 1), target)
    assert called >= 0.90
    assert abs(quiet - ground) < 0.2 and quiet < 0.6


def test_a_bank_draws_what_the_stock_pipeline_draws(base):
    zoo = Zoo.open(zoos_dir() / "faces").split("test")
    zoo = Zoo(zoo.folder, zoo.info, zoo.rows[:2])
    loras, subjects = zoo.load().unstack(), [r["recipe"]["subject"] for r in zoo]
    many = draw(base, loras, subjects, [0, 1])
    pipe = preview.load_pipeline(checkpoints_dir() / "tiny-sd")
    for k, lora in enumerate(loras):
        preview.attach(pipe, lora)
        one = preview.draw(pipe, [pictures.caption({}, subjects[k])], [0, 1]) * 2 - 1
        pipe.unload_lora_weights()
        assert (many[k] - one).abs().max() < 0.02
    assert (many[0] - many[1]).abs().max() > 0.2


def test_generated_adapters_draw_what_was_asked(base, probe):
    requests = [{"hair_color": "red", "glasses": "yes", "top": "long"}, {"beard": "yes", "clothes": "yellow"},
                {"top": "hat", "skin": "dark"}, {"top": "bald", "glasses": "no", "beard": "no"}]  # fmt: skip
    generator = pipeline.load_generator()
    loras, full = generator.generate(requests, [0, 1, 2, 3])
    labels = torch.tensor(
        [[v.index(r[n]) if n in r else -1 for n, v in pictures.ATTRIBUTES.items()] for r in requests]
    )
    images = draw(base, loras, ["sks person"] * 4, [0, 1])
    assert mean_accuracy(probe.read(images.flatten(0, 1)), labels.repeat_interleave(2, 0)) >= 0.9
    assert all(f[n] == v for f, r in zip(full, requests, strict=True) for n, v in r.items())


def test_predictor_reads_test_identities():
    zoo = Zoo.open(zoos_dir() / "faces").split("test")
    zoo = Zoo(zoo.folder, zoo.info, zoo.rows[::4])
    read = pipeline.load_predictor().probabilities(zoo.load())
    found = torch.stack([read[n].argmax(-1) for n in pictures.ATTRIBUTES], 1)
    assert mean_accuracy(found, zoo.labels()) >= 0.85


@pytest.mark.parametrize(
    "module",
    [
        ModuleSpec(
            "unet.down_blocks.9.attentions.0.transformer_blocks.0.attn2.to_v", 64, 96
        ),  # no such block
        ModuleSpec(
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", 320, 768
        ),  # another size
    ],
)
def test_an_adapter_of_another_base_is_refused_and_leaves_no_trace(module):
    pipe = preview.load_pipeline(checkpoints_dir() / "tiny-sd")
    before = preview.draw(pipe, ["a photo of a person"], [0], steps=2)
    with pytest.raises(LolgenError, match="base"):
        preview.attach(pipe, random_lora(Spec((module,)), 2))
    assert torch.equal(before, preview.draw(pipe, ["a photo of a person"], [0], steps=2))


@pytest.mark.parametrize("name", ["clip_score", "attributes", "styles", "dataset_size", "recipe"])
def test_a_shipped_reader_gives_its_row_of_the_table_again(name):
    report = json.loads((ROOT / "reports" / "paper.json").read_text())
    found = score(name)
    row = report["rows"][found["row"]]["models"]["ours"]
    assert abs(found["metric"] - row["mean"]) < 0.015 + 3 * row["std"], (found, row)


def test_shipped_readers_know_a_stranger():
    for name in ("attributes", "styles"):
        found = flagged(name)
        assert found[name] < 0.12 and found["noise of the same size"] > 0.95, (name, found)


def test_read_tells_everything_of_a_generated_adapter(tmp_path):
    pipeline.generate({"glasses": "yes"}, tmp_path / "made", seed=3)
    row = pipeline.read([tmp_path / "made"])[0]
    assert row["labels"]["glasses"]["value"] == "yes"
    low, high = row["labels"]["clip_score"]["interval"]
    assert low < row["labels"]["clip_score"]["value"] < high
    assert {"lr", "steps", "prompt"} <= set(row["labels"]) and "planets" not in row["labels"]
