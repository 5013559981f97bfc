"""The process's environment. Every entry point imports this module before TensorFlow.

Importing it only sets environment variables, unless the user has set them:

* `TF_CPU_ALLOCATOR_USE_BFC` selects the counting allocator that GPUs have. Without it the
  peak memory of a CPU cannot be read.
* `TF_ENABLE_ONEDNN_OPTS` switches oneDNN on. On x86 CPUs without AVX512-VNNI, AVX512-BF16
  or AMX, TensorFlow leaves it off, and the backward pass of convolutions takes several
  times longer.
* `TF_CPP_MIN_LOG_LEVEL` and `GRPC_VERBOSITY` keep notes of native libraries out of logs.
* `KERAS_BACKEND` selects TensorFlow.

In a process that imported TensorFlow first, such as a notebook, the variables are set all
the same. TensorFlow reads some of them when it first computes, so the memory of a CPU
may be impossible to measure; the first measurement then logs a warning.
"""

import os
import platform
import sys

_ENVIRONMENT = {
    "TF_CPU_ALLOCATOR_USE_BFC": "true",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",
    "KERAS_BACKEND": "tensorflow",
}
if platform.machine().lower() in ("x86_64", "amd64"):
    _ENVIRONMENT["TF_ENABLE_ONEDNN_OPTS"] = "1"

for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


def num_workers() -> int:
    """Returns the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and Keras, and makes runs on a CPU repeatable to the last bit.

    On a GPU, determinism would cost much time, and some operations have no deterministic
    kernel.

    Args:
        seed: int. Seed of initial weights, dropout, and everything else that draws from
            Keras' global generator.
    """
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(seed)
    if not tf.config.list_physical_devices("GPU"):
        tf.config.experimental.enable_op_determinism()


def device() -> str:
    """Returns the name of the device that TensorFlow computes on, e.g. `CPU:0`."""
    import tensorflow as tf

    return "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"


def device_facts() -> dict:
    """Returns the device's name, the thread counts and the use of oneDNN, for config.json."""
    import tensorflow as tf
    from tensorflow.python.util import _pywrap_util_port

    facts = {
        "device": device(),
        "cpu_count": os.cpu_count(),
        "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "inter_op_threads": tf.config.threading.get_inter_op_parallelism_threads(),
        "onednn": _pywrap_util_port.IsMklEnabled(),
    }
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        facts["device_name"] = tf.config.experimental.get_device_details(gpus[0]).get("device_name")
    return facts


def load_tensorflow() -> None:
    """Imports TensorFlow and finds the devices, without the notes of native libraries.

    These notes are written to the standard error of the process before any setting for
    them is read. Exceptions are raised as usual.
    """
    import absl.logging

    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import tensorflow as tf

        tf.config.list_physical_devices()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
    absl.logging.set_verbosity(absl.logging.FATAL)
    tf.get_logger().setLevel("ERROR")
