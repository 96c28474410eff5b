"""Measures how often a policy succeeds, and serves it to a robot.

    success rate    p = k / n: k successes in n episodes, with a 95 % Wilson interval
    comparison      of two checkpoints on the same n scenes: McNemar's exact test, and a 95 %
                    interval of the difference of their success rates

    python evaluate.py --checkpoint runs/sft --task open-drawer
    python evaluate.py --checkpoint runs/sft runs/co --task all     # second against first
    python evaluate.py --checkpoint runs/co --task push-cube --ablation shuffled-instruction
    python evaluate.py --curves runs/*/metrics.jsonl                # learning curves of runs
    python evaluate.py --serve --checkpoint runs/co --camera front  # a policy server for a robot
    python evaluate.py --trials trials/co                           # count trials on a robot
    python evaluate.py --study main                                 # the results, from nothing

Checkpoint  A bundled name (openvla, pi05), a folder or a hub id. The folder of a run, RUN,
            stands for the policy in it, RUN/policy.
Domains     sim, and "stand-in": the domain `real` of envs.py, a second simulation that takes
            the place of the real robot. No robot is attached.
Places      Demonstrations cover a part of the table, practice in simulation all of it. The
            headline is "whole-table": half of its episodes start in the demonstrated places and
            half in the others, which the tables also show apart.
Scenes      Episode k of (seed, task, domain, variant) is the same scene for every checkpoint,
            which makes paired comparisons possible. Demonstrations and RL use other seeds.
Blocks      Episodes 25 b .. 25 b + 24 are block b: one batch of environments, with a generator
            of its own for the policy's noise. Blocks give the same results in any order, on any
            number of processes or ranks (bit for bit on one kind of CPU; GPU kernels may
            differ). Stage I, Stage II and this script all run these blocks, so a checkpoint has
            one success rate.
Decoding    deploy: OpenVLA samples its tokens at temperature 0.6, as RL4VLA and RLinf evaluate,
            because its most likely tokens can keep the robot still for ever; pi0.5 integrates
            the ODE without noise. greedy: argmax, or that ODE. sample: with the noise of RL.
Failures    Untouched: the tool never touched the object that the instruction names (pick-place:
            it never held it), which hints at perception. The other failures did, which hints at
            control. Touch is measured at the ends of control steps: short contacts are missed.
Ablations   blank-image: every image is grey. shuffled-instruction: the instruction names
            another cube on the table, or another task. A policy that still succeeds ignores the
            image or the instruction.
Output      OUT/result.json (the command, versions, every episode), success.png, videos/; with
            --curves, OUT/curves.png. An evaluation has a folder of its own.
Resume      OUT/episodes.jsonl gets a line for each block that has ended. Ctrl-C, SIGTERM, a kill
            or a full disk lose only the blocks that were running: the same command with --resume
            runs those that are missing, and the result is that of an uninterrupted evaluation.
            After the end, it prints the tables again. Videos are written when their block ends;
            when all have ended, the first --videos of each success rate stay.
Deployment  --serve speaks the openpi policy protocol, see PolicyServer, until Ctrl-C, its normal
            end. --trials reads a LeRobot data set in which a person has judged each episode.
Studies     --study trains and evaluates what is missing of a study, a process for each core, and
            writes results/NAME: cells.json (each scene of each run), table.txt, figure.png. The
            same command goes on after an interruption. cells.json has the commands, too.
Errors      One line, and exit status 1, or 130 after a signal. With the environment variable
            TRACEBACK=1, also where an error was raised.
"""
import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import ipaddress
import itertools
import json
import logging
import math
import multiprocessing
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import envs                 # first: it chooses the OpenGL backend before mujoco is imported
import imageio
import msgpack
import numpy as np
import pyarrow.parquet as pq
import torch
import websockets.sync.server
from tqdm import tqdm

import policies

EVAL_SEED = 999_983         # seed of all scenes of evaluations; demonstrations and RL use others
BLOCK = 25                  # environments of a block; another number gives the policy other noise
NAMES = dict(sim="sim", real="stand-in", pretrain="pretrain")      # names of domains in tables
ABLATIONS = ("none", "blank-image", "shuffled-instruction")
Z = 1.96                    # normal quantile of a two-sided 95 % interval
GREEN = (0, 160, 90)        # border of a success in videos, RGB
RED = (214, 60, 40)         # border of a failure
SIGNALS = {signal.SIGINT, signal.SIGTERM}       # Ctrl-C, and what a cluster sends


# ---- episodes -----------------------------------------------------------------------------------

def run_episodes(policy, task, domain, episodes, *, variant="whole-table", seed=EVAL_SEED,
                 blocks=None, decoding="deploy", ablation="none", frames=0, bar=None, env=None):
    """Run a policy on the scenes 0 .. episodes - 1.

    policy    whatever passes policies.check_policy
    blocks    the blocks to run, of ceil(episodes / BLOCK); None: all
    frames    keep the images of that many successes and as many failures of each block
    bar       a Progress bar, or None
    env       an environment of your own that keeps the contract envs.Env; task, domain and
              variant then do nothing, and its num_envs takes the place of BLOCK

    Returns a list of dicts, in the order of `blocks`: episode; instruction; success; steps
    (control steps); touched (the object was touched); failure (the wrong cube was pushed);
    diverged; and, if kept, frames: (H, W, 3) uint8 images, one for each control step and the
    last. Raises ValueError.
    """
    size = min(BLOCK, episodes) if env is None else env.num_envs
    count = math.ceil(episodes / max(size, 1))
    blocks = list(range(count) if blocks is None else blocks)
    outside = [block for block in blocks if not 0 <= block < count]
    problems = policies.Problems()
    problems.need(episodes > 0, "episodes", episodes, "1 or more", "100")
    problems.need(not outside, "blocks", outside, f"0 to {count - 1}", "blocks=None, for all")
    for what, got, known in (("decoding", decoding, policies.DECODINGS),
                             ("ablation", ablation, ABLATIONS)):
        problems.need(got in known, what, got, f"one of {', '.join(known)}", known[0])
    problems.stop()
    if not blocks:
        return []
    if env is None:
        options = dict(variant=variant, auto_reset=False)
        env = envs.make_env(task, domain, size, seed, policy.image_size, **options)
    records = []
    for block in blocks:
        some = run_block(
            policy, env, block, episodes, seed, decoding, ablation, frames > 0, bar
        )
        keep_frames(some, frames)
        records += some
    return records


def run_block(policy, env, block, episodes, seed, decoding, ablation, film, bar):
    """Run one episode in each environment; those that have ended wait for the others.

    What happens depends on (seed, block) only: this holds for the scenes, for the generator of
    the policy's noise, and for the policy's batch, the M environments that still run.
    """
    first = block * env.num_envs
    obs = env.reset(first_episode=first)
    generator = noise_generator(policy, seed, block)
    instructions = obs["instructions"]
    if ablation == "shuffled-instruction":
        instructions = env.wrong_instructions()
    running = np.arange(min(env.num_envs, episodes - first))    # the last block may be smaller
    records = []
    for i in running.tolist():
        record = dict(episode=first + i, instruction=instructions[i], steps=0, frames=[])
        records.append(record)
    while len(running):
        images = shown(obs["images"][running], ablation)        # (M, H, W, 3)
        told = [instructions[i] for i in running]
        state = obs["state"][running] if policy.reads_state else None       # (M, 8)
        decision = policy.act(
            images, told, state=state, decoding=decoding, generator=generator
        )
        chunk = decision.actions.cpu().numpy()                  # (M, K, 7)
        actions = np.zeros((env.num_envs, *chunk.shape[1:]), np.float32)
        actions[running] = chunk            # environments that have ended get zeros
        obs, _, _, _, info = env.step(actions)
        for i, image in zip(running, images):
            steps = int(info["length"][i])
            if film:                        # the policy sees no other image during a chunk
                records[i]["frames"] += [image] * (steps - records[i]["steps"])
            records[i]["steps"] = steps
        for row, i in enumerate(info["ended"]):
            if i not in running:            # a later episode: this environment resets itself
                continue
            for name in ("success", "touched", "failure", "diverged"):
                records[i][name] = bool(info[name][i])
            if film:
                last = info["final_obs"]["images"][row]
                records[i]["frames"].append(shown(last, ablation))
            if bar is not None:
                bar.add([records[i]])
        running = np.setdiff1d(running, info["ended"])
    return records


def noise_generator(policy, seed, number):
    """Return the generator of the policy's noise for a block, or for a client of the server."""
    noise_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return torch.Generator(policy.device).manual_seed(noise_seed)


def shown(images, ablation):
    """Return the images that the policy gets to see."""
    if ablation == "blank-image":
        return np.full_like(images, 128)
    return images


def keep_frames(episodes, count):
    """Remove the frames of all but the first `count` successes and `count` failures."""
    for success in (True, False):
        outcome = [episode for episode in episodes if episode["success"] == success]
        for episode in outcome[count:]:
            episode.pop("frames", None)


