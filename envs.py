"""Four tabletop tasks for a Franka Panda in MuJoCo: two domains, many environments at once, scripted experts.

    env = VecEnv("pick-place", domain="sim", num_envs=32, seed=0, image_size=64)
    obs = env.reset()
    obs, reward, terminated, truncated, info = env.step(actions)          # actions (N, K, 7), K steps of 0.2 s

Tasks    pick-place   put the object into the dish              push-cube     push the cube of the named colour
         open-drawer  pull the drawer out                       close-drawer  push it in          all  a mixture
Domains  sim          the digital twin that a policy may practise in as long as it likes
         real         the STAND-IN for a real robot: other looks, dynamics and objects; nothing here is a real robot
         pretrain     wide randomisation; no texture, camera or colour in common with the other two
Files    this one only: mujoco + numpy (imageio for videos). Copy it away with these two packages.

Conventions, the same everywhere in this file
    frame      robot base: x forward, y left, z up, metres, radians; the table top is z = 0
    action     dx dy dz [m], droll dpitch dyaw [rad] per control step, gripper in [-1 close, +1 open]; the delta is
               added to the previous TARGET pose, so tracking errors do not accumulate; rotations are about the base
               axes through the tool centre point (TCP), R <- Rz(dyaw) Ry(dpitch) Rx(droll) R
    image      (H, W, 3) uint8 RGB, top row first, third-person camera
    state      (8,) float32: TCP xyz [m], roll pitch yaw [rad], gripper opening [m], 0
    time       5 Hz control, 5 ms physics; one episode = HORIZON[task] control steps at most
    arrays     N environments, K actions a chunk
An episode is a function of (seed, domain, episode number): the same scene whatever the number of environments or
processes. Environment i of a process starts with episode first_episode + i * episode_stride.
"""
import argparse
import collections
import ctypes.util
import dataclasses
import os
import sys
import time
import warnings


def choose_gl_backend():
    """Pick an off-screen OpenGL for MuJoCo. Must run before mujoco is imported: it reads MUJOCO_GL only then."""
    # Software GL (llvmpipe) starts raster threads that do not survive a fork and gain nothing at 64 px.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    if "MUJOCO_GL" in os.environ or not sys.platform.startswith("linux"):
        return                                        # the user's choice, or the system's own (cgl, wgl)
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            return


choose_gl_backend()
import mujoco                                         # noqa: E402  (after the choice of the backend)
import numpy as np                                    # noqa: E402
from mujoco.batch import Batch, SimulationError       # noqa: E402

# ---------------------------------------------------------------------------------------------- constants

TASKS = ("pick-place", "push-cube", "open-drawer", "close-drawer")
DOMAINS = ("sim", "real", "pretrain")
VARIANTS = ("seen", "unseen-objects", "unseen-states")
SCENE_OF = {"pick-place": "pick", "push-cube": "push", "open-drawer": "drawer", "close-drawer": "drawer"}
HORIZON = {"pick-place": 80, "push-cube": 40, "open-drawer": 40, "close-drawer": 40}     # control steps of 0.2 s
INSTRUCTION = {"pick-place": "put the object into the dish", "push-cube": "push the {colour} cube forward",
               "open-drawer": "open the drawer", "close-drawer": "close the drawer"}
PARAPHRASES = {
    "pick-place": ("pick up the thing and drop it in the dish", "move the item into the dish",
                   "place the toy in the round dish", "grab the object and put it on the plate",
                   "the object belongs in the bowl"),
    "push-cube": ("move the {colour} block away from the robot", "shove the {colour} cube to the front",
                  "push the {colour} block", "slide the {colour} cube forward", "the {colour} one goes forward"),
    "open-drawer": ("pull the drawer open", "pull out the drawer", "slide the drawer out",
                    "get the drawer open", "the drawer should be open"),
    "close-drawer": ("push the drawer shut", "push in the drawer", "slide the drawer in",
                     "shut the drawer", "the drawer should be closed")}

PHYSICS_DT = 0.005        # s; 10 ms makes the grasp fail
BLOCK_STEPS = 5           # physics steps during which the joint set-points are held: 25 ms
BLOCKS = 8                # blocks a control step: 8 * 25 ms = 0.2 s = 5 Hz
ACTION_LIMIT = np.array([.05, .05, .05, .3, .3, .3, 1.])       # m, rad, gripper; beyond it actions are clipped
WORKSPACE = np.array([[.30, -.36, .012], [.68, .36, .50]])     # m; the target pose stays inside
HOME = np.array([0, .259, 0, -2.289, 0, 2.515, np.pi / 4])     # rad; TCP at (.524, 0, .131) pointing down
FINGER_OPEN, FINGER_CLOSED = .04, -.01   # m per finger; a negative set-point squeezes thin objects
GRASP_FORCE = .5          # N on both pads: the object counts as grasped
PICK_RADIUS = .05         # m between the axes of object and dish at success
PICK_HEIGHT = .025        # m that the object's underside may be above the dish's floor
PICK_START = .115         # m; the object starts at least this far from the dish's axis
PICK_CLEAR = .045         # m between TCP and object: it was let go
PUSH_DISTANCE = .10       # m that the named cube must move forward (+x)
PUSH_WRONG = .03          # m that another cube may move before the episode counts as failed
OPEN_DISTANCE = .15       # m of drawer travel
CLOSE_DISTANCE = .02      # m of drawer travel left
REWARD_TOUCH, REWARD_SUCCESS, REWARD_LOST = .2, 1., -.4        # latched events, each at most once an episode
UNSEEN_BAND = .04         # m around the usual start area in which `unseen-states` starts
CUBE_Y = (-.12, 0., .12)  # m; the lanes of the three cubes

# ---------------------------------------------------------------------------------------------- what differs between domains
# Every (low, high) is drawn uniformly once an episode; equal ends are a constant. A tuple of colours is chosen from.

TEXTURES = ("wood", "slate", "dots", "tiles", "stripes", "plain")    # see ASSETS; of the table


@dataclasses.dataclass(frozen=True)
class Visual:
    """How a domain looks: surroundings, light, camera and the camera's image processing."""
    textures: tuple = ("wood",)                              # of the table
    table: tuple = ((.62, .47, .36),)                        # RGB 0-1
    wall: tuple = ((.72, .72, .72),)
    robot: tuple = ((.95, .95, .95),)
    clutter: float = 0.                                      # probability of boxes and a cloth in the background
    ambient: tuple = (.45, .45)                              # light, fraction of full white
    diffuse: tuple = (.55, .55)
    light_side: tuple = (0., 0.)                             # 0 = straight down, 1 = 45 degrees from +y
    shadow: tuple = (0., 0.)                                 # opacity of the blob shadows
    camera_azimuth: tuple = (22., 22.)                       # deg from +x, about LOOK_AT
    camera_elevation: tuple = (39., 39.)                     # deg above the table
    camera_distance: tuple = (.90, .90)                      # m
    camera_fovy: tuple = (29.5, 29.5)                        # deg
    look_at_shift: tuple = (0., 0.)                          # m, on each axis
    gain: tuple = (1., 1.)                                   # image brightness factor
    tint: tuple = (0., 0.)                                   # + warm: red up, blue down
    gamma: tuple = (1., 1.)
    noise: int = 0                                           # sigma of the sensor noise, of 255
    blur: bool = False                                       # 3x3 binomial
    stale: float = 0.                                        # probability that the camera repeats its last frame


@dataclasses.dataclass(frozen=True)
class Dynamics:
    """How a domain moves: servo, tracking, delay, masses, friction."""
    servo_stiffness: tuple = (1., 1.)                        # factor on the joint gains
    servo_damping: tuple = (.05, .05)                        # s; kv / kp
    action_scale: tuple = (1., 1.)                           # executed / commanded displacement
    latency: tuple = (0., 0.)                                # s between command and motion
    gripper_damping: tuple = (100., 100.)                    # N s/m; larger = slower fingers
    gripper_force: tuple = (40., 40.)                        # N
    object_mass: tuple = (.05, .05)                          # kg
    object_friction: tuple = (1., 1.)
    drawer_friction: tuple = (1., 1.)                        # N
    drawer_damping: tuple = (5., 5.)                         # N s/m
    start_joints: float = .02                                # rad; the arm starts within +- this
    start_tcp: float = 0.                                    # m; and its tool within +- this on each axis


@dataclasses.dataclass(frozen=True)
class Objects:
    """What lies on the table."""
    shapes: tuple = ("cube", "brick", "can", "ball", "egg", "carrot", "mushroom", "bottle")
    unseen_shapes: tuple = ("pot", "cross", "dumbbell", "house")
    colours: tuple = ((.90, .45, .10), (.85, .15, .12), (.55, .35, .75), (.15, .35, .75))    # of the object
    accents: tuple = ((.20, .55, .15), (.95, .90, .75))      # of its second part
    scale: tuple = (1., 1.)                                  # object size factor
    dish: tuple = ((.62, .80, .20),)
    dish_wall: tuple = (.006, .006)                          # m; plate .006, bowl .016
    cubes: tuple = (("pink", (.95, .45, .65)), ("blue", (.10, .30, .85)), ("yellow", (.95, .80, .10)),
                    ("green", (.10, .65, .25)), ("orange", (.95, .45, .05)))
    unseen_cubes: tuple = (("white", (.95, .95, .95)), ("black", (.08, .08, .08)), ("brown", (.40, .22, .10)))
    cabinet: tuple = ((.93, .93, .90),)
    handle: tuple = ((.08, .08, .08),)
    handle_scale: tuple = (1., 1.)                           # size factor of the handle plate
    stroke: tuple = (.20, .20)                               # m of drawer travel


@dataclasses.dataclass(frozen=True)
class Domain:
    visual: Visual = Visual()
    dynamics: Dynamics = Dynamics()
    objects: Objects = Objects()


