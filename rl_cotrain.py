"""Stage II of RL-Co: reinforcement learning in simulation, anchored by real demonstrations.

    L = L_PPO(simulation) + lambda_real * L_SFT(real demos)                       arXiv 2602.12628

    python rl_cotrain.py --policy openvla --lambda-real 0.1    # the main job
    python rl_cotrain.py --policy pi05 --task push-cube
    python rl_cotrain.py --policy openvla/openvla-7b --real-data my/robot --dtype bf16
    python rl_cotrain.py ... --resume                          # after Ctrl-C or a crash

The main job records demonstrations and runs Stage I (sft_warmstart.py) unless they are there
already, evaluates the policy in simulation and on the stand-in for the real robot, trains it with
co_train() below, evaluates it again, and writes a table, curves, videos and a checkpoint.

Symbols   T decisions (--horizon) in each of N environments of a rank; M decisions of a minibatch
          over all ranks; K control steps per decision (the policy's chunk)
Cases     --lambda-real 0    plain RL in simulation; the real data set is never opened
          --init base        no Stage I;  --init FOLDER  the policy in FOLDER instead
          --sim-ratio 0      Stage I on real demonstrations only
Ranks     each has its own environments and its share of every minibatch and real batch; gradients
          are summed. On a GPU, processes on the rank's share of the CPU cores simulate for it.
          See sft_warmstart.py for ranks, --resume and OUT.

Departures from the authors' code (RLinf):
 1. The real batch per optimizer step is a flag and does not depend on the number of ranks.
 2. Both policies can be co-trained, and a test checks the effect of lambda on the gradient.
 3. Only a time limit bootstraps: not a success, a failure or a diverged simulation. Advantages are
    normalised over all ranks.
 4. The presets of the tiny policies use a critic that reads the simulator's state (--critic state).
 5. Every iteration starts with new episodes, so resuming is exact.
As in RLinf, the "log-probability" of a pi0.5 decision is the mean over the steps + 1 factors of its
denoising chain, not log pi: its ratio, clip range and KL are not comparable with OpenVLA's.

Reading order: co_train() is the algorithm; collect, advantages, ppo_loss are its parts; then the
critic; then the main job around it.
"""

import dataclasses
import itertools
import math
import os
import pathlib
import sys
import time

import envs  # first: it chooses the OpenGL backend before mujoco is imported
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import evaluate
import policies
import real_data
import sft_warmstart
from sft_warmstart import (
    all_sum,
    check_range,
    gradients_of,
    flag,
    rank,
    random_seed,
    say,
    world,
)

RL_SEED = 31_000  # + --seed: scenes of Stage II; neither demonstrations nor evaluation use them
EPISODES = 1 << 12  # episode numbers set aside for an iteration of a rank
SAVE_EVERY = 10  # iterations between versions of resume.pt
HELD_OUT_EVERY = 5  # iterations between losses on held-out real demonstrations
CRITIC_EPOCHS = 10  # of the critic that reads the simulator's state, per iteration
CRITIC_BATCH = 256  # its minibatch over all ranks
CRITIC_LAMBDA = 0.95  # its targets are TD(lambda) returns with this lambda
RATIO_TOLERANCE = {"float32": 1e-3, "bf16": 0.1}  # of the first ratio after a rollout, which is 1

# Defaults that depend on the policy. openvla: the PPO of RL4VLA and RLinf. pi05: RLinf's
# co-training configuration. The tiny ones were tuned here, by success on the stand-in. Dynamics are
# cheap to randomise; with randomised appearance, too, a tiny policy learns too slowly for a laptop.
PRESETS = {
    "openvla": dict(
        num_envs=64, horizon=0, minibatch=160, micro_batch=8, real_batch=40, epochs=1, lr=1e-4,
        value_lr=3e-3, beta2=0.999, max_grad_norm=10.0, entropy_weight=0.0, freeze="none",
        iterations=400, target_kl=0.0, critic_warmup=0, critic="head", gae_lambda=0.95,
        final_lr=1.0, randomise=["places"]
    ),
    "pi05": dict(
        num_envs=128, horizon=0, minibatch=2560, micro_batch=40, real_batch=128, epochs=2,
        lr=4e-6, value_lr=2e-4, beta2=0.95, max_grad_norm=1.0, entropy_weight=0.005,
        freeze="vlm", iterations=1000, target_kl=0.0, critic_warmup=0, critic="head",
        gae_lambda=0.95, final_lr=1.0, randomise=["places"]
    ),
    "openvla-tiny": dict(
        num_envs=64, horizon=0, minibatch=640, micro_batch=320, real_batch=160, epochs=2,
        lr=2e-4, value_lr=1e-3, beta2=0.95, max_grad_norm=1.0, entropy_weight=0.0,
        freeze="vision", iterations=30, target_kl=0.1, critic_warmup=2, critic="state",
        gae_lambda=0.9, final_lr=0.0, randomise=["places", "dynamics"]
    ),
    "pi05-tiny": dict(
        num_envs=128, horizon=20, minibatch=640, micro_batch=320, real_batch=160, epochs=2,
        lr=2e-4, value_lr=1e-3, beta2=0.95, max_grad_norm=1.0, entropy_weight=0.0,
        freeze="vision", iterations=30, target_kl=0.1, critic_warmup=2, critic="state",
        gae_lambda=0.9, final_lr=0.0, randomise=["places", "dynamics"]
    ),
}


