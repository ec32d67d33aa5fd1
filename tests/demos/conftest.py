"""A running app for a test file, and a visitor for a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from served import App, Client, serving


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with serving(tmp_path_factory.mktemp("app")) as running:
        yield running
        assert running.stop() == 0
        assert running.files() == [], "something was left behind"
        assert "Traceback" not in running.log.read_text()


@pytest.fixture
def visitor(app: App, request: pytest.FixtureRequest) -> Iterator[Client]:
    client = Client(app.url, f"visitor-{request.node.name}")
    yield client
    client.close()
