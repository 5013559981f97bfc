"""The process's environment. Every entry point imports this before TensorFlow.

Importing it sets environment variables only (a user's own values win), so it
costs nothing and works wherever TensorFlow has not been imported yet:

* ``TF_CPU_ALLOCATOR_USE_BFC`` gives the CPU the counting allocator that a GPU
  has. Without it the peak memory of a CPU cannot be read.
* ``TF_CPP_MIN_LOG_LEVEL`` and ``GRPC_VERBOSITY`` keep the start-up notes of the
  native libraries out of logs.
* ``TF_ENABLE_ONEDNN_OPTS`` switches oneDNN on. On x86 CPUs without AVX512-VNNI,
  AVX512-BF16 or AMX TensorFlow leaves it off, and the backward pass of
  convolutions then takes several times longer.
* ``KERAS_BACKEND``: the tracing and memory code here is written for TensorFlow.
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

if "tensorflow" in sys.modules:
    raise ImportError("runtime must be imported before tensorflow: the allocator is chosen when TensorFlow loads")
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


def seed_everything(seed):
    """Seeds Python, NumPy and Keras, and makes CPU runs repeatable to the last bit.

    On a GPU the kernels' own order of summation stays as it is: determinism
    there costs much time, and some operations have no deterministic kernel.

    Args:
        seed: int. Seed of initial weights, dropout, and everything else that
            draws from Keras's global generator.
    """
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(seed)
    if not tf.config.list_physical_devices("GPU"):
        tf.config.experimental.enable_op_determinism()


def device():
    """Returns the name of the device that the framework computes on, e.g. ``CPU:0``."""
    import tensorflow as tf

    return "GPU:0" if tf.config.list_physical_devices("GPU") else "CPU:0"


def device_facts():
    """Returns a dict with the device's name, the thread counts and the use of oneDNN, for config.json."""
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


def load_tensorflow():
    """Imports TensorFlow and finds the devices, without the native libraries' start-up notes.

    Those notes are written before any setting for them is read, straight to the
    process's standard error: the only place to stop them. A failure is raised
    as the exception that it is.
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
