"""`python -m scree`: the command line, which is also the script `scree`."""

from ._cli.app import main

if __name__ == "__main__":
    main()
