"""What tests of stores share."""

import json
import os

import pytest


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
  """What the operating system keeps over a power cut cannot be tested here, and waiting for it takes most of the time."""
  monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def texts(fixtures):
  """The documents of the fixture's corpus."""
  return [json.loads(line)["text"] for line in (fixtures / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
