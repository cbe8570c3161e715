import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from prefilld.v1 import kv_handoff_service_pb2 as _kv_handoff_service_pb2
from prefilld.v1 import sparsity_pb2 as _sparsity_pb2
from prefilld.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttendHeader(_message.Message):
    __slots__ = ("request_id", "tensors", "buffers", "sparsity", "softmax_scale", "cu_seqlens_q", "cu_seqlens_k", "priority", "return_lse", "return_block_index", "transport")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    SPARSITY_FIELD_NUMBER: _ClassVar[int]
    SOFTMAX_SCALE_FIELD_NUMBER: _ClassVar[int]
    CU_SEQLENS_Q_FIELD_NUMBER: _ClassVar[int]
    CU_SEQLENS_K_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    RETURN_LSE_FIELD_NUMBER: _ClassVar[int]
    RETURN_BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    buffers: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.BufferRef]
    sparsity: _sparsity_pb2.SparsityPolicy
    softmax_scale: float
    cu_seqlens_q: _containers.RepeatedScalarFieldContainer[int]
    cu_seqlens_k: _containers.RepeatedScalarFieldContainer[int]
    priority: int
    return_lse: bool
    return_block_index: bool
    transport: _kv_handoff_service_pb2.Transport
    def __init__(self, request_id: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., buffers: _Optional[_Iterable[_Union[_tensor_pb2.BufferRef, _Mapping]]] = ..., sparsity: _Optional[_Union[_sparsity_pb2.SparsityPolicy, _Mapping]] = ..., softmax_scale: _Optional[float] = ..., cu_seqlens_q: _Optional[_Iterable[int]] = ..., cu_seqlens_k: _Optional[_Iterable[int]] = ..., priority: _Optional[int] = ..., return_lse: bool = ..., return_block_index: bool = ..., transport: _Optional[_Union[_kv_handoff_service_pb2.Transport, str]] = ...) -> None: ...

