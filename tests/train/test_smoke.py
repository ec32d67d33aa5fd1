"""Every stage runs for two steps, one on what the other left; a stage that is stopped goes on where it stood."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lolgen.paths import checkpoints_dir
from train.state import load_state, load_tensors, save_state


def stage(monkeypatch: pytest.MonkeyPatch, name: str, *argv: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    importlib.import_module(f"train.{name}").main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


def test_from_pictures_to_a_generator(monkeypatch, folder):
    pictures, base = folder / "pictures", folder / "tiny-sd"
    stage(
        monkeypatch,
        "pictures_render",
        "--out",
        pictures,
        "--portraits",
        "24",
        "--styles",
        "2",
        "--heldout",
        "8",
    )
    common = ("--recipe", "smoke", "--pictures", pictures)
    stage(monkeypatch, "vae_train", *common, "--out", base / "vae", "--state", folder / "vae.safetensors")
    stage(
        monkeypatch,
        "probe_train",
        *common,
        "--out",
        folder / "probe.safetensors",
        "--state",
        folder / "p.safetensors",
    )
    stage(monkeypatch, "clip_train", *common, "--out", base, "--state", folder / "clip.safetensors")
    stage(monkeypatch, "base_train", *common, "--out", base, "--state", folder / "base.safetensors")
    stage(monkeypatch, "base_ship", "--run", base, "--out", folder / "shipped")
    zoo = folder / "zoo"
    stage(
        monkeypatch,
        "zoo_build",
        "--recipe",
        "smoke",
        "--base",
        folder / "shipped",
        "--out",
        zoo,
        "--workers",
        "1",
    )
    stage(
        monkeypatch, "generator_train", "--recipe", "smoke", "--zoo", zoo, "--base", folder / "shipped",
        "--out", folder / "generator", "--state", folder / "generator.safetensors",
    )  # fmt: skip
    stage(
        monkeypatch, "template_tune", "--recipe", "smoke", "--model", folder / "generator",
        "--base", folder / "shipped", "--state", folder / "template.safetensors",
    )  # fmt: skip
    stage(
        monkeypatch, "generator_train", "--recipe", "smoke", "--keep-template", "--zoo", zoo, "--base",
        folder / "shipped", "--out", folder / "generator", "--state", folder / "flow.safetensors",
    )  # fmt: skip
    stage(
        monkeypatch, "predictor_train", "--zoo", zoo, "--base", folder / "shipped", "--out",
        folder / "generator" / "predictor",
    )  # fmt: skip
    stage(
        monkeypatch, "editor_train", "--recipe", "smoke", "--model", folder / "generator", "--base",
        folder / "shipped", "--zoo", zoo,
    )  # fmt: skip
    stage(
        monkeypatch, "imager_train", "--recipe", "smoke", "--out", folder / "generator" / "imager.safetensors",
        "--state", folder / "imager.safetensors",
    )  # fmt: skip
    from lolgen.editor import Editor
    from lolgen.generator import Generator
    from lolgen.imager import Imager

    assert set(Editor.from_pretrained(folder / "generator").reach.values()) == {1.0}
    assert (
        len(Imager.load(folder / "generator" / "imager.safetensors").describe(torch.zeros(2, 3, 32, 32))[0])
        == 2
    )
    loras, _ = Generator.from_pretrained(folder / "generator").generate([{"glasses": "yes"}], [0])
    assert all(torch.isfinite(f.B).all() for f in loras[0].factors.values())


def test_standardised_latents_decode_to_the_same_pictures():
    from train.vae_train import build_vae, standardise_latents

    torch.manual_seed(0)
    vae = build_vae((8, 8, 8)).eval()
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mode()).sample
        standardise_latents(vae, x)
        z = vae.encode(x).latent_dist.mode()
        after = vae.decode(z).sample
    assert (before - after).norm() < 1e-4 * before.norm()
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_a_state_resumes_bit_for_bit(tmp_path):
    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = fresh()
    train(model, optimizer, range(5))
    save_state(tmp_path / "s.safetensors", {"m": model}, optimizer, {"step": 5})
    train(model, optimizer, range(5, 9))
    again, other = fresh()
    assert load_state(tmp_path / "s.safetensors", {"m": again}, other)["step"] == 5
    train(again, other, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    bare, third = fresh()
    load_state(tmp_path / "s.safetensors", {"m": bare}, None)
    train(bare, third, range(5, 9))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), bare.parameters(), strict=True))


def test_two_cpu_processes_train_the_generator(monkeypatch, tmp_path):
    """`accelerate launch` on two CPU processes: one model comes out."""
    base = checkpoints_dir() / "tiny-sd"
    stage(
        monkeypatch,
        "zoo_build",
        "--recipe",
        "smoke",
        "--base",
        base,
        "--out",
        tmp_path / "zoo",
        "--workers",
        "1",
    )
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    assert accelerate is not None
    command = [
        accelerate, "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "0", "-m", "train.generator_train", "--recipe", "smoke",
        "--zoo", str(tmp_path / "zoo"), "--base", str(base), "--out", str(tmp_path / "g"),
        "--state", str(tmp_path / "g.safetensors"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "g" / "settings.json").exists()
    assert load_tensors(tmp_path / "g.safetensors")[1]["step"] == 2


def test_shipped_checkpoints_are_small_and_unpickled():
    root = checkpoints_dir()
    files = [p for p in root.rglob("*") if p.is_file() and "zoos" not in p.relative_to(root).parts]
    assert not [p for p in files if p.suffix in {".bin", ".pt", ".pkl", ".ckpt", ".pth"}]
    base = [p for p in files if p.relative_to(root).parts[0] in {"tiny-sd", "probe.safetensors"}]
    assert sum(p.stat().st_size for p in base) <= 30e6
    assert max(p.stat().st_size for p in root.rglob("*") if p.is_file()) <= 50e6


def test_the_manifest_says_what_is_there():
    import json

    from train.manifest import NAME, files_of

    root = checkpoints_dir()
    assert json.loads((root / NAME).read_text("utf-8"))["files"] == files_of(root)
