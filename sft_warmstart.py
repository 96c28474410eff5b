"""Stage I of RL-Co: supervised fine-tuning on a mix of simulated and real demonstrations.

    L = alpha * L_SFT(sim) + (1 - alpha) * L_SFT(real)     alpha = --sim-ratio; arXiv 2602.12628

    python sft_warmstart.py --policy openvla            # records its own demonstrations
    python sft_warmstart.py --policy openvla/openvla-7b --real-data my/robot --lora-rank 32
    python sft_warmstart.py ... --resume                # after Ctrl-C, a crash or a power cut

L_SFT is the cross-entropy of the action tokens (OpenVLA) or flow matching (pi0.5), averaged over
the unpadded steps of a batch. alpha is realised by sampling (real_data.MixSampler): each sample is
simulated with probability alpha. The two domains of a batch b are averaged apart and weighted by
their share of its B samples:

    L_b = N_sim / B * L_SFT(sim part) + N_real / B * L_SFT(real part)         E[N_sim / B] = alpha

Cases    --sim-ratio 0 trains on real demonstrations only, 1 on simulated ones only; the other data
         set is never opened.
Ranks    Plain `python` starts one process per GPU, or per CPU core, under torch.distributed.run;
         torchrun works, too. Each rank draws its share of the global batch and gradients are
         summed: the number of ranks changes no sample. CUDA_VISIBLE_DEVICES= (empty): no GPU.
         With --fsdp they share weights, gradients and Adam's moments, too; LoRA needs no such help.
Resume   --resume goes on from OUT/resume.pt, bit for bit on one CPU rank: the random numbers of a
         step are a function of (seed, step, rank). Ctrl-C saves, then ends; with several ranks,
         torch.distributed.run allows 30 s for that.
Output   OUT/policy (checkpoint folder), metrics.jsonl, loss.png, result.json, args.json, resume.pt
"Real" is the stand-in, a second MuJoCo domain that takes the place of a real robot, unless
--real-data is given.

Reading order: PRESETS and Options; supervised_losses (the loss); train (the loop); then the data
and the augmentation. The last section is plumbing that rl_cotrain.py shares.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import warnings

import envs  # first: it chooses the OpenGL backend before mujoco is imported
import filelock  # comes with huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

import evaluate
import policies
import real_data

RECORDED = dict(sim=300, real=50)  # demonstrations to record per task; the paper has 20-50 real
HELD_OUT_FRAMES = 512  # frames of the held-out episodes whose loss is logged
LOG_EVERY = 10  # optimizer steps between lines of metrics.jsonl
VALIDATE_EVERY = 100  # optimizer steps between held-out losses
SAVE_EVERY = 500  # optimizer steps between versions of resume.pt
BUCKET = 25_000_000  # numbers of a message between ranks

# Defaults that depend on the policy. openvla: the warm-up of RL4VLA. pi05: openpi's co-training
# configuration (its cosine is made for 30,000 steps). The tiny ones were tuned here: openvla-tiny
# overfits 50 real demonstrations and forgets the appearances of its pre-training, so its vision
# tower is frozen and its training short.
PRESETS = {
    "openvla": dict(
        steps=6000, batch=32, micro_batch=8, lr=5e-4, warmup=0, decay_steps=0, final_lr=1.0,
        beta2=0.999, weight_decay=0.01, max_grad_norm=1.0, ema=0.0, augment="openvla",
        lora_rank=32, statistics="data", dtype="bf16", freeze="none"
    ),
    "pi05": dict(
        steps=15000, batch=16, micro_batch=16, lr=2.5e-5, warmup=1000, decay_steps=30000,
        final_lr=0.1, beta2=0.95, weight_decay=1e-10, max_grad_norm=1.0, ema=0.999,
        augment="pi05", lora_rank=0, statistics="data", dtype="bf16", freeze="none"
    ),
    "openvla-tiny": dict(
        steps=700, batch=64, micro_batch=64, lr=1e-3, warmup=50, decay_steps=0, final_lr=0.02,
        beta2=0.95, weight_decay=0.01, max_grad_norm=1.0, ema=0.0, augment="shift", lora_rank=0,
        statistics="base", dtype="float32", freeze="vision"
    ),
    "pi05-tiny": dict(
        steps=2100, batch=64, micro_batch=64, lr=1e-3, warmup=50, decay_steps=0, final_lr=0.02,
        beta2=0.95, weight_decay=0.01, max_grad_norm=1.0, ema=0.0, augment="shift", lora_rank=0,
        statistics="base", dtype="float32", freeze="none"
    ),
}


def flag(default, text, choices=None):
    """A field of a dataclass that parse_flags turns into a command-line flag."""
    return dataclasses.field(default=default, metadata=dict(help=text, choices=choices))


@dataclasses.dataclass
class Options:
    """All options of Stage I. Fields that are None take the value of the policy's preset."""

    policy: str = flag(
        "openvla", "openvla or pi05 (bundled tiny checkpoints), a checkpoint folder, or a hub id"
    )
    task: str = flag("all", "the task to record and evaluate, or all", (*envs.TASKS, "all"))
    sim_ratio: float = flag(0.5, "alpha, 0 to 1: probability that a training sample is simulated")
    sim_data: str = flag(
        None, "LeRobot folder or hub id of simulated demonstrations (default: record them)"
    )
    real_data: str = flag(
        None, "LeRobot folder or hub id of real ones (default: record them on the stand-in)"
    )
    sim_episodes: int = flag(None, "simulated demonstrations to record per task (default: 300)")
    real_episodes: int = flag(None, "stand-in demonstrations to record per task (default: 50)")
    demos: str = flag(
        "runs/demos", "folder for recorded demonstrations; existing ones are used again"
    )
    camera: list = flag(
        None, "image features of --real-data to use (default: the first scene camera)"
    )
    convert: list = flag(
        None, "other conventions of --real-data: names of real_data.CONVERSIONS, or Python files"
    )
    load: list = flag(
        None, "settings of --policy, key=value: unnorm_key, tokenizer, base, temperature, steps, .."
    )
    held_out: float = flag(0.1, "share of the episodes kept out of training, 0 to 1")
    pause: float = flag(
        0.003, "frames that move the tool less than this [m per 0.2 s] are left out; 0 keeps all"
    )
    steps: int = flag(None, "optimizer steps (preset); 0 only evaluates and saves")
    batch: int = flag(None, "samples per optimizer step over all ranks (preset)")
    micro_batch: int = flag(
        None, "samples per forward pass of a rank (preset); gradients accumulate"
    )
    lr: float = flag(None, "peak learning rate (preset)")
    augment: str = flag(None, "image augmentation (preset)", ("openvla", "pi05", "shift", "none"))
    freeze: str = flag(
        None, "part that does not train (preset); vlm is for pi05", ("none", "vision", "vlm")
    )
    lora_rank: int = flag(None, "rank of LoRA adapters (preset); 0 trains the weights themselves")
    statistics: str = flag(
        None,
        "normalise by the checkpoint's (base) or these demonstrations' (data) statistics; "
        "(preset)",
        ("base", "data"),
    )
    dtype: str = flag(None, "arithmetic of the matrix products (preset)", ("float32", "bf16"))
    fsdp: bool = flag(
        False, "the ranks share weights, gradients and moments of a model that trains as a whole"
    )
    eval_episodes: int = flag(100, "evaluation episodes per task and domain at the end; 0 = none")
    seed: int = flag(0, "seed of demonstrations, sampling and training")
    ranks: int = flag(0, "processes; 0 = one per GPU, or per CPU core")
    out: str = flag(None, "folder of this run (default: runs/sft-POLICY-TASK-alphaA-DATA-seedS)")
    resume: bool = flag(False, "go on from OUT/resume.pt; all other flags as they were")
    warmup: int = None  # steps of linear warm-up
    decay_steps: int = None  # step at which the cosine ends; 0 = steps
    final_lr: float = None  # learning rate there, as a share of the peak
    beta2: float = None  # of AdamW; beta1 is 0.9
    weight_decay: float = None  # of matrices; never of biases and norms
    max_grad_norm: float = None  # gradients are scaled down to this norm; 0 = never
    ema: float = None  # decay per step of averaged weights, which are then saved; 0 = none

    def resolve(self, new=True):
        """Fill in the preset and check everything. Returns self.

        new: whether OUT must be a folder of its own, or, with --resume, that of an interrupted run.
        Raises one ValueError that lists all that is wrong.
        """
        return resolve_options(self, new)