@dataclasses.dataclass
class Args:
    """Everything the main job can be told. Fields that are None take the value of the preset."""

    policy: str = flag(
        None, "openvla (default) or pi05 (bundled), a checkpoint folder, or a hub id"
    )
    task: str = flag("open-drawer", "the task of Stage II, or all", (*envs.TASKS, "all"))
    init: str = flag("sft", "start from sft (Stage I), base (no Stage I), or a checkpoint folder")
    lambda_real: float = flag(
        0.1, "weight of L_SFT(real); 0 = plain RL, real data is never opened"
    )
    watch_real: bool = flag(False, "log the loss on held-out real data even if lambda is 0")
    sim_ratio: float = flag(None, "alpha of Stage I, 0 to 1 (default: 0.5)")
    real_data: str = flag(None, "LeRobot data set of your robot (default: record the stand-in)")
    real_episodes: int = flag(None, "stand-in demonstrations per task (default: 50)")
    camera: list = flag(None, "image features of --real-data to use")
    convert: list = flag(
        None, "other conventions of --real-data: names of real_data.CONVERSIONS, or Python files"
    )
    load: list = flag(
        None, "settings of --policy, key=value: unnorm_key, tokenizer, base, temperature, steps, .."
    )
    iterations: int = flag(None, "rollouts, each followed by updates (preset)")
    num_envs: int = flag(None, "environments over all ranks (preset)")
    horizon: int = flag(None, "T, decisions per environment and rollout (preset); 0 = time limit")
    minibatch: int = flag(None, "M, decisions per optimizer step over all ranks (preset)")
    micro_batch: int = flag(None, "decisions per forward pass of a rank (preset)")
    real_batch: int = flag(None, "real samples per optimizer step over all ranks (preset)")
    epochs: int = flag(None, "passes over a rollout (preset)")
    lr: float = flag(None, "learning rate of the policy (preset)")
    critic: str = flag(
        None,
        "value head of the policy, or a network on the simulator's state (preset)",
        ("head", "state"),
    )
    max_grad_norm: float = flag(
        None, "gradients are scaled down to this norm (preset); 0 = never"
    )
    randomise: list = flag(None, "what is redrawn each episode (preset)", envs.RANDOMISE)
    freeze: str = flag(None, "part that does not train (preset)", ("none", "vision", "vlm"))
    lora_rank: int = flag(None, "rank of LoRA adapters (preset of Stage I); 0 = none")
    dtype: str = flag(None, "arithmetic of the matrix products (preset)", ("float32", "bf16"))
    eval_episodes: int = flag(400, "episodes per task and domain, before and after; 0 = none")
    seed: int = flag(0, "seed of everything but the evaluation scenes")
    ranks: int = flag(0, "processes; 0 = one per GPU, or per CPU core")
    out: str = flag(None, "folder of this run (default: runs/rl-POLICY-TASK-lambdaL-seedS)")
    resume: bool = flag(
        False, "go on from OUT/resume.pt; other flags but --iterations as they were"
    )
    gamma: float = 0.99  # discount per decision
    clip_ratio: float = 0.2  # epsilon of PPO's ratio
    clip_value: float = 0.2  # how far a value may move from the rollout's; 0 = any distance
    weight_decay: float = 0.01  # of matrices; never of biases and norms
    gae_lambda: float = None  # lambda of generalised advantage estimation
    final_lr: float = None  # learning rates at the last iteration, as a share of those at first
    value_lr: float = None  # learning rate of the value head, or of the state critic
    beta2: float = None  # of AdamW; beta1 is 0.9
    entropy_weight: float = None  # weight of the entropy bonus
    target_kl: float = None  # updates of an iteration stop above this KL [nats]; 0 = never
    critic_warmup: int = None  # iterations in which only the state critic trains
    sft: sft_warmstart.Options = None  # Stage I, and how real demonstrations are read in Stage II

    def resolve(self):
        """Fill in presets and check everything; one ValueError lists all mistakes. Returns self."""
        return resolve_args(self)


# ---- the algorithm -----------------------------------------------------------------------------


