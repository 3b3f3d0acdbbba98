"""``python -m ilvae_fast``, for launchers such as torchrun: the command line."""

from .cli import main

if __name__ == "__main__":
    main()
