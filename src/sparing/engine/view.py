"""One view of any transformers decoder, vision-language or MoE model, found by structure and not by class name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sparing.engine.calls import parameters
from sparing.grid.method import Error, Method, Shape, model_check

_MLP_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ffn_norm", "ln_2", "norm2")
_ATTENTION_NORMS = ("input_layernorm", "self_attn_layer_norm", "ln_1", "attention_norm", "norm1")


_STACKS = ("layers", "h", "blocks")
_ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")
_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn")


def _stack(module: nn.Module) -> nn.ModuleList | None:
    """The decoder layers of a module that holds them itself."""
    found = (getattr(module, name, None) for name in _STACKS)
    return next((stack for stack in found if isinstance(stack, nn.ModuleList) and len(stack)), None)


def _child(module: nn.Module, *names: str) -> nn.Module | None:
    for name in names:
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


@dataclass
class Experts:
    """A layer's mixture of experts, by structure: a router that returns (logits, gates, indices), and the experts.

    Attributes:
        block: the sub-layer that holds both.
        router, router_name: its child `gate` or `router`.
        module: its child `experts`, called with (hidden, indices, gates).
        count: E, experts of the layer, shared ones not among them.
        top_k: K, experts a token.
        groups, chosen_groups: of a group-limited router, 1 and 1 without groups.
    """

    block: nn.Module
    router: nn.Module
    router_name: str
    module: nn.Module
    count: int
    top_k: int
    groups: int
    chosen_groups: int


@dataclass
class LayerView:
    """One decoder layer: its sub-modules under one set of names.

    Attributes:
        module: the layer.
        attention, mlp: its sub-layers; None where it has none (a cut layer).
        heads, groups, head_dim: query heads, key/value heads, channels a head, read off the weights; no groups where
            keys are not projected by a matrix of their own (latent attention, interleaved qkv).
        neurons: MLP width, 0 if the MLP is not a plain one (experts).
        sliding: window in tokens, None for full attention.
    """

    index: int
    module: nn.Module
    attention: nn.Module | None
    mlp: nn.Module | None
    head_dim: int
    sliding: int | None

    # ---- projections; fused ones keep q|k|v (gate|up) in that order

    @property
    def fused_qkv(self) -> nn.Linear | None:
        return _child(self.attention, "qkv_proj") if self.attention is not None else None  # type: ignore[return-value]

    def projection(self, name: str) -> nn.Linear:
        """q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj of this layer, as it stands separate."""
        parent = self.attention if name[0] in "qkvo" else self.mlp
        found = _child(parent, name, *({"o_proj": ("dense", "out_proj")}.get(name, ()))) if parent is not None else None
        if found is None:
            raise Error(f"layer {self.index} has no {name} ({type(parent).__name__ if parent else 'no sub-layer'})")
        return found  # type: ignore[return-value]

    @property
    def fused_gate_up(self) -> nn.Linear | None:
        return _child(self.mlp, "gate_up_proj") if self.mlp is not None else None  # type: ignore[return-value]

    @property
    def heads(self) -> int:
        out = _child(self.attention, "o_proj", "dense", "out_proj") if self.attention is not None else None
        return out.in_features // self.head_dim if isinstance(out, nn.Linear) else 0

    @property
    def groups(self) -> int:
        if not self.heads:
            return 0
        fused = self.fused_qkv
        if fused is not None:
            return (fused.out_features // self.head_dim - self.heads) // 2
        key = _child(self.attention, "k_proj")  # type: ignore[arg-type]
        return key.out_features // self.head_dim if isinstance(key, nn.Linear) else 0

    @property
    def neurons(self) -> int:
        down = _child(self.mlp, "down_proj") if self.mlp is not None else None
        return down.in_features if isinstance(down, nn.Linear) else 0

    @property
    def experts(self) -> Experts | None:
        """The layer's experts; None where it has none, or others than transformers' stacked ones."""
        module = _child(self.mlp, "experts") if self.mlp is not None else None
        if module is None or isinstance(module, nn.ModuleList):
            return None
        called = [name for name, p in parameters(module.forward).items() if p.kind == p.POSITIONAL_OR_KEYWORD]
        if len(called) < 3:  # (hidden, indices, gates)
            return None
        for name in ("gate", "router"):
            router: Any = _child(self.mlp, name)  # type: ignore[arg-type]
            weight, k = getattr(router, "weight", None), getattr(router, "top_k", None)
            if isinstance(weight, Tensor) and isinstance(k, int):
                groups, chosen = (getattr(router, key, None) or 1 for key in ("num_group", "topk_group"))
                return Experts(self.mlp, router, name, module, len(weight), k, groups, chosen)  # type: ignore[arg-type]
        return None

    # ---- attention inputs

    @cached_property
    def norm(self) -> nn.Module:
        """The norm whose output the attention reads; identity for post-norm layers."""
        return _child(self.module, *_ATTENTION_NORMS) or nn.Identity()

    @cached_property
    def mlp_norm(self) -> nn.Module | None:
        """The norm whose output the MLP or the experts read; None where it was not found."""
        return _child(self.module, *_MLP_NORMS)

    @cached_property
    def _rotary(self) -> Callable[..., tuple[Tensor, Tensor]] | None:
        found = getattr(sys.modules[type(self.attention).__module__], "apply_rotary_pos_emb", None)
        turns_a_pair = found is not None and list(parameters(found))[:2] == ["q", "k"]  # GPT-J's turns one tensor
        return found if turns_a_pair else None

    @property
    def scale(self) -> float:
        attention: Any = self.attention
        return float(getattr(attention, "scaling", self.head_dim**-0.5))

    @property
    def softcap(self) -> float | None:
        return getattr(self.attention, "attn_logit_softcapping", None)

    def _split(self, x_BND: Tensor, which: str) -> Tensor:
        """Project hidden rows to queries or keys, (B, heads or groups, N, d), with the layer's own q/k norms."""
        fused = self.fused_qkv
        if fused is not None:
            start, size = (0, self.heads) if which == "q" else (self.heads, self.groups)
            rows = slice(start * self.head_dim, (start + size) * self.head_dim)
            bias = fused.bias[rows] if fused.bias is not None else None
            flat = torch.nn.functional.linear(x_BND, fused.weight[rows], bias)
        else:
            flat = self.projection(f"{which}_proj")(x_BND)
        norm = _child(self.attention, f"{which}_norm") if self.attention is not None else None
        if norm is not None and _width(norm) == flat.shape[-1]:  # OLMo norms all heads together
            flat, norm = norm(flat), None
        split = flat.view(*flat.shape[:-1], -1, self.head_dim)
        return (norm(split) if norm is not None else split).transpose(1, 2)

    def _turn(self, x_BHNd: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        if rope is None:
            return x_BHNd
        if self._rotary is None:
            raise Error(
                f"{type(self.attention).__name__}: attention scores need its module's apply_rotary_pos_emb, not found"
            )
        if not isinstance(rope, tuple):
            raise Error(f"{type(self.attention).__name__}: attention scores need positions as (cos, sin)")
        # The function turns a pair; an empty second tensor makes the other half free.
        try:
            return self._rotary(x_BHNd, x_BHNd[:, :0], *rope)[0]
        except RuntimeError:  # partial rotary embeddings: the attention turns the first channels only
            turned = x_BHNd[..., : rope[0].shape[-1]]
            return torch.cat([self._rotary(turned, turned[:, :0], *rope)[0], x_BHNd[..., turned.shape[-1] :]], -1)

    def queries(self, hidden_BQD: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries of a few rows of the layer's input, after norm, projection and position embedding: (B, H, Q, d)."""
        return self._turn(self._split(self.norm(hidden_BQD), "q"), rope)

    def keys(self, hidden_BND: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Keys of rows of the layer's input: (B, G, N, d)."""
        return self._turn(self._split(self.norm(hidden_BND), "k"), rope)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def heads_a_group(layer: LayerView) -> int:
    """Query heads that share a key/value head."""
    return layer.heads // max(layer.groups, 1)


def _width(norm: nn.Module) -> int:
    weight: Any = norm.weight
    return int(weight.shape[-1])


def _plain_mlp(layer: LayerView) -> str | None:
    return None if layer.neurons else "has no plain MLP (gate_proj, up_proj and down_proj, or gate_up_proj)"


def _own_mlp(layer: LayerView) -> str | None:
    if layer.mlp is None:
        return f"has no MLP module of its own ({', '.join(_MLPS)})"
    return adds_residual(layer.mlp)


def adds_residual(module: nn.Module) -> str | None:
    """What keeps a sub-layer from being left out by itself: it adds what it is handed of the residual stream inside."""
    if "residual" in parameters(module.forward):
        return f"adds the residual inside its {type(module).__name__}, so that it cannot be left out by itself"
    return None


def _scores(layer: LayerView) -> str | None:
    if not layer.groups:
        return "projects queries and keys by no matrices of their own (q_proj and k_proj, or qkv_proj)"
    turns = layer.attention is not None and any("position_embedding" in n for n in parameters(layer.attention.forward))
    return "turns queries and keys by no apply_rotary_pos_emb of its module" if turns and not layer._rotary else None


#: Parts that methods may require of every layer -> what says that a layer lacks it.
PARTS: dict[str, Callable[[LayerView], str | None]] = {"mlp": _own_mlp, "neurons": _plain_mlp, "scores": _scores}


class View:
    """A model seen as a stack of decoder layers, with its visual tokens.

    Raises:
        Error: no decoder stack with attention projections was found; says what was looked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.decoder = self._find_decoder(model)
        self.stack = self._find_stack(self.decoder)
        self.config: Any = getattr(self.decoder, "config", None) or model.config
        self.layers = [self._layer(i, m) for i, m in enumerate(self.stack)]
        whole: Any = getattr(model, "config", None)
        self.image_token_id: int | None = getattr(whole, "image_token_id", getattr(whole, "image_token_index", None))

    @staticmethod
    def _find_decoder(model: nn.Module) -> nn.Module:
        found: Any = model
        for _ in range(2):  # a wrapper's decoder may be a wrapper itself
            found = found.get_decoder() if hasattr(found, "get_decoder") else found
        if not isinstance(found, nn.Module):
            raise Error(f"{type(model).__name__}: get_decoder() found no decoder")
        if _stack(found) is None:  # Llama 4's text model gives itself for its decoder
            inside = [child for child in found.children() if _stack(child) is not None]
            return inside[0] if len(inside) == 1 else found
        return found

    @staticmethod
    def _find_stack(decoder: nn.Module) -> nn.ModuleList:
        stack = _stack(decoder)
        if stack is None:
            raise Error(
                f"{type(decoder).__name__}: no decoder layers found (looked for a ModuleList named "
                f"{', '.join(_STACKS[:-1])} or {_STACKS[-1]})"
            )
        return stack

    def _layer(self, index: int, module: nn.Module) -> LayerView:
        attention = _child(module, *_ATTENTIONS)
        mlp = _child(module, *_MLPS)
        if attention is None and mlp is None:
            raise Error(
                f"layer {index} ({type(module).__name__}): neither attention ({', '.join(_ATTENTIONS)}) nor MLP "
                f"({', '.join(_MLPS)}) found"
            )
        names = ("v_head_dim", "head_dim", "head_size")  # latent attention gives out heads of v_head_dim
        head_dim = next((d for d in (getattr(attention, name, None) for name in names) if d), None)
        if head_dim is None:
            c = self.config
            head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        sliding = getattr(attention, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        if kinds and index < len(kinds) and kinds[index] == "full_attention":
            sliding = None
        elif not kinds and sliding is None and getattr(self.config, "use_sliding_window", True):  # Mistral, Phi-3
            sliding = getattr(self.config, "sliding_window", None)
        return LayerView(index, module, attention, mlp, int(head_dim), sliding)

    def __len__(self) -> int:
        return len(self.layers)

    def lacks(self, parts: tuple[str, ...]) -> str | None:
        """What a method that requires these parts (of `PARTS`) does not find, None if all are there."""
        for part in parts:
            for layer in self.layers:
                missing = PARTS[part](layer)
                if missing is not None:
                    return f"layer {layer.index} ({type(layer.module).__name__}) {missing}"
        return None

    @property
    def rotary(self) -> nn.Module | None:
        """The module that turns positions into (cos, sin)."""
        return _child(self.decoder, "rotary_emb")

    @property
    def vision(self) -> nn.Module | None:
        """The vision tower, None for text models."""
        inner = getattr(self.model, "model", self.model)
        return _child(inner, "vision_tower", "visual", "vision_model")

    @property
    def visual_tokens(self) -> int | None:
        """Visual tokens of one image where the tower fixes them (CLIP-style), else None."""
        vision = getattr(getattr(self.model, "config", None), "vision_config", None)
        size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
        if isinstance(size, int) and isinstance(patch, int):
            return (size // patch) ** 2
        return None

    def grid(self, count: int) -> tuple[int, int] | None:
        """Rows and columns of a square image of `count` visual tokens, None if it is not square."""
        side = round(count**0.5)
        return (side, side) if side * side == count else None

    @property
    def shape(self) -> Shape:
        """Sizes for `Method.at`."""
        experts = [e for e in (layer.experts for layer in self.layers) if e is not None]
        first = next((v for v in self.layers if v.heads), self.layers[0])  # a cut layer may have none
        return Shape(
            layers=len(self.layers),
            heads=first.heads,
            groups=first.groups,
            head_dim=first.head_dim,
            hidden=int(self.config.hidden_size),
            neurons=max((v.neurons for v in self.layers), default=0),
            visual=self.visual_tokens if self.image_token_id is not None else None,
            experts=max((e.count for e in experts), default=0),
            top_k=max((e.top_k for e in experts), default=0),
        )


@model_check
def _has_parts(method: Method, model: nn.Module) -> None:
    """Refuses a model without the parts that the method's Card requires."""
    lacks = View(model).lacks(method.card.requires) if method.card.requires else None
    if lacks is not None:
        raise Error(f"method = {method.name!r}: cannot work on {type(model).__name__}: {lacks}")


def shape(model: nn.Module) -> Shape:
    """Sizes of a model that budgets are spread over."""
    return View(model).shape
