"""Demonstrations: LeRobot data sets in and out, normalisation statistics, and the sampler that mixes sim and real.

    Stage I    L = alpha * L_SFT(sim) + (1 - alpha) * L_SFT(real)       (RL-Co, arXiv 2602.12628)

realised by sampling: every training sample is simulated with probability alpha, else real, whatever the sizes of
the two sets. alpha = 0 trains on real data only, alpha = 1 on simulation only.

    python real_data.py --make --domain real --task open-drawer --episodes 50 --out demos/real   # record
    python real_data.py demos/real                                                               # data set card

    demos = open_dataset("demos/real", image_size=64, horizon=8)       # a LeRobot folder (v2.1, v3.0) or a hub id
    train, held_out = demos.split(0.1)                                 # whole episodes
    batch = next(MixSampler(sim=None, real=train, alpha=0, batch=32))  # a dict, see Demos.batch

Shapes     N frames of E episodes, B batch, K actions per sample (horizon), C cameras, A action and S state size
Actions    (7,) = dx dy dz [m], droll dpitch dyaw [rad] per control step in the robot base frame, gripper in
           [-1 close, +1 open]; physical units as stored. Normalisation belongs to the policy's checkpoint.
Pixels     are decoded once into a memory-mapped uint8 file in ~/.cache/sim_real_frames. Its name is a hash of
           the data and the size, so changed data get a new file; delete that folder whenever you like.
"""
import argparse
import collections
import concurrent.futures
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
import pyarrow.compute as pc
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
VIDEO_CRF = 18                               # h264 quality of the sets written here: 0 lossless, 51 worst
CACHE_FORMAT = 1                             # raise it when cached pixels would come out differently

# ------------------------------------------------------------------------------------- problems, all at once


def ranges(numbers):
    """[5, 0, 3, 4] -> '0, 3-5'."""
    runs = itertools.groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


class Problems(collections.defaultdict):
    """{what is wrong: [episode, ...]}. Collected, then raised together: one run shows every offender."""

    def __init__(self):
        super().__init__(list)

    def stop(self, where):
        if self:
            listed = "\n".join(f"  - {what}" + (f": episode {ranges(which)}" if which else "")
                               for what, which in self.items())
            raise ValueError(f"{where}: {len(self)} kind(s) of problem, nothing was written\n{listed}\n"
                             "Repair or remove what is listed and try again.")


# ------------------------------------------------------------------------------------- reading LeRobot folders


@dataclasses.dataclass
class Episode:
    index: int                               # LeRobot's episode_index
    length: int                              # T frames, as the metadata promise
    data_file: pathlib.Path                  # parquet file with its rows
    videos: dict                             # camera -> (mp4 file, seconds into it at which the episode starts)
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
    keys: dict                               # feature names of {"actions", "states" if there are any}
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
            f"{path}: neither a folder nor a data set that could be fetched ({type(error).__name__}). Offline? "
            f"Where there is internet, run\n  hf download {path} --repo-type dataset --local-dir {folder.name}\n"
            f"then copy the folder {folder.name} here and give its path instead of {path}.") from error


def choose_cameras(features, cameras):
    """Image features to use. None: the first colour camera that is not on the wrist, the policies' own view."""
    found = [key for key, feature in features.items() if feature["dtype"] in ("image", "video")]
    if cameras is None:
        return sorted(found, key=lambda key: ("depth" in key, "wrist" in key or "hand" in key))[:1]
    cameras = [cameras] if isinstance(cameras, str) else list(cameras)
    known = {key.split(".")[-1]: key for key in found} | {key: key for key in found}       # `front` is enough
    unknown = [camera for camera in cameras if camera not in known]
    if unknown or not 1 <= len(cameras) <= MAX_CAMERAS:
        raise ValueError(f"cameras {cameras}: need 1 to {MAX_CAMERAS} out of {found}; unknown: {unknown}")
    return [known[camera] for camera in cameras]


def find_feature(features, given, usual, flag):
    """The feature named by the user, else the first of the usual names that exists, else None."""
    if given is not None and given not in features:
        raise ValueError(f"{flag} {given}: no such feature; the data set has {sorted(features)}")
    return given or next((name for name in usual if name in features), None)


