"""What quality is measured on: `ppl`, `find-digit`, `vqa`, each with its data, inputs to time and batches to fit on.

    task = parse("ppl:notes.txt", load_model("lab:lm"))
    with attach(model, method) as run:
        task.evaluate(model, run)

An evaluation depends on nothing but the model, the method and the task: it may be repeated at any time, in any process,
and gives the same number.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from sparing.bench.causal import check_causal
from sparing.bench.models import Loaded
from sparing.bench.timing import takes
from sparing.grid.files import short
from sparing.grid.method import Error

Batch = dict[str, Any]
Progress = Callable[[int, int], None]  #: called with (done, all), in the task's own units

ROWS, PIECE = 8, 512  # of a batch to calibrate or train on: pieces of text, and tokens of each
TASKS = (
    "ppl | code | prose | ppl:FILE | find-digit | vqa:FILE.jsonl | lm-eval:NAME | lm-eval:FILE.yaml, with "
    ",calibration=FILE behind a file or NAME"
)


class Run(Protocol):
    """What an evaluation tells an attached method; `sparing.attach` returns one."""

    prompt: Any
    oracle: Any


class Task:
    """One way to measure quality. To add one, set the attributes and write the verbs; `compare` takes any instance.

    Attributes:
        name: as on the command line.
        metric: what `evaluate` returns: "accuracy" (0..1), "bits_per_byte", or what lm-eval calls it.
        higher_is_better: whether more of it is better.
        visual: whether its inputs hold images.
        calibrates: whether it has data to fit on.
        truth: whether it knows which visual tokens matter, and so can run the oracle control.
    """

    name: str
    metric: str
    higher_is_better: bool
    visual: ClassVar[bool] = False
    calibrates: bool = True
    truth: bool = False

    def evaluate(
        self, model: nn.Module, run: Run | None = None, limit: int | None = None, progress: Progress | None = None
    ) -> float:
        """The quality of the model as it is now.

        Args:
            model: the loaded model, or a cut one of the same kind.
            run: what `attach` gave, if methods are attached.
            limit: units to evaluate (windows, scenes, questions); None takes the task's own number.
            progress: called after every batch.
        """
        raise NotImplementedError

    def inputs(self) -> Batch:
        """A representative prompt batch, for timing."""
        raise NotImplementedError

    def sized(self, context: int, batch: int) -> Batch:
        """`batch` prompts of `context` tokens, or of as many below that as whole images allow, for timing."""
        raise Error(f"task = {self.name!r}: makes no prompts of a given length (it has no sized), so nothing to sweep")

    def batches(self, n: int) -> Iterator[Batch]:
        """`n` batches to calibrate or train on, never evaluation data; `labels` are -100 where nothing is learned."""
        raise NotImplementedError

    def details(self, quality: float, limit: int | None = None) -> dict[str, float]:
        """The same quality in other units."""
        return {}

    def downsampled(self, keep: float) -> Task | None:
        """The same task on images with at most `keep` of the visual tokens; None if that cannot be."""
        return None

    def loss(self, quality: float, dense: float) -> float:
        """Percent of dense quality lost: (dense - q)/dense for accuracy, (q - dense)/dense for bits per byte."""
        change = (dense - quality) if self.higher_is_better else (quality - dense)
        return 100 * change / dense if dense else 0.0


def parse(spec: str | Task, loaded: Loaded) -> Task:
    """The task that a `--task` string names, bound to a model's tokenizer or processor."""
    if isinstance(spec, Task):
        return spec
    head, _, calibration = spec.partition(",calibration=")
    name, _, file = head.partition(":")
    aside = _file("calibration", calibration) if calibration else None
    if name == "lm-eval" and file:
        from sparing.bench.harness import Harness

        return Harness(loaded, file, calibration=None if aside is None else _read(aside), name=spec)
    path = _file("task", file) if file else None
    if name == "ppl":
        text, calibrating = (None if file is None else _read(file) for file in (path, aside))
        return Text(loaded, text, calibration=calibrating, name=spec)
    if name in ("code", "prose") and not file:
        calibrating = None if aside is None else _read(aside)
        return Text(loaded, domain=name, calibration=calibrating, name=spec)
    if name == "find-digit" and not file:
        return FindDigit(loaded)
    if name == "vqa" and path:
        return Vqa(loaded, path, calibration=aside)
    raise Error(f"task = {spec!r}: must be {TASKS}")


