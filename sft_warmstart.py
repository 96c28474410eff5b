"""Stage I of RL-Co: supervised fine-tuning on a mix of simulated and real demonstrations.

    L = alpha * L_SFT(sim) + (1 - alpha) * L_SFT(real)             alpha = --sim-ratio; RL-Co, arXiv 2602.12628

    python sft_warmstart.py --task open-drawer                      # bundled openvla-tiny, records its own demos
    python sft_warmstart.py --policy openvla/openvla-7b --real-data my/robot --sim-data demos/sim --lora-rank 32
    python sft_warmstart.py --pretrain --policy pi05 --out runs/base-pi05        # makes the bundled base checkpoint
    torchrun --nproc-per-node 8 sft_warmstart.py ...                # plain python: one rank per GPU, or CPU core

L_SFT is cross-entropy of action tokens (OpenVLA) or flow matching (pi0.5), the mean over the real steps of a
batch. alpha is realised by sampling (real_data.MixSampler); the losses of the two domains are computed apart:
    L_b = N_sim/B * L_SFT(sim part of b) + N_real/B * L_SFT(real part of b),       E[N_sim/B] = alpha
Special cases: alpha = 0 is real-only, 1 sim-only; --scratch skips pre-training; --steps 0 only evaluates.

Pre-training  the same loop on the domain `pretrain` of envs.py, which shares no texture, camera, colour or shape
              with the other two, plus aux_weight * L_aux: a linear head on the hidden state of the last prompt
              token, dropped afterwards, tells where tool, named object and goal are; another does on the towers.
              In place of real and simulated samples it mixes first pictures and whole episodes.
Ranks         each draws its share of the global batch; gradients are summed. Their number changes no sample.
Resume        --resume goes on from OUT/resume.pt, bit for bit on one CPU rank. Random numbers of a step are a
              function of (seed, step, rank): there is no generator state to lose. Ctrl-C saves, then ends.
Nodes         several of them (torchrun) must see the same OUT and demos folders.
Output        OUT/policy (checkpoint folder), metrics.jsonl, loss.png, result.json, args.json, resume.pt
Evaluation    on scenes of a fixed seed that no demonstration has. "stand-in" is the second MuJoCo domain, which
              takes the place of the real robot: none is attached.
"""
import argparse
import contextlib
import datetime
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time

import envs                             # first: it chooses the OpenGL backend before mujoco is imported
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import policies
import real_data

EVAL_SEED = 999_983                     # of the scenes of every evaluation; demonstrations must have another
FIRST_SEED = 500                        # + that: of the first pictures
FIRST_TASKS = "pick-place", "push-cube"                            # where an object must be found, and told from others
EVAL_TEMPERATURE = .6                   # of OpenVLA's tokens in evaluations, as in RL4VLA and RLinf
PRETRAIN_SEED = 77_000                  # of the scenes of pre-training, which are in a domain of their own anyway
DOMAINS = ("real", "sim")               # in the order of MixSampler: batch["sim"] is the index
PRETRAIN_PARTS = ("first", "whole")     # what takes their places in --pretrain: first pictures, whole episodes
NAMES = dict(sim="sim", real="stand-in", pretrain="pretrain")
MUON_FACTOR = 7                         # Muon's learning rate / AdamW's: its steps have unit spectral norm
LANDMARK_CENTRE, LANDMARK_SCALE = (.48, -.02, .10), .1             # m: what the auxiliary head's 0 and 1 mean
PATCH_WEIGHT = .2                       # of the cross-entropy over patches (at first ln 16) against the regressions

# Presets. openvla: RL4VLA's warm-up. pi05: openpi's co-training config (cosine over 30,000 steps, of which it does
# 5,000). The tiny ones were tuned here: openvla learns 50 real demonstrations by heart and forgets its base's looks, so
# its eyes are frozen and its steps few. steps: of one task, of all. augment: see augment(). statistics: `base` keeps
# those of the checkpoint (same robot, same actions), `data` computes q01/q99 of the demonstrations.
PRESETS = {
    "openvla": dict(
        steps=(2000, 6000), batch=32, micro_batch=8, lr=5e-4, warmup=0, decay_steps=0, final_lr=1., beta2=.999,
        weight_decay=.01, clip=1., ema=0., optimizer="adamw", augment="openvla", lora_rank=32, statistics="data",
        dtype="bfloat16", freeze="none"),
    "pi05": dict(
        steps=(5000, 15000), batch=16, micro_batch=16, lr=2.5e-5, warmup=1000, decay_steps=30000, final_lr=.1,
        beta2=.95, weight_decay=1e-10, clip=1., ema=.999, optimizer="adamw", augment="pi05", lora_rank=0,
        statistics="data", dtype="bfloat16", freeze="none"),
    "pi05-tiny": dict(
        steps=(700, 2100), batch=64, micro_batch=64, lr=1e-3, warmup=50, decay_steps=0, final_lr=.02, beta2=.95,
        weight_decay=.01, clip=1., ema=0., optimizer="muon", augment="shift", lora_rank=0, statistics="base",
        dtype="float32", freeze="none")}
PRESETS["openvla-tiny"] = PRESETS["pi05-tiny"] | dict(steps=(700, 700), lr=3e-4, freeze="vision")
PRESETS["random weights"] = PRESETS["pi05-tiny"]        # --scratch, --pretrain

