"""Demonstrations: LeRobot data sets in and out, normalisation statistics, the mixer of sim and real.

    Stage I    L = alpha * L_SFT(sim) + (1 - alpha) * L_SFT(real)       (RL-Co, arXiv 2602.12628)

realised by sampling: every training sample is simulated with probability alpha, else real, whatever the sizes
of the two sets. alpha = 0 trains on real data only, alpha = 1 on simulation only.

    python real_data.py --make --domain real --task open-drawer --episodes 50 --out demos/real    # record
    python real_data.py demos/real                                                                # card

    demos = open_dataset("demos/real", image_size=64, horizon=8)       # LeRobot folder (v2.1, v3.0) or hub id
    train, held_out = demos.split(0.1)                                 # whole episodes
    batch = next(MixSampler(sim=None, real=train, alpha=0, batch=32))  # a dict, see Demos.batch

Shapes     N frames of E episodes, B batch, K actions a sample (horizon), C cameras, A action and S state size
Actions    (7,) = dx dy dz [m], droll dpitch dyaw [rad] per control step in the robot base frame, gripper in
           [-1 close, +1 open]; physical units as stored. Normalisation belongs to the policy's checkpoint.
Pixels     are decoded once into a memory-mapped uint8 file in ~/.cache/sim_real_frames. Its name is a hash of
           the data and the size, so changed data get a new file; delete that folder whenever you like.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
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
import tempfile
import warnings

import imageio_ffmpeg                        # imageio's ffmpeg plugin brings its own ffmpeg: h264, AV1
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image                        # comes with imageio
from tqdm import tqdm

ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
STATE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper_opening", "zero")
CONTROL_HZ = 5                               # of envs.py
VERSIONS = ("v2.0", "v2.1", "v3.0")          # v2.0 differs from v2.1 only in where it keeps statistics
TIME_TOLERANCE = 1e-4                        # s between a row's time and its video frame; LeRobot's own limit
MIN_RANGE = 1e-3                             # m or rad; a dimension with q99 - q01 below this does not move
MAX_CAMERAS = 3                              # pi0.5 has three camera slots
CHUNK_FILES = 1000                           # files per folder, LeRobot's default
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
ZERO_INDICES = ("data/chunk", "data/file", "meta/episodes/chunk", "meta/episodes/file")    # one file of each
VIDEO_CRF = 18                               # h264 quality of the sets written here: 0 lossless, 51 worst
CACHE_FORMAT = 1                             # raise it when cached pixels would come out differently


# ------------------------------------------------------------------------------- problems, all at once

def ranges(numbers):
    """[5, 0, 3, 4] -> '0, 3-5'."""
    runs = itertools.groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


class Problems(collections.defaultdict):
    """{what is wrong: [episode, ...]}. Collected, then raised together: one run shows every offender."""

    def stop(self, where):
        lines = [f"  - {what}" + (f": episode {ranges(ids)}" if ids else "") for what, ids in self.items()]
        if lines:
            raise ValueError("\n".join([f"{where}: nothing was written. Repair or remove:", *lines]))


# ------------------------------------------------------------------------------- reading LeRobot folders

@dataclasses.dataclass
class Episode:
    index: int                               # LeRobot's episode_index
    length: int                              # T frames, as the metadata promise
    data_file: pathlib.Path                  # parquet file with its rows
    videos: dict                             # camera -> (mp4 file, seconds into it where the episode starts)
    scene: int = -1                          # its number in the simulator, if this file recorded it
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

    def is_video(self, camera):
        return self.info["features"][camera]["dtype"] == "video"

    def size(self, camera):
        """(H, W) that info.json declares. Sets in the wild store H, W, C or C, H, W."""
        feature = self.info["features"][camera]
        channels_first = str((feature.get("names") or [""])[0]).startswith("channel")
        return tuple(feature["shape"][1:3] if channels_first else feature["shape"][:2])


def local_folder(path):
    """The folder of a data set; `owner/name` that is no folder comes from the hub or from its local cache."""
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise ValueError(f"{path}: no such folder; need a LeRobot data set folder or a hub id owner/name")
    from huggingface_hub import snapshot_download
    try:
        return pathlib.Path(snapshot_download(str(path), repo_type="dataset"))
    except Exception as error:               # HTTP, hub and system errors share no narrower base class
        raise ValueError(
            f"{path}: neither a folder nor on the hub ({type(error).__name__}). Offline? Elsewhere, run\n"
            f"  hf download {path} --repo-type dataset --local-dir {folder.name}\n"
            f"then copy the folder here and give its path instead of {path}") from error


def choose_cameras(features, cameras):
    """Image features to use. None: the first in colour that is not on the wrist, the policies' view."""
    found = [key for key, feature in features.items() if feature["dtype"] in ("image", "video")]
    if cameras is None:
        return sorted(found, key=lambda key: ("depth" in key, "wrist" in key or "hand" in key))[:1]
    cameras = [cameras] if isinstance(cameras, str) else list(cameras)
    known = {key.split(".")[-1]: key for key in found} | {key: key for key in found}       # `front` is enough
    unknown = [camera for camera in cameras if camera not in known]
    if unknown or not 1 <= len(cameras) <= MAX_CAMERAS:
        raise ValueError(f"cameras {cameras}: need 1 to {MAX_CAMERAS} out of {found}; unknown: {unknown}")
    return [known[camera] for camera in cameras]


