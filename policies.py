"""OpenVLA (action tokens) and pi0.5 (flow matching): two VLA policies behind one contract.

    policy = load_policy("openvla" | "pi05" | folder | hub id)   # tiny, or official 7 B, 3.3 B
    decision = policy.act(images, instructions)                  # actions, logp, value, trace
    logp, entropy, value = policy.evaluate(images, instructions, decision.trace)  # + gradient
    loss = policy.bc_loss(images, instructions, actions, pad)    # L_SFT on demonstrations
    policy.save(folder)                                          # layouts of others, too
    policy.notes                                                 # what load_policy chose
    policy.deployment                                            # what a robot must know

    python policies.py                                           # the tiny ones on one core
    python policies.py --export runs/mine/policy handed-over     # adapters merged, for others
    python policies.py --size official --device cuda --dtype bf16 --lora-rank 32

Images    (B, H, W, 3) uint8 RGB, or (B, N, H, W, 3) for N cameras of pi0.5. What
          policy.encode_images returns may stand for images: frozen vision runs once per image.
          So may what pi0.5's encode_prefix returns, if its language model is frozen, too.
Actions   (B, K, 7) float32: dx dy dz [m], droll dpitch dyaw [rad], gripper -1 close .. 1 open
Log-prob  One float32 number [nats] per decision, on which PPO's ratio, clip and KL all act.
          OpenVLA: log pi(a|o), the sum over the 7 action tokens.
          pi0.5:   NOT log pi(a|o), which has no closed form, but the MEAN over the steps + 1
                   Gaussian factors of the denoising chain, as in RLinf ("flow_noise"); or the
                   factor of the one noisy step ("flow_sde").
Shapes    B batch, T image tokens, L prompt tokens, P prefix, D width, H horizon, K executed,
          A action dims of the model, S denoising steps, V vocabulary

Official and tiny checkpoints run through the same code. Departures from the references:
 1. OpenVLA acts in batches and samples among the 256 action tokens (official: batch 1, all).
 2. One decoder serves Llama, Gemma and the action expert. It has no RoPE buffer to round.
 3. pi0.5 trains and samples by the same two passes, prefix and expert, with equal gradients.
 4. pi0.5's critic averages valid prefix tokens only; the reference averages padding, too.
 5. "bf16" is autocast over what trains, which stays float32. What is frozen is stored in bf16:
    layers as autocast would round them, and the embedding, whose sums are then bf16, too, as in
    the official model. Logits, heads, time, norms and RoPE are computed in float32.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import re
import timeit
import warnings
from pathlib import Path
from typing import NamedTuple
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers import models
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

ACTION_DIM = 7
ACTIONS = (
    "change of the tool (TCP) per control step in the robot base frame: dx dy dz [m], droll dpitch "
    "dyaw [rad]; then the gripper, -1 close .. +1 open"
)
DECODINGS = ("sample", "deploy", "greedy")
DEPLOY_TEMPERATURE = 0.6  # of OpenVLA in evaluation, as in RL4VLA; greedy tends to freeze
MIN_RANGE = 1e-3  # [m, rad] narrower ranges are widened: noise would become huge actions
LORA_ALPHA = 16  # alpha = min(rank, 16), as in OpenVLA's fine-tuning script
BASE = Path(__file__).resolve().parent / "base"
BUNDLED = dict(openvla=BASE / "openvla-tiny", pi05=BASE / "pi05-tiny")
HEADS = ("value_head.", "noise_head.")  # not in the official models, hence saved apart
PADDING = 1e-6  # openpi pads q01 and q99 with numbers smaller than that
OTHER = "another checkpoint"  # the remedy if this one cannot be used


# ---- the contract ------------------------------------------------------------------------


class Decision(NamedTuple):
    """What act returns for a batch of observations."""

    actions: torch.Tensor  # (B, K, 7) float32, physical units
    logp: torch.Tensor  # (B,) float32, under decoding "sample"; 0 for chunks of pi0.5's ODE
    value: torch.Tensor  # (B,) float32, the critic's V(o)
    trace: dict  # what was sampled, for evaluate: tensors with leading dimension B


class VLA(Protocol):
    """What both stages and evaluation need of a policy; check_policy tries it on your class.

    It is an nn.Module. Parameters named "value_head..." get the value head's learning rate. It
    may also have save, encode_images, whose features are kept while vision_frozen, and
    encode_prefix, whose result is kept while prefix_frozen.
    """

    device: torch.device
    image_size: int  # side of the square images it is given [px]
    horizon: int  # H, actions per training sample
    chunk: int  # K, actions executed per decision
    reads_state: bool  # whether it needs `state` (B, n); else None is passed
    fit: str  # how a frame becomes square: "stretch" or "pad"

    def act(self, images, instructions, state=None, decoding="sample", generator=None):
        """Return a Decision, without gradient.

        decoding: "sample" with the noise of RL; "deploy" as evaluated (OpenVLA: temperature 0.6,
        pi0.5: the ODE); "greedy" (OpenVLA: argmax, pi0.5: the ODE).
        """

    def evaluate(self, images, instructions, trace, state=None):
        """Return logp, entropy, value of a trace under the current weights, each (B,)."""

    def value(self, images, instructions, state=None):
        """Return V(o), (B,)."""

    def bc_loss(
        self, images, instructions, actions, pad=None, state=None, reduction="mean",
        generator=None,
    ):
        """Return the imitation loss of actions (B, H, 7): (B, H) if reduction is "none".

        "mean" is a scalar, over the steps that are not pad (B, H) bool.
        """


class Problems(list):
    """Collects a user's mistakes, so that one message names all of them: what, got, need, try."""

    def need(self, ok, what, got, need, remedy):
        """Note a problem unless ok."""
        if not ok:
            self.append(f"{what}: got {got}; need {need}; try {remedy}")

    def stop(self):
        """Raise one ValueError with all problems, if there are any."""
        if self:
            raise ValueError("\n".join(self))


def check_policy(policy):
    """Try a policy on random images; raise one ValueError listing what breaks the contract."""
    problems = Problems()
    names = [*VLA.__annotations__, "act", "evaluate", "value", "bc_loss"]
    missing = [name for name in names if not hasattr(policy, name)]
    problems.need(not missing, "policy", f"no {missing}", names, "adding them, see class VLA")
    problems.stop()
    batch = 3
    size = (batch, policy.image_size, policy.image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    seen = dict(images=images, instructions=["open the drawer", "pick it up", "push the cube"])
    if policy.reads_state:
        seen["state"] = torch.zeros(batch, 8)

    def check(what, tensor, *shape):
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        fine = got == f"torch.float32 {shape}" and tensor.isfinite().all()
        problems.need(fine, what, got, f"finite float32 {shape}", "the shapes in class VLA")

    for decoding in reversed(DECODINGS):
        decision = policy.act(**seen, decoding=decoding)
        logp, entropy, value = policy.evaluate(**seen, trace=decision.trace)
        check(f"actions of {decoding}", decision.actions, batch, policy.chunk, ACTION_DIM)
        for tensor in (decision.logp, decision.value, logp, entropy, value):
            check(f"logp, entropy or value of {decoding}", tensor, batch)
        gap = (logp - decision.logp).abs().max().item()
        got = f"a gap of {gap:.1e} between act and evaluate"
        problems.need(gap < 1e-3, f"logp of {decoding}", got, "< 1e-3", "policy.eval()")
    actions = torch.zeros(batch, policy.horizon, ACTION_DIM)
    pad = torch.zeros(batch, policy.horizon, dtype=torch.bool)
    loss = policy.bc_loss(**seen, actions=actions, pad=pad)
    steps = policy.bc_loss(**seen, actions=actions, reduction="none")
    check("bc_loss", loss)
    check("bc_loss(none)", steps, batch, policy.horizon)
    check("value", policy.value(**seen), batch)
    for what, scalar in (("evaluate", logp.mean() + value.mean()), ("bc_loss", loss)):
        policy.zero_grad()
        if scalar.requires_grad:
            scalar.backward()
        reached = any(p.grad is not None and p.grad.any() for p in policy.parameters())
        problems.need(reached, what, "no gradient", "some", "trainable parameters, no detach()")
    policy.zero_grad()
    problems.stop()


def no_autocast(x):
    """Return a context that computes in float32 even inside bf16 autocast."""
    return torch.autocast(x.device.type, enabled=False)


class Policy(nn.Module):
    """What OpenVLA and Pi05 share: settings, statistics, checks of the inputs."""

    reads_state = False

    def __init__(self, config, settings):
        super().__init__()
        unknown = sorted(set(settings) - set(self.SETTINGS))
        if unknown:
            raise ValueError(
                f"settings of {self.kind}: got {unknown}; need some of {list(self.SETTINGS)}; "
                "try --load KEY=VALUE with one of those"
            )
        self.config = config
        self.settings = {**self.SETTINGS, **settings}
        # Data set -> {"action": {"q01": [..], "q99": [..]}, "state": ..}.
        self.statistics = {}
        self.tokenizer = None
        self.notes = []  # what load_policy chose, one line each
        self.base = dict(name="", sha256="")  # of the weights that adapters leave as they are
        self.passed_on = {}  # files of the checkpoint that are saved again: dicts, or bytes
        # For who puts it on a robot: cameras (data set features, in the order of the images),
        # control_hz, actions, instructions it was trained on, statistics, base. See describe()
        # in sft_warmstart.py.
        self.deployment = {}
        self.bf16 = False

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def vision_frozen(self):
        """Whether nothing in the vision towers trains, so that features may be cached."""
        vision = (p for name, p in self.named_parameters() if name.startswith(self.vision))
        return not any(p.requires_grad for p in vision)

    @property
    def number(self):
        """The type of features: what reads them would round them to bf16 anyway."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    def stats(self):
        """Statistics of the data set `unnorm_key`; None will do if there is exactly one."""
        names = list(self.statistics)
        key = self.settings["unnorm_key"]
        if key is None and len(names) == 1:
            key = names[0]
        if key not in names:
            raise ValueError(
                f"unnorm_key: got {key}; need one of {names}; try --load unnorm_key=NAME, or "
                "sft_warmstart.py --statistics data, which takes those of the demonstrations"
            )
        return self.statistics[key]

    def quantiles(self, part):
        """Return q01 and q99, (n,) float64 each, of the "action" or the "state"."""
        if part not in self.stats:
            raise ValueError(
                f"statistics: got {list(self.stats)}; need {part}; try sft_warmstart.py "
                "--statistics data or, if it is the state, --load discrete_state=false"
            )
        # openpi may pad them with zeros to the model's size, which load_policy makes sure of.
        size = ACTION_DIM if part == "action" else None
        both = [self.stats[part]["q01"][:size], self.stats[part]["q99"][:size]]
        return torch.tensor(both, dtype=torch.float64, device=self.device).unbind()

    def has_statistics(self):
        """Return whether one data set's statistics are chosen, or are the only ones."""
        return self.settings["unnorm_key"] is not None or len(self.statistics) == 1

    def set_statistics(self, name, stats):
        """Replace all statistics by those of one data set, in the contract's units.

        stats: {"action": {"q01": (7,), "q99": (7,), ..}, "state": the same, optional}
        """
        fault = range_fault(stats["action"])
        if fault:
            raise ValueError(
                f"statistics {name}: got actions with {fault}; need q01 <= q99, 7 finite numbers "
                "each; try real_data.dataset_statistics"
            )
        low = np.array(stats["action"]["q01"], float)[:ACTION_DIM]
        high = np.array(stats["action"]["q99"], float)[:ACTION_DIM]
        widen = np.maximum(MIN_RANGE - (high - low), 0) / 2
        action = {"mask": [True] * 6 + [False], "gripper_range": [-1.0, 1.0], **stats["action"]}
        action["q01"] = (low - widen).tolist()
        action["q99"] = (high + widen).tolist()
        self.statistics = {name: {**stats, "action": action}}
        self.settings["unnorm_key"] = None

    def check_inputs(
        self, images, instructions=None, state=None, actions=None, pad=None, decoding="sample"
    ):
        """Return images (uint8) or features (float) on the device; list all wrong inputs."""
        problems = Problems()
        images = torch.as_tensor(images)
        batch = len(images)
        pixels = images.dtype == torch.uint8 and images.ndim in self.image_ndims
        features = images.is_floating_point() and images.shape[-2:] == self.feature_shape
        pixels = pixels and images.shape[-1] == 3
        fine = (pixels or features) and images.isfinite().all()
        got = f"{images.dtype} {tuple(images.shape)}"
        need = "uint8 RGB (B, H, W, 3) or finite features"
        problems.need(
            fine, "images", got, need, "channels last, or policy.encode_images(images)"
        )
        if instructions is not None:
            fine = all(isinstance(text, str) and text.strip() for text in instructions)
            fine = fine and len(instructions) == batch and not isinstance(instructions, str)
            need = f"a list of {batch} non-empty str"
            problems.need(fine, "instructions", instructions, need, "['open the drawer'] * B")
        if instructions is not None and self.reads_state:
            fine = state is not None and len(state) == batch
            fine = fine and torch.as_tensor(state).isfinite().all()
            problems.need(fine, "state", state, f"finite ({batch}, n)", "state=obs['state']")
        if actions is not None:
            actions = torch.as_tensor(actions)
            steps = actions.shape[1]
            fine = actions.shape == (batch, steps, ACTION_DIM) and steps >= self.horizon
            fine = fine and (pad is None or pad.shape == (batch, steps))
            fine = fine and actions.isfinite().all()
            got = f"{tuple(actions.shape)}, pad {getattr(pad, 'shape', None)}"
            need = f"finite ({batch}, >= {self.horizon}, {ACTION_DIM}), and pad like it"
            problems.need(fine, "actions", got, need, "what real_data.py reads")
        known = decoding in DECODINGS
        problems.need(known, "decoding", decoding, f"one of {DECODINGS}", "sample")
        problems.stop()
        return images.to(self.device)

    def encode(self, text):
        """Return the token ids of a text, without special tokens."""
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer: got none; need a tokenizer.json; try --load tokenizer=PATH"
            )
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def reduce(self, loss, pad, reduction):
        """Return loss (B, H) as it is, or its mean over the steps that are not padding."""
        if reduction == "none":
            return loss
        keep = torch.ones_like(loss)
        if pad is not None:
            keep = keep - torch.as_tensor(pad)[:, : loss.shape[1]].to(loss)
        return (loss * keep).sum() / keep.sum().clamp(min=1)

    def official_key(self, name):
        """Return the official name of a parameter."""
        return name

    def internal_key(self, name):
        """Return our name of a parameter of an official file."""
        return name

    def tensor_files(self):
        """Return further files of tensors, name -> tensors."""
        return {}

    def save(self, folder):
        """Write a folder in the official layout, and what load_policy reads beside it.

        To be safe from crashes, save under a temporary name, then rename.
        """
        save_policy(self, Path(folder))


# ---- OpenVLA: seven action tokens --------------------------------------------------------

BIN_EDGES = torch.from_numpy(np.linspace(-1, 1, 256))
BIN_CENTRES = (BIN_EDGES[:-1] + BIN_EDGES[1:]) / 2  # 255: the two lowest ids share +0.996


