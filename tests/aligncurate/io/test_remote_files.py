"""Remote files read as open files: the same bytes as in memory, in few requests, from servers of all kinds."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from aligncurate.io import retries, storage
from aligncurate.io.daemons import in_thread
from tests.support.web import Server, serving

DATA = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture
def web() -> Iterator[Server]:
    with serving() as server:
        server.files["/a"] = DATA
        yield server


@pytest.fixture(params=["web", "http"])
def uri(web: Server, request: pytest.FixtureRequest) -> str:
    """The file through a synchronous and through an asynchronous file system."""
    if request.param == "http":
        pytest.importorskip("aiohttp")
    return f"{request.param}://{web.address}/a"


def gets(web: Server) -> int:
    return sum(method == "GET" for method, _ in web.requests)


def test_any_reads_give_the_bytes_of_a_file_in_memory(uri) -> None:
    rng, twin = random.Random(0), io.BytesIO(DATA)
    with storage.open_file(uri) as file:
        for _ in range(60):
            place, size = rng.choice((0, len(DATA) - 9, rng.randrange(len(DATA)))), rng.choice((1, 600, 300_000))
            assert file.seek(place) == twin.seek(place)
            for _ in range(rng.randrange(4)):
                assert file.read(size) == twin.read(size)
                assert file.tell() == twin.tell()


def test_reading_in_order_takes_few_requests(web, uri) -> None:
    with storage.open_file(uri) as file:
        pieces = []
        while piece := file.read(10_000):
            pieces.append(piece)
    assert b"".join(pieces) == DATA
    assert gets(web) <= 6  # of 256, 512, 1024 … KiB


def test_a_look_at_the_beginning_is_one_small_request(web, uri) -> None:
    with storage.open_file(uri) as file:
        assert file.read(100) == DATA[:100]
    assert gets(web) == 1


@pytest.mark.parametrize(("ranges", "tells_size"), [(False, True), (True, False), (False, False)])
def test_a_server_without_ranges_or_sizes(web, ranges, tells_size) -> None:
    pytest.importorskip("aiohttp")
    web.ranges, web.tells_size = ranges, tells_size
    uri = f"http://{web.address}/a"
    assert storage.read(uri) == DATA
    with storage.open_file(uri) as file:
        file.seek(2_000_000)
        assert file.read(10) == DATA[2_000_000:2_000_010]
        file.seek(5)
        assert file.read(10) == DATA[5:15]
    assert storage.read_range(uri, 100, 50) == DATA[100:150]


@pytest.mark.parametrize("fault", [503, 429, "reset", "short"])
def test_a_fault_at_any_request_of_one_file(web, uri, fault) -> None:
    assert storage.read(uri) == DATA
    for number in range(len(web.requests)):
        web.begin({number: fault})
        assert storage.read(uri) == DATA, number


def test_a_request_without_an_answer_is_given_up_and_made_again(web, uri, monkeypatch) -> None:
    monkeypatch.setattr(retries, "_timeout", 1.0)
    web.begin({0: "hang", 2: "hang"})
    assert storage.read(uri) == DATA


def test_a_large_range_is_read_in_pieces(web, uri, monkeypatch) -> None:
    monkeypatch.setattr("aligncurate.io.remote._MOST", 100_000)
    assert storage.read_range(uri, 50, 950_000) == DATA[50:950_050]
    assert gets(web) == 10


def test_threads_are_used_again(uri) -> None:
    storage.read(uri)
    names = {thread.ident for thread in threading.enumerate() if thread.name == "request"}
    for _ in range(50):
        storage.read_range(uri, 0, 1000)
    assert {thread.ident for thread in threading.enumerate() if thread.name == "request"} <= names
    assert in_thread(lambda: 3).result() == 3
