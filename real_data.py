"""Demonstrations: LeRobot data sets in and out, the sampler of sim and real, statistics.

    Stage I    L = alpha * L_SFT(sim) + (1 - alpha) * L_SFT(real)     (RL-Co, arXiv 2602.12628)

is realised by sampling: a sample is simulated with probability alpha and real otherwise,
whatever the sizes of the two sets.

    python real_data.py demos/real --make --domain real --task open-drawer --episodes 50
    python real_data.py my_data --policy openvla              # the doctor: is it ready to train?
    python real_data.py my_data --convert degrees             # other conventions: CONVERSIONS

    demos = open_dataset("demos/real", image_size=64, horizon=8)     # LeRobot folder or hub id
    train, held_out = demos.split(0.1)                               # whole episodes
    batch = next(MixSampler(sim=None, real=train, alpha=0, batch=32))

Shapes   N frames of E episodes, T frames of one episode; B batch, C cameras,
         K actions per sample (horizon), A action size, S state size
Actions  (7,) = dx dy dz [m], droll dpitch dyaw [rad] per control step in the robot base frame,
         gripper -1 close .. +1 open. Physical units: normalisation belongs to the checkpoint.
State    (8,) = TCP xyz [m], roll pitch yaw [rad], gripper opening [m], 0; yours may differ
Formats  LeRobot v2.0 and v2.1 (a file per episode) and v3.0 (many episodes per file), video or
         image columns. Pixels are decoded once, into a file in ~/.cache/sim_real_frames.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import runpy
import shutil
import sys
import tempfile
import typing
import warnings

import imageio_ffmpeg  # brings its own ffmpeg, which decodes h264 and AV1
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
STATE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper_opening", "zero")
MIN_RANGE = 1e-3       # m or rad; a dimension with q99 - q01 below this hardly moves
MAX_SPEED = 1.0        # m/s; what moves faster is hardly a delta in metres
MAX_TURN_SPEED = 5.0   # rad/s; what turns faster is hardly a delta in radians
ODD_SHARE = 0.01       # share of odd frames that is refused; fewer are warned of
PAUSE_SPEED = 0.015    # m/s; slower frames are pauses, which training leaves out
EXPERT_NOISE = 0.005   # m; disturbs what the scripted expert executes, not what is recorded
QUANTILES = dict(q01=0.01, q10=0.1, q50=0.5, q90=0.9, q99=0.99)  # those that LeRobot keeps


def cores():
    """Count the CPU cores this process may use: a scheduler may grant a part of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


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


# ---- the contract --------------------------------------------------------------------------
BATCH = {  # arrays of a batch: dtype, numbers of dimensions
    "images": ("uint8", (4, 5)),
    "actions": ("float32", (3,)),
    "pad": ("bool", (2,)),
    "state": ("float32", (2,)),
}


class Demonstrations(typing.Protocol):
    """What training needs of a data set. A class of your own, whatever format it reads, can take
    the place of Demos if it passes check_demonstrations()."""

    def __len__(self):
        """Return N, the number of samples: one per frame."""

    def batch(self, indices):
        """Return samples `indices` (B,), each in 0 .. N - 1, as a dict:
        images        (B, H, W, 3) uint8 RGB, top row first; (B, C, H, W, 3) with several cameras
        instructions  list of B strings
        actions       (B, K, A) float32: the frame's action and the K - 1 that follow
        pad           (B, K) bool: True past the episode's end, where the last action is repeated
        state         (B, S) float32; S = 0 in a set without state"""


def check_demonstrations(demos):
    """Check a data set against the contract. ValueError lists everything that is wrong."""
    problems = Problems()
    batch = demos.batch(np.array([0, len(demos) - 1]))
    for key, (dtype, dims) in BATCH.items():
        array = np.asarray(batch.get(key))
        sound = array.dtype == dtype and array.ndim in dims and len(array) == 2
        sound = sound and np.isfinite(array).all()
        need = f"finite {dtype}, {dims} dimensions, a row per index"
        problems.need(sound, key, f"{array.dtype} {array.shape}", need, "astype, reshape")
    texts = batch.get("instructions", [])
    sound = len(texts) == 2 and all(isinstance(text, str) for text in texts)
    problems.need(sound, "instructions", texts, "a list of B str", "array.tolist()")
    problems.stop()
    pad = batch["pad"]
    sound = pad.shape == batch["actions"].shape[:2] and not pad[:, 0].any()
    problems.need(sound, "pad", pad, "a flag per action, the first False", "np.zeros")
    problems.stop()


# ---- the data set that trains --------------------------------------------------------------
class Demos:
    """Demonstrations of a Recording; their pixels stay in a file, (frames, C, H, W, 3) uint8.

    episodes (E,)       LeRobot's episode numbers; lengths (E,) in frames
    actions (N, A), states (N, S) float32, instructions (N,) str: of the frames
    owner (N,), rows (N,)  each frame's episode number, and its place in the file of pixels
    fps                 control steps per second
    """

    def __init__(self, recording, frames_path, horizon):
        self.recording = recording
        self.horizon = horizon
        self.fps = recording.fps
        # Read with preadv, not through a memory map: mapped pages count as resident memory,
        # which would grow to the file's size, 18 GB for 1,500 episodes x 80 frames at 224 px.
        self.file = open(frames_path, "rb")
        frames = np.load(frames_path, mmap_mode="r")
        self.offset = frames.offset
        self.frame_shape = frames.shape[1:]
        for name in ("rows", "owner", "actions", "states", "instructions"):
            setattr(self, name, getattr(recording, name))
        self.find_ends()

    def find_ends(self):
        """Find the episodes, their lengths, and each frame's end: the sample after its last."""
        last = np.append(np.diff(self.owner) != 0, True)               # (N,) last of its episode
        ends = np.flatnonzero(last) + 1                                # (E,)
        self.episodes = self.owner[last]
        self.lengths = np.diff(ends, prepend=0)
        self.ends = np.repeat(ends, self.lengths)                      # (N,)

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        """Return samples `indices` (B,) as Demonstrations.batch describes them."""
        actions, pad = self.chunks(indices)
        images = np.empty((len(pad), *self.frame_shape), np.uint8)     # (B, C, H, W, 3)
        for image, row in zip(images, self.rows[indices].tolist()):
            os.preadv(self.file.fileno(), [image], self.offset + row * image.nbytes)
        if images.shape[1] == 1:
            images = images[:, 0]                                      # (B, H, W, 3)
        return dict(
            images=images,
            instructions=self.instructions[indices].tolist(),
            actions=actions,
            pad=pad,
            state=self.states[indices],
        )

    def chunks(self, indices):
        """Return (B, K, A) actions from samples `indices` (B,) on, and pad (B, K) bool: True past
        the episode's end, where its last action is repeated."""
        window = np.add.outer(indices, np.arange(self.horizon))        # (B, K)
        ends = self.ends[indices][:, None]                             # (B, 1)
        return self.actions[np.minimum(window, ends - 1)], window >= ends

    def take(self, samples):
        """Return Demos of these samples only, in this order. They share the pixels."""
        taken = copy.copy(self)
        for name in ("rows", "owner", "actions", "states", "instructions"):
            setattr(taken, name, getattr(self, name)[samples])
        taken.find_ends()
        return taken

    def select(self, episodes):
        """Return Demos of these episode numbers only, in this order."""
        return self.take(np.concatenate([np.flatnonzero(self.owner == e) for e in episodes]))

    def split(self, held_out, seed=0):
        """Return (train, held-out). held_out: share of the episodes, of which at least one is
        held out; 0 returns (self, None)."""
        total = len(self.episodes)
        if held_out > 0 and total == 1:
            warnings.warn(f"{self.recording.folder}: one episode, of which nothing is held out")
        if held_out == 0 or total == 1:
            return self, None
        count = max(1, round(held_out * total))
        if count >= total:
            got = f"{held_out} of {total} episodes"
            raise ValueError(f"held_out: got {got}; need 1 or more to train on; try 0")
        order = np.random.default_rng(seed).permutation(self.episodes)
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))

    def without_pauses(self, min_move):
        """Return Demos without the frames that move the TCP by less than min_move [m] and
        5 x min_move [rad] and leave the gripper as it was. A policy that sees one image cannot
        know how long the demonstrator has been waiting, and would wait forever; OpenVLA's authors
        drop such frames, too. The first frame of an episode stays."""
        moved = np.linalg.norm(self.actions[:, :3], axis=1) >= min_move
        turned = np.linalg.norm(self.actions[:, 3:-1], axis=1) >= 5 * min_move
        switched = np.diff(self.actions[:, -1], prepend=np.nan) != 0   # the gripper
        first = np.diff(self.owner, prepend=-1) != 0
        return self.take(moved | turned | switched | first)


