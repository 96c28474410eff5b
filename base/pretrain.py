"""Pre-training: how the bundled base checkpoints base/openvla-tiny and base/pi05-tiny were made.

    L = L_SFT + L_aux        on the domain `pretrain` of envs.py, from random weights

    python base/pretrain.py --policy openvla            # writes runs/base-openvla/policy
    python base/pretrain.py --policy pi05 --resume      # after Ctrl-C, a crash or a power cut

Nothing else in the repository needs this file. The domain `pretrain` has textures, cameras,
colours, shapes and wordings of its own, which `sim` and `real` never show. Two kinds of samples
are mixed as real_data.MixSampler mixes real and simulated ones:

    whole    whole episodes of the scripted expert, all tasks
    first    first images: the first observations of many more scenes, with the expert's first
             action. Later the arm is on its way to an object; here only the instruction tells
             which one is meant, so that these teach the words.

L_SFT is the imitation loss of both stages. L_aux (class Probe) teaches a policy with random
weights where things are and what words mean; its heads are dropped afterwards. Its labels are
landmarks: where the tool, the object that the instruction names, and the goal are, in space and in
the image. They are recorded behind the 8 numbers of the state, which these policies do not read.

Output   OUT/policy (in half precision; load_policy makes float32 of it), metrics.jsonl,
         args.json, resume.pt. At the end, success rates without any fine-tuning are printed.
Ranks, --resume and signals work as in sft_warmstart.py.
"""

import dataclasses
import functools
import itertools
import math
import multiprocessing
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import envs  # first: it chooses the OpenGL backend before mujoco is imported
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import evaluate
import policies
import real_data
import sft_warmstart
from sft_warmstart import flag
from sft_warmstart import rank
from sft_warmstart import say
from sft_warmstart import world

PRESETS = dict(openvla=dict(steps=7000, batch=128), pi05=dict(steps=13000, batch=64))
FIRST_RATIO = 0.3  # probability that a sample is a first image
FIRST_TASKS = ("pick-place", "push-cube")  # tasks whose object must be found, or told from others
PRETRAIN_SEED = 77_000  # + --seed: scenes of the whole episodes
FIRST_SEED = 500  # + that: scenes of the first images
EXPERT_NOISE = 0.01  # m, see envs.Expert
BLOCK = 32  # scenes that a process records at a time
PAUSE = 0.003  # m; frames that move the tool less than this are left out
MUON_FACTOR = 7  # learning rate of Muon / that of AdamW: Muon's steps have unit spectral norm
WEIGHT_DECAY = 0.01  # of matrices
MAX_GRAD_NORM = 1.0

# Of the auxiliary losses: what 0 and 1 mean for x, y, z [m], and in the image [half sides].
CENTRE = (0.48, -0.02, 0.10, 0.0, 0.0)
SCALE = (0.1, 0.1, 0.1, 0.3, 0.3)
PATCH_WEIGHT = 0.2  # of the cross-entropy over patches, ln 16 at first, against the regressions
LOSSES = ("loss/first", "loss/whole", "aux/where", "aux/patch", "aux/match", "aux/look")


@dataclasses.dataclass
class Options:
    """All options. The defaults are those of the bundled checkpoints."""

    policy: str = flag("openvla", "architecture to train", tuple(PRESETS))
    episodes: int = flag(14000, "whole episodes to record, all tasks; only successes are kept")
    first_images: int = flag(64000, "first images to record")
    demos: str = flag("runs/demos", "folder for what is recorded; existing ones are used again")
    steps: int = flag(None, "optimizer steps (default: 7000 for openvla, 13000 for pi05)")
    batch: int = flag(None, "samples per step over all ranks (default: 128 and 64)")
    eval_episodes: int = flag(100, "evaluation episodes per task and domain at the end; 0 = none")
    seed: int = flag(0, "seed of weights, scenes and sampling")
    ranks: int = flag(0, "processes; 0 = one per GPU, or per CPU core")
    out: str = flag(None, "folder of this run (default: runs/base-POLICY)")
    resume: bool = flag(False, "go on from OUT/resume.pt; all other flags as they were")
    micro_batch: int = None  # the batch: Probe looks at one forward pass
    lr: float = 1.5e-3  # peak, of AdamW
    warmup: int = 200  # steps
    decay_steps: int = 0  # the cosine ends at the last step,
    final_lr: float = 0.02  # ... at this share of the peak
    augment: str = "shift"

    def resolve(self):
        """Fill in the defaults of the policy and check everything. Returns self."""
        for name, value in PRESETS[self.policy].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.micro_batch = self.batch
        self.out = self.out or f"runs/base-{self.policy}"
        problems = policies.Problems()
        sft_warmstart.check_range(problems, self, "episodes first_images", 2)
        sft_warmstart.check_range(problems, self, "steps batch", 1)
        sft_warmstart.check_range(problems, self, "eval_episodes seed ranks", 0)
        sft_warmstart.check_run_folder(problems, self)
        problems.stop()
        self.ranks = self.ranks or sft_warmstart.default_ranks(self.batch)
        return self


