import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from prefilld.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_GRPC: _ClassVar[Transport]
    TRANSPORT_POSIX_SHM: _ClassVar[Transport]
    TRANSPORT_CUDA_IPC: _ClassVar[Transport]

class Axis(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AXIS_UNSPECIFIED: _ClassVar[Axis]
    AXIS_LAYER: _ClassVar[Axis]
    AXIS_KV: _ClassVar[Axis]
    AXIS_BLOCK: _ClassVar[Axis]
    AXIS_HEAD: _ClassVar[Axis]
    AXIS_TOKEN: _ClassVar[Axis]
    AXIS_CHANNEL: _ClassVar[Axis]

class ReleaseReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RELEASE_REASON_UNSPECIFIED: _ClassVar[ReleaseReason]
    RELEASE_REASON_CONSUMED: _ClassVar[ReleaseReason]
    RELEASE_REASON_ABANDONED: _ClassVar[ReleaseReason]
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_GRPC: Transport
TRANSPORT_POSIX_SHM: Transport
TRANSPORT_CUDA_IPC: Transport
AXIS_UNSPECIFIED: Axis
AXIS_LAYER: Axis
AXIS_KV: Axis
AXIS_BLOCK: Axis
AXIS_HEAD: Axis
AXIS_TOKEN: Axis
AXIS_CHANNEL: Axis
RELEASE_REASON_UNSPECIFIED: ReleaseReason
RELEASE_REASON_CONSUMED: ReleaseReason
RELEASE_REASON_ABANDONED: ReleaseReason

class TransportRefusal(_message.Message):
    __slots__ = ("transport", "reason")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[TransportRefusal.Reason]
        REASON_SOCKET: _ClassVar[TransportRefusal.Reason]
        REASON_PEER: _ClassVar[TransportRefusal.Reason]
        REASON_DESCRIPTOR: _ClassVar[TransportRefusal.Reason]
        REASON_DRIVER: _ClassVar[TransportRefusal.Reason]
        REASON_SEGMENT: _ClassVar[TransportRefusal.Reason]
    REASON_UNSPECIFIED: TransportRefusal.Reason
    REASON_SOCKET: TransportRefusal.Reason
    REASON_PEER: TransportRefusal.Reason
    REASON_DESCRIPTOR: TransportRefusal.Reason
    REASON_DRIVER: TransportRefusal.Reason
    REASON_SEGMENT: TransportRefusal.Reason
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    transport: Transport
    reason: TransportRefusal.Reason
    def __init__(self, transport: _Optional[_Union[Transport, str]] = ..., reason: _Optional[_Union[TransportRefusal.Reason, str]] = ...) -> None: ...

class RopeState(_message.Message):
    __slots__ = ("applied", "position_base", "theta", "scaling")
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    POSITION_BASE_FIELD_NUMBER: _ClassVar[int]
    THETA_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    applied: bool
    position_base: int
    theta: float
    scaling: str
    def __init__(self, applied: bool = ..., position_base: _Optional[int] = ..., theta: _Optional[float] = ..., scaling: _Optional[str] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("physical_order", "kv_packed_in_content", "block_size", "num_kv_heads", "head_dim", "data_type", "block_stride_bytes", "rope_state")
    PHYSICAL_ORDER_FIELD_NUMBER: _ClassVar[int]
    KV_PACKED_IN_CONTENT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_STRIDE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROPE_STATE_FIELD_NUMBER: _ClassVar[int]
    physical_order: _containers.RepeatedScalarFieldContainer[Axis]
    kv_packed_in_content: bool
    block_size: int
    num_kv_heads: int
    head_dim: int
    data_type: _tensor_pb2.DataType
    block_stride_bytes: int
    rope_state: RopeState
    def __init__(self, physical_order: _Optional[_Iterable[_Union[Axis, str]]] = ..., kv_packed_in_content: bool = ..., block_size: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., data_type: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., block_stride_bytes: _Optional[int] = ..., rope_state: _Optional[_Union[RopeState, _Mapping]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("name", "ttl", "generation", "boot_id", "layers", "tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    ttl: _duration_pb2.Duration
    generation: int
    boot_id: str
    layers: int
    tokens: int
    def __init__(self, name: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., generation: _Optional[int] = ..., boot_id: _Optional[str] = ..., layers: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_prompt_tokens", "max_attend_bytes", "max_chunk_bytes", "max_sequences", "max_lease_ttl", "default_lease_ttl", "max_waiting_jobs", "max_unretained_prompt_tokens")
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTEND_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASE_TTL_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_LEASE_TTL_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_JOBS_FIELD_NUMBER: _ClassVar[int]
    MAX_UNRETAINED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_prompt_tokens: int
    max_attend_bytes: int
    max_chunk_bytes: int
    max_sequences: int
    max_lease_ttl: _duration_pb2.Duration
    default_lease_ttl: _duration_pb2.Duration
    max_waiting_jobs: int
    max_unretained_prompt_tokens: int
    def __init__(self, max_prompt_tokens: _Optional[int] = ..., max_attend_bytes: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_lease_ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., default_lease_ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_waiting_jobs: _Optional[int] = ..., max_unretained_prompt_tokens: _Optional[int] = ...) -> None: ...

class NegotiateRequest(_message.Message):
    __slots__ = ("model", "transports", "layout", "fingerprint", "shm_domain", "cuda_ipc_domain", "device_uuids", "refused")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SHM_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUIDS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    model: str
    transports: _containers.RepeatedScalarFieldContainer[Transport]
    layout: KvLayout
    fingerprint: str
    shm_domain: str
    cuda_ipc_domain: str
    device_uuids: _containers.RepeatedScalarFieldContainer[str]
    refused: _containers.RepeatedCompositeFieldContainer[TransportRefusal]
    def __init__(self, model: _Optional[str] = ..., transports: _Optional[_Iterable[_Union[Transport, str]]] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., fingerprint: _Optional[str] = ..., shm_domain: _Optional[str] = ..., cuda_ipc_domain: _Optional[str] = ..., device_uuids: _Optional[_Iterable[str]] = ..., refused: _Optional[_Iterable[_Union[TransportRefusal, _Mapping]]] = ...) -> None: ...

class NegotiateResponse(_message.Message):
    __slots__ = ("transport", "layout", "fingerprint", "limits", "boot_id", "server_version", "shm_domain", "cuda_ipc_domain", "device_uuids", "memory_socket")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    SHM_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUIDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_SOCKET_FIELD_NUMBER: _ClassVar[int]
    transport: Transport
    layout: KvLayout
    fingerprint: str
    limits: Limits
    boot_id: str
    server_version: str
    shm_domain: str
    cuda_ipc_domain: str
    device_uuids: _containers.RepeatedScalarFieldContainer[str]
    memory_socket: str
    def __init__(self, transport: _Optional[_Union[Transport, str]] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., fingerprint: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., boot_id: _Optional[str] = ..., server_version: _Optional[str] = ..., shm_domain: _Optional[str] = ..., cuda_ipc_domain: _Optional[str] = ..., device_uuids: _Optional[_Iterable[str]] = ..., memory_socket: _Optional[str] = ...) -> None: ...

class PullKvRequest(_message.Message):
    __slots__ = ("lease", "generation", "boot_id", "layout", "transport", "first_layer", "layer_count", "resume_tensor_index", "resume_byte_offset", "chunk_bytes")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    RESUME_TENSOR_INDEX_FIELD_NUMBER: _ClassVar[int]
    RESUME_BYTE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    lease: str
    generation: int
    boot_id: str
    layout: KvLayout
    transport: Transport
    first_layer: int
    layer_count: int
    resume_tensor_index: int
    resume_byte_offset: int
    chunk_bytes: int
    def __init__(self, lease: _Optional[str] = ..., generation: _Optional[int] = ..., boot_id: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., transport: _Optional[_Union[Transport, str]] = ..., first_layer: _Optional[int] = ..., layer_count: _Optional[int] = ..., resume_tensor_index: _Optional[int] = ..., resume_byte_offset: _Optional[int] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("lease", "generation", "ttl")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    lease: str
    generation: int
    ttl: _duration_pb2.Duration
    def __init__(self, lease: _Optional[str] = ..., generation: _Optional[int] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ReleaseLeaseRequest(_message.Message):
    __slots__ = ("lease", "generation", "reason")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    lease: str
    generation: int
    reason: ReleaseReason
    def __init__(self, lease: _Optional[str] = ..., generation: _Optional[int] = ..., reason: _Optional[_Union[ReleaseReason, str]] = ...) -> None: ...

class ReleaseLeaseResponse(_message.Message):
    __slots__ = ("running_transfers",)
    RUNNING_TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    running_transfers: int
    def __init__(self, running_transfers: _Optional[int] = ...) -> None: ...
