"""Names of files at URLs, and what a message shows of them."""

import pytest

from convoy.client.urls import identity, shown, without_secrets


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://user:pass@host:8443/a/b.png?sig=1&x=a b", "https://host:8443/a/b.png"),
        ("https://token@host/b.png", "https://host/b.png"),
        ("http://user:p@ss@host/b.png", "http://host/b.png"),
        ("HTTPS://user:pass@host/b.png?sig=1", "HTTPS://host/b.png"),
        ("s3://key:secret@bucket/what?.png", "s3://bucket/what?.png"),
        ("abfs://container@account/b.png", "abfs://container@account/b.png"),
        ("zip://b.png::https://user:pass@host/a.zip?sig=1", "zip://b.png::https://host/a.zip"),
        ("folder/what?@x:y.png", "folder/what?@x:y.png"),
    ],
)
def test_a_name_is_shown_without_secrets(name, expected):
    assert shown(name) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("https://u:p@h/a?sig=1: No such file", "https://h/a: No such file"),
        ("404, url='https://u:p@h/a?sig=1'", "404, url='https://h/a'"),
        ("(http://h/a?x=1, http://h/b?x=2)", "(http://h/a, http://h/b)"),
        ("what? nothing", "what? nothing"),
    ],
)
def test_a_message_shows_urls_without_secrets(message, expected):
    assert without_secrets(message) == expected


def test_files_that_differ_in_their_query_have_different_identities():
    names = [f"https://user:pass@host/a?id={number}" for number in (1, 2)]
    assert len({identity(name) for name in names}) == 2
    assert all(identity(name).startswith("https://host/a?sha256=") for name in names)
    assert identity("https://user:pass@host/a") == "https://host/a"
