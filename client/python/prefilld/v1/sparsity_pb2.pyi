from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Method(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    METHOD_UNSPECIFIED: _ClassVar[Method]
    METHOD_DENSE: _ClassVar[Method]
    METHOD_FLEXPREFILL: _ClassVar[Method]
    METHOD_JOINT: _ClassVar[Method]
    METHOD_FLASHPREFILL: _ClassVar[Method]
    METHOD_MINFERENCE: _ClassVar[Method]
    METHOD_STREAMING: _ClassVar[Method]

class Pattern(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PATTERN_DENSE: _ClassVar[Pattern]
    PATTERN_VERTICAL_SLASH: _ClassVar[Pattern]
    PATTERN_QUERY_AWARE: _ClassVar[Pattern]
    PATTERN_JOINT: _ClassVar[Pattern]

class ReportLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPORT_LEVEL_UNSPECIFIED: _ClassVar[ReportLevel]
    REPORT_LEVEL_DENSITY: _ClassVar[ReportLevel]
    REPORT_LEVEL_CAPTURED_MASS: _ClassVar[ReportLevel]
METHOD_UNSPECIFIED: Method
METHOD_DENSE: Method
METHOD_FLEXPREFILL: Method
METHOD_JOINT: Method
METHOD_FLASHPREFILL: Method
METHOD_MINFERENCE: Method
METHOD_STREAMING: Method
PATTERN_DENSE: Pattern
PATTERN_VERTICAL_SLASH: Pattern
PATTERN_QUERY_AWARE: Pattern
PATTERN_JOINT: Pattern
REPORT_LEVEL_UNSPECIFIED: ReportLevel
REPORT_LEVEL_DENSITY: ReportLevel
REPORT_LEVEL_CAPTURED_MASS: ReportLevel

class HeadOverride(_message.Message):
    __slots__ = ("layer", "head", "method", "gamma")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    layer: int
    head: int
    method: Method
    gamma: float
    def __init__(self, layer: _Optional[int] = ..., head: _Optional[int] = ..., method: _Optional[_Union[Method, str]] = ..., gamma: _Optional[float] = ...) -> None: ...

class SparsityPolicy(_message.Message):
    __slots__ = ("method", "gamma", "tau", "min_budget_tokens", "max_budget_tokens", "block_size", "head_overrides", "min_captured_mass", "report_level", "alpha", "mean_correction")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    GAMMA_FIELD_NUMBER: _ClassVar[int]
    TAU_FIELD_NUMBER: _ClassVar[int]
    MIN_BUDGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BUDGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    HEAD_OVERRIDES_FIELD_NUMBER: _ClassVar[int]
    MIN_CAPTURED_MASS_FIELD_NUMBER: _ClassVar[int]
    REPORT_LEVEL_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    MEAN_CORRECTION_FIELD_NUMBER: _ClassVar[int]
    method: Method
    gamma: float
    tau: float
    min_budget_tokens: int
    max_budget_tokens: int
    block_size: int
    head_overrides: _containers.RepeatedCompositeFieldContainer[HeadOverride]
    min_captured_mass: float
    report_level: ReportLevel
    alpha: float
    mean_correction: bool
    def __init__(self, method: _Optional[_Union[Method, str]] = ..., gamma: _Optional[float] = ..., tau: _Optional[float] = ..., min_budget_tokens: _Optional[int] = ..., max_budget_tokens: _Optional[int] = ..., block_size: _Optional[int] = ..., head_overrides: _Optional[_Iterable[_Union[HeadOverride, _Mapping]]] = ..., min_captured_mass: _Optional[float] = ..., report_level: _Optional[_Union[ReportLevel, str]] = ..., alpha: _Optional[float] = ..., mean_correction: bool = ...) -> None: ...

class SparsityReport(_message.Message):
    __slots__ = ("mean_density", "layers", "heads", "density_u16", "pattern_u8", "captured_mass_u16", "dense_fallback_heads", "reasons", "captured_mass_min_u16", "mean_captured_mass", "captured_mass_measured")
    MEAN_DENSITY_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    DENSITY_U16_FIELD_NUMBER: _ClassVar[int]
    PATTERN_U8_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_MASS_U16_FIELD_NUMBER: _ClassVar[int]
    DENSE_FALLBACK_HEADS_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_MASS_MIN_U16_FIELD_NUMBER: _ClassVar[int]
    MEAN_CAPTURED_MASS_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_MASS_MEASURED_FIELD_NUMBER: _ClassVar[int]
    mean_density: float
    layers: int
    heads: int
    density_u16: bytes
    pattern_u8: bytes
    captured_mass_u16: bytes
    dense_fallback_heads: int
    reasons: _containers.RepeatedScalarFieldContainer[str]
    captured_mass_min_u16: bytes
    mean_captured_mass: float
    captured_mass_measured: bool
    def __init__(self, mean_density: _Optional[float] = ..., layers: _Optional[int] = ..., heads: _Optional[int] = ..., density_u16: _Optional[bytes] = ..., pattern_u8: _Optional[bytes] = ..., captured_mass_u16: _Optional[bytes] = ..., dense_fallback_heads: _Optional[int] = ..., reasons: _Optional[_Iterable[str]] = ..., captured_mass_min_u16: _Optional[bytes] = ..., mean_captured_mass: _Optional[float] = ..., captured_mass_measured: bool = ...) -> None: ...
