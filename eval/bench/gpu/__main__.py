"""Entry point of `python -m eval.bench.gpu`."""

import sys

from eval.bench.gpu.bench import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
