"""The published protocol: what is generated is of the file, and its numbers are everybody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from tritonclient.grpc import model_config_pb2, service_pb2

from overcommit.server import proto
from overcommit.server.proto import __main__ as generator
from overcommit.server.proto import messages

# Fields of the Open Inference Protocol and of KServe that Triton's protocol has not.
OURS = {
    "ModelMetadataResponse.properties",
    "ModelMetadataResponse.PropertiesEntry.key",
    "ModelMetadataResponse.PropertiesEntry.value",
    "RepositoryModelLoadResponse.model_name",
    "RepositoryModelLoadResponse.isLoaded",
    "RepositoryModelUnloadResponse.model_name",
    "RepositoryModelUnloadResponse.isUnloaded",
}


def fields_of(message: Any, path: str = "") -> dict[str, tuple[int, int, int, str]]:
    name = f"{path}{message.name}"
    found = {
        f"{name}.{field.name}": (field.number, field.type, field.label, field.type_name)
        for field in message.field
    }
    for enum in message.enum_type:
        found |= {f"{name}.{enum.name}.{v.name}": (v.number, 0, 0, "") for v in enum.value}
    for nested in message.nested_type:
        found |= fields_of(nested, f"{name}.")
    return found


def file_of(*descriptors: Any) -> tuple[dict[str, tuple[int, int, int, str]], dict[str, Any]]:
    fields: dict[str, tuple[int, int, int, str]] = {}
    methods: dict[str, Any] = {}
    for descriptor in descriptors:
        file = descriptor_pb2.FileDescriptorProto()
        descriptor.CopyToProto(file)
        for message in file.message_type:
            fields |= fields_of(message)
        for enum in file.enum_type:
            fields |= {f"{enum.name}.{v.name}": (v.number, 0, 0, "") for v in enum.value}
        for service in file.service:
            for method in service.method:
                kinds = (method.client_streaming, method.server_streaming)
                types = (method.input_type, method.output_type)
                methods[f"{file.package}.{service.name}/{method.name}"] = (kinds, types)
    return fields, methods


def test_every_field_has_the_number_that_tritons_client_gives_it() -> None:
    ours, our_methods = file_of(messages.DESCRIPTOR)
    theirs, their_methods = file_of(service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR)
    assert {name: theirs[name] for name in theirs if name in ours} == {
        name: ours[name] for name in ours if name not in OURS
    }
    assert ours.keys() - theirs.keys() == OURS
    assert their_methods.items() <= our_methods.items()


def test_the_generated_files_are_of_the_published_one() -> None:
    pytest.importorskip("grpc_tools")
    folder = Path(proto.__path__[0])
    made = generator.generate()
    types = (folder / "messages.pyi").read_text()
    assert made["messages.pyi"] == types
    fresh: dict[str, Any] = {}
    exec(compile(made["messages.py"], "messages.py", "exec"), fresh)
    assert file_of(fresh["DESCRIPTOR"]) == file_of(messages.DESCRIPTOR)