SIM = Domain()
REAL = Domain(
    Visual(textures=("slate",), table=((.10, .42, .40),), wall=((.16, .16, .19),), robot=((.88, .87, .82),),
           clutter=1., ambient=(.30, .36), diffuse=(.55, .70), light_side=(.6, .8), shadow=(.25, .35),
           camera_azimuth=(24.5, 25.5), camera_elevation=(36.5, 37.5), camera_distance=(.920, .930),
           camera_fovy=(30.5, 31.), look_at_shift=(.008, .012), gain=(.85, 1.15), tint=(-.08, .08),
           gamma=(.9, 1.1), noise=4, blur=True, stale=.1),
    Dynamics(servo_stiffness=(.45, .55), servo_damping=(.08, .08), action_scale=(.87, .93), latency=(.025, .075),
             gripper_damping=(150., 150.), gripper_force=(25., 25.), object_mass=(.10, .14),
             object_friction=(.6, .7), drawer_friction=(2.5, 5.), drawer_damping=(12., 25.),
             start_joints=.05, start_tcp=.02),
    Objects(shapes=("cube", "can", "ball", "carrot", "pear", "corn", "eggplant", "sponge"),
            colours=((.88, .15, .28), (.62, .32, .78), (.98, .80, .22), (.98, .60, .48)),
            accents=((.35, .65, .25), (.90, .90, .60)), scale=(.95, 1.05), dish=((.92, .93, .95),),
            dish_wall=(.014, .016),
            cubes=(("purple", (.45, .20, .65)), ("yellow", (.90, .72, .20)), ("pink", (.90, .50, .62))),
            unseen_cubes=(("orange", (.90, .42, .15)), ("green", (.45, .75, .40)), ("red", (.75, .12, .12))),
            cabinet=((.85, .88, .92),), handle=((.16, .14, .13),), handle_scale=(.9, .9), stroke=(.19, .21)))
PRETRAIN = Domain(
    Visual(textures=("dots", "tiles", "crosses", "plain"),
           table=((.85, .85, .80), (.30, .30, .36), (.70, .30, .25), (.25, .35, .60), (.75, .70, .35),
                  (.50, .25, .45), (.40, .55, .35), (.15, .15, .15)),
           wall=((.95, .90, .80), (.40, .45, .55), (.55, .40, .35), (.30, .42, .30), (.85, .75, .85)),
           robot=((1., 1., 1.), (.80, .82, .86), (.93, .90, .80), (.70, .70, .70)), clutter=.5,
           ambient=(.20, .60), diffuse=(.35, .80), light_side=(-1., 1.), shadow=(0., .5),
           camera_azimuth=(2., 42.), camera_elevation=(30., 46.), camera_distance=(.84, 1.05),
           camera_fovy=(28., 33.), look_at_shift=(-.02, .02), gain=(.75, 1.25), tint=(-.12, .12),
           gamma=(.8, 1.25), noise=3),
    Dynamics(servo_stiffness=(.6, 1.2), action_scale=(.9, 1.1), latency=(0., .05), object_mass=(.04, .15),
             object_friction=(.7, 1.2), drawer_friction=(1., 4.), drawer_damping=(4., 20.), start_joints=.05,
             start_tcp=.03),
    Objects(shapes=("block", "drum", "pill", "lens", "tee", "stack"), unseen_shapes=("peg", "disc", "ell", "bell"),
            colours=((.10, .75, .80), (.80, .10, .70), (.60, .90, .10), (.05, .10, .40), (.98, .92, .80),
                     (.45, .50, .10), (.50, .50, .52), (.98, .65, .60)),
            accents=((.02, .02, .02), (1., 1., 1.), (.50, .10, .20), (.30, .70, .65)), scale=(.9, 1.15),
            dish=((.20, .20, .70), (.90, .30, .30), (.15, .45, .40), (.95, .85, .60), (.60, .60, .62)),
            dish_wall=(.005, .017),
            cubes=(("cyan", (.10, .78, .85)), ("magenta", (.82, .10, .72)), ("lime", (.62, .93, .10)),
                   ("navy", (.05, .08, .38)), ("grey", (.50, .50, .52)), ("maroon", (.45, .04, .14))),
            unseen_cubes=(("olive", (.42, .44, .08)), ("beige", (.96, .90, .76)), ("teal", (.05, .42, .45))),
            cabinet=((.60, .45, .30), (.35, .40, .50), (.75, .65, .75), (.25, .50, .35)),
            handle=((.85, .75, .20), (.75, .75, .78), (.70, .15, .15), (.20, .25, .60)),
            handle_scale=(.85, 1.15), stroke=(.19, .21)))
CAMERA_CLEARANCE = .06    # m; `pretrain` never puts its camera nearer to that of `sim` or `real`
LOOK_AT = np.array([.45, -.045, .08])                         # m; the point that every camera orbits

# Object shapes: parts of (geom type, half sizes [m], centre [m], 0 = object colour | 1 = accent). The origin is the
# grasp point and the fingers close along y, where every shape is at most 60 mm wide. `turned` shapes are long along
# x and start with a random yaw; the others look alike from all sides.
BOX, BALL, ROD, CAN, EGG = (getattr(mujoco.mjtGeom, f"mjGEOM_{name}").value
                            for name in ("BOX", "SPHERE", "CAPSULE", "CYLINDER", "ELLIPSOID"))
SHAPES = {
    "cube": ((BOX, (.023, .023, .023), (0, 0, 0), 0),),
    "brick": ((BOX, (.031, .020, .018), (0, 0, 0), 0),),
    "can": ((CAN, (.023, .028, 0), (0, 0, 0), 0),),
    "ball": ((BALL, (.026, 0, 0), (0, 0, 0), 0),),
    "egg": ((EGG, (.032, .023, .023), (0, 0, 0), 0),),
    "carrot": ((ROD, (.019, .020, 0), (0, 0, 0), 0), (BOX, (.008, .012, .008), (.042, 0, 0), 1)),
    "mushroom": ((CAN, (.018, .018, 0), (0, 0, -.004), 1), (EGG, (.028, .028, .016), (0, 0, .018), 0)),
    "bottle": ((CAN, (.023, .026, 0), (0, 0, 0), 0), (CAN, (.011, .010, 0), (0, 0, .036), 1)),
    "pear": ((BALL, (.026, 0, 0), (0, 0, 0), 0), (BALL, (.015, 0, 0), (0, 0, .030), 0)),
    "corn": ((ROD, (.020, .018, 0), (0, 0, 0), 0), (BOX, (.016, .020, .012), (-.026, 0, 0), 1)),
    "eggplant": ((EGG, (.035, .022, .022), (0, 0, 0), 0), (BOX, (.007, .010, .010), (-.034, 0, 0), 1)),
    "sponge": ((BOX, (.031, .022, .010), (0, 0, .010), 0), (BOX, (.031, .022, .010), (0, 0, -.010), 1)),
    "pot": ((CAN, (.027, .020, 0), (0, 0, 0), 0), (BOX, (.012, .007, .006), (.036, 0, .010), 1)),
    "cross": ((BOX, (.031, .014, .016), (0, 0, 0), 0), (BOX, (.012, .026, .016), (0, 0, 0), 1)),
    "dumbbell": ((BOX, (.034, .018, .020), (0, 0, 0), 1), (CAN, (.024, .014, 0), (0, 0, .006), 0)),
    "house": ((BOX, (.025, .021, .018), (0, 0, 0), 0), (BOX, (.016, .013, .008), (0, 0, .026), 1)),
    "block": ((BOX, (.024, .020, .024), (0, 0, 0), 0),),
    "drum": ((CAN, (.025, .018, 0), (0, 0, 0), 0),),
    "pill": ((ROD, (.020, .016, 0), (0, 0, 0), 0),),
    "lens": ((EGG, (.027, .027, .020), (0, 0, 0), 0),),
    "tee": ((BOX, (.012, .024, .016), (.014, 0, 0), 0), (BOX, (.020, .014, .016), (-.016, 0, 0), 0)),
    "stack": ((BOX, (.024, .024, .012), (0, 0, -.008), 0), (CAN, (.017, .012, 0), (0, 0, .016), 1)),
    "peg": ((CAN, (.017, .030, 0), (0, 0, 0), 0),),
    "disc": ((CAN, (.028, .014, 0), (0, 0, 0), 0),),
    "ell": ((BOX, (.026, .013, .016), (0, 0, 0), 0), (BOX, (.010, .010, .016), (-.016, .016, 0), 0)),
    "bell": ((EGG, (.026, .026, .024), (0, 0, 0), 0), (CAN, (.010, .010, 0), (0, 0, .030), 1))}
TURNED = ("cube", "brick", "egg", "carrot", "corn", "eggplant", "sponge", "pot", "cross", "dumbbell", "house",
          "block", "pill", "tee", "ell")
ROD_ALONG_X = np.array([.70710678, 0, .70710678, 0])           # capsules point along z in MuJoCo

# Where things start: [low, high] of x and y, m. `unseen-states` starts in the band of UNSEEN_BAND around each area.
START_AREA = {"object": np.array([[.42, .04], [.53, .14]]), "dish": np.array([[.42, -.16], [.53, -.07]]),
              "cube": np.array([[.42, -.015], [.46, .015]]), "cabinet": np.array([[.44, -.32], [.52, -.27]])}
TURN = .5                                                      # rad; objects and cubes start within +- this yaw
CLOSE_START = (.14, .19)                                       # m; how far open the drawer is before close-drawer

# ---------------------------------------------------------------------------------------------- the robot and the scenes

