"""Two vision-language-action policies behind one contract: OpenVLA (action tokens) and pi0.5 (flow matching).

    policy = load_policy("openvla" | "pi05" | folder | hub id)    # the tiny bundled ones, or the real 7 B and 3.3 B
    decision = policy.act(images, instructions)                     # actions, log pi(a|o), V(o), trace
    logp, entropy, value = policy.evaluate(images, instructions, decision.trace)    # the same, with gradient
    loss = policy.bc_loss(images, instructions, actions, pad)       # L_SFT on demonstrations
    policy.save(folder)                                             # official layout, readable by other loaders

Images    (B, H, W, 3) uint8 RGB, or (B, N, H, W, 3) for N cameras of pi0.5; or, wherever images may stand,
          policy.encode_images(images): with frozen towers they are computed once and used in every epoch
Actions   (B, K, 7) float32: dx dy dz [m], droll dpitch dyaw [rad], gripper -1 close .. +1 open
Log-probs float32 nats, one per decision: all 7 tokens, or the whole executed chunk
Shapes    B batch, T image tokens, L prompt tokens, D width, H horizon, K executed steps, A model action dims
Official and tiny checkpoints run through the same code. It departs from the reference implementations thus:
 1. OpenVLA acts in batches, and among the 256 action tokens only (official: batch 1, whole vocabulary).
 2. One decoder serves Llama, Gemma and the action expert. It keeps no RoPE buffer, so no cast can round one.
 3. pi0.5 trains and samples by the same prefix pass -> keys/values -> expert pass. Gradients are the same.
 4. The pi0.5 critic averages the valid prefix tokens; the reference averages the padding in as well.
 5. Weights stay float32; "bfloat16" is autocast around matmuls. Logits, heads, time, norms: always float32.
"""
import json
import math
import re
import timeit
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

exact = lambda x: torch.autocast(x.device.type, enabled=False)           # around everything that must not be rounded
ACTION_DIM, LN2PI = 7, math.log(2 * math.pi)
BUNDLED = {name: Path(__file__).resolve().parent / "base" / f"{name}-tiny" for name in ("openvla", "pi05")}
HEADS = ("value_head.", "noise_head.")                   # ours: saved apart, so that others read the official part
LORA_TARGETS = ("q", "kv", "qkv", "proj", "fc1", "fc2", "fc3", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj",
                "gate_proj", "up_proj", "down_proj", "lm_head")          # PEFT's "all-linear", as last names of layers

class Decision(NamedTuple):
    actions: torch.Tensor    # (B, K, 7) float32, physical units
    logp: torch.Tensor       # (B,) float32, log pi(trace | observation); 0 for a deterministic pi0.5 chunk
    value: torch.Tensor      # (B,) float32
    trace: dict              # what was sampled, for `evaluate`: tensors with leading B, to index and concatenate

def expect(ok, what, got, need, remedy, into=None):
    """Unless ok, raise a ValueError with the four things a user needs, or append them to the list `into`."""
    if not ok and into is None:
        raise ValueError(f"{what}: got {got}; need {need}; try {remedy}")
    if not ok:
        into.append(f"{what}: got {got}; need {need}; try {remedy}")

def reads_state(settings):
    """Whether act, evaluate and bc_loss of a policy with these settings take the robot's `state`."""
    return bool(settings.get("discrete_state")) or settings.get("delta_mask") is not None

def recompute(module, *inputs):
    """module(*inputs), by gradient checkpointing if load_policy asked for it: a third more time, far less memory."""
    on = getattr(module, "checkpointing", False) and torch.is_grad_enabled()
    return checkpoint(module, *inputs, use_reentrant=False) if on else module(*inputs)

# ---- images ----------------------------------------------------------------------------------------------------------
def resize_lanczos3(images, size):
    """(B, H, W, 3) uint8 -> (B, size, size, 3), as tf.image.resize(lanczos3, antialias=True) and rounding."""
    def weights(n):
        d = (np.arange(n) + 0.5 - (np.arange(size)[:, None] + 0.5) * n / size) / max(n / size, 1.0)
        w = np.where(np.abs(d) < 3, np.sinc(d) * np.sinc(d / 3), 0)
        return w / w.sum(1, keepdims=True)                                               # (size, n)
    y, x = weights(images.shape[1]), weights(images.shape[2])
    out = np.einsum("yh,bhwc,xw->byxc", y, images.astype(np.float64), x, optimize=True)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)

def center_crop_90(images, size):
    """Central 90 % of the area, to (size, size), in the float32 arithmetic of tf.image.crop_and_resize."""
    side = np.sqrt(np.float32(0.9))
    low = (1 - side) / np.float32(2)
    def axis(n):                                         # left neighbour, right neighbour and weight of each sample
        step = (low + side - low) * np.float32(n - 1) / np.float32(size - 1)
        at = low * np.float32(n - 1) + np.arange(size, dtype=np.float32) * step
        i = np.floor(at).astype(int)
        return i, np.minimum(i + 1, n - 1), at - i
    (y0, y1, fy), (x0, x1, fx) = axis(images.shape[1]), axis(images.shape[2])
    x = images * np.float32(1 / 255)
    x = x[:, :, x0] + (x[:, :, x1] - x[:, :, x0]) * fx[:, None]
    x = x[:, y0] + (x[:, y1] - x[:, y0]) * fy[:, None, None]
    return np.minimum(np.floor(np.clip(x, 0, 1) * np.float32(255.5)), 255).astype(np.uint8)

def resize_with_pad(images, size, style):
    """(B, H, W, 3) uint8 -> (B, size, size, 3) float32 in [-1, 1], aspect kept, black bars. "openpi" shrinks
    with PIL (antialiased), "lerobot" with F.interpolate (not): 0.017 apart on a contrasty image."""
    ratio = max(images.shape[1] / size, images.shape[2] / size)
    h, w = int(images.shape[1] / ratio), int(images.shape[2] / ratio)
    if style == "lerobot":
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        x = F.interpolate(x, (h, w), mode="bilinear", align_corners=False).permute(0, 2, 3, 1).numpy()
    else:
        x = np.stack([Image.fromarray(image).resize((w, h), Image.BILINEAR) for image in images])
        x = x.astype(np.float32) / 255 * 2 - 1
    top, left = (size - h) // 2, (size - w) // 2         # an odd remainder goes to the bottom and the right
    return np.pad(x, ((0, 0), (top, size - h - top), (left, size - w - left), (0, 0)), constant_values=-1.0)

# ---- LoRA: y = W x + (alpha/r) B A x, in PEFT's file format ----------------------------------------------------------
def lora_hook(layer, inputs, output):
    return output + layer.lora_scale * layer.lora_B(layer.lora_A(inputs[0]))

def attach_lora(layer, rank, alpha):
    """On a Linear, or a Conv2d (A: a convolution of the same shape, B: 1x1). B = 0 starts as the identity."""
    outputs, inputs = layer.weight.shape[:2]
    if isinstance(layer, nn.Conv2d):
        layer.lora_A = nn.Conv2d(inputs, rank, layer.kernel_size, layer.stride, bias=False)
        layer.lora_B = nn.Conv2d(rank, outputs, 1, bias=False)
    else:
        layer.lora_A, layer.lora_B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
    nn.init.zeros_(layer.lora_B.weight)
    layer.lora_scale, layer.lora_handle = alpha / rank, layer.register_forward_hook(lora_hook)

def lora_modules(policy):
    return {name: layer for name, layer in policy.named_modules() if hasattr(layer, "lora_A")}

def add_lora(policy, rank, alpha=None, targets=LORA_TARGETS, seed=0):
    """Fresh adapters on layers whose last name is in `targets`; alpha and A ~ N(0, 1/rank) as in OpenVLA."""
    layers = [layer for name, layer in policy.named_modules()
              if name.split(".")[-1] in targets and isinstance(layer, (nn.Linear, nn.Conv2d))]
    expect(layers, "lora_targets", list(targets), "last names of layers", f"some of {LORA_TARGETS}")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        attach_lora(layer, rank, alpha or min(rank, 16))
        nn.init.normal_(layer.lora_A.weight, std=1 / rank, generator=generator)

@torch.no_grad()
def merge_lora(policy):
    """W += (alpha/r) B A on every adapted layer, and the adapters are gone."""
    for layer in lora_modules(policy).values():
        delta = layer.lora_B.weight.flatten(1) @ layer.lora_A.weight.flatten(1)
        layer.weight += layer.lora_scale * delta.view_as(layer.weight)
        layer.lora_handle.remove()
        del layer.lora_A, layer.lora_B, layer.lora_scale, layer.lora_handle

