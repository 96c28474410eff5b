"""Stage II of RL-Co: reinforcement learning in simulation, anchored by supervision on real demonstrations.

    L = L_PPO(simulation) + lambda_real * L_SFT(real demos)                 RL-Co, arXiv 2602.12628

    python rl_cotrain.py --policy openvla --lambda-real 0.1           # the main job: demos, Stage I, Stage II, tables
    python rl_cotrain.py --policy pi05 --task push-cube
    python rl_cotrain.py --checkpoint openvla/openvla-7b --lora-rank 32 --dtype bf16 --real-data my/robot
    python rl_cotrain.py ... --resume                                 # after Ctrl-C, a crash or a power cut

Main job  records demonstrations, warm-starts (sft_warmstart.py), then loops over rollout -> advantages -> update,
          evaluates the policy before and after in both domains, and writes a table, curves, videos, a checkpoint.
          What is there already (demos, Stage I with the same flags) is used again.
Ranks     each has its own simulators and its share of every minibatch and real batch; gradients are summed.
Symbols   T decisions, N environments of a rank, M samples of a minibatch over all ranks, K steps per decision
Cases     --lambda-real 0: plain RL in simulation, real data is never opened.   --init base: no Stage I.
          --sim-ratio 0: Stage I on real demos only.   --sim-ratio 1 --lambda-real 0: no real data anywhere.
Departs from the paper's own code:
 1. The real batch per optimizer step is a flag, whatever the number of ranks; it is drawn anew in every pass.
 2. Both policies can be co-trained. Both gradients, their norms and their cosine are logged, and lambda is tested.
 3. Advantages are normalised over all ranks; only a time limit bootstraps, a success does not.
 4. The tiny presets judge by a critic that reads the simulator's state (--critic state), as only simulation needs one:
    the policy gradient of 10,000 decisions then agrees with that of 10,000 others, instead of being noise.
 5. Every iteration starts with new episodes: its first episodes are an unbiased success rate, and resuming is exact.
Output    OUT/policy, metrics.jsonl, curves.png, result.json, videos/, resume.pt; "stand-in" is the second MuJoCo
          domain, which takes the place of a real robot: Stage II sees it only through its demonstrations.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import pathlib
import sys
import time

import envs                             # first: it chooses the OpenGL backend before mujoco is imported
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import evaluate
import policies
import real_data
import sft_warmstart
from sft_warmstart import NAMES, all_sum, on_signal, sum_gradients

RL_SEED = 31_000                        # + --seed: of the scenes of Stage II; neither demonstrations' nor evaluation's
BLOCK = 25                              # episodes that a rank evaluates at once
EPISODES = 1 << 12                      # numbers set aside for the episodes of an iteration of a rank
CRITIC_EPOCHS, CRITIC_BATCH, CRITIC_LAMBDA = 10, 256, .95          # of the critic that reads the simulator's state
RATIO_TOLERANCE = dict(float32=1e-3, bfloat16=.1)                  # of the first ratio after a rollout, which is 1
DRIFT = .3                              # nats: bfloat16, |log pi by evaluate - log pi by act|, mean over decisions

# openvla: RL4VLA / RLinf's PPO of OpenVLA. pi05: RLinf's co-training config. The tiny ones were tuned here: they
# practise in random looks and dynamics, to which the VLM must adapt, too, so that only its eyes are frozen.
PRESETS = {
    "openvla": dict(num_envs=64, steps=0, minibatch=160, micro_batch=8, real_batch=40, epochs=1, lr=1e-4,
                    value_lr=3e-3, beta2=.999, clip_norm=10., entropy=0., freeze="none", iterations=400, target_kl=0.,
                    critic_warmup=0, critic="head", gae_lambda=.95, lambda_real=.1, randomise=[]),
    "pi05": dict(num_envs=128, steps=0, minibatch=2560, micro_batch=40, real_batch=128, epochs=2, lr=4e-6,
                 value_lr=2e-4, beta2=.95, clip_norm=1., entropy=.005, freeze="vlm", iterations=1000, target_kl=0.,
                 critic_warmup=0, critic="head", gae_lambda=.95, lambda_real=.1, randomise=[]),
    "openvla-tiny": dict(num_envs=64, steps=0, minibatch=640, micro_batch=320, real_batch=160, epochs=2, lr=2e-4,
                         value_lr=1e-3, beta2=.95, clip_norm=1., entropy=0., freeze="vision", iterations=70,
                         target_kl=.1, critic_warmup=2, critic="state", gae_lambda=.9, lambda_real=.1,
                         randomise=["visual", "dynamics"])}
PRESETS["pi05-tiny"] = PRESETS["openvla-tiny"] | dict(num_envs=128, steps=20, iterations=50)
TASK_PRESETS = {"pick-place": dict(randomise=[])}              # 6 to 9 % succeed in those looks: too few to learn from

def parse(argv=None):
    """Flags -> args. Those without a default here get that of the policy's preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policy", default="openvla", help="openvla or pi05: the bundled tiny ones")
    add("--checkpoint", help="a checkpoint folder or hub id instead, for instance openvla/openvla-7b")
    add("--task", default="open-drawer", help=f"{', '.join(envs.TASKS)}, or all")
    add("--init", default="sft", help="sft (run Stage I, or find it), base (no Stage I), or a checkpoint folder")
    add("--sft-task", default="all", choices=(*envs.TASKS, "all"), help="of both stages' demonstrations")
    add("--iterations", type=int, help="of rollout and update, >= 0")
    add("--gamma", type=float, default=.99, help="discount per decision, 0 to 1")
    add("--clip", type=float, default=.2, help="epsilon of PPO's ratio, > 0")
    add("--value-clip", type=float, default=.2, help="how far a value may move from the rollout's; 0 = any")
    add("--value-weight", type=float, help="of the value head's loss, >= 0; default: 1, 0 if --critic is state")
    add("--out", help="folder of this run; default runs/rl-POLICY-TASK-lambdaL-seedS")
    add("--resume", action="store_true", help="go on from OUT/resume.pt; all flags but --iterations as they were")
    add("--save-every", type=int, default=10, help="iterations between resume.pt; 0 = only at the end")
    add("--eval-episodes", type=int, default=100, help="per task and domain, before and after; 0 = none")
    add("--eval-every", type=int, default=0, help="iterations between evaluations (50 episodes, if there are as many "
                                                  "in --eval-episodes) for the curves; 0 = none")
    add("--watch-real", action="store_true", help="log the loss on held-out real demos; opens them also if lambda is 0")
    add("--seed", type=int, default=0, help="of everything but the evaluation's scenes, >= 0")
    add("--device", help="cpu or cuda; default: cuda if there is one")
    add("--ranks", type=int, default=0, help="processes; 0 = one per GPU, else one per CPU core; torchrun knows better")
    add("--gradient-checkpointing", action="store_true", help="a third more time, far less memory")
    add("--dtype", help="float32 or bf16 (autocast over float32 weights)")
    group = parser.add_argument_group("Stage I and demonstrations (see sft_warmstart.py)")
    for flag, kind, text in (
            ("sim-ratio", float, "alpha, 0 to 1"), ("sim-data", str, "LeRobot data set; default: recorded"),
            ("real-data", str, "the same, of your robot"), ("sim-episodes", int, "to record per task"),
            ("real-episodes", int, "to record per task"), ("demos", str, "folder for what is recorded"),
            ("camera", str, "image features of --real-data"), ("action-key", str, "its action feature"),
            ("state-key", str, "its state feature"), ("task-key", str, "its text column"),
            ("held-out", float, "share of episodes kept out of training"), ("pause", float, "m in .2 s; 0 = keep all"),
            ("tokenizer", str, "tokenizer.json of a checkpoint without one"),
            ("lora-rank", int, "0 = train the weights themselves"), ("augment", str, "of demonstrations' images"),
            ("sft-steps", int, "optimizer steps of Stage I")):
        group.add_argument("--" + flag, type=kind, nargs="+" if flag == "camera" else None, help=text)
    group = parser.add_argument_group("defaults from the preset", "; ".join(f"{k}: {v}" for k, v in PRESETS.items()))
    for flag, kind, text in (
            ("lambda-real", float, "weight of L_SFT(real), >= 0; 0 = plain RL, real data is never opened"),
            ("num-envs", int, "environments over all ranks, each has the same number of them"),
            ("steps", int, "T: decisions per environment and iteration; 0 = the task's time limit"),
            ("minibatch", int, "decisions per optimizer step over all ranks, about: an iteration is cut evenly"),
            ("micro-batch", int, "decisions per forward pass of a rank; gradients accumulate"),
            ("real-batch", int, "real samples per optimizer step over all ranks"),
            ("epochs", int, "passes over an iteration's decisions"), ("lr", float, "learning rate, > 0"),
            ("value-lr", float, "of the value head, > 0"),
            ("critic", str, "head (of the policy) or state (a small network that reads the simulator's state)"),
            ("gae-lambda", float, "of generalised advantage estimation, 0 to 1"),
            ("critic-warmup", int, "iterations in which only the critic learns"),
            ("beta2", float, "of AdamW, 0 to 1 (beta1 is 0.9)"),
            ("clip-norm", float, "norm to which gradients are cut; 0 = never"),
            ("entropy", float, "weight of the entropy bonus, >= 0; 0 = none"),
            ("freeze", str, "none, vision (features are computed once per observation), or vlm"),
            ("target-kl", float, "an iteration's updates stop above this KL [nats]; 0 = never")):
        group.add_argument("--" + flag, type=kind, help=text)
    group.add_argument("--randomise", nargs="*", choices=envs.RANDOM, help="drawn anew each episode: visual (looks, "
                       "near camera), dynamics, late (share of pictures); no word: nothing (pick-place's default)")
    return check_args(parser.parse_args(argv))

