"""Every text task that EleutherAI's lm-eval knows, and tasks of one's own in its YAML files: `--task lm-eval:NAME`.

    task = parse("lm-eval:hellaswag", load_model("lab:lm"))
    with attach(model, method) as run:
        task.evaluate(model, run, limit=200)

lm-eval makes the prompts and counts the answers. The model that it asks is its own `HFLM`, told to use the live model
(dense, cut, or with methods attached) and not to load one. It is handed over as an object: lm-eval 0.4.13 takes the
names of models from a fixed table in `lm_eval/models/__init__.py` and looks for no entry points, so there can be no
`lm_eval --model sparing`. `language_model` gives the same object to those who call `lm_eval.simple_evaluate`.

A choice is scored in one pass over context and continuation. An attached method is told, for every row, that the
context is the prompt, so the pass equals a prefill and cached decoding of the continuation; the first token of the
continuation is read off the prompt's last row. With methods attached only rows of equal length share a pass: nothing is
padded, no decision sees padding, and the trace counts none. Generation goes through `generate`.
"""

from __future__ import annotations

import copy
import difflib
import functools
import io
import itertools
import logging
import math
import os
import random
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager, redirect_stdout
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from sparing.bench.causal import check_causal
from sparing.bench.models import Loaded
from sparing.bench.tasks import Batch, Progress, Run, Task, check_enough, text_batches
from sparing.bench.timing import STEPS, takes
from sparing.grid.method import Error

SEED = 1234  #: of few-shot examples and of sampled answers, lm-eval's own
BOOTSTRAP = 100  #: draws for the standard error of a metric that has no formula for it
PROMPTS = 4  #: documents whose prompts are timed

Row = tuple[tuple[int, ...], tuple[int, ...]]  #: tokens of a context, and of a continuation without its last one


class Harness(Task):
    """One task of lm-eval: a name from its catalogue, or a YAML file in its format.

    The metric is the first that the task lists, after the first of its filters; where that filter is not lm-eval's
    `none` it is part of the name, as in `exact_match,strict-match`. The other metrics and the standard errors are
    `details`. A standard error without a formula comes from 100 bootstrap draws, where lm-eval takes 100,000. Settings
    are the task's own: its number of examples in the prompt, no chat template.

    With `limit`, the first documents are taken, as lm-eval does it. Progress is counted in requests: a document of a
    multiple-choice task is as many as it has choices.

    Paths in a YAML file count from its folder; what is not there is looked for from the working directory. Nothing is
    downloaded for it unless its data set is a name on the hub.

    Args:
        loaded: model with its tokenizer.
        task: name, or path that ends in .yaml or .yml.
        calibration: text to fit on.
        name: the task's name.
        batch: requests a forward pass.
    """

    def __init__(
        self, loaded: Loaded, task: str, *, calibration: str | None = None, name: str | None = None, batch: int = 4
    ) -> None:
        self.name = name or f"lm-eval:{task}"
        self._loaded, self._calibration = loaded, calibration
        self.calibrates = calibration is not None
        if calibration is not None:
            check_enough(loaded, calibration, f"task = {self.name!r}: the calibration text has")
        check_causal(loaded)
        with _silent(), _seeded():
            _installed(self.name)
            self._task = _local(self.name, Path(task).expanduser()) if _is_file(task) else _known(self.name, task)
            self._lm = _scorer()(loaded.model, loaded.tokenizer, batch)
        if self._task.get_config("num_fewshot") is None:
            self._task.set_config(key="num_fewshot", value=0)
        filters = getattr(self._task.config, "filter_list", None)
        first = next(iter(self._task.aggregation()), None)
        higher = self._task.higher_is_better().get(first)
        if first is None or higher is None:
            raise Error(f"task = {self.name!r}: its metric {first} does not say whether higher is better")
        self.metric = _label(first, filters[0]["name"] if filters else "none")
        self.higher_is_better = bool(higher)
        self._found: tuple[float, int | None, dict[str, float]] | None = None

    def evaluate(
        self, model: nn.Module, run: Run | None = None, limit: int | None = None, progress: Progress | None = None
    ) -> float:
        shown = sys.stdout

        def tell(done: int, total: int) -> None:
            assert progress is not None
            with redirect_stdout(shown):
                progress(done, total)

        with _silent(), _seeded(), self._lm.asking(model, run, tell if progress else None):
            from lm_eval import evaluate  # late, as it draws random numbers; so does the next line

            name = self._task.task_name
            self._task.set_fewshot_seed(seed=SEED)
            found = evaluate(
                lm=self._lm,
                task_dict={name: self._task},
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
            )
        scores = {
            _label(*key.split(",", 1)): float(value)
            for key, value in found["results"][name].items()
            if "," in key and isinstance(value, Real)
        }
        # a task may name its metrics differently in its results; its first result is its metric then
        quality = scores.pop(self.metric if self.metric in scores else next(iter(scores), self.metric), math.nan)
        self._found = quality, limit, {key: value for key, value in scores.items() if math.isfinite(value)}
        return quality

    def details(self, quality: float, limit: int | None = None) -> dict[str, float]:
        """The other metrics and the standard errors of the last evaluation, if that was the one."""
        return dict(self._found[2]) if self._found and self._found[:2] == (quality, limit) else {}

    def inputs(self) -> Batch:
        """The prompts of the first documents, four at most, padded on the left; of running text its first half."""
        rows = self._prompts(PROMPTS)
        side: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
        device = self._loaded.model.device
        return {
            "input_ids": pad_sequence(rows, padding_value=self._lm.tokenizer.pad_token_id, **side).to(device),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], **side).to(device),
        }

    def sized(self, context: int, batch: int) -> Batch:
        """Prompts of documents one behind the other, beginning at places evenly spread over them, and over again."""
        if context < 1:
            raise Error(f"context = {context}: must be at least 1")
        ids = torch.cat(self._prompts(PROMPTS * batch))
        begins = torch.arange(batch)[:, None] * len(ids) // batch
        return {"input_ids": ids[(begins + torch.arange(context)) % len(ids)].to(self._loaded.model.device)}

    def _prompts(self, documents: int) -> list[torch.Tensor]:
        """(T,) token ids of the prompts of the first documents."""
        with _silent(), _seeded():
            self._task.set_fewshot_seed(seed=SEED)
            self._task.build_all_requests(limit=documents, rank=0, world_size=1)
        first: dict[int, Any] = {}
        for request in self._task.instances:
            first.setdefault(request.doc_id, request)
        return [self._lm.prompt(request, self._lm.max_length - STEPS) for request in first.values()]

    def batches(self, n: int) -> Iterator[Batch]:
        """Batches of 8 pieces of 512 tokens, evenly from the calibration text; see `text_batches`."""
        if self._calibration is None:
            raise Error(f"task = {self.name!r}: fitting needs other text; write {self.name},calibration=FILE")
        return text_batches(self._loaded, self._calibration, n)