def parse(argv=None):
    """Flags -> args. Those without a default here get that of the policy's preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policy", default="openvla", help="openvla, pi05 (bundled tiny ones), a checkpoint folder, or a hub id")
    add("--scratch", action="store_true", help="random weights of the bundled architecture; --policy openvla or pi05")
    add("--task", default="open-drawer", help=f"{', '.join(envs.TASKS)}, or all: what is recorded and evaluated")
    add("--sim-ratio", type=float, default=.5, help="alpha, 0 to 1: P(a sample is simulated); 0 = real only")
    add("--sim-data", help="LeRobot folder or hub id; default: recorded by the scripted expert into --demos")
    add("--real-data", help="the same for your robot; default: recorded on its stand-in by a clumsy tele-operator")
    add("--sim-episodes", type=int, default=300, help="to record per task if --sim-data is not given, >= 2")
    add("--real-episodes", type=int, default=50, help="the same for --real-data")
    add("--demos", default="runs/demos", help="folder for what is recorded; what is there already is used again")
    add("--camera", nargs="+", help="image features of --real-data; default: the first that is not on the wrist")
    for name in ("action", "state", "task"):
        add(f"--{name}-key", help=f"its {name} feature, if it is not found by itself (real_data.py DATASET shows)")
    add("--held-out", type=float, default=.1, help="share of episodes kept out of training to measure the loss, 0 to 1")
    add("--pause", type=float, default=.003, help="frames that move less [m in .2 s] are left out, >= 0; 0 = keep all")
    add("--out", default="runs/sft", help="folder of this run")
    add("--resume", action="store_true", help="go on from OUT/resume.pt; all flags but --steps must be as they were")
    add("--pretrain", action="store_true", help="train from random weights on the `pretrain` domain: the bundled bases")
    add("--pretrain-episodes", type=int, default=14000, help="episodes of all tasks to record for it, >= 2")
    add("--first-pictures", type=int, default=64000, help="and first pictures of more of them, see record_first, >= 32")
    add("--first-ratio", type=float, default=.3, help="P(a sample of --pretrain is one of those), 0 to 1")
    add("--aux-weight", type=float, default=1., help="of the landmark loss in --pretrain, >= 0")
    add("--half", action="store_true", help="store OUT/policy in half precision")
    add("--seed", type=int, default=0, help=f"of demonstrations, sampling and weights, >= 0; not {EVAL_SEED}")
    add("--eval-episodes", type=int, default=100, help="per task and domain at the end; 0 = none")
    add("--val-every", type=int, default=100, help="steps between held-out losses; 0 = only at the end")
    add("--save-every", type=int, default=500, help="steps between resume.pt; 0 = only when interrupted")
    add("--device", help="cpu or cuda; default: cuda if there is one")
    add("--ranks", type=int, default=0, help="processes; 0 = one per GPU, else one per CPU core; torchrun knows better")
    add("--tokenizer", help="path of a tokenizer.json, for checkpoints that come without one")
    add("--gradient-checkpointing", action="store_true", help="a third more time, far less memory")
    group = parser.add_argument_group("defaults from the preset", "; ".join(f"{k}: {v}" for k, v in PRESETS.items()))
    for name, kind, text in (
            ("steps", int, "optimizer steps; 0 = only evaluate; in brackets: of one task, of --task all"),
            ("batch", int, "samples per step over all ranks, >= ranks"),
            ("micro-batch", int, "samples per forward pass of a rank, >= 1; gradients accumulate"),
            ("lr", float, "peak learning rate, > 0"), ("warmup", int, "steps of linear warm-up; 0 = none"),
            ("decay-steps", int, "steps at which the cosine ends; 0 = --steps"),
            ("final-lr", float, "learning rate there, as a share of the peak, 0 to 1; 1 = constant"),
            ("beta2", float, "of AdamW, 0 to 1 (beta1 is 0.9)"), ("weight-decay", float, "of matrices, >= 0"),
            ("clip", float, "norm to which gradients are cut; 0 = never"),
            ("optimizer", str, "adamw, or muon for the matrices inside the transformers and adamw for the rest"),
            ("ema", float, "decay per step of averaged weights, which are then what is saved; 0 = none"),
            ("augment", str, "openvla, pi05 (the official recipes), shift (+-2 pixels, a little tone), or none"),
            ("freeze", str, "none, vision, or vlm (only the action expert of pi0.5 trains)"),
            ("lora-rank", int, "0 = train the weights themselves"), ("dtype", str, "float32 or bfloat16 (autocast)"),
            ("statistics", str, "base (of the checkpoint) or data (of these demonstrations), for normalisation")):
        group.add_argument("--" + name, type=kind, help=text)
    return check_args(parser.parse_args(argv))

def check_args(args):
    """Fills in the preset; one ValueError lists all that is wrong."""
    scratch = args.pretrain or args.scratch
    config = {} if scratch else policies.read_json(policies.find_base(args.policy)[0] / "config.json", {})
    kind = args.policy if scratch else policies.kind_of(config)
    tiny = "tiny_timm_kwargs" in config or config.get("vlm", {}).get("width", 2048) < 1024
    args.preset = "random weights" if scratch else f"{kind}{'-tiny' * tiny}"
    for name, value in PRESETS.get(args.preset, PRESETS["random weights"]).items():
        if getattr(args, name) is None:
            setattr(args, name, value[args.task == "all"] if name == "steps" else value)
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    if args.pretrain:                        # first pictures take the place of real samples
        args.sim_ratio = 1 - args.first_ratio
    checks = {
        f"--policy {args.policy}: --scratch and --pretrain need openvla or pi05, others a config.json of one of them":
            kind in ("openvla", "pi05"),
        f"--task {args.task}: need one of {', '.join(envs.TASKS)}, all": args.task in (*envs.TASKS, "all"),
        f"--sim-ratio {args.sim_ratio}: need 0 to 1": 0 <= args.sim_ratio <= 1,
        f"--augment {args.augment}: need one of {', '.join(AUGMENT)}, none": args.augment in (*AUGMENT, "none"),
        f"--optimizer {args.optimizer}: need adamw or muon": args.optimizer in ("adamw", "muon"),
        f"--statistics {args.statistics}: need base or data": args.statistics in ("base", "data"),
        f"--seed {args.seed}: need 0 or more, and not that of the evaluation": 0 <= args.seed != EVAL_SEED,
        "--steps, --batch, --micro-batch: need 0, 1, 1 or more": min(args.steps + 1, args.batch, args.micro_batch) > 0,
        "--lr, --ema, --final-lr: out of range": args.lr > 0 and 0 <= args.ema < 1 and 0 <= args.final_lr <= 1,
        "--pause, --clip, --warmup, --decay-steps, --val-every, --save-every, --eval-episodes: need >= 0": 0 <= min(
            args.pause, args.clip, args.warmup, args.decay_steps, args.val_every, args.save_every, args.eval_episodes),
        f"--device {args.device}: need cpu, or cuda where there is a GPU":
            args.device in (None, "cpu") or args.device == "cuda" and gpus,
        f"--ranks {args.ranks}: need 0 or more, and no more than there are GPUs": 0 <= args.ranks <= (gpus or math.inf),
        f"--resume: no {args.out}/resume.pt": not args.resume or pathlib.Path(args.out, "resume.pt").exists()}
    if not all(checks.values()):
        raise ValueError("\n".join(text for text, fine in checks.items() if not fine))
    args.ranks = args.ranks or min(gpus or real_data.cores(), args.batch)
    return args

# ---- ranks ---------------------------------------------------------------------------------------------------

def launch(work, args):
    """work(args, rank, world, device) in each rank: those of torchrun, else --ranks processes with one thread each (on
    CPU two ranks of one thread beat one rank of two by far). SIGINT and SIGTERM reach all of them."""
    cuda, stopped = args.device != "cpu" and torch.cuda.is_available(), []
    if "LOCAL_RANK" in os.environ:
        return run_rank(int(os.environ["LOCAL_RANK"]), work, args, int(os.environ["WORLD_SIZE"]), cuda, "env://")
    if args.ranks == 1:
        return run_rank(0, work, args, 1, cuda, None)
    with tempfile.TemporaryDirectory() as folder:
        ranks = torch.multiprocessing.start_processes(
            run_rank, (work, args, args.ranks, cuda, f"file://{folder}/store"), args.ranks, join=False,
            start_method="spawn")
        forward = lambda number, frame: stopped.extend(process.terminate() for process in ranks.processes)
        try:
            with on_signal(forward):
                while not ranks.join():
                    pass
        except torch.multiprocessing.ProcessExitedException:
            if not stopped:                  # else a rank that was not in its loop yet: nothing to save
                raise
        except torch.multiprocessing.ProcessRaisedException as error:
            if "\nValueError: " in str(error):                # the user's; else all of its traceback
                raise ValueError(str(error).rpartition("\nValueError: ")[2].strip()) from None
            raise

@contextlib.contextmanager
def on_signal(handler):
    """SIGINT and SIGTERM call handler(number, frame) in here."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

