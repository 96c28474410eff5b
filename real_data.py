"""Demonstrations: LeRobot data sets in and out, normalisation statistics, and the sampler that mixes sim and real.

    Stage I    L = alpha * L_SFT(sim) + (1 - alpha) * L_SFT(real)       (RL-Co, arXiv 2602.12628)

realised by sampling: every training sample comes from the simulated set with probability alpha, else from the real
one, whatever the sizes of the two sets. So alpha = 0 is real-only training, alpha = 1 is simulation-only.

    python real_data.py --make --domain real --task open-drawer --episodes 50 --out demos/real   # record demonstrations
    python real_data.py demos/real                                                               # data set card

    demos = open_dataset("demos/real", image_size=64, horizon=8)       # a LeRobot folder (v2.1, v3.0) or a hub id
    train, held_out = demos.split(0.1)                                 # whole episodes
    sampler = MixSampler(sim=None, real=train, alpha=0, batch=32)
    batch = next(sampler)              # images (B,H,W,3) uint8, instructions, actions (B,K,7), pad (B,K), state (B,S)

Shapes     N frames of E episodes, B batch, K = horizon (actions per chunk), C cameras, H x W pixels, S state size
Actions    (7,) = dx dy dz [m], droll dpitch dyaw [rad] per control step in the robot base frame, gripper in
           [-1 close, +1 open]. Physical units, as stored; normalisation belongs to the policy's checkpoint.
Pixels     decoded once into a memory-mapped uint8 file (~/.cache/sim_real_frames), named after a hash of the data, so
           that a changed data set or another size gets another file; delete the folder whenever you like.
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

import imageio_ffmpeg                        # imageio's ffmpeg plugin: brings its own ffmpeg, AV1 and h264 included
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image                        # comes with imageio
from tqdm import tqdm

ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
STATE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper_opening", "zero")
ACTION_DIM = len(ACTION_NAMES)
VERSIONS = ("v2.0", "v2.1", "v3.0")          # v2.0 differs from v2.1 only in where it keeps statistics
TIME_TOLERANCE = 1e-4                        # s between a row's time and its video frame; LeRobot's own limit
MIN_RANGE = 1e-3                             # m or rad; q99 - q01 below this is noise, not motion
VIDEO_CRF = 18                               # h264 quality: 0 lossless, 51 worst
MAX_CAMERAS = 3                              # pi0.5 has three camera slots
CHUNK_FILES = 1000                           # files per chunk folder, LeRobot's default
CHUNK_PATH = "chunk-{chunk_index:03d}/file-{file_index:03d}"
CACHE_FORMAT = 1                             # raise it when the pixels in the cache would come out differently


# ------------------------------------------------------------------------------------- problems, all at once

def ranges(numbers):
    """[0, 3, 4, 5] -> '0, 3-5'."""
    numbers, out = sorted(set(numbers)), []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in run]
        out.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(out)


class Problems(collections.defaultdict):
    """{what is wrong: [episode, ...]}: collected first, reported together, so that one run shows every offender."""

    def __init__(self):
        super().__init__(list)

    def lines(self):
        return [text + (f": episode {ranges(episodes)}" if episodes else "") for text, episodes in self.items()]

    def stop(self, where):
        if self:
            listed = "\n".join("  - " + line for line in self.lines())
            raise ValueError(f"{where}: {len(self)} kind(s) of problem, nothing was written\n{listed}\n"
                             "repair or remove these episodes and try again")


# ------------------------------------------------------------------------------------- reading LeRobot folders

@dataclasses.dataclass
class Episode:
    index: int                               # LeRobot's episode_index
    length: int                              # frames, as the metadata promises
    data_file: pathlib.Path                  # the parquet file that holds its rows
    videos: dict                             # camera -> (mp4 file, seconds into it where the episode starts)
    positions: np.ndarray = None             # (T,) row numbers in data_file, in frame order
    timestamps: np.ndarray = None            # (T,) float64 seconds
    actions: np.ndarray = None               # (T, A) float32
    states: np.ndarray = None                # (T, S) float32; S = 0 when the set has no state
    instructions: list = None                # T strings


@dataclasses.dataclass
class Recording:
    """A LeRobot folder read except for its pixels. problems is empty when the data are sound."""
    folder: pathlib.Path
    info: dict                               # meta/info.json
    cameras: list                            # the chosen image features
    episodes: list
    problems: Problems
    action_key: str
    state_key: str | None


def local_folder(path):
    """Path of a data set folder; `owner/name` that is no folder is fetched from (or found in) the hub's cache."""
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise ValueError(f"{path}: no such folder; need a LeRobot data set folder or a hub id such as owner/name")
    from huggingface_hub import snapshot_download
    try:
        return pathlib.Path(snapshot_download(str(path), repo_type="dataset"))
    except Exception as error:               # HTTP, hub and operating-system errors share no base class
        raise ValueError(
            f"{path}: neither a folder here nor a data set that could be fetched from the hub "
            f"({type(error).__name__}). Offline? On a machine with internet run\n"
            f"  hf download {path} --repo-type dataset --local-dir {folder.name}\n"
            f"copy the folder {folder.name} here and pass its path instead of {path}") from error


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: need a JSON file of a LeRobot data set, got {error}") from error


