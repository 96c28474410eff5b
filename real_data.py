"""Demonstrations: LeRobot data sets in and out, normalisation statistics, the mixer of sim and real.

    Stage I    L = alpha * L_SFT(sim) + (1 - alpha) * L_SFT(real)       (RL-Co, arXiv 2602.12628)

realised by sampling: a sample is simulated with probability alpha, else real, whatever the sizes of the two sets.

    python real_data.py --make --domain real --task open-drawer --episodes 50 --out demos/real    # record
    python real_data.py demos/real                                                                # data set card

    demos = open_dataset("demos/real", image_size=64, horizon=8)       # LeRobot folder (v2.1, v3.0) or hub id
    train, held_out = demos.split(0.1)                                 # whole episodes
    batch = next(MixSampler(sim=None, real=train, alpha=0, batch=32))  # a dict, see Demos.batch

Shapes   N frames of E episodes, B batch, K actions a sample (horizon), C cameras, A action and S state size
Actions  (7,) = dx dy dz [m], droll dpitch dyaw [rad] per control step in the robot base frame, gripper in [-1 close,
         +1 open]; physical units as stored. Normalisation belongs to the policy's checkpoint.
Pixels   are decoded once into ~/.cache/sim_real_frames, into a file named by a hash of the data and the size.
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
import shutil
import subprocess
import sys
import warnings

import imageio_ffmpeg                        # imageio's ffmpeg plugin brings its own ffmpeg: h264, AV1
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image                        # comes with imageio
from tqdm import tqdm

ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
STATE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper_opening", "zero")
VERSIONS = ("v2.0", "v2.1", "v3.0")          # v2.0 differs from v2.1 only in where it keeps statistics
TIME_TOLERANCE = 1e-4                        # s between a row's time and its video frame; LeRobot's own limit
MIN_RANGE = 1e-3                             # m or rad; a dimension with q99 - q01 below this does not move
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FIRST_FILE = dict(chunk_index=0, file_index=0)
CACHE_FORMAT = 1                             # raise it when cached pixels would come out differently


def cores():
    """CPU cores that this process may use: less than the machine has, where a scheduler shares it out."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ------------------------------------------------------------------------------- reading LeRobot folders
class Problems(dict):
    """{what is wrong: set of episodes}. Collected first, then raised together: one run shows every offender."""

    def check(self, sound, what, *episodes):
        if not sound:
            self.setdefault(what, set()).update(episodes)

    def stop(self, where):
        lines = [f"  - {what}" + (f": episode {str(sorted(ids))[1:-1]}" if ids else "") for what, ids in self.items()]
        if lines:
            raise ValueError("\n".join([f"{where}: nothing was written. Repair or remove:", *lines]))


@dataclasses.dataclass
class Episode:
    index: int                               # LeRobot's episode_index
    length: int                              # T frames, as the metadata promise
    data_file: pathlib.Path                  # parquet file with its rows
    sources: dict                            # camera -> (mp4, seconds into it at the start), or (data_file, None)
    scene: int = -1                          # its number in the simulator, if this file recorded it
    begin: int = 0                           # its first frame's place among all frames of the set
    positions: np.ndarray = None             # (T,) row numbers in data_file; None if they could not be read
    timestamps: np.ndarray = None            # (T,) float64 [s]
    actions: np.ndarray = None               # (T, A) float32
    states: np.ndarray = None                # (T, S) float32, S = 0 in a set without state
    instructions: list = None                # T strings


@dataclasses.dataclass
class Recording:
    """A LeRobot folder, read except for its pixels. The data are sound if problems is empty."""
    folder: pathlib.Path
    info: dict                               # meta/info.json
    cameras: list                            # the chosen image features
    keys: dict                               # names of the features `actions` and, if there are any, `states`
    episodes: list
    problems: Problems

    def size(self, camera):
        """(H, W) that info.json declares. The channels come last, in some old sets first."""
        return tuple(side for side in self.info["features"][camera]["shape"] if side > 4)


def local_folder(path):
    """The folder of a data set; `owner/name` that is no folder comes from the hub or from its local cache."""
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    try:
        return pathlib.Path(snapshot_download(str(path), repo_type="dataset"))
    except Exception as error:               # HTTP, hub and system errors share no narrower base class
        raise ValueError(f"{path}: no such folder, no hub id in reach ({type(error).__name__}). Offline? Elsewhere:\n"
                         f"  hf download {path} --repo-type dataset --local-dir {folder.name}\n"
                         "then copy that folder here and give its path") from error


def choose_cameras(features, cameras):
    """Image features to use, up to the three of pi0.5. None: the first in colour that is not on the wrist."""
    found = [key for key, feature in features.items() if feature["dtype"] in ("image", "video")]
    if cameras is None:
        return sorted(found, key=lambda key: ("depth" in key, "wrist" in key or "hand" in key))[:1]
    cameras = [cameras] if isinstance(cameras, str) else list(cameras)
    known = {key.split(".")[-1]: key for key in found} | {key: key for key in found}       # `front` is enough
    unknown = [camera for camera in cameras if camera not in known]
    if unknown or not 1 <= len(cameras) <= 3:
        raise ValueError(f"cameras {cameras}: need 1 to 3 out of {found}; unknown: {unknown}")
    return [known[camera] for camera in cameras]


