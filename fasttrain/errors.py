"""The ways in which a command ends early. Each carries one line for the user: what is wrong, where, and what to do."""


class UserError(Exception):
    """An argument, setting or file is wrong; nothing was started. Exit status 2."""

    exit_status = 2


class Stopped(UserError):
    """A run was asked to stop, by a signal, and has saved where it was. Exit status 75: try again, it goes on."""

    exit_status = 75


class RunError(UserError):
    """A run that had started cannot go on. Exit status 1."""

    exit_status = 1
