"""`python -m stable_rnn`: the command `stable-rnn`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
