"""Header compression (RFC 7541), and what a broken header block ends."""

import hpack

from tests.edge.conformance.rules import OK, connection_error, rule
from tests.edge.frames import (
    DATA,
    EMPTY_MESSAGE,
    END_HEADERS,
    END_STREAM,
    HEADER_TABLE_SIZE,
    HEADERS,
    Fields,
    Http2Client,
    frame,
    literal_block,
    request_fields,
)

COMPRESSION_ERROR = connection_error("COMPRESSION_ERROR")
DEFAULT_TABLE_BYTES = 4096


def size_update(size: int) -> bytes:
    """A dynamic table size update (RFC 7541, section 6.3)."""
    octets = hpack.hpack.encode_integer(size, 5)
    octets[0] |= 0x20
    return bytes(octets)


@rule("RFC7541-2.3.3", COMPRESSION_ERROR)
def test_index_0(client: Http2Client) -> str:
    return _check(client, b"\x80")


@rule("RFC7541-2.3.3", COMPRESSION_ERROR)
def test_index_beyond_the_tables(client: Http2Client) -> str:
    return _check(client, b"\xff\x20")


@rule("RFC7541-5.1", COMPRESSION_ERROR)
def test_endless_integer(client: Http2Client) -> str:
    return _check(client, b"\xff" + b"\x80" * 100 + b"\x01")


@rule("RFC7541-5.1", COMPRESSION_ERROR)
def test_integer_without_an_end(client: Http2Client) -> str:
    return _check(client, b"\xff\x80")


@rule("RFC7541-5.2", COMPRESSION_ERROR)
def test_string_beyond_the_block(client: Http2Client) -> str:
    return _check(client, b"\x00\x01x\x7f\x10value")


@rule("RFC7541-5.2", COMPRESSION_ERROR)
def test_huffman_padding_over_7_bits(client: Http2Client) -> str:
    """ "a" is five bits; eleven bits of padding follow."""
    return _check(client, b"\x00\x01x\x82\x1f\xff")


@rule("RFC7541-5.2", COMPRESSION_ERROR)
def test_huffman_padding_of_zeros(client: Http2Client) -> str:
    return _check(client, b"\x00\x01x\x81\x18")


@rule("RFC7541-5.2", COMPRESSION_ERROR)
def test_huffman_end_of_string(client: Http2Client) -> str:
    """The symbol EOS is thirty ones."""
    return _check(client, b"\x00\x01x\x84\xff\xff\xff\xff")


@rule("RFC7541-6.3", COMPRESSION_ERROR)
def test_table_size_over_the_limit(client: Http2Client) -> str:
    limit = client.server_settings.get(HEADER_TABLE_SIZE, DEFAULT_TABLE_BYTES)
    return _check(client, size_update(limit + 1), first=True)


@rule("RFC7541-4.2", COMPRESSION_ERROR)
def test_table_size_after_a_field(client: Http2Client) -> str:
    return _check(client, size_update(0))


@rule("RFC7541-4.2", OK)
def test_table_sizes_before_the_fields(client: Http2Client) -> str:
    return _check(client, size_update(0) + size_update(DEFAULT_TABLE_BYTES), first=True)


@rule("RFC7541-6.2", OK)
def test_literals_of_every_kind(client: Http2Client) -> str:
    """Without indexing, never indexed, with Huffman code, with incremental indexing."""
    kinds = [b"\x00\x01x\x01y", b"\x10\x01x\x01y", b"\x00\x81\xf3\x81\xf5", b"\x40\x01x\x01y"]
    return _check(client, b"".join(kinds))


@rule("RFC7541-2.3.2", OK)
def test_fields_from_the_dynamic_table(client: Http2Client) -> str:
    """The second call is references to what the first added, as the encoder makes them."""
    client.answer(client.call(x_name="value"))
    outcome = client.stream_outcome(client.call(x_name="value"))
    assert len(client.encoder.encode(request_fields(x_name="value"))) < 20
    return outcome


@rule("RFC7541-4.4", OK)
def test_field_larger_than_the_table(client: Http2Client) -> str:
    """It empties the table, and is no error."""
    client.answer(client.call(x_large="a" * (DEFAULT_TABLE_BYTES + 1)))
    return client.stream_outcome(client.call())


@rule("RFC7541-4.4", OK)
def test_entries_are_evicted(client: Http2Client) -> str:
    outcomes = {
        client.stream_outcome(client.call(x_number=str(number), x_filler=str(number) * 400))
        for number in range(100)
    }
    return outcomes.pop() if len(outcomes) == 1 else str(sorted(outcomes))


@rule("RFC7541-4.2", OK)
def test_replies_with_a_table_of_0(client: Http2Client) -> str:
    """Replies before fill the table; the decoder then takes no reference to it."""
    for _ in range(3):
        client.answer(client.call())
    client.set({HEADER_TABLE_SIZE: 0})
    client.decoder.max_allowed_table_size = 0
    outcomes = {client.stream_outcome(client.call()) for _ in range(3)}
    assert client.decoder.header_table_size == 0
    return outcomes.pop() if len(outcomes) == 1 else str(sorted(outcomes))


@rule("RFC7541-4.2", OK)
def test_replies_with_a_table_that_shrinks_and_grows(client: Http2Client) -> str:
    outcomes = set()
    for size in (0, 100, 65_536, 50, 4096):
        client.set({HEADER_TABLE_SIZE: size})
        client.decoder.max_allowed_table_size = size
        outcomes |= {client.stream_outcome(client.call()) for _ in range(2)}
    return outcomes.pop() if len(outcomes) == 1 else str(sorted(outcomes))


@rule("RFC9113-4.3", COMPRESSION_ERROR)
def test_broken_block_of_trailers(client: Http2Client) -> str:
    stream_id = client.open()
    client.data(stream_id, EMPTY_MESSAGE)
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, stream_id, b"\x80"))
    return client.outcome(stream_id)


def _check(client: Http2Client, extra: bytes, first: bool = False) -> str:
    """Send a Check whose header block has some bytes added at its end or its beginning."""
    fields: Fields = request_fields()
    block = literal_block(fields)
    stream_id = client.new_stream()
    client.send(
        frame(HEADERS, END_HEADERS, stream_id, extra + block if first else block + extra),
        frame(DATA, END_STREAM, stream_id, EMPTY_MESSAGE),
    )
    return client.stream_outcome(stream_id)