def run_rank(local_rank, work, args, world, cuda, store):
    device, rank = torch.device(f"cuda:{local_rank}" if cuda else "cpu"), int(os.environ.get("RANK", local_rank))
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)           # CPUs multiply subnormal numbers, of which gradients are full, 3 x slower
    if not store:
        return work(args, rank, world, device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))          # so that `finally` clears up while recording
    dist.init_process_group("nccl" if cuda else "gloo", store, rank=rank, world_size=world,
                            timeout=datetime.timedelta(hours=6))     # the others wait while rank 0 records, or saves
    try:
        work(args, rank, world, device)
        dist.barrier()                       # nobody looks for, or is taken to wait for, what rank 0 still writes
    finally:
        dist.destroy_process_group()

@contextlib.contextmanager
def only_run(folder):
    """ValueError if another process, on this machine, is in here with the same folder."""
    from filelock import FileLock, Timeout                           # comes with huggingface_hub
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"{folder}: another run is writing there; wait for it, or choose another folder") from None

def all_sum(tensor):
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def summed(tensors):
    """Sums over ranks of a list of tensors, sent as one vector: a message a tensor would cost more than the sums."""
    flat = all_sum(torch.cat([x.flatten() for x in tensors]))
    return [part.view_as(x) for x, part in zip(tensors, flat.split([x.numel() for x in tensors]))]

def sum_gradients(params):
    """Gradients become their sum over ranks."""
    if dist.is_initialized():                # what a rank's share did not touch still takes part
        grads = summed([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        for p, grad in zip(params, grads):
            p.grad = grad

@torch.no_grad()
def exchange(tensors, rank, world):
    """tensors[k] becomes, everywhere, what it is on rank k mod world."""
    if world > 1 and tensors:
        own = [x if k % world == rank else torch.zeros_like(x) for k, x in enumerate(tensors)]
        for x, total in zip(tensors, summed(own)):
            x.copy_(total)

# ---- images --------------------------------------------------------------------------------------------------

# side of the random crop; degrees; pixels; brightness added, brightness, contrast, saturation multiplied +-; hue +-
AUGMENT = dict(openvla=(.9 ** .5, 0, 0, .2, 0, .2, .2, .05), pi05=(.95, 5, 0, 0, .3, .4, .5, 0),
               shift=(1, 0, 2, 0, .2, .2, .05, 0))

def augment(images, recipe):
    """(B, [N,] H, W, 3) uint8 -> the same, a draw for each sample (openpi: one for the batch). Crops and turns are for
    the first camera only, as in openpi. Hue is turned in YIQ, which is not TensorFlow's HSV but close at +-0.05."""
    side, degrees, pixels, added, *factors, hue = AUGMENT[recipe]
    x = torch.as_tensor(images)
    numbers = lambda *values: torch.tensor(values, device=x.device)
    flat = x.flatten(0, -4).permute(0, 3, 1, 2).float() / 255                               # (B N, 3, H, W)
    n, (height, width) = len(flat), flat.shape[2:]
    draw = lambda *shape: 2 * torch.rand(n, *shape, device=x.device) - 1
    angle, move = torch.deg2rad(degrees * draw()), (1 - side) * draw(2)
    if pixels:                               # whole pixels: nothing is blurred
        move = (draw(2) * (pixels + .5)).round() * 2 / numbers(width, height)
    turn = side * torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    theta = torch.cat([turn, move[:, :, None]], 2)                                          # (B N, 2, 3)
    if x.ndim == 5:
        others = torch.arange(n) % x.shape[1] > 0
        theta[others] = torch.eye(2, 3, device=x.device)
    grid = F.affine_grid(theta, flat.shape, align_corners=False)
    y = F.grid_sample(flat, grid, padding_mode="border", align_corners=False)
    brightness, contrast, saturation = (1 + factor * draw(1, 1, 1) for factor in factors)
    y = y * brightness + added * draw(1, 1, 1)
    y = (y - y.mean((1, 2, 3), keepdim=True)) * contrast + y.mean((1, 2, 3), keepdim=True)
    grey = (y * numbers(.299, .587, .114)[:, None, None]).sum(1, keepdim=True)
    y = (y - grey) * saturation + grey
    if hue:
        yiq, a = numbers([.299, .587, .114], [.596, -.274, -.322], [.211, -.523, .312]), 2 * math.pi * hue * draw()
        spin = torch.eye(3, device=x.device).repeat(n, 1, 1)
        spin[:, 1:, 1:] = torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], 1).view(n, 2, 2)
        y = torch.einsum("nij,njhw->nihw", yiq.inverse() @ spin @ yiq, y)
    y = (y.clamp(0, 1) * 255).round().to(torch.uint8)
    return y.permute(0, 2, 3, 1).reshape(x.shape)

