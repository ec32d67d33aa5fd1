"""The tab Speak: the file of the library, the figures of stock peft, and nothing in the pickers of faces."""

from __future__ import annotations

import io as stdio
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from served import ANYBODY, App, Client, same_folder

from demos import html_speech
from demos.passages import PASSAGES, written
from lolgen import pipeline
from lolgen.errors import LolgenError
from lolgen.language.sentences import encoder_folder
from lolgen.language.texts import SOURCES
from lolgen.paths import checkpoints_dir

OPENING = "The people of this country"
EVIL = '<img src=x onerror="alert(1)"> & <s>'
LINCOLN = [["lincoln"], "", PASSAGES["lincoln"], OPENING, 0, 4]


def with_(**changes: Any) -> list[Any]:
    names = ("sources", "line", "passage", "opening", "seed", "rank")
    return [changes.get(n, v) for n, v in zip(names, LINCOLN, strict=True)]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, text: str, stretch: int) -> float:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    nats = []
    for i in range(0, len(ids), stretch - 1):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[i : i + stretch - 1]]])
        p = model(row).logits[0, :-1].log_softmax(-1)
        nats.append(-p.gather(1, row[0, 1:, None])[:, 0])
    return float(torch.cat(nats).mean().exp())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_answer_is_that_of_the_library_and_of_stock_peft(visitor: Client, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    answer = visitor.call("speak", with_(sources=["lincoln", "grant"], passage=PASSAGES["grant"], rank=3))
    assert answer["success"], answer
    page = answer["output"]["data"][0]
    made = pipeline.speak({"lincoln": 1.0, "grant": 1.0}, tmp_path / "cli", rank=3)
    archive = visitor.download(page, "peft")
    same_folder(archive, Path(made["adapter"]))
    with zipfile.ZipFile(stdio.BytesIO(archive)) as z:
        z.extractall(tmp_path / "got")
    (folder,) = (tmp_path / "got").iterdir()
    base = checkpoints_dir() / "tiny-lm"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = [perplexity(model, tokenizer, PASSAGES["grant"], n) for n in (24, 512)]
    model = PeftModel.from_pretrained(model, folder)
    after = [perplexity(model, tokenizer, PASSAGES["grant"], n) for n in (24, 512)]
    shown = [float(x) for x in re.findall(r"<dd>([\d.]+)</dd>", page)]
    assert shown == pytest.approx([before[0], after[0]], abs=0.0051)
    assert f"{before[1]:.2f} alone and {after[1]:.2f} with" in page
    assert "Abraham Lincoln <b>50 %" in page and 'data-format="kohya"' not in page
    for given, heading in {None: "Base model alone", made["adapter"]: "With the adapter"}.items():
        text = html_speech.escape(pipeline.continue_text(given, OPENING))
        assert f"{heading}</figcaption><blockquote><b>{OPENING}</b>{text}" in page


def test_it_is_in_the_gallery_and_in_no_picker(visitor: Client) -> None:
    answers = [visitor.call("speak", LINCOLN)["output"]["data"] for _ in range(2)]
    page, gallery, *pickers = answers[1]
    assert "Abraham Lincoln 2" in gallery and gallery.count("<article>") == 2
    (mine,) = re.findall(r"lolgen/file/([\w-]+)/peft", page)
    assert mine in gallery and len(pickers) == 4
    later = visitor.call("generate", [*ANYBODY, 5, 4])["output"]["data"]
    assert later[1].count("<article>") == 3
    for update in [*pickers, *later[2:]]:
        names = [c["name"] for c in update["props"]["choices"]]
        assert mine not in {c["id"] for c in update["props"]["choices"]} and "Ruby" in names
        assert not any("Lincoln" in n for n in names)
    # Nor can a client that knows its id edit it as a face.
    assert "tiny-sd" in visitor.error("edit", [mine, "bald", *["keep"] * 5, 1, "All the rest"])


def test_a_chosen_president_brings_a_passage_unless_the_visitor_wrote_one(visitor: Client) -> None:
    def swapped(names: list[str], text: str) -> Any:
        return visitor.call("swap_passage", [names, text])["output"]["data"][0]

    assert swapped(["lincoln", "obama"], PASSAGES["lincoln"]) == PASSAGES["obama"]
    for names, text in ((["obama"], "my own"), ([], PASSAGES["lincoln"])):
        assert swapped(names, text) == {"__type__": "update"}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sources": []}, "Nobody is chosen"),
        ({"sources": None}, ""),
        ({"sources": ["lenin"]}, "lenin"),
        ({"sources": [{"path": "/etc/passwd"}]}, "upload"),
        ({"passage": ""}, "found none"),
        ({"passage": None}, "found none"),
        ({"passage": "a " * 2000}, "at most 511 tokens"),
        ({"passage": "a" * 10**6}, "at most 511 tokens"),
        ({"opening": "  "}, "Opening words"),
        ({"opening": "a " * 500}, "at most 471 tokens"),
        ({"line": "x" * 5000}, "at most 200"),
        ({"seed": -1}, "seed"),
        ({"rank": 65}, ""),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    visitor: Client, app: App, changes: dict[str, Any], words: str
) -> None:
    before = len(app.files())
    text = visitor.error("speak", with_(**changes))
    assert words in text and "\n" not in text and "Traceback" not in text and 10 < len(text) < 600, text
    assert len(app.files()) == before


