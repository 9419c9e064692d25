"""`python -m actstore` is the command `actstore`."""

from actstore.cli import main

main()