def read_meta(folder, info, cameras):
    """Episodes without their rows, and {task_index: instruction}. v2.x: one parquet file and one mp4 a camera
    for each episode. v3.0: many episodes a file; data and cameras go on to a next file independently."""
    if info["codebase_version"] == "v3.0":
        table = pq.ParquetFile(folder / "meta/tasks.parquet").read()
        # The text is a pandas index: called `task` by recent writers, `__index_level_0__` by lerobot 0.4.x.
        text = next(name for name in table.column_names if name != "task_index")
        tasks = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))
        files = [pq.ParquetFile(path) for path in sorted((folder / "meta/episodes").glob("*/*.parquet"))]
        rows = [row for file in files for row in file.read(
            [name for name in file.schema_arrow.names if not name.startswith("stats/")]).to_pylist()]
    else:
        tasks, rows = ([json.loads(line) for line in (folder / "meta" / name).read_text().splitlines()]
                       for name in ("tasks.jsonl", "episodes.jsonl"))
        tasks = {row["task_index"]: row["task"] for row in tasks}
        rows = [dict(row, episode_chunk=row["episode_index"] // info["chunks_size"]) for row in rows]

    def file(path, row, kind, **names):      # kind: "data" or "videos/<camera>"; v3.0 has indices for each
        own = {key: row[f"{kind}/{key}"] for key in ("chunk_index", "file_index") if f"{kind}/{key}" in row}
        return folder / info[path].format(**row, **own, **names)

    return [Episode(row["episode_index"], row["length"], file("data_path", row, "data"), {
        camera: (file("video_path", row, f"videos/{camera}", video_key=camera),
                 row.get(f"videos/{camera}/from_timestamp", 0.0))
        for camera in cameras if info["features"][camera]["dtype"] == "video"}, row.get("scene", -1))
        for row in rows], tasks


def read_lerobot(path, cameras=None, action_key=None, state_key=None, task_key=None, action_dim=None):
    """Reads a LeRobot data set but for its pixels; arguments as in open_dataset. Returns a Recording; its
    problems say what is wrong. ValueError where nothing can be read: no folder, unknown version, no meta."""
    folder, problems = local_folder(path), Problems(list)
    try:
        info = json.loads((folder / "meta/info.json").read_text())
        version, features = info["codebase_version"], info["features"]
        if version not in VERSIONS:
            raise ValueError(f"unknown LeRobot version {version!r}, need one of {', '.join(VERSIONS)}")
        cameras = choose_cameras(features, cameras)
        episodes, tasks = read_meta(folder, info, cameras)
    except (KeyError, StopIteration, OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{folder}: not a readable LeRobot data set ({type(error).__name__}: {error}); "
                         "correct the arguments, or convert the set with the lerobot package") from error
    keys = {}
    for name, given, usual in (("actions", action_key, ("action", "actions")),
                               ("states", state_key, ("observation.state", "state"))):
        found = [key for key in ([given] if given else usual) if key in features]
        keys |= {name: found[0]} if found else {}
        if not found and (given or name == "actions"):
            problems[f"no feature {given or usual} for the {name}; the set has {sorted(features)}"] = []
    size = features[keys["actions"]]["shape"][0] if "actions" in keys else action_dim
    if action_dim not in (None, size):
        problems[f"{keys['actions']} of size {size}, need {action_dim} ({' '.join(ACTION_NAMES)})"] = []
    if not cameras:
        problems[f"no image or video feature in {sorted(features)}"] = []
    if not episodes or len(episodes) != info.get("total_episodes", len(episodes)):
        problems[f"{len(episodes) or 'zero'} episodes, info.json promises {info.get('total_episodes')}"] = []
    episodes.sort(key=lambda episode: episode.index)
    recording = Recording(folder, info, cameras, keys, episodes, problems)
    for file in dict.fromkeys(episode.data_file for episode in episodes):
        read_rows(recording, file, [part for part in episodes if part.data_file == file], task_key, tasks)
    return recording


def vectors(column, width):
    """Arrow column -> (n, width) float32 or None, and (n,) bool: the rows that have another size."""
    rows = [row if isinstance(row, list) else [row] for row in column.to_pylist()]
    bad = np.array([len(row) != width for row in rows], bool)
    return None if bad.any() else np.array(rows, np.float32).reshape(-1, width), bad


def read_rows(recording, file, episodes, task_key, tasks):
    """Fills and checks the episodes that lie in one parquet file."""
    problems, features, step = recording.problems, recording.info["features"], 1 / recording.info["fps"]
    indices, keys, text_key = [part.index for part in episodes], recording.keys, task_key or "task_index"
    try:
        scalars = ("episode_index", "frame_index", "timestamp")
        table = pq.ParquetFile(file).read([*scalars, text_key, *keys.values()])
        owner, frame, times = (table[key].to_numpy() for key in scalars)
        texts = [text if task_key else tasks.get(text) for text in table[text_key].to_pylist()]
        columns = {name: vectors(table[key], features[key]["shape"][0]) for name, key in keys.items()}
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        problems[f"data file, or one of its columns, missing or broken ({error})"] += indices
        return
    columns.setdefault("states", (np.zeros((len(owner), 0), np.float32), np.zeros(len(owner), bool)))
    by_episode = np.lexsort((frame, owner))  # row numbers, by episode, then frame
    first, last = (np.searchsorted(owner[by_episode], indices, side) for side in ("left", "right"))
    for episode, begin, end in zip(episodes, first, last):
        rows = episode.positions = by_episode[begin:end]
        episode.timestamps = times[rows].astype(np.float64)
        episode.instructions = [texts[row] for row in rows]
        if not len(rows) or len(rows) != episode.length or (frame[rows] != np.arange(len(rows))).any():
            problems["rows missing, doubled, or none at all"].append(episode.index)
        for name, (values, bad) in columns.items():
            if bad[rows].any():
                problems[f"{name} of another size than info.json declares"].append(episode.index)
            elif values is not None:
                setattr(episode, name, values[rows])
                if not np.isfinite(values[rows]).all():
                    problems[f"non-finite {name}"].append(episode.index)
        # float32 seconds are exact to 6e-8 of their value; that much is no fault of the recording
        slack = TIME_TOLERANCE + 2.4e-7 * np.abs(episode.timestamps[1:])
        if not (np.abs(np.diff(episode.timestamps) - step) <= slack).all():
            problems[f"timestamps out of tolerance: not 1/fps = {step:g} s apart"].append(episode.index)
        if not all(isinstance(text, str) and text.strip() for text in episode.instructions):
            problems["instruction missing"].append(episode.index)


# ------------------------------------------------------------------------------- pixels

# Frames to take out of one mp4 or parquet file, in its order. slot: which of the cameras; numbers (n,):
# frame of the mp4, or row of the parquet file; rows (n,): of the whole set; episodes (n,): for messages.
FrameJob = collections.namedtuple("FrameJob", "path camera slot numbers rows episodes")


def video_index(path):
    """Times (F,) [s] of all frames of a video in the order of display, and (H, W). Decodes nothing: 20 ms."""
    options = ["-map", "0:v:0", "-c", "copy", "-f", "framecrc", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-copyts", "-i", path, *options]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    header = {line.split()[0]: line.split()[-1] for line in lines if line.startswith("#")}
    numerator, denominator = header.get("#tb", "1/1").split("/")     # length of a tick [s]
    size = tuple(int(side) for side in header.get("#dimensions", "0x0").split("x"))[::-1]
    ticks = [int(line.split(",")[2]) for line in lines if line[:1].isdigit()]        # stream, dts, pts, ...
    return np.sort(np.array(ticks)) * (int(numerator) / int(denominator)), size


def plan_frames(recording):
    """FrameJobs for the chosen cameras. What is missing goes to recording.problems. Reads no pixel."""
    jobs, problems, episodes = [], recording.problems, recording.episodes
    begins = dict(zip((e.index for e in episodes), np.cumsum([0] + [e.length for e in episodes])))
    episodes = [episode for episode in episodes if episode.positions is not None]
    for slot, camera in enumerate(recording.cameras):
        parts, index = collections.defaultdict(list), {}     # file -> [(numbers, rows, episodes), ...]
        if recording.is_video(camera):
            files = [file for file in {e.videos[camera][0] for e in episodes} if file.is_file()]
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                index = dict(zip(files, pool.map(video_index, files)))
        for episode in episodes:
            file, numbers = episode.data_file, episode.positions
            if recording.is_video(camera):
                file, start = episode.videos[camera]
                if file not in index:
                    problems[f"{camera}: video file missing"].append(episode.index)
                    continue
                times, size = index[file]
                if size != recording.size(camera):
                    problems[f"{camera}: images of another size, {size}, than declared"].append(episode.index)
                wanted = start + episode.timestamps
                numbers = np.searchsorted((times[1:] + times[:-1]) / 2, wanted)    # the nearest
                if not len(times) or (np.abs(times[numbers] - wanted) > TIME_TOLERANCE).any():
                    problems[f"{camera}: frames missing or timestamps out of tolerance (no frame within "
                             f"{TIME_TOLERANCE:g} s)"].append(episode.index)
            parts[file].append((numbers, begins[episode.index] + np.arange(len(numbers)),
                                np.full(len(numbers), episode.index)))
        for file, members in parts.items():
            columns = [np.concatenate(column) for column in zip(*members)]
            order = np.argsort(columns[0], kind="stable")
            jobs.append(FrameJob(file, camera, slot, *(column[order] for column in columns)))
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


def decode(job, is_video):
    """Yields (k, frame (H, W, 3) uint8 or None if unreadable) for each job.numbers[k], k ascending."""
    done, frames = 0, video_frames(job.path) if is_video else image_frames(job.path, job.camera)
    for number, image in enumerate(frames):
        while done < len(job.numbers) and job.numbers[done] == number:
            yield done, image
            done += 1
    yield from ((k, None) for k in range(done, len(job.numbers)))


def resize(image, size, fit):
    """(H, W, 3) -> (size, size, 3) uint8, bit-equal to the official code. No change if size is equal or None.

    fit `stretch`: PIL bicubic, aspect ratio lost (OpenVLA); `pad`: PIL bilinear, centred on black (openpi).
    """
    height, width = image.shape[:2]
    if size is None or (height, width) == (size, size):
        return image
    if fit == "stretch":
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    ratio, out = max(width / size, height / size), Image.new("RGB", (size, size))
    inner = (int(width / ratio), int(height / ratio))
    out.paste(Image.fromarray(image).resize(inner, Image.Resampling.BILINEAR),
              ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return np.asarray(out)


def content_key(recording, *options):
    """Hash of all that decides the cached pixels: files (about 1 GB/s), which frames of them, options."""
    digest, files = hashlib.sha256(repr((CACHE_FORMAT, recording.cameras, options)).encode()), {}
    for episode in recording.episodes:
        digest.update(repr((episode.index, [start for _, start in episode.videos.values()])).encode())
        digest.update(episode.timestamps.tobytes() + episode.positions.tobytes())
        in_parquet = [episode.data_file] * (len(episode.videos) < len(recording.cameras))
        files |= dict.fromkeys([file for file, _ in episode.videos.values()] + in_parquet)
    for file in filter(pathlib.Path.is_file, files):                 # plan_frames complains about the others
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:24]


def cache_frames(recording, image_size, fit, cache_dir):
    """The .npy file with all frames, (N, C, H, W, 3) uint8; decodes them if it does not exist. Processes that
    want the same file wait for the one that builds it. The system frees the lock of a killed process, and the
    file gets its name only when it is complete, so nobody ever sees half of it."""
    from filelock import FileLock                                    # comes with huggingface_hub
    sizes = {(image_size,) * 2 if image_size else recording.size(camera) for camera in recording.cameras}
    if len(sizes) > 1:
        recording.problems[f"cameras of different sizes {sorted(sizes)} need an image_size for all"] = []
    if recording.problems:
        plan_frames(recording)               # so that faults of the videos are listed as well
        recording.problems.stop(recording.folder)
    default = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "sim_real_frames")
    cache = pathlib.Path(cache_dir or default).expanduser()
    path = cache / f"{content_key(recording, image_size, fit)}.npy"
    shape = (sum(episode.length for episode in recording.episodes), len(recording.cameras), *sizes.pop(), 3)
    if path.exists():
        return path
    jobs = plan_frames(recording)
    recording.problems.stop(recording.folder)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            return path                      # another process was faster
        for left_over in cache.glob(f"{path.stem}.*.part"):
            left_over.unlink()               # of a killed process, as we hold the lock
        need, free = np.prod(shape, dtype=float) / 1e9, shutil.disk_usage(cache).free / 1e9
        if need > free:
            raise ValueError(f"{cache}: {free:.1f} GB free, need {need:.1f}; try another cache_dir or size")
        partial = cache / f"{path.stem}.{os.getpid()}.part"
        try:
            fill_cache(partial, shape, jobs, recording, image_size, fit)
            recording.problems.stop(recording.folder)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def fill_cache(path, shape, jobs, recording, image_size, fit):
    """Decodes all jobs into one .npy file, a thread per job. pwrite, not a memory map: a full disk is then an
    error message instead of a bus error, and what was written does not count as memory of this process."""
    frame_bytes = int(np.prod(shape[2:]))
    with open(path, "wb") as file, tqdm(total=shape[0] * shape[1], unit="frame", desc="decoding once") as bar:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
        file.flush()
        start = file.tell()

        def work(job):
            for k, image in decode(job, recording.is_video(job.camera)):
                if image is None or image.shape[:2] != recording.size(job.camera):
                    what = "frames that cannot be decoded" if image is None else \
                        f"images of another size, {image.shape[:2]}, than declared"
                    recording.problems[f"{job.camera}: {what}"].append(int(job.episodes[k]))
                    continue
                place = start + (int(job.rows[k]) * shape[1] + job.slot) * frame_bytes
                os.pwrite(file.fileno(), resize(image, image_size, fit).tobytes(), place)
                bar.update()

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(work, jobs))       # PIL and ffmpeg run outside the interpreter lock


# ------------------------------------------------------------------------------- the data set that trains

class Demos:
    """Demonstrations as samples, one per frame: len(demos) = N. episodes (E,) are their numbers, scenes (E,)
    those in the simulator (-1: unknown); actions (N, A), states (N, S), instructions (N,) of the frames."""

    def __init__(self, recording, frames_path, horizon):
        parts, self.recording, self.horizon = recording.episodes, recording, horizon
        self.frames = np.load(frames_path, mmap_mode="r")            # (all frames, C, H, W, 3), stays on disk
        self.file = open(frames_path, "rb")
        self.all_actions = np.concatenate([part.actions for part in parts])
        self.all_states = np.concatenate([part.states for part in parts])
        self.all_texts = np.array([text for part in parts for text in part.instructions], object)
        ends = np.cumsum([part.length for part in parts])
        self.table = {part.index: (end - part.length, end, part.scene) for part, end in zip(parts, ends)}
        self.use(list(self.table))

    def use(self, episodes):
        self.begins, ends, self.scenes = np.array([self.table[episode] for episode in episodes]).T   # (E,)
        self.episodes, self.lengths = np.array(episodes), ends - self.begins
        self.rows = np.concatenate([np.arange(*self.table[episode][:2]) for episode in episodes])    # (N,)
        self.ends = np.repeat(ends, self.lengths)                    # (N,) row after the last of its episode
        self.actions, self.states = self.all_actions[self.rows], self.all_states[self.rows]
        self.instructions = self.all_texts[self.rows]

    def __len__(self):
        return len(self.rows)

    def select(self, episodes):
        """A view of these episode numbers only, in this order."""
        episodes = [int(episode) for episode in episodes]
        if not episodes or set(episodes) - set(self.episodes.tolist()):
            raise ValueError(f"cannot select episodes [{ranges(episodes)}] of {self.recording.folder}; "
                             f"need one or more of {ranges(self.episodes.tolist())}")
        view = copy.copy(self)               # shares the pixels
        view.use(episodes)
        return view

    def split(self, held_out, seed=0):
        """(train, held-out): a fraction of the episodes, at least one, is held out. 0: (self, None)."""
        if held_out == 0:
            return self, None
        if not 0 < held_out < 1 or len(self.episodes) < 2:
            raise ValueError(f"held_out={held_out} of {len(self.episodes)} episodes: need a share below 1, "
                             "and two episodes unless it is 0")
        count = min(max(1, round(held_out * len(self.episodes))), len(self.episodes) - 1)
        order = np.random.default_rng(seed).permutation(self.episodes)
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))

    def batch(self, indices):
        """Samples `indices` (B,) as a dict: images (B, H, W, 3) uint8, or (B, C, H, W, 3) of several cameras;
        instructions, B strings; actions (B, K, A) float32; pad (B, K) bool, True past the episode's end,
        where its last action is repeated; state (B, S) float32."""
        rows, ends = self.rows[indices], self.ends[indices][:, None]         # (B,), (B, 1)
        window = rows[:, None] + np.arange(self.horizon)                     # (B, K)
        images = np.empty((len(rows), *self.frames.shape[1:]), np.uint8)     # (B, C, H, W, 3)
        for image, row in zip(images, rows.tolist()):        # through the map, it would stay in memory
            os.preadv(self.file.fileno(), [image], self.frames.offset + row * image.nbytes)
        return dict(images=images[:, 0] if images.shape[1] == 1 else images, state=self.all_states[rows],
                    instructions=self.all_texts[rows].tolist(), pad=window >= ends,
                    actions=self.all_actions[np.minimum(window, ends - 1)])


