"""Demonstrations: LeRobot data sets in and out, the sampler of sim and real, statistics.

    Stage I    L = alpha * L_SFT(sim) + (1 - alpha) * L_SFT(real)     (RL-Co, arXiv 2602.12628)

is realised by sampling: a sample is simulated with probability alpha and real otherwise,
whatever the sizes of the two sets.

    python real_data.py demos/real --make --domain real --task open-drawer --episodes 50
    python real_data.py demos/real                            # data set card, contact sheet
    python real_data.py my_data --convert my_robot.py         # your robot: see open_dataset

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
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import runpy
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
MAX_MOVE = 0.1         # m per control step; a longer move is hardly a delta in metres
MAX_TURN = 0.5         # rad per control step; a larger turn is hardly a delta in radians
EXPERT_NOISE = 0.005   # m; disturbs what the scripted expert executes, not what is recorded
CONVERT = "a convert function (--convert of real_data.py), see open_dataset"


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
        self.fps = recording.info["fps"]
        # Read with preadv, not through a memory map: mapped pages count as resident memory,
        # which would grow to the file's size, 18 GB for 1,500 episodes x 80 frames at 224 px.
        self.file = open(frames_path, "rb")
        frames = np.load(frames_path, mmap_mode="r")
        self.offset = frames.offset
        self.frame_shape = frames.shape[1:]
        self.rows = np.arange(len(frames))
        for name in ("owner", "actions", "states", "instructions"):
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
        if held_out == 0:
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
        )

    def load_state_dict(self, state):
        """Go to a position. ValueError if it is one of another stream."""
        new = dict(self.state_dict(), step=state["step"], drawn=state["drawn"])
        if new != state:
            raise ValueError(f"resume: got {new}; need {state}; try the settings of before")
        self.step = state["step"]
        self.drawn = list(state["drawn"])


def sample_shapes(demos):
    """Return {array: shape of one sample}."""
    batch = demos.batch(np.array([0]))
    return {key: batch[key].shape[1:] for key in BATCH}


# ---- normalisation statistics --------------------------------------------------------------
def statistics(values):
    """Return exact statistics of values (N, D) over the whole set: {name: list of D numbers}."""
    values = np.asarray(values, np.float64)
    stats = dict(zip(("q01", "q99"), np.quantile(values, (0.01, 0.99), axis=0)))
    for name in ("min", "max", "mean", "std"):
        stats[name] = getattr(values, name)(axis=0)
    return {name: value.tolist() for name, value in stats.items()}


def dataset_statistics(demos):
    """Return {"action": statistics, "state": statistics} of a list of Demos together, for
    policy.set_statistics. Sim and real share them, as in RL-Co: actions mean the same in both."""
    actions = statistics(np.concatenate([part.actions for part in demos]))
    states = statistics(np.concatenate([part.states for part in demos]))
    widen(actions)
    return dict(action=actions, state=states)


def widen(stats):
    """Make q01 .. q99 of actions fit to scale by, in place. Where they collapse, a rare motion
    would be scaled far beyond [-1, 1]: take min and max instead, for the gripper [-1, 1]. One
    warning per dimension names it. The policies widen what is still narrower than MIN_RANGE."""
    for d, name in enumerate(action_names(len(stats["q01"]))):
        if stats["q99"][d] - stats["q01"][d] >= MIN_RANGE:
            continue
        stats["q01"][d] = -1.0 if name == "gripper" else stats["min"][d]
        stats["q99"][d] = 1.0 if name == "gripper" else stats["max"][d]
        got = f"q01 and q99 less than {MIN_RANGE:g} apart"
        need = "a range to scale by (min and max serve for now)"
        warnings.warn(f"{name}: got {got}; need {need}; try demonstrations that use it")


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
    convert=None,
    cache_dir=None,
):
    """Open a LeRobot data set (a folder, or a hub id owner/name) for training. Returns Demos.

    image_size  side [pixels] of the square frames the policy sees; None: as stored
    horizon     K, actions per sample
    cameras     an image feature or its last part (`front`), or up to three; None: choose_cameras
    fit         how a frame becomes square: `stretch` (OpenVLA) or `pad` (pi0.5), see resize
    action_dim  the policy's action size A; None: any
    convert     function that brings an episode to the contract's units, before any check: gets
                and returns a dict of actions (T, A), states (T, S), instructions (T strings)
    cache_dir   folder for the decoded frames; None: ~/.cache/sim_real_frames
    ValueError lists everything that is wrong with the set; then nothing was written.

    my_robot.py for a robot that stores absolute poses, and its gripper as 0 open .. 1 closed:

        def convert(episode):
            poses = episode["actions"]             # (T, 7): x y z [m], r p y [rad], gripper
            before = np.vstack([episode["states"][:1, :6], poses[:-1, :6]])
            delta = poses[:, :6] - before          # for angles: if it turns about one axis only
            delta[:, 3:] = (delta[:, 3:] + np.pi) % (2 * np.pi) - np.pi
            return dict(episode, actions=np.column_stack([delta, 1 - 2 * poses[:, 6]]))
    """
    if fit not in ("stretch", "pad"):
        raise ValueError(f"fit: got {fit}; need stretch or pad; try the policy's `fit`")
    recording = read_lerobot(path, cameras, action_dim, convert)
    demos = Demos(recording, cache_frames(recording, image_size, fit, cache_dir), horizon)
    if demos.actions.shape[1] == len(ACTION_NAMES):
        warn_of_units(demos)
    return demos


def load_convert(path):
    """Return the function `convert` of a Python file, for open_dataset."""
    try:
        return runpy.run_path(str(path))["convert"]
    except (OSError, KeyError, SyntaxError) as error:
        need = "a Python file with a function convert(episode)"
        raise ValueError(f"{path}: got {error!r}; need {need}; try help(open_dataset)") from error


def warn_of_units(demos):
    """Warn of actions that are probably in other units than the contract's."""
    size = np.abs(demos.actions)
    grip = demos.actions[:, 6]
    zero_to_one = (grip < 0.99) & (grip.min() > -0.01)
    for odd, need in (
        (size[:, :3].max(axis=1) > MAX_MOVE, f"deltas in metres, up to {MAX_MOVE}"),
        (size[:, 3:6].max(axis=1) > MAX_TURN, f"deltas in radians, up to {MAX_TURN}"),
        ((size[:, 6] > 1.01) | zero_to_one, "a gripper of -1 close .. +1 open"),
    ):
        if odd.mean() > 0.01:
            where = f"{demos.recording.folder}: got {odd.mean():.0%} of the frames unlike that"
            warnings.warn(f"{where}; need {need}; try {CONVERT}")


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

    spawn = multiprocessing.get_context("spawn")      # OpenGL contexts do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        write_dataset(out, demonstrations(), envs.CONTROL_HZ)