# ---- the loss ----------------------------------------------------------------------------------


def supervised_losses(policy, batch, options):
    """Yield this rank's share of L_b (see the header), one micro-batch at a time.

    batch: this rank's samples from MixSampler, b of the B samples of the global batch. With K_d,
    the number of unpadded steps of domain d in the global batch,

        L_b = sum over domains d of  N_d / B * 1 / K_d * sum of L_SFT over the K_d steps of domain d

    Yields (loss, parts): a scalar with gradient whose sum over micro-batches and ranks is L_b, and
    detached (2,) whose sum is the mean loss of the real and of the simulated samples.
    """
    in_sim = torch.from_numpy(batch["sim"]).to(policy.device)  # (b,) bool
    keep = unpadded_steps(policy, batch)  # (b, H) bool
    samples = all_sum(torch.stack([(~in_sim).sum(), in_sim.sum()]).double())  # N_real, N_sim
    steps = torch.stack([keep[~in_sim].sum(), keep[in_sim].sum()]).double()
    steps = all_sum(steps).float()  # K_real, K_sim
    share = (samples / samples.sum()).float()  # N_d / B
    weight = keep / steps[in_sim.long(), None]  # (b, H), 1 / K_d or 0
    pieces = math.ceil(len(in_sim) / options.micro_batch)
    # In training mode OpenVLA leaves out its central crop: random crops take its place.
    policy.train(options.augment == "openvla")
    try:
        for rows in np.array_split(np.arange(len(in_sim)), pieces):
            images = torch.from_numpy(batch["images"][rows]).to(policy.device)
            if options.augment != "none":
                images = augment(images, options.augment)
            loss = step_losses(policy, batch, rows, images)  # (b', H)
            loss = (weight[rows] * loss).sum(1)  # (b',)
            real = loss[~in_sim[rows]].sum()
            sim = loss[in_sim[rows]].sum()
            yield share[0] * real + share[1] * sim, torch.stack([real, sim]).detach().double()
    finally:
        policy.eval()


def step_losses(policy, batch, rows, images):
    """L_SFT (b', H) of each step of the samples `rows`, whose images are given."""
    actions = torch.from_numpy(batch["actions"][rows])
    instructions = [batch["instructions"][i] for i in rows]
    extra = {}
    if policy.reads_state:
        extra["state"] = torch.from_numpy(batch["state"][rows])
    return policy.bc_loss(images, instructions, actions, reduction="none", **extra)