def success_rates(policy, tasks, domains, episodes, rank=0, world=1, frames=0, label=""):
    """Evaluate a policy on all ranks together; rank 0 prints a line for each task and domain.

    Both training stages print their success rates with this function. Rank r of `world` runs
    the blocks r, r + world, ... of each task and domain. episodes: 0 evaluates nothing.
    frames: keep the images of that many successes and failures. label: start of the lines.
    Returns {"stand-in/open-drawer": episodes, see run_episodes}, on every rank those of all.
    """
    results = {}
    blocks = range(rank, math.ceil(episodes / BLOCK), world)
    share = sum(min(BLOCK, episodes - BLOCK * block) for block in blocks)
    for domain, task in itertools.product(domains, tasks):
        if episodes == 0:
            continue
        name = f"{NAMES[domain]}/{task}"
        with Progress(total=share, desc=name, leave=False, disable=rank > 0) as bar:
            own = run_episodes(
                policy, task, domain, episodes, blocks=blocks, frames=frames, bar=bar
            )
        parts = [own]
        if world > 1:
            parts = [None] * world
            torch.distributed.all_gather_object(parts, own)
        together = itertools.chain.from_iterable(parts)
        results[name] = sorted(together, key=lambda record: record["episode"])
        keep_frames(results[name], frames)
        if rank == 0:
            for place, some in by_place("whole-table", results[name]).items():
                row = summary(some)
                interval = f"{row['low']:.1%} - {row['high']:.1%}"
                tqdm.write(f"{label:14} {NAMES[domain]:9} {task:13} {place:13} "
                           f"{row['success']:6.1%}   n {row['n']}, 95 % interval {interval}")
    return results


class Progress(tqdm):
    """Shows a progress bar: episodes, episodes per second, and the success rate so far."""

    done = 0
    wins = 0

    def __init__(self, **options):
        super().__init__(unit="episode", **options)

    def add(self, episodes):
        """Move the bar by episodes that ended."""
        self.done += len(episodes)
        self.wins += sum(episode["success"] for episode in episodes)
        self.set_postfix_str(f"success {self.wins / self.done:.0%}", refresh=False)
        self.update(len(episodes))


# ---- numbers ------------------------------------------------------------------------------------

def wilson(k, n):
    """Return the 95 % interval (low, high) of a success rate k / n; k, n: numbers or arrays."""
    # (k + z^2 / 2  +-  z sqrt(k (n - k) / n + z^2 / 4)) / (n + z^2)            (Wilson 1927)
    centre = (k + Z**2 / 2) / (n + Z**2)
    half = Z * np.sqrt(k * (n - k) / n + Z**2 / 4) / (n + Z**2)
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)


def summary(episodes):
    """Sum up a list of episodes, see run_episodes. Raises ValueError if there is none.

    Returns k successes of n, success = k / n with its Wilson interval low, high; steps, the
    mean number of control steps; and how many episodes touched the object, ended by the wrong
    cube (failure), diverged, or failed without touching the object (untouched).
    """
    n = len(episodes)
    if n == 0:
        raise ValueError("summary: got no episodes; need 1 or more; try more episodes")
    k = sum(episode["success"] for episode in episodes)
    low, high = wilson(k, n)
    row = dict(k=k, n=n, success=k / n, low=float(low), high=float(high))
    row["steps"] = float(np.mean([episode["steps"] for episode in episodes]))
    for name in ("touched", "failure", "diverged"):
        row[name] = sum(episode[name] for episode in episodes)
    row["untouched"] = sum(
        not episode["touched"] and not episode["success"] for episode in episodes
    )
    return row


def by_place(variant, episodes):
    """Return {variant: episodes}; those of the whole table also apart, by where they start."""
    parts = {variant: episodes}
    if variant == "whole-table":            # see envs.VecEnv
        parts["demonstrated"] = [each for each in episodes if each["episode"] % 2 == 0]
        parts["other-places"] = [each for each in episodes if each["episode"] % 2 == 1]
    return {name: part for name, part in parts.items() if part}


def compare(first, second):
    """Compare two lists of episodes on the same scenes in the same order, else ValueError.

    Returns n; in how many scenes both, only_first, only_second, neither succeeded; difference =
    success of second - first, with a 95 % interval low, high; p of McNemar's exact test.
    """
    scenes = [episode["episode"] for episode in first]
    if not scenes or scenes != [episode["episode"] for episode in second]:
        raise ValueError(
            f"compare: got {len(first)} and {len(second)} episodes; need the same scenes in the "
            "same order; try the same number of episodes and the same blocks for both"
        )
    pairs = [(one["success"], two["success"]) for one, two in zip(first, second)]
    n = len(pairs)
    b = pairs.count((True, False))      # only the first
    c = pairs.count((False, True))      # only the second

    # McNemar's exact test (1947): if both are equally good, each of the b + c scenes on which
    # they differ is a fair coin.   p = min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c))
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    p = min(1.0, 2 * tail / 2 ** (b + c))

    # "Adjusted Wald" interval (Agresti and Min 2005): d +- z sqrt((b + c) - (c - b)^2 / n) / n
    # with d = (c - b) / n, after 1/2 was added to each of the four counts, so that b + c becomes
    # b + c + 1, and n becomes n + 2. It holds its level at small n, where Wald's does not.
    centre = (c - b) / (n + 2)
    half = Z * math.sqrt(b + c + 1 - (c - b) ** 2 / (n + 2)) / (n + 2)
    return dict(
        n=n,
        both=pairs.count((True, True)),
        only_first=b,
        only_second=c,
        neither=pairs.count((False, False)),
        difference=(c - b) / n,
        low=max(centre - half, -1.0),
        high=min(centre + half, 1.0),
        p=p,
    )


# ---- deployment ---------------------------------------------------------------------------------

MAX_MESSAGE = 32 * 2**20    # bytes of a request: 5 images of 1920 x 1080; openpi sets no limit
MAX_ITEMS = 1024            # maps and lists in a request, and entries of each
MAX_SIDE = 4096             # of an image [px]
MAX_PROMPT = 1000           # characters


