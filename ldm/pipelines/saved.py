"""A saved pipeline is a function of the model: not of where it was loaded from, nor of what it drew before.

diffusers writes the path that a network was loaded from into its config; transformers writes into
tokenizer_config.json whether that was offline and a folder, and into tokenizer.json how the last call padded and cut.
None of it changes what a pipeline draws: padding and length are asked for in each call.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: What configs say of how they were loaded.
LOADING = frozenset({"_name_or_path", "name_or_path", "is_local", "local_files_only"})


def forget_calls(tokenizer: Any) -> None:
    """Let a tokenizer forget how its last call padded and cut; the next one says it anew."""
    if tokenizer is not None and tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()


def forget_loading(folder: Path) -> None:
    """Take out of a pipeline folder's configs what loading has put there."""
    for path in [folder / "model_index.json", *folder.glob("*/*config.json")]:
        said = json.loads(path.read_text("utf-8"))
        if said.keys() & LOADING:
            kept = {key: value for key, value in said.items() if key not in LOADING}
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", "utf-8")
