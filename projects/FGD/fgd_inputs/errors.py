"""The error of every command for what its user can mend."""


class UserError(ValueError):
    """Wrong usage, config, path, data or weights: what was found, where, and what to do."""

    exit_code = 2
