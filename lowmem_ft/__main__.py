"""`python -m lowmem_ft` is `lowmem-ft`."""

from lowmem_ft.cli import main

main()
