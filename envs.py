"""Four tabletop tasks for a Franka Panda in MuJoCo: two domains, many environments at once, scripted experts.

    env = VecEnv("pick-place", domain="sim", num_envs=32, seed=0, image_size=64)
    obs = env.reset()
    obs, reward, terminated, truncated, info = env.step(actions)          # actions (N, K, 7): K steps of 0.2 s

Domains  sim: the digital twin, to practise in.     pretrain: wide randomisation, shares no texture, camera or colour.
         real: the STAND-IN for a real robot: other looks, dynamics and objects; no robot is behind it.
Frame    robot base: x forward, y left, z up; metres, radians; the table top is z = 0.
Action   dx dy dz [m], droll dpitch dyaw [rad] per control step, gripper in [-1 close, +1 open]. The delta is added to
         the previous TARGET pose, so tracking errors do not accumulate; rotations are about the base axes through the
         tool centre point (TCP): R <- Rz(dyaw) Ry(dpitch) Rx(droll) R.
Image    (H, W, 3) uint8 RGB, top row first, one third-person camera.
State    (8,) float32: TCP xyz [m], roll pitch yaw [rad], gripper opening [m], 0.
Truth    (16,) float32: what only a simulator knows, for critics (not for policies); see VecEnv.observe.
An episode is a function of (seed, domain, episode number): the same scene whatever the number of environments or
processes. This file needs mujoco and numpy only (imageio for its demo, python envs.py): copy it away alone.
"""
import argparse
import atexit
import collections
import ctypes.util
import dataclasses
import multiprocessing
import os
import sys
import time
import types
import warnings


# mujoco reads MUJOCO_GL when it is imported, only then. A user's choice stands; macOS and Windows have their own GL.
for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
    if sys.platform.startswith("linux") and ctypes.util.find_library(library):
        os.environ.setdefault("MUJOCO_GL", backend)
os.environ.setdefault("LP_NUM_THREADS", "0")     # software GL: its threads do not survive a fork, nor gain at 64 px

def gl_error(error):
    """What to tell a user whose off-screen OpenGL fails with this error."""
    return RuntimeError(
        f"No off-screen OpenGL: MUJOCO_GL={os.environ.get('MUJOCO_GL', '(unset)')} failed with {type(error).__name__}: "
        f"{error}. Debian/Ubuntu: apt-get install libegl1 libgl1 (or libosmesa6), start Python with MUJOCO_GL=egl (or "
        "osmesa); containers with an NVIDIA GPU: NVIDIA_DRIVER_CAPABILITIES=all; macOS and Windows: unset MUJOCO_GL. "
        "Without pictures: image_size=0, MUJOCO_GL=off.")

try:
    import mujoco                                     # noqa: E402  (after the choice of the backend)
except AttributeError as error:                       # of PyOpenGL, which has not found the library of that backend
    raise gl_error(error) from None
import numpy as np                                    # noqa: E402
from mujoco.batch import Batch, SimulationError       # noqa: E402

# ---------------------------------------------------------------------------------------------------- tasks
Task = collections.namedtuple("Task", "scene horizon instruction paraphrases")      # horizon in control steps of 0.2 s
TASKS = {
    "pick-place": Task("pick", 80, "put the object into the dish", [
        "pick up the thing and drop it in the dish", "place the toy in the round dish", "the toy belongs in the bowl",
        "move the thing to the bowl", "put it on the plate"]),
    "push-cube": Task("push", 40, "push the {colour} cube forward", [
        "move the {colour} block away from the robot", "push the {colour} block", "the {colour} one goes forward",
        "shove {colour} to the front", "the {colour} block must move"]),
    "open-drawer": Task("drawer", 40, "open the drawer", [
        "pull the drawer open", "slide the drawer out", "it must be open", "open it", "pull the handle"]),
    "close-drawer": Task("drawer", 40, "close the drawer", [
        "push the drawer shut", "slide the drawer in", "it must be closed", "close it", "push the handle"])}
DOMAINS, VARIANTS = ("sim", "real", "pretrain"), ("seen", "unseen-objects", "unseen-states")
RANDOM = dict(visual="random looks", dynamics="random dynamics", late="late pictures")      # what VecEnv can randomise
TRUTH = 16                                       # numbers an environment, see VecEnv.observe
REWARD_TERMS = ("reach", "touch", "progress", "success")

PHYSICS_DT, BLOCK_STEPS, BLOCKS = .005, 5, 8     # s; 8 blocks of 25 ms with fixed set-points = 0.2 s = a control step
CONTROL_HZ = 5
ACTION_LIMIT = np.array([.04, .04, .04, .2, .2, .2, 1.])       # m, rad, gripper; actions beyond it are clipped
WORKSPACE = np.array([[.30, -.36, .012], [.68, .36, .50]])     # m; the target position stays inside
HOME = np.array([0, .259, 0, -2.289, 0, 2.515, np.pi / 4])     # rad; TCP at (.525, 0, .132), pointing down
FINGER_OPEN, FINGER_CLOSED = .04, -.01           # m a finger; a negative set-point squeezes thin objects
GRASP_FORCE = .5                                 # N on both pads: the object counts as grasped
PICK_RADIUS, PICK_HEIGHT, PICK_CLEAR = .05, .025, .045         # m at success: object - dish across, up; object - TCP
PUSH_DISTANCE, PUSH_WRONG = .10, .03             # m that the named cube must move, and that no other cube may move
OPEN_DISTANCE, CLOSE_DISTANCE = .15, .02         # m of drawer travel at success
REWARD_TOUCH, REWARD_SUCCESS, REWARD_LOST = .2, 1., -.4        # events, each at most once an episode
START = {"object": np.array([[.42, .04], [.53, .14]]), "dish": np.array([[.42, -.16], [.53, -.07]]),     # [low, high]
         "cube": np.array([[.42, -.015], [.46, .015]]), "cabinet": np.array([[.44, -.32], [.52, -.27]])}  # of x y, m
START_APART, START_TURN, START_OPEN = .115, .5, (.14, .19)     # m object - dish; rad of yaw; m of drawer before closing
UNSEEN_BAND = .04                                # m; `unseen-states` starts in the band of this width around START
CUBE_LANES, CUBE_HALF = (-.12, 0., .12), .028    # m
HANDLE = np.array([0, .166, .055])               # m; the closed drawer's handle plate in the cabinet's frame

# ---------------------------------------------------------------------------------------------------- domains
UNSEEN_CUBES = ((("white", (.95, .95, .95)), ("black", (.08, .08, .08)), ("brown", (.40, .22, .10))),      # of sim
                (("orange", (.90, .42, .15)), ("green", (.45, .75, .40)), ("red", (.75, .12, .12))))       # of real
UNSEEN_OBJECTS = dict(shape=["pot", "cross", "dumbbell", "house"], cabinet=(.42, .56, .74), handle=(.75, .12, .10),
                      handle_scale=.75)


def and_unlike(sim, real, low=0., apart=.25):
    """(sim, real, 100 others): always the same, channels in low to 1, none nearer than `apart` to one of theirs."""
    drawn = np.random.default_rng(0).uniform(low, 1, (1000, 3)).round(2)
    far = np.linalg.norm(drawn[:, None] - np.array([sim, real]).reshape(-1, 3), axis=2).min(1) > apart
    return sim, real, [tuple(colour) for colour in drawn[far][:100].tolist()]