def open_dataset(path, image_size=None, horizon=1, cameras=None, fit="stretch", action_dim=len(ACTION_NAMES),
                 action_key=None, state_key=None, task_key=None, cache_dir=None):
    """Opens a LeRobot data set (v2.x or v3.0, video or image features) for training. Returns Demos.

    path        a folder, or a hub id owner/name
    image_size  side [pixels] of the square frames the policy sees; None: as stored
    horizon     K, actions per sample
    cameras     an image feature or its last part (`front`), or up to three; None: see choose_cameras
    fit         how a frame becomes square, `stretch` (OpenVLA) or `pad` (pi0.5): see resize
    action_dim  the policy's action size; None: anything
    *_key       features that are not found by themselves; task_key: a text column with the instruction
    cache_dir   folder for the decoded frames; None: ~/.cache/sim_real_frames
    Raises ValueError that lists everything that is wrong with the set.
    """
    if fit not in ("stretch", "pad") or horizon < 1 or (image_size is not None and image_size < 1):
        raise ValueError(f"fit={fit!r}, horizon={horizon}, image_size={image_size}: need fit stretch or pad, "
                         "horizon 1 or more, image_size 1 or more or None")
    recording = read_lerobot(path, cameras, action_key, state_key, task_key, action_dim)
    return Demos(recording, cache_frames(recording, image_size, fit, cache_dir), horizon)


