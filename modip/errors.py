"""The one exception for bad input by the user."""

from __future__ import annotations


class UserError(Exception):
    """Bad input by the user: the message names the file or field, the value and the remedy.

    The stage programs print it as one line, `error: ...`, and end with status 2.
    """