# Kinematics and inertias of the Franka Panda (MuJoCo Menagerie / franka_ros; inertias identified by Gaz et al. 2019).
# One row a link: position in the parent [m], quaternion, mass [kg], centre of mass [m], inertia xx yy zz xy xz yz
# [kg m2], joint range [rad], and its looks: c = capsule, y = cylinder "from to radius", b = box "centre half-size",
# upper case = white, lower case = dark. Only the finger pads collide, so the arm's looks cost no physics.
LINKS = (
    ("0 0 .333", "1 0 0 0", 4.970684, ".003875 .002081 -.04762",
     ".70337 .70661 .009117 -.000139 .006772 .019169", "-2.8973 2.8973",
     "C 0 0 -.165 0 -.02 -.03 .056; C 0 -.0745 0 0 0 0 .055"),
    ("0 0 0", "1 -1 0 0", .646926, "-.003141 -.02872 .003495",
     ".007962 .02811 .025995 -.003925 .010254 .000704", "-1.7628 1.7628",
     "C 0 0 0 0 0 .0745 .055; C 0 -.03 .02 0 -.165 0 .056"),
    ("0 -.316 0", "1 1 0 0", 3.228604, ".027518 .039252 -.066502",
     ".037242 .036155 .01083 -.004761 -.011396 -.012805", "-2.8973 2.8973",
     "C 0 0 -.09 .01 .01 -.01 .055; c .0825 0 0 .0825 .056 0 .055; C .02 .02 0 .0825 .04 0 .05"),
    (".0825 0 0", "1 1 0 0", 3.587895, "-.05317 .104419 .027454",
     ".025853 .019552 .028323 .007796 -.001332 .008641", "-3.0718 -.0698",
     "c 0 0 0 0 0 .056 .055; C -.02 .02 .03 -.0825 .06 0 .052; C -.0825 .03 0 -.0825 .069 0 .055"),
    ("-.0825 .384 0", "1 -1 0 0", 1.225946, "-.011953 .041065 -.038437",
     ".035549 .029474 .008627 -.002117 -.004037 .000229", "-2.8973 2.8973",
     "C 0 0 -.22 0 .01 -.15 .054; C 0 .03 -.16 0 .075 -.02 .05; y 0 .05 0 0 .128 0 .05"),
    ("0 0 0", "1 1 0 0", 1.666555, ".060149 -.014117 -.010517",
     ".001964 .004354 .005433 .000109 -.001158 .000341", "-.0175 3.7525",
     "Y 0 0 -.044 0 0 .056 .05; C .01 .01 .005 .088 .02 .005 .045; Y .088 .0817 0 .088 -.0514 0 .044"),
    (".088 0 0", "1 1 0 0", .735522, ".010517 -.004252 .061597",
     ".012516 .010027 .004815 -.000428 -.001196 -.000741", "-2.8973 2.8973",
     "Y 0 0 .052 0 0 .107 .044; c .02 .02 .08 .055 .055 .08 .025"))
HAND_LOOKS = "B 0 0 .033 .0316 .102 .033; Y 0 0 -.02 0 0 .01 .044"
FINGER_LOOKS = "b 0 .0185 .011 .011 .0075 .01; b 0 .0145 .0270 .00875 .0045 .014"
TCP_IN_HAND = .1034       # m along the hand's z; the hand sits .107 m behind the last joint, turned by -45 deg
SERVO_KP = (1000, 1000, 750, 750, 300, 300, 300)               # N m/rad
ARM_TORQUE = (87, 87, 87, 87, 12, 12, 12)                      # N m, limits of the real joints


def looks_xml(looks):
    """MJCF of visual-only geoms from the compact notation of LINKS."""
    geoms = []
    for part in looks.split(";"):
        kind, *numbers = part.split()
        where = (f'type="box" pos="{" ".join(numbers[:3])}" size="{" ".join(numbers[3:])}"' if kind in "bB" else
                 f'type="{dict(c="capsule", y="cylinder")[kind.lower()]}" '
                 f'fromto="{" ".join(numbers[:6])}" size="{numbers[6]}"')
        geoms.append(f'<geom class="{"white" if kind.isupper() else "dark"}" {where}/>')
    return "".join(geoms)


def panda_xml():
    """MJCF of the arm: seven links, hand and two fingers, all weight compensated. The first 9 joints of every scene."""
    pad = '<geom name="pad_{0}" class="pad" pos="0 .0076 .0452" size=".0088 .0076 .00925"/>'
    finger = ('<body name="{0}" pos="0 0 .0584" quat="{1}" gravcomp="1">'
              '<inertial pos="0 0 0" mass=".015" diaginertia="2.4e-6 2.4e-6 7.5e-7"/>'
              '<joint name="{0}" type="slide" axis="0 1 0" range="-.001 .04" armature=".1" damping="10"/>'
              + looks_xml(FINGER_LOOKS) + pad + "</body>")
    hand = ('<body name="hand" pos="0 0 .107" quat=".9238795 0 0 -.3826834" gravcomp="1">'
            '<inertial pos="-.01 0 .03" mass=".73" diaginertia=".001 .0025 .0017"/>' + looks_xml(HAND_LOOKS)
            + finger.format("left", "1 0 0 0") + finger.format("right", "0 0 0 1") + "</body>")
    arm = hand
    for number, (pos, quat, mass, com, inertia, limits, looks) in reversed(list(enumerate(LINKS, 1))):
        arm = (f'<body name="link{number}" pos="{pos}" quat="{quat}" gravcomp="1">'
               f'<inertial pos="{com}" mass="{mass}" fullinertia="{inertia}"/>'
               f'<joint name="joint{number}" axis="0 0 1" range="{limits}" armature=".1" damping="1"/>'
               f'{looks_xml(looks)}{arm}</body>')
    return '<body name="link0">' + looks_xml("B -.045 0 .035 .09 .08 .035; Y 0 0 0 0 0 .14 .07") + arm + "</body>"


def part(name, **values):
    """MJCF of one colliding geom; numbers and tuples become attribute text."""
    text = {key: " ".join(map(str, value)) if isinstance(value, tuple) else value for key, value in values.items()}
    return f'<geom name="{name}" ' + " ".join(f'{key}="{value}"' for key, value in text.items()) + "/>"


def pick_xml():
    """A free object of two interchangeable parts, and a dish: a floor and eight wall boxes on a ring."""
    walls = ""
    for k in range(8):
        angle = (k + .5) * np.pi / 4
        walls += part(f"dish_wall{k}", type="box", pos=(.062 * np.cos(angle), .062 * np.sin(angle), .01),
                      size=(.004, .0265, .01), euler=(0, 0, angle))
    return ('<body name="object" pos="0 0 .1"><freejoint/>' + part("object0", type="box", size=(.02, .02, .02), condim=4)
            + part("object1", type="box", size=(.01, .01, .01), condim=4) + "</body>"
            '<body name="dish" mocap="true">' + part("dish_floor", type="cylinder", size=(.062, .004), pos=(0, 0, .004))
            + walls + "</body>")


def push_xml():
    """Three free cubes."""
    return "".join(f'<body name="cube{k}" pos="0 {k} .1"><freejoint/>'
                   + part(f"cube{k}", type="box", size=(.028, .028, .028)) + "</body>" for k in range(3))


def drawer_xml():
    """A cabinet that is open towards +y, and a drawer with a handle plate on two pegs.

    The plate stands .065 m off the front: the open gripper needs .055 m on either side of it."""
    def panel(name, pos, size):
        return part(name, type="box", pos=pos, size=size, contype=2, conaffinity=0)
    return ('<body name="cabinet" mocap="true">'
            + panel("cabinet_top", (0, 0, .106), (.100, .100, .004)) + panel("cabinet_base", (0, 0, .004), (.100, .100, .004))
            + panel("cabinet_left", (-.096, 0, .055), (.004, .100, .047)) + panel("cabinet_right", (.096, 0, .055), (.004, .100, .047))
            + panel("cabinet_back", (0, -.096, .055), (.092, .004, .047))
            + '<body name="drawer" pos="0 .100 .055">'
            '<joint name="drawer" type="slide" axis="0 1 0" range="0 .2" armature=".05" damping="5" frictionloss="1"/>'
            + panel("drawer_front", (0, 0, 0), (.090, .005, .045)) + panel("drawer_floor", (0, -.098, -.040), (.086, .093, .004))
            + panel("drawer_left", (-.086, -.098, -.015), (.004, .093, .028))
            + panel("drawer_right", (.086, -.098, -.015), (.004, .093, .028))
            + panel("handle_peg0", (-.030, .032, 0), (.004, .032, .004)) + panel("handle_peg1", (.030, .032, 0), (.004, .032, .004))
            + panel("handle", (0, .066, 0), (.045, .005, .018)) + "</body></body>")


SCENES = {
    "pick": (pick_xml, '<contact name="touch_left" geom1="pad_left" body2="object" num="1" data="force" reduce="netforce"/>'
             '<contact name="touch_right" geom1="pad_right" body2="object" num="1" data="force" reduce="netforce"/>'),
    "push": (push_xml, "".join(f'<contact name="touch{k}" subtree1="hand" body2="cube{k}" num="1" data="found"/>'
                               for k in range(3))),
    "drawer": (drawer_xml, '<contact name="touch" subtree1="hand" body2="drawer" num="1" data="found"/>')}