# ---- the loss ------------------------------------------------------------------------------------------------

class Probe(nn.Module):
    """Auxiliary losses that teach a new policy to see and to tell what words mean, dropped afterwards. Labels are those
    of VecEnv.landmarks, (B, 3, 5): xyz and the place in the picture of tool, named object and goal. The sum of
      where    every token of the prompt tells the landmarks, linearly, from its hidden state in bc_loss's own pass
      patch    each patch alone tells whether a landmark is in it, and where: it cannot know which object is meant
      match    the patch with the named object, as the decoder gets it, resembles the words of the prompt more than
               other words: log softmax of cosines, as CLIP has it for whole pictures
      look     -log of the attention that the patch with the named object gets, mean over words and heads of the
               first layer: without it, attention finds the one word and the one patch that matter far too late."""

    def __init__(self, policy):
        super().__init__()
        self.is_causal = isinstance(policy, policies.OpenVLA)
        decoder = policy.language_model["model"] if self.is_causal else policy.language_model
        self.table, self.layer = (decoder.embed_tokens,), (decoder.layers[0],)           # in tuples: not of this module
        self.projector = (policy.project if self.is_causal else policy.multi_modal_projector["linear"],)
        self.where = nn.Linear(policy.value_head[0].in_features, 15)
        self.patch = nn.Linear(policy.feature_shape[1], 9)                   # logit and offset (2) of each landmark
        self.match = nn.Parameter(torch.zeros(decoder.embed_tokens.num_embeddings))      # how common words are
        for p in self.parameters():
            nn.init.zeros_(p)
        side = math.isqrt(policy.feature_shape[0])
        at = (torch.arange(side) + .5) / side * 2 - 1                        # centres of the patches, (T, 2)
        self.register_buffer("centres", torch.stack([at.repeat(side), at.repeat_interleave(side)], 1))
        self.hooks = [decoder.register_forward_hook(self.listen), self.layer[0].register_forward_pre_hook(self.look)]

    def listen(self, module, inputs, outputs):
        self.hidden, valid = outputs[0], inputs[2][:, 0, -1]                 # (B, L, D), (B, L)
        place, first = torch.arange(valid.shape[1], device=valid.device), len(self.centres) + self.is_causal
        behind = policies.ACTION_DIM * self.is_causal                        # OpenVLA: BOS patches prompt a_0 .. a_6
        self.words = valid & (place >= first) & (place < len(place) - behind)            # (B, L)
        self.last = (self.words * place).argmax(1)

    def look(self, layer, inputs):
        """Attention of the first layer, (B, heads, L, L), which its own fused kernel does not show."""
        x, rotary, mask = inputs[:3]
        h = layer.input_layernorm(x, None)[0]
        q, k = (layer.self_attn[name](h).unflatten(2, (-1, layer.head_dim)).transpose(1, 2)      # (B, heads, L, hd)
                for name in ("q_proj", "k_proj"))
        scores = policies.rotate(q, *rotary) @ policies.rotate(k, *rotary).transpose(2, 3) / layer.head_dim ** .5
        self.attention = scores.masked_fill(~mask, -math.inf).softmax(3)

    def forward(self, features, landmarks, ids, mask):
        """L_aux (scalar), and the mean position error [m] told by the last token. landmarks (B, 3, 5); ids and mask of
        the prompts (B, n)."""
        rows, centre = torch.arange(len(ids)), landmarks.new_tensor([*LANDMARK_CENTRE, 0, 0])
        target = (landmarks - centre) / landmarks.new_tensor([LANDMARK_SCALE] * 3 + [.3] * 2)
        told = self.where(self.hidden.float()).unflatten(2, target.shape[1:])                   # (B, L, 3, 5)
        where = F.smooth_l1_loss(told, target[:, None].expand_as(told), beta=.1, reduction="none").mean((2, 3))
        error = (told[rows, self.last] - target)[..., :3].detach() * LANDMARK_SCALE
        features, place = features.flatten(1, -2), landmarks[:, None, :, 3:]                    # (B, T, D), (B,1,3,2)
        away = place - self.centres[:, None]                                                    # (B, T, 3, 2)
        nearest = away.abs().amax(3).argmin(1)                                                  # (B, 3) patches
        pick = lambda x: x.gather(1, nearest[:, None, :, None].expand(-1, 1, -1, x.shape[3]))[:, 0]         # (B, 3, ..)
        told = self.patch(features).unflatten(2, (3, 3))                                        # (B, T, 3, 3)
        patch = PATCH_WEIGHT * F.cross_entropy(told[..., 0], nearest)
        patch = patch + F.smooth_l1_loss(pick(told[..., 1:]), 4 * pick(away), beta=.1)          # 1 = half a patch of 16
        seen, table = self.projector[0](features[rows, nearest[:, 1]]).float(), self.table[0].weight         # (B, D)
        match = (10 * F.normalize(seen, dim=1) @ F.normalize(table, dim=1).T + self.match).log_softmax(1)    # (B, V)
        looked = self.attention[rows, :, :, nearest[:, 1] + self.is_causal].mean(1)             # (B, L)
        looked = (looked * self.words).sum(1) / self.words.sum(1)
        loss = where[rows, self.last].mean() + where[self.words].mean() + patch
        loss = loss - match.gather(1, ids)[mask].mean() - (looked + 1e-6).log().mean()
        return loss, error.norm(dim=2).mean()

