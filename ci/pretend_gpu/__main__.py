"""``python -m ci.pretend_gpu [-m] MODULE ...``"""

import runpy
import sys

from ci import pretend_gpu


def main() -> None:
    sys.argv = [word for k, word in enumerate(sys.argv) if k == 0 or word != "-m" or k > 1]
    if len(sys.argv) < 2:
        sys.exit("usage: python -m ci.pretend_gpu MODULE [ARGUMENT ...]")
    sys.argv = sys.argv[1:]
    pretend_gpu.install()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        for (what, line), n in pretend_gpu.waits.total.most_common(40):
            print(f"{n:6} {what:28} {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