# The gap between the domains, (sim, real, pretrain) for every parameter. Once an episode a tuple (low, high) is drawn
# uniformly and a list is chosen from; the rest is fixed. `real` is one laboratory: fixed offsets with a small jitter.
PARAMETERS = {
    "visual": dict(
        texture=("wood", "slate", ["dots", "tiles", "stains", "plain"]),           # of the table; colours: RGB in 0-1
        table=and_unlike((.62, .47, .36), (.10, .42, .40)),
        wall=and_unlike((.72, .72, .72), (.16, .16, .19)),
        robot=and_unlike((.95, .95, .95), (.88, .87, .82), low=.6, apart=.1),
        clutter=(False, True, [False, True]),                                       # boxes and a cloth around
        ambient=(.45, (.30, .36), (.20, .60)), diffuse=(.55, (.55, .70), (.35, .80)),   # light, of full white
        light_side=(0., (.6, .8), (-1., 1.)), shadow=(0., (.25, .35), (0., .45)),   # 0 = from above; opacity
        azimuth=(22., (24.5, 25.5), [(2., 18.), (29., 44.)]),                       # deg from +x, about LOOK_AT
        elevation=(39., (36.5, 37.5), (30., 46.)), fovy=(29.5, (30.5, 31.), (28., 33.)),    # deg
        distance=(.90, (.92, .93), (.84, 1.05)), shift=(0., (.008, .012), (-.02, .02)),     # m; of LOOK_AT's xyz
        gain=(1., (.85, 1.15), (.75, 1.25)), gamma=(1., (.9, 1.1), (.8, 1.25)),     # tone curve of the camera
        tint=(0., (-.08, .08), (-.12, .12)),                                        # + warm: red up, blue down
        noise=(0, 4, [0, 3]), blur=(False, True, False), stale=(0., .1, 0.)),       # sigma of 255; P(last frame again)
    "dynamics": dict(
        stiffness=(1., (.45, .55), (.6, 1.2)), damping=(.05, .08, .05),             # of servos: x SERVO_KP; kv / kp [s]
        action_scale=(1., (.87, .93), (.9, 1.1)), latency=(0., (.025, .075), (0., .05)),    # executed / commanded; s
        finger_damping=(100., 150., 100.), finger_force=(40., 25., 40.),            # N s/m, N
        mass=(.05, (.10, .14), (.04, .15)), friction=(1., (.6, .7), (.7, 1.2)),     # kg; loose bodies, cubes 0.6 x
        drawer_friction=(1., (2.5, 5.), (1., 4.)), drawer_damping=(5., (12., 25.), (4., 20.)),      # N, N s/m
        start_joints=(.02, .05, .05), start_tcp=(0., .02, .03)),                    # rad, m; the arm starts +- this
    "objects": dict(
        shape=("cube brick can ball egg carrot mushroom bottle".split(),
               "cube can ball carrot pear corn eggplant sponge".split(), "block drum pill lens tee stack".split()),
        colour=and_unlike([(.90, .45, .12), (.85, .15, .12), (.55, .35, .75), (.15, .35, .75)],
                          [(.88, .15, .28), (.62, .32, .78), (.98, .80, .22), (.98, .60, .48)]),
        accent=([(.20, .55, .15), (.95, .90, .75)], [(.35, .65, .25), (.90, .90, .60)], [(0., 0., 0.), (.3, .7, .6)]),
        scale=(1., (.95, 1.05), (.9, 1.15)), dish_wall=(.006, (.014, .016), (.005, .017)),  # x size; m: a plate, a bowl
        dish=and_unlike((.62, .80, .20), (.92, .93, .95)),
        cubes=((("pink", (.95, .45, .65)), ("blue", (.10, .30, .85)), ("yellow", (.95, .80, .10)),
                ("green", (.10, .65, .25)), ("orange", (.95, .45, .05))),
               (("purple", (.45, .20, .65)), ("yellow", (.90, .72, .20)), ("pink", (.90, .50, .62))),
               (("red", [(.95, .15, .12), (.58, .02, .04)]), ("green", [(.05, .40, .10), (.30, .90, .15)]),
                ("blue", [(.05, .14, .55), (.25, .50, 1.)]), ("yellow", [(1., .95, .40), (.80, .74, .02)]),
                ("orange", [(1., .60, .25), (.80, .32, .02)]), ("purple", [(.30, .05, .45), (.60, .35, .85)]),
                ("pink", [(1., .66, .80), (.85, .30, .50)]), ("brown", [(.54, .34, .22), (.28, .12, .03)]),
                ("white", [(.85, .85, .80), (.78, .86, .92)]), ("black", [(.18, .16, .18), (0., 0., 0.)]),
                ("grey", [(.40, .42, .44), (.62, .60, .58)]))),        # the 11 basic colour words; other shades
        cabinet=and_unlike((.93, .93, .90), (.85, .88, .92)),
        handle=and_unlike((.08, .08, .08), (.16, .14, .13)),
        handle_scale=(1., .9, (.85, 1.15)), stroke=(.20, (.19, .21), (.19, .21)),   # x plate size; m of drawer travel
        side=(1, 1, -1))}                                       # 1: the drawer opens to +y; -1: mirrored, to -y
# What VecEnv's randomise="visual" draws in other domains, beside the looks of `pretrain`, whose own cameras are too far
# away for a policy of Stage I: a camera as far off the twin's as careful measuring leaves it, and things of any colour.
NEAR_LOOKS = dict(azimuth=(16., 28.), elevation=(33., 45.), fovy=(27., 32.), distance=(.84, .96), shift=(-.02, .02),
                  **{name: PARAMETERS["objects"][name][2] for name in ("colour", "dish", "cabinet")})
LATE = (0., .2)                         # randomise="late": what the share of late pictures of an episode is drawn from
LOOK_AT = np.array([.45, -.045, .08])   # m; every camera orbits it and faces the robot from its front left: in the
#                                         published view, from behind, the hand hides what it pushes


@dataclasses.dataclass(frozen=True)
class Gap:
    """Which parts of `real` differ from `sim`; switch a part off to see what it costs."""
    visual: bool = True
    dynamics: bool = True
    objects: bool = True


# Parts "kind, centre xyz, half sizes [m]"; kind B box, S sphere, R rod along x, C can, E ellipsoid; capital = object
# colour, small = accent. The origin is the grasp point; the fingers close along y, where no shape is wider than 60 mm.
SHAPES = dict(
    cube="B 0 0 0 .023 .023 .023", mushroom="E 0 0 .018 .028 .028 .016; c 0 0 -.004 .018 .018 0",
    can="C 0 0 0 .023 .028 0", eggplant="E 0 0 0 .035 .022 .022; b -.034 0 0 .007 .01 .01", drum="C 0 0 0 .025 .018 0",
    ball="S 0 0 0 .026 0 0", sponge="B 0 0 .01 .031 .022 .01; b 0 0 -.01 .031 .022 .01", brick="B 0 0 0 .031 .02 .018",
    egg="E 0 0 0 .032 .023 .023", tee="B .014 0 0 .012 .024 .016; B -.016 0 0 .02 .014 .016", pill="R 0 0 0 .02 .016 0",
    block="B 0 0 0 .024 .02 .024", dumbbell="C 0 0 .006 .024 .014 0; b 0 0 0 .034 .018 .02",
    lens="E 0 0 0 .027 .027 .02", house="B 0 0 0 .025 .02 .018; b 0 0 .026 .016 .013 .008",
    carrot="R 0 0 0 .019 .02 0; b .042 0 0 .008 .012 .008", pot="C 0 0 0 .027 .02 0; b .036 0 .01 .012 .007 .006",
    pear="S 0 0 0 .026 0 0; S 0 0 .03 .015 0 0", cross="B 0 0 0 .03 .014 .016; b 0 0 0 .012 .026 .016",
    stack="B 0 0 0 .024 .024 .02; c 0 0 .03 .017 .01 0", corn="R 0 0 0 .02 .018 0; b -.026 0 0 .016 .02 .012",
    bottle="C 0 0 0 .023 .026 0; c 0 0 .036 .011 .01 0")
UNTURNED = ("can", "ball", "mushroom", "bottle", "pear", "drum", "lens", "stack")      # nobody could see their yaw
KINDS = dict(B="box", S="sphere", R="capsule", C="cylinder", E="ellipsoid")            # MuJoCo's names

# ---------------------------------------------------------------------------------------------------- robot and scenes
# Franka Panda: kinematics and inertias of MuJoCo Menagerie / franka_ros (identified by Gaz et al. 2019). A row a link:
# position in its parent [m], quarter turns about x, mass [kg], centre of mass [m], inertia xx yy zz xy xz yz [kg m2],
# joint range [rad], looks: R rod, C can (from, to, radius), B box (centre, half sizes); capital = white, small = dark.
LINKS = (
    ("0 0 .333", 0, 4.970684, ".003875 .002081 -.04762", ".70337 .70661 .009117 -.000139 .006772 .019169",
     "-2.8973 2.8973", "R 0 0 -.165 0 -.02 -.03 .056; R 0 -.0745 0 0 0 0 .055"),
    ("0 0 0", -1, .646926, "-.003141 -.02872 .003495", ".007962 .02811 .025995 -.003925 .010254 .000704",
     "-1.7628 1.7628", "R 0 0 0 0 0 .0745 .055; R 0 -.03 .02 0 -.165 0 .056"),
    ("0 -.316 0", 1, 3.228604, ".027518 .039252 -.066502", ".037242 .036155 .01083 -.004761 -.011396 -.012805",
     "-2.8973 2.8973", "R 0 0 -.09 .01 .01 -.01 .055; r .0825 0 0 .0825 .056 0 .055; R .02 .02 0 .0825 .04 0 .05"),
    (".0825 0 0", 1, 3.587895, "-.05317 .104419 .027454", ".025853 .019552 .028323 .007796 -.001332 .008641",
     "-3.0718 -.0698", "r 0 0 0 0 0 .056 .055; R -.02 .02 .03 -.0825 .06 0 .052; R -.0825 .03 0 -.0825 .069 0 .055"),
    ("-.0825 .384 0", -1, 1.225946, "-.011953 .041065 -.038437", ".035549 .029474 .008627 -.002117 -.004037 .000229",
     "-2.8973 2.8973", "R 0 0 -.22 0 .01 -.15 .054; R 0 .03 -.16 0 .075 -.02 .05; c 0 .05 0 0 .128 0 .05"),
    ("0 0 0", 1, 1.666555, ".060149 -.014117 -.010517", ".001964 .004354 .005433 .000109 -.001158 .000341",
     "-.0175 3.7525", "C 0 0 -.044 0 0 .056 .05; R .01 .01 .005 .088 .02 .005 .045; C .088 .0817 0 .088 -.0514 0 .044"),
    (".088 0 0", 1, .735522, ".010517 -.004252 .061597", ".012516 .010027 .004815 -.000428 -.001196 -.000741",
     "-2.8973 2.8973", "C 0 0 .052 0 0 .107 .044; r .02 .02 .08 .055 .055 .08 .025"))
