"""What one peer may take."""

from dataclasses import dataclass

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Bounds on memory and work, for each connection.

    Attributes:
        max_message_bytes: Of one request or reply message.
        max_calls: Calls that the peer may have under way at a time. As many again may be ending: an
            answered or cancelled call is over for the peer before it is for its handler.
        max_frame_bytes: Largest frame that is taken.
        max_header_bytes: Of one header block, as sent and as decoded.
        stream_window_bytes: What a caller may send on a stream before it hears that it was read.
        connection_window_bytes: The same for all streams of a connection.
        max_unsent_bytes: A peer that lets more replies pile up is disconnected.
    """

    max_message_bytes: int = 16 * _MIB
    max_calls: int = 1024
    max_frame_bytes: int = 128 * 1024
    max_header_bytes: int = 32 * 1024
    stream_window_bytes: int = _MIB
    connection_window_bytes: int = 16 * _MIB
    max_unsent_bytes: int = 64 * _MIB
