"""What a stage computed, on its way between worktrees and machines, by DVC's own means.

Its outputs go through DVC's cache and remote, its entry of dvc.lock by whoever asks for it, and its entry of the
run-cache, by which any later run with the same inputs finds it. DVC's `--pull` and `--run-cache` copy the remote's
whole run-cache for every stage; here only the entry in question travels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from dvc.fs import generic
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.stage.cache import RunCacheNotFoundError, _get_stage_hash
from ruamel.yaml import YAML

from modip.errors import UserError
from modip.files import write_atomically
from pipeline.exchange import faults
from pipeline.workspace import CurableError

LOCK = "dvc.lock"
Entries = dict[str, Any]


# Entries of dvc.lock.


def entries(lock: str) -> Entries:
    """{stage: its entry} of a dvc.lock's text."""
    found = YAML(typ="safe").load(lock) or {}  # by libyaml, which is much faster
    return dict(found.get("stages", {}))


def own(folder: Path) -> Entries:
    """Those of the worktree `folder`."""
    path = folder / LOCK
    return entries(path.read_text()) if path.is_file() else {}


def text(found: Entries) -> str:
    """A dvc.lock of these, as JSON, which is YAML too."""
    return json.dumps({"schema": "2.0", "stages": found}, indent=1) + "\n"


# Between a worktree, the cache and the remote.


def restore(folder: Path, names: Sequence[str], remote: bool) -> list[str]:
    """Bring those of the stages up to date that any run has computed from the same inputs; an order in which each
    follows what it needs. Returns their names."""
    missing, done = set(names), list[str]()
    with _locked(folder) as repo:
        found, graph = _stages(repo), repo.index.graph
        for name in names:
            stage = found[name]
            if any(before.name in missing for before in graph.successors(stage)):
                continue
            if not all(dep.exists for dep in stage.deps):
                continue
            if stage.changed():
                with faults(f"{name}: what was computed before"):
                    if not _restored(repo, stage, remote):
                        continue
                stage.save()
                stage.commit()
                stage.dump(update_pipeline=False)
            missing.remove(name)
            done.append(name)
    return done


def take(folder: Path, found: Mapping[str, Any], names: Iterable[str], remote: bool) -> None:
    """Outputs of stages that `found` holds entries of, into the worktree, its dvc.lock and the run-cache.

    Raises UserError if they are not to be had.
    """
    wanted = list(names)
    with _locked(folder) as repo:
        lock = text(own(folder) | {name: found[name] for name in wanted})
        write_atomically(folder / LOCK, lambda path: path.write_text(lock))
    with _locked(folder) as repo:
        known = _stages(repo)
        for name in wanted:
            stage = known[name]
            if remote:
                with faults(f"{name}: fetching its outputs"):
                    for odb, objects in stage.get_used_objs().items():
                        _complete(name, repo.cloud.pull(objects, odb=odb).failed)
            if not stage.outs_cached():
                raise UserError(
                    f"{name} was computed elsewhere, and its outputs are not in this clone's cache; give all clones one "
                    "DVC remote (dvc remote add --default NAME URL)"
                )
            stage.checkout(force=True)
            if all(dep.exists for dep in stage.deps):  # not where only its outputs are needed
                repo.stage_cache.save(stage)


def give(folder: Path, name: str) -> None:
    """Outputs of a stage that is up to date, and its entry of the run-cache, to the remote."""
    with _locked(folder) as repo:
        stage = _stages(repo)[name]
        with faults(f"{name}: sending its outputs"):
            for odb, objects in stage.get_used_objs().items():
                _complete(name, repo.cloud.push(objects, odb=odb).failed)
            _copy_entry(repo, stage, to_remote=True)


@contextmanager
def _locked(folder: Path) -> Iterator[Repo]:
    # In its folder: DVC makes a stage of what the run-cache holds by a relative path. One thread at a time, by the lock.
    with Repo(str(folder), _wait_for_lock=True) as repo, repo.lock, chdir(folder):
        yield repo


def key(folder: Path, name: str) -> str:
    """The same for a stage with the same command and inputs in any run: the run-cache's own. Its inputs are there."""
    with _locked(folder) as repo:
        return _key(_stages(repo)[name])


def _key(stage: PipelineStage) -> str:
    before = [(dep, dep.hash_info, dep.meta) for dep in stage.deps]
    stage.save_deps()
    found: str = _get_stage_hash(stage)
    for dep, hash_info, meta in before:  # what dvc.lock says: DVC compares with it
        dep.hash_info, dep.meta = hash_info, meta
    return found


def _stages(repo: Repo) -> dict[str, PipelineStage]:
    return {stage.name: stage for stage in repo.index.stages}


def _restored(repo: Repo, stage: PipelineStage, remote: bool) -> bool:
    if remote:
        _copy_entry(repo, stage, to_remote=False)
    try:
        repo.stage_cache.restore(stage, pull=remote)
    except RunCacheNotFoundError:
        return False
    return True


def _complete(name: str, failed: Any) -> None:
    if failed:
        raise CurableError(f"{name}: {len(failed)} of its files did not reach the other side")


def _copy_entry(repo: Repo, stage: PipelineStage, *, to_remote: bool) -> None:
    """A stage's entries of the run-cache (one per result of the same inputs) between here and the remote."""
    key = _key(stage)
    here = repo.cache.legacy
    there = repo.cloud.get_remote_odb(None, "run-cache", hash_name="md5-dos2unix")
    source, target = (here, there) if to_remote else (there, here)
    folder = source.fs.join(source.path, "runs", key[:2], key)
    if not source.fs.exists(folder):
        return
    for path in source.fs.find(folder):
        copy = target.fs.join(target.path, "runs", key[:2], key, source.fs.name(path))
        if not target.fs.exists(copy):
            generic.copy(source.fs, path, target.fs, copy)