SERVO_KP = np.array([1000, 1000, 750, 750, 300, 300, 300, 1000, 1000])      # N m/rad; of the fingers N/m
ARM_TORQUE = (87, 87, 87, 87, 12, 12, 12)              # N m, limits of the real joints
TOOL_LENGTH = .107 + .1034                             # m from the last joint to the TCP between the pads


# Surfaces, each an MJCF class and a material with the colour of the parameter of its name (dark: fixed): contype.
# Pads meet bits 1 and 2, loose objects bit 1. A solid drawer would be closed by random motions in 14 % of the episodes.
SURFACES = dict(robot=0, dark=0, wall=0, dish=3, rim=3, cabinet=0, handle=2)

def geoms_xml(text, surfaces=("robot", "dark")):
    """MJCF of the geoms in text, written as the looks of LINKS; surfaces = (of capital letters, of small ones)."""
    geoms = ""
    for kind, *n in map(str.split, text.split(";")):
        where, size = ("pos", n[3:]) if kind in "bB" else ("fromto", n[6:])
        geoms += (f'<geom class="{surfaces[kind.islower()]}" type="{KINDS[kind.upper()]}" '
                  f'{where}="{" ".join(n[:-len(size)])}" size="{" ".join(size)}"/>')
    return geoms

def panda_xml():
    """MJCF of arm, hand and fingers, weight-compensated; only the finger pads collide. Joints 0-8 of every scene."""
    arm = ('<body name="hand" pos="0 0 .107" quat=".9238795 0 0 -.3826834" gravcomp="1"><inertial pos="-.01 0 .03" '
           'mass=".73" diaginertia=".001 .0025 .0017"/>'
           + geoms_xml("B 0 0 .033 .0316 .102 .033; C 0 0 -.02 0 0 .01 .044"))
    for side, quat in (("left", "1 0 0 0"), ("right", "0 0 0 1")):
        arm += (f'<body name="{side}" pos="0 0 .0584" quat="{quat}" gravcomp="1">'
                '<inertial pos="0 0 0" mass=".015" diaginertia="2.4e-6 2.4e-6 7.5e-7"/>'
                f'<joint name="{side}" type="slide" axis="0 1 0" range="-.001 .04" armature=".1"/>'
                + geoms_xml("b 0 .0185 .011 .011 .0075 .01; b 0 .0145 .0270 .00875 .0045 .014")
                + f'<geom name="pad_{side}" class="pad" pos="0 .0076 .0452" size=".0088 .0076 .00925"/></body>')
    arm += "</body>"
    for k, (pos, tilt, mass, com, inertia, limits, looks) in reversed(list(enumerate(LINKS))):
        arm = (f'<body name="link{k}" pos="{pos}" quat="1 {tilt} 0 0" gravcomp="1"><inertial pos="{com}" mass="{mass}" '
               f'fullinertia="{inertia}"/><joint name="joint{k}" range="{limits}" armature=".1" damping="1"/>'
               f'{geoms_xml(looks)}{arm}</body>')
    return geoms_xml("B -.045 0 .035 .09 .08 .035; C 0 0 0 0 0 .14 .07") + arm

# What stands on the table: MJCF of its bodies; contact sensors. The handle plate is .065 m off the drawer's front, as
# the open gripper needs .055 m on either side of it.
SCENES = {
    # a free object of two interchangeable parts; a dish: a floor and eight walls
    "pick": (f"""<body name="object" pos="0 0 .1"><freejoint/>
        <replicate count="2"><geom name="part" type="box" size=".02 .02 .02" condim="4"/></replicate></body>
        <body name="dish" mocap="true"><geom class="dish" type="cylinder" size=".062 .004" pos="0 0 .004"/>
        <frame euler="0 0 {np.pi / 8}"><replicate count="8" euler="0 0 {np.pi / 4}">
        <geom class="rim" type="box" pos=".062 0 .01" size=".004 .0265 .01"/></replicate></frame></body>""",
        [f'geom1="pad_{side}" body2="object" data="force"' for side in ("left", "right")]),
    # three free cubes, cube0 to cube2
    "push": (f"""<replicate count="3" offset="0 1 0"><body name="cube" pos="0 0 .1"><freejoint/><geom name="cube"
        type="box" size="{CUBE_HALF} {CUBE_HALF} {CUBE_HALF}"/></body></replicate>""",
        [f'subtree1="hand" body2="cube{k}" data="found"' for k in range(3)]),
    # a cabinet that is open towards +y; a drawer with a handle plate on two pegs
    "drawer": ('<body name="cabinet" mocap="true">'
        + geoms_xml("B 0 0 .106 .1 .1 .004; B 0 0 .004 .1 .1 .004; B -.096 0 .055 .004 .1 .047;"
                    "B .096 0 .055 .004 .1 .047; B 0 -.096 .055 .092 .004 .047", ("cabinet", "handle"))
        + '<body name="drawer" pos="0 .1 .055"><joint type="slide" axis="0 1 0" range="0 .2" armature=".05"/>'
        + geoms_xml("B 0 0 0 .09 .005 .045; B 0 -.098 -.04 .086 .093 .004; B -.086 -.098 -.015 .004 .093 .028;"
                    "B .086 -.098 -.015 .004 .093 .028; b -.03 .032 0 .004 .032 .004; b .03 .032 0 .004 .032 .004",
                    ("cabinet", "handle"))
        + '<geom name="handle" class="handle" type="box" pos="0 .066 0" size=".045 .005 .018"/></body></body>',
        ['subtree1="hand" body2="drawer" data="found"'])}

# One quad, few slices, no multi-sampling, no shadow maps: software OpenGL pays for triangles, not for pixels.
FAST = '<quality shadowsize="0" offsamples="0" numquads="1" numslices="6" numstacks="3"/><headlight active="0"/>'

def scene_xml(scene, image_size):
    """Complete MJCF of the scene "pick", "push" or "drawer"."""
    (bodies, sensors), pixels = SCENES[scene], max(image_size, 8)
    textures = "".join(
        f'<texture name="{name}" type="2d" builtin="{builtin}" rgb1="1 1 1" rgb2="{rgb}" mark="random" markrgb="{rgb}" '
        f'random="{density}" width="{size}" height="{size}"/><material name="{name}" texture="{name}" texrepeat="6 6"/>'
        for name, builtin, rgb, density, size in (
            ("wood", "flat", ".82 .72 .62", .25, 64), ("slate", "flat", ".55 .62 .62", .12, 48),
            ("dots", "flat", ".55 .55 .55", .03, 24), ("tiles", "checker", ".75 .75 .75", 0, 16),
            ("stains", "flat", ".5 .5 .5", .005, 12), ("plain", "flat", "1 1 1", 0, 8)))
    materials = "".join(f'<material name="{name}" rgba=".18 .18 .20 1"/>' for name in SURFACES)
    classes = "".join(f'<default class="{name}"><geom material="{name}" contype="{contype}" conaffinity="0"/></default>'
                      for name, contype in SURFACES.items())
    sensors = "".join(f'<contact {what} num="1" reduce="netforce"/>' for what in sensors)
    clutter = "".join(f'<geom class="wall" group="3" type="box" rgba="{rgb} 1" {box}/>' for rgb, box in (
        (".2 .22 .3", 'pos="-.25 .45 .15" size=".08 .1 .15"'), (".25 .18 .15", 'pos="-.35 -.35 .22" size=".1 .08 .22"'),
        (".35 .3 .1", 'pos="-.02 -.42 .05" size=".06 .05 .05"'), (".08 .45 .2", 'pos=".1 .46 0" size=".16 .12 .002"')))
    servos = "".join(f'<position joint="{joint}" kp="1" kv="1" forcerange="-1 1"/>'     # gains: VecEnv.apply
                     for joint in [f"joint{k}" for k in range(7)] + ["left", "right"])
    return f"""<mujoco><compiler angle="radian" autolimits="true"/><statistic extent="1" center=".4 0 .2"/>
  <option timestep="{PHYSICS_DT}" integrator="implicitfast" cone="elliptic" impratio="10"><flag midphase="disable"/>
  </option><visual><global offwidth="{pixels}" offheight="{pixels}"/><map znear=".05" zfar="8"/>{FAST}</visual>
  <default>{classes}<default class="pad"><geom type="box" conaffinity="3" condim="4" friction="1 .005 .0001"
    solref=".01 1" solimp=".95 .99 .001" rgba=".25 .25 .27 1"/></default></default>
  <asset>{textures}{materials}</asset>
  <worldbody>
    <light type="directional" castshadow="false" specular="0 0 0"/>
    <body name="look_at" mocap="true"/><camera mode="targetbody" target="look_at"/>
    <geom name="table" type="box" pos=".35 0 -.02" size=".55 .60 .02" material="wood" friction=".6 .005 .0001"/>
    <geom class="wall" type="box" pos="-.60 0 .4" size=".01 1.6 1.2"/>
    {clutter}{panda_xml()}{bodies}
  </worldbody>
  <actuator>{servos}</actuator><sensor>{sensors}</sensor></mujoco>"""

# ---------------------------------------------------------------------------------------------------- kinematics
JOINT_OFFSET = np.array([[float(x) for x in link[0].split()] for link in LINKS])       # (7, 3) m
JOINT_RANGE = np.array([[float(x) for x in link[5].split()] for link in LINKS]).T      # (2, 7) rad