def check_args(args):
    """Fills in presets; Stage I's flags become args.sft. One ValueError lists all that is wrong."""
    given = args.init not in ("sft", "base") and os.path.isdir(args.init)     # its kind says which preset is meant
    name = args.init if given else args.checkpoint or args.policy
    args.dtype = {"bf16": "bfloat16"}.get(args.dtype, args.dtype)
    # one task is learnt better from demonstrations of all (results/transfer/looks.txt, 7)
    flags = [("--policy", name), ("--task", args.sft_task), ("--seed", args.seed), ("--device", args.device),
             ("--steps", args.sft_steps), ("--dtype", args.dtype), ("--ranks", args.ranks or None),
             ("--eval-episodes", 0)]
    flags += [(f"--{key.replace('_', '-')}", getattr(args, key)) for key in (
        "sim_ratio", "sim_data", "real_data", "sim_episodes", "real_episodes", "demos", "lora_rank", "augment",
        "held_out", "pause", "action_key", "state_key", "task_key", "tokenizer")]
    folder = pathlib.Path(name)              # OUT/policy is known by the name of OUT
    label = folder.parent.name if folder.name == "policy" else folder.name
    chosen = [f"{flag}={value}" for flag, value in flags if value is not None]
    chosen += ["--camera", *args.camera] if args.camera else []
    args.sft = sft_warmstart.parse(chosen + ["--gradient-checkpointing"] * args.gradient_checkpointing)
    args.sft.out = f"runs/sft-{label}-{args.sft_task}-alpha{args.sft.sim_ratio:g}-seed{args.seed}"
    args.dtype, args.augment, args.ranks = args.sft.dtype, args.sft.augment, args.ranks or args.sft.ranks
    for key, value in (PRESETS[args.sft.preset] | TASK_PRESETS.get(args.task, {})).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.value_weight is None:            # a head that judges nothing need not learn
        args.value_weight = float(args.critic == "head")
    args.ranks = min(args.ranks, args.num_envs, args.real_batch)
    label += f"-{args.task}" + "-base" * (args.init == "base")
    args.out = args.out or f"runs/rl-{label}-lambda{args.lambda_real:g}-seed{args.seed}"
    checks = {
        f"--task {args.task}: need one of {', '.join(envs.TASKS)}, all": args.task in (*envs.TASKS, "all"),
        f"--lambda-real {args.lambda_real}: need 0 or more": args.lambda_real >= 0,
        f"--gamma {args.gamma}, --gae-lambda {args.gae_lambda}: need 0 to 1":
            0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1,
        f"--clip {args.clip}, --lr {args.lr}, --value-lr {args.value_lr}: need more than 0":
            min(args.clip, args.lr, args.value_lr) > 0,
        "--num-envs, --minibatch, --micro-batch, --real-batch, --epochs: need 1 or more":
            min(args.num_envs, args.minibatch, args.micro_batch, args.real_batch, args.epochs) > 0,
        f"--critic {args.critic}: need head or state": args.critic in ("head", "state"),
        "--iterations, --steps, --critic-warmup, --eval-episodes, --eval-every, --save-every: need 0 or more": 0 <= min(
            args.iterations, args.steps, args.critic_warmup, args.eval_episodes, args.eval_every, args.save_every),
        "--clip-norm, --entropy, --target-kl, --value-clip, --value-weight: need 0 or more":
            min(args.clip_norm, args.entropy, args.target_kl, args.value_clip, args.value_weight) >= 0,
        f"--init {args.init}: need sft, base, or a folder": args.init in ("sft", "base") or given}
    wrong = [text for text, fine in checks.items() if not fine]
    if wrong:
        raise ValueError("\n".join(wrong))
    if args.resume and not pathlib.Path(args.out, "resume.pt").exists():
        print(f"nothing to resume in {args.out} yet: Stage II starts", file=sys.stderr)        # Stage I may resume
        args.resume = False
    return args

