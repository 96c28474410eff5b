"""How often a policy succeeds: rates with intervals, paired comparisons, videos, figures.

    python evaluate.py --checkpoint runs/sft/policy --task open-drawer
    python evaluate.py --checkpoint runs/sft/policy runs/co/policy --task all       # the second against the first
    python evaluate.py --checkpoint pi05 --task push-cube --ablation shuffled-instruction     # does it read at all?
    python evaluate.py --curves runs/*/metrics.jsonl                                # learning curves of several runs

Domains    sim, and "stand-in": the second MuJoCo domain, which takes the place of the real robot; none is attached.
Scenes     episode k of (seed, task, domain, variant) is always the same scene; every checkpoint gets the same ones,
           which is what makes a paired comparison possible. No demonstration is recorded with this seed.
Blocks     episodes b * N .. b * N + N - 1 are block b, N = --num-envs: one batch of environments with a generator of
           its own for the noise of the policy. Blocks can be run in any order by any number of processes, the results
           are the same bit for bit (on one kind of CPU; GPU kernels may differ). Another N gives other noise.
Decoding   auto: OpenVLA samples at temperature 0.6, as RL4VLA and RLinf evaluate: by its likeliest tokens a policy can
           stand still or push at one place for ever, and Stage I's does (results/all-tasks/decoding.txt). pi0.5
           integrates the plain ODE, from noise. greedy: argmax, or the ODE. sampled: with the noise of RL.
Failures   "looked wrong": the tool never touched the named thing (pick-place: never held it); "moved wrong": it did.
           Touch is looked for at the ends of control steps: a short knock between two of them goes unnoticed.
Ablations  checks of the benchmark. blank-image: everything is grey. shuffled-instruction: it names another cube that
           is on the table, or another task. Whoever succeeds all the same does not look, or does not listen.
Gap        --gap dynamics: the stand-in differs from sim in that part alone. What does a part cost?
Output     OUT/result.json, success.png, videos/; curves.png
"""
import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import shlex
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import envs                             # first: it chooses the OpenGL backend before mujoco is imported
import imageio
import numpy as np
import torch
from tqdm import tqdm

import policies

EVAL_SEED = 999_983                     # of the scenes of every evaluation; demonstrations must have another
EVAL_TEMPERATURE = .6                   # of OpenVLA's tokens in evaluations
NAMES = dict(sim="sim", real="stand-in", pretrain="pretrain")
DECODING, ABLATIONS = ("auto", "greedy", "sampled"), ("none", "blank-image", "shuffled-instruction")
GREEN, RED = (0, 160, 90), (214, 60, 40)           # borders of successes and of failures

# ---- episodes ------------------------------------------------------------------------------------------------

def evaluate(policy, task, domain, episodes, variant="seen", seed=EVAL_SEED, num_envs=25, blocks=None, decoding="auto",
             frames=0, ablation="none", temperature=EVAL_TEMPERATURE, bar=None, gap=tuple(envs.PARAMETERS)):
    """Runs a policy on the scenes 0 .. episodes - 1, in this process. task, domain, variant: as in envs.VecEnv.
    blocks: those to run, of ceil(episodes / num_envs); None = all. Rank r of w takes range(r, that, w).
    frames: of each block, keep the pictures of that many successes and as many failures.    bar: a tqdm, or None.
    gap: the parts in which the stand-in differs from sim, of visual, dynamics, objects.
    Returns dicts in the order of `blocks`: episode, success, steps (control steps of 0.2 s), touched, failure (pushed
    the wrong cube), diverged, closest_m (least distance [m] of tool and named object when the policy was asked),
    instruction; and frames, a list of (H, W, 3) uint8, one a control step and the last.    Raises ValueError."""
    wrong, count = [], math.ceil(episodes / max(num_envs, 1))
    blocks = range(count) if blocks is None else list(blocks)
    policies.expect(min(episodes, num_envs) > 0, "episodes, num_envs", (episodes, num_envs), "1 or more", "100", wrong)
    policies.expect(all(0 <= block < count for block in blocks), "blocks", blocks, f"0 to {count - 1}", "None", wrong)
    policies.expect(decoding in DECODING, "decoding", repr(decoding), f"one of {DECODING}", "'auto'", wrong)
    policies.expect(set(gap) <= set(envs.PARAMETERS), "gap", gap, f"of {', '.join(envs.PARAMETERS)}", "()", wrong)
    policies.expect(ablation in ABLATIONS, "ablation", repr(ablation), f"one of {ABLATIONS}", "'none'", wrong)
    if wrong:
        raise ValueError("\n".join(wrong))
    tokens, before, records = "temperature" in policy.settings, dict(policy.settings), []
    differs = envs.Gap(**{part: part in gap for part in envs.PARAMETERS})
    env = None
    if blocks:
        env = envs.VecEnv(task, domain, min(num_envs, episodes), seed, policy.image_size, variant, gap=differs)
    if tokens:
        policy.settings["temperature"] = temperature
    try:
        for block in blocks:
            some = play(policy, env, block, episodes, decoding == "greedy" or decoding == "auto" and not tokens,
                        ablation, frames, bar)
            keep_frames(some, frames)
            records += some
    finally:
        policy.settings.update(before)
    return records