def scene_xml(scene, image_size):
    """Complete MJCF of the scene `pick`, `push` or `drawer`.

    quads 1, slices 6, stacks 3, no multi-sampling, no shadow maps: software GL pays for triangles, not for pixels
    (a frame of 64 px takes 0.3 ms, with MuJoCo's default qualities more than 10 times as long)."""
    bodies, sensors = SCENES[scene]
    marks = dict(wood=("flat", ".82 .72 .62", .25, 64), slate=("flat", ".55 .62 .62", .12, 48),
                 dots=("flat", ".55 .55 .55", .03, 24), tiles=("checker", ".75 .75 .75", 0, 16),
                 crosses=("flat", ".5 .5 .5", 0, 32), plain=("flat", "1 1 1", 0, 8))
    assets = ""
    for name, (builtin, rgb, density, size) in marks.items():
        mark = "random" if density else ("cross" if name == "crosses" else "none")
        assets += (f'<texture name="{name}" type="2d" builtin="{builtin}" rgb1="1 1 1" rgb2="{rgb}" mark="{mark}" '
                   f'markrgb="{rgb}" random="{density}" width="{size}" height="{size}"/>'
                   f'<material name="{name}" texture="{name}" texrepeat="6 6" specular="0" shininess="0"/>')
    clutter = "".join(f'<geom name="clutter{k}" class="scenery" pos="{pos}" size="{size}" rgba="{rgb} 1"/>' for k, (pos, size, rgb)
                      in enumerate((("-.25 .45 .15", ".08 .10 .15", ".20 .22 .30"), ("-.35 -.35 .22", ".10 .08 .22", ".25 .18 .15"),
                                    ("-.02 -.42 .05", ".06 .05 .05", ".35 .30 .10"), (".10 .46 .001", ".16 .12 .001", ".08 .45 .20"))))
    servos = "".join(f'<position name="servo{k}" joint="joint{k}" kp="{kp}" kv="{.05 * kp}" forcerange="-{force} {force}"/>'
                     for k, (kp, force) in enumerate(zip(SERVO_KP, ARM_TORQUE), 1))
    servos += "".join(f'<position name="servo_{side}" joint="{side}" kp="1000" kv="100" forcerange="-40 40"/>'
                      for side in ("left", "right"))
    return f"""<mujoco model="panda_{scene}">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{PHYSICS_DT}" integrator="implicitfast" cone="elliptic" impratio="10"><flag midphase="disable"/></option>
  <visual><global offwidth="{max(image_size, 8)}" offheight="{max(image_size, 8)}"/><map znear=".05" zfar="8"/>
    <quality shadowsize="0" offsamples="0" numquads="1" numslices="6" numstacks="3"/>
    <headlight active="0"/></visual>
  <statistic extent="1" center="0.4 0 0.2"/>
  <default>
    <default class="white"><geom contype="0" conaffinity="0" mass="0" group="1" rgba=".95 .95 .95 1"/></default>
    <default class="dark"><geom contype="0" conaffinity="0" mass="0" group="1" rgba=".18 .18 .20 1"/></default>
    <default class="scenery"><geom type="box" contype="0" conaffinity="0" mass="0"/></default>
    <default class="pad"><geom type="box" conaffinity="3" mass="0" condim="4" friction="1 .005 .0001" solref=".01 1"
      solimp=".95 .99 .001" rgba=".25 .25 .27 1"/></default>
  </default>
  <asset>{assets}</asset>
  <worldbody>
    <light name="light" type="directional" pos="0 0 2" dir="0 0 -1" castshadow="false" specular="0 0 0"/>
    <camera name="front" pos="1 0 .6"/>
    <geom name="table" type="box" pos=".35 0 -.02" size=".55 .60 .02" material="wood" friction=".6 .005 .0001"/>
    <geom name="wall" class="scenery" pos="-.60 0 .4" size=".01 1.6 1.2"/>
    {clutter}{panda_xml()}{bodies()}
  </worldbody>
  <actuator>{servos}</actuator>
  <sensor>{sensors}</sensor>
</mujoco>"""

# ---------------------------------------------------------------------------------------------- kinematics and control

# Fixed part of each joint's frame: translation [m] and quarter turns about x, read off LINKS.
JOINT_OFFSET = np.array([[float(x) for x in link[0].split()] for link in LINKS])
JOINT_TILT = np.array([np.pi / 2 * float(link[1].split()[1]) for link in LINKS])
JOINT_RANGE = np.array([[float(x) for x in link[5].split()] for link in LINKS]).T      # (2, 7)


def rotation(axis, angle):
    """(..., 3, 3) rotation matrices about x, y or z (axis 0, 1, 2) by angle (...) [rad]."""
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.zeros(np.shape(angle) + (3, 3))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[..., axis, axis] = 1
    matrix[..., i, i], matrix[..., i, j] = c, -s
    matrix[..., j, i], matrix[..., j, j] = s, c
    return matrix


TILT = rotation(0, JOINT_TILT)                                 # (7, 3, 3)
TOOL = rotation(2, np.array(-np.pi / 4))                       # (3, 3)


def forward_kinematics(q):
    """TCP position (N, 3) [m], rotation (N, 3, 3) and Jacobian (N, 6, 7) for joint angles q (N, 7) [rad].

    Jacobian rows: linear then angular velocity of the TCP in the base frame, per rad/s of each joint."""
    local = TILT @ rotation(2, q)                              # (N, 7, 3, 3) each joint's frame in the one before
    position, frame = np.zeros((len(q), 3)), np.tile(np.eye(3), (len(q), 1, 1))
    origins, axes = np.empty((2, len(q), 7, 3))
    for k in range(7):
        position = position + frame @ JOINT_OFFSET[k]
        frame = frame @ local[:, k]
        origins[:, k], axes[:, k] = position, frame[:, :, 2]
    frame = frame @ TOOL
    position = position + frame[:, :, 2] * (.107 + TCP_IN_HAND)
    arm = position[:, None] - origins                          # (N, 7, 3)
    linear = axes[..., [1, 2, 0]] * arm[..., [2, 0, 1]] - axes[..., [2, 0, 1]] * arm[..., [1, 2, 0]]   # axis x arm
    return position, frame, np.concatenate([linear, axes], -1).swapaxes(1, 2)


def inverse_kinematics(q, position, frame, iterations=3, damping=.02, posture=.05, max_step=.25):
    """Joint angles (N, 7) that bring the TCP to position (N, 3), frame (N, 3, 3), starting from q (N, 7).

    Damped least squares with a pull towards HOME in the null space:
        dq = J+ e + (I - J+ J) posture (HOME - q),    J+ = J^T (J J^T + damping^2 I)^-1
    Three iterations leave 0.01 mm of a 3 cm step."""
    for _ in range(iterations):
        now, turn, jacobian = forward_kinematics(q)
        relative = frame @ turn.swapaxes(1, 2)
        skew = (relative - relative.swapaxes(1, 2)) / 2        # sin(angle) * axis; exact enough near the solution
        error = np.concatenate([position - now, skew[:, [2, 0, 1], [1, 2, 0]]], 1)[..., None]     # (N, 6, 1)
        pull = (posture * (HOME - q))[..., None]
        transposed = jacobian.swapaxes(1, 2)
        wanted = error - jacobian @ pull                       # J+ e + pull - J+ J pull
        dq = transposed @ np.linalg.solve(jacobian @ transposed + damping ** 2 * np.eye(6), wanted) + pull
        q = np.clip(q + np.clip(dq[..., 0], -max_step, max_step), JOINT_RANGE[0] + .01, JOINT_RANGE[1] - .01)
    return q


def euler_of(frame):
    """Roll, pitch, yaw (N, 3) [rad] of R = Rz(yaw) Ry(pitch) Rx(roll), frame (N, 3, 3)."""
    return np.stack([np.arctan2(frame[:, 2, 1], frame[:, 2, 2]),
                     -np.arcsin(np.clip(frame[:, 2, 0], -1, 1)),
                     np.arctan2(frame[:, 1, 0], frame[:, 0, 0])], 1)

# ---------------------------------------------------------------------------------------------- rendering


GL_CONTEXT = {}           # process id: context. One for all environments of a process: an MjrContext that is garbage
                          # collected while another context is current would delete that one's textures


def open_gl():
    """Make this process's off-screen OpenGL context current, creating it if need be. RuntimeError: what to install."""
    try:
        if os.getpid() not in GL_CONTEXT:                      # a forked child must not use its parent's context
            GL_CONTEXT[os.getpid()] = mujoco.GLContext(8, 8)   # pictures are drawn into MuJoCo's own frame buffers
        GL_CONTEXT[os.getpid()].make_current()
    except Exception as error:     # every backend fails in its own way: ImportError, AttributeError, FatalError ...
        raise RuntimeError(
            f"No off-screen OpenGL: MUJOCO_GL={os.environ.get('MUJOCO_GL', '(unset)')} failed with "
            f"{type(error).__name__}: {error}. Debian/Ubuntu: apt-get install libegl1 libgl1 (or libosmesa6), then start "
            "Python with MUJOCO_GL=egl (or osmesa); in a container with an NVIDIA GPU also set "
            "NVIDIA_DRIVER_CAPABILITIES=all; macOS and Windows: unset MUJOCO_GL. Without pictures: image_size=0.") from error


def gl_renderer_name():
    """Name of the current OpenGL renderer; warns when it is a software one on a machine with an NVIDIA GPU."""
    try:
        from OpenGL import GL
        name = GL.glGetString(GL.GL_RENDERER).decode()
    except Exception:              # PyOpenGL is absent or bound to another backend: the name is for people only
        return "unknown"
    if any(soft in name.lower() for soft in ("llvmpipe", "softpipe", "swrast")) and os.path.exists("/dev/nvidia0"):
        warnings.warn(f"rendering on the CPU ({name}) although this machine has an NVIDIA GPU; see MUJOCO_GL=egl, "
                      "NVIDIA_DRIVER_CAPABILITIES=all and /usr/share/glvnd/egl_vendor.d/10_nvidia.json", stacklevel=2)
    return name


EXPANDED = ("geom_type", "geom_size", "geom_pos", "geom_quat", "geom_rgba", "geom_matid", "geom_friction", "geom_contype",
            "geom_conaffinity", "body_mass", "body_inertia", "dof_damping", "dof_frictionloss", "jnt_range",
            "actuator_gainprm", "actuator_biasprm", "actuator_forcerange", "cam_pos", "cam_quat", "cam_fovy",
            "light_dir", "light_ambient", "light_diffuse")


