"""Two vision-language-action policies behind one contract: OpenVLA (action tokens) and pi0.5 (flow matching).

    policy = load_policy("openvla" | "pi05" | folder | hub id)         # tiny bundled ones, or the real 7 B / 3.3 B
    decision = policy.act(images, instructions)                        # actions, log pi(a|o), V(o), trace
    logp, entropy, value = policy.evaluate(images, instructions, decision.trace)     # the same numbers, with gradient
    loss = policy.bc_loss(images, instructions, actions, pad)          # L_SFT on demonstrations
    policy.save(folder)                                                # official layout, readable by other loaders

Observation   images (B, H, W, 3) uint8 RGB, or (B, N, H, W, 3) for N cameras of pi0.5; instructions: list of B str
Action chunk  (B, K, 7) float32: dx dy dz [m], droll dpitch dyaw [rad], gripper -1 close .. +1 open
Shapes        B batch, T tokens, D width, N cameras, H horizon, K executed steps, A model action dims, S denoising steps
Log-probs     float32, one per decision (all tokens, or the whole executed chunk), in nats
Frozen eyes   features = policy.encode_images(images) may stand wherever `images` may: computed once, used every epoch
Hidden state  policy.prompt_hidden(images, instructions) (B, D), what the value head reads; auxiliary losses may too

The official checkpoints and the tiny ones run through the same code; only config.json and the weights differ.
Departs from the reference implementations:
 1. OpenVLA acts in batches, and picks among the 256 action tokens only (the official code: batch 1, whole vocabulary).
 2. One decoder class serves Llama, Gemma and the action expert. It has no RoPE buffers, so no cast can round them.
 3. pi0.5 trains and samples through one path: prefix pass -> keys/values -> expert pass. The gradients are the same.
 4. The pi0.5 critic averages the *valid* prefix tokens; the reference averages the padding in as well.
 5. Weights stay float32. dtype="bfloat16" is autocast around the matmuls; logits, heads, time, softmax stay float32.
"""
import contextlib
import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from torch import nn
from torch.utils.checkpoint import checkpoint

ACTION_DIM = 7
BUNDLED = {name: Path(__file__).resolve().parent / "base" / f"{name}-tiny" for name in ("openvla", "pi05")}
# PEFT's "all-linear" on OpenVLA resolves to the first 15 of these suffixes; pi0.5's SigLIP adds out_proj.
LORA_TARGETS = ("q", "kv", "qkv", "proj", "fc1", "fc2", "fc3", "q_proj", "k_proj", "v_proj", "o_proj",
                "gate_proj", "up_proj", "down_proj", "lm_head", "out_proj")
HEADS = ("value_head.", "noise_head.")           # ours: saved apart, so that other loaders read the official part
LN2PI = math.log(2 * math.pi)


class Decision(NamedTuple):
    """What `act` returns. `trace` holds tensors with leading dimension B: index, concatenate and store them freely."""
    actions: torch.Tensor    # (B, K, 7) float32, physical units
    logp: torch.Tensor       # (B,) float32, log pi(trace | observation); 0 for a deterministic pi0.5 chunk (no density)
    value: torch.Tensor      # (B,) float32
    trace: dict              # exactly what was sampled, for `evaluate`: never re-derived from `actions`


def problem(what, got, need, remedy):
    return f"{what}: got {got}; need {need}; try {remedy}"


def float32(tensor):
    """Context in which autocast is off, for everything that must not be rounded."""
    return torch.autocast(tensor.device.type, enabled=False)


# ---- images --------------------------------------------------------------------------------------------------------

def resize_bicubic(images, size):
    """(B, H, W, 3) uint8 -> (B, size, size, 3): OpenVLA's "resize-naive", aspect not kept; PIL is the official resizer."""
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC)) for image in images])


def resize_lanczos3(images, size):
    """As tf.image.resize(lanczos3, antialias=True), then round: what LIBERO fine-tunes of OpenVLA saw."""
    def weights(n):
        centre = (np.arange(size)[:, None] + 0.5) * n / size
        d = (np.arange(n)[None] + 0.5 - centre) / max(n / size, 1.0)
        w = np.where(np.abs(d) < 3, np.sinc(d) * np.sinc(d / 3), 0)
        return w / w.sum(1, keepdims=True)                                                   # (size, n)
    out = np.einsum("yh,bhwc,xw->byxc", weights(images.shape[1]), images.astype(np.float64),
                    weights(images.shape[2]), optimize=True)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def center_crop_90(images, size):
    """Central box of 90 % area, bilinear to (size, size): tf.image.crop_and_resize in its own float32 arithmetic."""
    side = np.sqrt(np.float32(0.9))
    low = (1 - side) / np.float32(2)

    def axis(n):
        last = np.float32(n - 1)
        step = (low + side - low) * last / np.float32(size - 1)
        at = low * last + np.arange(size, dtype=np.float32) * step
        i = np.floor(at).astype(int)
        return i, np.minimum(i + 1, n - 1), at - i
    y0, y1, fy = axis(images.shape[1])
    x0, x1, fx = axis(images.shape[2])
    x = images * np.float32(1 / 255)
    x = x[:, :, x0] + (x[:, :, x1] - x[:, :, x0]) * fx[:, None]
    x = x[:, y0] + (x[:, y1] - x[:, y0]) * fy[:, None, None]
    return np.minimum(np.floor(np.clip(x, 0, 1) * np.float32(255.5)), 255).astype(np.uint8)


def resize_with_pad(images, size, style):
    """(B, H, W, 3) uint8 -> (B, size, size, 3) float32 in [-1, 1], aspect kept, black bars.

    openpi shrinks with PIL (antialiased), LeRobot with F.interpolate (not): about 0.017 apart on a contrasty image.
    """
    height, width = images.shape[1:3]
    ratio = max(height / size, width / size)
    h, w = int(height / ratio), int(width / ratio)
    top, left = (size - h) // 2, (size - w) // 2                # an odd remainder goes to the bottom and the right
    if style == "lerobot":
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        x = F.interpolate(x, (h, w), mode="bilinear", align_corners=False).clamp(-1, 1)
        x = F.pad(x, (left, size - w - left, top, size - h - top), value=-1.0)
        return x.permute(0, 2, 3, 1).numpy()
    out = np.zeros((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        out[i, top:top + h, left:left + w] = Image.fromarray(image).resize((w, h), Image.BILINEAR)
    return out.astype(np.float32) / 255 * 2 - 1


# ---- LoRA: W x + (alpha/r) B A x, in the file format of PEFT ---------------------------------------------------------

def lora_hook(module, inputs, output):
    return output + module.lora_scale * module.lora_B(module.lora_A(inputs[0]))


def attach_lora(module, rank, scale):
    """Linear, or Conv2d (A is then a convolution of the same shape, B a 1x1 one). B = 0: starts as the identity."""
    if isinstance(module, nn.Conv2d):
        module.lora_A = nn.Conv2d(module.in_channels, rank, module.kernel_size, module.stride, bias=False)
        module.lora_B = nn.Conv2d(rank, module.out_channels, 1, bias=False)
    else:
        module.lora_A = nn.Linear(module.in_features, rank, bias=False)
        module.lora_B = nn.Linear(rank, module.out_features, bias=False)
    nn.init.zeros_(module.lora_B.weight)
    module.lora_scale = scale
    module.lora_handle = module.register_forward_hook(lora_hook)


def lora_modules(policy):
    return {name: module for name, module in policy.named_modules() if hasattr(module, "lora_A")}


def add_lora(policy, rank, alpha=None, targets=LORA_TARGETS, seed=0):
    """Fresh adapters on every module whose name ends in one of `targets`; everything but adapters and heads is frozen.

    alpha defaults to min(rank, 16) and A ~ N(0, 1/rank), B = 0, as in OpenVLA's fine-tuning script.
    """
    chosen = {name: module for name, module in policy.named_modules()
              if isinstance(module, (nn.Linear, nn.Conv2d)) and name.split(".")[-1] in targets}
    if not chosen:
        raise ValueError(problem("lora_targets", list(targets), "names of Linear or Conv2d layers",
                                 "the default, or any of " + str(LORA_TARGETS)))
    generator = torch.Generator().manual_seed(seed)
    for module in chosen.values():
        attach_lora(module, rank, (alpha or min(rank, 16)) / rank)
        nn.init.normal_(module.lora_A.weight, std=1 / rank, generator=generator)
    freeze_base(policy)


def freeze_base(policy):
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(HEADS))


@torch.no_grad()
def merge_lora(policy):
    """W += (alpha/r) B A on every adapted layer, and the adapters are gone."""
    for module in lora_modules(policy).values():
        delta = module.lora_B.weight.flatten(1) @ module.lora_A.weight.flatten(1)
        module.weight += module.lora_scale * delta.view_as(module.weight)
        module.lora_handle.remove()
        del module.lora_A, module.lora_B, module.lora_scale, module.lora_handle


def save_lora(policy, folder, base):
    """adapter_config.json + adapter_model.safetensors under the official module names, as PEFT writes them."""
    layers = {policy.official_key(name): module for name, module in lora_modules(policy).items()}
    shape = {name: (module.lora_B.weight.shape[1], module.lora_scale) for name, module in layers.items()}
    rank, scale = next(iter(shape.values()))
    config = dict(peft_type="LORA", r=rank, lora_alpha=scale * rank, lora_dropout=0.0, bias="none",
                  target_modules=sorted(layers), base_model_name_or_path=base, fan_in_fan_out=False,
                  use_rslora=False, use_dora=False, inference_mode=False,
                  rank_pattern={name: r for name, (r, _) in shape.items() if r != rank},
                  alpha_pattern={name: r * s for name, (r, s) in shape.items() if r * s != scale * rank})
    tensors = {f"base_model.model.{name}.lora_{x}.weight": getattr(module, f"lora_{x}").weight.detach().contiguous()
               for name, module in layers.items() for x in "AB"}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_lora(policy, folder):
    """Adapters of a PEFT folder, kept apart and trainable. Rank comes from the shapes, alpha from the config."""
    config = read_json(Path(folder) / "adapter_config.json")
    tensors = {key.removeprefix("base_model.model."): value
               for key, value in read_safetensors(Path(folder) / "adapter_model.safetensors").items()}
    # With lm_head among the targets PEFT also stores an untouched copy of the base weight: not needed.
    names = sorted({key[:-len(".lora_A.weight")] for key in tensors if key.endswith(".lora_A.weight")})
    known = {f"{name}.lora_{x}.weight" for name in names for x in "AB"}
    modules = dict(policy.named_modules())
    bad = [key for key in tensors if key not in known and not key.endswith(".base_layer.weight")]
    bad += [name for name in names if policy.internal_key(name) not in modules]
    bad += ["use_dora"] if config.get("use_dora") else []
    if bad:
        raise ValueError(problem(f"LoRA adapter {folder}", f"entries that do not fit: {bad}",
                                 "plain LoRA on layers of this policy", "the base model it was trained on"))
    for name in names:
        module, a = modules[policy.internal_key(name)], tensors[name + ".lora_A.weight"]
        alpha = next((value for pattern, value in (config.get("alpha_pattern") or {}).items()
                      if re.match(rf"(.*\.)?({pattern})$", name)), config["lora_alpha"])
        attach_lora(module, len(a), alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a)))
        with torch.no_grad():
            module.lora_A.weight.copy_(a)
            module.lora_B.weight.copy_(tensors[name + ".lora_B.weight"])
    freeze_base(policy)


