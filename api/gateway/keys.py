"""Who asks: the file of keys, and a middleware that finds a request's tenant in it.

The file holds digests, so that who reads it has no key. A tenant comes from it alone, never from a field or
header that a client writes.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import error_response, http_error
from api.record import record_of
from vlm_serve.errors import AuthenticationError, ConfigurationError

IDENTITY = "vlm_serve.identity"
OPEN_PATHS = frozenset({"/health", "/ready"})
"""What a load balancer asks; they tell nothing but that the server is there."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PERMISSIONS = ("stat", "metrics")


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose a request is and what it may: go before routine ones, read the figures of all tenants."""

    tenant: str = ""
    stat: bool = True
    metrics: bool = True


ANYONE = Identity()
"""Without a file of keys there is one tenant, the operator of the server."""


def identity_of(scope: Scope) -> Identity:
    identity: Identity = scope.get(IDENTITY, ANYONE)
    return identity


class KeyFile:
    """The entries of a file of keys, by digest."""

    def __init__(self, entries: Mapping[str, Identity]) -> None:
        self._entries = dict(entries)

    @property
    def tenants(self) -> tuple[str, ...]:
        """In the order of the file."""
        return tuple(dict.fromkeys(identity.tenant for identity in self._entries.values()))

    @classmethod
    def read(cls, path: Path) -> "KeyFile":
        """A YAML or JSON list of entries: `{sha256: …, tenant: …, stat: true, metrics: true}`.

        Raises:
            ConfigurationError: it cannot be read, or says which entry is wrong.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            raise ConfigurationError(f"The file of keys {path} cannot be read. Check --api-keys.") from None
        except yaml.YAMLError:
            raise ConfigurationError(f"The file of keys {path} is neither YAML nor JSON.") from None
        if not isinstance(content, list) or not content:
            raise ConfigurationError(f"The file of keys {path} must be a list with an entry for each key.")
        entries: dict[str, Identity] = {}
        for number, entry in enumerate(content, 1):
            digest, identity = _entry(entry, f"Entry {number} of {path}")
            if digest in entries:
                raise ConfigurationError(f"Entry {number} of {path} has the key of an entry before it.")
            entries[digest] = identity
        return cls(entries)

    def identify(self, key: str) -> Identity | None:
        """Whose key it is. All entries are compared, each in constant time: the answer's time tells nothing."""
        digest = key_digest(key)
        found = None
        for known, identity in self._entries.items():
            if hmac.compare_digest(known, digest):
                found = identity
        return found


def _entry(entry: Any, name: str) -> tuple[str, Identity]:
    if not isinstance(entry, dict) or not {"sha256", "tenant"} <= set(entry) <= {"sha256", "tenant", *_PERMISSIONS}:
        raise ConfigurationError(f"{name} must have sha256 and tenant, and may have {' and '.join(_PERMISSIONS)}.")
    for field in ("sha256", "tenant"):
        # YAML makes 8 of `010` and false of `no`: two tenants would be one.
        if not isinstance(entry[field], str):
            raise ConfigurationError(f"{name}: {field} is not text to YAML. Put it in quotes.")
    digest, tenant = entry["sha256"].lower(), entry["tenant"]
    permissions = {permission: entry.get(permission, False) for permission in _PERMISSIONS}
    if not _DIGEST.fullmatch(digest):
        raise ConfigurationError(f"{name}: sha256 must be 64 hexadecimal digits. vlm-serve make-key prints the line.")
    if not _TENANT.fullmatch(tenant):
        raise ConfigurationError(f"{name}: tenant must be a word of letters, digits, dots, dashes and underscores.")
    if not all(isinstance(value, bool) for value in permissions.values()):
        raise ConfigurationError(f"{name}: {' and '.join(_PERMISSIONS)} must be true or false.")
    return digest, Identity(tenant, **permissions)


def key_digest(key: str) -> str:
    """What the file holds of a key. A key is 256 random bits: a plain hash cannot be searched."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def make_key(tenant: str, **permissions: bool) -> tuple[str, str]:
    """A new key, and its line for the file.

    Raises:
        ConfigurationError: the tenant is not a plain word.
    """
    key = f"vs-{secrets.token_urlsafe(32)}"
    entry: dict[str, Any] = {"sha256": key_digest(key), "tenant": tenant}
    entry |= {name: True for name, given in permissions.items() if given}
    _entry(entry, "The new entry")
    return key, "- " + yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=1000).strip()


class KeyCheck:
    """Lets pass what carries a known key in `Authorization: Bearer …`, and notes whose it is."""

    def __init__(self, app: ASGIApp, keys: KeyFile) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            identity = self.keys.identify(key.strip()) if kind.lower() == "bearer" else None
            if identity is None:
                refusal = AuthenticationError("Send a key of this server: Authorization: Bearer KEY.")
                record_of(scope).facts["error"] = http_error(refusal).code or ""
                await error_response(refusal)(scope, receive, send)
                return
            scope[IDENTITY] = identity
            record_of(scope).facts["tenant"] = identity.tenant
        await self.app(scope, receive, send)
