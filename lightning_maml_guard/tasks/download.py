"""Files of data sets whose authors let everyone download them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tqdm import tqdm

from lightning_maml_guard.tasks.image_files import DatasetError

_BLOCK = 1 << 20


def download(url: str, target: Path, md5: str) -> None:
    """Download a file, whole or not at all, with a progress bar.

    What an interrupted download has left in ``target.part`` is continued. Raises a DatasetError if the server cannot be
    reached, or if what came does not have this MD5; it is then removed.
    """
    import fsspec  # only here: it brings an HTTP client
    from aiohttp import ClientError
    from fsspec.exceptions import FSTimeoutError

    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        files = fsspec.filesystem("http", client_kwargs={"trust_env": True})  # $HTTPS_PROXY
        with part.open("ab") as stream, files.open(url, block_size=_BLOCK, cache_type="none") as remote:
            remote.seek(stream.tell())
            label = f"downloading {target.name}"
            with tqdm(total=remote.size, initial=stream.tell(), desc=label, unit="B", unit_scale=True) as bar:
                while block := remote.read(_BLOCK):
                    stream.write(block)
                    bar.update(len(block))
    except (OSError, ValueError, ClientError, FSTimeoutError) as error:
        cause = error.__cause__ or error  # fsspec hides it behind a FileNotFoundError
        said = " ".join(str(cause).split())
        arrived = part.stat().st_size if part.is_file() else None
        if arrived == 0:
            part.unlink()
        kept = f": what has arrived is kept in {part}" if arrived else ""
        raise DatasetError(
            f"{url} could not be downloaded ({type(cause).__name__}: {said}). Try again{kept}. Or download it in "
            f"another way, and save it as {target}."
        ) from error
    if hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest() != md5:
        part.unlink()
        raise DatasetError(
            f"What {url} sent is not the file that is expected: its MD5 is not {md5}. It was removed. Try again; "
            "behind a proxy, look at what that sends."
        )
    part.replace(target)
