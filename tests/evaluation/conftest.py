"""The small extractor, for tests that need no real features."""

import pytest

from fastdit.evaluation import features
from helpers.evaluation import tiny


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(features.FEATURES, "efficientnet-lite0", tiny)
