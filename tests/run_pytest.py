"""Runs pytest in a target of Bazel, with the target's arguments."""

import os
import sys

import pytest

if __name__ == "__main__":
    # Where the files of the target are: pytest would follow their links to the checkout.
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