def read_meta(folder, info, cameras):
    """Episodes without their rows, and {task_index: instruction}. v2.x: one parquet file and one mp4 a camera for each
    episode. v3.0: many episodes a file; data and every camera go on to a next file independently."""
    if info["codebase_version"] == "v3.0":
        table = pq.ParquetFile(folder / "meta/tasks.parquet").read()
        # The text is a pandas index: called `task` by recent writers, `__index_level_0__` by lerobot 0.4.x.
        text = next(name for name in table.column_names if name != "task_index")
        tasks = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))
        rows = [row for path in sorted((folder / "meta/episodes").glob("*/*.parquet"))
                for row in pq.ParquetFile(path).read().to_pylist()]
    else:
        tasks, rows = ([json.loads(line) for line in (folder / "meta" / name).read_text().splitlines()]
                       for name in ("tasks.jsonl", "episodes.jsonl"))
        tasks = {row["task_index"]: row["task"] for row in tasks}
        rows = [dict(row, episode_chunk=row["episode_index"] // info["chunks_size"]) for row in rows]

    def file(path, row, kind, **names):      # kind: "data" or "videos/<camera>"; v3.0 has indices for each
        own = {key: row[f"{kind}/{key}"] for key in ("chunk_index", "file_index") if f"{kind}/{key}" in row}
        return folder / info[path].format(**row, **own, **names)

    episodes = []
    for row in rows:
        data = file("data_path", row, "data")
        sources = {key: (file("video_path", row, f"videos/{key}", video_key=key),
                         row.get(f"videos/{key}/from_timestamp", 0.))
                   if info["features"][key]["dtype"] == "video" else (data, None) for key in cameras}
        scene = row.get("scene")             # ours is a number; others may call something else so
        scene = scene if isinstance(scene, int) else -1
        episodes.append(Episode(row["episode_index"], row["length"], data, sources, scene))
    return sorted(episodes, key=lambda episode: episode.index), tasks


def read_lerobot(path, cameras=None, action_key=None, state_key=None, task_key=None, action_dim=None):
    """Reads a LeRobot data set but for its pixels; arguments as in open_dataset. Returns a Recording; its problems say
    what is wrong. ValueError where nothing can be read: no folder, unknown version, no meta."""
    folder = local_folder(path)
    try:
        info = json.loads((folder / "meta/info.json").read_text())
        version, features = info["codebase_version"], info["features"]
        if version not in VERSIONS:
            raise ValueError(f"unknown LeRobot version {version!r}, need one of {', '.join(VERSIONS)}")
        cameras = choose_cameras(features, cameras)
        episodes, tasks = read_meta(folder, info, cameras)
    except (KeyError, StopIteration, OSError, ValueError, TypeError, AttributeError, pa.ArrowException) as error:
        raise ValueError(f"{folder}: not a readable LeRobot data set ({type(error).__name__}: {error})") from error
    usual = dict(actions=[action_key] if action_key else ["action", "actions"],
                 states=[state_key] if state_key else ["observation.state", "state"])
    keys = {name: key for name, names in usual.items() for key in names[::-1] if key in features}
    size = features[keys["actions"]]["shape"][0] if "actions" in keys else None
    problems, total = Problems(), info.get("total_episodes")
    for name in ["actions"] + ["states"] * bool(state_key):
        problems.check(name in keys, f"no feature {' or '.join(usual[name])} for the {name}, only {sorted(features)}")
    problems.check(None in (size, action_dim) or size == action_dim, f"actions of size {size}, need {action_dim}")
    problems.check(cameras, f"no image or video feature in {sorted(features)}")
    problems.check(episodes and total in (None, len(episodes)), f"{len(episodes) or 'zero'} episodes, not {total}")
    recording = Recording(folder, info, cameras, keys, episodes, problems)
    frames, files = 0, collections.defaultdict(list)
    for episode in episodes:
        episode.begin, frames = frames, frames + episode.length
        files[episode.data_file].append(episode)
    for file, members in files.items():
        read_rows(recording, file, members, task_key, tasks)
    return recording


def read_rows(recording, file, episodes, task_key, tasks):
    """Fills and checks the episodes that lie in one parquet file."""
    problems, features, step = recording.problems, recording.info["features"], 1 / recording.info["fps"]
    indices, keys, text_key = [part.index for part in episodes], recording.keys, task_key or "task_index"
    try:
        scalars = ("episode_index", "frame_index", "timestamp")
        table = pq.ParquetFile(file).read([*scalars, text_key, *keys.values()])
        # Some writers keep the declared shape [1]: lists of one number.
        flat = {key: table[key].combine_chunks().flatten() if pa.types.is_nested(table[key].type) else table[key]
                for key in (*scalars, text_key)}
        owner, frame, times = (flat[key].to_numpy() for key in scalars)
        texts = [text if task_key else tasks.get(text) for text in flat[text_key].to_pylist()]
        columns = {name: (table[key].to_pylist(), features[key]["shape"][0]) for name, key in keys.items()}
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        return problems.check(False, f"data file, or one of its columns, missing or broken ({error})", *indices)
    for episode in episodes:
        rows = np.flatnonzero(owner == episode.index)
        rows = episode.positions = rows[np.argsort(frame[rows])]
        episode.timestamps, episode.instructions = times[rows].astype(np.float64), [texts[row] for row in rows]
        episode.states = np.zeros((len(rows), 0), np.float32)
        # float32 seconds are exact to 6e-8 of their value; that much is no fault of the recording
        steady = np.abs(np.diff(episode.timestamps) - step) <= TIME_TOLERANCE + 2.4e-7 * np.abs(episode.timestamps[1:])
        whole = len(rows) and np.array_equal(frame[rows], range(episode.length))
        worded = all(isinstance(text, str) and text.strip() for text in episode.instructions)
        problems.check(whole, "rows missing, doubled, or none at all", episode.index)
        problems.check(steady.all(), f"timestamps out of tolerance: not 1/fps = {step:g} s apart", episode.index)
        problems.check(worded, "instruction missing", episode.index)
        for name, (column, width) in columns.items():
            values = [column[row] for row in rows]
            sized = all(np.size(value) == width for value in values)
            problems.check(sized, f"{name} of another size than info.json declares", episode.index)
            if sized:
                setattr(episode, name, np.array(values, np.float32).reshape(-1, width))
                problems.check(np.isfinite(getattr(episode, name)).all(), f"non-finite {name}", episode.index)


# ------------------------------------------------------------------------------- pixels
def video_index(path):
    """Times (F,) [s] of all frames of a video in the order of display, and (H, W). Decodes nothing: 20 ms."""
    options = "-map 0:v:0 -c copy -f framecrc -".split()
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-copyts", "-i", path, *options]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    header = {line.split()[0]: line.split()[-1] for line in lines if line.startswith("#")}
    numerator, denominator = header.get("#tb", "1/1").split("/")     # length of a tick [s]
    size = tuple(int(side) for side in header.get("#dimensions", "0x0").split("x"))[::-1]
    ticks = [int(line.split(",")[2]) for line in lines if line[:1].isdigit()]        # stream, dts, pts, ...
    return np.sort(np.array(ticks)) * (int(numerator) / int(denominator)), size


def plan_frames(recording):
    """Where every frame comes from, {(file, camera): [(number, row, episode), ...]}; number: of the frame in the mp4 or
    of the row in the parquet file; row: in the whole set. Reads no pixel, adds what is missing to the problems."""
    jobs, problems = collections.defaultdict(list), recording.problems
    episodes = [episode for episode in recording.episodes if episode.positions is not None]
    files = {file for episode in episodes for file, start in episode.sources.values() if start is not None}
    index = {file: video_index(file) for file in files if file.is_file()}
    for episode in episodes:
        for camera, (file, start) in episode.sources.items():
            numbers = episode.positions
            if start is not None:
                problems.check(file in index, f"{camera}: video file missing", episode.index)
                times, size = index.get(file, (np.zeros(0), recording.size(camera)))
                problems.check(size == recording.size(camera),
                               f"{camera}: images of another size, {size}, than declared", episode.index)
                wanted = start + episode.timestamps
                numbers = np.searchsorted(times, wanted - TIME_TOLERANCE)      # the first frame that is not too early
                problems.check((np.append(times, np.inf)[numbers] - wanted <= TIME_TOLERANCE).all(),
                               f"{camera}: frames missing or timestamps out of tolerance", episode.index)
            jobs[file, camera] += zip(numbers.tolist(), itertools.count(episode.begin), itertools.repeat(episode.index))
    return jobs


def video_frames(path):
    """The frames (H, W, 3) uint8 of an mp4, up to its end or to the first one that is broken."""
    # -xerror: stop at a broken packet, which would otherwise shift all later frames by one without a word.
    # passthrough: every stored frame exactly once; by default ffmpeg repeats and drops some to keep the rate.
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24", input_params=["-xerror"],
                                        output_params=["-fps_mode", "passthrough"])
    with contextlib.closing(reader), contextlib.suppress(OSError, RuntimeError, StopIteration):
        width, height = next(reader)["size"]
        for data in reader:
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3)