# ---- plumbing: skip on first reading -------------------------------------------------------
# ---- reading LeRobot: all but the pixels ---------------------------------------------------
VERSIONS = ("v2.0", "v2.1", "v3.0")  # v2.0 differs from v2.1 only in where it keeps statistics
FETCH = "downloading it again (git lfs pull, if it is a git-lfs pointer)"
REPAIR = "repairing or removing these episodes"


@dataclasses.dataclass
class Recording:
    """A LeRobot folder, read but for its pixels."""

    folder: pathlib.Path
    info: dict                        # meta/info.json
    cameras: list                     # the chosen image features
    available: list                   # all image features
    episodes: list                    # E dicts, LeRobot's metadata
    files: list                       # parquet files with the rows, in order
    owner: np.ndarray                 # (N,) episode number of each frame
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
    available = [key for key in features if features[key]["dtype"] in ("image", "video")]
    if cameras is None:
        cameras = sorted(available, key=lambda key: camera_rank(key, features[key]))[:1]
    elif isinstance(cameras, str):
        cameras = [cameras]
    chosen = []
    for name in cameras:
        chosen += [key for key in available if name in (key, key.split(".")[-1])]
    if not 1 <= len(chosen) == len(cameras) <= 3:
        raise ValueError(f"cameras: got {cameras}; need 1 to 3 of {available}; try one of these")
    return chosen, available


