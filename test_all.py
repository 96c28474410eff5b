"""Tests.

    python test_all.py                         # everything, on all CPU cores
    python test_all.py -m "not slow"           # a minute's worth; all options of pytest
    KILLS=17 python test_all.py -k killed      # each program is killed 17 times

Formula -> test that compares it with an independent one
    alpha L(sim) + (1 - alpha) L(real)     test_stage_one_gradient_is_the_formula,
                                           test_sampler_mixes_by_alpha_whatever_the_ranks
    grad L_PPO + lambda grad L_SFT(real)   test_stage_two_gradient_is_ppo_plus_lambda_times_anchor
    A_t = sum (gamma lambda)^l delta_t+l   test_gae_is_the_double_sum
    V(final observation) at a time limit   test_only_time_limits_bootstrap
    the anchor keeps the real loss down    test_the_anchor_keeps_the_real_loss: the claim, on a toy
    log-probs of tokens and of chains      test_openvla_logp_is_the_softmax_over_256,
                                           test_flow_formulas
    both official models                   test_openvla_*_official, test_pi05_matches_openpi
    kinematics, actions, rewards           test_env_formula, test_env_rule
    Wilson, McNemar, adjusted Wald         test_evaluate_formula

A mutant (last section) is a formula broken on purpose: the check that is named with it must fail by
assertion; a crash does not count.
"""
import ast
import builtins
import collections
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import contextlib
import copy
import dataclasses
import errno
import functools
import hashlib
import http.client
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import symtable
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest.mock
import warnings

import envs                     # first: it chooses the OpenGL backend before mujoco is imported
from envs import CLOSE
from envs import FREE
from envs import Waypoint
import imageio.v2 as imageio
import imageio_ffmpeg
import msgpack
import mujoco
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from safetensors.torch import save_file
import torch
import torch.nn.functional as F
import websockets.sync.client

import evaluate
import policies
import real_data
import rl_cotrain
import sft_warmstart

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "base"))
import pretrain  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
REFERENCE = HERE / "reference"  # arrays computed with the official models
MUTANTS = []


@dataclasses.dataclass
class Mutant:
    """A formula broken on purpose: `old` becomes `new` in owner.name, and `check` must fail."""

    module: object
    owner: object
    name: str
    old: str
    new: str
    check: object


def mutant_name(mutant):
    return f"{mutant.name}: {mutant.old} -> {mutant.new}"


def run_mutant(mutant, monkeypatch):
    """Break the formula; the check must fail by assertion: a crash does not count as noticed."""
    source = textwrap.dedent(inspect.getsource(getattr(mutant.owner, mutant.name)))
    assert mutant.old in source, f"{mutant.old!r} is not in {mutant.name}(): update MUTANTS"
    space = dict(vars(mutant.module))
    exec(source.replace(mutant.old, mutant.new), space)
    monkeypatch.setattr(mutant.owner, mutant.name, space[mutant.name])
    with pytest.raises(AssertionError):
        mutant.check()


# ---- helpers -----------------------------------------------------------------------------------


ENV_SETTINGS = [
    ("sim", "demonstrated"),
    ("sim", "unseen-objects"),
    ("sim", "other-places"),
    ("real", "demonstrated"),
    ("real", "unseen-objects"),
    ("real", "other-places"),
    ("pretrain", "demonstrated"),
]
ENV_REST = np.array([0, 0, 0, 0, 0, 0, 1.])       # an action: stay, gripper open


def env_actions(n, steps, seed=0):
    """Return random actions (n, steps, 7)."""
    return np.random.default_rng(seed).uniform(-1, 1, (n, steps, 7)) * envs.ACTION_LIMIT


def env_make(task, domain="sim", num_envs=1, **options):
    """Return environments without images that have been reset."""
    env = envs.make_env(task, domain, num_envs, image_size=0, **options)
    env.reset()
    return env


def env_same(a, b):
    """Compare two observations bit by bit."""
    same = a["instructions"] == b["instructions"]
    for name in ("state", "privileged", "images"):
        same &= np.array_equal(a.get(name), b.get(name))
    return same


def env_mujoco(env, i):
    """Return MuJoCo's model and data of environment i, with kinematics and camera computed."""
    batch = env.scenes[env.task[i]].batch
    model = batch.get_model(i)
    data = batch.get_data(i)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_camlight(model, data)
    return model, data


def env_colours(value):
    """Return the list of all colours in a distribution, or in a dict of them."""
    if isinstance(value, envs.Choice):
        return list(value.options)
    if isinstance(value, dict):
        return sum([env_colours(one) for one in value.values()], [])
    return [value]


def env_distance(a, b):
    """Return the least distance between one of the points a (n, 3) and one of b (m, 3)."""
    return np.linalg.norm(np.array(a)[:, None] - np.array(b), axis=2).min()


class TouchCube(envs.Task):
    """The smallest task: touch a cube. It is the example of a fifth task."""

    name = "touch-cube"
    instruction = "touch the cube"
    xml = """
      <worldbody>
        <body name="cube" pos="0 0 .1">
          <freejoint/>
          <geom type="box" size=".03 .03 .03"/>
        </body>
      </worldbody>
      <sensor><contact subtree1="hand" body2="cube" data="found" num="1"/></sensor>"""

    def place(self, env, scene, i, rng):
        xy = env.start_xy(i, rng, np.array([[.42, -.05], [.52, .05]]))
        scene.qpos[i, FREE:] = *xy, .03, 1, 0, 0, 0
        env.goal[i] = *xy, .03

    def measure(self, env, scene, rows):
        env.object[rows] = scene.qpos[rows, FREE:FREE + 3]
        env.touch[rows] = scene.sensor[rows, 0] > 0
        env.success[rows] = env.touch[rows]

    def plan(self, env, i):
        return [Waypoint("object", (0, 0, .08), CLOSE, tolerance=.01),
                Waypoint("object", (0, 0, .02), CLOSE, tolerance=.005)]


torch.set_num_threads(1)
POLICY_TEXTS = [
    "open the drawer",
    "pick up the carrot and place it into the white tray",
    "push the Cube!",
    "close it",
    "put the red block on the plate",
]
POLICY_REACH = torch.tensor([0.05] * 3 + [0.25] * 3 + [1.0])  # [m, rad, gripper]
policy_both = pytest.mark.parametrize("name", ["openvla", "pi05"])


def policy_arrays(path):
    arrays = np.load(REFERENCE / path)
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def policy_near(ours, reference, tolerance):
    """Assert equal shapes and a largest difference of at most `tolerance`."""
    assert tuple(ours.shape) == tuple(reference.shape)
    gap = (ours.detach().double() - reference.double()).abs().max().item()
    assert gap <= tolerance, gap


def policy_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def policy_batch(size, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 64, 64, 3), dtype=np.uint8)
    return images, [POLICY_TEXTS[i % len(POLICY_TEXTS)] for i in range(size)]


def policy_actions(size, horizon):
    uniform = torch.rand(size, horizon, 7, generator=policy_generator())
    return (2 * uniform - 1) * POLICY_REACH


def policy_decide(policy, size, decoding="sample"):
    """Return random images with instructions, and what the policy decides on them."""
    seen = policy_batch(size)
    return seen, policy.act(*seen, None, decoding, policy_generator())


@torch.no_grad()
def policy_shaken(name, **settings):
    """Return a tiny policy away from its start, where pi0.5's expert ignores its prefix."""
    policy = policies.make_tiny(name, **settings)
    for p in policy.parameters():
        p += 0.05 * torch.randn(p.shape, generator=policy_generator(1))
    return policy


@pytest.fixture(scope="module")
def policy_pair():
    return {name: policy_shaken(name) for name in ("openvla", "pi05")}


@pytest.fixture
def policy_saved(tmp_path, name):
    policy_shaken(name).save(tmp_path / name)
    return tmp_path / name


def policy_same(a, b):
    a = a.state_dict()
    b = b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def policy_greedy(policy, rows, images):
    """Return greedy tokens of `act` for given prompt ids, one left-padded batch."""
    texts = [row[0, 1:] for row in rows]
    pad = policy.pad
    ids = torch.nn.utils.rnn.pad_sequence(texts, True, pad, padding_side="left")
    ids = F.pad(ids, (1, 0), value=policy.bos)
    features = torch.cat([policy.encode_images(image[None]) for image in images])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "prompt", lambda instructions: (ids, ids != pad))
        decision = policy.act(features, ["given"] * len(rows), decoding="greedy")
    return decision.trace["tokens"]


def policy_compare_pi05(policy):
    """Compare every intermediate of pi0.5 with the arrays of the official model."""
    inputs = policy_arrays("pi05_a/inputs.npz")
    ref = policy_arrays("pi05_a/outputs.npz")
    images = inputs["images"]
    features = policy.vision_tower(images.flatten(0, 1)).last_hidden_state
    features = features.unflatten(0, images.shape[:2])
    cameras = inputs["image_mask"]
    prompt = (inputs["tokens"], inputs["token_mask"])
    hidden, kv, valid = policy.prefix(features, cameras, *prompt)
    text = torch.ones(inputs["tokens"].shape[1], dtype=torch.bool)
    patches = cameras.any(0).repeat_interleave(policy.feature_shape[0])
    present = torch.cat([patches, text])
    assert torch.equal(valid, ref["prefix_pad_mask"][:, present])
    policy_near(hidden[valid], ref["prefix_hidden"][:, present][valid], 5e-5)
    t = inputs["time"]
    share = t[:, None, None]
    x_t = share * inputs["noise"] + (1 - share) * inputs["actions"]
    policy_near(policy.time_embedding(t[:, None])[:, 0], ref["adarms_cond"], 5e-5)
    v, h = policy.velocity(x_t[:, None], t[:, None], kv, valid)
    policy_near(v[:, 0], ref["v_t"], 5e-5)
    policy_near(h[:, 0], ref["suffix_hidden"], 5e-5)
    loss = policy.flow_loss(kv, valid, inputs["actions"], inputs["noise"], t)
    policy_near(loss, ref["loss"], 1e-4)
    loss.mean().backward()
    parameters = policy.named_parameters()
    grads = {"grad/" + policy.official_key(name): p.grad for name, p in parameters}
    for name in [key for key in ref if key.startswith("grad/")]:
        policy_near(grads[name], ref[name], 1e-5 * ref[name].abs().max())
    x = inputs["noise"][:, None]
    for i in range(10):
        v, _ = policy.velocity(x, torch.full((len(x), 1), 1 - i / 10), kv, valid)
        x = x - v / 10
    policy_near(x[:, 0], ref["sample10"], 3e-4)


def policy_rewrite_pi05(target, layout):
    """Write the official tiny pi0.5 as LeRobot or RLinf write theirs."""
    config = json.loads((REFERENCE / "pi05_a/config.json").read_text())
    tensors = load_file(REFERENCE / "pi05_a/model.safetensors")
    numbers = dict(q01=[-1.0] * 7, q99=[1.0] * 7)
    target.mkdir()
    if (
        layout == "lerobot"
    ):  # prefixed; both embeddings are stored, and lm_head is a decoy
        paligemma = "paligemma_with_expert.paligemma."
        head = paligemma + "lm_head.weight"
        embedding = paligemma + "model.language_model.embed_tokens.weight"
        tensors[embedding] = tensors[head].clone()
        tensors[head] = torch.randn_like(tensors[head])
        tensors = {"model." + key: value for key, value in tensors.items()}
        config["chunk_size"] = config.pop("action_horizon")
        config["max_action_dim"] = config.pop("action_dim")
        stats = {
            f"action.{key}": torch.tensor(value) for key, value in numbers.items()
        }
        file = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
        save_file(stats, target / file)
        save_file(tensors, target / "model.safetensors")
    elif layout == "rlinf":  # shards without an index, RL heads inside
        tensors["value_head.mlp.0.weight"] = torch.zeros(3, 3)
        for part in range(2):
            keys = sorted(tensors)[part::2]
            shard = {key: tensors[key] for key in keys}
            save_file(shard, target / f"part-{part}.safetensors")
        stats = {"norm_stats": dict(actions=numbers, state=numbers)}
        policies.write_json(target / "pick_and_place/norm_stats.json", stats)
    else:  # a dump of training with the prefixes of its wrappers
        folder = target / "actor/model_state_dict"
        folder.mkdir(parents=True)
        tensors = {
            "_orig_mod.module." + key: value for key, value in tensors.items()
        }
        torch.save(tensors, folder / "full_weights.pt")
    policies.write_json(target / "config.json", config)


def check_policy_openpi():
    policy_compare_pi05(policies.load_policy(REFERENCE / "pi05_a"))


def check_policy_agreement(name, **settings):
    """evaluate finds what act did, also row by row, without padding, and from cached features."""
    policy = policy_shaken(name, seed=2, **settings)
    (images, texts), decision = policy_decide(policy, 5)
    logp, _, _ = policy.evaluate(images, texts, decision.trace)
    policy_near(logp, decision.logp, 2e-4)
    features = policy.encode_images(images)
    for i in range(5):
        row = {key: part[i : i + 1] for key, part in decision.trace.items()}
        logp, _, value = policy.evaluate(features[i : i + 1], texts[i : i + 1], row)
        policy_near(logp, decision.logp[i : i + 1], 2e-4)
        policy_near(value, decision.value[i : i + 1], 1e-4)


def check_policy_agreement_openvla():
    check_policy_agreement("openvla")


def check_policy_agreement_pi05():
    check_policy_agreement("pi05")


def check_policy_chain():
    """flow_noise: the states are drawn from steps + 1 Gaussians; logp is their factors' mean."""
    policy = policy_shaken("pi05", seed=2)
    seen, decision = policy_decide(policy, 32)
    x = decision.trace["x"]
    states = torch.cat([x[:, :1], decision.trace["x_next"]], 1)  # (32, 5, 8, 8)
    assert torch.equal(states[:, :4], x)
    _, kv, valid = policy.observe(*seen, None, None)
    v, h = policy.velocity(x, 1 - torch.arange(4).expand(32, -1) / 4, kv, valid)
    low, high = (math.log(std**2) for std in policy.settings["noise_std"])
    log_variance = low + (high - low) * (policy.noise_head(h).tanh() + 1) / 2
    zero = torch.zeros_like(x[:, :1])
    mean = torch.cat([zero, x - v / 4], 1)
    std = torch.cat([zero + 1, (log_variance / 2).exp()], 1)
    normal = torch.distributions.Normal(mean, std)
    z = ((states - mean) / std).transpose(0, 1).flatten(1)  # 2048 numbers a step
    assert (z.mean(1).abs() < 0.1).all() and ((z.std(1) - 1).abs() < 0.07).all()
    logp, entropy, _ = policy.evaluate(*seen, decision.trace)
    factors = normal.log_prob(states)[:, :, :4, :7].sum((2, 3))
    policy_near(logp, factors.mean(1), 1e-3)
    policy_near(entropy, normal.entropy()[:, :, :4, :7].mean((1, 2, 3)), 1e-4)


def check_policy_sde():
    """flow_sde: mean and std of each step are those of Flow-GRPO."""
    policy = policies.make_tiny("pi05", sampler="flow_sde")
    x = torch.randn(2, 4, 8, 8, generator=policy_generator(0))
    v = torch.randn(2, 4, 8, 8, generator=policy_generator(1))
    mean, std = policy.transition(x, v, None, torch.arange(4).expand(2, -1))
    t = 1 - torch.arange(4)[:, None, None] / 4
    sigma = 0.5 * (t / (1 - t).clamp(min=1 / 4)).sqrt()
    drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
    policy_near(std, (sigma / 2).expand(x.shape), 5e-5)
    policy_near(mean, x - drift / 4, 1e-4)


def check_policy_tokens():
    """Token ids and bin centres are the official ones; the two lowest ids share a centre."""
    policy = policies.make_tiny("openvla")
    ref = policy_arrays("openvla_a/reference.npz")
    shift = policy.vocab - 1000  # the reference has 1000 words
    ids = policy.encode_values(ref["tokenizer_values"])
    assert torch.equal(ids, ref["tokenizer_ids"] + shift)
    values = policy.decode_tokens(ref["detok_ids"] + shift)
    assert torch.equal(values, ref["detok_normalized"])


DATA_TASKS = ("open the drawer", "close the drawer")
DATA_LENGTHS = (6, 9, 5, 7)


class DataToy:
    """The smallest data set that meets the contract; state = (sample, tag)."""

    def __init__(self, size, tag=0, horizon=2):
        self.size = size
        self.tag = tag
        self.horizon = horizon

    def __len__(self):
        return self.size

    def batch(self, indices):
        count = len(indices)
        return dict(
            images=np.zeros((count, 8, 8, 3), np.uint8),
            instructions=[f"task {index}" for index in indices],
            actions=np.zeros((count, self.horizon, 7), np.float32),
            pad=np.zeros((count, self.horizon), bool),
            state=np.array([(index, self.tag) for index in indices], np.float32),
        )


def data_images(seed, length, size=16):
    """Smooth images that differ from frame to frame, so that a shifted frame is noticed."""
    y, x = np.mgrid[0:size, 0:size] / size
    t = (np.arange(length) * 23 + seed * 41)[:, None, None]
    colours = [t + 120 * x, 3 * t + 90 * y, 150 - t + 60 * x * y]
    return np.abs(np.stack(colours, -1) % 400 - 200).astype(np.uint8)


def data_episode(number, length, size=16):
    rng = np.random.default_rng(number)
    actions = rng.normal(0, 0.02, (length, 7)).astype(np.float32)
    actions[:, 6] = np.where(np.arange(length) < length / 2, 1, -1)
    states = rng.normal(size=(length, 8)).astype(np.float32)
    return data_images(number, length, size), states, actions, DATA_TASKS[number % 2], number


def data_write(folder, lengths=DATA_LENGTHS):
    """Write a v3.0 set with the writer under test; return its episodes."""
    episodes = [data_episode(number, length) for number, length in enumerate(lengths)]
    real_data.write_dataset(folder, iter(episodes), 10)
    return episodes


def data_open(folder, size=None, horizon=1, **options):
    cache = pathlib.Path(folder).parent / "cache"
    return real_data.open_dataset(folder, size, horizon, cache_dir=cache, **options)


def data_mp4(path, images, extra=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = imageio_ffmpeg.write_frames(
        str(path),
        images.shape[2:0:-1],
        fps=10,
        quality=None,
        macro_block_size=1,
        output_params=["-g", "2", *extra],
    )
    writer.send(None)
    for image in images:
        writer.send(image.tobytes())
    writer.close()


def data_png(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "png")
    return dict(bytes=out.getvalue(), path="")


def data_v21(folder, extra=()):
    """Write a v2.1 set by the format's description: `image` h264, `wrist_image` PNG."""
    episodes = [data_episode(number, length) for number, length in enumerate(DATA_LENGTHS)]
    (folder / "meta").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    rows = []
    for number, (images, states, actions, text, _) in enumerate(episodes):
        data_mp4(folder / f"videos/image/{number}.mp4", images, extra)
        table = {
            "wrist_image": [data_png(255 - image) for image in images],
            "state": states.tolist(),
            "actions": actions.tolist(),
            "frame_index": np.arange(len(images)),
            "episode_index": [[number]] * len(images),    # some writers keep the shape [1]
            "task_index": [DATA_TASKS.index(text)] * len(images),
        }
        pq.write_table(pa.table(table), folder / f"data/chunk-000/episode_00000{number}.parquet")
        rows.append(json.dumps(dict(episode_index=number, length=len(images))))
    (folder / "meta/episodes.jsonl").write_text("\n".join(rows))
    tasks = [json.dumps(dict(task_index=i, task=text)) for i, text in enumerate(DATA_TASKS)]
    (folder / "meta/tasks.jsonl").write_text("\n".join(tasks))
    info = dict(
        codebase_version="v2.1",
        fps=10,
        chunks_size=2,
        video_path="videos/{video_key}/{episode_index}.mp4",
        features=dict(
            wrist_image=dict(dtype="image", shape=[16, 16, 3]),
            image=dict(dtype="video", shape=[16, 16, 3]),
            state=dict(dtype="float32", shape=[8]),
            actions=dict(dtype="float32", shape=[7]),
        ),
    )
    (folder / "meta/info.json").write_text(json.dumps(info))
    return episodes


def data_all(demos):
    return demos.batch(np.arange(len(demos)))


# Stand-in for envs.py: episode n lasts 2 + n % 4 steps and fails if n % 3 == 0; all it shows is
# a function of n and of the step.
DATA_STUB = '''
import numpy as np
TASKS = ("open-drawer", "close-drawer")
CONTROL_HZ = 5
class Env:
    def __init__(self, task, domain, num_envs, seed, image_size, first_episode, auto_reset):
        assert task in TASKS and not auto_reset
        self.task, self.num_envs, self.size = task, num_envs, image_size
        self.episode = first_episode + np.arange(num_envs)
    def reset(self):
        self.t = 0
        return self.observe()
    def observe(self):
        shade = (self.episode * 7 + self.t * 31) % 200
        shape = (self.num_envs, self.size, self.size, 3)
        return dict(
            images=np.broadcast_to(shade[:, None, None, None], shape).astype(np.uint8),
            state=np.tile(np.stack([self.episode, 0 * self.episode + self.t], 1), 4),
            instructions=[self.task] * self.num_envs)
    def step(self, actions):
        assert (actions[:, 0, 0] == 1000 * self.episode + self.t).all()
        self.t += 1
        ended = np.flatnonzero(self.t == 2 + self.episode % 4)
        info = dict(success=self.episode % 3 > 0, ended=ended)
        return self.observe(), None, None, None, info
def make_env(*args, **options):
    return Env(*args, **options)
class Expert:
    def __init__(self, env, style="expert", noise=0.):
        self.env, self.style = env, style
    def act(self):
        executed = np.zeros((self.env.num_envs, 7))
        executed[:, 0] = 1000 * self.env.episode + self.env.t
        label = np.zeros((self.env.num_envs, 7))
        label[:, 1] = self.style == "teleop"
        label[:, 2] = self.env.episode
        return executed, label
'''


@pytest.fixture
def data_stub(tmp_path, monkeypatch):
    """Put the stub in the place of envs.py, for spawned workers, too."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/envs.py").write_text(DATA_STUB)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    monkeypatch.setitem(sys.modules, "envs", None)
    del sys.modules["envs"]


class EvaluateStub:
    """A policy that remembers how it was asked; its actions are `value` times its noise."""

    image_size = 16
    device = torch.device("cpu")

    def __init__(self, chunk=1, value=0.0, reads_state=False):
        self.chunk = chunk
        self.value = value
        self.reads_state = reads_state
        self.calls = []

    def act(self, images, instructions, **options):
        noise = torch.rand(len(images), 1, 1, generator=options["generator"])
        call = dict(images=images, instructions=list(instructions), noise=noise)
        self.calls.append(types.SimpleNamespace(**call, **options))
        actions = self.value * noise.expand(-1, self.chunk, 7)
        return types.SimpleNamespace(actions=actions)


class EvaluateToy:
    """Four environments that reset themselves: e takes e % 3 + 1 steps, even e succeed."""

    num_envs = 4
    tasks = ["toy"]

    def __init__(self):
        self.actions = []

    def reset(self, first_episode=None):
        self.episode = first_episode + np.arange(self.num_envs)
        self.length = np.zeros(self.num_envs, int)
        return self.observe(range(self.num_envs))

    def observe(self, rows):
        shades = np.uint8(10 * self.episode + self.length)[list(rows)]
        return dict(
            images=np.tile(shades[:, None, None, None], (8, 8, 3)),
            instructions=[f"episode {self.episode[i]}" for i in rows],
            state=np.ones((len(rows), 8)),
        )

    def step(self, actions):
        self.actions.append(actions)
        last = self.episode % 3 + 1
        self.length = np.minimum(self.length + actions.shape[1], last)
        over = self.length == last
        never = np.zeros(self.num_envs, bool)
        ended = np.flatnonzero(over)
        info = dict(
            success=over & (self.episode % 2 == 0),
            touched=over,
            failure=never,
            diverged=never,
            length=self.length.copy(),
            ended=ended,
            final_obs=self.observe(ended),
        )
        self.episode[over] += 101           # the next episode has the other outcome
        self.length[over] = 0
        return self.observe(range(self.num_envs)), np.float32(over), over, never, info

    def wrong_instructions(self):
        return ["wrong"] * self.num_envs


def evaluate_toy(episodes, stub, **options):
    """Run a policy on the toy. Returns the episodes and the toy."""
    toy = EvaluateToy()
    return evaluate.run_episodes(stub, "toy", "sim", episodes, env=toy, **options), toy


def evaluate_outcomes(text):
    """Return episodes 0, 1, ...: "1" is a success."""
    common = dict(steps=10, touched=True, failure=False, diverged=False, instruction="open it")
    return [dict(common, episode=k, success=letter == "1") for k, letter in enumerate(text)]


STAGE_TEXT = "open the drawer"


def stage_episode(seed, length, size=64):
    """A toy demonstration: the place of a bright bar tells the time, which tells the action."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-0.03, 0.03, (length, 7)).astype(np.float32)
    actions[:, 6] = np.where(np.arange(length) < length / 2, 1, -1)
    images = np.full((length, size, size, 3), 40, np.uint8)
    for t, image in enumerate(images):
        start = 4 * (t % 12) + 4 * (seed % 4)
        image[:, start : start + 6] = 220
    states = rng.normal(size=(length, 8)).astype(np.float32)
    return images, states, actions, STAGE_TEXT, seed


@functools.lru_cache
def stage_demos():
    """Folder with two data sets of four toy demonstrations each: sim and real."""
    folder = pathlib.Path(tempfile.mkdtemp())
    for domain, seed in (("sim", 0), ("real", 100)):
        episodes = [stage_episode(seed + k, 9 + k) for k in range(4)]
        real_data.write_dataset(folder / domain, episodes, 5)
    return folder


@functools.lru_cache
def stage_start(name):
    """Folder of a tiny policy with random weights and the range of the controller."""
    folder = pathlib.Path(tempfile.mkdtemp()) / name
    policy = policies.make_tiny(name)
    limit = envs.ACTION_LIMIT
    policy.set_statistics("panda", dict(action=dict(q01=-limit, q99=limit)))
    policy.save(folder)
    return folder


def stage_options(out, policy="openvla", **changed):
    """Options of a Stage I of six small steps on the toy demonstrations."""
    small = dict(
        policy=str(stage_start(policy)),
        sim_data=str(stage_demos() / "sim"),
        ranks=1,
        batch=8,
        real_data=str(stage_demos() / "real"),
        out=str(out),
        eval_episodes=0,
        steps=6,
        warmup=2,
        held_out=0.25,
        freeze="none",
    )
    return sft_warmstart.Options(**{**small, **changed}).resolve()


def stage_args(out, policy="openvla", **changed):
    """Args of a Stage II of two small iterations."""
    small = dict(
        init=str(stage_start(policy)),
        out=str(out),
        ranks=1,
        eval_episodes=0,
        num_envs=4,
        horizon=3,
        minibatch=6,
        real_batch=4,
        iterations=2,
        critic_warmup=0,
        real_data=str(stage_demos() / "real"),
    )
    changed = {**small, **changed}
    if changed.get("lambda_real") == 0 and not changed.get("watch_real"):
        changed["real_data"] = None
    return rl_cotrain.Args(**changed).resolve()


def stage_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stage_state(out):
    return torch.load(out / "resume.pt", weights_only=True)


def stage_same(a, b):
    """Whether two nested structures of tensors and numbers are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(stage_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(stage_same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def stage_batch(policy, sim, seed=0):
    """A random batch with domains sim (b,), some steps of its chunks padded."""
    rng = np.random.default_rng(seed)
    count = len(sim)
    actions = rng.uniform(-0.03, 0.03, (count, policy.horizon, 7)).astype(np.float32)
    return dict(
        images=rng.integers(0, 256, (count, 64, 64, 3), np.uint8),
        instructions=[STAGE_TEXT] * count,
        pad=np.arange(policy.horizon) >= rng.integers(1, policy.horizon + 1, (count, 1)),
        actions=actions,
        state=np.zeros((count, 8), np.float32),
        sim=np.array(sim, bool),
    )


def stage_gradients(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def stage_plain(**changed):
    """Options of the supervised loss alone."""
    return types.SimpleNamespace(**{**dict(augment="none", micro_batch=64), **changed})


def check_stage_supervised(name="openvla", micro_batch=64):
    """The gradient of a batch is N_sim / B grad L_SFT(sim) + N_real / B grad L_SFT(real)."""
    policy = policies.make_tiny(name)
    batch = stage_batch(policy, [1, 0, 0, 1, 0, 0, 0, 1])
    totals = 0
    torch.manual_seed(3)
    for loss, parts in sft_warmstart.supervised_losses(
        policy, batch, stage_plain(micro_batch=micro_batch)
    ):
        loss.backward()
        totals = totals + parts
    got = stage_gradients(policy)
    policy.zero_grad()
    torch.manual_seed(3)
    each = policy.bc_loss(
        batch["images"], batch["instructions"], batch["actions"], reduction="none"
    )
    expected = 0
    for domain, share in ((0, 5 / 8), (1, 3 / 8)):
        rows = batch["sim"] == domain
        keep = torch.from_numpy(~batch["pad"][rows])[:, : policy.horizon]
        loss = each[rows][keep].mean()
        assert totals[domain].item() == pytest.approx(loss.item(), rel=1e-5)
        expected = expected + share * loss
    expected.backward()
    assert got
    for key, p in policy.named_parameters():
        if p.grad is not None:
            assert key in got and torch.allclose(got[key], p.grad, rtol=1e-3, atol=1e-6), key


class StageEnv:
    """The smallest environment of the contract, two steps an episode.

    Success: the first number of the action is positive in the second step. Odd environments never
    terminate: they run into the time limit.
    """

    num_envs = 16
    tasks = ["push-cube"]
    privileged_size = 3

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.images = rng.integers(0, 256, (2 * self.num_envs, 64, 64, 3), np.uint8)
        self.task = np.full(self.num_envs, "push-cube", object)
        self.odd = np.arange(self.num_envs) % 2 == 1

    def observe(self, rows):
        """Rows from num_envs on are final observations."""
        return dict(
            images=self.images[rows],
            instructions=[STAGE_TEXT] * len(rows),
            state=np.zeros((len(rows), 8), np.float32),
            privileged=np.repeat(np.asarray(rows, np.float32)[:, None], 3, 1),
        )

    def reset(self, first_episode=None):
        self.steps = np.zeros(self.num_envs, int)
        self.episode = (first_episode or 0) + np.arange(self.num_envs)
        return self.observe(np.arange(self.num_envs))

    def step(self, actions):
        success = actions[:, 0, 0] > 0
        self.steps += 1
        over = self.steps == 2
        self.steps[over] = 0
        ended = np.flatnonzero(over)
        none = np.zeros(self.num_envs, bool)
        info = dict(
            ended=ended,
            success=success & over,
            failure=none,
            touched=none,
            diverged=none,
            final_obs=None,
        )
        info.update(episode=self.episode.copy(), length=np.where(over, 2, 1))
        self.episode[over] += self.num_envs
        if len(ended):
            info["final_obs"] = self.observe(ended + self.num_envs)
        reward = success.astype(np.float32)
        return (
            self.observe(np.arange(self.num_envs)),
            reward,
            over & ~self.odd,
            over & self.odd,
            info,
        )


def stage_rollout(policy, count, seed=0):
    """A Rollout of one decision in each of `count` environments; images, rewards are random."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (count, 64, 64, 3), np.uint8))
    texts = [STAGE_TEXT] * count
    decision = policy.act(images, texts, generator=torch.Generator().manual_seed(seed))
    noise = torch.from_numpy(rng.normal(size=(2, 1, count))).float()
    return rl_cotrain.Rollout(
        inputs=dict(images=images, instructions=texts, trace=decision.trace),
        # Some ratios and some values are clipped, some are not.
        logp=decision.logp + torch.linspace(-0.5, 0.5, count),
        values=(decision.value + torch.linspace(0.7, -0.7, count))[None],
        next_values=None,
        rewards=noise[0],
        ended=None,
        privileged=None,
        advantages=noise[0],
        returns=decision.value[None] + noise[1],
    )


class StageOnce:
    """The same real batch again and again."""

    def __init__(self, batch):
        self.batch = batch

    def __next__(self):
        return self.batch

    def state_dict(self):
        return {}


def stage_captured(policy, rollout, real, args):
    """Gradients {name: tensor} of the only update of co_train on a given rollout."""
    captured = {}

    def step(optimizer):
        captured.update(stage_gradients(policy))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            rl_cotrain, "collect", lambda *_: (rollout, dict(success=0.0, env_steps_per_s=0.0))
        )
        patch.setattr(rl_cotrain, "check_log_probs", lambda *_: None)
        patch.setattr(rl_cotrain, "advantages", lambda *_: (rollout.advantages, rollout.returns))
        patch.setattr(rl_cotrain, "normalise", lambda advantage: advantage)
        patch.setattr(torch.optim.AdamW, "step", step)
        assert rl_cotrain.co_train(policy, StageEnv(), real, args)
    return captured


def check_stage_anchor(name="openvla"):
    """p.grad = grad L_PPO + lambda grad L_SFT(real), from formulas written out here."""
    policy = policies.make_tiny(name)
    for p in policy.parameters():
        p.requires_grad_(True)
    rollout = stage_rollout(policy, 8)
    batch = stage_batch(policy, [0] * 6)
    out = pathlib.Path(tempfile.mkdtemp())
    args = stage_args(
        out / "a",
        name,
        lambda_real=0.3,
        critic="head",
        minibatch=8,
        micro_batch=5,
        epochs=1,
        iterations=1,
        max_grad_norm=0.0,
        entropy_weight=0.01,
    )
    args.sft.augment = "none"
    got = stage_captured(policy, rollout, StageOnce(batch), args)
    args.out = str(out / "b")
    [row] = stage_metrics(out / "a")
    alone = stage_captured(policy, rollout, None, args)  # lambda 0: there is no real batch

    inputs = rollout.inputs
    logp, entropy, value = policy.evaluate(
        inputs["images"], inputs["instructions"], inputs["trace"]
    )
    ratio = (logp - rollout.logp).exp()
    advantage = rollout.advantages[0]
    bound = torch.where(advantage > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8))
    surrogate = bound * advantage
    old = rollout.values[0]
    errors = []
    for guess in (value, old + torch.clip(value - old, -0.2, 0.2)):
        gap = (guess - rollout.returns[0]).abs()
        errors.append(torch.where(gap < 10, 0.5 * gap**2, 10 * gap - 50))
    worst = torch.maximum(*errors)
    ppo = -surrogate.mean() + worst.mean() - 0.01 * entropy.mean()
    seed = rl_cotrain.random_seed(args.seed, 0, 0, 0, 0)
    torch.manual_seed(seed)
    pad = torch.from_numpy(batch["pad"])
    real = policy.bc_loss(batch["images"], batch["instructions"], batch["actions"], pad)

    named = dict(policy.named_parameters())
    sizes = torch.zeros(2)
    dot = 0
    parts = [
        torch.autograd.grad(loss, list(named.values()), allow_unused=True) for loss in (ppo, real)
    ]
    for (key, p), g_ppo, g_real in zip(named.items(), *parts):
        g_ppo = torch.zeros_like(p) if g_ppo is None else g_ppo
        g_real = torch.zeros_like(p) if g_real is None else g_real
        nothing = torch.zeros_like(p)
        assert torch.allclose(
            got.get(key, nothing), g_ppo + 0.3 * g_real, rtol=1e-3, atol=2e-6
        ), key
        assert torch.allclose(alone.get(key, nothing), g_ppo, rtol=1e-3, atol=2e-6), key
        sizes += torch.stack([g_ppo.norm(), g_real.norm()]) ** 2
        dot += (g_ppo * g_real).sum()
    sizes = sizes.sqrt()
    assert 0.3 * sizes[1] > 0.01 * sizes[0], "the anchor is seen in the gradient"
    expected = dict(
        ppo=-surrogate.mean(),
        value=worst.mean(),
        entropy=entropy.mean(),
        real=real,
        kl=(ratio - 1 - ratio.log()).mean(),
        clipped=((ratio - 1).abs() > 0.2).float().mean(),
        grad_rl=sizes[0],
        grad_real=sizes[1],
        cosine=dot / sizes.prod(),
    )
    for key, number in expected.items():
        assert row[key] == pytest.approx(number.item(), rel=2e-3, abs=2e-5), key


