"""Where the teacher's signal comes from."""

from .cached import ABOUT, BASIS, VERSION, CachedTeacher, ShardWriter, fingerprint, row_key, shard_file
from .live import LiveTeacher, TeacherOptions, head_rows
from .packed import prove_packing
from .several import SeveralTeachers, WeightedTeacherOptions
from .stored import EIGHTS, FOURS, Basis, K, StoredTokens, bytes_a_token, file_hash

__all__ = [
    "ABOUT",
    "BASIS",
    "EIGHTS",
    "FOURS",
    "VERSION",
    "Basis",
    "CachedTeacher",
    "K",
    "LiveTeacher",
    "SeveralTeachers",
    "ShardWriter",
    "StoredTokens",
    "TeacherOptions",
    "WeightedTeacherOptions",
    "bytes_a_token",
    "file_hash",
    "fingerprint",
    "head_rows",
    "prove_packing",
    "row_key",
    "shard_file",
]
