"""What the operator sets (kv_connector_extra_config) and what a request may say
(kv_transfer_params). Nothing here needs vLLM."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import re
from collections.abc import Mapping
from typing import Any

import grpc

from ..credentials import Credentials
from ..errors import PrefilldError
from ..pull import Lease
from ..sparsity import METHODS, REPORT_LEVELS, Policy, policy_message
from ..transport import TRANSPORTS

POLICY_KEYS = tuple(Policy.__annotations__)
SPARSE_BY_DEFAULT = "joint"  # what prefilld runs when no method is named
_ID_BYTES_MAX = 128
_NUMBERS_END = 2**64  # of a lease
_CREDENTIALS = tuple(field.name for field in dataclasses.fields(Credentials))
_HOST = re.compile(r"[0-9A-Za-z_.-]+|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_PATTERN = re.compile(r"[0-9A-Za-z_.:\[\]/-]{1,255}", re.ASCII)


class BadParams(ValueError):
    """What a request said cannot be used; names the key, the value and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """kv_connector_extra_config. Every key is optional.

    target: HOST:PORT of prefilld, or a list of them; the first is the default. Without it no
        prompt is sent away by the connector itself.
    allowed_targets: which others a request may name, for leases that a router hands over: a list
        of HOST:PORT, HOST (with any port), networks such as 10.0.0.0/8 (of targets that are IP
        addresses) and .SUFFIX of host names. Default: none.
    tls_ca, tls_cert, tls_key, token_file, server_name: see prefilld.Credentials; default: the
        environment's. Of every target.
    model: prefilld's name of the model; default: the only one that it serves.
    method, gamma, ...: the policy of Prefill calls (see prefilld.Policy); default: the server's.
    min_tokens: prompts with fewer tokens left to compute (after vLLM's own prefix cache) stay
        here; default 128, one KV block.
    timeout_s: seconds from the start of a load to its end, at most; then it has failed. 600:
        prompts that arrive together wait for each other. A server that hangs is noticed within a
        minute.
    max_loads: loads at a time; others wait. 16.
    transport: "grpc", "posix_shm" or "cuda_ipc" (where vLLM runs on a GPU that reaches prefilld's);
        default: the best that both sides have.
    share_sparse_prefixes: whether blocks of a sparse method serve other prompts that begin alike,
        under the same policy. They depend on the end of the prompt that they were computed for.
        False: only the same prompt.
    """

    targets: tuple[str, ...] = ()
    allowed_targets: tuple[str, ...] = ()
    credentials: Credentials = dataclasses.field(default_factory=Credentials.from_env)
    model: str | None = None
    policy: Policy = dataclasses.field(default_factory=Policy)
    min_tokens: int = 128
    timeout_s: float = 600.0
    max_loads: int = 16
    transport: str | None = None
    share_sparse_prefixes: bool = False

    @classmethod
    def from_config(cls, extra: Mapping[str, Any]) -> Settings:
        """ValueError names the key that is wrong."""
        known = {"target", "allowed_targets", "model", "min_tokens", "timeout_s", "max_loads",
                 "transport", "share_sparse_prefixes", *_CREDENTIALS, *POLICY_KEYS}
        unknown = sorted(set(extra) - known)
        if unknown:
            raise ValueError(f"kv_connector_extra_config: unknown {', '.join(unknown)}; known are "
                             f"{', '.join(sorted(known))}")
        target = extra.get("target") or ()
        targets = tuple(target) if isinstance(target, (list, tuple)) else (target,)
        transport = extra.get("transport")
        if transport is not None and (not isinstance(transport, str)
                                      or transport not in TRANSPORTS):
            raise ValueError(f"transport {transport!r} is not one of {', '.join(TRANSPORTS)}")
        share = extra.get("share_sparse_prefixes", False)
        if not isinstance(share, bool):
            raise ValueError(f"share_sparse_prefixes {share!r} is neither true nor false")
        try:
            return cls(
                targets=tuple(_target(t) for t in targets),
                allowed_targets=_patterns(extra.get("allowed_targets", ())),
                credentials=_credentials(extra), share_sparse_prefixes=share,
                model=_name(extra, "model"),
                policy=_policy(extra), min_tokens=_integer(extra, "min_tokens", 128, 1),
                timeout_s=_seconds(extra, "timeout_s", 600.0),
                max_loads=_integer(extra, "max_loads", 16, 1), transport=transport)
        except BadParams as error:
            raise ValueError(f"kv_connector_extra_config: {error}") from None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the KV of one request comes here: by a Prefill of our own, or by a lease that a router
    handed over. `error`: by neither, the load will fail with this."""

    target: str = ""
    model: str | None = None
    policy: Policy = dataclasses.field(default_factory=Policy)
    min_tokens: int = 1
    lease: Lease | None = None
    fingerprint: str = ""   # of the lease's model, as the router got it at admission
    error: str = ""

    @property
    def sparse(self) -> str:
        """Names the policy where blocks may have been skipped, else empty."""
        method = self.policy.get("method") or SPARSE_BY_DEFAULT
        if method == "dense":
            return ""
        return ",".join([method, *(f"{key}={value}" for key, value in sorted(self.policy.items())
                                   if key not in ("method", "report_level"))])


def plan_request(params: Mapping[str, Any] | None, settings: Settings) -> Plan | None:
    """None: the request is vLLM's alone.

    params: kv_transfer_params. Handed over: {target, lease, tokens, fingerprint}, lease as
    prefilld.Lease has it. Otherwise each of target, model, min_tokens and the policy's keys stands
    in for the setting of that name.
    """
    params = params or {}
    try:
        if not isinstance(params, Mapping):
            raise BadParams(f"kv_transfer_params is {type(params).__name__}, not an object")
        if params.get("lease") is not None:
            return _handed_over(params, settings)
        target = params.get("target")
        if target is None and not settings.targets:
            return None
        policy = Policy(**{**settings.policy, **_policy(params)})
        return Plan(target=_allowed(target, settings), model=_name(params, "model")
                    or settings.model, policy=policy,
                    min_tokens=_integer(params, "min_tokens", settings.min_tokens, 1))
    except BadParams as error:
        return Plan(error=f"kv_transfer_params: {error}")
    except Exception as error:  # one request's words must never end the engine
        return Plan(error=f"kv_transfer_params: {error!r}"[:512])


def _handed_over(params: Mapping[str, Any], settings: Settings) -> Plan:
    raw = params["lease"]
    fields = {field.name: field.type for field in dataclasses.fields(Lease)}
    if not isinstance(raw, Mapping) or set(raw) != set(fields):
        raise BadParams(f"lease needs exactly {', '.join(fields)}")
    for key, kind in fields.items():
        value = raw[key]
        good = (_is_text(value) if kind == "str"
                else isinstance(value, (int, float)) and not isinstance(value, bool)
                and 0 <= value < _NUMBERS_END and (kind == "float" or isinstance(value, int)))
        if not good:
            raise BadParams(f"lease.{key} is {str(value)[:64]!r}, not a {kind}")
    lease = Lease(**raw)
    tokens = params.get("tokens", lease.tokens)
    if tokens != lease.tokens:
        raise BadParams(f"tokens is {tokens}, the lease has {lease.tokens}")
    fingerprint = params.get("fingerprint") or ""
    if not _is_text(fingerprint):
        raise BadParams(f"fingerprint is no string of at most {_ID_BYTES_MAX} bytes")
    return Plan(target=_allowed(params.get("target"), settings),
                model=_name(params, "model") or settings.model, policy=_policy(params),
                lease=lease, fingerprint=fingerprint)


def _allowed(target: Any, settings: Settings) -> str:
    if target is None:
        if not settings.targets:
            raise BadParams("target is missing: HOST:PORT of the prefilld that granted the lease")
        return settings.targets[0]
    target = _target(target)
    patterns = settings.targets + settings.allowed_targets
    if not any(_matches(target, pattern) for pattern in patterns):
        raise BadParams(f"target {target!r} is not one of those in target and allowed_targets: "
                        f"{', '.join(patterns) or 'there are none'}")
    return target


def _matches(target: str, pattern: str) -> bool:
    host = target.rpartition(":")[0].strip("[]").lower()
    if pattern.startswith("."):
        return host.endswith(pattern) and len(host) > len(pattern)
    if "/" in pattern:
        with contextlib.suppress(ValueError):  # a host name: whoever resolves it decides
            return ipaddress.ip_address(host) in ipaddress.ip_network(pattern)
        return False
    return pattern in (target.lower(), host)


def _patterns(value: Any) -> tuple[str, ...]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)):
        raise BadParams(f"allowed_targets is {str(value)[:64]!r}, not a list")
    for pattern in patterns:
        good = isinstance(pattern, str) and _PATTERN.fullmatch(pattern)
        if good and "/" in pattern:
            try:
                ipaddress.ip_network(pattern)
            except ValueError as error:
                raise BadParams(f"allowed_targets: {error}") from None
        if not good:
            raise BadParams(f"allowed_targets: {str(pattern)[:128]!r} is neither HOST:PORT, HOST, "
                            "a network such as 10.0.0.0/8, nor .SUFFIX of host names")
    return tuple(pattern.lower() for pattern in patterns)


def _credentials(source: Mapping[str, Any]) -> Credentials:
    given = {key: source[key] for key in _CREDENTIALS if source.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str):
            raise BadParams(f"{key} is {str(value)[:64]!r}, not a string")
    return dataclasses.replace(Credentials.from_env(), **given)


def _target(value: Any) -> str:
    host, _, port = value.rpartition(":") if _is_text(value, most=261) else ("", "", "")
    if not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536 \
            or len(host) > 255 or not _HOST.fullmatch(host):  # gRPC knows other forms, with schemes
        raise BadParams(f"target {str(value)[:128]!r} is not HOST:PORT")
    return value


def _policy(source: Mapping[str, Any]) -> Policy:
    policy = {key: source[key] for key in POLICY_KEYS if source.get(key) is not None}
    for key, names in (("method", METHODS), ("report_level", REPORT_LEVELS)):
        value = policy.get(key)
        if value is not None and (not isinstance(value, str) or value not in names):
            raise BadParams(f"{key} {str(value)[:64]!r} is not one of {', '.join(names)}")
    for key, value in policy.items():
        if key not in ("method", "report_level") and (
                not isinstance(value, (int, float)) or isinstance(value, bool)):
            raise BadParams(f"{key} is {str(value)[:64]!r}, not a number")
    try:
        policy_message(Policy(**policy))
    except (TypeError, ValueError) as error:  # a fraction, or beyond 32 bits, where it has no place
        raise BadParams(f"policy: {str(error)[:256]}") from None
    return Policy(**policy)


def _is_text(value: Any, most: int = _ID_BYTES_MAX) -> bool:
    """Of at most so many bytes, and such as messages can carry."""
    try:
        return isinstance(value, str) and len(value.encode()) <= most
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _name(source: Mapping[str, Any], key: str) -> str | None:
    value = source.get(key)
    if value is not None and (not value or not _is_text(value)):
        raise BadParams(f"{key} is no name of 1 to {_ID_BYTES_MAX} bytes")
    return value


def _integer(source: Mapping[str, Any], key: str, default: int, least: int) -> int:
    value = source.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadParams(f"{key} is {str(value)[:64]!r}, not a whole number of at least {least}")
    return value


def _seconds(source: Mapping[str, Any], key: str, default: float) -> float:
    value = source.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 86400:
        raise BadParams(f"{key} is {str(value)[:64]!r}, not a number of seconds from 0 to 86400")
    return float(value)


def refused(message: str) -> PrefilldError:
    """FAILED_PRECONDITION: both sides work, but not together."""
    return PrefilldError(grpc.StatusCode.FAILED_PRECONDITION, message)