class Scene:
    """One compiled MJCF and a Batch of it; row i of every array belongs to environment i.

    All environments share the structure; colours, sizes, masses, gains and cameras are per environment (`field`)."""

    def __init__(self, name, num_envs, image_size):
        self.name, self.size = name, image_size
        self.model = mujoco.MjModel.from_xml_string(scene_xml(name, image_size))
        self.batch = Batch(self.model, num_envs, nthread=1)    # one thread: processes scale better on small machines
        self.qpos, self.qvel, self.ctrl, self.mocap_pos, self.sensor = map(
            self.batch.bind, ("qpos", "qvel", "ctrl", "mocap_pos", "sensordata"))
        self.field = {name: self.batch.expand(name) for name in EXPANDED}
        self.default = {name: getattr(self.model, name).copy() for name in EXPANDED}
        self.context = None
        if image_size:
            self.models = [None] * num_envs                    # what environment i looks like, refreshed at its reset
            self.data = mujoco.MjData(self.model)
            self.view, self.option, self.camera = mujoco.MjvScene(self.model, maxgeom=200), mujoco.MjvOption(), mujoco.MjvCamera()
            self.camera.type, self.camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
            self.view.flags[:] = 0                             # no shadow, reflection, skybox, haze ...
            self.view.flags[mujoco.mjtRndFlag.mjRND_CULL_FACE] = 1     # without it every face is drawn twice
            self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_50)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
            self.rect = mujoco.MjrRect(0, 0, image_size, image_size)

    def set_geom(self, i, name, **values):
        """Write geom_<field> of one geom of environment i."""
        geom = self.model.geom(name).id
        for field, value in values.items():
            self.field["geom_" + field][i, geom] = value

    def set_gain(self, i, actuator, stiffness, damping, force):
        """A position servo: torque = stiffness (ctrl - q) - damping dq/dt, limited to +- force."""
        self.field["actuator_gainprm"][i, actuator, 0] = stiffness
        self.field["actuator_biasprm"][i, actuator, 1:3] = -stiffness, -damping
        self.field["actuator_forcerange"][i, actuator] = -force, force

    def finish_reset(self, i):
        """Derived constants of environment i, contacts at the start, and the model that its pictures are made from."""
        self.batch.set_const([i])
        self.batch.forward([i])
        if self.size:
            self.models[i] = self.batch.get_model(i, self.models[i])

    def render(self, i, shadow, shadow_side):
        """Picture (H, W, 3) of environment i; shadow = opacity of the discs under loose bodies and hand."""
        model, data = self.models[i], self.batch.get_data(i, self.data)
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        mujoco.mjv_updateScene(model, data, self.option, None, self.camera, mujoco.mjtCatBit.mjCAT_ALL, self.view)
        if shadow:
            bodies = [b for b in range(model.nbody) if model.body_dofnum[b] == 6] + [model.body("hand").id]
            for body in bodies:
                x, y, z = data.xpos[body] - (0, 0, TCP_IN_HAND * (body == bodies[-1]))
                geom = self.view.geoms[self.view.ngeom]
                mujoco.mjv_initGeom(geom, CAN, np.array([.028, .028, .0004]), np.array([x, y - shadow_side * z, .001]),
                                    np.eye(3).ravel(), np.array([0, 0, 0, shadow], np.float32))
                self.view.ngeom += 1
        mujoco.mjr_render(self.rect, self.view, self.context)
        image = np.empty((self.size, self.size, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, self.rect, self.context)
        return image[::-1]                                     # OpenGL's first row is the bottom one

# ---------------------------------------------------------------------------------------------- what an episode draws


@dataclasses.dataclass
class Episode:
    """Everything random about one episode that is not stored in the simulation itself."""
    number: int                     # which episode of the seed
    task: str
    instruction: str
    named: int                      # push-cube: which cube is named
    shape: str                      # pick-place: the object's shape
    rest: float                     # m; height of the object's origin when it lies on the table
    yaw: float                      # rad; of the object or cabinet at the start
    stroke: float                   # m; drawer travel
    look: dict                      # what the picture needs: shadow, side, lut, noise, blur, stale
    rng: np.random.Generator        # for whoever acts in this episode (operators), never used by the environment


def uniform(rng, low_high, size=None):
    return rng.uniform(low_high[0], low_high[1], size)


def choice(rng, options):
    return options[rng.integers(len(options))]


def start_xy(rng, area, unseen):
    """A start position (2,) [m] in the area, or in the band of UNSEEN_BAND around it."""
    if not unseen:
        return rng.uniform(*area)
    low, high = area[0] - UNSEEN_BAND, area[1] + UNSEEN_BAND
    while True:
        xy = rng.uniform(low, high)
        if ((xy < area[0]) | (xy > area[1])).any():
            return xy


def camera_pose(azimuth, elevation, distance, look_at):
    """Position (3,) and quaternion (4,) of a camera that orbits look_at; angles in degrees, no roll."""
    a, e = np.radians(azimuth), np.radians(elevation)
    cos_a, sin_a, cos_e, sin_e = np.cos(a), np.sin(a), np.cos(e), np.sin(e)
    axes = np.array([[-sin_a, -sin_e * cos_a, cos_e * cos_a],  # columns: right, up, backward
                     [cos_a, -sin_e * sin_a, cos_e * sin_a], [0, cos_e, sin_e]])
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, axes.ravel())
    return look_at + distance * axes[:, 2], quat


def draw_camera(rng, visual, keep_away):
    """Camera position, quaternion and fovy [deg]; further than CAMERA_CLEARANCE from the poses in keep_away."""
    while True:
        look_at = LOOK_AT + uniform(rng, visual.look_at_shift, 3)
        position, quat = camera_pose(uniform(rng, visual.camera_azimuth), uniform(rng, visual.camera_elevation),
                                     uniform(rng, visual.camera_distance), look_at)
        if all(np.linalg.norm(position - other) > CAMERA_CLEARANCE for other in keep_away):
            return position, quat, uniform(rng, visual.camera_fovy)


def middle(low_high):
    return sum(low_high) / 2


FIXED_CAMERAS = [camera_pose(middle(v.camera_azimuth), middle(v.camera_elevation), middle(v.camera_distance),
                             LOOK_AT + middle(v.look_at_shift))[0] for v in (SIM.visual, REAL.visual)]


def draw_image_processing(rng, visual, horizon):
    """The camera's own part of the picture: tone curve, noise, and which frames repeat the one before."""
    x = np.arange(256) / 255
    gain, tint, gamma = (uniform(rng, r) for r in (visual.gain, visual.tint, visual.gamma))
    curve = [np.clip(255 * gain * (1 + sign * tint) * x ** gamma, 0, 255).round().astype(np.uint8) for sign in (1, 0, -1)]
    plain = gain == gamma == 1 and tint == 0
    return dict(shadow=uniform(rng, visual.shadow), side=uniform(rng, visual.light_side),
                lut=None if plain else np.stack(curve),        # (3, 256)
                noise=visual.noise, blur=visual.blur, seed=int(rng.integers(2 ** 31)),
                stale=rng.random(horizon + 1) < visual.stale)


# Sensor noise of sigma 1, in 1/16: drawn once and cut at random places, since fresh noise costs 10 x a look-up.
NOISE = (16 * np.random.default_rng(0).standard_normal(1 << 20)).astype(np.int16)


