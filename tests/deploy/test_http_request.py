"""A request ends with the answer or in one line, whatever the server does."""

import io
import json
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from deploy.client import TritonDetector
from deploy.errors import UserError
from deploy.serving import http_request, time_limit
from deploy.serving.http_request import send

from .triton_server import answering, serve


def test_a_long_explanation_is_cut():
    body = json.dumps({"error": "a\n\x1b" * 20_000}).encode()
    for content in (body[:200] + b'"}', body):
        with serve(answering(content, 400)) as address, pytest.raises(UserError) as error:
            send(address, None, {})
        assert str(error.value).startswith(f"{address}: 400 ") and len(str(error.value)) < 400


@contextmanager
def dripping(start):
    """A server that sends `start`, then a byte every 0.05 seconds until nobody listens."""
    listener, ended = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def talk():
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(start)
            while not ended.wait(0.05):
                connection.sendall(b"1")

    thread = threading.Thread(target=talk)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    ended.set()
    thread.join()
    listener.close()


@pytest.mark.parametrize(
    "start",
    [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"]
    + [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"]
    + [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1"]
    + [b"HTTP/1.1 500 No\r\n\r\n"],
)
def test_a_byte_now_and_then_does_not_keep_the_client_waiting(start):
    """For a GET and, by the time limit, for a POST."""
    for body, timeout in ((None, 0.3), (b"x", 60)):
        with dripping(start) as address:
            time_limit.limit_time(0.3)
            begun = time.monotonic()
            with pytest.raises(UserError, match=f"no answer from {address}: not whole after 0.3 s"):
                send(address, body, {}, timeout=timeout)
            assert time.monotonic() - begun < 3


def test_part_of_a_body_does_not_pass_for_the_whole():
    """Whoever waits may be slower than whoever reads."""
    late = io.BytesIO(b"part")
    with pytest.raises(TimeoutError, match="not whole after -1 s"):
        http_request._read(late, limit=-1)
    late.seek(0)
    assert http_request._read(late, limit=60) == b"part"


def test_a_body_without_an_end_is_given_up(monkeypatch):
    monkeypatch.setattr(http_request, "_LONGEST", 1000)
    with serve(answering(b"x" * 1001)) as address:
        with pytest.raises(UserError, match="no answer from .*: it is longer than 1000 bytes"):
            send(address, None, {})
    with serve(answering(b"x" * 1000)) as address:
        assert send(address, None, {})[0] == b"x" * 1000


def test_no_server_and_a_silent_one(tmp_path):
    with serve(answering(b"{}")) as address:
        pass
    with pytest.raises(UserError, match=f"no answer from {address}.*refused"):
        TritonDetector(f"{address}/v2/models/toy")
    with serve(lambda *_: time.sleep(0.5) or (200, b"{}", {})) as address:
        with pytest.raises(UserError, match="no answer from .*timed out"):
            send(address, b"x", {}, timeout=0.1)