class OpenVLA(Policy):
    """DINOv2 and SigLIP patches -> projector -> Llama, which writes 7 action tokens.

    Sequence: [BOS][T patches][PAD ..][prompt text][lone space] -> a_0 .. a_6 </s>, where
    positions skip the PADs. In training mode the central crop is skipped, because random crops
    take its place. Settings:
      unnorm_key    data set whose statistics un-normalise the actions
      temperature   of sampling in RL, and of all log-probs
      center_crop   for checkpoints tuned with random crops: lanczos resize, central 90 %
    """

    SETTINGS = dict(unnorm_key=None, temperature=1.0, center_crop=False)
    kind = "openvla"
    float32_layers = "lm_head"  # layers that are computed without autocast
    embedding = "language_model.model.embed_tokens.weight"
    statistics_file = "dataset_statistics.json"
    special_tokens = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    horizon = 1
    chunk = 1
    fit = "stretch"
    image_ndims = (4,)
    bos = 1
    eos = 2
    vision = ("vision_backbone.",)
    vlm = ("vision_backbone.", "projector.", "language_model.")
    tied_embedding = False
    zero_norms = ()
    init_std = {
        "pos_embed": 1.0,
        "embed_tokens.weight": 1.0,
        "lm_head.weight": 0.02,
        "_token": 0.02,
        "latent": 0.02,
        "value_head.4.weight": 0.02,
    }

    def __init__(self, config, **settings):
        super().__init__({**OPENVLA, **config}, settings)
        if not self.settings["temperature"] > 0:
            raise ValueError(
                f"temperature: got {self.settings['temperature']}; need more than 0; "
                "try --load temperature=1.0"
            )
        text = {**LLAMA, **config.get("text_config", {})}
        text.update(text.get("rope_parameters") or {})  # where transformers 5 puts rope_theta
        width = text["hidden_size"]
        heads = text["num_attention_heads"]
        size = config.get("image_sizes", [224])[0]
        tiny = config.get("tiny_timm_kwargs", {})
        dino = ViT(size, **{**DINOV2, **tiny.get("featurizer", {})})
        siglip = ViT(size, **{**SIGLIP_TIMM, **tiny.get("fused_featurizer", {})})
        dim = dino.pos_embed.shape[2] + siglip.pos_embed.shape[2]
        self.vision_backbone = nn.ModuleDict(dict(featurizer=dino, fused_featurizer=siglip))
        self.projector = linears(fc1=(dim, 4 * dim), fc2=(4 * dim, width), fc3=(width, width))
        self.language_model = linears(False, lm_head=(width, text["vocab_size"]))
        self.language_model["model"] = Decoder(
            width,
            text["num_hidden_layers"],
            text["vocab_size"],
            mlp_dim=text["intermediate_size"],
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            act=nn.SiLU(),
            eps=text["rms_norm_eps"],
            theta=text["rope_theta"],
            offset=0,
        )
        self.value_head = Head((width, 512, 128, 1), nn.GELU, last_bias=False)
        self.image_size = size
        self.feature_shape = (dino.pos_embed.shape[1], dim)
        self.vocab = text["vocab_size"] - config.get("pad_to_multiple_of", 64)  # 32000 of 32064
        self.pad = self.vocab

    @torch.no_grad()
    def act(self, images, instructions, state=None, decoding="sample", generator=None):
        """Write 7 tokens with a cache of keys and values -> Decision, K = 1."""
        images = self.check_inputs(images, instructions, decoding=decoding)
        temperature = DEPLOY_TEMPERATURE
        if decoding == "sample":
            temperature = self.settings["temperature"]
        hidden, valid, kv = self.hidden(images, *self.prompt(instructions), last=1)
        value = self.value_head(hidden[:, -1])[:, 0]
        llama = self.language_model.model
        rooms = ACTION_DIM - 1  # for the keys and values of all action tokens but the last
        columns = valid.shape[1] + torch.arange(rooms, device=self.device)[:, None]  # (6, 1)
        valid = F.pad(valid, (0, rooms))
        for layer, pair in enumerate(kv):
            kv[layer] = [F.pad(part, (0, 0, 0, rooms)) for part in pair]
        logp = torch.zeros_like(value)
        tokens = []
        for i in range(ACTION_DIM):
            if i > 0:  # feed the last token back
                column = columns[i - 1]
                valid.index_fill_(1, column, True)
                position = valid.sum(1, keepdim=True) - 1
                with self.autocast():
                    x = llama.embed_tokens(tokens[-1])
                    hidden, kv = llama(x, position, valid[:, None, None], kv, write=column)
            logits = self.action_logits(hidden[:, -1])  # (B, 256)
            log_probs = self.log_softmax(logits)
            if decoding == "greedy":
                choice = log_probs.argmax(-1, keepdim=True)  # (B, 1)
            else:
                probs = (logits / temperature).log_softmax(-1).exp()
                choice = torch.multinomial(probs, 1, generator=generator)
            logp = logp + log_probs.gather(1, choice)[:, 0]
            tokens.append(choice + self.vocab - 256)
        tokens = torch.cat(tokens, 1)  # (B, 7)
        actions = self.unnormalize(self.decode_tokens(tokens))
        return Decision(actions[:, None], logp, value, {"tokens": tokens})

    def evaluate(self, images, instructions, trace, state=None):
        """Return logp, the sum over 7 tokens; entropy, their mean [nats]; value; (B,) each.

        One teacher-forced pass over the sampled tokens.
        """
        images = self.check_inputs(images, instructions)
        tokens = trace["tokens"]
        prompt = self.prompt(instructions)
        hidden, _, _ = self.hidden(images, *prompt, tokens[:, :-1], last=ACTION_DIM)
        hidden = hidden[:, -ACTION_DIM:]  # (B, 7, D), the states that write a_0 .. a_6
        log_probs = self.log_softmax(self.action_logits(hidden))  # (B, 7, 256)
        choice = tokens - self.vocab + 256
        logp = log_probs.gather(2, choice[..., None]).sum((1, 2))
        entropy = -(log_probs.exp() * log_probs).sum(2).mean(1)
        return logp, entropy, self.value_head(hidden[:, 0])[:, 0]

    def value(self, images, instructions, state=None):
        """Return V(o), (B,), which the head reads off the last prompt token."""
        images = self.check_inputs(images, instructions)
        hidden, _, _ = self.hidden(images, *self.prompt(instructions), last=1)
        return self.value_head(hidden[:, -1])[:, 0]

    def bc_loss(
        self, images, instructions, actions, pad=None, state=None, reduction="mean",
        generator=None,
    ):
        """Return -mean log p of 7 action tokens and </s> over the whole vocabulary.

        Of longer chunks, step 0 counts; reduction "none": (B, 1).
        """
        images = self.check_inputs(images, instructions, actions=actions, pad=pad)
        first = torch.as_tensor(actions, device=self.device)[:, 0]
        tokens = self.encode_values(self.normalize(first))  # (B, 7)
        prompt = self.prompt(instructions)
        hidden, _, _ = self.hidden(images, *prompt, tokens, last=ACTION_DIM + 1)
        logits = self.logits(hidden[:, -ACTION_DIM - 1 :])  # (B, 8, V)
        targets = F.pad(tokens, (0, 1), value=self.eos)  # (B, 8)
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return self.reduce(loss.mean(1, keepdim=True), pad, reduction)

    def hidden(self, images, ids, mask, tokens=None, last=None):
        """Run Llama over images, prompt (B, L) and the action tokens (B, n) so far.

        Returns the hidden states (B, T + L + n, D), or at least those of the `last` positions,
        which positions are valid, and keys and values of all layers.
        """
        features = images if images.is_floating_point() else self.encode_images(images)
        if tokens is not None:
            ids = torch.cat([ids, tokens], 1)
            mask = F.pad(mask, (0, tokens.shape[1]), value=True)
        llama = self.language_model.model
        with self.autocast():
            text = llama.embed_tokens(ids)
            patches = self.project(features)
            x = torch.cat([text[:, :1], patches, text[:, 1:]], 1)  # patches follow BOS
            valid = F.pad(mask, (patches.shape[1], 0), value=True)  # and are all valid
            causal = valid.new_ones(x.shape[1], x.shape[1]).tril()
            mask = causal & valid[:, None, None]  # (B, 1, T + L + n, T + L + n)
            hidden, kv = llama(x, valid.cumsum(1) - 1, mask, last=last)
        return hidden, valid, kv

    def logits(self, hidden):
        with no_autocast(hidden):
            return self.language_model.lm_head(hidden.float())  # (.., V)

    def action_logits(self, hidden):
        """Return the logits of the action tokens, the last 256 of the vocabulary: (.., 256)."""
        return self.logits(hidden)[..., self.vocab - 256 : self.vocab]

    def log_softmax(self, logits):
        return (logits / self.settings["temperature"]).log_softmax(-1)

    def decode_tokens(self, ids):
        """Return normalised values, float64. Ids outside the 256 saturate at +-0.996."""
        return BIN_CENTRES.to(ids.device)[(self.vocab - ids - 1).clamp(0, 254)]

    def encode_values(self, values):
        """Return ids: id = vocab - d, where d in 1 .. 256 counts the edges <= clip(v, -1, 1)."""
        edges = BIN_EDGES.to(values.device)
        return self.vocab - torch.bucketize(values.clamp(-1, 1), edges, right=True)

    def action_range(self):
        """Return q01, q99, which dims to normalise, and the closed and open gripper, as stored.

        Official data sets normalise all dims but the gripper, which is 0 closed, 1 open.
        """
        low, high = self.quantiles("action")
        mask = self.stats["action"].get("mask", [True] * ACTION_DIM)
        gripper = self.stats["action"].get("gripper_range", (0, 1))
        return low, high, torch.tensor(mask, device=self.device).bool(), *gripper

    def unnormalize(self, values):
        """Map values (B, 7) to physical actions: 0.5 (v + 1) (q99 - q01) + q01 where mask."""
        low, high, mask, closed, opened = self.action_range()
        actions = torch.where(mask, 0.5 * (values + 1) * (high - low) + low, values)
        actions[:, 6] = 2 * (actions[:, 6] - closed) / (opened - closed) - 1
        return actions.float()

    def normalize(self, actions):
        """Map physical actions (B, 7) to values; a dimension that never moved becomes 0."""
        low, high, mask, closed, opened = self.action_range()
        actions = actions.double().clone()
        actions[:, 6] = (actions[:, 6] + 1) / 2 * (opened - closed) + closed
        values = 2 * (actions - low) / (high - low + 1e-8) - 1
        values = torch.where(high == low, 0.0, values)
        return torch.where(mask, values, actions)

    def pixels(self, images):
        """(B, H, W, 3) uint8 -> (B, 6, S, S) float32: stretched, normalised for each tower."""
        crop = self.settings["center_crop"] and not self.training
        if crop or images.shape[1:3] != (self.image_size, self.image_size):
            images = resize_openvla(images.cpu().numpy(), self.image_size, crop)
            images = torch.from_numpy(images).to(self.device)
        x = images.permute(0, 3, 1, 2).contiguous().float() / 255
        mean = x.new_tensor(PIXEL_MEAN)[:, None, None]
        std = x.new_tensor(PIXEL_STD)[:, None, None]
        return (torch.cat([x, x], 1) - mean) / std

    def encode_images(self, images):
        """(B, H, W, 3) uint8 -> features (B, T, D1 + D2) of DINOv2 and SigLIP."""
        dino, siglip = self.pixels(self.check_inputs(images)).split(3, 1)
        with self.autocast():
            dino = self.vision_backbone.featurizer(dino)
            siglip = self.vision_backbone.fused_featurizer(siglip)
            return torch.cat([dino, siglip], -1).to(self.number)

    def project(self, x):
        x = F.gelu(self.projector.fc1(x))
        x = F.gelu(self.projector.fc2(x))
        return self.projector.fc3(x)

    def prompt(self, instructions):
        """Return ids and mask (B, L): BOS, PADs, text, so that all prompts end in one column."""
        rows = [torch.tensor(self.row(text)) for text in instructions]
        ids = pad_sequence(rows, True, self.pad, padding_side="left")
        ids = F.pad(ids, (1, 0), value=self.bos).to(self.device)
        return ids, ids != self.pad

    def row(self, text):
        """Return the token ids of one prompt, without BOS."""
        row = self.encode(f"In: What action should the robot take to {text.lower()}?\nOut:")
        # In training a space came before the actions, and became a token of its own.
        space = self.tokenizer.token_to_id("▁")  # 29871 in Llama's vocabulary
        return row if row[-1] == space else row + [space]

    def statistics_files(self):
        return {self.statistics_file: self.statistics}

    def model_files(self):
        """Return the official files beside weights and tokenizer, name -> content.

        auto_map says where the classes for AutoModel are: in the .py files of the checkpoint, as
        its own auto_map has it, or else in the official repository.
        """
        config = {"pad_token_id": self.pad, **self.config, "norm_stats": self.statistics}
        processor = dict(
            PREPROCESSOR_FIELDS,
            processor_class="PrismaticProcessor",
            image_processor_type="PrismaticImageProcessor",
            input_sizes=[[3, self.image_size, self.image_size]] * 2,
        )
        processor.update(self.passed_on.get("preprocessor_config.json", {}))
        if not any(name.endswith(".py") for name in self.passed_on):
            config["auto_map"] = OPENVLA_CLASSES
            processor["auto_map"] = OPENVLA_PROCESSORS
        tokens = dict(bos_token_id=self.bos, eos_token_id=self.eos, pad_token_id=self.pad)
        tokens.update(self.passed_on.get("generation_config.json", {}))
        return {
            "config.json": config,
            "preprocessor_config.json": processor,
            "generation_config.json": tokens,
        }

    def read_statistics(self, folder):
        """Return {file: {data set: statistics}}; the first file that has a data set counts."""
        config = read_json(folder / "config.json", {})
        return {
            self.statistics_file: read_json(folder / self.statistics_file, {}),
            "norm_stats of config.json": config.get("norm_stats") or {},
        }


# ---- pi0.5: flow matching ----------------------------------------------------------------


