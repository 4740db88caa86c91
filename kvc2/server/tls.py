"""TLS of the daemon's port, whose clients show certificates where there is a CA for these, and
changed files count at once.

The files are read with each new connection, before its handshake: what is new and good is
used from then on. What can't be used (a key that isn't the certificate's yet, while two files are
replaced one after the other) is told to the log, and the earlier ones stay. Connections that are
open go on as they began. Not here: what a certificate's name may do (callers.py).
"""

from __future__ import annotations

import threading
from typing import Any

import grpc

from kvc2 import errors, events
from kvc2.config import TlsConfig
from kvc2.host.tls import Pems, TlsFiles
from kvc2.metrics import Metrics


class ServerTls:
    """Raises InvalidConfig for files that can't be used. gRPC asks on threads of its own."""

    def __init__(self, files: TlsFiles, metrics: Metrics) -> None:
        self._files = files
        self._asks = files.ca is not None  # gRPC's Python can ask for a certificate or need none
        self._metrics = metrics
        self._lock = threading.Lock()
        try:
            self._seen = files.read()
        except errors.InvalidRequest as error:
            raise errors.InvalidConfig(error.field, error.value, error.allowed) from error

    @classmethod
    def of(cls, config: TlsConfig, metrics: Metrics) -> ServerTls | None:
        """None: the configuration has no TLS."""
        return None if config.files is None else cls(config.files, metrics)

    def credentials(self) -> grpc.ServerCredentials:
        """For one server's port."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._seen), self._changed, require_client_authentication=self._asks
        )

    def _changed(self) -> Any:
        """The files as gRPC wants them, if they are others than before. Raises nothing: the
        connection would be refused."""
        with self._lock:
            try:
                found = self._files.as_they_are()
                if found == self._seen:
                    return None
                self._files.check(found)
            except (errors.InvalidRequest, OSError) as error:  # OSError: no descriptors are left
                self._metrics.fault("tls_files_refused")
                events.warning("tls_files_refused", reason=str(error))
                return None
            self._seen = found
            events.event("tls_files_read")
            return _configuration(found)


def _configuration(found: Pems) -> Any:
    pair = (found.key or b"", found.certificate or b"")  # a daemon has both
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=found.ca)