def rotation(axis, angle):
    """(..., 3, 3) rotation matrices about x, y or z (axis 0, 1, 2) by angle (...) [rad]."""
    matrix, i, j = np.zeros(np.shape(angle) + (3, 3)), (axis + 1) % 3, (axis + 2) % 3
    matrix[..., axis, axis], matrix[..., i, i], matrix[..., j, j] = 1, np.cos(angle), np.cos(angle)
    matrix[..., i, j], matrix[..., j, i] = -np.sin(angle), np.sin(angle)
    return matrix

JOINT_TILT = rotation(0, np.pi / 2 * np.array([link[1] for link in LINKS]))             # (7, 3, 3)
TOOL_TURN = rotation(2, np.array(-np.pi / 4))                                           # (3, 3)

def forward_kinematics(q):
    """TCP position (N, 3) [m], rotation (N, 3, 3) and Jacobian (N, 6, 7) for joint angles q (N, 7) [rad].
    Jacobian rows: linear, then angular velocity of the TCP in the base frame, per rad/s of each joint."""
    local = JOINT_TILT @ rotation(2, q)                        # (N, 7, 3, 3) each joint's frame in the one before
    position, frame = np.zeros((len(q), 3)), np.tile(np.eye(3), (len(q), 1, 1))
    origins, axes = np.empty((2, len(q), 7, 3))
    for k in range(7):
        position = position + frame @ JOINT_OFFSET[k]
        frame = frame @ local[:, k]
        origins[:, k], axes[:, k] = position, frame[:, :, 2]
    position = position + frame[:, :, 2] * TOOL_LENGTH
    arm = position[:, None] - origins                          # (N, 7, 3)
    linear = axes[..., [1, 2, 0]] * arm[..., [2, 0, 1]] - axes[..., [2, 0, 1]] * arm[..., [1, 2, 0]]   # axis x arm
    return position, frame @ TOOL_TURN, np.concatenate([linear, axes], -1).swapaxes(1, 2)

def inverse_kinematics(q, position, frame, iterations=3, damping=.02, posture=.05, max_step=.25):
    """Joint angles (N, 7) that bring the TCP to position (N, 3) and frame (N, 3, 3), starting from q (N, 7).
    Damped least squares with a pull towards HOME in the null space; three iterations leave 0.01 mm of a 3 cm step:
        dq = J+ e + (I - J+ J) posture (HOME - q),    J+ = J^T (J J^T + damping^2 I)^-1"""
    for _ in range(iterations):
        now, turn, jacobian = forward_kinematics(q)
        relative = frame @ turn.swapaxes(1, 2)
        skew = (relative - relative.swapaxes(1, 2)) / 2        # sin(angle) * axis: exact enough near the solution
        error = np.concatenate([position - now, skew[:, [2, 0, 1], [1, 2, 0]]], 1)[..., None]      # (N, 6, 1)
        pull, transposed = (posture * (HOME - q))[..., None], jacobian.swapaxes(1, 2)
        solved = np.linalg.solve(jacobian @ transposed + damping ** 2 * np.eye(6), error - jacobian @ pull)
        dq = np.clip((transposed @ solved + pull)[..., 0], -max_step, max_step)
        q = np.clip(q + dq, JOINT_RANGE[0] + .01, JOINT_RANGE[1] - .01)
    return q

def euler_of(frame):
    """Roll in [0, 2 pi) (straight down is pi), pitch, yaw (N, 3) [rad] of R = Rz(yaw) Ry(pitch) Rx(roll), (N, 3, 3)."""
    return np.stack([np.arctan2(frame[:, 2, 1], frame[:, 2, 2]) % (2 * np.pi),
                     -np.arcsin(np.clip(frame[:, 2, 0], -1, 1)), np.arctan2(frame[:, 1, 0], frame[:, 0, 0])], 1)

# ---------------------------------------------------------------------------------------------------- rendering
GL_CONTEXT = {}   # process id: context, one for all environments of a process: MuJoCo frees the buffers of a collected
#                   environment in whatever context is current, which would destroy another one's

def open_gl():
    """Make this process's off-screen OpenGL context current, creating it if need be. RuntimeError: what to install."""
    try:
        if os.getpid() in GL_CONTEXT:                          # a forked child must not use its parent's context
            return GL_CONTEXT[os.getpid()].make_current()
        context = mujoco.GLContext(8, 8)                       # pictures are drawn into MuJoCo's own frame buffers
        context.make_current()
        mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), 50).free()      # some backends fail only here
    except Exception as error:     # every backend fails in its own way: ImportError, AttributeError, FatalError ...
        raise gl_error(error) from error
    GL_CONTEXT[os.getpid()] = context
    atexit.register(context.free)                              # while ctypes still works
    gl_renderer_name()                                         # warns of a slow one

def gl_renderer_name():
    """Name of the current OpenGL renderer; warns if it is a software one on a machine with an NVIDIA GPU."""
    from OpenGL import GL
    name = (GL.glGetString(GL.GL_RENDERER) or b"unknown").decode()
    if "llvmpipe" in name and os.path.exists("/dev/nvidia0"):
        warnings.warn(f"rendering on the CPU ({name}) although this machine has an NVIDIA GPU: see MUJOCO_GL=egl, "
                      "NVIDIA_DRIVER_CAPABILITIES=all, /usr/share/glvnd/egl_vendor.d/10_nvidia.json", stacklevel=3)
    return name


class Scene:
    """One compiled MJCF and a mujoco Batch of it; row i of every array and model field belongs to environment i."""

    def __init__(self, name, num_envs, image_size):
        self.size, self.model = image_size, mujoco.MjModel.from_xml_string(scene_xml(name, image_size))
        self.batch = Batch(self.model, num_envs, nthread=1)    # one thread: processes scale better on small machines
        self.qpos, self.qvel, self.ctrl, self.mocap_pos, self.mocap_quat, self.sensor = map(
            self.batch.bind, ("qpos", "qvel", "ctrl", "mocap_pos", "mocap_quat", "sensordata"))
        self.field = self.batch.expand                         # field("geom_rgba")[i] is environment i's own
        self.loose = np.flatnonzero(self.model.body_dofnum == 6)       # the bodies that lie on the table
        self.models = [None] * num_envs                        # models[i]: what environment i looks like
        if image_size:
            open_gl()
            self.data, self.option, self.camera = mujoco.MjData(self.model), mujoco.MjvOption(), mujoco.MjvCamera()
            self.camera.type, self.camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
            self.view = mujoco.MjvScene(self.model, maxgeom=200)
            self.view.flags[:] = 0                             # no shadow map, reflection, skybox, haze
            self.view.flags[mujoco.mjtRndFlag.mjRND_CULL_FACE] = 1     # without it every face is drawn twice
            self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_50)
            self.rect = mujoco.MjrRect(0, 0, image_size, image_size)

    def set_geom(self, i, name, **values):
        """Write fields geom_... of one geom of environment i."""
        for field, value in values.items():
            self.field("geom_" + field)[i, self.model.geom(name).id] = value

    def render(self, i, tcp, drawn):
        """Picture (H, W, 3) uint8 of environment i and the seconds that OpenGL took. Shadows are discs under the loose
        bodies and the tool: a shadow map would cost 30 times as much."""
        model, data, view = self.models[i], self.batch.get_data(i, self.data), self.view
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        self.option.geomgroup[3] = drawn.clutter
        mujoco.mjv_updateScene(model, data, self.option, None, self.camera, mujoco.mjtCatBit.mjCAT_ALL, view)
        for x, y, z in [*data.xpos[self.loose], tcp] if drawn.shadow else ():
            mujoco.mjv_initGeom(view.geoms[view.ngeom], mujoco.mjtGeom.mjGEOM_CYLINDER, np.array([.028, .028, .0004]),
                                np.array([x, y - drawn.light_side * z, .001]), np.eye(3).ravel(),
                                np.array([0, 0, 0, drawn.shadow], np.float32))
            view.ngeom += 1
        before = time.perf_counter()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)       # of several in this process
        mujoco.mjr_render(self.rect, view, self.context)
        image = np.empty((self.size, self.size, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, self.rect, self.context)
        return image[::-1], time.perf_counter() - before       # OpenGL's first row is the bottom one


# Sensor noise of sigma 1, in 1/16: drawn once and cut at random places, since fresh noise costs 10 x a look-up.
NOISE = (16 * np.random.default_rng(0).standard_normal(1 << 20)).astype(np.int16)

def process_image(image, drawn, step):
    """Tone curve, blur and sensor noise of a frame (H, W, 3) uint8; a function of `drawn` and the step."""
    if drawn.curves is not None:                               # (3, 256)
        image = drawn.curves.ravel().take(image + np.array([0, 256, 512], np.uint16))
    if drawn.blur:                                             # rows, then columns, with 1/4 1/2 1/4
        image = image.astype(np.uint16)
        image[1:-1] = image[:-2] + 2 * image[1:-1] + image[2:] + 2 >> 2
        image[:, 1:-1] = image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:] + 2 >> 2
    if drawn.noise:
        start = (drawn.noise_seed + 7919 * step) % (len(NOISE) - image.size)
        noise = (drawn.noise * NOISE[start:start + image.size] >> 4).reshape(image.shape)
        image = np.clip(image.astype(np.int16) + noise, 0, 255)
    return image.astype(np.uint8)