class PolicyServer:
    """Serves a policy by the openpi policy protocol, to several clients at once.

    WebSocket, a msgpack map in each message, see encode(). The server speaks first and sends
    its metadata. Then it answers each request, an observation, with `actions` (K, 7) float32 in
    physical units and with timings [ms]. The answer to a wrong request is one line of text, and
    the end of that connection. GET /healthz answers OK.

    policy          whatever passes policies.check_policy
    cameras         images of an observation, or the last parts of their names, in the policy's
                    order; None: what the checkpoint says, or else the only image
    prompt          instruction of requests without one; None: the checkpoint's, if it has one
    decoding, seed  as in run_episodes: client k gets the noise that block k gets there

    Raises ValueError.
    """

    def __init__(self, policy, cameras=None, prompt=None, decoding="deploy", seed=EVAL_SEED):
        stated = getattr(policy, "deployment", None) or {}      # what its checkpoint says
        trained = stated.get("cameras") or []
        instructions = stated.get("instructions") or []
        if prompt is None and len(instructions) == 1:
            prompt = instructions[0]
        self.policy = policy
        self.cameras = list(cameras or trained)
        self.prompt = prompt
        self.decoding = decoding
        self.seed = seed
        self.clients = itertools.count()
        self.lock = threading.Lock()            # around act, and around the numbers printed
        self.traffic = Traffic()
        self.metadata = dict(actions=policies.ACTIONS)
        self.metadata.update(stated)
        self.metadata.update(
            policy=getattr(policy, "kind", type(policy).__name__),
            cameras=self.cameras,
            horizon=policy.chunk,               # K, rows of actions in an answer
            reads_state=policy.reads_state,
            decoding=decoding,
        )
        # Those of its cameras that pi0.5, with up to three, is not given are missing to it.
        most = len(trained) or (3 if 5 in getattr(policy, "image_ndims", ()) else 1)
        problems = policies.Problems()
        problems.need(len(self.cameras) <= most, "--camera",
                      f"{len(self.cameras)} cameras, {self.cameras}",
                      f"at most {most}, in the order of training: {trained or 'unknown'}",
                      "--camera NAME")
        problems.stop()

    def listen(self, host, port):
        """Bind to an address. Returns a websockets server; its serve_forever() runs it."""
        # A client's mistakes are no errors of the server.
        logging.getLogger("websockets").setLevel(logging.CRITICAL)
        try:
            return websockets.sync.server.serve(
                self.converse,                  # in a thread for each client
                host,
                port,
                compression=None,
                max_size=MAX_MESSAGE,
                max_queue=1,                    # messages that wait, for each client
                origins=[None],                 # no web page that a browser has open may connect
                process_request=answer_health,
            )
        except OSError as error:
            raise ValueError(
                f"--host, --port: got {host} {port} ({error.strerror}); need an address of this "
                "machine and a free port; try --port 8001"
            ) from None

    def converse(self, connection):
        """Answer the requests of one client, until it leaves or makes a mistake."""
        generator = noise_generator(self.policy, self.seed, next(self.clients))
        last = {}                               # timing of the last answer
        try:
            connection.send(encode(self.metadata))
            for message in connection:
                start = time.perf_counter()
                answer = self.answer(message, generator)
                answer["server_timing"].update(last)
                connection.send(encode(answer))
                last = dict(prev_total_ms=milliseconds(start))
        except websockets.ConnectionClosed as error:
            tqdm.write(f"a client has gone: {error}", file=sys.stderr)
        except Exception as error:              # whatever it is, the other clients are served on
            text = "; ".join(str(error).splitlines())
            if not isinstance(error, ValueError):
                text = f"{type(error).__name__}: {text}"
            text = text[:2000]                  # it may quote the request
            tqdm.write(f"refused: {text}", file=sys.stderr)
            with contextlib.suppress(websockets.ConnectionClosed):
                connection.send(text)
            reason = "Internal server error. Traceback included in previous frame."
            connection.close(1011, reason)      # code and words of openpi

    def answer(self, message, generator):
        """Return the answer to the message of a request."""
        start = time.perf_counter()
        batch = self.read(decode(message))
        with self.lock:
            begun = time.perf_counter()
            decision = self.policy.act(**batch, decoding=self.decoding, generator=generator)
            actions = decision.actions[0].cpu().numpy()         # (K, 7)
            policy_timing = dict(infer_ms=milliseconds(begun))
            server_timing = dict(infer_ms=milliseconds(start))
            self.traffic.add(server_timing["infer_ms"])
        # Clients that execute chunks index every array of an answer by the step: one array only.
        return dict(actions=actions, policy_timing=policy_timing, server_timing=server_timing)

    def read(self, observation):
        """Turn an observation into the arguments of act: images, instructions, state; batch 1."""
        found = {}                              # as name -> value, or images/name -> value
        for key, value in observation.items():
            if isinstance(value, dict):
                found.update({f"{key}/{inner}": part for inner, part in value.items()})
            else:
                found[str(key)] = value
        state = self.read_state(found) if self.policy.reads_state else None
        return dict(
            images=self.read_images(found), instructions=[self.read_prompt(found)], state=state
        )

    def read_images(self, found):
        """Return the images of the cameras, (1, H, W, 3) or, if several, (1, N, H, W, 3) uint8.

        Names may have any prefix: observation/NAME (LIBERO, DROID), images/NAME (ALOHA),
        observation.images.NAME (LeRobot).
        """
        all_images = [name for name, value in found.items() if getattr(value, "ndim", 0) == 3]
        got = f"an observation of {list(found)}"
        remedy = "evaluate.py --serve --camera NAME"
        if not self.cameras:
            fine = len(all_images) == 1
            refuse_unless(fine, "image", got, "one image, as no camera is named", remedy)
        images = []
        for camera in self.cameras or all_images:
            names = [name for name in found if last_part(name) == last_part(camera)]
            fine = len(names) == 1
            refuse_unless(fine, f"camera {camera}", got, "one image of that name", remedy)
            images.append(read_image(names[0], found[names[0]]))
        shapes = [image.shape for image in images]
        remedy = "resize_with_pad of openpi_client.image_tools"
        fine = len(set(shapes)) == 1
        refuse_unless(fine, "images", shapes, "the same shape for all cameras", remedy)
        images = np.stack(images)[None]
        return images[:, 0] if len(shapes) == 1 else images

    def read_prompt(self, found):
        """Return the instruction, a str."""
        prompt = found.get("prompt", self.prompt)
        if isinstance(prompt, np.ndarray) and prompt.size == 1:
            prompt = prompt.item()
        if isinstance(prompt, bytes):
            prompt = prompt.decode(errors="replace")
        fine = isinstance(prompt, str) and prompt.strip() and len(prompt) <= MAX_PROMPT
        refuse_unless(fine, "prompt", form(prompt), f"a text of 1 to {MAX_PROMPT} characters",
                      "evaluate.py --serve --prompt TEXT, for requests without one")
        return prompt

    def read_state(self, found):
        """Return the state, (1, n) float32."""
        state = found.get("observation/state", found.get("state"))
        fine = isinstance(state, np.ndarray) and state.ndim == 1 and state.dtype.kind in "iuf"
        fine = fine and np.isfinite(state).all()
        refuse_unless(fine, "state", f"{form(state)}, in an observation of {list(found)}",
                      "finite numbers (n,), in the order of training",
                      "the key observation/state, or state")
        return np.array(state, np.float32)[None]


def read_trials(folder):
    """Read a LeRobot data set (v2.1, v3.0) of trials. Returns [(instruction, success), ..].

    An episode has succeeded if `next.success` is true in any of its frames. Raises ValueError.
    """
    folder = pathlib.Path(folder)
    lines = folder / "meta/episodes.jsonl"      # of v2.1
    try:
        if lines.exists():
            episodes = [json.loads(line) for line in lines.read_text().splitlines()]
        else:
            columns = ["episode_index", "tasks"]
            episodes = pq.read_table(folder / "meta/episodes", columns=columns).to_pylist()
        columns = ["episode_index", "next.success"]
        rows = pq.read_table(folder / "data", columns=columns).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--trials: got {folder} ({str(error).splitlines()[0]}); need a LeRobot data set with "
            "a column next.success; try what README.md says under Deployment"
        ) from None
    flags = collections.defaultdict(list)       # episode -> next.success of its frames
    for row in rows:
        flags[row["episode_index"]].append(row["next.success"])
    trials = []
    problems = policies.Problems()
    for episode in episodes:
        number = episode["episode_index"]
        judged = flags[number] and None not in flags[number]
        problems.need(judged, f"{folder}, episode {number}", "frames without next.success",
                      "true or false in each", "to judge it again, or to delete it")
        trials.append((episode["tasks"][0], bool(np.any(flags[number]))))
    problems.need(trials, folder, "no episodes", "1 or more", "to record some")
    problems.stop()
    return trials


# ---- plumbing: skip on first reading ------------------------------------------------------------
# ---- tables and figures -------------------------------------------------------------------------

RATES = {               # columns of table(): title -> format of a row
    "checkpoint": "{checkpoint}",
    "task": "{task}",
    "domain": "{domain}",
    "variant": "{variant}",
    "success": "{success:.1%}",
    "95 % interval": "{low:.1%} - {high:.1%}",
    "n": "{n}",
    "mean steps": "{steps:.1f}",
}
COMPARISONS = {         # columns of comparison_table()
    "second": "{second}",
    "first": "{first}",
    "task": "{task}",
    "domain": "{domain}",
    "variant": "{variant}",
    "both": "{both}",
    "only first": "{only_first}",
    "only second": "{only_second}",
    "neither": "{neither}",
    "difference": "{difference:+.1%}",
    "95 % interval": "{low:+.1%} to {high:+.1%}",
    "p (McNemar)": "{p:.2g}",
}
TRIALS = {              # columns of count_trials()
    "data set": "{folder}",
    "instruction": "{instruction}",
    "success": "{success:.1%}",
    "95 % interval": "{low:.1%} - {high:.1%}",
    "n": "{n}",
}
GAINS = {               # columns of gain_table()
    "task": "{task}",
    "domain": "{domain}",
    "places": "{places}",
    "before": "{before[success]:.1%}",
    "after": "{after[success]:.1%}",
    "n": "{n}",
    "gain": "{difference:+.1%}",
    "95 % interval": "{low:+.1%} to {high:+.1%}",
}


def table(rows):
    """Lay out success rates. rows: summary() with checkpoint, task, domain and variant."""
    return lay_out(rows, RATES, left=4)


def comparison_table(rows):
    """Lay out comparisons. rows: compare() with second, first, task, domain and variant."""
    return lay_out(rows, COMPARISONS, left=5)


def gain_table(rows):
    """Lay out gains. rows: compare() with task, domain, places, and summary() before and after."""
    return lay_out(rows, GAINS, left=3)


def lay_out(rows, columns, left):
    """Return a text table; its first `left` columns are flush left, the others flush right."""
    lines = [list(columns)]
    for row in rows:
        lines.append([text.format(**row) for text in columns.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths)]
        cells[:left] = [cell.ljust(width) for cell, width in zip(line[:left], widths)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def bar_chart(rows, path):
    """Draw the rows of table() as bars with their intervals, a colour for each checkpoint."""
    from matplotlib.figure import Figure        # unlike pyplot, it needs no display
    groups = {}                                 # checkpoint -> its rows
    for row in rows:
        groups.setdefault(row["checkpoint"], []).append(row)
    width = 0.8 / len(groups)
    figure = Figure(figsize=(4 + len(rows), 4), layout="constrained")
    axis = figure.add_subplot(ylim=(0, 1.02), ylabel="success rate, 95 % interval")
    for k, (label, some) in enumerate(groups.items()):
        x = np.arange(len(some)) + k * width
        success = np.array([row["success"] for row in some])
        ends = np.array([(row["low"], row["high"]) for row in some]).T      # (2, bars)
        axis.bar(x, success, 0.9 * width, yerr=abs(ends - success), capsize=3, label=label)
    names = [f"{row['task']}\n{row['domain']}\n{row['variant']}" for row in some]
    axis.set_xticks(x - k * width / 2, names)           # the middle of each group
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=120)