# ------------------------------------------------------------------------------- normalisation statistics

def statistics(values):
    """Exact statistics of values (N, D) over the whole set, no histogram: {name: (D,) float64}."""
    values = np.asarray(values, np.float64)
    quantiles = np.quantile(values, (.01, .10, .50, .90, .99), axis=0)
    return dict(min=values.min(0), max=values.max(0), mean=values.mean(0), std=values.std(0),
                **dict(zip(("q01", "q10", "q50", "q90", "q99"), quantiles)))


def action_statistics(actions, min_range=MIN_RANGE):
    """statistics() of actions (N, A), safe to divide by q99 - q01: the noise of a dimension that hardly moves
    would be blown up to [-1, 1]. Its range is widened about the middle to min_range [m or rad; 0 = leave it],
    the gripper's to its physical [-1, 1]; a warning names it."""
    stats = statistics(actions)
    for d, (low, high) in enumerate(zip(stats["q01"].copy(), stats["q99"].copy())):
        if high - low < min_range:
            name = ACTION_NAMES[d] if len(stats["q01"]) == len(ACTION_NAMES) else f"action[{d}]"
            half = 1 if name == "gripper" else min_range / 2
            middle = 0 if name == "gripper" else (low + high) / 2
            stats["q01"][d], stats["q99"][d] = middle - half, middle + half
            warnings.warn(f"{name}: q01 {low:.3g} and q99 {high:.3g} are less than {min_range:g} apart, now "
                          f"{2 * half:g}. Do these demonstrations use it?", stacklevel=2)
    return stats


