"""A page to generate pictures on: `python app.py [--model FOLDER]`, the same as `ldm app`."""

import sys

from ldm.cli.main import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]])
