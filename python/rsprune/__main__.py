"""`python -m rsprune` is `rsprune`."""

from rsprune.cli import main

if __name__ == "__main__":
    main()