def image_frames(path, column):
    """The frames (H, W, 3) uint8 of a parquet file with encoded images, None for a broken one."""
    for piece in pq.ParquetFile(path).iter_batches(batch_size=64, columns=[column]):
        for cell in piece.column(0).to_pylist():
            try:
                yield np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
            except (OSError, TypeError, SyntaxError):                # PIL calls a broken PNG a SyntaxError
                yield None


def resize(image, size, fit):
    """(H, W, 3) -> (size, size, 3) uint8, bit-equal to the official code. No change if size is equal or None.
    fit `stretch`: PIL bicubic, aspect ratio lost (OpenVLA); `pad`: PIL bilinear, centred on black (openpi)."""
    height, width = image.shape[:2]
    if size is None or (height, width) == (size, size):
        return image
    inner, method, out = (size, size), Image.Resampling.BICUBIC, Image.new("RGB", (size, size))
    if fit == "pad":
        ratio, method = max(width / size, height / size), Image.Resampling.BILINEAR
        inner = (int(width / ratio), int(height / ratio))
    out.paste(Image.fromarray(image).resize(inner, method), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return np.asarray(out)


def cache_frames(recording, image_size, fit, cache_dir):
    """The .npy file with all frames, (N, C, H, W, 3) uint8, decoded if it does not exist. Processes that want the same
    file wait for its builder. The system frees the lock of a killed one, and only a complete file gets its name."""
    from filelock import FileLock                                    # comes with huggingface_hub
    problems = recording.problems
    sizes = {(image_size,) * 2 if image_size else recording.size(camera) for camera in recording.cameras}
    problems.check(len(sizes) < 2, f"cameras of different sizes {sorted(sizes)} need an image_size for all")
    if problems:
        plan_frames(recording)               # so that faults of the videos are listed as well
        problems.stop(recording.folder)
    digest = hashlib.sha256(repr((CACHE_FORMAT, recording.cameras, image_size, fit)).encode())
    for episode in recording.episodes:
        digest.update(repr((episode.index, [start for _, start in episode.sources.values()])).encode())
        digest.update(episode.timestamps.tobytes() + episode.positions.tobytes())
    for file in dict.fromkeys(file for episode in recording.episodes for file, _ in episode.sources.values()):
        if file.is_file():                   # else plan_frames complains
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())            # about 1 GB/s
    cache = pathlib.Path(cache_dir or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/sim_real_frames").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{digest.hexdigest()[:24]}.npy"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            partial, jobs = path.with_suffix(".part"), plan_frames(recording)
            problems.stop(recording.folder)
            shape = (sum(episode.length for episode in recording.episodes), len(recording.cameras), *sizes.pop(), 3)
            try:
                fill_cache(partial, shape, jobs, recording, image_size, fit)
                problems.stop(recording.folder)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    return path


def fill_cache(path, shape, jobs, recording, image_size, fit):
    """Decodes all jobs into one .npy file, a thread per job. pwrite, not a memory map: a full disk is then an error
    message instead of a bus error, and what was written does not count as memory of this process."""
    frame_bytes, problems = int(np.prod(shape[2:])), recording.problems
    start = np.lib.format.open_memmap(path, "w+", np.uint8, shape).offset          # an empty file with numpy's header
    with open(path, "r+b") as file, tqdm(total=shape[0] * shape[1], unit="frame", desc="decoding once") as bar:
        def work(job):
            (source, camera), wanted = job
            slot, size, at, image = recording.cameras.index(camera), recording.size(camera), -1, None
            frames = enumerate(image_frames(source, camera) if source.suffix == ".parquet" else video_frames(source))
            for number, row, episode in sorted(wanted):
                while at < number:           # forward to the frame; past the end there is none
                    at, image = next(frames, (np.inf, None))
                seen = None if image is None else image.shape[:2]
                what = f"images of another size, {seen}, than declared" if seen else "frames that cannot be decoded"
                problems.check(seen == size, f"{camera}: {what}", episode)
                if seen == size:
                    place = start + (row * shape[1] + slot) * frame_bytes
                    os.pwrite(file.fileno(), resize(image, image_size, fit).tobytes(), place)
                bar.update()

        with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
            list(pool.map(work, jobs.items()))       # PIL and ffmpeg run outside the interpreter lock


# ------------------------------------------------------------------------------- the data set that trains
class Demos:
    """Demonstrations as samples, one per frame: len(demos) = N. episodes (E,): their numbers; scenes (E,): those in the
    simulator (-1: unknown); lengths (E,) in frames; actions (N, A), states (N, S), instructions (N,) of the frames."""

    def __init__(self, recording, frames_path, horizon):
        parts, self.recording, self.frames_path, self.horizon = recording.episodes, recording, frames_path, horizon
        self.frames = np.load(frames_path, mmap_mode="r")            # (all of the set, C, H, W, 3), stays on disk
        self.file = open(frames_path, "rb")
        self.episodes, self.scenes, self.lengths = np.array([(part.index, part.scene, part.length) for part in parts]).T
        self.rows = np.concatenate([part.begin + np.arange(part.length) for part in parts])      # (N,), of frames
        self.ends = np.repeat(np.cumsum(self.lengths), self.lengths)     # (N,) sample after its episode's last
        self.actions = np.concatenate([part.actions for part in parts])
        self.states = np.concatenate([part.states for part in parts])
        self.instructions = np.array([text for part in parts for text in part.instructions], object)

    def __len__(self):
        return len(self.rows)

    def select(self, episodes):
        """Demos of these episode numbers only, in this order. They share the pixels."""
        parts = {part.index: part for part in self.recording.episodes}
        if not len(episodes) or set(episodes) - set(parts):
            raise ValueError(f"cannot select episodes {list(episodes)}; need one or more of {list(parts)}")
        chosen = dataclasses.replace(self.recording, episodes=[parts[number] for number in episodes])
        return Demos(chosen, self.frames_path, self.horizon)

    def split(self, held_out, seed=0):
        """(train, held-out): a fraction of the episodes, at least one, is held out. 0: (self, None)."""
        if held_out == 0:
            return self, None
        if not 0 < held_out < 1 or len(self.episodes) < 2:
            raise ValueError(f"held_out={held_out} of {len(self.episodes)}: need 0, or a share below 1 of two or more")
        count = min(max(1, round(held_out * len(self.episodes))), len(self.episodes) - 1)
        order = np.random.default_rng(seed).permutation(self.episodes)
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))

    def without_pauses(self, least):
        """These demos without the frames whose action moves the tool by less than `least` [m] and 5 x that [rad] and
        leaves the gripper as it was. Who sees a single picture cannot know how long the demonstrator has been waiting,
        and would wait for ever; OpenVLA's authors drop such frames as well. The first of an episode stays."""
        first = np.zeros(len(self), bool)
        first[np.cumsum(self.lengths) - self.lengths] = True
        turned = np.append(True, np.diff(self.actions[:, -1]) != 0)                      # (N,) of the gripper
        keep = first | turned | (np.linalg.norm(self.actions[:, :3], axis=1) >= least) | (
            np.linalg.norm(self.actions[:, 3:-1], axis=1) >= 5 * least)
        moving, owner = copy.copy(self), np.repeat(np.arange(len(self.lengths)), self.lengths)
        moving.rows, moving.actions, moving.states, moving.instructions = (
            x[keep] for x in (self.rows, self.actions, self.states, self.instructions))
        moving.lengths = np.bincount(owner[keep])
        moving.ends = np.repeat(np.cumsum(moving.lengths), moving.lengths)
        return moving

    def chunks(self, indices):
        """(B, K, A) actions from samples `indices` (B,) on, and pad (B, K) bool: True past the episode's end, where its
        last action is repeated."""
        window, ends = np.add.outer(indices, np.arange(self.horizon)), self.ends[indices][:, None]   # (B, K), (B, 1)
        return self.actions[np.minimum(window, ends - 1)], window >= ends

    def batch(self, indices):
        """Samples `indices` (B,), 0 to N - 1, as a dict: images (B, H, W, 3) uint8; (B, C, H, W, 3) of several cameras;
        instructions, B strings; actions (B, K, A) float32 and pad (B, K), see chunks; state (B, S) float32."""
        actions, pad = self.chunks(indices)
        images = np.empty((len(pad), *self.frames.shape[1:]), np.uint8)        # (B, C, H, W, 3)
        for image, row in zip(images, self.rows[indices].tolist()):      # read through the map, it would stay in memory
            os.preadv(self.file.fileno(), [image], self.frames.offset + row * image.nbytes)
        return dict(images=images[:, 0] if images.shape[1] == 1 else images, state=self.states[indices],
                    instructions=self.instructions[indices].tolist(), pad=pad, actions=actions)