def play(policy, env, block, episodes, deterministic, ablation, frames, bar):
    """One block: each environment of env runs one episode, those that have ended wait for the others. What happens
    depends on nothing but the block: also the policy's batch, the environments still running, and so its noise."""
    env.first_episode = block * env.num_envs
    obs, own_seed = env.reset(), int(np.random.SeedSequence([env.seed, block]).generate_state(1)[0])
    noise = torch.Generator(policy.device).manual_seed(own_seed)
    told = wrong_instructions(env) if ablation == "shuffled-instruction" else obs["instructions"]
    records = [dict(episode=int(k), instruction=text, closest_m=math.inf) | ({"frames": []} if frames else {})
               for k, text in zip(env.episode, told)]
    running = np.flatnonzero(env.episode < episodes)           # the last block may be smaller
    records = [record for record in records if record["episode"] < episodes]
    for i in range(len(running), env.num_envs):
        env.drawn[i].repeats[:] = True                         # nobody looks: not rendered
    while len(running):
        images, before = obs["images"][running], env.steps.copy()
        images = np.full_like(images, 128) if ablation == "blank-image" else images
        for i, distance in zip(running, np.linalg.norm(env.tcp - env.object, axis=1)[running]):
            records[i]["closest_m"] = min(records[i]["closest_m"], float(distance))
        extra = dict(state=obs["state"][running]) if policies.reads_state(policy.settings) else {}
        chunk = policy.act(images, [told[i] for i in running], deterministic, noise, **extra).actions.cpu().numpy()
        actions = np.zeros((env.num_envs, *chunk.shape[1:]))   # (N, K, 7); who has ended stands still
        actions[running] = chunk
        obs, _, _, _, info = env.step(actions)
        if frames:                                             # between two decisions the policy is blind: so are we
            for i, image in zip(running, images):
                records[i]["frames"] += [image] * int(info["length"][i] - before[i])
        for row, i in enumerate(info["ended"]):
            env.drawn[i].repeats[:] = True                     # nobody looks: its next episode is not rendered
            if i in running:
                records[i].update(success=bool(info["success"][i]), steps=int(info["length"][i]), **{
                    name: bool(info[name][i]) for name in ("touched", "failure", "diverged")})
                if frames:
                    last = info["final_obs"]["images"][row]
                    records[i]["frames"].append(np.full_like(last, 128) if ablation == "blank-image" else last)
                tick(bar, [records[i]])
        running = np.setdiff1d(running, info["ended"])
    return records

def wrong_instructions(env):
    """For every environment the instruction for another cube that is there, or for another task: a list of N."""
    texts = []
    for i, task in enumerate(env.task):
        colour = None
        if task == "push-cube":                                # the scene knows the cubes' colours, not their names
            scene = env.scenes["push"]
            rgb = scene.field("geom_rgba")[i, scene.model.geom(f"cube{(env.named[i] + 1) % 3}").id, :3]
            colour = min(env.drawn[i].cubes, key=lambda cube: np.abs(rgb - cube[1]).sum(-1).min())[0]
        other = {"push-cube": task, "open-drawer": "close-drawer"}.get(task, "open-drawer")
        texts.append(envs.TASKS[other].instruction.format(colour=colour))
    return texts

