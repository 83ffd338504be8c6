"""The errors that this package raises, grouped by who can fix the cause.

    ConvoyError
    ├── StartupError              the operator: settings, ports, devices
    │   ├── DeviceError           the device cannot be used
    │   └── RepositoryError       the model repository, or one version in it
    │       ├── ManifestError     the manifest is missing, malformed or of another schema
    │       ├── CanaryError       the version failed its canary
    │       ├── LoadTimeoutError  loading the version took too long
    │       ├── UnreadableError   the storage failed; whether a file exists is unknown
    │       ├── GraphError        the graph is not the one described, or refers to other files
    │       └── VerificationError a file or an output differs from the manifest
    │           ├── SignatureError        the required signature is missing or wrong
    │           └── GoldenSamplesError    the outputs differ
    ├── DeviceMemoryError         the device had no memory for a batch; smaller ones are tried
    └── RequestError              the caller, or the server's state at that moment
        ├── InvalidRequestError   a field, tensor or image is wrong
        ├── UnsupportedError      a feature of the protocol that this server does not support
        ├── ModelNotFoundError    no such model or version is served
        ├── OverloadedError       the queue is full
        ├── DeadlineExceededError the deadline passed, or would pass before the answer
        ├── UnavailableError      the server starts, drains or has stopped
        └── InferenceError        the model failed

`protocol.calls` maps the request errors to status codes. A message names the field, the
expected and the received value; it contains no paths and no internals of the server.
"""

from typing import ClassVar


class ConvoyError(Exception):
    """The base of all errors of this package."""


class StartupError(ConvoyError):
    """The server cannot start with its settings.

    Attributes:
        reason: The label under which versions rejected for it are counted.
    """

    reason: ClassVar[str] = "internal"


class DeviceError(StartupError):
    """The device cannot be used."""

    reason = "device"


class RepositoryError(StartupError):
    """The model repository, or a version in it, cannot be served."""

    reason = "load"


class ManifestError(RepositoryError):
    """A manifest is missing, malformed or of another schema."""

    reason = "manifest"


class GraphError(RepositoryError):
    """A graph has other inputs or outputs than described, or refers to other files."""

    reason = "graph"


class CanaryError(RepositoryError):
    """A version failed its canary."""

    reason = "canary"


class LoadTimeoutError(RepositoryError):
    """Loading a version took longer than it may."""

    reason = "timeout"


class UnreadableError(RepositoryError):
    """The storage of the repository failed; this does not mean that anything was removed.

    Attributes:
        code: The name of the system's error, such as "EACCES".
    """

    reason = "unreadable"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class VerificationError(RepositoryError):
    """A file or an output differs from the manifest."""

    reason = "files"


class SignatureError(VerificationError):
    """The required signature is missing or wrong."""

    reason = "signature"


class GoldenSamplesError(VerificationError):
    """The outputs on this device differ from those of the exported network."""

    reason = "golden samples"


class DeviceMemoryError(ConvoyError):
    """The device had no memory for a batch."""


class RequestError(ConvoyError):
    """One request cannot be answered."""


class InvalidRequestError(RequestError):
    """A field, tensor or image of the request is wrong."""


class UnsupportedError(RequestError):
    """The request uses a feature of its protocol that this server does not support."""


class ModelNotFoundError(RequestError):
    """No model of that name and version is served."""


class OverloadedError(RequestError):
    """The queue is full.

    Attributes:
        retry_after_s: When the queue is expected to have room.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type["OverloadedError"], tuple[str, float]]:
        """Pickle both arguments, for a front end."""
        return type(self), (str(self), self.retry_after_s)


class DeadlineExceededError(RequestError):
    """The request was not, or cannot be, answered before its deadline."""


class UnavailableError(RequestError):
    """The server, or the model, accepts no requests at the moment."""


class InferenceError(RequestError):
    """The model failed on the batch with this request.

    Attributes:
        error_id: The id under which the log has the cause; empty if there is none.
    """

    def __init__(self, message: str, error_id: str = "") -> None:
        super().__init__(message)
        self.error_id = error_id

    def __reduce__(self) -> tuple[type["InferenceError"], tuple[str, str]]:
        """Pickle both arguments, for a front end."""
        return type(self), (str(self), self.error_id)