# ---------------------------------------------------------------------------------------------------- environments
def draw(rng, value):
    """Sample an entry of PARAMETERS: a list is chosen from, (low, high) is drawn uniformly, the rest is fixed."""
    if isinstance(value, list):
        return draw(rng, value[rng.integers(len(value))])
    return rng.uniform(*value) if isinstance(value, tuple) and len(value) == 2 else value


class VecEnv:
    """N environments of one task, or of `all`, stepped together; each restarts by itself when its episode ends.
    task: a name in TASKS, or "all": every episode draws its task.    domain: one of DOMAINS.    num_envs: N.
    seed: which sequence of episodes.    image_size: pixels (H = W), 8 to 512; 0 = no pictures and no OpenGL.
    variant: "seen", "unseen-objects" (held-out shapes, colours), "unseen-states" (held-out starts); not in pretrain.
    reward: "events" = .2 at the first touch or grasp, 1 at the first success, -.4 when success is lost, each once;
        "dense" = mean of the four info["reward_terms"], in [0, 1] a control step.
    gap: which parts of `real` differ from `sim`.    randomise: which of "visual", "dynamics" are drawn as in
    `pretrain`, but for the camera (NEAR_LOOKS); "late": now and then the picture is the one before (LATE).
    paraphrase: True = draw the wording (`pretrain` always does).
    run_to_horizon: True = success and failure do not end an episode (only then can a success be lost).
    first_episode, episode_stride: this process runs episodes first, first + stride, ... of the seed."""

    def __init__(self, task, domain="sim", num_envs=1, seed=0, image_size=64, variant="seen", reward="events",
                 gap=Gap(), randomise=(), paraphrase=False, run_to_horizon=False, first_episode=0, episode_stride=1):
        wrong = [f"{name} {got!r} is unknown, choose from {', '.join(known)}" for name, got, known in (
            ("task", task, (*TASKS, "all")), ("domain", domain, DOMAINS), ("reward", reward, ("events", "dense")),
            ("variant", variant, VARIANTS[:1] if domain == "pretrain" else VARIANTS),
            *(("randomise", part, RANDOM) for part in randomise)) if got not in known]
        wrong += [f"{name} must be a whole number from {low} to {high}, got {got!r}" for name, got, low, high in (
            ("num_envs", num_envs, 1, 4096), ("seed", seed, 0, 1 << 32), ("first_episode", first_episode, 0, 1 << 32),
            ("episode_stride", episode_stride, 1, 1 << 32), ("image_size", image_size, 8 * (image_size != 0), 512))
            if not isinstance(got, (int, np.integer)) or not low <= got <= high]
        if wrong:
            raise ValueError("VecEnv: " + "; ".join(wrong))
        self.num_envs, self.seed, self.image_size, self.domain, n = num_envs, seed, image_size, domain, num_envs
        self.tasks, self.unseen_states = list(TASKS) if task == "all" else [task], variant == "unseen-states"
        self.dense, self.run_to_horizon = reward == "dense", run_to_horizon
        self.first_episode, self.episode_stride = first_episode, episode_stride
        column = {part: DOMAINS.index(domain) * (domain != "real" or getattr(gap, part)) for part in PARAMETERS}
        column |= dict.fromkeys({*randomise} - {"late"}, DOMAINS.index("pretrain"))
        self.parameters = {name: row[column[part]] for part, rows in PARAMETERS.items() for name, row in rows.items()}
        if "visual" in randomise and domain != "pretrain":
            self.parameters.update(NEAR_LOOKS)
        if "late" in randomise:
            self.parameters["stale"] = LATE
        if variant == "unseen-objects":
            self.parameters.update(UNSEEN_OBJECTS, cubes=UNSEEN_CUBES[column["objects"]])
        self.wordings = {name: [task.instruction] * (domain != "pretrain")
                         + task.paraphrases * (paraphrase or domain == "pretrain") for name, task in TASKS.items()}
        self.scenes = {name: Scene(name, n, image_size) for name in sorted({TASKS[t].scene for t in self.tasks})}
        self.seconds, self.frames = dict(physics=0., gl=0.), 0     # of mj_step and OpenGL; pictures; so far
        self.episode, self.steps, self.horizon, self.latency, self.named = np.zeros((5, n), int)    # latency in blocks
        self.task, self.scene_of, self.instruction, self.drawn, self.acting = np.full((5, n), None)
        self.scale, self.rest, self.start_distance, self.object_yaw = np.ones((4, n))
        self.touched, self.succeeded, self.lost, self.diverged = np.zeros((4, n), bool)     # latches of the episode
        self.touch, self.success, self.wrong = np.zeros((3, n), bool)                       # now
        self.target, self.tcp, self.object, self.goal = np.zeros((4, n, 3))     # m: commanded TCP; measured TCP, ...
        self.target_frame, self.frame = np.zeros((2, n, 3, 3))
        self.mirror = np.ones((n, 3))                                           # of the cabinet's x y z
        self.start = np.zeros((n, 3, 2))                                        # m, where the cubes were put
        self.q_new, self.q_old, self.q_older = np.zeros((3, n, 7))              # set-points at the ends of three steps
        self.grip_new, self.grip_old, self.opening, self.finger_speed = np.zeros((4, n))
        self.images = np.zeros((n, image_size, image_size, 3), np.uint8)

    def reset(self):
        """Start over: environment i gets episode first_episode + i * episode_stride. Returns observe() of all."""
        self.next_episode = self.first_episode
        self.begin_episodes(np.arange(self.num_envs))
        return self.observe(np.arange(self.num_envs))

    def begin_episodes(self, ids):
        """Put environments ids into their next scenes; no other environment is touched. The arms start near HOME,
        grippers open, controller targets = where the tools really are."""
        for i in ids:
            self.arrange(i)
        off = np.array([self.drawn[i].arm for i in ids])       # (n, 10) in [-1, 1]: joints, then TCP
        tcp, frame, _ = forward_kinematics(q := HOME + off[:, :7] * self.parameters["start_joints"])
        reach = self.parameters["start_tcp"] + UNSEEN_BAND * self.unseen_states
        q = inverse_kinematics(q, np.clip(tcp + off[:, 7:] * reach, *WORKSPACE), frame)
        self.q_new[ids] = self.q_old[ids] = self.q_older[ids] = q
        self.target[ids], self.target_frame[ids], _ = forward_kinematics(q)
        self.grip_new[ids] = self.grip_old[ids] = FINGER_OPEN
        for _, scene, rows in self.members(ids):
            scene.qpos[rows, :7] = scene.ctrl[rows, :7] = self.q_new[rows]
            scene.qpos[rows, 7:9] = scene.ctrl[rows, 7:9] = FINGER_OPEN
            scene.batch.set_const(rows)                        # what follows from sizes and masses
            scene.batch.forward(rows)
            for i in rows if self.image_size else ():
                scene.models[i] = scene.batch.get_model(i, scene.models[i])
        self.measure(ids)
        self.start_distance[ids] = np.linalg.norm((self.object - self.goal)[ids], axis=1)

    def arrange(self, i):
        """Draw the next episode of environment i and write its scene."""
        self.episode[i], self.next_episode = self.next_episode, self.next_episode + self.episode_stride
        key = [self.seed, DOMAINS.index(self.domain), self.episode[i]]     # a stream a part: Gap changes one part only
        layout, *parts, self.acting[i] = (np.random.default_rng([*key, stream]) for stream in range(5))
        self.task[i] = draw(layout, self.tasks)
        self.scene_of[i], self.horizon[i], self.steps[i] = *TASKS[self.task[i]][:2], 0
        self.instruction[i] = draw(layout, self.wordings[self.task[i]])
        self.touched[i] = self.succeeded[i] = self.lost[i] = self.diverged[i] = self.wrong[i] = False
        self.drawn[i] = drawn = types.SimpleNamespace()
        for rng, part in zip(parts, PARAMETERS):
            vars(drawn).update({name: draw(rng, self.parameters[name]) for name in PARAMETERS[part]})
        self.mirror[i] = 1, drawn.side, 1
        drawn.repeats = parts[0].random(self.horizon[i] + 1) < drawn.stale     # whether step t shows the last frame
        drawn.noise_seed, drawn.arm = parts[0].integers(1 << 20), parts[1].uniform(-1, 1, 10)
        scene = self.scenes[self.scene_of[i]]
        scene.batch.reset([i], stage=0)
        self.apply(scene, i, drawn)
        getattr(self, "place_" + self.scene_of[i])(scene, i, layout, drawn)

    def start_xy(self, layout, name):
        """A start position (2,) [m] in START[name], or in the band of UNSEEN_BAND around it."""
        low, high = START[name]
        while True:
            xy = layout.uniform(low - UNSEEN_BAND * self.unseen_states, high + UNSEEN_BAND * self.unseen_states)
            if not self.unseen_states or ((xy < low) | (xy > high)).any():
                return xy

    def place_pick(self, scene, i, layout, drawn):
        """An object of random shape, colour and yaw, and the dish."""
        parts = [part.split() for part in SHAPES[drawn.shape].split(";")]
        scene.set_geom(i, "part1", rgba=0, contype=0, conaffinity=0)           # off, unless the shape has two parts
        self.named[i] = self.rest[i] = self.goal[i, 2] = 0
        for k, (kind, *numbers) in enumerate(parts):
            numbers = drawn.scale * np.array(numbers, float)
            scene.set_geom(i, f"part{k}", type=getattr(mujoco.mjtGeom, "mjGEOM_" + KINDS[kind.upper()].upper()),
                           pos=numbers[:3], size=numbers[3:], contype=1, conaffinity=1,
                           rgba=(*(drawn.colour if kind.isupper() else drawn.accent), 1),
                           quat=(.5 ** .5, 0, .5 ** .5, 0) if kind == "R" else (1, 0, 0, 0))
            height = numbers[dict(S=3, R=3, C=4).get(kind.upper(), 5)]
            self.rest[i] = max(self.rest[i], height - numbers[2])              # m, of the origin on the table
        rim = scene.model.geom_matid == scene.model.material("rim").id
        scene.field("geom_size")[i, rim, 2] = scene.field("geom_pos")[i, rim, 2] = drawn.dish_wall
        yaw, xy, dish = layout.uniform(-START_TURN, START_TURN) * (drawn.shape not in UNTURNED), 0, 0
        while np.linalg.norm(xy - dish) < START_APART:
            xy, dish = self.start_xy(layout, "object"), self.start_xy(layout, "dish")
        scene.qpos[i, 9:16] = *xy, self.rest[i], np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
        scene.mocap_pos[i, 1, :2] = self.goal[i, :2] = dish

    def place_push(self, scene, i, layout, drawn):
        """Three cubes of different colours in three lanes; the instruction names one."""
        cubes = [drawn.cubes[k] for k in layout.permutation(len(drawn.cubes))[:3]]
        self.named[i] = layout.integers(3)
        self.instruction[i] = self.instruction[i].format(colour=cubes[self.named[i]][0])
        for k, (_, rgb) in enumerate(cubes):
            scene.set_geom(i, f"cube{k}", rgba=(*draw(layout, rgb), 1))      # pretrain: one of several shades
            yaw = layout.uniform(-.5, .5) * START_TURN
            self.start[i, k] = self.start_xy(layout, "cube") + (0, CUBE_LANES[k])
            scene.qpos[i, 9 + 7 * k:16 + 7 * k] = *self.start[i, k], CUBE_HALF, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
        self.goal[i] = *(self.start[i, self.named[i]] + (PUSH_DISTANCE + .02, 0)), CUBE_HALF

    def place_drawer(self, scene, i, layout, drawn):
        """The cabinet at the robot's right (left if mirrored: turned by 180 degrees); its drawer slides along y."""
        scene.set_geom(i, "handle", size=scene.model.geom("handle").size * (drawn.handle_scale, 1, drawn.handle_scale))
        scene.field("jnt_range")[i, 9, 1] = drawn.stroke
        scene.field("dof_frictionloss")[i, 9] = drawn.drawer_friction
        scene.field("dof_damping")[i, 9] = drawn.drawer_damping
        x, y = self.start_xy(layout, "cabinet")
        scene.mocap_pos[i, 1, :2] = x, LOOK_AT[1] + drawn.side * (y - LOOK_AT[1])
        scene.mocap_quat[i, 1] = (1, 0, 0, 0) if drawn.side > 0 else (0, 0, 0, 1)     # half a turn
        opens = self.task[i] == "open-drawer"
        scene.qpos[i, 9] = 0 if opens else layout.uniform(*START_OPEN)
        self.goal[i] = scene.mocap_pos[i, 1] + self.mirror[i] * (HANDLE + (0, drawn.stroke * opens, 0))

    def apply(self, scene, i, drawn):
        """Colours, light, camera and its tone curves; servos, delay, tracking; mass and friction of loose bodies."""
        light, field, look_at = np.array([-.25, -drawn.light_side, -1]), scene.field, LOOK_AT + drawn.shift
        scene.set_geom(i, "table", matid=scene.model.material(drawn.texture).id)
        colours = {**vars(drawn), drawn.texture: drawn.table, "rim": .85 * np.array(drawn.dish)}
        for surface in (drawn.texture, "wall", "robot", "dish", "rim", "cabinet", "handle"):
            field("mat_rgba")[i, scene.model.material(surface).id, :3] = colours[surface]
        field("light_dir")[i, 0] = light / np.linalg.norm(light)
        field("light_ambient")[i, 0], field("light_diffuse")[i, 0] = drawn.ambient, drawn.diffuse
        a, e = np.radians([drawn.azimuth, drawn.elevation])
        toward = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
        drawn.eye, right = look_at + drawn.distance * toward, np.array([-np.sin(a), np.cos(a), 0])
        drawn.view = np.stack([right, np.cross(-toward, right), -toward])      # rows: right, down, ahead
        scene.mocap_pos[i, 0], field("cam_pos")[i, 0] = look_at, drawn.eye
        field("cam_fovy")[i, 0] = drawn.fovy
        ramp = (np.arange(256) / 255) ** drawn.gamma * 255 * drawn.gain
        curves = np.clip(ramp * (1 + drawn.tint * np.array([[1], [0], [-1]])), 0, 255).round().astype(np.uint8)
        drawn.curves = None if (drawn.gain, drawn.tint, drawn.gamma) == (1, 0, 1) else curves      # (3, 256): R, G, B
        # Servos: force = kp (ctrl - q) - kv dq/dt, limited.
        kp = SERVO_KP * ([drawn.stiffness] * 7 + [1, 1])
        kv = kp * ([drawn.damping] * 7 + [0, 0])               # fingers: in the joint; a saturated servo's kv chatters
        field("dof_damping")[i, 7:9] = drawn.finger_damping
        field("actuator_gainprm")[i, :, 0], field("actuator_biasprm")[i, :, 1:3] = kp, np.stack([-kp, -kv], 1)
        field("actuator_forcerange")[i] = np.outer([*ARM_TORQUE, drawn.finger_force, drawn.finger_force], [-1, 1])
        field("body_mass")[i, scene.loose] = drawn.mass
        field("body_inertia")[i, scene.loose] = .4 * drawn.mass * .03 ** 2     # kg m2, of a ball of 3 cm
        loose = np.isin(scene.model.geom_bodyid, scene.loose)
        field("geom_friction")[i, loose, 0] = drawn.friction * (.6 if self.scene_of[i] == "push" else 1)
        self.scale[i], self.latency[i] = drawn.action_scale, round(drawn.latency / (BLOCK_STEPS * PHYSICS_DT))

    def step(self, actions):
        """Run chunks of actions (N, K, 7), see the header; an environment that ends inside a chunk skips the rest.
        Returns observe() of all (the next episode's first where one ended), reward (N,) float32 summed over the chunk,
        terminated (N,) = success or failure, truncated (N,) = time limit or diverged simulation, never both, and info:
        success (N,) at any time in this episode; failure, touched, diverged (N,); clipped (N,) actions beyond
        ACTION_LIMIT; episode, length (N,); reward_terms {name: (N,)}; ended (M,) environments; final_obs: their last
        observation (M rows) or None. ValueError: wrong shape, or non-finite actions, naming the environments."""
        actions, n = np.asarray(actions, np.float64), self.num_envs
        if actions.ndim != 3 or (actions.shape[0], actions.shape[2]) != (n, 7) or not actions.size:
            raise ValueError(f"actions have shape {actions.shape}, need ({n}, K >= 1, 7): environments, chunk, "
                             "(dx dy dz droll dpitch dyaw gripper); a single action a: a[:, None]")
        bad = np.flatnonzero(~np.isfinite(actions).all((1, 2)))
        if len(bad):
            raise ValueError(f"actions of environments {bad.tolist()} are not finite (first: {actions[bad[0]].tolist()}"
                             "); need metres, radians, gripper in [-1, 1]; look for nan in what computed them")
        reward, clipped, terms = np.zeros(n), np.zeros(n, int), {name: np.zeros(n) for name in REWARD_TERMS}
        terminated, truncated = np.zeros((2, n), bool)
        for action in actions.swapaxes(0, 1):                  # (N, 7)
            ids = np.flatnonzero(~(terminated | truncated))
            clipped[ids] += (np.abs(action[ids]) > ACTION_LIMIT + 1e-6).any(1)
            self.advance(ids, np.clip(action[ids], -ACTION_LIMIT, ACTION_LIMIT))
            self.steps[ids] += 1
            self.measure(ids)
            reward[ids] += self.latch(ids, terms)
            if not self.run_to_horizon:
                terminated[ids] = ((self.succeeded | self.wrong) & ~self.diverged)[ids]
            truncated[ids] = (((self.steps >= self.horizon) | self.diverged) & ~terminated)[ids]
        ended = np.flatnonzero(terminated | truncated)
        info = {name: getattr(self, name).copy() for name in ("touched", "diverged", "episode")}
        info.update(success=self.succeeded.copy(), failure=self.wrong & ~self.succeeded, length=self.steps.copy(),
                    clipped=clipped, reward_terms=terms, ended=ended, final_obs=None)
        if len(ended):
            info["final_obs"] = self.observe(ended)
            self.begin_episodes(ended)
        return self.observe(np.arange(n)), reward.astype(np.float32), terminated, truncated, info

    def members(self, ids):
        """(name, scene, rows) of every scene that some of the environments ids are in."""
        groups = [(name, scene, ids[self.scene_of[ids] == name]) for name, scene in self.scenes.items()]
        return [group for group in groups if len(group[2])]

    def advance(self, ids, action):
        """0.2 s of simulation: move the target poses, solve for joints, feed the set-points in blocks of 25 ms."""
        delta = action[:, :6] * self.scale[ids, None]
        self.target[ids] = np.clip(self.target[ids] + delta[:, :3], *WORKSPACE)
        turn = rotation(2, delta[:, 5]) @ rotation(1, delta[:, 4]) @ rotation(0, delta[:, 3])
        self.target_frame[ids] = turn @ self.target_frame[ids]
        self.q_older[ids], self.q_old[ids], self.grip_old[ids] = self.q_old[ids], self.q_new[ids], self.grip_new[ids]
        self.q_new[ids] = inverse_kinematics(self.q_old[ids], self.target[ids], self.target_frame[ids])
        self.grip_new[ids] = FINGER_CLOSED + (action[:, 6] + 1) / 2 * (FINGER_OPEN - FINGER_CLOSED)
        groups = self.members(ids)
        for block in range(BLOCKS):
            # progress through this step's set-points; negative while a delayed robot still follows the last step's
            s = ((block + 1 - self.latency) / BLOCKS)[:, None]                          # (N, 1)
            q = (self.q_old + np.clip(s, 0, 1) * (self.q_new - self.q_old)
                 + np.clip(-s, 0, 1) * (self.q_older - self.q_old))                     # (N, 7)
            grip = np.where(s > 0, self.grip_new[:, None], self.grip_old[:, None])      # (N, 1)
            for _, scene, rows in groups:
                scene.ctrl[rows, :7], scene.ctrl[rows, 7:9] = q[rows], grip[rows]
                before = time.perf_counter()
                try:
                    scene.batch.step(rows, nstep=BLOCK_STEPS)
                except SimulationError as error:               # the other simulations ran on
                    self.diverged[error.ids] = True
                self.seconds["physics"] += time.perf_counter() - before
        for _, scene, rows in groups:                          # MuJoCo resets a diverged simulation, with a warning
            self.diverged[rows] |= scene.batch.warning[rows, :, 1].any(1) | ~np.isfinite(scene.batch.state[rows]).all(1)

    def measure(self, ids):
        """Read tool, object, goal, touch, success and failure from the simulations of environments ids."""
        for name, scene, rows in self.members(ids[~self.diverged[ids]]):
            qpos, sensor, named, every = scene.qpos[rows], scene.sensor[rows], self.named[rows], np.arange(len(rows))
            self.tcp[rows], self.frame[rows], _ = forward_kinematics(qpos[:, :7])
            self.opening[rows], self.finger_speed[rows] = qpos[:, 7:9].sum(1), np.abs(scene.qvel[rows, 7:9]).max(1)
            if name == "drawer":
                slide, opens = qpos[:, 9], self.task[rows] == "open-drawer"
                handle = HANDLE + slide[:, None] * (0, 1, 0)                             # (n, 3) m
                self.object[rows] = scene.mocap_pos[rows, 1] + self.mirror[rows] * handle
                self.touch[rows] = sensor[:, 0] > 0
                self.success[rows] = np.where(opens, slide > OPEN_DISTANCE, slide < CLOSE_DISTANCE)
                continue
            bodies = qpos[:, 9:].reshape(len(rows), -1, 7)     # (n, bodies, 7) xyz, quaternion
            self.object[rows] = bodies[every, named, :3]
            self.object_yaw[rows] = 2 * np.arctan2(bodies[every, named, 6], bodies[every, named, 3])
            if name == "pick":
                gap, clear = (self.object[rows] - other[rows] for other in (self.goal, self.tcp))      # (n, 3) m
                height, force = gap[:, 2] - self.rest[rows], np.linalg.norm(sensor.reshape(-1, 2, 3), axis=2)   # m, N
                self.touch[rows] = (force > GRASP_FORCE).all(1)
                self.success[rows] = ((np.linalg.norm(gap[:, :2], axis=1) < PICK_RADIUS) & (0 < height)
                                      & (height < PICK_HEIGHT) & (force == 0).all(1)
                                      & (np.linalg.norm(clear, axis=1) > PICK_CLEAR))
            else:
                moved, others = bodies[..., :2] - self.start[rows], named[:, None] != np.arange(3)   # (n, 3, 2)
                self.wrong[rows] = (np.linalg.norm(moved, axis=2) * others).max(1) > PUSH_WRONG
                self.touch[rows] = sensor[every, named] > 0
                self.success[rows] = (moved[every, named, 0] > PUSH_DISTANCE) & ~self.wrong[rows]

    def latch(self, ids, terms):
        """Reward (n,) of environments ids after a control step; updates the latches, adds to terms {name: (N,)}."""
        touch, success = self.touch & ~self.diverged, self.success & ~self.diverged
        reach = 1 - np.tanh(5 * np.linalg.norm(self.tcp - self.object, axis=1))
        progress = 1 - np.clip(np.linalg.norm(self.object - self.goal, axis=1) / self.start_distance, 0, 1)
        for name, value in zip(REWARD_TERMS, (reach, touch, progress, success)):
            terms[name][ids] += value[ids]
        lost = self.succeeded & ~success & ~self.lost
        first = REWARD_TOUCH * (touch & ~self.touched) + REWARD_SUCCESS * (success & ~self.succeeded)
        for latch, now in ((self.touched, touch), (self.succeeded, success), (self.lost, lost)):
            latch[ids] |= now[ids]
        return ((reach + touch + progress + success) / 4 if self.dense else first + REWARD_LOST * lost)[ids]

    def observe(self, ids):
        """Observation of environments ids: images (n, H, W, 3) uint8 (absent if image_size is 0), instructions, a list
        of n strings, state (n, 8) float32, and truth (n, 16) float32: tool, named object, goal from LOOK_AT [10 cm],
        gripper opening [10 cm], touched before, time left / 80 steps, task (one-hot). Fresh arrays."""
        state, points = np.zeros((len(ids), 8), np.float32), np.stack([self.tcp, self.object, self.goal], 1)[ids]
        state[:, :3], state[:, 3:6], state[:, 6] = self.tcp[ids], euler_of(self.frame[ids]), self.opening[ids]
        left, task = (self.horizon - self.steps)[ids] / 80, self.task[ids, None] == np.array(list(TASKS))
        points = ((points - LOOK_AT) * 10).reshape(-1, 9)
        truth = np.column_stack([points, 10 * state[:, 6], self.touched[ids], left, task])      # (n, 16)
        obs = dict(instructions=list(self.instruction[ids]), state=state, truth=truth.astype(np.float32))
        if self.image_size:
            open_gl()
            for i in ids:
                drawn, step = self.drawn[i], self.steps[i]
                if step == 0 or not drawn.repeats[step]:
                    image, seconds = self.scenes[self.scene_of[i]].render(i, self.tcp[i], drawn)
                    self.images[i] = process_image(image, drawn, step)
                    self.seconds["gl"], self.frames = self.seconds["gl"] + seconds, self.frames + 1
            obs["images"] = self.images[ids]                   # a copy
        return obs

    def landmarks(self):
        """(N, 3, 5) float32 of tool, named object (or handle) and goal: position xyz [m], and where the picture shows
        it, from -1 left to 1 right and from -1 top to 1 bottom. Labels for auxiliary losses."""
        xyz = np.stack([self.tcp, self.object, self.goal], 1)                               # (N, 3, 3)
        seen = np.stack([(points - one.eye) @ one.view.T for points, one in zip(xyz, self.drawn)])
        zoom = np.tan(np.radians([one.fovy for one in self.drawn]) / 2)[:, None, None]
        return np.concatenate([xyz, seen[..., :2] / seen[..., 2:] / zoom], 2).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- experts
