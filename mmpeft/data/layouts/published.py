"""Rows of published data sets: they are told by keys that no other has, and some of their keys mean something there
alone."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mmpeft.data.layouts.fields import Fields
from mmpeft.data.layouts.names import plain, plain_names, sort_keys


@dataclass(frozen=True)
class Published:
    """What is known of the rows of one data set."""

    tell: frozenset[str]
    """Names that all of its rows have, and no row of another."""
    harmless: frozenset[str] = frozenset()
    """Names that change no sample: its labels of a question, other spellings of the same answer, explanations that are
    not asked for."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Name -> our key."""
    folders: tuple[str, ...] = ()
    """Keys that name the folders of the image, which ``file`` names without them."""
    file: str = ""


def _published(tell: str, harmless: str = "", **more: Any) -> Published:
    return Published(plain_names(tell), plain_names(harmless), **more)


PUBLISHED = {
    "VQA-RAD": _published(
        "phrase_type image_organ question answer",
        "phrase_type image_organ qid_linked_id image_case_url evaluation question_rephrase question_relation "
        "question_frame",
    ),
    "SLAKE": _published("q_lang base_type question answer", "base_type location modality triple"),
    "ScienceQA": _published(
        "question choices answer lecture solution skill",
        "lecture solution skill task grade",
        folders=("split", "id"),
        file="image",
    ),
    "GQA": _published(
        "question answer semantic is_balanced",
        "semantic semantic_str entailed equivalent is_balanced groups full_answer annotations types",
    ),
    "TextVQA": _published(
        "question image_classes flickr_300k_url",
        "image_classes flickr_300k_url flickr_original_url question_tokens ocr_tokens",
    ),
    "DocVQA": _published(
        "question ucsf_document_id", "doc_id ucsf_document_id ucsf_document_page_no question_types"
    ),
    "OK-VQA": _published("question question_type answers confidence", "confidence"),
    "VizWiz": _published("question answers answerable", "answerable"),
    "ChartQA": _published("query label human_or_machine", "human_or_machine"),
    "LLaVA-Med": _published("image conversatons domain", "domain"),
    "LLaVA-Med, instructions": _published("image conversations domain", "domain fig_caption in_text_mention"),
    "ROCOv2": _published("image caption cui", "cui"),
    "MIMIC-CXR, R2Gen": _published("report image_path study_id", "study_id subject_id"),
    "Karpathy's splits": _published(
        "filename sentences sentids", "sentids imgid cocoid", folders=("filepath",), file="filename"
    ),
    "Karpathy's splits, captions": _published("filename caption sentids", "sentids imgid cocoid"),
    "CLEVR": _published(
        "image_filename image_index question_index",
        "image_index question_index question_family_index program",
    ),
    "InfographicVQA": _published("image_local_name ocr_output_file", "ocr_output_file"),
    "Label Studio": _published(
        "annotation_id annotator lead_time",
        "annotation_id annotator lead_time created_at updated_at",
        renamed={"choice": "label"},
    ),
    "MathVista": _published(
        "pid decoded_image query question", "pid query unit precision", renamed={"decodedimage": "image"}
    ),
    "MMMU": _published(
        "question options img_type topic_difficulty", "img_type topic_difficulty explanation subfield"
    ),
    "TallyQA": _published("question answer is_simple", "is_simple"),
    "Visual Genome": _published("qa_id question answer", "qa_id a_objects q_objects"),
    "Flickr30k": _published(
        "image_name comment_number comment", "comment_number", renamed={"comment": "caption"}
    ),
    "FineVision": _published(
        "images texts relevance_ratings",
        "relevance_ratings relevance_min image_correspondence_ratings image_correspondence_min "
        "visual_dependency_ratings visual_dependency_min formatting_ratings formatting_min",
    ),
}

_ANY_HARMLESS = frozenset().union(*(own.harmless for own in PUBLISHED.values()))


def as_published(row: dict[str, Any]) -> dict[str, Any]:
    """The row with our keys in place of what means something there alone, and its image with its folders."""
    for own in _recognised(tuple(row)):
        if own.renamed:
            row = _renamed(row, own.renamed)
        if own.folders:
            row = _in_folders(row, own)
    return row


def take_published(fields: Fields) -> list[str]:
    """The keys of a published data set's row that are harmless there, taken before they are read as something else."""
    if fields.names.isdisjoint(_ANY_HARMLESS):
        return []
    harmless = {name for own in PUBLISHED.values() if own.tell <= fields.names for name in own.harmless}
    keys = [key for key in fields.left if plain(key) in harmless]
    fields.take_all(keys)
    return keys


@lru_cache(1000)
def _recognised(keys: tuple[str, ...]) -> list[Published]:
    names = sort_keys(keys).names
    return [own for own in PUBLISHED.values() if own.tell <= names and (own.renamed or own.folders)]


def _renamed(row: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    """What is renamed takes the place of what our key held."""
    new = {renamed[plain(key)]: value for key, value in row.items() if plain(key) in renamed}
    return {key: value for key, value in row.items() if plain(key) not in renamed and key not in new} | new


def _in_folders(row: dict[str, Any], own: Published) -> dict[str, Any]:
    parts = [row.get(key) for key in (*own.folders, own.file)]
    if not all(isinstance(part, str) and part for part in parts) or "/" in row[own.file]:
        return row
    rest = {key: value for key, value in row.items() if key not in own.folders or key in ("id", "split")}
    return rest | {own.file: "/".join(map(str, parts))}
