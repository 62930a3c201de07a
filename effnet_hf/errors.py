"""One exception for everything a user can mend; the scripts print it as one line and exit with code 2."""


class UserError(ValueError):
    """Says in one sentence what is wrong, which file or flag it is about, and what to do."""
