"""What a request's parameters ask for."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from server.errors import InvalidRequestError, UnsupportedError

Parameter = bool | int | float | str

_US_PER_S = 1_000_000
_RESERVED = "triton_"


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How to serve a request.

    Attributes:
        priority: 1 is served first; 0 means the default level.
        timeout_s: From its arrival; infinity without one.
    """

    priority: int = 0
    timeout_s: float = float("inf")


DEFAULT_OPTIONS = RequestOptions()


def read_options(
    parameters: Mapping[str, Parameter], known: Collection[str] = ()
) -> RequestOptions:
    """Reads a request's parameters; names that mean nothing here are the caller's own.

    Args:
        parameters: Of the request as a whole.
        known: Those of the reserved names, triton_..., that this RPC understands.

    Raises:
        InvalidRequestError: A parameter has a wrong kind or value, or a reserved name that nobody
            understands.
        UnsupportedError: The request is part of a sequence.
    """
    if not parameters:
        return DEFAULT_OPTIONS
    for name in parameters:
        if name.startswith(_RESERVED) and name not in known:
            raise InvalidRequestError(f"parameters: {name!r} is reserved and has no meaning here")
    if parameters.get("sequence_id"):
        raise UnsupportedError("parameters: sequence_id: no model here keeps state")
    priority = _at_least_zero("priority", parameters)
    timeout_us = _at_least_zero("timeout", parameters)
    return RequestOptions(priority, timeout_us / _US_PER_S if timeout_us else float("inf"))


def whole_number(where: str, value: Parameter) -> int:
    """Returns a parameter that must be a whole number.

    Raises:
        InvalidRequestError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{where}: expected a whole number, got {value!r}")
    return value


def _at_least_zero(name: str, parameters: Mapping[str, Parameter]) -> int:
    value = whole_number(f"parameters: {name}", parameters.get(name, 0))
    if value < 0:
        raise InvalidRequestError(f"parameters: {name}: expected at least 0, got {value}")
    return value
