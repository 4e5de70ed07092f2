"""The agents, written out."""

AGENTS = ("bc", "modip")