def read_lines(path):
    """A .jsonl file as a list of dicts."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: need one JSON object a line, got {error}") from error


def read_meta_v2(folder, info, cameras):
    """v2.x: one parquet file and one mp4 per camera for each episode. Returns episodes, {task_index: text}."""
    tasks = {row["task_index"]: row["task"] for row in read_lines(folder / "meta/tasks.jsonl")}
    episodes = []
    for row in read_lines(folder / "meta/episodes.jsonl"):
        names = dict(episode_index=row["episode_index"], episode_chunk=row["episode_index"] // info["chunks_size"])
        videos = {camera: (folder / info["video_path"].format(video_key=camera, **names), 0.0)
                  for camera in cameras if info["features"][camera]["dtype"] == "video"}
        episodes.append(Episode(row["episode_index"], row["length"], folder / info["data_path"].format(**names),
                                videos))
    return episodes, tasks


def read_meta_v3(folder, info, cameras):
    """v3.0: many episodes per file; data and every camera roll over on their own. Same returns as read_meta_v2."""
    table = pq.ParquetFile(folder / "meta/tasks.parquet").read()
    # The text is a pandas index: called `task` by recent writers, `__index_level_0__` by lerobot 0.4.x.
    text = next(name for name in table.column_names if name != "task_index")
    tasks = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))
    episodes = []
    for path in sorted((folder / "meta/episodes").glob("*/*.parquet")):
        file = pq.ParquetFile(path)
        wanted = [name for name in file.schema_arrow.names if not name.startswith("stats/")]
        for row in file.read(columns=wanted).to_pylist():
            def place(kind):                 # the chunk and file in which this episode's rows or frames lie
                return dict(chunk_index=row[f"{kind}/chunk_index"], file_index=row[f"{kind}/file_index"])
            videos = {camera: (folder / info["video_path"].format(video_key=camera, **place(f"videos/{camera}")),
                               row[f"videos/{camera}/from_timestamp"])
                      for camera in cameras if info["features"][camera]["dtype"] == "video"}
            episodes.append(Episode(row["episode_index"], row["length"],
                                    folder / info["data_path"].format(**place("data")), videos))
    return episodes, tasks


def choose_cameras(features, cameras):
    """Names of the image features to use. None: the first that is not on the wrist (the policies' usual view)."""
    found = [key for key, feature in features.items() if feature["dtype"] in ("image", "video")]
    if cameras is None:
        colour = [key for key in found if "depth" not in key]
        outside = [key for key in colour if not any(word in key for word in ("wrist", "hand", "gripper"))]
        return (outside or colour or found)[:1]
    cameras = [cameras] if isinstance(cameras, str) else list(cameras)
    full = {key.split(".")[-1]: key for key in found} | {key: key for key in found}     # `front` is enough
    unknown = [camera for camera in cameras if camera not in full]
    if unknown or not 1 <= len(cameras) <= MAX_CAMERAS:
        raise ValueError(f"cameras {cameras}: need 1 to {MAX_CAMERAS} of {found}; unknown: {unknown}")
    return [full[camera] for camera in cameras]


def find_feature(features, given, usual, flag):
    """The feature `given` by the user, else the first of the `usual` names; None if there is none."""
    if given is not None and given not in features:
        raise ValueError(f"{flag} {given}: no such feature; the data set has {sorted(features)}")
    return given or next((name for name in usual if name in features), None)


def read_lerobot(path, cameras=None, action_key=None, state_key=None, task_key=None):
    """Reads a LeRobot data set (v2.x or v3.0), pixels excepted; see open_dataset for the arguments.

    Returns a Recording. Raises ValueError only where nothing can be read (no folder, unknown version, broken
    metadata); everything wrong with single episodes is collected in Recording.problems.
    """
    folder = local_folder(path)
    info = read_json(folder / "meta/info.json")
    version, features = info.get("codebase_version"), info.get("features", {})
    if version not in VERSIONS:
        raise ValueError(f"{folder}: unknown LeRobot version {version!r}; need one of {', '.join(VERSIONS)}. "
                         "Convert the set with the lerobot package")
    cameras = choose_cameras(features, cameras)
    action_key = find_feature(features, action_key, ("action", "actions"), "--action-key")
    state_key = find_feature(features, state_key, ("observation.state", "state"), "--state-key")
    problems = Problems()
    if action_key is None:
        problems[f"no feature `action` or `actions` among {sorted(features)}; name it with --action-key"] = []
    if not cameras:
        problems[f"no image or video feature among {sorted(features)}"] = []
    try:
        episodes, tasks = (read_meta_v3 if version == "v3.0" else read_meta_v2)(folder, info, cameras)
    except (KeyError, StopIteration, OSError, pa.ArrowException) as error:
        raise ValueError(f"{folder}/meta: incomplete metadata of version {version}: {error!r}") from error
    episodes.sort(key=lambda episode: episode.index)
    if not episodes:
        problems["zero episodes"] = []
    elif len(episodes) != info.get("total_episodes", len(episodes)):
        problems[f"{len(episodes)} episodes listed, but info.json promises {info['total_episodes']}"] = []
    problems.stop(folder)
    columns = ["episode_index", "frame_index", "timestamp", task_key or "task_index", action_key, state_key]
    by_file = collections.defaultdict(list)
    for episode in episodes:
        by_file[episode.data_file].append(episode)
    for file, members in by_file.items():
        read_rows(file, members, columns, features, tasks, problems)
    recording = Recording(folder, info, cameras, episodes, problems, action_key, state_key)
    check_rows(recording)
    return recording


def vectors(column, width):
    """Arrow column of numbers or lists -> values (n, width) float32 or None, and bad (n,) = rows of another size."""
    column = column.combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        bad = np.asarray(pc.fill_null(pc.list_value_length(column), -1)) != width
        column = None if bad.any() else pc.list_flatten(column)
    else:
        bad = np.full(len(column), width != 1)
    if bad.any():
        return None, bad
    return column.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width), bad


def read_rows(file, episodes, columns, features, tasks, problems):
    """Fills the arrays of the episodes that lie in one parquet file."""
    episode_key, frame_key, time_key, task_key, action_key, state_key = columns
    indices = [episode.index for episode in episodes]
    try:
        parquet = pq.ParquetFile(file)
        lacking = [name for name in columns if name and name not in parquet.schema_arrow.names]
        table = None if lacking else parquet.read(columns=[name for name in columns if name])
    except (OSError, pa.ArrowException) as error:
        problems[f"data file missing or broken ({type(error).__name__})"] += indices
        return
    if lacking:
        problems[f"the data have no column {', '.join(lacking)}"] += indices
        return
    owner, frame = table[episode_key].to_numpy(), table[frame_key].to_numpy()
    times = table[time_key].to_numpy().astype(np.float64)
    actions, bad_action = vectors(table[action_key], features[action_key]["shape"][0])
    states, bad_state = np.zeros((len(owner), 0), np.float32), np.zeros(len(owner), bool)
    if state_key:
        states, bad_state = vectors(table[state_key], features[state_key]["shape"][0])
    texts = table[task_key].to_pylist()
    if task_key == "task_index":
        texts = [tasks.get(task) for task in texts]
    by_episode = np.lexsort((frame, owner))                          # row numbers, sorted by episode, then frame
    first, last = (np.searchsorted(owner[by_episode], indices, side) for side in ("left", "right"))
    for episode, begin, end in zip(episodes, first, last):
        rows = episode.positions = by_episode[begin:end]
        episode.timestamps = times[rows]
        episode.instructions = [texts[row] for row in rows]
        if len(rows) != episode.length or (frame[rows] != np.arange(len(rows))).any() or not len(rows):
            problems["rows missing, doubled or empty against the promised length"].append(episode.index)
        for name, values, bad in (("actions", actions, bad_action), ("states", states, bad_state)):
            if bad[rows].any():
                problems[f"{name} of another size than info.json declares"].append(episode.index)
            elif values is not None:
                setattr(episode, name, values[rows])


def check_rows(recording):
    """Non-finite numbers, jumping clocks and missing instructions, added to recording.problems."""
    step = 1 / recording.info["fps"]
    for episode in recording.episodes:
        if episode.positions is None:
            continue                                                 # its file could not be read: already listed
        for name, values in (("action", episode.actions), ("state", episode.states)):
            if values is not None and not np.isfinite(values).all():
                recording.problems[f"non-finite {name}"].append(episode.index)
        # float32 seconds are exact to 6e-8 of their value; that much is no fault of the recording.
        slack = TIME_TOLERANCE + 2.4e-7 * np.abs(episode.timestamps[1:])
        if not (np.abs(np.diff(episode.timestamps) - step) <= slack).all():
            recording.problems[f"timestamps not 1/fps = {step:g} s apart"].append(episode.index)
        if not all(isinstance(text, str) and text.strip() for text in episode.instructions):
            recording.problems["instruction missing"].append(episode.index)


