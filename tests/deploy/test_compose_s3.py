"""The compose stack with its model versions in an S3 store, plain and secured, really run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import s3fs

from tests.deploy.compose import BUILD_TIMEOUT_S, Stack, docker, eventually, stack_of

PROJECT = "convoy-compose-s3-test"
REPOSITORY = "s3://bucket/models"
SECRET = "the-secret-of-the-store"
FILES = ("docker-compose.yml", "docker-compose.s3.yml", "tests/deploy/store.yml")
CONFIG = f"""[default]
aws_access_key_id = key
aws_secret_access_key = {SECRET}
region = us-east-1
endpoint_url = http://store:9000
"""

pytestmark = [pytest.mark.compose, pytest.mark.timeout(BUILD_TIMEOUT_S)]


def files_of(stack: Stack) -> s3fs.S3FileSystem:
    """The store's files, as this machine sees them."""
    url = f"http://{stack.address('store', 9000)}"
    return s3fs.S3FileSystem(
        key="key",
        secret=SECRET,
        endpoint_url=url,
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def make_bucket(stack: Stack) -> bool:
    """Says whether the store has answered."""
    with suppress(OSError):
        files_of(stack).mkdir("bucket")
        return True
    return False


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    """Starts a store with an empty bucket, then trainer, server and Prometheus."""
    folder = tmp_path_factory.mktemp("stack")
    (folder / "secrets").mkdir()
    (folder / "secrets" / "aws-config").write_text(CONFIG)
    variables = {"CONVOY_REPOSITORY": REPOSITORY, "CONVOY_POLL_S": "1"}
    with stack_of(PROJECT, folder, *FILES, variables=variables) as stack:
        stack.run("up", "-d", "--build", "store", timeout_s=BUILD_TIMEOUT_S)
        eventually(lambda: make_bucket(stack), 60, "the store has a bucket")
        stack.run("up", "-d", "--build", "server", "prometheus", timeout_s=BUILD_TIMEOUT_S)
        stack.wait_until_healthy()
        yield stack


def test_the_trainer_publishes_to_the_store_and_the_server_serves_from_it(stack):
    assert "bucket/models/digits/1/manifest.json" in files_of(stack).find("bucket/models")
    assert stack.text("exec", "-T", "server", "ls", "/models") == ""
    assert stack.served_versions() == [1]
    assert sum(label == str(digit) for digit, label in enumerate(stack.classify())) >= 8


def test_the_credentials_of_the_store_are_secrets(stack):
    for service in ("trainer", "server"):
        assert SECRET not in json.dumps(stack.inspect(service))


def test_the_trainer_does_not_train_again(stack):
    assert b"nothing to do" in stack.once("train-once")


def test_a_version_in_the_store_is_followed_and_rolled_back(stack):
    stack.once(f"convoy-export /runs/digits/best.pt --repository {REPOSITORY} --name digits")
    stack.wait_for_version(2)
    stack.once(f"convoy-export promote digits 1 --repository {REPOSITORY}")
    stack.wait_for_version(1)


@contextmanager
def store_away(stack: Stack) -> Iterator[None]:
    """Takes the store from the stack's network, which keeps its buckets."""
    network, store = f"{PROJECT}_default", stack.inspect("store")["Id"]
    docker("network", "disconnect", network, store)
    try:
        yield
    finally:
        docker("network", "connect", "--alias", "store", network, store)


def test_the_server_serves_and_starts_while_the_store_is_away(stack):
    labels = stack.classify()
    with store_away(stack):
        errors = "convoy_repository_errors_total > 0"
        eventually(lambda: stack.query(errors), 120, "the server counts scans that failed")
        assert stack.classify() == labels
        stack.run("up", "-d", "--no-build", "--no-deps", "--force-recreate", "server")
        stack.wait_until_healthy()
        assert stack.served_versions() == [1]
        assert stack.classify() == labels
    stack.once(f"convoy-export promote digits 2 --repository {REPOSITORY}")
    stack.wait_for_version(2)


def test_the_secured_stack_serves_from_the_store(stack):
    labels, versions = stack.classify(), stack.served_versions()
    secured = stack.secured()
    secured.start("server", "prometheus")
    assert (secured.classify(), secured.served_versions()) == (labels, versions)
