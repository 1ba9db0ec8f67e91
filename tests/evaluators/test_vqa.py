import json

import numpy as np
import pytest
import torch
from blocktune.evaluators import CheckpointError, get
from blocktune.evaluators.vqa import ask, read_questions

from .test_clip_scores import photos

PROMPTS = ["a red circle", "two blue squares, one above the other", ""]


def first_word(folder: str, picture, question: str, pixels: int | None = None) -> tuple[np.ndarray, object]:
    """Logits of the first token that the model's own generate gives, and the tokenizer; BLIP as its authors ask it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, BlipForQuestionAnswering

    processor = AutoProcessor.from_pretrained(folder, **({"backend": "pil"} if "blip" in folder else {}))
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    if "blip" in folder:
        model = BlipForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()
        inputs = processor(images=picture, text=question, return_tensors="pt")
        assert inputs.input_ids[0, 0] == processor.tokenizer.cls_token_id
        inputs["input_ids"][0, 0] = len(processor.tokenizer) + 1  # [DEC], then [ENC]
        if pixels:
            size = {"height": pixels, "width": pixels}
            inputs["pixel_values"] = processor.image_processor(picture, size=size, return_tensors="pt").pixel_values
            options["interpolate_pos_encoding"] = True
    else:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        asked = f"<|vision_start|><|image_pad|><|vision_end|>{question}<|im_start|>"
        inputs = processor(images=picture, text=asked, return_tensors="pt")
    return model.generate(**inputs, **options).logits[0][0].double().numpy(), processor.tokenizer


def p_yes(folder: str, picture, question: str, pixels: int | None = None) -> float:
    logits, tokenizer = first_word(folder, picture, question, pixels)
    yes, no = (
        {ids[0] for word in words if len(ids := tokenizer.encode(word, add_special_tokens=False)) == 1}
        for words in (("yes", "Yes"), ("no", "No"))
    )
    mass = np.exp(logits - logits.max())
    return mass[list(yes)].sum() / mass[list(yes | no)].sum()


@pytest.mark.parametrize("family", ["vqa_score", "vqa_score blip"])
def test_vqa_score_is_the_probability_of_yes(family, model_scores):
    name = model_scores[family]
    folder = name.partition(":")[2]
    questions = [f'Does this figure show "{prompt}"? Please answer yes or no.' for prompt in PROMPTS]
    expected = [p_yes(folder, picture, asked) for picture, asked in zip(photos(), questions, strict=True)]
    scores = get(name).score(photos(), PROMPTS)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert len(set(scores)) == 3
    assert ((scores > 0) & (scores < 1)).all()


@pytest.mark.parametrize("family", ["vqa_score", "vqa_score blip"])
def test_a_picture_may_have_any_number_of_questions(family, model_scores):
    """Of unlike lengths, in one batch; none is answered otherwise than alone."""
    folder = model_scores[family].partition(":")[2]
    questions = [["a red circle?", "yes?"], [], ["a?"]]
    answers = ask(folder, photos(), questions)
    assert [answer.shape for answer in answers] == [(2,), (0,), (1,)]
    for picture, asked, got in zip(photos(), questions, answers, strict=True):
        np.testing.assert_allclose(got, [p_yes(folder, picture, question) for question in asked], rtol=0, atol=1e-5)
    assert len({round(answer, 3) for got in answers for answer in got}) == 3
    assert [answer.size for answer in ask(folder, photos(), [[]] * 3)] == [0, 0, 0]


def test_blip_sees_pictures_as_large_as_asked(model_scores):
    folder = model_scores["vqa_score blip"].partition(":")[2]
    answers = ask(folder, photos(), [["a circle?"]] * 3, pixels=64)
    expected = [[p_yes(folder, picture, "a circle?", pixels=64)] for picture in photos()]
    np.testing.assert_allclose(answers, expected, rtol=0, atol=1e-5)
    assert np.abs(np.array(answers) - ask(folder, photos(), [["a circle?"]] * 3)).min() > 1e-4


def test_questions_to_blip_are_cut_where_its_positions_end(model_scores):
    folder = model_scores["vqa_score blip"].partition(":")[2]
    first, other = (f"{'a long ' * 80}{thing}?" for thing in ("red circle", "blue square"))
    ((a, b),) = ask(folder, photos()[:1], [[first, other]])
    assert a == pytest.approx(b, abs=1e-6)


def test_both_spellings_of_an_answer_count(model_scores):
    from blocktune.evaluators.vqa import _answers

    yes, no = _answers(model_scores["vqa_score"].partition(":")[2])
    assert len(yes) == len(no) == 2
    yes, no = _answers(model_scores["vqa_score blip"].partition(":")[2])  # its words have no capitals
    assert len(yes) == len(no) == 1


def test_attributes_are_the_mean_over_a_prompts_questions(model_scores, tmp_path):
    folder = model_scores["vqa_score"].partition(":")[2]
    file = tmp_path / "questions.jsonl"
    records = [
        {"prompt": "a", "colors": {"circle": "red", "square": "blue"}},
        {"prompt": "b", "relation": ["cat", "lower-left", "tree"]},
        {"prompt": "a", "relation": ["circle", "left", "square"]},
    ]
    file.write_text("\n".join(json.dumps(record) for record in records))
    questions = read_questions(file)
    assert [question.splitlines()[1].partition(" Answer")[0] for question in questions["a"]] == [
        "Question: Is the circle red?",
        "Question: Is the square blue?",
        "Question: Is the circle on the left of the square?",
    ]
    assert questions["b"][0].startswith('Caption: "b"\nQuestion: Is the cat on the lower-left of the tree?')
    first, second, _ = photos()
    evaluator = get(f"vqa_attributes:{folder} with {file}")
    expected = [
        np.mean([p_yes(folder, first, asked) for asked in questions["a"]]),
        p_yes(folder, second, questions["b"][0]),
    ]
    np.testing.assert_allclose(evaluator.score([first, second], ["a", "b"]), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"prompts has 'c', on which vqa_attributes:.* has no question"):
        evaluator.score([first], ["c"])


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        '{"prompt": "a"}',
        '{"prompt": "a", "colors": {}}',
        '{"prompt": 3, "colors": {"cat": "red"}}',
        '{"prompt": "a", "relation": ["cat", "left"]}',
        '{"prompt": "a", "colors": {"cat": "red"}, "relation": ["cat", "left", "tree"]}',
    ],
)
def test_a_question_file_is_read_strictly(line, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "a", "colors": {"cat": "red"}}\n' + line + "\n")
    with pytest.raises(CheckpointError, match=r"questions\.jsonl:2 is .*; accepted: prompt, with colors or relation"):
        read_questions(file)


def test_a_model_without_the_words_is_refused(model_scores, tmp_path):
    from transformers import AutoTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil, BlipProcessor

    folder = model_scores["vqa_score blip"].partition(":")[2]
    BlipForQuestionAnswering.from_pretrained(folder).save_pretrained(tmp_path)
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    from transformers import BertTokenizer

    without = {("nay" if word == "no" else word): i for word, i in vocabulary.items()}
    BlipProcessor(BlipImageProcessorPil(), BertTokenizer(vocab=without)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no token for yes or for no"):
        get(f"vqa_score:{tmp_path}").score(photos(), PROMPTS)
