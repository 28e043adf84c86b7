"""The files of a source as streams of bytes: local or behind a URL, compressed (.gz .bz2 .xz .zst) or not.

Remote files are opened by fsspec. Its own decompression is not used: it drops what follows a damaged second stream of a
.bz2 or .xz file, and what follows the first frame of a .zst file. Here every damage and every cut is an error.
"""

import io
import lzma
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ...errors import UserError
from .document import MEMORY_LIMIT, PIECE

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
BLOCK = 1 << 16  # bytes of a compressed file that are read at once

File = Path | str  # a local path, or a URL


def is_url(spec: str) -> bool:
    return bool(re.match("[A-Za-z][A-Za-z0-9+.-]+://", spec))


def suffixes(file: File) -> tuple[str, str]:
    """The suffix that names the format, and the one of the compression or '': rows.jsonl.gz -> ('.jsonl', '.gz')."""
    path = file if isinstance(file, Path) else PurePosixPath(re.split("[?#]", file)[0])
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSED else (last, "")


def unreadable(file: File, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"{file}: cannot be read ({reason}). Check the path and its permissions.")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. UserError where its package is missing."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: {error}. Install the package that is named with pip, and start again.") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}. Use a protocol that fsspec knows: s3://, gs://, hf://, https://.") from error


def opened(file: File) -> BinaryIO:
    """Open a file for reading its bytes, decompressed. UserError when it cannot be opened or, later, read to its end."""
    try:
        if isinstance(file, Path):
            raw: Any = open(file, "rb", buffering=PIECE)  # noqa: SIM115 (the caller closes it)
        else:
            system, path = filesystem(file)
            raw = _Stream(file, system.open(path, "rb"), "Check the network and your permissions.")
    except OSError as error:
        raise unreadable(file, error) from error
    compression = COMPRESSED.get(suffixes(file)[1])
    if compression is None:
        return raw if isinstance(file, Path) else io.BufferedReader(raw, PIECE)
    if compression == "xz":
        stream: Any = _Xz(raw)
    else:
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), compression)
    fix = "The compressed file is damaged or cut off: copy it again, or decompress what is intact and pass that."
    return io.BufferedReader(_Stream(file, stream, fix), PIECE)


def decompressed_copy(file: File) -> Any:
    """A temporary local copy of a file's bytes, decompressed; it is deleted when the object is no longer used."""
    try:
        copy = tempfile.NamedTemporaryFile(prefix="forge-", buffering=PIECE)  # noqa: SIM115
        with opened(file) as stream:
            while block := stream.read(PIECE):
                copy.write(block)
        copy.flush()
    except OSError as error:
        place = tempfile.gettempdir()
        raise UserError(
            f"{file}: cannot be copied to {place} ({error.strerror}). Free space there, or set TMPDIR to a larger disk."
        ) from error
    return copy


class _Stream(io.RawIOBase):
    """A library's stream, whose errors (dozens of types) become a UserError that names the file."""

    def __init__(self, file: File, stream: Any, fix: str):
        self.file = file
        self.stream = stream
        self.fix = fix

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.stream.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.stream.read(len(buffer))
        except UserError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.file}: cannot be read to its end ({reason}). {self.fix}") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
        super().close()


class _Xz(io.RawIOBase):
    """The streams of a .xz file, one after the other, and zeros between them. LZMAFile ignores a damaged second one."""

    def __init__(self, raw: BinaryIO):
        self.raw = raw
        self.stream = self._stream()

    @staticmethod
    def _stream() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY_LIMIT // 4)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self.stream.eof:
                data = self.stream.unused_data.lstrip(b"\0")
                while not data:
                    block = self.raw.read(BLOCK)
                    if not block:
                        return 0
                    data = block.lstrip(b"\0")
                self.stream = self._stream()
            elif self.stream.needs_input:
                data = self.raw.read(BLOCK)
                if not data:
                    raise EOFError("the last stream has no end")
            decoded = self.stream.decompress(data, len(buffer))
            if decoded:
                buffer[: len(decoded)] = decoded
                return len(decoded)

    def close(self) -> None:
        self.raw.close()
        super().close()