def save_lora(policy, folder, base):
    layers = {policy.official_key(name): layer for name, layer in lora_modules(policy).items()}
    ranks = {name: len(layer.lora_A.weight) for name, layer in layers.items()}
    alphas = {name: layer.lora_scale * ranks[name] for name, layer in layers.items()}
    config = dict(peft_type="LORA", base_model_name_or_path=base, target_modules=list(layers), rank_pattern=ranks,
                  alpha_pattern=alphas, r=max(ranks.values()), lora_alpha=max(alphas.values()), bias="none")
    write_json(folder / "adapter_config.json", config)
    save_file({f"base_model.model.{name}.lora_{x}.weight": getattr(layer, f"lora_{x}").weight.detach().cpu()
               for name, layer in layers.items() for x in "AB"}, folder / "adapter_model.safetensors")

def load_lora(policy, folder):
    """Adapters of a PEFT folder. Ranks come from the shapes, alphas from adapter_config.json."""
    config, layers = read_json(folder / "adapter_config.json"), dict(policy.named_modules())
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    names = sorted({key.split(".lora_")[0] for key in tensors if ".base_layer." not in key})  # PEFT's copy of lm_head
    keys = {name: name.removeprefix("base_model.model.") for name in names}
    bad = [name for name in names if policy.internal_key(keys[name]) not in layers]
    bad += [f"{name}.lora_{x}" for name in names for x in "AB" if f"{name}.lora_{x}.weight" not in tensors]
    bad += ["use_dora"] * bool(config.get("use_dora"))
    expect(not bad, f"adapter {folder}", f"a misfit: {bad}", "plain LoRA of this policy", "the base it was trained on")
    patterns = (config.get("alpha_pattern") or {}).items()
    for name, key in keys.items():
        layer, a, b = layers[policy.internal_key(key)], *(tensors[f"{name}.lora_{x}.weight"] for x in "AB")
        alpha = next((x for pattern, x in patterns if re.match(rf"(.*\.)?({pattern})$", key)), config["lora_alpha"])
        attach_lora(layer, len(a), alpha * (math.sqrt(len(a)) if config.get("use_rslora") else 1))
        layer.lora_A.weight.data.copy_(a)
        layer.lora_B.weight.data.copy_(b)

# ---- the decoder: Llama, Gemma and the action expert -----------------------------------------------------------------
def linears(bias=True, **shapes):
    """name=(inputs, outputs), .. -> Linear layers under the names of the official files."""
    return nn.ModuleDict({name: nn.Linear(*shape, bias=bias) for name, shape in shapes.items()})

class RMSNorm(nn.Module):
    """y = x/rms(x) * (offset + w), offset 0 in Llama and 1 in Gemma. With a condition c (adaRMS, the expert):
    [scale, shift, gate] = W c + b,  y = x/rms(x) * (1 + scale) + shift; the gate multiplies the sub-block."""
    def __init__(self, dim, eps, offset, cond_dim):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.dense = nn.Linear(cond_dim, 3 * dim) if cond_dim else None
        self.weight = None if cond_dim else nn.Parameter(torch.ones(dim))

    def forward(self, x, cond):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        if cond is None:
            return (y * (self.offset + self.weight)).to(x.dtype), 1.0
        with exact(x):
            scale, shift, gate = self.dense(cond).chunk(3, -1)
        return (y * (1 + scale) + shift).to(x.dtype), gate

