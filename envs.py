"""Four tabletop tasks for a Franka Panda in MuJoCo, many environments at once, scripted experts.

    env = make_env("pick-place", domain="sim", num_envs=32, seed=0, image_size=64)
    obs = env.reset()
    obs, reward, terminated, truncated, info = env.step(actions)  # (N, K, 7): K steps of 0.2 s

Domains   sim: the digital twin, in which a policy trains.
          real: the STAND-IN for a real robot: another MuJoCo scene, whose appearance, dynamics
          and objects differ.
          pretrain: wide randomisation; it shares no texture, camera or colour with the others.
Frame     robot base: x forward, y left, z up; metres, radians; the table top is z = 0.
Action    dx dy dz [m], droll dpitch dyaw [rad] per control step, gripper -1 close .. +1 open.
          The delta is added to the previous TARGET pose, so that tracking errors do not
          accumulate; rotations are about the base axes, through the tool centre point (TCP):
          R <- Rz(dyaw) Ry(dpitch) Rx(droll) R.
Image     (H, W, 3) uint8 RGB, top row first, one third-person camera.
State     (8,) float32: TCP xyz [m], roll pitch yaw [rad], gripper opening [m], 0.
Privileged  (11 + number of tasks,) float32: what only a simulator knows, for critics; see
          VecEnv.observe.
Episode   a function of (seed, domain, episode number): the same scene, whatever the number of
          environments or processes.

A fifth task is one more subclass of Task and one more call of register(). Your own simulator is a
class that passes check_env(), made in make_env(). This file needs only mujoco and numpy (and
imageio for its demo, `python envs.py`): copy it away.
"""
import argparse
import atexit
import contextlib
import ctypes.util
import glob
import itertools
import math
import multiprocessing.util
import os
import pickle
import signal
import sys
import time
import traceback
import types
from typing import NamedTuple
from typing import Protocol

import numpy as np


def choose_opengl():
    """Set the variables that mujoco reads on import. What the user has set stands."""
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if sys.platform.startswith("linux") and ctypes.util.find_library(library):
            os.environ.setdefault("MUJOCO_GL", backend)
    os.environ.setdefault("LP_NUM_THREADS", "0")  # threads of software OpenGL break after fork()
    gpus = [str(k) for k in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    if gpus and "LOCAL_RANK" in os.environ:        # each rank renders on its own GPU
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",")
        if set(visible) <= set(gpus):              # numbers, and not the UUIDs of GPUs
            place = int(os.environ["LOCAL_RANK"]) % len(visible)
            os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(place))  # among those visible


def gl_error(error):
    """Return the OSError for an off-screen OpenGL that failed with `error`."""
    return OSError(
        f"OpenGL: got {type(error).__name__}: {error} (MUJOCO_GL={os.environ.get('MUJOCO_GL')}); "
        "need an off-screen backend; try apt-get install libegl1 libgl1 and MUJOCO_GL=egl (or "
        "libosmesa6 and osmesa), NVIDIA_DRIVER_CAPABILITIES=all in containers, "
        "MUJOCO_EGL_DEVICE_ID=0, or image_size=0 with MUJOCO_GL=off")


choose_opengl()
try:
    import mujoco
except ModuleNotFoundError:
    raise
except (AttributeError, ImportError, RuntimeError) as error:  # of its OpenGL backend
    raise gl_error(error) from error
from mujoco.batch import Batch
from mujoco.batch import SimulationError

DOMAINS = ("sim", "real", "pretrain")
VARIANTS = ("demonstrated", "other-places", "whole-table", "unseen-objects")
RANDOMISE = ("places", "visual", "dynamics")

# ---- constants -----------------------------------------------------------------------------
CONTROL_HZ = 5                 # control steps a second
PHYSICS_DT = .005              # s
BLOCK_STEPS = 5                # physics steps between two set-points of the servos: 25 ms
BLOCKS = 8                     # set-points in a control step of 0.2 s
ACTION_LIMIT = np.array([.04, .04, .04, .2, .2, .2, 1.])  # m, rad, gripper; clipped beyond it
WORKSPACE = np.array([[.30, -.36, .012], [.68, .36, .50]])  # m, [low, high] of the target position
# rad; the TCP is at (.525, 0, .132) m and points down.
HOME = np.array([0, .259, 0, -2.289, 0, 2.515, np.pi / 4])
# All cameras orbit this point and face the robot from its front left: from behind, the hand would
# hide what it pushes.
LOOK_AT = np.array([.45, -.045, .08])  # m
FINGER_OPEN = .04              # m a finger
FINGER_CLOSED = -.01           # m; a negative set-point squeezes thin objects
OPEN, CLOSE = 1, -1            # the gripper's action
# Demonstrations start in a box of each task, as a person covers a part of the table. The other
# places are the band around that box, of this width [m].
OTHER_PLACES_BAND = .04
REWARD_TOUCH = .2              # once an episode, at the first touch or grasp
REWARD_SUCCESS = 1.            # at success, which ends the episode
FREE = 9                       # qpos[:7] is the arm, [7:9] the fingers, [FREE:] is the task's


# ---- tasks ---------------------------------------------------------------------------------
class Waypoint(NamedTuple):
    """One leg of a scripted plan: bring the tool to anchor + offset."""

    anchor: str            # "object" or "goal", wherever it is; "tool", where it was at first
    offset: tuple          # m
    grip: int              # OPEN or CLOSE; before moving, the plan waits for the fingers
    tolerance: float       # m; reached when nearer than this
    steps: int = 25        # control steps after which the plan goes on anyway
    leash: float = 0       # m; restart the plan if tool and object are farther apart; 0 = never
    align: bool = False    # turn the wrist to the object's yaw, up to half a turn


class Task:
    """What a task defines. `env` is a VecEnv; `scene` is its Scene of this task.

    place() may keep facts about the episode in env.sampled[i], beside the sampled parameters.
    """

    name = ""                      # as in --task
    horizon = 40                   # time limit in control steps of 0.2 s
    instruction = ""               # what the policy is told
    paraphrases = ()               # what it is told in the domain `pretrain`
    wrong = "open the drawer"      # an instruction for another task, see wrong_instruction()
    friction = 1.                  # factor on the sampled friction of the loose bodies
    xml = ""                       # MJCF sections to add to SCENE; mocap body 0 is the camera's

    def place(self, env, scene, i, rng):
        """Write the start of an episode of environment i: scene.qpos[i, FREE:] and env.goal[i]."""
        raise NotImplementedError

    def measure(self, env, scene, rows):
        """Set env.object [m], touch, success (and failure) of environments rows (n,)."""
        raise NotImplementedError

    def plan(self, env, i):
        """Return the expert's waypoints in environment i."""
        raise NotImplementedError

    def wrong_instruction(self, env, i):
        """Return an instruction that does not describe the present episode of environment i."""
        return self.wrong


class PickPlace(Task):
    """Pick up an object of random shape, set it down in the dish, let go and retreat."""

    name = "pick-place"
    horizon = 80
    instruction = "put the object into the dish"
    paraphrases = (
        "pick up the thing and drop it in the dish", "place the toy in the round dish",
        "the toy belongs in the bowl", "move the thing to the bowl", "put it on the plate")
    OBJECT_START = np.array([[.42, .04], [.53, .14]])  # m, [low, high] of x and y
    DISH_START = np.array([[.42, -.16], [.53, -.07]])
    APART = .115                   # m, least distance between object and dish at the start
    YAW = .5                       # rad, largest yaw at the start
    GRASP_FORCE = .5               # N on both pads: grasped
    # At success:
    RADIUS = .05                   # m, at most, between object and dish, horizontally
    HEIGHT = .025                  # m, at most, of the object above its height on the table
    CLEAR = .045                   # m, at least, between object and TCP
    xml = """
      <default>
        <default class="dish"><geom contype="3" conaffinity="0" material="dish"/></default>
        <default class="rim"><geom contype="3" conaffinity="0" material="rim"/></default>
      </default>
      <asset><material name="dish"/><material name="rim"/></asset>
      <worldbody>
        <body name="object" pos="0 0 .1">  <!-- its geoms become those of a shape -->
          <freejoint/>
          <geom name="part0" type="box" size=".02 .02 .02" condim="4"/>
          <geom name="part1" type="box" size=".02 .02 .02" condim="4"/>
        </body>
        <body name="dish" mocap="true">    <!-- a floor and eight walls, 45 degrees apart -->
          <geom class="dish" type="cylinder" size=".062 .004" pos="0 0 .004"/>
          <frame euler="0 0 .39269908169872414">
            <replicate count="8" euler="0 0 .7853981633974483">
              <geom class="rim" type="box" pos=".062 0 .01" size=".004 .0265 .01"/>
            </replicate>
          </frame>
        </body>
      </worldbody>
      <sensor>
        <contact geom1="pad_left" body2="object" data="force" num="1" reduce="netforce"/>
        <contact geom1="pad_right" body2="object" data="force" num="1" reduce="netforce"/>
      </sensor>"""

    def place(self, env, scene, i, rng):
        """Give the object its shape, colour and yaw; put it and the dish on the table, apart."""
        sampled = env.sampled[i]
        sampled.rest = 0.          # m, height of the object's origin above the table
        # Switch the second geom off, unless the shape has two.
        scene.set_geom(i, "part1", rgba=0, contype=0, conaffinity=0)
        for k, part in enumerate(SHAPES[sampled.shape]):
            pos = sampled.scale * part.pos
            size = sampled.scale * part.size
            colour = sampled.accent if part.group else sampled.colour
            scene.set_geom(i, f"part{k}", type=part.type[0], pos=pos, size=size, quat=part.quat,
                           rgba=(*colour, 1), contype=1, conaffinity=1)
            sampled.rest = max(sampled.rest, size[UPWARDS.get(part.type[0], 2)] - pos[2])
        scene.paint(i, "dish", sampled.dish)
        scene.paint(i, "rim", .85 * np.array(sampled.dish))
        rim = scene.model.geom_matid == scene.model.material("rim").id
        scene.field("geom_size")[i, rim, 2] = sampled.dish_wall
        scene.field("geom_pos")[i, rim, 2] = sampled.dish_wall
        yaw = rng.uniform(-self.YAW, self.YAW)
        if sampled.shape in ROUND:
            yaw = 0.
        while True:
            xy = env.start_xy(i, rng, self.OBJECT_START)
            dish = env.start_xy(i, rng, self.DISH_START)
            if np.linalg.norm(xy - dish) >= self.APART:
                break
        scene.qpos[i, FREE:] = *xy, sampled.rest, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
        scene.mocap_pos[i, 1, :2] = dish
        env.goal[i] = *dish, 0

    def measure(self, env, scene, rows):
        """Touch: both pads press on it. Success: it lies in the dish, and the tool has let go."""
        pose = scene.qpos[rows, FREE:]                     # (n, 7) xyz [m], quaternion w x y z
        env.object[rows] = pose[:, :3]
        env.object_yaw[rows] = 2 * np.arctan2(pose[:, 6], pose[:, 3])
        force = np.linalg.norm(scene.sensor[rows].reshape(-1, 2, 3), axis=2)   # (n, 2) N
        env.touch[rows] = (force > self.GRASP_FORCE).all(1)
        offset = env.object[rows] - env.goal[rows]         # (n, 3) m
        height = offset[:, 2] - [env.sampled[i].rest for i in rows]
        inside = np.linalg.norm(offset[:, :2], axis=1) < self.RADIUS
        lying = (0 < height) & (height < self.HEIGHT)
        released = (force == 0).all(1)
        clear = np.linalg.norm(env.object[rows] - env.tcp[rows], axis=1) > self.CLEAR
        env.success[rows] = inside & lying & released & clear

    def plan(self, env, i):
        """Above the object, down, grasp, lift, over the dish, down, release, up."""
        return [
            Waypoint("object", (0, 0, .09), OPEN, tolerance=.012, align=True),
            Waypoint("object", (0, 0, 0), OPEN, tolerance=.005, align=True),
            Waypoint("tool", (0, 0, .12), CLOSE, tolerance=.02, steps=8, leash=.06),
            Waypoint("goal", (0, 0, .15), CLOSE, tolerance=.01, leash=.06),
            Waypoint("goal", (0, 0, .075), CLOSE, tolerance=.01, leash=.06),
            Waypoint("tool", (0, 0, .09), OPEN, tolerance=.02, steps=8)]


