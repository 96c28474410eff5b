"""Everything that is asserted about this project.       python -m pytest test_all.py

Groups: one per file, architecture. Oracles, invariants, learning thresholds, and mutants: a formula is broken
on purpose and a test must notice. Tests against reference arrays computed with the official models need the environment
variable REFERENCE_FIXTURES (a folder) and are skipped without it."""
import ast
import builtins
import copy
import errno
import gc
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import symtable
import sys
import textwrap
import time
import types
import warnings
from pathlib import Path

import envs                                           # first: it chooses the OpenGL backend before mujoco is imported
import imageio.v2 as imageio
import imageio_ffmpeg
import mujoco
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
import evaluate
import policies
import real_data
import rl_cotrain
import sft_warmstart

HERE = pathlib.Path(__file__).resolve().parent


def assert_mutant_dies(monkeypatch, module, owner, name, old, new, oracle):
    """Break owner.name by replacing old with new in its source; the test `oracle` must then fail."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert old in source, f"the mutant no longer applies: {old!r} is not in {name}()"
    space = dict(vars(module))
    exec(source.replace(old, new), space)
    monkeypatch.setattr(owner, name, space[name])
    try:
        oracle()
    except (AssertionError, pytest.fail.Exception, ValueError, RuntimeError, IndexError):
        return
    pytest.fail(f"no test noticed that {name}() was broken: {old!r} -> {new!r}")


# ---------------------------------------------------------------------------------------------------- envs

SETTINGS = [(task, domain, variant) for task in envs.TASKS for domain in envs.DOMAINS for variant in envs.VARIANTS
            if domain != "pretrain" or variant == "seen"]


def random_actions(n, k, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, k, 7)) * envs.ACTION_LIMIT


def same_obs(a, b):
    return (a["instructions"] == b["instructions"] and np.array_equal(a["state"], b["state"])
            and np.array_equal(a.get("images"), b.get("images")))


def scene_of(env, i):
    return env.scenes[env.scene_of[i]]


def test_kinematics_agree_with_mujoco():
    model = mujoco.MjModel.from_xml_string(envs.scene_xml("push", 0))
    data, hand = mujoco.MjData(model), model.body("hand").id
    joints = np.random.default_rng(0).uniform(*envs.JOINT_RANGE, (50, 7))
    position, frame, jacobian = envs.forward_kinematics(joints)
    for k, q in enumerate(joints):
        data.qpos[:7] = q
        mujoco.mj_forward(model, data)
        turn = data.xmat[hand].reshape(3, 3)
        tcp = data.xpos[hand] + turn[:, 2] * (envs.TOOL_LENGTH - .107)
        linear, angular = np.zeros((2, 3, model.nv))
        mujoco.mj_jac(model, data, linear, angular, tcp, hand)
        assert np.abs(position[k] - tcp).max() < 1e-6 and np.abs(frame[k] - turn).max() < 1e-6
        assert np.abs(jacobian[k] - np.concatenate([linear, angular])[:, :7]).max() < 1e-6


def test_inverse_kinematics_reaches_the_workspace():
    q = np.tile(envs.HOME, (200, 1))
    start, frame, _ = envs.forward_kinematics(q)
    goal = np.random.default_rng(0).uniform([.38, -.28, .02], [.62, .25, .25], (200, 3))
    for step in range(1, 13):                                  # as the controller does: in small steps
        q = envs.inverse_kinematics(q, start + (goal - start) * step / 12, frame)
    position, turn, _ = envs.forward_kinematics(q)
    assert np.linalg.norm(position - goal, axis=1).max() < 5e-4
    assert np.abs(turn - frame).max() < 5e-3
    assert ((q > envs.JOINT_RANGE[0]) & (q < envs.JOINT_RANGE[1])).all()


def test_the_panda_is_a_panda():
    model = mujoco.MjModel.from_xml_string(envs.scene_xml("drawer", 0))
    assert model.jnt_range[:7, 0] == pytest.approx([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -.0175, -2.8973])
    arm = sum(model.body(f"link{k}").mass[0] for k in range(7)) + model.body("hand").mass[0]
    assert arm == pytest.approx(16.79, abs=.01)
    assert (model.body_gravcomp[[model.body(f"link{k}").id for k in range(7)]] == 1).all()
    colliding = [model.geom(g).name for g in range(model.ngeom)
                 if model.body_rootid[model.geom_bodyid[g]] == model.body("link0").id and model.geom_contype[g]]
    assert colliding == ["pad_left", "pad_right"]
    assert (model.opt.timestep, model.opt.integrator) == (.005, mujoco.mjtIntegrator.mjINT_IMPLICITFAST)


@pytest.mark.parametrize("action", np.diag([.03, .03, .03, .1, .1, .1, 0])[:6], ids="dx dy dz droll dpitch dyaw".split())
def test_actions_move_the_tool_in_the_base_frame(action):
    env = envs.VecEnv("open-drawer", num_envs=1, image_size=0)
    env.reset()
    before, turn = env.tcp[0].copy(), env.frame[0].copy()
    for a in (action + [0, 0, 0, 0, 0, 0, 1], np.eye(7)[6], np.eye(7)[6]):
        env.step(a[None, None])
    moved = env.tcp[0] - before
    rotated = env.frame[0] @ turn.T
    angle = np.array([rotated[2, 1] - rotated[1, 2], rotated[0, 2] - rotated[2, 0], rotated[1, 0] - rotated[0, 1]]) / 2
    assert np.abs(np.concatenate([moved, angle]) - action[:6]).max() < 2e-3


def test_gripper_opens_with_plus_one_and_targets_accumulate():
    env = envs.VecEnv("open-drawer", image_size=0)
    env.reset()
    for sign, opening in ((-1, 0.), (1, .08)):
        for _ in range(6):
            env.step(np.array([[[0, 0, 0, 0, 0, 0, sign]]]))
        assert env.opening[0] == pytest.approx(opening, abs=2e-3)
    start = env.target[0].copy()
    for _ in range(3):
        env.step(np.array([[[.01, 0, .02, 0, 0, 0, 1]]]))
    assert env.target[0] - start == pytest.approx([.03, 0, .06], abs=1e-12)      # no tracking error gets in


@pytest.mark.parametrize("task, domain, variant", SETTINGS)
def test_environment_contract(task, domain, variant):
    make = lambda seed: envs.VecEnv(task, domain, 2, seed=seed, variant=variant)       # noqa: E731
    env, twin, other = make(3), make(3), make(4)
    obs, obs_twin, obs_other = env.reset(), twin.reset(), other.reset()
    for k in range(2):
        scene = scene_of(env, k)
        data = scene.batch.get_data(k)
        mujoco.mj_forward(scene.batch.get_model(k), data)
        depths = [c.dist for c in data.contact[:data.ncon]]
        assert min(depths, default=0) > -5e-4, f"something interpenetrates at the start: {min(depths)} m"
        if task.endswith("drawer"):
            assert -1e-9 <= scene.qpos[k, 9] <= env.drawn[k].stroke
    different = False
    for t in range(4):
        assert obs["images"].shape == (2, 64, 64, 3) and obs["images"].dtype == np.uint8
        assert obs["state"].shape == (2, 8) and obs["state"].dtype == np.float32 and np.isfinite(obs["state"]).all()
        assert all(isinstance(text, str) and "{" not in text for text in obs["instructions"])
        assert same_obs(obs, obs_twin)
        different |= not np.array_equal(obs["images"], obs_other["images"])
        kept = {name: np.copy(value) for name, value in obs.items()}
        actions = random_actions(2, 2, t)
        (new, reward, terminated, truncated, info), (obs_twin, *_), (obs_other, *_) = (
            e.step(actions) for e in (env, twin, other))
        assert reward.shape == terminated.shape == truncated.shape == (2,) and not (terminated & truncated).any()
        assert reward.dtype == np.float32 and terminated.dtype == truncated.dtype == bool
        assert all(np.array_equal(kept[name], obs[name]) for name in kept), "an old observation was overwritten"
        new["images"][:] = 7                                   # a user may write into what he was given
        assert not np.shares_memory(new["images"], env.images) and not (env.images == 7).all()
        new["images"][:] = obs_twin["images"]
        obs = new
    assert different


@pytest.mark.parametrize("task, domain", [(t, d) for t in envs.TASKS for d in envs.DOMAINS])
def test_experts_succeed(task, domain):
    env = envs.VecEnv(task, domain, 25, image_size=0)
    assert envs.run_expert(env, 50)[0].mean() >= .96
    assert domain == "sim" or envs.run_expert(env, 50, "teleop")[0].mean() >= .85
    assert domain != "sim" or envs.run_expert(env, 50, noise=.004)[0].mean() >= .9


@pytest.mark.parametrize("task", envs.TASKS)
def test_experts_succeed_on_held_out_variants(task):
    for domain in ("sim", "real"):
        for variant in ("unseen-objects", "unseen-states"):
            env = envs.VecEnv(task, domain, 25, variant=variant, image_size=0)
            assert envs.run_expert(env, 25)[0].mean() >= .9


def test_every_shape_can_be_picked():
    env, rates = envs.VecEnv("pick-place", num_envs=10, image_size=0), {}
    for shape in envs.SHAPES:
        env.parameters["shape"] = shape
        rates[shape] = envs.run_expert(env, 10)[0].mean()
    assert {shape: rate for shape, rate in rates.items() if rate < .9} == {}
    sim, real, pretrain = envs.PARAMETERS["objects"]["shape"]
    assert len(sim) >= 8 and len(envs.UNSEEN_OBJECTS["shape"]) >= 4
    assert not set(envs.UNSEEN_OBJECTS["shape"]) & {*sim, *real, *pretrain}


@pytest.mark.parametrize("task", envs.TASKS)
def test_random_actions_do_not_succeed(task):
    env, rng, done = envs.VecEnv(task, num_envs=50, image_size=0), np.random.default_rng(0), {}
    env.reset()
    for _ in range(env.horizon[0]):
        info = env.step(rng.uniform(-1, 1, (50, 1, 7)) * envs.ACTION_LIMIT)[-1]
        done.update({info["episode"][i]: info["success"][i] for i in info["ended"]})
    first = [done[k] for k in range(50)]
    assert sum(first) < .02 * 50


def test_an_episode_is_the_same_however_it_is_run():
    actions = random_actions(1, 6)
    def run(**options):
        env = envs.VecEnv("all", "real", **options)
        obs = env.reset()
        row = list(env.episode).index(4)
        trace = [obs["images"][row], obs["state"][row]]
        obs = env.step(np.repeat(actions, env.num_envs, 0))[0]
        return [*trace, obs["images"][row], obs["state"][row], env.instruction[row]]
    alone = run(first_episode=4)
    for options in (dict(num_envs=5), dict(num_envs=3, first_episode=2), dict(num_envs=2, first_episode=1, episode_stride=3)):
        assert all(np.array_equal(a, b) for a, b in zip(alone, run(**options))), options
    expert = [envs.run_expert(envs.VecEnv("all", "real", n, image_size=0), 12, "teleop") for n in (1, 5)]
    assert np.array_equal(expert[0], expert[1])


def test_resetting_one_environment_leaves_the_others_alone():
    env, twin = (envs.VecEnv("all", num_envs=4, image_size=0) for _ in range(2))
    for e in (env, twin):
        e.reset()
        e.step(random_actions(4, 3))
    env.begin_episodes(np.array([1]))
    for e in (env, twin):
        e.step(random_actions(4, 3, 1))
    others = [0, 2, 3]
    for name in ("tcp", "object", "goal", "steps", "touched", "succeeded", "lost", "episode", "q_new", "target"):
        assert np.array_equal(getattr(env, name)[others], getattr(twin, name)[others]), name
    assert env.episode[1] == 4 and twin.episode[1] == 1 and env.steps[1] == 3


def test_all_redraws_the_task():
    env = envs.VecEnv("all", num_envs=40, image_size=0)
    env.reset()
    first = list(env.task)
    env.begin_episodes(np.arange(40))
    assert set(first) == set(envs.TASKS) and first != list(env.task)


def test_a_chunk_is_its_steps_and_stops_at_the_end():
    one, chunk = (envs.VecEnv("push-cube", num_envs=2, image_size=0) for _ in range(2))
    one.reset(), chunk.reset()
    actions = random_actions(2, 4)
    for k in range(4):
        last = one.step(actions[:, k:k + 1])
    assert same_obs(last[0], chunk.step(actions)[0])
    env = envs.VecEnv("close-drawer", image_size=0)
    env.reset()
    env.steps[0] = env.horizon[0] - 2
    obs, _, terminated, truncated, info = env.step(random_actions(1, 4))
    assert truncated[0] and not terminated[0] and info["length"][0] == 40 and env.steps[0] == 0
    assert not np.array_equal(info["final_obs"]["state"], obs["state"])


def test_events_are_rewarded_once():
    env = envs.VecEnv("pick-place", num_envs=8, image_size=0, run_to_horizon=True)
    env.reset()
    expert, total, rewards = envs.Expert(env), np.zeros(8), set()
    for t in range(45):
        obs, reward, terminated, truncated, info = env.step(expert.act()[0][:, None])
        assert not terminated.any() and not truncated.any()
        total += reward
        rewards |= set(reward.round(3).tolist())
    assert env.succeeded.all() and total == pytest.approx(np.full(8, envs.REWARD_TOUCH + envs.REWARD_SUCCESS), abs=1e-6)
    scene_of(env, 3).qpos[3, 9:12] = .6, -.2, .1               # somebody takes it out of the dish
    for _ in range(3):
        reward = env.step(np.zeros((8, 1, 7)))[1]
        total += reward
    assert total[3] == pytest.approx(envs.REWARD_TOUCH + envs.REWARD_SUCCESS + envs.REWARD_LOST, abs=1e-6)
    assert np.delete(total, 3).max() <= 1.2 + 1e-6


def test_dense_reward_is_the_mean_of_its_terms():
    env = envs.VecEnv("all", num_envs=6, image_size=0, reward="dense")
    env.reset()
    expert = envs.Expert(env)
    for _ in range(12):
        obs, reward, *_, info = env.step(expert.act()[0][:, None])
        terms = info["reward_terms"]
        assert tuple(terms) == envs.REWARD_TERMS and all(((0 <= v) & (v <= 1)).all() for v in terms.values())
        assert reward == pytest.approx(sum(terms.values()) / 4, abs=1e-6)


def test_success_terminates_and_is_measured_not_assumed():
    env = envs.VecEnv("pick-place", image_size=0)
    env.reset()
    scene = scene_of(env, 0)
    def hold_over_dish(height):
        scene.qpos[0, 9:12] = env.goal[0] + (0, 0, env.rest[0] + height)
        scene.qvel[0] = 0
        return env.step(np.array([[[0, 0, 0, 0, 0, 0, 1.]]]))
    *_, info = hold_over_dish(.25)
    assert not info["success"][0]
    obs, reward, terminated, truncated, info = hold_over_dish(.009)
    assert info["success"][0] and terminated[0] and not truncated[0] and reward[0] == pytest.approx(1.)


def test_pushing_a_wrong_cube_fails():
    env = envs.VecEnv("push-cube", num_envs=3, image_size=0)
    env.reset()
    for i, cube in ((0, env.named[0]), (1, (env.named[1] + 1) % 3)):
        scene_of(env, i).qpos[i, 9 + 7 * cube] += .13
    obs, reward, terminated, truncated, info = env.step(np.zeros((3, 1, 7)))
    assert terminated.tolist() == [True, True, False]
    assert info["success"].tolist() == [True, False, False] and info["failure"].tolist() == [False, True, False]
    assert reward == pytest.approx([1, 0, 0])


def test_a_failure_ends_with_its_episode():
    env = envs.VecEnv("all", num_envs=40, image_size=0)
    env.reset()
    for i in np.flatnonzero(env.scene_of == "push"):
        scene_of(env, i).qpos[i, 9 + 7 * ((env.named[i] + 1) % 3)] += .13
    *_, terminated, _, info = env.step(np.zeros((40, 1, 7)))
    assert info["failure"].sum() == terminated.sum() >= 2 and (env.scene_of[terminated] != "push").any()
    assert not env.step(np.zeros((40, 1, 7)))[-1]["failure"].any()


def test_the_instruction_names_the_cube():
    for domain in envs.DOMAINS:
        env = envs.VecEnv("push-cube", domain, num_envs=30, image_size=0)
        env.reset()
        colours = {name: np.reshape(shades, (-1, 3)) for name, shades in env.parameters["cubes"]}
        scene = env.scenes["push"]
        for i in range(30):
            rgba = scene.field("geom_rgba")[i, scene.model.geom(f"cube{env.named[i]}").id]
            [word] = [word for word in colours if word in env.instruction[i].split()]
            assert np.abs(colours[word] - rgba[:3]).max(1).min() < 1e-6
        assert len(set(env.named)) == 3


def test_truth_is_what_the_simulator_knows():
    """Tool, object, goal, opening, touch, time left and task; of an ended episode as it was before the reset."""
    env = envs.VecEnv("all", num_envs=8, image_size=0)
    obs = env.reset()
    assert obs["truth"].shape == (8, envs.TRUTH) and obs["truth"].dtype == np.float32
    points = np.concatenate([env.tcp, env.object, env.goal], 1)
    assert np.allclose(obs["truth"][:, :9] / 10 + np.tile(envs.LOOK_AT, 3), points, atol=1e-6)
    assert np.allclose(obs["truth"][:, 9], 10 * env.opening) and not obs["truth"][:, 10].any()
    assert (np.array(list(envs.TASKS))[obs["truth"][:, 12:].argmax(1)] == env.task).all()
    assert np.allclose(obs["truth"][:, 11], env.horizon / 80)
    expert, ended = envs.Expert(env), 0
    while not ended:
        obs, *_, info = env.step(expert.act()[0][:, None])
        ended = len(info["ended"])
    assert (info["final_obs"]["truth"][:, 10] == 1).all()                   # an expert has touched before it succeeds
    assert np.allclose(80 * info["final_obs"]["truth"][:, 11],
                       [envs.TASKS[list(envs.TASKS)[k]].horizon for k in info["final_obs"]["truth"][:, 12:].argmax(1)]
                       - info["length"][info["ended"]])
    assert not obs["truth"][info["ended"], 10].any()                        # and in the next episode nobody has


def test_paraphrases_are_behind_the_flag():
    def texts(**options):
        env = envs.VecEnv("open-drawer", num_envs=40, image_size=0, **options)
        return set(env.reset()["instructions"])
    assert texts() == texts(domain="real") == {"open the drawer"}
    assert texts(paraphrase=True) > {"open the drawer"} and len(texts(paraphrase=True)) >= 4


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("task, domain", [(t, d) for t in envs.TASKS for d in ("sim", "real")])
def test_the_picture_shows_two_centimetres(task, domain, size):
    env = envs.VecEnv(task, domain, image_size=size, variant="seen")
    before = env.reset()["images"][0].astype(int)
    scene = scene_of(env, 0)
    index = {"pick": 9, "push": 9 + 7 * env.named[0], "drawer": 9}[env.scene_of[0]]
    scene.qpos[0, index] += -.02 if task == "close-drawer" else .02
    after = env.observe(np.array([0]))["images"][0].astype(int)
    changed = (np.abs(after - before).max(-1) > 25).sum()
    assert changed >= 4 * (size / 64) ** 2, f"only {changed} pixels changed"


@pytest.mark.parametrize("domain", ["sim", "real"])
def test_objects_are_at_least_three_pixels_wide_and_inside_the_picture(domain):
    for variant in ("seen", "unseen-states"):
        env = envs.VecEnv("all", domain, 24, variant=variant)
        env.reset()
        for i in range(24):
            scene = scene_of(env, i)
            model, data = scene.batch.get_model(i), scene.batch.get_data(i)
            mujoco.mj_kinematics(model, data)
            mujoco.mj_camlight(model, data)
            turn, focal = data.cam_xmat[0].reshape(3, 3), 32 / np.tan(np.radians(model.cam_fovy[0]) / 2)
            for point in (env.object[i], env.goal[i], env.tcp[i]):
                x, y, z = turn.T @ (point - data.cam_xpos[0])
                assert abs(focal * x / -z) < 31 and abs(focal * y / -z) < 31
            assert .046 * focal / -z >= 3


def test_real_differs_in_every_parameter_and_gap_switches_parts():
    for part, rows in envs.PARAMETERS.items():
        for name, (sim, real, _) in rows.items():
            assert (sim == real) == (name == "side"), f"{part}.{name}: need another value in real, side excepted"
    off = dict.fromkeys(envs.PARAMETERS, False)
    sim = envs.VecEnv("all", image_size=0).parameters
    assert envs.VecEnv("all", "real", image_size=0, gap=envs.Gap(**off)).parameters == sim
    for part, rows in envs.PARAMETERS.items():
        one = envs.VecEnv("all", "real", image_size=0, gap=envs.Gap(**{**off, part: True})).parameters
        assert {name for name in one if one[name] != sim[name]} == set(rows) - {"side"}         # of `pretrain` only


def test_randomised_parts_are_those_of_pretrain():
    """But for the camera, which stays near that of sim; and things are of its colours, too. Pictures may be late."""
    sim, other = (envs.VecEnv("all", domain, image_size=0).parameters for domain in ("sim", "pretrain"))
    for part in ("visual", "dynamics"):
        names, near = set(envs.PARAMETERS[part]), envs.NEAR_LOOKS if part == "visual" else {}
        got = envs.VecEnv("all", image_size=0, randomise=[part]).parameters
        assert got == sim | {name: other[name] for name in names} | near and got != sim
    cameras = {name: limits for name, limits in envs.NEAR_LOOKS.items() if name in envs.PARAMETERS["visual"]}
    assert len(cameras) == 5 and cameras["azimuth"] != other["azimuth"]
    assert all(low < sim[name] < high for name, (low, high) in cameras.items())
    assert all(envs.NEAR_LOOKS[name] == other[name] for name in {*envs.NEAR_LOOKS} - {*cameras})
    assert envs.VecEnv("all", "pretrain", image_size=0, randomise=["visual"]).parameters == other
    with pytest.raises(ValueError, match="randomise 'objects' is unknown, choose from visual, dynamics, late"):
        envs.VecEnv("all", image_size=0, randomise=["objects"])
    plain, moved = (envs.VecEnv("push-cube", "sim", 4, 1, randomise=parts) for parts in ((), ("visual", "dynamics")))
    before, after = plain.reset(), moved.reset()
    assert before["instructions"] == after["instructions"] and np.allclose(plain.object, moved.object)
    assert all((a != b).mean() > .5 for a, b in zip(before["images"], after["images"]))
    late = envs.VecEnv("push-cube", "sim", 40, 1, image_size=0, randomise=["late"])
    assert late.parameters == sim | dict(stale=envs.LATE)
    for env, share in ((moved, 0), (late, .1)):                # a tenth of the pictures, on average, is the one before
        env.reset()
        repeats = [one.repeats.mean() for one in env.drawn]
        assert abs(np.mean(repeats) - share) < .03 * share / .1 + 1e-9 and max(repeats) < .5


def test_gap_parts_are_independent():
    """With one part of the gap switched off, what the other parts drew stays exactly the same."""
    full, blind = (envs.VecEnv("push-cube", "real", 3, gap=gap) for gap in (envs.Gap(), envs.Gap(visual=False)))
    a, b = full.reset(), blind.reset()
    assert not np.array_equal(a["images"], b["images"]) and np.array_equal(a["state"], b["state"])
    assert np.array_equal(full.object, blind.object) and a["instructions"] == b["instructions"]


def test_pretrain_shares_nothing_with_the_target_domains():
    def colours(value):
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            return {value}
        if len(value) == 3 and all(isinstance(x, float) for x in value):
            return {tuple(value)}
        return set().union(*map(colours, value))
    for name in ("texture", "table", "wall", "robot", "shape", "colour", "accent", "dish", "cubes", "cabinet", "handle"):
        rows = [rows for rows in envs.PARAMETERS.values() if name in rows][0][name]
        unseen = colours(envs.UNSEEN_OBJECTS.get(name, ())) | (colours(envs.UNSEEN_CUBES) if name == "cubes" else set())
        target = colours(rows[0]) | colours(rows[1]) | unseen
        if name == "cubes":                  # words are language, which a base knows; shades are what must be new
            own, target = ({c for c in x if not isinstance(c, str)} for x in (colours(rows[2]), target))
            assert np.linalg.norm(np.array([*own])[:, None] - np.array([*target]), axis=2).min() > .12
        assert not colours(rows[2]) & target or name == "cubes", name
        if name in ("table", "wall", "robot", "colour", "dish", "cabinet", "handle"):        # a hundred, and all look otherwise
            own, target = (np.array([*x]) for x in (colours(rows[2]), colours(rows[0]) | colours(rows[1])))
            assert len(own) == 100 and np.linalg.norm(own[:, None] - target, axis=2).min() > (.1 if name == "robot" else .25), name
            assert (np.ptp(own, 0) > (.3 if name == "robot" else .75)).all(), name
    def cameras(domain):
        env = envs.VecEnv("push-cube", domain, 300, image_size=0)
        env.reset()
        return env.scenes["push"].field("cam_pos")[:, 0]
    sim, real, pretrain = map(cameras, envs.DOMAINS)
    assert min(np.linalg.norm(pretrain[:, None] - target, axis=2).min() for target in (sim, real)) > .04
    texts = lambda d: {w for t in envs.VecEnv("all", d, image_size=0).wordings.values() for w in t}      # noqa: E731
    assert not texts("pretrain") & texts("sim")


def test_wrong_arguments_are_all_named_at_once():
    with pytest.raises(ValueError) as error:
        envs.VecEnv("fold-shirt", "mars", num_envs=0, image_size=4, reward="lots", first_episode=-1)
    for words in ("fold-shirt", "pick-place", "mars", "pretrain", "num_envs", "image_size", "lots", "first_episode"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="unseen-objects"):
        envs.VecEnv("push-cube", "pretrain", variant="unseen-objects")
    with pytest.raises(ValueError, match="teleop"):
        envs.Expert(envs.VecEnv("push-cube", image_size=0), style="drunk")


def test_wrong_actions():
    env = envs.VecEnv("push-cube", num_envs=4, image_size=0)
    env.reset()
    state = env.scenes["push"].batch.state.copy()
    for shape in ((4, 7), (3, 1, 7), (4, 1, 6), (4, 0, 7)):
        with pytest.raises(ValueError, match=r"need \(4, K >= 1, 7\)"):
            env.step(np.zeros(shape))
    bad = np.zeros((4, 2, 7))
    bad[1, 0, 3], bad[3, 1, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        env.step(bad)
    assert np.array_equal(env.scenes["push"].batch.state, state), "a refused action must not move anything"
    actions = np.zeros((4, 2, 7))
    actions[2, :, 0], actions[0, 1, 6] = 9., -7.
    before = env.target.copy()
    info = env.step(actions)[-1]
    assert info["clipped"].tolist() == [1, 0, 2, 0]
    assert env.target[2, 0] - before[2, 0] == pytest.approx(2 * envs.ACTION_LIMIT[0])


@pytest.mark.parametrize("poison", [1e13, np.nan])
def test_a_diverging_simulation_ends_alone(poison, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                # MuJoCo writes its warnings to MUJOCO_LOG.TXT
    env, twin = (envs.VecEnv("pick-place", num_envs=3) for _ in range(2))
    env.reset(), twin.reset()
    env.scenes["pick"].qvel[1, :7] = poison
    actions = random_actions(3, 2)
    obs, reward, terminated, truncated, info = env.step(actions)
    other = twin.step(actions)[0]
    assert truncated.tolist() == info["diverged"].tolist() == [False, True, False] and not terminated.any()
    assert np.isfinite(reward).all() and reward[1] == 0 and np.isfinite(info["final_obs"]["state"]).all()
    assert np.array_equal(obs["images"][[0, 2]], other["images"][[0, 2]])
    assert env.episode.tolist() == [0, 3, 2]
    for seed in range(3):
        obs, _, _, _, info = env.step(random_actions(3, 2, seed))
    assert np.isfinite(obs["state"]).all() and not info["diverged"].any()


def test_environments_do_not_destroy_each_others_pictures():
    keep = envs.VecEnv("push-cube")
    first = keep.reset()["images"].copy()
    for task in envs.TASKS:
        envs.VecEnv(task).reset()
        gc.collect()
        assert np.array_equal(keep.observe(np.array([0]))["images"], first)


def render_checksum(_=None):
    return int(envs.VecEnv("push-cube", "real", image_size=64).reset()["images"].astype(np.int64).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"] if sys.platform.startswith("linux") else ["spawn"])
def test_rendering_works_in_child_processes(method):
    here = render_checksum()                                   # the parent has an OpenGL context already
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map_async(render_checksum, range(2)).get(timeout=60) == [here, here]


def test_backend_choice_and_errors(monkeypatch):
    probe = "import os, envs; print(os.environ.get('MUJOCO_GL'), os.environ['LP_NUM_THREADS'])"
    def run(**env):
        clean = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
        return subprocess.run([sys.executable, "-c", probe], env={**clean, **env}, cwd=HERE, capture_output=True, text=True)
    assert run(MUJOCO_GL="disable").stdout.split()[0] == "disable"     # the user's choice stands
    if sys.platform.startswith("linux"):
        assert run().stdout.split()[0] in ("egl", "osmesa")
    def broken(*_):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")
    monkeypatch.setattr(mujoco, "GLContext", broken)
    monkeypatch.setattr(envs, "GL_CONTEXT", {})
    with pytest.raises(RuntimeError, match="apt-get install libegl1 libgl1.*image_size=0"):
        envs.VecEnv("push-cube")
    envs.VecEnv("push-cube", image_size=0).reset()             # works without OpenGL


def test_a_slow_renderer_is_named(monkeypatch):
    envs.open_gl()
    if "llvmpipe" not in envs.gl_renderer_name():
        pytest.skip("this machine draws on a GPU")
    monkeypatch.setattr(envs, "GL_CONTEXT", {})
    monkeypatch.setattr(os.path, "exists", lambda path: True)          # as if there were an NVIDIA GPU
    with pytest.warns(UserWarning, match="rendering on the CPU"):
        envs.VecEnv("push-cube").reset()


@pytest.mark.parametrize("backend", ["egl", "osmesa", "glfw"])
def test_every_backend_draws_or_explains(backend):
    """Also: nothing is printed while the interpreter shuts down."""
    if not sys.platform.startswith("linux"):
        pytest.skip("these are the backends of Linux")
    script = ("import sys\ntry:\n    import envs\n    env = envs.VecEnv('push-cube')\nexcept RuntimeError as error:\n"
              "    sys.exit(3 * ('apt-get install' in str(error)))\nassert env.reset()['images'].std() > 5\n")
    env = {k: v for k, v in os.environ.items() if k not in ("PYOPENGL_PLATFORM", "DISPLAY")}
    run = subprocess.run([sys.executable, "-c", script], env={**env, "MUJOCO_GL": backend}, cwd=HERE, capture_output=True, text=True)
    assert run.returncode in (0, 3) and (run.returncode == 3 or run.stderr == ""), run.stderr


def test_camera_image_processing():
    env = envs.VecEnv("push-cube", "real", 1)
    env.reset()
    drawn = env.drawn[0]
    flat = np.full((64, 64, 3), 128, np.uint8)
    noisy = [envs.process_image(flat, drawn, step).astype(float) for step in (3, 3, 4)]
    assert np.array_equal(noisy[0], noisy[1]) and not np.array_equal(noisy[0], noisy[2])
    assert noisy[0][..., 1].std() == pytest.approx(drawn.noise, rel=.15)
    drawn.noise, drawn.curves = 0, None
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 200
    assert envs.process_image(edge, drawn, 0)[4, :, 0].tolist() == [0, 0, 0, 50, 150, 200, 200, 200]


def test_latency_and_scale_of_the_real_arm():
    """The stand-in moves later and less far than commanded, the twin exactly as commanded."""
    def after(domain, steps, latency=None):
        env = envs.VecEnv("push-cube", domain, 4, image_size=0)
        env.reset()
        env.latency[:] = env.latency if latency is None else latency
        start = env.tcp.copy()
        for k in range(steps):
            env.step(np.tile([[[0, 0, .04 * (k == 0), 0, 0, 0, 1.]]], (4, 1, 1)))
        return (env.tcp - start)[:, 2]
    assert after("sim", 1).min() > .030 and after("sim", 6) == pytest.approx(np.full(4, .04), abs=1e-3)
    assert after("real", 1).max() < .030 and after("real", 6).max() < .038 and after("real", 6).min() > .033
    late = [after("sim", 1, latency) for latency in (0, 2, 4, 8)]      # blocks of 25 ms, of 8 a step
    assert all((a > b + .003).all() for a, b in zip(late, late[1:])) and np.abs(late[3]).max() < 1e-3
    assert after("sim", 6, 8) == pytest.approx(np.full(4, .04), abs=1e-3)      # late, but all of it


def test_landmarks_and_state_are_measured():
    env = envs.VecEnv("open-drawer", num_envs=2, image_size=0)
    obs = env.reset()
    marks = env.landmarks()
    assert marks.shape == (2, 3, 5) and marks.dtype == np.float32
    assert obs["state"][:, :3] == pytest.approx(marks[:, 0, :3]) and obs["state"][:, 3] == pytest.approx(np.full(2, np.pi), abs=.1)
    assert marks[:, 2, 1] - marks[:, 1, 1] == pytest.approx([drawn.stroke for drawn in env.drawn])    # the open handle
    assert obs["state"][:, 6] == pytest.approx(np.full(2, .08), abs=1e-6)


def test_mirrored_drawers_are_the_other_way_round():
    """In `pretrain` the cabinet stands on the robot's left and opens to the right; in the other domains never."""
    for domain, side in (("sim", 1), ("real", 1), ("pretrain", -1)):
        env = envs.VecEnv("open-drawer", domain, 6, image_size=0)
        env.reset()
        scene = env.scenes["drawer"]
        model, data = scene.batch.get_model(0), scene.batch.get_data(0)
        mujoco.mj_kinematics(model, data)
        assert env.object[0] == pytest.approx(data.geom("handle").xpos, abs=1e-6)
        assert ((env.goal - env.object)[:, 1] * side > .18).all()
        assert ((env.object - scene.mocap_pos[:, 1])[:, 1] * side > .16).all()
        assert ((scene.mocap_pos[:, 1, 1] - envs.LOOK_AT[1]) * side < -.2).all()


