"""params.yaml as one typed tree: strict, frozen, no default in code, every error named before any work.

A section is `{base: {...}, by_dataset: {id or pattern: {...}}}`: the values of a cell are `base`, overridden in the
order of the file by each entry whose pattern (`d4rl/*`) fits its data set. `pipeline.resolve` writes them out, so that
changing one data set's value makes that data set's cells stale, and no other.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from modip.data.sources import SourceConfig
from modip.errors import UserError

DATASET = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
"""An id of a data set. No dot: DVC takes it for the next level of params.yaml."""
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Seed = Annotated[int, Field(ge=0, le=2_000)]
Seeds = Annotated[list[Seed], Field(min_length=1)]
Compared = Annotated[
    dict[str, Annotated[dict[str, Seeds], Field(min_length=1)]], Field(min_length=1)
]
"""Of each data set the agents that are compared, in the order of the tables, each with its seeds."""
"""Times 10^6 it seeds simulators."""


class Section(BaseModel):
    """A frozen part of the tree; an unknown key, a wrong type or a number that is not finite is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RuntimeConfig(Section):
    """How to run; changes no result's meaning, so no stage depends on it."""

    device: str = Field(description="torch device: cpu or cuda, or cuda:1")
    threads: Count = Field(description="CPU threads of one stage")
    checkpoint_seconds: Positive = Field(description="seconds between two resumable states")


class ChunkConfig(Section):
    """The policy's action chunks."""

    horizon: Count = Field(description="H, actions predicted at once")
    act_steps: Count = Field(description="Ta, actions executed before the next decision")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.act_steps > self.horizon:
            raise ValueError(
                f"act_steps {self.act_steps} exceeds horizon {self.horizon}: execute at most the whole chunk"
            )
        return self


class DiffusionConfig(Section):
    """The diffusion policy and its behaviour cloning."""

    prediction: Literal["sample", "epsilon", "v"] = Field(
        description="what the network outputs: x0, noise, or v"
    )
    denoising_steps: Count = Field(description="K, steps of the training schedule")
    sampling_steps: Count = Field(description="steps used to sample, at most denoising_steps")
    eta: Share = Field(description="1 = ancestral sampling, 0 = deterministic DDIM")
    width: Count = Field(description="units per layer")
    blocks: Count = Field(description="residual blocks")
    updates: Count = Field(description="BC gradient steps")
    batch_size: Count = Field(description="chunks per update")
    lr: Positive = Field(description="AdamW rate, decayed to a tenth by a cosine")
    weight_decay: NonNegative = Field(description="AdamW weight decay")
    grad_clip: Positive = Field(description="largest gradient norm")
    ema_decay: Share = Field(description="memory of the averaged weights that act")
    hidden: list[Annotated[int, Field(ge=0)]] = Field(
        description="observation dimensions the policy does not see (the model and the critics do)"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.sampling_steps > self.denoising_steps:
            raise ValueError(
                f"sampling_steps {self.sampling_steps} exceeds denoising_steps {self.denoising_steps}: lower it"
            )
        return self


class WorldModelConfig(Section):
    """The world model and its pre-training."""

    encoder: Literal["identity", "simnorm"] = Field(
        description="latent: normalised observation, or learned"
    )
    latent_dim: Annotated[int, Field(ge=8, multiple_of=8)] = Field(description="Dz of simnorm")
    ensemble: Count = Field(description="members")
    width: Count = Field(description="units per layer")
    layers: Count = Field(description="hidden layers")
    loss_horizon: Count = Field(description="steps predicted in the loss")
    rho: Share = Field(description="weight of a step relative to the one before")
    dynamics_coef: NonNegative = Field(description="weight of the latent's error")
    reward_coef: NonNegative = Field(description="weight of the reward's error")
    end_coef: NonNegative = Field(description="weight of the termination's error")
    updates: Count = Field(description="offline gradient steps")
    batch_size: Count = Field(description="windows per update")
    lr: Positive = Field(description="AdamW rate")
    weight_decay: NonNegative = Field(description="AdamW weight decay")
    grad_clip: Positive = Field(description="largest gradient norm")
    ema_decay: Share = Field(description="memory of the averaged weights that plan")


class CriticsConfig(Section):
    """Q and V and their pre-training."""

    ensemble: Count = Field(description="pairs of Q and V; a multiple of world_model.ensemble")
    width: Count = Field(description="units per layer")
    layers: Count = Field(description="hidden layers")
    td_target: Literal["state_value", "policy_action"] = Field(
        description="bootstrap: V(s'), or Q(s', a') with a' sampled from the policy (ablation)"
    )
    n_step: Count = Field(description="rewards summed before the bootstrap")
    expectile: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="of Q that V learns")
    discount: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="per environment step")
    demos_end_well: bool = Field(
        description="an end is the goal: demonstrations end there, and an episode without one is not imitated"
    )
    reward_offset: float = Field(
        description="added to each reward before learning (a cost of time)"
    )
    updates: Count = Field(description="offline gradient steps")
    batch_size: Count = Field(description="windows per update")
    lr: Positive = Field(description="AdamW rate")
    weight_decay: NonNegative = Field(description="AdamW weight decay")
    grad_clip: Positive = Field(description="largest gradient norm")
    ema_decay: Share = Field(description="memory of the target networks, which also plan")