def rotate(x, cos, sin):
    """RoPE on pairs (i, i + hd/2): the first half with the second half, not even with odd."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

class DecoderLayer(nn.Module):
    def __init__(self, width, mlp_dim, num_heads, num_kv_heads, head_dim, act, norm):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.act = num_heads, num_kv_heads, head_dim, act
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width, **norm), RMSNorm(width, **norm)
        q, kv = num_heads * head_dim, num_kv_heads * head_dim
        self.self_attn = linears(False, q_proj=(width, q), k_proj=(width, kv), v_proj=(width, kv), o_proj=(q, width))
        self.mlp = linears(False, gate_proj=(width, mlp_dim), up_proj=(width, mlp_dim), down_proj=(mlp_dim, width))

    def forward(self, x, rotary, mask, past, cond):
        attn, mlp, (h, gate) = self.self_attn, self.mlp, self.input_layernorm(x, cond)
        split = lambda y, heads: y.view(len(y), -1, heads, self.head_dim).transpose(1, 2)            # (B, heads, T, hd)
        q, k = (rotate(split(attn[n](h), m), *rotary) for n, m in (("q_proj", self.heads), ("k_proj", self.kv_heads)))
        v = split(attn["v_proj"](h), self.kv_heads)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)                # (B, kv, past + T, hd)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        x = x + gate * attn["o_proj"](y.transpose(1, 2).reshape(*x.shape[:-1], -1))
        h, gate = self.post_attention_layernorm(x, cond)
        return x + gate * mlp["down_proj"](self.act(mlp["gate_proj"](h)) * mlp["up_proj"](h)), (k, v)

class Decoder(nn.Module):
    """Pre-norm transformer over x (B, T, D), or (B, S, H, D) with one condition per block, cond (B, S, 1, D).
    mask (B, 1, T or 1, past + T), True = may be attended. Nothing is mutated: keys (after RoPE) and values are
    returned and go back in as `past`; training, cached sampling and checkpointing share one path."""
    def __init__(self, width, depth, vocab=None, *, head_dim, eps, theta, offset, cond_dim=None, **layer):
        super().__init__()
        self.head_dim, self.theta, norm = head_dim, theta, dict(eps=eps, offset=offset, cond_dim=cond_dim)
        self.embed_tokens = nn.Embedding(vocab, width) if vocab else None
        self.layers = nn.ModuleList(DecoderLayer(width, head_dim=head_dim, norm=norm, **layer) for _ in range(depth))
        self.norm = RMSNorm(width, **norm)

    def forward(self, x, positions, mask, past=None, cond=None):
        pair = torch.arange(0, self.head_dim, 2, device=x.device).float()
        angle = positions[:, None, :, None].float() * (1.0 / self.theta ** (pair / self.head_dim))    # (B, 1, T, hd/2)
        rotary, kv = (angle.cos(), angle.sin()), []
        for i, layer in enumerate(self.layers):
            x, kv_i = recompute(layer, x, rotary, mask, past and past[i], cond)
            kv.append(kv_i)
        return self.norm(x, cond)[0], kv

class Head(nn.Sequential):
    """Small float32 MLP on a hidden state: value head or noise head."""
    def __init__(self, sizes, act, last_bias):
        layers = [layer for n, m in zip(sizes[:-2], sizes[1:-1]) for layer in (nn.Linear(n, m), act())]
        super().__init__(*layers, nn.Linear(*sizes[-2:], bias=last_bias))

    def forward(self, x):
        with exact(x):
            return super().forward(x.float())

# ---- the vision transformer of OpenVLA -------------------------------------------------------------------------------
class ViTBlock(nn.Module):
    def __init__(self, dim, heads, hidden, layer_scale):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mlp = linears(fc1=(dim, hidden), fc2=(hidden, dim))
        self.attn = linears(qkv=(dim, 3 * dim), proj=(dim, dim))
        if layer_scale:                                  # timm's LayerScale gamma, under its official key
            self.ls1, self.ls2 = (nn.ParameterDict(dict(scale_factor=torch.ones(dim))) for _ in range(2))

    def forward(self, x):
        qkv = self.attn["qkv"](self.norm1(x)).view(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                             # each (B, heads, T, hd)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        s1, s2 = (self.ls1["scale_factor"], self.ls2["scale_factor"]) if hasattr(self, "ls1") else (1.0, 1.0)
        x = x + s1 * self.attn["proj"](y)
        return x + s2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))          # exact GELU in both towers

class ViT(nn.Module):
    """timm's ViT under its own names: DINOv2 with `reg_tokens` registers, CLS and LayerScale, SigLIP without.
    Features are block depth-2, without final norm, as OpenVLA was trained. The last block, the norm and the
    attention pool of official files are kept for saving, and never run."""
    def __init__(self, image_size, embed_dim, depth, num_heads, patch_size, mlp_ratio=4.0, reg_tokens=None, **implied):
        super().__init__()
        dim, hidden, self.dino = embed_dim, int(embed_dim * mlp_ratio), reg_tokens is not None
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, dim))
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads, hidden, self.dino) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if self.dino:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, dim))
        else:
            self.attn_pool = linears(q=(dim, dim), kv=(dim, 2 * dim), proj=(dim, dim))
            self.attn_pool.norm, self.attn_pool.mlp = nn.LayerNorm(dim), linears(fc1=(dim, hidden), fc2=(hidden, dim))
            self.attn_pool.latent = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, pixels):
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + self.pos_embed       # (B, T, D)
        front = [self.cls_token, self.reg_token] if self.dino else []                    # these have no position
        x = torch.cat([*(token.expand(len(patches), -1, -1) for token in front), patches], 1)
        for block in self.blocks[:-1]:
            x = recompute(block, x)
        return x[:, -patches.shape[1]:]

# ---- what both policies share ----------------------------------------------------------------------------------------
class Policy(nn.Module):
    def __init__(self, config, settings):
        super().__init__()
        unknown = sorted(set(settings) - set(self.SETTINGS))
        expect(not unknown, "settings", unknown, f"names of {sorted(self.SETTINGS)}", "the spelling above")
        self.config, self.settings, self.statistics = config, {**self.SETTINGS, **settings}, {}
        self.tokenizer, self.source, self.bf16 = None, None, False

    @property
    def device(self):
        return self.value_head[0].weight.device

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    def stats(self):
        """Statistics of the data set named by `unnorm_key`; may be left out when there is exactly one."""
        names = list(self.statistics)
        key = self.settings["unnorm_key"] or (names[0] if len(names) == 1 else None)
        expect(key in names, "unnorm_key", repr(key), f"one of {names}", "it, or policy.set_statistics(name, stats)")
        return self.statistics[key]

    def set_statistics(self, name, stats):
        """Replace all by one data set's {"action": {"q01": (7,), "q99": (7,)}, "state": optional}, in the contract's
        units. Ranges below 1e-3 are widened: division by nearly zero turns noise into huge actions."""
        stats = {part: {key: np.asarray(value).tolist() for key, value in stats[part].items()}
                 for part in ("action", "state") if part in stats}
        low, high = (np.array(stats.get("action", {}).get(key, []), float) for key in ("q01", "q99"))
        fine = low.shape == high.shape == (ACTION_DIM,) and np.isfinite(low + high).all()
        expect(fine, f"statistics {name!r}", f"q01 {low}, q99 {high} of actions", "7 finite numbers each", "others")
        middle, narrow = (low + high) / 2, high - low < 1e-3
        low, high = np.where(narrow, middle - 5e-4, low), np.where(narrow, middle + 5e-4, high)
        stats["action"] = {"mask": [True] * 6 + [False], "gripper_range": [-1.0, 1.0], **stats["action"],
                           "q01": low.tolist(), "q99": high.tolist()}
        self.statistics, self.settings["unnorm_key"] = {name: stats}, None

    def check(self, images, instructions=None, actions=None, pad=None):
        """One ValueError naming every offender. Returns images (uint8) or features (float) on the device."""
        images, bad = torch.as_tensor(images), []
        size, last, finite = len(images) if images.ndim else 0, images.shape[-2:], bool(images.isfinite().all())
        pixels = images.dtype == torch.uint8 and images.ndim in self.image_ndims and last[-1] == 3
        features = images.is_floating_point() and images.ndim == self.image_ndims[-1] - 1 and last == self.feature_shape
        expect(size and (pixels or features and finite), "images",
               f"{images.dtype} {tuple(images.shape)}{'' if finite else ' with NaN'}",
               f"uint8 RGB (B, H, W, 3){' or (B, N, H, W, 3)' * (5 in self.image_ndims)}, or finite features",
               "channels last, 0..255; or policy.encode_images(images)", bad)
        if instructions is not None:
            empty = [i for i, text in enumerate(instructions) if not (isinstance(text, str) and text.strip())]
            expect(not isinstance(instructions, str) and len(instructions) == size and not empty, "instructions",
                   f"{type(instructions).__name__} of {len(instructions)}, empty or no text at {empty}",
                   f"a list of {size} non-empty str, one for each image", "['open the drawer'] * B", bad)
        if actions is not None:
            actions, least = torch.as_tensor(actions), self.settings.get("horizon", 1)
            shape, nan = tuple(actions.shape), [i for i, a in enumerate(actions) if not a.isfinite().all()]
            fine = len(shape) == 3 and shape[0] == size and shape[1] >= least and shape[2] == ACTION_DIM and not nan
            expect(fine and (pad is None or pad.shape == shape[:2]), "actions",
                   f"{shape}, pad {getattr(pad, 'shape', None)}, NaN or inf in samples {nan}",
                   f"finite ({size}, >= {least}, 7), dx .. gripper; pad {shape[:2]} or None", "real_data.py", bad)
        if bad:
            raise ValueError("\n".join(bad))
        return images.to(self.device)

    def reduce(self, loss, pad, reduction):
        """`none`: loss (B, H) as it is; `mean`: its mean over the steps that are not padding."""
        if reduction == "none":
            return loss
        keep = torch.ones_like(loss) if pad is None else 1 - torch.as_tensor(pad)[:, :loss.shape[1]].to(loss)
        return (loss * keep).sum() / keep.sum().clamp(min=1)

    def encode(self, text):
        expect(self.tokenizer, f"tokenizer.json of {self.source}", "none", f"that of {self.home}", "tokenizer=path")
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def official_tensors(self):
        return {self.official_key(name): tensor for name, tensor in self.state_dict().items()
                if ".lora_" not in name and not name.startswith(HEADS)}

    def save(self, folder):
        """Official layout (float32 safetensors, config.json, tokenizer, statistics), plus policy.json and
        heads.safetensors, and adapters apart in lora/ as PEFT has them. Crash-safe: save, then rename."""
        folder, adapted = Path(folder), bool(lora_modules(self))
        foreign = {f.name for f in folder.glob("*.safetensors*")} - {"model.safetensors", "heads.safetensors"}
        expect(not foreign, "save", f"{folder}, which holds {foreign}", "a folder of our own", "another name")
        for name, content in {**self.json_files(), "policy.json": dict(settings=self.settings, lora=adapted)}.items():
            write_json(folder / name, content)
        heads = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(HEADS)}
        for name, tensors in (("model", self.official_tensors()), ("heads", heads)):
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        if adapted:
            save_lora(self, folder / "lora", base="..")
        if self.tokenizer:
            self.tokenizer.save(str(folder / "tokenizer.json"))
            default = dict(tokenizer_class="PreTrainedTokenizerFast", **self.special)
            write_json(folder / "tokenizer_config.json", read_json(self.source / "tokenizer_config.json", default))

# ---- OpenVLA: seven action tokens ------------------------------------------------------------------------------------
TIMM = {  # geometry of the two official towers; "tiny_timm_kwargs" in config.json overrides it
    "vit_large_patch14_reg4_dinov2.lvd142m": dict(embed_dim=1024, depth=24, num_heads=16, patch_size=14, reg_tokens=4),
    "vit_so400m_patch14_siglip_224": dict(embed_dim=1152, depth=27, num_heads=16, patch_size=14, mlp_ratio=3.7362)}
PIXELS = dict(means=[[.485, .456, .406], [.5, .5, .5]], stds=[[.229, .224, .225], [.5, .5, .5]])     # of the two towers
LLAMA = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, rope_theta=1e4,
             rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2)          # what config.json leaves out; 1e-6, not 1e-5
BIN_EDGES = np.linspace(-1, 1, 256)
BIN_CENTRES = (BIN_EDGES[:-1] + BIN_EDGES[1:]) / 2       # 255: the two lowest ids share +0.996

class OpenVLA(Policy):
    """DINOv2 and SigLIP patches -> projector -> Llama, which writes 7 action tokens.
    Sequence  [BOS][T patches][PAD..][prompt text][lone space] -> a_0 .. a_6 </s>; positions skip the PADs
    Settings  unnorm_key: data set whose statistics un-normalise; temperature: of sampling and of log-probs;
              center_crop: for checkpoints tuned with image augmentation (lanczos resize, central 90 %)"""
    SETTINGS = dict(unnorm_key=None, temperature=1.0, center_crop=False)
    vision, vlm = ("vision_backbone.",), ("vision_backbone.", "projector.", "language_model.")
    image_ndims, home, towers = (4,), "openvla/openvla-7b", ("featurizer", "fused_featurizer")
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")                 # ids 0, 1, 2
    official_key = internal_key = staticmethod(str)      # our names are the official ones

    def __init__(self, config, **settings):
        super().__init__(config, settings)
        expect(list(config["timm_model_ids"]) == list(TIMM), "vision", config["timm_model_ids"], list(TIMM), self.home)
        text, tiny = {**LLAMA, **config["text_config"]}, config.get("tiny_timm_kwargs", {})
        shapes = [{**official, **tiny.get(name, {})} for official, name in zip(TIMM.values(), self.towers)]
        towers = [ViT(size, **shape) for size, shape in zip(config["image_sizes"], shapes)]
        width, heads, seen = text["hidden_size"], text["num_attention_heads"], sum(s["embed_dim"] for s in shapes)
        self.vision_backbone = nn.ModuleDict(dict(zip(self.towers, towers)))
        self.projector = linears(fc1=(seen, 4 * seen), fc2=(4 * seen, width), fc3=(width, width))
        self.language_model = linears(False, lm_head=(width, text["vocab_size"]))
        self.language_model["model"] = Decoder(
            width, text["num_hidden_layers"], text["vocab_size"], mlp_dim=text["intermediate_size"], num_heads=heads,
            num_kv_heads=text.get("num_key_value_heads", heads), head_dim=width // heads, offset=0, act=nn.SiLU(),
            eps=text["rms_norm_eps"], theta=text["rope_theta"])
        self.value_head = Head((width, 512, 128, 1), nn.GELU, last_bias=False)
        self.image_size, self.feature_shape = config["image_sizes"][0], (towers[0].pos_embed.shape[1], seen)
        self.vocab = text["vocab_size"] - config.get("pad_to_multiple_of", 64)   # without padding rows: 32000 of 32064
        self.bos, self.eos, self.pad = text["bos_token_id"], text["eos_token_id"], self.vocab

    def decode_tokens(self, ids):
        """Ids -> normalised values, float64 numpy. Ids outside the 256 saturate at +-0.996."""
        return BIN_CENTRES[np.clip(self.vocab - np.asarray(ids) - 1, 0, 254)]

    def encode_values(self, values):
        """Normalised values -> ids: id = vocab - d, d = digitize(clip(v, -1, 1), 256 edges) in 1..256."""
        return self.vocab - np.digitize(np.clip(values, -1, 1), BIN_EDGES)

    def scale(self):
        """q01, q99, mask (absent: everywhere), and (closed, open) of the gripper in the data set's own units:
        0 and 1 in official data, told by q01 >= 0, else -1 and 1; set_statistics says -1 and 1."""
        stats = self.stats["action"]
        low, high = np.array(stats["q01"]), np.array(stats["q99"])
        return low, high, stats.get("mask", True), stats.get("gripper_range", (0, 1) if low[6] >= 0 else (-1, 1))

    def unnormalize(self, values):
        """v -> 0.5 (v + 1) (q99 - q01) + q01 where mask, else v; in the data set's own units."""
        low, high, mask, _ = self.scale()
        return np.where(mask, 0.5 * (values + 1) * (high - low) + low, values)

    def to_actions(self, tokens):
        """(B, 7) ids -> (B, 1, 7) float32 physical actions, the gripper mapped onto -1 close .. +1 open."""
        actions, (closed, opened) = self.unnormalize(self.decode_tokens(tokens.cpu())), self.scale()[3]
        actions[:, 6] = 2 * (actions[:, 6] - closed) / (opened - closed) - 1
        return torch.tensor(actions, dtype=torch.float32, device=self.device)[:, None]

    def to_tokens(self, actions):
        """(B, 7) physical actions -> (B, 7) ids; a dimension that never moved is written as 0."""
        actions, (low, high, mask, (closed, opened)) = actions.cpu().double().numpy().copy(), self.scale()
        actions[:, 6] = (actions[:, 6] + 1) / 2 * (opened - closed) + closed
        values = np.where(high == low, 0.0, 2 * (actions - low) / (high - low + 1e-8) - 1)
        return torch.from_numpy(self.encode_values(np.where(mask, values, actions))).to(self.device)

    def pixels(self, images):
        """(B, H, W, 3) uint8 -> (B, 6, S, S) float32: resized, aspect not kept; normalised for each tower."""
        images, size, crop = images.cpu().numpy(), self.image_size, self.settings["center_crop"]
        if images.shape[1:3] != (size, size):
            bicubic = lambda image: Image.fromarray(image).resize((size, size), Image.BICUBIC)
            images = resize_lanczos3(images, size) if crop else np.stack([bicubic(image) for image in images])
        images = torch.from_numpy(center_crop_90(images, size) if crop else images).to(self.device)
        x = images.permute(0, 3, 1, 2).contiguous().float() / 255      # else every later copy is a strided one
        means, stds = (x.new_tensor(PIXELS[key])[:, :, None, None] for key in ("means", "stds"))
        return torch.cat([(x - mean) / std for mean, std in zip(means, stds)], 1)

    def encode_images(self, images):
        """(B, H, W, 3) uint8 -> vision features (B, T, D1 + D2) float32, DINOv2 and SigLIP side by side."""
        pixels = self.pixels(self.check(images)).split(3, 1)
        with self.autocast():
            return torch.cat([self.vision_backbone[name](x) for name, x in zip(self.towers, pixels)], -1).float()

    def project(self, x):
        fc1, fc2, fc3 = self.projector.values()
        return fc3(F.gelu(fc2(F.gelu(fc1(x)))))

    def prompt(self, instructions):
        """-> ids, mask (B, L): BOS, then PADs, then the text: every prompt ends in the last column."""
        space = self.tokenizer and self.tokenizer.token_to_id("▁")       # 29871 in Llama's vocabulary
        rows = [self.encode(f"In: What action should the robot take to {text.lower()}?\nOut:") for text in instructions]
        # Training text had a space before the action tokens, which is tokenised on its own: it must be there.
        rows = [row if row[-1] == space else row + [space] for row in rows]
        gaps = [max(map(len, rows)) - len(row) for row in rows]
        ids = torch.tensor([[self.bos] + [self.pad] * gap + row for gap, row in zip(gaps, rows)])
        mask = torch.tensor([[True] + [False] * gap + [True] * len(row) for gap, row in zip(gaps, rows)])
        return ids.to(self.device), mask.to(self.device)

    def hidden(self, images, ids, mask, tokens=None):
        """Final-norm hidden states (B, T + L + n, D) of prompt and `tokens` (B, n); valid; keys, values."""
        features = images if images.is_floating_point() else self.encode_images(images)
        model = self.language_model["model"]
        if tokens is not None:
            ids, mask = torch.cat([ids, tokens], 1), F.pad(mask, (0, tokens.shape[1]), value=True)
        with self.autocast():
            text = model.embed_tokens(ids)
            x = torch.cat([text[:, :1], self.project(features), text[:, 1:]], 1)         # patches follow BOS
            valid = F.pad(mask, (features.shape[1], 0), value=True)                      # and are all valid
            causal = valid.new_ones(x.shape[1], x.shape[1]).tril() & valid[:, None, None]            # (B, 1, T, T)
            hidden, kv = model(x, valid.cumsum(1) - 1, causal)
        return hidden, valid, kv

    def logits(self, hidden):
        with exact(hidden):
            return self.language_model["lm_head"](hidden.float())                        # (..., V)

    def action_log_probs(self, hidden):
        """log softmax over the 256 action ids alone, at the sampling temperature: (..., 256) float32."""
        return (self.logits(hidden)[..., self.vocab - 256:self.vocab] / self.settings["temperature"]).log_softmax(-1)

    def prompt_hidden(self, images, instructions):
        """Hidden state of the last prompt token, (B, D): what the value head reads; for auxiliary losses."""
        return self.hidden(self.check(images, instructions), *self.prompt(instructions))[0][:, -1].float()

    @torch.no_grad()
    def act(self, images, instructions, deterministic=False, generator=None):
        """Sample 7 tokens (or take the likeliest) with a key/value cache -> Decision, K = 1."""
        hidden, valid, kv = self.hidden(self.check(images, instructions), *self.prompt(instructions))
        model, value, tokens, logp = self.language_model["model"], self.value_head(hidden[:, -1])[:, 0], [], 0.0
        for i in range(ACTION_DIM):
            if i:                                        # feed the last token back as one more column
                valid = F.pad(valid, (0, 1), value=True)
                position = valid.sum(1, keepdim=True) - 1
                with self.autocast():
                    hidden, kv = model(model.embed_tokens(tokens[-1]), position, valid[:, None, None], past=kv)
            log_probs = self.action_log_probs(hidden[:, -1])                             # (B, 256)
            choice = (log_probs.argmax(-1, keepdim=True) if deterministic else
                      torch.multinomial(log_probs.exp(), 1, generator=generator))        # (B, 1)
            logp = logp + log_probs.gather(1, choice)[:, 0]
            tokens.append(choice + self.vocab - 256)
        tokens = torch.cat(tokens, 1)                                                    # (B, 7)
        return Decision(self.to_actions(tokens), logp, value, {"tokens": tokens})

    def evaluate(self, images, instructions, trace):
        """One teacher-forced pass over the sampled tokens. logp: their sum; entropy: their mean, in nats."""
        tokens, images = trace["tokens"], self.check(images, instructions)
        states = self.hidden(images, *self.prompt(instructions), tokens[:, :-1])[0][:, -ACTION_DIM:]         # (B, 7, D)
        log_probs = self.action_log_probs(states)                                        # (B, 7, 256)
        logp = log_probs.gather(2, (tokens - self.vocab + 256)[..., None]).sum((1, 2))
        return logp, -(log_probs.exp() * log_probs).sum(2).mean(1), self.value_head(states[:, 0])[:, 0]

    def bc_loss(self, images, instructions, actions, pad=None, reduction="mean"):
        """-mean log p of the 7 action tokens and </s>, over the whole vocabulary; step 0 of chunks. `none`: (B, 1)."""
        images = self.check(images, instructions, actions, pad)
        tokens = self.to_tokens(torch.as_tensor(actions)[:, 0])                          # (B, 7)
        logits = self.logits(self.hidden(images, *self.prompt(instructions), tokens)[0][:, -ACTION_DIM - 1:])
        targets = F.pad(tokens, (0, 1), value=self.eos)                                  # (B, 8)
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1, keepdim=True)
        return self.reduce(loss, pad, reduction)

    def json_files(self):
        """What the official folder holds beside weights and tokenizer."""
        processor = dict(image_processor_type="PrismaticImageProcessor", image_resize_strategy="resize-naive", **PIXELS,
                         use_fused_vision_backbone=True, interpolations=["bicubic"] * 2,
                         input_sizes=[[3, size, size] for size in self.config["image_sizes"]])
        generation = dict(bos_token_id=self.bos, eos_token_id=self.eos, pad_token_id=self.pad)
        return {"config.json": {**self.config, "norm_stats": self.statistics}, "generation_config.json": generation,
                "dataset_statistics.json": self.statistics, "preprocessor_config.json": processor}

    def read_statistics(self, folder):
        """dataset_statistics.json replaces the config's norm_stats, officially; but not for keys it lacks."""
        table, file = self.config.get("norm_stats") or {}, read_json(folder / "dataset_statistics.json", {})
        key = self.settings["unnorm_key"]
        self.statistics = file if file and (key in file or key not in table) else table

