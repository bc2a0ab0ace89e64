"""Where text comes from: files in the public forms, and two corpora by name. Whatever reads a user's text is here.

    read_corpus     a name (stdlib, shakespeare) or a file -> documents
    read_documents  a .txt or the "text" of .json / .jsonl records, each also .gz -> documents
    read_records    the records themselves, each with its place for error messages
"""
from __future__ import annotations

import ast
import contextlib
import gzip
import hashlib
import http.client
import json
import os
import random
import re
import secrets
import shutil
import sysconfig
import urllib.request
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from common import UserError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
STDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
DOCSTRING_OWNERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


# ---- reading files ------------------------------------------------------------------------------------------------

def read_text(path) -> str:
    """A whole UTF-8 file, plain or .gz. CRLF stays CRLF; a byte order mark is dropped."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            content = file.read()
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: found byte 0x{content[error.start]:02x} at offset {error.start} of the file, "
                        "expected UTF-8; convert it, for example with iconv -t UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def load_json(text: str, path, line: int):
    """Parse JSON that begins in this line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = repr(text[error.pos : error.pos + 20]) if error.pos < len(text) else "the end of the text"
        raise UserError(f"{path}:{line + error.lineno - 1}: found {found}, expected JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of many thousand digits, many thousand brackets
        raise UserError(f"{path}:{line}: found JSON that Python cannot hold ({error})") from None


def read_records(path) -> Iterator[tuple[str, dict]]:
    """(where, record) of a .json array or of .jsonl lines, plain or .gz; `where` begins the record's error messages."""
    text = read_text(path)
    if ".jsonl" in Path(path).suffixes:
        lines = enumerate(text.split("\n"), start=1)  # not splitlines: U+2028 may stand in a string
        found = ((f"{path}:{number}", load_json(line, path, number)) for number, line in lines if line.strip())
    else:
        records = load_json(text, path, 1)
        if not isinstance(records, list):
            raise UserError(f"{path}:1: found one JSON {type(records).__name__}, expected an array of records [...]")
        found = ((f"{path}, record {i}", record) for i, record in enumerate(records, start=1))
    for where, record in found:
        if not isinstance(record, dict):
            raise UserError(f"{where}: found a JSON {type(record).__name__}, expected a record {{...}}")
        yield where, record


def check_text(text, where: str) -> str:
    """Returns the text. JSON can also hold other things, and half a surrogate pair, which is no character."""
    if not isinstance(text, str):
        raise UserError(f"{where}: found {type(text).__name__}, expected a string")
    if half := re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: found half a character, {half[0]!a}, at {half.start()}, expected whole ones")
    return text


def read_documents(path) -> list[str]:
    """Documents of a .txt (between lines <|endoftext|>), or the "text" of .json or .jsonl records; plain or .gz."""
    form = Path(str(path).removesuffix(".gz")).suffix
    if form == ".txt":
        return re.split(r"(?m)^<\|endoftext\|>\r?$\n?", read_text(path))
    if form not in (".json", ".jsonl"):
        raise UserError(f"{path}: found a name that ends in {form!r}, expected stdlib, shakespeare, or a .txt, .json "
                        "or .jsonl file, or .gz of these")
    documents = []
    for where, record in read_records(path):
        if "text" not in record:
            raise UserError(f'{where}: found the keys {list(record)[:8]}, expected "text"')
        documents.append(check_text(record["text"], f'{where}, "text"'))
    return documents


# ---- corpora by name ----------------------------------------------------------------------------------------------

def stdlib_documents() -> list[str]:
    """The English in every Python: its help topics, and the docstrings of each module as one document; about 2 MB.

    Sources are parsed, never imported. A paragraph that was there before is left out: topics quote one another and
    classes repeat their parents, so that an eighth of the validation text would be training text word for word.
    """
    documents, seen = [], set()
    for path in sorted(STDLIB.rglob("*.py")):
        if STDLIB_SKIP.intersection(path.relative_to(STDLIB).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes such as "\d"
                nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError, OSError):
            continue  # a template, a broken link
        if path.parent.name == "pydoc_data":  # topics.py is one dict, name: text
            texts = [value.value for node in nodes if isinstance(node, ast.Dict) for value in node.values]
        else:
            owners = [node for node in nodes if isinstance(node, DOCSTRING_OWNERS)]
            owners.sort(key=lambda node: getattr(node, "lineno", 0))  # as in the source; ast.walk goes level by level
            texts = ["\n\n".join(filter(None, map(ast.get_docstring, owners)))]
        for text in texts:
            paragraphs = []
            for paragraph in re.split(r"\n\s*\n", text.strip()):
                if len(paragraph) <= 40 or paragraph not in seen:  # "For example:" may come again
                    paragraphs.append(paragraph)
                    seen.add(paragraph)
            documents.append("\n\n".join(paragraphs) + "\n")
    # Validation is the last tenth, and in the order of the alphabet that would be about urllib and xml alone.
    random.Random(0).shuffle(documents)
    return documents


def shakespeare_file(cache) -> Path:
    """Where tiny Shakespeare lies (1.1 MB, public domain): downloaded the first time, the checksum verified always."""
    path = Path(cache) / "tinyshakespeare.txt"
    try:
        content = path.read_bytes() if path.exists() else urllib.request.urlopen(SHAKESPEARE_URL, timeout=30).read()
        problem = "" if hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256 else "found another text (sha256)"
    except (OSError, http.client.HTTPException) as error:
        problem = f"no download ({error})"
    if problem:
        raise UserError(f"tiny Shakespeare: {problem}; put {SHAKESPEARE_URL} there by hand, as {path}")
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return path


def read_corpus(data: str, cache="data") -> list[str]:
    """The documents, none of them blank, of a corpus by name or of a file."""
    if data == "stdlib":
        documents = stdlib_documents()
    else:
        documents = read_documents(shakespeare_file(cache) if data == "shakespeare" else data)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{data}: found no text, expected at least one document")
    return documents


# ---- writing ------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for a file or folder, which gets its name after the block; after an error nothing is left."""
    temporary = Path(f"{path}.tmp-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if not (temporary.is_dir() and path.is_dir()):  # else another process made the same folder meanwhile
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # if it is a folder
        with contextlib.suppress(OSError):
            temporary.unlink()