class SearchConfig(Section):
    """A search over action sequences (`modip.mppi`)."""

    horizon: Count = Field(description="h, planned steps; of mppi at most chunk.horizon")
    prior_samples: Count = Field(description="sequences of the prior among the candidates")
    samples: Annotated[int, Field(ge=0)] = Field(
        description="Gaussian draws per round; 0 = best of the candidates"
    )
    iterations: Annotated[int, Field(ge=0)] = Field(description="rounds of Gaussian refinement")
    elites: Count = Field(description="sequences kept per round")
    temperature: Positive = Field(description="divides the value of the elites")
    weighting: Literal["standardised", "raw"] = Field(
        description="that value in units of the elites' spread, or of reward"
    )
    min_std: Positive = Field(description="smallest spread of the Gaussians")
    max_std: Positive = Field(description="largest spread of the Gaussians")
    selection: Literal["mean", "best", "sample"] = Field(
        description="execute the weighted mean, the best sequence, or an elite drawn by its weight"
    )


class MPPIConfig(SearchConfig):
    """The planner."""

    perturbed_samples: Annotated[int, Field(ge=0)] = Field(
        description="noisy copies of the prior's sequences"
    )
    perturbation: NonNegative = Field(description="std of that noise")
    penalty: NonNegative = Field(
        description="cost of one standard deviation of the members' disagreement"
    )
    terminal_value: Literal["state_value", "policy_action_value"] = Field(
        description="V(z_h), or Q(z_h, a) with a sampled from the policy (ablation)"
    )
    prior: Literal["diffusion", "moments", "gaussian"] = Field(
        description="candidates: the policy's chunks; Gaussians of their mean and spread (ablation); "
        "Gaussians around zero, of max_std, which no policy enters (ablation)"
    )


class DemoShareConfig(Section):
    """Share of demonstrations in the policy's batches: linear from start to end over the online phase."""

    start: Share = Field(description="share at the first environment step")
    end: Share = Field(description="share from the final phase on")


