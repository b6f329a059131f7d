"""`lab:moe`: a small mixture of experts that has learned two kinds of text, trained on one CPU core in an hour.

Code without a word of explanation, and the docstrings and comments alone: on both it is an ordinary
`Qwen3MoeForCausalLM`, and its experts have taken sides, so that pruning experts for a domain can be told from luck.

Shapes: L layers, E experts, T tokens, K experts a token.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TokenizersBackend,
)

from sparing.lab import lm
from sparing.lab.pretrain import pretrain, windows
from sparing.lab.text import HELDOUT, heldout_domain, heldout_text, split

WEIGHTS = Path(__file__).parent / "weights" / "moe"
DOMAINS = ("code", "prose")
MIX = {"files": 0.4, "code": 0.3, "prose": 0.3}  # of the training windows
BALANCED = 0.01  # weight of the load-balancing loss


def build() -> Qwen3MoeForCausalLM:
    """The untrained model: 6 layers of width 192, 16 experts of 96 neurons each, 4 a token, in float32."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=lm.VOCABULARY,
            hidden_size=192,
            intermediate_size=384,
            moe_intermediate_size=96,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,  # type: ignore[call-arg]
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=lm.SPECIAL.index(lm.PAD),
            bos_token_id=lm.SPECIAL.index(lm.BOS),
            eos_token_id=lm.SPECIAL.index(lm.EOS),
        )
    )


def load(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The trained model in evaluation mode, and its tokenizer, which is that of `lab:lm`."""
    return AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=dtype).eval(), AutoTokenizer.from_pretrained(WEIGHTS)


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, limit_bytes: int | None = None
) -> dict[str, float]:
    """Bits per byte on the held-out modules as they are, on their code alone and on their prose alone.

    `apart` is the share of the experts' choices that would have to move to make both domains alike, mean over layers.
    """
    texts = {"bits_per_byte": heldout_text(), **{f"bits_per_byte_{d}": heldout_domain(d) for d in DOMAINS}}
    found = {
        key: lm.evaluate(model, tokenizer, text=text, limit_bytes=limit_bytes)["bits_per_byte"]
        for key, text in texts.items()
    }
    code, prose = (expert_load(model, tokenizer, heldout_domain(domain)) for domain in DOMAINS)
    return {**found, "apart": float(0.5 * (code - prose).abs().sum(1).mean())}


@torch.no_grad()
def expert_load(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, windows: int = 32) -> Tensor:
    """Share of the K T choices that each expert gets on `text`, (L, E); every row adds up to 1."""
    ids_T = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    total = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for ids in islice(ids_T.split(512), windows):
        routed = model(ids[None], use_cache=False, output_router_logits=True).router_logits
        for layer, logits in enumerate(routed):
            chosen = logits.topk(model.config.num_experts_per_tok).indices.flatten()
            total[layer] += torch.bincount(chosen, minlength=total.shape[1])
    return total / total.sum(1, keepdim=True)


def train(
    out: str | Path, *, resume: bool = True, minutes: float = 60, threads: int | None = None
) -> tuple[Qwen3MoeForCausalLM, TokenizersBackend]:
    """Train the model within `minutes` of wall-clock time and write it to `out`/model (see `pretrain`).

    Windows are whole files, code alone or prose alone (`MIX`), each of one kind; of each kind the share of the standard
    library grows from a third to all of it. The last fifth of the time reads windows of 1024 tokens, not 512.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = TokenizersBackend.from_pretrained(lm.WEIGHTS)
    rows = []
    for texts in lm.corpus():
        halves = [split(text) for text in texts]
        for part in (texts, [code for code, _ in halves], [prose for _, prose in halves]):
            rows.append(lm.encode(tokenizer, [text for text in part if text.strip()]))
    model = build()

    def draw(progress: float, step: int) -> Tensor:
        own = (1 + 2 * progress) / 3
        shares = [part * kind for part in (own, 1 - own) for kind in MIX.values()]
        return windows(rows, 1024 if progress > 0.8 else 512, shares=shares, seed=step)

    def save() -> None:
        small = build().bfloat16()
        small.load_state_dict(model.state_dict())
        small.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")

    pretrain(model, out, draw, save, name="lab:moe", minutes=minutes, resume=resume, balanced=BALANCED)
    return model, tokenizer


def card(folder: Path, progress: dict[str, float]) -> str:
    """The model card of a trained folder, with bits per byte and expert load on the held-out text measured now."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {"files": heldout_text(), **{domain: heldout_domain(domain) for domain in DOMAINS}}
    scores = {kind: lm.evaluate(model, tokenizer, text=text) for kind, text in texts.items()}
    rows = "\n".join(
        f"| {kind} | {scores[kind]['bytes']:,} | **{scores[kind]['bits_per_byte']:.3f}** |" for kind in texts
    )
    code, prose = (expert_load(model, tokenizer, texts[domain]) for domain in DOMAINS)
    table = "\n".join(
        f"| {layer} | {domain} | {' | '.join(f'{100 * share:.1f}' for share in load)} |"
        for layer, pair in enumerate(zip(code, prose))
        for domain, load in zip(DOMAINS, pair)
    )
    apart = 0.5 * (code - prose).abs().sum(1)
    experts = code.shape[1]
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# lab:moe

A small mixture of experts that has learned Python source. An instrument for comparing methods, not a code assistant.

| held-out modules, as | bytes | bits per byte, windows of 1,024 tokens, stride 512 |
|---|---|---|
{rows}

`files` are the modules as they are, `code` without docstrings and comments, `prose` those alone. The text is that of
the running Python, so other versions differ a little.

## Load of the experts by domain

Percent of the four choices a token that each expert gets; {100 / experts:.2f} would be even. The table
below it says what share of the choices would have to move to make both domains alike (total variation).

| layer | domain | {" | ".join(f"{i}" for i in range(experts))} |
|---|---|{"---|" * experts}
{table}

| layer | {" | ".join(str(layer) for layer in range(len(apart)))} |
|---|{"---|" * len(apart)}
| apart, % | {" | ".join(f"{100 * share:.0f}" for share in apart)} |

- **Model.** `Qwen3MoeForCausalLM`, {model.num_parameters():,} weights in bfloat16: 6 layers of width 192, 8 query and 4
  key/value heads of 32, 16 experts of 96 neurons, 4 a token, tied embeddings. Tokenizer of `lab:lm`.
- **Data.** That of `lab:lm`: whole files ({MIX["files"]:.0%} of the windows), code alone ({MIX["code"]:.0%}),
  docstrings and comments alone ({MIX["prose"]:.0%}). Held out: {", ".join(HELDOUT)}, and every file that repeats
  eight lines of one.
- **Training.** {progress["steps"]:,} steps, {progress["tokens"]:,} tokens, {progress["seconds"] / 60:.0f} minutes
  on a CPU in bfloat16 autocast; Muon for the matrices, AdamW for the rest, load balanced over the whole batch
  (weight {BALANCED}). Repeat it with `python -m sparing.lab.moe OUT`.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train lab:moe, measure it on the held-out modules, write its card.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--fresh", action="store_true", help="start again although there is a checkpoint")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    train(given.out, resume=not given.fresh, minutes=given.minutes, threads=given.threads)
    text = card(given.out / "model", json.loads((given.out / "progress.json").read_text()))
    (given.out / "model" / "README.md").write_text(text)
    print(text)
