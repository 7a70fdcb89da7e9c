"""What the OpenAPI document says of bodies and answers, for the endpoints that read bytes themselves.

Every status that an endpoint answers with is named: a test holds the running server to it.
"""

from __future__ import annotations

from typing import Any, Final

from overcommit.runtime.payload import DATATYPES

Object = dict[str, Any]

_ERROR: Final[Object] = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}
_TEXTS: Final = {
    400: "The request is wrong, or what it asks for cannot be done",
    403: "The operator has not allowed it",
    404: "No such model, version or region",
    413: "The body is too long",
    422: "Not used",
    500: "The model failed",
    501: "Not offered",
    503: "Not now; Retry-After says when",
    504: "The request's time was over",
    507: "There is no room",
}


# As clients of OpenAI's API read it: `embeddings.error_body`.
OPENAI_ERROR: Final[Object] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {name: {"type": "string"} for name in ("message", "type", "code")},
        }
    },
}


def answers(*statuses: int, form: Object = _ERROR) -> dict[int | str, Object]:
    """Describe refusals of these statuses; those that every endpoint has are among them."""
    content = {"application/json": {"schema": form}}
    return {
        status: {"description": _TEXTS[status], "content": content}
        for status in sorted({400, 413, 503, 504, *statuses})
    }


def object_of(properties: Object, *, required: tuple[str, ...] = ()) -> Object:
    """The schema of an object."""
    schema: Object = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(required)
    return schema


def body_of(schema: Object, *, is_required: bool = False) -> Object:
    """Describe a JSON body, as `openapi_extra` takes it."""
    return {
        "requestBody": {
            "required": is_required,
            "content": {"application/json": {"schema": schema}},
        }
    }


_TEXT: Final[Object] = {"type": "string"}
_COUNT: Final[Object] = {"type": "integer", "minimum": 0}
_PARAMETERS: Final[Object] = {"type": "object", "additionalProperties": True}
_SHAPE: Final[Object] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_INPUT: Final = object_of(
    {
        "name": _TEXT,
        "datatype": {"type": "string", "enum": list(DATATYPES)},
        "shape": _SHAPE,
        "parameters": _PARAMETERS,
        "data": {"type": "array"},
    },
    required=("name", "datatype", "shape"),
)
_OUTPUT: Final = object_of({"name": _TEXT, "parameters": _PARAMETERS}, required=("name",))
INFER: Final = body_of(
    object_of(
        {
            "id": _TEXT,
            "parameters": object_of(
                {
                    "priority": _COUNT,
                    "timeout": _COUNT,
                    "binary_data_output": {"type": "boolean"},
                    # Read for models with state alone; other models leave them as they are.
                    "sequence_id": {"description": "a number, or a text of up to 128 bytes"},
                    "sequence_start": {"description": "true: the first request of the sequence"},
                    "sequence_end": {"description": "true: its last"},
                }
            ),
            "inputs": {"type": "array", "items": _INPUT},
            "outputs": {"type": "array", "items": _OUTPUT},
        },
        required=("inputs",),
    ),
    is_required=True,
)
INDEX: Final = body_of(object_of({"ready": {"type": "boolean"}}))
LOAD: Final = body_of(
    object_of(
        {
            "parameters": {
                "type": "object",
                "properties": {"config": _TEXT},
                "patternProperties": {"^file:": {"type": "string", "contentEncoding": "base64"}},
            }
        }
    )
)
UNLOAD: Final = body_of(
    object_of({"parameters": object_of({"unload_dependents": {"type": "boolean"}})})
)
REGION: Final = body_of(
    object_of(
        {"key": _TEXT, "offset": _COUNT, "byte_size": _COUNT, "leased": {"type": "boolean"}},
        required=("key", "byte_size"),
    ),
    is_required=True,
)
CUDA_REGION: Final = body_of(
    object_of(
        {
            "raw_handle": object_of({"b64": _TEXT}, required=("b64",)),
            "device_id": _COUNT,
            "byte_size": _COUNT,
        },
        required=("raw_handle", "device_id", "byte_size"),
    ),
    is_required=True,
)
_SETTING: Final[Object] = {"type": ["string", "array", "null"], "items": _TEXT}
TRACE: Final = body_of(
    object_of(
        dict.fromkeys(
            ("trace_level", "trace_rate", "trace_count", "log_frequency", "trace_file"), _SETTING
        )
    )
)
LOG: Final = body_of(
    object_of(
        {
            "log_file": _TEXT,
            "log_info": {"type": "boolean"},
            "log_warning": {"type": "boolean"},
            "log_error": {"type": "boolean"},
            "log_verbose_level": _COUNT,
            "log_format": {"type": "string", "enum": ["default", "ISO8601"]},
        }
    )
)