def unpadded_steps(policy, batch):
    """(b, H) bool: the steps of the action chunks that exist, up to the policy's horizon."""
    return ~torch.from_numpy(batch["pad"]).to(policy.device)[:, : policy.horizon]


@torch.no_grad()
def held_out_loss(policy, demos, micro_batch):
    """Mean L_SFT of HELD_OUT_FRAMES held-out frames: always the same ones and the same noise."""
    frames = np.random.default_rng(0).permutation(len(demos))[:HELD_OUT_FRAMES]
    if len(frames) > world():  # the same number on each rank
        frames = frames[: len(frames) // world() * world()]
    frames = frames[rank() :: world()]
    torch.manual_seed(rank())  # of the noise of flow matching
    # The sum of the losses, and the number of steps.
    totals = torch.zeros(2, dtype=torch.float64, device=policy.device)
    for start in range(0, len(frames), micro_batch):
        batch = demos.batch(frames[start : start + micro_batch])
        keep = unpadded_steps(policy, batch)
        loss = step_losses(policy, batch, np.arange(len(keep)), torch.from_numpy(batch["images"]))
        totals += torch.stack([(keep * loss).sum(), keep.sum()]).double()
    total, steps = all_sum(totals).tolist()
    return total / steps


# ---- Stage I -----------------------------------------------------------------------------------


def warm_start(options):
    """Run Stage I on this rank: train, save, evaluate.

    options: Options(..).resolve(). Returns OUT/policy, or None if a signal stopped the training.
    Raises ValueError for what is wrong with the data or the checkpoint.
    """
    start = time.perf_counter()
    out = pathlib.Path(options.out)
    policy = load_start(options)
    say_notes(options.policy, policy)
    if options.augment == "openvla" and policy.kind == "openvla" and options.steps:
        policy.settings["center_crop"] = True  # trained on random crops, used on the central one
    if options.steps and not train(policy, options):
        say(
            f"interrupted; the same command goes on from {out}/resume.pt, with --resume unless it "
            "is rl_cotrain.py"
        )
        return None
    if options.fsdp:
        policy = whole_policy(policy, options)
    save_policy(policy, out)
    seconds = time.perf_counter() - start
    say(f"wrote {out}/policy after {seconds:.0f} s on {world()} ranks ({policy.device.type})")
    if options.eval_episodes:
        tasks = task_names(options.task)
        rates = evaluate.success_rates(
            policy, tasks, ("sim", "real"), options.eval_episodes, rank(), world()
        )
        rows = {cell: evaluate.summary(episodes) for cell, episodes in rates.items()}
        if rank() == 0:
            result = dict(results=rows, seconds=seconds, ranks=world())
            policies.write_json(out / "result.json", result)
    return out / "policy"


def load_start(options):
    """Return the policy that Stage I starts from."""
    return policies.load_policy(
        options.policy,
        this_device(),
        options.dtype,
        lora_rank=options.lora_rank,
        freeze=options.freeze,
        gradient_checkpointing=options.lora_rank > 0 or options.fsdp,
        seed=options.seed,
        **policies.parse_load(options.load),
    )


def train(policy, options):
    """Minimise L on the demonstrations. Returns False if a signal stopped the loop."""
    out = pathlib.Path(options.out)
    training, held_out = open_demonstrations(options, policy)
    if options.statistics == "data":
        policy.set_statistics("demos", demonstration_statistics(policy, training, options))
        source = f"of the training demonstrations ({' and '.join(training)})"
        say(f"statistics: {source}")
    else:
        source = f"of {options.policy}"
        warn_beyond_range(policy, training)
    describe_demonstrations(policy, training, source)
    sampler = real_data.MixSampler(
        training.get("sim"),
        training.get("real"),
        options.sim_ratio,
        options.batch,
        options.seed,
        rank(),
        world(),
    )
    if options.fsdp:
        share_weights(policy)
    trained = trainable(policy)
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(
        parameter_groups(trained, options.weight_decay), options.lr, betas=(0.9, options.beta2)
    )
    average = {name: p.detach().clone() for name, p in trained.items()} if options.ema else None
    step = 0
    start = start_of(policy)
    if options.resume:
        state = load_state(out / "resume.pt", vars(options), trained, **start)
        load_optimizer(optimizer, state["optimizer"])
        sampler.load_state_dict(state["sampler"])
        if average is not None:
            restore(average, state["average"])
        step = state["step"]

    def save():
        save_state(
            out / "resume.pt",
            vars(options),
            trained,
            optimizer=optimizer.state_dict(),
            sampler=sampler.state_dict(),
            average=average,
            step=step,
            **start,
        )

    write_args(options)
    log = Log(out, step)
    finite = FiniteGuard()
    bar = tqdm(total=options.steps, initial=step, desc=out.name, unit="step", disable=rank() > 0)
    with Signals() as signals, bar:
        while step < options.steps and not signals.received():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options)
            # Augmentation and flow matching draw from the global generator.
            torch.manual_seed(random_seed(options.seed, step, rank()))
            totals = torch.zeros(2, dtype=torch.float64, device=policy.device)
            batch = next(sampler)
            for loss, parts in supervised_losses(policy, batch, options):
                loss.backward()
                totals += parts
            if not options.fsdp:  # which sums them during backward()
                sum_gradients(parameters)
            grad_norm = nn.utils.clip_grad_norm_(parameters, options.max_grad_norm or math.inf)
            grad_norm = gathered(grad_norm)
            if finite.check(f"step {step}", grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                update_average(average, trained, options.ema)
            step += 1

            logs = dict(zip(("loss/real", "loss/sim"), all_sum(totals).tolist()))
            logs.update(grad_norm=grad_norm.item(), lr=group["lr"], skipped=finite.skipped)
            if step % VALIDATE_EVERY == 0 or step == options.steps:
                for domain, demos in held_out.items():
                    logs[f"held_out/{domain}"] = held_out_loss(policy, demos, options.micro_batch)
            if step % LOG_EVERY == 0 or step == options.steps:
                log.write(step, logs)
            bar.set_postfix_str(f"real {logs['loss/real']:.3g} sim {logs['loss/sim']:.3g}")
            bar.update()
            if step % SAVE_EVERY == 0:
                save()
    save()
    if rank() == 0:
        with evaluate.forgiven(out / "loss.png"):
            evaluate.curves({out.name: log.rows}, out / "loss.png")
    if step == options.steps and average is not None:
        restore(trained, average)
    return step == options.steps


@torch.no_grad()
def update_average(average, trained, decay):
    """average <- decay * average + (1 - decay) * weights"""
    for name, p in trained.items():
        average[name].lerp_(p, 1 - decay)


def learning_rate(step, options):
    """Linear warm-up, then a cosine down to final_lr of the peak, as in openpi."""
    if step < options.warmup:
        return options.lr * (step + 1) / (options.warmup + 1)
    last = options.decay_steps or options.steps
    progress = min(1, (step - options.warmup) / max(1, last - options.warmup))
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
    return options.lr * (options.final_lr + (1 - options.final_lr) * cosine)


# ---- demonstrations ----------------------------------------------------------------------------


def open_demonstrations(options, policy):
    """Open the demonstrations of the domains that alpha needs; the other domain is never opened.

    Returns two dicts {"real": Demos, "sim": Demos}: for training, and held out. Records what is
    neither given nor there yet.
    """
    training = {}
    held_out = {}
    if options.sim_ratio < 1:
        training["real"], held_out["real"] = open_domain(
            "real", options.real_data, options, policy
        )
    if options.sim_ratio > 0:
        training["sim"], held_out["sim"] = open_domain("sim", options.sim_data, options, policy)
    return training, {domain: demos for domain, demos in held_out.items() if demos is not None}


def open_domain(domain, given, options, policy):
    """Open one domain: (training, held-out) demonstrations without pauses.

    given: a LeRobot folder or hub id; None: the recorded ones.
    """
    path = given or recorded(domain, options, policy.image_size)
    chosen = {}
    if domain == "real" and given:
        chosen = dict(cameras=options.camera, convert=options.convert)

    def read():
        return real_data.open_dataset(
            path, policy.image_size, policy.horizon, fit=policy.fit, **chosen
        )

    demos = rank_0_first(read)  # it decodes the frames into the cache
    check_inputs(policy, demos)
    policies.check_texts(policy, list(dict.fromkeys(demos.instructions)))
    if not policy.reads_state:
        demos.states = demos.states[:, :0]  # its size may differ between simulation and robot
    parts = []
    for part in demos.split(options.held_out):
        if part is not None:
            # A demonstrator waits for the gripper, or to think. A policy that sees one image cannot
            # know for how long, and would learn to wait for ever.
            part = part.without_pauses(options.pause * envs.CONTROL_HZ / demos.fps)
        parts.append(part)
    if given:
        frames = sum(len(part) for part in parts if part is not None)
        recording = demos.recording
        say(
            f"{path}: {len(demos.lengths)} episodes, {frames} of {len(demos)} frames move (--pause)"
        )
        say(f"{path}: camera {' '.join(recording.cameras)} out of {' '.join(recording.available)}")
        conventions = " ".join(map(str, options.convert or ["as the contract has them"]))
        say(f"{path}: actions and gripper {conventions} (--convert)")
        if demos.fps != envs.CONTROL_HZ:
            say(
                f"{path}: {demos.fps:g} actions a second, but {envs.CONTROL_HZ} in simulation, "
                "where a step means more or less: see --convert control-rate"
            )
    return parts


def check_inputs(policy, demos):
    """Raise one ValueError with what the policy cannot read of these demonstrations."""
    problems = policies.Problems()
    cameras = demos.recording.cameras
    one = 5 not in getattr(policy, "image_ndims", (4, 5))
    remedy = f"--camera {cameras[0]}"
    problems.need(not one or len(cameras) == 1, "--camera", cameras, "one for this policy", remedy)
    size = demos.states.shape[1]
    stated = size > 0 or not policy.reads_state
    remedy = "--load discrete_state=false"
    problems.need(stated, "state", "none in the data", "one, for the policy's prompt", remedy)
    problems.stop()


def recorded(domain, options, size):
    """Folder of recorded demonstrations; rank 0 records them on all cores if they are missing."""
    episodes = options.sim_episodes if domain == "sim" else options.real_episodes
    path = pathlib.Path(
        options.demos, f"{domain}-{options.task}-{episodes}-seed{options.seed}-{size}px"
    )

    def record():
        if not path.exists():
            say(f"recording {path}")
            real_data.make_demos(
                options.task, domain, episodes, path, options.seed, image_size=size
            )

    rank_0_first(record)
    return path


def demonstration_statistics(policy, training, options):
    """Statistics of all training demonstrations together, for policy.set_statistics: sim and real
    count by alpha, as they do in training."""
    weights = None
    if len(training) == 2:
        weights = [1 - options.sim_ratio, options.sim_ratio]
    stats = real_data.dataset_statistics(list(training.values()), weights)
    if not policy.reads_state:
        stats.pop("state", None)
    return stats


def describe_demonstrations(policy, training, statistics):
    """Note in policy.deployment what it is trained on; cameras and rate of the real ones count."""
    instructions = [text for demos in training.values() for text in demos.instructions]
    demos = training.get("real") or training["sim"]
    describe(
        policy,
        instructions,
        cameras=demos.recording.cameras,
        control_hz=float(demos.fps),
        statistics=statistics,
    )


def describe(policy, instructions, **known):
    """Note in policy.deployment, which is saved, what a robot must know that this policy moves.

    instructions: those it is trained on now. known: cameras, control_hz and statistics. What is
    not given is as in the checkpoint, or else as in simulation.
    """
    simulated = dict(
        cameras=[real_data.CAMERA],
        control_hz=float(envs.CONTROL_HZ),
        actions=policies.ACTIONS,
        statistics="of the checkpoint",
        base=policy.base,
    )
    trained_on = {*policy.deployment.get("instructions", ()), *instructions}
    policy.deployment = {**simulated, **policy.deployment, **known}
    policy.deployment["instructions"] = sorted(trained_on)


def warn_beyond_range(policy, training):
    """Warn of demonstrations that reach beyond the range the policy scales by."""
    for demos in training.values():
        share, beyond = real_data.beyond_range(demos, policy)
        if share > 0:
            warnings.warn(beyond)


# ---- image augmentation ------------------------------------------------------------------------


@dataclasses.dataclass
class Augmentation:
    """Strengths of one recipe; a factor f multiplies by 1 - f .. 1 + f."""

    crop: float = 1.0  # side of the random crop, as a share of the image's
    turn: float = 0.0  # degrees
    shift: int = 0  # whole pixels, so that nothing is blurred
    brighten: float = 0.0  # added to an image in [0, 1]
    brightness: float = 0.0  # factor
    contrast: float = 0.0  # factor, about the mean of the image
    saturation: float = 0.0  # factor
    hue: float = 0.0  # share of a full turn


AUGMENTATIONS = dict(
    openvla=Augmentation(crop=0.9**0.5, brighten=0.2, contrast=0.2, saturation=0.2, hue=0.05),
    pi05=Augmentation(crop=0.95, turn=5.0, brightness=0.3, contrast=0.4, saturation=0.5),
    shift=Augmentation(shift=2, brightness=0.2, contrast=0.2, saturation=0.05),
)


def augment(images, recipe):
    """Augment (B, [N,] H, W, 3) uint8 images by a recipe of AUGMENTATIONS, each with its own draws.

    Crops and turns are for the first of N cameras only, as in openpi. Hue is turned in YIQ, which
    is close to the official HSV for turns this small.
    """
    strength = AUGMENTATIONS[recipe]
    flat = images.flatten(0, -4).permute(0, 3, 1, 2).float() / 255  # (B N, 3, H, W)
    count = len(flat)
    height, width = flat.shape[2:]
    device = images.device

    def draw(*shape):
        return 2 * torch.rand(count, *shape, device=device) - 1  # uniform in [-1, 1]

    angle = torch.deg2rad(strength.turn * draw())
    move = (1 - strength.crop) * draw(2)
    if strength.shift:
        pixels = (draw(2) * (strength.shift + 0.5)).round()
        move = pixels * 2 / torch.tensor([width, height], device=device)
    affine = torch.cat([strength.crop * rotation(angle), move[:, :, None]], 2)  # (B N, 2, 3)
    if images.ndim == 5:
        other_cameras = torch.arange(count) % images.shape[1] > 0
        affine[other_cameras] = torch.eye(2, 3, device=device)
    grid = F.affine_grid(affine, flat.shape, align_corners=False)
    y = F.grid_sample(flat, grid, padding_mode="border", align_corners=False)

    y = y * (1 + strength.brightness * draw(1, 1, 1)) + strength.brighten * draw(1, 1, 1)
    mean = y.mean((1, 2, 3), keepdim=True)
    y = (y - mean) * (1 + strength.contrast * draw(1, 1, 1)) + mean
    grey = (y * torch.tensor([0.299, 0.587, 0.114], device=device)[:, None, None]).sum(
        1, keepdim=True
    )
    y = (y - grey) * (1 + strength.saturation * draw(1, 1, 1)) + grey
    if strength.hue:
        yiq = torch.tensor(
            [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]],
            device=device,
        )
        turn = torch.eye(3, device=device).repeat(count, 1, 1)
        turn[:, 1:, 1:] = rotation(2 * math.pi * strength.hue * draw())
        y = torch.einsum("nij,njhw->nihw", yiq.inverse() @ turn @ yiq, y)
    y = (y.clamp(0, 1) * 255).round().to(torch.uint8)
    return y.permute(0, 2, 3, 1).reshape(images.shape)


