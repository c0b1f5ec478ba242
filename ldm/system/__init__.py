"""The machine underneath: files, memory, devices.

checks.py      bounds of numbers
devices.py     which device, which dtype
errors.py      errors that several packages raise
files.py       folders that are whole or absent, free space
hashing.py     manifests
importing.py   quick imports, quick exits
memory.py      memory that a CPU frees and needs again; peak memory
plain_yaml.py  YAML without surprises
user_cache.py  folders that are made once on a machine and kept
"""
