"""Everything that is asserted about this project.       python -m pytest test_all.py

Groups: envs, policies, real_data, architecture. Oracles, invariants, learning thresholds, and mutants: a formula is broken
on purpose and a test must notice. Tests against reference arrays computed with the official models need the environment
variable REFERENCE_FIXTURES (a folder) and are skipped without it."""
import ast
import builtins
import gc
import inspect
import multiprocessing
import os
import pathlib
import subprocess
import sys
import symtable
import textwrap

import envs                                           # first: it chooses the OpenGL backend before mujoco is imported
import mujoco
import numpy as np
import pytest

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
            assert -1e-9 <= scene.qpos[k, 9] <= env.stroke[k]
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


def test_the_instruction_names_the_cube():
    for domain in envs.DOMAINS:
        env = envs.VecEnv("push-cube", domain, num_envs=30, image_size=0)
        env.reset()
        colours = dict(env.parameters["cubes"])
        scene = env.scenes["push"]
        for i in range(30):
            rgba = scene.field("geom_rgba")[i, scene.model.geom(f"cube{env.named[i]}").id]
            [word] = [word for word in colours if word in env.instruction[i].split()]
            assert rgba[:3] == pytest.approx(colours[word], abs=1e-6)
        assert len(set(env.named)) == 3


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
    scene, drawn = scene_of(env, 0), env.drawn[0]
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
            assert sim != real, f"{part}.{name} is the same in both domains"
    off = dict.fromkeys(envs.PARAMETERS, False)
    sim = envs.VecEnv("all", image_size=0).parameters
    assert envs.VecEnv("all", "real", image_size=0, gap=envs.Gap(**off)).parameters == sim
    for part, rows in envs.PARAMETERS.items():
        one = envs.VecEnv("all", "real", image_size=0, gap=envs.Gap(**{**off, part: True})).parameters
        assert {name for name in one if one[name] != sim[name]} == set(rows)


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
        assert not colours(rows[2]) & (colours(rows[0]) | colours(rows[1]) | unseen), name
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
    assert run(MUJOCO_GL="osmesa").stdout.split()[0] == "osmesa"       # the user's choice stands
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
    name = envs.gl_renderer_name()
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    if "llvmpipe" in name:
        with pytest.warns(UserWarning, match="rendering on the CPU"):
            envs.gl_renderer_name()


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
    assert marks.shape == (2, 3, 3) and marks.dtype == np.float32
    assert obs["state"][:, :3] == pytest.approx(marks[:, 0]) and obs["state"][:, 3] == pytest.approx(np.full(2, np.pi), abs=.1)
    assert marks[:, 2, 1] - marks[:, 1, 1] == pytest.approx(env.stroke)        # the goal is the open handle
    assert obs["state"][:, 6] == pytest.approx(np.full(2, .08), abs=1e-6)


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