def rotation(angle):
    """(n, 2, 2) matrices that turn by angle (n,) [rad]."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)


# ---- plumbing shared with rl_cotrain.py: skip on first reading ---------------------------------


def resolve_options(options, new):
    """Fill in the preset and check all options; see Options.resolve."""
    problems = policies.Problems()
    kind, name = policy_kind(options.policy, options.load)
    for key, value in PRESETS[kind].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    for domain, episodes in RECORDED.items():
        given = getattr(options, f"{domain}_data") and getattr(options, f"{domain}_episodes")
        what = f"--{domain}-episodes, --{domain}-data"
        problems.need(not given, what, "both", "one: a given data set is not recorded", "one")
        if getattr(options, f"{domain}_episodes") is None:
            setattr(options, f"{domain}_episodes", episodes)
    if options.out is None:
        data = f"real{options.real_episodes}"
        if options.real_data:
            data = pathlib.Path(options.real_data).name
        alpha = f"alpha{options.sim_ratio:g}"
        options.out = f"runs/sft-{name}-{options.task}-{alpha}-{data}-seed{options.seed}"
    check_range(problems, options, "sim_ratio held_out final_lr", 0, 1)
    check_range(
        problems,
        options,
        "steps warmup decay_steps max_grad_norm pause eval_episodes lora_rank seed ranks",
        0,
    )
    check_range(problems, options, "batch micro_batch", 1)
    check_range(problems, options, "sim_episodes real_episodes", 2)
    problems.need(
        options.lr > 0, "--lr", options.lr, "more than 0", f"--lr {PRESETS[kind]['lr']}"
    )
    problems.need(
        options.seed != evaluate.EVAL_SEED,
        "--seed",
        options.seed,
        "another one: evaluation uses it",
        "--seed 0",
    )
    problems.need(
        options.real_data or not (options.camera or options.convert),
        "--camera, --convert",
        "no --real-data",
        "the data set they are about",
        "--real-data FOLDER",
    )
    if new:
        unused = options.sim_ratio == 1 and (options.real_data or options.camera or options.convert)
        problems.need(
            not unused,
            "--real-data, --camera, --convert",
            "--sim-ratio 1, which never opens real data",
            "--sim-ratio below 1",
            "--sim-ratio 0.5",
        )
        problems.need(
            not (options.sim_ratio == 0 and options.sim_data),
            "--sim-data",
            "--sim-ratio 0, which never opens it",
            "--sim-ratio above 0",
            "--sim-ratio 0.5",
        )
        check_run_folder(problems, options)
    problems.stop()
    options.ranks = options.ranks or default_ranks(options.batch)
    if options.fsdp:
        whole = options.lora_rank == 0 and options.freeze == "none"
        part = f"--lora-rank {options.lora_rank} --freeze {options.freeze}"
        problems.need(whole, "--fsdp", part, "all weights to train", "without --fsdp")
        even = options.ranks > 1 and options.batch % options.ranks == 0
        got = f"--ranks {options.ranks} --batch {options.batch}"
        problems.need(even, "--fsdp", got, "two ranks or more that divide the batch", "--ranks 2")
        problems.stop()
    return options


def policy_kind(name, load):
    """Which preset fits a policy, and a short name for its runs: ("openvla-tiny", "openvla").

    load: the key=value pairs of --load, which may name another base for adapters.
    """
    base = policies.parse_load(load).get("base")
    config = policies.read_json(policies.find_base(name, base)[0] / "config.json", {})
    kind = policies.kind_of(config)
    if kind not in policies.BUNDLED:
        raise ValueError(
            f"--policy {name}: got a checkpoint of kind {kind}; need "
            f"{' or '.join(policies.BUNDLED)}; try the folder that holds its config.json"
        )
    tiny = "tiny_timm_kwargs" in config or config.get("vlm", {}).get("width", 2048) < 1024
    folder = pathlib.Path(name)
    if folder.name == "policy":  # RUN/policy goes by the name of RUN
        folder = folder.parent
    return f"{kind}-tiny" if tiny else kind, folder.name


def task_names(task):
    """The tasks that --task names."""
    return list(envs.TASKS) if task == "all" else [task]


def trainable(policy):
    """{name: parameter} of what trains."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