# ------------------------------------------------------------------------------------- pixels

@dataclasses.dataclass
class FrameJob:
    """The frames to take out of one mp4 or parquet file, in the order in which they lie there."""
    path: pathlib.Path
    camera: str
    slot: int                                # which of the chosen cameras, 0-2
    numbers: np.ndarray                      # (n,) frame number in the mp4, or row number in the parquet file
    rows: np.ndarray                         # (n,) row of the whole data set
    episodes: np.ndarray                     # (n,) episode_index, for error messages


def declared_size(info, camera):
    """(H, W) of a camera as info.json declares it; sets in the wild store H, W, C or C, H, W."""
    shape, names = info["features"][camera]["shape"], info["features"][camera].get("names") or [""]
    return tuple(shape[1:3]) if str(names[0]).startswith("channel") else tuple(shape[:2])


def video_index(path):
    """Presentation times (F,) [s] of all frames of a video, ascending, and its (H, W), without decoding it."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-copyts", "-i", str(path), "-map", "0:v:0", "-c", "copy",
               "-f", "framecrc", "-"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    base, size, ticks = 1.0, None, []
    for line in text.splitlines():
        if line.startswith("#tb"):
            ticks_per, per_second = line.split()[-1].split("/")
            base = int(ticks_per) / int(per_second)                  # s per tick
        elif line.startswith("#dimensions"):
            size = tuple(int(side) for side in reversed(line.split()[-1].split("x")))
        elif line[:1].isdigit():
            ticks.append(int(line.split(",")[2]))                    # stream, dts, pts, duration, size, crc
    return np.sort(np.array(ticks)) * base, size


def plan_frames(recording):
    """FrameJobs that cover the chosen cameras; what is missing goes to recording.problems. Reads no pixel."""
    problems, jobs = recording.problems, []
    for slot, camera in enumerate(recording.cameras):
        is_video = recording.info["features"][camera]["dtype"] == "video"
        by_file, row = collections.defaultdict(list), 0
        for episode in recording.episodes:
            by_file[episode.videos[camera][0] if is_video else episode.data_file].append((episode, row))
            row += episode.length
        present = [file for file in by_file if is_video and file.is_file()]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            index = dict(zip(present, pool.map(video_index, present)))
        for file, members in by_file.items():
            members = [(episode, row) for episode, row in members if episode.positions is not None]
            if is_video and file not in index:
                problems[f"{camera}: video file missing"] += [episode.index for episode, _ in members]
                continue
            numbers = [video_frames(episode, camera, recording.info, index[file], problems) if is_video
                       else episode.positions for episode, _ in members]
            if not members:
                continue
            rows = [row + np.arange(len(found)) for (_, row), found in zip(members, numbers)]
            owner = [np.full(len(found), episode.index) for (episode, _), found in zip(members, numbers)]
            numbers, rows, owner = (np.concatenate(parts) for parts in (numbers, rows, owner))
            order = np.argsort(numbers, kind="stable")
            jobs.append(FrameJob(file, camera, slot, numbers[order], rows[order], owner[order]))
    return jobs


def video_frames(episode, camera, info, index, problems):
    """Frame numbers (T,) in the mp4 of an episode's rows: the nearest in time, as LeRobot looks them up."""
    times, size = index
    if size != declared_size(info, camera):
        problems[f"{camera}: images of another size, {size} instead of {declared_size(info, camera)}"].append(
            episode.index)
    wanted = episode.videos[camera][1] + episode.timestamps
    if not len(times) or (len(wanted) and wanted.max() > times[-1] + .5 / info["fps"]):
        problems[f"{camera}: frames missing at the end of the video"].append(episode.index)
        return np.zeros(0, int)
    after = np.clip(np.searchsorted(times, wanted), 1, max(1, len(times) - 1))
    near = np.where(wanted - times[after - 1] <= times[np.minimum(after, len(times) - 1)] - wanted, after - 1, after)
    near = np.minimum(near, len(times) - 1)
    if (np.abs(times[near] - wanted) > TIME_TOLERANCE).any():
        problems[f"{camera}: timestamps out of tolerance ({TIME_TOLERANCE} s) of the video frames"].append(
            episode.index)
    return near


def decode(job, info):
    """Yields (k, frame (H, W, 3) uint8 or None if unreadable) for job.numbers[k], k ascending."""
    if info["features"][job.camera]["dtype"] == "video":
        yield from decode_video(job, info["fps"])
        return
    wanted = dict(zip(job.numbers.tolist(), range(len(job.numbers))))
    position = 0
    for piece in pq.ParquetFile(job.path).iter_batches(batch_size=64, columns=[job.camera]):
        for cell in piece.column(0).to_pylist():
            if position in wanted:
                try:                                                 # {"bytes": encoded PNG, "path": its file}
                    data = cell["bytes"] or (job.path.parents[2] / cell["path"]).read_bytes()
                    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                except (OSError, TypeError, SyntaxError):            # PIL: a broken PNG is a SyntaxError
                    image = None
                yield wanted[position], image
            position += 1


def decode_video(job, fps):
    """decode() for a video. ffmpeg seeks to just before the first wanted frame and decodes from there."""
    first, done = int(job.numbers[0]), 0
    seek = ["-ss", f"{video_index(job.path)[0][first] - .5 / fps:.6f}"] if first else []
    reader = imageio_ffmpeg.read_frames(
        str(job.path), pix_fmt="rgb24",
        # -xerror: stop at a broken packet, which would shift all later frames by one without a word
        input_params=seek + ["-xerror"],
        # passthrough: every stored frame exactly once; the default repeats and drops frames to keep the rate
        output_params=["-fps_mode", "passthrough"])
    try:
        width, height = next(reader)["size"]
        for number, data in enumerate(reader, first):
            while done < len(job.numbers) and job.numbers[done] == number:
                yield done, np.frombuffer(data, np.uint8).reshape(height, width, 3)
                done += 1
            if done == len(job.numbers):
                break
    except (OSError, RuntimeError, StopIteration):
        pass                                                         # reported below as unreadable frames
    finally:
        reader.close()
    for k in range(done, len(job.numbers)):
        yield k, None


def resize(image, size, fit):
    """(h, w, 3) -> (size, size, 3) uint8. `stretch`: PIL bicubic, aspect ratio not kept (OpenVLA). `pad`: PIL
    bilinear, aspect ratio kept, centred on black (openpi). Both are the official pixels exactly; size None or
    equal: unchanged."""
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