# ---- pi0.5: flow matching --------------------------------------------------------------------------------------------
GEMMA = {"gemma_2b": dict(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256),
         "gemma_300m": dict(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)}
SIGLIP = dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, image_size=224,
              patch_size=14, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
SIZES = (("action_dim", "max_action_dim", 32), ("action_horizon", "chunk_size", 8),      # openpi's name, LeRobot's,
         ("max_token_len", "tokenizer_max_length", 200), ("vocab_size", "vocab_size", 257152))       # default
STEM = "paligemma_with_expert."

class Pi05(Policy):
    """SigLIP and Gemma read images and prompt once; the action expert turns noise into a chunk of H actions.
    Time      t = 1 is noise, t = 0 the action chunk; v = noise - action, so that a step is x <- x - v / steps
    Settings  sampler "flow_noise" (learned noise at every step) or "flow_sde" (given noise at a random one); steps;
              chunk K, executed; horizon H (None: the checkpoint's); noise_level a of flow_sde; noise_std, range of
              flow_noise; discrete_state: the state as text in the prompt; delta_mask: dims relative to the state;
              style "openpi" or "lerobot" (resizing, epsilons); norm "quantile" or "mean_std"
    Extras    state (B, n), for the two settings that need it; camera_mask (B, N) bool, False: camera missing"""
    SETTINGS = dict(unnorm_key=None, sampler="flow_noise", steps=4, chunk=4, horizon=None, noise_level=0.5,
                    noise_std=(0.08, 0.16), discrete_state=False, delta_mask=None, style=None, norm=None)
    vision, vlm = ("vision_tower.",), ("vision_tower.", "multi_modal_projector.", "language_model.")
    image_ndims, home = (4, 5), "google/paligemma-3b-pt-224"
    special = dict(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")       # ids 0 .. 3

    def __init__(self, config, **settings):
        from transformers import SiglipVisionConfig, SiglipVisionModel
        config = dict(config, type="pi05")
        config.update({ours: config.get(ours, config.get(lerobots, default)) for ours, lerobots, default in SIZES})
        vision = {key: config.get("vision", {}).get(key, value) for key, value in SIGLIP.items()}
        vlm = config.get("vlm") or GEMMA[config.get("paligemma_variant", "gemma_2b").removesuffix("_lora")]
        expert = config.get("expert") or GEMMA[config.get("action_expert_variant", "gemma_300m").removesuffix("_lora")]
        super().__init__(dict(config, vision=vision, vlm=vlm, expert=expert), settings)
        s, width, dim = self.settings, expert["width"], config["action_dim"]
        self.horizon = s["horizon"] = s["horizon"] or config["action_horizon"]
        expect(s["sampler"] in ("flow_noise", "flow_sde") and 0 < s["chunk"] <= self.horizon and s["steps"] > 0,
               "settings", s, "sampler flow_noise or flow_sde, 0 < chunk <= horizon, steps > 0", "the defaults")
        eps, theta = config.get("rms_norm_eps", 1e-6), config.get("rope_theta", 1e4)
        stack = dict(act=nn.GELU("tanh"), offset=1, eps=eps, theta=theta)
        self.vision_tower = SiglipVisionModel(SiglipVisionConfig(**vision, vision_use_head=False))
        self.multi_modal_projector = linears(linear=(vision["hidden_size"], vlm["width"]))
        self.language_model = Decoder(**vlm, vocab=config["vocab_size"], **stack)
        self.gemma_expert = Decoder(**expert, cond_dim=width, **stack)
        self.action_in_proj, self.action_out_proj = nn.Linear(dim, width), nn.Linear(width, dim)
        self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        self.value_head = Head((vlm["width"], 512, 256, 128, 1), nn.ReLU, last_bias=True)
        self.noise_head = Head((width, 128, 64, dim), nn.Tanh, last_bias=True)
        self.image_size, self.action_dim = vision["image_size"], dim
        self.feature_shape = ((vision["image_size"] // vision["patch_size"]) ** 2, vision["hidden_size"])

    def official_key(self, name):
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if name.startswith(self.vlm):
            return STEM + "paligemma.model." + name
        return name.replace("gemma_expert.", STEM + "gemma_expert.model.")

    def internal_key(self, name):
        name = re.sub(r"_fsdp_wrapped_module\.|_orig_mod\.|vision_model\.", "", name)   # FSDP, compile, transformers 4
        name = re.sub(r"^(module\.|model\.|paligemma_with_expert\.|paligemma\.)*", "", name)
        return name.replace("gemma_expert.model.", "gemma_expert.")

    def official_tensors(self):
        """openpi's files hold the tied embedding as lm_head, and a second lm_head that nothing reads."""
        tensors = super().official_tensors()
        embedding = tensors.pop(STEM + "paligemma.model.language_model.embed_tokens.weight")
        unused = embedding.new_zeros(len(embedding), self.action_in_proj.out_features, dtype=torch.bfloat16)
        return {**tensors, STEM + "paligemma.lm_head.weight": embedding, STEM + "gemma_expert.lm_head.weight": unused}

    def affine(self, part):
        """offset, scale, base: normalised = (x - offset) / scale + base; quantiles to [-1, 1], or z-score."""
        lerobot, quantile = self.settings["style"] == "lerobot", self.settings["norm"] == "quantile"
        expect(part in self.stats, "statistics", list(self.stats), f"those of the {part}", "--statistics data")
        low, high = (torch.tensor(self.stats[part][key], dtype=torch.float64, device=self.device)
                     for key in (("q01", "q99") if quantile else ("mean", "std")))
        if not quantile:
            return low, high + (1e-8 if lerobot else 1e-6), 0
        return low, (torch.where(high == low, 1e-8, high - low) if lerobot else high - low + 1e-6) / 2, -1

    def reference(self, state):
        """What stored actions are relative to, (B, 1, 7) or 0: one state for all steps of the chunk."""
        if self.settings["delta_mask"] is None:
            return 0
        mask = torch.as_tensor(self.settings["delta_mask"], device=self.device)
        return torch.as_tensor(state, device=self.device)[:, None, :len(mask)].double() * mask

    def unnormalize(self, x, state=None):
        """(B, H, A) model units -> (B, H, 7) float32 physical actions; padding dimensions are dropped."""
        offset, scale, base = self.affine("action")
        return ((x[..., :len(scale)].double() - base) * scale + offset + self.reference(state)).float()

    def normalize(self, actions, state=None):
        """(B, H, 7) physical actions -> (B, H, A) model units; zero-padded, and nothing is clipped."""
        offset, scale, base = self.affine("action")
        actions = torch.as_tensor(actions, device=self.device).double() - self.reference(state)
        return F.pad((actions - offset) / scale + base, (0, self.action_dim - actions.shape[-1])).float()

    def state_bins(self, state):
        """(B, n) physical state -> 256 bins of [-1, 1]; above: 255, below: -1, as officially printed."""
        offset, scale, base = self.affine("state")
        x = (torch.as_tensor(state, device=self.device).double()[:, :len(scale)] - offset) / scale + base
        return np.digitize(x.cpu().numpy(), np.linspace(-1, 1, 257)[:-1]) - 1

    def encode_images(self, images, camera_mask=None):
        """(B, [N,] H, W, 3) uint8 -> features (B, N, T, D) float32. Cameras that nobody has cost nothing."""
        images, size = self.check(images), self.image_size
        images = images if images.ndim == 5 else images[:, None]                         # (B, N, H, W, 3)
        present = slice(None) if camera_mask is None else camera_mask.any(0)
        x = images[:, present].flatten(0, 1)                                             # (B N', H, W, 3)
        x = x.float() / 255 * 2 - 1 if x.shape[1:3] == (size, size) else torch.from_numpy(
            resize_with_pad(x.cpu().numpy(), size, self.settings["style"])).to(self.device)
        with self.autocast():
            x = recompute(self.vision_tower, x.permute(0, 3, 1, 2)).last_hidden_state
        features = x.new_zeros(*images.shape[:2], *x.shape[1:], dtype=torch.float32)
        features[:, present] = x.float().unflatten(0, (len(images), -1))
        return features

    def prompt(self, instructions, state=None):
        """-> ids, mask (B, L), right-padded to the longest prompt of the batch. BOS (2) first, no EOS."""
        texts = [text.strip().replace("_", " ").replace("\n", " ") for text in instructions]
        if self.settings["discrete_state"]:
            rows = [self.encode(f"Task: {text}, State: {' '.join(map(str, bins))};\nAction: ")
                    for text, bins in zip(texts, self.state_bins(state))]
        else:                                            # two calls, so that the newline never merges
            rows = [self.encode(text) + self.encode("\n") for text in texts]
        rows = [torch.tensor([2, *row][:self.config["max_token_len"]], device=self.device) for row in rows]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return ids.clamp(min=0), ids >= 0

    def prefix(self, features, camera_mask, ids, mask):
        """VLM pass -> hidden (B, P, D), keys/values of each layer, valid (B, P); P = present cameras x T + L. Tokens
        see all valid ones, no actions: one pass serves all steps. Padding and missing cameras take no position."""
        camera_mask = mask.new_ones(features.shape[:2]) if camera_mask is None else camera_mask
        present = camera_mask.any(0)
        with self.autocast():
            image = self.multi_modal_projector["linear"](features[:, present])           # (B, N', T, D)
            text = self.language_model.embed_tokens(ids) * image.shape[-1] ** 0.5        # only text is scaled
            x = torch.cat([image.flatten(1, 2).to(text.dtype), text], 1)                 # (B, P, D)
            valid = torch.cat([camera_mask[:, present].repeat_interleave(image.shape[2], 1), mask], 1)
            hidden, kv = self.language_model(x, valid.cumsum(1) - 1, valid[:, None, None])
        return hidden, kv, valid

    def observe(self, images, instructions, state, camera_mask, actions=None, pad=None):
        """Checks its arguments and runs the prefix pass."""
        images = self.check(images, instructions, actions, pad)
        if reads_state(self.settings):
            fine = state is not None and len(state) == len(images) and torch.as_tensor(state).isfinite().all()
            expect(fine, "state", state, f"({len(images)}, n), finite", "state=obs['state']")
        camera_mask = None if camera_mask is None else torch.as_tensor(camera_mask, device=self.device).bool()
        features = images if images.is_floating_point() else self.encode_images(images, camera_mask)
        return self.prefix(features, camera_mask, *self.prompt(instructions, state))

    def pooled(self, hidden, valid):
        """Mean of the valid prefix tokens, (B, D) float32."""
        return (hidden.float() * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)

    def prompt_hidden(self, images, instructions, state=None, camera_mask=None):
        """What the value head reads, (B, D); for auxiliary losses."""
        hidden, _, valid = self.observe(images, instructions, state, camera_mask)
        return self.pooled(hidden, valid)

    def time_embedding(self, t):
        """t (B, S) -> (B, S, W): sines, then cosines, of 2 pi t / p, p from 4e-3 to 4; angles in float64."""
        half = self.time_mlp_in.in_features // 2
        period = 4e-3 * 1000 ** (torch.arange(half, dtype=torch.float64, device=self.device) / (half - 1))
        angle = 2 * math.pi * t[..., None].double() / period
        e = torch.cat([angle.sin(), angle.cos()], -1).float()
        with exact(e):
            return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(e))))

    def velocity(self, x, t, kv, valid):
        """v(x_t, t) of S chunks per observation: x (B, S, H, A), t (B, S) -> v (B, S, H, A), h (B, S, H, W).
        A chunk sees the valid prefix and itself. Sampling: S = 1; log-prob: all noisy steps of a chain in one pass."""
        batch, chunks, horizon = x.shape[:3]
        block = torch.arange(chunks, device=x.device).repeat_interleave(horizon)
        own = (block[:, None] == block).expand(batch, -1, -1)                            # (B, S H, S H)
        mask = torch.cat([valid[:, None].expand(-1, len(block), -1), own], -1)[:, None]  # (B, 1, S H, P + S H)
        positions = valid.sum(1, keepdim=True) + torch.arange(horizon, device=x.device).repeat(chunks)
        cond = self.time_embedding(t)[:, :, None]                                        # (B, S, 1, W)
        with exact(x):
            x = self.action_in_proj(x)                                                   # (B, S, H, W)
        with self.autocast():
            hidden = self.gemma_expert(x, positions, mask, past=kv, cond=cond)[0].float()
        with exact(x):
            return self.action_out_proj(hidden), hidden

    def transition(self, x, v, h, step):
        """Next state at noisy steps (B, S): x' ~ N(mean, std), with d = 1/steps and t = 1 - step d.
        mean = (1 - (t-d)) x_data + w x_noise,   x_data = x - t v,  x_noise = x + (1-t) v     (ODE: w = t-d)
        flow_noise  w = t - d                    std = s(h), log-variance squashed into noise_std
        flow_sde    w = t - d - sigma^2 d/(2t)   std = sigma sqrt(d), sigma = a sqrt(t/(1-t)), 1-t >= d"""
        d = 1 / self.settings["steps"]
        t, step = (1 - step * d)[..., None, None].float(), step[..., None, None]         # (B, S, 1, 1)
        if self.settings["sampler"] == "flow_noise":
            low, high = (2 * math.log(s) for s in self.settings["noise_std"])
            weight, std = t - d, ((low + (high - low) * (self.noise_head(h).tanh() + 1) / 2) / 2).exp()
        else:
            sigma = self.settings["noise_level"] * (t / torch.where(step == 0, d, 1 - t)).sqrt()
            weight, std = t - d - sigma ** 2 * d / (2 * t), (sigma * d ** 0.5).expand_as(x)
        return (1 - (t - d)) * (x - t * v) + weight * (x + (1 - t) * v), std

    def chain_logp(self, x, x_next, mean, std):
        """-> logp (B,), summed over executed steps and 7 dims, and entropy (B,), their mean; in nats. flow_noise: mean
        of the steps + 1 factors N(x^0; 0, 1), N(x^{i+1}; mean_i, std_i); flow_sde: the one noisy step, entropy 0."""
        executed = (..., slice(self.settings["chunk"]), slice(ACTION_DIM))
        steps = (-0.5 * ((x_next - mean) / std) ** 2 - std.log() - 0.5 * LN2PI)[executed].sum((1, 2, 3))
        if self.settings["sampler"] == "flow_sde":
            return steps, torch.zeros_like(steps)
        entropy = 0.5 * (LN2PI + 1) + std[executed].log().mean((2, 3)).sum(1) / (x.shape[1] + 1)
        return ((-0.5 * x[:, 0] ** 2 - 0.5 * LN2PI)[executed].sum((1, 2)) + steps) / (x.shape[1] + 1), entropy

    @torch.no_grad()
    def act(self, images, instructions, deterministic=False, generator=None, state=None, camera_mask=None):
        """Denoise a chunk; deterministic: the plain ODE, still from random noise. Executes K of H steps."""
        hidden, kv, valid = self.observe(images, instructions, state, camera_mask)
        total, shape = self.settings["steps"], (len(valid), 1, self.horizon, self.action_dim)
        draw = lambda: torch.randn(shape, generator=generator, device=self.device)
        noisy, x, chain = set(range(total)), draw(), []
        if self.settings["sampler"] == "flow_sde":       # one random step, the same for the whole batch
            noisy = {torch.randint(total, (), generator=generator, device=self.device).item()}
        for i in range(total):
            step = torch.full((len(valid), 1), i, device=self.device)
            v, h = self.velocity(x, 1 - step / total, kv, valid)
            x_next = x - v / total
            if i in noisy and not deterministic:
                mean, std = self.transition(x, v, h, step)
                x_next = mean + std * draw()
                chain.append((x, x_next, step, mean, std))
            x = x_next
        parts = [torch.cat(part, 1) for part in zip(*chain)] or [x[:, :0], x[:, :0], step[:, :0]]    # (B, S, ..) each
        logp = self.chain_logp(*parts[:2], *parts[3:])[0] if chain else x.new_zeros(len(x))
        actions, value = self.unnormalize(x[:, 0], state), self.value_head(self.pooled(hidden, valid))[:, 0]
        return Decision(actions[:, :self.settings["chunk"]], logp, value, dict(zip(("x", "x_next", "step"), parts)))

    def evaluate(self, images, instructions, trace, state=None, camera_mask=None):
        """Log-prob and entropy of the stored chain under the current weights; of an ODE chunk: both 0."""
        hidden, kv, valid = self.observe(images, instructions, state, camera_mask)
        value = self.value_head(self.pooled(hidden, valid))[:, 0]
        x, step = trace["x"], trace["step"]                                              # (B, S, H, A), (B, S)
        if not x.shape[1]:
            return torch.zeros_like(value), torch.zeros_like(value), value
        v, h = self.velocity(x, 1 - step / self.settings["steps"], kv, valid)
        return *self.chain_logp(x, trace["x_next"], *self.transition(x, v, h, step)), value

    def flow_loss(self, kv, valid, actions, noise, t):
        """(v(x_t, t) - u)^2 per element (B, H, A), x_t = t noise + (1-t) actions, u = noise - actions."""
        x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
        return (self.velocity(x_t[:, None], t[:, None], kv, valid)[0][:, 0] - (noise - actions)) ** 2

    def bc_loss(self, images, instructions, actions, pad=None, reduction="mean", generator=None, state=None,
                camera_mask=None):
        """Flow matching, t ~ 0.001 + 0.999 Beta(1.5, 1): mean over the 7 dims of unpadded steps. `none`: (B, H)."""
        _, kv, valid = self.observe(images, instructions, state, camera_mask, actions, pad)
        actions = self.normalize(actions, state)[:, :self.horizon]                       # (B, H, A)
        noise = torch.randn(actions.shape, generator=generator, device=self.device)
        t = 0.001 + 0.999 * torch.rand(len(actions), generator=generator, device=self.device) ** (1 / 1.5)
        return self.reduce(self.flow_loss(kv, valid, actions, noise, t)[..., :ACTION_DIM].mean(-1), pad, reduction)

    def json_files(self):
        """openpi's folder: config.json, and assets/<data set>/norm_stats.json with the actions as "actions"."""
        official = lambda parts: {part.replace("action", "actions"): block for part, block in parts.items()}
        return {"config.json": self.config, **{f"assets/{name}/norm_stats.json": {"norm_stats": official(parts)}
                                               for name, parts in self.statistics.items()}}

    def read_statistics(self, folder):
        """openpi, RLinf: <any folder>/norm_stats.json. LeRobot: <feature>.<statistic> beside its processors."""
        for file in sorted(folder.glob("policy_p*normalizer_processor.safetensors")):
            for key, value in read_safetensors(file).items():
                part, _, statistic = key.removeprefix("observation.").rpartition(".")
                if part in ("action", "state"):
                    self.statistics.setdefault("lerobot", {}).setdefault(part, {})[statistic] = value.tolist()
        for file in sorted(folder.rglob("norm_stats.json")):
            name = str(file.parent.relative_to(folder)).removeprefix("assets/")
            self.statistics[name] = {part.replace("actions", "action"): block
                                     for part, block in read_json(file)["norm_stats"].items()}
        mode, modes = self.config.get("normalization_mapping", {}).get("ACTION", "QUANTILES"), ("QUANTILES", "MEAN_STD")
        expect(mode in modes, "normalization_mapping", mode, f"one of {modes}", "another checkpoint")
        self.settings["norm"] = self.settings["norm"] or ("quantile" if mode == "QUANTILES" else "mean_std")
        self.settings["style"] = self.settings["style"] or ("lerobot" if "chunk_size" in self.config else "openpi")