def parameter_groups(trained, weight_decay, **settings):
    """Optimizer groups: matrices with weight decay; biases, norms and single vectors without."""
    matrices = [p for p in trained.values() if p.ndim > 1]
    vectors = [p for p in trained.values() if p.ndim <= 1]
    return [
        dict(params=matrices, weight_decay=weight_decay, **settings),
        dict(params=vectors, weight_decay=0.0, **settings),
    ]


def start_of(policy):
    """What a resumed run must start from, too: the weights that do not train, as their sum, and
    the statistics."""
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    total = math.fsum(p.sum(dtype=torch.float64).item() for p in frozen)
    return dict(frozen=total, statistics=json.dumps(getattr(policy, "statistics", None)))


class FiniteGuard:
    """Skips optimizer steps whose gradients are not finite; five in a row end the run."""

    def __init__(self):
        self.skipped = 0
        self.in_a_row = 0

    def check(self, where, *values):
        """True if all values are finite; counts the step as skipped otherwise."""
        if all(math.isfinite(value) for value in values):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == 5:
            raise RuntimeError(
                f"{where}: got a gradient that is not finite 5 times in a row; need finite ones; "
                "try a lower --lr, and look at the data with `python real_data.py DATASET`"
            )
        return False


def random_seed(*key):
    """A seed from whole numbers (seed, step, rank, ..), so that no generator state can be lost."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


# -- FSDP: weights, gradients and Adam's moments in shares, one a rank


def share_weights(policy):
    """Let the ranks share a policy's weights; each block is put together while it computes.

    Gradients are summed over ranks during the backward pass (FSDP2).
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    for module in list(policy.modules()):
        if isinstance(module, nn.ModuleList):  # of transformer blocks
            for block in module:
                fully_shard(block)
    fully_shard(policy)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # and not a mean over ranks
            module.set_gradient_divide_factor(1.0)
    register_fsdp_forward_method(policy, "bc_loss")


