"""The command `sparing`.

A mistake of the user ends in one line on standard error and exit code 2, a comparison in which methods failed or did
nothing in exit code 1 and a line that says so, Ctrl-C in exit code 130. Anything else that
goes wrong is a fault of the library and shows its traceback. torch and transformers are imported by the commands that
need them, so that `--help` answers at once.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from sparing.bench.models import Loaded
    from sparing.bench.tasks import Task
    from sparing.grid.method import Method

INTERRUPTED = 130
_UsageError: Any = typer.BadParameter.__mro__[1]  # typer carries a click of its own


class _Commands(TyperGroup):
    """Runs a command and turns what the user can mend into one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            stopped = self.commands.get(ctx.invoked_subcommand or "")
            resumes = any(option.name == "resume" for option in getattr(stopped, "params", ()))
            kept = " Finished rows are kept; the same command with --resume goes on from there." if resumes else ""
            _complain(f"Interrupted.{kept}", "yellow")
            raise typer.Exit(INTERRUPTED) from None
        except ValueError as problem:
            # Whoever raised our Error has loaded its module; if nobody has, this is something else.
            module = sys.modules.get("sparing.grid.method")
            if module is None or not isinstance(problem, module.Error):
                raise
            _complain(str(problem), "bold red")
            raise typer.Exit(2) from None
        except _UsageError as problem:  # what typer itself refuses, without its frame of three lines
            if type(problem).__name__ == "NoArgsIsHelpError":
                raise
            command = problem.ctx.command_path if problem.ctx else "sparing"
            _complain(f"{problem.format_message().rstrip('.')}; see {command} --help", "bold red")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Neural networks that spend compute only where it matters, and prove it.",
)
lab_app = typer.Typer(no_args_is_help=True, help="Small trained models that come with the library.")
app.add_typer(lab_app, name="lab")

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="lab:NAME, a checkpoint folder, or a hub id.", show_default=False)
]
MethodText = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        metavar="NAME[:field=value,…]",
        help="A method of `sparing methods`, or the folder that sparing fit wrote.",
        show_default=False,
    ),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="New or empty folder to write to.", show_default=False)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what DIR holds, all of it, once the new content is written.")
]
Device = Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where to run.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="float32|bfloat16|float16",
        help="Number type of the weights; the checkpoint's own if not given.",
    ),
]


def _whole(low: int, high: int | None = None) -> Callable[[typer.CallbackParam, int | None], int | None]:
    """Callback of an option that takes a whole number in low..high."""

    def check(param: typer.CallbackParam, value: int | None) -> int | None:
        if value is not None and (value < low or (high is not None and value > high)):
            upper = "" if high is None else f" and at most {high}"
            raise _error(f"{param.opts[0]} {value}: must be at least {low}{upper}")
        return value

    return check


Seed = Annotated[
    int, typer.Option("--seed", metavar="N", callback=_whole(0, 2**32 - 1), help="Seed of all that is drawn.")
]


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True)] = False,
) -> None:
    if show_version:
        typer.echo(f"sparing {version('sparing')}")
        raise typer.Exit


# --------------------------------------------------------------------------- methods


