"""What makes an HTTP request well-formed (RFC 9113, section 8)."""

from tests.edge.conformance.rules import MALFORMED, OK, rule
from tests.edge.frames import (
    DATA,
    EMPTY_MESSAGE,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    WATCH,
    Http2Client,
    frame,
    literal_block,
    request_fields,
)

REGULAR = [("content-type", "application/grpc"), ("te", "trailers")]


@rule("RFC9113-8.3", MALFORMED)
def test_unknown_pseudo_header(client: Http2Client) -> str:
    return _request(client, [(":unknown", "x"), *request_fields()])


@rule("RFC9113-8.3", MALFORMED)
def test_pseudo_header_of_a_response(client: Http2Client) -> str:
    return _request(client, [(":status", "200"), *request_fields()])


@rule("RFC9113-8.3", MALFORMED)
def test_pseudo_header_after_a_field(client: Http2Client) -> str:
    return _request(client, [*REGULAR, *request_fields(content_type=None, te=None)])


@rule("RFC9113-8.3.1", MALFORMED)
def test_no_method(client: Http2Client) -> str:
    return _request(client, request_fields(_method=None))


@rule("RFC9113-8.3.1", MALFORMED)
def test_no_scheme(client: Http2Client) -> str:
    return _request(client, request_fields(_scheme=None))


@rule("RFC9113-8.3.1", MALFORMED)
def test_no_path(client: Http2Client) -> str:
    return _request(client, request_fields(_path=None))


@rule("RFC9113-8.3.1", MALFORMED)
def test_empty_path(client: Http2Client) -> str:
    return _request(client, request_fields(_path=""))


@rule("RFC9113-8.3.1", MALFORMED)
def test_path_without_a_slash(client: Http2Client) -> str:
    return _request(client, request_fields("grpc.health.v1.Health/Check"))


@rule("RFC9113-8.3", MALFORMED)
def test_two_methods(client: Http2Client) -> str:
    return _request(client, [(":method", "POST"), *request_fields()])


@rule("RFC9113-8.3", MALFORMED)
def test_two_schemes(client: Http2Client) -> str:
    return _request(client, [(":scheme", "http"), *request_fields()])


@rule("RFC9113-8.3", MALFORMED)
def test_two_paths(client: Http2Client) -> str:
    return _request(client, [(":path", "/"), *request_fields()])


@rule("RFC9113-8.3.1", MALFORMED)
def test_two_authorities(client: Http2Client) -> str:
    return _request(client, [(":authority", "elsewhere"), *request_fields()])


@rule("RFC9113-8.3.1", MALFORMED)
def test_host_that_differs_from_the_authority(client: Http2Client) -> str:
    return _request(client, request_fields(host="elsewhere"))


@rule("RFC9113-8.3.1", OK)
def test_host_instead_of_the_authority(client: Http2Client) -> str:
    return _request(client, request_fields(_authority=None, host="localhost"))


@rule("RFC9113-8.5", MALFORMED)
def test_connect_with_a_path(client: Http2Client) -> str:
    return _request(client, request_fields(_method="CONNECT"))


@rule("RFC9113-8.2.1", MALFORMED)
def test_upper_case_name(client: Http2Client) -> str:
    return _request(client, [*request_fields(), ("X-Upper", "x")])


@rule("RFC9113-8.2.1", MALFORMED)
def test_name_with_a_space(client: Http2Client) -> str:
    return _request(client, [*request_fields(), ("x name", "x")])


@rule("RFC9113-8.2.1", MALFORMED)
def test_name_with_a_colon(client: Http2Client) -> str:
    return _request(client, [*request_fields(), ("x:name", "x")])


@rule("RFC9113-8.2.1", MALFORMED)
def test_empty_name(client: Http2Client) -> str:
    return _request(client, [*request_fields(), ("", "x")])


@rule("RFC9113-8.2.1", MALFORMED)
def test_value_with_a_line_feed(client: Http2Client) -> str:
    return _request(client, request_fields(x_value="a\nb: c"))


@rule("RFC9113-8.2.1", MALFORMED)
def test_value_with_a_carriage_return(client: Http2Client) -> str:
    return _request(client, request_fields(x_value="a\rb"))


@rule("RFC9113-8.2.1", MALFORMED)
def test_value_with_a_zero_byte(client: Http2Client) -> str:
    return _request(client, request_fields(x_value="a\0b"))


@rule("RFC9113-8.2.1", MALFORMED)
def test_value_that_begins_with_a_space(client: Http2Client) -> str:
    return _request(client, request_fields(x_value=" a"))


@rule("RFC9113-8.2.1", MALFORMED)
def test_value_that_ends_with_a_tab(client: Http2Client) -> str:
    return _request(client, request_fields(x_value="a\t"))