class ModipConfig(Section):
    """The MODIP agent's online phase."""

    planning: bool = Field(
        description="act with the plan; false = with the policy that would plan (ablation)"
    )
    offline_pretraining: bool = Field(
        description="start from the pre-trained parts; false = from scratch (ablation)"
    )
    env_steps: Count = Field(
        description="environment steps in all, the final distillation's included"
    )
    num_envs: Count = Field(description="environments stepped together")
    episode_steps: Annotated[int, Field(ge=0)] = Field(
        description="training episodes are cut after so many steps, to see more starts (0: never)"
    )
    explore_std: NonNegative = Field(description="Gaussian noise on executed plans")
    model_updates: NonNegative = Field(description="world-model updates per environment step")
    critic_updates: NonNegative = Field(description="critic updates per environment step")
    policy_updates: NonNegative = Field(description="distillation updates per environment step")
    model_lr: Positive = Field(description="online AdamW rate, decayed to a tenth by a cosine")
    critic_lr: Positive = Field(description="online AdamW rate, decayed to a tenth by a cosine")
    policy_lr: Positive = Field(description="online AdamW rate, decayed to a tenth by a cosine")
    plan_steps: Count = Field(
        description="environment steps that one copy of the averaged weights acts for"
    )
    offline_share: Share = Field(description="share of the data set in model and critic batches")
    demo_share: DemoShareConfig
    imagined_share: Share = Field(
        description="share of imagined plans in the rest of the policy's batches"
    )
    imagined_states: Count = Field(
        description="states planned for per decision, for the imagined plans"
    )
    fresh_steps: Count = Field(
        description="age limit, in environment steps, of executed chunks and plans"
    )
    keep: Share = Field(
        description="share of fresh episodes, by real return, whose chunks are distilled"
    )
    final_env_steps: Annotated[int, Field(ge=0)] = Field(
        description="last steps, with the planner frozen"
    )
    final_planner: Literal["best", "newest"] = Field(
        description="who plans then: of what acted in training what earned most, or the newest"
    )
    final_updates: Annotated[int, Field(ge=0)] = Field(
        description="distillation updates after them"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.final_env_steps > self.env_steps:
            raise ValueError(
                f"final_env_steps {self.final_env_steps} exceeds env_steps {self.env_steps}: it is part of the budget"
            )
        return self

    @property
    def num_policy_updates(self) -> int:
        """All the DP's gradient steps of the online phase: what the BC control gets too."""
        return (
            int(self.policy_updates * (self.env_steps - self.final_env_steps)) + self.final_updates
        )


class NoiseActorConfig(Section):
    """What chooses the initial noise of a frozen policy."""

    width: Count = Field(description="units per layer")
    layers: Count = Field(description="hidden layers")
    bound: Positive = Field(description="largest noise it can choose, in standard deviations")


class DSRLConfig(Section):
    """The DSRL agent; its budget, its environments and their episodes are modip's."""

    critic: Literal["noise", "aliased"] = Field(
        description="Q of noise (DSRL-SAC), or of actions, distilled into one of noise (DSRL-NA)"
    )
    actor: NoiseActorConfig
    ensemble: Count = Field(description="critics, of which the smallest value counts")
    width: Count = Field(description="units per layer of a critic")
    layers: Count = Field(description="hidden layers of a critic")
    initial_share: Share = Field(
        description="share of the budget acted with the policy's own noise, before anything is learned"
    )
    updates: NonNegative = Field(
        description="updates of critics and actor per environment step, the initial ones included"
    )
    distillations: Count = Field(
        description="updates of the critic of noise per update, where critic is aliased"
    )
    offline_share: Share = Field(
        description="share of the data set in the batches, where critic is aliased"
    )
    discount: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="per environment step")
    target_entropy: float = Field(description="of noise / bound, a chunk's, in nats")
    initial_temperature: Positive = Field(description="weight of the entropy at first")
    batch_size: Count = Field(description="chunks per update")
    lr: Positive = Field(description="AdamW rate, decayed to a tenth by a cosine")
    grad_clip: Positive = Field(description="largest gradient norm")
    ema_decay: Share = Field(description="memory of the target networks")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.critic == "noise" and self.offline_share > 0:
            raise ValueError(
                f"offline_share {self.offline_share} needs critic aliased: demonstrations hold no noise; set it to 0"
            )
        return self


class RankingConfig(Section):
    """Critics that choose among a policy's chunks."""

    ensemble: Count = Field(description="critics")
    width: Count = Field(description="units per layer of a critic")
    layers: Count = Field(description="hidden layers of a critic")
    value: Literal["min", "mean"] = Field(description="of the critics, what a chunk is worth")
    candidates: Count = Field(description="chunks sampled per decision")
    keep: Count = Field(description="best ones that go on")
    ascent_steps: Annotated[int, Field(ge=0)] = Field(description="gradient steps that each climbs")
    ascent_size: NonNegative = Field(
        description="what multiplies the gradient in each, of the value in units of the critics' scale"
    )
    temperature: NonNegative = Field(
        description="divides the value of those left, one of which is drawn; 0 = the best"
    )


class SplitConfig(Section):
    """A policy whose first sampling steps are a frozen clone's."""

    tuned_steps: Count = Field(description="K', last sampling steps that are fine-tuned")


class ChainPPOConfig(Section):
    """PPO over the sampling steps of a diffusion policy, of which diffusion.eta must be 1."""

    tuned_steps: Count = Field(
        description="K', last sampling steps that are fine-tuned, at most diffusion.sampling_steps"
    )
    min_sampling_std: Positive = Field(
        description="smallest deviation of a sampling step while exploring"
    )
    min_log_prob_std: Positive = Field(
        description="smallest deviation that log-probabilities are taken with"
    )
    discount: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="per environment step")
    gae_decay: Share = Field(description="lambda of the advantages, per chunk")
    denoising_discount: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        description="weight of a sampling step relative to the next"
    )
    clip: Positive = Field(description="how far the last step's probability ratio may move")
    clip_base: Positive = Field(description="the same for the noisiest fine-tuned step")
    clip_rate: Positive = Field(description="of the exponential between them")
    advantage_tail: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        description="share of the advantages on either side that is brought to its quantile"
    )
    target_kl: Positive = Field(description="divergence after which an iteration's epochs end")
    warmup_iterations: Annotated[int, Field(ge=0)] = Field(
        description="iterations in which the value learns alone"
    )
    epochs: Count = Field(description="passes over each iteration's chunks")
    batch_size: Count = Field(description="chunks per update, all their steps included")
    lr: Positive = Field(description="the policy's AdamW rate, decayed to a tenth by a cosine")
    value_lr: Positive = Field(description="the value's AdamW rate, decayed likewise")
    grad_clip: Positive = Field(description="largest gradient norm")
    width: Count = Field(description="units per layer of the value")
    layers: Count = Field(description="hidden layers of the value")