def open_dataset(path, image_size=None, horizon=1, cameras=None, fit="stretch", action_dim=len(ACTION_NAMES),
                 action_key=None, state_key=None, task_key=None, cache_dir=None):
    """Opens a LeRobot data set (a folder, or a hub id owner/name) for training. Returns Demos.
    image_size  side [pixels] of the square frames the policy sees; None: as stored
    horizon     K, actions per sample
    cameras     an image feature or its last part (`front`), or up to three; None: see choose_cameras
    fit         how a frame becomes square, `stretch` (OpenVLA) or `pad` (pi0.5): see resize
    action_dim  the policy's action size; None: anything
    *_key       features that are not found by themselves; task_key: a text column with the instruction
    cache_dir   folder for the decoded frames; None: ~/.cache/sim_real_frames
    Raises ValueError that lists everything that is wrong with the set."""
    if fit not in ("stretch", "pad") or horizon < 1 or (image_size is not None and image_size < 1):
        raise ValueError(f"{fit=}, {horizon=}, {image_size=}: need fit stretch or pad, others 1 or more, size or None")
    recording = read_lerobot(path, cameras, action_key, state_key, task_key, action_dim)
    demos = Demos(recording, cache_frames(recording, image_size, fit, cache_dir), horizon)
    if demos.actions.shape[1] == len(ACTION_NAMES):
        warn_of_units(demos)
    return demos


