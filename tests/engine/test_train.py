"""Training: it learns, what was interrupted goes on bitwise, and what cannot be resumed is refused with the reason."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import sparing
from sparing.engine.train import Batch, Objective, Training, finetune, labelled, student, train
from sparing.grid.method import Error
from sparing.testing.models import build, prompt

QUIET = Training(progress=False)


class Frozen(nn.Module):
    """A frozen model: a projection and a dropout, which draws from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("table", torch.ones(3))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.layer(x)))


class Toy(Objective):
    """A linear map behind the frozen model; a running mean is learned without a gradient."""

    def __init__(self, seed: int = 0, out: int = 2) -> None:
        torch.manual_seed(seed)
        super().__init__(Frozen())
        self.weight = nn.Parameter(torch.randn(out, 6) * 0.1)
        self.bias = nn.Parameter(torch.zeros(out))
        self.register_buffer("mean", torch.zeros(()))
        self.seen: list[tuple[float, float, int]] = []  # shares before and behind a step
        self.at = 0.0
        self.last = 0.0

    def forward(self, batch: Batch) -> Tensor:
        out = nn.functional.linear(self.model(batch["x"]), self.weight, self.bias)
        loss = (out - batch["y"]).square().mean()
        self.last, self.at = loss.item(), self.share
        self.shown = {"mean": float(self.mean)}
        return loss

    def after_step(self, step: int) -> None:
        self.seen.append((self.at, self.share, step))
        self.mean.mul_(0.9).add_(0.1 * self.last)


def data(n: int = 4, seed: int = 1, out: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(8, 6, generator=generator),
            "y": torch.randn(8, out, generator=generator),
            "input_ids": torch.randint(0, 99, (8, 3), generator=generator),
        }
        for _ in range(n)
    ]


def learn(objective: Objective, batches: Sequence[Batch] | None = None, **options: Any) -> dict[str, Tensor]:
    return train(
        objective,
        data() if batches is None else batches,
        Training(**{"progress": False, **options}),
        lr=0.02,
        name="fit toy",
    )


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------- learning


def test_the_loss_falls_and_only_what_is_meant_to_learns() -> None:
    toy = Toy()
    before = {k: v.clone() for k, v in toy.state_dict().items()}
    where = data(2)
    loss = lambda: sum(toy.eval()(b).item() for b in where) / 2  # noqa: E731
    first = loss()
    learned = learn(toy.train(), where, epochs=60)
    assert loss() < 0.8 * first
    assert set(learned) == {"weight", "bias", "mean"}
    assert not any(t.requires_grad for t in learned.values())
    for name, tensor in toy.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("model."), name
    assert all(p.grad is None for p in toy.model.parameters())
    learned["weight"].zero_()  # a copy
    assert toy.weight.abs().sum() > 0


def test_share_and_after_step_go_through_all_steps() -> None:
    toy = Toy()
    learn(toy, data(3), epochs=2)
    assert toy.seen == [(step / 6, (step + 1) / 6, step) for step in range(6)]


def test_the_rate_rises_and_falls_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    learn(Toy(), data(5), epochs=4, lr=0.3, warmup=0.2)
    rise, fall = rates[:4], rates[4:]
    assert rise == pytest.approx([0.075, 0.15, 0.225, 0.3])
    assert fall == pytest.approx([0.15 * (1 + math.cos(math.pi * t / 16)) for t in range(16)])
    rates.clear()
    learn(Toy(), data(1))
    assert rates == [0.02]


def test_the_gradient_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **options: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    huge = [{**b, "y": b["y"] * 100} for b in data()]
    learn(Toy(), huge, clip=0.5)
    assert norms == pytest.approx([0.5] * 4, rel=1e-3)


def test_a_loss_that_is_no_number_is_named() -> None:
    class Breaks(Toy):
        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch) * (math.nan if self.share >= 0.5 else 1)

    with pytest.raises(Error, match=r"lr = 0\.0\d+: the loss of fit toy is nan at step 2"):
        learn(Breaks())