def check_stage_gae():
    """Against the double sum A_t = sum_l (gamma lambda)^l delta_t+l, cut where episodes end."""
    rng = np.random.default_rng(0)
    rewards, values, following = rng.normal(size=(3, 13, 5))
    terminated, truncated = rng.random((2, 13, 5)) < 0.15
    ended = terminated | truncated
    following = np.where(terminated, 0, following)  # a success has no future
    delta = rewards + 0.9 * following - values
    expected = np.zeros((13, 5))
    for n in range(5):
        for t in range(13):
            for k in range(t, 13):
                expected[t, n] += (0.9 * 0.7) ** (k - t) * delta[k, n]
                if ended[k, n]:
                    break
    tensors = [torch.from_numpy(x) for x in (rewards, values, following, ended)]
    advantage, returns = rl_cotrain.gae(*tensors, 0.9, 0.7)
    assert np.allclose(advantage, expected) and np.allclose(returns, expected + values)


class StageCritic:
    """V = the first number of the privileged state."""

    def __call__(self, obs):
        return torch.from_numpy(obs["privileged"])[:, 0]


def check_stage_bootstrap():
    """next_values: V of the next observation; at a time limit of the final one; else 0."""
    policy = policies.make_tiny("openvla")
    args = types.SimpleNamespace(horizon=4, seed=0)
    rollout, logs = rl_cotrain.collect(policy, StageEnv(), StageCritic(), args, 0)
    first = torch.arange(16.0)
    ends = torch.where(first % 2 == 1, first + 16, torch.zeros(16))
    assert torch.equal(rollout.values, first.expand(4, 16))
    assert torch.equal(rollout.next_values, torch.stack([first, ends, first, ends]))
    assert rollout.ended.tolist() == [[False] * 16, [True] * 16] * 2
    assert torch.equal(rollout.privileged[..., 0], rollout.values)
    won = rollout.rewards[1].mean().item()  # a reward at an episode's end is a success
    assert logs["success"] == pytest.approx(won)
    assert logs["reward"] == pytest.approx(rollout.rewards.sum().item() / 16)
    logp = policy.evaluate(**rl_cotrain.select(rollout.inputs, torch.arange(64)))[0]
    assert torch.allclose(logp, rollout.logp, atol=1e-4)


def check_stage_normalised():
    """Mean 0 and deviation 1; the explained variance is 1 - E[(R - V)^2] / Var(R)."""
    torch.manual_seed(0)
    advantage = 3 + 2 * torch.randn(7, 5)
    got = rl_cotrain.normalise(advantage)
    assert torch.allclose(
        got, (advantage - advantage.mean()) / advantage.std(unbiased=False), atol=1e-4
    )
    rollout = types.SimpleNamespace(returns=torch.randn(7, 5), values=torch.randn(7, 5))
    residual = (rollout.returns - rollout.values).pow(2).mean() / rollout.returns.var(
        unbiased=False
    )
    assert rl_cotrain.explained_variance(rollout) == pytest.approx(1 - residual.item(), rel=1e-4)


def check_stage_climbs():
    """PPO on the toy, from 50 % to above 75 %; six of seven numbers of the action are noise."""
    torch.manual_seed(0)
    out = pathlib.Path(tempfile.mkdtemp()) / "run"
    args = stage_args(
        out,
        lambda_real=0.0,
        num_envs=16,
        horizon=4,
        iterations=16,
        minibatch=16,
        epochs=2,
        lr=1e-2,
        target_kl=0.0,
    )
    assert rl_cotrain.co_train(StagePolicy(), StageEnv(), None, args)
    rates = [row["reward"] / 4 for row in stage_metrics(out)]
    assert np.mean(rates[:2]) < 0.65 and np.mean(rates[-4:]) > 0.75, rates


def check_stage_ratio(stale=0.0):
    """The first ratio after a rollout is 1, else the run stops."""
    policy = policies.make_tiny("openvla")
    args = types.SimpleNamespace(horizon=4, seed=0, dtype="float32", micro_batch=64)
    rollout, _ = rl_cotrain.collect(policy, StageEnv(), StageCritic(), args, 0)
    rollout.logp = rollout.logp - stale
    try:
        rl_cotrain.check_log_probs(policy, rollout, args)
    except RuntimeError as error:
        assert "act and evaluate disagree" in str(error) and stale, error
        return
    assert not stale, "stale log-probs were not noticed"


class StagePolicy(torch.nn.Module):
    """One's own VLA in 60 lines: an MLP on 8 x 8 pixels, a Gaussian over one action."""

    image_size = 64
    horizon = 1
    chunk = 1
    reads_state = False
    fit = "stretch"
    kind = "mine"

    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Sequential(torch.nn.Linear(192, 64), torch.nn.Tanh())
        self.mean = torch.nn.Linear(64, 7)
        self.log_std = torch.nn.Parameter(torch.full((7,), -3.5))
        self.value_head = torch.nn.Sequential(torch.nn.Linear(64, 1))

    @property
    def device(self):
        return self.log_std.device

    def features(self, images):
        """(B, 64, 64, 3) uint8 -> (B, 64)"""
        x = torch.as_tensor(images, device=self.device).float() / 255 - 0.5
        small = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 8)
        return self.trunk(small.flatten(1))

    def distribution(self, features):
        return torch.distributions.Normal(
            0.05 * torch.tanh(self.mean(features)), self.log_std.exp()
        )

    @torch.no_grad()
    def act(self, images, instructions, state=None, decoding="sample", generator=None):
        features = self.features(images)
        normal = self.distribution(features)
        x = normal.mean
        if decoding == "sample":
            x = x + normal.stddev * torch.randn(x.shape, generator=generator, device=self.device)
        actions = torch.cat([x[:, :6], (20 * x[:, 6:]).clamp(-1, 1)], 1)
        value = self.value_head(features)[:, 0]
        return policies.Decision(actions[:, None], normal.log_prob(x).sum(1), value, dict(x=x))

    def evaluate(self, images, instructions, trace, state=None):
        features = self.features(images)
        normal = self.distribution(features)
        logp = normal.log_prob(trace["x"]).sum(1)
        return logp, normal.entropy().mean(1), self.value_head(features)[:, 0]

    def value(self, images, instructions, state=None):
        return self.value_head(self.features(images))[:, 0]

    def bc_loss(
        self,
        images,
        instructions,
        actions,
        pad=None,
        state=None,
        reduction="mean",
        generator=None,
    ):
        target = torch.as_tensor(actions, device=self.device)[:, 0] / torch.tensor(
            [1.0] * 6 + [20.0]
        )
        loss = 1e3 * (self.distribution(self.features(images)).mean - target).pow(2).mean(
            1, keepdim=True
        )
        return loss if reduction == "none" else loss.mean()

    def save(self, folder):
        pathlib.Path(folder).mkdir(parents=True)
        torch.save(self.state_dict(), pathlib.Path(folder) / "weights.pt")


class StageData:
    """One's own demonstrations: anything with len and batch."""

    def __init__(self, count=24):
        self.rng = np.random.default_rng(0)
        self.images = self.rng.integers(0, 256, (count, 64, 64, 3), np.uint8)
        self.actions = self.rng.uniform(-0.03, 0.03, (count, 1, 7)).astype(np.float32)

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return dict(
            images=self.images[indices],
            instructions=[STAGE_TEXT] * len(indices),
            actions=self.actions[indices],
            pad=np.zeros((len(indices), 1), bool),
            state=np.zeros((len(indices), 8), np.float32),
        )


def check_stage_anchor_holds():
    """The paper's claim on a toy: while RL learns, only the anchor keeps the real loss down."""
    rise = {}
    for lambda_real in (0.0, 1.0):
        torch.manual_seed(0)
        policy = StagePolicy()
        data = StageData()
        supervised = torch.optim.Adam(policy.parameters(), 3e-3)
        for _ in range(150):  # Stage I
            supervised.zero_grad()
            batch = data.batch(np.arange(24))
            policy.bc_loss(batch["images"], batch["instructions"], batch["actions"]).backward()
            supervised.step()
        before = sft_warmstart.held_out_loss(policy, data, 64)
        out = pathlib.Path(tempfile.mkdtemp()) / "run"
        args = stage_args(
            out,
            lambda_real=lambda_real,
            num_envs=16,
            horizon=4,
            iterations=25,
            minibatch=32,
            epochs=2,
            lr=3e-3,
            real_batch=24,
            target_kl=0.0,
            micro_batch=64,
        )
        args.sft.augment = "none"
        real = None
        if lambda_real:
            real = real_data.MixSampler(None, data, 0.0, 24, seed=1)
        assert rl_cotrain.co_train(policy, StageEnv(), real, args)
        rows = stage_metrics(out)
        assert np.mean([row["reward"] for row in rows[-5:]]) > 3, "RL learned the task"
        rise[lambda_real] = sft_warmstart.held_out_loss(policy, data, 64) - before
    assert rise[0.0] > 0.02 and rise[1.0] < 0.5 * rise[0.0], rise


def check_stage_resume(policy="openvla"):
    """Stage II: 2 iterations = 1 + resume + 1, bit for bit, real batches included."""
    folder = pathlib.Path(tempfile.mkdtemp())
    rl_cotrain.main_job(stage_args(folder / "whole", policy, watch_real=True))
    rl_cotrain.main_job(stage_args(folder / "half", policy, watch_real=True, iterations=1))
    rl_cotrain.main_job(stage_args(folder / "half", policy, watch_real=True, resume=True))
    whole = stage_state(folder / "whole")
    half = stage_state(folder / "half")
    assert whole["iteration"] == 2 and whole["real"]["step"] > 0
    for key in ("iteration", "weights", "optimizer", "critic", "real"):
        assert stage_same(whole[key], half[key]), key
    rows = []
    for out in ("whole", "half"):
        timeless = [
            {k: v for k, v in row.items() if "_s" not in k} for row in stage_metrics(folder / out)
        ]
        rows.append(timeless)
    assert [row["step"] for row in rows[0]] == [1, 2] and rows[0] == rows[1]
    return folder


def check_stage_one_resume(policy="openvla"):
    """Stage I, interrupted after 3 of 6 steps and resumed, equals the uninterrupted run."""
    folder = pathlib.Path(tempfile.mkdtemp())
    changed = dict(policy=policy, ema=0.9)
    sft_warmstart.warm_start(stage_options(folder / "whole", **changed))
    bar = tqdm_interrupts(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_warmstart, "tqdm", bar)
        assert sft_warmstart.warm_start(stage_options(folder / "cut", **changed)) is None
    assert stage_state(folder / "cut")["step"] == 3 and not (folder / "cut/policy").exists()
    with open(folder / "cut/metrics.jsonl", "a") as file:  # a killed run may have logged too much
        file.write('{"step": 4, "loss/sim": 99}\n{"step": 5, "loss')
    assert sft_warmstart.warm_start(stage_options(folder / "cut", resume=True, **changed))
    whole = stage_state(folder / "whole")
    cut = stage_state(folder / "cut")
    assert whole["step"] == 6
    for key in ("step", "weights", "average", "optimizer", "sampler"):
        assert stage_same(whole[key], cut[key]), key
    assert stage_metrics(folder / "whole") == stage_metrics(folder / "cut")
    saved = policies.load_policy(str(folder / "cut/policy")).state_dict()
    assert all(torch.equal(saved[name], average) for name, average in cut["average"].items())


def tqdm_interrupts(step):
    """A progress bar that sends this process a SIGINT after `step` steps."""

    class Bar(sft_warmstart.tqdm):
        count = 0

        def update(self, n=1):
            super().update(n)
            Bar.count += 1
            if Bar.count == step:
                os.kill(os.getpid(), signal.SIGINT)

    return Bar


def stage_process(script, *flags):
    command = [sys.executable, str(HERE / script), *map(str, flags)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )


def pretrain_probe(name):
    """Return a policy, its probe after a forward pass on two prompts, and ids and mask of these."""
    policy = policies.make_tiny(name)
    probe = pretrain.Probe(policy)
    texts = ["open it", "pick the red one up now"]
    images = np.zeros((2, 64, 64, 3), np.uint8)
    policy.bc_loss(images, texts, torch.zeros(2, policy.horizon, 7))
    return policy, probe, policy.prompt(texts)


@torch.no_grad()
def check_pretrain_probe(name="openvla"):
    """A loss falls when what it asks for is made true, and not when it is made true elsewhere."""
    _, probe, (ids, mask) = pretrain_probe(name)
    places = [[-0.75, -0.75], [0.7, -0.8], [0.2, 0.9]]  # in patches 0, 3 (the object) and 14
    marks = torch.zeros(2, 3, 5)
    marks[:, :, 3:] = torch.tensor(places)
    offset = 4 * torch.tensor([0, 0, -0.05, -0.05, -0.05, 0.15])
    target = (marks[0] - torch.tensor(pretrain.CENTRE)) / torch.tensor(pretrain.SCALE)

    def losses():
        return probe(marks, ids, mask)

    start = losses()
    where = 2 * F.smooth_l1_loss(torch.zeros(3, 5), target, beta=0.1)
    patch = 0.2 * math.log(16) + F.smooth_l1_loss(torch.zeros(6), offset, beta=0.1)
    torch.testing.assert_close(start[:2], torch.stack([where, patch]))

    probe.where_head.bias.copy_(target.flatten())
    assert losses()[0] < 1e-6

    probe.features = torch.zeros_like(probe.features)
    probe.features[:, 3, 0] = 1.0  # a feature that only the patch of the object has
    probe.patch_head.weight[3:6, 0] = torch.tensor([9.0, -0.2, -0.2])
    right = losses()[1]
    probe.patch_head.weight[0, 0] = 9.0  # the tool is not in there
    assert right < start[1] < losses()[1]

    column = 3 + probe.before_patches
    prompt = (probe.embeddings[ids] * mask[..., None]).sum(1)
    probe.inputs[:, column] = prompt
    right = losses()[2]
    probe.inputs[:, column] = -prompt
    assert right < losses()[2] - 0.5

    probe.attention = torch.zeros_like(probe.attention)
    probe.attention[..., column] = 2.0 - probe.words[:, None].float()  # of words 1, of others 2
    assert losses()[3].abs() < 1e-4
    probe.attention = probe.attention.roll(1, 3)
    assert losses()[3] > 10


ARCH_FILES = ("envs", "policies", "real_data", "evaluate", "sft_warmstart", "rl_cotrain")
ARCH_MAY_IMPORT = dict(
    envs=set(),
    policies=set(),
    real_data={"envs", "policies", "evaluate"},  # inside the functions that need them
    evaluate={"envs", "policies"},
    sft_warmstart={"envs", "policies", "real_data", "evaluate"},
    rl_cotrain={"envs", "policies", "real_data", "evaluate", "sft_warmstart"},
)
ARCH_INSTALLED = {
    "torch",
    "transformers",
    "mujoco",
    "numpy",
    "imageio",
    "tqdm",
    "msgpack",
    "websockets",
    "pyarrow",
    "matplotlib",
}
# These come with the others.
ARCH_INSTALLED |= {
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "filelock",
    "imageio_ffmpeg",
    "OpenGL",
    "PIL",
}


def arch_tree(name):
    return ast.parse((HERE / f"{name}.py").read_text())


def arch_imports(nodes):
    """Top-level names of the modules that some statements import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def arch_leaks(source):
    """Names that a function reads although only the `if __name__` block defines them."""
    tree = ast.parse(source)
    body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))
    ]
    table = symtable.symtable(ast.unparse(ast.Module(body, [])), "file", "exec")
    known = set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    for symbol in table.get_symbols():
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
            known.add(symbol.get_name())
    leaks = set()
    scopes = list(table.get_children())
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            if symbol.is_global() and symbol.is_referenced() and symbol.get_name() not in known:
                leaks.add(symbol.get_name())
    return leaks


# ---- formulas ----------------------------------------------------------------------------------


def check_env_kinematics():
    """Forward kinematics and Jacobian are MuJoCo's."""
    model = mujoco.MjModel.from_xml_string(envs.scene_xml(envs.Task(), 0))
    data = mujoco.MjData(model)
    hand = model.body("hand").id
    joints = np.random.default_rng(0).uniform(*envs.JOINT_RANGE, (50, 7))
    position, frame, jacobian = envs.forward_kinematics(joints)
    for k, q in enumerate(joints):
        data.qpos[:7] = q
        mujoco.mj_forward(model, data)
        turn = data.xmat[hand].reshape(3, 3)
        tcp = data.xpos[hand] + turn[:, 2] * .1034
        rows = np.zeros((6, model.nv))
        mujoco.mj_jac(model, data, rows[:3], rows[3:], tcp, hand)
        assert np.abs(position[k] - tcp).max() < 1e-6
        assert np.abs(frame[k] - turn).max() < 1e-6
        assert np.abs(jacobian[k] - rows[:, :7]).max() < 1e-6


@pytest.mark.parametrize("axis", range(6))
def test_actions_move_the_tool_in_the_base_frame(axis):
    action = ENV_REST.copy()
    action[axis] = .03 if axis < 3 else .1         # m or rad
    env = env_make("open-drawer")
    tcp = env.tcp[0].copy()
    frame = env.frame[0].copy()
    for one in (action, ENV_REST, ENV_REST):
        env.step(one[None, None])
    turn = env.frame[0] @ frame.T
    skew = (turn - turn.T) / 2
    turned = [skew[2, 1], skew[0, 2], skew[1, 0]]
    moved = np.append(env.tcp[0] - tcp, turned)
    assert np.abs(moved - action[:6]).max() < 2e-3


def check_env_targets():
    """+1 opens the gripper; deltas add up on the target, without the tracking error."""
    env = env_make("open-drawer")
    for grip, opening in ((-1, 0.), (1, .08)):
        for _ in range(6):
            env.step(np.array([[[0, 0, 0, 0, 0, 0, grip]]]))
        assert env.opening[0] == pytest.approx(opening, abs=2e-3)
    start = env.target[0].copy()
    for _ in range(3):
        env.step(np.array([[[.01, 0, .02, 0, 0, 0, 1]]]))
    assert env.target[0] - start == pytest.approx([.03, 0, .06], abs=1e-9)


def check_env_latency():
    """The stand-in moves later and less far than commanded, the twin as commanded."""
    def rise(domain, steps, latency=None):
        env = env_make("push-cube", domain, 4)
        if latency is not None:
            env.latency[:] = latency               # blocks of 25 ms, of which a step has 8
        start = env.tcp[:, 2].copy()
        action = ENV_REST.copy()
        action[2] = .04
        for _ in range(steps):
            env.step(np.tile(action, (4, 1, 1)))
            action[2] = 0
        return env.tcp[:, 2] - start
    assert np.abs(rise("sim", 6) - .04).max() < 1e-3
    assert np.abs(rise("real", 6) - .9 * .04).max() < .003
    risen = [rise("sim", 1, latency) for latency in (0, 2, 4, 8)]
    assert np.diff(risen, axis=0).max() < -.003
    assert np.abs(risen[3]).max() < 1e-3


@pytest.mark.parametrize("check", [check_env_kinematics, check_env_targets, check_env_latency])
def test_env_formula(check):
    check()


def test_the_camera_is_where_mujoco_renders_from_and_sees_the_scene():
    """Object, goal and tool are inside the image, and the object is at least 3 pixels wide."""
    for domain in envs.DOMAINS:
        env = env_make("all", domain, 12)
        for i in range(12):
            model, data = env_mujoco(env, i)
            camera = env.camera[i]
            axes = data.cam_xmat[0].reshape(3, 3).T        # rows: right, up, towards the camera
            assert camera.eye == pytest.approx(data.cam_xpos[0], abs=1e-6)
            assert camera.view == pytest.approx(axes * [[1], [-1], [-1]], abs=1e-6)
            assert camera.fovy == pytest.approx(model.cam_fovy[0])
            focal = 32 / np.tan(np.radians(camera.fovy) / 2)       # pixels, of an image of 64
            for point in (env.object[i], env.goal[i], env.tcp[i]):
                x, y, depth = camera.view @ (point - camera.eye)
                assert max(abs(x), abs(y)) * focal / depth < 31
                assert .046 * focal / depth >= 3


@pytest.fixture(scope="module")
def policy_openvla_a():
    policy = policies.load_policy(REFERENCE / "openvla_a")
    return policy, policy_arrays("openvla_a/reference.npz")


@pytest.mark.parametrize("s", range(3))
def test_openvla_forward_matches_official(policy_openvla_a, s):
    policy, ref = policy_openvla_a
    image = ref[f"image{s}_uint8"][None]
    assert torch.equal(policy.pixels(image), ref["pixel_values"][s : s + 1])
    features = policy.encode_images(image)
    policy_near(features, ref[f"sample{s}_patch_features"], 5e-5)
    policy_near(
        policy.project(features), ref[f"sample{s}_projected_features"], 5e-5
    )
    ids = ref[f"prompt{s}_input_ids_final"]
    mask = torch.ones_like(ids).bool()
    hidden, _, _ = policy.hidden(features, ids, mask)
    policy_near(hidden, ref[f"sample{s}_last_hidden"], 5e-5)
    policy_near(policy.logits(hidden), ref[f"sample{s}_logits"], 1e-4)
    tokens = ref[f"sample{s}_action_token_ids"][None]
    hidden, _, _ = policy.hidden(features, ids, mask, tokens[:, :-1])
    policy_near(policy.logits(hidden[0, -7:]), ref[f"sample{s}_step_logits"], 1e-4)


def test_openvla_tokens_and_actions_match_official(policy_openvla_a):
    """One left-padded batch of three prompt lengths against three official batch-1 runs."""
    policy, ref = policy_openvla_a
    rows = [ref[f"prompt{s}_input_ids_final"] for s in range(3)]
    tokens = policy_greedy(policy, rows, [ref[f"image{s}_uint8"] for s in range(3)])
    for s in range(3):
        assert torch.equal(tokens[s], ref[f"sample{s}_action_token_ids"])
    for key in ("toy_bridge", "toy_nomask", None):
        keyed = policies.load_policy(REFERENCE / "openvla_a", unnorm_key=key)
        actions = keyed.unnormalize(keyed.decode_tokens(tokens))
        for s in range(3):
            expected = ref[
                f"sample{s}_action_{key or 'dataset_statistics'}"
            ].clone()
            expected[6] = (
                2 * expected[6] - 1
            )  # official grippers are 0 closed, 1 open
            policy_near(actions[s], expected, 5e-5)


def test_openvla_training_loss_matches_official(policy_openvla_a, monkeypatch):
    policy, ref = policy_openvla_a
    towers = policy.vision_backbone
    losses = []
    for row in range(3):
        dino, siglip = ref["pixel_values"][row : row + 1].split(3, 1)
        features = torch.cat(
            [towers.featurizer(dino), towers.fused_featurizer(siglip)], -1
        )
        labels = ref["train_labels"][row]
        first = int((labels != -100).int().argmax())
        ids = ref["train_input_ids"][row : row + 1, :first]
        mask = torch.ones_like(ids).bool()
        monkeypatch.setattr(policy, "prompt", lambda texts: (ids, mask))
        values = ref["train_actions_normalized"][row : row + 1].clamp(-1, 1)
        action = policy.unnormalize(values)
        tokens = policy.encode_values(policy.normalize(action))
        assert torch.equal(tokens[0], labels[labels != -100][:7])
        losses.append(policy.bc_loss(features, ["given"], action[:, None]))
    policy_near(torch.stack(losses).mean(), ref["train_loss"], 5e-5)


@pytest.mark.parametrize("merge", [True, False])
def test_openvla_adapter_matches_peft(policy_openvla_a, merge):
    """PEFT's own files, with adapters on Conv2d, fused qkv and lm_head."""
    _, ref = policy_openvla_a
    policy = policies.load_policy(REFERENCE / "openvla_a/adapter", merge=merge)
    assert bool(policies.lora_modules(policy)) != merge
    features = policy.encode_images(ref["image0_uint8"][None])
    policy_near(features, ref["lora_patch_features"], 5e-5)
    ids = ref["prompt0_input_ids_final"]
    hidden, _, _ = policy.hidden(features, ids, torch.ones_like(ids).bool())
    policy_near(policy.logits(hidden), ref["lora_logits"], 1e-4)
    tokens = policy_greedy(policy, [ids], [ref["image0_uint8"]])
    assert torch.equal(tokens[0], ref["lora_action_token_ids"])


def test_openvla_evaluation_images_match_tensorflow():
    ref = np.load(REFERENCE / "openvla_preproc/tf_preprocess.npz")
    crop = policies.center_crop_90(ref["image_256"][None], 224)[0]
    assert (crop == ref["tf_crop90_224"]).all()
    for start, goal in (
        ("image_256", "tf_lanczos3_then_crop90_224"),
        ("tf_jpeg95_roundtrip_256", "tf_libero_eval_224"),
    ):
        ours = policies.resize_openvla(ref[start][None], 224, crop=True)
        gap = np.abs(ours[0].astype(int) - ref[goal])
        assert gap.max() <= 1 and (gap > 0).mean() <= 6e-4


def test_full_size_weights_are_the_official_ones():
    config = dict(image_sizes=[224, 224], text_config=dict(vocab_size=32064))
    openvla = policies.build(dict(config, model_type="openvla"))
    sizes = [
        tensor.numel() for tensor in policies.official_tensors(openvla).values()
    ]
    assert len(sizes) == 982 and sum(sizes) == 7_541_237_184
    assert openvla.vocab == 32000
    expected = json.loads((REFERENCE / "pi05_full_keys.json").read_text())
    pi05 = policies.build({"type": "pi05", "action_horizon": 50})
    tensors = policies.official_tensors(pi05)
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == expected
    policies.load_tensors(pi05, {pi05.internal_key(key): x for key, x in tensors.items()})


def test_pi05_matches_openpi():
    check_policy_openpi()


@pytest.mark.parametrize("layout", ["lerobot", "rlinf", "rlinf_dump"])
def test_pi05_layouts(tmp_path, layout):
    policy_rewrite_pi05(tmp_path / layout, layout)
    policy = policies.load_policy(tmp_path / layout, chunk=2)
    policy_compare_pi05(policy)
    assert (policy.settings["style"] == "lerobot") == (layout == "lerobot")
    names = dict(lerobot=["lerobot"], rlinf=["pick_and_place"], rlinf_dump=[])
    assert list(policy.statistics) == names[layout]
    for stats in policy.statistics.values():
        assert stats["action"]["q01"] == [-1] * 7


@pytest.mark.parametrize("style", ["openpi", "lerobot"])
def test_pi05_preprocessing_matches_official(style):
    ref = policy_arrays("pi05_preproc/preproc.npz")
    numbers = dict(q01=ref["q01"].tolist(), q99=ref["q99"].tolist())
    policy = policies.make_tiny("pi05", style=style, discrete_state=True)
    policy.statistics = {"x": dict(action=numbers, state=numbers)}
    policy.action_dim = 7
    values = policy.normalize(ref["state"])
    policy_near(values, ref[f"{style}_state_norm"].float(), 5e-5)
    expected = ref[f"{style}_actions_unnorm"][..., :7]
    policy_near(policy.unnormalize(ref["model_actions"]), expected.float(), 5e-5)
    for name in ("img_wide", "img_tall"):
        image = ref[name][None].numpy()
        ours = torch.from_numpy(policies.resize_with_pad(image, 56, style)[0])
        if style == "lerobot":
            policy_near(ours, ref[f"{name}_lerobot_56"], 5e-5)
        else:
            pixels = ((ours + 1) / 2 * 255).round().byte()
            assert torch.equal(pixels, ref[f"{name}_openpi_pil_56"])


@pytest.mark.parametrize("kind", ["stateless", "with_state"])
def test_pi05_prompts_match_official(monkeypatch, kind):
    prompts = json.loads((REFERENCE / "pi05_preproc/prompts.json").read_text())[
        kind
    ]
    ref = policy_arrays("pi05_preproc/preproc.npz")
    policy = policies.make_tiny("pi05", discrete_state=kind == "with_state")
    numbers = dict(q01=ref["q01"].tolist(), q99=ref["q99"].tolist())
    policy.statistics = {"x": {"state": numbers}}
    calls = []
    monkeypatch.setattr(policy, "encode", lambda text: calls.append(text) or [7])
    if kind == "stateless":
        ids, _ = policy.prompt([prompts["task"]])
        assert calls == [text for text, _ in prompts["encode_calls"]]
        assert ids.tolist() == [[2, 7, 7]]
    else:
        policy.prompt([row["task"] for row in prompts], ref["state"])
        assert calls == [row["prompt"] for row in prompts]
        assert torch.equal(
            policy.state_bins(ref["state"]), ref["state_bins"].long()
        )


def test_flow_formulas():
    check_policy_chain()
    check_policy_sde()


def test_token_tables_match_official():
    check_policy_tokens()


def test_openvla_logp_is_the_softmax_over_256(policy_pair):
    policy = policy_pair["openvla"]
    (images, texts), decision = policy_decide(policy, 4)
    tokens = decision.trace["tokens"]
    features = policy.encode_images(images)
    hidden, _, _ = policy.hidden(features, *policy.prompt(texts), tokens[:, :-1])
    first = policy.vocab - 256
    logits = policy.logits(hidden[:, -7:])[..., first : policy.vocab]
    allowed = torch.distributions.Categorical(logits=logits)
    policy_near(allowed.log_prob(tokens - first).sum(1), decision.logp, 1e-4)


def test_token_frequencies_match_the_softmax():
    """Counts of 2000 first tokens, each within 5 standard deviations."""
    policy = policies.make_tiny("openvla", temperature=0.5)
    policy.language_model.lm_head.weight.data *= 8
    images, texts = policy_batch(1)
    features = policy.encode_images(images).detach()
    hidden, _, _ = policy.hidden(features, *policy.prompt(texts))
    expected = 2000 * (policy.action_logits(hidden[0, -1]) / 0.5).softmax(-1)
    seen = (features.expand(2000, -1, -1), texts * 2000)
    tokens = policy.act(*seen, generator=policy_generator()).trace["tokens"]
    counts = torch.bincount(tokens[:, 0] - policy.vocab + 256, minlength=256)
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 5).all()
    assert expected.max() > 300, "a wrong temperature must show"


@policy_both
def test_padding_is_not_imitated(policy_pair, name):
    policy = policy_pair[name]
    seen = (*policy_batch(4), policy_actions(4, policy.horizon))
    pad = torch.zeros(4, policy.horizon, dtype=torch.bool)
    pad[0] = True
    pad[:, 5:] = True
    steps = policy.bc_loss(*seen, reduction="none", generator=policy_generator())
    mean = policy.bc_loss(*seen, pad, generator=policy_generator())
    policy_near(mean, steps[~pad].mean(), 5e-5)


def test_flow_time_is_beta(monkeypatch):
    """t = 0.001 + 0.999 Beta(1.5, 1), read off the calls of bc_loss."""
    policy = policies.make_tiny("pi05")
    times = []

    def flow_loss(kv, valid, actions, noise, t):
        times.append(t.double())
        return noise

    monkeypatch.setattr(policy, "flow_loss", flow_loss)
    monkeypatch.setattr(
        policy, "observe", lambda *seen, **checked: (None, None, None)
    )
    policy.bc_loss(
        None, None, policy_actions(5000, 8), generator=policy_generator()
    )
    beta = (times[0] - 0.001) / 0.999
    assert abs(beta.mean() - 3 / 5) < 0.02
    assert abs(beta.square().mean() - 3 / 7) < 0.02


def test_the_ode_has_no_density(policy_pair):
    policy = policy_pair["pi05"]
    seen, decision = policy_decide(policy, 2, "deploy")
    logp, entropy, _ = policy.evaluate(*seen, decision.trace)
    assert not decision.logp.any() and not logp.any() and not entropy.any()
    _, kv, valid = policy.observe(*seen, None, None)
    x = torch.randn(2, 1, 8, 8, generator=policy_generator())
    for i in range(4):
        v, _ = policy.velocity(x, torch.full((2, 1), 1 - i / 4), kv, valid)
        x = x - v / 4
    policy_near(decision.actions, policy.unnormalize(x[:, 0])[:, :4], 5e-5)


def check_data_reading():
    """The reference data set against what LeRobot's own reader returned for it."""
    truth = np.load(REFERENCE / "lerobot_v30_truth.npz")
    names = dict(actions="action_chunk4", pad="action_chunk4_is_pad", state="state")
    with tempfile.TemporaryDirectory() as cache:
        options = dict(cameras=["wrist", "front"], action_dim=None, cache_dir=cache)
        demos = real_data.open_dataset(REFERENCE / "lerobot_v30", None, 4, **options)
        parts = [(demos, np.arange(20)), (demos.select([2, 0]), np.r_[15:20, 0:6])]
        for part, rows in parts:
            batch = data_all(part)
            assert np.array_equal(batch["images"][:, 0], truth["decoded_cam1"][rows])
            assert np.array_equal(batch["images"][:, 1], truth["decoded_cam0"][rows])
            for key, name in names.items():
                assert np.array_equal(batch[key], truth[name][rows])
            assert batch["instructions"] == truth["task"][rows].tolist()


def test_reading_equals_lerobot():
    check_data_reading()


def check_data_resize():
    """Frames are made square exactly as openpi (pad) and OpenVLA (stretch) do it."""
    truth = np.load(REFERENCE / "pi05_preproc/preproc.npz")
    for name in ("img_wide", "img_tall"):
        for size in (56, 224):
            padded = real_data.resize(truth[name], size, "pad")
            assert np.array_equal(padded, truth[f"{name}_openpi_pil_{size}"])
    image = truth["img_wide"]
    stretched = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(real_data.resize(image, 32, "stretch"), np.asarray(stretched))
    assert real_data.resize(image, None, "pad") is image


def test_resize_is_the_official_one():
    check_data_resize()


def check_data_sampler():
    """alpha is exact, samples do not depend on the ranks, each pass has a new order."""
    sets = (DataToy(40, 1), DataToy(8, 0))
    draws = real_data.MixSampler(*sets, 0.1, 5000, seed=3)
    assert abs(next(draws)["sim"].mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 5000)
    one = real_data.MixSampler(*sets, 0.5, 30, seed=1)
    three = [real_data.MixSampler(*sets, 0.5, 30, 1, rank, 3) for rank in range(3)]
    states = []
    for _ in range(8):
        batch = next(one)
        for rank, sampler in enumerate(three):
            for key, values in next(sampler).items():
                assert np.array_equal(values, batch[key][rank::3]), key
        assert np.array_equal(batch["sim"], batch["state"][:, 1])
        states.append(batch["state"])
    numbers, tags = np.concatenate(states).astype(int).T
    for tag, size in ((1, 40), (0, 8)):
        first, second = numbers[tags == tag][: 2 * size].reshape(2, size)
        assert sorted(first) == sorted(second) == list(range(size))
        assert (first != second).any()


def test_sampler_mixes_by_alpha_whatever_the_ranks():
    check_data_sampler()


