"""Files that are whole or found out: forced to the disk when they are written, and read with distrust.

A file can be cut short, changed or made to harm. Of that a reader gets one line that names the file; no code from it
runs, and it takes no more memory than it has bytes.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickletools
import re
import shutil
import struct
import zipfile

import torch

from lib.program import UserError

MAX_BYTES = 2**24  # of JSON, and of all in a .pt but its numbers: they hold 300 bytes per tensor, or per rank
# What torch.save writes of dictionaries of plain tensors. weights_only takes more, as bytearray(10**10) and its memory.
PLAIN = re.compile(r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")


def size_and_hash(path: str) -> dict:
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
        return {"bytes": file.tell(), "sha256": hashed.hexdigest()}


def write_file(path: str, content: dict | str) -> dict:
    """A new file, forced to the disk: a dict as JSON that holds its own checksum, or (*.pt) as tensors; a path as a
    copy. Returns its size and hash."""
    with open(path, "wb") as file:
        if not isinstance(content, dict):
            with open(content, "rb") as source:
                shutil.copyfileobj(source, file)
        elif path.endswith(".pt"):
            try:
                torch.save(content, file)
            except RuntimeError as error:  # all that torch says of a full disk is "unexpected pos"
                raise error.__context__ or OSError(str(error)) from None
        else:
            file.write(json.dumps({**content, "sha256": digest(content)}, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    return size_and_hash(path)


def write_files(folder: str, contents: dict) -> dict[str, dict]:
    """{name: size and hash}; None is no file."""
    return {name: write_file(os.path.join(folder, name), content)
            for name, content in contents.items() if content is not None}


@contextlib.contextmanager
def reading(path: str):
    """Whatever a missing, damaged or hostile file makes its reader raise becomes one line that names it."""
    try:
        if not (os.path.isfile(path) or os.path.isdir(path)):  # to open a pipe could wait for ever
            raise FileNotFoundError
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a folder written by a training script") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {(str(error) or repr(error)).splitlines()[0]}") from None


def read_json(path: str) -> dict:
    """Without the checksum in it, which a config.json made by hand may lack."""
    with reading(path), open(path, encoding="utf-8") as file:
        expect(os.path.getsize(path) <= MAX_BYTES, f"{path}: found more than {MAX_BYTES} bytes")
        content = json.load(file)
        expect(isinstance(content, dict), f"{path}: found {type(content).__name__}, expected an object")
        own = content.pop("sha256", "" if path.endswith("meta.json") else None)
        expect(own in (None, digest(content)), f"{path}: its checksum is not its own; the file is damaged")
        return content


def expect(good: bool, otherwise: str) -> None:
    if not good:
        raise UserError(otherwise)


def is_number(x) -> bool:
    """A finite one that is not negative: what counters, scales and coefficients are."""
    return isinstance(x, (int, float)) and 0 <= x < 2**63


def digest(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def verify(folder: str, name: str, expected: dict) -> None:
    path = os.path.join(folder, name)
    with reading(path):
        found = size_and_hash(path)
    expect(found == expected,
           f"{path}: its {found['bytes']} bytes are not what was written: size or checksum differ; it is damaged")


def load_tensors(path: str):
    """torch.load that runs no code from the file (weights_only) and takes no memory before it is used (mmap), nor then
    more than twice the file's size: a tied tensor stands under two names."""
    with reading(path):
        size = os.path.getsize(path)
        with open(path, "rb") as file, zipfile.ZipFile(file) as records:
            file.seek(-98, os.SEEK_END)
            # A zip can have two directories, one for zipfile and one for torch. Not if it ends as torch.save ends it:
            # directory, its end, a locator of that end, and the end in its old form.
            end, length, start, locator, there, old = struct.unpack("<4s36xQQ4s4xQ4x4s18x", file.read())
            expect(end + locator + old == b"PK\6\6PK\6\7PK\5\6" and start + length == there == size - 98 and
                   all(record.compress_type == zipfile.ZIP_STORED for record in records.infolist()) and
                   sum(record.file_size for record in records.infolist()) <= size,
                   f"{path}: is packed, or its parts are larger than the file; expected what torch.save writes")
        pickle = torch._C.PyTorchFileReader(path).get_record("data.pkl")  # the very bytes that torch.load will read
        expect(len(pickle) <= MAX_BYTES, f"{path}: found more than {MAX_BYTES} bytes beside the numbers")
        for op, name, _ in pickletools.genops(pickle):
            expect(op.name != "GLOBAL" or PLAIN.fullmatch(name),
                   f"{path}: holds {name}, expected plain tensors in dictionaries, as torch.save writes them")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        nodes = [content]
        for node in nodes:  # it grows. The file has some bytes for each, or else dictionaries hold each other
            nodes += dict.values(node) if isinstance(node, dict) else ()
            expect(len(nodes) <= len(pickle), f"{path}: holds the same dictionary under many names")
        tensors = [node for node in nodes if isinstance(node, torch.Tensor)]
        expect(all(x.is_contiguous() for x in tensors) and sum(x.nbytes for x in tensors) <= 2 * size,
               f"{path}: does not hold plain tensors that are as large as they claim")
        return content
