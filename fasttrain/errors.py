"""The two ways a command ends early. Both carry one line for the user: what is wrong, where, and what to do."""


class UserError(Exception):
    """An argument, setting or file is wrong; nothing was started. Exit status 2."""

    exit_status = 2


class RunError(UserError):
    """A run that had started cannot go on. Exit status 1."""

    exit_status = 1
