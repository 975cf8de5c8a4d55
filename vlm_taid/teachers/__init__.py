"""Where the teacher's signal comes from."""

from .cached import ABOUT, VERSION, CachedTeacher, ShardWriter, StoredTokens, fingerprint, row_key, shard_file
from .live import LiveTeacher, TeacherOptions, head_rows
from .packed import prove_packing
from .several import SeveralTeachers, WeightedTeacherOptions

__all__ = [
    "ABOUT",
    "VERSION",
    "CachedTeacher",
    "LiveTeacher",
    "SeveralTeachers",
    "ShardWriter",
    "StoredTokens",
    "TeacherOptions",
    "WeightedTeacherOptions",
    "fingerprint",
    "head_rows",
    "prove_packing",
    "row_key",
    "shard_file",
]
