"""What every script stands on: one-line errors, files that are written whole, flags made from a dataclass.

    start(main)                          a UserError becomes one line on stderr and exit code 2
    with replacing(path) as temporary:   the file or folder gets its name when it is complete
    cfg = parse(Config, argv, __doc__)   each field is a flag; the comment behind it is the flag's help"""
import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import secrets
import shutil
import sys
import typing
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: where, what was found, what was expected, what to change. One line."""

    def __str__(self) -> str:  # it may quote a file: cut it, and escape what is not printable
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__()[:1000])


def start(main) -> None:
    """Run `main()` as a program. Its integer result is the exit code; a UserError is one line and code 2."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # what a terminal cannot show is escaped
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:
        code, said = 130, "interrupted\n"
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        code, said = 141, ""
    except (UserError, OSError) as error:  # an OSError is for example a full disk under our own output
        code, said = 2, f"error: {UserError(error)}\n"
    for stream, text in ((sys.stdout, ""), (sys.stderr, said)):
        with contextlib.suppress(OSError):
            print(text, end="", file=stream, flush=True)
    os._exit(code)  # not sys.exit: its clean shutdown would wait for other ranks, and they may wait for us


@contextlib.contextmanager
def writing(path):
    """Turn an error of the disk into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: cannot be written: {why}; free space, or choose another place") from None


@contextlib.contextmanager
def replacing(path: Path) -> typing.Iterator[Path]:
    """A temporary path for a file or folder, renamed to `path` after the block; removed after an error."""
    temporary = Path(f"{path}.tmp-{secrets.token_hex(4)}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)  # first: a file renamed before it is on the disk is empty after a power cut
            os.replace(temporary, path)
            sync(path.parent)
        except OSError:
            if not (temporary.is_dir() and path.is_dir()):  # else another process made the same folder first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.unlink(missing_ok=True)


def sync(path) -> None:
    """Force a file to the disk; of a folder, the list of its files."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def keep_lines(path: str, last: int) -> None:
    """Rewrite a file of JSON lines: only those up to step `last` stay. A half-written line goes."""
    old = Path(path)
    lines = old.read_text("utf-8", "replace").split("\n")[:-1] if last and old.exists() else []
    with replacing(old) as temporary:
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= last]
        temporary.write_text("".join(kept), "utf-8")


KINDS = {int: {"type": int, "metavar": "N"}, float: {"type": float, "metavar": "X"},
         str: {"metavar": "TEXT"}, bool: {"action": argparse.BooleanOptionalAction}}


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse itself would print the whole usage
        raise UserError(message.replace("ignored explicit argument", "takes no value:") + " (see --help)")


def parse(config_class, argv=None, doc: str | None = None):
    """Command line -> an instance of the dataclass `config_class`. doc: what --help says first.

    Every field is a flag `--name`; bool fields also get `--no-name`; Literal[...] fields accept only their
    values. UserError for an unknown flag or a wrong value. A field from_ is the flag --from."""
    raw = argparse.RawDescriptionHelpFormatter  # keeps the lines of doc
    parser = _Parser(description=doc, allow_abbrev=False, formatter_class=raw)
    hints, groups = typing.get_type_hints(config_class), {"": parser}
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, (title, comment) in _comments(config_class, defaults).items():
        hint, default = hints[name], defaults[name]
        kind = KINDS.get(hint) or {"choices": typing.get_args(hint), "type": type(default)}  # of a Literal
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        words = f"{comment} [{default}]".replace("%", "%%")
        groups[title].add_argument(f"--{name.rstrip('_')}", dest=name, default=default, help=words, **kind)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown argument {unknown[0].split('=')[0]}")
    for name, value in vars(values).items():  # nan would pass all later comparisons
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise UserError(f"--{name} {value}: expected a finite number >= 0")
    return config_class(**vars(values))


def _comments(config_class, names) -> dict[str, tuple[str, str]]:
    """{field: (title of its group, help)} from the comments in the source, a subclass before its parents.
    A comment on a line of its own is a title. A line without one is a parent's flag with a new default."""
    found = {}
    for part in filter(dataclasses.is_dataclass, config_class.__mro__):
        title = ""
        for line in inspect.getsource(part).splitlines():
            if heading := re.match(r"    # (.*)", line):
                title = heading[1]
            elif (field := re.match(r"    (\w+): .*?  # (.*)", line)) and field[1] in names:
                found.setdefault(field[1], (title, field[2]))
    if missing := sorted(names.keys() - found.keys()):
        raise TypeError(f"{config_class.__name__}: expected a comment, as help, behind {', '.join(missing)}")
    return found


def require_positive(cfg, *names: str) -> None:
    """UserError for the first of these flags that is 0. With most counts 0 means "off"; these have no off."""
    for name in names:
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name} {getattr(cfg, name)}: expected more than 0")
