"""Where a transport does other than the specifications say, and why it stays so.

`judge` holds the tests to this table: a deviation that disappears or changes fails its test.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Deviation(NamedTuple):
    """What a transport does instead.

    Attributes:
        outcome: In the words of `Http2Client.outcome`.
    """

    outcome: str
    reason: str


# The outcome of a test that is not asked of a transport, since it differs from run to run.
VARIES = "varies"


def _deviations(
    transport: str, reason: str, outcomes: Mapping[str, str]
) -> dict[tuple[str, str], Deviation]:
    """Return what several tests find for one reason; `outcomes` is by test."""
    return {(transport, test): Deviation(outcome, reason) for test, outcome in outcomes.items()}


# By transport and test.
DEVIATIONS: dict[tuple[str, str], Deviation] = {
    **_deviations(
        "h2corn",
        "h2corn ends the connection with another error code than the section names.",
        {"test_initial_window_over_the_largest": "GOAWAY PROTOCOL_ERROR"},
    ),
    **_deviations(
        "h2corn",
        "h2corn discards DATA that crosses its reset, but not HEADERS. No gRPC client sends any.",
        {"test_trailers_on_a_stream_that_the_server_reset": "GOAWAY STREAM_CLOSED"},
    ),
    **_deviations(
        "h2corn",
        "h2corn still offers the upgrade by h2c that RFC 9113 removed.",
        {"test_no_upgrade_from_http11": "HTTP/1.1 101"},
    ),
    **_deviations(
        "h2corn",
        "h2corn names the last stream at once and resets later ones, which gRPC clients repeat on "
        "another connection. Its second GOAWAY counts the reset stream.",
        {"test_goaway_in_two_steps": "[1, 3], grpc-status 0, RST_STREAM REFUSED_STREAM"},
    ),
    **_deviations(
        "grpcio",
        "The C core drops frames for a stream that it does not know or that is half-closed.",
        {
            "test_data_on_stream_0": "ignored",
            "test_headers_on_stream_0": "ignored",
            "test_priority_on_stream_0": "ignored",
            "test_rst_stream_on_stream_0": "ignored",
            "test_ping_on_a_stream": "ignored",
            "test_goaway_on_a_stream": "ignored",
            "test_push_promise_from_a_client": "ignored",
            "test_data_on_an_idle_stream": "ignored",
            "test_rst_stream_on_an_idle_stream": "ignored",
            "test_window_update_on_an_idle_stream": "ignored",
            "test_data_on_a_half_closed_stream": "ignored",
            "test_headers_on_a_half_closed_stream": "ignored",
            "test_fifty_requests_on_one_stream": "ignored",
            "test_headers_on_a_closed_stream": "ignored",
            "test_data_on_a_closed_stream": "ignored",
            "test_data_on_a_stream_that_the_client_reset": "ignored",
            "test_headers_on_a_stream_that_the_client_reset": "ignored",
            "test_even_stream_identifier": "ignored",
            "test_stream_identifiers_backwards": "ignored",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core loses the state of compression after a call with an invalid field.",
        {
            "test_trailers_on_a_stream_that_the_server_reset": "ignored",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core knows neither padding nor flags that are undefined; no gRPC client sends them.",
        {
            "test_undefined_flags": "grpc-status 14",
            "test_padded_data": "RST_STREAM PROTOCOL_ERROR",
            "test_data_of_padding_alone": "RST_STREAM PROTOCOL_ERROR",
            "test_data_padding_as_long_as_the_payload": "RST_STREAM PROTOCOL_ERROR",
            "test_padded_data_without_a_length": "RST_STREAM PROTOCOL_ERROR",
            "test_padded_headers_with_priority": "grpc-status 13",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core skips PRIORITY, which RFC 9113 deprecates.",
        {
            "test_priority_of_4_bytes": "ignored",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core counts in 64 bits and lets windows grow over 2^31 - 1.",
        {
            "test_window_of_a_stream_overflows": "ignored",
            "test_window_of_the_connection_overflows": "ignored",
            "test_settings_overflow_the_window_of_a_stream": "ignored",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core ends the call with a status and keeps the connection.",
        {
            "test_index_0": "grpc-status 13",
            "test_index_beyond_the_tables": "grpc-status 13",
            "test_endless_integer": "grpc-status 13",
            "test_integer_without_an_end": "grpc-status 13",
            "test_string_beyond_the_block": "grpc-status 13",
            "test_huffman_padding_of_zeros": "grpc-status 13",
            "test_table_size_over_the_limit": "grpc-status 13",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core decodes blocks that RFC 7541 forbids but that have one meaning.",
        {
            "test_huffman_padding_over_7_bits": "grpc-status 0",
            "test_huffman_end_of_string": "grpc-status 0",
            "test_table_size_after_a_field": "grpc-status 0",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core checks only fields that gRPC uses.",
        {
            "test_pseudo_header_of_a_response": "grpc-status 0",
            "test_pseudo_header_after_a_field": "grpc-status 0",
            "test_two_methods": "grpc-status 0",
            "test_two_schemes": "grpc-status 0",
            "test_two_paths": "grpc-status 0",
            "test_host_that_differs_from_the_authority": "grpc-status 0",
            "test_value_with_a_line_feed": "grpc-status 0",
            "test_value_with_a_carriage_return": "grpc-status 0",
            "test_value_with_a_zero_byte": "grpc-status 0",
            "test_value_that_begins_with_a_space": "grpc-status 0",
            "test_value_that_ends_with_a_tab": "grpc-status 0",
            "test_connection_field": "grpc-status 0",
            "test_keep_alive_field": "grpc-status 0",
            "test_proxy_connection_field": "grpc-status 0",
            "test_transfer_encoding_field": "grpc-status 0",
            "test_upgrade_field": "grpc-status 0",
            "test_content_length_over_the_body": "grpc-status 0",
            "test_content_length_under_the_body": "grpc-status 0",
            "test_content_length_that_is_no_number": "grpc-status 0",
            "test_pseudo_header_in_trailers": "grpc-status 0",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core rejects the call with INTERNAL.",
        {
            "test_unknown_pseudo_header": "grpc-status 13",
            "test_no_websocket_by_http2": "grpc-status 13",
            "test_no_websocket_of_grpc": "grpc-status 13",
            "test_two_authorities": "grpc-status 13",
            "test_connect_with_a_path": "grpc-status 13",
            "test_upper_case_name": "grpc-status 13",
            "test_name_with_a_space": "grpc-status 13",
            "test_name_with_a_colon": "grpc-status 13",
            "test_empty_name": "grpc-status 13",
            "test_te_other_than_trailers": "grpc-status 13",
            "test_no_method": "RST_STREAM INTERNAL_ERROR",
            "test_no_scheme": "RST_STREAM INTERNAL_ERROR",
            "test_no_path": "RST_STREAM INTERNAL_ERROR",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core takes any path for the name of a method, here an unknown one.",
        {
            "test_empty_path": "grpc-status 12",
            "test_path_without_a_slash": "grpc-status 12",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core waits for a message that cannot come any more, until the deadline.",
        {
            "test_content_length_without_a_body": "ignored",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core decodes the whole field as one base64 text.",
        {
            "test_binary_metadata_joined_by_commas": "grpc-status 13",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core closes without a GOAWAY frame, which RFC 9113 only recommends.",
        {
            "test_goaway_names_the_last_stream": "GOAWAY names stream None",
        },
    ),
    **_deviations(
        "grpcio",
        "grpc.aio cancels calls that come after `Server.stop`, also between the two steps.",
        {
            "test_goaway_in_two_steps": "[2147483647, 3], grpc-status 0, grpc-status 1",
        },
    ),
    **_deviations(
        "grpcio",
        "The C core drops a message with an undefined flag, or takes it.",
        {"test_message_with_an_undefined_flag": VARIES},
    ),
    **_deviations(
        "grpcio",
        "The C core reports INTERNAL and does not say what it accepts.",
        {"test_unknown_compression": "grpc-status 13, accepts None"},
    ),
    **_deviations(
        "grpcio",
        "The C core takes any content type for gRPC.",
        {"test_other_content_type": "grpc-status 0"},
    ),
    **_deviations(
        "grpcio",
        "The C core resets the stream with another error code.",
        {"test_client_exceeds_the_window": "RST_STREAM PROTOCOL_ERROR"},
    ),
}