def gathered(value, for_saving=False):
    """Put shares together, in dicts and lists of any depth, too. Every rank must call this.

    for_saving: one after the other goes to the CPU of rank 0; the other ranks get None.
    """
    if isinstance(value, dict):
        return {key: gathered(each, for_saving) for key, each in value.items()}
    if isinstance(value, list):
        return [gathered(each, for_saving) for each in value]
    if not hasattr(value, "full_tensor"):
        return value
    whole = value.full_tensor()
    if not for_saving:
        return whole
    return whole.cpu() if rank() == 0 else None


def share_of(whole, like):
    """Return this rank's share of a tensor, if `like` is a share: the inverse of gathered()."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def load_optimizer(optimizer, state):
    """Load a state of an optimizer whose parameters may be shares."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in state["state"].items():
        for name, value in moments.items():
            if value.shape == parameters[index].shape:
                moments[name] = share_of(value, parameters[index])
    optimizer.load_state_dict(state)


def whole_policy(shared, options):
    """Return a policy with whole weights on each rank, as trained in shares."""
    policy = load_start(options)
    for p, share in zip(policy.parameters(), shared.parameters()):
        p.data.copy_(gathered(share))
    policy.statistics = shared.statistics
    policy.settings = shared.settings
    policy.deployment = shared.deployment
    return policy