# Metrics that curves() draws, by name or by what stands before the slash (held_out/real).
CURVES = ("success", "reward", "ppo", "real", "loss", "held_out", "kl", "clipped", "cosine")


def curves(runs, path):
    """Draw learning curves as a PNG: a panel for each metric of CURVES, a line for each run.

    runs: {label: rows of metrics.jsonl}
    """
    from matplotlib.figure import Figure
    every_row = itertools.chain.from_iterable(runs.values())
    measured = dict.fromkeys(itertools.chain.from_iterable(every_row))
    names = [name for name in measured if name.split("/")[0] in CURVES]
    columns = min(4, max(1, len(names)))
    lines = max(1, math.ceil(len(names) / columns))
    figure = Figure(figsize=(4 * columns, 3.5 * lines), layout="constrained")
    for k, name in enumerate(names, 1):
        axis = figure.add_subplot(lines, columns, k, title=name, xlabel="step")
        for label, rows in runs.items():
            rows = [row for row in rows if name in row]
            steps = [row["step"] for row in rows]
            axis.plot(steps, [row[name] for row in rows], label=label)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def enlarge(image, border=None):
    """Enlarge an image (H, W, 3) to about 256 pixels; border: its colour, or None."""
    scale = max(256 // len(image), 1)
    image = image.repeat(scale, 0).repeat(scale, 1)         # a copy
    if border is not None:
        for edge in (image[:8], image[-8:], image[:, :8], image[:, -8:]):
            edge[:] = border
    return image


def write_videos(episodes, folder):
    """Write an mp4 of every episode that has frames and return the paths.

    A video shows what the policy saw, in real time. The last image lasts one second and has a
    border, green for a success, red for a failure.
    """
    paths = []
    for episode in episodes:
        if "frames" not in episode:
            continue
        outcome = "success" if episode["success"] else "failure"
        colour = GREEN if episode["success"] else RED
        images = [enlarge(image) for image in episode["frames"][:-1]]
        images += [enlarge(episode["frames"][-1], colour)] * envs.CONTROL_HZ
        path = pathlib.Path(folder, f"{episode['episode']:05d}-{outcome}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        # H.264 needs even sizes: macro_block_size=2.
        imageio.mimwrite(path, images, fps=envs.CONTROL_HZ, macro_block_size=2,
                         ffmpeg_log_level="quiet")
        paths.append(path)
    return paths


def contact_sheet(episodes, path, most=6):
    """Write a PNG: first, middle and last image of the first episodes that have frames."""
    rows = []
    for episode in [episode for episode in episodes if "frames" in episode][:most]:
        colour = GREEN if episode["success"] else RED
        frames = episode["frames"]
        images = [enlarge(frames[k], colour) for k in (0, len(frames) // 2, -1)]
        rows.append(np.concatenate(images, axis=1))
    if rows:
        imageio.imwrite(path, np.concatenate(rows))


# ---- command line -------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Cell:
    """Names a success rate: who plays what, and where."""

    checkpoint: str
    task: str
    domain: str
    variant: str


def parse(argv):
    """Read the flags. One ValueError lists all that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", nargs="+", default=[], help="policies; the first is the baseline")
    add("--curves", nargs="+", default=[],
        help="draw these metrics.jsonl instead; nothing but --out goes with it")
    add("--serve", action="store_true", help="serve one checkpoint to a robot instead")
    add("--trials", nargs="+", default=[],
        help="count the successes in these LeRobot data sets instead; nothing goes with it")
    add("--study", choices=STUDIES,
        help="train and evaluate what is missing of a study; --policy, --task, --seeds, "
        "--episodes, --workers and --out go with it")
    add("--seeds", type=int, default=3, help="of a study, 0 .. SEEDS - 1; default: 3")
    add("--policy", nargs="+", default=[], help="of a study; default: openvla pi05")
    add("--task", choices=[*envs.TASKS, "all"],
        help="the task, or all of them; default: open-drawer, and all for a study")
    add("--domain", default="both", choices=["sim", "real", "both"],
        help="real: the stand-in for a real robot; default: both")
    add("--variants", nargs="+", default=["whole-table"], choices=[*envs.VARIANTS, "all"],
        help="places where episodes start, and objects; default: whole-table")
    add("--episodes", type=int,
        help="of each success rate, >= 1; default: 100, and 400 for a study")
    add("--load", nargs="+", default=[], metavar="KEY=VALUE",
        help="options of policies.load_policy, for each checkpoint")
    add("--out", help="folder; default: runs/eval-CHECKPOINT-TASK, or runs/curves")
    add("--resume", action="store_true",
        help="run the blocks that are missing in OUT; all other flags but --workers as they were")
    add("--workers", type=int, default=0,
        help="processes; they change no result; default: 0, one per CPU core, or per GPU")
    add("--decoding", default="deploy", choices=policies.DECODINGS,
        help="how actions are chosen; default: deploy")
    add("--seed", type=int,
        help="seed of scenes and of the policy's noise, >= 0; default: "
        f"{EVAL_SEED}, and {STUDY_SEED} for a study")
    add("--videos", type=int, default=2,
        help="videos of successes, and of failures, for each success rate, >= 0; default: 2")
    add("--ablation", default="none", choices=ABLATIONS,
        help="what the policy is deprived of; default: none")
    add("--device", choices=["cpu", "cuda"],
        help="where the policy runs; default: cuda if there is a GPU")
    add("--dtype", default="float32", choices=["float32", "bf16"],
        help="arithmetic of the matrix products; default: float32")
    add("--host", default="127.0.0.1",
        help="address that --serve binds to; default: 127.0.0.1, this machine only")
    add("--port", type=int, default=8000,
        help="port that --serve binds to; 0: any free one; default: 8000")
    add("--camera", nargs="+",
        help="images of a request that the policy sees, or the last parts of their names, in its "
        "order; default: what the checkpoint says, or the only image")
    add("--prompt", help="instruction of requests without one; default: the checkpoint's only one")
    args = parser.parse_args(argv)
    given = []
    for flag, value in vars(args).items():
        if value != parser.get_default(flag):
            given.append(flag)
    args.command = shlex.join(["python", "evaluate.py", *argv])
    args.task = args.task or ("all" if args.study else "open-drawer")
    args.tasks = list(envs.TASKS) if args.task == "all" else [args.task]
    args.policies = args.policy or ["openvla", "pi05"]
    if args.episodes is None:
        args.episodes = STUDY_EPISODES if args.study else 100
    if args.seed is None:
        args.seed = STUDY_SEED if args.study else EVAL_SEED
    args.domains = ["sim", "real"] if args.domain == "both" else [args.domain]
    args.variants = list(envs.VARIANTS) if "all" in args.variants else args.variants
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.workers = args.workers or (torch.cuda.device_count() if args.device == "cuda" else cores())
    check(args, given)
    return args


def check(args, given):
    """Raise a ValueError that lists all wrong flags; it leaves no trace. Fills in --out."""
    problems = policies.Problems()
    server = {"host", "port", "camera", "prompt"}
    modes = dict(                       # the flags that go with each use of this script
        checkpoint=set(given) - {"curves", "study", "seeds", "policy", "trials", *server},
        curves={"curves", "out"},
        study={"study", "policy", "task", "seeds", "seed", "episodes", "workers", "device", "out"},
        trials={"trials"},
        serve={"serve", "checkpoint", "load", "decoding", "seed", "device", "dtype", *server})
    if args.serve:
        del modes["checkpoint"]          # one of the flags that go with --serve
    chosen = [mode for mode in modes if getattr(args, mode)]
    problems.need(len(chosen) == 1, "--checkpoint, --curves, --study, --trials, --serve",
                  chosen or "none of them", "one of them", "--checkpoint openvla")
    for mode in chosen[:1]:
        useless = [f"--{flag}" for flag in given if flag not in modes[mode]]
        problems.need(not useless, f"--{mode}", f"{' '.join(useless)} beside it",
                      "only flags that go with it", "python evaluate.py --help")
    problems.need(not args.serve or len(args.checkpoint) == 1, "--serve",
                  f"{len(args.checkpoint)} checkpoints", "one", "--checkpoint openvla")
    problems.need(0 <= args.port < 2**16, "--port", args.port, "0 to 65535", "--port 8000")
    for flag, low in dict(episodes=1, workers=0, videos=0, seed=0, seeds=1).items():
        got = getattr(args, flag)
        problems.need(got >= low, f"--{flag}", got, f"{low} or more", f"--{flag} {low}")
    for file in args.curves:
        problems.need(pathlib.Path(file).is_file(), "--curves", file, "an existing file",
                      "metrics.jsonl in the folder of a run")
    for name in args.checkpoint:
        with noted(problems):
            policies.find_folder(name)
    with noted(problems):
        policies.parse_load(args.load)
    for name in args.policy:
        with noted(problems):
            policies.find_folder(name)
    if args.checkpoint or args.curves or args.study:
        args.out = args.out or default_folder(args)
    if args.checkpoint and not args.serve:
        check_folder(problems, args)
    problems.stop()


@contextlib.contextmanager
def noted(problems):
    """Note a ValueError among other problems."""
    try:
        yield
    except ValueError as error:
        problems.append(str(error))


def check_folder(problems, args):
    """Note an OUT that holds other results than --resume needs."""
    path = journal(args)
    if not args.resume:
        taken = path.exists() or path.with_name("result.json").exists()
        problems.need(not taken, "--out", f"{args.out}, which holds results", "a new folder",
                      "--resume to go on with them, or another --out")
    elif not path.exists():
        problems.need(False, "--resume", f"no {path}", "an interrupted evaluation",
                      "without --resume")
    elif not problems:
        changed = changes(args)
        problems.need(not changed, "--resume", "; ".join(changed), f"what {path} was begun with",
                      "the command in it, or another --out")


def cores():
    """Count the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):        # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def default_folder(args):
    """Return the default of --out, named after the first checkpoint."""
    if args.curves:
        return "runs/curves"
    if args.study:
        return f"results/{args.study}"
    path = pathlib.Path(args.checkpoint[0])
    if path.name == "policy":
        path = path.resolve().parent
    return f"runs/eval-{path.name}-{args.task}"


# ---- what has ended is kept ---------------------------------------------------------------------

def journal(args):
    """Return OUT/episodes.jsonl: a header, then a line for each block that has ended."""
    return pathlib.Path(args.out, "episodes.jsonl")


def read_journal(args):
    """Return the lines of the journal but those that a kill has cut."""
    lines = []
    for line in journal(args).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def add_line(args, line):
    """Add a line to the journal. Its newline comes first: a kill may have cut the last line."""
    with open(journal(args), "a") as file:
        file.write("\n" + json.dumps(line))


def header(args):
    """Return the command, and all that can change its result."""
    flags = dict(vars(args))
    for name in ("command", "domains", "out", "policies", "resume", "tasks", "workers", "curves",
                 "study", "policy", "seeds", "trials", "serve", "host", "port", "camera", "prompt"):
        del flags[name]
    for package in ("torch", "transformers", "mujoco", "numpy"):
        flags[f"version of {package}"] = importlib.metadata.version(package)
    for name in args.checkpoint:
        folder = policies.find_folder(name)
        files = [*folder.glob("*.json"), *folder.rglob("*.safetensors")]
        flags[f"time of {name}"] = max([file.stat().st_mtime for file in files])
    return dict(command=args.command, args=flags)


def changes(args):
    """Return what is no longer as it was when the journal was begun."""
    changed = []
    for begun in read_journal(args)[:1]:    # none, if it was killed at once
        now = header(args)["args"]
        for name, value in begun["args"].items():
            if now.get(name) != value:
                changed.append(f"{name} was {value}, is {now.get(name)}")
    return changed


def claim(args):
    """Begin the journal, or go on with it. ValueError, and no trace, if that fails."""
    path = journal(args)
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=args.resume)
        if not read_journal(args):
            add_line(args, header(args))
    except OSError as error:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise ValueError(
            f"--out: got {args.out} ({error.strerror}); need a new folder that can be written; "
            "try another --out"
        ) from None


@contextlib.contextmanager
def resumable(args):
    """Add to any error and signal that --resume goes on."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"the same command with --resume goes on from {journal(args)}")
        raise


@contextlib.contextmanager
def forgiven(what):
    """Turn an error into a warning: pictures may fail, numbers must not be lost."""
    try:
        yield
    except Exception as error:
        said = str(error).partition("\n")[0]
        warnings.warn(f"{what}: {type(error).__name__}: {said}; the numbers are complete")


@contextlib.contextmanager
def reported(spokesman=True):
    """Report errors, signals and warnings in one line each; see Errors in the header.

    spokesman: of several ranks only one reports what concerns all of them, a user's mistake.
    """
    def stop(number, frame):
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)         # a second one would break what ends
        raise KeyboardInterrupt

    before = {each: signal.signal(each, stop) for each in SIGNALS}
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            if not spokesman:
                warnings.simplefilter("ignore")
            yield
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("TRACEBACK"):
            traceback.print_exc()
        status = 1
        text = f"error: {error}"
        if isinstance(error, KeyboardInterrupt):
            status = 130
            text = "\ninterrupted"
        elif not isinstance(error, (ValueError, OSError)):
            spokesman = True
            text = f"error: {type(error).__name__}: {error} (set TRACEBACK=1 to see where)"
        if spokesman:
            print("; ".join([text, *getattr(error, "__notes__", [])]), file=sys.stderr)
        sys.exit(status)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def show_warning(message, *place, **options):
    """Be warnings.showwarning, without file and line."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


# ---- processes ----------------------------------------------------------------------------------

@contextlib.contextmanager
def worker_processes(count, device="cpu"):
    """Yield a pool of processes; none of them survives this one, however it ends."""
    spawn = multiprocessing.get_context("spawn")
    begun = spawn.Value("i", 0)             # processes so far
    pool = ProcessPoolExecutor(count, spawn, initializer=begin_worker, initargs=(begun, device))
    # The processes inherit that signals are blocked: this one handles them, and ends the others.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for _ in range(count):
        pool.submit(os.getpid)              # starts a process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield pool
    except BaseException as error:
        if isinstance(error, BrokenProcessPool):
            error.add_note("if memory ran out, try fewer --workers")
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def begin_worker(begun, device):
    """Prepare a process of the pool; it ends with its parent, even if that is killed.

    begun: how many there are already; with the device "cuda" they use the GPUs in turn.
    """
    with begun.get_lock():
        number = begun.value
        begun.value += 1
    if device == "cuda":
        gpu = number % torch.cuda.device_count()
        torch.cuda.set_device(gpu)
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(gpu))     # it renders there, too

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    tqdm.set_lock(threading.RLock())        # the default is a semaphore, which a kill leaks
    warnings.showwarning = show_warning


# A process keeps one policy at a time: it works through one checkpoint after another.
@functools.lru_cache(maxsize=1)
def load(checkpoint, device, dtype, *pairs):
    """Load a policy, to act only. pairs: of --load."""
    options = policies.parse_load(pairs)
    return policies.load_policy(checkpoint, device, dtype, freeze="all", **options)


def check_ready(policy, tasks):
    """Raise ValueError if a policy could not act on these tasks; warn of words it does not know."""
    if hasattr(policy, "quantiles"):
        policy.quantiles("action")          # there are statistics, of one data set
    texts = [envs.TASKS[task].instruction.replace("{colour}", "red") for task in tasks]
    policies.check_texts(policy, texts)


def look(args, checkpoint):
    """Load a checkpoint in a process of the pool; return what a user should be told about it."""
    policy = load(checkpoint, args.device, args.dtype, *args.load)
    check_ready(policy, args.tasks)
    return getattr(policy, "notes", [])


def announce(pool, args):
    """Print what is to be said about each checkpoint, or raise one ValueError with all errors."""
    problems = policies.Problems()
    futures = [pool.submit(look, args, checkpoint) for checkpoint in args.checkpoint]
    for checkpoint, future in zip(args.checkpoint, futures):
        with noted(problems):
            for note in future.result():
                print(f"{checkpoint}: {note}")
    problems.stop()


def work(args, cell, block):
    """Run one block in a process of the pool, write its videos, and return its episodes."""
    if args.device == "cpu":
        torch.set_num_threads(1)            # there are as many processes as cores
        torch.set_flush_denormal(True)      # as in training
    with warnings.catch_warnings(action="ignore"):      # announce() has shown them
        policy = load(cell.checkpoint, args.device, args.dtype, *args.load)
    episodes = run_episodes(policy, cell.task, cell.domain, args.episodes, variant=cell.variant,
                            seed=args.seed, blocks=[block], decoding=args.decoding,
                            ablation=args.ablation, frames=args.videos)
    folder = video_folder(args, cell)
    with forgiven(folder):
        write_videos(episodes, folder)
    for episode in episodes:
        episode.pop("frames", None)
    return episodes


def run(args):
    """Run all blocks that are missing in a pool of processes and return {Cell: episodes}."""
    names = itertools.product(args.checkpoint, args.tasks, args.domains, args.variants)
    cells = [Cell(*each) for each in names]
    blocks = range(math.ceil(args.episodes / BLOCK))
    done = {}                               # (cell, block) -> episodes
    if args.resume:
        for line in read_journal(args)[1:]:
            done[Cell(**line["cell"]), line["block"]] = line["episodes"]
    missing = [job for job in itertools.product(cells, blocks) if job not in done]
    if missing:
        with worker_processes(min(args.workers, len(missing)), args.device) as pool:
            announce(pool, args)            # all that can be refused is refused up to here
            claim(args)
            with resumable(args), Progress(total=len(cells) * args.episodes) as bar:
                for episodes in done.values():
                    bar.add(episodes)
                futures = {pool.submit(work, args, *job): job for job in missing}
                for future in as_completed(futures):
                    cell, block = futures[future]
                    episodes = future.result()
                    line = dict(cell=dataclasses.asdict(cell), block=block, episodes=episodes)
                    add_line(args, line)
                    done[cell, block] = episodes
                    bar.add(episodes)
        for change in changes(args):
            warnings.warn(f"during the evaluation, {change}: do not trust these numbers")
    results = {}
    for cell in cells:
        parts = [done[cell, block] for block in blocks]
        results[cell] = list(itertools.chain.from_iterable(parts))
    return results


# ---- results ------------------------------------------------------------------------------------

def report(args, results):
    """Print the tables, then write result.json, then the pictures, which may fail."""
    rows = []
    comparisons = []
    for cell, episodes in results.items():
        baseline = dataclasses.replace(cell, checkpoint=args.checkpoint[0])
        before = by_place(cell.variant, results[baseline])
        for variant, some in by_place(cell.variant, episodes).items():
            names = dict(dataclasses.asdict(cell), domain=NAMES[cell.domain], variant=variant)
            rows.append(names | summary(some) | dict(episodes=some))
            if cell != baseline:
                names |= dict(second=cell.checkpoint, first=baseline.checkpoint)
                comparisons.append(names | compare(before[variant], some))
    print(f"\n{args.episodes} scenes each, seed {args.seed}, decoding {args.decoding}, ablation "
          f"{args.ablation}\nstand-in: a second simulation in place of the real robot\n")
    print(table(rows))
    if comparisons:
        print("\nOn the same scenes; difference: second - first, in percentage points\n")
        print(comparison_table(comparisons))
    path = pathlib.Path(args.out, "result.json")
    begun = read_journal(args)[0]
    policies.write_json(path, dict(begun, comparisons=comparisons, cells=rows))
    print(f"\nwrote {path}; beside it: pictures")
    figure = path.with_name("success.png")
    with forgiven(figure):
        bar_chart(rows, figure)
    for cell in results:
        folder = video_folder(args, cell)
        with forgiven(folder):
            choose_videos(folder, args.videos)


def video_folder(args, cell):
    """Return the folder for the videos of a success rate."""
    checkpoint = cell.checkpoint.strip("./").replace("/", "_")
    kind = f"{cell.task}-{NAMES[cell.domain]}-{cell.variant}"
    return pathlib.Path(args.out, "videos", checkpoint, kind)


def choose_videos(folder, count):
    """Keep the first `count` videos of successes and of failures; draw their contact sheet."""
    shown = []
    for outcome in ("success", "failure"):
        videos = sorted(folder.glob(f"*-{outcome}.mp4"))
        for video in videos[count:]:
            video.unlink()
        for video in videos[:count]:
            frames = imageio.v3.imread(video)
            shown.append(dict(success=outcome == "success", frames=frames))
    contact_sheet(shown, folder / "contact-sheet.png")


def draw_curves(args):
    """Write OUT/curves.png; a run is labelled by the folder of its metrics.jsonl."""
    runs = {}
    for file in args.curves:
        path = pathlib.Path(file)
        label = str(path.parent) if path.name == "metrics.jsonl" else path.stem
        try:
            runs[label] = [json.loads(line) for line in path.read_text().splitlines()]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--curves: got {file} ({error}); need a JSON object on each line; try the "
                "metrics.jsonl of a run that has ended"
            ) from None
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    curves(runs, out / "curves.png")
    print(f"wrote {out}/curves.png: {', '.join(runs)}")