class Pi05(Policy):
    """SigLIP and Gemma read images and prompt once; the expert turns noise into H actions.

    Time t = 1 is noise, t = 0 the action chunk; the velocity v = noise - action, so that an
    Euler step is x <- x - v / steps. camera_mask (B, N) bool is a keyword of all methods: False
    where a camera is missing. Settings:
      unnorm_key      data set whose statistics un-normalise actions and state
      sampler         "flow_noise": learned noise at every step; "flow_sde": given noise at one
      steps           of denoising
      chunk, horizon  K executed of H predicted actions; horizon None: the checkpoint's
      noise_level     a of flow_sde
      noise_std       range of the learned noise of flow_noise [model units]
      discrete_state  whether the state is written into the prompt
      style           "openpi" or "lerobot": resizing and epsilons
    The defaults of chunk, steps, discrete_state and style are LeRobot's in its checkpoints.
    """

    SETTINGS = dict(
        unnorm_key=None,
        sampler="flow_noise",
        steps=4,
        chunk=4,
        horizon=None,
        noise_level=0.5,
        noise_std=(0.08, 0.16),
        discrete_state=False,
        style="openpi",
    )
    kind = "pi05"
    float32_layers = r"dense\.|action_\w+_proj|time_mlp"  # that are computed without autocast
    embedding = "language_model.embed_tokens.weight"
    statistics_file = "norm_stats.json"
    special_tokens = dict(
        pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    fit = "pad"
    image_ndims = (4, 5)
    bos = 2
    vision = ("vision_tower.",)
    vlm = ("vision_tower.", "multi_modal_projector.", "language_model.")
    tied_embedding = True
    zero_norms = ("language_model.",)  # Gemma stores w - 1
    init_std = {
        "position_embedding.weight": 1.0,
        "action_out_proj.weight": 0.02,
        "value_head.6.weight": 0.02,
        "noise_head.4.weight": 0.02,
    }

    def __init__(self, config, **settings):
        from transformers import SiglipVisionConfig
        from transformers import SiglipVisionModel

        super().__init__(complete_pi05(config), {**stated_settings(config), **settings})
        vision = self.config["vision"]
        vlm = self.config["vlm"]
        expert = self.config["expert"]
        width = expert["width"]
        dim = self.config["action_dim"]
        self.horizon = self.settings["horizon"] or self.config["action_horizon"]
        self.chunk = self.settings["chunk"]
        self.steps = self.settings["steps"]
        self.sampler = self.settings["sampler"]
        self.reads_state = self.settings["discrete_state"]
        fine = self.sampler in ("flow_noise", "flow_sde") and self.steps > 0
        fine = fine and self.settings["style"] in ("openpi", "lerobot")
        fine = fine and 0 < self.settings["noise_std"][0] <= self.settings["noise_std"][-1]
        if not fine or not 0 < self.chunk <= self.horizon:
            raise ValueError(
                f"settings: got {self.settings}; need sampler flow_noise or flow_sde, style "
                f"openpi or lerobot, steps > 0, 0 < chunk <= horizon = {self.horizon}, and "
                "0 < low <= high in noise_std; try --load KEY=VALUE with such values"
            )
        tokens = (vision["image_size"] // vision["patch_size"]) ** 2
        self.image_size = vision["image_size"]
        self.feature_shape = (tokens, vision["hidden_size"])
        self.action_dim = dim
        gemma = dict(act=nn.GELU("tanh"), eps=1e-6, theta=1e4, offset=1)
        self.vision_tower = SiglipVisionModel(
            SiglipVisionConfig(**vision, vision_use_head=False)
        )
        # This buffer is in no file, so that it must not be on the meta device.
        self.vision_tower.embeddings.position_ids = torch.arange(tokens, device="cpu")[None]
        self.multi_modal_projector = linears(linear=(vision["hidden_size"], vlm["width"]))
        self.language_model = Decoder(**vlm, vocab=self.config["vocab_size"], **gemma)
        self.gemma_expert = Decoder(**expert, cond_dim=width, **gemma)
        self.action_in_proj = nn.Linear(dim, width)
        self.action_out_proj = nn.Linear(width, dim)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        self.value_head = Head((vlm["width"], 512, 256, 128, 1), nn.ReLU)
        self.noise_head = Head((width, 128, 64, dim), nn.Tanh)

    @torch.no_grad()
    def act(
        self, images, instructions, state=None, decoding="sample", generator=None,
        camera_mask=None,
    ):
        """Denoise H actions, of which K are executed -> Decision. The ODE starts from noise."""
        pooled, kv, valid = self.observe(
            images, instructions, state, camera_mask, decoding=decoding
        )
        batch = len(valid)
        shape = (batch, 1, self.horizon, self.action_dim)
        x = torch.randn(shape, generator=generator, device=self.device)
        noisy = []  # steps that get noise
        if decoding == "sample" and self.sampler == "flow_noise":
            noisy = list(range(self.steps))
        elif decoding == "sample":  # flow_sde: the same random step for the whole batch
            chosen = torch.randint(self.steps, (), generator=generator, device=self.device)
            noisy = [chosen.item()]
        chain = []
        for i in range(self.steps):
            step = torch.full((batch, 1), i, device=self.device)
            v, h = self.velocity(x, (self.steps - step) / self.steps, kv, valid)
            mean, std = self.transition(x, v, h, step)
            x_next = x - v / self.steps  # the ODE
            if i in noisy:
                noise = torch.randn(shape, generator=generator, device=self.device)
                x_next = mean + std * noise
            chain.append((x, x_next, step, mean, std))
            x = x_next
        actions = self.unnormalize(x[:, 0])[:, : self.chunk]
        x, x_next, step, mean, std = (torch.cat(part, 1)[:, noisy] for part in zip(*chain))
        logp, _ = self.chain_logp(x, x_next, mean, std)
        value = self.value_head(pooled)[:, 0]
        return Decision(actions, logp, value, dict(x=x, x_next=x_next, step=step))

    def evaluate(self, images, instructions, trace, state=None, camera_mask=None):
        """Return logp and entropy of the stored chain and value, (B,) each."""
        pooled, kv, valid = self.observe(images, instructions, state, camera_mask)
        x = trace["x"]  # (B, S, H, A)
        step = trace["step"]  # (B, S)
        value = self.value_head(pooled)[:, 0]
        if x.shape[1] == 0:  # a chunk of the ODE has no density
            return torch.zeros_like(value), torch.zeros_like(value), value
        v, h = self.velocity(x, (self.steps - step) / self.steps, kv, valid)
        mean, std = self.transition(x, v, h, step)
        logp, entropy = self.chain_logp(x, trace["x_next"], mean, std)
        return logp, entropy, value

    def value(self, images, instructions, state=None, camera_mask=None):
        """Return V(o), (B,), which the head reads off the mean of the valid prefix tokens."""
        pooled, _, _ = self.observe(images, instructions, state, camera_mask)
        return self.value_head(pooled)[:, 0]

    def bc_loss(
        self, images, instructions, actions, pad=None, state=None, reduction="mean",
        generator=None, camera_mask=None,
    ):
        """Return the flow-matching loss, its mean over the 7 dims: (B, H) if not reduced.

        t ~ 0.001 + 0.999 Beta(1.5, 1), whose distribution function is u = beta^1.5.
        """
        _, kv, valid = self.observe(
            images, instructions, state, camera_mask, actions=actions, pad=pad
        )
        actions = self.normalize(actions)[:, : self.horizon]  # (B, H, A)
        noise = torch.randn(actions.shape, generator=generator, device=self.device)
        u = torch.rand(len(actions), generator=generator, device=self.device)
        t = 0.001 + 0.999 * u ** (1 / 1.5)
        loss = self.flow_loss(kv, valid, actions, noise, t)[..., :ACTION_DIM].mean(-1)
        return self.reduce(loss, pad, reduction)

    def flow_loss(self, kv, valid, actions, noise, t):
        """Return (v(x_t, t) - u)^2, (B, H, A).

        x_t = t noise + (1 - t) actions, u = noise - actions.
        """
        x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
        v, _ = self.velocity(x_t[:, None], t[:, None], kv, valid)
        return (v[:, 0] - (noise - actions)) ** 2

    def transition(self, x, v, h, step):
        """Return mean and std of the next state at noisy steps (B, S): x' ~ N(mean, std^2).

        With d = 1 / steps, t = 1 - step d, x_data = x - t v, x_noise = x + (1 - t) v:
          mean = (1 - (t - d)) x_data + w x_noise                   (the ODE has w = t - d)
          flow_noise (ReinFlow)   w = t - d                       std = s(h), its logarithm
                                  squashed into the range of noise_std
          flow_sde (Flow-GRPO)    w = t - d - sigma^2 d / (2 t)   std = sigma sqrt(d)
                                  sigma = a sqrt(t / (1 - t)), where 1 - t is at least d
        """
        d = 1 / self.steps
        t = (1 - step * d)[..., None, None].float()  # (B, S, 1, 1)
        x_data = x - t * v
        x_noise = x + (1 - t) * v
        if self.sampler == "flow_noise":
            low, high = (2 * math.log(std) for std in self.settings["noise_std"])
            log_variance = low + (high - low) * (self.noise_head(h).tanh() + 1) / 2
            std = (log_variance / 2).exp()
            weight = t - d
        else:
            rest = torch.where(step[..., None, None] == 0, d, 1 - t)
            sigma = self.settings["noise_level"] * (t / rest).sqrt()
            std = (sigma * d**0.5).expand_as(x)
            weight = t - d - sigma**2 * d / (2 * t)
        return (1 - (t - d)) * x_data + weight * x_noise, std

    def chain_logp(self, x, x_next, mean, std):
        """Return logp, summed over executed steps and 7 dims, and entropy, their mean: (B,).

        flow_noise: mean of the S + 1 factors N(x^0; 0, 1), N(x^{i+1}; mean_i, std_i^2).
        flow_sde: the factor of the noisy step; entropy 0. A chunk of the ODE (S = 0): both 0.
        """
        executed = (..., slice(self.chunk), slice(ACTION_DIM))
        log_2pi = math.log(2 * math.pi)
        density = -0.5 * ((x_next - mean) / std) ** 2 - std.log() - 0.5 * log_2pi
        logp = density[executed].sum((1, 2, 3))
        factors = x.shape[1] + 1
        if self.sampler == "flow_sde" or factors == 1:
            return logp, torch.zeros_like(logp)
        start = -0.5 * x[:, 0] ** 2 - 0.5 * log_2pi
        logp = (start[executed].sum((1, 2)) + logp) / factors
        entropy = 0.5 * (log_2pi + 1) + std[executed].log().mean((2, 3)).sum(1) / factors
        return logp, entropy

    def velocity(self, x, t, kv, valid):
        """Return v(x_t, t) (B, S, H, A) and the expert's hidden states h (B, S, H, W).

        x (B, S, H, A), t (B, S): S chunks per observation, each of which sees the valid prefix
        and itself. Sampling: S = 1; log-prob: all noisy steps of a chain in one pass.
        """
        batch, chunks, horizon = x.shape[:3]
        block = torch.arange(chunks, device=x.device).repeat_interleave(horizon)
        own = (block[:, None] == block).expand(batch, -1, -1)  # (B, S H, S H)
        prefix = valid[:, None].expand(-1, len(block), -1)  # (B, S H, P)
        mask = torch.cat([prefix, own], -1)[:, None]  # (B, 1, S H, P + S H)
        own_positions = torch.arange(horizon, device=x.device).repeat(chunks)
        positions = valid.sum(1, keepdim=True) + own_positions  # (B, S H)
        cond = self.time_embedding(t)[:, :, None]  # (B, S, 1, W)
        with no_autocast(x):
            x = self.action_in_proj(x)  # (B, S, H, W)
        with self.autocast():
            hidden, _ = self.gemma_expert(x, positions, mask, past=kv, cond=cond)
        hidden = hidden.float()
        with no_autocast(x):
            return self.action_out_proj(hidden), hidden

    def time_embedding(self, t):
        """(B, S) -> (B, S, W): an MLP on sines, then cosines, of 2 pi t / p, p in 4e-3 .. 4."""
        half = self.time_mlp_in.in_features // 2
        power = torch.arange(half, dtype=torch.float64, device=self.device) / (half - 1)
        angle = 2 * math.pi * t[..., None].double() / (4e-3 * 1000**power)
        x = torch.cat([angle.sin(), angle.cos()], -1).float()
        with no_autocast(x):
            return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(x))))

    @property
    def prefix_frozen(self):
        """Whether nothing that reads images and prompt trains, so that the prefix may be kept."""
        return not any(
            p.requires_grad for name, p in self.named_parameters() if name.startswith(self.vlm)
        )

    @torch.no_grad()
    def encode_prefix(self, images, instructions, state=None, camera_mask=None):
        """Run the prefix pass once; what it returns may stand for images of the same call.

        Returns a dict: pooled (B, D), kv (B, P, layers, 2, kv heads, hd) and valid (B, P).
        """
        pooled, kv, valid = self.observe(images, instructions, state, camera_mask)
        kv = torch.stack([torch.stack(pair) for pair in kv])  # (layers, 2, B, kv heads, P, hd)
        return dict(pooled=pooled, kv=kv.permute(2, 4, 0, 1, 3, 5).contiguous(), valid=valid)

    def observe(self, images, instructions, state, camera_mask, **checked):
        """Check the inputs and run the prefix pass, unless encode_prefix has done so.

        Returns the mean of the valid prefix tokens (B, D) float32, which the value head reads,
        keys and values, and valid (B, P).
        """
        if isinstance(images, dict):
            kv = images["kv"].permute(2, 3, 0, 4, 1, 5)  # (layers, 2, B, kv heads, P, hd)
            return images["pooled"], list(kv), images["valid"]
        images = self.check_inputs(images, instructions, state, **checked)
        if camera_mask is not None:
            camera_mask = torch.as_tensor(camera_mask, device=self.device).bool()
        features = images
        if not images.is_floating_point():
            features = self.encode_images(images, camera_mask)
        hidden, kv, valid = self.prefix(
            features, camera_mask, *self.prompt(instructions, state)
        )
        pooled = (hidden.float() * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        return pooled, kv, valid

    def prefix(self, features, camera_mask, ids, mask):
        """Run Gemma over features (B, N, T, D') and prompt (B, L): P = cameras x T + L tokens.

        Every token sees all valid ones and no actions, so that one pass serves all denoising
        steps. Padding and missing cameras take no position.
        """
        if camera_mask is None:
            camera_mask = mask.new_ones(features.shape[:2])
        present = camera_mask.any(0)
        with self.autocast():
            image = self.multi_modal_projector.linear(features[:, present])  # (B, N', T, D)
            # Only text is scaled.
            text = self.language_model.embed_tokens(ids) * image.shape[-1] ** 0.5
            x = torch.cat([image.flatten(1, 2).to(text.dtype), text], 1)  # (B, P, D)
            seen = camera_mask[:, present].repeat_interleave(image.shape[2], 1)
            valid = torch.cat([seen, mask], 1)  # (B, P)
            hidden, kv = self.language_model(x, valid.cumsum(1) - 1, valid[:, None, None])
        return hidden, kv, valid

    def action_range(self, part="action"):
        """Return q01 and half of q99 - q01, with the epsilons of openpi or LeRobot."""
        low, high = self.quantiles(part)
        if self.settings["style"] == "lerobot":
            return low, torch.where(high == low, 1e-8, high - low) / 2
        return low, (high - low + 1e-6) / 2

    def unnormalize(self, x):
        """(B, H, A) model units -> (B, H, 7) float32 physical actions; padding dims go."""
        low, half = self.action_range()
        return ((x[..., : len(low)].double() + 1) * half + low).float()

    def normalize(self, actions):
        """(B, H, 7) physical actions -> (B, H, A) model units, zero-padded, never clipped."""
        low, half = self.action_range()
        x = (torch.as_tensor(actions, device=self.device).double() - low) / half - 1
        return F.pad(x, (0, self.action_dim - x.shape[-1])).float()

    def state_bins(self, state):
        """(B, n) physical state -> bins of [-1, 1]: 0 .. 255, below -1, as officially printed."""
        low, half = self.action_range("state")
        state = torch.as_tensor(state, device=self.device).double()
        size = min(state.shape[1], len(low))
        if state[:, size:].any() or (half[size:] > 1e-5).any():  # more than padding
            raise ValueError(
                f"state: got {state.shape[1]} numbers; need {len(low)}, as in the statistics; "
                "try --load discrete_state=false, or sft_warmstart.py --statistics data"
            )
        state = state[:, :size]
        low = low[:size]
        half = half[:size]
        edges = torch.linspace(-1, 1, 257, dtype=torch.float64, device=self.device)[:-1]
        return torch.bucketize((state - low) / half - 1, edges, right=True) - 1

    def encode_images(self, images, camera_mask=None):
        """(B, [N,] H, W, 3) uint8 -> features (B, N, T, D').

        Cameras that are missing in the whole batch are skipped.
        """
        images = self.check_inputs(images)
        if images.ndim == 4:
            images = images[:, None]  # (B, N, H, W, 3)
        present = slice(None) if camera_mask is None else camera_mask.any(0)
        x = images[:, present].flatten(0, 1)  # (B N', H, W, 3)
        if x.shape[1] == x.shape[2] == self.image_size:
            x = x.float() / 255 * 2 - 1
        else:
            x = resize_with_pad(x.cpu().numpy(), self.image_size, self.settings["style"])
            x = torch.from_numpy(x).to(self.device)
        with self.autocast():
            x = recompute(self.vision_tower, x.permute(0, 3, 1, 2)).last_hidden_state
        features = x.new_zeros(*images.shape[:2], *self.feature_shape, dtype=self.number)
        features[:, present] = x.to(self.number).unflatten(0, (len(images), -1))
        return features

    def prompt(self, instructions, state=None):
        """Return ids and mask (B, L): BOS, text, no EOS; padded on the right."""
        rows = []
        bins = self.state_bins(state).tolist() if self.reads_state else [()] * len(instructions)
        for text, numbers in zip(instructions, bins):
            row = self.row(text, numbers)[: self.config["max_token_len"]]
            rows.append(torch.tensor(row, device=self.device))
        ids = pad_sequence(rows, batch_first=True, padding_value=-1)
        return ids.clamp(min=0), ids >= 0

    def row(self, text, bins=(255,) * 8):
        """Return BOS and the token ids of one prompt, of whatever length; bins: of the state."""
        text = text.strip().replace("_", " ").replace("\n", " ")
        if self.reads_state:
            numbers = " ".join(str(number) for number in bins)
            return [self.bos, *self.encode(f"Task: {text}, State: {numbers};\nAction: ")]
        # Two calls, so that the newline never merges with the text.
        return [self.bos, *self.encode(text), *self.encode("\n")]

    def official_key(self, name):
        """Return openpi's name of a parameter."""
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if name.startswith(self.vlm):
            return "paligemma_with_expert.paligemma.model." + name
        return name.replace("gemma_expert.", "paligemma_with_expert.gemma_expert.model.")

    def internal_key(self, name):
        """Return our name of a parameter of openpi, LeRobot, RLinf, FSDP or torch.compile."""
        name = re.sub(r"_fsdp_wrapped_module\.|_orig_mod\.|vision_model\.", "", name)
        name = re.sub(r"^(module\.|model\.|paligemma_with_expert\.|paligemma\.)*", "", name)
        return name.replace("gemma_expert.model.", "gemma_expert.")

    def statistics_files(self):
        """Return norm_stats.json twice, where openpi looks for it and where RLinf does."""
        files = {}
        for name, stats in self.statistics.items():
            stats = {part.replace("action", "actions"): stats[part] for part in stats}
            for folder in (f"assets/{name}", name):
                files[f"{folder}/{self.statistics_file}"] = {"norm_stats": stats}
        return files

    def model_files(self):
        """Return LeRobot's files beside weights and tokenizer, name -> content.

        config.json has the fields of LeRobot alone, which refuses others. So it refuses a tiny
        policy by the sizes in it: it only knows the official ones.
        """
        size = self.image_size
        inputs = {
            name: dict(type="VISUAL", shape=[3, size, size]) for name in self.camera_names()
        }
        if self.has_statistics() and "state" in self.scaled_features():
            numbers = len(self.quantiles("state")[0])
            inputs["observation.state"] = dict(type="STATE", shape=[numbers])
        outputs = dict(action=dict(type="ACTION", shape=[ACTION_DIM]))
        config = dict(
            type="pi05",
            chunk_size=self.horizon,
            n_action_steps=self.chunk,
            num_inference_steps=self.steps,
            max_action_dim=self.action_dim,
            tokenizer_max_length=self.config["max_token_len"],
            image_resolution=[size, size],
            input_features=inputs,
            output_features=outputs,
            normalization_mapping=LEROBOT_MODES,
        )
        official = complete_pi05({})
        for name in ("vision", "vlm", "expert", "vocab_size"):
            if self.config[name] != official[name]:
                config[name] = self.config[name]
        files = {"config.json": config}
        if self.has_statistics():
            files.update(self.processors({**inputs, **outputs}))
        return files

    def camera_names(self):
        """Return the names of its images in a data set, in their order; [] if they are unknown."""
        features = self.config.get("input_features") or {}
        given = [name for name, feature in features.items() if feature.get("type") == "VISUAL"]
        return self.deployment.get("cameras") or given

    def processors(self, features):
        """Return LeRobot's processors, which turn observations into tokens and undo the scaling.

        features: the input_features and output_features of config.json
        """
        scaling = dict(eps=1e-8, features=features, norm_map=LEROBOT_MODES)
        prompt = STATE_STEP if self.reads_state else "pi0_new_line_processor"
        tokens = dict(
            max_length=self.config["max_token_len"],
            task_key="task",
            padding_side="right",
            padding="max_length",
            truncation=True,
            tokenizer_name="google/paligemma-3b-pt-224",  # which tokenizer.json is, too
        )
        device = dict(device="cpu", float_dtype=None)
        before = {
            "rename_observations_processor": dict(rename_map={}),
            "to_batch_processor": {},
            "normalizer_processor": scaling,
            prompt: {},
            "tokenizer_processor": tokens,
            "device_processor": device,
        }
        after = {"unnormalizer_processor": scaling, "device_processor": device}
        files = {}
        for name, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
            listed = []
            for number, (step, config) in enumerate(steps.items()):
                listed.append(dict(registry_name=step, config=config))
                if config is scaling:
                    listed[-1]["state_file"] = f"{name}_step_{number}_{step}.safetensors"
            files[f"{name}.json"] = dict(name=name, steps=listed)
        return files

    def scaled_features(self):
        """Return what is scaled by statistics, part of them -> LeRobot's name."""
        if self.reads_state and "state" in self.stats:
            return dict(action="action", state="observation.state")
        return dict(action="action")

    def tensor_files(self):
        """Return the statistics of LeRobot's processors, name -> tensors."""
        if not self.has_statistics():
            return {}
        tensors = {}
        for part, name in self.scaled_features().items():
            size = len(self.quantiles(part)[0])
            for statistic in LEROBOT_STATISTICS:
                if statistic in self.stats[part]:
                    numbers = np.array(self.stats[part][statistic][:size], np.float32)
                    tensors[f"{name}.{statistic}"] = torch.from_numpy(numbers)
        files = ("preprocessor_step_2_normalizer", "postprocessor_step_0_unnormalizer")
        return {f"policy_{file}_processor.safetensors": tensors for file in files}

    def read_statistics(self, folder):
        """Return {file: {data set: statistics}} of openpi, RLinf (<any folder>) and LeRobot."""
        found = {}
        files = []
        for file in sorted(folder.rglob(self.statistics_file)):
            files.append(str(file.relative_to(folder)))
            name = str(file.parent.relative_to(folder)).removeprefix("assets/")
            name = "norm_stats" if name == "." else name
            stats = read_json(file).get("norm_stats", {})
            stats = {part.replace("actions", "action"): stats[part] for part in stats}
            if found.setdefault(name, stats) != stats:
                raise ValueError(
                    f"{files}: got two different ones of {name}; need one; try to remove one"
                )
        lerobot = {}
        processors = []
        for file in sorted(folder.glob("policy_p*normalizer_processor.safetensors")):
            processors.append(file.name)
            for key, value in read_safetensors(file).items():
                part, _, statistic = key.removeprefix("observation.").rpartition(".")
                if part not in ("action", "state"):
                    continue
                stats = lerobot.setdefault("lerobot", {}).setdefault(part, {})
                if stats.setdefault(statistic, value.tolist()) != value.tolist():
                    raise ValueError(
                        f"{processors}: got two different {key}; need one; try the whole download"
                    )
        return {" and ".join(files): found, " and ".join(processors): lerobot}


# ---- plumbing: skip on first reading -----------------------------------------------------

# ---- sizes of the official models --------------------------------------------------------

# OpenVLA's two towers under timm's names; "tiny_timm_kwargs" in config.json overrides them.
DINOV2 = dict(embed_dim=1024, depth=24, num_heads=16, patch_size=14, reg_tokens=4)
SIGLIP_TIMM = dict(embed_dim=1152, depth=27, num_heads=16, patch_size=14, mlp_ratio=3.7362)
PIXEL_MEAN = [0.485, 0.456, 0.406, 0.5, 0.5, 0.5]  # RGB of DINOv2, RGB of SigLIP
PIXEL_STD = [0.229, 0.224, 0.225, 0.5, 0.5, 0.5]
# What config.json leaves out; the epsilon is 1e-6, not Llama-2's 1e-5.
LLAMA = dict(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    intermediate_size=11008,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    vocab_size=32000,
)
SIGLIP = dict(
    hidden_size=1152,
    num_hidden_layers=27,
    num_attention_heads=16,
    intermediate_size=4304,
    image_size=224,
    patch_size=14,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
GEMMA_2B = dict(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256)
GEMMA_300M = dict(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)
PI05 = dict(
    action_dim=32,
    action_horizon=8,
    max_token_len=200,
    vocab_size=257152,
    vlm=GEMMA_2B,
    expert=GEMMA_300M,
)
LEROBOT_NAMES = dict(
    max_action_dim="action_dim",
    chunk_size="action_horizon",
    tokenizer_max_length="max_token_len",
)
LEROBOT_STATISTICS = "min max mean std q01 q10 q50 q90 q99".split()
LEROBOT_MODES = dict(ACTION="QUANTILES", STATE="QUANTILES", VISUAL="IDENTITY")
STATE_STEP = "pi05_prepare_state_tokenizer_processor_step"

# What is computed here, by file and field; several values in a tuple. Another value in a
# checkpoint is refused: it would act otherwise than it was trained to.
OPENVLA_FIELDS = {
    "n_action_bins": 256,
    "image_resize_strategy": "resize-naive",
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "arch_specifier": "no-align+fused-gelu-mlp",
    "llm_backbone_id": "llama2-7b-pure",
}
OPENVLA = dict(
    OPENVLA_FIELDS, model_type="openvla", architectures=["OpenVLAForActionPrediction"]
)
OPENVLA_FIELDS |= {
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "output_projector_states": False,
    "quantization_config": (),
    "tie_word_embeddings": False,
    # Fields of OpenVLA-OFT, which writes all actions at once and has an action head.
    "use_proprio": (),
    "proprio_dim": (),
    "use_film": (),
    "use_l1_regression": (),
    "use_diffusion": (),
    "num_images_in_input": 1,
    "num_actions_chunk": 1,
    "num_action_chunks": 1,
    "text_config.model_type": "llama",
    "text_config.hidden_act": "silu",
    "text_config.attention_bias": False,
    "text_config.mlp_bias": False,
    "text_config.rope_scaling": (),
    "text_config.rope_parameters.rope_type": "default",
    "text_config.partial_rotary_factor": 1.0,
    "text_config.sliding_window": (),
    "text_config.quantization_config": (),
    "text_config.tie_word_embeddings": False,
    "text_config.bos_token_id": 1,
    "text_config.eos_token_id": 2,
}
PREPROCESSOR_FIELDS = {
    "image_resize_strategy": "resize-naive",
    "tvf_do_letterbox": False,
    "use_fused_vision_backbone": True,
    "interpolations": ["bicubic", "bicubic"],
    "means": [PIXEL_MEAN[:3], PIXEL_MEAN[3:]],
    "stds": [PIXEL_STD[:3], PIXEL_STD[3:]],
}
OPENVLA_CLASSES = {
    "AutoConfig": "openvla/openvla-7b--configuration_prismatic.OpenVLAConfig",
    "AutoModelForVision2Seq": (
        "openvla/openvla-7b--modeling_prismatic.OpenVLAForActionPrediction"
    ),
}
OPENVLA_PROCESSORS = {
    "AutoImageProcessor": "openvla/openvla-7b--processing_prismatic.PrismaticImageProcessor",
    "AutoProcessor": "openvla/openvla-7b--processing_prismatic.PrismaticProcessor",
}
PI05_FIELDS = {
    "pi05": True,
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "n_obs_steps": 1,
    "use_relative_actions": False,
    "use_delta_joint_actions": False,
    "use_delta_joint_actions_aloha": False,
    "adapt_to_pi_aloha": False,
    "rtc_config.enabled": False,
    "quantization_config": (),
    "min_period": 4e-3,
    "max_period": 4.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "time_sampling_beta_alpha": 1.5,
    "time_sampling_beta_beta": 1.0,
    "time_sampling_scale": 0.999,
    "time_sampling_offset": 0.001,
    "normalization_mapping.ACTION": "QUANTILES",
    "normalization_mapping.VISUAL": "IDENTITY",
}
NORMALIZER = {"norm_map.ACTION": "QUANTILES", "norm_map.VISUAL": "IDENTITY", "eps": 1e-8}
LEROBOT_STEPS = {
    "rename_observations_processor": {},
    "to_batch_processor": {},
    "device_processor": {},
    "pi0_new_line_processor": {},
    "relative_actions_processor": {"enabled": False},
    "absolute_actions_processor": {"enabled": False},
    "normalizer_processor": NORMALIZER,
    "unnormalizer_processor": NORMALIZER,
    "tokenizer_processor": {"padding_side": "right", "truncation": True},
    STATE_STEP: {"include_state_in_prompt": True},
}
# PEFT's fields that change nothing here, because the tensors tell it, or that are used. All
# others must be empty, but for those of PEFT_FIELDS.
PEFT_UNUSED = """auto_mapping base_model_name_or_path exclude_modules inference_mode
layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_version
qalora_group_size r rank_pattern runtime_config target_modules task_type""".split()
PEFT_FIELDS = {
    "peft_type": "LORA",
    "bias": "none",
    "revision": "main",
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def complete_pi05(config):
    """Return a config.json of openpi or LeRobot with openpi's names and all sizes."""
    given = {LEROBOT_NAMES.get(name, name): value for name, value in config.items()}
    vision = given.get("vision", {})
    vision = {name: vision.get(name, default) for name, default in SIGLIP.items()}
    return {**PI05, **given, "vision": vision, "type": "pi05"}


def stated_settings(config):
    """Return the settings that a config.json of openpi or LeRobot states, where it does."""
    lerobot = any(name in config for name in LEROBOT_NAMES)
    settings = dict(discrete_state=config.get("discrete_state_input", lerobot))
    settings["style"] = "lerobot" if lerobot else "openpi"
    for ours, theirs in dict(chunk="n_action_steps", steps="num_inference_steps").items():
        if config.get(theirs):
            settings[ours] = config[theirs]
    return settings


# ---- the decoder: Llama, Gemma and the action expert -------------------------------------


def recompute(module, *inputs):
    """Run a module, with gradient checkpointing if load_policy asked for it.

    That costs a third more time and saves most of the memory.
    """
    if getattr(module, "checkpointing", False) and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def linears(bias=True, **shapes):
    """Return Linear layers under the names of the official files: name=(inputs, outputs)."""
    layers = {name: nn.Linear(*shape, bias=bias) for name, shape in shapes.items()}
    return nn.ModuleDict(layers)


class RMSNorm(nn.Module):
    """y = x / rms(x) * (offset + w), offset 0 in Llama and 1 in Gemma.

    With a condition c (adaRMS, in the expert): [scale, shift, gate] = W c + b and
    y = x / rms(x) * (1 + scale) + shift. The gate multiplies the sub-block that follows; it is
    None without a condition.
    """

    def __init__(self, dim, eps, offset, cond_dim):
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.dense = nn.Linear(cond_dim, 3 * dim) if cond_dim else None
        self.weight = None if cond_dim else nn.Parameter(torch.ones(dim))

    def forward(self, x, cond):
        weight = None if self.weight is None else self.offset + self.weight
        y = F.rms_norm(x.float(), x.shape[-1:], weight, self.eps)
        if cond is None:
            return y.to(x.dtype), None
        with no_autocast(x):
            scale, shift, gate = self.dense(cond).chunk(3, -1)
        return (y * (1 + scale) + shift).to(x.dtype), gate


def rotate(x, cos, sin):
    """Apply RoPE to pairs (i, i + hd/2): first half with second half, not even with odd."""
    a, b = x.chunk(2, -1)  # the products with float32 cos and sin are float32
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def gated_sum(x, y, gate):
    """Add a sub-block's output y to its input x, times a gate if there is one."""
    return x + y if gate is None else x + gate * y


class DecoderLayer(nn.Module):
    """Attention and gated MLP; num_kv_heads < num_heads: grouped queries."""

    def __init__(self, width, mlp_dim, num_heads, num_kv_heads, head_dim, act, norm):
        super().__init__()
        self.head_dim = head_dim
        self.shared = num_heads // num_kv_heads
        self.act = act
        q = num_heads * head_dim
        kv = num_kv_heads * head_dim
        self.input_layernorm = RMSNorm(width, **norm)
        self.post_attention_layernorm = RMSNorm(width, **norm)
        self.self_attn = linears(
            False,
            q_proj=(width, q),
            k_proj=(width, kv),
            v_proj=(width, kv),
            o_proj=(q, width),
        )
        self.mlp = linears(
            False,
            gate_proj=(width, mlp_dim),
            up_proj=(width, mlp_dim),
            down_proj=(mlp_dim, width),
        )

    def heads(self, x, layer):
        """(B, .., D) -> (B, heads, T, hd)."""
        y = layer(x)
        return y.view(len(y), -1, y.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)

    def attend(self, q, k, v, mask):
        """Return the attention of q (B, heads, T, hd) to k and v (B, kv heads, past + T, hd)."""
        if self.shared > 1:  # by so many query heads, one after the other
            k = k[:, :, None].expand(-1, -1, self.shared, -1, -1).flatten(1, 2)
            v = v[:, :, None].expand(-1, -1, self.shared, -1, -1).flatten(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def forward(self, x, rotary, mask, past, cond, last, write):
        h, gate = self.input_layernorm(x, cond)
        k = rotate(self.heads(h, self.self_attn.k_proj), *rotary)
        v = self.heads(h, self.self_attn.v_proj)
        if last is not None:  # nothing reads the others, but for their keys and values
            x = x[:, -last:]
            h = h[:, -last:]
            rotary = [part[:, :, -last:] for part in rotary]
            mask = mask[:, :, -last:]
        q = rotate(self.heads(h, self.self_attn.q_proj), *rotary)
        if write is not None:
            k = past[0].index_copy_(2, write, k.to(past[0].dtype))
            v = past[1].index_copy_(2, write, v.to(past[1].dtype))
        elif past is not None:
            k = torch.cat([past[0], k], 2)  # (B, kv heads, past + T, hd)
            v = torch.cat([past[1], v], 2)
        y = self.attend(q, k, v, mask)
        y = y.transpose(1, 2).reshape(*x.shape[:-1], -1)
        x = gated_sum(x, self.self_attn.o_proj(y), gate)
        h, gate = self.post_attention_layernorm(x, cond)
        y = self.act(self.mlp.gate_proj(h)) * self.mlp.up_proj(h)
        return gated_sum(x, self.mlp.down_proj(y), gate), (k, v)


class Decoder(nn.Module):
    """Pre-norm transformer over x (B, T, D), or (B, S, H, D) with conditions (B, S, 1, D).

    mask (B, 1, T or 1, past + T): True = may be attended. Keys (after RoPE) and values are
    returned and go back in as `past`. Nothing is mutated, so that training, cached sampling and
    gradient checkpointing share one path, unless `write` (T,) names the columns of `past` to
    write to; the mask hides those that are still empty. That saves a copy for every token.
    """

    def __init__(
        self, width, depth, vocab=None, *, eps, theta, offset, cond_dim=None, **layer
    ):
        super().__init__()
        norm = dict(eps=eps, offset=offset, cond_dim=cond_dim)
        self.theta = theta
        self.head_dim = layer["head_dim"]
        self.embed_tokens = nn.Embedding(vocab, width) if vocab else None
        self.layers = nn.ModuleList(
            DecoderLayer(width, norm=norm, **layer) for _ in range(depth)
        )
        self.norm = RMSNorm(width, **norm)

    def forward(self, x, positions, mask, past=None, cond=None, last=None, write=None):
        pair = torch.arange(0, self.head_dim, 2, device=x.device).float()
        frequency = 1.0 / self.theta ** (pair / self.head_dim)
        angle = positions[:, None, :, None].float() * frequency  # (B, 1, T, hd/2)
        rotary = (angle.cos(), angle.sin())
        past = past or [None] * len(self.layers)
        kv = []
        for layer, layer_past in zip(self.layers, past):
            some = last if layer is self.layers[-1] else None
            x, layer_kv = recompute(layer, x, rotary, mask, layer_past, cond, some, write)
            kv.append(layer_kv)
        return self.norm(x, cond)[0], kv


class Head(nn.Sequential):
    """Small MLP in float32 on a hidden state: the value head or the noise head."""

    def __init__(self, sizes, act, last_bias=True):
        layers = []
        for inputs, outputs in zip(sizes[:-2], sizes[1:-1]):
            layers += [nn.Linear(inputs, outputs), act()]
        super().__init__(*layers, nn.Linear(*sizes[-2:], bias=last_bias))

    def forward(self, x):
        with no_autocast(x):
            return super().forward(x.float())


# ---- the vision transformer of OpenVLA ---------------------------------------------------


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.scale_factor * x


class ViTBlock(nn.Module):
    """Attention and MLP, with exact (erf) GELU in both towers; LayerScale in DINOv2 only."""

    def __init__(self, dim, heads, hidden, layer_scale):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = linears(fc1=(dim, hidden), fc2=(hidden, dim))
        self.attn = linears(qkv=(dim, 3 * dim), proj=(dim, dim))
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x):
        qkv = self.attn.qkv(self.norm1(x)).view(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, hd)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.ls1(self.attn.proj(y))
        y = F.gelu(self.mlp.fc1(self.norm2(x)))
        return x + self.ls2(self.mlp.fc2(y))


class ViT(nn.Module):
    """timm's ViT under its own names: DINOv2 (with reg_tokens and CLS) or SigLIP.

    Features are the output of block depth - 2, without the final norm, as OpenVLA was trained.
    The last block, the norm and the attention pool are in the official files: they are kept for
    saving and never run. `implied`: options of timm that follow from reg_tokens.
    """

    def __init__(
        self, size, embed_dim, depth, num_heads, patch_size, mlp_ratio=4.0, reg_tokens=0,
        **implied,
    ):
        super().__init__()
        dim = embed_dim
        hidden = int(dim * mlp_ratio)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch_size) ** 2, dim))
        self.blocks = nn.ModuleList(
            ViTBlock(dim, num_heads, hidden, layer_scale=reg_tokens > 0)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.dino = reg_tokens > 0
        if self.dino:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, dim))
        else:
            self.attn_pool = linears(q=(dim, dim), kv=(dim, 2 * dim), proj=(dim, dim))
            self.attn_pool.norm = nn.LayerNorm(dim)
            self.attn_pool.mlp = linears(fc1=(dim, hidden), fc2=(hidden, dim))
            self.attn_pool.latent = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        patches = x.shape[1]  # x (B, T, D)
        if self.dino:  # these tokens have no position
            front = torch.cat([self.cls_token, self.reg_token], 1)
            x = torch.cat([front.expand(len(x), -1, -1), x], 1)
        for block in self.blocks[:-1]:
            x = recompute(block, x)
        return x[:, -patches:]