def test_landmarks_in_the_picture_are_where_mujoco_draws_them():
    env = envs.VecEnv("all", "pretrain", num_envs=6, image_size=64)
    env.reset()
    for i, marks in enumerate(env.landmarks()):
        scene = env.scenes[env.scene_of[i]]
        model, data = scene.models[i], scene.batch.get_data(i, scene.data)
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        seen = (marks[:, :3] - data.cam_xpos[0]) @ data.cam_xmat[0].reshape(3, 3)        # x right, y up, z towards us
        zoom = np.tan(np.radians(model.cam_fovy[0]) / 2)
        assert marks[:, 3:] == pytest.approx(np.stack([seen[:, 0], -seen[:, 1]], 1) / -seen[:, 2:] / zoom, abs=1e-4)


def test_demonstrators():
    """DART: the label stays the clean action. Teleop: the label is what was executed."""
    env = envs.VecEnv("push-cube", num_envs=6, image_size=0)
    env.reset()
    executed, label = envs.Expert(env, noise=.004).act()
    assert (np.abs(executed - label)[:, :3].max(1) > 0).all() and np.abs(executed - label)[:, :3].max() < .02
    env.reset()
    clean = envs.Expert(env).act()
    assert np.array_equal(clean[0], clean[1]) and clean[1] == pytest.approx(label, abs=1e-12)
    executed, label = envs.Expert(env, "teleop").act()
    assert np.array_equal(executed, label)
    assert np.abs(executed).max(0) == pytest.approx(np.minimum(np.abs(executed).max(0), envs.ACTION_LIMIT))


ENV_MUTANTS = [
    (envs.VecEnv, "latch", "& ~self.touched", "", test_events_are_rewarded_once),
    (envs.VecEnv, "latch", "& ~self.lost", "", test_events_are_rewarded_once),
    (envs.VecEnv, "measure", "> PUSH_WRONG", "> 10", test_pushing_a_wrong_cube_fails),
    (envs.VecEnv, "measure", "(0 < height)\n", "(height > -9)\n", None),
    (envs.VecEnv, "measure", "& (height < PICK_HEIGHT)", "", test_success_terminates_and_is_measured_not_assumed),
    (envs.VecEnv, "advance", "self.target[ids] = np.clip(self.target[ids]", "self.target[ids] = np.clip(self.tcp[ids]",
     test_gripper_opens_with_plus_one_and_targets_accumulate),
    (envs.VecEnv, "advance", "(action[:, 6] + 1)", "(1 - action[:, 6])", test_gripper_opens_with_plus_one_and_targets_accumulate),
    (envs.VecEnv, "advance", "block + 1 - self.latency", "block + 1 + 0 * self.latency", test_latency_and_scale_of_the_real_arm),
    (envs.VecEnv, "observe", "self.images[ids] ", "self.images ", lambda: test_environment_contract("push-cube", "sim", "seen")),
    (envs.VecEnv, "arrange", "self.episode[i]] ", "self.next_episode * self.num_envs] ",
     test_an_episode_is_the_same_however_it_is_run),
    (envs.VecEnv, "place_push", "colour=cubes[self.named[i]]", "colour=cubes[0]", test_the_instruction_names_the_cube),
    (envs, "forward_kinematics", "axes[..., [1, 2, 0]] * arm[..., [2, 0, 1]] - ", "-", test_kinematics_agree_with_mujoco)]


@pytest.mark.parametrize("owner, name, old, new, oracle", [m for m in ENV_MUTANTS if m[-1]])
def test_env_mutants_are_noticed(owner, name, old, new, oracle, monkeypatch):
    assert_mutant_dies(monkeypatch, envs, owner, name, old, new, oracle)


def test_wilson_interval():
    assert envs.wilson(10, 16) == pytest.approx((.386, .815), abs=.002)
    assert envs.wilson(0, 50)[0] == pytest.approx(0, abs=1e-4) and envs.wilson(50, 50)[1] == pytest.approx(1, abs=1e-4)


# ---------------------------------------------------------------------------------------------------- policies

torch.set_num_threads(1)
POLICY_FIXTURES = Path(os.environ.get("REFERENCE_FIXTURES") or "/nonexistent")
policy_needs_fixtures = pytest.mark.skipif(not POLICY_FIXTURES.is_dir(), reason="REFERENCE_FIXTURES is not set")
POLICY_TEXTS = ["open the drawer", "pick up the carrot and place it into the white tray", "push the Cube!",
                "close it", "put the red block on the plate"]


def policy_arrays(path):
    return dict(np.load(POLICY_FIXTURES / path))


def policy_gap(ours, reference):
    ours = ours.detach().cpu().numpy() if torch.is_tensor(ours) else np.asarray(ours)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours.astype(np.float64) - reference).max())


def policy_batch(size, seed=0, pixels=64):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, pixels, pixels, 3), dtype=np.uint8)
    return images, [POLICY_TEXTS[i % len(POLICY_TEXTS)] for i in range(size)]


def policy_actions(size, horizon=8, seed=0):
    scale = np.array([0.05] * 3 + [0.25] * 3 + [1.0], np.float32)
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (size, horizon, 7)).astype(np.float32) * scale)


def policy_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def policy_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def policy_shaken(policy, seed=1, scale=0.05):
    """Away from the neutral start: adaRMS gates are zero there, and the expert does not listen to its prefix yet."""
    with torch.no_grad():
        for p in policy.parameters():
            p += scale * torch.randn(p.shape, generator=policy_generator(seed))
    return policy


@pytest.fixture(scope="module")
def policy_pair():
    return {name: policy_shaken(policies.make_tiny(name)) for name in ("openvla", "pi05")}


# ---- official numerics: OpenVLA ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def policy_openvla_a():
    if not POLICY_FIXTURES.is_dir():
        pytest.skip("REFERENCE_FIXTURES is not set")
    return policies.load_policy(POLICY_FIXTURES / "openvla_a"), policy_arrays("openvla_a/reference.npz")


@pytest.mark.parametrize("s", range(3))
def test_openvla_forward_matches_official(policy_openvla_a, s):
    """The reference features are themselves 1.1e-5 from a float64 run (ours: 8e-6), hence 2e-5 and 1e-4 here."""
    policy, ref = policy_openvla_a
    image = torch.from_numpy(ref[f"image{s}_uint8"])[None]
    assert policy_gap(policy.pixels(image), ref["pixel_values"][s:s + 1]) == 0
    features = policy.encode_images(image)
    assert policy_gap(features, ref[f"sample{s}_patch_features"]) < 2e-5
    assert policy_gap(policy.project(features), ref[f"sample{s}_projected_features"]) < 1e-5
    ids = torch.from_numpy(ref[f"prompt{s}_input_ids_final"])
    hidden, _, _ = policy.hidden(features, ids, torch.ones_like(ids).bool())
    assert policy_gap(hidden, ref[f"sample{s}_last_hidden"]) < 2e-5
    assert policy_gap(policy.logits(hidden), ref[f"sample{s}_logits"]) < 1e-4


def policy_greedy(policy, ids_list, image_list):
    """Greedy tokens through `act` itself, with given prompt ids instead of a tokenizer."""
    width = max(ids.shape[1] for ids in ids_list)
    ids = torch.full((len(ids_list), width), policy.pad)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, own in enumerate(ids_list):
        ids[row, 0], mask[row, 0] = own[0, 0], True
        ids[row, width - own.shape[1] + 1:] = own[0, 1:]
        mask[row, width - own.shape[1] + 1:] = True
    policy.prompt = lambda instructions: (ids, mask)
    try:
        features = torch.cat([policy.encode_images(image[None]) for image in image_list])
        decision = policy.act(features, ["given"] * len(ids), deterministic=True)
        check = policy.evaluate(features, ["given"] * len(ids), decision.trace)
    finally:
        del policy.prompt
    assert (decision.logp - check[0]).abs().max() < 1e-4
    return decision.trace["tokens"].numpy()


def test_openvla_tokens_and_actions_match_official(policy_openvla_a):
    """One left-padded batch of three prompt lengths against three official batch-1 runs."""
    policy, ref = policy_openvla_a
    ids = [torch.from_numpy(ref[f"prompt{s}_input_ids_final"]) for s in range(3)]
    tokens = policy_greedy(policy, ids, [ref[f"image{s}_uint8"] for s in range(3)])
    for s in range(3):
        assert (tokens[s] == ref[f"sample{s}_action_token_ids"]).all()
        assert policy_gap(policy.decode_tokens(tokens[s]), ref[f"sample{s}_normalized_actions"]) < 1e-12
        for key in ("toy_bridge", "toy_nomask", None):
            policy_key = policies.load_policy(POLICY_FIXTURES / "openvla_a", unnorm_key=key)
            expected = ref[f"sample{s}_action_{key or 'dataset_statistics'}"]
            raw = policy_key.unnormalize(policy_key.decode_tokens(tokens[s:s + 1]))[0]
            assert policy_gap(raw, expected) < 1e-9
            ours = policy_key.to_actions(torch.from_numpy(tokens[s:s + 1]))[0, 0]
            assert policy_gap(ours[:6], expected[:6]) < 1e-6 and abs(ours[6] - (2 * expected[6] - 1)) < 1e-6


def test_openvla_step_logits_match_official(policy_openvla_a):
    policy, ref = policy_openvla_a
    for s in range(3):
        ids = torch.from_numpy(ref[f"prompt{s}_input_ids_final"])
        tokens = torch.from_numpy(ref[f"sample{s}_action_token_ids"])[None]
        features = policy.encode_images(ref[f"image{s}_uint8"][None])
        hidden = policy.hidden(features, ids, torch.ones_like(ids).bool(), tokens[:, :-1])[0]
        assert policy_gap(policy.logits(hidden[0, -7:]), ref[f"sample{s}_step_logits"]) < 1e-4


def test_openvla_training_loss_matches_official(policy_openvla_a):
    """bc_loss itself, on the reference's prompts and actions (unnormalised first, so that the whole path is tested)."""
    policy, ref = policy_openvla_a
    labels, ids = ref["train_labels"], ref["train_input_ids"]
    pixels = torch.from_numpy(ref["pixel_values"])
    features = torch.cat([policy.vision_backbone["featurizer"](pixels[:, :3]),
                          policy.vision_backbone["fused_featurizer"](pixels[:, 3:])], -1)
    total, targets = [], []
    for row in range(3):
        first = int((labels[row] != -100).argmax())
        prompt = torch.from_numpy(ids[row:row + 1, :first])
        policy.prompt = lambda instructions: (prompt, torch.ones_like(prompt).bool())
        action = torch.from_numpy(policy.unnormalize(ref["train_actions_normalized"][row:row + 1].clip(-1, 1)))
        action[:, 6] = 2 * action[:, 6] - 1
        total.append(policy.bc_loss(features[row:row + 1], ["given"], action[:, None]))
        targets.append(policy.to_tokens(action)[0].numpy())
        del policy.prompt
        assert (targets[-1] == labels[row][labels[row] != -100][:7]).all()
    assert abs(torch.stack(total).mean().item() - ref["train_loss"]) < 1e-5


def test_openvla_token_tables_match_official(policy_openvla_a):
    policy, ref = policy_openvla_a
    assert (policy.encode_values(ref["tokenizer_values"]) == ref["tokenizer_ids"]).all()
    assert policy_gap(policy.decode_tokens(ref["detok_ids"]), ref["detok_normalized"]) == 0
    assert policy_gap(policies.BIN_CENTRES, ref["bin_centers"]) == 0


@pytest.mark.parametrize("merge", [True, False])
def test_openvla_adapter_matches_peft(policy_openvla_a, merge):
    """Loaded as PEFT wrote it (Conv2d, fused qkv and lm_head adapted); kept apart or folded in: the same numbers."""
    _, ref = policy_openvla_a
    policy = policies.load_policy(POLICY_FIXTURES / "openvla_a" / "adapter", merge=merge, unnorm_key="toy_bridge")
    assert bool(policies.lora_modules(policy)) != merge
    features = policy.encode_images(ref["image0_uint8"][None])
    assert policy_gap(features, ref["lora_patch_features"]) < 2e-5
    ids = torch.from_numpy(ref["prompt0_input_ids_final"])
    hidden = policy.hidden(features, ids, torch.ones_like(ids).bool())[0]
    assert policy_gap(policy.logits(hidden), ref["lora_logits"]) < 1e-4
    tokens = policy_greedy(policy, [ids], [ref["image0_uint8"]])
    assert (tokens[0] == ref["lora_action_token_ids"]).all()
    assert policy_gap(policy.unnormalize(policy.decode_tokens(tokens))[0], ref["lora_action"]) < 1e-9
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert merge or all(".lora_" in name or name.startswith("value_head") for name in trainable)


@policy_needs_fixtures
def test_openvla_evaluation_images_match_tensorflow():
    ref = policy_arrays("openvla_preproc/tf_preprocess.npz")
    image = ref["image_256"][None]
    assert (policies.center_crop_90(image, 224)[0] == ref["tf_crop90_224"]).all()
    ours = policies.resize_lanczos3(image, 224)[0].astype(int)
    gap = np.abs(ours - ref["tf_lanczos3_224"])
    assert gap.max() <= 1 and (gap > 0).mean() <= 6e-4
    for start, goal in (("image_256", "tf_lanczos3_then_crop90_224"), ("tf_jpeg95_roundtrip_256", "tf_libero_eval_224")):
        chained = policies.center_crop_90(policies.resize_lanczos3(ref[start][None], 224), 224)[0].astype(int)
        gap = np.abs(chained - ref[goal])
        assert gap.max() <= 1 and (gap > 0).mean() <= 1e-3


def test_openvla_full_size_shapes():
    config = json.loads(json.dumps(policies.TINY["openvla"]))
    config.update(image_sizes=[224, 224], pad_token_id=32000, text_config=dict(vocab_size=32064))
    del config["tiny_timm_kwargs"]
    policy = policies.build(config)
    tensors = policy.official_tensors()
    assert len(tensors) == 982 and sum(t.numel() for t in tensors.values()) == 7_541_237_184
    assert policy.vocab == 32000 and policy.feature_shape == (256, 2176)
    assert policy.encode_values([1.0, -1.0, 0.0]).tolist() == [31744, 31999, 31872]
    assert [len([k for k in tensors if k.startswith(p)]) for p in
            ("vision_backbone.featurizer", "vision_backbone.fused_featurizer", "projector", "language_model")] == [
                343, 342, 6, 291]


# ---- official numerics: pi0.5 ------------------------------------------------------------------------------------

def policy_pi05_prefix(policy, inputs):
    """Tower run only on cameras present somewhere, on the reference's float pixels."""
    batch, cameras = inputs["image_mask"].shape
    features = policy.vision_tower(inputs["images"].flatten(0, 1)).last_hidden_state.unflatten(0, (batch, cameras))
    return policy.prefix(features, inputs["image_mask"], inputs["tokens"], inputs["token_mask"])


def policy_check_pi05(policy, inputs, ref, grads=True):
    hidden, kv, valid = policy_pi05_prefix(policy, inputs)
    tokens = policy.feature_shape[0]
    present = torch.cat([inputs["image_mask"].any(0).repeat_interleave(tokens),
                         torch.ones(inputs["tokens"].shape[1], dtype=torch.bool)]).numpy()
    assert (valid.numpy() == ref["prefix_pad_mask"][:, present]).all()
    keep = valid.numpy()
    assert policy_gap(hidden[valid], ref["prefix_hidden"][:, present][keep]) < 2e-5
    assert (np.cumsum(keep, 1)[keep] - 1 == ref["position_ids"][:, :-policy.horizon][:, present][keep]).all()
    last = ref["position_ids"][:, -policy.horizon:]
    assert (keep.sum(1)[:, None] + np.arange(policy.horizon) == last).all()
    if "prefix_key_0" in ref:
        for layer, (k, v) in enumerate(kv):
            for ours, name in ((k, "key"), (v, "value")):
                expected = ref[f"prefix_{name}_{layer}"][:, :, present]
                assert policy_gap(ours.transpose(1, 2)[valid], expected.swapaxes(1, 2)[keep]) < 1e-5
    t = inputs["time"]
    assert policy_gap(policy.time_embedding(t[:, None])[:, 0], ref["adarms_cond"]) < 1e-6
    x_t = t[:, None, None] * inputs["noise"] + (1 - t[:, None, None]) * inputs["actions"]
    v, h = policy.velocity(x_t[:, None], t[:, None], kv, valid)
    assert policy_gap(x_t, ref["x_t"]) < 1e-6 and policy_gap(policy.action_in_proj(x_t), ref["suffix_embs"]) < 1e-5
    assert policy_gap(v[:, 0], ref["v_t"]) < 2e-5 and policy_gap(v[:, 0], ref["v_t_cached"]) < 2e-5
    assert policy_gap(h[:, 0], ref["suffix_hidden"]) < 2e-5
    loss = policy.flow_loss(kv, valid, inputs["actions"], inputs["noise"], t)
    assert policy_gap(loss, ref["loss"]) < 1e-4 and abs(loss.mean().item() - ref["loss_mean"]) < 1e-5
    if grads:
        policy.zero_grad()
        loss.mean().backward()
        ours = {policy.official_key(name): p.grad for name, p in policy.named_parameters()}
        for name in [key for key in ref if key.startswith("grad/")]:
            assert policy_gap(ours[name[5:]], ref[name]) < 1e-5 * np.abs(ref[name]).max(), name
    with torch.no_grad():
        for steps, name, tolerance in ((4, "sample4", 1e-4), (10, "sample10", 3e-4)):
            x = inputs["noise"][:, None]
            for i in range(steps):
                if steps == 4 and "sample4_trajectory" in ref:
                    assert policy_gap(x[:, 0], ref["sample4_trajectory"][i]) < 1e-4
                x = x - policy.velocity(x, torch.full((len(x), 1), 1 - i / steps), kv, valid)[0] / steps
            assert policy_gap(x[:, 0], ref[name]) < tolerance


@policy_needs_fixtures
def test_pi05_matches_openpi():
    policy = policies.load_policy(POLICY_FIXTURES / "pi05_a")
    inputs = {key: torch.from_numpy(value) for key, value in policy_arrays("pi05_a/inputs.npz").items()}
    policy_check_pi05(policy, inputs, policy_arrays("pi05_a/outputs.npz"))