def read_meta(folder, info, cameras):
    """Episodes without their rows, and {task_index: instruction}.

    v2.x: one parquet file per episode, one mp4 per episode and camera. v3.0: many episodes per file; the data
    and every camera go on to a next file independently, so each has its own indices.
    """
    if info["codebase_version"] == "v3.0":
        table = pq.ParquetFile(folder / "meta/tasks.parquet").read()
        # The text is a pandas index: called `task` by recent writers, `__index_level_0__` by lerobot 0.4.x.
        text = next(name for name in table.column_names if name != "task_index")
        tasks = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))
        files = [pq.ParquetFile(path) for path in sorted((folder / "meta/episodes").glob("*/*.parquet"))]
        rows = [row for file in files for row in file.read(
            [name for name in file.schema_arrow.names if not name.startswith("stats/")]).to_pylist()]
    else:
        tasks, rows = ([json.loads(line) for line in (folder / "meta" / name).read_text().splitlines() if line]
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
    """Reads a LeRobot data set except for its pixels; arguments as in open_dataset. Returns a Recording.

    Raises ValueError where nothing can be read: no folder, unknown version, broken metadata, zero episodes. What
    is wrong with single episodes is collected in Recording.problems.
    """
    folder, problems = local_folder(path), Problems()
    try:
        info = json.loads((folder / "meta/info.json").read_text())
        version, features = info["codebase_version"], info["features"]
        if version not in VERSIONS:
            raise ValueError(f"unknown LeRobot version {version!r}, need one of {', '.join(VERSIONS)}")
        cameras = choose_cameras(features, cameras)
        episodes, tasks = read_meta(folder, info, cameras)
    except (KeyError, StopIteration, OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{folder}: not a readable LeRobot data set: {type(error).__name__}: {error}. Convert it "
                         "with the lerobot package.") from error
    keys = dict(actions=find_feature(features, action_key, ("action", "actions"), "--action-key"),
                states=find_feature(features, state_key, ("observation.state", "state"), "--state-key"))
    keys = {name: key for name, key in keys.items() if key}
    if "actions" not in keys:
        problems[f"no feature `action` or `actions` in {sorted(features)}; name it with --action-key"] = []
    elif action_dim not in (None, features[keys["actions"]]["shape"][0]):
        problems[f"{keys['actions']} of size {features[keys['actions']]['shape'][0]}, need {action_dim} "
                 f"({' '.join(ACTION_NAMES)})"] = []
    if not cameras:
        problems[f"no image or video feature in {sorted(features)}"] = []
    if not episodes or len(episodes) != info.get("total_episodes", len(episodes)):
        problems[f"{len(episodes) or 'zero'} episodes, info.json promises {info.get('total_episodes')}"] = []
    episodes.sort(key=lambda episode: episode.index)
    recording, by_file = Recording(folder, info, cameras, keys, episodes, problems), collections.defaultdict(list)
    for episode in episodes:
        by_file[episode.data_file].append(episode)
    for file, members in by_file.items():
        read_rows(recording, file, members, task_key or "task_index", tasks)
    return recording


def vectors(column, width):
    """Arrow column of numbers or lists -> (n, width) float32, None if a row has another size; (n,) bad rows."""
    column = column.combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        bad = np.asarray(pc.fill_null(pc.list_value_length(column), -1)) != width
        column = pc.list_flatten(column)
    else:
        bad = np.full(len(column), width != 1)
    if bad.any():
        return None, bad
    return column.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width), bad


def read_rows(recording, file, episodes, task_key, tasks):
    """Fills and checks the episodes that lie in one parquet file."""
    problems, features, step = recording.problems, recording.info["features"], 1 / recording.info["fps"]
    indices, keys = [episode.index for episode in episodes], recording.keys
    try:
        table = pq.ParquetFile(file).read(["episode_index", "frame_index", "timestamp", task_key, *keys.values()])
        owner, frame, times = (table[key].to_numpy() for key in ("episode_index", "frame_index", "timestamp"))
        texts = table[task_key].to_pylist()
        columns = {name: vectors(table[key], features[key]["shape"][0]) for name, key in keys.items()}
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        problems[f"data file, or one of its columns, missing or broken ({error})"] += indices
        return
    columns.setdefault("states", (np.zeros((len(owner), 0), np.float32), np.zeros(len(owner), bool)))
    if task_key == "task_index":
        texts = [tasks.get(task) for task in texts]
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


# ------------------------------------------------------------------------------------- pixels


@dataclasses.dataclass
class FrameJob:
    """Frames to take out of one mp4 or parquet file, in the order in which they lie there."""
    path: pathlib.Path
    camera: str
    slot: int                                # which of the chosen cameras
    numbers: np.ndarray                      # (n,) frame number in the mp4, or row number in the parquet file
    rows: np.ndarray                         # (n,) row in the whole data set
    episodes: np.ndarray                     # (n,) episode_index, for messages