# ---- resizing, as the official models do it ----------------------------------------------


def resize_openvla(images, size, crop):
    """(B, H, W, 3) uint8 -> (B, size, size, 3): bicubic, or lanczos3 and the central crop."""
    if images.shape[1:3] != (size, size):
        if crop:
            images = resize_lanczos3(images, size)
        else:
            images = [Image.fromarray(x).resize((size, size), Image.BICUBIC) for x in images]
            images = np.stack(images)
    return center_crop_90(images, size) if crop else images


def lanczos3_weights(n, size):
    """Return the (size, n) matrix that resamples n pixels to size, antialiased."""
    at = (np.arange(size)[:, None] + 0.5) * n / size
    d = (np.arange(n) + 0.5 - at) / max(n / size, 1.0)
    weights = np.where(np.abs(d) < 3, np.sinc(d) * np.sinc(d / 3), 0)
    return weights / weights.sum(1, keepdims=True)


def resize_lanczos3(images, size):
    """Resize as tf.image.resize(lanczos3, antialias=True), then round."""
    y = lanczos3_weights(images.shape[1], size)
    x = lanczos3_weights(images.shape[2], size)
    resized = np.einsum("yh,bhwc,xw->byxc", y, images.astype(np.float64), x, optimize=True)
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


def crop_samples(n, size):
    """Return the left neighbours, right neighbours and weights of the samples of a crop."""
    side = np.sqrt(np.float32(0.9))
    low = (1 - side) / np.float32(2)
    step = (low + side - low) * np.float32(n - 1) / np.float32(size - 1)
    at = low * np.float32(n - 1) + np.arange(size, dtype=np.float32) * step
    left = np.floor(at).astype(int)
    return left, np.minimum(left + 1, n - 1), at - left