@app.command("methods")
def _methods(
    axis: Annotated[
        str | None, typer.Option("--axis", metavar="A", help="Only this axis: tokens, depth, width, …")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
) -> None:
    """List the methods and their controls."""
    import sparing

    found = sparing.methods(axis)
    if as_json:
        keys = ("axis", "kind", "phase", "needs", "year", "title", "arxiv", "summary")
        rows = [
            {"name": name, **{key: getattr(c.card, key) for key in keys}, "control": c.card.is_control}
            for name, c in found.items()
        ]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head, style in (("name", "bold"), ("axis", ""), ("kind", ""), ("phase", ""), ("needs", ""), ("year", "")):
        table.add_column(head, style=style, no_wrap=True)
    table.add_column("paper", overflow="fold", min_width=24)
    table.add_column("arXiv", no_wrap=True)
    for name, cls in found.items():
        card = cls.card
        needs = card.needs + (" (trains too)" if card.trains and card.needs == "nothing" else "")
        cells = (
            card.axis,
            card.kind,
            card.phase,
            needs,
            "–" if card.is_control else str(card.year),
            card.title,
            card.arxiv or "–",
        )
        table.add_row(Text(name), *map(Text, cells), style="dim" if card.is_control else None)
    _console().print(table)
    _console().print("Dim: controls, the yardsticks a method has to beat.", style="dim")


# --------------------------------------------------------------------------- compare, report, show


class _Compare(TyperCommand):
    """Takes several words after --sweep: `--sweep context=512,2048 batch=1,8`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        said: list[str] = []
        sweeping = False
        for place, word in enumerate(args):
            value = place > 0 and args[place - 1] == "--sweep"
            more = sweeping and not value and "=" in word and not word.startswith("-")
            said += ["--sweep", word] if more else [word]
            sweeping = value or more or word.startswith("--sweep=")
        return super().parse_args(ctx, said)


@app.command("compare", cls=_Compare)
def _compare(
    model: Model,
    out: Out,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            "-t",
            metavar="T",
            help="What quality is measured on: ppl:FILE (a text of yours, in bits per byte); ppl, code, prose (modules "
            "of Python that lab:lm has not seen: whole, without comments and docstrings, or those alone); "
            "vqa:FILE.jsonl (questions on pictures); find-digit (made for lab:vlm); lm-eval:NAME or lm-eval:FILE.yaml "
            "(what lm-eval knows). Behind a FILE or NAME, ,calibration=OTHER says what methods are fitted on that have "
            "to be.",
            show_default=False,
        ),
    ],
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            "-m",
            metavar="NAME[:field=value,…]",
            help="A method of `sparing methods`, or the folder that sparing fit wrote; repeatable.",
        ),
    ],
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            "-k",
            metavar="0.5,0.25,0.1",
            help="Budgets: the share that still runs of what the method's axis counts. tokens: visual tokens, summed "
            "over the layers; depth: layers that a token runs (only generated tokens, for methods of phase decode); "
            "width: parameters of the layers, without embeddings; experts: experts.",
        ),
    ] = "0.5,0.25,0.1",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that DIR holds.")] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    seed: Seed = 0,
    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats",
            metavar="N",
            help="Runs that are timed, dense and method in turns; 0 times nothing, 5 to 30 if not given.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            help="Evaluate so many windows of text, scenes or questions, evenly from all; the task's own number if "
            "not given.",
        ),
    ] = None,
    no_controls: Annotated[
        bool,
        typer.Option(
            "--no-controls", help="Leave out what a method has to beat: random, uniform, oracle, smaller images."
        ),
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="context=512,2048,… batch=1,8,…",
            help="Also measure from which context length and batch size on each method is faster than dense.",
        ),
    ] = None,
) -> None:
    """Measure methods on a model against dense and against their controls, and write a report.

    DIR must be new, empty, or this same comparison with --resume.
    """
    budgets = _budgets(keep)
    for text in method:
        _method(text)
    given = _axes(sweep) if sweep else None
    _writable(out)
    _quiet()
    from sparing.bench import report, summary
    from sparing.bench.compare import compare

    where: tuple[Any, Any] = model, task
    planned: Any = None
    if given is not None:  # what it cannot do is said before the comparison begins
        from sparing.bench import sweep as sweeps
        from sparing.bench import tasks
        from sparing.bench.models import load_model

        with _doing(f"Loading {model}"):
            loaded = load_model(model, device, dtype)
        where = loaded, tasks.parse(task, loaded)
        planned = sweeps.prepare(*where, method, budgets, *given, out=out, resume=resume, seed=seed, repeats=repeats)
        if planned.remark:
            _complain(f"--sweep: {planned.remark}", "yellow")
    rows = compare(
        *where,
        method,
        budgets,
        out=out,
        resume=resume,
        device=device,
        dtype=dtype,
        seed=seed,
        repeats=repeats,
        limit=limit,
        controls=not no_controls,
        progress=sys.stderr.isatty(),
    )
    with _doing("Drawing what ran"):
        from sparing.bench import capture

        pictures = _or_none(lambda: capture.draw(rows, out, device), "pictures of what ran")
    if planned is not None:
        rows = rows + planned.run(sys.stderr.isatty())
    path = report.write(rows, out, pictures, _machines([out], report.machine(device)))
    console = _console()
    console.print(report.terminal(rows))
    console.print("Report:", style="bold", end=" ")
    _print_path(path)
    if told := summary.shortfall(rows):
        _complain(told, "bold red")
        raise typer.Exit(1)


@app.command("report")
def _report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR…", help="Folders of sparing compare.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder to write to: new, empty, of an earlier report, or around the runs.",
            show_default=False,
        ),
    ],
    overwrite: Overwrite = False,
) -> None:
    """Write one report about several runs of `sparing compare`."""
    from sparing.bench import report
    from sparing.grid.folders import whole

    runs = [(folder, _rows(folder)) for folder in folders]
    replaces = _replaces(out, overwrite, folders, right=report.takes(out, folders))
    _writable(out)
    with whole(out, f"--out {out}") if replaces else nullcontext(out) as folder:
        rows = report.gather(runs, folder)
        path = out / report.write(rows, folder, machines=_machines(folders)).name
    _console().print(report.terminal(rows))
    _console().print("Report:", style="bold", end=" ")
    _print_path(path)


@app.command("show")
def _show(
    model: Model,
    method: MethodText,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="map.png", help="Picture to write: .png, .svg or .pdf.", show_default=False
        ),
    ],
    keep: Annotated[
        float | None,
        typer.Option("--keep", "-k", metavar="K", help="Budget, as of sparing compare; the method's own if not given."),
    ] = None,
    sample: Annotated[int, typer.Option("--sample", metavar="I", help="Sample of the task's first batch.")] = 0,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            "-t",
            metavar="T",
            help="Where the sample comes from, as of sparing compare: ppl:FILE, vqa:FILE.jsonl, …; for lab models "
            "their own if not given.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file even if it is no picture of sparing's.")
    ] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Draw which cells ran for one sample, and which visual tokens stayed."""
    budget = None if keep is None else _budgets(str(keep))[0]
    chosen = _method(method)
    kept_too = out.with_name(f"{out.stem}-kept{out.suffix}")
    for path in (out, kept_too) if chosen.card.axis == "tokens" else (out,):
        _picture_name(path, overwrite)
    _quiet()
    from sparing.bench import capture, pictures, tasks
    from sparing.bench.models import load_model
    from sparing.bench.summary import percent

    with _doing(f"Loading {model}"):
        loaded = load_model(model, device, dtype)
    chosen.check_model(loaded.model)
    bound = tasks.parse(task or _usual_task(loaded), loaded)
    if budget is not None:
        chosen = chosen.at(budget, loaded.view.shape)
    with _doing(f"Running {chosen.name}"):
        seen = capture.footprint(loaded, bound, chosen, sample)
    name = "one sample" if budget is None else f"keep {percent(budget)}"
    written = [(out, pictures.compute_map({name: seen}, f"{chosen.name} on {loaded.name}"))]
    image = pictures.kept({name: seen}) if chosen.card.axis == "tokens" else None
    if image is not None:
        written.append((kept_too, image))
    for path, figure in written:
        pictures.save(figure, path)
        _print_path(path)


# --------------------------------------------------------------------------- fit, prune


@app.command("fit")
def _fit(
    model: Model,
    method: MethodText,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder to write to: new, empty, or with fits of this method at other budgets.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            "-d",
            metavar="D",
            help="What to calibrate or train on: a text file, a .jsonl of questions on pictures (image, question, "
            "answer), lab (the training data of a lab model), or find-digit (made for lab:vlm). Repeatable for methods "
            "on experts, which mix several texts.",
            show_default=False,
        ),
    ],
    batches: Annotated[
        int, typer.Option("--batches", metavar="N", callback=_whole(1), help="Batches to calibrate or train on.")
    ] = 32,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", metavar="N", callback=_whole(1), help="Passes over them, where it is training."),
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="X", help="Peak learning rate, where it is training.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            "-k",
            metavar="0.75,0.5",
            help="Budgets to fit at, as of sparing compare; each by itself, in DIR/keep-…, for methods whose fit "
            "belongs to one budget. What the fields of the method say if not given.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training that DIR holds; finished fits stay.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace what DIR holds, once there is a new fit; fits of this method at other budgets stay.",
        ),
    ] = False,
    processes: Annotated[
        int, typer.Option("--processes", metavar="N", callback=_whole(1), help="Train on N GPUs (or CPU processes).")
    ] = 1,
    device: Device = "cpu",
    dtype: Dtype = None,
    seed: Seed = 0,
) -> None:
    """Calibrate or train a method on a model, and save it for `compare`, `show` and `prune`."""
    chosen = _method(method)
    card = chosen.card
    trained = card.trains or card.needs == "training"
    if card.needs == "nothing" and not card.trains:
        raise _error(f"--method {method}: {chosen.name} needs nothing; there is nothing to fit")
    options: dict[str, Any] = {key: value for key, value in (("epochs", epochs), ("lr", lr)) if value is not None}
    if options and not trained:
        raise _error(f"--{next(iter(options))}: {chosen.name} is calibrated, not trained")
    if processes > 1 and not trained:
        raise _error(f"--processes {processes}: {chosen.name} is calibrated, in one process")
    budgets = [None] if keep is None else _budgets(keep)
    if len(data) > 1 and chosen.card.axis != "experts":
        raise _error(f"--data {data[1]}: only methods on experts mix domains; {chosen.name} takes one --data")
    names = [Path(each).stem for each in data]
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise _error(f"--data: two domains are called {', '.join(twice)}; name their files differently")
    for each in data:
        _data_exists(each)
    first = os.environ.get("RANK", "0") == "0"
    unfinished = out / "training"
    replaces = False
    if first:  # the others would find what the first has begun
        if trained and not resume and unfinished.exists():
            raise _error(
                f"--out {out}: holds an unfinished training; pass --resume to go on with it, or take another folder"
            )
        right = _fits_beside(out, chosen.name, budgets, resume, overwrite, trained)
        replaces = _replaces(out, overwrite, [model, method, *data], right=right)
    _writable(out)
    if processes > 1 and "RANK" not in os.environ:
        _launch(processes, device)
        return
    _quiet()
    from sparing.bench.models import load_model
    from sparing.grid.folders import whole

    with _doing(f"Loading {model}"):
        loaded = load_model(model, device, dtype)
    at = {budget: chosen if budget is None else chosen.at(budget, loaded.view.shape) for budget in budgets}
    for budget, one in at.items():
        folder = out if budget is None else out / f"keep-{budget:g}"
        if resume and _fitted_as(folder, one.name) and not (unfinished / folder.name).is_dir():
            continue
        if trained:
            options["checkpoint"] = unfinished / folder.name
        fitted = _fitted(one, loaded, data, batches, seed, **options)
        if not first:
            continue
        with whole(out if replaces else folder, f"--out {out}", beside=("training",)) as new:
            fitted.save(new / folder.relative_to(out) if replaces else new)
        replaces = False
        shutil.rmtree(unfinished / folder.name, ignore_errors=True)
        numbers = sum(tensor.numel() for tensor in fitted.state.values())
        where = "" if budget is None else f" at keep = {budget:g}"
        _console().print(Text(f"{fitted.name}{where}: {numbers:,} fitted numbers. Use it as --method {out}"))
    if first:
        if unfinished.is_dir() and not any(unfinished.iterdir()):
            unfinished.rmdir()
        _print_path(out)