class DQLConfig(Section):
    """The DQL agent; its budget, its environments and their episodes are modip's."""

    ranking: RankingConfig
    sampling_steps: Count = Field(
        description="T, steps of the chain that the gradient passes, at most diffusion.denoising_steps"
    )
    eta: NonNegative = Field(description="weight of the Q-term beside the denoising loss")
    backup_samples: Count = Field(
        description="chunks sampled for a target, of which the best counts"
    )
    offline_updates: Annotated[int, Field(ge=0)] = Field(
        description="updates from the data set alone, before the first environment step"
    )
    warmup_updates: Annotated[int, Field(ge=0)] = Field(
        description="the first of them, in which the critics learn alone"
    )
    updates: NonNegative = Field(
        description="updates of critics and policy per environment step, then"
    )
    offline_share: Share = Field(description="share of the data set in the batches, then")
    discount: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="per environment step")
    batch_size: Count = Field(description="chunks per update")
    policy_lr: Positive = Field(description="AdamW rate, decayed to a tenth by a cosine")
    critic_lr: Positive = Field(description="AdamW rate, decayed to a tenth by a cosine")
    grad_clip: Positive = Field(description="largest gradient norm, of either")
    ema_decay: Share = Field(
        description="memory of the averaged policy and of the target networks, which act"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup_updates > self.offline_updates:
            raise ValueError(
                f"warmup_updates {self.warmup_updates} exceeds offline_updates {self.offline_updates}: lower it"
            )
        return self


class DPPOConfig(ChainPPOConfig):
    """The DPPO agent; its environments and their episodes are modip's."""

    budget: Positive = Field(description="environment steps, in units of modip.env_steps")
    rollout_steps: Count = Field(description="environment steps of an iteration, all environments'")
    value_updates: Annotated[int, Field(ge=0)] = Field(
        description="TD updates of the value on the demonstrations, before anything else"
    )


class ConservativeConfig(Section):
    """What keeps Q low where no data is."""

    weight: NonNegative = Field(description="alpha, beside the error of the targets")
    states: Count = Field(description="states of a batch on which it is taken, at most the batch")
    random_chunks: Count = Field(description="uniform chunks per state")
    policy_chunks: Count = Field(
        description="chunks of the policy per state, at most ranking.candidates"
    )


class PARLConfig(Section):
    """The PA-RL agent; its budget, its environments and their episodes are modip's."""

    critic: Literal["calql", "iql"] = Field(
        description="Q of the improved chunks, kept low elsewhere; or an in-sample pair of Q and V"
    )
    ranking: RankingConfig
    subsample: Count = Field(description="critics, drawn for each target, whose smallest counts")
    conservative: ConservativeConfig
    expectile: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        description="of Q that V learns, where critic is iql"
    )
    proposers: Count = Field(
        description="policies whose chunks are improved, for equal parts of the budget: the clone, then the learned one as it stands"
    )
    improvements: Count = Field(
        description="states per update of the critics (iql: of the policy) whose chunks are improved"
    )
    pool: Count = Field(description="newest improved states, which batches are drawn from")
    offline_updates: Annotated[int, Field(ge=0)] = Field(
        description="updates of the critics from the data set, before the first environment step"
    )
    critic_updates: NonNegative = Field(description="updates per environment step, then")
    policy_updates: NonNegative = Field(description="updates per environment step, then")
    offline_share: Share = Field(description="share of the data set among the states, then")
    discount: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="per environment step")
    batch_size: Count = Field(description="transitions, or improved chunks, per update")
    critic_lr: Positive = Field(description="AdamW rate, decayed to a tenth by a cosine")
    policy_lr: Positive = Field(description="AdamW rate, decayed to a tenth by a cosine")
    grad_clip: Positive = Field(description="largest gradient norm of the critics")
    ema_decay: Share = Field(description="memory of the target networks, which also rank")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        limits = {
            "subsample": (self.subsample, "ranking.ensemble", self.ranking.ensemble),
            "conservative.states": (self.conservative.states, "batch_size", self.batch_size),
            "conservative.policy_chunks": (
                self.conservative.policy_chunks, "ranking.candidates", self.ranking.candidates,
            ),
            "batch_size": (self.batch_size, "pool", self.pool),
        }  # fmt: skip
        for name, (value, other, limit) in limits.items():
            if value > limit:
                raise ValueError(f"{name} {value} exceeds {other} {limit}: lower it")
        return self