# Waypoints: reference, offset [m], gripper, tolerance [m], most steps, and the distance [m] between tool and object
# beyond which (0 = none) it was lost and the plan starts again. A reference is the object or the goal, wherever it is
# by then, or the tool where it was when the waypoint began. When the gripper changes, the plan waits for the fingers.
PLANS = {
    "pick-place": (("object", (0, 0, .09), 1, .012, 25, 0), ("object", (0, 0, 0), 1, .005, 25, 0),
                   ("tool", (0, 0, .12), -1, .02, 8, .06), ("goal", (0, 0, .15), -1, .01, 25, .06),
                   ("goal", (0, 0, .075), -1, .01, 25, .06), ("tool", (0, 0, .09), 1, .02, 8, 0)),
    "push-cube": (("object", (-.075, 0, .10), -1, .012, 25, 0), ("object", (-.075, 0, -.003), -1, .008, 25, 0),
                  ("object", (.08, 0, -.003), -1, 0, 8, .10), ("tool", (0, 0, .12), -1, .03, 8, 0)),
    "open-drawer": (("object", (0, 0, .10), 1, .012, 25, 0), ("object", (0, 0, .003), 1, .006, 25, 0),
                    ("goal", (0, .01, .003), -1, .01, 12, .05), ("tool", (0, 0, .12), 1, .03, 8, 0)),
    "close-drawer": (("object", (0, .05, .10), -1, .015, 25, 0), ("object", (0, .05, 0), -1, .01, 25, 0),
                     ("goal", (0, -.03, 0), -1, .01, 12, 0), ("tool", (0, .03, .10), -1, .03, 8, 0))}


