"""What a model declares, and whether a request fits it.

The check runs in the gateway, so that a request no model would take never enters a queue, and
it is as strict as Triton's own. One difference, on the safe side: BYTES data is walked to its end.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
import structlog

from errors import BadTensor, Unsupported
from inference.tensors import InferRequest, Tensor, check_raw, check_shape

log = structlog.get_logger(__name__)

CACHE: Final = "tidegate.cache"
"""The parameter in a model's config.pbtxt by which it says that its answers may be given again."""
MAX_CACHE_TTL: Final = 24 * 3600.0
_TTL = re.compile(r"\s*ttl\s*=\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One declared input or output. `shape` includes the batch dimension; -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One version of a model, as its server describes it."""

    name: str
    version: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0
    """Most rows in one request; 0: the model has no batch dimension."""
    sequence: bool = False
    """The model keeps state between requests (`sequence_batching`)."""
    decoupled: bool = False
    """The model answers a request any number of times; not served by a single call."""
    priority_levels: int = 0
    """Levels of the dynamic batcher's queue, 1 the first to be served; 0: it has but one."""
    cache_ttl: float = 0.0
    """Seconds for which an answer may be given again to the same request; 0: each is run."""
    revision: str = ""
    """Another one for another configuration. Known where `cache_ttl` is not 0."""

    @classmethod
    def parse(cls, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> ModelSpec:
        """A spec from the JSON of Triton's metadata and config endpoints.

        Shapes come from the metadata: there they have the batch dimension and any `reshape` in
        them. `version` is the newest that the metadata lists.
        """
        optional = {
            entry["name"] for entry in config.get("input", ()) if entry.get("optional", False)
        }
        policy = config.get("model_transaction_policy") or {}
        sequence, decoupled = "sequence_batching" in config, bool(policy.get("decoupled", False))
        ttl = 0.0 if sequence or decoupled else _cache_ttl(metadata["name"], config)
        return cls(
            name=metadata["name"],
            version=max(metadata.get("versions", ()), key=_version_order, default=""),
            platform=metadata.get("platform", ""),
            inputs=_specs(metadata.get("inputs", ()), optional),
            outputs=_specs(metadata.get("outputs", ()), frozenset()),
            max_batch_size=int(config.get("max_batch_size", 0)),
            sequence=sequence,
            decoupled=decoupled,
            priority_levels=int((config.get("dynamic_batching") or {}).get("priority_levels", 0)),
            cache_ttl=ttl,
            revision=_revision(config) if ttl else "",
        )


def _cache_ttl(model: str, config: Mapping[str, Any]) -> float:
    """What the model says of its answers. A mark that can't be read is none: the model is served,
    and its operator hears of it."""
    marked = (config.get("parameters") or {}).get(CACHE)
    if not marked:
        return 0.0
    text = str(marked.get("string_value", "")) if isinstance(marked, Mapping) else str(marked)
    found = _TTL.fullmatch(text)
    if found is None or float(found[1]) > MAX_CACHE_TTL:
        log.warning("mark not read", action="cache.unmarked", model=model, value=text[:80])
        return 0.0
    return float(found[1])


def _revision(config: Mapping[str, Any]) -> str:
    # Where its instances run differs between the Tritons of one group; what they are does not.
    what = {name: value for name, value in config.items() if name != "instance_group"}
    return hashlib.sha256(orjson.dumps(what, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def check(request: InferRequest, spec: ModelSpec) -> None:
    """Raise BadTensor, naming the tensor, unless the model would take this request; Unsupported
    for a model no single request is enough for."""
    if spec.decoupled:
        raise Unsupported(f"model {spec.name!r} answers more than once (decoupled): not offered")
    declared = {tensor.name: tensor for tensor in spec.inputs}
    given = [tensor.name for tensor in request.inputs]
    for name in given:
        if name not in declared:
            raise _bad(name, f"is not an input of model {spec.name!r}", declared)
        if given.count(name) > 1:
            raise _bad(name, "is given more than once")
    for wanted in spec.inputs:
        if not wanted.optional and wanted.name not in given:
            raise _bad(wanted.name, f"is missing; model {spec.name!r} requires it")
    for tensor in request.inputs:
        _check_tensor(tensor, declared[tensor.name])
    if spec.max_batch_size > 0:
        _check_batch(request, spec)
    outputs = {tensor.name for tensor in spec.outputs}
    for name in request.outputs:
        if name not in outputs:
            raise _bad(name, f"is not an output of model {spec.name!r}", outputs)


def _check_tensor(tensor: Tensor, spec: TensorSpec) -> None:
    if tensor.datatype != spec.datatype:
        raise _bad(tensor.name, f"is {tensor.datatype}; the model takes {spec.datatype}")
    check_shape(tensor.shape, tensor=tensor.name)
    fits = len(tensor.shape) == len(spec.shape) and all(
        have == want or want < 0 for have, want in zip(tensor.shape, spec.shape, strict=True)
    )
    if not fits:
        raise _bad(
            tensor.name,
            f"has shape {list(tensor.shape)}; the model takes {list(spec.shape)} (-1 is any size)",
        )
    check_raw(tensor)


def _check_batch(request: InferRequest, spec: ModelSpec) -> None:
    first = request.inputs[0] if request.inputs else None
    for tensor in request.inputs:
        assert first is not None
        rows = tensor.shape[0]
        if rows == 0:
            raise _bad(tensor.name, f"has shape {list(tensor.shape)}: no rows at all")
        if rows > spec.max_batch_size:
            raise _bad(
                tensor.name,
                f"has {rows} rows; model {spec.name!r} takes at most {spec.max_batch_size}",
            )
        if rows != first.shape[0]:
            raise _bad(tensor.name, f"has {rows} rows where {first.name!r} has {first.shape[0]}")


def _specs(entries: Iterable[Mapping[str, Any]], optional: Iterable[str]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=entry["name"],
            datatype=entry["datatype"],
            shape=tuple(int(dim) for dim in entry["shape"]),
            optional=entry["name"] in optional,
        )
        for entry in entries
    )


def _version_order(version: str) -> tuple[int, str]:
    return (int(version) if version.isdecimal() else -1, version)


def _bad(tensor: str, message: str, known: Iterable[str] = ()) -> BadTensor:
    hint = f" (it has {', '.join(map(repr, known))})" if known else ""
    return BadTensor(f"tensor {tensor!r} {message}{hint}", param=tensor)