def content_key(recording, image_size, fit):
    """Hash of everything that decides the cached pixels: files, which frames of them, cameras, size, fit."""
    digest = hashlib.sha256(repr((CACHE_FORMAT, recording.cameras, image_size, fit)).encode())
    files = {}
    for episode in recording.episodes:
        digest.update(f"{episode.index} {episode.length} {episode.videos and [v[1] for v in episode.videos.values()]}"
                      .encode() + episode.timestamps.tobytes() + episode.positions.tobytes())
        sources = [video for video, _ in episode.videos.values()]
        if len(sources) < len(recording.cameras):
            sources.append(episode.data_file)                        # some camera's images are in the parquet file
        files.update(dict.fromkeys(sources))                         # in order, each once
    for file in files:
        with open(file, "rb") as stream:                             # about 1 GB/s
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:24]


def cache_frames(recording, image_size, fit, cache_dir):
    """Path of the .npy with all frames, (N, C, H, W, 3) uint8; decodes them first if it does not exist.

    Processes that want the same file wait for the one that builds it. The kernel drops the lock of a killed
    process, and the file gets its name only when complete, so nobody ever sees half a file.
    """
    from filelock import FileLock                                    # comes with huggingface_hub
    if recording.problems:                                           # list the faults of the videos as well
        plan_frames(recording)
        recording.problems.stop(recording.folder)
    sizes = {declared_size(recording.info, camera) for camera in recording.cameras}
    if image_size is None and len(sizes) > 1:
        raise ValueError(f"cameras {recording.cameras} have sizes {sorted(sizes)}; need an image_size for all")
    height, width = (image_size, image_size) if image_size else sizes.pop()
    frames = sum(episode.length for episode in recording.episodes)
    shape = (frames, len(recording.cameras), height, width, 3)
    cache_dir = pathlib.Path(cache_dir or pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "sim_real_frames")
    cache_dir = cache_dir.expanduser()
    missing = [file for episode in recording.episodes for file, _ in episode.videos.values() if not file.is_file()]
    path = None if missing else cache_dir / f"{content_key(recording, image_size, fit)}.npy"
    if path is not None and path.exists():
        return path
    jobs = plan_frames(recording)
    recording.problems.stop(recording.folder)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            return path                                              # another process was faster
        for left_over in cache_dir.glob(f"{path.stem}.*.part"):      # of a killed process: we hold the lock
            left_over.unlink()
        free = shutil.disk_usage(cache_dir).free
        if free < np.prod(shape, dtype=np.int64):
            raise ValueError(f"{cache_dir}: {np.prod(shape, dtype=np.int64) / 1e9:.1f} GB needed for the decoded "
                             f"frames, {free / 1e9:.1f} GB free; choose another --cache-dir or a smaller image_size")
        partial = cache_dir / f"{path.stem}.{os.getpid()}.part"
        try:
            fill_cache(partial, shape, jobs, recording, image_size, fit)
            recording.problems.stop(recording.folder)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def fill_cache(path, shape, jobs, recording, image_size, fit):
    """Decodes all jobs into one .npy file. Written with pwrite, not through a map: a full disk is then an error
    message instead of a bus error, and no written page counts as this process's memory."""
    frame_bytes = int(np.prod(shape[2:]))
    with open(path, "wb") as file, tqdm(total=shape[0] * shape[1], unit="frame", desc="decoding once") as bar:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
        start = file.tell()
        file.truncate(start + shape[0] * shape[1] * frame_bytes)
        file.flush()

        def work(job):
            size = declared_size(recording.info, job.camera)
            for k, image in decode(job, recording.info):
                if image is None or image.shape[:2] != size:
                    what = "frames that cannot be decoded" if image is None else \
                        f"images of another size, {image.shape[:2]} instead of {size}"
                    recording.problems[f"{job.camera}: {what}"].append(int(job.episodes[k]))
                    continue
                pixels = np.ascontiguousarray(resize(image, image_size, fit))
                os.pwrite(file.fileno(), pixels, start + (int(job.rows[k]) * shape[1] + job.slot) * frame_bytes)
                bar.update()

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(work, jobs))       # PIL and ffmpeg run outside the interpreter lock; list() raises errors


# ------------------------------------------------------------------------------------- the data set that trains

class Demos:
    """Demonstrations as training samples: one per frame, with the next `horizon` actions.

    len(demos) frames; demos.episodes (E,) LeRobot episode numbers; demos.actions (N, A), demos.states (N, S) float32
    of its frames in order; demos.batch(indices) gives samples; select and split give views that share the pixels.
    """

    REMAP_BYTES = 512 * 2**20                # touched pages count as this process's memory until the map is renewed

    def __init__(self, recording, frames_path, horizon):
        parts = recording.episodes
        self.folder, self.info, self.cameras = recording.folder, recording.info, recording.cameras
        self.horizon, self.frames_path, self.touched = horizon, frames_path, 0
        self.frames = np.load(frames_path, mmap_mode="r")            # (N, C, H, W, 3), stays on disk
        self.all_actions = np.concatenate([part.actions for part in parts])
        self.all_states = np.concatenate([part.states for part in parts])
        self.all_instructions = np.concatenate([np.array(part.instructions, object) for part in parts])
        self.all_episodes = np.array([part.index for part in parts])
        self.stops = np.cumsum([part.length for part in parts])      # (E,) row after the last of each episode
        self.starts = self.stops - [part.length for part in parts]
        self.use(np.arange(len(parts)))

    def use(self, order):
        self.episodes = self.all_episodes[order]
        self.rows = np.concatenate([np.arange(self.starts[e], self.stops[e]) for e in order])   # (N,)
        self.row_stop = np.repeat(self.stops[order], (self.stops - self.starts)[order])         # (N,)

    def __len__(self):
        return len(self.rows)

    @property
    def actions(self):
        return self.all_actions[self.rows]

    @property
    def states(self):
        return self.all_states[self.rows]

    @property
    def instructions(self):
        return list(self.all_instructions[self.rows])

    def select(self, episodes):
        """Only these episode numbers, in this order."""
        unknown = sorted(set(episodes) - set(self.episodes.tolist()))
        if unknown or not len(episodes):
            raise ValueError(f"{self.folder}: cannot select episodes {list(episodes)}: need at least one of "
                             f"{ranges(self.episodes.tolist())}; unknown: {unknown}")
        view, place = copy.copy(self), {number: e for e, number in enumerate(self.all_episodes.tolist())}
        view.use(np.array([place[number] for number in episodes]))
        return view

    def split(self, held_out, seed=0):
        """-> (train, held-out) with a fraction of whole episodes held out, at least one. 0: (self, None)."""
        if not 0 <= held_out < 1 or (held_out and len(self.episodes) < 2):
            raise ValueError(f"held_out {held_out} of {len(self.episodes)} episode(s): need a fraction in [0, 1) and, "
                             "if it is not 0, two episodes or more")
        if held_out == 0:
            return self, None
        count = min(max(1, round(held_out * len(self.episodes))), len(self.episodes) - 1)
        order = np.random.default_rng(seed).permutation(self.episodes).tolist()
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))

    def batch(self, indices):
        """Samples `indices` (B,) of range(len(self)) as a dict:

        images (B, H, W, 3) uint8, or (B, C, H, W, 3) for several cameras; instructions, B strings;
        actions (B, K, A) float32; pad (B, K) bool, True past the end of the episode, where the last action is
        repeated; state (B, S) float32.
        """
        rows = self.rows[np.asarray(indices)]                        # (B,)
        window = rows[:, None] + np.arange(self.horizon)             # (B, K)
        stop = self.row_stop[np.asarray(indices)][:, None]           # (B, 1)
        images = np.array(self.frames[rows])                         # (B, C, H, W, 3), copied out of the map
        self.touched += images.nbytes
        if self.touched > self.REMAP_BYTES:
            self.frames, self.touched = np.load(self.frames_path, mmap_mode="r"), 0
        return dict(images=images[:, 0] if len(self.cameras) == 1 else images,
                    instructions=self.all_instructions[rows].tolist(),
                    actions=self.all_actions[np.minimum(window, stop - 1)], pad=window >= stop,
                    state=self.all_states[rows])


