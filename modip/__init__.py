"""MODIP: improve a diffusion policy by planning in a learned world model and distilling the plans."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modip.artifacts import Policy, load_policy

__all__ = ["Policy", "load_policy"]


def __getattr__(name: str) -> Any:
    """What is exported, imported when it is asked for: torch takes a second, and not every program needs it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from modip import artifacts

    return getattr(artifacts, name)