def _launch(processes: int, device: str) -> None:
    """This command once more, in as many processes as asked for; `accelerate launch --cpu` would start one alone."""
    import subprocess

    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | ({} if device.startswith("cuda") else {"ACCELERATE_USE_CPU": "true"})
    try:
        subprocess.run([*words, "-m", "sparing", *sys.argv[1:]], check=True, env=environment)
    except subprocess.CalledProcessError as problem:
        raise typer.Exit(problem.returncode) from None


@app.command("prune")
def _prune(
    model: Model,
    method: MethodText,
    keep: Annotated[
        float,
        typer.Option(
            "--keep",
            "-k",
            metavar="K",
            help="Share that stays: for methods of the axis width of the parameters of the decoder layers (embeddings, "
            "head and vision tower are neither cut nor counted), for depth of the layers, for experts of the experts.",
            show_default=False,
        ),
    ],
    out: Out,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            metavar="FILE",
            help="What to calibrate on, if the method is not fitted yet: a text file, a .jsonl of questions on "
            "pictures, lab (the training data of a lab model), or find-digit (made for lab:vlm).",
        ),
    ] = None,
    batches: Annotated[
        int, typer.Option("--batches", metavar="N", callback=_whole(1), help="Batches to calibrate on.")
    ] = 32,
    portable: Annotated[
        bool, typer.Option("--portable", help="All layers alike and no biases: loads in plain transformers and vLLM.")
    ] = False,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    seed: Seed = 0,
) -> None:
    """Really cut a model, and save the smaller checkpoint with its model card."""
    budget = _budgets(str(keep))[0]
    chosen = _method(method)
    if chosen.card.kind != "surgery":
        raise _error(
            f"--method {method}: {chosen.name} acts while the model runs and cuts nothing; sparing.attach runs it"
        )
    if not chosen.ready and data is None:
        raise _error(
            f"--data: {chosen.name} needs {chosen.card.needs}; name a text file, find-digit or a .jsonl of questions"
        )
    if data is not None:
        _data_exists(data)
    _replaces(out, overwrite, [model, method, *([data] if data else [])])
    _writable(out)
    _quiet()
    from transformers import AutoConfig

    import sparing
    from sparing.bench import timing
    from sparing.bench.models import load_model
    from sparing.bench.summary import AXES
    from sparing.engine.checkpoint import not_portable

    with _doing(f"Loading {model}"):
        loaded = load_model(model, device, dtype)
    chosen.check_model(loaded.model)
    if not chosen.ready:
        assert data is not None
        chosen = _fitted(chosen, loaded, [data], batches, seed)
    chosen = chosen.at(budget, loaded.view.shape)
    if portable:
        chosen = chosen.portable()  # type: ignore[attr-defined]
    with _doing(f"Cutting with {chosen.name}"):
        small = sparing.prune(loaded.model, chosen)
    why = not_portable(small) if portable else None
    if why is not None:
        raise _error(f"--portable: {chosen.name} at keep = {budget:g} gives no such model: {why}")
    stored = None if dtype or not loaded.source else AutoConfig.from_pretrained(loaded.source).dtype
    if stored is not None:  # calculated in what the model ran in, saved in what its checkpoint holds
        for m in (loaded.model, small):
            m.to(stored)
    both = loaded.model, small
    before, after = (sum(weight.numel() for weight in m.parameters()) for m in both)
    facts = {
        "base model": loaded.name,
        "method": f"{chosen.name} ({chosen.card.title}, {chosen.card.year}"
        + (f", arXiv {chosen.card.arxiv})" if chosen.card.arxiv else ")"),
        "budget": f"keep = {budget:g} of the {AXES[chosen.card.axis]}",
        "calibration data": data or f"as fitted in {method}",
        "parameters before": f"{before:,}",
        "sparing": version("sparing"),
    }
    processor = _or_none(lambda: loaded.processor if loaded.sees else loaded.tokenizer)
    sparing.save_pretrained(small, out, processor, facts, overwrite)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("", "before", "after", "left"):
        table.add_column(head, justify="left" if not head else "right")
    layers = [sum(weight.numel() for weight in sparing.view(m).stack.parameters()) for m in both]
    table.add_row("parameters of the layers", *map("{:,}".format, layers), f"{layers[1] / layers[0]:.1%}")
    table.add_row("all parameters", f"{before:,}", f"{after:,}", f"{after / before:.1%}")
    sizes = [timing.weight_bytes(m) / 1e6 for m in both]
    table.add_row("weights", *map("{:.1f} MB".format, sizes), f"{sizes[1] / sizes[0]:.1%}")
    _console().print(table)
    of = AXES[chosen.card.axis]
    _console().print(f"--keep {budget:g} is of the {of}; embeddings, head and vision tower stay whole.", style="dim")
    _print_path(out)