# ---- the alpha sampler ---------------------------------------------------------------------
class MixSampler:
    """Endless batches: next(sampler) returns a Demonstrations.batch and sim (B,) bool.

    Each sample is simulated with probability exactly alpha, else real. Each set is gone through
    in random order, a new one for each pass.
    sim, real  Demonstrations; sim may be None if alpha is 0, real if alpha is 1
    batch      samples per step over all ranks. Rank r gets samples r, r + world, ... of one
               stream, so that neither alpha nor the samples depend on the number of ranks, and
               any number of ranks can resume from state_dict().
    """

    def __init__(self, sim, real, alpha, batch, seed=0, rank=0, world=1):
        self.alpha = alpha
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.world = world
        self.sets = [real if alpha < 1 else (), sim if alpha > 0 else ()]  # real first: see draw
        self.step = 0
        self.drawn = [0, 0]                                   # samples so far, of real and of sim
        self.fingerprints = [fingerprint(demos) for demos in self.sets if demos]
        self.orders = [(-1, None), (-1, None)]                # pass and permutation of each
        if not 0 <= alpha <= 1 or not 0 <= rank < world <= batch or None in self.sets:
            got = f"{alpha=}, {batch=}, {rank=}, {world=}, sim={sim}, real={real}"
            need = "alpha 0 to 1, data where it asks for some, batch >= world > rank"
            raise ValueError(f"MixSampler: got {got}; need {need}; try alpha 0 without sim")
        if 0 < alpha < 1:
            shapes = [sample_shapes(demos) for demos in self.sets]
            if shapes[0] != shapes[1]:
                got = f"{shapes[0]} of real, {shapes[1]} of sim"
                raise ValueError(f"samples: got {got}; need the same shapes; try {CONVERT}")

    def draw(self, which):
        """Return the next sample number of a set: 0 real, 1 sim."""
        size = len(self.sets[which])
        turn, place = divmod(self.drawn[which], size)
        if self.orders[which][0] != turn:
            rng = np.random.default_rng([self.seed, which, turn])
            self.orders[which] = turn, rng.permutation(size)
        self.drawn[which] += 1
        return self.orders[which][1][place]

    def __next__(self):
        rng = np.random.default_rng([self.seed, 2, self.step])
        sim = rng.random(self.batch) < self.alpha             # (batch,) P(sim) = alpha
        numbers = np.array([self.draw(int(which)) for which in sim])  # for all ranks: in step
        self.step += 1
        mine = np.arange(self.rank, self.batch, self.world)
        samples = [self.sets[int(sim[i])].batch(numbers[i : i + 1]) for i in mine]
        texts = [sample["instructions"][0] for sample in samples]
        batch = dict(sim=sim[mine], instructions=texts)
        for key in BATCH:
            batch[key] = np.concatenate([sample[key] for sample in samples])
        return batch

    def state_dict(self):
        """Return the position in the stream, JSON-ready and the same on all ranks."""
        return dict(
            alpha=self.alpha,
            batch=self.batch,
            seed=self.seed,
            step=self.step,
            drawn=list(self.drawn),
            sizes=[len(demos) for demos in self.sets],
            data=self.fingerprints,
        )

    def load_state_dict(self, state):
        """Go to a position. ValueError if it is one of another stream."""
        new = dict(self.state_dict(), step=state["step"], drawn=state["drawn"])
        if new != state:
            raise ValueError(f"resume: got {new}; need {state}; try the settings of before")
        self.step = state["step"]
        self.drawn = list(state["drawn"])


def fingerprint(demos):
    """Return a hash of what is learnt from a data set: its actions and instructions."""
    whole = isinstance(demos, Demos)
    few = np.linspace(0, len(demos) - 1, 64).astype(int)          # of a data set of another kind
    part = vars(demos) if whole else demos.batch(few)
    texts = "\n".join(part["instructions"])
    return hashlib.sha256(part["actions"].tobytes() + texts.encode()).hexdigest()[:16]


def sample_shapes(demos):
    """Return {array: shape of one sample}."""
    batch = demos.batch(np.array([0]))
    return {key: batch[key].shape[1:] for key in BATCH}


# ---- normalisation statistics --------------------------------------------------------------
def statistics(values, weights=None):
    """Return statistics of values (N, D) over the whole set: {name: list of D numbers}.

    weights (N,): how much each row counts; None: all the same, and quantiles interpolate."""
    values = np.asarray(values, np.float64)
    method = "linear" if weights is None else "inverted_cdf"
    shares = list(QUANTILES.values())
    quantiles = np.quantile(values, shares, axis=0, weights=weights, method=method)
    share = np.ones(len(values)) if weights is None else np.asarray(weights)
    share = share / share.sum()
    mean = share @ values
    stats = dict(
        zip(QUANTILES, quantiles),
        min=values.min(axis=0),
        max=values.max(axis=0),
        mean=mean,
        std=(share @ (values - mean) ** 2) ** 0.5,
    )
    return {name: value.tolist() for name, value in stats.items()}


def dataset_statistics(demos, weights=None):
    """Return {"action": statistics, "state": statistics} for policy.set_statistics.

    demos    list of Demos. Sim and real share their statistics, as in RL-Co: actions mean the same
             in both
    weights  how much each of them counts as a whole, for example alpha and 1 - alpha; None: each
             frame counts the same"""
    rows = None
    if weights is not None:
        parts = zip(weights, demos)
        rows = np.concatenate([np.full(len(part), weight / len(part)) for weight, part in parts])
    actions = statistics(np.concatenate([part.actions for part in demos]), rows)
    states = statistics(np.concatenate([part.states for part in demos]), rows)
    for part in demos:
        widen(actions, part)
    return dict(action=actions, state=states)


def widen(stats, demos):
    """Make q01 .. q99 of actions fit to scale by, in place, and warn of what they do not cover.

    Quantiles lose what is rare: a rotation that only one frame needs has q01 = q99 = 0, and would
    be scaled far beyond [-1, 1]. Where these demonstrations reach beyond 3, minimum and maximum
    take the place of the quantiles, unless the extreme is no plausible motion; for the gripper it
    is [-1, 1]. The policies widen what is still narrower than MIN_RANGE."""
    reach, share = reach_of(demos.actions, stats["q01"], stats["q99"])
    limit = limits(demos.fps)
    for d, name in enumerate(action_names(len(reach))):
        if reach[d] <= 1.5:
            continue
        done = "kept; such actions are cut off or learnt badly"
        extreme = max(-stats["min"][d], stats["max"][d])
        if name == "gripper":
            stats["q01"][d] = -1.0
            stats["q99"][d] = 1.0
            done = "replaced by -1 .. 1"
        elif reach[d] > 3 and extreme <= limit.get(name, np.inf):
            stats["q01"][d] = stats["min"][d]
            stats["q99"][d] = stats["max"][d]
            done = "replaced by minimum and maximum"
        warnings.warn(
            f"statistics of {name}: {share[d]:.2%} of the frames lie beyond q01 .. q99, up to "
            f"{reach[d]:.3g} where q01 .. q99 is -1 .. 1; the range is {done}"
        )


def reach_of(actions, low, high):
    """Return how far actions (N, A) reach, (A,), where low .. high (A,) is -1 .. 1, and which
    share of the frames lies beyond 1.5, (A,). Ranges narrower than MIN_RANGE are taken as wide."""
    half = np.maximum(np.subtract(high, low), MIN_RANGE) / 2
    size = np.abs(actions - np.add(low, high) / 2) / half          # (N, A)
    return size.max(axis=0), (size > 1.5).mean(axis=0)


def limits(fps):
    """Return {dimension: size} of the largest plausible action [m, rad] at fps steps a second."""
    move = dict.fromkeys(ACTION_NAMES[:3], MAX_SPEED / fps)
    turn = dict.fromkeys(ACTION_NAMES[3:6], MAX_TURN_SPEED / fps)
    return move | turn