def warn_of_units(demos):
    """Actions that the contract (see the header) would take for something else."""
    grip, move = demos.actions[:, 6], np.median(np.abs(demos.actions[:, :3]), axis=0)
    where, low, high = demos.recording.folder, grip.min(), grip.max()
    if low < -1.01 or high > 1.01 or -.01 < low < .99:
        warnings.warn(f"{where}: gripper actions from {low:.3g} to {high:.3g}; need -1 (close) to +1 (open): what lies "
                      "between is a half-open gripper", stacklevel=3)
    if move.max() > .1:
        warnings.warn(f"{where}: half of the moves are longer than {move.max():.2g} m a step; need deltas in metres: "
                      "are these absolute poses, joints, or other units?", stacklevel=3)


# ------------------------------------------------------------------------------- normalisation statistics
def statistics(values):
    """Exact statistics of values (N, D) over the whole set, no histogram: {name: (D,) float64}."""
    values = np.asarray(values, np.float64)
    quantiles = zip(("q01", "q10", "q50", "q90", "q99"), np.quantile(values, (.01, .10, .50, .90, .99), axis=0))
    return dict(quantiles, min=values.min(0), max=values.max(0), mean=values.mean(0), std=values.std(0))


def action_statistics(actions, min_range=MIN_RANGE):
    """statistics() of actions (N, A), safe to divide by q99 - q01: the noise of a dimension that hardly moves would be
    blown up to [-1, 1]. Its range becomes min_range [m or rad], the gripper's [-1, 1]; a warning names it."""
    stats = statistics(actions)
    for d, (low, high) in enumerate(zip(stats["q01"].copy(), stats["q99"].copy())):
        if high - low < min_range:
            name = ACTION_NAMES[d] if actions.shape[1] == len(ACTION_NAMES) else f"action[{d}]"
            middle, half = (0, 1) if name == "gripper" else ((low + high) / 2, min_range / 2)
            stats["q01"][d], stats["q99"][d] = middle - half, middle + half
            warnings.warn(f"{name}: q01 {low:.3g} and q99 {high:.3g} are less than {min_range:g} apart, now "
                          f"{2 * half:g}. Do these demonstrations use it?", stacklevel=2)
    return stats


def policy_statistics(demos, name, delta_mask=None):
    """Statistics of a list of Demos in the two official formats, JSON-ready: the `norm_stats` of OpenVLA's config.json
    (= dataset_statistics.json) under the key `name`, and openpi's norm_stats.json. One set of numbers for sim and real,
    as in RL-Co. OpenVLA leaves the gripper alone: it already is in [-1, 1]. delta_mask (7,): the dimensions that a
    pi0.5 policy learns relative to the state at the start of a chunk; their statistics are then of differences."""
    actions = [part.actions if delta_mask is None else
               (part.chunks(np.arange(len(part)))[0] - (part.states[:, :7] * delta_mask)[:, None]).reshape(-1, 7)
               for part in demos]
    blocks = dict(state=statistics(np.concatenate([part.states for part in demos])),
                  actions=action_statistics(np.concatenate(actions)))
    blocks = {part: {key: value.tolist() for key, value in block.items()} for part, block in blocks.items()}
    action, proprio = ({key: blocks[part][key] for key in ("mean", "std", "max", "min", "q01", "q99")}
                       for part in ("actions", "state"))
    action["mask"] = [True] * (len(action["q01"]) - 1) + [False]
    openvla = {name: dict(action=action, proprio=proprio, num_transitions=sum(len(part) for part in demos),
                          num_trajectories=sum(len(part.episodes) for part in demos))}
    return openvla, dict(norm_stats={part: {key: block[key] for key in ("mean", "std", "q01", "q99")}
                                     for part, block in blocks.items()})