# ---- the decoder: Llama, Gemma and the action expert ----------------------------------------------------------------

class RMSNorm(nn.Module):
    """y = x/rms(x) * (offset + w); Llama: offset 0, Gemma: offset 1. Conditioned (adaRMS, pi0.5 expert):
    [scale, shift, gate] = W c + b;  y = x/rms(x) * (1 + scale) + shift;  the gate multiplies the sub-block's output.
    """
    def __init__(self, dim, eps, offset, cond_dim=None):
        super().__init__()
        self.eps, self.offset = eps, offset
        if cond_dim:
            self.dense = nn.Linear(cond_dim, 3 * dim)
        else:
            self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x, cond=None):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        if cond is None:
            return (y * (self.offset + self.weight)).to(x.dtype), None
        with float32(x):
            scale, shift, gate = self.dense(cond).chunk(3, -1)
        return (y * (1 + scale) + shift).to(x.dtype), gate


def rope(positions, head_dim, theta):
    """Angles p * theta^(-2i/head_dim) in float32 -> cos, sin (B, 1, T, head_dim/2)."""
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angle = positions[:, None, :, None].float() * inv_freq
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)                                # first half and second half, not even and odd
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads, head_dim):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x, rotary, mask, past):
        split = lambda y, n: y.view(len(x), -1, n, self.head_dim).transpose(1, 2)
        q = rotate(split(self.q_proj(x), self.heads), *rotary)                               # (B, heads, T, hd)
        k = rotate(split(self.k_proj(x), self.kv_heads), *rotary)                            # (B, kv, T, hd)
        v = split(self.v_proj(x), self.kv_heads)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)                    # (B, kv, past + T, hd)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(y.transpose(1, 2).reshape(*x.shape[:-1], -1)), (k, v)


class GatedMLP(nn.Module):
    def __init__(self, width, hidden, act):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act = act

    def forward(self, x):
        gate = self.gate_proj(x)
        gate = F.silu(gate) if self.act == "silu" else F.gelu(gate, approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, width, mlp_dim, heads, kv_heads, head_dim, act, norm):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width, **norm), RMSNorm(width, **norm)
        self.self_attn = Attention(width, heads, kv_heads, head_dim)
        self.mlp = GatedMLP(width, mlp_dim, act)

    def forward(self, x, rotary, mask, past, cond):
        h, gate = self.input_layernorm(x, cond)
        h, kv = self.self_attn(h, rotary, mask, past)
        x = x + (h if gate is None else gate * h)
        h, gate = self.post_attention_layernorm(x, cond)
        h = self.mlp(h)
        return x + (h if gate is None else gate * h), kv


class Decoder(nn.Module):
    """Pre-norm transformer over embeddings. x (B, T, D), or (B, S, H, D) when cond (B, S, 1, C) differs per block.

    mask (B, 1, T, past + T) or (B, 1, 1, past + T), True = may be attended. Nothing is mutated: the keys and values
    (after RoPE) are returned, and go back in as `past`, so sampling, training and checkpointing share one path.
    """
    def __init__(self, width, depth, mlp_dim, num_heads, num_kv_heads, head_dim, act, eps, theta, offset,
                 vocab=None, cond_dim=None):
        super().__init__()
        self.head_dim, self.theta, self.checkpointing = head_dim, theta, False
        if vocab:
            self.embed_tokens = nn.Embedding(vocab, width)
        norm = dict(eps=eps, offset=offset, cond_dim=cond_dim)
        self.layers = nn.ModuleList(DecoderLayer(width, mlp_dim, num_heads, num_kv_heads, head_dim, act, norm)
                                    for _ in range(depth))
        self.norm = RMSNorm(width, **norm)

    def forward(self, x, positions, mask, past=None, cond=None):
        rotary, kv = rope(positions, self.head_dim, self.theta), []
        for i, layer in enumerate(self.layers):
            inputs = (x, rotary, mask, past and past[i], cond)
            if self.checkpointing and torch.is_grad_enabled():
                x, kv_i = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, kv_i = layer(*inputs)
            kv.append(kv_i)
        return self.norm(x, cond)[0], kv


class Head(nn.Sequential):
    """Small float32 MLP: value head or noise head."""
    def __init__(self, sizes, act, last_bias):
        layers = []
        for i, (n, m) in enumerate(zip(sizes[:-1], sizes[1:])):
            last = i == len(sizes) - 2
            layers += [nn.Linear(n, m, bias=last_bias or not last)] + ([] if last else [act()])
        super().__init__(*layers)

    def forward(self, x):
        with float32(x):
            return super().forward(x.float())


# ---- the vision transformer of OpenVLA -------------------------------------------------------------------------------

class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))        # timm's `gamma`, under the official key

    def forward(self, x):
        return x * self.scale_factor


class ViTBlock(nn.Module):
    def __init__(self, dim, heads, hidden, layer_scale):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim)))
        self.ls1, self.ls2 = (LayerScale(dim), LayerScale(dim)) if layer_scale else (nn.Identity(), nn.Identity())

    def forward(self, x):
        qkv = self.attn["qkv"](self.norm1(x)).view(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                                 # each (B, heads, T, hd)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.ls1(self.attn["proj"](y))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))         # exact GELU in both towers


class ViT(nn.Module):
    """timm's ViT under its own key names, features of block depth-2 without the final norm (what OpenVLA was built on).

    The last block, the final norm and the attention pool of the official files are kept for saving, and never run.
    """
    def __init__(self, embed_dim, depth, num_heads, patch_size, image_size, mlp_ratio=4.0, reg_tokens=0,
                 class_token=True, init_values=None, global_pool="token", no_embed_class=True):
        super().__init__()
        dim, hidden = embed_dim, int(embed_dim * mlp_ratio)
        self.checkpointing = False
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, dim))
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, dim))
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads, hidden, init_values is not None) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if global_pool == "map":
            self.attn_pool = nn.ModuleDict(dict(
                q=nn.Linear(dim, dim), kv=nn.Linear(dim, 2 * dim), proj=nn.Linear(dim, dim), norm=nn.LayerNorm(dim),
                mlp=nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim)))))
            self.attn_pool.register_parameter("latent", nn.Parameter(torch.zeros(1, 1, dim)))

    def forward(self, pixels):
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed     # (B, T, D), row-major
        prefix = 0
        if hasattr(self, "cls_token"):                           # CLS, then registers: in front, and without position
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), x], 1)
            prefix = 1 + self.reg_token.shape[1]
        for block in self.blocks[:-1]:
            keep = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if keep else block(x)
        return x[:, prefix:]


class VisionBackbone(nn.Module):
    def __init__(self, dino, siglip):
        super().__init__()
        self.featurizer, self.fused_featurizer = dino, siglip

    def forward(self, pixels):
        """(B, 6, S, S): channels 0-2 for DINOv2 (ImageNet statistics), 3-5 for SigLIP (0.5) -> (B, T, D1 + D2)."""
        return torch.cat([self.featurizer(pixels[:, :3]), self.fused_featurizer(pixels[:, 3:])], -1)


# ---- what both policies share ----------------------------------------------------------------------------------------