def test_student_is_a_copy_with_gradients_where_they_are_wanted(llama: PreTrainedModel) -> None:
    twin = student(llama, lambda name: "layers.2.mlp" in name)
    chosen = {name for name, p in twin.named_parameters() if p.requires_grad}
    assert chosen == {f"model.layers.2.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert twin.training and not llama.training
    ids = prompt("llama", (6, 6), side="none")["input_ids"]
    twin(ids, labels=ids).loss.backward()
    assert {name for name, p in twin.named_parameters() if p.grad is not None} == chosen
    own = dict(llama.named_parameters())
    assert all(p is not own[name] and p.data_ptr() != own[name].data_ptr() for name, p in twin.named_parameters())
    assert not any(p.requires_grad for p in student(llama).parameters())


# --------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", 0, "epochs = 0: must be a whole number >= 1"),
        ("epochs", 1.5, "epochs = 1.5: must be a whole number >= 1"),
        ("epochs", "all", "epochs = 'all'"),
        ("epochs", True, "epochs = True"),
        ("epochs", None, "epochs = None"),
        ("lr", -1e-3, "lr = -0.001: must be a number >= 0"),
        ("lr", math.nan, "lr = nan"),
        ("lr", "fast", "lr = 'fast'"),
        ("warmup", -0.1, "warmup = -0.1: must be a number >= 0"),
        ("warmup", 2, "warmup = 2: must be a share of the steps, at most 1"),
        ("weight_decay", -1, "weight_decay = -1"),
        ("weight_decay", None, "weight_decay = None"),
        ("clip", math.inf, "clip = inf"),
        ("clip", 0, "clip = 0: must be above 0"),
        ("every", -1, "every = -1"),
    ],
)
def test_wrong_options_are_refused(name: str, value: Any, words: str) -> None:
    with pytest.raises(Error, match=words):
        Training(**{name: value})


