"""`lab:lm`: a small Llama that has learned Python source, trained on one CPU core in an hour.

Twelve even layers, grouped-query attention, tied embeddings: an ordinary `LlamaForCausalLM` of six million weights on
which depth, width, token and attention methods can be compared anywhere, in seconds, without a download.

Shapes: B windows, T tokens, H heads, G key/value heads, D head size, V vocabulary.
"""

import argparse
import json
import math
import random
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)

from sparing.lab.pretrain import pretrain, windows
from sparing.lab.text import HELDOUT, heldout_text, is_stdlib, read, train_files, xz_bits_per_byte

WEIGHTS = Path(__file__).parent / "weights" / "lm"
VOCABULARY = 4096
PAD, BOS, EOS = SPECIAL = ("<pad>", "<bos>", "<eos>")
DEPENDENCY_BYTES = 16_000_000  # as much of the dependencies as an hour can read once

# Words take one leading sign along (" self", "_name", ".join"), a newline takes its indentation along.
PIECES = r"\n+ *|[^\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s"


def build_tokenizer(texts: Iterable[str]) -> TokenizersBackend:
    """Train a byte-level BPE of `VOCABULARY` entries; it decodes to exactly what it encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return TokenizersBackend(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build() -> LlamaForCausalLM:
    """The untrained model: 12 layers of width 192, 8 query and 4 key/value heads of 32, MLP 512, in float32."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=SPECIAL.index(PAD),
            bos_token_id=SPECIAL.index(BOS),
            eos_token_id=SPECIAL.index(EOS),
        )
    )


def load(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The trained model in evaluation mode, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=dtype).eval(), AutoTokenizer.from_pretrained(WEIGHTS)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | None = None,
    limit_bytes: int | None = None,
    window: int = 1024,
    stride: int = 512,
) -> dict[str, float]:
    """Compression of `text` (default: the held-out modules) by windows of `window` tokens every `stride` tokens.

    Every token is scored once, with at least `window - stride` tokens before it wherever the text has them.
    Returns bits per UTF-8 byte, perplexity per token, and the number of bytes and tokens scored.
    """
    if not 0 < stride <= window:
        raise ValueError(f"stride must be in 1..window={window}, got {stride}")
    data = (heldout_text() if text is None else text).encode()[:limit_bytes]
    text = data.decode(errors="ignore")  # a limit may cut a character in two
    ids_T = torch.tensor(tokenizer(text, verbose=False)["input_ids"], device=model.device)
    total = len(ids_T) - 1  # the first token, BOS, is given
    if total < 1:
        raise ValueError("text must hold at least one token, got none")
    nats = 0.0
    for end in range(min(window, total), total + stride, stride):
        end, scored = min(end, total), min(end, total) - (end - stride if end > window else 0)
        start = max(0, end - window)
        logits_TV = model(ids_T[None, start:end], use_cache=False).logits[0, -scored:].float()
        nats += F.cross_entropy(logits_TV, ids_T[end - scored + 1 : end + 1], reduction="sum").item()
    size = len(text.encode())
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / total),
        "bytes": size,
        "tokens": total,
    }


def corpus() -> tuple[list[str], list[str]]:
    """The training texts: the whole standard library, and `DEPENDENCY_BYTES` of the dependencies in a fixed draw."""
    own = [path for path in train_files() if is_stdlib(path)]
    others = sorted(path for path in train_files() if not is_stdlib(path))
    random.Random(0).shuffle(others)
    sizes = accumulate(path.stat().st_size for path in others)
    drawn = [path for path, size in zip(others, sizes, strict=True) if size < DEPENDENCY_BYTES]
    return [read(path) for path in own], [read(path) for path in drawn]


def encode(tokenizer: TokenizersBackend, texts: list[str]) -> Tensor:
    """One long row of token ids: BOS, file, EOS, BOS, file, EOS …"""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    return torch.from_numpy(np.concatenate([[*text.ids, tokenizer.eos_token_id] for text in encoded]))


def train(
    out: str | Path, *, resume: bool = True, minutes: float = 60, threads: int | None = None
) -> tuple[LlamaForCausalLM, TokenizersBackend]:
    """Train tokenizer and model within `minutes` of wall-clock time and write them to `out`/model (see `pretrain`).

    The share of standard-library text grows from a third to all of it, because the held-out text is standard library;
    the last fifth of the time reads windows of 1024 tokens, not 512.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)

    texts = corpus()
    if (out / "model" / "tokenizer.json").exists() and resume:
        tokenizer = TokenizersBackend.from_pretrained(out / "model")
    else:
        tokenizer = build_tokenizer([*texts[0], *texts[1]])
    rows = [encode(tokenizer, part) for part in texts]
    model = build()

    def draw(progress: float, step: int) -> Tensor:
        share = (1 + 2 * progress) / 3
        return windows(rows, 1024 if progress > 0.8 else 512, shares=[share, 1 - share], seed=step)

    def save() -> None:
        export(model, tokenizer, out / "model")

    pretrain(model, out, draw, save, name="lab:lm", minutes=minutes, resume=resume)
    return model, tokenizer


def export(model: LlamaForCausalLM, tokenizer: TokenizersBackend, folder: Path) -> None:
    """Write an ordinary Hugging Face folder with bfloat16 weights."""
    small = build().bfloat16()
    small.load_state_dict(model.state_dict())
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def card(folder: Path, progress: dict[str, float]) -> str:
    """The model card of a trained folder, with its bits per byte on the whole held-out text measured now."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result, xz = evaluate(model, AutoTokenizer.from_pretrained(folder)), xz_bits_per_byte()
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# lab:lm

A small Llama that has learned Python source. An instrument for comparing methods on any machine, not a code assistant.

| on the held-out modules ({result["bytes"]:,} bytes) | bits per byte |
|---|---|
| **lab:lm**, windows of 1,024 tokens, stride 512 | **{result["bits_per_byte"]:.3f}** |
| `xz -9e`, one archive | {xz["archive"]:.3f} |
| `xz -9e`, file by file | {xz["files"]:.3f} |

Perplexity a token: {result["perplexity"]:.2f}. The text is that of the running
Python, so other versions differ a little.

- **Model.** `LlamaForCausalLM`, {model.num_parameters():,} weights in bfloat16: 12 layers of width 192, 8 query and 4
  key/value heads of 32, MLP 512, tied embeddings. Byte-level BPE of {VOCABULARY:,} entries, trained on the same data.
- **Data.** The standard library and a fixed draw of installed dependencies, as `sparing.lab.text` lists them.
  Held out of model and tokenizer: {", ".join(HELDOUT)}, and every file that repeats eight lines of one.
- **Training.** {progress["steps"]:,} steps, {progress["tokens"]:,} tokens, {progress["seconds"] / 60:.0f} minutes
  on a CPU in bfloat16 autocast; Muon for the matrices, AdamW for the rest.
  Repeat it with `python -m sparing.lab.lm OUT`.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train lab:lm, measure it on the held-out modules, write its card.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--fresh", action="store_true", help="start again although there is a checkpoint")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    train(given.out, resume=not given.fresh, minutes=given.minutes, threads=given.threads)
    text = card(given.out / "model", json.loads((given.out / "progress.json").read_text()))
    (given.out / "model" / "README.md").write_text(text)
    print(text)
