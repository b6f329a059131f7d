"""Which checks there are, on which method and model each of them runs, and what came of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sparing.engine.view import View
from sparing.engine.widths import cannot_cut
from sparing.grid.lists import listed
from sparing.grid.method import Card, Error, Method, get, methods, parse
from sparing.testing.models import ARCHITECTURES, VISUAL, build, prompt
from sparing.testing.settings import BUDGETS

KEEP = {"full": 1.0, "mid": 0.75, "cut": 0.5}  # budgets that a check may ask for
Budgets = Mapping[str, str]  # "full", "mid", "cut" -> a method as text, where `at` cannot give it


class CheckFailed(AssertionError):
    """A method does not do what the check asks for; the message says what was seen and what was expected."""


def expect(holds: object, seen: str) -> None:
    """Fails the check with what was seen unless it holds."""
    if not bool(holds):
        raise CheckFailed(seen)


@dataclass(frozen=True)
class Check:
    """One property of a method.

    Attributes:
        name: as it is reported.
        run: raises CheckFailed, or anything else that goes wrong on the way.
        applies: whether a method with this Card has the property.
        refused: the check is for models that the method cannot work on.
    """

    name: str
    run: Callable[[Subject], None]
    applies: Callable[[Card], bool]
    refused: bool = False


CHECKS: dict[str, Check] = {}


def check(name: str, applies: Callable[[Card], bool] = lambda card: True, *, refused: bool = False) -> Any:
    """Decorator: add a check to the suite."""

    def add(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CHECKS[name] = Check(name, run, applies, refused)
        return run

    return add


# --------------------------------------------------------------------------- what is checked


@functools.cache
def _state(method: Any, architecture: str) -> tuple[tuple[str, Tensor], ...]:
    """What a method with these fields learns on the tiny model, once for all checks."""
    torch.manual_seed(0)
    fitted = method.fit(build(architecture), fitting_data(architecture))
    return tuple(fitted.state.items())


def fitting_data(architecture: str) -> list[dict[str, Tensor]]:
    """Two batches of four prompts of equal length, the second half of the text labelled."""
    out = []
    for seed in (5, 6):
        batch = prompt(architecture, (9, 9, 9, 9), side="none", seed=seed)
        labels = batch["input_ids"].clone()
        labels[:, :-4] = -100
        out.append({**batch, "labels": labels})
    return out


@dataclass
class Subject:
    """A method and a tiny model of its own for one check.

    Attributes:
        method: the class.
        architecture: of the model.
        budgets: methods as text, where `at` cannot give them.
    """

    method: type[Method]
    architecture: str
    budgets: Budgets = field(default_factory=dict)

    @property
    def card(self) -> Card:
        return self.method.card

    @functools.cached_property
    def model(self) -> Any:
        """In evaluation mode, float32; nobody else has it."""
        return build(self.architecture)

    def at(self, budget: str = "cut") -> Method:
        """The method at "full", "mid" or "cut", ready to run on `model`."""
        base = self._given(self.budgets[budget]) if budget in self.budgets else self._spread(KEEP[budget])
        return base if base.state else self._fitted(base)

    def needs_state(self, method: Method) -> bool:
        """Whether it has to be fitted before it runs."""
        return not method.ready or method.card.needs != "nothing"

    def _given(self, text: str) -> Method:
        found = parse(text)
        if type(found) is not self.method:
            raise Error(f"budgets: {text!r} is not {self.method.name}")
        return found

    def _spread(self, keep: float) -> Method:
        base = self._given(self.budgets["fit"]) if "fit" in self.budgets else self.method()
        if not self.card.fits_budget:
            base = self._fitted(base)
        return base.at(keep, View(self.model).shape)

    def _fitted(self, base: Method) -> Method:
        """With what it learns: at this budget if the fit belongs to one, else once for all."""
        if not self.needs_state(base):
            return base
        learner = base if self.card.fits_budget else self.method()
        if "fit" in self.budgets and not self.card.fits_budget:
            learner = self._given(self.budgets["fit"])
        return base.with_state(dict(_state(cast(Any, learner), self.architecture)))

    def attach(self, method: Method, **options: Any) -> Any:
        """`sparing.attach`, with a truth for the oracle."""
        from sparing.engine.attach import attach

        run = attach(self.model, method, warn=False, **options)  # a method without effect is for a check to say
        run.oracle = torch.arange(VISUAL) % 3
        return run

    def prompt(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """A batch for `model`."""
        return prompt(self.architecture, *args, **kwargs)


def cannot(card: Card, architecture: str) -> str | None:
    """Why a method of this Card has nothing to work on in a model of that architecture; None if it has.

    Read off the structure of the model, so that a method may not excuse itself.
    """
    view = View(build(architecture))
    if card.visual and view.image_token_id is None:
        return "works on visual tokens, the model reads text only"
    if card.axis == "experts" and not any(layer.experts for layer in view.layers):
        return "works on experts, the model has none"
    if card.requires:
        return view.lacks(card.requires)
    if card.axis == "width" and not all(layer.groups and layer.neurons for layer in view.layers):
        return "cuts KV groups and neurons, the model's projections do not fall apart into them"
    if card.axis == "width":
        return cannot_cut(view, "both")
    return None


# --------------------------------------------------------------------------- cases and their results


@dataclass(frozen=True)
class Case:
    """One check of one method on one architecture.

    Attributes:
        method, architecture, check: what.
        budgets: see `cases`.
        reason: why the method cannot work there, for the check that it says so.
    """

    method: type[Method]
    architecture: str
    check: Check
    budgets: Budgets = field(default_factory=dict, hash=False)
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.method.name}-{self.architecture}-{self.check.name}"

    def run(self) -> None:
        """Runs the check in this process.

        Raises:
            CheckFailed: the method does not pass.
        """
        torch.manual_seed(0)
        self.check.run(Subject(self.method, self.architecture, self.budgets))


@dataclass(frozen=True)
class Result:
    """What came of some cases.

    Attributes:
        passed: cases that hold.
        refused: cases in which the method said why it cannot work, as it should.
        failed: case -> what was seen.
        seconds: they took.
    """

    passed: tuple[Case, ...]
    refused: tuple[Case, ...]
    failed: Mapping[Case, str]
    seconds: float

    def __str__(self) -> str:
        total = len(self.passed) + len(self.refused) + len(self.failed)
        lines = [f"FAILED {case}: {seen}" for case, seen in self.failed.items()]
        reasons = sorted({(c.method.name, c.architecture, c.reason or "") for c in self.refused})
        lines += [f"refused {method} on {architecture}: {reason}" for method, architecture, reason in reasons]
        lines.append(
            f"{total} cases in {self.seconds:.0f} s: {len(self.passed)} passed, {len(self.refused)} refused as they "
            f"should, {len(self.failed)} failed, 0 skipped"
        )
        return "\n".join(lines)


def cases(
    names: str | type[Method] | Iterable[str | type[Method]] | None = None,
    architectures: str | Sequence[str] = ARCHITECTURES,
    checks: str | Sequence[str] | None = None,
    *,
    budgets: Mapping[str, Budgets] | None = None,
) -> list[Case]:
    """All cases of the suite, none left out: what a method cannot work on is a case of the check `refusal`.

    Args:
        names: registered methods, or classes, one or several; default every registered one.
        architectures: one or several of `sparing.testing.ARCHITECTURES`.
        checks: names of checks, one or several; default all that the Card calls for.
        budgets: method name, or "method architecture" -> {"full": text, "mid": text, "cut": text}, for methods whose
            `at` cannot spread a budget over six layers, or to check other settings than the defaults; "fit": text
            is for settings that make fitting short. Added to those of `sparing.testing.settings`.

    Raises:
        Error: an unknown method, architecture or check.
    """
    import sparing.testing.checks  # noqa: F401  they register themselves

    architectures, checks = listed(architectures), None if checks is None else listed(checks)
    for what, given, known in (("architectures", architectures, ARCHITECTURES), ("checks", checks or (), CHECKS)):
        for name in given:
            if name not in known:
                raise Error(f"{what} = {name!r}: must be among {', '.join(known)}")
    known_budgets: dict[str, Budgets] = {**BUDGETS, **(budgets or {})}
    found = []
    for item in methods() if names is None else listed(names):
        method = get(item) if isinstance(item, str) else item
        for architecture in architectures:
            reason = cannot(method.card, architecture)
            own = known_budgets.get(f"{method.name} {architecture}", known_budgets.get(method.name, {}))
            for one in CHECKS.values():
                wanted = (checks is None or one.name in checks) and one.applies(method.card)
                if wanted and one.refused == (reason is not None):
                    found.append(Case(method, architecture, one, own, reason))
    return found


def run(some: Sequence[Case], *, progress: bool = True) -> Result:
    """Runs cases one after the other; a failure does not stop the others."""
    passed: list[Case] = []
    refused: list[Case] = []
    failed: dict[Case, str] = {}
    start = time.perf_counter()
    bar = tqdm(some, disable=not progress, unit="case")
    for case in bar:
        bar.set_postfix_str(str(case), refresh=False)
        try:
            case.run()
        except Exception as problem:
            failed[case] = f"{type(problem).__name__}: {problem}".splitlines()[0]
        else:
            (refused if case.reason else passed).append(case)
    return Result(tuple(passed), tuple(refused), failed, time.perf_counter() - start)


def check_method(
    method: str | type[Method],
    architectures: str | Sequence[str] = ARCHITECTURES,
    checks: str | Sequence[str] | None = None,
    *,
    budgets: Budgets | None = None,
    progress: bool = False,
) -> Result:
    """Runs the whole suite on one method.

    Args:
        method: a registered name, or a Method class with `name` and `card`.
        architectures: default all.
        checks: names of checks; default all that the Card calls for.
        budgets: {"full": text, "mid": text, "cut": text}, see `cases`.
        progress: show a bar.

    Returns:
        What passed, what was refused as it should, and what failed with the reason; as text a report.
    """
    name = method if isinstance(method, str) else method.name
    given = None if budgets is None else {name: budgets}
    return run(cases([method], architectures, checks, budgets=given), progress=progress)
