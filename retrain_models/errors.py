"""The ways it can fail, told apart by exit code so that an orchestrator knows what to do about each.

The codes are those of BSD's sysexits.h. What can change by itself is worth retrying; bad data and bad settings are not.
"""


class StepError(Exception):
    """A failure that one sentence explains: what was found, what was expected, what to do."""

    exit_code = 1


class SettingsError(StepError):
    """A setting is unknown, impossible or refused by a server. Never retried."""

    exit_code = 78  # EX_CONFIG


class DataError(StepError):
    """The data or a model is not fit for use. Never retried."""

    exit_code = 65  # EX_DATAERR


class RetryableError(StepError):
    """The world was not ready: a store unreachable, a node lost. Worth another try."""

    exit_code = 75  # EX_TEMPFAIL


class MissingObjectError(StepError):
    """There is no object under this key."""


class ConflictError(StepError):
    """A conditional write lost: somebody else wrote the object first."""


class StoreUnreachableError(RetryableError):
    """The store did not answer, or answered that it is in trouble."""


class StoreRefusedError(SettingsError):
    """The store answered, and will not: credentials, permission, or no such bucket."""
