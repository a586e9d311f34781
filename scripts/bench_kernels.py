"""`fasttrain bench kernels` as a script: python scripts/bench_kernels.py [--json FILE] [--plot FILE.png]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
from fasttrain.cli.main import main

if __name__ == "__main__":
    main(["bench", "kernels", *sys.argv[1:]])