def center_crop_90(images, size):
    """Cut the central 90 % of the area, in the float32 steps of tf.image.crop_and_resize."""
    top, bottom, wy = crop_samples(images.shape[1], size)
    left, right, wx = crop_samples(images.shape[2], size)
    x = images * np.float32(1 / 255)
    x = x[:, :, left] + (x[:, :, right] - x[:, :, left]) * wx[:, None]
    x = x[:, top] + (x[:, bottom] - x[:, top]) * wy[:, None, None]
    return np.minimum(np.floor(np.clip(x, 0, 1) * np.float32(255.5)), 255).astype(np.uint8)


def resize_with_pad(images, size, style):
    """(B, H, W, 3) uint8 -> (B, size, size, 3) float32 in [-1, 1], aspect kept, black bars.

    "openpi" shrinks with PIL (antialiased), "lerobot" with F.interpolate (not): 0.017 apart.
    """
    ratio = max(images.shape[1] / size, images.shape[2] / size)
    height = int(images.shape[1] / ratio)
    width = int(images.shape[2] / ratio)
    if style == "lerobot":
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
        x = x.permute(0, 2, 3, 1).numpy()
    else:
        x = [Image.fromarray(image).resize((width, height), Image.BILINEAR) for image in images]
        x = np.stack(x).astype(np.float32) / 255 * 2 - 1
    top = (size - height) // 2  # an odd remainder goes to the bottom and the right
    left = (size - width) // 2
    bars = ((0, 0), (top, size - height - top), (left, size - width - left), (0, 0))
    return np.pad(x, bars, constant_values=-1.0)


# ---- LoRA: y = W x + (alpha / r) B A x, in PEFT's files ----------------------------------

# Last names of the layers, PEFT's "all-linear".
LORA_TARGETS = """q kv qkv proj fc1 fc2 fc3 q_proj k_proj v_proj o_proj out_proj gate_proj
up_proj down_proj lm_head""".split()


def lora_hook(layer, inputs, output):
    """Add the adapter's part to a layer's output."""
    low = layer.lora_A(inputs[0])
    if isinstance(layer, nn.Conv2d):
        return output + layer.lora_scale * layer.lora_B(low)
    # One product that scales and adds on its way: y + scale * low B^T.
    b = layer.lora_B.weight.T
    y = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), b, alpha=layer.lora_scale)
    return y.view_as(output)


def attach_lora(layer, rank, alpha):
    """Adapt a Linear, or a Conv2d (A: a convolution of the same shape, B: 1x1). B starts at 0."""
    outputs, inputs = layer.weight.shape[:2]
    if isinstance(layer, nn.Conv2d):
        layer.lora_A = nn.Conv2d(inputs, rank, layer.kernel_size, layer.stride, bias=False)
        layer.lora_B = nn.Conv2d(rank, outputs, 1, bias=False)
    else:
        layer.lora_A = nn.Linear(inputs, rank, bias=False)
        layer.lora_B = nn.Linear(rank, outputs, bias=False)
    nn.init.zeros_(layer.lora_B.weight)
    layer.lora_scale = alpha / rank
    layer.lora_handle = layer.register_forward_hook(lora_hook)


def lora_modules(policy):
    """Return the adapted layers, name -> layer."""
    return {name: layer for name, layer in policy.named_modules() if hasattr(layer, "lora_A")}


def add_lora(policy, rank, seed=0):
    """Attach fresh adapters to all LORA_TARGETS, unless the policy has some of that rank.

    A ~ N(0, 1 / rank^2), as in OpenVLA.
    """
    ranks = {len(layer.lora_A.weight) for layer in lora_modules(policy).values()}
    if ranks and ranks != {rank}:
        raise ValueError(
            f"lora_rank: got {rank}; need {ranks}, as saved; try --lora-rank with that, or "
            "--lora-rank 0 --load merge=true"
        )
    if ranks:
        return
    generator = torch.Generator().manual_seed(seed)
    for name, layer in list(policy.named_modules()):
        if name.split(".")[-1] in LORA_TARGETS and hasattr(layer, "weight"):
            attach_lora(layer, rank, min(rank, LORA_ALPHA))
            nn.init.normal_(layer.lora_A.weight, std=1 / rank, generator=generator)


@torch.no_grad()
def merge_lora(policy):
    """Fold the adapters into the weights, W += (alpha / r) B A, and remove them."""
    policy.base = dict(name="", sha256="")  # these weights are in no checkpoint
    for layer in lora_modules(policy).values():
        delta = layer.lora_B.weight.flatten(1) @ layer.lora_A.weight.flatten(1)
        layer.weight.copy_(layer.weight.float() + layer.lora_scale * delta.view_as(layer.weight))
        layer.lora_handle.remove()
        del layer.lora_A, layer.lora_B, layer.lora_scale, layer.lora_handle


def save_lora(policy, folder, base):
    """Write the adapters as PEFT does."""
    tensors = {}
    ranks = {}
    for name, layer in lora_modules(policy).items():
        name = policy.official_key(name)
        ranks[name] = len(layer.lora_A.weight)
        alpha = layer.lora_scale * ranks[name]
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.weight.detach().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.weight.detach().cpu()
    config = dict(
        peft_type="LORA",
        base_model_name_or_path=base,
        target_modules=list(ranks),
        r=max(ranks.values()),
        rank_pattern=ranks,
        lora_alpha=alpha,
        bias="none",
    )
    write_json(folder / "adapter_config.json", config)
    save_file(tensors, folder / "adapter_model.safetensors")