# ---- requests and answers of the server --------------------------------------------------------

class Traffic(tqdm):
    """Shows requests, requests per second, and the latency of the last 1000."""

    def __init__(self):
        super().__init__(unit="request", delay=1e-3)        # appears with the first one
        self.latencies = collections.deque(maxlen=1000)     # [ms]

    def add(self, latency):
        """Count a request; latency [ms]: from its arrival until its actions are there."""
        self.latencies.append(latency)
        median, p99 = np.percentile(self.latencies, [50, 99])
        self.set_postfix_str(f"median {median:.1f} ms, p99 {p99:.1f} ms", refresh=False)
        self.update()


def read_image(name, image):
    """Return an image of a request as (H, W, 3) uint8.

    As openpi's servers do, takes (3, H, W), too, and floats in 0 .. 1, which it rounds.
    """
    fine = isinstance(image, np.ndarray) and image.ndim == 3 and 3 in image.shape[::2]
    fine = fine and 1 <= min(image.shape) and max(image.shape) <= MAX_SIDE
    if fine and image.dtype.kind == "f":
        fine = image.min() >= 0 and image.max() <= 1            # false for NaN
    elif fine:
        fine = image.dtype == np.uint8
    refuse_unless(fine, name, form(image), "RGB (H, W, 3) or (3, H, W), uint8 or floats in 0 .. 1, "
                  f"sides up to {MAX_SIDE}", "image.astype(np.uint8) of values in 0 .. 255")
    if image.shape[2] != 3:
        image = image.transpose(1, 2, 0)
    if image.dtype.kind == "f":
        image = np.rint(255 * image)
    return np.ascontiguousarray(image, np.uint8)