def policy_statistics(demos, name):
    """Statistics of a list of Demos in the two official formats, JSON-ready: the `norm_stats` of OpenVLA's
    config.json (= dataset_statistics.json) under the key `name`, and openpi's norm_stats.json. One set of
    numbers for sim and real, as in RL-Co. OpenVLA leaves the gripper alone: it already is in [-1, 1]."""
    blocks = dict(state=statistics(np.concatenate([part.states for part in demos])),
                  actions=action_statistics(np.concatenate([part.actions for part in demos])))
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
    """Endless batches, next(sampler); every sample is simulated with probability exactly alpha, else real.

    sim, real  Demos, or functions that open them. alpha = 0 never opens sim, alpha = 1 never opens real.
    batch      samples per step over all ranks. Rank r gets samples r, r + world, ... of one global stream, so
               neither alpha nor the samples depend on the number of ranks.
    Each set is gone through in random order, a new one for each pass. A batch is what Demos.batch gives, and
    sim (B,) bool. state_dict() is the position in the stream; any number of ranks may resume from it.
    """

    def __init__(self, sim, real, alpha, batch, seed=0, rank=0, world=1):
        if not 0 <= alpha <= 1 or not 0 <= rank < world <= batch:
            raise ValueError(f"alpha={alpha}, batch={batch}, rank={rank}, world={world}: need alpha 0 to 1, "
                             "0 <= rank < world, and a sample or more for each rank")
        self.alpha, self.batch, self.seed, self.rank, self.world = alpha, batch, seed, rank, world
        needed = (real if alpha < 1 else [], sim if alpha > 0 else [])     # number 0 is real, 1 is simulated
        self.sets = [source() if callable(source) else source for source in needed]
        if None in self.sets:
            raise ValueError(f"alpha={alpha} needs demos from {('real', 'sim')[self.sets.index(None)]}")
        shapes = {(part.frames.shape[1:], part.horizon, part.actions.shape[1], part.states.shape[1])
                  for part in self.sets if part}
        if len(shapes) > 1:
            raise ValueError("sim and real differ in ((cameras, H, W, 3), horizon, action size, state size): "
                             f"{sorted(shapes)}; open both with the same arguments")
        self.step, self.drawn = 0, [0, 0]    # by all ranks together; drawn from real, from sim
        self.orders = {}                     # number of the set -> (pass, permutation)

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
        return dict(alpha=self.alpha, batch=self.batch, seed=self.seed, step=self.step,
                    drawn=list(self.drawn), sizes=[len(part) for part in self.sets])

    def load_state_dict(self, state):
        wrong = [f"{key} was {state[key]}, is {now}" for key, now in self.state_dict().items()
                 if key not in ("step", "drawn") and state[key] != now]
        if wrong:
            raise ValueError("cannot resume another stream of samples: " + "; ".join(wrong))
        self.step, self.drawn = state["step"], list(state["drawn"])