def load_lora(policy, folder):
    """Attach the adapters of a PEFT folder, all of them. Ranks are read off the tensors."""
    config = read_json(folder / "adapter_config.json")
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    layers = dict(policy.named_modules())
    weights = dict(policy.named_parameters())
    targets = {}  # tensor of the file -> our parameter
    for key, tensor in tensors.items():
        name, _, part = key.partition(".lora_")
        internal = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        internal = policy.internal_key(internal)
        if part == "A.weight" and isinstance(layers.get(internal), (nn.Linear, nn.Conv2d)):
            layer = layers[internal]
            attach_lora(layer, len(tensor), config.get("lora_alpha", 8))  # PEFT's default
            targets[f"{name}.lora_A.weight"] = layer.lora_A.weight
            targets[f"{name}.lora_B.weight"] = layer.lora_B.weight
        elif not part and internal in weights:
            targets[key] = weights[internal]
    wrong = sorted(tensors.keys() ^ targets.keys())
    for key in tensors.keys() & targets.keys():
        same = tensors[key].shape == targets[key].shape
        if ".lora_" not in key:  # PEFT stores the weight of the base, too, of an lm_head
            same = same and tensors[key].float().equal(targets[key])
        if not same:
            wrong.append(key)
    if wrong:
        raise ValueError(
            f"{folder}: got {len(wrong)} wrong tensors like {wrong[:3]}; need lora_A and lora_B "
            "of layers of this policy; try --load base=PATH with the model it belongs to"
        )
    for key, parameter in targets.items():
        parameter.data.copy_(tensors[key])


# ---- checkpoints -------------------------------------------------------------------------
# What is read is used or refused: whatever in a folder changes actions, and is not honoured
# here, stops the loading by its name. What was chosen for the user is said in policy.notes.

PASSED_ON = """tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json
preprocessor_config.json generation_config.json""".split()
WEIGHT_FILES = ".safetensors .pt .pth .bin .ckpt .h5 .msgpack .gguf .pkl".split()
STATISTICS = re.compile(r".*(stats|statistics)\w*\.json")
DUMPS = "model_state_dict/full_wei*ts.pt"  # RLinf's, which sometimes are full_weigths.pt
# Files like weights that are read elsewhere, or hold the state of somebody's training.
BESIDE = re.compile(
    r"heads\.safetensors|policy_\w+normalizer_processor\.safetensors"
    r"|(optimizer|scheduler|scaler|rng_state|random_states|training_|trainer_|resume|metadata).*"
)
# Tensors of other models, by the beginnings of their names.
FOREIGN = {
    "action_head.": "OpenVLA-OFT, whose actions are not tokens",
    "proprio_projector.": "OpenVLA-OFT, which reads the state",
    "noisy_action_projector.": "OpenVLA-OFT, whose actions are not tokens",
    "state_proj.": "pi0, not pi0.5",
    "action_time_mlp_": "pi0, not pi0.5",
}


def disguise(path):
    """Return what a file is instead of what its name says, if that is known, and a remedy."""
    if not path.is_file():
        return "no such file", "the whole download, or the folder that holds it"
    with path.open("rb") as file:
        head = file.read(200).lstrip()
    if not head:
        return "an empty file", "to download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer", "git lfs pull"
    if head.startswith(b"<"):
        return "an HTML page", "hf download, or another address"
    return None, "to download it again"


def read_file(path, what, read):
    """Return read(path); where that fails, raise a ValueError that says what the file is."""
    try:
        return read(path)
    except Exception as error:  # of several libraries; their words say what is wrong
        found, remedy = disguise(path)
        raise ValueError(f"{path}: got {found or error}; need {what}; try {remedy}") from None


def parse_json(path):
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__}")
    return value


def read_json(path, default=None):
    """Return the content of a JSON file, or the default, if there is one, without a file."""
    if default is not None and not path.exists():
        return default
    return read_file(path, "a JSON object", parse_json)


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path that takes the place of `path` at the end, or goes after an error.

    A run that is killed leaves the old file or the new one, whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file, see replacing()."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1, default=np.ndarray.tolist))


def read_safetensors(path, device="cpu"):
    read = functools.partial(load_file, device=str(device))
    return read_file(path, "safetensors", read)


def read_dump(path):
    """Return the tensors of a file of torch.save."""
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not all(torch.is_tensor(value) for value in tensors.values()):
        raise TypeError(f"entries {list(tensors)[:3]}")
    return tensors


def first(folders, name):
    """Return the path of the first file of that name, or None."""
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    return None


def first_json(folders, name):
    """Return the content of the first JSON file of that name, {} without one."""
    file = first(folders, name)
    return read_json(file) if file else {}


def weight_names(folder):
    """Return the files that hold the weights: *.safetensors, by the index if there is one."""
    index = read_json(folder / "model.safetensors.index.json", {})
    if index:
        return sorted(set(index.get("weight_map", {}).values()))
    names = [file.name for file in sorted(folder.glob("*.safetensors"))]
    dumps = [str(dump.relative_to(folder)) for dump in sorted(folder.rglob(DUMPS))]
    beside = ("adapter_model.safetensors", *filter(BESIDE.fullmatch, names))
    return [name for name in names if name not in beside] or dumps[:1]


def check_files(policy, folder, used, problems):
    """Note weights that are missing, and weights and statistics that nothing here reads."""
    names = {str(dump.relative_to(folder)) for dump in folder.rglob(DUMPS)}
    for file in folder.iterdir():
        if file.suffix in WEIGHT_FILES or STATISTICS.fullmatch(file.name):
            names.add(file.name)
    missing = [name for name in used if not (folder / name).is_file()]
    problems.need(used, folder, "no weights", "*.safetensors", "the whole download")
    problems.need(not missing, folder, f"no {missing}", "all weights", "the whole download")
    names -= {*used, policy.statistics_file}
    unread = sorted(name for name in names if not BESIDE.fullmatch(name))
    why = "which nothing here reads"
    remedy = "safetensors instead, or to move away what is no part of the policy"
    if re.search("--|action_head|proprio", " ".join(unread)):
        why = "parts of OpenVLA-OFT, whose actions are not tokens"
        remedy = OTHER
    problems.need(not unread, folder, f"{unread}, {why}", f"{used} alone", remedy)


def check_fields(file, config, fields, problems):
    """Note the fields of a JSON object that say something else than what is computed here."""
    for field, values in fields.items():
        given = config
        for key in field.split("."):
            given = given.get(key) if isinstance(given, dict) else None
        if not isinstance(values, tuple):
            values = (values,)
        need = " or ".join(str(value) for value in values) or "nothing there"
        problems.need(given in (None, *values), file, f"{field} {given}", need, OTHER)


def check_config(policy, folders, problems):
    """Note what a checkpoint's JSON files demand and is not done here."""
    size = policy.image_size
    config = policy.config
    if policy.kind == "openvla":
        text = {**LLAMA, **config.get("text_config", {})}
        heads = text["num_attention_heads"]
        fields = dict(OPENVLA_FIELDS, image_sizes=[size, size])
        fields["text_config.num_key_value_heads"] = heads
        fields["text_config.head_dim"] = text["hidden_size"] // heads
        name = "preprocessor_config.json"
        images = dict(PREPROCESSOR_FIELDS, input_sizes=[[3, size, size]] * 2)
        check_fields(name, first_json(folders, name), images, problems)
    else:
        fields = dict(PI05_FIELDS, image_resolution=[size, size])
        fields["output_features.action.shape"] = ([ACTION_DIM], [policy.action_dim])
        if policy.reads_state:
            fields["normalization_mapping.STATE"] = "QUANTILES"
        for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
            check_steps(policy, name, first_json(folders, name), problems)
    check_fields("config.json", config, fields, problems)


def check_adapter(policy, adapter, folder, problems):
    """Note what is wrong with a PEFT folder for a base folder; None: there are no adapters."""
    for file in folder.glob("*/adapter_config.json"):
        if file.parent.resolve() != adapter:
            policy.notes.append(f"adapter: none of {file.parent}; --load adapter=PATH takes it")
    if adapter is None:
        return
    policy.notes.append(f"adapter: {adapter} on the base {folder}")
    trained_on = read_json(adapter / "policy.json", {}).get("base") or policy.base
    problems.need(
        trained_on["sha256"] == policy.base["sha256"], f"base {folder}",
        "other weights than those the adapters were trained on", trained_on,
        "--load base=PATH with the right model",
    )
    check_files(policy, adapter, ["adapter_model.safetensors"], problems)
    config = read_json(adapter / "adapter_config.json")
    fields = {name: () for name in config if config[name] and name not in PEFT_UNUSED}
    fields.update(PEFT_FIELDS)
    alpha = config.get("lora_alpha", 8)
    fine = isinstance(alpha, (int, float))
    problems.need(fine, "adapter_config.json", f"lora_alpha {alpha}", "a number", OTHER)
    check_fields(adapter / "adapter_config.json", config, fields, problems)


def check_steps(policy, file, processor, problems):
    """Note the steps of one of LeRobot's processors that are not done here."""
    for step in processor.get("steps") or []:
        name = step.get("registry_name") or step.get("class")
        known = name in LEROBOT_STEPS
        problems.need(known, file, f"step {name}", f"one of {list(LEROBOT_STEPS)}", OTHER)
        fields = dict(LEROBOT_STEPS.get(name, {}), max_length=policy.config["max_token_len"])
        if policy.reads_state:
            fields["norm_map.STATE"] = "QUANTILES"
        check_fields(f"{file}: {name}", step.get("config", {}), fields, problems)


def read_tensors(policy, folder, names, device="cpu", trainable=None):
    """Return all tensors of some files of a folder under our names.

    File after file goes straight to the device, and each tensor into the type it is stored in.
    """
    tensors = {}
    for name in names:
        if name.endswith(".safetensors"):
            found = read_safetensors(folder / name, device)
        else:
            found = read_file(folder / name, "a dict of tensors", read_dump)
        twice = sorted(tensors.keys() & {policy.internal_key(key) for key in found})
        if twice:
            raise ValueError(
                f"{folder}: got {twice[0]} in two of {names}; need each tensor once; "
                "try to move one of the files away"
            )
        for key in list(found):
            value = found.pop(key)
            key = policy.internal_key(key)
            tensors[key] = value
            if value.is_floating_point():
                tensors[key] = value.to(device, storage_dtype(policy, key, trainable))
    return tensors


def storage_dtype(policy, name, trainable):
    """Return the type in which a weight is stored.

    That is float32, but with bf16 for what is not `trainable`, provided that it is an embedding,
    or that autocast would round it wherever it is used. trainable: names, or None for all.
    """
    if name == "lm_head.weight" and policy.tied_embedding:  # another name of the embedding
        name = policy.embedding
    if not policy.bf16 or trainable is None or name in trainable:
        return torch.float32
    layers = dict(policy.named_modules())
    layer = layers.get(name.rpartition(".")[0])
    rounded = name == policy.embedding or isinstance(layer, (nn.Linear, nn.Conv2d))
    if rounded and not re.search(policy.float32_layers, name):
        return torch.bfloat16
    return torch.float32


def load_tensors(policy, tensors):
    """Load the tensors of read_tensors, strictly: one error lists all that are missing or wrong.

    Returns the tensors of the value and noise heads of somebody's RL, if there are some.
    """
    problems = Problems()
    for start, model in FOREIGN.items():
        found = list(starting(tensors, start))
        problems.need(not found, "weights", f"{found[:2]} of {model}", policy.kind, OTHER)
    real = {key: value for key, value in tensors.items() if not value.is_meta}
    broken = [key for key, value in real.items() if not value.isfinite().all()]
    problems.need(not broken, "weights", f"nan or inf in {broken[:2]}", "finite numbers", OTHER)
    whole = [key for key, value in tensors.items() if not value.is_floating_point()]
    problems.need(not whole, "weights", f"integers in {whole[:2]}", "floating point", OTHER)
    problems.stop()
    if policy.tied_embedding and "lm_head.weight" in tensors:
        # If both are stored, embed_tokens is the right one and lm_head a decoy.
        lm_head = tensors.pop("lm_head.weight")
        tensors.setdefault("language_model.embed_tokens.weight", lm_head)
    tensors.pop("gemma_expert.lm_head.weight", None)  # in openpi's files; nothing reads it
    heads = starting(tensors, HEADS)
    state = starting(policy.state_dict(), HEADS)
    for key, value in tensors.items():
        if key not in heads:
            state[key] = value
    try:
        policy.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"weights: got {error}; need those that config.json describes; "
            "try the whole download, and its own config.json"
        )
    return heads


def starting(tensors, start):
    """Return the tensors whose names start so."""
    return {key: value for key, value in tensors.items() if key.startswith(start)}


def take_heads(policy, heads):
    """Copy value and noise head of a checkpoint, where they have our names and shapes."""
    # RLinf's value head for OpenVLA is this one, and reads the same hidden state.
    if policy.kind == "openvla":
        heads = {key.replace("value_head.mlp.", "value_head."): heads[key] for key in heads}
    for start in HEADS:
        own = starting(policy.state_dict(), start)
        given = starting(heads, start)
        shapes = {key: value.shape for key, value in given.items()}
        if shapes == {key: value.shape for key, value in own.items()}:
            policy.load_state_dict(given, strict=False)
        elif own:
            why = "the checkpoint's has other tensors" if given else "the checkpoint has none"
            policy.notes.append(f"{start[:-1]}: starts anew, because {why}")


def range_fault(numbers, size=ACTION_DIM):
    """Say what is wrong with {"q01": .., "q99": ..} of actions, or of a state (size None)."""
    fine = isinstance(numbers, dict)
    if not fine or numbers.get("q01") is None or numbers.get("q99") is None:
        return f"no q01 and q99, but {list(numbers or [])}"
    try:
        low, high = np.array([numbers["q01"], numbers["q99"]], float)
        count = len(low)
    except (TypeError, ValueError):
        return "q01 and q99 that are not two lists of equally many numbers"
    mask = numbers.get("mask")
    if mask is not None and (not isinstance(mask, list) or len(mask) != count):
        return f"{count} numbers, but the mask {mask}"
    if not np.isfinite(high - low).all():
        return "numbers that are not finite"
    if (low > high).any():
        return f"q01 above q99 in dimensions {np.flatnonzero(low > high).tolist()}"
    beyond = [*low[ACTION_DIM:], *high[ACTION_DIM:]]
    if size and (count < size or np.abs(beyond).sum() > PADDING):
        return f"{count} numbers"
    return None