def open_dataset(path, image_size=None, horizon=1, cameras=None, fit="stretch", action_dim=ACTION_DIM, action_key=None,
                 state_key=None, task_key=None, cache_dir=None):
    """Opens a LeRobot data set (v2.x, v3.0; video or PNG features) for training.

    path        a folder, or a hub id `owner/name`
    image_size  side S of the square frames the policy sees, pixels; None: as stored
    horizon     actions per sample, K
    cameras     an image feature, its last part (`front`), or up to three; None: the first that is not on the wrist
    fit         how a frame becomes S x S: `stretch` (OpenVLA) or `pad` (pi0.5), see resize
    action_dim  what the policy expects; None: anything
    *_key       feature names where they are not the usual ones; task_key: a column with the instruction itself
    cache_dir   folder of the decoded frames; None: ~/.cache/sim_real_frames
    Returns Demos. Raises ValueError that lists everything wrong with the set.
    """
    if fit not in ("stretch", "pad") or horizon < 1 or (image_size is not None and image_size < 1):
        raise ValueError(f"fit={fit!r}, horizon={horizon}, image_size={image_size}: need stretch or pad, horizon >= 1, "
                         "image_size >= 1 or None")
    recording = read_lerobot(path, cameras, action_key, state_key, task_key)
    check_action_size(recording, action_dim)
    return Demos(recording, cache_frames(recording, image_size, fit, cache_dir), horizon)


def check_action_size(recording, action_dim):
    shape = recording.info["features"][recording.action_key]["shape"]
    if action_dim is not None and list(shape) != [action_dim]:
        recording.problems[f"{recording.action_key} of size {shape}, the policy needs [{action_dim}] "
                           f"({' '.join(ACTION_NAMES)})"] = []


# ------------------------------------------------------------------------------------- normalisation statistics

def statistics(values):
    """Exact statistics (no histogram) of values (N, D) over the whole set: {name: (D,) float64}."""
    values = np.asarray(values, np.float64)
    quantiles = np.quantile(values, [.01, .10, .50, .90, .99], axis=0)
    return dict(min=values.min(0), max=values.max(0), mean=values.mean(0), std=values.std(0),
                **dict(zip(("q01", "q10", "q50", "q90", "q99"), quantiles)))


def action_statistics(actions, min_range=MIN_RANGE):
    """statistics() of actions (N, 7) that are safe to divide by q99 - q01.

    A dimension that (nearly) never moves would blow noise up to [-1, 1]: its range is widened about its middle to
    min_range [m or rad; 0 = leave it], the gripper's to its physical [-1, 1], with a warning that names it.
    """
    stats = statistics(actions)
    names = ACTION_NAMES if len(stats["q01"]) == ACTION_DIM else [f"action[{d}]" for d in range(len(stats["q01"]))]
    for d, name in enumerate(names):
        low, high = stats["q01"][d], stats["q99"][d]
        if high - low >= min_range:
            continue
        middle = (low + high) / 2
        wide = (-1.0, 1.0) if name == "gripper" else (middle - min_range / 2, middle + min_range / 2)
        stats["q01"][d], stats["q99"][d] = wide
        warnings.warn(f"{name}: q01 {low:.3g} and q99 {high:.3g} are less than {min_range:g} apart; the range used is "
                      f"[{wide[0]:.3g}, {wide[1]:.3g}]. Is this dimension used in these demonstrations?", stacklevel=2)
    return stats


def pooled(demos):
    """One or several Demos -> actions (N, A), states (N, S), number of episodes. One set of statistics serves both
    domains, as one policy does (RL-Co keeps a single norm_stats.json)."""
    demos = [demos] if isinstance(demos, Demos) else list(demos)
    return (np.concatenate([part.actions for part in demos]), np.concatenate([part.states for part in demos]),
            sum(len(part.episodes) for part in demos))


def openvla_statistics(demos, name):
    """`norm_stats` of an OpenVLA config.json and content of dataset_statistics.json, JSON-ready. The gripper is not
    normalised (mask False): it is already in [-1, 1]."""
    actions, states, episodes = pooled(demos)
    keep = ("mean", "std", "max", "min", "q01", "q99")
    action, state = action_statistics(actions), statistics(states)
    return {name: dict(action={key: action[key].tolist() for key in keep}
                       | dict(mask=[True] * (actions.shape[1] - 1) + [False]),
                       proprio={key: state[key].tolist() for key in keep},
                       num_transitions=len(actions), num_trajectories=episodes)}


def openpi_statistics(demos):
    """Content of openpi's norm_stats.json, JSON-ready."""
    actions, states, _ = pooled(demos)
    keep = ("mean", "std", "q01", "q99")
    action, state = action_statistics(actions), statistics(states)
    return dict(norm_stats=dict(state={key: state[key].tolist() for key in keep},
                                actions={key: action[key].tolist() for key in keep}))


# ------------------------------------------------------------------------------------- the alpha sampler