# --------------------------------------------------------------------------- search


@app.command("search")
def _search(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="New or empty folder to write to; search-MODEL here if not given."
        ),
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(
            "--axes",
            metavar="depth,width,experts",
            help="What may go: whole attentions and MLPs (depth), heads and neurons (width), experts; all that the "
            "model has if not given.",
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            "--speedup",
            metavar="S",
            help="The target: dense time / time of the cut model, reading a prompt (prefill), measured here; at least "
            "1. Give one target.",
        ),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option("--flops", metavar="R", help="Or: share of the FLOPs of reading a prompt that stays, in (0, 1]."),
    ] = None,
    params: Annotated[
        float | None,
        typer.Option(
            "--params",
            metavar="R",
            help="Or: share of the parameters of the decoder layers that stays, in (0, 1]; embeddings do not count.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            metavar="FILE",
            help="What candidates are judged on: a text file or a .jsonl of questions on pictures; text models of "
            "lab: bring theirs.",
        ),
    ] = None,
    generations: Annotated[
        int, typer.Option("--generations", metavar="N", callback=_whole(0), help="Generations of the search.")
    ] = 40,
    batches: Annotated[
        int,
        typer.Option("--batches", metavar="N", callback=_whole(1), help="Batches of calibration text, 8 x 512 tokens."),
    ] = 16,
    portable: Annotated[
        bool, typer.Option("--portable", help="One width for all layers: loads in plain transformers and vLLM.")
    ] = False,
    costs: Annotated[
        Path | None, typer.Option("--costs", metavar="FILE", help="A costs.json of an earlier search on this machine.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search that DIR holds.")] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    seed: Seed = 0,
) -> None:
    """Find and save the cut that loses least at a wanted speed-up, measured on this machine."""
    targets = {"speedup": speedup, "flops": flops, "params": params}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        said = ", ".join(f"--{name} {value:g}" for name, value in given.items()) or "none of them"
        raise _error(f"--speedup, --flops, --params: give one target, not {said}")
    _quiet()
    from sparing.bench import search_report, tasks
    from sparing.bench.models import load_model
    from sparing.bench.search import Search, Target, save
    from sparing.grid.costs import CostTable
    from sparing.grid.files import read_json

    target = Target(*next(iter(given.items())))
    if data is not None:
        _data_exists(data)
    elif not model.startswith("lab:"):
        raise _error(f"--data: name a text file to judge {model} on")
    if costs is not None and not costs.is_file():
        raise _error(f"--costs {costs}: there is no such file; a costs.json of an earlier search is needed")
    table = None if costs is None else CostTable.from_plain(read_json(costs))
    folder = out or Path("search-" + "".join(c if c.isalnum() else "-" for c in model.rstrip("/").rpartition("/")[2]))
    with _doing(f"Loading {model}"):
        loaded = load_model(model, device, dtype)
    if data is None and loaded.sees:
        raise _error(f"--data: name a text file or a .jsonl of questions to judge {model} on")
    with _doing("Reading the calibration text"):
        rows = list(tasks.parse("ppl", loaded).batches(batches) if data is None else _batches(loaded, data, batches))
    view = loaded.view
    has = [
        a for a, there in (("experts", view.shape.experts), ("width", not view.lacks(("scores", "neurons")))) if there
    ]
    chosen = [a.strip() for a in axes.split(",") if a.strip()] if axes is not None else ["depth", *has]
    found_at = Search(
        loaded,
        rows,
        chosen,
        target,
        folder,
        generations=generations,
        portable=portable,
        resume=resume,
        table=table,
        seed=seed,
        data=data or "of the lab model",
        progress=sys.stderr.isatty(),
    )
    found = found_at.run()
    written = save(found_at, found, data or "of the lab model")
    page = search_report.write(found_at, found)
    shown = Table(box=None, pad_edge=False, show_header=False)
    for name, value in search_report.facts(found_at, found):
        shown.add_row(Text(name, style="bold"), Text(value))
    console = _console()
    console.print(shown)
    console.print("Report:", style="bold", end=" ")
    _print_path(page)
    _print_path(written)