def load_statistics(policy, folders, asked):
    """Take the first file that has statistics, or that has the data set that was asked for."""
    found = {}
    names = []
    for folder in folders:
        for file, stats in policy.read_statistics(folder).items():
            found[f"{file} in {folder}"] = stats
            names += [name for name in stats if name not in names]
    problems = Problems()
    known = asked in (None, "none", *names)
    problems.need(known, "unnorm_key", asked, f"one of {names}", "--load unnorm_key=NAME")
    problems.stop()
    files = [file for file, stats in found.items() if asked in (None, *stats) and stats]
    if not files:
        policy.settings["unnorm_key"] = None
        policy.notes.append(
            "statistics: none; sft_warmstart.py --statistics data takes the demonstrations'"
        )
        return
    policy.statistics = found[files[0]]
    if policy.settings["unnorm_key"] not in policy.statistics:
        policy.settings["unnorm_key"] = None  # chosen for the base of an adapter
    key = policy.settings["unnorm_key"]
    chosen = [key] if key else list(policy.statistics)
    for name in chosen:
        stats = policy.statistics[name]
        fault = range_fault(stats.get("action"))
        if policy.reads_state and "state" in stats:
            fault = fault or range_fault(stats["state"], None)
        problems.need(
            not fault,
            f"statistics {name}, {files[0]}",
            fault,
            "7 end-effector deltas with q01 <= q99",
            f"--load unnorm_key=NAME of {names}, or Stage I with --statistics data",
        )
    if len(problems) == len(chosen):
        problems.stop()
    policy.notes.append(f"statistics: {' or '.join(chosen)}, {files[0]}")
    if len(chosen) > 1:
        policy.notes.append("statistics: none chosen yet; --load unnorm_key=NAME chooses")


def load_tokenizer(policy, folders, path):
    """Read a tokenizer.json: that of `path`, a file or a folder, or the first of the folders."""
    path = Path(path) if path else first(folders, "tokenizer.json")
    if path is None:
        policy.notes.append("tokenizer: none; --load tokenizer=PATH gives one")
        return
    if path.is_dir():
        path = path / "tokenizer.json"
    policy.tokenizer = read_file(path, "a tokenizer", lambda path: Tokenizer.from_file(str(path)))
    size = policy.tokenizer.get_vocab_size()
    least = getattr(policy, "vocab", 0)  # OpenVLA's actions are the last of these
    most = len(policy.state_dict()[policy.embedding])
    if not least <= size <= most:
        raise ValueError(
            f"{path}: got {size} tokens; need {least} to {most}, as the weights have; try the "
            "tokenizer.json of this checkpoint"
        )
    policy.tokenizer.no_padding()
    policy.tokenizer.no_truncation()
    policy.notes.append(f"tokenizer: {path}")


def official_tensors(policy):
    """Return the weights under official names, without heads and adapters."""
    tensors = {}
    for name, tensor in policy.state_dict().items():
        if ".lora_" not in name and not name.startswith(HEADS):
            tensors[policy.official_key(name)] = tensor
    if policy.tied_embedding:
        # openpi's files hold it as lm_head, and for the expert another that nothing reads.
        embedding = tensors.pop(policy.official_key("language_model.embed_tokens.weight"))
        shape = (len(embedding), policy.action_in_proj.out_features)
        unused = torch.zeros(shape, dtype=torch.bfloat16, device=embedding.device)
        tensors["paligemma_with_expert.paligemma.lm_head.weight"] = embedding
        tensors["paligemma_with_expert.gemma_expert.lm_head.weight"] = unused
    return tensors


README_OF_ADAPTERS = """# Adapters, not a whole policy

LoRA adapters in PEFT's format of the base model {name} (sha256 of samples of it: {sha256}).
For loaders that do not read PEFT, merge them: `python policies.py --export THIS_FOLDER NEW_FOLDER`
"""


def save_policy(policy, folder):
    """Write policy.json, heads, statistics, tokenizer, and the official weights and files.

    A policy with adapters becomes a PEFT folder instead, which names its base: the adapters, but
    neither weights nor config.json, so that nobody can take it for the whole model.
    """
    adapted = bool(lora_modules(policy))
    if adapted and not policy.base["name"]:
        raise ValueError(
            "save: got adapters on weights that are in no checkpoint; need their base; try "
            "policies.merge_lora(policy), or to save the policy before add_lora, and load that"
        )
    files = policy.statistics_files()
    files["policy.json"] = dict(settings=policy.settings, deployment=policy.deployment)
    files["tokenizer_config.json"] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        **policy.special_tokens,
        **policy.passed_on.get("tokenizer_config.json", {}),
    }
    weights = {"heads.safetensors": starting(policy.state_dict(), HEADS)}
    if adapted:
        files["policy.json"]["base"] = policy.base
        save_lora(policy, folder, base=policy.base["name"])
        (folder / "README.md").write_text(README_OF_ADAPTERS.format(**policy.base))
    else:
        files = {**policy.passed_on, **files, **policy.model_files()}
        weights["model.safetensors"] = official_tensors(policy)
        weights.update(policy.tensor_files())
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write_json(folder / name, content)
    for name, tensors in weights.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if policy.tokenizer:
        if policy.tokenizer.post_processor is None:  # others have it put BOS in front
            bos = policy.special_tokens["bos_token"]
            tokens = [(bos, policy.bos)]
            front = TemplateProcessing(single=f"{bos} $A", special_tokens=tokens)
            policy.tokenizer.post_processor = front
        policy.tokenizer.save(str(folder / "tokenizer.json"))


@torch.no_grad()
def init_weights(policy, seed, only="", device="cpu", trainable=None):
    """Make real, random tensors of the parameters whose names start with `only`.

    Matrices ~ N(0, 1 / inputs), heads Kaiming, biases 0, norms 1. adaRMS is 0: the expert starts
    as the identity. init_std has the exceptions: outputs 0.02, so that losses start at their
    theoretical value; position and token embeddings 1, like patch embeddings, so that they matter
    from the first step (Gemma rescales token embeddings itself).
    """
    generator = torch.Generator(device).manual_seed(seed)
    for key, meta in list(policy.named_parameters()):
        if not key.startswith(only):
            continue
        p = torch.zeros(meta.shape, device=device)
        if meta.ndim > 1 and ".dense." not in key:
            std = meta[0].numel() ** -0.5
            if key.startswith(HEADS):
                std = (len(meta) / 2) ** -0.5
            for suffix, exception in policy.init_std.items():
                if key.endswith(suffix):
                    std = exception
            p.normal_(std=std, generator=generator)
        elif not key.endswith("bias") and not key.startswith(policy.zero_norms):
            p.fill_(0.0 if ".dense." in key else 1.0)
        p = nn.Parameter(p.to(storage_dtype(policy, key, trainable)))
        module, _, name = key.rpartition(".")
        setattr(policy.get_submodule(module), name, p)


def find_folder(name):
    """Return the folder of a bundled name, a folder, a run (its RUN/policy), or a hub id."""
    folder = BUNDLED.get(name, Path(name))
    inside = folder / "policy"
    if inside.is_dir() and not (folder / "config.json").exists():
        return inside
    if folder.is_dir():
        return folder
    known = f"one of {list(BUNDLED)}, a folder, or a hub id like openvla/openvla-7b"
    if name in BUNDLED or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise ValueError(f"policy {name}: got no {folder}; need {known}; try the spelling")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.h5", "*.msgpack"]))
    except Exception as error:  # no repository, no network, or no permission: it says which
        raise ValueError(f"policy {name}: got {error}; need {known}; try a local copy")


