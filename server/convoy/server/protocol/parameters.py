"""The parameters of an inference request: its priority and its timeout."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from convoy.server.errors import InvalidRequestError, UnsupportedError

Parameter = bool | int | float | str

_US_PER_S = 1_000_000
_RESERVED = "triton_"


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The options of a request.

    Attributes:
        priority: 1 is the highest; 0 stands for the default level.
        timeout_s: Counted from its arrival; infinity without one.
    """

    priority: int = 0
    timeout_s: float = float("inf")


DEFAULT_OPTIONS = RequestOptions()


def read_options(
    parameters: Mapping[str, Parameter], known: Collection[str] = ()
) -> RequestOptions:
    """Parse a request's parameters; unknown names without a reserved prefix are ignored.

    Args:
        parameters: The parameters of the whole request.
        known: The reserved names (triton_…) that this RPC supports.

    Raises:
        InvalidRequestError: A parameter has a wrong type or value, or an unknown reserved name.
        UnsupportedError: The request is part of a sequence.
    """
    if not parameters:
        return DEFAULT_OPTIONS
    for name in parameters:
        if name.startswith(_RESERVED) and name not in known:
            raise InvalidRequestError(f"parameters: {name!r} is reserved, and not supported here")
    if parameters.get("sequence_id"):
        raise UnsupportedError("parameters: sequence_id: sequences are not supported")
    priority = _at_least_zero("priority", parameters)
    timeout_us = _at_least_zero("timeout", parameters)
    return RequestOptions(priority, timeout_us / _US_PER_S if timeout_us else float("inf"))


def whole_number(where: str, value: Parameter) -> int:
    """Return a parameter that must be a whole number.

    Raises:
        InvalidRequestError: It is not a whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{where}: expected a whole number, got {value!r}")
    return value


def _at_least_zero(name: str, parameters: Mapping[str, Parameter]) -> int:
    value = whole_number(f"parameters: {name}", parameters.get(name, 0))
    if value < 0:
        raise InvalidRequestError(f"parameters: {name}: expected at least 0, got {value}")
    return value