class TensorsWritten(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttendRequest(_message.Message):
    __slots__ = ("header", "chunk", "written")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_FIELD_NUMBER: _ClassVar[int]
    header: AttendHeader
    chunk: _tensor_pb2.TensorChunk
    written: TensorsWritten
    def __init__(self, header: _Optional[_Union[AttendHeader, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., written: _Optional[_Union[TensorsWritten, _Mapping]] = ...) -> None: ...

class Admission(_message.Message):
    __slots__ = ("request_id", "queue_position", "estimated_wait", "upload_credit_bytes", "lease", "fingerprint", "outputs", "transport", "buffers")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_WAIT_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    queue_position: int
    estimated_wait: _duration_pb2.Duration
    upload_credit_bytes: int
    lease: _kv_handoff_service_pb2.Lease
    fingerprint: str
    outputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    transport: _kv_handoff_service_pb2.Transport
    buffers: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.BufferRef]
    def __init__(self, request_id: _Optional[str] = ..., queue_position: _Optional[int] = ..., estimated_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., upload_credit_bytes: _Optional[int] = ..., lease: _Optional[_Union[_kv_handoff_service_pb2.Lease, _Mapping]] = ..., fingerprint: _Optional[str] = ..., outputs: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., transport: _Optional[_Union[_kv_handoff_service_pb2.Transport, str]] = ..., buffers: _Optional[_Iterable[_Union[_tensor_pb2.BufferRef, _Mapping]]] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("queue", "upload", "estimate", "select", "attention", "linear", "handoff", "sparsity", "bytes_in", "bytes_out", "tokens", "request_id")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    SELECT_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    LINEAR_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    SPARSITY_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    queue: _duration_pb2.Duration
    upload: _duration_pb2.Duration
    estimate: _duration_pb2.Duration
    select: _duration_pb2.Duration
    attention: _duration_pb2.Duration
    linear: _duration_pb2.Duration
    handoff: _duration_pb2.Duration
    sparsity: _sparsity_pb2.SparsityReport
    bytes_in: int
    bytes_out: int
    tokens: int
    request_id: str
    def __init__(self, queue: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., upload: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., estimate: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., select: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., attention: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., linear: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., handoff: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., sparsity: _Optional[_Union[_sparsity_pb2.SparsityReport, _Mapping]] = ..., bytes_in: _Optional[int] = ..., bytes_out: _Optional[int] = ..., tokens: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ("admission", "chunk", "summary", "outputs")
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    admission: Admission
    chunk: _tensor_pb2.TensorChunk
    summary: Summary
    outputs: OutputSpecs
    def __init__(self, admission: _Optional[_Union[Admission, _Mapping]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ..., outputs: _Optional[_Union[OutputSpecs, _Mapping]] = ...) -> None: ...

class OutputSpecs(_message.Message):
    __slots__ = ("tensors", "buffers")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    buffers: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.BufferRef]
    def __init__(self, tensors: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., buffers: _Optional[_Iterable[_Union[_tensor_pb2.BufferRef, _Mapping]]] = ...) -> None: ...

class KvDestination(_message.Message):
    __slots__ = ("transport", "layout", "retain", "lease_ttl")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    RETAIN_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_FIELD_NUMBER: _ClassVar[int]
    transport: _kv_handoff_service_pb2.Transport
    layout: _kv_handoff_service_pb2.KvLayout
    retain: bool
    lease_ttl: _duration_pb2.Duration
    def __init__(self, transport: _Optional[_Union[_kv_handoff_service_pb2.Transport, str]] = ..., layout: _Optional[_Union[_kv_handoff_service_pb2.KvLayout, _Mapping]] = ..., retain: bool = ..., lease_ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class PrefixReuse(_message.Message):
    __slots__ = ("mode",)
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        MODE_UNSPECIFIED: _ClassVar[PrefixReuse.Mode]
        MODE_NONE: _ClassVar[PrefixReuse.Mode]
        MODE_EXACT: _ClassVar[PrefixReuse.Mode]
        MODE_APPROXIMATE: _ClassVar[PrefixReuse.Mode]
    MODE_UNSPECIFIED: PrefixReuse.Mode
    MODE_NONE: PrefixReuse.Mode
    MODE_EXACT: PrefixReuse.Mode
    MODE_APPROXIMATE: PrefixReuse.Mode
    MODE_FIELD_NUMBER: _ClassVar[int]
    mode: PrefixReuse.Mode
    def __init__(self, mode: _Optional[_Union[PrefixReuse.Mode, str]] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "model", "token_ids", "sparsity", "destination", "prefix_reuse", "priority", "validate_only", "return_logits")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SPARSITY_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    PREFIX_REUSE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    RETURN_LOGITS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sparsity: _sparsity_pb2.SparsityPolicy
    destination: KvDestination
    prefix_reuse: PrefixReuse
    priority: int
    validate_only: bool
    return_logits: bool
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sparsity: _Optional[_Union[_sparsity_pb2.SparsityPolicy, _Mapping]] = ..., destination: _Optional[_Union[KvDestination, _Mapping]] = ..., prefix_reuse: _Optional[_Union[PrefixReuse, _Mapping]] = ..., priority: _Optional[int] = ..., validate_only: bool = ..., return_logits: bool = ...) -> None: ...

class LayerReady(_message.Message):
    __slots__ = ("layer", "density", "captured_mass")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_MASS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    density: float
    captured_mass: float
    def __init__(self, layer: _Optional[int] = ..., density: _Optional[float] = ..., captured_mass: _Optional[float] = ...) -> None: ...

class Logits(_message.Message):
    __slots__ = ("vocab_size", "f32")
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    F32_FIELD_NUMBER: _ClassVar[int]
    vocab_size: int
    f32: bytes
    def __init__(self, vocab_size: _Optional[int] = ..., f32: _Optional[bytes] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("admission", "layer_ready", "kv_ready", "summary", "logits")
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    LAYER_READY_FIELD_NUMBER: _ClassVar[int]
    KV_READY_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    admission: Admission
    layer_ready: LayerReady
    kv_ready: _kv_handoff_service_pb2.Lease
    summary: Summary
    logits: Logits
    def __init__(self, admission: _Optional[_Union[Admission, _Mapping]] = ..., layer_ready: _Optional[_Union[LayerReady, _Mapping]] = ..., kv_ready: _Optional[_Union[_kv_handoff_service_pb2.Lease, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ..., logits: _Optional[_Union[Logits, _Mapping]] = ...) -> None: ...

class GetSparsityReportRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...
