"""D4RL: one HDF5 file of rows, `observations`, `actions`, `rewards`, `terminals` and, in newer files, `timeouts`.

As D4RL's own loader reads it (d4rl/__init__.py, qlearning_dataset and sequence_dataset): an episode ends at a terminal
or a timeout; in a file without `timeouts`, also where its steps reach the environment's limit. There is no next
observation: a row that ends an episode has no successor. Both flags are kept as recorded, also where one row has both;
an end that is terminated is one whatever the other flag says (nothing is bootstrapped there). A file that ends inside
an episode ends it as truncated. Kitchen files then get the environment's own rewards and ends: modip.data.kitchen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from modip import envs
from modip.data import columns, hdf5, kitchen
from modip.data.episodes import DatasetInfo, Recording, Rows
from modip.data.sources import D4RLSource
from modip.data.units import normalised
from modip.envs import kitchen as kitchen_env
from modip.errors import UserError

KEYS = {
    "observation": "observations",
    "action": "actions",
    "reward": "rewards",
    "terminated": "terminals",
    "truncated": "timeouts",
}


def convert(dataset: str, config: D4RLSource, root: Path, sha256: str) -> Recording:
    """The rows of the file, its actions in the environment's bounds already (both are [-1, 1])."""
    field = f"data.{dataset}.env"
    kitchen.check_source(config.env, kitchen_env.D4RL_IDS, config.path, field)
    info = DatasetInfo(
        dataset=dataset,
        env_id=config.env,
        env_version="D4RL's own environment (gym, mujoco-py), not today's simulator",
        source=config.path,
        licence="CC BY 4.0",
        sha256=sha256,
        description="D4RL (Fu et al. 2020, arXiv 2004.07219)",
    )
    rows = _rows(root, config.path, envs.spec(config.env).max_episode_steps)
    if config.env in kitchen_env.ENV_IDS:
        rows = kitchen.as_played(kitchen.with_successors(rows), config.env, config.path, field)
    return Recording(info, normalised(rows, config.env, config.path, field))


def _rows(path: Path, origin: str, limit: int) -> Iterator[Rows]:
    with hdf5.opened(path, origin) as file:
        named = {name: hdf5.column(file, key) for name, key in KEYS.items()}
        found = {name: column for name, column in named.items() if column is not None}
        missing = [key for name, key in KEYS.items() if name not in found and key != "timeouts"]
        if missing:
            raise UserError(
                f"{origin}: no array {missing[0]} (it has {', '.join(file) or 'nothing'}); a D4RL file has "
                f"{', '.join(KEYS.values())}: for other names use `source: arrays`"
            )
        blocks = columns.read(found, KEYS, origin)
        yield from blocks if "truncated" in found else _limited(blocks, limit)


def _limited(blocks: Iterable[Rows], limit: int) -> Iterator[Rows]:
    """The same rows, truncated where an episode reaches `limit` steps without a flag."""
    steps = 0  # of the episode that goes on in the next block
    for rows in blocks:
        begin = -steps
        for end in [*np.flatnonzero(rows.terminated | rows.truncated), len(rows.reward)]:
            cuts = np.arange(begin + limit - 1, end, limit)
            rows.truncated[cuts] = True
            begin = int(cuts[-1]) + 1 if len(cuts) else begin
            steps, begin = len(rows.reward) - begin, int(end) + 1
        yield rows
