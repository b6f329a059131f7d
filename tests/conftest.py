"""Tiny random models of real architectures, and inputs that are off the origin: padded, unequal, batched."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

from sparing.testing.models import build

torch.set_num_threads(1)  # tiny models; the suite runs one process a core
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama() -> transformers.PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="session")
def llava() -> transformers.PreTrainedModel:
    return build("llava")
