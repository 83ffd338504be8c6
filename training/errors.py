"""Everything this package raises on purpose.

    TrainingError
    ├── RecipeError       a setting is unknown, out of range, or does not fit the others
    ├── NetError          no such net, or arguments that it does not take
    ├── DataError         the data set is missing, unreadable, or cannot be learned from
    ├── CheckpointError   a file is no checkpoint, cannot be written, or does not fit its net
    └── DivergedError     the loss became NaN or infinite

The command prints the message as one line; it names the field, what was expected and what came.
"""


class TrainingError(Exception):
    """Base of everything this package raises on purpose."""


class RecipeError(TrainingError):
    """A setting is unknown, out of range, or does not fit the others."""


class NetError(TrainingError):
    """No such net, or arguments that it does not take."""


class DataError(TrainingError):
    """The data cannot be read or cannot be learned from."""


class CheckpointError(TrainingError):
    """A checkpoint is unreadable, unwritable or foreign."""


class DivergedError(TrainingError):
    """Training produced a loss that is not finite."""