class LatentConfig(Section):
    """TD-MPC2's networks, over latents of softmax groups."""

    latent_dim: Annotated[int, Field(ge=8, multiple_of=8)] = Field(description="Dz, groups of 8")
    encoder_width: Count = Field(description="units of the encoder's hidden layer")
    width: Count = Field(description="units per layer of the other networks, which have two")
    ensemble: Annotated[int, Field(ge=2)] = Field(
        description="Q functions, of which two at a time are asked"
    )
    bins: Annotated[int, Field(ge=2)] = Field(description="of two-hot rewards and values")


class TDMPC2Config(Section):
    """The TD-MPC2 agent; its budget, its environments and their episodes are modip's."""

    data: Literal["online", "demonstrations"] = Field(
        description="its own steps alone, or the demonstrations too: offline first, then in every batch"
    )
    latent: LatentConfig
    search: SearchConfig
    seed_steps: Annotated[int, Field(ge=0)] = Field(
        description="first environment steps, of random actions, where data is online"
    )
    offline_updates: Annotated[int, Field(ge=0)] = Field(
        description="updates before the first environment step, where data is demonstrations"
    )
    offline_share: Share = Field(
        description="share of the data set in the batches, where data is demonstrations"
    )
    updates: NonNegative = Field(
        description="updates per environment step, the seed steps included"
    )
    discount: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="per environment step")
    rho: Share = Field(description="weight of a predicted step relative to the one before")
    consistency_coef: NonNegative = Field(description="weight of the latent's error")
    reward_coef: NonNegative = Field(description="weight of the reward's error")
    value_coef: NonNegative = Field(description="weight of the value's error")
    end_coef: NonNegative = Field(description="weight of the termination's error")
    entropy_coef: NonNegative = Field(description="weight of the prior's entropy")
    bc_coef: NonNegative = Field(
        description="weight of the prior's squared distance to demonstrated actions, where data is demonstrations"
    )
    range_decay: Share = Field(description="memory of the range of values, which scales them")
    batch_size: Count = Field(description="windows per update")
    lr: Positive = Field(description="AdamW rate, decayed to a tenth by a cosine")
    encoder_rate: Positive = Field(description="what multiplies it for the encoder")
    grad_clip: Positive = Field(description="largest gradient norm, of model and prior each")
    ema_decay: Share = Field(description="memory of the target Q functions")


class DiWAConfig(ChainPPOConfig):
    """The DiWA agent, which takes no environment step; it needs world_model.encoder identity."""

    num_envs: Count = Field(description="imagined episodes that run side by side")
    decisions: Count = Field(description="chunks of each of them in one iteration")
    iterations: Count = Field(description="imagined rollouts that are learned from")
    starts: Literal["first", "any"] = Field(
        description="of a demonstration, the observations that imagined episodes begin from"
    )
    bc_coef: NonNegative = Field(
        description="alpha_BC, weight of the clone's log-probability of what the policy does"
    )
    penalty: NonNegative = Field(
        description="deviations of the reward lost where the members disagree by a step's usual change"
    )


class EvaluationConfig(Section):
    """One evaluation for curves and for the final figures."""

    episodes: Count = Field(description="final episodes per policy, with fixed seeds")
    num_envs: Count = Field(description="environments stepped together")
    first_seed: Annotated[int, Field(ge=0)] = Field(
        description="episode i starts from seed first_seed + i"
    )
    curve_points: Count = Field(description="evaluations along the online phase")
    curve_episodes: Count = Field(description="episodes per policy and point of the curve")
    videos: Annotated[int, Field(ge=0)] = Field(description="start states filmed before and after")


class Cell(Section):
    """Every value of one data set's runs."""

    dataset: str
    source: SourceConfig
    runtime: RuntimeConfig
    chunk: ChunkConfig
    diffusion: DiffusionConfig
    world_model: WorldModelConfig
    critics: CriticsConfig
    mppi: MPPIConfig
    modip: ModipConfig
    dsrl: DSRLConfig
    dql: DQLConfig
    dppo: DPPOConfig
    parl: PARLConfig
    tdmpc2: TDMPC2Config
    diwa: DiWAConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.mppi.horizon > self.chunk.horizon:
            raise ValueError(
                f"mppi.horizon {self.mppi.horizon} exceeds chunk.horizon {self.chunk.horizon}: the policy's chunks "
                "must cover the plan; lower the one or raise the other"
            )
        if self.critics.ensemble % self.world_model.ensemble:
            raise ValueError(
                f"critics.ensemble {self.critics.ensemble} is not a multiple of world_model.ensemble "
                f"{self.world_model.ensemble}: each critic judges the latents of one model member"
            )
        if (
            self.mppi.terminal_value == "policy_action_value"
            and self.world_model.encoder == "simnorm"
        ):
            raise ValueError(
                "mppi.terminal_value policy_action_value needs world_model.encoder identity: the policy reads "
                "observations, and a simnorm latent has none"
            )
        if self.dql.sampling_steps > self.diffusion.denoising_steps:
            raise ValueError(
                f"dql.sampling_steps {self.dql.sampling_steps} exceeds diffusion.denoising_steps "
                f"{self.diffusion.denoising_steps}: lower it"
            )
        return self


