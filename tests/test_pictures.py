"""Labels are exact, drawings repeat, splits and captions are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from lolgen import pictures
from lolgen.errors import AttributeValueError


def test_a_picture_is_a_function_of_its_seed():
    identity = pictures.sample_identity(np.random.default_rng(0))
    one = pictures.draw_portrait(identity, np.random.default_rng(1))
    assert one.shape == (3, pictures.SIZE, pictures.SIZE) and one.dtype == np.uint8
    assert np.array_equal(one, pictures.draw_portrait(identity, np.random.default_rng(1)))
    assert not np.array_equal(one, pictures.draw_portrait(identity, np.random.default_rng(2)))


@pytest.mark.parametrize("name", list(pictures.ATTRIBUTES))
def test_every_value_of_an_attribute_looks_different(name):
    fixed = {
        "top": "short",
        "hair_color": "red",
        "glasses": "no",
        "beard": "yes",
        "skin": "tan",
        "clothes": "blue",
    }
    drawn = [
        pictures.draw_portrait(pictures.Identity({**fixed, name: v}), np.random.default_rng(0)).astype(int)
        for v in pictures.ATTRIBUTES[name]
    ]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert np.abs(a - b).max() > 40 and (np.abs(a - b) > 40).any(0).sum() >= 8


def test_hair_colour_without_hair_is_not_a_label():
    a = {"top": "bald", "hair_color": "red", "glasses": "no", "beard": "no", "skin": "tan", "clothes": "blue"}
    assert pictures.labels(a) == [0, -1, 0, 0, 1, 2]
    drawn = [
        pictures.draw_portrait(pictures.Identity({**a, "hair_color": c}), np.random.default_rng(0))
        for c in pictures.ATTRIBUTES["hair_color"]
    ]
    assert all(np.array_equal(drawn[0], d) for d in drawn), "what cannot be seen must not change the picture"
    assert len({pictures.split_of({**a, "hair_color": c}) for c in pictures.ATTRIBUTES["hair_color"]}) == 1
    assert pictures.labels({**a, "beard": "yes"})[1] == 3


def test_splits_hold_their_share():
    rng = np.random.default_rng(0)
    found = [pictures.split_of(pictures.sample_identity(rng).attributes) for _ in range(2000)]
    assert 0.1 < found.count("test") / 2000 < 0.22 and 0.04 < found.count("validation") / 2000 < 0.13
    assert all(
        pictures.split_of(pictures.sample_identity(rng, "test").attributes) == "test" for _ in range(20)
    )


def test_captions_name_what_is_given():
    a = {"glasses": "yes", "top": "long", "clothes": "red"}
    assert pictures.caption(a, "sks person") == "a photo of sks person long hair glasses red shirt"
    assert pictures.caption({}) == "a photo of a person"


def test_a_wrong_request_names_the_valid_ones():
    with pytest.raises(AttributeValueError, match="top, hair_color, glasses, beard, skin, clothes"):
        pictures.check_attributes({"nose": "big"})
    with pytest.raises(AttributeValueError, match="black, brown, blonde, red, white, pink"):
        pictures.check_attributes({"hair_color": "green"})


@pytest.mark.parametrize("style", range(len(pictures.STYLES)))
def test_styles_draw(style):
    a = pictures.draw_style(style, np.random.default_rng(0))
    assert a.shape == (3, 32, 32) and a.std() > 5
    assert np.array_equal(a, pictures.draw_style(style, np.random.default_rng(0)))
