"""Sessions: what they hold is bounded, nobody sees another's, and nothing is left when they end."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from demos.sessions import Item, Limits, Store, names_taken
from lolgen.errors import LolgenError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(clock: Clock, **limits: float) -> Store:
    return Store(Limits(**limits), clock)


@pytest.fixture
def store(clock):
    made = opened(clock, items=3, session_bytes=1000, all_bytes=2000, idle=100, grace=10)
    yield made
    made.close()


def put(store: Store, key: str, name: str = "x", size: int = 10) -> Item:
    path = store.session(key).place()
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(bytes(size))
    return store.add(key, Item(name, path, "generated"))


def below(store: Store) -> list[Path]:
    return [p for p in store.root.rglob("*") if p.is_file()]


def test_sessions_do_not_see_each_other(store):
    mine, example = put(store, "a"), Item("Ruby", store.root / "e", "example")
    store.examples.append(example)
    assert store.items("a") == [mine, example] and store.items("b") == [example]
    assert store.item("a", mine.id) is mine and store.item("b", example.id) is example
    for id in (mine.id, None, "", 7, {"path": "/etc/passwd"}):
        with pytest.raises(LolgenError, match="gone"):
            store.item("b", id)
    assert store.linked(mine.id) is mine and store.linked("x") is None


def test_ids_are_not_to_be_guessed(store):
    ids = {put(store, "a").id for _ in range(50)}
    assert len(ids) == 50 and all(len(i) >= 16 for i in ids)


def test_a_closed_tab_is_deleted_after_the_grace_unless_it_comes_back(store, clock):
    put(store, "a")
    put(store, "b")
    store.closed("a")
    store.closed("b")
    clock.now = 9
    store.sweep()
    assert store.session("b").items  # back again
    clock.now = 20
    store.sweep()
    assert store.items("a") == [] and len(store.items("b")) == 1 and len(below(store)) == 1


def test_an_idle_session_is_deleted(store, clock):
    item = put(store, "a")
    clock.now = 99
    store.sweep()
    assert store.linked(item.id)
    clock.now = 101
    store.sweep()
    assert store.linked(item.id) is None and below(store) == []
    assert list(store.root.iterdir()) == [store.uploads]


def test_uploads_go_with_the_session_that_sent_them(store, clock):
    paths = {}
    for name in ("own", "shared", "other"):
        (store.uploads / name).mkdir()
        paths[name] = store.uploads / name / "f.safetensors"
        paths[name].write_bytes(b"x")
    store.session("a").uploads.update({paths["own"], paths["shared"]})
    store.session("b").uploads.update({paths["shared"], paths["other"]})
    store.closed("a")
    clock.now = 50
    store.sweep()
    assert not paths["own"].exists() and paths["shared"].exists() and paths["other"].exists()
    store.closed("b")
    clock.now = 100
    store.sweep()
    assert list(store.uploads.iterdir()) == []


def test_stray_uploads_are_deleted_by_age(clock):
    store = opened(clock, uploads=0.2)
    (store.uploads / "stray").mkdir()
    (store.uploads / "stray" / "f").write_bytes(b"x")
    store.sweep()
    assert (store.uploads / "stray").exists()
    time.sleep(0.4)
    store.sweep()
    assert list(store.uploads.iterdir()) == []
    store.close()


def test_the_oldest_make_room(store):
    items = [put(store, "a", str(i)) for i in range(5)]
    assert [i.name for i in store.items("a")] == ["4", "3", "2"]
    assert [i.path.exists() for i in items] == [False, False, True, True, True]
    big = put(store, "a", "big", 991)
    assert store.items("a") == [big]


def test_the_disk_is_bounded(store):
    put(store, "a", size=900)
    put(store, "b", size=900)
    with pytest.raises(LolgenError, match="busy"):
        put(store, "c", size=900)
    assert sum(p.stat().st_size for p in below(store)) == 1800


def test_the_number_of_sessions_is_bounded(clock):
    store = opened(clock, sessions=2, idle=10)
    store.session("a")
    store.session("b")
    with pytest.raises(LolgenError, match="busy"):
        store.session("c")
    clock.now = 20
    store.session("c")
    store.close()


@pytest.mark.parametrize("key", [None, ""])
def test_an_event_without_a_session(store, key):
    with pytest.raises(LolgenError, match="reload"):
        store.session(key)


def test_a_key_is_never_a_path(store):
    put(store, "../../etc")
    assert all(p.is_relative_to(store.root) for p in below(store)) and len(below(store)) == 1


def test_close_deletes_everything(clock):
    store = opened(clock)
    put(store, "a")
    store.close()
    assert not store.root.exists()


def test_the_folder_is_private(store):
    assert os.stat(store.root).st_mode & 0o077 == 0


def test_names_are_numbered():
    items = [Item("a", Path(), "upload"), Item("a 2", Path(), "upload")]
    assert names_taken(items, "a") == "a 3" and names_taken(items, "b") == "b"


@pytest.mark.parametrize(
    "name, slug", [("Ruby + glasses", "ruby-glasses"), ("../..", "lora"), ('a"b\r\nc', "a-b-c")]
)
def test_file_names_of_downloads(name, slug):
    assert Item(name, Path(), "upload").slug == slug