# -- ranks


def rank():
    """Number of this process among all ranks."""
    return int(os.environ.get("RANK", 0))


def world():
    """Number of ranks."""
    return int(os.environ.get("WORLD_SIZE", 1))


def barrier():
    if dist.is_initialized():
        dist.barrier()


def rank_0_first(job):
    """Run job() on rank 0, then on the others. An error of the user's is raised on all of them."""
    message = [None]
    if rank() == 0:
        try:
            result = job()
        except (ValueError, OSError) as error:
            message = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(message, device=this_device())
    if message[0] is not None:
        raise ValueError(message[0])
    return result if rank() == 0 else job()


def all_sum(tensor):
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def summed(tensors):
    """Sums over ranks of a list of tensors, sent in buckets: faster than a message for each."""
    sums = []
    bucket = []
    size = 0
    for x in tensors:
        bucket.append(x)
        size += x.numel()
        if len(sums) + len(bucket) == len(tensors) or size > BUCKET:
            flat = all_sum(torch.cat([x.flatten() for x in bucket]))
            parts = flat.split([x.numel() for x in bucket])
            sums += [part.view_as(x) for part, x in zip(parts, bucket)]
            bucket = []
            size = 0
    return sums


def sum_gradients(parameters):
    """Replace gradients by their sum over ranks. What no rank has touched keeps no gradient."""
    if dist.is_initialized():
        for p, gradient in zip(parameters, summed(gradients_of(parameters))):
            p.grad = gradient if gradient.any() else None


def gradients_of(parameters):
    """The gradients so far, not copied; zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def this_device():
    """The GPU of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def default_ranks(shared):
    """One rank per GPU or CPU core, but no more than divide what they share evenly."""
    most = torch.cuda.device_count() or real_data.cores()
    ranks = max(n for n in range(1, most + 1) if shared % n == 0)
    if ranks < most and "RANK" not in os.environ:
        say(f"{ranks} ranks, not {most}, one for each GPU or core: they share {shared} evenly")
    return ranks


def run_script(job, parse):
    """Be main() of both stages: parse the flags, then run job(args) on every rank.

    With several ranks this starts the script again under torch.distributed.run, which looks after
    processes and signals. Exits with 0, 1 (error) or 130 (stopped by a signal).
    """
    with evaluate.reported(spokesman=rank() == 0):
        args = parse(sys.argv[1:])
        if args.ranks > 1 and "RANK" not in os.environ:
            sys.exit(start_ranks(args.ranks))
        with process_group(), only_run(args.out):
            sys.exit(0 if job(args) else 130)


@contextlib.contextmanager
def only_run(out):
    """Hold a run's folder; ValueError if another process holds it."""
    lock = run_lock(out)
    try:
        if rank() == 0:
            lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(
            f"--out: got {out}, to which a running process writes; need a folder of its own; try "
            "another --out, or to wait"
        )
    try:
        yield
    finally:
        lock.release()


def run_lock(out):
    """Return the lock of a run's folder, which lies elsewhere: it may not be there yet."""
    name = hashlib.sha256(str(pathlib.Path(out).resolve()).encode()).hexdigest()[:16]
    return filelock.FileLock(pathlib.Path(tempfile.gettempdir(), f"rlco-{name}.lock"))


def start_ranks(count):
    """Run this command as `count` processes of one thread each. Returns the exit status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ["OMP_NUM_THREADS"] = "1"  # two ranks of one thread beat one of two by far
    try:
        run.main(["--standalone", f"--nproc-per-node={count}", *sys.argv])
    except ChildFailedError as error:  # the rank itself has said why
        return max(failure.exitcode for failure in error.failures.values())
    except SignalException:
        return 130
    return 0


@contextlib.contextmanager
def process_group():
    """Use one thread, and join the other ranks if torch.distributed.run started this process."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # common in gradients, about 3x slower on CPUs
    if "RANK" not in os.environ:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(this_device())
    # The other ranks wait while rank 0 records demonstrations, or saves.
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


