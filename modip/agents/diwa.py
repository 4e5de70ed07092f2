"""DiWA (Chandra, Nematollahi et al., CoRL 2025, arXiv 2508.03645): DPPO inside the imagination of a frozen world model.

Imagined episodes begin where demonstrations did. At each decision the policy sees the decoded latent and denoises a
chunk; the model answers with rewards and the next latents, and may end the episode. PPO then learns the last K'
sampling steps, as DPPO does (modip/chain_ppo.py), with one more term that keeps the policy where the model was trained:

    loss = clipped PPO loss - bc_coef * E[log pi_pre(x_{k-1} | x_k)]

for the steps x_k that imagined chains went through, x_{k-1} as the learned policy would draw it. No environment step is
taken. Frozen: the world model, to the bit, the clone pi_pre, and the chain's first steps. Learning: the last steps, and
the value of an observation.

What the model gets wrong can be exploited: it shows where imagined returns rise and real ones do not, so the curve and
the evaluation hold the two against each other from the same start states over the same number of steps.

Deviations from the authors' code, each with its reason:
- the world model is this project's ensemble on states, with its own reward and its own chance of an end, in the place of
  an RSSM on images with a success classifier: all agents share it;
- an episode lives in one member, drawn when it begins: there is an ensemble here. `penalty`, for where the members
  disagree, is 0 as in the paper unless params.yaml says more;
- each iteration's episodes begin anew and are cut together, where they bootstrap; the authors' run on for two lengths;
- the BC term's expectation is in closed form and on the policy's own chains, as the paper writes it. The authors' code
  takes the learned policy's log-probability of sampled chains of the clone, and its stored settings switch it off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modip.chain_ppo import ChainPPO
from modip.config import Cell
from modip.diffusion import DiffusionPolicy
from modip.errors import UserError
from modip.imagined import draw_members, live
from modip.replay import Replay
from modip.types import ChunkStep, Metrics, State
from modip.world_model import WorldModel


class DiWA:
    """PPO on the clone `policy` in imagined episodes of `model`, which begin at the observations of `demos`."""

    def __init__(
        self, policy: DiffusionPolicy, model: WorldModel, cell: Cell, demos: Replay, *, seed: int
    ) -> None:
        """Raises UserError for a model whose latents the policy cannot see, or a policy that cannot be fine-tuned so."""
        if cell.world_model.encoder == "simnorm":
            raise UserError(
                f"params.yaml: [{cell.dataset}].world_model.encoder (value 'simnorm'): diwa's policy acts on imagined "
                "observations, and a simnorm latent has none; set it to identity"
            )
        self.config, self.demos = cell.diwa, demos
        self.model = model.requires_grad_(False)
        self.ppo = ChainPPO(
            policy, self.config, demos, streams=self.config.num_envs, decisions=self.config.decisions,
            iterations=self.config.iterations, value_updates=0, bc_coef=self.config.bc_coef, seed=seed,
        )  # fmt: skip
        seen = demos.table[:, : demos.obs_dim]
        first = torch.cat([demos.end.new_zeros(1), demos.end.unique()[:-1]])
        self.starts = seen[first] if self.config.starts == "first" else seen

    offline_left = 0

    @property
    def final(self) -> dict[str, DiffusionPolicy]:
        """What it leaves behind: the clone with its last steps fine-tuned."""
        return {"policy": self.ppo.policy.module}

    @property
    def iteration(self) -> int:
        """How many imagined rollouts have been learned from."""
        return self.ppo.iteration

    def policy(self, obs: Tensor, generator: torch.Generator) -> Tensor:
        policy = self.ppo.policy.module
        return policy.sample(obs, generator)[:, : policy.act_steps]

    def act(self, obs: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """(B, Do) -> (B, Ta, Da); to explore, as it acts in imagination."""
        return self.ppo.act(obs, generator) if explore else self.policy(obs, generator)

    def observe(self, step: ChunkStep) -> None:
        raise RuntimeError("diwa learns in its model's imagination alone")

    def update(self) -> Metrics:
        """One minibatch, after a rollout of imagined episodes where the last one is used up."""
        if self.iteration >= self.config.iterations:
            return {}
        if not self.ppo.full:
            self._imagine()
        return self.ppo.update()

    def _begin(self) -> tuple[Tensor, Tensor]:
        """Latents and members of as many new episodes as run side by side."""
        generator, size = self.ppo.generator, self.config.num_envs
        pick = torch.randint(
            len(self.starts), (size,), generator=generator, device=self.starts.device
        )
        return self.model.encode(self.starts[pick]), draw_members(self.model, size, generator)

    @torch.no_grad()
    def _imagine(self) -> None:
        """Fill a rollout; an episode that ends makes room for a new one."""
        latent, member = self._begin()
        while not self.ppo.full:
            chunk = self.ppo.act(self.model.decode(latent), self.ppo.generator)
            step, latent = live(
                self.model, latent, member, chunk, self.ppo.generator, self.config.penalty
            )
            self.ppo.observe(step)
            ended, (fresh, other) = step.terminated.any(1), self._begin()
            latent = torch.where(ended.unsqueeze(1), fresh, latent)
            member = torch.where(ended, other, member)

    def state_dict(self) -> State:
        frozen = {"clone": self.ppo.base.state_dict(), "model": self.model.state_dict()}
        return {"ppo": self.ppo.state_dict(), **frozen}

    def load_state_dict(self, state: State) -> None:
        self.ppo.load_state_dict(state["ppo"])
        self.ppo.base.load_state_dict(state["clone"])
        self.model.load_state_dict(state["model"])
