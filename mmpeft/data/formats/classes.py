"""Rows of classification: classes by their names; an image and its class alone are a question with choices."""

from typing import Any

from mmpeft.data.formats.base import DataError

CLASS_INSTRUCTION = "What is in this image?"
"""The question of a row that gives an image its class and asks none."""
IMAGE_KEYS = ("image", "img", "file_name")


def class_row(row: dict[str, Any], names: dict[str, list[str]]) -> Any:
    """The row with the names of its classes.

    Args:
        names: key -> the class names, of which the row holds a number (-1: none is known).
    """
    for key, classes in names.items():
        number = row[key]
        if not isinstance(number, int) or not -1 <= number < len(classes):
            return DataError(f"{key} is {number!r:.60}; wanted the number of one of {len(classes)} classes")
        row[key] = classes[number] if number >= 0 else None
    if len(names) > 1:
        return row
    ((key, classes),) = names.items()
    images = [name for name in IMAGE_KEYS if row.get(name) is not None]
    if len(images) == 1 and not row.keys() - {key, images[0], "id"}:
        made = image_of_class(row[images[0]], row[key], classes)
        return made | ({"id": row["id"]} if row.get("id") is not None else {})
    if (key == "answer" or (key == "label" and "answer" not in row)) and len(classes) > 1:
        row.setdefault("choices", classes)
    return row


def image_of_class(image: Any, name: str | None, classes: list[str]) -> dict[str, Any]:
    """An image as a question about its class. Fewer than two classes are no choice."""
    row = {"image": image, "question": CLASS_INSTRUCTION, "answer": name}
    return row | ({"choices": classes} if len(classes) > 1 else {})
