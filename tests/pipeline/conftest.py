"""One Chromium for the tests of a module."""

import os
from collections.abc import Iterator

import pytest

from tests.pipeline.report import chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[chromium.Browser]:
    if chromium.find() is None:
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail("REQUIRE_BROWSER=1, but there is no Chromium; apt-get install chromium")
        pytest.skip("no Chromium here; apt-get install chromium")
    with chromium.start(tmp_path_factory.mktemp("browser") / "profile") as started:
        yield started
