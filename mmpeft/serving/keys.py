"""API keys: who asks, and which finetunes they may ask, from a file.

::

    admin: sk-admin-1f0a...            # loads and unloads finetunes; may ask all
    tenants:
      alice: {key: sk-alice-77c2..., finetunes: [shapes, base]}
      bob: {key: sk-bob-90de..., finetunes: all}
"""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmpeft.errors import MissingFileError, RefusedError
from mmpeft.serving.refusals import HttpError

SHORTEST = 16
"""Characters of a key."""
ALL = "all"


@dataclass(frozen=True)
class Tenant:
    """Whoever has a key."""

    name: str
    finetunes: frozenset[str] | None = None
    """Those that may be asked, "base" for the frozen model among them; None is all."""
    is_admin: bool = False

    def may_ask(self, finetune: str) -> bool:
        return self.finetunes is None or finetune in self.finetunes


ANYONE = Tenant("anyone")
"""Where there is no file of keys."""


@dataclass
class Keys:
    """The keys of a server; none lets everybody ask, and nobody load."""

    digests: list[tuple[bytes, Tenant]] = field(default_factory=list, repr=False)
    """sha256 of each key."""

    def tenant(self, authorization: str | None) -> Tenant:
        """Who sent an Authorization header. Every key is compared, in constant time, whichever fits.

        Raises:
            HttpError: 401, no key or a wrong one.
        """
        if not self.digests:
            return ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        sent = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        found = [tenant for digest, tenant in self.digests if hmac.compare_digest(digest, sent)]
        if not found:
            raise HttpError(
                401,
                "No valid API key: send the header Authorization: Bearer KEY",
                "authentication_error",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found[0]


def require_admin(tenant: Tenant) -> None:
    """Raises:
    HttpError: 403, it is not the admin who asks.
    """
    if not tenant.is_admin:
        raise HttpError(
            403,
            "Only the admin's key loads and unloads finetunes; the server reads it from its file of keys (--keys)",
            "permission_error",
            "admin_only",
        )


def read_keys(path: str | Path) -> Keys:
    """The keys of a file as at the top of this module.

    Raises:
        RefusedError: it cannot be read, has other fields, or a key that is short or given twice.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise MissingFileError(f"{path}: there is no such file of keys") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path} is no YAML: {error}") from None
    _require_fields(content, {"admin", "tenants"}, str(path))
    given: list[tuple[Any, Tenant]] = []
    if "admin" in content:
        given.append((content["admin"], Tenant("admin", is_admin=True)))
    tenants = content.get("tenants") or {}
    if not isinstance(tenants, dict):
        raise RefusedError(
            f"{path}, tenants: found {type(tenants).__name__}; wanted name: {{key, finetunes}}"
        )
    for name, own in tenants.items():
        _require_fields(own, {"key", "finetunes"}, f"{path}, tenants.{name}")
        given.append((own.get("key"), Tenant(str(name), _finetunes(own, f"{path}, tenants.{name}"))))
    keys = [key for key, _ in given]
    for key, tenant in given:
        if not isinstance(key, str) or len(key) < SHORTEST or not key.isascii() or " " in key:
            raise RefusedError(
                f"{path}: the key of {tenant.name} must be a text of at least {SHORTEST} ASCII characters without "
                "spaces, such as `openssl rand -hex 24` prints"
            )
        if keys.count(key) > 1:
            raise RefusedError(f"{path}: {tenant.name} has the key of another; give each its own")
    if not given:
        raise RefusedError(f"{path} has no key: write `admin: KEY` and tenants into it")
    return Keys([(_digest(key), tenant) for key, tenant in given])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _finetunes(own: dict[str, Any], where: str) -> frozenset[str] | None:
    listed = own.get("finetunes")
    if listed == ALL:
        return None
    if not isinstance(listed, list) or not listed or not all(isinstance(name, str) for name in listed):
        raise RefusedError(f"{where}.finetunes is {listed!r}; wanted a list of names, or {ALL}")
    return frozenset(listed)


def _require_fields(content: Any, known: Iterable[str], where: str) -> None:
    if not isinstance(content, dict):
        raise RefusedError(
            f"{where}: found {type(content).__name__}; wanted the fields {', '.join(sorted(known))}"
        )
    if unknown := content.keys() - set(known):
        raise RefusedError(
            f"{where}: no field {min(unknown, key=str)!r}; there are {', '.join(sorted(known))}"
        )