def known_stage(args):
    """What the literature calls the start of this run."""
    names = {0: "SFT on real demos", 1: "SFT on simulated demos"}
    sft = names.get(args.sft.sim_ratio, "SFT co-training")
    return {"sft": sft, "base": "base policy"}.get(args.init, "given policy")

def known_anchor(args):
    """What the literature calls its Stage II, and what is random in its simulation."""
    name = f"RL-Co, lambda {args.lambda_real:g}" if args.lambda_real else "RL in simulation alone"
    return ", ".join([name, *(envs.RANDOM[part] for part in args.randomise)])

# ---- formulas ------------------------------------------------------------------------------------------------

def gae(rewards, values, next_values, ended, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016). All (T, N); next_values[t] = V of the observation that
    decision t led to, before any reset: 0 where the episode terminated, V(final observation) at a time limit.
        delta_t = r_t + gamma V(s_t+1) - V(s_t)        A_t = delta_t + gamma lambda A_t+1, cut where an episode ended
    Returns advantages and value targets A + V."""
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_values[t] - values[t]
        last = delta + gamma * gae_lambda * ~ended[t] * last
        advantages[t] = last
    return advantages, advantages + values

def ppo_loss(logp, entropy, value, old, args):
    """L_PPO of M decisions (Schulman et al. 2017), the mean of
        - min(r A, clip(r, 1 - eps, 1 + eps) A)                             r = exp(logp - logp of the rollout)
        + w max(h(R - V), h(R - V_old - clip(V - V_old, +-c)))              h = Huber, delta 10
        - entropy weight * H
    old: dict of the rollout's logp, value, advantage (normalised), target (M,). Returns the loss, {name: value}."""
    log_ratio = logp - old["logp"]
    ratio, advantage = log_ratio.exp(), old["advantage"]
    policy = -torch.min(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage).mean()
    huber = lambda x: F.huber_loss(x, old["target"], reduction="none", delta=10.)
    error = huber(value)
    if args.value_clip:
        error = torch.max(error, huber(old["value"] + (value - old["value"]).clamp(-args.value_clip, args.value_clip)))
    loss = policy + args.value_weight * error.mean() - args.entropy * entropy.mean()
    return loss, dict(ppo=policy, value=error.mean(), entropy=entropy.mean(), kl=(ratio - 1 - log_ratio).mean(),
                      clipped=((ratio - 1).abs() > args.clip).float().mean(), worst=(ratio - 1).abs().max())