def keep_frames(episodes, count):
    """Forget the pictures of all but the first `count` successes and `count` failures."""
    for outcome in (True, False):
        for episode in [each for each in episodes if each["success"] == outcome][count:]:
            episode.pop("frames", None)

def tick(bar, episodes):
    """Move a tqdm bar, if there is one, by the episodes that ended; it shows the success rate so far."""
    if bar is not None:
        bar.wins = getattr(bar, "wins", 0) + sum(each["success"] for each in episodes)
        bar.update(len(episodes))
        bar.set_postfix_str(f"success {bar.wins / bar.n:.0%}")

# ---- numbers -------------------------------------------------------------------------------------------------

def summary(episodes):
    """Of a list of episodes, see evaluate(): k successes of n, success = k / n, its 95 % Wilson interval low, high;
    mean control steps of all episodes, and of the successes (None if there is none); how many touched the named thing,
    pushed the wrong cube (failure), diverged; and how many of the failures looked wrong, moved wrong."""
    policies.expect(len(episodes), "summary", "no episodes", "1 or more", "another block or rank")
    won, lost = ([each for each in episodes if each["success"] == outcome] for outcome in (True, False))
    low, high = map(float, envs.wilson(len(won), len(episodes)))
    steps, won_steps = ([each["steps"] for each in some] for some in (episodes, won))
    return dict(k=len(won), n=len(episodes), success=len(won) / len(episodes), low=low, high=high,
                steps=float(np.mean(steps)), steps_success=float(np.mean(won_steps)) if won else None,
                **{name: sum(each[name] for each in episodes) for name in ("touched", "failure", "diverged")},
                looked_wrong=sum(not each["touched"] for each in lost), moved_wrong=sum(e["touched"] for e in lost))

def compare(first, second):
    """Two lists of the same scenes in the same order. Counts of scenes where both, only_first, only_second, neither
    succeeded; difference = success of second - first, with a 95 % interval; p of McNemar's exact test.
        p = min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c)),       b, c = only_first, only_second
        interval: d +- 1.96 sqrt((b + c) - (c - b)^2 / n) / n with d = (c - b) / n, after 1/2 was added to each of the
        four counts (Agresti & Min 2005, "adjusted Wald": keeps its level at small n, where Wald's does not)"""
    scenes = [[each["episode"] for each in episodes] for episodes in (first, second)]
    policies.expect(scenes[0] == scenes[1] and scenes[0], "compare", f"{len(scenes[0])} and {len(scenes[1])} episodes",
                    "the same scenes in the same order", "the same seed, number of episodes and blocks for both")
    pairs = [(x["success"], y["success"]) for x, y in zip(first, second)]
    n, b, c = len(pairs), pairs.count((True, False)), pairs.count((False, True))
    p = min(1., 2 * sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c))
    centre = (c - b) / (n + 2)
    half = 1.96 * math.sqrt(b + c + 1 - (c - b) ** 2 / (n + 2)) / (n + 2)
    return dict(n=n, both=pairs.count((True, True)), only_first=b, only_second=c, neither=pairs.count((False, False)),
                difference=(c - b) / n, low=max(centre - half, -1.), high=min(centre + half, 1.), p=p)

# ---- tables and figures --------------------------------------------------------------------------------------