def action_names(size):
    """Return the names of the action's dimensions, or numbers if it has another size."""
    if size == len(ACTION_NAMES):
        return ACTION_NAMES
    return [f"action {d}" for d in range(size)]


# ---- opening a data set --------------------------------------------------------------------
def open_dataset(
    path,
    image_size=None,
    horizon=1,
    cameras=None,
    fit="stretch",
    action_dim=len(ACTION_NAMES),
    convert=(),
    cache_dir=None,
):
    """Open a LeRobot data set (a folder, or a hub id owner/name) for training. Returns Demos.

    image_size  side [pixels] of the square frames the policy sees; None: as stored
    horizon     K, actions per sample
    cameras     an image feature or its last part (`front`), or up to three; None: choose_cameras
    fit         how a frame becomes square: `stretch` (OpenVLA) or `pad` (pi0.5), see resize
    action_dim  the policy's action size A; None: any
    convert     what brings an episode to the contract's conventions, one after the other: names of
                CONVERSIONS, Python files with a function convert(episode), or functions
    cache_dir   folder for the decoded frames; None: ~/.cache/sim_real_frames
    ValueError lists everything that is wrong with the set; then nothing was written.
    """
    if fit not in ("stretch", "pad"):
        raise ValueError(f"fit: got {fit}; need stretch or pad; try the policy's `fit`")
    recording = read_lerobot(path, cameras, action_dim, convert)
    doubts(recording).stop()
    return Demos(recording, cache_frames(recording, image_size, fit, cache_dir), horizon)


# ---- other conventions: convert(episode) ---------------------------------------------------
# A conversion gets and returns a dict of one episode:
#     actions (T, A) and states (T, S) float32, instructions (list of T str), fps, and
#     frames (T,): which of the stored frames these rows belong to
# It may leave out rows, of all five alike. These are examples to copy into a file of your own, for
# --convert my_robot.py; each can also be chosen by its name, as in --convert degrees.


def degrees(episode):
    """Rotations in degrees."""
    actions = episode["actions"].copy()
    actions[:, 3:6] = np.radians(actions[:, 3:6])
    return dict(episode, actions=actions)


def gripper_open_1(episode):
    """Gripper 0 closed .. 1 open."""
    actions = episode["actions"].copy()
    actions[:, 6] = 2 * actions[:, 6] - 1
    return dict(episode, actions=actions)


def gripper_closed_1(episode):
    """Gripper 0 open .. 1 closed."""
    actions = episode["actions"].copy()
    actions[:, 6] = 1 - 2 * actions[:, 6]
    return dict(episode, actions=actions)


def gripper_flipped(episode):
    """Gripper -1 open .. +1 close, as in LIBERO and robosuite."""
    actions = episode["actions"].copy()
    actions[:, 6] = -actions[:, 6]
    return dict(episode, actions=actions)


def absolute_poses(episode):
    """Actions that are target poses: x y z [m], roll pitch yaw [rad], gripper as it should be.

    The first delta starts from the measured pose, states[0, :6]."""
    import envs

    poses = np.vstack([episode["states"][:1, :6], episode["actions"][:, :6]])     # (T + 1, 6)
    frames = envs.frame_of(poses[:, 3:])                                          # (T + 1, 3, 3)
    turns = envs.euler_of(frames[1:] @ frames[:-1].swapaxes(1, 2))                # (T, 3)
    turns = (turns + np.pi) % (2 * np.pi) - np.pi
    moves = np.diff(poses[:, :3], axis=0)                                         # (T, 3)
    return dict(episode, actions=np.column_stack([moves, turns, episode["actions"][:, 6]]))


def panda_joints(episode):
    """Actions that are target angles of a Panda's 7 joints [rad], and the gripper. States begin
    with the 7 measured angles, and become poses of the tool (TCP) as the contract has them."""
    import envs

    def pose(joints):
        position, frame, _ = envs.forward_kinematics(joints.astype(np.float64))
        return np.column_stack([position, envs.euler_of(frame)])                  # (T, 6)

    states = np.column_stack([pose(episode["states"][:, :7]), episode["states"][:, 7:]])
    poses = np.column_stack([pose(episode["actions"][:, :7]), episode["actions"][:, 7]])
    return absolute_poses(dict(episode, states=states, actions=poses))


def control_rate(episode):
    """More actions a second than the simulation has: the deltas of each control step are added."""
    import envs

    ratio = max(1, round(episode["fps"] / envs.CONTROL_HZ))
    starts = np.arange(0, len(episode["actions"]), ratio)
    actions = np.add.reduceat(episode["actions"], starts, axis=0)
    last = np.append(starts[1:], len(episode["actions"])) - 1
    actions[:, 6] = episode["actions"][last, 6]       # the gripper is no delta
    return dict(
        actions=actions,
        states=episode["states"][starts],
        instructions=[episode["instructions"][row] for row in starts],
        frames=episode["frames"][starts],
        fps=episode["fps"] / ratio,
    )


def as_is(episode):
    """Nothing is changed, and nothing is doubted: for an unusual robot whose data are right."""
    return episode


CONVERSIONS = {
    function.__name__.replace("_", "-"): function
    for function in (
        degrees, gripper_open_1, gripper_closed_1, gripper_flipped, absolute_poses, panda_joints,
        control_rate, as_is,
    )
}
CONVERT = "--convert with a Python file of your own (examples: CONVERSIONS in real_data.py)"


def load_conversions(names):
    """Return a list of functions for names of CONVERSIONS, Python files, or functions."""
    functions = []
    for name in [names] if isinstance(names, str) or callable(names) else names or ():
        if callable(name):
            functions.append(name)
        elif name in CONVERSIONS:
            functions.append(CONVERSIONS[name])
        else:
            functions.append(load_conversion(name))
    return functions


def load_conversion(path):
    """Return the function `convert` of a Python file."""
    sys.path.insert(0, str(pathlib.Path(path).resolve().parent))  # of what it imports
    try:
        function = runpy.run_path(str(path))["convert"]
        if not callable(function):
            raise TypeError(f"convert is a {type(function).__name__}")
        return function
    except Exception as error:        # whatever the file of a user raises
        got = f"{type(error).__name__}: {error}"
        need = f"a Python file with a function convert(episode), or one of {list(CONVERSIONS)}"
        raise ValueError(f"--convert {path}: got {got}; need {need}; try those") from error


def apply_conversions(functions, episode, number):
    """Return an episode after all conversions. ValueError if one of them raises anything."""
    for function in functions:
        try:
            episode = function(episode)
            episode = {name: as_array(episode[name]) for name, as_array in EPISODE.items()}
        except Exception as error:
            name = getattr(function, "__name__", str(function))
            got = f"{type(error).__name__}: {error}"
            need = f"a dict of {', '.join(EPISODE)}, as the examples in real_data.py return it"
            remedy = f"other conversions, or a look into {name}"
            raise ValueError(
                f"convert ({name}), episode {number}: got {got}; need {need}; try {remedy}"
            ) from error
    return episode


def table_of(values):
    """Return a table (T, n) float32; ValueError if it is none."""
    values = np.asarray(values, np.float32)
    if values.ndim != 2:
        raise ValueError(f"an array of shape {values.shape} instead of (T, n)")
    return values


def list_of_texts(values):
    if isinstance(values, str) or not all(isinstance(value, (str, type(None))) for value in values):
        raise ValueError(f"instructions {values!r} instead of a list of T str")
    return list(values)


def numbers_of_frames(values):
    values = np.asarray(values)
    if values.dtype.kind != "i":
        raise ValueError(f"frames of type {values.dtype} instead of whole numbers")
    return values


def positive(value):
    if not value > 0:
        raise ValueError(f"fps {value} instead of a rate above 0")
    return float(value)


EPISODE = dict(
    actions=table_of,
    states=table_of,
    instructions=list_of_texts,
    frames=numbers_of_frames,
    fps=positive,
)


def doubts(recording):
    """Return Problems: what is probably not in the contract's units and conventions.

    Few odd frames are a glitch: they are warned of and no problem. Nothing is doubted if the user
    has said as-is, or if the actions are of another size."""
    problems = Problems()
    if as_is not in recording.conversions and recording.actions.shape[1] == len(ACTION_NAMES):
        doubt_units(recording, problems)
        doubt_poses(recording, problems)
        doubt_gripper_sign(recording, problems)
        doubt_times(recording, problems)
    return problems