class Expert:
    """Closed-loop scripted demonstrator of every environment in env, from the simulator's state.
        expert = Expert(env);     executed, label = expert.act();     env.step(executed[:, None])
    style "expert": precise. With noise > 0 [m] it executes label + N(0, sigma), sigma ~ U(0, noise) once an episode:
    such demonstrations contain recoveries while their labels stay clean (DART, Laskey et al. 2017).
    style "teleop": an imperfect person: slower or faster, a few mm off, with pauses, an overshoot and correlated noise;
    label = executed, as in a recording. What happens in an episode depends on the episode only, not on num_envs."""

    SPEED, TURN_SPEED = .036, .18                              # m and rad a control step

    def __init__(self, env, style="expert", noise=0.):
        if style not in ("expert", "teleop") or not 0 <= noise <= .02:
            raise ValueError(f"Expert: got style {style!r}, noise {noise!r}; need expert or teleop, noise 0 to .02 m")
        self.env, self.teleop, self.noise, self.plan, self.habit = env, style == "teleop", noise, {}, {}

    def act(self):
        """Next actions: executed (N, 7) and label (N, 7), see the class."""
        executed, label = np.zeros((2, self.env.num_envs, 7))
        for i, rng in enumerate(self.env.acting):
            if i not in self.plan or self.habit[i].rng is not rng:     # a new episode
                self.habit[i] = types.SimpleNamespace(
                    rng=rng, drift=np.zeros(6), pause=0, grip=1., speed=rng.uniform(.6, 1.1) if self.teleop else 1.,
                    offset=rng.normal(0, .003, 3) * self.teleop, overshoot=rng.uniform(.01, .02) * self.teleop,
                    sigma=.0012 if self.teleop else rng.uniform(0, self.noise))
                self.plan[i] = self.follow(i)
            habit = self.habit[i]
            habit.drift = rng.normal(0, 1, 6) + (.7 * habit.drift if self.teleop else 0)
            habit.pause = rng.integers(1, 4) if self.teleop and rng.random() < .02 else max(habit.pause - 1, 0)
            label[i] = (0, 0, 0, 0, 0, 0, habit.grip) if habit.pause else next(self.plan[i])
            habit.grip = label[i, 6]
            executed[i] = label[i] + np.append(habit.sigma * habit.drift * (1, 1, 1, 3, 3, 3), 0)
        executed = np.clip(executed, -ACTION_LIMIT, ACTION_LIMIT)
        return executed, executed.copy() if self.teleop else label

    def follow(self, i):
        """Generator of the actions (7,) of environment i; looks at the scene before each."""
        env, habit, grip = self.env, self.habit[i], PLANS[self.env.task[i]][0][2]
        while True:
            for reference, offset, wanted, tolerance, most, leash in PLANS[env.task[i]]:
                for k in range(8 * (wanted != grip)):          # until the fingers stand still
                    yield np.array([0, 0, 0, 0, 0, 0, wanted])
                    if k > 0 and env.finger_speed[i] < .004:
                        break
                grip, tool = wanted, env.target[i].copy()
                for _ in range(most):
                    where = dict(object=env.object[i], goal=env.goal[i], tool=tool)[reference]
                    where = where + env.mirror[i] * offset
                    gap = np.clip(where + habit.offset, *WORKSPACE) - env.target[i]
                    distance, turn = np.linalg.norm(gap), 0.
                    if env.scene_of[i] == "pick" and reference == "object":    # align the wrist, to half a turn
                        heading = np.arctan2(env.target_frame[i, 1, 0], env.target_frame[i, 0, 0])
                        turn = (env.object_yaw[i] - heading + np.pi / 2) % np.pi - np.pi / 2
                    lost = leash and np.linalg.norm(env.tcp[i] - env.object[i]) > leash
                    if lost or (distance < tolerance and abs(turn) < .06):
                        break
                    if habit.overshoot and tolerance <= distance < self.SPEED:     # once: a little too far, then back
                        gap, habit.overshoot = gap * (1 + habit.overshoot / max(distance, .01)), 0
                    gap *= min(1, self.SPEED * habit.speed / max(np.linalg.norm(gap), 1e-9))
                    turn = np.clip(turn, -self.TURN_SPEED, self.TURN_SPEED)
                    yield np.append(np.array([*gap, 0, 0, turn]) / env.scale[i], grip)
                if lost:
                    break
            while env.success[i]:                              # with run_to_horizon: rest
                yield np.array([0, 0, 0, 0, 0, 0, grip])