def video_index(path):
    """Times (F,) [s] of all frames of a video in the order of display, and (H, W). Decodes nothing: 20 ms."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-copyts", "-i", path, "-map", "0:v:0", "-c", "copy",
               "-f", "framecrc", "-"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    ticks, tick, size = [], 1.0, None        # tick: length of a time unit [s]
    for line in text.splitlines():
        if line.startswith("#tb"):
            tick = int(line.split()[-1].split("/")[0]) / int(line.split("/")[-1])
        elif line.startswith("#dimensions"):
            size = tuple(int(side) for side in reversed(line.split()[-1].split("x")))
        elif line[:1].isdigit():
            ticks.append(int(line.split(",")[2]))                    # stream, dts, pts, duration, bytes, crc
    return np.sort(np.array(ticks)) * tick, size


def plan_frames(recording):
    """FrameJobs for the chosen cameras. What is missing goes to recording.problems. Reads no pixel."""
    jobs, problems = [], recording.problems
    for slot, camera in enumerate(recording.cameras):
        parts, row, index = collections.defaultdict(list), 0, {}     # file -> [(numbers, rows, episodes), ...]
        if recording.is_video(camera):
            files = {episode.videos[camera][0] for episode in recording.episodes}
            files = [file for file in files if file.is_file()]
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                index = dict(zip(files, pool.map(video_index, files)))
        for episode in recording.episodes:
            row += episode.length
            if episode.positions is None:
                continue
            file, numbers = episode.data_file, episode.positions
            if recording.is_video(camera):
                file, start = episode.videos[camera]
                if file not in index:
                    problems[f"{camera}: video file missing"].append(episode.index)
                    continue
                times, size = index[file]
                if size != recording.size(camera):
                    problems[f"{camera}: images of another size, {size}, than info.json declares"].append(
                        episode.index)
                wanted = start + episode.timestamps
                numbers = np.searchsorted((times[1:] + times[:-1]) / 2, wanted)      # the nearest, as in LeRobot
                if not len(times) or (np.abs(times[numbers] - wanted) > TIME_TOLERANCE).any():
                    problems[f"{camera}: frames missing or timestamps out of tolerance (no frame within "
                             f"{TIME_TOLERANCE:g} s)"].append(episode.index)
            parts[file].append((numbers, row - episode.length + np.arange(len(numbers)),
                                np.full(len(numbers), episode.index)))
        for file, members in parts.items():
            columns = [np.concatenate(column) for column in zip(*members)]
            order = np.argsort(columns[0], kind="stable")
            jobs.append(FrameJob(file, camera, slot, *(column[order] for column in columns)))
    return jobs


def video_frames(path):
    """(number, frame (H, W, 3) uint8) of an mp4, up to its end or to the first frame that is broken."""
    # -xerror: stop at a broken packet, which would otherwise shift all later frames by one without a word.
    # passthrough: every stored frame exactly once; by default ffmpeg repeats and drops some to keep the rate.
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24", input_params=["-xerror"],
                                        output_params=["-fps_mode", "passthrough"])
    try:
        width, height = next(reader)["size"]
        for number, data in enumerate(reader):
            yield number, np.frombuffer(data, np.uint8).reshape(height, width, 3)
    except (OSError, RuntimeError, StopIteration):
        pass                                 # decode lists the frames that did not come
    finally:
        reader.close()


def image_frames(path, column):
    """(number, frame (H, W, 3) uint8 or None if broken) of a parquet file with encoded images."""
    number = -1
    for piece in pq.ParquetFile(path).iter_batches(batch_size=64, columns=[column]):
        for number, cell in enumerate(piece.column(0).to_pylist(), number + 1):
            try:
                yield number, np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))
            except (OSError, TypeError, SyntaxError):                # PIL calls a broken PNG a SyntaxError
                yield number, None


def decode(job, is_video):
    """Yields (k, frame (H, W, 3) uint8 or None if unreadable) for each job.numbers[k], k ascending."""
    done = 0
    for number, image in video_frames(job.path) if is_video else image_frames(job.path, job.camera):
        while done < len(job.numbers) and job.numbers[done] == number:
            yield done, image
            done += 1
    for k in range(done, len(job.numbers)):
        yield k, None


def resize(image, size, fit):
    """(H, W, 3) -> (size, size, 3) uint8, bit-equal to the official code; no change if it fits or size is None.

    fit `stretch`: PIL bicubic, aspect ratio lost (OpenVLA); `pad`: PIL bilinear, centred on black (openpi).
    """
    height, width = image.shape[:2]
    if size is None or (height, width) == (size, size):
        return image
    if fit == "stretch":
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    ratio = max(width / size, height / size)
    inner = (int(width / ratio), int(height / ratio))
    out = Image.new("RGB", (size, size))
    out.paste(Image.fromarray(image).resize(inner, Image.Resampling.BILINEAR),
              ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return np.asarray(out)


def content_key(recording, *options):
    """Hash of all that decides the cached pixels: files (about 1 GB/s), which frames of them, options."""
    digest, files = hashlib.sha256(repr((CACHE_FORMAT, recording.cameras, options)).encode()), {}
    for episode in recording.episodes:
        digest.update(repr((episode.index, [start for _, start in episode.videos.values()])).encode())
        digest.update(episode.timestamps.tobytes() + episode.positions.tobytes())
        files |= {file: None for file, _ in episode.videos.values()}             # a dict keeps the order
        if len(episode.videos) < len(recording.cameras):
            files[episode.data_file] = None                                      # images inside the parquet file
    for file in files:
        if file.is_file():                                                       # else plan_frames complains
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:24]


def cache_frames(recording, image_size, fit, cache_dir):
    """The .npy file with all frames, (N, C, H, W, 3) uint8. Decodes them if it does not exist yet.

    Processes that want the same file wait for the one that builds it. The system frees the lock of a killed
    process, and the file gets its name only when it is complete, so nobody ever sees half of it.
    """
    from filelock import FileLock                                    # comes with huggingface_hub
    sizes = {(image_size, image_size) if image_size else recording.size(camera) for camera in recording.cameras}
    if len(sizes) > 1:
        recording.problems[f"cameras of different sizes {sorted(sizes)} need an image_size for all"] = []
    if recording.problems:
        plan_frames(recording)                                       # so that faults of the videos are listed too
        recording.problems.stop(recording.folder)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "sim_real_frames"
    cache = pathlib.Path(cache_dir or cache).expanduser()
    path = cache / f"{content_key(recording, image_size, fit)}.npy"
    shape = (sum(episode.length for episode in recording.episodes), len(recording.cameras), *sizes.pop(), 3)
    if path.exists():
        return path
    jobs = plan_frames(recording)
    recording.problems.stop(recording.folder)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            return path                                              # another process was faster
        for left_over in cache.glob(f"{path.stem}.*.part"):          # of a killed process: we hold the lock
            left_over.unlink()
        need, free = np.prod(shape, dtype=np.int64) / 1e9, shutil.disk_usage(cache).free / 1e9
        if need > free:
            raise ValueError(f"{cache}: the decoded frames need {need:.1f} GB, {free:.1f} GB are free; choose "
                             "another cache_dir or a smaller image_size")
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
                        f"images of another size, {image.shape[:2]}, than info.json declares"
                    recording.problems[f"{job.camera}: {what}"].append(int(job.episodes[k]))
                    continue
                place = int(job.rows[k]) * shape[1] + job.slot
                os.pwrite(file.fileno(), resize(image, image_size, fit).tobytes(), start + place * frame_bytes)
                bar.update()

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(work, jobs))       # PIL and ffmpeg run outside the interpreter lock; list() re-raises


# ------------------------------------------------------------------------------------- the data set that trains


class Demos:
    """Demonstrations as samples, one per frame: len(demos) = N.

    episodes (E,) their numbers, scenes (E,) their numbers in the simulator (-1: unknown); actions (N, A) and
    states (N, S) float32, instructions (N,) of its frames; batch(indices) gives samples with pixels.
    """

    REMAP_BYTES = 512 * 2**20                # pages once read count as this process's memory until mapped anew

    def __init__(self, recording, frames_path, horizon):
        parts = recording.episodes
        self.folder, self.info, self.keys, self.cameras = (getattr(recording, name) for name in (
            "folder", "info", "keys", "cameras"))
        self.horizon, self.frames_path, self.bytes_read = horizon, frames_path, 0
        self.frames = np.load(frames_path, mmap_mode="r")            # (all frames, C, H, W, 3), stays on disk
        self.all_actions = np.concatenate([part.actions for part in parts])
        self.all_states = np.concatenate([part.states for part in parts])
        self.all_texts = np.array([text for part in parts for text in part.instructions], object)
        ends = np.cumsum([part.length for part in parts])
        self.table = {part.index: (end - part.length, end, part.scene) for part, end in zip(parts, ends)}
        self.use(list(self.table))

    def use(self, episodes):
        begins, ends, scenes = np.array([self.table[episode] for episode in episodes]).T         # (E,) each
        self.episodes, self.scenes = np.array(episodes), scenes
        self.rows = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends)])  # (N,)
        self.ends = np.repeat(ends, ends - begins)                   # (N,) row after the last of its episode
        self.actions, self.states = self.all_actions[self.rows], self.all_states[self.rows]
        self.instructions = self.all_texts[self.rows]

    def __len__(self):
        return len(self.rows)

    def select(self, episodes):
        """A view of these episode numbers only, in this order."""
        episodes = [int(episode) for episode in episodes]
        if not episodes or set(episodes) - set(self.episodes.tolist()):
            raise ValueError(f"{self.folder}: cannot select episodes [{ranges(episodes)}]; need one or more of "
                             f"{ranges(self.episodes.tolist())}")
        view = copy.copy(self)               # shares the pixels
        view.use(episodes)
        return view

    def split(self, held_out, seed=0):
        """(train, held-out): a fraction of the episodes, at least one whole one, is held out. 0: (self, None)."""
        if held_out == 0:
            return self, None
        if not 0 < held_out < 1 or len(self.episodes) < 2:
            raise ValueError(f"held_out={held_out} of {len(self.episodes)} episode(s): need a fraction in [0, 1), and "
                             "two episodes unless it is 0")
        count = min(max(1, round(held_out * len(self.episodes))), len(self.episodes) - 1)
        order = np.random.default_rng(seed).permutation(self.episodes)
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))

    def batch(self, indices):
        """Samples `indices` (B,) out of range(len(self)) as a dict:

        images (B, H, W, 3) uint8, or (B, C, H, W, 3) for several cameras; instructions, B strings;
        actions (B, K, A) float32; pad (B, K) bool, True past the episode's end, where its last action is
        repeated; state (B, S) float32.
        """
        rows, ends = self.rows[indices], self.ends[indices][:, None]                   # (B,), (B, 1)
        window = rows[:, None] + np.arange(self.horizon)                               # (B, K)
        images = np.array(self.frames[rows])                                           # (B, C, H, W, 3), a copy
        self.bytes_read += images.nbytes
        if self.bytes_read > self.REMAP_BYTES:
            self.frames, self.bytes_read = np.load(self.frames_path, mmap_mode="r"), 0
        return dict(images=images[:, 0] if len(self.cameras) == 1 else images, state=self.all_states[rows],
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
    *_key       names of features that are not found by themselves; task_key: a text column with the instruction
    cache_dir   folder for the decoded frames; None: ~/.cache/sim_real_frames
    Raises ValueError that lists everything that is wrong with the set.
    """
    if fit not in ("stretch", "pad") or horizon < 1 or (image_size is not None and image_size < 1):
        raise ValueError(f"fit={fit!r}, horizon={horizon}, image_size={image_size}: need fit stretch or pad, a "
                         "horizon of 1 or more, and an image_size of 1 or more or None")
    recording = read_lerobot(path, cameras, action_key, state_key, task_key, action_dim)
    return Demos(recording, cache_frames(recording, image_size, fit, cache_dir), horizon)