# ---- rollout -------------------------------------------------------------------------------------------------

def inputs(policy, obs, frozen):
    """What act, evaluate and prompt_hidden take: images, or features where the towers are frozen; texts; the state."""
    images = torch.from_numpy(obs["images"])
    if frozen:                               # once per observation; all epochs reuse them
        images = policy.encode_images(images.to(policy.device))
    extra = dict(state=torch.from_numpy(obs["state"])) if policies.reads_state(policy.settings) else {}
    return dict(images=images, instructions=obs["instructions"], **extra)

@torch.no_grad()
def rollout(policy, env, steps, generator, frozen, critic=None):
    """T decisions in each environment, starting with new episodes; V is the policy's value head, or what critic makes
    of the simulator's state. Returns (T, N) lists and tensors of what update() needs, and the log: (successes,
    episodes) of the first episodes of each task (one that T cuts short is no success), sum of rewards, seconds."""
    tensor = lambda x: torch.from_numpy(x).to(policy.device)

    def value(obs):                          # (N,)
        if critic is not None:
            return critic(tensor(obs["truth"]))
        return policy.value_head(policy.prompt_hidden(**inputs(policy, obs, frozen)))[:, 0]

    obs, rows, n = env.reset(), [], env.num_envs
    tasks = env.task.copy()                  # of the first episodes
    outcome, seconds = np.full(n, -1.), dict(act=0., env=0.)
    for _ in range(steps):
        start = time.perf_counter()
        seen = inputs(policy, obs, frozen)
        decision = policy.act(**seen, generator=generator)
        here, truth = decision.value if critic is None else value(obs), tensor(obs["truth"])
        middle = time.perf_counter()
        obs, reward, terminated, truncated, info = env.step(decision.actions.cpu().numpy())
        future = torch.zeros(n, device=policy.device)          # V(final observation) where time was up
        late = [k for k, i in enumerate(info["ended"]) if truncated[i]]
        if late:
            future[info["ended"][late]] = value({
                key: [x[k] for k in late] if key == "instructions" else x[late]
                for key, x in info["final_obs"].items()})
        first = [i for i in info["ended"] if outcome[i] < 0]
        outcome[first] = info["success"][first]
        rows.append((seen, decision, here, future, truth, tensor(reward), tensor(terminated | truncated)))
        seconds["act"] += middle - start
        seconds["env"] += time.perf_counter() - middle
    seen, decisions, *columns = zip(*rows)
    values, futures, truth, rewards, ended = map(torch.stack, columns)                       # (T, N), truth (T, N, 16)
    following = torch.cat([values[1:], value(obs)[None]])
    data = {key: torch.cat([each[key] for each in seen]) for key in seen[0] if key != "instructions"}
    data.update(instructions=[text for each in seen for text in each["instructions"]],
                trace={key: torch.cat([each.trace[key] for each in decisions]) for key in decisions[0].trace},
                logp=torch.cat([each.logp for each in decisions]), values=values, rewards=rewards, ended=ended,
                truth=truth, next_values=torch.where(ended, futures, following))
    score = {}
    for task in env.tasks:
        score |= {f"successes/{task}": (outcome[tasks == task] > 0).sum(), f"episodes/{task}": (tasks == task).sum()}
    return data, dict(score, reward=rewards.sum().item(), **seconds)

# ---- update --------------------------------------------------------------------------------------------------

def take(data, rows):
    """Those rows of what evaluate() needs."""
    device = data["logp"].device
    chosen = {key: data[key][rows.to(data[key].device)].to(device) for key in ("images", "state") if key in data}
    return dict(chosen, instructions=[data["instructions"][i] for i in rows.tolist()],
                trace={key: x[rows] for key, x in data["trace"].items()})

