"""Whether a model can be scored on text at all: by what it does with a few tokens, not by its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparing.bench.models import Loaded
from sparing.engine.view import evaluating
from sparing.grid.method import Error

COLUMNS = 8  #: tokens of the two rows that are held against each other


@torch.no_grad()
def check_causal(loaded: Loaded) -> None:
    """Refuses a model whose words for one token depend on the tokens behind it, or that has no words.

    Two rows that begin alike and go on differently run in one pass. A decoder says the same at their first token; an
    encoder does not, so it would be scored on text that it has been shown.

    Raises:
        Error: names the model's class and what it did.
    """
    model, use = loaded.model, "text is scored with a decoder, such as an …ForCausalLM"
    where = f"model = {loaded.name!r}: {type(model).__name__}"
    words = int(getattr(model.config.get_text_config(), "vocab_size", 0))
    try:
        with evaluating(model):
            logits = model(input_ids=_rows(model.config, words).to(model.device)).logits
    except Exception as problem:  # whatever a stranger's forward raises without what else it needs
        told = (str(problem).splitlines() or [""])[0]
        raise Error(f"{where} cannot run on text alone ({type(problem).__name__}: {told}); {use}") from problem
    if tuple(logits.shape) != (2, COLUMNS, words):
        raise Error(
            f"{where} gives {tuple(logits.shape)} for two rows of {COLUMNS} tokens, and its vocabulary of {words} is "
            f"needed at each; {use}"
        )
    first = logits[:, 0].float()
    noise = max(1e-4, torch.finfo(logits.dtype).eps) * float(first.abs().max())
    if float((first[0] - first[1]).abs().max()) > noise:
        raise Error(
            f"{where} is not causal: what it says at a token changes with the tokens behind it, so it would be scored "
            f"on text that it has seen; {use}"
        )


def _rows(config: Any, words: int) -> Tensor:
    """(2, COLUMNS) ids, alike in the first column only; none of those with a meaning of their own, such as images."""
    said = {**config.get_text_config().to_dict(), **config.to_dict()}
    own = [value for key, value in said.items() if key.endswith(("token_id", "token_index"))]
    plain = [i for i in range(min(words, 64)) if i not in own]
    ids = torch.tensor(plain if len(plain) > 1 else range(2))
    columns = torch.arange(COLUMNS)
    return torch.stack([ids[columns % len(ids)], ids[(columns + (columns > 0)) % len(ids)]])