class MixSampler:
    """Endless batches in which each sample is simulated with probability exactly alpha, else real.

    sim, real   Demos, or functions of no arguments that open them. alpha = 0 never opens sim, alpha = 1 never real.
    batch       samples per step over all ranks; rank r gets samples r, r + world, ... of one global stream, so that
                neither alpha nor the stream depends on the number of ranks.
    Within a set, samples come in a fresh random order each time it has been gone through. next() gives what
    Demos.batch gives, and sim (B,) bool. state_dict() is the position; it can be resumed with another `world`.
    """

    def __init__(self, sim, real, alpha, batch, seed=0, rank=0, world=1):
        if not 0 <= alpha <= 1 or not 0 <= rank < world or batch < world:
            raise ValueError(f"alpha={alpha}, batch={batch}, rank={rank}, world={world}: need alpha in [0, 1], "
                             "0 <= rank < world, and a sample or more for each rank")
        self.alpha, self.batch, self.seed, self.rank, self.world = alpha, batch, seed, rank, world
        wanted = (real if alpha < 1 else None, sim if alpha > 0 else None)       # index 1 is the simulated one
        self.sets = [source() if callable(source) else source for source in wanted]
        if (alpha < 1 and self.sets[0] is None) or (alpha > 0 and self.sets[1] is None):
            raise ValueError(f"alpha={alpha} needs {'both sets' if 0 < alpha < 1 else 'the set it draws from'}")
        shapes = {(part.frames.shape[1:], part.horizon, part.all_actions.shape[1], part.all_states.shape[1])
                  for part in self.sets if part is not None}
        if len(shapes) > 1:
            raise ValueError("sim and real sets differ in (cameras, H, W, 3), horizon, action or state size: "
                             f"{sorted(shapes)}; open both with the same arguments")
        self.step, self.drawn = 0, [0, 0]                            # drawn so far from real, sim, all ranks together
        self.orders = [(-1, None), (-1, None)]                       # (pass, permutation) of real, sim

    def __iter__(self):
        return self

    def pick(self, which, count):
        """The next `count` sample numbers of one set: a new permutation for every pass over it."""
        out, size = np.empty(count, int), len(self.sets[which])
        for i in range(count):
            turn, place = divmod(self.drawn[which] + i, size)
            if self.orders[which][0] != turn:
                self.orders[which] = turn, np.random.default_rng([self.seed, which, turn]).permutation(size)
            out[i] = self.orders[which][1][place]
        self.drawn[which] += count
        return out

    def __next__(self):
        coins = np.random.default_rng([self.seed, 2, self.step]).random(self.batch) < self.alpha    # True: simulated
        numbers = np.empty(self.batch, int)
        for which in (0, 1):
            numbers[coins == which] = self.pick(which, int((coins == which).sum()))
        self.step += 1
        coins, numbers = coins[self.rank::self.world], numbers[self.rank::self.world]
        parts = [self.sets[which].batch(numbers[coins == which]) for which in (0, 1) if (coins == which).any()]
        order = np.argsort(np.argsort(coins, kind="stable"), kind="stable")      # from [real, sim] back to the stream
        out = {key: np.concatenate([part[key] for part in parts])[order]
               for key in ("images", "actions", "pad", "state")}
        texts = [text for part in parts for text in part["instructions"]]
        return out | dict(instructions=[texts[i] for i in order], sim=coins)

    def identity(self):
        return dict(alpha=self.alpha, batch=self.batch, seed=self.seed,
                    sizes=[0 if part is None else len(part) for part in self.sets])

    def state_dict(self):
        return dict(self.identity(), step=self.step, drawn=list(self.drawn))

    def load_state_dict(self, state):
        wrong = [f"{key}: saved {state[key]}, now {now}" for key, now in self.identity().items() if state[key] != now]
        if wrong:
            raise ValueError("cannot resume another stream of samples; " + "; ".join(wrong))
        self.step, self.drawn = state["step"], list(state["drawn"])


# ------------------------------------------------------------------------------------- writing LeRobot v3.0

