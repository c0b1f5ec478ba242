"""A page to generate pictures on: `python app.py [--model FOLDER]`, the same as `ldm app`."""

from ldm.app.page import main

if __name__ == "__main__":
    main()