def test_labelled() -> None:
    batch = {"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 2)}
    assert labelled(iter([batch, batch])) == [batch, batch]
    with pytest.raises(Error, match="the training data is empty"):
        labelled([])
    with pytest.raises(Error, match="needs labels in every batch"):
        labelled([batch, {"input_ids": torch.ones(1, 2)}])
    with pytest.raises(Error, match="batches: 0 for 1 processes; each needs one at least"):
        learn(Toy(), [])


def test_nothing_to_train_is_said(llama: PreTrainedModel) -> None:
    method = sparing.parse("unified-layer-skipping:S=2")
    with pytest.raises(Error, match="fit unified-layer-skipping: no parameter is left to train"):
        finetune(llama, method, [_answered()], trains=lambda name: False, progress=False)


# --------------------------------------------------------------------------- interrupted and resumed


class Killed(Exception):
    pass


def interrupted(objective: Objective, step: int) -> Objective:
    """The same objective, which is killed in the forward of this step."""
    forward, left = objective.forward, [step]

    @functools.wraps(forward)
    def fails(batch: Batch) -> Tensor:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return forward(batch)

    objective.forward = fails  # type: ignore[method-assign]
    return objective


@pytest.mark.parametrize("kills", [(5,), (1, 1, 2), (0, 11)])
def test_a_resumed_training_is_bitwise_one_that_never_stopped(tmp_path: Path, kills: tuple[int, ...]) -> None:
    """Twelve steps with dropout; killed in the middle, some steps after the last start."""
    whole = learn(Toy(), epochs=3)
    for kill in kills:
        with pytest.raises(Killed):
            learn(interrupted(Toy(), kill), epochs=3, checkpoint=tmp_path / "deep" / "er", every=0)
    again = Toy()
    assert equal(learn(again, epochs=3, checkpoint=tmp_path / "deep" / "er", every=0), whole)
    assert [step for *_, step in again.seen] == list(range(sum(kills), 12))  # and nothing was done twice


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    first = learn(Toy(), checkpoint=tmp_path)
    again = Toy(seed=5)  # another start, overwritten by what was learned
    assert equal(learn(again, checkpoint=tmp_path), first) and again.seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["fit-toy.pt"]


def test_steps_between_checkpoints_are_done_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        learn(interrupted(Toy(), 3), checkpoint=tmp_path, every=3600)
    assert list(tmp_path.iterdir()) == []
    assert equal(learn(Toy(), checkpoint=tmp_path, every=3600), learn(Toy()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: {"epochs": 2}, "steps 4, now 8"),
        (lambda: {"batches": data(5)}, "steps 4, now 5, data "),
        (lambda: {"batches": data(seed=2)}, r"data '\w+', now '\w+'"),
        (lambda: {"lr": 0.5}, "lr 0.02, now 0.5"),
        (lambda: {"warmup": 0.5}, "warmup 0.03, now 0.5"),
        (lambda: {"weight_decay": 0.1}, "weight_decay 0.0, now 0.1"),
        (lambda: {"clip": 2}, "clip 1.0, now 2"),
        (lambda: {"objective": Toy(out=3), "batches": data(out=3)}, "other tensors"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, change: Callable[[], dict[str, Any]], words: str
) -> None:
    learn(Toy(), checkpoint=tmp_path)
    before = (tmp_path / "fit-toy.pt").read_bytes()
    with pytest.raises(Error, match=rf"fit-toy.pt': is of another training \(.*{words}.*\); delete it") as caught:
        learn(**{"objective": Toy(), "checkpoint": tmp_path, **change()})
    assert "\n" not in str(caught.value)
    assert (tmp_path / "fit-toy.pt").read_bytes() == before


def test_a_checkpoint_of_another_method_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    batch = _answered()
    fit = lambda S: sparing.parse(f"unified-layer-skipping:S={S}").fit(  # noqa: E731
        llama, [batch], progress=False, checkpoint=tmp_path
    )
    fit(2)
    with pytest.raises(Error, match=r"another training \(method .*'S': 2,.*now .*'S': 3"):
        fit(3)


def _without(key: str) -> Callable[[Path], None]:
    def act(file: Path) -> None:
        held = torch.load(file, weights_only=True)
        del held[key]
        torch.save(held, file)

    return act


def _flip(file: Path) -> None:
    """Some bytes in the middle, where the tensors lie."""
    content = bytearray(file.read_bytes())
    place = content.index(torch.load(file, weights_only=True)["learned"]["weight"].numpy().tobytes())
    content[place : place + 8] = b"\xff" * 8
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-200]),
        lambda file: file.write_bytes(b"\x80\x04 no checkpoint"),
        lambda file: torch.save([1, 2], file),
        lambda file: torch.save(nn.Linear(2, 2), file),  # a pickle that would run code
        _without("what"),
        _without("rng"),
        _without("optimizer"),
        _without("step"),
        _flip,
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    learn(Toy(), checkpoint=tmp_path)
    damage(tmp_path / "fit-toy.pt")
    with pytest.raises(Error, match=r"fit-toy.pt': is damaged \(.*\); delete it to start again"):
        learn(Toy(), checkpoint=tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match=r"checkpoint = '.*file/below': cannot be written to \(Not a directory\)"):
        learn(Toy(), checkpoint=tmp_path / "file" / "below", every=0)


# --------------------------------------------------------------------------- fine-tuning with a method attached


def _answered(name: str = "llama") -> dict[str, Tensor]:
    batch = prompt(name, (9, 9), side="none")
    width = batch["input_ids"].shape[1]
    batch["labels"] = torch.where(torch.arange(width) >= width - 5, batch["input_ids"], -100)
    return batch