# ---------------------------------------------------------------------------------------------------- demo
def wilson(k, n):
    """95 % Wilson interval (low, high) of success rates k / n."""
    centre, half = (k + 1.92) / (n + 3.84), 1.96 * np.sqrt(k * (n - k) / n + .96) / (n + 3.84)
    return np.maximum(centre - half, 0.), np.minimum(centre + half, 1.)

def run_expert(env, episodes, style="expert", noise=0., frames=None):
    """Success (episodes,) bool and length (episodes,) int of the demonstrator on episodes 0, 1, ... of env. Appends the
    pictures of environment 0 to the list `frames`, if given."""
    obs, expert = env.reset(), Expert(env, style, noise)
    success, length = np.zeros(episodes, bool), np.zeros(episodes, int)
    while (length == 0).any():
        shown, (obs, *_, info) = obs, env.step(expert.act()[0][:, None])
        if frames is not None:
            frames += [shown["images"][0], *(info["final_obs"]["images"] if 0 in info["ended"] else ())]
        done = info["ended"][info["episode"][info["ended"]] < episodes]
        success[info["episode"][done]], length[info["episode"][done]] = info["success"][done], info["length"][done]
    return success, length

def speed(task, num_envs=32, steps=40):
    """Of one process at 64 px: environment steps/s; OpenGL frames/s; share of the time in neither mj_step nor OpenGL;
    frames/s of mujoco.Renderer on the same scene in MuJoCo's default quality."""
    env, total = VecEnv(task, num_envs=num_envs), 0.
    env.reset()
    expert, env.seconds, env.frames = Expert(env), dict(physics=0., gl=0.), 0
    for _ in range(steps):
        action, before = expert.act()[0][:, None], time.perf_counter()
        env.step(action)
        total += time.perf_counter() - before
    xml = scene_xml(TASKS[task].scene, 64).replace(FAST, "").replace('castshadow="false"', "")
    model = mujoco.MjModel.from_xml_string(xml)
    data, renderer, before = mujoco.MjData(model), mujoco.Renderer(model, 64, 64), time.perf_counter()
    mujoco.mj_forward(model, data)
    for _ in range(20):
        renderer.update_scene(data, camera=0)
        renderer.render()
    return (num_envs * steps / total, env.frames / env.seconds["gl"], 1 - sum(env.seconds.values()) / total,
            20 / (time.perf_counter() - before))

def main():
    parser = argparse.ArgumentParser(description="Demo: pictures, videos, expert success, the sim-real gap, speed.")
    parser.add_argument("--out", default="runs/envs", help="folder for the pictures and videos")
    parser.add_argument("--episodes", type=int, default=60, help="expert episodes per task and domain, >= 1")
    args, sheet = parser.parse_args(), []
    os.makedirs(args.out, exist_ok=True)
    import imageio
    print("The gap between sim and real (the stand-in for a robot); (low, high) is drawn in each episode")
    for part, rows in PARAMETERS.items():
        for name, (sim, real, _) in rows.items():
            print(f"  {part:9}{name:16}{str(sim):60.59}{str(real):.59}")
    print(f"\nSuccess of the demonstrators, n = {args.episodes} (episodes 0.. of seed 0), 95 % Wilson interval")
    for domain in ("sim", "real"):
        for task in TASKS:
            run_expert(VecEnv(task, domain, image_size=224), 1, frames=(frames := []))
            imageio.mimwrite(f"{args.out}/{task}-{domain}.mp4", frames, fps=5, macro_block_size=1)
            sheet.append(np.concatenate([frames[0], frames[-1]], 1))
            for style in ("expert", "teleop"):
                success, length = run_expert(VecEnv(task, domain, 20, image_size=0), args.episodes, style)
                low, high = wilson(success.sum(), args.episodes)
                print(f"  {domain:5}{task:13}{style:7}{success.mean():7.1%}  [{low:.1%}, {high:.1%}]  "
                      f"{length.mean():.1f} steps")
    sheet = [np.concatenate(sheet[k:k + 4], 1) for k in (0, 4)]
    imageio.imwrite(f"{args.out}/contact-sheet.png", np.concatenate(sheet))
    print(f"\nSpeed of one process, 32 environments, 64 px; OpenGL on {gl_renderer_name()}")
    for task in TASKS:
        print("  {:13}{:5.0f} environment steps/s {:6.0f} frames/s  glue {:.0%} mujoco.Renderer {:.0f} frames/s".format(
            task, *speed(task)))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        both = sum(rate for rate, *_ in pool.map(speed, ["pick-place"] * 2, chunksize=1))
    print(f"  two processes: {both:.0f} environment steps/s on pick-place\ncontact-sheet.png, 8 videos: {args.out}")

if __name__ == "__main__":
    main()