def refuse_unless(ok, what, got, need, remedy):
    """Raise the ValueError that answers a wrong request, unless ok."""
    problems = policies.Problems()
    problems.need(ok, what, got, need, remedy)
    problems.stop()


def form(value):
    """Describe a part of a request, for a message."""
    if isinstance(value, np.ndarray):
        span = ""
        if value.dtype.kind in "iuf" and value.size:
            span = f", values {value.min():.4g} to {value.max():.4g}"
        return f"{value.dtype} {value.shape}{span}"
    if isinstance(value, str):
        return f"a text of {len(value)} characters"
    return "none" if value is None else type(value).__name__


def last_part(name):
    """Return the last part of a name: image, of observation/image or observation.images.image."""
    return name.replace(".", "/").split("/")[-1]


def milliseconds(start):
    """Return the milliseconds since `start`."""
    return 1000 * (time.perf_counter() - start)


def answer_health(connection, request):
    """Answer GET /healthz; None: go on with the WebSocket."""
    if request.path == "/healthz":
        return connection.respond(200, "OK\n")


def encode(message):
    """Pack a map as openpi-client does; an array is a map with the keys below, as bytes."""
    def pack_array(array):
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str,
                b"shape": array.shape}

    return msgpack.packb(message, default=pack_array)


def decode(message):
    """Unpack a message. Memory stays within a small multiple of its size. Raises ValueError.

    Arrays are views of the message, whose size their shape has to fit. Only plain numbers and
    texts become arrays: neither objects nor pickles.
    """
    containers = itertools.count(1)

    def count(container):
        if next(containers) > MAX_ITEMS:
            raise ValueError(f"more than {MAX_ITEMS} maps and lists")
        return container

    def unpack_array(entry):
        count(entry)
        if b"__ndarray__" not in entry and b"__npgeneric__" not in entry:
            return entry
        dtype = np.dtype(entry[b"dtype"])
        if dtype.kind not in "biufU":
            raise ValueError(f"an array of {dtype}")
        if b"__npgeneric__" in entry:
            return dtype.type(entry[b"data"])
        return np.frombuffer(entry[b"data"], dtype).reshape(entry[b"shape"])

    fault = "a text message"
    if isinstance(message, bytes):
        try:
            fault = "no map"
            observation = msgpack.unpackb(message, object_hook=unpack_array, list_hook=count,
                                          max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS)
            if isinstance(observation, dict):
                return observation
        except Exception as error:              # the bytes come from anywhere
            fault = f"{type(error).__name__}, {error}"
    raise ValueError(f"message: got {fault}; need a map of observations in msgpack, as binary "
                     "message; try openpi-client") from None