def check_data_pauses():
    """Small motions with the gripper as before are left out, in windows of actions, too."""
    actions = np.zeros((8, 7), np.float32)
    actions[:, 6] = [1, 1, 1, 1, 1, -1, -1, -1]           # gripper
    actions[2, :3] = 0.0015                               # norm .0026 m
    actions[3, 1] = 0.01                                  # m
    actions[4, 4] = 0.014                                 # rad, below 5 x .003
    recording = types.SimpleNamespace(
        fps=5,
        owner=np.array([4] * 7 + [2]),                    # two episodes
        rows=np.arange(8),
        actions=actions,
        states=np.arange(8.0)[:, None],
        instructions=np.full(8, "x"),
    )
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1, 1))
        demos = real_data.Demos(recording, f"{folder}/x.npy", 2).without_pauses(0.003)
        batch = data_all(demos)
    assert batch["state"][:, 0].tolist() == batch["images"].ravel().tolist() == [0, 3, 5, 7]
    assert demos.lengths.tolist() == [3, 1]
    assert np.array_equal(batch["actions"][:, 1], actions[[3, 5, 5, 7]])


def test_pauses_are_left_out():
    check_data_pauses()


def data_demos(actions, fps=5):
    """Stand for Demos: all that statistics look at."""
    actions = np.asarray(actions, np.float32)

    class Part:
        def __len__(self):
            return len(self.actions)

    part = Part()
    vars(part).update(actions=actions, states=2 * actions, fps=fps)
    return part


def check_data_widen():
    """Minimum and maximum take the place of quantiles that lose what is rare, if it is plausible:
    no motion of 5 m is."""
    actions = np.random.default_rng(0).normal(0, 0.01, (500, 7))
    actions[7, 0] = 5.0                                   # m: a glitch
    actions[9, 1] = 0.08                                  # m: a rare motion beside common ones
    actions[:, 4:] = 0, 0.25, 1
    actions[5, 4] = -0.12                                 # rad: a rare motion beside none
    actions[5, 6] = -1
    before = real_data.statistics(actions)
    stats = real_data.statistics(actions)
    with pytest.warns(UserWarning) as caught:
        real_data.widen(stats, data_demos(actions))
    said = re.compile(r"statistics of (\w+).*is (.*)")
    told = [said.search(str(each.message)).groups() for each in caught]
    assert dict(told) == dict(
        dx="kept; such actions are cut off or learnt badly",
        dy="replaced by minimum and maximum",
        dpitch="replaced by minimum and maximum",
        gripper="replaced by -1 .. 1",
    )
    assert stats["q99"][0] == before["q99"][0] < 0.05
    assert np.allclose(stats["q99"][1], 0.08)
    assert np.allclose(stats["q01"][2:], [*before["q01"][2:4], -0.12, 0.25, -1])
    assert np.allclose(stats["q99"][4:], [0, 0.25, 1])


def test_collapsed_ranges_are_widened_and_named():
    check_data_widen()


@pytest.mark.filterwarnings("ignore:statistics of")
def test_statistics_of_a_mix_count_by_alpha():
    """However many frames the simulation has: real counts by 1 - alpha, and keeps its rare ones."""
    rng = np.random.default_rng(0)
    sim = rng.normal(0, 0.002, (5840, 7))
    real = rng.normal(0, 0.02, (73, 7))
    real[3, 4] = 0.3
    parts = [data_demos(sim), data_demos(real)]
    action = real_data.dataset_statistics(parts, [0.5, 0.5])["action"]
    equal = np.concatenate([sim, np.tile(real, (80, 1))])
    assert np.allclose(action["std"], equal.std(axis=0), rtol=1e-5)
    low = np.quantile(equal, 0.01, axis=0, method="inverted_cdf")
    assert np.allclose(action["q01"][:3], low[:3])
    assert action["q99"][4] == np.float32(0.3)


def test_statistics_are_exact_and_pooled():
    values = np.random.default_rng(0).normal(size=(100, 7))
    parts = [data_demos(v, fps=0.01) for v in (values[:60], values[60:])]
    stats = real_data.dataset_statistics(parts)
    ordered = np.sort(values, axis=0)                     # 100 frames: q99 lies at 0.99 x 99
    assert np.allclose(stats["action"]["q99"], 0.99 * ordered[98] + 0.01 * ordered[99])
    assert np.allclose(stats["action"]["std"], values.std(axis=0))
    assert np.allclose(stats["state"]["max"], 2 * ordered[-1])


def data_converted(tmp_path, change, *names):
    """Write an episode whose arrays `change` has put into other conventions, and read it back.
    Returns (the actions as they were, the actions as read)."""
    images, states, actions, text, scene = data_episode(0, 9)
    changed_states, changed = change(states, actions)
    episode = (images, changed_states, changed, text, scene)
    real_data.write_dataset(tmp_path / "set", [episode] * 2, 5)
    dim = changed.shape[1] if not names else 7
    demos = data_open(tmp_path / "set", convert=names, action_dim=dim)
    return np.concatenate([actions, actions]), demos.actions


def data_gripper(function):
    """Return a change of the gripper's commands alone."""
    return lambda states, actions: (
        states, np.column_stack([actions[:, :6], function(actions[:, 6])])
    )


def data_in_degrees(states, actions):
    return states, actions * np.array([1, 1, 1, 57.29578, 57.29578, 57.29578, 1])


def data_as_poses(states, actions):
    """Integrate the deltas as the simulation does, from the first measured pose on."""
    position = states[0, :3].astype(float)
    frame = envs.frame_of(states[:1, 3:6].astype(float))
    poses = []
    for action in actions.astype(float):
        position = position + action[:3]
        frame = envs.frame_of(action[None, 3:6]) @ frame
        poses.append(np.concatenate([position, envs.euler_of(frame)[0], action[6:]]))
    return states, np.array(poses)


def data_as_joints(states, actions):
    """Follow the deltas with the arm of envs.py, from its home position on."""
    joints = envs.HOME[None].astype(float)
    position, frame, _ = envs.forward_kinematics(joints)
    measured = np.repeat(joints, len(actions), axis=0)
    rows = []
    for action in actions.astype(float):
        position = position + action[:3]
        frame = envs.frame_of(action[None, 3:6]) @ frame
        joints = envs.inverse_kinematics(joints, position, frame, iterations=30, posture=0.0)
        rows.append(np.append(joints[0], action[6]))
    return np.column_stack([measured, states[:, 6:]]), np.array(rows)


@pytest.mark.parametrize("name, change, tolerance", [
    ("degrees", data_in_degrees, 1e-5),
    ("gripper-open-1", data_gripper(lambda grip: (grip + 1) / 2), 1e-6),
    ("gripper-closed-1", data_gripper(lambda grip: (1 - grip) / 2), 1e-6),
    ("gripper-flipped", data_gripper(lambda grip: -grip), 1e-6),
    ("absolute-poses", data_as_poses, 1e-5),
    ("panda-joints", data_as_joints, 2e-3),
])
def test_conversions_recover_the_contract(tmp_path, name, change, tolerance):
    """Each of CONVERSIONS undoes what it is for; poses turn about all three axes at once."""
    was, read = data_converted(tmp_path, change, name)
    assert np.allclose(read, was, atol=tolerance)


def test_conversions_follow_each_other_and_come_from_files(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def convert(episode):\n    return dict(episode, actions=episode['actions'] * 2)\n"
    )
    change = data_gripper(lambda grip: (grip + 1) / 4)
    was, read = data_converted(tmp_path, change, str(tmp_path / "mine.py"), "gripper-open-1")
    assert np.allclose(read[:, 6], was[:, 6]) and np.allclose(read[:, :6], 2 * was[:, :6])


def test_control_rate_adds_deltas_and_keeps_their_pictures(tmp_path):
    real_data.write_dataset(tmp_path / "set", [data_episode(0, 9), data_episode(1, 8)], 10)
    every = data_open(tmp_path / "set")
    half = data_open(tmp_path / "set", convert="control-rate")
    assert half.fps == 5 and half.lengths.tolist() == [5, 4]
    starts = np.array([0, 2, 4, 6, 8, 9, 11, 13, 15])
    assert np.array_equal(data_all(half)["images"], data_all(every)["images"][starts])
    added = np.add.reduceat(every.actions, starts)
    assert np.allclose(half.actions[:, :6], added[:, :6], atol=1e-6)
    assert np.allclose(half.actions[:, 6], every.actions[[1, 3, 5, 7, 8, 10, 12, 14, 16], 6])


@pytest.mark.parametrize("convert, message", [
    (lambda episode: None, "episode 0: got TypeError"),
    (lambda episode: dict(episode, actions=[0.0]), "an array of shape .1,. instead of"),
    (lambda episode: dict(episode, instructions="open"), "instructions 'open' instead of a list"),
    (lambda episode: dict(episode, fps=0), "fps 0 instead of a rate above 0"),
    (
        lambda episode: dict(episode, frames=episode["frames"] + 5),
        "got frames outside; need 0 .. 8",
    ),
    (lambda episode: dict(episode, frames=episode["frames"] / 2), "instead of whole numbers"),
    (lambda episode: dict(episode, actions=episode["actions"][:2]), "2 actions for 9 frames"),
    (lambda episode: episode["no such key"], "episode 0: got KeyError"),
    ("nowhere.py", "nowhere.py: got FileNotFoundError.*'absolute-poses'"),
])
def test_wrong_conversions_are_named(tmp_path, convert, message):
    real_data.write_dataset(tmp_path / "set", [data_episode(0, 9)], 5)
    with pytest.raises(ValueError, match=message):
        data_open(tmp_path / "set", convert=convert)


def check_evaluate_wilson():
    """At the ends p of the interval, k / n is 1.96 standard deviations away from p."""
    for k, n in ((0, 1), (3, 10), (50, 50), (399, 400)):
        low, high = evaluate.wilson(k, n)
        assert low <= k / n <= high
        for p in (low, high):
            deviation = 1.96**2 * p * (1 - p) / n
            assert math.isclose((k / n - p) ** 2, deviation, abs_tol=1e-12)


def check_evaluate_mcnemar():
    """p is the share of all sequences of b + c fair coins that are at least as lopsided."""
    for b, c in itertools.product(range(6), range(6)):
        coins = itertools.product((0, 1), repeat=b + c)
        extreme = sum(abs(2 * sum(coin) - b - c) >= abs(b - c) for coin in coins)
        first = evaluate_outcomes("1" * b + "0" * c + "10")
        second = evaluate_outcomes("0" * b + "1" * c + "10")
        got = evaluate.compare(first, second)
        assert math.isclose(got["p"], extreme / 2 ** (b + c))
        assert (got["only_first"], got["only_second"]) == (b, c)


def check_evaluate_interval():
    """The interval is Wald's, of four counts to each of which 1/2 was added."""
    first = evaluate_outcomes("1110000000")
    second = evaluate_outcomes("0101111110")
    got = evaluate.compare(first, second)
    counts = np.array([1, 2, 6, 1]) + 0.5            # both, only first, only second, neither
    share = counts / counts.sum()
    d = share[2] - share[1]
    half = 1.96 * math.sqrt((share[1] + share[2] - d**2) / counts.sum())
    assert math.isclose(got["difference"], 0.4)
    assert np.allclose((got["low"], got["high"]), (d - half, d + half))


def check_evaluate_summary():
    episodes = evaluate_outcomes("1000")
    episodes[1].update(steps=40, touched=False)
    episodes[2].update(steps=20, failure=True)
    low, high = evaluate.wilson(1, 4)
    expected = dict(k=1, n=4, success=0.25, low=low, high=high, steps=20.0)
    expected.update(touched=3, failure=1, diverged=0, untouched=1)
    assert evaluate.summary(episodes) == expected


@pytest.mark.parametrize("check", [
    check_evaluate_wilson,
    check_evaluate_mcnemar,
    check_evaluate_interval,
    check_evaluate_summary,
])
def test_evaluate_formula(check):
    check()


@pytest.mark.parametrize("name, micro_batch", [("openvla", 64), ("openvla", 2), ("pi05", 64)])
def test_stage_one_gradient_is_the_formula(name, micro_batch):
    check_stage_supervised(name, micro_batch)


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_stage_two_gradient_is_ppo_plus_lambda_times_anchor(name):
    check_stage_anchor(name)


def test_gae_is_the_double_sum():
    check_stage_gae()


def test_advantages_are_normalised_and_variance_is_explained():
    check_stage_normalised()


def test_only_time_limits_bootstrap():
    check_stage_bootstrap()


def test_state_critic_has_targets_of_its_own():
    rng = np.random.default_rng(0)
    tensors = [torch.from_numpy(x).float() for x in rng.normal(size=(3, 6, 4))]
    rollout = types.SimpleNamespace(
        rewards=tensors[0],
        values=tensors[1],
        next_values=tensors[2],
        ended=torch.rand(6, 4) < 0.2,
    )
    parts = *tensors, rollout.ended, 0.9
    for critic, own in (("head", 0.5), ("state", rl_cotrain.CRITIC_LAMBDA)):
        args = types.SimpleNamespace(gamma=0.9, gae_lambda=0.5, critic=critic)
        advantage, returns = rl_cotrain.advantages(rollout, args)
        assert torch.equal(advantage, rl_cotrain.gae(*parts, 0.5)[0])
        assert torch.equal(returns, rl_cotrain.gae(*parts, own)[1])


def test_learning_rate_is_openpis():
    options = types.SimpleNamespace(
        lr=2.5e-5, warmup=1000, decay_steps=30000, final_lr=0.1, steps=5000
    )
    rates = [
        sft_warmstart.learning_rate(step, options) for step in (0, 1000, 15500, 30000, 40000)
    ]
    assert rates == pytest.approx([2.5e-5 / 1001, 2.5e-5, 2.5e-5 * 0.55, 2.5e-6, 2.5e-6])


def test_augmentation_shifts_whole_pixels_and_keeps_grey():
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    )
    torch.manual_seed(0)
    for recipe in sft_warmstart.AUGMENTATIONS:
        out = sft_warmstart.augment(images, recipe)
        assert out.shape == images.shape and out.dtype == torch.uint8
        assert (
            len({tuple(image.flatten().tolist()) for image in out}) == 64
        ), "a draw for each sample"
        assert sft_warmstart.augment(images.view(16, 4, 32, 32, 3), recipe).shape == (
            16,
            4,
            32,
            32,
            3,
        )
    recipe = sft_warmstart.Augmentation
    only = dict(none=recipe(), shift=recipe(shift=2), hue=recipe(hue=0.05))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_warmstart, "AUGMENTATIONS", only)
        assert torch.equal(sft_warmstart.augment(images, "none"), images)
        grey = torch.full((4, 8, 8, 3), 100, dtype=torch.uint8)
        assert torch.equal(sft_warmstart.augment(grey, "hue"), grey)
        moved = sft_warmstart.augment(images, "shift").numpy()
    padded = np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), "edge")
    offsets = set()
    for k, (y, x) in itertools.product(range(64), itertools.product(range(5), range(5))):
        if (padded[k, y : y + 32, x : x + 32] == moved[k]).all():
            offsets.add((y, x))
    assert len(offsets) > 15


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_pretrain_probe_losses_fall_when_the_answers_are_right(name):
    check_pretrain_probe(name)


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_pretrain_probe_sees_words_and_attention(name, monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        y = fused(q, k, v, **options)
        calls.append((v, y))
        return y

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    policy, probe, (_, mask) = pretrain_probe(name)
    words = mask.sum(1) - probe.before_patches  # all but OpenVLA's BOS
    assert torch.equal(probe.words.sum(1), words)
    length = probe.words.shape[1]
    v, y = next(call for call in calls if call[1].shape[2] == length)  # the decoder's first layer
    torch.testing.assert_close(probe.attention @ v, y, atol=5e-5, rtol=1e-3)


# ---- contracts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("domain, variant", ENV_SETTINGS)
@pytest.mark.parametrize("task", envs.TASKS)
def test_environment_contract(task, domain, variant):
    made = [envs.make_env(task, domain, 2, seed, variant=variant) for seed in (3, 3, 4)]
    env, twin, other = made
    obs = env.reset()
    assert env_same(obs, twin.reset())
    assert not np.array_equal(obs["images"], other.reset()["images"])
    for i in range(2):
        model, data = env_mujoco(env, i)
        mujoco.mj_forward(model, data)
        assert data.contact.dist.min(initial=0) > -5e-4    # m; no interpenetration at first
    actions = env_actions(2, 4)
    obs, *_ = env.step(actions)
    assert env_same(obs, twin.step(actions)[0])
    assert np.isfinite(obs["state"]).all()


def check_env_fresh():
    env = envs.make_env("push-cube", num_envs=2)
    env.reset()
    images = env.step(env_actions(2, 1))[0]["images"]
    kept = images.copy()
    env.step(env_actions(2, 1))
    assert np.array_equal(images, kept), "an old observation was overwritten"
    images[:] = 7
    assert not (env.images == 7).all(), "a user must be able to write into what he was given"


def test_check_env_lists_everything_that_is_wrong():
    env = envs.make_env("all", num_envs=2)
    envs.check_env(env)
    sound_step = env.step

    def step(actions):
        obs, reward, terminated, truncated, info = sound_step(actions)
        del info["failure"]
        return obs, reward.astype(float), terminated, truncated, info
    env.step = step
    with pytest.raises(ValueError, match="(?s)failure: .*reward: got float64"):
        envs.check_env(env)


def test_make_env_lists_everything_that_is_wrong():
    wrong = dict(image_size=4, randomise=["late"], group=3, variant="old")
    wanted = "(?s)fold-shirt.*push-cube.*mars.*old.*late.*image_size.*group = 3"
    with pytest.raises(ValueError, match=wanted):
        envs.make_env("fold-shirt", "mars", 4, **wrong)


def env_workers(num_envs=4, workers=2, **options):
    """Return environments in worker processes, all tasks, and the same in this process."""
    options = dict(dict(task="all", seed=7, image_size=16), **options)
    made = [envs.make_env(num_envs=num_envs, workers=n, **options) for n in (workers, 1)]
    assert isinstance(made[0], envs.ParallelEnv) and isinstance(made[1], envs.VecEnv)
    return made


def env_ended(env):
    """Wait until all workers have ended."""
    for process in env.processes:
        process.join(timeout=20)
    return not any(process.is_alive() for process in env.processes)


def test_workers_play_the_episodes_of_one_process(monkeypatch):
    """First episodes and a user's own task are bit-equal; wrong actions are named."""
    still = envs.Drawer("still", True, "wait", "go", ())
    monkeypatch.setattr(envs, "TASKS", envs.TASKS | dict(still=still))
    env, one = env_workers(8, first_episode=5, episode_stride=3, group=2)
    assert (env.tasks, env.privileged_size) == (one.tasks, one.privileged_size)
    assert env_same(env.reset(11), one.reset(11))
    assert env.task.tolist() == one.task.tolist()
    assert env.wrong_instructions() == one.wrong_instructions()
    actions = env_actions(8, 2)
    actions[6, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"non-finite ones in environments \[6\]"):
        env.step(actions)
    for _ in range(3):
        mine = env.step(env_actions(8, 2))
        its = one.step(env_actions(8, 2))
        assert env_same(mine[0], its[0])
        assert all(np.array_equal(a, b) for a, b in zip(mine[1:4], its[1:4]))
        assert mine[4].keys() == its[4].keys() and mine[4]["final_obs"] is None
        assert np.array_equal(mine[4]["episode"], its[4]["episode"])
    env.close()
    assert env_ended(env)
    with pytest.raises(RuntimeError, match="workers: got exit codes"):
        env.reset()


def test_workers_never_play_an_episode_twice():
    """Later episodes are of the worker's own numbers, and the scenes of these numbers."""
    env, _ = env_workers(8, episode_stride=3)
    env.reset(first_episode=2)
    players = {}
    final = {}
    for _ in range(24):
        *_, info = env.step(np.tile([0.01, 0, 0, 0, 0, 0.05, 1], (8, 8, 1)))
        for row, i in enumerate(info["ended"].tolist()):
            final[int(info["episode"][i])] = {
                name: value[row] for name, value in info["final_obs"].items()
            }
        for i, episode in enumerate(info["episode"].tolist()):
            players.setdefault(episode, set()).add(i)
    assert all(len(some) == 1 for some in players.values())
    for episode, (i,) in players.items():
        k, rest = divmod(episode - 2, 3)
        assert rest == 0 and i // 4 == (k // 4 if k < 8 else k % 2)
    last = max(final)
    assert last >= 2 + 3 * 8
    alone = envs.make_env("all", num_envs=1, seed=7, image_size=16, auto_reset=False)
    alone.reset(first_episode=last)
    *_, info = alone.step(np.tile([0.01, 0, 0, 0, 0, 0.05, 1], (1, 80, 1)))
    assert all(np.array_equal(value[0], final[last][name])
               for name, value in info["final_obs"].items())


def test_errors_of_workers_are_raised_here(monkeypatch):
    broken = envs.Drawer("broken", True, "wait", "go", ())
    broken.handle = "stuck"
    monkeypatch.setattr(envs, "TASKS", envs.TASKS | dict(broken=broken))
    env = envs.make_env("push-cube", num_envs=4, image_size=0, workers=2)
    os.kill(env.processes[1].pid, signal.SIGTERM)   # is for the parent
    env.reset()
    os.kill(env.processes[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"exit codes \[0, -9\]; need workers that live; try"):
        for _ in range(2):
            env.step(np.zeros((4, 1, 7)))
    assert env_ended(env)
    env = envs.make_env("broken", num_envs=4, image_size=0, workers=2)
    with pytest.raises(TypeError, match="not callable"):
        env.reset()
    assert env_ended(env)
    assert isinstance(envs.make_env("all", num_envs=5, image_size=0, workers=2), envs.VecEnv)
    grouped = envs.make_env("all", num_envs=4, group=2, image_size=0, workers=4)
    assert len(grouped.processes) == 2
    grouped.close()
    monkeypatch.setattr(envs, "TASKS", dict(local=type("Local", (envs.Drawer,), {})))
    with pytest.raises(ValueError, match="need tasks that pickle can send"):
        envs.make_env("local", num_envs=4, workers=2)


def test_a_fifth_task_is_a_class_and_a_line(monkeypatch):
    monkeypatch.setattr(envs, "TASKS", dict(envs.TASKS))
    envs.register(TouchCube())
    env = envs.make_env("touch-cube", "real", 10)
    assert envs.run_expert(env, 10)[0].all() and env.privileged_size == 16
    assert env.wrong_instructions() == ["open the drawer"] * 10
    envs.check_env(envs.make_env("touch-cube", num_envs=2))


@pytest.mark.slow
@pytest.mark.parametrize("domain", envs.DOMAINS)
@pytest.mark.parametrize("task", envs.TASKS)
def test_experts_succeed(task, domain):
    env = envs.make_env(task, domain, 25, image_size=0)
    assert envs.run_expert(env, 25)[0].mean() >= .96
    if domain == "sim":
        assert envs.run_expert(env, 25, noise=.004)[0].mean() >= .9
        return
    assert envs.run_expert(env, 25, "teleop")[0].mean() >= .85
    if domain == "real":
        for variant in ("unseen-objects", "other-places", "whole-table"):
            held_out = envs.make_env(task, domain, 25, image_size=0, variant=variant)
            assert envs.run_expert(held_out, 25)[0].mean() >= .9


@pytest.mark.parametrize("task", ["pick-place", "open-drawer"])
def test_the_whole_table_is_the_demonstrated_places_and_those_around(task, monkeypatch):
    """Even episodes start in the demonstrated places, odd ones elsewhere; so does practice."""
    drawn = set()                                 # (episode is odd, start is in the box)
    honest = envs.VecEnv.start_xy

    def start_xy(env, i, rng, box):
        xy = honest(env, i, rng, box)
        low, high = box
        assert (xy >= low - envs.OTHER_PLACES_BAND).all()
        assert (xy <= high + envs.OTHER_PLACES_BAND).all()
        drawn.add((bool(env.episode[i] % 2), bool((xy >= low).all() and (xy <= high).all())))
        return xy

    monkeypatch.setattr(envs.VecEnv, "start_xy", start_xy)
    starts = {}
    for variant in ("demonstrated", "other-places", "whole-table"):
        env = env_make(task, num_envs=20, variant=variant)
        starts[variant] = set(drawn)
        drawn.clear()
    assert starts["demonstrated"] == {(False, True), (True, True)}
    assert starts["other-places"] == {(False, False), (True, False)}
    assert starts["whole-table"] == {(False, True), (True, False)}
    practice = env_make(task, num_envs=20, randomise=["places"])
    everyone = np.arange(20)
    assert env_same(practice.observe(everyone), env.observe(everyone))
    with pytest.raises(ValueError, match="variant"):
        env_make(task, "pretrain", variant="whole-table")


def check_env_same_episode():
    """Episode 4 does not depend on how many environments run, nor on where it starts."""
    actions = env_actions(1, 6)

    def trace(**options):
        env = env_make("all", "real", **options)
        row = np.flatnonzero(env.episode == 4)
        before = env.observe(row)
        env.step(np.repeat(actions, env.num_envs, 0))
        return before, env.observe(row)
    before, after = trace(first_episode=4)
    five = dict(num_envs=5)
    two = dict(num_envs=2, first_episode=1, episode_stride=3)
    for options in (five, two):
        again = trace(**options)
        assert env_same(again[0], before), options
        assert env_same(again[1], after), options


def test_an_episode_is_the_same_however_it_is_run():
    alone = envs.run_expert(env_make("all", "real"), 8, "teleop")
    four = envs.run_expert(env_make("all", "real", 4), 8, "teleop")
    assert np.array_equal(alone, four)             # success and length


def check_env_group():
    """A group shares its episodes: the k-th restart of each of its environments is one number."""
    env = env_make("all", num_envs=6, group=3, first_episode=2, episode_stride=5)
    assert env.episode.tolist() == [2, 2, 2, 7, 7, 7]
    obs = env.step(np.repeat(env_actions(1, 2), 6, 0))[0]
    assert np.array_equal(obs["privileged"][0], obs["privileged"][2])
    for ids in ([0], [4], [0], [1], [3], [5]):
        env.begin_episodes(np.array(ids))
    assert env.episode.tolist() == [22, 12, 2, 17, 17, 17]


def test_a_chunk_is_its_steps_and_a_time_limit_ends_it():
    one, chunk = [env_make("push-cube", num_envs=2) for _ in range(2)]
    actions = env_actions(2, 4)
    for k in range(4):
        last = one.step(actions[:, k:k + 1])
    assert env_same(last[0], chunk.step(actions)[0])
    env = env_make("close-drawer")
    env.steps[0] = env.horizon[0] - 2
    obs, _, terminated, truncated, info = env.step(env_actions(1, 4))
    assert truncated[0] and not terminated[0]
    assert info["length"][0] == 40 and env.steps[0] == 0
    assert not np.array_equal(info["final_obs"]["state"], obs["state"])


def check_env_frozen():
    """Without auto_reset an environment that has ended stays as it is; it is reported once."""
    env = envs.make_env("close-drawer", num_envs=2, auto_reset=False)
    env.reset()
    env.steps[0] = env.horizon[0] - 1
    obs, *_, info = env.step(env_actions(2, 2))
    assert info["ended"].tolist() == [0]
    later, _, _, truncated, info = env.step(env_actions(2, 2, 1))
    assert not len(info["ended"]) and not truncated.any()
    same = (later["images"] == obs["images"]).all((1, 2, 3))
    assert same.tolist() == [True, False]
    assert env.steps.tolist() == [40, 4]
    env.reset()
    assert not env.over.any()


def check_env_rewards():
    """Each event is rewarded once: .2 for the first grasp, 1 for success."""
    env = env_make("pick-place", num_envs=4, auto_reset=False)
    expert = envs.Expert(env)
    total = np.zeros(4)
    for _ in range(45):
        total += env.step(expert.act()[0][:, None])[1]
    assert env.succeeded.all()
    assert total == pytest.approx([1.2] * 4, abs=1e-6)


def check_env_success():
    """Success of pick-place is measured: inside the dish, at the right height, tool away."""
    env = env_make("pick-place")
    scene = env.scenes["pick-place"]
    in_dish = env.goal[0] + (0, 0, env.sampled[0].rest)
    cases = [
        ((0, 0, .03), False),
        ((0, 0, -.002), False),
        ((.06, 0, .009), False),
        ((0, 0, .009), True),
    ]
    for offset, success in cases:
        scene.qpos[0, 9:12] = in_dish + offset
        env.measure(np.array([0]))
        assert env.success[0] == success, offset
    _, reward, terminated, truncated, _ = env.step(ENV_REST[None, None])
    assert terminated[0] and not truncated[0]
    assert reward[0] == pytest.approx(1)


def check_env_wrong_cube():
    """Pushing the named cube is a success, pushing another one a failure; both end it."""
    env = env_make("push-cube", num_envs=3)
    named = [sampled.named for sampled in env.sampled]
    right = named[0]
    wrong = (named[1] + 1) % 3
    qpos = env.scenes["push-cube"].qpos
    qpos[0, FREE + 7 * right] += .13
    qpos[1, FREE + 7 * wrong] += .13
    _, reward, terminated, _, info = env.step(np.zeros((3, 1, 7)))
    assert terminated.tolist() == [True, True, False]
    assert info["success"].tolist() == [True, False, False]
    assert info["failure"].tolist() == [False, True, False]
    assert reward == pytest.approx([1, 0, 0])


def check_env_instruction():
    """The instruction has the colour of the named cube, the wrong one that of another cube."""
    for domain in envs.DOMAINS:
        env = env_make("push-cube", domain, 12)
        scene = env.scenes["push-cube"]
        cubes = env.distributions["cubes"]
        for i, wrong in enumerate(env.wrong_instructions()):
            for k, words in enumerate((env.instruction[i], wrong)):
                (colour,) = {*words.split()} & {*cubes}
                cube = scene.model.geom(f"cube{(env.sampled[i].named + k) % 3}").id
                rgb = scene.field("geom_rgba")[i, cube, :3]
                assert env_distance([rgb], env_colours(cubes[colour])) < 1e-6


@pytest.mark.parametrize("check", [
    check_env_fresh,
    check_env_same_episode,
    check_env_group,
    check_env_frozen,
    check_env_rewards,
    check_env_success,
    check_env_wrong_cube,
    check_env_instruction,
])
def test_env_rule(check):
    check()


def test_privileged_is_what_the_simulator_knows():
    env = env_make("all", num_envs=8)
    privileged = env.observe(np.arange(8))["privileged"]
    points = np.stack([env.tcp, env.object, env.goal], 1)
    seen = privileged[:, :9].reshape(8, 3, 3) / 10 + envs.LOOK_AT
    assert seen == pytest.approx(points, abs=1e-6)
    assert privileged[:, 9] == pytest.approx(10 * env.opening)
    names = list(envs.TASKS)
    assert [names[k] for k in privileged[:, 11:].argmax(1)] == list(env.task)


def test_domains_differ_in_every_parameter():
    """And `pretrain` shares no colour and no place of the camera with the others."""
    for name, of in envs.PARAMETERS.items():
        assert (of["sim"] == of["real"]) == (name == "side"), name
    apart = dict.fromkeys(("table", "wall", "colour", "dish", "cabinet", "handle"), .25)
    apart |= dict(robot=.1, cubes=.12)
    eyes = {}
    for domain in envs.DOMAINS:
        cameras = env_make("push-cube", domain, 100).camera
        eyes[domain] = [camera.eye for camera in cameras]
    for domain in ("sim", "real"):
        for name, least in apart.items():
            of = envs.PARAMETERS[name]
            distance = env_distance(env_colours(of["pretrain"]), env_colours(of[domain]))
            assert distance > least, name
        assert env_distance(eyes["pretrain"], eyes[domain]) > .04      # m


def test_randomise_draws_as_pretrain_but_for_the_camera():
    sim = envs.distributions("sim", "demonstrated", ())
    other = envs.distributions("pretrain", "demonstrated", ())
    visual = envs.distributions("sim", "demonstrated", ["visual"])
    own = [*envs.VISUAL, "colour", "dish", "cabinet"]
    assert visual == sim | {name: other[name] for name in own} | envs.NEAR_CAMERA
    dynamics = envs.distributions("sim", "demonstrated", ["dynamics"])
    assert dynamics == sim | {name: other[name] for name in envs.DYNAMICS}
    for name, near in envs.NEAR_CAMERA.items():
        assert near.low < sim[name] < near.high


def test_wrong_actions_move_nothing():
    env = env_make("push-cube", num_envs=4)
    start = env.target[:, 0].copy()
    for shape in ((4, 7), (3, 1, 7), (4, 0, 7)):
        with pytest.raises(ValueError, match=r"need \(4, K >= 1, 7\)"):
            env.step(np.zeros(shape))
    far = np.full((4, 2, 7), 9.)
    bad = far.copy()
    bad[[1, 3], 0, 3] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        env.step(bad)
    env.step(far)                                  # clipped
    moved = env.target[:, 0] - start
    assert moved == pytest.approx([2 * envs.ACTION_LIMIT[0]] * 4)


def check_env_diverged():
    """A diverged simulation ends alone, without a future value, and the next episode is sound."""
    env, twin = [env_make("pick-place", num_envs=3) for _ in range(2)]
    env.scenes["pick-place"].qvel[1, :7] = 1e13
    obs, reward, terminated, truncated, info = env.step(env_actions(3, 2))
    other = twin.step(env_actions(3, 2))[0]
    assert terminated.tolist() == [False, True, False] and not truncated.any()
    assert info["diverged"][1] and reward[1] == 0
    assert np.isfinite(info["final_obs"]["state"]).all()
    sound = [0, 2]
    assert np.array_equal(obs["state"][sound], other["state"][sound])
    obs, _, _, _, info = env.step(env_actions(3, 2, 1))
    assert np.isfinite(obs["state"]).all()
    assert not info["diverged"].any()


def test_a_diverging_simulation_ends_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                    # MuJoCo writes its warnings to MUJOCO_LOG.TXT
    check_env_diverged()


def test_demonstrators():
    """With noise the label stays the clean action; a tele-operator's is what was executed."""
    env = env_make("push-cube", num_envs=6)
    executed, label = envs.Expert(env, noise=.004).act()
    assert (executed != label).any(1).all()
    env.reset()
    clean = envs.Expert(env).act()
    assert np.array_equal(*clean)
    assert clean[1] == pytest.approx(label, abs=1e-9)
    executed, label = envs.Expert(env, "teleop").act()
    assert np.array_equal(executed, label)


@pytest.mark.parametrize("visible, device", [
    ("2,3", "1"),
    ("1,0", "1"),
    ("2", "0"),
    ("GPU-5ebe,GPU-ac33", None),
])
def test_each_rank_renders_on_its_own_gpu(visible, device, monkeypatch):
    """MuJoCo counts the GPUs that CUDA_VISIBLE_DEVICES names, in that order."""
    environ = os.environ | dict(LOCAL_RANK="1", CUDA_VISIBLE_DEVICES=visible)
    environ.pop("MUJOCO_EGL_DEVICE_ID", None)
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(envs.glob, "glob", lambda _: [f"/dev/nvidia{k}" for k in range(4)])
    envs.choose_opengl()
    assert environ.get("MUJOCO_EGL_DEVICE_ID") == device


POLICY_SETTINGS = [
    ("openvla", {}),
    ("openvla", dict(temperature=0.5)),
    ("pi05", {}),
    ("pi05", dict(sampler="flow_sde")),
    ("pi05", dict(steps=3, chunk=2, horizon=5)),
]


@pytest.mark.parametrize("name, settings", POLICY_SETTINGS)
def test_policies_keep_the_contract(name, settings):
    check_policy_agreement(name, **settings)
    policy = policy_shaken(name, **settings)
    policies.check_policy(policy)
    seen, decision = policy_decide(policy, 7)
    policy_near(policy.value(*seen), decision.value, 1e-4)
    _, again = policy_decide(policy, 7)
    assert torch.equal(again.actions, decision.actions)


def test_check_policy_lists_what_is_wrong():
    class Broken(policies.OpenVLA):
        def evaluate(self, images, instructions, trace, state=None):
            logp, entropy, value = super().evaluate(images, instructions, trace)
            return logp.detach() + 1, entropy, value[:, None].detach()

        def bc_loss(self, *inputs, reduction="mean", **options):
            return super().bc_loss(*inputs, **options)

    policy = policies.make_tiny("openvla")
    policy.__class__ = Broken
    with pytest.raises(ValueError) as caught:
        policies.check_policy(policy)
    for text in (
        "logp of sample",
        "(3, 1)",
        "bc_loss(none)",
        "evaluate: got no gradient",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize("freeze", ["none", "vision", "vlm"])
@pytest.mark.parametrize("name", ["pi05"])
def test_freezing(policy_saved, name, freeze):
    policy = policies.load_policy(policy_saved, freeze=freeze)
    assert policy.vision_frozen == (freeze != "none")
    frozen = dict(none=(), vision=policy.vision, vlm=policy.vlm)[freeze]
    for key, p in policy.named_parameters():
        assert p.requires_grad != key.startswith(frozen)
    policies.check_policy(policy)  # some gradient flows


@policy_both
def test_bf16_is_autocast_over_float32(policy_saved, name):
    policy = policies.load_policy(policy_saved, dtype="bf16")
    seen, decision = policy_decide(policy, 4)
    scores = policy.evaluate(*seen, decision.trace)
    dtypes = {x.dtype for x in (*scores, *decision[:3], *policy.parameters())}
    assert dtypes == {torch.float32}
    reference = policies.load_policy(policy_saved).evaluate(*seen, decision.trace)
    assert 0 < (scores[0] - reference[0]).abs().max() < 0.5


def policy_relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def test_frozen_weights_are_stored_in_bf16():
    """As near to the official float32 arrays as official bf16 is: 5 %; what trains is float32."""
    policy = policies.load_policy(REFERENCE / "openvla_a", dtype="bf16", lora_rank=4)
    ref = policy_arrays("openvla_a/reference.npz")
    for k in range(2):
        ids = ref[f"prompt{k}_input_ids_final"]
        features = policy.encode_images(ref[f"image{k}_uint8"][None])
        assert features.dtype == torch.bfloat16
        hidden, _, _ = policy.hidden(features, ids, torch.ones_like(ids).bool())
        assert policy_relative(policy.logits(hidden), ref[f"sample{k}_logits"]) < 0.05
    for name, p in policy.named_parameters():
        exact = p.requires_grad or p.ndim == 1 and "norm" in name or "lm_head" in name
        assert p.dtype == torch.float32 or not exact
    assert policy.language_model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    policy = policies.load_policy(REFERENCE / "pi05_a", dtype="bf16", freeze="vlm")
    inputs = policy_arrays("pi05_a/inputs.npz")
    ref = policy_arrays("pi05_a/outputs.npz")
    pixels = inputs["images"].flatten(0, 1)
    with policy.autocast():
        features = policy.vision_tower(pixels).last_hidden_state.unflatten(0, (2, 3))
    prompt = (inputs["tokens"], inputs["token_mask"])
    _, kv, valid = policy.prefix(features, inputs["image_mask"], *prompt)
    t = inputs["time"][:, None, None]
    x = t * inputs["noise"] + (1 - t) * inputs["actions"]
    v, _ = policy.velocity(x[:, None], inputs["time"][:, None], kv, valid)
    assert policy_relative(v[:, 0], ref["v_t"]) < 2 * policy_relative(ref["v_t_bf16"], ref["v_t"])
    assert policy.gemma_expert.layers[0].mlp.up_proj.weight.dtype == torch.float32
    policy = evaluate.load("pi05", "cpu", "bf16")  # to act only: everything is stored so
    assert policy.gemma_expert.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in policy.gemma_expert.parameters())


@pytest.mark.parametrize("name, adapted, freeze, gigabytes", [
    ("openvla", True, "none", 15.4),
    ("pi05", False, "vlm", 7.6),
    ("pi05", False, "none", 13.5),
])
def test_full_size_fits_where_the_readme_says(name, adapted, freeze, gigabytes):
    text = dict(vocab_size=32064)
    policy = policies.build(dict(model_type="openvla", text_config=text) if name == "openvla"
                            else dict(type="pi05"))
    policy.bf16 = True
    trainable = policies.trainable_names(policy, freeze, adapted)
    size = 0
    for key, p in policy.named_parameters():
        size += p.numel() * policies.storage_dtype(policy, key, trainable).itemsize
    assert size / 1e9 == pytest.approx(gigabytes, abs=0.1)


def test_a_frozen_prefix_is_computed_once(policy_pair):
    """What encode_prefix returns stands for images, also beside prompts of another length."""
    policy = policy_pair["pi05"]
    assert not policy.prefix_frozen
    frozen = policies.prepare(copy.deepcopy(policy), "vlm")
    assert frozen.prefix_frozen
    images, texts = policy_batch(2)
    texts = ["open the drawer", "pick up the carrot and put it down there"]
    prefix = [frozen.encode_prefix(images[i : i + 1], texts[i : i + 1]) for i in range(2)]
    both = rl_cotrain.join([dict(images=part) for part in prefix])
    assert both["images"]["kv"].shape[1] == max(part["kv"].shape[1] for part in prefix)
    decision = frozen.act(images, texts, generator=policy_generator())
    again = frozen.act(both["images"], texts, generator=policy_generator())
    policy_near(again.actions, decision.actions, 1e-5)
    one = frozen.evaluate(images, texts, decision.trace)
    other = frozen.evaluate(both["images"], texts, decision.trace)
    for a, b in zip(one, other):
        policy_near(a, b, 1e-5)
    obs = dict(images=images, instructions=texts)
    assert isinstance(rl_cotrain.policy_inputs(frozen, obs)["images"], dict)
    assert not isinstance(rl_cotrain.policy_inputs(policy, obs)["images"], dict)


def test_measuring_prints_a_table(monkeypatch, capsys):
    flags = "--policy openvla --batch 2 --lora-rank 4 --gradient-checkpointing --transformers"
    monkeypatch.setattr(sys, "argv", ["policies.py", *flags.split()])
    policies.main()
    said = capsys.readouterr().out
    assert all(work in said for work in policies.WORK)
    assert "as fast as transformers' Llama" in said


def test_operations_are_those_of_the_products():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert policies.operations("a @ b", dict(a=a, b=b)) == 2 * 3 * 5 * 7


@policy_both
def test_gradient_checkpointing_changes_no_gradient(policy_saved, name):
    grads = []
    for on in (False, True):
        policy = policies.load_policy(policy_saved, gradient_checkpointing=on)
        seen, decision = policy_decide(policy, 3)
        sum(policy.evaluate(*seen, decision.trace)).mean().backward()
        grads.append([p.grad for p in policy.parameters() if p.grad is not None])
    for expected, found in zip(*grads, strict=True):
        policy_near(found, expected, 5e-5)


@policy_both
def test_statistics(name):
    """Narrow ranges are widened; unnormalize undoes normalize."""
    policy = policies.make_tiny(name)
    low = [-0.1, -0.2, -0.3, 0.0, -0.1, -0.1, 1.0]
    high = [
        0.2,
        0.1,
        0.3,
        0.0,
        0.1,
        0.2,
        1.0,
    ]  # one rotation and the gripper never moved
    policy.set_statistics("lab", {"action": dict(q01=low, q99=high)})
    widened = low[:3] + [-5e-4, -0.1, -0.1, 0.9995]
    assert policy.stats["action"]["q01"] == pytest.approx(widened)
    actions = policy_actions(4, 1)[:, 0]
    policy_near(policy.unnormalize(policy.normalize(actions)), actions, 5e-5)


@policy_both
@pytest.mark.parametrize("rank", [0, 4])
def test_saving_and_loading_change_nothing(policy_saved, tmp_path, name, rank):
    settings = dict(openvla=dict(temperature=0.7), pi05=dict(sampler="flow_sde"))
    policy = policies.load_policy(policy_saved, lora_rank=rank, **settings[name])
    for p in policy.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn(p.shape, generator=policy_generator(2))
    policy.save(tmp_path / "b")
    again = policies.load_policy(tmp_path / "b")
    assert policy_same(policy, again)
    assert again.settings == json.loads(json.dumps(policy.settings))
    assert again.statistics == policy.statistics
    if rank == 0:
        keys = load_file(tmp_path / "b/model.safetensors").keys()
        assert not any("value_head" in key or "lora" in key for key in keys)
        return
    again.save(tmp_path / "c")  # adapters of adapters' base, and not of each other
    assert policy_same(policy, policies.load_policy(tmp_path / "c"))
    assert not (tmp_path / "c/model.safetensors").exists(), "the base is not saved again"
    base = policies.load_policy(policy_saved)
    for p in base.parameters():
        p.data += 0.01
    base.save(policy_saved)
    with pytest.raises(ValueError, match="other weights than those the adapters were trained on"):
        policies.load_policy(tmp_path / "c")
    with pytest.raises(ValueError, match="save: got adapters on weights"):
        policy = policy_shaken(name)
        policies.add_lora(policy, 4)
        policy.save(tmp_path / "d")
    assert not (tmp_path / "d").exists()
    base.save(tmp_path / "e")
    policy = policies.load_policy(tmp_path / "e", lora_rank=rank)
    policy.save(tmp_path / "f")
    merged = policies.load_policy(tmp_path / "f", merge=True)
    merged.save(tmp_path / "g")
    assert policy_same(merged, policies.load_policy(tmp_path / "g")), "and not the base again"
    with pytest.raises(ValueError, match="merge, lora_rank: got .*--lora-rank 0"):
        policies.load_policy(tmp_path / "f", merge=True, lora_rank=rank)


@policy_both
def test_lora_merged_and_apart_agree(policy_saved, tmp_path, name):
    base = policies.load_policy(policy_saved)
    policy = policies.load_policy(policy_saved, lora_rank=4)
    seen, decision = policy_decide(base, 3)

    def logp(policy):
        return policy.evaluate(*seen, decision.trace)[0]

    start = logp(policy)
    assert torch.equal(start, logp(base)), "B starts at 0"
    for layer in policies.lora_modules(policy).values():
        layer.lora_B.weight.data.normal_(std=0.05, generator=policy_generator())
    apart = logp(policy)
    assert (apart - start).abs().max() > 1e-3
    adapter = tmp_path / "adapter"
    policies.save_lora(policy, adapter, base=f"../{name}")
    policies.merge_lora(policy)
    merged = policies.load_policy(adapter, merge=True)
    assert policy_same(policy, merged)
    policy_near(logp(merged), apart, 1e-4)
    named = policies.load_policy(policy_saved, adapter=adapter)
    policy_near(logp(named), apart, 5e-5)


@policy_both
def test_all_wrong_inputs_are_listed(policy_pair, name):
    policy = policy_pair[name]
    images, texts = policy_batch(2)
    actions = policy_actions(2, policy.horizon)
    actions[1, 0, 2] = math.nan
    with pytest.raises(ValueError) as caught:
        policy.bc_loss(images[..., :1], ["", "b"], actions)
    lines = str(caught.value).splitlines()
    topics = [line.split(":")[0] for line in lines]
    assert topics == ["images", "instructions", "actions"]
    assert all(word in line for line in lines for word in ("got", "need", "try"))


@pytest.mark.parametrize(
    "options",
    [
        dict(name="x"),
        dict(dtype="fp16"),
        dict(freeze="head"),
        dict(name="openvla", freeze="vlm"),
        dict(chunk=9),
        dict(sampler="ode"),
    ],
)
def test_refusals_of_loading(options):
    with pytest.raises(ValueError) as caught:
        policies.load_policy(**{"name": "pi05", **options})
    for word in ("got", "need", "try", *options.values()):
        assert str(word) in str(caught.value)


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_last_positions_alone_are_what_all_positions_have(name):
    """The last layer may leave out positions that nothing reads; keys and values are of all."""
    policy = policies.load_policy(name)
    decoder = policy.language_model.model if name == "openvla" else policy.language_model
    x = torch.randn(2, 9, policy.value_head[0].in_features)
    positions = torch.arange(9).expand(2, -1)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    whole, kv = decoder(x, positions, causal)
    some, some_kv = decoder(x, positions, causal, last=3)
    assert torch.allclose(some, whole[:, -3:], atol=1e-5)
    for pair, some_pair in zip(kv, some_kv):
        assert all(torch.equal(a, b) for a, b in zip(pair, some_pair))


def test_missing_cameras_do_not_matter(policy_pair):
    policy = policy_pair["pi05"]
    (_, texts), one = policy_decide(policy, 3)
    three = np.stack([policy_batch(3, seed)[0] for seed in range(3)], 1)
    mask = torch.tensor([[True, False, False]] * 3)
    mask[1:, 1] = True
    seen = dict(images=three, instructions=texts, camera_mask=mask)
    both = policy.act(**seen, generator=policy_generator())
    policy_near(both.actions[0], one.actions[0], 5e-5)
    assert (both.value - one.value).abs()[1] > 1e-5, "a second camera must matter"
    policy_near(policy.evaluate(**seen, trace=both.trace)[0], both.logp, 1e-4)


def test_foreign_tensors_load_and_wrong_tensors_are_all_listed(tmp_path):
    policy = policies.make_tiny("openvla")
    policy.save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key: value.bfloat16() for key, value in load_file(file).items()}
    save_file(dict(tensors, **{"value_head.x": torch.zeros(2)}), file)
    loaded = policies.official_tensors(policies.load_policy(tmp_path))
    assert all(torch.equal(loaded[key], tensors[key].float()) for key in tensors)
    del tensors["projector.fc1.bias"]
    tensors["projector.fc9.bias"] = torch.zeros(3)
    tensors["projector.fc2.bias"] = torch.zeros(5)
    save_file(tensors, file)
    with pytest.raises(ValueError) as caught:
        policies.load_policy(tmp_path)
    for key in ("projector.fc1.bias", "projector.fc9.bias", "projector.fc2.bias"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(images=np.zeros((2, 8)), instructions="x"), "images: got(.|\n)*instructions: got"),
        (dict(pad=np.ones((2, 2), bool)), "pad: got"),
    ],
)
def test_contract_names_everything_that_is_wrong(monkeypatch, wrong, message):
    toy = DataToy(5)
    real_data.check_demonstrations(toy)
    batch = toy.batch
    monkeypatch.setattr(toy, "batch", lambda rows: dict(batch(rows), **wrong))
    with pytest.raises(ValueError, match=message):
        real_data.check_demonstrations(toy)