def test_a_passage_of_html_is_text(visitor: Client) -> None:
    page = visitor.call("speak", with_(passage=EVIL, opening=EVIL))["output"]["data"][0]
    assert "<img" not in page and "<s>" not in page and "onerror" in re.sub(r"<[^>]*>", "", page)
    letters = re.sub(r"<[^>]*>", "", page.split("ll-passage")[1].split("</p>")[0].removeprefix('">'))
    assert letters == html_speech.escape(EVIL)


def test_a_line_of_words_chooses(visitor: Client) -> None:
    try:
        encoder_folder()
    except LolgenError as error:
        pytest.skip(str(error))
    page = visitor.call("speak", with_(sources=[], line="speak like Ulysses Grant"))["output"]["data"][0]
    assert "Ulysses S. Grant" in page.split("</h3>")[0]
    assert "fits none" in visitor.error("speak", with_(line="<b>banana bread recipe</b>"))


# -- the passages


def test_the_passages_are_those_of_the_rule() -> None:
    assert written() == PASSAGES and tuple(PASSAGES) == tuple(SOURCES)


def test_adapters_lower_the_perplexity_of_their_passages(tmp_path: Path) -> None:
    """No passage was chosen for its figure: it falls for seventeen sources of nineteen, as the page says of each."""
    rises = set()
    for source, text in PASSAGES.items():
        made = pipeline.speak({source: 1.0}, tmp_path / source)["adapter"]
        if pipeline.listen(made, text)["perplexity"] >= pipeline.listen(None, text)["perplexity"]:
            rises.add(source)
    # Room for one more: the generator may be trained again.
    assert len(rises) <= 3 and "lincoln" not in rises, rises


# -- what is shown


def heard(*nats: float, pieces: tuple[str, ...] = ("a", EVIL, "\n")) -> dict[str, Any]:
    return {"tokens": len(nats), "perplexity": 20 + sum(nats), "pieces": list(pieces), "nats": list(nats)}


def test_shades_and_figures() -> None:
    before, after = heard(1.0, 2.0, 3.0), heard(1.5, 1.99, 2.7)
    page = html_speech.shaded(before, after)
    assert (
        page.count('<span class="ll-less-3" title="less likely: probability 36.8 % to 22.3 %">a</span>') == 1
    )
    assert '<span class="ll-more-3"' in page and "1 less likely" in page and "1 about the same" in page
    assert "1 likelier" in page and "<img" not in page
    assert "<img" not in html_speech.extremes(before, after) and "space</b> +35 %" in html_speech.extremes(
        before, after
    )
    assert "ll-good" in html_speech.verdict(heard(1.0), heard(0.5))
    assert "ll-notices" in html_speech.verdict(heard(1.0), heard(1.0)) and "0.00 %" in html_speech.figures(
        before, before
    )
    assert "−2.38 %" in html_speech.figures(heard(1.0), heard(0.5))
    assert "<img" not in html_speech.continuations(EVIL, EVIL, EVIL) + html_speech.blend(
        {EVIL: 0.5, "b": 0.5}
    )