# --------------------------------------------------------------------------- lab


@lab_app.command("list")
def _lab_list() -> None:
    """List the lab models."""
    from sparing import lab

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("model", "weights", "what it is"):
        table.add_column(head, overflow="fold")
    for name in lab.names():
        lines = (import_module(f"sparing.lab.{name}").__doc__ or "").strip().splitlines()
        table.add_row(Text(f"lab:{name}", style="bold"), Text(_weights(lab, name)), Text(lines[0] if lines else ""))
    _console().print(table)


@lab_app.command("train")
def _lab_train(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Folder of its own for model and checkpoint; lab-NAME if not given."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="N", help="Time to train, where the model takes one.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again although there is a checkpoint.")] = False,
) -> None:
    """Train a lab model again; a stopped training goes on where it was."""
    module = _lab(name)
    from sparing.grid.folders import content, refuse_content

    folder = out or Path(f"lab-{name}")
    if "checkpoint.pt" not in content(folder):
        refuse_content(folder, f"--out {folder}", lacks="training of a lab model")
    _writable(folder)
    _quiet()
    taken = inspect.signature(module.train).parameters
    options = {key: value for key, value in (("minutes", minutes), ("threads", threads)) if value is not None}
    for key in options:
        if key not in taken:
            raise _error(f"--{key}: the training of lab:{name} takes no such option")
    module.train(folder, resume=not fresh, **options)
    _print_path(folder)