def part_names(args):
    """What the two parts of a batch are called in logs."""
    return PRETRAIN_PARTS if args.pretrain else DOMAINS

def kept_steps(policy, batch):
    """(b, H) bool: the steps of the chunks that the policy predicts and that are no padding."""
    return ~torch.from_numpy(batch["pad"]).to(policy.device)[:, :policy.settings.get("horizon", 1)]

def micro_losses(policy, batch, args, probe=None, train=False):
    """Yields (rows, L_SFT (b, H) of each step, L_aux, position error [m]) of micro-batches of this rank's share."""
    for rows in np.split(np.arange(len(batch["sim"])), range(args.micro_batch, len(batch["sim"]), args.micro_batch)):
        images = torch.from_numpy(batch["images"][rows]).to(policy.device)
        images = augment(images, args.augment) if train and args.augment != "none" else images
        crop = policy.settings.get("center_crop")
        if crop and train and args.augment == "openvla":
            policy.settings["center_crop"] = False             # its random crops take the place of the central one
        images = policy.encode_images(images) if probe else images
        texts, actions = [batch["instructions"][i] for i in rows], torch.from_numpy(batch["actions"][rows])
        state = torch.from_numpy(batch["state"][rows])
        extra = dict(state=state) if policies.reads_state(policy.settings) else {}
        loss = policy.bc_loss(images, texts, actions, reduction="none", **extra)
        if crop:
            policy.settings["center_crop"] = True
        aux, error = loss.new_zeros(2)
        if probe:
            aux, error = probe(images, state[:, -15:].view(-1, 3, 5).to(loss.device), *policy.prompt(texts))
        yield rows, loss, aux, error

def loss_and_gradients(policy, batch, args, probe=None):
    """Gradients of L_b (see the header) summed over ranks; returns {name: value} of the global batch. Both domains are
    in the same forward pass; each step weighs what it does in the mean of its domain:
        L_b = sum_d N_d/B * 1/K_d * sum of the losses of domain d's steps           K_d: steps that are no padding"""
    domains = torch.from_numpy(batch["sim"]).long().to(policy.device)                        # (b,)
    keep = kept_steps(policy, batch)                                                         # (b, H)
    count = torch.stack([torch.bincount(domains, weights=w.double(), minlength=2) for w in (keep.any(1), keep.sum(1))])
    samples, steps = all_sum(count)          # N_d and K_d, (2,) each, over all ranks
    share, weight = (samples / samples.sum()).float(), keep / steps.float()[domains, None]  # N_d/B (2,), 1/K_d (b, H)
    sums = torch.zeros(4, dtype=torch.float64, device=policy.device)                         # real, sim, aux, error
    for rows, loss, aux, error in micro_losses(policy, batch, args, probe, train=True):
        mean, n = (weight[rows] * loss).sum(1), len(rows) / samples.sum().float()            # mean (b,)
        ((share[domains[rows]] * mean).sum() + args.aux_weight * n * aux).backward()
        of_domains = torch.bincount(domains[rows], weights=mean.detach().double(), minlength=2)
        sums += torch.cat([of_domains, torch.stack([n * aux.detach(), n * error]).double()])
    real, sim, aux, error = all_sum(sums).tolist()
    sum_gradients([p for p in policy.parameters() if p.requires_grad] + list(probe.parameters() if probe else ()))
    logs = {f"loss/{name}": value for name, value, n in zip(part_names(args), (real, sim), samples) if n}
    return logs | dict(loss=share.tolist()[0] * real + share.tolist()[1] * sim) | (
        dict(aux=aux, position_mm=1e3 * error) if probe else {})

@torch.no_grad()
def held_out_losses(policy, held_out, args, rank, world, probe=None, most=512):
    """{name: value}: loss of up to `most` frames of the held-out episodes of each domain, the same ones each time."""
    logs = {}
    for domain, name in zip(DOMAINS, part_names(args)):
        if held_out.get(domain):
            order = np.random.default_rng(0).permutation(len(held_out[domain]))[:most][rank::world]
            torch.manual_seed(rank)          # of flow matching's noise
            sums = torch.zeros(4, dtype=torch.float64)
            batch = held_out[domain].batch(order) | dict(sim=np.zeros(len(order)))
            keep = kept_steps(policy, batch)
            for rows, loss, aux, error in micro_losses(policy, batch, args, probe) if len(order) else ():
                sums += torch.tensor([(keep[rows] * loss).sum(), keep[rows].sum(), len(rows) * error, len(rows)])
            total, k, error, n = all_sum(sums.to(policy.device)).tolist()
            logs |= {f"held_out/{name}": total / k} | ({f"held_out/{name}_mm": 1e3 * error / n} if probe else {})
    return logs

# ---- data ----------------------------------------------------------------------------------------------------

def record_labelled(block):
    """Those of episodes first .. first + count - 1 of the pretrain domain that succeed: what write_dataset takes."""
    first, count, seed, size = block
    return real_data.record("all", "pretrain", seed, size, .01, count, first)

