"""`fasttrain bench kernels` as a script: python scripts/bench_kernels.py [--json FILE] [--plot FILE.png]"""

from fasttrain.cli import main

if __name__ == "__main__":
    import sys

    main(["bench", "kernels", *sys.argv[1:]])
