"""`python -m infscan` is `infscan`."""

from infscan.cli import main

if __name__ == "__main__":
    main()