# ---- training ----------------------------------------------------------------------------------


def losses(policy, probe, batch, options):
    """Return this rank's share of L = L_SFT + L_aux, with gradient, and of LOSSES, (6,)."""
    # There is a single micro-batch, so that the probe has seen all of it.
    [(loss, parts)] = sft_warmstart.supervised_losses(policy, batch, options)
    # The augmentation shifts images by up to 2 of 64 pixels; the labels leave that out.
    labels = torch.from_numpy(batch["state"][:, -15:]).to(policy.device).view(-1, 3, 5)
    aux = probe(labels, *policy.prompt(batch["instructions"]))  # (4,), means over the samples
    aux = aux * len(labels) / options.batch
    return loss + aux.sum(), torch.cat([parts, aux.detach()])


def train(policy, options):
    """Minimise L. Returns False if a signal stopped the loop."""
    out = pathlib.Path(options.out)
    sampler = open_demonstrations(policy, options)
    probe = Probe(policy)
    trained = sft_warmstart.trainable(nn.ModuleDict(dict(policy=policy, probe=probe)))
    adamw, muon = make_optimizers(trained)
    parts = dict(adamw=adamw, muon=muon, sampler=sampler)
    step = 0
    if options.resume:
        state = sft_warmstart.load_state(out / "resume.pt", vars(options), trained)
        step = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    sft_warmstart.write_args(options)
    log = sft_warmstart.Log(out, step)
    finite = sft_warmstart.FiniteGuard()
    stopped = False
    bar = tqdm(total=options.steps, initial=step, desc=out.name, unit="step", disable=rank() > 0)
    with sft_warmstart.Signals() as signals, bar:
        while step < options.steps and not stopped:
            for group in adamw.param_groups + muon.param_groups:
                group["lr"] = group["factor"] * sft_warmstart.learning_rate(step, options)
            torch.manual_seed(sft_warmstart.random_seed(options.seed, step, rank()))
            loss, totals = losses(policy, probe, next(sampler), options)
            loss.backward()
            sft_warmstart.sum_gradients(list(trained.values()))
            grad_norm = nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
            if finite.check(f"step {step}", grad_norm):
                adamw.step()
                muon.step()
            adamw.zero_grad()
            muon.zero_grad()
            step += 1
            bar.update()
            totals = sft_warmstart.all_sum(totals).tolist()
            if step % sft_warmstart.LOG_EVERY == 0:
                log.write(step, dict(zip(LOSSES, totals)))
            stopped = signals.received()
            if step % sft_warmstart.SAVE_EVERY == 0 or step == options.steps or stopped:
                states = {name: part.state_dict() for name, part in parts.items()}
                path = out / "resume.pt"
                sft_warmstart.save_state(path, vars(options), trained, step=step, **states)
    for hook in probe.hooks:
        hook.remove()
    return step == options.steps


# ---- the auxiliary losses ----------------------------------------------------------------------


