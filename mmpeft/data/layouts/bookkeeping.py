"""Keys that public data sets carry beside what they mean, and that no reading of a row would turn into another sample.

Everything else that is not understood is refused, so each name here has its reason. They are counted and told.
"""

from functools import lru_cache
from typing import Any

from mmpeft.data.layouts.fields import Fields
from mmpeft.data.layouts.names import MEANINGS, plain, sort_keys
from mmpeft.data.layouts.pictures import is_image_name


def _names(text: str) -> frozenset[str]:
    return frozenset(map(plain, text.split()))


ALWAYS = {
    "which row it is": _names(
        "index idx __index_level_0__ row_id pair_id answer_id dataset_id __key__ __url__"
    ),
    "where it comes from": _names(
        "source dataset dataset_name data_source ds_name origin_dataset origin_split data_split set_name split subset "
        "license licence"
    ),
    "about the row": _names("metadata meta lang language q_lang"),
}
"""Reason -> names."""
BESIDE_IMAGE = {
    "the same image once more": _names("image_id img_id url coco_url flickr_url image_hash md5 sha256"),
    "its size": _names("width height image_width image_height image_size width_list height_list"),
}
"""Harmless only where the image is known: without one, they may be all that tells of it."""
BESIDE_ANSWER = {
    "the kind of question or answer": _names(
        "question_type question_types answer_type content_type category l2-category type difficulty topic subject skill"
    ),
    "who wrote a machine's answer": _names("model model_id"),
}
"""Harmless only beside a question and its answer: alone, they may be the answer."""
PUBLISHED: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "VQA-RAD": (
        _names("phrase_type image_organ question answer"),
        _names(
            "phrase_type image_organ qid_linked_id image_case_url evaluation question_rephrase question_relation "
            "question_frame"
        ),
    ),
    "SLAKE": (_names("q_lang base_type question answer"), _names("base_type location modality triple")),
    "ScienceQA": (
        _names("question choices answer lecture solution skill"),
        _names("lecture solution skill task grade"),
    ),
    "GQA": (
        _names("question answer semantic is_balanced"),
        _names("semantic semantic_str entailed equivalent is_balanced groups full_answer annotations types"),
    ),
    "TextVQA": (
        _names("question image_classes flickr_300k_url"),
        _names("image_classes flickr_300k_url flickr_original_url question_tokens ocr_tokens"),
    ),
    "DocVQA": (
        _names("question ucsf_document_id answers"),
        _names("doc_id ucsf_document_id ucsf_document_page_no"),
    ),
    "VizWiz": (_names("question answers answerable"), _names("answerable")),
    "ChartQA": (_names("query label human_or_machine"), _names("human_or_machine")),
    "LLaVA-Med": (_names("image conversatons domain"), _names("domain")),
    "LLaVA-Med, instructions": (
        _names("image conversations domain"),
        _names("domain fig_caption in_text_mention"),
    ),
    "ROCOv2": (_names("image caption cui"), _names("cui")),
    "COCO, Karpathy's split": (_names("sentences sentids"), _names("sentids imgid cocoid")),
    "Flickr30k": (_names("image_name comment_number comment"), _names("comment_number")),
    "FineVision": (
        _names("images texts relevance_ratings"),
        _names(
            "relevance_ratings relevance_min image_correspondence_ratings image_correspondence_min "
            "visual_dependency_ratings visual_dependency_min formatting_ratings formatting_min"
        ),
    ),
}
"""Data set -> the names that tell that a row is one of it, and those that are harmless there: its labels of a question,
other spellings of the same answer, explanations that are not asked for."""
RENAMED: dict[str, tuple[frozenset[str], dict[str, str]]] = {
    "Flickr30k": (_names("image_name comment_number comment"), {"comment": "caption"}),
}
"""Data set -> the same, and names that mean something there alone -> our keys."""
TRANSLATED = frozenset({"target", "targets"})
"""Names beside which a source is a text to be worked on, not where a row comes from."""

_ALWAYS = frozenset().union(*ALWAYS.values())
_BESIDE_IMAGE = frozenset().union(*BESIDE_IMAGE.values())
_BESIDE_ANSWER = frozenset().union(*BESIDE_ANSWER.values())
_ANY_PUBLISHED = frozenset().union(*(harmless for _, harmless in PUBLISHED.values()))


def rename_published(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a published data set with our keys in place of what means something there alone."""
    renamed = _renamed(tuple(row))
    return {renamed.get(key, key): value for key, value in row.items()} if renamed else row


@lru_cache(1000)
def _renamed(keys: tuple[str, ...]) -> dict[str, str]:
    names = sort_keys(keys).names
    return {
        key: renamed[plain(key)]
        for signature, renamed in RENAMED.values()
        for key in keys
        if signature <= names and plain(key) in renamed
    }


def take_published(fields: Fields) -> list[str]:
    """The keys of a published data set's row that are harmless there, taken before they are read as something else."""
    if not fields.names & _ANY_PUBLISHED:
        return []
    harmless = {name for signature, own in PUBLISHED.values() if signature <= fields.names for name in own}
    keys = [key for key in fields.left if plain(key) in harmless]
    fields.take_all(keys)
    return keys


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
