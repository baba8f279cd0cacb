"""The hash that ties a compiled library to the sources it was made of. Run by setup.py too, so it imports nothing."""

import hashlib
from pathlib import Path


def source_hash(csrc: Path, name: str) -> str:
    """16 hexadecimal digits over all that library `name` is compiled from: csrc/<name>/ and the headers in csrc/."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (*csrc.glob("*.h"), *(csrc / name).iterdir()) if p.is_file()):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