def test_finetune_gives_back_the_trained_weights_and_no_others(llama: PreTrainedModel) -> None:
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    method = sparing.parse("unified-layer-skipping:S=2")
    chosen = lambda name: "layers.3." in name  # noqa: E731
    got = finetune(llama, method, [_answered()], trains=chosen, progress=False, epochs=2, lr=1e-2)
    own = dict(llama.named_parameters())
    assert set(got) == {f"weight.{name}" for name in own if "layers.3." in name}
    assert all(got[f"weight.{k}"].shape == v.shape for k, v in own.items() if "layers.3." in k)
    assert not any(torch.equal(t, own[k.removeprefix("weight.")]) for k, t in got.items())
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items()) and not llama.training


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "unified-layer-skipping:S=2"), ("llava", "hidrop:inject=2,filters=3,keeps=7,of=16,exit=6")],
)
def test_methods_that_finetune_hold_weights_by_the_models_names(name: str, method: str) -> None:
    model = build(name)
    fitted = sparing.parse(method).fit(model, [_answered(name)], progress=False)
    own = dict(model.named_parameters())
    trained = {k for k in own if not any(part in k for part in ("embed_tokens", "vision_tower"))}
    weights = {k.removeprefix("weight.") for k in fitted.state if k.startswith("weight.")}
    assert weights == trained
    assert all(fitted.state[f"weight.{k}"].shape == own[k].shape for k in trained)


def test_finetune_resumes_bitwise(llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparing.engine.train import _Finetuning

    method = sparing.parse("unified-layer-skipping:S=2")
    fit = lambda **more: method.fit(llama, [_answered()], epochs=4, lr=1e-3, progress=False, **more).state  # noqa: E731
    whole = fit()
    real, left = _Finetuning.forward, [2]

    def fails(self: _Finetuning, batch: Batch) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(_Finetuning, "forward", fails)
        with pytest.raises(Killed):
            fit(checkpoint=tmp_path, every=0)
    assert equal(dict(fit(checkpoint=tmp_path, every=0)), dict(whole))


# --------------------------------------------------------------------------- several processes

TWO = """
    import os, sys
    import torch
    from torch import nn
    from sparing.engine.train import Objective, Training, train

    class Toy(Objective):
        def __init__(self):
            super().__init__(nn.Linear(6, 6).requires_grad_(False))
            self.weight = nn.Parameter(torch.zeros(2, 6))
            self.register_buffer("mean", torch.zeros(()))
            self.losses = []

        def forward(self, batch):
            loss = (nn.functional.linear(self.model(batch["x"]), self.weight) - batch["y"]).square().mean()
            self.losses.append(loss.item())
            return loss

        def after_step(self, step):
            self.mean.add_(self.losses[-1])

    torch.manual_seed(0)
    toy = Toy()
    data = [{"x": torch.randn(4, 6), "y": torch.randn(4, 2)} for _ in range(5)]
    learned = train(toy, data, Training(epochs=2, progress=False), lr=0.05, name="two")
    torch.save({**learned, "losses": toy.losses}, os.path.join(sys.argv[1], f"{os.environ['RANK']}.pt"))
"""


@pytest.mark.slow
def test_two_processes_learn_as_one_that_sees_both_batches(tmp_path: Path) -> None:
    """Each takes every other batch; gradients, and what is learned without one, are averaged."""
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(zero["weight"], one["weight"]) and torch.equal(zero["mean"], one["mean"])
    assert all(map(math.isfinite, zero["losses"] + one["losses"])) and zero["losses"] != one["losses"]
    assert len(zero["losses"]) == 4  # five batches: the last one is nobody's

    class Both(Objective):
        """One process that takes the mean of the two losses."""

        def __init__(self) -> None:
            super().__init__(nn.Linear(6, 6).requires_grad_(False))
            self.weight = nn.Parameter(torch.zeros(2, 6))

        def forward(self, batch: Batch) -> Tensor:
            out = nn.functional.linear(self.model(batch["x"]), self.weight)
            return (out - batch["y"]).square().mean()

    torch.manual_seed(0)
    both = Both()
    rows = [{"x": torch.randn(4, 6), "y": torch.randn(4, 2)} for _ in range(5)]
    pairs = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in ((rows[0], rows[1]), (rows[2], rows[3]))]
    learned = train(both, pairs, Training(epochs=2, progress=False), lr=0.05, name="one")
    torch.testing.assert_close(zero["weight"], learned["weight"], rtol=1e-5, atol=1e-6)
    total = [sum(pair) / 2 for pair in zip(zero["losses"], one["losses"])]
    assert float(zero["mean"]) == pytest.approx(sum(total), rel=1e-4)
