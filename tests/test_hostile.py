"""Folders from strangers are data: nothing in them runs, nothing outside them is read, and what is wrong is named."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sparing
from sparing.bench.models import load_model
from sparing.engine.surgery import LayerCut, Plan, cut
from sparing.grid import files
from sparing.testing.models import LAYERS, build, prompt

HIDDEN = 32


def refuses(act: Callable[[], Any], *words: str) -> str:
    with pytest.raises(sparing.Error) as caught:
        act()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


def change(file: Path, act: Callable[[Any], Any]) -> None:
    """A JSON file with some of it changed."""
    data = json.loads(file.read_text())
    act(data)
    file.write_text(json.dumps(data))


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(shape: list[int], span: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


# --------------------------------------------------------------------------- safetensors and JSON


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("cut off", "0 bytes")),
        (b"short", ("cut off",)),
        (packed({}, length=1 << 63), ("cut off", "9,223,372,036,854,775,808")),
        (packed(b'{"a":' * 1000), ("nested too deeply",)),
        (packed(b"[1]"), ("must hold a JSON object",)),
        (packed(b'{"a": 1, "a": 2}'), ("'a' twice",)),
        (packed({"a": one([10**15], [0, 4 * 10**15])}), ("cut off", "4,000,000,000,000,000")),
        (packed({"a": one([10**15], [0, 16])}, b"0" * 16), ("'a' is F32 1000000000000000", "[0, 16]")),
        (packed({"a": one([4], [0, 16]), "b": one([4], [0, 16])}, b"0" * 16), ("'b' begins at byte 0", "expected 16")),
        (packed({"a": one([4], [8, 24])}, b"0" * 24), ("'a' begins at byte 8",)),
        (packed({"a": one([4], [0, 16])}, b"0" * 9), ("cut off", "16 bytes, 9 there")),
        (packed({"a": one([4], [0, 16])}, b"0" * 20), ("longer than it says",)),
        (packed({"a": one([-1], [0, 4])}, b"0" * 4), ("'a' has shape [-1]",)),
        (packed({"a": one([1.0], [0, 4])}, b"0" * 4), ("'a' has shape [1.0]",)),  # type: ignore[list-item]
        (packed({"a": one([1], [0, 1], "Q9")}, b"0"), ("'a' has dtype 'Q9'", "BF16")),
        (packed({"a": one([1], [0, 8], "C64")}, b"0" * 8), ("'a' has dtype C64", "allowed are")),
        (packed({"a": {"dtype": "F32"}}), ("'a' must say dtype, shape and data_offsets",)),
        (packed({"a": one([1], [0, 1], "BOOL")}, b"\7"), ("'a' holds bytes that are neither true nor false",)),
        (packed({"a": one([1], [0, 4])}, struct.pack("<f", float("nan"))), ("'a' (1) holds NaN",)),
        (packed({"a": one([1], [0, 4])}, struct.pack("<f", float("-inf"))), ("'a' (1) holds NaN or infinity",)),
        (pickle.dumps({"a": 1}), ("no safetensors file",)),
    ],
)
def test_tensors_are_checked_before_they_are_read(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    file = tmp_path / "state.safetensors"
    file.write_bytes(content)
    refuses(lambda: files.read_tensors(file), str(file), *words)


def test_what_is_right_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(True), "c": torch.zeros(0, 5).bfloat16(), "d": torch.arange(3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = files.read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], v) for k, v in tensors.items())
    assert files.read_header(tmp_path / "x.safetensors")["a"] == ("F32", (3, 4), 48)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_finite(dtype: torch.dtype, number: float) -> None:
    tensor = torch.ones(5, 7)
    assert files.finite(tensor.to(dtype)) and files.finite(tensor[:0].to(dtype))
    tensor[3, 2] = number
    if dtype != torch.float8_e4m3fn or number != number:  # it has NaN and no infinity
        assert not files.finite(tensor.to(dtype))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", ("is not JSON",)),
        (b"\xff\xfe\xfa", ("is not JSON",)),
        (b"[]", ("must hold a JSON object, holds list",)),
        (b'{"a":' * 100_000, ("nested too deeply",)),
        (b'{"a":' * 50 + b"1" + b"}" * 50, ("nested too deeply", "48 levels")),
        (b'{"a": {"b": 1, "b": 2}}', ("'b' twice",)),
        (b'{"a": 1' + b"0" * 5000 + b"}", ("is not JSON",)),
        (b'{"a": "' + b"x" * files.JSON_CAP + b'"}', ("at most 8,388,608 are read",)),
    ],
)
def test_json_is_small_flat_and_without_doubles(tmp_path: Path, text: bytes, words: tuple[str, ...]) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(text)
    refuses(lambda: files.read_json(file), str(file), *words)


def test_nothing_outside_a_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("{}")
    for name in ("../secret", str(tmp_path / "secret"), "..", ".", "", "a/b", "a\\b", "a\0b"):
        refuses(lambda name=name: files.inside(folder, name), "no plain file name")
    (folder / "link").symlink_to("../secret")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nothing")
    (folder / "below").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "good").write_text("{}")
    (folder / "near").symlink_to("good")
    refuses(lambda: files.inside(folder, "link"), "is a link out of its folder", str(tmp_path / "secret"))
    refuses(lambda: files.no_way_out(folder), "folder/l")
    for name, words in (("loop", ""), ("dangling", "not a regular"), ("below", "not a regular"), ("pipe", "not a reg")):
        refuses(lambda name=name: files.inside(folder, name), name, words)
    refuses(lambda: files.inside(folder, "gone"), "gone: is missing")
    assert files.inside(folder, "near") == folder / "near"


# --------------------------------------------------------------------------- method folders


@pytest.fixture(scope="module")
def _fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    batches = [prompt("llama", (9, 9, 9), side="none", seed=seed) for seed in (5, 6)]
    return sparing.parse("flap:p=0.5").fit(build("llama"), batches).save(tmp_path_factory.mktemp("fitted") / "flap")


@pytest.fixture
def fitted(_fitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_fitted, tmp_path / "flap"))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda d: d.update(run="rm"), ("holds 'run'", "known are method, fields, model, state")),
        (lambda d: d.pop("fields"), ("not a method file: fields is missing",)),
        (lambda d: d.update(method=["flap"]), ("method = ['flap']: must be a string",)),
        (lambda d: d.update(method="flop"), ("'flop'", "did you mean flap")),
        (lambda d: d.update(method="\x1b[2J" + "x" * 9999), ("'\\x1b[2Jxxx", "…")),
        (lambda d: d.update(fields=[1]), ("fields = [1]: must be an object",)),
        (lambda d: d["fields"].update({"\x1b[2J": 1}), ("flap has no field '\\x1b[2J'",)),
        (lambda d: d["fields"].update(p="half"), ("flap: p = 'half': must be a number in [0, 1]",)),
        (lambda d: d["fields"].update(p={"a": 1}), ("p = {'a': 1}",)),
        (lambda d: d["fields"].update(p=10**4000), ("p = 1000", "…: must be")),
        (lambda d: d["fields"].update(p=float("nan")), ("p = nan",)),
        (lambda d: d["fields"].update(multiple=True), ("multiple = True: must be a whole number",)),
        (lambda d: d["model"].update(layers="six"), ("'layers' = 'six'",)),
        (lambda d: d["model"].update(eyes=2), ("'eyes' = 2",)),
        (lambda d: d["state"].update({"mlp.mean.0": "float32 99"}), ("'mlp.mean.0' is float32 48", "float32 99")),
        (lambda d: d["state"].update({"mlp.mean.99": "float32 48"}), ("'mlp.mean.99' is missing",)),
        (lambda d: d["state"].pop("mlp.mean.0"), ("'mlp.mean.0' is float32 48", "no such tensor")),
    ],
)
def test_a_method_file_holds_what_save_writes(fitted: Path, act: Callable[[Any], Any], words: tuple[str, ...]) -> None:
    assert sparing.load(fitted).state
    change(fitted / "method.json", act)
    message = refuses(lambda: sparing.load(fitted), *words)
    assert str(fitted) in message and "\x1b" not in message and len(message) < 600


def test_a_method_folder_is_read_from_itself_only(fitted: Path, tmp_path: Path) -> None:
    state = fitted / "state.safetensors"
    state.rename(tmp_path / "elsewhere")
    refuses(lambda: sparing.load(fitted), "state.safetensors: is missing")
    state.symlink_to(tmp_path / "elsewhere")
    refuses(lambda: sparing.load(fitted), "is a link out of its folder")
    state.unlink()
    os.mkfifo(state)
    refuses(lambda: sparing.load(fitted), "is not a regular file")


def test_a_pickle_beside_a_method_is_never_opened(fitted: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name in ("state.pt", "state.bin", "state.pkl", "state.ckpt", "pytorch_model.bin"):
        (fitted / name).write_bytes(pickle.dumps(_Marks(mark)))
    assert sparing.load(fitted).state
    (fitted / "state.safetensors").write_bytes((fitted / "state.pt").read_bytes())
    refuses(lambda: sparing.load(fitted), "no safetensors file")
    assert not mark.exists()


def test_folders_of_older_versions_load(fitted: Path) -> None:
    change(fitted / "method.json", lambda d: (d.pop("state"), d.pop("model")))
    assert sparing.load(fitted).state and sparing.load(fitted).fitted_on == {}
    (fitted / "state.safetensors").unlink()
    assert not sparing.load(fitted).ready


def test_saving_leaves_no_state_of_another_method(fitted: Path) -> None:
    method = sparing.parse("fastv")
    assert sparing.load(method.save(fitted)) == method
    assert [path.name for path in fitted.iterdir()] == ["method.json"]
    (fitted / "file").write_text("x")
    refuses(lambda: method.save(fitted / "file" / "below"), "cannot be written to", "Not a directory")


# --------------------------------------------------------------------------- fitted on another model


def test_fit_notes_the_model(_fitted: Path) -> None:
    method = sparing.load(_fitted)
    want = {"layers": LAYERS, "heads": 4, "KV groups": 2, "channels a head": 8, "hidden": HIDDEN, "neurons": 48}
    assert method.fitted_on == want == method.replace(p=0.3).fitted_on
    assert method.control("random", sparing.shape(build("llama"))).fitted_on == want


def test_sizes_of_another_model_are_refused() -> None:
    state = {"weight.model.norm.weight": torch.ones(HIDDEN)}
    method = sparing.parse("unified-layer-skipping").with_state(state, {"layers": 32, "hidden": HIDDEN})
    refuses(lambda: sparing.attach(build("llama"), method), "'unified-layer-skipping'", "layers = 32", "has 6")
    with sparing.attach(build("llama"), method.with_state(state, {"layers": LAYERS})):
        pass


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"weight.model.norm.weight": torch.ones(7)}, ("weight.model.norm.weight is 7", "has 32")),
        ({"weight.model.nrm.weight": torch.ones(32)}, ("weight.model.nrm.weight", "no such parameter")),
    ],
)
def test_trained_weights_of_another_model_are_refused(state: dict[str, torch.Tensor], words: tuple[str, ...]) -> None:
    method = sparing.parse("unified-layer-skipping").with_state(state)
    refuses(lambda: sparing.attach(build("llama"), method), "trained on another model", *words)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda s: s.pop("mlp.var.3"), ("has no mlp.var.3",)),
        (lambda s: s.pop("mlp.unit.0"), ("has no mlp.unit.0",)),
        (lambda s: [s.pop(k) for k in list(s) if k.endswith(".5")], ("has no attention.mean.5", "6 layers")),
        (lambda s: s.update({"mlp.mean.6": torch.ones(48)}), ("its state has mlp.mean.6", "6 layers")),
        (lambda s: s.update({"mlp.mean.0": torch.ones(51)}), ("mlp.mean.0 has 51 channels, the model has 48",)),
        (lambda s: s.update({"mlp.norm.1": torch.tensor(1.0)}), ("mlp.norm.1 has the shape ()",)),
        (lambda s: s.update({"attention.unit.0": torch.tensor([0, 5])}), ("attention.unit.0", "[0, 5]", "[16, 1536]")),
    ],
)
@pytest.mark.parametrize("name", ["flap", "uniform-width:groups=1,neurons=16", "random-width:groups=1,neurons=16"])
def test_calibration_of_another_model_is_refused(
    _fitted: Path, name: str, act: Callable[[Any], Any], words: tuple[str, ...]
) -> None:
    state, model = dict(sparing.load(_fitted).state), build("llama")
    sparing.prune(model, sparing.parse(name).with_state(state))
    act(state)
    method = sparing.parse(name).with_state(state)
    for run in (lambda: sparing.prune(model, method), lambda: sparing.attach(model, method)):
        refuses(run, f"method = '{method.name}'", "fitted on another model", *words)


def test_calibration_on_other_sizes_is_refused(_fitted: Path) -> None:
    refuses(lambda: sparing.prune(build("qwen3"), sparing.load(_fitted)), "attention.mean.0 has 32 channels", "has 64")


# --------------------------------------------------------------------------- checkpoint folders


class _Marks:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def _plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "plain"
    build("llama").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture
def plain(_plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_plain, tmp_path / "plain"))


@pytest.fixture(scope="module")
def _small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = Plan((LayerCut(torch.tensor([1]), torch.arange(16)), *[LayerCut()] * (LAYERS - 1)))
    return sparing.save_pretrained(cut(build("llama"), plan), tmp_path_factory.mktemp("cut") / "small")


def test_pickled_weights_are_never_opened(plain: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (plain / "pytorch_model.bin").write_bytes(pickle.dumps(_Marks(mark)))
    sparing.from_pretrained(plain)
    (plain / "model.safetensors").unlink()
    refuses(lambda: sparing.from_pretrained(plain), "pytorch_model.bin", "only safetensors", "save_pretrained")
    refuses(lambda: load_model(str(plain)), "pytorch_model.bin")
    (plain / "pytorch_model.bin").unlink()
    refuses(lambda: sparing.from_pretrained(plain), "model.safetensors is missing")
    assert not mark.exists()


def test_code_of_a_checkpoint_never_runs(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')\nclass C: pass\n"
    (plain / "evil.py").write_text(code)
    (plain / "custom_generate").mkdir()
    (plain / "custom_generate" / "generate.py").write_text(code)
    names = {kind: "evil.C" for kind in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForImageTextToText")}
    change(plain / "config.json", lambda c: c.update(auto_map=names))
    model = sparing.from_pretrained(plain)  # a kind that transformers knows: the map is data
    assert type(model).__module__.startswith("transformers.")
    refuses(lambda: sparing.from_pretrained(plain, trust_remote_code=True), "trust_remote_code = True")
    change(plain / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil.C", None]}))
    change(plain / "tokenizer_config.json", lambda c: c.update(tokenizer_class="EvilTokenizer"))
    said = refuses(lambda: load_model(str(plain)).tokenizer, "never run")
    assert "trust_remote_code" not in said  # transformers would advise it
    change(plain / "config.json", lambda c: c.update(model_type="evil"))
    said = refuses(lambda: sparing.from_pretrained(plain), "code in a checkpoint is never run")
    assert "trust_remote_code" not in said
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 10**7}, ("model.embed_tokens.weight is 120x32 in the files, 120x10000000",)),
        ({"vocab_size": 10**12}, ("model.embed_tokens.weight", "1000000000000x32")),
        ({"intermediate_size": 47}, ("model.layers.0.mlp.gate_proj.weight is 48x32 in the files, 47x32",)),
        ({"num_hidden_layers": 10**10}, ("num_hidden_layers = 10000000000", "57 tensors")),
        ({"num_hidden_layers": 5}, ("unexpected keys: model.layers.5",)),
        ({"num_hidden_layers": 7}, ("missing keys: model.layers.6",)),
        ({"num_labels": 10**10}, ("num_labels = 10000000000",)),
        ({"hidden_size": "32"}, ("config.json cannot be used", "hidden_size")),
        ({"hidden_size": -32}, ("-32",)),
        ({"num_attention_heads": 3}, ("not a multiple",)),
        ({"model_type": ["llama"]}, ("config.json cannot be used",)),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, ("do not fit",)),
        ({"attn_implementation": "someone/kernel"}, ("attn_implementation = 'someone/kernel'", "not run")),
        ({"a": [{"_experts_implementation": {"": "a/b"}}]}, ("_experts_implementation", "not run")),
        ({"configuration_files": ["config.4.0.0.json"]}, ("configuration_files", "not read")),
        ({"transformers_weights": "x.safetensors"}, ("transformers_weights", "not read")),
        ({"quantization_config": {"quant_method": "fp8"}, "hidden_size": 10**6}, ("the config asks for",)),
        (
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2**20},
            ("the config asks for", "the files hold 54,176"),
        ),
    ],
)
def test_a_config_that_asks_for_more_than_there_is(
    plain: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    change(plain / "config.json", lambda c: c.update(changes))
    refuses(lambda: sparing.from_pretrained(plain), f"model = {str(plain)!r}", *words)


def test_names_of_classes_are_not_any_name(plain: Path) -> None:
    for name in (["pipeline"], ["BertModel"], ["no"], [1], 7, [], None):
        change(plain / "config.json", lambda c, name=name: c.update(architectures=name))
        assert type(sparing.from_pretrained(plain)).__name__ == "LlamaForCausalLM"


def test_a_folder_does_not_choose_the_attention(plain: Path) -> None:
    change(plain / "config.json", lambda c: c.update(_attn_implementation="flash_attention_2"))
    assert sparing.from_pretrained(plain).config._attn_implementation == "sdpa"
    assert sparing.from_pretrained(plain, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"a":' * 100_000, b'{"a": 1, "a": 1}', b" " * (files.JSON_CAP + 1)])
def test_a_broken_config(plain: Path, text: bytes) -> None:
    (plain / "config.json").write_bytes(text)
    refuses(lambda: sparing.from_pretrained(plain), f"model = {str(plain)!r}: config.json")
    refuses(lambda: sparing.engine.checkpoint.is_cut(plain), "config.json")


def test_links_and_other_weights(plain: Path, tmp_path: Path) -> None:
    weights = plain / "model.safetensors"
    weights.rename(tmp_path / "w")
    weights.symlink_to(tmp_path / "w")
    refuses(lambda: sparing.from_pretrained(plain), "model.safetensors: is a link out of its folder")
    weights.unlink()
    (tmp_path / "w").rename(weights)
    (plain / "tokenizer.json").unlink()
    (plain / "tokenizer.json").symlink_to("/etc/hosts")
    refuses(lambda: sparing.from_pretrained(plain), "tokenizer.json: is a link out of its folder")
    (plain / "tokenizer.json").unlink()
    for name in ("adapter_config.json", "shard-00001-model-00001-of-00001.safetensors"):
        (plain / name).write_text("{}")
        refuses(lambda: sparing.from_pretrained(plain), name)
        (plain / name).unlink()
    for options in ({"use_safetensors": False}, {"variant": "fp16"}, {"gguf_file": "x"}, {"subfolder": ".."}):
        refuses(lambda options=options: sparing.from_pretrained(plain, **options), next(iter(options)))


def test_the_cache_of_the_hub_is_a_folder_too(plain: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(plain, blobs)
    for file in plain.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    sparing.from_pretrained(snapshot)


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("../plain.safetensors", ("'../plain.safetensors' is no plain file name",)),
        ("/tmp/x.safetensors", ("'/tmp/x.safetensors' is no plain file name",)),
        ("x.bin", ("'x.bin' is no .safetensors file",)),
        ("gone.safetensors", ("gone.safetensors: is missing",)),
        ("half.safetensors", ("half.safetensors: is cut off", "do not fit its config")),
        (["a"], ("is no .safetensors file",)),
    ],
)
def test_an_index_points_into_its_folder(plain: Path, tmp_path: Path, shard: Any, words: tuple[str, ...]) -> None:
    names = list(load_file(plain / "model.safetensors"))
    whole = (plain / "model.safetensors").read_bytes()
    (plain / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (plain / "model.safetensors").rename(tmp_path / "plain.safetensors")
    index = plain / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    refuses(lambda: sparing.from_pretrained(plain), *words)


def test_shards_hold_what_their_index_says(plain: Path) -> None:
    model = build("llama")
    (plain / "model.safetensors").unlink()
    model.save_pretrained(plain, max_shard_size="60KB")
    index = plain / "model.safetensors.index.json"
    again = sparing.from_pretrained(plain)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    first, *_, last = sorted(plain.glob("model-*.safetensors"))
    change(index, lambda i: i["weight_map"].update({"model.extra": first.name}))
    refuses(lambda: sparing.from_pretrained(plain), "'model.extra' is in no file")
    change(index, lambda i: (i["weight_map"].pop("model.extra"), i["weight_map"].pop("model.norm.weight")))
    refuses(lambda: sparing.from_pretrained(plain), "'model.norm.weight' is not listed")
    shutil.copy(first, last)
    refuses(lambda: sparing.from_pretrained(plain), "is in another file")
    index.write_text('{"weight_map": []}')
    refuses(lambda: sparing.from_pretrained(plain), "weight_map and metadata must be objects")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_are_finite(plain: Path, number: float) -> None:
    weights = load_file(plain / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 3] = number
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    refuses(lambda: sparing.from_pretrained(plain), "model.layers.2.mlp.up_proj.weight (48x32) holds NaN or infinity")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda s: s.pop("layers"), ("must be an object with version and layers",)),
        (lambda s: s.update(version=[1]), ("has version [1], known is 1",)),
        (lambda s: s.update(layers={"0": {}}), ("must be a list",)),
        (lambda s: s.update(layers=[]), ("layers = []",)),
        (lambda s: s["layers"].pop(), ("has 5 layers, the config 6",)),
        (lambda s: s["layers"].__setitem__(2, None), ("layer 2 = None: must be an object",)),
        (lambda s: s["layers"][1].pop("mlp_bias"), ("layer 1: mlp_bias = None: must be a list of names",)),
        (lambda s: s["layers"][1].update(mlp_bias=[1]), ("layer 1: mlp_bias = [1]",)),
        (lambda s: s["layers"][0].update(intermediate_size=-1), ("layer 0: intermediate_size = -1",)),
        (lambda s: s["layers"][0].update(intermediate_size="9"), ("intermediate_size = '9'",)),
        (lambda s: s["layers"][0].update(intermediate_size=10**11), ("= 100000000000: the config has 48",)),
        (lambda s: s["layers"][0].update(num_key_value_heads=3), ("num_key_value_heads = 3: the config has 2",)),
        (lambda s: s["layers"][0].update(num_attention_heads=9), ("num_attention_heads = 9: the layer has 2",)),
        (lambda s: s["layers"][0].update(experts=5), ("experts = 5: the config has 0",)),
        (lambda s: s["layers"][0].update(attention_bias=["o_proj", "x"]), ("attention_bias = ['o_proj', 'x']",)),
        (lambda s: s["layers"][0].update(intermediate_size=8), ("mlp.gate_proj.weight is 16x32 in the files, 8x32",)),
    ],
)
def test_a_malformed_section_is_refused(
    _small: Path, tmp_path: Path, act: Callable[[Any], Any], words: tuple[str, ...]
) -> None:
    folder = Path(shutil.copytree(_small, tmp_path / "small"))
    change(folder / "config.json", lambda c: act(c["sparing"]))
    refuses(lambda: sparing.from_pretrained(folder), f"model = {str(folder)!r}", *words)


def test_a_section_that_is_none(_small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(_small, tmp_path / "small"))
    change(folder / "config.json", lambda c: c.update(sparing="yes"))
    refuses(lambda: sparing.from_pretrained(folder), "must be an object with version and layers, is 'yes'")


def test_the_page_says_what_the_code_does() -> None:
    page = (Path(__file__).parent.parent / "docs" / "security.md").read_text()
    for number, unit in ((files.JSON_CAP, 20), (files.HEADER_CAP, 20)):
        assert re.search(rf"\b{number >> unit} MiB\b", page)
    assert f"{files.DEPTH_CAP} levels" in page and all(f"`{suffix}`" in page for suffix in files.PICKLES)