@rule("RFC9113-8.2.2", MALFORMED)
def test_connection_field(client: Http2Client) -> str:
    return _request(client, request_fields(connection="keep-alive"))


@rule("RFC9113-8.2.2", MALFORMED)
def test_keep_alive_field(client: Http2Client) -> str:
    return _request(client, request_fields(keep_alive="timeout=5"))


@rule("RFC9113-8.2.2", MALFORMED)
def test_proxy_connection_field(client: Http2Client) -> str:
    return _request(client, request_fields(proxy_connection="keep-alive"))


@rule("RFC9113-8.2.2", MALFORMED)
def test_transfer_encoding_field(client: Http2Client) -> str:
    return _request(client, request_fields(transfer_encoding="chunked"))


@rule("RFC9113-8.2.2", MALFORMED)
def test_upgrade_field(client: Http2Client) -> str:
    return _request(client, request_fields(upgrade="websocket"))


@rule("RFC9113-8.2.2", MALFORMED)
def test_te_other_than_trailers(client: Http2Client) -> str:
    return _request(client, request_fields(te="gzip"))


@rule("RFC9113-8.2.3", OK)
def test_split_cookie(client: Http2Client) -> str:
    return _request(client, [*request_fields(), ("cookie", "a=b"), ("cookie", "c=d")])


@rule("RFC9113-8.1.1", OK)
def test_content_length_that_matches(client: Http2Client) -> str:
    return _request(client, request_fields(content_length="5"))


@rule("RFC9113-8.1.1", MALFORMED)
def test_content_length_over_the_body(client: Http2Client) -> str:
    return _request(client, request_fields(content_length="6"))


@rule("RFC9113-8.1.1", MALFORMED)
def test_content_length_under_the_body(client: Http2Client) -> str:
    return _request(client, request_fields(content_length="4"))


@rule("RFC9113-8.1.1", MALFORMED)
def test_content_length_that_is_no_number(client: Http2Client) -> str:
    return _request(client, request_fields(content_length="five"))


@rule("RFC9113-8.1.1", MALFORMED)
def test_content_length_without_a_body(client: Http2Client) -> str:
    stream_id = client.new_stream()
    client.headers(stream_id, request_fields(content_length="5"), END_HEADERS | END_STREAM)
    return client.outcome(stream_id)


@rule("RFC9113-8.1", OK)
def test_trailers_of_a_request(client: Http2Client) -> str:
    return _trailers(client, [("x-trailer", "value")], END_HEADERS | END_STREAM)


@rule("RFC9113-8.1", MALFORMED)
def test_headers_within_a_request(client: Http2Client) -> str:
    """Without END_STREAM they are neither the head of the request nor its trailers."""
    return _trailers(client, [("x-trailer", "value")], END_HEADERS)


@rule("RFC9113-8.1", MALFORMED)
def test_pseudo_header_in_trailers(client: Http2Client) -> str:
    return _trailers(client, [(":method", "POST")], END_HEADERS | END_STREAM)


@rule("RFC9113-8.1", {"trailers, then RST_STREAM NO_ERROR"})
def test_reply_before_the_end_of_the_request(client: Http2Client) -> str:
    """The server may ask the client to stop sending by a reset without an error."""
    stream_id = client.open("/unknown/Method")
    client.wait(lambda: client.reply(stream_id).ended)
    client.wait(lambda: client.reply(stream_id).reset is not None)
    reply = client.reply(stream_id)
    assert reply.get("grpc-status") == "12"
    return f"trailers, then {'RST_STREAM NO_ERROR' if reply.reset == 0 else reply.reset}"


@rule("RFC9113-8.4", {"no PUSH_PROMISE"})
def test_no_push(client: Http2Client) -> str:
    client.answer(client.call())
    pushed = [each for each in client.frames if each.type == 5]
    return f"{pushed}" if pushed else "no PUSH_PROMISE"


def _request(client: Http2Client, fields: list[tuple[str, str]]) -> str:
    """Send these fields and the body of a Check."""
    stream_id = client.new_stream()
    client.send(
        frame(HEADERS, END_HEADERS, stream_id, literal_block(fields)),
        frame(DATA, END_STREAM, stream_id, EMPTY_MESSAGE),
    )
    return client.stream_outcome(stream_id)


def _trailers(client: Http2Client, fields: list[tuple[str, str]], flags: int) -> str:
    stream_id = client.open(WATCH if flags == END_HEADERS else "/grpc.health.v1.Health/Check")
    client.data(stream_id, EMPTY_MESSAGE)
    client.headers(stream_id, fields, flags)
    return client.outcome(stream_id)