class PushCube(Task):
    """Push the cube of the named colour forward; moving another one is a failure."""

    name = "push-cube"
    instruction = "push the {colour} cube forward"
    paraphrases = (
        "move the {colour} block away from the robot", "push the {colour} block",
        "the {colour} one goes forward", "shove {colour} to the front",
        "the {colour} block must move")
    friction = .6
    START = np.array([[.42, -.015], [.46, .015]])  # m, [low, high] of x and y, within a lane
    LANES = (-.12, 0., .12)        # m, y
    YAW = .25                      # rad, largest yaw at the start
    HALF = .028                    # m, half the edge of a cube
    DISTANCE = .10                 # m that the named cube must move forward
    WRONG = .03                    # m that no other cube may move
    xml = f"""
      <worldbody>
        <replicate count="3" offset="0 1 0">  <!-- cube0, cube1, cube2 -->
          <body name="cube" pos="0 0 .1">
            <freejoint/>
            <geom name="cube" type="box" size="{HALF} {HALF} {HALF}"/>
          </body>
        </replicate>
      </worldbody>
      <sensor>
        <contact subtree1="hand" body2="cube0" data="found" num="1" reduce="netforce"/>
        <contact subtree1="hand" body2="cube1" data="found" num="1" reduce="netforce"/>
        <contact subtree1="hand" body2="cube2" data="found" num="1" reduce="netforce"/>
      </sensor>"""

    def place(self, env, scene, i, rng):
        """Put three cubes of different colours in three lanes; the instruction names one."""
        sampled = env.sampled[i]
        colours = list(sampled.cubes)
        sampled.colours = [colours[k] for k in rng.permutation(len(colours))[:3]]
        sampled.named = rng.integers(3)
        sampled.starts = np.zeros((3, 2))                  # m
        for k, colour in enumerate(sampled.colours):
            rgb = sample(rng, sampled.cubes[colour])
            scene.set_geom(i, f"cube{k}", rgba=(*rgb, 1))
            yaw = rng.uniform(-self.YAW, self.YAW)
            xy = env.start_xy(i, rng, self.START) + (0, self.LANES[k])
            sampled.starts[k] = xy
            pose = *xy, self.HALF, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
            first = FREE + 7 * k
            scene.qpos[i, first:first + 7] = pose
        env.instruction[i] = env.instruction[i].format(colour=sampled.colours[sampled.named])
        env.goal[i] = *sampled.starts[sampled.named], self.HALF
        env.goal[i, 0] += self.DISTANCE + .02

    def measure(self, env, scene, rows):
        """Success: the named cube is far enough forward, and the others are where they were."""
        cubes = scene.qpos[rows, FREE:].reshape(-1, 3, 7)  # (n, 3, 7) xyz [m], quaternion
        named = (np.arange(len(rows)), [env.sampled[i].named for i in rows])    # index of (n, 3)
        moved = cubes[..., :2] - [env.sampled[i].starts for i in rows]          # (n, 3, 2) m
        distance = np.linalg.norm(moved, axis=2)
        distance[named] = 0                                # of the others only
        env.object[rows] = cubes[named][:, :3]
        env.touch[rows] = scene.sensor[rows][named] > 0
        env.failure[rows] = distance.max(1) > self.WRONG
        env.success[rows] = (moved[named][:, 0] > self.DISTANCE) & ~env.failure[rows]

    def plan(self, env, i):
        """Behind the cube from above, down, through it, up."""
        return [
            Waypoint("object", (-.075, 0, .10), CLOSE, tolerance=.012),
            Waypoint("object", (-.075, 0, -.003), CLOSE, tolerance=.008),
            Waypoint("object", (.08, 0, -.003), CLOSE, tolerance=0, steps=8, leash=.10),
            Waypoint("tool", (0, 0, .12), CLOSE, tolerance=.03, steps=8)]

    def wrong_instruction(self, env, i):
        """Name another cube that is on the table."""
        sampled = env.sampled[i]
        return self.instruction.format(colour=sampled.colours[(sampled.named + 1) % 3])


class Drawer(Task):
    """Open a drawer by its handle, or close it. The cabinet stands at the robot's right."""

    START = np.array([[.44, -.32], [.52, -.27]])  # m, [low, high] of the cabinet's x and y
    START_OPEN = (.14, .19)        # m of travel before it is closed
    OPEN_DISTANCE = .15            # m of travel, at least, to count as open
    CLOSE_DISTANCE = .02           # m of travel, at most, to count as closed
    HANDLE = np.array([0, .166, .055])  # m, of the closed drawer, from the cabinet
    # Only the handle collides: random motions would close a solid drawer in 14 % of the episodes.
    # Its plate is .065 m off the front: the open gripper needs .055 m on either side of it.
    xml = """
      <default>
        <default class="cabinet">
          <geom type="box" contype="0" conaffinity="0" material="cabinet"/>
        </default>
        <default class="handle">
          <geom type="box" contype="2" conaffinity="0" material="handle"/>
        </default>
      </default>
      <asset><material name="cabinet"/><material name="handle"/></asset>
      <worldbody>
        <body name="cabinet" mocap="true">  <!-- open towards +y -->
          <geom class="cabinet" pos="0 0 .106" size=".1 .1 .004"/>
          <geom class="cabinet" pos="0 0 .004" size=".1 .1 .004"/>
          <geom class="cabinet" pos="-.096 0 .055" size=".004 .1 .047"/>
          <geom class="cabinet" pos=".096 0 .055" size=".004 .1 .047"/>
          <geom class="cabinet" pos="0 -.096 .055" size=".092 .004 .047"/>
          <body name="drawer" pos="0 .1 .055">
            <joint type="slide" axis="0 1 0" range="0 .2" armature=".05"/>
            <geom class="cabinet" pos="0 0 0" size=".09 .005 .045"/>
            <geom class="cabinet" pos="0 -.098 -.04" size=".086 .093 .004"/>
            <geom class="cabinet" pos="-.086 -.098 -.015" size=".004 .093 .028"/>
            <geom class="cabinet" pos=".086 -.098 -.015" size=".004 .093 .028"/>
            <geom class="handle" pos="-.03 .032 0" size=".004 .032 .004"/>
            <geom class="handle" pos=".03 .032 0" size=".004 .032 .004"/>
            <geom class="handle" name="handle" pos="0 .066 0" size=".045 .005 .018"/>
          </body>
        </body>
      </worldbody>
      <sensor>
        <contact subtree1="hand" body2="drawer" data="found" num="1" reduce="netforce"/>
      </sensor>"""

    def __init__(self, name, opens, instruction, wrong, paraphrases):
        self.name = name
        self.opens = opens
        self.instruction = instruction
        self.wrong = wrong
        self.paraphrases = paraphrases

    def handle(self, env, scene, rows, travel):
        """Return the handle's position (n, 3) [m] in environments rows at travel (n,) [m]."""
        side = np.array([env.sampled[i].side for i in rows])
        position = scene.mocap_pos[rows, 1] + (self.HANDLE[0], 0, self.HANDLE[2])
        position[:, 1] += side * (self.HANDLE[1] + travel)
        return position

    def place(self, env, scene, i, rng):
        """Put the cabinet down; mirrored (side -1): at the robot's left, turned by half a turn."""
        sampled = env.sampled[i]
        scene.paint(i, "cabinet", sampled.cabinet)
        scene.paint(i, "handle", sampled.handle)
        size = scene.model.geom("handle").size * (sampled.handle_scale, 1, sampled.handle_scale)
        scene.set_geom(i, "handle", size=size)
        scene.field("jnt_range")[i, FREE, 1] = sampled.stroke
        scene.field("dof_frictionloss")[i, FREE] = sampled.drawer_friction
        scene.field("dof_damping")[i, FREE] = sampled.drawer_damping
        x, y = env.start_xy(i, rng, self.START)
        scene.mocap_pos[i, 1, :2] = x, LOOK_AT[1] + sampled.side * (y - LOOK_AT[1])
        scene.mocap_quat[i, 1] = (1, 0, 0, 0) if sampled.side == 1 else (0, 0, 0, 1)
        if self.opens:
            goal = sampled.stroke
        else:
            goal = 0.
            scene.qpos[i, FREE] = rng.uniform(*self.START_OPEN)
        env.goal[i] = self.handle(env, scene, [i], goal)[0]

    def measure(self, env, scene, rows):
        """Success: the drawer has travelled far enough."""
        travel = scene.qpos[rows, FREE]                    # (n,) m
        env.object[rows] = self.handle(env, scene, rows, travel)
        env.touch[rows] = scene.sensor[rows, 0] > 0
        if self.opens:
            env.success[rows] = travel > self.OPEN_DISTANCE
        else:
            env.success[rows] = travel < self.CLOSE_DISTANCE

    def plan(self, env, i):
        """Open: above the handle, astride it, grasp, pull. Close: down in front of it, push."""
        side = env.sampled[i].side
        if self.opens:
            return [
                Waypoint("object", (0, 0, .10), OPEN, tolerance=.012),
                Waypoint("object", (0, 0, .003), OPEN, tolerance=.006),
                Waypoint("goal", (0, .01 * side, .003), CLOSE, tolerance=.01, steps=12, leash=.05),
                Waypoint("tool", (0, 0, .12), OPEN, tolerance=.03, steps=8)]
        return [
            Waypoint("object", (0, .05 * side, .10), CLOSE, tolerance=.015),
            Waypoint("object", (0, .05 * side, 0), CLOSE, tolerance=.01),
            Waypoint("goal", (0, -.03 * side, 0), CLOSE, tolerance=.01, steps=12),
            Waypoint("tool", (0, .03 * side, .10), CLOSE, tolerance=.03, steps=8)]


TASKS = {}                             # name: Task


def register(task):
    """Add a task to TASKS, so that every script knows it by its name."""
    TASKS[task.name] = task


register(PickPlace())
register(PushCube())
register(Drawer(
    "open-drawer", opens=True, instruction="open the drawer", wrong="close the drawer",
    paraphrases=("pull the drawer open", "slide the drawer out", "it must be open", "open it",
                 "pull the handle")))
register(Drawer(
    "close-drawer", opens=False, instruction="close the drawer", wrong="open the drawer",
    paraphrases=("push the drawer shut", "slide the drawer in", "it must be closed", "close it",
                 "push the handle")))


# ---- domains -------------------------------------------------------------------------------
class Uniform(NamedTuple):
    """A number that each episode draws from [low, high)."""

    low: float
    high: float


class Choice:
    """One of the options, which each episode draws; an option may be a distribution itself."""

    def __init__(self, *options):
        self.options = options


def sample(rng, value):
    """Draw from a Uniform or a Choice; any other value is fixed."""
    if isinstance(value, Uniform):
        return rng.uniform(value.low, value.high)
    if isinstance(value, Choice):
        return sample(rng, value.options[rng.integers(len(value.options))])
    return value


def colour(sim, real, low=0., apart=.25):
    """Return a colour's distributions. Colours are RGB in 0-1, or a Choice of such.

    pretrain: 100 fixed random colours with channels from low to 1, each farther than `apart` (in
    RGB) from every colour of sim and real.
    """
    known = []
    for value in (sim, real):
        known += value.options if isinstance(value, Choice) else [value]
    candidates = np.random.default_rng(0).uniform(low, 1, (1000, 3)).round(2)
    distance = np.linalg.norm(candidates[:, None] - np.array(known), axis=2).min(1)
    others = candidates[distance > apart][:100].tolist()
    return dict(sim=sim, real=real, pretrain=Choice(*map(tuple, others)))


