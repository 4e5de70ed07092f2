"""params.yaml as a typed tree: what is accepted, what is refused, and how a refusal reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from modip import config
from modip.config import (
    Cell,
    Choice,
    FloatRange,
    HyperbandConfig,
    IntRange,
    NoPrunerConfig,
    Params,
    TuneConfig,
    build,
    load,
    value_of,
    with_values,
)
from modip.errors import UserError
from tests.helpers import ROOT, small_cell, small_tree

PARAMS = Path("params.yaml")


def models(of: type[BaseModel]) -> list[type[BaseModel]]:
    """A model and those nested in it."""
    nested = [f.annotation for f in of.model_fields.values()]
    kinds = [kind for kind in nested if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [of, *(inner for kind in kinds for inner in models(kind))]


def message(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        build(tree, PARAMS)
    text = str(caught.value)
    assert text.startswith("params.yaml: ")
    assert "\n" not in text
    return text


def test_the_projects_own_parameters_are_accepted() -> None:
    params = load(ROOT / "params.yaml")
    assert set(params.data) == set(params.cells)
    for name, cell in params.cells.items():
        assert params.cell(name) is cell
        assert cell.dataset == name


TUNED = (IntRange, FloatRange, Choice, HyperbandConfig, NoPrunerConfig)  # of which one is chosen


@pytest.mark.parametrize(
    "model",
    [*models(Cell), *models(TuneConfig), *TUNED],
    ids=lambda model: model.__name__,
)
def test_every_number_is_in_the_file_and_described(model: type[BaseModel]) -> None:
    """No default in code, nothing unknown, nothing written after loading, every value explained."""
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["frozen"]
    assert model.model_config["strict"]
    for name, field in model.model_fields.items():
        assert field.is_required(), name
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        chosen = name in ("type", "pruner")  # by a literal, which says it all
        if model is not Cell and not nested and not chosen:
            assert field.description, f"{model.__name__}.{name}"


def test_a_data_sets_values_override_the_base_and_no_other() -> None:
    tree = small_tree()
    tree["mppi"]["by_dataset"]["toy"] = {"horizon": 2}
    tree["modip"]["base"]["demo_share"] = {"start": 0.5, "end": 0.25}
    tree["modip"]["by_dataset"]["toy"] = {"demo_share": {"end": 0.125}}
    cell = build(tree, PARAMS).cell("toy")
    assert cell.mppi.horizon == 2
    assert cell.mppi.elites == small_cell().mppi.elites
    assert (cell.modip.demo_share.start, cell.modip.demo_share.end) == (0.5, 0.125)


def test_patterns_override_in_the_order_of_the_file() -> None:
    tree = small_tree()
    tree["data"]["d/one"] = tree["data"]["d/two"] = tree["data"]["toy"]
    tree["mppi"]["by_dataset"] = {"d/*": {"horizon": 2, "elites": 5}, "*/one": {"elites": 3}}
    params = build(tree, PARAMS)
    found = {d: (c.mppi.horizon, c.mppi.elites) for d, c in params.cells.items()}
    base = tree["mppi"]["base"]
    assert found == {
        "toy": (base["horizon"], base["elites"]), "d/one": (2, 3), "d/two": (2, 5),
    }  # fmt: skip


def test_every_data_set_is_checked_though_only_one_is_run() -> None:
    tree = small_tree()
    tree["data"]["other"] = tree["data"]["toy"]
    build(tree, PARAMS)
    tree["mppi"]["by_dataset"]["other"] = {"horizon": 9}
    assert "[other]" in message(tree)


def test_the_file_is_read_as_yaml_1_2(tmp_path: Path) -> None:
    """As DVC reads it: 1e-3 is a number, `no` a word."""
    text = (ROOT / "params.yaml").read_text()
    changed = text.replace("updates: 1500,", "updates: 1500, lr: 2e-3,")
    assert changed != text
    (tmp_path / "params.yaml").write_text(changed)
    assert load(tmp_path / "params.yaml").cell("toy").diffusion.lr == 2e-3


def test_a_cell_cannot_be_changed() -> None:
    cell = small_cell()
    with pytest.raises(ValidationError, match="frozen"):
        cell.mppi.horizon = 1  # type: ignore[misc]


VALUES = {
    "unknown key": ({"mppi.horizn": 2}, ["mppi.horizn", "spelling"]),
    "text for a number": ({"mppi.horizon": "2"}, ["mppi.horizon", "'2'", "valid integer"]),
    "a fraction for a count": ({"diffusion.width": 2.5}, ["diffusion.width", "2.5", "integer"]),
    "a flag for a count": ({"diffusion.width": True}, ["diffusion.width", "True"]),
    "a number for a flag": ({"modip.planning": 1}, ["modip.planning", "value 1", "boolean"]),
    "zero": ({"diffusion.lr": 0.0}, ["diffusion.lr", "value 0.0", "greater than 0"]),
    "negative": ({"mppi.penalty": -1.0}, ["mppi.penalty", "-1.0"]),
    "a share above one": ({"modip.keep": 1.5}, ["modip.keep", "1.5", "less than or equal to 1"]),
    "nested": ({"modip.demo_share.start": 2.0}, ["modip.demo_share.start", "2.0"]),
    "nothing": ({"critics.discount": None}, ["critics.discount", "None"]),
    "not a number": ({"critics.reward_offset": float("nan")}, ["critics.reward_offset", "nan"]),
    "infinite": ({"mppi.penalty": float("inf")}, ["mppi.penalty", "inf"]),
    "unknown word": (
        {"mppi.terminal_value": "value"},
        ["mppi.terminal_value", "'value'", "'state_value'", "'policy_action_value'"],
    ),
    "latent not in groups": ({"world_model.latent_dim": 12}, ["world_model.latent_dim", "12", "8"]),
    "chunk shorter than its use": (
        {"chunk.act_steps": 5},
        ["chunk", "act_steps 5", "horizon 4", "at most"],
    ),
    "plan longer than a chunk": (
        {"mppi.horizon": 5},
        ["mppi.horizon 5", "chunk.horizon 4", "lower"],
    ),
    "more sampling than denoising": (
        {"diffusion.sampling_steps": 7},
        ["sampling_steps 7", "denoising_steps 6", "lower"],
    ),
    "final phase beyond the budget": (
        {"modip.final_env_steps": 61},
        ["final_env_steps 61", "env_steps 60", "budget"],
    ),
    "critics without a member each": (
        {"critics.ensemble": 3},
        ["critics.ensemble 3", "world_model.ensemble 2", "multiple"],
    ),
    "a latent the policy cannot read": (
        {"world_model.encoder": "simnorm", "mppi.terminal_value": "policy_action_value"},
        ["policy_action_value", "simnorm", "identity"],
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_wrong_value_is_named_with_its_remedy(name: str) -> None:
    changes, parts = VALUES[name]
    text = message(small_tree(changes))
    for part in ["[toy]", *parts]:
        assert part in text


def _edit(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    tree = small_tree()
    change(tree)
    return tree


TREES: dict[str, tuple[Callable[[dict[str, Any]], object], list[str]]] = {
    "unknown section": (lambda t: t.update(mpi={}), ["'mpi'", "did you mean 'mppi'"]),
    "missing section": (lambda t: t.pop("critics"), ["'critics' is missing", "add it"]),
    "missing value": (lambda t: t["mppi"]["base"].pop("elites"), ["mppi.elites", "add it"]),
    "section without its halves": (
        lambda t: t.update(mppi=t["mppi"]["base"]),
        ["mppi", "base", "by_dataset"],
    ),
    "data set without values": (
        lambda t: t["mppi"]["by_dataset"].update(toy=None),
        ["mppi.by_dataset.toy", "None", "remove it"],
    ),
    "values of no data set": (
        lambda t: t["mppi"]["by_dataset"].update(toi={}),
        ["mppi.by_dataset", "'toi'", "did you mean 'toy'"],
    ),
    "unknown data set": (lambda t: t.update(dataset=["toi"]), ["'toi'", "did you mean 'toy'"]),
    "data set not in a list": (lambda t: t.update(dataset="toy"), ["dataset", "'toy'", "list"]),
    "no data set": (lambda t: t.update(dataset=[]), ["dataset", "list"]),
    "seed not in a list": (lambda t: t.update(seed=0), ["seed", "value 0", "seed: [0]"]),
    "a word for a seed": (lambda t: t.update(seed=["a"]), ["seed", "'a'"]),
    "negative seed": (lambda t: t.update(seed=[-1]), ["seed", "-1"]),
    "data not a mapping": (lambda t: t.update(data=["toy"]), ["data"]),
    "unknown source": (lambda t: t["data"]["toy"].update(source="csv"), ["source", "csv"]),
    "wrong device type": (lambda t: t["runtime"].update(device=0), ["runtime.device", "value 0"]),
    "a comparison on an unknown data set": (
        lambda t: t["compare"].update(toi=t["compare"]["toy"]),
        ["compare", "'toi'", "did you mean 'toy'"],
    ),
    "a comparison without seeds": (
        lambda t: t["compare"]["toy"].update(bc=[]),
        ["compare.toy.bc", "at least 1"],
    ),
    "a comparison with a seed twice": (
        lambda t: t["compare"]["toy"].update(bc=[1, 1]),
        ["compare.toy.bc", "[1, 1]", "twice", "remove it"],
    ),
    "a comparison of nobody": (
        lambda t: t["compare"].update(toy={}),
        ["compare.toy", "1"],
    ),
    "a comparison of nothing": (lambda t: t.update(compare={}), ["compare", "1"]),
    "no threads": (lambda t: t["runtime"].update(threads=0), ["runtime.threads", "value 0"]),
}


@pytest.mark.parametrize("name", TREES)
def test_a_wrong_tree_is_named_with_its_remedy(name: str) -> None:
    change, parts = TREES[name]
    text = message(_edit(change))
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("mppi: [1\n", "not valid YAML"),
        ("mppi: 1\nmppi: 2\n", "not valid YAML"),
        ("- mppi\n", "mapping of sections"),
        ("", "mapping of sections"),
    ],
)
def test_a_file_that_is_no_tree_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=part) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "params.yaml")


def test_an_unknown_cell_is_named() -> None:
    params: Params = build(small_tree(), PARAMS)
    with pytest.raises(UserError, match="did you mean 'toy'"):
        params.cell("toyy")


def test_the_control_trains_as_long_as_modips_policy() -> None:
    cell = small_cell({"modip.env_steps": 100, "modip.final_env_steps": 20})
    assert cell.modip.num_policy_updates == 80 // 2 + 5


def test_sections_are_those_of_a_cell() -> None:
    kinds = set(Cell.model_fields) - {"dataset", "source", "runtime"}
    assert kinds == set(config.SECTIONS)


def test_values_are_put_into_a_cell_by_path_and_checked_whole() -> None:
    cell = small_cell()
    changed = with_values(cell, {"mppi.horizon": 2, "modip.demo_share.start": 0.5})
    assert (changed.mppi.horizon, changed.modip.demo_share.start) == (2, 0.5)
    assert with_values(changed, {"mppi.horizon": 3, "modip.demo_share.start": cell.modip.demo_share.start}) == cell  # fmt: skip
    assert value_of(changed, "modip.demo_share.start") == 0.5
    with pytest.raises(UserError, match=r"^mppi.horizon 5 exceeds chunk.horizon 4"):
        with_values(cell, {"mppi.horizon": 5})
    with pytest.raises(UserError, match=r"^mppi.temperature \(value -1.0\): .*greater than 0"):
        with_values(cell, {"mppi.temperature": -1.0})
    with pytest.raises(UserError, match="'mppi.horizn' is unknown: did you mean 'mppi.horizon'"):
        with_values(cell, {"mppi.horizn": 2})


def test_every_data_sets_cell_comes_back_from_its_values() -> None:
    for cell in load(ROOT / "params.yaml").cells.values():
        assert with_values(cell, {}) == cell