def camera_rank(key, feature):
    """Return a sorting key: colour before depth, scene cameras before those on the wrist."""
    info = feature.get("info") or {}
    depth = (
        info.get("is_depth_map", info.get("video.is_depth_map"))
        or "depth" in key.lower()
        or 1 in feature["shape"]      # one channel
    )
    return bool(depth), any(part in key.lower() for part in ("wrist", "hand", "gripper"))


def read_rows(file, columns=None):
    """Return the rows of a .parquet, .jsonl or .json file (one row), a list of dicts. ValueError
    if it cannot be read."""
    try:
        if file.suffix == ".parquet":
            return pq.ParquetFile(file).read(columns).to_pylist()
        text = file.read_text()
        lines = [text] if file.suffix == ".json" else text.splitlines()
        return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: got {error}; need LeRobot's file; try {FETCH}") from error


def read_meta(folder):
    """Return info.json, a dict per episode in order, and {task_index: instruction}."""
    info = read_rows(folder / "meta/info.json")[0]
    version = info.get("codebase_version")
    if version not in VERSIONS:
        need = f"LeRobot {', '.join(VERSIONS)}"
        raise ValueError(f"{folder}: got version {version}; need {need}; try LeRobot's converter")
    if version == "v3.0":
        files = sorted((folder / "meta/episodes").rglob("*.parquet"))
        tasks = read_rows(folder / "meta/tasks.parquet")
    else:
        files = [folder / "meta/episodes.jsonl"]
        tasks = read_rows(folder / "meta/tasks.jsonl")
    episodes = [row for file in files for row in read_rows(file)]
    texts = {}
    for task in tasks:
        number = task.pop("task_index")
        texts[number] = next(iter(task.values()))     # `task`, or the name of a pandas index
    return info, sorted(episodes, key=lambda row: row["episode_index"]), texts


def read_lerobot(path, cameras=None, action_dim=len(ACTION_NAMES), convert=None):
    """Read a LeRobot data set but for its pixels, into a Recording; arguments as in open_dataset.
    ValueError lists all that is wrong with the rows."""
    folder = local_folder(path)
    info, episodes, texts = read_meta(folder)
    features = info["features"]
    cameras, available = choose_cameras(features, cameras)
    action = "action" if "action" in features else "actions"
    state = "observation.state" if "observation.state" in features else "state"
    columns = ["episode_index", "frame_index", "task_index", action, state]
    files = sorted((folder / "data").rglob("*.parquet"))
    stream = (row for file in files for row in read_rows(file, columns))
    faults = Faults()
    parts = []
    for episode in episodes:
        number = episode["episode_index"]
        length = episode["length"]
        rows = list(itertools.islice(stream, length))
        complete = np.array_equal(numbers(rows, "frame_index"), np.arange(length))
        if not complete or (numbers(rows, "episode_index") != number).any():
            fault = f"rows: got others; need frames 0 .. length - 1; try {FETCH}"
            faults.need(False, number, fault)
            continue
        part = dict(
            actions=vectors(rows, action),
            states=vectors(rows, state),
            instructions=[texts.get(task) for task in numbers(rows, "task_index").tolist()],
        )
        if convert:
            part = convert(part)
        check_part(faults, number, length, part, action_dim)
        parts.append(dict(part, owner=[number] * length))
    faults.stop(folder)
    arrays = dict(owner=int, instructions=object, actions=np.float32, states=np.float32)
    for name, kind in arrays.items():
        arrays[name] = np.concatenate([part[name] for part in parts]).astype(kind)
    return Recording(folder, info, cameras, available, episodes, files, **arrays)