def doubt_units(recording, problems):
    """Note actions that are too large, or commands to the gripper that are not -1 .. 1."""
    limit = limits(recording.fps)
    move = limit["dx"]
    turn = limit["droll"]
    grip = recording.actions[:, 6:]
    odd_grip = np.abs(grip) > 1.01
    if grip.min() > -0.01:                            # 0 .. 1: what is not 1 would be half open
        odd_grip |= grip < 0.99
    units = "degrees, absolute-poses or panda-joints"
    gripper = "gripper-open-1 (0 closed, 1 open), gripper-closed-1 (0 open, 1 closed)"

    def doubt(what, values, odd, need, remedy):
        """Note the frames with odd values; values and odd (N, n)."""
        share = odd.any(axis=1).mean()
        if share == 0:
            return
        got = f"{share:.2%} of the frames out of range, up to {np.abs(values).max():.3g}"
        remedy = f"{remedy}, a Python file of your own, or as-is if the data are right"
        fault = f"{recording.folder}: {what}: got {got}; need {need}; try --convert with {remedy}"
        if share > ODD_SHARE:
            problems.append(fault)
        else:
            warnings.warn(fault)

    moves = recording.actions[:, :3]
    need = f"deltas in metres, up to {move:.3g} a step ({MAX_SPEED:g} m/s)"
    doubt("moves", moves, np.abs(moves) > move, need, units)
    turns = recording.actions[:, 3:6]
    need = f"deltas in radians, up to {turn:.3g} a step ({MAX_TURN_SPEED:g} rad/s)"
    doubt("turns", turns, np.abs(turns) > turn, need, units)
    doubt("gripper", grip, odd_grip, "-1 close .. +1 open", gripper)


def doubt_poses(recording, problems):
    """Note actions that say where the tool is to be, states[:3], instead of how far to move."""
    moves = recording.actions[:, :3]
    places = recording.states[:, :3]
    if places.shape[1] < 3:
        return
    size = np.median(np.linalg.norm(moves, axis=1))                 # m
    gap = np.median(np.linalg.norm(moves - places, axis=1))         # m
    if size > 0.05 and gap < size / 4:
        problems.append(
            f"{recording.folder}: moves: got about {size:.3g} m, and {gap:.3g} m from the place of "
            "the tool, states[:3]; need deltas; try --convert with absolute-poses, or as-is if the "
            "data are right"
        )


def doubt_gripper_sign(recording, problems):
    """Note a gripper that closes after the command to open, as far as states[6] tells."""
    grip = recording.actions[:, 6]
    opening = np.roll(recording.states[:, 6:7].sum(axis=1), -3)   # it takes steps to follow
    if grip.std() < 1e-6 or opening.std() < 1e-6:     # one of them never moves
        return
    correlation = np.corrcoef(grip, opening)[0, 1]
    if correlation < -0.5:
        problems.append(
            f"{recording.folder}: gripper: got commands against its opening, states[6] "
            f"(correlation {correlation:.2f}); need -1 close .. +1 open; try --convert with "
            "gripper-flipped, or as-is if states[6] is something else"
        )


def doubt_times(recording, problems):
    """Note rows whose times are not those of the video frames that they go with, by their order."""
    features = recording.info["features"]
    video = any(features[camera]["dtype"] == "video" for camera in recording.cameras)
    if video and recording.time_off > 0.5 / recording.info["fps"]:
        problems.append(
            f"{recording.folder}: times: got rows up to {recording.time_off:.3f} s off frame_index "
            "/ fps; need less than half a frame, or pictures may belong to other rows; try to "
            "record it again, or --convert as-is if frame k of each video belongs to row k"
        )


# ---- making demonstrations -----------------------------------------------------------------
def record(task, domain, seed, image_size, count, first):
    """Record the demonstrator in episodes first .. first + count - 1. Returns its successes in
    order: (images (T, H, W, 3) uint8, states (T, 8), actions (T, 7), instruction, episode)."""
    import envs

    env = envs.make_env(
        task, domain, count, seed, image_size, first_episode=first, auto_reset=False
    )
    if domain == "real":  # a person shows the real robot what to do, imperfectly
        expert = envs.Expert(env, "teleop")
    else:
        expert = envs.Expert(env, "expert", EXPERT_NOISE)
    obs = env.reset()
    steps = [[] for _ in range(count)]
    running = np.arange(count)
    while len(running):
        executed, label = expert.act()                # (N, 7) each; only `executed` has the noise
        for i in running:
            steps[i].append((obs["images"][i], obs["state"][i], label[i]))
        obs, _, _, _, info = env.step(executed[:, None])
        running = np.setdiff1d(running, info["ended"])
    recorded = []
    for i in np.flatnonzero(info["success"]):
        images, states, actions = map(np.stack, zip(*steps[i]))
        recorded.append((images, states, actions, obs["instructions"][i], first + i))
    return recorded