def gradients(policy, data, rows, real, args):
    """p.grad = g_PPO + lambda g_real, summed over ranks, for this rank's rows of the minibatch -> {name: value}.
    real: the endless batches of real demonstrations, or None."""
    params = [p for p in policy.parameters() if p.requires_grad]
    count, sums, worst = all_sum(torch.tensor(float(len(rows)), device=policy.device)), {}, 0.
    for p in params:
        p.grad = None
    for part in rows.split(args.micro_batch):
        old = {key: data[key][part] for key in ("logp", "value", "advantage", "target")}
        loss, stats = ppo_loss(*policy.evaluate(**take(data, part)), old, args)
        share = len(part) / count
        (share * loss).backward()
        worst = max(worst, stats.pop("worst").item())
        for key, value in stats.items():
            sums[key] = sums.get(key, 0.) + (share * value).detach().double()
    sum_gradients(params)
    logs = dict(zip(sums, all_sum(torch.stack(list(sums.values()))).tolist()), worst=worst)
    rl = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    if real is not None:
        for p in params:
            p.grad = None
        logs["real"] = sft_warmstart.loss_and_gradients(policy, next(real), args.sft)["loss/real"]
        anchor = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        dot = sum((a * b).sum() for a, b in zip(rl, anchor)).item()
        norms = [math.sqrt(sum(g.pow(2).sum() for g in each)) for each in (rl, anchor)]
        logs.update(grad_rl=norms[0], grad_real=norms[1], cosine=dot / max(norms[0] * norms[1], 1e-30))
        torch._foreach_add_(rl, anchor, alpha=args.lambda_real)
    for p, g in zip(params, rl):
        p.grad = g
    return logs

