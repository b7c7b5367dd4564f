"""Images read together against each read alone: tars, gaps, damage, files, Parquet cells, embedded and remote."""

import hashlib
import io
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aligncurate.dataset import pointers
from aligncurate.dataset.pointers import Pointer, read_images


def tar_rows(path: Path, sizes: list[int], gap: int = 0) -> list[dict]:
    """Rows that point at members of these sizes in a new tar, with members of `gap` bytes between them."""
    rng = random.Random(len(sizes))
    with tarfile.open(path, "w") as tar:
        for number, size in enumerate(sizes):
            for name, length in ((f"{number}.jpg", size), (f"{number}.txt", gap)):
                info = tarfile.TarInfo(name)
                info.size = length
                tar.addfile(info, io.BytesIO(rng.randbytes(length)))
    data = path.read_bytes()
    rows = []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                start = member.offset_data
                image = data[start : start + member.size]
                rows.append(row(str(path), member.name, start, member.size, hashlib.sha256(image).digest()))
    return rows


def row(source: str, name: str | None, start: int | None, length: int | None, digest: bytes | None, image=None) -> dict:
    pointer = {"source": source, "image_path": name, "image_offset": start, "image_length": length}
    return pointer | {"row": None, "sha256": digest, "image": image}


def each(rows: list[dict]) -> list[bytes | str | None]:
    found = []
    for pointer in map(Pointer.of, rows):
        try:
            found.append(pointer.read() if pointer else None)
        except OSError as error:
            found.append(str(error))
    return found


def together(rows: list[dict]) -> list[bytes | str | None]:
    def taken(data):
        return str(data) if isinstance(data, OSError) else None if data is None else bytes(data)

    return [taken(data) for data in read_images(rows)]


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The length of each read from a tar."""
    found: list[int] = []
    into, one = pointers.storage.read_into, pointers.storage.read_range
    monkeypatch.setattr(pointers.storage, "read_into", lambda u, o, b: found.append(len(b)) or into(u, o, b))
    monkeypatch.setattr(pointers.storage, "read_range", lambda u, o, n: found.append(n) or one(u, o, n))
    return found


def test_neighbours_are_read_at_once(tmp_path, reads) -> None:
    rows = tar_rows(tmp_path / "a.tar", [1000, 0, 5000, 1, 70_000, 333], gap=400)
    expected = each(rows)
    reads.clear()
    assert together(rows) == expected
    assert len(reads) == 1


@pytest.mark.parametrize("gap", [0, 60_000, 70_000, 500_000])
def test_any_order_gaps_and_sizes(tmp_path, gap, reads) -> None:
    sizes = [100, 400_000, 3, 700_000, 1_200_000, 50, 2_500_000, 8, 9]
    rows = [*tar_rows(tmp_path / "a.tar", sizes, gap), *tar_rows(tmp_path / "b.tar", sizes[::-1], gap)]
    for seed in range(4):
        assert together(rows) == each(rows)
        random.Random(seed).shuffle(rows)
    rows = [rows[0], rows[0], *rows]
    assert together(rows) == each(rows)
    assert max(reads) == max(sizes)
    together_only = [n for n in reads if n not in sizes]
    assert all(n <= pointers.MAX_READ for n in together_only)
    assert bool(together_only) == (gap <= pointers.MAX_GAP)


def test_damage_fails_only_its_own_row(tmp_path) -> None:
    rows = tar_rows(tmp_path / "a.tar", [3000] * 6)
    rows += tar_rows(tmp_path / "cut.tar", [3000] * 6) + tar_rows(tmp_path / "gone.tar", [3000] * 2)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[rows[2]["image_offset"] + 7] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    cut = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(cut[: rows[9]["image_offset"] + 10])
    (tmp_path / "gone.tar").unlink()
    found = together(rows)
    assert found == each(rows)
    assert [i for i, one in enumerate(found) if isinstance(one, str)] == [2, 9, 10, 11, 12, 13]
    assert "not the one that was scored" in found[2]
    assert "ends after" in found[10]


def test_rows_of_every_kind_beside_each_other(tmp_path) -> None:
    rows = tar_rows(tmp_path / "a.tar", [3000] * 4)
    (tmp_path / "image.jpg").write_bytes(b"a file of its own")
    alone = row(str(tmp_path), str(tmp_path / "image.jpg"), None, None, hashlib.sha256(b"a file of its own").digest())
    # An embedded image may keep the pointer to where it came from.
    embedded = rows[1] | {"image": b"embedded", "sha256": hashlib.sha256(b"embedded").digest()}
    none = row("text.json", None, None, None, None)
    table = pa.table({"jpg": [b"first", b"second", b"third"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    cell = row(str(tmp_path / "a.parquet"), "jpg", None, None, hashlib.sha256(b"third").digest()) | {"row": 2}
    rows = [rows[0], embedded, rows[1], none, rows[2], alone, rows[3], none, cell]
    found = together(rows)
    assert found == each(rows)
    assert found[1::2] == [b"embedded", None, b"a file of its own", None] and found[8] == b"third"
    assert together([]) == []


def test_remote_tars(tmp_path, reads) -> None:
    rows = tar_rows(tmp_path / "a.tar", [3000, 10, 40_000])
    files = fsspec.filesystem("memory")
    files.pipe("/pairs/a.tar", (tmp_path / "a.tar").read_bytes())
    remote = [r | {"source": "memory://pairs/a.tar"} for r in rows]
    assert together(remote) == each(rows)
    assert reads[0] > 43_000


@pytest.mark.parametrize("most", [0, 1 << 30])
def test_row_groups_are_read_once_from_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Images in random order, as training reads them; without room only the last row group is kept."""
    images = [bytes([n]) * (50 + n) for n in range(60)]
    file = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": images}), file, row_group_size=10)
    groups = pointers._RowGroups(most)
    opened: list[str] = []
    real = pointers.open_parquet
    monkeypatch.setattr(pointers, "_row_groups", groups)
    monkeypatch.setattr(pointers, "open_parquet", lambda uri: (opened.append(uri), real(uri))[1])
    order = np.random.default_rng(0).permutation(60).tolist()
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda n: Pointer(file, "image", -1, 0, n, None, None).read(needs_sha256=False), order))
    assert read == [images[n] for n in order]
    if most:
        assert len(opened) <= 6 + 4  # each row group, and a look at what row groups there are by four threads
    assert len(groups._held) <= (6 if most else 4)
    for row, column in ((60, "image"), (3, "none")):
        for _ in range(2):
            with pytest.raises(OSError, match=r"x\.parquet: column"):
                Pointer(file, column, -1, 0, row, None, None).read(needs_sha256=False)
