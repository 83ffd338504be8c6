"""Everything this package raises on purpose, split by who can mend it.

    ConvoyError
    ├── StartupError              whoever starts the server: settings, ports, devices
    │   ├── DeviceError           the device asked for is not usable here
    │   └── RepositoryError       the model repository, or one version in it
    │       ├── ManifestError     the manifest is missing, malformed or from another schema
    │       ├── CanaryError       it did not stand its trial on live requests
    │       ├── GraphError        the graph is not the one described, or reaches outside its file
    │       └── VerificationError a file or an answer differs from what the manifest promises
    │           ├── SignatureError        the required signature is missing or wrong
    │           └── GoldenSamplesError    the answers differ
    ├── DeviceMemoryError         the device had no memory for a batch; smaller ones are tried
    └── RequestError              whoever sent the request, or the server's state at that moment
        ├── InvalidRequestError   a field, tensor or image is wrong
        ├── UnsupportedError      a feature of the protocol that is not offered here
        ├── ModelNotFoundError    no such model or version is served
        ├── OverloadedError       the queue is full
        ├── DeadlineExceededError the answer would come, or did not come, before the deadline
        ├── UnavailableError      starting, draining or shut down
        └── InferenceError        the model itself failed

`protocols.calls` maps the second half to gRPC status codes. Messages name the field, what was
expected and what came; they hold no paths and no internals of the server.
"""

from typing import ClassVar


class ConvoyError(Exception):
    """Base of everything this package raises on purpose."""


class StartupError(ConvoyError):
    """The server cannot start as it was asked to.

    Attributes:
        reason: What a refused version is counted under.
    """

    reason: ClassVar[str] = "internal"


class DeviceError(StartupError):
    """The device that was asked for cannot be used."""

    reason = "device"


class RepositoryError(StartupError):
    """The model repository, or a version in it, cannot be served."""

    reason = "load"


class ManifestError(RepositoryError):
    """A manifest is missing, malformed or written for another schema."""

    reason = "manifest"


class GraphError(RepositoryError):
    """A graph has other inputs or outputs than described, or needs more than its file."""

    reason = "graph"


class CanaryError(RepositoryError):
    """A version did not stand its trial on live requests."""

    reason = "canary"


class VerificationError(RepositoryError):
    """A file or an answer differs from what the manifest promises."""

    reason = "files"


class SignatureError(VerificationError):
    """The signature that is required is missing or not of this manifest."""

    reason = "signature"


class GoldenSamplesError(VerificationError):
    """The answers on this device are not those of the net that was exported."""

    reason = "golden samples"


class DeviceMemoryError(ConvoyError):
    """The device had no memory for a batch."""


class RequestError(ConvoyError):
    """One request cannot be answered."""


class InvalidRequestError(RequestError):
    """A field, tensor or image of the request is wrong."""


class UnsupportedError(RequestError):
    """The request uses a feature of its protocol that this server does not offer."""


class ModelNotFoundError(RequestError):
    """No model of that name and version is served."""


class OverloadedError(RequestError):
    """The queue holds as many images as it may.

    Attributes:
        retry_after_s: When it is expected to have room again.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type["OverloadedError"], tuple[str, float]]:
        """Pickles both arguments, for a front end."""
        return type(self), (str(self), self.retry_after_s)


class DeadlineExceededError(RequestError):
    """The request cannot be answered before its deadline, or was not."""


class UnavailableError(RequestError):
    """The server, or the model, does not take requests at the moment."""


class InferenceError(RequestError):
    """The model failed on the batch that held this request."""