class Probe(nn.Module):
    """Auxiliary losses for a policy with random weights: L_aux = where + patch + match + look.

    where   Every word of the prompt tells all landmarks, linearly, from its last hidden state.
    patch   Each image patch alone tells whether a landmark is in it, and where. It cannot know
            which object the instruction means.
    match   The patch with the object, as the decoder gets it, resembles the words of the prompt
            more than other words: log softmax of cosines, as CLIP has it for whole images.
    look    -log of the attention that the words pay to the patch with the object in the first
            layer. Without it, attention finds the right word and patch far too late.

    Hooks listen to the forward pass of policy.bc_loss, so that no second one is needed: call the
    probe after it. Shapes: B samples, T patches, L positions in the decoder, D its width, V words.
    """

    def __init__(self, policy):
        super().__init__()
        patches, vision_width = policy.feature_shape
        if policy.kind == "openvla":  # positions: BOS, patches, prompt, 7 actions
            decoder = policy.language_model.model
            projector = policy.projector.fc1
            self.before_patches = 1
            self.after_words = policies.ACTION_DIM
        else:  # positions: patches, prompt
            decoder = policy.language_model
            projector = policy.multi_modal_projector.linear
            self.before_patches = 0
            self.after_words = 0
        self.hooks = [
            projector.register_forward_pre_hook(self.see_features),
            decoder.layers[0].register_forward_pre_hook(self.see_attention),
            decoder.register_forward_pre_hook(self.compute_all, with_kwargs=True),
            decoder.register_forward_hook(self.see_hidden),
        ]
        vocabulary, width = decoder.embed_tokens.weight.shape
        self.where_head = nn.Linear(width, 15)  # xyz and image position of three landmarks
        self.patch_head = nn.Linear(vision_width, 9)  # logit and offset (2) of three landmarks
        self.frequency = nn.Parameter(torch.zeros(vocabulary))  # log, of words in prompts
        for p in self.parameters():
            nn.init.zeros_(p)
        self.side = math.isqrt(patches)
        middle = (torch.arange(self.side) + 0.5) / self.side * 2 - 1
        centres = torch.cartesian_prod(middle, middle).flip(1)
        self.register_buffer("centres", centres)  # (T, 2): x, y of the patches in the image
        self.to(policy.device)

    def compute_all(self, decoder, inputs, options):
        """Have the hidden states of all positions computed, not only of the last ones."""
        return inputs, dict(options, last=None)

    def see_features(self, layer, inputs):
        self.features = inputs[0].flatten(1, -2)  # (B, T, vision width); pi0.5 has a camera axis

    def see_attention(self, layer, inputs):
        """Note the attention (B, heads, L, L), which the layer's fused kernel does not show."""
        x, rotary, mask = inputs[:3]
        h = layer.input_layernorm(x, None)[0]
        q = policies.rotate(layer.heads(h, layer.self_attn.q_proj), *rotary)
        k = policies.rotate(layer.heads(h, layer.self_attn.k_proj), *rotary)
        scores = q @ k.transpose(2, 3) / layer.head_dim**0.5  # one key head for all, or one each
        self.attention = scores.masked_fill(~mask, -math.inf).softmax(3)
        self.inputs = x  # (B, L, D): the projected patches and the embedded words

    def see_hidden(self, decoder, inputs, output):
        """Note the last hidden states and which positions are words of the prompt."""
        self.hidden = output[0]  # (B, L, D)
        self.embeddings = F.normalize(decoder.embed_tokens.weight, dim=1)  # (V, D)
        self.words = inputs[2][:, 0, -1].clone()  # (B, L): what the last position may attend to
        self.words[:, : self.before_patches + self.side**2] = False
        self.words[:, self.words.shape[1] - self.after_words :] = False

    def forward(self, landmarks, ids, mask):
        """Return the four losses, (4,). landmarks (B, 3, 5); ids and mask (B, n): the prompts."""
        away = landmarks[:, None, :, 3:] - self.centres[:, None]  # (B, T, 3, 2)
        nearest = away.abs().amax(3).argmin(1)  # (B, 3): the patch that each landmark is in
        where = self.where(landmarks)
        patch = self.patch(away, nearest)
        column = self.before_patches + nearest[:, 1]  # of the object
        match = self.match(column, ids, mask)
        return torch.stack([where, patch, match, self.look(column)])

    def where(self, landmarks):
        centre = landmarks.new_tensor(CENTRE)
        target = (landmarks - centre) / landmarks.new_tensor(SCALE)  # (B, 3, 5)
        told = self.where_head(self.hidden).unflatten(2, (3, 5))  # (B, L, 3, 5)
        target = target[:, None].expand_as(told)
        loss = F.smooth_l1_loss(told, target, beta=0.1, reduction="none").mean((2, 3))  # (B, L)
        last = self.words.cumsum(1).argmax(1)  # (B,): the actions are read from it
        return loss[torch.arange(len(last)), last].mean() + loss[self.words].mean()

    def patch(self, away, nearest):
        """away (B, T, 3, 2): from the centre of each patch to each landmark; nearest (B, 3)."""
        told = self.patch_head(self.features).unflatten(2, (3, 3))  # (B, T, 3, logit and offset)
        here = (torch.arange(len(nearest))[:, None], nearest, torch.arange(3))
        offset = self.side * away[here]  # (B, 3, 2), 1 at the border of the patch
        loss = F.smooth_l1_loss(told[here][..., 1:], offset, beta=0.1)
        return loss + PATCH_WEIGHT * F.cross_entropy(told[..., 0], nearest)

    def match(self, column, ids, mask):
        seen = self.inputs[torch.arange(len(column)), column]  # (B, D)
        cosine = F.normalize(seen, dim=1) @ self.embeddings.T  # (B, V)
        log_probs = (10 * cosine + self.frequency).log_softmax(1)
        return -log_probs.gather(1, ids)[mask].mean()

    def look(self, column):
        rows = torch.arange(len(column))
        paid = self.attention[rows, :, :, column].mean(1)  # (B, L), over heads
        paid = (paid * self.words).sum(1) / self.words.sum(1)  # (B,), over words
        return -(paid + 1e-6).log().mean()