# ------------------------------------------------------------------------------- writing LeRobot v3.0

def check_episode(where, images, states, actions, instruction, size, columns):
    """Raises ValueError that lists what keeps write_dataset from writing this episode."""
    wrong = Problems(list)
    # yuv420p stores colour at half the resolution, so sides must be even
    odd = any(side % 2 for side in size)
    if images.dtype != np.uint8 or images.shape[1:] != (*size, 3) or not len(images) or odd:
        wrong[f"images {images.dtype} {images.shape}: need uint8 (T, H, W, 3), H and W even and as before"]
    for key, value in (("observation.state", states), ("action", actions)):
        width = columns[key][0].shape[1] if columns[key] else np.shape(value)[-1]
        if np.shape(value) != (len(images), width) or not np.isfinite(value).all():
            wrong[f"{key} {np.shape(value)}: need finite ({len(images)}, {width})"]
    if not isinstance(instruction, str) or not instruction.strip():
        wrong[f"instruction missing: {instruction!r}"]
    wrong.stop(where)


def write_dataset(folder, episodes, fps, camera="observation.images.front", robot="panda", video_mb=200):
    """Writes a LeRobot v3.0 data set with one h264 camera. After an error nothing is left behind.

    episodes  any iterable of (images (T, H, W, 3) uint8, states (T, S), actions (T, A), instruction, scene);
              scene is its number in a simulator, or -1
    video_mb  [MB] about, when a new mp4 begins. All rows go to one parquet file: LeRobot's limit of 100 MB is
              a million frames away.
    """
    folder = pathlib.Path(folder).expanduser()
    if folder.exists():
        raise ValueError(f"{folder}: exists already; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    video, size, file_number, frames, total = None, None, 0, 0, 0    # frames: of the current mp4
    rows, columns = [], {"observation.state": [], "action": [], camera: []}
    try:
        for images, states, actions, instruction, scene in episodes:
            images, size, length = np.asarray(images), size or np.shape(images)[1:3], len(images)
            where = f"{folder}, episode {len(rows)}"
            check_episode(where, images, states, actions, instruction, size, columns)
            place = dict(zip(("chunk_index", "file_index"), divmod(file_number, CHUNK_FILES)))
            if video is None:
                path = part / VIDEO_PATH.format(video_key=camera, **place)
                path.parent.mkdir(parents=True, exist_ok=True)
                frames, video = 0, imageio_ffmpeg.write_frames(      # -g 2: any frame is quick to reach
                    str(path), size[::-1], fps=fps, codec="libx264", quality=None, macro_block_size=1,
                    pix_fmt_out="yuv420p", output_params=["-g", "2", "-crf", str(VIDEO_CRF), "-threads", "1"])
                video.send(None)
            for image in images:
                video.send(np.ascontiguousarray(image))
            place.update(from_timestamp=frames / fps, to_timestamp=(frames + length) / fps)
            rows.append(dict(episode_index=len(rows), tasks=[instruction], length=length, scene=scene,
                             dataset_from_index=total, dataset_to_index=total + length)
                        | {f"videos/{camera}/{name}": value for name, value in place.items()}
                        | {f"{kind}_index": 0 for kind in ZERO_INDICES})
            for key, value in zip(columns, (states, actions, images[::20, ::8, ::8].reshape(-1, 3))):
                columns[key].append(np.asarray(value, np.float32))   # of the pixels only a sample
            frames, total = frames + length, total + length
            # About 1/10 of the bytes is left; the true size would depend on when ffmpeg flushes.
            if frames * images[0].nbytes / 10 >= video_mb * 2**20:
                video, file_number = video.close(), file_number + 1
        if not rows:
            raise ValueError(f"{folder}: zero episodes, nothing was written")
        video = video and video.close()
        info = dict(robot_type=robot, fps=fps, video_files_size_in_mb=video_mb)
        write_tables(part, rows, columns, info, size)
        os.replace(part, folder)
    finally:
        if video is not None:
            video.close()
        shutil.rmtree(part, ignore_errors=True)                      # gone already if all went well


def write_tables(part, rows, columns, info, size):
    """Everything of a LeRobot v3.0 data set but the videos."""
    for name in ("data", "meta/episodes"):
        (part / name / "chunk-000").mkdir(parents=True)
    tasks = {text: task for task, text in enumerate(dict.fromkeys(row["tasks"][0] for row in rows))}
    lengths = [row["length"] for row in rows]
    frame = np.concatenate([np.arange(length) for length in lengths])
    camera, values = list(columns)[-1], {key: np.concatenate(parts) for key, parts in columns.items()}
    table = {key: pa.FixedSizeListArray.from_arrays(pa.array(values[key].ravel()), values[key].shape[1])
             for key in ("observation.state", "action")}
    table |= dict(timestamp=(frame / info["fps"]).astype(np.float32), frame_index=frame,
                  index=np.arange(len(frame)), episode_index=np.repeat(np.arange(len(rows)), lengths),
                  task_index=np.repeat([tasks[row["tasks"][0]] for row in rows], lengths))
    pq.write_table(pa.table(table), part / DATA_PATH.format(chunk_index=0, file_index=0))
    pq.write_table(pa.Table.from_pylist(rows), part / "meta/episodes/chunk-000/file-000.parquet")
    # LeRobot reads the tasks with pandas and wants the texts as the index: this metadata tells pandas so.
    described = [dict(name=name, field_name=name, pandas_type=kind, numpy_type=numpy, metadata=None) for
                 name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))]
    pandas = dict(index_columns=["task"], column_indexes=[], columns=described, pandas_version="2.2.0")
    table = pa.table(dict(task_index=list(tasks.values()), task=list(tasks)))
    table = table.replace_schema_metadata(dict(pandas=json.dumps(pandas)))
    pq.write_table(table, part / "meta/tasks.parquet")
    stats = {key: statistics(value) for key, value in values.items()}
    stats[camera] = {name: value.reshape(3, 1, 1) / 255 for name, value in stats[camera].items()}
    stats = {key: {name: value.tolist() for name, value in block.items()} | dict(count=[len(frame)])
             for key, block in stats.items()}
    (part / "meta/stats.json").write_text(json.dumps(stats, indent=1))
    video = {"video.fps": info["fps"], "video.codec": "h264", "video.pix_fmt": "yuv420p", "video.channels": 3,
             "video.height": size[0], "video.width": size[1], "video.is_depth_map": False, "has_audio": False}
    axes = ["height", "width", "channels"]
    features = {camera: dict(dtype="video", shape=[*size, 3], names=axes, info=video)}
    for key, names in (("observation.state", STATE_NAMES), ("action", ACTION_NAMES)):
        width = values[key].shape[1]
        features[key] = dict(dtype="float32", shape=[width], names=names if width == len(names) else None)
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[key] = dict(dtype="float32" if key == "timestamp" else "int64", shape=[1], names=None)
    info |= dict(codebase_version="v3.0", total_episodes=len(rows), total_frames=len(frame),
                 total_tasks=len(tasks), chunks_size=CHUNK_FILES, data_files_size_in_mb=100,
                 features=features, splits=dict(train=f"0:{len(rows)}"), data_path=DATA_PATH,
                 video_path=VIDEO_PATH)
    (part / "meta/info.json").write_text(json.dumps(info, indent=1))


