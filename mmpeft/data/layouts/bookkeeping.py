"""Keys that rows of many data sets carry beside what they mean, and that no reading would turn into another sample.

Everything else that is not understood is refused, so each name here has its reason. They are counted and told. What is
harmless in the rows of one data set alone stands in `published.py`.
"""

from mmpeft.data.image_names import is_image_name
from mmpeft.data.layouts.fields import Fields
from mmpeft.data.layouts.names import MEANINGS, plain, plain_names

ALWAYS = {
    "which row it is": plain_names(
        "index idx __index_level_0__ row_id pair_id answer_id dataset_id __key__ __url__"
    ),
    "where it comes from": plain_names(
        "source dataset dataset_name data_source ds_name origin_dataset origin_split data_split set_name split subset "
        "license licence"
    ),
    "about the row": plain_names("metadata meta lang language q_lang"),
}
"""Reason -> names."""
BESIDE_IMAGE = {
    "the same image once more": plain_names(
        "image_id img_id url coco_url flickr_url image_hash md5 sha256 image_source"
    ),
    "its size": plain_names("width height image_width image_height image_size width_list height_list"),
}
"""Harmless only where the image is known: without one, they may be all that tells of it."""
BESIDE_ANSWER = {
    "the kind of question or answer": plain_names(
        "question_type question_types answer_type content_type category l2-category type difficulty topic subject skill"
    ),
    "who wrote a machine's answer": plain_names("model model_id"),
}
"""Harmless only beside a question and its answer: alone, they may be the answer."""
TRANSLATED = frozenset({"target", "targets"})
"""Names beside which a source is a text to be worked on, not where a row comes from."""

_ALWAYS = frozenset().union(*ALWAYS.values())
_BESIDE_IMAGE = frozenset().union(*BESIDE_IMAGE.values())
_BESIDE_ANSWER = frozenset().union(*BESIDE_ANSWER.values())


def take_bookkeeping(fields: Fields, has_image: bool, has_answer: bool) -> list[str]:
    """The keys that are left and harmless in such a row."""
    if not fields.some_left:
        return []
    harmless = _ALWAYS | (_BESIDE_IMAGE if has_image else set()) | (_BESIDE_ANSWER if has_answer else set())
    if fields.names & TRANSLATED:
        harmless -= {"source"}
    keys = [
        key
        for key in fields.left
        if (plain(key) in harmless or MEANINGS.get(plain(key)) == "question id")
        and (has_image or not _may_hold_image(fields.row[key]))
    ]
    fields.take_all(keys)
    return keys


def _may_hold_image(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_may_hold_image, value.values()))
    return is_image_name(value) or isinstance(value, bytes)