# ------------------------------------------------------------------------------------- normalisation statistics


def statistics(values):
    """Exact statistics of values (N, D) over the whole set, no histogram: {name: (D,) float64}."""
    values = np.asarray(values, np.float64)
    names, levels = ("q01", "q10", "q50", "q90", "q99"), (.01, .10, .50, .90, .99)
    return dict(min=values.min(0), max=values.max(0), mean=values.mean(0), std=values.std(0),
                **dict(zip(names, np.quantile(values, levels, axis=0))))


def action_statistics(actions, min_range=MIN_RANGE):
    """statistics() of actions (N, A), safe to divide by q99 - q01.

    A dimension that hardly moves would have its noise blown up to [-1, 1]. Its range is widened about the middle
    to min_range [m or rad; 0 = leave it], the gripper's to its physical [-1, 1], with a warning that names it.
    """
    stats = statistics(actions)
    for d, (low, high) in enumerate(zip(stats["q01"].copy(), stats["q99"].copy())):
        if high - low >= min_range:
            continue
        name = ACTION_NAMES[d] if len(stats["q01"]) == len(ACTION_NAMES) else f"action[{d}]"
        wide = (-1, 1) if name == "gripper" else ((low + high - min_range) / 2, (low + high + min_range) / 2)
        stats["q01"][d], stats["q99"][d] = wide
        warnings.warn(f"{name}: q01 {low:.3g} and q99 {high:.3g} are less than {min_range:g} apart; now "
                      f"[{wide[0]:.3g}, {wide[1]:.3g}]. Do these demonstrations use it?", stacklevel=2)
    return stats


