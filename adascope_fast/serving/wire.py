"""What goes over the wire: objects of JSON, and safetensors files whose metadata say in one what they hold.

Nothing is ever unpickled. What is read comes from elsewhere, so everything has a bound, which is looked at before
anything is unpacked.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save
from torch import Tensor

from adascope_fast.settings import one_line

KEY = "adascope_fast"
"""The entry of a file's metadata."""
MOST_HEADER = 2**24  # bytes


def read_json(body: bytes) -> dict[str, Any]:
    """An object of JSON; ValueError for anything else, NaN and Infinity too, which JSON has not."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("JSON is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({one_line(str(error))[:120]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"not an object of JSON, got {type(values).__name__}")
    return values


def write_json(values: Mapping[str, Any]) -> bytes:
    """An object as JSON."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode()


def read_header(body: bytes, version: int, what: str = "a request") -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the metadata say, type and shape of each tensor); the rest of the file is checked by safetensors.

    Args:
        version: of the protocol, which the metadata must have.
        what: what an error calls the file.

    Raises:
        ValueError: it is anything else; in one line.
    """
    rule = f"{what} is a safetensors file"
    if len(body) < 8:
        raise ValueError(f"{rule}, got {len(body)} bytes; send one")
    (length,) = struct.unpack("<Q", body[:8])
    if length > min(MOST_HEADER, len(body) - 8):
        raise ValueError(f"{rule} with a header of at most {MOST_HEADER} bytes, got {length}; send one")
    try:
        header = read_json(body[8 : 8 + length])
        about = read_json(header["__metadata__"][KEY].encode())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        why = str(error) if isinstance(error, ValueError) else "none"
        raise ValueError(f'{rule} whose metadata has "{KEY}", an object of JSON, got {why}; send one') from None
    refuse_version(about, version, what)
    return about, {name: value for name, value in header.items() if name != "__metadata__"}


def refuse_version(values: Mapping[str, Any], version: int, what: str = "it") -> None:
    """ValueError where `what` speaks another version of a protocol."""
    if values.get("version") != version:
        raise ValueError(
            f"{what} speaks version {values.get('version')!s:.20} of the wire, this adascope-fast {version}; "
            f"install the same release on both machines"
        )


def write_file(tensors: Mapping[str, Tensor], about: Mapping[str, Any], **metadata: str) -> bytes:
    """A safetensors file whose metadata say `about`, and more."""
    return save(dict(tensors), metadata={KEY: json.dumps(about, ensure_ascii=False, allow_nan=False), **metadata})


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
