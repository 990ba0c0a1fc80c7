"""``python -m taskloom`` is the ``taskloom`` command."""

from taskloom.cli.main import main

if __name__ == "__main__":
    main()