class Policy(nn.Module):
    """Input checks, settings, statistics, saving. Subclasses: vision, prompt, act, evaluate, bc_loss."""
    SETTINGS = {}

    def __init__(self, config, settings):
        super().__init__()
        unknown = sorted(set(settings) - set(self.SETTINGS))
        if unknown:
            raise ValueError(problem(f"settings of {type(self).__name__}", unknown, "known names",
                                     f"one of {sorted(self.SETTINGS)}"))
        self.config, self.settings = config, {**self.SETTINGS, **settings}
        self.tokenizer, self.source, self.bf16 = None, None, False
        self.statistics = {}             # {dataset: {"action": {q01, q99, mask, ...}, "state": {...}}}, official numbers

    @property
    def device(self):
        return self.value_head[0].weight.device

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    @property
    def stats(self):
        """Statistics of the dataset named by `unnorm_key`; it may be left out when there is exactly one."""
        key, names = self.settings["unnorm_key"], list(self.statistics)
        if key is None and len(names) == 1:
            key = names[0]
        if key not in self.statistics:
            raise ValueError(problem("normalisation statistics (unnorm_key)", repr(key), "one dataset name",
                                     f"unnorm_key=one of {names}" if names else "policy.set_statistics(name, stats)"))
        return self.statistics[key]

    def set_statistics(self, name, stats):
        """Replace all statistics by one dataset's: {"action": {"q01": [7], "q99": [7], ...}, "state": {...} optional}.

        Physical units, gripper -1 close .. +1 open. Quantile ranges below 1e-3 are widened: dividing by a range that
        is nearly zero turns sensor noise into actions of hundreds (a known way to ruin a fine-tune).
        """
        stats = dict(stats if "action" in stats else {"action": stats.get("actions", stats)}, **{
            key: stats[key] for key in ("state",) if key in stats})
        stats = {part: {k: np.asarray(v).tolist() for k, v in block.items()} for part, block in stats.items()
                 if part in ("action", "state")}
        action = stats["action"]
        got = {k: np.shape(action.get(k)) for k in ("q01", "q99")}
        if set(got.values()) != {(ACTION_DIM,)} or not np.isfinite([action["q01"], action["q99"]]).all():
            raise ValueError(problem(f"statistics {name!r}", f"action {got}", f"finite q01 and q99 of length {ACTION_DIM}",
                                     "the statistics that real_data.py computes"))
        low, high = np.array(action["q01"], float), np.array(action["q99"], float)
        narrow = high - low < 1e-3
        middle = (low + high) / 2
        action["q01"] = np.where(narrow, middle - 5e-4, low).tolist()
        action["q99"] = np.where(narrow, middle + 5e-4, high).tolist()
        action.setdefault("mask", [True] * 6 + [False])
        action.setdefault("gripper_range", [-1.0, 1.0])
        self.statistics, self.settings["unnorm_key"] = {name: stats}, None

    def check(self, images, instructions=None, actions=None, pad=None):
        """One ValueError that names every offender. Returns images as a uint8 or feature tensor on the device."""
        images = torch.as_tensor(images)
        bad, size, features = [], len(images) if images.ndim else 0, images.ndim == self.feature_ndim
        if features and images.is_floating_point():
            if tuple(images.shape[-2:]) != self.feature_shape or not images.isfinite().all():
                bad.append(problem("image features", f"{tuple(images.shape)}, finite: {bool(images.isfinite().all())}",
                                   f"finite (..., {self.feature_shape[0]}, {self.feature_shape[1]})",
                                   "what this policy's encode_images returned"))
        else:
            if images.dtype != torch.uint8:
                nan = " with NaN" if images.is_floating_point() and images.isnan().any() else ""
                bad.append(problem("images", f"dtype {images.dtype}{nan}", "uint8, 0..255",
                                   "(images * 255).round().astype('uint8')"))
            if images.ndim not in self.image_ndims or images.shape[-1] != 3 or 0 in images.shape:
                bad.append(problem("images", f"shape {tuple(images.shape)}", self.image_help, "channels last, RGB"))
        if instructions is None:
            pass
        elif isinstance(instructions, str) or not all(isinstance(text, str) for text in instructions):
            bad.append(problem("instructions", type(instructions).__name__, "a list of str", "[instruction] * B"))
        elif len(instructions) != size:
            bad.append(problem("instructions", f"{len(instructions)} for {size} images", "one for each image",
                               "[instruction] * len(images)"))
        elif empty := [i for i, text in enumerate(instructions) if not text.strip()]:
            bad.append(problem("instructions", f"empty text at {empty}", "a task in words", "'open the drawer'"))
        if actions is not None:
            bad += self.check_actions(torch.as_tensor(actions), pad, size)
        if bad:
            raise ValueError("\n".join(bad))
        return images.to(self.device)

    def check_actions(self, actions, pad, size):
        bad, least = [], self.settings.get("horizon") or 1
        if actions.ndim != 3 or actions.shape[-1] != ACTION_DIM or len(actions) != size or actions.shape[1] < least:
            bad.append(problem("actions", f"shape {tuple(actions.shape)}", f"({size}, >= {least}, {ACTION_DIM})",
                               "dx dy dz droll dpitch dyaw gripper, one chunk per image"))
        elif not actions.isfinite().all():
            rows = (~actions.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            bad.append(problem("actions", f"NaN or inf in samples {rows}", "finite numbers", "to drop these samples"))
        if pad is not None and tuple(torch.as_tensor(pad).shape) != tuple(actions.shape[:2]):
            bad.append(problem("pad", f"shape {tuple(torch.as_tensor(pad).shape)}", f"{tuple(actions.shape[:2])}",
                               "True where a chunk runs past the end of its episode"))
        return bad

    def encode(self, text):
        if self.tokenizer is None:
            raise ValueError(problem("tokenizer", f"no tokenizer.json in {self.source}", "the checkpoint's own",
                                     f"load_policy(..., tokenizer='path/to/tokenizer.json'), from {self.tokenizer_home}"))
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def freeze(self, part):
        """part: "none", "vision" (the towers; features may then be cached), "vlm" (pi0.5: all but expert and heads)."""
        prefixes = dict(none=(), vision=self.vision_parts, vlm=self.vlm_parts)
        if part not in prefixes:
            raise ValueError(problem("freeze", repr(part), "a known part", f"one of {list(prefixes)}"))
        for name, parameter in self.named_parameters():
            if name.startswith(prefixes[part]):
                parameter.requires_grad_(False)

    def official_tensors(self):
        return {self.official_key(name): tensor for name, tensor in self.state_dict().items()
                if ".lora_" not in name and not name.startswith(HEADS)}

    def save(self, folder):
        """Official layout (float32 safetensors, config.json, tokenizer, statistics), plus policy.json, heads.safetensors
        and, apart in lora/, the adapters in PEFT format. Every file is written beside and renamed; none is deleted."""
        folder = Path(folder)
        if list(folder.glob("*.safetensors.index.json")):
            raise ValueError(problem("save", f"{folder}, which holds a sharded checkpoint", "another folder", "a new one"))
        partial = folder / ".partial"
        partial.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.official_tensors().items()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        heads = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items() if name.startswith(HEADS)}
        save_file(heads, partial / "heads.safetensors", metadata={"format": "pt"})
        adapted = bool(lora_modules(self))
        write_json(partial / "policy.json", dict(settings=self.settings, lora=adapted))
        if adapted:
            save_lora(self, partial / "lora", base="..")
        if self.tokenizer is not None:
            self.tokenizer.save(str(partial / "tokenizer.json"))
        self.write_companions(partial)
        for file in [f for f in partial.rglob("*") if f.is_file()]:
            target = folder / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        shutil.rmtree(partial)


# ---- OpenVLA: 7 action tokens ------------------------------------------------------------------------------------------

TIMM = {  # geometry of the two official towers; config["tiny_timm_kwargs"] overrides it in small checkpoints
    "vit_large_patch14_reg4_dinov2.lvd142m": dict(embed_dim=1024, depth=24, num_heads=16, patch_size=14, reg_tokens=4,
                                                  init_values=1e-5),
    "vit_so400m_patch14_siglip_224": dict(embed_dim=1152, depth=27, num_heads=16, patch_size=14, mlp_ratio=3.7362,
                                          class_token=False, global_pool="map"),
}
BIN_EDGES = np.linspace(-1, 1, 256)
BIN_CENTRES = (BIN_EDGES[:-1] + BIN_EDGES[1:]) / 2               # 255 of them: the two lowest ids share +0.996