@lab_app.command("eval")
def _lab_eval(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", callback=_whole(1), help="Scenes, or bytes of text, to evaluate."),
    ] = None,
) -> None:
    """Evaluate a lab model on its held-out data: accuracy for vlm, bits per byte for lm and moe."""
    module = _lab(name)
    _quiet()
    with redirect_stdout(sys.stderr), _doing(f"Evaluating lab:{name}"):
        loaded = module.load()
        parts = loaded if isinstance(loaded, tuple) else (loaded,)
        taken = inspect.signature(module.evaluate).parameters
        key = "limit" if "limit" in taken else "limit_bytes"
        result = module.evaluate(*parts, **({} if limit is None else {key: limit}))
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in result.items():
        _console().print(
            Text(f"{key.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
        )


# --------------------------------------------------------------------------- reading what the user wrote


def _budgets(text: str) -> list[float]:
    """`0.5,0.25` as numbers in (0, 1], falling as written, without repeats."""
    budgets = []
    for part in text.split(","):
        try:
            share = float(part)
        except ValueError:
            share = float("nan")
        if not 0 < share <= 1:
            raise _error(
                f"--keep {part.strip()}: must lie in (0, 1]; it is the share of the work that stays, e.g. 0.5,0.25,0.1"
            )
        budgets.append(share)
    return list(dict.fromkeys(budgets))


def _axes(texts: list[str]) -> tuple[list[int], list[int]]:
    """Contexts and batches of `--sweep`."""
    from sparing.bench.sweep import axes

    return axes(texts)


def _method(text: str) -> Method:
    import sparing

    folder = os.path.expanduser(text)
    if os.path.isdir(folder):  # which takes any text, also what is too long for a path
        from sparing.grid.method import load_fits

        fits = {} if os.path.isfile(os.path.join(folder, "method.json")) else load_fits(folder)
        return next(iter(fits.values()), None) or sparing.load(folder)
    if "/" in text.partition(":")[0]:
        raise _error(f"--method {text}: there is no such folder; name the folder of a fitted method, or a method")
    return sparing.parse(text)


def _usual_task(loaded: Loaded) -> str:
    if not loaded.sees:
        return "ppl"
    if loaded.name == "lab:vlm":
        return "find-digit"
    raise _error(f"--task: name the pictures to ask {loaded.name} about: --task vqa:FILE.jsonl")


def _data_exists(data: str) -> None:
    if data not in ("find-digit", "lab") and not Path(data).expanduser().is_file():
        raise _error(
            f"--data {data}: there is no such file; a text file, a .jsonl of questions, find-digit or lab is needed"
        )


def _fitted(method: Method, loaded: Loaded, data: list[str], batches: int, seed: int, **options: Any) -> Method:
    import torch

    names = [Path(each).stem for each in data]
    torch.manual_seed(seed)
    with _doing(f"Fitting {method.name} on {', '.join(data)}"):
        domains: Any = {name: _batches(loaded, each, batches) for name, each in zip(names, data)}
        fitted = method.fit(loaded.model, domains if len(data) > 1 else next(iter(domains.values())), **options)
    for each, found in zip(data, domains.values()):
        if isinstance(found, list) and len(found) < batches:  # a text that is shorter than asked
            _complain(f"--data {each}: was enough for {len(found)} of {batches} batches", "yellow")
    return fitted


def _batches(loaded: Loaded, data: str, count: int) -> Iterable[Any]:
    from sparing.bench import tasks

    if data == "lab":  # what the model's own task calibrates on
        return tasks.parse(_usual_task(loaded), loaded).batches(count)
    if data == "find-digit" or data.endswith(".jsonl"):
        task: Task = tasks.parse(data if data == "find-digit" else f"vqa:{data},calibration={data}", loaded)
        return task.batches(count)
    try:
        text = Path(data).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise _error(f"--data {data}: cannot be read as UTF-8 text: {problem}") from problem
    tasks.check_enough(loaded, text, f"--data {data}: has")
    return list(tasks.text_batches(loaded, text, count))


def _rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "results.jsonl"
    if not file.is_file():
        raise _error(f"{folder}: no run of sparing compare (results.jsonl is missing)")
    from sparing.bench.compare import read_rows

    try:
        rows = read_rows(file)
    except OSError as problem:
        raise _error(f"{file}: cannot be read: {problem.strerror or problem}") from problem
    if not rows:
        raise _error(f"{folder}: holds no finished row; sparing compare with --resume goes on with it")
    return rows


def _machines(folders: Iterable[Path], this: str | None = None) -> list[str]:
    """The machines that runs were measured on, `this` one added: a run may have been resumed on another."""
    known = []
    for folder in folders:
        file = folder / "machine.txt"
        known += file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        if this is not None and this not in known:
            known.append(this)
            file.write_text("\n".join(known) + "\n", encoding="utf-8")
    return list(dict.fromkeys(known))


def _lab(name: str) -> Any:
    from sparing import lab

    if name not in lab.names():
        raise _error(f"NAME {name!r}: no such lab model; there are {', '.join(lab.names())}")
    return import_module(f"sparing.lab.{name}")


def _weights(lab: Any, name: str) -> str:
    try:
        files = list(Path(lab.folder(name)).glob("*.safetensors"))
    except ValueError:
        files = []
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB" if files else "not trained yet"


def _picture_name(out: Path, overwrite: bool) -> None:
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise _error(f"--out {out}: a picture's name ends in .png, .svg or .pdf")
    if os.path.lexists(out) and not overwrite:
        from sparing.bench.pictures import made_here

        if not made_here(out):
            raise _error(f"--out {out}: is there and no picture of sparing's; take another name, or --overwrite")
    _writable(out.parent)


def _replaces(
    out: Path, overwrite: bool, inputs: Iterable[str | Path], right: Callable[[str], bool] = lambda name: False
) -> bool:
    """Whether all that a folder holds has to go; refused without `overwrite`, or where an input would go too.

    Args:
        right: which names may be there, to stay or to be written over.
    """
    from sparing.grid.folders import content, refuse_content, refuse_loss

    if all(map(right, content(out))):
        return False
    if not overwrite:
        refuse_content(out, f"--out {out}", but=right, way="--overwrite")
    refuse_loss(out, f"--out {out}", inputs)
    return True


def _fits_beside(
    out: Path, name: str, budgets: list[float] | list[None], resume: bool, overwrite: bool, training: bool
) -> Callable[[str], bool]:
    """What may be in a folder that a method is fitted to: other budgets of it, and with `resume` what is to be done."""
    there = [budget for budget in budgets if budget is not None and _fitted_as(out / f"keep-{budget:g}", name)]
    if there and not (resume or overwrite):
        raise _error(
            f"--out {out}: holds {name} fitted at keep = {there[0]:g} already; take another folder, or --resume to "
            "leave it, or --overwrite to replace it"
        )
    left = ("training",) if training and resume else ()
    if budgets != [None]:
        return lambda each: each in left or (each.startswith("keep-") and _fitted_as(out / each, name))
    done = ("method.json", "state.safetensors") if resume and _fitted_as(out, name) else ()
    return lambda each: each in (*left, *done)


def _fitted_as(folder: Path, name: str) -> bool:
    """Whether a folder holds a fitted method of this name."""
    from sparing.grid.files import read_json

    file = folder / "method.json"
    return file.is_file() and read_json(file).get("method") == name


def _writable(folder: Path) -> None:
    """Makes the folder and makes sure that files can be put there."""
    probe = folder / f".sparing-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise _error(f"--out {folder}: cannot be written to: {problem.strerror or problem}") from problem


def _error(message: str) -> Exception:
    from sparing.grid.method import Error

    return Error(message)


# --------------------------------------------------------------------------- talking to the user


def _console() -> Console:
    """Standard output; wide where it is no terminal, so that a file holds whole tables."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 180
    return Console(width=wide, highlight=False)


def _print_path(path: Path) -> None:
    typer.echo(str(path))


def _complain(message: str, style: str) -> None:
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(message.split()))
    Console(stderr=True, highlight=False).print(Text(text, style=style), soft_wrap=True)


@contextmanager
def _doing(what: str) -> Iterator[None]:
    """A spinner on standard error, for people only."""
    with Console(stderr=True, highlight=False).status(Text(what + " …")):
        yield


def _or_none(make: Callable[[], Any], what: str = "") -> Any:
    """What `make` gives; None if that fails, because what is made is an extra. With `what`, the failure is said."""
    try:
        return make()
    except Exception as problem:
        if what:
            _complain(f"No {what}: {type(problem).__name__}: {problem}", "yellow")
        return None


def _quiet() -> None:
    """Silences transformers' progress bars and remarks about defaults."""
    import transformers
    from huggingface_hub.utils import disable_progress_bars

    warnings.filterwarnings("ignore", module=r"(transformers|huggingface_hub|torch)(\.|$)")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()


def main() -> None:
    """Entry point of the command `sparing`."""
    app()


if __name__ == "__main__":
    main()