SECTIONS = (
    "chunk", "diffusion", "world_model", "critics", "mppi", "modip", "dsrl", "dql", "dppo", "parl", "tdmpc2", "diwa",
    "evaluation",
)  # fmt: skip

Value = bool | int | float | str
"""What can be tuned: a number, a flag or a word."""


class IntRange(Section):
    """Whole numbers from low to high, both included."""

    type: Literal["int"]
    low: int = Field(description="smallest value")
    high: int = Field(description="largest value")
    log: bool = Field(description="search ratios instead of differences")

    def holds(self, value: Value) -> bool:
        return type(value) is int and self.low <= value <= self.high


class FloatRange(Section):
    """Numbers from low to high, both included."""

    type: Literal["float"]
    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    log: bool = Field(description="search ratios instead of differences")

    def holds(self, value: Value) -> bool:
        return type(value) is float and self.low <= value <= self.high


class Choice(Section):
    """One of a few values."""

    type: Literal["choice"]
    choices: list[Value] = Field(description="the values to choose from", min_length=2)

    def holds(self, value: Value) -> bool:
        return any(value == one and type(value) is type(one) for one in self.choices)


class ObjectiveConfig(Section):
    """What a study makes large."""

    policy: str = Field(
        description="dp, the policy alone, or what else is judged of the agent, as modip's planner"
    )
    metric: Literal["success", "return", "score"] = Field(description="its measure")


class HyperbandConfig(Section):
    """Trials that fall behind others of as many environment steps are stopped."""

    type: Literal["hyperband"]
    min_resource: Count = Field(description="environment steps before a trial can be stopped")
    reduction_factor: Annotated[int, Field(ge=2)] = Field(
        description="one trial in so many goes on, at each halving"
    )


class NoPrunerConfig(Section):
    """Every trial runs to its end."""

    type: Literal["none"]


class SamplerConfig(Section):
    """The tree-structured Parzen estimator (TPE)."""

    seed: Annotated[int, Field(ge=0)] = Field(description="seed of its draws")
    startup_trials: Annotated[int, Field(ge=1)] = Field(
        description="trials drawn at random before it learns from them"
    )