class Learner:
    """All that changes while training: weights, optimizer, iteration, position in the real batches."""

    def __init__(self, args, policy, real, rank, world):
        self.args, self.policy, self.real, self.rank, self.world = args, policy, real, rank, world
        self.iteration = self.skipped = 0
        self.named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        self.actor = [p for name, p in self.named.items() if not name.startswith("value_head.")]
        critic = [p for name, p in self.named.items() if name.startswith("value_head.")]
        self.optimizer = torch.optim.AdamW([dict(params=self.actor, lr=args.lr), dict(params=critic, lr=args.value_lr)],
                                           betas=(.9, args.beta2), weight_decay=.01)
        self.critic = None
        if args.critic == "state":           # the same weights on all ranks, whatever happened to the global generator
            torch.manual_seed(args.seed)
            self.critic = nn.Sequential(nn.Linear(envs.TRUTH, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(),
                                        nn.Linear(128, 1), nn.Flatten(-2)).to(policy.device)
            self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.value_lr)

    def update(self, data):
        """Epochs of minibatches over this rank's rollout -> {name: mean over optimizer steps}."""
        args, device = self.args, self.policy.device
        gains = [data[key] for key in ("rewards", "values", "next_values", "ended")] + [args.gamma]
        advantage, target = gae(*gains, args.gae_lambda)                                     # (T, N)
        if self.critic is not None:
            target = gae(*gains, CRITIC_LAMBDA)[1]
        moments = all_sum(torch.stack([torch.ones_like(advantage), advantage, advantage ** 2]).double().sum((1, 2)))
        mean, square = (moments[1:] / moments[0]).tolist()     # over all ranks
        variance = square - mean ** 2
        left = all_sum((target - data["values"]).pow(2).double().sum()) / moments[0]
        spread = all_sum((target - all_sum(target.double().sum()) / moments[0]).pow(2).sum()) / moments[0]
        data.update(advantage=((advantage - mean) / (math.sqrt(max(variance, 0)) + 1e-5)).flatten(),
                    target=target.flatten(), value=data["values"].flatten())
        drift = self.settle(data) if args.dtype == "bfloat16" else 0.
        pieces = max(1, round(moments[0].item() / args.minibatch))
        history, frozen = [], self.iteration < args.critic_warmup
        only_critic = frozen and self.critic is not None       # one minibatch checks the ratio, then the critic learns
        for epoch in range(args.epochs):
            shuffle = torch.Generator().manual_seed(number(args.seed, self.iteration, epoch, self.rank))
            order = torch.randperm(advantage.numel(), generator=shuffle).to(device)
            for k, rows in enumerate(order.tensor_split(pieces)):
                torch.manual_seed(number(args.seed, self.iteration, epoch * pieces + k, self.rank) + 1)
                logs = gradients(self.policy, data, rows, None if frozen else self.real, args)
                if not history and (logs["worst"] > RATIO_TOLERANCE[args.dtype] or drift > DRIFT):
                    raise RuntimeError(
                        f"iteration {self.iteration}: the first ratio after a rollout is off by {logs['worst']:.1e}, "
                        f"allowed {RATIO_TOLERANCE[args.dtype]:.0e}; log-probs by {drift:.2g} nats, allowed {DRIFT} "
                        "(both 0 in exact arithmetic): act and evaluate disagree. Look at temperature, "
                        "prompt padding, train()/eval(), dtype, stale features or weights changed in between")
                for p in self.actor if frozen else ():         # the value head learns alone
                    p.grad = None
                logs["grad_norm"] = nn.utils.clip_grad_norm_(self.named.values(), args.clip_norm or math.inf).item()
                history.append(logs | dict(skipped=not self.step(logs)))
                enough = only_critic or args.target_kl and logs["kl"] > args.target_kl
                if enough:
                    break
            if enough:
                break
        if self.critic is not None:
            self.fit_critic(data["truth"].flatten(0, 1), data["target"])
        kept = [key for key in logs if key != "value" or args.value_weight]       # else of a head that judges nothing
        fine = [logs for logs in history if not logs["skipped"]] or history
        return {key: float(np.mean([logs[key] for logs in fine])) for key in kept} | dict(
            explained=1 - (left / spread.clamp(min=1e-12)).item(), updates=len(history), worst=history[0]["worst"],
            skipped=sum(logs["skipped"] for logs in history)) | (dict(drift=drift) if drift else {})

    @torch.no_grad()
    def settle(self, data):
        """bfloat16: act, with its cache, rounds otherwise than evaluate, which is then asked for the log-probs of the
        rollout. Returns by how much they differ: mean over decisions and ranks, nats."""
        logp = torch.cat([self.policy.evaluate(**take(data, rows))[0] for rows in
                          torch.arange(len(data["logp"]), device=self.policy.device).split(self.args.micro_batch)])
        apart, data["logp"] = (logp - data["logp"]).abs().mean(), logp
        return all_sum(apart / self.world).item()

    def fit_critic(self, truth, target):
        """Regression of the value targets (M,) on the simulator's state (M, 16). An asymmetric critic (Pinto et al.
        2018): only training needs it, and only simulation trains. Pictures tell it a few centimetres, the state all."""
        for epoch in range(CRITIC_EPOCHS):
            shuffle = torch.Generator().manual_seed(number(self.args.seed, self.iteration, 1 << 14 | epoch, self.rank))
            for rows in torch.randperm(len(target), generator=shuffle).to(target.device).split(
                    max(1, CRITIC_BATCH // self.world)):       # as many steps, whatever the number of ranks
                self.critic_optimizer.zero_grad()
                (F.mse_loss(self.critic(truth[rows]), target[rows]) / self.world).backward()
                sum_gradients(list(self.critic.parameters()))
                self.critic_optimizer.step()

    def step(self, logs):
        """One optimizer step, unless something is not finite: then False; five of those in a row end the run."""
        fine = math.isfinite(sum(logs.values()))
        if fine:
            self.optimizer.step()
        self.skipped = 0 if fine else self.skipped + 1
        if self.skipped == 5:
            raise RuntimeError(f"iteration {self.iteration}: not finite 5 times in a row: {logs}; lower --lr or "
                               "--value-lr, or look at the demonstrations with real_data.py")
        return fine

    def frozen_sum(self):
        """Of what does not train, and so comes from Stage I's folder again: statistics, and the sum of the weights."""
        rest = [p.double().sum().item() for p in self.policy.parameters() if not p.requires_grad]
        return json.dumps(self.policy.statistics, sort_keys=True), math.fsum(rest)

    def save(self, path):
        sft_warmstart.save_state(dict(
            args=saved_args(self.args), iteration=self.iteration, optimizer=self.optimizer.state_dict(),
            frozen=self.frozen_sum(),
            weights={name: p.detach() for name, p in self.named.items()},
            critic=self.critic and (self.critic.state_dict(), self.critic_optimizer.state_dict()),
            real=self.real.state_dict() if self.real is not None else None), path)

    def load(self, path):
        state = sft_warmstart.load_state(path, saved_args(self.args), (), self.named)
        if tuple(state["frozen"]) != self.frozen_sum():
            raise ValueError(f"--resume: {path} goes with a Stage I that has been made anew; choose another --out")
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"][0])
            self.critic_optimizer.load_state_dict(state["critic"][1])
        self.iteration = state["iteration"]
        if self.real is not None:
            self.real.load_state_dict(state["real"])

def number(seed, iteration, piece, rank):
    """A seed for each purpose, so that there is no generator state to lose."""
    return (((seed << 20) + iteration << 16) + piece << 10) + 2 * rank & (1 << 63) - 1

def saved_args(args):
    """The flags that a resumed run must share."""
    free = ("sft", "stage_one", "resume", "ranks", "device", "out", "iterations", "eval_episodes", "save_every")
    return {key: value for key, value in vars(args).items() if key not in free}

# ---- the run -------------------------------------------------------------------------------------------------

def real_batches(args, policy, rank, world):
    """MixSampler of real demonstrations, and those held out; (None, {}), unopened, if lambda is 0."""
    if not args.lambda_real and not args.watch_real:
        return None, {}
    only_real = copy.copy(args.sft)
    only_real.sim_ratio = 0.
    sets, held_out = sft_warmstart.open_sets(only_real, policy, rank)
    sampler = real_data.MixSampler(None, sets["real"], 0., args.real_batch, args.seed + 1, rank, world)
    return (sampler if args.lambda_real else None), held_out

def success_rates(args, policy, episodes, rank, world, label, frames=0):
    """{"sim/open-drawer": per-episode dicts} on the evaluation's fixed scenes, gathered from all ranks; printed."""
    results, blocks = {}, range(rank, math.ceil(episodes / BLOCK), world)
    for domain in ("sim", "real") if episodes else ():
        for task in envs.TASKS if args.task == "all" else [args.task]:
            own = evaluate.evaluate(policy, task, domain, episodes, num_envs=BLOCK, blocks=blocks, frames=frames)
            parts = [own] * world
            if world > 1:
                dist.all_gather_object(parts, own)
            each = results[f"{NAMES[domain]}/{task}"] = sorted(sum(parts, []), key=lambda one: one["episode"])
            if rank == 0:
                row = evaluate.summary(each)
                tqdm.write(f"{label:14} {NAMES[domain]:9}{task:13} {row['success']:6.1%}   n {row['n']}, 95 % interval "
                           f"{row['low']:.1%} - {row['high']:.1%}")
    return results

def start_policy(args, rank, world, device):
    """The policy that Stage II starts from; runs Stage I first, if need be. None if a signal stopped that."""
    source = {"base": args.checkpoint or args.policy}.get(args.init, args.init)
    if args.init == "sft":
        source = pathlib.Path(args.sft.out, "policy")
        if args.stage_one:                   # what an interrupted Stage I left is gone on with
            args.sft.resume = pathlib.Path(args.sft.out, "resume.pt").exists()
            sft_warmstart.work(args.sft, rank, world, device)
        if world > 1:
            dist.barrier()
        if not source.exists():
            return None
    policy = policies.load_policy(source, device, args.dtype, freeze=args.freeze, lora_rank=args.sft.lora_rank,
                                  gradient_checkpointing=args.gradient_checkpointing, tokenizer=args.tokenizer,
                                  seed=args.seed)
    if args.init == "base" and policy.settings["unnorm_key"] is None and len(policy.statistics) != 1:
        limit = envs.ACTION_LIMIT            # an official base knows many robots, or none: this one's range
        policy.set_statistics("panda", dict(action=dict(q01=-limit, q99=limit)))
    return policy

def iterate(args, learner, env, steps, frozen):
    """One iteration: rollout and update -> {name: value} over all ranks."""
    start, i, world, policy = time.perf_counter(), learner.iteration, learner.world, learner.policy
    clock = dict(env.seconds)                # of physics and of OpenGL, so far
    env.first_episode = learner.rank + world * EPISODES * i
    noise = torch.Generator(policy.device).manual_seed(number(args.seed, i, 1 << 15, learner.rank))
    data, seen = rollout(policy, env, steps, noise, frozen, learner.critic)
    seen |= {key: env.seconds[key] - clock[key] for key in clock}
    middle = time.perf_counter()
    logs, now = learner.update(data), time.perf_counter
    sums = all_sum(torch.tensor([float(x) for x in seen.values()], dtype=torch.float64, device=policy.device))
    seen, spent = dict(zip(seen, sums.tolist())), now() - start
    total = env.num_envs * world             # environments over all ranks
    won, ended = (np.array([seen[f"{name}/{task}"] for task in env.tasks]) for name in ("successes", "episodes"))
    if len(env.tasks) > 1:
        logs |= {f"success/{task}": k / n for task, k, n in zip(env.tasks, won.tolist(), ended.tolist()) if n}
    return logs | dict(success=won.sum() / max(1, ended.sum()), reward=seen["reward"] / total,
                       act_s=seen["act"] / world, env_s=seen["env"] / world, update_s=now() - middle,
                       physics_s=seen["physics"] / world, render_s=seen["gl"] / world,
                       env_steps_per_s=total * steps * policy.settings.get("chunk", 1) / spent)

def work(args, rank, world, device):
    """What each rank does: Stage I if need be, evaluation, the loop of Stage II, evaluation."""
    out, start = pathlib.Path(args.out), time.perf_counter()
    if rank == 0:
        print(f"{known_stage(args)}, then {known_anchor(args)}: {args.checkpoint or args.policy}, {args.task} -> {out}")
        (out / "args.json").write_text(json.dumps(vars(args) | dict(command=sys.argv, sft=vars(args.sft)), indent=1))
    policy = start_policy(args, rank, world, device)
    if policy is None:
        return
    real, held_out = real_batches(args, policy, rank, world)
    frozen = not any(p.requires_grad for name, p in policy.named_parameters() if name.startswith(policy.vision))
    env = envs.VecEnv(args.task, "sim", max(1, args.num_envs // world), RL_SEED + args.seed, policy.image_size,
                      episode_stride=world, randomise=args.randomise)
    horizon = max(task.horizon for name, task in envs.TASKS.items() if args.task in (name, "all"))
    steps = args.steps or math.ceil(horizon / policy.settings.get("chunk", 1))
    before = first_evaluation(args, policy, rank, world)
    learner = Learner(args, policy, real, rank, world)
    if args.resume:
        learner.load(out / "resume.pt")
    log = sft_warmstart.Log(out, learner.iteration, rank)
    stop = torch.zeros(1)                    # a signal may set it while it is being summed: ranks sum a copy
    with on_signal(lambda *_: stop.fill_(1)), tqdm(total=args.iterations, initial=learner.iteration, desc=out.name,
                                                   disable=rank > 0, unit="it") as bar:
        while learner.iteration < args.iterations and not all_sum(stop.clone().to(device)).item():
            logs = iterate(args, learner, env, steps, frozen)
            now = learner.iteration = learner.iteration + 1
            if held_out and (now % 5 == 0 or now == args.iterations):
                logs |= sft_warmstart.held_out_losses(policy, held_out, args.sft, rank, world)
            if args.eval_every and now % args.eval_every == 0:
                logs["eval_episodes"] = min(50, args.eval_episodes)
                rates = success_rates(args, policy, logs["eval_episodes"], rank, world, f"iteration {now}")
                logs |= {name: evaluate.summary(episodes)["success"] for name, episodes in rates.items()}
            log.write(now, logs)
            bar.set_postfix_str(f"success {logs['success']:.0%} kl {logs['kl']:.3f} clip {logs['clipped']:.0%} "
                                f"real {logs.get('real', math.nan):.2f} {logs['env_steps_per_s']:.0f} steps/s")
            bar.update()
            if rank == 0 and args.save_every and now % args.save_every == 0:
                learner.save(out / "resume.pt")
    if rank == 0:
        learner.save(out / "resume.pt")
        evaluate.curves({out.name: log.rows}, out / "curves.png")
    if learner.iteration >= args.iterations:
        finish(args, policy, before, rank, world, time.perf_counter() - start)
    elif rank == 0:
        print(f"interrupted; go on with --resume (the flags as before, {out}/resume.pt)", file=sys.stderr)

def first_evaluation(args, policy, rank, world):
    """success_rates of the policy that Stage II starts from; kept for --resume."""
    file = pathlib.Path(args.out, "before.json")
    before = json.loads(file.read_text()) if args.resume and file.exists() else {}
    if {len(episodes) for episodes in before.values()} != {args.eval_episodes} - {0}:
        before = success_rates(args, policy, args.eval_episodes, rank, world, "before")
        if world > 1:
            dist.barrier()                   # all have read the old file
        if rank == 0:
            part = file.with_suffix(".part")
            part.write_text(json.dumps(before))
            os.replace(part, file)
    return before

def finish(args, policy, before, rank, world, seconds):
    """Checkpoint, evaluation, table, videos."""
    out = pathlib.Path(args.out)
    if rank == 0:
        sft_warmstart.save_policy(policy, out)
    after = success_rates(args, policy, args.eval_episodes, rank, world, "after", frames=1)
    if rank > 0 or not after:
        return
    for name, episodes in after.items():
        evaluate.write_videos(episodes, out / "videos" / name.replace("/", "-"))
        evaluate.contact_sheet(episodes, out / "videos" / f"{name.replace('/', '-')}.png")
    rows, paired = [], {name: evaluate.compare(before[name], after[name]) for name in before}
    for name in before:
        domain, task = name.split("/")
        for stage, episodes in ((known_stage(args), before[name]), ("then " + known_anchor(args), after[name])):
            rows.append(dict(checkpoint=stage, task=task, domain=domain, variant="seen", **evaluate.summary(episodes)))
    result = dict(command=sys.argv, seconds=seconds, ranks=world, rows=rows, paired=paired)
    (out / "result.json").write_text(json.dumps(result, indent=1))
    print(f"\n{evaluate.table(rows)}\n\nAfter against before on the same scenes: " + ";  ".join(
        f"{name} {each['difference']:+.0%} (McNemar p = {each['p']:.2g})" for name, each in paired.items()))
    print(f"checkpoint {out}/policy, curves {out}/curves.png, episodes {out}/videos; {seconds:.0f} s, ranks: {world}")

def check_stage_one(args):
    """ValueError if what is in Stage I's folder was made with other flags; True if it can be used."""
    folder = pathlib.Path(args.sft.out)
    if not (folder / "policy").exists():
        return False
    found = json.loads((folder / "args.json").read_text())
    wrong = sft_warmstart.changed_flags(found, vars(args.sft), ("command", "world", "ranks", "device", "out", "resume"))
    if wrong:
        raise ValueError(f"{folder} holds another Stage I: {'; '.join(wrong)}. Remove it, or give --init FOLDER")
    return True

def co_train(args):
    """The main job with args = parse([...]). Returns the checkpoint folder, or None if a signal stopped it."""
    args.stage_one = args.init == "sft" and not check_stage_one(args)
    alone = args.stage_one and int(os.environ.get("RANK", 0)) == 0
    with sft_warmstart.only_run(args.sft.out) if alone else contextlib.nullcontext():
        return sft_warmstart.run_in(args, work)

def main():
    sft_warmstart.run_main(co_train, parse)

if __name__ == "__main__":
    main()