def process_image(image, look, step):
    """Tone curve, blur and sensor noise of one frame (H, W, 3) uint8; the noise depends on episode and step only."""
    if look["lut"] is not None:
        image = look["lut"].ravel().take(image + np.array([0, 256, 512], np.uint16))    # one curve a channel
    if look["blur"]:                                           # rows, then columns, with 1/4 1/2 1/4
        wide = image.astype(np.uint16)
        wide[1:-1] = wide[:-2] + 2 * wide[1:-1] + wide[2:] + 2 >> 2
        wide[:, 1:-1] = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:] + 2 >> 2
        image = wide.astype(np.uint8)
    if look["noise"]:
        start = (look["seed"] + 7919 * step) % (len(NOISE) - image.size)
        noise = (look["noise"] * NOISE[start:start + image.size] >> 4).reshape(image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return image

# ---------------------------------------------------------------------------------------------- the environments


class VecEnv:
    """N environments of one task (or of `all`), stepped together; each restarts by itself when its episode ends.

    Args:
        task: one of TASKS, or "all": every episode draws its task.
        domain: "sim", "real" (the stand-in), "pretrain", or a Domain of your own.
        num_envs: N.   seed: which sequence of episodes.   image_size: pixels (H = W); 0 = no pictures, no OpenGL.
        variant: "seen", "unseen-objects" (held-out shapes and colours) or "unseen-states" (held-out start positions).
        gap: which parts of `real` differ from `sim`, out of "visual", "dynamics", "objects".
        reward: "events" = .2 first touch or grasp, 1 first success, -.4 success lost again, each once an episode;
            "dense" = mean of the four terms in info["reward_terms"], in [0, 1] each step.
        run_to_horizon: True = success and failure do not end the episode (only then can a success be lost).
        paraphrase: True = draw the instruction from INSTRUCTION and PARAPHRASES; `pretrain` uses PARAPHRASES only.
        first_episode, episode_stride: this process runs episodes first, first + stride, ... of the seed.
    """

    def __init__(self, task, domain="sim", num_envs=1, seed=0, image_size=64, variant="seen", reward="events",
                 gap=("visual", "dynamics", "objects"), run_to_horizon=False, paraphrase=False,
                 first_episode=0, episode_stride=1):
        problems = [f"{name}={got!r} is unknown; choose from {', '.join(known)}" for name, got, known in (
            ("task", task, TASKS + ("all",)), ("domain", domain, DOMAINS), ("variant", variant, VARIANTS),
            ("reward", reward, ("events", "dense"))) if got not in known and not isinstance(got, Domain)]
        problems += [f"gap={part!r} is unknown; choose from visual, dynamics, objects" for part in gap
                     if part not in ("visual", "dynamics", "objects")]
        problems += [f"{name}={got!r}: need a whole number from {low} to {high}" for name, got, low, high in (
            ("num_envs", num_envs, 1, 4096), ("seed", seed, 0, 2 ** 32 - 1), ("image_size", image_size, 0, 512),
            ("first_episode", first_episode, 0, 2 ** 32), ("episode_stride", episode_stride, 1, 2 ** 32))
            if not isinstance(got, (int, np.integer)) or not low <= got <= high]
        if problems:
            raise ValueError("VecEnv: " + "; ".join(problems))
        self.tasks, self.num_envs, self.seed, self.image_size = (TASKS if task == "all" else (task,)), num_envs, seed, image_size
        self.unseen, self.dense, self.run_to_horizon = variant, reward == "dense", run_to_horizon
        self.first, self.stride = first_episode, episode_stride
        self.domain_id = DOMAINS.index(domain) if domain in DOMAINS else len(DOMAINS)
        self.domain = domain if isinstance(domain, Domain) else (SIM, REAL, PRETRAIN)[self.domain_id]
        if domain == "real":
            self.domain = dataclasses.replace(SIM, **{part: getattr(REAL, part) for part in gap})
        self.wordings = {t: (INSTRUCTION[t],) * (domain != "pretrain") + PARAPHRASES[t] * (paraphrase or domain == "pretrain")
                         for t in TASKS}
        if image_size:
            open_gl()
        self.renderer = gl_renderer_name() if image_size else "none"
        self.scenes = {name: Scene(name, num_envs, image_size) for name in sorted({SCENE_OF[t] for t in self.tasks})}
        self.seconds = dict(physics=0., gl=0.)                 # spent in mj_step and in OpenGL since the start
        n = num_envs
        self.episodes = [None] * n
        self.scene_of = np.empty(n, object)                    # name of the scene that environment i is in
        self.steps, self.latency = np.zeros((2, n), int)       # control steps so far; delay in blocks of 25 ms
        self.target, self.target_frame = np.zeros((n, 3)), np.tile(np.eye(3), (n, 1, 1))     # controller's target pose
        self.q_new, self.q_old, self.q_older = np.zeros((3, n, 7))     # joint set-points at the ends of three steps
        self.grip_new, self.grip_old = np.zeros((2, n))        # finger set-points, m
        self.scale = np.ones(n)
        self.tcp, self.object, self.goal = np.zeros((3, n, 3))         # measured positions, m: see landmarks()
        self.frame, self.fingers, self.finger_speed = np.zeros((n, 3, 3)), np.zeros(n), np.zeros(n)
        self.start, self.object_yaw = np.zeros((n, 3, 3)), np.zeros(n)     # loose bodies at the start; yaw now
        self.touched, self.succeeded, self.lost, self.diverged = np.zeros((4, n), bool)
        self.start_distance = np.ones(n)
        self.last_image = np.zeros((n, image_size, image_size, 3), np.uint8)

    # -- episodes

    def reset(self):
        """Start over with episode first_episode in environment 0. Returns the observation, see observe()."""
        self.next_episode = self.first
        self.begin_episodes(np.arange(self.num_envs))
        return self.observe(np.arange(self.num_envs))

    def begin_episodes(self, ids):
        """Put environments ids into their next scenes; no other environment is touched."""
        self.start_robots(ids, [self.arrange(i) for i in ids])
        for i in ids:
            self.scenes[self.scene_of[i]].finish_reset(i)
        self.read(ids)
        self.start_distance[ids] = np.maximum(np.linalg.norm((self.object - self.goal)[ids], axis=1), 1e-3)

    def arrange(self, i):
        """Draw the next episode of environment i and write its scene; returns the random stream of its dynamics."""
        number, self.next_episode = self.next_episode, self.next_episode + self.stride
        layout, things, looks, moves, acting = (np.random.default_rng([self.seed, self.domain_id, number, stream])
                                                for stream in range(5))    # one stream a part: gap parts are independent
        task = choice(layout, self.tasks)
        scene = self.scenes[SCENE_OF[task]]
        scene.batch.reset([i], stage=0)
        for name, default in scene.default.items():
            scene.field[name][i] = default
        episode = Episode(number, task, choice(things, self.wordings[task]), 0, "", .028, 0., .2, {}, acting)
        self.episodes[i], self.scene_of[i], self.steps[i] = episode, scene.name, 0
        self.touched[i] = self.succeeded[i] = self.lost[i] = self.diverged[i] = False
        self.apply_dynamics(scene, i, moves)
        dict(pick=self.place_pick, push=self.place_push, drawer=self.place_drawer)[scene.name](scene, i, layout, things)
        episode.look = self.apply_looks(scene, i, looks)
        return moves

    def place_pick(self, scene, i, layout, things):
        """An object of random shape, colour and yaw, and the dish."""
        o, episode, unseen = self.domain.objects, self.episodes[i], self.unseen == "unseen-states"
        episode.shape = choice(things, o.unseen_shapes if self.unseen == "unseen-objects" else o.shapes)
        scale, colours = uniform(things, o.scale), (choice(things, o.colours), choice(things, o.accents))
        low, wide = 0, .02
        for k in range(2):
            if k >= len(SHAPES[episode.shape]):                # this shape has one part only: the other slot is off
                scene.set_geom(i, f"object{k}", rgba=0, contype=0, conaffinity=0)
                continue
            kind, size, centre, colour = SHAPES[episode.shape][k]
            size, centre = scale * np.array(size), scale * np.array(centre)
            scene.set_geom(i, f"object{k}", type=kind, size=size, pos=centre, rgba=(*colours[colour], 1),
                           quat=ROD_ALONG_X if kind == ROD else (1, 0, 0, 0))
            low = min(low, centre[2] - size[{CAN: 1, BALL: 0, ROD: 0}.get(kind, 2)])
            wide = max(wide, size[0])
        body, mass = scene.model.body("object").id, uniform(things, self.domain.dynamics.object_mass)
        scene.field["body_mass"][i, body], scene.field["body_inertia"][i, body] = mass, .5 * mass * wide ** 2
        friction = uniform(things, self.domain.dynamics.object_friction)
        for k in range(2):
            scene.set_geom(i, f"object{k}", friction=(friction, .005, .0005))
        scene.set_geom(i, "dish_floor", rgba=(*choice(things, o.dish), 1))
        wall, rgba = uniform(things, o.dish_wall), scene.field["geom_rgba"][i, scene.model.geom("dish_floor").id]
        for k in range(8):
            x, y, _ = scene.default["geom_pos"][scene.model.geom(f"dish_wall{k}").id]
            scene.set_geom(i, f"dish_wall{k}", size=(.004, .0265, wall), pos=(x, y, wall), rgba=rgba * (.85, .85, .85, 1))
        episode.rest, turned = -low, episode.shape in TURNED
        yaw = layout.uniform(-TURN, TURN) * turned             # a yaw that nobody can see would only confuse a policy
        xy = dish = np.zeros(2)
        while np.linalg.norm(xy - dish) < PICK_START:
            xy, dish = start_xy(layout, START_AREA["object"], unseen), start_xy(layout, START_AREA["dish"], unseen)
        scene.qpos[i, 9:16] = *xy, episode.rest, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)
        scene.mocap_pos[i, 0] = *dish, 0

    def place_push(self, scene, i, layout, things):
        """Three cubes of different colours in three lanes; the instruction names one."""
        o, episode = self.domain.objects, self.episodes[i]
        cubes = o.unseen_cubes if self.unseen == "unseen-objects" else o.cubes
        colours = [cubes[k] for k in things.permutation(len(cubes))[:3]]
        episode.named = int(layout.integers(3))
        episode.instruction = episode.instruction.format(colour=colours[episode.named][0])
        mass, friction = (uniform(things, r) for r in (self.domain.dynamics.object_mass, self.domain.dynamics.object_friction))
        for k in range(3):
            body = scene.model.body(f"cube{k}").id
            scene.set_geom(i, f"cube{k}", rgba=(*colours[k][1], 1), friction=(.6 * friction, .005, .0001))
            scene.field["body_mass"][i, body], scene.field["body_inertia"][i, body] = mass, mass * .056 ** 2 / 6
            yaw, (x, y) = layout.uniform(-TURN, TURN) / 2, start_xy(layout, START_AREA["cube"], self.unseen == "unseen-states")
            scene.qpos[i, 9 + 7 * k:16 + 7 * k] = x, CUBE_Y[k] + y, .028, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)

    def place_drawer(self, scene, i, layout, things):
        """The cabinet at the robot's right; its drawer slides along y."""
        o, episode = self.domain.objects, self.episodes[i]
        scene.mocap_pos[i, 0] = *start_xy(layout, START_AREA["cabinet"], self.unseen == "unseen-states"), 0
        body, plate, scale = choice(things, o.cabinet), choice(things, o.handle), uniform(things, o.handle_scale)
        if self.unseen == "unseen-objects":                    # another paint and a smaller handle
            body, plate, scale = body[::-1] * np.array([.5, .8, 1.]), (.75, .12, .10), .75 * scale
        for geom in range(scene.model.ngeom):
            if scene.model.geom(geom).name.startswith(("cabinet", "drawer")):
                scene.field["geom_rgba"][i, geom] = *np.multiply(body, .9 if "floor" in scene.model.geom(geom).name else 1), 1
        for name in ("handle", "handle_peg0", "handle_peg1"):
            scene.set_geom(i, name, rgba=(*plate, 1))
        scene.set_geom(i, "handle", size=np.array([.045, .005, .018]) * (scale, 1, scale))
        episode.stroke = uniform(things, o.stroke)
        scene.field["jnt_range"][i, 9] = 0, episode.stroke
        scene.qpos[i, 9] = layout.uniform(*CLOSE_START) if episode.task == "close-drawer" else 0

    def apply_looks(self, scene, i, rng):
        """Surroundings, light and camera of environment i; returns what process_image needs."""
        v = self.domain.visual
        texture, table, wall, robot = (choice(rng, options) for options in (v.textures, v.table, v.wall, v.robot))
        material = scene.model.material(texture).id
        scene.set_geom(i, "table", matid=material, rgba=(*table, 1))
        scene.set_geom(i, "wall", rgba=(*wall, 1))
        white = scene.default["geom_rgba"][:, 0] == np.float32(.95)
        scene.field["geom_rgba"][i, white & (scene.model.geom_group == 1)] = *robot, 1
        if rng.random() >= v.clutter:
            for k in range(4):
                scene.set_geom(i, f"clutter{k}", rgba=0)       # alpha 0 is not drawn at all
        side = uniform(rng, v.light_side)
        scene.field["light_dir"][i, 0] = np.array([-.25, -side, -1]) / np.linalg.norm([-.25, -side, -1])
        scene.field["light_ambient"][i, 0], scene.field["light_diffuse"][i, 0] = uniform(rng, v.ambient), uniform(rng, v.diffuse)
        near = FIXED_CAMERAS if self.domain is PRETRAIN else []
        scene.field["cam_pos"][i, 0], scene.field["cam_quat"][i, 0], scene.field["cam_fovy"][i, 0] = draw_camera(rng, v, near)
        return dict(draw_image_processing(rng, v, max(HORIZON.values())), side=side)

    def apply_dynamics(self, scene, i, rng):
        """Servo gains, delay and tracking of environment i."""
        d = self.domain.dynamics
        stiffness, damping = uniform(rng, d.servo_stiffness), uniform(rng, d.servo_damping)
        for joint in range(7):
            kp = stiffness * SERVO_KP[joint]
            scene.set_gain(i, joint, kp, damping * kp, ARM_TORQUE[joint])
        gripper, force = uniform(rng, d.gripper_damping), uniform(rng, d.gripper_force)
        for finger in (7, 8):
            scene.set_gain(i, finger, 1000., gripper, force)
        self.scale[i] = uniform(rng, d.action_scale)
        self.latency[i] = round(uniform(rng, d.latency) / (BLOCK_STEPS * PHYSICS_DT))
        if scene.name == "drawer":
            scene.field["dof_frictionloss"][i, 9] = uniform(rng, d.drawer_friction)
            scene.field["dof_damping"][i, 9] = uniform(rng, d.drawer_damping)

    def start_robots(self, ids, rngs):
        """The arms near HOME, grippers open, controller target = where the tool really is."""
        shift = self.domain.dynamics.start_tcp + (UNSEEN_BAND if self.unseen == "unseen-states" else 0.)
        joints, move = np.array([(rng.uniform(-1, 1, 7), np.r_[rng.uniform(-1, 1, 3), np.zeros(4)]) for rng in rngs]).swapaxes(0, 1)
        q = HOME + self.domain.dynamics.start_joints * joints
        tcp, frame, _ = forward_kinematics(q)
        q = inverse_kinematics(q, np.clip(tcp + shift * move[:, :3], *WORKSPACE), frame)
        self.q_new[ids] = self.q_old[ids] = self.q_older[ids] = q
        self.target[ids], self.target_frame[ids], _ = forward_kinematics(q)
        self.grip_new[ids] = self.grip_old[ids] = FINGER_OPEN
        start = np.concatenate([q, np.full((len(ids), 2), FINGER_OPEN)], 1)
        for i, joints in zip(ids, start):
            scene = self.scenes[self.scene_of[i]]
            scene.qpos[i, :9] = scene.ctrl[i] = joints

    # -- one step

    def step(self, actions):
        """Run chunks of actions (N, K, 7), see the header. An environment that ends inside a chunk skips the rest of it.

        Returns obs (see observe; already of the next episode where one ended), reward (N,) float32 summed over the chunk,
        terminated (N,) bool = success or failure, truncated (N,) bool = time limit or diverged simulation, never both,
        and info: success (N,) at any time in this episode, failure, touched, diverged (N,) bool, clipped (N,) how many
        actions exceeded ACTION_LIMIT, episode, length (N,) int, reward_terms {name: (N,)}, ended (M,) the environments
        whose episode ended, final_obs their last observation (M rows) or None.
        ValueError names every environment with a non-finite action, or the wrong shape."""
        actions = self.check_actions(actions)
        n = self.num_envs
        reward, terms = np.zeros(n), collections.defaultdict(lambda: np.zeros(n))
        terminated, truncated, failure = np.zeros((3, n), bool)
        clipped = np.zeros(n, int)
        for action in actions.swapaxes(0, 1):                  # (N, 7)
            ids = np.flatnonzero(~(terminated | truncated))
            if not len(ids):
                break
            bounded = np.clip(action[ids], -ACTION_LIMIT, ACTION_LIMIT)
            clipped[ids] += (np.abs(action[ids]) > ACTION_LIMIT + 1e-6).any(1)
            self.advance(ids, bounded)
            self.steps[ids] += 1
            self.read(ids)
            reward[ids] += self.judge(ids, failure, terms)
            if not self.run_to_horizon:
                terminated[ids] = (self.succeeded | failure)[ids] & ~self.diverged[ids]
            late = self.steps[ids] >= [HORIZON[self.episodes[i].task] for i in ids]
            truncated[ids] = (late | self.diverged[ids]) & ~terminated[ids]
        ended = np.flatnonzero(terminated | truncated)
        info = dict(success=self.succeeded.copy(), failure=failure, touched=self.touched.copy(), clipped=clipped,
                    diverged=self.diverged.copy(), episode=np.array([e.number for e in self.episodes]),
                    length=self.steps.copy(), reward_terms=dict(terms), ended=ended,
                    final_obs=self.observe(ended) if len(ended) else None)
        if len(ended):
            self.begin_episodes(ended)
        return self.observe(np.arange(n)), reward.astype(np.float32), terminated, truncated, info

    def check_actions(self, actions):
        actions = np.asarray(actions, np.float64)
        if actions.ndim != 3 or actions.shape[0] != self.num_envs or actions.shape[1] < 1 or actions.shape[2] != 7:
            raise ValueError(f"actions have shape {actions.shape}, need ({self.num_envs}, K >= 1, 7): environments, "
                             "actions a chunk, (dx dy dz droll dpitch dyaw gripper); for one action use actions[:, None]")
        bad = np.flatnonzero(~np.isfinite(actions).all((1, 2)))
        if len(bad):
            raise ValueError(f"actions of environments {bad.tolist()} are not finite (first: {actions[bad[0]].tolist()}); "
                             "need metres, radians and a gripper in [-1, 1]; check the policy's outputs for nan")
        return actions

    def advance(self, ids, action):
        """0.2 s of simulation: move the target poses, solve for joints, feed the set-points in blocks of 25 ms."""
        delta = action[:, :6] * self.scale[ids, None]
        self.target[ids] = np.clip(self.target[ids] + delta[:, :3], *WORKSPACE)
        turn = rotation(2, delta[:, 5]) @ rotation(1, delta[:, 4]) @ rotation(0, delta[:, 3])
        self.target_frame[ids] = turn @ self.target_frame[ids]
        self.q_older[ids], self.q_old[ids], self.grip_old[ids] = self.q_old[ids], self.q_new[ids], self.grip_new[ids]
        self.q_new[ids] = inverse_kinematics(self.q_old[ids], self.target[ids], self.target_frame[ids])
        self.grip_new[ids] = FINGER_CLOSED + (action[:, 6] + 1) / 2 * (FINGER_OPEN - FINGER_CLOSED)
        groups = [(scene, ids[self.scene_of[ids] == name]) for name, scene in self.scenes.items()]
        groups = [(scene, rows) for scene, rows in groups if len(rows)]
        alarms = [scene.batch.warning[rows, :, 1].sum(1) for scene, rows in groups]
        for block in range(BLOCKS):
            # progress through this step's set-points; negative while the delayed robot still follows the last step's
            s = ((block + 1 - self.latency) / BLOCKS)[:, None]                          # (N, 1)
            q = (self.q_old + np.clip(s, 0, 1) * (self.q_new - self.q_old)
                 + np.clip(-s, 0, 1) * (self.q_older - self.q_old))                     # (N, 7)
            grip = np.where(s > 0, self.grip_new[:, None], self.grip_old[:, None])      # (N, 1)
            for scene, rows in groups:
                scene.ctrl[rows, :7], scene.ctrl[rows, 7:9] = q[rows], grip[rows]
                before = time.perf_counter()
                try:
                    scene.batch.step(rows, nstep=BLOCK_STEPS)
                except SimulationError as error:               # the others ran on
                    self.diverged[error.ids] = True
                self.seconds["physics"] += time.perf_counter() - before
        for (scene, rows), alarm in zip(groups, alarms):       # MuJoCo resets a diverged simulation and counts a warning
            self.diverged[rows] |= scene.batch.warning[rows, :, 1].sum(1) > alarm
            self.diverged[rows] |= ~np.isfinite(scene.batch.state[rows]).all(1)

    def read(self, ids):
        """Measured tool, object and goal of environments ids, from the simulations' state."""
        ids = np.asarray(ids)
        for name, scene in self.scenes.items():
            rows = ids[(self.scene_of[ids] == name) & ~self.diverged[ids]]
            if not len(rows):
                continue
            qpos, fresh = scene.qpos[rows], self.steps[rows] == 0
            self.tcp[rows], self.frame[rows], _ = forward_kinematics(qpos[:, :7])
            self.fingers[rows], self.finger_speed[rows] = qpos[:, 7:9].sum(1), np.abs(scene.qvel[rows, 7:9]).max(1)
            if name == "drawer":
                opens = np.array([self.episodes[i].task == "open-drawer" for i in rows])
                stroke = np.array([self.episodes[i].stroke for i in rows])
                handle = scene.mocap_pos[rows, 0] + (0, .166, .055)
                self.object[rows], self.goal[rows] = handle, handle
                self.object[rows, 1] += qpos[:, 9]
                self.goal[rows, 1] += opens * stroke
                continue
            bodies = qpos[:, 9:].reshape(len(rows), -1, 7)     # loose bodies: xyz, quaternion
            self.start[rows[fresh], :bodies.shape[1]] = bodies[fresh, :, :3]
            named = np.array([self.episodes[i].named for i in rows])
            w, z = bodies[np.arange(len(rows)), named][:, [3, 6]].T
            self.object[rows], self.object_yaw[rows] = bodies[np.arange(len(rows)), named, :3], 2 * np.arctan2(z, w)
            self.goal[rows] = (scene.mocap_pos[rows, 0] if name == "pick" else
                               self.start[rows, named] + (PUSH_DISTANCE + .02, 0, 0))

    def judge(self, ids, failure, terms):
        """Latches and reward (n,) of environments ids after a control step; fills failure (N,) and terms {name: (N,)}."""
        touch, success = np.zeros((2, self.num_envs), bool)
        for name, scene in self.scenes.items():
            rows = ids[(self.scene_of[ids] == name) & ~self.diverged[ids]]
            if not len(rows):
                continue
            sensor = scene.sensor[rows]
            if name == "pick":
                touch[rows] = (np.linalg.norm(sensor.reshape(-1, 2, 3), axis=2) > GRASP_FORCE).all(1)
                rest = np.array([self.episodes[i].rest for i in rows])
                across, height = (self.object - self.goal)[rows, :2], (self.object - self.goal)[rows, 2] - rest
                success[rows] = ((np.linalg.norm(across, axis=1) < PICK_RADIUS) & (height > 0) & (height < PICK_HEIGHT)
                                 & ~(np.abs(sensor) > 0).any(1)
                                 & (np.linalg.norm((self.tcp - self.object)[rows], axis=1) > PICK_CLEAR))
            elif name == "push":
                named = np.array([self.episodes[i].named for i in rows])
                cubes = scene.qpos[rows, 9:].reshape(-1, 3, 7)[..., :3]
                moved = np.linalg.norm((cubes - self.start[rows])[..., :2], axis=2)     # (n, 3)
                wrong = np.where(np.arange(3) == named[:, None], 0, moved).max(1) > PUSH_WRONG
                touch[rows] = sensor[np.arange(len(rows)), named] > 0
                forward = (self.object[rows] - self.start[rows, named])[:, 0]
                success[rows] = (forward > PUSH_DISTANCE) & ~wrong
                failure[rows] |= wrong & ~self.succeeded[rows]
            else:
                touch[rows] = sensor[:, 0] > 0
                opens = np.array([self.episodes[i].task == "open-drawer" for i in rows])
                success[rows] = np.where(opens, scene.qpos[rows, 9] > OPEN_DISTANCE, scene.qpos[rows, 9] < CLOSE_DISTANCE)
        distance = np.linalg.norm(self.object - self.goal, axis=1) / self.start_distance
        now = dict(reach=1 - np.tanh(5 * np.linalg.norm(self.tcp - self.object, axis=1)), touch=touch.astype(float),
                   progress=1 - np.clip(distance, 0, 1), success=success.astype(float))
        for name, value in now.items():
            terms[name][ids] += value[ids]
        event = (REWARD_TOUCH * (touch & ~self.touched) + REWARD_SUCCESS * (success & ~self.succeeded)
                 + REWARD_LOST * (~success & self.succeeded & ~self.lost))
        self.lost[ids] |= (~success & self.succeeded)[ids]
        self.touched[ids] |= touch[ids]
        self.succeeded[ids] |= success[ids]
        return (sum(now.values()) / len(now) if self.dense else event)[ids]

    # -- what is seen

    def observe(self, ids):
        """Observation of environments ids: images (n, H, W, 3) uint8 (absent if image_size = 0), instructions, a list
        of n strings, and state (n, 8) float32. Fresh arrays; roll is in [0, 2 pi) so that straight down is pi."""
        euler = euler_of(self.frame[ids])
        euler[:, 0] %= 2 * np.pi
        state = np.concatenate([self.tcp[ids], euler, self.fingers[ids, None], np.zeros((len(ids), 1))], 1)
        obs = dict(instructions=[self.episodes[i].instruction for i in ids], state=state.astype(np.float32))
        if self.image_size:
            for i in ids:
                self.last_image[i] = self.render(i)
            obs["images"] = self.last_image[ids]               # a copy
        return obs

    def render(self, i):
        """The camera's picture of environment i now, (H, W, 3) uint8."""
        look, step = self.episodes[i].look, int(self.steps[i])
        if look["stale"][step] and step > 0:
            return self.last_image[i]
        before = time.perf_counter()
        open_gl()
        image = self.scenes[self.scene_of[i]].render(i, look["shadow"], look["side"])
        self.seconds["gl"] += time.perf_counter() - before
        return process_image(image, look, step)

    def landmarks(self):
        """(N, 3, 3) float32 positions [m] of tool, named object (or handle) and goal: labels for auxiliary losses."""
        return np.stack([self.tcp, self.object, self.goal], 1).astype(np.float32)

    def close(self):
        """Free the OpenGL buffers; the environment cannot render afterwards."""
        for scene in self.scenes.values():
            if scene.context:
                open_gl()
                scene.context.free()

