"""Rows of a task's file: columns named, questions phrased, pictures opened, whatever the benchmark's own layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_taid.data.conversation import Conversation
from vlm_taid.data.formats import FORMATS, RowContext
from vlm_taid.data.sources import ConversationDataset, SourceOptions
from vlm_taid.errors import BadRow
from vlm_taid.evaluation.columns import LONGEST_INDEX, pictures_of, renamed
from vlm_taid.evaluation.prompts import Prompt, placed

_PICTURES = ("image", "images", "decoded_image")


@dataclass(frozen=True)
class PictureTable:
    """Pictures that lie in another table (GQA's).

    Args:
        source: the table.
        key: its column that a row's ``row_key`` names.
        image: its column of pictures.
        row_key: the column of the questions' rows.
    """

    source: SourceOptions
    key: str = "id"
    image: str = "image"
    row_key: str = "imageId"

    @cached_property
    def _dataset(self) -> ConversationDataset:
        return ConversationDataset([self.source], need_answer=False)

    @cached_property
    def _index(self) -> dict[str, int]:
        dataset = self._dataset
        return {str(dataset.columns(index)[2].get(self.key)): index for index in range(len(dataset))}

    def picture(self, row: Mapping[str, Any], name: str) -> tuple[Any, Path]:
        """The row's picture and the folder that its path starts from; BadRow if there is none."""
        wanted = str(row.get(self.row_key))
        if wanted not in self._index:
            raise BadRow(name, f"column {self.row_key}: {wanted!r} is no {self.key} of {self.source.path}")
        _, folder, columns = self._dataset.columns(self._index[wanted])
        return columns.get(self.image), folder


class Rows(Sequence[Conversation]):
    """A source's rows, each ending with its question. ``fields`` are the columns without pictures, as they stand.

    Args:
        source: the file.
        prompt: how questions are phrased; ``source.prompt`` or the question alone if None.
        aliases: our column names to others' that may stand in their place: the first one that a row has is taken.
        pictures: another table with the pictures, for rows without their own.

    Reading a row raises BadRow, which names row and column: no question, a picture that is missing or broken.
    """

    def __init__(
        self,
        source: SourceOptions,
        prompt: Prompt | None = None,
        aliases: Mapping[str, Sequence[str]] | None = None,
        pictures: PictureTable | None = None,
    ):
        self._dataset = ConversationDataset([replace(source, prompt=None)], need_answer=False)
        self._prompt = prompt or Prompt(source.prompt or "{question}")
        self._aliases, self._pictures = aliases or {}, pictures

    def __len__(self) -> int:
        return len(self._dataset)

    def columns(self, index: int) -> tuple[str, Path, dict[str, Any]]:
        """A row's name, the folder that its pictures' paths start from, and its columns under our names."""
        name, folder, row = self._dataset.columns(index)
        return name, folder, renamed(row, self._aliases)

    @cached_property
    def _places(self) -> dict[str, int]:
        """Where each ``index`` of a VLMEvalKit file stands."""
        return {str(self._dataset.columns(index)[2].get("index")): index for index in range(len(self._dataset))}

    def _own_pictures(self, row: Mapping[str, Any], name: str) -> list[Any]:
        value = row.get("image")
        if "index" not in row or not isinstance(value, str) or len(value) > LONGEST_INDEX or value not in self._places:
            return pictures_of(row, name)
        _, _, other = self._dataset.columns(self._places[value])
        if len(str(other.get("image"))) <= LONGEST_INDEX:
            raise BadRow(name, f"column image: it names row {value!r}, which has no picture of its own")
        return pictures_of({"image": other["image"]}, name)

    def __getitem__(self, index: int) -> Conversation:  # pyright: ignore[reportIncompatibleMethodOverride]
        name, folder, row = self.columns(index)
        found = self._own_pictures(row, name)
        if not found and self._pictures is not None:
            picture, folder = self._pictures.picture(row, name)
            found = [picture]
        text, found = placed(self._prompt.of(row, name), found, name)
        context = RowContext(name, folder, need_answer=False)
        conversation = FORMATS["vqa"]({"question": text, "images": found}, context)
        fields = {key: value for key, value in row.items() if not _is_picture_column(key, value)}
        return replace(conversation, fields=fields, index=index)


def _is_picture_column(name: str, value: Any) -> bool:
    if name in _PICTURES or (name.startswith("image_") and name[6:].isdecimal()):
        return True
    return isinstance(value, bytes | Image.Image) or (isinstance(value, dict) and set(value) == {"bytes", "path"})
