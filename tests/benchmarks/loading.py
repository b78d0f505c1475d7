"""What loading the embedded model costs: from its dequantized weights in the cache, beside the GGUF file, in one run.

    python tests/benchmarks/loading.py [ROUNDS]

Seconds of processor time of this process beyond importing (medians of ROUNDS, 3; the file is read once). The cache is a folder of its
own, which is deleted; the file is fetched if it is not in the user's cache. The last line is JSON, `ratio`: file over kept weights.
"""

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from basin_lens import model as door
from basin_lens.model import loading


def seconds(work) -> float:
    """Processor time of one call, all threads of this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def imported() -> float:
    """What loading imports when it is first called, so that no measured call pays for it."""
    return seconds(lambda: (__import__("transformer_lens.model_bridge"), __import__("transformers.models.llama.modeling_llama")))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    file = door.embedded_file()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").mkdir()
        shutil.copy2(file, Path(folder) / "models")
        os.environ["BASIN_LENS_CACHE"] = folder
        importing = imported()
        of_file = seconds(lambda: loading._from_files(file, "bridge", torch.device("cpu"), torch.float32, loading.EMBEDDED_NAME))
        first = seconds(lambda: door.load_model(device="cpu"))
        later = [seconds(lambda: door.load_model(device="cpu")) for _ in range(rounds)]
        size = sum(one.size for one in door.kept_models() if one.name != file.name)
    told = {
        "machine": platform.machine(), "threads": torch.get_num_threads(), "importing": round(importing, 2),
        "gguf_file": round(of_file, 2), "first_load": round(first, 2), "later_loads": [round(one, 2) for one in later],
        "later": round(statistics.median(later), 2), "kept_megabytes": round(size / 1e6, 1),
        "ratio": round(of_file / statistics.median(later), 1),
    }  # fmt: skip
    for name, value in told.items():
        print(f"{name:>16}  {value}")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
