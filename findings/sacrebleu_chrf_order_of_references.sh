#!/usr/bin/env bash
# sacrebleu 2.6.0 (Python 3.11): the corpus chrF of the same answers with the same references changes with the order in
# which a row's references are given, here from 97.92 to 30.25.
#
# Of several references chrF takes the one with the highest F, and of equal ones the first. An answer that shares no
# character run with any of them (an empty one above all) has F = 0 with each, so the first reference is taken, and its
# length goes into the corpus recall: a short one costs little, a long one much. BLEU does not depend on the order.
# Whoever compares chrF between tools or files should fix the order first, for example by sorting.
#
# Output seen:
#   short reference first: chrF 97.92, BLEU 84.65
#   long reference first:  chrF 30.25, BLEU 84.65
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'sacrebleu==2.6.0'
"$folder/venv/bin/python" - <<'PYTHON'
from sacrebleu.metrics import BLEU, CHRF

answers = ["", "a dog lies on the grass"]
short = ["no", "a dog lies on the grass"]
long = ["nothing of that kind can be seen anywhere in this picture", "a dog lies on the grass"]
scores = {}
for name, references in (("short reference first:", [short, long]), ("long reference first: ", [long, short])):
    scores[name] = [metric.corpus_score(answers, references).score for metric in (CHRF(), BLEU())]
    print(f"{name} chrF {scores[name][0]:.2f}, BLEU {scores[name][1]:.2f}")
(chrf_short, bleu_short), (chrf_long, bleu_long) = scores.values()
assert chrf_short - chrf_long > 20, "the order no longer matters to chrF"
assert abs(bleu_short - bleu_long) < 1e-9, "the order matters to BLEU"
PYTHON