# ---- checkpoints -----------------------------------------------------------------------------------------------------
def read_json(path, default=None):
    return default if default is not None and not path.exists() else json.loads(path.read_text())

def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))

def read_safetensors(path):
    try:
        return load_file(path)
    except Exception as error:           # SafetensorError, OSError: its words say what is wrong
        expect(False, path, error, "a complete safetensors file", "downloading it again")

def read_tensors(folder):
    """All tensors of a folder: shards of an index, else all weight files, else RLinf's full_weights.pt."""
    indices, others = folder.glob("*.safetensors.index.json"), ("policy_", "heads", "adapter")
    shards = {folder / shard for index in indices for shard in read_json(index)["weight_map"].values()}
    shards = shards or {f for f in folder.glob("*.safetensors") if not f.name.startswith(others)}
    dumps = [f for f in folder.rglob("full_weights.pt") if f.parent.name == "model_state_dict"]
    expect(shards or dumps, folder, [f.name for f in folder.iterdir()], "*.safetensors", "the complete download")
    if not shards:
        return torch.load(dumps[0], map_location="cpu", weights_only=True)
    return {key: tensor for shard in sorted(shards) for key, tensor in read_safetensors(shard).items()}

def load_tensors(policy, tensors, folder):
    """Strict, after mapping names: one error lists all missing, unexpected and misshapen tensors."""
    tensors = {policy.internal_key(key): value for key, value in tensors.items()}
    if isinstance(policy, Pi05):         # if both are there, embed_tokens is live and lm_head a decoy
        tensors.setdefault("language_model.embed_tokens.weight", tensors.pop("lm_head.weight", torch.empty(0)))
    extra = (*HEADS, "proprio_projector.", "action_head.", "gemma_expert.lm_head.")      # RL fine-tunes have them
    tensors = {key: value for key, value in tensors.items() if not key.startswith(extra)}
    own = {key: value for key, value in policy.state_dict().items() if not key.startswith(HEADS)}
    bad = [f"missing {key}" for key in own if key not in tensors]
    bad += [f"unexpected {key}" for key in tensors if key not in own]
    bad += [f"misshapen {key}: {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}" for key in own
            if key in tensors and tensors[key].shape != own[key].shape]
    expect(not bad, f"weights of {folder}", "\n  ".join([f"{len(bad)} problems", *bad]) + "\n",
           "the tensors that config.json describes", "the config.json they were saved with")
    policy.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=False, assign=True)

