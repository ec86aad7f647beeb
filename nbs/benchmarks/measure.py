"""What every benchmark needs: where its numbers come from, and a safe place to put them."""

import json
import os
import platform
from pathlib import Path


def processor_name():
    "The processor's name on Linux, or what Python knows of it."
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def processor_details():
    "What tells processors of the same name apart, on Linux: family and model, and the size of the last cache."
    details = {}
    try:
        lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
        known = {line[0].strip(): line[-1].strip() for line in lines}
        details["model"] = f"family {known['cpu family']}, model {known['model']}"
        caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        details["last cache"] = max(caches).read_text().strip()  # the indices grow with the distance from the core
    except (OSError, KeyError, ValueError):
        pass
    return details


def environment():
    "Machine and versions, as a dict of strings."
    import keras
    import numpy

    backend = keras.backend.backend()
    on_cpu = "cpu" in str(keras.ops.zeros(1).device).lower()
    return dict(
        processor=processor_name(),
        **processor_details(),
        python=platform.python_version(),
        keras=keras.__version__,
        backend=f"{backend} {__import__(backend).__version__} on the {'CPU' if on_cpu else 'GPU'}",
        numpy=numpy.__version__,
    )


def save(path, data):
    "Write JSON by way of a temporary file, so that an interruption never leaves half a file."
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)
