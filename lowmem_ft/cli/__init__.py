"""The command line: `lowmem-ft COMMAND`; `lowmem-ft --help` lists them."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

from lowmem_ft.core.errors import BudgetError, ConfigError, LowMemError
from lowmem_ft.core.files import is_full, is_refused
from lowmem_ft.core.host import prefer_huge_pages, prefer_short_waits
from lowmem_ft.core.interrupt import clean_up_when_ended
from lowmem_ft.core.printable import printable
from lowmem_ft.planner.alloc_conf import prefer_expandable_segments

_FORMAT_WARNING = warnings.formatwarning


def main() -> None:
    """Run the command line; exits with 0 done, 2 bad input, 3 nothing fits, 130 interrupted."""
    _prepare_streams()
    clean_up_when_ended()
    prefer_short_waits()
    prefer_huge_pages()
    prefer_expandable_segments()
    # it recommends, at import, a kernel from the network that this package does not use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.formatwarning = format_warning  # this process is the command's own
    try:
        from lowmem_ft.cli.app import app  # takes a while, in which Ctrl-C may come, too

        try:
            app()
        finally:
            sys.stdout.flush()  # here, and not when Python ends: that it cannot be written is told
    except LowMemError as error:
        _tell(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if is_refused(error):  # of a file beside those that a command looks at itself
            _tell(ConfigError("A file may not be used.", given=error, fix="see who may use it, or name another"))
            sys.exit(ConfigError.exit_code)
        if not (is_full(error) or isinstance(error, BrokenPipeError)):
            raise
        _forget(sys.stdout)
        if isinstance(error, BrokenPipeError):  # whoever read has enough
            sys.exit(1)
        _tell(f"The output cannot be written.\n  given:   {error}")
        sys.exit(2)
    except UnicodeEncodeError as error:  # of a path; what is printed has no such letters
        fix = "set PYTHONUTF8=1, or LC_ALL to a locale of UTF-8"
        _tell(ConfigError("The locale has no letters for a file's name.", given=error.object, fix=fix))
        sys.exit(ConfigError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not _ran_out_of_memory(error):
            raise
        fix = "close what else takes memory, or ask for less: a smaller budget, a shorter text, a smaller model"
        _tell(BudgetError("Memory ran out.", given=str(error).partition("\n")[0] or type(error).__name__, fix=fix))
        sys.exit(BudgetError.exit_code)


def _ran_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):  # nothing is imported then
        return True
    from lowmem_ft.core.out_of_memory import is_out_of_memory

    return is_out_of_memory(error)


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """What this package says, which pydantic may pass on, without the place in its code."""
    if category is UserWarning and {"lowmem_ft", "pydantic"} & set(Path(filename).parts):
        return f"Warning: {printable(str(message))}\n"
    return _FORMAT_WARNING(message, category, filename, lineno, line)


def _prepare_streams() -> None:
    """What the caller closed leads nowhere: otherwise files that a run opens get the numbers of the standard streams,
    and what is printed goes into them. What the locale has no letters for is written as \\u...."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _tell(message: object) -> None:
    try:
        print(f"lowmem-ft: {message}", file=sys.stderr)
    except OSError:  # the exit code alone tells then
        _forget(sys.stderr)


def _forget(stream: TextIO) -> None:
    """Let go what could not be written: Python would try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