def record_first(block):
    """The same of the first pictures alone, of scenes of one of FIRST_TASKS: only the words tell which object is meant
    (later the arm does, being on its way to it), so that a minute of these teaches them more than hours of episodes."""
    first, count, seed, size = block
    task = FIRST_TASKS[first // count % len(FIRST_TASKS)]
    env = envs.VecEnv(task, "pretrain", count, seed + FIRST_SEED, image_size=size, first_episode=first)
    obs, label = env.reset(), envs.Expert(env).act()[1]                                      # (N, 7)
    labelled = np.concatenate([obs["state"], env.landmarks().reshape(-1, 15)], 1)            # (N, 23)
    return [(obs["images"][i:i + 1], labelled[i:i + 1], label[i:i + 1], obs["instructions"][i], first + i)
            for i in range(count)]

def make_pretrain_demos(record, episodes, seed, out, size, block=32):
    """Writes what record makes of episodes 0 .. episodes - 1, on all cores; which cores there are changes nothing."""
    with multiprocessing.get_context("spawn").Pool(real_data.cores()) as pool:
        blocks = [(first, min(block, episodes - first), seed, size) for first in range(0, episodes, block)]
        parts = tqdm(pool.imap(record, blocks), f"pretrain, {block} episodes each", len(blocks))
        real_data.write_dataset(out, itertools.chain.from_iterable(parts), fps=5)

def demo_paths(args, size):
    """{"sim": path, "real": path} of what alpha needs; records what is neither given nor there. Who wants the same
    demonstrations at the same time waits for who records them."""
    from filelock import FileLock
    paths = {}
    for name in [name for name, share in zip(DOMAINS, (1 - args.sim_ratio, args.sim_ratio)) if share]:
        given, episodes = getattr(args, f"{name}_data"), getattr(args, f"{name}_episodes")
        label, record = f"{name}-{args.task}-{episodes}", None
        if args.pretrain:
            given, part = None, DOMAINS.index(name)
            record, episodes = ((record_first, args.first_pictures), (record_labelled, args.pretrain_episodes))[part]
            label = f"pretrain-{PRETRAIN_PARTS[part]}-{episodes}"
        path = pathlib.Path(args.demos, f"{label}-seed{args.seed}-{size}px")
        paths[name] = given or path
        if given:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                print(f"recording {path}", file=sys.stderr)
                if record:
                    make_pretrain_demos(record, episodes, PRETRAIN_SEED + args.seed, path, size)
                else:
                    real_data.make_demos(args.task, name, episodes, path, args.seed, image_size=size)
    return paths

def open_sets(args, policy, rank):
    """({name: training Demos}, {name: held-out Demos}) of the domains that alpha needs; the other is never opened."""
    fit, horizon = "stretch" if isinstance(policy, policies.OpenVLA) else "pad", policy.settings.get("horizon", 1)
    names = dict(cameras=args.camera, action_key=args.action_key, state_key=args.state_key, task_key=args.task_key)
    if rank == 0 and args.real_data and args.sim_ratio < 1 and not args.pretrain:      # before anything is recorded
        real_data.read_lerobot(args.real_data, **names).problems.stop(args.real_data)
    sets = {}
    for name, path in demo_paths(args, policy.image_size).items():
        given = names if name == "real" and args.real_data else {}
        demos = real_data.open_dataset(path, policy.image_size, horizon, fit=fit, **given)
        fps = demos.recording.info["fps"]
        least, sees = args.pause * envs.CONTROL_HZ / fps, args.pretrain or policies.reads_state(policy.settings)
        sets[name] = [part and part.without_pauses(least) for part in demos.split(args.held_out)]
        for part in filter(None, () if sees else sets[name]):        # its size may differ between sim and real
            part.states = part.states[:, :0]
        if rank == 0 and given:
            kept, slow = sum(map(len, filter(None, sets[name]))), f", but {envs.CONTROL_HZ} in simulation"
            print(f"{path}: {len(demos.lengths)} episodes; {kept} of {len(demos)} frames move (--pause); {fps} actions "
                  f"a second{slow * (fps != envs.CONTROL_HZ)}", file=sys.stderr)
    return {name: pair[0] for name, pair in sets.items()}, {name: pair[1] for name, pair in sets.items()}

# ---- the policy ----------------------------------------------------------------------------------------------

def make_policy(args, device):
    if args.scratch or args.pretrain:
        policy = policies.make_tiny(args.policy, args.seed).to(device)
        limit = envs.ACTION_LIMIT            # the range of the controller: the same for any data of this robot
        policy.set_statistics("panda", dict(action=dict(q01=-limit, q99=limit)))
        return policy
    return policies.load_policy(args.policy, device, args.dtype, lora_rank=args.lora_rank, freeze=args.freeze,
                                gradient_checkpointing=args.gradient_checkpointing, tokenizer=args.tokenizer,
                                seed=args.seed)

# ---- training ------------------------------------------------------------------------------------------------

def learning_rate(step, args):
    """Linear warm-up, then a cosine down to final_lr of the peak, as in openpi."""
    last = args.decay_steps or args.steps
    if step < args.warmup:
        return args.lr * (step + 1) / (args.warmup + 1)
    cosine = .5 + .5 * math.cos(math.pi * min(1, (step - args.warmup) / max(1, last - args.warmup)))
    return args.lr * (args.final_lr + (1 - args.final_lr) * cosine)

def changed_flags(before, now, free):
    """What differs between two dicts of flags, except for those that are free to change: ["--lr was 1, is 2"]."""
    return [f"--{name.replace('_', '-')} was {value}, is {now.get(name)}" for name, value in before.items()
            if name not in free and now.get(name) != value]

def save_state(state, path):
    """Under a temporary name, then renamed: a killed run or a power cut leaves the old file, never half of one."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)

def load_state(path, args, free, named):
    """What save_state wrote, its `weights` copied into named. ValueError if it is of a run with other flags."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    wrong = changed_flags(state["args"], args, free)
    if wrong or set(state["weights"]) != set(named):
        raise ValueError("--resume: another run: " + ("; ".join(wrong) or "other weights train"))
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(state["weights"][name])
    return state

class Trainer:
    """All that changes while training: weights, optimizer, averaged weights, position in the sample stream. Muon's
    matrices are dealt out to the ranks: orthogonalising them all costs as much as 12 samples."""

    def __init__(self, args, policy, probe, sampler, rank, world):
        modules = [policy] + ([probe] if probe else [])
        self.named = {f"{k}.{n}": p for k, m in enumerate(modules) for n, p in m.named_parameters() if p.requires_grad}
        self.params, self.args, self.sampler, self.rank = list(self.named.values()), args, sampler, rank
        self.world = world
        inner = [p for name, p in self.named.items() if args.optimizer == "muon" and p.ndim == 2
                 and re.search(r"(blocks|layers|projector|expert).*weight", name) and "embed" not in name]
        self.inner, chosen = sorted(inner, key=torch.Tensor.numel), set(map(id, inner))
        rest = [p for p in self.params if id(p) not in chosen]
        groups = [dict(params=[p for p in rest if (p.ndim > 1) == matrix], weight_decay=args.weight_decay * matrix)
                  for matrix in (True, False)]
        self.optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=(.9, args.beta2))]
        if inner:
            self.optimizers.append(torch.optim.Muon(self.inner, args.lr, weight_decay=args.weight_decay))
        self.step, self.skipped, self.ema = 0, 0, None
        if args.ema:
            self.ema = [p.detach().clone() for p in self.params]

    def update(self, policy, probe):
        """One optimizer step on the next batch -> {name: value}."""
        args, start = self.args, time.perf_counter()
        batch = next(self.sampler)
        waited = time.perf_counter() - start
        torch.manual_seed(((args.seed << 32) + self.step << 12) + self.rank & (1 << 63) - 1)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        logs = loss_and_gradients(policy, batch, args, probe)
        norm = nn.utils.clip_grad_norm_(self.params, args.clip or math.inf).item()
        fine, rate = math.isfinite(norm) and math.isfinite(logs["loss"]), learning_rate(self.step, args)
        for k, p in enumerate(self.inner):
            if k % self.world != self.rank:
                p.grad = None                # another rank's
        for optimizer, factor in zip(self.optimizers, (1, MUON_FACTOR)):
            for group in optimizer.param_groups:
                group["lr"] = factor * rate
            if fine:
                optimizer.step()
        exchange(self.inner, self.rank, self.world)
        self.skipped = 0 if fine else self.skipped + 1
        if self.skipped == 5:
            raise RuntimeError(f"step {self.step}: loss {logs['loss']}, gradient norm {norm}, 5 times in a row; "
                               "lower --lr, or look at the data with real_data.py")
        self.step += 1
        if self.ema:
            torch._foreach_lerp_(self.ema, self.params, 1 - args.ema)
        return logs | dict(grad_norm=norm, lr=rate, wait_s=waited)

    def save(self, path):
        """Everything, from all ranks by rank 0."""
        momenta = [self.optimizers[-1].state[p] for p in self.inner]
        exchange([each.setdefault("momentum_buffer", torch.zeros_like(p)) for each, p in zip(momenta, self.inner)],
                 self.rank, self.world)
        if self.rank == 0:
            save_state(dict(args=vars(self.args), step=self.step, ema=self.ema, sampler=self.sampler.state_dict(),
                            weights={name: p.detach() for name, p in self.named.items()},
                            optimizers=[each.state_dict() for each in self.optimizers]), path)

    def load(self, path):
        state = load_state(path, vars(self.args), ("resume", "ranks", "device", "out", "steps"), self.named)
        for own, saved in zip(self.ema or [], state["ema"] or []):
            own.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.sampler.load_state_dict(state["sampler"])
        self.step = state["step"]

    @torch.no_grad()
    def use_average(self):
        for p, average in zip(self.params, self.ema or []):
            p.copy_(average)