# ---------------------------------------------------------------------------------------------- experts


class Expert:
    """Closed-loop scripted demonstrator of every environment in env, from the simulator's state.

        expert = Expert(env);  executed, label = expert.act();  env.step(executed[:, None])

    style "expert": precise. With noise > 0 [m] it executes label + N(0, sigma), sigma ~ U(0, noise) once an episode, so
    that demonstrations contain recoveries while their labels stay clean (DART, Laskey et al. 2017).
    style "teleop": an imperfect person: slower or faster, systematically a few mm off, with pauses, one overshoot and
    correlated noise; label = executed, as a recording would have it.
    What an episode's demonstrator does depends on the episode only, not on num_envs."""

    SPEED, TURN_SPEED = .04, .25                               # m and rad per control step

    def __init__(self, env, style="expert", noise=0.):
        if style not in ("expert", "teleop") or not 0 <= noise <= .02:
            raise ValueError(f"Expert: got style={style!r}, noise={noise!r}; need 'expert' or 'teleop' and 0 <= noise <= .02 m")
        self.env, self.teleop, self.noise = env, style == "teleop", noise
        self.plan, self.number, self.habit = ([None] * env.num_envs for _ in range(3))

    def act(self):
        """Next actions: executed (N, 7) and label (N, 7), see the class."""
        env = self.env
        executed, label = np.zeros((2, env.num_envs, 7))
        for i, episode in enumerate(env.episodes):
            if self.number[i] is not episode:
                self.number[i], self.habit[i] = episode, self.draw_habit(episode.rng)
                self.plan[i] = getattr(self, episode.task.replace("-", "_"))(i)
            habit, rng = self.habit[i], episode.rng
            habit["drift"] = .7 * habit["drift"] + rng.normal(0, 1, 6)
            if self.teleop and habit["pause"] > 0:
                habit["pause"] -= 1
                label[i, 6] = habit["grip"]
            else:
                label[i] = next(self.plan[i])
                habit["grip"] = label[i, 6]
                if self.teleop and rng.random() < .02:
                    habit["pause"] = rng.integers(1, 4)
            executed[i] = label[i]
            executed[i, :6] += habit["sigma"] * habit["drift" if self.teleop else "white"] * (1, 1, 1, 3, 3, 3)
            habit["white"] = rng.normal(0, 1, 6)
        executed = np.clip(executed, -ACTION_LIMIT, ACTION_LIMIT)
        return executed, executed.copy() if self.teleop else label

    def draw_habit(self, rng):
        """How this episode's demonstrator differs from a perfect one."""
        sigma = .0012 if self.teleop else rng.uniform(0, self.noise)
        return dict(speed=rng.uniform(.6, 1.1) if self.teleop else 1., sigma=sigma, drift=np.zeros(6), white=rng.normal(0, 1, 6),
                    offset=rng.normal(0, .003, 3) * self.teleop, overshoot=rng.uniform(.01, .02) * self.teleop, pause=0, grip=1.)

    # A plan is a generator of actions: it reads like the recipe that it is, and looks at the scene at every step.

    def move(self, i, where, grip, tolerance=.010, align=False):
        """Move the controller's target to where() [m], at limited speed, and return when it is within tolerance."""
        env, habit = self.env, self.habit[i]
        for _ in range(25):                                    # then go on: the plan's own checks decide
            gap = where() + habit["offset"] - env.target[i]
            gap = np.clip(env.target[i] + gap, *WORKSPACE) - env.target[i]
            heading = euler_of(env.target_frame[i:i + 1])[0, 2]
            turn = (env.object_yaw[i] - heading + np.pi / 2) % np.pi - np.pi / 2 if align else 0.
            distance = np.linalg.norm(gap)
            if distance < tolerance and abs(turn) < .06:
                return
            if habit["overshoot"] and distance < self.SPEED:   # once: a little too far, then back
                gap, habit["overshoot"] = gap * (1 + habit["overshoot"] / max(distance, .01)), 0
            speed = self.SPEED * habit["speed"]
            action = np.zeros(7)
            action[:3] = gap * min(1, speed / max(np.linalg.norm(gap), 1e-9)) / env.scale[i]
            action[5] = np.clip(turn, -self.TURN_SPEED, self.TURN_SPEED) / env.scale[i]
            action[6] = grip
            yield action

    def hold(self, i, grip, least=2, most=8):
        """Keep still while the fingers move."""
        for k in range(most):
            yield np.array([0, 0, 0, 0, 0, 0, grip])
            if k + 1 >= least and self.env.finger_speed[i] < .004:
                return

    def pick_place(self, i):
        env = self.env
        while True:
            above = lambda h: lambda: env.object[i] + (0, 0, h)                         # noqa: E731
            dish = lambda h: lambda: np.array([*env.goal[i, :2], h])                    # noqa: E731
            yield from self.move(i, above(.09), 1, .012, align=True)
            yield from self.move(i, above(0), 1, .005, align=True)
            yield from self.hold(i, -1)
            spot = env.target[i].copy()
            yield from self.move(i, lambda: spot + (0, 0, .12), -1, .02)
            if env.object[i, 2] > .07:                         # else it slipped: try again
                yield from self.move(i, dish(.15), -1)
                yield from self.move(i, dish(.075), -1)
            yield from self.hold(i, 1)
            yield from self.move(i, lambda: env.target[i] * (1, 1, 0) + (0, 0, .17), 1, .02)

    def push_cube(self, i):
        env = self.env
        while True:
            behind = lambda h: lambda: np.array([env.object[i, 0] - .075, env.object[i, 1], h])     # noqa: E731
            yield from self.move(i, behind(.12), -1, .012)
            yield from self.move(i, behind(.025), -1, .008)
            for _ in range(12):
                if abs(env.object[i, 1] - env.target[i, 1]) > .025 or env.object[i, 0] > env.goal[i, 0]:
                    break
                ahead = lambda: np.array([env.target[i, 0] + .04, env.object[i, 1], .025])          # noqa: E731
                yield next(self.move(i, ahead, -1, 0))
            yield from self.move(i, lambda: env.target[i] * (1, 1, 0) + (0, 0, .14), -1, .03)

    def open_drawer(self, i):
        env = self.env
        while True:
            handle = lambda h: lambda: env.object[i] + (0, 0, h)                        # noqa: E731
            yield from self.move(i, handle(.10), 1, .012)
            yield from self.move(i, handle(.003), 1, .006)
            yield from self.hold(i, -1)
            for _ in range(14):
                if abs(env.object[i, 1] - env.tcp[i, 1]) > .03:
                    break                                      # the handle slipped out
                yield next(self.move(i, lambda: env.target[i] + (0, .04, 0), -1, 0))
            yield from self.hold(i, 1)
            yield from self.move(i, handle(.12), 1, .03)

    def close_drawer(self, i):
        env = self.env
        while True:
            front = lambda h: lambda: env.object[i] + (0, .05, h)                       # noqa: E731
            yield from self.move(i, front(.10), -1, .015)
            yield from self.move(i, front(0), -1, .010)
            for _ in range(14):
                yield next(self.move(i, lambda: np.array([env.object[i, 0], env.target[i, 1] - .04, env.object[i, 2]]), -1, 0))
            yield from self.move(i, front(.10), -1, .03)
