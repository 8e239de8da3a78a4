"""Loads TensorFlow without its lines about GPUs that are not there; all other lines are shown.

Import it first. TensorFlow writes these lines before it reads `TF_CPP_MIN_LOG_LEVEL`.
"""

import os
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # from then on: errors
NOISE = (
    b"WARNING: All log messages before absl::InitializeLog()",
    b"I0000 ",
    b"failed call to cuInit: INTERNAL: CUDA error: Failed call to cuInit: UNKNOWN ERROR (303)",
)


def load() -> None:
    """Imports TensorFlow and looks for GPUs, and then writes what is no noise to stderr."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        shown = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.list_physical_devices()
        finally:
            os.dup2(shown, 2)
            os.close(shown)
            kept.seek(0)
            for line in kept:
                if not any(noise in line for noise in NOISE):
                    os.write(2, line)


if "tensorflow" not in sys.modules:
    load()
