"""The commands: lines for people, JSON for machines, one line for an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lolgen import io
from lolgen.cli import build_parser, main
from lolgen.commands.merge import METHODS as NAMED
from lolgen.lora import ModuleSpec, Spec
from lolgen.tools.methods import METHODS
from tools.dense import delta, draw, relative

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
UNET = Spec((ModuleSpec("unet.conv_in", 8, 4, (3, 3), "conv"), ModuleSpec(Q, 12, 10)))


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    a, b = draw(UNET, 4, dtype=torch.float32), draw(UNET, (2, 3), seed=1, dtype=torch.float32)
    return str(io.save(a, tmp_path / "a", "peft")), str(io.save(b, tmp_path / "b.safetensors", "kohya"))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_resize(capsys, two, tmp_path):
    out = tmp_path / "small"
    code, text, err = run(capsys, "resize", two[0], "--rank", "2", "-o", str(out))
    assert code == 0 and err == ""
    lines = text.splitlines()
    assert lines[0].startswith("unet.conv_in: rank 4 -> 2, relative error 0.")
    assert lines[1].startswith(f"{Q}: rank 4 -> 2")
    assert lines[2].startswith("overall: rank 4 -> rank 2, relative error 0.")
    assert lines[3] == "264 parameters, 0.00106 MB -> 132 parameters, 0.000528 MB"
    assert lines[4] == f"{out} (peft)"
    code, text, _ = run(capsys, "resize", two[0], "--error", "0.3", "--per", "overall", "--json")
    report = json.loads(text)
    assert code == 0 and report["error"] <= 0.3 and "output" not in report
    code, text, _ = run(capsys, "resize", two[0], "--energy", "0.99")
    assert code == 0 and text.splitlines()[-1].startswith("nothing written")


def test_resize_to_half_precision_says_what_rounding_costs(capsys, two, tmp_path):
    out = tmp_path / "half.safetensors"
    argv = ["resize", two[0], "--rank", "2", "--dtype", "float16", "--format", "diffusers", "-o", str(out)]
    code, text, _ = run(capsys, *argv)
    assert code == 0 and ", rounding 0.000" in text
    assert io.load(out).dtype == torch.float16 and io.detect(out) == "diffusers"


@pytest.mark.parametrize("method", NAMED)
def test_merge(capsys, two, tmp_path, method):
    out = tmp_path / "both.safetensors"
    argv = ["merge", f"{two[0]}:0.7", f"{two[1]}:-0.3", "--method", method, "--format", "diffusers"]
    code, text, err = run(capsys, *argv, "-o", str(out))
    assert code == 0 and err == ""
    assert f"{two[1]}: weight -0.3, 2 modules, rank 2..3" in text and f"{method}: rank" in text
    code, text, _ = run(capsys, *argv, "--json")
    report = json.loads(text)
    assert [m["name"] for m in report["modules"]] == list(UNET.names)
    assert report["recipe"]["method"] == method
    if method == "sum":
        found, a, b = io.load(out), io.load(two[0]), io.load(two[1])
        assert relative(delta(found, Q), 0.7 * delta(a, Q) - 0.3 * delta(b, Q)) < 1e-6


def test_the_methods_that_the_command_names_are_the_ones_there_are():
    assert tuple(NAMED) == tuple(METHODS)


def test_dare_by_seed(capsys, two, tmp_path):
    found = []
    for name, seed in (("x", "1"), ("y", "1"), ("z", "2")):
        argv = ["merge", *two, "--method", "dare", "--seed", seed, "-o", str(tmp_path / name)]
        assert run(capsys, *argv)[0] == 0
        found.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_diff_and_compare(capsys, two, tmp_path):
    code, text, _ = run(capsys, "compare", *two, "--modules")
    assert code == 0 and "column angles" in text and text.splitlines()[-1].startswith("cosine ")
    code, text, _ = run(capsys, "compare", *two, "--json")
    report = json.loads(text)
    assert {"cosine", "relative_distance", "modules"} <= set(report)
    code, text, _ = run(capsys, "diff", *two, "-o", str(tmp_path / "d"))
    assert code == 0 and "difference: rank 7" in text
    # A plus the difference is B: the tools fit together.
    code, _, _ = run(capsys, "merge", two[0], str(tmp_path / "d"), "-o", str(tmp_path / "back"))
    code, text, _ = run(capsys, "compare", two[1], str(tmp_path / "back"), "--json")
    assert json.loads(text)["relative_distance"] < 1e-6


def test_an_infinite_ratio_is_null_in_json(capsys, tmp_path):
    zero = io.save(draw(UNET, 1, zero=UNET.names, dtype=torch.float32), tmp_path / "0", "peft")
    one = io.save(draw(UNET, 1, dtype=torch.float32), tmp_path / "1", "peft")
    _, text, _ = run(capsys, "compare", str(zero), str(one), "--json")
    assert json.loads(text, parse_constant=pytest.fail)["relative_distance"] is None
    _, text, _ = run(capsys, "diff", str(zero), str(one), "--json")
    assert json.loads(text, parse_constant=pytest.fail)["modules"][0]["relative_distance"] is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["resize", "A"], ["no target", "rank"]),
        (["resize", "A", "--rank", "0"], ["rank: found 0"]),
        (["resize", "A", "--energy", "2"], ["energy: found 2"]),
        (["resize", "A", "--energy", "0.9", "--error", "0.1"], ["give one"]),
        (["resize", "missing", "--rank", "1"], ["missing", "no such file"]),
        (["merge", "A:x"], ["A:x", "no such file"]),
        (["merge", "A:nan", "A"], ["finite"]),
        (["merge", "A:1", "A:-1", "--method", "average"], ["add up to 0"]),
        (["merge", "A", "B", "--method", "ties", "--density", "0"], ["density: found 0"]),
        (["diff", "A", "missing"], ["missing"]),
        (["compare", "A", "missing"], ["missing"]),
    ],
)
def test_errors_are_one_line(capsys, two, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    argv = [two[0] + x[1:] if x[:1] == "A" and x[1:2] in ("", ":") else x for x in argv]
    argv = [two[1] if x == "B" else x for x in argv]
    before = sorted(tmp_path.rglob("*"))
    out = [] if argv[0] == "compare" else ["-o", str(tmp_path / "out")]
    code, text, err = run(capsys, *argv, *out)
    assert code == 2 and text == "" and err.count("\n") == 1 and err.startswith("lolgen: ")
    assert all(w.replace("A:x", f"{two[0]}:x") in err for w in words), err
    assert sorted(tmp_path.rglob("*")) == before


def test_help_names_the_methods(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["merge", "--help"])
    text = capsys.readouterr().out
    assert all(m in text for m in NAMED)