@torch.no_grad()
def init_weights(policy, seed, only=""):
    """Real tensors for meta ones whose name starts with `only`: N(0, 1/fan_in) matrices, zero biases, unit norms;
    adaRMS zero (the expert starts as identity); outputs N(0, 0.02): losses start where theory says; heads Kaiming."""
    generator, gemma = torch.Generator().manual_seed(seed), isinstance(policy, Pi05)
    last = [f"{head}{len(getattr(policy, head[:-1])) - 1}.weight" for head in HEADS[:1 + gemma]]
    small = (*last, "lm_head.weight", "action_out_proj.weight", "_token", "latent")
    # Beside patch embeddings of about 1: seen from the first step. Gemma multiplies its words by the root of the width.
    place = ("pos_embed", "position_embedding.weight") + ("embed_tokens.weight",) * (not gemma)
    for key, shape in [(key, p.shape) for key, p in policy.named_parameters() if key.startswith(only)]:
        p, (module, name) = nn.Parameter(torch.zeros(shape)), key.rpartition(".")[::2]
        if len(shape) > 1 and ".dense." not in key:
            fan = shape[0] / 2 if key.startswith(HEADS) else shape[1:].numel()
            std = .02 if key.endswith(small) else 1. if key.endswith(place) else fan ** -0.5
            nn.init.normal_(p, std=std, generator=generator)
        elif name != "bias" and ".dense." not in key:    # norms and LayerScale; Gemma stores w - 1
            p.fill_(0.0 if gemma and key.startswith("language_model") else 1.0)
        setattr(policy.get_submodule(module), name, p)
    if gemma:                            # transformers keeps SigLIP's position ids outside the state dict
        policy.vision_tower.embeddings.position_ids = torch.arange(policy.feature_shape[0])[None]