class Signals:
    """Ctrl-C and SIGTERM inside this context ask the loop to stop, so that it can save first."""

    def __enter__(self):
        self.flag = torch.zeros(1, device=this_device())
        self.before = {
            number: signal.signal(number, self.handle)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        self.flag.fill_(1)

    def received(self):
        """True on all ranks as soon as one has got a signal."""
        return bool(all_sum(self.flag.clone()))  # a copy: a signal may come while it is summed


def say_notes(name, policy):
    """Say what was chosen for the user while a checkpoint was loaded."""
    for note in getattr(policy, "notes", []):
        say(f"{name}: {note}")


def say(text):
    """Print a message of rank 0 without breaking a progress bar."""
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


# -- command line


def parse_flags(cls, argv, description):
    """Flags -> an instance of the dataclass cls; each field made by flag() is a flag."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        name = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        choices = field.metadata["choices"]
        if field.type is bool:
            parser.add_argument(name, action="store_true", help=text)
        elif field.type is list:
            parser.add_argument(name, nargs="*", choices=choices, help=text)
        else:
            if field.default not in (None, ""):
                text += f" (default: {field.default})"
            parser.add_argument(
                name, type=field.type, default=field.default, choices=choices, help=text
            )
    return cls(**vars(parser.parse_args(argv)))


def check_range(problems, args, names, low, high=math.inf):
    """Note the fields of args, named in one string, that are outside [low, high]."""
    for name in names.split():
        value = getattr(args, name)
        limit = f"{low} or more" if high == math.inf else f"{low} to {high}"
        problems.need(
            low <= value <= high and value < 2**63,
            f"--{name.replace('_', '-')}",
            value,
            limit,
            "a value in that range",
        )


def check_run_folder(problems, args):
    """Note a folder that already holds another run, or, with --resume, none."""
    exists = pathlib.Path(args.out, "resume.pt").exists()
    if args.resume:
        problems.need(
            exists,
            "--resume",
            f"no resume.pt in {args.out}",
            "an interrupted run",
            "without --resume",
        )
    else:
        problems.need(
            not exists,
            "--out",
            f"{args.out}, which holds a run",
            "a new folder",
            "--resume to go on with it, or another --out",
        )


def changed_flags(before, now):
    """Differences of two dicts of flags that can change a result: ["--lr was 1, is 2"]."""
    free = ("resume", "ranks", "fsdp", "out", "command", "sft", "eval_episodes")
    return [
        f"--{name.replace('_', '-')} was {value}, is {now.get(name)}"
        for name, value in before.items()
        if name not in free and now.get(name) != value
    ]


# -- files


def write_args(args):
    """OUT/args.json: the command and every flag. Called once nothing can be refused any more."""
    if rank() == 0:
        policies.write_json(
            pathlib.Path(args.out, "args.json"), dict(dataclasses.asdict(args), command=sys.argv)
        )


def save_state(path, args, trained, **state):
    """Write all that changes while training, by rank 0, under a temporary name, then rename."""
    weights = gathered({name: p.detach() for name, p in trained.items()}, for_saving=True)
    state = gathered(state, for_saving=True)
    if rank() > 0:
        return
    with room_for(path), policies.replacing(path) as part, open(part, "wb") as file:
        torch.save(dict(state, args=args, weights=weights), file)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def room_for(path):
    """Say in our words what torch and safetensors say in theirs if a file cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"{path}: got {error}; need room on the disk, and the right to write; try to free "
            "some, then --resume; the last whole version is still there"
        ) from error


def load_state(path, args, trained, **expected):
    """Read what save_state wrote and copy its weights into `trained`.

    expected: values that must be the saved ones. ValueError if they, or the flags, are others.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    changed = changed_flags(state["args"], args)
    for name, value in expected.items():
        if state.get(name) != value:
            changed.append(f"the {name} of its start was another")
    if set(state["weights"]) != set(trained):
        changed.append("other weights train")
    if changed:
        raise ValueError(
            f"--resume: got {'; '.join(changed)}; need the run that {path} is of; try the command "
            "in args.json, or another --out"
        )
    restore(trained, state["weights"])
    return state


@torch.no_grad()
def restore(trained, weights):
    """Copy weights {name: tensor} into the parameters of that name."""
    for name, p in trained.items():
        p.copy_(share_of(weights[name], p))


def save_policy(policy, out):
    """Write OUT/policy, by rank 0. At any moment an older or the newer folder is there, whole."""
    if rank() > 0:
        return
    part = out / "policy.part"
    old = out / "policy.old"
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    with room_for(part):
        policy.save(part)
    if (out / "policy").exists():
        os.replace(out / "policy", old)
    os.replace(part, out / "policy")
    shutil.rmtree(old, ignore_errors=True)


class Log:
    """metrics.jsonl: one JSON object a line, written by rank 0.

    A resumed run drops the lines after its checkpoint: they come again.
    """

    def __init__(self, out, step):
        self.path = out / "metrics.jsonl"
        self.rows = []
        if rank() > 0:
            return
        out.mkdir(parents=True, exist_ok=True)
        if step and self.path.exists():
            lines = self.path.read_text().splitlines()
            whole = [
                json.loads(line) for line in lines if line.endswith("}")
            ]  # a kill may cut the last
            self.rows = [row for row in whole if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, step, values):
        """Append one line."""
        row = dict(step=step, **{name: round(value, 6) for name, value in values.items()})
        self.rows.append(row)
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")


def parse(argv):
    """Command line -> Options, resolved."""
    return parse_flags(Options, argv, __doc__).resolve()


if __name__ == "__main__":
    run_script(warm_start, parse)
