"""`lolgen edit --add` and `--remove`: from a trained adapter to one that peft loads, judged by the base; bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lolgen import io
from lolgen.cli import main
from lolgen.language.model import LanguageBase
from lolgen.language.windows import source_windows
from lolgen.lora import ModuleSpec, Spec
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.testing import random_lora
from lolgen.zoo.zoo import Zoo

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the zoo's test split, trained on Theodore Roosevelt and Reagan, as a PEFT folder."""
    zoo = Zoo.open(zoos_dir() / "speeches").select(lambda r: r["id"] == "test-0182")
    return io.save(zoo.load().unstack()[0], tmp_path_factory.mktemp("trained") / "adapter", "peft")


def drops(folders: dict[str, Path], *sources: str) -> dict[str, dict[str, float]]:
    """What stock peft says: name -> source -> how much the adapter lowers the loss on its test windows."""
    base = LanguageBase.load(checkpoints_dir() / "tiny-lm")
    ids = {s: source_windows(base, s, "test")[:200] for s in sources}
    with torch.no_grad():
        plain = {s: float(base.model(input_ids=x, labels=x).loss) for s, x in ids.items()}
        found = {}
        for name, folder in folders.items():
            model = AutoModelForCausalLM.from_pretrained(checkpoints_dir() / "tiny-lm", dtype=torch.float32)
            model = PeftModel.from_pretrained(model, folder).eval()
            found[name] = {s: plain[s] - float(model(input_ids=x, labels=x).loss) for s, x in ids.items()}
    return found


def test_a_source_goes_and_another_comes_and_the_rest_stays(capsys, tmp_path: Path, trained: Path) -> None:
    less, more = tmp_path / "less", tmp_path / "more"
    code, out, _ = run(capsys, "edit", str(trained), "--remove", "reagan", "-o", str(less), "--json")
    report = json.loads(out)
    assert code == 0 and report["warnings"] == [] and report["rank"] == 4 and report["format"] == "peft"
    assert (
        report["kept"] == 1
        and report["sources"]["reagan"]["before"] > 0.2
        and report["sources"]["reagan"]["after"] < 0
    )
    assert run(capsys, "edit", str(trained), "--add", "source=carter", "-o", str(more))[0] == 0
    sources = "theodore-roosevelt", "reagan", "carter"
    found = drops({"before": trained, "less": less, "more": more}, *sources)
    before, after, with_carter = found["before"], found["less"], found["more"]
    assert before["reagan"] > 0.01 and after["reagan"] < 0.4 * before["reagan"]
    assert after["theodore-roosevelt"] > 0.7 * before["theodore-roosevelt"] > 0
    assert with_carter["carter"] > before["carter"] + 0.005
    assert with_carter["reagan"] > 0.5 * before["reagan"]


def test_strength_nought_gives_the_adapter_back(capsys, tmp_path: Path, trained: Path) -> None:
    argv = ("--add", "grant", "--remove", "reagan", "--strength", "0", "-o", str(tmp_path / "same"))
    assert run(capsys, "edit", str(trained), *argv)[0] == 0
    old, new = io.load(trained), io.load(tmp_path / "same")
    for n in old.spec.names:
        torch.testing.assert_close(new[n].delta(), old[n].delta(), rtol=1e-3, atol=1e-5)


def test_words_for_people_and_a_warning_where_there_is_little_to_remove(
    capsys, tmp_path: Path, trained: Path
) -> None:
    code, out, _ = run(
        capsys, "edit", str(trained), "--remove", "polk", "--rank", "2", "-o", str(tmp_path / "a")
    )
    assert code == 0 and "warning: polk is barely read" in out and " - polk:" in out and "rank 2" in out
    assert "tiny-lm" in out and all(f.rank == 2 for f in io.load(tmp_path / "a").factors.values())


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (("--add", "lenin"), "lincoln"),
        (("--add", "grant", "--remove", "grant"), "both"),
        (("--add", "grant", "--set", "glasses=yes"), "portraits"),
        (("--add", "grant", "--preview", "x.png"), "draws nothing"),
        (("--add", "grant", "--keep", "identity"), "portraits"),
        (("--remove", "grant", "--strength", "3"), "strength"),
        (("--remove", "grant", "--rank", "0"), "rank"),
        (("--add", "grant", "--format", "kohya"), "peft"),
        (("--set", "source=grant"), "--add"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_one_line(
    capsys, tmp_path: Path, trained: Path, argv: tuple[str, ...], word: str
) -> None:
    code, _, err = run(capsys, "edit", str(trained), *argv, "-o", str(tmp_path / "a.safetensors"))
    assert code == 2 and word in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_one_line(capsys, tmp_path: Path) -> None:
    spec = Spec((ModuleSpec("model.layers.0.self_attn.q_proj", 64, 64),))
    other = io.save(random_lora(spec, 2), tmp_path / "other", "peft")
    code, _, err = run(capsys, "edit", str(other), "--add", "grant", "-o", str(tmp_path / "a"))
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "a").exists()


def test_predict_tells_how_much_of_every_source_there_is(capsys, tmp_path: Path, trained: Path) -> None:
    lincoln = tmp_path / "lincoln"
    assert run(capsys, "generate", "--zoo", "speeches", "--set", "source=lincoln", "-o", str(lincoln))[0] == 0
    code, out, _ = run(capsys, "predict", "--zoo", "speeches", str(lincoln), str(trained), "--json")
    generated, real = (row["sources"] for row in json.loads(out))
    assert code == 0 and next(iter(generated)) == "lincoln" and 0.6 < generated["lincoln"] < 1
    assert set(list(real)[:2]) == {"reagan", "theodore-roosevelt"}
    code, out, _ = run(capsys, "predict", "--zoo", "speeches", str(lincoln))
    assert code == 0 and "  lincoln: 0." in out and "reagan" not in out
    code, _, err = run(capsys, "predict", "--zoo", "speeches", str(lincoln), "--all")
    assert code == 2 and err.count("\n") == 1
    code, _, err = run(capsys, "predict", "--zoo", "nowhere", str(lincoln))
    assert code == 2 and "--zoo" in err and err.count("\n") == 1