def align(lines, left):
    """Lists of strings -> text in columns, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) if k < left else cell.rjust(width)
                               for k, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)

def table(rows):
    """Rows, dicts of checkpoint, task, domain, variant and a summary() -> text."""
    return align([["checkpoint", "task", "domain", "variant", "success", "95 % interval", "n", "mean steps"]] + [
        [row["checkpoint"], row["task"], NAMES.get(row["domain"], row["domain"]), row["variant"],
         f"{row['success']:.1%}", f"{row['low']:.1%} - {row['high']:.1%}", str(row["n"]), f"{row['steps']:.1f}"]
        for row in rows], 4)

def comparison_table(rows):
    """Rows, dicts of first, second, task, domain, variant and a compare() -> text. Differences in points of success."""
    counts = ("both", "only_first", "only_second", "neither")
    return align([["second", "first", "task", "domain", "variant", *(name.replace("_", " ") for name in counts),
                   "difference", "95 % interval", "p (McNemar)"]] + [
        [row["second"], row["first"], row["task"], NAMES.get(row["domain"], row["domain"]), row["variant"],
         *(str(row[name]) for name in counts), f"{100 * row['difference']:+.1f}",
         f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}", f"{row['p']:.2g}"] for row in rows], 5)

def bar_chart(rows, path):
    """Success with Wilson intervals: a panel per domain, a group per task, a colour per checkpoint (or method: any
    label in row["checkpoint"]). Rows as in table()."""
    from matplotlib.figure import Figure                       # without pyplot: needs no display, keeps no state
    rows = [dict(row, domain=NAMES.get(row["domain"], row["domain"])) for row in rows]
    domains, labels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("domain", "checkpoint"))
    groups = list(dict.fromkeys((row["task"], row["variant"]) for row in rows))
    several, width = len({variant for _, variant in groups}) > 1, .8 / len(labels)
    figure = Figure(figsize=(len(domains) * max(3.2, 1.2 * len(groups)), 3.6), layout="constrained")
    panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)
    for domain, panel in zip(domains, panels[0]):
        for k, label in enumerate(labels):
            some = [row for row in rows if (row["domain"], row["checkpoint"]) == (domain, label)]
            x = [groups.index((row["task"], row["variant"])) + (k - (len(labels) - 1) / 2) * width for row in some]
            success, low, high = (100 * np.array([row[key] for row in some]) for key in ("success", "low", "high"))
            errors = np.maximum([success - low, high - success], 0)          # rounding: -1e-17 would be an error
            panel.bar(x, success, .9 * width, yerr=errors, capsize=3, label=label, color=f"C{k}")
        panel.set(title=domain if domain != "stand-in" else "stand-in for the real robot", ylim=(0, 102))
        panel.set_xticks(range(len(groups)), [f"{task}\n{variant}" if several else task for task, variant in groups])
    panels[0, 0].set_ylabel(f"success [%], n = {', '.join(sorted({str(row['n']) for row in rows}))}, 95 % interval")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path, dpi=120)

def curves(runs, path):
    """Learning curves of Stage II as a PNG. runs: {label: rows of metrics.jsonl}. Of one run: success; reward, which
    tells of speed when success is complete; losses; size of the steps. Of several: what tells them apart, a colour a
    run. What none of them has measured gets no panel. Bars are 95 % Wilson intervals of evaluations along the way."""
    from matplotlib.figure import Figure
    if len(runs) == 1:
        panels = {"success rate": ("success", "success/", "sim/", "stand-in/"), "reward per environment": ("reward",),
                  "loss": ("real", "held_out/real", "value"), "step": ("kl", "clipped", "cosine")}
    else:
        panels = {"success on the stand-in": ("stand-in/",), "success while training, in sim": ("success",),
                  "L_SFT on held-out demonstrations": ("held_out/real",), "reward per environment": ("reward",)}
    matching = lambda rows, wanted: [key for key in dict.fromkeys(key for row in rows for key in row)
                                     if key in wanted or key[:key.find("/") + 1] in wanted]
    panels = {title: wanted for title, wanted in panels.items()
              if any(matching(rows, wanted) for rows in runs.values())} or panels
    figure = Figure(figsize=(4 * len(panels), 3.6))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, wanted) in zip(axes[0], panels.items()):
        for colour, (label, rows) in enumerate(runs.items()):
            for name in matching(rows, wanted):
                some = [row for row in rows if name in row]
                x, y = [row["step"] for row in some], np.array([row[name] for row in some])
                style = dict(label=name) if len(runs) == 1 else dict(label=label, color=f"C{colour}")
                if name.startswith(("sim/", "stand-in/")) and all("eval_episodes" in row for row in some):
                    n = np.array([row["eval_episodes"] for row in some])
                    bars = np.abs(np.array(envs.wilson(y * n, n)) - y)         # (2, evaluations)
                    axis.errorbar(x, y, bars, capsize=2, **style)
                else:
                    axis.plot(x, y, **style)
        axis.set(xlabel="iteration", title=title)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")

def framed(image, success, border=True):
    """A picture (H, W, 3) enlarged to about 256 pixels, with a border: green for a success, red for a failure."""
    scale = max(256 // len(image), 1)
    image = image.repeat(scale, 0).repeat(scale, 1)            # repeat copies
    for edge in (image[:8], image[-8:], image[:, :8], image[:, -8:]) if border else ():
        edge[:] = GREEN if success else RED
    return image

def write_videos(episodes, folder):
    """An mp4 of every episode that has frames: what the policy saw, in real time (5 control steps a second); the last
    picture stands for a second, with a border. Returns the paths."""
    paths, folder = [], pathlib.Path(folder)
    for each in [each for each in episodes if "frames" in each]:
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{each['episode']:05d}-{'success' if each['success'] else 'failure'}.mp4")
        pictures = [framed(image, each["success"], border=False) for image in each["frames"][:-1]]
        pictures += [framed(each["frames"][-1], each["success"])] * 5
        imageio.mimwrite(paths[-1], pictures, fps=5, macro_block_size=2)       # H.264 wants even sizes
    return paths

def contact_sheet(episodes, path, most=6):
    """A PNG: first, middle and last picture of the first episodes that have frames, one a row. None of them: no PNG."""
    rows = [np.concatenate([framed(each["frames"][k], each["success"]) for k in (0, len(each["frames"]) // 2, -1)], 1)
            for each in [each for each in episodes if "frames" in each][:most]]
    if rows:
        imageio.imwrite(path, np.concatenate(rows))

# ---- command line --------------------------------------------------------------------------------------------

def parse(argv=None):
    """Flags -> args, with lists of names for "all" and "both". One ValueError lists all that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", nargs="+", default=[], help="openvla, pi05 (the bundled tiny ones), folders, or hub ids")
    add("--curves", nargs="+", default=[], metavar="[LABEL=]FILE", help="draw metrics.jsonl of rl_cotrain.py instead")
    add("--task", default="open-drawer", help=f"{', '.join(envs.TASKS)}, or all")
    add("--domain", default="both", help="sim, real (the stand-in for a real robot), or both")
    add("--variants", nargs="+", default=["seen"], help=f"some of {', '.join(envs.VARIANTS)}; or all")
    add("--episodes", type=int, default=100, help="per checkpoint, task, domain and variant, >= 1")
    add("--out", default="runs/eval", help="folder for result.json, success.png and videos")
    add("--workers", type=int, default=0, help="processes; 0 = one per CPU core, on a GPU one. Changes no result")
    add("--num-envs", type=int, default=25, help="environments of a process, 1 to 4096; another number: other noise")
    add("--decoding", default="auto", help=f"{', '.join(DECODING)}; see above")
    add("--temperature", type=float, default=EVAL_TEMPERATURE, help="of OpenVLA's tokens when they are sampled, > 0")
    add("--seed", type=int, default=EVAL_SEED, help="of the scenes and of the policies' noise, 0 to 2^32")
    add("--videos", type=int, default=2, help="successes, and failures, to film of each kind of episodes; 0 = none")
    add("--ablation", default="none", help=f"{', '.join(ABLATIONS)}; see above")
    add("--gap", nargs="*", default=list(envs.PARAMETERS), help="what differs on the stand-in; default: all of it")
    add("--device", help="cpu or cuda; default: cuda if there is one")
    add("--dtype", default="float32", help="float32 or bfloat16 (autocast)")
    args, wrong = parser.parse_args(argv), []
    expect = functools.partial(policies.expect, into=wrong)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for what, got, known in (("task", [args.task], (*envs.TASKS, "all")),
                             ("domain", [args.domain], ("sim", "real", "both")),
                             ("variants", args.variants, (*envs.VARIANTS, "all")),
                             ("decoding", [args.decoding], DECODING), ("ablation", [args.ablation], ABLATIONS),
                             ("gap", args.gap, tuple(envs.PARAMETERS))):
        expect(set(got) <= set(known), f"--{what}", " ".join(got), f"of {', '.join(known)}", f"--{what} {known[-1]}")
    for what, got, low, high in (("episodes", args.episodes, 1, 10 ** 6), ("num-envs", args.num_envs, 1, 4096),
                                 ("workers", args.workers, 0, 1024), ("videos", args.videos, 0, 10 ** 6),
                                 ("seed", args.seed, 0, 1 << 32)):
        expect(low <= got <= high, f"--{what}", got, f"{low} to {high}", f"--{what} {parser.get_default(what) or low}")
    expect(0 < args.temperature < math.inf, "--temperature", args.temperature, "more than 0", "--temperature 0.6")
    expect(bool(args.checkpoint) != bool(args.curves), "--checkpoint, --curves", "both or neither", "one", "--help")
    args.curves = [text.rpartition("=")[::2] for text in args.curves]      # (label or "", file)
    for _, file in args.curves:
        expect(pathlib.Path(file).is_file(), "--curves", file, "an existing file", "OUT/metrics.jsonl of rl_cotrain.py")
    expect(len(set(args.checkpoint)) == len(args.checkpoint), "--checkpoint", args.checkpoint, "each once", "fewer")
    checks = [(policies.find_folder, (name,)) for name in args.checkpoint]
    for check, values in checks + [(policies.check_device, (args.device, args.dtype))]:
        try:
            check(*values)
        except (ValueError, RuntimeError) as error:            # RuntimeError: torch does not know such a device
            wrong.append(str(error))
    if wrong:
        raise ValueError("\n".join(wrong))
    args.tasks = list(envs.TASKS) if args.task == "all" else [args.task]
    args.domains = ["sim", "real"] if args.domain == "both" else [args.domain]
    args.variants = list(envs.VARIANTS) if "all" in args.variants else list(dict.fromkeys(args.variants))
    return args