class Log:
    """metrics.jsonl, one line a step that is logged; and the loss curves."""

    def __init__(self, out, step, rank):
        self.path, self.rows, self.rank = out / "metrics.jsonl", [], rank
        if rank == 0:
            lines = self.path.read_text().splitlines() if step and self.path.exists() else []
            whole = [json.loads(line) for line in lines if line.endswith("}")]         # a full disk leaves half of one
            self.rows = [row for row in whole if row["step"] <= step]        # what came after resume.pt comes again
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, step, values):
        self.rows.append(dict(step=step) | {name: round(value, 6) for name, value in values.items()})
        if self.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")

    def plot(self, path):
        from matplotlib.figure import Figure
        figure = Figure(figsize=(6, 4))
        axes = figure.subplots()
        for name in [f"{kind}/{part}" for kind in ("loss", "held_out") for part in DOMAINS + PRETRAIN_PARTS]:
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if points:
                axes.plot(*zip(*points), "--" if name.startswith("held") else "-", label=name)
        axes.set(xlabel="optimizer step", ylabel="L_SFT", yscale="log")
        axes.legend()
        figure.savefig(path, dpi=120, bbox_inches="tight")

def train(args, policy, rank, world, out):
    """The loop. Returns True if it came to its end, False if a signal stopped it (then resume.pt is up to date)."""
    sets, held_out = open_sets(args, policy, rank)
    if args.statistics == "data" and not args.pretrain:
        stats = real_data.policy_statistics(list(sets.values()), "demos", policy.settings.get("delta_mask"))[1]
        stats = stats["norm_stats"]
        state = dict(state=stats["state"]) if policies.reads_state(policy.settings) else {}
        policy.set_statistics("demos", dict(action=stats["actions"]) | state)
    probe = Probe(policy).to(policy.device) if args.pretrain and args.aux_weight else None
    sampler = real_data.MixSampler(
        sets.get("sim"), sets.get("real"), args.sim_ratio, args.batch, args.seed, rank, world)
    trainer, stop = Trainer(args, policy, probe, sampler, rank, world), torch.zeros(1)
    if args.resume:
        trainer.load(out / "resume.pt")
    log = Log(out, trainer.step, rank)
    with on_signal(lambda *_: stop.fill_(1)), tqdm(
            total=args.steps * args.batch, initial=trainer.step * args.batch, unit="sample", unit_scale=True,
            disable=rank > 0, desc=out.name) as bar:
        while trainer.step < args.steps and not all_sum(stop.clone().to(policy.device)).item():       # ranks must agree
            logs, step = trainer.update(policy, probe), trainer.step
            if step == args.steps or args.val_every and step % args.val_every == 0:
                logs |= held_out_losses(policy, held_out, args, rank, world, probe)
            log.write(step, logs)
            bar.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in logs.items() if "loss" in name))
            bar.update(args.batch)
            if args.save_every and step % args.save_every == 0:
                trainer.save(out / "resume.pt")
    trainer.save(out / "resume.pt")
    if rank == 0:
        log.plot(out / "loss.png")
    for hook in probe.hooks if probe else ():
        hook.remove()
    trainer.use_average()
    return trainer.step >= args.steps