def policy_pi05_layout(target, layout):
    """pi05_a rewritten as other tools write it."""
    target.mkdir(parents=True, exist_ok=True)
    source = POLICY_FIXTURES / "pi05_a"
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    head = "paligemma_with_expert.paligemma.lm_head.weight"
    if layout == "lerobot":          # saved after fine-tuning: prefixed, untied, and lm_head is a decoy
        tensors["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = tensors[head].clone()
        tensors[head] = torch.randn_like(tensors[head])
        tensors = {"model." + key: value for key, value in tensors.items()}
        config["chunk_size"] = config.pop("action_horizon")
        config["max_action_dim"] = config.pop("action_dim")
        config["normalization_mapping"] = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
        stats = {f"{feature}.{key}": torch.linspace(low, high, 7) for feature in ("action", "observation.state")
                 for key, low, high in (("q01", -1, -0.2), ("q99", 0.3, 2))}
        save_file(stats, target / "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
        save_file(stats, target / "policy_preprocessor_step_5_normalizer_processor.safetensors")
        save_file(tensors, target / "model.safetensors")
    elif layout == "rlinf":          # shards without an index, RL heads inside, statistics outside assets/
        tensors.update({"value_head.mlp.0.weight": torch.zeros(3, 3), "noise_head.x": torch.zeros(2)})
        keys = sorted(tensors)
        for part in range(2):
            save_file({key: tensors[key] for key in keys[part::2]}, target / f"part-{part}.safetensors")
        stats = {"actions": dict(q01=[-1.] * 7, q99=[1.] * 7), "state": dict(q01=[-1.] * 7, q99=[1.] * 7)}
        policies.write_json(target / "physical-intelligence/pick_and_place_real/norm_stats.json", {"norm_stats": stats})
    elif layout == "rlinf_pt":       # a training dump with wrapper prefixes
        (target / "actor/model_state_dict").mkdir(parents=True)
        torch.save({"_orig_mod.module." + k: v for k, v in tensors.items()}, target / "actor/model_state_dict/full_weights.pt")
    (target / "config.json").write_text(json.dumps(config))
    return target


@policy_needs_fixtures
@pytest.mark.parametrize("layout", ["lerobot", "rlinf", "rlinf_pt"])
def test_pi05_layouts(tmp_path, layout):
    policy = policies.load_policy(policy_pi05_layout(tmp_path / layout, layout))
    inputs = {key: torch.from_numpy(value) for key, value in policy_arrays("pi05_a/inputs.npz").items()}
    policy_check_pi05(policy, inputs, policy_arrays("pi05_a/outputs.npz"), grads=False)
    assert policy.settings["style"] == ("lerobot" if layout == "lerobot" else "openpi")
    if layout != "rlinf_pt":
        assert list(policy.statistics) == [{"lerobot": "lerobot", "rlinf": "physical-intelligence/pick_and_place_real"}[layout]]
        actions = policy_actions(2, 4)
        assert (policy.unnormalize(policy.normalize(actions)) - actions).abs().max() < 1e-5
    policy.save(tmp_path / "again")
    assert policy_same_state(policy, policies.load_policy(tmp_path / "again"))


@policy_needs_fixtures
def test_pi05_full_size_keys():
    expected = json.loads((POLICY_FIXTURES / "pi05_full_keys.json").read_text())
    policy = policies.build({"type": "pi05", "action_dim": 32, "action_horizon": 50})
    ours = {key: list(tensor.shape) for key, tensor in policy.official_tensors().items()}
    assert ours == expected and len(ours) == 812
    policies.load_tensors(policy, {key: torch.empty(shape, device="meta") for key, shape in expected.items()}, "meta")


@policy_needs_fixtures
def test_pi05_preprocessing_matches_official():
    ref = policy_arrays("pi05_preproc/preproc.npz")
    policy = policies.make_tiny("pi05", discrete_state=True)
    policy.action_dim = 32
    policy.statistics = {"x": {"action": dict(q01=ref["q01"], q99=ref["q99"]), "state": dict(q01=ref["q01"], q99=ref["q99"])}}
    for style in ("openpi", "lerobot"):
        policy.settings["style"] = style
        offset, scale, base = policy.affine("state")
        assert policy_gap((torch.from_numpy(ref["state"]) - offset) / scale + base, ref[f"{style}_state_norm"]) < 1e-9
        model = torch.from_numpy(ref["model_actions"])
        assert policy_gap(policy.unnormalize(model), ref[f"{style}_actions_unnorm"][..., :7]) < 1e-6
        actions = torch.from_numpy(ref["actions"])
        assert (policy.unnormalize(policy.normalize(actions)) - actions).abs().max() < 1e-5
    policy.settings["style"] = "openpi"
    assert (policy.state_bins(ref["state"]) == ref["state_bins"]).all()
    policy.statistics["x"]["state"] = dict(mean=np.zeros(1), std=np.full(1, 1 - 1e-6))      # the identity
    policy.settings["norm"] = "mean_std"
    assert (policy.state_bins(ref["edge_values"][:, None])[:, 0] == ref["edge_bins"]).all()
    policy.settings["delta_mask"] = ref["delta_mask"].tolist()
    actions, state = torch.from_numpy(ref["actions"]), ref["state"]
    assert policy_gap(actions - policy.reference(state), ref["delta_actions"]) < 1e-9
    assert policy_gap(torch.from_numpy(ref["delta_actions"]) + policy.reference(state), ref["absolute_actions"]) < 1e-9
    for name in ("img_wide", "img_tall"):
        for size in (56, 224):
            ours = policies.resize_with_pad(ref[name][None], size, "openpi")[0]
            assert (np.rint((ours + 1) / 2 * 255) == ref[f"{name}_openpi_pil_{size}"]).all()
        for key in ("openpi_torch", "lerobot"):
            assert policy_gap(policies.resize_with_pad(ref[name][None], 56, "lerobot")[0], ref[f"{name}_{key}_56"]) < 1e-5


@policy_needs_fixtures
def test_pi05_prompts_match_official():
    prompts = json.loads((POLICY_FIXTURES / "pi05_preproc/prompts.json").read_text())
    ref = policy_arrays("pi05_preproc/preproc.npz")
    policy, calls = policies.make_tiny("pi05"), []
    policy.encode = lambda text: calls.append(text) or [7]
    ids, mask = policy.prompt([prompts["stateless"]["task"]])
    assert calls == [text for text, _ in prompts["stateless"]["encode_calls"]] and ids.tolist() == [[2, 7, 7]]
    policy.settings["discrete_state"], calls[:] = True, []
    policy.statistics = {"x": {"state": dict(q01=ref["q01"], q99=ref["q99"])}}
    policy.prompt([row["task"] for row in prompts["with_state"]], ref["state"])
    assert calls == [row["prompt"] for row in prompts["with_state"]]


# ---- oracles beyond the fixtures -----------------------------------------------------------------------------------

def test_decoder_equals_transformers_llama():
    """Left-padded, 256 image tokens: our decoder against LlamaForCausalLM with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config = json.loads(json.dumps(policies.TINY["openvla"]))
    config["image_sizes"] = [224, 224]
    for part in config["tiny_timm_kwargs"].values():
        part["patch_size"] = 14
    config["text_config"]["vocab_size"] = 500
    policy = policies.build(config)
    policies.init_weights(policy, 0)
    policy.tokenizer = policies.tiny_tokenizer("openvla")
    text = config["text_config"]
    llama = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in text.items() if k != "model_type"})).eval()
    assert llama.config.rms_norm_eps == 1e-6
    ours = policy.language_model.state_dict()
    llama.load_state_dict({k: v for k, v in ours.items()}, strict=True)
    images, texts = policy_batch(3, pixels=224)
    ids, mask = policy.prompt(texts)
    assert len(set(mask.sum(1).tolist())) == 3
    with torch.no_grad():
        features = policy.encode_images(images)
        assert features.shape == (3, 256, 160)
        hidden, valid, _ = policy.hidden(features, ids, mask)
        words = llama.model.embed_tokens(ids)
        x = torch.cat([words[:, :1], policy.project(features), words[:, 1:]], 1)
        theirs = llama(inputs_embeds=x, attention_mask=valid.long(), position_ids=valid.cumsum(1) - 1).logits
    assert (policy.logits(hidden) - theirs)[valid].abs().max() < 2e-5


def test_vlm_equals_transformers_gemma(policy_pair):
    from transformers import GemmaConfig, GemmaModel
    policy = policy_pair["pi05"]
    vlm, vocab = policy.config["vlm"], policy.config["vocab_size"]
    gemma = GemmaModel(GemmaConfig(
        vocab_size=vocab, hidden_size=vlm["width"], intermediate_size=vlm["mlp_dim"], num_hidden_layers=vlm["depth"],
        num_attention_heads=vlm["num_heads"], num_key_value_heads=vlm["num_kv_heads"], head_dim=vlm["head_dim"])).eval()
    policy = copy.deepcopy(policy)
    for name, p in policy.language_model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, std=0.3)
    gemma.load_state_dict(policy.language_model.state_dict(), strict=False)
    x = torch.randn(2, 9, vlm["width"])
    with torch.no_grad():
        ours = policy.language_model(x, torch.arange(9).expand(2, -1), torch.ones(2, 1, 1, 9, dtype=torch.bool))[0]
        theirs = gemma(inputs_embeds=x, attention_mask=torch.zeros(2, 1, 9, 9)).last_hidden_state
    assert (ours - theirs).abs().max() < 2e-5


# ---- the contract ------------------------------------------------------------------------------------------------------

POLICY_SAMPLERS = [("openvla", {}), ("openvla", dict(temperature=0.6)), ("pi05", {}), ("pi05", dict(sampler="flow_sde")),
                   ("pi05", dict(steps=3, chunk=2, horizon=5)), ("pi05", dict(sampler="flow_sde", steps=1))]


@pytest.mark.parametrize("size", [1, 17])
@pytest.mark.parametrize("name, settings", POLICY_SAMPLERS)
def test_act_and_evaluate_agree(name, settings, size):
    policy = policy_shaken(policies.make_tiny(name, seed=3, **settings))
    images, texts = policy_batch(size)
    decision = policy.act(images, texts, generator=policy_generator(5))
    logp, entropy, value = policy.evaluate(images, texts, decision.trace)
    chunk = 1 if name == "openvla" else policy.settings["chunk"]
    assert decision.actions.shape == (size, chunk, 7) and decision.actions.dtype == torch.float32
    assert logp.dtype == entropy.dtype == value.dtype == torch.float32 and logp.shape == entropy.shape == value.shape == (size,)
    assert logp.requires_grad and not decision.logp.requires_grad
    assert (logp - decision.logp).abs().max() < 1e-4 and (value - decision.value).abs().max() < 1e-4
    order = torch.randperm(size)                                 # minibatches shuffle: rows must not depend on each other
    shuffled = policy.evaluate(images[order.numpy()], [texts[i] for i in order],
                               {key: part[order] for key, part in decision.trace.items()})
    assert (shuffled[0] - decision.logp[order]).abs().max() < 1e-4
    again = policy.act(images, texts, generator=policy_generator(5))
    assert torch.equal(again.actions, decision.actions) and torch.equal(again.logp, decision.logp)
    same = [policy.act(images, texts, deterministic=True, generator=policy_generator(7)).actions for _ in range(2)]
    assert torch.equal(*same)


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_batch_equals_single_runs(policy_pair, name):
    """Prompts of different lengths: what a row returns does not depend on its neighbours' padding."""
    policy = policy_pair[name]
    images, texts = policy_batch(5)
    decision = policy.act(images, texts, generator=policy_generator(0))
    for i in range(5):
        row = {key: part[i:i + 1] for key, part in decision.trace.items()}
        logp, _, value = policy.evaluate(images[i:i + 1], texts[i:i + 1], row)
        assert abs(logp.item() - decision.logp[i].item()) < 1e-4 and abs(value.item() - decision.value[i].item()) < 1e-4


def test_deterministic_pi05_has_no_density(policy_pair):
    images, texts = policy_batch(2)
    decision = policy_pair["pi05"].act(images, texts, deterministic=True)
    assert decision.trace["x"].shape[:2] == (2, 0) and (decision.logp == 0).all()
    logp, entropy, value = policy_pair["pi05"].evaluate(images, texts, decision.trace)
    assert (logp == 0).all() and (entropy == 0).all() and (value - decision.value).abs().max() < 1e-5


@pytest.mark.parametrize("steps, table", [(4, [.500, .433, .250, .144]), (3, [.5, .408, .204]),
                                          (10, [.5, .474, .316, .242, .194, .158, .129, .104, .079, .053])])
def test_flow_sde_step_sizes(steps, table):
    policy = policies.make_tiny("pi05", sampler="flow_sde", steps=steps)
    x = torch.randn(2, steps, 8, 8)
    v, h, step = torch.randn_like(x), torch.zeros(2, steps, 8, 96), torch.arange(steps).expand(2, -1)
    mean, std = policy.transition(x, v, h, step)
    assert np.abs(std[0, :, 0, 0].numpy() - table).max() < 6e-4
    for i in range(steps):           # drift of Flow-GRPO: v + sigma^2/(2t) (x + (1-t) v)
        t, d = 1 - i / steps, 1 / steps
        sigma = std[0, i, 0, 0] / d ** 0.5
        expected = x[:, i] - d * (v[:, i] + sigma ** 2 / (2 * t) * (x[:, i] + (1 - t) * v[:, i]))
        assert (mean[:, i] - expected).abs().max() < 1e-4


def policy_explicit_joint_logp(policy, images, texts, trace):
    """The definition, one denoising step after the other, with torch.distributions."""
    _, kv, valid = policy.observe(images, texts, None, None)
    chunk, steps = policy.settings["chunk"], policy.settings["steps"]
    terms = [torch.distributions.Normal(0., 1.).log_prob(trace["x"][:, 0])[:, :chunk, :7].sum((1, 2))]
    for i in range(steps):
        t, d, x = 1 - i / steps, 1 / steps, trace["x"][:, i]
        v, h = policy.velocity(x[:, None], torch.full((len(x), 1), t), kv, valid)
        low, high = policy.settings["noise_std"]
        log_var = math.log(low ** 2) + (math.log(high ** 2) - math.log(low ** 2)) * (policy.noise_head(h[:, 0]).tanh() + 1) / 2
        normal = torch.distributions.Normal(x - d * v[:, 0], (log_var / 2).exp())
        terms.append(normal.log_prob(trace["x_next"][:, i])[:, :chunk, :7].sum((1, 2)))
        if i + 1 < steps:
            assert torch.equal(trace["x_next"][:, i], trace["x"][:, i + 1])
    return torch.stack(terms, 1).sum(1) / (steps + 1)


def policy_logp_oracle(policy):
    images, texts = policy_batch(3)
    decision = policy.act(images, texts, generator=policy_generator(0))
    with torch.no_grad():
        expected = policy_explicit_joint_logp(policy, images, texts, decision.trace)
    return bool((decision.logp - expected).abs().max() < 1e-4)


def test_joint_logp_is_the_explicit_sum(policy_pair):
    assert policy_logp_oracle(policy_pair["pi05"])
    images, texts = policy_batch(3)
    decision = policy_pair["pi05"].act(images, texts)
    entropy = policy_pair["pi05"].evaluate(images, texts, decision.trace)[1]
    low, high = ((1.4189385 * 5 + 4 * math.log(s)) / 5 for s in (0.08, 0.16))
    assert (entropy > low - 1e-4).all() and (entropy < high + 1e-4).all()


def test_flow_noise_moments_match_the_formula():
    """6,000 transitions from one state: empirical mean and std of x' against mean and std of the formula."""
    policy = policy_shaken(policies.make_tiny("pi05", steps=1))
    images, texts = policy_batch(1)
    features, observe = policy.encode_images(images).detach().expand(3000, -1, -1, -1), policy.observe
    hidden, kv, valid = observe(features[:1], texts, None, None)             # the prefix once: all rows are the same
    expanded = (hidden.expand(3000, -1, -1), [(k.expand(3000, -1, -1, -1), v.expand(3000, -1, -1, -1)) for k, v in kv],
                valid.expand(3000, -1))
    policy.observe = lambda *args: expanded
    start = torch.randn(1, 1, 8, 8, generator=policy_generator(0))
    draws = []
    original = torch.randn
    for seed in range(2):
        generator = policy_generator(seed)
        calls = []
        torch.randn = lambda shape, **kw: (calls.append(1), start.expand(shape) if len(calls) == 1 else
                                           original(shape, generator=generator))[1]
        try:
            trace = policy.act(features, texts * 3000).trace
        finally:
            torch.randn = original
        draws.append(trace["x_next"][:, 0])
    draws = torch.cat(draws)
    v, h = policy.velocity(start, torch.ones(1, 1), kv, valid)
    mean, std = policy.transition(start, v, h, torch.zeros(1, 1, dtype=torch.long))
    error = (draws.mean(0) - mean[0, 0]) / (std[0, 0] / len(draws) ** 0.5)
    assert error.abs().max() < 4.5                               # 64 z-scores
    assert (draws.std(0) / std[0, 0] - 1).abs().max() < 4.5 / (2 * len(draws)) ** 0.5


def test_token_frequencies_match_the_softmax(policy_pair):
    """Chi-square of 12,000 first tokens against the probabilities, temperature 0.5; tokens of which fewer than 5 are
    expected count as one: alone each is far from normally distributed."""
    policy = policies.make_tiny("openvla", temperature=0.5)
    with torch.no_grad():
        policy.language_model["lm_head"].weight *= 8
    images, texts = policy_batch(1)
    features, hidden_of_one = policy.encode_images(images).detach(), policy.hidden

    def hidden_of_2000(features, ids, mask):                     # the prompt once: all rows are the same
        hidden, valid, kv = hidden_of_one(features[:1], ids[:1], mask[:1])
        return (hidden.expand(2000, -1, -1), valid.expand(2000, -1),
                [(k.expand(2000, -1, -1, -1), v.expand(2000, -1, -1, -1)) for k, v in kv])
    policy.hidden = hidden_of_2000
    counts = torch.zeros(256)
    for seed in range(6):
        tokens = policy.act(features.expand(2000, -1, -1), texts * 2000, generator=policy_generator(seed)).trace["tokens"]
        counts += torch.bincount(tokens[:, 0] - (policy.vocab - 256), minlength=256)
    with torch.no_grad():
        probs = policy.action_log_probs(hidden_of_one(features, *policy.prompt(texts))[0][:, -1])[0].exp()
    assert probs.max() > 3 / 256, "too flat to tell anything"
    often = 12000 * probs >= 5
    pool = lambda x: torch.cat([x[often], x[~often].sum()[None]])      # noqa: E731
    chi2, freedom = ((pool(counts) - 12000 * pool(probs)) ** 2 / (12000 * pool(probs))).sum().item(), int(often.sum())
    assert freedom > 30 and abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), (chi2, freedom)


def test_openvla_logp_is_the_softmax_over_256(policy_pair):
    policy = policy_pair["openvla"]
    images, texts = policy_batch(4)
    decision = policy.act(images, texts)
    tokens = decision.trace["tokens"]
    assert tokens.shape == (4, 7) and tokens.min() >= policy.vocab - 256 and tokens.max() < policy.vocab
    hidden = policy.hidden(policy.encode_images(images), *policy.prompt(texts), tokens[:, :-1])[0][:, -7:]
    allowed = torch.full((policy.vocab + 64,), -math.inf)
    allowed[policy.vocab - 256:policy.vocab] = 0
    full = torch.distributions.Categorical(logits=policy.logits(hidden).detach() + allowed)
    assert (full.log_prob(tokens).sum(1) - decision.logp).abs().max() < 1e-4


# ---- losses ------------------------------------------------------------------------------------------------------------

def test_bc_loss_starts_at_its_theoretical_value():
    images, texts = policy_batch(32)
    actions = policy_actions(32)
    openvla = policies.make_tiny("openvla")
    vocab = openvla.config["text_config"]["vocab_size"]
    assert abs(openvla.bc_loss(images, texts, actions[:, :1]).item() - math.log(vocab)) < 0.15
    pi05 = policies.make_tiny("pi05")
    expected = 1 + pi05.normalize(actions)[..., :7].square().mean().item()
    losses = [pi05.bc_loss(images, texts, actions, generator=policy_generator(i)).item() for i in range(20)]
    assert abs(np.mean(losses) - expected) < 0.1, (np.mean(losses), expected)


@pytest.mark.parametrize("name, steps, rate, goal", [("openvla", 120, 2e-3, 0.05), ("pi05", 360, 3e-3, 0.06)])
def test_bc_loss_overfits_eight_samples(name, steps, rate, goal):
    policy = policies.make_tiny(name)
    images, texts = policy_batch(8)
    actions = policy_actions(8, policy.settings.get("horizon", 1))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, start, losses = {} if name == "openvla" else dict(generator=policy_generator(0)), time.perf_counter(), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = policy.bc_loss(images, texts, actions, **generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert np.mean(losses[-30:]) < goal and time.perf_counter() - start < 60, np.mean(losses[-30:])
    chunk = policy.act(images, texts, deterministic=True).actions
    reach = torch.tensor([0.05] * 3 + [0.25] * 3 + [1.0])
    assert ((chunk - actions[:, :chunk.shape[1]]) / reach).abs().mean() < 0.12


def test_pi05_padding_is_not_learned(policy_pair):
    policy = policy_pair["pi05"]
    images, texts = policy_batch(4)
    actions, pad = policy_actions(4), torch.zeros(4, 8, dtype=torch.bool)
    pad[:, 5:] = True
    _, kv, valid = policy.observe(images, texts, None, None)
    loss = policy.bc_loss(images, texts, actions, pad, generator=policy_generator(0))
    noise = torch.randn(4, 8, 8, generator=policy_generator(0))
    generator = policy_generator(0)
    torch.randn(4, 8, 8, generator=generator)
    t = 0.001 + 0.999 * torch.rand(4, generator=generator) ** (1 / 1.5)
    expected = policy.flow_loss(kv, valid, policy.normalize(actions), noise, t)[:, :5, :7].mean()
    assert abs(loss.item() - expected.item()) < 1e-5
    openvla = policy_pair["openvla"]
    pad = torch.tensor([[True], [False], [False], [False]])
    part = openvla.bc_loss(images, texts, actions[:, :1], pad)
    assert abs(part.item() - openvla.bc_loss(images[1:], texts[1:], actions[1:, :1]).item()) < 1e-5


def test_flow_time_is_beta():
    """t = 0.001 + 0.999 Beta(1.5, 1), read off the calls of bc_loss."""
    policy, seen = policies.make_tiny("pi05"), []
    images, texts = policy_batch(1)
    features = policy.encode_images(images).detach().expand(2000, -1, -1, -1)
    policy.observe = lambda *args: (None, None, None)            # the prefix pass has no part in it
    policy.flow_loss = lambda kv, valid, actions, noise, t: (seen.append(t), noise)[1]
    policy.bc_loss(features, texts * 2000, policy_actions(2000), generator=policy_generator(0))
    t = seen[0].double()
    assert t.min() >= 0.001 and t.max() <= 1 and abs(t.mean().item() - (0.001 + 0.999 * 0.6)) < 0.02
    assert abs(((t - 0.001) / 0.999).square().mean().item() - 3 / 7) < 0.02          # E[x^2] of Beta(1.5, 1)


# ---- vision features, cameras, precision --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_cached_features_stand_for_images(policy_pair, name):
    policy = policy_pair[name]
    images, texts = policy_batch(3)
    features = policy.encode_images(images)
    a = policy.act(images, texts, generator=policy_generator(0))
    b = policy.act(features, texts, generator=policy_generator(0))
    assert torch.equal(a.actions, b.actions) and torch.equal(a.logp, b.logp)
    for x, y in zip(policy.evaluate(images, texts, a.trace), policy.evaluate(features, texts, a.trace)):
        assert torch.equal(x, y)
    assert torch.equal(policy.prompt_hidden(images, texts), policy.prompt_hidden(features, texts))
    assert policy.prompt_hidden(images, texts).shape == (3, 128)


@pytest.mark.parametrize("name", ["openvla", "pi05"])
@pytest.mark.parametrize("freeze", ["vision", "vlm"])
def test_freezing(tmp_path, name, freeze):
    policies.make_tiny(name).save(tmp_path / "p")
    policy = policies.load_policy(tmp_path / "p", freeze=freeze)
    images, texts = policy_batch(2)
    assert not policy.encode_images(images).requires_grad
    decision = policy.act(images, texts)
    logp, entropy, value = policy.evaluate(images, texts, decision.trace)
    (logp.sum() + value.sum() if logp.requires_grad else value.sum()).backward()
    frozen = policy.vision if freeze == "vision" else policy.vlm
    for key, p in policy.named_parameters():
        assert p.requires_grad != key.startswith(frozen), key
        assert p.grad is None or not key.startswith(frozen), key
    assert all(p.grad is not None for key, p in policy.named_parameters() if key.startswith("value_head"))


def test_pi05_missing_cameras_cost_nothing_and_change_nothing(policy_pair):
    policy, seen = policy_pair["pi05"], []
    images, texts = policy_batch(3)
    three = np.stack([images, *(policy_batch(3, seed=s)[0] for s in (1, 2))], 1)
    mask = torch.tensor([[True, False, False]] * 3)
    handle = policy.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    one = policy.act(images, texts, generator=policy_generator(0))
    masked = policy.act(three, texts, generator=policy_generator(0), camera_mask=mask)
    handle.remove()
    assert seen == [3, 3] and torch.equal(one.actions, masked.actions)
    mixed = torch.tensor([[True, False, False], [True, True, False], [True, True, False]])
    both = policy.act(three, texts, generator=policy_generator(0), camera_mask=mixed)
    assert (both.actions[0] - one.actions[0]).abs().max() < 1e-5
    logp, _, value = policy.evaluate(three, texts, both.trace, camera_mask=mixed)
    assert (logp - both.logp).abs().max() < 1e-4 and (value[0] - one.value[0]).abs() < 1e-4
    assert (value[1] - one.value[1]).abs() > 1e-5, "a second camera must matter"


def test_value_reads_valid_tokens_only(policy_pair):
    policy = policy_pair["pi05"]
    images, texts = policy_batch(3)
    alone = policy.act(images[:1], texts[:1]).value
    with_longer = policy.act(images, texts).value[:1]
    assert (alone - with_longer).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_bfloat16_is_autocast_over_float32(tmp_path, name):
    policy_shaken(policies.make_tiny(name)).save(tmp_path / "p")
    policy, exact = policies.load_policy(tmp_path / "p", dtype="bfloat16"), policies.load_policy(tmp_path / "p")
    images, texts = policy_batch(4)
    decision = policy.act(images, texts, generator=policy_generator(0))
    logp, entropy, value = policy.evaluate(images, texts, decision.trace)
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    assert decision.logp.dtype == decision.value.dtype == logp.dtype == value.dtype == torch.float32
    assert (logp - decision.logp).abs().max() < 0.3
    (logp.mean() + value.mean()).backward()
    reference = exact.evaluate(images, texts, decision.trace)
    assert 0 < (logp - reference[0]).abs().max() < 0.5 and (value - reference[2]).abs().max() < 0.1


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, name):
    policy_shaken(policies.make_tiny(name)).save(tmp_path / "p")
    images, texts = policy_batch(3)
    decision, grads = policies.load_policy(tmp_path / "p").act(images, texts, generator=policy_generator(0)), []
    for on in (False, True):
        policy = policies.load_policy(tmp_path / "p", gradient_checkpointing=on)
        logp, entropy, value = policy.evaluate(images, texts, decision.trace)
        (logp.mean() + entropy.mean() + value.mean()).backward()
        grads.append({key: p.grad for key, p in policy.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all((grads[0][key] - grads[1][key]).abs().max() < 1e-5 for key in grads[0])


# ---- statistics, tokens, prompts ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_statistics_round_trip(tmp_path, name):
    policy, rng = policies.make_tiny(name), np.random.default_rng(0)
    q01, q99 = -rng.uniform(0.01, 0.2, 7), rng.uniform(0.01, 0.2, 7)
    q01[3] = q99[3] = 0.0                                        # a rotation that never happened
    q01[6], q99[6] = 1.0, 1.0                                    # a gripper that stayed open
    policy.set_statistics("lab", {"action": {"q01": q01, "q99": q99}, "state": {"q01": q01, "q99": q99}})
    action = policy.stats["action"]
    assert action["q99"][3] - action["q01"][3] == pytest.approx(1e-3) and action["q01"][:3] == q01[:3].tolist()
    inside = torch.tensor(q01 + (q99 - q01) * rng.uniform(0, 1, (16, 7)), dtype=torch.float32)
    if name == "openvla":
        back = policy.to_actions(policy.to_tokens(inside))[:, 0]
        bin_width = torch.tensor((np.array(action["q99"]) - action["q01"]) / 255)
        bin_width[6] = 2 / 255
        assert ((back - inside).abs() <= bin_width * 1.01).all()
        close_open = torch.tensor([[0.] * 6 + [-1.], [0.] * 6 + [1.]])
        assert (policy.to_actions(policy.to_tokens(close_open))[:, 0, 6] - torch.tensor([-1., 1.])).abs().max() < 0.005
    else:
        assert (policy.unnormalize(policy.normalize(inside[:, None]))[:, 0] - inside).abs().max() < 1e-6
    policy.save(tmp_path / "p")
    assert policies.load_policy(tmp_path / "p").statistics == policy.statistics


def test_official_gripper_zero_to_one(policy_pair):
    policy = copy.deepcopy(policy_pair["openvla"])
    policy.statistics = {"bridge_orig": {"action": dict(q01=[-.03] * 6 + [0.], q99=[.03] * 6 + [1.], mask=[True] * 6 + [False])}}
    actions = torch.tensor([[0.] * 6 + [g] for g in (-1., 0., 1.)])
    ids = policy.to_tokens(actions)
    assert np.abs(policy.decode_tokens(ids)[:, 6] - [0, .5, 1]).max() < 0.005      # as the official model writes it
    assert (policy.to_actions(ids)[:, 0, 6] - actions[:, 6]).abs().max() < 0.01


def test_tiny_tokenizers_have_the_official_structure(policy_pair):
    policy = policy_pair["openvla"]
    ids, mask = policy.prompt(["Open the DRAWER", "zap qux 42"])
    vocab = policy.tokenizer.get_vocab()
    assert policy.tokenizer.get_vocab_size() == policy.vocab and (ids[:, 0] == vocab["<s>"]).all() and vocab["<s>"] == 1
    assert (ids[:, -1] == vocab["▁"]).all() and vocab["</s>"] == policy.eos == 2 and mask[:, 0].all()
    assert all(vocab[chr(0xE000 + i)] == policy.vocab - 256 + i for i in range(256))
    assert vocab["<unk>"] not in ids[0].tolist() + ids[1].tolist()
    text = policy.tokenizer.decode(ids[0, 1:].tolist(), skip_special_tokens=False).replace(" ", "").replace("▁", " ")
    assert text.strip() == "In: What action should the robot take to open the drawer?\nOut:"
    policy.encode = lambda text: [5, vocab["▁"]]                  # a tokenizer that already ends in the lone space
    assert policy.prompt(["x"])[0].tolist() == [[1, 5, vocab["▁"]]]
    del policy.encode
    assert policy_pair["pi05"].prompt(["open_the drawer"])[0][0, 0] == 2


def test_images_of_other_sizes_are_resized(policy_pair):
    images, texts = policy_batch(2, pixels=80)
    for policy in policy_pair.values():
        assert policy.act(images[:, :60], texts).actions.shape[0] == 2
    crop = policies.make_tiny("openvla", center_crop=True)
    small = policies.center_crop_90(policies.resize_lanczos3(images, 64), 64)
    assert torch.equal(crop.pixels(torch.from_numpy(images)), policy_pair["openvla"].pixels(torch.from_numpy(small)))


def test_discrete_state_prompt_matters():
    policy = policies.make_tiny("pi05", discrete_state=True)
    reach = [1.0] * 8
    policy.set_statistics("lab", {"action": {"q01": [-1] * 7, "q99": [1] * 7}, "state": {"q01": [-1] * 8, "q99": reach}})
    images, texts = policy_batch(2)
    state = np.zeros((2, 8), np.float32)
    a = policy.act(images, texts, state=state, generator=policy_generator(0))
    b = policy.act(images, texts, state=state + 0.5, generator=policy_generator(0))
    assert (a.value - b.value).abs().min() > 1e-6
    assert (policy.evaluate(images, texts, a.trace, state=state)[0] - a.logp).abs().max() < 1e-4
    with pytest.raises(ValueError, match="state: got None"):
        policy.act(images, texts)


# ---- checkpoints -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["openvla", "pi05"])
@pytest.mark.parametrize("rank", [0, 4])
def test_save_and_load_give_identical_actions(tmp_path, name, rank):
    policies.make_tiny(name, seed=1).save(tmp_path / "a")
    settings = dict(temperature=0.7) if name == "openvla" else dict(steps=3, sampler="flow_sde")
    policy = policies.load_policy(tmp_path / "a", lora_rank=rank, **settings)
    with torch.no_grad():
        for key, p in policy.named_parameters():
            p += 0.02 * torch.randn(p.shape, generator=policy_generator(2))
    policy.save(tmp_path / "b")
    again = policies.load_policy(tmp_path / "b")
    assert policy_same_state(policy, again) and again.settings == json.loads(json.dumps(policy.settings))
    images, texts = policy_batch(3)
    a = policy.act(images, texts, generator=policy_generator(0))
    b = again.act(images, texts, generator=policy_generator(0))
    assert torch.equal(a.actions, b.actions) and torch.equal(a.logp, b.logp) and torch.equal(a.value, b.value)
    assert {key for key, p in policy.named_parameters() if p.requires_grad} == {
        key for key, p in again.named_parameters() if p.requires_grad}
    again.save(tmp_path / "b")                                   # saving over itself is fine
    keys = load_file(tmp_path / "b" / "model.safetensors").keys()
    assert not any("value_head" in key or "lora" in key for key in keys)
    stem = "vision_backbone.featurizer." if name == "openvla" else "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
    assert any(key.startswith(stem) for key in keys)


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_lora_merged_and_apart_agree(tmp_path, name):
    policy_shaken(policies.make_tiny(name)).save(tmp_path / "base")
    policy = policies.load_policy(tmp_path / "base", lora_rank=4, lora_alpha=8)
    images, texts = policy_batch(3)
    before = policies.load_policy(tmp_path / "base").act(images, texts, generator=policy_generator(0))
    assert torch.equal(before.actions, policy.act(images, texts, generator=policy_generator(0)).actions), "B = 0 at the start"
    generator = policy_generator(0)
    with torch.no_grad():
        for module in policies.lora_modules(policy).values():
            module.lora_B.weight.normal_(std=0.05, generator=generator)
    apart = policy.evaluate(images, texts, before.trace)
    policies.save_lora(policy, tmp_path / "adapter", base="../base")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4
    keys = load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    assert all(re.fullmatch(r"base_model\.model\..*\.lora_[AB]\.weight", key) for key in keys)
    state = policies.load_policy(tmp_path / "base").official_tensors()
    assert {key.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for key in keys} <= set(state)
    policies.merge_lora(policy)
    merged = policy.evaluate(images, texts, before.trace)
    loaded = policies.load_policy(tmp_path / "adapter", merge=True)
    assert not policies.lora_modules(loaded) and not policies.lora_modules(policy)
    named = policies.load_policy(tmp_path / "base", adapter=tmp_path / "adapter")
    for i in (0, 2):
        assert (apart[i] - merged[i]).abs().max() < 1e-4 and (apart[i] - (before.logp, 0, before.value)[i]).abs().max() > 1e-4
        assert (loaded.evaluate(images, texts, before.trace)[i] - merged[i]).abs().max() < 1e-4
        assert (named.evaluate(images, texts, before.trace)[i] - apart[i]).abs().max() < 1e-5


def test_sharded_bfloat16_checkpoint(tmp_path):
    policy = policies.make_tiny("openvla")
    policy.save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = {key: value.bfloat16() for key, value in load_file(tmp_path / "b/model.safetensors").items()}
    tensors.update({"value_head.head_l1.weight": torch.zeros(2, 2), "proprio_projector.fc1.weight": torch.zeros(2, 2)})
    (tmp_path / "b/model.safetensors").unlink()
    keys, weight_map = list(tensors), {}
    for part in range(3):
        name = f"model-0000{part + 1}-of-00003.safetensors"
        save_file({key: tensors[key] for key in keys[part::3]}, tmp_path / "b" / name)
        weight_map.update({key: name for key in keys[part::3]})
    (tmp_path / "b/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = policies.load_policy(tmp_path / "b")
    expected = {key: value.bfloat16().float() for key, value in policy.official_tensors().items()}
    assert all(torch.equal(value, expected[key]) for key, value in loaded.official_tensors().items())
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    with pytest.raises(ValueError, match="another name"):
        loaded.save(tmp_path / "b")
    (tmp_path / "b" / name).unlink()
    with pytest.raises(ValueError, match="model-00003-of-00003"):
        policies.load_policy(tmp_path / "b")


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_saved_folder_has_what_other_loaders_read(tmp_path, name):
    """tokenizer_config.json lets AutoTokenizer read the folder; the official ones of a source folder are passed on."""
    from transformers import AutoTokenizer
    policy = policies.make_tiny(name)
    policy.save(tmp_path / "a")
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path / "a"), "In: What action should the robot take to x?\nOut:"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == ((1, 2) if name == "openvla" else (2, 1))
    assert tokenizer(text, add_special_tokens=False).input_ids == policy.encode(text)
    policies.write_json(tmp_path / "a/tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast"})
    policies.load_policy(tmp_path / "a").save(tmp_path / "b")
    assert json.loads((tmp_path / "b/tokenizer_config.json").read_text()) == {"tokenizer_class": "LlamaTokenizerFast"}


def test_openvla_processor_files_are_the_official_ones(tmp_path, policy_openvla_a):
    policy_openvla_a[0].save(tmp_path / "a")
    for name, left_out in (("generation_config.json", {"_from_model_config", "transformers_version"}),
                           ("preprocessor_config.json", {"tvf_crop_params", "tvf_do_letterbox", "tvf_letterbox_fill",
                                                         "tvf_normalize_params", "tvf_resize_params"})):
        ours, official = (json.loads((folder / name).read_text()) for folder in (tmp_path / "a", POLICY_FIXTURES / "openvla_a"))
        assert official.keys() - ours.keys() == left_out         # derived by the loader from the others
        assert all(official[key] == value for key, value in ours.items())


def test_wrong_tensors_are_all_listed(tmp_path):
    policies.make_tiny("openvla").save(tmp_path / "p")
    tensors = load_file(tmp_path / "p/model.safetensors")
    del tensors["projector.fc1.bias"], tensors["language_model.model.norm.weight"]
    tensors["projector.fc9.bias"] = torch.zeros(3)
    tensors["projector.fc2.bias"] = torch.zeros(5)
    save_file(tensors, tmp_path / "p/model.safetensors")
    with pytest.raises(ValueError) as caught:
        policies.load_policy(tmp_path / "p")
    for text in ("4 problems", "missing projector.fc1.bias", "missing language_model.model.norm.weight",
                 "unexpected projector.fc9.bias", "misshapen projector.fc2.bias: (5,), not (128,)"):
        assert text in str(caught.value)


# ---- errors ------------------------------------------------------------------------------------------------------------------

def policy_message(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    for word in ("got", "need", "try", *words):
        assert word in text, (word, text)
    return text


def test_errors_of_loading(tmp_path, monkeypatch):
    policy_message(lambda: policies.load_policy("opnvla"), "'opnvla'", "openvla", "pi05")
    monkeypatch.setitem(policies.BUNDLED, "openvla", tmp_path / "nowhere")
    policy_message(lambda: policies.load_policy("openvla"), "nowhere", "make_tiny")
    (tmp_path / "empty").mkdir()
    policy_message(lambda: policies.load_policy(tmp_path / "empty"), "config.json")
    policies.make_tiny("pi05").save(tmp_path / "p")
    policy_message(lambda: policies.load_policy(tmp_path / "p", sampler="flow_cps"), "flow_cps", "flow_noise")
    policy_message(lambda: policies.load_policy(tmp_path / "p", sampleer="x"), "sampleer", "sampler")
    policy_message(lambda: policies.load_policy(tmp_path / "p", chunk=9), "chunk")
    policy_message(lambda: policies.load_policy(tmp_path / "p", freeze="eyes"), "eyes", "vision")
    policy_message(lambda: policies.load_policy(tmp_path / "p", lora_rank=2, lora_targets=("nope",)), "nope")
    policy_message(lambda: policies.load_policy(tmp_path / "p", dtype="float16"), "float16")
    policy_message(lambda: policies.load_policy(tmp_path / "p", unnorm_key="mars").stats, "mars", "placeholder")
    policy_message(lambda: policies.make_tiny("tiny"), "openvla", "pi05")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: False)
    policy_message(lambda: policies.check_device("cuda", "bfloat16"), "bfloat16 on cuda", "float32")
    policy_message(lambda: policies.check_device("mps", "bfloat16"), "bfloat16 on mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    policy_message(lambda: policies.check_device("cuda", "float32"), "cuda", "cpu")
    weights = tmp_path / "p/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    policy_message(lambda: policies.load_policy(tmp_path / "p"), "model.safetensors", "downloading")
    weights.unlink()
    policy_message(lambda: policies.load_policy(tmp_path / "p"), "safetensors")
    (tmp_path / "p/config.json").write_text("{}")
    policy_message(lambda: policies.load_policy(tmp_path / "p"), "model_type")


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_errors_of_inputs(policy_pair, name):
    policy = policy_pair[name]
    images, texts = policy_batch(3)
    actions = policy_actions(3)
    policy_message(lambda: policy.act(images.astype(np.float32) / 255, texts), "float32", "uint8")
    nan = np.full((3, 64, 64, 3), np.nan, np.float32)
    policy_message(lambda: policy.act(nan, texts), "NaN")
    policy_message(lambda: policy.act(images[..., :2], texts), "(3, 64, 64, 2)")
    policy_message(lambda: policy.act(images[0], texts), "(64, 64, 3)")
    policy_message(lambda: policy.act(images, texts[:2]), "of 2", "3 non-empty")
    policy_message(lambda: policy.act(images, "open the drawer"), "str", "list")
    policy_message(lambda: policy.act(images, ["a", " ", "b"]), "[1]")
    policy_message(lambda: policy.bc_loss(images, texts, actions[..., :6]), "(3, 8, 6)", "gripper")
    policy_message(lambda: policy.bc_loss(images, texts, actions, torch.zeros(3, 3)), "pad", "(3, 8)")
    bad = actions.clone()
    bad[1, 0, 2] = math.nan
    policy_message(lambda: policy.bc_loss(images, texts, bad), "samples [1]")
    features = policy.encode_images(images).detach().clone()
    features.flatten()[0] = math.nan
    policy_message(lambda: policy.act(features, texts), "features", "NaN")
    text = policy_message(lambda: policy.bc_loss(images[..., :1], ["", "b"], actions[:2]), "images", "instructions", "actions")
    assert len(text.splitlines()) == 3, "all offenders at once"
    bare = copy.deepcopy(policy)
    bare.tokenizer = None
    policy_message(lambda: bare.act(images, texts), "tokenizer.json", bare.home)
    bare.statistics = {}
    policy_message(lambda: bare.stats, "set_statistics")
    bare.statistics = {"a": policy.stats, "b": policy.stats}
    policy_message(lambda: bare.stats, "'a', 'b'")
    policy_message(lambda: bare.set_statistics("x", {"action": {"q01": [1] * 6, "q99": [1] * 6}}), "7 finite")


# ---- mutants: each broken formula must be noticed by an oracle above ------------------------------------------------------

def policy_mutant(owner, function, old, new):
    """Replace `old` by `new` in the source of owner.function and return the changed function."""
    source = inspect.getsource(getattr(owner, function))
    assert source.count(old) >= 1, f"the mutant no longer applies to {function}"
    source = "\n".join(line[4:] if line.startswith("    ") else line for line in source.replace(old, new).splitlines())
    space = dict(vars(policies))
    exec(source, space)
    return space[function]


def policy_ode_oracle(policy):
    """With flow_noise the mean of a step is x - d v, whatever x and v."""
    x, v = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    mean, std = policy.transition(x, v, torch.zeros(2, 4, 8, 96), torch.arange(4).expand(2, -1))
    return bool((mean - (x - v / 4)).abs().max() < 1e-5) and bool(((std > 0.08) & (std < 0.16)).all())


def policy_agreement_oracle(policy):
    images, texts = policy_batch(5)
    decision = policy.act(images, texts, generator=policy_generator(0))
    row = {key: part[:1] for key, part in decision.trace.items()}
    logp, _, value = policy.evaluate(images[:1], texts[:1], row)
    return bool((policy.evaluate(images, texts, decision.trace)[0] - decision.logp).abs().max() < 1e-4 and
                (logp - decision.logp[:1]).abs().max() < 1e-4 and (value - decision.value[:1]).abs().max() < 1e-4)


def policy_time_oracle(policy):
    t, half = torch.tensor([[0.3]], dtype=torch.float64), 48
    angle = 2 * math.pi * 0.3 / (4e-3 * 1000 ** (np.arange(half) / (half - 1)))
    e = torch.from_numpy(np.concatenate([np.sin(angle), np.cos(angle)])).float()
    expected = F.silu(policy.time_mlp_out(F.silu(policy.time_mlp_in(e))))
    return bool((policy.time_embedding(t)[0, 0] - expected).abs().max() < 1e-6)


def policy_tables_oracle(policy):
    ids = policy.encode_values(policies.BIN_CENTRES)
    good = np.allclose(policy.decode_tokens(ids), policies.BIN_CENTRES, atol=1e-9)
    return bool(good and policy.encode_values([1.0])[0] == policy.vocab - 256 and policy.encode_values([-1.0])[0] == policy.vocab - 1)


POLICY_MUTANTS = [
    ("pi05", "transition", "(x - t * v)", "(x + t * v)", policy_ode_oracle, "sign of the velocity"),
    ("pi05", "transition", "(x + (1 - t) * v)", "(x + t * v)", policy_ode_oracle, "noise end of the path"),
    ("pi05", "transition", "+ 1) / 2) / 2).exp()", "+ 1) / 2)).exp()", policy_ode_oracle, "log-variance taken as log-std"),
    ("pi05", "chain_logp", "- std.log() ", "", policy_logp_oracle, "normaliser of the Gaussian"),
    ("pi05", "chain_logp", "/ (x.shape[1] + 1)", "/ x.shape[1]", policy_logp_oracle, "mean over steps + 1 factors"),
    ("pi05", "chain_logp", "slice(ACTION_DIM)", "slice(None)", policy_logp_oracle, "padding dimensions in the likelihood"),
    ("pi05", "velocity", "(block[:, None] == block)", "(block[:, None] >= block)", policy_agreement_oracle, "chunks see others"),
    ("pi05", "velocity", "valid.sum(1, keepdim=True) + ", "valid.shape[1] + 0 * valid.sum(1, keepdim=True) + ",
     policy_agreement_oracle, "positions count the padding"),
    ("pi05", "pooled", " * valid[..., None]", "", policy_agreement_oracle, "value averages padding in"),
    ("pi05", "time_embedding", "return F.silu(self.time_mlp_out", "return (self.time_mlp_out", policy_time_oracle, "final silu"),
    ("pi05", "time_embedding", "[angle.sin(), angle.cos()]", "[angle.cos(), angle.sin()]", policy_time_oracle, "sines first"),
    ("openvla", "hidden", "valid.cumsum(1) - 1", "torch.arange(x.shape[1]).expand(len(x), -1)", policy_agreement_oracle,
     "positions count the padding"),
    ("openvla", "hidden", " & valid[:, None, None]", "", policy_agreement_oracle, "padding is attended"),
    ("openvla", "evaluate", "tokens[:, :-1]", "tokens[:, 1:]", policy_agreement_oracle, "teacher forcing off by one"),
    ("openvla", "act", "valid.sum(1, keepdim=True) - 1", "valid.sum(1, keepdim=True)", policy_agreement_oracle, "decode position"),
    ("openvla", "encode_values", "self.vocab - np", "self.vocab - 1 - np", policy_tables_oracle, "token ids shifted"),
    ("openvla", "decode_tokens", "- 1, 0, 254", "- 2, 0, 254", policy_tables_oracle, "bin centres shifted"),
]


@pytest.mark.parametrize("name, function, old, new, oracle, label", POLICY_MUTANTS, ids=[m[-1] for m in POLICY_MUTANTS])
def test_policy_mutants_die(name, function, old, new, oracle, label):
    policy = policy_shaken(policies.make_tiny(name, seed=2), seed=4)
    assert oracle(policy), "the oracle must accept the real code"
    mutant = policy_mutant(type(policy), function, old, new)
    setattr(policy, function, mutant.__get__(policy))
    assert not oracle(policy), f"nobody noticed: {label}"


# ---- the demo

def test_policies_demo_runs_and_checks_itself():
    start = time.perf_counter()
    run = subprocess.run([sys.executable, policies.__file__], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert time.perf_counter() - start < 40                      # 20 s on an idle core; test machines are shared
    assert all(word in run.stdout for word in ("openvla", "pi05", "evaluate", "agree"))


# ---------------------------------------------------------------------------------------------------- real_data

DATA_SOURCE = pathlib.Path(real_data.__file__)
DATA_TASKS = ("open the drawer", "close the drawer")


# -- toy data sets

def data_images(seed, length, size=16):
    """Smooth pictures that differ from frame to frame, so that a shifted or doubled frame is noticed."""
    y, x = np.mgrid[0:size, 0:size] / size
    t = (np.arange(length) * 23 + seed * 41)[:, None, None]
    return np.abs(np.stack([t + 120 * x, 3 * t + 90 * y, 150 - t + 60 * x * y], -1) % 400 - 200).astype(np.uint8)


def data_episode(number, length, size=16, action_dim=7):
    rng = np.random.default_rng(number)
    actions = rng.normal(0, .02, (length, action_dim)).astype(np.float32)
    actions[:, -1] = np.where(rng.random(length) < .5, -1, 1)
    return (data_images(number, length, size), rng.normal(size=(length, 8)).astype(np.float32), actions,
            DATA_TASKS[number % 2])


def data_write(folder, lengths=(6, 9, 5, 7), size=16):
    """A v3.0 set by the writer under test; returns its episodes."""
    episodes = [data_episode(number, length, size) for number, length in enumerate(lengths)]
    numbered = ((*episode, 100 + number) for number, episode in enumerate(episodes))
    real_data.write_dataset(folder, numbered, fps=10)
    return episodes


def data_mp4(path, images, fps=10, extra=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = imageio_ffmpeg.write_frames(str(path), images.shape[2:0:-1], fps=fps, codec="libx264", quality=None,
                                         macro_block_size=1, pix_fmt_out="yuv420p", output_params=["-g", "2", *extra])
    writer.send(None)
    for image in images:
        writer.send(np.ascontiguousarray(image))
    writer.close()


def data_png(image):
    import io
    out = io.BytesIO()
    Image.fromarray(image).save(out, "png")
    return out.getvalue()


def data_write_v21(folder, lengths=(6, 9, 5, 7), size=16, fps=10, chunks=2):
    """A v2.1 set as the format's description has it: `image` h264, `wrist_image` PNG bytes, `state`, `actions`."""
    episodes = [data_episode(number, length, size) for number, length in enumerate(lengths)]
    meta, start = folder / "meta", 0
    meta.mkdir(parents=True)
    rows = []
    for number, (images, states, actions, text) in enumerate(episodes):
        length, place = len(images), f"chunk-{number // chunks:03d}"
        data_mp4(folder / f"videos/{place}/image/episode_{number:06d}.mp4", images, fps)
        table = pa.table({
            "wrist_image": pa.array([dict(bytes=data_png(255 - image), path=f"{k}.png")
                                     for k, image in enumerate(images)]),
            "state": pa.array(states.tolist(), pa.list_(pa.float32(), 8)),
            "actions": pa.array(actions.tolist(), pa.list_(pa.float32())),           # variable-size list: as old sets
            "timestamp": pa.array((np.arange(length) / fps).astype(np.float32)),
            "frame_index": np.arange(length), "episode_index": np.full(length, number),
            "index": start + np.arange(length), "task_index": np.full(length, DATA_TASKS.index(text))})
        path = folder / f"data/{place}/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        rows.append(dict(episode_index=number, tasks=[text], length=length))
        start += length
    (meta / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (meta / "tasks.jsonl").write_text("".join(json.dumps(dict(task_index=k, task=text)) + "\n"
                                              for k, text in enumerate(DATA_TASKS)))
    picture = dict(shape=[size, size, 3], names=["height", "width", "channel"])
    scalar = {key: dict(dtype="int64", shape=[1], names=None)
              for key in ("frame_index", "episode_index", "index", "task_index")}
    (meta / "info.json").write_text(json.dumps(dict(
        codebase_version="v2.1", robot_type=None, fps=fps, total_episodes=len(lengths), total_frames=start,
        total_tasks=2, total_videos=len(lengths), total_chunks=2, chunks_size=chunks, splits=dict(train="0:4"),
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        features=dict(scalar, wrist_image=dict(picture, dtype="image"), image=dict(picture, dtype="video"),
                      state=dict(dtype="float32", shape=[8], names=None),
                      actions=dict(dtype="float32", shape=[7], names=None),
                      timestamp=dict(dtype="float32", shape=[1], names=None)))))
    return episodes


def data_decoded(path):
    """All frames of an mp4 by a second route: ffmpeg's whole output at once."""
    raw = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt",
                          "rgb24", "-fps_mode", "passthrough", "-"], capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, 16, 16, 3)


def data_fixture(name):
    root = os.environ.get("REFERENCE_FIXTURES")
    if not root or not (pathlib.Path(root) / name).exists():
        pytest.skip(f"set REFERENCE_FIXTURES to the folder that holds {name}")
    return pathlib.Path(root) / name


def data_all(demos):
    return demos.batch(np.arange(len(demos)))


# -- reading

def data_check_fixture(module, cache):
    """The reference data set against what the official reader returned for it."""
    folder, truth = data_fixture("lerobot_v30"), np.load(data_fixture("lerobot_v30_truth.npz"))
    for camera, frames in (("front", "decoded_cam0"), ("observation.images.wrist", "decoded_cam1")):
        batch = data_all(module.open_dataset(folder, None, 4, camera, action_dim=None, cache_dir=cache / camera))
        assert (batch["images"] == truth[frames]).all()
        assert (batch["actions"] == truth["action_chunk4"]).all() and batch["actions"].dtype == np.float32
        assert (batch["pad"] == truth["action_chunk4_is_pad"]).all()
        assert (batch["state"] == truth["state"]).all()
        assert batch["instructions"] == truth["task"].tolist()
    both = module.open_dataset(folder, None, 4, ["wrist", "front"], action_dim=None, cache_dir=cache)
    assert (data_all(both)["images"] == np.stack([truth["decoded_cam1"], truth["decoded_cam0"]], 1)).all()
    assert both.select([2, 0]).episodes.tolist() == [2, 0]
    assert (both.select([2, 0]).actions == truth["action"][np.r_[15:20, 0:6]]).all()


def test_data_v30_fixture_is_read_bit_exactly(tmp_path):
    data_check_fixture(real_data, tmp_path)


def test_data_v21_video_and_png(tmp_path):
    episodes = data_write_v21(tmp_path / "set")
    demos = real_data.open_dataset(tmp_path / "set", None, 3, ["image", "wrist_image"], cache_dir=tmp_path / "cache")
    batch = data_all(demos)
    videos = np.concatenate([data_decoded(path) for path in sorted((tmp_path / "set/videos").rglob("*.mp4"))])
    assert (batch["images"][:, 0] == videos).all()
    assert (batch["images"][:, 1] == np.concatenate([255 - episode[0] for episode in episodes])).all()
    assert (demos.actions == np.concatenate([episode[2] for episode in episodes])).all()
    assert (demos.states == np.concatenate([episode[1] for episode in episodes])).all()
    assert batch["instructions"] == [episode[3] for episode in episodes for _ in episode[0]]
    default = real_data.open_dataset(tmp_path / "set", None, cache_dir=tmp_path / "cache")
    assert default.recording.cameras == ["image"] and data_all(default)["images"].shape == (27, 16, 16, 3)   # not the wrist
    named = real_data.open_dataset(tmp_path / "set", None, cameras="image", action_key="state", state_key="actions",
                                   action_dim=8, cache_dir=tmp_path / "cache")
    assert (named.actions == demos.states).all() and (named.states == demos.actions).all()


def test_data_b_frames_come_in_display_order(tmp_path):
    data_write_v21(tmp_path / "set")
    path = tmp_path / "set/videos/chunk-000/image/episode_000001.mp4"
    data_mp4(path, data_images(1, 9), extra=("-bf", "3", "-g", "9"))
    demos = real_data.open_dataset(tmp_path / "set", None, cache_dir=tmp_path / "cache").select([1])
    assert np.abs(data_all(demos)["images"].astype(int) - data_images(1, 9)).mean() < 4


def test_data_windows_against_the_definition(tmp_path):
    data_write(tmp_path / "set")
    demos = real_data.open_dataset(tmp_path / "set", None, 4, cache_dir=tmp_path / "cache").select([3, 1])
    batch, lengths, k = data_all(demos), (7, 9), 0
    for number, length in zip((3, 1), lengths):
        actions = data_episode(number, length)[2]
        for t in range(length):
            for h in range(4):
                assert (batch["actions"][k, h] == actions[min(t + h, length - 1)]).all()
                assert batch["pad"][k, h] == (t + h >= length)
            k += 1
    assert k == len(demos)


def test_data_split_is_by_episode(tmp_path):
    data_write(tmp_path / "set", lengths=(3,) * 10)
    demos = real_data.open_dataset(tmp_path / "set", None, cache_dir=tmp_path / "cache")
    train, held = demos.split(.2, seed=1)
    assert len(held.episodes) == 2 and len(train) == 24
    assert sorted([*train.episodes, *held.episodes]) == list(range(10))
    assert (demos.split(.2, seed=1)[1].episodes == held.episodes).all()
    assert demos.split(0) == (demos, None)
    assert held.scenes.tolist() == (100 + held.episodes).tolist()
    for wrong in (1, -.1):
        with pytest.raises(ValueError, match="share below 1"):
            demos.split(wrong)
    with pytest.raises(ValueError, match=r"cannot select episodes \[3, 11\].*need one or more of \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\]"):
        demos.select([3, 11])


def test_data_without_pauses(tmp_path):
    """Left out: small motions with the gripper as before, in the middle of an episode; windows skip them too."""
    still, move, turn = np.zeros((3, 7), np.float32)
    still[:3], move[1], turn[4] = .0015, .01, .03               # norms: .0026 m, .01 m, .03 rad
    still[6] = move[6] = turn[6] = 1
    shut = -still
    plans = [[still, move, still, still, turn, shut, shut, move * [1, 1, 1, 1, 1, 1, -1]], [shut, shut, -move], [still]]
    kept = [[0, 1, 4, 5, 7], [0, 2], [0]]
    episodes = [(np.full((len(plan), 8, 8, 3), 40 * k, np.uint8), np.arange(len(plan) * 8.).reshape(-1, 8).astype(np.float32),
                 np.stack(plan).astype(np.float32), f"task {k}", k) for k, plan in enumerate(plans)]
    real_data.write_dataset(tmp_path / "set", iter(episodes), fps=5)
    whole = real_data.open_dataset(tmp_path / "set", None, 3, cache_dir=tmp_path / "cache")
    demos = whole.without_pauses(.003)
    assert demos.lengths.tolist() == [5, 2, 1] and len(demos) == 8 and len(whole) == 12
    batch, k = data_all(demos), 0
    for plan, rows, (images, states, _, text, _) in zip(plans, kept, episodes):
        for t, row in enumerate(rows):
            assert (batch["state"][k] == states[row]).all() and batch["instructions"][k] == text
            assert np.abs(batch["images"][k].astype(int) - images[row]).max() < 12           # the codec's error
            assert batch["pad"][k].tolist() == [t + h >= len(rows) for h in range(3)]
            assert (batch["actions"][k] == [plan[rows[min(t + h, len(rows) - 1)]] for h in range(3)]).all()
            k += 1
    same = whole.without_pauses(0)
    assert (same.rows == whole.rows).all() and (same.ends == whole.ends).all() and (same.actions == whole.actions).all()
    assert whole.without_pauses(.002).lengths.tolist() == [8, 3, 1]         # .0026 m is no pause by this measure


def test_data_resize_equals_the_official_pixels():
    truth = np.load(data_fixture("pi05_preproc") / "preproc.npz")
    for name in ("img_wide", "img_tall"):
        for size in (56, 224):
            assert (real_data.resize(truth[name], size, "pad") == truth[f"{name}_openpi_pil_{size}"]).all()
    image = truth["img_wide"]
    assert (real_data.resize(image, 32, "stretch") == np.asarray(
        Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))).all()
    square = image[:, :60]
    assert real_data.resize(square, 60, "pad") is square


# -- writing

def test_data_round_trip(tmp_path):
    episodes = data_write(tmp_path / "set", size=32)
    files = [len(list((tmp_path / "set").rglob(f"file-*.{kind}"))) for kind in ("parquet", "mp4")]
    assert files == [2, 1]                          # one of the parquet files is meta/episodes
    demos = real_data.open_dataset(tmp_path / "set", None, cache_dir=tmp_path / "cache")
    batch = data_all(demos)
    for key, column in (("images", 0), ("state", 1)):
        original = np.concatenate([episode[column] for episode in episodes])
        if key == "state":
            assert (batch[key] == original).all()
        else:
            assert np.abs(batch[key].astype(int) - original).mean() < 3 and batch[key].shape == original.shape
    assert (demos.actions == np.concatenate([episode[2] for episode in episodes])).all()
    assert demos.instructions.tolist() == [episode[3] for episode in episodes for _ in episode[0]]
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, 27, 2)
    table = pq.read_table(tmp_path / "set/meta/tasks.parquet")
    assert json.loads(table.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_data_writer_refuses_and_leaves_nothing(tmp_path):
    images, states, actions, text = data_episode(0, 6)
    bad = actions.copy()
    bad[2, 1] = np.nan
    with pytest.raises(ValueError) as error:
        real_data.write_dataset(tmp_path / "set", [(*data_episode(1, 6), -1), (images[:, :15], states[:5], bad, " ", -1)], 10)
    for part in ("episode 1", "images uint8", "observation.state", "action", "instruction missing"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="zero episodes"):
        real_data.write_dataset(tmp_path / "set", [], 10)

    def interrupted():
        yield images, states, actions, text, -1
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        real_data.write_dataset(tmp_path / "set", interrupted(), 10)
    assert list(tmp_path.iterdir()) == []
    data_write(tmp_path / "set")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="exists already"):
        real_data.write_dataset(tmp_path / "set", [(images, states, actions, text, -1)], 10)
    assert sorted(tmp_path.rglob("*")) == before


# -- bad data: every offender at once, nothing written

def data_edit(path, column, change):
    """Rewrites one column of a parquet file; change gets and returns a list."""
    table = pq.ParquetFile(path).read()
    values = change(table[column].to_pylist())
    place = table.column_names.index(column)
    kind = table.schema.field(column).type
    if pa.types.is_fixed_size_list(kind):
        kind = pa.list_(pa.float32())
    pq.write_table(table.set_column(place, column, pa.array(values, kind)), path)


def data_set(values, row, value):
    values[row] = value
    return values


def data_edit_json(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = value
    path.write_text(json.dumps(content))


def data_other_size(folder):
    data_mp4(folder / "videos/chunk-001/image/episode_000003.mp4", data_images(3, 7, 32))


def data_cut_video(folder):
    data_mp4(folder / "videos/chunk-000/image/episode_000001.mp4", data_images(1, 8))


def data_slow_video(folder):
    data_mp4(folder / "videos/chunk-000/image/episode_000001.mp4", data_images(1, 9), fps=9)


def data_rot_video(folder):
    path = folder / "videos/chunk-000/image/episode_000001.mp4"
    content = bytearray(path.read_bytes())
    start = content.find(b"mdat") - 4
    end = start + int.from_bytes(content[start:start + 4], "big")    # the last pictures lie just before
    content[end - 90:end] = b"\xff" * 90
    path.write_bytes(content)


V21_FILE = "data/chunk-000/episode_{:06d}.parquet"
V21_FAULTS = {
    "action size": (lambda f: data_edit(f / V21_FILE.format(1), "actions", lambda v: data_set(v, 3, [0.] * 6)),
                    "actions of another size.*: episode 1"),
    "nan": (lambda f: data_edit(f / V21_FILE.format(0), "actions", lambda v: data_set(v, 2, [0.] * 6 + [np.nan])),
            "non-finite actions: episode 0"),
    "inf state": (lambda f: data_edit(f / V21_FILE.format(1), "state", lambda v: data_set(v, 0, [np.inf] * 8)),
                  "non-finite states: episode 1"),
    "no video": (lambda f: (f / "videos/chunk-000/image/episode_000001.mp4").unlink(), "video file missing: episode 1"),
    "short video": (data_cut_video, "frames missing.*: episode 1"),
    "slow video": (data_slow_video, "timestamps out of tolerance.*: episode 1"),
    "rotten video": (data_rot_video, "cannot be decoded: episode 1"),
    "other size": (data_other_size, r"images of another size, \(32, 32\).*: episode 3"),
    "png size": (lambda f: data_edit(f / V21_FILE.format(0), "wrist_image", lambda v: data_set(
        v, 1, dict(bytes=data_png(data_images(0, 1, 8)[0]), path=""))), r"wrist_image: images of another size, \(8, 8\).*: episode 0"),
    "png cut": (lambda f: data_edit(f / V21_FILE.format(1), "wrist_image", lambda v: data_set(
        v, 1, dict(bytes=v[1]["bytes"][:60], path=""))), "wrist_image: frames that cannot be decoded: episode 1"),
    "png gone": (lambda f: data_edit(f / V21_FILE.format(1), "wrist_image", lambda v: data_set(
        v, 1, dict(bytes=None, path="x.png"))), "wrist_image: frames that cannot be decoded: episode 1"),
    "clock": (lambda f: data_edit(f / V21_FILE.format(1), "timestamp", lambda v: data_set(v, 4, .4003)),
              "timestamps out of tolerance: not 1/fps.*: episode 1"),
    "no rows": (lambda f: (f / V21_FILE.format(1)).unlink(), "data file.*missing.*: episode 1"),
    "lost row": (lambda f: pq.write_table(pq.read_table(f / V21_FILE.format(1)).slice(0, 8), f / V21_FILE.format(1)),
                 "rows missing.*: episode 1"),
    "no text": (lambda f: (f / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "open"}\n'),
                "instruction missing: episode 1, 3"),
    "blank text": (lambda f: (f / "meta/tasks.jsonl").write_text(
        '{"task_index": 0, "task": " "}\n{"task_index": 1, "task": "x"}\n'), "instruction missing: episode 0, 2"),
    "zero episodes": (lambda f: (f / "meta/episodes.jsonl").write_text(""), "zero episodes"),
    "version": (lambda f: data_edit_json(f / "meta/info.json", codebase_version="v9.1"), "unknown LeRobot version 'v9.1'"),
    "no meta": (lambda f: (f / "meta/info.json").unlink(), "info.json"),
    "no tasks": (lambda f: (f / "meta/tasks.jsonl").unlink(), "tasks.jsonl"),
}


@pytest.mark.parametrize("fault", V21_FAULTS)
def test_data_faults_are_named(tmp_path, fault):
    data_write_v21(tmp_path / "set")
    damage, message = V21_FAULTS[fault]
    damage(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        real_data.open_dataset(tmp_path / "set", 8, cameras=["image", "wrist_image"], cache_dir=tmp_path / "cache")
    left = list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else []
    assert [path for path in left if path.suffix != ".lock"] == []


def test_data_all_faults_in_one_message(tmp_path):
    data_write_v21(tmp_path / "set")
    for fault in ("nan", "action size", "clock", "other size", "no text", "no video"):
        V21_FAULTS[fault][0](tmp_path / "set")
    with pytest.raises(ValueError) as error:
        real_data.open_dataset(tmp_path / "set", 8, action_dim=5, cache_dir=tmp_path / "cache")
    for part in ("non-finite actions: episode 0", "actions of another size", "not 1/fps = 0.1 s apart: episode 1",
                 "(32, 32)", "instruction missing: episode 1, 3", "video file missing: episode 1", "size 7, need 5"):
        assert part in str(error.value), part
    assert not (tmp_path / "cache").exists()


def test_data_arguments_and_features_are_checked(tmp_path):
    data_write_v21(tmp_path / "set")
    for options, message in ((dict(cameras="front"), "unknown: .'front'"), (dict(action_key="a"), "no feature a for the actions"),
                             (dict(cameras=["image"] * 4), "need 1 to 3"), (dict(fit="crop"), "stretch or pad"),
                             (dict(horizon=0), "horizon"), (dict(action_dim=6), "size 7, need 6")):
        with pytest.raises(ValueError, match=message):
            real_data.open_dataset(tmp_path / "set", 8, cache_dir=tmp_path / "cache", **options)
    with pytest.raises(ValueError, match="no such folder"):
        real_data.open_dataset(tmp_path / "nothing", 8)


def test_data_hub_offline_says_how_to_download(monkeypatch):
    import huggingface_hub

    def offline(name, repo_type):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match="hf download some/robot-data --repo-type dataset --local-dir robot-data"):
        real_data.open_dataset("some/robot-data", 64)


def test_data_hub_id_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub
    data_write(tmp_path / "set")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, repo_type: str(tmp_path / "set"))
    assert len(real_data.open_dataset("some/robot-data", 8, cache_dir=tmp_path / "cache")) == 27


# -- the cache

def data_python(code, *args, **options):
    environment = dict(os.environ, PYTHONPATH=str(DATA_SOURCE.parent), OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def data_npy(cache):
    return sorted(path.name for path in cache.glob("*") if path.suffix != ".lock")


def test_data_cache_is_keyed_by_content_and_size(tmp_path, monkeypatch):
    data_write(tmp_path / "set")
    open_it = lambda size=8, **options: real_data.open_dataset(tmp_path / "set", size, cache_dir=tmp_path / "cache", **options)
    demos = open_it()
    first = data_npy(tmp_path / "cache")
    with monkeypatch.context() as patch:                             # a second opening decodes nothing
        patch.setattr(real_data, "fill_cache", lambda *_: pytest.fail("decoded again"))
        open_it()
    shutil.copytree(tmp_path / "set", tmp_path / "copy")             # the same data in another place: the same file
    real_data.open_dataset(tmp_path / "copy", 8, cache_dir=tmp_path / "cache")
    assert data_npy(tmp_path / "cache") == first and len(first) == 1
    open_it(10)
    open_it(10, fit="pad")
    assert len(data_npy(tmp_path / "cache")) == 3
    video = next((tmp_path / "set").rglob("*.mp4"))
    stat = video.stat()
    data_mp4(video, np.concatenate([data_images(9, 27)]))
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns))         # new content under the old date
    assert not (data_all(open_it())["images"] == data_all(demos)["images"]).all()
    assert len(data_npy(tmp_path / "cache")) == 4


def test_data_cache_two_builders_and_a_killed_one(tmp_path):
    data_write(tmp_path / "set", lengths=(40,) * 4, size=32)
    slow = ("import sys, time, real_data\nreal = real_data.resize\n"
            "def slow(*a):\n    print('building', flush=True); time.sleep(float(sys.argv[2])); return real(*a)\n"
            "real_data.resize = slow\n"
            "print(len(real_data.open_dataset(sys.argv[1] + '/set', 8, cache_dir=sys.argv[1] + '/cache')))")
    victim = data_python(slow, tmp_path, 5)
    victim.stdout.readline()
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert [name.split(".")[-1] for name in data_npy(tmp_path / "cache")] == ["part"]
    pair = [data_python(slow, tmp_path, .002) for _ in range(2)]
    outputs = [process.communicate() for process in pair]
    assert all(process.returncode == 0 for process in pair), outputs
    assert sum("building" in out for out, _ in outputs) == 1         # the other one waited for it
    assert [name.split(".")[-1] for name in data_npy(tmp_path / "cache")] == ["npy"]
    demos = real_data.open_dataset(tmp_path / "set", None, cache_dir=tmp_path / "cache2")
    small = real_data.open_dataset(tmp_path / "set", 8, cache_dir=tmp_path / "cache")
    assert (data_all(small)["images"][37] == real_data.resize(data_all(demos)["images"][37], 8, "stretch")).all()


def test_data_cache_full_disk_leaves_nothing(tmp_path, monkeypatch):
    data_write(tmp_path / "set")
    done = []

    def full(*_):
        done.append(1)
        if len(done) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(real_data.os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            real_data.open_dataset(tmp_path / "set", 8, cache_dir=tmp_path / "cache")
    assert data_npy(tmp_path / "cache") == []
    assert len(real_data.open_dataset(tmp_path / "set", 8, cache_dir=tmp_path / "cache")) == 27     # and later it works


def test_data_memory_stays_bounded(tmp_path):
    """Reads all of a 300 MB cache in random order, ten times: what was read must not stay in memory."""
    code = """
import sys, pathlib, numpy as np, real_data
path, n = sys.argv[1] + "/frames.npy", 2000
with open(path, "wb") as file:
    np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(n, 1, 224, 224, 3)))
    for _ in range(n):
        file.write(bytes(range(256)) * (224 * 224 * 3 // 256))
episodes = [real_data.Episode(e, 80, None, {}, -1, 80 * e, None, None, np.zeros((80, 7), np.float32),
                              np.zeros((80, 8), np.float32), ["open the drawer"] * 80) for e in range(n // 80)]
demos = real_data.Demos(real_data.Recording(pathlib.Path("."), {}, ["a"], {}, episodes, {}), path, 8)
sampler = real_data.MixSampler(None, demos, 0, 32)
def peak():
    return int(dict(line.split(":", 1) for line in open("/proc/self/status"))["VmHWM"].split()[0]) / 2**10
before = peak()
for _ in range(10 * n // 32):
    next(sampler)
print(peak() - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    out, error = data_python(code, tmp_path).communicate()
    assert float(out) < 60, error                                    # MB


# -- statistics

def test_data_statistics_are_exact():
    values = np.random.default_rng(0).normal(size=(1001, 7))
    stats = real_data.statistics(values)
    ordered = np.sort(values, 0)
    assert np.allclose(stats["q01"], ordered[10]) and np.allclose(stats["q99"], ordered[990])
    assert np.allclose(stats["std"], values.std(0)) and (stats["max"] == ordered[-1]).all()


def test_data_range_guard_names_the_dimension():
    actions = np.random.default_rng(0).normal(0, .02, (500, 7))
    actions[:, 3], actions[:, 6] = .25, 1
    with pytest.warns(UserWarning) as caught:
        stats = real_data.action_statistics(actions)
    assert [str(warning.message).split(":")[0] for warning in caught] == ["droll", "gripper"]
    assert np.allclose([stats["q01"][3], stats["q99"][3]], [.2495, .2505])
    assert (stats["q01"][6], stats["q99"][6]) == (-1, 1)
    normal = 2 * (actions - stats["q01"]) / (stats["q99"] - stats["q01"]) - 1
    assert np.allclose(normal[:, 3], 0) and np.allclose(normal[:, 6], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        real_data.action_statistics(np.random.default_rng(0).normal(0, .02, (500, 7)))


def test_data_official_statistics_formats(tmp_path):
    data_write(tmp_path / "set", lengths=(40, 30))
    demos = real_data.open_dataset(tmp_path / "set", 8, cache_dir=tmp_path / "cache")
    table, openpi = json.loads(json.dumps(real_data.policy_statistics([demos, demos.select([1])], "mine")))
    assert set(table["mine"]) == {"action", "proprio", "num_transitions", "num_trajectories"}
    assert (table["mine"]["num_transitions"], table["mine"]["num_trajectories"]) == (100, 3)
    assert set(table["mine"]["action"]) == {"mean", "std", "max", "min", "q01", "q99", "mask"}
    assert table["mine"]["action"]["mask"] == [True] * 6 + [False]
    pooled = np.concatenate([demos.actions, demos.select([1]).actions]).astype(float)
    assert np.allclose(table["mine"]["action"]["q99"], np.quantile(pooled, .99, axis=0))
    assert openpi["norm_stats"]["actions"]["q99"] == table["mine"]["action"]["q99"]
    openpi = real_data.policy_statistics([demos], "mine")[1]["norm_stats"]
    assert set(openpi) == {"state", "actions"} and set(openpi["actions"]) == {"mean", "std", "q01", "q99"}
    stored = json.loads((tmp_path / "set/meta/stats.json").read_text())
    assert np.allclose(stored["action"]["q01"], openpi["actions"]["q01"])


# -- the alpha sampler

def data_pair(tmp_path, sim_lengths=(5,) * 8, real_lengths=(4,) * 2):
    sets = []
    for name, lengths in (("sim", sim_lengths), ("real", real_lengths)):
        if not (tmp_path / name).exists():
            data_write(tmp_path / name, lengths=lengths)
        sets.append(real_data.open_dataset(tmp_path / name, 4, 2, cache_dir=tmp_path / "cache"))
    return sets


def data_check_alpha(module, tmp_path):
    """The sampler's promises, as one oracle that its mutants must fail."""
    sim, real = data_pair(tmp_path)
    for alpha in (.03, .5, .95):
        streams = {}
        for world in (1, 2, 3):
            ranks = [module.MixSampler(sim, real, alpha, 1000, seed=3, rank=r, world=world) for r in range(world)]
            merged = np.empty((100, 1000), bool)
            for step in range(100):
                for r, rank in enumerate(ranks):
                    merged[step, r::world] = next(rank)["sim"]
            assert abs(merged.mean() - alpha) < .005
            streams[world] = merged
        assert (streams[1] == streams[2]).all() and (streams[1] == streams[3]).all()
    # samples: the union over ranks is the stream of one rank, and each pass visits every sample once
    one = module.MixSampler(sim, real, .5, 30, seed=1)
    three = [module.MixSampler(sim, real, .5, 30, seed=1, rank=r, world=3) for r in range(3)]
    states = {True: [], False: []}
    for _ in range(8):
        batch, parts = next(one), [next(rank) for rank in three]
        for r, part in enumerate(parts):
            for key in ("images", "actions", "pad", "state", "sim"):
                assert (part[key] == batch[key][r::3]).all()
            assert part["instructions"] == batch["instructions"][r::3]
        for state, flag in zip(batch["state"], batch["sim"]):
            states[bool(flag)].append(state.tobytes())
    for flag, demos in ((True, sim), (False, real)):
        rows = {state.tobytes() for state in demos.states}
        assert set(states[flag][:len(demos)]) == rows and set(states[flag][len(demos):2 * len(demos)]) == rows
        assert states[flag][:len(demos)] != states[flag][len(demos):2 * len(demos)]


def test_data_alpha_is_exact_for_any_number_of_ranks(tmp_path):
    data_check_alpha(real_data, tmp_path)


def test_data_sampler_resumes_and_refuses_another_stream(tmp_path):
    sim, real = data_pair(tmp_path)
    whole = real_data.MixSampler(sim, real, .5, 12, seed=5)
    first = [next(whole) for _ in range(10)]
    half = real_data.MixSampler(sim, real, .5, 12, seed=5)
    for _ in range(5):
        next(half)
    state = json.loads(json.dumps(half.state_dict()))
    ranks = [real_data.MixSampler(sim, real, .5, 12, seed=5, rank=r, world=2) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    for step in range(5, 10):
        for r, rank in enumerate(ranks):
            batch = next(rank)
            assert all((batch[key] == first[step][key][r::2]).all() for key in ("images", "actions", "sim", "state"))
    with pytest.raises(ValueError, match="alpha was 0.5, is 0.4; batch was 12, is 8"):
        real_data.MixSampler(sim, real, .4, 8, seed=5).load_state_dict(state)


def test_data_sampler_opens_only_what_it_needs(tmp_path):
    sim, real = data_pair(tmp_path)
    never = lambda: pytest.fail("opened a set that has no share")
    assert not next(real_data.MixSampler(never, lambda: real, 0, 64))["sim"].any()
    assert next(real_data.MixSampler(lambda: sim, never, 1, 64))["sim"].all()
    shutil.rmtree(tmp_path / "sim")                                  # alpha = 0 runs with the simulated set deleted
    next(real_data.MixSampler(lambda: real_data.open_dataset(tmp_path / "sim", 4), real, 0, 4))
    for options, message in ((dict(alpha=1.2), "alpha 0 to 1"), (dict(alpha=.5, batch=2, world=3), "each rank"),
                             (dict(alpha=.5, sim=None), "from sim"), (dict(alpha=0, real=None), "from real")):
        options = dict(dict(sim=sim, real=real, batch=4), **options)
        with pytest.raises(ValueError, match=message):
            real_data.MixSampler(**options)
    other = real_data.open_dataset(tmp_path / "real", 6, 2, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="sim and real differ"):
        real_data.MixSampler(sim, other, .5, 4)


# -- demonstrations

DATA_STUB = '''
"""Stand-in for envs.py: episode n lasts 2 + n % 4 steps and fails if n % 3 == 0; all it shows is a function of n."""
import numpy as np
TASKS = ("open-drawer", "close-drawer")
class VecEnv:
    def __init__(self, task, domain, num_envs=1, seed=0, image_size=64, first_episode=0, episode_stride=1):
        if task not in TASKS:
            raise ValueError(f"task={task!r} is unknown")
        self.task, self.seed, self.num_envs, self.size, self.first = task, seed, num_envs, image_size, first_episode
    def reset(self):
        self.next = self.first + self.num_envs
        self.number, self.t = self.first + np.arange(self.num_envs), np.zeros(self.num_envs, int)
        return self.observe()
    def observe(self):
        shade = (self.number * 7 + self.t * 31 + self.seed) % 200
        return dict(images=np.broadcast_to(shade[:, None, None, None], (self.num_envs, self.size, self.size, 3)).astype(np.uint8),
                    state=np.tile(np.stack([self.number, self.t], 1), 4).astype(np.float32),
                    instructions=[self.task] * self.num_envs)
    def step(self, actions):
        assert (actions[:, 0, 0] == 1000 * self.number + self.t).all()
        number = self.number.copy()
        self.t += 1
        ended = self.t >= 2 + number % 4
        success = ended & (number % 3 > 0)
        for i in np.flatnonzero(ended):
            self.number[i], self.t[i], self.next = self.next, 0, self.next + 1
        return self.observe(), np.zeros(self.num_envs), success, ended & ~success, dict(success=success, episode=number)
class Expert:
    def __init__(self, env, style="expert", noise=0.):
        self.env, self.style = env, style
    def act(self):
        executed = np.zeros((self.env.num_envs, 7))
        executed[:, 0] = 1000 * self.env.number + self.env.t
        label = executed.copy()
        label[:, 1] = self.style == "teleop"
        label[:, 2] = self.env.number
        return executed, label
'''


@pytest.fixture
def data_stub(tmp_path, monkeypatch):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/envs.py").write_text(DATA_STUB)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    monkeypatch.delitem(sys.modules, "envs", raising=False)
    yield
    sys.modules.pop("envs", None)


def test_data_made_demonstrations(tmp_path, data_stub):
    sets = []
    for workers in (1, 3):
        rates = real_data.make_demos("all", "real", 7, tmp_path / f"w{workers}", workers=workers, image_size=8)
        sets.append(real_data.open_dataset(tmp_path / f"w{workers}", None, cache_dir=tmp_path / "cache"))
    assert set(rates) == {"open-drawer", "close-drawer"} and np.allclose(list(rates.values()), 7 / 11)
    one, three = sets
    assert one.scenes.tolist() == [1, 2, 4, 5, 7, 8, 10] * 2          # the first seven that succeed, in order
    assert (one.actions[:, 2] == one.states[:, 0]).all() and (one.actions[:, 1] == 1).all()    # labels, teleop
    assert len(one) == 2 * sum(2 + n % 4 for n in (1, 2, 4, 5, 7, 8, 10))
    for key, value in data_all(one).items():
        assert np.array_equal(value, data_all(three)[key]), key
    assert [path.read_bytes() for path in sorted((tmp_path / "w1").rglob("*.mp4"))] == \
        [path.read_bytes() for path in sorted((tmp_path / "w3").rglob("*.mp4"))]


def test_data_making_fails_without_a_trace(tmp_path, data_stub):
    with pytest.raises(ValueError, match="'fly' is unknown"):
        real_data.make_demos("fly", "sim", 2, tmp_path / "set", workers=1, image_size=8)
    (tmp_path / "stub/envs.py").write_text(DATA_STUB.replace("number % 3 > 0", "number < 0"))
    with pytest.raises(ValueError, match="only 0 of 40 demonstrations succeeded"):
        real_data.make_demos("open-drawer", "sim", 2, tmp_path / "set", workers=1, image_size=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stub"]


def test_data_make_and_card_from_the_command_line(tmp_path):
    if importlib.util.find_spec("envs") is None:
        pytest.skip("needs envs.py beside real_data.py")
    command = [sys.executable, str(DATA_SOURCE), "--make", "--domain", "real", "--task", "close-drawer", "--episodes", "2",
               "--out", str(tmp_path / "set"), "--image-size", "32", "--sheet", str(tmp_path / "card.png"),
               "--cache-dir", str(tmp_path / "cache"), "--workers", "1"]
    run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert run.returncode == 0, run.stderr
    for part in ("LeRobot v3.0", "2 episodes", "5 fps", "'close the drawer'", "gripper"):
        assert part in run.stdout, part
    assert Image.open(tmp_path / "card.png").size == (8 * 64, 2 * 64)
    demos = real_data.open_dataset(tmp_path / "set", 32, cache_dir=tmp_path / "cache")
    assert demos.states.shape[1] == 8 and (np.abs(demos.actions[:, 6]) <= 1).all()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "exists already" in again.stderr and "Traceback" not in again.stderr


# -- mutants: each of these changes must turn a check above red

DATA_MUTANTS = [
    ("start + episode.timestamps", "episode.timestamps", "frames of a later episode in a shared mp4", data_check_fixture),
    ("np.minimum(window, ends - 1)", "np.minimum(window, len(self.actions) - 1)", "chunk runs into the next episode",
     data_check_fixture),
    (", window >= ends", ", window > ends", "pad one step late", data_check_fixture),
    ("* shape[1] + slot", "* shape[1] + len(recording.cameras) - 1 - slot", "cameras swapped", data_check_fixture),
    ('np.argsort(frame[rows])', 'np.argsort(-frame[rows])', "rows in reverse", data_check_fixture),
    ("sim, numbers = sim[self.rank::self.world], numbers[self.rank::self.world]",
     "sim, numbers = sim[:len(sim) // self.world], numbers[:len(sim) // self.world]", "every rank gets the same share",
     data_check_alpha),
    ("[self.seed, 2, self.step]", "[self.seed, 2, self.step, self.rank]", "each rank throws its own coins", data_check_alpha),
    ("[self.seed, which, turn]", "[self.seed, which]", "the same order in every pass", data_check_alpha),
    ("< self.alpha", "< len(self.sets[1]) / (len(self.sets[0]) + len(self.sets[1]))", "alpha by the sizes of the sets",
     data_check_alpha),
    ("[key] for part in parts])[order]", "[key] for part in parts])", "domains sorted, labels not", data_check_alpha),
]


@pytest.mark.parametrize("old, new, label, check", DATA_MUTANTS, ids=[mutant[2] for mutant in DATA_MUTANTS])
def test_data_mutants_die(tmp_path, old, new, label, check):
    source = DATA_SOURCE.read_text()
    assert source.count(old) == 1, f"mutant '{label}' no longer applies to real_data.py: update DATA_MUTANTS"
    (tmp_path / "mutant.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("data_mutant", tmp_path / "mutant.py")
    mutant = importlib.util.module_from_spec(spec)
    sys.modules["data_mutant"] = mutant                              # dataclasses look their module up
    try:
        spec.loader.exec_module(mutant)
        if check is data_check_fixture:
            data_fixture("lerobot_v30")                              # skips without the fixtures
        with pytest.raises((AssertionError, ValueError, IndexError)):
            check(mutant, tmp_path)
    finally:
        del sys.modules["data_mutant"]


# ---------------------------------------------------------------------------------------------------- sft_warmstart

SFT_HOME = pathlib.Path(sft_warmstart.__file__).parent


def sft_episode(number, length, size=64):
    """A toy demonstration: where the bright bar is says what to do."""
    rng = np.random.default_rng(number)
    actions = rng.uniform(-.03, .03, (length, 7)).astype(np.float32) * (1, 1, 1, 0, 0, 1, 0)
    actions[:, 6] = np.where(np.arange(length) < length / 2, 1, -1)
    images = np.full((length, size, size, 3), 40, np.uint8)
    for t, image in enumerate(images):
        image[:, 4 * (t % 12) + 4 * (number % 4):][:, :6] = 220
    states = rng.normal(size=(length, 8)).astype(np.float32)
    return images, states, actions.astype(np.float32), "open the drawer", number


@pytest.fixture(scope="module")
def sft_demos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft_demos")
    for name, first in (("sim", 0), ("real", 100)):
        real_data.write_dataset(folder / name, [sft_episode(first + k, 9 + k) for k in range(4)], 5)
    return folder


def sft_args(demos, out, *extra, policy="openvla"):
    return sft_warmstart.parse([
        "--policy", policy, "--scratch", "--sim-data", str(demos / "sim"), "--real-data", str(demos / "real"),
        "--out", str(out), "--ranks", "1", "--device", "cpu", "--eval-episodes", "0", "--batch", "8", "--steps", "6",
        "--save-every", "0", "--val-every", "0", "--warmup", "2", "--held-out", "0.25", "--optimizer", "adamw", *extra])


def sft_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def sft_weights(out):
    return torch.load(out / "resume.pt", weights_only=True)


def sft_batch(policy, sim, seed=0):
    rng, n = np.random.default_rng(seed), len(sim)
    horizon = policy.settings.get("horizon", 1)
    pad = np.arange(horizon) >= rng.integers(1, horizon + 1, (n, 1))
    return dict(images=rng.integers(0, 256, (n, 64, 64, 3), np.uint8), instructions=["open the drawer"] * n, pad=pad,
                actions=rng.uniform(-.03, .03, (n, horizon, 7)).astype(np.float32), state=np.zeros((n, 8), np.float32),
                sim=np.array(sim, bool))


def sft_check_gradient(name="openvla", micro=64):
    """The gradient of a batch is N_sim/B grad L_SFT(sim) + N_real/B grad L_SFT(real)."""
    policy = policies.make_tiny(name)
    batch = sft_batch(policy, [1, 0, 0, 1, 0, 0, 0, 1])
    args = types.SimpleNamespace(augment="none", micro_batch=micro, aux_weight=0, pretrain=False)
    torch.manual_seed(3)
    logs = sft_warmstart.loss_and_gradients(policy, batch, args)
    got = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    torch.manual_seed(3)
    each, total = policy.bc_loss(batch["images"], ["open the drawer"] * 8, batch["actions"], reduction="none"), 0
    for domain, share in ((0, 5 / 8), (1, 3 / 8)):
        rows = batch["sim"] == domain
        loss = each[rows][torch.from_numpy(~batch["pad"][rows])[:, :each.shape[1]]].mean()
        if name == "openvla":                # of pi05 the noise would be another
            alone = policy.bc_loss(batch["images"][rows], ["open the drawer"] * rows.sum(), batch["actions"][rows],
                                   torch.from_numpy(batch["pad"][rows]))
            assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
        assert logs["loss/" + ("real", "sim")[domain]] == pytest.approx(loss.item(), rel=1e-5)
        total = total + share * loss
    total.backward()
    assert logs["loss"] == pytest.approx(total.item(), rel=1e-5)
    for name, p in policy.named_parameters():
        if p.grad is not None:
            assert name in got and torch.allclose(got[name], p.grad, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_sft_gradient_is_the_formula(name):
    sft_check_gradient(name)


def test_sft_micro_batches_change_nothing():
    sft_check_gradient("openvla", micro=2)


@pytest.mark.parametrize("old, new", [
    ("share[domains[rows]] * mean", "mean"), ("share[domains[rows]] * mean", "(1 - share[domains[rows]]) * mean"),
    ("keep / steps", "1 / steps"), ("weight[rows] * loss", "loss"), ("samples / samples.sum()", "samples / 16"),
    (".backward()", ".detach()")])
def test_sft_mutants_of_the_loss_die(monkeypatch, old, new):
    assert_mutant_dies(monkeypatch, sft_warmstart, sft_warmstart, "loss_and_gradients", old, new,  # noqa: F821
                       lambda: (sft_check_gradient(micro=2), sft_check_gradient("pi05")))


def test_sft_starts_at_theory_and_overfits(sft_demos, tmp_path):
    """ln(vocabulary) at first for tokens, E u^2 = 1 + E a^2 for flow; far below after a few steps."""
    for name, steps, limit in (("openvla", 60, .5), ("pi05", 60, .5)):
        args = sft_args(sft_demos, tmp_path / name, "--steps", str(steps), "--augment", "none", "--batch", "16",
                        "--lr", "2e-3", policy=name)
        assert sft_warmstart.warm_start(args) == tmp_path / name / "policy"
        rows, policy = sft_metrics(tmp_path / name), policies.load_policy(str(tmp_path / name / "policy"))
        theory = math.log(policy.config["text_config"]["vocab_size"]) if name == "openvla" else 1.3
        start = np.mean([row["loss"] for row in rows[:2]])     # 32 samples; warm-up has moved nothing yet
        assert start == pytest.approx(theory, rel=.15)
        assert np.mean([row["loss"] for row in rows[-5:]]) < limit * start
        assert {"loss/sim", "loss/real", "held_out/sim", "held_out/real"} <= set().union(*rows)
        assert (tmp_path / name / "loss.png").stat().st_size > 5000
        assert list(policy.statistics) == ["panda"]


def test_sft_alpha_0_and_1_open_one_set_only(sft_demos, tmp_path):
    for alpha, missing, seen in (("0", "--sim-data", "real"), ("1", "--real-data", "sim")):
        args = sft_args(sft_demos, tmp_path / alpha, "--sim-ratio", alpha, missing, "/nowhere/at/all", "--steps", "2",
                        "--statistics", "data")
        assert sft_warmstart.warm_start(args)
        rows = sft_metrics(tmp_path / alpha)
        assert {name for row in rows for name in row if "/" in name} == {f"loss/{seen}", f"held_out/{seen}"}
        assert policies.load_policy(str(tmp_path / alpha / "policy")).statistics.keys() == {"demos"}


def sft_check_resume(demos, folder, name):
    """Bit for bit: weights, averaged weights, optimizers, position in the samples, and every logged number."""
    options, write = ("--ema", "0.9", "--val-every", "2", "--optimizer", "muon"), sft_warmstart.Log.write
    whole, cut = folder / f"{name}-whole", folder / f"{name}-cut"
    if not whole.exists():
        sft_warmstart.warm_start(sft_args(demos, whole, *options, policy=name))

    def write_then_interrupt(log, step, values):
        write(log, step, values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_warmstart.Log, "write", write_then_interrupt)
        assert sft_warmstart.warm_start(sft_args(demos, cut, *options, policy=name)) is None
    assert sft_weights(cut)["step"] == 3 and not (cut / "policy").exists()
    with open(cut / "metrics.jsonl", "a") as file:           # a killed run may have logged beyond its last save
        file.write('{"step": 4, "loss": 99}\n')
    assert sft_warmstart.warm_start(sft_args(demos, cut, *options, "--resume", policy=name))
    a, b = sft_weights(whole), sft_weights(cut)
    assert a["sampler"] == b["sampler"] and a["step"] == b["step"] == 6
    for first, second in ((a["weights"], b["weights"]), (dict(enumerate(a["ema"])), dict(enumerate(b["ema"])))):
        assert all(torch.equal(first[key], second[key]) for key in first)
    for first, second in zip(a["optimizers"], b["optimizers"]):
        assert len(a["optimizers"]) == 2 and all(torch.equal(state[part], second["state"][key][part])
                                                 for key, state in first["state"].items() for part in state)
    assert [row | dict(wait_s=0) for row in sft_metrics(whole)] == [row | dict(wait_s=0) for row in sft_metrics(cut)]
    saved = policies.load_policy(str(cut / "policy")).state_dict()
    assert all(torch.equal(saved[key.removeprefix("0.")], average) for key, average in zip(b["weights"], b["ema"]))


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_sft_interrupted_and_resumed_equals_uninterrupted(sft_demos, tmp_path, name):
    sft_check_resume(sft_demos, tmp_path, name)


@pytest.mark.parametrize("owner, name, old, new", [
    ("Trainer", "load", 'self.sampler.load_state_dict(state["sampler"])', "pass"),
    ("Trainer", "load", "optimizer.load_state_dict(saved)", "pass"),
    ("Trainer", "load", "own.copy_(saved)", "pass"),
    ("Trainer", "update", "+ self.step << 12", "+ id(batch) << 12"),
    ("Trainer", "use_average", "p.copy_(average)", "pass"),
    ("Log", "__init__", 'if row["step"] <= step', "")])
def test_sft_mutants_of_resuming_die(sft_demos, tmp_path, monkeypatch, owner, name, old, new):
    args = sft_args(sft_demos, tmp_path / "openvla-whole", "--ema", "0.9", "--val-every", "2", "--optimizer", "muon")
    if name != "use_average":                # the uninterrupted run is honest
        sft_warmstart.warm_start(args)
    assert_mutant_dies(monkeypatch, sft_warmstart, getattr(sft_warmstart, owner), name, old, new,  # noqa: F821
                       lambda: sft_check_resume(sft_demos, tmp_path, "openvla"))


def test_sft_resume_refuses_another_run(sft_demos, tmp_path):
    sft_warmstart.warm_start(sft_args(sft_demos, tmp_path, "--steps", "1"))
    with pytest.raises(ValueError, match="--lr was"):
        sft_warmstart.warm_start(sft_args(sft_demos, tmp_path, "--steps", "1", "--lr", "0.1", "--resume"))


def sft_process(args_of, *extra):
    command = [sys.executable, str(SFT_HOME / "sft_warmstart.py"), *args_of, *extra]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))


def test_sft_two_ranks_equal_one_and_signals_leave_a_checkpoint(sft_demos, tmp_path):
    """Same samples, losses and gradient norms with two ranks; Ctrl-C ends them together; kill -9 leaves a whole file."""
    flags = ["--scratch", "--sim-data", str(sft_demos / "sim"), "--real-data", str(sft_demos / "real"), "--device", "cpu",
             "--eval-episodes", "0", "--batch", "8", "--augment", "none", "--save-every", "1", "--held-out", "0",
             "--warmup", "0", "--final-lr", "1", "--steps", "9999", "--optimizer", "muon"]
    double = sft_process(flags, "--ranks", "2", "--out", str(tmp_path / "two"))
    while not (tmp_path / "two/resume.pt").exists() or len(sft_metrics(tmp_path / "two")) < 4:
        assert double.poll() is None, double.stderr.read()
        time.sleep(.05)
    double.send_signal(signal.SIGINT)
    assert double.wait(60) == 130 and "interrupted" in double.stderr.read()
    single = sft_process(flags, "--ranks", "1", "--out", str(tmp_path / "one"))
    while not (tmp_path / "one/metrics.jsonl").exists() or len(sft_metrics(tmp_path / "one")) < 4:
        assert single.poll() is None, single.stderr.read()
        time.sleep(.05)
    single.kill()
    single.wait()
    one, two = sft_metrics(tmp_path / "one"), sft_metrics(tmp_path / "two")
    for a, b in zip(one[:4], two[:4]):
        for key in ("loss", "loss/sim", "loss/real", "grad_norm"):
            assert a.get(key) == pytest.approx(b.get(key), rel=2e-3 if a["step"] > 1 else 1e-5), (key, a["step"])
    used = {}
    for out in ("one", "two"):
        state = sft_weights(tmp_path / out)
        assert state["step"] == state["sampler"]["step"] >= 1
        momenta = state["optimizers"][1]["state"]
        used[out] = {k for k, each in momenta.items() if each["momentum_buffer"].any()}
    assert used["one"] == used["two"] and len(used["one"]) > 20, "Muon's state of all ranks"
    assert sft_weights(tmp_path / "two")["step"] == two[-1]["step"]


def sft_check_exchange():
    """Two ranks, played one after the other: each tensor becomes that of its owner on both."""
    sent, honest = [], sft_warmstart.all_sum
    ranks = lambda: [[torch.full((2, k + 1), 10. * rank + k) for k in range(5)] for rank in range(2)]
    try:
        sft_warmstart.all_sum = lambda flat: sent.append(flat.clone()) or flat
        for rank, tensors in enumerate(ranks()):
            sft_warmstart.exchange(tensors, rank, 2)
        sft_warmstart.all_sum = lambda flat: sum(sent)
        for rank, tensors in enumerate(ranks()):
            sft_warmstart.exchange(tensors, rank, 2)
            assert [x.unique().tolist() for x in tensors] == [[10. * (k % 2) + k] for k in range(5)]
    finally:
        sft_warmstart.all_sum = honest


def test_sft_ranks_exchange_what_they_own():
    sft_check_exchange()
    alone = [torch.ones(2)]
    sft_warmstart.exchange(alone, 0, 1)
    assert alone[0].tolist() == [1, 1]


@pytest.mark.parametrize("old, new", [("% world == rank", "% world != rank"), ("torch.zeros_like(x)", "x"),
                                      ("x.copy_(total)", "pass"), ("k % world", "0 % world")])
def test_sft_mutants_of_exchange_die(monkeypatch, old, new):
    assert_mutant_dies(monkeypatch, sft_warmstart, sft_warmstart, "exchange", old, new, sft_check_exchange)


@pytest.mark.parametrize("settings", [dict(), dict(discrete_state=True), dict(delta_mask=[True] * 6 + [False])])
def test_sft_evaluation_hands_over_the_state_if_wanted(settings):
    policy = policies.make_tiny("pi05", **settings)
    policy.statistics["placeholder"]["state"] = dict(q01=[-1.] * 8, q99=[1.] * 8)
    assert sft_warmstart.run_episodes(policy, "open-drawer", "sim", 1)[1] == 1


def test_sft_augmentation():
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    torch.manual_seed(0)
    for recipe in sft_warmstart.AUGMENT:
        for shape in ((4, 32, 32, 3), (2, 3, 32, 32, 3)):
            out = sft_warmstart.augment(images[:math.prod(shape[:-3])].reshape(shape), recipe)
            assert out.shape == shape and out.dtype == torch.uint8
        out = sft_warmstart.augment(images, recipe)
        assert len({tuple(x.flatten().tolist()) for x in out}) == 64           # a draw for each sample
    still = dict(shift=(1, 0, 2, 0, 0, 0, 0, 0), none=(1, 0, 0, 0, 0, 0, 0, 0), hue=(1, 0, 0, 0, 0, 0, 0, .05))
    sft_warmstart.AUGMENT, before = still, sft_warmstart.AUGMENT
    try:
        assert (sft_warmstart.augment(images, "none").numpy() == images).all()
        moved, offsets = sft_warmstart.augment(images, "shift").numpy(), set()
        padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), "edge")
        for k in range(64):                  # one of the 25 whole-pixel shifts, edges repeated
            offsets |= {(y, x) for y in range(5) for x in range(5) if (padded[k, y:y + 32, x:x + 32] == moved[k]).all()}
        assert len(offsets) > 15
        grey = np.full((4, 8, 8, 3), 100, np.uint8)
        assert (sft_warmstart.augment(grey, "hue").numpy() == 100).all()
    finally:
        sft_warmstart.AUGMENT = before


def test_sft_learning_rate_is_openpis():
    args = types.SimpleNamespace(lr=2.5e-5, warmup=1000, decay_steps=30000, final_lr=.1, steps=5000)
    rate = lambda step: sft_warmstart.learning_rate(step, args)
    assert rate(0) == pytest.approx(2.5e-5 / 1001) and rate(1000) == pytest.approx(2.5e-5)
    assert rate(15500) == pytest.approx(2.5e-5 * .55) and rate(30000) == rate(40000) == pytest.approx(2.5e-6)


def test_sft_non_finite_steps_are_skipped_then_stop(sft_demos, tmp_path, monkeypatch):
    honest, calls = sft_warmstart.loss_and_gradients, []

    def broken(policy, batch, args, probe=None):
        logs = honest(policy, batch, args, probe)
        calls.append(0)
        if len(calls) in broken.bad:
            policy.get_parameter("language_model.lm_head.weight").grad.fill_(math.nan)
        return logs

    monkeypatch.setattr(sft_warmstart, "loss_and_gradients", broken)
    broken.bad = {2}
    sft_warmstart.warm_start(sft_args(sft_demos, tmp_path / "once", "--steps", "3"))
    assert all(torch.isfinite(w).all() for w in sft_weights(tmp_path / "once")["weights"].values())
    broken.bad = set(range(1000))
    with pytest.raises(RuntimeError, match="5 times in a row"):
        sft_warmstart.warm_start(sft_args(sft_demos, tmp_path / "often"))


def test_sft_bad_flags_are_listed_together():
    with pytest.raises(ValueError) as error:
        sft_warmstart.parse(["--scratch", "--sim-ratio", "1.5", "--task", "fly", "--augment", "zoom", "--resume",
                             "--seed", str(sft_warmstart.EVAL_SEED), "--out", "/nowhere"])
    assert all(flag in str(error.value) for flag in ("--sim-ratio", "--task", "--augment", "--resume", "--seed"))


def test_sft_pretraining_labels_and_dropped_head(tmp_path, monkeypatch):
    """Labels are the simulator's; the head listens to bc_loss's own pass, learns, and is not in the checkpoint."""
    (images, labelled, actions, text, number), *_ = sft_warmstart.record_labelled((0, 3, 5, 64))
    env = envs.VecEnv("all", "pretrain", 3, 5, image_size=64)
    assert (images[0] == env.reset()["images"][number]).all()
    assert np.allclose(labelled[0, 8:], env.landmarks()[number].ravel()) and np.allclose(labelled[:, :3], labelled[:, 8:11])
    assert labelled.shape[1] == 23
    args = sft_warmstart.parse(["--pretrain", "--policy", "openvla", "--demos", str(tmp_path), "--pretrain-episodes", "4", "--first-pictures", "64",
                                "--out", str(tmp_path / "base"), "--steps", "30", "--warmup", "5", "--batch", "16", "--eval-episodes", "1",
                                "--half", "--ranks", "1", "--device", "cpu"])
    act_once = lambda policy, *_, **__: [len(policy.act(images[:1], ["open the drawer"]).actions) - 1, 1]
    monkeypatch.setattr(sft_warmstart, "run_episodes", act_once)             # the head must be gone by then
    assert sft_warmstart.warm_start(args)
    rows = sft_metrics(tmp_path / "base")
    assert rows[-1]["aux"] < .8 * rows[0]["aux"] and min(rows[-1][f"held_out/{part}_mm"] for part in ("first", "whole")) > 0
    assert "loss/real" not in rows[0]
    results = json.loads((tmp_path / "base/result.json").read_text())["results"]
    assert {name: row["n"] for name, row in results.items()} == {
        f"{domain}/{task}": 1 for domain in ("sim", "stand-in", "pretrain") for task in envs.TASKS}
    policy = policies.load_policy(str(tmp_path / "base/policy"))
    assert sum(f.stat().st_size for f in (tmp_path / "base/policy").iterdir()) < 10e6
    stored = [load_file(file) for file in (tmp_path / "base/policy").glob("*.safetensors")]
    assert {x.dtype for tensors in stored for x in tensors.values()} == {torch.float16}
    assert policy.statistics["panda"]["action"]["q99"][0] == pytest.approx(.04)


def test_sft_first_pictures_are_those_of_the_scenes_and_ask_for_an_object():
    """One picture of an episode, the expert's first action for it, and where things are; blocks alternate the tasks."""
    for first, task in ((0, "pick-place"), (4, "push-cube")):
        parts = sft_warmstart.record_first((first, 4, 5, 64))
        env = envs.VecEnv(task, "pretrain", 4, 5 + sft_warmstart.FIRST_SEED, image_size=64, first_episode=first)
        obs, places = env.reset(), env.landmarks().reshape(4, 15)
        action = envs.Expert(env).act()[1]
        for i, (images, labelled, actions, text, number) in enumerate(parts):
            assert images.shape == (1, 64, 64, 3) and (images[0] == obs["images"][i]).all() and number == first + i
            assert np.allclose(labelled[0], [*obs["state"][i], *places[i]]) and np.allclose(actions[0], action[i])
            assert text == obs["instructions"][i]
    colours = [name for name, _ in env.parameters["cubes"]]
    assert all(sum(name in part[3].split() for name in colours) == 1 for part in parts)


def sft_probe(name):
    """A policy with its Probe after a forward pass on three prompts of different lengths, and what entered layer 0."""
    policy, entered = policies.make_tiny(name), []
    probe, batch, texts = sft_warmstart.Probe(policy), sft_batch(policy, [1] * 3), ["open it", "pick the red one up now", "a"]
    probe.layer[0].register_forward_pre_hook(lambda layer, inputs: entered.append(inputs))
    policy.bc_loss(batch["images"], texts, batch["actions"])
    return policy, probe, batch["images"], texts, entered[0]


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_sft_probe_listens_to_the_words_of_the_prompt_and_sees_the_attention(name):
    policy, probe, images, texts, (x, rotary, mask, *rest) = sft_probe(name)
    ids, valid = policy.prompt(texts)
    assert (probe.words.sum(1) == valid.sum(1) - int(name == "openvla")).all()                # all, without OpenVLA's BOS
    if name == "openvla":
        expected = policy.prompt_hidden(images, texts)
    else:                                    # one prompt at a time: no padding, so the last column is the last token
        expected = torch.cat([policy.observe(images[i:i + 1], [text], None, None)[0][:, -1] for i, text in enumerate(texts)])
    probe = sft_probe(name)[1]               # as that one listened to what was just asked, too
    assert torch.allclose(probe.hidden[torch.arange(3), probe.last], expected, atol=1e-4)
    layer, attention = probe.layer[0], probe.attention
    assert torch.allclose(attention.sum(3), torch.ones(attention.shape[:3])) and (attention[~mask.expand_as(attention)] == 0).all()
    v = layer.self_attn["v_proj"](layer.input_layernorm(x, None)[0]).unflatten(2, (-1, layer.head_dim)).transpose(1, 2)
    y = x + layer.self_attn["o_proj"]((attention @ v).transpose(1, 2).flatten(2))
    h, mlp = layer.post_attention_layernorm(y, None)[0], layer.mlp
    y = y + mlp["down_proj"](layer.act(mlp["gate_proj"](h)) * mlp["up_proj"](h))
    assert torch.allclose(y, layer(x, rotary, mask, *rest)[0], atol=1e-4)


def sft_check_probe_losses(name):
    """Each of the four losses falls when what it asks for is made true, and not when it is made true elsewhere."""
    policy, probe, images, texts, _ = sft_probe(name)
    prompt = policy.prompt(texts)
    features, place = torch.zeros(3, *policy.feature_shape), torch.tensor([[-.75, -.75], [.7, -.8], [.2, .9]])
    features[:, 3, 0] = 1.                                     # a feature that only the upper right patch has
    landmarks = torch.cat([torch.zeros(3, 3, 3), place.expand(3, 3, 2)], 2)                  # the object is in patch 3
    losses = lambda: probe(features, landmarks, *prompt)[0].item()
    with torch.no_grad():
        before = losses()
        probe.patch.weight[3, 0], probe.patch.weight[[4, 5], 0] = 9, 4 * torch.tensor([-.05, -.05])
        right = losses()
        probe.patch.weight[0, 0] = 9                           # the first landmark is not in there
        assert right < before < losses()
        probe.patch.weight.zero_()
        first, honest = probe.is_causal, probe.attention
        probe.attention = torch.zeros_like(honest)
        blind = losses()
        probe.attention[..., 3 + first] = 1.
        assert losses() < blind - 5                            # ln of 1 instead of 1e-6
        probe.attention[..., 3 + first], probe.attention[..., 4 + first] = 0, 1.
        assert losses() == pytest.approx(blind)
        probe.attention, probe.projector = honest, (lambda x: policy_words,)
        policy_words = (probe.table[0].weight[prompt[0]] * prompt[1][..., None]).sum(1)
        near = losses()
        policy_words = -policy_words
        assert near < losses() - .5
        probe.projector = (lambda x: torch.ones(3, policy_words.shape[1]),)
        target = (landmarks[0, :, 0] * 0 - .48) / .1           # x of the landmarks is 0, the centre .48 m
        away = losses()
        probe.where.bias[0::5] = target
        assert losses() < away


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_sft_probe_losses_fall_when_the_answers_are_right(name):
    sft_check_probe_losses(name)


@pytest.mark.parametrize("old, new", [
    ("nearest[:, 1] + self.is_causal]", "nearest[:, 2] + self.is_causal]"), ("- (looked + 1e-6)", "+ (looked + 1e-6)"),
    ("loss - match", "loss + match"), ("+ where[self.words].mean() + patch", "")])
def test_sft_mutants_of_the_probe_die(monkeypatch, old, new):
    assert_mutant_dies(monkeypatch, sft_warmstart, sft_warmstart.Probe, "forward", old, new,
                       lambda: sft_check_probe_losses("openvla"))


def sft_check_scenes():
    seen = []

    def act(images, instructions, deterministic, generator, **_):
        return types.SimpleNamespace(actions=torch.zeros(len(images), 1, 7))

    class Watched(envs.VecEnv):
        def step(self, actions):
            result = super().step(actions)
            seen.extend((self.seed, int(result[-1]["episode"][i])) for i in result[-1]["ended"])
            return result

    policy = types.SimpleNamespace(device=torch.device("cpu"), image_size=8, settings={}, act=act)
    sft_warmstart.envs.VecEnv, before = Watched, envs.VecEnv
    try:
        for world in (1, 2):
            seen.clear()
            counts = [sft_warmstart.run_episodes(policy, "open-drawer", "sim", 5, rank, world, num_envs=2)
                      for rank in range(world)]
            assert sum(n for _, n in counts) == 5 and sum(k for k, _ in counts) == 0
            assert {episode for seed, episode in seen if episode < 5} == set(range(5))
            assert {seed for seed, _ in seen} == {sft_warmstart.EVAL_SEED}
    finally:
        sft_warmstart.envs.VecEnv = before


def test_sft_evaluation_scenes_do_not_depend_on_ranks():
    sft_check_scenes()


@pytest.mark.parametrize("old, new", [("first_episode=rank", "first_episode=0"), ("EVAL_SEED, policy", "rank, policy"),
                                      ("episode_stride=world", "episode_stride=1")])
def test_sft_mutants_of_evaluation_die(monkeypatch, old, new):
    assert_mutant_dies(monkeypatch, sft_warmstart, sft_warmstart, "run_episodes", old, new, sft_check_scenes)  # noqa: F821


# ---------------------------------------------------------------------------------------------------- rl_cotrain

RL_TEXT = "open the drawer"


@pytest.fixture(scope="module")
def rl_starts(tmp_path_factory):
    """Checkpoint folders with random weights and the controller's action range."""
    folder, limit = tmp_path_factory.mktemp("rl_starts"), envs.ACTION_LIMIT
    for name in ("openvla", "pi05"):
        policy = policies.make_tiny(name)
        policy.set_statistics("panda", dict(action=dict(q01=-limit, q99=limit)))
        policy.save(folder / name)
    return folder


def rl_args(start, out, *extra, policy="openvla"):
    return rl_cotrain.parse(["--policy", policy, "--init", str(start), "--out", str(out), "--ranks", "1", "--device", "cpu",
                             "--eval-episodes", "0", "--num-envs", "4", "--steps", "3", "--minibatch", "6", "--real-batch", "4",
                             "--iterations", "2", "--save-every", "0", "--critic-warmup", "0", *extra])


def rl_flags(demos):
    return "--real-data", str(demos / "real")


def rl_data(policy, n, seed=0):
    """A rollout's data from random pictures, with random rewards."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    images = torch.from_numpy(rng.integers(0, 256, (n, 64, 64, 3), np.uint8))
    decision = policy.act(images, [RL_TEXT] * n, generator=generator)
    advantage = torch.from_numpy(rng.normal(size=n)).float()
    return dict(images=images, instructions=[RL_TEXT] * n, trace=decision.trace, logp=decision.logp, value=decision.value,
                advantage=advantage, target=decision.value + torch.from_numpy(rng.normal(size=n)).float())


def rl_settings(**changed):
    return types.SimpleNamespace(**{**dict(
        clip=.2, value_clip=.2, value_weight=1., entropy=.01, lambda_real=.3, micro_batch=5, minibatch=8, epochs=1, gamma=.9,
        gae_lambda=.8, seed=0, critic_warmup=0, clip_norm=0., target_kl=0., dtype="float32", lr=1e-3, value_lr=1e-3, beta2=.95,
        critic="head",
        sft=types.SimpleNamespace(augment="none", micro_batch=64, aux_weight=0, pretrain=False)), **changed})


def rl_grads(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def rl_check_gradient(name="openvla"):
    """p.grad = grad L_PPO + lambda grad L_SFT(real), term for term, from formulas written out here; linear in lambda."""
    policy, args = policies.make_tiny(name), rl_settings()
    data, batch = rl_data(policy, 8), sft_batch(policy, [0] * 6)
    data["logp"] = data["logp"] + torch.linspace(-.5, .5, 8)               # some ratios are clipped, some are not
    data["value"] = data["value"] + torch.linspace(.7, -.7, 8)             # and values
    torch.manual_seed(5)
    logs = rl_cotrain.gradients(policy, data, torch.arange(8), iter([batch]), args)
    got = rl_grads(policy)
    logp, entropy, value = policy.evaluate(data["images"], data["instructions"], data["trace"])
    r, a, v, target = (logp - data["logp"]).exp(), data["advantage"], data["value"], data["target"]
    surrogate = torch.where(a > 0, torch.where(r < 1.2, r, 1.2 * torch.ones(8)), torch.where(r > .8, r, .8 * torch.ones(8))) * a
    near = lambda x: torch.where((x - target).abs() < 10, .5 * (x - target) ** 2, 10 * (x - target).abs() - 50)
    worst = torch.maximum(near(value), near(v + torch.clip(value - v, -.2, .2)))
    ppo = -surrogate.mean() + worst.mean() - .01 * entropy.mean()
    torch.manual_seed(5)
    real = policy.bc_loss(batch["images"], batch["instructions"], batch["actions"], torch.from_numpy(batch["pad"]))
    named = [(n, p) for n, p in policy.named_parameters()]
    parts = [torch.autograd.grad(x, [p for _, p in named], allow_unused=True) for x in (ppo, real)]
    zero = lambda g, p: torch.zeros_like(p) if g is None else g
    size, apart = 0, 0
    for (n, p), g_ppo, g_real in zip(named, *parts):
        expected = zero(g_ppo, p) + .3 * zero(g_real, p)
        assert torch.allclose(got[n], expected, rtol=1e-4, atol=1e-6), n
        size, apart = size + expected.norm() ** 2, apart + (.3 * zero(g_real, p)).norm() ** 2
    assert apart > 1e-4 * size, "the anchor is seen in the gradient"
    norms = [math.sqrt(sum(zero(g, p).norm() ** 2 for (_, p), g in zip(named, part))) for part in parts]
    dot = sum((zero(g, p) * zero(h, p)).sum() for (_, p), g, h in zip(named, *parts)).item()
    assert logs["grad_rl"] == pytest.approx(norms[0], rel=1e-3) and logs["grad_real"] == pytest.approx(norms[1], rel=1e-3)
    assert logs["cosine"] == pytest.approx(dot / norms[0] / norms[1], abs=1e-3)
    assert logs["real"] == pytest.approx(real.item(), rel=1e-4)
    assert logs["ppo"] == pytest.approx(-surrogate.mean().item(), abs=1e-5)
    assert logs["value"] == pytest.approx(worst.mean().item(), rel=1e-4)
    assert logs["clipped"] == pytest.approx(((r - 1).abs() > .2).float().mean().item())
    log_ratio = r.log()
    assert logs["kl"] == pytest.approx((r - 1 - log_ratio).mean().item(), rel=1e-3)
    rl_cotrain.gradients(policy, data, torch.arange(8), None, args)        # lambda = 0: no real batches
    alone = rl_grads(policy)
    for (n, p), g_ppo in zip(named, parts[0]):
        assert torch.allclose(alone.get(n, torch.zeros_like(p)), zero(g_ppo, p), rtol=1e-4, atol=1e-6), n


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_rl_gradient_is_linear_in_lambda(name):
    rl_check_gradient(name)


def rl_check_gae():
    """Against the double sum A_t = sum_l (gamma lambda)^l delta_t+l, cut at the ends of episodes."""
    rng = np.random.default_rng(0)
    rewards, values, following = rng.normal(size=(3, 13, 5))
    terminated, truncated = rng.random((2, 13, 5)) < .15
    ended = terminated | truncated
    following = np.where(terminated & ~truncated, 0, following)            # a success has no future
    delta, expected = rewards + .9 * following - values, np.zeros((13, 5))
    for n in range(5):
        for t in range(13):
            for k in range(t, 13):
                expected[t, n] += (.9 * .7) ** (k - t) * delta[k, n]
                if ended[k, n]:
                    break
    tensors = [torch.from_numpy(x) for x in (rewards, values, following, ended)]
    advantages, targets = rl_cotrain.gae(*tensors, .9, .7)
    assert np.allclose(advantages, expected) and np.allclose(targets, expected + values)


def test_rl_gae_is_the_double_sum():
    rl_check_gae()


class RlToy:
    """Two steps an episode. Success: the first number of the action is positive, decided by the first step. Odd
    environments never terminate: they run into the time limit."""
    num_envs, tasks, task = 16, ["push-cube"], np.full(16, "push-cube", object)

    def __init__(self, seed=0):
        self.images = np.random.default_rng(seed).integers(0, 256, (2 * self.num_envs, 64, 64, 3), np.uint8)

    def observe(self, rows, shift=0):
        return dict(images=self.images[np.asarray(rows) + shift], instructions=[RL_TEXT] * len(rows),
                    state=np.zeros((len(rows), 8), np.float32),
                    truth=np.repeat((np.asarray(rows) + shift)[:, None], envs.TRUTH, 1).astype(np.float32))

    def reset(self):
        self.steps = np.zeros(self.num_envs, int)
        return self.observe(np.arange(self.num_envs))

    def step(self, actions):
        right, odd = actions[:, 0, 0] > 0, np.arange(self.num_envs) % 2 > 0
        self.steps += 1
        over = self.steps >= 2
        terminated, truncated, ended = over & ~odd, over & odd, np.flatnonzero(over)
        self.steps[over] = 0
        info = dict(ended=ended, success=right, final_obs=self.observe(ended, self.num_envs) if len(ended) else None)
        return self.observe(np.arange(self.num_envs)), right.astype(np.float32), terminated, truncated, info


def rl_check_rollout():
    """next_values: V of the next observation; of the final one at a time limit; 0 after a termination."""
    policy, env = policies.make_tiny("openvla"), RlToy()
    torch.nn.init.normal_(policy.value_head[-1].weight)                    # so that observations differ in value
    data, log = rl_cotrain.rollout(policy, env, 4, torch.Generator().manual_seed(0), True)
    with torch.no_grad():
        value = lambda rows: policy.value_head(policy.prompt_hidden(env.images[rows], [RL_TEXT] * len(rows)))[:, 0]
        first, final = value(np.arange(16)), value(np.arange(16, 32))
    odd = torch.arange(16) % 2 > 0
    assert first.std() > .01 and (first - final).abs().min() > 1e-4
    ends = torch.where(odd, final, torch.zeros(16))
    assert torch.allclose(data["values"], first.expand(4, 16), atol=1e-5)
    assert torch.allclose(data["next_values"], torch.stack([first, ends, first, ends]), atol=1e-5)
    assert data["ended"].tolist() == [[False] * 16, [True] * 16] * 2
    assert log["episodes/push-cube"] == 16 and 0 <= log["successes/push-cube"] <= 16
    assert log["reward"] == data["rewards"].sum()
    assert torch.allclose(data["logp"], policy.evaluate(**rl_cotrain.take(data, torch.arange(64)))[0], atol=1e-4)
    return data


def test_rl_rollout_bootstraps_time_limits_only():
    rl_check_rollout()


def rl_check_state_critic():
    """It judges states before and after each decision, after it before any reset, terminations 0; it learns targets with
    a lambda of its own; the policy's value head and what it reads get nothing from it."""
    policy, env, seen = policies.make_tiny("openvla"), RlToy(), []
    learner = rl_learner(policy, critic="state", value_weight=0., minibatch=64, micro_batch=64)
    learner.critic = lambda truth: truth[..., 3]
    data, _ = rl_cotrain.rollout(policy, env, 4, torch.Generator().manual_seed(0), True, learner.critic)
    learner.fit_critic = lambda truth, target: seen.append((truth, target))
    before = policy.value_head[-1].weight.clone()
    learner.update(data)
    here, odd = torch.arange(16.), torch.arange(16) % 2 > 0
    ends = torch.where(odd, here + 16, torch.zeros(16))
    assert torch.equal(data["values"], here.expand(4, 16))
    assert torch.equal(data["next_values"], torch.stack([here, ends, here, ends]))
    gains = data["rewards"], data["values"], data["next_values"], data["ended"], .9
    advantage, target = rl_cotrain.gae(*gains, .8)[0].flatten(), rl_cotrain.gae(*gains, .95)[1].flatten()
    assert torch.allclose(data["advantage"], (advantage - advantage.mean()) / advantage.std(unbiased=False), atol=1e-3)
    assert torch.allclose(seen[0][1], target) and torch.equal(seen[0][0], data["truth"].flatten(0, 1))
    assert (policy.value_head[-1].weight - before).abs().max() < 1e-4      # weight decay alone


def test_rl_state_critic_judges_states():
    rl_check_state_critic()


def test_rl_state_critic_learns_its_targets():
    learner = rl_learner(policies.make_tiny("openvla"), critic="state")
    truth = torch.rand(2000, envs.TRUTH)
    target = truth[:, 0] * truth[:, 1] - truth[:, 2]
    for learner.iteration in range(5):
        learner.fit_critic(truth, target)
    with torch.no_grad():
        assert (learner.critic(truth) - target).pow(2).mean() < .1 * target.var()


@pytest.mark.parametrize("owner, name, old, new", [
    (rl_cotrain, "rollout", "decision.value if critic is None else value(obs)", "decision.value"),
    (rl_cotrain, "rollout", "critic(tensor(obs[\"truth\"]))", "torch.zeros(len(obs[\"truth\"]))"),
    (rl_cotrain, "rollout", " if truncated[i]]", "]"),
    (rl_cotrain.Learner, "update", "gae(*gains, CRITIC_LAMBDA)", "gae(*gains, args.gae_lambda)"),
    (rl_cotrain, "ppo_loss", "args.value_weight * error", "error")])
def test_rl_mutants_of_the_state_critic_die(monkeypatch, owner, name, old, new):
    assert_mutant_dies(monkeypatch, rl_cotrain, owner, name, old, new, rl_check_state_critic)


def rl_learner(policy, **changed):
    return rl_cotrain.Learner(rl_settings(**changed), policy, None, 0, 1)


def rl_check_climbs():
    """PPO on a toy: from a coin's 50 % to above 75 %; the six numbers of the action that do not matter are noise."""
    policy = policies.make_tiny("openvla")
    policies.set_trainable(policy, "vision")
    settings = dict(lr=3e-3, minibatch=16, epochs=2, micro_batch=64, clip_norm=1., entropy=0., value_weight=.1)
    learner, env, rates = rl_learner(policy, **settings), RlToy(), []
    for i in range(16):
        data, log = rl_cotrain.rollout(policy, env, 4, torch.Generator().manual_seed(i), True)
        rates.append(data["rewards"].mean().item())
        learner.update(data)
        learner.iteration += 1
    assert np.mean(rates[:2]) < .65 and np.mean(rates[-4:]) > .75, rates


def test_rl_ppo_climbs_on_a_toy():
    rl_check_climbs()


def rl_check_ratio(stale=False):
    policy, learner = policies.make_tiny("openvla"), None
    learner = rl_learner(policy, minibatch=32, micro_batch=64)
    data, _ = rl_cotrain.rollout(policy, RlToy(), 4, torch.Generator().manual_seed(0), False)
    if stale:
        with torch.no_grad():
            policy.language_model["lm_head"].weight.mul_(1.5)
    logs = learner.update(data)
    assert logs["updates"] == 2 and logs["worst"] < 1e-3
    assert data["advantage"].mean().abs() < 1e-4 and data["advantage"].std() == pytest.approx(1, abs=.02)


def test_rl_first_ratio_is_one_or_the_run_stops():
    rl_check_ratio()
    with pytest.raises(RuntimeError, match="first ratio after a rollout is off by .*act and evaluate disagree"):
        rl_check_ratio(stale=True)


def test_rl_features_of_frozen_towers_are_computed_once(monkeypatch):
    policy, seen = policies.make_tiny("openvla"), []
    policies.set_trainable(policy, "vision")
    encode = policy.encode_images
    monkeypatch.setattr(policy, "encode_images", lambda images: seen.append(len(images)) or encode(images))
    before = {name: p.clone() for name, p in policy.named_parameters()}
    learner = rl_learner(policy, epochs=3, minibatch=16, micro_batch=64)
    data, _ = rl_cotrain.rollout(policy, RlToy(), 2, torch.Generator().manual_seed(0), True)
    assert data["images"].shape == (32, *policy.feature_shape)
    assert sum(seen) == 16 * 2 + 16 + 8, "each decision, what follows the last one, final observations at time limits"
    learner.update(data)
    assert sum(seen) == 56, "epochs reuse them"
    changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed and not any(name.startswith("vision_backbone") for name in changed)
    assert {"value_head.0.weight", "language_model.model.layers.0.mlp.up_proj.weight"} <= changed


def test_rl_critic_warm_up_moves_the_value_head_only():
    policy = policies.make_tiny("openvla")
    before = {name: p.clone() for name, p in policy.named_parameters()}
    learner = rl_learner(policy, critic_warmup=1, micro_batch=64)
    for expected in (True, False):
        data, _ = rl_cotrain.rollout(policy, RlToy(), 2, torch.Generator().manual_seed(0), False)
        learner.update(data)
        learner.iteration += 1
        changed = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
        assert changed and all(name.startswith("value_head") for name in changed) == expected


def test_adapters_go_on_training(tmp_path):
    """A checkpoint with adapters keeps them when lora_rank is given again; adapters alone are known by their base."""
    policies.make_tiny("openvla").save(tmp_path / "base")
    policy = policies.load_policy(tmp_path / "base", lora_rank=4)
    for module in policies.lora_modules(policy).values():
        module.lora_B.weight.data.normal_(std=.05)
    policy.save(tmp_path / "tuned")
    images, texts = policy_batch(2)
    trace = policy.act(images, texts).trace
    again = policies.load_policy(tmp_path / "tuned", lora_rank=4)
    assert torch.allclose(again.evaluate(images, texts, trace)[0], policy.evaluate(images, texts, trace)[0], atol=1e-5)
    assert all(len(layer._forward_hooks) == 1 for layer in policies.lora_modules(again).values())
    with pytest.raises(ValueError, match=r"lora_rank: got 8; need \[4\]"):
        policies.load_policy(tmp_path / "tuned", lora_rank=8)
    policies.save_lora(policy, tmp_path / "alone", base=str(tmp_path / "base"))
    assert sft_warmstart.parse(["--policy", str(tmp_path / "alone")]).preset == "openvla-tiny"
    (tmp_path / "base/config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match="config.json of one of them"):
        sft_warmstart.parse(["--policy", str(tmp_path / "base")])


def test_official_crops_are_cut_once(monkeypatch):
    """Training pictures by OpenVLA's recipe: the random crop, not the central one on top of it; others: the central one."""
    policy, cuts, cut = policies.make_tiny("openvla", center_crop=True), [], policies.center_crop_90
    monkeypatch.setattr(policies, "center_crop_90", lambda *args: cuts.append(1) or cut(*args))
    batch = sft_batch(policy, [0, 0, 0])
    args = types.SimpleNamespace(augment="openvla", micro_batch=2, aux_weight=0, pretrain=False)
    sft_warmstart.loss_and_gradients(policy, batch, args)
    assert not cuts and policy.settings["center_crop"]
    list(sft_warmstart.micro_losses(policy, batch, args))
    policy.encode_images(batch["images"])
    assert len(cuts) == 3


def test_a_robot_with_another_state_and_frame_rate(sft_demos, tmp_path, capsys):
    """Policies that do not read the state train on sim (8 numbers) and a robot (6) together; --pause is a speed."""
    episodes = [sft_episode(7 + k, 12) for k in range(4)]
    for rate in (5, 30):
        slow = np.tile(np.float32([.006 * 5 / rate, 0, 0, 0, 0, 0, 1]), (12, 1))         # 3 cm/s
        rows = [(images, states[:, :6], slow, text, scene) for images, states, _, text, scene in episodes]
        real_data.write_dataset(tmp_path / str(rate), rows, rate)
        args = sft_args(sft_demos, tmp_path / f"out{rate}", "--statistics", "data", "--steps", "1",
                        "--real-data", str(tmp_path / str(rate)))
        assert sft_warmstart.warm_start(args)
        said = capsys.readouterr().err
        assert "4 episodes; 48 of 48 frames move" in said and ("but 5 in simulation" in said) == (rate == 30)


def test_data_units_are_doubted(tmp_path):
    """A gripper in 0..1 and absolute poses are legal files, and wrong; a gripper that never moves is neither."""
    def written(name, change):
        episodes = [(images, states, change(actions.copy()), text, -1)
                    for images, states, actions, text in (data_episode(k, 6) for k in range(2))]
        real_data.write_dataset(tmp_path / name, episodes, 5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            real_data.open_dataset(tmp_path / name, cache_dir=tmp_path / "cache")
        return " ".join(str(each.message) for each in caught if each.category is UserWarning)

    put = lambda column, value: lambda actions: (actions.__setitem__((slice(None), column), value), actions)[1]
    assert "need -1 (close) to +1 (open)" in written("zero-one", lambda a: put(6, a[:, 6] > 0)(a))
    assert "absolute poses" in written("absolute", put(0, .5))
    assert not written("fine", lambda a: a) and not written("open", put(6, 1)) and not written("closed", put(6, -1))


def test_data_statistics_of_differences(tmp_path):
    """With delta_mask the masked dimensions are those of action - state at the start of the chunk, for every step."""
    rng, episodes = np.random.default_rng(0), []
    for k in range(3):
        states = rng.uniform(.3, .7, (20, 8)).astype(np.float32)
        actions = np.column_stack([states[:, :6] + rng.uniform(-.01, .01, (20, 6)), np.ones(20)]).astype(np.float32)
        episodes.append((data_images(k, 20), states, actions, DATA_TASKS[0], -1))
    real_data.write_dataset(tmp_path / "set", episodes, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        demos, mask = real_data.open_dataset(tmp_path / "set", None, 3, cache_dir=tmp_path / "cache"), np.eye(7)[0]
        got, plain = (real_data.policy_statistics([demos], "x", m)[1]["norm_stats"]["actions"] for m in (mask, None))
    chunk = np.stack([demos.batch(np.array([i]))["actions"][0] for i in range(60)]) - (demos.states[:, :7] * mask)[:, None]
    assert np.allclose(got["q01"][:6], np.quantile(chunk.reshape(-1, 7), .01, 0)[:6], atol=1e-6)
    assert abs(got["q01"][0]) < .5 < got["q99"][0] + .3 and plain["q01"][0] > .25


def test_data_columns_of_other_writers(tmp_path):
    """Scalars as lists of one, a `scene` of one's own; a missing video_path is told, not a traceback."""
    data_write(tmp_path / "set")
    file = tmp_path / "set/data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    for key in ("timestamp", "frame_index", "episode_index", "task_index"):
        lists = pa.array([[x] for x in table[key].to_pylist()], pa.list_(table[key].type))
        table = table.set_column(table.column_names.index(key), key, lists)
    pq.write_table(table, file)
    meta = tmp_path / "set/meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(meta)
    pq.write_table(rows.set_column(rows.column_names.index("scene"), "scene", pa.array(["kitchen"] * len(rows))), meta)
    demos = real_data.open_dataset(tmp_path / "set", cache_dir=tmp_path / "cache")
    assert len(demos) == 27 and set(demos.scenes) == {-1}
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    (tmp_path / "set/meta/info.json").write_text(json.dumps(info | dict(video_path=None)))
    with pytest.raises(ValueError, match="not a readable LeRobot data set"):
        real_data.open_dataset(tmp_path / "set", cache_dir=tmp_path / "cache")


def test_a_run_keeps_its_folder(sft_demos, rl_starts, tmp_path):
    """Nobody else writes there at the same time, and nothing of an earlier run is lost without --resume."""
    args = rl_args(rl_starts / "openvla", tmp_path / "a", "--lambda-real", "0")
    with sft_warmstart.only_run(tmp_path / "a"), pytest.raises(ValueError, match="another run is writing there"):
        rl_cotrain.co_train(args)
    assert rl_cotrain.co_train(args)
    before = (tmp_path / "a/metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a run: --resume"):
        rl_cotrain.co_train(args)
    assert (tmp_path / "a/metrics.jsonl").read_text() == before
    (tmp_path / "a/metrics.jsonl").write_text(before + '{"step": 3, "ppo"')              # a disk that ran full
    more = "--lambda-real", "0", "--iterations", "3", "--resume"
    assert rl_cotrain.co_train(rl_args(rl_starts / "openvla", tmp_path / "a", *more))
    assert [row["step"] for row in sft_metrics(tmp_path / "a")] == [1, 2, 3]
    shutil.copytree(rl_starts / "openvla", tmp_path / "other")
    policies.make_tiny("openvla", seed=5).save(tmp_path / "other")
    with pytest.raises(ValueError, match="Stage I that has been made anew"):
        args = rl_args(tmp_path / "other", tmp_path / "a", "--lambda-real", "0", "--resume")
        args.init = str(rl_starts / "openvla")                 # the same name, another content
        learner = rl_cotrain.Learner(args, policies.load_policy(tmp_path / "other", freeze="vision"), None, 0, 1)
        learner.load(tmp_path / "a/resume.pt")


def test_rl_first_evaluation_is_used_again_if_it_fits(monkeypatch, tmp_path):
    calls = []
    def rates(args, policy, episodes, rank, world, label):
        return calls.append(episodes) or {"sim/push-cube": [dict(episode=k) for k in range(episodes)]} if episodes else {}
    monkeypatch.setattr(rl_cotrain, "success_rates", rates)
    for resume, episodes in ((False, 3), (True, 3), (True, 5), (True, 0)):
        args = types.SimpleNamespace(out=tmp_path, resume=resume, eval_episodes=episodes)
        got = rl_cotrain.first_evaluation(args, None, 0, 1)
        assert [len(each) for each in got.values()] == [episodes] * bool(episodes)
    assert calls == [3, 5]


def test_rl_critic_takes_as_many_steps_with_more_ranks(monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: steps.append(1))
    for world in (1, 4):
        learner = rl_learner(policies.make_tiny("openvla"), critic="state")
        learner.world = world
        learner.fit_critic(torch.zeros(1024 // world, envs.TRUTH), torch.zeros(1024 // world))
    assert len(steps) == 2 * 4 * rl_cotrain.CRITIC_EPOCHS


def test_rl_bfloat16_asks_evaluate_for_the_log_probs():
    policy = policies.make_tiny("openvla")
    policy.bf16 = True
    data, _ = rl_cotrain.rollout(policy, RlToy(), 2, torch.Generator().manual_seed(0), False)
    logs = rl_learner(policy, dtype="bfloat16", micro_batch=64, epochs=1).update(dict(data))
    assert 0 < logs["drift"] < rl_cotrain.DRIFT and logs["worst"] < .1 and logs["skipped"] == 0
    with pytest.raises(RuntimeError, match="act and evaluate disagree"):
        rl_learner(policy, dtype="bfloat16", micro_batch=64).update(dict(data, logp=data["logp"] + 1))


def test_ranks_end_together_and_tell_errors_once(sft_demos, tmp_path):
    """torchrun: the others wait until rank 0 has saved; a user's error in a rank is one line, not its traceback."""
    flags = ["--policy", "openvla", "--scratch", "--sim-ratio", "1", "--sim-data", str(sft_demos / "sim"), "--steps", "1",
             "--eval-episodes", "0", "--device", "cpu", "--out", str(tmp_path / "out")]
    call = lambda *front, more=(): subprocess.run([sys.executable, *front, str(HERE / "sft_warmstart.py"), *flags, *more],
                                                  env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    run = call("-m", "torch.distributed.run", "--nproc-per-node", "2")
    assert run.returncode == 0 and (tmp_path / "out/policy/model.safetensors").exists(), run.stderr[-2000:]
    run = call(more=["--sim-ratio", "0", "--real-data", "/nothing/here", "--out", str(tmp_path / "b"), "--ranks", "2"])
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert [line for line in run.stderr.splitlines() if line.startswith("error: /nothing/here: no such folder")]


def test_rl_target_kl_ends_an_iterations_updates():
    counts = []
    for target in (0., 1e-7):
        policy = policies.make_tiny("openvla")
        data, _ = rl_cotrain.rollout(policy, RlToy(), 2, torch.Generator().manual_seed(0), False)
        counts.append(rl_learner(policy, target_kl=target, epochs=4, micro_batch=64).update(data)["updates"])
    assert counts == [16, 2], "at once, not after an epoch"


def test_rl_not_finite_steps_are_skipped_then_stop():
    policy = policies.make_tiny("openvla")
    learner, before = rl_learner(policy), [p.clone() for p in policy.parameters()]
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(4):
        learner.step(dict(ppo=math.nan))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters())) and learner.skipped == 4
    learner.step(dict(ppo=1.))
    assert learner.skipped == 0 and not torch.equal(before[0], next(policy.parameters()))
    with pytest.raises(RuntimeError, match="not finite 5 times in a row"):
        for _ in range(5):
            learner.step(dict(ppo=math.inf))


def rl_check_resume(starts, demos, folder, name="openvla"):
    """2 iterations = 1 + resume + 1, bit for bit, real batches included."""
    flags = [*rl_flags(demos), "--watch-real"]
    whole = rl_args(starts / name, folder / "whole", *flags, policy=name)
    rl_cotrain.co_train(whole)
    rl_cotrain.co_train(rl_args(starts / name, folder / "half", *flags, "--iterations", "1", policy=name))
    rl_cotrain.co_train(rl_args(starts / name, folder / "half", *flags, "--resume", policy=name))
    a, b = (torch.load(folder / each / "resume.pt", weights_only=True) for each in ("whole", "half"))
    assert a["iteration"] == b["iteration"] == 2 and a["real"] == b["real"] and a["real"]["step"] > 0
    assert a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(x, b["weights"][key]) for key, x in a["weights"].items())
    assert all(torch.equal(x, b["critic"][0][key]) for key, x in a["critic"][0].items())
    rows = [[{key: x for key, x in row.items() if not key.endswith("_s") and key != "held_out/real"}
             for row in sft_metrics(folder / each)] for each in ("whole", "half")]
    assert [row["step"] for row in rows[0]] == [1, 2] and rows[0] == rows[1]


@pytest.mark.parametrize("name", ["openvla", "pi05"])
def test_rl_resume_equals_uninterrupted(rl_starts, sft_demos, tmp_path, name):
    rl_check_resume(rl_starts, sft_demos, tmp_path, name)
    with pytest.raises(ValueError, match="another run: --lr was 0.0002, is 0.1"):
        rl_cotrain.co_train(rl_args(rl_starts / name, tmp_path / "half", *rl_flags(sft_demos), "--watch-real", "--lr", ".1",
                                    "--resume", policy=name))


RL_RANKS = """
import sys; import test_all, rl_cotrain, sft_warmstart, policies, real_data, torch
def job(args, rank, world, device):
    policy = policies.make_tiny("openvla")
    data = test_all.rl_data(policy, 8)
    demos = real_data.open_dataset(sys.argv[1], 64, 1)
    real = real_data.MixSampler(None, demos, 0., 6, 1, rank, world)
    logs = rl_cotrain.gradients(policy, data, torch.arange(rank, 8, world), real, test_all.rl_settings())
    if rank == 0:
        torch.save([logs, [p.grad for p in policy.parameters()]], f"{sys.argv[2]}/{world}.pt")
if __name__ == "__main__":
    for ranks in (1, 2):
        sft_warmstart.launch(job, test_all.types.SimpleNamespace(device="cpu", ranks=ranks))
"""


def test_rl_two_ranks_give_the_gradient_of_one(sft_demos, tmp_path):
    (tmp_path / "ranks.py").write_text(RL_RANKS)
    run = subprocess.run([sys.executable, str(tmp_path / "ranks.py"), str(sft_demos / "real"), str(tmp_path)],
                         env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (one, single), (two, double) = (torch.load(tmp_path / f"{ranks}.pt", weights_only=False) for ranks in (1, 2))
    assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(single, double))
    assert max(g.abs().max() for g in single) > 1e-3


def test_rl_lambda_0_never_opens_the_real_data(rl_starts, sft_demos, tmp_path):
    start, missing = rl_starts / "openvla", ["--real-data", "/nowhere/at/all"]
    assert rl_cotrain.co_train(rl_args(start, tmp_path, "--lambda-real", "0", *missing)) == tmp_path / "policy"
    assert all("real" not in row for row in sft_metrics(tmp_path)) and (tmp_path / "curves.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="/nowhere/at/all"):
        rl_cotrain.co_train(rl_args(start, tmp_path / "b", *missing))


def test_rl_signals_leave_a_checkpoint(rl_starts, sft_demos, tmp_path):
    flags = ["--init", str(rl_starts / "openvla"), *rl_flags(sft_demos), "--device", "cpu", "--eval-episodes", "0", "--num-envs",
             "4", "--steps", "3", "--minibatch", "6", "--real-batch", "4", "--iterations", "999", "--save-every", "1"]
    for ranks, number in (("2", signal.SIGINT), ("1", signal.SIGKILL)):
        out = tmp_path / ranks
        run = subprocess.Popen([sys.executable, str(HERE / "rl_cotrain.py"), *flags, "--ranks", ranks, "--out", str(out)],
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while not (out / "resume.pt").exists() or len(sft_metrics(out)) < 2:
            assert run.poll() is None, run.stderr.read()
            time.sleep(.05)
        run.send_signal(number)
        assert run.wait(60) == (130 if number == signal.SIGINT else -signal.SIGKILL)
        assert ("--resume" in run.stderr.read()) == (number == signal.SIGINT)
        state, rows = torch.load(out / "resume.pt", weights_only=True), sft_metrics(out)
        assert 1 <= state["iteration"] <= rows[-1]["step"] and not (out / "policy").exists()


def test_rl_main_job_small(tmp_path, capsys, monkeypatch):
    """Demonstrations, Stage I, Stage II, evaluation, table, curves, videos, checkpoint; another task finds Stage I."""
    monkeypatch.chdir(tmp_path)
    flags = ["--policy", "pi05", "--task", "close-drawer", "--sim-episodes", "2", "--real-episodes", "2", "--sft-steps", "2",
             "--iterations", "1", "--num-envs", "2", "--steps", "2", "--minibatch", "4", "--real-batch", "4", "--ranks", "1",
             "--eval-episodes", "2", "--demos", "demos", "--device", "cpu"]
    out = rl_cotrain.co_train(rl_cotrain.parse(flags)).parent
    assert out == pathlib.Path("runs/rl-pi05-close-drawer-lambda0.1-seed0")
    result = json.loads((out / "result.json").read_text())
    assert [(row["domain"], row["n"]) for row in result["rows"]] == [("sim", 2), ("sim", 2), ("stand-in", 2), ("stand-in", 2)]
    assert all(0 <= row["low"] <= row["success"] <= row["high"] <= 1 for row in result["rows"])
    assert set(result["paired"]) == {"sim/close-drawer", "stand-in/close-drawer"}
    assert list(out.glob("videos/*/*.mp4")) and (out / "curves.png").exists()
    assert type(policies.load_policy(str(out / "policy"))).__name__ == "Pi05"
    text = capsys.readouterr().out
    assert "SFT co-training, then RL-Co, lambda 0.1, random looks, random dynamics:" in text
    assert "stand-in" in text and "95 % interval" in text
    stage_one = pathlib.Path("runs/sft-pi05-all-alpha0.5-seed0/policy")
    info = json.loads(pathlib.Path("demos/real-all-2-seed0-64px/meta/info.json").read_text())
    assert info["total_episodes"] == 2 * len(envs.TASKS), "both stages learn from demonstrations of all tasks"
    before = stage_one.stat().st_mtime
    rl_cotrain.co_train(rl_cotrain.parse([*flags, "--task", "push-cube", "--lambda-real", "0", "--eval-episodes", "0"]))
    assert stage_one.stat().st_mtime == before
    assert "RL in simulation alone" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds another Stage I: --steps was 2, is 3"):
        rl_cotrain.co_train(rl_cotrain.parse([*flags, "--sft-steps", "3"]))


def test_sft_presets_by_policy_task_and_start():
    """The tiny openvla is warm-started gently, with its eyes frozen; what starts from random weights must learn to see."""
    def chosen(*flags):
        args = sft_warmstart.parse(flags)
        return args.steps, args.lr, args.freeze
    assert chosen("--policy", "openvla") == chosen("--policy", "openvla", "--task", "all") == (700, 3e-4, "vision")
    assert chosen("--policy", "pi05") == (700, 1e-3, "none") and chosen("--policy", "pi05", "--task", "all")[0] == 2100
    assert chosen("--policy", "openvla", "--scratch", "--task", "all") == (2100, 1e-3, "none")
    assert chosen("--policy", "openvla", "--pretrain")[1:] == (1e-3, "none")
    assert chosen("--steps", "5", "--task", "all", "--lr", "1", "--freeze", "none") == (5, 1, "none")


def test_rl_bad_flags_are_listed_together(monkeypatch, tmp_path):
    with pytest.raises(ValueError) as error:
        rl_cotrain.parse(["--lambda-real", "-1", "--gamma", "2", "--epochs", "0", "--init", "/nowhere", "--clip-norm", "-1"])
    for text in ("--lambda-real -1", "--gamma 2", "--epochs", "--init /nowhere", "--clip-norm"):
        assert text in str(error.value)
    for flag in (["--ranks", "-1"], ["--device", "cuda:7"]):
        with pytest.raises(ValueError, match=flag[0]):
            rl_cotrain.parse(flag)
    assert not rl_cotrain.parse(["--resume", "--out", "runs/nothing-here"]).resume, "Stage I may be what was interrupted"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert rl_cotrain.parse(["--init", "base"]).sft.policy == "openvla", "the word, whatever folders there are"
    given = rl_cotrain.parse(["--init", str(policies.BUNDLED["pi05"])])
    assert given.sft.preset == "pi05-tiny" and given.lambda_real == rl_cotrain.PRESETS["pi05-tiny"]["lambda_real"]
    presets = [rl_cotrain.parse(["--policy", name]) for name in ("openvla", "pi05")]
    assert [args.freeze for args in presets] == ["vision", "vision"] and presets[0].dtype == "float32"
    assert presets[0].randomise == ["visual", "dynamics"] and not rl_cotrain.parse(["--task", "pick-place"]).randomise
    assert rl_cotrain.parse(["--task", "pick-place", "--randomise", "dynamics"]).randomise == ["dynamics"]
    assert rl_cotrain.parse(["--dtype", "bf16"]).dtype == "bfloat16"
    with pytest.raises(ValueError, match="--task open: need one of pick-place"):
        rl_cotrain.parse(["--task", "open"])
    for flag, task in ([], "all"), (["--sft-task", "push-cube"], "push-cube"):
        args = rl_cotrain.parse(["--task", "pick-place", *flag])
        assert args.sft.task == task and args.sft.out == f"runs/sft-openvla-{task}-alpha0.5-seed0"
    weights = [rl_cotrain.parse(["--critic", critic]).value_weight for critic in ("head", "state")]
    assert weights == [1., 0.], "a head that judges nothing does not learn"


RL_MUTANTS = [
    ("ppo_loss", "-torch.min(", "torch.min(", rl_check_gradient, "sign of the objective"),
    ("ppo_loss", "-torch.min(", "-torch.max(", rl_check_gradient, "the optimistic bound"),
    ("ppo_loss", "torch.max(error", "torch.min(error", rl_check_gradient, "clipped values"),
    ("ppo_loss", "- args.entropy", "+ args.entropy", rl_check_gradient, "sign of the entropy"),
    ("gradients", "alpha=args.lambda_real", "alpha=0.", rl_check_gradient, "lambda dropped: the published code's defect"),
    ("gradients", "alpha=args.lambda_real", "alpha=1.", rl_check_gradient, "lambda ignored"),
    ("gradients", "(share * loss).backward()", "loss.backward()", rl_check_gradient, "micro-batches not weighted"),
    ("gae", "* ~ended[t] * last", "* last", rl_check_gae, "the mask between episodes"),
    ("gae", "gamma * gae_lambda", "gae_lambda", rl_check_gae, "discount in the trace"),
    ("gae", "- values[t]", "+ values[t]", rl_check_gae, "sign of the baseline"),
    ("rollout", "if truncated[i]]", "]", rl_check_rollout, "a success is bootstrapped, too"),
    ("rollout", "torch.where(ended, futures, following)", "following", rl_check_rollout, "the next episode's value"),
    ("rollout", "logp=torch.cat([each.logp for each in decisions])", "logp=torch.cat([each.logp - .1 for each in decisions])",
     rl_check_ratio, "log-probs that are not the policy's")]


@pytest.mark.parametrize("name, old, new, oracle, what", RL_MUTANTS, ids=[row[4] for row in RL_MUTANTS])
def test_rl_mutants_die(monkeypatch, name, old, new, oracle, what):
    assert_mutant_dies(monkeypatch, rl_cotrain, rl_cotrain, name, old, new, oracle)


def test_rl_mutant_of_the_advantage_dies(monkeypatch):
    """Descending instead of climbing: seen by the toy."""
    assert_mutant_dies(monkeypatch, rl_cotrain, rl_cotrain, "ppo_loss", 'log_ratio.exp(), old["advantage"]',
                       'log_ratio.exp(), -old["advantage"]', rl_check_climbs)


# ---------------------------------------------------------------------------------------------------- evaluate

class EvaluateStub:
    """What evaluate() needs of a policy; act() calls rule(stub, images) -> (n, K, 7)."""
    image_size, device = 16, torch.device("cpu")

    def __init__(self, rule=None, chunk=1, **settings):
        self.settings, self.calls, self.noise = settings, [], []
        self.rule = rule or (lambda stub, images: np.zeros((len(images), chunk, 7)))

    def act(self, images, instructions, deterministic=False, generator=None, **extra):
        self.calls.append(types.SimpleNamespace(images=images, instructions=instructions, deterministic=deterministic,
                                                extra=extra, settings=dict(self.settings)))
        assert len(images) == len(instructions) and images.dtype == np.uint8
        self.noise.append(torch.rand(len(images), generator=generator).tolist())
        return types.SimpleNamespace(actions=torch.as_tensor(self.rule(self, images), dtype=torch.float32))

@pytest.fixture
def evaluate_spy(monkeypatch):
    """Remembers the environments that evaluate() makes."""
    made, original = [], envs.VecEnv
    monkeypatch.setattr(envs, "VecEnv", lambda *args, **options: made.append(original(*args, **options)) or made[-1])
    return made

def evaluate_episode(k, success, steps=10, touched=True, failure=False):
    return dict(episode=k, success=success, steps=steps, touched=touched, failure=failure, diverged=False,
                closest_m=.1, instruction="open the drawer")

def evaluate_outcomes(text):
    return [evaluate_episode(k, letter == "1") for k, letter in enumerate(text)]

# ---- numbers

def test_evaluate_mcnemar_equals_brute_force():
    for b, c in itertools.product(range(7), range(7)):
        n, extreme = b + c, 0                         # every sequence of b + c coins, at least as lopsided as b, c
        for coins in itertools.product((0, 1), repeat=n):
            extreme += abs(2 * sum(coins) - n) >= abs(b - c)
        got = evaluate.compare(evaluate_outcomes("1" * b + "0" * c + "10"), evaluate_outcomes("0" * b + "1" * c + "10"))
        assert math.isclose(got["p"], extreme / 2 ** n), (b, c)
        assert (got["both"], got["only_first"], got["only_second"], got["neither"]) == (1, b, c, 1)

def test_evaluate_mcnemar_known_values_and_large_counts():
    p = lambda b, c: evaluate.compare(evaluate_outcomes("1" * b + "0" * c), evaluate_outcomes("0" * b + "1" * c))["p"]
    assert p(1, 9) == p(9, 1) == 22 / 1024 and p(0, 6) == 2 / 64 and p(5, 5) == p(3, 2) == 1
    assert 0 < p(200, 1200) < 1e-100                  # no overflow

def test_evaluate_interval_of_the_difference():
    got = evaluate.compare(evaluate_outcomes("1110000000"), evaluate_outcomes("0101111110"))
    b, c, n = 2, 6, 10
    counts = np.array([1, b, c, 1]) + .5              # both, only first, only second, neither
    share = counts / counts.sum()
    d, variance = share[2] - share[1], (share[1] + share[2] - (share[2] - share[1]) ** 2) / counts.sum()
    assert got["n"] == n and math.isclose(got["difference"], .4)
    assert np.allclose((got["low"], got["high"]), (d - 1.96 * variance ** .5, d + 1.96 * variance ** .5))
    assert (got["only_first"], got["only_second"]) == (b, c) and got["low"] < .4 < got["high"]
    back = evaluate.compare(evaluate_outcomes("0101111110"), evaluate_outcomes("1110000000"))
    assert np.allclose((back["low"], back["high"]), (-got["high"], -got["low"])) and back["p"] == got["p"]
    assert evaluate.compare(evaluate_outcomes("0" * 9), evaluate_outcomes("1" * 9))["high"] == 1

def test_evaluate_interval_covers_the_true_difference():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):                             # 30 scenes, P(only first) = .1, P(only second) = .3
        kind = rng.choice(4, 30, p=(.3, .1, .3, .3))
        got = evaluate.compare([evaluate_episode(k, x in (0, 1)) for k, x in enumerate(kind)],
                         [evaluate_episode(k, x in (0, 2)) for k, x in enumerate(kind)])
        hits += got["low"] <= .2 <= got["high"]
    assert .93 < hits / 2000 < .975

def test_evaluate_compare_needs_the_same_scenes():
    for first, second in ((evaluate_outcomes("11"), evaluate_outcomes("111")), (evaluate_outcomes("10"), evaluate_outcomes("10")[::-1]), ([], [])):
        with pytest.raises(ValueError, match="same scenes"):
            evaluate.compare(first, second)

def test_evaluate_summary_by_hand():
    got = evaluate.summary([evaluate_episode(0, True, 12), evaluate_episode(1, True, 20), evaluate_episode(2, False, 40, touched=False),
                      evaluate_episode(3, False, 8, touched=False, failure=True), evaluate_episode(4, False, 40)])
    low, high = envs.wilson(2, 5)
    assert got == dict(k=2, n=5, success=.4, low=low, high=high, steps=24., steps_success=16., touched=3, failure=1,
                       diverged=0, looked_wrong=2, moved_wrong=1)
    assert evaluate.summary(evaluate_outcomes("00"))["steps_success"] is None
    with pytest.raises(ValueError, match="no episodes"):
        evaluate.summary([])

# ---- episodes

@pytest.mark.parametrize("task, domain", [("open-drawer", "sim"), ("push-cube", "real")])
def test_evaluate_oracle_policy_equals_run_expert(evaluate_spy, task, domain):
    """A policy that asks the scripted expert succeeds in the same steps as envs.run_expert on the same scenes."""
    experts = {}

    def rule(stub, images):
        env = evaluate_spy[-1]
        experts.setdefault(id(env), envs.Expert(env))
        rows = [int(np.flatnonzero((env.images == image).all((1, 2, 3)))[0]) for image in images]
        return experts[id(env)].act()[0][rows, None]

    stub = EvaluateStub(rule)
    got = evaluate.evaluate(stub, task, domain, 7, seed=5, num_envs=3)
    env = evaluate_spy[-1]
    success, length = envs.run_expert(envs.VecEnv(task, domain, 7, seed=5, image_size=0), 7)
    assert [e["episode"] for e in got] == list(range(7)) and success.sum() >= 6
    assert [e["success"] for e in got] == success.tolist() and [e["steps"] for e in got] == length.tolist()
    for e in got:
        assert not e["success"] or e["closest_m"] < .12 and not e["failure"], e
    assert sum(len(call.images) for call in stub.calls) == length.sum()        # asked for those that run, only
    if domain == "sim":                               # 3 resets of 3; a picture a step; one of the scene that follows
        assert env.frames == 9 + length.sum() + 7

def test_evaluate_scenes_are_those_of_vecenv():
    stub = EvaluateStub()
    got = evaluate.evaluate(stub, "push-cube", "real", 4, seed=5, num_envs=2, blocks=[1])
    env = envs.VecEnv("push-cube", "real", 2, 5, stub.image_size, first_episode=2)
    obs = env.reset()
    assert np.array_equal(stub.calls[0].images, obs["images"])
    assert [e["instruction"] for e in got] == stub.calls[0].instructions == obs["instructions"]
    assert got[0]["closest_m"] <= np.linalg.norm(env.tcp - env.object, axis=1)[0]

def test_evaluate_variant_reaches_the_scenes():
    seen, unseen = EvaluateStub(), EvaluateStub()
    evaluate.evaluate(seen, "push-cube", "sim", 2)
    evaluate.evaluate(unseen, "push-cube", "sim", 2, variant="unseen-objects")
    obs = envs.VecEnv("push-cube", "sim", 2, evaluate.EVAL_SEED, 16, "unseen-objects").reset()
    assert np.array_equal(unseen.calls[0].images, obs["images"])
    assert not np.array_equal(seen.calls[0].images, obs["images"])

def test_evaluate_blocks_in_any_order_alone_or_reused():
    moves = lambda stub, images: .02 * (2 * torch.tensor(stub.noise[-1])[:, None, None] - 1).expand(-1, 4, 7)
    play = lambda **options: evaluate.evaluate(EvaluateStub(moves), "open-drawer", "real", 5, num_envs=2, frames=9, **options)
    alone = [e for block in range(3) for e in play(blocks=[block])]
    for some in (play(), sorted(play(blocks=[2, 0, 1]), key=lambda e: e["episode"])):
        assert [e["episode"] for e in some] == [0, 1, 2, 3, 4]
        for a, b in zip(alone, some):
            assert {k: v for k, v in a.items() if k != "frames"} == {k: v for k, v in b.items() if k != "frames"}
            assert np.array_equal(a["frames"], b["frames"])
    assert len({e["closest_m"] for e in alone}) == 5
    assert play(blocks=[]) == []

def test_evaluate_blocks_have_their_own_noise():
    stub = EvaluateStub()
    evaluate.evaluate(stub, "open-drawer", "sim", 2, num_envs=1)
    assert stub.noise[0] != stub.noise[40] and len(stub.noise) == 80
    again = EvaluateStub()
    evaluate.evaluate(again, "open-drawer", "sim", 2, num_envs=1, seed=6)
    assert again.noise[0] != stub.noise[0]

def test_evaluate_truncated_length_and_frames_with_chunks():
    (got,) = evaluate.evaluate(EvaluateStub(chunk=3), "open-drawer", "sim", 1, frames=1)       # 14 chunks, of the last one step
    assert got["steps"] == 40 and not got["success"] and not got["touched"] and len(got["frames"]) == 41
    assert got["frames"][0] is got["frames"][2] and not np.array_equal(got["frames"][2], got["frames"][3])

def test_evaluate_last_block_runs_what_is_left(evaluate_spy):
    stub = EvaluateStub(chunk=8)
    assert len(evaluate.evaluate(stub, "open-drawer", "sim", 5, num_envs=3)) == 5
    assert [len(call.images) for call in stub.calls] == 5 * [3] + 5 * [2]
    assert len(evaluate.evaluate(stub, "open-drawer", "sim", 2)) == 2 and evaluate_spy[-1].num_envs == 2

def test_evaluate_decoding_and_temperature():
    for decoding, tokens, flow in (("auto", False, True), ("greedy", True, True), ("sampled", False, False)):
        token, plain = EvaluateStub(chunk=40, temperature=1.), EvaluateStub(chunk=40)
        for stub in (token, plain):
            evaluate.evaluate(stub, "open-drawer", "sim", 1, decoding=decoding)
        assert (token.calls[0].deterministic, plain.calls[0].deterministic) == (tokens, flow)
        assert token.calls[0].settings["temperature"] == .6 and token.settings == {"temperature": 1.}
        assert plain.settings == {}

def test_evaluate_temperature_is_restored_after_an_error():
    stub = EvaluateStub(lambda stub, images: np.full((len(images), 1, 7), np.nan), temperature=1.3)
    with pytest.raises(ValueError, match="not finite"):
        evaluate.evaluate(stub, "open-drawer", "sim", 1, temperature=.2)
    assert stub.calls[0].settings["temperature"] == .2 and stub.settings["temperature"] == 1.3

def test_evaluate_state_is_handed_over_if_wanted():
    wants = EvaluateStub(chunk=40, discrete_state=True), EvaluateStub(chunk=40, delta_mask=[True] * 3), EvaluateStub(chunk=40)
    for stub in wants:
        evaluate.evaluate(stub, "open-drawer", "sim", 2)
    assert [call.extra.get("state", np.zeros(0)).shape for stub in wants for call in stub.calls] == [
        (2, 8), (2, 8), (0,)]

def test_evaluate_real_policies_leave_global_random_numbers_alone():
    for name in policies.TINY:
        policy, before = policies.make_tiny(name), torch.get_rng_state()
        settings = dict(policy.settings)
        a, b = (evaluate.evaluate(policy, "open-drawer", "real", 1, decoding="sampled") for _ in range(2))
        assert a == b and torch.equal(before, torch.get_rng_state()) and policy.settings == settings

# ---- ablations

@pytest.mark.parametrize("domain, variant", [("sim", "seen"), ("real", "seen"), ("sim", "unseen-objects"),
                                             ("real", "unseen-objects"), ("pretrain", "seen")])
def test_evaluate_shuffled_instruction_names_another_cube_on_the_table(domain, variant):
    env = envs.VecEnv("push-cube", domain, 60, 3, 0, variant)
    told, scene = env.reset()["instructions"], env.scenes["push"]
    for i, (right, wrong) in enumerate(zip(told, evaluate.wrong_instructions(env))):
        rgb = [scene.field("geom_rgba")[i, scene.model.geom(f"cube{k}").id, :3] for k in range(3)]
        there = {name for name, colour in env.drawn[i].cubes for each in rgb if np.isclose(each, colour).all(-1).any()}
        word = lambda text: [name for name in there if re.search(rf"\b{name}\b", text)]
        assert len(there) == 3 and len(word(right)) == len(word(wrong)) == 1 and word(right) != word(wrong)

def test_evaluate_shuffled_instruction_of_other_tasks_and_in_evaluate():
    rights = {envs.TASKS[task].instruction for task in envs.TASKS}
    for task in set(envs.TASKS) - {"push-cube"}:
        env = envs.VecEnv(task, "sim", 2, image_size=0)
        env.reset()
        wrong = set(evaluate.wrong_instructions(env))
        assert wrong < rights - {envs.TASKS[task].instruction}
    stub, plain = EvaluateStub(chunk=40), EvaluateStub(chunk=40)
    got = evaluate.evaluate(stub, "push-cube", "sim", 3, ablation="shuffled-instruction")
    evaluate.evaluate(plain, "push-cube", "sim", 3)
    assert [e["instruction"] for e in got] == stub.calls[0].instructions
    assert all(a != b for a, b in zip(stub.calls[0].instructions, plain.calls[0].instructions))
    assert np.array_equal(stub.calls[0].images, plain.calls[0].images)

def test_evaluate_blank_image_is_constant():
    stub, plain = EvaluateStub(chunk=8), EvaluateStub(chunk=8)
    got = evaluate.evaluate(stub, "push-cube", "real", 1, ablation="blank-image", frames=1)
    want = evaluate.evaluate(plain, "push-cube", "real", 1)
    assert all((call.images == 128).all() for call in stub.calls) and all((f == 128).all() for f in got[0]["frames"])
    assert got[0]["instruction"] == want[0]["instruction"] and plain.calls[0].images.std() > 1

def test_evaluate_gap_switches_parts_of_the_stand_in():
    for gap in ((), ("dynamics",), tuple(envs.PARAMETERS)):
        stub = EvaluateStub(chunk=40)
        evaluate.evaluate(stub, "push-cube", "real", 2, gap=gap)
        parts = envs.Gap(**{part: part in gap for part in envs.PARAMETERS})
        env = envs.VecEnv("push-cube", "real", 2, evaluate.EVAL_SEED, stub.image_size, gap=parts)
        assert np.array_equal(stub.calls[0].images, env.reset()["images"]), gap
    with pytest.raises(ValueError, match="gap: got .*weather"):
        evaluate.evaluate(stub, "push-cube", "real", 2, gap=["weather"])

# ---- videos, tables, figures

def test_evaluate_videos_and_contact_sheet(tmp_path):
    rng, size = np.random.default_rng(0), 64
    some = [evaluate_episode(3, True) | dict(frames=list(rng.integers(0, 255, (11, size, size, 3), np.uint8))),
            evaluate_episode(4, False) | dict(frames=list(rng.integers(0, 255, (6, size, size, 3), np.uint8))), evaluate_episode(5, True)]
    paths = evaluate.write_videos(some, tmp_path / "v")
    assert [path.name for path in paths] == ["00003-success.mp4", "00004-failure.mp4"]
    for path, each, colour in zip(paths, some, (evaluate.GREEN, evaluate.RED)):
        frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
        assert frames == len(each["frames"]) - 1 + 5 and abs(seconds - frames / 5) < .3
        first, *_, last = imageio.mimread(path, memtest=False)
        assert first.shape == (256, 256, 3)
        assert np.abs(last[2].mean(0) - colour).max() < 25 and np.abs(first[2].mean(0) - colour).max() > 25
    evaluate.contact_sheet(some, tmp_path / "sheet.png")
    sheet = imageio.imread(tmp_path / "sheet.png")
    assert sheet.shape == (512, 768, 3) and tuple(sheet[0, 0]) == evaluate.GREEN and tuple(sheet[-1, -1]) == evaluate.RED
    assert np.array_equal(sheet[8:248:4, 520:760:4], some[0]["frames"][-1][2:62, 2:62])
    evaluate.contact_sheet(some[2:], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert evaluate.write_videos([evaluate_episode(0, True) | dict(frames=[np.zeros((75, 75, 3), np.uint8)] * 3)], tmp_path)     # odd

def test_evaluate_frames_of_so_many_successes_and_failures():
    some = [evaluate_episode(k, k % 3 == 0) | dict(frames=[]) for k in range(9)]
    evaluate.keep_frames(some, 2)
    assert [k for k, each in enumerate(some) if "frames" in each] == [0, 1, 2, 3]
    evaluate.keep_frames(some, 0)
    assert not any("frames" in each for each in some)

def test_evaluate_tables_and_figure(tmp_path):
    rows = [dict(checkpoint=name, task=task, domain=domain, variant="seen", **evaluate.summary(evaluate_outcomes("110" * 4)))
            for name in ("a", "a-much-longer-name") for domain in ("sim", "real") for task in envs.TASKS]
    head, *lines = evaluate.table(rows).splitlines()
    assert len(lines) == 16 and len({len(line) for line in (head, *lines)}) == 1
    assert "stand-in" in lines[4] and "real" not in evaluate.table(rows) and "66.7%" in lines[0] and "12" in lines[0].split()
    text = evaluate.comparison_table([dict(first="a", second="b", task="all", domain="real", variant="seen",
                                     **evaluate.compare(evaluate_outcomes("1" + 9 * "0"), evaluate_outcomes("0" + 9 * "1")))])
    assert "+80.0" in text and "0.021" in text and "stand-in" in text
    evaluate.bar_chart(rows, tmp_path / "bars.png")
    assert imageio.imread(tmp_path / "bars.png").shape[1] > 500

# ---- command line

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    policies.make_tiny("openvla").save(folder)
    return str(folder)

def test_evaluate_curves_of_one_and_of_several_runs(tmp_path, monkeypatch, capsys):
    """Every run is drawn where it has something to show, what nobody measured gets no panel; the bars are the Wilson
    intervals of what was evaluated."""
    from matplotlib.axes import Axes
    drawn, titles = [], []
    monkeypatch.setattr(Axes, "set", lambda self, xlabel, title: titles.append(title))
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, label=None, **_: drawn.append((label, [*x], [*y], None)))
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, bars, label=None, **_: drawn.append((label, [*x], [*y], bars)))
    rows = [dict(step=k, success=k / 4, reward=2. * k, kl=.01) | ({"stand-in/push-cube": .8, "eval_episodes": 50, "held_out/real": .3} if k == 2 else {})
            for k in range(4)]
    for name, some in dict(a=rows, b=rows[:2]).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    files = [str(tmp_path / name / "metrics.jsonl") for name in "ab"]
    evaluate.main(["--curves", "no anchor=" + files[0], files[1], "--out", str(tmp_path / "two")])
    assert (tmp_path / "two/curves.png").stat().st_size > 5000 and "no anchor, b" in capsys.readouterr().out
    assert [(label, x, y) for label, x, y, _ in drawn] == [
        ("no anchor", [2], [.8]), ("no anchor", [0, 1, 2, 3], [0, .25, .5, .75]), ("b", [0, 1], [0, .25]),
        ("no anchor", [2], [.3]), ("no anchor", [0, 1, 2, 3], [0, 2, 4, 6]), ("b", [0, 1], [0, 2])]
    low, high = envs.wilson(40, 50)
    assert np.allclose(drawn[0][3], [[.8 - low], [high - .8]]) and all(bars is None for *_, bars in drawn[1:])
    drawn.clear()
    titles.clear()
    evaluate.main(["--curves", files[1], "again=" + files[1], "--out", str(tmp_path / "few")])
    assert titles == ["success while training, in sim", "reward per environment"]
    drawn.clear()
    evaluate.main(["--curves", files[0], "--out", str(tmp_path / "one")])
    assert [label for label, *_ in drawn] == ["success", "stand-in/push-cube", "reward", "held_out/real", "kl"]
    assert [bars is None for *_, bars in drawn] == [True, False, True, True, True]           # a loss is no rate
    (tmp_path / "b/metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(SystemExit, match="metrics.jsonl: got .*; need a JSON object a line; try "):
        evaluate.main(["--curves", *files])
    for wrong in (["--curves", str(tmp_path / "c")], []):
        with pytest.raises(ValueError, match="--curves: got"):
            evaluate.parse(wrong)

def test_evaluate_result_is_the_same_for_one_and_two_workers(checkpoint, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    results = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        evaluate.main(["--checkpoint", checkpoint, "--domain", "real", "--episodes", "3", "--num-envs", "2", "--videos", "1",
                 "--out", str(out), "--workers", str(workers)])
        assert sorted(path.name for path in out.iterdir()) == ["result.json", "success.png", "videos"]
        results.append(json.loads((out / "result.json").read_text()))
    signal.signal(signal.SIGTERM, handler)
    one, two = results
    assert one["cells"] == two["cells"] and one["seed"] == evaluate.EVAL_SEED and "--episodes 3" in one["command"]
    assert [cell["domain"] for cell in one["cells"]] == ["stand-in"]
    for cell in one["cells"]:
        assert [each["episode"] for each in cell["episodes"]] == [0, 1, 2] and cell["n"] == 3
        assert {**evaluate.summary(cell["episodes"]), **cell} == cell
        assert len({each["closest_m"] for each in cell["episodes"]}) == 3
        assert cell["videos"] and all((tmp_path / "1" / path).exists() for path in cell["videos"])
    text = capsys.readouterr().out
    assert "stand-in" in text and "none is attached" in text

def evaluate_fake_run(args):
    """Outcomes that differ between checkpoints, tasks and domains."""
    return {key: evaluate_outcomes("1" * (2 + 3 * (key[0] == "b") + (key[1] == "sim") + (key[3] == "open-drawer")) + "0" * 4)[:6]
            for key in itertools.product(args.checkpoint, args.domains, args.variants, args.tasks)}

def test_evaluate_averages_and_comparisons(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(policies, "find_folder", pathlib.Path)
    monkeypatch.setattr(evaluate, "run", evaluate_fake_run)
    evaluate.main(["--checkpoint", "a", "b", "--task", "all", "--out", str(tmp_path), "--device", "cpu"])
    got, text = json.loads((tmp_path / "result.json").read_text()), capsys.readouterr().out
    assert len(got["cells"]) == 16 and len(got["averages"]) == 4 and len(got["comparisons"]) == 10
    average = got["averages"][1]
    assert (average["checkpoint"], average["domain"], average["k"], average["n"]) == ("a", "stand-in", 9, 24)
    pooled = [row for row in got["comparisons"] if row["task"] == "all"]
    assert [row["domain"] for row in pooled] == ["sim", "stand-in"] and pooled[0]["n"] == 24
    for row in pooled:                                # the counts of its domain's cells
        parts = [each for each in got["comparisons"] if each["domain"] == row["domain"] and each["task"] != "all"]
        for name in ("both", "only_first", "only_second", "neither"):
            assert row[name] == sum(each[name] for each in parts)
    assert row["first"] == "a" and row["only_second"] > 0 and row["difference"] > 0
    assert "average" in text and "McNemar" in text

@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (ValueError("broken"), "error: broken")])
def test_evaluate_no_result_after_an_interrupt_or_error(tmp_path, monkeypatch, capsys, error, code):
    def act(policy, *_, **__):
        calls.append(1)
        if len(calls) > 45:                           # in the second block
            raise error
        return types.SimpleNamespace(actions=torch.zeros(1, 1, 7))
    calls = []
    stub = EvaluateStub()
    monkeypatch.setattr(stub, "act", types.MethodType(act, stub))
    monkeypatch.setattr(policies, "find_folder", pathlib.Path)
    monkeypatch.setattr(evaluate, "load", lambda *_: stub)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--checkpoint", "a", "--episodes", "2", "--num-envs", "1", "--workers", "1", "--out",
                 str(tmp_path / "out"), "--device", "cpu"])
    assert stop.value.code == code and not (tmp_path / "out").exists()
    assert ("interrupted" in capsys.readouterr().err) == (code == 130)

def test_evaluate_errors_list_all_offenders(checkpoint):
    with pytest.raises(ValueError) as caught:
        evaluate.parse(["--checkpoint", "/nowhere/at/all", checkpoint, "--task", "fly", "--domain", "moon", "--variants",
                  "odd", "--episodes", "0", "--num-envs", "0", "--workers", "-1", "--videos", "-2", "--decoding", "x",
                  "--ablation", "y", "--temperature", "0", "--seed", "-1", "--dtype", "int8", "--gap", "z"])
    text = str(caught.value)
    for offender in ("/nowhere/at/all", "--task: got fly", "--domain: got moon", "--variants: got odd",
                     "--episodes: got 0", "--num-envs: got 0", "--workers: got -1", "--videos: got -2",
                     "--decoding: got x", "--ablation: got y", "--temperature: got 0", "--seed: got -1", "int8", "--gap: got z"):
        assert offender in text, offender
    assert checkpoint not in text and all("need" in line and "try" in line for line in text.splitlines())
    with pytest.raises(ValueError) as caught:
        evaluate.evaluate(EvaluateStub(), "open-drawer", "sim", 4, num_envs=2, blocks=[2], decoding="x", ablation="y")
    assert all(name in str(caught.value) for name in ("blocks", "decoding", "ablation"))
    with pytest.raises(ValueError, match="each once"):
        evaluate.parse(["--checkpoint", checkpoint, checkpoint])

def test_evaluate_parse_expands_all_and_both(checkpoint):
    args = evaluate.parse(["--checkpoint", checkpoint, "--task", "all", "--variants", "all"])
    assert args.tasks == list(envs.TASKS) and args.variants == list(envs.VARIANTS) and args.domains == ["sim", "real"]
    assert (args.episodes, args.num_envs, args.seed, args.decoding) == (100, 25, 999_983, "auto")

def test_evaluate_constants_equal_those_of_stage_1():
    assert (evaluate.EVAL_SEED, evaluate.EVAL_TEMPERATURE) == (sft_warmstart.EVAL_SEED, sft_warmstart.EVAL_TEMPERATURE)
    assert evaluate.NAMES == sft_warmstart.NAMES

# ---- mutants: a formula is broken on purpose, a test must notice

@pytest.mark.parametrize("name, old, new, oracle", [
    ("compare", "min(1., 2 *", "min(1., 1 *", "test_evaluate_mcnemar_equals_brute_force"),
    ("compare", "range(min(b, c) + 1)", "range(min(b, c))", "test_evaluate_mcnemar_equals_brute_force"),
    ("compare", "(c - b) / (n + 2)", "(c - b) / n", "test_evaluate_interval_of_the_difference"),
    ("compare", "b + c + 1 -", "b + c -", "test_evaluate_interval_of_the_difference"),
    ("summary", "not each[\"touched\"]", "each[\"touched\"]", "test_evaluate_summary_by_hand"),
    ("play", "np.random.SeedSequence([env.seed, block])", "np.random.SeedSequence(env.seed)",
     "test_evaluate_blocks_have_their_own_noise"),
    ("play", "block * env.num_envs", "block", "test_evaluate_scenes_are_those_of_vecenv"),
    ("play", "info[\"length\"][i] - before[i]", "chunk.shape[1]", "test_evaluate_truncated_length_and_frames_with_chunks"),
    ("evaluate", "not tokens", "tokens", "test_evaluate_decoding_and_temperature")])
def test_evaluate_mutants_die(monkeypatch, name, old, new, oracle):
    assert_mutant_dies(monkeypatch, evaluate, evaluate, name, old, new, globals()[oracle])


# ---------------------------------------------------------------------------------------------------- architecture

FILES = [path for path in HERE.glob("*.py") if path.name != "test_all.py"]
MAY_IMPORT = dict(envs=set(), policies=set(), real_data={"envs"}, evaluate={"envs", "policies"},
                  sft_warmstart={"envs", "policies", "real_data"},
                  rl_cotrain={"envs", "policies", "real_data", "evaluate", "sft_warmstart"})
INSTALLED = {"torch", "transformers", "mujoco", "numpy", "imageio", "tqdm", "pyarrow", "matplotlib", "safetensors", "tokenizers",
             "huggingface_hub", "filelock", "imageio_ffmpeg", "OpenGL", "PIL"}     # the last seven come with the others


def imported_names(tree):
    names = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_architecture(path):
    tree = ast.parse(path.read_text())
    used = imported_names(tree)
    assert used & set(MAY_IMPORT) <= MAY_IMPORT[path.stem], "the import graph of the files is fixed"
    assert used - set(MAY_IMPORT) - set(sys.stdlib_module_names) <= INSTALLED, "the dependency list is fixed"
    if path.stem == "real_data":                               # the exception: only inside the function that makes demos
        top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        assert "envs" not in imported_names(top)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"
    assert max(map(len, path.read_text().splitlines())) <= 120
    assert main_block_leaks(path.read_text()) == {}


def main_block_leaks(source):
    """{function: names} that a function reads although only the `if __name__` block defines them."""
    tree = ast.parse(source)
    body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    table = symtable.symtable(ast.unparse(ast.Module(body, [])), "file", "exec")
    known = set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    known |= {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    leaks, todo = {}, list(table.get_children())
    while todo:
        scope = todo.pop()
        todo += scope.get_children()
        bad = {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()} - known
        if bad:
            leaks[scope.get_name()] = sorted(bad)
    return leaks


def test_leaks_are_found():
    assert main_block_leaks("def f():\n    return x\nif __name__ == '__main__':\n    x = 1\n") == {"f": ["x"]}
    assert main_block_leaks("y = 1\ndef f():\n    return y\n") == {}


def test_every_flag_has_help():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                words = [k.value for k in node.keywords if k.arg == "help"]
                assert words and ast.unparse(words[0]).strip("'\" "), f"{path.name}:{node.lineno} has no help text"


def test_the_continuous_integration_runs_the_command_of_the_readme():
    """.ci/run extracts the block under "## Tests"; it must find exactly one command that installs and tests."""
    section = (HERE / "README.md").read_text().split("## Tests")[1]
    block = section.split("```")[1]
    assert "requirements.txt" in block and "pytest" in block and "test_all.py" in block
    assert "## Tests" in (HERE / ".ci/run").read_text()