def openvla_statistics(demos, name):
    """`norm_stats` of OpenVLA's config.json = content of dataset_statistics.json, for a list of Demos.

    One set of numbers for all of them: a policy has a single norm_stats for sim and real (as RL-Co has).
    The gripper is not normalised (mask False), it already is in [-1, 1].
    """
    action = action_statistics(np.concatenate([part.actions for part in demos]))
    proprio = statistics(np.concatenate([part.states for part in demos]))
    keys = ("mean", "std", "max", "min", "q01", "q99")
    action, proprio = ({key: stats[key].tolist() for key in keys} for stats in (action, proprio))
    action["mask"] = [True] * (len(action["q01"]) - 1) + [False]
    return {name: dict(action=action, proprio=proprio, num_transitions=sum(len(part) for part in demos),
                       num_trajectories=sum(len(part.episodes) for part in demos))}


def openpi_statistics(demos):
    """Content of openpi's norm_stats.json for a list of Demos."""
    parts = dict(state=statistics(np.concatenate([part.states for part in demos])),
                 actions=action_statistics(np.concatenate([part.actions for part in demos])))
    return dict(norm_stats={part: {key: stats[key].tolist() for key in ("mean", "std", "q01", "q99")}
                            for part, stats in parts.items()})


# ------------------------------------------------------------------------------------- the alpha sampler


class MixSampler:
    """Endless batches in which every sample is simulated with probability exactly alpha, else real.

    sim, real  Demos, or functions that open them. alpha = 0 never opens sim, alpha = 1 never opens real.
    batch      samples per step over all ranks. Rank r gets samples r, r + world, ... of one global stream, so
               neither alpha nor the samples depend on the number of ranks.
    Each set is gone through in a random order, a new one for each pass. next() gives what Demos.batch gives, and
    sim (B,) bool. state_dict() is the position in the stream; any number of ranks may resume from it.
    """

    def __init__(self, sim, real, alpha, batch, seed=0, rank=0, world=1):
        if not 0 <= alpha <= 1 or not 0 <= rank < world <= batch:
            raise ValueError(f"alpha={alpha}, batch={batch}, rank={rank}, world={world}: need alpha in [0, 1], a rank "
                             "in [0, world), and a sample or more for each rank")
        self.alpha, self.batch, self.seed, self.rank, self.world = alpha, batch, seed, rank, world
        needed = (alpha < 1 and real, alpha > 0 and sim)             # number 0 is real, 1 is simulated
        self.sets = [source() if callable(source) else source for source in needed]
        if None in self.sets:
            raise ValueError(f"alpha={alpha} needs demonstrations from {'real' if self.sets[0] is None else 'sim'}")
        shapes = {(part.frames.shape[1:], part.horizon, part.actions.shape[1], part.states.shape[1])
                  for part in self.sets if part}
        if len(shapes) > 1:
            raise ValueError(f"sim and real differ in ((cameras, H, W, 3), horizon, action size, state size): "
                             f"{sorted(shapes)}; open both with the same arguments")
        self.step, self.drawn = 0, [0, 0]                            # by all ranks together; drawn from real, sim
        self.orders = {}                                             # number of the set -> (pass, permutation)

    def __iter__(self):
        return self

    def draw(self, which, count):
        """The next `count` sample numbers of one set."""
        out = np.empty(count, int)
        for i in range(count):
            turn, place = divmod(self.drawn[which], len(self.sets[which]))
            if self.orders.get(which, (None,))[0] != turn:
                shuffle = np.random.default_rng([self.seed, which, turn]).permutation
                self.orders[which] = turn, shuffle(len(self.sets[which]))
            out[i] = self.orders[which][1][place]
            self.drawn[which] += 1
        return out

    def __next__(self):
        sim = np.random.default_rng([self.seed, 2, self.step]).random(self.batch) < self.alpha
        numbers = np.empty(self.batch, int)
        for which in (0, 1):                                         # every rank draws for all: they stay in step
            numbers[sim == which] = self.draw(which, np.sum(sim == which))
        self.step += 1
        sim, numbers = sim[self.rank::self.world], numbers[self.rank::self.world]
        parts = [self.sets[which].batch(numbers[sim == which]) for which in (0, 1) if (sim == which).any()]
        order = np.argsort(np.argsort(sim, kind="stable"))           # [real..., sim...] -> order of the stream
        texts = [text for part in parts for text in part.pop("instructions")]
        return {key: np.concatenate([part[key] for part in parts])[order] for key in parts[0]} | dict(
            instructions=[texts[i] for i in order], sim=sim)

    def state_dict(self):
        return dict(alpha=self.alpha, batch=self.batch, seed=self.seed, step=self.step, drawn=list(self.drawn),
                    sizes=[len(part) if part else 0 for part in self.sets])

    def load_state_dict(self, state):
        wrong = [f"{key} was {state[key]}, is {now}" for key, now in self.state_dict().items()
                 if key not in ("step", "drawn") and state[key] != now]
        if wrong:
            raise ValueError("cannot resume another stream of samples: " + "; ".join(wrong))
        self.step, self.drawn = state["step"], list(state["drawn"])


