"""The ways in which a command ends early. Each carries one line for the user: what is wrong, where, and what to do."""

from typing import ClassVar


class Ended(Exception):
    """A command ends before it is done. exit_status: the process's."""

    exit_status: ClassVar[int]


class UserError(Ended):
    """An argument, setting or file is wrong; nothing was started."""

    exit_status = 2


class RunError(Ended):
    """What had started cannot go on."""

    exit_status = 1


class Stopped(Ended):
    """A run was asked to stop, by a signal, and has saved where it was: try again, it goes on."""

    exit_status = 75
