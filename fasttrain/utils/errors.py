"""Errors that end a command. Each carries one line for the user: what is wrong, where, and what to do."""

from typing import ClassVar


class CommandError(Exception):
    """A command ends early. exit_status: the exit status of the process."""

    exit_status: ClassVar[int]


class UserError(CommandError):
    """An argument, setting or file is wrong; nothing has started."""

    exit_status = 2


class RunError(CommandError):
    """A run or another task that has started cannot continue."""

    exit_status = 1


class Stopped(CommandError):
    """A signal stopped a run, which has saved a checkpoint; the same command resumes it."""

    exit_status = 75