def numbers(rows, column):
    """Return a column of T rows as (T,) integers; some writers store each as a list of one."""
    return np.array([row[column] for row in rows]).reshape(-1)


def vectors(rows, column):
    """Return a column of T rows as (T, size) float32; size 0 if there is no such column."""
    return np.array([row.get(column, ()) for row in rows], np.float32).reshape(len(rows), -1)


def check_part(faults, number, length, part, action_dim):
    """Note what is wrong with the actions, states and instructions of one episode."""
    for name, values in part.items():
        got = f"{len(values)} {name} for {length} frames"
        fault = f"convert: got {got}; need one each; try help(open_dataset)"
        faults.need(len(values) == length, number, fault)
    for name in ("actions", "states"):
        finite = np.isfinite(part[name]).all()
        faults.need(finite, number, f"{name}: got nan or inf; need finite numbers; try {REPAIR}")
    size = part["actions"].shape[1]
    need = f"{action_dim} ({' '.join(ACTION_NAMES)})"
    fault = f"actions: got {size} numbers; need {need}; try {CONVERT}"
    faults.need(action_dim in (None, size), number, fault)
    fault = f"instructions: got none; need a text per frame; try {CONVERT}"
    faults.need(all(part["instructions"]), number, fault)


# ---- pixels and their cache ----------------------------------------------------------------
def plan_frames(recording):
    """Return where every frame comes from, {(camera, mp4): {number: row}}; number: of the
    frame in the mp4; row: in the whole set. Images in the parquet files (mp4 None) come in the
    order of the rows. By LeRobot's rules, an episode's frames follow each other in its mp4."""
    jobs = collections.defaultdict(dict)
    for camera in recording.cameras:
        for episode in recording.episodes:
            rows = np.flatnonzero(recording.owner == episode["episode_index"])
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
    file = recording.folder / recording.info["video_path"].format_map(names)
    return file, names.get("from_timestamp", 0.0)


def video_frames(path):
    """Yield the frames (H, W, 3) uint8 of an mp4, up to its end or to the first broken one."""
    # -xerror: stop at a broken packet, which would otherwise silently shift all later frames.
    # passthrough: each stored frame exactly once; by default ffmpeg repeats and drops some.
    reader = imageio_ffmpeg.read_frames(
        str(path),
        pix_fmt="rgb24",
        input_params=["-xerror"],
        output_params=["-fps_mode", "passthrough"],
    )
    with contextlib.closing(reader), contextlib.suppress(OSError, RuntimeError, StopIteration):
        width, height = next(reader)["size"]
        for data in reader:
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3)


def image_frames(files, column):
    """Yield the frames (H, W, 3) uint8 of parquet files with encoded images."""
    for file in files:
        for piece in pq.ParquetFile(file).iter_batches(batch_size=64, columns=[column]):
            for cell in piece.column(0).to_pylist():
                yield np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))


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
    for file in sorted(recording.folder.rglob("*.*")):
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
    shape = (len(recording.owner), len(recording.cameras), *size, 3)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="decoding-", dir=cache) as folder:
        part = pathlib.Path(folder, name)
        decode(recording, part, shape, image_size, fit)
        os.replace(part, cache / name)
    return cache / name


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
        frames = video_frames(source) if source else image_frames(recording.files, camera)
        with open(path, "r+b") as file:
            for number, image in enumerate(frames):
                image = resize(image, image_size, fit)
                if number in rows and image.shape == shape[2:]:
                    place = rows.pop(number) * shape[1] + slot
                    file.seek(offset + place * image.nbytes)
                    file.write(image.tobytes())
                    bar.update()
        need = f"one of {shape[2:]} per row"
        for row in rows.values():     # what is left was not found
            fault = f"{camera}: got frames missing; need {need}; try {FETCH}"
            faults.need(False, recording.owner[row], fault)

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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder.parent) as temporary:
        part = pathlib.Path(temporary, folder.name)
        size, rows = write_video(part / f"videos/{CAMERA}/chunk-000/file-000.mp4", episodes, fps)
        write_tables(part, size, fps, *zip(*rows))
        try:
            os.replace(part, folder)
        except OSError:
            if not folder.is_dir():
                raise