# `real` is one laboratory: fixed offsets from the twin, with a small jitter.
VISUAL = dict(
    texture=dict(sim="wood", real="slate", pretrain=Choice("dots", "tiles", "stains", "plain")),
    table=colour(sim=(.62, .47, .36), real=(.10, .42, .40)),
    wall=colour(sim=(.72, .72, .72), real=(.16, .16, .19)),
    robot=colour(sim=(.95, .95, .95), real=(.88, .87, .82), low=.6, apart=.1),
    # boxes and a cloth around the table
    clutter=dict(sim=False, real=True, pretrain=Choice(False, True)),
    # light, of full white; light_side 0 = from above; shadow = opacity
    ambient=dict(sim=.45, real=Uniform(.30, .36), pretrain=Uniform(.20, .60)),
    diffuse=dict(sim=.55, real=Uniform(.55, .70), pretrain=Uniform(.35, .80)),
    light_side=dict(sim=0., real=Uniform(.6, .8), pretrain=Uniform(-1., 1.)),
    shadow=dict(sim=0., real=Uniform(.25, .35), pretrain=Uniform(0., .45)),
    # camera: deg from +x about LOOK_AT, deg, deg, m, m (of LOOK_AT's x, y and z)
    azimuth=dict(
        sim=22., real=Uniform(24.5, 25.5), pretrain=Choice(Uniform(2., 18.), Uniform(29., 44.))),
    elevation=dict(sim=39., real=Uniform(36.5, 37.5), pretrain=Uniform(30., 46.)),
    fovy=dict(sim=29.5, real=Uniform(30.5, 31.), pretrain=Uniform(28., 33.)),
    distance=dict(sim=.90, real=Uniform(.92, .93), pretrain=Uniform(.84, 1.05)),
    shift=dict(sim=0., real=Uniform(.008, .012), pretrain=Uniform(-.02, .02)),
    # tone curve; tint > 0 = warm: red up, blue down
    gain=dict(sim=1., real=Uniform(.85, 1.15), pretrain=Uniform(.75, 1.25)),
    gamma=dict(sim=1., real=Uniform(.9, 1.1), pretrain=Uniform(.8, 1.25)),
    tint=dict(sim=0., real=Uniform(-.08, .08), pretrain=Uniform(-.12, .12)),
    # sensor: sigma of 255; blur over 3 x 3 pixels; probability that an image is the one before
    noise=dict(sim=0, real=4, pretrain=Choice(0, 3)),
    blur=dict(sim=False, real=True, pretrain=False),
    stale=dict(sim=0., real=.1, pretrain=0.))
DYNAMICS = dict(
    # servos: factor on SERVO_KP; kv / kp [s]
    stiffness=dict(sim=1., real=Uniform(.45, .55), pretrain=Uniform(.6, 1.2)),
    damping=dict(sim=.05, real=.08, pretrain=.05),
    # executed / commanded motion; delay of the servos [s]
    action_scale=dict(sim=1., real=Uniform(.87, .93), pretrain=Uniform(.9, 1.1)),
    latency=dict(sim=0., real=Uniform(.025, .075), pretrain=Uniform(0., .05)),
    # fingers: N s/m; N
    finger_damping=dict(sim=100., real=150., pretrain=100.),
    finger_force=dict(sim=40., real=25., pretrain=40.),
    # loose bodies: kg; friction coefficient, see Task.friction
    mass=dict(sim=.05, real=Uniform(.10, .14), pretrain=Uniform(.04, .15)),
    friction=dict(sim=1., real=Uniform(.6, .7), pretrain=Uniform(.7, 1.2)),
    # drawer: N; N s/m
    drawer_friction=dict(sim=1., real=Uniform(2.5, 5.), pretrain=Uniform(1., 4.)),
    drawer_damping=dict(sim=5., real=Uniform(12., 25.), pretrain=Uniform(4., 20.)),
    # the arm starts off HOME by at most this: rad a joint; m
    start_joints=dict(sim=.02, real=.05, pretrain=.05),
    start_tcp=dict(sim=0., real=.02, pretrain=.03))
OBJECTS = dict(
    shape=dict(
        sim=Choice(*"cube brick can ball egg carrot mushroom bottle".split()),
        real=Choice(*"cube can ball carrot pear corn eggplant sponge".split()),
        pretrain=Choice(*"block drum pill lens tee stack".split())),
    colour=colour(
        sim=Choice((.90, .45, .12), (.85, .15, .12), (.55, .35, .75), (.15, .35, .75)),
        real=Choice((.88, .15, .28), (.62, .32, .78), (.98, .80, .22), (.98, .60, .48))),
    accent=dict(
        sim=Choice((.20, .55, .15), (.95, .90, .75)),
        real=Choice((.35, .65, .25), (.90, .90, .60)),
        pretrain=Choice((0., 0., 0.), (.3, .7, .6))),
    scale=dict(sim=1., real=Uniform(.95, 1.05), pretrain=Uniform(.9, 1.15)),
    # half the height of the dish's wall [m]: a plate, a bowl
    dish_wall=dict(sim=.006, real=Uniform(.014, .016), pretrain=Uniform(.005, .017)),
    dish=colour(sim=(.62, .80, .20), real=(.92, .93, .95)),
    cubes=dict(
        sim=dict(
            pink=(.95, .45, .65), blue=(.10, .30, .85), yellow=(.95, .80, .10),
            green=(.10, .65, .25), orange=(.95, .45, .05)),
        real=dict(purple=(.45, .20, .65), yellow=(.90, .72, .20), pink=(.90, .50, .62)),
        pretrain=dict(                 # the eleven basic colour words, in other shades
            red=Choice((.95, .15, .12), (.58, .02, .04)),
            green=Choice((.05, .40, .10), (.30, .90, .15)),
            blue=Choice((.05, .14, .55), (.25, .50, 1.)),
            yellow=Choice((1., .95, .40), (.80, .74, .02)),
            orange=Choice((1., .60, .25), (.80, .32, .02)),
            purple=Choice((.30, .05, .45), (.60, .35, .85)),
            pink=Choice((1., .66, .80), (.85, .30, .50)),
            brown=Choice((.54, .34, .22), (.28, .12, .03)),
            white=Choice((.85, .85, .80), (.78, .86, .92)),
            black=Choice((.18, .16, .18), (0., 0., 0.)),
            grey=Choice((.40, .42, .44), (.62, .60, .58)))),
    cabinet=colour(sim=(.93, .93, .90), real=(.85, .88, .92)),
    handle=colour(sim=(.08, .08, .08), real=(.16, .14, .13)),
    # factor on the size of its plate; m of drawer travel; 1: it opens to +y, -1: mirrored, to -y
    handle_scale=dict(sim=1., real=.9, pretrain=Uniform(.85, 1.15)),
    stroke=dict(sim=.20, real=Uniform(.19, .21), pretrain=Uniform(.19, .21)),
    side=dict(sim=1, real=1, pretrain=-1))
PARAMETERS = VISUAL | DYNAMICS | OBJECTS

# randomise="visual" draws the appearance as `pretrain` does, and objects of any colour. But its
# camera stays as near to the twin's as careful measuring brings it: the cameras of `pretrain` are
# too different for a policy that Stage I has trained on the twin's.
# "places" is no matter of distributions, see VecEnv.start_xy().
RANDOMISED = dict(
    places=[], visual=[*VISUAL, "colour", "dish", "cabinet"], dynamics=[*DYNAMICS])
NEAR_CAMERA = dict(
    azimuth=Uniform(16., 28.), elevation=Uniform(33., 45.), fovy=Uniform(27., 32.),
    distance=Uniform(.84, .96), shift=Uniform(-.02, .02))
UNSEEN_OBJECTS = dict(
    shape=Choice("pot", "cross", "dumbbell", "house"), cabinet=(.42, .56, .74),
    handle=(.75, .12, .10), handle_scale=.75)
UNSEEN_CUBES = dict(
    sim=dict(white=(.95, .95, .95), black=(.08, .08, .08), brown=(.40, .22, .10)),
    real=dict(orange=(.90, .42, .15), green=(.45, .75, .40), red=(.75, .12, .12)))


def distributions(domain, variant, randomise):
    """Return {parameter: distribution} of what the episodes of a domain and variant draw."""
    chosen = {name: values[domain] for name, values in PARAMETERS.items()}
    for part in randomise:
        chosen |= {name: PARAMETERS[name]["pretrain"] for name in RANDOMISED[part]}
    if "visual" in randomise and domain != "pretrain":
        chosen |= NEAR_CAMERA
    if variant == "unseen-objects":
        chosen |= UNSEEN_OBJECTS
        chosen["cubes"] = UNSEEN_CUBES[domain]
    return chosen


# ---- the contract --------------------------------------------------------------------------
class Env(Protocol):
    """What Stage II and evaluation need of N environments that step together; see check_env().

    obs       images (N, H, W, 3) uint8; instructions, a list of N strings; and, if there are any,
              state (N, S) float32 and privileged (N, P) float32. Arrays are never overwritten.
    episodes  environment i starts with episode first_episode + i; a number stands for one scene.
    step      plays chunks (N, K, 7). Returns obs; reward (N,) float32, summed over the chunk;
              terminated (N,) bool: success, failure or a diverged simulation, so that there is no
              future value; truncated (N,) bool: time limit only; and info:
              success, failure, touched, diverged (N,) bool; episode, length [control steps] (N,)
              int; ended (M,) int, the environments whose episode ended; final_obs, their last
              observations (M rows), or None. What ends skips the rest of the chunk and starts its
              next episode by itself: obs is then of the new one.
    """

    num_envs: int
    tasks: list

    def reset(self, first_episode=None):
        """Start over; return the first obs."""

    def step(self, actions):
        """Return obs, reward, terminated, truncated, info."""


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


def check_env(env, steps=100):
    """Compare an environment with Env. It rests until an episode ends, for at most `steps` steps.

    Raises one ValueError with everything that is wrong.
    """
    problems = Problems()

    def expect(what, got, want):
        problems.need(got == want, what, got, want, "help(envs.Env)")

    def kind(value):
        return f"{np.asarray(value).dtype} {np.shape(value)}"

    def check_obs(what, obs, rows):
        size = np.shape(obs.get("images"))[1:3]
        expect(f"{what} images", kind(obs.get("images")), f"uint8 {(rows, *size, 3)}")
        expect(f"{what} instructions", len(obs.get("instructions", ())), rows)
        for name in {"state", "privileged"} & set(obs):
            width = np.shape(obs[name])[-1]
            expect(f"{what} {name}", kind(obs[name]), f"float32 {(rows, width)}")

    for name in ("num_envs", "tasks", "reset", "step"):
        expect(f"env has {name}", hasattr(env, name), True)
    problems.stop()
    n = env.num_envs
    obs = env.reset(first_episode=3)
    check_obs("reset():", obs, n)
    problems.stop()
    before = obs["images"].copy()
    for _ in range(steps):
        new, reward, terminated, truncated, info = env.step(np.zeros((n, 1, 7)))
        if np.any(terminated) or np.any(truncated):
            break
    expect("images overwritten by a later step", not np.array_equal(obs["images"], before), False)
    check_obs("step():", new, n)
    got = info | dict(reward=reward, terminated=terminated, truncated=truncated)
    flags = ("terminated", "truncated", "success", "failure", "touched", "diverged")
    wanted = dict.fromkeys(flags, "bool") | dict(reward="float32", episode="int64", length="int64")
    for name, dtype in wanted.items():
        expect(f"step(): {name}", kind(got.get(name)), f"{dtype} ({n},)")
    problems.stop()
    expect("terminated and truncated at once", (terminated & truncated).any(), False)
    ended = np.flatnonzero(terminated | truncated)
    expect("step(): ended", list(info.get("ended")), list(ended))
    if len(ended):
        check_obs("step(): final_obs", info.get("final_obs") or {}, len(ended))
        expect("step(): episode", list(info["episode"][ended]), list(3 + ended))
    again = env.reset(first_episode=3)["images"]
    expect("reset(first_episode=3) twice is the same", np.array_equal(again, before), True)
    problems.stop()