class Projector(nn.Module):
    def __init__(self, vision_dim, dim):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(vision_dim, 4 * vision_dim), nn.Linear(4 * vision_dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class OpenVLA(Policy):
    """DINOv2 + SigLIP patches -> projector -> Llama, which writes 7 action tokens.

    Sequence  [BOS][T patches][PAD..][prompt text][lone space] -> a_0 .. a_6 </s>     positions skip the PADs
    Settings  unnorm_key: dataset whose statistics un-normalise; temperature of sampling (log-probs follow it);
              center_crop: True for checkpoints tuned with image augmentation on LIBERO (crop 90 %, lanczos resize)
    """
    SETTINGS = dict(unnorm_key=None, temperature=1.0, center_crop=False)
    vision_parts, vlm_parts = ("vision_backbone.",), ("vision_backbone.", "projector.", "language_model.")
    image_ndims, feature_ndim, image_help = (4,), 3, "(B, H, W, 3)"
    tokenizer_home = "openvla/openvla-7b"

    def __init__(self, config, **settings):
        super().__init__(config, settings)
        if not config.get("use_fused_vision_backbone", True) or len(config["timm_model_ids"]) != 2:
            raise ValueError(problem("vision backbone", config["timm_model_ids"], f"the fused pair {list(TIMM)}",
                                     "openvla/openvla-7b or a fine-tune of it"))
        text, tiny, self.image_size = config["text_config"], config.get("tiny_timm_kwargs", {}), config["image_sizes"][0]
        towers = [dict(TIMM[name], **tiny.get(part, {}), image_size=size) for name, part, size in
                  zip(config["timm_model_ids"], ("featurizer", "fused_featurizer"), config["image_sizes"])]
        # What text_config leaves out has LlamaConfig's default; notably eps 1e-6, not Llama-2's 1e-5.
        width, heads = text.get("hidden_size", 4096), text.get("num_attention_heads", 32)
        vision_dim, vocab = sum(tower["embed_dim"] for tower in towers), text.get("vocab_size", 32000)
        self.vision_backbone = VisionBackbone(*(ViT(**tower) for tower in towers))
        self.projector = Projector(vision_dim, width)
        self.language_model = nn.ModuleDict(dict(
            model=Decoder(width, text.get("num_hidden_layers", 32), text.get("intermediate_size", 11008), heads,
                          text.get("num_key_value_heads", heads), text.get("head_dim", width // heads), act="silu",
                          eps=text.get("rms_norm_eps", 1e-6), theta=text.get("rope_theta", 10000.0), offset=0.0,
                          vocab=vocab),
            lm_head=nn.Linear(width, vocab, bias=False)))
        self.value_head = Head((width, 512, 128, 1), nn.GELU, last_bias=False)
        self.feature_shape = ((towers[0]["image_size"] // towers[0]["patch_size"]) ** 2, vision_dim)
        self.vocab = vocab - config.get("pad_to_multiple_of", 64)       # without the padding rows: 32000 of 32064
        self.bos, self.eos = text.get("bos_token_id", 1), text.get("eos_token_id", 2)
        self.pad = config.get("pad_token_id", self.vocab)

    def official_key(self, name):
        return name

    internal_key = official_key

    # -- actions <-> tokens (official tables) --

    def decode_tokens(self, ids):
        """Token ids -> normalised values, float64 numpy. Ids outside the 256 saturate at +-0.996."""
        return BIN_CENTRES[np.clip(self.vocab - np.asarray(ids) - 1, 0, 254)]

    def encode_values(self, values):
        """Normalised values -> token ids: id = vocab - d, d = digitize(clip(v, -1, 1), 256 edges) in 1..256."""
        return self.vocab - np.digitize(np.clip(values, -1, 1), BIN_EDGES)

    def unnormalize(self, values):
        """v -> 0.5 (v + 1) (q99 - q01) + q01 where mask (absent: everywhere), v elsewhere; in the data set's own units."""
        stats = self.stats["action"]
        low, high = np.array(stats["q01"]), np.array(stats["q99"])
        return np.where(stats.get("mask", True), 0.5 * (values + 1) * (high - low) + low, values)

    def normalize(self, actions):
        """Inverse, clipped to [-1, 1]; a dimension that never moved becomes 0."""
        stats = self.stats["action"]
        low, high = np.array(stats["q01"]), np.array(stats["q99"])
        values = np.where(high == low, 0.0, 2 * (actions - low) / (high - low + 1e-8) - 1)
        return np.clip(np.where(stats.get("mask", True), values, actions), -1, 1)

    @property
    def gripper_range(self):
        """(closed, open) as the data set writes it. Official data sets use 0..1, known by q01 >= 0; ours says -1..1."""
        stats = self.stats["action"]
        return stats.get("gripper_range", (0.0, 1.0) if stats["q01"][6] >= 0 else (-1.0, 1.0))

    def to_actions(self, tokens):
        """(B, 7) ids -> (B, 1, 7) float32 physical actions, gripper mapped onto [-1 close, +1 open]."""
        actions = self.unnormalize(self.decode_tokens(tokens.cpu().numpy()))
        closed, opened = self.gripper_range
        actions[:, 6] = 2 * (actions[:, 6] - closed) / (opened - closed) - 1
        return torch.tensor(actions, dtype=torch.float32, device=self.device)[:, None]

    def to_tokens(self, actions):
        """(B, 7) physical actions -> (B, 7) ids."""
        actions = np.array(actions, dtype=np.float64)
        closed, opened = self.gripper_range
        actions[:, 6] = (actions[:, 6] + 1) / 2 * (opened - closed) + closed
        return torch.from_numpy(self.encode_values(self.normalize(actions))).to(self.device)

    # -- observation -> hidden states --

    def pixels(self, images):
        """(B, H, W, 3) uint8 -> (B, 6, S, S) float32: resized, /255, normalised once for each tower."""
        size = self.image_size
        if self.settings["center_crop"]:
            images = images.cpu().numpy()
            images = images if images.shape[1:3] == (size, size) else resize_lanczos3(images, size)
            images = torch.from_numpy(center_crop_90(images, size)).to(self.device)
        elif images.shape[1:3] != (size, size):
            images = torch.from_numpy(resize_bicubic(images.cpu().numpy(), size)).to(self.device)
        x = images.permute(0, 3, 1, 2).float() / 255
        mean, std = x.new_tensor([[.485, .456, .406], [.229, .224, .225]])[:, :, None, None]
        return torch.cat([(x - mean) / std, (x - 0.5) / 0.5], 1)

    def encode_images(self, images):
        """(B, H, W, 3) uint8 -> vision features (B, T, D) float32, DINOv2 and SigLIP side by side."""
        pixels = self.pixels(self.check(images))
        with self.autocast():
            return self.vision_backbone(pixels).float()

    def prompt(self, instructions):
        """-> ids, mask (B, L). BOS in column 0, then PADs, then the text: all prompts end in the last column."""
        space = self.tokenizer and self.tokenizer.token_to_id("▁")      # 29871 in Llama's vocabulary
        rows = []
        for text in instructions:
            row = self.encode(f"In: What action should the robot take to {text.lower()}?\nOut:")
            rows.append(row if row[-1] == space else row + [space])     # training text had a space before the actions
        ids = torch.full((len(rows), 1 + max(map(len, rows))), self.pad)
        ids[:, 0] = self.bos
        for i, row in enumerate(rows):
            ids[i, -len(row):] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
        mask[:, 0] = True
        return ids.to(self.device), mask.to(self.device)

    def hidden(self, images, ids, mask, tokens=None):
        """Final-norm hidden states (B, 1 + n, D) of the last prompt token and of `tokens` (B, n); valid; keys/values."""
        features = images if images.is_floating_point() else self.encode_images(images)
        with self.autocast():
            text = self.language_model["model"].embed_tokens(ids if tokens is None else torch.cat([ids, tokens], 1))
            x = torch.cat([text[:, :1], self.projector(features), text[:, 1:]], 1)           # (B, T, D)
            valid = mask.new_ones(x.shape[:2])
            valid[:, x.shape[1] - text.shape[1] + 1:][:, :ids.shape[1] - 1] = mask[:, 1:]
            causal = valid.new_ones(x.shape[1], x.shape[1]).tril() & valid[:, None, None]    # (B, 1, T, T)
            hidden, kv = self.language_model["model"](x, valid.cumsum(1) - 1, causal)
        return hidden, valid, kv

    def logits(self, hidden):
        with float32(hidden):
            return self.language_model["lm_head"](hidden.float())                            # (..., V)

    def action_log_probs(self, hidden):
        """log softmax over the 256 action ids only, at the sampling temperature, float32: (..., 256)."""
        return (self.logits(hidden)[..., self.vocab - 256:self.vocab] / self.settings["temperature"]).log_softmax(-1)

    def prompt_hidden(self, images, instructions):
        """Hidden state of the last prompt token (B, D): the one that predicts a_0."""
        return self.hidden(self.check(images, instructions), *self.prompt(instructions))[0][:, -1].float()

    # -- the contract --

    @torch.no_grad()
    def act(self, images, instructions, deterministic=False, generator=None):
        """Sample (or take the best of) 7 tokens with a key/value cache. Returns Decision, K = 1."""
        hidden, valid, kv = self.hidden(self.check(images, instructions), *self.prompt(instructions))
        value, tokens, logp = self.value_head(hidden[:, -1])[:, 0], [], 0.0
        for i in range(ACTION_DIM):
            log_probs = self.action_log_probs(hidden[:, -1])                                 # (B, 256)
            choice = (log_probs.argmax(-1, keepdim=True) if deterministic else
                      torch.multinomial(log_probs.exp(), 1, generator=generator))            # (B, 1)
            logp = logp + log_probs.gather(1, choice)[:, 0]
            tokens.append(choice + self.vocab - 256)
            if i < ACTION_DIM - 1:                               # feed it back: one new column
                valid = F.pad(valid, (0, 1), value=True)
                with self.autocast():
                    x = self.language_model["model"].embed_tokens(tokens[-1])                # (B, 1, D)
                    hidden, kv = self.language_model["model"](x, valid.sum(1, keepdim=True) - 1,
                                                              valid[:, None, None], past=kv)
        tokens = torch.cat(tokens, 1)                                                        # (B, 7)
        return Decision(self.to_actions(tokens), logp, value, {"tokens": tokens})

    def evaluate(self, images, instructions, trace):
        """One teacher-forced pass over the sampled tokens. logp is their sum; entropy the mean over the 7, in nats."""
        tokens = trace["tokens"]
        hidden = self.hidden(self.check(images, instructions), *self.prompt(instructions), tokens[:, :-1])[0]
        states = hidden[:, -ACTION_DIM:]                                                     # (B, 7, D)
        log_probs = self.action_log_probs(states)                                            # (B, 7, 256)
        logp = log_probs.gather(-1, (tokens - self.vocab + 256)[..., None])[..., 0].sum(1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean(1)
        return logp, entropy, self.value_head(states[:, 0])[:, 0]

    def bc_loss(self, images, instructions, actions, pad=None):
        """-mean log p over the 7 action tokens and </s>, softmax over the whole vocabulary. Uses step 0 of each chunk."""
        images, actions = self.check(images, instructions, actions, pad), torch.as_tensor(actions)
        tokens = self.to_tokens(actions[:, 0].cpu())                                         # (B, 7)
        hidden = self.hidden(images, *self.prompt(instructions), tokens)[0][:, -ACTION_DIM - 1:]
        loss = F.cross_entropy(self.logits(hidden).transpose(1, 2), F.pad(tokens, (0, 1), value=self.eos),
                               reduction="none").mean(1)                                     # (B,)
        keep = torch.ones_like(loss) if pad is None else (~torch.as_tensor(pad)[:, 0].to(loss.device).bool()).float()
        return (loss * keep).sum() / keep.sum().clamp(min=1)

    def write_companions(self, folder):
        norm_stats = {name: {{"state": "proprio"}.get(part, part): block for part, block in stats.items()}
                      for name, stats in self.statistics.items()}
        write_json(folder / "config.json", {**self.config, "norm_stats": norm_stats})
        write_json(folder / "dataset_statistics.json", norm_stats)
        sizes = [[3, size, size] for size in self.config["image_sizes"]]
        write_json(folder / "preprocessor_config.json", dict(
            image_processor_type="PrismaticImageProcessor", image_resize_strategy="resize-naive", input_sizes=sizes,
            interpolations=["bicubic"] * 2, means=[[.485, .456, .406], [.5] * 3], stds=[[.229, .224, .225], [.5] * 3],
            use_fused_vision_backbone=True))
        write_json(folder / "generation_config.json", dict(bos_token_id=self.bos, eos_token_id=self.eos,
                                                           pad_token_id=self.pad))

    def read_statistics(self, folder):
        """dataset_statistics.json replaces the config's norm_stats, as in the official evaluation; a key that only the
        config has is still found by name."""
        tables = [self.config.get("norm_stats") or {}, read_json(folder / "dataset_statistics.json", {})]
        key = self.settings["unnorm_key"]
        table = tables[0] if key in tables[0] and key not in tables[1] else (tables[1] or tables[0])
        self.statistics = {name: {"action": stats["action"], **({"state": stats["proprio"]} if "proprio" in stats else {})}
                           for name, stats in table.items()}


# ---- pi0.5: flow matching ------------------------------------------------------------------------------------------------

GEMMA = {  # openpi's names of the two stacks; config["vlm"] and config["expert"] override them in small checkpoints
    "gemma_2b": dict(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256),
    "gemma_300m": dict(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256),
}
SIGLIP = dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, image_size=224,
              patch_size=14, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)


def complete_pi05_config(raw):
    """openpi, LeRobot or tiny config.json -> all sizes under one set of names (the official keys stay beside them)."""
    variant = lambda key, default: dict(GEMMA[raw.get(key, default).removesuffix("_lora")])
    return {**raw, "type": "pi05", "action_dim": raw.get("action_dim", raw.get("max_action_dim", 32)),
            "action_horizon": raw.get("action_horizon", raw.get("chunk_size", 8)),
            "max_token_len": raw.get("max_token_len", raw.get("tokenizer_max_length", 200)),
            "vocab_size": raw.get("vocab_size", 257152), "vision": {**SIGLIP, **raw.get("vision", {})},
            "vlm": raw.get("vlm") or variant("paligemma_variant", "gemma_2b"),
            "expert": raw.get("expert") or variant("action_expert_variant", "gemma_300m")}


class Pi05(Policy):
    """SigLIP + Gemma read images and prompt once; the action expert turns noise into a chunk of H actions.

    Time      t = 1 is noise, t = 0 is the action chunk; v = noise - action, so a step is x <- x - v / S
    Settings  sampler: "flow_noise" (learned noise at every step) | "flow_sde" (fixed noise at one random step)
              steps S, chunk K (executed), horizon H (None: the checkpoint's), noise_level (flow_sde), noise_std (range
              of flow_noise), discrete_state: the state as text in the prompt (then `state` must be passed),
              delta_mask: action dims that are stored relative to the state, style: "openpi" | "lerobot" resizing and
              epsilons, norm: "quantile" | "mean_std". act, evaluate and bc_loss take two more inputs:
              state (B, n) float, and camera_mask (B, N) bool, False = this camera is missing.
    """
    SETTINGS = dict(unnorm_key=None, sampler="flow_noise", steps=4, chunk=4, horizon=None, noise_level=0.5,
                    noise_std=(0.08, 0.16), discrete_state=False, delta_mask=None, style=None, norm=None)
    vision_parts, vlm_parts = ("vision_tower.",), ("vision_tower.", "multi_modal_projector.", "language_model.")
    image_ndims, feature_ndim, image_help = (4, 5), 4, "(B, H, W, 3) or (B, N, H, W, 3)"
    tokenizer_home = "google/paligemma-3b-pt-224"

    def __init__(self, config, **settings):
        from transformers import SiglipVisionConfig, SiglipVisionModel
        config = complete_pi05_config(config)
        super().__init__(config, settings)
        vision, vlm, expert = config["vision"], config["vlm"], config["expert"]
        self.horizon = self.settings["horizon"] = self.settings["horizon"] or config["action_horizon"]
        bad = [problem(f"setting {k}", repr(self.settings[k]), need, "the default") for k, ok, need in (
            ("sampler", self.settings["sampler"] in ("flow_noise", "flow_sde"), "flow_noise or flow_sde"),
            ("steps", self.settings["steps"] >= 1, "at least 1"),
            ("chunk", 1 <= self.settings["chunk"] <= self.horizon, f"1..horizon = {self.horizon}")) if not ok]
        if bad:
            raise ValueError("\n".join(bad))
        siglip = {k: vision[k] for k in SIGLIP}
        self.vision_tower = SiglipVisionModel(SiglipVisionConfig(**siglip, vision_use_head=False, attn_implementation="sdpa"))
        self.multi_modal_projector = nn.ModuleDict(dict(linear=nn.Linear(vision["hidden_size"], vlm["width"])))
        gemma = dict(act="gelu_tanh", eps=config.get("rms_norm_eps", 1e-6), theta=config.get("rope_theta", 1e4), offset=1.0)
        self.language_model = Decoder(**vlm, **gemma, vocab=config["vocab_size"])
        width, dim = expert["width"], config["action_dim"]
        self.gemma_expert = Decoder(**expert, **gemma, cond_dim=width)
        self.action_in_proj, self.action_out_proj = nn.Linear(dim, width), nn.Linear(width, dim)
        self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        self.value_head = Head((vlm["width"], 512, 256, 128, 1), nn.ReLU, last_bias=True)
        self.noise_head = Head((width, 128, 64, dim), nn.Tanh, last_bias=True)
        self.image_size, self.action_dim = vision["image_size"], dim
        self.feature_shape = ((vision["image_size"] // vision["patch_size"]) ** 2, vision["hidden_size"])

    # Official names differ from ours by fixed stems only; wrappers of training frameworks are stripped.
    def official_key(self, name):
        stem = "paligemma_with_expert."
        if name.startswith("vision_tower."):
            return name.replace("vision_tower.", stem + "paligemma.model.vision_tower.vision_model.", 1)
        if name.startswith(("multi_modal_projector.", "language_model.")):
            return stem + "paligemma.model." + name
        return name.replace("gemma_expert.", stem + "gemma_expert.model.", 1)

    def internal_key(self, name):
        name = re.sub(r"_fsdp_wrapped_module\.|_orig_mod\.", "", name)
        name = re.sub(r"^(module\.|model\.)*(paligemma_with_expert\.)?(paligemma\.)?(model\.)?", "", name)
        return name.replace("vision_tower.vision_model.", "vision_tower.").replace("gemma_expert.model.", "gemma_expert.")

    def official_tensors(self):
        """openpi's file stores the tied embedding as lm_head, and an lm_head of the expert that nothing ever uses."""
        tensors, stem = super().official_tensors(), "paligemma_with_expert."
        embedding = tensors.pop(stem + "paligemma.model.language_model.embed_tokens.weight")
        unused = torch.zeros(len(embedding), self.action_in_proj.out_features, dtype=torch.bfloat16)
        return {**tensors, stem + "paligemma.lm_head.weight": embedding, stem + "gemma_expert.lm_head.weight": unused}

    # -- units --

    def affine(self, part):
        """Normalised = (x - offset) / scale, both (n,) float64: quantiles to [-1, 1], or z-scores. Nothing is clipped."""
        stats = {key: torch.tensor(value, dtype=torch.float64, device=self.device)
                 for key, value in self.stats[part].items() if key in ("q01", "q99", "mean", "std")}
        lerobot = self.settings["style"] == "lerobot"
        if self.settings["norm"] == "mean_std":
            return stats["mean"], stats["std"] + (1e-8 if lerobot else 1e-6)
        spread = stats["q99"] - stats["q01"]
        spread = torch.where(spread == 0, 1e-8, spread) if lerobot else spread + 1e-6
        return stats["q01"] + spread / 2, spread / 2

    def shift(self, actions, state, sign):
        """Delta actions: the same current state is added to (sign 1) or taken from (sign -1) every step of the chunk."""
        mask = self.settings["delta_mask"]
        if mask is None:
            return actions
        relative = torch.as_tensor(mask, device=actions.device)
        state = torch.as_tensor(state, device=actions.device)[:, None, :len(relative)]
        return torch.cat([actions[..., :len(relative)] + sign * state * relative, actions[..., len(relative):]], -1)

    def unnormalize(self, x, state=None):
        """(B, H, A) model units -> (B, H, 7) float32 physical actions; padding dimensions are dropped."""
        offset, scale = self.affine("action")
        return self.shift(x[..., :len(scale)].double() * scale + offset, state, 1).float()

    def normalize(self, actions, state=None):
        """(B, H, 7) physical -> (B, H, A) model units, zero-padded after normalising."""
        offset, scale = self.affine("action")
        x = (self.shift(torch.as_tensor(actions).to(self.device).double(), state, -1) - offset) / scale
        return F.pad(x, (0, self.action_dim - x.shape[-1])).float()

    def state_bins(self, state):
        """(B, n) physical state -> 256 bins of [-1, 1]; above 1: 255, below -1: -1, as the official prompt prints it."""
        offset, scale = self.affine("state")
        x = ((torch.as_tensor(state).to(self.device).double()[:, :len(scale)] - offset) / scale).cpu().numpy()
        return np.digitize(x, np.linspace(-1, 1, 257)[:-1]) - 1

    # -- observation -> prefix --

    def encode_images(self, images, camera_mask=None):
        """(B, [N,] H, W, 3) uint8 -> features (B, N, T, D) float32. A camera missing in the whole batch costs nothing."""
        images = self.check(images)
        images = images if images.ndim == 5 else images[:, None]                             # (B, N, H, W, 3)
        present = images.new_ones(images.shape[1]).bool() if camera_mask is None else torch.as_tensor(
            camera_mask).to(self.device).any(0)
        flat = images[:, present].flatten(0, 1)                                              # (B N', H, W, 3)
        if flat.shape[1:3] != (self.image_size, self.image_size):
            style = self.settings["style"]
            x = torch.from_numpy(resize_with_pad(flat.cpu().numpy(), self.image_size, style)).to(self.device)
        else:
            x = flat.float() / 255 * 2 - 1
        with self.autocast():
            out = self.vision_tower(x.permute(0, 3, 1, 2)).last_hidden_state.float()
        features = out.new_zeros(*images.shape[:2], *out.shape[1:])
        features[:, present] = out.unflatten(0, (len(images), -1))
        return features

    def prompt(self, instructions, state=None):
        """-> ids, mask (B, L), right-padded to the longest prompt of the batch. BOS first, no EOS."""
        bins = self.state_bins(state) if self.settings["discrete_state"] else None
        rows = []
        for i, text in enumerate(instructions):
            text = text.strip().replace("_", " ").replace("\n", " ")
            if bins is None:
                row = self.encode(text) + self.encode("\n")      # two calls, as in openpi: the newline never merges
            else:
                row = self.encode(f"Task: {text}, State: {' '.join(map(str, bins[i]))};\nAction: ")
            rows.append([2, *row][:self.config["max_token_len"]])                            # PaliGemma: <bos> = 2
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return ids.to(self.device), mask.to(self.device)

    def prefix(self, features, camera_mask, ids, mask):
        """VLM pass -> hidden (B, P, D), keys/values of each layer, valid (B, P). P = cameras present * T + L.

        Every token may look at every valid one. The suffix is not looked at, so this pass serves all denoising steps,
        in training too. Padding and missing cameras take no position.
        """
        if camera_mask is None:
            camera_mask = mask.new_ones(features.shape[:2])
        present = camera_mask.any(0)
        with self.autocast():
            image = self.multi_modal_projector["linear"](features[:, present])               # (B, N', T, D)
            text = self.language_model.embed_tokens(ids) * image.shape[-1] ** 0.5            # only the text is scaled
            x = torch.cat([image.flatten(1, 2).to(text.dtype), text], 1)                     # (B, P, D)
            valid = torch.cat([camera_mask[:, present].repeat_interleave(image.shape[2], 1), mask], 1)
            hidden, kv = self.language_model(x, valid.cumsum(1) - 1, valid[:, None, None])
        return hidden, kv, valid

    def observe(self, images, instructions, state, camera_mask, actions=None, pad=None):
        images = self.check(images, instructions, actions, pad)
        needs = self.settings["discrete_state"] or self.settings["delta_mask"] is not None
        if needs and (state is None or len(state) != len(images) or not np.isfinite(np.asarray(state)).all()):
            raise ValueError(problem("state", None if state is None else np.shape(state), "(B, n), finite",
                                     "state=obs['state'], or the stateless prompt (discrete_state=False)"))
        if camera_mask is not None:
            camera_mask = torch.as_tensor(camera_mask).to(self.device).bool()
        features = images if images.is_floating_point() else self.encode_images(images, camera_mask)
        return self.prefix(features, camera_mask, *self.prompt(instructions, state))

    def pooled(self, hidden, valid):
        """Mean of the valid prefix tokens, (B, D) float32."""
        return (hidden.float() * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)

    def prompt_hidden(self, images, instructions, state=None, camera_mask=None):
        """What the value head reads: the pooled prefix (B, D)."""
        hidden, _, valid = self.observe(images, instructions, state, camera_mask)
        return self.pooled(hidden, valid)

    # -- action expert --

    def time_embedding(self, t):
        """t (B, S) -> (B, S, W): sines, then cosines, of 2 pi t / p_i with p_i from 4e-3 to 4; angles in float64."""
        half = self.time_mlp_in.in_features // 2
        period = 4e-3 * 1000 ** (torch.arange(half, dtype=torch.float64, device=self.device) / (half - 1))
        angle = 2 * math.pi * t[..., None].double() / period
        e = torch.cat([angle.sin(), angle.cos()], -1).float()
        with float32(e):
            return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(e))))

    def velocity(self, x, t, kv, valid):
        """v(x_t, t) for S chunks of one observation at once: x (B, S, H, A), t (B, S) -> v (B, S, H, A), h (B, S, H, W).

        Each chunk sees the valid prefix and itself, never another chunk. Sampling has S = 1; recomputing the log-prob
        of a whole chain has S = all steps, which shares one read of the prefix and is cheaper than a loop.
        """
        (batch, chunks, horizon), device = x.shape[:3], x.device
        own = torch.eye(chunks, dtype=torch.bool, device=device).repeat_interleave(horizon, 0).repeat_interleave(horizon, 1)
        mask = torch.cat([valid[:, None].expand(-1, len(own), -1), own.expand(batch, -1, -1)], -1)[:, None]
        positions = valid.sum(1, keepdim=True) + torch.arange(horizon, device=device).repeat(chunks)   # (B, S H)
        cond = self.time_embedding(t)[:, :, None]                                            # (B, S, 1, W)
        with float32(x):
            x = self.action_in_proj(x)                                                       # (B, S, H, W)
        with self.autocast():
            hidden = self.gemma_expert(x, positions, mask, past=kv, cond=cond)[0].float()
        with float32(x):
            return self.action_out_proj(hidden), hidden

    def transition(self, x, v, h, step):
        """Gaussian of the next state, x' ~ N(mean, std), at noisy steps (B, S). d = 1/S, t = 1 - step d:

        x_data = x - t v, x_noise = x + (1-t) v,  mean = (1-(t-d)) x_data + w x_noise
        flow_noise  w = t - d                     std = s_phi(h), log-variance squashed into noise_std
        flow_sde    w = t - d - sigma^2 d/(2t)    std = sigma sqrt(d),  sigma = a sqrt(t/(1-t)), with 1-t_1 for 1-t_0
        """
        d = 1 / self.settings["steps"]
        t = (1 - step * d)[..., None, None].float()                                          # (B, S, 1, 1)
        x_data, x_noise, weight = x - t * v, x + (1 - t) * v, t - d
        if self.settings["sampler"] == "flow_noise":
            low, high = (2 * math.log(s) for s in self.settings["noise_std"])
            std = ((low + (high - low) * (self.noise_head(h).tanh() + 1) / 2) / 2).exp()
        else:
            sigma = self.settings["noise_level"] * (t / torch.where(step[..., None, None] == 0, d, 1 - t)).sqrt()
            weight = weight - sigma ** 2 * d / (2 * t)
            std = (sigma * d ** 0.5).expand_as(x)
        return (1 - (t - d)) * x_data + weight * x_noise, std

    def chain_logp(self, x, x_next, mean, std):
        """log-prob of a chain (B,): the mean over its S + 1 factors N(x^0; 0, 1) and N(x^{i+1}; mean_i, std_i) when
        every step is noisy (flow_noise), the one noisy step alone otherwise; each summed over executed steps x 7 dims."""
        executed = (..., slice(self.settings["chunk"]), slice(ACTION_DIM))
        steps = -0.5 * ((x_next - mean) / std) ** 2 - std.log() - 0.5 * LN2PI                # (B, S, H, A)
        steps = steps[executed].sum((1, 2, 3))
        if self.settings["sampler"] == "flow_sde":
            return steps
        start = (-0.5 * x[:, 0] ** 2 - 0.5 * LN2PI)[executed].sum((1, 2))
        return (start + steps) / (x.shape[1] + 1)

    # -- the contract --

    @torch.no_grad()
    def act(self, images, instructions, deterministic=False, generator=None, state=None, camera_mask=None):
        """Denoise a chunk in S steps; deterministic: the plain ODE (still from random noise). Executes the first K."""
        hidden, kv, valid = self.observe(images, instructions, state, camera_mask)
        total, shape = self.settings["steps"], (len(valid), self.horizon, self.action_dim)
        draw = lambda: torch.randn(shape, generator=generator, device=self.device)[:, None]  # (B, 1, H, A)
        noisy = range(total)
        if self.settings["sampler"] == "flow_sde":
            noisy = torch.randint(total, (1,), generator=generator, device=self.device).tolist()
        x, rows = draw(), []
        for i in range(total):
            step = torch.full((len(valid), 1), i, device=self.device)
            v, h = self.velocity(x, 1 - step / total, kv, valid)
            x_next = x - v / total
            if i in noisy and not deterministic:
                mean, std = self.transition(x, v, h, step)
                x_next = mean + std * draw()
                rows.append((x, x_next, step, mean, std))
            x = x_next
        empty = x.new_zeros(len(valid), 0, *shape[1:])
        chain = [torch.cat(part, 1) for part in zip(*rows)] or [empty, empty, step[:, :0]]
        logp = self.chain_logp(chain[0], chain[1], *chain[3:]) if rows else x.new_zeros(len(valid))
        actions = self.unnormalize(x[:, 0], state)[:, :self.settings["chunk"]]
        return Decision(actions, logp, self.value_head(self.pooled(hidden, valid))[:, 0],
                        dict(x=chain[0], x_next=chain[1], step=chain[2]))

    def evaluate(self, images, instructions, trace, state=None, camera_mask=None):
        """log-prob of the stored chain under the current weights, one expert pass for all its noisy steps.

        entropy: of flow_noise, mean over the S + 1 factors, executed steps and 7 dims, in nats; 0 for flow_sde.
        """
        hidden, kv, valid = self.observe(images, instructions, state, camera_mask)
        x, step = trace["x"], trace["step"]                                                  # (B, S, H, A), (B, S)
        value = self.value_head(self.pooled(hidden, valid))[:, 0]
        if not x.shape[1]:                                       # a deterministic chunk: no density
            return torch.zeros_like(value), torch.zeros_like(value), value
        v, h = self.velocity(x, 1 - step / self.settings["steps"], kv, valid)
        mean, std = self.transition(x, v, h, step)
        logp = self.chain_logp(x, trace["x_next"], mean, std)
        if self.settings["sampler"] == "flow_sde":
            return logp, torch.zeros_like(logp), value
        log_std = std[..., :self.settings["chunk"], :ACTION_DIM].log().mean((2, 3)).sum(1)   # (B,)
        return logp, 0.5 * (LN2PI + 1) + log_std / (x.shape[1] + 1), value

    def flow_loss(self, kv, valid, actions, noise, t):
        """x_t = t noise + (1-t) actions, target u = noise - actions: (v(x_t, t) - u)^2 per element, (B, H, A)."""
        x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
        v = self.velocity(x_t[:, None], t[:, None], kv, valid)[0][:, 0]
        return (v - (noise - actions)) ** 2

    def bc_loss(self, images, instructions, actions, pad=None, generator=None, state=None, camera_mask=None):
        """Flow matching, t ~ 0.001 + 0.999 Beta(1.5, 1); mean over the 7 real dims of the steps that are not padding."""
        _, kv, valid = self.observe(images, instructions, state, camera_mask, actions, pad)
        actions = self.normalize(actions, state)[:, :self.horizon]                           # (B, H, A)
        noise = torch.randn(actions.shape, generator=generator, device=self.device)
        t = 0.001 + 0.999 * torch.rand(len(actions), generator=generator, device=self.device) ** (1 / 1.5)
        loss = self.flow_loss(kv, valid, actions, noise, t)[..., :ACTION_DIM].mean(-1)       # (B, H)
        keep = torch.ones_like(loss) if pad is None else (~torch.as_tensor(pad).to(loss.device).bool()).float()
        keep = keep[:, :self.horizon]
        return (loss * keep).sum() / keep.sum().clamp(min=1)

    def write_companions(self, folder):
        write_json(folder / "config.json", self.config)
        for name, stats in self.statistics.items():
            write_json(folder / "assets" / name / "norm_stats.json", {"norm_stats": {
                {"action": "actions"}.get(part, part): block for part, block in stats.items()}})

    def read_statistics(self, folder):
        """openpi and RLinf: <anywhere>/norm_stats.json. LeRobot: the normaliser files beside its processors."""
        for file in sorted(folder.rglob("norm_stats.json")):
            stats = read_json(file)["norm_stats"]
            name = str(file.parent.relative_to(folder)).removeprefix("assets/")
            self.statistics[name] = {"action": stats["actions"], **({"state": stats["state"]} if "state" in stats else {})}
        modes = {"QUANTILES": "quantile", "MEAN_STD": "mean_std"}
        mode = self.config.get("normalization_mapping", {}).get("ACTION", "QUANTILES")
        flat = {}
        for file in sorted(folder.glob("policy_p*normalizer_processor.safetensors")):
            flat.update(read_safetensors(file))
        if flat and not self.statistics:
            pick = lambda feature: {key.rsplit(".", 1)[1]: value.tolist() for key, value in flat.items()
                                    if key.rsplit(".", 1)[0] == feature}
            self.statistics = {"lerobot": {"action": pick("action"), "state": pick("observation.state")}}
        if mode not in modes:
            raise ValueError(problem("normalization_mapping", mode, f"one of {list(modes)}", "another checkpoint"))
        lerobot = "normalization_mapping" in self.config or "chunk_size" in self.config
        self.settings["style"] = self.settings["style"] or ("lerobot" if lerobot else "openpi")
        self.settings["norm"] = self.settings["norm"] or modes[mode]


# ---- checkpoints -----------------------------------------------------------------------------------------------------------

def read_json(path, default=None):
    if default is not None and not Path(path).exists():
        return default
    return json.loads(Path(path).read_text())


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def read_safetensors(path):
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(problem(str(path), f"{type(error).__name__}: {error}", "a complete safetensors file",
                                 "downloading it again")) from error


def read_tensors(folder):
    """All tensors of a checkpoint folder: the shards of an index, loose safetensors files, or RLinf's full_weights.pt."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = [folder / name for index in indices for name in sorted(set(read_json(index)["weight_map"].values()))]
    files = files or [file for file in sorted(folder.glob("*.safetensors"))
                      if not file.name.startswith(("policy_", "heads", "adapter_model"))]
    if files:
        return {key: tensor for file in files for key, tensor in read_safetensors(file).items()}
    for file in ("model_state_dict/full_weights.pt", "actor/model_state_dict/full_weights.pt"):
        if (folder / file).exists():
            return torch.load(folder / file, map_location="cpu", weights_only=True)
    raise ValueError(problem(str(folder), "no weights", "*.safetensors", "downloading the checkpoint again"))


def load_tensors(policy, tensors, folder):
    """Strict, after mapping names: one error lists every missing, unexpected and misshapen tensor. Weights: float32."""
    extra = ("value_head.", "noise_head.", "proprio_projector.", "action_head.")      # heads of other RL fine-tunes
    tensors = {policy.internal_key(key): value for key, value in tensors.items()}
    tied = tensors.get("lm_head.weight")
    if isinstance(policy, Pi05):     # a stored embed_tokens is the live one; both lm_heads are never used
        if tied is not None:
            tensors.setdefault("language_model.embed_tokens.weight", tied)
        extra += ("lm_head.", "gemma_expert.lm_head.")
    own = {key: value for key, value in policy.state_dict().items() if not key.startswith(HEADS)}
    tensors = {key: value for key, value in tensors.items()
               if not key.startswith(extra) and not key.endswith("rotary_emb.inv_freq")}
    bad = [f"missing {key}" for key in own if key not in tensors]
    bad += [f"unexpected {key}" for key in tensors if key not in own]
    bad += [f"misshapen {key}: {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}"
            for key in own if key in tensors and tensors[key].shape != own[key].shape]
    if bad:
        raise ValueError(problem(f"weights in {folder}", f"{len(bad)} problems:\n  " + "\n  ".join(bad) + "\n",
                                 "the tensors that config.json describes", "another config.json or checkpoint"))
    policy.load_state_dict({key: tensors[key].float() for key in own}, strict=False, assign=True)


@torch.no_grad()
def init_weights(module, seed):
    """N(0, 1/fan_in) matrices, zero biases, unit norms; output layers N(0, 0.02), so that losses start at their
    theoretical value; adaRMS gates zero (openpi's start: the expert is the identity). Meta tensors become real."""
    generator = torch.Generator().manual_seed(seed)
    module.to_empty(device="cpu")
    for name, p in module.named_parameters():
        if name.endswith(".bias") or ".dense." in name:
            nn.init.zeros_(p)
        elif p.ndim == 1:
            offset = name.startswith("language_model") and isinstance(module, Pi05)          # Gemma stores w - 1
            nn.init.constant_(p, 0.0 if offset else 1.0)
        else:
            small = name.endswith(("lm_head.weight", "action_out_proj.weight", "pos_embed", "token", "latent"))
            nn.init.normal_(p, std=0.02 if small else p[0].numel() ** -0.5, generator=generator)
    init_heads(module, seed)


@torch.no_grad()
def init_heads(policy, seed):
    """Hidden layers Kaiming fan-out, last layer of the value head N(0, 0.02), biases zero."""
    generator = torch.Generator().manual_seed(seed)
    for head in [policy.value_head] + ([policy.noise_head] if isinstance(policy, Pi05) else []):
        head.to_empty(device="cpu")
        linears = [layer for layer in head if isinstance(layer, nn.Linear)]
        for layer in linears:
            std = 0.02 if layer is linears[-1] else (2 / layer.out_features) ** 0.5
            nn.init.normal_(layer.weight, std=std, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if isinstance(policy, Pi05):     # transformers keeps SigLIP's position ids outside the state dict
        table = policy.vision_tower.embeddings
        table.position_ids = torch.arange(table.position_embedding.num_embeddings)[None]


def find_folder(name):
    """Bundled name, local folder, or hub id -> local folder."""
    if name in BUNDLED:
        if not BUNDLED[name].is_dir():
            raise ValueError(problem(f"bundled policy {name!r}", f"no folder {BUNDLED[name]}", "its checkpoint",
                                     f"make_tiny({name!r}).save({str(BUNDLED[name])!r}), then train it"))
        return BUNDLED[name]
    if Path(name).is_dir():
        return Path(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not str(name).startswith("."):
        from huggingface_hub import snapshot_download
        try:
            return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.h5", "*.msgpack"]))
        except Exception as error:
            raise ValueError(problem(f"policy {name!r}", f"no such folder, and the hub says: {error}", "a folder or hub id",
                                     f"one of {list(BUNDLED)}, or a downloaded folder")) from error
    raise ValueError(problem(f"policy {name!r}", "nothing of that name", f"one of {list(BUNDLED)}, a folder or a hub id",
                             "'openvla', 'openvla/openvla-7b' or a path"))


def check_device(device, dtype):
    device = torch.device(device)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(problem("dtype", repr(dtype), "float32 or bfloat16", "dtype='float32'"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(problem("device", str(device), "a CUDA GPU that torch can see", "device='cpu'"))
    has_bf16 = {"cuda": torch.cuda.is_bf16_supported, "cpu": torch.backends.mkldnn.is_available}.get(device.type, bool)
    if dtype == "bfloat16" and not has_bf16():
        raise ValueError(problem("dtype", f"bfloat16 on {device}", "a device with bfloat16", "dtype='float32'"))
    return device


def build(config, folder, settings):
    kind = "openvla" if config.get("model_type") == "openvla" else config.get("type") or (
        "pi05" if "action_horizon" in config or "paligemma_variant" in config else None)
    if kind not in ("openvla", "pi05"):
        raise ValueError(problem(f"{folder}/config.json", f"model_type {config.get('model_type')}, type {kind}",
                                 "an OpenVLA or pi0.5 checkpoint", "model_type 'openvla' or type 'pi05'"))
    with torch.device("meta"):
        return (OpenVLA if kind == "openvla" else Pi05)(config, **settings)


def load_policy(name, device="cpu", dtype="float32", adapter=None, merge=False, lora_rank=0, lora_alpha=None,
                lora_targets=LORA_TARGETS, freeze="none", gradient_checkpointing=False, tokenizer=None, seed=0, **settings):
    """A policy from a bundled name, a folder or a hub id.

    dtype      "float32", or "bfloat16": autocast over float32 weights
    adapter    PEFT folder to put on top (a `name` that is itself an adapter folder brings its base model along);
               kept apart and trainable, or folded into the weights with merge=True
    lora_rank  > 0: fresh adapters on lora_targets, base frozen (see add_lora)
    freeze     "none" | "vision" | "vlm"
    tokenizer  path of a tokenizer.json, for checkpoints that come without
    settings   those of OpenVLA.SETTINGS or Pi05.SETTINGS; what was saved with the policy is the default
    Raises ValueError: what, got, need, try.
    """
    device, folder = check_device(device, dtype), find_folder(name)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
        adapter, folder = folder, find_folder(folder / base if (folder / base).is_dir() else base)
    if not (folder / "config.json").exists():
        raise ValueError(problem(str(folder), sorted(f.name for f in folder.iterdir())[:8], "a config.json",
                                 "the folder that holds the weights and config.json"))
    saved = read_json(folder / "policy.json", {})
    policy = build(read_json(folder / "config.json"), folder, {**saved.get("settings", {}), **settings})
    load_tensors(policy, read_tensors(folder), folder)
    init_heads(policy, seed)
    if (folder / "heads.safetensors").exists():
        policy.load_state_dict(read_safetensors(folder / "heads.safetensors"), strict=False)
    policy.read_statistics(folder)
    tokenizer = Path(tokenizer or folder / "tokenizer.json")
    policy.tokenizer, policy.source = Tokenizer.from_file(str(tokenizer)) if tokenizer.exists() else None, str(folder)
    if adapter or saved.get("lora"):
        load_lora(policy, find_folder(adapter) if adapter else folder / "lora")
    if merge:
        merge_lora(policy)
    if lora_rank:
        add_lora(policy, lora_rank, lora_alpha, lora_targets, seed)
    policy.freeze(freeze)
    set_checkpointing(policy, gradient_checkpointing)
    policy.bf16 = dtype == "bfloat16"
    return policy.to(device).eval()          # there is no dropout; eval() says that act and update agree


def set_checkpointing(policy, on):
    """Recompute every block in the backward pass: memory for about a third more time."""
    for module in policy.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = on
    if on and isinstance(policy, Pi05):
        policy.vision_tower.gradient_checkpointing_enable({"use_reentrant": False})


# ---- tiny policies -----------------------------------------------------------------------------------------------------------

TINY_WORDS = """pick up the object on table and place it into white tray put plate bowl push cube to open close
drawer red green blue yellow orange purple pink brown black gray a of in from left right top bottom middle block can
banana carrot bottle cup box ball spoon mug sponge apple lemon pepper bread toy next goal target move grasp lift""".split()
TINY = dict(
    openvla=dict(
        model_type="openvla", architectures=["OpenVLAForActionPrediction"], arch_specifier="no-align+fused-gelu-mlp",
        image_resize_strategy="resize-naive", use_fused_vision_backbone=True, vision_backbone_id="dinosiglip-vit-so-224px",
        image_sizes=[64, 64], timm_model_ids=list(TIMM), timm_override_act_layers=[None, None], n_action_bins=256,
        llm_backbone_id="llama2-7b-pure", hf_llm_id="meta-llama/Llama-2-7b-hf", llm_max_length=2048,
        pad_to_multiple_of=64, output_projector_states=False,
        tiny_timm_kwargs=dict(featurizer=dict(embed_dim=64, depth=3, num_heads=2, patch_size=16),
                              fused_featurizer=dict(embed_dim=64, depth=3, num_heads=2, patch_size=16, mlp_ratio=4.0)),
        text_config=dict(model_type="llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4)),
    pi05=dict(type="pi05", action_dim=8, action_horizon=8, max_token_len=200,
              vision=dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
                          image_size=64, patch_size=16),
              vlm=dict(width=128, depth=3, mlp_dim=384, num_heads=4, num_kv_heads=1, head_dim=32),
              expert=dict(width=96, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32)))


def tiny_tokenizer(name):
    """The structure of the official one, small: specials first, "▁" for a space, the fixed prompt text as two pieces,
    common words, single characters for all others; for OpenVLA the last 256 ids are the actions."""
    llama = name == "openvla"
    special = ["<unk>", "<s>", "</s>"] if llama else ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = ["▁", "▁In:▁What▁action▁should▁the▁robot▁take▁to", "?\nOut:", "\n", "Task:▁", ",▁State:▁", ";\nAction:▁"]
    pieces += ["▁" + word for word in TINY_WORDS] + [chr(i) for i in range(33, 127)]
    pieces += [chr(0xE000 + i) for i in range(256)] if llama else TINY_WORDS
    pieces = special + list(dict.fromkeys(pieces))
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=special.index("<unk>")))
    steps = [normalizers.Prepend("▁")] if llama else []          # Llama writes a space in front, Gemma does not
    tokenizer.normalizer = normalizers.Sequence(steps + [normalizers.Replace(" ", "▁")])
    return tokenizer


def make_tiny(name, seed=0, **settings):
    """A small policy with random weights and placeholder statistics, of the very classes that run the real ones."""
    if name not in TINY:
        raise ValueError(problem("make_tiny", repr(name), f"one of {list(TINY)}", "make_tiny('openvla')"))
    config, tokenizer = json.loads(json.dumps(TINY[name])), tiny_tokenizer(name)
    vocab = tokenizer.get_vocab_size()
    if name == "openvla":
        config["pad_token_id"] = config["text_config"]["pad_token_id"] = vocab
        config["text_config"]["vocab_size"] = vocab + config["pad_to_multiple_of"]
    else:
        config["vocab_size"] = vocab
    policy = build(config, name, settings)
    init_weights(policy, seed)
    policy.tokenizer, policy.source = tokenizer, f"make_tiny({name!r})"
    policy.read_statistics(Path("/nonexistent"))
    reach = np.array([0.05] * 3 + [0.25] * 3 + [1.0])            # m, rad, gripper: what a step may be, until data says more
    policy.set_statistics("placeholder", {"action": {"q01": -reach, "q99": reach}})
    return policy.eval()
