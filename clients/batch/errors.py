"""What a batch job raises.

    ClientError
    └── BatchError         the job cannot start or go on; what was done so far is kept
        ├── InputError     the input is missing, empty, changed, or not what its name says
        ├── OutputError    the table cannot be written, or was made by another command
        ├── VersionError   the model version's files cannot be trusted or run
        └── EngineError    the engine is not usable here, or no longer answers

An image that cannot be classified is none of these: it becomes a row with its error.
"""

from clients.errors import ClientError


class BatchError(ClientError):
    """A batch job cannot start or go on."""


class InputError(BatchError):
    """The input is missing, empty, changed, or not what its name says."""


class OutputError(BatchError):
    """The table cannot be written, or belongs to another job."""


class VersionError(BatchError):
    """The files of a model version cannot be trusted or run."""


class EngineError(BatchError):
    """The engine is not usable here, or no longer answers."""
