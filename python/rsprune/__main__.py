"""`python -m rsprune` is `rsprune`."""

from rsprune.cli import entry

if __name__ == "__main__":
    entry()