load = functools.lru_cache(maxsize=1)(policies.load_policy)    # a process works through one checkpoint after another

def work(args, item, bar=None):
    """Episodes of one block of one kind: item = (checkpoint, domain, variant, task), block."""
    (checkpoint, domain, variant, task), block = item
    if args.device == "cpu":
        torch.set_num_threads(1)         # as many processes as cores; and another number may change the last bit
        torch.set_flush_denormal(True)   # as in training
    return evaluate(load(checkpoint, args.device, args.dtype), task, domain, args.episodes, variant, args.seed,
                    args.num_envs, [block], args.decoding, args.videos, args.ablation, args.temperature, bar,
                    args.gap)

def run(args):
    """{(checkpoint, domain, variant, task): episodes}, in order, by as many processes as args say."""
    cells = list(itertools.product(args.checkpoint, args.domains, args.variants, args.tasks))
    items = list(itertools.product(cells, range(math.ceil(args.episodes / args.num_envs))))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(args.workers or (1 if args.device != "cpu" else cores), len(items))
    results = {cell: [] for cell in cells}
    with tqdm(total=len(cells) * args.episodes, unit="episode") as bar:
        if workers == 1:
            pool, parts = None, (work(args, item, bar) for item in items)
        else:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)      # inherited: Ctrl-C is for this process alone
            parts = pool.map(functools.partial(work, args), items)
            signal.signal(signal.SIGINT, before)
        try:
            for (cell, _), episodes in zip(items, parts):
                results[cell] += episodes
                keep_frames(results[cell], args.videos)
                tick(bar if pool else None, episodes)
        except BaseException:                                  # also Ctrl-C: do not wait for the blocks under way
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
    return results

