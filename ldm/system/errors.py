"""Errors that several packages raise and one place reports."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run can't continue; the message says why and what to do. Everything that was saved can be resumed."""


class NoSpaceError(OSError):
    """The disk is too small for what is to be stored."""
