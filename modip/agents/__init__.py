"""The agents, written out."""

AGENTS = {
    "bc": ("chunk", "diffusion", "critics", "modip"),
    "modip": ("chunk", "diffusion", "world_model", "critics", "mppi", "modip", "evaluation"),
    "dsrl": ("chunk", "diffusion", "critics", "modip", "dsrl", "evaluation"),
}
"""Each with the sections of the parameters that its training reads: a change elsewhere does not make it stale."""
