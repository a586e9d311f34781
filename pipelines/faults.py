"""Finding the file behind a pipeline's error: DALI does not know the names of files that it did not read itself."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from fasttrain.dataset import shown
from fasttrain.errors import RunError


@pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
def _decode_one() -> Any:
    path = fn.external_source(name="path", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(fn.io.file.read(path), output_type=types.RGB, adjust_orientation=False)


def decode_error(error: Exception, paths: Sequence[str]) -> RunError:
    """A RunError that names the first of `paths` that cannot be read and decoded, or all of the batch if each can."""
    for path in paths:
        try:
            if os.path.getsize(path) == 0:
                return RunError(f"cannot decode {shown(path)}: the file is empty")
            pipe = _decode_one()  # afresh each time: after some errors a pipeline fails for ever
            pipe.build()
            pipe.feed_input("path", [np.frombuffer(os.fsencode(path), np.uint8)])
            pipe.run()
        except OSError as reason:
            return RunError(f"cannot read {shown(path)}: {reason.strerror}")
        except RuntimeError:  # DALI's reason is a number, or nothing
            return RunError(f"cannot decode {shown(path)}: damaged, or no image that DALI reads; mend or remove it")
    few = ", ".join(shown(path) for path in paths[:3])
    return RunError(f"the data pipeline failed on a batch of {len(paths)} files ({few}, …): {_gist(error)}")


def _gist(error: Exception) -> str:
    """The line of DALI's report that says what happened: the first after `encountered:`, where there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    at = lines.index("encountered:") + 1 if "encountered:" in lines[:-1] else 0
    return lines[at] if lines else "unknown error"
