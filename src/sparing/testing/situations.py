"""Ways in which people run a model, each held against plain cached generation: the same tokens, or words of refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparing.engine.attach import attach
from sparing.engine.calls import cache_in, with_cache
from sparing.grid.method import Error, Method
from sparing.testing.models import IMAGE, VISION, VISUAL, VOCAB, build, prompt

TOKENS = 6


class Differs(Exception):
    """Other tokens than in plain cached generation."""


def _settings(architecture: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
    if architecture in VISION:  # a random model might write an image token
        settings["suppress_tokens"] = [IMAGE, VOCAB - 1, VOCAB - 3]
    return settings


def _attached(model: Any, method: Method, **options: Any) -> Any:
    run = attach(model, method, warn=False, **options)
    run.oracle = torch.arange(VISUAL) % 3
    return run


def _plain(model: Any, method: Method, batch: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    with _attached(model, method):
        return model.generate(**batch, **settings)


def _same(found: Tensor, wanted: Tensor) -> None:
    if not torch.equal(found, wanted):
        raise Differs(f"{found.tolist()} and plain {wanted.tolist()}")


def chunks(model: Any, method: Method, architecture: str) -> None:
    """`generate(prefill_chunk_size=4)`; a picture goes in with the model's own embeddings, which chunks cannot have."""
    batch, settings = prompt(architecture, (9, 9), side="none"), _settings(architecture)
    if architecture in VISION:
        batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] != IMAGE, 7)
    wanted = _plain(model, method, batch, settings)
    with _attached(model, method):
        _same(model.generate(**batch, prefill_chunk_size=4, **settings), wanted)


def prefix(model: Any, method: Method, architecture: str) -> None:
    """A prefix of the prompt in a kept cache, filled under the method, of which a copy is handed to `generate`."""
    batch, settings = prompt(architecture, (9, 9), side="none"), _settings(architecture)
    wanted = _plain(model, method, batch, settings)
    kept = 21 if architecture in VISION else 5  # behind the picture
    with _attached(model, method), torch.no_grad():
        first = {k: v[:, :kept] if v.shape[:2] == batch["input_ids"].shape else v for k, v in batch.items()}
        out = model(**first, use_cache=True)
        rest = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in batch:
            rest["mm_token_type_ids"] = batch["mm_token_type_ids"]
        _same(model.generate(**rest, **with_cache(model, copy.deepcopy(cache_in(out)[1])), **settings), wanted)


def second_turn(model: Any, method: Method, architecture: str) -> None:
    """A question behind a first answer and its cache: as one pass in which both questions are prompt says it."""
    batch, settings = prompt(architecture, (9, 9), side="none"), _settings(architecture)
    question = prompt("llama", (4, 4), side="none", seed=3)["input_ids"]
    with _attached(model, method) as run:
        first = model.generate(**batch, return_dict_in_generate=True, **settings)
        if method.card.visual:  # the first picture stays as its question ranked it
            run.trace.reset()
            _second_picture(model, run, first, architecture, settings)
            return
        turn = torch.cat([first.sequences, question], 1)
        asked = {"input_ids": turn, "attention_mask": torch.ones_like(turn), **with_cache(model, cache_in(first)[1])}
        if architecture in VISION:
            asked |= {"mm_token_type_ids": torch.zeros_like(turn).int()} if "mm_token_type_ids" in batch else {}
        second = model.generate(**asked, return_dict_in_generate=True, output_logits=True, **settings)
        width, end = batch["input_ids"].shape[1], first.sequences.shape[1]
        is_prompt = torch.ones_like(second.sequences, dtype=torch.bool)
        is_prompt[:, width : end - 1] = False  # the last token was said and not yet read: the second call hands it in
        is_prompt[:, turn.shape[1] :] = False
        run.prompt = is_prompt
        full = {**batch, "input_ids": second.sequences, "attention_mask": torch.ones_like(second.sequences)}
        if "mm_token_type_ids" in batch:
            full["mm_token_type_ids"] = (second.sequences == IMAGE).int()
        with torch.no_grad():
            again = model(**full).logits[:, turn.shape[1] - 1 : -1].argmax(-1)
    _same(second.sequences[:, turn.shape[1] :], again)


def _second_picture(model: Any, run: Any, first: Any, architecture: str, settings: dict[str, Any]) -> None:
    """A second picture is thinned like the first."""
    another = prompt(architecture, (4, 4), side="none", seed=5)
    turn = torch.cat([first.sequences, another["input_ids"]], 1)
    asked = {**another, "input_ids": turn, "attention_mask": torch.ones_like(turn)}
    if "mm_token_type_ids" in another:
        asked["mm_token_type_ids"] = torch.cat(
            [torch.zeros_like(first.sequences).int(), another["mm_token_type_ids"]], 1
        )
        asked.pop("mm_token_type_ids" if architecture == "llava" else "", None)
    model.generate(**asked, **with_cache(model, cache_in(first)[1]), **settings)
    if not run.trace.cells or not run.trace.cells[0].visual or run.trace.share("tokens") == 1:
        raise Differs("the second picture runs whole")


def uncached(model: Any, method: Method, architecture: str) -> None:
    """`generate(use_cache=False)`."""
    batch, settings = prompt(architecture), _settings(architecture)
    wanted = _plain(model, method, batch, settings)
    with _attached(model, method):
        _same(model.generate(**batch, use_cache=False, **settings), wanted)


def assisted(model: Any, method: Method, architecture: str) -> None:
    """Assisted decoding and prompt lookup, the method on the model that verifies."""
    batch, settings = prompt(architecture, (9,), side="none"), _settings(architecture)
    wanted = _plain(model, method, batch, settings)
    with _attached(model, method):
        _same(model.generate(**batch, prompt_lookup_num_tokens=2, **settings), wanted)
        if architecture not in VISION:
            _same(model.generate(**batch, assistant_model=build(architecture), **settings), wanted)


def told(model: Any, method: Method, architecture: str) -> None:
    """`attach(…, prompt=N)` with the N that is true anyway."""
    batch, settings = prompt(architecture), _settings(architecture)
    wanted = _plain(model, method, batch, settings)
    with _attached(model, method, prompt=batch["input_ids"].shape[1]):
        _same(model.generate(**batch, **settings), wanted)
        _same(model.generate(**batch, use_cache=False, **settings), wanted)


SITUATIONS: dict[str, Callable[[Any, Method, str], None]] = {
    "chunks": chunks,
    "kept prefix": prefix,
    "second turn": second_turn,
    "uncached": uncached,
    "assisted": assisted,
    "prompt=N": told,
}


def outcome(situation: str, model: Any, method: Method, architecture: str) -> str:
    """ "equal", or "refused: …" with the words; raises Differs, or whatever else went wrong."""
    try:
        SITUATIONS[situation](model, method, architecture)
    except Error as refusal:
        return f"refused: {refusal}"
    return "equal"