# ---- demonstrations ----------------------------------------------------------------------------


def landmarks(env):
    """Return where tool, named object (or handle) and goal are, (N, 3, 5) float32.

    Columns: x y z [m], then the place in the image, from -1 left to 1 right, -1 top to 1 bottom.
    """
    marks = np.zeros((env.num_envs, 3, 5), np.float32)
    marks[..., :3] = np.stack([env.tcp, env.object, env.goal], 1)
    for mark, camera in zip(marks, env.camera):
        right, down, ahead = camera.view @ (mark[:, :3] - camera.eye).T  # m; (3,) each
        half = ahead * np.tan(np.radians(camera.fovy) / 2)  # m; half an image side at this depth
        mark[:, 3:] = np.stack([right / half, down / half], 1)
    return marks


def record(kind, seed, image_size, episodes):
    """Record the expert in a range of episodes; return what real_data.write_dataset takes.

    whole: episodes of all tasks, if they succeed. first: the first frame of each; the tasks of
    FIRST_TASKS take turns, block by block. states (T, 8 + 15): the landmarks are behind them.
    """
    task = "all"
    if kind == "first":
        task = FIRST_TASKS[episodes[0] // BLOCK % len(FIRST_TASKS)]
        seed += FIRST_SEED
    env = envs.make_env(
        task,
        "pretrain",
        len(episodes),
        seed,
        image_size,
        first_episode=episodes[0],
        auto_reset=False,
    )
    expert = envs.Expert(env, noise=EXPERT_NOISE)
    obs = env.reset()
    frames = [[] for _ in episodes]
    running = np.arange(len(episodes))
    while len(running):
        executed, label = expert.act()  # (N, 7) each; only what is executed has noise
        state = np.concatenate([obs["state"], landmarks(env).reshape(-1, 15)], 1)
        for i in running:
            frames[i].append((obs["images"][i], state[i], label[i]))
        if kind == "first":
            break
        obs, _, _, _, info = env.step(executed[:, None])
        running = np.setdiff1d(running, info["ended"])
    recorded = []
    for i, episode in enumerate(episodes):
        if kind == "first" or info["success"][i]:
            images, states, actions = map(np.stack, zip(*frames[i]))
            recorded.append((images, states, actions, obs["instructions"][i], episode))
    return recorded


# ---- plumbing: skip on first reading -----------------------------------------------------------


def make_demos(kind, episodes, out, seed, image_size):
    """Write episodes 0 .. episodes - 1 as a LeRobot data set, recorded on all cores."""
    firsts = range(0, episodes, BLOCK)
    blocks = [range(first, min(first + BLOCK, episodes)) for first in firsts]
    work = functools.partial(record, kind, PRETRAIN_SEED + seed, image_size)
    spawn = multiprocessing.get_context("spawn")  # OpenGL contexts do not survive a fork
    with spawn.Pool(real_data.cores()) as pool:
        parts = tqdm(pool.imap(work, blocks), out.name, len(blocks), unit="block")
        real_data.write_dataset(out, itertools.chain.from_iterable(parts), envs.CONTROL_HZ)


def open_demonstrations(policy, options):
    """Return the stream of batches; rank 0 records the demonstrations that are not there yet."""
    size = policy.image_size
    demos = []
    for kind, episodes in (("whole", options.episodes), ("first", options.first_images)):
        name = f"pretrain-{kind}-{episodes}-seed{options.seed}-{size}px"
        path = pathlib.Path(options.demos, name)
        if rank() == 0 and not path.exists():
            make_demos(kind, episodes, path, options.seed, size)
        sft_warmstart.barrier()
        opened = real_data.open_dataset(path, size, policy.horizon, fit=policy.fit)
        demos.append(opened.without_pauses(PAUSE))
    add_moments(policy, demos[0])
    return real_data.MixSampler(
        *demos, 1 - FIRST_RATIO, options.batch, options.seed, rank(), world()
    )


def add_moments(policy, demos):
    """Add mean and std to the statistics, for openpi's reader; nothing here scales by them.

    Those of the bundled checkpoints are of the first 320 episodes.
    """
    moments = real_data.statistics(demos.actions)
    policy.stats["action"].update(mean=moments["mean"], std=moments["std"])


def make_optimizers(trained):
    """Return AdamW, and Muon for the matrices inside transformers and projectors.

    Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix, so that all directions move
    equally far. It computes in bfloat16, and every rank does it for all matrices.
    """
    inner = {}
    rest = {}
    for name, p in trained.items():
        inside = re.search("(blocks|layers|projector|expert).*weight", name)
        if p.ndim == 2 and inside and "embed" not in name:
            inner[name] = p
        else:
            rest[name] = p
    groups = sft_warmstart.parameter_groups(rest, WEIGHT_DECAY, factor=1)
    muon = dict(params=list(inner.values()), factor=MUON_FACTOR)
    return [
        torch.optim.AdamW(groups, betas=(0.9, 0.95)),
        torch.optim.Muon([muon], weight_decay=WEIGHT_DECAY),
    ]


def pretrain(options):
    """Train, save and evaluate. Returns OUT/policy, or None if a signal stopped the training."""
    out = pathlib.Path(options.out)
    policy = policies.make_tiny(options.policy, options.seed).to(sft_warmstart.this_device())
    limit = envs.ACTION_LIMIT  # the range of the controller, the same for any data of this robot
    policy.set_statistics("panda", dict(action=dict(q01=-limit, q99=limit)))
    if not train(policy, options):
        say(f"interrupted; the same command with --resume goes on from {out}/resume.pt")
        return None
    policy.half()  # a bundled checkpoint takes less than 10 MB
    sft_warmstart.save_policy(policy, out)
    policy.float()  # what is evaluated is what was saved
    say(f"wrote {out}/policy")
    # Success without any fine-tuning; `sim` and `real` look as nothing in the training did.
    episodes = options.eval_episodes
    evaluate.success_rates(policy, envs.TASKS, envs.DOMAINS, episodes, rank(), world())
    return out / "policy"


def parse(argv):
    """Command line -> Options, resolved."""
    return sft_warmstart.parse_flags(Options, argv, __doc__).resolve()


if __name__ == "__main__":
    sft_warmstart.run_script(pretrain, parse)