# ------------------------------------------------------------------------------- the alpha sampler
class MixSampler:
    """Endless batches, next(sampler): what Demos.batch gives, and sim (B,) bool. Every sample is simulated with
    probability exactly alpha, else real. Each set is gone through in random order, a new one for each pass.
    sim, real  Demos, or functions that open them. alpha = 0 never opens sim, alpha = 1 never opens real.
    batch      samples per step over all ranks. Rank r gets samples r, r + world, ... of one global stream: neither
               alpha nor the samples depend on the number of ranks, and any number may resume from state_dict()."""

    def __init__(self, sim, real, alpha, batch, seed=0, rank=0, world=1):
        if not 0 <= alpha <= 1 or not 0 <= rank < world <= batch:
            raise ValueError(f"{alpha=}, {batch=}, {rank=}, {world=}: need alpha 0 to 1, one sample for each rank")
        self.alpha, self.batch, self.seed, self.rank, self.world = alpha, batch, seed, rank, world
        needed = (real if alpha < 1 else [], sim if alpha > 0 else [])     # number 0 is real, 1 is simulated
        self.sets = [source() if callable(source) else source for source in needed]
        if None in self.sets:
            raise ValueError(f"alpha={alpha} needs demos from {('real', 'sim')[self.sets.index(None)]}")
        shapes = {(d.frames.shape[1:], d.horizon, d.actions.shape[1], d.states.shape[1]) for d in self.sets if d}
        if len(shapes) > 1:
            raise ValueError(f"sim and real differ in (C, H, W, 3), horizon, action or state size: {sorted(shapes)}")
        self.step, self.drawn, self.orders = 0, [0, 0], {}     # drawn from real, from sim; set -> (pass, permutation)

    def draw(self, which):
        """The next sample number of one set."""
        turn, place = divmod(self.drawn[which], len(self.sets[which]))
        if self.orders.get(which, (None,))[0] != turn:
            rng = np.random.default_rng([self.seed, which, turn])
            self.orders[which] = turn, rng.permutation(len(self.sets[which]))
        self.drawn[which] += 1
        return self.orders[which][1][place]

    def __next__(self):
        sim = np.random.default_rng([self.seed, 2, self.step]).random(self.batch) < self.alpha
        numbers = np.array([self.draw(int(which)) for which in sim])       # for all ranks: they stay in step
        self.step += 1
        sim, numbers = sim[self.rank::self.world], numbers[self.rank::self.world]
        parts = [self.sets[which].batch(numbers[sim == which]) for which in (0, 1) if (sim == which).any()]
        order = np.argsort(np.argsort(sim, kind="stable"))                # [real, sim] -> order of the stream
        texts = [text for part in parts for text in part.pop("instructions")]
        return {key: np.concatenate([part[key] for part in parts])[order] for key in parts[0]} | dict(
            instructions=[texts[i] for i in order], sim=sim)

    def state_dict(self):
        return dict(alpha=self.alpha, batch=self.batch, seed=self.seed, step=self.step, drawn=list(self.drawn),
                    sizes=[len(part) for part in self.sets])

    def load_state_dict(self, state):
        wrong = [f"{key} was {state[key]}, is {now}" for key, now in self.state_dict().items()
                 if key not in ("step", "drawn") and state[key] != now]
        if wrong:
            raise ValueError("cannot resume another stream of samples: " + "; ".join(wrong))
        self.step, self.drawn = state["step"], list(state["drawn"])


# ------------------------------------------------------------------------------- writing LeRobot v3.0
def write_dataset(folder, episodes, fps, camera="observation.images.front", robot="panda"):
    """Writes a LeRobot v3.0 data set: one h264 camera, one mp4, one parquet file. After an error nothing is left.
    episodes: any iterable of (images (T, H, W, 3) uint8, states (T, S), actions (T, A), instruction, scene); scene is
    its number in a simulator, or -1."""
    folder = pathlib.Path(folder).expanduser()
    if folder.exists():
        raise ValueError(f"{folder}: exists already; remove it or choose another folder")
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    path = part / VIDEO_PATH.format(video_key=camera, **FIRST_FILE)
    path.parent.mkdir(parents=True)
    video, problems, written = None, Problems(), []                  # written: (states, actions, instruction, scene)
    try:
        for images, states, actions, instruction, scene in episodes:
            images = np.asarray(images)
            if video is None:
                size, widths = images.shape[1:3], (np.shape(states)[-1], np.shape(actions)[-1])
            even = not any(side % 2 for side in size)                # yuv420p stores colour at half the resolution
            problems.check(images.dtype == np.uint8 and images.shape[1:] == (*size, 3) and len(images) and even,
                           f"images {images.dtype} {images.shape}: need uint8 (T, H, W, 3), H and W even and as before")
            for name, value, width in (("observation.state", states, widths[0]), ("action", actions, widths[1])):
                problems.check(np.shape(value) == (len(images), width) and np.isfinite(value).all(),
                               f"{name} {np.shape(value)}: need finite ({len(images)}, {width})")
            problems.check(isinstance(instruction, str) and instruction.strip(), f"instruction missing: {instruction}")
            problems.stop(f"{folder}, episode {len(written)}")
            if video is None:                # -g 2: every second frame is complete, so any is quick to reach
                video = imageio_ffmpeg.write_frames(
                    str(path), size[::-1], fps=fps, codec="libx264", quality=None, macro_block_size=1,
                    pix_fmt_out="yuv420p", output_params=["-g", "2", "-crf", "18", "-threads", "1"])
                video.send(None)
            for image in images:
                video.send(np.ascontiguousarray(image))
            written.append((np.asarray(states, np.float32), np.asarray(actions, np.float32), instruction, scene))
        if not written:
            raise ValueError(f"{folder}: zero episodes, nothing was written")
        video.close()
        write_tables(part, camera, size, fps, robot, *zip(*written))
        os.replace(part, folder)
    finally:
        if video is not None:
            video.close()
        shutil.rmtree(part, ignore_errors=True)                      # gone already if all went well