def make_demos(task, domain, episodes, out, seed=0, workers=0, image_size=64):
    """Record `episodes` demonstrations of a task, or of every task if it is "all", as a LeRobot
    v3.0 data set `out`: the first successes in order of their episode numbers, whatever the
    number of workers (processes, 0 = one per core)."""
    import envs
    import evaluate

    workers = workers or cores()
    limit = 20 + 10 * episodes                        # episodes to try
    block = min(16, -(-episodes // workers))          # episodes that a worker records at a time

    def successes(name):
        work = functools.partial(record, name, domain, seed, image_size, block)
        # A round at a time: what is not needed is not recorded, and frames do not pile up.
        for first in range(0, limit, workers * block):
            for part in pool.map(work, range(first, first + workers * block, block)):
                yield from part

    def demonstrations():
        for name in envs.TASKS if task == "all" else [task]:
            count = 0
            wanted = itertools.islice(successes(name), episodes)
            for demonstration in tqdm(wanted, name, episodes, unit="episode"):
                count += 1
                yield demonstration
            if count < episodes:
                got = f"{count} successes in {limit} episodes"
                raise ValueError(f"{name}: got {got}; need {episodes}; try another seed")

    with evaluate.worker_processes(workers) as pool:
        write_dataset(out, demonstrations(), envs.CONTROL_HZ)


# ---- plumbing: skip on first reading -------------------------------------------------------
# ---- reading LeRobot: all but the pixels ---------------------------------------------------
VERSIONS = ("v2.0", "v2.1", "v3.0")  # v2.0 differs from v2.1 only in where it keeps statistics
FETCH = "downloading it again (git lfs pull, if it is a git-lfs pointer)"
REPAIR = "repairing or removing these episodes"
NOT_COLOUR = re.compile(
    "depth|dispar|infra|therm|segm|mask|tactile|gelsight|normals|optical.?flow"
    "|(?<![a-z])(ir|seg|digit|event)(?![a-z])"
)
ON_THE_ROBOT = re.compile("wrist|hand|grip|finger|tool|(?<![a-z])(ee|eef|ego|tcp)(?![a-z])")


@dataclasses.dataclass
class Recording:
    """A LeRobot folder, read but for its pixels."""

    folder: pathlib.Path
    info: dict                        # meta/info.json
    cameras: list                     # the chosen image features
    available: list                   # all image features
    episodes: list                    # E dicts, LeRobot's metadata
    files: list                       # parquet files with the rows, in order
    conversions: list                 # functions that were applied, see CONVERSIONS
    stored: np.ndarray                # (F,) episode number of each stored frame
    time_off: float                   # s, how far a row's timestamp is off frame_index / fps
    fps: float                        # rows per second, after all conversions
    owner: np.ndarray                 # (N,) episode number of each row
    rows: np.ndarray                  # (N,) which of the F stored frames it shows
    instructions: np.ndarray          # (N,) str
    actions: np.ndarray               # (N, A) float32
    states: np.ndarray                # (N, S) float32


class Faults(dict):
    """What is wrong with some episodes: {"what: got ..; need ..; try ..": their numbers}."""

    def need(self, ok, episode, fault):
        """Note a fault of an episode unless ok."""
        if not ok:
            self.setdefault(fault, set()).add(int(episode))

    def stop(self, folder):
        """Raise one ValueError with all faults and their episodes, if there are any."""
        problems = Problems()
        for fault, episodes in self.items():
            problems.append(f"{folder}: {fault} (episode {str(sorted(episodes))[1:-1]})")
        problems.stop()


def local_folder(path):
    """Return the folder of a data set; `owner/name` that is no folder comes from the hub."""
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download

        return pathlib.Path(snapshot_download(str(path), repo_type="dataset"))
    except Exception as error:        # HTTP, hub and system errors share no narrower base class
        got = f"{path} ({type(error).__name__})"
        command = f"hf download {path} --repo-type dataset --local-dir {folder.name}"
        need = "a LeRobot folder, or a hub id in reach"
        raise ValueError(f"data set: got {got}; need {need}; try {command}") from error


def choose_cameras(features, cameras):
    """Return (chosen, available) image features. cameras: a name or up to three (as pi0.5 has);
    None: the first in colour that is not on the wrist."""
    available = [key for key in features if features[key].get("dtype") in ("image", "video")]
    coloured = [key for key in available if in_colour(key, features[key])]
    if cameras is None:
        cameras = sorted(coloured, key=on_the_robot)[:1]
    elif isinstance(cameras, str):
        cameras = [cameras]
    chosen = []
    for name in cameras:
        chosen += [key for key in available if name in (key, key.split(".")[-1])]
    if not 1 <= len(chosen) == len(cameras) <= 3:
        need = f"1 to 3 of {available} (in colour: {coloured})"
        raise ValueError(f"cameras: got {cameras}; need {need}; try --camera NAME")
    return chosen, available


def in_colour(key, feature):
    """Tell a colour camera from depth, infrared and the like, by everything the format says."""
    info = {name.removeprefix("video."): value for name, value in feature.items()}
    for name, value in (feature.get("info") or {}).items():
        info[name.removeprefix("video.")] = value
    one_channel = 1 in feature["shape"] or info.get("channels") == 1
    grey = str(info.get("pix_fmt")).startswith(("gray", "mono", "y8", "y16"))
    named = NOT_COLOUR.search(key.lower())
    return not (info.get("is_depth_map") or one_channel or grey or named)


def on_the_robot(key):
    """Return whether a camera moves with the robot, as far as its name tells."""
    return ON_THE_ROBOT.search(key.lower()) is not None


def what_is(file, error):
    """Return what a file that cannot be read really is, for a message."""
    if not file.exists():
        return "no such file"
    with open(file, "rb") as content:
        start = content.read(200)
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, not the file itself"
    return error


def files_of(folder):
    """Return all files in a folder, sorted; in linked folders, too, but not hidden ones."""
    found = []
    for place, _, names in os.walk(folder, followlinks=True):
        found += [pathlib.Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def read_rows(file, columns=None):
    """Return the rows of a .parquet, .jsonl or .json file (one row), a list of dicts. ValueError
    if it cannot be read."""
    try:
        if file.suffix == ".parquet":
            return pq.ParquetFile(file).read(columns).to_pylist()
        text = file.read_text(encoding="utf-8-sig")
        lines = [text] if file.suffix == ".json" else text.split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        got = what_is(file, error)
        raise ValueError(f"{file}: got {got}; need LeRobot's file; try {FETCH}") from error


def read_meta(folder):
    """Return info.json, a dict per episode in order, and {task_index: instruction}."""
    info = read_rows(folder / "meta/info.json")[0]
    check_info(info, folder / "meta/info.json")
    if info["codebase_version"] == "v3.0":
        files = sorted((folder / "meta/episodes").rglob("*.parquet"))
        tasks = read_rows(folder / "meta/tasks.parquet")
    else:
        files = [folder / "meta/episodes.jsonl"]
        tasks = read_rows(folder / "meta/tasks.jsonl")
    episodes = [row for file in files for row in read_rows(file)]
    if not all(row.get("length") and "episode_index" in row for row in episodes):
        need = "episode_index and length, 1 or more"
        raise ValueError(f"{folder}/meta: got episodes without; need {need}; try {FETCH}")
    if not episodes:
        raise ValueError(f"{folder}/meta: got no episodes; need 1 or more; try {FETCH}")
    texts = {}
    for task in tasks:
        number = task.pop("task_index", None)
        known = [name for name in ("task", "__index_level_0__") if name in task] or list(task)
        if number is None or len(known) != 1:
            need = "task_index and task"
            got = f"columns {sorted(task)}"
            raise ValueError(f"{folder}/meta/tasks: got {got}; need {need}; try {FETCH}")
        texts[number] = task[known[0]]                # `task`, or the name of a pandas index
    return info, sorted(episodes, key=lambda row: row["episode_index"]), texts


def check_info(info, file):
    """Raise one ValueError with all that is missing or wrong in info.json."""
    problems = Problems()
    version = info.get("codebase_version")
    known = f"LeRobot {', '.join(VERSIONS)}"
    problems.need(version in VERSIONS, f"{file}: version", version, known, "LeRobot's converter")
    fps = info.get("fps")
    sound = isinstance(fps, (int, float)) and fps > 0
    remedy = "writing the rate of the recording into that file"
    problems.need(sound, f"{file}: fps", fps, "actions per second, above 0", remedy)
    features = info.get("features")
    sound = isinstance(features, dict) and all("shape" in each for each in features.values())
    problems.need(sound, f"{file}: features", features, "a dict with dtype and shape each", FETCH)
    if version in VERSIONS[:2]:
        size = info.get("chunks_size")
        problems.need(size, f"{file}: chunks_size", size, "a number, 1000 as a rule", FETCH)
    problems.stop()


def check_columns(info, files, action, state, cameras):
    """Raise one ValueError with all columns that the parquet files lack."""
    need = ["episode_index", "frame_index", "task_index", action]
    if state in info["features"]:
        need.append(state)
    need += [camera for camera in cameras if info["features"][camera]["dtype"] == "image"]
    problems = Problems()
    problems.need(files, "data/", "no parquet files", "one or more", FETCH)
    lacking = collections.defaultdict(list)
    for file in files:
        try:
            columns = pq.ParquetFile(file).schema_arrow.names
        except (OSError, ValueError) as error:
            problems.need(False, file, what_is(file, error), "a parquet file", FETCH)
            continue
        missing = [column for column in need if column not in columns]
        if missing:
            lacking[str(missing)].append(str(file))
    for missing, some in lacking.items():
        got = f"no column {missing} in {len(some)} of {len(files)} files (first: {some[0]})"
        remedy = "downloading it again, or --camera NAME for another camera"
        problems.need(False, "rows", got, need, remedy)
    problems.stop()


def read_lerobot(path, cameras=None, action_dim=len(ACTION_NAMES), convert=()):
    """Read a LeRobot data set but for its pixels, into a Recording; arguments as in open_dataset.
    ValueError lists all that is wrong with the rows."""
    folder = local_folder(path)
    conversions = load_conversions(convert)
    info, episodes, texts = read_meta(folder)
    features = info["features"]
    cameras, available = choose_cameras(features, cameras)
    action = "action" if "action" in features else "actions"
    state = "observation.state" if "observation.state" in features else "state"
    files = [file for file in files_of(folder / "data") if file.suffix == ".parquet"]
    check_columns(info, files, action, state, cameras)
    columns = ["episode_index", "frame_index", "task_index", "timestamp", action, state]
    stream = (row for file in files for row in read_rows(file, columns))
    faults = Faults()
    parts = []
    stored = []
    time_off = 0.0
    for episode in episodes:
        number = episode["episode_index"]
        rows = list(itertools.islice(stream, episode["length"]))
        if not complete(rows, episode):
            fault = f"rows: got others; need frames 0 .. length - 1; try {FETCH}"
            faults.need(False, number, fault)
            continue
        part = dict(
            actions=vectors(rows, action),
            states=vectors(rows, state),
            instructions=[texts.get(task) for task in numbers(rows, "task_index").tolist()],
            frames=np.arange(len(rows)),
            fps=info["fps"],
        )
        part = apply_conversions(conversions, part, number)
        check_part(faults, number, part, len(rows), action_dim)
        part["rows"] = part.pop("frames") + len(stored)
        part["owner"] = [number] * len(part["rows"])
        parts.append(part)
        stored += [number] * len(rows)
        time_off = max(time_off, off_the_grid(rows, info["fps"]))
    faults.stop(folder)
    rates = {part["fps"] for part in parts}
    if len(rates) > 1:
        raise ValueError(f"convert: got rates {rates}; need one for all episodes; try to fix it")
    left = sum(1 for _ in stream)
    if left:
        got = f"{left} rows that belong to no episode of meta/"
        raise ValueError(f"{folder}: got {got}; need none; try {FETCH}")
    arrays = dict(owner=int, rows=int, instructions=object, actions=np.float32, states=np.float32)
    for name, kind in arrays.items():
        arrays[name] = np.concatenate([part[name] for part in parts]).astype(kind)
    meta = (folder, info, cameras, available, episodes, files, conversions)
    return Recording(*meta, np.array(stored), time_off, parts[0]["fps"], **arrays)


def complete(rows, episode):
    """Return whether these are the rows of an episode: all of them, in order, and its own."""
    in_order = np.array_equal(numbers(rows, "frame_index"), np.arange(episode["length"]))
    return in_order and (numbers(rows, "episode_index") == episode["episode_index"]).all()


def off_the_grid(rows, fps):
    """Return how far [s] the timestamps of an episode are off frame / fps; 0 if it has none."""
    if "timestamp" not in rows[0]:
        return 0.0
    times = np.array([row["timestamp"] for row in rows], float).ravel()
    return np.abs(times - times[0] - np.arange(len(rows)) / fps).max()


def numbers(rows, column):
    """Return a column of T rows as (T,) integers; some writers store each as a list of one."""
    return np.array([row[column] for row in rows]).reshape(-1)


def vectors(rows, column):
    """Return a column of T rows as (T, size) float32; size 0 if there is no such column, or if
    the rows differ in size."""
    values = [np.ravel(row.get(column, ())) for row in rows]
    if len({len(value) for value in values}) > 1:
        return np.zeros((len(rows), 0), np.float32)
    return np.array(values, np.float32).reshape(len(rows), -1)


def check_part(faults, number, part, stored, action_dim):
    """Note what is wrong with one episode after all conversions; stored: its number of frames."""
    length = len(part["frames"])
    inside = all(0 <= frame < stored for frame in part["frames"])
    fault = f"convert: got frames outside; need 0 .. {stored - 1}; try numbers of its own frames"
    faults.need(inside, number, fault)
    for name in ("actions", "states", "instructions"):
        got = f"{len(part[name])} {name} for {length} frames"
        fault = f"convert: got {got}; need one each; try the examples in real_data.py"
        faults.need(len(part[name]) == length > 0, number, fault)
    for name in ("actions", "states"):
        finite = np.isfinite(part[name]).all()
        faults.need(finite, number, f"{name}: got nan or inf; need finite numbers; try {REPAIR}")
    size = part["actions"].shape[1]
    need = f"{action_dim} (deltas of one end effector: {' '.join(ACTION_NAMES)})"
    got = f"{size} numbers" if size else "rows of different sizes, or none"
    fault = f"actions: got {got}; need {need}; try {CONVERT}"
    if size == len(ACTION_NAMES) + 1:
        fault += ", or panda-joints for joint angles and a gripper"
    faults.need(action_dim in (None, size), number, fault)
    fault = f"instructions: got none; need a text per frame; try {CONVERT}"
    faults.need(all(text and text.strip() for text in part["instructions"]), number, fault)


# ---- pixels and their cache ----------------------------------------------------------------
def plan_frames(recording):
    """Return where every frame comes from, {(camera, mp4): {number: row}}; number: of the
    frame in the mp4; row: in the whole set. Images in the parquet files (mp4 None) come in the
    order of the rows. By LeRobot's rules, an episode's frames follow each other in its mp4."""
    jobs = collections.defaultdict(dict)
    for camera in recording.cameras:
        for episode in recording.episodes:
            rows = np.flatnonzero(recording.stored == episode["episode_index"])
            if recording.info["features"][camera]["dtype"] == "image":
                jobs[camera, None].update(zip(rows, rows))
            else:
                file, start = video_of(recording, episode, camera)
                first = round(start * recording.info["fps"])
                jobs[camera, file].update(zip(itertools.count(first), rows))
    return jobs


def video_of(recording, episode, camera):
    """Return the mp4 of an episode and the time [s] at which the episode starts in it."""
    prefix = f"videos/{camera}/"      # v3.0: chunk_index, file_index, from_timestamp
    names = {key.removeprefix(prefix): value for key, value in episode.items()}
    chunk = episode["episode_index"] // recording.info["chunks_size"]
    names.update(video_key=camera, episode_chunk=chunk)
    try:
        file = recording.folder / recording.info["video_path"].format_map(names)
        shared = recording.info["codebase_version"] == "v3.0"     # many episodes in one mp4
        return file, names["from_timestamp"] if shared else 0.0
    except (KeyError, AttributeError) as error:
        raise ValueError(
            f"{recording.folder}/meta: got no {error} for the videos of {camera}; need LeRobot's "
            f"fields; try {FETCH}"
        ) from error


def video_frames(path, fps):
    """Yield the frames (H, W, 3) uint8 of an mp4, up to its end or to the first broken one.
    ValueError if it does not have fps frames per second: its frames would be of other rows."""
    # -xerror: stop at a broken packet, which would otherwise silently shift all later frames.
    # passthrough: each stored frame exactly once; by default ffmpeg repeats and drops some.
    reader = imageio_ffmpeg.read_frames(
        str(path),
        pix_fmt="rgb24",
        input_params=["-xerror"],
        output_params=["-fps_mode", "passthrough"],
    )
    with contextlib.closing(reader), contextlib.suppress(OSError, RuntimeError, StopIteration):
        meta = next(reader)
        width, height = meta["size"]
        if abs(meta["fps"] - fps) > 0.02 * fps:
            raise ValueError(f"got {meta['fps']} frames a second; need {fps}, as in info.json")
        for data in reader:
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3)


def image_frames(files, column):
    """Yield the frames (H, W, 3) uint8 of parquet files with encoded images. ValueError at the
    first that is none."""
    for file in files:
        for piece in pq.ParquetFile(file).iter_batches(batch_size=64, columns=[column]):
            for cell in piece.column(0).to_pylist():
                try:
                    image = Image.open(io.BytesIO(cell["bytes"]))
                    if image.mode[0] in "IF":         # 16 bits and more: depth, as a rule
                        raise OSError(f"mode {image.mode}, not 8 bits a channel")
                    yield np.asarray(image.convert("RGB"))
                except (OSError, TypeError, KeyError) as error:
                    raise ValueError(
                        f"got a cell of {file.name} that holds no image ({error}); need an encoded "
                        "PNG or JPEG in each"
                    ) from error


def resize(image, size, fit):
    """Make an image square, (H, W, 3) -> (size, size, 3) uint8, bit-equal to the official code.
    No change if it has the size, or if size is None. fit `stretch`: PIL bicubic, aspect ratio
    lost (OpenVLA); `pad`: PIL bilinear, centred on black (openpi)."""
    height, width = image.shape[:2]
    if size is None or (height, width) == (size, size):
        return image
    image = Image.fromarray(image)
    if fit == "stretch":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    ratio = max(width / size, height / size)
    image = image.resize((int(width / ratio), int(height / ratio)), Image.Resampling.BILINEAR)
    square = Image.new("RGB", (size, size))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(square)


def cache_frames(recording, image_size, fit, cache_dir):
    """Return the .npy file with all frames, (N, C, H, W, 3) uint8, named by a hash of what it is
    made of. Frames are decoded into a temporary folder and only a complete file gets its name: if
    two processes make it at the same time, either may win."""
    recipe = [1, recording.cameras, image_size, fit]      # 1: raise it when pixels change
    for file in files_of(recording.folder):
        stat = file.stat()
        recipe.append((file.name, stat.st_size, stat.st_mtime_ns))
    name = hashlib.sha256(repr(recipe).encode()).hexdigest()[:24] + ".npy"
    default = os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/sim_real_frames"
    cache = pathlib.Path(cache_dir or default).expanduser()
    if (cache / name).exists():
        return cache / name
    size = (image_size, image_size)
    if not image_size:                # the channels come last, in some old sets first
        stored = recording.info["features"][recording.cameras[0]]["shape"]
        size = [side for side in stored if side > 4]
    shape = (len(recording.stored), len(recording.cameras), *size, 3)
    with temporary_folder(cache, "decoding-") as folder:
        part = folder / name
        decode(recording, part, shape, image_size, fit)
        os.replace(part, cache / name)
    return cache / name


@contextlib.contextmanager
def temporary_folder(parent, prefix):
    """Yield a new folder in parent, and remove it afterwards. Folders that killed processes have
    left there are removed, too: a lock on a folder ends with the process that holds it."""
    parent.mkdir(parents=True, exist_ok=True)
    for old in parent.glob(prefix + "*"):
        with contextlib.suppress(OSError), locked(old):
            shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder, locked(folder):
        yield pathlib.Path(folder)


@contextlib.contextmanager
def locked(folder):
    """Lock a folder while this process lives. OSError if another process holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def decode(recording, path, shape, image_size, fit):
    """Decode all frames into one .npy file of this shape (N, C, H, W, 3), with a thread per mp4.
    Plain writes, no memory map: through a map, a full disk would kill the process without a word,
    and all that was written would count as resident memory."""
    offset = np.lib.format.open_memmap(path, "w+", np.uint8, shape).offset    # header only
    faults = Faults()
    bar = tqdm(total=shape[0] * shape[1], unit="frame", desc="decoding once")


    def work(job):
        (camera, source), rows = job
        slot = recording.cameras.index(camera)
        if source:
            frames = video_frames(source, recording.info["fps"])
        else:
            frames = image_frames(recording.files, camera)
        fault = f"got frames missing; need one of {shape[2:]} per row"
        try:
            with open(path, "r+b") as file:
                for number, image in enumerate(frames):
                    image = resize(image, image_size, fit)
                    if number in rows and image.shape == shape[2:]:
                        place = rows.pop(number) * shape[1] + slot
                        file.seek(offset + place * image.nbytes)
                        file.write(image.tobytes())
                        bar.update()
        except ValueError as error:
            fault = str(error)
        reason = what_is(source, None) if source else None
        if reason:
            fault = f"got {reason}; need a video"
        for row in rows.values():     # what is left was not found
            faults.need(False, recording.stored[row], f"{camera}: {fault}; try {FETCH}")

    # Threads are enough: PIL and ffmpeg run outside Python's lock.
    with bar, concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        list(pool.map(work, plan_frames(recording).items()))
    faults.stop(recording.folder)


# ---- writing LeRobot v3.0 ------------------------------------------------------------------
CAMERA = "observation.images.front"
INFO = """{
    "codebase_version": "v3.0", "robot_type": "panda", "chunks_size": 1000,
    "data_files_size_in_mb": 100, "video_files_size_in_mb": 200,
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    "features": {
        "observation.images.front": {
            "dtype": "video", "names": ["height", "width", "channels"],
            "info": {"video.codec": "h264", "video.pix_fmt": "yuv420p", "video.channels": 3,
                     "video.is_depth_map": false, "has_audio": false}},
        "observation.state": {"dtype": "float32"},
        "action": {"dtype": "float32"},
        "timestamp": {"dtype": "float32", "shape": [1], "names": null},
        "frame_index": {"dtype": "int64", "shape": [1], "names": null},
        "episode_index": {"dtype": "int64", "shape": [1], "names": null},
        "index": {"dtype": "int64", "shape": [1], "names": null},
        "task_index": {"dtype": "int64", "shape": [1], "names": null}}}"""
# LeRobot reads the tasks with pandas and wants the texts as the index: this metadata says so.
PANDAS = (
    '{"index_columns": ["task"], "column_indexes": [], "pandas_version": "2.2.0", "columns": '
    '[{"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", '
    '"metadata": null}]}'
)


def write_dataset(folder, episodes, fps):
    """Write a LeRobot v3.0 data set: one h264 camera, one mp4, one parquet file. episodes: any
    iterable of (images (T, H, W, 3) uint8, states (T, S), actions (T, A), instruction, scene);
    scene: its number in a simulator, or -1. The folder appears when it is complete; if another
    process has made it in the meantime, theirs stays."""
    folder = pathlib.Path(folder).expanduser()
    if folder.exists():
        raise ValueError(f"out: got {folder}, which exists; need a new folder; try another name")
    with temporary_folder(folder.parent, ".writing-") as temporary:
        part = temporary / folder.name
        size, rows = write_video(part / f"videos/{CAMERA}/chunk-000/file-000.mp4", episodes, fps)
        write_tables(part, size, fps, *zip(*rows))
        try:
            os.replace(part, folder)
        except OSError:
            if not folder.is_dir():
                raise


def write_video(path, episodes, fps):
    """Write the images of all episodes. Returns (H, W) and a list of the rest of each, with
    (3, 256) how many pixels have each value of red, green and blue."""
    path.parent.mkdir(parents=True)
    video = None
    rows = []
    try:
        for images, states, actions, text, scene in episodes:
            if not rows:
                size = images.shape[1:3]
            even = size[0] % 2 == size[1] % 2 == 0        # yuv420p: colour at half the resolution
            alike = images.shape == (len(states), *size, 3) and len(states) == len(actions) > 0
            finite = np.isfinite(states).all() and np.isfinite(actions).all()
            if not (even and alike and finite and text and images.dtype == np.uint8):
                got = f"{images.dtype} {images.shape}, {len(actions)} actions, text {text!r}"
                need = f"uint8 (T, {size[0]}, {size[1]}, 3), H and W even, T finite rows, a text"
                raise ValueError(f"episode {len(rows)}: got {got}; need {need}; try to repair it")
            if video is None:         # -g 2: every second frame is complete, as LeRobot does it
                video = imageio_ffmpeg.write_frames(
                    str(path),
                    size[::-1],
                    fps=fps,
                    codec="libx264",
                    quality=None,
                    macro_block_size=1,
                    pix_fmt_out="yuv420p",
                    output_params=["-g", "2", "-crf", "18", "-threads", "1"],
                )
                video.send(None)
            for image in images:
                video.send(np.ascontiguousarray(image))
            channels = images.reshape(-1, 3).T
            pixels = np.stack([np.bincount(channel, minlength=256) for channel in channels])
            rows.append((np.float32(states), np.float32(actions), text, scene, pixels))
    finally:
        if video is not None:
            video.close()
    if not rows:
        raise ValueError("episodes: got none; need 1 or more; try another source")
    return size, rows


def write_tables(folder, size, fps, states, actions, texts, scenes, pixels):
    """Write everything of a LeRobot v3.0 data set but the video. states, actions, texts, scenes,
    pixels: one of each per episode."""
    values = {"observation.state": np.concatenate(states), "action": np.concatenate(actions)}
    tasks = list(dict.fromkeys(texts))
    lengths = np.array([len(part) for part in actions])
    ends = np.cumsum(lengths)
    begins = ends - lengths
    number = np.arange(len(texts))
    owner = np.repeat(number, lengths)
    index = np.arange(ends[-1])
    frame = index - begins[owner]                     # in its episode
    table = {}
    for key, value in values.items():
        table[key] = pa.FixedSizeListArray.from_arrays(pa.array(value.ravel()), value.shape[1])
    columns = dict(
        timestamp=(frame / fps).astype(np.float32),
        frame_index=frame,
        index=index,
        episode_index=owner,
        task_index=np.array([tasks.index(texts[e]) for e in owner]),
    )
    table.update(columns)
    values.update({key: column[:, None] for key, column in columns.items()})
    episodes = {
        "episode_index": number,
        "tasks": [[text] for text in texts],
        "length": lengths,
        "scene": scenes,
        "dataset_from_index": begins,
        "dataset_to_index": ends,
        f"videos/{CAMERA}/from_timestamp": begins / fps,
        f"videos/{CAMERA}/to_timestamp": ends / fps,
    }
    for part in ("data", "meta/episodes", f"videos/{CAMERA}"):
        episodes[f"{part}/chunk_index"] = 0 * number  # all in the first file
        episodes[f"{part}/file_index"] = 0 * number
    episodes.update(episode_statistics(values, begins, ends, pixels))
    task_table = pa.table(dict(task_index=range(len(tasks)), task=tasks))
    for path, content in (
        ("data/chunk-000/file-000.parquet", pa.table(table)),
        ("meta/episodes/chunk-000/file-000.parquet", pa.table(episodes)),
        ("meta/tasks.parquet", task_table.replace_schema_metadata(dict(pandas=PANDAS))),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(content, folder / path)
    stats = feature_statistics(values, sum(pixels))
    (folder / "meta/stats.json").write_text(json.dumps(stats, indent=1))
    write_info(folder, size, fps, values, len(texts), len(tasks))


def episode_statistics(values, begins, ends, pixels):
    """Return columns of meta/episodes, stats/<feature>/<statistic>: a list of one value an episode.
    LeRobot cannot split a set, delete from it or append to it without them."""
    columns = collections.defaultdict(list)
    for begin, end, counts in zip(begins, ends, pixels):
        part = {key: value[begin:end] for key, value in values.items()}
        for key, stats in feature_statistics(part, counts).items():
            for name, numbers in stats.items():
                columns[f"stats/{key}/{name}"].append(numbers)
    return columns


def feature_statistics(values, pixels):
    """Return {feature: statistics} of some frames, as LeRobot has them.

    values: {feature: (T, D)}; pixels (3, 256): how many pixels have each value of red, green, blue,
    which count as 0 .. 1; their statistics have the shape (3, 1, 1)"""
    stats = {key: statistics(value) for key, value in values.items()}
    stats[CAMERA] = collections.defaultdict(list)
    for counts in pixels:
        present = np.flatnonzero(counts)
        for name, numbers in statistics(present[:, None] / 255, counts[present]).items():
            stats[CAMERA][name].append([numbers])
    for each in stats.values():
        each["count"] = [len(values["action"])]
    return stats


def write_info(folder, size, fps, values, episodes, tasks):
    """Write info.json. values: {feature: (N, D)}; episodes, tasks: how many."""
    info = json.loads(INFO)
    frames = len(values["action"])
    features = info["features"]
    features[CAMERA]["shape"] = [*size, 3]
    for key, names in (("observation.state", STATE_NAMES), ("action", ACTION_NAMES)):
        width = values[key].shape[1]
        features[key].update(shape=[width], names=names if width == len(names) else None)
    info.update(
        fps=fps,
        total_episodes=episodes,
        total_frames=frames,
        total_tasks=tasks,
        splits=dict(train=f"0:{episodes}"),
    )
    (folder / "meta/info.json").write_text(json.dumps(info, indent=1))


# ---- the doctor: data set card, checks and command line ------------------------------------
def card(demos, sheet):
    """Print what a data set holds; write a contact sheet: a row per episode, time goes right."""
    recording = demos.recording
    lengths = demos.lengths
    print(f"{recording.folder}: LeRobot {recording.info['codebase_version']}, {demos.fps:g} fps")
    print(f"camera   {', '.join(recording.cameras)} out of {', '.join(recording.available)}")
    print(f"episodes {len(lengths)} of {lengths.min()} to {lengths.max()} frames")
    for text, frames in collections.Counter(demos.instructions).most_common():
        print(f"task     {text!r}: {frames} frames")
    stats = statistics(demos.actions)
    print("action   " + "".join(f"{column:>9}" for column in stats))
    for d, name in enumerate(action_names(demos.actions.shape[1])):
        print(f"{name:9}" + "".join(f"{values[d]:9.4f}" for values in stats.values()))
    rows = []
    for e in demos.episodes[:6]:
        samples = np.flatnonzero(demos.owner == e)
        samples = samples[np.linspace(0, len(samples) - 1, 8).astype(int)]    # 8 frames of each
        images = demos.batch(samples)["images"]
        images = images.reshape(8, -1, *images.shape[-2:])        # cameras below each other
        rows.append(np.concatenate(images, axis=1))               # (C H, 8 W, 3)
    try:
        Image.fromarray(np.concatenate(rows)).save(sheet)
        print(f"contact sheet of {len(rows)} episodes: {sheet}")
    except OSError as error:
        warnings.warn(f"no contact sheet: {error}")


def examine(demos, policy, name):
    """Print how a policy would see these demonstrations. Returns Problems: what stands between
    them and --real-data, each with its remedy."""
    import envs
    import policies

    recording = demos.recording
    problems = doubts(recording)
    size = demos.actions.shape[1]
    need = f"{len(ACTION_NAMES)} (deltas of one end effector: {' '.join(ACTION_NAMES)})"
    problems.need(size == len(ACTION_NAMES), "actions", f"{size} numbers", need, CONVERT)

    print(f"\nfor the policy {name}")
    print(f"rate     {demos.fps:g} actions a second, {envs.CONTROL_HZ} in simulation")
    if demos.fps >= 1.5 * envs.CONTROL_HZ:
        print("         a step means less here than there: see --convert control-rate")
    texts = list(dict.fromkeys(demos.instructions))
    for text in texts:
        pieces = [policy.tokenizer.id_to_token(number) for number in policy.encode(text)]
        print(f"tokens   {text!r}: {len(pieces)}, {' '.join(pieces[:12])}")
    try:
        policies.check_texts(policy, texts)
    except ValueError as error:
        problems.append(str(error))
    if size == len(ACTION_NAMES):
        grip = demos.actions[:, 6]
        between = (np.abs(grip) < 0.9).mean()
        print(f"gripper  {(grip >= 0.9).mean():.0%} of the frames open (+1), "
              f"{(grip <= -0.9).mean():.0%} close (-1), {between:.0%} between")
        share, beyond = beyond_range(demos, policy)
        print(f"range    {share:.2%} of the frames are beyond 1.5 times what the policy scales by")
        if share > ODD_SHARE:
            problems.append(beyond)
    pauses = 1 - len(demos.without_pauses(PAUSE_SPEED / demos.fps)) / len(demos)
    print(f"pauses   {pauses:.0%} of the frames hardly move, and are left out (--pause)")
    return problems


def beyond_range(demos, policy):
    """Return the share of frames beyond 1.5 times the range that a policy scales by, in the
    dimension that has most of them, and a message. OpenVLA learns such actions as the end of its
    range; pi0.5's loss explodes. The gripper is left out: its range is always -1 .. 1."""
    if not hasattr(policy, "quantiles") or not policy.has_statistics():
        return 0.0, ""
    low, high = (bound.cpu().numpy() for bound in policy.quantiles("action"))
    reach, share = reach_of(demos.actions, low, high)
    named = zip(ACTION_NAMES[:6], share, reach)
    some = [f"{name} {part:.2%} (up to {far:.3g})" for name, part, far in named if part > 0]
    remedy = "sft_warmstart.py --statistics data, so that these demonstrations set the range"
    got = f"frames beyond the policy's range, q01 .. q99 as -1 .. 1: {', '.join(some)}"
    return share[:6].max(), (
        f"{demos.recording.folder}: got {got}; need all within -1.5 .. 1.5; try {remedy}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("path", help="data set to examine: a LeRobot folder, or a hub id owner/name")
    add("--policy", default="openvla", help="the policy that is to learn from it")
    add("--camera", nargs="*", help="image features, or their last parts; default: one, in colour")
    add("--convert", nargs="*", default=[], help=f"other conventions: {', '.join(CONVERSIONS)}, "
        "or Python files with convert(episode); one after the other")
    add("--image-size", type=int, default=64, help="side of the frames, pixels; even with --make")
    add("--make", action="store_true", help="first record demonstrations into path, a new folder")
    add("--task", default="open-drawer", help="a task of envs.py, or all")
    add("--domain", default="sim", help="sim (scripted expert) or real (stand-in, tele-operator)")
    add("--episodes", type=int, default=50, help="successful demonstrations per task, 1 or more")
    add("--seed", type=int, default=0, help="which scenes and which mistakes, 0 or more")
    args = parser.parse_args()
    import evaluate
    import policies

    with evaluate.reported():
        policy = policies.load_policy(args.policy)
        if args.make:
            settings = (args.task, args.domain, args.episodes, args.path, args.seed)
            make_demos(*settings, image_size=args.image_size)
        problems = doctor(args, policy)
        if problems:
            print("\nnot ready for --real-data:\n" + "\n".join(f"* {each}" for each in problems))
            sys.exit(1)
        print(f"\nready for --real-data {args.path}")


def doctor(args, policy):
    """Print the card of a data set and how a policy would see it. Returns a list of what stands
    between it and --real-data, each with its remedy."""
    try:
        recording = read_lerobot(args.path, args.camera, None, args.convert)
        frames = cache_frames(recording, args.image_size, policy.fit, None)
    except ValueError as error:
        return str(error).splitlines()
    demos = Demos(recording, frames, policy.horizon)
    card(demos, "card.png")
    return examine(demos, policy, args.policy)


if __name__ == "__main__":
    main()
