"""Make `messages.py` and `messages.pyi` from `inference.proto`; needs grpcio-tools.

`messages.py` holds the file's descriptor and builds the classes when it is imported, in a pool of
its own: a client of the same protocol in the same process (tritonclient, kserve) registers the same
names in protobuf's common pool, which takes each name once.  It works with every protobuf runtime,
unlike protoc's own Python output, which wants one at least as new as itself.
"""

from __future__ import annotations

import base64
import tempfile
import textwrap
import zlib
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
SOURCE: Final = "inference.proto"
_WIDTH: Final = 88

_HEAD: Final = '''\
"""Made from inference.proto by `make proto`; not to be edited."""

import base64
import zlib

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_DESCRIPTOR = (
{lines}
)

_file = descriptor_pb2.FileDescriptorProto.FromString(
    zlib.decompress(base64.b85decode(_DESCRIPTOR))
)
_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file)
DESCRIPTOR = _pool.FindFileByName(_file.name)
globals().update(
    (_name, message_factory.GetMessageClass(_message))
    for _name, _message in DESCRIPTOR.message_types_by_name.items()
)
'''


def generate() -> dict[str, str]:
    """Return the text of each file that is made."""
    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        arguments = ["protoc", f"-I{FOLDER}", f"--descriptor_set_out={out / 'set'}"]
        if protoc.main([*arguments, f"--pyi_out={out}", SOURCE]) != 0:
            raise SystemExit(f"protoc does not take {SOURCE}")
        files = descriptor_pb2.FileDescriptorSet.FromString((out / "set").read_bytes())
        types = (out / SOURCE.replace(".proto", "_pb2.pyi")).read_text()
    packed = base64.b85encode(zlib.compress(files.file[0].SerializeToString(), 9)).decode()
    lines = textwrap.wrap(packed, _WIDTH, break_on_hyphens=False)
    body = "\n".join(f"    {line!r}" for line in lines)
    return {"messages.py": _HEAD.format(lines=body), "messages.pyi": types}


if __name__ == "__main__":
    for name, text in generate().items():
        (FOLDER / name).write_text(text)