def co_train(policy, env, real, args, held_out=None):
    """Minimise L_PPO + lambda_real * L_SFT(real) on this rank.

    policy    whatever passes policies.check_policy
    env       this rank's environments: whatever passes envs.check_env
    real      endless batches of real demonstrations (real_data.MixSampler); None if lambda is 0
    args      Args(..).resolve()
    held_out  real demonstrations whose loss is logged, or None
    Returns False if a signal stopped it. OUT/resume.pt is up to date in both cases.
    """
    out = pathlib.Path(args.out)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(optimizer_groups(policy, args), betas=(0.9, args.beta2))
    critic = StateCritic(env, args).to(policy.device) if args.critic == "state" else None
    state = TrainState(policy, optimizer, critic, real)
    if args.resume:
        state.load(out / "resume.pt", args)
    sft_warmstart.write_args(args)
    log = sft_warmstart.Log(out, state.iteration)
    finite = sft_warmstart.FiniteGuard()
    bar = tqdm(total=args.iterations, initial=state.iteration, desc=out.name, disable=rank() > 0)

    with sft_warmstart.Signals() as signals, bar:
        while state.iteration < args.iterations and not signals.received():
            start = time.perf_counter()
            set_learning_rates(optimizer, state.iteration / args.iterations, args)
            rollout, logs = collect(policy, env, critic, args, state.iteration)
            check_log_probs(policy, rollout, args)
            rollout.advantages, rollout.returns = advantages(rollout, args)
            logs["explained"] = explained_variance(rollout)
            rollout.advantages = normalise(rollout.advantages)
            updates = []
            for rows, size in minibatches(rollout, args, state.iteration):
                stats = torch.zeros(len(STATS), device=policy.device)
                for some in rows.split(args.micro_batch):
                    part = rollout.select(some)
                    logp, entropy, value = policy.evaluate(**part.inputs)
                    loss, part_stats = ppo_loss(logp, entropy, value, part, args)
                    share = len(some) / size
                    (share * loss).backward()
                    stats += share * part_stats
                update = dict(zip(STATS, all_sum(stats).tolist()))
                rl_gradients = [g.clone() for g in gradients_of(parameters)]
                if real is not None:
                    real_loss = torch.zeros(1, device=policy.device)
                    for loss, _ in sft_warmstart.supervised_losses(policy, next(real), args.sft):
                        (args.lambda_real * loss).backward()
                        real_loss += loss.detach()
                    update["real"] = all_sum(real_loss).item()
                sft_warmstart.sum_gradients(parameters)
                update.update(gradient_angle(parameters, rl_gradients, args.lambda_real))
                grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
                if finite.check(f"iteration {state.iteration}", grad_norm):
                    optimizer.step()
                optimizer.zero_grad()
                updates.append(dict(update, grad_norm=grad_norm.item()))
                if args.target_kl and update["kl"] > args.target_kl:
                    break
            if critic is not None:
                critic.fit(rollout, args, state.iteration)
            state.iteration += 1

            logs.update(mean_of(updates), updates=len(updates), skipped=finite.skipped)
            logs.update(speed(rollout, policy, start))
            if held_out is not None and state.iteration % HELD_OUT_EVERY == 0:
                micro_batch = args.sft.micro_batch
                logs["held_out/real"] = sft_warmstart.held_out_loss(policy, held_out, micro_batch)
            log.write(state.iteration, logs)
            bar.set_postfix_str(progress(logs))
            bar.update()
            if state.iteration % SAVE_EVERY == 0:
                state.save(out / "resume.pt", args)
    state.save(out / "resume.pt", args)
    if rank() == 0:
        with evaluate.forgiven(out / "curves.png"):
            evaluate.curves({out.name: log.rows}, out / "curves.png")
    return state.iteration >= args.iterations


@dataclasses.dataclass
class Rollout:
    """T decisions in each of N environments; row t * N + i is decision t of environment i."""

    inputs: dict  # of policy.evaluate: images or features, instructions, trace, state
    logp: torch.Tensor  # (T N,) float32, as acted
    values: torch.Tensor  # (T, N) V of the observation that was decided on
    next_values: torch.Tensor  # (T, N) V of what followed before any reset; 0 if it terminated
    rewards: torch.Tensor  # (T, N)
    ended: torch.Tensor  # (T, N) bool, terminated or truncated
    privileged: torch.Tensor  # (T, N, P) simulator's state, or None
    advantages: torch.Tensor = None  # (T, N)
    returns: torch.Tensor = None  # (T, N) targets of the values

    def select(self, rows):
        """The decisions `rows` (m,)."""
        return Decisions(
            select(self.inputs, rows),
            self.logp[rows],
            self.values.flatten()[rows],
            self.advantages.flatten()[rows],
            self.returns.flatten()[rows],
        )


@dataclasses.dataclass
class Decisions:
    """m decisions of a rollout, for one forward pass."""

    inputs: dict  # of policy.evaluate
    logp: torch.Tensor  # (m,) of the rollout
    values: torch.Tensor  # (m,) of the rollout
    advantages: torch.Tensor  # (m,) normalised
    returns: torch.Tensor  # (m,)


@torch.no_grad()
def collect(policy, env, critic, args, iteration):
    """Let the policy act for T decisions in N environments, starting with new episodes.

    V is the policy's value head or, if given, the critic's reading of the simulator's state.
    Returns a Rollout and the log: success of the first episode of each environment (one that T cuts
    short is no success), mean sum of rewards, seconds of acting and of simulating.
    """
    generator = torch.Generator(policy.device)
    generator.manual_seed(random_seed(args.seed, iteration, rank(), COLLECT))
    obs = env.reset(first_episode=rank() + world() * EPISODES * iteration)
    tasks = np.array(env.task)  # of the first episodes
    outcome = np.full(env.num_envs, np.nan)  # their success, once they have ended
    seconds = dict(act=0.0, env=0.0)
    steps = []
    for _ in range(args.horizon):
        start = time.perf_counter()
        inputs = policy_inputs(policy, obs)
        decision = policy.act(**inputs, generator=generator)
        value = decision.value if critic is None else critic(obs)
        acted = time.perf_counter()
        privileged = obs.get("privileged")
        obs, reward, terminated, truncated, info = env.step(decision.actions.cpu().numpy())
        final_value = torch.zeros(env.num_envs, device=policy.device)  # 0 where it terminated
        rows = np.flatnonzero(truncated[info["ended"]])
        if len(rows):
            final_obs = select(info["final_obs"], rows)
            final_value[info["ended"][rows]] = state_value(policy, critic, final_obs)
        first = info["ended"][np.isnan(outcome[info["ended"]])]
        outcome[first] = info["success"][first]
        ended = terminated | truncated
        steps.append((inputs, decision, value, final_value, reward, ended, privileged))
        seconds["act"] += acted - start
        seconds["env"] += time.perf_counter() - acted
    rollout = stack(steps, state_value(policy, critic, obs))
    return rollout, rollout_logs(env, tasks, outcome, seconds, rollout.rewards)


