"""The name of a source => its store and its rows: which kind of source a name is."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence

from ldm.data.rows import BadDataError, Finding, Store, require_columns
from ldm.data.sources import folders, hub, shards


def open_source(
    source: str,
    is_path: bool,
    image_column: str,
    caption_columns: Sequence[str],
    hub_config: str | None,
    hub_split: str,
    progress: bool,
) -> tuple[Store, Iterator[Finding], folders.Listing | None]:
    """The store and the rows of a source, and what lies in its folder. With `is_path` it is no name on the Hub."""
    if os.path.isdir(source):
        listing = folders.list_folder(source)
        if not hub.is_saved(source):
            store = folders.FolderStore(source)
            if listing.metadata:
                return store, folders.metadata_rows(listing, store, caption_columns), listing
            if listing.pictures or listing.texts:
                if not caption_columns:
                    return store, folders.bare_rows(listing, store), listing
                where = f"a .txt beside a picture, as in {source},"
                require_columns(caption_columns, ["text"], where, "set data.caption_columns=[text]")
                return store, folders.text_rows(listing, store), listing
            if listing.shards:
                paths = [listing.shown(name) for name in listing.shards]
                return shards.ShardStore(paths), shards.shard_rows(paths, caption_columns, progress), None
            if not listing.tables:
                raise BadDataError(
                    f"no pictures found: {source}; expected pictures with metadata.csv, .jsonl or .parquet, "
                    "pictures with a .txt beside each, or .tar shards"
                )
    elif shards.is_pattern(source):
        paths = shards.find_shards(source)
        return shards.ShardStore(paths), shards.shard_rows(paths, caption_columns, progress), None
    elif os.path.exists(source):
        raise BadDataError(f"source is a file: {source}; expected its folder, {os.path.dirname(source) or '.'}")
    elif is_path or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) or os.path.isdir(source.split("/")[0]):
        raise BadDataError(f"folder is missing: {source}{_nearest_folder(source)}")
    dataset = hub.load(source, hub_config, hub_split)
    hub_store = hub.open_store(dataset, source, image_column, caption_columns)
    return hub_store, hub.hub_rows(dataset, source, caption_columns, image_column), None


def _nearest_folder(path: str) -> str:
    parent, name = os.path.split(os.path.normpath(path))
    there = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    nearest = difflib.get_close_matches(name, there, n=1)
    return f"; the nearest is {os.path.join(parent, nearest[0])}" if nearest else ""
