"""The errors that this package raises.

    TrainingError
    ├── RecipeError       a setting is unknown, out of range, or does not fit the others
    ├── NetError          unknown net, or arguments that it does not accept
    ├── DataError         the data set is missing, unreadable, or unsuitable for training
    ├── CheckpointError   a file is not a checkpoint, cannot be written, or does not fit its net
    └── DivergedError     the loss became NaN or infinite

The command prints the message as one line; it names the field, the expected and the received value.
"""


class TrainingError(Exception):
    """Base of the errors that this package raises."""


class RecipeError(TrainingError):
    """A setting is unknown, out of range, or does not fit the others."""


class NetError(TrainingError):
    """The net is unknown, or does not accept an argument."""


class DataError(TrainingError):
    """The data cannot be read, or is unsuitable for training."""


class CheckpointError(TrainingError):
    """A checkpoint is unreadable, cannot be written, or belongs to another net."""


class StoppedError(TrainingError):
    """The run was stopped by request; the trainer's state is complete."""


class DivergedError(TrainingError):
    """Training produced a loss that is not finite."""
