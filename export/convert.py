"""Conversion of a traced network to a LiteRT model of built-in operations."""

from __future__ import annotations

import re
import tempfile

import tensorflow as tf

from core.errors import RunError


def to_litert(module: tf.Module, signatures: dict) -> bytes:
    """Returns the content of a .tflite file with the signatures of `training_module.make`.

    Raises:
        RunError: if the converter needs operations that LiteRT has not built in.
    """
    with tempfile.TemporaryDirectory(prefix="adabet-litert-") as folder:
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        tf.saved_model.save(module, folder, signatures=signatures, options=options)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=list(signatures))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.experimental_enable_resource_variables = True
        try:
            return converter.convert()
        except Exception as error:
            found = re.findall(r"(?:Flex|Custom) ops: ([^\n]*)", str(error))
            raise RunError(f"the network must convert to LiteRT's built-in operations. Received: {found}") from error