# ------------------------------------------------------------------------------------- writing LeRobot v3.0


class DatasetWriter:
    """Writes a LeRobot v3.0 data set with one h264 camera, image by image; errors leave nothing behind.

        with DatasetWriter("demos/real", fps=5) as writer:
            writer.add_episode(images, states, actions, "open the drawer")

    The folder gets its name when the block ends well. data_mb, video_mb [MB]: size at which a new file begins.
    """

    def __init__(self, folder, fps, camera="observation.images.front", robot="panda", data_mb=100, video_mb=200):
        self.folder, self.camera = pathlib.Path(folder).expanduser(), camera
        if self.folder.exists():
            raise ValueError(f"{self.folder}: exists already; remove it or choose another folder")
        chunk = "chunk-{chunk_index:03d}/file-{file_index:03d}"
        self.info = dict(
            codebase_version="v3.0", robot_type=robot, fps=fps, chunks_size=CHUNK_FILES, data_files_size_in_mb=data_mb,
            video_files_size_in_mb=video_mb, data_path=f"data/{chunk}.parquet",
            video_path="videos/{video_key}/" + f"{chunk}.mp4")
        self.files, self.sizes = dict(data=0, video=0), dict(data=0, video=0)    # number and bytes of the current
        self.sinks = {}                                              # kind -> open writer
        self.rows = self.video_frames = 0                            # in the whole set; in the current mp4
        self.episodes, self.tasks = [], {}
        self.values = {camera: [], "observation.state": [], "action": []}        # for the statistics

    def __enter__(self):
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        return self

    def add_episode(self, images, states, actions, instruction, scene=-1):
        """images (T, H, W, 3) uint8, states (T, S), actions (T, A); scene: its episode number in the simulator."""
        images, length, wrong = np.asarray(images), len(images), Problems()
        values = {"observation.state": np.asarray(states, np.float32), "action": np.asarray(actions, np.float32)}
        size = self.info.get("size", images.shape[1:3])
        # yuv420p stores colour at half the resolution, so sides must be even
        if images.dtype != np.uint8 or images.shape != (length, *size, 3) or not length or any(n % 2 for n in size):
            wrong[f"images {images.dtype} {images.shape}: need uint8 (T >= 1, H, W, 3), H and W even and as before"]
        for key, value in values.items():
            width = self.values[key][0].shape[1] if self.episodes else value.shape[-1]
            if value.shape != (length, width) or not np.isfinite(value).all():
                wrong[f"{key} {value.shape}: need finite ({length}, {width})"]
        if not isinstance(instruction, str) or not instruction.strip():
            wrong[f"instruction missing: {instruction!r}"]
        wrong.stop(f"{self.folder}, episode {len(self.episodes)}")
        self.info["size"] = size
        row = dict(episode_index=len(self.episodes), tasks=[instruction], length=length, scene=scene)
        self.write_rows(row, values, self.tasks.setdefault(instruction, len(self.tasks)))
        self.write_video(row, images)
        self.episodes.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        values[self.camera] = images[::20, ::8, ::8].reshape(-1, 3)  # a sample is enough, as in LeRobot
        for key, value in values.items():
            self.values[key].append(value)

    def current(self, kind):
        """Path of the current file of this kind, and its indices."""
        place = dict(zip(("chunk_index", "file_index"), divmod(self.files[kind], CHUNK_FILES)))
        path = self.temporary / self.info[f"{kind}_path"].format(video_key=self.camera, **place)
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path), place

    def wrote(self, kind, size):
        """Goes on to a next file once about data_mb or video_mb are in this one. size [bytes] is an estimate: what
        ffmpeg has flushed so far would depend on timing, and the same data shall give the same files."""
        self.sizes[kind] += size
        if self.sizes[kind] >= self.info[f"{kind}_files_size_in_mb"] * 2**20:
            self.sinks.pop(kind).close()
            self.files[kind], self.sizes[kind] = self.files[kind] + 1, 0

    def write_rows(self, row, values, task):
        """One row group of the current data file."""
        length, fps, (path, place) = row["length"], self.info["fps"], self.current("data")
        table = pa.table({key: pa.FixedSizeListArray.from_arrays(pa.array(value.ravel()), value.shape[1])
                          for key, value in values.items()} | dict(
            timestamp=pa.array((np.arange(length) / fps).astype(np.float32)), frame_index=np.arange(length),
            episode_index=np.full(length, row["episode_index"]), index=self.rows + np.arange(length),
            task_index=np.full(length, task)))
        if "data" not in self.sinks:
            self.sinks["data"] = pq.ParquetWriter(path, table.schema)
        self.sinks["data"].write_table(table)
        row.update({f"data/{name}": number for name, number in place.items()},
                   dataset_from_index=self.rows, dataset_to_index=self.rows + length)
        self.rows += length
        self.wrote("data", table.nbytes)

    def write_video(self, row, images):
        """Appends to the current mp4. A key frame every 2 frames, so that any frame is quick to reach."""
        path, place = self.current("video")
        if "video" not in self.sinks:
            self.video_frames, self.sinks["video"] = 0, imageio_ffmpeg.write_frames(
                path, images.shape[2:0:-1], fps=self.info["fps"], codec="libx264", quality=None,
                macro_block_size=1, pix_fmt_out="yuv420p",
                output_params=["-g", "2", "-crf", str(VIDEO_CRF), "-threads", "1"])
            self.sinks["video"].send(None)
        for image in images:
            self.sinks["video"].send(np.ascontiguousarray(image))
        begin, self.video_frames = self.video_frames, self.video_frames + len(images)
        place.update(from_timestamp=begin / self.info["fps"], to_timestamp=self.video_frames / self.info["fps"])
        row.update({f"videos/{self.camera}/{name}": value for name, value in place.items()})
        self.wrote("video", images.nbytes / 10)                      # measured at this quality, textured tables

    def __exit__(self, error, *_):
        try:
            for sink in self.sinks.values():
                sink.close()
            if error is None:
                self.write_meta()
                os.replace(self.temporary, self.folder)
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)        # gone already if all went well

    def write_meta(self):
        if not self.episodes:
            raise ValueError(f"{self.folder}: zero episodes, nothing was written")
        meta = self.temporary / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.episodes), meta / "episodes/chunk-000/file-000.parquet")
        # LeRobot reads the tasks with pandas and wants the texts as the index: this metadata tells pandas so.
        columns = [dict(name=name, field_name=name, pandas_type=kind, numpy_type=numpy, metadata=None) for
                   name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))]
        pandas = json.dumps(dict(index_columns=["task"], column_indexes=[], columns=columns, pandas_version="2.2.0"))
        table = pa.table(dict(task_index=list(self.tasks.values()), task=list(self.tasks)))
        pq.write_table(table.replace_schema_metadata(dict(pandas=pandas)), meta / "tasks.parquet")
        stats = {key: statistics(np.concatenate(values)) for key, values in self.values.items()}
        stats[self.camera] = {name: value.reshape(3, 1, 1) / 255 for name, value in stats[self.camera].items()}
        stats = {key: {name: value.tolist() for name, value in part.items()} | dict(count=[self.rows])
                 for key, part in stats.items()}
        (meta / "stats.json").write_text(json.dumps(stats, indent=1))
        height, width = self.info.pop("size")
        features = {self.camera: dict(
            dtype="video", shape=[height, width, 3], names=["height", "width", "channels"], info={
                "video.fps": self.info["fps"], "video.codec": "h264", "video.pix_fmt": "yuv420p", "video.height": height,
                "video.width": width, "video.channels": 3, "video.is_depth_map": False, "has_audio": False})}
        for key, names in (("observation.state", STATE_NAMES), ("action", ACTION_NAMES)):
            dim = self.values[key][0].shape[1]
            features[key] = dict(dtype="float32", shape=[dim], names=list(names) if dim == len(names) else None)
        for key in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
            features[key] = dict(dtype="float32" if key == "timestamp" else "int64", shape=[1], names=None)
        self.info.update(total_episodes=len(self.episodes), total_frames=self.rows, total_tasks=len(self.tasks),
                         splits=dict(train=f"0:{len(self.episodes)}"), features=features)
        (meta / "info.json").write_text(json.dumps(self.info, indent=1))


