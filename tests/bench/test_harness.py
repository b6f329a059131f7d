"""lm-eval's tasks: the score of lm-eval alone, methods that act on what is generated, local files, what is refused."""

import copy
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LlamaForCausalLM

import sparing
from sparing.bench import harness, tasks, timing
from sparing.bench.compare import compare
from sparing.bench.harness import Harness, language_model
from sparing.bench.models import Loaded
from sparing.grid.method import Error

SKIPPING = "unified-layer-skipping:S=2"

CHOICE = """
task: colours
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""

ROLLING = """
task: prose
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""

ANSWER = """
task: answers
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
num_fewshot: 1
fewshot_config: {split: test, doc_to_target: "{{label}}"}
fewshot_delimiter: ";"
target_delimiter: ""
generation_kwargs: {until: ["zzz"], max_gen_toks: 3}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - name: whole
    filter: [{function: take_first}]
  - name: start
    filter: [{function: regex, regex_pattern: "^(.)"}, {function: take_first}]
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A task file with its documents: six questions of different lengths, one longer than the model can hold."""
    lines = []
    for index in range(6):
        question = f"{index}: " + "which colour is it " * (index + 1 if index < 5 else 8)
        # of two bytes a choice, or of one: those share a pass
        choices = [" a", " b", " c"] if index % 2 else [" red", " yellow", " blue!", " white and grey"]
        lines.append({"question": question, "choices": choices, "label": index % 3, "answer": "?"})

    def file(text: str = CHOICE, answers: list[str] | None = None, name: str = "task.yaml") -> Path:
        for line, answer in zip(lines, answers or [], strict=False):
            line["answer"] = answer
        (tmp_path / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = {"data_files": {"test": "documents.jsonl"}, "cache_dir": str(tmp_path / "cache")}
        path = tmp_path / name
        path.write_text(f"dataset_path: json\ndataset_kwargs: {json.dumps(source)}\ntest_split: test\n{text.lstrip()}")
        return path

    return file


def alone(loaded: Loaded, path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What lm-eval reports with its own model and nothing of ours."""
    monkeypatch.chdir(path.parent)
    model = HFLM(pretrained=loaded.model, tokenizer=copy.deepcopy(loaded.tokenizer), batch_size=4)
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    name = next(line.split()[1] for line in path.read_text().splitlines() if line.startswith("task:"))
    found = simple_evaluate(model=model, tasks=[name], task_manager=manager, log_samples=False)
    return found["results"][name]


def stepwise(model: LlamaForCausalLM, context: list[int], continuation: list[int]) -> float:
    """Log-probability of a continuation by prefill and then one token at a time through the cache."""
    total, cache, ids = 0.0, None, context
    for token in continuation:
        with torch.no_grad():
            out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        total += torch.log_softmax(out.logits[0, -1].double(), -1)[token].item()
        cache, ids = out.past_key_values, [token]
    return total


def asked(*pairs: tuple[str, str]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


# ----------------------------------------------------------------------------------------------------- dense scores


def test_choices_score_as_in_lm_eval_alone(reader: Loaded, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    task = tasks.parse(f"lm-eval:{path}", reader)
    assert (task.metric, task.higher_is_better, task.calibrates, task.visual) == ("acc", True, False, False)
    score, theirs = task.evaluate(reader.model), alone(reader, path, monkeypatch)
    assert score == theirs["acc,none"] and 0 < score < 1
    assert task.details(score) == {key: theirs[f"{key},none"] for key in ("acc_stderr", "acc_norm", "acc_norm_stderr")}
    assert task.details(score, limit=3) == {}


def test_running_text_scores_as_in_lm_eval_alone(reader: Loaded, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(ROLLING)
    task = Harness(reader, str(path))
    assert (task.metric, task.higher_is_better) == ("bits_per_byte", False)
    score, theirs = task.evaluate(reader.model), alone(reader, path, monkeypatch)
    assert score == theirs["bits_per_byte,none"] > 0
    assert task.details(score) == {"byte_perplexity": theirs["byte_perplexity,none"]}


def test_answers_score_as_in_lm_eval_alone(reader: Loaded, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(ANSWER, ["aaa"] * 6)
    texts = language_model(reader).generate_until([
        Instance("generate_until", {}, (request.args[0], request.args[1]), 0)
        for request in _requests(Harness(reader, str(path)))
    ])  # fmt: skip
    path = write(ANSWER, [text if index % 2 else text + "!" for index, text in enumerate(texts)])
    task = Harness(reader, str(path))
    assert task.metric == "exact_match,whole"
    score, theirs = task.evaluate(reader.model), alone(reader, path, monkeypatch)
    assert score == theirs["exact_match,whole"] == 0.5
    assert task.details(score)["exact_match,start"] == theirs["exact_match,start"]


def _requests(task: Harness) -> list[Instance]:
    task._prompts(6)
    return list(task._task.instances)


def test_every_loglikelihood_is_lm_evals(reader: Loaded) -> None:
    requests = asked(
        ("abc", "d"), ("abc", "e"), ("a longer one", " of these"), ("", "no context"), ("x" * 120, "y" * 90)
    )
    theirs = HFLM(pretrained=reader.model, tokenizer=copy.deepcopy(reader.tokenizer), batch_size=4)
    assert language_model(reader).loglikelihood(requests) == [
        (pytest.approx(value, abs=1e-5), greedy) for value, greedy in theirs.loglikelihood(requests)
    ]


# ------------------------------------------------------------------------------------------------------ with methods


def test_one_pass_is_prefill_and_cached_decoding(reader: Loaded) -> None:
    """Unequal lengths, one cut from the left, one token more or less, and the same tokens with another prompt."""
    requests = asked(
        ("which colour is it", " yellow and white"),
        ("no", " b"),
        ("no", " c"),
        ("abcd", "efgh"),
        ("ab", "cdefgh"),
        ("w" * 120, "x" * 30),
        ("", "without context"),
    )
    with sparing.attach(reader.model, sparing.parse(SKIPPING)) as run:
        said = language_model(reader, run, batch=3).loglikelihood(requests)
        assert run.prompt is None and run.trace.share("depth") < 1
    lm, most = language_model(reader), reader.model.config.max_position_embeddings
    dense = lm.loglikelihood(requests)
    for request, (score, _), (full, _) in zip(requests, said, dense, strict=True):
        context, continuation = request.args
        pair = lm._encode_pair(context, continuation) if context else ([0], lm.tok_encode(continuation)[1:])
        kept = [*pair[0], *pair[1]][-most - 1 :]
        with sparing.attach(reader.model, sparing.parse(SKIPPING)):
            expected = stepwise(reader.model, kept[: -len(pair[1])], pair[1])
        assert score == pytest.approx(expected, abs=1e-3)
        # the first token comes from the prompt, which runs all layers
        assert (abs(score - full) > 1e-2) == (len(pair[1]) > 1)


def test_a_method_acts_and_leaves(reader: Loaded, write: Write) -> None:
    task = Harness(reader, str(write(ROLLING)))
    dense = task.evaluate(reader.model, limit=5)
    with sparing.attach(reader.model, sparing.parse(SKIPPING)) as run:
        skipped = task.evaluate(reader.model, run, limit=5)
        assert run.trace.share("depth") < 0.6 and run.prompt is None
        assert sum(cells.tokens for cells in run.trace.cells) == sum(4 + 19 * (index + 1) for index in range(5))
    assert abs(skipped - dense) > 1e-3
    assert task.evaluate(reader.model, limit=5) == dense


def test_generation_goes_through_generate(reader: Loaded, write: Write) -> None:
    task = Harness(reader, str(write(ANSWER)))
    with sparing.attach(reader.model, sparing.parse(SKIPPING)) as run:
        run.prompt = 3
        task.evaluate(reader.model, run, limit=2)
        assert run.trace.share("depth", "prefill") == 1 and run.trace.share("depth", "decode") == 0.5
        assert run.prompt == 3


def test_compare_measures_on_it(reader: Loaded, write: Write, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("what can be read elsewhere\n" * 400)
    spec = f"lm-eval:{write(ROLLING)},calibration={tmp_path}/other.txt"
    rows = compare(
        reader.model,
        spec,
        ["unified-layer-skipping", "flap"],
        [0.5],
        repeats=0,
        limit=4,
        controls=False,
        processor=reader.tokenizer,
        progress=False,
    )
    assert [(row["method"], row["status"]) for row in rows] == [
        ("dense", "ok"),
        ("unified-layer-skipping", "ok"),
        ("flap", "ok"),
    ]
    assert {row["metric"] for row in rows} == {"bits_per_byte"} and {row["task"] for row in rows} == {spec}
    assert len({row["quality"] for row in rows}) == 3
    assert all("byte_perplexity" in row["details"] for row in rows)
    assert rows[1]["cells"] == 0.5 and 0.3 < rows[2]["cells"] < 0.7


# --------------------------------------------------------------------------------------------------------- the rest


def test_prompts_are_the_documents(reader: Loaded, write: Write) -> None:
    task = Harness(reader, str(write()))
    batch = task.inputs()
    assert batch["input_ids"].shape == batch["attention_mask"].shape and len(batch["input_ids"]) == 4
    for index, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        assert reader.tokenizer.decode(ids[mask.bool()][1:]) == f"{index}: " + "which colour is it " * (index + 1)
        assert not mask[: -int(mask.sum())].any()
    assert timing.generation(reader.model, batch)["decode"] > 0
    assert task.sized(300, 5)["input_ids"].shape == (5, 300)
    assert len(task.sized(20, 3)["input_ids"].unique(dim=0)) == 3
    text = Harness(reader, str(write(ROLLING))).inputs()["attention_mask"]
    assert text.sum(1).tolist() == [(1 + 3 + 19 * (index + 1)) // 2 for index in range(4)]


def test_calibration_is_another_text(reader: Loaded, write: Write, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("b" * 4096)
    path = write()
    task = tasks.parse(f"lm-eval:{path},calibration={tmp_path}/other.txt", reader)
    assert task.calibrates and next(iter(task.batches(1)))["input_ids"].shape == (8, 512)
    with pytest.raises(Error, match="calibration=FILE"):
        Harness(reader, str(path)).batches(1)
    with pytest.raises(Error, match=r"flap.*has to be fitted.*task\.yaml,calibration=OTHER"):
        compare(reader.model, f"lm-eval:{path}", ["flap"], processor=reader.tokenizer)


def test_progress_limit_and_silence(reader: Loaded, write: Write, capfd: pytest.CaptureFixture[str]) -> None:
    task, seen = Harness(reader, str(write()), batch=2), []
    task.evaluate(reader.model, limit=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(set(seen)) and seen[-1] == (11, 11)  # of 4, 3 and 4 choices
    for text in (ROLLING, ANSWER):
        seen.clear()
        Harness(reader, str(write(text))).evaluate(
            reader.model, progress=lambda done, total: [seen.append((done, total)), print("heard")]
        )
        assert seen == sorted(set(seen)) and seen[-1][0] == seen[-1][1] >= 6
    out, err = capfd.readouterr()
    assert set(out.split()) == {"heard"} and err == ""


def test_nothing_of_the_users_changes(reader: Loaded, write: Write) -> None:
    tokenizer = copy.deepcopy(reader.tokenizer)
    tokenizer.pad_token = None
    loaded = Loaded("tiny", copy.deepcopy(reader.model).train(), None, tokenizer)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    task = Harness(loaded, str(write(ANSWER)))
    assert task.evaluate(loaded.model, limit=2) == task.evaluate(loaded.model, limit=2)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert (
        loaded.model.training
        and tokenizer.pad_token is None
        and tokenizer.padding_side == reader.tokenizer.padding_side  # lm-eval pads on the left for a while
    )


# ------------------------------------------------------------------------------------------------------------ errors


def test_an_unknown_name_is_answered_with_the_nearest(
    reader: Loaded, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    (tmp_path / "group.yaml").write_text("group: colour\ntask: [colours]\n")
    # the real catalogue takes many seconds to read
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(harness, "_catalogue", lambda: manager)
    with pytest.raises(Error, match=r"task = 'lm-eval:colour5': .*no task of that name; did you mean colours?"):
        tasks.parse("lm-eval:colour5", reader)
    with pytest.raises(Error, match="`lm_eval ls tasks` lists them"):
        tasks.parse("lm-eval:#", reader)
    with pytest.raises(Error, match="'lm-eval:colour': is a group of tasks; name one task, such as colours"):
        tasks.parse("lm-eval:colour", reader)
    with pytest.raises(Error, match=r"none\.yaml': there is no such file"):
        tasks.parse("lm-eval:none.yaml", reader)
    with pytest.raises(Error, match=r"'lm-eval:': must be ppl .* lm-eval:NAME"):
        tasks.parse("lm-eval:", reader)
    monkeypatch.chdir(tmp_path)
    assert tasks.parse("lm-eval:colours", reader).metric == "acc"


@pytest.mark.parametrize(
    "text, complaint",
    [
        (CHOICE + "  - {metric: acc\n", r"line 13: not YAML \("),
        (CHOICE.replace("metric: acc_norm", "metric: accc"), "line 11: lm-eval knows no metric accc"),
        (CHOICE.replace("doc_to_target", "doc_to_traget"), r"line 8: cannot be made \(TypeError.*doc_to_traget"),
        (CHOICE.replace("task: colours", ""), r"cannot be made \(ValueError: .*keys="),
        (CHOICE.replace("multiple_choice", "guessing"), r"line 5: cannot be made \(ValueError: .*guessing"),
        (CHOICE + "unsafe_code: true\n", "runs code that the model writes"),
        (CHOICE.replace(", higher_is_better: true", ", higher_is_better: null"), "whether higher is better"),
    ],
)
def test_a_broken_file_is_named(reader: Loaded, write: Write, text: str, complaint: str) -> None:
    with pytest.raises(Error, match=rf"task = 'lm-eval:.*task\.yaml': .*{complaint}") as caught:
        tasks.parse(f"lm-eval:{write(text)}", reader)
    assert "\n" not in str(caught.value)


def test_missing_documents_are_named(reader: Loaded, write: Write, tmp_path: Path) -> None:
    path = write()
    (tmp_path / "documents.jsonl").unlink()
    with pytest.raises(Error, match=r"cannot be made \(FileNotFoundError: .*documents\.jsonl"):
        tasks.parse(f"lm-eval:{path}", reader)


@pytest.mark.parametrize("problem", [ConnectionError("Couldn't reach 'some/set' on the Hub"), TimeoutError("too slow")])
def test_no_network_is_said(reader: Loaded, write: Write, monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise problem

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(Error, match=r"its data set has to be downloaded and cannot be reached \(.*(Hub|slow)"):
        tasks.parse(f"lm-eval:{write()}", reader)


@pytest.mark.parametrize("missing", ["lm_eval.models.huggingface", "lm_eval"])
def test_without_lm_eval(reader: Loaded, write: Write, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(Error, match=r'needs lm-eval .*pip install "sparing\[lm-eval\]"'):
        tasks.parse(f"lm-eval:{write()}", reader)
