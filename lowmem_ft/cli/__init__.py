"""The command line: `lowmem-ft COMMAND`; `lowmem-ft --help` lists them."""

from __future__ import annotations

import logging
import os
import sys

from lowmem_ft.core.errors import LowMemError
from lowmem_ft.core.files import is_full
from lowmem_ft.core.host import prefer_huge_pages
from lowmem_ft.planner.alloc_conf import prefer_expandable_segments


def main() -> None:
    """Run the command line; exits with 0 done, 2 bad input, 3 nothing fits, 130 interrupted."""
    # Threads that wait for each other must not hold their cores: where something else runs on one of two cores, steps
    # of the demo take 14 s with libgomp's spinning, 0.4 s without (0.26 s on idle cores). Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    prefer_huge_pages()
    prefer_expandable_segments()
    # it recommends, at import, a kernel from the network that this package does not use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from lowmem_ft.cli.app import app

    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, and not when Python ends: that it cannot be written is told
    except LowMemError as error:
        print(f"lowmem-ft: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        from lowmem_ft.trainer.recovery import NoSaferPolicyError, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        # where a step is not done again: while weights load, or in an answer, whose cache no plan knows
        given = str(error).partition("\n")[0] or type(error).__name__
        fix = "close what else takes memory, or ask for less: a shorter text, a smaller model"
        told = NoSaferPolicyError("Memory ran out.", given=given, fix=fix)
        print(f"lowmem-ft: {told}", file=sys.stderr)
        sys.exit(told.exit_code)
    except OSError as error:
        if not (is_full(error) or isinstance(error, BrokenPipeError)):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more
        if isinstance(error, BrokenPipeError):  # whoever read has enough
            sys.exit(1)
        print(f"lowmem-ft: The output cannot be written.\n  given:   {error}", file=sys.stderr)
        sys.exit(2)
