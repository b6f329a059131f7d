"""A small LLaVA that reads coloured digits: the embedded model `lab:vlm`.

An ordinary `LlavaForConditionalGeneration` of 1.7M parameters: one CLIP layer, the projector, eight Llama layers. It is
an instrument for measuring methods that select visual tokens, so *where* it recognises matters more than how well: the
image tower is too short to read a digit, the language model reads it in its first layers, each digit in its own
patches, and the question collects the answer in the last ones. Dropping visual tokens at random early on therefore
costs accuracy, and keeping the right ones does not.

Training has two stages. First the hidden state after language layer 4 learns, through a linear head that is thrown
away, to name digit and colour in every patch. Then the whole model learns the questions, with that loss kept at 0.3.

    python -m sparing.lab.vlm OUT    # about an hour on one core with bfloat16 arithmetic; resumes where it was stopped
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sparing.lab.digits import CANVAS, COLOURS, GRID, NO_COLOUR, NO_DIGIT, PATCH, PATCHES, TOKEN, Scene, scenes

WEIGHTS = Path(__file__).parent / "weights" / "vlm"

READ_AFTER = 4  #: language layers that read the digits; the patch labels are learned from the hidden state after them
PATCH_LOSS = 0.3  #: weight of the patch loss beside the questions
BACKGROUND = 0.3  #: weight of a patch without a digit in the patch loss: they are three quarters of all


def build(seed: int = 0) -> LlavaForConditionalGeneration:
    """The untrained model; the same `seed` gives the same weights."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=CANVAS,
        patch_size=PATCH,
        projection_dim=128,
        initializer_range=0.05,
    )
    text = LlamaConfig(
        vocab_size=len(TOKEN),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.05,
        pad_token_id=TOKEN["<pad>"],
        bos_token_id=TOKEN["<bos>"],
        eos_token_id=TOKEN["<eos>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN["<image>"],
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    # learned like any weight, but from random numbers the patches need long to find their neighbours
    positions = model.model.vision_tower.embeddings.position_embedding.weight.data
    positions[1:] = 0.35 * _waves(positions.shape[1])
    return model


def _waves(width: int) -> Tensor:
    """(256, width) sines and cosines of row and column, wavelengths from 4 to 64 patches."""
    frequency = torch.logspace(math.log10(math.pi / 2), math.log10(math.pi / 32), width // 4)
    phase = torch.arange(GRID)[:, None] * frequency
    wave = torch.cat([phase.sin(), phase.cos()], 1)
    rows, columns = wave.repeat_interleave(GRID, 0), wave.repeat(GRID, 1)
    return torch.cat([rows, columns], 1)


def processor() -> LlavaProcessor:
    """Text and pictures to model inputs: `processor()(images=picture, text="<image> red", return_tensors="pt")`.

    The image processor is the one that needs Pillow only, so that no torchvision has to be installed.
    """
    words = Tokenizer(WordLevel(TOKEN, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", TOKEN["<bos>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )
    side = {"height": CANVAS, "width": CANVAS}
    half = [0.5, 0.5, 0.5]
    pictures = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False, image_mean=half, image_std=half)
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes an ordinary Hugging Face folder: configuration, weights, tokenizer, processor."""
    model.save_pretrained(folder)
    processor().save_pretrained(folder)


def load(folder: Path = WEIGHTS) -> LlavaForConditionalGeneration:
    """The trained model, in float32 and ready to be asked."""
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """(B, 96, 96, 3) uint8 pictures to (B, 3, 96, 96) float32 in -1..1, as the processor does it."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration, limit: int = 1000, *, seed: int = 0, batch: int = 50
) -> dict[str, float]:
    """Exact match of the greedy next token on `limit` held-out scenes, one question each, the colours in turn."""
    training = model.training
    model.eval()
    right = 0
    for start in range(0, limit, batch):
        asked = scenes("test", min(batch, limit - start), seed, start)
        colours = [COLOURS[(start + i) % len(COLOURS)] for i in range(len(asked))]
        prompts = torch.stack([s.prompt_ids(c) for s, c in zip(asked, colours, strict=True)])
        images = pixels(np.stack([s.image for s in asked]))
        said = model(input_ids=prompts, pixel_values=images, logits_to_keep=1).logits[:, -1].argmax(-1)
        right += sum(TOKEN[s.answer(c)] == token for s, c, token in zip(asked, colours, said.tolist(), strict=True))
    model.train(training)
    return {"accuracy": right / limit, "n": limit}


def train(
    out: Path,
    *,
    resume: bool = True,
    threads: int | None = None,
    read_steps: int = 2400,
    ask_steps: int = 1600,
    batch: int = 16,
    learning_rate: float = 1.2e-3,
    save_every: int = 200,
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """Trains from scratch, or from the last checkpoint in `out`, and saves the model there.

    Args:
        out: folder for the finished model and, while training, `checkpoint.pt`.
        resume: go on from `checkpoint.pt` if there is one.
        threads: CPU threads for torch; None leaves torch's setting alone.
        read_steps: steps of the first stage, patch labels only, through the first `READ_AFTER` language layers.
        ask_steps: steps of the second stage, the questions and the patch labels.
        batch: scenes per step; each holds four questions.
        learning_rate: peak of AdamW's learning rate, held in the first stage, falling along a cosine in the second.
        save_every: steps between checkpoints, at which the accuracy on 100 held-out scenes is shown too.
        seed: of the weights and of the stream of scenes.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    model = build(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        head = nn.Linear(model.lm_head.in_features, NO_DIGIT + 1 + NO_COLOUR + 1)
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.05},
            {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    first = 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    last = read_steps + ask_steps
    _use_training_attention(model)
    model.train()
    language = model.model.language_model
    layers, reading = language.layers, language.layers[:READ_AFTER]
    seen: list[Tensor] = []
    handle = layers[READ_AFTER - 1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    progress = tqdm(range(first, last), initial=first, total=last, mininterval=10, dynamic_ncols=True)
    notes: dict[str, str] = {}
    for step in progress:
        asking = step >= read_steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, read_steps, ask_steps)
        lesson = scenes("train", batch, seed, step * batch)
        images, ids = pixels(np.stack([s.image for s in lesson])), _lines(lesson, np.random.default_rng((seed, step)))
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            if asking:
                logits = model(input_ids=ids, pixel_values=images, logits_to_keep=2 * len(COLOURS)).logits
            else:  # the last layers have nothing to learn yet
                language.layers = reading
                model.model(input_ids=ids[:, : 1 + PATCHES], pixel_values=images)
                language.layers = layers
        loss, right = _patch_loss(head, seen[0][:, 1 : 1 + PATCHES].float(), lesson)
        notes["patches"] = f"{loss.item():.3f} ({right:.1%})"
        if asking:
            # the last 2 x 4 tokens are c d c d ...: the hidden state of each colour predicts the digit after it
            question = F.cross_entropy(logits[:, 0::2].flatten(0, 1).float(), ids[:, 2 + PATCHES :: 2].flatten())
            notes["questions"] = f"{question.item():.3f}"
            loss = question + PATCH_LOSS * loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % save_every == 0:
            if asking:
                notes["held out"] = f"{evaluate(model, 100)['accuracy']:.0%}"
            _save_checkpoint(checkpoint, model=model, head=head, optimizer=optimizer, step=step + 1)
        progress.set_postfix(notes, refresh=False)

    handle.remove()
    model.set_attn_implementation("sdpa")
    save(model.eval(), out)
    return model


def _schedule(step: int, read_steps: int, ask_steps: int, warmup: int = 100) -> float:
    """Share of the peak learning rate: each stage warms up; then the first holds it, the second follows a cosine."""
    if step < read_steps:
        return min(1.0, (step + 1) / warmup)
    step -= read_steps
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / ask_steps))


def _lines(lesson: list[Scene], rng: np.random.Generator) -> Tensor:
    """(B, 265) token ids: `<bos>`, the image, then each colour followed by its digit, the colours in random order."""
    tails = []
    for s in lesson:
        order = [COLOURS[i] for i in rng.permutation(len(COLOURS))]
        tails.append([TOKEN[word] for colour in order for word in (colour, s.answer(colour))])
    start = torch.tensor([TOKEN["<bos>"], *[TOKEN["<image>"]] * PATCHES])
    return torch.cat([start.expand(len(lesson), -1), torch.tensor(tails)], 1)


def _patch_loss(head: nn.Linear, hidden_BVD: Tensor, lesson: list[Scene]) -> tuple[Tensor, float]:
    """Cross-entropy of digit and colour read from every patch; share of the digits' patches whose digit is right."""
    read = head(F.rms_norm(hidden_BVD, hidden_BVD.shape[-1:])).flatten(0, 1)
    digit, colour = read.split((NO_DIGIT + 1, NO_COLOUR + 1), -1)
    true_digit = torch.cat([s.patch_digits() for s in lesson])
    true_colour = torch.cat([s.patch_colours() for s in lesson])
    weight = torch.where(true_digit == NO_DIGIT, BACKGROUND, 1.0)
    losses = F.cross_entropy(digit, true_digit, reduction="none")
    losses = losses + F.cross_entropy(colour, true_colour, reduction="none")
    on_digit = true_digit != NO_DIGIT
    right = (digit.argmax(-1) == true_digit)[on_digit].float().mean().item()
    return (losses * weight).sum() / weight.sum(), right


def _save_checkpoint(path: Path, *, step: int, **parts: nn.Module | torch.optim.Optimizer) -> None:
    """Writes beside and renames, so that a stop at any moment leaves a whole checkpoint."""
    beside = path.with_suffix(".new")
    torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, beside)
    os.replace(beside, path)


def _use_training_attention(model: LlavaForConditionalGeneration) -> None:
    """Until the next `set_attn_implementation`; the lines are never padded, so no mask is asked for."""
    AttentionInterface.register("lab_training", _training_attention)
    AttentionMaskInterface.register("lab_training", lambda *args, **kwargs: None)
    model.set_attn_implementation("lab_training")


def _training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention by two batched products: at 265 tokens in bfloat16 on a CPU, half the time of SDPA and its backward."""
    B, H, T, D = query.shape
    key, value = (x.repeat_interleave(H // x.shape[1], 1).reshape(B * H, T, D) for x in (key, value))
    mask = query.new_zeros(T, T)
    if getattr(module, "is_causal", False):
        mask = torch.full_like(mask, -1e4).triu(1)
    score = torch.baddbmm(mask.expand(B * H, T, T), query.reshape(B * H, T, D) * scaling, key.transpose(1, 2))
    mixed = torch.bmm(score.softmax(-1), value)
    return mixed.view(B, H, T, D).transpose(1, 2).contiguous(), None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fresh", action="store_true", help="start again although there is a checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    given = _arguments()
    print(evaluate(train(given.out, resume=not given.fresh, threads=given.threads)))