def check_actions(actions, n):
    """Return chunks of actions (n, K, 7) as float64.

    Raises ValueError for a wrong shape, or non-finite actions, naming the environments.
    """
    actions = np.asarray(actions, np.float64)
    if actions.ndim != 3 or actions.shape[::2] != (n, 7) or not actions.size:
        raise ValueError(f"actions: got shape {actions.shape}; need ({n}, K >= 1, 7); try "
                         "actions[:, None] for one step of dx dy dz droll dpitch dyaw gripper")
    bad = np.flatnonzero(~np.isfinite(actions).all((1, 2)))
    if len(bad):
        raise ValueError(f"actions: got non-finite ones in environments {bad.tolist()}; need "
                         "metres, radians, gripper in [-1, 1]; try np.isfinite before step()")
    return actions


def make_env(task, domain="sim", num_envs=1, seed=0, image_size=64, workers=1, **options):
    """Return the environments of a task in TASKS, or of "all": the one place that makes them.

    They run in this process, or in up to `workers` processes, as many as divide them evenly.
    """
    group = options.get("group", 1)
    while workers > 1 and group > 0 and num_envs % (workers * group):
        workers -= 1
    if workers <= 1:
        return VecEnv(task, domain, num_envs, seed, image_size, **options)
    return ParallelEnv(task, domain, num_envs, seed, image_size, workers, **options)


# ---- environments --------------------------------------------------------------------------
def check_options(task, domain, num_envs, image_size, variant="demonstrated", randomise=(), group=1,
                  workers=1):
    """Raise one ValueError with everything that is wrong in the arguments of an environment."""
    problems = Problems()
    variants = VARIANTS[:1] if domain == "pretrain" else VARIANTS
    for name, got, known in (("task", task, (*TASKS, "all")), ("domain", domain, DOMAINS),
                             ("variant", variant, variants)):
        problems.need(got in known, name, repr(got), f"one of {', '.join(known)}", known[0])
    unknown = set(randomise) - set(RANDOMISE)
    problems.need(not unknown, "randomise", unknown, f"some of {', '.join(RANDOMISE)}", "()")
    fits = image_size == 0 or 8 <= image_size <= 512
    problems.need(fits, "image_size", image_size, "0, or 8 to 512 pixels", 64)
    divides = num_envs > 0 and group > 0 and num_envs % (workers * group) == 0
    problems.need(divides, "num_envs", num_envs,
                  f"a multiple of group = {group} times workers = {workers}", workers * group)
    if workers > 1:
        try:
            pickle.dumps(TASKS)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            problems.need(False, "TASKS", error, "tasks that pickle can send to the workers",
                          "a class at the top of a module, or workers=1")
    problems.stop()