# ---- evaluation ----------------------------------------------------------------------------------------------

def run_episodes(policy, task, domain, episodes, rank=0, world=1, num_envs=25, deterministic=True, **options):
    """Successes and episodes of the fixed evaluation scenes 0 .. episodes - 1, over all ranks; options of VecEnv."""
    own = len(range(rank, episodes, world))
    count = torch.zeros(2, device=policy.device)
    if own:
        env = envs.VecEnv(task, domain, min(num_envs, own), EVAL_SEED, policy.image_size, first_episode=rank,
                          episode_stride=world, **options)
        noise, obs = torch.Generator(policy.device).manual_seed(EVAL_SEED + rank), env.reset()
        while count[1] < own:
            extra = dict(state=obs["state"]) if policies.reads_state(policy.settings) else {}
            actions = policy.act(obs["images"], obs["instructions"], deterministic, noise, **extra).actions
            obs, _, _, _, info = env.step(actions.cpu().numpy())
            for i in info["ended"]:
                if info["episode"][i] < episodes:
                    count += torch.tensor([float(info["success"][i]), 1.], device=policy.device)
    return [int(x) for x in all_sum(count).tolist()]

def evaluate(args, policy, rank, world):
    """{"sim/open-drawer": dict(success, n, low, high)}, printed; both domains, and the third after pre-training."""
    results, tokens = {}, isinstance(policy, policies.OpenVLA)
    if tokens:                               # likeliest tokens stand still for ever where the demonstrator waited
        policy.settings["temperature"] = EVAL_TEMPERATURE
    for domain in ("sim", "real", *["pretrain"] * args.pretrain):
        for task in envs.TASKS if args.task == "all" or args.pretrain else [args.task]:
            k, n = run_episodes(policy, task, domain, args.eval_episodes, rank, world, deterministic=not tokens)
            low, high = envs.wilson(k, n)
            results[f"{NAMES[domain]}/{task}"] = dict(success=k / n, n=n, low=low, high=high)
            if rank == 0:
                print(f"{NAMES[domain]:9}{task:13} {k / n:6.1%}   n {n}, 95 % interval {low:.1%} - {high:.1%}")
    return results

# ---- the run -------------------------------------------------------------------------------------------------

def save_policy(policy, out, half=False):
    """OUT/policy, under a temporary name, then renamed: a killed run leaves no half of a folder."""
    from safetensors.torch import load_file, save_file
    part = out / "policy.part"
    shutil.rmtree(part, ignore_errors=True)
    policy.save(part)
    for file in part.glob("*.safetensors") if half else ():    # load_policy turns them back into float32
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    shutil.rmtree(out / "policy", ignore_errors=True)
    os.replace(part, out / "policy")

def work(args, rank, world, device):
    """What each rank does: train, save the policy, evaluate."""
    out, start = pathlib.Path(args.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    policy = make_policy(args, device)
    if rank == 0:
        (out / "args.json").write_text(json.dumps(dict(command=sys.argv, world=world, **vars(args)), indent=1))
    if args.steps and args.augment == "openvla" and "center_crop" in policy.settings:
        policy.settings["center_crop"] = True                  # what is not augmented: the central 90 %, as officially
    if args.steps and not train(args, policy, rank, world, out):
        if rank == 0:
            print(f"interrupted; go on with --resume (the flags as before, {out}/resume.pt)", file=sys.stderr)
        return
    seconds = time.perf_counter() - start
    if rank == 0:
        save_policy(policy, out, args.half)
        print(f"wrote {out}/policy after {seconds:.0f} s, ranks: {world} ({device.type})", flush=True)
    if args.eval_episodes:
        results = evaluate(args, policy, rank, world)
        if rank == 0:
            (out / "result.json").write_text(json.dumps(dict(results=results, seconds=seconds, world=world,
                                                             seed=EVAL_SEED), indent=1))

def warm_start(args):
    """Stage I with args = parse([...]). Returns the checkpoint folder, or None if a signal stopped the run."""
    return run_in(args, work)

def run_in(args, work):
    """launch(work, args), alone in args.out, where no other run's checkpoint may be overwritten. Returns OUT/policy, or
    None if a signal stopped the run."""
    out = pathlib.Path(args.out)
    inode = lambda: (out / "policy").exists() and (out / "policy").stat().st_ino         # of an earlier run, or this
    if int(os.environ.get("RANK", 0)) > 0:                     # torchrun's others: rank 0 looks after the folder
        launch(work, args)
        return out / "policy"
    with only_run(out):
        if (out / "resume.pt").exists() and not args.resume:
            raise ValueError(f"{out} holds a run: --resume goes on with it; else remove it, or choose another --out")
        before = inode()
        launch(work, args)
        return out / "policy" if inode() not in (False, before) else None

def run_main(job, parse):
    """main() of both stages: 0, 130 if a signal stopped the run, or one message."""
    try:
        sys.exit(0 if job(parse()) else 130)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

def main():
    run_main(warm_start, parse)

if __name__ == "__main__":
    main()