def advantages(rollout, args):
    """Advantages and value targets (T, N) of a rollout: GAE. The place for another estimator.

    The state critic's targets have a lambda of their own, CRITIC_LAMBDA: its variance matters less
    than its bias, which the policy inherits.
    """
    parts = rollout.rewards, rollout.values, rollout.next_values, rollout.ended, args.gamma
    advantage, returns = gae(*parts, args.gae_lambda)
    if args.critic == "state":
        returns = gae(*parts, CRITIC_LAMBDA)[1]
    return advantage, returns


def gae(rewards, values, next_values, ended, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016); all arguments (T, N).

        delta_t = r_t + gamma V(s_t+1) - V(s_t)
        A_t     = delta_t + gamma lambda A_t+1,     cut where an episode ended

    next_values[t] is V of the observation that decision t led to, before any reset: 0 where the
    episode terminated, V(final observation) at a time limit. Returns A and the targets A + V.
    """
    advantage = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_values[t] - values[t]
        last = delta + gamma * gae_lambda * ~ended[t] * last
        advantage[t] = last
    return advantage, advantage + values


STATS = ("ppo", "value", "entropy", "kl", "clipped")  # what ppo_loss logs


def ppo_loss(logp, entropy, value, old, args):
    """L_PPO of m decisions (Schulman et al. 2017), the mean of

        - min(r A, clip(r, 1 - eps, 1 + eps) A)                   r = exp(logp - logp_old)
        + max(h(R - V), h(R - V_old - clip(V - V_old, -c, c)))    h = Huber; with --critic head
        - entropy weight * H

    old: the Decisions, with logp, values, advantages A and returns R of the rollout. With a state
    critic the value head does not train, and its loss is logged as 0.
    Returns the loss and its detached STATS (5,); kl is E[r - 1 - ln r] (Schulman 2020) in nats.
    """
    log_ratio = logp - old.logp
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.clip_ratio, 1 + args.clip_ratio)
    policy_loss = -torch.min(ratio * old.advantages, clipped * old.advantages).mean()
    loss = policy_loss - args.entropy_weight * entropy.mean()
    value_loss = torch.zeros_like(loss)
    if args.critic == "head":
        error = huber(value, old.returns)
        if args.clip_value:
            change = (value - old.values).clamp(-args.clip_value, args.clip_value)
            error = torch.max(error, huber(old.values + change, old.returns))
        value_loss = error.mean()
        loss = loss + value_loss
    kl = (ratio - 1 - log_ratio).mean()
    share_clipped = ((ratio - 1).abs() > args.clip_ratio).float().mean()
    stats = torch.stack([policy_loss, value_loss, entropy.mean(), kl, share_clipped])
    return loss, stats.detach()


def huber(value, target):
    return F.huber_loss(value, target, reduction="none", delta=10.0)


def normalise(advantage):
    """Advantages (T, N) with mean 0 and standard deviation 1 over all ranks."""
    count, total, squares = rank_moments(advantage)
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    return ((advantage - mean) / (std + 1e-5)).float()


def minibatches(rollout, args, iteration):
    """Yield the minibatches of all epochs: (this rank's rows (m,), M decisions over all ranks).

    There are none while only the critic trains.
    """
    if args.critic == "state" and iteration < args.critic_warmup:
        return
    count = torch.tensor(float(len(rollout.logp)), device=rollout.logp.device)
    pieces = max(1, round(all_sum(count).item() / args.minibatch))
    for epoch in range(args.epochs):
        shuffle = torch.Generator().manual_seed(random_seed(args.seed, iteration, rank(), epoch))
        order = torch.randperm(len(rollout.logp), generator=shuffle)
        for k, rows in enumerate(order.tensor_split(pieces)):
            # Augmentation and noise of the real batch draw from the global generator.
            torch.manual_seed(random_seed(args.seed, iteration, rank(), epoch, k))
            yield rows, all_sum(torch.tensor(float(len(rows)), device=rollout.logp.device))


class StateCritic(nn.Module):
    """V as a function of the simulator's state: an asymmetric critic (Pinto et al. 2018).

    Only training needs a critic, and only simulation trains, so it may know what no robot knows.
    """

    def __init__(self, env, args):
        super().__init__()
        size = getattr(env, "privileged_size", 0)
        if not size:
            raise ValueError(
                "--critic state: got an environment without privileged state; need "
                "obs['privileged'] and privileged_size; try --critic head"
            )
        torch.manual_seed(args.seed)  # the same weights on all ranks
        self.layers = nn.Sequential(
            nn.Linear(size, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1)
        )
        self.optimizer = torch.optim.Adam(self.layers.parameters(), args.value_lr)

    def value(self, privileged):
        """(.., P) -> (..)"""
        return self.layers(privileged)[..., 0]

    def forward(self, obs):
        """V of an observation with N environments, (N,)."""
        device = self.layers[0].weight.device
        return self.value(torch.from_numpy(obs["privileged"]).to(device))

    def fit(self, rollout, args, iteration):
        """Regress the returns of a rollout on its states."""
        states = rollout.privileged.flatten(0, 1)  # (T N, P)
        returns = rollout.returns.flatten()  # (T N,)
        parameters = list(self.layers.parameters())
        for epoch in range(CRITIC_EPOCHS):
            seed = random_seed(args.seed, iteration, rank(), epoch, CRITIC)
            order = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))
            for rows in order.split(max(1, CRITIC_BATCH // world())):
                loss = F.mse_loss(self.value(states[rows]), returns[rows])
                (loss / world()).backward()
                sft_warmstart.sum_gradients(parameters)
                self.optimizer.step()
                self.optimizer.zero_grad()


# ---- parts of the loop: checks, logs, data of a rollout ----------------------------------------


COLLECT = 1 << 20  # purposes of random numbers, so that no two draws share a seed
CRITIC = 1 << 21


@torch.no_grad()
def check_log_probs(policy, rollout, args):
    """Stop the run unless evaluate() agrees with act(): the first ratio after a rollout is 1.

    With bf16, act (which has a key/value cache) rounds differently from evaluate; the rollout then
    takes evaluate's log-probabilities, provided that they are close.
    """
    rows = torch.arange(len(rollout.logp))
    if args.dtype == "float32":
        rows = rows[:: max(1, len(rows) // 64)]  # a sample is enough
    logp = torch.cat(
        [
            policy.evaluate(**select(rollout.inputs, part))[0]
            for part in rows.split(args.micro_batch)
        ]
    )
    error = ((logp - rollout.logp[rows]).exp() - 1).abs()
    error = error.max() if args.dtype == "float32" else error.median()
    if error > RATIO_TOLERANCE[args.dtype]:
        raise RuntimeError(
            f"first ratio after a rollout: got {error:.1e} away from 1; need less than "
            f"{RATIO_TOLERANCE[args.dtype]:.0e}: act and evaluate disagree; try to look at "
            "temperature, prompt padding, train()/eval(), dtype, or features of other weights"
        )
    if args.dtype != "float32":
        rollout.logp = logp


def explained_variance(rollout):
    """1 - E[(R - V)^2] / Var(R) over all ranks, before the update."""
    count, total, squares = rank_moments(rollout.returns)
    variance = squares / count - (total / count) ** 2
    residual = rank_moments(rollout.returns - rollout.values)[2] / count
    return (1 - residual / variance.clamp(min=1e-12)).item()


def rank_moments(x):
    """Count, sum and sum of squares (float64 scalars) of a tensor over all ranks."""
    x = x.double()
    return all_sum(torch.stack([torch.ones_like(x).sum(), x.sum(), (x**2).sum()]))


def gradient_angle(parameters, rl_gradients, lambda_real):
    """Norms of the gradients of L_PPO and of L_SFT(real), before lambda, and their cosine.

    parameters have the gradient of both, summed over ranks; rl_gradients are this rank's of L_PPO.
    """
    rl = sft_warmstart.summed(rl_gradients)
    rl_norm = torch.stack([g.norm() for g in rl]).norm()
    if not lambda_real:
        return dict(grad_rl=rl_norm.item())
    real = [(total - g) / lambda_real for total, g in zip(gradients_of(parameters), rl)]
    real_norm = torch.stack([g.norm() for g in real]).norm()
    dot = sum((a * b).sum() for a, b in zip(rl, real))
    cosine = dot / (rl_norm * real_norm).clamp(min=1e-30)
    return dict(grad_rl=rl_norm.item(), grad_real=real_norm.item(), cosine=cosine.item())


def policy_inputs(policy, obs):
    """What act, evaluate and value take of an observation.

    What a frozen part of the policy makes of the images takes their place, for all epochs: the
    features of the vision tower, or the keys and values of the language model.
    """
    images = torch.from_numpy(obs["images"]).to(policy.device)
    inputs = dict(images=images, instructions=obs["instructions"])
    if policy.reads_state:
        inputs["state"] = torch.from_numpy(obs["state"])
    if getattr(policy, "prefix_frozen", False):
        inputs["images"] = policy.encode_prefix(**inputs)
    elif getattr(policy, "vision_frozen", False):
        inputs["images"] = policy.encode_images(images)
    return inputs


def state_value(policy, critic, obs):
    """V of an observation (n,), by the critic or else by the policy's value head."""
    if critic is not None:
        return critic(obs)
    return policy.value(**policy_inputs(policy, obs))


def select(values, rows):
    """The same rows of all values of a dict: tensors, arrays, lists and dicts of them."""
    chosen = {}
    for key, value in values.items():
        if isinstance(value, dict):
            chosen[key] = select(value, rows)
        elif isinstance(value, list):
            chosen[key] = [value[i] for i in rows.tolist()]
        else:
            chosen[key] = value[rows]
    return chosen


def join(parts):
    """Put the rows of several such dicts together: the inverse of select()."""
    joined = {}
    for key, first in parts[0].items():
        values = [part[key] for part in parts]
        if isinstance(first, dict):
            joined[key] = join(values)
        elif isinstance(first, list):
            joined[key] = list(itertools.chain.from_iterable(values))
        else:
            joined[key] = torch.cat(same_length(values))
    return joined


def same_length(values):
    """Pad tensors (n, P, ..) with zeros to the same P: prompts differ in length."""
    lengths = {value.shape[1] for value in values if value.ndim > 1}
    if len(lengths) < 2:
        return values
    longest = max(lengths)
    return [
        F.pad(value, [0, 0] * (value.ndim - 2) + [0, longest - value.shape[1]]) for value in values
    ]


def stack(steps, last_value):
    """Turn the steps of collect() into a Rollout. last_value (N,): V of the last observation."""
    inputs, decisions, values, final_values, rewards, ended, privileged = zip(*steps)
    device = last_value.device
    rows = [dict(each, trace=decision.trace) for each, decision in zip(inputs, decisions)]
    values = torch.stack(values)  # (T, N)
    ended = torch.from_numpy(np.stack(ended)).to(device)
    following = torch.cat([values[1:], last_value[None]])
    states = None
    if privileged[0] is not None:
        states = torch.from_numpy(np.stack(privileged)).to(device)  # (T, N, P)
    return Rollout(
        inputs=join(rows),
        logp=torch.cat([decision.logp for decision in decisions]),
        values=values,
        next_values=torch.where(ended, torch.stack(final_values), following),
        rewards=torch.from_numpy(np.stack(rewards)).to(device),
        ended=ended,
        privileged=states,
    )


def rollout_logs(env, tasks, outcome, seconds, rewards):
    """What collect() logs, over all ranks.

    tasks, outcome (N,): task and success (nan: T cut it short) of the first episodes.
    """
    counts = []
    for task in env.tasks:
        counts.append([(outcome[tasks == task] == 1).sum(), (tasks == task).sum()])
    others = [seconds["act"], seconds["env"], rewards.sum().item(), env.num_envs]
    sums = torch.tensor([*np.ravel(counts), *others], dtype=torch.float64, device=rewards.device)
    sums = all_sum(sums).tolist()
    act_s, env_s, reward, num_envs = sums[-4:]
    successes = sums[0:-4:2]
    episodes = sums[1:-4:2]
    logs = dict(success=sum(successes) / sum(episodes), reward=reward / num_envs)
    if len(env.tasks) > 1:
        for task, won, played in zip(env.tasks, successes, episodes):
            logs[f"success/{task}"] = won / max(1, played)
    logs.update(act_s=act_s / world(), env_s=env_s / world())
    return logs


def speed(rollout, policy, start):
    """Seconds of an iteration that began at `start`, and its control steps per second on all ranks.

    Every decision counts with its whole chunk, also the last one of an episode.
    """
    seconds = time.perf_counter() - start
    steps = len(rollout.logp) * policy.chunk * world()
    return dict(iteration_s=seconds, env_steps_per_s=steps / seconds)


def mean_of(updates):
    """Means of the logs of all optimizer steps of an iteration."""
    means = {}
    for name in updates[0] if updates else ():
        means[name] = float(np.mean([update[name] for update in updates]))
    return means


def progress(logs):
    """What the progress bar shows."""
    shown = f"success {logs['success']:.0%}  {logs['env_steps_per_s']:.0f} steps/s"
    for name in ("kl", "real"):
        if name in logs:
            shown += f"  {name} {logs[name]:.3g}"
    return shown


def optimizer_groups(policy, args):
    """Parameter groups: the value head has a learning rate of its own."""
    trained = sft_warmstart.trainable(policy)
    head = {name: p for name, p in trained.items() if name.startswith("value_head.")}
    rest = {name: p for name, p in trained.items() if name not in head}
    groups = []
    for part, lr in ((rest, args.lr), (head, args.value_lr)):
        groups += sft_warmstart.parameter_groups(part, args.weight_decay, lr=lr, initial_lr=lr)
    return groups


def set_learning_rates(optimizer, progress, args):
    """Let them fall linearly. progress: 0 at the first iteration, 1 after the last."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (1 - (1 - args.final_lr) * progress)


@dataclasses.dataclass
class TrainState:
    """Everything that changes while training, and its checkpoint."""

    policy: nn.Module
    optimizer: torch.optim.Optimizer
    critic: nn.Module
    real: object
    iteration: int = 0

    def __post_init__(self):
        self.start = sft_warmstart.start_of(self.policy)

    def save(self, path, args):
        """Write resume.pt."""
        critic = None
        if self.critic is not None:
            critic = [self.critic.state_dict(), self.critic.optimizer.state_dict()]
        sft_warmstart.save_state(
            path,
            saved_flags(args),
            sft_warmstart.trainable(self.policy),
            iteration=self.iteration,
            optimizer=self.optimizer.state_dict(),
            critic=critic,
            **self.start,
            real=None if self.real is None else self.real.state_dict(),
        )

    def load(self, path, args):
        """Read resume.pt. ValueError if it is of a run with other flags or with another Stage I."""
        trained = sft_warmstart.trainable(self.policy)
        state = sft_warmstart.load_state(path, saved_flags(args), trained, **self.start)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"][0])
            self.critic.optimizer.load_state_dict(state["critic"][1])
        if self.real is not None:
            self.real.load_state_dict(state["real"])
        self.iteration = state["iteration"]


def saved_flags(args):
    """The flags that a resumed run must share."""
    return {
        name: value for name, value in vars(args).items() if name not in ("sft", "iterations")
    }


# ---- the main job ------------------------------------------------------------------------------


def main_job(args):
    """Run Stage I if need be, evaluate, run Stage II, evaluate. Returns False if stopped."""
    start = time.perf_counter()
    out = pathlib.Path(args.out)
    say(f"{stage_name(args)}, then {method_name(args)}: {args.policy}, {args.task} -> {out}")
    source = args.policy
    if args.init == "sft":
        source = stage_one(args.sft)
        if source is None:
            return False
    policy = policies.load_policy(
        source,
        sft_warmstart.this_device(),
        args.dtype,
        freeze=args.freeze,
        lora_rank=args.lora_rank,
        gradient_checkpointing=args.lora_rank > 0,
        seed=args.seed,
        **(policies.parse_load(args.load) if args.init != "sft" else {}),
    )
    sft_warmstart.say_notes(source, policy)
    if args.init == "base" and not policy.has_statistics():
        limit = envs.ACTION_LIMIT  # a base of many robots, or none: the range of this controller
        policy.set_statistics("panda", dict(action=dict(q01=-limit, q99=limit)))
    tasks = sft_warmstart.task_names(args.task)
    evaluate.check_ready(policy, tasks)
    texts = [envs.TASKS[task].instruction for task in tasks]
    sft_warmstart.describe(policy, [text for text in texts if "{" not in text])  # as it is spoken
    real, held_out = real_demonstrations(args, policy)
    env = envs.make_env(
        args.task,
        "sim",
        args.num_envs // world(),
        RL_SEED + args.seed,
        policy.image_size,
        workers=env_workers(),
        randomise=args.randomise,
        episode_stride=world(),
    )
    longest = max(envs.TASKS[task].horizon for task in env.tasks)  # control steps
    args.horizon = args.horizon or math.ceil(longest / policy.chunk)
    before = success_before(args, policy)
    if not co_train(policy, env, real, args, held_out):
        say(f"interrupted; the same command with --resume goes on from {out}/resume.pt")
        return False
    sft_warmstart.save_policy(policy, out)
    after = success_rates(args, policy, "after", frames=1)
    if rank() == 0 and after:
        report(args, before, after, time.perf_counter() - start)
    return True


def resolve_args(args):
    """Fill in presets and check all flags; see Args.resolve."""
    problems = policies.Problems()
    given = args.init not in ("sft", "base")
    problems.need(
        not (given and args.policy),
        "--policy",
        f"{args.policy} and --init {args.init}",
        "one of them: the folder of --init is the policy",
        "--init alone",
    )
    problems.need(
        args.init == "sft" or args.sim_ratio is None,
        "--sim-ratio",
        f"{args.sim_ratio} and --init {args.init}",
        "--init sft: there is no Stage I otherwise",
        "one of them",
    )
    problems.stop()
    if args.sim_ratio is None:
        args.sim_ratio = 0.5
    args.policy = args.init if given else args.policy or "openvla"
    kind, name = sft_warmstart.policy_kind(args.policy, args.load)
    for key, value in PRESETS[kind].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.out is None:
        base = "-base" if args.init == "base" else ""
        args.out = f"runs/rl-{name}-{args.task}{base}-lambda{args.lambda_real:g}-seed{args.seed}"
    # Stage I is trained once on the demonstrations of all tasks and reused by later runs.
    args.sft = sft_warmstart.Options(
        policy=args.policy,
        sim_ratio=args.sim_ratio,
        real_data=args.real_data,
        camera=args.camera,
        convert=args.convert,
        load=args.load,
        real_episodes=args.real_episodes,
        lora_rank=args.lora_rank,
        dtype=args.dtype,
        seed=args.seed,
        eval_episodes=0,
        ranks=1,
        resume=False,
    ).resolve(new=False)
    args.dtype = args.sft.dtype
    args.lora_rank = args.sft.lora_rank
    check_range(problems, args, "gamma gae_lambda final_lr", 0, 1)
    check_range(
        problems, args, "lambda_real iterations horizon max_grad_norm eval_episodes ranks", 0
    )
    check_range(problems, args, "num_envs minibatch micro_batch real_batch epochs", 1)
    problems.need(args.lr > 0, "--lr", args.lr, "more than 0", f"--lr {PRESETS[kind]['lr']}")
    opened = args.lambda_real or args.watch_real or (args.init == "sft" and args.sim_ratio < 1)
    problems.need(
        opened or not args.real_data,
        "--real-data",
        "a run that never opens it",
        "--lambda-real above 0, or a Stage I with --sim-ratio below 1",
        "without --real-data",
    )
    args.ranks = args.ranks or sft_warmstart.default_ranks(args.num_envs)
    problems.need(
        args.num_envs % args.ranks == 0,
        "--num-envs",
        args.num_envs,
        f"a multiple of the {args.ranks} ranks",
        f"--num-envs {args.num_envs // args.ranks * args.ranks}",
    )
    problems.need(
        args.real_batch >= args.ranks,
        "--real-batch",
        args.real_batch,
        f"at least one sample for each of the {args.ranks} ranks",
        f"--real-batch {args.ranks}",
    )
    sft_warmstart.check_run_folder(problems, args)
    if args.init == "sft":
        check_stage_one(problems, args.sft)
    problems.stop()
    return args


def check_stage_one(problems, options):
    """Note a Stage I with other flags in the folder that this run would use."""
    out = pathlib.Path(options.out)
    if not (out / "policy").exists():
        return
    found = policies.read_json(out / "args.json", {})
    changed = sft_warmstart.changed_flags(found, dataclasses.asdict(options))
    problems.need(
        not changed,
        "--init sft",
        f"another Stage I in {out} ({'; '.join(changed)})",
        "the same flags",
        f"--init {out}/policy, or to remove that folder",
    )


def env_workers():
    """Most processes that simulate for a rank: on a GPU, its share of the CPU cores."""
    if not torch.cuda.is_available():
        return 1  # each core is a rank
    return real_data.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def stage_one(options):
    """Folder of Stage I's policy, trained now if it is missing; None if a signal stopped that."""
    out = pathlib.Path(options.out)
    lock = sft_warmstart.run_lock(out)
    if rank() == 0:
        lock.acquire()  # a second run with the same Stage I waits, then finds it here
    sft_warmstart.barrier()
    problems = policies.Problems()
    check_stage_one(problems, options)  # it may have been trained while this run waited
    problems.stop()
    finished = True
    if not (out / "policy").exists():
        options.resume = (out / "resume.pt").exists()
        finished = sft_warmstart.warm_start(options)
    sft_warmstart.barrier()
    lock.release()
    return out / "policy" if finished else None


def real_demonstrations(args, policy):
    """(endless batches or None, held-out Demos or None); (None, None), unopened, if lambda is 0."""
    if not args.lambda_real and not args.watch_real:
        return None, None
    only_real = dataclasses.replace(args.sft, sim_ratio=0.0)
    training, held_out = sft_warmstart.open_demonstrations(only_real, policy)
    batches = None
    if args.lambda_real:
        batches = real_data.MixSampler(
            None, training["real"], 0.0, args.real_batch, args.seed + 1, rank(), world()
        )
    return batches, held_out.get("real")


def success_rates(args, policy, label, frames=0):
    """{"sim/open-drawer": episodes} of the fixed evaluation scenes; {} with --eval-episodes 0."""
    if not args.eval_episodes:
        return {}
    tasks = sft_warmstart.task_names(args.task)
    return evaluate.success_rates(
        policy,
        tasks,
        ("sim", "real"),
        args.eval_episodes,
        rank(),
        world(),
        frames=frames,
        label=label,
    )


def success_before(args, policy):
    """success_rates before Stage II, kept in OUT/before.json for --resume."""
    path = pathlib.Path(args.out, "before.json")
    before = policies.read_json(path, {}) if args.resume else {}
    if before and all(len(episodes) == args.eval_episodes for episodes in before.values()):
        return before
    before = success_rates(args, policy, "before")
    if rank() == 0:
        policies.write_json(path, before)
    return before


def stage_name(args):
    """Name of the policy that Stage II starts from, for tables."""
    if args.init == "base":
        return "base policy"
    if args.init != "sft":
        return "given policy"
    return {0: "SFT on real demos", 1: "SFT on simulated demos"}.get(
        args.sim_ratio, "SFT co-training"
    )


def method_name(args):
    """Name of Stage II, for tables."""
    name = f"RL-Co, lambda {args.lambda_real:g}" if args.lambda_real else "RL in simulation alone"
    if args.randomise:
        name += f", randomised {', '.join(args.randomise)}"
    return name


def report(args, before, after, seconds):
    """Print the table; write result.json, then videos: if they fail, the numbers are there."""
    out = pathlib.Path(args.out)
    rows = []
    for cell, episodes in after.items():
        domain, task = cell.split("/")
        ends = evaluate.by_place("whole-table", episodes)
        for places, start in evaluate.by_place("whole-table", before[cell]).items():
            row = dict(task=task, domain=domain, places=places)
            row["before"] = evaluate.summary(start)
            row["after"] = evaluate.summary(ends[places])
            rows.append(row | evaluate.compare(start, ends[places]))
    print(f"\n{stage_name(args)}, then {method_name(args)}, on the same scenes:\n")
    print(evaluate.gain_table(rows))
    result = dict(command=sys.argv, seconds=seconds, ranks=world(), rows=rows)
    policies.write_json(out / "result.json", result)
    for cell, episodes in after.items():
        folder = out / "videos" / cell.replace("/", "-")
        with evaluate.forgiven(folder):
            evaluate.write_videos(episodes, folder)
            evaluate.contact_sheet(episodes, f"{folder}.png")
    print(f"checkpoint {out}/policy, curves {out}/curves.png, episodes {out}/videos")
    print(f"{seconds:.0f} s, ranks: {world()}")


def parse(argv):
    """Command line -> Args, resolved."""
    return sft_warmstart.parse_flags(Args, argv, __doc__).resolve()


if __name__ == "__main__":
    sft_warmstart.run_script(main_job, parse)