class TuneConfig(Section):
    """A study: which values of one data set's cell to try, how, and on what the winner is confirmed."""

    dataset: str = Field(description="data set, a key of `data`")
    agent: str = Field(description="agent that a trial trains, any that acts online")
    seeds: list[Seed] = Field(
        description="seeds each trial runs, one after the other", min_length=1
    )
    parameters: dict[
        str, Annotated[IntRange | FloatRange | Choice, Field(discriminator="type")]
    ] = Field(description="what is searched: SECTION.FIELD and its range", min_length=1)
    env_steps: Count = Field(
        description="environment steps of a trial and seed; the final phase is scaled with them"
    )
    points: Count = Field(description="evaluations along a trial, besides the last")
    episodes: Count = Field(description="episodes of each evaluation")
    first_seed: Annotated[int, Field(ge=0)] = Field(
        description="their first start state: others than the final evaluation's, which confirms"
    )
    trials: Count = Field(description="trials in all; infeasible ones do not count")
    objective: ObjectiveConfig
    pruner: Annotated[HyperbandConfig | NoPrunerConfig, Field(discriminator="type")]
    sampler: SamplerConfig
    shortlist: Count = Field(
        description="best settings that run again beside the default, which the winner is chosen by"
    )
    shortlist_seeds: list[Seed] = Field(
        description="more seeds for them, each with a trial's budget", min_length=1
    )
    confirm_seeds: list[Seed] = Field(
        description="fresh seeds on which winner and default are compared, with the whole budget",
        min_length=2,
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, one in self.parameters.items():
            if not isinstance(one, Choice) and not one.low < one.high:
                raise ValueError(f"{name}: low {one.low} is not below high {one.high}: widen it")
            if not isinstance(one, Choice) and one.log and one.low <= 0:
                raise ValueError(f"{name}: low {one.low} has no logarithm: raise it, or log: false")
        used = self.seeds
        for name in ("shortlist_seeds", "confirm_seeds"):
            fresh = getattr(self, name)
            if len({*used, *fresh}) < len(set(used)) + len(fresh):
                raise ValueError(
                    f"{name} {fresh} must be fresh: none twice, none of those used before, {used}"
                )
            used = [*used, *fresh]
        if isinstance(self.pruner, HyperbandConfig) and self.pruner.min_resource > self.env_steps:
            raise ValueError(
                f"pruner.min_resource {self.pruner.min_resource} exceeds env_steps {self.env_steps}: lower it"
            )
        return self


class Variant(Section):
    """An agent under another name, with a few values of its own: an ablation, or another form."""

    agent: str = Field(description="the agent that it is a variant of")
    values: dict[str, Value] = Field(description="SECTION.FIELD: value", min_length=1)


class Params(Section):
    """The whole of params.yaml, every data set's values checked."""

    dataset: tuple[str, ...]
    agent: tuple[str, ...]
    seed: tuple[Seed, ...]
    data: dict[str, SourceConfig]
    cells: dict[str, Cell]
    variants: dict[str, Variant]
    tune: TuneConfig
    compare: Compared

    def cell(self, dataset: str, agent: str | None = None) -> Cell:
        """The values of one data set, as `agent` reads them where that is a variant. Raises UserError for an unknown id."""
        if dataset not in self.cells:
            raise UserError(unknown("params.yaml: dataset", dataset, self.cells))
        cell = self.cells[dataset]
        if agent in self.variants:
            return with_values(cell, self.variants[agent].values, f"variants.{agent}.values")
        return cell

    def base(self, agent: str) -> str:
        """The agent that `agent` is a variant of, or itself."""
        return self.variants[agent].agent if agent in self.variants else agent

    def with_cell(self, cell: Cell) -> Self:
        """The same with another cell in the place of its data set's."""
        return self.model_copy(update={"cells": {**self.cells, cell.dataset: cell}})


def value_of(cell: Cell, where: str, place: str = "tune.parameters") -> Value:
    """The value at SECTION.FIELD of a cell. Raises UserError, with the nearest path, if there is none; `place` names it."""
    found: Any = cell.model_dump(include=set(SECTIONS))
    paths = dict(_paths(found, ""))
    if where not in paths:
        near = difflib.get_close_matches(where, list(paths), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"params.yaml: {place} {where!r} is unknown: {hint}name a value as SECTION.FIELD, "
            f"SECTION one of {', '.join(SECTIONS)}"
        )
    return paths[where]


def _paths(tree: Any, at: str) -> Iterator[tuple[str, Value]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{at}{name}.")
        elif isinstance(value, Value):
            yield f"{at}{name}", value


def with_values(cell: Cell, changes: Mapping[str, Value], place: str = "") -> Cell:
    """The cell with the values of `changes`, {SECTION.FIELD: value}, checked whole.

    Raises UserError in one line for a path that is not there and for a combination that does not fit; `place` is where
    in params.yaml the changes stand, if they do.
    """
    tree: dict[str, Any] = cell.model_dump()
    for where, value in changes.items():
        value_of(cell, where, place or "tune.parameters")
        *sections, field = where.split(".")
        functools.reduce(lambda at, name: at[name], sections, tree)[field] = value
    try:
        return Cell.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        shown = f"{field} (value {first['input']!r}): " if field in changes else ""
        head = f"params.yaml: {place}, [{cell.dataset}]: " if place else ""
        raise UserError(head + shown + first["msg"].removeprefix("Value error, ")) from None


def unknown(what: str, value: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    """One line that names an unknown value, the nearest known one, and all of them."""
    near = difflib.get_close_matches(value, list(known), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{what} {value!r} is unknown: {hint}choose one of {', '.join(known)}"


def _of(section: dict[str, Any], dataset: str) -> Any:
    """A section's values for one data set."""
    fitting = (v for k, v in section["by_dataset"].items() if fnmatch.fnmatchcase(dataset, k))
    return functools.reduce(_merge, fitting, section["base"])


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{k: _merge(base.get(k), v) for k, v in over.items()}}
    return over


def _describe(error: ValidationError, path: Path, where: str) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(p) for p in (where, *first["loc"]) if p != "")
    value = first["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f" (value {value!r})"
    known = ""
    if first["type"] == "extra_forbidden":
        known = "; remove it or correct its spelling"
    elif first["type"] == "missing":
        known = "; add it"
    return f"{path}: {field}{shown}: {first['msg']}{known}"


def load(path: Path) -> Params:
    """Read and check the whole tree. Raises UserError naming the file, the field, the value and the remedy."""
    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; run from the project's root or give --params"
        ) from None
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return build(tree, path)


def build(tree: dict[str, Any], path: Path) -> Params:
    """Check a tree read from `path`; see `load`."""
    expected = (
        "dataset",
        "agent",
        "seed",
        "runtime",
        "data",
        *SECTIONS,
        "variants",
        "tune",
        "compare",
    )
    for key in tree:
        if key not in expected:
            raise UserError(unknown(f"{path}: section", str(key), expected))
    for key in expected:
        if key not in tree:
            raise UserError(f"{path}: section {key!r} is missing; add it")
    for key in ("dataset", "agent", "seed"):
        if not isinstance(tree[key], list) or not tree[key]:
            raise UserError(
                f"{path}: {key} (value {tree[key]!r}) must be a list, as in {key}: [{tree[key]}]"
            )
    if not isinstance(tree["data"], dict):
        raise UserError(f"{path}: data must map data set ids to their sources")
    for dataset in map(str, tree["data"]):
        if not DATASET.fullmatch(dataset):
            raise UserError(
                f"{path}: data: the id {dataset!r} names folders, stages and keys: use letters, digits, - and _, "
                "in parts separated by /"
            )
        inside = [other for other in map(str, tree["data"]) if other.startswith(f"{dataset}/")]
        if inside:
            raise UserError(
                f"{path}: data: the files of {inside[0]!r} would lie among those of {dataset!r}; rename one of them"
            )
    for name in SECTIONS:
        section = tree[name]
        if not isinstance(section, dict) or set(section) != {"base", "by_dataset"}:
            raise UserError(f"{path}: {name} must hold exactly `base` and `by_dataset`")
        for pattern, values in section["by_dataset"].items():
            if not fnmatch.filter(tree["data"], str(pattern)):
                raise UserError(unknown(f"{path}: {name}.by_dataset", str(pattern), tree["data"]))
            if not isinstance(values, dict):
                raise UserError(
                    f"{path}: {name}.by_dataset.{pattern} (value {values!r}) must map names to values; "
                    "remove it where there are none"
                )
    cells = {}
    for dataset, source in tree["data"].items():
        values = {name: _of(tree[name], dataset) for name in SECTIONS}
        cell = {"dataset": dataset, "source": source, "runtime": tree["runtime"], **values}
        try:
            cells[dataset] = Cell.model_validate(cell)
        except ValidationError as error:
            raise UserError(_describe(error, path, f"[{dataset}]")) from None
    for dataset in tree["dataset"]:
        if dataset not in cells:
            raise UserError(unknown(f"{path}: dataset", str(dataset), cells))
    try:
        params = Params.model_validate(
            {
                "dataset": tuple(tree["dataset"]),
                "agent": tuple(tree["agent"]),
                "seed": tuple(tree["seed"]),
                "data": {name: cell.source for name, cell in cells.items()},
                "cells": cells,
                "variants": tree["variants"],
                "tune": tree["tune"],
                "compare": tree["compare"],
            }
        )
    except ValidationError as error:
        raise UserError(_describe(error, path, "")) from None
    _check_study(params, path)
    _check_comparison(params, path)
    for dataset in params.dataset:
        for agent in params.agent:
            params.cell(dataset, agent)
    return params


def _check_comparison(params: Params, path: Path) -> None:
    """Its data sets against those there are, and nothing twice."""
    for dataset, compared in params.compare.items():
        if dataset not in params.cells:
            raise UserError(unknown(f"{path}: compare", dataset, params.cells))
        for agent, seeds in compared.items():
            if len(set(seeds)) < len(seeds):
                raise UserError(
                    f"{path}: compare.{dataset}.{agent} (value {seeds}): one stands there twice; remove it"
                )
            params.cell(dataset, agent)


def _check_study(params: Params, path: Path) -> None:
    """The study against its data set's values."""
    tune = params.tune
    if tune.dataset not in params.cells:
        raise UserError(unknown(f"{path}: tune.dataset", tune.dataset, params.cells))
    cell = params.cell(tune.dataset)
    for where, searched in tune.parameters.items():
        default = value_of(cell, where)
        if where == "modip.env_steps":
            raise UserError(f"{path}: tune.parameters {where!r} is the budget: set tune.env_steps")
        if not searched.holds(default):
            raise UserError(
                f"{path}: tune.parameters.{where}: the default of {tune.dataset} (value {default!r}) is not in "
                f"its range of type {searched.type}: change the range so that the study can try the default"
            )
    judged = range(
        cell.evaluation.first_seed, cell.evaluation.first_seed + cell.evaluation.episodes
    )
    if tune.first_seed < judged.stop and judged.start < tune.first_seed + tune.episodes:
        raise UserError(
            f"{path}: tune.first_seed (value {tune.first_seed}): its {tune.episodes} start states are among the final "
            f"evaluation's, {judged.start} to {judged.stop - 1}: choose one further away"
        )
