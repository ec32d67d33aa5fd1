"""What the app shows: nothing foreign becomes markup, no probability is called certain, errors are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from demos import guard, html
from demos.sessions import Item
from lolgen.errors import LolgenError

EVIL = '<img src=x onerror="alert(1)">'


def read(p: float) -> dict[str, dict[str, object]]:
    return {"glasses": {"value": "yes", "probability": p, "probabilities": {"no": 1 - p, "yes": p}}}


def test_names_and_values_are_escaped():
    item = Item(EVIL, Path(), EVIL, EVIL, EVIL, formats=("peft",))
    foreign = {EVIL: {"value": EVIL, "probability": 0.5, "probabilities": {EVIL: 0.5, "b": 0.5}}}
    for page in (
        html.title(item, EVIL), html.usage(item), html.notices([EVIL]), html.gallery([item]), html.facts({EVIL: EVIL}),
        html.grid([""], [EVIL]), html.pairs([""], [""], [EVIL]), html.bars(foreign), html.heading(EVIL, EVIL),
        html.bars_before_after(foreign, foreign, {}), html.links(item),
    ):  # fmt: skip
        assert EVIL not in page and "<img src=x" not in page


@pytest.mark.parametrize(
    "p, text", [(1.0, "> 99 %"), (0.9999, "> 99 %"), (0.99, "99 %"), (0.6, "60 %"), (0.0, "&lt; 1 %")]
)
def test_rounding_does_not_make_sure(p, text):
    page = html.bars(read(p))
    assert text in page.replace("< 1 %", "&lt; 1 %") and "100 %" not in page


def test_doubt_is_said():
    assert "or no 40 %" in html.bars(read(0.6)) and "ll-doubt" not in html.bars(read(0.95))


def test_changes_are_marked():
    before, after = read(0.1) | {}, read(0.9)
    before["glasses"]["value"] = "no"
    page = html.bars_before_after(before, after, {"glasses": "yes"})
    assert "asked" in page and "<s>no</s> &rarr;" in page
    assert "moved too" in html.bars_before_after(before, after, {}, ["glasses"])
    assert "set with it" in html.bars_before_after(before, after, {}, [], ["glasses"])


def test_errors_are_words(capsys):
    def bad(error: Exception) -> None:
        raise error

    with pytest.raises(guard.gr.Error) as found:
        guard.friendly(bad)(LolgenError(f"seed: found\n{EVIL}"))
    assert found.value.message.startswith("seed: found &lt;img") and "\n" not in found.value.message
    assert capsys.readouterr().err == ""
    with pytest.raises(guard.gr.Error) as found:
        guard.friendly(bad)(ZeroDivisionError("secret /tmp/place"))
    assert found.value.message == guard.SORRY
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("method, headers, passed", [
    ("POST", [(b"content-length", b"10")], True),
    ("POST", [(b"content-length", b"11")], False),
    ("POST", [(b"transfer-encoding", b"chunked")], False),
    ("GET", [], True),
])  # fmt: skip
def test_bodies_are_bounded(method, headers, passed):
    import asyncio

    reached, sent = [], []

    async def inner(*_: object) -> None:
        reached.append(True)

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "headers": headers}
    asyncio.run(guard.BodyLimit(inner, most=10)(scope, None, send))
    assert bool(reached) == passed and (passed or sent[0]["status"] == 413)