def write_video(path, episodes, fps):
    """Write the images of all episodes. Returns (H, W) and a list of the rest of each."""
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
            rows.append((np.float32(states), np.float32(actions), text, scene))
    finally:
        if video is not None:
            video.close()
    if not rows:
        raise ValueError("episodes: got none; need 1 or more; try another source")
    return size, rows


def write_tables(folder, size, fps, states, actions, texts, scenes):
    """Write everything of a LeRobot v3.0 data set but the video. states, actions, texts, scenes:
    one of each per episode."""
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
    table.update(
        timestamp=(frame / fps).astype(np.float32),
        frame_index=frame,
        index=index,
        episode_index=owner,
        task_index=[tasks.index(texts[e]) for e in owner],
    )
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
    task_table = pa.table(dict(task_index=range(len(tasks)), task=tasks))
    for path, content in (
        ("data/chunk-000/file-000.parquet", pa.table(table)),
        ("meta/episodes/chunk-000/file-000.parquet", pa.table(episodes)),
        ("meta/tasks.parquet", task_table.replace_schema_metadata(dict(pandas=PANDAS))),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(content, folder / path)
    write_info(folder, size, fps, values, len(texts), len(tasks))


def write_info(folder, size, fps, values, episodes, tasks):
    """Write info.json and stats.json. values: {feature: (N, D)}; episodes, tasks: how many."""
    info = json.loads(INFO)
    frames = len(values["action"])
    features = info["features"]
    features[CAMERA]["shape"] = [*size, 3]
    stats = {}
    for (key, value), names in zip(values.items(), (STATE_NAMES, ACTION_NAMES)):
        stats[key] = dict(statistics(value), count=[frames])
        width = value.shape[1]
        features[key].update(shape=[width], names=names if width == len(names) else None)
    info.update(
        fps=fps,
        total_episodes=episodes,
        total_frames=frames,
        total_tasks=tasks,
        splits=dict(train=f"0:{episodes}"),
    )
    (folder / "meta/stats.json").write_text(json.dumps(stats, indent=1))
    (folder / "meta/info.json").write_text(json.dumps(info, indent=1))


# ---- data set card and command line --------------------------------------------------------
def card(demos, sheet):
    """Print what a data set holds; write a contact sheet: a row per episode, time goes right."""
    recording = demos.recording
    lengths = demos.lengths
    print(f"{recording.folder}: LeRobot {recording.info['codebase_version']}, {demos.fps} fps")
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
        rows.append(np.concatenate(demos.batch(samples)["images"], axis=1))   # (H, 8 W, 3)
    Image.fromarray(np.concatenate(rows)).save(sheet)
    print(f"contact sheet of {len(rows)} episodes: {sheet}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("path", help="data set to describe: a LeRobot folder, or a hub id owner/name")
    add("--camera", help="image feature or its last part; default: a scene camera in colour")
    add("--convert", help="Python file with convert(episode), for other units: see open_dataset")
    add("--image-size", type=int, default=64, help="side of the frames, pixels; even with --make")
    add("--make", action="store_true", help="first record demonstrations into path, a new folder")
    add("--task", default="open-drawer", help="a task of envs.py, or all")
    add("--domain", default="sim", help="sim (scripted expert) or real (stand-in, tele-operator)")
    add("--episodes", type=int, default=50, help="successful demonstrations per task, 1 or more")
    add("--seed", type=int, default=0, help="which scenes and which mistakes, 0 or more")
    args = parser.parse_args()
    try:
        convert = load_convert(args.convert) if args.convert else None
        if args.make:
            settings = (args.task, args.domain, args.episodes, args.path, args.seed)
            make_demos(*settings, image_size=args.image_size)
        demos = open_dataset(
            args.path, args.image_size, cameras=args.camera, action_dim=None, convert=convert
        )
        card(demos, "card.png")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
