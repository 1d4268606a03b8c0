"""A real S3 server on this machine, that can be away for a while: for tests."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from moto.server import ThreadedMotoServer
from pyarrow.fs import S3FileSystem

KEYS = {
    "AWS_ACCESS_KEY_ID": "a-key-for-tests",
    "AWS_SECRET_ACCESS_KEY": "a/secret+for/tests",
    "AWS_REGION": "us-east-1",
}


class S3Server:
    """moto's server on loopback, with one empty bucket."""

    def __init__(self, bucket: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.bucket = bucket
        self._start()
        S3FileSystem(endpoint_override=f"127.0.0.1:{self.port}", scheme="http", allow_bucket_creation=True).create_dir(
            bucket
        )

    @property
    def uri(self) -> str:
        """Of the bucket, with the server as its endpoint."""
        return self.at("")

    def at(self, path: str) -> str:
        """Of a folder in the bucket."""
        where = f"s3://{self.bucket}/{path}".rstrip("/")
        return f"{where}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nobody answers; what is in the bucket stays."""
        self.close()
        try:
            yield
        finally:
            self._start()

    def close(self) -> None:
        """Stop answering."""
        self._server.stop()

    def _start(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()