class VecEnv:
    """N environments of one task, stepped together; Env is the contract.

    task            a name in TASKS; "all": every episode draws its task
    domain          one of DOMAINS
    num_envs        N
    seed            which sequence of episodes
    image_size      pixels (H = W), 8 to 512; 0 = no images and no OpenGL
    variant         where episodes start, and with what: "demonstrated", in the places of the
                    demonstrations; "other-places", beside them; "whole-table", even episodes
                    in the demonstrated places and odd ones in the others; "unseen-objects",
                    held-out shapes and colours. Only the first exists in `pretrain`
    randomise       which of RANDOMISE are drawn: places as in "whole-table", the others as in
                    `pretrain`, but for the camera (NEAR_CAMERA)
    first_episode, episode_stride, group
                    environment i starts with episode first_episode + (i // group) * episode_stride;
                    the `group` environments that share it share the later ones, too (for GRPO)
    worker          (w, W): these are N of the W * N environments of a ParallelEnv, from w * N on
    auto_reset      False: an environment whose episode has ended stays as it is, ignores actions,
                    and is not rendered again until reset() (for evaluation)
    """

    def __init__(self, task, domain, num_envs, seed, image_size, variant="demonstrated",
                 randomise=(), first_episode=0, episode_stride=1, group=1, worker=(0, 1),
                 auto_reset=True):
        check_options(task, domain, num_envs, image_size, variant, randomise, group)
        self.num_envs = num_envs
        self.seed = seed
        self.domain = domain
        self.image_size = image_size
        self.first_episode = first_episode
        self.episode_stride = episode_stride
        self.group = group
        self.worker = worker
        self.auto_reset = auto_reset
        self.variant = "whole-table" if "places" in randomise else variant
        self.distributions = distributions(domain, variant, randomise)
        self.tasks = list(TASKS) if task == "all" else [task]
        self.known_tasks = np.array(list(TASKS))
        self.privileged_size = 11 + len(TASKS)
        self.scenes = {name: Scene(TASKS[name], num_envs, image_size) for name in self.tasks}
        self.allocate(num_envs)

    def allocate(self, n):
        """Make the arrays with a row for each environment."""
        # The present episode:
        self.task = np.full(n, None)               # name
        self.instruction = np.full(n, None)
        self.sampled = np.full(n, None)            # its parameters, and what the task notes
        self.camera = np.full(n, None)             # Camera
        self.expert_rng = np.full(n, None)         # of the demonstrator's imperfections
        self.episode = np.zeros(n, int)            # number
        self.horizon = np.zeros(n, int)            # control steps
        self.steps = np.zeros(n, int)              # control steps so far
        self.touched = np.zeros(n, bool)           # so far
        self.succeeded = np.zeros(n, bool)
        self.diverged = np.zeros(n, bool)
        self.over = np.zeros(n, bool)              # it has ended, and there is no auto_reset
        # Measured after each control step:
        self.tcp = np.zeros((n, 3))                # m
        self.frame = np.zeros((n, 3, 3))           # rotation of the tool
        self.object = np.zeros((n, 3))             # m; the object, the named cube, the handle
        self.object_yaw = np.zeros(n)              # rad
        self.goal = np.zeros((n, 3))               # m; where the object should be
        self.opening = np.zeros(n)                 # m between the pads
        self.finger_speed = np.zeros(n)            # m/s
        self.touch = np.zeros(n, bool)             # now
        self.success = np.zeros(n, bool)
        self.failure = np.zeros(n, bool)
        # The controller:
        self.scale = np.ones(n)                    # executed / commanded motion
        self.latency = np.zeros(n, int)            # blocks of 25 ms
        self.target = np.zeros((n, 3))             # m; commanded TCP
        self.target_frame = np.zeros((n, 3, 3))
        self.joints = np.zeros((3, n, 7))          # rad; set-points of this control step,
        self.grip = np.zeros((3, n, 1))            # ... m; of the last, and the one before
        self.images = np.zeros((n, self.image_size, self.image_size, 3), np.uint8)

    def reset(self, first_episode=None):
        """Start over, by default with the constructor's first_episode; return observe() of all.

        The k-th episode number is first_episode + k * episode_stride. With G groups in each of W
        workers, the groups of worker w start with k = w * G to w * G + G - 1. Whichever of them
        ends an episode takes the worker's next k of W * G + w, W * G + w + W, W * G + w + 2 W, ...
        """
        self.start = self.first_episode if first_episode is None else first_episode
        w, workers = self.worker
        groups = self.num_envs // self.group
        first = range(w * groups, (w + 1) * groups)
        later = itertools.count(workers * groups + w, workers)
        self.unused = itertools.chain(first, later)                      # k
        self.numbers = [[] for _ in range(groups)]                       # episodes of each group
        self.restarts = np.zeros(self.num_envs, int)
        everyone = np.arange(self.num_envs)
        self.begin_episodes(everyone)
        return self.observe(everyone)

    def begin_episodes(self, ids):
        """Put environments ids (n,) into their next scenes; the others stay as they are.

        The arms start near HOME, grippers open, controller targets where the tools really are.
        """
        for i in ids:
            self.arrange(i)
        sampled = self.sampled[ids]
        start_joints = np.array([one.start_joints * one.arm[:7] for one in sampled])  # rad
        start_tcp = np.array([one.start_tcp * one.arm[7:] for one in sampled])  # m
        tcp, frame, _ = forward_kinematics(HOME + start_joints)
        tcp = np.clip(tcp + start_tcp, *WORKSPACE)
        joints = inverse_kinematics(HOME + start_joints, tcp, frame)
        self.target[ids], self.target_frame[ids], _ = forward_kinematics(joints)
        self.joints[:, ids] = joints
        self.grip[:, ids] = FINGER_OPEN
        for scene, rows in self.members(ids):
            for state in (scene.qpos, scene.ctrl):
                state[rows, :7] = self.joints[0, rows]
                state[rows, 7:9] = FINGER_OPEN
            scene.update(rows)
        self.measure(ids)

    def arrange(self, i):
        """Draw the next episode of environment i and write its scene."""
        numbers = self.numbers[i // self.group]
        if self.restarts[i] == len(numbers):       # the first of its group to get there
            numbers.append(self.start + next(self.unused) * self.episode_stride)
        self.episode[i] = numbers[self.restarts[i]]
        self.restarts[i] += 1
        # A stream for each part: a change in one leaves what the others draw as it is.
        key = [self.seed, DOMAINS.index(self.domain), self.episode[i]]
        streams = [np.random.default_rng([*key, stream]) for stream in range(5)]
        layout, visual, dynamics, objects, self.expert_rng[i] = streams
        self.task[i] = sample(layout, Choice(*self.tasks))
        task = TASKS[self.task[i]]
        wordings = [task.instruction]
        if self.domain == "pretrain" and task.paraphrases:
            wordings = task.paraphrases
        self.instruction[i] = sample(layout, Choice(*wordings))
        self.horizon[i] = task.horizon
        self.steps[i] = 0
        for flag in (self.touched, self.succeeded, self.failure, self.diverged, self.over):
            flag[i] = False
        sampled = types.SimpleNamespace()
        for rng, part in ((visual, VISUAL), (dynamics, DYNAMICS), (objects, OBJECTS)):
            for name in part:
                setattr(sampled, name, sample(rng, self.distributions[name]))
        sampled.repeats = visual.random(task.horizon + 1) < sampled.stale  # image t is t - 1
        sampled.noise_seed = visual.integers(1 << 20)
        sampled.arm = dynamics.uniform(-1, 1, 10)  # how far off HOME: 7 joints, xyz
        odd = self.episode[i] % 2 == 1
        sampled.elsewhere = self.variant == "other-places" or self.variant == "whole-table" and odd
        if sampled.elsewhere:
            sampled.start_tcp += OTHER_PLACES_BAND
        self.sampled[i] = sampled
        self.scale[i] = sampled.action_scale
        self.latency[i] = round(sampled.latency / (BLOCK_STEPS * PHYSICS_DT))
        scene = self.scenes[task.name]
        scene.batch.reset([i], stage=0)
        self.camera[i] = scene.set_appearance(i, sampled)
        scene.set_dynamics(i, sampled)
        task.place(self, scene, i, layout)

    def start_xy(self, i, rng, box):
        """Draw a start (2,) [m] of environment i: from a box [low, high], or from the band."""
        low, high = box
        if not self.sampled[i].elsewhere:
            return rng.uniform(low, high)
        while True:
            xy = rng.uniform(low - OTHER_PLACES_BAND, high + OTHER_PLACES_BAND)
            if (xy < low).any() or (xy > high).any():
                return xy

    def step(self, actions):
        """Play chunks of actions (N, K, 7), see Env. Actions beyond ACTION_LIMIT are clipped.

        Raises the ValueErrors of check_actions().
        """
        n = self.num_envs
        actions = check_actions(actions, n)
        reward = np.zeros(n)
        terminated = np.zeros(n, bool)
        truncated = np.zeros(n, bool)
        for action in actions.swapaxes(0, 1):                      # (N, 7)
            ids = np.flatnonzero(~(terminated | truncated | self.over))
            self.advance(ids, np.clip(action[ids], -ACTION_LIMIT, ACTION_LIMIT))
            self.steps[ids] += 1
            self.measure(ids)
            reward[ids] += self.events(ids)
            terminated[ids] = (self.succeeded | self.failure | self.diverged)[ids]
            truncated[ids] = (self.steps >= self.horizon)[ids] & ~terminated[ids]
        ended = np.flatnonzero(terminated | truncated)
        info = dict(
            success=self.succeeded.copy(), failure=self.failure.copy(), touched=self.touched.copy(),
            diverged=self.diverged.copy(), episode=self.episode.copy(), length=self.steps.copy(),
            ended=ended, final_obs=None)
        if len(ended):
            info["final_obs"] = self.observe(ended)
            if self.auto_reset:
                self.begin_episodes(ended)
            else:
                self.over[ended] = True
        obs = self.observe(np.arange(n))
        return obs, reward.astype(np.float32), terminated, truncated, info

    def members(self, ids):
        """Yield (scene, rows): each scene with those of the environments ids (n,) in it."""
        for name, scene in self.scenes.items():
            rows = ids[self.task[ids] == name]
            if len(rows):
                yield scene, rows

    def advance(self, ids, action):
        """Simulate 0.2 s: move targets, solve for joints, feed set-points in blocks of 25 ms."""
        delta = action[:, :6] * self.scale[ids, None]
        self.target[ids] = np.clip(self.target[ids] + delta[:, :3], *WORKSPACE)
        self.target_frame[ids] = frame_of(delta[:, 3:]) @ self.target_frame[ids]
        self.joints[1:, ids] = self.joints[:2, ids]
        self.grip[1:, ids] = self.grip[:2, ids]
        self.joints[0, ids] = inverse_kinematics(
            self.joints[1, ids], self.target[ids], self.target_frame[ids])
        self.grip[0, ids] = FINGER_CLOSED + (action[:, 6:] + 1) / 2 * (FINGER_OPEN - FINGER_CLOSED)
        now, last, older = self.joints                             # (N, 7) each
        groups = list(self.members(ids))
        for block in range(BLOCKS):
            # Progress through this step's set-points; negative while a delayed robot is still on
            # its way to the last step's.
            s = ((block + 1 - self.latency) / BLOCKS)[:, None]     # (N, 1)
            q = last + np.clip(s, 0, 1) * (now - last) + np.clip(-s, 0, 1) * (older - last)
            grip = np.where(s > 0, self.grip[0], self.grip[1])     # (N, 1)
            for scene, rows in groups:
                scene.ctrl[rows, :7] = q[rows]
                scene.ctrl[rows, 7:9] = grip[rows]
                try:
                    scene.batch.step(rows, nstep=BLOCK_STEPS)
                except SimulationError as error:  # the other simulations ran on
                    self.diverged[error.ids] = True
        for scene, rows in groups:  # MuJoCo itself resets a diverged simulation, with a warning
            warned = scene.batch.warning[rows, :, 1].any(1)
            self.diverged[rows] |= warned | ~np.isfinite(scene.batch.state[rows]).all(1)

    def measure(self, ids):
        """Read tool, object, touch, success and failure of environments ids from the simulation."""
        for scene, rows in self.members(ids[~self.diverged[ids]]):
            self.tcp[rows], self.frame[rows], _ = forward_kinematics(scene.qpos[rows, :7])
            self.opening[rows] = scene.qpos[rows, 7:9].sum(1)
            self.finger_speed[rows] = np.abs(scene.qvel[rows, 7:9]).max(1)
            scene.task.measure(self, scene, rows)

    def events(self, ids):
        """Return the reward (n,) of environments ids for what happened for the first time."""
        touch = self.touch[ids] & ~self.diverged[ids]
        success = self.success[ids] & ~self.diverged[ids]
        reward = REWARD_TOUCH * (touch & ~self.touched[ids]) + REWARD_SUCCESS * success
        self.touched[ids] |= touch
        self.succeeded[ids] |= success
        return reward

    def observe(self, ids):
        """Return the observation of environments ids (n,), in fresh arrays.

        images (n, H, W, 3) uint8 (absent if image_size is 0); instructions, a list of n strings;
        state (n, 8) float32; privileged (n, privileged_size) float32: tool, object and goal from
        LOOK_AT [10 cm], gripper opening [10 cm], touched so far, task (one-hot).
        """
        state = np.zeros((len(ids), 8), np.float32)
        state[:, :3] = self.tcp[ids]
        state[:, 3:6] = euler_of(self.frame[ids])
        state[:, 6] = self.opening[ids]
        points = np.stack([self.tcp[ids], self.object[ids], self.goal[ids]], 1)    # (n, 3, 3)
        points = 10 * (points - LOOK_AT).reshape(-1, 9)
        one_hot = self.task[ids, None] == self.known_tasks
        privileged = np.column_stack([points, 10 * state[:, 6], self.touched[ids], one_hot])
        obs = dict(instructions=list(self.instruction[ids]), state=state)
        obs["privileged"] = privileged.astype(np.float32)
        if self.image_size:
            open_gl()
            for i in ids:
                self.update_image(i)
            obs["images"] = self.images[ids]                       # a copy
        return obs

    def update_image(self, i):
        """Render environment i, unless it shows the last image again or waits for reset()."""
        sampled = self.sampled[i]
        step = self.steps[i]
        if self.over[i] or (step > 0 and sampled.repeats[step]):
            return
        image = self.scenes[self.task[i]].render(i, self.tcp[i], sampled)
        self.images[i] = camera_effects(image, sampled, step)

    def wrong_instructions(self):
        """Return N instructions that do not describe the episodes: other cubes, other tasks."""
        return [TASKS[task].wrong_instruction(self, i) for i, task in enumerate(self.task)]


class ParallelEnv:
    """N environments in W worker processes, a VecEnv of N / W in each; Env is the contract.

    Takes what VecEnv takes, and workers = W. Environment i starts with the episode that it starts
    with in a VecEnv of N, and an episode number stands for the same scene. The numbers of the later
    episodes differ: each worker has its own, see VecEnv.reset(), so that nothing depends on which
    worker is faster.

    Workers import the main script, whose work must stand under `if __name__ == "__main__"`, and get
    the tasks in TASKS as they are when the ParallelEnv is made.

    Raises the error of a worker, and RuntimeError if a worker has died; all workers end then. They
    also end with close(), with the last reference to the ParallelEnv, and with this process.
    """

    def __init__(self, task, domain, num_envs, seed, image_size, workers, variant="demonstrated",
                 randomise=(), group=1, **options):
        check_options(task, domain, num_envs, image_size, variant, randomise, group, workers)
        self.num_envs = num_envs
        self.pipes = []
        self.processes = []
        self.images = []           # of each worker, uint8, in memory shared with it
        # Called with the last reference to self, too, and when this process ends.
        self.close = multiprocessing.util.Finalize(
            self, end_workers, (self.pipes, self.processes), exitpriority=0)
        # Not "fork": a forked process would share the OpenGL and CUDA contexts of this one.
        context = multiprocessing.get_context("spawn")
        shape = (num_envs // workers, image_size, image_size, 3)
        for _ in range(workers):
            pipe, far_end = context.Pipe()
            memory = context.RawArray("B", math.prod(shape))
            process = context.Process(target=work, args=(far_end, memory, TASKS), daemon=True)
            process.start()
            far_end.close()        # the worker's copy is the only one: it closes if the worker dies
            self.pipes.append(pipe)
            self.processes.append(process)
            self.images.append(np.frombuffer(memory, np.uint8).reshape(shape))
        options.update(task=task, domain=domain, num_envs=num_envs // workers, seed=seed,
                       image_size=image_size, variant=variant, randomise=randomise, group=group)
        made = self.ask("make", [(dict(options, worker=(w, workers)),) for w in range(workers)])
        self.tasks, self.privileged_size = made[0]

    def reset(self, first_episode=None):
        """Start over, by default with the constructor's first_episode; return the first obs."""
        return self.join_obs(self.ask("reset", [(first_episode,)] * len(self.pipes)))

    def step(self, actions):
        """Play chunks of actions (N, K, 7), see Env. Raises the ValueErrors of check_actions()."""
        actions = check_actions(actions, self.num_envs)
        chunks = np.split(actions, len(self.pipes))
        answers = self.ask("step", [(chunk,) for chunk in chunks])
        obs, reward, terminated, truncated, info = zip(*answers)
        final_obs = [part.pop("final_obs") for part in info]
        final_obs = [part for part in final_obs if part is not None]
        terminated = join(terminated)
        truncated = join(truncated)
        info = join(info)
        info["ended"] = np.flatnonzero(terminated | truncated)
        info["final_obs"] = join(final_obs) if final_obs else None
        return self.join_obs(obs), join(reward), terminated, truncated, info

    def wrong_instructions(self):
        """Return N instructions that do not describe the episodes."""
        return join(self.ask("wrong_instructions", [()] * len(self.pipes)))

    def join_obs(self, parts):
        """Return one observation in fresh arrays from those of the workers, which lack images."""
        obs = join(parts)
        images = join(self.images)
        if images.size:
            obs["images"] = images
        return obs

    def ask(self, request, arguments):
        """Send a request with a tuple of arguments to each worker; return their answers."""
        try:
            for pipe, some in zip(self.pipes, arguments):
                pipe.send((request, some))
            answers = [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError) as error:
            self.close()
            codes = [process.exitcode for process in self.processes]
            raise RuntimeError(
                f"workers: got exit codes {codes}; need workers that live; try fewer workers or "
                "environments if memory ran out (-9), a new ParallelEnv if this one is closed (0), "
                "else see the worker's own message") from error
        except BaseException:      # Ctrl-C, for example: a late answer would be taken for the next
            self.close()
            raise
        for answer in answers:
            if isinstance(answer, Exception):
                self.close()
                raise answer
        answers, tasks = zip(*answers)
        self.task = np.concatenate(tasks)          # of the present episodes
        return answers


def work(pipe, memory, tasks):
    """Be a worker of a ParallelEnv: do what the pipe requests, until its other end closes.

    Answers (result, env.task), or an exception. The images of an observation are left in the shared
    memory: through a pipe they would cost more than a tenth of a step, at 64 of 224 px.
    """
    # Signals to all processes, such as Ctrl-C, are for the parent: it may want to save first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    TASKS.clear()
    TASKS.update(tasks)
    with contextlib.suppress(EOFError, OSError):
        while True:
            request, arguments = pipe.recv()
            try:
                if request == "make":
                    env = VecEnv(**arguments[0])
                    env.images = np.frombuffer(memory, np.uint8).reshape(env.images.shape)
                    result = env.tasks, env.privileged_size
                else:
                    result = getattr(env, request)(*arguments)
                if request == "reset":
                    result.pop("images", None)
                if request == "step":
                    result[0].pop("images", None)
                answer = result, env.task
            except Exception as error:
                error.add_note(traceback.format_exc())  # where in the worker
                answer = error
            pipe.send(answer)


def end_workers(pipes, processes):
    """End the workers: closing a pipe does, unless a worker hangs."""
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(timeout=10)   # s
        process.kill()
        process.join()


def join(parts):
    """Join the parts of all workers: arrays and lists end to end, dicts of them key by key."""
    if isinstance(parts[0], dict):
        return {key: join([part[key] for part in parts]) for key in parts[0]}
    if isinstance(parts[0], list):
        return sum(parts, [])
    return np.concatenate(parts)


# ---- experts -------------------------------------------------------------------------------
class Expert:
    """Scripted demonstrator of every environment in env, closed-loop, from the simulator's state.

        expert = Expert(env);   executed, label = expert.act();   env.step(executed[:, None])

    style "expert": precise. With noise > 0 [m] it executes label + N(0, sigma), sigma drawn from
    U(0, noise) once an episode: such demonstrations contain recoveries, and their labels stay clean
    (DART, Laskey et al. 2017).
    style "teleop": an imperfect person: slower or faster, a few mm off, with pauses, an overshoot
    and correlated noise; label = executed, as in a recording. Both depend on the episode only.
    """

    SPEED = .036                       # m a control step
    TURN_SPEED = .18                   # rad a control step

    def __init__(self, env, style="expert", noise=0.):
        problems = Problems()
        problems.need(style in ("expert", "teleop"), "style", style, "expert or teleop", "expert")
        problems.need(0 <= noise <= .02, "noise", noise, "0 to .02 m", .005)
        problems.stop()
        self.env = env
        self.teleop = style == "teleop"
        self.noise = noise
        self.habits = [None] * env.num_envs  # of the demonstrator of the present episode

    def act(self):
        """Return the next actions: executed (N, 7) and label (N, 7), see the class."""
        executed = np.zeros((self.env.num_envs, 7))
        label = np.zeros((self.env.num_envs, 7))
        for i, rng in enumerate(self.env.expert_rng):
            if self.habits[i] is None or self.habits[i].rng is not rng:    # a new episode
                self.habits[i] = self.new_habits(rng)
                self.habits[i].plan = self.follow_plan(i)
            habits = self.habits[i]
            habits.drift = habits.memory * habits.drift + rng.normal(0, 1, 6)
            if self.teleop and rng.random() < .02:
                habits.pause = rng.integers(1, 4)                  # control steps
            else:
                habits.pause = max(habits.pause - 1, 0)
            if habits.pause:
                label[i] = hold(habits.grip)
            else:
                label[i] = next(habits.plan)
            habits.grip = label[i, 6]
            executed[i] = label[i]
            executed[i, :6] += habits.sigma * habits.drift * (1, 1, 1, 3, 3, 3)
        executed = np.clip(executed, -ACTION_LIMIT, ACTION_LIMIT)
        if self.teleop:
            return executed, executed.copy()
        return executed, label

    def new_habits(self, rng):
        """Draw how an episode is demonstrated."""
        habits = types.SimpleNamespace(rng=rng, drift=np.zeros(6), pause=0, grip=OPEN)
        habits.speed = rng.uniform(.6, 1.1) if self.teleop else 1.  # x SPEED
        habits.offset = rng.normal(0, .003, 3)     # m, off every waypoint
        habits.overshoot = rng.uniform(.01, .02)   # m, once
        habits.sigma = .0012                       # m of noise; in rad three times that
        habits.memory = .7                         # of the noise, from step to step
        if not self.teleop:
            habits.offset = np.zeros(3)
            habits.overshoot = 0
            habits.sigma = rng.uniform(0, self.noise)
            habits.memory = 0
        return habits

    def follow_plan(self, i):
        """Yield the actions (7,) of environment i, from waypoint to waypoint, again and again."""
        env = self.env
        grip = None
        while True:
            began = env.steps[i]
            for waypoint in TASKS[env.task[i]].plan(env, i):
                if grip not in (None, waypoint.grip):
                    yield hold(waypoint.grip)
                    for _ in range(7):             # until the fingers stand still
                        yield hold(waypoint.grip)
                        if env.finger_speed[i] < .004:
                            break
                grip = waypoint.grip
                lost = yield from self.approach(i, waypoint)
                if lost:
                    break
            if env.steps[i] == began:              # no action, so that nothing would ever change
                yield hold(grip)

    def approach(self, i, waypoint):
        """Yield the actions (7,) towards a waypoint; return True if the object got lost."""
        env = self.env
        habits = self.habits[i]
        tool = env.target[i].copy()
        for _ in range(waypoint.steps):
            anchor = dict(object=env.object[i], goal=env.goal[i], tool=tool)[waypoint.anchor]
            aim = np.clip(anchor + waypoint.offset + habits.offset, *WORKSPACE)
            gap = aim - env.target[i]                              # (3,) m
            distance = np.linalg.norm(gap)
            turn = 0.
            if waypoint.align:
                heading = np.arctan2(env.target_frame[i, 1, 0], env.target_frame[i, 0, 0])
                turn = (env.object_yaw[i] - heading + np.pi / 2) % np.pi - np.pi / 2
            if waypoint.leash and np.linalg.norm(env.tcp[i] - env.object[i]) > waypoint.leash:
                return True
            if distance < waypoint.tolerance and abs(turn) < .06:
                return False
            if habits.overshoot and waypoint.tolerance <= distance < self.SPEED:
                gap *= 1 + habits.overshoot / max(distance, .01)  # a little too far, then back
                habits.overshoot = 0
            gap *= min(1, self.SPEED * habits.speed / max(np.linalg.norm(gap), 1e-9))
            turn = np.clip(turn, -self.TURN_SPEED, self.TURN_SPEED)
            motion = np.array([*gap, 0, 0, turn]) / env.scale[i]
            yield np.append(motion, waypoint.grip)
        return False


def hold(grip):
    """Return the action (7,) that keeps the pose and moves the fingers."""
    return np.array([0, 0, 0, 0, 0, 0, grip])


# ---- plumbing: skip on first reading -------------------------------------------------------
# ---- robot, shapes and scene in MJCF -------------------------------------------------------
# Franka Panda: kinematics and inertias of MuJoCo Menagerie / franka_ros (identified by Gaz et al.
# 2019), drawn with primitive shapes. Weight-compensated; only the finger pads collide.
PANDA = """
      <geom class="robot" type="box" pos="-.045 0 .035" size=".09 .08 .035"/>
      <geom class="robot" type="cylinder" fromto="0 0 0 0 0 .14" size=".07"/>
      <body name="link0" pos="0 0 .333" gravcomp="1">
        <inertial mass="4.970684" pos=".003875 .002081 -.04762"
                  fullinertia=".70337 .70661 .009117 -.000139 .006772 .019169"/>
        <joint class="arm" name="joint0" range="-2.8973 2.8973"/>
        <geom class="robot" type="capsule" fromto="0 0 -.165 0 -.02 -.03" size=".056"/>
        <geom class="robot" type="capsule" fromto="0 -.0745 0 0 0 0" size=".055"/>
        <body name="link1" quat="1 -1 0 0" gravcomp="1">
          <inertial mass=".646926" pos="-.003141 -.02872 .003495"
                    fullinertia=".007962 .02811 .025995 -.003925 .010254 .000704"/>
          <joint class="arm" name="joint1" range="-1.7628 1.7628"/>
          <geom class="robot" type="capsule" fromto="0 0 0 0 0 .0745" size=".055"/>
          <geom class="robot" type="capsule" fromto="0 -.03 .02 0 -.165 0" size=".056"/>
          <body name="link2" pos="0 -.316 0" quat="1 1 0 0" gravcomp="1">
            <inertial mass="3.228604" pos=".027518 .039252 -.066502"
                      fullinertia=".037242 .036155 .01083 -.004761 -.011396 -.012805"/>
            <joint class="arm" name="joint2" range="-2.8973 2.8973"/>
            <geom class="robot" type="capsule" fromto="0 0 -.09 .01 .01 -.01" size=".055"/>
            <geom class="dark" type="capsule" fromto=".0825 0 0 .0825 .056 0" size=".055"/>
            <geom class="robot" type="capsule" fromto=".02 .02 0 .0825 .04 0" size=".05"/>
            <body name="link3" pos=".0825 0 0" quat="1 1 0 0" gravcomp="1">
              <inertial mass="3.587895" pos="-.05317 .104419 .027454"
                        fullinertia=".025853 .019552 .028323 .007796 -.001332 .008641"/>
              <joint class="arm" name="joint3" range="-3.0718 -.0698"/>
              <geom class="dark" type="capsule" fromto="0 0 0 0 0 .056" size=".055"/>
              <geom class="robot" type="capsule" fromto="-.02 .02 .03 -.0825 .06 0" size=".052"/>
              <geom class="robot" type="capsule" fromto="-.0825 .03 0 -.0825 .069 0" size=".055"/>
              <body name="link4" pos="-.0825 .384 0" quat="1 -1 0 0" gravcomp="1">
                <inertial mass="1.225946" pos="-.011953 .041065 -.038437"
                          fullinertia=".035549 .029474 .008627 -.002117 -.004037 .000229"/>
                <joint class="arm" name="joint4" range="-2.8973 2.8973"/>
                <geom class="robot" type="capsule" fromto="0 0 -.22 0 .01 -.15" size=".054"/>
                <geom class="robot" type="capsule" fromto="0 .03 -.16 0 .075 -.02" size=".05"/>
                <geom class="dark" type="cylinder" fromto="0 .05 0 0 .128 0" size=".05"/>
                <body name="link5" quat="1 1 0 0" gravcomp="1">
                  <inertial mass="1.666555" pos=".060149 -.014117 -.010517"
                            fullinertia=".001964 .004354 .005433 .000109 -.001158 .000341"/>
                  <joint class="arm" name="joint5" range="-.0175 3.7525"/>
                  <geom class="robot" type="cylinder" fromto="0 0 -.044 0 0 .056" size=".05"/>
                  <geom class="robot" type="capsule" fromto=".01 .01 .005 .088 .02 .005"
                        size=".045"/>
                  <geom class="robot" type="cylinder" fromto=".088 .0817 0 .088 -.0514 0"
                        size=".044"/>
                  <body name="link6" pos=".088 0 0" quat="1 1 0 0" gravcomp="1">
                    <inertial mass=".735522" pos=".010517 -.004252 .061597"
                              fullinertia=".012516 .010027 .004815 -.000428 -.001196 -.000741"/>
                    <joint class="arm" name="joint6" range="-2.8973 2.8973"/>
                    <geom class="robot" type="cylinder" fromto="0 0 .052 0 0 .107" size=".044"/>
                    <geom class="dark" type="capsule" fromto=".02 .02 .08 .055 .055 .08"
                          size=".025"/>
                    <body name="hand" pos="0 0 .107" quat=".9238795 0 0 -.3826834" gravcomp="1">
                      <inertial mass=".73" pos="-.01 0 .03" diaginertia=".001 .0025 .0017"/>
                      <geom class="robot" type="box" pos="0 0 .033" size=".0316 .102 .033"/>
                      <geom class="robot" type="cylinder" fromto="0 0 -.02 0 0 .01" size=".044"/>
                      <body name="left" pos="0 0 .0584" gravcomp="1">
                        <inertial mass=".015" pos="0 0 0" diaginertia="2.4e-6 2.4e-6 7.5e-7"/>
                        <joint class="finger" name="left"/>
                        <geom class="dark" type="box" pos="0 .0185 .011" size=".011 .0075 .01"/>
                        <geom class="dark" type="box" pos="0 .0145 .027" size=".00875 .0045 .014"/>
                        <geom class="pad" name="pad_left"/>
                      </body>
                      <body name="right" pos="0 0 .0584" quat="0 0 0 1" gravcomp="1">
                        <inertial mass=".015" pos="0 0 0" diaginertia="2.4e-6 2.4e-6 7.5e-7"/>
                        <joint class="finger" name="right"/>
                        <geom class="dark" type="box" pos="0 .0185 .011" size=".011 .0075 .01"/>
                        <geom class="dark" type="box" pos="0 .0145 .027" size=".00875 .0045 .014"/>
                        <geom class="pad" name="pad_right"/>
                      </body>
                    </body>
                  </body>
                </body>
              </body>
            </body>
          </body>
        </body>
      </body>"""
SERVO_KP = np.array([1000, 1000, 750, 750, 300, 300, 300, 1000, 1000])  # N m/rad; of fingers N/m
ARM_TORQUE = np.array([87, 87, 87, 87, 12, 12, 12])  # N m, limits of the real joints
TOOL_LENGTH = .107 + .1034         # m from the last joint to the TCP between the pads

# One or two geoms a shape; sizes are half lengths and radii [m]. The origin is the grasp point; the
# fingers close along y, where no shape is wider than 60 mm.
SHAPES_XML = """<mujoco>
  <default>
    <default class="accent"><geom group="1"/></default>
    <default class="lying">
      <geom type="capsule" quat=".7071067811865476 0 .7071067811865476 0"/>
    </default>
  </default>
  <worldbody>
    <body name="ball"><geom type="sphere" size=".026"/></body>
    <body name="block"><geom type="box" size=".024 .02 .024"/></body>
    <body name="bottle"><geom type="cylinder" size=".023 .026"/>
      <geom class="accent" type="cylinder" pos="0 0 .036" size=".011 .01"/></body>
    <body name="brick"><geom type="box" size=".031 .02 .018"/></body>
    <body name="can"><geom type="cylinder" size=".023 .028"/></body>
    <body name="carrot"><geom class="lying" size=".019 .02"/>
      <geom class="accent" type="box" pos=".042 0 0" size=".008 .012 .008"/></body>
    <body name="corn"><geom class="lying" size=".02 .018"/>
      <geom class="accent" type="box" pos="-.026 0 0" size=".016 .02 .012"/></body>
    <body name="cross"><geom type="box" size=".03 .014 .016"/>
      <geom class="accent" type="box" size=".012 .026 .016"/></body>
    <body name="cube"><geom type="box" size=".023 .023 .023"/></body>
    <body name="drum"><geom type="cylinder" size=".025 .018"/></body>
    <body name="dumbbell"><geom type="cylinder" pos="0 0 .006" size=".024 .014"/>
      <geom class="accent" type="box" size=".034 .018 .02"/></body>
    <body name="egg"><geom type="ellipsoid" size=".032 .023 .023"/></body>
    <body name="eggplant"><geom type="ellipsoid" size=".035 .022 .022"/>
      <geom class="accent" type="box" pos="-.034 0 0" size=".007 .01 .01"/></body>
    <body name="house"><geom type="box" size=".025 .02 .018"/>
      <geom class="accent" type="box" pos="0 0 .026" size=".016 .013 .008"/></body>
    <body name="lens"><geom type="ellipsoid" size=".027 .027 .02"/></body>
    <body name="mushroom"><geom type="ellipsoid" pos="0 0 .018" size=".028 .028 .016"/>
      <geom class="accent" type="cylinder" pos="0 0 -.004" size=".018 .018"/></body>
    <body name="pear"><geom type="sphere" size=".026"/>
      <geom type="sphere" pos="0 0 .03" size=".015"/></body>
    <body name="pill"><geom class="lying" size=".02 .016"/></body>
    <body name="pot"><geom type="cylinder" size=".027 .02"/>
      <geom class="accent" type="box" pos=".036 0 .01" size=".012 .007 .006"/></body>
    <body name="sponge"><geom type="box" pos="0 0 .01" size=".031 .022 .01"/>
      <geom class="accent" type="box" pos="0 0 -.01" size=".031 .022 .01"/></body>
    <body name="stack"><geom type="box" size=".024 .024 .02"/>
      <geom class="accent" type="cylinder" pos="0 0 .03" size=".017 .01"/></body>
    <body name="tee"><geom type="box" pos=".014 0 0" size=".012 .024 .016"/>
      <geom type="box" pos="-.016 0 0" size=".02 .014 .016"/></body>
  </worldbody>
</mujoco>"""
# Their yaw cannot be seen.
ROUND = ("can", "ball", "mushroom", "bottle", "pear", "drum", "lens", "stack")
# Which of a geom's sizes points up; of boxes and ellipsoids it is the third. Capsules are lying.
UPWARDS = {
    int(mujoco.mjtGeom.mjGEOM_SPHERE): 0,
    int(mujoco.mjtGeom.mjGEOM_CAPSULE): 0,
    int(mujoco.mjtGeom.mjGEOM_CYLINDER): 1}


def load_shapes():
    """Return {name: list of MuJoCo geoms, with type, pos, quat, size, group} of SHAPES_XML."""
    model = mujoco.MjModel.from_xml_string(SHAPES_XML)
    shapes = {}
    for geom in range(model.ngeom):
        name = model.body(model.geom_bodyid[geom]).name
        shapes.setdefault(name, []).append(model.geom(geom))
    return shapes


SHAPES = load_shapes()


# Collisions: pads meet bits 1 and 2 of contype, loose objects bit 1. Software OpenGL pays for
# triangles, not for pixels: one quad a box face, few slices, no multi-sampling, no shadow maps.
SCENE = """<mujoco>
    <compiler angle="radian" autolimits="true"/>
    <statistic extent="1" center=".4 0 .2"/>
    <option timestep="{dt}" integrator="implicitfast" cone="elliptic" impratio="10">
      <flag midphase="disable"/>
    </option>
    <visual>
      <global offwidth="{pixels}" offheight="{pixels}"/>
      <map znear=".05" zfar="8"/>
      <quality shadowsize="0" offsamples="0" numquads="1" numslices="6" numstacks="3"/>
      <headlight active="0"/>
    </visual>
    <default>
      <default class="robot"><geom contype="0" conaffinity="0" material="robot"/></default>
      <default class="dark"><geom contype="0" conaffinity="0" material="dark"/></default>
      <default class="wall"><geom type="box" contype="0" conaffinity="0" material="wall"/>
        <default class="clutter"><geom group="3"/></default>
      </default>
      <default class="arm"><joint armature=".1" damping="1"/></default>
      <default class="finger">
        <joint type="slide" axis="0 1 0" range="-.001 .04" armature=".1"/>
      </default>
      <default class="pad">
        <geom type="box" pos="0 .0076 .0452" size=".0088 .0076 .00925" conaffinity="3" condim="4"
              friction="1 .005 .0001" solref=".01 1" solimp=".95 .99 .001" rgba=".25 .25 .27 1"/>
      </default>
    </default>
    <asset>
      <texture name="wood" type="2d" builtin="flat" width="64" height="64" rgb1="1 1 1"
               rgb2=".82 .72 .62" mark="random" markrgb=".82 .72 .62" random=".25"/>
      <texture name="slate" type="2d" builtin="flat" width="48" height="48" rgb1="1 1 1"
               rgb2=".55 .62 .62" mark="random" markrgb=".55 .62 .62" random=".12"/>
      <texture name="dots" type="2d" builtin="flat" width="24" height="24" rgb1="1 1 1"
               rgb2=".55 .55 .55" mark="random" markrgb=".55 .55 .55" random=".03"/>
      <texture name="tiles" type="2d" builtin="checker" width="16" height="16" rgb1="1 1 1"
               rgb2=".75 .75 .75" mark="random" markrgb=".75 .75 .75" random="0"/>
      <texture name="stains" type="2d" builtin="flat" width="12" height="12" rgb1="1 1 1"
               rgb2=".5 .5 .5" mark="random" markrgb=".5 .5 .5" random=".005"/>
      <texture name="plain" type="2d" builtin="flat" width="8" height="8" rgb1="1 1 1"
               rgb2="1 1 1" mark="random" markrgb="1 1 1" random="0"/>
      <material name="wood" texture="wood" texrepeat="6 6"/>
      <material name="slate" texture="slate" texrepeat="6 6"/>
      <material name="dots" texture="dots" texrepeat="6 6"/>
      <material name="tiles" texture="tiles" texrepeat="6 6"/>
      <material name="stains" texture="stains" texrepeat="6 6"/>
      <material name="plain" texture="plain" texrepeat="6 6"/>
      <material name="robot"/>
      <material name="dark" rgba=".18 .18 .20 1"/>
      <material name="wall"/>
    </asset>
    <worldbody>
      <light type="directional" castshadow="false" specular="0 0 0"/>
      <body name="look_at" mocap="true"/>
      <camera mode="targetbody" target="look_at"/>
      <geom name="table" type="box" pos=".35 0 -.02" size=".55 .60 .02" material="wood"
            friction=".6 .005 .0001"/>
      <geom class="wall" pos="-.60 0 .4" size=".01 1.6 1.2"/>
      <geom class="clutter" rgba=".2 .22 .3 1" pos="-.25 .45 .15" size=".08 .1 .15"/>
      <geom class="clutter" rgba=".25 .18 .15 1" pos="-.35 -.35 .22" size=".1 .08 .22"/>
      <geom class="clutter" rgba=".35 .3 .1 1" pos="-.02 -.42 .05" size=".06 .05 .05"/>
      <geom class="clutter" rgba=".08 .45 .2 1" pos=".1 .46 0" size=".16 .12 .002"/>
      {panda}
    </worldbody>
    <actuator>  <!-- set_dynamics() writes gains and limits -->
      <position joint="joint0" kp="1" kv="1" forcerange="-1 1"/>
      <position joint="joint1" kp="1" kv="1" forcerange="-1 1"/>
      <position joint="joint2" kp="1" kv="1" forcerange="-1 1"/>
      <position joint="joint3" kp="1" kv="1" forcerange="-1 1"/>
      <position joint="joint4" kp="1" kv="1" forcerange="-1 1"/>
      <position joint="joint5" kp="1" kv="1" forcerange="-1 1"/>
      <position joint="joint6" kp="1" kv="1" forcerange="-1 1"/>
      <position joint="left" kp="1" kv="1" forcerange="-1 1"/>
      <position joint="right" kp="1" kv="1" forcerange="-1 1"/>
    </actuator>
    {task}
    </mujoco>"""


def scene_xml(task, image_size):
    """Return the complete MJCF of a task's scene."""
    return SCENE.format(dt=PHYSICS_DT, pixels=max(image_size, 8), panda=PANDA, task=task.xml)


class Camera(NamedTuple):
    """A pinhole camera in the base frame."""

    eye: np.ndarray        # (3,) m
    view: np.ndarray       # (3, 3), rows: right, down, ahead
    fovy: float            # deg, vertical field of view


class Scene:
    """One compiled MJCF and a mujoco Batch of it; row i of everything belongs to environment i."""

    def __init__(self, task, num_envs, image_size):
        self.task = task
        self.size = image_size
        self.model = mujoco.MjModel.from_xml_string(scene_xml(task, image_size))
        # One thread: on small machines, processes use the cores better than threads.
        self.batch = Batch(self.model, num_envs, nthread=1)
        self.qpos = self.batch.bind("qpos")
        self.qvel = self.batch.bind("qvel")
        self.ctrl = self.batch.bind("ctrl")
        self.mocap_pos = self.batch.bind("mocap_pos")
        self.mocap_quat = self.batch.bind("mocap_quat")
        self.sensor = self.batch.bind("sensordata")
        self.field = self.batch.expand             # field("geom_rgba")[i] is environment i's own
        self.loose = np.flatnonzero(self.model.body_dofnum == 6)  # bodies that lie on the table
        self.models = [None] * num_envs            # models[i]: to render environment i
        if image_size:
            open_gl()
            self.data = mujoco.MjData(self.model)
            self.option = mujoco.MjvOption()
            self.camera = mujoco.MjvCamera()
            self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
            self.camera.fixedcamid = 0
            self.view = mujoco.MjvScene(self.model, maxgeom=200)
            self.view.flags[:] = 0  # no shadow map, reflection, skybox, haze
            self.view.flags[mujoco.mjtRndFlag.mjRND_CULL_FACE] = 1  # or every face is drawn twice
            self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_50)
            self.rect = mujoco.MjrRect(0, 0, image_size, image_size)

    def set_geom(self, i, name, **values):
        """Write fields geom_... of one geom of environment i."""
        for field, value in values.items():
            self.field("geom_" + field)[i, self.model.geom(name).id] = value

    def paint(self, i, material, rgb):
        """Write the colour of a material of environment i."""
        self.field("mat_rgba")[i, self.model.material(material).id, :3] = rgb

    def set_appearance(self, i, sampled):
        """Write colours, light, camera and tone curves of environment i; return its Camera."""
        self.set_geom(i, "table", matid=self.model.material(sampled.texture).id)
        self.paint(i, sampled.texture, sampled.table)
        self.paint(i, "wall", sampled.wall)
        self.paint(i, "robot", sampled.robot)
        light = np.array([-.25, -sampled.light_side, -1])
        self.field("light_dir")[i, 0] = light / np.linalg.norm(light)
        self.field("light_ambient")[i, 0] = sampled.ambient
        self.field("light_diffuse")[i, 0] = sampled.diffuse
        look_at = LOOK_AT + sampled.shift
        a, e = np.radians([sampled.azimuth, sampled.elevation])
        toward = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
        right = np.array([-np.sin(a), np.cos(a), 0])
        view = np.stack([right, np.cross(-toward, right), -toward])
        camera = Camera(look_at + sampled.distance * toward, view, sampled.fovy)
        self.mocap_pos[i, 0] = look_at
        self.field("cam_pos")[i, 0] = camera.eye
        self.field("cam_fovy")[i, 0] = camera.fovy
        sampled.curves = None                                  # or (3, 256) uint8: of R, G, B
        if (sampled.gain, sampled.tint, sampled.gamma) != (1, 0, 1):
            ramp = (np.arange(256) / 255) ** sampled.gamma * 255 * sampled.gain
            tinted = ramp * (1 + sampled.tint * np.array([[1], [0], [-1]]))
            sampled.curves = np.clip(tinted, 0, 255).round().astype(np.uint8)
        return camera

    def set_dynamics(self, i, sampled):
        """Write servos, and mass and friction of the loose bodies, of environment i.

        Servos: force = kp (ctrl - q) - kv dq/dt, limited. The fingers are damped in the joint
        instead, since a saturated servo's kv chatters.
        """
        kp = SERVO_KP.astype(float)
        kp[:7] *= sampled.stiffness
        kv = kp * sampled.damping
        kv[7:] = 0
        limit = np.append(ARM_TORQUE, [sampled.finger_force, sampled.finger_force])
        self.field("dof_damping")[i, 7:9] = sampled.finger_damping
        self.field("actuator_gainprm")[i, :, 0] = kp
        self.field("actuator_biasprm")[i, :, 1:3] = np.stack([-kp, -kv], 1)
        self.field("actuator_forcerange")[i] = np.stack([-limit, limit], 1)
        self.field("body_mass")[i, self.loose] = sampled.mass
        inertia = .4 * sampled.mass * .03 ** 2                 # kg m2, of a ball of 3 cm
        self.field("body_inertia")[i, self.loose] = inertia
        loose = np.isin(self.model.geom_bodyid, self.loose)
        self.field("geom_friction")[i, loose, 0] = sampled.friction * self.task.friction

    def update(self, rows):
        """Compute what follows from the sizes, masses and positions of environments rows (n,)."""
        self.batch.set_const(rows)
        self.batch.forward(rows)
        if self.size:
            for i in rows:
                self.models[i] = self.batch.get_model(i, self.models[i])

    def render(self, i, tcp, sampled):
        """Return the image (H, W, 3) uint8 of environment i.

        Shadows are discs under the loose bodies and the tool: a shadow map costs 30 times as much.
        """
        model = self.models[i]
        data = self.batch.get_data(i, self.data)
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        self.option.geomgroup[3] = sampled.clutter
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self.option, None, self.camera, everything, self.view)
        if sampled.shadow:
            for x, y, z in [*data.xpos[self.loose], tcp]:
                mujoco.mjv_initGeom(
                    self.view.geoms[self.view.ngeom], mujoco.mjtGeom.mjGEOM_CYLINDER,
                    np.array([.028, .028, .0004]), np.array([x, y - sampled.light_side * z, .001]),
                    np.eye(3).ravel(), np.array([0, 0, 0, sampled.shadow], np.float32))
                self.view.ngeom += 1
        # Other scenes of this process have made their own frame buffers current.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        mujoco.mjr_render(self.rect, self.view, self.context)
        image = np.empty((self.size, self.size, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, self.rect, self.context)
        return image[::-1]  # OpenGL's first row is the bottom one


# ---- kinematics ----------------------------------------------------------------------------
def rotation(axis, angle):
    """Return rotation matrices (..., 3, 3) about x, y or z (axis 0, 1, 2) by angle (...) [rad]."""
    matrix = np.zeros(np.shape(angle) + (3, 3))
    i = (axis + 1) % 3
    j = (axis + 2) % 3
    matrix[..., axis, axis] = 1
    matrix[..., i, i] = np.cos(angle)
    matrix[..., j, j] = np.cos(angle)
    matrix[..., i, j] = -np.sin(angle)
    matrix[..., j, i] = np.sin(angle)
    return matrix


# Read from the MJCF, so that the controller and the simulator cannot disagree.
MODEL = mujoco.MjModel.from_xml_string(scene_xml(Task(), 0))
LINKS = [MODEL.body(f"link{k}").id for k in range(7)]
QUATERNION = MODEL.body_quat[LINKS]                # (7, 4) w x y z: quarter turns about x
JOINT_TILT = rotation(0, 2 * np.arctan2(QUATERNION[:, 1], QUATERNION[:, 0]))  # (7, 3, 3)
JOINT_OFFSET = MODEL.body_pos[LINKS]               # (7, 3) m
JOINT_RANGE = MODEL.jnt_range[:7].T                # (2, 7) rad
TOOL_TURN = rotation(2, np.array(-np.pi / 4))      # (3, 3)


def forward_kinematics(q):
    """Return TCP position (N, 3) [m], rotation (N, 3, 3) and Jacobian (N, 6, 7) at q (N, 7) [rad].

    Rows of the Jacobian: linear, then angular velocity of the TCP in the base frame, per rad/s of
    each joint.
    """
    local = JOINT_TILT @ rotation(2, q)    # (N, 7, 3, 3) each joint's frame in the one before
    position = np.zeros((len(q), 3))
    frame = np.tile(np.eye(3), (len(q), 1, 1))
    origins = np.empty((len(q), 7, 3))
    axes = np.empty((len(q), 7, 3))
    for k in range(7):
        position = position + frame @ JOINT_OFFSET[k]
        frame = frame @ local[:, k]
        origins[:, k] = position
        axes[:, k] = frame[:, :, 2]
    position = position + frame[:, :, 2] * TOOL_LENGTH
    arm = position[:, None] - origins                      # (N, 7, 3)
    # The cross product axis x arm; np.cross is several times slower.
    linear = axes[..., [1, 2, 0]] * arm[..., [2, 0, 1]] - axes[..., [2, 0, 1]] * arm[..., [1, 2, 0]]
    jacobian = np.concatenate([linear, axes], -1).swapaxes(1, 2)
    return position, frame @ TOOL_TURN, jacobian


def inverse_kinematics(q, position, frame, iterations=3, damping=.02, posture=.05, max_step=.25):
    """Return joint angles (N, 7) that bring the TCP to position (N, 3) and frame (N, 3, 3).

    Damped least squares from q (N, 7) on, with a pull towards HOME in the null space; three
    iterations leave 0.01 mm of a 3 cm step.

        dq = J+ e + (I - J+ J) posture (HOME - q),    J+ = J^T (J J^T + damping^2 I)^-1
    """
    for _ in range(iterations):
        now, turn, jacobian = forward_kinematics(q)
        relative = frame @ turn.swapaxes(1, 2)
        skew = (relative - relative.swapaxes(1, 2)) / 2  # sin(angle) * axis: good for small angles
        error = np.concatenate([position - now, skew[:, [2, 0, 1], [1, 2, 0]]], 1)[..., None]
        pull = (posture * (HOME - q))[..., None]           # (N, 7, 1); error is (N, 6, 1)
        transposed = jacobian.swapaxes(1, 2)
        normal = jacobian @ transposed + damping ** 2 * np.eye(6)
        dq = transposed @ np.linalg.solve(normal, error - jacobian @ pull) + pull
        q = q + np.clip(dq[..., 0], -max_step, max_step)
        q = np.clip(q, JOINT_RANGE[0] + .01, JOINT_RANGE[1] - .01)
    return q


def frame_of(euler):
    """Return R = Rz(yaw) Ry(pitch) Rx(roll), (N, 3, 3), of roll, pitch, yaw (N, 3) [rad]."""
    return rotation(2, euler[:, 2]) @ rotation(1, euler[:, 1]) @ rotation(0, euler[:, 0])


def euler_of(frame):
    """Return roll, pitch, yaw (N, 3) [rad] of R = Rz(yaw) Ry(pitch) Rx(roll), (N, 3, 3).

    Roll is in [0, 2 pi), where straight down is pi, far from the jump.
    """
    roll = np.arctan2(frame[:, 2, 1], frame[:, 2, 2]) % (2 * np.pi)
    pitch = -np.arcsin(np.clip(frame[:, 2, 0], -1, 1))
    yaw = np.arctan2(frame[:, 1, 0], frame[:, 0, 0])
    return np.stack([roll, pitch, yaw], 1)


# ---- images --------------------------------------------------------------------------------
# Process id: OpenGL context. One serves all environments of a process, because MuJoCo frees the
# buffers of a deleted environment in whatever context is current, even in another environment's.
GL_CONTEXT = {}


def open_gl():
    """Make this process's OpenGL context current, or create it. Raises OSError: what to install."""
    if os.getpid() in GL_CONTEXT:  # a forked child must not use its parent's context
        GL_CONTEXT[os.getpid()].make_current()
        return
    try:
        context = mujoco.GLContext(8, 8)  # MuJoCo renders into frame buffers of its own
        context.make_current()
        empty = mujoco.MjModel.from_xml_string("<mujoco/>")
        mujoco.MjrContext(empty, 50).free()                # some backends fail only here
    except Exception as error:  # every backend fails in its own way
        raise gl_error(error) from error
    GL_CONTEXT[os.getpid()] = context
    atexit.register(context.free)                          # while ctypes still works


# Sensor noise of sigma 1, in 1/16. Cutting it at a random place costs a tenth of drawing it afresh.
NOISE = (16 * np.random.default_rng(0).standard_normal(1 << 20)).astype(np.int16)


def camera_effects(image, sampled, step):
    """Return a frame (H, W, 3) uint8 after tone curves, blur, and the sensor noise of this step."""
    if sampled.curves is not None:  # (3, 256), one table after the other
        image = sampled.curves.ravel().take(image + np.array([0, 256, 512], np.uint16))
    if sampled.blur:  # 1/4 1/2 1/4, over rows, then over columns
        image = image.astype(np.uint16)
        image[1:-1] = image[:-2] + 2 * image[1:-1] + image[2:] + 2 >> 2
        image[:, 1:-1] = image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:] + 2 >> 2
    if sampled.noise:
        start = (sampled.noise_seed + 7919 * step) % (len(NOISE) - image.size)
        noise = sampled.noise * NOISE[start:start + image.size] >> 4
        image = np.clip(image.astype(np.int16) + noise.reshape(image.shape), 0, 255)
    return image.astype(np.uint8)