# ------------------------------------------------------------------------------- making demonstrations

def record(first, count, task, domain, seed, image_size, noise):
    """What the demonstrator does in episodes first ... first + count - 1: a list, in this order, of
    (success, images (T, H, W, 3) uint8, states (T, 8), actions (T, 7), instruction)."""
    import envs
    env = envs.VecEnv(task, domain, min(4, count), seed, image_size=image_size, first_episode=first)
    # A person shows the real robot what to do, imperfectly; a script shows the simulated one.
    expert = envs.Expert(env, "teleop") if domain == "real" else envs.Expert(env, "expert", noise)
    obs, steps, episodes = env.reset(), [[] for _ in range(env.num_envs)], {}
    while any(number not in episodes for number in range(first, first + count)):
        executed, label = expert.act()       # (N, 7) each; the expert's noise is in the first one only
        for i, step in enumerate(steps):
            step.append((obs["images"][i].copy(), obs["state"][i].copy(), label[i].copy()))
        texts = obs["instructions"]
        obs, _, terminated, truncated, info = env.step(executed[:, None])
        for i in np.flatnonzero(terminated | truncated):
            arrays = [np.stack(column) for column in zip(*steps[i])]
            episodes[int(info["episode"][i])] = bool(info["success"][i]), *arrays, texts[i]
            steps[i] = []
    return [episodes[number] for number in range(first, first + count)]