# ------------------------------------------------------------------------------------- making demonstrations


def record(task, domain, seed, first, count, image_size, noise):
    """What the demonstrator does in episodes first ... first + count - 1: a list, in this order, of
    (success, images (T, H, W, 3) uint8, states (T, 8), actions (T, 7), instruction)."""
    import envs
    env = envs.VecEnv(task, domain, min(4, count), seed, image_size=image_size, first_episode=first)
    # A person shows the real robot what to do, imperfectly; a script shows the simulated one.
    expert = envs.Expert(env, style="teleop", noise=0.) if domain == "real" else envs.Expert(env, noise=noise)
    obs, steps, episodes = env.reset(), [[] for _ in range(env.num_envs)], {}
    while len([number for number in episodes if number < first + count]) < count:
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


def make_demos(task, domain, episodes, out, seed=0, workers=0, image_size=64, noise=.005):
    """Records successful demonstrations in envs.py and writes them as LeRobot v3.0; see main() for the arguments.

    task "all": `episodes` of each task. What is recorded does not depend on the workers: always the first successes
    in the order of the episode numbers of `seed`. Returns {task: success rate of the demonstrator}.
    """
    import envs
    workers, rates, limit = workers or os.cpu_count(), {}, 20 + 10 * episodes
    block = min(16, -(-episodes // workers))                         # episodes a process records in one go
    spawn = multiprocessing.get_context("spawn")                     # OpenGL contexts do not survive a fork
    with DatasetWriter(out, CONTROL_HZ) as writer, \
            concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for name in envs.TASKS if task == "all" else [task]:
            blocks, pending, tried, successes = iter(range(0, limit, block)), collections.deque(), 0, 0
            with tqdm(total=episodes, desc=f"{name} ({domain})", unit="episode") as bar:
                while successes < episodes:
                    while len(pending) < 2 * workers and (first := next(blocks, None)) is not None:
                        pending.append(pool.submit(record, name, domain, seed, first, block, image_size, noise))
                    if not pending:
                        raise ValueError(f"{name} ({domain}): only {successes} of {tried} demonstrations succeeded, "
                                         f"need {episodes}; nothing was written")
                    for success, *demonstration in pending.popleft().result():
                        if success and successes < episodes:
                            writer.add_episode(*demonstration, scene=tried)
                            bar.update()
                        if successes < episodes:
                            tried, successes = tried + 1, successes + success
            rates[name] = successes / tried
            for future in pending:
                future.cancel()
    return rates


# ------------------------------------------------------------------------------------- data set card


def card(demos, sheet):
    """Prints what a data set holds and writes a contact sheet: one row an episode, time runs to the right."""
    info, lengths = demos.info, np.array([end - begin for begin, end, _ in demos.table.values()])
    print(f"{demos.folder}: LeRobot {info['codebase_version']}, robot {info.get('robot_type')}, {info['fps']} fps\n"
          f"{len(lengths)} episodes, {len(demos)} frames = {len(demos) / info['fps'] / 60:.1f} minutes; episode length "
          f"{lengths.min()} to {lengths.max()} frames, mean {lengths.mean():.1f}")
    for name, feature in info["features"].items():
        if feature["dtype"] in ("image", "video"):
            print(f"camera   {name} {feature['shape']} {feature['dtype']}{' (shown)' * (name in demos.cameras)}")
    for text, frames in collections.Counter(demos.instructions).most_common():
        print(f"task     {text!r}: {frames} frames")
    columns, stats = ("min", "q01", "mean", "q99", "max", "std"), action_statistics(demos.actions)
    outside = ((demos.actions < stats["q01"]) | (demos.actions > stats["q99"])).mean(0)
    print("action   " + "".join(f"{key:>9s}" for key in columns) + "   outside q01..q99")
    for d, share in enumerate(outside):
        name = ACTION_NAMES[d] if len(outside) == len(ACTION_NAMES) else f"[{d}]"
        print(f"{name:9s}" + "".join(f"{stats[key][d]:9.4f}" for key in columns) + f"{share:11.2%}")
    if (demos.folder / "meta/stats.json").exists():
        stored = json.loads((demos.folder / "meta/stats.json").read_text()).get(demos.keys["actions"], {})
        off = [key for key in ("min", "max", "mean", "std") if key in stored
               and not np.allclose(stored[key], stats[key], rtol=1e-3, atol=1e-5)]
        print(f"meta/stats.json {'disagrees with the data on ' + ', '.join(off) if off else 'agrees with the data'}")
    table = np.array(list(demos.table.values()))
    shown = table[np.unique(np.linspace(0, len(table) - 1, 6).astype(int))]      # up to 6 episodes
    frames = np.stack([np.linspace(begin, end - 1, 8).astype(int) for begin, end, _ in shown])       # (6, 8)
    tiles = demos.frames[frames, 0]                                              # (6, 8, H, W, 3)
    tiles = tiles.transpose(0, 2, 1, 3, 4).reshape(len(shown) * tiles.shape[2], -1, 3)
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
    add("--task", default="open-drawer", help="pick-place, push-cube, open-drawer, close-drawer, or all of them")
    add("--domain", default="sim", help="sim (scripted expert) or real (stand-in, imperfect tele-operator)")
    add("--episodes", type=int, default=50, help="successful demonstrations per task, 1 or more")
    add("--out", help="folder of the new data set, must not exist yet")
    add("--seed", type=int, default=0, help="which scenes and which mistakes, 0 or more")
    add("--noise", type=float, default=.005, help="m, disturbs what the expert does, not its labels; 0 = nothing")
    add("--workers", type=int, default=0, help="processes that record; 0 = one per core")
    args = parser.parse_args()
    try:
        if args.make:
            if args.out is None or args.episodes < 1 or args.image_size < 2 or args.image_size % 2:
                raise ValueError("--make needs --out, --episodes of 1 or more and an even --image-size")
            rates = make_demos(args.task, args.domain, args.episodes, args.out, args.seed, args.workers,
                               args.image_size, args.noise)
            print("success of the demonstrator: " + ", ".join(f"{task} {rate:.0%}" for task, rate in rates.items()))
        if not (args.path or args.make):
            parser.error("give the path of a data set, or --make")
        card(open_dataset(args.path or args.out, args.image_size, 1, args.camera, "stretch", None, args.action_key,
                          args.state_key, args.task_key, args.cache_dir), args.sheet)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
