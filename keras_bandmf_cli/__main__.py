"""`python -m keras_bandmf_cli` is the command `keras-bandmf`."""

import sys

from keras_bandmf_cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