def _file(argument: str, name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise Error(f"{argument} = {name!r}: there is no such file")
    return path


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise Error(f"task = {str(path)!r}: cannot be read as UTF-8 text ({problem})") from problem


# ---------------------------------------------------------------------------------------------------------------- ppl


class Text(Task):
    """Bits per byte of a text, by a window that slides over it.

    A window holds `window` tokens: first context, then `stride` tokens that are scored. The next window starts `stride`
    tokens later, so every token is scored once and always sees `window - stride` tokens before it. The first `window -
    stride` tokens of the text are context only. A text shorter than a window is one window whose second half is scored.
    A tokenizer that starts texts with a `<bos>` starts every window with it, and every piece to fit on. A method that
    acts on generated tokens is told that the context is the prompt, so it acts on the scored ones as if they were
    generated.

    Bytes are those of the scored part of the text in UTF-8. With `limit`, that many windows are taken evenly from the
    whole text.

    Args:
        loaded: model with its tokenizer.
        text: to score; None takes the held-out modules of `lab:lm`.
        window: tokens; None takes 1024, or what the model can hold.
        stride: scored tokens a window; None takes half a window.
        calibration: text to fit on; None takes the training text of `lab:lm`, which is Python source.
        domain: where no text is given: "files" (as they are), "code" (without docstrings and comments) or "prose"
            (docstrings and comments alone), of the held-out and of the training modules.
        name: the task's name.
        batch: windows a forward pass.
    """

    metric = "bits_per_byte"
    higher_is_better = False

    def __init__(
        self,
        loaded: Loaded,
        text: str | None = None,
        *,
        window: int | None = None,
        stride: int | None = None,
        calibration: str | None = None,
        domain: str = "files",
        name: str = "ppl",
        batch: int = 4,
    ) -> None:
        self.name, self._domain = name, domain
        self._loaded, self._batch, self._calibration = loaded, batch, calibration
        tokenizer = loaded.tokenizer
        self._start = start_of(tokenizer)
        most = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or 1024
        window = min(1024, most) if window is None else window
        stride = window // 2 if stride is None else stride
        if not len(self._start) < window - stride < window <= most:
            raise Error(
                f"stride = {stride}: must be at least 1 and less than the window, which is {window} and at most {most}"
            )
        if text is None:
            from sparing.lab.text import heldout_domain

            text = heldout_domain(domain)
        self._ids, self._bytes = _encode(tokenizer, text)
        if len(self._ids) < 2:
            raise Error(f"task = {name!r}: the text has {len(self._ids)} tokens; at least 2 are needed")
        if calibration is not None:
            check_enough(loaded, calibration, f"task = {name!r}: the calibration text has")
        check_causal(loaded)
        self._stride = stride
        self._context = min(window - stride - len(self._start), len(self._ids) // 2)

    def evaluate(
        self, model: nn.Module, run: Run | None = None, limit: int | None = None, progress: Progress | None = None
    ) -> float:
        nats, done, spans = 0.0, 0, self._spans(limit)
        for group in _alike(spans, self._batch):
            nats += self._nats(model, run, group)
            done += len(group)
            if progress:
                progress(done, len(spans))
        return nats / math.log(2) / sum(self._size(*span) for span in spans)

    def details(self, quality: float, limit: int | None = None) -> dict[str, float]:
        """Perplexity per token."""
        spans = self._spans(limit)
        tokens = sum(stop - start for start, stop in spans)
        bits = quality * sum(self._size(*span) for span in spans) / tokens
        return {"perplexity": 2.0 ** min(bits, 1000.0)}

    def inputs(self) -> Batch:
        """Four contexts from the text's beginning, at least."""
        return self._together(
            [span for span in self._spans(None) if span[0] >= self._context][: self._batch], scored=False
        )

    def sized(self, context: int, batch: int) -> Batch:
        """Rows that begin at places evenly spread over the text; a text that ends too soon begins again."""
        least = len(self._start) + 1
        if context < least:
            raise Error(f"context = {context}: {self.name} needs at least {least} tokens a row")
        total = len(self._ids)
        begins = torch.arange(batch) * total // batch if batch <= total else torch.arange(batch)
        rows = self._ids[(begins[:, None] + torch.arange(context - len(self._start))) % total]
        return {"input_ids": _started(self._start, rows).to(self._loaded.model.device)}

    def batches(self, n: int) -> Iterator[Batch]:
        """Batches of 8 pieces of 512 tokens, evenly from the calibration text; see `text_batches`."""
        if self._calibration is None:
            from sparing.lab.text import train_text

            text = train_text(64_000 * n, self._domain)  # enough for any usual tokenizer
        else:
            text = self._calibration
        yield from text_batches(self._loaded, text, n)

    def _spans(self, limit: int | None) -> list[tuple[int, int]]:
        """First and last-but-one token of every scored part."""
        total = len(self._ids)
        spans = [(start, min(start + self._stride, total)) for start in range(self._context, total, self._stride)]
        return _evenly(spans, limit)

    def _size(self, start: int, stop: int) -> int:
        return self._bytes[stop] - self._bytes[start]

    def _together(self, spans: list[tuple[int, int]], scored: bool = True) -> Batch:
        """(B, T) input ids of windows, with their scored part or without."""
        rows = [self._ids[start - self._context : stop if scored else start] for start, stop in spans]
        return {"input_ids": _started(self._start, torch.stack(rows)).to(self._loaded.model.device)}

    @torch.no_grad()
    def _nats(self, model: nn.Module, run: Run | None, spans: list[tuple[int, int]]) -> float:
        ids_BT = self._together(spans)["input_ids"]
        scored = spans[0][1] - spans[0][0]
        if run is not None:
            run.prompt = ids_BT.shape[1] - scored
        last = {"logits_to_keep": scored + 1} if takes(model, "logits_to_keep") else {}
        logits_BSV = model(input_ids=ids_BT, use_cache=False, **last).logits[:, -scored - 1 : -1].float()
        return (
            F.cross_entropy(logits_BSV.flatten(0, 1), ids_BT[:, -scored:].flatten(), reduction="none")
            .double()
            .sum()
            .item()
        )


def text_batches(loaded: Loaded, text: str, n: int, *, batch: int = ROWS, length: int = PIECE) -> Iterator[Batch]:
    """`n` batches of pieces of a text, taken evenly from all of it, to calibrate or train on.

    A piece starts as scored windows do, with a `<bos>` where the tokenizer puts one before a text; `length` counts it.
    The second half of a piece is labelled, the first is its prompt. A text with less than `n` batches gives what it
    has.
    """
    ids, _ = _encode(loaded.tokenizer, text)
    if not len(ids):
        raise Error("the calibration text has 0 tokens")
    start = start_of(loaded.tokenizer)
    pieces = list(ids.split(min(length - len(start), len(ids))))
    pieces = _evenly([piece for piece in pieces if len(piece) == len(pieces[0])], n * batch)
    for first in range(0, len(pieces), batch):
        rows = _started(start, torch.stack(pieces[first : first + batch])).to(loaded.model.device)
        labels = rows.clone()
        labels[:, : rows.shape[1] // 2] = -100
        yield {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": labels}


def check_enough(loaded: Loaded, text: str, what: str) -> None:
    """Refuses a text that is too short to fit on; `what` are the words of the message before the number of tokens."""
    tokens = len(_encode(loaded.tokenizer, text)[0])
    if tokens < PIECE:
        raise Error(f"{what} {tokens} tokens; at least {PIECE}, one piece of text, are needed")


def start_of(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before every text: its `<bos>`, or nothing. Windows that are scored or timed and pieces to
    fit on all start with it."""
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def _started(start: list[int], rows_BT: Tensor) -> Tensor:
    """The rows with what a text starts with before each."""
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(len(rows_BT), -1), rows_BT], 1)


def _encode(tokenizer: Any, text: str) -> tuple[Tensor, list[int]]:
    """(N,) token ids without special ones, and for every token, and the end, the byte of the text it starts at."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    coded = tokenizer(
        text, add_special_tokens=False, verbose=False, **({"return_offsets_mapping": True} if fast else {})
    )
    ids = coded["input_ids"]
    if fast:
        at = [start for start, _ in coded["offset_mapping"]]
        sizes = np.fromiter((len(piece.encode()) for piece in text), np.int64, len(text))
        before = np.concatenate([[0], sizes.cumsum()])
        return torch.tensor(ids, dtype=torch.long), [*before[at].tolist(), int(before[-1])]
    before = np.cumsum([0, *(len(tokenizer.decode([token]).encode()) for token in ids)])
    return torch.tensor(ids, dtype=torch.long), before.tolist()


# --------------------------------------------------------------------------------------------------------- find-digit


class FindDigit(Task):
    """The world of `lab:vlm`: which digit on the picture has that colour? Exact match of the one token that answers.

    Held-out scenes, one question each, the colours in turn. The oracle control gets the patches that the asked digit
    touches.

    It is not down-sampled: `lab:vlm` has seen pictures of one size only and answers smaller ones by chance, so they are
    no rival (docs/instrument.md).
    """

    name = "find-digit"
    metric = "accuracy"
    higher_is_better = True
    visual = True
    truth = True
    scenes = 500  #: evaluated where no limit is given

    def __init__(self, loaded: Loaded, *, batch: int = 32) -> None:
        from sparing.lab import digits

        known = loaded.sees and [*loaded.tokenizer.get_vocab().items()]
        if not known or sorted(known) != sorted(digits.TOKEN.items()):
            raise Error(
                f"task = 'find-digit': asks in the words of lab:vlm, which {loaded.name} does not know; use lab:vlm"
            )
        self._loaded, self._batch = loaded, batch
        self._digits = digits

    def evaluate(
        self, model: nn.Module, run: Run | None = None, limit: int | None = None, progress: Progress | None = None
    ) -> float:
        total = self.scenes if limit is None else limit
        right = 0
        with torch.no_grad():
            for start in range(0, total, self._batch):
                count = min(self._batch, total - start)
                batch, answers, truth = self._asked("test", start, count)
                if run is not None:
                    run.oracle = truth
                said = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
                right += int((said == answers).sum())
                if progress:
                    progress(start + count, total)
        return right / total

    def inputs(self) -> Batch:
        """Eight questions about held-out scenes."""
        return self._asked("test", 0, 8)[0]

    def sized(self, context: int, batch: int) -> Batch:
        """Whole pictures of different held-out scenes in every row, and one question at its end."""
        each = self._digits.PATCHES
        count = (context - 2) // each  # beside <bos> and the colour
        if count < 1:
            raise Error(f"context = {context}: one image and a question take {each + 2} tokens")
        asked, _, _ = self._asked("test", 0, batch * count)
        ids = asked["input_ids"][:batch]
        ids = torch.cat([ids[:, :1], ids[:, 1:-1].repeat(1, count), ids[:, -1:]], 1)
        return asked | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def batches(self, n: int) -> Iterator[Batch]:
        """`n` batches of 32 questions with their answers, about training scenes; only the answer is a label."""
        for index in range(n):
            batch, answers, _ = self._asked("train", index * self._batch, self._batch)
            ids = torch.cat([batch["input_ids"], answers[:, None]], 1)
            labels = torch.full_like(ids, -100)
            labels[:, -1] = answers
            yield batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def _asked(self, split: str, start: int, count: int) -> tuple[Batch, Tensor, Tensor]:
        """Inputs, (B,) token of the answer, (B, 256) bool patches that hold it."""
        from sparing.lab.vlm import pixels

        d, model = self._digits, self._loaded.model
        asked = [(d.scene(split, i), d.COLOURS[i % len(d.COLOURS)]) for i in range(start, start + count)]
        images = pixels(np.stack([scene.image for scene, _ in asked])).to(model.device, model.dtype)
        ids = torch.stack([scene.prompt_ids(colour) for scene, colour in asked])
        answers = torch.tensor([d.TOKEN[scene.answer(colour)] for scene, colour in asked])
        truth = torch.stack([scene.oracle(colour) for scene, colour in asked])
        ids, answers, truth = (tensor.to(model.device) for tensor in (ids, answers, truth))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}, answers, truth


@contextmanager
def any_size(model: nn.Module) -> Iterator[None]:
    """Lets the image tower take pictures of any size, by interpolating its position embedding."""
    tower = _tower(model)
    if tower is None:
        raise Error(f"model = {type(model).__name__}: its image tower cannot interpolate its position embedding")

    def also(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"interpolate_pos_encoding": True}

    handle = tower.register_forward_pre_hook(also, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _tower(model: nn.Module) -> nn.Module | None:
    """The outermost module that can interpolate position embeddings."""
    return next((module for module in model.modules() if takes(module, "interpolate_pos_encoding")), None)


# ---------------------------------------------------------------------------------------------------------------- vqa


class Vqa(Task):
    """Questions about pictures from a file with one JSON object a line: `image` (path, from the file's folder),
    `question`, `answer`.

    The model answers greedily; an answer counts if it equals the expected one (or one of a list), upper and lower case,
    outer spaces and final punctuation aside. The prompt is the processor's chat template where there is one, else
    `<image>` and the question.

    The down-sampled task shrinks the pictures, for a tower of one fixed size also what the processor makes of them.

    Args:
        loaded: model with its processor.
        file: the questions.
        calibration: a file of the same form to fit on.
        tokens: longest answer that is generated.
        batch: questions generated together.
    """

    metric = "accuracy"
    higher_is_better = True
    visual = True

    def __init__(
        self,
        loaded: Loaded,
        file: Path,
        *,
        calibration: Path | None = None,
        tokens: int = 16,
        batch: int = 8,
        shrink: float = 1.0,
    ) -> None:
        if not loaded.sees:
            raise Error(
                f"task = 'vqa': asks about pictures and {loaded.name} reads text only; use a vision-language model"
            )
        self.name = f"vqa:{file}" + (f",calibration={calibration}" if calibration else "")
        self._file, self._calibration, self._loaded = file, calibration, loaded
        self.calibrates = calibration is not None
        self._tokens, self._shrink = tokens, shrink
        self._items = _questions(file)
        self._fitting = None if calibration is None else _questions(calibration)
        self._processor = loaded.processor
        tokenizer = loaded.tokenizer
        self._batch = batch if tokenizer.pad_token_id is not None else 1

    def evaluate(
        self, model: nn.Module, run: Run | None = None, limit: int | None = None, progress: Progress | None = None
    ) -> float:
        items, right = self._items[:limit], 0
        with torch.no_grad(), self._seeing(model):
            for start in range(0, len(items), self._batch):
                group = items[start : start + self._batch]
                batch = self._prompts(group)
                pad = self._loaded.tokenizer.pad_token_id
                out = model.generate(**batch, max_new_tokens=self._tokens, do_sample=False, pad_token_id=pad)  # type: ignore[operator]
                said = self._loaded.tokenizer.batch_decode(
                    out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
                )
                right += sum(
                    _plain(text) in map(_plain, answers) for text, (_, _, answers) in zip(said, group, strict=True)
                )
                if progress:
                    progress(start + len(group), len(items))
        return right / len(items)

    def inputs(self) -> Batch:
        """The first questions of the file, four at most."""
        return self._prompts(self._items[: min(4, self._batch)])

    def sized(self, context: int, batch: int) -> Batch:
        """The image of a question over and over, then the question; rows of other questions where they are as long."""

        def sizes(item: Question) -> tuple[int, ...]:
            return tuple(self._prompts([item], images)["input_ids"].shape[1] for images in (1, 2))

        one, two = sizes(self._items[0])
        count = 1 + (context - one) // (two - one)
        if count < 1:
            raise Error(f"context = {context}: one image and the question take {one} tokens")
        rows = [item for item in self._items[:batch] if sizes(item) == (one, two)]
        return self._prompts([rows[i % len(rows)] for i in range(batch)], count)

    def batches(self, n: int) -> Iterator[Batch]:
        """One question of the calibration file a batch, over again where it is short; the answer is labelled."""
        items = self._fitting
        if items is None:
            raise Error(
                f"task = {self.name!r}: fitting needs other questions; write vqa:FILE.jsonl,calibration=OTHER.jsonl"
            )
        for index in range(n):
            item = items[index % len(items)]
            prompt = self._prompts([item])
            answer = self._loaded.tokenizer(" " + item[2][0], add_special_tokens=False)["input_ids"]
            end = self._loaded.tokenizer.eos_token_id
            tail = torch.tensor([[*answer, *([] if end is None else [end])]], device=self._loaded.model.device)
            ids = torch.cat([prompt["input_ids"], tail], 1)
            labels = ids.clone()
            labels[:, : -tail.shape[1]] = -100
            extra = {
                k: torch.cat([v, torch.zeros_like(tail)], 1) for k, v in prompt.items() if k.endswith("token_type_ids")
            }
            yield prompt | extra | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def downsampled(self, keep: float) -> Vqa | None:
        small = Vqa(
            self._loaded,
            self._file,
            calibration=self._calibration,
            tokens=self._tokens,
            batch=self._batch,
            shrink=math.sqrt(keep),
        )
        try:
            fits = small._visual_tokens() <= 1.1 * keep * self._visual_tokens()
        except (ValueError, TypeError):
            return None
        return small if fits and (self._side is None or _tower(self._loaded.model)) else None

    @cached_property
    def _side(self) -> int | None:
        """Pixels along a side of what a tower of one fixed size sees; None for a tower that takes any size."""
        vision = getattr(self._loaded.model.config, "vision_config", None)
        side = getattr(vision, "image_size", None)
        pictures = getattr(self._processor, "image_processor", None)
        return (
            side
            if isinstance(side, int) and getattr(pictures, "size", None) and not hasattr(pictures, "min_pixels")
            else None
        )

    def _seeing(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if self._shrink == 1 or self._side is None else any_size(model)

    def _visual_tokens(self) -> int:
        return int((self._prompts(self._items[:1])["input_ids"] == self._loaded.view.image_token_id).sum())

    def _prompts(self, items: list[Question], images: int = 1) -> Batch:
        """Inputs of several questions, padded on the left; their image as often as `images` says."""
        processor, fixed = self._processor, {}
        pictures = [_opened(path) for path, _, _ in items]
        if self._shrink < 1 and self._side is not None:
            patch = self._loaded.model.config.vision_config.patch_size
            side = max(patch, int(self._side * self._shrink) // patch * patch)
            fixed = {"size": {"height": side, "width": side}, "crop_size": {"height": side, "width": side}}
        elif self._shrink < 1:
            pictures = [
                p.resize([max(1, int(s * self._shrink)) for s in p.size], Image.Resampling.BICUBIC) for p in pictures
            ]
        if getattr(processor, "chat_template", None):
            turns = ([{"type": "image"}] * images + [{"type": "text", "text": question}] for _, question, _ in items)
            texts = [
                processor.apply_chat_template(
                    [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
                )
                for turn in turns
            ]
        else:
            image = getattr(processor, "image_token", "<image>")
            texts = [image * images + f"\n{question}" for _, question, _ in items]
        processor.tokenizer.padding_side = "left"
        padding = {"padding": True} if len(items) > 1 and processor.tokenizer.pad_token_id is not None else {}
        batch = processor(images=[[p] * images for p in pictures], text=texts, return_tensors="pt", **padding, **fixed)
        model = self._loaded.model
        return {
            k: v.to(model.device, model.dtype) if v.is_floating_point() else v.to(model.device)
            for k, v in batch.items()
        }


Question = tuple[Path, str, list[str]]


def _questions(file: Path) -> list[Question]:
    """Image, question and accepted answers of every line; a broken line is named by its number."""
    found: list[Question] = []
    for number, line in enumerate(_read(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"task = {str(file)!r}: line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise Error(f"{where}: not JSON: {problem}") from problem
        if not isinstance(item, Mapping) or not {"image", "question", "answer"} <= item.keys():
            lacks = [key for key in ("image", "question", "answer") if isinstance(item, Mapping) and key not in item]
            without = f", it has no {' and no '.join(lacks)}" if lacks else ""
            raise Error(f"{where}: an object with image, question and answer is needed{without}")
        answers = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
        for key, values in (("image", [item["image"]]), ("question", [item["question"]]), ("answer", answers)):
            kinds = (str, int, float) if key == "answer" else (str,)
            if not values or not all(isinstance(value, kinds) for value in values):
                raise Error(
                    f"{where}: {key} = {short(item[key])}: must be text" + " or a list of it" * (key == "answer")
                )
        found.append((_picture(file.parent, item["image"], where), item["question"], [str(a) for a in answers]))
    if not found:
        raise Error(f"task = {str(file)!r}: holds no questions")
    return found


def _picture(folder: Path, name: str, where: str) -> Path:
    """An image that can be opened. The file is the user's own, so it may lie anywhere; it is never fetched."""
    try:
        if not (folder / name).is_file():
            raise FileNotFoundError("there is no such file")
        Image.open(folder / name).close()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        why = "it is none" if isinstance(problem, UnidentifiedImageError) else problem
        raise Error(f"{where}: {name} cannot be opened as an image ({why})") from problem
    return folder / name


def _opened(path: Path) -> Image.Image:
    """The picture in colours."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise Error(f"image = {str(path)!r}: cannot be read ({problem})") from problem


def _plain(text: str) -> str:
    return text.strip().rstrip(string.punctuation).strip().casefold()


# ------------------------------------------------------------------------------------------------------------- shared


def _evenly(items: list[Any], limit: int | None) -> list[Any]:
    """`limit` of the items, evenly from all of them."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _alike(spans: list[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """Consecutive spans of equal length, `most` at a time."""
    group: list[tuple[int, int]] = []
    for span in spans:
        if group and (len(group) == most or span[1] - span[0] != group[0][1] - group[0][0]):
            yield group
            group = []
        group.append(span)
    if group:
        yield group