def write_tables(part, camera, size, fps, robot, states, actions, texts, scenes):
    """Everything of a LeRobot v3.0 data set but the videos; states, actions, texts, scenes: one of each episode."""
    values = {"observation.state": np.concatenate(states), "action": np.concatenate(actions)}
    tasks, number, lengths = list(dict.fromkeys(texts)), np.arange(len(texts)), np.array(list(map(len, actions)))
    ends, begins = np.cumsum(lengths), np.cumsum(lengths) - lengths
    frame = np.arange(ends[-1]) - np.repeat(begins, lengths)         # in its episode
    table = {key: pa.FixedSizeListArray.from_arrays(pa.array(value.ravel()), value.shape[1])
             for key, value in values.items()}
    table |= dict(timestamp=(frame / fps).astype(np.float32), frame_index=frame, index=np.arange(ends[-1]),
                  episode_index=np.repeat(number, lengths),
                  task_index=np.repeat([tasks.index(text) for text in texts], lengths))
    of_episodes = {"episode_index": number, "tasks": [[text] for text in texts], "length": lengths, "scene": scenes,
                   "dataset_from_index": begins, "dataset_to_index": ends,
                   f"videos/{camera}/from_timestamp": begins / fps, f"videos/{camera}/to_timestamp": ends / fps}
    of_episodes |= {f"{group}/{kind}": 0 * number for group in ("data", "meta/episodes", f"videos/{camera}")
                    for kind in FIRST_FILE}
    # LeRobot reads the tasks with pandas and wants the texts as the index: this metadata tells pandas so.
    pandas = dict(index_columns=["task"], column_indexes=[], pandas_version="2.2.0", columns=[
        dict(name="task", field_name="task", pandas_type="unicode", numpy_type="object", metadata=None)])
    of_tasks = pa.table(dict(task_index=range(len(tasks)), task=tasks), metadata=dict(pandas=json.dumps(pandas)))
    for path, content in ((DATA_PATH.format(**FIRST_FILE), pa.table(table)), ("meta/tasks.parquet", of_tasks),
                          ("meta/episodes/chunk-000/file-000.parquet", pa.table(of_episodes))):
        (part / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(content, part / path)
    stats = {key: dict(statistics(value), count=np.array([len(frame)])) for key, value in values.items()}
    (part / "meta/stats.json").write_text(json.dumps(stats, indent=1, default=np.ndarray.tolist))
    video = {"video.fps": fps, "video.codec": "h264", "video.pix_fmt": "yuv420p", "video.channels": 3,
             "video.height": size[0], "video.width": size[1], "video.is_depth_map": False, "has_audio": False}
    features = {camera: dict(dtype="video", shape=[*size, 3], names=["height", "width", "channels"], info=video)}
    for (key, value), names in zip(values.items(), (STATE_NAMES, ACTION_NAMES)):
        width = value.shape[1]
        features[key] = dict(dtype="float32", shape=[width], names=names if width == len(names) else None)
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[key] = dict(dtype="float32" if key == "timestamp" else "int64", shape=[1], names=None)
    info = dict(codebase_version="v3.0", robot_type=robot, fps=fps, total_episodes=len(texts), total_frames=len(frame),
                total_tasks=len(tasks), splits=dict(train=f"0:{len(texts)}"), chunks_size=1000, data_path=DATA_PATH,
                video_path=VIDEO_PATH, data_files_size_in_mb=100, video_files_size_in_mb=200, features=features)
    (part / "meta/info.json").write_text(json.dumps(info, indent=1))


# ------------------------------------------------------------------------------- making demonstrations
def record(task, domain, seed, image_size, noise, count, first):
    """Successes of the demonstrator in episodes first ... first + count - 1, in this order: a list of
    (images (T, H, W, 3) uint8, states (T, 8), actions (T, 7), instruction, episode number). In the domain `pretrain`
    states are (T, 23): VecEnv.landmarks are appended."""
    import envs
    labelled = lambda obs: obs["state"] if domain != "pretrain" else np.concatenate(
        [obs["state"], env.landmarks().reshape(-1, 15)], 1)
    env = envs.VecEnv(task, domain, min(4, count), seed, image_size=image_size, first_episode=first)
    # A person shows the real robot what to do, imperfectly; a script shows the simulated one.
    expert = envs.Expert(env, "teleop") if domain == "real" else envs.Expert(env, "expert", noise)
    obs, steps, ended = env.reset(), [[] for _ in range(env.num_envs)], {}
    while any(number not in ended for number in range(first, first + count)):
        executed, label = expert.act()       # (N, 7) each; the expert's noise is in the first one only
        state = labelled(obs)
        for i, step in enumerate(steps):
            step.append((obs["images"][i], state[i], label[i]))
        texts = obs["instructions"]
        obs, _, terminated, truncated, info = env.step(executed[:, None])
        for i in np.flatnonzero(terminated | truncated):
            number, arrays = int(info["episode"][i]), [np.stack(column) for column in zip(*steps[i])]
            ended[number], steps[i] = (*arrays, texts[i], number) if info["success"][i] else None, []
    return [ended[number] for number in range(first, first + count) if ended[number]]


def make_demos(task, domain, episodes, out, seed=0, workers=0, image_size=64, noise=.005):
    """Records demonstrations in envs.py as LeRobot v3.0; main() has the units. Always the first successes in order of
    the episode numbers of `seed`, whatever the number of workers. Returns {task: success rate of the demonstrator}."""
    import envs
    workers, limit, rates = workers or cores(), 20 + 10 * episodes, {}
    block = min(16, -(-episodes // workers))                         # episodes that a worker gets at once

    def successes(name):
        work, found = functools.partial(record, name, domain, seed, image_size, noise, block), 0
        with tqdm(total=episodes, desc=f"{name} ({domain})", unit="episode") as bar:
            for first in range(0, limit, workers * block):           # not all at once: the frames would pile up
                recorded = pool.map(work, range(first, first + workers * block, block))
                for demonstration in itertools.chain.from_iterable(recorded):
                    yield demonstration
                    found, _ = found + 1, bar.update()
                    if found == episodes:
                        rates[name] = found / (demonstration[-1] + 1)
                        return
        raise ValueError(f"{name} ({domain}): only {found} of {limit} demonstrations succeeded, need {episodes}")

    spawn = multiprocessing.get_context("spawn")                     # OpenGL contexts do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        each = map(successes, envs.TASKS if task == "all" else [task])
        write_dataset(out, itertools.chain.from_iterable(each), fps=5)
    return rates


# ------------------------------------------------------------------------------- data set card
def card(demos, sheet):
    """Prints what a data set holds; writes a contact sheet, one row an episode, time to the right."""
    recording, lengths, info = demos.recording, demos.lengths, demos.recording.info
    print(f"{recording.folder}: LeRobot {info['codebase_version']}, robot {info.get('robot_type')}, {info['fps']} fps\n"
          f"{len(lengths)} episodes of {lengths.min()} to {lengths.max()} frames, {len(demos)} in all")
    for text, frames in collections.Counter(demos.instructions).most_common():
        print(f"task     {text!r}: {frames} frames")
    columns, stats = ("min", "q01", "mean", "q99", "max", "std"), action_statistics(demos.actions)
    outside = ((demos.actions < stats["q01"]) | (demos.actions > stats["q99"])).mean(0)
    print("action   " + "".join(f"{key:>9s}" for key in columns) + "   outside q01..q99")
    for d, name in enumerate(ACTION_NAMES if len(outside) == len(ACTION_NAMES) else range(len(outside))):
        print(f"{name!s:9}" + "".join(f"{stats[key][d]:9.4f}" for key in columns) + f"{outside[d]:11.2%}")
    shown = np.unique(np.linspace(0, len(lengths) - 1, 6).astype(int))         # up to 6 episodes, 8 frames each
    samples = (np.cumsum(lengths) - lengths)[shown, None] + np.linspace(0, lengths[shown] - 1, 8, axis=1).astype(int)
    images = np.concatenate([np.concatenate(demos.batch(row)["images"], axis=1) for row in samples])   # (6 H, 8 W, 3)
    Image.fromarray(images.repeat(2, 0).repeat(2, 1)).save(sheet)
    print(f"contact sheet of {len(shown)} episodes: {sheet}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("path", nargs="?", help="data set to describe: a LeRobot folder or a hub id owner/name")
    add("--camera", help="image feature or its last part; default: the first that is not on the wrist")
    add("--action-key", help="name of the action feature; default: action or actions")
    add("--state-key", help="name of the state feature; default: observation.state or state")
    add("--task-key", help="text column with the instruction; default: LeRobot's task_index")
    add("--image-size", type=int, default=64, help="side of the square frames, pixels; even with --make")
    add("--cache-dir", help="folder for the decoded frames; default: ~/.cache/sim_real_frames")
    add("--sheet", default="card.png", help="where the contact sheet goes")
    add("--make", action="store_true", help="first record demonstrations into --out")
    add("--task", default="open-drawer", help="pick-place, push-cube, open-drawer, close-drawer, or all")
    add("--domain", default="sim", help="sim (scripted expert) or real (stand-in, imperfect tele-operator)")
    add("--episodes", type=int, default=50, help="successful demonstrations per task, 1 or more")
    add("--out", help="folder of the new data set, must not exist yet")
    add("--seed", type=int, default=0, help="which scenes and which mistakes, 0 or more")
    add("--noise", type=float, default=.005, help="m, 0 to .02; disturbs the expert, not its labels")
    add("--workers", type=int, default=0, help="processes that record; 0 = one per core")
    args = parser.parse_args()
    try:
        if not (args.path or (args.make and args.out and args.episodes > 0)) or args.image_size < 2:
            parser.error("give the path of a data set, or --make with --out and --episodes of 1 or more")
        if args.make:
            options = (args.seed, args.workers, args.image_size, args.noise)
            rates = make_demos(args.task, args.domain, args.episodes, args.out, *options)
            print("demonstrator succeeds: " + ", ".join(f"{task} {rate:.0%}" for task, rate in rates.items()))
        demos = open_dataset(args.out if args.make else args.path, args.image_size, 1, args.camera, "stretch", None,
                             args.action_key, args.state_key, args.task_key, args.cache_dir)
        card(demos, args.sheet)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