class DatasetWriter:
    """Writes a LeRobot v3.0 data set with one h264 camera. Everything goes to a temporary folder beside `folder`,
    which gets its name when the `with` block ends without an error, and is removed otherwise.

        with DatasetWriter("demos/real", fps=5) as writer:
            writer.add_episode(images, states, actions, "open the drawer")

    data_mb, video_mb: a new file begins once the current one has reached this size [MB]; the two are independent.
    """

    def __init__(self, folder, fps, camera="observation.images.front", robot_type="panda", data_mb=100, video_mb=200):
        self.folder = pathlib.Path(folder).expanduser()
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"{self.folder}: exists already; remove it or choose another folder")
        self.fps, self.camera, self.robot_type = fps, camera, robot_type
        self.limits = dict(data=data_mb * 2**20, video=video_mb * 2**20)
        self.files = dict(data=0, video=0)                           # running number of the current file
        self.paths = dict(data=f"data/{CHUNK_PATH}.parquet", video=f"videos/{camera}/{CHUNK_PATH}.mp4")
        self.table = self.video = None                               # the open parquet file and the open ffmpeg
        self.rows, self.video_frames = 0, 0                          # in the whole set; in the current mp4
        self.episodes, self.tasks, self.states, self.actions, self.pixels = [], {}, [], [], []

    def __enter__(self):
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        return self

    def add_episode(self, images, states, actions, instruction, scene=None):
        """images (T, H, W, 3) uint8; states (T, S), actions (T, A); scene: its episode number in the simulator."""
        images, states, actions = np.asarray(images), np.asarray(states, np.float32), np.asarray(actions, np.float32)
        wrong, length = Problems(), len(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not length or \
                images.shape[1] % 2 or images.shape[2] % 2:          # yuv420p halves the colour resolution
            wrong[f"images {images.dtype} {images.shape}, need uint8 (T >= 1, H, W, 3) with even H and W"]
        if self.episodes and images.shape[1:] != self.size + (3,):
            wrong[f"images of another size, {images.shape[1:3]} after {self.size}"]
        for name, values, kept in (("states", states, self.states), ("actions", actions, self.actions)):
            if values.ndim != 2 or len(values) != length or (kept and values.shape[1] != kept[0].shape[1]):
                wrong[f"{name} {values.shape}, need ({length}, {kept[0].shape[1] if kept else 'D'})"]
            elif not np.isfinite(values).all():
                wrong[f"non-finite {name}"]
        if not isinstance(instruction, str) or not instruction.strip():
            wrong[f"instruction missing: {instruction!r}"]
        wrong.stop(f"{self.folder}, episode {len(self.episodes)}")
        self.size = images.shape[1:3]
        row = dict(episode_index=len(self.episodes), tasks=[instruction], length=length, scene=scene)
        task = self.tasks.setdefault(instruction, len(self.tasks))
        self.write_rows(row, states, actions, task)
        self.write_video(row, images)
        self.episodes.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self.states.append(states)
        self.actions.append(actions)
        scaled = images.reshape(-1, 3) / 255.
        self.pixels.append(np.stack([scaled.min(0), scaled.max(0), scaled.mean(0), (scaled ** 2).mean(0)]) )

    def place(self, kind):
        return dict(zip(("chunk_index", "file_index"), divmod(self.files[kind], CHUNK_FILES)))

    def path(self, kind):
        path = self.temporary / self.paths[kind].format(**self.place(kind))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_rows(self, row, states, actions, task):
        """One row group of the current data file."""
        length, number = len(actions), len(self.episodes)
        columns = {"observation.state": list_column(states), "action": list_column(actions),
                   "timestamp": pa.array((np.arange(length) / self.fps).astype(np.float32)),
                   "frame_index": pa.array(np.arange(length)), "episode_index": pa.array(np.full(length, number)),
                   "index": pa.array(self.rows + np.arange(length)), "task_index": pa.array(np.full(length, task))}
        table = pa.table(columns)
        self.table = self.table or pq.ParquetWriter(self.path("data"), table.schema)
        self.table.write_table(table)
        row.update({f"data/{key}": value for key, value in self.place("data").items()})
        row.update(dataset_from_index=self.rows, dataset_to_index=self.rows + length)
        self.rows += length
        if self.path("data").stat().st_size >= self.limits["data"]:
            self.end_file("data")

    def write_video(self, row, images):
        """Appends frames to the current mp4: h264, a key frame every 2 frames so that any frame is quick to reach."""
        if self.video is None:
            self.video = imageio_ffmpeg.write_frames(
                str(self.path("video")), self.size[::-1], fps=self.fps, codec="libx264", quality=None, macro_block_size=1,
                pix_fmt_out="yuv420p", output_params=["-g", "2", "-crf", str(VIDEO_CRF), "-threads", "1"])
            self.video.send(None)
        for image in images:
            self.video.send(np.ascontiguousarray(image))
        key = f"videos/{self.camera}/"
        row.update({key + name: value for name, value in self.place("video").items()})
        row[key + "from_timestamp"] = self.video_frames / self.fps
        self.video_frames += len(images)
        row[key + "to_timestamp"] = self.video_frames / self.fps
        if self.path("video").stat().st_size >= self.limits["video"]:
            self.end_file("video")

    def end_file(self, kind):
        if kind == "data" and self.table:
            self.table, _ = None, self.table.close()
        if kind == "video" and self.video:
            self.video, _ = None, self.video.close()
            self.video_frames = 0
        self.files[kind] += 1

    def __exit__(self, error, *_):
        try:
            self.end_file("data")
            self.end_file("video")
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
        # LeRobot reads this file with pandas and wants the texts as its index; this metadata is what tells pandas.
        column = dict(name="task", field_name="task", pandas_type="unicode", numpy_type="object", metadata=None)
        pandas = dict(index_columns=["task"], column_indexes=[], pandas_version="2.2.0",
                      columns=[column | dict(name="task_index", field_name="task_index", pandas_type="int64",
                                             numpy_type="int64"), column])
        table = pa.table(dict(task_index=pa.array(list(self.tasks.values())), task=pa.array(list(self.tasks))))
        pq.write_table(table.replace_schema_metadata(dict(pandas=json.dumps(pandas))), meta / "tasks.parquet")
        states, actions = np.concatenate(self.states), np.concatenate(self.actions)
        stats = {"observation.state": statistics(states), "action": statistics(actions)}
        weights = [row["length"] for row in self.episodes]
        low, high, mean, square = np.stack(self.pixels, 1)           # each (E, 3), in [0, 1]
        mean, square = np.average(mean, 0, weights), np.average(square, 0, weights)
        stats[self.camera] = dict(min=low.min(0), max=high.max(0), mean=mean, std=np.sqrt(np.maximum(0, square - mean**2)))
        stats[self.camera] = {name: value.reshape(3, 1, 1) for name, value in stats[self.camera].items()}
        stats = {key: {name: value.tolist() for name, value in part.items()} | dict(count=[self.rows])
                 for key, part in stats.items()}
        (meta / "stats.json").write_text(json.dumps(stats, indent=1))
        (meta / "info.json").write_text(json.dumps(self.info(states.shape[1], actions.shape[1]), indent=1))

    def info(self, state_dim, action_dim):
        height, width = self.size

        def named(dim, names):
            return dict(dtype="float32", shape=[dim], names=list(names) if dim == len(names) else None)
        video = {"video.fps": self.fps, "video.codec": "h264", "video.pix_fmt": "yuv420p", "video.height": height,
                 "video.width": width, "video.channels": 3, "video.is_depth_map": False, "has_audio": False}
        features = {self.camera: dict(dtype="video", shape=[height, width, 3], names=["height", "width", "channels"],
                                      info=video),
                    "observation.state": named(state_dim, STATE_NAMES), "action": named(action_dim, ACTION_NAMES),
                    "timestamp": dict(dtype="float32", shape=[1], names=None)}
        features |= {key: dict(dtype="int64", shape=[1], names=None)
                     for key in ("frame_index", "episode_index", "index", "task_index")}
        return dict(codebase_version="v3.0", robot_type=self.robot_type, total_episodes=len(self.episodes),
                    total_frames=self.rows, total_tasks=len(self.tasks), chunks_size=CHUNK_FILES,
                    data_files_size_in_mb=self.limits["data"] // 2**20, fps=self.fps,
                    video_files_size_in_mb=self.limits["video"] // 2**20, splits=dict(train=f"0:{len(self.episodes)}"),
                    data_path=self.paths["data"],
                    video_path=self.paths["video"].replace(self.camera, "{video_key}"), features=features)


def list_column(values):
    """(T, D) float32 -> T fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


# ------------------------------------------------------------------------------------- making demonstrations

def record(pipe, worker, workers, num_envs, task, domain, seed, image_size, noise):
    """Worker w of W sends what its demonstrator did in episodes w, w + W, ... in this order, until it is stopped."""
    import envs
    env = envs.VecEnv(task, domain, num_envs, seed, image_size=image_size, first_episode=worker, episode_stride=workers)
    # The real robot's demonstrations come from an imperfect person, the simulated ones from a script (RL-Co, 4.1).
    expert = envs.Expert(env, style="teleop" if domain == "real" else "expert", noise=noise)
    obs, due, finished = env.reset(), worker, {}
    steps = [[] for _ in range(num_envs)]
    while True:
        executed, label = expert.act()                               # (N, 7) each; only the label is recorded
        for i in range(num_envs):
            steps[i].append((obs["images"][i].copy(), obs["state"][i].copy(), label[i].copy()))
        texts = obs["instructions"]
        obs, _, terminated, truncated, info = env.step(executed[:, None])
        for i in np.flatnonzero(terminated | truncated):
            images, states, actions = (np.stack(part) for part in zip(*steps[i]))
            finished[int(info["episode"][i])] = (bool(info["success"][i]), images, states, actions, texts[i])
            steps[i] = []
        while due in finished:
            pipe.send(finished.pop(due))                             # waits while the writer is busy
            due += workers


def make_demos(task, domain, episodes, out, seed=0, workers=0, image_size=64, noise=.005):
    """Records `episodes` successful demonstrations per task in envs.py and writes them as LeRobot v3.0.

    task, domain   as in envs.VecEnv; task "all": each of the four, `episodes` of each
    workers        processes; 0: one per core. The data do not depend on it: it is always the first successes in the
                   order of the episode numbers of `seed`.
    noise          m, of the actions executed by the expert (labels stay clean); `real` has its tele-operator instead
    Returns {task: success rate of the demonstrator}.
    """
    import envs
    workers = min(workers or os.cpu_count(), episodes)
    context = multiprocessing.get_context("spawn")                   # OpenGL contexts do not survive a fork
    rates = {}
    with DatasetWriter(out, fps=5) as writer:
        for name in envs.TASKS if task == "all" else [task]:
            pipes, processes = [], []
            for worker in range(workers):
                receiver, sender = context.Pipe(duplex=False)
                processes.append(context.Process(target=record, daemon=True, args=(
                    sender, worker, workers, min(8, -(-episodes // workers)), name, domain, seed, image_size,
                    0. if domain == "real" else noise)))
                processes[-1].start()
                sender.close()                                       # so that a dead worker ends the pipe
                pipes.append(receiver)
            try:
                rates[name] = write_successes(writer, pipes, episodes, f"{name} ({domain})")
            finally:
                for process in processes:
                    process.kill()
    return rates


def write_successes(writer, pipes, episodes, label):
    """Takes episodes in the order of their numbers until enough of them succeeded. Returns the success rate."""
    successes, limit = 0, 20 + 10 * episodes
    with tqdm(total=episodes, desc=label, unit="episode") as bar:
        for number in range(limit):
            try:
                success, images, states, actions, text = pipes[number % len(pipes)].recv()
            except EOFError:
                raise RuntimeError(f"{label}: a recording process died; its own message stands above") from None
            if success:
                writer.add_episode(images, states, actions, text, scene=number)
                successes += 1
                bar.update()
            if successes == episodes:
                return successes / (number + 1)
    raise ValueError(f"{label}: only {successes} of {limit} demonstrations succeeded, need {episodes}; nothing was written")


# ------------------------------------------------------------------------------------- data set card

def contact_sheet(recording, path, side=6):
    """PNG of up to side x side frames of the first camera: one row an episode, time runs to the right."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    chosen = [recording.episodes[e] for e in np.unique(np.linspace(0, len(recording.episodes) - 1, side).astype(int))]
    part = dataclasses.replace(recording, episodes=chosen, cameras=recording.cameras[:1])
    wanted, row = {}, 0
    for e, episode in enumerate(chosen):
        wanted |= {row + t: (e, c) for c, t in enumerate(np.linspace(0, episode.length - 1, side).astype(int))}
        row += episode.length
    figure, axes = pyplot.subplots(len(chosen), side, figsize=(2 * side, 2.1 * len(chosen)), squeeze=False)
    for job in plan_frames(part):
        keep = np.isin(job.rows, list(wanted))
        job.numbers, job.rows = job.numbers[keep], job.rows[keep]
        for k, image in decode(job, part.info):
            axes[wanted[job.rows[k]]].imshow(image)
    for ax in axes.flat:
        ax.axis("off")
    for episode, ax in zip(chosen, axes[:, 0]):
        ax.set_title(f"{episode.index}: {episode.instructions[0]}", fontsize=8, loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def card(recording, sheet):
    """Prints what a data set holds and writes the contact sheet. Raises ValueError that lists what is wrong with it."""
    info, parts = recording.info, recording.episodes
    lengths = [part.length for part in parts]
    print(f"{recording.folder}: LeRobot {info['codebase_version']}, robot {info.get('robot_type')}, {info['fps']} fps\n"
          f"{len(parts)} episodes, {sum(lengths)} frames = {sum(lengths) / info['fps'] / 60:.1f} minutes; "
          f"episode length {min(lengths)}-{max(lengths)}, mean {np.mean(lengths):.1f} frames")
    for name, feature in info["features"].items():
        if feature["dtype"] in ("image", "video"):
            codec = (feature.get("info") or {}).get("video.codec", "png")
            print(f"camera  {name}: {declared_size(info, name)} {feature['dtype']} {codec}"
                  + (" (used)" if name in recording.cameras else ""))
    plan_frames(recording)                                           # are all videos and frames there?
    recording.problems.stop(recording.folder)
    for text, count in collections.Counter(part.instructions[0] for part in parts).most_common():
        print(f"task    {count:5d} episodes  {text!r}")
    actions = np.concatenate([part.actions for part in parts])
    stats = action_statistics(actions)
    print(f"\n{recording.action_key:12s}" + "".join(f"{key:>10s}" for key in ("min", "q01", "mean", "q99", "max", "std"))
          + "   outside q01..q99")
    for d in range(actions.shape[1]):
        outside = ((actions[:, d] < stats["q01"][d]) | (actions[:, d] > stats["q99"][d])).mean()
        label = ACTION_NAMES[d] if actions.shape[1] == ACTION_DIM else f"[{d}]"
        print(f"  {label:10s}" + "".join(f"{stats[key][d]:10.4f}" for key in ("min", "q01", "mean", "q99", "max", "std"))
              + f"   {outside:8.2%}")
    stored = recording.folder / "meta/stats.json"
    if stored.exists():
        stored = read_json(stored).get(recording.action_key, {})
        off = [key for key in ("min", "max", "mean", "std") if key in stored
               and not np.allclose(stored[key], stats[key], rtol=1e-3, atol=1e-5)]
        print(f"meta/stats.json {'disagrees on ' + ', '.join(off) if off else 'agrees with the data'}")
    contact_sheet(recording, sheet)
    print(f"contact sheet: {sheet}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("path", nargs="?", help="data set to describe: a LeRobot folder or a hub id owner/name")
    add("--camera", nargs="+", help="image features, or their last parts; default: the first not on the wrist")
    add("--action-key", help="name of the action feature; default: action or actions")
    add("--state-key", help="name of the state feature; default: observation.state or state")
    add("--task-key", help="text column with the instruction; default: LeRobot's task_index")
    add("--sheet", default="card.png", help="where the contact sheet goes (PNG)")
    add("--make", action="store_true", help="record demonstrations instead, into --out")
    add("--task", default="open-drawer", help="pick-place, push-cube, open-drawer, close-drawer or all")
    add("--domain", default="sim", help="sim (scripted expert) or real (stand-in; imperfect tele-operator)")
    add("--episodes", type=int, default=50, help="successful demonstrations per task, 1 or more")
    add("--out", help="folder of the new data set; must not exist yet")
    add("--seed", type=int, default=0, help="which scenes and which mistakes, 0 or more")
    add("--image-size", type=int, default=64, help="side of the square frames, even number of pixels")
    add("--noise", type=float, default=.005, help="m, disturbs the expert's actions, not its labels; 0 = none")
    add("--workers", type=int, default=0, help="processes; 0 = one per core")
    args = parser.parse_args()
    try:
        if args.make:
            if args.out is None or args.episodes < 1 or args.image_size % 2:
                raise ValueError("--make needs --out, --episodes of 1 or more and an even --image-size")
            rates = make_demos(args.task, args.domain, args.episodes, args.out, args.seed, args.workers,
                               args.image_size, args.noise)
            print("demonstrator's success rate: " + ", ".join(f"{task} {rate:.0%}" for task, rate in rates.items()))
            args.path = args.out
        if args.path is None:
            parser.error("give the path of a data set, or --make")
        card(read_lerobot(args.path, args.camera, args.action_key, args.state_key, args.task_key), args.sheet)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