def find_folder(name):
    """Bundled name, folder or hub id -> folder."""
    folder, what = BUNDLED.get(name, Path(name)), f"policy {name!r}"
    if folder.is_dir():
        return folder
    known = f"one of {list(BUNDLED)}, a folder, or a hub id like openvla/openvla-7b"
    expect(name not in BUNDLED, what, f"no {folder}", known, f"make_tiny({name!r}).save({str(folder)!r}), and train it")
    expect(re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)), what, "nothing of that name", known, "the spelling")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.h5", "*.msgpack"]))
    except Exception as error:           # no repository, network or permission: the hub's words say which
        expect(False, what, f"no such folder, and from the hub: {error}", known, "a local copy")

def find_base(name):
    """Like find_folder, but of a folder that holds adapters alone: (folder of its base model, that folder)."""
    folder = find_folder(name)
    if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
        return folder, None
    base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    return find_folder(folder / base if (folder / base).is_dir() else base), folder

def kind_of(config):
    """Name of the policy that a config.json describes, or None."""
    return config.get("model_type") or config.get("type") or ("pi05" if "action_horizon" in config else None)

def build(config, **settings):
    """A policy on the meta device: shapes only."""
    name = kind_of(config)
    expect(name in BUNDLED, "config.json", f"model_type or type {name}", "openvla or pi05", "another folder")
    with torch.device("meta"):
        return (OpenVLA if name == "openvla" else Pi05)(config, **settings)

def check_device(device, dtype):
    device = torch.device(device)
    expect(device.type != "cuda" or torch.cuda.is_available(), "device", device, "a visible GPU", "'cpu'")
    bf16 = device.type == "cpu" or device.type == "cuda" and torch.cuda.is_bf16_supported()
    fine = dtype == "float32" or dtype == "bfloat16" and bf16
    expect(fine, "dtype", f"{dtype} on {device}", "float32, or bfloat16 where the device has it", "'float32'")
    return device

