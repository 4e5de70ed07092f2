"""These tests run robosuite, and are there only where it is installed (`make robosuite`)."""

from modip.envs import robosuite

collect_ignore_glob = [] if robosuite.installed() else ["test_*.py"]
