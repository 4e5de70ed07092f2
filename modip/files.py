"""Writing a file whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modip.errors import UserError

MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"
"""The files of a checkpoint (modip.checkpoint), for those who read them without torch."""


def write_atomically(path: Path, write_file: Callable[[Path], object]) -> None:
    """Lets `write_file` fill a temporary file beside `path`, then renames it.

    Raises UserError, with nothing left behind, where the disk is full or not writable.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(path.suffix, f".{path.stem}.", path.parent)
        temporary = Path(name)
        os.fchmod(descriptor, 0o644)
        os.close(descriptor)
        write_file(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as problem:
        raise UserError(
            f"{path}: cannot be written: {problem.strerror or problem}; free disk space or make "
            f"{path.parent} writable, then run again"
        ) from problem
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Atomic and strict: NaN is an error."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda to: to.write_text(text))