def tabulate(args, results):
    """Results of run() -> rows of table(), without and with averages over tasks, and rows of comparison_table()."""
    row = lambda key, episodes: dict(zip(("checkpoint", "domain", "variant", "task"), key),
                                     **summary(episodes)) | dict(domain=NAMES[key[1]])
    cells, rows, comparisons = [row(*item) for item in results.items()], [], []
    for group in itertools.product(args.checkpoint, args.domains, args.variants):
        some = {key: episodes for key, episodes in results.items() if key[:3] == group}
        rows += [row(*item) for item in some.items()]
        if len(some) > 1:                                      # all have the same n: the mean of the rates
            rows.append(row((*group, "average"), sum(some.values(), [])))
    first = args.checkpoint[0]
    for second, domain in itertools.product(args.checkpoint[1:], args.domains):
        kinds = [key[1:] for key in results if key[:2] == (first, domain)]
        pairs = {kind: [results[name, *kind] for name in (first, second)] for kind in kinds}
        if len(kinds) > 1:                                     # sim and stand-in are never thrown together
            pairs[domain, "all", "all"] = [sum((pair[k] for pair in pairs.values()), []) for k in (0, 1)]
        comparisons += [dict(first=first, second=second, task=task, domain=NAMES[domain], variant=variant,
                             **compare(*pair)) for (_, variant, task), pair in pairs.items()]
    return cells, rows, comparisons