def successes(pool, workers, task, domain, episodes, rates, *rest):
    """Yields the first successful demonstrations in the order of their numbers, whichever worker is first."""
    limit, block = 20 + 10 * episodes, min(16, -(-episodes // workers))    # block: what a worker does at once
    starts, pending, found = collections.deque(range(0, limit, block)), collections.deque(), 0
    with tqdm(total=episodes, desc=f"{task} ({domain})", unit="episode") as bar:
        while starts or pending:
            while starts and len(pending) < 2 * workers:             # not all at once: they would pile up
                first = starts.popleft()
                pending.append((first, pool.submit(record, first, block, task, domain, *rest)))
            first, future = pending.popleft()
            for number, (success, *demonstration) in enumerate(future.result(), first):
                if success:
                    yield *demonstration, number
                    found, _ = found + 1, bar.update()
                if found == episodes:
                    rates[task] = found / (number + 1)
                    return
    raise ValueError(f"{task} ({domain}): only {found} of {limit} demonstrations succeeded, need {episodes}; "
                     "nothing was written")


def make_demos(task, domain, episodes, out, seed=0, workers=0, image_size=64, noise=.005):
    """Records successful demonstrations in envs.py and writes them as LeRobot v3.0; main() has the units.
    Task "all": `episodes` of each. The number of workers changes nothing: always the first successes in order
    of the episode numbers of `seed`. Returns {task: success rate of the demonstrator}."""
    import envs
    workers, rates, tasks = workers or os.cpu_count(), {}, envs.TASKS if task == "all" else [task]
    spawn = multiprocessing.get_context("spawn")                     # OpenGL contexts do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        options = (episodes, rates, seed, image_size, noise)
        each = (successes(pool, workers, name, domain, *options) for name in tasks)
        write_dataset(out, itertools.chain.from_iterable(each), CONTROL_HZ)
    return rates


# ------------------------------------------------------------------------------- data set card

def card(demos, sheet):
    """Prints what a data set holds; writes a contact sheet, one row an episode, time to the right."""
    recording, lengths = demos.recording, demos.lengths
    info, folder = recording.info, recording.folder
    print(f"{folder}: LeRobot {info['codebase_version']}, robot {info.get('robot_type')}, {info['fps']} fps\n"
          f"{len(lengths)} episodes of {lengths.min()} to {lengths.max()} frames, {len(demos)} frames = "
          f"{len(demos) / info['fps'] / 60:.1f} minutes")
    for name, feature in info["features"].items():
        if feature["dtype"] in ("image", "video"):
            used = " (shown)" * (name == recording.cameras[0])
            print(f"camera   {name} {feature['shape']} {feature['dtype']}{used}")
    for text, frames in collections.Counter(demos.instructions).most_common():
        print(f"task     {text!r}: {frames} frames")
    columns, stats = ("min", "q01", "mean", "q99", "max", "std"), action_statistics(demos.actions)
    outside = ((demos.actions < stats["q01"]) | (demos.actions > stats["q99"])).mean(0)
    print("action   " + "".join(f"{key:>9s}" for key in columns) + "   outside q01..q99")
    for d, share in enumerate(outside):
        name = ACTION_NAMES[d] if len(outside) == len(ACTION_NAMES) else f"[{d}]"
        print(f"{name:9s}" + "".join(f"{stats[key][d]:9.4f}" for key in columns) + f"{share:11.2%}")
    if (folder / "meta/stats.json").exists():
        stored = json.loads((folder / "meta/stats.json").read_text()).get(recording.keys["actions"], {})
        off = [key for key in ("min", "max", "mean", "std") if key in stored
               and not np.allclose(stored[key], stats[key], rtol=1e-3, atol=1e-5)]
        print(f"meta/stats.json {'disagrees' if off else 'agrees'} with the data {', '.join(off)}")
    shown = np.unique(np.linspace(0, len(lengths) - 1, 6).astype(int))     # up to 6, 8 frames each
    rows = demos.begins[shown, None] + np.linspace(0, lengths[shown] - 1, 8, axis=1).astype(int)
    tiles = demos.frames[rows, 0].transpose(0, 2, 1, 3, 4)                   # (6, H, 8, W, 3)
    tiles = tiles.reshape(tiles.shape[0] * tiles.shape[1], -1, 3)            # (6 H, 8 W, 3)
    Image.fromarray(tiles.repeat(2, 0).repeat(2, 1)).save(sheet)
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
            rates = make_demos(args.task, args.domain, args.episodes, args.out, args.seed, args.workers,
                               args.image_size, args.noise)
            print("demonstrator succeeds: " + ", ".join(f"{task} {rate:.0%}" for task, rate in rates.items()))
        card(open_dataset(args.out if args.make else args.path, args.image_size, 1, args.camera, "stretch",
                          None, args.action_key, args.state_key, args.task_key, args.cache_dir), args.sheet)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
