"""A question and its answer under the names of public tools: Alpaca and its kin; and answers of every kind."""

import base64

from tests.data.layouts.rows import A, meant, read, refused
from tests.data.layouts.writing import png

ONE, PLAIN = meant("What is it?", "a cat"), meant("What is it?", "a cat", images=())
PICKED = {**ONE, "choices": ["a dog", "a cat"]}
ASKED = {"image": A, "question": "What is it?"}
LONG = base64.b64encode(png() + bytes(2000)).decode()

LAYOUTS = [
    read("{image, question, answer}", {**ASKED, "answer": "a cat"}, ONE),
    read("{question, answer}", {"question": "What is it?", "answer": "a cat"}, PLAIN),
    read(
        "{image, question, answer, task, choices}",
        {**ASKED, "answer": "a cat", "task": "vqa", "choices": ["a dog", "a cat"]},
        {**PICKED, "task": "vqa"},
    ),
    read(
        "Alpaca, {instruction, input, output}",
        {"instruction": "Name it.", "input": "It purrs.", "output": "a cat"},
        meant("Name it.\nIt purrs.", "a cat", images=()),
    ),
    read(
        "Alpaca, an input of nothing",
        {"instruction": "What is it?", "input": "", "output": "a cat", "system": "", "history": []},
        PLAIN,
    ),
    read(
        "Alpaca with images (LLaMA-Factory)",
        {"instruction": "<image>What is it?", "input": "", "output": "a cat", "images": [A]},
        ONE,
    ),
    read(
        "Alpaca with a system and a history (LLaMA-Factory)",
        {
            "instruction": "Old?",
            "input": "",
            "output": "yes",
            "system": "Be brief.",
            "history": [["What is it?", "a cat"]],
        },
        meant("What is it?", "a cat", "Old?", "yes", images=(), system="Be brief."),
    ),
    read(
        "Alpaca on the hub, text holds the whole prompt",
        {
            "instruction": "What is it?",
            "input": "",
            "output": "a cat",
            "text": "Below is a task.\n### What is it?\n### a cat",
        },
        PLAIN,
    ),
    refused(
        "Alpaca, a text that says something else",
        {"instruction": "What is it?", "input": "", "output": "a cat", "text": "It sleeps."},
        "the key 'text'",
    ),
    read("{instruction, response}", {"instruction": "What is it?", "response": "a cat"}, PLAIN),
    read("{instruction, completion}", {"instruction": "What is it?", "completion": "a cat"}, PLAIN),
    read(
        "Dolly, {instruction, context, response, category}",
        {"instruction": "What is it?", "context": "It purrs.", "response": "a cat", "category": "open_qa"},
        meant("It purrs.\nWhat is it?", "a cat", images=()),
    ),
    read("{input, output}", {"input": "What is it?", "output": "a cat"}, PLAIN),
    read(
        "M3IT, {instruction, inputs, outputs, image_base64_str}",
        {"instruction": "Look.", "inputs": "What is it?", "outputs": "a cat", "image_base64_str": [LONG]},
        meant("Look.\nWhat is it?", "a cat", images=(base64.b64decode(LONG),)),
    ),
    read(
        "LLaVA coco2014_val_gpt4_qa, {image, instruction, output, type}",
        [{"id": "441147", "image": A, "instruction": "What is it?", "output": "a cat", "type": "conv"}],
        ONE,
    ),
    read("PaliGemma, {image, prefix, suffix}", {"image": A, "prefix": "What is it?", "suffix": "a cat"}, ONE),
    read(
        "Geometry and maths, {problem, solution}",
        {"images": [A], "problem": "<image>What is it?", "solution": "a cat"},
        ONE,
    ),
    read(
        "LLaVA eval, {question_id, image, text} to predict",
        {"question_id": 3, "image": A, "text": "What is it?", "category": "conv"},
        {**meant("What is it?", None), "id": "3"},
        require_answers=False,
    ),
    refused(
        "LLaVA eval, {question_id, image, text} to learn",
        {"question_id": 3, "image": A, "text": "What is it?"},
        "the last question has no answer",
    ),
    refused(
        "LLaVA eval, answers of a model {question_id, prompt, text}",
        {"question_id": 3, "prompt": "What is it?", "text": "a cat", "answer_id": "x", "model_id": "own"},
        "the key 'text'",
    ),
    read("An answer that is a number", {**ASKED, "answer": 3}, meant("What is it?", "3")),
    read("An answer that is a fraction", {**ASKED, "answer": 0.5}, meant("What is it?", "0.5")),
    refused("An answer that pandas made a float", {**ASKED, "answer": 3.0}, "may be meant as 3"),
    refused("An answer that is true", {**ASKED, "answer": True}, "answer is True; wanted text"),
    refused(
        "A list of answers as Python prints it",
        {**ASKED, "answer": "['a cat', 'cat']"},
        "a list as Python prints it",
    ),
    refused(
        "{question, answer, rationale}",
        {**ASKED, "answer": "a cat", "rationale": "It purrs."},
        "the key 'rationale'",
    ),
    refused(
        "{question, query, answer}",
        {"question": "What is it?", "query": "cat", "answer": "a cat"},
        "each of ['question', 'query'] may be the question",
    ),
    refused(
        "{question, answer, response}",
        {"question": "What is it?", "answer": "a cat", "response": "cat"},
        "each of ['answer', 'response'] may be the answer",
    ),
    refused(
        "verl, the answer inside of reward_model",
        {
            "data_source": "own",
            "prompt": [{"role": "user", "content": "What is it?"}],
            "ability": "see",
            "reward_model": {"ground_truth": "a cat"},
        },
        "the key 'ability'",
    ),
    refused(
        "Translations, {instruction, source, target}",
        {"instruction": "To German.", "source": "cat", "target": "Katze"},
        "the key 'source'",
    ),
]
