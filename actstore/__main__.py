"""`python -m actstore` is the command `actstore`."""

from actstore.stopping import ignore, install


def main() -> None:
    """Takes over the signals before anything slow is imported, then runs the command line."""
    install()
    from actstore.cli import main as run

    try:
        run()
    finally:
        ignore()


if __name__ == "__main__":
    main()
