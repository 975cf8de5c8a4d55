"""Where the teacher's signal comes from."""

from .live import LiveTeacher, TeacherOptions

__all__ = ["LiveTeacher", "TeacherOptions"]
