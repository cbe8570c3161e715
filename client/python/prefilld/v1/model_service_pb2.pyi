from prefilld.v1 import kv_handoff_service_pb2 as _kv_handoff_service_pb2
from prefilld.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "model_type", "revision", "layers", "q_heads", "kv_heads", "head_dim", "hidden_size", "vocab_size", "max_prompt_tokens", "data_type", "fingerprint", "kv_layout", "kv_bytes_per_token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    Q_HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    model_type: str
    revision: str
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_prompt_tokens: int
    data_type: _tensor_pb2.DataType
    fingerprint: str
    kv_layout: _kv_handoff_service_pb2.KvLayout
    kv_bytes_per_token: int
    def __init__(self, name: _Optional[str] = ..., model_type: _Optional[str] = ..., revision: _Optional[str] = ..., layers: _Optional[int] = ..., q_heads: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., hidden_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_prompt_tokens: _Optional[int] = ..., data_type: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., fingerprint: _Optional[str] = ..., kv_layout: _Optional[_Union[_kv_handoff_service_pb2.KvLayout, _Mapping]] = ..., kv_bytes_per_token: _Optional[int] = ...) -> None: ...
