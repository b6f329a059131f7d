"""MODEL as a user writes it (`lab:vlm`, a folder, a hub id) as a live model with its tokenizer or processor."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PROCESSOR_MAPPING, AutoProcessor, AutoTokenizer, PreTrainedModel

from sparing import lab
from sparing.engine.checkpoint import from_pretrained
from sparing.engine.view import View
from sparing.grid.files import no_way_out
from sparing.grid.method import Error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Loaded:
    """A model ready to run, and what turns words and pictures into its inputs (fetched when first asked for).

    Attributes:
        name: as the user wrote it.
        model: in evaluation mode, on its device.
        source: folder or hub id that tokenizer and processor come from, None where they were given.
        given: processor or tokenizer that the caller brought.
    """

    name: str
    model: PreTrainedModel
    source: str | None = None
    given: Any = None

    @cached_property
    def view(self) -> View:
        """The model's layers."""
        return View(self.model)

    @cached_property
    def sees(self) -> bool:
        """Whether it takes images."""
        return self.view.image_token_id is not None

    @cached_property
    def processor(self) -> Any:
        """The processor of a model that takes images; without its part for videos where torchvision is missing."""
        if self.given is not None:
            return self.given
        try:
            return self._fetch(AutoProcessor, "processor")
        except Error as problem:
            still = _still(self.model) if isinstance(problem.__cause__, ImportError) else None
            if still is None:
                raise
        return self._fetch(still, "processor")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, by itself or as part of the processor."""
        if self.given is not None:
            return getattr(self.given, "tokenizer", self.given)
        return self._fetch(AutoTokenizer, "tokenizer")

    def _fetch(self, kind: Any, what: str) -> Any:
        if self.source is None:
            raise Error(f"processor = None: a model object without a checkpoint needs its {what} as well")
        try:
            if Path(self.source).is_dir():
                no_way_out(Path(self.source))
            return kind.from_pretrained(self.source, trust_remote_code=False)
        except Exception as problem:  # what these files hold is a stranger's; tokenizers raise plain Exception
            why = _told(problem)
            if "custom code" in why:  # whose advice is to trust it
                why = "it needs code of its own, and code in a checkpoint is never run"
            raise Error(f"model = {self.name!r}: has no {what} that can be loaded ({why})") from problem


def number_type(name: str | torch.dtype | None) -> torch.dtype | None:
    """`float32`, `bfloat16` or `float16` as a torch dtype; None stays None."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise Error(f"dtype = {name!r}: must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def place(name: str | torch.device) -> torch.device:
    """A device that is really there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        raise Error(f"device = {str(name)!r}: cannot be used here ({_told(problem)})") from problem
    return device


def load_model(
    name: str | PreTrainedModel,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    processor: Any = None,
) -> Loaded:
    """Loads a model for inference.

    Args:
        name: `lab:NAME`, a checkpoint folder (ordinary, or cut by `sparing prune`), a hub id, or a model object.
        device: to put it on.
        dtype: number type; None takes the checkpoint's own, float32 for the lab models.
        processor: processor or tokenizer; only needed beside a model object.
    """
    where, kind = place(device), number_type(dtype)
    if isinstance(name, PreTrainedModel):
        label = name.config.name_or_path or type(name).__name__
        nn.Module.to(name, where, kind)
        return Loaded(label, name, name.config.name_or_path or None, processor)
    source = name
    if name.startswith("lab:"):
        source, kind = str(lab.folder(name.removeprefix("lab:"))), kind or torch.float32
    elif os.path.lexists(folder := os.path.expanduser(name)) or name.startswith((".", "/", "~")):
        if not os.path.lexists(os.path.join(folder, "config.json")):
            raise Error(f"model = {name!r}: no checkpoint there (config.json is missing)")
        source = folder
    try:
        model = from_pretrained(source, dtype=kind or "auto")
    except Error:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as problem:
        raise Error(f"model = {name!r}: cannot be loaded ({_told(problem)})") from problem
    nn.Module.to(model, where)
    return Loaded(name, model.eval(), source, processor)


def _still(model: PreTrainedModel) -> Any:
    """The model's processor class for pictures alone: a part for videos cannot be made without torchvision.

    None where it has no such part, or one that others come after.
    """
    kind: Any = PROCESSOR_MAPPING.get(type(model.config), None)
    if kind is None or kind.get_attributes()[-1:] != ["video_processor"]:
        return None

    class Still(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in super().get_attributes() if part != "video_processor"]

        def save_pretrained(self, folder: Any, *args: Any, **options: Any) -> Any:
            """Also writes the file that the processor for videos is made from, where there is torchvision."""
            self.image_processor.save_pretrained(folder)
            return super().save_pretrained(folder, *args, **options)

    Still.__name__ = kind.__name__  # as which it is saved
    return Still


def _told(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__
