"""Elsewhere: two checkpoints as the hub has them, made without this library, and the commands that measure them.

    python examples/foreign.py OUT

writes OUT/llama and OUT/qwen2.5-vl, both with random weights in bfloat16, a text, and questions about pictures. Random
weights know nothing: the qualities that `sparing compare` finds here mean nothing, what ran and how fast does.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sysconfig
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

MODULES = ("argparse", "ast", "datetime", "difflib", "inspect", "pickle", "tarfile", "tempfile", "typing", "zipfile")
WORDS = 4000  # byte-level pieces; the special tokens come on top
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "circle")

LLAMA_CHAT = """\
{{- bos_token -}}
{%- for turn in messages -%}
<|start_header_id|>{{ turn.role }}<|end_header_id|>

{{ turn.content | trim }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""
QWEN_CHAT = """\
{%- if messages[0].role != "system" -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for turn in messages -%}
<|im_start|>{{ turn.role }}
{% if turn.content is string -%}
{{ turn.content }}
{%- else -%}
{%- for part in turn.content -%}
{%- if part.type == "image" -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == "video" -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def source(name: str) -> str:
    return (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")


def learned() -> Tokenizer:
    """A byte-level BPE of Python source."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pieces.train_from_iterator(map(source, MODULES), trainer)
    return pieces


def write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def llama(folder: Path, pieces: Tokenizer) -> None:
    """A text model: weights in several files, a tokenizer that starts texts with a token of its own."""
    pieces = Tokenizer.from_str(pieces.to_str())
    pieces.add_special_tokens(list(LLAMA))
    begin, end, _, _, turn = map(pieces.token_to_id, LLAMA)
    pieces.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{LLAMA[0]} $A", special_tokens=[(LLAMA[0], begin)]),
        ]
    )
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=begin,
        eos_token_id=[end, turn],
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=begin, eos_token_id=[end, turn], do_sample=True, temperature=0.6, top_p=0.9
    )
    model.save_pretrained(folder, max_shard_size="5MB")
    PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        bos_token=LLAMA[0],
        eos_token=LLAMA[4],
        chat_template=LLAMA_CHAT,
        model_max_length=2048,
    ).save_pretrained(folder)


def qwen(folder: Path, pieces: Tokenizer) -> None:
    """A vision-language model: a flat config.json with names of old, a processor in three files of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces.model.save(str(folder))  # vocab.json, merges.txt
    parts = json.loads(pieces.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=parts["vocab"],
        merges=[tuple(pair) for pair in parts["merges"]],
        eos_token="<|im_end|>",
        model_max_length=4096,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN)})
    tokenizer.chat_template = None  # it stands in chat_template.json
    tokenizer.save_pretrained(folder)
    token = dict(zip(QWEN, tokenizer.convert_tokens_to_ids(list(QWEN))))
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "max_window_layers": 8,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": False,
        "bos_token_id": token["<|endoftext|>"],
        "eos_token_id": token["<|im_end|>"],
        "vision_start_token_id": token["<|vision_start|>"],
        "vision_end_token_id": token["<|vision_end|>"],
        "image_token_id": token["<|image_pad|>"],
        "video_token_id": token["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 172,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
        "torch_dtype": "bfloat16",
    }
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config)).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=token["<|endoftext|>"],
        pad_token_id=token["<|endoftext|>"],
        eos_token_id=[token["<|im_end|>"], token["<|endoftext|>"]],
        do_sample=True,
        temperature=1e-6,
        repetition_penalty=1.05,
    )
    model.save_pretrained(folder, max_shard_size="2MB")
    write(folder / "config.json", config)
    write(folder / "chat_template.json", {"chat_template": QWEN_CHAT})
    write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": 56 * 56,
            "max_pixels": 28 * 28 * 1280,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )


def questions(file: Path) -> None:
    """What colour is that shape? Pictures of two shapes, of unequal sizes."""
    lines = []
    for index in range(8):
        width, height = ((224, 168), (168, 224), (196, 196), (252, 140))[index % 4]
        picture = Image.new("RGB", (width, height), "lightsteelblue")
        draw = ImageDraw.Draw(picture)
        side = height // 3
        for place, shape in enumerate(SHAPES):
            box = (width * (1 + 5 * place) // 10, side // 2 * (1 + place))
            corners = (*box, box[0] + side, box[1] + side)
            paint = draw.rectangle if shape == "square" else draw.ellipse
            paint(corners, fill=COLOURS[(index + place) % 4])
        picture.save(file.with_name(f"picture-{index}.png"))
        asked = index // 4
        lines.append(
            {
                "image": f"picture-{index}.png",
                "question": f"What colour is the {SHAPES[asked]}? Answer with one word.",
                "answer": COLOURS[(index + asked) % 4],
            }
        )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main(out: Path) -> None:
    torch.manual_seed(0)
    pieces = learned()
    llama(out / "llama", pieces)
    qwen(out / "qwen2.5-vl", pieces)
    (out / "notes.txt").write_text(source("textwrap") + source("shlex"), encoding="utf-8")
    (out / "other-notes.txt").write_text(source("tarfile") + source("zipfile"), encoding="utf-8")
    questions(out / "questions.jsonl")
    print("Two checkpoints with random weights. What ran and how fast means something, their qualities do not:")
    print("bits per byte are near what guessing costs, and no question will be answered. Next:\n")
    text = f"ppl:{out / 'notes.txt'},calibration={out / 'other-notes.txt'}"
    pictures = f"vqa:{out / 'questions.jsonl'}"
    for model, task, methods in (
        ("llama", text, ("unified-layer-skipping", "flap")),
        ("qwen2.5-vl", pictures, ("fastv", "hidrop")),
    ):
        words = ["sparing", "compare", out / model, "--task", task]
        words += [word for name in methods for word in ("--method", name)]
        words += ["--keep", "0.5", "--out", out / "runs" / model]
        print(shlex.join(map(str, words)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to")
    main(parser.parse_args().out)
