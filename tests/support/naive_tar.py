"""Naive twin of `aligncurate.io.tar.tar_members`: `tarfile` reads every header."""

from __future__ import annotations

import io
import tarfile


class _Headers(io.BytesIO):
    """A tar whose headers have at most 1 MiB; the product refuses longer ones as damage."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= 1 << 20:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


def members_by_tarfile(data: bytes) -> list[tuple[str, int, int, str] | str]:
    """(name, offset, size, kind) of the members of a tar, and at the end what is wrong with it, if anything."""
    found: list[tuple[str, int, int, str] | str] = []
    file, tar = _Headers(data), None
    while True:
        try:
            tar = tar or tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115
            member = tar.next()
        except Exception as error:
            cause = str(error) if isinstance(error, tarfile.TarError) else type(error).__name__
            return [*found, f"the tar is damaged or truncated ({cause}); copy it again"]
        if member is None:
            break
        name = member.name.encode("utf-8", "replace").decode()
        if member.size < 0:
            return [*found, f"the tar is damaged ({name} has a negative size); copy it again"]
        sparse = member.issparse()
        kind = "sparse" if sparse else "file" if member.isfile() else "folder" if member.isdir() else "other"
        found.append((member.name, member.offset_data, member.size, kind))
        end = tar.offset - 512 + 1 if sparse else member.offset_data + member.size
        if tar.offset > member.offset_data and end > len(data):
            return [*found, f"the tar ends in the middle of {name} (of {member.size:,} bytes); copy it again"]
    rest = data[tar.offset :][: 2 * tarfile.RECORDSIZE]
    if len(rest) < 512:
        found.append("the tar has no end marker, so it is truncated; copy it again")
    elif rest[:512] != bytes(512):
        found.append(f"the tar is damaged (there is no valid header at byte {tar.offset:,}); copy it again")
    elif any(rest):
        found.append("another tar or other data follows the end of this tar and is not read; split the file")
    return found