def serve(args):
    """Serve a checkpoint until Ctrl-C or SIGTERM, which are the normal end: exit status 0."""
    policy = load(args.checkpoint[0], args.device, args.dtype, *args.load)
    for note in getattr(policy, "notes", []):
        print(note)
    check_ready(policy, [])
    if "chunk" not in policies.parse_load(args.load):
        policy.chunk = policy.horizon           # the client chooses how many it executes
    service = PolicyServer(policy, args.camera, args.prompt, args.decoding, args.seed)
    server = service.listen(args.host, args.port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with service.traffic, server, contextlib.suppress(KeyboardInterrupt):
        host, port = server.socket.getsockname()[:2]
        if not ipaddress.ip_address(host).is_loopback:
            warnings.warn(f"--host {args.host}: there is no authentication: whoever reaches this "
                          "port can use the policy")
        cameras = ", ".join(service.cameras) or "the only image"
        rate = service.metadata.get("control_hz", "unknown")
        print(f"serving {service.metadata['policy']} at ws://{host}:{port}; cameras: {cameras}; "
              f"actions an answer: {policy.chunk}; control rate [Hz]: {rate}; end: Ctrl-C",
              flush=True)
        thread.join()
    traffic = service.traffic
    print(f"served {traffic.n} requests; latency: {traffic.postfix or 'unknown'}")


def count_trials(args):
    """Print the success rate of each instruction in data sets of trials."""
    rows = []
    for folder in args.trials:
        trials = read_trials(folder)
        instructions = sorted({instruction for instruction, _ in trials})
        if len(instructions) > 1:
            instructions.append("all")
        for chosen in instructions:
            outcomes = [win for text, win in trials if chosen in (text, "all")]
            k = sum(outcomes)
            n = len(outcomes)
            low, high = wilson(k, n)
            rows.append(dict(folder=folder, instruction=chosen, n=n, success=k / n, low=low,
                             high=high))
    print(lay_out(rows, TRIALS, left=2))
# ---- studies ------------------------------------------------------------------------------------
# A study compares arms: ways to train a policy. Each arm is trained with every seed, in every task,
# and evaluated on the same scenes. Each step is a command line that you could type yourself.

STUDY_SEED = 2_000_003      # of the scenes of studies: no training and no choice has seen them
STUDY_EPISODES = 400        # whole-table scenes of a success rate: 200 of each kind of place
RESAMPLES = 2000            # of the bootstrap
HEADLINE = "stand-in/whole-table"
STUDY_RUNS = "runs/study"   # folder of the runs; studies share them


class Arm(NamedTuple):
    """A way to train: flags of the two stages."""

    name: str
    stage_one: str = ""             # flags of sft_warmstart.py
    stage_two: str | None = None    # flags of rl_cotrain.py; None: no Stage II
    series: str = ""                # of a line in the figure, and
    x: float | None = None          # the place of the arm on it


class Study(NamedTuple):
    """Arms to compare, and what the paper found."""

    arms: list
    baseline: str                   # name of the arm that gains are measured from
    paper: str
    variants: tuple = ("whole-table",)
    x: str = ""                     # name of the axis, if the figure is a line


REAL_ONLY = Arm("SFT on real demos", "--sim-ratio 0")
CO_TRAINING = Arm("SFT co-training")
PLAIN_RL = Arm("RL without anchor", "", "--lambda-real 0 --watch-real")
RL_CO = Arm("RL-Co", "", "")
TWIN = "--randomise places"         # the paper's setting: practice in the plain twin


def study_of_anchor():
    """Return the arms of the study of lambda: in the default set-up, and in the plain twin."""
    arms = [CO_TRAINING]
    for name, setting in (("randomised dynamics", ""), ("plain twin", TWIN)):
        for weight in (0, 0.1, 0.3, 1, 3, 10):
            flags = f"--lambda-real {weight} --watch-real {setting}"
            arms.append(Arm(f"{name}, lambda {weight}", "", flags, name, weight))
    return arms


def study_of_data():
    """Return the arms of the study of the number of real demonstrations a task."""
    arms = []
    for count in (5, 10, 20, 50, 100):
        demos = f"--real-episodes {count}"
        for series, one, two in (("SFT on real demos", f"--sim-ratio 0 {demos}", None),
                                 ("SFT co-training", demos, None),
                                 ("RL-Co", demos, demos)):
            arms.append(Arm(f"{series}, {count}", one, two, series, count))
    return arms


MAIN = [REAL_ONLY, CO_TRAINING, PLAIN_RL, RL_CO]
STUDIES = dict(
    main=Study(
        MAIN, "SFT co-training",
        "on a robot, mean of the four tasks: SFT on real demos 16.5 (OpenVLA) and 26.7 (pi0.5), "
        "SFT co-training 40.0 and 45.9, RL-Co 64.0 and 66.2 %"),
    anchor=Study(
        study_of_anchor(), "SFT co-training",
        "pi0.5 on a robot, lambda .04, .2, 1: pick and place 81, 77, 78 %, open drawer 40, 75, "
        "65 %; without anchor, pick and place 40 %", x="lambda"),
    stages=Study(
        [Arm("real data in neither", "--sim-ratio 1", "--lambda-real 0"),
         Arm("real data in Stage II", "--sim-ratio 1", ""),
         Arm("real data in Stage I", "", "--lambda-real 0"),
         Arm("real data in both", "", "")],
        "real data in Stage I", "pi0.5 on a robot, pick and place: 6, 13, 40, 81 %"),
    init=Study(
        [Arm("Stage I on real demos, then RL-Co", "--sim-ratio 0", ""), RL_CO], "RL-Co",
        "success in simulation during practice: below 1.5 % without simulated demonstrations in "
        "Stage I, .66 to .81 with them"),
    alpha=Study(
        [Arm(f"alpha {alpha}", f"--sim-ratio {alpha}", None, "SFT", alpha)
         for alpha in (0, 0.25, 0.5, 0.75, 0.9, 0.95, 1)], "alpha 0",
        "pi0.5 on a robot, alpha 0, .5, .8, .9, .95: pick and place 72, 69, 42, 49, 36 %, open "
        "drawer 0, 5, 15, 15, 10 %", x="alpha"),
    data=Study(
        study_of_data(), "SFT co-training, 50",
        "pi0.5 on a robot, open drawer, 20, 50, 100, 200 demonstrations: SFT on real demos 0, 5, "
        "10, 50 %, SFT co-training 5, 25, 65, 70 %, RL-Co 65, 55, 75, 85 %",
        x="real demonstrations of a task"),
    unseen=Study(
        MAIN, "SFT co-training",
        "pi0.5 on a robot, pick and place, demonstrated / other objects / other places: SFT "
        "co-training 69, 31, 55 %, RL-Co 81, 56, 70 %",
        variants=("whole-table", "unseen-objects")))


class Job(NamedTuple):
    """A command of a study, done when the file or folder `result` exists."""

    command: list
    result: pathlib.Path
    started: pathlib.Path           # exists if an interrupted run can go on


def jobs_of(args, arm, policy, task, seed):
    """Return the jobs of one arm: Stage I (shared by the tasks), Stage II, evaluation."""
    def name(*parts):
        text = "-".join(str(part) for part in parts if part)
        return pathlib.Path(STUDY_RUNS, text.replace("--", "").replace(" ", "-").replace("/", "_"))

    def job(script, flags, out, result, started):
        command = [script, *flags, "--out", str(out)]
        return Job(command, out / result, out / started)

    out = name("sft", policy, arm.stage_one, f"seed{seed}")
    flags = ["--policy", policy, "--seed", str(seed), *arm.stage_one.split()]
    alone = ["--eval-episodes", "0", "--ranks", "1"]
    jobs = [job("sft_warmstart.py", [*flags, *alone], out, "policy", "resume.pt")]
    if arm.stage_two is not None:
        flags = ["--init", str(out / "policy"), "--task", task, "--seed", str(seed)]
        flags += arm.stage_two.split()
        out = name("rl", policy, task, arm.stage_one, arm.stage_two, f"seed{seed}")
        jobs.append(job("rl_cotrain.py", [*flags, *alone], out, "policy", "resume.pt"))
    flags = ["--checkpoint", str(out), "--task", task, "--episodes", str(args.episodes)]
    flags += ["--variants", *STUDIES[args.study].variants, "--seed", str(args.seed)]
    out = name("eval", out.name, task, args.study)
    flags += ["--videos", "0", "--workers", "1"]
    jobs.append(job("evaluate.py", flags, out, "result.json", "episodes.jsonl"))
    return jobs


def run_job(job, bar, running, devices):
    """Run a command to its end. Its output goes to OUT.log; ValueError with its last line."""
    if not job.result.exists():
        command = [sys.executable, *job.command]
        if job.started.exists():
            command.append("--resume")
        log = job.result.parent.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        device = devices.get()
        own = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=device)
        with open(log, "a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                       env=os.environ | own, start_new_session=True)
        running.append(process)             # run_study() stops what runs if it is stopped
        status = process.wait()
        devices.put(device)
        if status:
            last = log.read_text().strip().splitlines()[-1:]
            raise ValueError(f"{shlex.join(job.command)}: got exit status {status} "
                             f"({' '.join(last)}); need 0; try the same study after mending it")
    bar.update()


def run_arm(jobs, *context):
    """Run the jobs of an arm; return what they measured: outcomes, curves, seconds."""
    for job in jobs[1:]:                    # Stage I has run
        run_job(job, *context)
    result = policies.read_json(jobs[-1].result)
    outcomes = {}
    for cell in result["cells"]:            # those of the whole table contain the others
        if cell["variant"] in jobs[-1].command:
            successes = "".join(str(int(each["success"])) for each in cell["episodes"])
            outcomes[f"{cell['domain']}/{cell['variant']}"] = successes
    curve = {}
    seconds = 0.0
    for line in jobs[-2].result.with_name("metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        seconds += row.get("iteration_s", 0)
        for name in ("success", "held_out/real"):
            if name in row:
                curve.setdefault(name, []).append([row["step"], row[name]])
    practised = len(jobs) == 3
    return dict(outcomes=outcomes, curve=curve, seconds=round(seconds), practised=practised)


def run_study(args):
    """Train and evaluate what is missing of a study, a job for each worker; return its cells.

    OUT/cells.json holds them: {policy, arm, task, seed, commands, outcomes, curve, seconds,
    practised}, where outcomes are strings of 0 and 1, scene by scene. It is written after every
    evaluation.
    """
    path = pathlib.Path(args.out, "cells.json")
    kept = policies.read_json(path, {}).get("cells", [])
    cells = {tuple(cell["commands"]): cell for cell in kept}
    names = itertools.product(range(args.seeds), args.policies, args.tasks)
    wanted = {}                             # commands -> (names, jobs) of a cell
    for (seed, policy, task), arm in itertools.product(names, STUDIES[args.study].arms):
        jobs = jobs_of(args, arm, policy, task, seed)
        commands = tuple(shlex.join(job.command) for job in jobs)
        wanted[commands] = dict(policy=policy, arm=arm.name, task=task, seed=seed), jobs
    missing = {commands: each for commands, each in wanted.items() if commands not in cells}
    first = {jobs[0].result: jobs[0] for _, jobs in missing.values()}       # each Stage I once
    devices = queue.SimpleQueue()
    for worker in range(args.workers):
        devices.put(str(worker) if args.device == "cuda" else "")
    running = []
    total = len(first) + sum(len(jobs) - 1 for _, jobs in missing.values())
    with (tqdm(total=total, unit="job") as bar, ThreadPoolExecutor(args.workers) as pool):
        context = bar, running, devices
        try:
            list(pool.map(lambda job: run_job(job, *context), first.values()))
            futures = {}
            for commands, (_, jobs) in missing.items():
                futures[pool.submit(run_arm, jobs, *context)] = commands
            for future in as_completed(futures):
                commands = futures[future]
                cell = wanted[commands][0] | dict(commands=commands) | future.result()
                cells[commands] = cell
                policies.write_json(path, dict(cells=list(cells.values())))
                success = {name: each.count("1") / len(each)
                           for name, each in cell["outcomes"].items()}
                shown = "  ".join(f"{name} {rate:.1%}" for name, rate in success.items())
                tqdm.write(f"{cell['policy']} {cell['task']} seed {cell['seed']}, {cell['arm']}: "
                           f"{shown}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.send_signal(signal.SIGINT)      # it saves; the same study goes on
            raise
    return [cells[commands] for commands in wanted]


def hierarchical_interval(values):
    """Return mean, low, high: a 95 % bootstrap interval over seeds and over the scenes of each.

    values: (tasks, seeds, scenes), of successes or of their differences. The tasks are fixed. A
    seed is drawn with all its tasks, since they share its Stage I. Three seeds are few: the
    interval is then too narrow rather than too wide.
    """
    rng = np.random.default_rng(0)
    tasks, seeds, scenes = values.shape
    means = np.empty(RESAMPLES)
    for k in range(RESAMPLES):
        drawn = values[:, rng.integers(seeds, size=seeds)]
        rows = rng.integers(scenes, size=values.shape)
        means[k] = np.take_along_axis(drawn, rows, axis=2).mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return dict(mean=values.mean(), low=low, high=high)


def outcomes_of(args, cells, policy, arm):
    """Return {"stand-in/other-places": successes (tasks, seeds, scenes)} of an arm."""
    found = {}
    for cell in cells:
        if (cell["policy"], cell["arm"]) == (policy, arm):
            found[cell["task"], cell["seed"]] = cell["outcomes"]
    outcomes = {}
    for name in found[args.tasks[0], 0]:
        rows = []
        for task in args.tasks:
            rows.append([list(found[task, seed][name]) for seed in range(args.seeds)])
        values = np.array(rows) == "1"
        domain, variant = name.split("/")
        outcomes[name] = values
        if variant == "whole-table":        # see by_place()
            outcomes[f"{domain}/demonstrated"] = values[..., 0::2]
            outcomes[f"{domain}/other-places"] = values[..., 1::2]
    return outcomes


def study_rows(args, cells):
    """Sum up a study: for each policy and arm, means over tasks, seeds and scenes.

    Returns dicts: policy, arm, series, x; rates, {"stand-in/other-places": see
    hierarchical_interval}; and of HEADLINE: gain, the same of the difference to the baseline on
    the same seeds and scenes, and tasks, {task: success}.
    """
    study = STUDIES[args.study]
    rows = []
    for policy in args.policies:
        baseline = outcomes_of(args, cells, policy, study.baseline)
        for arm in study.arms:
            outcomes = outcomes_of(args, cells, policy, arm.name)
            rates = {name: hierarchical_interval(each) for name, each in outcomes.items()}
            gain = outcomes[HEADLINE].astype(float) - baseline[HEADLINE]
            by_task = outcomes[HEADLINE].mean((1, 2))
            rows.append(dict(policy=policy, arm=arm.name, series=arm.series, x=arm.x, rates=rates,
                             gain=hierarchical_interval(gain),
                             tasks=dict(zip(args.tasks, by_task))))
    return rows


def study_table(args, rows):
    """Lay out study_rows(): the whole table of the stand-in first, as it is the headline."""
    columns = {"policy": "{policy}", "arm": "{arm}"}
    columns["stand-in"] = f"{{rates[{HEADLINE}][mean]:.1%}}"
    columns["95 % interval"] = f"{{rates[{HEADLINE}][low]:.1%}} to {{rates[{HEADLINE}][high]:.1%}}"
    columns["gain"] = "{gain[mean]:+.1%}"
    columns["95 % interval "] = "{gain[low]:.1%} to {gain[high]:.1%}"
    for name in rows[0]["rates"]:
        if name != HEADLINE:
            columns[name] = "{rates[%s][mean]:.1%%}" % name
    for task in args.tasks:
        columns[task] = "{tasks[%s]:.1%%}" % task
    return lay_out(rows, columns, left=2)


def study_figure(study, rows, cells, path):
    """Draw a study, a line of panels for each policy: success, then curves of the practice."""
    from matplotlib.figure import Figure
    policies_ = list(dict.fromkeys(row["policy"] for row in rows))
    figure = Figure(figsize=(15, 4.5 * len(policies_)), layout="constrained")
    panels = figure.subplots(len(policies_), 3, squeeze=False)
    for policy, (success, practice, held_out) in zip(policies_, panels):
        some = [row for row in rows if row["policy"] == policy]
        if study.x:
            draw_lines(success, some, study.x)
        else:
            draw_bars(success, some)
        success.set(title=f"{policy}: success rate", ylim=(0, 1))
        success.legend(fontsize=8)
        own = [cell for cell in cells if cell["policy"] == policy]
        draw_practice(practice, own, "success", "success in practice, in simulation")
        draw_practice(held_out, own, "held_out/real", "loss of held-out real demonstrations")
    figure.savefig(path, dpi=120)


def draw_lines(axis, rows, x):
    """Draw success on the stand-in over x, with intervals: a line for each series."""
    for series in dict.fromkeys(row["series"] for row in rows):
        some = [row for row in rows if row["series"] == series]
        rates = [row["rates"][HEADLINE] for row in some]
        if not series:                      # an arm without a place on the axis
            axis.axhline(rates[0]["mean"], linestyle=":", color="grey", label=some[0]["arm"])
            continue
        mean = np.array([rate["mean"] for rate in rates])
        ends = np.array([[rate["low"], rate["high"]] for rate in rates]).T
        places = [row["x"] for row in some]
        axis.errorbar(places, mean, abs(ends - mean), marker="o", capsize=3, label=series)
    axis.set(xlabel=x, xscale="symlog" if x == "lambda" else "linear")


def draw_bars(axis, rows):
    """Draw a group of bars for each arm: domains and places, with intervals."""
    names = list(rows[0]["rates"])
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        rates = [row["rates"][name] for row in rows]
        mean = np.array([rate["mean"] for rate in rates])
        ends = np.array([[rate["low"], rate["high"]] for rate in rates]).T
        x = np.arange(len(rows)) + k * width
        axis.bar(x, mean, 0.9 * width, yerr=abs(ends - mean), label=name)
    axis.set_xticks(range(len(rows)), [row["arm"].replace(" ", "\n") for row in rows])


def draw_practice(axis, cells, name, title):
    """Draw a metric of Stage II over its iterations: the mean over tasks and seeds of each arm."""
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        curves_ = [cell["curve"][name] for cell in cells
                   if cell["arm"] == arm and cell["practised"] and name in cell["curve"]]
        if curves_:
            steps, values = np.mean(curves_, axis=0).T
            axis.plot(steps, values, label=arm)
    axis.set(title=title, xlabel="iteration")
    axis.legend(fontsize=8)


def report_study(args, cells):
    """Print the table of a study; write it and its figure beside its cells."""
    study = STUDIES[args.study]
    rows = study_rows(args, cells)
    text = "\n".join([
        f"{args.command}",
        f"{args.seeds} seeds, {args.episodes} scenes of seed {args.seed}; means over "
        f"{', '.join(args.tasks)}; gain: over {study.baseline}, same seeds and scenes",
        "stand-in: a second simulation in place of the real robot", "",
        study_table(args, rows), "", f"paper: {study.paper}"])
    print(f"\n{text}")
    out = pathlib.Path(args.out)
    out.joinpath("table.txt").write_text(text + "\n")
    with forgiven(out / "figure.png"):
        study_figure(study, rows, cells, out / "figure.png")
    print(f"wrote {out}/cells.json, table.txt, figure.png")


def main(argv=None):
    with reported():
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.curves:
            draw_curves(args)
        elif args.study:
            report_study(args, run_study(args))
        elif args.trials:
            count_trials(args)
        elif args.serve:
            serve(args)
        else:
            results = run(args)
            with resumable(args):
                report(args, results)


if __name__ == "__main__":
    main()