def sample_hash(folder, names):
    """Return a hash of the sizes of some files and of 64 samples of 1 MB of each."""
    sha = hashlib.sha256()
    for name in names:
        if not (folder / name).is_file():
            continue  # which check_files says
        size = (folder / name).stat().st_size
        sha.update(str(size).encode())
        with (folder / name).open("rb") as file:
            for start in range(0, size, max(1 << 20, size // 64)):
                file.seek(start)
                sha.update(file.read(1 << 20))
    return sha.hexdigest()


def find_base(name, base=None):
    """Return the folder of the base model, that of the adapters if name is one, or None, and
    the name to give the base in a checkpoint: a hub id, a bundled name or an absolute path.

    base: where the base model is, if not where adapter_config.json says
    """
    folder = find_folder(name)
    file = folder / "adapter_config.json"
    problems = Problems()
    if not file.exists():
        problems.need(not base, "base", base, f"none, as {folder} has no {file.name}", "without")
        problems.stop()
        return folder, None, full_name(name)
    whole = weight_names(folder)
    problems.need(not whole, file, f"{whole} beside it", "one of them", "to move one away")
    problems.stop()
    if base:
        return find_folder(base), folder, full_name(base)
    base = str(read_json(file).get("base_model_name_or_path"))
    if (folder / base).is_dir():
        base = folder / base
    try:
        return find_folder(base), folder, full_name(base)
    except ValueError as error:
        raise ValueError(
            f"{file}: got the base {base} ({error}); need the model it was trained on; "
            "try --load base=PATH"
        )


def full_name(name):
    """Return a name that means the same in every folder."""
    if name in BUNDLED:
        return name
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def find_adapter(folder, paths):
    """Return the one folder of adapters for a base, or None."""
    if read_json(folder / "policy.json", {}).get("lora"):
        paths = (*paths, folder / "lora")
    found = [find_folder(path).resolve() for path in paths if path]
    if len(set(found)) > 1:
        raise ValueError(
            f"adapters: got {[str(path) for path in found]}; need one; try to merge one first, "
            "with sft_warmstart.py --steps 0 --lora-rank 0 --load merge=true"
        )
    return found[0] if found else None


def read_config(folders):
    """Return the content of the first config.json."""
    file = first(folders, "config.json")
    if file is None and weight_names(folders[-1]):
        raise ValueError(
            f"{folders[-1]}/config.json: got no such file; need what the weights do not say; try "
            "that of the model they were trained from, or for pi0.5 of openpi, which writes none, "
            'a file with {"type": "pi05", "action_horizon": H}, H of the training config, and '
            '"discrete_state_input": true where that says so'
        )
    return read_json(file or folders[-1] / "config.json")


def kind_of(config):
    """Return the kind of policy that a config.json describes; openpi's does not name it."""
    default = "pi05" if "action_horizon" in config else None
    return config.get("model_type") or config.get("type") or default


def build(config, **settings):
    """Return a policy on the meta device: shapes only."""
    kind = kind_of(config)
    classes = dict(openvla=OpenVLA, pi05=Pi05)
    if kind not in classes:
        raise ValueError(f"config.json: got type {kind}; need openvla or pi05; try {OTHER}")
    try:
        with torch.device("meta"):
            return classes[kind](config, **settings)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"config.json or settings: got {type(error).__name__}, {error}; need what {kind} "
            f"has; try the whole download, or {OTHER}"
        ) from error


def load_policy(
    name, device="cpu", dtype="float32", *, base=None, adapter=None, merge=False, lora_rank=0,
    freeze="none", gradient_checkpointing=False, tokenizer=None, seed=0, **settings
):
    """Return a policy from a bundled name, a folder or a hub id; errors are ValueErrors.

    dtype      "float32", or "bf16": autocast, and what is frozen is stored in bf16
    base       base model of a `name` that is a PEFT folder, if not where that says
    adapter    PEFT folder; a `name` that is one brings its base model along. Adapters train and
               the base is frozen; merge=True folds them into the weights
    lora_rank  > 0: fresh adapters, unless the checkpoint has some
    freeze     "none", "vision" (features may be cached), "vlm" (only expert and heads train),
               "all" (for acting: with bf16 it takes half the memory)
    tokenizer  path of a tokenizer.json, for checkpoints that come without one
    seed       of the heads, where the checkpoint has none, and of fresh adapters
    settings   see OpenVLA and Pi05; those saved with the policy are the defaults. unnorm_key
               "none" leaves out the statistics, for training with others

    Files of an adapter's folder count before those of its base. policy.notes tells in a few
    lines what was chosen.
    """
    if dtype not in ("float32", "bf16"):
        raise ValueError(f"dtype: got {dtype}; need float32 or bf16; try --dtype float32")
    folder, own_adapter, base = find_base(name, base)
    adapter = find_adapter(folder, (adapter, own_adapter))
    folders = [adapter, folder] if adapter else [folder]
    config = read_config(folders)
    policy = build(config, **{**saved_settings(folders), **settings})
    weights = weight_names(folder)
    policy.base = dict(name=base, sha256=sample_hash(folder, weights))
    problems = Problems()
    check_config(policy, folders, problems)
    check_files(policy, folder, weights, problems)
    check_adapter(policy, adapter, folder, problems)
    problems.stop()
    policy.deployment = first_json(folders, "policy.json").get("deployment", {})
    load_statistics(policy, folders, settings.get("unnorm_key"))
    load_tokenizer(policy, folders, tokenizer)
    note_inputs(policy)
    policy.bf16 = dtype == "bf16"
    if adapter and merge and lora_rank:
        raise ValueError(
            f"merge, lora_rank: got true and {lora_rank}; need one: new adapters need a base that "
            "is in a checkpoint; try sft_warmstart.py --steps 0 --lora-rank 0 --load merge=true, "
            "then train what that saves"
        )
    adapted = not merge and (adapter is not None or lora_rank > 0)
    trainable = trainable_names(policy, freeze, adapted)
    heads = load_tensors(policy, read_tensors(policy, folder, weights, device, trainable))
    init_weights(policy, seed, only=HEADS)
    file = first(folders, "heads.safetensors")
    take_heads(policy, read_safetensors(file) if file else heads)
    if first(folders, "training_state.pt"):
        policy.notes.append("value_head: that of RL4VLA in training_state.pt is not read")
    policy.passed_on = files_passed_on(folders)
    if adapter:
        load_lora(policy, adapter)
    policy.to(device)
    if merge:
        merge_lora(policy)
    if lora_rank:
        add_lora(policy, lora_rank, seed)
    return prepare(policy, freeze, gradient_checkpointing).to(device)


def files_passed_on(folders):
    """Return the files that a saved policy needs for others' loaders, name -> content."""
    names = [*PASSED_ON]
    for folder in folders:
        names += sorted(file.name for file in folder.glob("*.py"))  # classes for AutoModel
    files = {}
    for file in filter(None, [first(folders, name) for name in names]):
        files[file.name] = read_json(file) if file.suffix == ".json" else file.read_bytes()
    return files


def saved_settings(folders):
    """Return the settings that the files of the folders hold, the first folder's first."""
    saved = {}
    for folder in reversed(folders):
        steps = read_json(folder / "policy_preprocessor.json", {}).get("steps")
        if steps:  # LeRobot writes the state into the prompt, or does not
            names = [step.get("registry_name") for step in steps]
            saved["discrete_state"] = STATE_STEP in names
        saved.update(read_json(folder / "policy.json", {}).get("settings", {}))
    return saved


def note_inputs(policy):
    """Note what pi0.5 was made to read and to execute."""
    if policy.kind != "pi05":
        return
    style = policy.settings["style"]
    state = "without the state"
    if policy.reads_state:
        state = "with the numbers of the state (LeRobot up to 0.4.4 padded them to 32)"
    policy.notes.append(f"prompt: {state}, style {style}")
    policy.notes.append(
        f"actions: {policy.chunk} of {policy.horizon} are executed, after {policy.steps} steps"
    )
    cameras = policy.camera_names()
    if cameras:
        policy.deployment["cameras"] = cameras
        policy.notes.append(f"cameras: {cameras}, in this order; those not given are missing")


def parse_load(pairs):
    """Turn ["key=value", ..] of --load, or None, into keyword options of load_policy.

    Values have the types of the defaults in SETTINGS; two numbers are written 0.08,0.16.
    Raises one ValueError that lists all wrong pairs.
    """
    kinds = dict(base=str, adapter=str, tokenizer=str, merge=bool)
    for key, default in {**Pi05.SETTINGS, **OpenVLA.SETTINGS}.items():
        kinds[key] = type(default)
    kinds.update(unnorm_key=str, horizon=int)  # their defaults are None
    known = ", ".join(f"{key}={kind.__name__}" for key, kind in kinds.items())
    problems = Problems()
    options = {}
    for pair in pairs or ():
        key, _, text = pair.partition("=")
        value = parse_value(text, kinds.get(key))
        fine = value is not None and key not in options
        remedy = "--load temperature=0.8 discrete_state=true noise_std=0.08,0.16"
        problems.need(fine, "--load", pair, f"some of {known}, once each", remedy)
        options[key] = value
    problems.stop()
    return options


def parse_value(text, kind):
    """Return the value of that type, or None if the text is none of it."""
    if not text or kind is None:
        return None
    if kind is bool:
        return dict(true=True, false=False).get(text.lower())
    try:
        if kind is tuple:
            low, high = text.split(",")
            return float(low), float(high)
        return kind(text)
    except ValueError:
        return None


def check_texts(policy, texts):
    """Warn of instructions that a policy's tokenizer does not know, or that its prompt cuts off.

    Raises ValueError if two different tasks become the same tokens. A policy without tokenizer
    and row(text) is left alone.
    """
    tokenizer = getattr(policy, "tokenizer", None)
    if tokenizer is None or not hasattr(policy, "row"):
        return
    limit = policy.config.get("max_token_len")
    shares = {}  # of the tokens that are unknown
    cut = []
    tasks = {}  # token ids -> task
    problems = Problems()
    for text in texts:
        ids = policy.encode(text)
        unknown = ids.count(tokenizer.token_to_id("<unk>"))
        if unknown:
            shares[text] = unknown / len(ids)
        row = policy.row(text)
        if limit and len(row) > limit:
            cut.append(text)
        task = " ".join(text.lower().replace("_", " ").split())
        other = tasks.setdefault(tuple(row[:limit]), task)
        problems.need(
            task == other, "instructions", f"{text!r}, the same tokens as {other!r}",
            "different tokens for different tasks", "English words, or --load tokenizer=PATH"
        )
    problems.stop()
    if shares:
        text = max(shares, key=shares.get)
        warnings.warn(
            f"{len(shares)} of {len(texts)} instructions have words that the tokenizer does not "
            f"know: of {text!r}, {shares[text]:.0%} of the tokens are <unk>"
        )
    if cut:
        count = f"{len(cut)} of {len(texts)}"
        warnings.warn(f"{count} prompts are cut off at {limit} tokens, such as {cut[0]!r}")


def prepare(policy, freeze="none", gradient_checkpointing=False):
    """Say what trains, and how; return the policy. See load_policy."""
    trainable = trainable_names(policy, freeze, bool(lora_modules(policy)))
    for name, p in policy.named_parameters():
        p.requires_grad_(name in trainable)
    set_checkpointing(policy, gradient_checkpointing)
    return policy.eval()  # there is no dropout; OpenVLA crops


def set_checkpointing(policy, on):
    """Switch gradient checkpointing on or off, see recompute()."""
    for module in policy.modules():
        module.checkpointing = on


def trainable_names(policy, freeze, adapted):
    """Return the parameters that train: the adapters, which may still be missing, or else
    everything, minus what `freeze` names; the heads always.
    """
    frozen = dict(none=(), vision=policy.vision, vlm=policy.vlm, all=("",))
    if freeze not in frozen:
        raise ValueError(f"freeze: got {freeze}; need one of {list(frozen)}; try --freeze vision")
    heads = set()
    trainable = set()
    for name, _ in policy.named_parameters():
        adapter = ".lora_" in name
        if name.startswith(HEADS):
            heads.add(name)
        elif (adapter or not adapted) and not name.startswith(frozen[freeze]):
            trainable.add(name)
    nothing = not trainable and (not adapted or lora_modules(policy))
    if nothing and freeze != "all":
        raise ValueError(
            f"freeze: got {freeze}, which leaves {policy.kind} nothing to train but the heads; "
            "need more than that; try --freeze vision or none"
        )
    return trainable | heads


# ---- tiny policies -----------------------------------------------------------------------

# A new word changes the size of the embedding, so that the bundled policies need re-training.
WORDS = """pick up the object on table and place it into white tray put plate bowl push cube to
open close drawer red green blue yellow orange purple pink brown black gray a of in from left
right top bottom middle block can banana carrot bottle cup box ball spoon mug sponge apple lemon
pepper bread toy goal target move forward away front one thing dish drop round slide pull shut
out it must be handle grey white belongs robot shove""".split()
SPECIAL = dict(openvla=["<unk>", "<s>", "</s>"], pi05=["<pad>", "<eos>", "<bos>", "<unk>"])
TINY_GEMMA = dict(depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32)
TINY = dict(
    openvla=dict(
        model_type="openvla",
        image_sizes=[64, 64],
        pad_to_multiple_of=64,
        tiny_timm_kwargs=dict(
            featurizer=dict(embed_dim=32, depth=2, num_heads=1, patch_size=16, reg_tokens=1),
            fused_featurizer=dict(embed_dim=128, depth=3, num_heads=4, patch_size=16),
        ),
        text_config=dict(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
        ),
    ),
    pi05=dict(
        type="pi05",
        action_dim=8,
        action_horizon=8,
        vision=dict(
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=512,
            image_size=64,
            patch_size=16,
        ),
        vlm=dict(width=128, **TINY_GEMMA),
        expert=dict(width=96, **TINY_GEMMA),
    ),
)


def tiny_tokenizer(kind, size=0):
    """Return a small tokenizer of the official structure, filled up to `size` pieces.

    Special pieces come first, "▁" stands for a space, the fixed parts of a prompt are one piece
    each, then come common words, and single characters for all others. OpenVLA's last 256 pieces
    are the actions.
    """
    pieces = ["▁", "▁In:▁What▁action▁should▁the▁robot▁take▁to", "?\nOut:", "\n"]
    pieces += ["Task:▁", ",▁State:▁", ";\nAction:▁", *("▁" + word for word in WORDS), *WORDS]
    pieces += [chr(i) for i in range(33, 127)]
    pieces = SPECIAL[kind] + list(dict.fromkeys(pieces))
    steps = [normalizers.Replace(" ", "▁")]
    actions = [chr(0xE000 + i) for i in range(256)] if kind == "openvla" else []
    pieces += [f"<unused{i}>" for i in range(size - len(pieces) - len(actions))] + actions
    if kind == "openvla":
        # Llama starts with a space, Gemma does not.
        steps.insert(0, normalizers.Prepend("▁"))
    scored = [(piece, -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, pieces.index("<unk>"), False))
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def make_tiny(name, seed=0, **settings):
    """Return a small policy of the official class, with random weights and made-up statistics."""
    if name not in TINY:
        raise ValueError(f"make_tiny: got {name}; need one of {list(TINY)}; try openvla")
    config = json.loads(json.dumps(TINY[name]))  # a deep copy
    tokenizer = tiny_tokenizer(name)
    text = config.get("text_config", config)
    text["vocab_size"] = tokenizer.get_vocab_size() + config.get("pad_to_multiple_of", 0)
    return randomised(build(config, **settings), tokenizer, seed)


def make_official(name, device="cpu", dtype="float32", adapted=False, freeze="none", seed=0):
    """Return a policy of the official size with random weights, for measuring.

    adapted: whether adapters will train, so that all other weights are frozen; see load_policy.
    """
    config = dict(model_type="openvla", text_config=dict(vocab_size=32064))
    if name == "pi05":
        config = dict(type="pi05")
    policy = build(config)
    policy.bf16 = dtype == "bf16"
    trainable = trainable_names(policy, freeze, adapted)
    vocab = getattr(policy, "vocab", PI05["vocab_size"])
    return randomised(policy, tiny_tokenizer(name, vocab), seed, device, trainable)


def randomised(policy, tokenizer, seed, device="cpu", trainable=None):
    """Give a policy on the meta device random weights, a tokenizer and made-up statistics."""
    init_weights(policy, seed, device=device, trainable=trainable)
    policy.tokenizer = tokenizer
    reach = np.array([0.05] * 3 + [0.25] * 3 + [1.0])  # [m, rad, gripper]
    policy.set_statistics("placeholder", {"action": {"q01": -reach, "q99": reach}})
    return policy.eval()


# ---- measuring ---------------------------------------------------------------------------

WORK = {  # what is measured: name -> expression
    "act": "policy.act(**seen)",
    "evaluate + backward": "policy.evaluate(**seen, trace=trace)[0].sum().backward()",
    "bc_loss + backward": "policy.bc_loss(**seen, actions=actions).backward()",
}


def names_of_work(policy, batch):
    """Return the names that the expressions of WORK use: random inputs of a policy."""
    size = (batch, policy.image_size, policy.image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    texts = ["pick up the carrot", "open the drawer"] * batch
    seen = dict(images=torch.from_numpy(images), instructions=texts[:batch])
    trace = policy.act(**seen).trace
    actions = torch.zeros(batch, policy.horizon, ACTION_DIM)
    return dict(policy=policy, seen=seen, trace=trace, actions=actions)


def best_seconds(work, names, repeat=4):
    """Return the seconds that an expression takes, the best of some runs after one to warm up."""
    wait = "; torch.cuda.synchronize()" if torch.cuda.is_available() else ""
    timer = timeit.Timer(work + wait, globals=dict(names, torch=torch))
    timer.timeit(1)
    return min(timer.repeat(repeat, number=1))


def matmul_limit(device, dtype):
    """Return the operations per second of a large product of matrices."""
    size = 8192 if device.type == "cuda" else 1024
    number = torch.bfloat16 if dtype == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device).to(number)
    return 2 * size**3 / best_seconds("a @ b", dict(a=a, b=b), repeat=20)


def operations(work, names):
    """Return how many operations the matrix products of an expression have."""
    with FlopCounterMode(display=False) as counter:
        eval(work, dict(names))
    return counter.get_total_flops()


def measure(policy, batch, limit, checkpointing=False):
    """Yield (name, samples per second, share of the limit, peak memory [GB]) of all WORK.

    The share counts the operations of the result, not what gradient checkpointing computes again.
    The memory, of GPUs only, includes Adam's moments, as in training.
    """
    names = names_of_work(policy, batch)
    few = names_of_work(policy, 2)
    trained = [p for p in policy.parameters() if p.requires_grad]
    moments = [torch.zeros_like(p) for p in trained + trained]
    cuda = policy.device.type == "cuda"
    for name, work in WORK.items():
        set_checkpointing(policy, False)
        each = operations(work, few) / 2
        set_checkpointing(policy, checkpointing)
        policy.zero_grad()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        speed = batch / best_seconds(work, names)
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
        policy.zero_grad()
        yield name, speed, speed * each / limit, peak
    del moments


def speed_of_llama(policy, batch, rank, checkpointing, length=296):
    """Return how many times as fast OpenVLA's decoder trains as transformers' Llama.

    Both have the same shape and adapters of that rank, and read the same embeddings.
    """
    from transformers import LlamaConfig
    from transformers import LlamaModel

    ours = policy.language_model.model
    mlp = ours.layers[0].mlp.gate_proj
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=mlp.in_features,
        intermediate_size=mlp.out_features,
        num_hidden_layers=len(ours.layers),
        num_attention_heads=mlp.in_features // ours.head_dim,
        use_cache=False,
    )
    with policy.device:
        theirs = LlamaModel(config).to(mlp.weight.dtype)
    if rank:
        theirs.requires_grad_(False)
        add_lora(theirs, rank)
        theirs.to(policy.device)
    if checkpointing:
        theirs.gradient_checkpointing_enable(dict(use_reentrant=False))
        theirs.train()
    x = torch.randn(batch, length, mlp.in_features, device=policy.device).to(mlp.weight.dtype)
    positions = torch.arange(length, device=policy.device).expand(batch, -1)
    mask = torch.ones(length, length, dtype=torch.bool, device=policy.device).tril()
    names = dict(ours=ours, theirs=theirs, x=x, positions=positions)
    names["mask"] = mask.expand(batch, 1, -1, -1)
    seconds = []
    for hidden in (
        "theirs(inputs_embeds=x, position_ids=positions).last_hidden_state",
        "ours(x, positions, mask)[0]",
    ):
        with policy.autocast():
            seconds.append(best_seconds(hidden + ".float().sum().backward()", names))
    policy.zero_grad()
    return seconds[0] / seconds[1]


def report(name, policy, args):
    """Print a table of what a policy needs."""
    limit = matmul_limit(args.device, args.dtype)
    count = sum(p.numel() for p in policy.parameters()) / 1e6
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad) / 1e6
    size = sum(p.numel() * p.element_size() for p in policy.parameters()) / 1e9
    print(f"{name}: {count:,.1f} M parameters, {trained:,.1f} M train, {size:.2f} GB")
    print(f"one large matrix product: {limit / 1e12:.3g} TFLOP/s ({args.dtype})", flush=True)
    for batch in args.batch:
        for row in measure(policy, batch, limit, args.gradient_checkpointing):
            work, speed, share, memory = row
            print(
                f"  batch {batch:3}  {work:20} {speed:8.1f} /s  {share:6.1%} of that  "
                f"{memory:6.2f} GB",
                flush=True,
            )
    if args.transformers and name == "openvla":
        ratio = speed_of_llama(
            policy, args.batch[-1], args.lora_rank, args.gradient_checkpointing
        )
        print(f"  decoder, forward and backward: {ratio:.2f} x as fast as transformers' Llama")


def export(args):
    """Write a policy to a new folder for others' loaders, with its adapters merged."""
    name, folder = args.export
    try:
        if Path(folder).exists():
            raise ValueError(
                f"--export: got {folder}, which exists; need a new folder; try another name"
            )
        load_policy(name, args.device, args.dtype, merge=True, freeze="all").save(folder)
    except ValueError as error:
        raise SystemExit(str(error))
    print(f"wrote {folder}")


def main():
    """Check the bundled policies, and measure policies of either size."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", default="tiny", choices=("tiny", "official"))
    parser.add_argument("--policy", nargs="*", default=list(BUNDLED), choices=BUNDLED)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--freeze", default="none", choices=("none", "vision", "vlm"))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--batch", nargs="*", type=int, default=[64])
    parser.add_argument("--transformers", action="store_true", help="compare with its Llama, too")
    parser.add_argument("--save", help="only write a random policy to this folder")
    parser.add_argument(
        "--export", nargs=2, metavar=("POLICY", "FOLDER"),
        help="only write a policy to a new folder, its adapters merged, for others' loaders",
    )
    args = parser.parse_args()
    if args.export:
        return export(args)
    torch.set_num_threads(1)
    options = dict(dtype=args.dtype, freeze=args.freeze)
    for name in args.policy:
        if args.save:
            make_official(name, args.device, args.dtype, adapted=True).save(args.save)
            return
        if args.size == "tiny":
            check_policy(load_policy(name, args.device))
            policy = load_policy(name, args.device, lora_rank=args.lora_rank, **options)
        else:
            policy = make_official(name, args.device, adapted=args.lora_rank > 0, **options)
            if args.lora_rank:
                add_lora(policy, args.lora_rank)
            prepare(policy, args.freeze).to(args.device)
        report(name, policy, args)


if __name__ == "__main__":
    main()
