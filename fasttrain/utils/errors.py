"""The ways in which a command ends early. Each carries one line for the user: what is wrong, where, and what to do."""

from typing import ClassVar


class CommandError(Exception):
    """A command ends before it is done. exit_status: the process's."""

    exit_status: ClassVar[int]


class UserError(CommandError):
    """An argument, setting or file is wrong; nothing was started."""

    exit_status = 2


class RunError(CommandError):
    """What had started cannot go on."""

    exit_status = 1


class Stopped(CommandError):
    """A run was asked to stop, by a signal, and has saved where it was: try again, it goes on."""

    exit_status = 75