def data_check_episodes(episodes, demos):
    """What was written is read again, images but for the codec's error."""
    images, states, actions, texts, _ = zip(*episodes)
    real_data.check_demonstrations(demos)
    batch = data_all(demos)
    error = np.abs(batch["images"].astype(int) - np.concatenate(images))
    assert error.mean(axis=(1, 2, 3)).max() < 12
    assert np.array_equal(batch["state"], np.concatenate(states))
    assert np.array_equal(demos.actions, np.concatenate(actions))
    assert batch["instructions"] == np.repeat(texts, [len(part) for part in actions]).tolist()


@pytest.mark.parametrize("b_frames", [(), ("-bf", "3", "-g", "9")])
def test_v21_video_and_png(tmp_path, b_frames):
    episodes = data_v21(tmp_path / "set", b_frames)
    demos = data_open(tmp_path / "set")
    assert demos.recording.cameras == ["image"]           # not the wrist
    data_check_episodes(episodes, demos)
    both = data_all(data_open(tmp_path / "set", cameras=["wrist_image", "image"]))["images"]
    images = np.concatenate([episode[0] for episode in episodes])
    assert np.array_equal(both[:, 0], 255 - images)
    assert np.array_equal(both[:, 1], data_all(demos)["images"])


def test_written_sets_are_read_again(tmp_path):
    data_check_episodes(data_write(tmp_path / "set"), data_open(tmp_path / "set"))
    table = pq.read_table(tmp_path / "set/meta/tasks.parquet")
    assert json.loads(table.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert (info["total_episodes"], info["total_frames"], info["fps"]) == (4, 27, 10)


def test_split_is_by_episode(tmp_path):
    data_write(tmp_path / "set", lengths=(3,) * 10)
    demos = data_open(tmp_path / "set")
    train, held_out = demos.split(0.2, seed=1)
    assert [len(train), len(held_out)] == [24, 6]
    assert sorted([*train.episodes, *held_out.episodes]) == list(range(10))
    assert demos.split(0) == (demos, None)
    with pytest.raises(ValueError, match="held_out: got 1 of 10 episodes"):
        demos.split(1)


def test_writer_refuses_and_leaves_nothing(tmp_path):
    good = data_episode(0, 6)
    images, states, actions, text, _ = good
    for wrong in (
        [(images[:, :15], states, actions, text, -1)],
        [good, (images[:, :8], states, actions, text, -1)],
        [(images, states, np.where(actions > 0, np.nan, actions), text, -1)],
        [(images, states, actions, "", -1)],
        [],
    ):
        with pytest.raises(ValueError, match="got .*; need .*; try"):
            real_data.write_dataset(tmp_path / "set", wrong, 10)
    assert list(tmp_path.iterdir()) == []
    data_write(tmp_path / "set")
    with pytest.raises(ValueError, match="which exists"):
        real_data.write_dataset(tmp_path / "set", [good], 10)


@pytest.mark.parametrize("key, change", [
    ("x.a", dict(info={"is_depth_map": True})),
    ("x.a", {"video.is_depth_map": True}),
    ("x.a", dict(shape=[16, 16, 1])),
    ("x.a", dict(info={"video.channels": 1})),
    ("x.a", dict(info={"video.pix_fmt": "gray16le"})),
    ("x.front_depth", {}),
    ("x.front_ir", {}),
    ("x.segmentation_front", {}),
    ("x.tactile_left", {}),
    ("x.wrist", {}),
    ("x.eye_in_hand", {}),
    ("x.ee_cam", {}),
])
def test_colour_scene_cameras_come_first(key, change):
    colour = dict(dtype="video", shape=[16, 16, 3])
    features = {key: dict(colour, **change), "x.overhead": colour}
    assert real_data.choose_cameras(features, None) == (["x.overhead"], list(features))
    assert real_data.choose_cameras(features, key.split(".")[1])[0] == [key]
    with pytest.raises(ValueError, match="need 1 to 3 of.*--camera"):
        real_data.choose_cameras(features, "no such")


def test_depth_alone_is_not_taken_unasked():
    features = {"x.depth": dict(dtype="video", shape=[16, 16, 3])}
    with pytest.raises(ValueError, match="in colour: \\[\\]"):
        real_data.choose_cameras(features, None)


DATA_ROWS = "data/chunk-000/episode_000001.parquet"
DATA_VIDEO = "videos/image/1.mp4"


def data_break_video(folder):
    """Overwrite the end of the coded images."""
    content = bytearray((folder / DATA_VIDEO).read_bytes())
    start = content.find(b"mdat") - 4
    end = start + int.from_bytes(content[start : start + 4], "big")
    content[end - 90 : end] = b"\xff" * 90
    (folder / DATA_VIDEO).write_bytes(content)


def data_cell(column, row, value):
    """Return a function that changes one cell of episode 1."""

    def change(folder):
        table = pq.read_table(folder / DATA_ROWS).to_pydict()
        table[column][row] = value
        pq.write_table(pa.table(table), folder / DATA_ROWS)

    return change


def data_file(name, text):
    """Return a function that replaces a file."""
    return lambda folder: (folder / name).write_text(text)


def data_column(column, values):
    """Return a function that sets a column of episode 1, or takes it away (None)."""

    def change(folder):
        table = pq.read_table(folder / DATA_ROWS).to_pydict()
        table[column] = values
        if values is None:
            table.pop(column)
        pq.write_table(pa.table(table), folder / DATA_ROWS)

    return change


def data_info(**entries):
    """Return a function that sets entries of info.json."""

    def change(folder):
        info = json.loads((folder / "meta/info.json").read_text())
        (folder / "meta/info.json").write_text(json.dumps(dict(info, **entries)))

    return change


EPISODES_0_1 = '{"episode_index": 0, "length": 6}\n{"episode_index": 1, "length": 9}\n'
TASK_0 = '{"task_index": 0, "task": "x"}'
POINTER = "version https://git-lfs.github.com/spec/v1"
DATA_FAULTS = {  # what happens to episode 1: the damage, the message
    "nan": (
        data_cell("actions", 2, [0.0] * 6 + [np.nan]),
        r"actions: got nan.*\(episode 1\)",
    ),
    "text": (
        data_file("meta/tasks.jsonl", TASK_0),
        r"instructions: got none.*\(episode 1, 3\)",
    ),
    "order": (data_cell("frame_index", 4, 3), r"rows: got others.*\(episode 1\)"),
    "broken": (
        data_break_video,
        r"image: got frames missing.*\(episode 1\)",
    ),
    "video pointer": (
        data_file(DATA_VIDEO, POINTER),
        r"image: got a git-lfs pointer.*git lfs pull.*\(episode 1\)",
    ),
    "rows pointer": (
        data_file(DATA_ROWS, POINTER),
        "episode_000001.*got a git-lfs pointer.*git lfs pull",
    ),
    "meta pointer": (
        data_file("meta/episodes.jsonl", POINTER),
        "episodes.jsonl: got a git-lfs pointer.*git lfs pull",
    ),
    "web page": (
        data_file("meta/info.json", "<!DOCTYPE html><html>"),
        "info.json: got a web page",
    ),
    "empty": (data_file(DATA_ROWS, ""), "episode_000001.*got an empty file"),
    "no rate": (data_info(fps=None), "info.json: fps: got None; need actions per second"),
    "no features": (data_info(features=None, fps=-1), "fps: got -1.*\n.*features: got None"),
    "other version": (data_info(codebase_version="v1.6"), "version: got v1.6; need LeRobot v2.0"),
    "no column": (
        data_column("wrist_image", None),
        r"no column \['wrist_image'\] in 1 of 4 files .*--camera NAME",
    ),
    "no image": (
        data_column("wrist_image", [{"bytes": b"no PNG", "path": ""}] * 9),
        r"wrist_image: got a cell of episode_000001.parquet that holds no image.*\(episode 1",
    ),
    "ragged": (
        data_cell("actions", 2, [0.0] * 5),
        r"actions: got rows of different sizes.*\(episode 1\)",
    ),
    "rows of no episode": (data_file("meta/episodes.jsonl", EPISODES_0_1), "12 rows that belong"),
    "category first": (
        data_file("meta/tasks.jsonl", '{"task_index": 0, "category": "a", "language": "b"}'),
        "got columns .'category', 'language'.; need task_index and task",
    ),
    "no length": (data_file("meta/episodes.jsonl", '{"episode_index": 0}'), "got episodes without"),
    "no place of videos": (data_info(video_path=None), "for the videos of image; need LeRobot's"),
    "blank text": (
        data_file("meta/tasks.jsonl", '{"task_index": 0, "task": " "}'),
        r"instructions: got none.*\(episode 0, 1, 2, 3\)",
    ),
    "times": (
        data_column("timestamp", [0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9]),
        r"times: got rows up to 0.100 s off.*--convert as-is",
    ),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_faults_are_named(tmp_path, fault):
    data_v21(tmp_path / "set")
    damage, message = DATA_FAULTS[fault]
    damage(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        data_open(tmp_path / "set", cameras=["image", "wrist_image"])
    assert list(tmp_path.glob("cache/*")) == []


def test_times_a_little_off_do_not_matter(tmp_path):
    """Pictures in the rows need no times at all; those of a video go with rows by their order."""
    data_v21(tmp_path / "set")
    late = [0.0, 0.1, 0.2, 0.34, 0.4, 0.5, 0.6, 0.7, 0.8]
    data_column("timestamp", late)(tmp_path / "set")
    data_open(tmp_path / "set", cameras="image")
    data_column("timestamp", [2 * time for time in late])(tmp_path / "set")
    data_open(tmp_path / "set", cameras="wrist_image")
    with pytest.raises(ValueError, match="times"):
        data_open(tmp_path / "set", cameras="image")


@pytest.mark.parametrize("write", [data_write, data_v21])
def test_a_video_of_another_rate_is_refused(tmp_path, write):
    """A wrong rate would give rows the pictures of other rows."""
    write(tmp_path / "set")
    data_info(fps=20)(tmp_path / "set")
    with pytest.raises(ValueError, match="got 10.0 frames a second; need 20, as in info.json"):
        data_open(tmp_path / "set", convert="as-is")


def test_files_are_read_however_they_came(tmp_path):
    """Linked folders, a byte-order mark, macOS's ._ files, a text with an unusual line end."""
    data_v21(tmp_path / "set")
    (tmp_path / "set/data").rename(tmp_path / "elsewhere")
    (tmp_path / "set/data").mkdir()
    (tmp_path / "set/data/chunk-000").symlink_to(tmp_path / "elsewhere/chunk-000")
    (tmp_path / "elsewhere/chunk-000/._episode_000000.parquet").write_bytes(b"x")
    info = tmp_path / "set/meta/info.json"
    info.write_bytes(b"\xef\xbb\xbf" + info.read_bytes())
    tasks = [dict(task_index=i, task=f"open\u2028{i}") for i in range(2)]
    lines = "\n".join(json.dumps(task, ensure_ascii=False) for task in tasks)
    (tmp_path / "set/meta/tasks.jsonl").write_text(lines, encoding="utf-8")
    demos = data_open(tmp_path / "set")
    assert set(demos.instructions) == {"open\u20280", "open\u20281"}


def test_killed_processes_leave_nothing_for_ever(tmp_path):
    """What nobody holds any more is removed; what another process still writes stays."""
    (tmp_path / "decoding-dead").mkdir()
    with real_data.temporary_folder(tmp_path, "decoding-") as first:
        with real_data.temporary_folder(tmp_path, "decoding-") as second:
            assert sorted(tmp_path.iterdir()) == sorted([first, second])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    policies.write_json(tmp_path / "a.json", dict(a=1))
    with pytest.raises(TypeError):
        policies.write_json(tmp_path / "a.json", dict(a=object()))
    with pytest.raises(OSError), policies.replacing(tmp_path / "a.json") as part:
        part.write_text("[3")
        raise OSError("No space left on device")
    assert policies.read_json(tmp_path / "a.json") == dict(a=1)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_all_faults_in_one_message(tmp_path):
    data_v21(tmp_path / "set")
    for fault in ("nan", "text"):
        DATA_FAULTS[fault][0](tmp_path / "set")
    with pytest.raises(ValueError, match="got 7 numbers; need 5") as error:
        data_open(tmp_path / "set", action_dim=5)
    for fault in ("nan", "text"):
        assert re.search(DATA_FAULTS[fault][1], str(error.value)), fault


def test_an_unreachable_hub_id_tells_the_command(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ValueError, match="hf download some/robot-data --repo-type dataset"):
        real_data.open_dataset("some/robot-data")


@pytest.mark.parametrize("column, value, message", [
    (6, 1, None),
    (0, 0.5, "moves: got 100.00% of the frames.*up to 0.5.*deltas in metres.*absolute-poses"),
    (4, np.array([0, 0, 0, 5, 0, 0]), "turns: got 16.67%.*up to 5.*radians.*degrees"),
    (6, np.array([0, 0, 0, 1, 1, 1]), "gripper: got 50.00%.*gripper-open-1.*gripper-closed-1"),
    (6, 255, "gripper: got 100.00%.*up to 255"),
])
def test_units_are_doubted(tmp_path, recwarn, column, value, message):
    """Refused with the share of frames, the largest value and a way out, unless as-is is said."""
    episode = data_episode(0, 6)
    episode[2][:, column] = value
    real_data.write_dataset(tmp_path / "set", [episode], 5)
    if message is None:
        data_open(tmp_path / "set")
    else:
        with pytest.raises(ValueError, match=message):
            data_open(tmp_path / "set")
        assert not list(tmp_path.glob("cache/*"))
        data_open(tmp_path / "set", convert="as-is")
    assert not [each for each in recwarn if each.category is UserWarning]


def test_a_glitch_is_warned_of_and_fast_recordings_move_less(tmp_path):
    episode = data_episode(0, 200)
    episode[2][50, 0] = 0.3
    real_data.write_dataset(tmp_path / "glitch", [episode], 5)
    with pytest.warns(UserWarning, match="moves: got 0.50% of the frames"):
        data_open(tmp_path / "glitch")
    episode = data_episode(0, 6)
    episode[2][:, 0] = 0.05                               # m: .25 m/s at 5 Hz, 1.5 m/s at 30 Hz
    real_data.write_dataset(tmp_path / "slow", [episode], 5)
    data_open(tmp_path / "slow")
    real_data.write_dataset(tmp_path / "fast", [episode], 30)
    with pytest.raises(ValueError, match="up to 0.0333 a step"):
        data_open(tmp_path / "fast")


def test_a_flipped_gripper_is_told_by_its_opening(tmp_path):
    images, states, actions, text, scene = data_episode(0, 24)
    actions[:, 6] = np.repeat([1, -1, 1], 8)              # opening follows, one step later
    states[:, 6] = 0.04 + 0.04 * np.roll(actions[:, 6], 1)
    real_data.write_dataset(tmp_path / "right", [(images, states, actions, text, scene)], 5)
    data_open(tmp_path / "right")
    actions[:, 6] *= -1
    real_data.write_dataset(tmp_path / "wrong", [(images, states, actions, text, scene)], 5)
    with pytest.raises(ValueError, match="commands against its opening.*gripper-flipped"):
        data_open(tmp_path / "wrong")


def test_poses_are_told_by_the_place_of_the_tool(tmp_path):
    """At 2 Hz poses within half a metre would pass for fast deltas."""
    images, states, actions, text, scene = data_episode(0, 24)
    states[:, :3] = np.linspace([0.3, -0.1, 0.1], [0.45, 0.1, 0.2], 24)       # m
    actions[:, :3] = np.roll(states[:, :3], -1, axis=0)
    real_data.write_dataset(tmp_path / "poses", [(images, states, actions, text, scene)], 2)
    with pytest.raises(ValueError, match="m from the place of the tool.*absolute-poses"):
        data_open(tmp_path / "poses")
    data_open(tmp_path / "poses", convert="as-is")
    actions[:, :3] -= states[:, :3]
    real_data.write_dataset(tmp_path / "deltas", [(images, states, actions, text, scene)], 2)
    data_open(tmp_path / "deltas")


def test_cache_is_used_again(tmp_path, monkeypatch):
    data_v21(tmp_path / "set")
    first = data_all(data_open(tmp_path / "set", 8))["images"]
    with monkeypatch.context() as patch:
        patch.setattr(real_data, "decode", lambda *args: pytest.fail("decoded again"))
        assert np.array_equal(data_all(data_open(tmp_path / "set", 8))["images"], first)
    data_mp4(tmp_path / "set" / DATA_VIDEO, data_images(7, 9))    # new content: decoded again
    changed = data_all(data_open(tmp_path / "set", 8))["images"]
    same = (changed == first).all(axis=(1, 2, 3))
    assert np.array_equal(same, np.repeat([True, False, True], [6, 9, 12]))


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    """Read all of a 300 MB file in random order: what was read must not stay in memory."""
    code = """
import sys, types, numpy as np, real_data
path = sys.argv[1] + "/frames.npy"
frames = np.lib.format.open_memmap(path, "w+", np.uint8, (2000, 1, 224, 224, 3))
del frames
recording = types.SimpleNamespace(
    fps=5, owner=np.zeros(2000, int), rows=np.arange(2000), actions=np.zeros((2000, 7)),
    states=np.zeros((2000, 8)), instructions=np.full(2000, "x"))
sampler = real_data.MixSampler(None, real_data.Demos(recording, path, 8), 0, 32)
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = peak()
for _ in range(100):
    next(sampler)
print(peak() - before)
"""
    command = [sys.executable, "-c", code, tmp_path]
    environment = dict(os.environ, PYTHONPATH=str(HERE))
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(out.stdout) < 60                         # MB


def check_data_record():
    """Successes only, with labels instead of executed actions, in the order of the episodes."""
    stub = types.ModuleType("envs")
    exec(DATA_STUB, vars(stub))
    with unittest.mock.patch.dict(sys.modules, envs=stub):
        recorded = real_data.record("open-drawer", "real", 0, 8, 8, 3)
    assert [row[4] for row in recorded] == [4, 5, 7, 8, 10]
    for images, states, actions, text, episode in recorded:
        assert len(images) == len(states) == len(actions) == 2 + episode % 4
        assert (actions == [0, 1, episode, 0, 0, 0, 0]).all()
        assert states[:, 1].tolist() == list(range(len(states)))
        assert (images[:, 0, 0, 0] == (episode * 7 + 31 * np.arange(len(images))) % 200).all()


def test_recording_keeps_successes_and_labels():
    check_data_record()


@pytest.mark.slow
def test_demonstrations_do_not_depend_on_the_workers(tmp_path, data_stub):
    written = []
    for workers in (1, 3):
        out = tmp_path / f"w{workers}"
        real_data.make_demos("all", "real", 7, out, workers=workers, image_size=8)
        files = sorted(path for path in out.rglob("*") if path.is_file())
        written.append([path.read_bytes() for path in files])
    assert written[0] == written[1]
    table = pq.read_table(out / "meta/episodes/chunk-000/file-000.parquet")
    assert table["scene"].to_pylist() == [1, 2, 4, 5, 7, 8, 10] * 2


def check_evaluate_episodes():
    """Each episode counts once, even if the environment then resets itself; the others go on."""
    episodes, toy = evaluate_toy(4, EvaluateStub(value=1.0))
    assert [episode["success"] for episode in episodes] == [True, False, True, False]
    moved = [(actions != 0).all((1, 2)).tolist() for actions in toy.actions]
    assert moved == [
        [True, True, True, True],
        [False, True, True, False],
        [False, False, True, False],
    ]
    stub = EvaluateStub()
    episodes, _ = evaluate_toy(11, stub)
    for k, episode in enumerate(episodes):
        assert episode["episode"] == k
        assert episode["steps"] == k % 3 + 1
        assert episode["instruction"] == f"episode {k}"
    asked = [len(call.images) for call in stub.calls]
    assert asked == [4, 2, 1, 4, 3, 1, 3, 2, 1]         # 4, 4 and 3 episodes of 1 to 3 steps


def check_evaluate_noise():
    """Each block has a generator of its own, from (seed, block)."""
    stub = EvaluateStub()
    evaluate_toy(8, stub, seed=5)
    starts = [call.noise for call in stub.calls if len(call.images) == 4]
    assert len(starts) == 2
    for block, noise in enumerate(starts):
        seed = np.random.SeedSequence([5, block]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        assert torch.equal(noise, torch.rand(4, 1, 1, generator=generator))


@pytest.mark.parametrize("check", [check_evaluate_episodes, check_evaluate_noise])
def test_evaluate_contract(check):
    check()


def test_evaluate_blocks_run_in_any_order():
    env = envs.make_env("open-drawer", "real", 2, image_size=16, auto_reset=False)

    def play(blocks):
        stub = EvaluateStub(chunk=4, value=0.02)
        options = dict(blocks=blocks, env=env, frames=9)
        episodes = evaluate.run_episodes(stub, "open-drawer", "real", 3, **options)
        return [dict(episode, frames=np.sum(episode["frames"])) for episode in episodes]

    first = play([0])
    last = play([1])
    assert play([1, 0]) == last + first
    assert play(None) == first + last
    assert len({episode["frames"] for episode in first + last}) == 3


@pytest.mark.parametrize("task, domain", [("open-drawer", "sim"), ("push-cube", "real")])
def test_evaluate_expert_succeeds_as_in_run_expert(task, domain):
    """A policy that asks the scripted expert succeeds in the same steps as envs.run_expert."""
    env = envs.make_env(task, domain, 3, 5, 16, auto_reset=False)
    expert = envs.Expert(env)
    stub = EvaluateStub()

    def act(images, *_, **__):
        executed, _ = expert.act()
        rows = []
        for image in images:
            same = (env.images == image).all((1, 2, 3))
            rows.append(np.flatnonzero(same)[0])
        return types.SimpleNamespace(actions=torch.as_tensor(executed[rows, None]))

    stub.act = act
    episodes = evaluate.run_episodes(stub, task, domain, 6, env=env)
    success, length = envs.run_expert(envs.make_env(task, domain, 6, 5, 0), 6)
    assert [episode["success"] for episode in episodes] == success.tolist()
    assert [episode["steps"] for episode in episodes] == length.tolist()
    assert success.sum() >= 5


def test_evaluate_decoding_state_and_ablations_reach_the_policy():
    stub = EvaluateStub(reads_state=True)
    evaluate_toy(2, stub, decoding="greedy")
    assert stub.calls[0].decoding == "greedy"
    assert stub.calls[0].state.shape == (2, 8)
    stub = EvaluateStub()
    evaluate_toy(2, stub, ablation="shuffled-instruction")
    assert stub.calls[0].state is None
    assert stub.calls[0].instructions == ["wrong", "wrong"]
    stub = EvaluateStub()
    evaluate_toy(3, stub, ablation="blank-image")
    assert all((call.images == 128).all() for call in stub.calls)


def test_evaluate_success_rates_of_two_ranks_are_those_of_one(monkeypatch, capsys):
    monkeypatch.setattr(envs, "make_env", lambda *_, **__: EvaluateToy())
    monkeypatch.setattr(evaluate, "BLOCK", EvaluateToy.num_envs)
    settings = (EvaluateStub(), ["push-cube"], ["real"], 14)
    alone = evaluate.success_rates(*settings)
    assert "50.0%   n 14, 95 % interval 26.8% - 73.2%" in capsys.readouterr().out
    assert list(alone) == ["stand-in/push-cube"]
    shares = []

    def gather(parts, own):
        shares.append(own)
        parts[:] = [own, shares[0]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    evaluate.success_rates(*settings, rank=0, world=2)
    capsys.readouterr()
    assert evaluate.success_rates(*settings, rank=1, world=2) == alone
    assert [len(share) for share in shares] == [8, 6]
    assert not capsys.readouterr().out                  # rank 0 alone prints


def test_evaluate_errors_list_all_offenders():
    with pytest.raises(ValueError, match="blocks: .*\ndecoding: .*\nablation: "):
        evaluate_toy(4, EvaluateStub(), blocks=[2], decoding="x", ablation="y")
    with pytest.raises(ValueError, match="need the same scenes"):
        evaluate.compare(evaluate_outcomes("11"), evaluate_outcomes("111"))


def test_evaluate_scenes_are_those_of_the_environment():
    stub = EvaluateStub(chunk=40)
    options = dict(variant="unseen-objects")
    evaluate.run_episodes(stub, "push-cube", "real", 27, blocks=[1], **options)
    seed = evaluate.EVAL_SEED
    env = envs.make_env("push-cube", "real", 2, seed, 16, first_episode=25, **options)
    obs = env.reset()
    assert np.array_equal(stub.calls[0].images, obs["images"])
    assert stub.calls[0].instructions == list(obs["instructions"])


def test_own_policy_environment_and_data_pass_the_checks_and_train():
    """60 lines of policy, 50 of environment, 20 of data: nothing else is needed for Stage II."""
    policy = StagePolicy()
    data = StageData()
    policies.check_policy(policy)
    envs.check_env(StageEnv())
    real_data.check_demonstrations(data)
    out = pathlib.Path(tempfile.mkdtemp()) / "run"
    args = stage_args(out, num_envs=16, critic="head")
    real = real_data.MixSampler(None, data, 0.0, args.real_batch)
    before = copy.deepcopy(policy.state_dict())
    assert rl_cotrain.co_train(policy, StageEnv(), real, args, held_out=data)
    assert all(not torch.equal(before[name], p) for name, p in policy.state_dict().items())
    assert {"ppo", "real", "cosine", "success", "kl"} <= stage_metrics(out)[-1].keys()


@pytest.mark.slow
def test_grpo_is_another_advantage(monkeypatch):
    """The recipe of README.md climbs on the toy, too."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    [recipe] = [block for block in blocks if "def advantages(" in block]
    space = {}
    exec(recipe, space)
    monkeypatch.setattr(rl_cotrain, "advantages", space["advantages"])
    check_stage_climbs()


def test_a_fifth_task_trains_with_the_state_critic(tmp_path):
    """One class and one registration: demonstrator, rollout and critic need nothing else."""
    envs.register(TouchCube())
    try:
        [demonstration] = real_data.record("touch-cube", "sim", 0, 64, 1, 0)
        assert demonstration[3] == "touch the cube"
        env = envs.make_env("touch-cube", num_envs=4)
        assert env.privileged_size == 11 + 5
        args = stage_args(tmp_path / "run", lambda_real=0, horizon=4, iterations=2)
        assert rl_cotrain.co_train(policies.make_tiny("openvla"), env, None, args)
    finally:
        envs.TASKS.pop("touch-cube")
    assert all("explained" in row for row in stage_metrics(tmp_path / "run"))


def test_an_environment_without_privileged_state_needs_the_value_head():
    env = StageEnv()
    env.privileged_size = 0
    args = stage_args(pathlib.Path(tempfile.mkdtemp()) / "run", num_envs=16, lambda_real=0.0)
    with pytest.raises(ValueError, match="--critic state: got .*try --critic head"):
        rl_cotrain.co_train(StagePolicy(), env, None, args)


def test_frozen_vision_features_are_computed_once(monkeypatch):
    policy = policies.make_tiny("openvla")
    policies.prepare(policy, "vision")
    seen = []
    encode = policy.encode_images

    def counted(images):
        seen.append(len(images))
        return encode(images)

    monkeypatch.setattr(policy, "encode_images", counted)
    args = types.SimpleNamespace(horizon=2, seed=0)
    rollout, _ = rl_cotrain.collect(policy, StageEnv(), None, args, 0)
    assert rollout.inputs["images"].shape == (32, *policy.feature_shape)
    assert (
        sum(seen) == 16 * 2 + 16 + 8
    ), "decisions, what follows the last one, final observations"


def test_central_crop_is_left_out_where_random_crops_are_trained(monkeypatch):
    policy = policies.make_tiny("openvla", center_crop=True)
    cuts = []
    crop = policies.center_crop_90
    monkeypatch.setattr(policies, "center_crop_90", lambda *args: cuts.append(1) or crop(*args))
    batch = stage_batch(policy, [0, 0, 0])
    for loss, _ in sft_warmstart.supervised_losses(policy, batch, stage_plain(augment="openvla")):
        assert not cuts
    assert not policy.training
    list(sft_warmstart.supervised_losses(policy, batch, stage_plain()))
    policy.encode_images(batch["images"])
    assert len(cuts) == 2


def test_weight_decay_spares_biases_and_norms():
    policy = policies.make_tiny("openvla")
    args = types.SimpleNamespace(weight_decay=0.01, lr=1e-3, value_lr=1e-2)
    names = {id(p): name for name, p in policy.named_parameters()}
    for group in rl_cotrain.optimizer_groups(policy, args):
        for p in group["params"]:
            assert group["weight_decay"] == (0.01 if p.ndim > 1 else 0.0)
            assert group["lr"] == (1e-2 if names.pop(id(p)).startswith("value_head.") else 1e-3)
    assert not names


def test_pretrain_landmarks_are_where_mujoco_draws_them():
    env = envs.make_env("all", "pretrain", num_envs=6)
    env.reset()
    for i, marks in enumerate(pretrain.landmarks(env)):
        scene = env.scenes[env.task[i]]
        model = scene.models[i]
        data = scene.batch.get_data(i, scene.data)
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        axes = data.cam_xmat[0].reshape(3, 3)  # columns: right, up, back
        right, up, back = ((marks[:, :3] - data.cam_xpos[0]) @ axes).T
        half = -back * np.tan(np.radians(model.cam_fovy[0]) / 2)
        assert marks[:, 3] == pytest.approx(right / half, abs=1e-4)
        assert marks[:, 4] == pytest.approx(-up / half, abs=1e-4)


def test_pretrain_records_scenes_with_their_labels():
    recorded = pretrain.record("first", 5, 64, range(32, 34))  # the second block: push-cube
    env = envs.make_env("push-cube", "pretrain", 2, 505, first_episode=32)
    obs = env.reset()
    for i, (images, states, _, text, _) in enumerate(recorded):
        assert np.array_equal(images[0], obs["images"][i])
        np.testing.assert_allclose(states[0, 8:], pretrain.landmarks(env)[i].flatten())
        assert text == obs["instructions"][i]
    for _, states, _, _, _ in pretrain.record("whole", 5, 64, range(3)):
        np.testing.assert_allclose(states[:, 8:11], states[:, :3])  # the tool, at every step


# ---- what people have: checkpoints and interruptions -------------------------------------------


LIMIT = [0.04] * 3 + [0.2] * 3 + [1.0]        # of actions, as statistics


def fault_copy(tmp_path, name, target="policy"):
    """Return a copy of a bundled checkpoint as OpenVLA or openpi would have written it."""
    folder = tmp_path / target
    shutil.copytree(policies.BUNDLED[name], folder)
    for file in ("policy.json", "heads.safetensors", *folder.glob("policy_p*")):
        (folder / file).unlink()
    if name == "pi05":
        shutil.rmtree(folder / "panda")
        content = json.loads((folder / "config.json").read_text())
        for theirs, ours in policies.LEROBOT_NAMES.items():
            content[ours] = content.pop(theirs)
        openpi = ("type", "vision", "vlm", "expert", "vocab_size", *policies.LEROBOT_NAMES.values())
        content = {key: value for key, value in content.items() if key in openpi}
        (folder / "config.json").write_text(json.dumps(content))
    return folder


def fault_json(path, **changed):
    """Change fields of a JSON file; a dot goes into the field."""
    content = json.loads(path.read_text()) if path.exists() else {}
    for name, value in changed.items():
        *outer, last = name.split(".")
        inner = content
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    path.write_text(json.dumps(content))


def fault_range(size=7, high=0.5):
    return dict(q01=[-high] * size, q99=[high] * size)


def fault_named(folder, *words, **options):
    """Loading is refused by a message of the usual form with all these words."""
    with pytest.raises(ValueError) as caught:
        policies.load_policy(folder, **options)
    message = str(caught.value)
    for word in (*words, "got ", "; need ", "; try "):
        assert word in message, message
    return message


def fault_adapter(tmp_path, name="openvla"):
    """Return the folder of adapters (B is not 0) for a bundled checkpoint, as PEFT writes it."""
    policy = policies.load_policy(name, lora_rank=2)
    for layer in policies.lora_modules(policy).values():
        layer.lora_B.weight.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "adapter"
    policies.save_lora(policy, folder, base=str(policies.BUNDLED[name]))
    return folder


def fault_tensors(file, changed):
    """Add tensors to a file of safetensors."""
    save_file({**load_file(file), **changed}, file)


def fault_lerobot(tmp_path, state=8, **config):
    """Return the bundled pi0.5 as LeRobot would have saved it."""
    folder = fault_copy(tmp_path, "pi05")
    shutil.rmtree(folder / "assets")
    content = json.loads((folder / "config.json").read_text())
    content["max_action_dim"] = content.pop("action_dim")
    content["chunk_size"] = content.pop("action_horizon")
    content["tokenizer_max_length"] = content.pop("max_token_len")
    (folder / "config.json").write_text(json.dumps(content))
    modes = dict(ACTION="QUANTILES", STATE="QUANTILES", VISUAL="IDENTITY")
    features = {"observation.images.front": dict(type="VISUAL", shape=[3, 224, 224])}
    fault_json(
        folder / "config.json",
        paligemma_variant="gemma_2b",
        action_expert_variant="gemma_300m",
        n_action_steps=6,
        num_inference_steps=5,
        max_state_dim=32,
        empty_cameras=0,
        image_resolution=[64, 64],
        use_relative_actions=False,
        rtc_config=None,
        normalization_mapping=modes,
        input_features=features,
        output_features=dict(action=dict(type="ACTION", shape=[7])),
    )
    fault_json(folder / "config.json", **config)
    steps = [
        ("rename_observations_processor", dict(rename_map={})),
        ("to_batch_processor", {}),
        ("relative_actions_processor", dict(enabled=False, exclude_joints=[])),
        ("normalizer_processor", dict(eps=1e-8, features={}, norm_map=modes)),
        (policies.STATE_STEP, {}),
        ("tokenizer_processor", dict(max_length=200, padding_side="right")),
        ("device_processor", dict(device="cpu", float_dtype=None)),
    ]
    steps = [dict(registry_name=name, config=options) for name, options in steps]
    fault_json(folder / "policy_preprocessor.json", steps=steps)
    steps = [dict(registry_name="unnormalizer_processor", config=dict(norm_map=modes))]
    fault_json(folder / "policy_postprocessor.json", steps=steps)
    high = torch.tensor(LIMIT)
    wide = torch.ones(state)
    stats = {"action.q01": -high, "action.q99": high}
    stats |= {"observation.state.q01": -wide, "observation.state.q99": wide}
    for name in ("preprocessor_step_3_normalizer", "postprocessor_step_0_unnormalizer"):
        save_file(stats, folder / f"policy_{name}_processor.safetensors")
    return folder


def fault_seen(size=64):
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    return images, ["open the drawer", "pick up the carrot"]


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_an_adapter_brings_its_own_files(tmp_path, name):
    """Statistics, tokenizer, settings and heads of the adapter's folder count before the base's."""
    folder = fault_adapter(tmp_path, name)
    own = fault_range()
    if name == "openvla":
        policies.write_json(folder / "dataset_statistics.json", dict(lab=dict(action=own)))
    else:
        stats = dict(norm_stats=dict(actions=own))
        policies.write_json(folder / "assets/lab/norm_stats.json", stats)
    setting = dict(openvla=dict(temperature=0.7), pi05=dict(steps=3))[name]
    policies.write_json(folder / "policy.json", dict(settings=setting))
    shutil.copy(policies.BUNDLED[name] / "tokenizer.json", folder)
    heads = load_file(policies.BUNDLED[name] / "heads.safetensors")
    heads = {key: value.float() + 1 for key, value in heads.items()}
    save_file(heads, folder / "heads.safetensors")
    policy = policies.load_policy(folder)
    assert policy.stats["action"]["q99"] == own["q99"]
    assert setting.items() <= policy.settings.items()
    state = policy.state_dict()
    assert all(torch.equal(state[key], heads[key]) for key in heads)
    notes = "\n".join(policy.notes)
    for words in ("statistics: lab, ", f"tokenizer: {folder}", f"adapter: {folder} on the base"):
        assert words in notes
    policy.save(tmp_path / "saved")
    again = policies.load_policy(tmp_path / "saved")
    assert again.statistics == policy.statistics
    assert again.settings == json.loads(json.dumps(policy.settings))


PEFT_FAULTS = [
    dict(use_dora=True),
    dict(use_rslora=True),
    dict(alpha_pattern={"q_proj": 4}),
    dict(bias="lora_only"),
    dict(modules_to_save=["lm_head"]),
    dict(lora_bias=True),
    dict(init_lora_weights="pissa_niter_16"),
    dict(init_lora_weights="loftq"),
    dict(trainable_token_indices=[1]),
    dict(peft_type="IA3"),
    dict(fan_in_fan_out=True),
    dict(layer_replication=[[0, 2]]),
    dict(a_field_of_tomorrow="on"),
]


def test_peft_that_is_not_plain_lora_is_refused_by_name(tmp_path):
    folder = fault_adapter(tmp_path)
    plain = (folder / "adapter_config.json").read_text()
    for fault in PEFT_FAULTS:
        (folder / "adapter_config.json").write_text(plain)
        fault_json(folder / "adapter_config.json", **fault)
        fault_named(folder, *fault)
    (folder / "adapter_config.json").write_text(plain)
    layer = "base_model.model.language_model.lm_head"
    strange = {
        f"{layer}.lora_magnitude_vector": torch.ones(3),
        f"{layer}.modules_to_save.weight": torch.ones(3),
        f"{layer}.lora_B.bias": torch.ones(3),
        f"{layer}.base_layer.weight": torch.ones(579, 128),
        "base_model.model.nowhere.lora_A.weight": torch.ones(2, 3),
    }
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, value in strange.items():
        save_file({**tensors, key: value}, file)
        fault_named(folder, key)
    del tensors[f"{layer}.lora_B.weight"]
    save_file(tensors, file)
    fault_named(folder, f"{layer}.lora_B.weight")
    file.rename(folder / "adapter_model.bin")
    fault_named(folder, "no ['adapter_model.safetensors']", "adapter_model.bin", "safetensors")


def test_the_base_of_an_adapter_can_be_given(tmp_path):
    folder = fault_adapter(tmp_path)
    for moved in ("/moved/away", None):
        fault_json(folder / "adapter_config.json", base_model_name_or_path=moved)
        fault_named(folder, str(moved), "--load base=PATH")
    fault_json(folder / "adapter_config.json", lora_alpha=None)
    fault_named(folder, "lora_alpha None", base="openvla")
    fault_json(folder / "adapter_config.json", lora_alpha=2)
    options = policies.parse_load([f"base={policies.BUNDLED['openvla']}"])
    assert policies.lora_modules(policies.load_policy(folder, **options))
    fault_named("openvla", "base: got", base="pi05")
    policy = policies.load_policy(folder, **options)
    notes = policies.load_policy(REFERENCE / "openvla_a").notes
    assert any("--load adapter=PATH" in note for note in notes), "one lies in its folder"
    shutil.copy(policies.BUNDLED["openvla"] / "model.safetensors", folder)
    fault_named(folder, "adapter_config.json", "model.safetensors")


def test_files_that_nothing_reads_are_refused_by_name(tmp_path):
    folder = fault_copy(tmp_path, "openvla")
    for name in ("optimizer.pt", "scheduler.bin", "rng_state_0.pth", "training_args.bin"):
        (folder / name).write_bytes(b"x")
    (folder / "resume.pt").write_bytes(b"x")
    policies.load_policy(folder)
    for name in (
        "action_head--5000_checkpoint.pt",
        "proprio_projector--5000_checkpoint.pt",
        "noisy_action_projector--5000_checkpoint.pt",
        "vision_backbone--5000_checkpoint.pt",
        "action_head.pt",
    ):
        (folder / name).write_bytes(b"x")
        fault_named(folder, name, "OpenVLA-OFT", "not tokens")
        (folder / name).unlink()
    for name in (
        "value.pt",
        "pytorch_model.bin",
        "flax_model.msgpack",
        "more.pth",
        "adapter_model.safetensors",
        "norm_stats.json",
    ):
        (folder / name).write_bytes(b"x")
    unread = fault_named(folder, "value.pt", "norm_stats.json", "move away")
    assert "more.pth" in unread and "msgpack" in unread and "pytorch_model.bin" in unread
    assert "optimizer" not in unread


def test_tensors_of_other_models_are_refused_by_name(tmp_path):
    for name, foreign in (
        ("openvla", ("action_head.fc1.weight", "proprio_projector.fc1.bias")),
        ("pi05", ("state_proj.weight", "model.action_time_mlp_in.weight")),
    ):
        folder = fault_copy(tmp_path, name, name)
        fault_tensors(folder / "model.safetensors", {key: torch.zeros(2) for key in foreign})
        for key in foreign:
            fault_named(folder, key.removeprefix("model."))
        key = next(iter(load_file(policies.BUNDLED[name] / "model.safetensors")))
        fault_tensors(folder / "model.safetensors", {key: torch.zeros(2, dtype=torch.int8)})
        fault_named(folder, "integers")


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_heads_are_taken_or_said_to_start_anew(tmp_path, name):
    folder = fault_copy(tmp_path, name)
    notes = policies.load_policy(folder).notes
    assert any("value_head: starts anew, because the checkpoint has none" in x for x in notes)
    file = folder / "model.safetensors"
    heads = load_file(policies.BUNDLED[name] / "heads.safetensors")
    plain = load_file(file)
    save_file({**plain, **heads}, file)
    policy = policies.load_policy(folder)
    assert not any("anew" in note for note in policy.notes)
    state = policy.state_dict()
    assert all(torch.equal(state[key], heads[key].float()) for key in heads)
    save_file({**plain, "value_head.head_l1.weight": torch.zeros(3, 3)}, file)
    assert any("value_head: starts anew" in x for x in policies.load_policy(folder).notes)


def test_shards_are_those_of_the_index(tmp_path):
    folder = fault_copy(tmp_path, "openvla")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for part in range(2):
        name = f"model-0000{part + 1}-of-00002.safetensors"
        shard = {key: tensors[key] for key in sorted(tensors)[part::2]}
        save_file(shard, folder / name)
        index |= dict.fromkeys(shard, name)
    policies.write_json(folder / "model.safetensors.index.json", dict(weight_map=index))
    policies.load_policy(folder)
    save_file(tensors, folder / "stray.safetensors")
    fault_named(folder, "stray.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    fault_named(folder, "stray.safetensors", "each tensor once")
    (folder / "stray.safetensors").unlink()
    policies.write_json(folder / "model.safetensors.index.json", dict(weight_map=index))
    (folder / name).unlink()
    fault_named(folder, name)


POINTER_FILE = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("content, words", [
    (POINTER_FILE, "a git-lfs pointer; .*git lfs pull"),
    (b"", "an empty file"),
    (b"\n<!DOCTYPE html><html>", "an HTML page"),
    (b'{"a": [1, 2', "to download it again"),
    (None, "no such file"),
])
def test_files_that_are_not_what_they_seem(tmp_path, content, words):
    """One message: which file, what it is, what to do."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "dataset_statistics.json")
    for name in names if content is not None else names[:1]:
        folder = fault_copy(tmp_path, "openvla", name)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: got .*{words}"):
            policies.load_policy(folder)


def test_fields_of_openvla_that_are_not_honoured_are_refused_together(tmp_path):
    folder = fault_copy(tmp_path, "openvla")
    wrong = {
        "n_action_bins": 128,
        "image_resize_strategy": "letterbox",
        "use_fused_vision_backbone": False,
        "image_sizes": [64, 32],
        "timm_model_ids": ["vit_base", "vit_so400m_patch14_siglip_224"],
        "arch_specifier": "linear",
        "llm_backbone_id": "vicuna-v15-7b",
        "quantization_config": dict(bits=4),
        "use_proprio": True,
        "text_config.rope_scaling": dict(type="linear", factor=2),
        "text_config.rope_parameters": dict(rope_type="yarn", rope_theta=1e4),
        "text_config.num_key_value_heads": 2,
        "text_config.head_dim": 16,
        "text_config.hidden_act": "gelu",
        "text_config.attention_bias": True,
        "text_config.tie_word_embeddings": True,
        "text_config.eos_token_id": 7,
    }
    right = (folder / "config.json").read_text()
    fault_json(folder / "config.json", **wrong)
    fault_json(folder / "preprocessor_config.json", tvf_do_letterbox=True, means=[[0.5] * 3] * 2)
    wrong["text_config.rope_parameters.rope_type"] = wrong.pop("text_config.rope_parameters")
    message = fault_named(folder, *wrong, "tvf_do_letterbox", "means")
    assert len(message.splitlines()) == len(wrong) + 2
    (folder / "config.json").write_text(right)
    shutil.copy(policies.BUNDLED["openvla"] / "preprocessor_config.json", folder)
    for wrong in (dict(image_sizes=64), dict(text_config="llama"), dict(pad_to_multiple_of=None)):
        (folder / "config.json").write_text(right)
        fault_json(folder / "config.json", **wrong)
        fault_named(folder, "config.json")
    (folder / "config.json").write_text(right)
    theta = dict(rope_type="default", rope_theta=500.0)
    fault_json(folder / "config.json", **{"text_config.rope_parameters": theta})
    assert policies.load_policy(folder).language_model.model.theta == 500


PI05_FAULTS = [
    dict(paligemma_variant="gemma_300m"),
    dict(action_expert_variant="gemma_2b"),
    dict(pi05=False),
    dict(type="pi0"),
    dict(n_obs_steps=2),
    dict(use_relative_actions=True),
    dict(rtc_config=dict(enabled=True)),
    dict(image_resolution=[224, 224]),
    dict(max_period=2.0),
    dict(time_sampling_beta_alpha=1.0),
    dict(output_features=dict(action=dict(type="ACTION", shape=[14]))),
    {"normalization_mapping.ACTION": "MEAN_STD"},
    {"normalization_mapping.STATE": "MEAN_STD"},
    {"normalization_mapping.VISUAL": "MEAN_STD"},
]


def test_fields_of_pi05_that_are_not_honoured_are_refused_by_name(tmp_path):
    folder = fault_lerobot(tmp_path)
    right = (folder / "config.json").read_text()
    for fault in PI05_FAULTS:
        (folder / "config.json").write_text(right)
        fault_json(folder / "config.json", **fault)
        name = next(iter(fault))
        fault_named(folder, dict(output_features="output_features.action.shape").get(name, name))
    fault_json(folder / "config.json", **{"normalization_mapping.VISUAL": "IDENTITY"})
    policies.load_policy(folder, discrete_state=False)  # the mode of the state does not matter


STEP_FAULTS = [
    ("delta_action_processor", {}),
    ("relative_actions_processor", dict(enabled=True)),
    ("normalizer_processor", dict(norm_map=dict(ACTION="MIN_MAX"))),
    ("normalizer_processor", dict(norm_map=dict(STATE="IDENTITY"))),
    ("tokenizer_processor", dict(max_length=48)),
    ("tokenizer_processor", dict(padding_side="left")),
]


def test_steps_of_lerobot_that_are_not_done_are_refused_by_name(tmp_path):
    folder = fault_lerobot(tmp_path)
    for file in ("policy_preprocessor.json", "policy_postprocessor.json"):
        right = (folder / file).read_text()
        steps = json.loads(right)["steps"]
        for name, config in STEP_FAULTS:
            step = dict(registry_name=name, config=config)
            fault_json(folder / file, steps=[*steps, step])
            fault_named(folder, file, name)
        (folder / file).write_text(right)


def test_lerobot_is_honoured(tmp_path, monkeypatch):
    """State in the prompt, in its statistics; executed actions, steps, epsilons; as in facts."""
    folder = fault_lerobot(tmp_path, state=7)
    arrays = np.load(REFERENCE / "pi05_preproc/preproc.npz")
    for file in folder.glob("policy_p*.safetensors"):
        stats = {f"observation.state.{key}": torch.tensor(arrays[key]) for key in ("q01", "q99")}
        fault_tensors(file, stats)
    policy = policies.load_policy(folder)
    assert policy.reads_state
    assert (policy.chunk, policy.steps, policy.settings["style"]) == (6, 5, "lerobot")
    notes = "\n".join(policy.notes)
    assert "with the numbers of the state" in notes and "6 of 8 are executed" in notes
    assert "observation.images.front" in notes
    with_state = json.loads((REFERENCE / "pi05_preproc/prompts.json").read_text())["with_state"]
    edges = np.linspace(-1, 1, 257)[:-1]
    bins = np.digitize(arrays["lerobot_state_norm"], edges) - 1  # openpi's but for dimension 5
    assert (np.delete(bins == arrays["state_bins"], 5, axis=1)).all()
    expected = []
    for row, numbers in zip(with_state, bins):
        numbers = " ".join(str(number) for number in numbers)
        expected.append(re.sub("State: .*;", f"State: {numbers};", row["prompt"]))
    calls = []
    encode = policy.encode
    monkeypatch.setattr(policy, "encode", lambda text: calls.append(text) or encode(text))
    policy.prompt([row["task"] for row in with_state], arrays["state"])
    assert calls == expected
    policy.save(tmp_path / "saved")
    again = policies.load_policy(tmp_path / "saved")
    assert again.settings == json.loads(json.dumps(policy.settings))
    assert again.statistics == policy.statistics
    options = policies.parse_load(["discrete_state=false", "chunk=4", "steps=4"])
    policy = policies.load_policy(folder, **options)
    assert not policy.reads_state and policy.chunk == policy.steps == 4
    file = folder / "policy_preprocessor.json"
    steps = json.loads(file.read_text())["steps"]
    new_line = dict(registry_name="pi0_new_line_processor", config={})
    steps = [new_line if step["registry_name"] == policies.STATE_STEP else step for step in steps]
    fault_json(file, steps=steps)
    assert not policies.load_policy(folder).reads_state, "its processor says so"
    file = next(folder.glob("policy_postprocessor*.safetensors"))
    fault_tensors(file, {"action.q99": torch.ones(7)})
    fault_named(folder, file.name, "two different action.q99")


def test_openpi_says_whether_the_state_is_read(tmp_path):
    folder = fault_copy(tmp_path, "pi05")
    assert not policies.load_policy(folder).reads_state
    fault_json(folder / "config.json", discrete_state_input=True)
    assert policies.load_policy(folder).reads_state


def test_a_state_of_another_size_is_refused():
    policy = policies.load_policy("pi05", discrete_state=True)
    images, texts = fault_seen()
    state = torch.rand(2, 8)
    state[:, 7] = 0
    bins = {}
    for size in (7, 8, 32):
        high = [1.0] * min(size, 8) + [0.0] * (size - 8)  # openpi pads with zeros
        stats = dict(q01=[-value for value in high], q99=high)
        policy.statistics = dict(lab=dict(policy.statistics.get("panda", {}), state=stats))
        bins[size] = policy.state_bins(state)
    assert torch.equal(bins[7], bins[8][:, :7]) and torch.equal(bins[32], bins[8])
    policy.statistics["lab"]["state"] = fault_range(14)
    with pytest.raises(ValueError, match="got 8 numbers; need 14.*--load discrete_state=false"):
        policy.act(images, texts, state)


STATISTICS_FAULTS = [
    (fault_range(14), "14 numbers"),
    (fault_range(8), "8 numbers"),
    (fault_range(32), "32 numbers"),
    (fault_range(6), "6 numbers"),
    (dict(q01=[0.5] * 7, q99=[-0.5] * 7), "q01 above q99"),
    (dict(q01=[float("nan")] * 7, q99=[1.0] * 7), "not finite"),
    (dict(mean=[0.0] * 7, std=[1.0] * 7), "no q01 and q99"),
    (dict(q01=[0.0] * 7, q99=[1.0] * 8), "equally many numbers"),
    (dict(fault_range(), mask=[True]), "the mask [True]"),
    (dict(fault_range(), mask=1), "the mask 1"),
]


def fault_statistics(folder, name, **actions):
    """Write statistics of the data sets, data set -> those of actions, as the official ones are."""
    if name == "openvla":
        stats = {key: dict(action=value) for key, value in actions.items()}
        fault_json(folder / "config.json", norm_stats=stats)
        (folder / "dataset_statistics.json").unlink(missing_ok=True)
        return
    shutil.rmtree(folder / "assets")
    for key, value in actions.items():
        stats = dict(norm_stats=dict(actions=value))
        policies.write_json(folder / f"assets/{key}/norm_stats.json", stats)


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_statistics_that_do_not_fit_are_refused_at_load(tmp_path, name):
    folder = fault_copy(tmp_path, name)
    for fault, words in STATISTICS_FAULTS:
        fault_statistics(folder, name, arms=fault)
        fault_named(folder, "arms", words, "7 end-effector deltas", "--load unnorm_key=")
    assert not policies.load_policy(folder, unnorm_key="none").statistics
    fault_named(folder, "unnorm_key: got elsewhere", "'arms'", unnorm_key="elsewhere")


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_one_of_several_data_sets_is_chosen(tmp_path, name):
    """Without a choice, loading works, for training with other statistics; acting does not."""
    folder = fault_copy(tmp_path, name)
    fault_statistics(folder, name, arms=fault_range(14), hand=fault_range())
    fault_named(folder, "statistics arms", "14 numbers", "hand", unnorm_key="arms")
    policy = policies.load_policy(folder, unnorm_key="hand")
    assert policy.act(*fault_seen()).actions.shape[2] == 7
    policy = policies.load_policy(folder)
    assert not policy.has_statistics() and "none chosen yet" in "\n".join(policy.notes)
    if name == "openvla":  # the same data sets in both files: each name is listed once
        stats = json.loads((folder / "config.json").read_text())["norm_stats"]
        policies.write_json(folder / "dataset_statistics.json", stats)
        with pytest.raises(ValueError, match=r"one of \['arms', 'hand'\]"):
            policies.load_policy(folder, unnorm_key="legs")
        (folder / "dataset_statistics.json").unlink()
    with pytest.raises(ValueError, match="'hand'.*--load unnorm_key=NAME"):
        policy.act(*fault_seen())
    fault_statistics(folder, name, arms=fault_range(14), legs=fault_range(12))
    fault_named(folder, "statistics arms", "statistics legs")


def test_statistics_padded_by_openpi_are_cut(tmp_path):
    """7 numbers and 25 zeros, which openpi's histogram turns into +-1e-10."""
    folder = fault_copy(tmp_path, "pi05")
    seen = fault_seen()
    plain = policies.load_policy(folder)
    before = plain.act(*seen, generator=torch.Generator().manual_seed(0)).actions
    file = folder / "assets/panda/norm_stats.json"
    stats = json.loads(file.read_text())["norm_stats"]["actions"]
    stats = {"q01": stats["q01"] + [-1e-10] * 25, "q99": stats["q99"] + [1e-10] * 25}
    policies.write_json(file, dict(norm_stats=dict(actions=stats)))
    padded = policies.load_policy(folder)
    after = padded.act(*seen, generator=torch.Generator().manual_seed(0)).actions
    assert torch.equal(before, after)


def test_load_options_are_parsed():
    pairs = ["unnorm_key=bridge_orig", "tokenizer=a/b.json", "base=hub/name", "merge=true",
             "temperature=0.8", "steps=10", "discrete_state=False", "noise_std=0.1,0.2",
             "horizon=6", "sampler=flow_sde", "adapter=x=y"]
    assert policies.parse_load(pairs) == dict(
        unnorm_key="bridge_orig", tokenizer="a/b.json", base="hub/name", merge=True,
        temperature=0.8, steps=10, discrete_state=False, noise_std=(0.1, 0.2), horizon=6,
        sampler="flow_sde", adapter="x=y",
    )
    wrong = ["steps=ten", "discrete_state=1", "noise_std=0.1", "tempreture=1", "steps", "style="]
    with pytest.raises(ValueError) as caught:
        policies.parse_load([*wrong, "chunk=1", "chunk=2"])
    lines = str(caught.value).splitlines()
    assert len(lines) == len(wrong) + 1
    for line, pair in zip(lines, [*wrong, "chunk=2"]):
        assert f"got {pair};" in line and "; need some of base=str, " in line
        assert "steps=int" in line and "; try --load " in line


@pytest.mark.parametrize("name, pair", [
    ("openvla", "steps=3"),
    ("openvla", "temperature=0"),
    ("pi05", "style=pytorch"),
    ("pi05", "noise_std=0.2,0.1"),
    ("pi05", "temperature=1"),
])
def test_load_options_that_do_not_fit_are_refused(name, pair):
    fault_named(name, pair.split("=")[0], "--load", **policies.parse_load([pair]))


def test_what_was_loaded_for_is_saved(tmp_path):
    """Choices of --load are those of the saved policy, and of a run that is named for it."""
    folder = fault_copy(tmp_path, "openvla", "base")
    stats = {key: dict(action=fault_range(high=high)) for key, high in (("a", 0.1), ("b", 0.2))}
    fault_json(folder / "config.json", norm_stats=stats)
    (folder / "dataset_statistics.json").unlink()
    (folder / "tokenizer.json").rename(tmp_path / "words.json")
    policy = policies.load_policy(folder, unnorm_key="b")
    assert any("--load tokenizer=PATH" in note for note in policy.notes)
    with pytest.raises(ValueError, match="try --load tokenizer=PATH"):
        policy.act(*fault_seen())
    pairs = ["unnorm_key=b", f"tokenizer={tmp_path}/words.json", "temperature=0.8"]
    policy = policies.load_policy(folder, **policies.parse_load(pairs))
    policy.save(tmp_path / "run/policy")
    again = policies.load_policy(tmp_path / "run")
    assert again.stats == stats["b"] and again.settings == policy.settings
    assert policies.find_base(tmp_path / "run")[:2] == (tmp_path / "run/policy", None)
    seen = fault_seen()
    for text in seen[1]:
        assert again.row(text) == policy.row(text)
    fault_named(folder, "nowhere.json: got no such file", tokenizer="nowhere.json")


def test_tokenizers_and_weights_that_cannot_be_right_are_refused(tmp_path):
    fault_named("openvla", "as the weights have", tokenizer=policies.BUNDLED["pi05"])
    fault_named("pi05", "as the weights have", tokenizer=policies.BUNDLED["openvla"])
    folder = fault_copy(tmp_path, "pi05")
    key = "action_in_proj.bias"
    bias = load_file(folder / "model.safetensors")[key]
    fault_tensors(folder / "model.safetensors", {key: bias * np.nan})
    fault_named(folder, "nan or inf", key)


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_texts_that_the_tokenizer_does_not_know(name):
    policy = policies.load_policy(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policies.check_texts(policy, ["Open the drawer ", "open the drawer", "push zq#!"])
        policies.check_texts(object(), ["打开抽屉"])
    with pytest.warns(UserWarning, match="1 of 2 instructions .*打开抽屉.*% of the tokens"):
        policies.check_texts(policy, ["open the drawer", "打开抽屉"])
    with pytest.raises(ValueError, match="'打开抽屉'.*same tokens.*--load tokenizer=PATH"):
        policies.check_texts(policy, ["关上抽屉", "打开抽屉"])


def test_prompts_that_are_cut_off():
    policy = policies.load_policy("pi05")
    long = "put the cup on the plate " * 60
    with pytest.warns(UserWarning, match="1 of 2 prompts are cut off at 200 tokens"):
        policies.check_texts(policy, ["open the drawer", long])
    with pytest.raises(ValueError, match="the same tokens"):
        policies.check_texts(policy, [long + "now", long])


# -- folders for others: LeRobot, openpi, RLinf, OpenVLA's code, PEFT


def layout_json(*path):
    return json.loads(pathlib.Path(*path).read_text())


def layout_state():
    """Return the tiny pi0.5 with the state in its prompt, and statistics of both."""
    policy = policies.load_policy("pi05", discrete_state=True, chunk=6, steps=5)
    state = dict(q01=[-1.0] * 7 + [0.0], q99=[1.0] * 7 + [0.0], mean=[0.1] * 8, std=[0.2] * 8)
    action = dict(policy.stats["action"], mean=[0.0] * 7, std=[0.1] * 7, min=LIMIT, max=LIMIT)
    policy.set_statistics("org/lab", dict(action=action, state=state))
    policy.deployment = dict(cameras=["observation.images.front", "observation.images.wrist"])
    return policy


LAYOUT_CONFIG = dict(
    type="pi05",
    chunk_size=8,
    n_action_steps=6,
    num_inference_steps=5,
    max_action_dim=8,
    tokenizer_max_length=200,
    image_resolution=[64, 64],
    input_features={
        "observation.images.front": dict(type="VISUAL", shape=[3, 64, 64]),
        "observation.images.wrist": dict(type="VISUAL", shape=[3, 64, 64]),
        "observation.state": dict(type="STATE", shape=[8]),
    },
    output_features=dict(action=dict(type="ACTION", shape=[7])),
    normalization_mapping=dict(ACTION="QUANTILES", STATE="QUANTILES", VISUAL="IDENTITY"),
)


def test_a_saved_pi05_is_a_folder_of_lerobot(tmp_path):
    policy = layout_state()
    policy.save(tmp_path / "saved")
    config = layout_json(tmp_path, "saved/config.json")
    sizes = {name: config.pop(name) for name in ("vision", "vlm", "expert", "vocab_size")}
    assert config == LAYOUT_CONFIG and sizes["vlm"]["width"] == 128
    official = policies.build(dict(type="pi05"))
    assert official.model_files().keys() == {"config.json"}, "no statistics, no processors"
    fields = {*LAYOUT_CONFIG}
    assert official.model_files()["config.json"].keys() == fields, "LeRobot refuses all others"

    before = layout_json(tmp_path, "saved/policy_preprocessor.json")["steps"]
    assert [step["registry_name"] for step in before] == [
        "rename_observations_processor",
        "to_batch_processor",
        "normalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step",
        "tokenizer_processor",
        "device_processor",
    ]
    tokens = before[4]["config"]
    assert tokens["max_length"] == 200 and tokens["padding_side"] == "right"
    assert tokens["tokenizer_name"] == "google/paligemma-3b-pt-224"
    after = layout_json(tmp_path, "saved/policy_postprocessor.json")["steps"]
    assert [step["registry_name"] for step in after] == [
        "unnormalizer_processor",
        "device_processor",
    ]
    for step in (before[2], after[0]):
        features = {**config["input_features"], **config["output_features"]}
        assert step["config"]["features"] == features
        assert step["config"]["norm_map"] == config["normalization_mapping"]
        stats = load_file(tmp_path / "saved" / step["state_file"])
        parts = {"observation.state": policy.stats["state"], "action": policy.stats["action"]}
        names = {f"action.{name}" for name in "min max mean std q01 q99".split()}
        names |= {f"observation.state.{name}" for name in "mean std q01 q99".split()}
        assert stats.keys() == names
        for name, tensor in stats.items():
            part, _, statistic = name.rpartition(".")
            assert tensor.tolist() == pytest.approx(parts[part][statistic])
    x = torch.randn(2, 8, 8, generator=policy_generator())
    scaled = (x[..., :7] + 1) * (stats["action.q99"] - stats["action.q01"]) / 2
    policy_near(policy.unnormalize(x), scaled + stats["action.q01"], 1e-5)

    again = policies.load_policy(tmp_path / "saved")
    assert again.settings == json.loads(json.dumps(policy.settings))
    assert again.statistics == policy.statistics, "those of LeRobot's files come second"
    assert again.deployment == policy.deployment and again.reads_state
    policies.load_policy("pi05", discrete_state=True).save(tmp_path / "without those of states")
    bare = policies.load_policy("pi05", discrete_state=True, unnorm_key="none")
    bare.save(tmp_path / "bare")
    assert not list((tmp_path / "bare").glob("policy_p*")), "LeRobot cannot scale without them"
    stateless = policies.load_policy("pi05")
    steps = stateless.model_files()["policy_preprocessor.json"]["steps"]
    assert steps[3] == dict(registry_name="pi0_new_line_processor", config={})
    assert not any("state" in name for name in next(iter(stateless.tensor_files().values())))


def test_openpi_and_rlinf_find_statistics_with_mean_and_std(tmp_path):
    layout_state().save(tmp_path / "saved")
    for folder in (policies.BUNDLED["pi05"] / "assets/panda", policies.BUNDLED["pi05"] / "panda",
                   tmp_path / "saved/assets/org/lab", tmp_path / "saved/org/lab"):
        assert (folder / "norm_stats.json").exists()
        stats = layout_json(folder, "norm_stats.json")["norm_stats"]
        assert set(stats) in ({"actions"}, {"actions", "state"})
        for numbers in stats.values():
            assert all(len(numbers[name]) >= 7 for name in ("mean", "std", "q01", "q99"))
    fault_json(tmp_path / "saved/org/lab/norm_stats.json", norm_stats=dict(actions=fault_range()))
    with pytest.raises(ValueError, match="got two different ones of org/lab; need one"):
        policies.load_policy(tmp_path / "saved")


def test_pretraining_adds_mean_and_std():
    policy = policies.make_tiny("pi05")
    demos = types.SimpleNamespace(actions=np.arange(14.0).reshape(2, 7))
    pretrain.add_moments(policy, demos)
    assert policy.stats["action"]["mean"] == [3.5 + d for d in range(7)]
    assert policy.stats["action"]["std"] == [3.5] * 7


def test_weights_of_pi05_have_the_names_of_openpi(tmp_path):
    policies.make_tiny("pi05").save(tmp_path / "saved")
    names = load_file(tmp_path / "saved/model.safetensors").keys()
    official = load_file(REFERENCE / "pi05_a/model.safetensors").keys()

    def kinds(names):
        return {re.sub(r"layers\.\d+", "layers", name) for name in names}

    assert kinds(names) == kinds(official)


LAYOUT_CODE = "configuration_prismatic.py modeling_prismatic.py processing_prismatic.py".split()


def test_a_saved_openvla_is_a_folder_of_its_official_code(tmp_path):
    policies.make_tiny("openvla").save(tmp_path / "saved")
    config = layout_json(tmp_path, "saved/config.json")
    expected = dict(
        model_type="openvla",
        architectures=["OpenVLAForActionPrediction"],
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="llama2-7b-pure",
        pad_token_id=515,
        auto_map={
            "AutoConfig": "openvla/openvla-7b--configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq":
                "openvla/openvla-7b--modeling_prismatic.OpenVLAForActionPrediction",
        },
    )
    assert expected.items() <= config.items() and set(config["norm_stats"]) == {"placeholder"}
    processor = layout_json(tmp_path, "saved/preprocessor_config.json")
    expected = dict(
        processor_class="PrismaticProcessor",
        image_processor_type="PrismaticImageProcessor",
        image_resize_strategy="resize-naive",
        input_sizes=[[3, 64, 64]] * 2,
        means=[[0.485, 0.456, 0.406], [0.5] * 3],
        stds=[[0.229, 0.224, 0.225], [0.5] * 3],
        auto_map={
            "AutoImageProcessor":
                "openvla/openvla-7b--processing_prismatic.PrismaticImageProcessor",
            "AutoProcessor": "openvla/openvla-7b--processing_prismatic.PrismaticProcessor",
        },
    )
    assert expected.items() <= processor.items()
    tokens = layout_json(tmp_path, "saved/generation_config.json")
    assert tokens == dict(bos_token_id=1, eos_token_id=2, pad_token_id=515)


def test_a_layout_keeps_the_classes_of_the_checkpoint(tmp_path):
    """Its .py files are copied, and its auto_map stays; also from the base of adapters."""
    folder = fault_copy(tmp_path, "openvla")
    own = dict(AutoConfig="configuration_prismatic.OpenVLAConfig")
    for name in ("config.json", "preprocessor_config.json"):
        fault_json(folder / name, auto_map=own)
    for name in LAYOUT_CODE:
        (folder / name).write_text(f"# {name}")
    policies.load_policy(folder).save(tmp_path / "saved")
    policies.load_policy(tmp_path / "saved", lora_rank=2).save(tmp_path / "adapters")
    policies.load_policy(tmp_path / "adapters", merge=True).save(tmp_path / "merged")
    for target in (tmp_path / "saved", tmp_path / "merged"):
        assert sorted(file.name for file in target.glob("*.py")) == LAYOUT_CODE
        assert (target / LAYOUT_CODE[0]).read_text() == f"# {LAYOUT_CODE[0]}"
        for name in ("config.json", "preprocessor_config.json"):
            assert layout_json(target, name)["auto_map"] == own
    assert not list((tmp_path / "adapters").glob("*.py"))


@pytest.mark.parametrize("name, ids, front", [
    ("openvla", [4, 25, 12, 31, 26, 69, 5, 3], [1]),
    ("pi05", [2, 104, 13, 32, 27, 70, 7], [2]),
])
def test_saved_tokenizers_put_bos_in_front_and_prompts_have_it_once(tmp_path, name, ids, front):
    policy = policies.load_policy(name)
    text = "push the red cube forward"
    assert policy.row(text) == ids
    policy.tokenizer.post_processor = None      # as that of an old checkpoint
    policy.passed_on = {}
    policy.save(tmp_path / "saved")
    for folder in (policies.BUNDLED[name], tmp_path / "saved"):
        again = policies.load_policy(folder)
        assert again.row(text) == ids, "no second BOS"
        others = again.tokenizer.encode("a", add_special_tokens=True).ids
        assert others == front + again.encode("a")
        config = layout_json(folder, "tokenizer_config.json")
        assert config["model_input_names"] == ["input_ids", "attention_mask"]
        assert config["bos_token"] == again.tokenizer.id_to_token(front[0])


@policy_both
def test_a_layout_of_adapters_holds_no_base_and_export_merges(tmp_path, name, monkeypatch, capsys):
    adapters = tmp_path / "adapters"
    policy = policies.load_policy(name, lora_rank=2)
    for layer in policies.lora_modules(policy).values():
        layer.lora_B.weight.data.normal_(std=0.05, generator=policy_generator())
    policy.deployment = dict(control_hz=5.0)
    policy.save(adapters)
    files = {file.name for file in adapters.rglob("*") if file.is_file()}
    own = {"dataset_statistics.json"} if name == "openvla" else {"norm_stats.json"}
    assert files == own | {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "heads.safetensors",
        "policy.json", "tokenizer.json", "tokenizer_config.json",
    }
    said = (adapters / "README.md").read_text()
    assert f"base model {name} " in said and policy.base["sha256"] in said
    assert "policies.py --export" in said
    command = ["policies.py", "--export", str(adapters), str(tmp_path / "whole")]
    monkeypatch.setattr(sys, "argv", command)
    policies.main()
    whole = policies.load_policy(tmp_path / "whole")
    assert not policies.lora_modules(whole) and whole.deployment == policy.deployment
    seen, ours = policy_decide(policy, 3, "greedy")
    theirs = whole.act(*seen, None, "greedy", policy_generator())
    policy_near(theirs.actions, ours.actions, 1e-6 if name == "openvla" else 1e-5)
    plain = policies.load_policy(name).act(*seen, None, "greedy", policy_generator())
    assert (plain.actions - ours.actions).abs().max() > 1e-3, "the adapters matter"
    with pytest.raises(SystemExit, match="--export: got .*whole, which exists; need .*; try "):
        policies.main()
    monkeypatch.setattr(sys, "argv", [*command[:2], "nowhere", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="policy nowhere: got no .*; need .*; try "):
        policies.main()
    assert not (tmp_path / "new").exists()


def test_deployment_is_what_a_robot_must_know(tmp_path):
    """Stage I describes its demonstrations; Stage II adds its instructions; adapters keep it."""
    options = stage_options(tmp_path / "run", steps=1, sim_ratio=0.5)
    saved = policies.load_policy(sft_warmstart.warm_start(options))
    texts = {stage_episode(seed, 9)[3] for seed in (*range(4), *range(100, 104))}
    base = policies.load_policy(options.policy).base
    expected = dict(
        cameras=["observation.images.front"],
        control_hz=5.0,
        actions=policies.ACTIONS,
        instructions=sorted(texts),
        statistics=f"of {options.policy}",
        base=base,
    )
    assert saved.deployment == expected
    sft_warmstart.describe(saved, ["zip it"])
    expected["instructions"] = sorted({*texts, "zip it"})
    assert saved.deployment == expected
    saved.save(tmp_path / "next")
    policy = policies.load_policy(tmp_path / "next", lora_rank=2)
    policy.save(tmp_path / "adapters")
    assert policies.load_policy(tmp_path / "adapters").deployment == expected
    fresh = policies.load_policy("openvla")
    sft_warmstart.describe(fresh, ["open the drawer"])
    assert fresh.deployment["control_hz"] == envs.CONTROL_HZ
    assert fresh.deployment["cameras"] == [real_data.CAMERA]
    assert fresh.deployment["base"] == fresh.base


@policy_both
def test_old_checkpoints_still_load(tmp_path, name):
    """Without `deployment`, in openpi's config.json, with config.json beside the adapters."""
    policy = policies.load_policy(name)
    folder = fault_copy(tmp_path, name)
    heads = policies.BUNDLED[name] / "heads.safetensors"
    shutil.copy(heads, folder)
    settings = dict(settings=policy.settings, lora=False)
    policies.write_json(folder / "policy.json", settings)
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    old = policies.load_policy(folder)
    assert policy_same(old, policy) and old.settings == json.loads(json.dumps(policy.settings))
    assert old.statistics == policy.statistics and old.deployment == {}
    policies.load_policy(folder, lora_rank=2).save(tmp_path / "adapters")
    shutil.copy(folder / "config.json", tmp_path / "adapters")
    assert policies.lora_modules(policies.load_policy(tmp_path / "adapters"))


def test_a_layout_without_config_says_what_is_missing(tmp_path):
    folder = fault_copy(tmp_path, "pi05")
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    message = fault_named(folder, "config.json: got no such file", "discrete_state_input")
    assert '{"type": "pi05", "action_horizon": H}' in message
    sizes = {key: sizes[key] for key in ("vision", "vlm", "expert", "vocab_size", "action_dim")}
    given = dict(sizes, type="pi05", action_horizon=5)  # the official sizes need not be given
    policies.write_json(folder / "config.json", given)
    policy = policies.load_policy(folder, chunk=5)
    assert policy.horizon == 5 and not policy.reads_state


def test_value_heads_of_rlinf_are_loaded_and_those_of_rl4vla_are_named(tmp_path):
    folder = fault_copy(tmp_path, "openvla")
    heads = load_file(policies.BUNDLED["openvla"] / "heads.safetensors")
    theirs = {key.replace("value_head.", "value_head.mlp."): heads[key] + 1 for key in heads}
    fault_tensors(folder / "model.safetensors", theirs)
    policy = policies.load_policy(folder)
    state = policy.state_dict()
    assert all(torch.equal(state[key], (heads[key] + 1).float()) for key in heads)
    assert not any("anew" in note for note in policy.notes)
    adapter = fault_adapter(tmp_path)
    (adapter / "training_state.pt").write_bytes(b"vh and an optimizer")
    notes = policies.load_policy(adapter).notes
    assert "value_head: that of RL4VLA in training_state.pt is not read" in notes


def layout_quantile(values, share):
    """The smallest value that has this share of all values at or below it."""
    return np.sort(values)[max(int(np.ceil(share * len(values) - 1e-9)) - 1, 0)]


def test_recorded_sets_have_the_statistics_of_lerobot(tmp_path):
    episodes = data_write(tmp_path / "set", (5, 8))
    rows = pq.read_table(tmp_path / "set/meta/episodes").to_pylist()
    whole = layout_json(tmp_path, "set/meta/stats.json")
    features = layout_json(tmp_path, "set/meta/info.json")["features"]
    kinds = "min max mean std count q01 q10 q50 q90 q99".split()
    assert set(whole) == set(features)
    for feature in features:
        assert set(whole[feature]) == set(kinds)
        names = {name for name in rows[0] if name.startswith(f"stats/{feature}/")}
        assert names == {f"stats/{feature}/{kind}" for kind in kinds}
    all_images = np.concatenate([episode[0] for episode in episodes])
    all_actions = np.concatenate([episode[2] for episode in episodes])
    cases = [(row, episode[0], episode[2]) for row, episode in zip(rows, episodes)]
    flat = {f"stats/{key}/{kind}": whole[key][kind] for key in whole for kind in kinds}
    for row, images, actions in [*cases, (flat, all_images, all_actions)]:
        stats = {kind: np.array(row[f"stats/{real_data.CAMERA}/{kind}"]) for kind in kinds}
        assert stats.pop("count").tolist() == [len(images)]
        pixels = images.reshape(-1, 3) / 255
        expected = {kind: getattr(pixels, kind)(axis=0) for kind in ("min", "max", "mean", "std")}
        for kind, share in dict(q01=0.01, q10=0.1, q50=0.5, q90=0.9, q99=0.99).items():
            expected[kind] = np.array([layout_quantile(pixels[:, c], share) for c in range(3)])
        for kind, numbers in stats.items():
            assert numbers.shape == (3, 1, 1)
            assert np.allclose(numbers[:, 0, 0], expected[kind], atol=1e-12), kind
        for kind, share in dict(q01=0.01, q10=0.1, q50=0.5, q90=0.9, q99=0.99).items():
            wanted = np.quantile(np.float64(actions), share, axis=0)
            assert np.allclose(row[f"stats/action/{kind}"], wanted)
        assert np.allclose(row["stats/action/mean"], actions.mean(0), atol=1e-7)
        assert np.allclose(row["stats/action/std"], actions.std(0), atol=1e-7)
        assert row["stats/action/count"] == [len(actions)]
    assert rows[1]["stats/index/min"] == [5.0] and rows[1]["stats/index/max"] == [12.0]
    assert rows[1]["stats/frame_index/max"] == [7.0]
    assert rows[1]["stats/timestamp/max"] == pytest.approx([0.7])


class EvaluatePool:
    """A pool that runs each job at once, in this process."""

    def submit(self, function, *job):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*job))
        except BaseException as error:
            future.set_exception(error)
        return future


def evaluate_work(args, cell, block):
    """Return made-up episodes of a block, without a policy."""
    records = []
    for k in range(block * evaluate.BLOCK, min(args.episodes, (block + 1) * evaluate.BLOCK)):
        record = dict(episode=k, success=k % 3 == 0, steps=k, touched=True, failure=False)
        records.append(dict(record, diverged=False, instruction=cell.task))
    return records


@pytest.fixture
def evaluate_instant(tmp_path, monkeypatch):
    """Make evaluate.py run in this process, in an empty folder, and return made-up episodes."""
    monkeypatch.chdir(tmp_path)
    pool = contextlib.nullcontext(EvaluatePool())
    monkeypatch.setattr(evaluate, "worker_processes", lambda count, device: pool)
    monkeypatch.setattr(evaluate, "look", lambda args, checkpoint: ["chosen for you"])
    monkeypatch.setattr(evaluate, "work", evaluate_work)
    return tmp_path


def evaluate_command(flags, capsys):
    """Run a command line in this process. Returns its exit status and all that it printed."""
    status = 0
    capsys.readouterr()
    try:
        evaluate.main(flags.split())
    except SystemExit as stop:
        status = stop.code
    text = capsys.readouterr()
    return status, text.out + text.err


def evaluate_result(out):
    """Return result.json without the command, which names OUT."""
    return dict(json.loads((pathlib.Path(out) / "result.json").read_text()), command=None)


def evaluate_traces(folder):
    """Return all that is in a folder: names, and times and contents of files."""
    found = {}
    for path in folder.rglob("*"):
        found[path] = None
        if path.is_file():
            found[path] = (path.stat().st_mtime_ns, path.read_bytes())
    return found


FLAGS = "--checkpoint openvla pi05 --episodes 60 --domain sim"


@pytest.mark.parametrize(
    "error, status, said",
    [
        (KeyboardInterrupt(), 130, "\ninterrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: [Errno 28] No space left"),
        (BrokenProcessPool("a process died"), 1, "error: BrokenProcessPool: a process died"),
        (KeyError("x"), 1, "error: KeyError: 'x' (set TRACEBACK=1 to see where)"),
    ],
)
def test_evaluate_resumes_after(error, status, said, evaluate_instant, monkeypatch, capsys):
    """Interrupted, and with a line that a kill has cut, it ends with the same result."""
    assert evaluate_command(f"{FLAGS} --out whole", capsys)[0] == 0

    def broken(args, cell, block):
        if cell.checkpoint == "pi05" and block == 1:
            raise error
        return evaluate_work(args, cell, block)

    monkeypatch.setattr(evaluate, "work", broken)
    got, text = evaluate_command(f"{FLAGS} --out cut", capsys)
    assert got == status and "Traceback" not in text
    [line] = [line for line in text.splitlines() if line.startswith(said.strip())]
    assert line.endswith("the same command with --resume goes on from cut/episodes.jsonl")
    assert not pathlib.Path("cut/result.json").exists()
    with open("cut/episodes.jsonl", "a") as file:
        file.write('\n{"cell": {"checkpoint": "pi05", "task": "open-dr')
    monkeypatch.setattr(evaluate, "work", evaluate_work)
    got, text = evaluate_command(f"{FLAGS} --out cut --resume --workers 7", capsys)
    assert got == 0 and "openvla: chosen for you\n" in text
    assert evaluate_result("cut") == evaluate_result("whole")
    command = json.loads(pathlib.Path("cut/result.json").read_text())["command"]
    assert command == f"python evaluate.py {FLAGS} --out cut"


def test_evaluate_prints_a_finished_result_again(evaluate_instant, monkeypatch, capsys):
    _, first = evaluate_command(FLAGS, capsys)
    before = evaluate_result("runs/eval-openvla-open-drawer")
    monkeypatch.setattr(evaluate, "worker_processes", None)
    status, text = evaluate_command(f"{FLAGS} --resume", capsys)
    assert status == 0 and evaluate.table(before["cells"]) in text
    assert evaluate_result("runs/eval-openvla-open-drawer") == before


@pytest.mark.parametrize(
    "flags, said",
    [
        (FLAGS, "--out: got runs/eval-openvla-open-drawer, which holds results"),
        (f"{FLAGS} --decoding greedy --out done", "--out: got done, which holds results"),
        (f"{FLAGS} --out cut", "--out: got cut, which holds results"),
        (f"{FLAGS} --resume --seed 5 --out cut", "--resume: got seed was 999983, is 5; need"),
        (f"{FLAGS} --resume --out new", "--resume: got no new/episodes.jsonl"),
        (f"{FLAGS} --out file", "--out: got file (File exists)"),
        (f"{FLAGS} --out file/a", "--out: got file/a (Not a directory)"),
        (f"{FLAGS} --out new/{'a' * 300}", "File name too long"),
        ("--checkpoint pi05 broken --out new", "error: broken: got 1; need 2; try 3"),
        ("--checkpoint pi05 --episodes 0 --out new", "--episodes: got 0"),
        ("--checkpoint pi05 --load x=1 --out new", "--load: got x=1"),
        ("--curves file --out new", "--curves: got file"),
    ],
)
def test_a_refused_evaluation_leaves_no_trace(flags, said, evaluate_instant, monkeypatch, capsys):
    def look(args, checkpoint):
        if checkpoint == "broken":
            raise ValueError("broken: got 1; need 2; try 3")
        return []

    monkeypatch.setattr(evaluate, "look", look)
    for out in ("", "--out cut", "--out done"):
        assert evaluate_command(f"{FLAGS} {out}", capsys)[0] == 0
    pathlib.Path("cut/result.json").unlink()
    pathlib.Path("broken").mkdir()
    pathlib.Path("file").write_text("no JSON")
    before = evaluate_traces(evaluate_instant)
    status, text = evaluate_command(flags, capsys)
    assert status == 1 and said in text and "; try " in text and "Traceback" not in text
    assert evaluate_traces(evaluate_instant) == before


def test_evaluate_refuses_to_go_on_with_another_policy(evaluate_instant, capsys):
    shutil.copytree(policies.BUNDLED["pi05"], "mine")
    evaluate_command("--checkpoint mine --out out", capsys)
    os.utime("mine/model.safetensors", (9e9, 9e9))
    status, text = evaluate_command("--checkpoint mine --out out --resume", capsys)
    assert status == 1 and "error: --resume: got time of mine was" in text


def test_two_evaluations_that_start_together_do_not_mix(evaluate_instant, capsys):
    args = evaluate.parse(FLAGS.split())
    evaluate.claim(args)
    before = evaluate_traces(evaluate_instant)
    with pytest.raises(ValueError, match="--out: got .* need a new folder"):
        evaluate.claim(args)
    assert evaluate_traces(evaluate_instant) == before


def test_a_full_disk_loses_no_block_that_has_ended(evaluate_instant, capsys):
    """A limit on the size of files stands for the disk."""
    evaluate_command(f"{FLAGS} --out whole", capsys)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    status, text = evaluate_command(f"{FLAGS} --out full", capsys)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and "error: [Errno 27]" in text and "--resume goes on" in text
    args = evaluate.parse(f"{FLAGS} --out full --resume".split())
    assert len(evaluate.read_journal(args)) >= 2
    assert evaluate_command(f"{FLAGS} --out full --resume", capsys)[0] == 0
    assert evaluate_result("full") == evaluate_result("whole")


def test_numbers_survive_pictures_that_fail(evaluate_instant, monkeypatch, capsys):
    def full(*anything):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("bar_chart", "contact_sheet", "choose_videos"):
        monkeypatch.setattr(evaluate, name, full)
    status, text = evaluate_command(f"{FLAGS} --out out", capsys)
    assert status == 0 and text.count("warning: out/") == 3
    assert all(line.endswith("numbers are complete") for line in text.splitlines()[-3:])
    assert "95 % interval" in text and evaluate_result("out")["cells"]
    monkeypatch.setattr(policies, "write_json", full)
    status, text = evaluate_command(f"{FLAGS} --out other", capsys)
    assert status == 1 and "95 % interval" in text and "--resume goes on" in text


def test_the_first_videos_stay(tmp_path):
    frames = 3 * [policies.np.zeros((64, 64, 3), "uint8")]
    records = [dict(episode=k, success=k % 2 == 1, frames=frames) for k in range(5)]
    evaluate.write_videos(records, tmp_path)
    evaluate.choose_videos(tmp_path, 1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000-failure.mp4", "00001-success.mp4", "contact-sheet.png"]


def test_reported_says_everything_in_one_line(monkeypatch, capsys):
    def said(error):
        with pytest.raises(SystemExit) as stop, evaluate.reported():
            warnings.warn("look out")
            raise error
        return stop.value.code, capsys.readouterr().err

    assert said(ValueError("a: got b")) == (1, "warning: look out\nerror: a: got b\n")
    assert said(KeyboardInterrupt()) == (130, "warning: look out\n\ninterrupted\n")
    monkeypatch.setenv("TRACEBACK", "1")
    status, text = said(ValueError("a: got b"))
    assert "Traceback" in text and text.endswith("error: a: got b\n")
    with pytest.raises(SystemExit, match="130"), evaluate.reported():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def evaluate_children(pid):
    """Return the processes that a process has started."""
    return list(map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, "worker"])
def test_evaluate_ends_all_processes(number, tmp_path):
    """A signal to all, or a kill of one process of the pool. (A kill of all: killed_at_random.)"""
    command = f"{HERE}/evaluate.py --checkpoint pi05 --workers 1 --out {tmp_path}/out"
    child = subprocess.Popen(
        [sys.executable, *command.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    child.stderr.read(5)                            # the progress bar has appeared
    if number == "worker":
        os.kill(evaluate_children(child.pid)[-1], signal.SIGKILL)
    else:
        os.killpg(child.pid, number)
    error = child.communicate(timeout=60)[1]        # returns when no process holds it any more
    assert "Traceback" not in error
    assert not (tmp_path / "out/result.json").exists()
    assert (tmp_path / "out/episodes.jsonl").exists()
    if number == "worker":
        assert child.returncode == 1 and "error: BrokenProcessPool" in error
    else:
        assert child.returncode == 130 and "interrupted" in error
    assert "--resume goes on" in error


# ---- serving -----------------------------------------------------------------------------------
# The client below is written from the description of the protocol, and shares no code with
# evaluate.py.


SERVE_ARRAY = {b"__ndarray__", b"data", b"dtype", b"shape"}


def serve_pack(message):
    def pack(value):
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        data = value.tobytes()
        return {b"__ndarray__": True, b"data": data, b"dtype": value.dtype.str,
                b"shape": value.shape}

    return msgpack.packb(message, default=pack)


def serve_unpack(message):
    def unpack(value):
        if b"__ndarray__" not in value:
            return value
        assert set(value) == SERVE_ARRAY and value[b"__ndarray__"] is True
        return np.ndarray(value[b"shape"], value[b"dtype"], value[b"data"])

    return msgpack.unpackb(message, object_hook=unpack)


class ServeClient:
    """A client of the protocol, with the interface of openpi-client's WebsocketClientPolicy."""

    def __init__(self, host, port):
        connect = websockets.sync.client.connect(
            f"ws://{host}:{port}", compression=None, max_size=None
        )
        self.socket = connect.__enter__()
        self.metadata = serve_unpack(self.socket.recv())

    def get_server_metadata(self):
        return self.metadata

    def infer(self, observation):
        return self.send(serve_pack(observation))

    def send(self, message):
        self.socket.send(message)
        answer = self.socket.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return serve_unpack(answer)


@contextlib.contextmanager
def serve_policy(policy, *cameras, **options):
    """Serve a policy in threads of this process; yield a function that connects a client."""
    service = evaluate.PolicyServer(policy, cameras, **options)
    server = service.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield functools.partial(ServeClient, *server.socket.getsockname())
    finally:
        server.shutdown()
        thread.join()
        service.traffic.close()


@functools.cache
def serve_bundled(kind):
    policy = policies.load_policy(kind, freeze="all")
    policy.chunk = policy.horizon
    return policy


def serve_image(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape or (48, 64, 3), dtype=np.uint8)


def serve_expected(policy, image, prompt, client=0):
    """The first actions that a client gets for an image (H, W, 3): its number seeds the noise."""
    seed = np.random.SeedSequence([evaluate.EVAL_SEED, client]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
    decision = policy.act(image[None], [prompt], decoding="deploy", generator=generator)
    return decision.actions[0].numpy()


SERVE_SHAPES = dict(  # camera, observation of an image
    libero=("image", lambda image: {
        "observation/image": image,
        "observation/wrist_image": serve_image(1),
        "observation/state": np.zeros(8, np.float32),
        "prompt": "open the drawer",
    }),
    droid=("exterior_image_1_left", lambda image: {
        "observation/exterior_image_1_left": image,
        "observation/wrist_image_left": serve_image(1),
        "observation/joint_position": np.zeros(7),
        "observation/gripper_position": np.zeros(1),
        "prompt": "open the drawer",
    }),
    aloha=("cam_high", lambda image: {
        "state": np.zeros(14),
        "images": dict(cam_high=image.transpose(2, 0, 1), cam_low=serve_image(1, 3, 48, 64)),
        "prompt": "open the drawer",
    }),
)


@pytest.mark.parametrize("kind, horizon", [("openvla", 1), ("pi05", 8)])
@pytest.mark.parametrize("shape", SERVE_SHAPES)
def test_serve_answers_as_act_does(kind, horizon, shape):
    camera, observe = SERVE_SHAPES[shape]
    policy = serve_bundled(kind)
    image = serve_image(0)
    with serve_policy(policy, camera) as connect:
        client = connect()
        answer = client.infer(observe(image))
        later = client.infer(observe(image))
    assert client.metadata["policy"] == kind and client.metadata["cameras"] == [camera]
    assert answer["actions"].shape == (horizon, 7) and answer["actions"].dtype == np.float32
    assert np.array_equal(answer["actions"], serve_expected(policy, image, "open the drawer"))
    assert not np.array_equal(answer["actions"], later["actions"]), "other noise"
    for each, timings in ((answer, {"infer_ms"}), (later, {"infer_ms", "prev_total_ms"})):
        assert set(each) == {"actions", "policy_timing", "server_timing"}
        assert set(each["policy_timing"]) == {"infer_ms"}
        assert set(each["server_timing"]) == timings


def test_serve_gives_every_client_its_own_answers():
    """Four clients at once: requests of one client change no other one's noise."""
    policy = serve_bundled("pi05")
    prompts = ["open the drawer", "close the drawer", "push the red cube", "pick up the red cube"]
    with serve_policy(policy, "image") as connect:
        clients = [connect() for _ in prompts]

        def ask(k):
            request = {"observation/image": serve_image(k), "prompt": prompts[k]}
            return [clients[k].infer(request)["actions"] for _ in range(5)]

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            got = list(pool.map(ask, range(4)))
    for k, answers in enumerate(got):
        expected = serve_expected(policy, serve_image(k), prompts[k], client=k)
        assert np.array_equal(answers[0], expected)
        assert len({answer.tobytes() for answer in answers}) == 5


def test_serve_takes_what_openpi_takes():
    image = serve_image(0)
    stub = EvaluateStub(reads_state=True)
    stub.image_ndims = (4, 5)
    ask = {"observation.images.front": image, "state": np.arange(8), "prompt": "push"}
    several = dict(front=image, wrist=serve_image(1))
    with serve_policy(stub, "front", prompt="wait") as connect:
        client = connect()
        for form in (
            image,
            image.transpose(2, 0, 1),
            image / 255,
            (image.transpose(2, 0, 1) / 255).astype(np.float16),
            image.astype(">f4") / 255,
        ):
            client.infer({**ask, "observation.images.front": form})
            assert np.array_equal(stub.calls[-1].images, image[None])
        assert np.array_equal(stub.calls[-1].state, np.arange(8, dtype=np.float32)[None])
        assert stub.calls[-1].decoding == "deploy"
        for prompt in ("push", b"push", np.array("push"), np.str_("push")):
            client.infer({**ask, "prompt": prompt})
            assert stub.calls[-1].instructions == ["push"]
        del ask["prompt"]
        client.infer({**ask, "time": np.float64(0.5), "nothing": None, "list": [1, [2]]})
        assert stub.calls[-1].instructions == ["wait"]
    with serve_policy(stub, "observation.images.wrist", "front") as connect:
        connect().infer({"images": several, "observation/state": np.ones(3), "prompt": "push"})
    assert np.array_equal(stub.calls[-1].images, np.stack([serve_image(1), image])[None])
    assert stub.calls[-1].state.shape == (1, 3)


SERVE_GOOD = {"observation/image": serve_image(0), "prompt": "push"}
SERVE_BAD_ARRAY = {b"__ndarray__": True, b"data": b"123", b"dtype": "|u1", b"shape": [3]}


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"prompt": "push"}, "camera image: got an observation of ['prompt']; need one image"),
        ({**SERVE_GOOD, "images": {"image": 1}}, "camera image: got an observation of ["),
        ({**SERVE_GOOD, "observation/image": "x"}, "observation/image: got a text of 1 char"),
        ({**SERVE_GOOD, "observation/image": np.zeros((8, 8), "u1")}, "image: got uint8 (8, 8)"),
        ({**SERVE_GOOD, "observation/image": np.zeros((1, 8, 8, 3), "u1")}, "got uint8 (1, 8"),
        ({**SERVE_GOOD, "observation/image": np.zeros((0, 8, 3), "u1")}, "got uint8 (0, 8, 3)"),
        ({**SERVE_GOOD, "observation/image": np.zeros((1, 9999, 3), "u1")}, "got uint8 (1, 9999"),
        ({**SERVE_GOOD, "observation/image": np.zeros((8, 8, 3), int)}, "image: got int64"),
        ({**SERVE_GOOD, "observation/image": 1.1 * np.ones((8, 8, 3))}, "values 1.1 to 1.1; need"),
        ({**SERVE_GOOD, "observation/image": np.full((8, 8, 3), np.nan)}, "values nan to nan"),
        ({"observation/image": serve_image(0)}, "prompt: got none"),
        ({**SERVE_GOOD, "prompt": " "}, "prompt: got a text of 1 characters; need a text of 1 to"),
        ({**SERVE_GOOD, "prompt": 2000 * "push "}, "prompt: got a text of 10000 characters"),
        ({**SERVE_GOOD, "prompt": 5}, "prompt: got int"),
        ([SERVE_GOOD], "message: got no map"),
        ({"image": {**SERVE_BAD_ARRAY, b"dtype": "|O"}}, "got ValueError, an array of object"),
        ({"image": {**SERVE_BAD_ARRAY, b"dtype": "i4,f4"}}, "got ValueError, an array of [("),
        ({"image": {**SERVE_BAD_ARRAY, b"dtype": "f4,("}}, "message: got SyntaxError"),
        ({"image": {**SERVE_BAD_ARRAY, b"dtype": "<c8"}}, "got ValueError, an array of complex64"),
        ({"image": {**SERVE_BAD_ARRAY, b"shape": [10**12]}}, "got ValueError, cannot reshape"),
        ({"image": {**SERVE_BAD_ARRAY, b"shape": "x"}}, "message: got TypeError"),
        ({"image": {b"__ndarray__": True}}, "message: got KeyError"),
        ({"a": [1000 * [[]], 1000 * [{}]]}, "message: got ValueError, more than 1024 maps and"),
        ({1: 2}, "message: got ValueError, int is not allowed for map key"),
        (b"\xdd\xff\xff\xff\xff", "message: got ValueError, 4294967295 exceeds max_array_len"),
        (b"\x81\xa1a" + 5000 * b"\x91", "message: got StackError"),
        (b"\x81\xa1a\xc5\xff\xffab", "message: got ValueError, Unpack failed"),
        (b"\xc1", "message: got FormatError"),
        (b"", "message: got ValueError, Unpack failed"),
        ("push", "message: got a text message; need a map"),
    ],
)
def test_serve_refuses_in_one_line(wrong, said):
    """A wrong request ends its own connection; older and newer ones go on."""
    message = wrong if isinstance(wrong, (bytes, str)) else serve_pack(wrong)
    with serve_policy(EvaluateStub(), "image") as connect:
        other = connect()
        client = connect()
        with pytest.raises(RuntimeError) as error:
            client.send(message)
        text = str(error.value)
        assert said in text and re.fullmatch(".+: got .*; need .*; try .*", text), text
        with pytest.raises(websockets.ConnectionClosedError) as closed:
            client.socket.recv()
        assert closed.value.rcvd.code == 1011
        assert closed.value.rcvd.reason.endswith("Traceback included in previous frame.")
        assert len(other.infer(SERVE_GOOD)["actions"]) == 1
        assert len(connect().infer(SERVE_GOOD)["actions"]) == 1


def serve_refusal(policy, cameras, observation):
    """What a server of these cameras answers to an observation."""
    with serve_policy(policy, *cameras) as connect, pytest.raises(RuntimeError) as error:
        connect().infer(observation)
    return str(error.value)


def test_serve_never_guesses_cameras_or_states():
    one = {"observation/image": serve_image(0), "prompt": "push"}
    two = {**one, "observation/wrist_image": serve_image(0)}
    with serve_policy(EvaluateStub()) as connect:           # no names: the only image
        connect().infer(one)
    said = serve_refusal(EvaluateStub(), [], two)
    assert "image: got an observation of ['observation/image', 'prompt', 'observation/wr" in said
    assert "need one image" in said and "--camera" in said
    stub = EvaluateStub(reads_state=True)
    joints = {**one, "observation/joint_position": np.zeros(7)}
    said = serve_refusal(stub, ["image"], joints)
    assert "state: got none, in an observation of" in said and "joint_position" in said
    for state in (np.zeros((1, 8)), np.full(8, np.nan), np.array("x"), [0.0]):
        assert "state: got" in serve_refusal(stub, ["image"], {**one, "state": state})
    stub = EvaluateStub()
    stub.image_ndims = (4, 5)
    other = {**one, "observation/wrist_image": serve_image(0, 8, 8, 3)}
    said = serve_refusal(stub, ["image", "wrist_image"], other)
    assert "images: got [(48, 64, 3), (8, 8, 3)]; need the same" in said
    with pytest.raises(ValueError, match="--camera: got 2 cameras, .* need at most 1"):
        evaluate.PolicyServer(EvaluateStub(), ["a", "b"])


def test_serve_tells_what_the_checkpoint_says():
    stub = EvaluateStub()
    stub.deployment = dict(
        cameras=["observation.images.front"], control_hz=5, actions="deltas",
        instructions=["open the drawer"], statistics="demonstrations", base=dict(name="x"),
    )
    with serve_policy(stub) as connect:
        client = connect()
        client.infer({"observation/front": serve_image(0)})
    assert stub.calls[-1].instructions == ["open the drawer"]
    told = dict(policy="EvaluateStub", horizon=1, reads_state=False, decoding="deploy")
    assert client.metadata == {**stub.deployment, **told}
    stub.image_ndims = (4, 5)
    with pytest.raises(ValueError, match="--camera: got 2 .* need at most 1, in the order of"):
        evaluate.PolicyServer(stub, ["a", "b"])


def test_serve_an_error_of_the_policy_is_a_line_too():
    stub = EvaluateStub()
    with serve_policy(stub, "image") as connect:
        stub.act = lambda *_, **__: 1 / 0
        with pytest.raises(RuntimeError, match="^ZeroDivisionError: division by zero$"):
            connect().infer(SERVE_GOOD)
        del stub.act
        connect().infer(SERVE_GOOD)


def test_serve_survives_broken_connections(monkeypatch):
    """Half a message, a disconnect within it, one that is too long, requests without waiting."""
    monkeypatch.setattr(evaluate, "MAX_MESSAGE", 20_000)
    half = bytes([0x82, 0xFF]) + (10_000).to_bytes(8, "big") + bytes(4 + 100)   # of 10,000 bytes
    with serve_policy(EvaluateStub(), "image") as connect:
        stuck = connect()
        stuck.socket.socket.sendall(half)
        gone = connect()
        gone.socket.socket.sendall(half)
        gone.socket.socket.shutdown(2)
        long = connect()
        with pytest.raises(websockets.ConnectionClosedError, match="1009 .message too big"):
            long.send(bytes(20_001))
        hasty = connect()
        for _ in range(20):
            hasty.socket.send(serve_pack(SERVE_GOOD))
        for _ in range(20):
            hasty.socket.recv()
        connect().infer(SERVE_GOOD)
        stuck.socket.socket.shutdown(2)


def test_serve_answers_pings_while_the_policy_acts():
    acting = threading.Event()
    finish = threading.Event()
    stub = EvaluateStub()
    act = stub.act

    def slow(*arguments, **options):
        acting.set()
        assert finish.wait(30)
        return act(*arguments, **options)

    stub.act = slow
    with serve_policy(stub, "image") as connect:
        client = connect()
        client.socket.send(serve_pack(SERVE_GOOD))
        assert acting.wait(30)
        assert client.socket.ping().wait(30)
        assert connect().metadata["policy"] == "EvaluateStub"
        finish.set()
        client.socket.recv()


def test_serve_healthz_and_nothing_for_browsers():
    with serve_policy(EvaluateStub(), "image") as connect:
        host, port = connect.args

        def get(path):
            connection = http.client.HTTPConnection(host, port, timeout=30)
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

        assert get("/healthz") == (200, b"OK\n")
        assert get("/")[0] == 426
        url = f"ws://{host}:{port}/any/path"
        headers = {"Authorization": "Api-Key x"}
        with websockets.sync.client.connect(url, additional_headers=headers) as socket:
            assert socket.protocol.extensions == []         # the server compresses nothing
            assert serve_unpack(socket.recv())["cameras"] == ["image"]
        with pytest.raises(websockets.InvalidStatus, match="403"):
            websockets.sync.client.connect(url, origin="http://somewhere").__enter__()


@pytest.fixture
def serve_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_command(number, serve_port, capsys):
    """Serves the whole horizon; Ctrl-C or SIGTERM ends it, a client still being connected."""
    def use():
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    client = ServeClient("127.0.0.1", serve_port)
                    break
                time.sleep(0.05)
            request = {"observation/front": serve_image(0), "prompt": b"open the drawer"}
            return client.infer(request)["actions"]
        finally:
            os.kill(os.getpid(), number)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        actions = pool.submit(use)
        evaluate.main(f"--serve --checkpoint pi05 --camera front --port {serve_port}".split())
    expected = serve_expected(serve_bundled("pi05"), serve_image(0), "open the drawer")
    assert np.array_equal(actions.result(), expected)
    said = capsys.readouterr()
    first, last = said.out.splitlines()[-2:]
    assert first.startswith(
        f"serving pi05 at ws://127.0.0.1:{serve_port}; cameras: front; actions an answer: 8; "
    )
    assert re.fullmatch(r"served 1 requests; latency: median [\d.]+ ms, p99 [\d.]+ ms", last)
    assert "warning" not in said.err and "Traceback" not in said.err


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--serve", "--serve: got 0 checkpoints; need one"),
        ("--serve --checkpoint openvla pi05", "--serve: got 2 checkpoints; need one"),
        ("--serve --checkpoint pi05 --task all --resume", "--serve: got --task --resume beside it"),
        ("--serve --checkpoint pi05 --port 70000", "--port: got 70000; need 0 to 65535"),
        ("--serve --checkpoint pi05 --port {busy}", "{busy} (Address already in use"),
        ("--serve --checkpoint pi05 --host 203.0.113.1", "got 203.0.113.1 8000 ("),
        ("--serve --checkpoint openvla --camera a b", "--camera: got 2 cameras, ['a', 'b']; "),
        ("--checkpoint pi05 --camera front --port 9", "--checkpoint: got --port --camera"),
        ("--trials x --seed 5", "--trials: got --seed beside it; need only"),
        ("--trials x", "--trials: got x ("),
    ],
)
def test_serve_flags_are_refused(flags, said, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = taken.getsockname()[1]
        status, text = evaluate_command(flags.format(busy=busy), capsys)
    assert status == 1 and said.format(busy=busy) in text and "Traceback" not in text
    assert re.fullmatch("error: .*: got .*; need .*; try .*", text.splitlines()[-1]), text


def test_serve_warns_of_an_open_port(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load", lambda *_: EvaluateStub())
    monkeypatch.setattr(EvaluateStub, "horizon", 1, raising=False)
    flags = "--serve --checkpoint pi05 --port 0 --host 0.0.0.0".split()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", unittest.mock.Mock(side_effect=KeyboardInterrupt))
        args = evaluate.parse(flags)
        with pytest.warns(UserWarning, match="--host 0.0.0.0: there is no authentication"):
            evaluate.serve(args)
    assert "ws://0.0.0.0:" in capsys.readouterr().out


def serve_trials(folder, outcomes, old=False):
    """Write a LeRobot data set of trials with real_data.py; add what a person has judged.

    outcomes: for each episode, next.success of its last frame, or None. old: v2.1
    """
    data_write(folder, [3] * len(outcomes))
    [file] = folder.glob("data/*/*.parquet")
    table = pq.read_table(file)
    flags = []
    for outcome in outcomes:
        flags += [False, False, outcome]
    table = table.append_column("next.success", pa.array(flags, pa.bool_()))
    pq.write_table(table, file)
    if old:
        rows = pq.read_table(folder / "meta/episodes").to_pylist()
        shutil.rmtree(folder / "meta/episodes")
        lines = [json.dumps(row) for row in rows]
        (folder / "meta/episodes.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("old", [False, True])
def test_serve_trials_are_counted(old, tmp_path, capsys):
    serve_trials(tmp_path / "robot", [True, False, True, True], old)
    evaluate.main(["--trials", str(tmp_path / "robot")])
    lines = capsys.readouterr().out.splitlines()
    low, high = evaluate.wilson(3, 4)
    assert lines[0].split("  ")[-1] == "n" and len(lines) == 4
    assert lines[-1].split()[1:] == ["all", "75.0%", f"{low:.1%}", "-", f"{high:.1%}", "4"]
    by_task = {DATA_TASKS[0]: "100.0%", DATA_TASKS[1]: "50.0%"}
    for line in lines[1:3]:
        [task] = [task for task in by_task if task in line]
        assert by_task[task] in line and line.endswith("  2")


def test_serve_trials_without_a_verdict_are_refused(tmp_path, capsys):
    serve_trials(tmp_path / "robot", [True, None])
    status, text = evaluate_command(f"--trials {tmp_path}/robot", capsys)
    assert status == 1 and "episode 1: got frames without next.success; need true or" in text
    data_write(tmp_path / "plain")
    status, text = evaluate_command(f"--trials {tmp_path}/plain", capsys)
    assert status == 1 and "need a LeRobot data set with a column next.success; try" in text
    assert len(text.splitlines()) == 1


def test_serve_the_loop_of_the_readme(monkeypatch):
    """It moves a robot, and records frames with a person's verdict."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    [loop] = [block for block in blocks if "def run_trial(" in block]
    robot = unittest.mock.Mock()
    robot.image.return_value = serve_image(0)
    robot.state.return_value = np.ones(8, np.float32)
    dataset = unittest.mock.Mock()
    answers = ["y"] + 19 * ["n"]
    monkeypatch.setattr(builtins, "input", unittest.mock.Mock(side_effect=answers))
    monkeypatch.setattr(time, "sleep", unittest.mock.Mock())
    package = types.ModuleType("openpi_client.websocket_client_policy")
    monkeypatch.setitem(sys.modules, "openpi_client", types.ModuleType("openpi_client"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    policy = EvaluateStub(chunk=8, value=0.01)
    with serve_policy(policy, "front") as connect:
        package.WebsocketClientPolicy = lambda host, port: connect()
        exec(loop, dict(robot=robot, dataset=dataset))
    assert len(policy.calls) == 20 * 60 // 4
    assert robot.move.call_count == dataset.add_frame.call_count == 20 * 60
    assert dataset.save_episode.call_count == 20 and dataset.finalize.call_count == 1
    frames = [call.args[0] for call in dataset.add_frame.call_args_list]
    assert [frame["next.success"].tolist() for frame in frames] == 60 * [[True]] + 1140 * [[False]]
    assert frames[0]["task"] == "open the drawer" and frames[0]["action"].shape == (7,)
    assert np.array_equal(robot.move.call_args_list[0].args[0], frames[0]["action"])


# ---- learning ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name, theory", [("openvla", None), ("pi05", 1.3)])
def test_stage_one_starts_at_theory_and_overfits(name, theory, tmp_path):
    """At first ln(vocabulary) for tokens, E u^2 = 1 + E a^2 for flow; soon far below."""
    options = stage_options(tmp_path / "run", name, steps=60, augment="none", batch=16, lr=2e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_warmstart, "LOG_EVERY", 1)
        assert sft_warmstart.warm_start(options) == tmp_path / "run/policy"
    rows = stage_metrics(tmp_path / "run")
    policy = policies.load_policy(str(tmp_path / "run/policy"))
    theory = theory or math.log(policy.config["text_config"]["vocab_size"])
    losses = [(row["loss/sim"] + row["loss/real"]) / 2 for row in rows]
    assert np.mean(losses[:2]) == pytest.approx(theory, rel=0.15)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert {"held_out/sim", "held_out/real"} <= rows[-1].keys()
    assert (tmp_path / "run/loss.png").stat().st_size > 5000


def test_ppo_climbs_on_a_toy():
    check_stage_climbs()


def test_the_anchor_keeps_the_real_loss():
    check_stage_anchor_holds()


def test_state_critic_learns_its_targets():
    critic = rl_cotrain.StateCritic(StageEnv(), types.SimpleNamespace(seed=0, value_lr=1e-3))
    states = torch.rand(20, 100, 3)
    returns = states[..., 0] * states[..., 1] - states[..., 2]
    rollout = types.SimpleNamespace(privileged=states, returns=returns)
    for iteration in range(5):
        critic.fit(rollout, types.SimpleNamespace(seed=0), iteration)
    with torch.no_grad():
        assert (critic.value(states) - returns).pow(2).mean() < 0.1 * returns.var()


# ---- resume and ranks --------------------------------------------------------------------------


def test_sampler_resumes_and_refuses_another_stream():
    sets = (DataToy(20, 1), DataToy(6))
    whole = real_data.MixSampler(*sets, 0.5, 12, seed=5)
    for _ in range(4):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    samplers = [real_data.MixSampler(*sets, 0.5, 12, 5, rank, 2) for rank in range(2)]
    for sampler in samplers:
        sampler.load_state_dict(state)
    for _ in range(4):
        batch = next(whole)
        for rank, sampler in enumerate(samplers):
            assert np.array_equal(next(sampler)["state"], batch["state"][rank::2])
    with pytest.raises(ValueError, match=r"resume: got .*0\.4.*need .*0\.5"):
        real_data.MixSampler(*sets, 0.4, 12, seed=5).load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [
        dict(alpha=1.2),
        dict(batch=2, world=3),
        dict(sim=None),
        dict(alpha=0, real=None),
        dict(real=DataToy(5, 0, 3)),
    ],
)
def test_sampler_refuses(options):
    sets = dict(sim=DataToy(6), real=DataToy(6), alpha=0.5, batch=4)
    with pytest.raises(ValueError, match="got .*; need .*; try "):
        real_data.MixSampler(**dict(sets, **options))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["openvla", "pi05"])
def test_stage_one_resumes_bit_for_bit(policy):
    check_stage_one_resume(policy)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["openvla", "pi05"])
def test_stage_two_resumes_bit_for_bit(policy):
    folder = check_stage_resume(policy)
    before = (folder / "half/args.json").read_bytes()
    with pytest.raises(ValueError, match="--lr was 0.0002, is 0.1"):
        rl_cotrain.main_job(
            stage_args(folder / "half", policy, watch_real=True, lr=0.1, resume=True)
        )
    assert (folder / "half/args.json").read_bytes() == before, "a refused run changes nothing"
    with pytest.raises(ValueError, match="which holds a run"):
        stage_args(folder / "half", policy)


@pytest.mark.parametrize("change", ["data", "statistics"])
@pytest.mark.parametrize("stage", ["one", "two"])
def test_resume_refuses_what_changed_under_the_same_name(tmp_path, change, stage):
    """The same flags, but the data set or the statistics of the checkpoint are others."""
    shutil.copytree(stage_demos() / "real", tmp_path / "real")
    shutil.copytree(stage_start("openvla"), tmp_path / "policy")

    def run(resume):
        given = dict(real_data=str(tmp_path / "real"), resume=resume)
        if stage == "two":
            args = stage_args(tmp_path / "out", init=str(tmp_path / "policy"), **given)
            return rl_cotrain.main_job(args)
        options = stage_options(tmp_path / "out", sim_data=None, sim_ratio=0.0, **given)
        options.policy = str(tmp_path / "policy")
        return sft_warmstart.warm_start(options)

    assert run(False)
    if change == "data":
        shutil.rmtree(tmp_path / "real")
        episodes = [stage_episode(200 + k, 9 + k) for k in range(4)]
        real_data.write_dataset(tmp_path / "real", episodes, 5)
    else:
        file = tmp_path / "policy/dataset_statistics.json"
        file.write_text(file.read_text().replace("0.04", "0.05"))
    with pytest.raises(ValueError, match="resume: got"):
        run(True)


def test_a_full_disk_is_said_in_our_words_and_keeps_the_last_version(tmp_path):
    """torch and safetensors have words of their own for it."""
    policy = policies.make_tiny("openvla")
    trained = sft_warmstart.trainable(policy)
    sft_warmstart.save_state(tmp_path / "resume.pt", {}, dict(list(trained.items())[:1]), step=1)
    sft_warmstart.save_policy(policy, tmp_path)
    before = evaluate_traces(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="resume.pt: got .*; need room on the disk.*; try "):
            sft_warmstart.save_state(tmp_path / "resume.pt", {}, trained, step=2)
        with pytest.raises(OSError, match="policy.part: got .*; need room on the disk.*; try "):
            sft_warmstart.save_policy(policy, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    shutil.rmtree(tmp_path / "policy.part")  # the next version takes its place
    assert evaluate_traces(tmp_path) == before


def test_a_folder_that_a_running_process_holds_is_refused(tmp_path, monkeypatch, capsys):
    lock = sft_warmstart.run_lock(tmp_path / "out")
    flags = f"--policy {stage_start('openvla')} --steps 0 --eval-episodes 0 --ranks 1"
    monkeypatch.setattr(sys, "argv", ["x.py", *flags.split(), "--out", str(tmp_path / "out")])
    for status in (1, 0):
        with lock if status else contextlib.nullcontext(), pytest.raises(SystemExit) as stop:
            sft_warmstart.run_script(sft_warmstart.warm_start, sft_warmstart.parse)
        said = "out, to which a running process writes; need a folder of its own; try "
        assert stop.value.code == status and (said in capsys.readouterr().err) == bool(status)
        assert (tmp_path / "out").exists() == (not status)


def test_resume_refuses_another_stage_one(tmp_path):
    start = tmp_path / "start"
    shutil.copytree(stage_start("openvla"), start)
    args = dict(init=str(start), lambda_real=0, iterations=1)
    rl_cotrain.main_job(stage_args(tmp_path / "run", **args))
    policies.make_tiny("openvla", seed=5).save(start)
    args["iterations"] = 2
    with pytest.raises(ValueError, match="its start was another"):
        rl_cotrain.main_job(stage_args(tmp_path / "run", resume=True, **args))


def test_lambda_0_and_alpha_open_only_what_they_need(tmp_path, monkeypatch):
    opened = []
    honest = real_data.open_dataset
    monkeypatch.setattr(
        real_data,
        "open_dataset",
        lambda path, *a, **k: opened.append(path) or honest(path, *a, **k),
    )
    rl_cotrain.main_job(stage_args(tmp_path / "rl", lambda_real=0))
    assert not opened and all("real" not in row for row in stage_metrics(tmp_path / "rl"))
    for alpha, domain in ((0.0, "real"), (1.0, "sim")):
        given = {f"{domain}_data": str(stage_demos() / domain)}
        other = dict(sim_data=None, real_data=None, **{}) | given
        options = stage_options(
            tmp_path / domain, sim_ratio=alpha, statistics="data", steps=2, **other
        )
        sft_warmstart.warm_start(options)
        assert [pathlib.Path(path).name for path in opened] == [domain]
        opened.clear()
        assert policies.load_policy(str(tmp_path / domain / "policy")).statistics.keys() == {
            "demos"
        }


def test_stage_two_starts_from_a_base_without_stage_one(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(stage_start("openvla"), base)
    policy = policies.load_policy(str(base))
    policy.statistics = {}                  # as in an official base, which knows no such robot
    policy.save(base)
    args = stage_args(tmp_path / "run", init="base", lambda_real=0)
    args.policy = str(base)
    assert rl_cotrain.main_job(args)
    trained = policies.load_policy(str(tmp_path / "run/policy"))
    assert trained.statistics["panda"]["action"]["q99"] == pytest.approx(envs.ACTION_LIMIT)


STAGE_RANKS = """
import sys
sys.path[:0] = sys.argv[1:3]
import numpy, pathlib, torch, rl_cotrain, sft_warmstart, policies, test_all as stages
with sft_warmstart.process_group():
    sft_warmstart.BUCKET = 100_000  # several messages
    policy = policies.make_tiny("openvla")
    rank, world = sft_warmstart.rank(), sft_warmstart.world()
    whole = stages.stage_rollout(policy, 8)
    rows = torch.arange(rank, 8, world)
    rollout = rl_cotrain.Rollout(
        rl_cotrain.select(whole.inputs, rows), whole.logp[rows], whole.values[:, rows], None,
        whole.rewards[:, rows], None, None, rl_cotrain.normalise(whole.advantages[:, rows]),
        whole.returns[:, rows])
    batch = stages.stage_batch(policy, [0] * 6)
    batch = {key: value[rank::world] for key, value in batch.items()}
    out = sys.argv[3] + f"/run{world}"
    args = stages.stage_args(out, critic="head", minibatch=8, epochs=1, iterations=1)
    args.sft.augment = "none"
    gradients = stages.stage_captured(policy, rollout, stages.StageOnce(batch), args)
    if rank == 0:
        [row] = stages.stage_metrics(pathlib.Path(args.out))
        torch.save([gradients, row], sys.argv[3] + f"/{world}.pt")
"""


def stage_on_one_and_two_ranks(code, tmp_path, monkeypatch):
    """Run a script here, then on two ranks. Returns what each saved, in 1.pt and 2.pt."""
    script = tmp_path / "ranks.py"
    script.write_text(code)
    command = [str(script), str(HERE), str(pathlib.Path(__file__).parent), str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(command[0])
    launch = [sys.executable, "-m", "torch.distributed.run"]
    launch += ["--standalone", "--nproc-per-node", "2"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    run = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [torch.load(tmp_path / f"{n}.pt", weights_only=False) for n in (1, 2)]


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_one(tmp_path, monkeypatch):
    saved = stage_on_one_and_two_ranks(STAGE_RANKS, tmp_path, monkeypatch)
    (one, row_one), (two, row_two) = saved
    for key in ("ppo", "kl", "real", "grad_rl", "grad_real", "cosine", "grad_norm"):
        assert row_one[key] == pytest.approx(row_two[key], rel=1e-3, abs=1e-5), key
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], rtol=1e-3, atol=1e-5) for key in one)


STAGE_FSDP = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch, sft_warmstart, policies, test_all as stages
from sft_warmstart import gathered, rank, world
folder = sys.argv[3]
options = stages.stage_options(folder + "/none", augment="none")
with sft_warmstart.process_group():
    batch = stages.stage_batch(policies.make_tiny("openvla"), [0, 1] * 4)
    batch = {key: value[rank()::world()] for key, value in batch.items()}
    found = []
    for shared in (False, True)[:world()]:
        policy = stages.policy_shaken("openvla")
        if shared:
            sft_warmstart.share_weights(policy)
        for loss, _ in sft_warmstart.supervised_losses(policy, batch, options):
            loss.backward()
        if not shared:
            sft_warmstart.sum_gradients(list(policy.parameters()))
        gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        found.append(gathered(gradients))
    if rank() == 0:
        torch.save(found, f"{folder}/{world()}.pt")
    if world() > 1:
        common = dict(policy="pi05", ema=0.9, fsdp=True, ranks=2)
        folders = [stages.stage_start("pi05"), stages.stage_demos()]
        torch.distributed.broadcast_object_list(folders)
        stages.stage_start, stages.stage_demos = lambda _: folders[0], lambda: folders[1]
        never = sft_warmstart.Signals.received
        after_two = iter([False, False, True])
        for out, received in (("whole", never), ("parts", lambda _: next(after_two)),
                              ("parts", never)):
            sft_warmstart.Signals.received = received
            resume = out == "parts" and received is never
            options = stages.stage_options(f"{folder}/{out}", steps=4, resume=resume, **common)
            sft_warmstart.warm_start(options)
            sft_warmstart.barrier()
"""


@pytest.mark.slow
def test_fsdp_gives_the_gradient_of_one_rank_and_resumes(tmp_path, monkeypatch):
    """Two ranks with and without it; Stage I in shares ends in an ordinary checkpoint."""
    saved = stage_on_one_and_two_ranks(STAGE_FSDP, tmp_path, monkeypatch)
    ((one,), (plain, shared)) = saved
    for two in (plain, shared):
        assert one.keys() == two.keys()
        for name, gradient in one.items():
            assert (gradient - two[name]).abs().max() <= 1e-6 * max(1, gradient.abs().max()), name
    whole = policies.load_policy(str(tmp_path / "whole/policy"))
    parts = policies.load_policy(str(tmp_path / "parts/policy"))
    assert policy_same(whole, parts)
    assert not policy_same(whole, policies.load_policy(str(stage_start("pi05"))))


def test_fsdp_is_refused_where_it_cannot_help(tmp_path):
    for changed in (dict(ranks=1), dict(ranks=3), dict(ranks=2, lora_rank=4)):
        with pytest.raises(ValueError, match="--fsdp: got .*; need .*; try"):
            stage_options(tmp_path / "run", fsdp=True, **changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, number, status", [(2, signal.SIGINT, 130), (1, signal.SIGKILL, -signal.SIGKILL)]
)
def test_signals_leave_a_checkpoint(ranks, number, status, tmp_path, monkeypatch):
    out = tmp_path / "run"
    flags = {
        "--init": stage_start("openvla"),
        "--real-data": stage_demos() / "real",
        "--eval-episodes": 0,
        "--num-envs": 4,
        "--horizon": 3,
        "--minibatch": 6,
        "--real-batch": 4,
        "--iterations": 9999,
        "--ranks": ranks,
        "--out": out,
    }
    run = stage_process("rl_cotrain.py", *itertools.chain.from_iterable(flags.items()))
    while not (out / "resume.pt").exists():  # written every 10 iterations
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    run.send_signal(number)
    assert run.wait(90) == status
    assert ("--resume" in run.stderr.read()) == (number == signal.SIGINT)
    rows = stage_metrics(out)
    assert (
        1 <= stage_state(out)["iteration"] <= rows[-1]["step"] and not (out / "policy").exists()
    )


@pytest.mark.parametrize("bad, stops", [({2}, False), (set(range(99)), True)])
def test_steps_that_are_not_finite_are_skipped_then_stop(bad, stops, tmp_path, monkeypatch):
    honest = sft_warmstart.sum_gradients
    calls = []

    def broken(parameters):
        honest(parameters)
        calls.append(0)
        if len(calls) in bad:
            parameters[0].grad.fill_(math.nan)

    monkeypatch.setattr(sft_warmstart, "sum_gradients", broken)
    options = stage_options(tmp_path / "run")
    if stops:
        with pytest.raises(RuntimeError, match="not finite 5 times in a row"):
            sft_warmstart.warm_start(options)
        return
    sft_warmstart.warm_start(options)
    assert all(torch.isfinite(w).all() for w in stage_state(tmp_path / "run")["weights"].values())
    assert stage_metrics(tmp_path / "run")[-1]["skipped"] == 1


def test_the_policy_folder_is_replaced_whole(tmp_path, monkeypatch):
    """A run that is killed while saving leaves an older or the newer folder."""
    policy = policies.make_tiny("openvla")
    sft_warmstart.save_policy(policy, tmp_path)
    replace = os.replace
    for fatal in (1, 2):
        calls = []

        def killed(*paths):
            calls.append(paths)
            if len(calls) == fatal:
                raise KeyboardInterrupt
            replace(*paths)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            sft_warmstart.save_policy(policy, tmp_path)
        monkeypatch.undo()
        whole = [folder for folder in tmp_path.iterdir() if (folder / "policy.json").exists()]
        policies.load_policy(str(sorted(whole)[0]))
        sft_warmstart.save_policy(policy, tmp_path)
        assert [folder.name for folder in tmp_path.iterdir()] == ["policy"]


@pytest.mark.slow
def test_pretrain_resumes_bit_exactly_and_leaves_no_probe(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = "--policy openvla --episodes 4 --first-images 40 --steps 2 --batch 6 --eval-episodes 0"
    flags += f" --ranks 1 --demos {tmp_path} --out {tmp_path}/"

    def run(out):
        return pretrain.pretrain(pretrain.parse((flags + out).split()))

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.sft_warmstart.Signals, "received", lambda signals: True)
        assert run("halves") is None
    # load_policy refuses unknown tensors, such as those of a probe.
    resumed = policies.load_policy(str(run("halves --resume")))
    whole = policies.load_policy(str(run("whole")))
    for p, q in zip(resumed.parameters(), whole.parameters()):
        assert torch.equal(p, q)


KILLS = int(os.environ.get("KILLS", 1))      # of each program
# What a program makes under a temporary name, and removes or renames in the end.
TEMPORARY = ("*.part", "policy.old", ".writing-*", "decoding-*", "*.tmp")

# Saving is frequent, so that many kills hit it. Processes of a pool run the first lines, too.
DRIVER = """
import sys
sys.path.insert(0, {repository!r})
import evaluate, rl_cotrain, sft_warmstart
evaluate.BLOCK = 2
rl_cotrain.SAVE_EVERY = 1
sft_warmstart.SAVE_EVERY = 1
sft_warmstart.LOG_EVERY = 1
if __name__ == "__main__":
    {main}
"""
MAIN = dict(
    sft_warmstart="sft_warmstart.run_script(sft_warmstart.warm_start, sft_warmstart.parse)",
    rl_cotrain="sft_warmstart.run_script(rl_cotrain.main_job, rl_cotrain.parse)",
    evaluate="evaluate.main()",
)


def kill_flags(program):
    """Return a command line; Stage I records its demonstrations."""
    if program == "evaluate":
        return "--checkpoint pi05 --domain sim --episodes 6 --workers 1 --videos 1"
    flags = f"--real-data {stage_demos()}/real --eval-episodes 0 --ranks 1"
    if program == "rl_cotrain":
        flags += f" --init {stage_start('openvla')} --num-envs 2 --horizon 2 --minibatch 4"
        return flags + " --real-batch 2 --iterations 24"
    flags = "--policy openvla --task close-drawer --real-episodes 2 --sim-ratio 0 --held-out 0.5"
    return flags + " --batch 4 --steps 30 --eval-episodes 0 --ranks 1"


def kill_series(command, out, kills, rng, longest=4.0):
    """Start a command, and kill it and all its processes at a random moment.

    Half of the moments are 0 to `longest` seconds after the start; the others are up to a
    second after something was saved. Goes on with --resume as soon as there is something to go
    on with. After `kills` kills the command may finish. Returns the number of kills: fewer, if it
    finished before.
    """
    for count in range(kills + 1):
        before = kill_saved(out)
        flags = ["--resume"] if before else []
        with open(out.with_name("log.txt"), "w+") as log:
            run = subprocess.Popen(
                [*command, *flags], stdout=log, stderr=log, cwd=out.parent, start_new_session=True,
                env=dict(os.environ, XDG_CACHE_HOME=str(out.parent / "cache")),
            )
            seconds = rng.uniform(0, longest)
            if rng.random() < 0.5:
                seconds = rng.uniform(0, 1)
                while run.poll() is None and kill_saved(out) == before:
                    time.sleep(0.005)
            try:
                status = run.wait(seconds if count < kills else 300)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
                log.seek(0)
                said = log.read().replace("\r", "\n").strip().splitlines()[-1:]
                print("killed:", *flags, *said, *kill_left(out.parent))
                continue
            log.seek(0)
            assert status == 0, log.read()
            return count


def kill_saved(out):
    """Return when what a run goes on from was saved [ns]; 0: not yet."""
    times = [0]
    for path in (out / "resume.pt", out / "episodes.jsonl"):
        if path.exists():
            times.append(path.stat().st_mtime_ns)
    return max(times)


def kill_left(folder):
    """Return what is there under a temporary name."""
    found = []
    for pattern in TEMPORARY:
        found += [str(path.relative_to(folder)) for path in folder.rglob(pattern)]
    return found


def kill_results(folder):
    """Return the metrics without times, the results without the command, and all weights."""
    results = {}
    for path in sorted((folder / "out").rglob("*.*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            results[name] = [{k: v for k, v in row.items() if "_s" not in k} for row in rows]
        elif path.name == "result.json":
            results[name] = dict(json.loads(path.read_text()), command=None)
        elif path.suffix == ".safetensors":
            results[name] = path.read_bytes()
        else:
            results[name] = None
    for path in (folder / "runs").rglob("*.*"):
        results[str(path.relative_to(folder))] = None
    return results


def kill_whole(program, folder, monkeypatch):
    """Run a program without a kill, in this process; return its results."""
    folder.mkdir()
    flags = [*kill_flags(program).split(), "--out", "out"]
    with monkeypatch.context() as patch, sft_warmstart.process_group():
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(evaluate, "BLOCK", 2)
        patch.setattr(sft_warmstart, "LOG_EVERY", 1)
        if program == "evaluate":
            pool = contextlib.nullcontext(EvaluatePool())
            patch.setattr(evaluate, "worker_processes", lambda count, device: pool)
            evaluate.main(flags)
        if program == "sft_warmstart":
            assert sft_warmstart.warm_start(sft_warmstart.parse(flags))
        if program == "rl_cotrain":
            assert rl_cotrain.main_job(rl_cotrain.parse(flags))
    return kill_results(folder)


def kill_and_compare(program, folder, expected):
    """Kill a program KILLS times in all; each time that it ends, its results are those expected."""
    folder.mkdir()
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(repository=str(HERE), main=MAIN[program]))
    command = [sys.executable, str(driver), *kill_flags(program).split(), "--out", "out"]
    rng = np.random.default_rng([int(os.environ.get("KILL_SEED", 0)), len(program)])
    left = KILLS
    while left > 0:
        cut = folder / f"cut{left}"
        cut.mkdir()
        left -= kill_series(command, cut / "out", left, rng)
        assert kill_results(cut) == expected
        assert kill_left(cut) == []


@pytest.mark.slow
def test_killed_at_random_moments_everything_ends_with_the_same_results(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = {program: kill_whole(program, tmp_path / program, monkeypatch) for program in MAIN}
    with concurrent.futures.ThreadPoolExecutor() as threads:      # the programs are processes
        runs = []
        for program, expected in whole.items():
            folder = tmp_path / f"{program}-killed"
            runs.append(threads.submit(kill_and_compare, program, folder, expected))
    for run in runs:
        run.result()


# ---- command line ------------------------------------------------------------------------------


@pytest.mark.slow
def test_envs_demo(tmp_path):
    command = [sys.executable, HERE / "envs.py", "--out", tmp_path, "--episodes", "2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("[") == 8 and "control steps/s" in run.stdout
    assert len(list(tmp_path.glob("*.mp4"))) == 8


@pytest.fixture
def run_doctor(tmp_path, monkeypatch, capsys):
    """Run `python real_data.py ..` in this process; return its exit status and all it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["real_data.py", *map(str, arguments)])
        status = 0
        try:
            real_data.main()
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr()
        return types.SimpleNamespace(returncode=status, stdout=said.out, stderr=said.err)

    return run


@pytest.mark.slow
def test_doctor_records_describes_and_finds_its_own_data_ready(tmp_path, run_doctor):
    make = "set --make --domain real --task close-drawer --episodes 2 --image-size 32".split()
    run = run_doctor(*make)
    assert run.returncode == 0, run.stderr
    camera = real_data.CAMERA
    for part in (
        "LeRobot v3.0",
        f"camera   {camera} out of {camera}",
        "episodes 2",
        "rate     5 actions a second, 5 in simulation",
        "tokens   'close the drawer': 3, \u2581close \u2581the \u2581drawer",
        "of the frames open (+1)",
        "ready for --real-data set",
    ):
        assert part in run.stdout, run.stdout
    assert Image.open(tmp_path / "card.png").size == (8 * 32, 2 * 32)
    again = run_doctor(*make)
    assert again.returncode == 1
    assert again.stderr.startswith("error: out: got set, which exists; need a new folder; try")
    assert again.stderr.count("\n") == 1


def test_doctor_lists_everything_that_is_not_ready(tmp_path, run_doctor):
    images, states, actions, _, scene = data_episode(0, 30)
    actions[:, 0] = 0.08                                  # twice what the bundled policies do
    actions[:, 3:6] *= 57.3                               # degrees
    actions[:, 6] = (actions[:, 6] + 1) / 2               # 0 closed, 1 open
    texts = ["\u6253\u5f00\u62bd\u5c49", "\u5173\u4e0a\u62bd\u5c49"]    # open, close the drawer
    episodes = [(images, states, actions, text, scene) for text in texts]
    real_data.write_dataset(tmp_path / "set", episodes, 10)
    run = run_doctor("set", "--image-size", 16)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    listed = run.stdout[run.stdout.index("not ready for --real-data:") :]
    for part in (
        "* set: turns: got ",
        "* set: gripper: got ",
        "same",                                           # both tasks have the same tokens
        "* set: got frames beyond the policy's range, q01 .. q99 as -1 .. 1: dx 100.00% (up to 2",
        "--statistics data",
    ):
        assert part in listed, run.stdout
    assert "10 actions a second, 5 in simulation" in run.stdout and "control-rate" in run.stdout
    assert not listed.count("actions: got 7")
    for line in listed.splitlines()[1:]:
        assert re.search("got .*; need .*; try ", line), line


def test_doctor_names_other_sizes_and_its_hook(tmp_path, run_doctor):
    images, states, actions, text, scene = data_episode(0, 9)
    for count in (14, 8):
        wide = np.column_stack([actions, actions])[:, :count]
        folder = tmp_path / f"set{count}"
        real_data.write_dataset(folder, [(images, states, wide, text, scene)], 5)
        run = run_doctor(folder, "--image-size", 16)
        assert run.returncode == 1 and "Traceback" not in run.stderr
        assert f"actions: got {count} numbers; need 7 (deltas of one end effector" in run.stdout
        assert "a Python file of your own" in run.stdout


def test_evaluate_tables_and_comparisons(tmp_path, monkeypatch, capsys):
    outcomes = dict(openvla="1" + 11 * "0", pi05="0" + 9 * "1" + "00")

    def run(args):
        evaluate.claim(args)
        results = {}
        for checkpoint, domain in itertools.product(args.checkpoint, args.domains):
            cell = evaluate.Cell(checkpoint, "open-drawer", domain, "demonstrated")
            results[cell] = evaluate_outcomes(outcomes[checkpoint])
        return results

    monkeypatch.setattr(evaluate, "run", run)
    evaluate.main(f"--checkpoint openvla pi05 --out {tmp_path}".split())
    got = json.loads((tmp_path / "result.json").read_text())
    assert len(got["cells"]) == 4
    assert got["cells"][1]["domain"] == "stand-in"
    assert got["cells"][1]["episodes"] == evaluate_outcomes(outcomes["openvla"])
    pairs = [(row["first"], row["second"]) for row in got["comparisons"]]
    assert pairs == [("openvla", "pi05"), ("openvla", "pi05")]
    text = capsys.readouterr().out
    for number in ("75.0%", "+66.7%", "0.021"):
        assert number in text


@pytest.mark.slow
def test_evaluate_command_gives_the_rates_of_the_training_stages(tmp_path):
    """Two processes give, episode by episode, what success_rates gives in this one."""
    policy = policies.make_tiny("pi05")
    policy.save(tmp_path / "policy")
    flags = "--domain real --episodes 27 --workers 2"
    evaluate.main(f"--checkpoint {tmp_path} --out {tmp_path} {flags}".split())
    cells = json.loads((tmp_path / "result.json").read_text())["cells"]
    rates = evaluate.success_rates(policy, ["open-drawer"], ["real"], 27)
    episodes = rates["stand-in/open-drawer"]
    assert [cell["episodes"] for cell in cells] == [episodes, episodes[::2], episodes[1::2]]
    variants = [cell["variant"] for cell in cells]
    assert variants == ["whole-table", "demonstrated", "other-places"]
    assert list(tmp_path.glob("videos/*/open-drawer-stand-in-whole-table/*.mp4"))


def test_hierarchical_interval_counts_scenes_and_seeds():
    """One seed: the interval of a success rate. Seeds that differ widen it, tasks are fixed."""
    rng = np.random.default_rng(0)
    alike = rng.random((1, 1, 400)) < 0.3
    got = evaluate.hierarchical_interval(alike)
    sigma = (alike.mean() * (1 - alike.mean()) / 400) ** 0.5
    assert got["mean"] == alike.mean()
    assert abs(got["high"] - got["low"] - 2 * 1.96 * sigma) < 0.1 * sigma * 4
    seeds = np.zeros((1, 4, 400), bool)
    seeds[:, 2:] = True                             # two seeds always succeed, two never
    got = evaluate.hierarchical_interval(seeds)
    assert got["mean"] == 0.5 and got["low"] == 0 and got["high"] == 1
    tasks = np.swapaxes(seeds, 0, 1)                # what differs are tasks, not seeds
    got = evaluate.hierarchical_interval(tasks)
    assert got["low"] == got["high"] == 0.5


STUDY_PYTHON = """
import json, os, pathlib, sys
script, *flags = sys.argv[1:]
out = pathlib.Path(flags[flags.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
with open("commands.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if pathlib.Path("broken").exists() and script == "rl_cotrain.py":
    (out / "resume.pt").touch()
    sys.exit("error: --lr: got nonsense")
if script != "evaluate.py":
    (out / "policy").mkdir()
    rows = [{"step": k, "success": k / 4, "held_out/real": 2.0, "iteration_s": 3.0} for k in (1, 2)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
else:
    seed = "seed1" in out.name
    good = "rl-" in out.name                        # Stage II succeeds where Stage I does not
    cells = []
    for domain in ("sim", "stand-in"):
        for variant in ("whole-table", "demonstrated"):
            episodes = [{"success": k < 5 + 5 * good + 2 * seed} for k in range(20)]
            cells.append({"domain": domain, "variant": variant, "episodes": episodes})
    (out / "result.json").write_text(json.dumps({"cells": cells}))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Make a study of two arms whose commands a script answers; return what runs it."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{STUDY_PYTHON}")
    script.chmod(0o755)
    monkeypatch.setattr(evaluate.sys, "executable", str(script))
    arms = [evaluate.Arm("SFT"), evaluate.Arm("RL-Co", "", "--lambda-real 3")]
    monkeypatch.setitem(evaluate.STUDIES, "mini", evaluate.Study(arms, "SFT", "more on a robot"))

    def run(flags, capsys):
        status = 0
        try:
            command = f"--study mini --policy openvla --task push-cube --episodes 20 {flags}"
            evaluate.main(command.split())
        except SystemExit as stop:
            status = stop.code
        ran = pathlib.Path("commands.txt").read_text().splitlines()
        pathlib.Path("commands.txt").write_text("")
        out, err = capsys.readouterr()
        return status, out + err, ran

    return run


def test_study_runs_what_is_missing(study, capsys):
    """Stage I runs once a seed; a failed job is named; the same command goes on, adds seeds."""
    pathlib.Path("broken").touch()
    status, text, ran = study("--seeds 1 --workers 1", capsys)
    assert status == 1 and "rl_cotrain.py" in text and "(error: --lr: got nonsense)" in text
    pathlib.Path("broken").unlink()
    status, text, ran = study("--seeds 1 --workers 2", capsys)
    assert status == 0 and "wrote results/mini/cells.json" in text, text
    assert [line.split()[0] for line in ran] == ["rl_cotrain.py", "evaluate.py"]
    assert ran[0].endswith("--resume") and "--lambda-real 3" in ran[0]
    assert study("--seeds 1", capsys)[2] == []
    status, text, ran = study("--seeds 2", capsys)
    scripts = sorted(line.split()[0] for line in ran)
    assert scripts == ["evaluate.py", "evaluate.py", "rl_cotrain.py", "sft_warmstart.py"]
    assert all("seed1" in line for line in ran)
    assert pathlib.Path("results/mini/figure.png").exists()
    (sft, rl) = [line for line in text.splitlines() if line.startswith("openvla  ")]
    assert "30.0%" in sft and "55.0%" in rl and "+25.0%" in rl      # means of 5 and 7, 10 and 12
    assert sft.split()[-1] == "30.0%", "the last column is the task's"
    assert "paper: more on a robot" in text


@pytest.mark.parametrize("name", evaluate.STUDIES)
def test_study_commands_are_read_by_the_scripts(name, tmp_path, monkeypatch):
    """Each flag of a study exists, and each arm has runs of its own."""
    monkeypatch.chdir(tmp_path)
    args = evaluate.parse(["--study", name])
    assert args.seeds == 3 and args.tasks == list(envs.TASKS) and args.episodes >= 200
    study_ = evaluate.STUDIES[name]
    assert study_.baseline in [arm.name for arm in study_.arms]
    results = set()
    for arm in study_.arms:
        jobs = evaluate.jobs_of(args, arm, "openvla", "push-cube", 1)
        results.add(jobs[-1].result)
        for job in jobs:
            script, *flags = job.command
            if script == "sft_warmstart.py":
                options = sft_warmstart.parse(flags)
                assert options.seed == 1
                shutil.copytree(policies.find_folder("openvla"), job.result)
            if script == "rl_cotrain.py":
                args_two = rl_cotrain.parse(flags)
                assert args_two.task == "push-cube" and args_two.seed == 1
                job.result.mkdir(parents=True)
        shutil.rmtree("runs")
    assert len(results) == len(study_.arms)


def test_evaluate_parse(tmp_path):
    (tmp_path / "policy").mkdir()
    args = evaluate.parse(f"--checkpoint {tmp_path} --task all --variants all".split())
    assert args.tasks == list(envs.TASKS)
    assert args.variants == list(envs.VARIANTS)
    assert args.domains == ["sim", "real"]
    assert args.checkpoint == [str(tmp_path)]
    numbers = "--episodes 0 --workers -1 --videos -1 --seed -1"
    with pytest.raises(ValueError) as caught:
        evaluate.parse(f"--checkpoint /nowhere --curves /none {numbers}".split())
    lines = str(caught.value).splitlines()
    assert len(lines) == 8          # two modes at once, flags of the other, four numbers, two files
    for line in lines:
        assert re.search(": got .*; need .*; try ", line)


def test_first_ratio_is_one_or_the_run_stops():
    check_stage_ratio()
    check_stage_ratio(stale=0.1)


def test_target_kl_ends_the_updates_of_an_iteration(tmp_path):
    counts = []
    for target in (0.0, 1e-7):
        args = stage_args(
            tmp_path / f"{target}",
            lambda_real=0,
            num_envs=16,
            horizon=2,
            epochs=4,
            target_kl=target,
        )
        args.minibatch = 8
        rl_cotrain.co_train(StagePolicy(), StageEnv(), None, args)
        counts.append(stage_metrics(tmp_path / f"{target}")[0]["updates"])
    assert counts == [16, 2], "at once, not after an epoch"


def test_bf16_takes_the_log_probs_of_evaluate():
    policy = policies.load_policy(str(stage_start("openvla")), dtype="bf16")
    args = types.SimpleNamespace(horizon=2, seed=0, dtype="bf16", micro_batch=64)
    rollout, _ = rl_cotrain.collect(policy, StageEnv(), None, args, 0)
    acted = rollout.logp.clone()
    rl_cotrain.check_log_probs(policy, rollout, args)
    assert not torch.equal(acted, rollout.logp) and torch.allclose(acted, rollout.logp, atol=0.5)
    rollout.logp = rollout.logp + 1
    with pytest.raises(RuntimeError, match="act and evaluate disagree"):
        rl_cotrain.check_log_probs(policy, rollout, args)


def stage_refusal(parse, flags):
    """The message of the ValueError that a command line leads to."""
    with pytest.raises(ValueError) as error:
        parse(flags.split())
    return str(error.value)


def test_wrong_flags_are_listed_together():
    said = stage_refusal(
        sft_warmstart.parse, "--sim-ratio 1.5 --held-out -1 --resume --batch 0 --camera x"
    )
    assert "--sim-ratio: got 1.5; need 0 to 1" in said
    assert all(flag in said for flag in ("--held-out", "--resume", "--batch", "--camera"))
    said = stage_refusal(rl_cotrain.parse, "--lambda-real -1 --epochs 0 --ranks 3")
    assert "--lambda-real: got -1" in said and "--epochs" in said
    assert "--num-envs: got 64; need a multiple of the 3 ranks" in said


@pytest.mark.parametrize(
    "flags, what",
    [
        ("--init base --lambda-real 0 --real-data x", "--real-data"),
        ("--init x --policy pi05", "--policy"),
        ("--init base --sim-ratio 0.3", "--sim-ratio"),
        ("--real-data x --real-episodes 5", "--real-episodes"),
        ("--camera front", "--camera"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags, what):
    assert stage_refusal(rl_cotrain.parse, flags).startswith(what)


def stage_words(folder, *texts):
    """Write a data set with these tasks; return its path."""
    episodes = []
    for number, text in enumerate(texts * 2):
        images, states, actions, _, _ = stage_episode(number, 9)
        episodes.append((images, states, actions, text, number))
    real_data.write_dataset(folder / "set", episodes, 5)
    return folder / "set"


@pytest.mark.parametrize("program", [sft_warmstart, rl_cotrain])
@pytest.mark.parametrize("flags, said", [
    ("--real-data nowhere", "error: data set: got nowhere"),
    ("--real-data set --convert nowhere.py", "error: --convert nowhere.py: got FileNotFound"),
    ("--real-data set --convert gripper-open-1", "error: set: gripper: got "),
    ("--real-data set", "error: instructions: got "),
    ("--load steps=3", "error: settings of openvla: got ['steps']"),
])
def test_a_refused_stage_leaves_no_trace(tmp_path, monkeypatch, capsys, program, flags, said):
    """Whatever is found out, however late: one line, and no file is new or changed."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    stage_words(tmp_path / "here", "\u6253\u5f00\u62bd\u5c49", "\u5173\u4e0a\u62bd\u5c49")
    before = evaluate_traces(tmp_path / "here")
    start = f"--policy {stage_start('openvla')} --sim-ratio 0 --ranks 1 --out out"
    if program is rl_cotrain:
        start = f"--init {stage_start('openvla')} --ranks 1 --out out"
    monkeypatch.setattr(sys, "argv", ["program.py", *start.split(), *flags.split()])
    job = dict(sft_warmstart="warm_start", rl_cotrain="main_job")[program.__name__]
    with pytest.raises(SystemExit) as stop:
        sft_warmstart.run_script(getattr(program, job), program.parse)
    text = capsys.readouterr().err
    assert stop.value.code == 1 and said in text and "; try " in text
    assert sum(line.startswith("error: ") for line in text.splitlines()) == 1
    assert evaluate_traces(tmp_path / "here") == before


def test_stage_one_says_what_it_was_given(tmp_path, capsys):
    """The camera, the statistics, the rate, and actions beyond the policy's range."""
    images, states, actions, text, _ = stage_episode(0, 9)
    actions[:, 0] = 0.09
    real_data.write_dataset(tmp_path / "set", [(images, states, actions, text, 0)] * 4, 10)
    options = stage_options(
        tmp_path / "out", sim_ratio=0, sim_data=None, real_data=str(tmp_path / "set"), steps=1,
        statistics="base",
    )
    beyond = "beyond the policy's range.*: dx 100.00% .*--statistics data"
    with pytest.warns(UserWarning, match=beyond):
        assert sft_warmstart.warm_start(options)
    said = capsys.readouterr().err
    for words in (
        "statistics: panda", "camera observation.images.front out of", "10 actions a",
        "actions and gripper as the contract has them", "frames move (--pause)",
    ):
        assert words in said


def test_presets_follow_policy_and_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sft_warmstart.parse(["--policy", "openvla"]).freeze == "vision"
    assert sft_warmstart.parse(["--policy", "pi05"]).steps == 2100
    args = rl_cotrain.parse(["--policy", "openvla", "--lambda-real", "0.1"])
    assert args.randomise == ["places", "dynamics"] and args.critic == "state"
    assert args.sft.out == "runs/sft-openvla-all-alpha0.5-real50-seed0"
    assert rl_cotrain.parse(["--task", "pick-place"]).randomise == ["places", "dynamics"]
    assert rl_cotrain.parse(["--task", "pick-place", "--randomise", "dynamics"]).randomise == [
        "dynamics"
    ]
    given = rl_cotrain.parse(["--init", str(stage_start("pi05"))])
    assert given.num_envs == 128 and given.policy == str(stage_start("pi05"))
    with pytest.raises(SystemExit):
        rl_cotrain.parse(["--task", "open"])


@pytest.mark.slow
def test_main_job_small(tmp_path, capsys, monkeypatch):
    """All parts of the main job, at a small size; another task finds Stage I."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sft_warmstart.PRESETS["pi05-tiny"], "steps", 2)
    few = functools.partial(sft_warmstart.Options, sim_episodes=2)
    monkeypatch.setattr(sft_warmstart, "Options", few)
    small = dict(
        policy="pi05",
        real_episodes=2,
        iterations=1,
        num_envs=2,
        horizon=2,
        minibatch=4,
        real_batch=4,
        ranks=1,
        eval_episodes=2,
    )
    args = rl_cotrain.Args(task="close-drawer", **small).resolve()
    assert rl_cotrain.main_job(args)
    out = pathlib.Path("runs/rl-pi05-close-drawer-lambda0.1-seed0")
    result = json.loads((out / "result.json").read_text())
    places = [("whole-table", 2), ("demonstrated", 1), ("other-places", 1)]
    assert [(row["domain"], row["places"], row["n"]) for row in result["rows"]] == [
        (domain, *place) for domain in ("sim", "stand-in") for place in places
    ]
    assert list(out.glob("videos/*/*.mp4")) and (out / "curves.png").exists()
    policy = policies.load_policy(str(out / "policy"))
    assert policy.kind == "pi05" and policy.deployment["base"]["name"] == "pi05"
    assert {"close the drawer", "open the drawer"} <= {*policy.deployment["instructions"]}
    assert not any("{" in text for text in policy.deployment["instructions"])
    printed = capsys.readouterr()
    assert (
        "SFT co-training, then RL-Co, lambda 0.1, randomised places, dynamics"
        in printed.err
    )
    assert "95 % interval" in printed.out
    stage_one = pathlib.Path("runs/sft-pi05-all-alpha0.5-real2-seed0/policy")
    made = stage_one.stat().st_mtime
    args = rl_cotrain.Args(
        task="push-cube", lambda_real=0.0, **dict(small, eval_episodes=0)
    ).resolve()
    assert rl_cotrain.main_job(args) and stage_one.stat().st_mtime == made


@pytest.mark.slow
def test_an_error_in_a_rank_is_one_line(tmp_path):
    run = stage_process(
        "sft_warmstart.py",
        "--sim-ratio",
        0,
        "--real-data",
        "/nothing/here",
        "--out",
        tmp_path,
        "--ranks",
        2,
    )
    said = run.stderr.read()
    assert run.wait(90) == 1 and "Traceback" not in said
    assert (
        sum(line.startswith("error: data set: got /nothing/here") for line in said.splitlines())
        == 1
    )


@pytest.mark.parametrize("name", ARCH_FILES)
def test_architecture(name):
    """The import graph, the dependencies and the width of the lines."""
    tree = arch_tree(name)
    used = arch_imports(ast.walk(tree))
    assert used & set(ARCH_FILES) <= ARCH_MAY_IMPORT[name]
    assert used - set(ARCH_FILES) - set(sys.stdlib_module_names) <= ARCH_INSTALLED
    if name == "real_data":
        assert not set(ARCH_FILES) & arch_imports(tree.body)
    source = (HERE / f"{name}.py").read_text()
    assert max(map(len, source.splitlines())) <= 100
    assert arch_leaks(source) == set()


def test_leaks_are_found():
    assert arch_leaks("def f():\n    return x\nif __name__ == '__main__':\n    x = 1\n") == {"x"}
    assert arch_leaks("y = 1\ndef f():\n    return y\n") == set()


def test_copies_of_the_error_list_are_the_same():
    copies = {inspect.getsource(module.Problems) for module in (envs, policies, real_data)}
    assert len(copies) == 1


@pytest.mark.parametrize(
    "script", ["rl_cotrain.py", "sft_warmstart.py", "evaluate.py", "real_data.py", "envs.py"]
)
def test_flags_are_few_and_explained(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(HERE / script), run_name="__main__")
    text = capsys.readouterr().out
    options = text[text.index("options:") :]
    flags = re.findall(r"^  (--[\w-]+)(.*(?:\n {10,}.*)*)", options, re.M)
    assert 2 <= len(flags) <= 30
    for flag, rest in flags:
        assert re.search(r"[a-z]{4,}", rest), f"{flag} has no help"


def test_the_continuous_integration_runs_the_command_of_the_readme():
    """.ci/run extracts the block under "## Tests": it must install and test."""
    block = (HERE / "README.md").read_text().split("## Tests")[1].split("```")[1]
    assert "requirements.txt" in block and "python test_all.py" in block
    assert "## Tests" in (HERE / ".ci/run").read_text()


# ---- mutants -----------------------------------------------------------------------------------


MUTANTS += [
    Mutant(
        envs, envs, "forward_kinematics", "[1, 2, 0]] * arm[..., [2, 0, 1]] -", "[1, 2, 0]] -",
        check_env_kinematics),
    Mutant(
        envs, envs.VecEnv, "events", " & ~self.touched[ids]", "",
        check_env_rewards),
    Mutant(
        envs, envs.VecEnv, "advance", "clip(self.target[ids]", "clip(self.tcp[ids]",
        check_env_targets),
    Mutant(
        envs, envs.VecEnv, "advance", "block + 1 - self.latency", "block + 1 + 0 * self.latency",
        check_env_latency),
    Mutant(
        envs, envs.VecEnv, "arrange", "self.domain), self.episode[i]]", "self.domain), i]",
        check_env_same_episode),
    Mutant(
        envs, envs.VecEnv, "arrange", "numbers[self.restarts[i]]", "numbers[-1]",
        check_env_group),
    Mutant(
        envs, envs.VecEnv, "step", " | self.over", "",
        check_env_frozen),
    Mutant(
        envs, envs.VecEnv, "step", " | self.diverged", "",
        check_env_diverged),
    Mutant(
        envs, envs.PickPlace, "measure", " & (height < self.HEIGHT)", "",
        check_env_success),
    Mutant(
        envs, envs.PushCube, "place", "colours[sampled.named]", "colours[0]",
        check_env_instruction)]


POLICY_MUTANTS = [
    (policies.Pi05, "transition", "x - t * v", "x + t * v", check_policy_chain),
    (policies.Pi05, "chain_logp", " - std.log()", "", check_policy_chain),
    (
        policies.Pi05,
        "chain_logp",
        "x.shape[1] + 1",
        "x.shape[1]",
        check_policy_chain,
    ),
    (policies.Pi05, "transition", "/ (2 * t)", "/ t", check_policy_sde),
    (policies.Pi05, "time_embedding", "4e-3", "4e-2", check_policy_openpi),
    (
        policies.Pi05,
        "velocity",
        "valid.sum(1, keepdim=True)",
        "valid.shape[1] + 0 * valid[:, :1]",
        check_policy_agreement_pi05,
    ),
    (
        policies.OpenVLA,
        "hidden",
        "causal & valid[:, None, None]",
        "causal[None, None]",
        check_policy_agreement_openvla,
    ),
    (
        policies.OpenVLA,
        "act",
        "keepdim=True) - 1",
        "keepdim=True)",
        check_policy_agreement_openvla,
    ),
    (
        policies.OpenVLA,
        "encode_values",
        "self.vocab -",
        "self.vocab - 1 -",
        check_policy_tokens,
    ),
    (policies.OpenVLA, "decode_tokens", "- 1)", "- 2)", check_policy_tokens),
]
MUTANTS += [Mutant(policies, *change) for change in POLICY_MUTANTS]


DATA_MIX = real_data.MixSampler
MUTANTS += [
    Mutant(real_data, owner, name, old, new, check)
    for owner, name, old, new, check in (
        (real_data.Demos, "chunks", "ends - 1)", "len(self.actions) - 1)", check_data_reading),
        (real_data.Demos, "chunks", "window >= ends", "window > ends", check_data_reading),
        (real_data.Demos, "without_pauses", " | first)", ")", check_data_pauses),
        (real_data, "plan_frames", "count(first)", "count()", check_data_reading),
        (real_data, "decode", "+ slot", "+ 1 - slot", check_data_reading),
        (real_data, "resize", "BILINEAR", "BICUBIC", check_data_resize),
        (real_data, "widen", 'stats["min"][d]', 'stats["q01"][d]', check_data_widen),
        (real_data, "record", "label[i]", "executed[i]", check_data_record),
        (DATA_MIX, "__next__", "self.step]", "self.step, self.rank]", check_data_sampler),
        (DATA_MIX, "__next__", "(self.rank, self.batch", "(0, self.batch", check_data_sampler),
        (DATA_MIX, "__next__", "< self.alpha", "< 40 / 48", check_data_sampler),
        (DATA_MIX, "draw", "which, turn]", "which]", check_data_sampler),
    )
]


EVALUATE_MUTANTS = [
    ("wilson", "Z**2 / 4", "Z**2 / 2", check_evaluate_wilson),
    ("compare", "min(1.0, 2 *", "min(1.0, 1 *", check_evaluate_mcnemar),
    ("compare", "centre = (c - b) / (n + 2)", "centre = (c - b) / n", check_evaluate_interval),
    ("summary", 'not episode["touched"]', 'episode["touched"]', check_evaluate_summary),
    ("noise_generator", "[seed, number]", "seed", check_evaluate_noise),
    ("run_block", "block * env.num_envs", "0 * block", check_evaluate_episodes),
    ("run_block", "if i not in running:", "if False:", check_evaluate_episodes),
    ("run_block", "actions[running] = chunk", "actions[:] = 1", check_evaluate_episodes),
]
for name, old, new, check in EVALUATE_MUTANTS:
    MUTANTS.append(Mutant(evaluate, evaluate, name, old, new, check))


MUTANTS += [
    Mutant(
        sft_warmstart,
        sft_warmstart,
        "supervised_losses",
        "share[0] * real + share[1] * sim",
        "real + sim",
        check_stage_supervised,
    ),
    Mutant(
        sft_warmstart,
        sft_warmstart,
        "supervised_losses",
        "keep / steps[in_sim.long(), None]",
        "1 / steps[in_sim.long(), None] + 0 * keep",
        lambda: check_stage_supervised("pi05"),
    ),
    Mutant(
        sft_warmstart,
        sft_warmstart,
        "supervised_losses",
        "samples / samples.sum()",
        "samples / 16",
        check_stage_supervised,
    ),
]
for stage_name, stage_old, stage_new, stage_check in (
    (
        "co_train",
        "(args.lambda_real * loss).backward()",
        "(0 * loss).backward()",
        check_stage_anchor,
    ),
    ("co_train", "(args.lambda_real * loss).backward()", "loss.backward()", check_stage_anchor),
    ("co_train", "(share * loss).backward()", "loss.backward()", check_stage_anchor),
    ("ppo_loss", "-torch.min(", "torch.min(", check_stage_anchor),
    ("ppo_loss", "-torch.min(", "-torch.max(", check_stage_anchor),
    ("ppo_loss", "torch.max(error", "torch.min(error", check_stage_anchor),
    ("ppo_loss", "- args.entropy_weight", "+ args.entropy_weight", check_stage_anchor),
    ("gae", "* ~ended[t] * last", "* last", check_stage_gae),
    ("gae", "gamma * gae_lambda", "gae_lambda", check_stage_gae),
    ("gae", "- values[t]", "+ values[t]", check_stage_gae),
    ("normalise", "- mean", "+ mean", check_stage_normalised),
    (
        "collect",
        'np.flatnonzero(truncated[info["ended"]])',
        'np.arange(len(info["ended"]))',
        check_stage_bootstrap,
    ),
    (
        "stack",
        "torch.where(ended, torch.stack(final_values), following)",
        "following",
        check_stage_bootstrap,
    ),
    (
        "stack",
        "torch.cat([decision.logp for decision in decisions])",
        "torch.cat([decision.logp - .1 for decision in decisions])",
        check_stage_bootstrap,
    ),
    ("ppo_loss", "-torch.min(", "torch.min(", check_stage_climbs),
):
    MUTANTS.append(Mutant(rl_cotrain, rl_cotrain, stage_name, stage_old, stage_new, stage_check))


for pretrain_method, pretrain_old, pretrain_new in [
    ("where", " + loss[self.words].mean()", ""),
    ("patch", "self.side *", "2 *"),
    ("match", "return -", "return "),
    ("look", "paid * self.words", "paid"),
    ("forward", "nearest[:, 1]  #", "nearest[:, 2]  #"),
]:
    MUTANTS += [
        Mutant(
            pretrain,
            pretrain.Probe,
            pretrain_method,
            pretrain_old,
            pretrain_new,
            check_pretrain_probe,
        )
    ]


@pytest.mark.parametrize("mutant", MUTANTS, ids=mutant_name)
def test_mutants_are_noticed(mutant, monkeypatch):
    run_mutant(mutant, monkeypatch)


# ---- running them -------------------------------------------------------------------------------
# Several processes of pytest share the tests: a process claims a test by a file of its name. For
# them this file is a plugin of pytest, too; the next two functions are hooks.


def pytest_collection_modifyitems(items):
    """Put the slow tests first."""
    if "DEAL" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_protocol(item):
    """Leave out a test that another process has claimed."""
    if "DEAL" not in os.environ:
        return None
    name = hashlib.sha256(item.nodeid.encode()).hexdigest()
    try:
        pathlib.Path(os.environ["DEAL"], name).touch(exist_ok=False)
    except FileExistsError:
        return True
    return None


def deal(options):
    """Run the tests in a process on each CPU core; return the worst exit status."""
    count = min(real_data.cores(), 8)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "test_all", "test_all.py", *options]
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ, OMP_NUM_THREADS="1", DEAL=folder)
        processes = []
        for _ in range(count):
            processes.append(subprocess.Popen(command, env=environment, cwd=HERE))
        return max(abs(process.wait()) for process in processes)    # -9 if it was killed


if __name__ == "__main__":
    sys.exit(deal(sys.argv[1:]))