# ---- demo ----------------------------------------------------------------------------------
def run_expert(env, episodes, style="expert", noise=0., frames=None):
    """Return success (episodes,) bool and length (episodes,) int of the demonstrator.

    It plays episodes 0, 1, ...; the images of environment 0 are appended to the list `frames`.
    """
    obs = env.reset(first_episode=0)
    expert = Expert(env, style, noise)
    success = np.zeros(episodes, bool)
    length = np.zeros(episodes, int)
    while (length == 0).any():
        if frames is not None:
            frames.append(obs["images"][0])
        obs, _, _, _, info = env.step(expert.act()[0][:, None])
        done = info["ended"][info["episode"][info["ended"]] < episodes]
        success[info["episode"][done]] = info["success"][done]
        length[info["episode"][done]] = info["length"][done]
    return success, length


def main():
    """Write a contact sheet and videos; print the success of the demonstrators and the speed."""
    import imageio
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", default="runs/envs", help="folder for the images and videos")
    parser.add_argument("--episodes", type=int, default=60, help="per task and domain")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    n = args.episodes
    sheet = []
    print(f"Success of the demonstrators on n = {n} episodes, 95 % Wilson interval")
    for task in TASKS:
        for domain, style in (("sim", "expert"), ("real", "teleop")):
            frames = []
            run_expert(make_env(task, domain, image_size=224), 1, style, frames=frames)
            video = f"{args.out}/{task}-{domain}.mp4"
            imageio.mimwrite(video, frames, fps=CONTROL_HZ, macro_block_size=1)
            sheet.append(np.concatenate([frames[0], frames[-1]]))
            success, length = run_expert(make_env(task, domain, 20, image_size=0), n, style)
            k = success.sum()
            centre = (k + 1.92) / (n + 3.84)
            half = 1.96 * np.sqrt(k * (n - k) / n + .96) / (n + 3.84)
            print(f"  {task:13}{domain:5}{style:7}{k / n:7.1%}  [{centre - half:.1%}, "
                  f"{centre + half:.1%}]  {length.mean():.1f} control steps")
    imageio.imwrite(f"{args.out}/contact-sheet.png", np.concatenate(sheet, 1))
    env = make_env("all", num_envs=32)
    env.reset()
    began = time.perf_counter()
    for _ in range(20):
        env.step(np.zeros((32, 1, 7)))
    speed = 20 * 32 / (time.perf_counter() - began)
    print(f"Speed: {speed:.0f} control steps/s with 64 px images, one process\n"
          f"contact-sheet.png and videos: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
