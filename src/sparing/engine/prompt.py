"""What is prompt and what is generated: the one definition, for every way in which a model is run.

Columns are counted from the start of a sequence, padding and what a KV cache holds included. A column is prompt or
generated. Who says which, in this order:

1. `run.prompt`, where it is given: what stands behind the prompt is generated, in any pass, cached or not.
2. `generate`: what it was handed is prompt, a kept cache and earlier turns among it; what it adds is generated, the
   drafts of an assistant too. So chunks of a prompt, a question behind a kept prefix and a second turn are prompt.
3. A bare forward: without a past all columns are prompt; a single column behind a past is generated. Several columns
   behind a past may be either (a chunk, a further turn, drafts to verify): where a method cares, they are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparing.engine.calls import cache_in, named
from sparing.grid.method import Error


@dataclass
class Generation:
    """A call of `generate` that is running.

    Attributes:
        prompt: columns that it was handed.
        drafts: somebody proposes tokens, so that its first pass may hold generated ones.
        begun: a pass has run.
    """

    prompt: int
    drafts: bool
    begun: bool = False

    @classmethod
    def of(cls, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
        """Read off the call: the ids may be the whole sequence, or what follows the columns of a kept cache."""
        given = named(generate, args, kwargs)
        config = given.get("generation_config")
        looks_up = given.get("prompt_lookup_num_tokens", getattr(config, "prompt_lookup_num_tokens", None))
        helpers = (given.get("assistant_model"), given.get("assistant_early_exit"), looks_up)
        drafts = any(helper is not None for helper in helpers) or any("mtp" in name for name in given)
        embeds, ids = given.get("inputs_embeds"), given.get("input_ids")
        ids = given.get("inputs") if ids is None else ids
        if isinstance(embeds, Tensor):
            return cls(embeds.shape[1], drafts)
        if not isinstance(ids, Tensor):
            return cls(1, drafts)  # generate begins with <bos>
        _, cache = cache_in(given)
        past = cache.get_seq_length() if cache is not None else 0
        width, mask = ids.shape[1], given.get("attention_mask")
        whole = width > past if mask is None else mask.shape[-1] == width
        return cls(width if whole or not past else past + width, drafts)

    def check(self, past: int, width: int) -> None:
        """Refuses a first pass with more columns than were handed in: somebody expands the prompt on the way."""
        if not self.begun and not self.drafts and past + width > self.prompt:
            raise Error(
                f"generate: was handed {self.prompt} columns and its first pass has {past + width}: where the prompt "
                "ends cannot be told; say it with sparing.attach(…, prompt=N)"
            )
        self.begun = True


@dataclass(frozen=True)
class Columns:
    """Columns of one pass, `past .. past + width - 1` of their sequences, prompt or generated.

    Attributes:
        past, width, batch, device: of the pass.
        said: where the prompt ends: a column, one of each sequence (B,), bool (B, P) of prompt columns; None: unclear.
    """

    past: int
    width: int
    batch: int
    device: torch.device
    said: int | Tensor | None

    @functools.cached_property
    def generated(self) -> Tensor | bool:
        """True, False (all, none) or bool (B, T); False also where it is unclear."""
        if self.said is None:
            return False
        if isinstance(self.said, int):
            if self.past >= self.said or self.past + self.width <= self.said:
                return self.past >= self.said
            return (self._columns >= self.said).expand(self.batch, -1)
        said = self.said.to(self.device)
        if said.dtype != torch.bool:
            return self._columns >= said.reshape(-1, 1)
        if self.past >= said.shape[1]:
            return True
        here = ~said[:, self.past : self.past + self.width]
        behind = here.new_ones(len(here), self.width - here.shape[1])
        return torch.cat([here, behind], 1).expand(self.batch, -1)

    @functools.cached_property
    def start(self) -> int | Tensor:
        """First generated column, one number or (B,); behind the pass where it generates nothing."""
        end = self.past + self.width
        if self.said is None:
            return end
        if isinstance(self.said, int):
            return self.said
        if self.said.dtype != torch.bool:
            return self.said.to(self.device)
        behind = ~self.said.to(self.device)
        first_B = torch.where(behind.any(1), behind.int().argmax(1), behind.shape[1])
        return first_B.expand(self.batch)

    @functools.cached_property
    def step(self) -> Tensor:
        """(B, T) long: generated tokens of the same answer before each column, below 0 in the prompt."""
        start = self.start
        step = (self._columns - (start[:, None] if isinstance(start, Tensor) else start)).expand(self.batch, -1)
        if not isinstance(self.said, Tensor) or self.said.dtype != torch.bool:
            return step
        said = self.said.to(self.device)  # which may hold several answers
        full = torch.cat([said, said.new_zeros(len(said), max(0, self.past + self.width - said.shape[1]))], 1)
        columns = torch.arange(full.shape[1], device=self.device)
        last = torch.where(full, columns, -1).cummax(1).values
        here = slice(self.past, self.past + self.width)
        return torch.where(full[:, here], step.clamp(max=-1), (columns - last - 1)[:, here])

    @property
    def mixed(self) -> bool:
        """Whether the pass may hold both."""
        return isinstance(self.generated, Tensor)

    @property
    def ends_prompt(self) -> bool:
        """Whether no prompt follows in a later pass, as far as is known."""
        return not isinstance(self.said, int) or self.past + self.width >= self.said

    @functools.cached_property
    def _columns(self) -> Tensor:
        return self.past + torch.arange(self.width, device=self.device)


def said(
    prompt: int | Tensor | None, generation: Generation | None, past: int, width: int, start: int | Tensor | None
) -> int | Tensor | None:
    """Where the prompt of a pass ends, by the rules above; None where nobody can tell.

    Args:
        prompt: `run.prompt`.
        generation: the call of `generate` around the pass.
        past, width: of the pass.
        start: first generated column that an earlier pass of these sequences noted.
    """
    if prompt is not None:
        return prompt
    if generation is not None:
        return generation.prompt
    if not past:
        return width
    if width == 1:
        return past if start is None else start
    return None