def load_policy(name, device="cpu", dtype="float32", *, adapter=None, merge=False, lora_rank=0, lora_alpha=None,
                lora_targets=LORA_TARGETS, freeze="none", gradient_checkpointing=False, tokenizer=None, seed=0,
                **settings):
    """A policy from a bundled name, a folder or a hub id. Raises ValueError: what, got, need, try.
    dtype      "float32", or "bfloat16": autocast over float32 weights
    adapter    PEFT folder to put on top (a `name` that is one itself brings its base model along); kept apart and
               trainable with the base frozen, or folded into the weights with merge=True
    lora_rank  > 0: fresh adapters (add_lora with lora_alpha, lora_targets), unless it comes with some, which then go on
               training; the base is frozen
    freeze     "none" | "vision" (features may then be cached) | "vlm" (only expert and heads of pi0.5 train)
    tokenizer  path of a tokenizer.json, for checkpoints that come without one
    settings   see OpenVLA and Pi05; the values saved with the policy are the defaults"""
    device, (folder, own) = check_device(device, dtype), find_base(name)
    adapter = adapter or own
    expect((folder / "config.json").exists(), folder, "no config.json in it", "a config.json", "its own folder")
    saved, tokenizer = read_json(folder / "policy.json", {}), Path(tokenizer or folder / "tokenizer.json")
    policy = build(read_json(folder / "config.json"), **{**saved.get("settings", {}), **settings})
    load_tensors(policy, read_tensors(folder), folder)
    init_weights(policy, seed, only=HEADS)
    if saved:
        policy.load_state_dict(read_safetensors(folder / "heads.safetensors"), strict=False)
    policy.read_statistics(folder)
    policy.source, policy.bf16 = folder, dtype == "bfloat16"
    policy.tokenizer = Tokenizer.from_file(str(tokenizer)) if tokenizer.exists() else None
    if adapter or saved.get("lora"):
        load_lora(policy, find_folder(adapter) if adapter else folder / "lora")
    if merge:
        merge_lora(policy)
    ranks = sorted({len(layer.lora_A.weight) for layer in lora_modules(policy).values()})
    expect(not (ranks and lora_rank) or ranks == [lora_rank], "lora_rank", lora_rank, f"{ranks}, that of the adapters "
           f"in {folder}", "it, merge=True, or 0")
    if lora_rank and not ranks:
        add_lora(policy, lora_rank, lora_alpha, lora_targets, seed)
    set_trainable(policy, freeze)
    for module in policy.modules():
        module.checkpointing = gradient_checkpointing
    return policy.to(device).eval()      # there is no dropout anywhere; eval() says so

def set_trainable(policy, freeze):
    """Adapters, if any, else everything; minus what `freeze` names; the heads always."""
    frozen, adapted = {"none": (), "vision": policy.vision, "vlm": policy.vlm}.get(freeze), bool(lora_modules(policy))
    expect(frozen is not None, "freeze", repr(freeze), "none, vision or vlm", "freeze='vision'")
    for key, p in policy.named_parameters():
        p.requires_grad_(key.startswith(HEADS) or (".lora_" in key or not adapted) and not key.startswith(frozen))

# ---- tiny policies ---------------------------------------------------------------------------------------------------
WORDS = """pick up the object on table and place it into white tray put plate bowl push cube to open close drawer red
green blue yellow orange purple pink brown black gray a of in from left right top bottom middle block can banana carrot
bottle cup box ball spoon mug sponge apple lemon pepper bread toy goal target move forward away front one thing dish
drop round slide pull shut out it must be handle
grey white belongs robot shove""".split()
TINY = dict(
    openvla=dict(
        model_type="openvla", architectures=["OpenVLAForActionPrediction"], n_action_bins=256, image_sizes=[64, 64],
        image_resize_strategy="resize-naive", arch_specifier="no-align+fused-gelu-mlp", pad_to_multiple_of=64,
        vision_backbone_id="dinosiglip-vit-so-224px", llm_backbone_id="llama2-7b-pure", use_fused_vision_backbone=True,
        timm_model_ids=list(TIMM), timm_override_act_layers=[None, None],
        tiny_timm_kwargs=dict(featurizer=dict(embed_dim=32, depth=2, num_heads=1, patch_size=16, reg_tokens=1),
                              fused_featurizer=dict(embed_dim=128, depth=3, num_heads=4, patch_size=16)),
        text_config=dict(model_type="llama", hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4)),
    pi05=dict(
        type="pi05", action_dim=8, action_horizon=8, max_token_len=200,
        vision=dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, image_size=64,
                    patch_size=16),
        vlm=dict(width=128, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32),
        expert=dict(width=96, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32)))

def tiny_tokenizer(name):
    """The official structure, small: special pieces first, "▁" for a space, the fixed part of a prompt as one piece,
    common words, single characters for all others; OpenVLA's last 256 pieces are the actions."""
    llama, special = name == "openvla", list((OpenVLA if name == "openvla" else Pi05).special.values())
    pieces = ["▁", "▁In:▁What▁action▁should▁the▁robot▁take▁to", "?\nOut:", "\n", "Task:▁", ",▁State:▁",
              ";\nAction:▁", *("▁" + word for word in WORDS), *WORDS, *(chr(i) for i in range(33, 127))]
    pieces = special + list(dict.fromkeys(pieces)) + [chr(0xE000 + i) for i in range(256)] * llama
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], special.index("<unk>"), False))
    front = [normalizers.Prepend("▁")] * llama           # Llama starts with a space, Gemma does not
    tokenizer.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
    return tokenizer

def make_tiny(name, seed=0, **settings):
    """A small policy with random weights and placeholder statistics, of the same classes as the real ones."""
    expect(name in TINY, "make_tiny", repr(name), f"one of {list(TINY)}", "make_tiny('openvla')")
    config, tokenizer = json.loads(json.dumps(TINY[name])), tiny_tokenizer(name)
    text = config.get("text_config", config)
    text["vocab_size"] = tokenizer.get_vocab_size() + config.get("pad_to_multiple_of", 0)
    policy = build(config, **settings)
    init_weights(policy, seed)
    policy.tokenizer, policy.source = tokenizer, Path(f"make_tiny({name!r})")
    policy.read_statistics(policy.source)
    reach = np.array([0.05] * 3 + [0.25] * 3 + [1.0])    # m, rad, gripper: replaced once there is data
    policy.set_statistics("placeholder", {"action": {"q01": -reach, "q99": reach}})
    return policy.eval()

# ---- demo ------------------------------------------------------------------------------------------------------------
def throughput(work):
    """Runs of `work` per second (the fastest of four: other jobs only slow it down), and its GFLOP/s."""
    with FlopCounterMode(display=False) as counter:
        work()
    seconds = min(timeit.repeat(work, number=1, repeat=4))
    return 1 / seconds, counter.get_total_flops() / seconds / 1e9

def main(batch=64):
    torch.set_num_threads(1)             # the unit of account: one core
    images = np.random.default_rng(0).integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)
    texts, square = ["pick up the carrot", "open the drawer"] * (batch // 2), torch.randn(1024, 1024)
    limit = throughput(lambda: square @ square)[1]
    print(f"One core, float32, batch {batch}, 64 px. Samples/s (share of matmul limit {limit:.0f} GFLOP/s):")
    print("policy   parameters tokens  act           evaluate+bwd  same, cached features  bc_loss+bwd")
    for name in TINY:
        policy = make_tiny(name)
        for p in policy.parameters():    # away from the neutral start, where the expert does not listen yet
            p.data.add_(torch.randn_like(p), alpha=0.05)
        decision, features = policy.act(images, texts), policy.encode_images(images).detach()
        chunk = torch.zeros(batch, policy.settings.get("horizon", 1), ACTION_DIM)
        loss = lambda seen: sum(part.mean() for part in policy.evaluate(seen, texts, decision.trace))
        rows = [throughput(work) for work in (
            lambda: policy.act(images, texts), lambda: loss(images).backward(), lambda: loss(features).backward(),
            lambda: policy.bc_loss(images, texts, chunk).backward())]
        rates = "   ".join(f"{rate * batch:5.0f} ({flops / limit:3.0%})" for rate, flops in rows)
        tokens = f"{policy.feature_shape[0] + policy.prompt(texts)[0].shape[1]}+{max(chunk.shape[1], 7)}"
        print(f"{name:8} {sum(p.numel() for p in policy.parameters()):10,} {tokens:>6}  {rates}")
        gap = (policy.evaluate(images, texts, decision.trace)[0] - decision.logp).abs().max().item()
        expect(gap < 1e-4, "log-probs", f"{gap:.1e} apart", "the same in act and evaluate", "the tests")
        print(f"{'':8} act and evaluate agree: largest difference of log-probs {gap:.1e}")

if __name__ == "__main__":
    main()
