"""Who gives way when requests want more bytes than there are."""

import pytest

from convoy.server.edge.limits import ByteBudget, Holder, IncompleteRequest


class Upload(IncompleteRequest):
    """A request whose body is not complete."""

    def __init__(self, budget: ByteBudget, size: int) -> None:
        super().__init__()
        self.ended = False
        assert budget.take(size, self)
        budget.incomplete.add(self)

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def budget() -> ByteBudget:
    return ByteBudget(800)


def test_the_largest_incomplete_requests_are_ended_first(budget: ByteBudget) -> None:
    uploads = [Upload(budget, size) for size in (100, 400, 300)]
    assert budget.take(50, Holder())
    assert [upload.ended for upload in uploads] == [False, True, False]
    assert budget.used_bytes == 450


def test_room_is_made_for_more_than_one_request(budget: ByteBudget) -> None:
    uploads = [Upload(budget, 10) for _ in range(80)]
    assert budget.take(1, Holder())
    # An eighth of the bound.
    assert sum(upload.ended for upload in uploads) == 10


def test_the_largest_does_not_push_out_others(budget: ByteBudget) -> None:
    small, large = Upload(budget, 300), Upload(budget, 400)
    assert not budget.take(200, large)
    assert not small.ended
    assert budget.used_bytes == 700


def test_complete_requests_do_not_give_way(budget: ByteBudget) -> None:
    complete, late = Holder(), Holder()
    assert budget.take(700, complete)
    assert not budget.take(200, late)
    budget.release(complete)
    assert budget.take(200, late)
    assert budget.used_bytes == 200


def test_what_was_ended_gives_its_bytes_back_once(budget: ByteBudget) -> None:
    upload = Upload(budget, 800)
    assert budget.take(100, Holder())
    budget.release(upload)
    assert budget.used_bytes == 100


def test_a_reply_counts_until_nothing_refers_to_it(budget: ByteBudget) -> None:
    budget.max_bytes = 10_000
    reply = budget.reply(bytes(8_000))
    assert reply == bytes(8_000)
    assert budget.reply(bytes(3_000)) is None
    del reply
    assert budget.reply(bytes(3_000)) == bytes(3_000)


def test_a_small_reply_needs_no_room_but_many_on_a_stream_do(budget: ByteBudget) -> None:
    assert budget.take(800, Holder())
    assert budget.reply(bytes(100)) == bytes(100)
    assert budget.reply(bytes(100), streams=True) is None
