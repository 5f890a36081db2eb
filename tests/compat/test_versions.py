from __future__ import annotations

import pytest

from respec_trainer.compat import versions
from respec_trainer.errors import UnsupportedVersionError


def test_the_wanted_version_passes(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda _: "2.13.0")
    versions.require_version("torch", "2.13.0", "a test")


def test_a_local_version_does_not_count(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda _: "2.13.0+cpu")
    versions.require_version("torch", "2.13.0", "a test")


def test_another_version_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(versions, "version", lambda _: "2.14.0")
    with pytest.raises(UnsupportedVersionError, match=r"torch 2\.14\.0 .* torch==2\.13\.0 is needed by a test"):
        versions.require_version("torch", "2.13.0", "a test")


def test_a_missing_distribution_is_refused_by_name():
    with pytest.raises(UnsupportedVersionError, match="no-such-thing is not installed"):
        versions.require_version("no-such-thing", "1.0", "a test")