def write(args, argv, results):
    """Prints the tables; writes videos, figure and, last and at once, result.json."""
    cells, rows, comparisons = tabulate(args, results)
    print(f"{args.episodes} scenes each, seed {args.seed}; decoding {args.decoding}, ablation {args.ablation}, gap: "
          f"{' '.join(args.gap) or 'none'}\n"
          f"stand-in: the second MuJoCo domain, in place of the real robot; none is attached\n\n{table(rows)}")
    if comparisons:
        print(f"\nPaired, on the same scenes; second - first, in points\n\n{comparison_table(comparisons)}")
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for cell, episodes in zip(cells, results.values()):
        name = "_".join(pathlib.Path(cell["checkpoint"]).parts).strip("/_.")
        folder = out / "videos" / name / "-".join(cell[key] for key in ("task", "domain", "variant"))
        cell["videos"] = [str(path.relative_to(out)) for path in write_videos(episodes, folder)]
        contact_sheet(episodes, folder / "contact-sheet.png")
        cell["episodes"] = [{key: value for key, value in each.items() if key != "frames"} for each in episodes]
    bar_chart(cells, out / "success.png")
    result = dict(command=shlex.join(["python", "evaluate.py", *argv]), seed=args.seed, decoding=args.decoding,
                  temperature=args.temperature, ablation=args.ablation, gap=args.gap, num_envs=args.num_envs,
                  device=args.device, dtype=args.dtype, torch=torch.__version__,
                  averages=[row for row in rows if row["task"] == "average"], comparisons=comparisons, cells=cells)
    (out / "result.json.part").write_text(json.dumps(result, indent=1))
    os.replace(out / "result.json.part", out / "result.json")
    print(f"\nwrote {out}/result.json, success.png{', videos' * (args.videos > 0)}")

def draw_curves(args):
    """OUT/curves.png from files of metrics; a run without a label is called as its folder, or as a file renamed."""
    runs = {}
    for label, file in args.curves:
        path = pathlib.Path(file)
        label = label or (path.resolve().parent.name if path.name == "metrics.jsonl" else path.stem)
        try:
            runs[label] = [json.loads(line) for line in path.read_text().splitlines()]
        except json.JSONDecodeError as error:
            policies.expect(False, path, error, "a JSON object a line", "metrics.jsonl of a run that is not running")
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    curves(runs, pathlib.Path(args.out, "curves.png"))
    print(f"wrote {args.out}/curves.png: {', '.join(runs)}")

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end the workers, too
    try:
        args = parse(argv)
        if args.curves:
            draw_curves(args)
        else:
            write(args, argv, run(args))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit("error: a worker process was killed, perhaps for want of memory; try fewer --workers or --num-envs")
    except KeyboardInterrupt:
        print("interrupted: no result.json was written", file=sys.stderr)
        sys.exit(130)

if __name__ == "__main__":
    main()