def language_model(loaded: Loaded, run: Run | None = None, *, batch: int = 4) -> Any:
    """The live model as lm-eval's model object, for what a `Harness` does not do: groups, many tasks, other settings.

        with attach(loaded.model, method, warn=False) as run:
            lm_eval.simple_evaluate(model=language_model(loaded, run), tasks=["mmlu"])

    Args:
        loaded: model with its tokenizer.
        run: what `attach` gave.
        batch: requests a forward pass.
    """
    with _silent(), _seeded():
        _installed("lm-eval")
        return _scorer()(loaded.model, loaded.tokenizer, batch, run)


# ------------------------------------------------------------------------------------------------- the model it asks


@functools.cache
def _scorer() -> Any:
    """The class of the model that lm-eval asks; made late, because lm-eval need not be installed."""
    from lm_eval.models.huggingface import HFLM

    class Scorer(HFLM):
        """`HFLM` on a live model, which it leaves as it is, with the prompt of every row told to attached methods."""

        def __init__(self, model: Any, tokenizer: Any, batch: int, run: Run | None = None) -> None:
            # HFLM ties the weights of a model and changes its mode, and gives a tokenizer a padding token: here it
            # sees neither of the user's own.
            outside: Any = SimpleNamespace(config=model.config, device=model.device)
            super().__init__(pretrained=outside, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch)
            self._tell: Progress | None = None
            self._use(model, run, None)

        def _use(self, model: Any, run: Run | None, tell: Progress | None) -> None:
            self._model, self._config, self._device = model, model.config, model.device
            self._run, self._tell, self._done, self._total = run, tell, 0, 0

        @contextmanager
        def asking(self, model: Any, run: Run | None, tell: Progress | None) -> Iterator[None]:
            """Another model for the time of a `with` block."""
            before = self._model, self._run, self._tell
            self._use(model, run, tell)
            try:
                yield
            finally:
                self._use(*before)

        @contextmanager
        def _verb(self, requests: int) -> Iterator[None]:
            """Around a kind of request: how many there are, and the run's own prompt back afterwards."""
            self._total += requests
            before = None if self._run is None else self._run.prompt
            try:
                if self._run is not None:
                    self._run.prompt = None
                yield
            finally:
                if self._run is not None:
                    self._run.prompt = before

        def _advance(self, requests: int) -> None:
            self._done = min(self._done + requests, self._total)
            if self._tell:
                self._tell(self._done, self._total)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self._verb(len(requests)):
                return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            windows = sum(math.ceil(len(self.tok_encode(r.args[0])) / self.max_length) for r in requests)
            with self._verb(windows):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self._verb(len(requests)):
                return super().generate_until(requests, disable_tqdm=True)

        def _model_generate(self, context: Any, *args: Any, **options: Any) -> Any:
            out = super()._model_generate(context, *args, **options)
            self._advance(len(context))
            return out

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            """Sum of log-probabilities of every continuation, and whether it is the greedy one.

            Continuations that differ in their last token only share a row. Longest rows first.
            """
            shared: dict[Row, list[int]] = {}
            for index, (_, context, continuation) in enumerate(requests):
                shared.setdefault((tuple(context), tuple(continuation[:-1])), []).append(index)
            rows = sorted(shared, key=lambda row: (-len(row[0]) - len(row[1]), row))
            answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
            for group in self._together(rows):
                for row, scores_CV in zip(group, self._scores(group), strict=True):
                    greedy = scores_CV.argmax(-1)
                    for index in shared[row]:
                        wanted = torch.tensor(requests[index][2], device=greedy.device)
                        said = scores_CV.gather(1, wanted[:, None]).sum()
                        answers[index] = float(said), bool((greedy == wanted).all())
                self._advance(sum(len(shared[row]) for row in group))
            return answers

        def _together(self, rows: list[Row]) -> Iterator[list[Row]]:
            """Rows that share a pass: of any length for a model alone, of the same with methods attached."""
            alone = self._run is None
            for _, alike in itertools.groupby(rows, lambda row: 0 if alone else len(row[0]) + len(row[1])):
                group = list(alike)
                for start in range(0, len(group), self.batch_size):
                    yield group[start : start + self.batch_size]

        @torch.no_grad()
        def _scores(self, rows: list[Row]) -> list[torch.Tensor]:
            """(C, V) log-probabilities at the continuation of every row, its last token included."""
            ids = [torch.tensor((*row[0], *row[1])[-self.max_length :]) for row in rows]
            lengths = [len(row) for row in ids]
            prompts = [length - len(row[1]) for length, row in zip(lengths, rows, strict=True)]
            ids_BT = pad_sequence(ids, batch_first=True).to(self.device)  # causal: what is padded changes nothing
            width = ids_BT.shape[1]
            options: dict[str, Any] = {}
            if self._run is not None:
                self._run.prompt = torch.tensor(prompts, device=self.device)
            if takes(self.model, "logits_to_keep"):
                options["logits_to_keep"] = width - min(prompts) + 1
            logits_BSV = self.model(input_ids=ids_BT, use_cache=False, **options).logits
            before = width - logits_BSV.shape[1]
            return [
                F.log_softmax(row[prompt - 1 - before : length - before], -1, dtype=self.softmax_dtype)
                for row, prompt, length in zip(logits_BSV, prompts, lengths, strict=True)
            ]

        def prompt(self, request: Any, most: int) -> torch.Tensor:
            """(T,) token ids of a request's prompt, its last `most` ones."""
            ids = self.tok_encode(request.args[0]) if request.args[0] else []
            if request.request_type == "loglikelihood_rolling":
                ids = ids[: min(len(ids), self.max_length) // 2]
            return torch.tensor((ids or [self.prefix_token_id])[-max(1, most) :])

        def get_model_info(self) -> dict[str, Any]:
            """Nothing: what lm-eval would say here it asks the hub for."""
            return {}

    return Scorer


# ---------------------------------------------------------------------------------------------------------- the task


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _installed(name: str) -> None:
    """Says what to install where lm-eval is missing."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as problem:
        raise Error(f'task = {name!r}: needs lm-eval ({problem}); pip install "sparing[lm-eval]"') from problem


@functools.cache
def _catalogue() -> Any:
    """All that lm-eval brings; reading its files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _known(name: str, task: str) -> Any:
    """A task of lm-eval's catalogue."""
    catalogue = _catalogue()
    if task not in catalogue.all_subtasks:
        if task in catalogue.all_tasks:
            members = [other for other in catalogue.all_subtasks if other.startswith(task)]
            some = f", such as {', '.join(members[:3])}" if members else ""
            raise Error(f"task = {name!r}: is a group of tasks; name one task{some}")
        near = difflib.get_close_matches(task, catalogue.all_subtasks, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
        raise Error(f"task = {name!r}: lm-eval has no task of that name; {hint}")
    return _made(name, catalogue, task)


def _local(name: str, path: Path) -> Any:
    """The task of a YAML file."""
    from lm_eval.tasks import TaskManager

    if not path.is_file():
        raise Error(f"task = {name!r}: there is no such file")
    path, catalogue = path.absolute(), TaskManager(include_defaults=False)
    try:
        with chdir(path.parent):
            return _made(name, catalogue, str(path))
    except Error as problem:
        if not isinstance(problem.__cause__, FileNotFoundError):
            raise
        try:
            return _made(name, catalogue, str(path))
        except Error:
            raise problem from problem.__cause__


def _made(name: str, catalogue: Any, task: str) -> Any:
    """What lm-eval makes of a task, with everything that can go wrong in one line."""
    try:
        made = list(catalogue.load([task])["tasks"].values())
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark
        said = f"not YAML ({problem.problem or problem.context})"
        raise Error(f"task = {name!r}: {_at(task, mark.name, mark.line + 1) if mark else ''}{said}") from problem
    except Exception as problem:  # of task files, data sets and the code that tasks bring along
        if _unreachable(problem):
            raise Error(
                f"task = {name!r}: its data set has to be downloaded and cannot be reached ({_line(problem)})"
            ) from problem
        raise Error(f"task = {name!r}: {_place(task, problem)}cannot be made ({_line(problem)})") from problem
    if len(made) != 1:
        raise Error(f"task = {name!r}: is a group of {len(made)} tasks; name one task")
    # lm-eval passes over a metric that it does not know
    scored = {} if made[0].get_config("process_results") else getattr(made[0], "_metric_fn_list", {})
    for metric in [metric for metric, function in scored.items() if function is None]:
        where = _place(task, Error(f"'{metric}'"))
        raise Error(
            f"task = {name!r}: {where}lm-eval knows no metric {metric}, nor does the hub as far as it can be reached"
        )
    if getattr(made[0], "UNSAFE_CODE", False):
        raise Error(f"task = {name!r}: runs code that the model writes; use lm-eval itself, in a sandbox")
    if getattr(made[0], "MULTIMODAL", False):
        raise Error(
            f"task = {name!r}: asks about pictures or sound; only text tasks can be run, for pictures see vqa:FILE"
        )
    return made[0]


def _unreachable(problem: BaseException | None) -> bool:
    """Whether the network is at fault, here or in what led here."""
    while problem is not None:
        home = type(problem).__module__.partition(".")[0]
        if isinstance(problem, (ConnectionError, TimeoutError)) or (
            home in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "huggingface_hub", "aiohttp")
        ):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def _at(task: str, file: str, line: int) -> str:
    """A place in a task's file, or in one that it includes."""
    other = Path(file).name != Path(task).name
    return f"{file}, line {line}: " if other else f"line {line}: "


def _place(task: str, problem: BaseException) -> str:
    """The line of the word that an error speaks of, as far as that can be told."""
    if not _is_file(task):
        return ""
    lines = Path(task).read_text(encoding="utf-8", errors="replace").splitlines()
    for word in re.findall(r"'([\w.]+)'", str(problem)):
        for number, line in enumerate(lines, 1):
            if re.search(rf"\b{re.escape(word)}\b", line):
                return _at(task, task, number)
    return ""


def _line(problem: BaseException) -> str:
    """An error in one line, with what caused it."""
    parts = []
    for part in (problem, problem.__cause__):
        if part is not None:
            text = str(part.args[0]) if isinstance(part, KeyError) and part.args else str(part)
            parts.append(f"{type(part).__name__}: {text.strip()}".strip().splitlines()[0].rstrip(": "))
    return "; ".join(parts)


def _label(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"


# ------------------------------------------------------------------------------------------------------------ quiet


@contextmanager
def _seeded() -> Iterator[None]:
    """The seeds that lm-eval sets, here for the time of a `with` block only; and no processes of its own."""
    drawn, drawn_by_numpy, alone = random.getstate(), np.random.get_state(), os.environ.get("DISABLE_MULTIPROC")
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        os.environ["DISABLE_MULTIPROC"] = "1"
        try:
            yield
        finally:
            random.setstate(drawn)
            np.random.set_state(drawn_by_numpy)
            os.environ.pop("DISABLE_MULTIPROC")
            if alone is not None:
                os.environ["DISABLE_MULTIPROC"] = alone


@contextmanager
def _silent() -> Iterator[None]:
    """No bars, prints, logs and warnings of lm-eval and of what it calls."""
    make = tqdm.__init__

    def unseen(bar: Any, *args: Any, **options: Any) -> None:
        make(bar, *args, **{**options, "disable": True})

    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("lm_eval", "datasets", "evaluate", "huggingface_hub", "transformers", "httpx", "absl"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        stack.callback(setattr, tqdm, "__init__", make)
        tqdm.__init__ = unseen  # type: ignore[method-assign,assignment]
        yield
